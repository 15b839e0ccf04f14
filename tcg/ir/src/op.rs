//! The operations of the IR.
//!
//! The IR is thin on purpose: a block is a list of operations on guest register *slots*, shaped so that a
//! host backend lowers it in one pass without building a graph. What a frontend writes is close to what
//! the host executes; what makes it an IR is that it has a text form, a verifier and an interpreter, and
//! that neither guests nor hosts see one another through it.
//!
//! Guests with condition flags have operations of their own (named `…F`, with [`FlagOp`]): the flags are one
//! value, the [`FLAGS`](crate::flags::FLAGS) slot, which each such operation reads or writes as x86 defines it.
//! Every other operation leaves it alone. A backend keeps it wherever it likes as long as nobody can tell:
//! helpers that may exit, faults and the ends of the block see it in its slot.

use std::fmt;

use crate::flags::Flags;
use crate::unit::UnitInsn;

/// Number of slots a block may name: guest registers first, then temporaries.
pub const SLOTS: usize = 80;
/// First temporary slot. Temporaries are dead at the end of their guest instruction.
pub const FIRST_TEMP: u8 = 64;

/// A 64-bit guest register or temporary, by index into the vCPU's slot array.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, PartialOrd, Ord)]
pub struct Slot(pub u8);

impl Slot {
    /// The `n`-th temporary.
    pub const fn temp(n: u8) -> Slot {
        Slot(FIRST_TEMP + n)
    }
}

/// An operand: a slot's 64 bits, or a constant.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Val {
    Slot(Slot),
    Imm(i64),
}

impl From<Slot> for Val {
    fn from(s: Slot) -> Val {
        Val::Slot(s)
    }
}

impl From<i64> for Val {
    fn from(i: i64) -> Val {
        Val::Imm(i)
    }
}

/// Width of an integer operation and how its result fills the 64-bit slot.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Ty {
    /// 64-bit operation.
    I64,
    /// Operates on the low 32 bits; the result is sign-extended.
    I32,
    /// Operates on the low 32 bits; the result is zero-extended.
    U32,
}

/// Two-operand integer operations.
///
/// Shift and rotate counts, and bit numbers, are taken modulo the width. Division by zero gives all ones
/// and a remainder equal to the dividend; the overflowing division gives the dividend and remainder 0
/// (RISC-V unprivileged specification, chapter M). `MulHi*`, `Sh*Add`, `SetLt*` and `B*` are 64-bit only,
/// but for `B*` and shifts in the `I32` form where the guest has one.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum AluOp {
    Add,
    Sub,
    And,
    Or,
    Xor,
    /// `a & !b`
    Andn,
    /// `a | !b`
    Orn,
    /// `!(a ^ b)`
    Xnor,
    Shl,
    Shr,
    Sar,
    Rol,
    Ror,
    Mul,
    /// High 64 bits of signed × signed.
    MulHiS,
    /// High 64 bits of unsigned × unsigned.
    MulHiU,
    /// High 64 bits of signed `a` × unsigned `b`.
    MulHiSU,
    DivS,
    DivU,
    RemS,
    RemU,
    MinS,
    MinU,
    MaxS,
    MaxU,
    /// 1 if `a < b` signed, else 0.
    SetLtS,
    /// 1 if `a < b` unsigned, else 0.
    SetLtU,
    /// `(a << 1) + b`
    Sh1Add,
    /// `(a << 2) + b`
    Sh2Add,
    /// `(a << 3) + b`
    Sh3Add,
    /// `a | (1 << b)`
    BSet,
    /// `a & !(1 << b)`
    BClr,
    /// `a ^ (1 << b)`
    BInv,
    /// `(a >> b) & 1`
    BExt,
}

/// One-operand integer operations. `Clz` and `Ctz` of zero give the width.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum UnOp {
    Mov,
    SextB,
    SextH,
    SextW,
    ZextB,
    ZextH,
    ZextW,
    Clz,
    Ctz,
    Popcnt,
    /// Reverses the bytes of the value.
    Bswap,
    /// Each byte becomes 0xff if it is not zero.
    OrcB,
}

