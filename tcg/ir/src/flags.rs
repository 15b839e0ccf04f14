//! Condition flags: what they are, how the [`FLAGS`] slot holds them, and the arithmetic of the operations that
//! set them ([`FlagOp`]), as the x86 manuals define it (Intel SDM volume 2, AMD APM volume 3).
//!
//! Flags that both manuals leave undefined ([`undefined`]) are given here the values that the host's processors, AMD's
//! or Intel's, give them: a backend gives them whatever its host does, and a program must not see which of the two has
//! executed an instruction. Elsewhere they are AMD's.

use std::sync::LazyLock;

use crate::op::{CondF, FlagOp, Size, Slot, Val};

/// The slot that holds the flags, in the form of [`Flags::pack`]. It is in memory, whatever the frontend's order
/// of registers says, and a block that uses flags names it in no other operand.
pub const FLAGS: Slot = Slot(22);

/// A set of flags, or the values of all six (1 where in the set): the bits are those of x86's FLAGS register.
#[derive(Clone, Copy, PartialEq, Eq, Default, Hash)]
pub struct Flags(pub u16);

impl Flags {
    /// Carry.
    pub const CF: Flags = Flags(1 << 0);
    /// Parity: the low byte of the result has an even number of ones.
    pub const PF: Flags = Flags(1 << 2);
    /// Carry out of bit 3.
    pub const AF: Flags = Flags(1 << 4);
    /// The result is zero.
    pub const ZF: Flags = Flags(1 << 6);
    /// The result is negative.
    pub const SF: Flags = Flags(1 << 7);
    /// Signed overflow.
    pub const OF: Flags = Flags(1 << 11);
    /// None of them.
    pub const NONE: Flags = Flags(0);
    /// All six.
    pub const ALL: Flags = Flags(0x8d5);
    /// Those set from a result alone.
    const SZP: Flags = Flags(0xc4);

    /// Whether every flag of `other` is in the set.
    pub const fn contains(self, other: Flags) -> bool {
        self.0 & other.0 == other.0
    }

    /// Whether the sets have a flag in common.
    pub const fn intersects(self, other: Flags) -> bool {
        self.0 & other.0 != 0
    }

    /// The flags of both.
    pub const fn union(self, other: Flags) -> Flags {
        Flags(self.0 | other.0)
    }

    /// The flags of both sets at once.
    pub const fn and(self, other: Flags) -> Flags {
        Flags(self.0 & other.0)
    }

    /// The flags that are not in `other`.
    pub const fn without(self, other: Flags) -> Flags {
        Flags(self.0 & !other.0)
    }

    /// Whether there is none.
    pub const fn is_empty(self) -> bool {
        self.0 == 0
    }

    /// The values of `self` with those that `which` names taken from `from`.
    pub const fn replace(self, which: Flags, from: Flags) -> Flags {
        Flags(self.0 & !which.0 | from.0 & which.0)
    }

    /// The contents of the [`FLAGS`] slot for these values: OF in bit 0, the low byte of x86's FLAGS register in
    /// bits 8 to 15, all else zero. This is what `lahf` and `seto al` leave in `ax`.
    pub const fn pack(self) -> u64 {
        (((self.0 & 0xd5) | 2) as u64) << 8 | ((self.0 >> 11) & 1) as u64
    }

    /// The values in the [`FLAGS`] slot.
    pub const fn unpack(slot: u64) -> Flags {
        Flags((slot >> 8) as u16 & 0xd5 | (slot as u16 & 1) << 11)
    }

    /// The values in x86's EFLAGS or RFLAGS register; the other bits of it are ignored.
    pub const fn from_eflags(eflags: u64) -> Flags {
        Flags(eflags as u16 & Flags::ALL.0)
    }

    const fn bit(self, on: bool) -> Flags {
        if on { self } else { Flags::NONE }
    }
}

impl std::fmt::Debug for Flags {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Flags({self})")
    }
}

