//! `pc` and `q35`: chipset, PCI, power, firmware.

use std::time::{Duration, Instant};

use mimus_core::accel::VcpuIndex;
use mimus_core::arch::StateGroups;
use mimus_machines::config::Bios;
use mimus_machines::machine::{Request, RunEnd, RunState};

use crate::harness::{Pc, Setup, acpi_tables, bzimage, number};

const BOARDS: [&str; 2] = ["pc", "q35"];

fn start(board: &str) -> Pc {
    Setup::new(board).kernel(&bzimage()).device("virtio-rng-pci,addr=5").start()
}

fn config(pc: &Pc, function: u32, register: u32) -> u32 {
    pc.output(0xcf8, 4, (0x8000_0000 | function << 8 | register).into());
    pc.input(0xcfc, 4) as u32
}

fn set_config(pc: &Pc, function: u32, register: u32, value: u32) {
    pc.output(0xcf8, 4, (0x8000_0000 | function << 8 | register).into());
    pc.output(0xcfc, 4, value.into());
}

const SLOT5: u32 = 5 << 3;

#[test]
fn chips_are_where_firmware_looks() {
    for board in BOARDS {
        let pc = start(board);
        let (host, bridge) =
            if board == "q35" { (0x29c0_8086, (31 << 3, 0x2918_8086)) } else { (0x1237_8086, (1 << 3, 0x7000_8086)) };
        assert_eq!(config(&pc, 0, 0), host, "{board}");
        assert_eq!(config(&pc, bridge.0, 0), bridge.1, "{board}");
        assert_eq!(config(&pc, SLOT5, 0), 0x1044_1af4, "{board}");
        assert_eq!(config(&pc, 20 << 3, 0), u32::MAX, "{board}");
        if board == "q35" {
            assert_eq!(pc.load(0xb000_0000, 4), u64::from(host));
            assert_eq!(pc.load(0xb000_0000 + (5 << 15), 4), 0x1044_1af4);
        }
        // HPET capabilities; keyboard controller's self-test; POST port; a RTC.
        assert_eq!(pc.load(0xfed0_0000, 4) as u32 >> 16, 0x8086, "{board}");
        pc.outb(0x64, 0xaa);
        assert_eq!(pc.inb(0x60), 0x55, "{board}");
        pc.outb(0x80, 0x42);
        pc.outb(0x70, 0x32);
        assert_eq!(pc.inb(0x71), 0x20, "{board}");
    }
}

/// What firmware would do: addresses for BARs in the window, decoding, interrupt lines.
#[test]
fn without_firmware_pci_is_set_up() {
    for board in BOARDS {
        let pc = start(board);
        let command = config(&pc, SLOT5, 4);
        assert_eq!(command & 2, 2, "{board}: memory is decoded");
        let (mut at, mut found) = (0x10, 0);
        while at < 0x28 {
            let bar = u64::from(config(&pc, SLOT5, at));
            let wide = bar & 6 == 4;
            if bar & 1 == 0 && bar & !0xf != 0 {
                let base = if board == "q35" { 0xc000_0000 } else { 0x8000_0000 };
                assert!((base..0xfec0_0000).contains(&bar), "{board}: {bar:#x}");
                found += 1;
            }
            at += if wide { 8 } else { 4 };
        }
        assert!(found >= 1, "{board}");
        assert!([10, 11].contains(&(config(&pc, SLOT5, 0x3c) & 0xff)), "{board}");
        // Where interrupts go, and the BIOS area is RAM.
        assert_eq!(pc.bytes(0xf_0000, 8), b"RSD PTR ");
        pc.store(0xc_8000, 4, 0x1234_5678);
        assert_eq!(pc.load(0xc_8000, 4), 0x1234_5678);
    }
}

#[test]
fn power_management() {
    for board in BOARDS {
        let mut pc = start(board);
        // SCI_EN: the system is in ACPI mode.
        assert_eq!(pc.input(0x604, 2) & 1, 1, "{board}");
        pc.machine.resume();
        let first = pc.input(0x608, 4);
        let deadline = Instant::now() + Duration::from_secs(120);
        while pc.input(0x608, 4) == first {
            assert!(Instant::now() < deadline, "{board}: the timer stands");
        }
        pc.machine.control().request(Request::PowerButton);
        assert_eq!(pc.settle(), None);
        assert_eq!(pc.input(0x600, 2) & 1 << 8, 1 << 8, "{board}: power button status");
        // SLP_EN with SLP_TYP 0, which `_S5` names.
        pc.output(0x604, 2, 1 << 13 | 1);
        assert_eq!(pc.settle(), Some(RunEnd::PowerOff), "{board}");
    }
}

