//! The boards of PCs as whole machines.
//!
//! Most tests run on the `null` accelerator: no guest code, but every register, table and
//! interrupt is reached as a vCPU would. Those that run code need KVM.

mod chipset;
mod harness;
mod interrupts;
mod microvm;
mod saved;
