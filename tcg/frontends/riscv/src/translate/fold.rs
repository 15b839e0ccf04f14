//! What is known of integer registers inside a block, and what that saves: the base instruction set has no
//! zero-extension of words, no scaled addition and no rotation, so that compilers make them of several instructions,
//! and extends words that are extended already.

use super::Translator;
use mimus_tcg_ir::verify::{for_each_read, for_each_written};
use mimus_tcg_ir::{AluOp, CallKind, Ext, Op, Size, Slot, Ty, UnOp, Val};

const REGISTERS: usize = 32;

/// A register that was computed by a shift by a constant; by 0: it was not.
#[derive(Clone, Copy, Default)]
struct Shifted {
    of: u8,
    /// [`Known::versions`] of that register.
    version: u16,
    left: bool,
    by: u8,
    word: bool,
}

/// What is known of integer registers.
#[derive(Clone, Default)]
pub(super) struct Known {
    /// Those that hold a sign-extended word, a bit each.
    words: u32,
    /// How often each has been written.
    versions: [u16; REGISTERS],
    shifts: [Shifted; REGISTERS],
    /// Some shifts have been made a rotation: they may be of no use any more.
    rotates: bool,
    /// Some results have been extended, perhaps for nobody.
    extends: bool,
}

impl Known {
    /// An operation is about to be emitted.
    #[inline]
    pub(super) fn note(&mut self, op: &Op) {
        if let Op::Insn { .. } = op {
            return;
        }
        if let Op::Call { kind: CallKind::MayExit, .. } = op {
            (self.words, self.shifts) = (0, Default::default());
        }
        let (word, shift) = (self.gives_word(op), self.shift_of(op));
        self.extends |= matches!(op, Op::Alu { ty: Ty::I32, .. } | Op::Un { op: UnOp::SextW, .. });
        for_each_written(op, |slot| {
            let n = usize::from(slot.0);
            if let (Some(version), Some(place)) = (self.versions.get_mut(n), self.shifts.get_mut(n)) {
                *version = version.wrapping_add(1);
                *place = shift;
                self.words = self.words & !(1 << n) | u32::from(word) << n;
            }
        });
    }

    /// Whether a value is a sign-extended word.
    pub(super) fn is_word(&self, val: Val) -> bool {
        match val {
            Val::Imm(imm) => i64::from(imm as i32) == imm,
            Val::Slot(slot) => usize::from(slot.0) < REGISTERS && self.words >> slot.0 & 1 != 0,
        }
    }

    /// Whether the operation's result is a sign-extended word.
    fn gives_word(&self, op: &Op) -> bool {
        match *op {
            Op::Alu { ty: Ty::I32, .. } | Op::Un { ty: Ty::I32, .. } => true,
            Op::Alu { op, a, b, .. } => match op {
                AluOp::SetLtS | AluOp::SetLtU => true,
                AluOp::And | AluOp::Or | AluOp::Xor if self.is_word(a) && self.is_word(b) => true,
                AluOp::And => matches!(b, Val::Imm(0..=0x7fff_ffff)),
                AluOp::Shr => matches!(b, Val::Imm(33..=63)),
                AluOp::Sar => matches!(b, Val::Imm(32..=63)),
                _ => false,
            },
            Op::Un { op, a, .. } => match op {
                UnOp::Mov => self.is_word(a),
                UnOp::SextB | UnOp::SextH | UnOp::SextW | UnOp::ZextB | UnOp::ZextH => true,
                _ => false,
            },
            Op::Load { size, ext, .. } => match size {
                Size::B1 | Size::B2 => ext != Ext::Ones,
                Size::B4 => ext == Ext::Sign,
                Size::B8 => false,
            },
            Op::StoreConditional { .. } => true,
            _ => false,
        }
    }

    fn shift_of(&self, op: &Op) -> Shifted {
        let Op::Alu { op: alu @ (AluOp::Shl | AluOp::Shr), ty, a: Val::Slot(of), b: Val::Imm(by), .. } = *op else {
            return Shifted::default();
        };
        let (word, bits) = (ty == Ty::I32, if ty == Ty::I32 { 32 } else { 64 });
        match self.versions.get(usize::from(of.0)) {
            Some(&version) if (1..bits).contains(&by) => {
                Shifted { of: of.0, version, left: alu == AluOp::Shl, by: by as u8, word }
            }
            _ => Shifted::default(),
        }
    }

    /// If `a | b` is a register, as it still is, rotated to the right: which, by how much, and as what.
    fn rotation(&self, a: Slot, b: Slot) -> Option<(Slot, u8, Ty)> {
        let (x, y) = (self.shifts.get(usize::from(a.0))?, self.shifts.get(usize::from(b.0))?);
        let (left, right) = if x.left { (x, y) } else { (y, x) };
        let bits = if left.word { 32 } else { 64 };
        let same = left.left
            && !right.left
            && (left.of, left.version, left.word) == (right.of, right.version, right.word)
            && self.versions.get(usize::from(left.of)) == Some(&left.version);
        let whole = right.by != 0 && left.by + right.by == bits;
        (same && whole).then_some((Slot(left.of), right.by, if left.word { Ty::I32 } else { Ty::I64 }))
    }
}