/// Without firmware: SLP_TYP of `_S3` stops the processors; a button wakes them at the FACS' waking vector, with memory kept,
/// devices reset and the chipset set up again. `_S4` turns off.
#[test]
fn sleep_and_waking() {
    const MEMORY: u64 = 0x8_0000;
    for board in BOARDS {
        let mut pc = start(board);
        pc.machine.resume();
        let tables = acpi_tables(&pc);
        let fadt = &tables.iter().find(|t| t.0 == "FACP").unwrap().1;
        let facs = number(fadt, 36, 4);
        assert_eq!(pc.bytes(facs, 4), b"FACS", "{board}");
        for (vector, awake) in [(0x9_1234u64, true), (0, false), (0x10_0000, false)] {
            pc.store(MEMORY, 8, 0x1122_3344_5566_7788);
            pc.store(0x10_0200, 1, 0x90);
            pc.store(facs + 12, 4, vector);
            pc.outb(0x21, 0x12);
            // What woke it the last time would do so again.
            pc.output(0x600, 2, 0xffff);
            pc.output(0x604, 2, 1 << 13 | 1 << 10 | 1);
            assert_eq!(pc.settle(), None);
            assert_eq!(pc.machine.state(), RunState::Suspended, "{board}");
            // The host stops the machine, and lets it go on.
            pc.machine.pause();
            assert_eq!(pc.machine.state(), RunState::Paused, "{board}");
            pc.machine.resume();
            assert_eq!(pc.machine.state(), RunState::Suspended, "{board}");
            pc.machine.control().request(Request::PowerButton);
            assert_eq!((pc.settle(), pc.settle()), (None, None));
            assert_eq!(pc.machine.state(), RunState::Running, "{board}");
            assert_eq!(pc.load(MEMORY, 8), 0x1122_3344_5566_7788, "{board}");
            assert_eq!(pc.inb(0x21), 0xff, "{board}: the PIC as firmware leaves it");
            assert_eq!(pc.input(0x604, 2) & 1, 1, "{board}: ACPI is on");
            assert_eq!(config(&pc, SLOT5, 4) & 2, 2, "{board}: memory is decoded");
            let state = pc.machine.vcpu_state(VcpuIndex(0), StateGroups::All).unwrap();
            let s = state.as_x86().unwrap();
            if awake {
                assert_eq!((s.cs.selector, s.cs.base, s.rip, s.cr0 & 1), (0x9123, 0x9_1230, 4, 0), "{board}");
                assert_eq!(pc.load(0x10_0200, 1), 0x90, "{board}: the kernel is not loaded again");
                assert_eq!(pc.input(0x600, 2), 1 << 15 | 1 << 8, "{board}: what woke it");
            } else {
                // There is nowhere to go on: it starts anew.
                assert_eq!(pc.load(0x10_0200, 1), 0xf4, "{board}");
            }
        }
        pc.output(0x604, 2, 1 << 13 | 2 << 10 | 1);
        assert_eq!(pc.settle(), Some(RunEnd::PowerOff), "{board}: _S4");
    }
}

