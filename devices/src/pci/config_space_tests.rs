use super::*;
use crate::testing::Rng;
use crate::testing::pci::{IDS, MMIO32, MMIO64, PIO, PciMachine, TestFunction, WINDOW};
use crate::testing::state::go_on_alike;
use mimus_core::bus::AccessSize::{B1, B2, B4};
use mimus_core::device::lock;

const F: u8 = 3 << 3;

struct Board {
    m: PciMachine,
    f: Arc<TestFunction>,
}

impl Board {
    fn new() -> Self {
        let m = PciMachine::new();
        let f = TestFunction::plug(m.slot(F));
        Self { m, f }
    }

    fn get(&self, offset: u64, size: AccessSize) -> u32 {
        self.m.config(F, offset, size)
    }

    fn set(&self, offset: u64, size: AccessSize, value: u32) {
        self.m.set_config(F, offset, size, value);
    }

    fn command(&self, bits: u16) {
        self.set(4, B2, bits.into());
    }

    /// What a CPU sees at the beginning of where a BAR might be.
    fn seen(&self, addr: u64) -> u32 {
        self.m.read(addr, B4) as u32
    }

    fn saved(&self) -> serde_json::Value {
        serde_json::to_value(lock(&self.f.config).save()).unwrap()
    }

    fn restore(&self, state: serde_json::Value) -> Result<(), String> {
        let state = serde_json::from_value(state).map_err(|e| e.to_string())?;
        let result = lock(&self.f.config).restore(state).map_err(str::to_owned);
        self.m.memory.map.apply_pending();
        result
    }
}

#[test]
fn identification() {
    let b = Board::new();
    assert_eq!(b.get(0, B4), u32::from(IDS.device) << 16 | u32::from(IDS.vendor));
    assert_eq!(b.get(8, B4), IDS.class << 8 | u32::from(IDS.revision));
    assert_eq!(b.get(0x2c, B4), u32::from(IDS.subsystem) << 16 | u32::from(IDS.subsystem_vendor));
    assert_eq!((b.get(0xe, B1), b.get(0x3d, B1)), (0, 1), "header type 0, INTA");
    assert_eq!(b.get(6, B2), 0x10, "has capabilities");
}

#[test]
fn only_what_is_writable_changes() {
    let b = Board::new();
    let before: Vec<u32> = (0..0x400).map(|i| b.get(i * 4, B4)).collect();
    (0..0x400).for_each(|i| b.set(i * 4, B4, !0));
    // PCI 3.0 §6.2: command, cache line size, BARs, interrupt line, control of MSI-X, the function's own.
    let writable = |i: usize| -> u32 {
        match i * 4 {
            0x04 => 0x0547,
            0x0c => 0xff,
            0x10 => 0xffff_f000,
            0x14 => 0xffff_ffe0,
            0x18 => 0xffff_c000,
            0x1c => 0xffff_ffff,
            0x20 => 0xffff_f000,
            0x3c => 0xff,
            0x40 => 0xc000_0000,
            0x4c => 0xf000_0000,
            0x50 => 0xff,
            _ => 0,
        }
    };
    for (i, old) in before.iter().enumerate() {
        assert_eq!(b.get(i as u64 * 4, B4), old | writable(i), "register {:#x}", i * 4);
    }
    (0..0x400).for_each(|i| b.set(i * 4, B4, 0));
    for (i, old) in before.iter().enumerate() {
        assert_eq!(b.get(i as u64 * 4, B4), old & !writable(i), "register {:#x}", i * 4);
    }
}

#[test]
fn capability_list() {
    let b = Board::new();
    let mut at = b.get(0x34, B1);
    let mut found = Vec::new();
    while at != 0 {
        assert!(at & 3 == 0 && at >= 0x40 && found.len() < 10);
        found.push((b.get(at.into(), B1), at));
        at = b.get(u64::from(at) + 1, B1);
    }
    assert_eq!(found, [(0x11, 0x40), (9, 0x4c)]);
    assert_eq!(b.f.capability, 0x4c);
    assert_eq!(b.get(0x42, B2), 2, "three vectors, off");
    assert_eq!((b.get(0x44, B4), b.get(0x48, B4)), (4, 0x800 | 4), "table and pending bits are in BAR 4");
    b.set(0x4e, B2, 0xffff);
    b.set(0x50, B4, 0xffff_ffff);
    assert_eq!(lock(&b.f.config).bytes(0x4e, 5), [1, 0xf2, 0xff, 4, 5]);
    assert!(lock(&b.f.config).bytes(0x100, 1).is_empty());
}