impl Translator<'_> {
    /// `rd = a op b` in fewer operations, with what is known of `a` and `b`. `false`: nothing was done.
    pub(super) fn fold(&mut self, op: AluOp, ty: Ty, rd: i32, a: Val, b: Val) -> bool {
        let d = Slot(rd as u8);
        match (op, ty, a, b) {
            (AluOp::Or, Ty::I64, Val::Slot(x), Val::Slot(y)) => {
                let Some((of, by, ty)) = self.known.rotation(x, y) else { return false };
                let d = self.dest(rd);
                self.emit(Op::Alu { op: AluOp::Ror, ty, d, a: of.into(), b: Val::Imm(by.into()) });
                self.known.rotates = true;
                true
            }
            (AluOp::Shr, Ty::I64, Val::Slot(x), Val::Imm(right @ 1..=32)) if x == d => {
                let Some((of, 32)) = self.shifted_before(d) else { return false };
                self.drop_shift();
                self.emit(Op::Un { op: UnOp::ZextW, ty: Ty::I64, d, a: of });
                if right < 32 {
                    let by = Val::Imm(32 - right);
                    self.emit(Op::Alu { op: AluOp::Shl, ty: Ty::I64, d, a: d.into(), b: by });
                }
                true
            }
            (AluOp::Add, Ty::I64, Val::Slot(x), Val::Slot(y)) if (x == d) != (y == d) => {
                let op = match self.shifted_before(d) {
                    Some((_, 1)) => AluOp::Sh1Add,
                    Some((_, 2)) => AluOp::Sh2Add,
                    Some((_, 3)) => AluOp::Sh3Add,
                    _ => return false,
                };
                let Some((of, _)) = self.shifted_before(d) else { return false };
                self.drop_shift();
                let other = if x == d { b } else { a };
                self.emit(Op::Alu { op, ty: Ty::I64, d, a: of, b: other });
                true
            }
            _ => false,
        }
    }

    /// If the instruction before this one shifted something left to `d`: what, and by how much.
    fn shifted_before(&self, d: Slot) -> Option<(Val, i64)> {
        match self.block.ops[..] {
            [.., Op::Alu { op: AluOp::Shl, ty: Ty::I64, d: to, a, b: Val::Imm(by) }, Op::Insn { .. }] if to == d => {
                Some((a, by))
            }
            _ => None,
        }
    }

    /// Drops the operation of [`Translator::shifted_before`], whose result this instruction overwrites.
    fn drop_shift(&mut self) {
        let at = self.block.ops.len().saturating_sub(2);
        self.block.ops.remove(at);
    }

    /// At the block's end: drops what computes results that are overwritten before anything reads them or may leave the block,
    /// and does not extend words of which only the low half is read until then.
    pub(super) fn drop_dead(&mut self) {
        if !self.known.rotates && !self.known.extends {
            return;
        }
        // Slots whose values matter, and those of which the upper half does, a bit each; temporaries always do.
        let (mut live, mut upper) = (u64::MAX, u64::MAX);
        let bit = |slot: Slot| 1u64.checked_shl(slot.0.into()).unwrap_or(0);
        let mut at = self.block.ops.len();
        while at > 0 {
            at -= 1;
            let Some(op) = self.block.ops.get_mut(at) else { break };
            let d = match *op {
                Op::Insn { .. } => continue,
                Op::Alu { d, .. } | Op::Un { d, .. } | Op::GetPc { d, .. } => d,
                _ => {
                    (live, upper) = (u64::MAX, u64::MAX);
                    continue;
                }
            };
            if bit(d) != 0 && live & bit(d) == 0 {
                self.block.ops.remove(at);
                continue;
            }
            let whole = bit(d) == 0 || upper & bit(d) != 0;
            if !whole {
                *op = without_upper_half(*op);
            }
            live &= !bit(d);
            upper &= !bit(d);
            let reads_whole = reads_upper_half(op, whole);
            for_each_read(op, |slot| {
                live |= bit(slot);
                upper |= if reads_whole { bit(slot) } else { 0 };
            });
        }
    }
}

/// An operation that gives the same low half, for less.
fn without_upper_half(op: Op) -> Op {
    match op {
        Op::Alu { op: alu @ (AluOp::Add | AluOp::Sub | AluOp::Mul), ty: Ty::I32, d, a, b } => {
            Op::Alu { op: alu, ty: Ty::I64, d, a, b }
        }
        Op::Alu { op: AluOp::Shl, ty: Ty::I32, d, a, b: Val::Imm(by) } => {
            Op::Alu { op: AluOp::Shl, ty: Ty::I64, d, a, b: Val::Imm(by & 31) }
        }
        Op::Alu { op: alu @ (AluOp::Shl | AluOp::Shr | AluOp::Rol | AluOp::Ror), ty: Ty::I32, d, a, b } => {
            Op::Alu { op: alu, ty: Ty::U32, d, a, b }
        }
        Op::Un { op: UnOp::SextW | UnOp::ZextW, d, a, .. } => Op::Un { op: UnOp::Mov, ty: Ty::I64, d, a },
        other => other,
    }
}

/// Whether it extends a byte or a part of a word.
fn is_extension(op: UnOp) -> bool {
    use UnOp::{SextB, SextH, SextW, ZextB, ZextH, ZextW};
    matches!(op, SextB | SextH | SextW | ZextB | ZextH | ZextW)
}

/// Whether an operation's result, or its low half if that is all that matters, depends on the upper halves of operands.
fn reads_upper_half(op: &Op, whole: bool) -> bool {
    match *op {
        Op::Alu { op: AluOp::And, b: Val::Imm(0..=0xffff_ffff), .. } => false,
        // Words are made of words.
        Op::Alu { op, ty: Ty::I32 | Ty::U32, .. } => mimus_tcg_ir::interp::is_64_bit_only(op),
        Op::Alu { op: AluOp::Add | AluOp::Sub | AluOp::Mul | AluOp::And | AluOp::Or | AluOp::Xor, .. } => whole,
        Op::Alu { op: AluOp::Shl, b: Val::Imm(_), .. } => whole,
        Op::Un { op, .. } if op != UnOp::Mov => !is_extension(op),
        Op::Un { op: UnOp::Mov, ty: Ty::I64, .. } => whole,
        _ => true,
    }
}
