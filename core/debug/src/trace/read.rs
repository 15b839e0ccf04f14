//! Reading: from a file to what happened.

use std::collections::HashMap;
use std::fs::File;
use std::io::{BufReader, Read};
use std::ops::ControlFlow;
use std::path::Path;

use mimus_core::accel::trace::words;

use super::encode::Decoder;
use super::file::{Code, Header, Section, TraceError, read_header};
use super::filter::Filter;

/// Longest stretch of a vCPU's words that is believed.
const MAX_WORDS: u64 = 16 << 20;

/// Something that happened on a vCPU.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event<'a> {
    /// A stretch of code begins.
    Code(&'a Code),
    /// A load or store.
    Access { writes: bool, reads: bool, address: u64, bytes: u8, value: Option<u64> },
    /// A stretch of memory as a whole.
    Bulk { writes: bool, address: u64, bytes: u64 },
    /// An exception or interrupt.
    Exception { cause: u64, value: u64, time: u64 },
    /// A device's register, or a port.
    Device { port: bool, writes: bool, address: u64, bytes: u8, value: u64 },
    /// One instruction executed by itself.
    Step { bytes: &'a [u8] },
    /// Another address space or privilege.
    Space { root: u64, mode: u8 },
}

/// An event, and where it happened.
#[derive(Clone, Copy, Debug)]
pub struct Record<'a> {
    pub vcpu: u32,
    /// Virtual address of the code or the instruction.
    pub pc: u64,
    /// Instructions that the vCPU had executed before, of those that are in the trace.
    pub insns: u64,
    /// Time in ns at the end of the stretch it is in.
    pub time: u64,
    pub space: (u64, u8),
    pub event: Event<'a>,
}

/// A vCPU while its words are read.
#[derive(Default)]
struct Vcpu {
    decoder: Decoder,
    page: u64,
    insns: u64,
    space: (u64, u8),
    /// The stretch being executed: where, its number, instructions before it.
    current: Option<(u64, u32, u64)>,
}

/// A trace being read.
pub struct Reader<R> {
    input: R,
    /// What it begins with.
    pub header: Header,
    codes: HashMap<u32, Code>,
    vcpus: HashMap<u32, Vcpu>,
    count: u64,
    /// Its end has been read.
    pub complete: bool,
}

impl Reader<BufReader<File>> {
    /// Opens a file.
    pub fn open(path: &Path) -> Result<Self, TraceError> {
        Reader::new(BufReader::with_capacity(1 << 20, File::open(path)?))
    }
}

impl<R: Read> Reader<R> {
    /// Reads the header.
    pub fn new(mut input: R) -> Result<Self, TraceError> {
        let header = read_header(&mut input)?;
        Ok(Self { input, header, codes: HashMap::new(), vcpus: HashMap::new(), count: 0, complete: false })
    }

    /// Calls `f` with each record that `filter` keeps, until it breaks. A trace whose end is missing, as that of a program
    /// that was killed, is good up to there; then `complete` stays false.
    pub fn each(
        &mut self,
        filter: &Filter,
        mut f: impl FnMut(&Record<'_>) -> ControlFlow<()>,
    ) -> Result<(), TraceError> {
        loop {
            let section = match Section::read(&mut self.input) {
                Ok(Some(section)) => section,
                Ok(None) | Err(TraceError::BreaksOff) => return Ok(()),
                Err(other) => return Err(other),
            };
            match section {
                Section::Code(code) => _ = self.codes.insert(code.id, code),
                Section::End { count } => {
                    if count != self.count {
                        return Err(TraceError::Damaged("records are missing"));
                    }
                    self.complete = true;
                }
                Section::Chunk { vcpu, now, count, words, args } => {
                    if count > MAX_WORDS {
                        return Err(TraceError::Damaged("a stretch is too long"));
                    }
                    let state = self.vcpus.entry(vcpu).or_default();
                    let words = state.decoder.decode(&words, &args, count as usize);
                    let words = words.filter(|w| w.len() as u64 == count);
                    let words = words.ok_or(TraceError::Damaged("a stretch cannot be decoded"))?;
                    self.count += count;
                    let mut chunk = Chunk { vcpu, now, state, codes: &self.codes, filter };
                    if chunk.run(&words, &mut f).is_break() {
                        return Ok(());
                    }
                }
            }
        }
    }
}

struct Chunk<'a> {
    vcpu: u32,
    now: u64,
    state: &'a mut Vcpu,
    codes: &'a HashMap<u32, Code>,
    filter: &'a Filter,
}

