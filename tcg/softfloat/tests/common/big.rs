//! Exact binary numbers of any size: `±mantissa * 2^exp`. Slow and plain, to check fast code by.

#![allow(dead_code)]

use mimus_tcg_softfloat::Float;
use std::cmp::Ordering;

/// A natural number, least significant word first, without zeros at the top.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Natural(Vec<u64>);

impl Natural {
    fn new(mut words: Vec<u64>) -> Natural {
        while words.last() == Some(&0) {
            words.pop();
        }
        Natural(words)
    }

    /// Number of bits up to the highest one.
    fn bits(&self) -> i32 {
        let top = self.0.last().map_or(0, |w| 64 - w.leading_zeros());
        (self.0.len() as i32 - 1).max(0) * 64 + top as i32
    }

    fn word(&self, i: usize) -> u64 {
        self.0.get(i).copied().unwrap_or(0)
    }

    fn shl(&self, n: u32) -> Natural {
        let (words, bits) = (n as usize / 64, n % 64);
        let mut out = vec![0; words];
        let mut carry = 0;
        for w in &self.0 {
            let wide = u128::from(*w) << bits | carry;
            out.push(wide as u64);
            carry = wide >> 64;
        }
        out.push(carry as u64);
        Natural::new(out)
    }

    fn add(&self, other: &Natural) -> Natural {
        let mut carry = 0;
        let len = self.0.len().max(other.0.len()) + 1;
        let sum = (0..len).map(|i| {
            let wide = u128::from(self.word(i)) + u128::from(other.word(i)) + carry;
            carry = wide >> 64;
            wide as u64
        });
        Natural::new(sum.collect())
    }

    /// `self - other`, which must not be negative.
    fn sub(&self, other: &Natural) -> Natural {
        let mut borrow = false;
        let difference = (0..self.0.len()).map(|i| {
            let (d, b1) = self.word(i).overflowing_sub(other.word(i));
            let (d, b2) = d.overflowing_sub(u64::from(borrow));
            borrow = b1 || b2;
            d
        });
        let words = difference.collect();
        assert!(!borrow, "negative difference");
        Natural::new(words)
    }

    fn mul(&self, other: &Natural) -> Natural {
        let mut out = vec![0u64; self.0.len() + other.0.len()];
        for (i, a) in self.0.iter().enumerate() {
            let mut carry = 0;
            for (j, b) in other.0.iter().enumerate() {
                let wide = u128::from(*a) * u128::from(*b) + u128::from(out[i + j]) + carry;
                out[i + j] = wide as u64;
                carry = wide >> 64;
            }
            out[i + other.0.len()] = carry as u64;
        }
        Natural::new(out)
    }

    fn cmp(&self, other: &Natural) -> Ordering {
        let by_len = self.0.len().cmp(&other.0.len());
        by_len.then_with(|| self.0.iter().rev().cmp(other.0.iter().rev()))
    }
}

/// `±mantissa * 2^exp`, exactly.
#[derive(Clone, Debug)]
pub struct Exact {
    pub negative: bool,
    mantissa: Natural,
    exp: i32,
}

impl Exact {
    pub fn new(negative: bool, mantissa: u64, exp: i32) -> Exact {
        Exact { negative, mantissa: Natural::new(vec![mantissa]), exp }
    }

    /// The value of a bit pattern, infinity counting as the power of two after the largest number.
    pub fn of<F: Float>(f: F) -> Exact {
        let raw = f.to_raw();
        let field = (raw & F::INFINITY) >> F::FRAC_BITS;
        let implicit = u64::from(field != 0) << F::FRAC_BITS;
        let exp = field.max(1) as i32 - F::EMAX - F::FRAC_BITS as i32;
        Exact::new(raw & F::SIGN != 0, raw & F::FRAC_MASK | implicit, exp)
    }

    /// Halfway between the magnitude `raw` and the next one.
    pub fn halfway<F: Float>(raw: u64) -> Exact {
        let below = Exact::of(F::from_raw(raw));
        let mantissa = below.mantissa.shl(1).add(&Natural::new(vec![1]));
        Exact { negative: false, mantissa, exp: below.exp - 1 }
    }

    pub fn is_zero(&self) -> bool {
        self.mantissa.0.is_empty()
    }

    pub fn negate(mut self) -> Exact {
        self.negative = !self.negative;
        self
    }

    pub fn mul(&self, other: &Exact) -> Exact {
        Exact {
            negative: self.negative ^ other.negative,
            mantissa: self.mantissa.mul(&other.mantissa),
            exp: self.exp + other.exp,
        }
    }

    /// Both mantissas at the smaller exponent.
    fn aligned(&self, other: &Exact) -> (Natural, Natural, i32) {
        let exp = self.exp.min(other.exp);
        let at = |x: &Exact| x.mantissa.shl((x.exp - exp) as u32);
        (at(self), at(other), exp)
    }

    pub fn add(&self, other: &Exact) -> Exact {
        let (a, b, exp) = self.aligned(other);
        let (negative, mantissa) = if self.negative == other.negative {
            (self.negative, a.add(&b))
        } else if a.cmp(&b) == Ordering::Less {
            (other.negative, b.sub(&a))
        } else {
            (self.negative, a.sub(&b))
        };
        Exact { negative, mantissa, exp }
    }

    /// Compares magnitudes.
    pub fn cmp_magnitude(&self, other: &Exact) -> Ordering {
        if self.is_zero() || other.is_zero() {
            return other.is_zero().cmp(&self.is_zero());
        }
        let top = |x: &Exact| x.mantissa.bits() + x.exp;
        top(self).cmp(&top(other)).then_with(|| {
            let (a, b, _) = self.aligned(other);
            a.cmp(&b)
        })
    }
}
