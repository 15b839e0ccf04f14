//! The calls that led to an instruction, frame by frame, each by the surest method there is: call frame information
//! (DWARF's CFI), the kernel's own ORC tables, frame pointers; across exceptions by the registers that their handlers
//! saved.
//!
//! Specifications: DWARF 5 sections 2.5 and 6.4; RISC-V and x86 psABIs; Documentation/arch/x86/orc-unwinder.rst.

use gimli::{
    BaseAddresses, CfaRule, DebugFrame, EhFrame, Encoding, EndianSlice, EvaluationResult, Format, Register,
    RegisterRule, RunTimeEndian, UnwindContext, UnwindExpression, UnwindSection, Value,
};
use mimus_arch::CpuState;

use crate::look::View;
use crate::orc::{self, Orc};
use crate::registers;
use crate::symbols::Frames;
use crate::target::read_number;
use crate::walk::Scheme;

/// How a frame was found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Method {
    /// It is where the vCPU is.
    Pc,
    /// The register that a call leaves the return address in.
    Link,
    FramePointer,
    /// The function has just been entered: its return address is on top of the stack.
    Entry,
    Cfi,
    Orc,
    /// Registers that a handler saved: this is what was interrupted.
    Exception,
    /// A task that waits: the kernel switched away from it here.
    Switch,
}

impl Method {
    /// For people.
    pub fn name(self) -> &'static str {
        match self {
            Method::Pc => "pc",
            Method::Link => "link register",
            Method::FramePointer => "frame pointer",
            Method::Entry => "top of stack",
            Method::Cfi => "CFI",
            Method::Orc => "ORC",
            Method::Exception => "saved registers",
            Method::Switch => "where it was switched from",
        }
    }
}

/// A function that has not returned.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Frame {
    /// Where it is, or goes on.
    pub pc: u64,
    pub method: Method,
}

/// What is known of a frame's registers, by DWARF's numbers.
#[derive(Clone)]
struct Regs {
    pc: u64,
    r: [Option<u64>; 33],
    /// `pc` is an instruction that was to be executed, not one behind a call.
    exact: bool,
}

/// Numbers of the stack and frame pointer, and of the return address's column.
#[derive(Clone, Copy)]
struct Numbers {
    sp: usize,
    fp: usize,
    link: Option<usize>,
    word: u64,
}

const RISCV: Numbers = Numbers { sp: 2, fp: 8, link: Some(1), word: 8 };
const X86_64: Numbers = Numbers { sp: 7, fp: 6, link: None, word: 8 };
const I386: Numbers = Numbers { sp: 4, fp: 5, link: None, word: 4 };
/// DWARF's number of each register of x86-64 in encoding order.
const X86_64_ORDER: [usize; 16] = [0, 2, 1, 3, 7, 6, 4, 5, 8, 9, 10, 11, 12, 13, 14, 15];

struct Unwinder<'a, 'v> {
    view: &'a View<'v>,
    n: Numbers,
    /// Page tables, if not those that the vCPU uses.
    space: Option<Scheme>,
}

/// Longest expression, in operations.
const LONGEST_EXPRESSION: u32 = 1000;

/// This function and those that called it, at most so many.
pub fn frames(view: &View<'_>, most: usize) -> Vec<Frame> {
    let Some((n, regs)) = start(view.cpu) else {
        return vec![Frame { pc: registers::pc(view.cpu), method: Method::Pc }];
    };
    chain(&Unwinder { view, n, space: None }, regs, Method::Pc, most)
}

/// What a task that does not run was about to go on with, and the calls that led there: from the registers that the kernel
/// kept of it, by DWARF's numbers. `space`: the task's own page tables.
pub fn frames_of_task(
    view: &View<'_>,
    (pc, kept): (u64, &[(usize, u64)]),
    space: Option<Scheme>,
    most: usize,
) -> Vec<Frame> {
    let n = match view.cpu {
        CpuState::Riscv(_) => RISCV,
        CpuState::X86(s) if s.efer & 1 << 10 != 0 => X86_64,
        _ => I386,
    };
    let mut r = [None; 33];
    for (register, value) in kept {
        r[*register] = Some(*value);
    }
    chain(&Unwinder { view, n, space }, Regs { pc, r, exact: false }, Method::Switch, most)
}

