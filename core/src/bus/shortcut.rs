//! Guest writes to a region that an accelerator may see to by itself, without the device.

use super::access::AccessSize;
use crate::io_thread::SharedFd;
use std::fmt;

/// A write that an accelerator may see to by itself. One that cannot lets it reach the device like any other:
/// the effect is the same.
#[derive(Clone)]
pub enum Shortcut {
    /// It only adds 1 to an eventfd, on which somebody waits who does what the device would.
    Doorbell(Doorbell),
    /// Writes of 1 to `len` bytes from `offset` may be made later, in order, before anything else the vCPU asks of
    /// the machine.
    Coalesced { offset: u64, len: u32 },
}

/// A write that only tells somebody.
#[derive(Clone)]
pub struct Doorbell {
    /// Offset in the region.
    pub offset: u64,
    /// Only writes of this width; `None`: any.
    pub size: Option<AccessSize>,
    /// Only writes of this value; needs a width.
    pub value: Option<u64>,
    /// The eventfd.
    pub fd: SharedFd,
}

impl Shortcut {
    /// Offset in the region, and bytes from there.
    pub fn range(&self) -> (u64, u64) {
        match self {
            Self::Doorbell(bell) => (bell.offset, bell.size.map_or(1, AccessSize::bytes)),
            Self::Coalesced { offset, len } => (*offset, u64::from(*len)),
        }
    }
}

impl fmt::Debug for Shortcut {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let kind = if matches!(self, Self::Doorbell(_)) { "doorbell" } else { "coalesced" };
        write!(f, "{kind} at {:#x}", self.range().0)
    }
}
