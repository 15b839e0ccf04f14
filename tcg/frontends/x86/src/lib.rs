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
