//! PCI: functions and their configuration space, the bus, host bridges.
//!
//! Spec: PCI Local Bus 3.0 ("PCI"), PCI Express Base 5.0 ("PCIe").
//!
//! A function is built in a [`PciSlot`] reserved on a [`PciBus`], which gives it its DMA,
//! its interrupts and the containers its BARs are mapped in. Configuration accesses come
//! from a host bridge ([`host_bridge`]).

pub mod bus;
pub mod config_space;
pub mod host_bridge;
pub mod intx;
pub mod msix;
pub mod southbridge;

pub use bus::{PciBus, PciError, PciFunction, PciSlot};
pub use config_space::{BarKind, ConfigSpace, ConfigState, PciIds};
pub use intx::{IntxMap, IntxPin, IntxRouter};
pub use msix::{Msix, MsixState};

use std::fmt;
use std::str::FromStr;

/// What the functions of a PC's chip set have in common: the subsystem by which SeaBIOS knows that it does not run on
/// the real one, and where to find its configuration.
pub(crate) const CHIPSET: PciIds =
    PciIds { vendor: 0, device: 0, revision: 0, class: 0, subsystem_vendor: 0x1af4, subsystem: 0x1100 };

/// Device and function number on a bus, written `1f.3`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct DevFn(pub u8);

impl DevFn {
    /// Device 0 to 31, function 0 to 7.
    pub const fn new(device: u8, function: u8) -> Option<Self> {
        if device < 32 && function < 8 { Some(Self(device << 3 | function)) } else { None }
    }

    /// Device number.
    pub const fn device(self) -> u8 {
        self.0 >> 3
    }

    /// Function number.
    pub const fn function(self) -> u8 {
        self.0 & 7
    }
}

impl fmt::Display for DevFn {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:02x}.{}", self.device(), self.function())
    }
}

impl FromStr for DevFn {
    type Err = PciError;

    /// `DEVICE` or `DEVICE.FUNCTION`, hexadecimal, with or without `0x`.
    fn from_str(s: &str) -> Result<Self, PciError> {
        let (device, function) = s.split_once('.').unwrap_or((s, "0"));
        let number = |t: &str| u8::from_str_radix(t.strip_prefix("0x").unwrap_or(t), 16).ok();
        let parsed = number(device).zip(number(function)).and_then(|(d, f)| Self::new(d, f));
        parsed.ok_or_else(|| PciError::BadAddress(s.to_owned()))
    }
}
