//! The vCPU threads.
//!
//! Each owns its vCPU. It serves its work queue, waits at the gate while the machine is
//! paused or an exclusive section is on, runs, and handles the exit. An exit that
//! concerns the whole machine asks for a pause and becomes a [`VcpuEvent`]; the machine
//! decides what follows on its own thread.

use super::pause::{Enter, PauseGate, Power};
use super::work::{VcpuWork, WorkError, WorkQueue};
use crate::accel::{
    AccelError, CpuIo, DebugStop, ResetCause, ResetKind, ShutdownCause, StartRequest, Vcpu, VcpuExit, VcpuHandle,
    VcpuIndex,
};
use crate::error::HostError;
use std::cell::Cell;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError, mpsc};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// A vCPU whose last sleep was that long may keep time during the next. It is not worth its while when vCPUs wake each other
/// many times between two ticks.
const LONG_SLEEP: Duration = Duration::from_micros(500);

/// Something a vCPU did that concerns the machine. All vCPUs have been asked to pause.
#[derive(Debug)]
pub enum VcpuEvent {
    /// The guest turned the machine off.
    Shutdown(ShutdownCause),
    /// The guest reset the machine.
    Reset(ResetCause),
    /// A vCPU stopped for the debugger.
    Debug(VcpuIndex, DebugStop),
    /// A vCPU cannot go on.
    Failed(VcpuIndex, AccelError),
}

/// What a vCPU's thread does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum VcpuStatus {
    /// Not started by the guest, or stopped by it.
    Off,
    /// The machine is paused.
    Paused,
    /// Waiting for an interrupt.
    Halted,
    /// Running.
    Running,
}

struct Slot {
    handle: Arc<dyn VcpuHandle>,
    queue: WorkQueue,
    halted: AtomicBool,
}

struct Shared {
    gate: PauseGate,
    slots: Vec<Slot>,
    events: Box<dyn Fn(VcpuEvent) + Send + Sync>,
}

/// What the current thread is to the vCPUs.
#[derive(Clone, Copy, Default)]
struct Role {
    /// It is a vCPU's thread.
    vcpu: Option<VcpuIndex>,
    /// In a call-out from `run`.
    inside: bool,
    /// In an exclusive section.
    exclusive: bool,
}

thread_local! {
    static ROLE: Cell<Role> = const { Cell::new(Role { vcpu: None, inside: false, exclusive: false }) };
}

fn update_role(f: impl FnOnce(&mut Role)) {
    let mut role = ROLE.get();
    f(&mut role);
    ROLE.set(role);
}

/// The vCPU whose thread this is.
pub fn current_vcpu() -> Option<VcpuIndex> {
    ROLE.get().vcpu
}

/// The vCPUs of a machine and their threads. Starts paused, all vCPUs off.
#[derive(Clone)]
pub struct VcpuThreads {
    shared: Arc<Shared>,
    threads: Arc<Mutex<Vec<JoinHandle<()>>>>,
}

impl VcpuThreads {
    /// Takes the vCPUs, in index order, without starting their threads: what calls back
    /// into them ([`CpuIo`]) may be built around this. `events` is called on vCPU threads
    /// and must not wait for a vCPU.
    pub fn new(handles: Vec<Arc<dyn VcpuHandle>>, events: impl Fn(VcpuEvent) + Send + Sync + 'static) -> Self {
        let gate = PauseGate::new(handles.len());
        let slot = |handle| Slot { handle, queue: WorkQueue::default(), halted: AtomicBool::new(false) };
        let slots = handles.into_iter().map(slot).collect();
        Self { shared: Arc::new(Shared { gate, slots, events: Box::new(events) }), threads: Arc::default() }
    }

    /// Starts a thread for each vCPU.
    pub fn spawn(&self, vcpus: Vec<Box<dyn Vcpu>>, io: Arc<dyn CpuIo + Send + Sync>) -> Result<(), HostError> {
        assert_eq!(vcpus.len(), self.shared.slots.len(), "one vCPU per handle");
        for (i, vcpu) in vcpus.into_iter().enumerate() {
            let (shared, io) = (self.shared.clone(), io.clone());
            let name = format!("vcpu-{i}");
            let body = move || shared.run(i, vcpu, &*io);
            let thread = crate::io_thread::spawn_worker(&name, body)?;
            self.threads.lock().unwrap_or_else(PoisonError::into_inner).push(thread);
        }
        Ok(())
    }

