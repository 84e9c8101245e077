#!/bin/bash
# How long a protected guest is stopped for a checkpoint, in the lab, by how many pages it dirties an epoch:
#   cargo xtask lab run tests/scripts/stop-time.sh [EPOCH_MS [STOPS]]
# Median and p99 of at least STOPS stops, by QEMU's own STOP and RESUME events. An emulated host makes everything
# tens of times slower than a real one: read the ratios.
set -euo pipefail
epoch_ms=${1:-250}
stops=${2:-200}

status() { lab exec alpha -- understudy status g1 --json; }
field() { python3 -c 'import json,sys; print(json.load(sys.stdin)["guests"][0][sys.argv[1]])' "$1"; }

lab guest start g1 alpha
echo "pages written   pages p50 an epoch   stop p50 ms   stop p99 ms   stops"
for pages in 0 1000 4000; do
    until lab guest ask g1 touch "$pages" $((epoch_ms / 4)) >/dev/null; do sleep 1; done
    lab exec alpha -- understudy protect g1 --to beta --epoch-ms "$epoch_ms" 2>/dev/null
    while [ "$(status | field epochs_total)" -lt "$stops" ]; do sleep 2; done
    status | python3 -c 'import json,sys
g = json.load(sys.stdin)["guests"][0]
print("%13s %20d %13.1f %13.1f %7d" % (sys.argv[1], g["dirty_pages_p50"], g["pause_p50_ms"], g["pause_p99_ms"], g["epochs_total"]))' "$pages"
    lab exec alpha -- understudy unprotect g1 >/dev/null
done
