use super::*;
use crate::testing::memory::{OnBus, any_size};
use crate::testing::state::{go_on_alike, restore_damaged};
use crate::testing::{Bench, Rng, assert_round_trip, mmio, read32, reset, restore_with, saved, write32};
use mimus_core::accel::VcpuIndex;
use mimus_core::accel::null::NullHandle;
use mimus_core::device::{Lifecycle, MmioDevice, lock};

const TICK: u64 = 100;

struct Board {
    bench: Bench,
    harts: Vec<Arc<NullHandle>>,
    aclint: Arc<Mutex<Aclint>>,
}

impl Board {
    fn new(count: u32) -> Self {
        let bench = Bench::new();
        let harts: Vec<_> = (0..count).map(|i| NullHandle::new(VcpuIndex(i))).collect();
        let handles = harts.iter().map(|h| h.clone() as Arc<dyn VcpuHandle>).collect();
        let timers = harts.iter().map(|_| bench.timer()).collect();
        let aclint = Aclint::new(handles, timers, TICK);
        Self { bench, harts, aclint }
    }

    fn get64(&self, offset: u64) -> u64 {
        self.aclint.mmio_read(mmio(0, offset, AccessSize::B8)).unwrap()
    }

    fn set64(&self, offset: u64, value: u64) {
        self.aclint.mmio_write(mmio(0, offset, AccessSize::B8), value).unwrap();
    }

    fn set_deadline(&self, hart: u64, ticks: u64) {
        self.set64(MTIMECMP + hart * 8, ticks);
    }

    /// Goes on by `ticks`.
    fn tick(&self, ticks: u64) {
        self.bench.advance(ticks * TICK);
    }

    /// Software and timer interrupt of each hart.
    fn pins(&self) -> Vec<(bool, bool)> {
        self.harts.iter().map(|h| (h.pin(CpuPin::Msip), h.pin(CpuPin::Mtip))).collect()
    }

    fn timer_pins(&self) -> Vec<bool> {
        self.pins().iter().map(|p| p.1).collect()
    }
}

#[test]
fn software_interrupts() {
    let b = Board::new(3);
    write32(&*b.aclint, 0, 4, 0xffff_ffff);
    assert_eq!(read32(&*b.aclint, 0, 4), 1, "bits 31 to 1 are zero");
    assert_eq!(b.pins(), [(false, false), (true, false), (false, false)]);
    write32(&*b.aclint, 1, 4, 0xffff_fffe);
    assert_eq!((read32(&*b.aclint, 0, 4), b.pins()[1].0), (0, false));
    // Two registers in one access.
    b.set64(0, 1 << 32 | 1);
    assert_eq!((b.get64(0), b.get64(8)), (1 << 32 | 1, 0));
    assert_eq!(b.pins(), [(true, false), (true, false), (false, false)]);
    // Harts that do not exist.
    b.set64(8, !0);
    write32(&*b.aclint, 0, 0x3ffc, 1);
    assert_eq!((b.get64(8), read32(&*b.aclint, 0, 12), read32(&*b.aclint, 0, 0x3ffc)), (1, 0, 0));
}

#[test]
fn time_runs() {
    let b = Board::new(1);
    assert_eq!(b.get64(MTIME), 0);
    b.bench.advance(TICK - 1);
    assert_eq!(b.get64(MTIME), 0);
    b.bench.advance(1);
    assert_eq!(b.get64(MTIME), 1);
    b.tick((1 << 32) - 1);
    assert_eq!((read32(&*b.aclint, 0, MTIME), read32(&*b.aclint, 0, MTIME + 4)), (0, 1));
}

