//! The arithmetic of flags ([`mimus_tcg_ir::flags`]) against the processor's own instructions.
#![allow(unsafe_code)]

use super::random::Rng;
use mimus_tcg_ir::flags::{self, Flags};
use mimus_tcg_ir::verify::{has_count, least_size};
use mimus_tcg_ir::{FlagOp, Size};
use std::arch::asm;

/// The processor's registers for an instruction under test.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Regs {
    rax: u64,
    rcx: u64,
    rdx: u64,
    flags: u64,
}

/// Runs one instruction on [`Regs`].
macro_rules! go {
    ($r:ident, $ins:expr) => {{
        let Regs { mut rax, rcx, mut rdx, mut flags } = $r;
        // SAFETY: one instruction on registers, between loads of flags that an interrupt may see at any time.
        unsafe {
            asm!("push {f}", "popfq", $ins, "pushfq", "pop {f}", f = inout(reg) flags, inout("rax") rax,
                 in("rcx") rcx, inout("rdx") rdx);
        }
        Regs { rax, rcx, rdx, flags }
    }};
}

/// `ins rax, rcx` and its narrower forms.
macro_rules! two {
    ($r:ident, $size:ident, $ins:literal) => {
        match $size {
            Size::B1 => go!($r, concat!($ins, " al, cl")),
            _ => wide!($r, $size, $ins),
        }
    };
}

/// The same of instructions without a byte form.
macro_rules! wide {
    ($r:ident, $size:ident, $ins:literal) => {
        match $size {
            Size::B1 | Size::B2 => go!($r, concat!($ins, " ax, cx")),
            Size::B4 => go!($r, concat!($ins, " eax, ecx")),
            Size::B8 => go!($r, concat!($ins, " rax, rcx")),
        }
    };
}

/// `ins rax` with `tail` behind it.
macro_rules! one {
    ($r:ident, $size:ident, $ins:literal, $tail:literal) => {
        match $size {
            Size::B1 => go!($r, concat!($ins, " al", $tail)),
            Size::B2 => go!($r, concat!($ins, " ax", $tail)),
            Size::B4 => go!($r, concat!($ins, " eax", $tail)),
            Size::B8 => go!($r, concat!($ins, " rax", $tail)),
        }
    };
}

/// `ins rax, rcx` at 4 or 8 bytes.
macro_rules! large {
    ($r:ident, $size:ident, $ins:literal) => {
        if $size == Size::B8 { go!($r, concat!($ins, " rax, rcx")) } else { go!($r, concat!($ins, " eax, ecx")) }
    };
}

/// `ins rax, rax, rcx`.
macro_rules! three {
    ($r:ident, $size:ident, $ins:literal) => {
        if $size == Size::B8 {
            go!($r, concat!($ins, " rax, rax, rcx"))
        } else {
            go!($r, concat!($ins, " eax, eax, ecx"))
        }
    };
}

/// The instruction that `op` is: on `rax` and `rcx`, or from `rcx` to `rax` if [`from_rcx`].
fn native(op: FlagOp, size: Size, r: Regs) -> Regs {
    match op {
        FlagOp::Add => two!(r, size, "add"),
        FlagOp::Adc => two!(r, size, "adc"),
        FlagOp::Sub => two!(r, size, "sub"),
        FlagOp::Sbb => two!(r, size, "sbb"),
        FlagOp::And => two!(r, size, "and"),
        FlagOp::Or => two!(r, size, "or"),
        FlagOp::Xor => two!(r, size, "xor"),
        FlagOp::Neg => one!(r, size, "neg", ""),
        FlagOp::Not => one!(r, size, "not", ""),
        FlagOp::Inc => one!(r, size, "inc", ""),
        FlagOp::Dec => one!(r, size, "dec", ""),
        FlagOp::Mul => wide!(r, size, "imul"),
        FlagOp::Shl => one!(r, size, "shl", ", cl"),
        FlagOp::Shr => one!(r, size, "shr", ", cl"),
        FlagOp::Sar => one!(r, size, "sar", ", cl"),
        FlagOp::Rol => one!(r, size, "rol", ", cl"),
        FlagOp::Ror => one!(r, size, "ror", ", cl"),
        FlagOp::Rcl => one!(r, size, "rcl", ", cl"),
        FlagOp::Rcr => one!(r, size, "rcr", ", cl"),
        FlagOp::Bt => wide!(r, size, "bt"),
        FlagOp::Bts => wide!(r, size, "bts"),
        FlagOp::Btr => wide!(r, size, "btr"),
        FlagOp::Btc => wide!(r, size, "btc"),
        FlagOp::Bsf => wide!(r, size, "bsf"),
        FlagOp::Bsr => wide!(r, size, "bsr"),
        FlagOp::Popcnt => wide!(r, size, "popcnt"),
        FlagOp::Lzcnt => wide!(r, size, "lzcnt"),
        FlagOp::Tzcnt => wide!(r, size, "tzcnt"),
        FlagOp::Andn => three!(r, size, "andn"),
        FlagOp::Bextr => three!(r, size, "bextr"),
        FlagOp::Bzhi => three!(r, size, "bzhi"),
        FlagOp::Blsi => large!(r, size, "blsi"),
        FlagOp::Blsr => large!(r, size, "blsr"),
        FlagOp::Blsmsk => large!(r, size, "blsmsk"),
    }
}

