//! `microvm`: devices, tables, power.

use mimus_core::accel::VcpuIndex;
use mimus_core::arch::StateGroups;
use mimus_machines::machine::{Request, RunEnd};

use crate::harness::{Pc, Setup, acpi_tables, bzimage, number};

fn start() -> Pc {
    Setup::new("microvm").kernel(&bzimage()).start()
}

#[test]
fn a_kernel_is_entered_at_its_64_bit_entry_point() {
    let pc = start();
    let state = pc.machine.vcpu_state(VcpuIndex(0), StateGroups::All).unwrap();
    let s = state.as_x86().unwrap();
    assert_eq!((s.rip, s.gpr[6], s.cr3), (0x10_0200, 0x7000, 0x9000));
    assert_eq!(pc.bytes(0x10_0200, 3), [0xf4, 0xeb, 0xfd]);
    let params = pc.bytes(0x7000, 4096);
    assert_eq!(&params[0x202..0x206], b"HdrS");
    // The memory map: RAM up to the tables, of which the RSDP's address is told.
    let entries = params[0x1e8] as usize;
    let ram: u64 = (0..entries)
        .map(|i| &params[0x2d0 + i * 20..])
        .filter(|e| number(e, 16, 4) == 1)
        .map(|e| number(e, 8, 8))
        .sum();
    assert!((255 << 20..256 << 20).contains(&ram), "{ram:#x}");
    assert_eq!(pc.bytes(number(&params, 0x70, 8), 8), b"RSD PTR ");
}

#[test]
fn legacy_devices_are_where_software_looks() {
    let pc = start();
    "mimus\n".bytes().for_each(|b| pc.outb(0x3f8, b));
    assert_eq!(pc.output_text(), "mimus\n");
    // CMOS: the century of a clock that shows this one, and the memory.
    pc.outb(0x70, 0x32);
    assert_eq!(pc.inb(0x71), 0x20);
    pc.outb(0x70, 0x35);
    assert_eq!(pc.inb(0x71), ((256 - 16) >> 4) as u8);
    // Interval timer: a count that was loaded can be read.
    pc.outb(0x43, 0x34);
    pc.outb(0x40, 0x00);
    pc.outb(0x40, 0x80);
    pc.outb(0x43, 0);
    assert!(u16::from(pc.inb(0x40)) | u16::from(pc.inb(0x40)) << 8 <= 0x8000);
    // PIC masks hold what is written.
    pc.outb(0x21, 0xa5);
    assert_eq!(pc.inb(0x21), 0xa5);
    // No device: ones.
    assert_eq!(pc.input(0x1234, 4), 0xffff_ffff);
}

#[test]
fn virtio_devices_fill_slots_from_the_top() {
    let pc = Setup::new("microvm").kernel(&bzimage()).device("virtio-rng-device").start();
    let slot = |i: u64| 0xfeb0_0000 + i * 0x200;
    for i in 0..8 {
        assert_eq!(pc.load(slot(i), 4), 0x7472_6976, "slot {i}");
        assert_eq!(pc.load(slot(i) + 8, 4), if i == 7 { 4 } else { 0 }, "slot {i}");
    }
}

#[test]
fn tables_describe_the_machine() {
    let pc = Setup::new("microvm").kernel(&bzimage()).cpus(3).start();
    let tables = acpi_tables(&pc);
    let names: Vec<&str> = tables.iter().map(|t| t.0.as_str()).collect();
    assert_eq!(names, ["FACP", "APIC", "DSDT"]);
    let madt = &tables[1].1;
    let (mut at, mut cpus) = (44, 0);
    while at < madt.len() {
        cpus += usize::from(madt[at] == 0);
        at += madt[at + 1] as usize;
    }
    assert_eq!(cpus, 3);
    let anchor = pc.bytes(0xf_0040, 24);
    assert_eq!(&anchor[..5], b"_SM3_");
    let structures = pc.bytes(number(&anchor, 16, 8), number(&anchor, 12, 4) as usize);
    assert!(structures.windows(7).any(|w| w == b"microvm"));
    assert!(pc.bytes(0xf_0000, 8) == b"RSD PTR ");
}