/// The letters of the flags in the set, in the order `cpazso`; `-` for none.
impl std::fmt::Display for Flags {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        if self.is_empty() {
            return f.write_str("-");
        }
        LETTERS.iter().filter(|(_, flag)| self.contains(*flag)).try_for_each(|(letter, _)| f.write_str(letter))
    }
}

impl Flags {
    /// Reads what [`std::fmt::Display`] writes.
    pub fn from_letters(letters: &str) -> Option<Flags> {
        if letters == "-" {
            return Some(Flags::NONE);
        }
        let mut set = Flags::NONE;
        for letter in letters.chars() {
            let (_, flag) = LETTERS.iter().find(|(l, _)| l.starts_with(letter))?;
            set = set.union(*flag);
        }
        (!letters.is_empty()).then_some(set)
    }
}

const LETTERS: [(&str, Flags); 6] =
    [("c", Flags::CF), ("p", Flags::PF), ("a", Flags::AF), ("z", Flags::ZF), ("s", Flags::SF), ("o", Flags::OF)];

/// The flags that a condition looks at.
pub const fn read_by(cond: CondF) -> Flags {
    match cond {
        CondF::O | CondF::No => Flags::OF,
        CondF::B | CondF::Ae => Flags::CF,
        CondF::E | CondF::Ne => Flags::ZF,
        CondF::Be | CondF::A => Flags::CF.union(Flags::ZF),
        CondF::S | CondF::Ns => Flags::SF,
        CondF::P | CondF::Np => Flags::PF,
        CondF::L | CondF::Ge => Flags::SF.union(Flags::OF),
        CondF::Le | CondF::G => Flags::SF.union(Flags::OF).union(Flags::ZF),
    }
}

/// Whether a condition holds.
pub fn holds(cond: CondF, flags: Flags) -> bool {
    let has = |f: Flags| flags.contains(f);
    let less = has(Flags::SF) != has(Flags::OF);
    match cond {
        CondF::O => has(Flags::OF),
        CondF::No => !has(Flags::OF),
        CondF::B => has(Flags::CF),
        CondF::Ae => !has(Flags::CF),
        CondF::E => has(Flags::ZF),
        CondF::Ne => !has(Flags::ZF),
        CondF::Be => has(Flags::CF) || has(Flags::ZF),
        CondF::A => !has(Flags::CF) && !has(Flags::ZF),
        CondF::S => has(Flags::SF),
        CondF::Ns => !has(Flags::SF),
        CondF::P => has(Flags::PF),
        CondF::Np => !has(Flags::PF),
        CondF::L => less,
        CondF::Ge => !less,
        CondF::Le => less || has(Flags::ZF),
        CondF::G => !less && !has(Flags::ZF),
    }
}

/// The flags that an operation may change. Shifts and rotates change none if their count, modulo 64 for
/// [`Size::B8`] and 32 for the others, is zero.
pub const fn written_by(op: FlagOp) -> Flags {
    use FlagOp::*;
    match op {
        Not => Flags::NONE,
        Inc | Dec => Flags::ALL.without(Flags::CF),
        Rol | Ror | Rcl | Rcr => Flags::CF.union(Flags::OF),
        Bt | Bts | Btr | Btc => Flags::CF,
        Add | Adc | Sub | Sbb | And | Or | Xor | Andn | Neg | Mul | Shl | Shr | Sar | Bsf | Bsr | Popcnt | Lzcnt
        | Tzcnt | Bextr | Bzhi | Blsi | Blsr | Blsmsk => Flags::ALL,
    }
}

/// The flags of [`written_by`] whose new values the manuals leave open (for shifts and rotates by more than 1,
/// for bit tests, products …). An operation that leaves them as they were is one of the possibilities.
pub const fn undefined(op: FlagOp) -> Flags {
    use FlagOp::*;
    match op {
        Add | Adc | Sub | Sbb | Inc | Dec | Neg | Not | Popcnt | Bt | Bts | Btr | Btc => Flags::NONE,
        And | Or | Xor => Flags::AF,
        Andn | Bzhi | Blsi | Blsr | Blsmsk => Flags::AF.union(Flags::PF),
        Shl | Shr | Sar => Flags::AF.union(Flags::OF),
        Rol | Ror | Rcl | Rcr => Flags::OF,
        Mul => Flags::SZP.union(Flags::AF),
        Bsf | Bsr => Flags::ALL.without(Flags::ZF),
        Lzcnt | Tzcnt => Flags::ALL.without(Flags::ZF).without(Flags::CF),
        Bextr => Flags::SZP.union(Flags::AF).without(Flags::ZF),
    }
}

