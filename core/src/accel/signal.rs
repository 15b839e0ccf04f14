//! What a vCPU's thread sleeps on while it waits for an interrupt.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use rustix::thread::futex;

/// Nobody has given it, and nobody sleeps.
const IDLE: u32 = 0;
/// Given: the next wait returns at once.
const GIVEN: u32 = 1;
/// The vCPU's thread sleeps, or is about to.
const ASLEEP: u32 = 2;

/// A wake-up that is not lost: `wake` before `wait` makes `wait` return at once. One thread waits; any may wake. What nobody
/// sleeps on costs no system call.
#[derive(Default)]
pub struct VcpuSignal {
    state: AtomicU32,
}

impl VcpuSignal {
    /// A signal nobody has given.
    pub fn new() -> Arc<Self> {
        Arc::new(Self::default())
    }

    /// Ends the current or the next [`VcpuSignal::wait`].
    pub fn wake(&self) {
        if self.state.swap(GIVEN, Ordering::SeqCst) == ASLEEP {
            let _ = futex::wake(&self.state, futex::Flags::PRIVATE, 1);
        }
    }

    /// Forgets a wake-up; true if there was one. For the thread that waits.
    pub fn take(&self) -> bool {
        self.state.compare_exchange(GIVEN, IDLE, Ordering::SeqCst, Ordering::SeqCst).is_ok()
    }

    /// Sleeps until woken, or for `timeout`; true if woken.
    pub fn wait(&self, timeout: Option<Duration>) -> bool {
        if self.take() {
            return true;
        }
        let deadline = timeout.and_then(|t| Instant::now().checked_add(t));
        let mut left = timeout;
        loop {
            // Fails if it has been given.
            let _ = self.state.compare_exchange(IDLE, ASLEEP, Ordering::SeqCst, Ordering::SeqCst);
            let time = left.map(|t| futex::Timespec { tv_sec: t.as_secs() as i64, tv_nsec: t.subsec_nanos().into() });
            // Returns at once if it is not ASLEEP, and perhaps without any reason.
            let _ = futex::wait(&self.state, futex::Flags::PRIVATE, ASLEEP, time.as_ref());
            if self.take() {
                return true;
            }
            left = deadline.map(|d| d.saturating_duration_since(Instant::now()));
            if left == Some(Duration::ZERO) {
                // It may be given this very moment.
                return self.state.swap(IDLE, Ordering::SeqCst) == GIVEN;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_wake_up_is_not_lost() {
        let signal = VcpuSignal::new();
        assert!(!signal.wait(Some(Duration::from_micros(50))));
        signal.wake();
        assert!(signal.wait(None) && !signal.take());
        signal.wake();
        signal.wake();
        assert!(signal.take() && !signal.take());
        assert!(!signal.wait(Some(Duration::ZERO)));
        // Two threads wake each other, asleep or not.
        let other = VcpuSignal::new();
        std::thread::scope(|scope| {
            scope.spawn(|| {
                for _ in 0..2000 {
                    assert!(signal.wait(Some(Duration::from_secs(120))));
                    other.wake();
                }
            });
            for i in 0..2000 {
                signal.wake();
                let limit = if i % 2 == 0 { None } else { Some(Duration::from_secs(120)) };
                assert!(other.wait(limit));
            }
        });
    }
}
