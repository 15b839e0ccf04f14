//! Time by counting instructions: `-icount`.
//!
//! The one vCPU of the machine says how many instructions it has executed, and the virtual clock is that many times
//! `2^shift` ns, plus what was skipped while the vCPU waited for an interrupt. Its timers are fired by the vCPU's
//! thread, between two instructions that the instructions' number alone determines. So, with the same input, the
//! guest executes the same instructions.
//!
//! A deadline that the guest itself moves forward takes effect [`GRACE`] instructions later at the earliest: then no
//! block of translated code that has begun can run past it.

use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock, Weak};
use std::time::{Duration, Instant};

use super::clocks::VirtualClock;
use super::timer::TimerQueue;

/// No block has more instructions.
pub const GRACE: u64 = 4096;
/// Most instructions between two looks at the timers.
const LONGEST: u64 = 1 << 24;
/// Largest shift: 1 instruction is 1 µs.
pub const MAX_SHIFT: u32 = 10;
/// How often `auto` compares guest and host time.
const ADJUST: Duration = Duration::from_millis(100);

/// How long an instruction takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Shift {
    /// `2^n` ns.
    Fixed(u32),
    /// What makes the guest's time run about as the host's. Not repeatable.
    Auto,
}

/// The instruction counter behind a virtual clock.
pub struct InstructionClock {
    shift: AtomicU32,
    /// Sleep while the vCPU waits, instead of skipping the time.
    sleep: bool,
    /// Time now, in ns.
    now: AtomicU64,
    /// Time at instruction `since`.
    base: AtomicU64,
    since: AtomicU64,
    /// A timer's deadline has moved forward.
    moved: AtomicBool,
    timers: Weak<TimerQueue>,
    fire: Box<dyn Fn() -> bool + Send + Sync>,
    /// Ends the vCPU's wait. One that runs finds out where its slice ends: whoever has it look up in the middle, at a time of
    /// the host's, leaves a mark in what a trace says of its code.
    wake: OnceLock<Box<dyn Fn() + Send + Sync>>,
    /// `auto`: when it was looked at last, in host time and guest time.
    auto: Option<std::sync::Mutex<(Instant, u64)>>,
}

impl InstructionClock {
    /// Counts for `clock`, whose timers are `timers`, fired by `fire` (true if one was).
    pub(crate) fn attach(
        clock: &VirtualClock,
        (shift, sleep): (Shift, bool),
        timers: &Arc<TimerQueue>,
        fire: impl Fn() -> bool + Send + Sync + 'static,
    ) {
        let start = clock.now();
        let (shift, auto) = match shift {
            Shift::Fixed(n) => (n.min(MAX_SHIFT), None),
            Shift::Auto => (3, Some(std::sync::Mutex::new((Instant::now(), start)))),
        };
        clock.count(InstructionClock {
            shift: AtomicU32::new(shift),
            sleep,
            now: AtomicU64::new(start),
            base: AtomicU64::new(start),
            since: AtomicU64::new(0),
            moved: AtomicBool::new(false),
            timers: Arc::downgrade(timers),
            fire: Box::new(fire),
            wake: OnceLock::new(),
            auto,
        });
    }

    /// Time, in ns, as the vCPU said last.
    pub(crate) fn now(&self) -> u64 {
        self.now.load(Ordering::Acquire)
    }

    /// Sets the time (restore).
    pub(crate) fn set(&self, ns: u64) {
        let shift = self.shift.load(Ordering::Relaxed);
        let since = self.now().wrapping_sub(self.base.load(Ordering::Relaxed)) >> shift;
        self.since.fetch_add(since, Ordering::Relaxed);
        self.base.store(ns, Ordering::Relaxed);
        self.now.store(ns, Ordering::Release);
    }

    /// Says how to end the vCPU's wait, or its next, when a deadline has moved. Called on any thread.
    pub fn set_wake(&self, wake: impl Fn() + Send + Sync + 'static) {
        let _ = self.wake.set(Box::new(wake));
    }

    pub(crate) fn deadline_moved(&self) {
        self.moved.store(true, Ordering::Release);
        if let Some(wake) = self.wake.get() {
            wake();
        }
    }

    fn first_deadline(&self) -> Option<u64> {
        self.timers.upgrade()?.first_deadline()
    }

    fn at(&self, executed: u64) -> u64 {
        let count = executed.wrapping_sub(self.since.load(Ordering::Relaxed));
        self.base.load(Ordering::Relaxed).wrapping_add(count << self.shift.load(Ordering::Relaxed))
    }

    /// The vCPU has executed that many instructions since it was made.
    pub fn sync(&self, executed: u64) {
        self.now.store(self.at(executed), Ordering::Release);
    }

