//! Floating point for the test hosts.

use mimus_tcg_ir::{FpFmt, FpOp, Rm};
use mimus_tcg_softfloat::riscv::{self, RvFpOp};
use mimus_tcg_softfloat::{FloatStatus, Rounding};

/// A [`mimus_tcg_ir::filetest::FpFn`].
pub fn soft_fp(op: FpOp, fmt: FpFmt, rm: Rm, a: u64, b: u64, c: u64, flags: &mut u8) -> u64 {
    let op = RvFpOp::from_index(op as u8).expect("the software operations are in the IR's order");
    let fmt = match fmt {
        FpFmt::F32 => riscv::FpFmt::F32,
        FpFmt::F64 => riscv::FpFmt::F64,
    };
    let rm = match rm {
        Rm::NearestEven => riscv::Rm::NearestEven,
        Rm::ToZero => riscv::Rm::ToZero,
        Rm::Down => riscv::Rm::Down,
        Rm::Up => riscv::Rm::Up,
        Rm::NearestMaxMag => riscv::Rm::NearestMaxMag,
        Rm::Dynamic => riscv::Rm::Dynamic,
    };
    let mut status = FloatStatus::riscv(Rounding::NearestEven);
    let result = riscv::exec(op, fmt, rm, a, b, c, &mut status);
    *flags |= status.flags.bits();
    result
}
