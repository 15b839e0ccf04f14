use crate::pci::DevFn;
use crate::testing::memory::any_size;
use crate::testing::pci::{ECAM, MMIO32, MMIO64, PIO, PciMachine, TestFunction, WINDOW};
use crate::testing::{Rng, reset};
use mimus_core::bus::AccessSize::{B1, B2, B4, B8};
use mimus_core::bus::MemTxResult;
use mimus_core::snapshot::{Payload, Snapshot};

#[test]
fn the_bridges_own_function() {
    let m = PciMachine::new();
    assert_eq!((m.config(0, 0, B4), m.config(0, 8, B4) >> 8), (0x0008_1b36, 0x06_0000), "a host bridge");
    assert_eq!((m.config(0, 0xe, B1), m.config(0, 0x3d, B1), m.config(0, 6, B2)), (0, 0, 0), "no pin, no capabilities");
    m.set_config(0, 4, B2, 0xffff);
    m.set_config(0, 0x3c, B1, 0x77);
    assert_eq!((m.config(0, 4, B2), m.config(0, 0x3c, B1)), (0x547, 0x77));
    for bar in 0..6 {
        m.set_config(0, 0x10 + bar * 4, B4, !0);
        assert_eq!(m.config(0, 0x10 + bar * 4, B4), 0);
    }
    reset(&**m.gpex.function());
    assert_eq!((m.config(0, 4, B2), m.config(0, 0x3c, B1)), (0, 0));
}

#[test]
fn ecam_widths() {
    let m = PciMachine::new();
    let _f = TestFunction::plug(m.slot(0x10));
    let at = ECAM + 0x1_0000;
    assert_eq!(m.read(at, B1), 0xf4);
    assert_eq!((m.read(at + 1, B1), m.read(at + 2, B2)), (0x1a, 0x5678));
    assert_eq!(m.read(at, B4), 0x5678_1af4);
    // Two registers: split, not refused.
    assert_eq!(m.read(at + 8, B8), 0x1234_5609);
    assert_eq!(m.memory.read(at + 1, B2).1, MemTxResult::AccessError);
    assert_eq!(m.memory.read(at + 2, B4).1, MemTxResult::AccessError);
    m.set_config(0x10, 0x3c, B1, 0xaa);
    assert!(m.memory.write(at + 0x10, B8, 0x1234_5000_4000_0000).is_ok());
    assert_eq!((m.config(0x10, 0x3c, B4), m.config(0x10, 0x10, B4)), (0x1aa, 0x4000_0000));
}

#[test]
fn where_no_function_is() {
    let m = PciMachine::new();
    let _f = TestFunction::plug(m.slot(0x10));
    for at in [0x1_1000, 0x1_8000, 0xf_f000, 1 << 20, (1 << 20) + 0x1_0000] {
        for size in [B1, B2, B4, B8] {
            assert_eq!(m.read(ECAM + at, size), size.mask(), "{at:#x}");
        }
        assert!(m.memory.write(ECAM + at, B4, 0).is_ok(), "lost");
    }
    // Extended configuration space is there and empty.
    assert_eq!((m.config(0x10, 0x100, B4), m.config(0x10, 0xffc, B4)), (0, 0));
    m.set_config(0x10, 0x100, B4, !0);
    assert_eq!(m.config(0x10, 0x100, B4), 0);
}

#[test]
fn windows() {
    let m = PciMachine::new();
    for (base, len) in [(MMIO32, WINDOW), (MMIO64, WINDOW), (PIO, 0x1_0000)] {
        for at in [base, base + 1, base + 0x123, base + len - 8] {
            for size in [B1, B2, B4, B8] {
                assert_eq!(m.read(at, size), size.mask(), "nobody answers at {at:#x}");
            }
        }
        assert!(m.memory.write(base + 4, B4, 0).is_ok());
        assert_eq!(m.memory.read(base + len, B4).1, MemTxResult::DecodeError, "the end of a window");
    }
    let _f = TestFunction::plug(m.slot(0x10));
    m.set_config(0x10, 0x10, B4, MMIO32 as u32 + 0x1000);
    m.set_config(0x10, 4, B2, 2);
    assert_eq!((m.read(MMIO32 + 0x1ffc, B4), m.read(MMIO32 + 0x2000, B4)), (0xffc, 0xffff_ffff));
    assert_eq!(m.gpex.bus().list(), [DevFn(0), DevFn(0x10)]);
}

#[test]
fn saved_and_restored() {
    let m = PciMachine::new();
    m.set_config(0, 4, B2, 6);
    m.set_config(0, 0x3c, B1, 9);
    let saved = m.gpex.function().save().unwrap();
    let n = PciMachine::new();
    n.gpex.function().restore(&saved).unwrap();
    assert_eq!((n.config(0, 4, B2), n.config(0, 0x3c, B1)), (6, 9));
    assert_eq!(n.gpex.function().save().unwrap(), saved);
    let mut rng = Rng(27);
    let mut refused = 0;
    for _ in 0..3000 {
        let mut bad = saved.clone();
        match rng.below(10) {
            0 => bad.body.truncate(rng.below(saved.body.len() as u64) as usize),
            1 => bad.schema.push('x'),
            2 => bad.version += 1,
            _ => {
                let at = rng.below(bad.body.len() as u64) as usize;
                bad.body[at] ^= 1 << rng.below(8);
            }
        }
        if let Err(e) = n.gpex.function().restore(&bad) {
            assert!(!e.to_string().contains('\n'));
            refused += 1;
        }
        let _ = n.config(0, rng.below(64) * 4, B4);
    }
    assert!(refused > 2000, "{refused}");
    let other = Payload { schema: "ns16550a".into(), ..saved };
    assert!(n.gpex.function().restore(&other).is_err());
}

#[test]
fn random_accesses() {
    let m = PciMachine::new();
    let _f = TestFunction::plug(m.slot(0x10));
    let mut rng = Rng(29);
    for _ in 0..30_000 {
        let base = [ECAM, ECAM + 0x1_0000, MMIO32, MMIO64, PIO][rng.below(5) as usize];
        let range = [0x80, 0x1_0000][rng.below(2) as usize];
        let (at, size) = (base + rng.below(range), any_size(rng.next()));
        if rng.below(2) == 0 {
            let _ = m.memory.read(at, size);
        } else {
            let _ = m.memory.write(at, size, rng.next());
        }
    }
}
