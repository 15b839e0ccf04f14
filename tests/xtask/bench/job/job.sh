#!/bin/sh
# A job of the benchmark, done by a distribution's programs. Prints a sum of what it made.
set -e
export PATH=/usr/bin:/bin
cd /tmp
case "$1" in
job-tar)
    # A tree of files, packed and compressed, unpacked, and packed again to see what came out.
    tar -C /usr/include -cf tree.tar --sort=name --mtime=@0 .
    gzip -6 -n -k tree.tar
    mkdir tree
    tar -C tree -xzf tree.tar.gz
    tar -C tree -cf again.tar --sort=name --mtime=@0 .
    [ "$(cksum <again.tar)" = "$(cksum <tree.tar)" ]
    cksum <tree.tar.gz
    rm -r tree again.tar tree.tar tree.tar.gz
    ;;
job-python)
    i=0
    while [ $i -lt 10 ]; do python3 -c pass; i=$((i+1)); done
    python3 /job/loop.py
    ;;
job-gcc)
    gcc -std=gnu11 -O2 -c -o structure.o /job/structure.c
    cksum <structure.o
    rm structure.o
    ;;
job-make)
    make -s -j4 -f /job/Makefile
    cat -- *.o | cksum
    rm -- *.o
    ;;
esac
