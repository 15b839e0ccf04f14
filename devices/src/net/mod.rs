//! Network devices, and the host side they are plugged into.

pub mod host;