fn from_rcx(op: FlagOp) -> bool {
    use FlagOp::*;
    matches!(op, Bsf | Bsr | Popcnt | Lzcnt | Tzcnt | Blsi | Blsr | Blsmsk)
}

/// Whether the processor does as AMD's do where the manuals leave it open, which the interpreter follows.
pub fn is_amd() -> bool {
    let vendor = std::arch::x86_64::__cpuid(0);
    [vendor.ebx, vendor.edx, vendor.ecx].map(u32::to_le_bytes).concat() == b"AuthenticAMD"
}

/// Random registers; the flags are those of user code that only the six vary of.
fn regs(rng: &mut Rng) -> Regs {
    let flags = u64::from(rng.next() as u16 & Flags::ALL.0) | 0x202;
    let rcx = if rng.chance(30) { rng.below(70) } else { rng.number() };
    Regs { rax: rng.number(), rcx, rdx: rng.number(), flags }
}

/// What may differ of the flags.
fn open(undefined: Flags, amd: bool) -> Flags {
    if amd { Flags::NONE } else { undefined }
}

#[test]
fn operations_are_the_processors_own() {
    let amd = is_amd();
    let mut rng = Rng(0x5eed);
    for op in FlagOp::ALL {
        for size in [Size::B1, Size::B2, Size::B4, Size::B8].into_iter().filter(|size| *size >= least_size(op)) {
            for _ in 0..60_000 {
                let before = regs(&mut rng);
                let after = native(op, size, before);
                let (a, b) = if from_rcx(op) { (before.rcx, 0) } else { (before.rax, before.rcx) };
                let old = Flags::from_eflags(before.flags);
                let (value, new) = flags::eval(op, size, a, b, old);
                let value = value.map_or(before.rax, |value| flags::merge(size, before.rax, value));
                let counted = has_count(op) && flags::count(size, b) == 0;
                let ignored = if counted { Flags::NONE } else { open(flags::undefined(op), amd) };
                let native_flags = Flags::from_eflags(after.flags).without(ignored);
                assert_eq!(
                    (after.rax, native_flags),
                    (value, new.without(ignored)),
                    "{op:?} {size:?} of {before:x?}: the processor's is on the left"
                );
                if !counted {
                    let may = flags::written_by(op);
                    assert_eq!(new.without(may), old.without(may), "{op:?} leaves other flags alone");
                }
            }
        }
    }
}

#[test]
fn double_shifts_are_the_processors_own() {
    let amd = is_amd();
    let mut rng = Rng(0x5eed1);
    for left in [true, false] {
        for size in [Size::B2, Size::B4, Size::B8] {
            for _ in 0..100_000 {
                let before = regs(&mut rng);
                let after = match (left, size) {
                    (true, Size::B8) => go!(before, "shld rax, rdx, cl"),
                    (true, Size::B4) => go!(before, "shld eax, edx, cl"),
                    (true, _) => go!(before, "shld ax, dx, cl"),
                    (false, Size::B8) => go!(before, "shrd rax, rdx, cl"),
                    (false, Size::B4) => go!(before, "shrd eax, edx, cl"),
                    (false, _) => go!(before, "shrd ax, dx, cl"),
                };
                let n = flags::count(size, before.rcx);
                if size == Size::B2 && n > 16 && !amd {
                    continue;
                }
                let old = Flags::from_eflags(before.flags);
                let (value, new) = flags::shift_double(left, size, before.rax, before.rdx, before.rcx, old);
                let ignored = if n == 0 { Flags::NONE } else { open(flags::undefined(FlagOp::Shl), amd) };
                assert_eq!(
                    (after.rax, Flags::from_eflags(after.flags).without(ignored)),
                    (flags::merge(size, before.rax, value), new.without(ignored)),
                    "left: {left}, {size:?} of {before:x?}: the processor's is on the left"
                );
            }
        }
    }
}

/// `ins` of `rcx` on `rdx:rax`.
macro_rules! pair {
    ($r:ident, $size:ident, $ins:literal) => {
        match $size {
            Size::B1 => go!($r, concat!($ins, " cl")),
            Size::B2 => go!($r, concat!($ins, " cx")),
            Size::B4 => go!($r, concat!($ins, " ecx")),
            Size::B8 => go!($r, concat!($ins, " rcx")),
        }
    };
}

/// `rax` and `rdx` as an operation with two results leaves them.
fn filled(size: Size, before: Regs, low: u64, high: u64) -> (u64, u64) {
    if size == Size::B1 {
        return (flags::merge(Size::B2, before.rax, high << 8 | low), before.rdx);
    }
    (flags::merge(size, before.rax, low), flags::merge(size, before.rdx, high))
}

