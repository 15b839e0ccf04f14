//! The rules a block obeys, and the check of them.
//!
//! A frontend's block must pass [`verify`], and a backend may rely on that.
//!
//! * The first operation is an [`Op::Insn`] mark; the last one is terminal, and no other is.
//! * `insns` is the number of marks, at least 1. Marks ascend without overlap from `start`, each in the
//!   block's page or, where the block runs on over its end, the next one; each of 1 to [`MAX_INSN_LEN`] bytes; the last
//!   instruction ends at `start + len`.
//! * Slots are below [`SLOTS`]. A temporary is written before it is read, within its guest instruction.
//! * Operations that exist at 64 bits only have type `I64`: [`is_64_bit_only`] ones, and `SextW`, `ZextW` and
//!   `OrcB`. `BSet`, `BClr`, `BInv` and `BExt` have `I64` or `I32`.
//! * [`Ext::Ones`] is for plain loads of 4 bytes (a single to be NaN-boxed).
//! * A floating-point operation names three slots, of which it uses [`fp_arity`]: the others must be valid, but
//!   may hold anything.
//! * A block with operations on flags names [`FLAGS`] in no operand. [`Op::DeadFlags`] comes right before the
//!   terminal. Sizes are those that [`FlagOp`] and the operations' documentation list; the two destinations of
//!   [`Op::MulWideF`] and [`Op::DivWideF`] differ but for [`Size::B1`], which has one.
//! * An operation that replaces a part of its destination, or may leave it alone, reads it.
//! * An [`Op::Unit`] names the general registers and the memory that its instruction has.
//! * A [`Op::GuardEnv`], [`Op::Guard`] or [`Op::DivWideF`] comes before anything its instruction changes (temporaries aside), since nothing of it
//!   may have happened when the block is left; its mask is not 0. Offsets into the hot state are not negative.

use crate::flags::{self, FLAGS, Flags};
use crate::interp::is_64_bit_only;
use crate::op::*;
use crate::unit::{UnitGpr, UnitInsn, UnitMemory};

/// Longest guest instruction, in bytes (x86).
pub const MAX_INSN_LEN: u8 = 15;

/// What is wrong with a block, in one line.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum VerifyError {
    /// An operation breaks a rule.
    #[error("op {index}: {reason}")]
    Op {
        /// Index in [`Block::ops`].
        index: usize,
        /// The rule and what breaks it.
        reason: String,
    },
    /// The block as a whole breaks a rule.
    #[error("block: {0}")]
    Block(String),
}

/// Number of slots (of `a`, `b`, `c`, in this order) that a floating-point operation reads.
pub const fn fp_arity(op: FpOp) -> usize {
    use FpOp::*;
    match op {
        MAdd | MSub | NMSub | NMAdd => 3,
        Add | Sub | Mul | Div | Min | Max | Eq | Lt | Le | Sgnj | Sgnjn | Sgnjx => 2,
        Sqrt | Class | ToI32 | ToU32 | ToI64 | ToU64 | FromI32 | FromU32 | FromI64 | FromU64 | CvtFmt | MvToInt
        | MvFromInt => 1,
    }
}

