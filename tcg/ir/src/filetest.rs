//! Test cases for whatever executes blocks: a block, the state before it and the state expected after.
//!
//! The interpreter runs them on a [`TestHost`]; a backend's tests set up their own vCPU from the same [`Case`],
//! run its code, and hand [`Case::check`] a [`Final`]. A file holds any number of cases:
//!
//! ```text
//! case load sign-extends           # what it shows, to the end of the line
//! page 0x80000000                  # virtual address of the block's page (this one if left out)
//! s6 = 0x1000                      # slots before; 0 if not named
//! env[0x4] = 0x1                   # bytes of the guest's hot state before; 0 if not named
//! mem.b4 0x1000 = 0x80000000, 1    # memory before, little-endian, elements of 1, 2, 4 or 8 bytes
//! block start=0x10 len=4 insns=1 {
//!   insn +0x10 4
//!   s5 = load.b4.sign [s6]
//!   jump +0x14
//! }
//! expect next 0x80000014
//! expect s5 = 0xffffffff80000000
//! ```
//!
//! Memory is mapped by pages of 4 KiB: those that a `mem` line touches, zero where it says nothing. Everything
//! else faults. Of the outcomes exactly one is expected:
//!
//! * `expect next VA`;
//! * `expect dispatch VA`: with the program counter that a helper set;
//! * `expect fault load VA at +PC`: `load`, `store`, `misaligned_load` or `misaligned_store` of address VA, by the
//!   instruction at PC;
//! * `expect careful VA`.
//!
//! `expect s5 = …`, `expect env[…] = …` and `expect mem.b8 … = …` say what changed: guest slots, hot state and
//! memory not named must be as before (temporaries are nobody's business). `expect fflags N` are RISC-V's
//! floating-point flags, 0 if not named. Helpers are the ones of [`helper`].

mod host;

use std::collections::BTreeMap;

use crate::interp::{Outcome, run};
use crate::op::{Block, FIRST_TEMP, PagePc, Size, Slot};
use crate::text::{Cursor, ParseError, parse_lines, strip_comment};
use crate::verify::verify;

pub use host::{FaultKind, FaultRecord, FpFn, HelperEffect, Memory, PAGE, TestHost, helper};

/// Number of guest slots, which tests compare.
pub const GUEST_SLOTS: usize = FIRST_TEMP as usize;

/// The outcome a case expects.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Ending {
    /// Continue at this virtual address.
    Next(u64),
    /// Continue at this virtual address, which a helper set.
    Dispatch(u64),
    /// The instruction faulted.
    Fault(FaultRecord),
    /// The instruction at this virtual address wants careful mode.
    Careful(u64),
}

/// A test case.
#[derive(Clone, PartialEq, Debug)]
pub struct Case {
    pub name: String,
    /// Number of its first line in the file.
    pub line: usize,
    /// A block that verifies.
    pub block: Block,
    /// Virtual address of the page the block begins in.
    pub page_base: u64,
    /// Slots before, by number.
    pub slots: [u64; GUEST_SLOTS],
    /// Bytes of the hot state before, where not 0.
    pub env: BTreeMap<i32, u8>,
    /// Memory before.
    pub memory: Memory,
    /// What is expected after.
    pub expect: Final,
}

/// The state after a block.
#[derive(Clone, PartialEq, Debug)]
pub struct Final {
    pub ending: Ending,
    pub slots: [u64; GUEST_SLOTS],
    /// Bytes of the hot state; one not present is 0.
    pub env: BTreeMap<i32, u8>,
    pub memory: Memory,
    /// Floating-point flags in RISC-V's encoding. `None`: not known, not compared.
    pub fp_flags: Option<u8>,
}

impl Final {
    /// What of `got` is not as in `self`, in one line per difference; `None` if nothing.
    pub fn difference(&self, got: &Final) -> Option<String> {
        let mut lines = Vec::new();
        if self.ending != got.ending {
            lines.push(format!("expected {:x?}, got {:x?}", self.ending, got.ending));
        }
        for (i, (want, is)) in self.slots.iter().zip(&got.slots).enumerate() {
            if want != is {
                lines.push(format!("s{i}: expected {want:#x}, got {is:#x}"));
            }
        }
        let byte = |env: &BTreeMap<i32, u8>, off| env.get(off).copied().unwrap_or(0);
        for off in self.env.keys().chain(got.env.keys().filter(|off| !self.env.contains_key(off))) {
            let (want, is) = (byte(&self.env, off), byte(&got.env, off));
            if want != is {
                lines.push(format!("env[{off:#x}]: expected {want:#x}, got {is:#x}"));
            }
        }
        lines.extend(self.memory.difference(&got.memory));
        if let (Some(want), Some(is)) = (self.fp_flags, got.fp_flags)
            && want != is
        {
            lines.push(format!("fflags: expected {want:#x}, got {is:#x}"));
        }
        (!lines.is_empty()).then(|| lines.join("\n"))
    }
}

