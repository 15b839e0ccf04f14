//! Timers: a callback at a deadline, on the I/O thread.

use super::clocks::ClockSource;
use std::collections::BTreeSet;
use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

type Callback = Box<dyn Fn() + Send + Sync>;

/// The deadline of a timer that is not armed.
const NEVER: u64 = u64::MAX;

/// The timers of one clock. The I/O thread asks it how long to wait and has it fire.
pub struct TimerQueue {
    clock: Arc<dyn ClockSource>,
    /// (deadline, timer), leaf lock.
    armed: Mutex<Armed>,
    next_id: AtomicU64,
    /// Tells the I/O thread that there is an earlier deadline.
    wake: Callback,
}

#[derive(Default)]
struct Armed {
    order: BTreeSet<(u64, u64)>,
    slots: std::collections::HashMap<u64, Arc<Slot>>,
}

struct Slot {
    id: u64,
    deadline: AtomicU64,
    callback: OnceLock<Callback>,
}

fn lock(m: &Mutex<Armed>) -> MutexGuard<'_, Armed> {
    m.lock().unwrap_or_else(PoisonError::into_inner)
}

impl TimerQueue {
    /// A queue on `clock`; `wake` is called when the first deadline moves forward.
    pub fn new(clock: Arc<dyn ClockSource>, wake: impl Fn() + Send + Sync + 'static) -> Arc<Self> {
        let armed = Mutex::default();
        Arc::new(Self { clock, armed, next_id: AtomicU64::new(0), wake: Box::new(wake) })
    }

    /// The clock.
    pub fn clock(&self) -> &Arc<dyn ClockSource> {
        &self.clock
    }

    /// A timer whose callback is bound later.
    pub fn timer(self: &Arc<Self>) -> Timer {
        let id = self.next_id.fetch_add(1, Ordering::Relaxed);
        let slot = Arc::new(Slot { id, deadline: AtomicU64::new(NEVER), callback: OnceLock::new() });
        Timer(Arc::new(Inner { queue: self.clone(), slot }))
    }

    /// ns until the first deadline; `None` if there is none or the clock stands.
    pub fn wait_ns(&self) -> Option<u64> {
        let first = lock(&self.armed).order.first().copied()?.0;
        let now = self.clock.now();
        (self.clock.is_running() && !self.clock.is_counted()).then(|| first.saturating_sub(now))
    }

    /// Calls back everything that is due, in deadline order, with no lock held. True if
    /// something was.
    pub fn fire(&self) -> bool {
        self.clock.is_running() && !self.clock.is_counted() && self.fire_counted()
    }

    /// The first deadline.
    pub fn first_deadline(&self) -> Option<u64> {
        Some(lock(&self.armed).order.first()?.0)
    }

    /// The same as [`TimerQueue::fire`], for who counts instructions.
    pub(crate) fn fire_counted(&self) -> bool {
        let now = self.clock.now();
        // Only what is due on entry: a callback that arms its timer in the past must not
        // keep the I/O thread here.
        let due: Vec<_> = lock(&self.armed).order.range(..=(now, u64::MAX)).copied().collect();
        for &entry in &due {
            if let Some(slot) = self.take_due(entry)
                && let Some(callback) = slot.callback.get()
            {
                callback();
            }
        }
        !due.is_empty()
    }

    /// Takes a due timer out, unless an earlier callback disarmed or re-armed it.
    fn take_due(&self, (deadline, id): (u64, u64)) -> Option<Arc<Slot>> {
        let mut armed = lock(&self.armed);
        if !armed.order.remove(&(deadline, id)) {
            return None;
        }
        let slot = armed.slots.remove(&id)?;
        slot.deadline.store(NEVER, Ordering::Release);
        Some(slot)
    }

