//! Looking at a stopped machine: memory, code, calls, page tables.

use std::cell::OnceCell;
use std::fmt::Write as _;

use mimus_arch::CpuState;
use mimus_arch::x86::X86State;

use crate::linux::memory::printable;
use crate::linux::programs::Space;
use crate::linux::{Linux, tasks};
use crate::orc::Orc;
use crate::registers;
use crate::symbols::{Symbols, shown};
use crate::target::{Target, read_number, read_virtual};
use crate::unwind::{self, Frame, Method};
use crate::walk::{self, End};

/// Longest find and dump.
const MOST_BYTES: u64 = 1 << 30;
/// Most units that `x` shows.
const MOST_UNITS: u64 = 65_536;

/// A vCPU looked at.
pub struct View<'a> {
    pub target: &'a dyn Target,
    pub vcpu: u32,
    pub cpu: &'a CpuState,
    pub symbols: &'a Symbols,
    /// The Linux that runs, if it is known.
    pub linux: Option<&'a Linux>,
    /// Its ORC tables.
    pub orc: Option<&'a Orc>,
    /// The program whose memory is looked at, once that was asked for.
    pub space: OnceCell<Option<Space<'a>>>,
}

/// Evaluates an expression.
pub type Number<'a> = &'a dyn Fn(&str) -> Result<u64, String>;

impl<'a> View<'a> {
    /// With the names of files alone.
    pub fn new(target: &'a dyn Target, vcpu: u32, cpu: &'a CpuState, symbols: &'a Symbols) -> View<'a> {
        View { target, vcpu, cpu, symbols, linux: None, orc: None, space: OnceCell::new() }
    }

    /// The program whose memory is looked at.
    pub fn space(&self) -> Option<&Space<'a>> {
        let find = || {
            let linux = self.linux?;
            Space::current(&linux.memory(self.target, self.cpu).ok()?, linux)
        };
        self.space.get_or_init(find).as_ref()
    }

