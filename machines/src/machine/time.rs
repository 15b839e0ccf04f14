//! `-rtc`: which clock is behind a real-time clock, and how far ahead of it that is.

use mimus_core::clock::{ClockKind, Timer};
use mimus_core::device::Services;

use super::MachineError;
use crate::config::{ConfigError, Rtc, RtcBase, RtcClock};

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
            let reason = "mimus keeps the clock in UTC (tell the guest so), or at a date: use base=utc or base=DATE";
            return Err(ConfigError::new("-rtc", "base=localtime", reason).into());
        }
    };
    let now = i128::from(timer.now());
    Ok((timer, base - now))
}
