//! A `virt` board, its console, and snapshots of it.

use std::collections::BTreeMap;
use std::io::Cursor;
use std::path::PathBuf;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use mimus_core::accel::{Accelerator, NullAccelerator};
use mimus_core::backend::CharBackend;
use mimus_core::backend::char::CharReceiver;
use mimus_core::bus::{AccessSize, GuestPhys, MemTxAttrs, MemTxResult};
use mimus_core::snapshot::SnapshotError;
use mimus_machines::config::{Bios, Drive, DriveInterface, MachineConfig};
use mimus_machines::machine::control::QuitCause;
use mimus_machines::machine::{Host, HostIo, Machine, Request, RunEnd, backends};
use mimus_machines::riscv::virt;
use mimus_tcg::TcgAccelerator;

/// Longest wait for one thing: a loaded machine, not a fast one.
pub const LIMIT: Duration = Duration::from_secs(120);

/// What a machine printed.
#[derive(Default)]
pub struct Console {
    output: Mutex<Output>,
    changed: Condvar,
}

#[derive(Default)]
struct Output {
    text: Vec<u8>,
    run: Run,
}

/// Whether a text is what a test waits for.
type Enough = Box<dyn Fn(&[u8]) -> bool + Send>;

/// Whether the guest may print on. A busy host can leave the test waiting for long after the guest has printed what the
/// test waits for: so that it does not run to its end meanwhile, it is held where it prints.
#[derive(Default)]
enum Run {
    /// It prints what it likes.
    #[default]
    Free,
    /// Until this is so of its text.
    Until(Enough),
    /// It is so: what prints more waits.
    Reached,
    /// It is being paused: what prints more is slow.
    Pausing,
}

impl Console {
    fn output(&self) -> MutexGuard<'_, Output> {
        self.output.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// All of it.
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.output().text).into_owned()
    }

    fn set(&self, run: Run) {
        self.output().run = run;
        self.changed.notify_all();
    }

    /// Waits until what was [`set`](Self::set) is so.
    fn wait(&self) {
        let deadline = Instant::now() + LIMIT;
        let mut output = self.output();
        while matches!(output.run, Run::Until(_)) {
            let left = deadline.saturating_duration_since(Instant::now());
            assert!(!left.is_zero(), "no more comes after:\n{}", String::from_utf8_lossy(&output.text));
            output = self.changed.wait_timeout(output, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }
}

impl CharBackend for Console {
    fn write(&self, data: &[u8]) -> usize {
        let mut output = self.output();
        if matches!(output.run, Run::Reached) {
            let held = |o: &mut Output| matches!(o.run, Run::Reached);
            output = self.changed.wait_timeout_while(output, LIMIT, held).unwrap_or_else(PoisonError::into_inner).0;
        }
        output.text.extend(data);
        if matches!(&output.run, Run::Until(enough) if enough(&output.text)) {
            output.run = Run::Reached;
            self.changed.notify_all();
        }
        let slow = matches!(output.run, Run::Pausing);
        drop(output);
        if slow {
            std::thread::sleep(Duration::from_millis(2));
        }
        data.len()
    }
    fn set_receiver(&self, _: CharReceiver) {}
    fn input_ready(&self) {}
}

/// How the machine's code is run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Engine {
    /// Not at all.
    Null,
    /// Generated code.
    Jit,
    /// The interpreter of the translator's intermediate code.
    Interp,
}

/// A kernel that does nothing, for ever.
pub fn idle() -> Vec<u8> {
    [0x1050_0073u32, 0xffdf_f06f].repeat(16).iter().flat_map(|i| i.to_le_bytes()).collect()
}

/// A machine to build, with its files.
pub struct Setup {
    pub config: MachineConfig,
    files: tempfile::TempDir,
}

impl Setup {
    /// Without network, with the built-in SBI.
    pub fn new(cpus: u32, memory: u64) -> Self {
        let mut config = MachineConfig::new("riscv64");
        config.memory = memory;
        config.no_defaults = true;
        // Several machines have the same images at a time.
        config.snapshot = true;
        (config.smp.cpus, config.smp.max_cpus, config.smp.cores) = (cpus, cpus, cpus);
        Self { config, files: tempfile::tempdir().unwrap() }
    }

    /// Writes a file for it.
    pub fn file(&self, name: &str, bytes: &[u8]) -> PathBuf {
        let path = self.files.path().join(name);
        std::fs::write(&path, bytes).unwrap();
        path
    }

