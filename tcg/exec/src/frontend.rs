//! What a guest architecture owes the translator.
//!
//! A frontend is a type without values of its own ([`GuestFrontend`] has only associated functions); what it
//! knows about a vCPU is its [`GuestFrontend::State`], inside the vCPU's [`Cpu`]. Everything here runs on the
//! vCPU's own thread.
//!
//! # Rules for helpers
//!
//! A helper gets the [`Cpu`] and three values. `cpu.current_insn()` is the address and length of the instruction
//! it executes; integer and FP registers are `cpu.head.slots`.
//! * To go elsewhere (trap, return from trap, a write that makes fetched code stale: `satp`, `sfence.vma`,
//!   `fence.i`), call `cpu.jump(pc)`: the block is abandoned and `pc` looked up afresh in the current context.
//! * After a change of what [`GuestFrontend::context_key`] depends on, call `cpu.switch_context()`.
//! * After something that may make an interrupt deliverable, call `cpu.check_events()`; `take_interrupt` then runs
//!   at the next jump, or at once if the helper also calls `cpu.jump`.
//! * To wait for an interrupt: `cpu.jump(next)`, then `cpu.halt()`.
//! * The machine is reached by `cpu.io(|io| …)`; for calls that may wait for other vCPUs (SBI) by
//!   `cpu.io_outside_guest`, after `cpu.jump(next)`.
//! * Cached translations are dropped with `cpu.mmu`.
//! * While a vCPU runs, accrued FP flags and rounding mode are in the host's MXCSR: [`crate::hostfp`].

use mimus_arch::{CpuModel, CpuState, GuestArch};
use mimus_core::accel::{CpuPin, RemoteFence, ResetKind, StartRequest, SystemRegister, VcpuIndex};
use mimus_tcg_ir::backend::{FpFlagsHelper, VectorLayout};
use mimus_tcg_ir::unit::UnitInsn;
use mimus_tcg_ir::{Block, FpFmt, FpOp, Rm, Slot, Val};

use crate::env::Cpu;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

/// A vCPU's time-stamp counter, as its own thread publishes it for others: it follows the machine's virtual clock.
#[derive(Debug, Default)]
pub struct PublishedTsc {
    khz: AtomicU32,
    offset: AtomicU64,
}

impl PublishedTsc {
    /// The counter is the clock's ns × `khz` / 10^6 + `offset` from now on.
    pub fn publish(&self, khz: u32, offset: u64) {
        self.khz.store(khz, Ordering::Relaxed);
        self.offset.store(offset, Ordering::Relaxed);
    }

    /// What it is when the clock stands at `ns`.
    pub fn at(&self, ns: u64) -> u64 {
        let ticks = u128::from(ns) * u128::from(self.khz()) / 1_000_000;
        (ticks as u64).wrapping_add(self.offset.load(Ordering::Relaxed))
    }

    /// Ticks a millisecond.
    pub fn khz(&self) -> u32 {
        self.khz.load(Ordering::Relaxed)
    }
}

/// Why memory is accessed.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Access {
    Fetch,
    Load,
    Store,
}

/// What an address translates to.
#[derive(Clone, Copy, Debug)]
pub struct Leaf {
    /// Guest physical address of the byte asked for.
    pub pa: u64,
    /// Loads of the whole 4 KiB page are allowed now.
    pub read: bool,
    /// Stores to the whole page are allowed now, without anything left to record (such as a dirty bit).
    pub write: bool,
    /// The translation goes away with `Mmu::drop_local_where`.
    pub local: bool,
    /// Bytes covered by the guest's mapping (4096 and up, a power of two): what invalidating one address
    /// of it invalidates.
    pub mapping_size: u64,
    /// May be remembered. False if only a part of the page is accessible.
    pub cacheable: bool,
}

/// Why a memory access cannot be done.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum MemFault {
    /// The page tables do not allow it.
    Page,
    /// Nothing answers at the physical address, or its protection forbids it.
    Access,
    /// The address is not aligned as the instruction demands.
    Misaligned,
}

/// Guest code as the translator reads it: the page that holds the block and, if known, the next.
#[derive(Clone, Copy)]
pub struct CodeWindow<'a> {
    pub(crate) page: &'a CodePage,
    pub(crate) next: Option<&'a CodePage>,
    /// What there is of `page`.
    copied: (u16, u16),
    /// Nothing is read from this offset on.
    pub(crate) end: u32,
    mode: u16,
    /// Where blocks begin that this one is not to run into.
    starts: Option<&'a Starts>,
    elsewhere: bool,
    /// See [`CodeWindow::runs_on`].
    runs_on: u16,
}

/// A bit for each offset in a page.
pub(crate) type Starts = [u64; 64];

/// A snapshot of a page of guest code: other vCPUs may write the page itself at any time.
pub type CodePage = [u8; 4096];

impl<'a> CodeWindow<'a> {
    /// A window over `page`, and over the page that follows it in virtual memory if it may be read.
    pub fn new(page: &'a CodePage, next: Option<&'a CodePage>) -> CodeWindow<'a> {
        let (starts, end) = (None, u32::MAX);
        CodeWindow { page, next, copied: (0, 4096), end, mode: 0, starts, elsewhere: false, runs_on: 0 }
    }

    /// The same window, of whose page only the bytes from offset `from` to before `to` are there.
    pub(crate) fn copied(self, from: usize, to: usize) -> CodeWindow<'a> {
        CodeWindow { copied: (from as u16, to as u16), ..self }
    }

    /// The offsets of the page that may be read.
    fn readable(&self) -> std::ops::Range<u32> {
        u32::from(self.copied.0)..self.end.min(u32::from(self.copied.1))
    }

    /// The same window, but that a block is to end before offset `cut`.
    pub(crate) fn until(self, cut: Option<u16>) -> CodeWindow<'a> {
        CodeWindow { end: cut.map_or(self.end, u32::from), ..self }
    }

    /// The same window, its code to be translated for [`GuestFrontend::code_mode`] `mode`.
    pub fn with_mode(self, mode: u16) -> CodeWindow<'a> {
        CodeWindow { mode, ..self }
    }

    /// The same window, whose block is to end where another begins.
    pub(crate) fn up_to_blocks(self, starts: Option<&'a Starts>) -> CodeWindow<'a> {
        CodeWindow { starts, ..self }
    }

    /// The same window, whose block may run on over the page's end.
    pub(crate) fn running_on(self, runs_on: u16) -> CodeWindow<'a> {
        CodeWindow { runs_on, ..self }
    }

    /// Bytes of the next page that a block may have, beside an instruction that begins in the page: 0 unless the page
    /// behind it was looked up for that.
    pub fn runs_on(&self) -> u16 {
        self.runs_on
    }

    /// Whether a block that gets to `offset`, between two instructions, is to end there: there is another.
    pub fn has_block(&self, offset: u32) -> bool {
        let word = self.starts.and_then(|starts| starts.get(offset as usize / 64));
        word.is_some_and(|word| word >> (offset % 64) & 1 != 0)
    }

    /// The same window, whose block may go on anywhere in the page after a jump.
    pub(crate) fn and_elsewhere(self, elsewhere: bool) -> CodeWindow<'a> {
        CodeWindow { elsewhere, ..self }
    }

    /// Whether a block may do so: not if it has to end somewhere, or if stretches of instructions are counted.
    pub fn goes_on_elsewhere(&self) -> bool {
        self.elsewhere
    }

    /// The code mode to translate for.
    pub fn mode(&self) -> u16 {
        self.mode
    }

    /// The bytes from `offset` (from the page's start) on, at most as many as `buffer` has: fewer at the end of
    /// what may be read.
    pub fn bytes<'b>(&self, offset: u32, buffer: &'b mut [u8]) -> &'b [u8] {
        let len = buffer.len();
        let (all, end) = (self.readable(), offset.saturating_add(len as u32));
        let inside = all.start <= offset && end <= all.end;
        if let Some(bytes) = self.page.get(offset as usize..offset as usize + len).filter(|_| inside) {
            buffer.copy_from_slice(bytes);
            return buffer;
        }
        let mut n = 0;
        for (i, place) in (offset..).zip(buffer.iter_mut()) {
            let Some(byte) = self.byte(i) else { break };
            *place = byte;
            n += 1;
        }
        &buffer[..n]
    }

    /// What of the page may be read from `offset` on.
    pub fn page_from(&self, offset: u16) -> &'a [u8] {
        let all = self.readable();
        let from = if all.start <= offset.into() { offset.into() } else { all.end as usize };
        self.page.get(from..all.end as usize).unwrap_or(&[])
    }

    /// The byte at `offset` from the page's start; `None` past what may be read.
    pub fn byte(&self, offset: u32) -> Option<u8> {
        match offset {
            _ if offset >= self.end => None,
            0..4096 if !self.readable().contains(&offset) => None,
            0..4096 => self.page.get(offset as usize).copied(),
            4096..8192 => self.next?.get(offset as usize - 4096).copied(),
            _ => None,
        }
    }

    /// The little-endian halfword at `offset` (even) from the page's start; `None` past what may be read.
    pub fn halfword(&self, offset: u32) -> Option<u16> {
        let at = (offset & 0xffe) as usize;
        let page = match offset {
            _ if offset >= self.end => return None,
            0..4096 if !self.readable().contains(&offset) => return None,
            0..4096 => self.page,
            4096..8192 => self.next?,
            _ => return None,
        };
        Some(u16::from_le_bytes([page[at], page[at + 1]]))
    }
}

/// How to translate.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum TranslateMode {
    /// As much as makes a good block, with guards where state matters.
    Block,
    /// One instruction, checking with helpers what [`TranslateMode::Block`] guards.
    Careful,
}

/// A function that translated code calls.
pub struct Helper<F: GuestFrontend> {
    /// For the interpreter.
    pub call: fn(&mut Cpu<F>, u64, u64, u64) -> u64,
    /// For generated code: the same behind the C calling convention.
    pub(crate) entry: usize,
    /// For traces.
    pub name: &'static str,
}

/// A guest architecture.
pub trait GuestFrontend: Sized + Send + Sync + 'static {
    /// Everything about a vCPU that is not in slots. Generated code reaches its first bytes (`SetEnvByte`,
    /// `GuardEnv`), so it is `repr(C)`.
    type State: Send + 'static;

    /// The architecture.
    const ARCH: GuestArch;

    /// Slots in the order in which they deserve a host register.
    const PIN_ORDER: &'static [Slot];

    /// The same for machines whose processors have no registers but the first half of them.
    const PIN_ORDER_NARROW: &'static [Slot] = Self::PIN_ORDER;

    /// The stack pointer, if blocks push and pop as [`mimus_tcg_ir::backend::BackendConfig::stack`] says.
    const STACK: Option<Slot> = None;

    /// Instructions begin at multiples of this many bytes: 1 or 2.
    const CODE_ALIGN: u32;

    /// The guest has condition flags: blocks may have operations on them, and [`mimus_tcg_ir::flags::FLAGS`] is not
    /// in [`GuestFrontend::PIN_ORDER`].
    const FLAGS: bool;

    /// Stores to code that is being executed take effect before the next instruction, without any instruction that
    /// says so.
    const COHERENT_CODE: bool;

    /// What devices' registers and addresses that nothing answers at are like. True: unaligned accesses are split,
    /// reads of nothing give ones and writes are ignored. False: both are faults.
    const LENIENT_BUS: bool;

    /// Taking a trap reads or writes guest registers in slots (a stack pointer, say).
    const TRAPS_USE_SLOTS: bool = false;

    /// Floating-point slots, those that most deserve a host register first.
    const FP_PIN_ORDER: &'static [Slot] = &[];
    /// The helper for floating-point flags; its byte is at an offset in [`GuestFrontend::State`].
    const FP_FLAGS: Option<FpFlagsHelper> = None;
    /// Where vector registers are in [`GuestFrontend::State`], if blocks have [`mimus_tcg_ir::Op::Unit`].
    const VECTOR: Option<VectorLayout> = None;

    /// Pins that are edges: the vCPU itself lowers them.
    const LATCHED_PINS: u64 = 0;

    /// Pins whose fall the vCPU must notice as soon as their rise.
    const MODE_PINS: u64 = 0;

    /// The guest has a mode in which it sees other memory: [`Cpu::use_alternate_memory`].
    const ALTERNATE_MEMORY: bool = false;

    /// Helpers, in the order of the numbers `Op::Call` uses. Make them with [`Helper::new`].
    fn helpers() -> Vec<Helper<Self>>;

    /// A vCPU's state as it is made, before its first reset.
    ///
    /// # Errors
    /// One line: what of the model cannot be done.
    fn new_state(model: &CpuModel, index: VcpuIndex) -> Result<Self::State, String>;

    /// Where it publishes its time-stamp counter, if it has one.
    fn published_tsc(state: &Self::State) -> Option<Arc<PublishedTsc>> {
        let _ = state;
        None
    }

    /// Resets registers (`cpu.head`) and state; with `start`, to where a firmware service starts a vCPU.
    fn reset(cpu: &mut Cpu<Self>, kind: ResetKind, start: Option<StartRequest>);

    /// What the translation of code depends on besides its bytes and what blocks guard: operand sizes, privilege
    /// and the like, below 4096. A page's code is translated for each mode that executes it. Part of
    /// [`GuestFrontend::context_key`]: different modes, different keys.
    fn code_mode(cpu: &Cpu<Self>) -> u16 {
        let _ = cpu;
        0
    }

    /// Translates at `start` (offset in the page), for [`CodeWindow::mode`]. In [`TranslateMode::Careful`], exactly
    /// one instruction. An instruction that reaches into the next page is a block of its own.
    fn translate(state: &Self::State, code: CodeWindow<'_>, start: u16, mode: TranslateMode, block: &mut Block);

    /// Whether blocks of code of this mode, in code that runs often, may go on over a page's end.
    fn runs_on(mode: u16) -> bool {
        let _ = mode;
        false
    }

    /// Whether the instruction at `start` reaches into the next page.
    fn crosses_page(code: CodeWindow<'_>, start: u16) -> bool;

    /// Names the current address space: equal keys share cached translations. A change of anything the key
    /// depends on is followed by [`Cpu::switch_context`].
    fn context_key(cpu: &Cpu<Self>) -> u64;

    /// For traces: the root of the page tables as its register has it, and the privilege (RISC-V: 0, 1, 3; x86: CPL).
    fn address_space(cpu: &Cpu<Self>) -> (u64, u8);

    /// The privilege that [`GuestFrontend::address_space`] gives for programs.
    const PROGRAMS: u8 = 0;

    /// The mode as debuggers number it: see [`Caught::Mode`](mimus_core::accel::Caught).
    fn operating_mode(cpu: &Cpu<Self>) -> u32 {
        Self::address_space(cpu).1.into()
    }

    /// Whether accesses to a system register are told by [`Cpu::note_register`].
    ///
    /// # Errors
    /// One line: why not.
    fn can_catch(register: SystemRegister) -> Result<(), String>;

    /// For traces: the size in bits that code is decoded for in `mode`; 0 where there is only one.
    fn code_bits(mode: u16) -> u8 {
        let _ = mode;
        0
    }

    /// Translates `va` for `access`, recording accessed and dirty bits.
    ///
    /// # Errors
    /// Why not; the caller then has it delivered.
    fn walk(cpu: &mut Cpu<Self>, va: u64, access: Access) -> Result<Leaf, MemFault>;

    /// Translates without side effects, for a debugger: physical address and size of the page it lies in.
    fn debug_walk(cpu: &mut Cpu<Self>, va: u64, access: Access) -> Option<(u64, u64)>;

    /// Takes the trap of a faulting access: `cpu.head.pc` is the instruction's, and becomes the handler's.
    fn deliver_fault(cpu: &mut Cpu<Self>, va: u64, access: Access, fault: MemFault);

    /// Takes an interrupt if one is pending and enabled; answers whether it did.
    fn take_interrupt(cpu: &mut Cpu<Self>) -> bool;

    /// For a debugger's single steps: takes an interrupt if one is to be taken before the next instruction, and
    /// does nothing else; true if so.
    fn accept_interrupt(cpu: &mut Cpu<Self>) -> bool {
        Self::take_interrupt(cpu)
    }

    /// For a debugger's single steps: executes the instruction at `head.pc`, with what the architecture does around
    /// each (traps for the guest's own debugger).
    fn step(cpu: &mut Cpu<Self>) {
        cpu.step_careful();
    }

    /// Whether a halted vCPU is to go on.
    fn wakes(cpu: &Cpu<Self>) -> bool;

    /// The bit of `Cpu::pins` that a pin is; `None` if the architecture has no such pin.
    fn pin_bit(pin: CpuPin) -> Option<u32>;

    /// Executes a floating-point operation in software: rounding mode from the state, accrued flags into
    /// the host's control word ([`crate::hostfp::raise_flags`]).
    fn fp(cpu: &mut Cpu<Self>, op: FpOp, fmt: FpFmt, rm: Rm, a: u64, b: u64, c: u64) -> u64;

    /// Executes a [`mimus_tcg_ir::Op::Unit`], as a helper would; `va` is the address of its memory operand.
    fn unit(cpu: &mut Cpu<Self>, insn: &UnitInsn, d: Option<Slot>, a: Val, va: u64) {
        let _ = (cpu, insn, d, a, va);
        debug_assert!(false, "the frontend does not make such operations");
    }

    /// Does what another vCPU (or a firmware service) asked for on this one.
    fn remote_fence(cpu: &mut Cpu<Self>, fence: RemoteFence);

    /// Called when the vCPU starts to run, after the guest's floating-point control word is loaded, and is
    /// about to stop: a place to load and fetch what lives in host registers.
    fn enter_run(cpu: &mut Cpu<Self>);
    /// See [`GuestFrontend::enter_run`].
    fn leave_run(cpu: &mut Cpu<Self>);

    /// The architectural state.
    fn get_state(cpu: &mut Cpu<Self>) -> CpuState;

    /// Replaces the architectural state.
    ///
    /// # Errors
    /// One line: what of it cannot be.
    fn set_state(cpu: &mut Cpu<Self>, state: &CpuState) -> Result<(), String>;

    /// The guest's disassembly of the instruction at `offset` of the page, and its length in bytes.
    fn disassemble(code: CodeWindow<'_>, offset: u32, pc: u64) -> (String, u32);
}
