#!/bin/bash
# A libvirtd of its own, seen by nobody else: ./private-libvirtd.sh DIR
# Its socket is DIR/libvirt-sock (qemu+unix:///system?socket=DIR/libvirt-sock), memory of guests that is in files is
# in DIR/ram. Everything else it writes is in private
# mounts, its network and process ids are its own, and all of it ends when this script's standard input is closed.
# Needs root, util-linux, libvirtd, virtlogd and qemu-system-x86_64.
set -euo pipefail

if [ "${2:-}" != inside ]; then
    exec unshare --mount --net --pid --fork --kill-child --mount-proc -- "$0" "$1" inside
fi

dir=$1
ip link set lo up
cp -a /etc/libvirt "$dir/etc"
mount --bind "$dir/etc" /etc/libvirt
for path in /run /var/lib/libvirt /var/cache/libvirt /var/log/libvirt; do
    mount -t tmpfs tmpfs "$path"
done
mkdir -p /run/libvirt /var/lib/libvirt/{dnsmasq,qemu} "$dir/ram"

cat > "$dir/libvirtd.conf" <<EOF
unix_sock_dir = "$dir"
auth_unix_rw = "none"
log_outputs = "3:stderr"
EOF
cat > /etc/libvirt/qemu.conf <<EOF
user = "root"
group = "root"
security_driver = "none"
dynamic_ownership = 0
remember_owner = 0
namespaces = []
cgroup_controllers = []
memory_backing_dir = "$dir/ram"
EOF

# As process 1 this shell also reaps what the daemons leave behind; without that each probe of QEMU takes 40 s.
virtlogd > "$dir/virtlogd.log" 2>&1 < /dev/null &
libvirtd -f "$dir/libvirtd.conf" -p /run/libvirtd.pid > "$dir/libvirtd.log" 2>&1 < /dev/null &
libvirtd=$!

# Commands: `restart` ends libvirtd (not its guests) and starts it again; the end of input ends everything.
while read -r command; do
    if [ "$command" = restart ]; then
        kill "$libvirtd"
        wait "$libvirtd" || true
        libvirtd -f "$dir/libvirtd.conf" -p /run/libvirtd.pid >> "$dir/libvirtd.log" 2>&1 < /dev/null &
        libvirtd=$!
    fi
done