impl Case {
    /// A host in the state before the case.
    pub fn host(&self, fp: FpFn) -> TestHost {
        let mut host = TestHost::new(self.page_base, fp);
        host.slots[..GUEST_SLOTS].copy_from_slice(&self.slots);
        host.env = self.env.clone();
        host.memory = self.memory.clone();
        host
    }

    /// Runs the case through the interpreter.
    ///
    /// # Errors
    /// What is not as expected, a line each.
    pub fn interpret(&self, fp: FpFn) -> Result<(), String> {
        let mut host = self.host(fp);
        let outcome = run(&self.block, &mut host);
        self.check(&host.finish(outcome))
    }

    /// Compares the state after with what is expected.
    ///
    /// # Errors
    /// What is not as expected, a line each.
    pub fn check(&self, got: &Final) -> Result<(), String> {
        match self.expect.difference(got) {
            None => Ok(()),
            Some(lines) => Err(format!("case {} (line {}):\n{lines}", self.name, self.line)),
        }
    }
}

impl TestHost {
    /// The state after a block that ended with `outcome`.
    pub fn finish(&self, outcome: Outcome) -> Final {
        let ending = match outcome {
            Outcome::Next(va) => Ending::Next(va),
            Outcome::Dispatch => Ending::Dispatch(self.pc),
            Outcome::Careful(va) => Ending::Careful(va),
            // The interpreter reports a fault only when the host did.
            Outcome::Faulted => {
                Ending::Fault(self.fault.unwrap_or(FaultRecord { kind: FaultKind::Load, va: u64::MAX, pc: self.insn }))
            }
        };
        let mut slots = [0; GUEST_SLOTS];
        slots.copy_from_slice(&self.slots[..GUEST_SLOTS]);
        Final { ending, slots, env: self.env.clone(), memory: self.memory.clone(), fp_flags: Some(self.fp_flags) }
    }
}

/// Page of the block where a case does not say.
const DEFAULT_PAGE: u64 = 0x8000_0000;

/// Reads a file of cases.
///
/// # Errors
/// The first line that is not in the format, or a block that does not verify.
pub fn parse(text: &str) -> Result<Vec<Case>, ParseError> {
    let mut lines =
        text.lines().enumerate().map(|(i, line)| (i + 1, line)).filter(|(_, l)| !strip_comment(l).is_empty());
    let mut cases = Vec::new();
    let mut next = lines.next();
    while let Some((number, line)) = next {
        let mut cursor = Cursor::new(line, number);
        cursor.expect("case")?;
        let case = CaseParser::new(cursor.remainder().to_string(), number);
        let (case, following) = case.read(&mut lines)?;
        cases.push(case);
        next = following;
    }
    Ok(cases)
}

/// A case being read.
struct CaseParser {
    name: String,
    line: usize,
    page_base: u64,
    state: State,
}

/// The parts of a state that both the header and the footer describe.
#[derive(Clone)]
struct State {
    slots: [u64; GUEST_SLOTS],
    env: BTreeMap<i32, u8>,
    memory: Memory,
}

impl CaseParser {
    fn new(name: String, line: usize) -> Self {
        let state = State { slots: [0; GUEST_SLOTS], env: BTreeMap::new(), memory: Memory::default() };
        CaseParser { name, line, page_base: DEFAULT_PAGE, state }
    }

