//! RISC-V boards.
//!
//! * [`virt`] - the `virt` board: its devices and their wiring.
//! * [`map`] - its addresses and interrupt numbers; [`fdt`] - its device tree.
//! * [`boot`] - what it boots: firmware, kernels, the reset code.
//! * [`sbi`] - the built-in supervisor firmware.

mod boot;
pub mod fdt;
pub mod map;
pub mod sbi;
pub mod virt;
