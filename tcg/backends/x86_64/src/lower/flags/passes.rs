//! Which flags are needed: passes over operations from the last to the first.

use super::{Needs, Own};
use mimus_tcg_ir::Op;
use mimus_tcg_ir::flags::Flags;
use std::ops::Range;

/// The flags needed after each operation of a block, to `all`, which is empty; none if it has nothing to do with flags.
/// `edge`: index of a branch that closes a loop, where they need not be in their slot (see [`super::super::loops`]).
pub(in super::super) fn needs(ops: &[Op], edge: Option<usize>, all: &mut Vec<Needs>) {
    needs_but_for(ops, edge, |_| false, all);
}

/// The same where the operations whose index is `safe` are known not to fault.
pub(in super::super) fn needs_but_for(
    ops: &[Op],
    edge: Option<usize>,
    safe: impl Fn(usize) -> bool,
    all: &mut Vec<Needs>,
) {
    if !ops.iter().any(mimus_tcg_ir::verify::uses_flags) {
        return;
    }
    all.resize(ops.len(), Needs::default());
    let mut now = Needs::default();
    let mut after = None;
    for (i, (op, place)) in ops.iter().zip(all).enumerate().rev() {
        let mut own = Own::of(op, after);
        if own.is(Own::FAULTS) && safe(i) {
            own.0 &= !Own::FAULTS;
        }
        *place = Needs { own, ..now };
        now = place.before(op, Some(i) == edge);
        after = Some(op);
    }
}

/// What `needs` says of operations `of`, where those whose index is `safe` do not fault and leave the host's flags alone.
pub(in super::super) fn needs_in_stretch(
    ops: &[Op],
    of: Range<usize>,
    safe: impl Fn(usize) -> bool,
    needs: &[Needs],
) -> Vec<Needs> {
    let mut found = needs.get(of.clone()).unwrap_or_default().to_vec();
    let ops = ops.get(of.clone()).unwrap_or_default();
    let Some(mut now) = found.last().copied() else { return found };
    for (i, (op, place)) in of.zip(ops.iter().zip(&mut found)).rev() {
        let mut own = place.own;
        if safe(i) {
            own.0 = own.0 & !Own::FAULTS | Own::KEEPS_HOST;
        }
        *place = Needs { own, ..now };
        now = place.before(op, false);
    }
    found
}

impl Needs {
    /// Which are needed before the operation. `edge`: it closes a loop.
    fn before(self, op: &Op, edge: bool) -> Needs {
        let Needs { own, .. } = self;
        let (mut hard, mut soft) = (self.hard.without(own.must()), self.soft.without(own.must()));
        hard = match op {
            // Where it leads is the terminal's doing, but what is dead there is said here.
            Op::DeadFlags { .. } => own.in_slot(),
            _ if edge => hard.union(own.reads()),
            _ => hard.union(own.reads()).union(own.in_slot()),
        };
        if edge || own.is(Own::FAULTS) {
            soft = Flags::ALL;
        }
        Needs { hard, soft, ..Needs::default() }
    }
}