/// The flags of [`undefined`] that some hosts leave as they were, so that a backend has to remember those before.
pub const fn kept(op: FlagOp) -> Flags {
    match op {
        FlagOp::Mul => undefined(op),
        FlagOp::Lzcnt | FlagOp::Tzcnt => Flags::OF,
        _ => Flags::NONE,
    }
}

/// All ones in the bits of a size.
const fn mask(size: Size) -> u64 {
    !0 >> (64 - 8 * size.bytes())
}

/// The slot's contents after an operation of `size` gave `value`: 4 and 8 bytes fill it, with zeros above; 1 and
/// 2 bytes replace its low bytes.
pub const fn merge(size: Size, old: u64, value: u64) -> u64 {
    let low = mask(size);
    match size {
        Size::B1 | Size::B2 => old & !low | value & low,
        Size::B4 | Size::B8 => value & low,
    }
}

/// The shift count that the host takes of `b`.
pub const fn count(size: Size, b: u64) -> u32 {
    b as u32 & if matches!(size, Size::B8) { 63 } else { 31 }
}

const fn msb(size: Size, value: u64) -> bool {
    value >> (8 * size.bytes() - 1) & 1 != 0
}

/// SF, ZF and PF of a result.
fn szp(size: Size, value: u64) -> Flags {
    Flags::SF
        .bit(msb(size, value))
        .union(Flags::ZF.bit(value & mask(size) == 0))
        .union(Flags::PF.bit((value as u8).count_ones().is_multiple_of(2)))
}

/// `a + b + carry`.
fn sum(size: Size, a: u64, b: u64, carry: bool) -> (u64, Flags) {
    let wide = u128::from(a) + u128::from(b) + u128::from(carry);
    let value = wide as u64 & mask(size);
    let flags = szp(size, value)
        .union(Flags::CF.bit(wide >> (8 * size.bytes()) != 0))
        .union(Flags::AF.bit((a ^ b ^ value) & 0x10 != 0))
        .union(Flags::OF.bit(msb(size, (a ^ value) & (b ^ value))));
    (value, flags)
}

/// `a - b - borrow`.
fn difference(size: Size, a: u64, b: u64, borrow: bool) -> (u64, Flags) {
    let value = a.wrapping_sub(b).wrapping_sub(u64::from(borrow)) & mask(size);
    let flags = szp(size, value)
        .union(Flags::CF.bit(u128::from(a) < u128::from(b) + u128::from(borrow)))
        .union(Flags::AF.bit((a ^ b ^ value) & 0x10 != 0))
        .union(Flags::OF.bit(msb(size, (a ^ b) & (a ^ value))));
    (value, flags)
}

/// What a [`FlagOp`] does: the value for its destination, in the low bytes of `size` with zeros above (`None`:
/// the destination is left as it is, all 64 bits of it), and the flags after it. Only the low bytes of `a` and
/// `b` count.
pub fn eval(op: FlagOp, size: Size, a: u64, b: u64, flags: Flags) -> (Option<u64>, Flags) {
    let (value, new) = eval_as_amd(op, size, a, b, flags);
    let new = if host_is_intel() { undefined_as_intel(op, size, (a, b), value, flags, new) } else { new };
    (value, new)
}

/// Whether the instructions that generated code executes leave Intel's values in undefined flags.
fn host_is_intel() -> bool {
    static INTEL: LazyLock<bool> = LazyLock::new(|| {
        let id = std::arch::x86_64::__cpuid(0);
        [id.ebx, id.edx, id.ecx].map(u32::to_le_bytes).concat() == b"GenuineIntel"
    });
    *INTEL
}

