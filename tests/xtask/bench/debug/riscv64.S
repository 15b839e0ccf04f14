/* Where QEMU's virt board and mimus's begin without firmware; the test device turns them off. */
    .section .text.start
    .globl _start
_start:
    la sp, stack_top
    call begin
    .text
    .globl turn_off
turn_off:
    li t0, 0x100000
    li t1, 0x5555
    sw t1, 0(t0)
1:  j 1b
    .section .note.GNU-stack, "", @progbits
