//! Whole machines saved and restored.

use std::io::Cursor;

use mimus_core::accel::SysReg;
use mimus_core::accel::VcpuIndex;

use crate::harness::{Pc, Setup, bzimage};

fn save(pc: &mut Pc) -> Vec<u8> {
    let mut out = Cursor::new(Vec::new());
    pc.machine.save(&mut out).unwrap();
    out.into_inner()
}

fn setup(board: &str) -> Setup {
    Setup::new(board).kernel(&bzimage()).cpus(2).device("virtio-rng-device,id=rng")
}

/// State all over the machine goes into the file and comes back into another machine.
#[test]
fn microvm() {
    let mut pc = setup("microvm").start();
    pc.outb(0x3fb, 0x1b);
    pc.outb(0x21, 0x5a);
    pc.outb(0x70, 0x41);
    pc.outb(0x71, 0x77);
    pc.store(0xfee0_0080, 4, 0x40);
    pc.store(0xfec0_0000, 4, 0x18);
    pc.store(0xfec0_0010, 4, 0x1_0099);
    pc.store(0x345_0000, 8, 0x1122_3344_5566_7788);
    pc.output(0x510, 2, 0x19);
    let file = save(&mut pc);
    let first = pc.machine.save_tree().unwrap();

    let mut other = setup("microvm").start();
    other.machine.restore(&mut &file[..]).unwrap();
    assert_eq!((other.inb(0x3fb), other.inb(0x21), other.inb(0x71)), (0x1b, 0x5a, 0x77));
    assert_eq!(other.io.sysreg_read(VcpuIndex(0), SysReg::Cr8), Some(4));
    other.store(0xfec0_0000, 4, 0x18);
    assert_eq!(other.load(0xfec0_0010, 4), 0x1_0099);
    assert_eq!(other.load(0x345_0000, 8), 0x1122_3344_5566_7788);
    // Restored, it is the same to the last payload.
    let mut third = setup("microvm").start();
    third.machine.restore(&mut &file[..]).unwrap();
    assert_eq!(format!("{:?}", third.machine.save_tree().unwrap()), format!("{first:?}"));
}

/// The same for chipsets: registers of PCI, power management, timers, shadowed ROM.
#[test]
fn pc_and_q35() {
    for board in ["pc", "q35"] {
        let setup = || Setup::new(board).kernel(&bzimage()).device("virtio-rng-pci,id=rng,addr=6");
        let mut pc = setup().start();
        pc.output(0xcf8, 4, 0x8000_3004);
        pc.output(0xcfc, 2, 7);
        pc.output(0x602, 2, 0x121);
        pc.store(0xfed0_0108, 4, 0x1234);
        pc.store(0xc_c000, 4, 0x5566_7788);
        pc.outb(0x64, 0x60);
        pc.outb(0x60, 0x47);
        let file = save(&mut pc);
        let first = pc.machine.save_tree().unwrap();

        let mut other = setup().start();
        other.machine.restore(&mut &file[..]).unwrap();
        assert_eq!(other.input(0xcfc, 2), 7, "{board}");
        assert_eq!(other.input(0x602, 2), 0x121, "{board}");
        assert_eq!((other.load(0xfed0_0108, 4), other.load(0xc_c000, 4)), (0x1234, 0x5566_7788), "{board}");
        other.outb(0x64, 0x20);
        assert_eq!(other.inb(0x60), 0x47, "{board}");
        let mut third = setup().start();
        third.machine.restore(&mut &file[..]).unwrap();
        assert_eq!(format!("{:?}", third.machine.save_tree().unwrap()), format!("{first:?}"), "{board}");
    }
}

#[test]
fn a_snapshot_of_another_machine_is_refused() {
    let file = save(&mut setup("microvm").start());
    let mut other = Setup::new("microvm").kernel(&bzimage()).cpus(1).start();
    let text = other.machine.restore(&mut &file[..]).unwrap_err().to_string();
    assert!(text.contains("vcpus is 2 there and 1 here"), "{text}");
    let mut short = setup("microvm").start();
    assert!(short.machine.restore(&mut &file[..file.len() / 2]).is_err());
}
