//! The host's floating-point control word (MXCSR), which holds the guest's rounding mode and accrued
//! exception flags while guest code runs.
#![allow(unsafe_code)]

use mimus_tcg_ir::Rm;

/// All exceptions masked, round to nearest, no flags: what Rust code expects.
pub const HOST_DEFAULT: u32 = 0x1f80;
const RC_SHIFT: u32 = 13;

/// The current MXCSR.
#[inline]
pub fn read() -> u32 {
    let mut word = 0u32;
    // SAFETY: stmxcsr stores four bytes to `word`.
    unsafe { std::arch::asm!("stmxcsr [{}]", in(reg) &mut word, options(nostack, preserves_flags)) };
    word
}

/// Sets MXCSR. Exceptions are always masked and denormals never flushed.
#[inline]
pub fn write(word: u32) {
    let word = (word & 0x603f) | HOST_DEFAULT;
    // SAFETY: ldmxcsr reads four bytes of `word`; no reserved bit is set and every exception is masked, so
    // no Rust code can observe it but through rounding, which `with_host` guards.
    unsafe { std::arch::asm!("ldmxcsr [{}]", in(reg) &word, options(nostack, preserves_flags, readonly)) };
}

/// Accrued IEEE exception flags in RISC-V's order (NX=1, UF=2, OF=4, DZ=8, NV=16).
pub fn flags() -> u8 {
    flags_of(read())
}

/// The flags in an MXCSR value, in RISC-V's order.
pub fn flags_of(word: u32) -> u8 {
    // MXCSR: IE 0, DE 1, ZE 2, OE 3, UE 4, PE 5.
    let bit = |from: u32, to: u32| ((word >> from) & 1) << to;
    (bit(0, 4) | bit(2, 3) | bit(3, 2) | bit(4, 1) | bit(5, 0)) as u8
}

fn word_of_flags(flags: u8) -> u32 {
    let bit = |from: u32, to: u32| ((u32::from(flags) >> from) & 1) << to;
    bit(4, 0) | bit(3, 2) | bit(2, 3) | bit(1, 4) | bit(0, 5)
}

/// Replaces the accrued flags.
pub fn set_flags(flags: u8) {
    write((read() & !0x3f) | word_of_flags(flags));
}

/// Adds accrued flags.
pub fn raise_flags(flags: u8) {
    if flags != 0 {
        write(read() | word_of_flags(flags));
    }
}

/// Sets the rounding mode; one the host lacks leaves round-to-nearest (code that depends on it does not
/// run on the host's unit).
pub fn set_rounding(rm: Rm) {
    let rc = match rm {
        Rm::Down => 1,
        Rm::Up => 2,
        Rm::ToZero => 3,
        Rm::NearestEven | Rm::NearestMaxMag | Rm::Dynamic => 0,
    };
    write((read() & !(3 << RC_SHIFT)) | rc << RC_SHIFT);
}

/// Runs `f` under the host's own control word.
pub fn with_host<R>(f: impl FnOnce() -> R) -> R {
    let guest = read();
    write(HOST_DEFAULT);
    let result = f();
    write(guest);
    result
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn flags_round_trip() {
        let saved = read();
        for flags in 0..32 {
            set_flags(flags);
            assert_eq!(super::flags(), flags);
        }
        write(saved);
    }
}
