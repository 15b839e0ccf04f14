//! The pause protocol: who may be inside `run` when.
//!
//! One mutex and one condition variable guard the wanted and the actual state of all
//! vCPUs; every transition notifies. A vCPU is *inside* from before `run` until after
//! it, and *active* while inside except during its own call to
//! [`PauseGate::begin_exclusive`]. A pause waits for nobody inside; an exclusive section
//! waits for nobody active. Whoever asks also kicks, which is sticky, so a vCPU that
//! entered just before comes out again.
//!
//! Model-checked: `RUSTFLAGS="--cfg loom" cargo test -p mimus-core --test loom_pause --release`.

#[cfg(loom)]
use loom::sync::{Condvar, Mutex, MutexGuard};
use std::sync::PoisonError;
#[cfg(not(loom))]
use std::sync::{Condvar, Mutex, MutexGuard};

/// What a vCPU's thread does next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Enter {
    /// It is inside now; call `run`, then [`PauseGate::leave`].
    Run,
    /// Serve the work queue; it is not inside.
    Work,
    /// End.
    Stop,
}

/// Whether a vCPU is powered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Power {
    /// Off, until another vCPU starts it.
    Off,
    /// A start is on its way.
    Starting,
    /// On.
    On,
}

#[derive(Debug)]
struct State {
    paused: bool,
    stopping: bool,
    /// Somebody is in, or waits to be in, an exclusive section.
    exclusive: bool,
    inside: usize,
    active: usize,
    /// Threads that wait for `changed`.
    waiting: usize,
    power: Vec<Power>,
    /// A debugger keeps it outside while others run.
    held: Vec<bool>,
}

/// The gate in front of `run` for all vCPUs of a machine.
pub struct PauseGate {
    state: Mutex<State>,
    changed: Condvar,
}

impl PauseGate {
    /// A gate for `vcpus` vCPUs, paused, all off.
    pub fn new(vcpus: usize) -> Self {
        let state = State {
            paused: true,
            stopping: false,
            exclusive: false,
            inside: 0,
            active: 0,
            waiting: 0,
            power: vec![Power::Off; vcpus],
            held: vec![false; vcpus],
        };
        Self { state: Mutex::new(state), changed: Condvar::new() }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wait<'a>(&self, mut guard: MutexGuard<'a, State>) -> MutexGuard<'a, State> {
        guard.waiting += 1;
        let mut guard = self.changed.wait(guard).unwrap_or_else(PoisonError::into_inner);
        guard.waiting -= 1;
        guard
    }

    /// On the vCPU's thread: waits until it may run, has work, or must end.
    pub fn enter(&self, index: usize, has_work: impl Fn() -> bool) -> Enter {
        let mut s = self.lock();
        loop {
            if s.stopping {
                return Enter::Stop;
            }
            if has_work() {
                return Enter::Work;
            }
            if !s.paused && !s.exclusive && s.power[index] == Power::On && !s.held[index] {
                s.inside += 1;
                s.active += 1;
                return Enter::Run;
            }
            s = self.wait(s);
        }
    }

    /// On the vCPU's thread: it came out of `run`.
    pub fn leave(&self) {
        let mut s = self.lock();
        s.inside -= 1;
        s.active -= 1;
        // A system call even if nobody waits.
        if s.waiting > 0 {
            self.changed.notify_all();
        }
    }

    /// Wakes threads in [`PauseGate::enter`] to look at their queues.
    pub fn notify(&self) {
        drop(self.lock());
        self.changed.notify_all();
    }

    /// From now on no vCPU enters. The caller kicks all, then may [`PauseGate::wait_paused`].
    pub fn request_pause(&self) {
        self.lock().paused = true;
        self.changed.notify_all();
    }

    /// Waits until no vCPU is inside. Not inside `run`.
    pub fn wait_paused(&self) {
        let mut s = self.lock();
        while s.paused && s.inside > 0 {
            s = self.wait(s);
        }
    }

    /// vCPUs may enter again.
    pub fn resume(&self) {
        self.lock().paused = false;
        self.changed.notify_all();
    }

    /// True while paused or asked to.
    pub fn is_paused(&self) -> bool {
        self.lock().paused
    }

    /// Waits for the turn, calls `kick_all`, and returns when no other vCPU is active.
    /// `inside`: the caller is a vCPU in a call-out from `run`.
    pub fn begin_exclusive(&self, inside: bool, kick_all: impl FnOnce()) {
        let mut s = self.lock();
        if inside {
            s.active -= 1;
            self.changed.notify_all();
        }
        while s.exclusive {
            s = self.wait(s);
        }
        s.exclusive = true;
        drop(s);
        kick_all();
        let mut s = self.lock();
        while s.active > 0 {
            s = self.wait(s);
        }
    }

    /// Ends the section.
    pub fn end_exclusive(&self, inside: bool) {
        let mut s = self.lock();
        s.exclusive = false;
        self.changed.notify_all();
        if inside {
            while s.exclusive {
                s = self.wait(s);
            }
            s.active += 1;
        }
    }

    /// Keeps a vCPU outside, or no longer. One that is inside stays so until it leaves.
    pub fn set_held(&self, index: usize, held: bool) {
        self.lock().held[index] = held;
        self.changed.notify_all();
    }

    /// The power state of a vCPU.
    pub fn power(&self, index: usize) -> Power {
        self.lock().power[index]
    }

    /// Changes it.
    pub fn set_power(&self, index: usize, power: Power) {
        self.lock().power[index] = power;
        self.changed.notify_all();
    }

    /// Off to starting; false if it is not off.
    pub fn claim_start(&self, index: usize) -> bool {
        let mut s = self.lock();
        let off = s.power[index] == Power::Off;
        if off {
            s.power[index] = Power::Starting;
        }
        off
    }

    /// All threads end. The caller kicks all.
    pub fn stop(&self) {
        self.lock().stopping = true;
        self.changed.notify_all();
    }
}
