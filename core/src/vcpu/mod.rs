//! The one run loop, for every accelerator: a thread per vCPU, pausing, work on the
//! owning thread, exclusive sections, waiting for interrupts, starting vCPUs.

pub mod pause;
#[cfg(not(loom))]
pub mod pin_timer;
#[cfg(not(loom))]
pub mod thread;
#[cfg(not(loom))]
pub mod work;

pub use pause::{Enter, PauseGate};
#[cfg(not(loom))]
pub use pin_timer::PinTimers;
#[cfg(not(loom))]
pub use thread::{VcpuEvent, VcpuStatus, VcpuThreads};
#[cfg(not(loom))]
pub use work::{VcpuWork, WorkError, WorkQueue};