    /// Number of vCPUs.
    pub fn count(&self) -> usize {
        self.shared.slots.len()
    }

    /// The handle of a vCPU.
    pub fn handle(&self, index: VcpuIndex) -> Option<&Arc<dyn VcpuHandle>> {
        self.shared.slots.get(index.as_usize()).map(|s| &s.handle)
    }

    /// Stops all vCPUs and waits until they are out of `run`. On a vCPU's own thread it
    /// only asks: the vCPU stops when its call-out returns.
    pub fn pause(&self) {
        self.request_pause();
        if current_vcpu().is_none() {
            self.shared.gate.wait_paused();
        }
    }

    /// Asks all vCPUs to stop, without waiting.
    pub fn request_pause(&self) {
        self.shared.gate.request_pause();
        self.shared.kick_all();
    }

    /// Lets vCPUs run.
    pub fn resume(&self) {
        self.shared.gate.resume();
    }

    /// True while paused or asked to pause.
    pub fn is_paused(&self) -> bool {
        self.shared.gate.is_paused()
    }

    /// What a vCPU does.
    pub fn status(&self, index: VcpuIndex) -> Option<VcpuStatus> {
        let slot = self.shared.slots.get(index.as_usize())?;
        let gate = &self.shared.gate;
        Some(if gate.power(index.as_usize()) != Power::On {
            VcpuStatus::Off
        } else if gate.is_paused() {
            VcpuStatus::Paused
        } else if slot.halted.load(Ordering::Relaxed) {
            VcpuStatus::Halted
        } else {
            VcpuStatus::Running
        })
    }

    /// Has `f` run on the vCPU's thread soon, outside `run`. Any thread; does not wait.
    pub fn run_on(&self, index: VcpuIndex, f: impl FnOnce(&mut dyn Vcpu) + Send + 'static) -> Result<(), WorkError> {
        self.shared.queue(index, Box::new(f))
    }

    /// Has `f` run on the vCPU's thread and waits for its result. Not on a vCPU's thread.
    pub fn run_on_sync<R: Send + 'static>(
        &self,
        index: VcpuIndex,
        f: impl FnOnce(&mut dyn Vcpu) -> R + Send + 'static,
    ) -> Result<R, WorkError> {
        if current_vcpu().is_some() {
            return Err(WorkError::OnVcpuThread);
        }
        let (tx, rx) = mpsc::sync_channel(1);
        self.run_on(index, move |vcpu| {
            let _ = tx.send(f(vcpu));
        })?;
        rx.recv().map_err(|_| WorkError::Lost)
    }

    /// Runs `f` here while every other vCPU is outside `run`, or in a call of this function.
    /// Any thread, holding nothing a vCPU may wait for. Nested calls just run.
    pub fn run_exclusive<R>(&self, f: impl FnOnce() -> R) -> R {
        let role = ROLE.get();
        if role.exclusive {
            return f();
        }
        self.shared.gate.begin_exclusive(role.inside, || self.shared.kick_all());
        update_role(|r| r.exclusive = true);
        let section = Section { gate: &self.shared.gate, inside: role.inside };
        let result = f();
        drop(section);
        result
    }

    /// Turns on a vCPU that is off: resets it and lets it go from `how`. False if it is on.
    pub fn start_vcpu(&self, index: VcpuIndex, how: StartRequest) -> bool {
        self.power_on(index, Some(how))
    }

    /// Turns on a vCPU that is off in its reset state as it is (`None`) or as for
    /// [`VcpuThreads::start_vcpu`].
    pub fn power_on(&self, index: VcpuIndex, how: Option<StartRequest>) -> bool {
        let at = index.as_usize();
        if at >= self.count() || !self.shared.gate.claim_start(at) {
            return false;
        }
        let shared = Arc::downgrade(&self.shared);
        let work = move |vcpu: &mut dyn Vcpu| {
            if how.is_some() {
                vcpu.reset(ResetKind::Warm, how);
            }
            if let Some(s) = shared.upgrade() {
                s.gate.set_power(at, Power::On);
            }
        };
        self.run_on(index, work).is_ok()
    }

    /// Keeps a vCPU from running while others do, for a debugger; or no longer. To be called while paused.
    pub fn set_held(&self, index: VcpuIndex, held: bool) {
        if index.as_usize() < self.count() {
            self.shared.gate.set_held(index.as_usize(), held);
        }
    }

    /// Turns a vCPU off. From its own call-out it must then leave `run`
    /// ([`HypercallResult::Leave`](crate::accel::HypercallResult::Leave)).
    pub fn power_off(&self, index: VcpuIndex) {
        if let Some(slot) = self.shared.slots.get(index.as_usize()) {
            self.shared.gate.set_power(index.as_usize(), Power::Off);
            slot.handle.kick();
        }
    }

    /// True unless the vCPU is off or only starting.
    pub fn is_on(&self, index: VcpuIndex) -> bool {
        index.as_usize() < self.count() && self.shared.gate.power(index.as_usize()) == Power::On
    }

    /// Ends all threads and waits for them; queued work is dropped. Not on a vCPU's thread.
    pub fn stop(&self) {
        self.shared.gate.stop();
        self.shared.kick_all();
        let threads = std::mem::take(&mut *self.threads.lock().unwrap_or_else(PoisonError::into_inner));
        let own = std::thread::current().id();
        for t in threads.into_iter().filter(|t| t.thread().id() != own) {
            let _ = t.join();
        }
    }
}

