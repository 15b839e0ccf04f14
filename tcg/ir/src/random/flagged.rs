//! Operations on flags and parts of slots.

use super::{Generator, SIZES};
use crate::flags::Flags;
use crate::op::*;
use crate::verify::{least_size, rmw_allowed};

impl Generator<'_> {
    pub(super) fn flagged(&mut self) {
        match self.rng.below(20) {
            0..7 => self.alu_f(),
            7..10 => self.part(),
            10..14 => self.condition(),
            14..18 => self.read_modify_write(),
            _ => self.wide(),
        }
    }

    /// A slot that holds something already.
    fn old_slot(&mut self) -> Slot {
        if !self.temps.is_empty() && self.rng.chance(15) {
            return self.rng.pick(&self.temps);
        }
        self.int_slot()
    }

    fn size_from(&mut self, least: Size) -> Size {
        let sizes: Vec<Size> = SIZES.into_iter().filter(|size| *size >= least).collect();
        self.rng.pick(&sizes)
    }

    fn mask(&mut self) -> Flags {
        let mask = Flags(self.rng.u64() as u16 & Flags::ALL.0);
        if mask.is_empty() { Flags::CF } else { mask }
    }

    fn alu_f(&mut self) {
        let op = self.rng.pick(&FlagOp::ALL);
        let size = self.size_from(least_size(op));
        let (a, b) = (self.val(), self.val());
        let d = match a {
            Val::Slot(a) if self.rng.chance(60) => Some(a),
            _ if self.rng.chance(30) => None,
            _ => Some(self.old_slot()),
        };
        self.ops.push(Op::AluF { op, size, d, a, b });
    }

    fn part(&mut self) {
        let (a, old) = (self.val(), self.old_slot());
        let op = match self.rng.below(6) {
            0 | 1 => {
                let (base, shift, disp) = (self.val(), self.rng.below(4) as u8, self.rng.edge() as i32);
                let size = self.size_from(Size::B2);
                Op::Lea { d: self.dest(), base, index: a, shift, disp, size }
            }
            2 => Op::SetPart { d: old, size: self.rng.pick(&[Size::B1, Size::B2]), a },
            3 => Op::GetHigh { d: self.dest(), a: old },
            4 => Op::SetHigh { d: old, a },
            _ if self.config.env => {
                let (size, off) = (self.rng.pick(&SIZES), self.rng.below(8) as i32);
                if self.rng.chance(50) {
                    let ext = self.rng.pick(&[Ext::Zero, Ext::Sign]);
                    Op::LoadEnv { d: self.dest(), off, size, ext }
                } else {
                    Op::StoreEnv { src: a, off, size }
                }
            }
            _ => Op::FlipFlags { mask: self.mask() },
        };
        self.ops.push(op);
    }

    fn condition(&mut self) {
        let (cond, d) = (self.rng.pick(&CondF::ALL), self.old_slot());
        let op = match self.rng.below(8) {
            0 | 1 => Op::SetCondF { cond, d },
            2 | 3 => Op::CMovF { cond, size: self.size_from(Size::B2), d, a: self.val() },
            4 => Op::GetFlags { d: self.dest() },
            5 => Op::SetFlags { a: self.val(), mask: self.mask() },
            6 => Op::FlipFlags { mask: self.mask() },
            _ => {
                let dead = if self.rng.chance(50) { Flags::ALL } else { Flags::NONE };
                Op::BranchF { cond, to: self.near_pc(), dead }
            }
        };
        self.ops.push(op);
    }

    fn read_modify_write(&mut self) {
        let (src, lock) = (self.val(), self.rng.chance(40));
        let op = self.rng.pick(&FlagOp::ALL);
        let (op, least) = match rmw_allowed(op) {
            true => (RmwOp::F(op), least_size(op)),
            false => (RmwOp::Swap, Size::B1),
        };
        let size = self.size_from(least);
        let (base, off) = self.address(size);
        if self.rng.chance(20) {
            let expected = self.val();
            let d = self.dest();
            return self.ops.push(Op::CmpXchg { d, size, expected, new: src, base, off });
        }
        let gives_old = matches!(op, RmwOp::Swap | RmwOp::F(FlagOp::Add));
        let old = if gives_old && self.rng.chance(60) { Some(self.dest()) } else { None };
        self.ops.push(Op::Rmw { op, size, lock, old, src, base, off });
    }

    fn wide(&mut self) {
        let (a, b, n) = (self.val(), self.val(), self.val());
        let (lo, mut hi) = (self.old_slot(), self.old_slot());
        if lo == hi {
            hi = Slot((lo.0 + 1) % 4);
        }
        let op = if self.rng.chance(50) {
            Op::ShiftDoubleF { left: self.rng.chance(50), size: self.size_from(Size::B2), d: lo, a, b, n }
        } else {
            Op::MulWideF { signed: self.rng.chance(50), size: self.rng.pick(&SIZES), lo, hi, a, b }
        };
        self.ops.push(op);
    }

    /// A division, which is its instruction's first operation.
    pub(super) fn divide(&mut self) {
        let size = self.rng.pick(&SIZES);
        let q = self.int_slot();
        let r = Slot((q.0 + 1) % 4);
        let r = if r == q { Slot(5) } else { r };
        let hi = if self.rng.chance(60) { Val::Imm(0) } else { self.val() };
        let (lo, b) = (self.val(), self.val());
        self.ops.push(Op::DivWideF { signed: self.rng.chance(50), size, q, r, hi, lo, b });
    }
}
