//! What is asked of traces: text, counts, coverage, flame graphs, the last write.

use std::collections::{BTreeMap, HashMap};
use std::fmt::Write as _;

use super::read::{Event, Record};

/// Turns code into text: bytes, address and (x86) bits to a line and the instruction's length.
pub type Disassemble<'a> = &'a dyn Fn(&[u8], u64, u8) -> (String, usize);
/// Names an address.
pub type Name<'a> = &'a dyn Fn(u64) -> Option<String>;

/// A record in a line; a stretch of code, if `disassemble` is given, in a line per instruction.
pub fn line(record: &Record<'_>, disassemble: Option<Disassemble<'_>>, name: Name<'_>) -> String {
    let Record { vcpu, pc, insns, .. } = *record;
    let place = name(pc).map_or(String::new(), |n| format!(" <{n}>"));
    let head = format!("{insns:>12} {vcpu} {pc:016x}{place}");
    match record.event {
        Event::Code(code) => {
            let mut text = format!("{head} block of {} instructions", code.lengths.len());
            let (mut at, mut rest) = (pc, &code.bytes[..]);
            for &len in disassemble.iter().flat_map(|_| &code.lengths) {
                let (bytes, after) = rest.split_at_checked(len.into()).unwrap_or((rest, &[]));
                let shown = disassemble.map_or(String::new(), |d| d(bytes, at, code.bits).0);
                let _ = write!(text, "\n                {at:016x}  {shown}");
                at += u64::from(len);
                rest = after;
            }
            text
        }
        Event::Access { writes, reads, address, bytes, value } => {
            let kind = match (reads, writes) {
                (true, true) => "update",
                (_, true) => "store ",
                _ => "load  ",
            };
            let value = value.map_or("?".to_owned(), |v| format!("{v:#x}"));
            format!("{head} {kind} {bytes} at {address:016x} = {value}")
        }
        Event::Bulk { writes, address, bytes } => {
            format!("{head} {} {bytes} bytes at {address:016x}", if writes { "store " } else { "load  " })
        }
        Event::Exception { cause, value, time } => {
            let kind = if cause >> 63 != 0 { "interrupt" } else { "exception" };
            format!("{head} {kind} {} value {value:#x} at {time} ns", cause & !(1 << 63))
        }
        Event::Device { port, writes, address, bytes, value } => {
            let (what, kind) = (if port { "port" } else { "device" }, if writes { "write" } else { "read " });
            format!("{head} {what} {kind} {bytes} at {address:#x} = {value:#x}")
        }
        Event::Step { bytes } => {
            let shown = disassemble.filter(|_| !bytes.is_empty()).map_or(String::new(), |d| d(bytes, pc, 64).0);
            format!("{head} step  {shown}")
        }
        Event::Space { root, mode } => format!("{head} address space {root:#x} privilege {mode}"),
    }
}

/// How much of what there is.
#[derive(Clone, Debug, Default)]
pub struct Counts {
    pub blocks: u64,
    pub insns: u64,
    pub loads: u64,
    pub stores: u64,
    pub exceptions: BTreeMap<(bool, u64), u64>,
    pub devices: u64,
    pub steps: u64,
    /// Times executed and instructions of each stretch, by address.
    hot: HashMap<u64, (u64, u64)>,
}

impl Counts {
    pub fn add(&mut self, record: &Record<'_>) {
        match record.event {
            Event::Code(code) => {
                self.blocks += 1;
                let insns = code.lengths.len() as u64;
                self.insns += insns;
                let hot = self.hot.entry(record.pc).or_default();
                *hot = (hot.0 + 1, insns);
            }
            Event::Access { writes, reads, .. } => {
                self.loads += u64::from(reads);
                self.stores += u64::from(writes);
            }
            Event::Bulk { writes, .. } => *(if writes { &mut self.stores } else { &mut self.loads }) += 1,
            Event::Exception { cause, .. } => {
                *self.exceptions.entry((cause >> 63 != 0, cause & !(1 << 63))).or_default() += 1;
            }
            Event::Device { .. } => self.devices += 1,
            Event::Step { .. } => {
                self.steps += 1;
                self.insns += 1;
            }
            Event::Space { .. } => {}
        }
    }

