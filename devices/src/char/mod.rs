//! Serial ports, and the host side of character devices.

pub mod ns16550;
