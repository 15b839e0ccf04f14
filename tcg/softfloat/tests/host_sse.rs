//! Every operation the host's SSE unit has, against it: results and flags, in its four rounding modes.
//!
//! The instructions run inside inline assembly, so that the compiler neither folds them nor moves them across
//! the change of MXCSR.
#![cfg(target_arch = "x86_64")]
#![allow(unsafe_code)]

mod common {
    mod operands;
    pub use operands::*;
}

use common::{Rng, trials};
use mimus_tcg_softfloat::*;
use std::arch::asm;
use std::fmt::Debug;

const HOST_MODES: [Rounding; 4] = [Rounding::NearestEven, Rounding::ToZero, Rounding::Down, Rounding::Up];

/// MXCSR with every exception masked, no flag set, and the rounding mode (SDM vol. 1, 10.2.3).
fn mxcsr(mode: Rounding) -> u32 {
    let rc = match mode {
        Rounding::Down => 1,
        Rounding::Up => 2,
        Rounding::ToZero => 3,
        Rounding::NearestEven | Rounding::NearestMaxMag => 0,
    };
    0x1f80 | rc << 13
}

/// MXCSR's flags in `fflags` order; the denormal flag has no counterpart.
fn host_flags(csr: u32) -> Flags {
    let pairs = [(1, Flags::NV), (4, Flags::DZ), (8, Flags::OF), (16, Flags::UF), (32, Flags::NX)];
    let set = pairs.iter().filter(|(bit, _)| csr & bit != 0);
    set.fold(Flags::NONE, |all, (_, flag)| all | *flag)
}

/// `fn name(x, y, mode) -> (result, flags)` around one instruction `insn dst, src` with `dst` read as `x`.
macro_rules! host_op {
    ($name:ident, $insn:literal, $float:ty) => {
        fn $name(
            x: <$float as Host>::Bits,
            y: <$float as Host>::Bits,
            mode: Rounding,
        ) -> (<$float as Host>::Bits, Flags) {
            let (mut saved, mut csr) = (0u32, mxcsr(mode));
            let mut r = <$float>::from_bits(x);
            // SAFETY: SSE2 is part of x86-64 (callers check SSE4.1 for `round*`); both pointers are to
            // locals; MXCSR is restored.
            unsafe {
                asm!("stmxcsr [{saved}]", "ldmxcsr [{csr}]", $insn, "stmxcsr [{csr}]", "ldmxcsr [{saved}]",
                    saved = in(reg) &mut saved, csr = in(reg) &mut csr,
                    r = inout(xmm_reg) r, y = in(xmm_reg) <$float>::from_bits(y), options(nostack));
            }
            (r.to_bits(), host_flags(csr))
        }
    };
}

/// `fn name(x, mode) -> (result, flags)` around a conversion between two register types.
macro_rules! host_cvt {
    ($name:ident, $insn:literal, $from:ty: $from_class:ident, $to:ty: $to_class:ident) => {
        fn $name(x: $from, mode: Rounding) -> ($to, Flags) {
            let (mut saved, mut csr) = (0u32, mxcsr(mode));
            let r: $to;
            // SAFETY: SSE2 is part of x86-64; both pointers are to locals; MXCSR is restored.
            unsafe {
                asm!("stmxcsr [{saved}]", "ldmxcsr [{csr}]", $insn, "stmxcsr [{csr}]", "ldmxcsr [{saved}]",
                    saved = in(reg) &mut saved, csr = in(reg) &mut csr,
                    x = in($from_class) x, r = out($to_class) r, options(nostack));
            }
            (r, host_flags(csr))
        }
    };
}

/// `fn name(x, y) -> ((unordered, below, equal), flags)` around a compare.
macro_rules! host_cmp {
    ($name:ident, $insn:literal, $float:ty) => {
        fn $name(x: <$float as Host>::Bits, y: <$float as Host>::Bits) -> ((u8, u8, u8), Flags) {
            let (mut saved, mut csr) = (0u32, mxcsr(Rounding::NearestEven));
            let (p, c, z): (u8, u8, u8);
            // SAFETY: SSE2 is part of x86-64; both pointers are to locals; MXCSR is restored.
            unsafe {
                asm!("stmxcsr [{saved}]", "ldmxcsr [{csr}]", $insn, "setp {p}", "setb {c}", "sete {z}",
                    "stmxcsr [{csr}]", "ldmxcsr [{saved}]",
                    saved = in(reg) &mut saved, csr = in(reg) &mut csr,
                    p = out(reg_byte) p, c = out(reg_byte) c, z = out(reg_byte) z,
                    x = in(xmm_reg) <$float>::from_bits(x), y = in(xmm_reg) <$float>::from_bits(y),
                    options(nostack));
            }
            ((p, c, z), host_flags(csr))
        }
    };
}

