//! Random numbers, and values at which instructions turn.

/// xorshift64*
#[derive(Clone)]
pub struct Random(u64);

impl Random {
    pub fn new(seed: u64) -> Random {
        let mut r = Random(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1);
        for _ in 0..4 {
            r.next();
        }
        r
    }

    pub fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    pub fn below(&mut self, n: u64) -> u64 {
        ((u128::from(self.next()) * u128::from(n)) >> 64) as u64
    }

    /// True in `percent` of 100.
    pub fn chance(&mut self, percent: u64) -> bool {
        self.below(100) < percent
    }

    pub fn pick<T: Copy>(&mut self, from: &[T]) -> T {
        from[self.below(from.len() as u64) as usize]
    }

    /// Integers at which arithmetic turns.
    pub fn value(&mut self) -> u64 {
        let v = self.next();
        match self.below(10) {
            0 => 0,
            1 => !0,
            2 => 1 << (v & 63),
            3 => (1 << (v & 63)) - 1,
            4 => v & 0xff,
            5 => v as i32 as u64,
            6 => v as i8 as u64,
            _ => v,
        }
    }

    /// A single's bits.
    pub fn single(&mut self) -> u32 {
        let v = self.next();
        match self.below(10) {
            0 => v as u32,
            1 => self.pick(&[0, 0x8000_0000, 0x7f80_0000, 0xff80_0000, 0x7fc0_0000, 0x7f80_0001, 1, 0x807f_ffff]),
            2 => ((v as i32) as f32).to_bits(),
            3 => v as u32 & 0x807f_ffff,
            4 => v as u32 & 0x80ff_ffff | 0x7f00_0000,
            _ => ((v as i16) as f32 / 16.0).to_bits(),
        }
    }

    /// A double's bits.
    pub fn double(&mut self) -> u64 {
        let v = self.next();
        match self.below(10) {
            0 => v,
            1 => self.pick(&[0, 1 << 63, 0x7ff << 52, 0xfff << 52, 0x7ff8 << 48, 0x7ff0_0000_0000_0001, 1]),
            2 => (v as i64 as f64).to_bits(),
            3 => v & 0x800f_ffff_ffff_ffff,
            4 => v & 0x801f_ffff_ffff_ffff | 0x7fe0_0000_0000_0000,
            5 => (f64::from(f32::from_bits(v as u32))).to_bits(),
            _ => ((v as i32) as f64 / 1024.0).to_bits(),
        }
    }

    /// Eight bytes of memory or of a vector: integers, or numbers of one kind.
    pub fn word(&mut self, kind: u64) -> u64 {
        match kind {
            0 => self.double(),
            1 => u64::from(self.single()) | u64::from(self.single()) << 32,
            2 => self.next() & 0x00ff_00ff_00ff_00ff,
            _ => self.value(),
        }
    }

    /// An extended-precision number: ordinary, or a pattern that is special.
    pub fn extended(&mut self) -> [u8; 10] {
        let (mantissa, exponent) = match self.below(10) {
            0 => (self.value(), self.next() as u16),
            1 => (0, 0),
            2 => (1 << 63, 0x7fff),
            3 => (3 << 62 | self.next() >> 2, 0x7fff),
            4 => (1 << 63, 0x3fff + self.below(20) as u16),
            5 => (self.next(), 0),
            6 => (self.next() | 1 << 63, self.pick(&[1, 2, 0x7ffe, 0x7ffd, 0x1fff, 0x5fff])),
            _ => (self.next() | 1 << 63, 0x3fc0 + self.below(0x80) as u16),
        };
        let mut bytes = [0; 10];
        bytes[..8].copy_from_slice(&mantissa.to_le_bytes());
        bytes[8..].copy_from_slice(&(exponent & 0x7fff | (self.next() as u16 & 0x8000)).to_le_bytes());
        bytes
    }
}
