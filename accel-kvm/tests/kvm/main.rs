//! The accelerator through its own API, with guests of a few dozen instructions. Without `/dev/kvm` every test says
//! `SKIPPED (name): reason` and passes; what a host's KVM does not do is found by probe and said likewise.
//!
//! A KVM without hardware behind it executes about a million supervisor instructions a second: guests stay small.

#![cfg(target_arch = "x86_64")]

mod access;
mod debug;
mod dirty;
mod failure;
mod harness;
mod interrupts;
mod memory;
mod modes;
mod options;
mod smp;
mod state;
mod stress;
