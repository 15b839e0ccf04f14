//! The binary formats, and the two ends of every operation: taking an operand apart and rounding an exact
//! result into the format.

use crate::status::{Flags, FloatStatus, Rounding, Tininess};
use std::fmt::Debug;

mod sealed {
    pub trait Sealed {}
    impl Sealed for u32 {}
    impl Sealed for u64 {}
}

/// A bit pattern of an IEEE 754 binary interchange format: `u32` is binary32, `u64` is binary64.
pub trait Float: Copy + Eq + Debug + sealed::Sealed + 'static {
    /// Bits of the stored fraction.
    const FRAC_BITS: u32;
    /// Bits of the exponent field.
    const EXP_BITS: u32;

    /// The bit pattern, zero-extended.
    fn to_raw(self) -> u64;
    /// The low bits of `raw` as a bit pattern.
    fn from_raw(raw: u64) -> Self;

    /// Significant bits of a normal number, with the implicit one.
    const PRECISION: u32 = Self::FRAC_BITS + 1;
    /// Largest exponent of a finite number; also the exponent's bias.
    const EMAX: i32 = (1 << (Self::EXP_BITS - 1)) - 1;
    /// Exponent of the smallest normal number.
    const EMIN: i32 = 1 - Self::EMAX;
    /// The sign bit.
    const SIGN: u64 = 1 << (Self::FRAC_BITS + Self::EXP_BITS);
    /// The fraction field.
    const FRAC_MASK: u64 = (1 << Self::FRAC_BITS) - 1;
    /// Positive infinity, also the exponent field's mask.
    const INFINITY: u64 = ((1 << Self::EXP_BITS) - 1) << Self::FRAC_BITS;
    /// The fraction's top bit, set in a quiet NaN.
    const QUIET: u64 = 1 << (Self::FRAC_BITS - 1);
    /// The canonical NaN.
    const DEFAULT_NAN: u64 = Self::INFINITY | Self::QUIET;

    /// Whether the sign bit is set.
    #[inline]
    fn sign(self) -> bool {
        self.to_raw() & Self::SIGN != 0
    }

    /// Whether it is a NaN of either kind.
    #[inline]
    fn is_nan(self) -> bool {
        self.to_raw() & !Self::SIGN > Self::INFINITY
    }

    /// Whether it is a signalling NaN.
    #[inline]
    fn is_signalling_nan(self) -> bool {
        self.is_nan() && self.to_raw() & Self::QUIET == 0
    }
}

impl Float for u32 {
    const FRAC_BITS: u32 = 23;
    const EXP_BITS: u32 = 8;

    #[inline]
    fn to_raw(self) -> u64 {
        u64::from(self)
    }

    #[inline]
    fn from_raw(raw: u64) -> u32 {
        raw as u32
    }
}

impl Float for u64 {
    const FRAC_BITS: u32 = 52;
    const EXP_BITS: u32 = 11;

    #[inline]
    fn to_raw(self) -> u64 {
        self
    }

    #[inline]
    fn from_raw(raw: u64) -> u64 {
        raw
    }
}

/// What an operand is; NaNs are dealt with before it is asked.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Kind {
    Zero,
    Finite,
    Infinite,
}

/// An operand taken apart. A `Finite` one is `±(sig / 2^63) * 2^exp` with bit 63 of `sig` set.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Unpacked {
    pub kind: Kind,
    pub sign: bool,
    pub exp: i32,
    pub sig: u64,
}

/// Takes a number apart. A NaN must have been dealt with: it would come out as an infinity.
#[inline]
pub(crate) fn unpack<F: Float>(f: F) -> Unpacked {
    let raw = f.to_raw();
    let sign = raw & F::SIGN != 0;
    let frac = raw & F::FRAC_MASK;
    let field = ((raw & F::INFINITY) >> F::FRAC_BITS) as i32;
    if raw & F::INFINITY == F::INFINITY {
        Unpacked { kind: Kind::Infinite, sign, exp: 0, sig: 0 }
    } else if field != 0 {
        let sig = 1 << 63 | frac << (63 - F::FRAC_BITS);
        Unpacked { kind: Kind::Finite, sign, exp: field - F::EMAX, sig }
    } else if frac != 0 {
        let lead = frac.leading_zeros();
        let exp = F::EMIN + 63 - F::FRAC_BITS as i32 - lead as i32;
        Unpacked { kind: Kind::Finite, sign, exp, sig: frac << lead }
    } else {
        Unpacked { kind: Kind::Zero, sign, exp: 0, sig: 0 }
    }
}

/// `raw` with its sign bit set to `sign`; `raw` must have it clear.
#[inline]
pub(crate) fn with_sign<F: Float>(sign: bool, raw: u64) -> F {
    F::from_raw(if sign { raw | F::SIGN } else { raw })
}

/// A zero of the given sign.
#[inline]
pub(crate) fn zero<F: Float>(sign: bool) -> F {
    with_sign(sign, 0)
}

/// An infinity of the given sign.
#[inline]
pub(crate) fn infinity<F: Float>(sign: bool) -> F {
    with_sign(sign, F::INFINITY)
}