fn pair(args: &[u32], i: usize) -> u64 {
    match args.get(i..i + 2) {
        Some(&[low, high]) => u64::from(low) | u64::from(high) << 32,
        _ => 0,
    }
}

impl Chunk<'_> {
    fn run(&mut self, words: &[u32], f: &mut impl FnMut(&Record<'_>) -> ControlFlow<()>) -> ControlFlow<()> {
        let mut rest = words;
        while let Some((&word, after)) = rest.split_first() {
            let (args, after) = after.split_at(words::payload(word).min(after.len()));
            rest = after;
            self.record(word, args, f)?;
        }
        ControlFlow::Continue(())
    }

    fn record(
        &mut self,
        word: u32,
        args: &[u32],
        f: &mut impl FnMut(&Record<'_>) -> ControlFlow<()>,
    ) -> ControlFlow<()> {
        let codes = self.codes;
        let kind = args.first().copied().unwrap_or(0);
        let size = |head: u32| 1u8 << (head >> words::SIZE_SHIFT & 7).min(5);
        let at = |state: &Vcpu, head: u32| state.page | u64::from(head >> words::PC_SHIFT & 0xfff);
        let (mut bytes, mut len) = ([0; 16], 0);
        let (pc, event) = match word {
            _ if word < words::FIRST_TAG => {
                let Some(code) = codes.get(&word) else { return ControlFlow::Continue(()) };
                let pc = self.state.page | u64::from(code.offset);
                let before = self.state.insns;
                self.state.insns += code.lengths.len() as u64;
                self.state.current = Some((pc, word, before));
                return self.tell(pc, before, Event::Code(code), f);
            }
            _ if word & words::ACCESS != 0 => {
                let update = word & words::UPDATE != 0;
                let value = (word & words::VALUE != 0).then(|| pair(args, 2));
                let event = Event::Access {
                    writes: update || word & words::WRITE != 0,
                    reads: update || word & words::WRITE == 0,
                    address: pair(args, 0),
                    bytes: size(word),
                    value,
                };
                (at(self.state, word), event)
            }
            words::PAGE => {
                self.state.page = pair(args, 0);
                return ControlFlow::Continue(());
            }
            words::SPACE => {
                self.state.space = (pair(args, 0), args.get(2).copied().unwrap_or(0) as u8);
                let (root, mode) = self.state.space;
                (self.state.page, Event::Space { root, mode })
            }
            words::EXCEPTION => {
                let (cause, pc) = (pair(args, 0), pair(args, 2));
                if cause >> 63 == 0 {
                    self.cut(pc);
                }
                (pc, Event::Exception { cause, value: pair(args, 4), time: pair(args, 6) })
            }
            words::DEVICE | words::PORT => {
                let event = Event::Device {
                    port: word == words::PORT,
                    writes: kind & words::WRITE != 0,
                    address: pair(args, 1),
                    bytes: size(kind),
                    value: pair(args, 3),
                };
                (at(self.state, kind), event)
            }
            words::BULK => {
                let event =
                    Event::Bulk { writes: kind & words::WRITE != 0, address: pair(args, 1), bytes: pair(args, 3) };
                (at(self.state, kind), event)
            }
            words::STEP => {
                let pc = pair(args, 0);
                self.state.page = pc & !4095;
                for (four, word) in bytes.as_chunks_mut::<4>().0.iter_mut().zip(args.iter().skip(3)) {
                    *four = word.to_le_bytes();
                }
                len = args.get(2).map_or(0, |n| *n as usize).min(16);
                self.cut(pc);
                self.state.insns += 1;
                self.state.current = None;
                (pc, Event::Step { bytes: &[] })
            }
            _ => return ControlFlow::Continue(()),
        };
        let event = if let Event::Step { .. } = event { Event::Step { bytes: &bytes[..len] } } else { event };
        let insns = self.position(pc, &event);
        self.tell(pc, insns, event, f)
    }

    /// Instructions before the one at `pc`.
    fn position(&self, pc: u64, event: &Event<'_>) -> u64 {
        match (self.state.current, event) {
            (_, Event::Step { .. }) => self.state.insns - 1,
            (Some((start, id, before)), _) => {
                before + self.codes.get(&id).and_then(|code| index(code, start, pc)).unwrap_or(0)
            }
            _ => self.state.insns,
        }
    }

    /// The stretch being executed ended at the instruction at `pc`, which is not counted yet if it was in it.
    fn cut(&mut self, pc: u64) {
        if let Some((start, id, before)) = self.state.current
            && let Some(done) = self.codes.get(&id).and_then(|code| index(code, start, pc))
        {
            self.state.insns = before + done;
        }
    }

    fn tell(
        &self,
        pc: u64,
        insns: u64,
        event: Event<'_>,
        f: &mut impl FnMut(&Record<'_>) -> ControlFlow<()>,
    ) -> ControlFlow<()> {
        let filter = self.filter;
        let (root, mode) = self.state.space;
        let data = match event {
            Event::Access { address, .. } | Event::Bulk { address, .. } | Event::Device { address, .. } => {
                filter.data(address)
            }
            _ => true,
        };
        if !(data && filter.vcpu(self.vcpu) && filter.space(root, mode) && filter.code(pc)) {
            return ControlFlow::Continue(());
        }
        f(&Record { vcpu: self.vcpu, pc, insns, time: self.now, space: self.state.space, event })
    }
}

/// The number in a stretch that begins at `start` of the instruction at `pc`.
fn index(code: &Code, start: u64, pc: u64) -> Option<u64> {
    let mut at = start;
    for (n, len) in (0..).zip(&code.lengths) {
        if at == pc {
            return Some(n);
        }
        at += u64::from(*len);
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::trace::TraceWriter;
    use mimus_core::accel::{TraceKinds, TraceSink, TracedCode, VcpuIndex};

    /// What a vCPU hands over comes back, with pcs, positions and times.
    #[test]
    fn written_and_read() {
        let dir = std::env::temp_dir().join(format!("mimus-trace-{}", std::process::id()));
        let path = dir.with_extension("trc");
        let header = Header::new("riscv64", TraceKinds::default(), String::new());
        let writer = TraceWriter::create(&path, &header, Filter::default()).unwrap();
        let code = TracedCode { id: 0, offset: 0x10, bytes: &[1, 2, 3, 4, 5, 6], lengths: &[4, 2], bits: 0 };
        writer.define(code);
        let access = words::ACCESS | words::WRITE | words::VALUE | 2 << words::SIZE_SHIFT | 0x14 << words::PC_SHIFT;
        let input = [
            [words::SPACE, 9, 0, 1].as_slice(),
            &[words::PAGE, 0x8000_1000, 0, 0, access, 0x500, 0, 77, 0],
            &[0, words::EXCEPTION, 13, 0, 0x8000_1014, 0, 0x44, 0, 5, 0],
            &[words::STEP, 0x8000_2000, 0, 2, 0x1234, 0, 0, 0],
        ];
        let input = input.concat();
        writer.take(VcpuIndex(3), input.clone(), input.len(), 1000);
        assert_eq!(writer.finish().unwrap().words, input.len() as u64);
        let mut reader = Reader::open(&path).unwrap();
        let mut seen = Vec::new();
        let tell = |r: &Record<'_>| {
            seen.push(format!("{} {:#x} {} {:?}", r.vcpu, r.pc, r.insns, r.event));
            ControlFlow::Continue(())
        };
        reader.each(&Filter::default(), tell).unwrap();
        assert!(reader.complete);
        assert_eq!(seen.len(), 6, "{seen:#?}");
        assert!(seen[1].starts_with("3 0x80001010 0 Code"), "{}", seen[1]);
        assert!(
            seen[2].starts_with("3 0x80001014 1 Access { writes: true, reads: false, address: 1280"),
            "{}",
            seen[2]
        );
        assert!(seen[3].starts_with("3 0x80001010 2 Code"));
        assert!(seen[4].starts_with("3 0x80001014 3 Exception"));
        assert!(seen[5].starts_with("3 0x80002000 3 Step { bytes: [52, 18] }"), "{}", seen[5]);
        let whole = std::fs::read(&path).unwrap();
        std::fs::remove_file(&path).unwrap();
        for cut in 0..whole.len() {
            if let Ok(mut reader) = Reader::new(&whole[..cut]) {
                let read = reader.each(&Filter::default(), |_| ControlFlow::Continue(()));
                assert!(read.is_ok() && !reader.complete, "{cut}: {read:?}");
            }
        }
    }
}
