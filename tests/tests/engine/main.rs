//! Guest code on the translator, without a machine.

mod bytes;
mod code_changes;
mod float;
mod random;
mod smp;
