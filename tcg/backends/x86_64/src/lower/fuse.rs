//! Loads that the next operation takes as its memory operand: `add rbx, [mem]`, `cmp byte [mem], 5`.

use super::Lower;
use super::flagged::{Form, form_of};
use crate::asm::{Alu, Map, Rm, fits32};
use mimus_tcg_ir::backend::Optimise;
use mimus_tcg_ir::{FIRST_TEMP, FlagOp, Op, Size, Slot, Val};

/// The operation that follows a load and is done on the memory that it loads.
#[derive(Clone, Copy, Debug)]
pub(super) struct Fused {
    op: FlagOp,
    size: Size,
    how: How,
}

#[derive(Clone, Copy, Debug)]
enum How {
    /// `op reg, mem`
    ToReg(u8),
    /// `cmp reg, mem`
    OfReg(u8),
    /// `cmp` or `test` of memory with a register.
    WithReg(u8),
    /// `cmp` or `test` of memory with a constant.
    WithImm(i32),
}

impl Lower<'_> {
    /// The operation after the load of `size` bytes to `d` being lowered, if it can take them from memory and nothing
    /// else wants them.
    pub(super) fn fusable(&self, d: Slot, size: Size) -> Option<(Op, Fused)> {
        if d.0 < FIRST_TEMP || self.be.config.optimise == Optimise::Off {
            return None;
        }
        let (next, rest) = self.ops.get(self.next..)?.split_first()?;
        let Op::AluF { op, size: at, d: to, a, b } = *next else { return None };
        let loaded = Val::Slot(d);
        if at != size || a == b || to.is_none() && !self.flags_wanted_at(self.next, next) {
            return None;
        }
        let reg = |v: Val| match v {
            Val::Slot(slot) => self.pin_of(slot),
            Val::Imm(_) => None,
        };
        let how = match (op, to, a, b) {
            (FlagOp::Add | FlagOp::Sub | FlagOp::And | FlagOp::Or | FlagOp::Xor, Some(to), a, b)
                if a == Val::Slot(to) && b == loaded =>
            {
                How::ToReg(self.pin_of(to)?)
            }
            // Looking the address up leaves no flags that a product would leave alone.
            (FlagOp::Mul, Some(to), a, b)
                if a == Val::Slot(to)
                    && b == loaded
                    && size > Size::B1
                    && self.carried_at(self.next, next).is_empty() =>
            {
                How::ToReg(self.pin_of(to)?)
            }
            (FlagOp::Sub, None, a, b) if b == loaded => How::OfReg(reg(a)?),
            (FlagOp::And, None, a, b) if b == loaded => How::WithReg(reg(a)?),
            (FlagOp::Sub | FlagOp::And, None, a, Val::Imm(imm)) if a == loaded => {
                How::WithImm(Some(imm).filter(|imm| size != Size::B8 || fits32(*imm))? as i32)
            }
            (FlagOp::Sub | FlagOp::And, None, a, b) if a == loaded => How::WithReg(reg(b)?),
            _ => return None,
        };
        let again = rest.iter().take_while(|op| !matches!(op, Op::Insn { .. })).any(|op| super::reads(op, d));
        (!again).then_some((*next, Fused { op, size, how }))
    }

    /// The operation, on memory, or in cold code on `rax`.
    pub(super) fn on_memory(&mut self, fused: Fused, place: Rm) {
        let Fused { op, size, how } = fused;
        match (form_of(op), how) {
            (Form::Classic(Alu::Sub), How::WithReg(r)) => {
                self.asm.sized(Map::Base, size, (Alu::Cmp as u8) << 3, r, place);
            }
            (Form::Classic(Alu::Sub), How::WithImm(imm)) => self.asm.alu_sized_i(Alu::Cmp, size, place, imm.into()),
            (_, How::WithReg(r)) => self.asm.sized(Map::Base, size, 0x84, r, place),
            (_, How::WithImm(imm)) => {
                self.asm.sized_ext(Map::Base, size, 0xf6, 0, place);
                self.asm.imm_sized(size, imm.into());
            }
            (_, How::OfReg(r)) => self.asm.sized(Map::Base, size, (Alu::Cmp as u8) << 3 | 2, r, place),
            (Form::Classic(alu), How::ToReg(r)) => self.asm.sized(Map::Base, size, (alu as u8) << 3 | 2, r, place),
            (_, How::ToReg(r)) => self.asm.wide(Map::Of, size, 0xaf, r, place),
        }
    }
}
