use super::*;
use crate::testing::{Bench, Levels, Rng, assert_round_trip, mmio, reset, restore_with, saved};
use mimus_core::bus::{MemTxResult, Requester};
use mimus_core::device::MmioDevice;
use mimus_core::irq::IrqController;

const MS: u64 = 1_000_000;
/// Inputs 8, 20 to 23.
const ROUTABLE: u32 = 0x00f0_0100;
/// Pins of the lines of [`Levels`] besides the inputs.
const IRQ0: u32 = 100;
const IRQ8: u32 = 108;
const REPLACE: u32 = 200;

#[derive(Default)]
struct Messages(Mutex<Vec<(u64, u32)>>);

impl IrqController for Messages {
    fn set_input(&self, _: u32, _: bool) {}
    fn msi(&self, address: u64, data: u32, _: Requester) -> MemTxResult {
        lock(&self.0).push((address, data));
        MemTxResult::Ok
    }
}

struct Pc {
    bench: Bench,
    levels: Arc<Levels>,
    messages: Arc<Messages>,
    hpet: Arc<Mutex<Hpet>>,
}

impl Pc {
    fn new() -> Self {
        let (bench, levels, messages) = (Bench::new(), Levels::new(), Arc::new(Messages::default()));
        let lines = HpetLines {
            inputs: (0..24).map(|n| levels.line(n)).collect(),
            routable: ROUTABLE,
            irq0: levels.line(IRQ0),
            irq8: levels.line(IRQ8),
            replace: [levels.line(REPLACE), levels.line(REPLACE + 1)],
            fsb: Some(MsiTarget::new(messages.clone(), Requester::Unspecified)),
        };
        let hpet = Hpet::new(3, lines, bench.timer());
        Pc { bench, levels, messages, hpet }
    }

    fn r(&self, at: u64) -> u64 {
        self.hpet.mmio_read(mmio(0, at, AccessSize::B8)).unwrap()
    }

    fn w(&self, at: u64, value: u64) {
        self.hpet.mmio_write(mmio(0, at, AccessSize::B8), value).unwrap();
    }

    fn w32(&self, at: u64, value: u32) {
        self.hpet.mmio_write(mmio(0, at, AccessSize::B4), value.into()).unwrap();
    }

    /// Timer `n` on input `route`, and the counter running from 0.
    fn setup(&self, n: u64, config: u64, route: u64) {
        self.w(config_at(n), config | INT_ENABLE | route << ROUTE_SHIFT);
        self.w(CONFIGURATION, ENABLE);
    }
}

fn config_at(n: u64) -> u64 {
    TIMERS + n * TIMER_STRIDE
}

fn comparator_at(n: u64) -> u64 {
    config_at(n) + TIMER_COMPARATOR
}

#[test]
fn capabilities() {
    let pc = Pc::new();
    assert_eq!(pc.r(CAPABILITIES), 10_000_000 << 32 | 0x8086_a201);
    assert_eq!(block_id(3), 0x8086_a201);
    pc.w(CAPABILITIES, 0);
    assert_eq!(pc.hpet.mmio_read(mmio(0, 4, AccessSize::B4)).unwrap(), 10_000_000);
    for n in 0..3 {
        assert_eq!(pc.r(config_at(n)), 0x00f0_0100_0000_8030);
        assert_eq!(pc.r(comparator_at(n)), u64::MAX);
    }
    assert_eq!(pc.r(config_at(3)), 0, "there are three");
    pc.w(config_at(0), u64::MAX);
    assert_eq!(pc.r(config_at(0)), 0x00f0_0100_0000_c17e, "route 31 does not exist");
    pc.w(config_at(0), 21 << ROUTE_SHIFT);
    assert_eq!(pc.r(config_at(0)) & ROUTE, 21 << ROUTE_SHIFT);
}

