//! What a guest architecture *is*: its name, its numbers, its register names, the
//! state a vCPU has and the CPU models that exist. Nothing here executes anything.
//!
//! * [`guest_arch`] - [`GuestArch`], ELF machine numbers, page size, byte order.
//! * [`model`] - [`CpuModel`], what `-cpu` parses to.
//! * [`state`] - [`CpuState`], the exchange format of accelerators, debugger and snapshots.
//! * [`riscv`] - RISC-V registers, CSR numbers, extensions, models, state.
//! * [`x86`] - x86 registers, MSRs, CPUID features, models, state, saved chips of a PC.
//!
//! The other architectures are named in [`GuestArch`] only.
#![forbid(unsafe_code)]

pub mod guest_arch;
pub mod model;
pub mod riscv;
pub mod state;
pub mod x86;

pub use guest_arch::{Endianness, GuestArch, UnknownArch};
pub use model::{CpuModel, ModelError};
pub use state::{CpuState, StateGroups};
