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

/// A file that is mapped into the guest's memory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Image {
    pub path: String,
    pub base: u64,
    pub end: u64,
}

/// Calls what it is given with each source line that has code: file, line, address.
pub type AllLines<'a> = &'a dyn Fn(&mut dyn FnMut(&str, u32, u64));

/// Bytes between two stretches of code that are not of one image.
const APART: u64 = 64 << 20;

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

    /// DynamoRIO's drcov, version 2: the form that IDA's Lighthouse and Ghidra read. An image is a module, whose base is
    /// the image's, as those programs load it; code that is in none is in modules of its own, by place.
    pub fn drcov(&self, images: &[Image]) -> Vec<u8> {
        let mut modules: Vec<Image> = images.to_vec();
        let mut table = Vec::new();
        for (&at, &(bytes, _)) in &self.stretches {
            let end = at.saturating_add(bytes.into());
            let known = images.iter().position(|m| (m.base..m.end).contains(&at) && at - m.base <= u32::MAX.into());
            let near = || {
                let last = modules.len().checked_sub(1).filter(|i| *i >= images.len())?;
                let m = &modules[last];
                // A table's entry has 32 bits for the offset.
                (at - m.end.min(at) <= APART && at - m.base <= u32::MAX.into()).then_some(last)
            };
            let module = known.or_else(near).unwrap_or_else(|| {
                let base = at & !0xfff;
                modules.push(Image { path: format!("guest-{base:#x}"), base, end: base });
                modules.len() - 1
            });
            // And 16 for the module.
            let Ok(id) = u16::try_from(module) else { break };
            modules[module].end = modules[module].end.max(end);
            table.extend(((at - modules[module].base) as u32).to_le_bytes());
            table.extend(bytes.to_le_bytes());
            table.extend(id.to_le_bytes());
        }
        modules.truncate(1 << 16);
        let mut out = format!(
            "DRCOV VERSION: 2\nDRCOV FLAVOR: mimus\nModule Table: version 2, count {}\n\
             Columns: id, base, end, entry, path\n",
            modules.len()
        );
        for (id, Image { path, base, end }) in modules.iter().enumerate() {
            let _ = writeln!(out, "{id:>3}, {base:#018x}, {end:#018x}, {:#018x}, {path}", 0);
        }
        let _ = writeln!(out, "BB Table: {} bbs", table.len() / 8);
        let mut out = out.into_bytes();
        out.extend(table);
        out
    }

    /// An lcov trace file of all source lines that have code, those that were not executed with 0. `line` finds the source
    /// line of an address, `all` is given file, line and an address of each.
    pub fn lcov(&self, line: &dyn Fn(u64) -> Option<(String, u32)>, all: AllLines<'_>) -> String {
        let mut files: BTreeMap<String, BTreeMap<u32, u64>> = BTreeMap::new();
        all(&mut |file: &str, line, _| {
            // Line 0 is of no source.
            if line != 0 {
                match files.get_mut(file) {
                    Some(lines) => _ = lines.entry(line).or_default(),
                    None => _ = files.entry(file.to_owned()).or_default().entry(line).or_default(),
                }
            }
        });
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
            let hit = lines.values().filter(|times| **times != 0).count();
            let _ = writeln!(out, "LF:{}\nLH:{hit}\nend_of_record", lines.len());
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
///
/// Stacks are paths of a tree: a boot has a thousand million instructions, and few places in the tree.
pub struct Flame {
    names: Vec<String>,
    /// A name's number, and that of the function an address is in.
    numbers: HashMap<String, u32>,
    functions: HashMap<u64, u32>,
    /// The first is the root.
    nodes: Vec<Node>,
    children: HashMap<(u32, u32), u32>,
    /// Where each vCPU, address space and privilege is.
    places: HashMap<(u32, u64, u8), u32>,
    /// What the stretch before did.
    last: HashMap<u32, Transfer>,
}

#[derive(Clone, Copy)]
struct Node {
    parent: u32,
    name: u32,
    depth: u32,
    insns: u64,
}

/// Deeper calls are counted here.
const DEEPEST: u32 = 256;
/// Most places in the tree; what comes then is counted to its caller.
const MOST_NODES: usize = 1 << 21;
/// Most functions of addresses remembered.
const MOST_FUNCTIONS: usize = 1 << 20;

impl Default for Flame {
    fn default() -> Flame {
        Flame {
            names: Vec::new(),
            numbers: HashMap::new(),
            functions: HashMap::new(),
            nodes: vec![Node { parent: 0, name: u32::MAX, depth: 0, insns: 0 }],
            children: HashMap::new(),
            places: HashMap::new(),
            last: HashMap::new(),
        }
    }
}

impl Flame {
    /// `name`: the function at an address.
    pub fn add(&mut self, record: &Record<'_>, name: Name<'_>) {
        let Event::Code(code) = record.event else { return };
        let function = self.function(record.pc, name);
        let space = (record.vcpu, record.space.0, record.space.1);
        let at = self.places.get(&space).copied().unwrap_or(0);
        let top = self.nodes[at as usize];
        let at = match self.last.get(&record.vcpu) {
            Some(Transfer::Call) => self.child(at, function),
            // To where the function is that it returns to; if it is not on the stack, it is another task's.
            Some(Transfer::Return) => self.caller(at, function).unwrap_or_else(|| self.child(0, function)),
            // Another function without a call: a tail call, an exception, or the first of all.
            _ if top.name != function => self.child(top.parent, function),
            _ => at,
        };
        self.places.insert(space, at);
        self.nodes[at as usize].insns += code.lengths.len() as u64;
        self.last.insert(record.vcpu, transfer(&code.bytes, &code.lengths, code.bits));
    }

    fn function(&mut self, pc: u64, name: Name<'_>) -> u32 {
        if let Some(number) = self.functions.get(&pc) {
            return *number;
        }
        let text = name(pc).unwrap_or_else(|| format!("{:#x}", pc & !0xfff));
        let next = self.names.len() as u32;
        let number = *self.numbers.entry(text).or_insert_with_key(|text| {
            self.names.push(text.clone());
            next
        });
        if self.functions.len() >= MOST_FUNCTIONS {
            self.functions.clear();
        }
        self.functions.insert(pc, number);
        number
    }

    fn child(&mut self, parent: u32, name: u32) -> u32 {
        if let Some(found) = self.children.get(&(parent, name)) {
            return *found;
        }
        let depth = self.nodes[parent as usize].depth + 1;
        if depth > DEEPEST || self.nodes.len() >= MOST_NODES {
            return parent;
        }
        self.nodes.push(Node { parent, name, depth, insns: 0 });
        let made = self.nodes.len() as u32 - 1;
        self.children.insert((parent, name), made);
        made
    }

    /// The nearest place below in which `name` is.
    fn caller(&self, from: u32, name: u32) -> Option<u32> {
        let mut at = from;
        while at != 0 {
            if self.nodes[at as usize].name == name {
                return Some(at);
            }
            at = self.nodes[at as usize].parent;
        }
        None
    }

    /// The lines.
    pub fn text(&self) -> String {
        let counted = self.nodes.iter().filter(|n| n.insns != 0);
        let mut lines: Vec<String> = counted.map(|n| format!("{} {}\n", self.path(n), n.insns)).collect();
        lines.sort_unstable();
        lines.concat()
    }

    fn path(&self, node: &Node) -> String {
        let mut names = Vec::new();
        let mut at = *node;
        while at.name != u32::MAX {
            names.push(self.names[at.name as usize].as_str());
            at = self.nodes[at.parent as usize];
        }
        if names.is_empty() {
            // More places than there is room for.
            return "(others)".to_owned();
        }
        names.reverse();
        names.join(";")
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
        let far = Code { offset: 0, bytes: vec![1; 4], lengths: vec![4], ..Code::default() };
        for pc in [0x1018, 0xffff_ffff_8000_0040, 0xffff_ffff_8000_2000] {
            coverage.add(&record(pc, 4, Event::Code(&far)));
        }
        let image = Image { path: "kernel".to_owned(), base: 0x1000, end: 0x2000 };
        let drcov = coverage.drcov(&[image]);
        let table = drcov.len() - 4 * 8;
        let head = "DRCOV VERSION: 2\nDRCOV FLAVOR: mimus\nModule Table: version 2, count 2\n\
                    Columns: id, base, end, entry, path\n  \
                    0, 0x0000000000001000, 0x0000000000002000, 0x0000000000000000, kernel\n  \
                    1, 0xffffffff80000000, 0xffffffff80002004, 0x0000000000000000, guest-0xffffffff80000000\n\
                    BB Table: 4 bbs\n";
        assert_eq!(String::from_utf8_lossy(&drcov[..table]), head);
        let entries: Vec<(u32, u16, u16)> = drcov[table..]
            .chunks(8)
            .map(|e| {
                let half = |i: usize| u16::from_le_bytes([e[i], e[i + 1]]);
                (u32::from(half(0)) | u32::from(half(2)) << 16, half(4), half(6))
            })
            .collect();
        assert_eq!(entries, [(0x10, 6, 0), (0x18, 4, 0), (0x40, 4, 1), (0x2000, 4, 1)]);
        let line = |at: u64| Some(("a.c".to_owned(), (at & 0x1f) as u32));
        let all: AllLines<'_> = &|each| [("a.c", 16), ("a.c", 30), ("b.c", 7)].iter().for_each(|(f, l)| each(f, *l, 0));
        assert_eq!(
            coverage.lcov(&line, all),
            "TN:\nSF:a.c\nDA:0,1\nDA:16,2\nDA:20,2\nDA:24,1\nDA:30,0\nLF:5\nLH:4\nend_of_record\n\
             TN:\nSF:b.c\nDA:7,0\nLF:1\nLH:0\nend_of_record\n"
        );
    }

    #[test]
    fn flames_are_bounded() {
        let call = Code { bytes: vec![0xef, 0, 0, 0], lengths: vec![4], ..Code::default() };
        let name = |pc: u64| Some(format!("f{pc}"));
        let mut flame = Flame::default();
        for pc in 0..5000 {
            flame.add(&record(pc, 0, Event::Code(&call)), &name);
        }
        let text = flame.text();
        let deepest = text.lines().map(|l| l.matches(';').count()).max();
        assert_eq!((deepest, text.lines().count()), (Some(255), 256));
        let total: u64 = text.lines().filter_map(|l| l.rsplit(' ').next()?.parse::<u64>().ok()).sum();
        assert_eq!(total, 5000, "nothing is lost");
    }
}