    /// What the guest's own memory says of an address of a program.
    fn of_program(&self, at: u64) -> Option<&Space<'a>> {
        let wide = !matches!(self.cpu, CpuState::X86(s) if s.efer & 1 << 10 == 0);
        // Nothing is mapped in the first page; where the halves meet is a 32-bit kernel's choice.
        (at > 0xfff && (!wide || at >> 63 == 0)).then(|| self.space()).flatten()
    }

    /// The name at or before an address, or the file that a program has mapped there, and how far before.
    pub fn lookup(&self, at: u64) -> Option<(String, u64)> {
        let known = self.symbols.lookup(at).map(|(symbol, off)| (symbol.name.clone(), off));
        known.or_else(|| self.of_program(at)?.lookup(at))
    }

    /// Where the function that an address is in begins.
    pub fn begin(&self, at: u64) -> Option<u64> {
        let of_program = || Some(self.of_program(at)?.symbols(at)?.lookup(at)?.1);
        self.symbols.lookup(at).map(|(_, off)| off).or_else(of_program).map(|off| at - off)
    }

    /// File and line of the source of an address.
    pub fn source_line(&self, at: u64) -> Option<(String, u32)> {
        let of_program = || {
            let (file, line) = self.of_program(at)?.symbols(at)?.source_line(at)?;
            Some((printable(file.as_bytes()), line))
        };
        self.symbols.source_line(at).or_else(of_program)
    }

    /// What the file that a program has mapped at an address says of it.
    pub fn program_symbols(&self, at: u64) -> Option<&Symbols> {
        self.of_program(at)?.symbols(at)
    }

    /// ` <name+0x12>`, or nothing.
    pub fn named(&self, at: u64) -> String {
        let text =
            |(name, off): (String, u64)| if off == 0 { format!(" <{name}>") } else { format!(" <{name}+{off:#x}>") };
        self.lookup(at).map_or(String::new(), text)
    }

    /// The name of a place behind a call, which may be the last of its function.
    fn returning(&self, pc: u64) -> String {
        let found = self.lookup(pc.wrapping_sub(1));
        found.map_or(String::new(), |(name, off)| format!(" <{name}+{:#x}>", off + 1))
    }

    /// A value in full.
    pub fn value(&self, value: u64) -> String {
        let signed = value as i64;
        let more = if signed < 0 { format!(" {signed}") } else { String::new() };
        format!("{value:#x} {value}{more}{}\n", self.named(value))
    }

    fn bytes(&self, at: u64, len: usize, physical: bool) -> Vec<u8> {
        if !physical {
            return read_virtual(self.target, self.vcpu, at, len);
        }
        let mut bytes = vec![0; len];
        if self.target.read(at, &mut bytes) { bytes } else { Vec::new() }
    }

    /// Instructions from `at` on.
    pub fn disassemble(&self, at: u64, n: usize) -> String {
        let (bits, pc) = (registers::bits(self.cpu), registers::pc(self.cpu));
        let mut out = String::new();
        let mut at = at;
        for i in 0..n {
            let bytes = read_virtual(self.target, self.vcpu, at, 16);
            if bytes.is_empty() {
                let _ = writeln!(out, "   {at:016x}  (no memory)");
                break;
            }
            let (text, len) = self.target.disassemble(bits, &bytes, at);
            let named = self.lookup(at).filter(|(_, off)| i == 0 || *off == 0);
            if let Some((name, off)) = named {
                let line = self.source_line(at).map_or(String::new(), |(f, l)| format!(" {}:{l}", shown(&f)));
                let _ = writeln!(out, "{name}+{off:#x}:{line}");
            }
            let mark = if at == pc { "=>" } else { "  " };
            let raw: String = bytes.iter().take(len).map(|b| format!("{b:02x}")).collect();
            let _ = writeln!(out, "{mark} {at:016x}  {raw:<16} {text}{}", self.targets(&text));
            at = at.wrapping_add(len as u64);
        }
        out
    }

    /// The name of an address in an instruction's text.
    fn targets(&self, text: &str) -> String {
        let word = text.rsplit([' ', ',']).next().unwrap_or_default();
        let hex = word.strip_prefix("0x").or_else(|| word.strip_suffix('h')).unwrap_or_default();
        u64::from_str_radix(hex, 16).ok().filter(|at| *at > 0xfff).map_or(String::new(), |at| self.named(at))
    }

    /// `x/NFU ADDRESS`
    pub fn examine(&self, rest: &str, physical: bool, number: Number<'_>) -> Result<String, String> {
        let (options, address) = match rest.strip_prefix('/') {
            Some(rest) => rest.split_once(' ').ok_or("the address is missing: x/4xg ADDRESS")?,
            None => ("", rest),
        };
        let digits = options.find(|c: char| !c.is_ascii_digit()).unwrap_or(options.len());
        let count: u64 = if digits == 0 { 1 } else { options[..digits].parse().unwrap_or(MOST_UNITS) };
        let (mut format, mut unit) = ('x', 8);
        for letter in options[digits..].chars() {
            match letter {
                'x' | 'd' | 'u' | 'c' | 's' | 'i' => format = letter,
                'b' => unit = 1,
                'h' => unit = 2,
                'w' => unit = 4,
                'g' => unit = 8,
                _ => return Err(format!("x/{options}: {letter} is no format (x d u c s i) and no unit (b h w g)")),
            }
        }
        let at = number(address)?;
        let count = count.min(MOST_UNITS);
        if format == 'i' {
            return Ok(self.disassemble(at, count as usize));
        }
        if format == 's' {
            let bytes = self.bytes(at, 4096, physical);
            let text: Vec<u8> = bytes.into_iter().take_while(|b| *b != 0).collect();
            return Ok(format!("{at:016x}: {:?}\n", String::from_utf8_lossy(&text)));
        }
        let unit = if format == 'c' { 1 } else { unit };
        let bytes = self.bytes(at, count as usize * unit, physical);
        if bytes.is_empty() {
            return Err(format!("there is no memory at {at:#x}"));
        }
        Ok(units(at, &bytes, unit, format))
    }

    /// `find ADDRESS BYTES VALUE|"TEXT"`
    pub fn find(&self, rest: &str, number: Number<'_>) -> Result<String, String> {
        let mut words = rest.splitn(3, ' ');
        let (Some(at), Some(len), Some(what)) = (words.next(), words.next(), words.next()) else {
            return Err("find ADDRESS BYTES VALUE or find ADDRESS BYTES \"TEXT\"".to_owned());
        };
        let (at, len) = (number(at)?, number(len)?.min(MOST_BYTES));
        let pattern = match what.trim().strip_prefix('"') {
            Some(text) => text.trim_end_matches('"').as_bytes().to_vec(),
            None => {
                let value = number(what)?.to_le_bytes();
                let used = 8 - value.iter().rev().take_while(|b| **b == 0).count();
                value[..used.max(1).next_power_of_two()].to_vec()
            }
        };
        if pattern.is_empty() {
            return Err("there is nothing to find".to_owned());
        }
        let mut out = String::new();
        let (mut done, mut found, mut holes) = (0, 0, 0);
        // By pages, each with the begin of the next.
        while done < len && found < 100 {
            let page = read_virtual(self.target, self.vcpu, at.wrapping_add(done), 4096 + pattern.len() - 1);
            holes += u64::from(page.is_empty());
            for (i, window) in page.windows(pattern.len()).enumerate().take(4096) {
                if window == pattern && done + (i as u64) < len && found < 100 {
                    let place = at.wrapping_add(done + i as u64);
                    let _ = writeln!(out, "{place:016x}{}", self.named(place));
                    found += 1;
                }
            }
            done += 4096;
        }
        Ok(match (found, holes * 4096) {
            (0, missing) if missing >= len => return Err(format!("there is no memory at {at:#x} and behind it")),
            (0, 0) => "not found\n".to_owned(),
            (0, missing) => format!("not found; {} KiB of it are no memory\n", missing >> 10),
            (100, _) => out + "(and more, perhaps)\n",
            _ => out,
        })
    }

    /// `dump FILE ADDRESS BYTES`
    pub fn dump(&self, rest: &str, number: Number<'_>) -> Result<String, String> {
        let mut words = rest.split_whitespace();
        let (Some(file), Some(at), Some(len)) = (words.next(), words.next(), words.next()) else {
            return Err("dump FILE ADDRESS BYTES".to_owned());
        };
        let (at, len) = (number(at)?, number(len)?.min(MOST_BYTES));
        let bytes = read_virtual(self.target, self.vcpu, at, len as usize);
        if bytes.is_empty() && len != 0 {
            return Err(format!("there is no memory at {at:#x}"));
        }
        std::fs::write(file, &bytes).map_err(|e| format!("{file}: {e}"))?;
        let end = if (bytes.len() as u64) < len { "; there is no more memory" } else { "" };
        Ok(format!("{} bytes written to {file}{end}\n", bytes.len()))
    }

    /// This function and its callers.
    pub fn frames(&self, most: usize) -> Vec<Frame> {
        unwind::frames(self, most)
    }

    /// The calls that led here, each with how it was found.
    pub fn backtrace(&self) -> String {
        self.calls(self.frames(64))
    }

    /// The calls of a task of the Linux that runs.
    ///
    /// # Errors
    /// There is none of that number, or what the kernel kept of it is not known.
    pub fn backtrace_of(&self, pid: u64) -> Result<String, String> {
        let linux = self.linux.ok_or("no Linux was found in the guest's memory; 'kallsyms' says why")?;
        let m = linux.memory(self.target, self.cpu)?;
        let all = tasks::read(&m, linux)?;
        let task = all.iter().find(|t| u64::from(t.pid) == pid);
        let task = task.ok_or_else(|| format!("there is no task {pid}; 'info tasks' lists them"))?;
        // A kernel without types does not say who runs; who has the vCPU's stack, or, in a program, its memory does.
        let sp = registers::frame(self.cpu).0;
        let on_stack = |stack: u64| sp >= stack && sp - stack < if m.word == 4 { 8 << 10 } else { 16 << 10 };
        let here = linux.types.is_none()
            && (task.stack.is_some_and(on_stack) || !m.is_kernel(sp) && self.space().is_some_and(|s| s.task == *task));
        if task.running || here {
            return Err(format!(
                "task {pid} ({}) runs now, on vCPU {}: select that, then 'backtrace'",
                task.name,
                task.cpu.unwrap_or(0)
            ));
        }
        let (pc, kept) = tasks::kept(&m, linux, &all, task)?;
        let space = Space::of(&m, linux, &all, task).ok();
        let tables = space.as_ref().map(|space| space.memory().scheme());
        let View { target, vcpu, cpu, symbols, .. } = *self;
        let its = View { target, vcpu, cpu, symbols, linux: self.linux, orc: self.orc, space: OnceCell::from(space) };
        Ok(its.calls(unwind::frames_of_task(&its, (pc, &kept), tables, 64)))
    }

    fn calls(&self, frames: Vec<Frame>) -> String {
        let mut out = String::new();
        for (i, Frame { pc, method }) in frames.into_iter().enumerate() {
            let exact = matches!(method, Method::Pc | Method::Exception);
            let line = self.source_line(if exact { pc } else { pc.wrapping_sub(1) });
            let line = line.map_or(String::new(), |(f, l)| format!(" at {}:{l}", shown(&f)));
            let name = if exact { self.named(pc) } else { self.returning(pc) };
            let _ = writeln!(out, "#{i:<2} {pc:016x}{name}{line}  [{}]", method.name());
        }
        out
    }

    /// Reads page-table entries.
    pub fn entry(&self) -> impl Fn(u64, usize) -> Option<u64> + '_ {
        |at, bytes| {
            let mut buffer = [0; 8];
            self.target.read(at, &mut buffer[..bytes]).then(|| u64::from_le_bytes(buffer))
        }
    }

    /// The walk of an address.
    pub fn walk(&self, va: u64) -> String {
        let Some(scheme) = walk::scheme(self.cpu) else {
            return format!("paging is off: {va:#x} is the physical address\n");
        };
        let (entries, end) = scheme.walk(va, &self.entry());
        let mut out = format!(
            "{}{}\n",
            scheme.name,
            if walk::translates(self.cpu) { "" } else { " (not in machine mode, which is the current one)" }
        );
        for e in entries {
            let _ = writeln!(out, "level {} entry at {:#x} = {:016x}  {}", e.level, e.at, e.value, e.text);
        }
        let _ = match end {
            End::Mapped { pa, size } => writeln!(out, "{va:#x} is physical {pa:#x}, in a page of {} KiB", size >> 10),
            End::Fault(why) => writeln!(out, "{va:#x} faults: {why}"),
        };
        out
    }

    /// What is mapped between two addresses.
    pub fn mappings(&self, most: usize, (first, last): (u64, u64)) -> String {
        let Some(scheme) = walk::scheme(self.cpu) else { return "paging is off\n".to_owned() };
        let mut out = format!("{}\n", scheme.name);
        // Those before the first are counted too by who makes the list.
        let ranges = scheme.ranges(&self.entry(), if first == 0 { most } else { 1 << 20 });
        let wanted = ranges.iter().filter(|m| m.va <= last && m.va.wrapping_add(m.len - 1) >= first);
        for (shown, m) in wanted.enumerate() {
            if shown == most {
                let _ = writeln!(out, "(and more: info mem {:#x} shows what is from there on)", m.va);
                break;
            }
            let last = m.va.wrapping_add(m.len - 1);
            let _ =
                writeln!(out, "{:016x}-{last:016x} {:>10} KiB {} physical {:#x}", m.va, m.len >> 10, m.rights, m.pa);
        }
        out
    }

    /// Where jumps and calls by pointer and traps led last, oldest first; what repeats is counted.
    pub fn jumps(&self, most: usize) -> String {
        let all = self.target.jumps(self.vcpu);
        let mut out = String::new();
        let mut rest = &all[all.len().saturating_sub(most)..];
        while !rest.is_empty() {
            let (period, times) = repeats(rest);
            for &at in &rest[..period] {
                let _ = writeln!(out, "{at:016x}{}", self.named(at));
            }
            if times > 1 {
                let these = if period == 1 { String::new() } else { format!("these {period} ") };
                let _ = writeln!(out, "  ({these}{times} times)");
            }
            rest = &rest[period * times..];
        }
        if out.is_empty() {
            "there was none yet, or the accelerator is not the translator, which remembers them\n".to_owned()
        } else {
            out
        }
    }

    /// The physical address space.
    pub fn regions(&self) -> String {
        let line = |r: crate::target::Region| {
            format!("{:016x}-{:016x} {:<6} {}\n", r.base, r.base.wrapping_add(r.len - 1), r.kind, r.name)
        };
        self.target.regions().into_iter().filter(|r| r.len != 0).map(line).collect()
    }

    /// The last exceptions and interrupts.
    pub fn recent(&self, most: usize) -> String {
        let all = self.target.recent(self.vcpu);
        let riscv = matches!(self.cpu, CpuState::Riscv(_));
        let mut out = String::new();
        for e in all.iter().rev().take(most).rev() {
            let (interrupt, n) = (e.cause >> 63 != 0, e.cause & !(1 << 63));
            let name = cause_name(riscv, interrupt, n);
            let kind = if interrupt { "interrupt" } else { "exception" };
            let _ = writeln!(out, "{kind} {n} {name} at {:016x}{} value {:#x}", e.pc, self.named(e.pc), e.value);
        }
        if out.is_empty() { "none is remembered (under KVM, the processor tells of none)\n".to_owned() } else { out }
    }
}

