/* The registers that a program begins with: zero but for the stack pointer (Linux ELF_PLAT_INIT), and fresh units. */
#include "rt.h"

__asm__(".pushsection .data\n"
        ".globl initial_registers\n"
        "initial_registers: .zero 256\n"
        ".popsection\n"
        ".globl initial_entry\n"
        "initial_entry:\n"
#ifdef __x86_64__
        "mov %rax, initial_registers\n mov %rbx, initial_registers+8\n mov %rcx, initial_registers+16\n"
        "mov %rdx, initial_registers+24\n mov %rsi, initial_registers+32\n mov %rdi, initial_registers+40\n"
        "mov %rbp, initial_registers+48\n mov %r8, initial_registers+56\n mov %r9, initial_registers+64\n"
        "mov %r10, initial_registers+72\n mov %r11, initial_registers+80\n mov %r12, initial_registers+88\n"
        "mov %r13, initial_registers+96\n mov %r14, initial_registers+104\n mov %r15, initial_registers+112\n"
        "pushf\n pop %rax\n mov %rax, initial_registers+120\n"
#else
        "mov %eax, initial_registers\n mov %ebx, initial_registers+8\n mov %ecx, initial_registers+16\n"
        "mov %edx, initial_registers+24\n mov %esi, initial_registers+32\n mov %edi, initial_registers+40\n"
        "mov %ebp, initial_registers+48\n"
        "pushf\n pop %eax\n mov %eax, initial_registers+120\n"
#endif
        "mov %ds, initial_registers+128\n mov %es, initial_registers+136\n mov %fs, initial_registers+144\n"
        "mov %gs, initial_registers+152\n mov %ss, initial_registers+160\n mov %cs, initial_registers+168\n"
        "fnstenv initial_registers+176\n"
        "stmxcsr initial_registers+208\n"
        "movups %xmm7, initial_registers+216\n"
        "jmp _start\n");

extern wide initial_registers[32];

void initial_state(void)
{
    wide any = 0;
    for (int i = 0; i < 15; i++)
        any |= initial_registers[i];
    check(!any, "general registers are zero");
    check(initial_registers[15] == 0x202, "flags %llx", initial_registers[15]);
    uint16_t data = SIZED(0, kernel_is_64() ? 0x2b : 0x7b), code = SIZED(0x33, kernel_is_64() ? 0x23 : 0x73);
    uint16_t stack = kernel_is_64() ? 0x2b : 0x7b;
    check(initial_registers[16] == data && initial_registers[17] == data, "DS and ES are %x %x",
        (unsigned)initial_registers[16], (unsigned)initial_registers[17]);
    check(initial_registers[18] == 0 && initial_registers[19] == 0, "FS and GS are null");
    check(initial_registers[20] == stack && initial_registers[21] == code, "SS and CS are %x %x",
        (unsigned)initial_registers[20], (unsigned)initial_registers[21]);
    uint32_t environment[7], mxcsr = initial_registers[26];
    memcpy(environment, (void *)&initial_registers[22], sizeof environment);
    check((environment[0] & 0xffff) == 0x37f && !(environment[1] & 0xffff) && (environment[2] & 0xffff) == 0xffff,
        "x87 is fresh");
    check(mxcsr == 0x1f80 && !initial_registers[27] && !initial_registers[28],
        "SSE is fresh");
}
