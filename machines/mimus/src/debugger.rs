//! The machine as a target of our own debugger, and `mimus debug`.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError, Weak};
use std::time::Duration;

use mimus_core::accel::{
    AccelError, Access, CpuIo, DebugStop, RecentEvent, RememberedTranslation, Vcpu, VcpuDebug, VcpuIndex,
};
use mimus_core::arch::{CpuState, StateGroups};
use mimus_core::bus::{GuestPhys, GuestVirt, MemTxAttrs, MemTxResult};
use mimus_core::memory::{AddressSpace, FlatKind};
use mimus_core::vcpu::VcpuThreads;
use mimus_debug::debugger::Debugger;
use mimus_debug::devices::DeviceState;
use mimus_debug::pci::PciFunction;
use mimus_debug::steps::StepKind;
use mimus_debug::target::{Point, Region, Stop, Target, TlbEntry};
use mimus_machines::machine::{Machine, MachineControl, Notice, Request, RunState};
use rustyline::completion::Completer;
use rustyline::error::ReadlineError;
use rustyline::highlight::Highlighter;
use rustyline::hint::Hinter;
use rustyline::history::DefaultHistory;
use rustyline::validate::Validator;
use rustyline::{Context, Editor, Helper};

use crate::monitor::Control;
use crate::stepping::Steps;
use crate::views::Views;

/// A machine.
pub struct Live {
    threads: VcpuThreads,
    memory: Arc<AddressSpace>,
    io: Arc<dyn CpuIo + Send + Sync>,
    control: MachineControl,
    stops: Arc<Stops>,
    /// Stops that no command waited for.
    unawaited: Mutex<Option<Receiver<Stop>>>,
    /// Steps are to end.
    interrupted: Arc<AtomicBool>,
    views: Views,
}

impl Live {
    /// Of `machine`, whose news it follows.
    pub fn new(machine: &Machine) -> Arc<Live> {
        let (sender, unawaited) = channel();
        let live = Live {
            threads: machine.threads().clone(),
            memory: machine.services().memory.clone(),
            io: machine.io(),
            control: machine.control(),
            stops: Arc::default(),
            unawaited: Mutex::new(Some(unawaited)),
            interrupted: Arc::default(),
            views: Views::new(machine),
        };
        follow(&live.control, live.stops.clone(), sender);
        let live = Arc::new(live);
        let _ = LIVE.set(Arc::downgrade(&live));
        live
    }

    /// Has `debugger` judge the stops that no command waits for, and `announce` say what it says of them.
    pub fn announce_stops(
        &self,
        debugger: &Arc<Debugger>,
        announce: impl Fn(&str) + Send + 'static,
    ) -> std::io::Result<()> {
        let stops = self.unawaited.lock().unwrap_or_else(PoisonError::into_inner).take();
        let (Some(stops), debugger) = (stops, Arc::downgrade(debugger)) else { return Ok(()) };
        std::thread::Builder::new().name("stops".to_owned()).spawn(move || {
            for stop in stops {
                let Some(debugger) = debugger.upgrade() else { return };
                if let Some(text) = debugger.unawaited(stop) {
                    announce(&text);
                }
            }
        })?;
        Ok(())
    }

    /// Stops the machine, and ends steps that are being made.
    pub fn interrupt(&self) {
        self.control.request(Request::Stop);
        self.end_steps();
    }

    /// Ends steps that are being made.
    fn end_steps(&self) {
        self.interrupted.store(true, Ordering::SeqCst);
        (0..self.vcpus()).filter_map(|i| self.threads.handle(VcpuIndex(i))).for_each(|h| h.kick());
    }

    fn on<R: Send + 'static>(
        &self,
        vcpu: u32,
        f: impl FnOnce(&mut dyn Vcpu) -> R + Send + 'static,
    ) -> Result<R, String> {
        self.threads.run_on_sync(VcpuIndex(vcpu), f).map_err(|e| format!("vCPU {vcpu}: {e}"))
    }

    fn each(
        &self,
        f: impl Fn(&mut dyn VcpuDebug) -> Result<(), AccelError> + Copy + Send + 'static,
    ) -> Result<(), String> {
        for vcpu in 0..self.vcpus() {
            let done = self.on(vcpu, move |v| v.debug().map(f))?;
            done.ok_or("the accelerator has no breakpoints")?.map_err(|e| e.to_string())?;
        }
        Ok(())
    }
}

