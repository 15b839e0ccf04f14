//! Comparison, minimum and maximum, and classification.

use crate::format::{Float, propagate_nan};
use crate::status::{Flags, FloatStatus};
use std::cmp::Ordering;

/// The number as an integer in the same order, with -0 just below +0.
fn order_key<F: Float>(f: F) -> i64 {
    let magnitude = (f.to_raw() & !F::SIGN) as i64;
    if f.sign() { !magnitude } else { magnitude }
}

/// Order of `a` and `b`, `None` if either is a NaN. That raises NV if `signalling`, else only for a
/// signalling NaN.
pub fn compare<F: Float>(a: F, b: F, signalling: bool, st: &mut FloatStatus) -> Option<Ordering> {
    if a.is_nan() || b.is_nan() {
        if signalling || a.is_signalling_nan() || b.is_signalling_nan() {
            st.raise(Flags::NV);
        }
        return None;
    }
    if (a.to_raw() | b.to_raw()) & !F::SIGN == 0 {
        return Some(Ordering::Equal);
    }
    Some(order_key(a).cmp(&order_key(b)))
}

/// `a == b`, quiet.
pub fn eq<F: Float>(a: F, b: F, st: &mut FloatStatus) -> bool {
    compare(a, b, false, st) == Some(Ordering::Equal)
}

/// `a < b`, signalling.
pub fn lt<F: Float>(a: F, b: F, st: &mut FloatStatus) -> bool {
    compare(a, b, true, st) == Some(Ordering::Less)
}

/// `a <= b`, signalling.
pub fn le<F: Float>(a: F, b: F, st: &mut FloatStatus) -> bool {
    matches!(compare(a, b, true, st), Some(Ordering::Less | Ordering::Equal))
}

/// `a == b`, signalling.
pub fn eq_signalling<F: Float>(a: F, b: F, st: &mut FloatStatus) -> bool {
    compare(a, b, true, st) == Some(Ordering::Equal)
}

/// `a < b`, quiet.
pub fn lt_quiet<F: Float>(a: F, b: F, st: &mut FloatStatus) -> bool {
    compare(a, b, false, st) == Some(Ordering::Less)
}

/// `a <= b`, quiet.
pub fn le_quiet<F: Float>(a: F, b: F, st: &mut FloatStatus) -> bool {
    matches!(compare(a, b, false, st), Some(Ordering::Less | Ordering::Equal))
}

/// minimumNumber (IEEE 754-2019, 9.6): -0 is below +0, one NaN gives the other operand, and a signalling NaN
/// raises NV (RISC-V's `fmin` since version 2.2 of F).
pub fn min<F: Float>(a: F, b: F, st: &mut FloatStatus) -> F {
    select(a, b, Ordering::Less, st)
}

/// maximumNumber, with the rules of [`min`].
pub fn max<F: Float>(a: F, b: F, st: &mut FloatStatus) -> F {
    select(a, b, Ordering::Greater, st)
}

/// `a` if it compares to `b` as `wanted`, else `b`.
fn select<F: Float>(a: F, b: F, wanted: Ordering, st: &mut FloatStatus) -> F {
    match (a.is_nan(), b.is_nan()) {
        (false, false) if order_key(a).cmp(&order_key(b)) == wanted => a,
        (false, false) => b,
        (true, true) => propagate_nan(&[a, b], st),
        (a_nan, _) => {
            if a.is_signalling_nan() || b.is_signalling_nan() {
                st.raise(Flags::NV);
            }
            if a_nan { b } else { a }
        }
    }
}

/// Class of a number. The discriminants are the bit numbers of RISC-V's `fclass` mask.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
#[repr(u8)]
pub enum FloatClass {
    NegativeInfinity = 0,
    NegativeNormal = 1,
    NegativeSubnormal = 2,
    NegativeZero = 3,
    PositiveZero = 4,
    PositiveSubnormal = 5,
    PositiveNormal = 6,
    PositiveInfinity = 7,
    SignallingNan = 8,
    QuietNan = 9,
}

impl FloatClass {
    /// The result of RISC-V's `fclass`: one bit set.
    pub const fn mask(self) -> u64 {
        1 << self as u8
    }
}

/// Class of `a`; raises nothing.
pub fn classify<F: Float>(a: F) -> FloatClass {
    let magnitude = a.to_raw() & !F::SIGN;
    let (negative, positive) = if a.is_nan() {
        return if a.is_signalling_nan() { FloatClass::SignallingNan } else { FloatClass::QuietNan };
    } else if magnitude == F::INFINITY {
        (FloatClass::NegativeInfinity, FloatClass::PositiveInfinity)
    } else if magnitude > F::FRAC_MASK {
        (FloatClass::NegativeNormal, FloatClass::PositiveNormal)
    } else if magnitude != 0 {
        (FloatClass::NegativeSubnormal, FloatClass::PositiveSubnormal)
    } else {
        (FloatClass::NegativeZero, FloatClass::PositiveZero)
    };
    if a.sign() { negative } else { positive }
}
