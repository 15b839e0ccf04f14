#!/bin/sh
# First process of `mimus try`: a network and a shell, of the installer's busybox or ours.
[ -e /modules/order ] && /bin/busybox --install -s /bin
export PATH=/mimus/bin:/usr/bin:/usr/sbin:/bin:/sbin HOME=/root TERM=linux
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs devtmpfs /dev 2>/dev/null
mkdir -p /dev/pts /run /tmp /root
mount -t devpts devpts /dev/pts
echo mimus > /proc/sys/kernel/hostname
# A quiet console from here on: the kernel's own messages stay in dmesg.
echo 3 > /proc/sys/kernel/printk
for module in $(cat /modules/order 2>/dev/null); do
    insmod "/modules/$module" 2>/dev/null
done
for module in virtio_mmio virtio_net virtio_blk virtio_rng; do
    modprobe -q $module 2>/dev/null
done
ip link set lo up
net=down
for try in 1 2 3 4 5; do
    [ -e /sys/class/net/eth0 ] && break
    sleep 1
done
if [ -e /sys/class/net/eth0 ]; then
    ip link set eth0 up
    udhcpc -q -n -t 8 -T 1 -i eth0 -s /mimus/udhcpc >/dev/null 2>&1 && net=up
fi
read -r uptime idle < /proc/uptime
read -r system name release rest < /proc/version
echo
echo "Linux $release on $(uname -m), $(grep -c ^processor /proc/cpuinfo) vCPU(s), up after $uptime s; network $net."
echo "Leave with 'poweroff', or at any time with Ctrl-A x."
echo
# busybox init gives the shell a session and the terminal, so that Ctrl-C and jobs work.
read -r consoles < /sys/class/tty/console/active
cat > /etc/inittab <<END
${consoles##* }::once:/mimus/shell
::ctrlaltdel:/mimus/bin/poweroff
END
exec /bin/busybox init
