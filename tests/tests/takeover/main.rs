//! KVM and the translator on the same guests: programs with the instructions that a KVM without hardware behind it
//! cannot execute finish with the same registers and memory as under the translator alone.
//!
//! Without `/dev/kvm` every test says `SKIPPED (name): reason` and passes.

#![cfg(target_arch = "x86_64")]

mod bus;
mod cases;
mod guest;
mod long_mode;
