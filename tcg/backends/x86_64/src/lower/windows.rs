//! Loops whose accesses move by constant steps: their pages are looked up on the way into the loop, not at each access.
//!
//! An access is taken care of if its address is a sum of registers that the loop leaves alone or changes by a constant each
//! round ([`Linear`]). All accesses at constant distances from one another are a [`Window`], which has to be in one page. On
//! the way in, windows are looked up, what is to be added to their addresses is kept, and the rounds until one of them leaves
//! its page are counted; a counter in the loop says when to look them up again. If they cannot be had, because a page is not
//! there or an access crosses into the next, a round of the block's own code is run instead, in which each access is checked.
//!
//! The same counter bounds how long the loop goes without a look at the kick word. Whatever is called from the middle of a
//! round (for an access that is in no window) may change the mapping: it is looked up again after the round.

mod search;

use self::search::Search;
use super::flags::Routine;
use super::group::access;
use super::{Cold, Fixups, Lower, Opnd};
use crate::asm::{Alu, Cc, Fixup, R14, R15, RAX, Rm, Shift, fits32};
use crate::{UNPINNED, X86_64};
use dynasm::dynasm;
use dynasmrt::DynasmApi;
use mimus_tcg_ir::unit::UnitMemory;
use mimus_tcg_ir::verify::{for_each_read, for_each_written};
use mimus_tcg_ir::{AluOp, Cond, CondF, FIRST_TEMP, FlagOp, Op, SLOTS, Size, Slot, Ty, UnOp, Val};

/// Windows of a loop.
const MAX: usize = 6;
/// The lowest offset of an access in a window of 32-bit code.
const MIN_OFFSET: i32 = -(1 << 15);
/// Bytes that a window may span.
const MAX_SPAN: i64 = 1024;
/// Bytes that it may move by each round, for each access.
const MAX_STEP: i64 = 128;
/// Rounds after which the kick word is looked at.
const ROUNDS: i32 = 512;
/// Host instructions that looking up a window takes, and that a check of an access does, roughly.
const LOOK_UP: usize = 14;
const CHECK: usize = 4;
/// Temporaries in whose memory the counter and the addends are kept; the last one is taken (`KEPT`).
const COUNTER: Slot = Slot((SLOTS - 2) as u8);
const FIRST_KEPT: usize = SLOTS - 2 - MAX;

/// A sum of slots as they were when the round began, times small numbers, and a constant.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Linear {
    /// In the order of slots; those with a factor of zero are not there.
    terms: [(Slot, i8); 3],
    k: i64,
}

const NONE: (Slot, i8) = (Slot(UNPINNED), 0);

impl Linear {
    const fn constant(k: i64) -> Linear {
        Linear { terms: [NONE; 3], k }
    }

    fn of(slot: Slot) -> Linear {
        Linear { terms: [(slot, 1), NONE, NONE], k: 0 }
    }

    fn terms(&self) -> impl Iterator<Item = (Slot, i8)> + use<> {
        self.terms.into_iter().filter(|(_, factor)| *factor != 0)
    }

    /// This and `factor` times `other`.
    fn plus(self, other: Linear, factor: i8) -> Option<Linear> {
        let mut sum: Vec<(Slot, i8)> = self.terms().collect();
        for (slot, times) in other.terms() {
            let times = times.checked_mul(factor)?;
            match sum.iter_mut().find(|(there, _)| *there == slot) {
                Some((_, there)) => *there = there.checked_add(times)?,
                None => sum.push((slot, times)),
            }
        }
        sum.retain(|(_, factor)| *factor != 0);
        sum.sort_by_key(|(slot, _)| slot.0);
        let mut terms = [NONE; 3];
        if sum.len() > terms.len() {
            return None;
        }
        terms.iter_mut().zip(sum).for_each(|(place, term)| *place = term);
        Some(Linear { terms, k: self.k.wrapping_add(other.k.wrapping_mul(factor.into())) })
    }

