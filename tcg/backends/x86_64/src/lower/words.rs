//! Words that a loop extends again each time round: compilers for RISC-V extend variables of 32 bits where they go from one
//! register to another, also such as have been extended at the end of the round before. In the copy of a loop, which is entered from
//! the loop's own end alone, it is known what they are.

use mimus_tcg_ir::verify::for_each_written;
use mimus_tcg_ir::{AluOp, Ext, Op, Size, Slot, Ty, UnOp, Val};

/// A bit for each slot.
type Slots = u128;

fn bit(slot: Slot) -> Slots {
    1u128.checked_shl(slot.0.into()).unwrap_or(0)
}

/// The operations, by index, that extend what is extended already, in all rounds of the loop `body` but the first.
pub(super) fn extended_already(body: &[Op]) -> Vec<usize> {
    let mut words: Slots = 0;
    for op in body {
        step(&mut words, op);
    }
    let mut found = Vec::new();
    for (i, op) in body.iter().enumerate() {
        if matches!(*op, Op::Un { op: UnOp::SextW, ty: Ty::I64, a: Val::Slot(a), .. } if words & bit(a) != 0) {
            found.push(i);
        }
        step(&mut words, op);
    }
    found
}

/// Goes past an operation.
fn step(words: &mut Slots, op: &Op) {
    let word = gives_word(*words, op);
    for_each_written(op, |d| *words = if word { *words | bit(d) } else { *words & !bit(d) });
}

/// Whether an operation's result is a sign-extended word.
fn gives_word(words: Slots, op: &Op) -> bool {
    let is_word = |val: Val| match val {
        Val::Imm(imm) => i64::from(imm as i32) == imm,
        Val::Slot(slot) => words & bit(slot) != 0,
    };
    match *op {
        Op::Alu { ty: Ty::I32, op, .. } => !mimus_tcg_ir::interp::is_64_bit_only(op),
        Op::Alu { op, ty: Ty::I64, a, b, .. } => match op {
            AluOp::SetLtS | AluOp::SetLtU => true,
            AluOp::And if matches!(b, Val::Imm(0..=0x7fff_ffff)) => true,
            AluOp::And | AluOp::Or | AluOp::Xor => is_word(a) && is_word(b),
            AluOp::Shr => matches!(b, Val::Imm(33..=63)),
            AluOp::Sar => matches!(b, Val::Imm(32..=63)),
            _ => false,
        },
        Op::Un { op: UnOp::SextB | UnOp::SextH | UnOp::SextW, ty: Ty::I64 | Ty::I32, .. } => true,
        Op::Un { op: UnOp::ZextB | UnOp::ZextH, ty: Ty::I64, .. } => true,
        Op::Un { op: UnOp::Mov, ty: Ty::I64, a, .. } => is_word(a),
        Op::Load { size: Size::B1 | Size::B2, ext, .. } => ext != Ext::Ones,
        Op::Load { size: Size::B4, ext, .. } => ext == Ext::Sign,
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sext(d: u8, a: u8) -> Op {
        Op::Un { op: UnOp::SextW, ty: Ty::I64, d: Slot(d), a: Slot(a).into() }
    }

    fn add(ty: Ty, d: u8, a: u8, b: i64) -> Op {
        Op::Alu { op: AluOp::Add, ty, d: Slot(d), a: Slot(a).into(), b: Val::Imm(b) }
    }

    #[test]
    fn what_a_round_leaves_extended_is_so_in_the_next() {
        let body = [sext(2, 1), sext(3, 2), add(Ty::I32, 1, 4, 1), add(Ty::I64, 4, 2, 1)];
        assert_eq!(extended_already(&body), [0, 1]);
        let body = [sext(2, 1), sext(3, 4), add(Ty::I32, 1, 4, 1), add(Ty::I64, 1, 1, 1)];
        assert_eq!(extended_already(&body), [], "the last write counts");
    }

    #[test]
    fn a_move_from_round_to_round_is_no_reason_by_itself() {
        let mov = |d: u8, a: u8| Op::Un { op: UnOp::Mov, ty: Ty::I64, d: Slot(d), a: Slot(a).into() };
        assert_eq!(extended_already(&[sext(3, 1), mov(1, 2), mov(2, 1)]), []);
        // Known behind the first round, whatever was there before it.
        assert_eq!(extended_already(&[sext(3, 1), mov(1, 2), sext(2, 4)]), []);
        assert_eq!(extended_already(&[mov(1, 2), sext(3, 1), sext(2, 4)]), [1]);
    }
}
