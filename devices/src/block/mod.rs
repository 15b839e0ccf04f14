//! Disks: the host side of them.

pub mod host;
