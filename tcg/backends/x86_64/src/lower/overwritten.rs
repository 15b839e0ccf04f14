//! Values of the guest's registers that nobody can see: overwritten a few operations on, and read from `rax` until then. Registers
//! without one of the host's are temporaries of hashes and the like; storing each step of theirs costs as much as the steps.

use super::{Lower, reads, writes};
use mimus_tcg_ir::{FIRST_TEMP, Op, Slot};

/// Slots of whole numbers; others may have vector registers besides their memory.
const WHOLE: u8 = 32;
/// Operations that are looked at.
const AHEAD: usize = 12;

impl Lower<'_> {
    /// Whether temporary `d`, now in `rax`, is read by the next operation that has to do with it, or with `rax`, from
    /// there and never again, so that its memory need not be written. Temporaries die with their guest instruction.
    pub(super) fn dies_at_next(&self, d: Slot) -> bool {
        if d.0 < FIRST_TEMP {
            return self.is_overwritten(d);
        }
        let Some(mut rest) = self.ops.get(self.next..) else {
            return false;
        };
        let next = loop {
            let Some((next, after)) = rest.split_first() else {
                return false;
            };
            rest = after;
            let index = self.ops.len() - rest.len() - 1;
            if self.puts_check_off(index) || self.flagged && matches!(next, Op::Guard { .. }) {
                continue;
            }
            if let Op::GetPc { .. } = next
                && let Some(push) = self.push_at(index)
                && !self.ops.iter().take(push.store).skip(index).any(|op| writes(op, d))
            {
                rest = self.ops.get(push.store + 1..).unwrap_or_default();
                continue;
            }
            if !self.keeps_rax(next) || reads(next, d) || writes(next, d) {
                break next;
            }
        };
        let index = self.ops.len() - rest.len() - 1;
        // What saves flags clobbers it.
        if !self.reads_from_rax(index, next, d) || (self.next..=index).contains(&self.flags.save_before()) {
            return false;
        }
        if next.is_terminal() || writes(next, d) {
            return true;
        }
        for op in rest {
            if matches!(op, Op::Insn { .. }) {
                return true;
            }
            if reads(op, d) {
                return false;
            }
        }
        true
    }

    /// Whether slot `d` of the guest, now in `rax`, is read from there alone until it is overwritten, and nothing between may leave
    /// the block or look at it, so that its memory need not be written. In hot code, where it is worth looking for.
    pub(super) fn is_overwritten(&self, d: Slot) -> bool {
        // Guests without flags gain nothing.
        if !(self.flagged && self.info.hints.hot) || d.0 >= WHOLE {
            return false;
        }
        // Its flags may be computed again from its result.
        if self.ops.get(self.next.wrapping_sub(1)).is_none_or(|op| self.flags_wanted(op)) {
            return false;
        }
        let mut in_rax = true;
        for (index, op) in self.ops.iter().enumerate().skip(self.next).take(AHEAD) {
            // What saves flags clobbers it.
            in_rax &= index != self.flags.save_before();
            match op {
                Op::Insn { .. } | Op::DeadFlags { .. } => continue,
                Op::Alu { .. } | Op::AluF { .. } | Op::Un { .. } | Op::Lea { .. } => {}
                _ => return false,
            }
            if reads(op, d) && !(in_rax && self.reads_from_rax(index, op, d)) {
                return false;
            }
            if writes(op, d) {
                return true;
            }
            in_rax &= self.keeps_rax(op);
        }
        false
    }
}
