//! What happens when an accelerator meets an instruction that it cannot execute.
//!
//! A KVM emulates what the host's processor cannot run itself (real mode on old ones, accesses to devices, everything on
//! hosts without virtualisation in hardware) and does not know every instruction. Another engine then executes it.

use super::accelerator::{AccelError, VmConfig};
use super::cpu_io::CpuIo;
use super::vcpu::VcpuIndex;
use mimus_arch::CpuState;
use std::sync::Arc;

/// A part of a state that is fetched only if an instruction needs it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StatePart {
    /// Floating point and vector registers: the XSAVE area.
    Vectors,
    /// What handles them: XCR0.
    VectorControl,
    /// Model-specific registers and time.
    System,
}

/// Where the rest of a state comes from.
pub trait StateSource {
    /// Fills a part in.
    fn fetch(&mut self, part: StatePart, state: &mut CpuState) -> Result<(), AccelError>;
}

/// What was done, beside changes of registers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Done {
    /// Instructions executed; 0: only an event that was pending was delivered.
    pub instructions: u32,
    /// The vector registers, which were fetched, have changed.
    pub vectors: bool,
    /// The same of what handles them.
    pub vector_control: bool,
    /// Guest page tables were written: the accelerator drops what it has cached of them.
    pub tables_written: bool,
}

/// How an instruction was finished.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Finished {
    /// The state is that after it.
    Done(Done),
    /// It ended in a triple fault; the state is what there was then.
    TripleFault,
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
    /// The state before the instruction: general registers, segments, control registers, events.
    pub state: &'a mut CpuState,
    /// The rest of it.
    pub rest: &'a mut dyn StateSource,
    /// No instruction but this one is to be executed: somebody watches.
    pub single: bool,
    /// The machine: memory, ports, system registers.
    pub io: &'a dyn CpuIo,
}

/// Finishes instructions an accelerator cannot execute.
///
/// Contract: called on the vCPU's thread from inside `run`, with nothing half done: the state is
/// that before the instruction, memory is as other vCPUs see it. The implementation executes one
/// instruction, or several in a row if it likes: it changes `state` and guest memory (marking pages dirty
/// as every write does) and says what it did; the accelerator takes the changed state over and goes on. Exceptions of
/// the instruction, and an event that was being delivered before it, have been delivered: the state is that
/// at the first instruction of the handler. Interrupts that wait are not its concern, but must not wait long.
/// Accesses to devices go through `io` like any vCPU's. Guest page tables that were written are told, since the
/// accelerator may hold shadows of them that only see the guest's own writes.
pub trait EmulationFailure: Send + Sync {
    /// Finishes one instruction.
    fn finish(&self, failed: FailedInstruction<'_>) -> Finished;

    /// Counters for the monitor, as (name, value).
    fn statistics(&self) -> Vec<(String, u64)> {
        Vec::new()
    }
}

/// Makes what finishes the instructions of a machine.
pub trait EmulationFallback: Send + Sync {
    /// For the vCPUs of a machine like this.
    fn create(&self, config: &VmConfig) -> Result<Arc<dyn EmulationFailure>, AccelError>;
}
