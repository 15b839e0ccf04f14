//! IEEE 754 arithmetic in integers, the reference for guest floating point.
//!
//! Numbers are bit patterns: a `u32` is a binary32, a `u64` a binary64, and the functions are generic over
//! the two by [`Float`]. Results and exception flags are exact in every rounding mode.

mod arith;
mod compare;
mod convert;
mod format;
pub mod riscv;
mod status;

pub use arith::{add, div, fma, fma_negate, mul, sqrt, sub};
pub use compare::{
    FloatClass, classify, compare, eq, eq_signalling, le, le_quiet, lt, lt_quiet, max, min,
};
pub use convert::{
    convert, f32_to_f64, f64_to_f32, from_i32, from_i64, from_u32, from_u64, round_to_int, to_i32,
    to_i64, to_u32, to_u64,
};
pub use format::Float;
pub use status::{Flags, FloatStatus, Rounding, Tininess};
