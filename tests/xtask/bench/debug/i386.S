/* Entered in protected mode by the PVH protocol; goes on with the first GiB mapped as it is, in pages of 4 MiB. */
    .section .note.pvh, "a", @note
    .long 4, 4, 18
    .asciz "Xen"
    .long _start

    .section .text.start, "ax"
    .globl _start
_start:
    movl $pd, %edi
    movl $0x83, %eax
1:  movl %eax, (%edi)
    addl $0x400000, %eax
    addl $4, %edi
    cmpl $0x40000083, %eax
    jb 1b
    movl $pd, %eax
    movl %eax, %cr3
    movl $0x10, %eax
    movl %eax, %cr4
    movl %cr0, %eax
    orl $0x80000000, %eax
    movl %eax, %cr0
    movl $stack_top, %esp
    call begin
    .text
    .globl turn_off
turn_off:
    movw $0xf4, %dx
    xorl %eax, %eax
    outl %eax, %dx
2:  hlt
    jmp 2b

    .bss
    .balign 4096
pd: .skip 4096
    .section .note.GNU-stack, "", @progbits
