use super::*;
use crate::testing::{Bench, Levels, Rng, assert_round_trip, inb, outb, reset, restore_with, saved};
use mimus_core::device::Lifecycle;

const MS: u64 = 1_000_000;
const SECOND: u64 = 1_000_000_000;

struct Pc {
    bench: Bench,
    levels: Arc<Levels>,
    pit: Arc<Mutex<I8254>>,
}

impl Pc {
    fn new() -> Self {
        let (bench, levels) = (Bench::new(), Levels::new());
        let pit = I8254::new(levels.line(0), bench.timer());
        Pc { bench, levels, pit }
    }

    fn out(&self, port: u16, value: u8) {
        outb(&*self.pit, REGION_COUNTERS, port, value);
    }

    fn get(&self, port: u16) -> u8 {
        inb(&*self.pit, REGION_COUNTERS, port)
    }

    /// Programs counter `n` with both bytes.
    fn program(&self, n: u16, mode: u8, count: u16) {
        self.out(3, (n as u8) << 6 | 0x30 | mode << 1);
        self.out(n, count as u8);
        self.out(n, (count >> 8) as u8);
    }

    fn count(&self, n: u16) -> u16 {
        u16::from_le_bytes([self.get(n), self.get(n)])
    }

    fn status(&self, n: u16) -> u8 {
        self.out(3, 0xe0 | 2 << n);
        self.get(n)
    }

    fn port_61(&self) -> u8 {
        inb(&*self.pit, REGION_CONTROL, 0)
    }

    fn set_port_61(&self, value: u8) {
        outb(&*self.pit, REGION_CONTROL, 0, value);
    }

    /// Waits for `ticks` of the counters' clock since the count was loaded, just now.
    fn run(&self, ticks: u64) {
        self.bench.advance(CLOCK.ns(ticks));
    }
}

#[test]
fn silent_until_programmed() {
    let pc = Pc::new();
    pc.bench.advance(SECOND);
    assert_eq!(pc.levels.take(), []);
    assert_eq!(pc.get(3), 0xff);
    assert_eq!(pc.status(0), 0xc6);
    pc.out(0, 1);
    assert_eq!(pc.levels.take(), []);
}

#[test]
fn rate_generator() {
    let pc = Pc::new();
    pc.program(0, 2, 11_932);
    pc.levels.take();
    pc.run(11_931);
    assert_eq!(pc.levels.rises(0), 0);
    pc.bench.advance(1000);
    assert_eq!(pc.levels.rises(0), 1);
    pc.bench.advance(10 * SECOND);
    let rises = pc.levels.rises(0);
    assert_eq!(rises, 11_931_820 / 11_932, "no drift in ten seconds");
    pc.program(0, 2, 1193);
    let latched: Vec<u16> = (0..3)
        .map(|_| {
            pc.run(100);
            pc.out(3, 0);
            pc.count(0)
        })
        .collect();
    assert_eq!(latched, [1093, 993, 893]);
    assert_eq!(pc.status(0), 0xb4);
}

#[test]
fn square_wave() {
    let pc = Pc::new();
    pc.set_port_61(GATE_2);
    pc.program(2, 3, 1000);
    assert_eq!((pc.port_61() & OUT_2, pc.count(2)), (OUT_2, 1000));
    pc.run(499);
    assert_eq!((pc.port_61() & OUT_2, pc.count(2)), (OUT_2, 2));
    pc.bench.advance(1000);
    assert_eq!((pc.port_61() & OUT_2, pc.count(2)), (0, 1000));
    pc.program(2, 3, 7);
    let waves: Vec<u8> = (0..14)
        .map(|_| {
            let out = pc.port_61() & OUT_2;
            pc.bench.advance(839);
            out / OUT_2
        })
        .collect();
    assert_eq!(waves, [1, 1, 1, 1, 0, 0, 0, 1, 1, 1, 1, 0, 0, 0]);
    pc.program(0, 3, 0);
    pc.levels.take();
    pc.bench.advance(SECOND);
    assert_eq!(pc.levels.rises(0), 18, "18.2 Hz");
}

