//! An epoll loop on its own thread: readiness of host fds, queued closures, timers.
//!
//! Callbacks run one at a time, with no lock of the loop held. After each round the
//! loop applies queued memory-map changes (the *after hook*), because a callback may
//! have made a device move its regions.

use super::keeper::Keeper;
use crate::accel::VcpuSignal;
use crate::clock::clocks::ClockListener;
use crate::clock::{ClockKind, Clocks, InstructionClock, Shift, Timer, TimerQueue};
use crate::error::HostError;
use crate::inputs::Inputs;
use rustix::event::{EventfdFlags, Timespec, epoll, eventfd};
use rustix::time::{Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, timerfd_create, timerfd_settime};
use std::collections::HashMap;
use std::os::fd::{AsFd, OwnedFd};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, Weak};
use std::thread::{JoinHandle, ThreadId};
use std::time::Duration;

/// Which readiness a registration wants.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct Interest {
    /// There is something to read, or the other side is gone.
    pub readable: bool,
    /// There is room to write.
    pub writable: bool,
}

impl Interest {
    /// Readable only.
    pub const READ: Self = Self { readable: true, writable: false };
    /// Writable only.
    pub const WRITE: Self = Self { readable: false, writable: true };
    /// Both.
    pub const BOTH: Self = Self { readable: true, writable: true };
    /// Neither; errors and hang-ups are not reported either.
    pub const NONE: Self = Self { readable: false, writable: false };

    fn flags(self) -> epoll::EventFlags {
        let mut f = epoll::EventFlags::empty();
        f.set(epoll::EventFlags::IN | epoll::EventFlags::RDHUP, self.readable);
        f.set(epoll::EventFlags::OUT, self.writable);
        f
    }
}

/// What an fd is ready for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Readiness {
    /// Reading does not block.
    pub readable: bool,
    /// Writing does not block.
    pub writable: bool,
    /// The other side is gone, or the fd has an error.
    pub hangup: bool,
}

/// An fd that may be registered; kept open by the registration.
pub type SharedFd = Arc<dyn AsFdSync>;

/// Anything with an fd that threads may share.
pub trait AsFdSync: AsFd + Send + Sync {}
impl<T: AsFd + Send + Sync> AsFdSync for T {}

type Task = Box<dyn FnOnce() + Send>;
type FdCallback = Box<dyn FnMut(Readiness) + Send>;
type Hook = Arc<dyn Fn() + Send + Sync>;

struct Watch {
    fd: SharedFd,
    callback: Mutex<FdCallback>,
    /// What epoll has; `NONE` is not in epoll at all, as it always reports hang-ups.
    interest: Mutex<Interest>,
    alive: AtomicBool,
}

struct Shared {
    epoll: OwnedFd,
    wake: OwnedFd,
    /// A wake-up is on its way.
    woken: AtomicBool,
    stop: AtomicBool,
    /// `None` when the loop has ended: nothing runs any more.
    tasks: Mutex<Option<Vec<Task>>>,
    watches: Mutex<HashMap<u64, Arc<Watch>>>,
    next_token: AtomicU64,
    after: Mutex<Option<Hook>>,
    thread: Mutex<Option<ThreadId>>,
    /// One for each queue of timers.
    alarms: Vec<Alarm>,
    keeper: Keeper,
}

/// Ends the loop's sleep at a deadline that came up meanwhile. Who arms a timer sets it: waking the loop to have it sleep
/// less would be two wake-ups for each timer.
struct Alarm {
    timer: OwnedFd,
    queue: OnceLock<Weak<TimerQueue>>,
    /// Held from the look at the queue to the setting, so that the last who sets it has seen the first deadline. Whether it is
    /// set, or has gone off.
    setting: Mutex<bool>,
}

/// epoll data of the eventfd.
const WAKE_TOKEN: u64 = 0;
/// epoll data of the first alarm.
const ALARM_TOKEN: u64 = 1;
/// Alarms there are.
const ALARMS: usize = 3;
/// The virtual clock's.
const VIRTUAL: usize = 0;

