/* Segments of a local descriptor table: bases, limits (expand-down, 16-bit, in pages), rights, and what LAR and LSL say. */
#include "rt.h"

static uint8_t *area;
static WATCHED int signal_was;
static WATCHED unsigned trap, error;
/* Where a faulting access goes on. */
static WATCHED uint32_t resume;
/* The program's own code segment, whatever ran when it faulted. */
static uint16_t flat_code;

static void on_fault(int signal, struct siginfo *info, struct ucontext *uc)
{
    (void)info;
    signal_was = signal, trap = uc->regs.trap, error = uc->regs.err;
    uc->regs.ip = resume;
    uc->regs.cs = flat_code;
}

static long set(struct segment s)
{
    return write_ldt(&s);
}

/* An access that goes through FS, so that 64-bit code has the base too; `trap` is 0 if it went well. */
#define RESUMED(code) "movl $9f, %[resume]\n" code "\n 9:\n"

static int load_fs(unsigned selector)
{
    trap = 0;
    __asm__ volatile(RESUMED("mov %[s], %%fs") : [resume] "=m"(resume) : [s] "r"(selector) : "memory");
    return trap == 0;
}

static int read8(uint32_t offset, uint8_t *value)
{
    uint8_t v = 0;
    trap = 0;
    __asm__ volatile(RESUMED("movb %%fs:(%[a]), %[v]") : [resume] "=m"(resume), [v] "+q"(v) : [a] "r"((ulong)offset) : "memory");
    *value = v;
    return trap == 0;
}

static int read32(uint32_t offset)
{
    uint32_t v = 0;
    trap = 0;
    __asm__ volatile(RESUMED("movl %%fs:(%[a]), %[v]") : [resume] "=m"(resume), [v] "+r"(v) : [a] "r"((ulong)offset) : "memory");
    return trap == 0;
}

static int write8(uint32_t offset)
{
    trap = 0;
    __asm__ volatile(RESUMED("movb $0x5a, %%fs:(%[a])") : [resume] "=m"(resume) : [a] "r"((ulong)offset) : "memory");
    return trap == 0;
}

/* LAR's rights, or -1; LSL's limit, or -1. */
static uint32_t lar(unsigned selector)
{
    uint32_t v = 0;
    uint8_t ok;
    __asm__("lar %2, %0; setz %1" : "+r"(v), "=q"(ok) : "r"(selector) : "cc");
    return ok ? v : -1u;
}

static uint32_t lsl(unsigned selector)
{
    uint32_t v = 0;
    uint8_t ok;
    __asm__("lsl %2, %0; setz %1" : "+r"(v), "=q"(ok) : "r"(selector) : "cc");
    return ok ? v : -1u;
}

static int verr(unsigned selector)
{
    uint8_t ok;
    __asm__("verr %w1; setz %0" : "=q"(ok) : "r"(selector) : "cc");
    return ok;
}

static int verw(unsigned selector)
{
    uint8_t ok;
    __asm__("verw %w1; setz %0" : "=q"(ok) : "r"(selector) : "cc");
    return ok;
}

/* Linux marks all it writes as accessed. */
static void bases_and_rights(void)
{
    uint32_t base = (uint32_t)(ulong)area;
    uint8_t v;
    set((struct segment){ .number = 0, .base = base, .limit = 99, .is_32 = 1 });
    check(lar(LDT(0)) == 0x40f300 && lsl(LDT(0)) == 99 && verr(LDT(0)) && verw(LDT(0)), "data: %x", lar(LDT(0)));
    check(load_fs(LDT(0)) && read8(5, &v) && v == area[5], "its base");
    set((struct segment){ .number = 1, .base = base, .limit = 2, .is_32 = 1, .in_pages = 1, .read_only = 1 });
    check(lar(LDT(1)) == 0xc0f100 && lsl(LDT(1)) == 0x2fff && verr(LDT(1)) && !verw(LDT(1)), "read-only, in pages: %x %x",
        lar(LDT(1)), lsl(LDT(1)));
    set((struct segment){ .number = 2, .base = base, .limit = 1, .is_32 = 1, .contents = CODE });
    check(lar(LDT(2)) == 0x40fb00 && verr(LDT(2)) && !verw(LDT(2)), "code: %x", lar(LDT(2)));
    set((struct segment){ .number = 3, .base = base, .limit = 1, .is_32 = 1, .contents = CODE, .read_only = 1 });
    check(lar(LDT(3)) == 0x40f900 && !verr(LDT(3)), "code that cannot be read: %x", lar(LDT(3)));
    check(!load_fs(LDT(3)) && trap == 13 && error == (LDT(3) & ~3), "nor loaded: trap %u, error %x", trap, error);
    set((struct segment){ .number = 4, .base = base, .limit = 1, .is_32 = 1, .not_present = 1 });
    check(lar(LDT(4)) == 0x407300 && verr(LDT(4)), "not present: %x", lar(LDT(4)));
    check(!load_fs(LDT(4)) && trap == 11 && error == (LDT(4) & ~3) && signal_was == SIGBUS, "nor loaded: trap %u, error %x", trap, error);
    check(lar(LDT(7)) == -1u && !load_fs(LDT(7)) && trap == 13 && error == (LDT(7) & ~3), "an empty entry");
    check(lar(LDT(4000)) == -1u && lsl(LDT(4000)) == -1u && !load_fs(LDT(4000)) && error == (LDT(4000) & ~3), "beyond the table");
    check(lar(0) == -1u && !verr(3) && load_fs(3) && load_fs(0), "null selectors");
    struct segment s = { .number = 8192 };
    check((int)write_ldt(&s) == -22, "entry 8192");
}

