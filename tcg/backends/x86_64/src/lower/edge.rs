//! Jumps of a hot block back to its own start that do what the block begins with themselves, where they have at hand what the
//! block would have to get again.
//!
//! Compilers enter many loops in the middle, so that the first instruction tests flags which the last has set: through their
//! slot, that is a store and a load in the loop's chain. The jump does such an instruction ([`Head::first`]) from the
//! host's flags, and goes on behind it.
//!
//! In a loop that follows pointers, what is loaded first is often in the page of what was loaded last (a node's link beside
//! its key). Where accesses look their pages up, the jump also does what computes the first load's address, finds out
//! whether it is in that page, and goes on with what is added to addresses of it. So the address does not wait for another
//! look-up.

use super::flags::{FlagState, Routine};
use super::loops::Homed;
use super::mem::Address;
use super::{Cold, Lower, writes};
use crate::asm::{Alu, Cc, R14, R15, Rm, fits32};
use dynasm::dynasm;
use dynasmrt::DynasmApi;
use mimus_tcg_ir::backend::Optimise;
use mimus_tcg_ir::verify::flags_read;
use mimus_tcg_ir::{AluOp, Op, Slot, Ty, UnOp, Val};

/// Operations that a jump may do at most.
const MAX_OPS: usize = 12;
/// Offsets of accesses are smaller.
const MAX_OFF: u32 = 1 << 20;

/// What the block begins with.
#[derive(Clone, Copy, Debug)]
pub(super) struct Head {
    /// Index of the second instruction, if the first tests flags; else 0.
    first: usize,
    /// Where it begins in the code.
    at: Option<u32>,
    /// What is in between makes the address of this load, if it is not 0.
    load: usize,
    /// Where that looks its page up, and where it is made then.
    look_up: u32,
    access: Option<u32>,
}

/// The page that was looked up last: its addend is in `r14`, or 0 if the access was served otherwise.
#[derive(Clone, Copy, Debug)]
pub(super) struct Page {
    /// An address in it: a slot in a register and an offset.
    base: (Slot, u8),
    off: i32,
    /// What has been added to the slot since.
    added: Option<(Slot, u8)>,
    /// The access's cold code.
    cold: usize,
}