#[test]
fn timer_interrupts() {
    let b = Board::new(2);
    assert_eq!(b.get64(MTIMECMP), u64::MAX);
    b.set_deadline(0, 10);
    b.set_deadline(1, 20);
    b.tick(9);
    assert_eq!(b.timer_pins(), [false, false]);
    b.tick(1);
    assert_eq!(b.timer_pins(), [true, false], "at mtime >= mtimecmp");
    b.tick(10);
    assert_eq!(b.timer_pins(), [true, true]);
    b.set_deadline(0, 21);
    assert_eq!(b.timer_pins(), [false, true], "lowered by a later deadline only");
    b.set_deadline(1, 20);
    assert_eq!(b.timer_pins(), [false, true], "in the past: pending at once");
    b.set_deadline(1, 0);
    assert!(b.timer_pins()[1]);
    b.set_deadline(1, u64::MAX);
    b.tick(1);
    assert_eq!(b.timer_pins(), [true, false]);
    // Beyond the clock's range: never.
    b.set_deadline(0, u64::MAX / 2);
    b.tick(1 << 40);
    assert_eq!(b.timer_pins(), [false, false]);
}

#[test]
fn a_deadline_in_halves() {
    let b = Board::new(1);
    b.tick(100);
    // The privileged specification's sequence: no interrupt in between.
    write32(&*b.aclint, 0, MTIMECMP, 0xffff_ffff);
    write32(&*b.aclint, 0, MTIMECMP + 4, 0);
    assert!(!b.timer_pins()[0]);
    write32(&*b.aclint, 0, MTIMECMP, 150);
    assert_eq!(b.get64(MTIMECMP), 150);
    assert!(!b.timer_pins()[0]);
    b.tick(50);
    assert!(b.timer_pins()[0]);
    write32(&*b.aclint, 0, MTIMECMP + 4, 1);
    assert_eq!((b.timer_pins()[0], b.get64(MTIMECMP)), (false, 1 << 32 | 150));
    assert_eq!(read32(&*b.aclint, 0, MTIMECMP + 4), 1);
    // No such hart.
    b.set64(MTIMECMP + 8, 5);
    assert_eq!(b.get64(MTIMECMP + 8), 0);
}

#[test]
fn time_is_written() {
    let b = Board::new(2);
    b.set_deadline(0, 1000);
    b.set_deadline(1, 2000);
    b.set64(MTIME, 1990);
    assert_eq!((b.get64(MTIME), b.timer_pins()), (1990, vec![true, false]));
    b.tick(9);
    assert!(!b.timer_pins()[1]);
    b.tick(1);
    assert!(b.timer_pins()[1]);
    b.set64(MTIME, 990);
    assert_eq!(b.timer_pins(), [false, false], "back");
    b.tick(10);
    assert_eq!(b.timer_pins(), [true, false]);
    write32(&*b.aclint, 0, MTIME + 4, 7);
    assert_eq!((b.get64(MTIME), b.timer_pins()), (7 << 32 | 1000, vec![true, true]));
    write32(&*b.aclint, 0, MTIME, 3);
    assert_eq!(b.get64(MTIME), 7 << 32 | 3);
}

#[test]
fn access_widths() {
    let b = Board::new(1);
    let bus = OnBus::new(&b.aclint, RULES);
    for at in [0, MTIMECMP, MTIME] {
        for size in [AccessSize::B1, AccessSize::B2] {
            assert!(bus.read(at, size).is_err() && bus.write(at, size, 0).is_err());
        }
        for size in [AccessSize::B4, AccessSize::B8] {
            bus.read(at, size).unwrap();
        }
    }
    assert!(bus.read(4, AccessSize::B8).is_err(), "misaligned");
    for hole in [MTIMECMP - 8, MTIME - 8, MTIME + 8, SIZE - 8] {
        bus.write(hole, AccessSize::B8, !0).unwrap();
        assert_eq!(bus.read(hole, AccessSize::B8), Ok(0), "{hole:#x}");
    }
}

