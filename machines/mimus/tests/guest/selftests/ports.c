/* Ports from user mode: ioperm's bitmap and iopl, with the rest kept out. */
#include "rt.h"

static WATCHED int faults;
static WATCHED ulong trap;

static void on_fault(int signal, struct siginfo *info, struct ucontext *uc)
{
    (void)signal, (void)info;
    faults++;
    trap = uc->regs.trap << 16 | uc->regs.err;
    /* All that is tried here is `in`/`out` by DX with one byte, or two with a prefix. */
    uc->regs.ip += *(uint8_t *)(ulong)uc->regs.ip == 0x66 ? 2 : 1;
}

static int in8(uint16_t port)
{
    uint8_t v = 0;
    faults = 0;
    __asm__ volatile("inb %%dx, %%al" : "+a"(v) : "d"(port) : "memory");
    return faults;
}

static int out8(uint16_t port)
{
    faults = 0;
    __asm__ volatile("outb %%al, %%dx" ::"a"(0), "d"(port) : "memory");
    return faults;
}

static int in16(uint16_t port)
{
    uint16_t v = 0;
    faults = 0;
    __asm__ volatile("inw %%dx, %%ax" : "+a"(v) : "d"(port) : "memory");
    return faults;
}

static int in32(uint16_t port)
{
    uint32_t v = 0;
    faults = 0;
    __asm__ volatile("inl %%dx, %%eax" : "+a"(v) : "d"(port) : "memory");
    return faults;
}

static int outs8(uint16_t port)
{
    uint8_t byte = 0, *s = &byte;
    faults = 0;
    __asm__ volatile("outsb" : "+S"(s) : "d"(port) : "memory");
    return faults;
}

static int cli(void)
{
    faults = 0;
    __asm__ volatile("cli\n sti" ::: "memory");
    return faults;
}

static void inherited(void)
{
    leave(out8(0x80) | in16(0x80) << 1 | out8(0x82) << 2);
}

void ports(void)
{
    catch(SIGSEGV, on_fault, 0);
    check(out8(0x80) && trap == 13 << 16 && in8(0x80) && in16(0x80) && in32(0x80) && outs8(0x80), "no ports at first");
    check(cli() == 2, "no CLI");
    if (sys(SYS_ioperm, 0x80L, 2L, 1L)) {
        skip("this kernel has no ioperm");
        return;
    }
    check(!out8(0x80) && !in8(0x81) && !in16(0x80) && !outs8(0x80), "two ports");
    check(in8(0x82) && in16(0x81) && in32(0x80) && in16(0x7f) && in8(0x7f), "and none beside them");
    check(in_child(inherited) == 4 << 8, "a child has the same two");
    check(!sys(SYS_ioperm, 0x81L, 1L, 0L) && !in8(0x80) && in8(0x81) && in16(0x80), "one is given back");
    /* The last port, whose word would reach past the bitmap. */
    check(!sys(SYS_ioperm, 0xffffL, 1L, 1L) && !in8(0xffff) && in16(0xffff) && in8(0xfffe), "port ffff");
    sys(SYS_sched_yield);
    check(!in8(0x80) && in8(0x81), "after others ran");
    check(!sys(SYS_iopl, 3L) && !in8(0x81) && !in32(0x80) && !out8(0x80), "iopl 3");
    /* Linux keeps interrupts out of it: it passes over CLI and STI. */
    check(!cli(), "CLI does nothing");
    check(!sys(SYS_iopl, 0L) && in8(0x82) && !in8(0x80), "iopl 0");
    check(!sys(SYS_ioperm, 0L, 0x10000L, 0L) && in8(0x80) && in8(0xffff), "none again");
}