#[test]
fn firmware_configuration_has_the_same_tables() {
    let pc = start();
    assert_eq!((pc.inb(0x511), pc.inb(0x511)), (b'Q', b'E'));
    let loader = pc.fw_cfg_file("etc/table-loader").unwrap();
    assert_eq!(loader.len() % 128, 0);
    assert!(pc.fw_cfg_file("etc/acpi/rsdp").unwrap().starts_with(b"RSD PTR "));
    let e820 = pc.fw_cfg_file("etc/e820").unwrap();
    assert_eq!((number(&e820, 0, 8), number(&e820, 8, 8), number(&e820, 16, 4)), (0, 256 << 20, 1));
    assert!(pc.fw_cfg_file("etc/smbios/smbios-anchor").unwrap().starts_with(b"_SM3_"));
    assert!(pc.fw_cfg_file("etc/none").is_none());
}

#[test]
fn without_acpi_the_command_line_names_the_devices() {
    let mut setup = Setup::new("microvm").option("acpi", "off").kernel(&bzimage()).device("virtio-rng-device");
    setup.config.boot.append = Some("console=ttyS0".into());
    let pc = setup.start();
    let text = pc.bytes(0x2_0000, 100);
    let text: Vec<u8> = text.into_iter().take_while(|b| *b != 0).collect();
    assert_eq!(String::from_utf8(text).unwrap(), "console=ttyS0 virtio_mmio.device=512@0xfeb00e00:12");
    assert!(pc.fw_cfg_file("etc/table-loader").is_none());
    assert_ne!(pc.bytes(0xf_0000, 8), b"RSD PTR ");
}

#[test]
fn the_guest_turns_it_off_and_resets_it() {
    let mut pc = start();
    // Sleep control: SLP_EN and S5.
    pc.store(0xfea0_0200, 1, 1 << 5 | 5 << 2);
    assert_eq!(pc.settle(), Some(RunEnd::PowerOff));

    let mut pc = start();
    pc.store(0x20_0000, 4, 0x1234_5678);
    pc.store(0x10_0200, 1, 0);
    pc.store(0xfea0_0202, 1, 0x42);
    assert_eq!(pc.settle(), None);
    // Images are loaded again; other RAM keeps what it had.
    assert_eq!((pc.load(0x10_0200, 1), pc.load(0x20_0000, 4)), (0xf4, 0x1234_5678));
}

#[test]
fn the_power_button_is_an_event() {
    let mut pc = start();
    pc.machine.control().request(Request::PowerButton);
    assert_eq!(pc.settle(), None);
    assert_eq!(pc.load(0xfea0_0000, 4), 2);
    assert_eq!(pc.load(0xfea0_0000, 4), 0);
}

#[test]
fn debug_exit_ends_the_run_with_its_code() {
    let mut pc = Setup::new("microvm").kernel(&bzimage()).device("isa-debug-exit").start();
    pc.outb(0xf4, 0x10);
    assert_eq!(pc.settle(), Some(RunEnd::Exit(0x21)));
}

#[test]
fn what_cannot_be_is_one_line() {
    let error = |setup: Setup| setup.try_build().err().map(|e| e.to_string()).unwrap_or_default();
    let cases = [
        (Setup::new("microvm").device("virtio-rng-pci"), "no PCI bus"),
        (Setup::new("microvm").cpus(256), "1 to 255"),
        (Setup::new("microvm").option("kernel-irqchip", "on"), "accelerator null has no interrupt controllers"),
        (Setup::new("microvm").option("hpet", "on"), "no property 'hpet'"),
        (Setup::new("virt"), "it is a board of riscv64, not of x86_64"),
    ];
    for (setup, says) in cases {
        let text = error(setup.kernel(&bzimage()));
        assert!(text.contains(says) && text.lines().count() == 1, "{says}: {text}");
    }
    let mut setup = Setup::new("microvm");
    setup.config.boot.bios = mimus_machines::config::Bios::File(setup.file("bios", &[0; 1000]));
    let text = error(setup);
    assert!(text.contains("firmware is a multiple of 64 KiB") && text.contains("cut short"), "{text}");
    let mut setup = Setup::new("microvm");
    let path = setup.file("large.bin", &vec![0; 17 << 20]);
    setup.config.boot.bios = mimus_machines::config::Bios::File(path);
    let text = error(setup);
    assert!(text.contains("at most 16 MiB") && text.contains("a disk image (-drive"), "{text}");
    let mut pc = Setup::new("microvm").kernel(b"no kernel at all").try_build().unwrap();
    let text = pc.machine.power_on().unwrap_err().to_string();
    assert!(text.contains("-kernel") && text.contains("bzImage"), "{text}");
}
