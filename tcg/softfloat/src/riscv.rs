//! RISC-V's F and D instructions on 64-bit floating-point registers (unprivileged specification, chapters
//! "F" and "D"): NaN boxing, canonical NaNs, and results in the form the register gets them.

use crate::arith::{add, div, fma_negate, mul, sqrt, sub};
use crate::compare::{classify, eq, le, lt, max, min};
use crate::convert::{f32_to_f64, f64_to_f32, from_i32, from_i64, from_u32, from_u64, to_i32, to_i64, to_u32, to_u64};
use crate::format::Float;
use crate::status::{FloatStatus, Rounding};

/// Upper bits of a register that holds a single ("NaN Boxing of Narrower Values").
const BOX: u64 = 0xffff_ffff_0000_0000;

/// Format of the result; for compares, classification and conversions to integers, of the source.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum FpFmt {
    F32,
    F64,
}

/// Rounding mode of an instruction.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Rm {
    NearestEven,
    ToZero,
    Down,
    Up,
    NearestMaxMag,
    /// The status's mode (`frm`).
    Dynamic,
}

impl Rm {
    /// The mode to round with, `dynamic` being that of `frm`.
    pub const fn resolve(self, dynamic: Rounding) -> Rounding {
        match self {
            Rm::NearestEven => Rounding::NearestEven,
            Rm::ToZero => Rounding::ToZero,
            Rm::Down => Rounding::Down,
            Rm::Up => Rounding::Up,
            Rm::NearestMaxMag => Rounding::NearestMaxMag,
            Rm::Dynamic => dynamic,
        }
    }
}

/// An operation, in the order and with the names of the IR's `FpOp`.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
#[repr(u8)]
pub enum RvFpOp {
    Add,
    Sub,
    Mul,
    Div,
    Sqrt,
    /// `a*b + c` (`fmadd`)
    MAdd,
    /// `a*b - c` (`fmsub`)
    MSub,
    /// `-(a*b) + c` (`fnmsub`)
    NMSub,
    /// `-(a*b) - c` (`fnmadd`)
    NMAdd,
    Min,
    Max,
    /// Quiet equality; 0 or 1.
    Eq,
    /// Signalling less-than; 0 or 1.
    Lt,
    /// Signalling less-or-equal; 0 or 1.
    Le,
    /// `fclass` mask.
    Class,
    /// `a` with the sign of `b`.
    Sgnj,
    /// `a` with the inverted sign of `b`.
    Sgnjn,
    /// `a` with its sign inverted if `b` is negative.
    Sgnjx,
    /// To a signed 32-bit integer, sign-extended.
    ToI32,
    /// To an unsigned 32-bit integer, sign-extended.
    ToU32,
    ToI64,
    ToU64,
    FromI32,
    FromU32,
    FromI64,
    FromU64,
    /// From the other format to `fmt`.
    CvtFmt,
    /// Raw bits to an integer register (`F32`: the low 32, sign-extended).
    MvToInt,
    /// Raw bits from an integer register (`F32`: the low 32, NaN-boxed).
    MvFromInt,
}

impl RvFpOp {
    /// Every operation, in order.
    pub const ALL: [RvFpOp; 29] = [
        RvFpOp::Add,
        RvFpOp::Sub,
        RvFpOp::Mul,
        RvFpOp::Div,
        RvFpOp::Sqrt,
        RvFpOp::MAdd,
        RvFpOp::MSub,
        RvFpOp::NMSub,
        RvFpOp::NMAdd,
        RvFpOp::Min,
        RvFpOp::Max,
        RvFpOp::Eq,
        RvFpOp::Lt,
        RvFpOp::Le,
        RvFpOp::Class,
        RvFpOp::Sgnj,
        RvFpOp::Sgnjn,
        RvFpOp::Sgnjx,
        RvFpOp::ToI32,
        RvFpOp::ToU32,
        RvFpOp::ToI64,
        RvFpOp::ToU64,
        RvFpOp::FromI32,
        RvFpOp::FromU32,
        RvFpOp::FromI64,
        RvFpOp::FromU64,
        RvFpOp::CvtFmt,
        RvFpOp::MvToInt,
        RvFpOp::MvFromInt,
    ];

    /// The operation numbered `index` in declaration order.
    pub fn from_index(index: u8) -> Option<RvFpOp> {
        RvFpOp::ALL.get(usize::from(index)).copied()
    }
}

/// A format as it is held in a register.
trait Register: Float {
    /// Reads an operand; a single that is not NaN-boxed reads as the canonical NaN.
    fn from_register(value: u64) -> Self;
    /// The register value of a result.
    fn to_register(self) -> u64;
}

impl Register for u32 {
    fn from_register(value: u64) -> u32 {
        unbox(value)
    }

    fn to_register(self) -> u64 {
        nan_box(self)
    }
}

impl Register for u64 {
    fn from_register(value: u64) -> u64 {
        value
    }

