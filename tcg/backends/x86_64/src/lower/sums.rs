//! Sums that make the address of the load behind them, in the register that it loads to: a guest whose loads have a base and an
//! offset alone makes the addresses of an array's elements so. Where the load has a range entry, nothing of that is in its way: the
//! sum is made for the check, and the load takes base and index as they are ([`super::folded`]).

use super::folded::Folded;
use super::{Insn, Lower};
use crate::asm::fits32;
use mimus_tcg_ir::backend::Optimise;
use mimus_tcg_ir::{AluOp, Ext, FIRST_TEMP, Op, Size, Slot, Ty, UnOp, Val};

/// Operations to look at.
const MAX_OPS: usize = 12;

/// A constant and at most two registers, the second of which may be scaled.
#[derive(Clone, Copy, Default)]
struct Sum {
    base: Option<Slot>,
    index: Option<(Slot, u8)>,
    disp: i64,
}

impl Sum {
    fn of(val: Val) -> Sum {
        match val {
            Val::Slot(slot) => Sum { base: Some(slot), ..Sum::default() },
            Val::Imm(disp) => Sum { disp, ..Sum::default() },
        }
    }

    fn plus(self, other: Sum) -> Option<Sum> {
        let disp = self.disp.checked_add(other.disp).filter(|disp| fits32(*disp))?;
        let (base, index) = match (self.base, self.index, other.base, other.index) {
            (base, index, None, None) => (base, index),
            (None, None, base, index) => (base, index),
            (Some(base), None, Some(index), None) => (Some(base), Some((index, 0))),
            (Some(base), None, None, index) | (None, index, Some(base), None) => (Some(base), index),
            _ => return None,
        };
        Some(Sum { base, index, disp })
    }

    fn shifted(self, by: u8) -> Option<Sum> {
        match (self.base, self.index) {
            (Some(slot), None) => {
                let disp = self.disp.checked_mul(1 << by).filter(|disp| fits32(*disp))?;
                Some(Sum { base: None, index: Some((slot, by)), disp })
            }
            _ => None,
        }
    }
}

/// What operations have made of slots.
#[derive(Default)]
struct Made(Vec<(Slot, Sum)>);

impl Made {
    fn value(&self, val: Val) -> Sum {
        let made = |slot: Slot| self.0.iter().find(|(other, _)| *other == slot).map(|(_, sum)| *sum);
        match val {
            Val::Slot(slot) => made(slot).unwrap_or(Sum::of(val)),
            Val::Imm(_) => Sum::of(val),
        }
    }

    /// Goes past an operation; `None`: it is another one.
    fn step(&mut self, op: &Op) -> Option<()> {
        let (d, sum) = match *op {
            Op::Alu { op, ty: Ty::I64, d, a, b } => {
                let (a, b) = (self.value(a), self.value(b));
                let sum = match op {
                    AluOp::Add => a.plus(b),
                    AluOp::Shl if b.base.is_none() && b.index.is_none() => {
                        a.shifted(u8::try_from(b.disp).ok().filter(|by| *by <= 3)?)
                    }
                    AluOp::Sh1Add => a.shifted(1)?.plus(b),
                    AluOp::Sh2Add => a.shifted(2)?.plus(b),
                    AluOp::Sh3Add => a.shifted(3)?.plus(b),
                    _ => None,
                };
                (d, sum?)
            }
            Op::Un { op: UnOp::Mov, ty: Ty::I64, d, a } => (d, self.value(a)),
            _ => return None,
        };
        self.0.retain(|(other, _)| *other != d);
        self.0.push((d, sum));
        Some(())
    }
}

/// A load whose address such operations make.
struct Found {
    /// Index of its operation, and its instruction.
    load: usize,
    insn: Insn,
    folded: Folded,
    access: (Slot, i32, Size, Ext),
    /// What else they make.
    beside: Option<(u8, Sum)>,
}

