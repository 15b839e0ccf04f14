/* A loop whose outcome depends on every register it has, and the addresses of its instructions. */
#ifdef __x86_64__
#define WORD .quad
#else
#define WORD .long
#endif

/* An instruction whose address goes into the list. */
.macro i insn:vararg
7777: \insn
    .pushsection .data
    WORD 7777b
    .popsection
.endm

#ifdef __x86_64__
/* rdi: struct work, see loops.c. */
.macro spin name, avx
    .pushsection .data
    .globl \name\()_steps
\name\()_steps:
    .popsection
    .globl \name
\name:
    push %rbx
    push %rbp
    push %r12
    push %r13
    push %r14
    push %r15
    mov %rdi, %rbp
    fninit
    fldcw 8(%rbp)
    ldmxcsr 12(%rbp)
    fld1
    fldpi
    movups 64(%rbp), %xmm0
    movups 80(%rbp), %xmm1
    movups 64(%rbp), %xmm15
    .if \avx
    vmovdqu 64(%rbp), %ymm2
    vmovdqu 96(%rbp), %ymm3
    vmovdqu 64(%rbp), %ymm14
    .endif
    mov $1, %eax
    mov $2, %ebx
    mov $3, %ecx
    mov $4, %edx
    mov $5, %r8d
    mov $6, %r9d
    mov $7, %r10d
    mov $8, %r11d
    mov $9, %r13d
    mov $10, %r14d
    mov (%rbp), %r15d
    .globl \name\()_top
\name\()_top:
    i imul $0x343fd, %rax, %rax
    i add $0x269ec3, %rax
    i lea 3(%rax,%rbx,2), %rbx
    i add %rax, %rcx
    i adc %rbx, %rdx
    i sbb $7, %r8
    i rorl $5, %r9d
    i xor %rdx, %r9
    i add %r9, %r10
    i rcl $1, %r11
    i push %r10
    i pop %r12
    i shld $3, %r12, %r13
    i seto %r14b
    i paddq %xmm1, %xmm0
    i pshufd $0x39, %xmm0, %xmm1
    i cvtsi2sd %rax, %xmm4
    i divsd 64(%rbp), %xmm4
    i pxor %xmm4, %xmm15
    .if \avx
    i vpaddq %ymm2, %ymm3, %ymm3
    i vpermq $0x93, %ymm3, %ymm2
    i vpxor %ymm3, %ymm14, %ymm14
    .endif
    i fadd %st(1), %st
    i fxch %st(1)
    i fld %st(0)
    i fdivs 72(%rbp)
    i fstps 48(%rbp)
    i xor 48(%rbp), %r13d
    i bswap %r14
    i lock xadd %r14, 56(%rbp)
    i lea 64(%rbp), %rsi
    i lea 192(%rbp), %rdi
    i mov %ecx, 40(%rbp)
    i mov $5, %ecx
    i rep movsb
    i mov 40(%rbp), %ecx
    i pushf
    i xor %rbx, (%rsp)
    i andq $0x8d5, (%rsp)
    i add %r12, (%rsp)
    i pop %r12
    i xor %r12, %rax
    i dec %r15d
    i jnz \name\()_top
    .globl \name\()_end
\name\()_end:
    i nop
    mov %rax, 256(%rbp)
    mov %rbx, 264(%rbp)
    mov %rcx, 272(%rbp)
    mov %rdx, 280(%rbp)
    mov %r8, 288(%rbp)
    mov %r9, 296(%rbp)
    mov %r10, 304(%rbp)
    mov %r11, 312(%rbp)
    mov %r12, 320(%rbp)
    mov %r13, 328(%rbp)
    mov %r14, 336(%rbp)
    mov 56(%rbp), %rax
    mov %rax, 344(%rbp)
    fstpt 352(%rbp)
    fstpt 368(%rbp)
    movups %xmm0, 384(%rbp)
    movups %xmm1, 400(%rbp)
    movups %xmm15, 416(%rbp)
    .if \avx
    vmovdqu %ymm2, 432(%rbp)
    vmovdqu %ymm3, 464(%rbp)
    vmovdqu %ymm14, 496(%rbp)
    vzeroupper
    .endif
    fninit
    movl $0x1f80, 48(%rbp)
    ldmxcsr 48(%rbp)
    pop %r15
    pop %r14
    pop %r13
    pop %r12
    pop %rbp
    pop %rbx
    ret
    .pushsection .data
    WORD 0
    .popsection
.endm
#else
.macro spin name, avx
    .pushsection .data
    .globl \name\()_steps
