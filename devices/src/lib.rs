//! Device models and host back ends.
//!
//! One folder per class; a class's `host/` modules are the host side (files, sockets, terminals) and
//! know no registers.
pub mod acpi;
pub mod block;
pub mod char;
pub mod input;
pub mod irqchip;
pub mod isa;
pub mod misc;
pub mod net;
pub mod pci;
pub mod ports;
pub mod timer;
pub mod virtio;

#[cfg(test)]
mod testing;
