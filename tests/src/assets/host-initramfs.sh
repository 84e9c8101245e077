#!/bin/busybox sh
# First program of a lab host: its root, read-only over 9p, under a tmpfs overlay; and what is lent to it by this machine.
B=/bin/busybox
$B mount -t proc proc /proc; $B mount -t sysfs sys /sys; $B mount -t devtmpfs dev /dev
for m in $($B cat /mods/order); do $B insmod /mods/$m || echo "LAB-FAIL insmod $m"; done
$B mount -t tmpfs -o size=75% tmpfs /ov; $B mkdir -p /ov/lower /ov/up /ov/work
$B mount -t 9p -o trans=virtio,version=9p2000.L,msize=524288,cache=loose,ro root /ov/lower || { echo "LAB-FAIL 9p root"; $B poweroff -f; }
$B mount -t overlay -o lowerdir=/ov/lower,upperdir=/ov/up,workdir=/ov/work overlay /root || { echo "LAB-FAIL overlay"; $B poweroff -f; }
for pair in $($B sed 's/.*us\.lent=\([^ ]*\).*/\1/' /proc/cmdline | $B tr , ' '); do
  tag=${pair%%:*}; at=/root${pair#*:}; $B mkdir -p $at
  $B mount -t 9p -o trans=virtio,version=9p2000.L,msize=524288,cache=loose,ro $tag $at || echo "LAB-FAIL 9p $tag"
done
$B mount --move /proc /root/proc; $B mount --move /sys /root/sys; $B mount --move /dev /root/dev
first=$($B sed 's/.*us\.first=\([^ ]*\).*/\1/' /root/proc/cmdline)
exec $B switch_root /root "$first" __host-init
