//! Virtio devices driven through their registers and rings in guest RAM.

mod block;
mod driver;
mod hostile;
mod machine;
mod mmio;
mod models;
mod net;
mod others;
mod pci;
