//! Who fires the virtual clock's timers while every vCPU waits for an interrupt: a waiting vCPU's own thread. It would be woken
//! by most of them anyway, and the I/O thread need not be woken to do that.

use crate::accel::VcpuSignal;
use crate::clock::TimerQueue;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::ThreadId;

#[derive(Default)]
pub(super) struct Keeper {
    /// There is one.
    kept: AtomicBool,
    who: Mutex<Option<(ThreadId, Arc<VcpuSignal>)>>,
    /// Held while timers fire, so that no two callbacks of theirs run at once.
    firing: Mutex<()>,
}

fn lock<T>(m: &Mutex<T>) -> MutexGuard<'_, T> {
    m.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Keeper {
    /// The calling thread keeps time from now on, and is told by `signal`. False if another does.
    pub fn begin(&self, signal: &Arc<VcpuSignal>) -> bool {
        let mut who = lock(&self.who);
        if who.is_some() {
            return false;
        }
        *who = Some((std::thread::current().id(), signal.clone()));
        self.kept.store(true, Ordering::SeqCst);
        true
    }

    /// It does so no longer.
    pub fn end(&self) {
        let mut who = lock(&self.who);
        self.kept.store(false, Ordering::SeqCst);
        *who = None;
    }

    pub fn is_kept(&self) -> bool {
        self.kept.load(Ordering::SeqCst)
    }

    /// Has the one who keeps time look at the deadlines again. False if nobody does.
    pub fn tell(&self) -> bool {
        if !self.is_kept() {
            return false;
        }
        let who = lock(&self.who);
        let Some((thread, signal)) = &*who else { return false };
        // It looks again by itself after what it fires.
        if *thread != std::thread::current().id() {
            signal.wake();
        }
        true
    }

    /// For who keeps time.
    pub fn fire(&self, queue: &TimerQueue) {
        let _firing = lock(&self.firing);
        queue.fire();
    }

    /// For the I/O thread, which waits for nobody.
    pub fn fire_unless_kept(&self, queue: &TimerQueue) {
        if !self.is_kept()
            && let Ok(_firing) = self.firing.try_lock()
        {
            queue.fire();
        }
    }

    /// Waits until what fires on another thread has fired.
    pub fn barrier(&self) {
        let on_this = lock(&self.who).as_ref().is_some_and(|(thread, _)| *thread == std::thread::current().id());
        if !on_this {
            drop(lock(&self.firing));
        }
    }
}

#[cfg(test)]
mod tests {
    use crate::accel::VcpuSignal;
    use crate::clock::{ClockKind, Clocks};
    use crate::io_thread::IoThread;
    use std::sync::atomic::{AtomicBool, Ordering};
    use std::sync::{Arc, mpsc};
    use std::thread::ThreadId;
    use std::time::Duration;

    const LIMIT: Duration = Duration::from_secs(120);

    /// An I/O thread, and a thread that keeps time until it is woken, again and again.
    struct Setup {
        io: IoThread,
        clocks: Clocks,
        signal: Arc<VcpuSignal>,
        over: Arc<AtomicBool>,
        keeper: Option<std::thread::JoinHandle<()>>,
    }

    impl Setup {
        fn new() -> Setup {
            let clocks = Clocks::new();
            clocks.virt.start();
            let io = IoThread::spawn("io-test", &clocks).unwrap();
            let (signal, over) = (VcpuSignal::new(), Arc::new(AtomicBool::new(false)));
            let (h, s, o) = (io.handle().clone(), signal.clone(), over.clone());
            let keeper = std::thread::spawn(move || {
                while !o.load(Ordering::SeqCst) {
                    h.keep_time(&s);
                }
            });
            while !io.handle().is_time_kept() {
                std::thread::yield_now();
            }
            Setup { io, clocks, signal, over, keeper: Some(keeper) }
        }

        fn keeper(&self) -> ThreadId {
            self.keeper.as_ref().unwrap().thread().id()
        }

        fn end(&mut self) {
            self.over.store(true, Ordering::SeqCst);
            self.signal.wake();
            if let Some(keeper) = self.keeper.take() {
                keeper.join().unwrap();
            }
        }
    }

    impl Drop for Setup {
        fn drop(&mut self) {
            self.end();
        }
    }

    #[test]
    fn timers_fire_on_the_thread_that_waits_and_then_on_the_other() {
        let mut setup = Setup::new();
        let timer = setup.io.handle().timer(ClockKind::Virtual);
        let (tx, rx) = mpsc::channel();
        let t = timer.clone();
        let at = timer.clone();
        timer.bind(move || tx.send((std::thread::current().id(), at.now())).unwrap());
        for round in 0..100u64 {
            // One far off first, given up for one that is nearer.
            t.arm(t.now() + 1_000_000_000_000);
            let deadline = t.now() + round % 5 * 100_000;
            t.arm(deadline);
            let (_, now) = rx.recv_timeout(LIMIT).expect("it fires");
            assert!(now >= deadline);
        }
        // While it sleeps for certain.
        while !setup.io.handle().is_time_kept() {
            std::thread::yield_now();
        }
        let keeper = setup.keeper();
        let seen = (0..100).any(|_| {
            t.arm(t.now() + 5_000_000);
            rx.recv_timeout(LIMIT).expect("it fires").0 == keeper
        });
        assert!(seen, "the keeper fires");
        t.arm(t.now() + 20_000_000);
        setup.end();
        assert_ne!(rx.recv_timeout(LIMIT).expect("what was armed before goes on").0, keeper);
        t.arm(t.now() + 1000);
        assert_ne!(rx.recv_timeout(LIMIT).expect("it fires").0, keeper);
    }

    #[test]
    fn a_stopped_clock_fires_nothing_and_goes_on() {
        let setup = Setup::new();
        let timer = setup.io.handle().timer(ClockKind::Virtual);
        let running = Arc::new(AtomicBool::new(true));
        let (tx, rx) = mpsc::channel();
        let r = running.clone();
        timer.bind(move || {
            // Long enough for a stop to come in between.
            std::thread::sleep(Duration::from_micros(300));
            tx.send(r.load(Ordering::SeqCst)).unwrap();
        });
        for _ in 0..50 {
            timer.arm(timer.now() + 100_000);
            std::thread::sleep(Duration::from_micros(150));
            setup.clocks.virt.stop();
            setup.io.handle().barrier();
            running.store(false, Ordering::SeqCst);
            std::thread::sleep(Duration::from_micros(500));
            running.store(true, Ordering::SeqCst);
            setup.clocks.virt.start();
            assert!(rx.recv_timeout(LIMIT).expect("it fires"), "after the barrier");
        }
    }
}
