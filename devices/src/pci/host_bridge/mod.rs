//! Host bridges: how a CPU reaches configuration space and BARs.

pub mod config_ports;
mod ecam;
pub mod gpex;
pub mod i440fx;
pub mod pc_host;
pub mod pc_memory;
pub mod q35;
#[cfg(test)]
mod tests;

pub use config_ports::ConfigPorts;
pub use gpex::{Gpex, GpexWindows};
pub use i440fx::I440fx;
pub use pc_memory::PcMemory;
pub use q35::Q35;

use super::bus::{PciFunction, PciSlot};
use super::config_space::{ConfigSpace, ConfigState, PciIds};
use crate::virtio::device::decode_payload;
use mimus_core::bus::AccessSize;
use mimus_core::device::{Lifecycle, ResetPhase, lock};
use mimus_core::snapshot::{Payload, Schema, Snapshot, SnapshotError};
use std::sync::{Arc, Mutex};

/// Class code of a host bridge.
const CLASS_HOST_BRIDGE: u32 = 0x06_0000;
const SCHEMA: Schema = Schema::new("pci-host-bridge", 1);

/// The function by which a host bridge appears on its own bus: registers and nothing
/// behind them.
pub struct HostBridgeFunction {
    slot: PciSlot,
    /// Device-level lock.
    config: Mutex<ConfigSpace>,
}

impl HostBridgeFunction {
    /// A host bridge of this vendor and device number, plugged into `slot`.
    pub fn plug(slot: PciSlot, vendor: u16, device: u16) -> Arc<Self> {
        let ids = PciIds { vendor, device, class: CLASS_HOST_BRIDGE, ..PciIds::default() };
        let config = Mutex::new(ConfigSpace::new(ids, &slot, false));
        let this = Arc::new(Self { slot, config });
        this.slot.plug(this.clone());
        this
    }
}

impl PciFunction for HostBridgeFunction {
    fn config_read(&self, offset: u16, size: AccessSize) -> u32 {
        lock(&self.config).read(offset, size)
    }
    fn config_write(&self, offset: u16, size: AccessSize, value: u32) {
        lock(&self.config).write(offset, size, value);
    }
}

impl Lifecycle for HostBridgeFunction {
    fn reset(&self, phase: ResetPhase) {
        if phase == ResetPhase::Enter {
            lock(&self.config).reset();
        }
    }
}

impl Snapshot for HostBridgeFunction {
    fn schema(&self) -> Schema {
        SCHEMA
    }
    fn save(&self) -> Result<Payload, SnapshotError> {
        Payload::encode(SCHEMA, &lock(&self.config).save())
    }
    fn restore(&self, payload: &Payload) -> Result<(), SnapshotError> {
        let state: ConfigState = decode_payload(SCHEMA, payload)?;
        lock(&self.config).restore(state).map_err(|why| SnapshotError::invalid(SCHEMA, "registers", why))
    }
}