#[test]
fn wide_products_are_the_processors_own() {
    let amd = is_amd();
    let mut rng = Rng(0x5eed2);
    for signed in [true, false] {
        for size in [Size::B1, Size::B2, Size::B4, Size::B8] {
            for _ in 0..60_000 {
                let before = regs(&mut rng);
                let after = if signed { pair!(before, size, "imul") } else { pair!(before, size, "mul") };
                let (low, high, overflow) = flags::mul_wide(signed, size, before.rax, before.rcx);
                let new = flags::after_mul_wide(Flags::from_eflags(before.flags), size, low, overflow);
                let ignored = open(flags::undefined(FlagOp::Mul), amd);
                assert_eq!(
                    ((after.rax, after.rdx), Flags::from_eflags(after.flags).without(ignored)),
                    (filled(size, before, low, high), new.without(ignored)),
                    "signed: {signed}, {size:?} of {before:x?}: the processor's is on the left"
                );
            }
        }
    }
}

#[test]
fn wide_divisions_are_the_processors_own() {
    let mut rng = Rng(0x5eed3);
    let mut possible = 0;
    for signed in [true, false] {
        for size in [Size::B1, Size::B2, Size::B4, Size::B8] {
            for _ in 0..60_000 {
                let mut before = regs(&mut rng);
                if rng.chance(60) {
                    // Something that fits: the dividend is small, or an extension.
                    let sign = flags::merge(size, 0, before.rax) >> (8 * size.bytes() - 1) & 1;
                    before.rdx = match rng.below(3) {
                        0 if signed => 0u64.wrapping_sub(sign),
                        1 => (before.rcx as i64 >> rng.below(64)) as u64,
                        _ => 0,
                    };
                }
                let high = if size == Size::B1 { before.rax >> 8 } else { before.rdx };
                // Where there is no quotient the processor traps; that `div_wide` says so is checked beside it.
                let Some((quotient, remainder)) = flags::div_wide(signed, size, high, before.rax, before.rcx) else {
                    continue;
                };
                possible += 1;
                let after = if signed { pair!(before, size, "idiv") } else { pair!(before, size, "div") };
                assert_eq!(
                    (after.rax, after.rdx),
                    filled(size, before, quotient, remainder),
                    "signed: {signed}, {size:?} of {before:x?}: the processor's is on the left"
                );
            }
        }
    }
    assert!(possible > 100_000, "only {possible} divisions have a quotient");
}

#[test]
fn divisions_without_a_quotient() {
    let div = flags::div_wide;
    for size in [Size::B1, Size::B2, Size::B4, Size::B8] {
        let bits = 8 * size.bytes();
        let (min, ones) = (1u64 << (bits - 1), !0 >> (64 - bits));
        for signed in [true, false] {
            assert_eq!(div(signed, size, 0, 5, 0), None);
        }
        assert_eq!(div(true, size, ones, min, ones), None, "the quotient of the lowest by -1");
        assert_eq!(div(true, size, ones, min, 1), Some((min, 0)));
        assert_eq!(div(true, size, 0, min, ones), Some((min, 0)), "-2^(n-1) is in range");
        assert_eq!(div(true, size, 0, min, 1), None);
        assert_eq!(div(false, size, 5, 0, 5), None);
        assert_eq!(div(false, size, 4, ones, 5), Some((ones, 4)));
        assert_eq!(div(true, size, min, 0, min), None);
    }
}

/// Conditions, against the processor's `setcc`.
#[test]
fn conditions_are_the_processors_own() {
    use mimus_tcg_ir::CondF;
    macro_rules! set {
        ($flags:ident, $($cond:ident $ins:literal),+) => {
            [$({
                let before = Regs { rax: 0, rcx: 0, rdx: 0, flags: u64::from($flags.0) | 0x202 };
                (CondF::$cond, go!(before, $ins).rax & 1 == 1)
            }),+]
        };
    }
    for bits in 0..64u16 {
        let flag = |i: u16, f: Flags| if bits >> i & 1 == 1 { f } else { Flags::NONE };
        let all = [Flags::CF, Flags::PF, Flags::AF, Flags::ZF, Flags::SF, Flags::OF];
        let flags = (0..).zip(all).fold(Flags::NONE, |sum, (i, f)| sum.union(flag(i, f)));
        let results = set!(flags, O "seto al", No "setno al", B "setb al", Ae "setae al", E "sete al", Ne "setne al",
            Be "setbe al", A "seta al", S "sets al", Ns "setns al", P "setp al", Np "setnp al", L "setl al",
            Ge "setge al", Le "setle al", G "setg al");
        for (cond, native) in results {
            assert_eq!(flags::holds(cond, flags), native, "{cond:?} of {flags}");
            assert_eq!(flags::holds(cond.invert(), flags), !native);
            // Flags that the condition does not name do not matter.
            let kept = flags.and(flags::read_by(cond));
            assert_eq!(flags::holds(cond, kept), native, "{cond:?} reads {}", flags::read_by(cond));
        }
        assert_eq!(Flags::unpack(flags.pack()), flags);
    }
}