/// Checks a block against the rules of this module.
///
/// # Errors
/// The first rule broken.
pub fn verify(block: &Block) -> Result<(), VerifyError> {
    let mut v = Verifier {
        insns: 0,
        end: i32::from(block.start),
        temps: 0,
        changed: false,
        start: block.start,
        granules: block.granules,
        flagged: block.ops.iter().any(uses_flags),
    };
    if block.start >= 4096 {
        return Err(VerifyError::Block(format!("start {:#x} is not in the page (below 0x1000)", block.start)));
    }
    let Some(last) = block.ops.len().checked_sub(1) else {
        return Err(VerifyError::Block("it has no operations; at least a mark and a terminal".into()));
    };
    for (index, op) in block.ops.iter().enumerate() {
        v.op(op).map_err(|reason| VerifyError::Op { index, reason })?;
        if op.is_terminal() != (index == last) {
            let reason = if op.is_terminal() {
                format!("terminal, but {} more operations follow", last - index)
            } else {
                "the last operation must be terminal (jump, jumpreg or dispatch)".into()
            };
            return Err(VerifyError::Op { index, reason });
        }
        let next = block.ops.get(index + 1);
        if matches!(op, Op::Rep(_)) && !matches!(next, Some(Op::Call { kind: CallKind::MayExit, ret: None, .. })) {
            let reason = "rep comes right before the call of a helper that does the same".into();
            return Err(VerifyError::Op { index, reason });
        }
        if matches!(op, Op::DeadFlags { .. }) && index + 1 != last {
            let reason = "dead flags are said right before the terminal".into();
            return Err(VerifyError::Op { index, reason });
        }
    }
    if v.insns != u32::from(block.insns) {
        return Err(VerifyError::Block(format!("insns is {}, but there are {} marks", block.insns, v.insns)));
    }
    let end = i32::from(block.start) + i32::from(block.len);
    if v.end != end {
        return Err(VerifyError::Block(format!(
            "start + len is {end:#x}, but the last instruction ends at {:#x}",
            v.end
        )));
    }
    Ok(())
}

struct Verifier {
    /// Marks so far.
    insns: u32,
    /// End of the last instruction, in bytes from the page.
    end: i32,
    /// Temporaries written in this instruction: bit `i` is slot `FIRST_TEMP + i`.
    temps: u32,
    /// Whether this instruction may have changed guest state already.
    changed: bool,
    start: u16,
    granules: u64,
    /// Whether the block has operations on flags.
    flagged: bool,
}

const _: () = assert!(SLOTS - FIRST_TEMP as usize <= 32);

impl Verifier {
    fn op(&mut self, op: &Op) -> Result<(), String> {
        if let Op::Insn { pc, len } = *op {
            return self.insn(pc, len);
        }
        if self.insns == 0 {
            return Err("comes before the first instruction mark".into());
        }
        check_form(op)?;
        if let Op::GuardEnv { .. } | Op::Guard { .. } | Op::GuardFits { .. } | Op::DivWideF { .. } = op
            && self.changed
        {
            return Err("guard or division after its instruction changed something; they come first".into());
        }
        let mut reads = Ok(());
        for_each_read(op, |slot| {
            if reads.is_ok() {
                reads = self.read(slot);
            }
        });
        reads.clone()?;
        if let Op::Fp { a, b, c, .. } = *op {
            [a, b, c].into_iter().try_for_each(check_slot)?;
        }
        for_each_written(op, |slot| {
            if reads.is_ok() {
                reads = self.write(slot);
            }
        });
        reads?;
        self.changed |= has_effect(op);
        Ok(())
    }

    fn insn(&mut self, pc: PagePc, len: u8) -> Result<(), String> {
        if len == 0 || len > MAX_INSN_LEN {
            return Err(format!("instruction length {len} is not in 1..={MAX_INSN_LEN}"));
        }
        if self.insns == 0 && pc.0 != i32::from(self.start) {
            return Err(format!("first instruction at {:#x}, but the block starts at {:#x}", pc.0, self.start));
        }
        let covered = |byte: i32| (0..4096).contains(&byte) && self.granules >> (byte / 64) & 1 != 0;
        let last = pc.0 + i32::from(len) - 1;
        let before_start = last < i32::from(self.start) && covered(pc.0) && covered(last);
        if pc.0 < self.end && !before_start {
            return Err(format!("instruction at {:#x} is before the last one's end {:#x}", pc.0, self.end));
        }
        if !(0..2 * 4096).contains(&pc.0) {
            return Err(format!("instruction at {:#x} is not in the block's page nor in the next", pc.0));
        }
        self.insns += 1;
        self.end = self.end.max(pc.0 + i32::from(len));
        self.temps = 0;
        self.changed = false;
        Ok(())
    }

    fn check_slot(&self, slot: Slot) -> Result<(), String> {
        if self.flagged && slot == FLAGS {
            return Err(format!("{FLAGS} holds the flags in this block; read them with getflags"));
        }
        check_slot(slot)
    }