/// With firmware: it starts at the reset vector, finds in CMOS RAM why, and finds itself in the RAM that shadows the ROM.
#[test]
fn waking_through_firmware() {
    for board in BOARDS {
        let mut setup = Setup::new(board);
        let mut rom = vec![0xf4; 64 << 10];
        rom[0xfff0..0xfff3].copy_from_slice(&[0xf4, 0xeb, 0xfd]);
        setup.config.boot.bios = Bios::File(setup.file("rom.bin", &rom));
        let mut pc = setup.start();
        assert_eq!(pc.fw_cfg_file("etc/system-states"), Some(vec![0x80, 0, 0, 0x81, 0x82, 0x80]), "{board}");
        pc.machine.resume();
        // The block's place, and the BIOS area in RAM, as firmware sets them.
        let (host, power) = if board == "q35" { (0x90, 31 << 3) } else { (0x58, 1 << 3 | 3) };
        set_config(&pc, power, 0x40, 0x601);
        set_config(&pc, power, if board == "q35" { 0x44 } else { 0x80 }, if board == "q35" { 0x80 } else { 1 });
        let pam = if board == "q35" { 0x30 } else { 0x3000 };
        set_config(&pc, 0, host, pam);
        pc.store(0xf_0000, 4, 0xfeed_f00d);
        pc.output(0x604, 2, 1 << 13 | 1 << 10);
        assert_eq!(pc.settle(), None);
        assert_eq!(pc.machine.state(), RunState::Suspended, "{board}");
        pc.machine.control().request(Request::Wake);
        assert_eq!(pc.settle(), None);
        assert_eq!(pc.machine.state(), RunState::Running, "{board}");
        pc.outb(0x70, 0x0f);
        assert_eq!(pc.inb(0x71), 0xfe, "{board}");
        assert_eq!(pc.load(0xf_0000, 4), 0xfeed_f00d, "{board}");
        let state = pc.machine.vcpu_state(VcpuIndex(0), StateGroups::All).unwrap();
        assert_eq!(state.as_x86().unwrap().cs.base, 0xffff_0000, "{board}");
        // Any other reset shows the ROM, and nothing to resume.
        pc.outb(0x71, 0);
        pc.outb(0xcf9, 2);
        pc.outb(0xcf9, 6);
        assert_eq!(pc.settle(), None);
        assert_eq!(pc.load(0xf_0000, 4), 0xf4f4_f4f4, "{board}");
        pc.outb(0x70, 0x0f);
        assert_eq!(pc.inb(0x71), 0, "{board}");
        // Nobody sleeps: nothing happens.
        pc.machine.control().request(Request::Wake);
        assert_eq!((pc.settle(), pc.machine.state()), (None, RunState::Running), "{board}");
    }
}

#[test]
fn ways_to_reset() {
    type Way = fn(&Pc);
    let ways: [(&str, Way); 3] = [
        ("reset control", |pc| {
            pc.outb(0xcf9, 2);
            pc.outb(0xcf9, 6);
        }),
        ("keyboard controller", |pc| pc.outb(0x64, 0xfe)),
        ("port 0x92", |pc| pc.outb(0x92, 1)),
    ];
    for board in BOARDS {
        for (name, way) in ways {
            let mut pc = start(board);
            pc.store(0x10_0200, 1, 0);
            pc.outb(0x21, 0x12);
            way(&pc);
            assert_eq!(pc.settle(), None, "{board}: {name}");
            assert_eq!(pc.load(0x10_0200, 1), 0xf4, "{board}: {name}: the kernel is loaded again");
            assert_eq!(pc.inb(0x21), 0xff, "{board}: {name}");
        }
    }
}

#[test]
fn tables_are_those_of_the_board() {
    for board in BOARDS {
        let pc = start(board);
        let tables = acpi_tables(&pc);
        let names: Vec<&str> = tables.iter().map(|t| t.0.as_str()).collect();
        let want: &[&str] = if board == "q35" {
            &["FACP", "APIC", "HPET", "MCFG", "WAET", "DSDT"]
        } else {
            &["FACP", "APIC", "HPET", "WAET", "DSDT"]
        };
        assert_eq!(names, want, "{board}");
        let fadt = &tables[0].1;
        // The timer the FADT names is the one that counts.
        assert_eq!(number(fadt, 76, 4), 0x608);
        let gpe = number(fadt, 80, 4) as u16;
        pc.outb(gpe + u16::from(fadt[92]) / 2, 0x5);
        assert_eq!(pc.inb(gpe + u16::from(fadt[92]) / 2), 0x5, "{board}: GPE enable");
        if let Some((_, hpet)) = tables.iter().find(|t| t.0 == "HPET") {
            assert_eq!(number(hpet, 36, 4), pc.load(0xfed0_0000, 4), "{board}");
        }
    }
}

#[test]
fn memory_goes_on_above_4_gib() {
    for (board, low) in [("pc", 3u64 << 30), ("q35", 2 << 30)] {
        let mut setup = Setup::new(board).kernel(&bzimage());
        setup.config.memory = 4 << 30;
        let pc = setup.start();
        let high = (4 << 30) + ((4 << 30) - low) - 8;
        pc.store(high, 8, 0x0102_0304_0506_0708);
        pc.store(low - 0x40_0000, 8, 99);
        assert_eq!((pc.load(high, 8), pc.load(low - 0x40_0000, 8)), (0x0102_0304_0506_0708, 99), "{board}");
        assert_eq!(pc.load(low + 0x1000, 8), u64::MAX, "{board}: the hole");
        assert_eq!(pc.load(high + 8, 8), u64::MAX, "{board}");
        pc.outb(0x70, 0x5c);
        assert_eq!(u64::from(pc.inb(0x71)) << 24, ((4 << 30) - low) & 0xff00_0000, "{board}");
        let e820 = pc.fw_cfg_file("etc/e820").unwrap();
        assert_eq!((e820.len(), number(&e820, 28, 8)), (40, (4 << 30) - low), "{board}");
    }
}

