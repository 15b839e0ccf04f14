use super::*;
use crate::testing::{Bench, Levels, assert_round_trip, inb, outb, reset, restore_with, saved};

/// 2024-02-28 23:59:58 UTC, a Wednesday.
const START: i64 = 1_709_164_798;
const MS: u64 = 1_000_000;

struct Pc {
    bench: Bench,
    levels: Arc<Levels>,
    rtc: Arc<Mutex<Mc146818>>,
}

impl Pc {
    fn new() -> Self {
        let (bench, levels) = (Bench::new(), Levels::new());
        let rtc = Mc146818::new(levels.line(8), bench.timer(), i128::from(START) * i128::from(SECOND));
        Pc { bench, levels, rtc }
    }

    fn get(&self, index: u8) -> u8 {
        outb(&*self.rtc, 0, 0, index);
        inb(&*self.rtc, 0, 1)
    }

    fn set(&self, index: u8, value: u8) {
        outb(&*self.rtc, 0, 0, index);
        outb(&*self.rtc, 0, 1, value);
    }

    /// Century, year, month, day, hour, minute, second, weekday.
    fn time(&self) -> [u8; 8] {
        [0x32, 9, 8, 7, 4, 2, 0, 6].map(|i| self.get(i))
    }

    fn irq(&self) -> bool {
        lock(&self.rtc).irq.level()
    }
}

#[test]
fn runs_in_every_format() {
    let pc = Pc::new();
    assert_eq!(pc.time(), [0x20, 0x24, 0x02, 0x28, 0x23, 0x59, 0x58, 4]);
    pc.bench.advance(2 * SECOND);
    assert_eq!(pc.time(), [0x20, 0x24, 0x02, 0x29, 0x00, 0x00, 0x00, 5], "a leap day");
    pc.bench.advance(86_400 * SECOND - 1);
    assert_eq!(pc.time(), [0x20, 0x24, 0x02, 0x29, 0x23, 0x59, 0x59, 5]);
    pc.set(0x0b, B_BINARY | B_24_HOURS);
    assert_eq!(pc.time(), [20, 24, 2, 29, 23, 59, 59, 5]);
    pc.set(0x0b, 0);
    assert_eq!(pc.get(4), 0x91, "11 p.m.");
    pc.set(0x0b, B_BINARY);
    pc.bench.advance(1);
    assert_eq!(pc.get(4), 12, "midnight is 12 a.m.");
    pc.bench.advance(12 * 3600 * SECOND);
    assert_eq!(pc.get(4), 0x8c, "noon is 12 p.m.");
}

#[test]
fn setting_the_time_as_linux_does() {
    let pc = Pc::new();
    pc.bench.advance(300 * MS);
    pc.set(0x0b, B_SET | B_24_HOURS | B_UIE);
    assert_eq!(pc.get(0x0b), B_SET | B_24_HOURS, "SET clears UIE");
    pc.set(0x0a, 0x76);
    for (at, byte) in [(0x32, 0x19), (9, 0x99), (8, 0x12), (7, 0x31), (4, 0x23), (2, 0x59), (0, 0x59), (6, 6)] {
        pc.set(at, byte);
    }
    pc.bench.advance(5 * SECOND);
    assert_eq!(pc.time(), [0x19, 0x99, 0x12, 0x31, 0x23, 0x59, 0x59, 6], "it stands");
    pc.set(0x0b, B_24_HOURS);
    pc.bench.advance(5 * SECOND);
    assert_eq!(pc.get(0), 0x59, "the divider is held");
    pc.set(0x0a, 0x26);
    pc.bench.advance(500 * MS - 1);
    assert_eq!(pc.get(0), 0x59);
    pc.bench.advance(1);
    assert_eq!(pc.time(), [0x20, 0x00, 0x01, 0x01, 0x00, 0x00, 0x00, 7], "half a second after its release");
    pc.set(4, 0x12);
    assert_eq!(pc.time()[4..7], [0x12, 0, 0], "written while it runs");
    assert_eq!(pc.time()[7], 7);
}

#[test]
fn dates_that_do_not_exist_carry_over() {
    let pc = Pc::new();
    pc.set(0x0b, B_SET | B_24_HOURS);
    for (at, byte) in [(0x32, 0xff), (9, 0xff), (8, 0xff), (7, 0xff), (4, 0xff), (2, 0xff), (0, 0xff), (6, 0xff)] {
        pc.set(at, byte);
    }
    pc.set(0x0b, B_24_HOURS);
    let t = pc.time();
    assert!((1..=7).contains(&t[7]) && t[2] <= 0x12 && t[3] <= 0x31, "{t:x?}");
    assert!(lock(&pc.rtc).s.offset_s > 0);
    assert_round_trip(&pc.rtc, &Pc::new().rtc);
}

