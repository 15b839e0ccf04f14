//! RISC-V's register-level rules, each by example (unprivileged specification, chapters "F" and "D").

use mimus_tcg_softfloat::riscv::{FpFmt, Rm, RvFpOp, exec, nan_box, unbox};
use mimus_tcg_softfloat::{Flags, FloatStatus, Rounding};

const F32: FpFmt = FpFmt::F32;
const F64: FpFmt = FpFmt::F64;
const CANON32: u64 = 0xffff_ffff_7fc0_0000;
const CANON64: u64 = 0x7ff8_0000_0000_0000;
const SNAN32: u64 = 0xffff_ffff_7f80_0001;
const QNAN32: u64 = 0xffff_ffff_ffc1_2345;
const SNAN64: u64 = 0x7ff0_0000_0000_0001;
const QNAN64: u64 = 0xfff8_0000_0001_2345;
const INF64: u64 = 0x7ff0_0000_0000_0000;

fn run(op: RvFpOp, fmt: FpFmt, rm: Rm, args: [u64; 3]) -> (u64, Flags) {
    let mut st = FloatStatus::riscv(Rounding::NearestEven);
    let r = exec(op, fmt, rm, args[0], args[1], args[2], &mut st);
    (r, st.flags)
}

fn single(op: RvFpOp, a: f32, b: f32, c: f32) -> (u64, Flags) {
    let boxed = [a, b, c].map(|f| nan_box(f.to_bits()));
    run(op, F32, Rm::NearestEven, boxed)
}

fn double(op: RvFpOp, a: f64, b: f64, c: f64) -> (u64, Flags) {
    run(op, F64, Rm::NearestEven, [a, b, c].map(f64::to_bits))
}

fn boxed(f: f32) -> u64 {
    nan_box(f.to_bits())
}

#[test]
fn operations_are_numbered_in_order() {
    for (i, op) in RvFpOp::ALL.into_iter().enumerate() {
        assert_eq!(op as usize, i);
        assert_eq!(RvFpOp::from_index(i as u8), Some(op));
    }
    assert_eq!(RvFpOp::from_index(29), None);
}

#[test]
fn singles_must_be_boxed() {
    let bare = u64::from(1.0f32.to_bits());
    assert_eq!(unbox(bare), 0x7fc0_0000);
    assert_eq!(unbox(0xffff_fffe_3f80_0000), 0x7fc0_0000);
    assert_eq!(unbox(boxed(1.0)), 1.0f32.to_bits());
    // The canonical NaN an unboxed operand reads as is quiet: no flag.
    assert_eq!(run(RvFpOp::Add, F32, Rm::Dynamic, [bare, boxed(1.0), 0]), (CANON32, Flags::NONE));
    assert_eq!(run(RvFpOp::Class, F32, Rm::Dynamic, [bare, 0, 0]), (1 << 9, Flags::NONE));
    assert_eq!(run(RvFpOp::CvtFmt, F64, Rm::Dynamic, [bare, 0, 0]), (CANON64, Flags::NONE));
    assert_eq!(run(RvFpOp::Sgnj, F32, Rm::Dynamic, [bare, boxed(-1.0), 0]).0, 0xffff_ffff_ffc0_0000);
    assert_eq!(run(RvFpOp::Sgnj, F32, Rm::Dynamic, [boxed(1.0), 1 << 31, 0]).0, boxed(1.0));
    assert_eq!(run(RvFpOp::Max, F32, Rm::Dynamic, [bare, boxed(-3.0), 0]).0, boxed(-3.0));
    // Moves look at the low bits only.
    assert_eq!(run(RvFpOp::MvToInt, F32, Rm::Dynamic, [0x8000_0001, 0, 0]).0, 0xffff_ffff_8000_0001);
    assert_eq!(run(RvFpOp::MvFromInt, F32, Rm::Dynamic, [0x1_8000_0001, 0, 0]).0, 0xffff_ffff_8000_0001);
    assert_eq!(run(RvFpOp::MvToInt, F64, Rm::Dynamic, [SNAN64, 0, 0]), (SNAN64, Flags::NONE));
    assert_eq!(run(RvFpOp::MvFromInt, F64, Rm::Dynamic, [SNAN64, 0, 0]), (SNAN64, Flags::NONE));
}