#[test]
fn bar_sizes() {
    let b = Board::new();
    for (at, zeros, flags) in [(0x10, 12, 0), (0x14, 5, 1), (0x18, 14, 0xc), (0x20, 12, 0)] {
        b.set(at, B4, 0xffff_ffff);
        assert_eq!(b.get(at, B4), u32::MAX << zeros | flags, "{at:#x}");
        b.set(at, B4, 0);
        assert_eq!(b.get(at, B4), flags);
    }
    b.set(0x1c, B4, 0xffff_ffff);
    assert_eq!(b.get(0x1c, B4), 0xffff_ffff, "the upper half of 64 bits");
    for none in [0x24, 0x28, 0x30] {
        b.set(none, B4, 0xffff_ffff);
        assert_eq!(b.get(none, B4), 0, "{none:#x}");
    }
}

#[test]
fn memory_bars_move() {
    let b = Board::new();
    b.set(0x10, B4, MMIO32 as u32);
    assert_eq!(b.seen(MMIO32), !0, "memory space is off");
    b.command(command::MEMORY);
    assert_eq!((b.seen(MMIO32 + 8), lock(&b.f.config).bar_address(0)), (8, Some(MMIO32)));
    b.set(0x10, B4, MMIO32 as u32 + 0x5000);
    assert_eq!((b.seen(MMIO32), b.seen(MMIO32 + 0x5004)), (!0, 4));
    b.set(0x11, B1, 0x60);
    assert_eq!((b.seen(MMIO32 + 0x5000), b.seen(MMIO32 + 0x6000)), (!0, 0), "by bytes");
    // Sized while on: nowhere for the moment.
    b.set(0x10, B4, 0xffff_ffff);
    assert_eq!(lock(&b.f.config).bar_address(0), None);
    b.set(0x10, B4, MMIO32 as u32 + 0x5000);
    assert_eq!(b.seen(MMIO32 + 0x5000), 0);
    b.command(0);
    assert_eq!((b.seen(MMIO32 + 0x5000), b.get(0x10, B4)), (!0, MMIO32 as u32 + 0x5000));
    // Outside of the bridge's window nothing is seen.
    b.set(0x10, B4, 0x2000_0000);
    b.command(command::MEMORY);
    assert!(!b.m.memory.read(0x2000_0000, B4).1.is_ok());
    b.set(0x10, B4, (MMIO32 + WINDOW - 0x1000) as u32);
    assert_eq!(b.seen(MMIO32 + WINDOW - 4), 0xffc);
}

#[test]
fn wide_bars_move() {
    let b = Board::new();
    b.command(command::MEMORY);
    b.set(0x18, B4, 0x8000);
    b.set(0x1c, B4, (MMIO64 >> 32) as u32);
    assert_eq!(b.seen(MMIO64 + 0x8010), 2 << 16 | 0x10);
    b.set(0x1c, B4, 0);
    b.set(0x18, B4, MMIO32 as u32);
    assert_eq!((b.seen(MMIO64 + 0x8010), b.seen(MMIO32 + 0x10)), (!0, 2 << 16 | 0x10), "below 4 GiB, too");
    b.set(0x1c, B4, 0xffff_ffff);
    b.set(0x18, B4, 0xffff_ffff);
    assert_eq!(lock(&b.f.config).bar_address(2), None);
}