#ifndef __x86_64__
/* Limits: only where segments have them. */
static void limits(void)
{
    uint32_t base = (uint32_t)(ulong)area;
    uint8_t v;
    set((struct segment){ .number = 0, .base = base, .limit = 99, .is_32 = 1 });
    load_fs(LDT(0));
    check(read8(99, &v) && !read8(100, &v) && trap == 13 && error == 0, "a limit: trap %u", trap);
    check(read32(96) && !read32(97) && !read32(99) && !read32(0xffffffff) && !read32(0xfffffffe), "of more than a byte");
    check(write8(99) && !write8(100), "for writing");
    set((struct segment){ .number = 1, .base = base, .limit = 0, .is_32 = 1, .in_pages = 1, .read_only = 1 });
    load_fs(LDT(1));
    check(read8(4095, &v) && !read8(4096, &v) && !write8(0) && trap == 13 && error == 0, "in pages, read-only");
    /* Expand-down: from behind the limit to the top of 64 KiB or 4 GiB. */
    set((struct segment){ .number = 2, .base = base - 0x1000, .limit = 0x1fff, .is_32 = 0, .contents = EXPAND_DOWN });
    load_fs(LDT(2));
    check(!read8(0x1fff, &v) && read8(0x2000, &v) && v == area[0x1000] && !read32(0x1fff) && !read8(0x10000, &v), "expand-down, 16 bits");
    set((struct segment){ .number = 3, .base = base, .limit = 0, .is_32 = 1, .in_pages = 1, .contents = EXPAND_DOWN });
    load_fs(LDT(3));
    check(!read8(0xfff, &v) && read8(0x1000, &v) && v == area[0x1000] && !write8(0) && write8(0x2000), "expand-down, 32 bits");
    check(lar(LDT(3)) == 0xc0f700 && lsl(LDT(3)) == 0xfff, "and how it is described: %x %x", lar(LDT(3)), lsl(LDT(3)));
    /* The base wraps around 4 GiB. */
    set((struct segment){ .number = 4, .base = base + 0x1000, .limit = 0xfffff, .is_32 = 1, .in_pages = 1 });
    load_fs(LDT(4));
    check(read8(-0x1000, &v) && v == area[0], "an offset below the base");
    /* A null selector in use. */
    load_fs(0);
    check(!read8(0, &v) && trap == 13 && error == 0, "through a null selector");
}

