//! What a host backend owes the runtime, and the vCPU environment's layout as data, so that a backend
//! depends on nothing but the IR.

use crate::flags::Recipe;
use crate::op::{Block, FlagOp, FpFmt, FpOp, PagePc, Rm, RmwOp, Size, Slot};

/// Byte offsets, from the start of the environment, of what generated code touches. The runtime owns the
/// structure; this is its description.
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
    /// u64: 4096, or 0 once somebody has set the kick word: an indirect jump whose target has to be in a page compares with it,
    /// and looks at the kick word where that fails. 0: there is none.
    pub page_span: i32,
    /// u32: set by a runtime function or helper that wants the block left; `pc` then says where to go on.
    pub exit_request: i32,
    /// u32: why generated code was left (an [`ExitCode`]).
    pub exit_code: i32,
    /// u32: what the instruction that calls a [`CallKind::MayExit`](crate::CallKind) helper is: see
    /// [`pack_insn`].
    pub cur_insn: i32,
    /// u64: virtual address reserved by the last load-reserved; all ones when none.
    pub reserve_addr: i32,
    /// u64: the value it loaded, extended as loaded.
    pub reserve_value: i32,
    /// u8: the guard byte of [`VectorLayout`] (zero without) while the guest's vector or floating-point registers are in
    /// the host's, all ones while they are in memory only. All ones outside generated code.
    pub vector_dead: i32,
    /// u32: scratch for the host's floating-point control word, and the one that functions run under.
    pub mxcsr: i32,
    /// u32: see [`EnvLayout::mxcsr`].
    pub host_mxcsr: i32,
    /// u64: where `RuntimeFns::unit_probe` was asked about.
    pub unit_va: i32,
    /// 96 bytes, aligned to 32: the memory operand of an [`Op::Unit`](crate::Op::Unit) that the TLB did not serve, then
    /// scratch.
    pub unit_buffer: i32,
    /// Start of the frontend's hot state (`SetEnvByte`, `GuardEnv`).
    pub guest: i32,
    /// i32: instructions that may still be executed; see [`crate::Op::Count`].
    pub budget: i32,
    /// u32: of those taken from the budget, how many follow the instruction that calls a helper. Written before the
    /// call in blocks that count.
    pub count_left: i32,
    /// u64: where the trace goes on; see [`trace`].
    pub trace_next: i32,
    /// u64: a block that begins with [`EnvLayout::trace_next`] behind it calls [`RuntimeFns::trace_full`] first.
    pub trace_limit: i32,
    /// u64: the page of the block that was traced last.
    pub trace_page: i32,
    /// 256 of u64: a ring of the addresses that jumps which look their target up led to, but for returns; 0: there is none.
    pub jumps: i32,
    /// u8: where in it the next goes.
    pub jumps_at: i32,
    /// u16 for each of [`EnvLayout::heats`] places: how often compact blocks may still begin before one calls
    /// [`RuntimeFns::warm`]. A block has the place of its number ([`Emitted::number`]), modulo their number.
    pub heat: i32,
    /// Places at [`EnvLayout::heat`]: a power of two.
    pub heats: u32,
    /// [`Divisor`]s of divisions ([`DIVISORS`] of them), each found by its instruction's offset; 0: there are none.
    pub divisors: i32,
}

/// The words of the trace that generated code writes into a buffer, 4 bytes each.
///
/// A word below [`trace::ACCESS`] is the number of a stretch of code that begins to be executed. What has the bit
/// [`trace::ACCESS`] is an access, with an address and perhaps a value behind it (8 bytes each). What remains are
/// [`trace::PAGE`], and what the runtime adds.
pub mod trace {
    /// The lowest number that is not one of a stretch of code.
    pub const FIRST_TAG: u32 = 1 << 30;
    /// An access: with it the bits below, and the offset of the instruction in its page from bit 8 up.
    pub const ACCESS: u32 = 1 << 31;
    /// It writes.
    pub const WRITE: u32 = 1;
    /// It reads and writes: the value is the operand.
    pub const UPDATE: u32 = 2;
    /// A value follows the address.
    pub const VALUE: u32 = 4;
    /// Log2 of its size in bytes, 3 bits from here up.
    pub const SIZE_SHIFT: u32 = 3;
    /// The offset of the instruction in its page.
    pub const PC_SHIFT: u32 = 8;
    /// The virtual address of the page in which the code is from here on, in 8 bytes.
    pub const PAGE: u32 = FIRST_TAG;
    /// The runtime's own, from here up.
    pub const OTHER: u32 = FIRST_TAG + 1;
}

