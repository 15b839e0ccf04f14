/* Pages that are not to be executed: the fault, its address and error code. */
#include "rt.h"

static WATCHED ulong at, error, address;

static void on_fault(int signal, struct siginfo *info, struct ucontext *uc)
{
    (void)signal;
    at = uc->regs.ip, error = uc->regs.err, address = uc->regs.cr2;
    (void)info;
    /* Back to the caller, whose address is on the stack. */
    ulong *sp = (ulong *)(ulong)uc->regs.sp;
    uc->regs.ip = *sp;
    uc->regs.sp += sizeof *sp;
}

static void call(void *code)
{
    at = 0;
    ((void (*)(void))(ulong)code)();
}

void no_exec(void)
{
    uint32_t r[4];
    cpuid(0x80000000, 0, r);
    /* Kernels without PAE have no such bit in their page tables. */
    uint8_t *page = pages(8192, PROT_READ | PROT_WRITE);
    page[0] = 0xc3;
    catch(SIGSEGV, on_fault, 0);
    call(page);
    if (!at) {
        skip("this kernel does not keep pages from being executed");
        return;
    }
    /* Present, user, instruction fetch. */
    check(at == (ulong)page && address == (ulong)page && error == 0x15, "a data page: error %lx", error);
    sys(SYS_mprotect, page, 4096L, (long)(PROT_READ | PROT_EXEC));
    call(page);
    check(!at, "executable now");
    /* An instruction whose second half is in a page that is not. */
    sys(SYS_mprotect, page, 4096L, (long)(PROT_READ | PROT_WRITE));
    page[4094] = 0x0f, page[4095] = 0x1f, page[4096] = 0xc0, page[4097] = 0xc3;
    sys(SYS_mprotect, page, 4096L, (long)(PROT_READ | PROT_EXEC));
    call(page + 4094);
    check(at == (ulong)page + 4094 && address == (ulong)page + 4096 && error == 0x15, "half an instruction: error %lx at %lx",
        error, address);
    sys(SYS_mprotect, page, 8192L, (long)(PROT_READ | PROT_EXEC));
    call(page + 4094);
    check(!at, "executable as a whole");
    sys(SYS_mprotect, page, 8192L, (long)PROT_READ);
    call(page + 4094);
    check(at == (ulong)page + 4094 && address == (ulong)page + 4094 && error == 0x15, "no more: error %lx", error);
    sys(SYS_munmap, page, 8192L);
    call(page);
    check(at == (ulong)page && error == 0x14, "not there: error %lx", error);
}
