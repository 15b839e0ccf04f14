//! Clocks and timers.

pub mod goldfish_rtc;
pub mod rate;
