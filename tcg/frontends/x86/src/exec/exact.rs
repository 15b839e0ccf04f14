//! Which floating-point exceptions an instruction raises if not all are masked, element by element.
//!
//! The unit computes with everything masked, and raises other flags then: a result that an unmasked overflow or
//! underflow keeps back is inexact only if it has more digits than fit, whatever its exponent (SDM volume 1 sections
//! 4.9.1.4 and 4.9.1.5); an instruction of several steps (DPPS) ends at the first step that raises one (SDM volume 2
//! "DPPS").
#![allow(unsafe_code)]

use std::arch::asm;

use iced_x86::{EncodingKind, OpKind};

use super::Exec;
use super::vector::{BEFORE_COMPUTING, MXCSR_FLAGS, MXCSR_FTZ, UNDERFLOW};
use crate::state::MXCSR_MASKS;

const DENORMALS_ARE_ZEROS: u32 = 0x40;
const OVERFLOW: u32 = 8;
const PRECISION: u32 = 0x20;

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Kind {
    Add,
    Sub,
    Mul,
    Div,
    /// `a * b + c`, or with the product's or the addend's sign changed.
    MulAdd {
        negates_product: bool,
        negates_addend: bool,
    },
    /// A double to a single.
    Narrow,
    /// A single to half precision, rounding as this immediate says.
    Half {
        how: u8,
        /// One of a denormal single is inexact whatever its digits: with Intel's processors (measured).
        denormals_inexact: bool,
    },
}

/// The computation of one element.
#[derive(Clone, Copy, Debug)]
struct Element {
    kind: Kind,
    double: bool,
    a: u64,
    b: u64,
    c: u64,
}

/// A vector operand.
type Vector = [u8; 32];

/// The flags that the instruction raises; `None` if those it raises with everything masked are right. `memory` is its
/// memory operand. Nothing has been changed by it yet.
pub(super) fn raised(x: &Exec<'_>, memory: *const u8, mxcsr: u32) -> Option<u32> {
    let name = format!("{:?}", x.insn.mnemonic()).to_ascii_lowercase();
    let vex = x.insn.encoding() == EncodingKind::VEX;
    let name = if vex { name.strip_prefix('v')? } else { &name };
    let operand = |i: u32| vector(x, i, memory);
    let bytes = (0..x.insn.op_count()).map(|i| size(x, i)).max()?;
    let (first, second) = if vex { (1, 2) } else { (0, 1) };
    if matches!(name, "dpps" | "dppd") {
        let selected = x.insn.immediate8() >> 4;
        return Some(dot(name == "dppd", [operand(first), operand(second)], bytes, selected, mxcsr));
    }
    let elements = if name.starts_with("fm") || name.starts_with("fnm") {
        fused(name, [operand(0), operand(1), operand(2)], bytes)?
    } else {
        match name {
            "cvtpd2ps" => doubles(&operand(1), size(x, 1)),
            "cvtsd2ss" => doubles(&operand(second), 8),
            "cvtps2ph" => {
                let (from, immediate) = (operand(1), x.insn.immediate8());
                let kind = Kind::Half { how: immediate, denormals_inexact: !x.cpu.guest.st.features.amd };
                let half = |i| Element { kind, ..pair(Kind::Narrow, false, &from, &from, [i, i]) };
                (0..size(x, 1) / 4).map(half).collect()
            }
            _ => arithmetic(name, [operand(first), operand(second)], bytes)?,
        }
    };
    Some(all(&elements, mxcsr).1)
}

/// Bytes of an operand.
fn size(x: &Exec<'_>, i: u32) -> usize {
    match x.insn.op_kind(i) {
        OpKind::Register => x.insn.op_register(i).size().min(32),
        OpKind::Memory => x.insn.memory_size().size().min(32),
        _ => 0,
    }
}

/// An operand's bytes, zeros above.
fn vector(x: &Exec<'_>, i: u32, memory: *const u8) -> Vector {
    let mut bytes = [0; 32];
    if i >= x.insn.op_count() {
        return bytes;
    }
    match x.insn.op_kind(i) {
        OpKind::Register if x.insn.op_register(i).is_vector_register() => {
            let words = x.cpu.guest.st.vec[x.insn.op_register(i).number()];
            for (to, word) in bytes.chunks_exact_mut(8).zip(words) {
                to.copy_from_slice(&word.to_le_bytes());
            }
        }
        OpKind::Memory if !memory.is_null() => {
            // SAFETY: the memory operand's bytes are there.
            unsafe { std::ptr::copy_nonoverlapping(memory, bytes.as_mut_ptr(), size(x, i)) };
        }
        _ => {}
    }
    bytes
}

