use super::*;
use crate::testing::memory::{OnBus, any_size};
use crate::testing::state::{go_on_alike, restore_damaged};
use crate::testing::{Rng, assert_round_trip, read32, reset, restore_with, saved, write32};
use mimus_core::accel::VcpuIndex;
use mimus_core::accel::null::NullHandle;
use mimus_core::device::{Lifecycle, lock};
use mimus_core::irq::IrqLine;

const SOURCES: u32 = 95;

struct Board {
    plic: Arc<Mutex<Plic>>,
    irqs: Arc<dyn IrqController>,
    harts: Vec<Arc<NullHandle>>,
}

impl Board {
    /// Contexts 0 and 1 are machine and supervisor mode of hart 0, and so on.
    fn new(sources: u32, harts: u32) -> Self {
        let harts: Vec<_> = (0..harts).map(|i| NullHandle::new(VcpuIndex(i))).collect();
        let pins = [CpuPin::Meip, CpuPin::Seip];
        let targets = harts.iter().flat_map(|h| pins.map(|pin| PlicTarget { vcpu: h.clone(), pin })).collect();
        let plic = Plic::new(sources, targets);
        Self { irqs: Plic::irqs(&plic), plic, harts }
    }

    /// Every source has priority 1 and is enabled in every context.
    fn enabled() -> Self {
        let b = Self::new(SOURCES, 2);
        (1..=SOURCES).for_each(|s| b.set_priority(s, 1));
        (0..4).for_each(|c| (0..3).for_each(|w| b.enable(c, w, !0)));
        b
    }

    fn get(&self, offset: u64) -> u32 {
        read32(&*self.plic, 0, offset)
    }

    fn set(&self, offset: u64, value: u32) {
        write32(&*self.plic, 0, offset, value);
    }

    fn set_priority(&self, source: u32, priority: u32) {
        self.set(u64::from(source) * 4, priority);
    }

    fn enable(&self, context: u64, word: u64, bits: u32) {
        self.set(0x2000 + context * 0x80 + word * 4, bits);
    }

    fn set_threshold(&self, context: u64, threshold: u32) {
        self.set(0x20_0000 + context * 0x1000, threshold);
    }

    fn claim(&self, context: u64) -> u32 {
        self.get(0x20_0004 + context * 0x1000)
    }

    fn complete(&self, context: u64, source: u32) {
        self.set(0x20_0004 + context * 0x1000, source);
    }

    fn pending(&self, word: u64) -> u32 {
        self.get(0x1000 + word * 4)
    }

    fn line(&self, source: u32, level: bool) {
        self.irqs.set_input(source, level);
    }

    /// Outputs of all contexts, context 0 first.
    fn outputs(&self) -> Vec<bool> {
        self.harts.iter().flat_map(|h| [h.pin(CpuPin::Meip), h.pin(CpuPin::Seip)]).collect()
    }
}

#[test]
fn registers_hold_what_exists() {
    let b = Board::new(SOURCES, 2);
    for source in 0..1024 {
        b.set_priority(source, 0xffff_ffff);
        let exists = (1..=SOURCES).contains(&source);
        assert_eq!(b.get(u64::from(source) * 4), if exists { 7 } else { 0 }, "priority of {source}");
    }
    for context in 0..6 {
        for word in 0..32 {
            b.enable(context, word, !0);
            let want = match word {
                _ if context >= 4 => 0,
                0 => !1,
                1 | 2 => !0,
                _ => 0,
            };
            assert_eq!(b.get(0x2000 + context * 0x80 + word * 4), want, "context {context}, word {word}");
        }
        b.set_threshold(context, 0xffff_fff5);
        assert_eq!(b.get(0x20_0000 + context * 0x1000), if context < 4 { 5 } else { 0 });
        assert_eq!(b.claim(context), 0);
    }
    for offset in [0x1000, 0x107c, 0x1080, 0x1ffc, 0x1f_fffc, 0x20_0008, 0x20_0ffc, SIZE - 4] {
        b.set(offset, !0);
        assert_eq!(b.get(offset), 0, "{offset:#x}");
    }
    assert_eq!(b.outputs(), [false; 4]);
}

#[test]
fn claim_and_complete() {
    let b = Board::new(SOURCES, 1);
    b.line(40, true);
    assert_eq!((b.pending(1), b.outputs()), (1 << 8, vec![false; 2]), "pending, though not enabled");
    b.enable(1, 1, 1 << 8);
    assert_eq!((b.outputs(), b.claim(1)), (vec![false; 2], 0), "priority 0 never interrupts");
    b.set_priority(40, 1);
    assert_eq!(b.outputs(), [false, true]);
    assert_eq!(b.claim(0), 0, "not enabled there");
    assert_eq!(b.claim(1), 40);
    assert_eq!((b.pending(1), b.outputs()), (0, vec![false; 2]));
    assert_eq!(b.claim(1), 0);
    // The level is still high when it is completed: again.
    b.complete(1, 40);
    assert_eq!((b.pending(1), b.outputs()), (1 << 8, vec![false, true]));
    assert_eq!(b.claim(1), 40);
    b.line(40, false);
    b.complete(1, 40);
    assert_eq!((b.pending(1), b.outputs()), (0, vec![false; 2]));
}

