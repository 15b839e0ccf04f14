//! `mimus debug`: our own debugger, with guests of a few instructions.

use crate::harness::{Dir, Mimus};

/// Stores '!' and '?' to the virt board's serial port, then turns it off at the test device.
const PROGRAM: [u32; 10] = [
    0x1000_02b7, // lui  t0, 0x10000
    0x0210_0313, // li   t1, '!'
    0x0062_8023, // sb   t1, 0(t0)
    0x03f0_0313, // li   t1, '?'
    0x0062_8023, // sb   t1, 0(t0)
    0x0010_02b7, // lui  t0, 0x100
    0x0000_5337, // lui  t1, 0x5
    0x5553_0313, // addi t1, t1, 0x555
    0x0062_a023, // sw   t1, 0(t0)
    0x0000_006f, // j    .
];

#[test]
fn events_are_caught_and_steps_have_kinds() {
    let dir = Dir::new("events_are_caught");
    let image = dir.path("program");
    let mut bytes = PROGRAM.map(u32::to_le_bytes).concat();
    // No less than a kernel's header.
    bytes.resize(4096, 0);
    std::fs::write(&image, bytes).unwrap();
    let machine = ["-M", "virt", "-m", "64M", "-bios", "none", "-serial", "none", "-kernel", &image];
    let mut guest = Mimus::start(&[&["debug", "riscv64", "-accel", "tcg"][..], &machine].concat());
    guest.wait_for("=> 0000000000001000");
    guest.send("catch device 0x10000000-0x100000ff w if $_value == 0x3f\n");
    guest.wait_for("1: catch device");
    guest.send("continue\n");
    guest.wait_for("vCPU 0: the device at 0x10000000 was written: 0x3f");
    guest.wait_for("=> 0000000080000014");
    guest.send("info breakpoints\n");
    guest.wait_for("hit 1 times");
    guest.send("info jumps\n");
    guest.wait_for("0000000080000000");
    // From there to the jump to itself there is no other.
    guest.send("set [0x80000020] = 0x0000006f00000013\n");
    guest.send("step branch\n");
    guest.wait_for("=> 0000000080000024");
    guest.send("catch mode real\n");
    guest.wait_for("user, supervisor, machine");
    guest.send("quit\n");
    guest.end_well();
}

#[cfg(target_arch = "x86_64")]
#[test]
fn ports_and_modes_of_a_pc() {
    let dir = Dir::new("ports_and_modes");
    let rom = dir.path("rom");
    let mut bytes = vec![0xf4; 0x1_0000];
    // mov al, 'x'; mov dx, 0x3f8; out dx, al; mov eax, cr0; or al, 1; mov cr0, eax; jmp $
    let code = [0xb0, b'x', 0xba, 0xf8, 0x03, 0xee, 0x0f, 0x20, 0xc0, 0x0c, 1, 0x0f, 0x22, 0xc0, 0xeb, 0xfe];
    bytes[..code.len()].copy_from_slice(&code);
    // jmp far 0xf000:0
    bytes[0xfff0..0xfff5].copy_from_slice(&[0xea, 0, 0, 0x00, 0xf0]);
    std::fs::write(&rom, bytes).unwrap();
    let machine = ["-M", "pc", "-m", "16M", "-nic", "none", "-serial", "none", "-bios", &rom];
    let mut guest = Mimus::start(&[&["debug", "x86_64", "-accel", "tcg"][..], &machine].concat());
    // The address, not the offset in a segment.
    guest.wait_for("=> 00000000fffffff0");
    guest.wait_for("jmp");
    guest.send("catch port 0x3f8 w\ncatch mode protected\ncatch msr efer\nstep branch\n");
    guest.wait_for("=> 00000000000f0000");
    guest.send("continue\n");
    guest.wait_for("port 0x3f8 was written: 0x78");
    guest.wait_for("=> 00000000000f0006");
    guest.send("continue\n");
    guest.wait_for("from mode real CPL 0 to protected CPL 0");
    guest.wait_for("=> 00000000000f000e");
    guest.send("delete\nstep 1000 branch\n");
    guest.wait_for("=> 00000000000f000e");
    guest.send("quit\n");
    guest.end_well();
}