/// Why the machine stopped last, for those who wait for it.
#[derive(Default)]
struct Stops {
    last: Mutex<LastStop>,
    changed: Condvar,
}

#[derive(Default)]
struct LastStop {
    /// How many there were.
    number: u64,
    why: Option<Stop>,
    /// Commands that wait for the next.
    waiting: usize,
}

impl Stops {
    fn lock(&self) -> MutexGuard<'_, LastStop> {
        self.last.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Does `act`, and waits for the stop after it; not for one that has been, as `over` says.
    fn after(&self, act: impl FnOnce(), over: impl Fn() -> bool) -> Stop {
        let mut last = self.lock();
        let before = last.number;
        last.waiting += 1;
        drop(last);
        act();
        let mut last = self.lock();
        while last.number == before && !over() {
            let waited = self.changed.wait_timeout(last, Duration::from_millis(100));
            last = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
        last.waiting -= 1;
        last.why.unwrap_or(Stop::Paused)
    }

    /// There was one; whether nobody waits for it.
    fn tell(&self, stop: Stop) -> bool {
        let mut last = self.lock();
        last.number += 1;
        last.why = Some(stop);
        self.changed.notify_all();
        last.waiting == 0
    }
}

/// Tells why the machine stopped, each time it has.
fn follow(control: &MachineControl, stops: Arc<Stops>, unawaited: Sender<Stop>) {
    let why = Mutex::new(None);
    control.observe(move |notice| {
        let mut why = why.lock().unwrap_or_else(PoisonError::into_inner);
        match notice {
            Notice::Debug(VcpuIndex(vcpu), stop) => *why = Some(stop_of(vcpu, stop)),
            Notice::State(state) if state.runs() => *why = None,
            Notice::State(_) => {
                let stop = why.take().unwrap_or(Stop::Paused);
                if stops.tell(stop) {
                    let _ = unawaited.send(stop);
                }
            }
            Notice::TripleFault => {}
        }
    });
}

pub(crate) fn stop_of(vcpu: u32, stop: DebugStop) -> Stop {
    match stop {
        DebugStop::Breakpoint => Stop::Breakpoint { vcpu },
        DebugStop::Watch { va, .. } => Stop::Watch { vcpu, va: va.0 },
        DebugStop::Caught(caught) => Stop::Caught { vcpu, caught },
        _ => Stop::Step { vcpu },
    }
}

impl Target for Live {
    fn vcpus(&self) -> u32 {
        self.threads.count() as u32
    }
    fn is_on(&self, vcpu: u32) -> bool {
        self.threads.is_on(VcpuIndex(vcpu))
    }
    fn state(&self, vcpu: u32) -> Result<CpuState, String> {
        self.on(vcpu, |v| v.get_state(StateGroups::All))
    }
    fn set_state(&self, vcpu: u32, state: CpuState) -> Result<(), String> {
        self.on(vcpu, move |v| v.set_state(&state).map_err(|e| e.to_string()))?
    }
    fn translate(&self, vcpu: u32, va: u64) -> Option<(u64, u64)> {
        let found = self.on(vcpu, move |v| {
            let read = v.translate(GuestVirt(va), Access::Read);
            read.or_else(|_| v.translate(GuestVirt(va), Access::Execute)).ok()
        });
        let found = found.ok()??;
        Some((found.pa.0, found.page_size - (va & (found.page_size - 1))))
    }
    fn read(&self, pa: u64, to: &mut [u8]) -> bool {
        let view = self.memory.view();
        let is_ram = |pa: u64| view.lookup(GuestPhys(pa)).is_some_and(|r| r.ram_at(GuestPhys(pa)).is_some());
        let last = pa.saturating_add(to.len().saturating_sub(1) as u64);
        is_ram(pa)
            && is_ram(last)
            && self.memory.read_bytes(GuestPhys(pa), to, MemTxAttrs::default()) == MemTxResult::Ok
    }
    fn write(&self, pa: u64, from: &[u8]) -> bool {
        self.memory.load_bytes(GuestPhys(pa), from) == MemTxResult::Ok
    }
    fn insert(&self, point: Point) -> Result<(), String> {
        self.each(move |d| match point {
            Point::Break { va } => d.insert_breakpoint(GuestVirt(va)),
            Point::Watch { va, len, kind } => d.insert_watchpoint(GuestVirt(va), len, kind),
            Point::Catch(catch) => d.insert_catch(catch),
        })
    }
    fn remove(&self, point: Point) -> Result<(), String> {
        self.each(move |d| match point {
            Point::Break { va } => d.remove_breakpoint(GuestVirt(va)),
            Point::Watch { va, len, kind } => d.remove_watchpoint(GuestVirt(va), len, kind),
            Point::Catch(catch) => d.remove_catch(catch),
        })
    }
    fn running(&self) -> bool {
        self.control.state().runs()
    }
    fn go(&self) -> Stop {
        let stop = self.stops.after(|| self.control.request(Request::Continue), || false);
        self.interrupted.store(false, Ordering::SeqCst);
        stop
    }
    fn resume(&self) {
        self.control.request(Request::Continue);
    }
    fn step(&self, vcpu: u32, n: u64, kind: StepKind) -> Result<Stop, String> {
        if self.running() {
            return Err("the machine runs; stop it first".to_owned());
        }
        if !self.is_on(vcpu) {
            return Err(format!(
                "vCPU {vcpu} is off: the guest has not started it, and there is nothing that it would execute"
            ));
        }
        // It may have come between two steps of one command.
        if self.interrupted.swap(false, Ordering::SeqCst) {
            return Ok(Stop::Paused);
        }
        let (memory, interrupted) = (self.memory.clone(), self.interrupted.clone());
        let steps = Steps { vcpu, count: n, kind, memory, interrupted };
        let io = self.io.clone();
        let (end, event) = self.on(vcpu, move |v| steps.make(v, &*io))?;
        if let Some(request) = event {
            self.control.request(request);
        }
        if matches!(end, Ok(Stop::Paused)) {
            self.interrupted.store(false, Ordering::SeqCst);
        }
        end
    }
    fn pause(&self) {
        if self.running() {
            self.stops.after(|| self.control.request(Request::Stop), || !self.running());
        }
    }
    fn recent(&self, vcpu: u32) -> Vec<RecentEvent> {
        self.on(vcpu, |v| v.recent_events()).unwrap_or_default()
    }
    fn jumps(&self, vcpu: u32) -> Vec<u64> {
        self.on(vcpu, |v| v.recent_jumps()).unwrap_or_default()
    }
    fn disassemble(&self, bits: u8, bytes: &[u8], pc: u64) -> (String, usize) {
        mimus_tcg::disassemble(bits, bytes, pc)
    }
    fn regions(&self) -> Vec<Region> {
        let view = self.memory.view();
        let region = |r: &mimus_core::memory::FlatRange| {
            let (kind, name) = match &r.kind {
                FlatKind::Ram { block, readonly: false, .. } => ("ram", block.name()),
                FlatKind::Ram { block, .. } | FlatKind::RomDevice { block, .. } => ("rom", block.name()),
                FlatKind::Mmio { binding, .. } => ("device", binding.name()),
            };
            Region { base: r.base.0, len: r.len, kind, name: name.to_owned() }
        };
        view.ranges().iter().map(region).collect()
    }
    fn devices(&self) -> Result<Vec<DeviceState>, String> {
        if self.running() {
            return Err("the machine runs: its devices are looked at while it stands; stop it first".to_owned());
        }
        Ok(self.views.devices())
    }
    fn pci(&self) -> Vec<PciFunction> {
        self.views.pci()
    }
    fn tlb(&self, vcpu: u32) -> Result<Vec<TlbEntry>, String> {
        let found = self.on(vcpu, |v| v.remembered_translations())?;
        let found = found.ok_or("this accelerator does not tell which translations it remembers; -accel tcg does")?;
        let entry = |e: RememberedTranslation| TlbEntry {
            space: e.space,
            current: e.current,
            va: e.va.0,
            pa: e.pa.map(|pa| pa.0),
            read: e.read,
            write: e.write,
            execute: e.execute,
        };
        Ok(found.into_iter().map(entry).collect())
    }
}

/// `mimus debug`: the debugger's prompt, on a thread of its own.
pub fn prompt(operator: Arc<dyn Control>, control: MachineControl) -> std::io::Result<()> {
    let _ = CONTROL.set(control.clone());
    std::thread::Builder::new().name("debugger".to_owned()).spawn(move || {
        if let Err(e) = read_lines(&operator, &control) {
            eprintln!("mimus: debug: {e}");
        }
        control.request(Request::Quit(mimus_machines::machine::control::QuitCause::Monitor));
    })?;
    Ok(())
}

/// What is there beside the debugger's own.
const BEYOND: &str = "\
info status, registers, accel      whether the machine runs; all vCPUs' registers; what the accelerator counted
system_reset, system_powerdown     reset the machine; ask the guest to power off
trace start FILE,…|stop            traces what is executed, as -trace does
quit                               end mimus
";

struct Words(Arc<dyn Control>);

impl Helper for Words {}
impl Highlighter for Words {}
impl Validator for Words {}
impl Hinter for Words {
    type Hint = String;
}

impl Completer for Words {
    type Candidate = String;
    fn complete(&self, line: &str, pos: usize, _: &Context<'_>) -> rustyline::Result<(usize, Vec<String>)> {
        Ok(crate::monitor::complete(line.get(..pos).unwrap_or(line), &*self.0))
    }
}

fn read_lines(operator: &Arc<dyn Control>, control: &MachineControl) -> Result<(), ReadlineError> {
    let mut editor: Editor<Words, DefaultHistory> = Editor::new()?;
    editor.set_helper(Some(Words(operator.clone())));
    let history = std::env::var_os("HOME").map(|home| std::path::Path::new(&home).join(".cache/mimus/debug-history"));
    if let Some(path) = &history {
        // There is none at first.
        let _ = editor.load_history(path);
    }
    println!("mimus debugger - 'help' lists the commands, 'quit' ends; Ctrl-C stops a machine that runs");
    println!("{}", operator.debugger("disassemble $pc 1").unwrap_or_default().trim_end());
    let mut last = String::new();
    loop {
        let line = match editor.readline("(debug) ") {
            Ok(line) if line.trim().is_empty() => last.clone(),
            Ok(line) => line.trim().to_owned(),
            Err(ReadlineError::Interrupted) => continue,
            Err(ReadlineError::Eof) => break,
            Err(e) => return Err(e),
        };
        let _ = editor.add_history_entry(&line);
        match line.as_str() {
            "" => continue,
            "quit" | "q" | "exit" => break,
            "help" | "?" => print!("{}{BEYOND}", mimus_debug::help::help()),
            _ => {
                RUNNING.store(true, Ordering::SeqCst);
                let answer = crate::monitor::execute_debugger(&line, &**operator);
                RUNNING.store(false, Ordering::SeqCst);
                print!("{answer}");
            }
        }
        if control.state() == RunState::Ended {
            break;
        }
        last = line;
    }
    if let Some(path) = &history {
        let _ = editor.save_history(path);
    }
    Ok(())
}

/// A command of the debugger is being executed: Ctrl-C stops the machine then, and does not end mimus.
static RUNNING: AtomicBool = AtomicBool::new(false);
static CONTROL: OnceLock<MachineControl> = OnceLock::new();
static LIVE: OnceLock<Weak<Live>> = OnceLock::new();

/// A Ctrl-C: stops the machine if it runs for the debugger; false if it is not the debugger's.
pub fn interrupt() -> bool {
    let running = RUNNING.load(Ordering::SeqCst);
    if let Some(control) = CONTROL.get().filter(|_| running) {
        match LIVE.get().and_then(Weak::upgrade) {
            Some(live) => live.interrupt(),
            None => control.request(Request::Stop),
        }
    }
    running
}
