#!/bin/busybox sh
# First process of the benchmark. Stops before and after each row until a line comes on the
# console, so that who measures reads a clock at that point. $phases, $jobs, $programs and $rows
# come from the kernel's command line; jobs are done by the programs in /root.
/bin/busybox mkdir -p /proc /sys /dev /tmp
/bin/busybox mount -t proc proc /proc
# Nothing of the kernel's between our lines.
echo 1 > /proc/sys/kernel/printk
echo
echo "BENCH boot"
read -r go
/bin/busybox mount -t sysfs sysfs /sys
/bin/busybox mount -t devtmpfs devtmpfs /dev
/bin/busybox --install -s /bin
export PATH=/bin
IFS=,
for phase in $phases; do
    echo "BEGIN $phase"
    read -r go
    sh /phases.sh "$phase" >/dev/null 2>&1
    echo "END $phase $?"
    read -r go
done
for job in $jobs; do
    if [ ! -e /root/dev/null ]; then
        mount -t devtmpfs devtmpfs /root/dev
        mount -t proc proc /root/proc
        mount -t tmpfs tmpfs /root/tmp
    fi
    echo "BEGIN $job"
    read -r go
    value=$(chroot /root /bin/sh /job/job.sh "$job" 2>/root/tmp/errors) || cat /root/tmp/errors
    echo "END $job $value"
    read -r go
done
# shellcheck disable=SC2086
[ "$programs" = yes ] && /bin/programs -w $rows
echo "BENCH done"
poweroff -f
