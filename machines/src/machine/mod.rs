//! A machine: what boards have in common once their devices are chosen.
//!
//! * [`builder`] - the parts of a machine while a board puts it together.
//! * [`machine`] - the finished machine: start, stop, reset, end.
//! * [`control`] - what any thread may ask of it: the guest through a device, a monitor, a
//!   signal.
//! * [`cpu_io`] - what running vCPUs ask of it.
//! * [`firmware_items`] - what firmware and systems are told at the user's wish.
//! * [`host`] - what the host gives it.
//! * [`peripherals`] - devices from a configuration.
//! * [`time`] - the real-time clock as configured.
//! * [`saved`] - all of it as saved state.
//! * [`backends`] - disks and networks of the host, from a configuration.
//!
//! One thread, the one in [`Machine::wait`], owns the machine and carries out requests in
//! order. Everything else sends it requests and does not wait.

pub mod backends;
pub mod boot_list;
pub mod builder;
pub mod control;
pub mod cpu_io;
pub mod firmware_items;
pub mod host;
#[expect(clippy::module_inception, reason = "the machine itself")]
pub mod machine;
pub mod peripherals;
pub mod saved;
pub mod time;

pub use builder::{HostIo, MachineBuilder, MachineSpec, RamRange};
pub use control::{MachineControl, Notice, Request, RunEnd, RunState};
pub use cpu_io::{CpuHooks, CpuInterrupts, Hypercalls};
pub use host::Host;
pub use machine::{Board, Machine, Policy, PowerOn, SetUp};

use mimus_core::accel::AccelError;
use mimus_core::device::{BuildError, OptionError};
use mimus_core::error::HostError;
use mimus_core::memory::RamError;

use crate::boot::BootError;
use crate::config::ConfigError;

/// Why a machine cannot be built or started. Prints as one line.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum MachineError {
    /// An option's value.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// Kernel, initrd, firmware or device tree.
    #[error(transparent)]
    Boot(#[from] BootError),
    /// The accelerator.
    #[error(transparent)]
    Accel(#[from] AccelError),
    /// A device.
    #[error(transparent)]
    Device(#[from] BuildError),
    /// The properties of a device.
    #[error(transparent)]
    Option(#[from] OptionError),
    /// Guest RAM.
    #[error(transparent)]
    Ram(#[from] RamError),
    /// The host.
    #[error(transparent)]
    Host(#[from] HostError),
    /// Anything else.
    #[error("{0}")]
    Other(String),
}

impl MachineError {
    /// An error in words.
    pub fn other(text: impl Into<String>) -> Self {
        Self::Other(text.into())
    }
}