    /// Whether a deadline has moved forward since this was asked last.
    pub fn take_moved(&self) -> bool {
        self.moved.load(Ordering::Acquire) && self.moved.swap(false, Ordering::AcqRel)
    }

    /// The vCPU's instruction count at the first deadline, no farther away than the longest slice.
    pub fn deadline(&self, executed: u64) -> u64 {
        let now = self.at(executed);
        let shift = self.shift.load(Ordering::Relaxed);
        let left = self.first_deadline().map_or(LONGEST, |at| {
            let ns = at.saturating_sub(now);
            (ns >> shift) + u64::from(ns & ((1 << shift) - 1) != 0)
        });
        executed + left.min(LONGEST)
    }

    /// On the vCPU's thread, outside guest code: fires what is due. Gives the number of instructions to the next
    /// deadline, at least 1.
    pub fn slice(&self, executed: u64) -> u64 {
        self.sync(executed);
        self.adjust(executed);
        self.fire_due();
        self.moved.store(false, Ordering::Release);
        (self.deadline(executed) - executed).max(1)
    }

    fn fire_due(&self) {
        // What a callback arms in the past is due too.
        for _ in 0..1000 {
            if self.first_deadline().is_none_or(|at| at > self.now()) || !(self.fire)() {
                return;
            }
        }
    }

    /// How long the host's time is to pass before [`InstructionClock::skip`]; `None`: nothing will happen by itself.
    pub fn idle(&self, executed: u64) -> Option<Duration> {
        self.sync(executed);
        let left = self.first_deadline()?.saturating_sub(self.now());
        Some(if self.sleep { Duration::from_nanos(left) } else { Duration::ZERO })
    }

    /// The vCPU waits for an interrupt: goes on to the first deadline and fires what is due then.
    pub fn skip(&self, executed: u64) {
        self.sync(executed);
        if let Some(left) = self.first_deadline().and_then(|at| at.checked_sub(self.now())) {
            self.base.fetch_add(left, Ordering::Relaxed);
            self.sync(executed);
        }
        self.fire_due();
    }

    /// `auto`: another shift if guest time runs too fast or too slow.
    fn adjust(&self, executed: u64) {
        let Some(auto) = &self.auto else { return };
        let mut last = auto.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        let host = last.0.elapsed();
        if host < ADJUST {
            return;
        }
        let (now, host) = (self.now(), host.as_nanos() as u64);
        let guest = now - last.1;
        let shift = self.shift.load(Ordering::Relaxed);
        let new = match () {
            () if guest > host.saturating_mul(3) / 2 => shift.saturating_sub(1),
            () if guest < host * 2 / 3 => (shift + 1).min(MAX_SHIFT),
            () => shift,
        };
        if new != shift {
            self.base.store(now, Ordering::Relaxed);
            self.since.store(executed, Ordering::Relaxed);
            self.shift.store(new, Ordering::Relaxed);
        }
        *last = (Instant::now(), now);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Mutex;

    #[test]
    fn time_is_instructions_and_what_was_skipped() {
        let clock = VirtualClock::new();
        let queue = TimerQueue::new(clock.clone(), || {});
        let fired = Arc::new(Mutex::new(Vec::new()));
        let timer = queue.timer();
        let (log, c) = (fired.clone(), clock.clone());
        timer.bind(move || log.lock().unwrap().push(c.now()));
        let q = queue.clone();
        InstructionClock::attach(&clock, (Shift::Fixed(2), false), &queue, move || q.fire_counted());
        let count = clock.counted().unwrap();
        clock.start();
        std::thread::sleep(Duration::from_millis(2));
        assert_eq!(clock.now(), 0, "no instruction, no time");
        assert!(!queue.fire(), "it is the vCPU that fires");
        timer.arm(401);
        assert!(count.take_moved() && !count.take_moved());
        assert_eq!(count.slice(50), 51, "200 ns have passed, 201 are 51 instructions");
        assert_eq!(clock.now(), 200);
        assert!(fired.lock().unwrap().is_empty());
        count.slice(101);
        assert_eq!(*fired.lock().unwrap(), [404]);
        timer.arm(10_000);
        assert_eq!(count.idle(101), Some(Duration::ZERO));
        count.skip(101);
        assert_eq!((clock.now(), fired.lock().unwrap().last().copied()), (10_000, Some(10_000)));
        count.sync(102);
        assert_eq!(clock.now(), 10_004);
        clock.set(77);
        assert_eq!(clock.now(), 77);
        count.sync(103);
        assert_eq!(clock.now(), 81);
        assert_eq!(count.idle(103), None, "no deadline");
    }
}