    fn read(&self, slot: Slot) -> Result<(), String> {
        self.check_slot(slot)?;
        if slot.0 >= FIRST_TEMP && self.temps & 1 << (slot.0 - FIRST_TEMP) == 0 {
            return Err(format!("temporary {slot} is read before its instruction writes it"));
        }
        Ok(())
    }

    fn write(&mut self, slot: Slot) -> Result<(), String> {
        self.check_slot(slot)?;
        if slot.0 >= FIRST_TEMP {
            self.temps |= 1 << (slot.0 - FIRST_TEMP);
        }
        Ok(())
    }
}

fn check_slot(slot: Slot) -> Result<(), String> {
    if usize::from(slot.0) < SLOTS { Ok(()) } else { Err(format!("slot number {} is not below {SLOTS}", slot.0)) }
}

/// What can be said about an operation by itself, slots aside.
fn check_form(op: &Op) -> Result<(), String> {
    match *op {
        Op::Alu { op, ty, .. } if !alu_type_allowed(op, ty) => Err(format!("{op:?} has no {ty:?} form")),
        Op::Un { op, ty, .. } if !un_type_allowed(op, ty) => Err(format!("{op:?} has no {ty:?} form")),
        Op::Load { ext: Ext::Ones, size, .. } if size != Size::B4 => {
            Err(format!("load of {} bytes filled with ones; only 4 bytes can be NaN-boxed", size.bytes()))
        }
        Op::LoadReserved { ext: Ext::Ones, .. } => Err("load-reserved is extended by zeros or by sign".into()),
        Op::SetEnvByte { off, .. } | Op::GuardEnv { off, .. } if off < 0 => {
            Err(format!("offset {off} into the hot state is negative"))
        }
        Op::GuardFits { bits, .. } if bits == 0 || bits > 63 => {
            Err(format!("guard of {bits} bits; 1 to 63 make sense"))
        }
        Op::GuardEnv { mask: 0, .. } => Err("guard with mask 0 never leaves; drop it".into()),
        _ => check_flag_form(op),
    }
}

/// The same for the operations of guests with flags and partial registers.
fn check_flag_form(op: &Op) -> Result<(), String> {
    let size_of = |name: &str, size: Size, least: Size| match size >= least {
        true => Ok(()),
        false => Err(format!("{name} has no form of {} bytes", size.bytes())),
    };
    match *op {
        Op::Lea { shift, .. } if shift > 3 => Err(format!("lea shifts by 0 to 3, not {shift}")),
        Op::Lea { size, .. } => size_of("lea", size, Size::B2),
        Op::SetPart { size, .. } if size > Size::B2 => {
            Err(format!("a part of a slot has 1 or 2 bytes, not {}", size.bytes()))
        }
        Op::LoadEnv { off, .. } | Op::StoreEnv { off, .. } if off < 0 => {
            Err(format!("offset {off} into the hot state is negative"))
        }
        Op::LoadEnv { ext: Ext::Ones, .. } => Err("the hot state is loaded by zeros or by sign".into()),
        Op::AluF { op, size, .. } => size_of(&format!("{op:?}"), size, least_size(op)),
        Op::ShiftDoubleF { size, .. } => size_of("a double shift", size, Size::B2),
        Op::CMovF { size, .. } => size_of("a conditional move", size, Size::B2),
        Op::MulWideF { size, lo: a, hi: b, .. } | Op::DivWideF { size, q: a, r: b, .. } => {
            if a == b && size != Size::B1 {
                return Err(format!("both results are to go to {a}"));
            }
            Ok(())
        }
        Op::SetFlags { mask, .. } | Op::FlipFlags { mask } | Op::DeadFlags { mask } => {
            if mask.is_empty() || !Flags::ALL.contains(mask) {
                return Err(format!("{:#x} is not a set of flags", mask.0));
            }
            Ok(())
        }
        Op::Unit { insn, d, a, .. } => check_unit(&insn, d, a),
        Op::BranchF { dead, .. } if !Flags::ALL.contains(dead) => Err(format!("{:#x} is not a set of flags", dead.0)),
        Op::Rmw { op, size, old, .. } => {
            if let RmwOp::F(op) = op {
                if !rmw_allowed(op) {
                    return Err(format!("{op:?} is no operation on memory"));
                }
                size_of(&format!("{op:?}"), size, least_size(op))?;
            }
            let gives_old = matches!(op, RmwOp::Swap | RmwOp::F(FlagOp::Add));
            if old.is_some() && !gives_old {
                return Err(format!("{op:?} does not give the old value"));
            }
            Ok(())
        }
        _ => Ok(()),
    }
}

