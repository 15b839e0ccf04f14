//! Virtio devices and their transports.
//!
//! Spec: Virtual I/O Device (VIRTIO) Version 1.2; section numbers in this module are
//! its. Modern devices only (`VIRTIO_F_VERSION_1`): no legacy or transitional interface.
//!
//! * [`queue`], [`chain`] - split virtqueues and the buffers taken from them.
//! * [`device`] - what a device type implements, and the link to its transport.
//! * [`registers`] - negotiation and set-up, common to the transports.
//! * [`transport`] - virtio-mmio and virtio-pci.
//! * [`block`], [`net`], [`console`], [`rng`], [`balloon`] - the device types.
//! * [`models`] - their entries for `-device`.

pub mod balloon;
pub mod block;
pub mod chain;
pub mod console;
pub mod device;
pub mod models;
pub mod net;
pub mod queue;
pub mod registers;
pub mod rng;
pub mod transport;

pub use chain::{Buffers, Chain, Segment};
pub use device::{VirtioDevice, VirtioInterrupt, VirtioLink, virtio_device_of};
pub use queue::{Queue, QueueError, QueueState};
pub use registers::VirtioRegisters;

/// Device status bits (§2.1).
pub mod status {
    /// The driver noticed the device.
    pub const ACKNOWLEDGE: u8 = 1;
    /// The driver knows how to drive it.
    pub const DRIVER: u8 = 2;
    /// The driver is set up.
    pub const DRIVER_OK: u8 = 4;
    /// Features are agreed on.
    pub const FEATURES_OK: u8 = 8;
    /// The device gave up until it is reset.
    pub const NEEDS_RESET: u8 = 64;
    /// The driver gave up.
    pub const FAILED: u8 = 128;
}

/// Feature bits of all device types (§6), as masks.
pub mod feature {
    /// Indirect descriptors.
    pub const INDIRECT_DESC: u64 = 1 << 28;
    /// Event indices in the rings.
    pub const EVENT_IDX: u64 = 1 << 29;
    /// Not a legacy device.
    pub const VERSION_1: u64 = 1 << 32;
    /// What every device here offers.
    pub const COMMON: u64 = INDIRECT_DESC | EVENT_IDX | VERSION_1;
}

/// Device types (§5).
pub mod device_id {
    /// Network card.
    pub const NET: u32 = 1;
    /// Block device.
    pub const BLOCK: u32 = 2;
    /// Console.
    pub const CONSOLE: u32 = 3;
    /// Entropy source.
    pub const RNG: u32 = 4;
    /// Traditional memory balloon.
    pub const BALLOON: u32 = 5;
}
