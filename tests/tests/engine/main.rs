//! Guest code on the translator, without a machine.

mod bytes;
mod catches;
mod code_changes;
mod debug;
mod float;
mod full_cache;
mod gathered;
mod random;
mod smp;
