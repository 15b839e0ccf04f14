//! Conversion between nanoseconds and the ticks of a fixed-rate oscillator, without drift.
//!
//! A device keeps times as ticks or as nanoseconds since one origin and converts the whole
//! span, never a single period: rounding errors do not add up.

const NS_PER_S: u128 = 1_000_000_000;

/// Shortest time between two callbacks of a periodic device timer, in ns. A guest that asks
/// for more gets its interrupts merged, not the I/O thread.
pub const MIN_CALLBACK_NS: u64 = 20_000;

/// An oscillator that ticks `hz` times a second.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rate(u64);

impl Rate {
    /// `hz` ticks a second; 0 counts as 1.
    pub const fn from_hz(hz: u64) -> Self {
        Self(if hz == 0 { 1 } else { hz })
    }

    /// Ticks a second.
    pub const fn hz(self) -> u64 {
        self.0
    }

    /// Whole ticks in `ns`.
    pub const fn ticks(self, ns: u64) -> u64 {
        let ticks = ns as u128 * self.0 as u128 / NS_PER_S;
        if ticks > u64::MAX as u128 { u64::MAX } else { ticks as u64 }
    }

    /// The first nanosecond at which `ticks` have passed; the largest number if that is later.
    pub const fn ns(self, ticks: u64) -> u64 {
        let ns = (ticks as u128 * NS_PER_S).div_ceil(self.0 as u128);
        if ns > u64::MAX as u128 { u64::MAX } else { ns as u64 }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ticks_and_back() {
        for hz in [1, 32_768, 1_193_182, 3_579_545, 14_318_180, 1_000_000_000, 2_893_437_000] {
            let rate = Rate::from_hz(hz);
            for ticks in [0, 1, 2, 3, 999, 65_536, 1 << 31, 86_400 * hz] {
                let ns = rate.ns(ticks);
                assert!(rate.ticks(ns) >= ticks, "{hz} {ticks}");
                assert!(ns == 0 || rate.ticks(ns - 1) < ticks.max(1), "{hz} {ticks}");
            }
            assert_eq!(rate.ticks(1_000_000_000), hz);
        }
        assert_eq!(Rate::from_hz(2_000_000_000).ticks(u64::MAX), u64::MAX);
        assert_eq!(Rate::from_hz(0).ns(u64::MAX), u64::MAX);
    }
}