/// Whether the operands are those that the instruction has.
fn check_unit(insn: &UnitInsn, d: Option<Slot>, a: Val) -> Result<(), String> {
    let writes = matches!(insn.gpr, UnitGpr::OutRm | UnitGpr::OutReg | UnitGpr::OutAx);
    if writes != d.is_some() {
        return Err(format!("the instruction writes {} general register", if writes { "a" } else { "no" }));
    }
    let memory = insn.memory != UnitMemory::None;
    if memory && !(1..=32).contains(&insn.bytes) {
        return Err(format!("a memory operand has 1 to 32 bytes, not {}", insn.bytes));
    }
    let in_place = matches!(insn.gpr, UnitGpr::InRm | UnitGpr::OutRm | UnitGpr::OutAx) || insn.bare;
    if memory && in_place {
        return Err("an instruction with a memory operand has it in place of a register".into());
    }
    if insn.aligned && !insn.bytes.is_power_of_two() {
        return Err(format!("{} bytes have no alignment", insn.bytes));
    }
    if insn.gpr == UnitGpr::InRm && !matches!(a, Val::Slot(_)) {
        return Err("the general register is a slot".into());
    }
    if !Flags::ALL.contains(insn.reads_flags) {
        return Err(format!("{:#x} is not a set of flags", insn.reads_flags.0));
    }
    Ok(())
}

/// The smallest size an operation has; it has all above.
pub const fn least_size(op: FlagOp) -> Size {
    use FlagOp::*;
    match op {
        Add | Adc | Sub | Sbb | And | Or | Xor | Neg | Not | Inc | Dec | Shl | Shr | Sar | Rol | Ror | Rcl | Rcr => {
            Size::B1
        }
        Mul | Bt | Bts | Btr | Btc | Bsf | Bsr | Popcnt | Lzcnt | Tzcnt => Size::B2,
        Andn | Bextr | Bzhi | Blsi | Blsr | Blsmsk => Size::B4,
    }
}

/// Whether an [`Op::Rmw`] may do `op`.
pub const fn rmw_allowed(op: FlagOp) -> bool {
    use FlagOp::*;
    match op {
        Add | Adc | Sub | Sbb | And | Or | Xor | Neg | Not | Inc | Dec | Shl | Shr | Sar | Rol | Ror | Rcl | Rcr
        | Bts | Btr | Btc => true,
        Andn | Mul | Bt | Bsf | Bsr | Popcnt | Lzcnt | Tzcnt | Bextr | Bzhi | Blsi | Blsr | Blsmsk => false,
    }
}

/// Whether an operation has one operand, its `b` being ignored.
pub const fn is_unary(op: FlagOp) -> bool {
    use FlagOp::*;
    matches!(op, Neg | Not | Inc | Dec | Bsf | Bsr | Popcnt | Lzcnt | Tzcnt | Blsi | Blsr | Blsmsk)
}

/// Whether an operation reads or writes the flags.
#[inline]
pub const fn uses_flags(op: &Op) -> bool {
    matches!(
        op,
        Op::AluF { .. }
            | Op::ShiftDoubleF { .. }
            | Op::MulWideF { .. }
            | Op::DivWideF { .. }
            | Op::SetCondF { .. }
            | Op::CMovF { .. }
            | Op::BranchF { .. }
            | Op::GetFlags { .. }
            | Op::SetFlags { .. }
            | Op::FlipFlags { .. }
            | Op::DeadFlags { .. }
            | Op::Rmw { .. }
    ) || matches!(op, Op::Unit { insn, .. } if insn.sets_flags || !insn.reads_flags.is_empty())
}