    /// A table, with the `top` stretches that took the most instructions.
    pub fn text(&self, top: usize, name: Name<'_>) -> String {
        let mut out = format!(
            "{:>14} instructions in {} blocks and {} single steps\n{:>14} loads, {} stores, {} device accesses\n",
            self.insns, self.blocks, self.steps, self.loads, self.stores, self.devices
        );
        for ((interrupt, cause), n) in &self.exceptions {
            let _ = writeln!(out, "{n:>14} {} {cause}", if *interrupt { "interrupt" } else { "exception" });
        }
        let mut hot: Vec<_> = self.hot.iter().map(|(pc, (times, insns))| (times * insns, *pc, *times)).collect();
        hot.sort_unstable_by(|a, b| b.cmp(a));
        for (insns, pc, times) in hot.into_iter().take(top) {
            let place = name(pc).map_or(String::new(), |n| format!(" <{n}>"));
            let share = 100.0 * insns as f64 / self.insns.max(1) as f64;
            let _ = writeln!(out, "{insns:>14} {share:5.1} % {pc:016x}{place}, {times} times");
        }
        out
    }
}

/// The code that was executed.
#[derive(Clone, Debug, Default)]
pub struct Coverage {
    /// Stretches by address: bytes and times.
    stretches: BTreeMap<u64, (u16, u64)>,
    /// Instructions by address: times.
    insns: BTreeMap<u64, u64>,
}

impl Coverage {
    pub fn add(&mut self, record: &Record<'_>) {
        let (bytes, lengths) = match record.event {
            Event::Code(code) => (code.bytes.len() as u16, &code.lengths[..]),
            Event::Step { bytes } => (bytes.len() as u16, &[1][..]),
            _ => return,
        };
        let entry = self.stretches.entry(record.pc).or_default();
        *entry = (entry.0.max(bytes), entry.1 + 1);
        let mut at = record.pc;
        for &len in lengths {
            *self.insns.entry(at).or_default() += 1;
            at += u64::from(len);
        }
    }

    /// DynamoRIO's drcov, version 2: the form that IDA's Lighthouse and Ghidra read. One module spans all code.
    pub fn drcov(&self, module: &str) -> Vec<u8> {
        let base = self.stretches.keys().next().copied().unwrap_or(0) & !0xfff;
        let end = self.stretches.iter().next_back().map_or(base, |(at, (bytes, _))| at + u64::from(*bytes));
        // A table entry has 32 bits for the offset.
        let near: Vec<_> = self.stretches.iter().filter(|(at, _)| **at - base <= u32::MAX.into()).collect();
        let mut out = format!(
            "DRCOV VERSION: 2\nDRCOV FLAVOR: mimus\nModule Table: version 2, count 1\n\
             Columns: id, base, end, entry, path\n 0, {base:#018x}, {end:#018x}, {:#018x}, {module}\n\
             BB Table: {} bbs\n",
            0,
            near.len()
        )
        .into_bytes();
        for (at, (bytes, _)) in near {
            out.extend(((at - base) as u32).to_le_bytes());
            out.extend(bytes.to_le_bytes());
            out.extend(0u16.to_le_bytes());
        }
        out
    }

    /// An lcov trace file; `line` finds the source line of an address.
    pub fn lcov(&self, line: &dyn Fn(u64) -> Option<(String, u32)>) -> String {
        let mut files: BTreeMap<String, BTreeMap<u32, u64>> = BTreeMap::new();
        for (at, times) in &self.insns {
            if let Some((file, line)) = line(*at) {
                let count = files.entry(file).or_default().entry(line).or_default();
                *count = (*count).max(*times);
            }
        }
        let mut out = String::new();
        for (file, lines) in files {
            let _ = writeln!(out, "TN:\nSF:{file}");
            for (line, times) in &lines {
                let _ = writeln!(out, "DA:{line},{times}");
            }
            let _ = writeln!(out, "LF:{0}\nLH:{0}\nend_of_record", lines.len());
        }
        out
    }

    /// Instructions and stretches.
    pub fn size(&self) -> (usize, usize) {
        (self.insns.len(), self.stretches.len())
    }
}

/// What an instruction at the end of a stretch does to the stack of calls.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Transfer {
    Call,
    Return,
    Other,
}