/// `new`, which is AMD's, with Intel's values of the flags that the manuals leave undefined, as measured.
fn undefined_as_intel(op: FlagOp, size: Size, (a, b): (u64, u64), value: Option<u64>, old: Flags, new: Flags) -> Flags {
    match op {
        FlagOp::Andn | FlagOp::Bzhi | FlagOp::Blsi | FlagOp::Blsr | FlagOp::Blsmsk => new.without(Flags::PF),
        FlagOp::Bextr => new.without(Flags::PF.union(Flags::AF)),
        FlagOp::Lzcnt | FlagOp::Tzcnt => new.without(Flags::OF),
        FlagOp::Mul => new.and(CARRY_OVERFLOW).union(szp(size, value.unwrap_or(0)).without(Flags::ZF)),
        FlagOp::Shl | FlagOp::Shr | FlagOp::Sar if count(size, b) != 0 => {
            new.without(Flags::AF).replace(Flags::OF, eval_as_amd(op, size, a, 1, old).1)
        }
        FlagOp::Rcl | FlagOp::Rcr if count(size, b).is_multiple_of(8 * size.bytes() + 1) => new.replace(Flags::OF, old),
        // As of a rotation by one.
        FlagOp::Rol | FlagOp::Ror | FlagOp::Rcl | FlagOp::Rcr if count(size, b) != 0 => {
            new.replace(Flags::OF, eval_as_amd(op, size, a, 1, old).1)
        }
        _ => new,
    }
}

/// `new`, the flags after an operation by a constant: rotations by one other than 1 leave OF alone with Intel's processors
/// (measured).
pub fn after_constant(op: FlagOp, size: Size, b: u64, old: Flags, new: Flags) -> Flags {
    let rotates = matches!(op, FlagOp::Rol | FlagOp::Ror) && count(size, b) != 1;
    if rotates && host_is_intel() { new.replace(Flags::OF, old) } else { new }
}

