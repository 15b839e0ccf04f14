//! From a [`MachineConfig`] to the end of its run: the one place where the command line
//! meets boards and accelerators.

use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::{Arc, Mutex, Once, OnceLock, PoisonError};

use mimus_core::accel::{AccelVm, VcpuIndex};
use mimus_core::arch::StateGroups;
use mimus_core::backend::{InputEvent, InputSink};
use mimus_core::vcpu::VcpuThreads;
use mimus_debug::debugger::Debugger;
use mimus_debug::symbols::Symbols;
use mimus_machines::boards::{self, BoardEntry};
use mimus_machines::config::{CharBackend, MachineConfig};
use mimus_machines::machine::control::QuitCause;
use mimus_machines::machine::{Host, HostIo, Machine, MachineControl, Notice, Request, RunEnd, RunState, backends};
use mimus_machines::registry;

use crate::console::{Console, Sharing};
use crate::debugger::{self, Live};
use crate::monitor::{self, Control};
use crate::tracing::{Tracing, on_full_disk};
use crate::{accels, gdb, registers, signals, terminal};

/// The text of `-device help` (`None`) or `-device NAME,help`.
pub fn device_help(driver: Option<&str>) -> String {
    driver.map_or_else(registry::list, registry::properties)
}

/// Builds the machine and runs it to its end. The exit status is 0 when the guest
/// powered off, or reset under `-no-reboot`, or the user quit; the guest's own if it gave
/// one; 128 + the number of the signal that ended it. Everything else is an error.
pub fn run_machine(config: MachineConfig, debug: bool) -> anyhow::Result<ExitCode> {
    let board = boards::find(&config)?;
    check(&config, board)?;
    let control = Arc::new(OnceLock::new());
    watch_signals(&control)?;
    let accel = accels::choose(&config)?;
    let debugger = gdb::listen(&config)?;
    let io = HostIo::new()?;
    io.repeatable(&config)?;
    backends::open(&config, io.backends())?;
    let consoles = Consoles::open(&config, &io)?;
    let serials = consoles.serials.clone();
    let emulation_failure = accel.emulation_failure();
    let name = accel.accel.name();
    let names_code = accel.options.get("perfmap").is_some_and(|v| v == "on");
    let host = Host { accel: &*accel.accel, accel_options: accel.options, emulation_failure, serials, io };
    let mut machine = (board.build)(&config, host)?;
    machine.power_on()?;
    let tracing = Arc::new(Tracing::new(&config.guest, machine.vm().clone(), machine.threads().clone()));
    if let Some(text) = &config.trace {
        tracing.start(text)?;
    }
    let live = Live::new(&machine);
    let commands = Arc::new(Debugger::new(live.clone()));
    for path in &config.symbols {
        commands.load_symbols(path, 0).map_err(|e| anyhow::anyhow!("-symbols {e}"))?;
    }
    if names_code {
        name_code(&machine, &config.symbols)?;
    }
    crash_help(&machine, &commands);
    let operator = Arc::new(Operator {
        control: machine.control(),
        threads: machine.threads().clone(),
        debugger: commands.clone(),
        live: live.clone(),
        tracing: tracing.clone(),
        accel: name,
        vm: machine.vm().clone(),
        inputs: machine.inputs().to_vec(),
    });
    let monitors = consoles.attach(&operator)?;
    // gdb is told of all stops, and says itself when the machine goes on.
    if debugger.is_none() {
        live.announce_stops(&commands, move |text| monitors.iter().for_each(|monitor| monitor(text)))?;
    }
    let debugger = debugger.map(|d| gdb::serve(d, &machine, &operator)).transpose()?;
    let _ = control.set(machine.control());
    let raw = match consoles.raw {
        Some(signals) => Some(terminal::enter_raw(signals)?),
        None => None,
    };
    if !config.start_paused {
        machine.resume();
    }
    if debug {
        debugger::prompt(operator.clone(), machine.control())?;
    }
    let end = machine.wait();
    if matches!(end, RunEnd::Panic | RunEnd::Failed(_)) {
        report(&commands, machine.threads().count());
    }
    if tracing.is_on() {
        machine.pause();
    }
    let traced = tracing.stop();
    machine.end();
    let recorded = machine.services().backends.inputs().map_or(Ok(()), |inputs| inputs.finish());
    if let Some(debugger) = debugger {
        debugger.end();
    }
    drop(raw);
    if let Some(text) = traced? {
        eprintln!("mimus: {text}");
    }
    recorded.map_err(|e| {
        let file = config.record.as_deref().unwrap_or("".as_ref()).display();
        anyhow::anyhow!("-record {file}: {e}{}", on_full_disk(&e))
    })?;
    exit_status(end)
}

