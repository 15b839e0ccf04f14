//! What a host backend owes the runtime, and the vCPU environment's layout as data, so that a backend
//! depends on nothing but the IR.

use crate::op::{Block, PagePc, Slot};

/// Byte displacements, from the environment pointer that generated code keeps in a host register, of what
/// generated code touches. The runtime owns the structure; this is its description.
#[derive(Clone, Copy, Debug, Default)]
pub struct EnvLayout {
    /// Slot 0; slot `i` is at `slots + 8 * i`.
    pub slots: i32,
    /// u64: virtual address of the page the running block began in.
    pub page_base: i32,
    /// u64: the guest pc, valid outside generated code.
    pub pc: i32,
    /// u32: non-zero when somebody wants this vCPU to leave generated code.
    pub kick: i32,
    /// u32: set by a helper that wants the block left after the current instruction.
    pub exit_request: i32,
    /// u32: why generated code was left (an [`ExitCode`]).
    pub exit_code: i32,
    /// u32: `pc` offset in the page (low 24 bits, signed) and length of the instruction that called a
    /// helper (high 8 bits).
    pub cur_insn: i32,
    /// u64: virtual address reserved by the last load-reserved; all ones when none.
    pub reserve_addr: i32,
    /// u64: the value it loaded, extended as loaded.
    pub reserve_value: i32,
    /// u32: the guest's MXCSR-like control word while generated code runs (x86-64 hosts).
    pub fp_control: i32,
    /// u32: the host's own, kept while generated code runs.
    pub host_fp_control: i32,
    /// u64: base of the current address-space context (see [`ContextLayout`]).
    pub context: i32,
    /// Start of the frontend's hot state (`SetEnvByte`, `GuardEnv`).
    pub guest: i32,
}

/// Byte displacements, from a context's base, of its arrays of 2^20 entries of 8 bytes, indexed by bits
/// 12..32 of the virtual address.
///
/// Read and write tags hold the page-aligned virtual address they are valid for (or a value no address
/// matches); `addend` is what to add to a virtual address to get the host's. The two code arrays map a
/// page to its entry table: `exec_tag` as the other tags, `exec_table` the table's host address.
#[derive(Clone, Copy, Debug)]
pub struct ContextLayout {
    pub read_tag: i32,
    pub write_tag: i32,
    pub addend: i32,
    pub exec_tag: i32,
    pub exec_table: i32,
}

impl ContextLayout {
    /// Entries of each array.
    pub const ENTRIES: usize = 1 << 20;
    /// The one layout in use.
    pub const STANDARD: ContextLayout = {
        let array = (Self::ENTRIES * 8) as i32;
        ContextLayout {
            read_tag: 0,
            write_tag: array,
            addend: 2 * array,
            exec_tag: 3 * array,
            exec_table: 4 * array,
        }
    };
    /// Bytes of address space a context takes.
    pub const SIZE: usize = Self::ENTRIES * 8 * 5;
}

/// Why generated code returned to the runtime.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u32)]
pub enum ExitCode {
    /// `pc` has no code yet (or its page is not in the context): look it up.
    Lookup = 0,
    /// The kick word was set; `pc` is where to go on.
    Kicked = 1,
    /// The instruction at `pc` is to be executed in careful mode.
    Careful = 2,
    /// A helper asked for the runtime; `pc` is set.
    Helper = 3,
}

impl ExitCode {
    /// The exit code generated code stored.
    pub fn from_raw(raw: u32) -> ExitCode {
        match raw {
            0 => ExitCode::Lookup,
            1 => ExitCode::Kicked,
            2 => ExitCode::Careful,
            _ => ExitCode::Helper,
        }
    }
}

/// Host addresses of the runtime's functions that stubs call. All are `extern "C"`; the first argument is
/// the environment pointer.
#[derive(Clone, Copy, Debug)]
pub struct RuntimeFns {
    /// `(env, va, size | ext << 8, return_address) -> value`; sets `exit_request` on a fault.
    pub load: usize,
    /// `(env, va, value, size, return_address)`; sets `exit_request` on a fault.
    pub store: usize,
    /// `(env, va, size | op << 8, value, return_address) -> old`; op 0xff: load-reserved, 0xfe:
    /// store-conditional (returns 0 or 1), else an [`crate::AmoOp`]. Sets `exit_request` on a fault.
    pub atomic: usize,
    /// `(env, packed FpOp|FpFmt<<8|Rm<<16, a, b, c) -> result`.
    pub fp: usize,
    /// `(env, site) -> host address to jump to`: links a direct jump. See [`LinkSite`].
    pub link: usize,
}

/// Entry points that the backend emits once at the start of the code cache.
#[derive(Clone, Copy, Debug, Default)]
pub struct Stubs {
    /// `extern "C" fn(env, code)`: runs generated code until it exits.
    pub enter: usize,
    /// Where an entry table's zero leads: probes nothing, exits with [`ExitCode::Lookup`].
    pub miss: usize,
    /// Looks `pc` up in the current context and continues there, or exits.
    pub dispatch: usize,
    /// The others are the backend's own business.
    pub own: [usize; 12],
}

/// A direct jump that can be linked to its target block.
#[derive(Clone, Copy, Debug)]
pub struct LinkSite {
    /// Offset in the block's code of the aligned rel32 to patch.
    pub patch: u32,
    /// Offset in the block's code of what it points to while not linked.
    pub unlinked: u32,
    /// For a jump to another page, the offset of the 4-byte immediate that must equal the target page's
    /// entry-table address (0 while not linked). `u32::MAX` for a jump within the page.
    pub guard: u32,
    /// The target.
    pub to: PagePc,
}

/// A side-table entry: the instruction a host return address belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FaultEntry {
    /// Offset in the block's code of the address after the call.
    pub host: u32,
    /// The guest instruction.
    pub pc: PagePc,
    pub len: u8,
}

/// What a backend produced for a block besides the code.
#[derive(Clone, Debug, Default)]
pub struct Emitted {
    pub sites: Vec<LinkSite>,
    pub faults: Vec<FaultEntry>,
}

/// Everything a backend needs to know before the first block.
#[derive(Clone, Debug)]
pub struct BackendConfig {
    pub env: EnvLayout,
    pub context: ContextLayout,
    pub fns: RuntimeFns,
    /// Host addresses of the frontend's helpers, by number.
    pub helpers: Vec<usize>,
    /// Slots in the order in which they deserve a host register of their own.
    pub pin_order: Vec<Slot>,
    /// First code address (entry-table values are offsets from it).
    pub code_base: usize,
}

/// A host: turns blocks into machine code.
pub trait HostBackend: Send + Sync + Sized {
    /// Prepares a backend and writes the stubs, to run at `config.code_base`, into `out`.
    ///
    /// # Errors
    /// One line saying what the host lacks.
    fn new(config: BackendConfig, out: &mut Vec<u8>) -> Result<(Self, Stubs), String>;

    /// Translates `block` to code that will run at host address `at`, replacing the contents of `out`.
    ///
    /// `entry_guard`: for a block whose last instruction crosses into the next page, the entry-table
    /// address that the next page must have for the block to be valid.
    fn emit(&self, block: &Block, at: usize, entry_guard: Option<u32>, out: &mut Vec<u8>, info: &mut Emitted);

    /// The rel32 to store at `site` (host address of the field) so that it leads to `target`.
    fn link_word(&self, field: usize, target: usize) -> u32 {
        (target.wrapping_sub(field + 4)) as u32
    }

    /// The host's disassembly of `code` at `at`, a line per instruction, for `-d out_asm`.
    fn disassemble(&self, code: &[u8], at: usize) -> String;
}
