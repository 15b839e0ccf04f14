//! Zba, Zbb, Zbs: the operations that take more than one IR operation.

use super::Translator;
use crate::decode::{ArgsR, ArgsShift};
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

    fn zero_extended(&mut self, reg: i32) -> Val {
        let a = self.x(reg);
        let d = self.temp();
        self.emit(Op::Un { op: UnOp::ZextW, ty: Ty::I64, d, a });
        Val::Slot(d)
    }
}