#[test]
fn the_counter_counts_and_stands() {
    let pc = Pc::new();
    pc.bench.advance(MS);
    assert_eq!(pc.r(COUNTER), 0);
    pc.w(COUNTER, 0xffff_fff0);
    pc.w(CONFIGURATION, ENABLE);
    pc.bench.advance(320);
    assert_eq!(pc.r(COUNTER), 0x1_0000_0010);
    assert_eq!(pc.hpet.mmio_read(mmio(0, COUNTER + 4, AccessSize::B4)).unwrap(), 1);
    pc.w(CONFIGURATION, 0);
    pc.bench.advance(MS);
    assert_eq!(pc.r(COUNTER), 0x1_0000_0010);
    pc.w32(COUNTER + 4, 0xffff_ffff);
    pc.w(CONFIGURATION, ENABLE);
    pc.bench.advance(10);
    assert_eq!(pc.r(COUNTER), 0xffff_ffff_0000_0011);
}

#[test]
fn one_shot() {
    let pc = Pc::new();
    pc.setup(0, 0, 20);
    pc.w(comparator_at(0), 1000);
    pc.bench.advance(9_999);
    assert_eq!(pc.levels.take(), []);
    pc.bench.advance(1);
    assert_eq!(pc.levels.take(), [(20, true), (20, false)]);
    assert_eq!(pc.r(STATUS), 0);
    pc.bench.advance(100_000 * MS);
    assert_eq!(pc.levels.take(), []);
    pc.w(comparator_at(0), pc.r(COUNTER) - 1);
    pc.bench.advance(100_000 * MS);
    assert_eq!(pc.levels.take(), [], "too late: software must look");
    pc.w(comparator_at(0), pc.r(COUNTER));
    assert_eq!(pc.levels.rises(20), 1, "just in time");
}

#[test]
fn one_shot_of_32_bits_wraps() {
    let pc = Pc::new();
    pc.w(COUNTER, 5 << 32 | 0xffff_ff00);
    pc.setup(1, MODE_32, 21);
    pc.w(comparator_at(1), 0x77_0000_0100);
    assert_eq!(pc.r(comparator_at(1)), 0x100);
    pc.bench.advance(0x200 * TICK_NS);
    assert_eq!(pc.levels.rises(21), 1);
    pc.bench.advance((1 << 32) * TICK_NS - 1);
    assert_eq!(pc.levels.rises(21), 0);
    pc.bench.advance(1);
    assert_eq!(pc.levels.rises(21), 1, "once each time around");
}

#[test]
fn periodic_as_linux_sets_it_up() {
    let pc = Pc::new();
    pc.w(CONFIGURATION, ENABLE);
    pc.bench.advance(123_450);
    pc.w32(config_at(0), (PERIODIC | VAL_SET | MODE_32 | INT_ENABLE | 20 << ROUTE_SHIFT) as u32);
    let first = pc.r(COUNTER) as u32 + 100_000;
    pc.w32(comparator_at(0), first);
    pc.w32(comparator_at(0), 100_000);
    assert_eq!(pc.r(comparator_at(0)), u64::from(first), "the second write is the period");
    for _ in 0..1000 {
        pc.bench.advance(MS - 1);
        assert_eq!(pc.levels.take(), []);
        pc.bench.advance(1);
        assert_eq!(pc.levels.rises(20), 1);
    }
    assert_eq!(pc.r(comparator_at(0)), u64::from(first) + 100_000_000);
    pc.w(config_at(0), 0);
    pc.bench.advance(10 * MS);
    assert_eq!(pc.levels.take(), []);
}

#[test]
fn short_periods_are_merged() {
    let pc = Pc::new();
    pc.setup(0, PERIODIC | VAL_SET, 20);
    pc.w(comparator_at(0), 1);
    pc.bench.advance(10 * MS);
    let rises = pc.levels.rises(20);
    assert!((400..=502).contains(&rises), "{rises}");
    assert_eq!(pc.r(comparator_at(0)), pc.r(COUNTER) + 1);
}