/// `fn name(x, y, z, mode) -> (x*y + z, flags)` and its negated forms.
macro_rules! host_fma {
    ($name:ident, $insn:literal, $float:ty) => {
        fn $name(
            [x, y, z]: [<$float as Host>::Bits; 3],
            mode: Rounding,
        ) -> (<$float as Host>::Bits, Flags) {
            let (mut saved, mut csr) = (0u32, mxcsr(mode));
            let mut r = <$float>::from_bits(x);
            // SAFETY: callers have checked that the host has FMA; both pointers are to locals; MXCSR is
            // restored.
            unsafe {
                asm!("stmxcsr [{saved}]", "ldmxcsr [{csr}]", $insn, "stmxcsr [{csr}]", "ldmxcsr [{saved}]",
                    saved = in(reg) &mut saved, csr = in(reg) &mut csr, r = inout(xmm_reg) r,
                    y = in(xmm_reg) <$float>::from_bits(y), z = in(xmm_reg) <$float>::from_bits(z),
                    options(nostack));
            }
            (r.to_bits(), host_flags(csr))
        }
    };
}

trait Host {
    type Bits: Float;
}
impl Host for f32 {
    type Bits = u32;
}
impl Host for f64 {
    type Bits = u64;
}

host_op!(addss, "addss {r}, {y}", f32);
host_op!(subss, "subss {r}, {y}", f32);
host_op!(mulss, "mulss {r}, {y}", f32);
host_op!(divss, "divss {r}, {y}", f32);
host_op!(sqrtss, "sqrtss {r}, {y}", f32);
host_op!(roundss, "roundss {r}, {y}, 4", f32);
host_op!(roundss_quiet, "roundss {r}, {y}, 12", f32);
host_op!(minss, "minss {r}, {y}", f32);
host_op!(maxss, "maxss {r}, {y}", f32);
host_op!(minsd, "minsd {r}, {y}", f64);
host_op!(maxsd, "maxsd {r}, {y}", f64);
host_op!(addsd, "addsd {r}, {y}", f64);
host_op!(subsd, "subsd {r}, {y}", f64);
host_op!(mulsd, "mulsd {r}, {y}", f64);
host_op!(divsd, "divsd {r}, {y}", f64);
host_op!(sqrtsd, "sqrtsd {r}, {y}", f64);
host_op!(roundsd, "roundsd {r}, {y}, 4", f64);
host_op!(roundsd_quiet, "roundsd {r}, {y}, 12", f64);
host_cmp!(comiss, "comiss {x}, {y}", f32);
host_cmp!(ucomiss, "ucomiss {x}, {y}", f32);
host_cmp!(comisd, "comisd {x}, {y}", f64);
host_cmp!(ucomisd, "ucomisd {x}, {y}", f64);
host_fma!(fmaddss, "vfmadd213ss {r}, {y}, {z}", f32);
host_fma!(fmsubss, "vfmsub213ss {r}, {y}, {z}", f32);
host_fma!(fnmaddss, "vfnmadd213ss {r}, {y}, {z}", f32);
host_fma!(fnmsubss, "vfnmsub213ss {r}, {y}, {z}", f32);
host_fma!(fmaddsd, "vfmadd213sd {r}, {y}, {z}", f64);
host_fma!(fmsubsd, "vfmsub213sd {r}, {y}, {z}", f64);
host_fma!(fnmaddsd, "vfnmadd213sd {r}, {y}, {z}", f64);
host_fma!(fnmsubsd, "vfnmsub213sd {r}, {y}, {z}", f64);
host_cvt!(cvtss2sd, "cvtss2sd {r}, {x}", f32: xmm_reg, f64: xmm_reg);
host_cvt!(cvtsd2ss, "cvtsd2ss {r}, {x}", f64: xmm_reg, f32: xmm_reg);
host_cvt!(cvtss2si32, "cvtss2si {r:e}, {x}", f32: xmm_reg, i32: reg);
host_cvt!(cvtss2si64, "cvtss2si {r:r}, {x}", f32: xmm_reg, i64: reg);
host_cvt!(cvtsd2si32, "cvtsd2si {r:e}, {x}", f64: xmm_reg, i32: reg);
host_cvt!(cvtsd2si64, "cvtsd2si {r:r}, {x}", f64: xmm_reg, i64: reg);
host_cvt!(cvtsi2ss32, "cvtsi2ss {r}, {x:e}", i32: reg, f32: xmm_reg);
host_cvt!(cvtsi2ss64, "cvtsi2ss {r}, {x:r}", i64: reg, f32: xmm_reg);
host_cvt!(cvtsi2sd32, "cvtsi2sd {r}, {x:e}", i32: reg, f64: xmm_reg);
host_cvt!(cvtsi2sd64, "cvtsi2sd {r}, {x:r}", i64: reg, f64: xmm_reg);