fn eval_as_amd(op: FlagOp, size: Size, a: u64, b: u64, flags: Flags) -> (Option<u64>, Flags) {
    let m = mask(size);
    let (a, full_b, b) = (a & m, b, b & m);
    let carry = flags.contains(Flags::CF);
    let logic = |value: u64| (value & m, szp(size, value));
    let (value, flags) = match op {
        FlagOp::Add => sum(size, a, b, false),
        FlagOp::Adc => sum(size, a, b, carry),
        FlagOp::Sub => difference(size, a, b, false),
        FlagOp::Sbb => difference(size, a, b, carry),
        FlagOp::And => logic(a & b),
        FlagOp::Or => logic(a | b),
        FlagOp::Xor => logic(a ^ b),
        FlagOp::Andn => logic(!a & b),
        FlagOp::Not => (!a & m, flags),
        FlagOp::Neg => difference(size, 0, a, false),
        FlagOp::Inc => {
            let (value, new) = sum(size, a, 1, false);
            (value, new.replace(Flags::CF, flags))
        }
        FlagOp::Dec => {
            let (value, new) = difference(size, a, 1, false);
            (value, new.replace(Flags::CF, flags))
        }
        FlagOp::Shl | FlagOp::Shr | FlagOp::Sar => shift(op, size, a, count(size, full_b), flags),
        FlagOp::Rol | FlagOp::Ror | FlagOp::Rcl | FlagOp::Rcr => rotate(op, size, a, count(size, full_b), flags),
        FlagOp::Mul => {
            let product = extend_sign(size, a) * extend_sign(size, b);
            let value = product as u64 & m;
            let overflow = product != extend_sign(size, value);
            (value, flags.replace(CARRY_OVERFLOW, Flags(if overflow { CARRY_OVERFLOW.0 } else { 0 })))
        }
        FlagOp::Bt | FlagOp::Bts | FlagOp::Btr | FlagOp::Btc => {
            let bit = 1u64 << (full_b & u64::from(8 * size.bytes() - 1));
            let new = flags.replace(Flags::CF, Flags::CF.bit(a & bit != 0));
            match op {
                FlagOp::Bts => (a | bit, new),
                FlagOp::Btr => (a & !bit, new),
                FlagOp::Btc => (a ^ bit, new),
                _ => return (None, new),
            }
        }
        FlagOp::Bsf | FlagOp::Bsr => {
            if a == 0 {
                return (None, Flags(Flags::ZF.0 | Flags::PF.0));
            }
            let index = u64::from(if op == FlagOp::Bsf { a.trailing_zeros() } else { 63 - a.leading_zeros() });
            (index, szp(size, index).without(Flags::ZF))
        }
        FlagOp::Popcnt => (u64::from(a.count_ones()), Flags::ZF.bit(a == 0)),
        FlagOp::Lzcnt | FlagOp::Tzcnt => {
            let bits = 8 * size.bytes();
            let n = match op {
                _ if a == 0 => bits,
                FlagOp::Tzcnt => a.trailing_zeros(),
                _ => a.leading_zeros() - (64 - bits),
            };
            let new = Flags::CF.bit(a == 0).union(Flags::ZF.bit(n == 0));
            (u64::from(n), new.replace(Flags::OF, flags))
        }
        FlagOp::Bextr => {
            let (start, len) = (full_b as u8, (full_b >> 8) as u8);
            let shifted = a.checked_shr(start.into()).unwrap_or(0);
            let value = if len < 64 { shifted & ((1 << len) - 1) } else { shifted };
            (value, szp(size, value).without(Flags::SF).union(Flags::AF))
        }
        FlagOp::Bzhi => {
            let index = full_b as u8;
            let keep = u32::from(index) < 8 * size.bytes();
            let value = if keep { a & ((1 << index) - 1) } else { a };
            (value, szp(size, value).union(Flags::CF.bit(!keep)))
        }
        FlagOp::Blsi => {
            let value = a & a.wrapping_neg();
            (value, szp(size, value).union(Flags::CF.bit(a != 0)))
        }
        FlagOp::Blsr => {
            let value = a & a.wrapping_sub(1);
            (value, szp(size, value).union(Flags::CF.bit(a == 0)))
        }
        FlagOp::Blsmsk => {
            let value = (a ^ a.wrapping_sub(1)) & m;
            (value, szp(size, value).union(Flags::CF.bit(a == 0)))
        }
    };
    (Some(value), flags)
}

const CARRY_OVERFLOW: Flags = Flags::CF.union(Flags::OF);

fn extend_sign(size: Size, value: u64) -> i128 {
    let unused = 64 - 8 * size.bytes();
    i128::from(((value << unused) as i64) >> unused)
}

/// Shifts of `a`, which is within the size, by a count that the host has masked.
fn shift(op: FlagOp, size: Size, a: u64, n: u32, flags: Flags) -> (u64, Flags) {
    if n == 0 {
        return (a, flags);
    }
    let bits = 8 * size.bytes();
    let (value, carry, overflow) = match op {
        FlagOp::Shl => {
            let wide = u128::from(a) << n;
            let (value, carry) = (wide as u64 & mask(size), wide >> bits & 1 != 0);
            (value, carry, msb(size, value) != carry)
        }
        FlagOp::Shr => {
            let value = a >> n;
            (value, a >> (n - 1) & 1 != 0, msb(size, value) != msb(size, value << 1))
        }
        _ => {
            let signed = extend_sign(size, a);
            ((signed >> n) as u64 & mask(size), signed >> (n - 1) & 1 != 0, false)
        }
    };
    let new = szp(size, value).union(Flags::AF).union(Flags::CF.bit(carry)).union(Flags::OF.bit(overflow));
    (value, new)
}

