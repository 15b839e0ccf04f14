//! A machine with a debugger's target, and a client in this process.

use std::io::Write;
use std::sync::mpsc::{Receiver, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use mimus_core::accel::{Accelerator, DebugStop, VcpuIndex};
use mimus_core::bus::{GuestPhys, MemTxAttrs};
use mimus_core::memory::AddressSpace;
use mimus_core::vcpu::VcpuThreads;
use mimus_gdbstub::packet::{Framer, Incoming, encode};
use mimus_gdbstub::registers::Model;
use mimus_gdbstub::session::Session;
use mimus_gdbstub::{Event, Target, vm};
use mimus_machines::boards;
use mimus_machines::config::{Bios, CharBackend, MachineConfig};
use mimus_machines::machine::control::QuitCause;
use mimus_machines::machine::{Host, HostIo, Machine, MachineControl, Notice, Request, RunEnd, RunState};
use mimus_tcg::TcgAccelerator;

/// Longest wait for one thing: a loaded machine, not a fast one.
pub const LIMIT: Duration = Duration::from_secs(60);

/// How the code is run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Engine {
    Jit,
    Interp,
    #[cfg(target_arch = "x86_64")]
    Kvm,
}

/// Says on the real standard error, which the test runner does not keep to itself, that a test does not run.
pub fn skipped(test: &str, reason: &str) {
    let _ = writeln!(std::io::stderr(), "SKIPPED ({test}): {reason}");
}

/// A guest to build.
pub struct Setup {
    pub config: MachineConfig,
    files: tempfile::TempDir,
}

impl Setup {
    pub fn new(arch: &str, board: &str, cpus: u32) -> Self {
        let mut config = MachineConfig::new(arch);
        config.machine.name = Some(board.to_owned());
        config.memory = 32 << 20;
        config.no_defaults = true;
        // A guest that crashes stays.
        config.no_shutdown = true;
        // The same under every engine.
        config.cpu = match arch {
            "x86_64" | "i386" => Some("max,-avx".to_owned()),
            _ => None,
        };
        config.serials = vec![CharBackend::Null];
        (config.smp.cpus, config.smp.max_cpus, config.smp.cores) = (cpus, cpus, cpus);
        Self { config, files: tempfile::tempdir().unwrap() }
    }

    fn file(&self, name: &str, bytes: &[u8]) -> std::path::PathBuf {
        let path = self.files.path().join(name);
        std::fs::write(&path, bytes).unwrap();
        path
    }

    /// A PC with this ROM.
    pub fn rom(mut self, rom: &[u8]) -> Self {
        self.config.boot.bios = Bios::File(self.file("rom", rom));
        self
    }

    /// `-kernel`; without firmware if `bare`.
    pub fn kernel(mut self, bytes: &[u8], bare: bool) -> Self {
        self.config.boot.kernel = Some(self.file("kernel", bytes));
        if bare {
            self.config.boot.bios = Bios::None;
        }
        self
    }

    /// Builds it, powered on and paused, with its thread.
    pub fn start(self, engine: Engine) -> Debuggee {
        let accel: Box<dyn Accelerator> = match engine {
            #[cfg(target_arch = "x86_64")]
            Engine::Kvm => Box::new(mimus_accel_kvm::KvmAccelerator),
            _ => Box::new(TcgAccelerator),
        };
        let accel_options = match engine {
            Engine::Jit => vec![("engine", "jit"), ("tb-size", "16")],
            Engine::Interp => vec![("engine", "interp"), ("tb-size", "16")],
            #[cfg(target_arch = "x86_64")]
            Engine::Kvm => vec![],
        };
        let io = HostIo::new().unwrap();
        let host = Host {
            accel: &*accel,
            accel_options: accel_options.into_iter().map(|(k, v)| (k.to_owned(), v.to_owned())).collect(),
            emulation_failure: None,
            io,
            serials: vec![None],
        };
        let board = boards::find(&self.config).unwrap();
        let mut machine = (board.build)(&self.config, host).unwrap_or_else(|e| panic!("{e}"));
        machine.power_on().unwrap_or_else(|e| panic!("{e}"));
        Debuggee::new(machine, self.files)
    }
}

/// Who starts and stops it for the target.
struct Operator(MachineControl);

impl vm::Operator for Operator {
    fn running(&self) -> bool {
        self.0.state() == RunState::Running
    }
    fn resume(&self) {
        self.0.request(Request::Continue);
    }
    fn stop(&self) {
        self.0.request(Request::Stop);
    }
    fn settle(&self, limit: Duration) -> bool {
        self.0.settle(limit)
    }
    fn kill(&self) {
        self.0.request(Request::Quit(QuitCause::Monitor));
    }
    fn monitor(&self, line: &str) -> String {
        format!("there is no command '{line}'\n")
    }
}

