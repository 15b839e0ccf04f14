//! IEEE 754 arithmetic in integers, the reference for guest floating point.
//!
//! Numbers are bit patterns: a `u32` is a binary32, a `u64` a binary64, and the functions are generic over
//! the two by [`Float`]. Results and exception flags are exact in every rounding mode; what an operation reads
//! beside its operands, and the flags it adds to, are in [`FloatStatus`]. [`riscv::exec`] runs one F or D
//! instruction on register values.
//!
//! It serves as the oracle that generated code is tested against, and at run time for what the host's
//! floating-point unit cannot do.
//!
//! # Where x86 SSE differs from RISC-V
//!
//! This is what a backend that runs RISC-V on SSE2, SSE4.1 and FMA instructions has to do beside them. MXCSR is
//! taken to have all exceptions masked and FTZ and DAZ clear. Results and flags not listed agree, which
//! `tests/host_sse.rs` checks: in particular both detect tininess after rounding, and raise underflow for
//! inexact results only.
//!
//! Flags: MXCSR has IE=0, DE=1, ZE=2, OE=3, UE=4, PE=5; `fflags` has NX=0, UF=1, OF=2, DZ=3, NV=4. DE (a
//! subnormal operand) has no counterpart and is dropped.
//!
//! | Operation | x86 SSE | RISC-V | Fixup |
//! |---|---|---|---|
//! | any, single operands | low 32 bits of the register | a register whose upper half is not all ones reads as the canonical NaN (not so `fmv.x.w`, `fsw`) | check the box unless the value is known to be boxed |
//! | any, single results | upper half kept or zero | upper half all ones | box |
//! | add, sub, mul, div, sqrt, FMA: generated NaN (0/0, inf-inf, 0*inf, sqrt of a negative) | negative: `ffc00000`, `fff80000_00000000` | positive: `7fc00000`, `7ff80000_00000000` | if the result is unordered with itself, replace it with the canonical NaN |
//! | the same, NaN operand | first NaN source made quiet, with its sign and payload (FMA: by operand order of the form, 132/213/231) | canonical NaN | the same check |
//! | sqrt(-0), x + y = 0 exactly | -0; sign by rounding mode | same | none |
//! | `fmadd` and kin: (0*inf) + quiet NaN | no flag | NV | if the result is a NaN and `c` is a quiet NaN, go to software |
//! | `fnmsub` = -(a*b)+c, `fnmadd` = -(a*b)-c | `vfnmadd`, `vfnmsub`: the names are crossed | | pick the right one; do not negate the rounded result (exact zeros, directed modes) |
//! | `fmin`, `fmax`: zeros of both signs | second operand | -0 < +0 | equal operands: OR the bits for min, AND for max |
//! | `fmin`, `fmax`: one NaN | second operand, NaN or not; IE for quiet NaNs too | the number; NV for signalling only | unordered operands: go to software, and do not accumulate the instruction's IE |
//! | `feq` | `ucomis*` (IE for signalling only), unordered sets ZF | 0 if unordered | `sete` and `setnp` |
//! | `flt`, `fle` | `comis*` (IE for any NaN), unordered sets CF and ZF | 0 if unordered | swap the operands and use `seta`, `setae` |
//! | `fcvt.w`, `fcvt.l` out of range or NaN | "integer indefinite" (the minimum), IE | saturates; NaN gives the maximum; NV | if the result is the minimum and the operand is positive or a NaN, use the maximum. Flags agree |
//! | `fcvt.wu` | none: convert to 64 bits | saturates at 0 and 2^32-1, sign-extended; NV alone | if the 64-bit result does not fit: saturate and raise NV; PE of that conversion must not be accumulated |
//! | `fcvt.lu` | none before AVX-512 | saturates at 0 and 2^64-1 | results in [0, 2^63) as `fcvt.l`; else software. A number in (-1, 0) that rounds to zero gives 0 and NX |
//! | `fcvt.[sd].wu` | none: zero-extend and convert from 64 bits | | none |
//! | `fcvt.[sd].lu` | none before AVX-512 | | as `fcvt.l` below 2^63, else software |
//! | `fcvt.s.d`, `fcvt.d.s` of a NaN | keeps sign and upper payload | canonical NaN | as for arithmetic |
//! | `fsgnj*`, `fmv.*`, `fclass` | bit operations, no flag | same (but `fsgnj*.s` check the box) | do them in integer or logic instructions |
//! | any, rounding mode RMM | none | ties away from zero | software, unless the operation does not round (compares, `fmin`, `fmax`, `fcvt.d.s`, `fcvt.d.w[u]`) |
//! | any, other static or dynamic modes | MXCSR.RC: 0 nearest, 1 down, 2 up, 3 zero | `frm`: 0 RNE, 1 RTZ, 2 RDN, 3 RUP | load MXCSR when the mode changes; `cvtt*` rounds to zero whatever RC is |
//!
//! Reserved `frm` values (5 to 7) make an instruction that rounds dynamically illegal: that is the frontend's to
//! raise, and [`Rounding::from_frm`] gives `None` for them.

mod arith;
mod compare;
mod convert;
mod format;
pub mod riscv;
mod status;

pub use arith::{add, div, fma, fma_negate, mul, sqrt, sub};
pub use compare::{FloatClass, classify, compare, eq, eq_signalling, le, le_quiet, lt, lt_quiet, max, min};
pub use convert::{
    convert, f32_to_f64, f64_to_f32, from_i32, from_i64, from_u32, from_u64, round_to_int, to_i32, to_i64, to_u32,
    to_u64,
};
pub use format::Float;
pub use status::{Flags, FloatStatus, Rounding, Tininess};
