//! Time: the guest's, the host's, and timers on either.

pub mod clocks;
pub mod icount;
pub mod local;
pub mod timer;

pub use clocks::{ClockKind, ClockListener, ClockSource, Clocks, HostClock, RealtimeClock, VirtualClock};
pub use icount::{InstructionClock, Shift};
pub use timer::{Timer, TimerQueue};