#[test]
fn nan_results_are_canonical() {
    let arithmetic = [
        RvFpOp::Add,
        RvFpOp::Sub,
        RvFpOp::Mul,
        RvFpOp::Div,
        RvFpOp::Sqrt,
        RvFpOp::MAdd,
        RvFpOp::MSub,
        RvFpOp::NMSub,
        RvFpOp::NMAdd,
        RvFpOp::Min,
        RvFpOp::Max,
    ];
    for op in arithmetic {
        let q32 = run(op, F32, Rm::Dynamic, [QNAN32; 3]);
        let q64 = run(op, F64, Rm::Dynamic, [QNAN64; 3]);
        assert_eq!([q32, q64], [(CANON32, Flags::NONE), (CANON64, Flags::NONE)], "{op:?}");
        let s32 = run(op, F32, Rm::Dynamic, [SNAN32; 3]);
        let s64 = run(op, F64, Rm::Dynamic, [SNAN64; 3]);
        assert_eq!([s32, s64], [(CANON32, Flags::NV), (CANON64, Flags::NV)], "{op:?}");
    }
    let (zero, inf) = (0.0, f64::INFINITY);
    assert_eq!(double(RvFpOp::Div, zero, zero, 0.0), (CANON64, Flags::NV));
    assert_eq!(double(RvFpOp::Sub, inf, inf, 0.0), (CANON64, Flags::NV));
    assert_eq!(double(RvFpOp::Sqrt, -1.0, 0.0, 0.0), (CANON64, Flags::NV));
    assert_eq!(double(RvFpOp::Sqrt, -0.0, 0.0, 0.0), ((-0.0f64).to_bits(), Flags::NONE));
    assert_eq!(double(RvFpOp::Div, 1.0, -0.0, 0.0), ((-inf).to_bits(), Flags::DZ));
    assert_eq!(run(RvFpOp::CvtFmt, F32, Rm::Dynamic, [QNAN64, 0, 0]), (CANON32, Flags::NONE));
    assert_eq!(run(RvFpOp::CvtFmt, F64, Rm::Dynamic, [SNAN32, 0, 0]), (CANON64, Flags::NV));
    // Infinity times zero is invalid whatever is added.
    assert_eq!(run(RvFpOp::MAdd, F64, Rm::Dynamic, [INF64, 0, QNAN64]), (CANON64, Flags::NV));
}

#[test]
fn status_settings_other_than_the_mode_do_not_matter() {
    let mut st = FloatStatus { default_nan: false, ..FloatStatus::default() };
    st.raise(Flags::DZ);
    assert_eq!(exec(RvFpOp::Add, F64, Rm::Dynamic, QNAN64, 0, 0, &mut st), CANON64);
    let third = |rm, st: &mut FloatStatus| exec(RvFpOp::Div, F64, rm, 1f64.to_bits(), 3f64.to_bits(), 0, st);
    st.rounding = Rounding::Up;
    assert_eq!(third(Rm::Dynamic, &mut st), 0x3fd5_5555_5555_5556);
    assert_eq!(third(Rm::Down, &mut st), 0x3fd5_5555_5555_5555);
    assert_eq!((st.rounding, st.flags), (Rounding::Up, Flags::DZ | Flags::NX));
}

#[test]
fn fused_signs() {
    let result = |op| double(op, 2.0, 3.0, 1.0).0;
    assert_eq!(result(RvFpOp::MAdd), 7f64.to_bits());
    assert_eq!(result(RvFpOp::MSub), 5f64.to_bits());
    assert_eq!(result(RvFpOp::NMSub), (-5f64).to_bits());
    assert_eq!(result(RvFpOp::NMAdd), (-7f64).to_bits());
    // Exact cancellation is +0, in the negated form too: it is not the negation of the rounded result.
    assert_eq!(double(RvFpOp::NMSub, 2.0, 3.0, 6.0).0, 0);
    assert_eq!(double(RvFpOp::NMAdd, 2.0, 3.0, -6.0).0, 0);
}

#[test]
fn min_and_max() {
    assert_eq!(single(RvFpOp::Min, 0.0, -0.0, 0.0).0, boxed(-0.0));
    assert_eq!(single(RvFpOp::Min, -0.0, 0.0, 0.0).0, boxed(-0.0));
    assert_eq!(single(RvFpOp::Max, 0.0, -0.0, 0.0).0, boxed(0.0));
    assert_eq!(single(RvFpOp::Max, -0.0, 0.0, 0.0).0, boxed(0.0));
    assert_eq!(double(RvFpOp::Min, -2.0, 1.0, 0.0).0, (-2f64).to_bits());
    assert_eq!(double(RvFpOp::Max, -2.0, -3.0, 0.0).0, (-2f64).to_bits());
    let one = boxed(1.0);
    for op in [RvFpOp::Min, RvFpOp::Max] {
        assert_eq!(run(op, F32, Rm::Dynamic, [QNAN32, one, 0]), (one, Flags::NONE));
        assert_eq!(run(op, F32, Rm::Dynamic, [one, QNAN32, 0]), (one, Flags::NONE));
        assert_eq!(run(op, F32, Rm::Dynamic, [SNAN32, one, 0]), (one, Flags::NV));
        assert_eq!(run(op, F32, Rm::Dynamic, [one, SNAN32, 0]), (one, Flags::NV));
    }
}

#[test]
fn compares() {
    assert_eq!(double(RvFpOp::Eq, 0.0, -0.0, 0.0), (1, Flags::NONE));
    assert_eq!(double(RvFpOp::Lt, -0.0, 0.0, 0.0), (0, Flags::NONE));
    assert_eq!(double(RvFpOp::Le, 0.0, -0.0, 0.0), (1, Flags::NONE));
    assert_eq!(double(RvFpOp::Lt, -2.0, -1.0, 0.0), (1, Flags::NONE));
    assert_eq!(run(RvFpOp::Eq, F64, Rm::Dynamic, [QNAN64, 0, 0]), (0, Flags::NONE));
    assert_eq!(run(RvFpOp::Eq, F64, Rm::Dynamic, [SNAN64, 0, 0]), (0, Flags::NV));
    assert_eq!(run(RvFpOp::Lt, F64, Rm::Dynamic, [QNAN64, 0, 0]), (0, Flags::NV));
    assert_eq!(run(RvFpOp::Le, F64, Rm::Dynamic, [0, QNAN64, 0]), (0, Flags::NV));
}

