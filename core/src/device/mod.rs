//! What a device is, how it is described, configured, built and wired.

pub mod device;
pub mod lifecycle;

pub use device::{
    Device, MmioDevice, MutMmioDevice, MutPioDevice, PioDevice,
};
pub use lifecycle::{Drain, DrainToken, Lifecycle, MutLifecycle, ResetPhase};