#[test]
fn reset_in_phases() {
    let b = Board::new(2);
    b.set64(0, 1 << 32 | 1);
    b.set_deadline(0, 1);
    b.set64(MTIME, 500);
    b.aclint.reset(ResetPhase::Enter);
    assert_eq!(b.pins(), [(true, true), (true, false)], "no call out yet");
    b.aclint.reset(ResetPhase::Hold);
    assert_eq!(b.pins(), [(false, false); 2]);
    b.aclint.reset(ResetPhase::Exit);
    b.tick(1000);
    assert_eq!((b.get64(0), b.get64(MTIMECMP), b.get64(MTIME)), (0, u64::MAX, 1000));
    assert_eq!(b.pins(), [(false, false); 2]);
}

#[test]
fn no_harts() {
    let b = Board::new(0);
    b.set64(MTIME, 5);
    assert_eq!((b.get64(0), b.get64(MTIMECMP), b.get64(MTIME)), (0, 0, 5));
}

#[test]
fn saved_in_the_middle() {
    let b = Board::new(2);
    b.tick(123);
    b.set64(MTIME, 1 << 40);
    b.set_deadline(0, (1 << 40) + 10);
    b.set_deadline(1, 7);
    write32(&*b.aclint, 0, 4, 1);
    b.bench.advance(5 * TICK + 7);
    let other = Board::new(2);
    // The machine sets the clock before devices are restored, and starts it after.
    other.bench.clock.advance(b.bench.clock.now());
    assert_round_trip(&b.aclint, &other.aclint);
    other.aclint.start();
    assert_eq!(other.pins(), [(false, false), (true, true)]);
    assert_eq!(other.get64(MTIME), (1 << 40) + 5);
    other.bench.advance(5 * TICK - 8);
    assert!(!other.timer_pins()[0]);
    other.bench.advance(1);
    assert!(other.timer_pins()[0], "to the nanosecond");
    b.bench.advance(5 * TICK - 7);
    go_on_alike(&b, &other, 20_000, random_step);
    assert_eq!(saved(&b.aclint), saved(&other.aclint));
}

fn random_step(b: &Board, rng: &mut Rng) -> (u64, Vec<(bool, bool)>) {
    let register = [0, 4, 8, MTIMECMP, MTIMECMP + 8, MTIMECMP + 16, MTIME][rng.below(7) as usize];
    let value = if rng.below(4) == 0 { rng.next() } else { b.get64(MTIME).wrapping_add(rng.below(100)) };
    let size = if register & 4 == 0 && rng.below(2) == 0 { AccessSize::B8 } else { AccessSize::B4 };
    let mut seen = 0;
    match rng.below(5) {
        0 | 1 => b.aclint.mmio_write(mmio(0, register, size), value & size.mask()).unwrap(),
        2 => b.bench.advance(rng.below(2000)),
        _ => seen = b.aclint.mmio_read(mmio(0, register, size)).unwrap() & size.mask(),
    }
    (seen, b.pins())
}

#[test]
fn damaged_states() {
    let b = Board::new(2);
    b.set_deadline(0, 10);
    assert!(restore_with(&b.aclint, "/msip", vec![false; 3]).is_err());
    assert!(restore_with(&b.aclint, "/mtimecmp", vec![0; 1]).is_err());
    let one = Board::new(1);
    let state = lock(&b.aclint).save_state();
    assert!(lock(&one.aclint).restore_state(state).unwrap_err().to_string().contains("2 harts instead of 1"));
    restore_damaged(&b.aclint, |rng| drop(random_step(&b, rng)));
}

#[test]
fn random_accesses() {
    let b = Board::new(2);
    let bus = OnBus::new(&b.aclint, RULES);
    let mut rng = Rng(5);
    for _ in 0..100_000 {
        random_step(&b, &mut rng);
        let at = if rng.below(2) == 0 { rng.below(SIZE) } else { rng.below(SIZE / 8) * 8 };
        let size = any_size(rng.next());
        let _ = if rng.below(2) == 0 { bus.read(at, size).map(drop) } else { bus.write(at, size, rng.next()) };
    }
    reset(&*b.aclint);
    assert_eq!(b.pins(), [(false, false); 2]);
}
