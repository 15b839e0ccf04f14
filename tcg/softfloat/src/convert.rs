//! Conversions between floating-point formats and to and from integers, and rounding to an integral number.

use crate::format::{Float, Kind, infinity, propagate_nan, round_pack, round_shift, unpack, with_sign, zero};
use crate::status::{Flags, FloatStatus};

/// A float as a float of another format (or the same, which makes a NaN quiet and changes nothing else). A
/// NaN's payload keeps its upper bits unless the status asks for the default NaN.
pub fn convert<S: Float, D: Float>(a: S, st: &mut FloatStatus) -> D {
    if a.is_nan() {
        let nan = propagate_nan(&[a], st).to_raw();
        let payload = nan & S::FRAC_MASK;
        let frac = if S::FRAC_BITS > D::FRAC_BITS {
            payload >> (S::FRAC_BITS - D::FRAC_BITS)
        } else {
            payload << (D::FRAC_BITS - S::FRAC_BITS)
        };
        return with_sign(nan & S::SIGN != 0, D::INFINITY | frac);
    }
    let x = unpack(a);
    match x.kind {
        Kind::Zero => zero(x.sign),
        Kind::Infinite => infinity(x.sign),
        Kind::Finite => round_pack(x.sign, x.exp, x.sig, st),
    }
}

/// binary32 to binary64, exact.
pub fn f32_to_f64(a: u32, st: &mut FloatStatus) -> u64 {
    convert(a, st)
}

/// binary64 to binary32.
pub fn f64_to_f32(a: u64, st: &mut FloatStatus) -> u32 {
    convert(a, st)
}

/// `a` rounded to an integral number of the same format and sign; raises NX for a change only if asked to
/// (IEEE 754-2019, 5.9: roundToIntegralExact).
pub fn round_to_int<F: Float>(a: F, signal_inexact: bool, st: &mut FloatStatus) -> F {
    if a.is_nan() {
        return propagate_nan(&[a], st);
    }
    let x = unpack(a);
    if x.kind != Kind::Finite || x.exp >= F::FRAC_BITS as i32 {
        return a;
    }
    let (integer, inexact) = round_shift(x.sig, (63 - x.exp) as u32, x.sign, st.rounding);
    if inexact && signal_inexact {
        st.raise(Flags::NX);
    }
    if integer == 0 {
        return zero(x.sign);
    }
    // At most PRECISION bits: packing it is exact.
    let lead = integer.leading_zeros();
    round_pack(x.sign, 63 - lead as i32, integer << lead, st)
}

/// An integer rounded from a float, and whether it fits: `Err(sign)` for a magnitude beyond 64 bits and for a
/// NaN, which counts as positive.
fn to_magnitude<F: Float>(a: F, st: &FloatStatus) -> Result<(bool, u64, bool), bool> {
    if a.is_nan() {
        return Err(false);
    }
    let x = unpack(a);
    match x.kind {
        Kind::Zero => Ok((x.sign, 0, false)),
        Kind::Finite if x.exp < 64 => {
            let (magnitude, inexact) = round_shift(x.sig, (63 - x.exp) as u32, x.sign, st.rounding);
            Ok((x.sign, magnitude, inexact))
        }
        _ => Err(x.sign),
    }
}

/// Rounds to an integer in `min..=max`. Whatever does not fit gives the nearer bound, a NaN `max`, and raises
/// NV alone (RISC-V unprivileged specification, "F" chapter, table of invalid inputs to `fcvt`).
fn to_int<F: Float>(a: F, min: i64, max: u64, st: &mut FloatStatus) -> i128 {
    let value = match to_magnitude(a, st) {
        Ok((sign, magnitude, inexact)) => {
            let value = if sign { -i128::from(magnitude) } else { i128::from(magnitude) };
            if (i128::from(min)..=i128::from(max)).contains(&value) {
                if inexact {
                    st.raise(Flags::NX);
                }
                return value;
            }
            value
        }
        Err(true) => i128::MIN,
        Err(false) => i128::MAX,
    };
    st.raise(Flags::NV);
    value.clamp(i128::from(min), i128::from(max))
}

/// To a signed 32-bit integer, saturating.
pub fn to_i32<F: Float>(a: F, st: &mut FloatStatus) -> i32 {
    to_int(a, i64::from(i32::MIN), i32::MAX as u64, st) as i32
}

/// To an unsigned 32-bit integer, saturating; a negative number that does not round to zero gives 0 and NV.
pub fn to_u32<F: Float>(a: F, st: &mut FloatStatus) -> u32 {
    to_int(a, 0, u64::from(u32::MAX), st) as u32
}

/// To a signed 64-bit integer, saturating.
pub fn to_i64<F: Float>(a: F, st: &mut FloatStatus) -> i64 {
    to_int(a, i64::MIN, i64::MAX as u64, st) as i64
}

/// To an unsigned 64-bit integer, saturating; a negative number that does not round to zero gives 0 and NV.
pub fn to_u64<F: Float>(a: F, st: &mut FloatStatus) -> u64 {
    to_int(a, 0, u64::MAX, st) as u64
}

fn from_magnitude<F: Float>(sign: bool, magnitude: u64, st: &mut FloatStatus) -> F {
    if magnitude == 0 {
        return zero(false);
    }
    let lead = magnitude.leading_zeros();
    round_pack(sign, 63 - lead as i32, magnitude << lead, st)
}

/// From a signed 32-bit integer.
pub fn from_i32<F: Float>(i: i32, st: &mut FloatStatus) -> F {
    from_magnitude(i < 0, u64::from(i.unsigned_abs()), st)
}

/// From an unsigned 32-bit integer.
pub fn from_u32<F: Float>(i: u32, st: &mut FloatStatus) -> F {
    from_magnitude(false, u64::from(i), st)
}

/// From a signed 64-bit integer.
pub fn from_i64<F: Float>(i: i64, st: &mut FloatStatus) -> F {
    from_magnitude(i < 0, i.unsigned_abs(), st)
}

/// From an unsigned 64-bit integer.
pub fn from_u64<F: Float>(i: u64, st: &mut FloatStatus) -> F {
    from_magnitude(false, i, st)
}
