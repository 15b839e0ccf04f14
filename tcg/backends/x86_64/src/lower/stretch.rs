//! Stretches of hot code in which one register is an access's base again and again, with accesses off others in between:
//! a stack pointer's, mostly, in code with more variables than registers.
//!
//! Such accesses are checked together, as a group's are ([`super::group`]), by the range entry of one of them. What to add
//! to the base is kept for all of the stretch: in a register that no slot has, or in the frame. What else is in the
//! stretch may find that its page is not to be had, and asks the runtime; then nothing of what was checked may be relied
//! on. So no cold code leads back into the stretch: an access that misses goes on in a copy of it, before the operation it
//! belongs to, in which each access is checked by itself, with the same range entries.
//!
//! What was checked does not fault, so the stretch has no flags to save for it, nor its compares in between them; the copy
//! does, and makes up for the difference where ways lead into it and out of it ([`super::flags`]).

use super::flags::{self, FlagState, Needs};
use super::group::{Lent, adjustment};
use super::{Cold, Fixups, Insn, Lower, group, writes};
use crate::PIN_REGS;
use crate::asm::{Alu, Fixup, R14, R15, RAX, RSP, Rm, fits32};
use dynasm::dynasm;
use mimus_tcg_ir::backend::Optimise;
use mimus_tcg_ir::flags::Flags;
use mimus_tcg_ir::verify::flags_written;
use mimus_tcg_ir::{AluOp, Ext, FIRST_TEMP, Op, RmwOp, Slot, Val};
use std::ops::Range;

/// Bytes that a stretch's accesses may span.
const MAX_SPAN: i64 = 1024;
/// Operations that a stretch may have (they are emitted twice).
const MAX_OPS: usize = 256;

/// A stretch being lowered.
#[derive(Clone, Copy, Debug)]
pub(super) struct Stretch {
    base: Slot,
    /// What has been added to the base.
    delta: i32,
    /// The operation behind it, and the number of its copy in [`Lower::copies`].
    end: usize,
    copy: usize,
}

/// The copy.
#[derive(Debug)]
pub(super) struct Copy {
    /// The access that lent its range entry did not have it.
    from: Fixups,
    back: u32,
    base: Slot,
    first: usize,
    end: usize,
    misses: Vec<Miss>,
    /// The range entries of operations, by index.
    ranges: Vec<(usize, u32)>,
    /// State at the first operation.
    insn: Insn,
    boxed: u64,
    fp_alive: bool,
    flags: FlagState,
    /// While the stretch is being lowered: the flags needed after each of its operations if all accesses may fault.
    needs: Vec<Needs>,
    /// Where the stretch has the flags at its end.
    flags_at_end: FlagState,
}

/// A way from an access of the stretch into the copy.
#[derive(Clone, Copy, Debug)]
struct Miss {
    /// The index of the access's operation.
    op: usize,
    from: Fixup,
    /// The slot that `rax` holds before the operation.
    cached: Option<Slot>,
    before: Before,
}

/// What else is to be known of the place before an operation.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Before {
    flags: FlagState,
    /// A temporary whose memory has not been written: it is in `rax` alone.
    unwritten: Option<Slot>,
}

/// What a stretch spans.
#[derive(Clone, Copy)]
struct Extent {
    end: usize,
    low: i64,
    high: i64,
    writes: bool,
    accesses: usize,
    /// Runs of accesses with others in between.
    runs: usize,
}

