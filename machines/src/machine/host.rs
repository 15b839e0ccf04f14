//! What the host gives a machine.

use std::collections::BTreeMap;
use std::sync::Arc;

use mimus_core::accel::{Accelerator, EmulationFallback};

use super::HostIo;

/// What the host gives a machine.
pub struct Host<'a> {
    /// How guest code is run.
    pub accel: &'a dyn Accelerator,
    /// `-accel` options.
    pub accel_options: BTreeMap<String, String>,
    /// Clocks and I/O thread; disks, networks and character devices by their names in the
    /// configuration.
    pub io: HostIo,
    /// Who finishes instructions that the accelerator cannot execute.
    pub emulation_failure: Option<Arc<dyn EmulationFallback>>,
    /// The character devices of the serial ports, in order; `None` for a port that is there and
    /// connected to nothing.
    pub serials: Vec<Option<String>>,
}