fn lock<T>(m: &Mutex<T>) -> MutexGuard<'_, T> {
    m.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Shared {
    fn wake(&self) {
        if !self.woken.swap(true, Ordering::SeqCst) {
            // Fails only if the counter is full, and then the loop wakes anyway.
            let _ = rustix::io::write(&self.wake, &1u64.to_ne_bytes());
        }
    }

    /// A queue has an earlier deadline.
    fn deadline_moved(&self, queue: usize) {
        // The loop itself looks before it sleeps.
        if *lock(&self.thread) == Some(std::thread::current().id()) {
            return;
        }
        if queue == VIRTUAL && self.keeper.tell() {
            return;
        }
        self.set_alarm(queue);
    }

    /// Has the loop woken at the queue's first deadline.
    fn set_alarm(&self, queue: usize) {
        let Some(alarm) = self.alarms.get(queue) else { return self.wake() };
        let mut is_set = lock(&alarm.setting);
        let Some(queue) = alarm.queue.get().and_then(Weak::upgrade) else { return self.wake() };
        // `None`: the clock stands, and tells when it goes on; or somebody else has disarmed it.
        let Some(ns) = queue.wait_ns() else { return };
        if ns == 0 || alarm.set(ns).is_err() {
            self.wake();
        } else {
            *is_set = true;
        }
    }

    /// Lets the loop sleep on at the queue's first deadline.
    fn stop_alarm(&self, queue: usize) {
        let Some(alarm) = self.alarms.get(queue) else { return };
        let mut is_set = lock(&alarm.setting);
        if std::mem::replace(&mut *is_set, false) {
            // At worst it goes off for nothing.
            let _ = alarm.set(0);
        }
    }
}

impl Alarm {
    fn new() -> rustix::io::Result<Alarm> {
        let flags = TimerfdFlags::CLOEXEC | TimerfdFlags::NONBLOCK;
        let timer = timerfd_create(TimerfdClockId::Monotonic, flags)?;
        Ok(Alarm { timer, queue: OnceLock::new(), setting: Mutex::default() })
    }

    /// To go off in `ns`; never if that is 0. Forgets what it was set to before.
    fn set(&self, ns: u64) -> rustix::io::Result<()> {
        let zero = Timespec { tv_sec: 0, tv_nsec: 0 };
        let time = Itimerspec { it_interval: zero, it_value: timespec(ns) };
        timerfd_settime(&self.timer, TimerfdTimerFlags::empty(), &time).map(|_| ())
    }
}

fn timespec(ns: u64) -> Timespec {
    Timespec { tv_sec: (ns / 1_000_000_000) as i64, tv_nsec: (ns % 1_000_000_000) as _ }
}

impl ClockListener for Shared {
    fn clock_changed(&self) {
        self.keeper.tell();
        self.wake();
    }
}

struct Queues {
    virt: Arc<TimerQueue>,
    host: Arc<TimerQueue>,
    realtime: Arc<TimerQueue>,
}

/// An I/O thread; stops and joins it when dropped.
pub struct IoThread {
    handle: IoThreadHandle,
    thread: Option<JoinHandle<()>>,
}

/// A way to give work to an I/O thread. Any thread.
#[derive(Clone)]
pub struct IoThreadHandle {
    shared: Arc<Shared>,
    queues: Arc<Queues>,
    clocks: Clocks,
}