/// Size of a memory access in bytes (1, 2, 4, 8).
#[derive(Clone, Copy, PartialEq, Eq, Debug, PartialOrd, Ord)]
pub enum Size {
    B1,
    B2,
    B4,
    B8,
}

impl Size {
    /// Size in bytes.
    pub const fn bytes(self) -> u32 {
        1 << self as u32
    }
}

/// How a loaded value fills its 64-bit slot.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Ext {
    Zero,
    Sign,
    /// Upper bits all ones: a NaN-boxed single.
    Ones,
}

/// Atomic read-modify-write operations.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum AmoOp {
    Swap,
    Add,
    Xor,
    And,
    Or,
    MinS,
    MaxS,
    MinU,
    MaxU,
}

/// Conditions of a branch, on 64-bit operands.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Cond {
    Eq,
    Ne,
    LtS,
    GeS,
    LtU,
    GeU,
}

/// A guest code address, as a byte offset from the start of the page the block begins in. Blocks do not
/// know their virtual address: the same code serves every address space that maps the page.
#[derive(Clone, Copy, PartialEq, Eq, Debug, PartialOrd, Ord)]
pub struct PagePc(pub i32);

impl PagePc {
    /// Whether the address is in the block's own page.
    pub const fn same_page(self) -> bool {
        self.0 >= 0 && self.0 < 4096
    }
}

/// Floating-point format of an operation's result (for compares and conversions to integers, its source).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum FpFmt {
    F32,
    F64,
}

/// Rounding mode of a floating-point operation, in RISC-V's encoding order.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Rm {
    NearestEven,
    ToZero,
    Down,
    Up,
    NearestMaxMag,
    /// The mode in the guest's control register.
    Dynamic,
}

/// Floating-point operations, on slots holding NaN-boxed singles or doubles, with RISC-V's rules for NaNs,
/// saturation and flags.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum FpOp {
    Add,
    Sub,
    Mul,
    Div,
    Sqrt,
    /// `a*b + c`
    MAdd,
    /// `a*b - c`
    MSub,
    /// `-(a*b) + c`
    NMSub,
    /// `-(a*b) - c`
    NMAdd,
    Min,
    Max,
    /// Quiet equality; result 0 or 1 in an integer slot.
    Eq,
    /// Signalling less-than.
    Lt,
    /// Signalling less-or-equal.
    Le,
    /// RISC-V `fclass` mask.
    Class,
    Sgnj,
    Sgnjn,
    Sgnjx,
    /// To a signed 32-bit integer, sign-extended.
    ToI32,
    /// To an unsigned 32-bit integer, sign-extended (as RISC-V's `fcvt.wu` does).
    ToU32,
    ToI64,
    ToU64,
    FromI32,
    FromU32,
    FromI64,
    FromU64,
    /// From the other format to `fmt`.
    CvtFmt,
    /// Raw bits to an integer slot (`F32`: sign-extended).
    MvToInt,
    /// Raw bits from an integer slot (`F32`: NaN-boxed).
    MvFromInt,
}

/// Integer operations that set flags, as the x86 instructions of these names do: with their masking of counts,
/// their flags left alone by a count of zero, and so on. [`crate::flags::eval`] is the definition.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum FlagOp {
    Add,
    /// `a + b + CF`
    Adc,
    /// Without a destination, a compare.
    Sub,
    /// `a - b - CF`
    Sbb,
    /// Without a destination, a test.
    And,
    Or,
    Xor,
    /// `!a & b`
    Andn,
    /// `-a`; like the others of one operand, `b` is ignored (use `Val::Imm(0)`).
    Neg,
    /// `!a`; sets no flag.
    Not,
    /// `a + 1`, CF stays.
    Inc,
    /// `a - 1`, CF stays.
    Dec,
    /// Signed product, truncated. Sizes 2, 4, 8.
    Mul,
    Shl,
    Shr,
    Sar,
    Rol,
    Ror,
    /// Rotate through CF.
    Rcl,
    /// Rotate through CF.
    Rcr,
    /// Bit `b` (modulo the width) of `a` to CF; the destination, if any, is left alone. Sizes 2, 4, 8, as for all
    /// below.
    Bt,
    /// Bit test and set.
    Bts,
    /// Bit test and reset.
    Btr,
    /// Bit test and complement.
    Btc,
    /// Index of the lowest one; the destination is left alone if there is none.
    Bsf,
    /// Index of the highest one; the destination is left alone if there is none.
    Bsr,
    Popcnt,
    Lzcnt,
    Tzcnt,
    /// The bits of `a` from the one that `b`'s low byte names, as many as its second byte says. Sizes 4, 8, as for
    /// all below.
    Bextr,
    /// `a` with the bits from the one that `b`'s low byte names on cleared.
    Bzhi,
    /// `a & -a`
    Blsi,
    /// `a & (a - 1)`
    Blsr,
    /// `a ^ (a - 1)`
    Blsmsk,
}