/// Where a guest's vector registers are in its hot state, for guests with [`Op::Unit`](crate::Op::Unit).
///
/// Generated code keeps them in the host's from the first guard that needs them until something is called, and the host's
/// MXCSR is the guest's for as long, with every exception masked: code that may raise exceptions is guarded.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct VectorLayout {
    /// 16 registers of 32 bytes.
    pub registers: i32,
    /// u32: MXCSR.
    pub mxcsr: i32,
    /// u8: what forbids instructions, a bit each; never all ones. Only helpers change it.
    pub guard: i32,
    /// The bits whose guards stand before instructions on vector registers.
    pub vector: u8,
    /// The bit that forbids instructions on the upper halves.
    pub upper: u8,
}

/// The instruction a helper call belongs to: its offset from the block's page in the low 24 bits (signed),
/// its length in the high 8.
pub const fn pack_insn(pc: PagePc, len: u8) -> u32 {
    (pc.0 as u32 & 0xff_ffff) | (len as u32) << 24
}

/// Undoes [`pack_insn`].
pub const fn unpack_insn(word: u32) -> (PagePc, u8) {
    (PagePc(((word << 8) as i32) >> 8), (word >> 24) as u8)
}

/// Byte displacements, from a context's base, of its arrays of 2^20 entries of 8 bytes, indexed by bits
/// 12..32 of the virtual address.
///
/// Read and write tags hold the page-aligned virtual address they are valid for, or a value that differs from
/// every address of their index above bit 11: all ones, or zero in any entry but the first (generated code
/// compares by exclusive-or, and lets the offset in the page differ); `addend` is what to add to a virtual address to get the host's. The two code arrays map a
/// page to its entry table: `exec_tag` as the other tags, `exec_table` the table's host address.
///
/// Behind them are [`ContextLayout::RANGES`] range entries of [`ContextLayout::RANGE_BYTES`]: one for each access that
/// generated code expects to stay in a range of pages. Where such an access hits, the host's address does not depend on
/// any load through the guest's. An entry begins with five words: the range's first virtual address, page-aligned; how far
/// behind it accesses may begin, plus one (zero in an empty entry); what to add to a virtual address; the address from
/// which on it is the fifth word that is to be added. Only entries of two parts have the last two, and count how far
/// accesses may begin in multiples of their size: they are aligned, so that none is in both parts. At
/// [`ContextLayout::RANGE_PATIENCE`] is a counter of 4 bytes: how many misses more are to be served by the page arrays
/// without telling the runtime. Generated code takes one off at each miss; the miss at which it wraps is told. The rest
/// is the runtime's.
///
/// Then [`ContextLayout::JUMPS`] jump entries of [`ContextLayout::JUMP_BYTES`]. The first [`ContextLayout::FAR_JUMPS`] are those of
/// indirect jumps which lead to other pages, mostly to one place: the address where such a jump led last, the host address of its
/// word in an entry table, and its offset in the page (4 bytes); whoever jumps there needs no look-up. Generated code fills them.
/// An empty one is for [`ContextLayout::NO_JUMP`], and its word is zero. At [`ContextLayout::JUMP_PATIENCE`] is a counter as above,
/// of times that the jump led elsewhere; the other entries have nothing else, and count how often a jump does not stay in its page.
#[derive(Clone, Copy, Debug)]
pub struct ContextLayout {
    pub read_tag: i32,
    pub write_tag: i32,
    pub addend: i32,
    pub exec_tag: i32,
    pub exec_table: i32,
    pub ranges: i32,
    /// A word that is not 0 once generated code has filled a range entry.
    pub roved: i32,
    /// The same for jump entries.
    pub jumped: i32,
    pub jumps: i32,
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
            ranges: 5 * array,
            roved: 5 * array + (Self::RANGES * Self::RANGE_BYTES) as i32,
            jumped: 5 * array + (Self::RANGES * Self::RANGE_BYTES) as i32 + 8,
            jumps: 5 * array + (Self::RANGES * Self::RANGE_BYTES) as i32 + 64,
        }
    };
    /// Number of range entries: an equal share for each size and direction of access, so that accesses which happen to
    /// share one at least agree on what it says.
    pub const RANGES: usize = 1 << 15;
    /// Kinds of range entries: by size, direction, and whether they have parts.
    pub const RANGE_KINDS: usize = 16;
    /// Range entries of one kind.
    pub const RANGE_SHARE: u32 = (Self::RANGES / Self::RANGE_KINDS) as u32;
    /// Bytes of a range entry.
    pub const RANGE_BYTES: usize = 64;
    /// Where the counter of misses is in a range entry.
    pub const RANGE_PATIENCE: usize = 40;
    /// Where a range entry says that generated code fills it: a byte, 0 or 1.
    pub const RANGE_ROVES: usize = 47;
    /// Number of jump entries.
    pub const JUMPS: u32 = 256;
    /// Those that say where jumps lead.
    pub const FAR_JUMPS: u32 = 128;
    /// Bytes of a jump entry.
    pub const JUMP_BYTES: usize = 32;
    /// What an empty jump entry is for: an address like others, but one that is even, so that the last
    /// twelve bits are its offset in the page whatever code is aligned to.
    pub const NO_JUMP: u64 = !1;
    /// Where the counter is in a jump entry.
    pub const JUMP_PATIENCE: usize = 20;
    /// Bytes of address space a context takes.
    pub const SIZE: usize =
        Self::ENTRIES * 8 * 5 + Self::RANGES * Self::RANGE_BYTES + 64 + Self::JUMPS as usize * Self::JUMP_BYTES;

    /// What [`RuntimeFns::note`] is told of jump entry `n`.
    pub const fn jump_word(n: u32) -> u32 {
        (Self::RANGES as u32 + 1 + n) << RANGE_SHIFT
    }

    /// The jump entry that such a word is about.
    pub const fn jump_of_word(word: u32) -> Option<u32> {
        (word >> RANGE_SHIFT).checked_sub(Self::RANGES as u32 + 1)
    }

    /// The kind of a range entry, below [`ContextLayout::RANGE_KINDS`].
    pub const fn range_kind(size: Size, write: bool, parts: bool) -> u32 {
        size as u32 | (write as u32) << 2 | (parts as u32) << 3
    }

    /// The `n`th range entry for accesses of this kind; they are used in turn.
    pub const fn range(n: u32, size: Size, write: bool, parts: bool) -> u32 {
        Self::range_kind(size, write, parts) * Self::RANGE_SHARE + n % Self::RANGE_SHARE
    }

    /// Whether a range entry is for stores.
    pub const fn range_is_write(number: u32) -> bool {
        (number / Self::RANGE_SHARE) & 4 != 0
    }

    /// Whether a range entry has two parts.
    pub const fn range_has_parts(number: u32) -> bool {
        (number / Self::RANGE_SHARE) & 8 != 0
    }
}

