//! The RISC-V guest frontend of the translator: RV64GC with machine,
//! supervisor and user modes.
//!
//! | module | what it is for |
//! |---|---|
//! | [`state`] | the hart: privilege, CSR storage, configuration |
//! | [`csr`] | access to control and status registers |
//! | [`interrupt`] | which interrupt is taken next |
//! | [`trap`] | exceptions, interrupt entry, `mret`, `sret`, `wfi`, `cbo` rules |
//! | [`mmu`] | page-table walks (Sv39, Sv48, Sv57) |
//! | [`pmp`] | physical memory protection |

pub mod csr;
pub mod interrupt;
pub mod mmu;
pub mod pmp;
pub mod state;
pub mod trap;