impl FlagOp {
    /// All of them, in order.
    pub const ALL: [FlagOp; 34] = {
        use FlagOp::*;
        [
            Add, Adc, Sub, Sbb, And, Or, Xor, Andn, Neg, Not, Inc, Dec, Mul, Shl, Shr, Sar, Rol, Ror, Rcl, Rcr, Bt,
            Bts, Btr, Btc, Bsf, Bsr, Popcnt, Lzcnt, Tzcnt, Bextr, Bzhi, Blsi, Blsr, Blsmsk,
        ]
    };
}

/// Conditions on flags, in x86's encoding order.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u8)]
pub enum CondF {
    O,
    No,
    B,
    Ae,
    E,
    Ne,
    Be,
    A,
    S,
    Ns,
    P,
    Np,
    L,
    Ge,
    Le,
    G,
}

impl CondF {
    /// All of them, in encoding order.
    pub const ALL: [CondF; 16] = {
        use CondF::*;
        [O, No, B, Ae, E, Ne, Be, A, S, Ns, P, Np, L, Ge, Le, G]
    };

    /// The opposite condition.
    pub const fn invert(self) -> CondF {
        CondF::ALL[self as usize ^ 1]
    }
}

/// What an [`Op::Rmw`] does to memory.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum RmwOp {
    /// Memory becomes the operand; no flag changes.
    Swap,
    /// `memory = op(memory, operand)`, with its flags. Operations of one operand ignore the operand.
    F(FlagOp),
}

/// What a helper call may do beside computing its result.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum CallKind {
    /// Reads its arguments only: touches no slot, never leaves the block.
    Pure,
    /// May read and write any slot, may fault or ask to leave the block (`exit_request`).
    MayExit,
}

/// A repeated move or store of elements; see [`Op::Rep`].
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Rep {
    /// Size of an element.
    pub size: Size,
    /// What is stored, if that is not what is at `from`.
    pub fill: Option<Slot>,
    /// Elements left.
    pub count: Slot,
    /// Address of the next element.
    pub from: Slot,
    /// Address to store it to.
    pub to: Slot,
    /// Addresses and the count are the slots' low 32 bits.
    pub narrow: bool,
    /// Goes downwards if any bit of `down_mask` is set in the byte at this offset of the hot state.
    pub down: i32,
    pub down_mask: u8,
}

/// Hint about an indirect jump, for return prediction.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum JumpHint {
    None,
    Call,
    Return,
}

