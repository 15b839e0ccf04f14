/* What goes through the kernel: calls, faults, processes, pipes, signals. */
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include "bench.h"

static void must(int ok, const char *what)
{
    if (!ok) {
        perror(what);
        exit(1);
    }
}

static uint64_t system_calls(void)
{
    uint64_t n = 0;
    for (int i = 0; i < 1000000; i++)
        n += syscall(SYS_getppid) >= 0;
    return n;
}

static uint64_t page_faults(void)
{
    enum { BYTES = 16 << 20 };
    uint64_t n = 0;
    for (int round = 0; round < 8; round++) {
        char *p = mmap(0, BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        must(p != MAP_FAILED, "mmap");
        madvise(p, BYTES, MADV_NOHUGEPAGE);
        for (int i = 0; i < BYTES; i += 4096)
            n += p[i] == 0, p[i] = 1;
        munmap(p, BYTES);
    }
    return n;
}

static uint64_t mappings(void)
{
    uint64_t n = 0;
    for (int i = 0; i < 20000; i++) {
        char *p = mmap(0, 65536, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        must(p != MAP_FAILED, "mmap");
        p[4096] = 1;
        n += munmap(p, 65536) == 0;
    }
    return n;
}

static uint64_t pipe_ping_pong(void)
{
    int there[2], back[2];
    char byte = 1;
    uint64_t n = 0;
    must(!pipe(there) && !pipe(back), "pipe");
    pid_t child = fork();
    must(child >= 0, "fork");
    if (child == 0) {
        close(there[1]);
        while (read(there[0], &byte, 1) == 1)
            must(write(back[1], &byte, 1) == 1, "write");
        _exit(0);
    }
    for (int i = 0; i < 20000; i++) {
        must(write(there[1], &byte, 1) == 1, "write");
        n += read(back[0], &byte, 1) == 1;
    }
    close(there[1]);
    waitpid(child, 0, 0);
    close(there[0]), close(back[0]), close(back[1]);
    return n;
}

static uint64_t forks(int count, int executes)
{
    uint64_t n = 0;
    for (int i = 0; i < count; i++) {
        int status = -1;
        pid_t child = fork();
        must(child >= 0, "fork");
        if (child == 0) {
            if (executes)
                execl(self_path, self_path, "--exit", (char *)0);
            _exit(executes ? 127 : 0);
        }
        waitpid(child, &status, 0);
        n += status == 0;
    }
    return n;
}

static uint64_t fork_exit(void) { return forks(800, 0); }
static uint64_t fork_exec(void) { return forks(300, 1); }

static volatile uint64_t taken;

static void handler(int signal)
{
    taken += (uint64_t)signal;
}

static uint64_t signals(void)
{
    struct sigaction action = { .sa_handler = handler };
    must(!sigaction(SIGUSR1, &action, 0), "sigaction");
    taken = 0;
    for (int i = 0; i < 60000; i++)
        raise(SIGUSR1);
    return taken;
}

/* A signal for each write to a page without permission: a fault, a handler, mprotect. */
static char *guarded;

static void unguard(int signal)
{
    taken += (uint64_t)signal;
    mprotect(guarded, 4096, PROT_READ | PROT_WRITE);
}

static uint64_t fault_signals(void)
{
    struct sigaction action = { .sa_handler = unguard };
    must(!sigaction(SIGSEGV, &action, 0), "sigaction");
    guarded = mmap(0, 4096, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    must(guarded != MAP_FAILED, "mmap");
    taken = 0;
    for (int i = 0; i < 15000; i++) {
        mprotect(guarded, 4096, PROT_READ);
        *(volatile char *)guarded = 1;
    }
    munmap(guarded, 4096);
    signal(SIGSEGV, SIG_DFL);
    return taken;
}

const struct row kernel_rows[] = {
    { "syscall", system_calls, 0 },
    { "page-fault", page_faults, 0 },
    { "mmap-munmap", mappings, 0 },
    { "pipe-ping-pong", pipe_ping_pong, 0 },
    { "fork-exit", fork_exit, 0 },
    { "fork-exec", fork_exec, 0 },
    { "signals", signals, 0 },
    { "fault-signals", fault_signals, 0 },
    { 0, 0, 0 },
};
