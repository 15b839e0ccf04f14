//! Addition, subtraction, multiplication, division, square root and fused multiply-add.

use crate::format::{
    Float, Kind, Unpacked, infinity, invalid, propagate_nan, round_pack, round_pack_wide, shift_right_jam,
    shift_right_jam128, unpack, with_sign, zero, zero_sum,
};
use crate::status::{Flags, FloatStatus};

/// `a + b`.
pub fn add<F: Float>(a: F, b: F, st: &mut FloatStatus) -> F {
    add_signed(a, b, false, st)
}

/// `a - b`.
pub fn sub<F: Float>(a: F, b: F, st: &mut FloatStatus) -> F {
    add_signed(a, b, true, st)
}

fn add_signed<F: Float>(a: F, b: F, negate_b: bool, st: &mut FloatStatus) -> F {
    if a.is_nan() || b.is_nan() {
        return propagate_nan(&[a, b], st);
    }
    let x = unpack(a);
    let mut y = unpack(b);
    y.sign ^= negate_b;
    match (x.kind, y.kind) {
        (Kind::Infinite, Kind::Infinite) if x.sign != y.sign => invalid(st),
        (Kind::Infinite, _) => a,
        (_, Kind::Infinite) => infinity(y.sign),
        (Kind::Zero, Kind::Zero) if x.sign == y.sign => a,
        (Kind::Zero, Kind::Zero) => zero_sum(st),
        (Kind::Zero, Kind::Finite) => with_sign(y.sign, b.to_raw() & !F::SIGN),
        (Kind::Finite, Kind::Zero) => a,
        (Kind::Finite, Kind::Finite) => add_finite(x, y, st),
    }
}

fn add_finite<F: Float>(x: Unpacked, y: Unpacked, st: &mut FloatStatus) -> F {
    let (big, small) = if (x.exp, x.sig) >= (y.exp, y.sig) { (x, y) } else { (y, x) };
    // One bit is free at the top for the carry. At least ten are free at the bottom, so that the sticky bit
    // stays below the rounding point: a shift by two or more loses at most one leading bit to cancellation.
    let aligned = shift_right_jam(small.sig >> 1, (big.exp - small.exp) as u32);
    let sum = if big.sign == small.sign { (big.sig >> 1) + aligned } else { (big.sig >> 1) - aligned };
    if sum == 0 {
        return zero_sum(st);
    }
    let lead = sum.leading_zeros();
    round_pack(big.sign, big.exp + 1 - lead as i32, sum << lead, st)
}

/// `a * b`.
pub fn mul<F: Float>(a: F, b: F, st: &mut FloatStatus) -> F {
    if a.is_nan() || b.is_nan() {
        return propagate_nan(&[a, b], st);
    }
    let (x, y) = (unpack(a), unpack(b));
    let sign = x.sign ^ y.sign;
    match (x.kind, y.kind) {
        (Kind::Infinite, Kind::Zero) | (Kind::Zero, Kind::Infinite) => invalid(st),
        (Kind::Infinite, _) | (_, Kind::Infinite) => infinity(sign),
        (Kind::Zero, _) | (_, Kind::Zero) => zero(sign),
        (Kind::Finite, Kind::Finite) => {
            let product = u128::from(x.sig) * u128::from(y.sig);
            round_pack_wide(sign, x.exp + y.exp, product, st)
        }
    }
}

/// `a / b`.
pub fn div<F: Float>(a: F, b: F, st: &mut FloatStatus) -> F {
    if a.is_nan() || b.is_nan() {
        return propagate_nan(&[a, b], st);
    }
    let (x, y) = (unpack(a), unpack(b));
    let sign = x.sign ^ y.sign;
    match (x.kind, y.kind) {
        (Kind::Infinite, Kind::Infinite) | (Kind::Zero, Kind::Zero) => invalid(st),
        (Kind::Infinite, _) => infinity(sign),
        (Kind::Zero, _) | (_, Kind::Infinite) => zero(sign),
        (Kind::Finite, Kind::Zero) => {
            st.raise(Flags::DZ);
            infinity(sign)
        }
        (Kind::Finite, Kind::Finite) => {
            // The quotient is in (2^62, 2^64): at least 63 bits, of which the format rounds off ten or more.
            let divisor = u128::from(y.sig);
            let dividend = u128::from(x.sig) << 63;
            let quotient = (dividend / divisor) as u64;
            let lead = quotient.leading_zeros();
            let sticky = u64::from(dividend % divisor != 0);
            round_pack(sign, x.exp - y.exp - lead as i32, quotient << lead | sticky, st)
        }
    }
}