/// One operation.
#[derive(Clone, Copy, PartialEq, Debug)]
pub enum Op {
    /// A guest instruction of `len` bytes begins at `pc`. Everything up to the next mark belongs to it.
    Insn {
        pc: PagePc,
        len: u8,
    },
    Alu {
        op: AluOp,
        ty: Ty,
        d: Slot,
        a: Val,
        b: Val,
    },
    Un {
        op: UnOp,
        ty: Ty,
        d: Slot,
        a: Val,
    },
    /// `d` = virtual address of `pc`.
    GetPc {
        d: Slot,
        pc: PagePc,
    },
    /// `d` = memory at `base + off`.
    Load {
        d: Slot,
        base: Val,
        off: i32,
        size: Size,
        ext: Ext,
    },
    Store {
        src: Val,
        base: Val,
        off: i32,
        size: Size,
    },
    /// Load and set this vCPU's reservation. Faults if misaligned.
    LoadReserved {
        d: Slot,
        base: Val,
        size: Size,
        ext: Ext,
    },
    /// Store if the reservation holds; `d` = 0 on success, 1 on failure. The reservation ends either way.
    StoreConditional {
        d: Slot,
        src: Val,
        base: Val,
        size: Size,
    },
    /// `d` = old memory (sign-extended), memory = `op(old, src)`, atomically. Faults if misaligned.
    Amo {
        op: AmoOp,
        d: Option<Slot>,
        src: Val,
        base: Val,
        size: Size,
    },
    /// Orders every earlier access before every later one (the host is TSO: only store→load needs code).
    Fence,
    Fp {
        op: FpOp,
        fmt: FpFmt,
        rm: Rm,
        d: Slot,
        a: Slot,
        b: Slot,
        c: Slot,
    },
    /// Store of a constant byte at byte offset `off` of the guest's hot state (see `EnvLayout::guest`).
    SetEnvByte {
        off: i32,
        val: u8,
    },
    /// Leaves the block *before* the current instruction, to have it executed in careful mode, if any bit
    /// of `mask` is set in the byte at `off` of the guest's hot state.
    GuardEnv {
        off: i32,
        mask: u8,
    },
    /// Leaves the block *before* the current instruction, to have it executed in careful mode, if the condition holds.
    Guard {
        cond: Cond,
        a: Val,
        b: Val,
    },
    /// The same, unless `a` is the sign extension of its low `bits` (1 to 63) bits.
    GuardFits {
        a: Val,
        bits: u8,
    },
    /// Calls helper number `helper` of the frontend's table.
    Call {
        helper: u16,
        kind: CallKind,
        ret: Option<Slot>,
        args: [Val; 3],
    },
    /// `d` = the low bits of `base + (index << shift) + disp`: x86's `lea`. [`Size::B2`], [`Size::B4`] and
    /// [`Size::B8`]; zeros above the size. `shift` is 0 to 3.
    Lea {
        d: Slot,
        base: Val,
        index: Val,
        shift: u8,
        disp: i32,
        size: Size,
    },
    /// Replaces the low byte ([`Size::B1`]) or two ([`Size::B2`]) of `d` by those of `a`.
    SetPart {
        d: Slot,
        size: Size,
        a: Val,
    },
    /// `d` = bits 8 to 15 of `a` (x86's `ah`, `ch`, `dh`, `bh`), zeros above.
    GetHigh {
        d: Slot,
        a: Slot,
    },
    /// Replaces bits 8 to 15 of `d` by the low byte of `a`.
    SetHigh {
        d: Slot,
        a: Val,
    },
    /// `d` = `size` bytes at byte offset `off` of the guest's hot state.
    LoadEnv {
        d: Slot,
        off: i32,
        size: Size,
        ext: Ext,
    },
    /// Stores to `size` bytes at byte offset `off` of the guest's hot state.
    StoreEnv {
        src: Val,
        off: i32,
        size: Size,
    },
    /// `d` = `op(a, b)` at `size`, and the flags. Sizes of 4 and 8 bytes fill the slot, with zeros above; 1 and 2
    /// bytes replace the low bytes of `d`. Without `d`, the flags alone.
    AluF {
        op: FlagOp,
        size: Size,
        d: Option<Slot>,
        a: Val,
        b: Val,
    },
    /// x86's `shld` and `shrd` at 2, 4 or 8 bytes: `a` shifted by `n`, filled from `b`. `d` as in `AluF`.
    ShiftDoubleF {
        left: bool,
        size: Size,
        d: Slot,
        a: Val,
        b: Val,
        n: Val,
    },
    /// Both halves of `a * b`; `lo` and `hi` are filled as `AluF` fills `d`, and are not one slot. For
    /// [`Size::B1`] the 16-bit product replaces the low two bytes of `lo`, and `hi` is not written. CF and OF: the
    /// high half says something; the other flags are left alone, or what the host makes of them.
    MulWideF {
        signed: bool,
        size: Size,
        lo: Slot,
        hi: Slot,
        a: Val,
        b: Val,
    },
    /// Quotient `q` and remainder `r` of `hi:lo` by `b`; filled as `AluF` fills `d`, and not one slot. For
    /// [`Size::B1`] the dividend is the low two bytes of `lo` (`hi` is not used), and the two bytes remainder:
    /// quotient replace the low two of `q` (`r` is not written). Of the flags, AF is set, CF and OF are left alone, the
    /// others are clear.
    ///
    /// If `b` is zero or the quotient does not fit, leaves the block *before* the current instruction, to have it
    /// executed in careful mode: so this comes before anything the instruction changes.
    DivWideF {
        signed: bool,
        size: Size,
        q: Slot,
        r: Slot,
        hi: Val,
        lo: Val,
        b: Val,
    },
    /// Replaces the low byte of `d` by 1 if the condition holds, by 0 if not.
    SetCondF {
        cond: CondF,
        d: Slot,
    },
    /// If the condition holds, `d` = `a` at 2, 4 or 8 bytes, filled as in `AluF`. If not, `d` stays, but for
    /// [`Size::B4`], which clears the upper half either way.
    CMovF {
        cond: CondF,
        size: Size,
        d: Slot,
        a: Val,
    },
    /// `d` = the flags, where x86's EFLAGS has them; zeros elsewhere.
    GetFlags {
        d: Slot,
    },
    /// The flags in `mask` become what they are in `a`, which is laid out as x86's EFLAGS.
    SetFlags {
        a: Val,
        mask: Flags,
    },
    /// The flags in `mask` become their opposites.
    FlipFlags {
        mask: Flags,
    },
    /// Right before the terminal: where it leads, nobody looks at these flags before they are written.
    DeadFlags {
        mask: Flags,
    },
    /// Memory at `base + off` = `op` of it and `src`; the access as a whole faults as a store, or is done with
    /// its flags. `old` (with [`RmwOp::Swap`] and `F(Add)` only) = what was there, zeros above. `lock`: atomically,
    /// whatever the alignment.
    ///
    /// The operations are `Swap` and of `FlagOp` those without `Andn`, `Mul`, `Bt` and what follows `Btc`. The bit
    /// operations take their bit number modulo the width here too.
    Rmw {
        op: RmwOp,
        size: Size,
        lock: bool,
        old: Option<Slot>,
        src: Val,
        base: Val,
        off: i32,
    },
    /// If memory at `base + off` is `expected` (at `size`), it becomes `new`; `d` = what was there, zeros above.
    /// Atomic whatever the alignment; faults as a store. No flag changes.
    CmpXchg {
        d: Slot,
        size: Size,
        expected: Val,
        new: Val,
        base: Val,
        off: i32,
    },
    /// An instruction of x86's vector, x87 or MMX units on the guest's registers of these units, which are in the hot
    /// state or wherever the backend keeps them. `a` is the general register that it reads, or the base of its memory
    /// operand, which is at `a + off`; `d` the general register that it writes: as a whole, but for
    /// [`UnitGpr::OutAx`](crate::unit::UnitGpr::OutAx).
    ///
    /// A memory operand faults before anything is changed; one that is not aligned although it must be leaves the block
    /// *before* the current instruction, to have it executed in careful mode.
    ///
    /// Vector registers are there only behind a [`Op::GuardEnv`] of the frontend's
    /// [`VectorLayout`](crate::backend::VectorLayout), with no call in between.
    Unit {
        insn: UnitInsn,
        d: Option<Slot>,
        a: Val,
        off: i32,
    },
    /// Right before a [`Op::Call`] that executes the same: either does it all, ascending, and skips the call, or does
    /// nothing.
    Rep(Rep),
    /// Side exit to `to` if the condition on flags holds. There, nobody looks at the flags in `dead` before they
    /// are written.
    BranchF {
        cond: CondF,
        to: PagePc,
        dead: Flags,
    },
    /// Side exit to `to` if the condition holds.
    Branch {
        cond: Cond,
        a: Val,
        b: Val,
        to: PagePc,
    },
    /// Terminal: continue at `to`.
    Jump {
        to: PagePc,
    },
    /// Terminal: continue at `base + off`, without its lowest bit for guests whose code is 2-aligned; first `link.0` = virtual address of `link.1`.
    JumpReg {
        base: Slot,
        off: i32,
        link: Option<(Slot, PagePc)>,
        hint: JumpHint,
    },
    /// Terminal: a helper has set the vCPU's program counter; continue there.
    Dispatch,
    /// Instrumentation, as all below: none reads or writes guest state or flags, none can fault, and no frontend
    /// writes them. Right behind an instruction's mark: it and those that follow it, `insns` in all, are executed to
    /// the next mark with a count, or the block's end, if none of them faults or leaves. They are taken from the
    /// budget (`EnvLayout::budget`). At the block's entry `total` is the most instructions that the block can
    /// execute, 0 elsewhere: a smaller budget has the block left for careful execution.
    Count {
        insns: u16,
        total: u16,
    },
    /// Appends `id` to the trace (see `backend::trace`). `entry`: at the block's entry, where the buffer's room and
    /// the page are looked at too.
    TraceBlock {
        id: u32,
        entry: bool,
    },
    /// Right before an access at `base + off`: writes `head` and the address behind the trace's end.
    TraceAccess {
        head: u32,
        base: Val,
        off: i32,
    },
    /// Right behind the access: the trace's end moves behind it and, if there is one, the value.
    TraceValue {
        value: Option<Val>,
    },
}

