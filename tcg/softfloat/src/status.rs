//! What an operation reads beside its operands and what it leaves behind: rounding mode, tininess rule,
//! NaN rule and the accumulated exception flags.

use std::fmt;
use std::ops::{BitAnd, BitOr, BitOrAssign};

/// Direction in which a result that is not representable is rounded. The discriminants are RISC-V's `frm`
/// encoding (unprivileged specification, "F" chapter, table of rounding modes).
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
#[repr(u8)]
pub enum Rounding {
    /// To nearest, ties to even.
    #[default]
    NearestEven = 0,
    /// Towards zero.
    ToZero = 1,
    /// Towards negative infinity.
    Down = 2,
    /// Towards positive infinity.
    Up = 3,
    /// To nearest, ties away from zero. No x86 host has it.
    NearestMaxMag = 4,
}

impl Rounding {
    /// Every mode, in encoding order.
    pub const ALL: [Rounding; 5] =
        [Rounding::NearestEven, Rounding::ToZero, Rounding::Down, Rounding::Up, Rounding::NearestMaxMag];

    /// The mode with RISC-V `frm` encoding `frm`; `None` for the reserved encodings 5 to 7 and above.
    pub const fn from_frm(frm: u8) -> Option<Rounding> {
        match frm {
            0 => Some(Rounding::NearestEven),
            1 => Some(Rounding::ToZero),
            2 => Some(Rounding::Down),
            3 => Some(Rounding::Up),
            4 => Some(Rounding::NearestMaxMag),
            _ => None,
        }
    }
}

/// A set of IEEE 754 exceptions, in the bit order of RISC-V's `fflags`.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct Flags(u8);

impl Flags {
    /// No exception.
    pub const NONE: Flags = Flags(0);
    /// Inexact.
    pub const NX: Flags = Flags(1);
    /// Underflow: tiny and inexact.
    pub const UF: Flags = Flags(2);
    /// Overflow.
    pub const OF: Flags = Flags(4);
    /// Division of a finite non-zero number by zero.
    pub const DZ: Flags = Flags(8);
    /// Invalid operation.
    pub const NV: Flags = Flags(16);
    /// All five.
    pub const ALL: Flags = Flags(31);

    /// The `fflags` value.
    pub const fn bits(self) -> u8 {
        self.0
    }

    /// The set with `fflags` value `bits`; bits above the fifth are dropped.
    pub const fn from_bits_truncate(bits: u8) -> Flags {
        Flags(bits & 31)
    }

    /// Whether every exception of `other` is in the set.
    pub const fn contains(self, other: Flags) -> bool {
        self.0 & other.0 == other.0
    }

    /// Whether the set is empty.
    pub const fn is_empty(self) -> bool {
        self.0 == 0
    }

    /// The set with the exceptions of either.
    pub const fn union(self, other: Flags) -> Flags {
        Flags(self.0 | other.0)
    }
}

impl BitOr for Flags {
    type Output = Flags;
    fn bitor(self, other: Flags) -> Flags {
        self.union(other)
    }
}

impl BitAnd for Flags {
    type Output = Flags;
    fn bitand(self, other: Flags) -> Flags {
        Flags(self.0 & other.0)
    }
}

impl BitOrAssign for Flags {
    fn bitor_assign(&mut self, other: Flags) {
        self.0 |= other.0;
    }
}

impl fmt::Debug for Flags {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let names = [(Flags::NV, "NV"), (Flags::DZ, "DZ"), (Flags::OF, "OF"), (Flags::UF, "UF"), (Flags::NX, "NX")];
        let mut separator = "";
        f.write_str("{")?;
        for (flag, name) in names {
            if self.contains(flag) {
                write!(f, "{separator}{name}")?;
                separator = " ";
            }
        }
        f.write_str("}")
    }
}

/// When a result counts as tiny for the underflow exception (IEEE 754-2019, 7.5).
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
pub enum Tininess {
    /// If it is below the smallest normal number once rounded with an unbounded exponent (RISC-V, x86).
    #[default]
    AfterRounding,
    /// If the exact result is below the smallest normal number (Arm).
    BeforeRounding,
}

/// State of a floating-point unit. Operations add to `flags` and change nothing else.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct FloatStatus {
    /// Rounding mode of the operations that round.
    pub rounding: Rounding,
    /// Exceptions raised since the caller last cleared them.
    pub flags: Flags,
    /// Rule for underflow.
    pub tininess: Tininess,
    /// Whether every NaN result is the canonical one: positive, quiet, zero payload (RISC-V; Arm with
    /// FPCR.DN). If not, the result is the first NaN operand made quiet (x86 SSE), and the canonical NaN
    /// only for an invalid operation on numbers.
    pub default_nan: bool,
}

impl FloatStatus {
    /// RISC-V's rules, with no flag raised.
    pub const fn riscv(rounding: Rounding) -> FloatStatus {
        FloatStatus { rounding, flags: Flags::NONE, tininess: Tininess::AfterRounding, default_nan: true }
    }

    /// Adds exceptions to `flags`.
    pub fn raise(&mut self, flags: Flags) {
        self.flags |= flags;
    }

    /// Empties `flags` and returns what was there.
    pub fn take_flags(&mut self) -> Flags {
        std::mem::take(&mut self.flags)
    }
}

impl Default for FloatStatus {
    fn default() -> FloatStatus {
        FloatStatus::riscv(Rounding::NearestEven)
    }
}