#[test]
fn port_bars_move() {
    let b = Board::new();
    b.set(0x14, B4, 0x1040);
    b.command(command::MEMORY);
    assert_eq!(b.seen(PIO + 0x1040), !0, "ports have a bit of their own");
    b.command(command::IO);
    assert_eq!((b.get(0x14, B4), b.seen(PIO + 0x1044)), (0x1041, 1 << 16 | 4));
    b.set(0x14, B4, 0xffe0);
    assert_eq!((b.seen(PIO + 0x1040), b.seen(PIO + 0xffe0)), (!0, 1 << 16), "the last ports");
    b.set(0x14, B4, 0x1_0000);
    assert_eq!(lock(&b.f.config).bar_address(1), None, "beyond the port space");
}

#[test]
fn two_bars_at_one_place() {
    let b = Board::new();
    b.command(command::MEMORY);
    b.set(0x10, B4, MMIO32 as u32);
    b.set(0x18, B4, MMIO32 as u32);
    // Which one answers is not defined, but one does, and moving one away shows the other.
    assert!([0, 2 << 16].contains(&b.seen(MMIO32)));
    b.set(0x18, B4, MMIO32 as u32 + 0x1_0000);
    assert_eq!((b.seen(MMIO32), b.seen(MMIO32 + 0x1_0000)), (0, 2 << 16));
}

#[test]
fn bus_mastering() {
    let b = Board::new();
    let gate = b.f.slot.dma_gate();
    assert!(!gate.is_open());
    b.command(command::BUS_MASTER);
    assert!(gate.is_open());
    b.set(4, B1, 0);
    assert!(!gate.is_open());
    b.set(5, B1, 0xff);
    assert!(!gate.is_open(), "the upper byte has another bit");
}

#[test]
fn interrupt_status_and_disable() {
    let b = Board::new();
    let pin = b.f.slot.intx_pin();
    assert_eq!(b.m.wires(), [false; 4]);
    pin.set_level(true);
    // Device 3's INTA is the fourth wire.
    assert_eq!((b.m.wires(), b.get(6, B2)), ([false, false, false, true], 0x18));
    assert_eq!(b.get(4, B4) >> 16, 0x18, "in a wider read, too");
    b.command(command::INTX_DISABLE);
    assert_eq!((b.m.wires(), b.get(6, B1)), ([false; 4], 0x18), "the status bit stays (§6.2.3)");
    b.command(0);
    assert!(b.m.wires()[3]);
    b.set(6, B2, 0xffff);
    assert_eq!(b.get(6, B2), 0x18, "not cleared by writing");
    pin.set_level(false);
    assert_eq!((b.m.wires(), b.get(6, B2)), ([false; 4], 0x10));
}

#[test]
fn error_bits_are_cleared_by_ones() {
    let b = Board::new();
    let mut state = b.saved();
    state["registers"][7] = 0xf9.into();
    b.restore(state).unwrap();
    assert_eq!(b.get(6, B2), 0xf910);
    b.set(6, B2, 0x2000);
    assert_eq!(b.get(6, B2), 0xd910);
    b.set(4, B4, 0xffff_0000);
    assert_eq!(b.get(6, B2), 0x10);
}

#[test]
fn reset() {
    let b = Board::new();
    b.set(0x10, B4, MMIO32 as u32);
    b.set(0x3c, B1, 0x55);
    b.command(0x547);
    b.set(0x40, B4, 0xc000_0000);
    b.f.slot.intx_pin().set_level(true);
    assert!(b.f.msix.is_enabled());
    lock(&b.f.config).reset();
    b.m.memory.map.apply_pending();
    assert_eq!((b.get(4, B2), b.get(0x10, B4), b.get(0x3c, B1), b.get(0x42, B2)), (0, 0, 0, 2));
    assert_eq!((b.seen(MMIO32), b.f.slot.dma_gate().is_open(), b.f.msix.is_enabled()), (!0, false, false));
}