impl Lower<'_> {
    /// The register for what is to be added.
    fn spare(&self) -> Option<u8> {
        PIN_REGS.get(self.be.pinned.len()).copied()
    }

    /// Starts a stretch at operation `first` if it is worth one.
    pub(super) fn enter_stretch(&mut self, first: usize) {
        let on =
            self.info.hints.hot && !self.compact && self.be.config.flags && self.be.config.optimise != Optimise::Off;
        if !on || self.stretch.is_some() || self.in_copy.is_some() || self.group.is_some() {
            return;
        }
        let Some((base, extent)) = self.find_stretch(first) else { return };
        let ops = first..extent.end;
        if self.leaves_windows(ops.clone()) || self.in_windows() && self.windows.any_of(ops) {
            return;
        }
        let Some(lent) = self.find_lender(first, base, (extent.end, extent.writes)) else { return };
        self.keep_stored(first);
        (self.cached, self.last) = (None, None);
        let from = self.check_stretch(base, extent, lent);
        self.flags_lost();
        let copy = self.copies.len();
        self.copies.push(Copy {
            from,
            back: 0,
            base,
            first,
            end: extent.end,
            misses: Vec::new(),
            ranges: vec![(lent.op, lent.range)],
            insn: self.insn,
            boxed: self.boxed,
            fp_alive: self.fp_alive,
            flags: self.flags,
            needs: Vec::new(),
            flags_at_end: self.flags,
        });
        self.keep_flags_in(first..extent.end, base, copy);
        self.stretch = Some(Stretch { base, delta: 0, end: extent.end, copy });
    }

    /// Ends the stretch if operation `next` is the first after it.
    pub(super) fn leave_stretch(&mut self, next: usize) {
        let Some(stretch) = self.stretch.filter(|stretch| stretch.end == next) else { return };
        self.stretch = None;
        self.cached = self.cached_behind(next);
        let back = self.asm.pos();
        self.swap_needs(stretch.copy);
        if let Some(copy) = self.copies.get_mut(stretch.copy) {
            (copy.back, copy.flags_at_end) = (back, self.flags);
        }
        self.put_off(Cold::Copy(stretch.copy as u32));
    }

    /// Where an access at `base + off` is, if the stretch has checked it. Clobbers `r14`.
    pub(super) fn in_stretch(&mut self, base: Val, off: i32) -> Option<Rm> {
        let stretch = self.stretch.filter(|stretch| Val::Slot(stretch.base) == base)?;
        let disp = off.wrapping_add(stretch.delta);
        Some(match self.spare() {
            Some(reg) => Rm::Mem { base: reg, index: None, disp },
            None => {
                self.asm.mov_r_rm(true, R14, Rm::Mem { base: RSP, index: None, disp: 0 });
                Rm::Mem { base: R14, index: None, disp }
            }
        })
    }

    /// Where a read-modify-write is, if the stretch has checked it. No flag changes. Clobbers `r14`.
    pub(super) fn rmw_in_stretch(&mut self, op: &Op) -> Option<Rm> {
        match *op {
            Op::Rmw { base, off, .. } if is_simple_rmw(op) => self.in_stretch(base, off),
            _ => None,
        }
    }

    /// Whether operation `index` is a read-modify-write that the stretch being lowered has checked, so that it does not
    /// fault and finds the host's flags as the operation before it left them; and sets all of them. (Of others, flags would
    /// be left that the stretch's copy has elsewhere.)
    pub(super) fn is_checked_rmw(&self, index: usize, op: &Op) -> bool {
        let Some(stretch) = self.stretch.filter(|stretch| index < stretch.end) else { return false };
        matches!(*op, Op::Rmw { base, .. } if base == Val::Slot(stretch.base))
            && is_simple_rmw(op)
            && flags_written(op).1 == Flags::ALL
    }

    /// After an operation of a stretch.
    pub(super) fn adjust_stretch(&mut self, op: &Op) {
        if let Some(stretch) = &mut self.stretch
            && let Some(by) = adjustment(op, stretch.base, self.narrow)
        {
            stretch.delta = stretch.delta.wrapping_add(by);
        }
    }

    /// In a stretch: has the copy go on where an access of operation `op` misses, which begins with `cached` in `rax`.
    /// `false`: there is no stretch.
    pub(super) fn divert(&mut self, op: usize, cached: Option<Slot>, from: Fixups) -> bool {
        let Some(stretch) = self.stretch else { return false };
        if let Some(copy) = self.copies.get_mut(stretch.copy) {
            let before = self.before_op;
            copy.misses.extend(from.0.into_iter().flatten().map(|from| Miss { op, from, cached, before }));
        }
        true
    }

    /// Whether accesses off `base` are checked by a stretch, or each by itself in its copy.
    pub(super) fn is_stretched(&self, base: Slot) -> bool {
        let copied = self.in_copy.and_then(|copy| self.copies.get(copy)).map(|copy| copy.base);
        self.stretch.map(|stretch| stretch.base).or(copied) == Some(base)
    }

    /// The range entry that the stretch being lowered, or whose copy it is, has for operation `op`.
    pub(super) fn given_range(&self, op: usize) -> Option<u32> {
        let copy = self.copies.get(self.stretch.map(|stretch| stretch.copy).or(self.in_copy)?)?;
        copy.ranges.iter().find(|(other, _)| *other == op).map(|(_, range)| *range)
    }

    /// Remembers an operation's range entry for the copy.
    pub(super) fn give_range(&mut self, op: usize, range: u32) {
        if let Some(copy) = self.stretch.and_then(|stretch| self.copies.get_mut(stretch.copy)) {
            copy.ranges.push((op, range));
        }
    }

    /// The longest stretch from operation `first` on, cut after its last access.
    fn find_stretch(&self, first: usize) -> Option<(Slot, Extent)> {
        let ops = self.ops.get(first..)?;
        let (base, ..) = access(ops.first()?)?;
        if base.0 >= FIRST_TEMP || self.pin_of(base).is_none() {
            return None;
        }
        let edge = self.looped.map_or(usize::MAX, |l| l.edge);
        let mut extent = Extent { end: 0, low: i64::MAX, high: i64::MIN, writes: false, accesses: 0, runs: 0 };
        let (mut delta, mut apart) = (0i64, true);
        for (i, op) in ops.iter().enumerate().take(MAX_OPS) {
            if first + i >= edge || !is_plain(op) {
                break;
            }
            match access(op) {
                Some((b, off, size, write)) if b == base => {
                    let low = i64::from(off) + delta;
                    let high = low + i64::from(size);
                    let (low, high) = (extent.low.min(low), extent.high.max(high));
                    if high - low > MAX_SPAN || !fits32(low) || !fits32(high) {
                        break;
                    }
                    extent = Extent {
                        end: first + i + 1,
                        low,
                        high,
                        writes: extent.writes || write,
                        accesses: extent.accesses + 1,
                        runs: extent.runs + usize::from(apart),
                    };
                    apart = false;
                }
                _ => apart |= !self.keeps_r14(op),
            }
            if writes(op, base) {
                match adjustment(op, base, self.narrow) {
                    Some(by) => delta += i64::from(by),
                    None => break,
                }
            }
        }
        // By instructions: a run's check, against one check and what gets at the place.
        let cost = 8 + if self.spare().is_some() { 0 } else { extent.accesses };
        (extent.runs >= 2 && 5 * extent.runs > cost).then_some((base, extent))
    }

    /// Compares all of the stretch's accesses with the range, and keeps what is added to the base.
    fn check_stretch(&mut self, base: Slot, extent: Extent, lent: Lent) -> Fixups {
        let Some(reg) = self.pin_of(base) else { return Fixups::default() };
        let extra = extent.high - extent.low - i64::from(lent.size.bytes());
        self.asm.lea(true, R15, reg, (extent.low + extra) as i32);
        let miss = self.compare_span(lent.range, extra as i32);
        match self.spare() {
            Some(spare) => self.asm.lea_sib(true, spare, Some(reg), Some((R14, 0)), 0),
            None => {
                self.asm.alu_r_rm(Alu::Add, true, R14, Rm::Reg(reg));
                dynasm!(self.asm ; .arch x64 ; mov [rsp], r14);
            }
        }
        miss
    }

    /// The copy, in which each access is checked by itself.
    pub(super) fn slow_stretch(&mut self, number: usize) {
        let Some(copy) = self.copies.get(number) else { return };
        let (from, first, end) = (copy.from, copy.first, copy.end);
        let (back, flags_at_end) = (copy.back, copy.flags_at_end);
        (self.insn, self.boxed, self.flags, self.fp_alive) = (copy.insn, copy.boxed, copy.flags, copy.fp_alive);
        self.bind(from);
        (self.cached, self.last, self.group) = (None, None, None);
        self.skip = 0;
        self.in_copy = Some(number);
        for i in first..end {
            self.lower_at(i);
        }
        debug_assert!(self.copies.get(number).is_some_and(|copy| copy.misses.is_empty()), "every way leads somewhere");
        self.in_copy = None;
        // The code behind the stretch may look for a temporary there.
        self.write_temporary(self.cached);
        self.flags_as_in_stretch(end, flags_at_end);
        self.asm.jmp_back(back);
    }

    /// In a copy, before operation `i` (its flags have been saved): the ways from its accesses that miss.
    #[inline]
    pub(super) fn join_copy(&mut self, i: usize) {
        if self.in_copy.is_some() {
            self.join_from_misses(i);
        }
    }

    fn join_from_misses(&mut self, i: usize) {
        let Some(copy) = self.in_copy.and_then(|copy| self.copies.get_mut(copy)) else { return };
        let count = copy.misses.iter().take_while(|miss| miss.op == i).count();
        let misses: Vec<Miss> = copy.misses.drain(..count).collect();
        let Some(Miss { before: Before { flags, .. }, .. }) = misses.first().copied() else { return };
        if misses.iter().any(|miss| miss.cached != self.cached) {
            // Nothing else may know it.
            let cached = self.cached.take();
            self.write_temporary(cached);
        }
        let saves = self.join_flags(i, flags);
        let (others, same): (Vec<Miss>, Vec<Miss>) = misses.into_iter().partition(|miss| saves || miss.is_unwritten());
        if !others.is_empty() {
            let over = self.asm.jmp();
            let mut ends = vec![over];
            for miss in others {
                self.asm.bind(miss.from);
                if miss.is_unwritten() {
                    self.write_temporary(miss.cached);
                }
                if saves {
                    self.flags_from_stretch(flags);
                }
                ends.push(self.asm.jmp());
            }
            ends.into_iter().for_each(|end| self.asm.bind(end));
        }
        for miss in same {
            self.asm.bind(miss.from);
        }
    }

    /// A temporary's value, in `rax`, to its memory. No flag changes.
    fn write_temporary(&mut self, slot: Option<Slot>) {
        if let Some(t) = slot.filter(|t| t.0 >= FIRST_TEMP && self.pin_of(*t).is_none()) {
            self.asm.mov_rm_r(true, Rm::Env(self.be.slot_disp(t)), RAX);
        }
    }

    /// In a stretch, before an operation.
    #[inline]
    pub(super) fn note_before(&mut self) {
        if self.stretch.is_some() {
            self.before_op = Before { flags: self.flags, unwritten: self.unwritten };
        }
    }

    /// Across accesses off `base` in operations `of`, which the stretch has checked, flags may stay in the host's, but not in
    /// its copy.
    fn keep_flags_in(&mut self, of: Range<usize>, base: Slot, copy: usize) {
        if self.needs.is_empty() {
            return;
        }
        let whole = |slot: Slot| self.be.fp_pin_of(slot).is_none();
        let safe = |i: usize| match self.ops.get(i) {
            Some(&Op::Load { d, base: b, ext, .. }) => b == Val::Slot(base) && ext != Ext::Ones && whole(d),
            Some(&Op::Store { src: Val::Slot(src), base: b, .. }) => b == Val::Slot(base) && whole(src),
            Some(&Op::Store { base: b, .. }) => b == Val::Slot(base),
            _ => false,
        };
        let first = of.start;
        let needs = flags::needs_in_stretch(self.ops, of, safe, &self.needs);
        if let Some(copy) = self.copies.get_mut(copy) {
            copy.needs = needs;
        }
        self.swap_needs(copy);
        // What flags were before had been planned for.
        if !self.lasts_in_stretch(first) {
            self.swap_needs(copy);
            if let Some(copy) = self.copies.get_mut(copy) {
                copy.needs.clear();
            }
        }
    }

    /// Has the needs in force that the copy keeps, and keeps those that were.
    fn swap_needs(&mut self, copy: usize) {
        if let Some(Copy { first, needs, .. }) = self.copies.get_mut(copy) {
            let end = *first + needs.len();
            if let Some(place) = self.needs.get_mut(*first..end) {
                place.swap_with_slice(needs);
            }
        }
    }
}

