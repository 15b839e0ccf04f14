//! Blocks that jump back to their own start: the way round gets a copy of the loop's operations.
//!
//! In the copy it is known what the way there has established: guards hold, and the flags are those of the operation that
//! the closing branch tests, computed again from its operands by whoever needs them at a fault. So they are not saved each
//! time round. The copy goes on in the block behind the branch if the state there is the same.

use super::flags::{self, FlagState, Routine};
use super::{Cold, Insn, Lower};
use crate::asm::{Cc, Fixup};
use mimus_tcg_ir::flags::Flags;
use mimus_tcg_ir::{Op, PagePc, Slot};

/// The loop of a block.
#[derive(Clone, Copy, Debug)]
pub(super) struct Loop {
    /// Index of the branch that closes it.
    pub edge: usize,
    recipe: mimus_tcg_ir::flags::Recipe,
    /// Nothing in it is called: what was guarded stays so.
    guards_hold: bool,
    /// The jump to the copy, once the branch has been lowered.
    from: Option<Fixup>,
    /// Where the copy begins, once it is being made.
    copy: Option<u32>,
    /// The operations being lowered are the copy's.
    pub in_copy: bool,
    /// What is behind the branch: where, and the state there.
    behind: Option<(u32, FlagState, Option<Slot>, u64)>,
}

/// The loop of a block that begins at `start`, if it is worth a copy.
pub(super) fn find(ops: &[Op], start: PagePc) -> Option<Loop> {
    // What counts and traces comes at the block's entry, with nothing in the host's flags.
    if ops.iter().any(Op::is_instrumentation) {
        return None;
    }
    let closes = |op: &Op| match *op {
        Op::BranchF { to, .. } | Op::Branch { to, .. } | Op::Jump { to } => to == start,
        _ => false,
    };
    let edge = ops.iter().position(closes)?;
    if !matches!(ops.get(edge), Some(Op::BranchF { .. })) || ops.iter().skip(edge + 1).any(closes) {
        return None;
    }
    let recipe = flags::around(ops.get(..edge)?)?;
    let calls = |op: &Op| matches!(op, Op::Call { .. } | Op::Rep(_));
    let guards_hold = !ops.iter().take(edge).any(calls);
    Some(Loop { edge, recipe, guards_hold, from: None, copy: None, in_copy: false, behind: None })
}

impl Lower<'_> {
    /// Whether the branch being lowered closes the block's loop.
    fn closes_loop(&self) -> bool {
        self.looped.is_some_and(|l| l.edge + 1 == self.next)
    }

    /// The branch that closes the loop, taken if the host's flags are so. `false`: it is another one.
    pub(super) fn loop_branch(&mut self, cc: Cc, to: PagePc, dead: Flags) -> bool {
        if !self.closes_loop() {
            return false;
        }
        let over = self.asm.jcc_short(cc.invert());
        self.test_kick();
        if let Some(l) = &mut self.looped {
            match l.copy {
                Some(at) => self.asm.jcc_back(Cc::E, at),
                None => l.from = Some(self.asm.jcc(Cc::E)),
            }
        }
        let from = self.asm.jmp();
        let flags = self.flags_at_exit(dead);
        self.cold.push(Cold::Kick { from, to, flags });
        self.asm.bind_short(over);
        true
    }

    /// After operation `index`: remembers what is behind the closing branch.
    pub(super) fn note_loop_end(&mut self, index: usize) {
        let (at, flags, cached, boxed) = (self.asm.pos(), self.flags, self.cached, self.boxed);
        if let Some(l) = self.looped.as_mut().filter(|l| l.edge == index && l.behind.is_none()) {
            l.behind = Some((at, flags, cached, boxed));
        }
    }

    /// Whether a guard of the vector unit is known to hold.
    pub(super) fn guarded_by_loop(&self) -> bool {
        self.looped.is_some_and(|l| l.in_copy && l.guards_hold)
    }

    /// The copy, behind the block.
    pub(super) fn copy_loop(&mut self) {
        let Some(Loop { edge, recipe, from: Some(from), behind: Some(behind), .. }) = self.looped else { return };
        let at = self.asm.pos();
        self.asm.bind(from);
        if let Some(l) = &mut self.looped {
            (l.copy, l.in_copy) = (Some(at), true);
        }
        self.insn = Insn { pc: self.start, len: 0, left: 0 };
        (self.cached, self.last, self.group, self.boxed) = (None, None, None, 0);
        (self.kept, self.skip) = (false, 0);
        self.flags = FlagState::carried(recipe);
        for i in 0..=edge {
            self.lower_at(i);
        }
        let (target, flags, cached, boxed) = behind;
        if self.flags.is_like(&flags) && self.cached == cached && self.boxed == boxed {
            self.asm.jmp_back(target);
        } else {
            for i in edge + 1..self.ops.len() {
                self.lower_at(i);
            }
        }
        if let Some(l) = &mut self.looped {
            l.in_copy = false;
        }
    }

    /// The routine that saves the flags if they are not in their slot, where the block is left for code that looks at all
    /// but `dead`.
    fn flags_at_exit(&mut self, dead: Flags) -> Routine {
        self.flags_wanted_in_slot(Flags::ALL.without(dead))
    }
}