    /// `-kernel` with these bytes.
    pub fn kernel(mut self, bytes: &[u8]) -> Self {
        self.config.boot.kernel = Some(self.file("kernel", bytes));
        self
    }

    /// `-bios none`
    pub fn bare(mut self) -> Self {
        self.config.boot.bios = Bios::None;
        self
    }

    /// `-drive` with an image of these bytes.
    pub fn drive(mut self, interface: DriveInterface, id: &str, bytes: &[u8]) -> Self {
        let file = Some(self.file(id, bytes));
        self.config.drives.push(Drive {
            file,
            interface,
            id: Some(id.into()),
            format: Some("raw".into()),
            ..Drive::default()
        });
        self
    }

    /// `-device`
    pub fn device(mut self, text: &str) -> Self {
        self.config.devices.push(text.into());
        self
    }

    /// The machine, powered on and paused.
    pub fn start(&self, engine: Engine) -> Guest {
        let accel: &dyn Accelerator = if engine == Engine::Null { &NullAccelerator } else { &TcgAccelerator };
        let mut accel_options = BTreeMap::new();
        if engine != Engine::Null {
            let name = if engine == Engine::Jit { "jit" } else { "interp" };
            accel_options.insert("engine".to_owned(), name.to_owned());
            accel_options.insert("tb-size".to_owned(), "32".to_owned());
        }
        let io = HostIo::new().unwrap();
        io.repeatable(&self.config).unwrap();
        let console = Arc::new(Console::default());
        io.backends().add_char("serial", console.clone());
        backends::open(&self.config, io.backends()).unwrap();
        let serials = vec![Some("serial".to_owned())];
        let host = Host { accel, accel_options, io, emulation_failure: None, serials };
        let mut machine = virt::build(&self.config, host).unwrap_or_else(|e| panic!("{e}"));
        machine.power_on().unwrap_or_else(|e| panic!("{e}"));
        Guest { machine, console, engine }
    }

    /// A machine that goes on where a snapshot was made.
    pub fn restored(&self, engine: Engine, snapshot: &[u8]) -> Guest {
        let mut guest = self.start(engine);
        guest.restore(snapshot).unwrap_or_else(|e| panic!("{e}"));
        guest
    }
}

/// A machine and its console.
pub struct Guest {
    pub machine: Machine,
    pub console: Arc<Console>,
    pub engine: Engine,
}

impl Guest {
    /// Runs until its console has `enough`, and pauses.
    pub fn run_until(&mut self, enough: impl Fn(&[u8]) -> bool + Send + 'static) {
        self.console.set(Run::Until(Box::new(enough)));
        self.machine.resume();
        self.console.wait();
        self.console.set(Run::Pausing);
        self.machine.pause();
        self.console.set(Run::Free);
    }

    /// Runs until the guest powers off.
    pub fn run_to_end(&mut self) {
        self.machine.resume();
        let (control, (done, ended)) = (self.machine.control(), std::sync::mpsc::channel::<()>());
        let watchdog = std::thread::spawn(move || {
            if ended.recv_timeout(LIMIT) == Err(std::sync::mpsc::RecvTimeoutError::Timeout) {
                control.request(Request::Quit(QuitCause::Monitor));
            }
        });
        let end = self.machine.wait();
        drop(done);
        watchdog.join().unwrap();
        assert_eq!(end, RunEnd::PowerOff, "{}", self.console.text());
        self.machine.end();
    }

    pub fn save(&mut self) -> Vec<u8> {
        let mut out = Cursor::new(Vec::new());
        self.machine.save(&mut out).unwrap_or_else(|e| panic!("{e}"));
        out.into_inner()
    }

    pub fn restore(&mut self, snapshot: &[u8]) -> Result<(), SnapshotError> {
        self.machine.restore(&mut &snapshot[..])
    }

    /// Reads as a CPU does.
    pub fn read(&self, at: u64, size: AccessSize) -> (u64, MemTxResult) {
        self.machine.services().memory.read(GuestPhys(at), size, MemTxAttrs::vcpu(0))
    }

    /// Writes as a CPU does.
    pub fn write(&self, at: u64, size: AccessSize, value: u64) -> MemTxResult {
        self.machine.services().memory.write(GuestPhys(at), size, value, MemTxAttrs::vcpu(0))
    }
}
