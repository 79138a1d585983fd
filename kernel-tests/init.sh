#!/bin/busybox sh
# shellcheck shell=dash
#
# First program of the guest: file systems, loopback, the disk; then the cases; then off.
# The kernel's messages go to the first serial port, everything printed here to the second.
/bin/busybox --install -s /bin
export PATH=/bin:/sbin:/usr/bin:/usr/sbin HOME=/root
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev
mkdir -p /dev/pts /dev/shm
mount -t devpts devpts /dev/pts
mount -t tmpfs tmpfs /dev/shm
mount -t tmpfs tmpfs /tmp
mount -t tmpfs tmpfs /run
exec </dev/null >/dev/ttyS1 2>&1
ip link set lo up
# What the kernel has as modules, in the order of their names.
for module in /modules/*; do
    [ ! -e "$module" ] || insmod "$module" || echo "cannot load $module"
done
status=0
mount -t ext4 -o user_xattr /dev/vda "@STORE@" || status=98
if [ "$status" = 0 ]; then
    :
    @RUNS@
fi
# A disk that is still in use after the last case is held by a leak in the kernel.
umount "@STORE@" || {
    echo "the disk is still in use"
    status=99
}
sync
echo "@MARKER@$status"
reboot -f