#[test]
fn interrupt_on_terminal_count() {
    let pc = Pc::new();
    pc.program(0, 0, 1000);
    assert_eq!(pc.levels.take(), []);
    assert_eq!(pc.status(0), 0x30);
    pc.run(1000);
    assert_eq!(pc.levels.take(), [(0, true)]);
    assert_eq!(pc.status(0), 0xb0);
    pc.run(5);
    assert_eq!(pc.count(0), 0xfffb, "it wraps around");
    pc.out(0, 0x10);
    assert_eq!(pc.levels.take(), [(0, false)], "the first byte stops it");
    pc.bench.advance(SECOND);
    assert_eq!(pc.status(0), 0x70);
    pc.out(0, 0);
    pc.run(15);
    assert_eq!(pc.levels.take(), []);
    pc.bench.advance(1000);
    assert_eq!(pc.levels.take(), [(0, true)]);
}

#[test]
fn software_strobe_as_linux_does() {
    let pc = Pc::new();
    pc.out(3, 0x38);
    assert_eq!(pc.levels.take(), [(0, true)], "the output is high");
    pc.out(0, 100);
    pc.out(0, 0);
    pc.run(100);
    assert_eq!((pc.status(0), pc.levels.rises(0)), (0x38, 0), "low for one clock");
    pc.bench.advance(839);
    assert_eq!((pc.status(0), pc.levels.rises(0)), (0xb8, 1));
    pc.bench.advance(SECOND);
    assert_eq!(pc.levels.rises(0), 0);
    pc.out(0, 50);
    pc.out(0, 0);
    pc.bench.advance(MS);
    assert_eq!(pc.levels.rises(0), 1, "a new count starts it again");
}

#[test]
fn gate_triggers_the_one_shot() {
    let pc = Pc::new();
    pc.program(2, 1, 100);
    assert_eq!(pc.port_61() & OUT_2, OUT_2);
    pc.bench.advance(MS);
    assert_eq!(pc.port_61() & OUT_2, OUT_2, "not triggered");
    pc.set_port_61(GATE_2);
    assert_eq!(pc.port_61() & OUT_2, 0);
    pc.run(50);
    pc.set_port_61(0);
    pc.set_port_61(GATE_2);
    pc.run(99);
    assert_eq!(pc.port_61() & OUT_2, 0, "triggered again");
    pc.bench.advance(1000);
    assert_eq!(pc.port_61() & OUT_2, OUT_2);
    pc.set_port_61(0);
    pc.program(2, 5, 10);
    pc.set_port_61(GATE_2);
    pc.run(10);
    assert_eq!(pc.port_61() & OUT_2, 0, "a strobe of one clock");
    pc.bench.advance(1000);
    assert_eq!(pc.port_61() & OUT_2, OUT_2);
}

#[test]
fn gate_holds_counting() {
    let pc = Pc::new();
    pc.program(2, 0, 1000);
    pc.bench.advance(MS);
    assert_eq!(pc.count(2), 1000);
    pc.set_port_61(GATE_2 | SPEAKER);
    assert_eq!(pc.port_61() & 3, 3);
    pc.run(400);
    pc.set_port_61(0);
    pc.bench.advance(MS);
    assert_eq!(pc.count(2), 600);
    pc.set_port_61(GATE_2);
    pc.run(599);
    assert_eq!(pc.port_61() & OUT_2, 0);
    pc.bench.advance(2000);
    assert_eq!(pc.port_61() & OUT_2, OUT_2);
    pc.program(2, 2, 1000);
    pc.run(300);
    pc.set_port_61(0);
    assert_eq!((pc.count(2), pc.port_61() & OUT_2), (700, OUT_2));
    pc.set_port_61(GATE_2);
    assert_eq!(pc.count(2), 1000, "the trigger reloads");
}

#[test]
fn bytes_and_latches() {
    let pc = Pc::new();
    pc.program(1, 2, 0x1234);
    pc.out(3, 0x40);
    pc.run(0x100);
    pc.out(3, 0x40);
    assert_eq!(pc.get(1), 0x34, "the first latch counts");
    pc.out(3, 0x40);
    assert_eq!(pc.get(1), 0x12);
    assert_eq!(pc.count(1), 0x1134);
    pc.out(3, 0xc4);
    assert_eq!((pc.get(1), pc.get(1), pc.get(1)), (0xb4, 0x34, 0x11), "status, then the count");
    pc.out(3, 0x54);
    assert_eq!(pc.status(1), 0xd4, "no count yet");
    pc.out(1, 0x80);
    assert_eq!((pc.get(1), pc.get(1)), (0x80, 0x80), "low byte only");
    pc.out(3, 0x64);
    pc.out(1, 0x80);
    assert_eq!((pc.get(1), pc.get(1)), (0x80, 0x80), "high byte only");
    pc.out(3, 0x40);
    assert_eq!((pc.get(1), pc.status(1)), (0x80, 0xa4));
    pc.out(3, 0x7e);
    assert_eq!(pc.status(1) & 0xe, 6, "mode 7 is mode 3");
}

