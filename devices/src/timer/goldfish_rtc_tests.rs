use super::*;
use crate::testing::memory::{OnBus, any_size};
use crate::testing::state::{go_on_alike, restore_damaged};
use crate::testing::{Bench, Levels, Rng, assert_round_trip, read32, reset, saved, write32};
use mimus_core::device::{Lifecycle, lock};

/// A day of 2025, in ns, with a low half that is about to carry.
const BASE: u64 = 0x1837_2a5c_ffff_ff00;

struct Clock {
    bench: Bench,
    rtc: Arc<Mutex<GoldfishRtc>>,
    levels: Arc<Levels>,
}

impl Clock {
    fn new() -> Self {
        Self::with_offset(BASE)
    }

    fn with_offset(offset: u64) -> Self {
        let (bench, levels) = (Bench::new(), Levels::new());
        let rtc = GoldfishRtc::new(levels.line(0), bench.timer(), offset);
        Self { bench, rtc, levels }
    }

    fn get(&self, register: u64) -> u32 {
        read32(&*self.rtc, 0, register)
    }

    fn set(&self, register: u64, value: u32) {
        write32(&*self.rtc, 0, register, value);
    }

    fn time(&self) -> u64 {
        let low = self.get(TIME_LOW);
        u64::from(self.get(TIME_HIGH)) << 32 | u64::from(low)
    }

    fn set_time(&self, time: u64) {
        self.set(TIME_HIGH, (time >> 32) as u32);
        self.set(TIME_LOW, time as u32);
    }

    fn set_alarm(&self, time: u64) {
        self.set(ALARM_HIGH, (time >> 32) as u32);
        self.set(ALARM_LOW, time as u32);
    }

    fn irq(&self) -> bool {
        lock(&self.rtc).irq.level()
    }
}

#[test]
fn time() {
    let c = Clock::new();
    assert_eq!(c.time(), BASE);
    let low = c.get(TIME_LOW);
    c.bench.advance(0x100);
    assert_eq!(low, 0xffff_ff00);
    assert_eq!(c.get(TIME_HIGH), (BASE >> 32) as u32, "of the moment the low half was read");
    assert_eq!((c.get(TIME_LOW), c.get(TIME_HIGH)), (0, (BASE >> 32) as u32 + 1));
    assert_eq!(c.time(), BASE + 0x100);
}

#[test]
fn time_is_set() {
    let c = Clock::new();
    c.bench.advance(12345);
    c.set(TIME_HIGH, 7);
    assert_eq!(c.time(), BASE + 12345, "with the low half");
    c.set(TIME_LOW, 0xffff_fffe);
    assert_eq!(c.time(), 0x7_ffff_fffe);
    c.bench.advance(3);
    assert_eq!(c.time(), 0x8_0000_0001);
    c.set_time(0);
    assert_eq!(c.time(), 0);
    c.set_time(u64::MAX);
    c.bench.advance(2);
    assert_eq!(c.time(), 1);
}

#[test]
fn alarm_rings_once() {
    let c = Clock::new();
    c.set(IRQ_ENABLED, 1);
    c.set_alarm(BASE + 1000);
    assert_eq!((c.get(ALARM_STATUS), c.get(IRQ_ENABLED)), (1, 1));
    assert_eq!((c.get(ALARM_HIGH), c.get(ALARM_LOW)), ((BASE >> 32) as u32 + 1, 0x2e8));
    c.bench.advance(999);
    assert!(!c.irq());
    c.bench.advance(1);
    assert_eq!((c.irq(), c.get(ALARM_STATUS)), (true, 0));
    c.bench.advance(10_000);
    c.set(CLEAR_INTERRUPT, 1);
    assert!(!c.irq());
    c.bench.advance(1 << 40);
    assert!(!c.irq());
    assert_eq!(c.levels.take(), [(0, true), (0, false)]);
}

#[test]
fn alarm_in_the_past_rings_at_once() {
    let c = Clock::new();
    c.set(IRQ_ENABLED, 1);
    c.set_alarm(BASE);
    assert_eq!((c.irq(), c.get(ALARM_STATUS)), (true, 0));
    c.set(CLEAR_INTERRUPT, 0);
    c.set_alarm(0);
    assert!(c.irq());
}

#[test]
fn alarm_is_cleared() {
    let c = Clock::new();
    c.set(IRQ_ENABLED, 1);
    c.set_alarm(BASE + 10);
    c.set(CLEAR_ALARM, 1);
    assert_eq!(c.get(ALARM_STATUS), 0);
    c.bench.advance(100);
    assert!(!c.irq());
    // Clearing the alarm does not withdraw an interrupt; clearing the interrupt no alarm.
    c.set_alarm(BASE);
    c.set(CLEAR_ALARM, 1);
    assert!(c.irq());
    c.set_alarm(BASE + 1000);
    c.set(CLEAR_INTERRUPT, 1);
    assert_eq!((c.irq(), c.get(ALARM_STATUS)), (false, 1));
    c.bench.advance(1000);
    assert!(c.irq());
}

#[test]
fn interrupt_enable_gates_the_line() {
    let c = Clock::new();
    c.set_alarm(BASE + 5);
    c.bench.advance(5);
    assert_eq!((c.irq(), c.get(IRQ_ENABLED)), (false, 0));
    c.set(IRQ_ENABLED, 0xffff_ffff);
    assert_eq!((c.irq(), c.get(IRQ_ENABLED)), (true, 1));
    c.set(IRQ_ENABLED, 0xffff_fffe);
    assert!(!c.irq());
    c.set(CLEAR_INTERRUPT, 1);
    c.set(IRQ_ENABLED, 1);
    assert!(!c.irq());
}

