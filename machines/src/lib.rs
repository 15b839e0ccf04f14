//! Boards, boot protocols and machine configuration.
//!
//! * [`config`] is the schema of a machine: what the command line (and later a
//!   file or a management protocol) fills in and a board is built from.
//! * [`boot`] reads kernels and firmware and decides where they go in RAM.
//! * [`machine`] is what all boards share: vCPUs, devices, requests, reset, saved state.
//! * [`riscv`] holds the RISC-V boards.
//! * [`boards`] lists the boards, [`registry`] the device models.
//! * [`x86`] holds the PCs.
//! * [`guests`] fetches ready-made guests through the host's package sources.
pub mod boards;
pub mod boot;
pub mod config;
pub mod guests;
pub mod machine;
pub mod registry;
pub mod riscv;
pub mod x86;
