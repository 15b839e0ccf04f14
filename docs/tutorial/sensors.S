# A kernel for RISC-V's virt board with three drivers - and a bug. The page beside it finds it: ../tutorial-debugging.md
#
#   riscv64-linux-gnu-as -g -o sensors.o sensors.S
#   riscv64-linux-gnu-ld -N -Ttext=0x80000000 -o sensors sensors.o

        .option norelax
        .equ    UART, 0x10000000        # 16550: transmit register
        .equ    POWER, 0x100000         # writing 0x5555 powers the machine off
        .equ    NAME, 8                 # a sensor: 8 bytes of name, then the address of its driver

        .text
        .globl  _start
_start:
        la      sp, stack_top
        la      t0, trap
        csrw    mtvec, t0
        la      a0, name_light
        la      a1, read_light
        call    register_sensor
        la      a0, name_noise
        la      a1, read_noise
        call    register_sensor
        la      a0, name_pressure
        la      a1, read_pressure
        call    register_sensor
        call    poll
        la      a0, text_done
        call    print
        li      t0, POWER
        li      t1, 0x5555
        sw      t1, 0(t0)
1:      wfi
        j       1b

# a0: name, a1: driver
register_sensor:
        addi    sp, sp, -16
        sd      ra, 0(sp)
        la      t0, count
        ld      t1, 0(t0)
        addi    t2, t1, 1
        sd      t2, 0(t0)
        slli    t1, t1, 4
        la      t0, sensors
        add     t0, t0, t1
        sd      a1, NAME(t0)            # the driver
        mv      a1, a0
        mv      a0, t0
        call    copy_string             # the name
        ld      ra, 0(sp)
        addi    sp, sp, 16
        ret

# a0: to, a1: from
copy_string:
        lbu     t0, 0(a1)
        sb      t0, 0(a0)
        addi    a0, a0, 1
        addi    a1, a1, 1
        bnez    t0, copy_string
        ret

# Prints what each sensor measures.
poll:
        addi    sp, sp, -32
        sd      ra, 0(sp)
        sd      s0, 8(sp)
        sd      s1, 16(sp)
        la      s0, sensors
        la      t0, count
        ld      s1, 0(t0)
1:      mv      a0, s0
        call    print
        la      a0, text_is
        call    print
        ld      t0, NAME(s0)
        jalr    t0
        call    print
        addi    s0, s0, 16
        addi    s1, s1, -1
        bnez    s1, 1b
        ld      ra, 0(sp)
        ld      s0, 8(sp)
        ld      s1, 16(sp)
        addi    sp, sp, 32
        ret

# a0: text
print:
        li      t1, UART
1:      lbu     t0, 0(a0)
        beqz    t0, 2f
        sb      t0, 0(t1)
        addi    a0, a0, 1
        j       1b
2:      ret

# An exception: the end.
        .balign 4
trap:
        la      a0, text_trap
        call    print
1:      wfi
        j       1b

# The drivers.
        .balign 256
        .word   0, 0, 0, 0              # no instruction
read_pressure:
        la      a0, text_pressure
        ret
read_light:
        la      a0, text_light
        ret
read_noise:
        la      a0, text_noise
        ret

        .data
name_light:     .asciz "light"
name_noise:     .asciz "noise"
name_pressure:  .asciz "pressure"
text_is:        .asciz " is "
text_light:     .asciz "dim\n"
text_noise:     .asciz "low\n"
text_pressure:  .asciz "1013\n"
text_done:      .asciz "all sensors read\n"
text_trap:      .asciz "trap!\n"
        .balign 16
count:          .dword 0
        .balign 16
sensors:        .skip 3 * 16
        .balign 16
stack:          .skip 1024
stack_top:
