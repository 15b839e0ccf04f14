//! Traces of what vCPUs execute: what an accelerator that can make them hands out.
//!
//! Each vCPU fills buffers of 32-bit words, whose format is in [`words`]; a [`TraceSink`] takes them, in order, and
//! is told before of every number in them that stands for code. Nothing is dropped: a sink that is not done makes
//! the vCPU wait.

use super::vcpu::VcpuIndex;
use std::sync::Arc;

/// What is traced besides stretches of code.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct TraceKinds {
    /// Loads and stores.
    pub memory: bool,
    /// Exceptions and interrupts.
    pub exceptions: bool,
    /// Accesses to devices.
    pub devices: bool,
}

/// A stretch of code that is executed from its begin to its end, if no exception ends it before.
#[derive(Clone, Copy, Debug)]
pub struct TracedCode<'a> {
    /// Its number.
    pub id: u32,
    /// Offset of the first instruction in its page.
    pub offset: u16,
    /// The bytes.
    pub bytes: &'a [u8],
    /// Length of each instruction in bytes.
    pub lengths: &'a [u8],
    /// For x86: the size in bits (16, 32, 64) that the code was decoded for. 0 elsewhere.
    pub bits: u8,
}

/// Who takes a trace. Called by several vCPUs' threads.
pub trait TraceSink: Send + Sync {
    /// A number stands for this code from now on.
    fn define(&self, code: TracedCode<'_>);

    /// Takes the first `used` words of a full buffer, and gives an empty one of the same length. May wait. `now` is
    /// the time of the virtual clock in ns.
    fn take(&self, vcpu: VcpuIndex, buffer: Vec<u32>, used: usize, now: u64) -> Vec<u32>;
}

/// The part of an accelerator that traces. No vCPU may be in `run`; each is told by
/// [`Vcpu::sync_trace`](super::Vcpu::sync_trace) afterwards.
pub trait Tracer: Send + Sync {
    /// Begins a trace; ends the one there is.
    fn start_trace(&self, kinds: TraceKinds, sink: Arc<dyn TraceSink>);
    /// Ends it.
    fn stop_trace(&self);
}

/// An exception or interrupt.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RecentEvent {
    /// Bit 63: an interrupt. RISC-V: `mcause`; x86: the vector.
    pub cause: u64,
    /// Of the instruction that it was taken at.
    pub pc: u64,
    /// An address or error code.
    pub value: u64,
}

/// The words of a trace.
///
/// Below [`words::FIRST_TAG`] a word is the number of a stretch of code that begins to be executed. With
/// [`words::ACCESS`] it is an access, and the address (8 bytes, low half first) and, with [`words::VALUE`], the value
/// follow. The others have as many words behind them as [`words::payload`] says.
pub mod words {
    /// The lowest word that is not a number of code.
    pub const FIRST_TAG: u32 = 1 << 30;
    /// An access to memory.
    pub const ACCESS: u32 = 1 << 31;
    /// The access writes.
    pub const WRITE: u32 = 1;
    /// It reads and writes; the value is the operand.
    pub const UPDATE: u32 = 2;
    /// A value follows the address.
    pub const VALUE: u32 = 4;
    /// Log2 of its size in bytes, 3 bits from here up.
    pub const SIZE_SHIFT: u32 = 3;
    /// Offset of the instruction in its page, 12 bits from here up.
    pub const PC_SHIFT: u32 = 8;
    /// Code is in the page at this virtual address from here on (8 bytes).
    pub const PAGE: u32 = FIRST_TAG;
    /// Address space from here on: root of the page tables as the architecture's register has it (8 bytes), and
    /// privilege (RISC-V: 0 user, 1 supervisor, 3 machine; x86: CPL).
    pub const SPACE: u32 = FIRST_TAG + 1;
    /// An exception or interrupt: cause (8 bytes; bit 63: interrupt), pc (8), value (8: an address or error code),
    /// time in ns (8).
    pub const EXCEPTION: u32 = FIRST_TAG + 2;
    /// An access to a device: what [`ACCESS`] has in its low bits, physical address (8), value (8).
    pub const DEVICE: u32 = FIRST_TAG + 3;
    /// The same for x86 ports.
    pub const PORT: u32 = FIRST_TAG + 4;
    /// An instruction executed by itself: pc (8), length (4), its bytes (16).
    pub const STEP: u32 = FIRST_TAG + 5;
    /// A stretch of memory accessed as a whole: [`ACCESS`]'s low bits (the value's and the size's mean nothing),
    /// address (8), bytes (8).
    pub const BULK: u32 = FIRST_TAG + 6;

    /// Words behind one.
    pub const fn payload(word: u32) -> usize {
        match word {
            _ if word & ACCESS != 0 => 2 + if word & VALUE != 0 { 2 } else { 0 },
            PAGE => 2,
            SPACE => 3,
            EXCEPTION => 8,
            DEVICE | PORT | BULK => 5,
            STEP => 7,
            _ => 0,
        }
    }
}
