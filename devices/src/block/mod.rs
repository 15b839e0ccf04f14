//! Disks and flash.

pub mod ahci;
pub mod ata;
pub mod host;
pub mod pflash;
pub mod sata;
