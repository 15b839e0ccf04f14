#!/bin/busybox sh
# First process of the benchmark: each phase, timed by the guest's own clock.
/bin/busybox mkdir -p /proc /sys /dev /tmp
/bin/busybox mount -t proc proc /proc
read -r up idle < /proc/uptime
echo "BENCH boot $up"
/bin/busybox mount -t sysfs sysfs /sys
/bin/busybox mount -t devtmpfs devtmpfs /dev
/bin/busybox --install -s /bin
export PATH=/bin
phase() {
    name=$1
    shift
    read -r start idle < /proc/uptime
    "$@" >/dev/null 2>&1
    read -r end idle < /proc/uptime
    echo "SPAN $name $start $end"
}
hash() { dd bs=1M count=64 </dev/zero | "$1"; }
pack() { dd bs=1M count=32 </dev/zero | gzip -9; }
loop() { i=0; while [ $i -lt 200000 ]; do i=$((i+1)); done; }
forks() { i=0; while [ $i -lt 500 ]; do /bin/true; i=$((i+1)); done; }
# With several vCPUs, one loop on each at the same time.
parallel() {
    for n in $(seq "$(grep -c ^processor /proc/cpuinfo)"); do loop & done
    wait
}
phase md5sum hash md5sum
phase sha256sum hash sha256sum
phase gzip pack
phase shell loop
phase fork+exec forks
phase parallel parallel
echo "BENCH done"
poweroff -f