/// Rotates of `a`, which is within the size, by a count that the host has masked.
fn rotate(op: FlagOp, size: Size, a: u64, n: u32, flags: Flags) -> (u64, Flags) {
    if n == 0 {
        return (a, flags);
    }
    let bits = 8 * size.bytes();
    let left = matches!(op, FlagOp::Rol | FlagOp::Rcl);
    let through_carry = matches!(op, FlagOp::Rcl | FlagOp::Rcr);
    // The carry is one more bit above the others.
    let width = bits + u32::from(through_carry);
    let carry_in = u128::from(through_carry && flags.contains(Flags::CF)) << bits;
    let whole = u128::from(a) | carry_in;
    let n = n % width;
    let by = if left { n } else { (width - n) % width };
    let rotated = (whole << by | whole >> (width - by)) & ((1u128 << width) - 1);
    let value = rotated as u64 & mask(size);
    let carry = match op {
        FlagOp::Rol => value & 1 != 0,
        FlagOp::Ror => msb(size, value),
        _ => rotated >> bits & 1 != 0,
    };
    let overflow = if left { msb(size, value) != carry } else { msb(size, value) != msb(size, value << 1) };
    let new = Flags::CF.bit(carry).union(Flags::OF.bit(overflow));
    (value, flags.replace(CARRY_OVERFLOW, new))
}

/// The double shift: `a` shifted left (or right) by `n`, filled from the top (or bottom) of `b`. As
/// [`FlagOp::Shl`] as to the count and the flags. For [`Size::B2`] and a count above 16, which the manuals leave
/// open, `b` rotated, without carry; on a host of Intel's `a` follows `b` once more.
pub fn shift_double(left: bool, size: Size, a: u64, b: u64, n: u64, flags: Flags) -> (u64, Flags) {
    let (value, new) = shift_double_as_amd(left, size, a, b, n, flags);
    let size = size.max(Size::B2);
    let n = count(size, n);
    if n == 0 || !host_is_intel() {
        return (value, new);
    }
    let (value, new) = if n > 8 * size.bytes() { shift_three(left, a, b, n) } else { (value, new) };
    let by_one = shift_double_as_amd(left, size, a, b, 1, flags).1;
    (value, new.without(Flags::AF).replace(Flags::OF, by_one))
}

/// The double shift of 16 bits by more, as Intel's processors do it: of `a`, `b` and `a` (measured).
fn shift_three(left: bool, a: u64, b: u64, n: u32) -> (u64, Flags) {
    let (a, b) = (u128::from(a as u16), u128::from(b as u16));
    let all = a << 32 | b << 16 | a;
    let (value, carry) = if left { (all << n >> 32, all << n >> 48 & 1) } else { (all >> n, all >> (n - 1) & 1) };
    let value = value as u64 & 0xffff;
    (value, szp(Size::B2, value).union(Flags::CF.bit(carry != 0)))
}

fn shift_double_as_amd(left: bool, size: Size, a: u64, b: u64, n: u64, flags: Flags) -> (u64, Flags) {
    let size = size.max(Size::B2);
    let (bits, m, n) = (8 * size.bytes(), mask(size), count(size, n));
    let (a, b) = (a & m, b & m);
    if n == 0 {
        return (a, flags);
    }
    let (value, carry) = if n > bits {
        let b = b as u16;
        (u64::from(if left { b.rotate_left(n) } else { b.rotate_right(n) }), false)
    } else if left {
        let wide = u128::from(a) << bits | u128::from(b);
        ((wide << n >> bits) as u64 & m, wide >> (2 * bits - n) & 1 != 0)
    } else {
        let wide = u128::from(b) << bits | u128::from(a);
        ((wide >> n) as u64 & m, wide >> (n - 1) & 1 != 0)
    };
    let overflow = if left { msb(size, a << n & m) != carry } else { msb(size, value) != msb(size, value << 1) };
    let new = szp(size, value).union(Flags::AF).union(Flags::CF.bit(carry)).union(Flags::OF.bit(overflow));
    (value, new)
}