    /// This, shifted to the left by a small constant.
    fn shifted(self, by: Linear) -> Option<Linear> {
        let small = by.terms().next().is_none() && (0..4).contains(&by.k);
        small.then(|| Linear::constant(0).plus(self, 1 << by.k)).flatten()
    }

    /// Whether code can compute it.
    fn is_easy(&self) -> bool {
        fits32(self.k) && self.terms().all(|(_, factor)| matches!(factor, -1 | 1 | 2 | 4 | 8))
    }
}

/// Which sums are understood.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Width {
    /// Of 64 bits.
    Whole,
    /// Of 32 bits, modulo 2^32, as all addresses are ([`mimus_tcg_ir::Block::narrow`]).
    Narrow,
    /// Both, and none is taken to overflow: for guesses.
    Any,
}

impl Width {
    fn has(self, size: Size) -> bool {
        match self {
            Width::Whole => size == Size::B8,
            Width::Narrow => size == Size::B4,
            Width::Any => size >= Size::B4,
        }
    }
}

/// What a loop's body does to slots.
struct Analysis {
    values: Vec<Option<Linear>>,
    width: Width,
}

impl Analysis {
    fn new(width: Width) -> Analysis {
        // Temporaries have nothing in them when a round begins.
        let value = |n| (n < FIRST_TEMP).then(|| Linear::of(Slot(n)));
        Analysis { values: (0..SLOTS as u8).map(value).collect(), width }
    }

    fn value(&self, val: Val) -> Option<Linear> {
        match val {
            Val::Imm(imm) if self.width == Width::Narrow => Some(Linear::constant(i64::from(imm as i32))),
            Val::Imm(imm) => Some(Linear::constant(imm)),
            Val::Slot(slot) => *self.values.get(usize::from(slot.0))?,
        }
    }

    /// Whether sums of this type are understood. In 32-bit guests those that extend a sign are not.
    fn has(&self, ty: Ty) -> bool {
        match ty {
            Ty::I64 => self.width.has(Size::B8),
            Ty::U32 => self.width.has(Size::B4),
            Ty::I32 => self.width == Width::Any,
        }
    }

    /// What an operation computes.
    fn result(&self, op: &Op) -> Option<Linear> {
        match *op {
            Op::Un { op: UnOp::Mov, ty, a, .. } if ty == Ty::I64 || self.has(ty) => self.value(a),
            Op::Alu { op, ty, a, b, .. } if self.has(ty) => {
                let (a, b) = (self.value(a)?, self.value(b)?);
                match op {
                    AluOp::Add => a.plus(b, 1),
                    AluOp::Sub => a.plus(b, -1),
                    AluOp::Sh1Add => b.plus(a, 2),
                    AluOp::Sh2Add => b.plus(a, 4),
                    AluOp::Sh3Add => b.plus(a, 8),
                    AluOp::Shl => a.shifted(b),
                    _ => None,
                }
            }
            Op::AluF { op, size, d: Some(_), a, b } if self.width.has(size) => {
                let (a, b) = (self.value(a)?, self.value(b)?);
                match op {
                    FlagOp::Add => a.plus(b, 1),
                    FlagOp::Sub => a.plus(b, -1),
                    FlagOp::Inc => a.plus(Linear::constant(1), 1),
                    FlagOp::Dec => a.plus(Linear::constant(1), -1),
                    FlagOp::Shl => a.shifted(b),
                    _ => None,
                }
            }
            Op::Lea { base, index, shift, disp, size, .. } if self.width.has(size) => {
                let index = self.value(index)?.shifted(Linear::constant(shift.into()))?;
                self.value(base)?.plus(index, 1)?.plus(Linear::constant(disp.into()), 1)
            }
            _ => None,
        }
    }

    /// Goes past an operation.
    fn step(&mut self, op: &Op) {
        let result = self.result(op);
        for_each_written(op, |d| {
            if let Some(value) = self.values.get_mut(usize::from(d.0)) {
                *value = result;
            }
        });
    }

    /// What a slot that is changed by a constant in each round is changed by.
    fn step_of(&self, slot: Slot) -> Option<i64> {
        let end = self.value(Val::Slot(slot))?;
        (end.terms == Linear::of(slot).terms).then_some(end.k)
    }