impl IoThread {
    /// Starts a loop on a thread called `name`.
    pub fn spawn(name: &str, clocks: &Clocks) -> Result<Self, HostError> {
        let host = |e: rustix::io::Errno| HostError::new(format!("make the event loop of {name}"), e);
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC).map_err(host)?;
        let wake = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).map_err(host)?;
        epoll::add(&epoll, &wake, epoll::EventData::new_u64(WAKE_TOKEN), epoll::EventFlags::IN).map_err(host)?;
        let alarms = (0..ALARMS).map(|_| Alarm::new()).collect::<Result<Vec<_>, _>>().map_err(host)?;
        for (token, alarm) in (ALARM_TOKEN..).zip(&alarms) {
            epoll::add(&epoll, &alarm.timer, epoll::EventData::new_u64(token), epoll::EventFlags::IN).map_err(host)?;
        }
        let shared = Arc::new(Shared {
            epoll,
            wake,
            woken: AtomicBool::new(false),
            stop: AtomicBool::new(false),
            tasks: Mutex::new(Some(Vec::new())),
            watches: Mutex::default(),
            next_token: AtomicU64::new(ALARM_TOKEN + ALARMS as u64),
            after: Mutex::default(),
            thread: Mutex::default(),
            alarms,
            keeper: Keeper::default(),
        });
        let queue = |number, kind| {
            let waker = Arc::downgrade(&shared);
            let queue = TimerQueue::new(clocks.get(kind), move || {
                if let Some(s) = waker.upgrade() {
                    s.deadline_moved(number);
                }
            });
            if let Some(alarm) = shared.alarms.get(number) {
                let _ = alarm.queue.set(Arc::downgrade(&queue));
            }
            queue
        };
        let queues = Arc::new(Queues {
            virt: queue(VIRTUAL, ClockKind::Virtual),
            host: queue(1, ClockKind::Host),
            realtime: queue(2, ClockKind::Realtime),
        });
        let weak: Weak<Shared> = Arc::downgrade(&shared);
        clocks.virt.add_listener(weak);
        let handle = IoThreadHandle { shared, queues, clocks: clocks.clone() };
        let looped = handle.clone();
        let thread = super::worker::spawn_worker(name, move || {
            run(&looped);
            let dropped = lock(&looped.shared.tasks).take();
            drop(dropped);
        })?;
        Ok(Self { handle, thread: Some(thread) })
    }

    /// A handle to it.
    pub fn handle(&self) -> &IoThreadHandle {
        &self.handle
    }

    /// Stops the loop after what is queued, and waits for the thread. Not from a callback:
    /// there it only asks the loop to stop.
    pub fn stop(&mut self) {
        self.handle.shared.stop.store(true, Ordering::SeqCst);
        self.handle.shared.wake();
        if let Some(thread) = self.thread.take().filter(|_| !self.handle.is_current()) {
            let _ = thread.join();
        }
    }
}

impl Drop for IoThread {
    fn drop(&mut self) {
        self.stop();
        // Callbacks hold devices, which hold this loop.
        lock(&self.handle.shared.watches).clear();
        drop(lock(&self.handle.shared.tasks).take());
        *lock(&self.handle.shared.after) = None;
    }
}

impl IoThreadHandle {
    /// Runs `f` on the I/O thread, soon and in order; drops it if the loop has ended.
    pub fn run_soon(&self, f: impl FnOnce() + Send + 'static) {
        if let Some(tasks) = lock(&self.shared.tasks).as_mut() {
            tasks.push(Box::new(f));
        }
        self.shared.wake();
    }

    /// Waits until everything queued and due before has been done: after the clock has
    /// stopped, no timer callback is left running. On the I/O thread itself it does nothing.
    pub fn barrier(&self) {
        if self.is_current() {
            return;
        }
        let (tx, rx) = std::sync::mpsc::channel::<()>();
        self.run_soon(move || drop(tx));
        // Ends when the task has run, or was dropped with the loop.
        let _ = rx.recv();
        self.shared.keeper.barrier();
    }

    /// Sleeps until `signal` is given. Timers of the virtual clock fire on this thread meanwhile: that saves waking two threads
    /// for each. If another thread does so already, this one only sleeps.
    pub fn keep_time(&self, signal: &Arc<VcpuSignal>) {
        let (shared, virt) = (&self.shared, &self.queues.virt);
        // Where time is instructions, the vCPU fires them between two of them.
        if virt.clock().is_counted() || !shared.keeper.begin(signal) {
            signal.wait(None);
            return;
        }
        shared.stop_alarm(VIRTUAL);
        loop {
            // `None`: the clock stands, or nothing is armed: both are told.
            let wait = virt.wait_ns().map(Duration::from_nanos);
            if wait != Some(Duration::ZERO) && signal.wait(wait) {
                break;
            }
            guarded("a timer", || {
                shared.keeper.fire(virt);
            });
            self.run_after_hook();
            if signal.take() {
                break;
            }
        }
        shared.keeper.end();
        if virt.first_deadline().is_some() {
            shared.set_alarm(VIRTUAL);
        }
    }

