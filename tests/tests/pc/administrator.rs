//! What an administrator says of a machine, as its firmware and system find it.

use std::io::Read;

use mimus_core::accel::ResetCause;
use mimus_machines::config::firmware::{parse_smbios, uuid_option};
use mimus_machines::config::{BootOrder, Drive, FwCfgItem, MemoryBackend, MemoryLock, Rtc};
use mimus_machines::machine::Request;

use crate::harness::{Pc, Setup, bzimage};

fn cmos(pc: &Pc, at: u8) -> u8 {
    pc.outb(0x70, at);
    pc.inb(0x71)
}

#[test]
fn firmware_finds_what_was_said() {
    let mut setup = Setup::new("q35").kernel(&bzimage());
    let file = setup.file("data", b"from a file");
    let firmware = &mut setup.config.firmware;
    firmware.order = BootOrder::parse("order=c,once=dn,menu=on,splash-time=300,reboot-timeout=-1,strict=on").unwrap();
    firmware.items = vec![
        FwCfgItem::parse("opt/a,string=text").unwrap(),
        FwCfgItem::parse(&format!("opt/b,file={}", file.display())).unwrap(),
    ];
    firmware.uuid = Some(uuid_option("00112233-4455-6677-8899-aabbccddeeff").unwrap());
    firmware.smbios = parse_smbios("type=1,serial=SERIAL-1").unwrap();
    let mut pc = setup.start();
    let item = |pc: &Pc, key: u64, len: usize| {
        pc.output(0x510, 2, key);
        (0..len).map(|_| pc.inb(0x511)).collect::<Vec<u8>>()
    };
    assert_eq!(pc.fw_cfg_file("opt/a").unwrap(), b"text");
    assert_eq!(pc.fw_cfg_file("opt/b").unwrap(), b"from a file");
    assert_eq!(pc.fw_cfg_file("etc/boot-menu-wait").unwrap(), 300u16.to_le_bytes());
    assert_eq!(pc.fw_cfg_file("etc/boot-fail-wait").unwrap(), (-1i32).to_le_bytes());
    assert_eq!(pc.fw_cfg_file("bootorder").unwrap(), b"HALT\0");
    assert_eq!(item(&pc, 2, 4), [0, 0x11, 0x22, 0x33]);
    assert_eq!(item(&pc, 0xe, 2), [1, 0]);
    let tables = pc.fw_cfg_file("etc/smbios/smbios-tables").unwrap();
    assert!(tables.windows(8).any(|w| w == b"SERIAL-1"));
    assert!(tables.windows(8).any(|w| w == [0x33, 0x22, 0x11, 0, 0x55, 0x44, 0x77, 0x66]));
    // Optical disk and network, then, from the second start on, the disk.
    assert_eq!((cmos(&pc, 0x3d), cmos(&pc, 0x38)), (0x43, 0));
    for _ in 0..2 {
        assert!(pc.machine.carry_out(Request::Reset(ResetCause::HostRequest)).is_none());
        assert_eq!((cmos(&pc, 0x3d), cmos(&pc, 0x38)), (2, 0));
    }
}

#[test]
fn boot_order_of_devices() {
    let build = |board: &str, devices: &[&str], drives: &[&str]| {
        let mut setup = Setup::new(board);
        let file = setup.file("disk", &[0; 512]);
        let drive =
            |text: &&str| Drive::parse(&format!("file={},format=raw,readonly=on,{text}", file.display())).unwrap();
        setup.config.drives = drives.iter().map(drive).collect();
        devices.iter().fold(setup, |setup, device| setup.device(device)).try_build()
    };
    let order = |board: &str, devices: &[&str], drives: &[&str]| {
        let pc = build(board, devices, drives).unwrap_or_else(|e| panic!("{e}"));
        pc.fw_cfg_file("bootorder").map(|file| String::from_utf8(file).unwrap())
    };
    let disks = ["if=none,id=a", "if=none,id=b"];
    let devices = ["virtio-blk-pci,drive=a,addr=5,bootindex=4", "virtio-blk-pci,drive=b,addr=6.1,bootindex=0"];
    let expected = "/pci@i0cf8/scsi@6,1/disk@0,0\n/pci@i0cf8/scsi@5/disk@0,0\0";
    for board in ["pc", "q35"] {
        assert_eq!(order(board, &devices, &disks).as_deref(), Some(expected), "{board}");
    }
    assert_eq!(order("q35", &[], &["if=virtio"]), None);
    let two = ["if=virtio", "if=virtio,bootindex=1"];
    assert_eq!(order("microvm", &[], &two).as_deref(), Some("/virtio-mmio@00000000feb00c00/disk@0,0\0"));
    let sata = ["if=ide,bootindex=2", "if=ide,index=4,media=cdrom,bootindex=0", "if=none,id=a"];
    let expected = [
        "/pci@i0cf8/pci8086,2922@1f,2/drive@4/disk@0",
        "/pci@i0cf8/pci8086,2922@1f,2/drive@5/disk@0",
        "/pci@i0cf8/pci8086,2922@1f,2/drive@0/disk@0\0",
    ];
    let made = order("q35", &["ide-hd,drive=a,bus=ide.5,bootindex=1"], &sata);
    assert_eq!(made, Some(expected.join("\n")));
    let refused = |board: &str, device: &str| build(board, &[device], &disks[..1]).err().unwrap().to_string();
    for (device, says) in [
        ("virtio-rng-pci,bootindex=1", "disks and network cards"),
        ("isa-debug-exit,bootindex=1", "disks and network cards"),
        ("virtio-blk-pci,drive=a,bootindex=x", "whole number"),
    ] {
        let text = refused("q35", device);
        assert!(text.contains(says) && text.contains("bootindex") && !text.contains('\n'), "{text}");
    }
    // What is the machine's is among the properties an error lists.
    for (device, says) in [
        ("ide-hd,drive=a,bootidex=1", "did you mean \"bootindex\"?; properties: id, bus, bootindex, "),
        ("virtio-net-pci,x=1", "properties: id, bus, bootindex, "),
        ("virtio-rng-pci,buss=1", "did you mean \"bus\"?; properties: id, bus, filename"),
    ] {
        let text = refused("q35", device);
        assert!(text.contains(says), "{text}");
    }
    let twice = ["virtio-blk-pci,drive=a,bootindex=1", "virtio-blk-pci,drive=b,bootindex=1"];
    let text = build("q35", &twice, &disks).err().unwrap().to_string();
    assert!(text.contains("bootindex=1 is another device's"), "{text}");
}

