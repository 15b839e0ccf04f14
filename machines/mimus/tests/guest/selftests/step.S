/* Instructions of every class, which another process steps through. The list has of each its address, how many steps
 * it is (100 more where the step ends in a signal that the stepper takes back), and its length; zero ends it. */
#ifdef __x86_64__
#define WORD .quad
#define AX rax
#define BX rbx
#define CX rcx
#define DX rdx
#define SI rsi
#define DI rdi
#define BP rbp
#define SP rsp
#else
#define WORD .long
#define AX eax
#define BX ebx
#define CX ecx
#define DX edx
#define SI esi
#define DI edi
#define BP ebp
#define SP esp
#endif
#define R(name) %name

    .data
    .globl step_list
step_list:
    .text
/* An instruction that is `times` steps; its length says where a fault is resumed. */
.macro n times, insn:vararg
7777: \insn
7778:
    .pushsection .data
    WORD 7777b, \times, 7778b - 7777b
    .popsection
.endm
.macro i insn:vararg
    n 1, \insn
.endm
/* One that faults: a step that ends in a signal. */
.macro f insn:vararg
    n 101, \insn
.endm

    .globl step_code, step_avx, step_end, step_area
step_code:
    /* Moves and arithmetic. */
    i mov $0x12345678, %eax
    i mov $step_area, R(SI)
    i xor %ebx, %ebx
    i lea 5(R(AX),R(AX)), R(CX)
    i add R(CX), R(BX)
    i adc $3, R(BX)
    i sub (R(SI)), R(BX)
    i sbb R(AX), 8(R(SI))
    i and $0xff, %cl
    i or %ah, %bl
    i xor $-1, R(DX)
    i cmp R(AX), R(BX)
    i test %al, %al
    i inc %bh
    i decl 16(R(SI))
    i neg R(CX)
    i not R(CX)
    i imul $77, R(BX), R(DX)
    i mul %ebx
    i imull 8(R(SI))
    i mov $0, %edx
    i mov $1000003, %eax
    i mov $37, %ecx
    i div %ecx
    i cltd
    i idiv %ecx
    i cwtl
    i movzbl %bl, %edx
    i movswl %bx, %edx
    i shl $3, R(DX)
    i sar %cl, R(BX)
    i rol $9, %bx
    i rcr $1, R(BX)
    i shrd $5, R(AX), R(BX)
    i bt $3, R(BX)
    i bts R(CX), 32(R(SI))
    i btr $2, R(BX)
    i bsf R(BX), R(DX)
    i bsr R(BX), R(DX)
    i bswap %edx
    i xchg %dl, %dh
    i xchg R(DX), 24(R(SI))
    i lock xadd R(DX), 24(R(SI))
    i lock cmpxchg R(BX), 24(R(SI))
    i lock incl 24(R(SI))
    i cmpxchg8b 24(R(SI))
    i sete %al
    i cmovc R(BX), R(AX)
    i lahf
    i sahf
    i stc
    i cmc
    i clc
    i std
    i cld
    i nop
    i pause
    i nopl 8(R(AX))
    i prefetcht0 (R(SI))
    i mov $step_area, R(BX)
    i xlat
    /* The stack. */
    i push R(BX)
    i push $-3
    i pop R(DX)
    i pop R(BX)
    i pushf
    i pop R(AX)
    i pushw $5
    i popw %ax
    i enter $32, $0
    i leave
    /* Jumps. */
    i jmp 1f
    i nop
1:  i cmp %eax, %eax
    i je 1f
    i nop
1:  i jne 1f
1:  i call 2f
    i jmp 3f
2:  i nop
    i ret
3:  i mov $4f, R(AX)
    i jmp *R(AX)
    i nop
4:  i mov $3, %ecx
5:  i nop
    i loop 5b
    i jecxz 6f
    i nop
6:  i nop
    /* Strings: each repetition is a step. */
    i mov $step_area + 512, R(DI)
    i mov $3, %ecx
    n 3, rep movsb
    n 1, rep movsb
    i mov $4, %ecx
    n 4, rep stosl
    i lodsb
    i scasb
    i mov $step_area, R(SI)
    i mov $step_area, R(DI)
    i mov $5, %ecx
    n 5, repe cmpsb
    i mov $2, %ecx
    n 2, rep lodsw
    i mov $step_area, R(SI)
    /* Flags and segments: POPF; after a load of SS nothing traps. */
    i pushf
    i popf
    i mov %ss, %eax
    n 0, mov %eax, %ss
    i nop
    i mov %ds, %ecx
    i mov %ecx, %ds
#ifndef __x86_64__
    i push %ss
    n 0, pop %ss
    i nop
    i pusha
    i popa
    i mov $0x19, %al
    i daa
    i aaa
    i aam
    i aad
    i cmp $9, %al
    i das
    i cmp $9, %al
    i arpl %ax, %bx
    i movl $0, 48(%esi)
    i movl $4096, 52(%esi)
    i bound %ecx, 48(%esi)
    f bound %esi, 48(%esi)
    i .byte 0xd6
    i test %al, %al
    i into
    i mov $0x7f, %al
    i add $1, %al
    f into
    i pushf
    i push %cs
    i push $1f
    i iret
    i nop