/// x86's rules: NaN operands propagate.
fn status(rounding: Rounding) -> FloatStatus {
    FloatStatus { default_nan: false, ..FloatStatus::riscv(rounding) }
}

/// Runs `f` on a fresh status; its result and flags.
fn run<R>(mode: Rounding, f: impl FnOnce(&mut FloatStatus) -> R) -> (R, Flags) {
    let mut st = status(mode);
    let r = f(&mut st);
    (r, st.flags)
}

/// Equal results and flags. The NaN of an invalid operation is negative on x86 and positive here; with
/// `any_nan`, NaN operands may also have been chosen differently.
fn check<F: Float>(what: &str, mode: Rounding, operands: &[F], any_nan: bool, ours: (F, Flags), host: (F, Flags)) {
    let generated = !operands.iter().any(|f| f.is_nan());
    let both_nan = ours.0.is_nan() && host.0.is_nan();
    let same = ours.0 == host.0 || (both_nan && (generated || any_nan));
    assert!(same && ours.1 == host.1, "{what} {mode:?} of {operands:#x?}: ours {ours:#x?}, host {host:#x?}",);
}

type Binary<F> = (&'static str, fn(F, F, &mut FloatStatus) -> F, fn(F, F, Rounding) -> (F, Flags));

fn binary<F: Float>(seed: u64, n: u64, ops: &[Binary<F>]) {
    let mut rng = Rng(seed);
    for _ in 0..n {
        let [a, b, _] = rng.triple::<F>();
        let mode = rng.rounding(&HOST_MODES);
        for (name, ours, host) in ops {
            check(name, mode, &[a, b], false, run(mode, |st| ours(a, b, st)), host(a, b, mode));
        }
    }
}

#[test]
fn arithmetic_f32() {
    let ops: [Binary<u32>; 4] = [("add", add, addss), ("sub", sub, subss), ("mul", mul, mulss), ("div", div, divss)];
    binary(1, trials(300_000), &ops);
}

#[test]
fn arithmetic_f64() {
    let ops: [Binary<u64>; 4] = [("add", add, addsd), ("sub", sub, subsd), ("mul", mul, mulsd), ("div", div, divsd)];
    binary(2, trials(300_000), &ops);
}

type HostOp<F> = fn(F, F, Rounding) -> (F, Flags);

fn unary<F: Float>(seed: u64, host: [HostOp<F>; 3]) {
    let mut rng = Rng(seed);
    let has_round = is_x86_feature_detected!("sse4.1");
    if !has_round {
        // Not by a macro: the test runner keeps those to itself.
        let _ = std::io::Write::write_all(&mut std::io::stderr(), b"SKIPPED (unary/round): the host has no SSE4.1\n");
    }
    for _ in 0..trials(300_000) {
        let a = rng.operand::<F>();
        let mode = rng.rounding(&HOST_MODES);
        check("sqrt", mode, &[a], false, run(mode, |st| sqrt(a, st)), host[0](a, a, mode));
        if has_round {
            let exact = run(mode, |st| round_to_int(a, true, st));
            check("round", mode, &[a], false, exact, host[1](a, a, mode));
            let quiet = run(mode, |st| round_to_int(a, false, st));
            check("round, quiet", mode, &[a], false, quiet, host[2](a, a, mode));
        }
    }
}

#[test]
fn unary_f32() {
    unary(3, [sqrtss, roundss, roundss_quiet]);
}

#[test]
fn unary_f64() {
    unary(4, [sqrtsd, roundsd, roundsd_quiet]);
}

/// Minimum and maximum agree with the host's once equal operands are merged bit by bit; for unordered ones the
/// host gives the second.
fn min_max<F: Float>(seed: u64, host_min: HostOp<F>, host_max: HostOp<F>) {
    let mut rng = Rng(seed);
    let mode = Rounding::NearestEven;
    for _ in 0..trials(300_000) {
        let [a, b, _] = rng.triple::<F>();
        let (ours_min, ours_max) = (run(mode, |st| min(a, b, st)), run(mode, |st| max(a, b, st)));
        let (low, high) = (host_min(a, b, mode), host_max(a, b, mode));
        if a.is_nan() || b.is_nan() {
            assert_eq!((low, high), ((b, Flags::NV), (b, Flags::NV)), "host, {a:#x?} and {b:#x?}");
            continue;
        }
        let (x, y) = (a.to_raw(), b.to_raw());
        let equal = eq(a, b, &mut status(mode));
        let low = if equal { F::from_raw(x | y) } else { low.0 };
        let high = if equal { F::from_raw(x & y) } else { high.0 };
        assert_eq!((ours_min, ours_max), ((low, Flags::NONE), (high, Flags::NONE)), "{a:#x?} {b:#x?}");
    }
}

#[test]
fn min_max_f32() {
    min_max::<u32>(12, minss, maxss);
}

#[test]
fn min_max_f64() {
    min_max::<u64>(13, minsd, maxsd);
}

type HostFma<F> = fn([F; 3], Rounding) -> (F, Flags);

fn fused<F: Float>(seed: u64, host: [HostFma<F>; 4]) {
    if !is_x86_feature_detected!("fma") {
        // Not by a macro: the test runner keeps those to itself.
        let _ = std::io::Write::write_all(&mut std::io::stderr(), b"SKIPPED (fused): the host has no FMA\n");
        return;
    }
    let mut rng = Rng(seed);
    for _ in 0..trials(300_000) {
        let [a, b, c] = rng.triple::<F>();
        let mode = rng.rounding(&HOST_MODES);
        let which = rng.below(4) as usize;
        let (product, addend) = (which >= 2, which & 1 == 1);
        let mut ours = run(mode, |st| fma_negate(a, b, c, product, addend, st));
        // Zero times infinity plus a quiet NaN is invalid for RISC-V and not for x86 (SDM vol. 1, 14.5.1).
        let magnitudes = [a.to_raw() & !F::SIGN, b.to_raw() & !F::SIGN];
        if (magnitudes == [0, F::INFINITY] || magnitudes == [F::INFINITY, 0]) && c.is_nan() && !c.is_signalling_nan() {
            assert_eq!(ours.1, Flags::NV);
            ours.1 = Flags::NONE;
        }
        check("fma", mode, &[a, b, c], true, ours, host[which]([a, b, c], mode));
    }
}

#[test]
fn fused_f32() {
    fused(5, [fmaddss, fmsubss, fnmaddss, fnmsubss]);
}

#[test]
fn fused_f64() {
    fused(6, [fmaddsd, fmsubsd, fnmaddsd, fnmsubsd]);
}

type HostCompare<F> = fn(F, F) -> ((u8, u8, u8), Flags);

fn compares<F: Float>(seed: u64, quiet: HostCompare<F>, signalling: HostCompare<F>) {
    let mut rng = Rng(seed);
    for _ in 0..trials(300_000) {
        let [a, b, _] = rng.triple::<F>();
        for (host, signals) in [(quiet, false), (signalling, true)] {
            let ((p, c, z), flags) = host(a, b);
            let (equal, less) = (p == 0 && z == 1, p == 0 && c == 1);
            let ours = run(Rounding::NearestEven, |st| {
                if signals {
                    (eq_signalling(a, b, st), lt(a, b, st), le(a, b, st))
                } else {
                    (eq(a, b, st), lt_quiet(a, b, st), le_quiet(a, b, st))
                }
            });
            assert_eq!(ours, ((equal, less, equal || less), flags), "{a:#x?} and {b:#x?}");
        }
    }
}

#[test]
fn compares_f32() {
    compares(7, ucomiss, comiss);
}

#[test]
fn compares_f64() {
    compares(8, ucomisd, comisd);
}

/// To integers: equal unless the host gives its "integer indefinite", where we saturate; both raise NV only.
fn to_int_same<F: Float, I: PartialEq + Debug>(
    a: F,
    mode: Rounding,
    ours: (I, Flags),
    host: (I, Flags),
    bounds: [I; 2],
) {
    assert_eq!(ours.1, host.1, "flags of {a:#x?} {mode:?}");
    if host.1 == Flags::NV {
        let expected = &bounds[usize::from(!a.sign() || a.is_nan())];
        assert_eq!(&ours.0, expected, "{a:#x?} {mode:?}");
    } else {
        assert_eq!(ours.0, host.0, "{a:#x?} {mode:?}");
    }
}

/// Unsigned 32-bit results follow from the host's 64-bit conversion.
fn to_u32_same<F: Float>(a: F, mode: Rounding, host: (i64, Flags)) {
    let ours = run(mode, |st| to_u32(a, st));
    let expected = match u32::try_from(host.0) {
        Ok(fits) => (fits, host.1),
        Err(_) if a.sign() && !a.is_nan() => (0, Flags::NV),
        Err(_) => (u32::MAX, Flags::NV),
    };
    assert_eq!(ours, expected, "{a:#x?} {mode:?}");
}

#[test]
fn to_integers() {
    let mut rng = Rng(9);
    let (b32, b64) = ([i32::MIN, i32::MAX], [i64::MIN, i64::MAX]);
    for _ in 0..trials(300_000) {
        let mode = rng.rounding(&HOST_MODES);
        let a = rng.operand::<u32>();
        let x = f32::from_bits(a);
        to_int_same(a, mode, run(mode, |st| to_i32(a, st)), cvtss2si32(x, mode), b32);
        to_int_same(a, mode, run(mode, |st| to_i64(a, st)), cvtss2si64(x, mode), b64);
        to_u32_same(a, mode, cvtss2si64(x, mode));
        let a = rng.operand::<u64>();
        let x = f64::from_bits(a);
        to_int_same(a, mode, run(mode, |st| to_i32(a, st)), cvtsd2si32(x, mode), b32);
        to_int_same(a, mode, run(mode, |st| to_i64(a, st)), cvtsd2si64(x, mode), b64);
        to_u32_same(a, mode, cvtsd2si64(x, mode));
    }
}

#[test]
fn from_integers() {
    let mut rng = Rng(10);
    for _ in 0..trials(300_000) {
        let mode = rng.rounding(&HOST_MODES);
        let mut i = rng.next() as i64 >> rng.below(64);
        if rng.below(4) == 0 {
            i = i64::MIN.wrapping_add(i >> 40);
        }
        let w = i as i32;
        let f32_of = |r: (f32, Flags)| (r.0.to_bits(), r.1);
        let f64_of = |r: (f64, Flags)| (r.0.to_bits(), r.1);
        assert_eq!(run(mode, |st| from_i32::<u32>(w, st)), f32_of(cvtsi2ss32(w, mode)), "{w}");
        assert_eq!(run(mode, |st| from_i64::<u32>(i, st)), f32_of(cvtsi2ss64(i, mode)), "{i}");
        assert_eq!(run(mode, |st| from_i32::<u64>(w, st)), f64_of(cvtsi2sd32(w, mode)), "{w}");
        assert_eq!(run(mode, |st| from_i64::<u64>(i, st)), f64_of(cvtsi2sd64(i, mode)), "{i}");
        let u = w as u32;
        let wide = i64::from(u);
        assert_eq!(run(mode, |st| from_u32::<u32>(u, st)), f32_of(cvtsi2ss64(wide, mode)), "{u}");
        assert_eq!(run(mode, |st| from_u32::<u64>(u, st)), f64_of(cvtsi2sd64(wide, mode)), "{u}");
    }
}

#[test]
fn between_formats() {
    let mut rng = Rng(11);
    for _ in 0..trials(300_000) {
        let mode = rng.rounding(&HOST_MODES);
        let a = rng.operand::<u32>();
        let (wide, flags) = cvtss2sd(f32::from_bits(a), mode);
        assert_eq!(run(mode, |st| f32_to_f64(a, st)), (wide.to_bits(), flags), "{a:#x?}");
        // Random doubles seldom fit a single: widen one and disturb its low bits too.
        let near = wide.to_bits() ^ (rng.next() >> (34 + rng.below(30)));
        for a in [rng.operand::<u64>(), near] {
            let (narrow, flags) = cvtsd2ss(f64::from_bits(a), mode);
            let ours = run(mode, |st| f64_to_f32(a, st));
            assert_eq!(ours, (narrow.to_bits(), flags), "{a:#x?} {mode:?}");
        }
    }
}
