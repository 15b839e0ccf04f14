//! KVM's paravirtual clock: the guest reads the machine's clock with RDTSC and a scale that it is told, so that it need
//! not measure anything at boot.
//!
//! Spec: `Documentation/virt/kvm/x86/msr.rst` and `cpuid.rst`. The TSC is a function of the virtual clock, so what is
//! written once stays true.

use crate::exception::{Exception, Result};
use crate::host::Host;
use crate::state::State;

/// Time of the machine's start.
pub const WALL_CLOCK_OLD: u32 = 0x11;
/// Where this vCPU's time is to be told.
pub const SYSTEM_TIME_OLD: u32 = 0x12;
pub const WALL_CLOCK: u32 = 0x4b56_4d00;
pub const SYSTEM_TIME: u32 = 0x4b56_4d01;
/// All vCPUs' clocks agree.
const STABLE: u64 = 1;
const ENABLE: u64 = 1;

/// Whether `index` is one of these registers.
pub const fn is_clock(index: u32) -> bool {
    matches!(index, WALL_CLOCK_OLD | SYSTEM_TIME_OLD | WALL_CLOCK | SYSTEM_TIME)
}

/// Whether the model has it.
pub fn available(st: &State) -> bool {
    st.features.kvm && st.features.has("kvmclock")
}

/// Reads one of the registers.
pub fn read(st: &State, index: u32) -> u64 {
    match index {
        SYSTEM_TIME | SYSTEM_TIME_OLD => st.msrs.system_time,
        _ => st.msrs.wall_clock,
    }
}

/// Writes one of the registers, and the clock into the memory it names.
///
/// # Errors
/// `#GP(0)` if that is not aligned.
pub fn write<H: Host + ?Sized>(h: &mut H, index: u32, value: u64) -> Result<()> {
    if value & 2 != 0 {
        return Err(Exception::GP0);
    }
    if matches!(index, SYSTEM_TIME | SYSTEM_TIME_OLD) {
        h.st_mut().msrs.system_time = value;
        refresh(h);
        return Ok(());
    }
    h.st_mut().msrs.wall_clock = value;
    let since_epoch = mimus_core::outside::wall_clock();
    let start = since_epoch.saturating_sub(h.now());
    put(h, value, 4, 2);
    put(h, value + 4, 4, start / 1_000_000_000);
    put(h, value + 8, 4, start % 1_000_000_000);
    Ok(())
}

/// A physical address may be anything: what lies across pages is written in pieces.
fn put<H: Host + ?Sized>(h: &mut H, pa: u64, bytes: u32, value: u64) {
    for i in 0..u64::from(bytes) {
        h.phys_write(pa.wrapping_add(i), 1, value >> (8 * i) & 0xff);
    }
}

/// Writes `pvclock_vcpu_time_info` anew: after the TSC was set.
pub fn refresh<H: Host + ?Sized>(h: &mut H) {
    let address = h.st().msrs.system_time;
    if address & ENABLE == 0 {
        return;
    }
    let at = address & !ENABLE;
    let now = h.now();
    let (mul, shift) = scale(h.st().tsc_khz);
    let tsc = h.st().tsc(now);
    let version = h.phys_read(at & !3, 4) as u32;
    let version = (version & !1).wrapping_add(3);
    put(h, at, 4, u64::from(version));
    put(h, at + 8, 8, tsc);
    put(h, at + 16, 8, now);
    put(h, at + 24, 4, u64::from(mul));
    put(h, at + 28, 1, u64::from(shift as u8));
    put(h, at + 29, 1, STABLE);
    put(h, at, 4, u64::from(version.wrapping_add(1)));
}

/// ns = (ticks << shift) × mul / 2^32
fn scale(tsc_khz: u32) -> (u32, i8) {
    let khz = u64::from(tsc_khz.max(1));
    // mul is to have its top bit set: ns per tick between 1/2 and 1 after the shift.
    let mut shift = 0i8;
    let mut scaled = khz;
    while scaled < 1_000_000 {
        scaled *= 2;
        shift += 1;
    }
    while scaled >= 2_000_000 {
        scaled /= 2;
        shift -= 1;
    }
    let mul = if shift >= 0 {
        (1_000_000u128 << 32) / u128::from(khz << shift)
    } else {
        (1_000_000u128 << 32 << -shift) / u128::from(khz)
    };
    // Exactly 1 needs 33 bits.
    if mul > u128::from(u32::MAX) { ((mul / 2) as u32, shift + 1) } else { (mul as u32, shift) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::TestHost;

    fn ns(ticks: u64, (mul, shift): (u32, i8)) -> u64 {
        let t = if shift >= 0 { ticks << shift } else { ticks >> -shift };
        ((u128::from(t) * u128::from(mul)) >> 32) as u64
    }

    #[test]
    fn scales_are_exact_enough() {
        for khz in [500_000, 999_999, 1_000_000, 1_500_000, 2_000_000, 2_600_123, 4_200_000] {
            let got = ns(u64::from(khz) * 1000, scale(khz));
            assert!(got.abs_diff(1_000_000_000) < 1000, "{khz} kHz: {got}");
        }
    }

    #[test]
    fn the_page_says_the_time() {
        let mut h = TestHost::new();
        h.st.set_tsc(0, 12_345);
        write(&mut h, SYSTEM_TIME, 0x2001).unwrap();
        assert_eq!((h.get(0x2000, 4) & 1, h.get(0x2008, 8), h.get(0x2010, 8)), (0, 12_345, 0));
        assert_eq!(h.get(0x201d, 1), 1);
        let before = h.get(0x2000, 4);
        refresh(&mut h);
        assert_eq!(h.get(0x2000, 4), before + 4, "versions of finished writes are even and grow");
        assert_eq!(write(&mut h, SYSTEM_TIME, 0x2002), Err(Exception::GP0));
    }
}