/// Square root.
pub fn sqrt<F: Float>(a: F, st: &mut FloatStatus) -> F {
    if a.is_nan() {
        return propagate_nan(&[a], st);
    }
    let x = unpack(a);
    match (x.kind, x.sign) {
        (Kind::Zero, _) | (Kind::Infinite, false) => a,
        (_, true) => invalid(st),
        (Kind::Finite, false) => {
            // The root of [2^126, 2^128) is in [2^63, 2^64), normalised as it is.
            let radicand = u128::from(x.sig) << (63 + (x.exp & 1));
            let root = radicand.isqrt();
            let sticky = u64::from(root * root != radicand);
            round_pack(false, x.exp >> 1, root as u64 | sticky, st)
        }
    }
}

/// `a * b + c`, rounded once. Zero times infinity is invalid even if `c` is a quiet NaN (which IEEE 754-2019,
/// 7.2 leaves open and RISC-V settles).
pub fn fma<F: Float>(a: F, b: F, c: F, st: &mut FloatStatus) -> F {
    fma_negate(a, b, c, false, false, st)
}

/// `fma` with the product, the addend or both negated; the signs of NaNs are not touched.
pub fn fma_negate<F: Float>(a: F, b: F, c: F, negate_product: bool, negate_addend: bool, st: &mut FloatStatus) -> F {
    if a.is_nan() || b.is_nan() {
        return propagate_nan(&[a, b, c], st);
    }
    let (x, y) = (unpack(a), unpack(b));
    let product_invalid = matches!((x.kind, y.kind), (Kind::Infinite, Kind::Zero) | (Kind::Zero, Kind::Infinite));
    if product_invalid {
        st.raise(Flags::NV);
    }
    if c.is_nan() {
        return propagate_nan(&[c], st);
    }
    if product_invalid {
        return invalid(st);
    }
    let mut z = unpack(c);
    z.sign ^= negate_addend;
    let sign = x.sign ^ y.sign ^ negate_product;
    let addend = || with_sign(z.sign, c.to_raw() & !F::SIGN);
    if x.kind == Kind::Infinite || y.kind == Kind::Infinite {
        return if z.kind == Kind::Infinite && z.sign != sign { invalid(st) } else { infinity(sign) };
    }
    match (x.kind == Kind::Zero || y.kind == Kind::Zero, z.kind) {
        (_, Kind::Infinite) | (true, Kind::Finite) => addend(),
        (true, Kind::Zero) if sign == z.sign => zero(sign),
        (true, Kind::Zero) => zero_sum(st),
        (false, Kind::Zero) => round_pack_wide(sign, x.exp + y.exp, u128::from(x.sig) * u128::from(y.sig), st),
        (false, Kind::Finite) => fma_finite(sign, x, y, z, st),
    }
}

/// `±x*y + z` of finite non-zero numbers, `sign` being the product's.
fn fma_finite<F: Float>(sign: bool, x: Unpacked, y: Unpacked, z: Unpacked, st: &mut FloatStatus) -> F {
    // Both terms get their leading bit at 126, leaving 127 for the carry. Significands have at most 53
    // bits, so the product has 22 zeros at the bottom: halving it is exact, and so is aligning it unless
    // the shift is large enough that at most one leading bit can cancel.
    let mut product = u128::from(x.sig) * u128::from(y.sig);
    let mut exp = x.exp + y.exp;
    if product >> 127 != 0 {
        product >>= 1;
        exp += 1;
    }
    let addend = u128::from(z.sig) << 63;
    let product_bigger = (exp, product) >= (z.exp, addend);
    let (big, small, top, shift, sum_sign) = if product_bigger {
        (product, addend, exp, exp - z.exp, sign)
    } else {
        (addend, product, z.exp, z.exp - exp, z.sign)
    };
    let aligned = shift_right_jam128(small, shift as u32);
    let sum = if sign == z.sign { big + aligned } else { big - aligned };
    if sum == 0 {
        return zero_sum(st);
    }
    round_pack_wide(sum_sign, top, sum, st)
}