    /// At the end of the body: `value` in terms of slots that are changed by constants, and what it is changed by itself.
    ///
    /// In all rounds but the first, a slot that a round leaves with a sum of such slots is one when the next begins.
    fn resolve(&self, value: Linear) -> Option<(Linear, i64)> {
        let (mut sum, mut step) = (Linear::constant(value.k), 0i64);
        for (slot, factor) in value.terms() {
            let term = match self.step_of(slot) {
                Some(_) => Linear::of(slot),
                None => {
                    let mut before = self.value(Val::Slot(slot))?;
                    for (other, times) in before.terms() {
                        before.k = before.k.wrapping_sub(self.step_of(other)?.wrapping_mul(times.into()));
                    }
                    before
                }
            };
            sum = sum.plus(term, factor)?;
        }
        for (slot, factor) in sum.terms() {
            step = step.checked_add(self.step_of(slot)?.checked_mul(factor.into())?)?;
        }
        Some((sum, step))
    }
}

/// Accesses at constant distances from one another.
#[derive(Clone, Copy, Debug)]
struct Window {
    /// Where the lowest of them is.
    at: Linear,
    /// Bytes from there to the end of the highest.
    span: i64,
    step: i64,
    /// The lowest and the highest that accesses add to their bases.
    offsets: (i32, i32),
    writes: bool,
    accesses: usize,
    /// Where what is to be added is kept.
    place: Slot,
    reg: Option<u8>,
}

/// The windows of a loop.
#[derive(Debug, Default)]
pub(super) struct Windows {
    list: Vec<Window>,
    /// The window of each access that has one, by its operation's index.
    of: Vec<(usize, usize)>,
    /// A lower bound of the rounds left: a value that becomes smaller by so much each round.
    left: Option<(Linear, i64)>,
    counter: Option<u8>,
    search: Option<Search>,
}

impl Windows {
    /// Those of a loop's body.
    pub(super) fn find(body: &[Op], narrow: bool) -> Windows {
        let mut taken = false;
        let mut analysis = Analysis::new(if narrow { Width::Narrow } else { Width::Whole });
        let mut accesses = Vec::new();
        for (i, op) in body.iter().enumerate() {
            for_each_read(op, |slot| taken |= usize::from(slot.0) >= FIRST_KEPT);
            for_each_written(op, |slot| taken |= usize::from(slot.0) >= FIRST_KEPT);
            if let Some((base, off, bytes, writes)) = access(op)
                && let Some(value) = analysis.value(base.into())
                && !(narrow && off < MIN_OFFSET)
            {
                let at = Linear { k: value.k.wrapping_add(off.into()), ..value };
                accesses.push((i, at, i64::from(bytes), (off, writes)));
            }
            analysis.step(op);
        }
        let mut windows = Windows::default();
        if taken {
            return windows;
        }
        for (op, at, bytes, how) in accesses {
            if let Some((at, step)) = analysis.resolve(at) {
                windows.enter(op, at, step, bytes, how);
            }
        }
        windows.keep_good();
        windows.left = rounds_left(body);
        windows
    }

    /// The same of a guest without flags.
    pub(super) fn find_plain(body: &[Op]) -> Windows {
        let mut windows = Windows::find(body, false);
        windows.search = Search::find(body, &mut windows);
        windows
    }

    /// The same of a guest with flags.
    pub(super) fn find_beside_flags(body: &[Op], narrow: bool) -> Windows {
        let windows = Windows::find(body, narrow);
        if fits_beside_flags(body, &windows) { windows } else { Windows::default() }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.list.is_empty()
    }

