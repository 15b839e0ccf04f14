//! The rules a block obeys, and the check of them.
//!
//! A frontend's block must pass [`verify`], and a backend may rely on that.
//!
//! * The first operation is an [`Op::Insn`] mark; the last one is terminal, and no other is.
//! * `insns` is the number of marks, at least 1. Marks ascend without overlap from `start`, each in the
//!   block's page, each of 1 to [`MAX_INSN_LEN`] bytes; the last instruction ends at `start + len`, so it alone
//!   may reach into the next page.
//! * Slots are below [`SLOTS`]. A temporary is written before it is read, within its guest instruction.
//! * Operations that exist at 64 bits only have type `I64`: [`is_64_bit_only`] ones, and `SextW`, `ZextW`,
//!   `Bswap` and `OrcB`. `BSet`, `BClr`, `BInv` and `BExt` have `I64` or `I32`.
//! * [`Ext::Ones`] is for plain loads of 4 bytes (a single to be NaN-boxed).
//! * A floating-point operation names three slots, of which it uses [`fp_arity`]: the others must be valid, but
//!   may hold anything.
//! * A [`Op::GuardEnv`] comes before anything its instruction changes (temporaries aside), since nothing of it
//!   may have happened when the block is left; its mask is not 0. Offsets into the hot state are not negative.

use crate::interp::is_64_bit_only;
use crate::op::*;

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
    let mut v = Verifier { insns: 0, end: i32::from(block.start), temps: 0, changed: false, start: block.start };
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
        if let Op::GuardEnv { .. } = op
            && self.changed
        {
            return Err("guard after its instruction changed something; guards come first".into());
        }
        let mut reads = Ok(());
        for_each_read(op, |slot| {
            if reads.is_ok() {
                reads = self.read(slot);
            }
        });
        reads?;
        if let Op::Fp { a, b, c, .. } = *op {
            [a, b, c].into_iter().try_for_each(check_slot)?;
        }
        if let Some(d) = written(op) {
            self.write(d)?;
        }
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
        if pc.0 < self.end {
            return Err(format!("instruction at {:#x} is before the last one's end {:#x}", pc.0, self.end));
        }
        if !pc.same_page() {
            return Err(format!("instruction at {:#x} is not in the block's page", pc.0));
        }
        self.insns += 1;
        self.end = pc.0 + i32::from(len);
        self.temps = 0;
        self.changed = false;
        Ok(())
    }

    fn read(&self, slot: Slot) -> Result<(), String> {
        check_slot(slot)?;
        if slot.0 >= FIRST_TEMP && self.temps & 1 << (slot.0 - FIRST_TEMP) == 0 {
            return Err(format!("temporary {slot} is read before its instruction writes it"));
        }
        Ok(())
    }

    fn write(&mut self, slot: Slot) -> Result<(), String> {
        check_slot(slot)?;
        if slot.0 >= FIRST_TEMP {
            self.temps |= 1 << (slot.0 - FIRST_TEMP);
        }
        Ok(())
    }
}

fn check_slot(slot: Slot) -> Result<(), String> {
    if usize::from(slot.0) < SLOTS {
        Ok(())
    } else {
        Err(format!("slot number {} is not below {SLOTS}", slot.0))
    }
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
        Op::GuardEnv { mask: 0, .. } => Err("guard with mask 0 never leaves; drop it".into()),
        _ => Ok(()),
    }
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
    matches!(ty, Ty::I64) || !matches!(op, SextW | ZextW | Bswap | OrcB)
}

/// Calls `f` with each slot whose value the operation depends on (so without a floating-point operation's
/// unused operands).
pub fn for_each_read(op: &Op, mut f: impl FnMut(Slot)) {
    let mut val = |v: Val| {
        if let Val::Slot(slot) = v {
            f(slot);
        }
    };
    match *op {
        Op::Alu { a, b, .. } | Op::Branch { a, b, .. } => {
            val(a);
            val(b);
        }
        Op::Un { a, .. } => val(a),
        Op::Load { base, .. } | Op::LoadReserved { base, .. } => val(base),
        Op::Store { src, base, .. } | Op::StoreConditional { src, base, .. } | Op::Amo { src, base, .. } => {
            val(src);
            val(base);
        }
        Op::Fp { op, a, b, c, .. } => [a, b, c].into_iter().take(fp_arity(op)).for_each(f),
        Op::Call { args, .. } => args.into_iter().for_each(val),
        Op::JumpReg { base, .. } => f(base),
        Op::Insn { .. }
        | Op::GetPc { .. }
        | Op::Fence
        | Op::SetEnvByte { .. }
        | Op::GuardEnv { .. }
        | Op::Jump { .. }
        | Op::Dispatch => {}
    }
}