    #[cfg(test)]
    pub(super) fn is_time_kept(&self) -> bool {
        self.shared.keeper.is_kept()
    }

    fn run_after_hook(&self) {
        let after = lock(&self.shared.after).clone();
        if let Some(hook) = after {
            guarded("the after hook", || hook());
        }
    }

    /// True on the I/O thread itself.
    pub fn is_current(&self) -> bool {
        *lock(&self.shared.thread) == Some(std::thread::current().id())
    }

    /// Calls `callback` on the I/O thread whenever `fd` is ready (level-triggered), until
    /// the registration is dropped. A file that epoll does not take is an error.
    pub fn register_fd(
        &self,
        fd: SharedFd,
        interest: Interest,
        callback: impl FnMut(Readiness) + Send + 'static,
    ) -> Result<FdRegistration, HostError> {
        let token = self.shared.next_token.fetch_add(1, Ordering::Relaxed);
        let watch = Arc::new(Watch {
            fd,
            callback: Mutex::new(Box::new(callback)),
            interest: Mutex::new(Interest::NONE),
            alive: AtomicBool::new(true),
        });
        lock(&self.shared.watches).insert(token, watch.clone());
        let registration = FdRegistration { shared: self.shared.clone(), watch, token };
        registration.set_interest(interest)?;
        Ok(registration)
    }

    /// A timer on one of the clocks, fired by this thread.
    pub fn timer(&self, kind: ClockKind) -> Timer {
        match kind {
            ClockKind::Virtual => self.queues.virt.timer(),
            ClockKind::Host => self.queues.host.timer(),
            ClockKind::Realtime => self.queues.realtime.timer(),
        }
    }

    /// Has the virtual clock follow the vCPU's instructions, and its timers be fired by the vCPU's thread. `sleep`:
    /// while the vCPU waits for an interrupt, the host's time passes too. Before anything runs.
    pub fn count_instructions(&self, shift: Shift, sleep: bool) {
        let (shared, queue) = (Arc::downgrade(&self.shared), Arc::downgrade(&self.queues.virt));
        InstructionClock::attach(&self.clocks.virt, (shift, sleep), &self.queues.virt, move || {
            let fired = queue.upgrade().is_some_and(|q| q.fire_counted());
            let after = shared.upgrade().and_then(|s| lock(&s.after).clone());
            if let Some(hook) = after.filter(|_| fired) {
                hook();
            }
            fired
        });
    }

    /// What inputs pass through that come at times of the virtual clock.
    pub fn inputs(&self) -> Arc<Inputs> {
        Inputs::new(self.queues.virt.clone())
    }

    /// The machine's clocks.
    pub fn clocks(&self) -> &Clocks {
        &self.clocks
    }

    /// Starts a thread for blocking host calls.
    pub fn spawn_worker(&self, name: &str, f: impl FnOnce() + Send + 'static) -> Result<JoinHandle<()>, HostError> {
        super::worker::spawn_worker(name, f)
    }

    /// What runs after every round of callbacks: the machine applies queued memory-map
    /// changes there.
    pub fn set_after_hook(&self, hook: impl Fn() + Send + Sync + 'static) {
        *lock(&self.shared.after) = Some(Arc::new(hook));
    }
}

/// A registered fd. Dropping it ends the registration: no callback starts afterwards, but
/// one that runs already is not waited for.
pub struct FdRegistration {
    shared: Arc<Shared>,
    watch: Arc<Watch>,
    token: u64,
}