1:  i nop
    i push %cs
    i push $1f
    i lret
1:  i nop
#else
    i mov %ss, %ecx
    i mov %rsp, %rdx
    i push %rcx
    i push %rdx
    i pushf
    i mov %cs, %ecx
    i push %rcx
    i push $1f
    i iretq
    i nop
1:  i nop
    i push %rcx
    i push $1f
    i lretq
    i nop
1:  i movabs $0x123456789abcdef0, %r10
    i movslq %r10d, %r11
    i xor %r10, %r15
    i mov step_area(%rip), %r9
    i lock cmpxchg16b 64(%rsi)
    i cqto
    i cmpsq
    i mov $step_area, %esi
#endif
    i lsl %ecx, %eax
    i lar %ecx, %eax
    i verr %cx
    i verw %cx
    i mov $0, %eax
    i cpuid
    i mov $0, %eax
    i mov $0, %ebx
    i mov $0, %ecx
    i mov $0, %edx
    i rdtsc
    i mov $0, %eax
    i mov $0, %edx
    /* The kernel. */
    i mov $20, %eax
    i int $0x80
    i mov $0, %eax
    f int3
#ifdef __x86_64__
    i mov $39, %eax
    i syscall
    i mov $0, %eax
    i mov $0, %ecx
#endif
    /* Faults. */
    f ud2
    f hlt
    f cli
    f in $0x80, %al
    f mov %cr0, R(AX)
    f int $0x40
    f mov 0x10, %eax
    f mov $-1, %eax
    i mov $0, %ecx
    f div %ecx
    f .byte 0xf0, 0x90
    /* x87. */
    i fninit
    i fld1
    i fldpi
    i fadd %st(1), %st
    i fmul %st(1), %st
    i fsqrt
    i fsin
    i fxch
    i fistl 80(R(SI))
    i fstpl 88(R(SI))
    i fldl 88(R(SI))
    i fcomi %st(1), %st
    i fcmovb %st(1), %st
    i fnstsw %ax
    i fnstenv 128(R(SI))
    i fldenv 128(R(SI))
    i fnsave 128(R(SI))
    i frstor 128(R(SI))
    i movw $0x37b, 80(R(SI))
    i fldcw 80(R(SI))
    i fldz
    i fdivr %st(1), %st
    f fwait
    i fnclex
    i fninit
    /* MMX, SSE. */
    i movd %eax, %mm0
    i paddw %mm0, %mm0
    i emms
    i movups (R(SI)), %xmm0
    i movaps %xmm0, %xmm1
    i paddd %xmm1, %xmm0
    i pmulhuw %xmm1, %xmm0
    i cvtdq2pd %xmm0, %xmm2
    i addpd %xmm2, %xmm2
    i sqrtsd %xmm2, %xmm3
    i ucomisd %xmm2, %xmm3
    i cvttsd2si %xmm2, %eax
    i movmskps %xmm0, %eax
    i stmxcsr 80(R(SI))
    i ldmxcsr 80(R(SI))
    i movntdq %xmm0, 96(R(SI))
    f movaps 1(R(SI)), %xmm0
    i maskmovdqu %xmm0, %xmm1
    i fxsave 128(R(SI))
    i fxrstor 128(R(SI))
    i mfence
    i clflush (R(SI))
    .globl step_end
step_end:
    nop
    jmp step_end
    .data
    WORD 0

    .globl step_list_avx
step_list_avx:
    .text
step_avx:
    i mov $step_area, R(SI)
    i mov $step_area + 256, R(DI)
    i vmovdqu (R(SI)), %ymm0
    i vpaddd %ymm0, %ymm0, %ymm1
    i vpermq $0x1b, %ymm1, %ymm2
    i vextracti128 $1, %ymm2, %xmm3
    i vbroadcastss (R(SI)), %ymm4
    i vpcmpeqd %ymm5, %ymm5, %ymm5
    i vpxor %ymm7, %ymm7, %ymm7
    i vgatherdps %ymm5, (R(SI),%ymm7,4), %ymm6
    i vmaskmovps (R(SI)), %ymm5, %ymm2
    i vfmadd213ps %ymm1, %ymm0, %ymm2
    i mov $0x0f0f, %eax
    i pext %eax, %eax, %ebx
    i andn %eax, %ebx, %ecx
    i mulx %eax, %ebx, %ecx
    i popcnt %eax, %ecx
    i lzcnt %eax, %ecx
    i tzcnt %eax, %ecx
    i movbe (R(SI)), %eax
    i pcmpistri $0, (R(SI)), %xmm0
    i ptest %xmm0, %xmm1
    i crc32b %al, %ecx
    i mov $7, %eax
    i mov $0, %edx
    i xsave (R(DI))
    i xrstor (R(DI))
    i vzeroall
    .globl step_avx_end
step_avx_end:
    nop
    jmp step_avx_end
    .data
    WORD 0
    .balign 64
step_area:
    .zero 4096
    .section .note.GNU-stack, "", @progbits