fn chain(unwinder: &Unwinder<'_, '_>, mut regs: Regs, method: Method, most: usize) -> Vec<Frame> {
    let n = unwinder.n;
    let mut found = vec![Frame { pc: regs.pc, method }];
    while found.len() < most {
        let Some((next, method)) = unwinder.caller(&regs, found.len() == 1 && regs.exact) else { break };
        // A stack only grows towards its begin, but for exceptions that change it.
        let (before, after) = (regs.r[n.sp].unwrap_or(0), next.r[n.sp].unwrap_or(u64::MAX));
        let backwards = after < before || after == before && method != Method::Link && next.pc == regs.pc;
        if next.pc == 0 || backwards && method != Method::Exception {
            break;
        }
        found.push(Frame { pc: next.pc, method });
        regs = next;
    }
    found
}

fn start(cpu: &CpuState) -> Option<(Numbers, Regs)> {
    let mut r = [None; 33];
    let n = match cpu {
        CpuState::Riscv(s) => {
            (1..32).for_each(|i| r[i] = Some(s.x[i]));
            RISCV
        }
        CpuState::X86(s) if registers::bits(cpu) == 64 => {
            (0..16).for_each(|i| r[X86_64_ORDER[i]] = Some(s.gpr[i]));
            X86_64
        }
        CpuState::X86(s) if registers::bits(cpu) == 32 => {
            (0..8).for_each(|i| r[i] = Some(s.gpr[i] & 0xffff_ffff));
            I386
        }
        // Segments of real mode have no frames that anybody could tell.
        _ => return None,
    };
    Some((n, Regs { pc: registers::pc(cpu), r, exact: true }))
}

impl Unwinder<'_, '_> {
    fn load(&self, at: u64) -> Option<u64> {
        self.number(at, self.n.word as usize)
    }

    fn number(&self, at: u64, bytes: usize) -> Option<u64> {
        let at = if self.n.word == 4 { at & 0xffff_ffff } else { at };
        let Some(space) = &self.space else {
            return read_number(self.view.target, self.view.vcpu, at, bytes);
        };
        // What lies across two pages is nothing that anybody pushed.
        let (pa, left) = space.lookup(at, &self.view.entry()).ok()?;
        let mut buffer = [0; 8];
        let there = bytes as u64 <= left && self.view.target.read(pa, &mut buffer[..bytes]);
        there.then(|| u64::from_le_bytes(buffer))
    }

    fn caller(&self, regs: &Regs, first: bool) -> Option<(Regs, Method)> {
        let handled = self.called_by_entry(regs).map(|r| (r, Method::Exception));
        handled
            .or_else(|| self.cfi(regs).map(|r| (r, Method::Cfi)))
            .or_else(|| self.orc(regs))
            .or_else(|| self.by_frame_pointer(regs, first))
    }

    /// Where a lookup of a frame's function is made: a call may be a function's last instruction.
    fn place(regs: &Regs) -> u64 {
        if regs.exact { regs.pc } else { regs.pc.wrapping_sub(1) }
    }

    fn cfi(&self, regs: &Regs) -> Option<Regs> {
        let program = self.view.program_symbols(Self::place(regs));
        let all = self.view.symbols.frames().chain(program.into_iter().flat_map(|p| p.frames()));
        all.into_iter().find_map(|(frames, bias)| {
            let endian = if frames.big_endian { RunTimeEndian::Big } else { RunTimeEndian::Little };
            let bytes = EndianSlice::new(&frames.bytes, endian);
            let at = Self::place(regs).wrapping_sub(bias);
            if frames.eh {
                let mut section = EhFrame::from(bytes);
                section.set_address_size(self.n.word as u8);
                self.cfi_in(&section, frames, at, regs)
            } else {
                let mut section = DebugFrame::from(bytes);
                section.set_address_size(self.n.word as u8);
                self.cfi_in(&section, frames, at, regs)
            }
        })
    }