/// Whether a block may hold `op` with type `ty`.
pub const fn alu_type_allowed(op: AluOp, ty: Ty) -> bool {
    use AluOp::*;
    match ty {
        Ty::I64 => true,
        Ty::I32 => !is_64_bit_only(op),
        Ty::U32 => !is_64_bit_only(op) && !matches!(op, BSet | BClr | BInv | BExt),
    }
}

/// Whether a block may hold `op` with type `ty`.
pub const fn un_type_allowed(op: UnOp, ty: Ty) -> bool {
    use UnOp::*;
    matches!(ty, Ty::I64) || !matches!(op, SextW | ZextW | OrcB)
}

/// Calls `f` with each slot whose value the operation depends on (so without a floating-point operation's
/// unused operands, but with a destination that is replaced in part only).
#[inline]
pub fn for_each_read(op: &Op, mut f: impl FnMut(Slot)) {
    let mut val = |v: Val| {
        if let Val::Slot(slot) = v {
            f(slot);
        }
    };
    let keeps = |size: Size| size <= Size::B2;
    match *op {
        Op::Alu { a, b, .. } | Op::Branch { a, b, .. } | Op::Guard { a, b, .. } => {
            val(a);
            val(b);
        }
        Op::Un { a, .. } | Op::SetFlags { a, .. } | Op::GuardFits { a, .. } => val(a),
        Op::Load { base, .. } | Op::LoadReserved { base, .. } => val(base),
        Op::Store { src, base, .. }
        | Op::StoreConditional { src, base, .. }
        | Op::Amo { src, base, .. }
        | Op::Rmw { src, base, .. } => {
            val(src);
            val(base);
        }
        Op::CmpXchg { expected, new, base, .. } => [expected, new, base].into_iter().for_each(val),
        Op::Fp { op, a, b, c, .. } => [a, b, c].into_iter().take(fp_arity(op)).for_each(f),
        Op::Call { args, .. } => args.into_iter().for_each(val),
        Op::JumpReg { base, .. } | Op::GetHigh { a: base, .. } => f(base),
        Op::Lea { base, index, .. } => {
            val(base);
            val(index);
        }
        Op::SetPart { d, a, .. } | Op::SetHigh { d, a } | Op::CMovF { d, a, .. } => {
            val(d.into());
            val(a);
        }
        Op::Rep(Rep { fill, count, from, to, .. }) => {
            [count, from, to].into_iter().chain(fill).for_each(f);
        }
        Op::Unit { insn, d, a, .. } => {
            val(a);
            if insn.gpr == UnitGpr::OutAx {
                d.into_iter().for_each(f);
            }
        }
        Op::SetCondF { d, .. } => f(d),
        Op::StoreEnv { src, .. } => val(src),
        Op::TraceAccess { base, .. } => val(base),
        Op::TraceValue { value } => value.into_iter().for_each(val),
        Op::AluF { op, size, d, a, b } => {
            val(a);
            if !is_unary(op) {
                val(b);
            }
            if keeps(size) || matches!(op, FlagOp::Bsf | FlagOp::Bsr) {
                d.into_iter().for_each(f);
            }
        }
        Op::ShiftDoubleF { size, d, a, b, n, .. } => {
            [a, b, n].into_iter().for_each(&mut val);
            if keeps(size) {
                f(d);
            }
        }
        Op::MulWideF { size, lo, hi, a, b, .. } => {
            val(a);
            val(b);
            if keeps(size) {
                f(lo);
            }
            if size == Size::B2 {
                f(hi);
            }
        }
        Op::DivWideF { size, q, r, hi, lo, b, .. } => {
            val(lo);
            val(b);
            if size != Size::B1 {
                val(hi);
            }
            if keeps(size) {
                f(q);
            }
            if size == Size::B2 {
                f(r);
            }
        }
        Op::Insn { .. }
        | Op::GetPc { .. }
        | Op::Fence
        | Op::SetEnvByte { .. }
        | Op::GuardEnv { .. }
        | Op::LoadEnv { .. }
        | Op::GetFlags { .. }
        | Op::FlipFlags { .. }
        | Op::DeadFlags { .. }
        | Op::BranchF { .. }
        | Op::Jump { .. }
        | Op::Count { .. }
        | Op::TraceBlock { .. }
        | Op::Dispatch => {}
    }
}

