//! vCPUs: what their own thread may do with them, and what any thread may.

use super::accelerator::AccelError;
use super::catch::Catch;
use super::cpu_io::CpuIo;
use super::emulation::EmulationFailure;
use super::exit::{VcpuExit, WatchKind};
use super::signal::VcpuSignal;
use super::trace::RecentEvent;
use crate::bus::{GuestPhys, GuestVirt};
use mimus_arch::{CpuState, StateGroups};
use std::fmt;
use std::sync::Arc;

/// Number of a vCPU, from 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct VcpuIndex(pub u32);

impl VcpuIndex {
    /// As an array index.
    pub const fn as_usize(self) -> usize {
        self.0 as usize
    }
}

impl fmt::Display for VcpuIndex {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// One vCPU, owned by its thread. Nothing here is callable from another thread.
pub trait Vcpu: Send {
    /// The part any thread may use.
    fn handle(&self) -> Arc<dyn VcpuHandle>;

    /// Runs until there is something for the run loop to do. On return the architectural
    /// state is complete and readable. Returns [`VcpuExit::Kicked`] at once if it was
    /// kicked since it last returned.
    fn run(&mut self, io: &dyn CpuIo) -> VcpuExit;

    /// The architectural state.
    fn get_state(&mut self, groups: StateGroups) -> CpuState;

    /// Replaces the architectural state. Validates: it may come from a file.
    fn set_state(&mut self, state: &CpuState) -> Result<(), StateError>;

    /// Puts the vCPU in its reset state; with `start`, at that pc with those arguments in
    /// the first two argument registers (RISC-V: `a0`, `a1`) and not waiting. x86: `start` is
    /// an INIT and a start-up IPI, `pc` the page (`vector << 12`); without, vCPU 0 is the
    /// bootstrap processor and the others wait for a start-up IPI.
    fn reset(&mut self, kind: ResetKind, start: Option<StartRequest>);

    /// Translates a virtual address by the current tables without side effects, for a
    /// debugger: what is mapped for another privilege than the current one is found too.
    fn translate(&mut self, va: GuestVirt, access: Access) -> Result<Translation, TranslateFault>;

    /// Who finishes instructions the accelerator cannot execute. One that can execute all
    /// ignores it.
    fn set_emulation_failure(&mut self, _hook: Arc<dyn EmulationFailure>) {}

    /// The last exceptions and interrupts, oldest first, if they are remembered.
    fn recent_events(&self) -> Vec<RecentEvent> {
        Vec::new()
    }

    /// Where jumps and calls by pointer and traps led last, oldest first, if that is remembered.
    fn recent_jumps(&self) -> Vec<u64> {
        Vec::new()
    }

    /// The translations of addresses that are remembered, if the accelerator can tell: those of the address space in
    /// use first.
    fn remembered_translations(&mut self) -> Option<Vec<RememberedTranslation>> {
        None
    }

    /// A trace has begun or ended: hands over what there is of the old one.
    fn sync_trace(&mut self) {}

    /// Breakpoints and single steps, if there are any.
    fn debug(&mut self) -> Option<&mut dyn VcpuDebug> {
        None
    }
}

/// The part of a vCPU that any thread may use. Lock-free: atomics and a wake-up.
pub trait VcpuHandle: Send + Sync {
    /// Makes `run` return soon. Sticky: if the vCPU is not in `run`, its next `run`
    /// returns [`VcpuExit::Kicked`] at once. Must also call [`VcpuSignal::wake`].
    fn kick(&self);

    /// Changes an interrupt input. If it may end a wait for interrupts, must also call
    /// [`VcpuSignal::wake`].
    fn set_pin(&self, pin: CpuPin, level: bool);

    /// Whether it is in system management mode (x86), where an INIT waits: raise [`CpuPin::Init`] then, which it takes by
    /// [`CpuIo::take_init`](super::CpuIo::take_init) behind RSM. Once it was kicked and this was false, it does not enter the
    /// mode before it has left `run`.
    fn in_smm(&self) -> bool {
        false
    }

    /// The vCPU's number.
    fn index(&self) -> VcpuIndex;

    /// Orders another vCPU's instruction fetches or translations after what the caller
    /// has written. On return the target has done it, or will before it executes any
    /// further guest instruction.
    fn remote_fence(&self, fence: RemoteFence);

    /// What the run loop sleeps on while the vCPU waits for an interrupt.
    fn signal(&self) -> &Arc<VcpuSignal>;
}

/// An interrupt input of a vCPU.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum CpuPin {
    /// RISC-V machine software interrupt (`mip` bit 3).
    Msip,
    /// RISC-V machine timer interrupt (bit 7).
    Mtip,
    /// RISC-V machine external interrupt (bit 11).
    Meip,
    /// RISC-V supervisor external interrupt (bit 9).
    Seip,
    /// RISC-V supervisor timer interrupt (bit 5).
    Stip,
    /// RISC-V supervisor software interrupt (bit 1).
    Ssip,
    /// RISC-V `stimecmp` reached: the hart's own timer of Sstc, which makes `mip` bit 5 as [`CpuPin::Stip`] does.
    /// Two pins, so that neither that timer nor a firmware's lowers what the other has raised.
    Sstc,
    /// x86 INTR.
    Intr,
    /// x86 NMI.
    Nmi,
    /// x86 SMI.
    Smi,
    /// x86 INIT.
    Init,
    /// x86 A20M: while high, bit 20 of physical addresses is 0.
    A20Mask,
    /// AArch64 IRQ.
    Irq,
    /// AArch64 FIQ.
    Fiq,
}