impl FdRegistration {
    /// Changes what the callback is called for.
    pub fn set_interest(&self, interest: Interest) -> Result<(), HostError> {
        let mut current = lock(&self.watch.interest);
        if *current == interest {
            return Ok(());
        }
        let (epoll, fd) = (&self.shared.epoll, self.watch.fd.as_fd());
        let data = epoll::EventData::new_u64(self.token);
        let result = match (*current, interest) {
            (_, Interest::NONE) => epoll::delete(epoll, fd),
            (Interest::NONE, _) => epoll::add(epoll, fd, data, interest.flags()),
            _ => epoll::modify(epoll, fd, data, interest.flags()),
        };
        result.map_err(|e| HostError::new("watch a file descriptor", e))?;
        *current = interest;
        Ok(())
    }
}

impl Drop for FdRegistration {
    fn drop(&mut self) {
        self.watch.alive.store(false, Ordering::SeqCst);
        let _ = self.set_interest(Interest::NONE);
        lock(&self.shared.watches).remove(&self.token);
    }
}

fn guarded(what: &str, f: impl FnOnce()) {
    if catch_unwind(AssertUnwindSafe(f)).is_err() {
        log::error!("{what} on an I/O thread panicked");
    }
}

fn run(handle: &IoThreadHandle) {
    let shared = &handle.shared;
    *lock(&shared.thread) = Some(std::thread::current().id());
    let mut events: Vec<epoll::Event> = Vec::with_capacity(64);
    loop {
        let tasks = lock(&shared.tasks).as_mut().map(std::mem::take).unwrap_or_default();
        let idle = tasks.is_empty();
        tasks.into_iter().for_each(|t| guarded("a queued task", t));
        let queues = &handle.queues;
        guarded("a timer", || shared.keeper.fire_unless_kept(&queues.virt));
        [&queues.host, &queues.realtime].iter().for_each(|q| {
            guarded("a timer", || {
                q.fire();
            })
        });
        handle.run_after_hook();
        if shared.stop.load(Ordering::SeqCst) && idle && lock(&shared.tasks).as_ref().is_none_or(Vec::is_empty) {
            return;
        }
        events.clear();
        let timeout = timeout(handle);
        match epoll::wait(&shared.epoll, rustix::buffer::spare_capacity(&mut events), timeout.as_ref()) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(e) => {
                log::error!("an event loop ends: epoll: {e}");
                return;
            }
        }
        for event in &events {
            dispatch(shared, event);
        }
    }
}

/// How long to sleep: `None` is until something happens.
fn timeout(handle: &IoThreadHandle) -> Option<Timespec> {
    let stopping = handle.shared.stop.load(Ordering::SeqCst);
    let queues = &handle.queues;
    // Who stops keeping time sets an alarm.
    let virt = (!handle.shared.keeper.is_kept()).then(|| queues.virt.wait_ns()).flatten();
    let waits = [virt, queues.host.wait_ns(), queues.realtime.wait_ns()].into_iter().flatten();
    let ns = if stopping { Some(0) } else { waits.min() }?;
    Some(timespec(ns))
}

