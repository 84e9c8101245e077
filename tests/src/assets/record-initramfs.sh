#!/bin/busybox sh
# First program of a guest that is recorded: starts the workload that the command line names.
B=/bin/busybox
$B mount -t proc proc /proc; $B mount -t sysfs sys /sys; $B mount -t devtmpfs dev /dev; $B mount -t tmpfs tmp /tmp
$B --install -s /bin 2>/dev/null
export PATH=/bin
ip link set lo up
case "$(sed 's/.*us\.workload=\([^ ]*\).*/\1/' /proc/cmdline)" in
idle) ;;
redis)
    redis-server --save "" --appendonly no --dir /tmp --logfile /tmp/log &
    sleep 5
    redis-benchmark -t set -r 20000 -n 20000 -d 100 -c 4 -q > /dev/null
    (while :; do redis-benchmark -t set,get,incr,lpush,rpop -r 20000 -n 20000 -d 100 -c 4 -q; done) > /dev/null 2>&1 &
    ;;
sqlite)
    V="'customer '||abs(random())%100000||', '||abs(random())%500||' station road, since '||datetime('now','-'||abs(random())%9999||' hours')"
    sqlite3 /tmp/db "pragma journal_mode=wal; create table t(id integer primary key, n integer, v text);
        with recursive c(i) as (select 1 union all select i+1 from c where i < 20000)
        insert into t select i, 0, $V from c;" > /dev/null
    (while :; do echo "begin; update t set n=n+1, v=$V where id=1+abs(random())%20000;
        update t set n=n+1 where id=1+abs(random())%20000; insert into t(n,v) values(1,$V); commit;"; done) \
        | sqlite3 /tmp/db > /dev/null &
    ;;
gcc)
    (while :; do cc1 -quiet -O2 /data/work.i -o /tmp/work.s && as /tmp/work.s -o /tmp/work.o; done) &
    ;;
gzip)
    cat /bin/busybox /bin/busybox > /tmp/data
    (while :; do gzip -6 -c /tmp/data > /tmp/data.gz; done) &
    ;;
esac
sleep 3
echo "WORKLOAD READY"
while :; do sleep 3600; done
