/* What the programs share: system calls, signals, output; no C library, so that both widths build with any gcc. */
#ifndef RT_H
#define RT_H

#include <stddef.h>
#include <stdint.h>

typedef unsigned long ulong;
typedef unsigned long long wide; /* what %llx prints, on both widths */

/* Memory that assembly and signal handlers change. */
#define WATCHED volatile

/* Numbers of both tables: x86-64's and i386's (Linux arch/x86/entry/syscalls). */
#ifdef __x86_64__
enum {
    SYS_read = 0, SYS_write = 1, SYS_mmap = 9, SYS_mprotect = 10, SYS_munmap = 11, SYS_rt_sigaction = 13,
    SYS_sched_yield = 24, SYS_setitimer = 38, SYS_getpid = 39, SYS_fork = 57, SYS_execve = 59, SYS_exit = 60,
    SYS_wait4 = 61, SYS_kill = 62, SYS_ptrace = 101, SYS_getppid = 110, SYS_sigaltstack = 131,
    SYS_modify_ldt = 154, SYS_arch_prctl = 158, SYS_iopl = 172, SYS_ioperm = 173, SYS_exit_group = 231, SYS_tgkill = 234,
};
#else
enum {
    SYS_exit = 1, SYS_fork = 2, SYS_read = 3, SYS_write = 4, SYS_execve = 11, SYS_getpid = 20, SYS_ptrace = 26,
    SYS_kill = 37, SYS_getppid = 64, SYS_munmap = 91, SYS_ioperm = 101, SYS_setitimer = 104, SYS_iopl = 110,
    SYS_wait4 = 114, SYS_modify_ldt = 123, SYS_mprotect = 125, SYS_sched_yield = 158,
    SYS_rt_sigaction = 174, SYS_sigaltstack = 186, SYS_mmap = 192, SYS_set_thread_area = 243,
    SYS_exit_group = 252, SYS_tgkill = 270,
};
#endif

enum { SIGILL = 4, SIGTRAP = 5, SIGBUS = 7, SIGFPE = 8, SIGKILL = 9, SIGUSR1 = 10, SIGSEGV = 11, SIGALRM = 14, SIGCHLD = 17, SIGSTOP = 19 };
enum { PROT_READ = 1, PROT_WRITE = 2, PROT_EXEC = 4 };
enum { MAP_PRIVATE = 2, MAP_FIXED = 0x10, MAP_ANONYMOUS = 0x20, MAP_32BIT = 0x40 };
enum { CF = 1, PF = 4, AF = 0x10, ZF = 0x40, SF = 0x80, TF = 0x100, IF = 0x200, DF = 0x400, OF = 0x800, NT = 0x4000,
    RF = 0x10000, VM = 0x20000, AC = 0x40000, VIF = 0x80000, ID = 0x200000 };

long sys(long number, ...);

/* Registers as a signal handler finds and changes them (Linux asm/sigcontext.h). */
#ifdef __x86_64__
struct context {
    uint64_t r8, r9, r10, r11, r12, r13, r14, r15, di, si, bp, bx, dx, ax, cx, sp, ip, flags;
    uint16_t cs, gs, fs, ss;
    uint64_t err, trap, oldmask, cr2, fpstate, reserved[8];
};
#else
struct context {
    uint16_t gs, gsh, fs, fsh, es, esh, ds, dsh;
    uint32_t di, si, bp, sp, bx, dx, cx, ax, trap, err, ip;
    uint16_t cs, csh;
    uint32_t flags, sp_at_signal;
    uint16_t ss, ssh;
    uint32_t fpstate, oldmask, cr2;
};
#endif

struct ucontext {
    ulong flags;
    struct ucontext *link;
    void *stack_at;
    int stack_flags;
    size_t stack_size;
    struct context regs;
    ulong mask[2];
};

struct siginfo {
    int signo, error, code;
#ifdef __x86_64__
    int pad;
#endif
    ulong address;
    uint8_t rest[104];
};

enum { UC_SIGCONTEXT_SS = 2, UC_STRICT_RESTORE_SS = 4 };

typedef void handler(int signal, struct siginfo *info, struct ucontext *uc);

/* SA_ flags a caller adds. */
enum { ON_STACK = 0x08000000, NO_DEFER = 0x40000000 };
/* A handler for a signal; null: the default. */
void catch(int signal, handler *h, ulong flags);
/* A stack for handlers whose program's own is unusable. */
void alternate_stack(void);

void print(const char *format, ...) __attribute__((format(printf, 1, 2)));
/* One line of the result: it must be as said. Gives whether it is. */
int check(int ok, const char *format, ...) __attribute__((format(printf, 2, 3)));
/* A test that this kernel or processor has not: said once, and told apart from a pass. */
void skip(const char *why);
_Noreturn void leave(int status);

void *memset(void *to, int value, size_t n);
void *memcpy(void *to, const void *from, size_t n);
int memcmp(const void *a, const void *b, size_t n);
int same(const char *a, const char *b);

/* Pages of memory; below 4 GiB, so that any code reaches them. */
void *pages(size_t bytes, int protection);

/* CPUID's registers: eax ebx ecx edx. */
void cpuid(uint32_t leaf, uint32_t subleaf, uint32_t out[4]);
/* Whether AVX can be used. */
int have_avx(void);
wide fold(wide hash, const void *data, size_t n);
#define FOLD_START 0xcbf29ce484222325ull

/* Runs `body` in a child; gives its wait status. */
int in_child(void (*body)(void));

/* modify_ldt's descriptor (Linux asm/ldt.h); also set_thread_area's. */
struct segment {
    uint32_t number, base, limit;
    uint32_t is_32 : 1, contents : 2, read_only : 1, in_pages : 1, not_present : 1, useable : 1, long_mode : 1;
};
enum { DATA = 0, EXPAND_DOWN = 1, CODE = 2 };
/* The selector of an LDT entry at ring 3. */
#define LDT(n) ((n) << 3 | 7)
long write_ldt(const struct segment *s);

/* The vector that the kernel puts behind the environment. */
extern ulong *auxiliary;

/* Whether the processor's own kernel is 64-bit. */
int kernel_is_64(void);

typedef void test(void);
test loops, sigreturns, steps, ports, ldts, calls, bases, no_exec, traps, blocks, icebp, stack_loads, initial_state;

#ifdef __x86_64__
#define WORD ".quad"
#define SIZED(a, b) a
#else
#define WORD ".long"
#define SIZED(a, b) b
#endif

#endif
