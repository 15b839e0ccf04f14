//! Disks and flash.

pub mod host;
pub mod pflash;
