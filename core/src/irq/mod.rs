//! Interrupts: lines into controllers, messages, and what a controller is.

pub mod controller;
pub mod line;
pub mod msi;

pub use controller::IrqController;
pub use line::{IrqLine, OrGate};
pub use msi::{MsiRoute, MsiSink, MsiTarget};