/// Element `i` of a vector.
fn element(from: &Vector, double: bool, i: usize) -> u64 {
    let width = if double { 8 } else { 4 };
    let mut bytes = [0; 8];
    bytes[..width].copy_from_slice(&from[width * i..width * (i + 1)]);
    u64::from_le_bytes(bytes)
}

fn pair(kind: Kind, double: bool, a: &Vector, b: &Vector, at: [usize; 2]) -> Element {
    Element { kind, double, a: element(a, double, at[0]), b: element(b, double, at[1]), c: 0 }
}

fn doubles(from: &Vector, bytes: usize) -> Vec<Element> {
    (0..bytes / 8).map(|i| pair(Kind::Narrow, true, from, from, [i, i])).collect()
}

/// Whether elements are doubles, and how many there are.
fn shape(name: &str, bytes: usize) -> Option<(bool, usize)> {
    Some(match name.get(name.len().checked_sub(2)?..)? {
        "ps" => (false, bytes / 4),
        "pd" => (true, bytes / 8),
        "ss" => (false, 1),
        "sd" => (true, 1),
        _ => return None,
    })
}

fn arithmetic(name: &str, [a, b]: [Vector; 2], bytes: usize) -> Option<Vec<Element>> {
    let (double, count) = shape(name, bytes)?;
    let kind = match &name[..name.len() - 2] {
        "add" | "hadd" => Kind::Add,
        "sub" | "hsub" | "addsub" => Kind::Sub,
        "mul" => Kind::Mul,
        "div" => Kind::Div,
        _ => return None,
    };
    if name.starts_with('h') {
        // Neighbours.
        let both = [&a, &b].into_iter();
        return Some(
            both.flat_map(|v| (0..count / 2).map(move |i| pair(kind, double, v, v, [2 * i, 2 * i + 1]))).collect(),
        );
    }
    let alternates = name.starts_with("addsub");
    let kind_of = |i: usize| if alternates && i % 2 == 1 { Kind::Add } else { kind };
    Some((0..count).map(|i| pair(kind_of(i), double, &a, &b, [i, i])).collect())
}

/// FMA: the digits say which operands are multiplied.
fn fused(name: &str, operands: [Vector; 3], bytes: usize) -> Option<Vec<Element>> {
    let (double, count) = shape(name, bytes)?;
    let digits = &name[name.len().checked_sub(5)?..name.len() - 2];
    let order = match digits {
        "132" => [0, 2, 1],
        "213" => [1, 0, 2],
        "231" => [1, 2, 0],
        _ => return None,
    };
    let what = &name[..name.len() - 5];
    let negates_product = what.starts_with("fnm");
    let negates_addend = |i: usize| match what {
        "fmaddsub" => i.is_multiple_of(2),
        "fmsubadd" => !i.is_multiple_of(2),
        other => other.ends_with("sub"),
    };
    let [a, b, c] = order.map(|n: usize| operands[n]);
    Some(
        (0..count)
            .map(|i| Element {
                kind: Kind::MulAdd { negates_product, negates_addend: negates_addend(i) },
                double,
                a: element(&a, double, i),
                b: element(&b, double, i),
                c: element(&c, double, i),
            })
            .collect(),
    )
}

/// Computes elements at once: their values, and the flags.
fn all(elements: &[Element], mxcsr: u32) -> (Vec<u64>, u32) {
    let unmasked = !(mxcsr >> 7) & MXCSR_FLAGS;
    let (values, flags): (Vec<u64>, Vec<u32>) = elements.iter().map(|e| e.compute(mxcsr)).unzip();
    let flags = flags.into_iter().fold(0, |all, f| all | f);
    // What is found before computing keeps the rest from being found.
    (values, if flags & unmasked & BEFORE_COMPUTING != 0 { flags & BEFORE_COMPUTING } else { flags })
}