/// Gives the accelerator, for profiles of its code, names of its own: those of the debugger are behind a lock.
fn name_code(machine: &Machine, files: &[PathBuf]) -> anyhow::Result<()> {
    let mut all = Symbols::default();
    for path in files {
        all.add(Symbols::open(path).map_err(|e| anyhow::anyhow!("-symbols {e}"))?);
    }
    // Not to be shared between threads as it is, because of its source lines.
    let all = Mutex::new(all);
    let name = move |at| all.lock().unwrap_or_else(PoisonError::into_inner).describe(at);
    machine.vm().name_code(Arc::new(name));
    Ok(())
}

/// A report at the first triple fault.
fn crash_help(machine: &Machine, commands: &Arc<Debugger>) {
    let (commands, vcpus, once) = (Arc::downgrade(commands), machine.threads().count(), Once::new());
    machine.control().observe(move |notice| {
        if matches!(notice, Notice::TripleFault)
            && let Some(commands) = commands.upgrade()
        {
            once.call_once(|| report(&commands, vcpus));
        }
    });
}

/// Prints what is known about each vCPU.
fn report(commands: &Debugger, vcpus: usize) {
    for vcpu in 0..vcpus {
        commands.execute(&format!("vcpu {vcpu}"));
        let text = commands.execute("report").unwrap_or_default();
        // The terminal may be raw.
        eprint!("{}", text.replace('\n', "\r\n"));
    }
}

fn check(config: &MachineConfig, board: &BoardEntry) -> anyhow::Result<()> {
    if board.own_firmware {
        return Ok(());
    }
    let flash = |d: &mimus_machines::config::Drive| d.interface == mimus_machines::config::DriveInterface::Pflash;
    let firmware = matches!(config.boot.bios, mimus_machines::config::Bios::File(_));
    if config.boot.kernel.is_none() && !firmware && !config.drives.iter().any(flash) {
        anyhow::bail!("there is nothing to run: give -kernel FILE or -bios FILE (or see: mimus try {})", config.guest);
    }
    Ok(())
}

/// Signals that ask to end become requests; before there is a machine they just end.
fn watch_signals(control: &Arc<OnceLock<MachineControl>>) -> anyhow::Result<()> {
    let control = control.clone();
    signals::watch(move |signal| match control.get() {
        Some(c) => c.request(Request::Quit(QuitCause::Signal(signal))),
        None => {
            terminal::restore();
            std::process::exit(128 + signal);
        }
    })?;
    Ok(())
}

fn exit_status(end: RunEnd) -> anyhow::Result<ExitCode> {
    Ok(match end {
        RunEnd::PowerOff | RunEnd::Reset | RunEnd::Quit(QuitCause::Monitor) => ExitCode::SUCCESS,
        RunEnd::Exit(code) => ExitCode::from(u8::try_from(code).unwrap_or(u8::MAX)),
        RunEnd::Quit(QuitCause::Signal(signal)) => {
            eprintln!("mimus: ended by signal {signal}");
            ExitCode::from(u8::try_from(128 + signal).unwrap_or(u8::MAX))
        }
        RunEnd::Panic => anyhow::bail!("the guest crashed"),
        RunEnd::Failed(why) => anyhow::bail!("{why}"),
    })
}

/// The character devices of a machine, and who types on the terminal.
struct Consoles {
    /// The serial ports' back ends by name.
    serials: Vec<Option<String>>,
    terminal: Option<Arc<Console>>,
    /// A monitor of its own.
    monitor: Option<Arc<dyn mimus_core::backend::CharBackend>>,
    /// The terminal goes into raw mode; whether keys still make signals.
    raw: Option<bool>,
}

impl Consoles {
    fn open(config: &MachineConfig, io: &HostIo) -> anyhow::Result<Self> {
        let mut this = Consoles { serials: Vec::new(), terminal: None, monitor: None, raw: None };
        for chardev in &config.chardevs {
            if let Some(backend) = this.backend("-chardev", &chardev.backend, io)? {
                io.backends().add_char(&chardev.id, backend);
            }
        }
        for (i, serial) in config.serials.iter().enumerate() {
            let id = match serial {
                CharBackend::None => None,
                CharBackend::Chardev { id } => Some(id.clone()),
                other => this.backend("-serial", other, io)?.map(|backend| {
                    let id = format!("#serial{i}");
                    io.backends().add_char(&id, backend);
                    id
                }),
            };
            this.serials.push(id);
        }
        this.monitor = match &config.monitor {
            CharBackend::None => None,
            CharBackend::Chardev { id } => {
                let all = io.backends().list_char();
                all.into_iter().find(|c| c.0 == *id).map(|c| c.1)
            }
            other => this.backend("-monitor", other, io)?,
        };
        Ok(this)
    }

    fn backend(
        &mut self,
        option: &str,
        config: &CharBackend,
        io: &HostIo,
    ) -> anyhow::Result<Option<Arc<dyn mimus_core::backend::CharBackend>>> {
        let CharBackend::Stdio { monitor, signal } = *config else {
            return Ok(backends::open_char(option, config, io.handle())?);
        };
        let sharing = Sharing { escape: !signal, monitor };
        let console = Console::start(Box::new(std::io::stdin()), Box::new(std::io::stdout()), sharing, io.handle())?;
        self.terminal = Some(console.clone());
        self.raw = Some(signal);
        Ok(Some(console))
    }

