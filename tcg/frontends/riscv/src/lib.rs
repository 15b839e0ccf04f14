//! The RISC-V guest frontend of the translator: RV64GC with machine,
//! supervisor and user modes.
//!
//! | module | what it is for |
//! |---|---|
//! | [`state`] | the hart: privilege, CSR storage, configuration |
//! | [`state_convert`] | to and from the state other parts of the emulator exchange |
//! | [`csr`] | access to control and status registers |
//! | [`interrupt`] | which interrupt is taken next |
//! | [`trap`] | exceptions, interrupt entry, `mret`, `sret`, `wfi`, `cbo` rules |
//! | [`mmu`] | page-table walks (Sv39, Sv48, Sv57) |
//! | [`pmp`] | physical memory protection |
//! | [`decode`] | the decoder, generated from `decode/*.decode` |
//! | [`disasm`] | the disassembler |
//! | [`translate`] | guest code to IR |
//! | [`frontend`] | all of it as the translator's runtime wants it |
//! | [`helper_ids`] | what translated code calls and touches of the hart |

pub mod csr;
pub mod decode;
pub mod disasm;
pub mod frontend;
pub mod helper_ids;
mod helpers;
pub mod interrupt;
pub mod mmu;
pub mod pmp;
pub mod state;
pub mod state_convert;
pub mod translate;
pub mod trap;
