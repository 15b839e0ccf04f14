//! Random numbers that come out the same every time.

/// xorshift64*
#[derive(Clone, Debug)]
pub struct Random(u64);

impl Random {
    /// The sequence of a seed.
    pub fn new(seed: u64) -> Random {
        // Small seeds are made different in all bits: splitmix64's finaliser.
        let mut z = seed.wrapping_add(0x9e37_79b9_7f4a_7c15);
        z = (z ^ z >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        Random((z ^ z >> 31) | 1)
    }

    /// Any 64 bits.
    pub fn u64(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    /// Below `n`.
    pub fn below(&mut self, n: u64) -> u64 {
        ((self.u64() >> 32) * n) >> 32
    }

    /// True one time in `n`.
    pub fn one_in(&mut self, n: u64) -> bool {
        self.below(n) == 0
    }

    /// An element.
    pub fn pick<T: Copy>(&mut self, of: &[T]) -> T {
        of[self.below(of.len() as u64) as usize]
    }

    /// A value at the edges as often as in the middle.
    pub fn value(&mut self) -> u64 {
        let bits = self.u64();
        match self.below(8) {
            0 => self.below(4),
            1 => self.below(4).wrapping_neg(),
            2 => (1 << self.below(64)) - self.below(2),
            3 => bits as i32 as u64,
            4 => bits as u32 as u64,
            5 => bits as i8 as u64,
            _ => bits,
        }
    }

    /// A double, or a NaN-boxed single, with all special values.
    pub fn float(&mut self) -> u64 {
        const D: [u64; 12] = [
            0,
            1 << 63,
            1,
            0x000f_ffff_ffff_ffff,
            0x0010_0000_0000_0000,
            0x3ff0_0000_0000_0000,
            0xbff8_0000_0000_0000,
            0x7fef_ffff_ffff_ffff,
            0x7ff0_0000_0000_0000,
            0xfff0_0000_0000_0000,
            0x7ff8_0000_0000_0000,
            0x7ff0_0000_0000_0001,
        ];
        const S: [u32; 12] = [
            0,
            1 << 31,
            1,
            0x007f_ffff,
            0x0080_0000,
            0x3f80_0000,
            0xbfc0_0000,
            0x7f7f_ffff,
            0x7f80_0000,
            0xff80_0000,
            0x7fc0_0000,
            0x7f80_0001,
        ];
        let bits = self.u64();
        let boxed = |single: u32| 0xffff_ffff_0000_0000 | u64::from(single);
        match self.below(8) {
            0 => self.pick(&D),
            1 => boxed(self.pick(&S)),
            2 => boxed(bits as u32),
            // Near one, so that sums cancel and quotients round.
            3 => boxed(0x3f80_0000 ^ (bits as u32 & 0x80ff_ffff)),
            4 => 0x3ff0_0000_0000_0000 ^ bits & 0x801f_ffff_ffff_ffff,
            5 => (bits as i32 as f64).to_bits(),
            _ => bits,
        }
    }
}