#[test]
fn bcd() {
    let pc = Pc::new();
    pc.out(3, 0x71);
    pc.out(1, 0);
    pc.out(1, 0);
    pc.run(1);
    assert_eq!(pc.count(1), 0x9999);
    pc.out(1, 0x34);
    pc.out(1, 0x12);
    pc.run(235);
    assert_eq!(pc.count(1), 0x0999);
    pc.run(1000);
    assert_eq!(pc.count(1), 0x9999, "wraps to 9999");
}

#[test]
fn refresh_toggles() {
    let pc = Pc::new();
    let first = pc.port_61() & REFRESH;
    pc.bench.advance(REFRESH_NS);
    assert_ne!(pc.port_61() & REFRESH, first);
    pc.bench.advance(REFRESH_NS);
    assert_eq!(pc.port_61() & REFRESH, first);
}

#[test]
fn the_hpet_takes_the_interrupt() {
    let pc = Pc::new();
    pc.program(0, 2, 1193);
    let replaced = I8254::replaced(&pc.pit);
    pc.bench.advance(SECOND / 100);
    assert!(pc.levels.rises(0) > 8);
    replaced.raise();
    assert_eq!(pc.levels.take(), [(0, false)]);
    pc.bench.advance(SECOND);
    assert_eq!(pc.levels.take(), []);
    replaced.lower();
    pc.levels.take();
    pc.bench.advance(SECOND / 100);
    assert!(pc.levels.rises(0) > 8);
}

#[test]
fn short_periods_are_merged() {
    let pc = Pc::new();
    pc.program(0, 2, 1);
    pc.levels.take();
    pc.bench.advance(10 * MS);
    let rises = pc.levels.rises(0);
    assert!((400..=502).contains(&rises), "{rises}");
}

#[test]
fn saved_and_restored() {
    let pc = Pc::new();
    pc.program(0, 2, 11_932);
    pc.program(2, 0, 5000);
    pc.out(3, 0x80);
    pc.bench.advance(15 * MS);
    let other = Pc::new();
    other.bench.advance(15 * MS);
    assert_round_trip(&pc.pit, &other.pit);
    other.pit.start();
    assert_eq!(other.levels.take(), []);
    other.bench.advance(4 * MS);
    assert_eq!(other.levels.rises(0), 0);
    other.bench.advance(MS + 1000);
    assert_eq!(other.levels.rises(0), 1);
    assert_eq!(other.count(2), 5000);
    for (pointer, value) in [("/channels/0/count", 0), ("/channels/0/mode", 6), ("/channels/2/access", 4)] {
        assert!(restore_with(&other.pit, pointer, value).is_err(), "{pointer}");
    }
    reset(&*other.pit);
    assert_eq!(saved(&other.pit)["channels"][0]["access"], 0);
    other.levels.take();
    other.bench.advance(SECOND);
    assert_eq!(other.levels.take(), []);
}

#[test]
fn an_interrupt_due_when_saved_is_not_lost() {
    for mode in [0, 2, 4] {
        let pc = Pc::new();
        pc.program(0, mode, 1000);
        pc.bench.clock.advance(MS);
        let other = Pc::new();
        other.bench.clock.advance(MS);
        assert_round_trip(&pc.pit, &other.pit);
        assert_eq!(other.levels.take(), []);
        other.pit.start();
        assert_eq!(other.levels.rises(0), 1, "mode {mode}");
    }
}

#[test]
fn random_accesses() {
    let mut rng = Rng(3);
    let pc = Pc::new();
    for _ in 0..30_000 {
        match rng.below(6) {
            0 => pc.set_port_61(rng.next() as u8),
            1 => _ = pc.port_61(),
            2 | 3 => pc.out(rng.below(4) as u16, rng.next() as u8),
            4 => _ = pc.get(rng.below(4) as u16),
            _ => pc.bench.advance(rng.below(MS)),
        }
    }
    let other = Pc::new();
    other.bench.advance(pc.bench.clock.now());
    assert_round_trip(&pc.pit, &other.pit);
    for (pointer, value) in
        [("/channels/0/loaded_ns", i64::MIN), ("/driven_ns", i64::MIN), ("/channels/0/loaded_ns", i64::MAX)]
    {
        restore_with(&other.pit, pointer, value).unwrap();
        other.pit.start();
        other.bench.advance(MS);
    }
}
