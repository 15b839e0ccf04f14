use super::*;
use crate::testing::pci::{PciMachine, TestFunction};
use crate::testing::{Levels, Rng};
use mimus_core::bus::AccessSize::{B1, B2, B4};
use mimus_core::bus::{BusFault, GuestPhys};
use mimus_core::irq::IrqLine;

use crate::testing::memory::RAM;

#[test]
fn addresses_are_reserved() {
    let m = PciMachine::new();
    let bus = m.gpex.bus();
    assert_eq!(bus.name(), "pcie.0");
    let first = bus.reserve(None).unwrap();
    assert_eq!((first.devfn(), first.devfn().to_string()), (DevFn(8), "01.0".into()), "the bridge is device 0");
    let third = bus.reserve(Some("3.2".parse().unwrap())).unwrap();
    let others: Vec<PciSlot> = std::iter::from_fn(|| bus.reserve(None).ok()).collect();
    assert_eq!(others.len(), 29, "a device with any function is not free");
    assert_eq!(bus.reserve(None).err(), Some(PciError::Full("pcie.0".into())));
    assert_eq!(bus.reserve(Some(DevFn(8))).err(), Some(PciError::Taken { bus: "pcie.0".into(), devfn: DevFn(8) }));
    assert!(bus.reserve(Some(DevFn(9))).is_ok(), "another function of a device");
    drop(first);
    assert_eq!(bus.reserve(None).unwrap().devfn(), DevFn(8), "given back");
    assert_eq!(bus.list(), [DevFn(0)], "nothing is plugged but the bridge");
    drop(third);
}

#[test]
fn a_slot_gives_back_only_what_is_its() {
    let m = PciMachine::new();
    let bus = m.gpex.bus();
    let f = TestFunction::plug(m.slot(8));
    assert_eq!(bus.list(), [DevFn(0), DevFn(8)]);
    bus.unplug(DevFn(8));
    assert_eq!((bus.list(), m.config(8, 0, B4)), (vec![DevFn(0)], !0));
    let next = m.slot(8);
    drop(f);
    assert!(bus.reserve(Some(DevFn(8))).is_err(), "the next one's reservation");
    drop(next);
    assert!(bus.reserve(Some(DevFn(8))).is_ok());
}

#[test]
fn several_functions_of_a_device() {
    let m = PciMachine::new();
    let _f = TestFunction::plug(m.slot(8));
    let header = |m: &PciMachine, devfn| (m.config(devfn, 0xe, B1), m.config(devfn, 0xe, B2), m.config(devfn, 0xc, B4));
    assert_eq!(header(&m, 8), (0, 0, 0));
    let reserved = m.slot(10);
    assert_eq!(header(&m, 8), (0, 0, 0), "reserved is not there");
    drop(reserved);
    let _g = TestFunction::plug(m.slot(0xf));
    assert_eq!(header(&m, 8), (0x80, 0x80, 0x80_0000));
    assert_eq!(header(&m, 0xf), (0, 0, 0), "function 0 says so");
    assert_eq!((m.config(8, 0xd, B1), m.config(8, 0xf, B1), m.config(8, 0x10, B4)), (0, 0, 0));
    m.gpex.bus().unplug(DevFn(0xf));
    assert_eq!(header(&m, 8), (0, 0, 0));
}

#[test]
fn what_a_slot_gives() {
    let m = PciMachine::new();
    let slot = m.slot(0x1b);
    assert_eq!(slot.requester(), Requester::Device(0x1b));
    let dma = slot.dma();
    assert_eq!(dma.read_u32(GuestPhys(RAM)), Err(BusFault::Access), "no bus mastering yet");
    slot.dma_gate().set(true);
    assert_eq!((dma.read_u32(GuestPhys(RAM)), dma.attrs().requester), (Ok(0), Requester::Device(0x1b)));
    slot.msi().unwrap().send(0x1234, 5);
    assert_eq!(m.messages.take(), [(0x1234, 5, Requester::Device(0x1b))]);
    let router = IntxRouter::new(std::array::from_fn(|_| IrqLine::disconnected()));
    let without = PciBus::new("pci.9", &m.memory.space, router, None);
    assert!(without.reserve(None).unwrap().msi().is_none());
}

