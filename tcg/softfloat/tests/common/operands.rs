//! Operands for the tests: random, but mostly where floating-point code goes wrong.

// Each test file uses its own part of this module.
#![allow(dead_code)]

use mimus_tcg_softfloat::{Float, FloatStatus, Rounding, add, mul};

/// `default` trials times the environment's `MIMUS_TEST_SCALE`.
pub fn trials(default: u64) -> u64 {
    let scale = std::env::var("MIMUS_TEST_SCALE").ok().and_then(|s| s.parse::<f64>().ok());
    (default as f64 * scale.unwrap_or(1.0)) as u64
}

/// SplitMix64, seeded by each test: failures repeat.
pub struct Rng(pub u64);

impl Rng {
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    pub fn below(&mut self, n: u64) -> u64 {
        self.next() % n
    }

    pub fn rounding(&mut self, among: &[Rounding]) -> Rounding {
        among[self.below(among.len() as u64) as usize]
    }

    /// A fraction field: random, sparse, or runs of equal bits at either end.
    fn fraction<F: Float>(&mut self) -> u64 {
        let n = self.below(u64::from(F::FRAC_BITS) + 1);
        let low = (1u64 << n) - 1;
        let frac = match self.below(8) {
            0 => 0,
            1 => low,
            2 => !low,
            3 => 1 << n,
            4 => self.next() & !low,
            5 => (1 << n) | (1 << self.below(u64::from(F::FRAC_BITS))),
            _ => self.next(),
        };
        frac & F::FRAC_MASK
    }

    /// An operand, NaNs and infinities included.
    pub fn operand<F: Float>(&mut self) -> F {
        let fields = F::INFINITY >> F::FRAC_BITS;
        let bias = F::EMAX as u64;
        let sign = if self.next() & 1 == 1 { F::SIGN } else { 0 };
        let (field, frac) = match self.below(32) {
            0..=3 => (self.below(fields + 1), self.next() & F::FRAC_MASK),
            4..=13 => (bias - 8 + self.below(17), self.fraction::<F>()),
            // Around the limits of the integer types.
            14..=16 => {
                let limit = [0, 31, 32, 63, 64][self.below(5) as usize];
                (bias + limit - 2 + self.below(4), self.fraction::<F>())
            }
            17..=19 => (bias - 100 + self.below(201), self.fraction::<F>()),
            20..=22 => (self.below(3), self.fraction::<F>()),
            23..=24 => (0, (self.next() & F::FRAC_MASK) >> self.below(u64::from(F::FRAC_BITS))),
            25 => (fields - 1 - self.below(2), self.fraction::<F>()),
            26 => (F::FRAC_BITS as u64 * self.below(3) + self.below(4), self.fraction::<F>()),
            27 => (bias + self.below(2), self.below(3)),
            28 => (fields, self.fraction::<F>()),
            29 => (fields, 0),
            30 => (0, 0),
            _ => (self.below(fields), self.fraction::<F>()),
        };
        F::from_raw(sign | field << F::FRAC_BITS | frac)
    }

    /// A finite operand.
    pub fn finite<F: Float>(&mut self) -> F {
        loop {
            let f = self.operand::<F>();
            if f.to_raw() & F::INFINITY != F::INFINITY {
                return f;
            }
        }
    }

    /// Neighbour of `f` within a few units in the last place, of either sign.
    fn near<F: Float>(&mut self, f: F) -> F {
        let raw = f.to_raw().wrapping_add(self.below(9)).wrapping_sub(4);
        F::from_raw(if self.next() & 1 == 1 { raw ^ F::SIGN } else { raw })
    }

    /// `f` with its exponent moved by up to twice the precision: the sum of the two is often near halfway.
    fn offset<F: Float>(&mut self, f: F) -> F {
        let span = u64::from(F::PRECISION) * 4;
        let delta = self.below(span) << F::FRAC_BITS;
        let raw = f.to_raw() & F::INFINITY;
        let moved = raw.wrapping_add(delta).wrapping_sub((span / 2) << F::FRAC_BITS) & F::INFINITY;
        let sign = if self.next() & 1 == 1 { F::SIGN } else { 0 };
        F::from_raw(sign | moved | self.fraction::<F>())
    }

    /// Operands of one trial, often related to one another: sums that cancel or fall halfway, products near
    /// the ends of the range.
    pub fn triple<F: Float>(&mut self) -> [F; 3] {
        let a = self.operand::<F>();
        let b = match self.below(8) {
            0 => self.near(a),
            1 | 2 => self.offset(a),
            3 => self.at_range_end(a),
            _ => self.operand(),
        };
        let mut st = FloatStatus::riscv(Rounding::NearestEven);
        let c = match self.below(8) {
            0 | 1 => {
                let product = mul(a, b, &mut st);
                self.near(product)
            }
            2 | 3 => {
                let product = mul(a, b, &mut st);
                self.offset(product)
            }
            4 => {
                let sum = add(a, b, &mut st);
                self.near(sum)
            }
            _ => self.operand(),
        };
        [a, b, c]
    }

    /// A number whose product with `a` is near the smallest normal number or near overflow.
    fn at_range_end<F: Float>(&mut self, a: F) -> F {
        let fields = (F::INFINITY >> F::FRAC_BITS) as i64;
        let field = ((a.to_raw() & F::INFINITY) >> F::FRAC_BITS) as i64;
        let end = if self.next() & 1 == 1 { 0 } else { fields - 1 };
        let wanted = end - field + i64::from(F::EMAX) + self.below(6) as i64 - 3;
        let sign = if self.next() & 1 == 1 { F::SIGN } else { 0 };
        let exp = (wanted.clamp(0, fields - 1) as u64) << F::FRAC_BITS;
        F::from_raw(sign | exp | self.fraction::<F>())
    }
}
