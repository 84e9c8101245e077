#!/bin/busybox sh
# First program of a lab guest: modules, one address, then the program that counts.
B=/bin/busybox
$B mount -t proc proc /proc; $B mount -t sysfs sys /sys; $B mount -t devtmpfs dev /dev
for m in $($B cat /mods/order); do $B insmod /mods/$m || echo "GUEST-FAIL insmod $m"; done
$B ip link set lo up
$B ip address add "$($B sed 's/.*us\.address=\([^ ]*\).*/\1/' /proc/cmdline)" dev eth0
$B ip link set eth0 up
exec /bin/understudy-guest
