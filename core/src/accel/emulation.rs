//! What happens when an accelerator meets an instruction that it cannot execute.

use super::cpu_io::CpuIo;
use super::vcpu::{Access, TranslateFault, Translation, VcpuIndex};
use crate::bus::GuestVirt;
use mimus_arch::CpuState;

/// How an instruction was finished.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Finished {
    /// The state is that after the instruction, or has its exception in `events.exception`.
    Done,
    /// The same, and guest page tables may have been written: the accelerator drops what it has
    /// cached of them.
    DoneTablesWritten,
    /// It cannot be finished here either, with the reason in a few words; the state is unchanged.
    NotHandled(String),
}

/// An instruction the accelerator cannot execute, with everything needed to do so.
pub struct FailedInstruction<'a> {
    /// Whose it is.
    pub vcpu: VcpuIndex,
    /// Bytes from the instruction pointer on, up to 15, as far as the accelerator knows them; may be
    /// empty. More than the instruction, and not more than is mapped.
    pub bytes: &'a [u8],
    /// The state before the instruction: [`StateGroups::Execution`](mimus_arch::StateGroups::Execution)
    /// at least.
    pub state: &'a mut CpuState,
    /// The machine: memory, ports, system registers.
    pub io: &'a dyn CpuIo,
    /// Translates an address as the current mode would; sets no accessed or dirty bits.
    pub translate: &'a mut dyn FnMut(GuestVirt, Access) -> Result<Translation, TranslateFault>,
}

/// Finishes instructions an accelerator cannot execute.
///
/// Contract: called on the vCPU's thread from inside `run`, with nothing half done: the state is
/// that before the instruction, memory is as other vCPUs see it. The implementation executes one
/// instruction, or several in a row if it likes: it changes `state` and guest memory (through
/// `io.memory()`, marking pages dirty as every write does) and returns [`Finished::Done`]; the
/// accelerator takes the whole group of state over and goes on. An exception of the instruction is
/// left in `events.exception` with the registers as the architecture wants them at its delivery.
/// Interrupts are not its concern. Accesses to devices go through `io` like any vCPU's. Code
/// that writes guest page tables says so, since the accelerator may hold shadows of them
/// that only see the guest's own writes.
pub trait EmulationFailure: Send + Sync {
    /// Finishes one instruction.
    fn finish(&self, failed: FailedInstruction<'_>) -> Finished;
}