/// DPPS and DPPD: products of the selected elements, sums of two, and for DPPS the sum of these.
fn dot(double: bool, [a, b]: [Vector; 2], bytes: usize, selected: u8, mxcsr: u32) -> u32 {
    let unmasked = !(mxcsr >> 7) & MXCSR_FLAGS;
    let per_half = if double { 2 } else { 4 };
    let count = bytes / 16 * per_half;
    let wanted: Vec<usize> = (0..count).filter(|i| selected >> (i % per_half) & 1 != 0).collect();
    let products: Vec<Element> = wanted.iter().map(|&i| pair(Kind::Mul, double, &a, &b, [i, i])).collect();
    let (values, mut flags) = all(&products, mxcsr);
    let mut terms = vec![0; count];
    for (&i, value) in wanted.iter().zip(values) {
        terms[i] = value;
    }
    for _ in 0..per_half.ilog2() {
        if flags & unmasked != 0 {
            break;
        }
        let sums: Vec<Element> =
            terms.chunks_exact(2).map(|t| Element { kind: Kind::Add, double, a: t[0], b: t[1], c: 0 }).collect();
        let (values, more) = all(&sums, mxcsr);
        (terms, flags) = (values, flags | more);
    }
    flags
}

impl Element {
    /// The value with everything masked, and the flags raised.
    fn compute(&self, mxcsr: u32) -> (u64, u32) {
        let unmasked = !(mxcsr >> 7) & MXCSR_FLAGS;
        let zero = if unmasked & UNDERFLOW != 0 { MXCSR_FTZ } else { 0 };
        let (value, mut flags) = self.run(mxcsr & !zero);
        if unmasked & UNDERFLOW != 0 {
            // Unmasked, a tiny result is an underflow even if it is exact: flushing to zero shows all of them, but not
            // halves, which are never flushed.
            flags |= match self.kind {
                Kind::Half { .. } if self.is_tiny_half(mxcsr) => UNDERFLOW,
                Kind::Half { .. } => 0,
                _ => self.run(mxcsr | MXCSR_FTZ).1 & UNDERFLOW,
            };
        }
        if flags & unmasked & (OVERFLOW | UNDERFLOW) != 0 {
            let denormal = self.a & 0x7f80_0000 == 0 && matches!(self.kind, Kind::Half { denormals_inexact: true, .. });
            let exact = !denormal && self.is_exact(mxcsr & DENORMALS_ARE_ZEROS != 0);
            flags = flags & !PRECISION | if exact { 0 } else { PRECISION };
        }
        (value, flags)
    }

    /// Whether the half, rounded as if its exponent had no bounds, is below the smallest normal one, 2^-14.
    fn is_tiny_half(&self, mxcsr: u32) -> bool {
        const SMALLEST: u64 = 127 - 14;
        let magnitude = self.a & 0x7fff_ffff;
        let exponent = magnitude >> 23;
        if magnitude == 0 || exponent == 0 && mxcsr & DENORMALS_ARE_ZEROS != 0 {
            return false;
        }
        // Just below, it may be rounded up to it: as one 2^16 times as large is rounded up to 4.
        let larger = Element { a: self.a + (16 << 23), ..*self };
        exponent < SMALLEST - 1 || exponent == SMALLEST - 1 && larger.run(mxcsr).0 & 0x7fff < 0x4400
    }