    /// Reads the lines after `case`; also answers the line that begins the next case.
    #[allow(clippy::type_complexity)]
    fn read<'a>(
        mut self,
        lines: &mut impl Iterator<Item = (usize, &'a str)>,
    ) -> Result<(Case, Option<(usize, &'a str)>), ParseError> {
        let block = loop {
            let Some((number, line)) = lines.next() else {
                return Err(missing(self.line, "a block for the case"));
            };
            let mut cursor = Cursor::new(line, number);
            if Cursor::new(line, number).eat("block") {
                break self.block((number, line), lines)?;
            }
            if cursor.eat("page") {
                let at = cursor.clone();
                self.page_base = cursor.u64()?;
                if !self.page_base.is_multiple_of(PAGE) {
                    return Err(at.error("the address of a page (a multiple of 0x1000)"));
                }
            } else {
                self.state.line(&mut cursor)?;
            }
            cursor.end()?;
        };
        let before = self.state.clone();
        let mut ending = None;
        let mut fp_flags = 0;
        let following = loop {
            let Some((number, line)) = lines.next() else { break None };
            let mut cursor = Cursor::new(line, number);
            if Cursor::new(line, number).eat("case") {
                break Some((number, line));
            }
            cursor.expect("expect")?;
            if let Some(e) = parse_ending(&mut cursor)? {
                if ending.replace(e).is_some() {
                    return Err(missing(number, "one outcome (next, dispatch, fault or careful) for the case"));
                }
            } else if cursor.eat("fflags") {
                fp_flags = cursor.byte()?;
            } else {
                self.state.line(&mut cursor)?;
            }
            cursor.end()?;
        };
        let ending = ending
            .ok_or_else(|| missing(self.line, "an outcome (expect next, dispatch, fault or careful) for the case"))?;
        let State { slots, env, memory } = self.state;
        let case = Case {
            name: self.name,
            line: self.line,
            block,
            page_base: self.page_base,
            slots: before.slots,
            env: before.env,
            memory: before.memory,
            expect: Final { ending, slots, env, memory, fp_flags: Some(fp_flags) },
        };
        Ok((case, following))
    }

    fn block<'a>(
        &self,
        first: (usize, &'a str),
        lines: &mut impl Iterator<Item = (usize, &'a str)>,
    ) -> Result<Block, ParseError> {
        let block = parse_lines(&mut std::iter::once(first).chain(lines))?;
        verify(&block).map_err(|e| ParseError {
            line: first.0,
            expected: "a block that verifies".into(),
            found: e.to_string(),
        })?;
        Ok(block)
    }
}

fn missing(line: usize, expected: &str) -> ParseError {
    ParseError { line, expected: expected.into(), found: "none or more than one".into() }
}

impl State {
    /// Reads `s5 = …`, `env[…] = …` or `mem.b4 … = …`.
    fn line(&mut self, c: &mut Cursor<'_>) -> Result<(), ParseError> {
        if c.eat("env") {
            c.expect("[")?;
            let off = c.ranged(0, i32::MAX.into(), "an offset into the hot state")? as i32;
            c.expect("]")?;
            c.expect("=")?;
            self.env.insert(off, c.byte()?);
            return Ok(());
        }
        for size in [Size::B1, Size::B2, Size::B4, Size::B8] {
            if c.eat(&format!("mem.b{}", size.bytes())) {
                return self.memory_line(c, size);
            }
        }
        let at = c.clone();
        let slot = c.slot().map_err(|_| at.error("a guest slot, env[…], mem.b1…mem.b8 or the block"))?;
        let Some(place) = self.slots.get_mut(usize::from(slot.0)) else {
            return Err(at.error("a guest slot (temporaries have no value outside the block)"));
        };
        c.expect("=")?;
        *place = c.u64()?;
        Ok(())
    }

    fn memory_line(&mut self, c: &mut Cursor<'_>, size: Size) -> Result<(), ParseError> {
        let mut va = c.u64()?;
        c.expect("=")?;
        loop {
            let value = c.u64()?;
            self.memory.map(va, u64::from(size.bytes()));
            self.memory.write(va, value, size);
            va = va.wrapping_add(u64::from(size.bytes()));
            if !c.eat(",") {
                return Ok(());
            }
        }
    }
}

fn parse_ending(c: &mut Cursor<'_>) -> Result<Option<Ending>, ParseError> {
    Ok(Some(if c.eat("next") {
        Ending::Next(c.u64()?)
    } else if c.eat("dispatch") {
        Ending::Dispatch(c.u64()?)
    } else if c.eat("careful") {
        Ending::Careful(c.u64()?)
    } else if c.eat("fault") {
        let at = c.clone();
        let kind = match c.word("a kind of fault")? {
            "load" => FaultKind::Load,
            "store" => FaultKind::Store,
            "misaligned_load" => FaultKind::MisalignedLoad,
            "misaligned_store" => FaultKind::MisalignedStore,
            _ => return Err(at.error("load, store, misaligned_load or misaligned_store")),
        };
        let va = c.u64()?;
        c.expect("at")?;
        Ending::Fault(FaultRecord { kind, va, pc: c.page_pc()? })
    } else {
        return Ok(None);
    }))
}

/// The slot number of a helper's argument: helpers reach guest slots only.
fn guest_slot(arg: u64) -> Slot {
    Slot((arg % GUEST_SLOTS as u64) as u8)
}

/// Where a host has not begun an instruction.
const NO_INSN: PagePc = PagePc(0);