    /// Puts an access into a window.
    fn enter(&mut self, op: usize, at: Linear, step: i64, bytes: i64, (off, writes): (i32, bool)) {
        if !at.is_easy() || at.terms().next().is_none() {
            return;
        }
        let fits = |w: &Window| {
            let (low, high) = (w.at.k.min(at.k), (w.at.k + w.span).max(at.k + bytes));
            (w.at.terms == at.terms && high - low <= MAX_SPAN).then_some((low, high))
        };
        let found = self.list.iter_mut().enumerate().find_map(|(i, w)| fits(w).map(|extent| (i, w, extent)));
        match found {
            Some((i, window, (low, high))) => {
                (window.at.k, window.span) = (low, high - low);
                window.offsets = (window.offsets.0.min(off), window.offsets.1.max(off));
                window.writes |= writes;
                window.accesses += 1;
                self.of.push((op, i));
            }
            None => {
                let place = COUNTER;
                let (reg, offsets) = (None, (off, off));
                self.list.push(Window { at, span: bytes, step, offsets, writes, accesses: 1, place, reg });
                self.of.push((op, self.list.len() - 1));
            }
        }
    }

    /// Drops those that leave their page too soon, and what is too many.
    fn keep_good(&mut self) {
        let mut number = 0;
        let numbers: Vec<Option<usize>> = self
            .list
            .iter()
            .map(|w| {
                let good = w.step.abs() <= MAX_STEP * w.accesses as i64 && w.span + w.step.abs() < 4096 && number < MAX;
                number += usize::from(good);
                good.then(|| number - 1)
            })
            .collect();
        let old = std::mem::take(&mut self.list);
        for (window, number) in old.into_iter().zip(&numbers) {
            if let Some(number) = number {
                self.list.push(Window { place: Slot((FIRST_KEPT + number) as u8), ..window });
            }
        }
        self.of = self.of.iter().filter_map(|&(op, i)| Some((op, numbers.get(i).copied().flatten()?))).collect();
    }

    /// The window of an operation.
    fn of(&self, op: usize) -> Option<&Window> {
        let (_, window) = self.of.iter().find(|(access, _)| *access == op)?;
        self.list.get(*window)
    }

    /// Has the window of an operation take in so many bytes more. `false`: it would be too large.
    fn extend(&mut self, op: usize, at: Linear, bytes: i64) -> bool {
        let index = self.of.iter().find(|(access, _)| *access == op).map(|(_, window)| *window);
        let Some(window) = index.and_then(|i| self.list.get_mut(i)).filter(|w| w.at.terms == at.terms) else {
            return false;
        };
        let low = window.at.k.min(at.k);
        let span = (window.at.k + window.span).max(at.k + bytes) - low;
        let fits = span <= MAX_SPAN && span + window.step.abs() < 4096 && fits32(low);
        if fits {
            (window.at.k, window.span) = (low, span);
        }
        fits
    }

    /// Whether one of these operations has a window.
    pub(super) fn any_of(&self, ops: std::ops::Range<usize>) -> bool {
        self.of.iter().any(|(op, _)| ops.contains(op))
    }

    /// How much registers for the addends and for the counter would be used.
    pub(super) fn uses(&self) -> impl Iterator<Item = (Held, u32)> + use<'_> {
        let addends = self.list.iter().enumerate().map(|(i, w)| (Held::Addend(i), 2 * w.accesses as u32));
        addends.chain([(Held::Counter, 7)])
    }

    /// Gives one of them a register.
    pub(super) fn hold(&mut self, what: Held, reg: u8) {
        match what {
            Held::Addend(i) => {
                if let Some(window) = self.list.get_mut(i) {
                    window.reg = Some(reg);
                }
            }
            Held::Counter => self.counter = Some(reg),
        }
    }

    /// Rounds that pay for looking everything up, twice over. What does not move is cheap to check otherwise.
    fn worth(&self) -> i64 {
        let accesses: usize = self.list.iter().filter(|w| w.step != 0).map(|w| w.accesses).sum();
        let cost = self.list.len() * LOOK_UP + 8;
        2 * (cost / (accesses * CHECK).max(1) + 1) as i64
    }
}

/// What a loop with windows keeps in registers besides slots.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Held {
    /// What is to be added to the addresses of a window.
    Addend(usize),
    Counter,
}