/// Calls `f` with each slot that the operation itself writes, but for the flags. (A [`CallKind::MayExit`] helper
/// may write others.)
#[inline]
pub fn for_each_written(op: &Op, mut f: impl FnMut(Slot)) {
    match *op {
        Op::Alu { d, .. }
        | Op::Un { d, .. }
        | Op::GetPc { d, .. }
        | Op::Load { d, .. }
        | Op::LoadReserved { d, .. }
        | Op::StoreConditional { d, .. }
        | Op::Lea { d, .. }
        | Op::SetPart { d, .. }
        | Op::GetHigh { d, .. }
        | Op::SetHigh { d, .. }
        | Op::LoadEnv { d, .. }
        | Op::ShiftDoubleF { d, .. }
        | Op::SetCondF { d, .. }
        | Op::CMovF { d, .. }
        | Op::GetFlags { d }
        | Op::CmpXchg { d, .. }
        | Op::Fp { d, .. } => f(d),
        Op::AluF { op: FlagOp::Bt, .. } => {}
        Op::Amo { d, .. }
        | Op::AluF { d, .. }
        | Op::Call { ret: d, .. }
        | Op::Rmw { old: d, .. }
        | Op::Unit { d, .. } => {
            d.into_iter().for_each(f);
        }
        Op::MulWideF { size, lo: a, hi: b, .. } | Op::DivWideF { size, q: a, r: b, .. } => {
            f(a);
            if size != Size::B1 {
                f(b);
            }
        }
        Op::Rep(Rep { count, from, to, .. }) => [count, from, to].into_iter().for_each(f),
        Op::JumpReg { link, .. } => link.into_iter().for_each(|(d, _)| f(d)),
        Op::Insn { .. }
        | Op::Store { .. }
        | Op::Fence
        | Op::SetEnvByte { .. }
        | Op::GuardEnv { .. }
        | Op::Guard { .. }
        | Op::GuardFits { .. }
        | Op::StoreEnv { .. }
        | Op::SetFlags { .. }
        | Op::FlipFlags { .. }
        | Op::DeadFlags { .. }
        | Op::BranchF { .. }
        | Op::Branch { .. }
        | Op::Jump { .. }
        | Op::Count { .. }
        | Op::TraceBlock { .. }
        | Op::TraceAccess { .. }
        | Op::TraceValue { .. }
        | Op::Dispatch => {}
    }
}

/// The flags that an operation may change, and those of them that it changes whatever its operands.
pub fn flags_written(op: &Op) -> (Flags, Flags) {
    let counted = |written: Flags, size: Size, n: Val| match n {
        Val::Imm(n) if flags::count(size, n as u64) == 0 => (Flags::NONE, Flags::NONE),
        Val::Imm(_) => (written, written),
        Val::Slot(_) => (written, Flags::NONE),
    };
    match *op {
        Op::AluF { op, size, b, .. } | Op::Rmw { op: RmwOp::F(op), size, src: b, .. } => {
            let written = flags::written_by(op);
            if has_count(op) { counted(written, size, b) } else { (written, written.without(flags::kept(op))) }
        }
        Op::ShiftDoubleF { size, n, .. } => counted(Flags::ALL, size, n),
        Op::MulWideF { .. } => (Flags::ALL, Flags::ALL.without(flags::kept(FlagOp::Mul))),
        Op::DivWideF { .. } => {
            let written = Flags::ALL.without(flags::KEPT_BY_DIVISION);
            (written, written)
        }
        Op::SetFlags { mask, .. } | Op::FlipFlags { mask } => (mask, mask),
        Op::Unit { insn, .. } if insn.sets_flags => (Flags::ALL, Flags::ALL),
        _ => (Flags::NONE, Flags::NONE),
    }
}

