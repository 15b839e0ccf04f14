//! Floating-point flags that are read for nothing.
//!
//! Compilers make a quiet comparison of a signalling one between `frflags` and `fsflags`: before each `sqrt`, for one. The
//! second has nothing to do unless the operands are unordered, but to read the flags the host has to finish all arithmetic. What
//! was read is in a register, mostly until it is overwritten; who may see it there is who looks after a fault, and the
//! other side of a branch.
//!
//! So in code that runs often it is found out first whether the operands are numbers and the accesses until the register is
//! overwritten stay in their ranges, in which case none of them faults or leaves the block. Then the flags are not read, but for
//! the sides of branches that come before other arithmetic.

use super::{Cold, Fixups, Lower, Opnd, reads, writes};
use crate::asm::{Alu, Cc, Fixup, R14, R15, RAX, Rm};
use dynasm::dynasm;
use dynasmrt::DynasmApi;
use mimus_tcg_ir::{CallKind, FpFmt, FpOp, Op, PagePc, Size, Slot, Val};

/// Accesses to look at.
const MOST: usize = 3;
/// Operations to look at.
const REACH: usize = 48;

/// Flags that have not been read.
#[derive(Clone, Copy, Debug)]
pub(super) struct Unread {
    /// Where they would be.
    to: Slot,
    /// From the operation that reads them to the one that overwrites the slot.
    ops: (usize, usize),
}

/// What there is until the flags that an operation reads are overwritten.
struct Quiet {
    operands: [Slot; 2],
    /// The operation's index, its instruction's offset, and what is loaded.
    loads: Vec<(usize, i32, (Slot, i32, Size))>,
    /// Index of the operation that overwrites them.
    end: usize,
}

impl Lower<'_> {
    /// Flags that the operation being lowered reads to `to` need not be read at once. `true`: they have been, if they had to be.
    pub(super) fn put_flags_off(&mut self, to: Slot) -> bool {
        self.unread = None;
        if !self.info.hints.hot || self.in_cold || self.homed != super::loops::Homed::Not {
            return false;
        }
        let at = self.next.wrapping_sub(1);
        let Some(Quiet { operands, loads, end }) = self.find_quiet(at, to) else { return false };
        let mut from = Fixups::default();
        // Twice the bits of a NaN are above those of infinity.
        self.asm.mov_ri(R14, 0x7ffu64.wrapping_shl(53) as i64);
        for slot in operands {
            self.fp_bits(R15, slot);
            self.asm.alu_r_rm(Alu::Add, true, R15, Rm::Reg(R15));
            self.asm.alu_r_rm(Alu::Cmp, true, R15, Rm::Reg(R14));
            from.add(self.asm.jcc(Cc::A));
        }
        for (op, _, (base, off, size)) in loads {
            let range = self.promise_range(op, size);
            let base = match self.home(base) {
                Opnd::Reg(reg) => reg,
                home => {
                    self.mov(RAX, home);
                    RAX
                }
            };
            from.add(self.outside_range((base, off), range, size));
        }
        let back = self.asm.pos();
        self.put_off(Cold::ReadFpFlags { from, to, back });
        self.unread = Some(Unread { to, ops: (at, end) });
        true
    }

    /// What follows operation `at`, which reads flags to `to`.
    fn find_quiet(&self, at: usize, to: Slot) -> Option<Quiet> {
        let own = self.be.config.fp_flags?;
        let mut rest = self.ops.iter().enumerate().skip(at + 1).take(REACH);
        let mut next = || rest.find(|(_, op)| !matches!(op, Op::Insn { .. } | Op::SetEnvByte { .. }));
        let (cmp, &Op::Fp { op: op @ (FpOp::Lt | FpOp::Le), fmt: FpFmt::F64, rm, d, a, b, c }) = next()? else {
            return None;
        };
        let (write, &Op::Call { helper, kind: CallKind::Pure, ret: None, args: [Val::Imm(1), Val::Slot(new), _] }) =
            next()?
        else {
            return None;
        };
        // What `restores_flags` finds too: then the second call has nothing to do.
        let near = cmp - at <= 3
            && write - cmp <= 3
            && self.pin_of(d).is_some()
            && !self.in_software(op, FpFmt::F64, rm, d, [a, b, c]);
        if helper != own.helper || new != to || d == to || !near {
            return None;
        }
        let (mut loads, mut written, mut raised, mut pc) = (Vec::new(), vec![d], false, 0);
        for (index, op) in rest {
            if let Op::Insn { pc: here, .. } = *op {
                pc = here.0;
                continue;
            }
            if reads(op, to) {
                return None;
            }
            match *op {
                Op::SetEnvByte { .. } | Op::Alu { .. } | Op::Un { .. } | Op::GetPc { .. } => {}
                Op::Fp { .. } => raised = true,
                Op::Load { base: Val::Slot(base), off, size, .. }
                    if !written.contains(&base) && self.stays_in_range(pc) && loads.len() < MOST =>
                {
                    loads.push((index, pc, (base, off, size)));
                }
                // What another side of it sees can still be read. (Copies of stretches begin with accesses.)
                Op::Branch { .. } if !raised && loads.is_empty() => {}
                _ => return None,
            }
            if writes(op, to) {
                return Some(Quiet { operands: [a, b], loads, end: index });
            }
            mimus_tcg_ir::verify::for_each_written(op, |slot| written.push(slot));
        }
        None
    }

    /// Reads them after all.
    pub(super) fn read_fp_flags(&mut self, from: Fixups, to: Slot, back: u32) {
        self.bind(from);
        self.fp_flags_to_rax();
        self.set(to, RAX);
        self.asm.jmp_back(back);
    }

    /// The taken side of a branch, where flags that have not been read are wanted. `false`: there are none.
    pub(super) fn branch_past_flags(&mut self, cc: Cc, to: PagePc) -> bool {
        let here = |unread: &Unread| (unread.ops.0..unread.ops.1).contains(&self.next.wrapping_sub(1));
        let Some(unread) = self.unread.filter(here).filter(|_| self.homed == super::loops::Homed::Not) else {
            return false;
        };
        let from = self.asm.jcc(cc);
        self.put_off(Cold::LateFpFlags { from, slot: unread.to, to });
        true
    }

    pub(super) fn late_fp_flags(&mut self, from: Fixup, slot: Slot, to: PagePc) {
        self.asm.bind(from);
        self.fp_flags_to_rax();
        self.set(slot, RAX);
        self.unread = None;
        self.jump(to);
    }

    /// The accrued floating-point flags.
    pub(super) fn fp_flags_to_rax(&mut self) {
        let Some(own) = self.be.config.fp_flags else { return };
        let scratch = self.be.env(self.be.config.env.mxcsr);
        let flags = self.be.env(self.be.config.env.guest.wrapping_add(own.flags));
        let table = self.be.stubs.fp_flags as i32;
        dynasm!(self.asm ; .arch x64
            ; stmxcsr [rbp + scratch]
            ; mov eax, [rbp + scratch]
            ; and eax, 0x3f
            ; movzx eax, BYTE [rax + table]
            ; or al, [rbp + flags]
        );
    }
}