impl Lower<'_> {
    /// Lowers operations from `first` on as one load, if they make its address and its register is that of the address. `false`:
    /// nothing was done.
    #[inline]
    pub(super) fn fold_sums(&mut self, first: usize) -> bool {
        if self.flagged || !self.info.hints.hot || self.compact || self.group.is_some() {
            return false;
        }
        let sum = |op: &Op| match *op {
            Op::Alu { op, ty, .. } => {
                use AluOp::{Add, Sh1Add, Sh2Add, Sh3Add, Shl};
                ty == Ty::I64 && matches!(op, Add | Shl | Sh1Add | Sh2Add | Sh3Add)
            }
            _ => false,
        };
        if !self.ops.get(first).is_some_and(sum) {
            return false;
        }
        let Some(found) = self.find_sums(first) else { return false };
        self.load_by_sum(found);
        true
    }

    fn find_sums(&self, first: usize) -> Option<Found> {
        let (mut made, mut insn) = (Made::default(), self.insn);
        for (i, op) in self.ops.get(first..)?.iter().enumerate().take(MAX_OPS) {
            match *op {
                Op::Insn { pc, len } => insn = Insn { pc, len, left: insn.left.saturating_sub(1) },
                Op::Load { d, base, off, size, ext } if base == Val::Slot(d) && ext != Ext::Ones => {
                    return self.sum_of_load(&made, (first + i, insn), (d, off, size, ext));
                }
                _ => made.step(op)?,
            }
        }
        None
    }

    /// Whether that load is to be made so.
    fn sum_of_load(&self, made: &Made, (load, insn): (usize, Insn), access: (Slot, i32, Size, Ext)) -> Option<Found> {
        let (d, off, ..) = access;
        let Sum { base: Some(base), index: Some((index, shift)), disp } = made.value(Val::Slot(d)) else { return None };
        // What is there longer is not waited for.
        let (base, index) = if shift == 0 && base == d { (index, base) } else { (base, index) };
        let scattered = self.info.hints.scattered.iter().any(|&pc| i32::from(pc) == insn.pc.0);
        let windowed = self.in_windows() && self.windows.any_of(load..load + 1);
        if scattered
            || windowed
            || d.0 >= FIRST_TEMP
            || !fits32(disp + i64::from(off))
            || self.be.config.optimise == Optimise::Off
            || self.leaves_windows(load..load + 1)
        {
            return None;
        }
        self.pin_of(d)?;
        let mut others = made.0.iter().filter(|(slot, _)| *slot != d);
        let beside = match others.next() {
            // It is made first, while all that sums are made of is there.
            Some(&(slot, sum)) => Some((self.pin_of(slot).filter(|_| slot != base && slot != index)?, sum)),
            None => None,
        };
        let pinned = |slot: Slot| self.pin_of(slot).is_some();
        let is_pinned = |sum: Sum| sum.base.is_none_or(pinned) && sum.index.is_none_or(|(slot, _)| pinned(slot));
        if others.next().is_some() || beside.is_some_and(|(_, sum)| !is_pinned(sum)) {
            return None;
        }
        let folded = Folded {
            temp: d,
            base: self.pin_of(base)?,
            index: self.pin_of(index)?,
            shift,
            disp: disp as i32,
            stays: self.pin_of(d),
        };
        Some(Found { load, insn, folded, access, beside })
    }

    fn load_by_sum(&mut self, found: Found) {
        let Found { load, insn, folded, access: (d, off, size, ext), beside } = found;
        let insns = self.ops.iter().take(load).skip(self.next);
        self.went_back |= insns.clone().any(|op| matches!(*op, Op::Insn { pc, .. } if pc < self.start));
        (self.insn, self.next, self.skip) = (insn, load + 1, load + 1);
        (self.cached, self.last, self.page) = (None, None, None);
        if let Some((t, sum)) = beside {
            let reg = |slot: Slot| self.pin_of(slot);
            let (base, index) = (sum.base.and_then(reg), sum.index.and_then(|(slot, by)| Some((reg(slot)?, by))));
            match (base, index) {
                (None, None) => self.asm.mov_ri(t, sum.disp),
                _ => self.asm.lea_sib(true, t, base, index, sum.disp as i32),
            }
        }
        self.load_by_index(d, (folded, off), size, ext);
        self.boxed &= !super::boxed_bit(d);
    }
}