/// Both halves of a product, low first, each within the size, and whether CF and OF are set: the high half is
/// more than the low half's extension. The other flags are undefined; see [`after_mul_wide`].
pub fn mul_wide(signed: bool, size: Size, a: u64, b: u64) -> (u64, u64, bool) {
    let (bits, m) = (8 * size.bytes(), mask(size));
    let product = if signed {
        (extend_sign(size, a) * extend_sign(size, b)) as u128
    } else {
        u128::from(a & m) * u128::from(b & m)
    };
    let (low, high) = (product as u64 & m, (product >> bits) as u64 & m);
    let plain = if signed { (extend_sign(size, low) >> bits) as u64 & m } else { 0 };
    (low, high, high != plain)
}

/// The flags after [`mul_wide`]: those that are undefined stay, or with Intel's processors are the low half's, of `size`,
/// but for ZF (measured).
pub fn after_mul_wide(flags: Flags, size: Size, low: u64, overflow: bool) -> Flags {
    let flags = if host_is_intel() { szp(size, low).without(Flags::ZF) } else { flags };
    flags.replace(CARRY_OVERFLOW, Flags(if overflow { CARRY_OVERFLOW.0 } else { 0 }))
}

/// The flags that a division leaves alone.
pub const KEPT_BY_DIVISION: Flags = CARRY_OVERFLOW;

/// The flags after [`div_wide`]: the manuals leave them open, and AMD's processors all do this.
pub const fn after_division(flags: Flags) -> Flags {
    Flags::AF.union(flags.and(KEPT_BY_DIVISION))
}

/// Quotient and remainder of `high:low` by `b`, each within the size; `None` if `b` is zero or the quotient does
/// not fit, where x86 raises #DE.
pub fn div_wide(signed: bool, size: Size, high: u64, low: u64, b: u64) -> Option<(u64, u64)> {
    let (bits, m) = (8 * size.bytes(), mask(size));
    let wide = u128::from(high & m) << bits | u128::from(low & m);
    if !signed {
        let b = u128::from(b & m);
        let quotient = wide.checked_div(b)?;
        return (quotient <= u128::from(m)).then_some((quotient as u64, (wide % b) as u64));
    }
    let unused = 128 - 2 * bits;
    let wide = ((wide << unused) as i128) >> unused;
    let b = extend_sign(size, b);
    let quotient = wide.checked_div(b)?;
    let fits = quotient == extend_sign(size, quotient as u64 & m);
    fits.then(|| (quotient as u64 & m, (wide % b) as u64 & m))
}

/// How to compute an operation's flags after it: from operands that are still there, or from its result.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Recipe {
    pub how: How,
    pub size: Size,
    /// What the computation starts from: an operand, or the result.
    pub from: Val,
    pub b: Val,
    /// CF is not computed but in the slot.
    pub carry_in_slot: bool,
}

/// See [`Recipe`].
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum How {
    /// The operation once more.
    Again(FlagOp),
    /// The operation undone and done once more.
    UndoAnd(FlagOp),
    /// `test` of the result.
    Test,
    /// A product's, kept in a place that is the backend's own: in no table.
    Product,
}

impl Recipe {
    /// The flags, with what `slot` says slots have.
    pub fn flags(self, slot: impl Fn(Slot) -> u64) -> Flags {
        let value = |val| match val {
            Val::Slot(s) => slot(s),
            Val::Imm(imm) => imm as u64,
        };
        let (from, b) = (value(self.from), value(self.b));
        let before = Flags::unpack(slot(FLAGS));
        let of = |op, a| eval(op, self.size, a, b, before).1;
        match self.how {
            How::Again(op) => of(op, from),
            How::UndoAnd(op) => {
                let undo = match op {
                    FlagOp::Add => FlagOp::Sub,
                    FlagOp::Sub => FlagOp::Add,
                    FlagOp::Inc => FlagOp::Dec,
                    FlagOp::Dec => FlagOp::Inc,
                    other => other,
                };
                of(op, eval(undo, self.size, from, b, before).0.unwrap_or(from))
            }
            How::Test => eval(FlagOp::And, self.size, from, from, before).1,
            How::Product => before,
        }
    }
}
