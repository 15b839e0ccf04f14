//! The x86 guest frontend of the translator: 16, 32 and 64 bits, one for i386 and x86-64.
//!
//! | module | what it is for |
//! |---|---|
//! | [`state`] | a vCPU but for what is in slots |
//! | [`convert`] | to and from the state other parts of the emulator exchange |
//! | [`host`] | what the rules below need of whoever executes |
//! | [`exception`], [`interrupt`] | exceptions; delivery of them and of interrupts |
//! | [`paging`] | page-table walks |
//! | [`segment`], [`stack`] | descriptors, segment registers, stacks |
//! | [`far`], [`task`], [`syscall`] | transfers between segments, privilege levels and tasks |
//! | [`smm`] | system management mode |
//! | [`control`], [`msr`], [`cpuid`] | control, debug and model-specific registers, CPUID |
//! | [`takeover`] | instructions of a guest that another engine runs |
//! | [`native`] | computations on the host's own units |
//!
//! # Where the manuals leave it open
//!
//! **Makers.** Where Intel's and AMD's processors differ, a model does as those of its maker do ([`cpuid::Features::amd`]):
//! operand-size prefixes of near branches and REX.W of far pointers in 64-bit mode, where PKRU is in XSAVE areas. Which of
//! two faults comes first, and what an instruction that faults leaves behind, is what was measured on processors of both
//! (`frontend::tests::makers` has a list). Near branches to addresses that are not canonical fault at the branch with no
//! register changed, as both manuals say.
//!
//! **Undefined flags.** They are AMD's values: products leave SF, ZF, AF and PF, LZCNT and TZCNT leave OF, shifts set AF,
//! divisions set AF, clear PF, ZF and SF and leave the rest, and so on ([`mimus_tcg_ir::flags`]). Generated code uses the
//! host's instructions, so it costs nothing on a host of AMD's, and the interpreter computes the same. On a host of Intel's
//! both have Intel's values in their place, but divisions and decimal adjustments, which are computed, have AMD's.
//!
//! **Undefined results.** BSF and BSR of zero leave the destination; SHLD and SHRD of 16 bits by more than 16 rotate the
//! second operand, or on a host of Intel's have the first follow it once more; BSWAP of 16 bits clears them.

mod blame;
pub mod control;
pub mod convert;
pub mod cpuid;
mod debugging;
pub mod decode;
pub mod exception;
mod exec;
pub mod far;
mod fpu;
pub mod frontend;
pub mod helper_ids;
pub mod host;
pub mod interrupt;
pub mod kvmclock;
pub mod length;
pub mod msr;
pub mod native;
pub mod paging;
pub mod segment;
pub mod smm;
pub mod stack;
pub mod state;
pub mod syscall;
pub mod takeover;
pub mod task;
pub mod translate;

#[cfg(test)]
mod system_tests;
#[cfg(test)]
mod testing;
