//! Addresses, access sizes, attributes and results of a bus access.

use mimus_arch::Endianness;
use serde::{Deserialize, Serialize};
use std::fmt;

/// A guest physical address.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize)]
#[serde(transparent)]
pub struct GuestPhys(pub u64);

/// A guest virtual address.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize)]
#[serde(transparent)]
pub struct GuestVirt(pub u64);

macro_rules! address {
    ($t:ident) => {
        impl $t {
            /// The address `n` bytes further, if there is one.
            pub const fn checked_add(self, n: u64) -> Option<Self> {
                match self.0.checked_add(n) {
                    Some(a) => Some(Self(a)),
                    None => None,
                }
            }
        }
        impl From<u64> for $t {
            fn from(a: u64) -> Self {
                Self(a)
            }
        }
        impl fmt::Debug for $t {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{:#x}", self.0)
            }
        }
        impl fmt::Display for $t {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{:#x}", self.0)
            }
        }
    };
}
address!(GuestPhys);
address!(GuestVirt);

/// Width of one bus access.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(u8)]
pub enum AccessSize {
    /// One byte.
    B1 = 1,
    /// Two bytes.
    B2 = 2,
    /// Four bytes.
    B4 = 4,
    /// Eight bytes.
    B8 = 8,
}

impl AccessSize {
    /// Width in bytes.
    pub const fn bytes(self) -> u64 {
        self as u64
    }

    /// Width in bits.
    pub const fn bits(self) -> u32 {
        self as u32 * 8
    }

    /// All ones in the width.
    pub const fn mask(self) -> u64 {
        u64::MAX >> (64 - self.bits())
    }

    /// From a number of bytes.
    pub const fn from_bytes(n: u64) -> Option<Self> {
        match n {
            1 => Some(Self::B1),
            2 => Some(Self::B2),
            4 => Some(Self::B4),
            8 => Some(Self::B8),
            _ => None,
        }
    }
}

/// Who makes an access.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default)]
pub enum Requester {
    /// Nobody in particular: loader, debugger.
    #[default]
    Unspecified,
    /// A vCPU, by index.
    Vcpu(u32),
    /// A device, by its bus's requester id (PCI: bus 15:8, device 7:3, function 2:0).
    Device(u32),
}

/// What comes along with an access besides address and data.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default)]
pub struct MemTxAttrs {
    /// Who makes it.
    pub requester: Requester,
    /// Made in secure state (Arm).
    pub secure: bool,
    /// Made in user mode.
    pub user: bool,
}

impl MemTxAttrs {
    /// An access by vCPU `index`.
    pub const fn vcpu(index: u32) -> Self {
        Self { requester: Requester::Vcpu(index), secure: false, user: false }
    }

    /// An access by the device with this requester id.
    pub const fn device(id: u32) -> Self {
        Self { requester: Requester::Device(id), secure: false, user: false }
    }
}

/// How an access ended. Each architecture turns a failure into its own fault, or
/// into all-ones.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[must_use]
pub enum MemTxResult {
    /// Done.
    Ok,
    /// Nothing decodes the address.
    DecodeError,
    /// The device reports an error.
    DeviceError,
    /// The access is not allowed: wrong size, alignment, kind of memory or rights.
    AccessError,
}

impl MemTxResult {
    /// True for [`MemTxResult::Ok`].
    pub const fn is_ok(self) -> bool {
        matches!(self, Self::Ok)
    }

    /// As a `Result`, for `?`.
    pub const fn ok(self) -> Result<(), BusFault> {
        match self {
            Self::Ok => Ok(()),
            Self::DecodeError => Err(BusFault::Decode),
            Self::DeviceError => Err(BusFault::Device),
            Self::AccessError => Err(BusFault::Access),
        }
    }
}

/// The failures of [`MemTxResult`], as an error.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, thiserror::Error)]
pub enum BusFault {
    /// Nothing decodes the address.
    #[error("nothing decodes the address")]
    Decode,
    /// The device reports an error.
    #[error("the device reports an error")]
    Device,
    /// Wrong size, alignment, kind of memory or rights.
    #[error("the access is not allowed there")]
    Access,
}

impl From<BusFault> for MemTxResult {
    fn from(f: BusFault) -> Self {
        match f {
            BusFault::Decode => Self::DecodeError,
            BusFault::Device => Self::DeviceError,
            BusFault::Access => Self::AccessError,
        }
    }
}

impl From<Result<(), BusFault>> for MemTxResult {
    fn from(r: Result<(), BusFault>) -> Self {
        r.err().map_or(Self::Ok, Self::from)
    }
}

/// One access as a memory-mapped device sees it. Data are register values.
#[derive(Clone, Copy, Debug)]
pub struct MmioAccess {
    /// Which of the device's regions, by the number it was bound with.
    pub region: u32,
    /// Byte offset in the region.
    pub offset: u64,
    /// Width; always one the region's rules allow.
    pub size: AccessSize,
    /// Who and how.
    pub attrs: MemTxAttrs,
}

/// One access as a port-mapped device sees it.
#[derive(Clone, Copy, Debug)]
pub struct PioAccess {
    /// Which of the device's regions, by the number it was bound with.
    pub region: u32,
    /// Port offset in the region.
    pub offset: u16,
    /// Width: 1, 2 or 4 bytes.
    pub size: AccessSize,
    /// Who and how.
    pub attrs: MemTxAttrs,
}

/// Which accesses a device takes, and what the bus does with the others.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AccessRules {
    /// Narrowest access that does not fail.
    pub valid_min: AccessSize,
    /// Widest access that does not fail.
    pub valid_max: AccessSize,
    /// Narrowest access the device implements; narrower reads take part of one,
    /// narrower writes are moved to their byte lanes with zeros beside them.
    pub min: AccessSize,
    /// Widest access the device implements; wider ones are split, lowest address first.
    pub max: AccessSize,
    /// Misaligned accesses reach the device as they are; otherwise they fail with
    /// [`MemTxResult::AccessError`].
    pub unaligned: bool,
    /// Byte order of the device's registers.
    pub endian: Endianness,
}

impl AccessRules {
    /// 1 to 8 bytes, each passed as it is.
    pub const ANY: Self = Self::sizes(AccessSize::B1, AccessSize::B8);

    /// Registers of exactly `size`; other widths fail.
    pub const fn only(size: AccessSize) -> Self {
        Self { valid_min: size, valid_max: size, ..Self::sizes(size, size) }
    }

    /// The device implements `min` to `max`; other widths are adapted.
    pub const fn sizes(min: AccessSize, max: AccessSize) -> Self {
        Self {
            valid_min: AccessSize::B1,
            valid_max: AccessSize::B8,
            min,
            max,
            unaligned: false,
            endian: Endianness::Little,
        }
    }

    /// The same with big-endian registers.
    pub const fn big_endian(mut self) -> Self {
        self.endian = Endianness::Big;
        self
    }

    /// The same with misaligned accesses passed on.
    pub const fn with_unaligned(mut self) -> Self {
        self.unaligned = true;
        self
    }
}

impl Default for AccessRules {
    fn default() -> Self {
        Self::ANY
    }
}
