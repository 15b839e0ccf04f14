//! Where things are in a virtio-pci function: the BAR's parts and the capabilities that
//! say so (§4.1.4).

use crate::pci::config_space::ConfigSpace;
use crate::virtio::queue::QueueState;
use mimus_core::bus::AccessSize;

/// Bytes of the register BAR.
pub const BAR_LEN: u64 = 0x4000;
/// Bytes of each part of it.
const PART_LEN: u64 = 0x1000;
/// Bytes between the notification registers of two queues.
pub const NOTIFY_MULTIPLIER: u64 = 4;

/// Offset of the notification register of a queue in the register BAR.
pub fn notify_offset(queue: u16) -> u64 {
    3 * PART_LEN + u64::from(queue) * NOTIFY_MULTIPLIER
}

/// Capability number: vendor-specific.
const CAP_VENDOR: u8 = 0x09;
/// `cfg_type` values.
const CFG_COMMON: u8 = 1;
const CFG_NOTIFY: u8 = 2;
const CFG_ISR: u8 = 3;
const CFG_DEVICE: u8 = 4;
const CFG_PCI: u8 = 5;

/// Length of the configuration access capability.
pub const CFG_ACCESS_LEN: usize = 20;
/// Offset of its data window.
pub const CFG_DATA: usize = 16;

/// Offsets in the common configuration (§4.1.4.3).
pub mod common {
    pub const DEVICE_FEATURE_SELECT: u64 = 0x00;
    pub const DEVICE_FEATURE: u64 = 0x04;
    pub const DRIVER_FEATURE_SELECT: u64 = 0x08;
    pub const DRIVER_FEATURE: u64 = 0x0c;
    pub const CONFIG_MSIX_VECTOR: u64 = 0x10;
    pub const NUM_QUEUES: u64 = 0x12;
    pub const DEVICE_STATUS: u64 = 0x14;
    pub const CONFIG_GENERATION: u64 = 0x15;
    pub const QUEUE_SELECT: u64 = 0x16;
    pub const QUEUE_SIZE: u64 = 0x18;
    pub const QUEUE_MSIX_VECTOR: u64 = 0x1a;
    pub const QUEUE_ENABLE: u64 = 0x1c;
    pub const QUEUE_NOTIFY_OFF: u64 = 0x1e;
    pub const QUEUE_DESC: u64 = 0x20;
    pub const QUEUE_DRIVER: u64 = 0x28;
    pub const QUEUE_DEVICE: u64 = 0x30;
    pub const END_OF_RINGS: u64 = 0x38;
    /// Bytes of all of it.
    pub const LEN: usize = 0x40;
}

/// A part of the register BAR.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part {
    Common,
    Isr,
    Device,
    Notify,
}

impl Part {
    const ALL: [Self; 4] = [Self::Common, Self::Isr, Self::Device, Self::Notify];

    /// The part at an offset of the BAR, and the offset in it.
    pub fn of(offset: u64) -> Option<(Self, u64)> {
        let part = Self::ALL.get((offset / PART_LEN) as usize)?;
        Some((*part, offset % PART_LEN))
    }
}

/// Adds the capabilities for registers in BAR `bar`; returns the offset of the
/// configuration access capability.
pub fn add_capabilities(config: &mut ConfigSpace, bar: u8) -> usize {
    for (kind, part) in [(CFG_COMMON, 0), (CFG_ISR, 1), (CFG_DEVICE, 2)] {
        config.add_capability(CAP_VENDOR, &body(16, kind, bar, part), &[]);
    }
    let mut notify = body(20, CFG_NOTIFY, bar, 3);
    notify.extend((NOTIFY_MULTIPLIER as u32).to_le_bytes());
    config.add_capability(CAP_VENDOR, &notify, &[]);
    let mut access = vec![0; CFG_ACCESS_LEN - 2];
    access[..2].copy_from_slice(&[CFG_ACCESS_LEN as u8, CFG_PCI]);
    // bar, then offset, length and data after id and padding.
    let mut writable = vec![0xff; CFG_ACCESS_LEN - 2];
    writable[..2].fill(0);
    writable[3..6].fill(0);
    config.add_capability(CAP_VENDOR, &access, &writable)
}

/// A capability without number and link: length, type, BAR, id, padding, offset, length.
fn body(len: u8, kind: u8, bar: u8, part: u64) -> Vec<u8> {
    let mut b = vec![len, kind, bar, 0, 0, 0];
    b.extend(((part * PART_LEN) as u32).to_le_bytes());
    b.extend((PART_LEN as u32).to_le_bytes());
    b
}

/// An access to the register BAR through configuration space (§4.1.4.9).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CfgAccess {
    /// Offset in the register BAR.
    pub offset: u64,
    /// Width.
    pub size: AccessSize,
}

impl CfgAccess {
    /// What the capability's bytes describe, if the driver set it up right.
    pub fn parse(capability: &[u8], bar: u8) -> Option<Self> {
        let dword = |at: usize| Some(u32::from_le_bytes(*capability.get(at..)?.first_chunk()?));
        let (offset, len) = (u64::from(dword(8)?), u64::from(dword(12)?));
        let size = AccessSize::from_bytes(len).filter(|s| s.bytes() <= 4)?;
        let right = *capability.get(4)? == bar && offset % len == 0 && offset < BAR_LEN;
        right.then_some(Self { offset, size })
    }
}

/// Writes half of a ring address.
pub fn set_ring_address(q: &mut QueueState, at: u64, value: u32) {
    let field = match at & !7 {
        common::QUEUE_DESC => &mut q.desc,
        common::QUEUE_DRIVER => &mut q.avail,
        common::QUEUE_DEVICE => &mut q.used,
        _ => return,
    };
    match at & 7 {
        0 => *field = *field & !0xffff_ffff | u64::from(value),
        4 => *field = *field & 0xffff_ffff | u64::from(value) << 32,
        _ => {}
    }
}