/// The slot the operation itself writes, if any. (A [`CallKind::MayExit`] helper may write others.)
pub fn written(op: &Op) -> Option<Slot> {
    match *op {
        Op::Alu { d, .. }
        | Op::Un { d, .. }
        | Op::GetPc { d, .. }
        | Op::Load { d, .. }
        | Op::LoadReserved { d, .. }
        | Op::StoreConditional { d, .. }
        | Op::Fp { d, .. } => Some(d),
        Op::Amo { d, .. } => d,
        Op::Call { ret, .. } => ret,
        Op::JumpReg { link, .. } => link.map(|(d, _)| d),
        Op::Insn { .. }
        | Op::Store { .. }
        | Op::Fence
        | Op::SetEnvByte { .. }
        | Op::GuardEnv { .. }
        | Op::Branch { .. }
        | Op::Jump { .. }
        | Op::Dispatch => None,
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
            | Op::Call { kind: CallKind::MayExit, .. }
    ) || written(op).is_some_and(|d| d.0 < FIRST_TEMP)
}

#[cfg(test)]
mod tests {
    use super::*;

    const MARK: Op = Op::Insn { pc: PagePc(0x10), len: 4 };
    const JUMP: Op = Op::Jump { to: PagePc(0x14) };

    /// The error of a block of one instruction holding `ops`.
    fn error(ops: &[Op]) -> String {
        let block = Block { ops: [&[MARK], ops, &[JUMP]].concat(), start: 0x10, len: 4, insns: 1 };
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
        let block = Block { ops, start: 0x10, len: 6, insns: 2 };
        assert!(verify(&block).unwrap_err().to_string().starts_with("op 3: temporary t3"));
        assert_eq!(error(&[mov(Slot(80), 1)]), "op 1: slot number 80 is not below 80");
        assert_eq!(error(&[mov(Slot(1), Slot(255))]), "op 1: slot number 255 is not below 80");
    }

    #[test]
    fn types_and_forms() {
        assert_eq!(error(&[alu(AluOp::MulHiS, Ty::I32)]), "op 1: MulHiS has no I32 form");
        assert_eq!(error(&[alu(AluOp::Sh1Add, Ty::U32)]), "op 1: Sh1Add has no U32 form");
        assert_eq!(error(&[alu(AluOp::BSet, Ty::U32)]), "op 1: BSet has no U32 form");
        let bswap = Op::Un { op: UnOp::Bswap, ty: Ty::I32, d: Slot(1), a: Val::Imm(1) };
        assert_eq!(error(&[bswap]), "op 1: Bswap has no I32 form");
        let load = Op::Load { d: Slot(1), base: Val::Imm(0), off: 0, size: Size::B8, ext: Ext::Ones };
        assert!(error(&[load]).starts_with("op 1: load of 8 bytes filled with ones"));
        assert!(error(&[Op::GuardEnv { off: 0, mask: 0 }]).starts_with("op 1: guard with mask 0"));
        assert!(error(&[Op::SetEnvByte { off: -1, val: 0 }]).starts_with("op 1: offset -1"));
        assert!(error(&[mov(Slot(1), 1), Op::GuardEnv { off: 0, mask: 1 }]).starts_with("op 2: guard after"));
    }

    #[test]
    fn shape() {
        let block = |ops: &[Op], start, len, insns| {
            verify(&Block { ops: ops.to_vec(), start, len, insns }).unwrap_err().to_string()
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
        assert!(block(&[last(0xffe), last(0x1002), JUMP], 0xffe, 8, 2).starts_with("op 1: instruction at 0x1002"));
        let crossing = Block { ops: vec![last(0xffe), JUMP], start: 0xffe, len: 4, insns: 1 };
        assert_eq!(verify(&crossing), Ok(()));
        let long = Op::Insn { pc: PagePc(0x10), len: 16 };
        assert!(block(&[long, JUMP], 0x10, 16, 1).starts_with("op 0: instruction length 16"));
    }
}
