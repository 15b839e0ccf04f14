/* Bases of FS and GS: system calls, FSGSBASE instructions, another process, signals. */
#include "rt.h"

#ifdef __x86_64__
enum { SET_GS = 0x1001, SET_FS, GET_FS, GET_GS };

static long get(int which)
{
    ulong v = 0;
    sys(SYS_arch_prctl, (long)which, &v);
    return v;
}

static ulong rdfs(void)
{
    ulong v;
    __asm__ volatile("rdfsbase %0" : "=r"(v));
    return v;
}

static ulong rdgs(void)
{
    ulong v;
    __asm__ volatile("rdgsbase %0" : "=r"(v));
    return v;
}

static void wrfs(ulong v)
{
    __asm__ volatile("wrfsbase %0" ::"r"(v));
}

static void wrgs(ulong v)
{
    __asm__ volatile("wrgsbase %0" ::"r"(v));
}

static WATCHED int faults;

static void past(int signal, struct siginfo *info, struct ucontext *uc)
{
    (void)signal, (void)info;
    faults = uc->regs.trap;
    uc->regs.ip += 5; /* wrgsbase */
}

static void other_base(int signal, struct siginfo *info, struct ucontext *uc)
{
    (void)signal, (void)info, (void)uc;
    wrgs(0x5555);
}

static ulong words[4] = { 0x1122334455667788, 0x99, 0xaa, 0xbb };

static void usable(void)
{
    ulong v;
    sys(SYS_arch_prctl, (long)SET_FS, &words[1]);
    __asm__ volatile("mov %%fs:-8, %0" : "=r"(v));
    check(v == words[0] && rdfs() == (ulong)&words[1], "arch_prctl and an access below the base");
    wrgs((ulong)&words[2]);
    __asm__ volatile("mov %%gs:8, %0" : "=r"(v));
    check(v == words[3] && get(GET_GS) == (long)&words[2], "wrgsbase and what the kernel sees");
    wrgs(0x7fff12345678);
    wrfs(0x123456789abc);
    for (int i = 0; i < 50; i++) {
        sys(SYS_sched_yield);
        if (rdgs() != 0x7fff12345678 || rdfs() != 0x123456789abc)
            faults++;
    }
    check(!faults, "they stay over the kernel and other processes");
    __asm__ volatile("wrgsbase %0" ::"r"(0xffffffff12345678ul));
    check(rdgs() == 0xffffffff12345678ul, "a high base");
    __asm__ volatile("wrgsbase %k0" ::"r"(-1l) : "memory");
    check(rdgs() == 0xffffffff, "32 bits of it");
    faults = 0;
    __asm__ volatile("wrgsbase %0" ::"a"(0x8000000000000000ul));
    check(faults == 13 && rdgs() == 0xffffffff, "no address: trap %d", faults);
    catch(SIGUSR1, other_base, 0);
    sys(SYS_kill, sys(SYS_getpid), (long)SIGUSR1);
    check(rdgs() == 0x5555, "a handler's base stays");
    /* Loading a selector takes its descriptor's base; a null one leaves AMD's as it is, and clears Intel's. */
    struct segment s = { .number = 0, .base = 0xabcde000, .limit = 9, .is_32 = 1 };
    write_ldt(&s);
    __asm__ volatile("mov %0, %%gs" ::"r"(LDT(0)));
    check(rdgs() == 0xabcde000, "a selector's base");
    sys(SYS_sched_yield);
    unsigned selector;
    __asm__ volatile("mov %%gs, %0" : "=r"(selector));
    check(rdgs() == 0xabcde000 && selector == LDT(0), "it stays");
    wrgs(0x4321);
    for (int i = 0; i < 10; i++)
        sys(SYS_sched_yield);
    __asm__ volatile("mov %%gs, %0" : "=r"(selector));
    check(rdgs() == 0x4321 && selector == LDT(0), "a base that is not the selector's");
}

static void child(void)
{
    for (int i = 0; i < 2000; i++) {
        wrgs(i);
        if (i % 50 == 0)
            sys(SYS_sched_yield);
        if (rdgs() != (ulong)i)
            leave(1);
    }
    leave(44);
}

static void past_undefined(int signal, struct siginfo *info, struct ucontext *uc)
{
    (void)signal, (void)info;
    faults = 6;
    uc->regs.ip += 5;
}

void bases(void)
{
    uint32_t r[4];
    cpuid(7, 0, r);
    catch(SIGSEGV, past, 0);
    catch(SIGILL, past_undefined, 0);
    rdfs();
    if (faults) {
        check(!(r[1] & 1), "no FSGSBASE");
        skip("no FSGSBASE");
        return;
    }
    check(in_child(child) == 44 << 8, "a process of its own");
    usable();
}
#else
/* 32-bit: a descriptor of the thread's own in the GDT. */
void bases(void)
{
    static uint32_t words[4] = { 1, 2, 3, 4 };
    struct segment s = { .number = -1u, .base = (uint32_t)words, .limit = 0xfffff, .is_32 = 1, .in_pages = 1, .useable = 1 };
    check(!sys(SYS_set_thread_area, &s), "set_thread_area: entry %u", s.number);
    uint32_t v, w = s.number << 3 | 3;
    __asm__ volatile("mov %1, %%gs\n movl %%gs:8, %0" : "=r"(v) : "r"(w));
    check(v == 3, "its base");
    for (int i = 0; i < 20; i++)
        sys(SYS_sched_yield);
    __asm__ volatile("movl %%gs:4, %0\n mov %%gs, %1" : "=r"(v), "=r"(w));
    check(v == 2 && w == (s.number << 3 | 3), "it stays");
    __asm__ volatile("mov %0, %%gs" ::"r"(0));
}
#endif