/// Whether `op` is a shift or rotate, which leaves the flags alone if its count is zero.
pub const fn has_count(op: FlagOp) -> bool {
    use FlagOp::*;
    matches!(op, Shl | Shr | Sar | Rol | Ror | Rcl | Rcr)
}

/// The flags that an operation reads to do its work (not those that it leaves alone).
pub fn flags_read(op: &Op) -> Flags {
    match *op {
        Op::AluF { op, .. } | Op::Rmw { op: RmwOp::F(op), .. } => match op {
            FlagOp::Adc | FlagOp::Sbb | FlagOp::Rcl | FlagOp::Rcr => Flags::CF,
            _ => Flags::NONE,
        },
        Op::SetCondF { cond, .. } | Op::CMovF { cond, .. } | Op::BranchF { cond, .. } => flags::read_by(cond),
        Op::GetFlags { .. } => Flags::ALL,
        Op::FlipFlags { mask } => mask,
        Op::Unit { insn, .. } => insn.reads_flags,
        _ => Flags::NONE,
    }
}

/// Whether the guest can tell that the operation was executed.
fn has_effect(op: &Op) -> bool {
    matches!(
        op,
        Op::Store { .. }
            | Op::LoadReserved { .. }
            | Op::StoreConditional { .. }
            | Op::Amo { .. }
            | Op::Fp { .. }
            | Op::SetEnvByte { .. }
            | Op::StoreEnv { .. }
            | Op::Rmw { .. }
            | Op::CmpXchg { .. }
            | Op::Unit { .. }
            | Op::Call { kind: CallKind::MayExit, .. }
    ) || !flags_written(op).0.is_empty()
        || writes_guest_slot(op)
}

fn writes_guest_slot(op: &Op) -> bool {
    let mut guest = false;
    for_each_written(op, |d| guest |= d.0 < FIRST_TEMP);
    guest
}

#[cfg(test)]
mod tests {
    use super::*;

    const MARK: Op = Op::Insn { pc: PagePc(0x10), len: 4 };
    const JUMP: Op = Op::Jump { to: PagePc(0x14) };

    /// The error of a block of one instruction holding `ops`.
    fn error(ops: &[Op]) -> String {
        let block =
            Block { ops: [&[MARK], ops, &[JUMP]].concat(), start: 0x10, len: 4, insns: 1, narrow: false, granules: 0 };
        verify(&block).map_or_else(|e| e.to_string(), |()| String::new())
    }

    fn mov(d: Slot, a: impl Into<Val>) -> Op {
        Op::Un { op: UnOp::Mov, ty: Ty::I64, d, a: a.into() }
    }

    fn alu(op: AluOp, ty: Ty) -> Op {
        Op::Alu { op, ty, d: Slot(1), a: Val::Slot(Slot(2)), b: Val::Imm(3) }
    }

    #[test]
    fn accepts_sound_blocks() {
        assert_eq!(error(&[]), "");
        assert_eq!(error(&[mov(Slot::temp(0), 5), mov(Slot(1), Slot::temp(0))]), "");
        assert_eq!(error(&[alu(AluOp::BExt, Ty::I32), alu(AluOp::Rol, Ty::U32)]), "");
        let guard = Op::GuardEnv { off: 4, mask: 1 };
        assert_eq!(error(&[guard, mov(Slot::temp(1), 5), guard]), "");
        // An unused operand may be a temporary that was never written.
        let fp = Op::Fp {
            op: FpOp::Sqrt,
            fmt: FpFmt::F32,
            rm: Rm::Dynamic,
            d: Slot(1),
            a: Slot(2),
            b: Slot::temp(0),
            c: Slot::temp(0),
        };
        assert_eq!(error(&[fp]), "");
    }

