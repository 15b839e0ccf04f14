//! Every rounding operation in all five modes and with both tininess rules, against the exact result in
//! integers of any size. What the host cannot check is checked here: rounding to nearest with ties away from
//! zero, tininess before rounding, and unsigned 64-bit integers.

mod common {
    pub mod big;
    mod operands;
    pub use operands::*;
}

use common::big::Exact;
use common::{Rng, trials};
use mimus_tcg_softfloat::*;
use std::cmp::Ordering;

/// An exact non-zero result: its sign, and how its magnitude compares to a given one.
struct Result<'a> {
    negative: bool,
    cmp: &'a dyn Fn(&Exact) -> Ordering,
}

/// Whether the mode rounds the magnitude up, given where the exact one lies between two neighbours (`None` if
/// it is the lower one) and whether the lower one is odd.
fn rounds_away(mode: Rounding, negative: bool, place: Option<Ordering>, odd: bool) -> bool {
    match (mode, place) {
        (_, None) | (Rounding::ToZero, _) => false,
        (Rounding::Down, _) => negative,
        (Rounding::Up, _) => !negative,
        (Rounding::NearestEven, Some(o)) => o == Ordering::Greater || (o == Ordering::Equal && odd),
        (Rounding::NearestMaxMag, Some(o)) => o != Ordering::Less,
    }
}

/// Whether the result is below the smallest normal number after rounding with an unbounded exponent.
fn tiny_after_rounding<F: Float>(exact: &Result<'_>, mode: Rounding) -> bool {
    let one = |mantissa, exp| Exact::new(false, mantissa, exp);
    if (exact.cmp)(&one(1, F::EMIN)) != Ordering::Less {
        return false;
    }
    // The largest number below it with full precision, and the middle between the two.
    let last = one((1 << F::PRECISION) - 1, F::EMIN - F::PRECISION as i32);
    let middle = one((1 << (F::PRECISION + 1)) - 1, F::EMIN - F::PRECISION as i32 - 1);
    if (exact.cmp)(&last) != Ordering::Greater {
        return true;
    }
    !rounds_away(mode, exact.negative, Some((exact.cmp)(&middle)), true)
}

/// Result and flags for an exact result. `guess` is only used to find the neighbours, which are then proved to
/// enclose the exact result.
fn reference<F: Float>(exact: &Result<'_>, guess: F, mode: Rounding, rule: Tininess) -> (F, Flags) {
    let value = |raw: u64| Exact::of(F::from_raw(raw));
    let guess = (guess.to_raw() & !F::SIGN).min(F::INFINITY);
    let limit = (exact.cmp)(&value(F::INFINITY)) != Ordering::Less;
    let lower = if limit {
        F::INFINITY - 1
    } else if (exact.cmp)(&value(guess)) != Ordering::Less {
        guess
    } else {
        guess.saturating_sub(1)
    };
    assert!((exact.cmp)(&value(lower)) != Ordering::Less, "guess {guess:#x} is too large");
    assert!(limit || (exact.cmp)(&value(lower + 1)) == Ordering::Less, "guess {guess:#x} is too small");
    let inexact = limit || (exact.cmp)(&value(lower)) != Ordering::Equal;
    let place = match limit {
        true => Some(Ordering::Greater),
        false => inexact.then(|| (exact.cmp)(&Exact::halfway::<F>(lower))),
    };
    let raw = lower + u64::from(rounds_away(mode, exact.negative, place, lower & 1 == 1));
    let mut flags = if inexact { Flags::NX } else { Flags::NONE };
    if limit || raw == F::INFINITY {
        flags |= Flags::OF;
    }
    let tiny = match rule {
        Tininess::AfterRounding => tiny_after_rounding::<F>(exact, mode),
        Tininess::BeforeRounding => (exact.cmp)(&Exact::new(false, 1, F::EMIN)) == Ordering::Less,
    };
    if tiny && inexact {
        flags |= Flags::UF;
    }
    (F::from_raw(if exact.negative { raw | F::SIGN } else { raw }), flags)
}

/// Checks `op` against the exact result.
fn check<F: Float>(
    what: &str,
    st: FloatStatus,
    negative: bool,
    cmp: &dyn Fn(&Exact) -> Ordering,
    op: impl Fn(&mut FloatStatus) -> F,
) {
    let mut after = st;
    let ours = op(&mut after);
    let expected = reference(&Result { negative, cmp }, ours, st.rounding, st.tininess);
    assert_eq!((ours, after.flags), expected, "{what} {st:?}");
}

