//! The x86 boards: `microvm`, `pc`, `q35`.
//!
//! * [`acpi`] and [`smbios`] have the tables that describe them.

pub mod acpi;
pub mod boot;
pub mod common;
mod finish;
pub mod fw_cfg;
pub mod interrupts;
pub mod isa;
pub mod kernel_rom;
pub mod layout;
pub mod microvm;
pub mod options;
pub mod pc;
pub mod pci_setup;
pub mod rom;
pub mod smbios;
mod smm;
