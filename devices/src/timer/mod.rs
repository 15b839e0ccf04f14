//! Clocks and timers.

pub mod calendar;
pub mod goldfish_rtc;
pub mod hpet;
pub mod i8254;
pub mod mc146818;
pub mod rate;