#[test]
fn the_gateway_holds_one_request() {
    let b = Board::enabled();
    b.line(7, true);
    b.line(7, false);
    assert_eq!(b.pending(0), 1 << 7, "a request that was forwarded stays");
    assert_eq!(b.claim(0), 7);
    b.line(7, true);
    assert_eq!(b.pending(0), 0, "the gateway waits for completion");
    b.line(7, false);
    b.complete(0, 7);
    assert_eq!(b.pending(0), 0, "and then looks at the level");
    b.line(0, true);
    b.line(96, true);
    b.line(u32::MAX, true);
    assert_eq!((b.pending(0), b.pending(3), b.claim(0)), (0, 0, 0), "no such sources");
}

#[test]
fn priorities_and_ties() {
    let b = Board::enabled();
    b.set_priority(90, 7);
    b.set_priority(33, 3);
    b.set_priority(34, 3);
    b.set_priority(2, 2);
    for source in [2, 34, 33, 90, 1] {
        b.line(source, true);
    }
    let order: Vec<u32> = std::iter::repeat_with(|| b.claim(0)).take(6).collect();
    assert_eq!(order, [90, 33, 34, 2, 1, 0], "highest priority, then lowest number");
}

#[test]
fn thresholds() {
    let b = Board::enabled();
    b.set_priority(5, 3);
    b.line(5, true);
    for threshold in 0..8 {
        b.set_threshold(2, threshold);
        assert_eq!(b.outputs()[2], threshold < 3, "at and below the threshold it is masked: {threshold}");
        assert!(b.outputs()[3], "each context has its own");
    }
    assert_eq!(b.claim(2), 5, "a claim is not affected by the threshold");
    assert_eq!(b.get(0x20_2000), 7);
}

#[test]
fn one_claim_takes_it_from_all_contexts() {
    let b = Board::enabled();
    b.line(9, true);
    assert_eq!(b.outputs(), [true; 4]);
    assert_eq!(b.claim(2), 9);
    assert_eq!((b.outputs(), b.claim(0)), (vec![false; 4], 0));
    // Completion by another context that has it enabled is fine; the PLIC does not check who claimed.
    b.line(9, false);
    b.complete(3, 9);
    b.line(9, true);
    assert_eq!(b.claim(1), 9);
}

#[test]
fn completions_that_are_ignored() {
    let b = Board::enabled();
    b.line(9, true);
    b.line(10, true);
    assert_eq!(b.claim(0), 9);
    b.enable(0, 0, !(1 << 9));
    for source in [9, 0, 96, 1024, u32::MAX, 1 << 16 | 9] {
        b.complete(0, source);
    }
    assert_eq!(b.pending(0), 1 << 10, "9 is not enabled in context 0 any more, the others do not exist");
    b.complete(0, 10);
    assert_eq!(b.pending(0), 1 << 10, "not claimed");
    b.complete(1, 9);
    assert_eq!(b.pending(0), 3 << 9);
    b.enable(0, 0, 1 << 9);
    assert_eq!(b.claim(0), 9);
}

#[test]
fn all_sources() {
    let b = Board::new(1023, 1);
    for source in 1..=1023 {
        b.set_priority(source, 1 + source % 7);
        b.line(source, true);
    }
    (0..32).for_each(|w| b.enable(1, w, !0));
    let mut last = (8, 0);
    for _ in 0..1023 {
        let source = b.claim(1);
        let key = (1 + source % 7, source);
        assert!(key.0 < last.0 || (key.0 == last.0 && key.1 > last.1), "{source} after {last:?}");
        last = key;
    }
    assert_eq!((b.claim(1), b.outputs()[1]), (0, false));
    assert_eq!(lock(&Board::new(5000, 1).plic).sources, 1023);
}

#[test]
fn access_widths() {
    let b = Board::new(SOURCES, 1);
    let bus = OnBus::new(&b.plic, RULES);
    bus.write(4, AccessSize::B4, 3).unwrap();
    assert_eq!(bus.read(4, AccessSize::B4), Ok(3));
    for size in [AccessSize::B1, AccessSize::B2, AccessSize::B8] {
        assert!(bus.read(8, size).is_err() && bus.write(8, size, 1).is_err());
    }
    assert!(bus.read(2, AccessSize::B4).is_err());
    assert_eq!(b.get(8), 0);
}