\name\()_steps:
    .popsection
    .globl \name
\name:
    push %ebx
    push %ebp
    push %esi
    push %edi
    mov 20(%esp), %ebp
    fninit
    fldcw 8(%ebp)
    ldmxcsr 12(%ebp)
    fld1
    fldpi
    movups 64(%ebp), %xmm0
    movups 80(%ebp), %xmm1
    movups 64(%ebp), %xmm7
    .if \avx
    vmovdqu 64(%ebp), %ymm2
    vmovdqu 96(%ebp), %ymm3
    vmovdqu 64(%ebp), %ymm6
    .endif
    mov $1, %eax
    mov $2, %ebx
    mov $3, %ecx
    mov $4, %edx
    mov $5, %esi
    mov $6, %edi
    .globl \name\()_top
\name\()_top:
    i imul $0x343fd, %eax, %eax
    i add $0x269ec3, %eax
    i lea 3(%eax,%ebx,2), %ebx
    i add %eax, %ecx
    i adc %ebx, %edx
    i sbb $7, %esi
    i ror $5, %edi
    i xor %edx, %edi
    i add %edi, %esi
    i rcl $1, %edx
    i push %esi
    i pop %eax
    i shld $3, %ebx, %eax
    i seto %bh
    i paddq %xmm1, %xmm0
    i pshufd $0x39, %xmm0, %xmm1
    i cvtsi2sd %eax, %xmm4
    i divsd 64(%ebp), %xmm4
    i pxor %xmm4, %xmm7
    .if \avx
    i vpaddq %ymm2, %ymm3, %ymm3
    i vpermq $0x93, %ymm3, %ymm2
    i vpxor %ymm3, %ymm6, %ymm6
    .endif
    i fadd %st(1), %st
    i fxch %st(1)
    i fld %st(0)
    i fdivs 72(%ebp)
    i fstps 48(%ebp)
    i xor 48(%ebp), %ebx
    i bswap %ebx
    i lock xadd %ebx, 56(%ebp)
    i pusha
    i lea 64(%ebp), %esi
    i lea 192(%ebp), %edi
    i mov $5, %ecx
    i rep movsb
    i popa
    i pushf
    i xor %ebx, (%esp)
    i andl $0x8d5, (%esp)
    i add %eax, (%esp)
    i pop %eax
    i decl (%ebp)
    i jnz \name\()_top
    .globl \name\()_end
\name\()_end:
    i nop
    mov %eax, 256(%ebp)
    mov %ebx, 264(%ebp)
    mov %ecx, 272(%ebp)
    mov %edx, 280(%ebp)
    mov %esi, 288(%ebp)
    mov %edi, 296(%ebp)
    fstpt 352(%ebp)
    fstpt 368(%ebp)
    movups %xmm0, 384(%ebp)
    movups %xmm1, 400(%ebp)
    movups %xmm7, 416(%ebp)
    .if \avx
    vmovdqu %ymm2, 432(%ebp)
    vmovdqu %ymm3, 464(%ebp)
    vmovdqu %ymm6, 496(%ebp)
    vzeroupper
    .endif
    fninit
    movl $0x1f80, 48(%ebp)
    ldmxcsr 48(%ebp)
    pop %edi
    pop %esi
    pop %ebp
    pop %ebx
    ret
    .pushsection .data
    WORD 0
    .popsection
.endm
#endif

    .text
    spin spin_sse, 0
    spin spin_avx, 1

/* Spoils every register that a signal handler's return must bring back. */
    .globl spoil_sse
spoil_sse:
    fninit
    fldz
    fldl2e
    fldz
    pcmpeqd %xmm0, %xmm0
    pcmpeqd %xmm1, %xmm1
    pcmpeqd %xmm4, %xmm4
    pcmpeqd %xmm7, %xmm7
#ifdef __x86_64__
    pcmpeqd %xmm15, %xmm15
#endif
    ret
    .globl spoil_avx
spoil_avx:
    vpcmpeqd %ymm0, %ymm0, %ymm0
    vpcmpeqd %ymm1, %ymm1, %ymm1
    vpcmpeqd %ymm2, %ymm2, %ymm2
    vpcmpeqd %ymm3, %ymm3, %ymm3
    vpcmpeqd %ymm6, %ymm6, %ymm6
#ifdef __x86_64__
    vpcmpeqd %ymm14, %ymm14, %ymm14
    vpcmpeqd %ymm15, %ymm15, %ymm15
#endif
    ret
    .section .note.GNU-stack, "", @progbits