/// In the descriptors of [`RuntimeFns::load`] and [`RuntimeFns::store`], from this bit up: the number of the access's
/// range entry, plus one; or zero.
pub const RANGE_SHIFT: u32 = 16;

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

/// Host addresses of the runtime's functions that stubs call. All are `extern "C"`, never unwind, and take
/// the environment's address first. Where one sets `exit_request`, it has set `pc` (a trap's handler, say)
/// and the stub abandons the block and dispatches.
#[derive(Clone, Copy, Debug)]
pub struct RuntimeFns {
    /// `(env, va: u64, size_log2 | ext << 8 | range << RANGE_SHIFT: u32, return_address) -> value`. Sets `exit_request`
    /// on a fault.
    pub load: usize,
    /// `(env, va: u64, value: u64, size_log2 | range << RANGE_SHIFT: u32, return_address)`. Sets `exit_request` on a
    /// fault.
    pub store: usize,
    /// `(env, va: u64, size_log2 | ext << 8 | kind << 16: u32, value: u64, return_address) -> old`; kind: an
    /// [`crate::AmoOp`] as its number, [`ATOMIC_LOAD_RESERVED`] or [`ATOMIC_STORE_CONDITIONAL`] (0: stored,
    /// 1: not), or [`rmw_kind`], with [`RMW_LOCK`] or without. Those of [`rmw_kind`] read and write the flags in
    /// their slot and give the old value with zeros above. Maintains `reserve_*`. Sets `exit_request` on a fault.
    pub atomic: usize,
    /// `(env, va: u64, size_log2: u32, expected: u64, new: u64, return_address) -> old`: compares and exchanges
    /// atomically, whatever the alignment; the old value has zeros above. Sets `exit_request` on a fault.
    pub cmpxchg: usize,
    /// `(env, va: u64, bytes: u32, return_address)`: loads to [`EnvLayout::unit_buffer`]. Sets `exit_request` on a fault.
    pub unit_load: usize,
    /// `(env, va: u64, bytes: u32, return_address)`: finds out whether that many bytes can be stored. Sets `exit_request`
    /// on a fault.
    pub unit_probe: usize,
    /// `(env, bytes: u32)`: stores them from [`EnvLayout::unit_buffer`] to where `unit_probe` was asked about last.
    pub unit_store: usize,
    /// `(env, va: u64, size_log2 | range << RANGE_SHIFT: u32, return_address)`: the range entry of an access that is
    /// made some other way than by `load` and `store` did not serve it; it is filled if the page is known. Or
    /// [`ContextLayout::jump_word`]: that jump has led elsewhere as often as its entry allowed.
    pub note: usize,
    /// `(env, packed: u64)`: a floating-point operation the host does not do, slots to slot; see [`pack_fp`].
    pub fp: usize,
    /// `(env, return_address) -> host address to go on at`: links the jump whose cold code called, and sets
    /// `page_base` if it leads to another page. See [`LinkSite`].
    pub link: usize,
    /// `(env)`: the trace's buffer is full; there is room when it returns.
    pub trace_full: usize,
    /// `(env, va: u64, access: u32, rax: u64, return_address) -> host address`: an access of compact code that the TLB does
    /// not serve; see [`compact_access`]. The block makes its access at the host address that is answered, which is the
    /// guest's memory or a buffer. Sets `exit_request` on a fault, and to have the instruction executed with care.
    pub access: usize,
    /// `(env, return_address) -> host address to go on at`: a compact block has begun as often as [`EnvLayout::heat`]
    /// allowed. Going on at the return address is going on with the block.
    pub warm: usize,
}