#[test]
fn classes() {
    let classes = [
        (f64::NEG_INFINITY.to_bits(), 0),
        ((-1.5f64).to_bits(), 1),
        (0x8000_0000_0000_0001, 2),
        (0x8000_0000_0000_0000, 3),
        (0, 4),
        (0x000f_ffff_ffff_ffff, 5),
        (0x0010_0000_0000_0000, 6),
        (INF64, 7),
        (SNAN64, 8),
        (QNAN64, 9),
    ];
    for (value, bit) in classes {
        assert_eq!(run(RvFpOp::Class, F64, Rm::Dynamic, [value, 0, 0]), (1 << bit, Flags::NONE));
    }
}

#[test]
fn sign_injection_keeps_nans() {
    assert_eq!(run(RvFpOp::Sgnjn, F64, Rm::Dynamic, [SNAN64, SNAN64, 0]), (SNAN64 | 1 << 63, Flags::NONE));
    assert_eq!(run(RvFpOp::Sgnjx, F64, Rm::Dynamic, [QNAN64, QNAN64, 0]).0, QNAN64 & !(1 << 63));
    assert_eq!(single(RvFpOp::Sgnjx, -1.0, -2.0, 0.0).0, boxed(1.0));
    assert_eq!(single(RvFpOp::Sgnj, 1.0, -2.0, 0.0).0, boxed(-1.0));
}

/// The specification's table of domains and behaviour for invalid inputs of `fcvt`.
#[test]
fn conversions_to_integers_saturate() {
    let ops = [RvFpOp::ToI32, RvFpOp::ToU32, RvFpOp::ToI64, RvFpOp::ToU64];
    let low = [i32::MIN as u64, 0, i64::MIN as u64, 0];
    let high = [i32::MAX as u64, u64::MAX, i64::MAX as u64, u64::MAX];
    let (minus_inf, inf) = (f64::NEG_INFINITY.to_bits(), INF64);
    for (i, op) in ops.into_iter().enumerate() {
        assert_eq!(run(op, F64, Rm::ToZero, [minus_inf, 0, 0]), (low[i], Flags::NV), "{op:?}");
        assert_eq!(run(op, F64, Rm::ToZero, [(-1e30f64).to_bits(), 0, 0]), (low[i], Flags::NV));
        for top in [inf, 1e30f64.to_bits(), QNAN64, SNAN64] {
            assert_eq!(run(op, F64, Rm::ToZero, [top, 0, 0]), (high[i], Flags::NV), "{op:?}");
        }
        assert_eq!(run(op, F32, Rm::ToZero, [QNAN32, 0, 0]), (high[i], Flags::NV), "{op:?}");
    }
    let minus_half = (-0.5f64).to_bits();
    assert_eq!(run(RvFpOp::ToU32, F64, Rm::ToZero, [minus_half, 0, 0]), (0, Flags::NX));
    assert_eq!(run(RvFpOp::ToU64, F64, Rm::Down, [minus_half, 0, 0]), (0, Flags::NV));
    assert_eq!(run(RvFpOp::ToU64, F64, Rm::NearestMaxMag, [minus_half, 0, 0]), (0, Flags::NV));
    assert_eq!(run(RvFpOp::ToI64, F64, Rm::NearestMaxMag, [2.5f64.to_bits(), 0, 0]), (3, Flags::NX));
    // Unsigned words come back sign-extended.
    let word = 0xffff_fff0u32;
    let top = run(RvFpOp::ToU32, F64, Rm::Dynamic, [f64::from(word).to_bits(), 0, 0]);
    assert_eq!(top, (0xffff_ffff_ffff_fff0, Flags::NONE));
}

#[test]
fn conversions_from_integers_read_their_width() {
    let x = 0xffff_ffff_0000_0002;
    assert_eq!(run(RvFpOp::FromI32, F64, Rm::Dynamic, [x, 0, 0]).0, 2f64.to_bits());
    assert_eq!(run(RvFpOp::FromU32, F32, Rm::Dynamic, [u64::MAX, 0, 0]), (boxed(4294967296.0), Flags::NX));
    assert_eq!(run(RvFpOp::FromI64, F32, Rm::Dynamic, [u64::MAX, 0, 0]).0, boxed(-1.0));
    assert_eq!(run(RvFpOp::FromU64, F64, Rm::ToZero, [u64::MAX, 0, 0]), (0x43ef_ffff_ffff_ffff, Flags::NX));
    assert_eq!(run(RvFpOp::FromI32, F64, Rm::Down, [0, 0, 0]), (0, Flags::NONE));
}
