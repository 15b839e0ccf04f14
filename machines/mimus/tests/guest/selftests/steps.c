/* A process stepped by another through every class of instruction: where each step ends and what the registers are. */
#include "rt.h"

enum { TRACEME = 0, CONTINUE = 7, SINGLESTEP = 9, GETREGS = 12, SETREGS = 13 };

extern char step_code[], step_end[], step_avx[], step_avx_end[];
struct listed {
    ulong at, steps, length;
};
extern struct listed step_list[], step_list_avx[];

#ifdef __x86_64__
struct user {
    ulong r15, r14, r13, r12, bp, bx, r11, r10, r9, r8, ax, cx, dx, si, di, orig_ax, ip, cs, flags, sp, ss, fs_base,
        gs_base, ds, es, fs, gs;
};
#else
struct user {
    ulong bx, cx, dx, si, di, bp, ax, ds, es, fs, gs, orig_ax, ip, cs, flags, sp, ss;
};
#endif

static struct user registers(long pid)
{
    struct user u;
    sys(SYS_ptrace, (long)GETREGS, pid, 0L, &u);
    return u;
}

/* What must be the same wherever this runs: not the segment bases, not the number of a call. */
static wide with_registers(wide hash, const struct user *u)
{
    struct user v = *u;
    v.orig_ax = 0;
    v.flags &= ~(ulong)(RF | AF);
    /* AF after logic, and other flags that nobody defined, come into AX by PUSHF and LAHF: those are of the host's. */
    v.cs = v.ss = v.ds = v.es = 0;
    return fold(hash, &v, sizeof v);
}

static const char *name;

/* Steps from `begin` to `end`, comparing with the list. */
static void through(char *begin, char *end, const struct listed *list, wide *hash)
{
    long pid = sys(SYS_fork);
    int status;
    if (pid == 0) {
        sys(SYS_ptrace, (long)TRACEME, 0L, 0L, 0L);
        sys(SYS_kill, sys(SYS_getpid), (long)SIGSTOP);
        leave(9);
    }
    sys(SYS_wait4, pid, &status, 0L, 0L);
    struct user u = registers(pid);
    u.ip = (ulong)begin;
    u.ax = u.bx = u.cx = u.dx = u.si = u.di = u.bp = 0;
    u.orig_ax = -1ul;
    u.flags = 0x202;
#ifdef __x86_64__
    u.r8 = u.r9 = u.r10 = u.r11 = u.r12 = u.r13 = u.r14 = u.r15 = 0;
#endif
    static char child_stack[4096] __attribute__((aligned(64)));
    u.sp = (ulong)child_stack + sizeof child_stack - 64;
    sys(SYS_ptrace, (long)SETREGS, pid, 0L, &u);
    unsigned steps = 0, wrong = 0, faults = 0, open = 0;
    while (u.ip != (ulong)end && steps < 2000 && wrong < 5) {
        const struct listed *l = list;
        while (l->at && l->at != u.ip)
            l++;
        unsigned times = l->steps % 100, fault = l->steps >= 100;
        ulong from = u.ip;
        /* A load of SS is one step with what follows it. */
        if (times == 0)
            l++, times = 1;
        for (unsigned t = 0; t < times; t++) {
            sys(SYS_ptrace, (long)SINGLESTEP, pid, 0L, 0L);
            sys(SYS_wait4, pid, &status, 0L, 0L);
            if ((status & 0xff) != 0x7f) {
                check(0, "%s: it ended at %lx", name, from);
                return;
            }
            u = registers(pid);
            steps++;
            if (t + 1 < times && u.ip != from)
                wrong++, check(0, "%s: repetition %u of %lx is at %lx", name, t, from, u.ip);
        }
        int signal = status >> 8;
        if (fault) {
            faults++;
            *hash = fold(*hash, &signal, sizeof signal);
            if (signal != SIGTRAP && u.ip != from + l->length) { /* not a trap, as INTO's is */
                if (u.ip != from)
                    wrong++, check(0, "%s: the fault at %lx is at %lx", name, from, u.ip);
                u.ip += l->length;
                sys(SYS_ptrace, (long)SETREGS, pid, 0L, &u);
            }
        } else if (signal != SIGTRAP) {
            wrong++, check(0, "%s: signal %d at %lx", name, signal, from);
            break;
        }
        /* Where it is must be behind, or where a jump in the list leads. */
        if (u.ip != l->at + l->length) {
            const struct listed *to = list;
            while (to->at && to->at != u.ip)
                to++;
            const uint8_t *code = (const uint8_t *)l->at;
            int jumps = code[0] == 0xeb || code[0] == 0xe9 || (code[0] & 0xf0) == 0x70 || code[0] == 0xe8 || code[0] == 0xc3
                || code[0] == 0xff || (code[0] & 0xfc) == 0xe0 || code[0] == 0x67 || code[0] == 0x48 || code[0] == 0xcf || code[0] == 0xcb;
            if (!jumps || !to->at)
                wrong++, check(0, "%s: after %lx comes %lx", name, l->at, u.ip);
        }
        /* The values that differ between machines are overwritten by the next instructions. */
        const uint8_t *code = (const uint8_t *)from;
        int varies = code[0] == 0x0f && (code[1] == 0x31 || code[1] == 0xa2 || code[1] == 5);
        varies |= code[0] == 0xcd || code[0] == 0xb8 || code[0] == 0xb9 || code[0] == 0xba || code[0] == 0xbb;
        varies |= code[0] == 0x8c || code[0] == 0x8e || (code[0] == 0x0f && code[1] < 4);
        /* What divisions and decimal adjustments leave in the flags is each maker's; conversions leave them alone. */
        int adjusts = code[0] == 0x27 || code[0] == 0x2f || code[0] == 0x37 || code[0] == 0x3f || (code[0] & 0xfe) == 0xd4;
        int converts = code[0] == 0x98 || code[0] == 0x99 || (code[0] == 0x0f && (code[1] == 0xb6 || code[1] == 0xbf));
        if (adjusts || (code[0] == 0xf7 && (code[1] & 0xf0) == 0xf0))
            open = 1;
        else if (!converts)
            open = 0;
        if (open)
            u.flags &= ~(ulong)(CF | PF | AF | ZF | SF | OF);
        if (!varies)
            *hash = with_registers(*hash, &u);
    }
    check(u.ip == (ulong)end && !wrong, "%s: %u steps, %u signals", name, steps, faults);
    sys(SYS_kill, pid, (long)SIGKILL);
    sys(SYS_wait4, pid, &status, 0L, 0L);
}

void steps(void)
{
    wide hash = FOLD_START;
    name = "all classes";
    through(step_code, step_end, step_list, &hash);
    print("value steps %016llx\n", hash);
    if (!kernel_is_64())
        skip("selectors that get into registers are others than a 64-bit kernel's: nothing to compare with");
    if (!have_avx()) {
        skip("no AVX");
        return;
    }
    hash = FOLD_START;
    name = "AVX and BMI";
    through(step_avx, step_avx_end, step_list_avx, &hash);
    print("value steps avx %016llx\n", hash);
}
