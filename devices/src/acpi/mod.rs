//! ACPI hardware: power buttons, power-off, events.

pub mod ged;
pub mod pm;
