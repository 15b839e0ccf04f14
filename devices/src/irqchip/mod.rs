//! Interrupt controllers.

pub mod aclint;
pub mod i8259;
pub mod ioapic;
pub mod lapic;
pub mod plic;