    /// The value of an expression, with `initial` on its stack.
    fn evaluate<'b, S>(
        &self,
        expression: UnwindExpression<usize>,
        section: &S,
        regs: &Regs,
        initial: Option<u64>,
    ) -> Option<u64>
    where
        S: UnwindSection<EndianSlice<'b, RunTimeEndian>>,
    {
        let encoding = Encoding { address_size: self.n.word as u8, format: Format::Dwarf32, version: 5 };
        let mut evaluation = expression.get(section).ok()?.evaluation(encoding);
        evaluation.set_max_iterations(LONGEST_EXPRESSION);
        if let Some(value) = initial {
            evaluation.set_initial_value(value);
        }
        let mut result = evaluation.evaluate().ok()?;
        loop {
            result = match result {
                EvaluationResult::Complete => break,
                EvaluationResult::RequiresMemory { address, size, .. } => {
                    let value = self.number(address, usize::from(size).min(8))?;
                    evaluation.resume_with_memory(Value::Generic(value)).ok()?
                }
                EvaluationResult::RequiresRegister { register, .. } => {
                    let value = (*regs.r.get(usize::from(register.0))?)?;
                    evaluation.resume_with_register(Value::Generic(value)).ok()?
                }
                // Nothing else has a meaning outside a function's body (6.4.2).
                _ => return None,
            };
        }
        match evaluation.value_result()? {
            Value::Generic(value) => Some(value),
            other => other.to_u64(u64::MAX).ok(),
        }
    }

    fn cfi_in<'b, S>(&self, section: &S, frames: &Frames, at: u64, regs: &Regs) -> Option<Regs>
    where
        S: UnwindSection<EndianSlice<'b, RunTimeEndian>>,
    {
        let bases = BaseAddresses::default().set_eh_frame(frames.address);
        let fde = section.fde_for_address(&bases, at, S::cie_from_offset).ok()?;
        let mut context = UnwindContext::new();
        let row = fde.unwind_info_for_address(section, &bases, &mut context, at).ok()?;
        let cfa = match row.cfa() {
            CfaRule::RegisterAndOffset { register, offset } => {
                (*regs.r.get(usize::from(register.0))?)?.wrapping_add(*offset as u64)
            }
            CfaRule::Expression(expression) => self.evaluate(*expression, section, regs, None)?,
        };
        let mut next = Regs { exact: fde.is_signal_trampoline(), ..regs.clone() };
        for (i, value) in next.r.iter_mut().enumerate() {
            *value = match row.register(Register(i as u16)) {
                // What nobody says anything of is kept, if it is one of those that functions keep.
                None => regs.r[i].filter(|_| self.callee_saved(i)),
                Some(RegisterRule::SameValue) => regs.r[i],
                Some(RegisterRule::Offset(offset)) => self.load(cfa.wrapping_add(offset as u64)),
                Some(RegisterRule::ValOffset(offset)) => Some(cfa.wrapping_add(offset as u64)),
                Some(RegisterRule::Register(other)) => regs.r.get(usize::from(other.0)).copied().flatten(),
                Some(RegisterRule::Expression(e)) => {
                    self.evaluate(e, section, regs, Some(cfa)).and_then(|at| self.load(at))
                }
                Some(RegisterRule::ValExpression(e)) => self.evaluate(e, section, regs, Some(cfa)),
                Some(_) => None,
            };
        }
        let column = usize::from(fde.cie().return_address_register().0);
        next.pc = match row.register(Register(column as u16)) {
            // A leaf function's is still in the register that the call left it in.
            None => (*regs.r.get(column)?).filter(|_| self.n.link == Some(column))?,
            // "Undefined" marks the outermost.
            Some(_) => next.r.get(column).copied().flatten()?,
        };
        // A signal's frame says where the stack was.
        if !matches!(
            row.register(Register(self.n.sp as u16)),
            Some(RegisterRule::Expression(_) | RegisterRule::Offset(_))
        ) {
            next.r[self.n.sp] = Some(cfa);
        }
        Some(next)
    }

    /// The psABIs' registers that a function leaves as they were.
    fn callee_saved(&self, register: usize) -> bool {
        match (self.n.link.is_some(), self.n.word) {
            (true, _) => matches!(register, 3 | 4 | 8 | 9 | 18..=27),
            (false, 8) => matches!(register, 3 | 6 | 12..=15),
            _ => matches!(register, 3 | 5..=7),
        }
    }

    fn orc(&self, regs: &Regs) -> Option<(Regs, Method)> {
        if self.n.word != 8 || self.n.link.is_some() {
            return None;
        }
        let at = Self::place(regs);
        let from_file = self.view.symbols.orc().find_map(|(orc, bias)| orc.find(at.wrapping_sub(bias)));
        let entry = from_file.or_else(|| self.view.orc.and_then(|orc: &Orc| orc.find(at)))?;
        let base = |register: orc::Base| match register {
            orc::Base::Sp => regs.r[7],
            orc::Base::Bp => regs.r[6],
            orc::Base::Dwarf(n) => regs.r[n],
        };
        let sp = match entry.sp {
            orc::Sp::At(register, offset) => base(register)?.wrapping_add(offset as u64),
            orc::Sp::In(register, offset, after) => {
                self.load(base(register)?.wrapping_add(offset as u64))?.wrapping_add(after as u64)
            }
            orc::Sp::None => return None,
        };
        let mut next = Regs { pc: 0, r: [None; 33], exact: false };
        let method = match entry.kind {
            orc::Kind::Call => {
                next.pc = self.load(sp.wrapping_sub(8))?;
                next.r[7] = Some(sp);
                Method::Orc
            }
            orc::Kind::Regs => {
                next = self.x86_64_saved(sp)?;
                Method::Exception
            }
            orc::Kind::Partial => {
                next.pc = self.load(sp)?;
                next.r[7] = Some(self.load(sp.wrapping_add(24))?);
                next.exact = true;
                Method::Exception
            }
        };
        next.r[6] = match entry.bp {
            orc::Bp::Same => next.r[6].or(regs.r[6]),
            orc::Bp::AtSp(offset) => self.load(sp.wrapping_add(offset as u64)),
            orc::Bp::AtBp(offset) => self.load(regs.r[6]?.wrapping_add(offset as u64)),
        };
        Some((next, method))
    }

    /// Linux's `struct pt_regs` of x86-64: r15 to r12, rbp, rbx, r11 to r8, rax, rcx, rdx, rsi, rdi, the error code, and
    /// what the processor pushed.
    fn x86_64_saved(&self, at: u64) -> Option<Regs> {
        const ORDER: [usize; 15] = [15, 14, 13, 12, 6, 3, 11, 10, 9, 8, 0, 2, 1, 4, 5];
        let word = |i: u64| self.load(at.wrapping_add(8 * i));
        let mut r = [None; 33];
        for (i, register) in ORDER.into_iter().enumerate() {
            r[register] = word(i as u64);
        }
        r[7] = word(19);
        Some(Regs { pc: word(16)?, r, exact: true })
    }

    /// Linux's `struct pt_regs` of i386: ebx, ecx, edx, esi, edi, ebp, eax, segments, the error code, and what the
    /// processor pushed, the stack pointer only if the privilege changed.
    fn i386_saved(&self, at: u64) -> Option<Regs> {
        const ORDER: [usize; 7] = [3, 1, 2, 6, 7, 5, 0];
        let word = |i: u64| self.load(at.wrapping_add(4 * i));
        let mut r = [None; 33];
        for (i, register) in ORDER.into_iter().enumerate() {
            r[register] = word(i as u64);
        }
        let from_user = word(13)? & 3 == 3;
        r[4] = if from_user { word(15) } else { Some(at.wrapping_add(60)) };
        Some(Regs { pc: word(12)?, r, exact: true })
    }

    /// A function of Linux that was called by the code which saved all registers on the stack. RISC-V: `epc`, then x1 to
    /// x31. i386 leaves no mark in the frame pointer at system calls; what is on top of the stack then are the registers.
    fn called_by_entry(&self, regs: &Regs) -> Option<Regs> {
        let entries: &[&str] = match (self.n.link, self.n.word) {
            (Some(_), _) => &["handle_exception", "ret_from_exception"],
            (None, 4) => &["entry_SYSENTER_32", "entry_INT80_32"],
            _ => return None,
        };
        let is_entry = |at: u64| self.view.symbols.function(at).is_some_and(|name| entries.contains(&name.as_str()));
        if regs.exact || !is_entry(regs.pc) && !is_entry(regs.pc.wrapping_sub(1)) {
            return None;
        }
        let at = regs.r[self.n.sp]?;
        if self.n.link.is_none() {
            return self.i386_saved(at);
        }
        let mut r = [None; 33];
        for (i, register) in r.iter_mut().enumerate().take(32).skip(1) {
            *register = self.load(at.wrapping_add(8 * i as u64));
        }
        Some(Regs { pc: self.load(at)?, r, exact: true })
    }

    fn by_frame_pointer(&self, regs: &Regs, first: bool) -> Option<(Regs, Method)> {
        let (n, fp) = (self.n, regs.r[self.n.fp]?);
        if first && let Some(found) = self.not_saved_yet(regs, fp) {
            return Some(found);
        }
        if let Some(saved) = self.encoded(regs.pc, fp) {
            return Some((saved, Method::Exception));
        }
        // RISC-V: return address and caller's frame pointer are below the frame, x86: above it (psABIs).
        let (ra, next_fp, sp) = match n.link {
            Some(_) => (fp.wrapping_sub(8), fp.wrapping_sub(16), fp),
            None => (fp.wrapping_add(n.word), fp, fp.wrapping_add(2 * n.word)),
        };
        if !fp.is_multiple_of(n.word) {
            return None;
        }
        let mut next = Regs { pc: self.load(ra)?, r: [None; 33], exact: false };
        next.r[n.sp] = Some(sp);
        next.r[n.fp] = self.load(next_fp);
        // The same stack.
        let above = regs.r[n.sp].is_some_and(|old| sp >= old && sp - old <= 1 << 20);
        above.then_some((next, Method::FramePointer))
    }

    /// The caller of a function that has not made its frame yet, or never will.
    fn not_saved_yet(&self, regs: &Regs, fp: u64) -> Option<(Regs, Method)> {
        let n = self.n;
        let mut next = Regs { exact: false, ..regs.clone() };
        if let Some(link) = n.link {
            let begin = |at: u64| self.view.begin(at);
            let same = |a: u64, b: u64| a == b || begin(a).is_some_and(|begin_a| Some(begin_a) == begin(b));
            let ra = regs.r[link].filter(|ra| *ra != 0)?;
            if Some(ra) == self.load(fp.wrapping_sub(8)) || same(ra, regs.pc) {
                return None;
            }
            next.pc = ra;
            return Some((next, Method::Link));
        }
        if self.view.begin(regs.pc)? != regs.pc {
            return None;
        }
        let sp = regs.r[n.sp]?;
        next.pc = self.load(sp)?;
        next.r[n.sp] = Some(sp.wrapping_add(n.word));
        Some((next, Method::Entry))
    }

    /// Linux's entry code for x86 leaves a mark in the frame pointer that says: here are saved registers. It is bit 0, in
    /// 32-bit kernels a cleared bit 31.
    fn encoded(&self, pc: u64, fp: u64) -> Option<Regs> {
        match (self.n.link, self.n.word) {
            (None, 8) if fp & 1 != 0 && fp >> 63 != 0 => self.x86_64_saved(fp - 1),
            (None, 4) if fp >> 31 == 0 && fp > 0x1000 && pc >> 31 == 1 => self.i386_saved(fp | 1 << 31),
            _ => None,
        }
    }
}

#[cfg(test)]
#[path = "unwind_tests.rs"]
mod tests;