#[test]
fn update_in_progress() {
    let pc = Pc::new();
    assert_eq!(pc.get(0x0a), 0x26);
    pc.bench.advance(SECOND - UIP_NS - 1);
    assert_eq!(pc.get(0x0a), 0x26);
    pc.bench.advance(1);
    assert_eq!(pc.get(0x0a), 0xa6);
    pc.bench.advance(UIP_NS - 1);
    assert_eq!((pc.get(0x0a), pc.get(0)), (0xa6, 0x58));
    pc.bench.advance(1);
    assert_eq!((pc.get(0x0a), pc.get(0)), (0x26, 0x59));
    pc.set(0x0b, B_SET | B_24_HOURS);
    pc.bench.advance(SECOND - 1);
    assert_eq!(pc.get(0x0a), 0x26, "no updates while SET");
    pc.set(0x0a, 0xa6);
    assert_eq!(pc.get(0x0a), 0x26, "UIP is read-only");
}

#[test]
fn periodic_interrupt() {
    let pc = Pc::new();
    pc.set(0x0b, B_24_HOURS | B_PIE);
    pc.bench.advance(SECOND / 1024);
    assert!(!pc.irq(), "976562.5 ns");
    pc.bench.advance(1);
    assert!(pc.irq());
    assert_eq!(pc.get(0x0c), C_IRQF | C_PF);
    assert!(!pc.irq());
    assert_eq!(pc.get(0x0c), 0);
    pc.levels.take();
    let mut count = 0;
    for _ in 0..20_000 {
        pc.bench.advance(SECOND / 10_000);
        count += u32::from(pc.get(0x0c) & C_PF != 0);
    }
    assert_eq!(count, 2048, "no drift in two seconds");
    assert_eq!(pc.levels.rises(8), 2048);
    for (rate, period) in [(1, 3_906_250), (2, 7_812_500), (3, 122_071), (15, 500_000_000)] {
        pc.set(0x0a, 0x20 | rate);
        pc.get(0x0c);
        pc.bench.advance(SECOND - pc.bench.clock.now() % SECOND);
        pc.get(0x0c);
        pc.bench.advance(period - 1);
        assert!(!pc.irq(), "rate {rate}");
        pc.bench.advance(1);
        assert!(pc.irq(), "rate {rate}");
    }
    pc.set(0x0a, 0x20);
    pc.get(0x0c);
    pc.bench.advance(SECOND);
    assert!(!pc.irq(), "rate 0 is none");
}

#[test]
fn flags_without_interrupts() {
    let pc = Pc::new();
    pc.bench.advance(2 * SECOND);
    assert_eq!(pc.get(0x0c), C_PF | C_UF | C_AF, "the alarm is at midnight");
    assert_eq!(pc.levels.take(), []);
    pc.bench.advance(SECOND);
    assert_eq!(pc.get(0x0c), C_PF | C_UF);
    pc.bench.advance(SECOND);
    pc.set(0x0b, B_24_HOURS | B_UIE);
    assert!(pc.irq(), "enabled when the flag is there");
}

#[test]
fn update_ended_interrupt() {
    let pc = Pc::new();
    pc.bench.advance(100 * MS);
    pc.set(0x0b, B_24_HOURS | B_UIE);
    pc.bench.advance(900 * MS - 1);
    assert!(!pc.irq());
    pc.bench.advance(1);
    assert!(pc.irq());
    assert_eq!(pc.get(0x0c) & (C_IRQF | C_UF), C_IRQF | C_UF);
    pc.bench.advance(10 * SECOND);
    assert_eq!(pc.levels.rises(8), 2, "nothing more until C is read");
}

#[test]
fn alarms() {
    let alarm_after = |at: [u8; 3], b: u8| {
        let pc = Pc::new();
        pc.set(0x0b, b | B_AIE);
        for (index, byte) in [5, 3, 1].into_iter().zip(at) {
            pc.set(index, byte);
        }
        for seconds in 1..=2 * 86_400_u64 {
            pc.bench.advance(SECOND - 1);
            assert!(!pc.irq(), "{at:x?}: inside second {seconds}");
            pc.bench.advance(1);
            if pc.irq() {
                assert_eq!(pc.get(0x0c) & (C_IRQF | C_AF), C_IRQF | C_AF);
                return Some(seconds);
            }
        }
        None
    };
    const D: u8 = DONT_CARE;
    assert_eq!(alarm_after([0, 0, 0], B_24_HOURS), Some(2));
    assert_eq!(alarm_after([D, D, D], B_24_HOURS), Some(1));
    assert_eq!(alarm_after([D, D, 0x30], B_24_HOURS), Some(32));
    assert_eq!(alarm_after([D, 0x01, 0x57], B_24_HOURS), Some(119));
    assert_eq!(alarm_after([0x23, 0x59, 0x57], B_24_HOURS), Some(86_399), "tomorrow");
    assert_eq!(alarm_after([0x23, D, D], B_24_HOURS), Some(1));
    assert_eq!(alarm_after([0x23, D, 0x58], B_24_HOURS), Some(23 * 3600 + 60), "first minute of the next 23rd hour");
    assert_eq!(alarm_after([0x22, 0xff, 0x05], B_24_HOURS), Some(22 * 3600 + 7));
    assert_eq!(alarm_after([0x12, 0, 0], 0), Some(2), "12 a.m.");
    assert_eq!(alarm_after([0x92, 0, 1], 0), Some(12 * 3600 + 3), "12 p.m.");
    assert_eq!(alarm_after([23, 59, 59], B_24_HOURS | B_BINARY), Some(1));
    assert_eq!(alarm_after([0x24, 0, 0], B_24_HOURS), None, "no such hour");
}

