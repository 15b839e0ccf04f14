//! Reset, start, stop.

use super::device::lock;
use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant};

/// The three phases of a reset; every device does one before any does the next.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum ResetPhase {
    /// Own state to its reset values. No call out.
    Enter,
    /// Outputs (interrupt lines, regions) to their reset levels.
    Hold,
    /// Start things: timers, host I/O.
    Exit,
}

/// A device's life, as its author writes it.
pub trait MutLifecycle: Send {
    /// One phase of a reset.
    fn reset(&mut self, _phase: ResetPhase) {}
    /// The virtual clock begins to run.
    fn start(&mut self) {}
    /// The machine stops: ask host I/O to quiesce, hand `drain` to what is still in
    /// flight; never wait.
    fn stop(&mut self, _drain: &Drain) {}
}

/// A device's life, as the machine calls it.
pub trait Lifecycle: Send + Sync {
    /// One phase of a reset.
    fn reset(&self, _phase: ResetPhase) {}
    /// The virtual clock begins to run.
    fn start(&self) {}
    /// The machine stops: see [`MutLifecycle::stop`].
    fn stop(&self, _drain: &Drain) {}
}

impl<D: MutLifecycle> Lifecycle for Mutex<D> {
    fn reset(&self, phase: ResetPhase) {
        lock(self).reset(phase);
    }
    fn start(&self) {
        lock(self).start();
    }
    fn stop(&self, drain: &Drain) {
        lock(self).stop(drain);
    }
}

/// Counts what is in flight while the machine stops.
#[derive(Clone, Default)]
pub struct Drain(Arc<DrainState>);

#[derive(Default)]
struct DrainState {
    open: Mutex<usize>,
    none: Condvar,
}

/// Something still in flight; dropped when it is done.
pub struct DrainToken(Arc<DrainState>);

impl Drain {
    /// Nothing in flight.
    pub fn new() -> Self {
        Self::default()
    }

    /// One more in flight.
    pub fn token(&self) -> DrainToken {
        *lock(&self.0.open) += 1;
        DrainToken(self.0.clone())
    }

    /// Waits until all tokens are dropped; false if `timeout` passes first.
    pub fn wait(&self, timeout: Duration) -> bool {
        let deadline = Instant::now() + timeout;
        let mut open = lock(&self.0.open);
        while *open > 0 {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return false;
            }
            let woken = self.0.none.wait_timeout(open, left);
            open = woken.unwrap_or_else(std::sync::PoisonError::into_inner).0;
        }
        true
    }
}

impl Drop for DrainToken {
    fn drop(&mut self) {
        let mut open = lock(&self.0.open);
        *open -= 1;
        if *open == 0 {
            self.0.none.notify_all();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn drain_waits_for_tokens() {
        let drain = Drain::new();
        assert!(drain.wait(Duration::ZERO));
        let token = drain.token();
        assert!(!drain.wait(Duration::from_millis(1)));
        let worker = std::thread::spawn(move || drop(token));
        assert!(drain.wait(Duration::from_secs(5)));
        worker.join().unwrap();
    }
}