fn dispatch(shared: &Shared, event: &epoll::Event) {
    let token = event.data.u64();
    if token == WAKE_TOKEN {
        let mut count = [0; 8];
        let _ = rustix::io::read(&shared.wake, &mut count);
        // Cleared after the read and before the queues are looked at: what is queued
        // after this wakes the loop again.
        shared.woken.store(false, Ordering::SeqCst);
        return;
    }
    if let Some(alarm) = token.checked_sub(ALARM_TOKEN).and_then(|n| shared.alarms.get(n as usize)) {
        // What it is for is found in the queues.
        let mut count = [0; 8];
        let _ = rustix::io::read(&alarm.timer, &mut count);
        return;
    }
    let Some(watch) = lock(&shared.watches).get(&token).cloned() else {
        return;
    };
    // An earlier callback of this round may have ended the registration.
    if !watch.alive.load(Ordering::SeqCst) {
        return;
    }
    let flags = event.flags;
    let has = |f| flags.intersects(f);
    let ready = Readiness {
        readable: has(epoll::EventFlags::IN | epoll::EventFlags::RDHUP | epoll::EventFlags::HUP),
        writable: has(epoll::EventFlags::OUT),
        hangup: has(epoll::EventFlags::HUP | epoll::EventFlags::ERR | epoll::EventFlags::RDHUP),
    };
    guarded("an fd callback", || lock(&watch.callback)(ready));
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;
    use std::sync::mpsc;

    const SOON: Duration = Duration::from_secs(5);

    #[test]
    fn deadlines_come_up_while_the_loop_sleeps() {
        const LIMIT: Duration = Duration::from_secs(120);
        let clocks = Clocks::new();
        clocks.virt.start();
        let io = IoThread::spawn("io-test", &clocks).unwrap();
        let h = io.handle();
        let (tx, rx) = mpsc::channel();
        let kinds = [ClockKind::Virtual, ClockKind::Host, ClockKind::Realtime];
        let timers: Vec<Timer> = kinds.iter().chain(&kinds).map(|kind| h.timer(*kind)).collect();
        for (number, timer) in timers.iter().enumerate() {
            let (tx, at) = (tx.clone(), timer.clone());
            timer.bind(move || tx.send((number, at.now())).unwrap());
        }
        for round in 0..50u64 {
            h.barrier();
            // One far off and given up, then others nearer and nearer; the last of them is due before the first.
            timers[0].arm(timers[0].now() + 1_000_000_000_000);
            let deadline = |number: u64| timers[number as usize].now() + (7 - number) * (round % 5) * 100_000;
            let deadlines: Vec<u64> = (0..6).map(deadline).collect();
            for (timer, deadline) in timers.iter().zip(&deadlines) {
                timer.arm(*deadline);
            }
            let mut fired: Vec<usize> = (0..6)
                .map(|_| {
                    let (number, at) = rx.recv_timeout(LIMIT).expect("all of them fire");
                    assert!(at >= deadlines[number], "not before");
                    number
                })
                .collect();
            fired.sort_unstable();
            assert_eq!(fired, [0, 1, 2, 3, 4, 5]);
        }
    }

    #[test]
    fn tasks_timers_and_fds() {
        let clocks = Clocks::new();
        let mut io = IoThread::spawn("io-test", &clocks).unwrap();
        let h = io.handle().clone();
        let (tx, rx) = mpsc::channel();
        let (t, on) = (tx.clone(), h.clone());
        h.run_soon(move || t.send(u32::from(on.is_current())).unwrap());
        h.barrier();
        assert_eq!(rx.try_recv(), Ok(1));

        let timer = h.timer(ClockKind::Virtual);
        let t = tx.clone();
        timer.bind(move || t.send(2).unwrap());
        timer.arm(1000);
        assert!(rx.recv_timeout(Duration::from_millis(10)).is_err(), "the clock stands");
        clocks.virt.start();
        assert_eq!(rx.recv_timeout(SOON), Ok(2));

        let (ours, theirs) = std::os::unix::net::UnixStream::pair().unwrap();
        let fd = Arc::new(ours);
        let reader = fd.clone();
        let t = tx.clone();
        let reg = h
            .register_fd(fd, Interest::READ, move |r| {
                use std::io::Read;
                let mut b = [0; 16];
                let n = (&*reader).read(&mut b).unwrap();
                t.send(if r.hangup { 100 } else { n as u32 }).unwrap();
            })
            .unwrap();
        (&theirs).write_all(b"abc").unwrap();
        assert_eq!(rx.recv_timeout(SOON), Ok(3));
        reg.set_interest(Interest::NONE).unwrap();
        (&theirs).write_all(b"de").unwrap();
        assert!(rx.recv_timeout(Duration::from_millis(10)).is_err());
        reg.set_interest(Interest::READ).unwrap();
        assert_eq!(rx.recv_timeout(SOON), Ok(2));
        drop(reg);
        drop(theirs);
        assert!(rx.recv_timeout(Duration::from_millis(10)).is_err());

        let t = tx.clone();
        h.set_after_hook(move || {
            let _ = t.send(7);
        });
        h.run_soon(|| panic!("expected by the test"));
        assert_eq!(rx.recv_timeout(SOON), Ok(7));
        io.stop();
        io.stop();
        h.barrier();
    }
}
