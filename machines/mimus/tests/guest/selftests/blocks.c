/* A process stepped by another from branch to branch (PTRACE_SINGLEBLOCK, for which the kernel sets DEBUGCTL.BTF): where each
 * step ends. Not run on the host itself: hypervisors do not all give their guests that bit. */
#include "rt.h"

enum { TRACEME = 0, GETREGS = 12, SETREGS = 13, SINGLEBLOCK = 33 };

#ifdef __x86_64__
struct user {
    ulong r15, r14, r13, r12, bp, bx, r11, r10, r9, r8, ax, cx, dx, si, di, orig_ax, ip, cs, flags, sp, ss, fs_base,
        gs_base, ds, es, fs, gs;
};
#define POINTERS ".quad "
#define JUMP "jmp *%rdx\n"
#else
struct user {
    ulong bx, cx, dx, si, di, bp, ax, ds, es, fs, gs, orig_ax, ip, cs, flags, sp, ss;
};
#define POINTERS ".long "
#define JUMP "jmp *%edx\n"
#endif

/* Branches taken and not taken, to the next instruction too; what is no branch: repetitions, pushes and pops of flags. HLT,
 * which a process may not execute, is never come to. */
__asm__(".text\n"
        "block_code: xor %eax, %eax\n jnz 1f\n jz 1f\n 1: nop\n jz 2f\n hlt\n"
        "2: mov $3, %ecx\n 3: loop 3b\n .byte 0xe3, 1\n hlt\n"
        "4: inc %ecx\n .byte 0xe3, 0xfc\n jmp 5f\n hlt\n"
        "5: mov $6f, %edx\n " JUMP "hlt\n"
        "6: call 7f\n 7: nop\n call 8f\n 9: jmp 10f\n hlt\n 8: ret\n"
        "10: cmp $1, %eax\n jg 11f\n jle 11f\n hlt\n"
        "11: mov $2, %ecx\n mov $block_room, %edi\n rep stosb\n pushf\n popf\n nop\n jmp 12f\n hlt\n"
        "12: nop\n block_end: int3\n"
        ".data\n .balign 8\n"
        "block_list: " POINTERS "1b, 2b, 3b, 3b, 4b, 5b, 6b, 7b, 8b, 9b, 10b, 11b, 12b, block_end + 1, 0\n"
        "block_room: .space 8\n"
        ".text\n");
extern char block_code[];
extern ulong block_list[];

void blocks(void)
{
    long pid = sys(SYS_fork);
    int status, n = 0, ok = 1;
    if (pid == 0) {
        sys(SYS_ptrace, (long)TRACEME, 0L, 0L, 0L);
        sys(SYS_kill, sys(SYS_getpid), (long)SIGSTOP);
        leave(9);
    }
    sys(SYS_wait4, pid, &status, 0L, 0L);
    struct user u;
    sys(SYS_ptrace, (long)GETREGS, pid, 0L, &u);
    u.ip = (ulong)block_code;
    u.orig_ax = -1ul;
    sys(SYS_ptrace, (long)SETREGS, pid, 0L, &u);
    for (; block_list[n] && ok; n++) {
        long refused = sys(SYS_ptrace, (long)SINGLEBLOCK, pid, 0L, 0L);
        if (refused) {
            ok = check(0, "PTRACE_SINGLEBLOCK: %ld", refused);
            break;
        }
        sys(SYS_wait4, pid, &status, 0L, 0L);
        sys(SYS_ptrace, (long)GETREGS, pid, 0L, &u);
        ok = status == (SIGTRAP << 8 | 0x7f) && u.ip == block_list[n];
        if (!ok)
            check(0, "step %d ends at %lx with status %x, not at %lx", n, u.ip, status, block_list[n]);
    }
    check(ok, "%d branches", n);
    sys(SYS_kill, pid, (long)SIGKILL);
    sys(SYS_wait4, pid, &status, 0L, 0L);
}
