/* Ways into the kernel: int 0x80 from both widths, SYSENTER, SYSCALL; which registers they leave; odd flags and returns. */
#include "rt.h"

static WATCHED int trap;
static WATCHED ulong resume;

static void on_fault(int signal, struct siginfo *info, struct ucontext *uc)
{
    (void)signal, (void)info;
    trap = uc->regs.trap;
    uc->regs.ip = resume;
    uc->regs.flags &= ~(ulong)(NT | AC | TF | DF);
}

#ifdef __x86_64__
/* int 0x80 from 64-bit code: arguments are 32 bits wide, R8 to R15 stay. */
static void int80_from_64(void)
{
    struct {
        ulong r[16];
    } in, out;
    for (int i = 0; i < 16; i++)
        in.r[i] = 0x1000100010001ul * (i + 1);
    register ulong *pi __asm__("rsi") = in.r;
    __asm__ volatile("push %%rbp\n push %%rbx\n mov %[out], %%r15\n push %%r15\n"
                     "mov 64(%%rsi), %%r8\n mov 72(%%rsi), %%r9\n mov 80(%%rsi), %%r10\n mov 88(%%rsi), %%r11\n mov 96(%%rsi), %%r12\n mov 104(%%rsi), %%r13\n mov 112(%%rsi), %%r14\n mov 24(%%rsi), %%rbx\n mov 16(%%rsi), %%rdx\n mov 40(%%rsi), %%rbp\n"
                     "mov $20, %%eax\n mov $0x1111111122222222, %%rcx\n int $0x80\n"
                     "pop %%rdi\n mov %%r8, 64(%%rdi)\n mov %%r9, 72(%%rdi)\n mov %%r10, 80(%%rdi)\n mov %%r11, 88(%%rdi)\n mov %%r12, 96(%%rdi)\n mov %%r13, 104(%%rdi)\n mov %%r14, 112(%%rdi)\n mov %%rbx, 24(%%rdi)\n mov %%rdx, 16(%%rdi)\n mov %%rbp, 40(%%rdi)\n mov %%rcx, 8(%%rdi)\n mov %%rax, (%%rdi)\n"
                     "pop %%rbx\n pop %%rbp\n"
                     : : "r"(pi), [out] "r"(out.r) : "rax", "rcx", "rdx", "rdi", "r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15", "memory");
    check((long)out.r[0] == sys(SYS_getpid), "int 0x80 in 64-bit code");
    check(!memcmp(&in.r[9], &out.r[9], 48) && in.r[8] == out.r[8] && in.r[3] == out.r[3] && in.r[2] == out.r[2] && in.r[5] == out.r[5]
            && out.r[1] == 0x1111111122222222, "its registers");
}

/* SYSCALL: RCX and R11 are the return's, all others stay. */
static void syscall_registers(void)
{
    ulong rcx, r11, behind, r8 = 0, flags;
    __asm__ volatile("mov $0x8888888877777777, %%r8\n pushf\n pop %[flags]\n syscall\n 1: mov $1b, %[behind]\n mov %%r8, %[r8]\n mov %%r11, %[r11]\n"
                     : "=c"(rcx), [r11] "=&r"(r11), [behind] "=&r"(behind), [r8] "=&r"(r8), [flags] "=&r"(flags) : "a"(SYS_getppid) : "r8", "r11", "memory");
    check(rcx == behind && r11 == flags && r8 == 0x8888888877777777, "SYSCALL leaves RCX, R11: %lx %lx", rcx - behind, r11);
}

/* A signal returns to an address that SYSRET cannot go to, with what a system call's frame would have. */
static ulong far_address;
static WATCHED ulong fault_at, fault_error, fault_trap;

static void go_far(int signal, struct siginfo *info, struct ucontext *uc)
{
    (void)signal, (void)info;
    uc->regs.ip = uc->regs.cx = far_address;
    uc->regs.r11 = uc->regs.flags;
}

static void landed(int signal, struct siginfo *info, struct ucontext *uc)
{
    (void)signal, (void)info;
    fault_at = uc->regs.ip, fault_error = uc->regs.err, fault_trap = uc->regs.trap;
    uc->regs.ip = resume;
    uc->regs.sp = uc->regs.bx;
}

