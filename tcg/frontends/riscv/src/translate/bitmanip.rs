//! Zba, Zbb, Zbs, Zicond: the operations that take more than one IR operation; Zimop.

use super::Translator;
use crate::decode::{ArgsCMop, ArgsMop, ArgsR, ArgsShift};
use mimus_tcg_ir::{AluOp, Op, Ty, UnOp, Val};

impl Translator<'_> {
    /// `rd = op(zext.w(rs1), rs2)`: `add.uw` and `sh*add.uw`.
    pub(super) fn op_uw(&mut self, op: AluOp, a: ArgsR) -> bool {
        if a.rs1 == 0 || a.rd == 0 {
            return self.op_reg(op, Ty::I64, a);
        }
        if op == AluOp::Add && a.rs2 == 0 {
            return self.unary(UnOp::ZextW, Ty::I64, a.rd, a.rs1);
        }
        let wide = self.zero_extended(a.rs1);
        let y = self.x(a.rs2);
        self.binary(op, Ty::I64, a.rd, wide, y)
    }

    /// `rd = zext.w(rs1) << shamt`
    pub(super) fn shift_left_uw(&mut self, a: ArgsShift) -> bool {
        if a.rs1 == 0 || a.rd == 0 {
            return self.mov(a.rd, Val::Imm(0));
        }
        let wide = self.zero_extended(a.rs1);
        self.binary(AluOp::Shl, Ty::I64, a.rd, wide, Val::Imm(i64::from(a.shamt)))
    }

    /// Zicond: `rd = rs1`, but 0 if `rs2` is not 0 (`nonzero`) or is 0.
    pub(super) fn zero_if(&mut self, nonzero: bool, a: ArgsR) -> bool {
        let x = self.x(a.rs1);
        if a.rd == 0 || a.rs1 == 0 || a.rs2 == 0 {
            return self.mov(a.rd, if nonzero { x } else { Val::Imm(0) });
        }
        let y = self.x(a.rs2);
        let mask = self.temp();
        self.emit(Op::Alu { op: AluOp::SetLtU, ty: Ty::I64, d: mask, a: Val::Imm(0), b: y });
        self.emit(Op::Alu { op: AluOp::Sub, ty: Ty::I64, d: mask, a: Val::Imm(0), b: Val::Slot(mask) });
        self.binary(if nonzero { AluOp::Andn } else { AluOp::And }, Ty::I64, a.rd, x, Val::Slot(mask))
    }

    /// Zimop: 0 until another extension says otherwise.
    pub(super) fn may_be(&mut self, a: ArgsMop) -> bool {
        self.mov(a.rd, Val::Imm(0))
    }

    /// Zcmop: nothing until another extension says otherwise.
    pub(super) fn compressed_may_be(&mut self, _: ArgsCMop) -> bool {
        true
    }

    fn zero_extended(&mut self, reg: i32) -> Val {
        let a = self.x(reg);
        let d = self.temp();
        self.emit(Op::Un { op: UnOp::ZextW, ty: Ty::I64, d, a });
        Val::Slot(d)
    }
}
