//! `-rtc`: which clock is behind a real-time clock, and how far ahead of it that is.

use mimus_core::clock::local::utc_offset;
use mimus_core::clock::{ClockKind, Timer};
use mimus_core::device::Services;

use super::MachineError;
use crate::config::{Rtc, RtcBase, RtcClock};

/// A timer of the clock behind, and what is added to it, in ns.
pub fn rtc(services: &Services, rtc: &Rtc) -> Result<(Timer, i128), MachineError> {
    let kind = match rtc.clock {
        RtcClock::Host => ClockKind::Host,
        RtcClock::Rt => ClockKind::Realtime,
        RtcClock::Vm => ClockKind::Virtual,
    };
    let timer = services.io_thread.timer(kind);
    let base = match rtc.base {
        RtcBase::Utc if rtc.clock == RtcClock::Host => return Ok((timer, 0)),
        RtcBase::Utc => i128::from(services.clocks.get(ClockKind::Host).now()),
        RtcBase::Seconds(s) => i128::from(s) * 1_000_000_000,
        RtcBase::Localtime => {
            let utc = i128::from(services.clocks.get(ClockKind::Host).now());
            let seconds = i64::try_from(utc / 1_000_000_000).unwrap_or(0);
            utc + i128::from(utc_offset(seconds)) * 1_000_000_000
        }
    };
    let now = i128::from(timer.now());
    Ok((timer, base - now))
}