/// A cause in words.
pub fn cause_name(riscv: bool, interrupt: bool, n: u64) -> &'static str {
    const RISCV: [&str; 16] = [
        "(instruction address misaligned)",
        "(instruction access fault)",
        "(illegal instruction)",
        "(breakpoint)",
        "(load address misaligned)",
        "(load access fault)",
        "(store address misaligned)",
        "(store access fault)",
        "(ecall from user mode)",
        "(ecall from supervisor mode)",
        "",
        "(ecall from machine mode)",
        "(instruction page fault)",
        "(load page fault)",
        "",
        "(store page fault)",
    ];
    const RISCV_INTERRUPTS: [&str; 12] = [
        "",
        "(supervisor software)",
        "",
        "(machine software)",
        "",
        "(supervisor timer)",
        "",
        "(machine timer)",
        "",
        "(supervisor external)",
        "",
        "(machine external)",
    ];
    const X86: [&str; 20] = [
        "#DE", "#DB", "NMI", "#BP", "#OF", "#BR", "#UD", "#NM", "#DF", "", "#TS", "#NP", "#SS", "#GP", "#PF", "",
        "#MF", "#AC", "#MC", "#XM",
    ];
    let names: &[&'static str] = match (riscv, interrupt) {
        (true, false) => &RISCV,
        (true, true) => &RISCV_INTERRUPTS,
        (false, false) => &X86,
        _ => &[],
    };
    names.get(n as usize).copied().unwrap_or("")
}

