/* The trap flag where it is special: over system calls, at ICEBP, through POPF and IRET. */
#include "rt.h"

static WATCHED unsigned count;
static WATCHED ulong at[64], flags_at[64];
static WATCHED int stop_after;

static void record(int signal, struct siginfo *info, struct ucontext *uc)
{
    (void)signal, (void)info;
    if (count < 64)
        at[count] = uc->regs.ip, flags_at[count] = uc->regs.flags;
    count++;
    /* A trap without end, as hypervisors make of ICEBP. */
    if (count > 10000)
        check(0, "no end of traps at %lx", (ulong)uc->regs.ip), leave(1);
    if ((int)count == stop_after)
        uc->regs.flags &= ~(ulong)TF;
}

#define SET_TF "pushf\n orl $0x100, (%%" SIZED("rsp", "esp") ")\n popf\n"
#define CLEAR_TF "pushf\n andl $~0x100, (%%" SIZED("rsp", "esp") ")\n popf\n"

/* How many instructions behind POPF trap, and whether at the address of the label. */
static void over_int80(void)
{
    ulong behind, pid;
    count = 0;
    __asm__ volatile(SET_TF "int $0x80\n 1: " CLEAR_TF "mov $1b, %0\n" : "=&r"(behind), "=a"(pid) : "a"(20) : "memory", "cc"
#ifdef __x86_64__
        , "r8", "r9", "r10", "r11"
#endif
    );
    /* The return to TF traps behind the next instruction: pushf, and, popf. */
    check(count == 3 && at[0] == behind + 1 && (long)pid == sys(SYS_getpid), "int 0x80: %u traps", count);
}

#ifdef __x86_64__
static void over_syscall(void)
{
    ulong behind, pid;
    count = 0;
    __asm__ volatile(SET_TF "syscall\n 1: " CLEAR_TF "mov $1b, %0\n" : "=&r"(behind), "=a"(pid) : "a"(SYS_getpid) : "rcx", "r11", "memory", "cc");
    check(count == 3 && at[0] == behind + 1 && (long)pid == sys(SYS_getpid), "syscall: %u traps", count);
}
#endif

/* ICEBP is a trap of class #DB without the trap flag; the return address is behind it. */
void icebp(void)
{
    ulong behind;
    catch(SIGTRAP, record, 0);
    count = 0;
    __asm__ volatile(".byte 0xf1\n 1: nop\n nop\n .byte 0xf1\n mov $1b, %0\n" : "=r"(behind) : : "memory");
    check(count == 2 && at[0] == behind && at[1] == behind + 3 && !(flags_at[0] & TF), "icebp: %u traps", count);
    /* Under the trap flag too, once each. */
    count = 0;
    __asm__ volatile(SET_TF ".byte 0xf1\n 1: .byte 0xf1\n" CLEAR_TF "mov $1b, %0\n" : "=r"(behind) : : "memory", "cc");
    check(count == 5 && at[0] == behind && at[1] == behind + 1, "icebp stepped: %u traps", count);
}

/* sigreturn sets the flag: the handler's returns step, until it says so. */
static void endless(int signal, struct siginfo *info, struct ucontext *uc)
{
    record(signal, info, uc);
    if ((int)count < stop_after)
        uc->regs.flags |= TF;
    else
        uc->regs.flags &= ~(ulong)TF;
}

static void by_sigreturn(void)
{
    ulong start;
    count = 0, stop_after = 6;
    catch(SIGTRAP, endless, 0);
    __asm__ volatile("int3\n 1: nop\n nop\n xchg %%ax, %%ax\n nopl (%0)\n nop\n nop\n nop\n mov $1b, %0\n" : "=r"(start) : "0"(&count) : "memory");
    int right = at[0] == start && at[1] == start + 1 && at[2] == start + 2 && at[3] == start + 4;
    check(count == 6 && right && at[4] - at[3] >= 3 && at[5] == at[4] + 1, "sigreturn sets TF: %u traps", count);
    catch(SIGTRAP, record, 0);
    stop_after = 0;
}

/* A trap at an instruction that faults: the fault only, and then the step. */
static WATCHED unsigned faults;
static ulong good_place;

static void mend(int signal, struct siginfo *info, struct ucontext *uc)
{
    (void)signal, (void)info;
    faults++;
    flags_at[63] = uc->regs.flags;
    uc->regs.bx = (ulong)&good_place;
}

static void at_a_fault(void)
{
    ulong behind, value;
    count = faults = 0;
    good_place = 0x1234;
    catch(SIGSEGV, mend, 0);
    __asm__ volatile(SET_TF "mov (%%" SIZED("rbx", "ebx") "), %0\n 1: " CLEAR_TF "mov $1b, %1\n" : "=&r"(value), "=&r"(behind) : "b"(16L) : "memory", "cc");
    check(count == 4 && at[0] == behind && faults == 1 && value == 0x1234 && flags_at[63] & TF,
        "a fault under TF: %u traps, %u faults", count, faults);
    catch(SIGSEGV, 0, 0);
}

/* PUSHF pushes TF as it was; POPF that clears TF still traps (SDM 3B 17.3.1.4: TF as it was at the beginning). */
static void flags_see_it(void)
{
    ulong pushed;
    count = 0;
    __asm__ volatile(SET_TF "pushf\n pop %0\n" CLEAR_TF "nop\n nop\n" : "=r"(pushed) : : "memory", "cc");
    check(count == 5 && pushed & TF, "pushf shows TF: %u traps", count);
    check(!(flags_at[4] & TF) && flags_at[3] & TF, "the last trap has none");
}

/* Each repetition of a string instruction, and none for a count of zero. */
static void repetitions(void)
{
    uint8_t from[16] = { 1, 2, 3, 4, 5, 6, 7, 8 }, to[16] = { 0 };
    void *s = from, *d = to;
    ulong n = 6, behind;
    count = 0;
    __asm__ volatile(SET_TF "rep movsb\n 1: " CLEAR_TF "mov $1b, %3\n" : "+S"(s), "+D"(d), "+c"(n), "=&r"(behind) : : "memory", "cc");
    check(count == 9 && at[4] == behind - 2 && at[5] == behind && !memcmp(from, to, 6) && !to[6], "rep movsb: %u traps", count);
    n = 0, count = 0;
    __asm__ volatile(SET_TF "rep movsb\n 1: " CLEAR_TF : "+S"(s), "+D"(d), "+c"(n) : : "memory", "cc");
    check(count == 4, "rep movsb of none: %u traps", count);
    s = from, d = to, n = 16, count = 0;
    to[3] = 0xee;
    __asm__ volatile(SET_TF "repe cmpsb\n" CLEAR_TF : "+S"(s), "+D"(d), "+c"(n) : : "memory", "cc");
    check(count == 7 && n == 12, "repe cmpsb: %u traps, %lu left", count, n);
}

void traps(void)
{
    catch(SIGTRAP, record, 0);
    over_int80();
#ifdef __x86_64__
    over_syscall();
#endif
    by_sigreturn();
    at_a_fault();
    flags_see_it();
    repetitions();
}
