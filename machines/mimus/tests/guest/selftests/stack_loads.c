/* MOV SS and POP SS: nothing traps between them and the next instruction; a data breakpoint hit by the load is held back
 * until after it, whatever it is (SDM 3A 6.8.3; what CVE-2018-8897 was about). The breakpoint is set by a parent. */
#include "rt.h"

enum { TRACEME = 0, CONTINUE = 7, POKEUSER = 6 };

static volatile uint16_t selector;
static WATCHED unsigned count;
static WATCHED ulong at[16], number[16];

static void record(int signal, struct siginfo *info, struct ucontext *uc)
{
    (void)info;
    if (count < 16)
        at[count] = uc->regs.ip, number[count] = signal;
    count++;
    uc->regs.flags &= ~(ulong)TF;
}

static void skip_fault(int signal, struct siginfo *info, struct ucontext *uc)
{
    record(signal, info, uc);
    uc->regs.ip += 2;
}

/* offsetof(struct user, u_debugreg) */
#define DEBUG_REGISTER(n) (SIZED(848L, 252L) + (n) * (long)sizeof(ulong))

static void child(void)
{
    __asm__("mov %%ss, %0" : "=r"(selector));
    catch(SIGTRAP, record, 0);
    catch(SIGSEGV, skip_fault, 0);
    catch(SIGILL, skip_fault, 0);
    sys(SYS_ptrace, (long)TRACEME, 0L, 0L, 0L);
    sys(SYS_kill, sys(SYS_getpid), (long)SIGSTOP);
    uint16_t s;
    count = 0;
    s = selector;
    (void)s;
    if (!check(count == 1 && number[0] == SIGTRAP, "a data breakpoint: %u", count))
        leave(1);
    ulong behind;
#define AFTER(code) \
    count = 0; \
    __asm__ volatile("mov %[s], %%ss\n" code "\n 1: nop\n mov $1b, %[b]\n" : [b] "=&r"(behind) : [s] "m"(selector) : "memory", "cc", SIZED("rcx", "ecx"), SIZED("rax", "eax"))
    AFTER("nop");
    check(count == 1 && at[0] == behind, "then NOP: %u at %ld", count, (long)(at[0] - behind));
    AFTER("mov $5, %%ecx");
    check(count == 1 && at[0] == behind, "then MOV: %u", count);
    AFTER("int3");
    check(count >= 1 && at[0] == behind, "then INT3: %u", count);
    AFTER("mov $20, %%eax\n int $0x80");
    check(count == 1 && at[0] == behind - 2, "then MOV and INT 80: %u", count);
    /* The held-back trap comes to the kernel's entry, which knows of it. */
    AFTER("int $0x40");
    check(count >= 1 && number[count - 1] == SIGSEGV, "then a refused INT: %u", count);
    AFTER("ud2");
    check(count >= 1 && number[count - 1] == SIGILL, "then UD2: %u", count);
    AFTER("mov %[s], %%ss\n nop");
    check(count >= 1, "then again: %u", count);
    /* The trap flag set right before: the load hides one step. */
    count = 0;
    ulong plain;
    __asm__("mov %%ss, %0" : "=r"(plain));
    __asm__ volatile("pushf\n orl $0x100, (%%" SIZED("rsp", "esp") ")\n popf\n mov %[s], %%ss\n nop\n 1: nop\n mov $1b, %[b]" : [b] "=&r"(behind) : [s] "r"(plain) : "memory", "cc");
    check(count == 1 && at[0] == behind, "single steps: %u at %ld", count, (long)(at[0] - behind));
}

void stack_loads(void)
{
    int status;
    long pid = sys(SYS_fork);
    if (pid == 0) {
        child();
        leave(55);
    }
    sys(SYS_wait4, pid, &status, 0L, 0L);
    /* DR0: the selector's address; DR7: two bytes, reads and writes. */
    long e = sys(SYS_ptrace, (long)POKEUSER, pid, DEBUG_REGISTER(0), &selector);
    if (!e)
        e = sys(SYS_ptrace, (long)POKEUSER, pid, DEBUG_REGISTER(7), 0x00070001L);
    if (e)
        check(0, "debug registers: %ld", e);
    /* Signals go on to it. */
    long signal = 0;
    for (;;) {
        sys(SYS_ptrace, (long)CONTINUE, pid, 0L, signal);
        sys(SYS_wait4, pid, &status, 0L, 0L);
        if ((status & 0xff) != 0x7f)
            break;
        signal = status >> 8;
    }
    check(status == 55 << 8, "its end: %x", status);
}