    /// Executes the element's instruction with everything masked.
    fn run(&self, mxcsr: u32) -> (u64, u32) {
        let quiet = mxcsr & !MXCSR_FLAGS | MXCSR_MASKS;
        let (mut host, mut after) = (0u32, 0u32);
        let mut value = self.a;
        macro_rules! go {
            ($($insn:literal),+) => {
                // SAFETY: every exception is masked, and the host's own word is put back.
                unsafe {
                    asm!(
                        "stmxcsr [{host}]",
                        "ldmxcsr [{quiet}]",
                        "movq xmm0, {value}",
                        "movq xmm1, {b}",
                        "movq xmm2, {c}",
                        $($insn,)+
                        "stmxcsr [{after}]",
                        "ldmxcsr [{host}]",
                        "movq {value}, xmm0",
                        host = in(reg) &mut host,
                        quiet = in(reg) &quiet,
                        after = in(reg) &mut after,
                        value = inout(reg) value,
                        b = in(reg) self.b,
                        c = in(reg) self.c,
                        out("xmm0") _, out("xmm1") _, out("xmm2") _,
                        options(nostack)
                    )
                }
            };
        }
        match (self.kind, self.double) {
            (Kind::Add, false) => go!("addss xmm0, xmm1"),
            (Kind::Add, true) => go!("addsd xmm0, xmm1"),
            (Kind::Sub, false) => go!("subss xmm0, xmm1"),
            (Kind::Sub, true) => go!("subsd xmm0, xmm1"),
            (Kind::Mul, false) => go!("mulss xmm0, xmm1"),
            (Kind::Mul, true) => go!("mulsd xmm0, xmm1"),
            (Kind::Div, false) => go!("divss xmm0, xmm1"),
            (Kind::Div, true) => go!("divsd xmm0, xmm1"),
            (Kind::Narrow, _) => go!("cvtsd2ss xmm0, xmm0"),
            // The processor has these, or the guest would not.
            (Kind::Half { how, .. }, _) => match how & 7 {
                0 => go!("vcvtps2ph xmm0, xmm0, 0"),
                1 => go!("vcvtps2ph xmm0, xmm0, 1"),
                2 => go!("vcvtps2ph xmm0, xmm0, 2"),
                3 => go!("vcvtps2ph xmm0, xmm0, 3"),
                _ => go!("vcvtps2ph xmm0, xmm0, 4"),
            },
            (Kind::MulAdd { negates_product, negates_addend }, double) => {
                match (double, negates_product, negates_addend) {
                    (false, false, false) => go!("vfmadd213ss xmm0, xmm1, xmm2"),
                    (false, false, true) => go!("vfmsub213ss xmm0, xmm1, xmm2"),
                    (false, true, false) => go!("vfnmadd213ss xmm0, xmm1, xmm2"),
                    (false, true, true) => go!("vfnmsub213ss xmm0, xmm1, xmm2"),
                    (true, false, false) => go!("vfmadd213sd xmm0, xmm1, xmm2"),
                    (true, false, true) => go!("vfmsub213sd xmm0, xmm1, xmm2"),
                    (true, true, false) => go!("vfnmadd213sd xmm0, xmm1, xmm2"),
                    (true, true, true) => go!("vfnmsub213sd xmm0, xmm1, xmm2"),
                }
            }
        }
        if !self.double || self.kind == Kind::Narrow {
            value &= 0xffff_ffff;
        }
        (value, after & MXCSR_FLAGS)
    }

    /// Whether the result has no more digits than fit, its exponent aside. Operands and result are finite, and the
    /// result is not zero, or there would be no overflow or underflow.
    fn is_exact(&self, denormals_are_zeros: bool) -> bool {
        let number = |bits: u64| Number::of(bits, self.double, denormals_are_zeros);
        let digits = if self.double { 53 } else { 24 };
        let (a, b) = (number(self.a), number(self.b));
        match self.kind {
            Kind::Add => a.plus(b, digits),
            Kind::Sub => a.plus(b.negated(), digits),
            Kind::Mul => a.times(b).fits(digits),
            // The odd part of the divisor divides that of the dividend, or the quotient never ends.
            Kind::Div => b.digits != 0 && a.digits.is_multiple_of(b.digits),
            Kind::MulAdd { negates_product, negates_addend } => {
                let product = a.times(b);
                let product = if negates_product { product.negated() } else { product };
                let c = number(self.c);
                product.plus(if negates_addend { c.negated() } else { c }, digits)
            }
            Kind::Narrow => Number::of(self.a, true, denormals_are_zeros).fits(24),
            Kind::Half { .. } => a.fits(11),
        }
    }
}

/// ±`digits` × 2^`exponent`; odd, or zero.
#[derive(Clone, Copy, Debug)]
struct Number {
    negative: bool,
    digits: u128,
    exponent: i32,
}

impl Number {
    fn of(bits: u64, double: bool, denormals_are_zeros: bool) -> Number {
        let (fraction, width) = if double { (52, 11) } else { (23, 8) };
        let mantissa = bits & ((1 << fraction) - 1);
        let exponent = (bits >> fraction & ((1 << width) - 1)) as i32;
        let negative = bits >> (fraction + width) & 1 != 0;
        let digits = match exponent {
            0 if denormals_are_zeros => 0,
            0 => mantissa,
            _ => mantissa | 1 << fraction,
        };
        let bias = (1 << (width - 1)) - 1;
        Number { negative, digits: digits.into(), exponent: exponent.max(1) - bias - fraction }.odd()
    }

