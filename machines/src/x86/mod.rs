//! The x86 boards: `microvm`, `pc`, `q35`.
//!
//! * [`acpi`] and [`smbios`] have the tables that describe them.

pub mod acpi;
pub mod interrupts;
pub mod smbios;
