use super::*;
use crate::acpi::pm::{AcpiPm, ICH9, PIIX4, PM_TIMER, PmLayout, PmLines};
use crate::pci::bus::PciBus;
use crate::pci::{DevFn, IntxRouter};
use crate::testing::{Bench, Levels, assert_snapshot_round_trip, reset};
use mimus_core::bus::{AccessSize, GuestPhys, MemTxAttrs, PioSpace};
use mimus_core::irq::IrqLine;
use mimus_core::memory::{AddressSpace, MemoryMap};
use mimus_core::snapshot::Snapshot as _;

const A: MemTxAttrs = MemTxAttrs::vcpu(0);
/// Pins of [`Levels`] for I/O APIC inputs.
const DIRECT: u32 = 100;

struct Pc {
    bench: Bench,
    levels: Arc<Levels>,
    system: Arc<AddressSpace>,
    pio: Arc<PioSpace>,
    bus: Arc<PciBus>,
    pirqs: Arc<PirqRouter>,
    pirq_lines: Vec<IrqLine>,
    pm: Arc<Mutex<AcpiPm>>,
}

impl Pc {
    fn new(count: usize, layout: PmLayout) -> Self {
        let (bench, levels) = (Bench::new(), Levels::new());
        let map = MemoryMap::new();
        let system = map.address_space("system", &MemoryRegion::container("system", u64::MAX));
        let pio = PioSpace::new(&map);
        let isa = (0..16).map(|n| levels.line(n)).collect();
        let direct = (0..8).map(|n| levels.line(DIRECT + n)).collect();
        let pirqs = PirqRouter::new(count, isa, if count == 8 { direct } else { Vec::new() });
        let pirq_lines = pirqs.inputs::<8>()[..count].to_vec();
        let router = IntxRouter::with_map(pirq_lines.clone(), |_, _| 0);
        let bus = PciBus::new("pci.0", &system, router, None);
        map.change(|t| {
            t.map(pio.root(), 0, bus.io());
        });
        let lines = PmLines { sci: IrqLine::disconnected(), smi: None, power_off: Box::new(|| {}), suspend: None };
        let pm = AcpiPm::new(layout, lines, bench.timer());
        Pc { bench, levels, system, pio, bus, pirqs, pirq_lines, pm }
    }

    fn ich9() -> (Self, Arc<Ich9Lpc>) {
        let pc = Self::new(ich9::PIRQS, ICH9);
        let lpc = Ich9Lpc::new(&pc.bus, pc.system.root(), &pc.pirqs, &pc.pm).unwrap();
        (pc, lpc)
    }

    fn piix() -> (Self, Arc<Piix3>, Arc<Piix4Pm>) {
        let pc = Self::new(piix::PIRQS, PIIX4);
        let isa = Piix3::new(&pc.bus, &pc.pirqs).unwrap();
        let power = Piix4Pm::new(&pc.bus, &pc.pm, false).unwrap();
        (pc, isa, power)
    }

    fn get(&self, f: DevFn, at: u16) -> u32 {
        self.bus.config_read(f, at, AccessSize::B4)
    }

    /// As a host bridge does, which the port space follows with map changes.
    fn set(&self, f: DevFn, at: u16, size: AccessSize, value: u32) {
        self.bus.config_write(f, at, size, value);
        self.system.map().apply_pending();
    }

    fn set8(&self, f: DevFn, at: u16, value: u8) {
        self.set(f, at, AccessSize::B1, value.into());
    }

    fn port(&self, port: u16) -> u32 {
        self.pio.read(port, AccessSize::B4, A) as u32
    }
}

/// PIRQs of either bridge.
fn routing(pc: &Pc, f: DevFn, at: u16) {
    let direct = |n: u32, level| if pc.pirq_lines.len() == 8 { vec![(DIRECT + n, level)] } else { vec![] };
    pc.pirq_lines[0].raise();
    assert_eq!(pc.levels.take(), direct(0, true), "not routed");
    pc.set8(f, at, 11);
    assert_eq!(pc.levels.take(), [(11, true)]);
    pc.set8(f, at, 10);
    assert_eq!(pc.levels.take(), [(10, true), (11, false)]);
    pc.set8(f, at + 1, 10);
    pc.pirq_lines[1].raise();
    pc.pirq_lines[0].lower();
    assert_eq!(pc.levels.take(), [direct(1, true), direct(0, false)].concat(), "shared with B");
    pc.pirq_lines[1].lower();
    assert_eq!(pc.levels.take(), [vec![(10, false)], direct(1, false)].concat());
    for not_routable in [0, 1, 2, 8, 13, 0x8b] {
        pc.set8(f, at, not_routable);
        pc.pirq_lines[0].raise();
        pc.pirq_lines[0].lower();
        assert_eq!(pc.levels.take(), [direct(0, true), direct(0, false)].concat(), "{not_routable}");
    }
    pc.set8(f, at, 0xff);
    assert_eq!(pc.get(f, at) & 0xff, 0x8f);
}

#[test]
fn ich9_routes_interrupts() {
    let (pc, lpc) = Pc::ich9();
    assert_eq!((pc.get(ich9::DEVICE, 0), pc.get(ich9::DEVICE, 8)), (0x2918_8086, 0x0601_0002));
    assert_eq!((pc.get(ich9::DEVICE, 0x60), pc.get(ich9::DEVICE, 0x68)), (0x8080_8080, 0x8080_8080));
    routing(&pc, ich9::DEVICE, 0x60);
    routing(&pc, ich9::DEVICE, 0x60);
    pc.set8(ich9::DEVICE, 0x6b, 5);
    pc.pirq_lines[7].raise();
    assert_eq!(pc.levels.take(), [(5, true), (DIRECT + 7, true)]);
    let (other, copy) = Pc::ich9();
    assert_snapshot_round_trip(&*lpc, &*copy);
    assert_eq!(other.levels.take(), [], "restoring is silent");
    other.set8(ich9::DEVICE, 0x6b, 0x80);
    assert_eq!(other.levels.take(), [(5, false)]);
    reset(&*lpc);
    assert_eq!(pc.levels.take(), [(5, false)]);
}