/// What the branch that closes a loop waits for, if it is that a value which becomes smaller by a constant each round
/// reaches zero: that value, in terms of slots at the end of the round before, and the constant. A guess.
fn rounds_left(body: &[Op]) -> Option<(Linear, i64)> {
    let (edge, before) = body.split_last()?;
    let compares = match *edge {
        Op::Branch { cond: Cond::Ne | Cond::LtS | Cond::LtU, .. } => before.len(),
        Op::BranchF { cond, .. } if !matches!(cond, CondF::E | CondF::P | CondF::Np | CondF::O | CondF::No) => {
            before.iter().rposition(|op| matches!(op, Op::AluF { .. }))?
        }
        _ => return None,
    };
    let mut analysis = Analysis::new(Width::Any);
    let mut distance = None;
    for (i, op) in body.iter().enumerate() {
        if i == compares {
            distance = match *op {
                Op::Branch { a, b, .. } | Op::AluF { op: FlagOp::Sub, d: None, a, b, .. } => {
                    analysis.value(b)?.plus(analysis.value(a)?, -1)
                }
                Op::AluF { d: Some(_), .. } => analysis.result(op),
                _ => None,
            };
        }
        analysis.step(op);
    }
    let (distance, step) = analysis.resolve(distance?)?;
    let (distance, step) = if step > 0 { (Linear::constant(0).plus(distance, -1)?, -step) } else { (distance, step) };
    (step < 0 && distance.is_easy()).then_some((distance, step.checked_neg()?))
}

/// Whether the loop with this body may have a copy with windows if it has to do with flags: all accesses have windows, so
/// that nothing is called. (Windows for some of them would take stretches from the others.)
fn fits_beside_flags(body: &[Op], windows: &Windows) -> bool {
    body.iter().enumerate().all(|(i, op)| match *op {
        Op::Unit { insn, .. } => insn.memory == UnitMemory::None || windows.of(i).is_some(),
        Op::Load { .. } | Op::Store { .. } => windows.of(i).is_some(),
        Op::Insn { .. }
        | Op::Alu { .. }
        | Op::Un { .. }
        | Op::GetPc { .. }
        | Op::GuardEnv { .. }
        | Op::Branch { .. }
        | Op::BranchF { .. }
        | Op::Lea { .. }
        | Op::SetPart { .. }
        | Op::GetHigh { .. }
        | Op::SetHigh { .. }
        | Op::LoadEnv { .. }
        | Op::AluF { .. }
        | Op::ShiftDoubleF { .. }
        | Op::MulWideF { .. }
        | Op::SetCondF { .. }
        | Op::CMovF { .. }
        | Op::DeadFlags { .. } => true,
        _ => false,
    })
}