impl Lower<'_> {
    /// Looks for what a jump to the block's start may do.
    pub(super) fn find_head(&mut self) {
        let config = &self.be.config;
        let hot = self.info.hints.hot || config.optimise == Optimise::Forced;
        if !hot || self.compact || self.looped.is_some() || config.optimise == Optimise::Off || !self.start.same_page()
        {
            return;
        }
        let start = self.start;
        let closes = |op: &Op| matches!(*op, Op::BranchF { to, .. } | Op::Branch { to, .. } if to == start);
        if !self.ops.iter().any(closes) || self.ops.iter().any(Op::is_instrumentation) {
            return;
        }
        let first = self.first_tests_flags().unwrap_or(0);
        let load = self.first_load(first).unwrap_or(0);
        if (first, load) != (0, 0) {
            self.head = Some(Head { first, at: (first == 0).then_some(0), load, look_up: 0, access: None });
        }
    }

    /// The second instruction's index, if the first does nothing but test flags and set registers.
    fn first_tests_flags(&self) -> Option<usize> {
        let rest = self.ops.get(1..)?;
        let end = 1 + rest.iter().position(|op| matches!(op, Op::Insn { .. }))?;
        let body = self.ops.get(1..end).filter(|body| body.len() <= MAX_OPS)?;
        let tests = |op: &Op| matches!(op, Op::SetCondF { .. } | Op::CMovF { .. });
        let simple =
            |op: &Op| tests(op) || matches!(op, Op::SetPart { .. } | Op::Un { op: UnOp::Mov | UnOp::ZextB, .. });
        (matches!(self.ops.first(), Some(Op::Insn { .. })) && body.iter().all(simple) && body.iter().any(tests))
            .then_some(end)
    }

    /// The load behind operations from `from` on that only compute, and leave `r14` and `r15` alone.
    fn first_load(&self, from: usize) -> Option<usize> {
        let ops = self.ops.get(from..)?;
        let load = ops.iter().take(MAX_OPS).position(|op| !self.only_computes(op))?;
        let fits = |off: i32| off.unsigned_abs() < MAX_OFF;
        matches!(ops.get(load), Some(Op::Load { base: Val::Slot(_), off, .. }) if fits(*off)).then_some(from + load)
    }

    fn only_computes(&self, op: &Op) -> bool {
        let pinned = |val: Val| match val {
            Val::Slot(slot) => self.pin_of(slot).is_some(),
            Val::Imm(imm) => fits32(imm) && fits32(imm.wrapping_neg()),
        };
        let slot = |val: Val| matches!(val, Val::Slot(_)) && pinned(val);
        match *op {
            Op::Insn { .. } => true,
            Op::Un { op: UnOp::Mov | UnOp::ZextB | UnOp::ZextW | UnOp::SextW, d, a, .. } => {
                slot(a) && pinned(Val::Slot(d))
            }
            Op::Lea { base, index, .. } => slot(base) && (slot(index) || index == Val::Imm(0)),
            Op::Alu { op, d, a, b, .. } => {
                let plain = matches!(
                    op,
                    AluOp::Add | AluOp::Sub | AluOp::And | AluOp::Or | AluOp::SetLtS | AluOp::SetLtU | AluOp::Sh3Add
                );
                (plain || op == AluOp::Shl && !slot(b)) && slot(a) && pinned(b) && pinned(Val::Slot(d))
            }
            _ => false,
        }
    }

    /// Before operation `index` of the block: where a jump that has done what is before it goes on.
    pub(super) fn note_head(&mut self, index: usize) {
        if let Some(head) = &mut self.head
            && head.first == index
            && index != 0
            && self.flags.is_in_slot()
        {
            // What the jump knows is no more than this.
            self.cached = None;
            self.flags = FlagState::default();
            head.at = Some(self.asm.pos());
        }
    }

    /// Whether the load being lowered is the one whose address a jump may make.
    fn is_heads_load(&self) -> bool {
        self.in_block() && self.head.is_some_and(|head| head.load != 0 && head.load + 1 == self.next)
    }

    /// Whether what is lowered is neither a copy nor checked together with others.
    pub(super) fn in_block(&self) -> bool {
        self.group.is_none() && self.stretch.is_none() && self.in_copy.is_none() && !self.in_cold
    }

    /// The load being lowered looks its page up from `look_up` on, and is made from `access` on.
    pub(super) fn note_heads_load(&mut self, look_up: u32, access: u32, range: Option<u32>) {
        if self.is_heads_load()
            && range.is_none()
            && let Some(head) = &mut self.head
            && head.access.is_none()
        {
            (head.look_up, head.access) = (look_up, Some(access));
        }
    }

    /// A load to `d` has been lowered that looked its page up, and whose cold code was put off last.
    pub(super) fn note_page(&mut self, d: Option<Slot>, base: Val, at: Address) {
        let Val::Slot(slot) = base else { return };
        let cold = self.cold.len().wrapping_sub(1);
        let stays = d != Some(slot) && self.pin_of(slot) == Some(at.base);
        if self.head.is_some() && self.in_block() && stays && at.off.unsigned_abs() < MAX_OFF {
            self.page = Some(Page { base: (slot, at.base), off: at.off, added: None, cold });
        }
    }

    /// Before an operation: forgets the page unless `r14` stays, and the address is still known.
    #[inline]
    pub(super) fn keep_page(&mut self, op: &Op) {
        if let Some(page) = self.page {
            self.page = self.page_behind(page, op);
        }
    }

    fn page_behind(&self, page: Page, op: &Op) -> Option<Page> {
        let small = |val: Val| match val {
            Val::Slot(_) => true,
            Val::Imm(imm) => fits32(imm),
        };
        let keeps = match *op {
            Op::DeadFlags { .. } => true,
            Op::BranchF { .. } => self.flags.has_in_host(flags_read(op)),
            Op::Branch { a, b, .. } => small(a) && small(b),
            _ => self.keeps_r14(op),
        };
        let (base, added) = (page.base.0, page.added);
        if !keeps || added.is_some_and(|(slot, _)| writes(op, slot)) {
            return None;
        }
        if !writes(op, base) {
            return Some(page);
        }
        match *op {
            Op::Alu { op: AluOp::Add, ty: Ty::I64, d, a, b: Val::Slot(by) }
                if d == base && a == Val::Slot(d) && by != d && added.is_none() =>
            {
                Some(Page { added: Some((by, self.pin_of(by)?)), ..page })
            }
            _ => None,
        }
    }

    /// The jump to the block's start, with flags in the slot if there are any, and in the host's if `in_host`. `false`: it has
    /// nothing to do that the block does not do as well.
    pub(super) fn jump_round(&mut self, in_host: bool) -> bool {
        let Some(head @ Head { at: Some(at), .. }) = self.head else { return false };
        let page = self.page.filter(|_| head.access.is_some());
        let tests = head.first != 0 && in_host;
        if !self.in_block() || self.homed != Homed::Not || !tests && (page.is_none() || head.first != 0) {
            return false;
        }
        let state = (self.cached, self.last, self.before, self.flags, self.insn, self.next);
        let more = (self.boxed, self.kept, self.skip, self.compared, self.page);
        (self.cached, self.last, self.before) = (None, None, None);
        if self.flagged {
            self.flags = FlagState::in_both();
        }
        self.redo(0, head.first);
        self.test_kick();
        let from = self.asm.jcc(Cc::Ne);
        let to = match self.ops.get(head.first) {
            Some(&Op::Insn { pc, .. }) => pc,
            _ => self.start,
        };
        self.put_off(Cold::Kick { from, to, flags: Routine::NONE });
        match page.zip(head.access) {
            Some((page, access)) => self.jump_to_load(head, page, access),
            None => self.asm.jmp_back(at),
        }
        (self.cached, self.last, self.before, self.flags, self.insn, self.next) = state;
        (self.boxed, self.kept, self.skip, self.compared, self.page) = more;
        true
    }

    /// Lowers operations once more.
    fn redo(&mut self, from: usize, to: usize) {
        for i in from..to {
            if let Some(op) = self.ops.get(i) {
                self.next = i + 1;
                self.op(op);
            }
        }
        self.last = self.cached.take();
    }

    /// Goes on with the block's first load: behind its look-up if it is in `page`.
    fn jump_to_load(&mut self, head: Head, page: Page, access: u32) {
        let Some(&Op::Load { base, off, size, .. }) = self.ops.get(head.load) else { return };
        self.flags = FlagState::default();
        // Where in the page the address was, less what was its base, which may change now.
        let Page { base: (_, was), added, .. } = page;
        self.asm.lea(false, R15, was, page.off);
        if let Some((_, by)) = added {
            self.asm.alu_r_rm(Alu::Sub, false, R15, Rm::Reg(by));
        }
        dynasm!(self.asm ; .arch x64 ; and r15d, 4095);
        self.asm.alu_r_rm(Alu::Sub, true, R15, Rm::Reg(was));
        if let Some((_, by)) = added {
            self.asm.alu_r_rm(Alu::Add, true, R15, Rm::Reg(by));
        }
        self.redo(head.first, head.load);
        self.next = head.load + 1;
        let at = self.address(base, off);
        self.asm.lea_sib(true, R15, Some(R15), Some((at.base, 0)), at.off - page.off);
        self.asm.test_rr(true, R14);
        self.asm.jcc_back(Cc::E, head.look_up);
        self.asm.alu_rm_i(Alu::Cmp, true, Rm::Reg(R15), 4096 - size.bytes() as i32);
        self.asm.jcc_back(Cc::Be, access);
        self.asm.jmp_back(head.look_up);
        if let Some((Cold::Load(slow), _)) = self.cold.get_mut(page.cold) {
            slow.lose_page();
        }
    }
}