/// Ends an exclusive section, even if it panics.
struct Section<'a> {
    gate: &'a PauseGate,
    inside: bool,
}

impl Drop for Section<'_> {
    fn drop(&mut self) {
        update_role(|r| r.exclusive = false);
        self.gate.end_exclusive(self.inside);
    }
}

impl Shared {
    fn kick_all(&self) {
        self.slots.iter().for_each(|s| s.handle.kick());
    }

    fn queue(&self, index: VcpuIndex, work: VcpuWork) -> Result<(), WorkError> {
        let slot = self.slots.get(index.as_usize()).ok_or(WorkError::NoSuchVcpu)?;
        if !slot.queue.push(work) {
            return Err(WorkError::Lost);
        }
        self.gate.notify();
        slot.handle.kick();
        Ok(())
    }

    /// Whether no vCPU has anything to do. Of two that find so at once, one may be wrong.
    fn all_wait(&self) -> bool {
        let waits = |(i, s): (usize, &Slot)| s.halted.load(Ordering::SeqCst) || self.gate.power(i) != Power::On;
        self.slots.iter().enumerate().all(waits)
    }

    /// A vCPU's thread.
    fn run(&self, index: usize, mut vcpu: Box<dyn Vcpu>, io: &dyn CpuIo) {
        let number = VcpuIndex(index as u32);
        let slot = &self.slots[index];
        let mut sleeps_long = false;
        update_role(|r| r.vcpu = Some(number));
        loop {
            match self.gate.enter(index, || slot.queue.has_work()) {
                Enter::Stop => break,
                Enter::Work => {
                    if let Some(work) = slot.queue.pop()
                        && catch_unwind(AssertUnwindSafe(|| work(&mut *vcpu))).is_err()
                    {
                        log::error!("work on vCPU {number} panicked");
                    }
                }
                Enter::Run => {
                    update_role(|r| r.inside = true);
                    let exit = catch_unwind(AssertUnwindSafe(|| vcpu.run(io)));
                    update_role(|r| r.inside = false);
                    self.gate.leave();
                    let exit = exit.unwrap_or_else(|_| {
                        VcpuExit::Failed(AccelError::Other(format!("vCPU {number}: the accelerator panicked")))
                    });
                    self.handle_exit(number, slot, exit, io, &mut sleeps_long);
                }
            }
        }
        update_role(|r| r.vcpu = None);
        slot.queue.close();
    }

    fn handle_exit(&self, number: VcpuIndex, slot: &Slot, exit: VcpuExit, io: &dyn CpuIo, sleeps_long: &mut bool) {
        let event = match exit {
            VcpuExit::Kicked => return,
            VcpuExit::Halted => {
                slot.halted.store(true, Ordering::SeqCst);
                let from = Instant::now();
                io.wait_for_interrupt(slot.handle.signal(), *sleeps_long && self.all_wait());
                *sleeps_long = from.elapsed() >= LONG_SLEEP;
                slot.halted.store(false, Ordering::SeqCst);
                return;
            }
            VcpuExit::Shutdown(cause) => VcpuEvent::Shutdown(cause),
            VcpuExit::Reset(cause) => VcpuEvent::Reset(cause),
            VcpuExit::Debug(stop) => VcpuEvent::Debug(number, stop),
            VcpuExit::Failed(error) => VcpuEvent::Failed(number, error),
        };
        self.gate.request_pause();
        self.kick_all();
        (self.events)(event);
    }
}

#[cfg(test)]
#[path = "thread_tests.rs"]
mod tests;