impl Op {
    /// Whether the block ends with this operation.
    pub const fn is_terminal(&self) -> bool {
        matches!(self, Op::Jump { .. } | Op::JumpReg { .. } | Op::Dispatch)
    }

    /// Whether it counts or traces, and the guest cannot tell.
    #[inline]
    pub const fn is_instrumentation(&self) -> bool {
        matches!(self, Op::Count { .. } | Op::TraceBlock { .. } | Op::TraceAccess { .. } | Op::TraceValue { .. })
    }
}

/// A translated block: one entry, side exits, one terminal.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Block {
    pub ops: Vec<Op>,
    /// Offset of the first instruction in its page, in bytes (0..4096).
    pub start: u16,
    /// Bytes of guest code covered, but for what is before the start (`granules`). `start + len` may pass the page's end: by
    /// one instruction, or where the block runs on.
    pub len: u16,
    /// Number of guest instructions.
    pub insns: u16,
    /// Addresses of memory are 32 bits: operations that have a base and an offset access `base + off` modulo 2^32. The
    /// TLB has no entries past them where such a block runs.
    pub narrow: bool,
    /// What else of the page it was made from, beside the code that it covers: a bit for each 64 bytes.
    pub granules: u64,
}

impl Block {
    /// Empties the block for reuse, keeping its allocation.
    pub fn clear(&mut self, start: u16) {
        self.ops.clear();
        self.start = start;
        self.len = 0;
        self.insns = 0;
        self.narrow = false;
        self.granules = 0;
    }

