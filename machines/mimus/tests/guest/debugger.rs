//! `mimus debug`: our own debugger, with guests of a few instructions.

use crate::harness::{Dir, Mimus, skipped};

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

/// From real mode to 64-bit code with page tables of its own at 0x1000, then two writes to a serial port, a call deep, and
/// one to where nothing is mapped, without an IDT: a triple fault.
#[cfg(target_arch = "x86_64")]
const TO_LONG_MODE: &[u8] = &[
    0xfa, 0x31, 0xc0, 0x8e, 0xd8, 0x8e, 0xc0, 0xbf, 0x00, 0x10, 0xb9, 0x00, 0x20, 0xfc, 0xf3, 0xab, 0xc7, 0x06, 0x00,
    0x10, 0x03, 0x20, 0xc7, 0x06, 0x00, 0x20, 0x03, 0x30, 0xc7, 0x06, 0x00, 0x30, 0x03, 0x40, 0xc7, 0x06, 0x08, 0x30,
    0xe3, 0x00, 0xc7, 0x06, 0x0a, 0x30, 0x20, 0x00, 0xc7, 0x06, 0x38, 0x40, 0x03, 0x70, 0xc7, 0x06, 0x80, 0x47, 0x03,
    0x00, 0xc7, 0x06, 0x82, 0x47, 0x0f, 0x00, 0x2e, 0x66, 0x0f, 0x01, 0x16, 0x7f, 0x00, 0x0f, 0x20, 0xe0, 0x66, 0x83,
    0xc8, 0x20, 0x0f, 0x22, 0xe0, 0x66, 0xb8, 0x00, 0x10, 0x00, 0x00, 0x0f, 0x22, 0xd8, 0x66, 0xb9, 0x80, 0x00, 0x00,
    0xc0, 0x66, 0x31, 0xd2, 0x66, 0xb8, 0x00, 0x01, 0x00, 0x00, 0x0f, 0x30, 0x0f, 0x20, 0xc0, 0x66, 0x0d, 0x01, 0x00,
    0x00, 0x80, 0x0f, 0x22, 0xc0, 0x66, 0xea, 0xa0, 0x00, 0x0f, 0x00, 0x08, 0x00, 0x17, 0x00, 0x88, 0x00, 0x0f, 0x00,
    0x90, 0x90, 0x90, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x9b, 0x20, 0x00,
    0x00, 0x00, 0x00, 0x00, 0x00, 0x93, 0x00, 0x00, 0x66, 0xb8, 0x10, 0x00, 0x8e, 0xd0, 0x8e, 0xd8, 0xbc, 0x00, 0x80,
    0x00, 0x00, 0xb0, 0x4c, 0x66, 0xba, 0xf8, 0x03, 0xee, 0xe8, 0x02, 0x00, 0x00, 0x00, 0xeb, 0xfe, 0x53, 0xb8, 0x78,
    0x56, 0x34, 0x12, 0xb0, 0x46, 0xee, 0x48, 0x89, 0x04, 0x25, 0x00, 0x00, 0x60, 0x00, 0xc3,
];