/// `check` for a result that is itself a binary number, which may be zero.
fn check_exact<F: Float>(
    what: &str,
    st: FloatStatus,
    exact: &Exact,
    zero_sign: bool,
    op: impl Fn(&mut FloatStatus) -> F,
) {
    if !exact.is_zero() {
        return check(what, st, exact.negative, &|x| exact.cmp_magnitude(x), op);
    }
    let mut after = st;
    let ours = op(&mut after);
    assert_eq!(ours.to_raw(), if zero_sign { F::SIGN } else { 0 }, "{what} {st:?}: exact zero");
    assert_eq!(after.flags, Flags::NONE, "{what} {st:?}");
}

/// Sign of an exact zero sum of terms with these signs.
fn zero_sum_sign(a: bool, b: bool, mode: Rounding) -> bool {
    if a == b { a } else { mode == Rounding::Down }
}

fn random_status(rng: &mut Rng) -> FloatStatus {
    let rounding = match rng.below(2) {
        0 => Rounding::NearestMaxMag,
        _ => rng.rounding(&Rounding::ALL),
    };
    let tininess = if rng.below(4) == 0 { Tininess::BeforeRounding } else { Tininess::AfterRounding };
    FloatStatus { tininess, ..FloatStatus::riscv(rounding) }
}

fn is_finite<F: Float>(f: F) -> bool {
    f.to_raw() & F::INFINITY != F::INFINITY
}

fn one_trial<F: Float>(rng: &mut Rng) {
    let [a, b, c] = rng.triple::<F>();
    if ![a, b, c].into_iter().all(is_finite) {
        return;
    }
    let st = random_status(rng);
    let mode = st.rounding;
    let (x, y, z) = (Exact::of(a), Exact::of(b), Exact::of(c));
    let what = |op: &str| format!("{op} of {a:#x?} {b:#x?} {c:#x?}");

    let sign = zero_sum_sign(x.negative, y.negative, mode);
    check_exact(&what("add"), st, &x.add(&y), sign, |st| add(a, b, st));
    let sign = zero_sum_sign(x.negative, !y.negative, mode);
    check_exact(&what("sub"), st, &x.add(&y.clone().negate()), sign, |st| sub(a, b, st));
    let product = x.mul(&y);
    check_exact(&what("mul"), st, &product, product.negative, |st| mul(a, b, st));

    let (np, na) = (rng.below(2) == 1, rng.below(2) == 1);
    let term = if np { product.clone().negate() } else { product.clone() };
    let addend = if na { z.clone().negate() } else { z };
    let sign = zero_sum_sign(term.negative, addend.negative, mode);
    let sum = term.add(&addend);
    check_exact(&what("fma"), st, &sum, sign, |st| fma_negate(a, b, c, np, na, st));

    if !x.is_zero() && !y.is_zero() {
        // |a/b| compares to X as |a| to |X*b|.
        let cmp = |q: &Exact| x.cmp_magnitude(&q.mul(&y));
        check(&what("div"), st, product.negative, &cmp, |st| div(a, b, st));
    }
    if !x.is_zero() && !x.negative {
        check(&what("sqrt"), st, false, &|r| x.cmp_magnitude(&r.mul(r)), |st| sqrt(a, st));
    }
}

#[test]
fn arithmetic_f32() {
    let mut rng = Rng(101);
    for _ in 0..trials(60_000) {
        one_trial::<u32>(&mut rng);
    }
}

#[test]
fn arithmetic_f64() {
    let mut rng = Rng(102);
    for _ in 0..trials(60_000) {
        one_trial::<u64>(&mut rng);
    }
}

#[test]
fn narrowing() {
    let mut rng = Rng(103);
    for _ in 0..trials(150_000) {
        let st = random_status(&mut rng);
        let wide = f32_to_f64(rng.finite::<u32>(), &mut FloatStatus::default());
        // Halfway cases have bit 28 and nothing below.
        let near = match rng.below(3) {
            0 => wide ^ 1 << 28,
            1 => wide ^ (rng.next() >> (34 + rng.below(30))),
            _ => rng.finite::<u64>(),
        };
        let exact = Exact::of(near);
        if is_finite(near) {
            let what = format!("f64_to_f32 of {near:#x}");
            check_exact(&what, st, &exact, exact.negative, |st| f64_to_f32(near, st));
        }
    }
}

