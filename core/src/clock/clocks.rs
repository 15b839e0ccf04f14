//! The three clocks of a machine, in nanoseconds.
//!
//! * virtual: guest time. Stops with the machine, starts at 0, is saved.
//! * host: wall-clock time since 1970, for real-time clocks.
//! * realtime: never stops; displays, network timeouts.

use super::icount::InstructionClock;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering, fence};
use std::sync::{Arc, Mutex, OnceLock, PoisonError, Weak};
use std::time::Instant;

/// A clock timers can be armed on.
pub trait ClockSource: Send + Sync {
    /// Now, in ns.
    fn now(&self) -> u64;
    /// False while it stands still: its timers do not fire then.
    fn is_running(&self) -> bool {
        true
    }
    /// Its timers are fired by who counts instructions.
    fn is_counted(&self) -> bool {
        false
    }
    /// The first deadline of its timers has moved forward.
    fn deadline_moved(&self) {}
}

/// Which clock.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ClockKind {
    /// Guest time.
    Virtual,
    /// Wall-clock time.
    Host,
    /// Never stops.
    Realtime,
}

/// Told when a clock starts, stops or jumps, so that waits can be computed again.
pub trait ClockListener: Send + Sync {
    /// The clock changed its course.
    fn clock_changed(&self);
}

/// Guest time. `now` is lock-free.
pub struct VirtualClock {
    base: Instant,
    /// Odd while the two below change.
    sequence: AtomicU64,
    running: AtomicBool,
    /// Moved by hand: timers fire although it does not run.
    manual: AtomicBool,
    /// Running: what to add to the time since `base` (wrapping). Stopped: the time.
    offset: AtomicU64,
    change: Mutex<Vec<Weak<dyn ClockListener>>>,
    counted: OnceLock<Arc<InstructionClock>>,
}

impl VirtualClock {
    /// Stopped at 0.
    pub fn new() -> Arc<Self> {
        Arc::new(Self {
            base: Instant::now(),
            sequence: AtomicU64::new(0),
            running: AtomicBool::new(false),
            manual: AtomicBool::new(false),
            offset: AtomicU64::new(0),
            change: Mutex::new(Vec::new()),
            counted: OnceLock::new(),
        })
    }

    fn elapsed(&self) -> u64 {
        self.base.elapsed().as_nanos() as u64
    }

    /// Now, in ns.
    pub fn now(&self) -> u64 {
        if let Some(counted) = self.counted.get() {
            return counted.now();
        }
        loop {
            let before = self.sequence.load(Ordering::Acquire);
            let running = self.running.load(Ordering::Relaxed);
            let offset = self.offset.load(Ordering::Relaxed);
            fence(Ordering::Acquire);
            if before & 1 == 0 && self.sequence.load(Ordering::Relaxed) == before {
                return if running { self.elapsed().wrapping_add(offset) } else { offset };
            }
            std::hint::spin_loop();
        }
    }

    /// True between start and stop.
    pub fn is_running(&self) -> bool {
        self.running.load(Ordering::Acquire)
    }

    /// The instruction counter that this clock follows, with `-icount`.
    pub fn counted(&self) -> Option<&Arc<InstructionClock>> {
        self.counted.get()
    }

    /// Follows an instruction counter from now on.
    pub(super) fn count(&self, by: InstructionClock) {
        let _ = self.counted.set(Arc::new(by));
    }

    /// Lets time run.
    pub fn start(&self) {
        self.manual.store(false, Ordering::Release);
        self.update(|now| (true, now));
    }

    /// Stops time.
    pub fn stop(&self) {
        self.manual.store(false, Ordering::Release);
        self.update(|now| (false, now));
    }

    /// Sets the time (restore); it keeps running or standing.
    pub fn set(&self, ns: u64) {
        if let Some(counted) = self.counted.get() {
            counted.set(ns);
        }
        let running = self.is_running();
        self.update(|_| (running, ns));
    }

