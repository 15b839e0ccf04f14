/* Signals at every instruction of a loop: by the trap flag, by a timer, by another process. What the loop computes must
 * not depend on them. */
#include "rt.h"

struct work {
    uint64_t count;
    uint16_t x87_control, pad;
    uint32_t mxcsr;
    uint8_t scratch[48];
    uint8_t from[128], to[64], out[288];
};
_Static_assert(offsetof(struct work, from) == 64 && offsetof(struct work, out) == 256, "loop.S");

void spin_sse(struct work *), spin_avx(struct work *);
void spoil_sse(void), spoil_avx(void);
extern ulong spin_sse_steps[], spin_avx_steps[];
extern char spin_sse_top[], spin_avx_top[], spin_sse_end[], spin_avx_end[];

static int avx;
static WATCHED unsigned signals, nested, stale;

static void spin(struct work *w, uint64_t count)
{
    memset(w, 0, sizeof *w);
    w->count = count;
    w->x87_control = 0x47f; /* 24 bits, downwards, all masked */
    w->mxcsr = 0x5f80;      /* upwards, all masked */
    for (size_t i = 0; i < sizeof w->from; i++)
        w->from[i] = (uint8_t)(i * 37 + 11);
    /* Divisors: a double at 64, a float at 72. */
    w->from[7] = 0x40, w->from[6] = 0x09, w->from[11] = 0x3f, w->from[10] = 0x95;
    (avx ? spin_avx : spin_sse)(w);
    /* Flags that the processor leaves undefined do not get into this. */
    w->count = 0;
}

/* A handler begins with a fresh floating-point state, whatever was in it (Linux fpu__clear_user_states). */
static void spoil(void)
{
    uint16_t control;
    uint32_t mxcsr;
    __asm__ volatile("fnstcw %0; stmxcsr %1" : "=m"(control), "=m"(mxcsr));
    stale += control != 0x37f || mxcsr != 0x1f80;
    mxcsr = 0x3f80;
    __asm__ volatile("ldmxcsr %0" ::"m"(mxcsr));
    spoil_sse();
    if (avx)
        spoil_avx();
}

static void on_signal(int signal, struct siginfo *info, struct ucontext *uc)
{
    (void)signal, (void)info, (void)uc;
    signals++;
    spoil();
}

static void on_nested(int signal, struct siginfo *info, struct ucontext *uc)
{
    (void)signal, (void)info, (void)uc;
    nested++;
    spoil();
}

static WATCHED ulong addresses[4096];

static void on_step(int signal, struct siginfo *info, struct ucontext *uc)
{
    (void)signal, (void)info;
    ulong ip = uc->regs.ip;
    if (signals < sizeof addresses / sizeof addresses[0])
        addresses[signals] = ip;
    signals++;
    if (signals % 7 == 0)
        sys(SYS_kill, sys(SYS_getpid), (long)SIGUSR1);
    spoil();
    if (ip == (ulong)(avx ? spin_avx_end : spin_sse_end))
        uc->regs.flags &= ~(ulong)TF;
}

/* The addresses of `rounds` rounds, as single steps show them: repeated instructions show each repetition. */
static unsigned in_order(unsigned rounds, unsigned *wrong)
{
    const ulong *steps = avx ? spin_avx_steps : spin_sse_steps;
    unsigned at = 0, n = 0;
    while (steps[n])
        n++;
    while (addresses[at] != steps[0])
        at++;
    *wrong = 0;
    for (unsigned round = 0; round < rounds; round++)
        for (unsigned s = 0; s < n - 1; s++) {
            const uint8_t *code = (const uint8_t *)steps[s];
            unsigned times = code[0] == 0xf3 && code[1] == 0xa4 ? 5 : 1;
            while (times--)
                *wrong += addresses[at++] != steps[s];
        }
    *wrong += addresses[at++] != steps[n - 1];
    return at;
}

static void stepped(const struct work *want)
{
    struct work got;
    unsigned wrong;
    signals = nested = stale = 0;
    catch(SIGTRAP, on_step, 0);
    catch(SIGUSR1, on_nested, 0);
    __asm__ volatile("pushf; orl $0x100, (%%" SIZED("rsp", "esp") "); popf" ::: "memory", "cc");
    spin(&got, 20);
    unsigned all = in_order(20, &wrong);
    check(all == signals && !wrong, "%u of %u steps are in order", all - wrong, signals);
    check(nested == signals / 7 && !stale, "signals in the handler");
    check(!memcmp(&got, want, sizeof got), "steps leave the result");
    catch(SIGTRAP, 0, 0);
}

static void by_timer(const struct work *want)
{
    struct work got;
    long interval[4] = { 0, 1000, 0, 1000 };
    unsigned wrong = 0, runs = 0;
    signals = stale = 0;
    catch(SIGALRM, on_signal, 0);
    sys(SYS_setitimer, 0L, interval, 0L);
    for (; signals < 60; runs++) {
        spin(&got, 2000);
        wrong += memcmp(&got, want, sizeof got) != 0;
    }
    interval[1] = interval[3] = 0;
    sys(SYS_setitimer, 0L, interval, 0L);
    check(!wrong && !stale, "a timer's signals leave the result");
}

static void by_process(const struct work *want)
{
    struct work got;
    unsigned wrong = 0;
    signals = stale = 0;
    catch(SIGUSR1, on_signal, 0);
    long self = sys(SYS_getpid), child = sys(SYS_fork);
    if (child == 0)
        for (;;) {
            sys(SYS_kill, self, (long)SIGUSR1);
            sys(SYS_sched_yield);
        }
    while (signals < 60) {
        spin(&got, 2000);
        wrong += memcmp(&got, want, sizeof got) != 0;
    }
    sys(SYS_kill, child, (long)SIGKILL);
    sys(SYS_wait4, child, 0L, 0L, 0L);
    check(!wrong && !stale, "another process's signals leave the result");
}

static void with(void)
{
    struct work few, many;
    spin(&few, 20);
    spin(&many, 2000);
    print("value loops %s %016llx %016llx\n", avx ? "avx" : "sse", fold(FOLD_START, few.out, sizeof few.out),
        fold(FOLD_START, many.out, sizeof many.out));
    stepped(&few);
    by_timer(&many);
    by_process(&many);
}

void loops(void)
{
    with();
    if (have_avx()) {
        avx = 1;
        with();
    } else {
        skip("no AVX");
    }
}