    /// Gives keys and monitors a machine; what says something there.
    fn attach(&self, operator: &Arc<Operator>) -> anyhow::Result<Vec<Announce>> {
        let mut all: Vec<Announce> = Vec::new();
        if let Some(terminal) = &self.terminal {
            terminal.attach(operator.clone());
            let terminal = terminal.clone();
            all.push(Box::new(move |text| terminal.announce(text)));
        }
        if let Some(monitor) = &self.monitor {
            let session = monitor::serve(monitor, operator.clone())?;
            all.push(Box::new(move |text| session.announce(text)));
        }
        Ok(all)
    }
}

type Announce = Box<dyn Fn(&str) + Send>;

/// What a monitor does to the machine.
pub(crate) struct Operator {
    pub(crate) control: MachineControl,
    threads: VcpuThreads,
    accel: &'static str,
    vm: Arc<dyn AccelVm>,
    inputs: Vec<Arc<dyn InputSink>>,
    debugger: Arc<Debugger>,
    live: Arc<Live>,
    tracing: Arc<Tracing>,
}

impl Operator {
    /// `trace start FILE,…` and `trace stop`, the machine paused meanwhile.
    fn trace(&self, rest: &str) -> String {
        let was_running = self.control.state().runs();
        if was_running {
            self.debugger.execute("stop");
        }
        let result = match rest.split_once(' ').unwrap_or((rest, "")) {
            ("start", text) if !text.is_empty() => self.tracing.start(text),
            ("stop", _) => self.tracing.stop().map(|t| t.unwrap_or("there is no trace".to_owned())),
            _ => Err(anyhow::anyhow!("trace start FILE,what=blocks+mem,… or trace stop")),
        };
        if was_running {
            self.control.request(Request::Continue);
        }
        result.map_or_else(|e| format!("{e}\n"), |text| format!("{text}\n"))
    }
}

/// A reset takes milliseconds; one that takes longer is not waited for.
const RESET_TIME: std::time::Duration = std::time::Duration::from_secs(2);

impl Control for Operator {
    fn debugger(&self, line: &str) -> Option<String> {
        match line.strip_prefix("trace").filter(|rest| rest.is_empty() || rest.starts_with(' ')) {
            Some(rest) => Some(self.trace(rest.trim())),
            None => self.debugger.execute(line),
        }
    }
    fn complete(&self, line: &str, more: &[&str]) -> (usize, Vec<String>) {
        self.debugger.complete(line, more)
    }
    fn interrupt(&self) {
        self.live.interrupt();
    }
    fn status(&self) -> String {
        self.control.state().name().into()
    }
    fn stop(&self) {
        self.control.request(Request::Stop);
    }
    fn cont(&self) {
        self.control.request(Request::Continue);
    }
    fn reset(&self) {
        self.control.request(Request::Reset(mimus_core::accel::ResetCause::HostRequest));
        // Who asks next, gdb about memory say, is told of the machine after it.
        self.control.settle(RESET_TIME);
    }
    fn powerdown(&self) {
        self.control.request(Request::PowerButton);
    }
    fn wakeup(&self) -> String {
        match self.control.state() {
            RunState::Suspended => {
                self.control.request(Request::Wake);
                String::new()
            }
            state => format!("the guest does not sleep: it is {}\n", state.name()),
        }
    }
    fn input(&self, events: &[InputEvent]) -> String {
        if self.inputs.is_empty() {
            return "this board has no keyboard and no mouse; type at its console\n".to_owned();
        }
        // While a guest sleeps its devices do not.
        if !matches!(self.control.state(), RunState::Running | RunState::Suspended) {
            return "the machine stands: nothing would take it; let it go on first\n".to_owned();
        }
        self.inputs.iter().for_each(|sink| sink.input(events));
        String::new()
    }
    fn sync(&self) {
        self.control.request(Request::Sync);
    }
    fn quit(&self) {
        self.control.request(Request::Quit(QuitCause::Monitor));
    }
    fn registers(&self) -> String {
        let mut out = String::new();
        for i in (0..self.threads.count() as u32).map(VcpuIndex) {
            out.push_str(&format!("CPU {i}\n"));
            match self.threads.run_on_sync(i, |v| v.get_state(StateGroups::All)) {
                Ok(state) => out.push_str(&registers::show(&state)),
                Err(e) => out.push_str(&format!("{e}\n")),
            }
        }
        out
    }
    fn accelerator(&self) -> String {
        let mut out = format!("accelerator: {}\n", self.accel);
        for (name, value) in self.vm.statistics().into_iter().filter(|(_, value)| *value != 0) {
            out.push_str(&format!("{name}: {value}\n"));
        }
        out
    }
}