/// What the last instruction of code does. `bits` as in [`super::file::Code`]: 0 is RISC-V.
pub fn transfer(bytes: &[u8], lengths: &[u8], bits: u8) -> Transfer {
    let last = lengths.last().copied().unwrap_or(0).into();
    let insn = &bytes[bytes.len().saturating_sub(last)..];
    if bits == 0 { riscv_transfer(insn) } else { x86_transfer(insn, bits) }
}

/// Unprivileged specification, table 2.1 (return-address stack hints): link registers are x1 and x5.
fn riscv_transfer(insn: &[u8]) -> Transfer {
    let link = |r: u32| r == 1 || r == 5;
    match *insn {
        [a, b] => {
            let word = u32::from(u16::from_le_bytes([a, b]));
            let (rs1, rest) = (word >> 7 & 31, word & 0xf07f);
            match rest {
                0x9002 if rs1 != 0 => Transfer::Call,
                0x8002 if link(rs1) => Transfer::Return,
                _ => Transfer::Other,
            }
        }
        [a, b, c, d] => {
            let word = u32::from_le_bytes([a, b, c, d]);
            let (rd, rs1) = (word >> 7 & 31, word >> 15 & 31);
            match word & 0x7f {
                0x6f if link(rd) => Transfer::Call,
                0x67 if link(rd) => Transfer::Call,
                0x67 if link(rs1) => Transfer::Return,
                _ => Transfer::Other,
            }
        }
        _ => Transfer::Other,
    }
}

fn x86_transfer(insn: &[u8], bits: u8) -> Transfer {
    use iced_x86::{Decoder, DecoderOptions, FlowControl};
    let decoded = Decoder::new(bits.into(), insn, DecoderOptions::NONE).decode();
    match decoded.flow_control() {
        FlowControl::Call | FlowControl::IndirectCall => Transfer::Call,
        FlowControl::Return => Transfer::Return,
        _ => Transfer::Other,
    }
}

/// Stacks of calls, and instructions executed in each: `a;b;c 123`, as flame graph tools want them.
#[derive(Default)]
pub struct Flame {
    /// The stack of each vCPU, address space and privilege: the function, and what it calls returns to.
    stacks: HashMap<(u32, u64, u8), Vec<String>>,
    counts: HashMap<String, u64>,
    /// What the stretch before did.
    last: HashMap<u32, Transfer>,
}

/// Deeper stacks are cut off at their roots.
const DEEPEST: usize = 256;

impl Flame {
    /// `name`: the function at an address.
    pub fn add(&mut self, record: &Record<'_>, name: Name<'_>) {
        let Event::Code(code) = record.event else { return };
        let function = || name(record.pc).unwrap_or_else(|| format!("{:#x}", record.pc & !0xfff));
        let stack = self.stacks.entry((record.vcpu, record.space.0, record.space.1)).or_default();
        let function = function();
        match self.last.get(&record.vcpu) {
            Some(Transfer::Call) => stack.push(function),
            Some(Transfer::Return) => {
                // To where the function is that it returns to, if it is on the stack.
                let to = stack.iter().rposition(|f| *f == function);
                stack.truncate(to.map_or(stack.len().saturating_sub(1), |at| at + 1));
                if to.is_none() {
                    stack.push(function);
                }
            }
            // Another function without a call: a tail call, an exception, or the first of all.
            _ if stack.last() != Some(&function) => {
                stack.pop();
                stack.push(function);
            }
            _ => {}
        }
        if stack.len() > DEEPEST {
            stack.drain(..stack.len() - DEEPEST);
        }
        let insns = code.lengths.len() as u64;
        *self.counts.entry(stack.join(";")).or_default() += insns;
        self.last.insert(record.vcpu, transfer(&code.bytes, &code.lengths, code.bits));
    }

    /// The lines.
    pub fn text(&self) -> String {
        let mut lines: Vec<_> = self.counts.iter().map(|(stack, n)| format!("{stack} {n}\n")).collect();
        lines.sort_unstable();
        lines.concat()
    }
}

/// The last write that touches an address, before a position.
#[derive(Clone, Debug, Default)]
pub struct LastWrite {
    pub address: u64,
    /// Instructions; writes at or behind that many do not count.
    pub before: Option<u64>,
    /// The write found, as a line.
    found: Option<(u64, String)>,
    pub writes: u64,
}