/// A ROM ends at 4 GiB and at 1 MiB, where RAM can take its place.
#[test]
fn firmware_in_rom() {
    for board in BOARDS {
        let mut setup = Setup::new(board);
        let mut rom = vec![0x90; 256 << 10];
        rom[(256 << 10) - 16] = 0xea;
        rom[128 << 10] = 0x77;
        setup.config.boot.bios = Bios::File(setup.file("bios.bin", &rom));
        let pc = setup.start();
        let state = pc.machine.vcpu_state(VcpuIndex(0), StateGroups::All).unwrap();
        assert_eq!(state.pc(), 0xffff_fff0);
        assert_eq!(
            (pc.load(0xffff_fff0, 1), pc.load(0xf_fff0, 1), pc.load(0xe_0000, 1)),
            (0xea, 0xea, 0x77),
            "{board}"
        );
        pc.store(0xf_fff0, 1, 0x11);
        assert_eq!(pc.load(0xf_fff0, 1), 0xea, "{board}: ROM cannot be written");
        // PAM0: writes go to RAM, then reads come from there.
        let pam0 = if board == "q35" { 0x90u32 } else { 0x59 };
        let pam = |value: u8| {
            pc.output(0xcf8, 4, (0x8000_0000 | pam0 & 0xfc).into());
            pc.outb(0xcfc + (pam0 & 3) as u16, value);
        };
        pam(0x20);
        pc.store(0xf_fff0, 1, 0x22);
        assert_eq!(pc.load(0xf_fff0, 1), 0xea, "{board}");
        pam(0x30);
        assert_eq!(pc.load(0xf_fff0, 1), 0x22, "{board}");
        pam(0x10);
        pc.store(0xf_fff0, 1, 0x33);
        assert_eq!(pc.load(0xf_fff0, 1), 0x22, "{board}");
        assert_eq!(pc.load(0xffff_fff0, 1), 0xea, "{board}");
        assert!(pc.fw_cfg_file("etc/table-loader").is_some());
    }
}

#[test]
fn firmware_in_flash() {
    let setup = Setup::new("q35");
    let mut code = vec![0xff; 512 << 10];
    let end = code.len();
    code[end - 16] = 0xea;
    let (code, vars) = (setup.file("code.fd", &code), setup.file("vars.fd", &[0x5a; 132 << 10]));
    let mut setup = setup;
    for (file, read_only) in [(code, true), (vars.clone(), false)] {
        let interface = mimus_machines::config::DriveInterface::Pflash;
        setup.config.drives.push(mimus_machines::config::Drive {
            file: Some(file),
            interface,
            read_only,
            ..Default::default()
        });
    }
    let pc = setup.start();
    assert_eq!((pc.load(0xffff_fff0, 1), pc.load(0xf_fff0, 1)), (0xea, 0xea));
    let vars_at = 0x1_0000_0000u64 - (512 << 10) - (132 << 10);
    assert_eq!(pc.load(vars_at, 1), 0x5a);
    // Program a byte: command, data; then read the array again.
    pc.store(vars_at, 1, 0x40);
    pc.store(vars_at, 1, 0x12);
    pc.store(vars_at, 1, 0xff);
    assert_eq!(pc.load(vars_at, 1), 0x12);
}

#[test]
fn what_cannot_be_is_one_line() {
    let error = |setup: Setup| setup.try_build().err().map(|e| e.to_string()).unwrap_or_default();
    let cases = [
        (Setup::new("q35").kernel(&bzimage()).device("virtio-rng-device"), "no virtio-mmio slots"),
        (Setup::new("pc").kernel(&bzimage()).device("virtio-rng-pci,bus=pcie.0"), "one PCI bus, pci.0"),
        (Setup::new("q35").kernel(&bzimage()).device("virtio-rng-pci,addr=1f"), "taken"),
    ];
    for (setup, says) in cases {
        let text = error(setup);
        assert!(text.contains(says) && text.lines().count() == 1, "{says}: {text}");
    }
    let mut setup = Setup::new("pc");
    setup.config.boot.bios = Bios::File(setup.file("bios", &vec![0; 1 << 17 | 1 << 10]));
    let text = error(setup);
    assert!(text.contains("multiple of 64 KiB") && text.contains("-bios"), "{text}");
}