#[test]
fn reset_in_phases() {
    let b = Board::enabled();
    b.line(3, true);
    b.line(4, true);
    b.claim(0);
    b.set_threshold(0, 2);
    b.plic.reset(ResetPhase::Enter);
    assert_eq!(b.outputs(), [false, true, true, true], "no call out yet");
    b.plic.reset(ResetPhase::Hold);
    assert_eq!(b.outputs(), [false; 4]);
    // A device lowers its line in its own reset, another raises one.
    b.line(4, false);
    b.line(5, true);
    b.plic.reset(ResetPhase::Exit);
    assert_eq!(b.pending(0), 1 << 3 | 1 << 5, "what is high after the reset");
    for offset in (0..0x180).step_by(4).chain((0x2000..0x2200).step_by(4)).chain([0x20_0000, 0x20_1000]) {
        assert_eq!(b.get(offset), 0, "{offset:#x}");
    }
    assert_eq!(b.claim(1), 0);
}

#[test]
fn a_line_into_it() {
    let b = Board::enabled();
    let line = IrqLine::new(b.irqs.clone(), 12);
    line.raise();
    assert_eq!(b.claim(1), 12);
    line.lower();
    b.complete(1, 12);
    line.pulse();
    assert_eq!(b.claim(1), 12, "a pulse is a request");
}

#[test]
fn saved_in_the_middle() {
    let b = Board::enabled();
    b.set_priority(33, 7);
    b.set_threshold(3, 4);
    [1, 33, 60].iter().for_each(|&s| b.line(s, true));
    assert_eq!(b.claim(0), 33);
    b.line(2, true);
    b.line(2, false);
    let other = Board::new(SOURCES, 2);
    assert_round_trip(&b.plic, &other.plic);
    assert_eq!(other.outputs(), b.outputs());
    assert_eq!(other.outputs(), [true, true, true, false]);
    go_on_alike(&b, &other, 20_000, random_step);
    assert_eq!(saved(&b.plic), saved(&other.plic));
    // The vCPUs may have been reset in between: outputs are driven anew, high or low.
    other.harts[0].set_pin(CpuPin::Meip, true);
    reset(&*other.plic);
    other.harts[0].set_pin(CpuPin::Seip, true);
    let fresh = Board::new(SOURCES, 2);
    assert_round_trip(&fresh.plic, &other.plic);
    assert_eq!(other.outputs(), [false; 4]);
}

fn random_step(b: &Board, rng: &mut Rng) -> (u32, Vec<bool>) {
    let (context, value) = (rng.below(5), rng.next() as u32);
    let mut seen = 0;
    match rng.below(8) {
        0 => b.set_priority(value % 100, value >> 8),
        1 => b.enable(context, rng.below(4), value),
        2 => b.set_threshold(context, value & 3),
        3 => b.complete(context, value % 100),
        4 => b.set(rng.below(SIZE / 4) * 4, value),
        5 => seen = b.get(rng.below(0x2300 / 4) * 4),
        6 => seen = b.claim(context),
        _ => b.line(value % 100, value & 0x8000 != 0),
    }
    (seen, b.outputs())
}

#[test]
fn damaged_states() {
    let b = Board::enabled();
    b.line(3, true);
    for (field, value) in [
        ("/priority/3", 8),
        ("/threshold/0", 8),
        ("/pending/0", 1),
        ("/claimed/0", 1),
        ("/level/0", 1),
        ("/enable/3/0", 1),
    ] {
        assert!(restore_with(&b.plic, field, value).is_err(), "{field}");
    }
    for (field, len) in [("/priority", 95), ("/pending", 2), ("/level", 4), ("/threshold", 3), ("/enable/1", 2)] {
        assert!(restore_with(&b.plic, field, vec![0; len]).is_err(), "{field}");
    }
    assert!(restore_with(&b.plic, "/enable", vec![[0; 3]; 5]).is_err());
    let smaller = Board::new(64, 2);
    let state = lock(&b.plic).save_state();
    assert!(lock(&smaller.plic).restore_state(state).unwrap_err().to_string().contains("64"));
    restore_damaged(&b.plic, |rng| drop(random_step(&b, rng)));
}

#[test]
fn random_accesses() {
    let b = Board::new(SOURCES, 2);
    let bus = OnBus::new(&b.plic, RULES);
    let mut rng = Rng(3);
    for _ in 0..100_000 {
        random_step(&b, &mut rng);
        let at = rng.below(SIZE);
        let _ = bus.read(at, any_size(rng.next()));
        let _ = bus.write(at & !3, any_size(rng.next()), rng.next());
    }
    reset(&*b.plic);
    assert_round_trip(&b.plic, &Board::new(SOURCES, 2).plic);
}