#[test]
fn from_integers() {
    let mut rng = Rng(104);
    for _ in 0..trials(100_000) {
        let st = random_status(&mut rng);
        let mut u = rng.next() >> rng.below(64);
        if rng.below(3) == 0 {
            // A tie, or next to one, in either format.
            u = (u | 1) << rng.below(64);
            u = u.wrapping_add(rng.below(3)).wrapping_sub(1);
        }
        let i = u as i64;
        let (ue, ie) = (Exact::new(false, u, 0), Exact::new(i < 0, i.unsigned_abs(), 0));
        check_exact(&format!("u64 {u}"), st, &ue, false, |st| from_u64::<u32>(u, st));
        check_exact(&format!("u64 {u}"), st, &ue, false, |st| from_u64::<u64>(u, st));
        check_exact(&format!("i64 {i}"), st, &ie, false, |st| from_i64::<u32>(i, st));
        check_exact(&format!("i64 {i}"), st, &ie, false, |st| from_i64::<u64>(i, st));
        let (u, i) = (u as u32, i as i32);
        let (ue, ie) = (Exact::new(false, u.into(), 0), Exact::new(i < 0, i.unsigned_abs().into(), 0));
        check_exact(&format!("u32 {u}"), st, &ue, false, |st| from_u32::<u32>(u, st));
        check_exact(&format!("i32 {i}"), st, &ie, false, |st| from_i32::<u32>(i, st));
        check_exact(&format!("u32 {u}"), st, &ue, false, |st| from_u32::<u64>(u, st));
        check_exact(&format!("i32 {i}"), st, &ie, false, |st| from_i32::<u64>(i, st));
    }
}

/// `f` rounded to an integer, exactly (magnitudes of 2^100 and more are given as 2^100), and whether it changed.
fn rounded<F: Float>(f: F, mode: Rounding) -> (i128, bool) {
    let raw = f.to_raw();
    let field = (raw & F::INFINITY) >> F::FRAC_BITS;
    let mantissa = i128::from(raw & F::FRAC_MASK | u64::from(field != 0) << F::FRAC_BITS);
    let exp = field.max(1) as i32 - F::EMAX - F::FRAC_BITS as i32;
    let (integer, inexact) = if exp >= 0 {
        (if exp < 70 { mantissa << exp } else { 1 << 100 }, false)
    } else {
        let down = (-exp).min(100);
        let lower = mantissa >> down;
        let rest = mantissa - (lower << down);
        let place = (rest != 0).then(|| (rest * 2).cmp(&(1 << down)));
        (lower + i128::from(rounds_away(mode, f.sign(), place, lower & 1 == 1)), rest != 0)
    };
    (if f.sign() { -integer } else { integer }, inexact)
}

fn to_integers<F: Float>(rng: &mut Rng) {
    let a = rng.operand::<F>();
    let st = random_status(rng);
    let run = |op: &dyn Fn(&mut FloatStatus) -> i128| {
        let mut after = st;
        (op(&mut after), after.flags)
    };
    let (value, inexact) = if a.is_nan() { (1 << 100, false) } else { rounded(a, st.rounding) };
    let nx = if inexact { Flags::NX } else { Flags::NONE };
    let expected = |min: i128, max: i128| match value {
        v if v < min => (min, Flags::NV),
        v if v > max => (max, Flags::NV),
        v => (v, nx),
    };
    let what = format!("{a:#x?} {st:?}");
    let i32_range = expected(i32::MIN.into(), i32::MAX.into());
    assert_eq!(run(&|st| to_i32(a, st).into()), i32_range, "to_i32 {what}");
    assert_eq!(run(&|st| to_u32(a, st).into()), expected(0, u32::MAX.into()), "to_u32 {what}");
    let i64_range = expected(i64::MIN.into(), i64::MAX.into());
    assert_eq!(run(&|st| to_i64(a, st).into()), i64_range, "to_i64 {what}");
    assert_eq!(run(&|st| to_u64(a, st).into()), expected(0, u64::MAX.into()), "to_u64 {what}");

    if value.unsigned_abs() < 1 << 53 {
        let mut after = st;
        let integral = round_to_int(a, true, &mut after);
        let exact = Exact::new(a.sign(), value.unsigned_abs() as u64, 0);
        assert_eq!(Exact::of(integral).cmp_magnitude(&exact), Ordering::Equal, "{what}");
        assert_eq!((integral.sign(), after.flags), (a.sign(), nx), "round_to_int {what}");
    }
}

#[test]
fn to_integers_f32() {
    let mut rng = Rng(105);
    for _ in 0..trials(300_000) {
        to_integers::<u32>(&mut rng);
    }
}

#[test]
fn to_integers_f64() {
    let mut rng = Rng(106);
    for _ in 0..trials(300_000) {
        to_integers::<u64>(&mut rng);
    }
}