    #[test]
    fn temporaries_and_slots() {
        let t = Slot::temp(3);
        assert_eq!(error(&[mov(Slot(1), t)]), "op 1: temporary t3 is read before its instruction writes it");
        let next = Op::Insn { pc: PagePc(0x14), len: 2 };
        let ops = vec![MARK, mov(t, 1), next, mov(Slot(1), t), JUMP];
        let block = Block { ops, start: 0x10, len: 6, insns: 2, narrow: false, granules: 0 };
        assert!(verify(&block).unwrap_err().to_string().starts_with("op 3: temporary t3"));
        assert_eq!(error(&[mov(Slot(80), 1)]), "op 1: slot number 80 is not below 80");
        assert_eq!(error(&[mov(Slot(1), Slot(255))]), "op 1: slot number 255 is not below 80");
    }

    #[test]
    fn types_and_forms() {
        assert_eq!(error(&[alu(AluOp::MulHiS, Ty::I32)]), "op 1: MulHiS has no I32 form");
        assert_eq!(error(&[alu(AluOp::Sh1Add, Ty::U32)]), "op 1: Sh1Add has no U32 form");
        assert_eq!(error(&[alu(AluOp::BSet, Ty::U32)]), "op 1: BSet has no U32 form");
        let orcb = Op::Un { op: UnOp::OrcB, ty: Ty::I32, d: Slot(1), a: Val::Imm(1) };
        assert_eq!(error(&[orcb]), "op 1: OrcB has no I32 form");
        let load = Op::Load { d: Slot(1), base: Val::Imm(0), off: 0, size: Size::B8, ext: Ext::Ones };
        assert!(error(&[load]).starts_with("op 1: load of 8 bytes filled with ones"));
        assert!(error(&[Op::GuardEnv { off: 0, mask: 0 }]).starts_with("op 1: guard with mask 0"));
        assert!(error(&[Op::SetEnvByte { off: -1, val: 0 }]).starts_with("op 1: offset -1"));
        assert!(
            error(&[mov(Slot(1), 1), Op::GuardEnv { off: 0, mask: 1 }]).starts_with("op 2: guard or division after")
        );
    }

    #[test]
    fn shape() {
        let block = |ops: &[Op], start, len, insns| {
            verify(&Block { ops: ops.to_vec(), start, len, insns, narrow: false, granules: 0 }).unwrap_err().to_string()
        };
        assert!(block(&[], 0x10, 0, 0).starts_with("block: it has no operations"));
        assert_eq!(block(&[JUMP], 0x10, 0, 0), "op 0: comes before the first instruction mark");
        assert!(block(&[MARK], 0x10, 4, 1).starts_with("op 0: the last operation must be terminal"));
        assert_eq!(block(&[MARK, JUMP, JUMP], 0x10, 4, 1), "op 1: terminal, but 1 more operations follow");
        assert_eq!(block(&[MARK, JUMP], 0x10, 4, 2), "block: insns is 2, but there are 1 marks");
        assert!(block(&[MARK, JUMP], 0x10, 6, 1).starts_with("block: start + len is 0x16"));
        assert!(block(&[MARK, JUMP], 0x14, 4, 1).starts_with("op 0: first instruction at 0x10"));
        assert!(block(&[MARK, MARK, JUMP], 0x10, 4, 2).starts_with("op 1: instruction at 0x10 is before"));
        assert!(block(&[MARK, JUMP], 0x1000, 4, 1).starts_with("block: start 0x1000"));
        let last = |pc| Op::Insn { pc: PagePc(pc), len: 4 };
        let running_on = Block {
            ops: vec![last(0xffe), last(0x1002), JUMP],
            start: 0xffe,
            len: 8,
            insns: 2,
            narrow: false,
            granules: 0,
        };
        assert_eq!(verify(&running_on), Ok(()));
        let far = [last(0xffe), last(0x1ffe), last(0x2002), JUMP];
        assert!(block(&far, 0xffe, 0x1008, 3).starts_with("op 2: instruction at 0x2002"));
        let crossing =
            Block { ops: vec![last(0xffe), JUMP], start: 0xffe, len: 4, insns: 1, narrow: false, granules: 0 };
        assert_eq!(verify(&crossing), Ok(()));
        let long = Op::Insn { pc: PagePc(0x10), len: 16 };
        assert!(block(&[long, JUMP], 0x10, 16, 1).starts_with("op 0: instruction length 16"));
    }
}