    /// Moves a stopped clock on by `ns`, and lets timers fire though it stands (tests).
    pub fn advance(&self, ns: u64) {
        self.manual.store(true, Ordering::Release);
        self.set(self.now().saturating_add(ns));
    }

    /// Adds who is told of changes, as long as it lives.
    pub fn add_listener(&self, listener: Weak<dyn ClockListener>) {
        self.change.lock().unwrap_or_else(PoisonError::into_inner).push(listener);
    }

    fn update(&self, f: impl FnOnce(u64) -> (bool, u64)) {
        let mut listeners = self.change.lock().unwrap_or_else(PoisonError::into_inner);
        let (running, time) = f(self.now());
        let offset = if running { time.wrapping_sub(self.elapsed()) } else { time };
        self.sequence.fetch_add(1, Ordering::AcqRel);
        self.running.store(running, Ordering::Release);
        self.offset.store(offset, Ordering::Release);
        self.sequence.fetch_add(1, Ordering::Release);
        listeners.retain(|l| l.strong_count() > 0);
        let told: Vec<_> = listeners.iter().filter_map(Weak::upgrade).collect();
        drop(listeners);
        told.iter().for_each(|l| l.clock_changed());
    }
}

impl ClockSource for VirtualClock {
    fn now(&self) -> u64 {
        VirtualClock::now(self)
    }
    fn is_running(&self) -> bool {
        VirtualClock::is_running(self) || self.manual.load(Ordering::Acquire)
    }
    fn is_counted(&self) -> bool {
        self.counted.get().is_some()
    }
    fn deadline_moved(&self) {
        if let Some(counted) = self.counted.get() {
            counted.deadline_moved();
        }
    }
}

/// Wall-clock time since 1970-01-01 UTC.
#[derive(Clone, Copy, Debug, Default)]
pub struct HostClock;

impl ClockSource for HostClock {
    fn now(&self) -> u64 {
        crate::outside::wall_clock()
    }
}

/// Time that never stops, from an arbitrary start.
#[derive(Clone, Copy, Debug)]
pub struct RealtimeClock(Instant);

impl Default for RealtimeClock {
    fn default() -> Self {
        Self(Instant::now())
    }
}

impl ClockSource for RealtimeClock {
    fn now(&self) -> u64 {
        self.0.elapsed().as_nanos() as u64
    }
}

/// The clocks of a machine.
#[derive(Clone)]
pub struct Clocks {
    /// Guest time.
    pub virt: Arc<VirtualClock>,
    /// Wall-clock time.
    pub host: HostClock,
    /// Never stops.
    pub realtime: RealtimeClock,
}

impl Clocks {
    /// The virtual clock stands at 0.
    pub fn new() -> Self {
        Self { virt: VirtualClock::new(), host: HostClock, realtime: RealtimeClock::default() }
    }

    /// The clock of a kind.
    pub fn get(&self, kind: ClockKind) -> Arc<dyn ClockSource> {
        match kind {
            ClockKind::Virtual => self.virt.clone(),
            ClockKind::Host => Arc::new(self.host),
            ClockKind::Realtime => Arc::new(self.realtime),
        }
    }
}

impl Default for Clocks {
    fn default() -> Self {
        Self::new()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stops_and_goes_on() {
        let c = VirtualClock::new();
        assert_eq!(c.now(), 0);
        c.start();
        let a = c.now();
        std::thread::sleep(std::time::Duration::from_millis(2));
        let b = c.now();
        assert!(b >= a + 2_000_000);
        c.stop();
        let stopped = c.now();
        std::thread::sleep(std::time::Duration::from_millis(1));
        assert_eq!(c.now(), stopped);
        c.set(5);
        c.advance(7);
        assert_eq!(c.now(), 12);
        assert!(HostClock.now() > 1_600_000_000_000_000_000);
    }
}