#[test]
fn ich9_places_power_management() {
    let (pc, lpc) = Pc::ich9();
    let f = ich9::DEVICE;
    assert_eq!(pc.get(f, 0x40), 1);
    pc.set(f, 0x40, AccessSize::B4, 0x0000_0601);
    assert_eq!((pc.get(f, 0x40), pc.port(0x608)), (0x601, u32::MAX), "not enabled");
    pc.set8(f, 0x44, 0x80);
    pc.bench.advance(1_000_000_000);
    assert_eq!(pc.port(0x600 + PM_TIMER as u16), 3_579_545);
    pc.set(f, 0x40, AccessSize::B4, 0xffff_ffff);
    assert_eq!((pc.get(f, 0x40), pc.port(0x608), pc.port(0xff88)), (0xff81, u32::MAX, 3_579_545));
    let (other, copy) = Pc::ich9();
    assert_snapshot_round_trip(&*lpc, &*copy);
    other.system.map().apply_pending();
    assert_eq!(other.port(0xff88), 0);
    reset(&*lpc);
    pc.system.map().apply_pending();
    assert_eq!(pc.port(0xff88), u32::MAX);
}

#[test]
fn ich9_locks_smis() {
    let (pc, lpc) = Pc::ich9();
    pc.bus.config_write(ich9::DEVICE, 0xa0, AccessSize::B2, 0x0210);
    pc.bus.config_write(ich9::DEVICE, 0xa0, AccessSize::B2, 0);
    assert_eq!(pc.get(ich9::DEVICE, 0xa0) & 0xffff, 0x10, "SMI_LOCK stays");
    reset(&*lpc);
    assert_eq!(pc.get(ich9::DEVICE, 0xa0) & 0xffff, 0);
}

#[test]
fn ich9_chip_set_registers() {
    let (pc, lpc) = Pc::ich9();
    let read = |at| pc.system.read(GuestPhys(at), AccessSize::B4, A).0 as u32;
    pc.set(ich9::DEVICE, 0xf0, AccessSize::B4, 0xfed1_ffff);
    assert_eq!(pc.get(ich9::DEVICE, 0xf0), 0xfed1_c001);
    assert_eq!((read(0xfed1_c000 + 0x3140), read(0xfed1_c000 + 0x3404)), (0x3210_3210, 0x80));
    let _ = pc.system.write(GuestPhys(0xfed1_c000 + 0x3410), AccessSize::B2, 0xabcd, A);
    let _ = pc.system.write(GuestPhys(0xfed1_c000), AccessSize::B4, 1, A);
    assert_eq!((read(0xfed1_c000 + 0x3410), read(0xfed1_c000), read(0xfed1_c000 + 0x3ffc)), (0xabcd, 0, 0));
    let (other, copy) = Pc::ich9();
    assert_snapshot_round_trip(&*lpc, &*copy);
    other.system.map().apply_pending();
    assert_eq!(other.system.read(GuestPhys(0xfed1_c000 + 0x3411), AccessSize::B1, A).0, 0xab);
    let mut bad = lpc.save().unwrap();
    bad.body.pop();
    assert!(lpc.restore(&bad).is_err());
}

#[test]
fn piix_routes_interrupts() {
    let (pc, isa, _power) = Pc::piix();
    assert_eq!(pc.get(piix::ISA, 0), 0x7000_8086);
    assert_eq!(pc.get(piix::ISA, 0x0c) >> 16 & 0xff, 0x80, "more functions");
    routing(&pc, piix::ISA, 0x60);
    pc.set8(piix::ISA, 0x63, 5);
    pc.pirq_lines[3].raise();
    assert_eq!(pc.levels.take(), [(5, true)]);
    let (other, copy, _) = Pc::piix();
    assert_snapshot_round_trip(&*isa, &*copy);
    assert_eq!(other.levels.take(), []);
    reset(&*copy);
    assert_eq!(other.levels.take(), [(5, false)]);
}

#[test]
fn piix4_places_power_management() {
    let (pc, _isa, power) = Pc::piix();
    let f = piix::POWER;
    assert_eq!((pc.get(f, 0), pc.get(f, 8) >> 8), (0x7113_8086, 0x06_8000));
    assert_eq!((pc.get(f, 0x3c) >> 8, pc.get(f, 0x58)), (1, APMC), "no SMM");
    pc.set(f, 0x40, AccessSize::B4, 0xb001);
    pc.set8(f, 0x80, 0xff);
    assert_eq!((pc.get(f, 0x80), pc.port(0xb008)), (1, 0));
    let (other, _other_isa, copy) = Pc::piix();
    assert_snapshot_round_trip(&*power, &*copy);
    other.system.map().apply_pending();
    assert_eq!(other.port(0xb008), 0);
    pc.set8(f, 0x80, 0);
    assert_eq!(pc.port(0xb008), u32::MAX);
    reset(&*copy);
    other.system.map().apply_pending();
    assert_eq!(other.port(0xb008), u32::MAX);
}

const APMC: u32 = 1 << 25;
