//! The debugger: its state, and the commands that run the machine. What only looks is in [`crate::look`].

use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use mimus_arch::CpuState;
use mimus_core::accel::{Catch, Caught, WatchKind};

use crate::catch;
use crate::expr::{self, Values};
use crate::help::{self, COMMANDS, SHORT};
use crate::info;
use crate::linux::programs::Space;
use crate::linux::{Linux, modules};
use crate::look;
use crate::registers;
use crate::report;
use crate::steps::StepKind;
use crate::symbols::Symbols;
use crate::target::{Point, Stop, Target, read_number, read_virtual, write_virtual};

/// Most steps of `until`.
const UNTIL: u64 = 10_000_000;

/// What `step` takes.
const STEP: &str = "step [N] [branch|call|return|exception]";

/// A breakpoint or watchpoint of the user.
struct Spot {
    number: u32,
    point: Point,
    condition: Option<String>,
    hits: u64,
    text: String,
}

#[derive(Default)]
struct State {
    symbols: Symbols,
    spots: Vec<Spot>,
    made: u32,
    vcpu: u32,
    /// Each vCPU's when the machine stopped the time before.
    before: Vec<CpuState>,
    shown: Option<CpuState>,
    /// What was caught last.
    caught: Option<Caught>,
    /// The Linux that runs, once it was looked for.
    linux: Option<Linux>,
    /// The registers when it was looked for: with others, the machine has run since.
    looked: Vec<(&'static str, u64)>,
}

impl State {
    /// Takes over a kernel's names, and its modules'.
    fn set_linux(&mut self, found: Option<Linux>, target: &dyn Target, cpu: &CpuState) {
        let names = found.as_ref().map(|linux| {
            let m = linux.memory(target, cpu).ok();
            let more = m.and_then(|m| Some(modules::names(&m, linux, &modules::read(&m, linux).ok()?)));
            match more {
                Some(more) if !more.is_empty() => Arc::new(linux.names.with(more)),
                _ => linux.names.clone(),
            }
        });
        self.symbols.set_guest(names);
        self.linux = found;
    }

    /// Moves files of programs that can be anywhere to where the one that runs has them.
    fn follow_program(&mut self, target: &dyn Target, cpu: &CpuState) {
        let State { symbols, linux: Some(linux), .. } = self else { return };
        if !symbols.may_move() {
            return;
        }
        if let Some(space) = linux.memory(target, cpu).ok().and_then(|m| Space::current(&m, linux)) {
            symbols.follow(|file| space.bias_of(file));
        }
    }

    fn view<'a>(&'a self, target: &'a dyn Target, vcpu: u32, cpu: &'a CpuState) -> look::View<'a> {
        let linux = self.linux.as_ref();
        let orc = linux.and_then(|l| l.orc.as_ref());
        look::View { linux, orc, ..look::View::new(target, vcpu, cpu, &self.symbols) }
    }
}

/// A debugger of a machine.
pub struct Debugger {
    target: Arc<dyn Target>,
    state: Mutex<State>,
}

/// What a stop is to the user's breakpoints.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Judgement {
    /// It is none of theirs.
    Others,
    /// It is one's, whose condition holds.
    Hit,
    /// Only of those whose conditions do not.
    Missed,
}

/// Expressions see a vCPU's registers and memory.
struct Context<'a> {
    target: &'a dyn Target,
    vcpu: u32,
    state: &'a CpuState,
    symbols: &'a Symbols,
    linux: Option<&'a Linux>,
    caught: Option<Caught>,
}