/// Firmware asks for SMIs of all processors, as OVMF does; only what there is, and once.
#[cfg(target_arch = "x86_64")]
#[test]
fn smi_features_are_negotiated() {
    let start = || {
        let mut setup = Setup::new("q35").translated().cpus(3);
        let mut rom = vec![0xf4; 64 << 10];
        rom[0xfff0..0xfff3].copy_from_slice(&[0xf4, 0xeb, 0xfd]);
        setup.config.boot.bios = Bios::File(setup.file("rom.bin", &rom));
        setup.start()
    };
    let mut pc = start();
    let key = |pc: &Pc, name: &str| pc.fw_cfg_key(name).unwrap_or_else(|| panic!("{name}"));
    let write = |pc: &Pc, value: u64| {
        pc.store(0x8000, 8, value);
        // Select and write, 8 bytes, from 0x8000: all big-endian.
        let control = u32::from(key(pc, "etc/smi/requested-features")) << 16 | 8 | 16;
        pc.store(0x9000, 4, control.swap_bytes().into());
        pc.store(0x9004, 4, 8u32.swap_bytes().into());
        pc.store(0x9008, 8, 0x8000u64.swap_bytes());
        pc.output(0x518, 4, 0x9000u32.swap_bytes().into());
        assert_eq!(pc.load(0x9000, 4), 0, "done without an error");
    };
    let agreed = |pc: &Pc| pc.fw_cfg_file("etc/smi/features-ok").unwrap();
    let waiting = |pc: &Pc| -> Vec<bool> {
        let pending =
            |i| pc.machine.vcpu_state(VcpuIndex(i), StateGroups::All).unwrap().as_x86().unwrap().events.smi_pending;
        (0..3).map(pending).collect()
    };
    let smi = |pc: &Pc| {
        // PMBASE, APM's SMIs on.
        set_config(pc, 31 << 3, 0x40, 0x601);
        set_config(pc, 31 << 3, 0x44, 0x80);
        pc.output(0x630, 4, 0x21);
        pc.outb(0xb2, 0);
    };
    assert_eq!(pc.fw_cfg_file("etc/smi/supported-features"), Some(1u64.to_le_bytes().to_vec()));
    smi(&pc);
    assert_eq!(waiting(&pc), [true, false, false], "nothing was asked for: the one whose access it was");
    // A feature that there is not.
    write(&pc, 0x41);
    assert_eq!(agreed(&pc), [0]);
    write(&pc, 1);
    assert_eq!(agreed(&pc), [1]);
    // Too late.
    write(&pc, 0);
    assert_eq!(agreed(&pc), [1]);
    smi(&pc);
    assert_eq!(waiting(&pc), [true; 3]);
    let mut saved = std::io::Cursor::new(Vec::new());
    pc.machine.save(&mut saved).unwrap();
    let mut other = start();
    other.machine.restore(&mut &saved.into_inner()[..]).unwrap();
    assert_eq!(agreed(&other), [1]);
    assert_eq!(waiting(&other), [true; 3]);
    // A reset forgets it.
    pc.machine.reset().unwrap();
    assert_eq!(pc.fw_cfg_file("etc/smi/requested-features"), Some(vec![0; 8]));
    smi(&pc);
    assert_eq!(waiting(&pc), [true, false, false]);
    // The PIIX has none.
    let mut setup = Setup::new("pc").translated();
    setup.config.boot.bios = Bios::File(setup.file("rom.bin", &vec![0xf4; 64 << 10]));
    assert_eq!(setup.start().fw_cfg_file("etc/smi/features-ok"), None);
}

/// Without firmware, memory types are the same on all processors, as Linux wants them.
#[cfg(target_arch = "x86_64")]
#[test]
fn memory_types_of_all_processors() {
    use mimus_core::arch::x86::{MpState, msr};
    let pc = Setup::new("q35").translated().cpus(3).kernel(&bzimage()).start();
    for vcpu in 0..3 {
        let state = pc.machine.vcpu_state(VcpuIndex(vcpu), StateGroups::All).unwrap();
        let s = state.as_x86().unwrap();
        assert_eq!(s.msr(msr::MTRR_DEF_TYPE), Some(1 << 11 | 6), "{vcpu}");
        assert_eq!(s.mp_state == MpState::Running, vcpu == 0);
    }
}