    /// Counts its next instruction, at `offset`, in.
    pub fn cover_next(&mut self, offset: u16, len: u8) {
        self.insns += 1;
        match offset.checked_sub(self.start) {
            Some(from) => self.len = self.len.max(from + u16::from(len)),
            None => self.cover(offset, len),
        }
    }

    /// Notes that it was made from the code at an offset before its start.
    pub fn cover(&mut self, offset: u16, len: u8) {
        let last = offset + u16::from(len.max(1)) - 1;
        for granule in offset / 64..=last / 64 {
            self.granules |= 1u64.checked_shl(granule.into()).unwrap_or(0);
        }
    }

    /// Has all flags in their place wherever the block is left, for those who look there.
    pub fn keep_all_flags(&mut self) {
        for op in &mut self.ops {
            match op {
                Op::BranchF { dead, .. } => *dead = Flags::NONE,
                Op::DeadFlags { mask } => *mask = Flags::NONE,
                _ => {}
            }
        }
    }

    /// Whether the block reaches into the next page.
    pub fn crosses_page(&self) -> bool {
        u32::from(self.start) + u32::from(self.len) > 4096
    }
}

impl fmt::Display for Slot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.0 >= FIRST_TEMP { write!(f, "t{}", self.0 - FIRST_TEMP) } else { write!(f, "s{}", self.0) }
    }
}