static void return_far(ulong address)
{
    far_address = address;
    fault_at = 1;
    __asm__ volatile("movq $9f, %[resume]\n push %%rbx\n push %%rbp\n mov %%rsp, %%rbx\n syscall\n 9: pop %%rbp\n pop %%rbx\n"
                     : [resume] "=m"(resume) : "a"(SYS_kill), "D"(sys(SYS_getpid)), "S"((long)SIGUSR1) : "rcx", "r11", "memory", "cc", "rdx", "r8", "r9", "r10", "r12", "r13", "r14", "r15");
}

static void returns(void)
{
    alternate_stack();
    catch(SIGUSR1, go_far, ON_STACK);
    catch(SIGSEGV, landed, ON_STACK);
    /* The last page of the lower half is not there; its end is no address. The kernel must not use SYSRET. */
    return_far(0x7ffffffff000);
    check(fault_at == 0x7ffffffff000 && fault_trap == 14, "to the end of user space: trap %lu at %lx", fault_trap, fault_at);
    return_far(0x800000000000);
    check(fault_trap == 13 && fault_error == 0, "to no address: trap %lu at %lx", fault_trap, fault_at);
    return_far(0x8000000000000000);
    check(fault_trap == 13 && fault_error == 0, "to no address at all: trap %lu at %lx", fault_trap, fault_at);
    return_far(0xffffffffffffff00);
    check(fault_at == 0xffffffffffffff00 && fault_trap == 14, "to the kernel's half: trap %lu", fault_trap);
}

/* The vsyscall page: executed by the kernel in the program's stead. */
static void vsyscall(void)
{
    long seconds[2] = { 0, 0 }, r = 1;
    catch(SIGSEGV, landed, ON_STACK);
    fault_at = 0;
    __asm__ volatile("push %%rbx\n push %%rbp\n movq $9f, %[resume]\n mov %%rsp, %%rbx\n call *%[to]\n 9: pop %%rbp\n pop %%rbx\n"
                     : "=a"(r), [resume] "=m"(resume) : "0"(1), [to] "r"(0xffffffffff600000), "D"(seconds), "S"(0) : "rcx", "rdx", "r11", "memory", "cc", "r8", "r9", "r10", "r12", "r13", "r14", "r15");
    if (fault_at)
        skip("no vsyscall page");
    else
        check(r == 0 && seconds[0] > 0, "gettimeofday in the vsyscall page");
}
#else
struct six {
    uint32_t eax, ebx, ecx, edx, esi, edi, ebp;
};

/* All six arguments by one way in; which registers come back. */
struct six before, after;

__asm__(".macro entry name, insn:vararg\n"
        ".globl enter_\\name\n enter_\\name: pusha\n mov before, %eax\n mov before+4, %ebx\n mov before+8, %ecx\n mov before+12, %edx\n"
        "mov before+16, %esi\n mov before+20, %edi\n mov before+24, %ebp\n \\insn\n"
        "mov %eax, after\n mov %ebx, after+4\n mov %ecx, after+8\n mov %edx, after+12\n mov %esi, after+16\n mov %edi, after+20\n mov %ebp, after+24\n"
        "popa\n ret\n.endm\n"
        "entry int80, int $0x80\n"
        "entry vdso, call *vdso_entry\n"
        /* As Linux's own entry does it, which is where the kernel returns to: it pops what is pushed here. */
        "entry syscall, call syscall_here\n"
        "syscall_here: push %ecx\n push %edx\n push %ebp\n mov %ecx, %ebp\n syscall\n ud2\n");
void enter_int80(void), enter_vdso(void), enter_syscall(void);
ulong vdso_entry;

static void compare(const char *how, void (*enter)(void))
{
    /* mmap2 with all its six arguments; a page where it is told. */
    uint32_t at = (uint32_t)pages(4096, PROT_READ);
    before = (struct six){ 192, at, 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1u, 0 };
    enter();
    int kept = !memcmp(&before.ebx, &after.ebx, 24);
    *(WATCHED uint32_t *)at = 5;
    check(after.eax == at && kept, "%s: six arguments, and registers that stay", how);
    before = (struct six){ SYS_getpid, 0x12345678, 0x23456789, 0x3456789a, 0x456789ab, 0x56789abc, 0x6789abcd };
    enter();
    check((long)after.eax == sys(SYS_getpid) && !memcmp(&before.ebx, &after.ebx, 24), "%s: none, and all stay", how);
    before.eax = 9999;
    enter();
    check(after.eax == -38u, "%s: no such call", how);
}