/// The same program, views and report under an accelerator.
#[cfg(target_arch = "x86_64")]
fn long_mode(test: &str, accel: &str) {
    let dir = Dir::new(test);
    let rom = dir.path("rom");
    let mut bytes = vec![0xf4; 0x1_0000];
    bytes[..TO_LONG_MODE.len()].copy_from_slice(TO_LONG_MODE);
    bytes[0xfff0..0xfff5].copy_from_slice(&[0xea, 0, 0, 0x00, 0xf0]);
    std::fs::write(&rom, bytes).unwrap();
    let machine = ["-M", "pc", "-m", "16M", "-nic", "none", "-serial", "none", "-no-reboot", "-bios", &rom];
    let mut guest = Mimus::start(&[&["debug", "x86_64", "-accel", accel][..], &machine].concat());
    guest.wait_for("=> 00000000fffffff0");
    let ask = |guest: &mut Mimus, command: &str, says: &[&str]| {
        guest.send(&format!("{command}\n"));
        says.iter().for_each(|text| _ = guest.wait_for(text));
    };
    ask(&mut guest, "registers", &["real-address mode, 16-bit code, CPL 0", "cs f000 base 00000000ffff0000"]);
    ask(&mut guest, "walk 0x1000", &["paging is off"]);
    ask(&mut guest, "catch port 0x3f8 w if $_value == 'L'", &["1: catch port"]);
    ask(&mut guest, "continue", &["vCPU 0: port 0x3f8 was written: 0x4c", "=> 00000000000f00b4"]);
    ask(
        &mut guest,
        "registers",
        &["64-bit mode, 64-bit code, CPL 0", "cr0: PG CD NW ET PE", "efer: LMA LME", "64-bit code readable"],
    );
    let walk = [
        "4-level paging",
        "level 3 entry at 0x1000",
        "table at 0x2000 P R/W A",
        "level 1 entry at 0x3008",
        " P R/W A D PS",
    ];
    ask(&mut guest, "walk 0x234567", &[&walk[..], &["0x234567 is physical 0x234567, in a page of 2048 KiB"]].concat());
    ask(&mut guest, "walk 0x600000", &["level 1 entry at 0x3018", "faults: the entry of level 1 is not present"]);
    ask(
        &mut guest,
        "info mem",
        &[
            "0000000000007000-0000000000007fff          4 KiB rwx",
            "0000000000200000-00000000003fffff       2048 KiB rwx",
        ],
    );
    ask(&mut guest, "info mem 0x200000 0x200000", &["4-level paging\n0000000000200000-"]);
    ask(&mut guest, "info irqchip", &["the other 24 are masked"]);
    ask(&mut guest, "info lapic", &["LVT Timer"]);
    ask(&mut guest, "info pci", &["host bridge [0600] 8086:1237"]);
    ask(&mut guest, "info device rtc", &["/machine/rtc (mc146818)"]);
    ask(&mut guest, "info mtree", &["ram    ram"]);
    // Four instructions: call, push, mov, mov.
    ask(&mut guest, "step 4", &["=> 00000000000f00c3"]);
    ask(&mut guest, "x/2xg $rsp", &["0000000000000000 00000000000f00b9"]);
    if accel == "kvm" {
        ask(&mut guest, "catch msr efer", &["use -accel tcg"]);
        ask(&mut guest, "info tlb", &["-accel tcg does"]);
    }
    ask(&mut guest, "continue", &["---- vCPU 0 ----", "=> 00000000000f00c4", "what to try:"]);
    if accel == "tcg" {
        guest.wait_for("exception 14 #PF came before the double fault");
    } else {
        guest.wait_for("CR2: the last page fault was at 0x600000");
    }
    guest.end();
    assert!(!guest.transcript().contains("did not finish"), "{}", guest.transcript());
}

#[cfg(target_arch = "x86_64")]
#[test]
fn long_mode_under_the_translator() {
    long_mode("debugger-long-mode-tcg", "tcg");
}

#[cfg(target_arch = "x86_64")]
#[test]
fn long_mode_under_kvm() {
    if let Err(e) = mimus_accel_kvm::Quirks::of_host() {
        return skipped("long_mode_under_kvm", &format!("/dev/kvm: {e}"));
    }
    long_mode("debugger-long-mode-kvm", "kvm");
}

/// A guest that tells of its panic gets a report.
#[cfg(target_arch = "x86_64")]
#[test]
fn a_panic_is_reported() {
    let dir = Dir::new("a_panic_is_reported");
    let rom = dir.path("rom");
    let mut bytes = vec![0xf4; 0x1_0000];
    // mov dx, 0x505; mov al, 1; out dx, al
    bytes[..6].copy_from_slice(&[0xba, 0x05, 0x05, 0xb0, 0x01, 0xee]);
    bytes[0xfff0..0xfff5].copy_from_slice(&[0xea, 0, 0, 0x00, 0xf0]);
    std::fs::write(&rom, bytes).unwrap();
    let machine = ["-M", "pc", "-m", "16M", "-nic", "none", "-display", "none", "-serial", "none", "-monitor", "none"];
    let args = [&["system", "x86_64", "-accel", "tcg"], &machine[..], &["-device", "pvpanic", "-bios", &rom]].concat();
    let mut guest = Mimus::start(&args);
    assert_eq!(guest.end().code(), Some(1));
    let said = guest.transcript();
    for text in ["---- vCPU 0 ----", "real-address mode", "eip 00000006", "what to try:", "the guest crashed"] {
        assert!(said.contains(text), "{text}: {said}");
    }
}