#[test]
fn ram_index_and_nmi_mask() {
    let pc = Pc::new();
    assert!(lock(&pc.rtc).nmi_masked());
    pc.set(0x0f, 0x5a);
    assert!(!lock(&pc.rtc).nmi_masked());
    pc.set(0x8f, 0xa5);
    assert!(lock(&pc.rtc).nmi_masked());
    assert_eq!((pc.get(0x0f), inb(&*pc.rtc, 0, 0)), (0xa5, 0xff));
    pc.set(0x0d, 0);
    assert_eq!(pc.get(0x0d), D_VRT);
    lock(&pc.rtc).set_ram(0x34, 7);
    lock(&pc.rtc).set_ram(0x0b, 7);
    lock(&pc.rtc).set_ram(0xff, 7);
    assert_eq!((pc.get(0x34), pc.get(0x0b), lock(&pc.rtc).ram(0x0f)), (7, B_24_HOURS, 0xa5));
}

#[test]
fn reset_keeps_what_has_a_battery() {
    let pc = Pc::new();
    pc.set(0x10, 0x77);
    pc.set(0x0b, B_24_HOURS | B_UIE | B_PIE | B_AIE);
    pc.bench.advance(3 * SECOND);
    assert!(pc.irq());
    reset(&*pc.rtc);
    assert!(!pc.irq());
    assert_eq!((pc.get(0x0b), pc.get(0x0c), pc.get(0x10)), (B_24_HOURS, 0, 0x77));
    assert_eq!(pc.time()[3..7], [0x29, 0x00, 0x00, 0x01]);
}

#[test]
fn saved_and_restored() {
    let pc = Pc::new();
    pc.set(0x0b, B_24_HOURS | B_UIE);
    pc.bench.advance(1300 * MS);
    let other = Pc::new();
    other.bench.advance(1300 * MS);
    assert_round_trip(&pc.rtc, &other.rtc);
    assert_eq!(other.levels.take(), [], "restoring is silent");
    mimus_core::device::Lifecycle::start(&*other.rtc);
    assert!(other.irq());
    other.get(0x0c);
    other.bench.advance(700 * MS);
    assert!(other.irq());
    assert_eq!(other.time()[4..7], [0, 0, 0]);
    for (pointer, value) in [("/cmos/10", 0xa6), ("/cmos/13", 0), ("/cmos/12", 1), ("/weekday_shift", 7)] {
        assert!(restore_with(&other.rtc, pointer, value).is_err(), "{pointer}");
    }
    assert!(restore_with(&other.rtc, "/offset_s", i64::MIN).is_err());
    assert!(restore_with(&other.rtc, "/phase_ns", SECOND).is_err());
    assert!(restore_with(&other.rtc, "/cmos", vec![0; 3]).is_err());
    let before = saved(&other.rtc);
    restore_with(&other.rtc, "/seen_ns", u64::MAX).unwrap();
    other.get(0x0c);
    assert_ne!(before, saved(&other.rtc));
}

#[test]
fn an_alarm_that_passed_while_stopped_rings_at_start() {
    let pc = Pc::new();
    pc.set(0x0b, B_24_HOURS | B_AIE);
    mimus_core::device::Lifecycle::stop(&*pc.rtc, &Drain::new());
    pc.bench.advance(5 * SECOND);
    assert!(!pc.irq());
    mimus_core::device::Lifecycle::start(&*pc.rtc);
    assert!(pc.irq());
}

#[test]
fn the_hpet_takes_the_interrupt() {
    let pc = Pc::new();
    let replaced = Mc146818::replaced(&pc.rtc);
    pc.set(0x0b, B_24_HOURS | B_UIE);
    pc.bench.advance(SECOND);
    assert!(pc.irq());
    replaced.raise();
    assert!(!pc.irq());
    pc.get(0x0c);
    pc.bench.advance(SECOND);
    assert!(!pc.irq());
    assert_eq!(pc.get(0x0c) & C_UF, C_UF, "flags are set all the same");
    pc.bench.advance(SECOND);
    replaced.lower();
    assert!(pc.irq());
}
