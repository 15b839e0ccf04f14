//! Whole machines: real kernels, firmware and disks, from the command line.
//!
//! The guests come from the host's own package sources into the cache that `mimus try`
//! uses. Where they are not to be had, a test says `SKIPPED (name): reason`.

mod boot;
mod debugger;
mod disk;
mod end;
mod firmware;
mod frames;
mod gdb;
mod harness;
mod network;
mod repeat;
mod sata;
mod selftests;
mod terminal;
mod tutorial;
mod views;
mod x86;
