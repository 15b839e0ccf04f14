//! The architectural state of one vCPU, over all architectures.

use crate::guest_arch::GuestArch;
use crate::riscv::state::RiscvState;
use crate::x86::state::X86State;
use serde::{Deserialize, Serialize};

/// Everything a vCPU is made of as far as software can tell: the exchange format
/// between accelerators, debugger, monitor and snapshots.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[non_exhaustive]
pub enum CpuState {
    /// A RISC-V hart.
    Riscv(Box<RiscvState>),
    /// An x86 processor.
    X86(Box<X86State>),
}

impl CpuState {
    /// The architecture the state belongs to; of x86 the wider one.
    pub fn arch(&self) -> GuestArch {
        match self {
            Self::Riscv(_) => GuestArch::Riscv64,
            Self::X86(_) => GuestArch::X86_64,
        }
    }

    /// The RISC-V state, if it is one.
    pub fn as_riscv(&self) -> Option<&RiscvState> {
        match self {
            Self::Riscv(s) => Some(s),
            _ => None,
        }
    }

    /// The RISC-V state, if it is one.
    pub fn as_riscv_mut(&mut self) -> Option<&mut RiscvState> {
        match self {
            Self::Riscv(s) => Some(s),
            _ => None,
        }
    }

    /// The x86 state, if it is one.
    pub fn as_x86(&self) -> Option<&X86State> {
        match self {
            Self::X86(s) => Some(s),
            _ => None,
        }
    }

    /// The x86 state, if it is one.
    pub fn as_x86_mut(&mut self) -> Option<&mut X86State> {
        match self {
            Self::X86(s) => Some(s),
            _ => None,
        }
    }

    /// The program counter; x86: the linear address of the next instruction.
    pub fn pc(&self) -> u64 {
        match self {
            Self::Riscv(s) => s.pc,
            Self::X86(s) => s.linear_pc(),
        }
    }

    /// Has it go on at `pc`, an address as [`CpuState::pc`] gives it.
    pub fn set_pc(&mut self, pc: u64) {
        match self {
            Self::Riscv(s) => s.pc = pc,
            Self::X86(s) => s.set_linear_pc(pc),
        }
    }
}

/// Which parts of the state a caller needs; an accelerator may fill more, and
/// leaves the rest at reset values.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StateGroups {
    /// pc and general registers only.
    Core,
    /// What an unprivileged instruction can read or change: [`StateGroups::Core`], segments,
    /// control registers, floating point, vectors, pending events. No MSRs, no CSRs of timers.
    Execution,
    /// Everything.
    All,
}