/// How what `list` begins with repeats: the length that covers most, and how often it comes.
fn repeats(list: &[u64]) -> (usize, usize) {
    let times = |period: usize| 1 + list[period..].chunks_exact(period).take_while(|c| *c == &list[..period]).count();
    let candidates = (1..=list.len().min(8)).map(|period| (period, times(period)));
    candidates.filter(|(_, times)| *times > 1).max_by_key(|(period, times)| period * times).unwrap_or((1, 1))
}

fn units(at: u64, bytes: &[u8], unit: usize, format: char) -> String {
    let mut out = String::new();
    let per_line = 16 / unit;
    for (row, line) in bytes.chunks(unit * per_line).enumerate() {
        let _ = write!(out, "{:016x}:", at.wrapping_add((row * unit * per_line) as u64));
        for piece in line.chunks(unit) {
            let value = piece.iter().rev().fold(0u64, |n, b| n << 8 | u64::from(*b));
            let shift = 64 - 8 * unit as u32;
            let _ = match format {
                'd' => write!(out, " {}", ((value << shift) as i64) >> shift),
                'u' => write!(out, " {value}"),
                'c' => write!(out, " {:?}", char::from(value as u8)),
                _ => write!(out, " {value:0width$x}", width = 2 * unit),
            };
        }
        out.push('\n');
    }
    out
}

/// The handler in gate `n` of the IDT (SDM volume 3, 7.11 and 7.14.1; real mode: 22.1.4).
pub fn x86_handler(target: &dyn Target, vcpu: u32, s: &X86State, n: u64) -> Option<u64> {
    const LMA: u64 = 1 << 10;
    let load = |at: u64, bytes| read_number(target, vcpu, at, bytes);
    if s.cr0 & 1 == 0 {
        let entry = load(s.idtr.base.wrapping_add(4 * n), 4)?;
        return Some((entry >> 16 << 4) + (entry & 0xffff));
    }
    let (size, wide) = if s.efer & LMA != 0 { (16, true) } else { (8, false) };
    if size * n + size - 1 > u64::from(s.idtr.limit) {
        return None;
    }
    let low = load(s.idtr.base.wrapping_add(size * n), 8)?;
    let high = if wide { load(s.idtr.base.wrapping_add(size * n + 8), 8)? } else { 0 };
    (low >> 47 & 1 != 0).then_some(low & 0xffff | (low >> 48) << 16 | high << 32)
}
