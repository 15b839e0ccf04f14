/* sigreturn with registers, flags and segments that the handler changed: to 64-, 32- and 16-bit code with flat and 16-bit
 * stacks, and to segments that cannot be. */
#include "rt.h"

enum { CODE16 = 8, DATA16, ABSENT_CODE, ABSENT_DATA, READ_ONLY, CODE32 };

/* `int3` and nothing behind it. */
static uint8_t *landing;
static WATCHED int landed, failed;
static struct context asked, got;
static struct context before;
static ulong before_flags;

static void segments(void)
{
    landing = pages(4096, PROT_READ | PROT_WRITE | PROT_EXEC);
    memset(landing, 0xcc, 4096);
    uint32_t base = (uint32_t)(ulong)landing;
    struct segment s[] = {
        { .number = CODE16, .base = base, .limit = 4095, .contents = CODE },
        { .number = DATA16, .base = base, .limit = 0xffff, .contents = DATA },
        { .number = ABSENT_CODE, .base = base, .limit = 4095, .contents = CODE, .not_present = 1 },
        { .number = ABSENT_DATA, .base = base, .limit = 4095, .contents = DATA, .not_present = 1 },
        { .number = READ_ONLY, .base = base, .limit = 4095, .contents = DATA, .read_only = 1 },
        { .number = CODE32, .base = base, .limit = 4095, .contents = CODE, .is_32 = 1 },
    };
    for (size_t i = 0; i < sizeof s / sizeof s[0]; i++) {
        long e = write_ldt(&s[i]);
        if (e)
            check(0, "modify_ldt %d: %ld", (int)i, e);
    }
}

/* Where to go and with what. */
static void go(int signal, struct siginfo *info, struct ucontext *uc)
{
    (void)signal, (void)info;
    struct context *r = &uc->regs;
    before = *r;
    before_flags = uc->flags;
    r->ax = asked.ax, r->bx = asked.bx, r->cx = asked.cx, r->dx = asked.dx, r->si = asked.si, r->di = asked.di;
    r->bp = asked.bp, r->sp = asked.sp, r->ip = asked.ip, r->flags = asked.flags, r->cs = asked.cs, r->ss = asked.ss;
#ifdef __x86_64__
    r->r8 = asked.r8, r->r9 = asked.r9, r->r10 = asked.r10, r->r11 = asked.r11, r->r12 = asked.r12, r->r13 = asked.r13;
    r->r14 = asked.r14, r->r15 = asked.r15;
    uc->flags |= UC_STRICT_RESTORE_SS;
#else
    r->ds = asked.ds, r->es = asked.es;
#endif
}

/* Back to where `go` came from. */
static void back(int signal, struct siginfo *info, struct ucontext *uc)
{
    (void)info;
    got = uc->regs;
    landed = signal;
    uint64_t fpstate = uc->regs.fpstate;
    uc->regs = before;
    uc->regs.fpstate = fpstate;
    uc->flags = before_flags | UC_STRICT_RESTORE_SS;
}

static void visit(unsigned cs, unsigned ss)
{
    landed = 0;
    asked.ax = 0x11111111, asked.bx = 0x22222222, asked.cx = 0x33333333, asked.dx = 0x44444444, asked.si = 0x55555555;
    asked.di = 0x66666666, asked.bp = 0x77777777;
    asked.sp = 0x8badf00c;
#ifdef __x86_64__
    asked.r8 = asked.r9 = asked.r10 = asked.r11 = 0x8888888888888888, asked.r12 = asked.r15 = 0xffffffff00000000;
    if (cs == 0x33)
        asked.sp = 0x8badf00d5aadc0de, asked.ax = 0x1111111111111111, asked.bp = 0x7777777777777777;
#else
    asked.ds = asked.es = ss;
#endif
    asked.ip = cs == LDT(CODE16) || cs == LDT(CODE32) ? 0 : (ulong)landing;
    asked.cs = cs, asked.ss = ss;
    asked.flags = 0x202 | CF | AF | SF | OF | DF;
    sys(SYS_kill, sys(SYS_getpid), (long)SIGUSR1);
}

static void arrives(unsigned cs, unsigned ss)
{
    visit(cs, ss);
    int same = got.ax == asked.ax && got.bx == asked.bx && got.cx == asked.cx && got.dx == asked.dx
        && got.si == asked.si && got.di == asked.di && got.bp == asked.bp;
#ifdef __x86_64__
    if (cs == 0x33)
        same &= got.r8 == asked.r8 && got.r11 == asked.r11 && got.r12 == asked.r12 && got.r15 == asked.r15;
    same &= cs == 0x33 ? got.sp == asked.sp : (uint32_t)got.sp == (uint32_t)asked.sp;
#else
    same &= got.ds == ss && got.es == ss && got.sp == asked.sp;
#endif
    /* Debuggers' registers show the address behind the int3. */
    check(landed == SIGTRAP && got.trap == 3 && same && got.ip == asked.ip + 1 && got.cs == cs && got.ss == ss
            && (got.flags & ~(ulong)RF) == asked.flags,
        "to CS %x SS %x: signal %d, SP %lx, flags %lx, regs %d", cs, ss, landed, (ulong)got.sp, (ulong)got.flags, same);
}

static void refused(const char *what, unsigned cs, unsigned ss, int signal, unsigned trap, unsigned selector)
{
    visit(cs, ss);
#ifndef __x86_64__
    /* 32-bit kernels tell of a fault in their IRET as of an illegal instruction, with a number of their own. */
    if (!kernel_is_64())
        signal = SIGILL, trap = 32, selector = 0;
#endif
    check(landed == signal && got.trap == trap && got.err == selector, "%s: signal %d, trap %d, error %x", what, landed,
        (int)got.trap, (unsigned)got.err);
}

void sigreturns(void)
{
    alternate_stack();
    segments();
    catch(SIGUSR1, go, ON_STACK);
    catch(SIGTRAP, back, ON_STACK);
    catch(SIGSEGV, back, ON_STACK);
    catch(SIGBUS, back, ON_STACK);
    catch(SIGILL, back, ON_STACK);
    int wide = kernel_is_64();
    unsigned flat = wide ? 0x2b : 0x7b, code = wide ? 0x23 : 0x73;
#ifdef __x86_64__
    arrives(0x33, flat);
    arrives(0x33, LDT(DATA16));
#endif
    arrives(code, flat);
    arrives(code, LDT(DATA16));
    arrives(LDT(CODE32), flat);
    arrives(LDT(CODE32), LDT(DATA16));
    arrives(LDT(CODE16), flat);
    arrives(LDT(CODE16), LDT(DATA16));
    /* IRET's checks in their order: the code segment, then the stack's (Intel SDM 2A, IRET). */
    refused("absent code", LDT(ABSENT_CODE), flat, SIGBUS, 11, LDT(ABSENT_CODE) & ~3u);
    refused("data as code", flat, flat, SIGSEGV, 13, flat & ~3u);
#ifdef __x86_64__
    refused("code as stack", 0x33, code, SIGSEGV, 13, code & ~3u);
    refused("null stack in 32-bit code", code, 3, SIGSEGV, 13, 0);
    /* Linux returns to stacks of the LDT from a page that cannot be written (espfix64): IRET's fault becomes a double
     * fault, and that a #GP(0). */
    refused("absent stack", 0x33, LDT(ABSENT_DATA), SIGSEGV, 13, 0);
    refused("read-only stack", 0x33, LDT(READ_ONLY), SIGSEGV, 13, 0);
    refused("beyond the LDT", 0x33, LDT(1000), SIGSEGV, 13, 0);
#endif
}
