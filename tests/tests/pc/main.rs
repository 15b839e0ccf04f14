//! The boards of PCs as whole machines.
//!
//! Most tests run on the `null` accelerator: no guest code, but every register, table and
//! interrupt is reached as a vCPU would. Those that run code do so under KVM and under the translator.

mod administrator;
mod chipset;
#[cfg(target_arch = "x86_64")]
mod deadline;
#[cfg(target_arch = "x86_64")]
mod descriptors;
#[cfg(target_arch = "x86_64")]
mod doorbells;
mod harness;
#[cfg(target_arch = "x86_64")]
mod huge_pages;
mod interrupts;
#[cfg(target_arch = "x86_64")]
mod linux;
mod microvm;
#[cfg(target_arch = "x86_64")]
mod programs;
mod saved;
#[cfg(target_arch = "x86_64")]
mod sleep;
#[cfg(target_arch = "x86_64")]
mod swap;
