//! F and D.
//!
//! Ordinary blocks assume that the unit is on and, for instructions that round as `frm` says, that the host
//! can do so: a guard leaves the block where that is not so, and a careful block then asks a helper.

use super::Translator;
use crate::decode::{ArgsFr, ArgsFr2Rm, ArgsFr4Rm, ArgsFrRm, ArgsI, ArgsR2, ArgsS};
use crate::helper_ids::{self, FP_BAD_FRM, FP_BAD_OFF, HOT_FP_BAD, HOT_FP_DIRTY};
use mimus_tcg_ir::{Ext, FpFmt, FpOp, Op, Rm, Size, Slot, Val};

/// Slot of a floating-point register.
fn f(reg: i32) -> Slot {
    Slot(32 + reg as u8)
}

/// The rounding mode of an instruction; 5 and 6 are reserved (vol. I, table "Rounding mode encoding").
fn rounding(rm: i32) -> Option<Rm> {
    Some(match rm {
        0 => Rm::NearestEven,
        1 => Rm::ToZero,
        2 => Rm::Down,
        3 => Rm::Up,
        4 => Rm::NearestMaxMag,
        7 => Rm::Dynamic,
        _ => return None,
    })
}

impl Translator<'_> {
    /// Before a floating-point instruction: the unit is on, and rounds if `rm` is dynamic.
    pub(super) fn fp_guard(&mut self, rm: Rm) {
        let dynamic = rm == Rm::Dynamic;
        if self.cfg.careful {
            let args = [self.raw(), Val::Imm(i64::from(dynamic)), Val::Imm(0)];
            self.call(helper_ids::FP_CHECK, None, args);
            return;
        }
        let mask = if dynamic { FP_BAD_OFF | FP_BAD_FRM } else { FP_BAD_OFF };
        let unknown = mask & !self.fp_known;
        if unknown != 0 {
            self.emit(Op::GuardEnv { off: HOT_FP_BAD, mask: unknown });
            self.fp_known |= mask;
        }
    }

    /// After an instruction that writes a floating-point register or flags: FS becomes dirty.
    pub(super) fn fp_written(&mut self) {
        if !self.fp_dirty {
            self.emit(Op::SetEnvByte { off: HOT_FP_DIRTY, val: 1 });
            self.fp_dirty = true;
        }
    }

    pub(super) fn fp_load(&mut self, size: Size, a: ArgsI) -> bool {
        self.fp_guard(Rm::NearestEven);
        let base = self.x(a.rs1);
        let ext = if size == Size::B4 { Ext::Ones } else { Ext::Zero };
        self.emit(Op::Load { d: f(a.rd), base, off: a.imm, size, ext });
        self.fp_written();
        true
    }

    pub(super) fn fp_store(&mut self, size: Size, a: ArgsS) -> bool {
        self.fp_guard(Rm::NearestEven);
        let base = self.x(a.rs1);
        self.emit(Op::Store { src: Val::Slot(f(a.rs2)), base, off: a.imm, size });
        true
    }

    /// `a*b ± c`
    pub(super) fn fp_fused(&mut self, op: FpOp, fmt: FpFmt, a: ArgsFr4Rm) -> bool {
        let Some(rm) = rounding(a.rm) else { return false };
        self.fp_guard(rm);
        self.emit(Op::Fp { op, fmt, rm, d: f(a.rd), a: f(a.rs1), b: f(a.rs2), c: f(a.rs3) });
        self.fp_written();
        true
    }

    /// Rounded arithmetic on two operands.
    pub(super) fn fp_arith(&mut self, op: FpOp, fmt: FpFmt, a: ArgsFrRm) -> bool {
        let Some(rm) = rounding(a.rm) else { return false };
        self.fp_binary(op, fmt, rm, f(a.rd), a.rs1, a.rs2)
    }

    /// Sign injection, minimum and maximum: no rounding.
    pub(super) fn fp_exact(&mut self, op: FpOp, fmt: FpFmt, a: ArgsFr) -> bool {
        self.fp_binary(op, fmt, Rm::NearestEven, f(a.rd), a.rs1, a.rs2)
    }

    /// A comparison, to an integer register: it sets flags even where the result goes to x0.
    pub(super) fn fp_compare(&mut self, op: FpOp, fmt: FpFmt, a: ArgsFr) -> bool {
        let d = self.dest_or_temp(a.rd);
        self.fp_binary(op, fmt, Rm::NearestEven, d, a.rs1, a.rs2)
    }

    fn fp_binary(&mut self, op: FpOp, fmt: FpFmt, rm: Rm, d: Slot, rs1: i32, rs2: i32) -> bool {
        self.fp_guard(rm);
        self.emit(Op::Fp { op, fmt, rm, d, a: f(rs1), b: f(rs2), c: f(rs1) });
        self.fp_written();
        true
    }

    /// Square root and conversions between formats.
    pub(super) fn fp_unary(&mut self, op: FpOp, fmt: FpFmt, a: ArgsFr2Rm) -> bool {
        let Some(rm) = rounding(a.rm) else { return false };
        self.fp_guard(rm);
        self.fp_one(op, fmt, rm, f(a.rd), f(a.rs1));
        self.fp_written();
        true
    }

    /// Conversion to an integer: it sets flags even where the result goes to x0.
    pub(super) fn fp_to_int(&mut self, op: FpOp, fmt: FpFmt, a: ArgsFr2Rm) -> bool {
        let Some(rm) = rounding(a.rm) else { return false };
        self.fp_guard(rm);
        let d = self.dest_or_temp(a.rd);
        self.fp_one(op, fmt, rm, d, f(a.rs1));
        self.fp_written();
        true
    }

    /// Conversion from an integer.
    pub(super) fn fp_from_int(&mut self, op: FpOp, fmt: FpFmt, a: ArgsFr2Rm) -> bool {
        let Some(rm) = rounding(a.rm) else { return false };
        self.fp_guard(rm);
        let source = self.x_slot(a.rs1);
        self.fp_one(op, fmt, rm, f(a.rd), source);
        self.fp_written();
        true
    }

    /// `fmv.x.*` and `fclass`: read a floating-point register and touch no floating-point state.
    pub(super) fn fp_to_x(&mut self, op: FpOp, fmt: FpFmt, a: ArgsR2) -> bool {
        self.fp_guard(Rm::NearestEven);
        if a.rd != 0 {
            let d = self.dest(a.rd);
            self.fp_one(op, fmt, Rm::NearestEven, d, f(a.rs1));
        }
        true
    }

    /// `fmv.*.x`
    pub(super) fn fp_from_x(&mut self, fmt: FpFmt, a: ArgsR2) -> bool {
        self.fp_guard(Rm::NearestEven);
        let source = self.x_slot(a.rs1);
        self.fp_one(FpOp::MvFromInt, fmt, Rm::NearestEven, f(a.rd), source);
        self.fp_written();
        true
    }

    fn fp_one(&mut self, op: FpOp, fmt: FpFmt, rm: Rm, d: Slot, a: Slot) {
        self.emit(Op::Fp { op, fmt, rm, d, a, b: a, c: a });
    }
}