impl Values for Context<'_> {
    fn usual_register(&self, name: &str) -> Option<u64> {
        if registers::is_usual(self.state, name) { registers::get(self.state, name) } else { None }
    }
    fn no_register(&self, name: &str) -> String {
        let names = registers::names(self.state);
        let near = names.into_iter().map(|n| (strsim::damerau_levenshtein(n, name), n)).filter(|(d, _)| *d == 1).min();
        let near = near.map_or("'registers all' shows them".to_owned(), |(_, near)| format!("did you mean {near}?"));
        format!("there is no register {name}; {near}")
    }
    fn register(&self, name: &str) -> Option<u64> {
        if catch::is_variable(name) {
            // Where nothing was caught, as at the moment a condition is given, they are 0.
            return Some(self.caught.and_then(|c| catch::variable(&c, name)).unwrap_or(0));
        }
        registers::get(self.state, name)
    }
    fn symbol(&self, name: &str) -> Result<u64, String> {
        self.symbols.address(name).or_else(|unknown| {
            let of_program = || {
                let linux = self.linux?;
                Space::current(&linux.memory(self.target, self.state).ok()?, linux)?.address(name)
            };
            of_program().ok_or(unknown)
        })
    }
    fn memory(&self, address: u64, bytes: usize) -> Option<u64> {
        read_number(self.target, self.vcpu, address, bytes)
    }
}

/// `text if condition`
fn condition(text: &str) -> (&str, Option<String>) {
    match text.split_once(" if ") {
        Some((text, condition)) => (text.trim(), Some(condition.trim().to_owned())),
        None => (text.trim(), None),
    }
}