impl CpuPin {
    /// The `mip` bit of a RISC-V pin.
    pub const fn mip_bit(self) -> Option<u32> {
        match self {
            Self::Ssip => Some(1),
            Self::Msip => Some(3),
            Self::Stip => Some(5),
            Self::Mtip => Some(7),
            Self::Seip => Some(9),
            Self::Meip => Some(11),
            _ => None,
        }
    }
}

/// What a remote fence orders.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RemoteFence {
    /// Instruction fetches (SBI `REMOTE_FENCE.I`).
    Icache,
    /// All address translations.
    TlbAll,
    /// Translations of a range, of one address space or of all.
    TlbRange {
        /// First virtual address.
        start: GuestVirt,
        /// Length in bytes.
        len: u64,
        /// Address space, or all of them.
        asid: Option<u16>,
    },
}

/// How hard a vCPU is reset.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ResetKind {
    /// Power-on.
    Cold,
    /// The machine's reset.
    Warm,
    /// An x86 INIT alone, of the bootstrap processor: what INIT leaves as it is stays.
    Init,
}

/// Where and how a vCPU is started by another (SBI HSM, PSCI, SIPI) or by the board.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StartRequest {
    /// First instruction.
    pub pc: u64,
    /// First argument register (RISC-V: `a0`, the hart id).
    pub arg0: u64,
    /// Second argument register (RISC-V: `a1`, opaque or the device tree).
    pub arg1: u64,
}

/// What an address is translated for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// Load.
    Read,
    /// Store.
    Write,
    /// Instruction fetch.
    Execute,
}

/// A successful translation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Translation {
    /// The physical address.
    pub pa: GuestPhys,
    /// Size of the page it lies in, in bytes.
    pub page_size: u64,
}

/// A translation that an accelerator remembers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RememberedTranslation {
    /// The accelerator's own name of the address space.
    pub space: u64,
    /// It is the one in use.
    pub current: bool,
    /// The page.
    pub va: GuestVirt,
    /// Where it is, if that is RAM.
    pub pa: Option<GuestPhys>,
    /// For loads.
    pub read: bool,
    /// For stores, that is, without asking again.
    pub write: bool,
    /// For instruction fetches.
    pub execute: bool,
}

/// An address that does not translate.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("no translation of {va}")]
pub struct TranslateFault {
    /// The address.
    pub va: GuestVirt,
}

/// A state that cannot be set.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("vCPU state: {0}")]
pub struct StateError(pub String);

/// Debugging of one vCPU, on its thread. Points are counted: of several debuggers that insert the same, each removes
/// its own.
pub trait VcpuDebug {
    /// What is possible.
    fn capabilities(&self) -> DebugCaps;
    /// Stop after every instruction, and at the first of a trap's handler.
    fn set_single_step(&mut self, on: bool);
    /// Whether single steps take pending interrupts (at first they do).
    fn set_step_interrupts(&mut self, _on: bool) {}
    /// Stop before the instruction at `va`.
    fn insert_breakpoint(&mut self, va: GuestVirt) -> Result<(), AccelError>;
    /// No longer.
    fn remove_breakpoint(&mut self, va: GuestVirt) -> Result<(), AccelError>;
    /// Stop on accesses to `len` bytes at `va`.
    fn insert_watchpoint(&mut self, va: GuestVirt, len: u64, kind: WatchKind) -> Result<(), AccelError>;
    /// No longer.
    fn remove_watchpoint(&mut self, va: GuestVirt, len: u64, kind: WatchKind) -> Result<(), AccelError>;
    /// Stop at what `catch` says.
    ///
    /// # Errors
    /// Why that cannot be.
    fn insert_catch(&mut self, catch: Catch) -> Result<(), AccelError> {
        let _ = catch;
        Err(AccelError::Other("this accelerator is not told of such events; use -accel tcg".to_owned()))
    }
    /// No longer.
    fn remove_catch(&mut self, catch: Catch) -> Result<(), AccelError> {
        self.insert_catch(catch)
    }
    /// While single steps are on: how many to make beyond the next before stopping for them. Any other stop ends them,
    /// that at a breakpoint too. Accelerators without that stop after each.
    fn set_more_steps(&mut self, _steps: u64) {}
    /// How many of those are left; `None` of an accelerator that stops after each.
    fn more_steps(&self) -> Option<u64> {
        None
    }
    /// `bytes` were read from memory at `pa`: what breakpoints replaced is put back in them.
    fn hide_breakpoints(&self, _pa: GuestPhys, _bytes: &mut [u8]) {}
    /// `bytes` are to be written at `pa`: what breakpoints replace in them is remembered, and the breakpoints put in.
    fn keep_breakpoints(&mut self, _pa: GuestPhys, _bytes: &mut [u8]) {}
}

/// Limits of debugging; `None` is no limit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DebugCaps {
    /// Most breakpoints.
    pub breakpoints: Option<u32>,
    /// Most watchpoints.
    pub watchpoints: Option<u32>,
}