#[test]
fn interrupt_wires_are_shared() {
    let m = PciMachine::new();
    // Devices 1, 5 and 9 are on one wire.
    let slots: Vec<PciSlot> = [1u8, 5, 9, 2].map(|d| m.slot(d << 3)).into();
    let pins: Vec<_> = slots.iter().map(|s| s.intx_pin()).collect();
    pins[0].set_level(true);
    pins[0].set_level(true);
    pins[1].set_level(true);
    pins[3].set_level(true);
    assert_eq!(m.levels.take(), [(1, true), (2, true)]);
    pins[0].set_level(false);
    assert_eq!((m.levels.take(), m.wires()), (vec![], [false, true, true, false]), "while any is asserted");
    pins[1].set_disabled(true);
    assert_eq!((m.levels.take(), pins[1].is_asserted()), (vec![(1, false)], true));
    pins[1].set_disabled(false);
    pins[1].set_disabled(false);
    pins[2].set_level(true);
    pins[1].set_level(false);
    assert_eq!(m.levels.take(), [(1, true)]);
    pins[2].set_level(false);
    assert_eq!(m.levels.take(), [(1, false)]);
}

#[test]
fn swizzle() {
    // PCI-to-PCI Bridge 1.2 table 9-1.
    for (device, wires) in
        [(0, [0, 1, 2, 3]), (1, [1, 2, 3, 0]), (2, [2, 3, 0, 1]), (3, [3, 0, 1, 2]), (31, [3, 0, 1, 2])]
    {
        assert_eq!([0, 1, 2, 3].map(|pin| IntxRouter::wire(device, pin)), wires, "device {device}");
    }
}

#[test]
fn pins_are_restored_silently() {
    let levels = Levels::new();
    let lines: [IrqLine; 4] = std::array::from_fn(|i| levels.line(i as u32));
    let router = IntxRouter::new(lines.clone());
    let (a, b) = (IntxPin::new(Some(router.clone()), 2), IntxPin::new(Some(router), 2));
    a.restore(true, false);
    b.restore(true, true);
    assert_eq!((levels.take(), lines[2].level()), (vec![], true));
    a.restore(true, false);
    a.set_level(false);
    assert_eq!(levels.take(), [(2, false)], "restored twice is driven once");
    b.set_disabled(false);
    assert_eq!(levels.take(), [(2, true)]);
    b.restore(false, false);
    assert_eq!((levels.take(), lines[2].level()), (vec![], false));
    let loose = IntxPin::new(None, 0);
    loose.set_level(true);
    assert!(loose.is_asserted());
}

#[test]
fn addresses_are_text() {
    for (text, devfn) in [("0", 0), ("1f.7", 0xff), ("0x3", 0x18), ("3.0x1", 0x19), ("a.1", 0x51)] {
        assert_eq!(text.parse(), Ok(DevFn(devfn)), "{text}");
    }
    for bad in ["", ".", "20", "1.8", "x", "1.2.3", "-1", "1.", "+1 "] {
        let e = bad.parse::<DevFn>().unwrap_err().to_string();
        assert!(e.contains("not a PCI address") && !e.contains('\n'), "{e}");
    }
    assert_eq!((DevFn::new(31, 7), DevFn::new(32, 0), DevFn::new(0, 8)), (Some(DevFn(255)), None, None));
}

#[test]
fn random_accesses() {
    let m = PciMachine::new();
    let mut plugged: BTreeMap<u8, Arc<TestFunction>> = BTreeMap::new();
    let mut rng = Rng(25);
    for _ in 0..5000 {
        let devfn = rng.below(24) as u8 + 8;
        match rng.below(20) {
            0 => _ = plugged.entry(devfn).or_insert_with(|| TestFunction::plug(m.slot(devfn))),
            1 => {
                if plugged.remove(&devfn).is_some() {
                    m.gpex.bus().unplug(DevFn(devfn));
                }
            }
            2..12 => m.set_config(devfn, rng.below(0x20) * 4, B4, rng.next() as u32),
            _ => {
                let seen = m.config(devfn, 0, B4);
                assert_eq!(seen != !0, plugged.contains_key(&devfn), "{devfn:#x}");
            }
        }
    }
}