#[test]
fn saved_in_the_middle() {
    let b = Board::new();
    b.set(0x10, B4, MMIO32 as u32);
    b.set(0x18, B4, 0x4000);
    b.set(0x1c, B4, (MMIO64 >> 32) as u32);
    b.set(0x14, B4, 0x200);
    b.command(command::MEMORY | command::BUS_MASTER | command::IO);
    b.set(0x42, B2, 0x8000);
    b.f.msix.notify(1);
    b.f.slot.intx_pin().set_level(true);
    let c = Board::new();
    // Somewhere else before.
    c.set(0x10, B4, MMIO32 as u32 + 0x1000);
    c.command(command::MEMORY | command::INTX_DISABLE);
    c.m.levels.take();
    c.restore(b.saved()).unwrap();
    assert_eq!(c.saved(), b.saved());
    assert_eq!((c.m.levels.take(), c.m.wires()), (vec![], b.m.wires()), "the controller restores its own inputs");
    assert!(c.f.slot.dma_gate().is_open() && c.f.msix.is_enabled());
    assert_eq!(c.m.messages.take(), []);
    assert_eq!((c.seen(MMIO32), c.seen(MMIO32 + 0x1000), c.seen(PIO + 0x200)), (0, !0, 1 << 16));
    go_on_alike(&b, &c, 5000, random_step);
    assert_eq!(b.saved(), c.saved());
}

fn random_step(b: &Board, rng: &mut Rng) -> (u32, [bool; 4]) {
    let size = [B1, B2, B4][rng.below(3) as usize];
    let range = if rng.below(4) == 0 { 0x1000 } else { 0x60 };
    let at = rng.below(range) & !(size.bytes() - 1);
    let mut seen = 0;
    match rng.below(6) {
        0 => b.set([0x10, 0x14, 0x18, 0x20][rng.below(4) as usize], B4, (MMIO32 + rng.below(0x10) * 0x1000) as u32),
        1 => b.set(0x1c, B4, (rng.below(2) * (MMIO64 >> 32)) as u32),
        2 => b.set(at, size, rng.next() as u32),
        3 => seen = b.get(at, size),
        4 => {
            // Two BARs at one place may answer in either order.
            let at = rng.below(0x10) * 0x1000;
            seen = (b.seen(MMIO32 + at) == !0).into();
        }
        _ => b.f.slot.intx_pin().set_level(rng.below(2) == 0),
    }
    (seen, b.m.wires())
}

#[test]
fn damaged_states() {
    let b = Board::new();
    b.command(command::MEMORY);
    b.set(0x42, B2, 0x8000);
    let good = b.saved();
    let refused = |path: &str, value: serde_json::Value| {
        let mut bad = good.clone();
        *bad.pointer_mut(path).unwrap() = value;
        let error = b.restore(bad).unwrap_err();
        assert_eq!(b.saved(), good, "{path}: {error}");
    };
    refused("/registers/0", 1.into());
    refused("/registers/14", 0x80.into());
    refused("/registers/65", 0.into());
    refused("/registers/255", 1.into());
    refused("/registers/4", 8.into());
    refused("/registers", vec![0; 255].into());
    refused("/registers", vec![0; 257].into());
    refused("/registers/3", 256.into());
    refused("/msix", serde_json::Value::Null);
    refused("/msix/pending", vec![false; 2].into());
    refused("/msix/entries/2", serde_json::Value::Null);
    refused("/msix/entries/2/control", 2.into());
    refused("/msix/entries/2/address", 1.into());
    refused("/msix/enabled", false.into());
    refused("/msix/masked", true.into());
    refused("/intx_asserted", 1.into());
    let plain = ConfigSpace::new(IDS, &b.m.slot(0x20), true).save();
    refused("/registers", serde_json::to_value(plain).unwrap()["registers"].clone());
    // Random bytes in the registers.
    let mut rng = Rng(19);
    for _ in 0..2000 {
        let mut bad = good.clone();
        for _ in 0..=rng.below(3) {
            bad["registers"][rng.below(0x60) as usize] = rng.below(256).into();
        }
        if b.restore(bad).is_ok() {
            (0..10).for_each(|_| _ = random_step(&b, &mut rng));
        }
    }
}

#[test]
fn random_accesses() {
    let b = Board::new();
    let mut rng = Rng(21);
    (0..30_000).for_each(|_| _ = random_step(&b, &mut rng));
    lock(&b.f.config).reset();
    b.f.slot.intx_pin().set_level(false);
    assert_eq!((b.get(4, B4), b.m.wires()), (0x10_0000, [false; 4]));
}
