#!/bin/busybox sh
# One phase of the benchmark, in a guest or on the host; $PATH leads to busybox's applets.
loop() { i=0; while [ $i -lt 200000 ]; do i=$((i+1)); done; }
case "$1" in
md5sum|sha256sum) dd bs=1M count=64 </dev/zero | "$1" ;;
gzip) dd bs=1M count=32 </dev/zero | gzip -9 ;;
shell) loop ;;
fork+exec)
    # busybox's own `true` would not be executed.
    i=0
    while [ $i -lt 500 ]; do "${PATH}/true"; i=$((i+1)); done
    ;;
parallel)
    # With several vCPUs, one loop on each at the same time.
    for n in $(seq "$(grep -c ^processor /proc/cpuinfo)"); do loop & done
    wait
    ;;
esac