impl LastWrite {
    pub fn new(address: u64, before: Option<u64>) -> LastWrite {
        LastWrite { address, before, found: None, writes: 0 }
    }

    pub fn add(&mut self, record: &Record<'_>, name: Name<'_>) {
        let (address, bytes) = match record.event {
            Event::Access { writes: true, address, bytes, .. } => (address, bytes.into()),
            Event::Bulk { writes: true, address, bytes } => (address, bytes),
            _ => return,
        };
        if self.address.wrapping_sub(address) < bytes && self.before.is_none_or(|t| record.insns < t) {
            self.writes += 1;
            self.found = Some((record.insns, line(record, None, name)));
        }
    }

    /// The answer.
    pub fn text(&self) -> String {
        match &self.found {
            Some((_, line)) => format!("{line}\n({} writes in all)\n", self.writes),
            None => format!("nothing in the trace writes to {:#x}\n", self.address),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::trace::file::Code;

    fn record<'a>(pc: u64, insns: u64, event: Event<'a>) -> Record<'a> {
        Record { vcpu: 0, pc, insns, time: 0, space: (0, 0), event }
    }

    #[test]
    fn calls_and_returns() {
        assert_eq!(riscv_transfer(&0x8082u16.to_le_bytes()), Transfer::Return, "ret");
        assert_eq!(riscv_transfer(&0x9782u16.to_le_bytes()), Transfer::Call, "jalr a5");
        assert_eq!(riscv_transfer(&0x0000_00efu32.to_le_bytes()), Transfer::Call, "jal ra");
        assert_eq!(riscv_transfer(&0x0000_006fu32.to_le_bytes()), Transfer::Other, "j");
        assert_eq!(transfer(&[0x90, 0xc3], &[1, 1], 64), Transfer::Return);
        assert_eq!(transfer(&[0xe8, 0, 0, 0, 0], &[5], 64), Transfer::Call);
    }

    #[test]
    fn flames() {
        let call = Code { bytes: vec![0xef, 0, 0, 0], lengths: vec![4], ..Code::default() };
        let ret = Code { bytes: vec![0x82, 0x80], lengths: vec![2], ..Code::default() };
        let name = |pc: u64| Some(if pc < 0x100 { "main" } else { "f" }.to_owned());
        let mut flame = Flame::default();
        for (pc, code) in [(0, &call), (0x100, &ret), (4, &call), (0x100, &ret), (8, &call)] {
            flame.add(&record(pc, 0, Event::Code(code)), &name);
        }
        assert_eq!(flame.text(), "main 3\nmain;f 2\n");
    }

    #[test]
    fn the_last_write_and_coverage() {
        let write =
            |address, value| Event::Access { writes: true, reads: false, address, bytes: 8, value: Some(value) };
        let none: Name<'_> = &|_| None;
        let mut last = LastWrite::new(0x1004, Some(30));
        for (insns, value) in [(10, 1), (20, 2), (30, 3)] {
            last.add(&record(0x80, insns, write(0x1000, value)), none);
        }
        assert!(last.text().contains("= 0x2") && last.writes == 2, "{}", last.text());
        assert!(LastWrite::new(1, None).text().contains("nothing"));
        let code = Code { offset: 0, bytes: vec![1; 6], lengths: vec![4, 2], ..Code::default() };
        let mut coverage = Coverage::default();
        coverage.add(&record(0x1010, 0, Event::Code(&code)));
        coverage.add(&record(0x1010, 2, Event::Code(&code)));
        let drcov = coverage.drcov("kernel");
        let text = String::from_utf8_lossy(&drcov);
        assert!(text.contains("BB Table: 1 bbs\n"), "{text}");
        assert_eq!(drcov[drcov.len() - 8..], [0x10, 0, 0, 0, 6, 0, 0, 0]);
        let lcov = coverage.lcov(&|at| Some(("a.c".to_owned(), (at & 0xf) as u32)));
        assert_eq!(lcov, "TN:\nSF:a.c\nDA:0,2\nDA:4,2\nLF:2\nLH:2\nend_of_record\n");
    }
}