#[test]
fn level_triggered() {
    let pc = Pc::new();
    pc.setup(2, LEVEL, 22);
    pc.setup(1, LEVEL, 22);
    pc.w(comparator_at(2), 10);
    pc.w(comparator_at(1), 20);
    pc.bench.advance(1000);
    assert_eq!(pc.levels.take(), [(22, true)]);
    assert_eq!(pc.r(STATUS), 6);
    pc.w(STATUS, 4);
    assert_eq!(pc.levels.take(), [], "shared with timer 1");
    pc.w(STATUS, 2);
    assert_eq!(pc.levels.take(), [(22, false)]);
    pc.w(config_at(2), LEVEL | 22 << ROUTE_SHIFT);
    pc.w(comparator_at(2), 200);
    pc.bench.advance(2000);
    assert_eq!(pc.r(STATUS), 4, "status is set without the interrupt");
    assert_eq!(pc.levels.take(), []);
    pc.w(config_at(2), LEVEL | INT_ENABLE | 23 << ROUTE_SHIFT);
    assert_eq!(pc.levels.take(), [(23, true)]);
    pc.w(config_at(2), LEVEL | INT_ENABLE | 20 << ROUTE_SHIFT);
    assert_eq!(pc.levels.take(), [(23, false), (20, true)]);
    pc.w(CONFIGURATION, 0);
    assert_eq!(pc.levels.take(), [(20, false)]);
    assert_eq!(pc.r(STATUS), 4, "section 2.3.6: software clears it");
}

#[test]
fn legacy_replacement() {
    let pc = Pc::new();
    pc.w(CONFIGURATION, LEGACY);
    assert_eq!(pc.levels.take(), []);
    for n in 0..3 {
        pc.w(config_at(n), INT_ENABLE | 20 << ROUTE_SHIFT);
        pc.w(comparator_at(n), 100);
    }
    pc.w(CONFIGURATION, LEGACY | ENABLE);
    assert_eq!(pc.levels.take(), [(REPLACE, true), (REPLACE + 1, true)]);
    pc.bench.advance(1000);
    let e = [(IRQ0, true), (IRQ0, false), (IRQ8, true), (IRQ8, false), (20, true), (20, false)];
    assert_eq!(pc.levels.take(), e);
    reset(&*pc.hpet);
    assert_eq!(pc.levels.take(), [(REPLACE, false), (REPLACE + 1, false)]);
}

#[test]
fn messages() {
    let pc = Pc::new();
    pc.setup(0, FSB_ENABLE, 20);
    pc.w(config_at(0) + TIMER_FSB, 0xfee0_1000_0000_4041);
    pc.w(comparator_at(0), 100);
    pc.bench.advance(1000);
    assert_eq!(*lock(&pc.messages.0), [(0xfee0_1000, 0x4041)]);
    assert_eq!(pc.levels.take(), []);
}

#[test]
fn saved_and_restored() {
    let pc = Pc::new();
    pc.setup(0, PERIODIC | VAL_SET, 20);
    pc.w(comparator_at(0), 100_000);
    pc.setup(1, LEVEL, 21);
    pc.w(comparator_at(1), 10);
    pc.bench.advance(2_500_000);
    let other = Pc::new();
    other.bench.advance(2_500_000);
    assert_round_trip(&pc.hpet, &other.hpet);
    assert_eq!(other.levels.take(), [], "restoring is silent");
    mimus_core::device::Lifecycle::start(&*other.hpet);
    other.bench.advance(500_000);
    assert_eq!(other.levels.take(), [(20, true), (20, false)]);
    other.w(STATUS, 2);
    assert_eq!(other.levels.take(), [(21, false)]);
    for (pointer, value) in [("/config", 4), ("/status", 8), ("/timers/0/config", 1)] {
        assert!(restore_with(&other.hpet, pointer, value).is_err(), "{pointer}");
    }
    assert!(restore_with(&other.hpet, "/config", 0).is_err());
    let one = saved(&other.hpet)["timers"][0].clone();
    assert!(restore_with(&other.hpet, "/timers", vec![one]).is_err());
}

#[test]
fn random_accesses() {
    let mut rng = Rng(1);
    let pc = Pc::new();
    for _ in 0..20_000 {
        let size = if rng.below(2) == 0 { AccessSize::B4 } else { AccessSize::B8 };
        let at = [0, 0x10, 0x20, 0xf0, 0x100 + rng.below(0x80)][rng.below(5) as usize] & !(size.bytes() - 1);
        let value = rng.next() >> rng.below(64);
        pc.hpet.mmio_write(mmio(0, at, size), value).unwrap();
        pc.hpet.mmio_read(mmio(0, at, size)).unwrap();
        pc.bench.advance(rng.below(10_000));
        let other = Pc::new();
        other.bench.advance(pc.bench.clock.now());
        assert_round_trip(&pc.hpet, &other.hpet);
    }
}