/* The kernel's entry for system calls, from the auxiliary vector (AT_SYSINFO 32). */
static ulong vdso(void)
{
    for (ulong *a = auxiliary; a[0]; a += 2)
        if (a[0] == 32)
            return a[1];
    return 0;
}

static int is_amd(void)
{
    uint32_t r[4];
    cpuid(0, 0, r);
    return r[1] == 0x68747541; /* "Auth" */
}

/* Elsewhere it is no instruction. */
static void no_syscall(void)
{
    trap = 0;
    __asm__ volatile("movl $9f, %[resume]\n mov %[getpid], %%eax\n syscall\n 9:\n"
                     : [resume] "=m"(resume) : [getpid] "i"(SYS_getpid) : "memory", "eax", "ecx");
    check(trap == 6, "SYSCALL in 32-bit code: trap %d", trap);
}

/* SYSENTER has its sixth argument on the stack: one that is not there. */
static void argument_fault(void)
{
    ulong low, result;
    trap = 0;
    /* Linux: the call fails with EFAULT, or the program gets a signal. */
    __asm__ volatile("mov %%esp, %[low]\n movl $9f, %[resume]\n push %%ebp\n push %%ebx\n push %%esi\n push %%edi\n mov %%esp, save_sp\n"
                     "mov $20, %%eax\n mov $16, %%ebp\n sysenter\n 9: mov save_sp, %%esp\n pop %%edi\n pop %%esi\n pop %%ebx\n pop %%ebp\n"
                     : [low] "=&m"(low), [resume] "=m"(resume), "=a"(result) : : "memory", "ecx", "edx");
    check(trap == 14 || trap == 6 || result == -14ul, "SYSENTER without its stack: trap %d", trap);
}
ulong save_sp;

#endif

#ifdef __x86_64__
#define CLOBBERED , "rcx", "r11"
#else
#define CLOBBERED
#endif

/* NT and AC set as a call is made: the kernel's own IRET must not find NT. */
static void odd_flags(ulong odd, const char *name)
{
    ulong flags, pid;
    __asm__ volatile("pushf\n or %[odd], (%%" SIZED("rsp", "esp") ")\n popf\n" SIZED("syscall", "int $0x80") "\n pushf\n pop %[flags]\n"
                     "push %[flags]\n and %[even], (%%" SIZED("rsp", "esp") ")\n popf\n"
                     : "=a"(pid), [flags] "=&r"(flags) : "0"((long)SYS_getpid), [odd] "r"(odd), [even] "r"(~odd) : "memory", "cc" CLOBBERED);
    check((long)pid == sys(SYS_getpid) && (flags & odd) == odd, "%s set over a call: %lx", name, flags);
}

void calls(void)
{
    catch(SIGSEGV, on_fault, 0);
    catch(SIGILL, on_fault, 0);
#ifdef __x86_64__
    int80_from_64();
    syscall_registers();
#else
    compare("int 0x80", enter_int80);
    vdso_entry = vdso();
    if (vdso_entry)
        compare("the kernel's entry", enter_vdso);
    /* SYSCALL in 32-bit code under a 64-bit kernel: AMD's processors have it. */
    if (kernel_is_64() && !is_amd())
        no_syscall();
    else if (kernel_is_64() && vdso_entry)
        compare("SYSCALL", enter_syscall);
    alternate_stack();
    catch(SIGSEGV, on_fault, ON_STACK);
    catch(SIGILL, on_fault, ON_STACK);
    argument_fault();
#endif
    odd_flags(NT, "NT");
    odd_flags(AC, "AC");
    odd_flags(DF, "DF");
    odd_flags(NT | AC | DF | OF | CF, "all");
#ifdef __x86_64__
    returns();
    vsyscall();
#endif
}