    fn odd(self) -> Number {
        if self.digits == 0 {
            return Number { exponent: 0, ..self };
        }
        let zeros = self.digits.trailing_zeros();
        Number { digits: self.digits >> zeros, exponent: self.exponent + zeros as i32, ..self }
    }

    fn negated(self) -> Number {
        Number { negative: !self.negative, ..self }
    }

    fn length(self) -> u32 {
        128 - self.digits.leading_zeros()
    }

    fn fits(self, digits: u32) -> bool {
        self.length() <= digits
    }

    fn times(self, other: Number) -> Number {
        Number {
            negative: self.negative != other.negative,
            digits: self.digits * other.digits,
            exponent: self.exponent + other.exponent,
        }
        .odd()
    }

    /// Whether the sum has at most `digits` (53) digits.
    fn plus(self, other: Number, digits: u32) -> bool {
        if self.digits == 0 || other.digits == 0 {
            return if self.digits == 0 { other.fits(digits) } else { self.fits(digits) };
        }
        let (high, low) = if self.exponent >= other.exponent { (self, other) } else { (other, self) };
        let shift = (high.exponent - low.exponent) as u32;
        if high.length() + shift > 120 {
            // Both ends are there: the low one is odd.
            return false;
        }
        let (a, b) = (high.digits << shift, low.digits);
        let sum = if high.negative == low.negative { a + b } else { a.abs_diff(b) };
        Number { negative: false, digits: sum, exponent: 0 }.odd().fits(digits)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn element(kind: Kind, a: f64, b: f64, c: f64) -> Element {
        Element { kind, double: true, a: a.to_bits(), b: b.to_bits(), c: c.to_bits() }
    }

    const FUSED: Kind = Kind::MulAdd { negates_product: false, negates_addend: true };

    /// With overflow unmasked.
    const MXCSR: u32 = 0x1f80 & !(OVERFLOW << 7);

    #[test]
    fn overflows_are_inexact_only_if_digits_are_lost() {
        let max = f64::MAX;
        for (e, exact) in [
            (element(Kind::Add, max, max, 0.0), true),
            (element(Kind::Add, max, f64::from_bits(0x7fe0_0000_0000_0002), 0.0), false),
            (element(Kind::Mul, 2f64.powi(1000), 2f64.powi(1000), 0.0), true),
            (element(Kind::Mul, max, max, 0.0), false),
            (element(Kind::Div, 2f64.powi(1000) * 9.0, 2f64.powi(-1000) * 3.0, 0.0), true),
            (element(Kind::Div, 2f64.powi(1000), 2f64.powi(-1000) * 3.0, 0.0), false),
            (element(FUSED, 2f64.powi(1000), 2f64.powi(1000), 1.0), false),
            (element(FUSED, 2f64.powi(1000), 2f64.powi(1000), 0.0), true),
        ] {
            let flags = e.compute(MXCSR).1;
            assert_eq!(flags, OVERFLOW | if exact { 0 } else { PRECISION }, "{e:?}");
        }
    }

    #[test]
    fn conversions_to_fewer_digits() {
        let narrow = |a: f64| element(Kind::Narrow, a, 0.0, 0.0).compute(MXCSR).1;
        assert_eq!(narrow(2f64.powi(500)), OVERFLOW);
        assert_eq!(narrow(2f64.powi(500) * (1.0 + f64::EPSILON)), OVERFLOW | PRECISION);
        assert_eq!(narrow(1.0), 0);
    }

    #[test]
    fn dot_products_end_at_the_step_that_raises() {
        let vector = |x: [f64; 2]| -> Vector {
            let mut v = [0; 32];
            v[..8].copy_from_slice(&x[0].to_bits().to_le_bytes());
            v[8..16].copy_from_slice(&x[1].to_bits().to_le_bytes());
            v
        };
        // The product is too large: the sum with infinity, which would be invalid, is not made.
        let invalid = 1;
        let (a, b) = (vector([f64::MAX, f64::INFINITY]), vector([4.0, -1.0]));
        assert_eq!(dot(true, [a, b], 16, 3, MXCSR) & (OVERFLOW | invalid), OVERFLOW);
        assert_eq!(dot(true, [a, b], 16, 3, 0x1f80) & (OVERFLOW | invalid), OVERFLOW | invalid);
        assert_eq!(dot(true, [a, b], 16, 2, MXCSR), 0);
    }
}