    fn to_register(self) -> u64 {
        self
    }
}

/// The single held in a register, the canonical NaN if it is not NaN-boxed.
#[inline]
pub const fn unbox(value: u64) -> u32 {
    if value & BOX == BOX { value as u32 } else { <u32 as Float>::DEFAULT_NAN as u32 }
}

/// The register value of a single.
#[inline]
pub const fn nan_box(single: u32) -> u64 {
    BOX | single as u64
}

/// Executes one operation. `a`, `b`, `c` are register values (integer registers for `From*` and `MvFromInt`),
/// as is the result (an integer register's for compares, `Class`, `To*` and `MvToInt`). Operands an operation
/// does not have are ignored, and so is `rm` by operations that do not round.
///
/// Of `status`, `rounding` is read for [`Rm::Dynamic`] and `flags` is added to. Its other settings do not
/// matter: tininess is detected after rounding and NaN results are canonical.
pub fn exec(op: RvFpOp, fmt: FpFmt, rm: Rm, a: u64, b: u64, c: u64, status: &mut FloatStatus) -> u64 {
    let mut st = FloatStatus::riscv(rm.resolve(status.rounding));
    let result = match (op, fmt) {
        (RvFpOp::CvtFmt, FpFmt::F32) => f64_to_f32(a, &mut st).to_register(),
        (RvFpOp::CvtFmt, FpFmt::F64) => f32_to_f64(unbox(a), &mut st),
        (RvFpOp::MvToInt, FpFmt::F32) => sext(a as u32),
        (RvFpOp::MvFromInt, FpFmt::F32) => nan_box(a as u32),
        (RvFpOp::MvToInt | RvFpOp::MvFromInt, FpFmt::F64) => a,
        (_, FpFmt::F32) => exec_fmt::<u32>(op, a, b, c, &mut st),
        (_, FpFmt::F64) => exec_fmt::<u64>(op, a, b, c, &mut st),
    };
    status.flags |= st.flags;
    result
}

/// Sign-extends 32 bits.
const fn sext(word: u32) -> u64 {
    word as i32 as u64
}

/// The operations that are the same in both formats.
fn exec_fmt<F: Register>(op: RvFpOp, a: u64, b: u64, c: u64, st: &mut FloatStatus) -> u64 {
    let (fa, fb, fc) = (F::from_register(a), F::from_register(b), F::from_register(c));
    match op {
        RvFpOp::Add => add(fa, fb, st).to_register(),
        RvFpOp::Sub => sub(fa, fb, st).to_register(),
        RvFpOp::Mul => mul(fa, fb, st).to_register(),
        RvFpOp::Div => div(fa, fb, st).to_register(),
        RvFpOp::Sqrt => sqrt(fa, st).to_register(),
        RvFpOp::MAdd => fma_negate(fa, fb, fc, false, false, st).to_register(),
        RvFpOp::MSub => fma_negate(fa, fb, fc, false, true, st).to_register(),
        RvFpOp::NMSub => fma_negate(fa, fb, fc, true, false, st).to_register(),
        RvFpOp::NMAdd => fma_negate(fa, fb, fc, true, true, st).to_register(),
        RvFpOp::Min => min(fa, fb, st).to_register(),
        RvFpOp::Max => max(fa, fb, st).to_register(),
        RvFpOp::Eq => u64::from(eq(fa, fb, st)),
        RvFpOp::Lt => u64::from(lt(fa, fb, st)),
        RvFpOp::Le => u64::from(le(fa, fb, st)),
        RvFpOp::Class => classify(fa).mask(),
        RvFpOp::Sgnj => sign_inject(fa, fb.sign()),
        RvFpOp::Sgnjn => sign_inject(fa, !fb.sign()),
        RvFpOp::Sgnjx => sign_inject(fa, fa.sign() ^ fb.sign()),
        RvFpOp::ToI32 => to_i32(fa, st) as u64,
        RvFpOp::ToU32 => sext(to_u32(fa, st)),
        RvFpOp::ToI64 => to_i64(fa, st) as u64,
        RvFpOp::ToU64 => to_u64(fa, st),
        RvFpOp::FromI32 => from_i32::<F>(a as i32, st).to_register(),
        RvFpOp::FromU32 => from_u32::<F>(a as u32, st).to_register(),
        RvFpOp::FromI64 => from_i64::<F>(a as i64, st).to_register(),
        RvFpOp::FromU64 => from_u64::<F>(a, st).to_register(),
        // `exec` deals with these three, which are not the same in both formats.
        RvFpOp::CvtFmt | RvFpOp::MvToInt | RvFpOp::MvFromInt => a,
    }
}

/// `a` with its sign replaced. Not arithmetic: NaNs keep their payload and raise nothing.
fn sign_inject<F: Register>(a: F, sign: bool) -> u64 {
    let magnitude = a.to_raw() & !F::SIGN;
    F::from_raw(if sign { magnitude | F::SIGN } else { magnitude }).to_register()
}