/// Sign of an exact zero sum of numbers that are not both of one sign (IEEE 754-2019, 6.3).
#[inline]
pub(crate) fn zero_sum<F: Float>(st: &FloatStatus) -> F {
    zero(st.rounding == Rounding::Down)
}

/// Result of an invalid operation on numbers.
#[cold]
pub(crate) fn invalid<F: Float>(st: &mut FloatStatus) -> F {
    st.raise(Flags::NV);
    F::from_raw(F::DEFAULT_NAN)
}

/// Result of an operation with a NaN among `operands`, in order of preference; raises NV for a signalling
/// one.
#[cold]
pub(crate) fn propagate_nan<F: Float>(operands: &[F], st: &mut FloatStatus) -> F {
    if operands.iter().any(|f| f.is_signalling_nan()) {
        st.raise(Flags::NV);
    }
    match operands.iter().find(|f| f.is_nan()) {
        Some(nan) if !st.default_nan => F::from_raw(nan.to_raw() | F::QUIET),
        _ => F::from_raw(F::DEFAULT_NAN),
    }
}

/// `sig >> shift`, with the lowest bit set if any bit shifted out was.
#[inline]
pub(crate) fn shift_right_jam(sig: u64, shift: u32) -> u64 {
    match shift {
        0 => sig,
        1..=63 => sig >> shift | u64::from(sig << (64 - shift) != 0),
        _ => u64::from(sig != 0),
    }
}

/// `shift_right_jam` on 128 bits.
#[inline]
pub(crate) fn shift_right_jam128(sig: u128, shift: u32) -> u128 {
    match shift {
        0 => sig,
        1..=127 => sig >> shift | u128::from(sig << (128 - shift) != 0),
        _ => u128::from(sig != 0),
    }
}

/// `sig / 2^shift` rounded to an integer for a number of the given sign, and whether that was inexact.
#[inline]
pub(crate) fn round_shift(sig: u64, shift: u32, sign: bool, mode: Rounding) -> (u64, bool) {
    let (quotient, rest, half) = match shift {
        0 => return (sig, false),
        1..=63 => (sig >> shift, sig & ((1 << shift) - 1), 1 << (shift - 1)),
        64 => (0, sig, 1 << 63),
        _ => (0, u64::from(sig != 0), 2),
    };
    let away = match mode {
        Rounding::NearestEven => rest > half || (rest == half && quotient & 1 == 1),
        Rounding::ToZero => false,
        Rounding::Down => sign && rest != 0,
        Rounding::Up => !sign && rest != 0,
        Rounding::NearestMaxMag => rest >= half,
    };
    (quotient + u64::from(away), rest != 0)
}

/// Rounds `±(sig / 2^63) * 2^exp` into the format. Bit 63 of `sig` must be set; bit 0 stands for itself and
/// everything below it (it is sticky).
pub(crate) fn round_pack<F: Float>(sign: bool, exp: i32, sig: u64, st: &mut FloatStatus) -> F {
    debug_assert!(sig >> 63 == 1, "significand not normalised: {sig:#x}");
    if exp < F::EMIN {
        return round_subnormal(sign, exp, sig, st);
    }
    let (rounded, inexact) = round_shift(sig, 64 - F::PRECISION, sign, st.rounding);
    let carry = (rounded >> F::PRECISION) as i32;
    if exp + carry > F::EMAX {
        return overflow(sign, st);
    }
    if inexact {
        st.raise(Flags::NX);
    }
    // The implicit one adds 1 to the exponent field, a carry out of the significand another 1.
    with_sign(sign, (((exp + F::EMAX - 1) as u64) << F::FRAC_BITS) + rounded)
}

/// `round_pack` below the smallest normal number, where precision is lost bit by bit.
fn round_subnormal<F: Float>(sign: bool, exp: i32, sig: u64, st: &mut FloatStatus) -> F {
    let shift = 64 - F::PRECISION;
    let (rounded, inexact) = round_shift(sig, shift + (F::EMIN - exp) as u32, sign, st.rounding);
    if inexact {
        st.raise(Flags::NX);
        let tiny = st.tininess == Tininess::BeforeRounding
            || exp < F::EMIN - 1
            || round_shift(sig, shift, sign, st.rounding).0 >> F::PRECISION == 0;
        if tiny {
            st.raise(Flags::UF);
        }
    }
    with_sign(sign, rounded)
}

/// Result and flags of a rounded result beyond the largest finite number (IEEE 754-2019, 7.4).
#[cold]
fn overflow<F: Float>(sign: bool, st: &mut FloatStatus) -> F {
    st.raise(Flags::OF | Flags::NX);
    let to_infinity = match st.rounding {
        Rounding::NearestEven | Rounding::NearestMaxMag => true,
        Rounding::ToZero => false,
        Rounding::Down => sign,
        Rounding::Up => !sign,
    };
    with_sign(sign, F::INFINITY - u64::from(!to_infinity))
}

/// Rounds `±(sig / 2^126) * 2^exp`, for any `sig` but zero whose lowest bit is sticky.
pub(crate) fn round_pack_wide<F: Float>(sign: bool, exp: i32, sig: u128, st: &mut FloatStatus) -> F {
    let lead = sig.leading_zeros();
    let sig = shift_right_jam128(sig << lead, 64) as u64;
    round_pack(sign, exp + 1 - lead as i32, sig, st)
}