impl Debugger {
    /// Of a machine; there are no symbols yet.
    pub fn new(target: Arc<dyn Target>) -> Debugger {
        Debugger { target, state: Mutex::default() }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Adds names from a file.
    ///
    /// # Errors
    /// Why not.
    pub fn load_symbols(&self, path: &Path, bias: u64) -> Result<String, String> {
        let mut symbols = Symbols::open(path).map_err(|e| e.to_string())?;
        symbols.set_bias(bias);
        let text = format!("{} from {}\n", symbols.contents(), path.display());
        let mut state = self.lock();
        state.symbols.add(symbols);
        Ok(text)
    }

    /// Executes a command; `None`: there is none of that name.
    pub fn execute(&self, line: &str) -> Option<String> {
        let line = line.trim();
        let (word, rest) = line.split_once([' ', '/']).unwrap_or((line, ""));
        let rest = if line[word.len()..].starts_with('/') { &line[word.len()..] } else { rest.trim() };
        let name = SHORT.iter().find(|(short, _)| *short == word).map_or(word, |(_, long)| long);
        let (_, arguments, _) = COMMANDS.iter().find(|c| c.0 == name)?;
        if name == "help" {
            return Some(help::about(rest));
        }
        if rest.trim().is_empty() && help::needs(arguments) {
            return Some(format!("{name}: what? {word} {arguments}; see: help {name}\n"));
        }
        let result = self.command(name, rest, word == "xp");
        Some(result.unwrap_or_else(|e| format!("{e}\n")))
    }

    fn command(&self, name: &str, rest: &str, physical: bool) -> Result<String, String> {
        self.look_for_linux(name, rest)?;
        match name {
            "continue" => return self.go(),
            "step" => return self.step(rest),
            "next" => return self.next(),
            "finish" => return self.finish(),
            "until" => return self.until(rest),
            "stop" => {
                self.target.pause();
                return self.stopped(Stop::Paused);
            }
            "symbols" => {
                let (file, bias) = rest.split_once(' ').unwrap_or((rest, "0"));
                if file.is_empty() {
                    return Err("the file is missing: symbols FILE".to_owned());
                }
                let bias = self.value(bias)?;
                return self.load_symbols(Path::new(file), bias);
            }
            "break" => return self.add_break(rest),
            "catch" => return self.add_catch(rest),
            "watch" => return self.add_watch(rest),
            "delete" => return self.delete(rest),
            "kallsyms" => return self.kallsyms(rest),
            "set" => return self.set(rest),
            _ => {}
        }
        let mut state = self.lock();
        let vcpu = state.vcpu;
        let cpu = self.target.state(vcpu)?;
        let view = state.view(&*self.target, vcpu, &cpu);
        let number = |text: &str| self.eval(text, &cpu, &state);
        match name {
            "registers" if rest.is_empty() => {
                let text = registers::show(&cpu, state.before.get(vcpu as usize));
                state.shown = Some(cpu);
                Ok(text)
            }
            "registers" if rest == "all" => Ok(registers::show_all(&cpu, state.before.get(vcpu as usize))),
            "registers" | "print" => Ok(view.value(number(rest)?)),
            "disassemble" => {
                let mut words = rest.split_whitespace();
                let at = words.next().map_or(Ok(registers::pc(&cpu)), number)?;
                let n = words.next().map_or(Ok(10), number)?;
                Ok(view.disassemble(at, n.min(10_000) as usize))
            }
            "x" => view.examine(rest, physical, &number),
            "find" => view.find(rest, &number),
            "dump" => view.dump(rest, &number),
            "backtrace" if rest.is_empty() => Ok(view.backtrace()),
            "backtrace" => view.backtrace_of(number(rest)?),
            "walk" => Ok(view.walk(number(rest)?)),
            "struct" => info::structure(rest, &view, &number),
            "report" => Ok(report::text(&view)),
            "vcpu" if rest.is_empty() => {
                let all = (0..self.target.vcpus()).map(|n| {
                    let mark = if n == vcpu { '*' } else { ' ' };
                    let cpu = self.target.state(n)?;
                    let pc = registers::pc(&cpu);
                    let off = if self.target.is_on(n) { "" } else { ", off" };
                    Ok(format!("{mark} vCPU {n} at {pc:016x}{}{off}\n", state.view(&*self.target, n, &cpu).named(pc)))
                });
                all.collect()
            }
            "vcpu" => {
                let (n, all) = (number(rest)?, self.target.vcpus());
                if n >= u64::from(all) {
                    return Err(format!("there is no vCPU {n}; they are 0 to {}", all - 1));
                }
                state.vcpu = n as u32;
                Ok(format!("vCPU {n}\n"))
            }
            _ => self.info(rest, &view, &state, &number),
        }
    }

    fn info(
        &self,
        rest: &str,
        view: &look::View<'_>,
        state: &State,
        number: &dyn Fn(&str) -> Result<u64, String>,
    ) -> Result<String, String> {
        let (what, rest) = rest.split_once(' ').unwrap_or((rest, ""));
        match what {
            "breakpoints" | "b" => Ok(spots(&state.spots)),
            "symbols" => Ok(format!("{} symbols\n", state.symbols.len())),
            "line" => {
                let at = number(rest)?;
                let line = state.symbols.source_line(at);
                Ok(line.map_or("no source line is known\n".to_owned(), |(f, l)| format!("{f}:{l}\n")))
            }
            _ => info::show(what, rest.trim(), view, number),
        }
    }

    pub(crate) fn with_state<R>(&self, f: impl FnOnce(&Symbols, Option<&Linux>, &dyn Target, u32) -> R) -> R {
        let state = self.lock();
        f(&state.symbols, state.linux.as_ref(), &*self.target, state.vcpu)
    }

    fn eval(&self, text: &str, cpu: &CpuState, state: &State) -> Result<u64, String> {
        let (vcpu, symbols, caught) = (state.vcpu, &state.symbols, state.caught);
        let linux = state.linux.as_ref();
        expr::eval(text, &Context { target: &*self.target, vcpu, state: cpu, symbols, linux, caught })
    }

    /// The value of an expression now.
    fn value(&self, text: &str) -> Result<u64, String> {
        let state = self.lock();
        let cpu = self.target.state(state.vcpu)?;
        self.eval(text, &cpu, &state)
    }

    /// A place: an expression, or `FILE:LINE`.
    fn place(&self, text: &str) -> Result<u64, String> {
        if let Some((file, line)) = text.rsplit_once(':')
            && let Ok(line) = line.parse()
        {
            let found = self.lock().symbols.line_address(file, line);
            return found.ok_or_else(|| self.no_line(text, file));
        }
        self.value(text)
    }

    /// Why a source line has no address.
    fn no_line(&self, text: &str, file: &str) -> String {
        let state = self.lock();
        let files = state.symbols.source_files();
        if files.is_empty() {
            return format!("{text}: no source line is known; load an ELF file with debug information: symbols FILE");
        }
        let last = |path: &str| path.rsplit('/').next().unwrap_or_default().to_owned();
        if files.iter().any(|f| f.ends_with(file)) {
            return format!("{text}: {file} has no code at that line or behind it");
        }
        let near = files.iter().map(|f| (strsim::damerau_levenshtein(&last(f), &last(file)), f)).min();
        match near.filter(|(distance, _)| *distance <= 2) {
            Some((_, near)) => format!("{text}: there is no such file; did you mean {near}?"),
            None => format!("{text}: no code of a file of that name is known; there are {} files", files.len()),
        }
    }

    fn add(&self, point: Point, condition: Option<String>, text: String) -> Result<String, String> {
        if let Some(condition) = &condition {
            // Only its syntax: what it refers to may not be there yet.
            self.value(condition).map(drop).or_else(|e| if e.contains("no memory") { Ok(()) } else { Err(e) })?;
        }
        self.target.insert(point)?;
        let mut state = self.lock();
        state.made += 1;
        let number = state.made;
        let line = format!("{number}: {text}\n");
        state.spots.push(Spot { number, point, condition, hits: 0, text });
        Ok(line)
    }

    fn add_break(&self, rest: &str) -> Result<String, String> {
        let (place, condition) = condition(rest);
        if place.is_empty() {
            return Err("the place is missing: break ADDRESS, SYMBOL or FILE:LINE".to_owned());
        }
        let va = self.place(place)?;
        self.add(Point::Break { va }, condition, format!("break {rest} at {va:#x}"))
    }

    fn add_catch(&self, rest: &str) -> Result<String, String> {
        let (what, condition) = condition(rest);
        let (vcpu, cpu) = {
            let state = self.lock();
            (state.vcpu, self.target.state(state.vcpu)?)
        };
        let wanted = catch::parse(what, &cpu, &|text| self.value(text))?;
        let added = self.add(Point::Catch(wanted), condition.clone(), format!("catch {rest}"));
        // Where nobody tells of exceptions, the handler that is installed now has a beginning.
        let handler = match (&added, &cpu, wanted) {
            (Err(_), CpuState::X86(s), Catch::Exception(Some(n)) | Catch::Interrupt(Some(n))) => {
                look::x86_handler(&*self.target, vcpu, s, n)
            }
            _ => None,
        };
        match handler {
            Some(va) => self.add(Point::Break { va }, condition, format!("catch {rest} at {va:#x}")),
            None => added,
        }
    }

    fn add_watch(&self, rest: &str) -> Result<String, String> {
        let (what, condition) = condition(rest);
        let mut words: Vec<&str> = what.split_whitespace().collect();
        let kind = match words.last() {
            Some(&"r") => WatchKind::Read,
            Some(&"rw") => WatchKind::ReadWrite,
            _ => WatchKind::Write,
        };
        words.retain(|w| !matches!(*w, "r" | "w" | "rw"));
        let va = self.value(words.first().ok_or("the address is missing: watch ADDRESS [BYTES] [r|w|rw]")?)?;
        let len = words.get(1).map_or(Ok(8), |w| self.value(w))?;
        self.add(Point::Watch { va, len, kind }, condition, format!("watch {rest}: {len} bytes at {va:#x}"))
    }

    fn delete(&self, rest: &str) -> Result<String, String> {
        let number = if rest.is_empty() { None } else { Some(self.value(rest)?) };
        let gone: Vec<Spot> = {
            let mut state = self.lock();
            let all = std::mem::take(&mut state.spots);
            let (gone, kept) = all.into_iter().partition(|s| number.is_none_or(|n| n == u64::from(s.number)));
            state.spots = kept;
            gone
        };
        if gone.is_empty() {
            return Err("there is no such breakpoint; see: info breakpoints".to_owned());
        }
        gone.iter().try_for_each(|spot| self.target.remove(spot.point))?;
        Ok(String::new())
    }

    fn set(&self, rest: &str) -> Result<String, String> {
        let (left, right) = rest.split_once('=').ok_or("set NAME = EXPR, or set [ADDRESS] = EXPR")?;
        let (left, value) = (left.trim(), self.value(right)?);
        let vcpu = self.lock().vcpu;
        if let Some((kind, at)) = left.strip_suffix(']').and_then(|l| l.split_once('[')) {
            let bytes = match kind {
                "" | "u64" => 8,
                "u32" => 4,
                "u16" => 2,
                "u8" => 1,
                _ => return Err(format!("{kind}: there are u8, u16, u32 and u64")),
            };
            let at = self.value(at)?;
            let written = write_virtual(&*self.target, vcpu, at, &value.to_le_bytes()[..bytes]);
            return if written { Ok(String::new()) } else { Err(format!("there is no memory at {at:#x}")) };
        }
        let mut cpu = self.target.state(vcpu)?;
        let name = left.trim_start_matches('$');
        if !registers::set(&mut cpu, name, value) {
            return Err(format!("there is no register {name}"));
        }
        self.target.set_state(vcpu, cpu)?;
        Ok(String::new())
    }

    /// Commands that show names have them read from the guest's memory, once each time the machine has run.
    fn look_for_linux(&self, name: &str, rest: &str) -> Result<(), String> {
        const WITH_NAMES: [&str; 9] =
            ["break", "watch", "print", "disassemble", "x", "backtrace", "report", "struct", "vcpu"];
        let wanted = WITH_NAMES.contains(&name) || name == "info" && info::needs_linux(rest);
        let mut state = self.lock();
        if !wanted {
            return Ok(());
        }
        let cpu = self.target.state(state.vcpu)?;
        let registers = registers::list(&cpu);
        if state.looked == registers {
            return Ok(());
        }
        state.looked = registers;
        let there = |l: &Linux| l.memory(&*self.target, &cpu).is_ok();
        // While paging is off, as in firmware's calls, what was known is kept.
        if crate::walk::scheme(&cpu).is_none() {
            return Ok(());
        }
        if !state.linux.as_ref().is_some_and(there) {
            let found = Linux::find(&*self.target, &cpu).ok();
            state.set_linux(found, &*self.target, &cpu);
        }
        state.follow_program(&*self.target, &cpu);
        Ok(())
    }

    fn kallsyms(&self, file: &str) -> Result<String, String> {
        let mut state = self.lock();
        let cpu = self.target.state(state.vcpu)?;
        let found = Linux::find(&*self.target, &cpu)?;
        let mut account = found.account.clone();
        state.set_linux(Some(found), &*self.target, &cpu);
        state.looked = registers::list(&cpu);
        if !file.is_empty() {
            let text = state.symbols.guest_map();
            std::fs::write(file, &text).map_err(|e| format!("{file}: {e}"))?;
            account.push_str(&format!("{} names written to {file}\n", text.lines().count()));
        }
        Ok(account)
    }

    fn go(&self) -> Result<String, String> {
        self.remember()?;
        loop {
            let stop = self.target.go();
            if self.judge(stop)? == Judgement::Missed {
                continue;
            }
            return self.stopped(stop);
        }
    }

    /// What to say of a stop that no command waits for; `None`: nothing, and if a condition did not hold, the machine goes
    /// on.
    pub fn unawaited(&self, stop: Stop) -> Option<String> {
        match self.judge(stop) {
            Ok(Judgement::Missed) => {
                self.target.resume();
                None
            }
            Ok(Judgement::Hit) => Some(self.stopped(stop).unwrap_or_else(|e| format!("{e}\n"))),
            // Another debugger's, or none of a debugger at all.
            _ => None,
        }
    }

    /// Whose stop it is, and whether its condition holds.
    fn judge(&self, stop: Stop) -> Result<Judgement, String> {
        let vcpu = match stop {
            Stop::Breakpoint { vcpu } | Stop::Watch { vcpu, .. } | Stop::Caught { vcpu, .. } => vcpu,
            _ => return Ok(Judgement::Others),
        };
        let cpu = self.target.state(vcpu)?;
        let pc = registers::pc(&cpu);
        let mut state = self.lock();
        state.vcpu = vcpu;
        if let Stop::Caught { caught, .. } = stop {
            state.caught = Some(caught);
        }
        let mut judgement = Judgement::Others;
        for i in 0..state.spots.len() {
            let spot = &state.spots[i];
            let here = match (spot.point, stop) {
                (Point::Break { va }, Stop::Breakpoint { .. }) => va == pc,
                (Point::Watch { va, len, .. }, Stop::Watch { va: at, .. }) => at.wrapping_sub(va) < len,
                (Point::Catch(catch), Stop::Caught { caught, .. }) => catch.matches(&caught),
                _ => false,
            };
            if !here {
                continue;
            }
            let holds = spot.condition.as_ref().is_none_or(|text| self.eval(text, &cpu, &state).is_ok_and(|v| v != 0));
            state.spots[i].hits += u64::from(holds);
            if holds {
                judgement = Judgement::Hit;
            } else if judgement == Judgement::Others {
                judgement = Judgement::Missed;
            }
        }
        Ok(judgement)
    }

    fn remember(&self) -> Result<(), String> {
        let mut state = self.lock();
        state.before = (0..self.target.vcpus()).map(|vcpu| self.target.state(vcpu)).collect::<Result<_, _>>()?;
        Ok(())
    }

    fn step(&self, rest: &str) -> Result<String, String> {
        let (n, word) = match rest.rsplit_once(' ') {
            Some((n, word)) if word == "exception" || StepKind::by_name(word).is_some() => (n, word),
            Some(_) => (rest, "insn"),
            None if rest == "exception" || StepKind::by_name(rest).is_some() => ("", rest),
            None => (rest, "insn"),
        };
        let n = if n.is_empty() { 1 } else { self.value(n).map_err(|e| format!("{e}; {STEP}"))? };
        if n >> 63 != 0 {
            return Err(format!("step {rest}: it goes forwards only; {STEP}"));
        }
        if word == "exception" {
            return self.to_exception(n);
        }
        let kind = StepKind::by_name(word).unwrap_or(StepKind::Instruction);
        self.remember()?;
        let vcpu = self.lock().vcpu;
        let stop = self.target.step(vcpu, n, kind)?;
        self.stopped(stop)
    }

    /// Runs until the `n`-th exception or interrupt.
    fn to_exception(&self, n: u64) -> Result<String, String> {
        self.remember()?;
        let points = [Catch::Exception(None), Catch::Interrupt(None)].map(Point::Catch);
        self.target.insert(points[0])?;
        let second = self.target.insert(points[1]);
        let (mut stop, mut left) = (Stop::Paused, n);
        while second.is_ok() && left > 0 {
            stop = self.target.go();
            match stop {
                Stop::Caught { caught: Caught::Exception { .. }, .. } => left -= 1,
                _ if self.judge(stop)? == Judgement::Missed => {}
                _ => break,
            }
        }
        self.target.remove(points[0])?;
        second?;
        self.target.remove(points[1])?;
        self.stopped(stop)
    }

    fn until(&self, rest: &str) -> Result<String, String> {
        self.value(rest)?;
        self.remember()?;
        let vcpu = self.lock().vcpu;
        for _ in 0..UNTIL {
            let stop = self.target.step(vcpu, 1, StepKind::Instruction)?;
            if !matches!(stop, Stop::Step { .. }) || self.value(rest)? != 0 {
                return self.stopped(stop);
            }
        }
        self.stopped(Stop::Paused)
    }

    /// Runs to `va` with the stack no deeper than `sp`.
    fn run_to(&self, va: u64, sp: u64) -> Result<String, String> {
        self.remember()?;
        let point = Point::Break { va };
        let known = self.lock().spots.iter().any(|s| s.point == point);
        if !known {
            self.target.insert(point)?;
        }
        let stop = loop {
            let stop = self.target.go();
            let Stop::Breakpoint { vcpu } = stop else { break stop };
            let cpu = self.target.state(vcpu)?;
            let there = registers::pc(&cpu) == va;
            // The same place deeper in a recursion is not it.
            if there && registers::frame(&cpu).0 < sp || !there && self.judge(stop)? == Judgement::Missed {
                continue;
            }
            // It is there: that is no breakpoint of the user's.
            break if there && !known { Stop::Step { vcpu } } else { stop };
        };
        if !known {
            self.target.remove(point)?;
        }
        self.stopped(stop)
    }

    fn next(&self) -> Result<String, String> {
        let (vcpu, cpu) = {
            let state = self.lock();
            (state.vcpu, self.target.state(state.vcpu)?)
        };
        let (pc, bits) = (registers::pc(&cpu), registers::bits(&cpu));
        let bytes = read_virtual(&*self.target, vcpu, pc, 16);
        let (_, len) = self.target.disassemble(bits, &bytes, pc);
        let insn = bytes.get(..len).unwrap_or_default();
        let transfer = crate::trace::report::transfer(insn, &[len as u8], bits);
        if transfer != crate::trace::report::Transfer::Call {
            return self.step("1");
        }
        self.run_to(pc + len as u64, registers::frame(&cpu).0)
    }

    fn finish(&self) -> Result<String, String> {
        let (vcpu, cpu) = {
            let state = self.lock();
            (state.vcpu, self.target.state(state.vcpu)?)
        };
        let state = self.lock();
        let view = state.view(&*self.target, vcpu, &cpu);
        let caller = view.frames(2).get(1).map(|f| f.pc).ok_or("there is no caller to return to")?;
        drop(state);
        self.run_to(caller, registers::frame(&cpu).0)
    }

    /// What to say at a stop.
    fn stopped(&self, stop: Stop) -> Result<String, String> {
        let mut state = self.lock();
        let why = match stop {
            Stop::Step { vcpu } => {
                state.vcpu = vcpu;
                String::new()
            }
            Stop::Breakpoint { vcpu } => {
                state.vcpu = vcpu;
                format!("vCPU {vcpu}: breakpoint\n")
            }
            Stop::Watch { vcpu, va } => {
                state.vcpu = vcpu;
                format!("vCPU {vcpu}: {va:#x} was accessed\n")
            }
            Stop::Caught { vcpu, .. } => {
                state.vcpu = vcpu;
                String::new()
            }
            Stop::Paused => "stopped\n".to_owned(),
        };
        let vcpu = state.vcpu;
        let Ok(cpu) = self.target.state(vcpu) else {
            return Ok(format!("{why}the machine has come to its end\n"));
        };
        let why = match stop {
            Stop::Caught { caught, .. } => {
                state.caught = Some(caught);
                format!("vCPU {vcpu}: {}\n", catch::describe(&caught, &cpu))
            }
            _ => why,
        };
        let view = state.view(&*self.target, vcpu, &cpu);
        Ok(format!("{why}{}", view.disassemble(registers::pc(&cpu), 1)))
    }
}

fn spots(spots: &[Spot]) -> String {
    if spots.is_empty() {
        return "there are none\n".to_owned();
    }
    spots.iter().map(|s| format!("{}: {}, hit {} times\n", s.number, s.text, s.hits)).collect()
}

#[cfg(test)]
#[path = "debugger_tests.rs"]
mod tests;