/// An access of compact code in a word, for [`RuntimeFns::access`]. Of no bytes: a guard does not hold; the answer is the
/// instruction's address. One that is `aligned` is made only where its address is a
/// multiple of its size.
pub const fn compact_access(bytes: u8, write: bool, aligned: bool) -> u32 {
    bytes as u32 | (write as u32) << 8 | (aligned as u32) << 9
}

/// Undoes [`compact_access`].
pub const fn compact_access_of(word: u32) -> (u8, bool, bool) {
    (word as u8, word >> 8 & 1 != 0, word >> 9 & 1 != 0)
}

/// `kind` of [`RuntimeFns::atomic`] for a load-reserved.
pub const ATOMIC_LOAD_RESERVED: u32 = 0xff;
/// `kind` of [`RuntimeFns::atomic`] for a store-conditional.
pub const ATOMIC_STORE_CONDITIONAL: u32 = 0xfe;

/// `kind` of [`RuntimeFns::atomic`] for an [`crate::Op::Rmw`].
pub const fn rmw_kind(op: RmwOp) -> u32 {
    match op {
        RmwOp::Swap => 0x7f,
        RmwOp::F(op) => 0x40 + op as u32,
    }
}

/// Undoes [`rmw_kind`].
pub fn rmw_of_kind(kind: u32) -> Option<RmwOp> {
    if kind == rmw_kind(RmwOp::Swap) {
        return Some(RmwOp::Swap);
    }
    let number = kind.checked_sub(0x40)?;
    FlagOp::ALL.get(number as usize).map(|op| RmwOp::F(*op))
}

/// In the descriptor of [`RuntimeFns::atomic`] for an [`crate::Op::Rmw`]: it is to be atomic.
pub const RMW_LOCK: u32 = 1 << 24;

/// A floating-point operation in a word, for [`RuntimeFns::fp`]: from the lowest byte up op, format,
/// rounding mode, `d`, `a`, `b`, `c`.
pub const fn pack_fp(op: FpOp, fmt: FpFmt, rm: Rm, d: Slot, a: Slot, b: Slot, c: Slot) -> u64 {
    u64::from_le_bytes([op as u8, fmt as u8, rm as u8, d.0, a.0, b.0, c.0, 0])
}

/// Entry points that the backend emits once at the start of the code cache.
#[derive(Clone, Copy, Debug, Default)]
pub struct Stubs {
    /// `extern "C" fn(env, code)`: runs generated code from host address `code` until it exits.
    pub enter: usize,
    /// Where an entry table's zero leads (so its address is [`BackendConfig::code_base`]): exits with
    /// [`ExitCode::Lookup`].
    pub miss: usize,
    /// Looks `pc` up in the current context and continues there, or exits.
    pub dispatch: usize,
}

/// A direct jump that can be linked to its target block.
#[derive(Clone, Copy, Debug)]
pub struct LinkSite {
    /// Offset in the block's code of the aligned rel32 to patch.
    pub patch: u32,
    /// Offset in the block's code of what it points to while not linked: cold code that calls the link stub.
    pub unlinked: u32,
    /// Offset in the block's code of the address after that call, always inside the code: what identifies the
    /// site to the runtime.
    pub return_offset: u32,
    /// For a jump to another page, the offset of the 4-byte immediate that must equal the target page's
    /// entry-table address (0 while not linked). `u32::MAX` for a jump within the page.
    pub guard: u32,
    /// The target.
    pub to: PagePc,
}

impl LinkSite {
    /// In `unlinked`: the jump stays as it is when it is unlinked; its guard keeps it from being reached.
    pub const STAYS: u32 = u32::MAX;
}

/// A side-table entry: the instruction a host return address belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FaultEntry {
    /// Offset in the block's code of the address after the call.
    pub host: u32,
    /// The guest instruction.
    pub pc: PagePc,
    pub len: u8,
    /// In a block that counts: the instructions after it that have been taken from the budget.
    pub left: u16,
    /// For an access of compact code.
    pub stored: Stored,
    /// The number, in [`Emitted::recipes`], of the recipe by which the flags are to be computed before anybody looks at their
    /// slot; all ones if they are there.
    pub recipe: u16,
}

/// What an access of compact code stores, so that the runtime can do it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Stored {
    /// Nothing; or what only the code itself can say.
    #[default]
    Unknown,
    /// What `rax` has.
    Scratch,
    Slot(Slot),
    Imm(i32),
}

/// What has been found out about a page's code by running it.
#[derive(Clone, Debug, Default)]
pub struct Hints {
    /// Nothing has been found out: accesses are to call checks that all share, for little code made quickly.
    pub compact: bool,
    /// It runs often: accesses are to have range entries (see [`ContextLayout`]).
    pub hot: bool,
    /// Offsets of the instructions whose accesses do not stay in a range of pages, but perhaps in two that are neighbours
    /// (a table on the stack).
    pub parted: Vec<u16>,
    /// Offsets of those whose accesses do not stay in these either.
    pub scattered: Vec<u16>,
    /// Offsets of indirect jumps that lead to other pages.
    pub far: Vec<u16>,
    /// Of those: to many places.
    pub strays: Vec<u16>,
}

/// What a backend produced for a block besides the code.
#[derive(Clone, Debug, Default)]
pub struct Emitted {
    pub sites: Vec<LinkSite>,
    pub faults: Vec<FaultEntry>,
    /// Those that entries in `faults` name.
    pub recipes: Vec<Recipe>,
    /// Not produced, but told the backend.
    pub hints: Hints,
    /// Told as well: the address of the entry table of the block's page; 0 if it has none.
    pub table: u32,
    /// Told as well: the block's number.
    pub number: u32,
}

/// Entries of [`EnvLayout::divisors`].
pub const DIVISORS: usize = 8;

/// What unsigned divisions of 64 bits remember of the last divisor: the quotient of `n` is `(((n - t) >> 1) + t) >> shift`,
/// where `t` is the upper half of `magic` times `n`.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct Divisor {
    pub divisor: u64,
    pub magic: u64,
    pub shift: u64,
    /// Divisions by others until one of those is remembered instead.
    pub patience: u64,
}

impl Default for Divisor {
    /// As of a division by 2^63.
    fn default() -> Divisor {
        Divisor { divisor: 1 << 63, magic: 0, shift: 62, patience: 0 }
    }
}

/// Which of the optimisations are used that can be left out.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Optimise {
    /// None: to find out whether one of them is to blame.
    Off,
    /// Those that pay, but all code is made for running often.
    Usual,
    /// Those that pay: code is compact until it has run often.
    #[default]
    Tiered,
    /// All code stays as it is made first, however often it runs: for tests.
    Compact,
    /// All, from a block's first execution on and also where they cannot pay: for tests.
    Forced,
}

impl Optimise {
    /// The variable that [`Optimise::from_environment`] reads.
    pub const VARIABLE: &str = "MIMUS_TCG_OPT";

    /// Whether code is made anew for what is found out by running it.
    pub fn learns(self) -> bool {
        matches!(self, Optimise::Usual | Optimise::Tiered)
    }

    /// By the name it has on the command line.
    pub fn parse(name: &str) -> Option<Optimise> {
        Some(match name {
            "off" => Optimise::Off,
            "on" => Optimise::Usual,
            "tiered" => Optimise::Tiered,
            "compact" => Optimise::Compact,
            "force" => Optimise::Forced,
            _ => return None,
        })
    }

    /// What [`Optimise::VARIABLE`] says, for running tests with it; [`Optimise::Tiered`] if it says nothing.
    pub fn from_environment() -> Optimise {
        std::env::var(Self::VARIABLE).ok().and_then(|name| Optimise::parse(&name)).unwrap_or_default()
    }
}

/// The frontend's pure helper for the accrued floating-point flags, RISC-V's `fflags`: those in a byte or those of the
/// host's unit. Its first argument says whether it writes them, the second what; it gives what they were. A backend may
/// do the same in line.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct FpFlagsHelper {
    /// Its number.
    pub helper: u16,
    /// u8: the flags in the guest's hot state.
    pub flags: i32,
}

/// Everything a backend needs to know before the first block.
#[derive(Clone, Debug)]
pub struct BackendConfig {
    pub env: EnvLayout,
    pub context: ContextLayout,
    pub fns: RuntimeFns,
    /// Host addresses of the frontend's helpers, by number: `extern "C" fn(env, u64, u64, u64) -> u64`.
    pub helpers: Vec<usize>,
    /// Slots in the order in which they deserve a host register of their own.
    pub pin_order: Vec<Slot>,
    /// The stack pointer, if blocks push and pop: store below it, or load from it, and move it.
    pub stack: Option<Slot>,
    /// Where vector registers are, if blocks have [`Op::Unit`](crate::Op::Unit).
    pub vector: Option<VectorLayout>,
    /// Floating-point slots in the order in which they deserve a host register of their own. For guests
    /// with neither `vector` nor `flags`.
    pub fp_pin_order: Vec<Slot>,
    pub fp_flags: Option<FpFlagsHelper>,
    /// Guest code begins at multiples of this many bytes: 1 or 2. An entry table has a word for each in a page.
    pub code_align: u32,
    pub optimise: Optimise,
    /// The guest has condition flags: its blocks may have operations on them.
    pub flags: bool,
    /// First code address (entry-table values are offsets from it). Code, tables and stubs are below 2 GiB.
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