impl Miss {
    fn is_unwritten(&self) -> bool {
        self.cached.is_some() && self.cached == self.before.unwritten
    }
}

/// A read-modify-write that gives nothing back.
fn is_simple_rmw(op: &Op) -> bool {
    matches!(op, Op::Rmw { op: RmwOp::F(_), lock: false, old: None, .. })
}

/// [`group::access`], with read-modify-writes.
pub(super) fn access(op: &Op) -> Option<(Slot, i32, u32, bool)> {
    match *op {
        Op::Rmw { base: Val::Slot(base), off, size, .. } if is_simple_rmw(op) => Some((base, off, size.bytes(), true)),
        _ => group::access(op),
    }
}

/// Whether lowering an operation calls nothing on its way, but for accesses, and goes on with the next.
fn is_plain(op: &Op) -> bool {
    match *op {
        Op::Insn { .. }
        | Op::Un { .. }
        | Op::GetPc { .. }
        | Op::Load { .. }
        | Op::Store { .. }
        | Op::SetEnvByte { .. }
        | Op::GuardEnv { .. }
        | Op::Guard { .. }
        | Op::Branch { .. }
        | Op::BranchF { .. }
        | Op::Lea { .. }
        | Op::SetPart { .. }
        | Op::GetHigh { .. }
        | Op::SetHigh { .. }
        | Op::LoadEnv { .. }
        | Op::StoreEnv { .. }
        | Op::AluF { .. }
        | Op::ShiftDoubleF { .. }
        | Op::MulWideF { .. }
        | Op::SetCondF { .. }
        | Op::CMovF { .. }
        | Op::GetFlags { .. }
        | Op::SetFlags { .. }
        | Op::FlipFlags { .. }
        | Op::DeadFlags { .. }
        | Op::Rmw { .. }
        | Op::Unit { .. } => true,
        Op::Alu { op, .. } => !matches!(op, AluOp::DivS | AluOp::DivU | AluOp::RemS | AluOp::RemU),
        _ => false,
    }
}