/* A stack segment with a limit: #SS. */
static void stack_limit(void)
{
    uint32_t base = (uint32_t)(ulong)area;
    ulong low;
    unsigned old;
    set((struct segment){ .number = 5, .base = base, .limit = 4095, .is_32 = 1 });
    trap = 0;
    __asm__ volatile("mov %%ss, %[old]\n mov %%esp, %[low]\n movl $8f, %[resume]\n"
                     "mov %[s], %%ss\n mov $4096, %%esp\n push $5\n push $6\n mov $0, %%esp\n push $7\n 8: mov %[old], %%ss\n mov %[low], %%esp\n"
                     : [resume] "=m"(resume), [low] "=&r"(low), [old] "=&r"(old) : [s] "r"(LDT(5)) : "memory");
    uint32_t pushed[2];
    memcpy(pushed, area + 4088, 8);
    check(pushed[1] == 5 && pushed[0] == 6, "pushes below its limit");
    check(trap == 12 && error == 0 && signal_was == SIGBUS, "a push beyond it: trap %u", trap);
    /* 16-bit: SP wraps, the rest of ESP stays. */
    set((struct segment){ .number = 6, .base = base, .limit = 0xffff });
    ulong sp;
    __asm__ volatile("mov %%ss, %[old]\n mov %%esp, %[low]\n"
                     "mov %[s], %%ss\n mov $0xabcd0000, %%esp\n push $9\n mov %%esp, %[sp]\n pop %%eax\n mov %[old], %%ss\n mov %[low], %%esp\n"
                     : [low] "=&r"(low), [old] "=&r"(old), [sp] "=&r"(sp) : [s] "r"(LDT(6)) : "memory", "eax");
    memcpy(pushed, area + 0xfffc, 4);
    check(sp == 0xabcdfffc && pushed[0] == 9, "a 16-bit stack wraps: %lx", sp);
}

/* A far call to 16-bit code and back, and a run into a code segment's limit. */
static void code_limit(void)
{
    uint8_t *code = area + 0x8000;
    uint32_t base = (uint32_t)(ulong)code;
    static struct __attribute__((packed)) { uint32_t offset; uint16_t selector; } to;
    uint32_t result = 0;
    /* mov $0x1234, %ax; 32-bit lret */
    static const uint8_t sixteen[] = { 0xb8, 0x34, 0x12, 0x66, 0xcb };
    memcpy(code, sixteen, sizeof sixteen);
    set((struct segment){ .number = 10, .base = base, .limit = 4, .contents = CODE });
    to.offset = 0, to.selector = LDT(10);
    __asm__ volatile("lcall *%[to]" : "=a"(result) : "0"(0xffff0000), [to] "m"(to) : "memory");
    check(result == 0xffff1234, "16-bit code: %x", result);
    /* The limit in front of its last instruction's last byte. */
    ulong low;
    set((struct segment){ .number = 11, .base = base, .limit = 3, .contents = CODE });
    to.selector = LDT(11);
    trap = 0;
    __asm__ volatile("mov %%esp, %[low]\n movl $8f, %[resume]\n lcall *%[to]\n 8: mov %[low], %%esp"
                     : "=a"(result), [low] "=&r"(low), [resume] "=m"(resume) : "0"(0), [to] "m"(to) : "memory");
    check(trap == 13 && error == 0 && result == 0x1234, "the end of a code segment: trap %u", trap);
    to.offset = 100, trap = 0;
    __asm__ volatile("mov %%esp, %[low]\n movl $8f, %[resume]\n lcall *%[to]\n 8: sub %%esp, %[low]\n add %[low], %%esp"
                     : [low] "=&r"(low), [resume] "=m"(resume) : [to] "m"(to) : "memory");
    check(trap == 13 && error == 0 && low == 0, "a call beyond it pushes nothing: trap %u", trap);
}
#endif

/* Another process's table is its own; a child's is a copy. */
static void others(void)
{
    struct segment s = { .number = 20, .base = 0, .limit = 7, .is_32 = 1 };
    leave(lsl(LDT(0)) == 55 && !write_ldt(&s) && lsl(LDT(20)) == 7 ? 33 : 1);
}

void ldts(void)
{
    area = pages(0x11000, PROT_READ | PROT_WRITE | PROT_EXEC);
    for (int i = 0; i < 0x10000; i++)
        area[i] = (uint8_t)(i * 7 + (i >> 8));
    alternate_stack();
    __asm__("mov %%cs, %0" : "=r"(flat_code));
    catch(SIGSEGV, on_fault, ON_STACK);
    catch(SIGBUS, on_fault, ON_STACK);
    bases_and_rights();
#ifndef __x86_64__
    limits();
    stack_limit();
    code_limit();
#else
    uint8_t v;
    /* 64-bit code: the base counts, the limit does not (SDM 3A 3.4.4). */
    set((struct segment){ .number = 0, .base = (uint32_t)(ulong)area, .limit = 9, .is_32 = 1, .read_only = 1 });
    check(load_fs(LDT(0)) && read8(50, &v) && v == area[50] && read32(8) && write8(60), "no limits in 64-bit code");
    load_fs(0);
#endif
    set((struct segment){ .number = 0, .base = 0, .limit = 55, .is_32 = 1 });
    check(in_child(others) == 33 << 8 && lsl(LDT(20)) == -1u, "a child has a copy");
}
