//! Requests to a machine, from any thread.

use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};
use std::sync::mpsc::{Receiver, Sender, SyncSender, channel, sync_channel};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Duration;

use mimus_core::accel::{AccelError, DebugStop, ResetCause, ShutdownCause, VcpuIndex};
use mimus_core::vcpu::{VcpuEvent, VcpuThreads};

/// What a machine does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum RunState {
    /// Built, never started (`-S`).
    Prelaunch,
    /// Running.
    Running,
    /// Asleep with its memory kept: no processor runs, time and devices go on.
    Suspended,
    /// Stopped by the host.
    Paused,
    /// Powered off by the guest, and kept (`-no-shutdown`).
    Shutdown,
    /// A vCPU could not go on.
    InternalError,
    /// Over.
    Ended,
}

impl RunState {
    const ALL: [RunState; 7] = [
        Self::Prelaunch,
        Self::Running,
        Self::Suspended,
        Self::Paused,
        Self::Shutdown,
        Self::InternalError,
        Self::Ended,
    ];

    /// Whether time and devices go on.
    pub const fn runs(self) -> bool {
        matches!(self, Self::Running | Self::Suspended)
    }

    /// The word monitors show.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Prelaunch => "paused (prelaunch)",
            Self::Running => "running",
            Self::Suspended => "paused (suspended)",
            Self::Paused => "paused",
            Self::Shutdown => "paused (shutdown)",
            Self::InternalError => "paused (internal error)",
            Self::Ended => "ended",
        }
    }
}

/// Something asked of a machine.
#[derive(Debug)]
pub enum Request {
    /// Let it run.
    Continue,
    /// Pause it.
    Stop,
    /// Reset it.
    Reset(ResetCause),
    /// Power it off.
    Shutdown(ShutdownCause),
    /// The guest sleeps, with its memory kept.
    Sleep,
    /// Wake it, if it sleeps.
    Wake,
    /// Press the power button.
    PowerButton,
    /// Write out what disks have pending.
    Sync,
    /// End the run; the reason, for the host's user.
    Quit(QuitCause),
    /// A vCPU cannot go on.
    Failed(VcpuIndex, AccelError),
    /// A vCPU stopped for a debugger.
    Debug(VcpuIndex, DebugStop),
    /// Say so when all that was asked before has been carried out.
    Answer(SyncSender<()>),
}

/// Who ends a run from outside.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum QuitCause {
    /// The monitor or a key.
    Monitor,
    /// A signal.
    Signal(i32),
}

/// How a run ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum RunEnd {
    /// The guest powered off.
    PowerOff,
    /// The guest ended the run with a code for the host.
    Exit(u32),
    /// The guest crashed.
    Panic,
    /// The guest reset, which was to end the run.
    Reset,
    /// The host's user ended it.
    Quit(QuitCause),
    /// It could not go on.
    Failed(String),
}

/// What a debugger is told of a machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Notice {
    /// A vCPU stopped for it; all will.
    Debug(VcpuIndex, DebugStop),
    /// The machine's state has changed.
    State(RunState),
    /// A processor shut down and resets the machine; its state is still what it was.
    TripleFault,
}

type Observer = Arc<dyn Fn(Notice) + Send + Sync>;

struct Shared {
    state: AtomicU8,
    /// The guest asked for a reset or power-off that has not been carried out.
    guest_asked: AtomicBool,
    requests: Sender<Request>,
    threads: OnceLock<VcpuThreads>,
    observers: Mutex<Vec<Observer>>,
}

/// A way to ask things of a machine. Calls return at once.
#[derive(Clone)]
pub struct MachineControl(Arc<Shared>);

impl MachineControl {
    pub(super) fn new() -> (Self, Receiver<Request>) {
        let (requests, receiver) = channel();
        let shared = Shared {
            state: AtomicU8::new(RunState::Prelaunch as u8),
            guest_asked: AtomicBool::new(false),
            requests,
            threads: OnceLock::new(),
            observers: Mutex::default(),
        };
        (Self(Arc::new(shared)), receiver)
    }

    pub(super) fn set_threads(&self, threads: &VcpuThreads) {
        let _ = self.0.threads.set(threads.clone());
    }

    pub(super) fn set_state(&self, state: RunState) {
        self.0.state.store(state as u8, Ordering::SeqCst);
        self.notify(Notice::State(state));
    }

    pub(super) fn notify(&self, notice: Notice) {
        let observers = self.observers().clone();
        observers.iter().for_each(|observer| observer(notice));
    }

    fn observers(&self) -> MutexGuard<'_, Vec<Observer>> {
        self.0.observers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Has `observer` called on the machine's thread whenever there is news.
    pub fn observe(&self, observer: impl Fn(Notice) + Send + Sync + 'static) {
        self.observers().push(Arc::new(observer));
    }

    /// The guest's request has been carried out: it may make another.
    pub(super) fn guest_request_done(&self) {
        self.0.guest_asked.store(false, Ordering::SeqCst);
    }

    /// What the machine does now.
    pub fn state(&self) -> RunState {
        let state = self.0.state.load(Ordering::SeqCst);
        RunState::ALL.into_iter().find(|s| *s as u8 == state).unwrap_or(RunState::Ended)
    }

    /// Asks for something. Lost if the machine is gone.
    pub fn request(&self, request: Request) {
        let _ = self.0.requests.send(request);
    }

    /// Waits until everything asked for so far has been carried out; false if that takes longer than `limit`, or the
    /// machine is gone. Not on the machine's thread.
    pub fn settle(&self, limit: Duration) -> bool {
        let (done, answer) = sync_channel(1);
        self.request(Request::Answer(done));
        answer.recv_timeout(limit).is_ok()
    }

    /// A request of the guest, from a vCPU or device. The vCPUs stop soon; when the
    /// machine has carried it out it decides how they go on. Of several before that, the
    /// first counts. May be called with a device locked.
    pub fn guest_request(&self, request: Request) {
        if self.0.guest_asked.swap(true, Ordering::SeqCst) {
            return;
        }
        if let Some(threads) = self.0.threads.get() {
            threads.request_pause();
        }
        self.request(request);
    }

    pub(super) fn vcpu_event(&self, event: VcpuEvent) {
        match event {
            VcpuEvent::Shutdown(cause) => self.guest_request(Request::Shutdown(cause)),
            VcpuEvent::Reset(cause) => self.guest_request(Request::Reset(cause)),
            VcpuEvent::Debug(vcpu, stop) => self.request(Request::Debug(vcpu, stop)),
            VcpuEvent::Failed(vcpu, error) => self.request(Request::Failed(vcpu, error)),
        }
    }
}
