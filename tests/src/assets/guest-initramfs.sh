#!/bin/busybox sh
# First program of a lab guest: modules, its addresses, then the program that counts.
B=/bin/busybox
$B mount -t proc proc /proc; $B mount -t sysfs sys /sys; $B mount -t devtmpfs dev /dev
for m in $($B cat /mods/order); do $B insmod /mods/$m || echo "GUEST-FAIL insmod $m"; done
$B ip link set lo up
A=$($B sed 's/.*us\.address=\([^ ]*\).*/\1/' /proc/cmdline)
$B ip address add "$A" dev eth0
echo 0 > /proc/sys/net/ipv6/conf/eth0/accept_dad
$B ip link set eth0 up
# 10.77.0.10/24 and fd77::10/64
N=${A##*.}; $B ip -6 address add "fd77::${N%/*}/64" dev eth0
exec /bin/understudy-guest