/// A machine under a debugger.
pub struct Debuggee {
    pub control: MachineControl,
    pub target: Arc<dyn Target>,
    pub memory: Arc<AddressSpace>,
    pub threads: VcpuThreads,
    /// What stops it, and where events go.
    events: Arc<Mutex<Option<Receiver<Event>>>>,
    thread: Option<JoinHandle<Machine>>,
    _files: tempfile::TempDir,
}

impl Debuggee {
    fn new(mut machine: Machine, files: tempfile::TempDir) -> Self {
        let (control, memory) = (machine.control(), machine.services().memory.clone());
        let threads = machine.threads().clone();
        let operator = Arc::new(Operator(control.clone()));
        let target = vm::Vm::new(Model::of(machine.cpu()), machine.threads().clone(), memory.clone(), operator);
        let (tell, events) = channel();
        control.observe(move |notice| {
            if let Some(event) = event_of(notice) {
                let _ = tell.send(event);
            }
        });
        let thread = std::thread::spawn(move || {
            let end = machine.wait();
            if !matches!(end, RunEnd::Quit(_)) {
                println!("the machine ended: {end:?}");
            }
            machine.end();
            machine
        });
        let events = Arc::new(Mutex::new(Some(events)));
        Self { control, target: Arc::new(target), memory, threads, events, thread: Some(thread), _files: files }
    }

    /// A client of it; one at a time.
    pub fn client(&self) -> Client {
        let events = self.events.lock().unwrap_or_else(PoisonError::into_inner).take().expect("one client");
        // What happened before it came.
        while events.try_recv().is_ok() {}
        Client { session: Session::new(self.target.clone()), events, framer: Framer::default() }
    }

    /// Lets it run until a vCPU has a reason to stop, and all have.
    pub fn go(&self) -> DebugStop {
        let events = self.events.lock().unwrap_or_else(PoisonError::into_inner);
        let events = events.as_ref().expect("no client has them");
        while events.try_recv().is_ok() {}
        self.control.request(Request::Continue);
        let mut why = None;
        loop {
            match events.recv_timeout(LIMIT).expect("it stops") {
                Event::Stop(_, stop) => why = Some(stop),
                Event::Stopped if why.is_some() => return why.expect("a reason"),
                _ => {}
            }
        }
    }

    /// A doubleword of physical memory.
    pub fn word(&self, pa: u64) -> u64 {
        let mut bytes = [0; 8];
        assert!(self.memory.read_bytes(GuestPhys(pa), &mut bytes, MemTxAttrs::default()).is_ok());
        u64::from_le_bytes(bytes)
    }

    /// Waits until a doubleword is at least `value`.
    pub fn wait_for(&self, pa: u64, value: u64) {
        let end = Instant::now() + LIMIT;
        while self.word(pa) < value {
            assert!(Instant::now() < end, "{pa:#x} stays at {}, below {value}", self.word(pa));
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}

/// What a debugger's session is told of a machine.
/// What a debugger is told of; a machine that is about to reset has not stopped yet.
pub fn event_of(notice: Notice) -> Option<Event> {
    Some(match notice {
        Notice::Debug(VcpuIndex(vcpu), stop) => Event::Stop(vcpu, stop),
        Notice::State(RunState::Running) => Event::Running,
        Notice::State(RunState::Ended) => Event::Ended,
        Notice::State(_) => Event::Stopped,
        Notice::TripleFault => return None,
    })
}

impl Drop for Debuggee {
    fn drop(&mut self) {
        self.control.request(Request::Quit(QuitCause::Monitor));
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// A debugger.
pub struct Client {
    pub session: Session,
    events: Receiver<Event>,
    framer: Framer,
}

impl Client {
    /// Sends a packet without waiting for what it causes; whether there was a reply, and its body.
    pub fn send(&mut self, body: &[u8]) -> Option<String> {
        let mut out = Vec::new();
        self.session.bytes(&encode(body), &mut out);
        self.body_of(&out)
    }

    /// Sends a packet; the body of the reply, which may come when the machine has stopped.
    pub fn ask(&mut self, body: &str) -> String {
        self.send(body.as_bytes()).unwrap_or_else(|| self.wait(body))
    }

    /// The reply to come.
    pub fn wait(&mut self, what: &str) -> String {
        loop {
            let event = self.events.recv_timeout(LIMIT).unwrap_or_else(|e| panic!("{what}: no reply: {e}"));
            let mut out = Vec::new();
            self.session.event(event, &mut out);
            if let Some(reply) = self.body_of(&out) {
                return reply;
            }
        }
    }

    /// Ctrl-C.
    pub fn interrupt(&mut self) -> String {
        self.session.bytes(&[3], &mut Vec::new());
        self.wait("Ctrl-C")
    }

    fn body_of(&mut self, out: &[u8]) -> Option<String> {
        out.iter().find_map(|b| match self.framer.feed(*b)? {
            Incoming::Packet(body) => Some(String::from_utf8_lossy(&body).into_owned()),
            other => panic!("{other:?}"),
        })
    }
}