#[test]
fn names_are_given_once() {
    let mut setup = Setup::new("microvm").kernel(&bzimage());
    setup.config.firmware.items = vec![FwCfgItem::parse("etc/e820,string=x").unwrap()];
    let text = setup.try_build().err().unwrap().to_string();
    assert!(text.contains("etc/e820") && text.contains("already"), "{text}");
    let mut setup = Setup::new("microvm").kernel(&bzimage());
    setup.config.firmware.items = vec![FwCfgItem::parse("opt/x,file=/nonexistent").unwrap()];
    let text = setup.try_build().err().unwrap().to_string();
    assert!(text.starts_with("-fw_cfg /nonexistent"), "{text}");
}

#[test]
fn memory_of_a_file_is_the_machines() {
    let mut setup = Setup::new("microvm").kernel(&bzimage());
    setup.config.memory = 32 << 20;
    let path = setup.files.path().join("ram");
    let text = format!("memory-backend-file,id=m,mem-path={},share=on,prealloc=on", path.display());
    setup.config.host_memory.backend = Some(MemoryBackend::parse(&text).unwrap());
    let pc = setup.start();
    pc.store(0x12_3000, 4, 0x6d69_6d75);
    let mut file = std::fs::File::open(&path).unwrap();
    let mut bytes = Vec::new();
    file.read_to_end(&mut bytes).unwrap();
    assert_eq!((bytes.len(), &bytes[0x12_3000..0x12_3004]), (32 << 20, &b"umim"[..]));
}

#[test]
fn memory_may_be_locked() {
    let mut setup = Setup::new("microvm").kernel(&bzimage());
    setup.config.memory = 32 << 20;
    setup.config.host_memory.lock = MemoryLock::On;
    match setup.try_build() {
        Ok(pc) => drop(pc),
        // Hosts may not let users lock that much.
        Err(e) => assert!(e.to_string().starts_with("-m 32M: RAM block ram: cannot lock 32 MiB"), "{e}"),
    }
}

#[test]
fn the_clock_shows_what_was_said() {
    let bcd = |v: u8| (v >> 4) * 10 + (v & 15);
    for (text, year) in [("base=1999-12-31T12:00:00,clock=vm", 99), ("base=2031-01-01", 31)] {
        let mut setup = Setup::new("q35").kernel(&bzimage());
        setup.config.rtc = Rtc::parse(text).unwrap();
        let pc = setup.start();
        assert_eq!(bcd(cmos(&pc, 9)), year, "{text}");
    }
    let mut setup = Setup::new("q35").kernel(&bzimage());
    setup.config.rtc = Rtc::parse("base=localtime").unwrap();
    let pc = setup.start();
    let Ok(out) = std::process::Command::new("date").arg("+%-H %-d").output() else {
        return crate::harness::skipped("the_clock_shows_what_was_said", "there is no date program");
    };
    let now = format!("{} {}", bcd(cmos(&pc, 4)), bcd(cmos(&pc, 7)));
    let then = String::from_utf8_lossy(&out.stdout).trim().to_owned();
    // The hour may have just changed.
    assert!(now == then || bcd(cmos(&pc, 2)) == 0, "{now} and {then}");
}
