//! Serial ports, and the host side of character devices.

pub mod host;
pub mod ns16550;
