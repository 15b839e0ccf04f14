//! RISC-V (XLEN = 64): registers, CSRs, extensions, CPU models, hart state.
//!
//! Specs: The RISC-V Instruction Set Manual, volumes I (unprivileged) and II
//! (privileged), 20240411, with the ratified Ss*/Sv* extensions named in
//! [`features`].

pub mod csr;
pub mod features;
pub mod gdb;
pub mod models;
pub mod regs;
pub mod state;

pub use features::{Ext, Features};
pub use models::RiscvModel;
pub use state::{Privilege, RiscvState};