#[test]
fn setting_the_time_moves_the_alarm() {
    let c = Clock::new();
    c.set(IRQ_ENABLED, 1);
    c.set_alarm(BASE + 1_000_000);
    c.set_time(BASE + 999_990);
    c.bench.advance(9);
    assert!(!c.irq());
    c.bench.advance(1);
    assert!(c.irq());
    c.set(CLEAR_INTERRUPT, 1);
    c.set_alarm(BASE + 2_000_000);
    c.set_time(BASE);
    c.bench.advance(1_999_999);
    assert!(!c.irq());
    c.set_time(BASE + 2_000_001);
    assert!(c.irq(), "past it");
    // Far beyond what the timer can hold.
    c.set_time(0);
    c.set_alarm(u64::MAX);
    c.set(CLEAR_INTERRUPT, 1);
    c.bench.advance(1 << 50);
    assert_eq!((c.irq(), c.get(ALARM_STATUS)), (false, 1));
}

#[test]
fn access_widths_and_holes() {
    let c = Clock::new();
    let bus = OnBus::new(&c.rtc, RULES);
    assert_eq!(bus.read(TIME_LOW, AccessSize::B4), Ok(0xffff_ff00));
    for size in [AccessSize::B1, AccessSize::B2, AccessSize::B8] {
        assert!(bus.read(TIME_LOW, size).is_err() && bus.write(TIME_LOW, size, 0).is_err());
    }
    for hole in [CLEAR_ALARM, CLEAR_INTERRUPT, 0x20, 0x24, SIZE - 4] {
        c.set(hole, !0);
        assert_eq!(c.get(hole), 0, "{hole:#x}");
    }
    c.set(ALARM_STATUS, 1);
    assert_eq!(c.get(ALARM_STATUS), 0, "read-only");
}

#[test]
fn reset_in_phases() {
    let c = Clock::new();
    c.set_time(5000);
    c.set(IRQ_ENABLED, 1);
    c.set_alarm(4000);
    c.set_alarm(9000);
    c.levels.take();
    c.rtc.reset(ResetPhase::Enter);
    assert_eq!(c.levels.take(), [], "no call out yet");
    c.rtc.reset(ResetPhase::Hold);
    assert_eq!(c.levels.take(), [(0, false)]);
    c.rtc.reset(ResetPhase::Exit);
    assert_eq!([IRQ_ENABLED, ALARM_STATUS, ALARM_LOW, ALARM_HIGH].map(|r| c.get(r)), [0; 4]);
    c.bench.advance(10_000);
    assert_eq!((c.levels.take(), c.time()), (vec![], 15_000), "time itself goes on");
}

#[test]
fn an_alarm_due_while_the_machine_stands() {
    // On the host's clock time goes on; the interrupt comes when the machine does.
    let c = Clock::new();
    c.set(IRQ_ENABLED, 1);
    c.set_alarm(BASE + 100);
    c.rtc.stop(&Drain::new());
    c.bench.advance(1000);
    assert!(!c.irq());
    c.rtc.start();
    assert!(c.irq());
}

#[test]
fn saved_in_the_middle() {
    let c = Clock::new();
    c.set(IRQ_ENABLED, 1);
    c.set_alarm(BASE + 1000);
    c.set(TIME_HIGH, 3);
    c.bench.advance(0x100);
    c.get(TIME_LOW);
    let d = Clock::with_offset(0);
    d.bench.clock.advance(0x100);
    assert_round_trip(&c.rtc, &d.rtc);
    d.rtc.start();
    d.bench.advance(999 - 0x100);
    assert!(!d.irq());
    d.bench.advance(1);
    assert!(d.irq());
    c.bench.advance(1000 - 0x100);
    // With the interrupt pending: the level comes with the device, silently.
    let e = Clock::with_offset(0);
    e.bench.clock.advance(1000);
    assert_round_trip(&c.rtc, &e.rtc);
    assert_eq!((e.irq(), e.levels.take()), (true, vec![]));
    e.rtc.start();
    go_on_alike(&c, &e, 20_000, random_step);
    assert_eq!(saved(&c.rtc), saved(&e.rtc));
}

fn random_step(c: &Clock, rng: &mut Rng) -> (u32, bool) {
    let register = rng.below(10) * 4;
    let mut seen = 0;
    match rng.below(6) {
        0 => c.bench.advance(rng.below(1000)),
        1 => c.set_alarm(c.time().wrapping_add(rng.below(2000)).wrapping_sub(100)),
        2 | 3 => c.set(register, rng.next() as u32),
        _ => seen = c.get(register),
    }
    (seen, c.irq())
}

#[test]
fn damaged_states() {
    let c = Clock::new();
    c.set_alarm(BASE + 5);
    restore_damaged(&c.rtc, |rng| {
        if rng.below(4) == 0 {
            c.rtc.start();
        }
        random_step(&c, rng);
    });
}

#[test]
fn random_accesses() {
    let c = Clock::new();
    let bus = OnBus::new(&c.rtc, RULES);
    let mut rng = Rng(9);
    for _ in 0..100_000 {
        random_step(&c, &mut rng);
        let (at, size) = (rng.below(SIZE), any_size(rng.next()));
        let _ = if rng.below(2) == 0 { bus.read(at, size).map(drop) } else { bus.write(at & !3, size, rng.next()) };
    }
    reset(&*c.rtc);
    assert!(!c.irq());
}