    fn arm(&self, slot: &Arc<Slot>, deadline: u64) {
        let earlier = {
            let mut armed = lock(&self.armed);
            let old = slot.deadline.swap(deadline, Ordering::AcqRel);
            if old == deadline {
                return;
            }
            let first = armed.order.first().map_or(NEVER, |f| f.0);
            if old != NEVER {
                armed.order.remove(&(old, slot.id));
            }
            if deadline == NEVER {
                armed.slots.remove(&slot.id);
            } else {
                armed.order.insert((deadline, slot.id));
                armed.slots.insert(slot.id, slot.clone());
            }
            deadline < first
        };
        if earlier {
            self.clock.deadline_moved();
            (self.wake)();
        }
    }
}

/// A one-shot timer. Clones are the same timer; the last one dropped disarms it.
#[derive(Clone)]
pub struct Timer(Arc<Inner>);

struct Inner {
    queue: Arc<TimerQueue>,
    slot: Arc<Slot>,
}

impl Drop for Inner {
    fn drop(&mut self) {
        self.queue.arm(&self.slot, NEVER);
    }
}

impl Timer {
    /// Names the callback, once; false if there is one. It runs on the I/O thread with no
    /// lock held.
    pub fn bind(&self, callback: impl Fn() + Send + Sync + 'static) -> bool {
        self.0.slot.callback.set(Box::new(callback)).is_ok()
    }

    /// Fires once when the clock reaches `deadline_ns`; replaces an earlier deadline. A
    /// deadline in the past fires as soon as possible; `u64::MAX` disarms.
    pub fn arm(&self, deadline_ns: u64) {
        self.0.queue.arm(&self.0.slot, deadline_ns);
    }

    /// Forgets the deadline. A callback that runs already is not waited for.
    pub fn disarm(&self) {
        self.arm(NEVER);
    }

    /// The deadline, if armed.
    pub fn deadline(&self) -> Option<u64> {
        Some(self.0.slot.deadline.load(Ordering::Acquire)).filter(|&d| d != NEVER)
    }

    /// Whether the timer's clock stands still: it does not fire then.
    pub fn stands(&self) -> bool {
        !self.0.queue.clock.is_running()
    }

    /// Now on the timer's clock, in ns.
    pub fn now(&self) -> u64 {
        self.0.queue.clock.now()
    }
}

impl fmt::Debug for Timer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Timer").field("deadline", &self.deadline()).finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::clock::VirtualClock;

    #[test]
    fn deadline_order_and_disarm() {
        let clock = VirtualClock::new();
        let wakes = Arc::new(AtomicU64::new(0));
        let w = wakes.clone();
        let queue = TimerQueue::new(clock.clone(), move || {
            w.fetch_add(1, Ordering::Relaxed);
        });
        let log = Arc::new(Mutex::new(Vec::new()));
        let timers: Vec<_> = (0..4)
            .map(|i| {
                let (t, log) = (queue.timer(), log.clone());
                assert!(t.bind(move || log.lock().unwrap().push(i)));
                t
            })
            .collect();
        timers[0].arm(300);
        timers[1].arm(100);
        timers[2].arm(200);
        timers[3].arm(150);
        timers[3].disarm();
        assert_eq!(wakes.load(Ordering::Relaxed), 2);
        assert_eq!(queue.wait_ns(), None, "the clock stands");
        assert!(!queue.fire());
        clock.advance(200);
        assert_eq!(queue.wait_ns(), Some(0));
        assert!(queue.fire());
        assert_eq!(*log.lock().unwrap(), [1, 2]);
        assert_eq!(timers[0].deadline(), Some(300));
        drop(timers);
        clock.advance(1000);
        assert!(!queue.fire());
    }

    #[test]
    fn rearming_in_the_callback_fires_next_time() {
        let clock = VirtualClock::new();
        let queue = TimerQueue::new(clock.clone(), || {});
        let timer = queue.timer();
        let (again, count) = (Arc::downgrade(&timer.0), Arc::new(AtomicU64::new(0)));
        let n = count.clone();
        timer.bind(move || {
            n.fetch_add(1, Ordering::Relaxed);
            if let Some(inner) = again.upgrade() {
                Timer(inner).arm(20);
            }
        });
        timer.arm(10);
        clock.advance(10);
        queue.fire();
        clock.advance(10);
        queue.fire();
        assert_eq!(count.load(Ordering::Relaxed), 2);
    }
}
