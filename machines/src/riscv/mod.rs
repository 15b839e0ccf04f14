//! RISC-V boards.
//!
//! * [`virt`] - the `virt` board: its devices and their wiring.
//! * [`map`] - its addresses and interrupt numbers; [`fdt`] - its device tree.
//! * [`boot`] - what it boots: firmware, kernels, the reset code.
//! * [`firmware`] - flash and fw_cfg, for firmware in flash.
//! * [`sbi`] - the built-in supervisor firmware.

mod boot;
pub mod fdt;
mod firmware;
pub mod map;
pub mod sbi;
pub mod virt;