impl Lower<'_> {
    /// `r15` = `value`. Clobbers `r14`.
    fn compute(&mut self, value: &Linear) {
        let mut terms: Vec<(Slot, i8)> = value.terms().collect();
        terms.sort_by_key(|(_, factor)| *factor != 1);
        let plain = terms.first().is_some_and(|(_, factor)| *factor == 1);
        if !plain {
            self.asm.alu_r_rm(Alu::Xor, false, R15, Rm::Reg(R15));
        }
        for (i, (slot, factor)) in terms.into_iter().enumerate() {
            let home = self.home(slot);
            match factor {
                1 if i == 0 => self.mov(R15, home),
                1 => self.alu_r(Alu::Add, true, R15, home),
                -1 => self.alu_r(Alu::Sub, true, R15, home),
                factor => {
                    self.mov(R14, home);
                    self.asm.shift_i(Shift::Shl, true, Rm::Reg(R14), factor.trailing_zeros() as u8);
                    self.alu_r(Alu::Add, true, R15, Opnd::Reg(R14));
                }
            }
        }
        if value.k != 0 {
            self.asm.alu_rm_i(Alu::Add, true, Rm::Reg(R15), value.k as i32);
        }
    }

    /// Jumps if there will not be rounds enough to be worth looking windows up.
    pub(super) fn test_rounds_left(&mut self) -> Option<Fixup> {
        let (left, step) = self.windows.left.filter(|_| !self.forced())?;
        self.compute(&left);
        let enough = self.windows.worth().saturating_mul(step).min(i64::from(i32::MAX));
        self.asm.alu_rm_i(Alu::Cmp, !self.narrow, Rm::Reg(R15), enough as i32);
        Some(self.asm.jcc(Cc::B))
    }

    fn forced(&self) -> bool {
        self.be.config.optimise == mimus_tcg_ir::backend::Optimise::Forced
    }

    /// Looks all windows up and counts the rounds until one leaves its page. Clobbers `rax`, `r14`, `r15`. `flags`: saves
    /// what the block's own code expects in the flags' slot.
    pub(super) fn look_windows_up(&mut self, flags: Routine) {
        let counter = Rm::Env(self.be.slot_disp(COUNTER));
        self.asm.mov_rm_i(true, counter, ROUNDS);
        if self.narrow {
            self.test_upper_halves(flags);
        }
        for i in 0..self.windows.list.len() {
            if let Some(window) = self.windows.list.get(i).copied() {
                let from = self.look_window_up(&window, counter);
                self.put_off(Cold::LeaveWindows { from, flags });
            }
        }
        if let Some(reg) = self.windows.counter {
            self.asm.mov_r_rm(true, reg, counter);
        }
    }

    /// Leaves if a slot that a window depends on has more than 32 bits (one of 64-bit code that has not been written since):
    /// an address is not what was looked up then.
    fn test_upper_halves(&mut self, flags: Routine) {
        let mut slots: Vec<Slot> = self.windows.list.iter().flat_map(|w| w.at.terms()).map(|(slot, _)| slot).collect();
        slots.sort();
        slots.dedup();
        for (i, slot) in slots.into_iter().enumerate() {
            let home = self.home(slot);
            if i == 0 {
                self.mov(RAX, home);
            } else {
                self.alu_r(Alu::Or, true, RAX, home);
            }
        }
        self.asm.shift_i(Shift::Shr, true, Rm::Reg(RAX), 32);
        let from = Fixups::one(self.asm.jcc(Cc::Ne));
        self.put_off(Cold::LeaveWindows { from, flags });
    }

    /// Looks one up; jumps if it is not to be had.
    fn look_window_up(&mut self, window: &Window, counter: Rm) -> Fixups {
        let context = self.be.config.context;
        let mut from = Fixups::default();
        self.compute(&window.at);
        if self.narrow {
            // No base, which is so much lower than its address, is past an end of the addresses in any of the rounds.
            let (low, high) = window.offsets;
            let first = high.max(0) as u32 + if window.step < 0 { 4096 } else { 0 };
            let end = 0u32.wrapping_sub(8192).wrapping_add_signed(low.min(0));
            self.asm.mov_r_rm(false, R15, Rm::Reg(R15));
            self.asm.lea(false, RAX, R15, first.wrapping_neg() as i32);
            self.asm.alu_rm_i(Alu::Cmp, false, Rm::Reg(RAX), end.wrapping_sub(first) as i32);
            from.add(self.asm.jcc(Cc::Ae));
        }
        // What may be written may be read.
        let tag = if window.writes { context.write_tag } else { context.read_tag };
        dynasm!(self.asm ; .arch x64
            ; mov r14d, r15d
            ; shr r14d, 12
            ; gs xor r15, [r14*8 + tag]
        );
        let last = 4096 - window.span as i32;
        dynasm!(self.asm ; .arch x64 ; cmp r15, last);
        from.add(self.asm.jcc(Cc::A));
        if window.step != 0 {
            if window.step > 0 {
                dynasm!(self.asm ; .arch x64 ; mov eax, last ; sub eax, r15d);
            } else {
                dynasm!(self.asm ; .arch x64 ; mov eax, r15d);
            }
            self.divide(window.step.unsigned_abs());
            self.asm.alu_r_rm(Alu::Cmp, true, RAX, counter);
            self.asm.cmov(Cc::Ae, true, RAX, counter);
            self.asm.mov_rm_r(true, counter, RAX);
        }
        dynasm!(self.asm ; .arch x64 ; gs mov r14, [r14*8 + context.addend]);
        self.asm.mov_rm_r(true, Rm::Env(self.be.slot_disp(window.place)), R14);
        if let Some(reg) = window.reg {
            self.mov(reg, Opnd::Reg(R14));
        }
        from
    }

    /// `rax`, below 4096, divided by a number below 4096.
    fn divide(&mut self, by: u64) {
        if by.is_power_of_two() {
            if by > 1 {
                self.asm.shift_i(Shift::Shr, true, Rm::Reg(RAX), by.trailing_zeros() as u8);
            }
            return;
        }
        // The error of the reciprocal, below `by` / 2^24, times what is divided is below 1: too small to matter.
        let reciprocal = (1u64 << 24).div_ceil(by) as i32;
        dynasm!(self.asm ; .arch x64 ; imul rax, rax, reciprocal ; shr rax, 24);
    }

    /// Whether one of these operations has a window, and is being lowered for the rounds in which it may leave it: another
    /// page each time, for which no range entry is worth filling. (Loops known to have few rounds run there too.)
    pub(super) fn leaves_windows(&self, ops: std::ops::Range<usize>) -> bool {
        let first_rounds = self.windows.left.is_none() && self.looped.is_some_and(|l| !l.in_copy);
        first_rounds && self.windows.any_of(ops)
    }

    /// Where the access at `base + off` being lowered is, if it is in a window. Clobbers `r14`.
    pub(super) fn windowed(&mut self, base: Val, off: i32) -> Option<Rm> {
        if !self.in_windows() {
            return None;
        }
        let window = self.windows.of(self.next.checked_sub(1)?)?;
        let (reg, place) = (window.reg, Rm::Env(self.be.slot_disp(window.place)));
        Some(match (self.val(base), reg) {
            (Opnd::Reg(base), Some(reg)) => Rm::Mem { base, index: Some(reg), disp: off },
            (Opnd::Reg(base), None) => {
                self.asm.mov_r_rm(true, R14, place);
                Rm::Mem { base, index: Some(R14), disp: off }
            }
            (from, Some(reg)) => {
                self.mov(R14, from);
                Rm::Mem { base: R14, index: Some(reg), disp: off }
            }
            (from, None) => {
                self.mov(R14, from);
                self.asm.alu_r_rm(Alu::Add, true, R14, place);
                self.flags_lost();
                Rm::Mem { base: R14, index: None, disp: off }
            }
        })
    }

    /// Takes a round off the counter; the carry says that there was none left.
    pub(super) fn count_round(&mut self) {
        let counter = match self.windows.counter {
            Some(reg) => Rm::Reg(reg),
            None => Rm::Env(self.be.slot_disp(COUNTER)),
        };
        self.asm.alu_rm_i(Alu::Sub, true, counter, 1);
    }

    /// After something was called: what was held is brought back, but only for the rest of the round.
    pub(super) fn hold_for_round(&mut self) {
        match self.windows.counter {
            Some(reg) => self.asm.mov_ri(reg, 0),
            None => self.asm.mov_rm_i(true, Rm::Env(self.be.slot_disp(COUNTER)), 0),
        }
        for i in 0..self.windows.list.len() {
            if let Some(&Window { place, reg: Some(reg), .. }) = self.windows.list.get(i) {
                self.asm.mov_r_rm(true, reg, Rm::Env(self.be.slot_disp(place)));
            }
        }
    }
}

/// Pinned slots that a loop's body does not touch, with their registers.
pub(super) fn untouched<'a>(be: &'a X86_64, body: &[Op]) -> impl Iterator<Item = (u8, Slot)> + use<'a> {
    let mut touched = [false; SLOTS];
    for op in body {
        let mut note = |slot: Slot| {
            if let Some(there) = touched.get_mut(usize::from(slot.0)) {
                *there = true;
            }
        };
        for_each_read(op, &mut note);
        for_each_written(op, &mut note);
    }
    let free = move |slot: Slot| touched.get(usize::from(slot.0)).is_some_and(|touched| !touched);
    be.pinned.iter().copied().filter(move |&(_, owner)| owner.0 < FIRST_TEMP && free(owner))
}
