//! The architectural state of one vCPU, over all architectures.

use crate::guest_arch::GuestArch;
use crate::riscv::state::RiscvState;
use serde::{Deserialize, Serialize};

/// Everything a vCPU is made of as far as software can tell: the exchange format
/// between accelerators, debugger, monitor and snapshots.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[non_exhaustive]
pub enum CpuState {
    /// A RISC-V hart.
    Riscv(Box<RiscvState>),
}

impl CpuState {
    /// The architecture the state belongs to.
    pub fn arch(&self) -> GuestArch {
        match self {
            Self::Riscv(_) => GuestArch::Riscv64,
        }
    }

    /// The RISC-V state, if it is one.
    pub fn as_riscv(&self) -> Option<&RiscvState> {
        match self {
            Self::Riscv(s) => Some(s),
        }
    }

    /// The RISC-V state, if it is one.
    pub fn as_riscv_mut(&mut self) -> Option<&mut RiscvState> {
        match self {
            Self::Riscv(s) => Some(s),
        }
    }

    /// The program counter.
    pub fn pc(&self) -> u64 {
        match self {
            Self::Riscv(s) => s.pc,
        }
    }
}

/// Which parts of the state a caller needs; an accelerator may fill more, and
/// leaves the rest at reset values.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StateGroups {
    /// pc and general registers only.
    Core,
    /// Everything.
    All,
}
