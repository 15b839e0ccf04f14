//! Where the guest's flags are: in the host's, in the [`FLAGS`] slot, or nowhere, with a way to compute them again.
//!
//! Guest operations that set flags are the host's own, so their flags are in the host's flags when they have been
//! done, and an operation that tests them right behind uses them there. What else may want them:
//!
//! * *hard* needs: another test after the host's flags are gone, a way out of the block, a helper;
//! * *soft* needs: an access that faults. They are needed only if it does, so code for that is cold.
//!
//! A pass from the block's end ([`passes`]) finds for each operation which flags are needed after it. An operation
//! whose flags nobody needs, as is the rule, costs nothing more than itself (or nothing at all, if it is a compare).
//! For the others, a look ahead ([`Lower::plan`]) finds out whether the host's flags and the [`Recipe`] cover all
//! needs; if not, the flags are saved to their slot, as late as the host still has them.

mod apart;
mod passes;

pub(super) use self::passes::{needs, needs_but_for, needs_in_stretch};
use super::flagged::{Form, form_of};
use super::{Cold, Lower, Opnd};
use crate::asm::{Alu, Cc, Map, R14, R15, RAX, Rm, fits32};
use dynasm::dynasm;
use dynasmrt::DynasmApi;
use mimus_tcg_ir::flags::{self, FLAGS, Flags, How, Recipe};
use mimus_tcg_ir::unit::{UnitInsn, UnitMemory};
use mimus_tcg_ir::verify::{flags_read, flags_written, for_each_written};
use mimus_tcg_ir::{AluOp, CallKind, CondF, FIRST_TEMP, FlagOp, Op, Size, Slot, Ty, UnOp, Val};

/// Which flags are needed after an operation.
#[derive(Clone, Copy, Default, Debug)]
pub(super) struct Needs {
    hard: Flags,
    soft: Flags,
    own: Own,
}

/// What an operation has to do with flags itself: found once, since looking ahead asks again and again. In one word, which no
/// copy of it has to put together: sets of flags from bits 0, 12, 24 and 36 on, and the bits below.
#[derive(Clone, Copy, Default)]
pub(super) struct Own(u64);

impl Own {
    const FAULTS: u64 = 1 << 48;
    const PRODUCES: u64 = 1 << 49;
    /// [`only_looks`], [`keeps_host`].
    const ONLY_LOOKS: u64 = 1 << 50;
    const KEEPS_HOST: u64 = 1 << 51;
    /// It may be another operation's recipe that it spoils.
    const WRITES: u64 = 1 << 52;
    /// What it is.
    const BRANCH: u64 = 1 << 53;
    const RMW: u64 = 1 << 54;
    const DIVISION: u64 = 1 << 55;
    /// It calls what may change all flags.
    const CALLS: u64 = 1 << 56;

    #[inline]
    fn of(op: &Op, after: Option<&Op>) -> Own {
        // What most operations are has nothing to do with flags.
        match op {
            Op::Insn { .. } => Own(Own::ONLY_LOOKS | Own::KEEPS_HOST),
            Op::Load { .. } => Own(Own::FAULTS | Own::WRITES),
            Op::Store { .. } => Own(Own::FAULTS),
            Op::Lea { .. } | Op::GetPc { .. } | Op::SetPart { .. } | Op::GetHigh { .. } | Op::SetHigh { .. } => {
                Own(Own::KEEPS_HOST | Own::WRITES)
            }
            Op::Alu { .. } | Op::Un { .. } => Own(if keeps_host(op) { Own::KEEPS_HOST } else { 0 } | Own::WRITES),
            _ => Own::of_other(op, after),
        }
    }

    fn of_other(op: &Op, after: Option<&Op>) -> Own {
        let (may, must) = flags_written(op);
        let (reads, in_slot) = (flags_read(op), needed_in_slot(op, after));
        let produces = match op {
            Op::SetFlags { .. } | Op::FlipFlags { .. } => on_host(op),
            _ => !may.is_empty(),
        };
        let kind = match op {
            Op::BranchF { .. } => Own::BRANCH,
            Op::Rmw { .. } => Own::RMW,
            Op::DivWideF { .. } => Own::DIVISION,
            Op::Rep(_) | Op::Call { kind: CallKind::MayExit, .. } => Own::CALLS,
            _ => 0,
        };
        let when = |bit: u64, holds: bool| if holds { bit } else { 0 };
        let (faults, keeps) = (when(Own::FAULTS, may_fault(op)), when(Own::KEEPS_HOST, keeps_host(op)));
        let (produces, looks) = (when(Own::PRODUCES, produces), when(Own::ONLY_LOOKS, only_looks(op)));
        let bits = kind | Own::WRITES | faults | keeps | produces | looks;
        let sets = [may, must, reads, in_slot].iter().rev().fold(0, |all, set| all << 12 | u64::from(set.0));
        Own(bits | sets)
    }

    const fn set(self, at: u32) -> Flags {
        Flags((self.0 >> at & 0xfff) as u16)
    }

    /// The flags that it may change, and those that it changes in any case.
    const fn may(self) -> Flags {
        self.set(0)
    }

    const fn must(self) -> Flags {
        self.set(12)
    }

    const fn reads(self) -> Flags {
        self.set(24)
    }

    const fn in_slot(self) -> Flags {
        self.set(36)
    }

    /// Whether any of `bits` is set.
    const fn is(self, bits: u64) -> bool {
        self.0 & bits != 0
    }

    /// Whether it neither changes nor looks at flags, nor needs them in their slot.
    const fn is_indifferent(self) -> bool {
        self.0 & ((1 << 48) - 1) == 0
    }

    /// The flags that must be in the host's before the operation, if those `after` are needed behind it.
    fn carried(self, after: Flags) -> Flags {
        if !self.is(Own::PRODUCES) || !after.intersects(self.may()) {
            return self.reads();
        }
        self.reads().union(after.without(self.must()))
    }
}

impl std::fmt::Debug for Own {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:#x}", self.0)
    }
}

impl Needs {
    fn any(self) -> Flags {
        self.hard.union(self.soft)
    }
}

/// Where in the frame a product's OF is, which is its CF too.
const PRODUCT: i32 = 16;

/// The recipe of a product's flags that are in the frame.
const PRODUCT_RECIPE: Recipe =
    Recipe { how: How::Product, size: Size::B4, from: Val::Imm(0), b: Val::Imm(0), carry_in_slot: false };

/// A routine that saves the flags, by its number in [`Lower::routines`]; or none.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Routine(u32);

impl Routine {
    pub(super) const NONE: Routine = Routine(u32::MAX);
}

/// No recipe, in a side table's entry.
pub(super) const NOT_NOTED: u16 = u16::MAX;

/// Where the flags are.
#[derive(Clone, Copy, Debug)]
pub(super) struct FlagState {
    /// Those that the host's flags are.
    in_host: Flags,
    /// Those that the slot has.
    in_slot: Flags,
    recipe: Option<Recipe>,
    /// Where the recipe's cold code is, once an access needs it.
    routine: Routine,
    /// The recipe's number in the block's side table, once an access needs it.
    noted: u16,
    /// Before which operation the flags are to be saved.
    save_before: usize,
}

impl Default for FlagState {
    fn default() -> FlagState {
        FlagState {
            in_host: Flags::NONE,
            in_slot: Flags::ALL,
            recipe: None,
            routine: Routine::NONE,
            noted: NOT_NOTED,
            save_before: usize::MAX,
        }
    }
}

/// The flags needed in the slot by an operation itself, before it.
fn needed_in_slot(op: &Op, after: Option<&Op>) -> Flags {
    match *op {
        Op::BranchF { dead, .. } => Flags::ALL.without(dead),
        Op::DeadFlags { mask } if after.is_some_and(Op::is_terminal) => Flags::ALL.without(mask),
        Op::Branch { .. }
        | Op::Jump { .. }
        | Op::JumpReg { .. }
        | Op::Dispatch
        | Op::Rep(_)
        | Op::Call { kind: CallKind::MayExit, .. }
        | Op::GetFlags { .. } => Flags::ALL,
        Op::SetFlags { .. } | Op::FlipFlags { .. } if on_host(op) => Flags::NONE,
        Op::SetFlags { mask, .. } => Flags::ALL.without(mask),
        Op::FlipFlags { .. } => Flags::ALL,
        _ => Flags::NONE,
    }
}

/// Whether an operation may find that it cannot be done, or asks to be done otherwise.
fn may_fault(op: &Op) -> bool {
    matches!(
        op,
        Op::Load { .. }
            | Op::Store { .. }
            | Op::LoadReserved { .. }
            | Op::StoreConditional { .. }
            | Op::Amo { .. }
            | Op::Rmw { .. }
            | Op::CmpXchg { .. }
            | Op::GuardEnv { .. }
            | Op::Guard { .. }
            | Op::GuardFits { .. }
            | Op::DivWideF { .. }
            | Op::Unit { insn: UnitInsn { memory: UnitMemory::Load | UnitMemory::Store, .. }, .. }
    )
}

/// Changes of the carry that the host has an instruction for: `clc`, `stc`, `cmc`.
fn on_host(op: &Op) -> bool {
    matches!(op, Op::SetFlags { a: Val::Imm(_), mask: Flags::CF } | Op::FlipFlags { mask: Flags::CF })
}

/// Whether an operation computes flags in the host's.
fn produces(op: &Op) -> bool {
    match op {
        Op::SetFlags { .. } | Op::FlipFlags { .. } => on_host(op),
        op => !flags_written(op).0.is_empty(),
    }
}

/// The bits of the slot that hold a set of flags.
fn slot_bits(mask: Flags) -> i32 {
    mask.pack() as i32 & !0x200
}

/// Whether lowering an operation leaves the host's flags alone if they matter ([`Lower::keep_flags`]).
fn keeps_host(op: &Op) -> bool {
    match *op {
        Op::Insn { .. }
        | Op::DeadFlags { .. }
        | Op::Lea { .. }
        | Op::SetPart { .. }
        | Op::GetHigh { .. }
        | Op::SetHigh { .. }
        | Op::LoadEnv { .. }
        | Op::StoreEnv { .. }
        | Op::SetEnvByte { .. }
        | Op::GetPc { .. }
        | Op::SetCondF { .. }
        | Op::CMovF { .. }
        | Op::BranchF { .. }
        | Op::Count { .. }
        | Op::TraceBlock { .. }
        | Op::TraceAccess { .. }
        | Op::TraceValue { .. }
        | Op::AluF { op: FlagOp::Not, .. } => true,
        Op::Un { op, .. } => {
            matches!(op, UnOp::Mov | UnOp::SextB | UnOp::SextH | UnOp::SextW | UnOp::ZextB | UnOp::ZextH | UnOp::ZextW)
        }
        Op::Unit { insn, .. } => insn.memory == UnitMemory::None && !insn.sets_flags,
        // As `lea`.
        Op::Alu { op: AluOp::Add, ty, .. } => ty != Ty::I32,
        Op::Alu { op: AluOp::Sub, ty, b: Val::Imm(_), .. } => ty != Ty::I32,
        _ => false,
    }
}

/// Whether an operation only looks at flags: it leaves them in the host's if it finds them there, and saving them
/// can wait until after it.
fn only_looks(op: &Op) -> bool {
    matches!(op, Op::Insn { .. } | Op::SetCondF { .. } | Op::CMovF { .. } | Op::BranchF { .. })
}

/// The recipe for the flags of an operation, if there is one. `carry_in_slot`: whether the slot has the CF that
/// was before it (or nobody needs it).
fn recipe_of(op: &Op, carry_in_slot: bool) -> Option<Recipe> {
    let Op::AluF { op, size, d, a, b } = *op else { return None };
    let recipe = |how, from, b, carry_in_slot| Some(Recipe { how, size, from, b, carry_in_slot });
    let changed = |v: Val| d.is_some_and(|d| v == Val::Slot(d));
    let result = Val::Slot(d.unwrap_or(Slot(0)));
    let found = match op {
        // Results of 1 or 2 bytes are in a slot whose other bytes do not count.
        FlagOp::And | FlagOp::Or | FlagOp::Xor if changed(a) || changed(b) => {
            recipe(How::Test, result, Val::Imm(0), false)
        }
        FlagOp::Add if changed(b) && !changed(a) => recipe(How::UndoAnd(op), result, a, false),
        FlagOp::Add | FlagOp::Sub if changed(a) && !changed(b) => recipe(How::UndoAnd(op), result, b, false),
        FlagOp::Neg if changed(a) => recipe(How::UndoAnd(op), result, Val::Imm(0), false),
        FlagOp::Inc | FlagOp::Dec if !carry_in_slot => None,
        FlagOp::Inc | FlagOp::Dec if changed(a) => recipe(How::UndoAnd(op), result, Val::Imm(0), true),
        FlagOp::Inc | FlagOp::Dec => recipe(How::Again(op), a, Val::Imm(0), true),
        FlagOp::Add | FlagOp::Sub | FlagOp::And | FlagOp::Or | FlagOp::Xor | FlagOp::Neg
            if !changed(a) && !changed(b) =>
        {
            recipe(How::Again(op), a, b, false)
        }
        _ => None,
    };
    // Temporaries are soon something else, and one register is all there is for constants and results.
    let lasting = |v: Val| match v {
        Val::Slot(slot) => slot.0 < FIRST_TEMP,
        Val::Imm(imm) => size != Size::B8 || fits32(imm),
    };
    found.filter(|r| lasting(r.from) && lasting(r.b))
}

/// Whether it is one instruction.
fn is_short(recipe: Recipe) -> bool {
    !recipe.carry_in_slot && matches!(recipe.how, How::Test | How::Again(FlagOp::Sub | FlagOp::And))
}

/// Whether an operation changes what the recipe starts from.
fn is_spoilt(recipe: Recipe, op: &Op) -> bool {
    let mut spoilt = matches!(op, Op::Call { kind: CallKind::MayExit, .. });
    for_each_written(op, |d| spoilt |= recipe.from == Val::Slot(d) || recipe.b == Val::Slot(d));
    spoilt
}

impl Lower<'_> {
    /// The flags needed after the operation being lowered.
    fn needs_now(&self) -> Needs {
        self.needs.get(self.next.wrapping_sub(1)).copied().unwrap_or_default()
    }

    /// What the operation being lowered has to do with flags. (Lowering it may go on to the ones behind it.)
    #[inline]
    pub(super) fn own_now(&self) -> Own {
        self.needs_now().own
    }

    /// Displacement of the slot.
    fn flags_disp(&self) -> i32 {
        debug_assert!(self.pin_of(FLAGS).is_none(), "the flags are in memory");
        self.be.slot_disp(FLAGS)
    }

    /// An instruction of 16 bits on the slot, with a displacement of a byte if it has one.
    fn on_flags(&mut self, map: Map, opcode: u8, reg: u8) {
        let place = Rm::Env(self.flags_disp());
        self.asm.push(0x66);
        self.asm.ins(map, false, opcode, reg, place);
    }

    /// CF of the slot to the host's.
    fn carry_from_slot(&mut self) {
        // bt word, 8
        self.on_flags(Map::Of, 0xba, 4);
        self.asm.push(8);
    }

    /// Whether lowering must leave the host's flags alone.
    #[inline]
    pub(super) fn keep_flags(&self) -> bool {
        self.flags.in_host.intersects(self.needs_now().hard)
    }

    /// Before operation `index`: saves the flags if that was planned.
    #[inline]
    pub(super) fn flags_before(&mut self, index: usize) {
        if self.flags.save_before == index {
            self.save_flags();
            self.cached = None;
        }
    }

    /// After an operation has been lowered: what is left of the flags.
    #[inline]
    pub(super) fn flags_after(&mut self, op: &Op, own: Own) {
        if self.flags.recipe.is_some_and(|recipe| own.is(Own::WRITES) && is_spoilt(recipe, op))
            && !own.is(Own::PRODUCES)
        {
            self.flags.recipe = None;
        }
        if own.is(Own::CALLS) {
            self.flags = FlagState { save_before: self.flags.save_before, ..FlagState::default() };
        } else if !(own.is(Own::PRODUCES | Own::ONLY_LOOKS)
            || own.is(Own::KEEPS_HOST) && (self.kept || self.keep_flags()))
        {
            // (Flags that the operation has brought there itself are kept too.)
            self.flags.in_host = Flags::NONE;
        }
    }

    /// The host's flags have been overwritten.
    pub(super) fn flags_lost(&mut self) {
        self.flags.in_host = Flags::NONE;
    }

    /// Whether anybody looks at the flags that an operation sets.
    pub(super) fn flags_wanted(&self, op: &Op) -> bool {
        self.flags_wanted_at(self.next.wrapping_sub(1), op)
    }

    /// The same of the operation with number `index`.
    pub(super) fn flags_wanted_at(&self, index: usize, op: &Op) -> bool {
        let needs = self.needs.get(index).copied().unwrap_or_default();
        needs.any().intersects(flags_written(op).0)
    }

    /// Before an operation: gets the flags that it uses, or leaves alone and somebody needs, into the host's.
    /// Clobbers `rax`, and `r14` but for an [`Op::Rmw`].
    pub(super) fn flags_for(&mut self, op: &Op) {
        if self.only_faults_want(op) {
            self.product = true;
            return;
        }
        let wanted = self.carried(op, self.needs_now());
        self.flags_to_host(wanted, !matches!(op, Op::Rmw { .. }));
    }

    /// Whether an operation is a product whose flags only faults look at, with the flags that it leaves alone in the slot.
    fn only_faults_want(&self, op: &Op) -> bool {
        // (At a fault of compact code it is the runtime that follows recipes, which cannot look into the frame.)
        if self.compact || !matches!(op, Op::AluF { op: FlagOp::Mul, .. } | Op::MulWideF { .. }) {
            return false;
        }
        let (after, (_, must)) = (self.needs_now(), flags_written(op));
        after.hard.is_empty()
            && after.soft.intersects(must)
            && self.flags.in_slot.contains(after.any().without(must))
            && self.plan(Some(PRODUCT_RECIPE), Flags::ALL) == usize::MAX
    }

    /// The flags that operation `index` needs in the host's before it.
    pub(super) fn carried_at(&self, index: usize, op: &Op) -> Flags {
        self.carried(op, self.needs.get(index).copied().unwrap_or_default())
    }

    /// Whether an operation needs flags in the host's before it.
    pub(super) fn carries(&self, op: &Op) -> bool {
        !self.carried(op, self.needs_now()).is_empty()
    }

    /// Gets the flags that a condition looks at: the condition to test for in the host's flags, which is another one
    /// if the slot is tested in place of the flags themselves. Clobbers `rax` and `r14`.
    pub(super) fn condition(&mut self, cond: CondF) -> Cc {
        let wanted = flags::read_by(cond);
        let cc = super::flagged::cc_of(cond);
        if self.flags.in_host.contains(wanted) || self.flags.recipe.is_some_and(is_short) {
            self.flags_to_host(wanted, true);
            return cc;
        }
        // Those that depend on one flag being set, or one of two.
        let bits = match cond {
            CondF::L | CondF::Ge | CondF::Le | CondF::G => 0,
            _ => slot_bits(wanted) as i16,
        };
        if bits == 0 || !self.flags.in_slot.contains(wanted) {
            self.flags_to_host(wanted, true);
            return cc;
        }
        // As wide as the store before it: half of it would wait until that has left the store buffer.
        self.on_flags(Map::Base, 0xf7, 0);
        self.asm.push_i16(bits);
        self.flags.in_host = Flags::NONE;
        // The even condition of each pair is the one that a set flag makes true, but for `a` and the like.
        let set = (cond as u8) & 1 == 0;
        if set { Cc::Ne } else { Cc::E }
    }

    /// The flags that must be in the host's before an operation.
    fn carried(&self, op: &Op, after: Needs) -> Flags {
        let (may, must) = flags_written(op);
        let reads = flags_read(op);
        if !produces(op) || !after.any().intersects(may) {
            return reads;
        }
        reads.union(after.any().without(must))
    }

    /// Gets flags into the host's; by a recipe only if `r14` is free.
    fn flags_to_host(&mut self, wanted: Flags, r14_free: bool) {
        if self.flags.in_host.contains(wanted) {
            return;
        }
        let in_slot = self.flags.in_slot.contains(wanted);
        if let Some(recipe) = self.flags.recipe.filter(|r| r14_free && (!in_slot || is_short(*r))) {
            self.follow(recipe);
            self.flags.in_host = Flags::ALL;
            return;
        }
        debug_assert!(self.flags.in_slot.contains(wanted), "flags {wanted} are nowhere: {:?}", self.flags);
        if wanted == Flags::CF {
            // As wide as the store before it: a wider load would wait until that has left the store buffer.
            self.carry_from_slot();
            self.flags.in_host = Flags::CF;
        } else {
            self.restore_flags();
        }
    }

    /// After the host's instruction for an operation that sets flags: they are the host's now. Call it once the
    /// operation's result is in place: saving clobbers `rax`.
    pub(super) fn flags_from(&mut self, op: &Op) {
        let (may, must) = flags_written(op);
        let after = self.needs_now();
        let before = self.flags;
        if std::mem::take(&mut self.product) {
            dynasm!(self.asm ; .arch x64 ; seto BYTE [rsp + PRODUCT]);
            let in_slot = before.in_slot.without(may);
            self.flags = FlagState { in_slot, recipe: Some(PRODUCT_RECIPE), ..FlagState::default() };
            return;
        }
        let wanted = after.any().intersects(may);
        if !wanted {
            // Nobody looks at them; whatever is in the slot is as good.
            self.flags.in_host = Flags::NONE;
            self.flags.recipe = before.recipe.filter(|recipe| !is_spoilt(*recipe, op));
            self.flags.in_slot = before.in_slot.without(may);
            return;
        }
        if matches!(op, Op::DivWideF { .. }) {
            return self.flags_of_division(after);
        }
        // What was carried is in the host's too. (An operation that may leave flags alone found them there.)
        let in_host = Flags::ALL;
        let carry_in_slot = before.in_slot.contains(Flags::CF) || !after.any().contains(Flags::CF);
        let recipe = recipe_of(op, carry_in_slot).filter(|_| must == Flags::ALL || is_step(op));
        self.flags = FlagState {
            in_host,
            in_slot: before.in_slot.without(may),
            recipe,
            routine: Routine::NONE,
            noted: NOT_NOTED,
            save_before: self.plan(recipe, in_host),
        };
        if self.flags.save_before == self.next {
            self.save_flags();
            self.cached = None;
        }
    }

    /// A division's flags are constants, beside those that it leaves in the slot.
    fn flags_of_division(&mut self, after: Needs) {
        let (disp, new) = (self.flags_disp(), flags::after_division(Flags::NONE).pack());
        let kept = after.any().and(flags::KEPT_BY_DIVISION);
        if kept.is_empty() {
            dynasm!(self.asm ; .arch x64 ; mov WORD [rbp + disp], new as i16);
        } else {
            debug_assert!(self.flags.in_slot.contains(kept), "flags {kept} are not in their slot: {:?}", self.flags);
            let bits = slot_bits(flags::KEPT_BY_DIVISION);
            dynasm!(self.asm ; .arch x64
                ; movzx eax, WORD [rbp + disp]
                ; and eax, bits
                ; or eax, new as i32
                ; mov [rbp + disp], ax
            );
            self.cached = None;
        }
        self.flags = FlagState::default();
    }

    /// Whether the flags of the operation being lowered will be saved right behind it, which clobbers `rax`.
    pub(super) fn saves_next(&self, op: &Op) -> bool {
        let (may, must) = flags_written(op);
        let after = self.needs_now();
        if !after.any().intersects(may) {
            return false;
        }
        let carry_in_slot = self.flags.in_slot.contains(Flags::CF) || !after.any().contains(Flags::CF);
        let recipe = recipe_of(op, carry_in_slot).filter(|_| must == Flags::ALL || is_step(op));
        self.plan(recipe, Flags::ALL) == self.next
    }

    /// Looks ahead from behind an operation whose flags are in the host's: before which operation they must be
    /// saved, if at all.
    fn plan(&self, recipe: Option<Recipe>, in_host: Flags) -> usize {
        let pending = self.needs_now().any();
        if in_host.is_empty() || pending.is_empty() {
            return usize::MAX;
        }
        let changed = self.needs_now().own.may();
        self.plan_from(self.next, pending, (recipe, self.flags.in_slot.without(changed)), true)
    }

    /// The same from operation `first` on, before which flags `pending` are needed. `host`: the host's flags have them.
    fn plan_from(
        &self,
        first: usize,
        mut pending: Flags,
        (mut recipe, in_slot_already): (Option<Recipe>, Flags),
        mut host: bool,
    ) -> usize {
        let never = usize::MAX;
        let mut latest = first;
        let mut only_looked = true;
        let bare = recipe.is_none();
        let ops = self.ops.get(first..).unwrap_or_default();
        for (i, op) in ops.iter().enumerate() {
            let index = first + i;
            let after = self.needs.get(index).copied().unwrap_or_default();
            let own = after.own;
            // With a recipe, an access before it may go on in the stretch's copy without having saved them.
            let checked = bare && self.is_checked_rmw(index, op);
            if own.is(Own::FAULTS) && recipe.is_none() && !checked {
                return latest;
            }
            if !own.is_indifferent() {
                let closes = self.looped.is_some_and(|l| l.edge == index);
                // A way out of the block saves them where it is taken.
                let saves = host && own.is(Own::BRANCH);
                let in_slot = !closes && !saves && own.in_slot().intersects(pending);
                let in_division = own.is(Own::DIVISION) && after.any().and(flags::KEPT_BY_DIVISION).intersects(pending);
                if in_slot || in_division {
                    return latest;
                }
                let carried = own.carried(after.any());
                if carried.intersects(pending) {
                    // A memory operation looks its address up first, mostly.
                    host &= checked || !own.is(Own::RMW);
                    match (host, recipe) {
                        (true, _) => {}
                        // What the slot has is looked at there, and brings no other flag to the host's.
                        (false, Some(_)) if !own.is(Own::RMW) => {
                            host = !in_slot_already.contains(carried);
                        }
                        _ => return latest,
                    }
                }
                if own.is(Own::PRODUCES) && after.any().intersects(own.may()) {
                    // Its own plan covers what it leaves.
                    return never;
                }
                pending = pending.without(own.must());
            }
            pending = pending.and(after.any());
            if pending.is_empty() {
                return never;
            }
            if own.is(Own::WRITES) {
                recipe = recipe.filter(|recipe| !is_spoilt(*recipe, op));
            }
            host &= own.is(Own::ONLY_LOOKS) || own.is(Own::KEEPS_HOST) && pending.intersects(after.hard);
            only_looked &= own.is(Own::ONLY_LOOKS) && host;
            if only_looked && !matches!(op, Op::Insn { .. }) {
                latest = index + 1;
            }
        }
        never
    }

    /// For the cold code of an access: the routine that saves the flags, if they are not in their slot.
    pub(super) fn flags_at_fault(&mut self) -> Routine {
        match self.needed_at_fault() {
            Some(needed) => self.flags_wanted_in_slot(needed),
            None => Routine::NONE,
        }
    }

    /// For an access whose place in the side table says what else is to be known: the number of the recipe.
    pub(super) fn recipe_at_fault(&mut self) -> u16 {
        let Some(needed) = self.needed_at_fault().filter(|needed| !self.flags.in_slot.contains(*needed)) else {
            return NOT_NOTED;
        };
        let Some(recipe) = self.flags.recipe else {
            debug_assert!(false, "flags {needed} are nowhere at a fault: {:?}", self.flags);
            return NOT_NOTED;
        };
        if self.flags.noted == NOT_NOTED {
            // A block has fewer operations.
            self.flags.noted = self.info.recipes.len() as u16;
            self.info.recipes.push(recipe);
        }
        self.flags.noted
    }

    /// What is needed before the operation: it may fault, so whatever was needed after the one before it.
    fn needed_at_fault(&self) -> Option<Flags> {
        self.needs.get(self.next.wrapping_sub(2)).map(|needs| needs.any())
    }

    /// The routine that saves the flags, unless those `needed` are in their slot.
    pub(super) fn flags_wanted_in_slot(&mut self, needed: Flags) -> Routine {
        if self.flags.in_slot.contains(needed) {
            return Routine::NONE;
        }
        let Some(recipe) = self.flags.recipe else {
            debug_assert!(false, "flags {needed} are nowhere at a fault: {:?}", self.flags);
            return Routine::NONE;
        };
        if self.flags.routine == Routine::NONE {
            let number = self.routines.len() as u32;
            self.routines.push(0);
            self.put_off(Cold::Flags { recipe, number });
            self.flags.routine = Routine(number);
        }
        self.flags.routine
    }

    /// In cold code: calls a routine that [`Lower::flags_at_fault`] gave. Clobbers `r14`.
    pub(super) fn save_at_fault(&mut self, routine: Routine) {
        if let Some(at) = self.routines.get(routine.0 as usize) {
            self.asm.call_back(*at);
        }
    }

    /// The routine: computes the flags and saves them. Every register stays but `r14`.
    pub(super) fn flags_routine(&mut self, recipe: Recipe, number: u32) {
        let at = self.asm.pos();
        if let Some(place) = self.routines.get_mut(number as usize) {
            *place = at;
        }
        // The frame's second word, behind the return address.
        dynasm!(self.asm ; .arch x64 ; mov [rsp + 16], rax);
        if recipe.how == How::Product {
            self.product_to_host(PRODUCT + 8);
        } else {
            self.follow(recipe);
        }
        self.save_at_exit();
        dynasm!(self.asm ; .arch x64
            ; mov rax, [rsp + 16]
            ; ret
        );
    }

    /// A product's flags to the host's; `at`: where its OF is. Clobbers `rax` and `r14`.
    fn product_to_host(&mut self, at: i32) {
        let disp = self.flags_disp();
        let kept = !slot_bits(Flags::CF.union(Flags::OF));
        dynasm!(self.asm ; .arch x64
            ; movzx eax, WORD [rbp + disp]
            ; and eax, kept
            ; movzx r14d, BYTE [rsp + at]
            ; imul r14d, r14d, 0x101
            ; or eax, r14d
            ; add al, 127
            ; sahf
        );
    }

    /// Computes flags by a recipe. Clobbers `r14`, and for a product's `rax`.
    fn follow(&mut self, recipe: Recipe) {
        let (from, b) = (self.home_val(recipe.from), self.home_val(recipe.b));
        let size = recipe.size;
        if recipe.carry_in_slot {
            self.carry_from_slot();
        }
        match recipe.how {
            How::Product => self.product_to_host(PRODUCT),
            How::Test => match from {
                Opnd::Reg(r) => self.asm.sized(Map::Base, size, 0x84, r, Rm::Reg(r)),
                from => {
                    self.mov(R14, from);
                    self.asm.sized(Map::Base, size, 0x84, R14, Rm::Reg(R14));
                }
            },
            How::Again(FlagOp::Sub) if matches!(from, Opnd::Reg(_)) => {
                let place = self.as_rm(from, R14);
                self.classic_at(Alu::Cmp, size, place, b, R14);
            }
            How::Again(FlagOp::And) if matches!((from, b), (Opnd::Reg(_), Opnd::Reg(_) | Opnd::Imm(_))) => {
                self.test_f(size, from, b);
            }
            How::Again(op) => {
                self.mov(R14, from);
                self.step(op, size, b);
            }
            How::UndoAnd(op) => {
                self.mov(R14, from);
                let undo = match op {
                    FlagOp::Add => FlagOp::Sub,
                    FlagOp::Sub => FlagOp::Add,
                    FlagOp::Inc => FlagOp::Dec,
                    FlagOp::Dec => FlagOp::Inc,
                    other => other,
                };
                self.step(undo, size, b);
                self.step(op, size, b);
            }
        }
    }

    /// `op r14, b`.
    fn step(&mut self, op: FlagOp, size: Size, b: Opnd) {
        match form_of(op) {
            Form::Classic(alu) => self.classic_at(alu, size, Rm::Reg(R14), b, R15),
            Form::Unary(opcode, ext) => self.asm.sized_ext(Map::Base, size, opcode, ext, Rm::Reg(R14)),
            _ => {}
        }
    }

    /// The host's flags from the slot. Clobbers `rax`.
    pub(super) fn restore_flags(&mut self) {
        // movzx eax, word; 127 + 1 overflows.
        let place = Rm::Env(self.flags_disp());
        self.asm.ins(Map::Of, false, 0xb7, RAX, place);
        dynasm!(self.asm ; .arch x64
            ; add al, 127
            ; sahf
        );
        self.flags.in_host = self.flags.in_slot;
    }

    /// Whether flags that are needed where a branch leads, all but `dead`, are in the host's alone.
    pub(super) fn saves_at_exit(&self, dead: Flags) -> bool {
        let needed = Flags::ALL.without(dead);
        if self.flags.in_slot.contains(needed) {
            return false;
        }
        debug_assert!(self.flags.in_host.contains(needed), "flags {needed} are nowhere at a branch: {:?}", self.flags);
        true
    }

    /// The host's flags to the slot, on a way that leads out of the block. Clobbers `rax`.
    pub(super) fn save_at_exit(&mut self) {
        if self.compact || self.in_cold && !self.info.hints.hot {
            // Three bytes shorter, where it does not matter otherwise. (Of a branch that is often mispredicted each jump more is
            // waited for.)
            return self.asm.call_abs(self.be.stubs.save_flags);
        }
        dynasm!(self.asm ; .arch x64
            ; lahf
            ; seto al
        );
        self.on_flags(Map::Base, 0x89, RAX);
    }

    /// The host's flags to the slot. Clobbers `rax`.
    pub(super) fn save_flags(&mut self) {
        self.save_at_exit();
        self.flags.in_slot = Flags::ALL;
        self.flags.save_before = usize::MAX;
    }

    pub(super) fn get_flags(&mut self, d: Slot) {
        let disp = self.flags_disp();
        dynasm!(self.asm ; .arch x64
            ; movzx r14d, BYTE [rbp + disp]
            ; shl r14d, 11
            ; movzx eax, BYTE [rbp + disp + 1]
            ; and eax, 0xd5
            ; or eax, r14d
        );
        self.set(d, RAX);
    }

    /// Flags from a value: in the slot, but for the carry alone.
    pub(super) fn set_flags(&mut self, op: &Op, a: Val, mask: Flags) {
        if on_host(op) {
            let set = matches!(a, Val::Imm(imm) if imm & 1 != 0);
            return self.change_carry(op, if set { 0xf9 } else { 0xf8 });
        }
        let disp = self.flags_disp();
        let bits = slot_bits(mask);
        if let Val::Imm(imm) = a {
            let value = slot_bits(Flags::from_eflags(imm as u64)) & bits;
            if bits != value {
                dynasm!(self.asm ; .arch x64 ; and WORD [rbp + disp], (!bits | value) as i16);
            }
            if value != 0 {
                dynasm!(self.asm ; .arch x64 ; or WORD [rbp + disp], value as i16);
            }
        } else {
            let a = self.home_val(a);
            self.mov(R14, a);
            dynasm!(self.asm ; .arch x64
                ; mov r15d, r14d
                ; shr r15d, 11
                ; and r15d, 1
                ; shl r14d, 8
                ; or r14d, r15d
            );
            self.asm.alu_rm_i(Alu::And, false, Rm::Reg(R14), bits);
            dynasm!(self.asm ; .arch x64 ; movzx r15d, WORD [rbp + disp]);
            self.asm.alu_rm_i(Alu::And, false, Rm::Reg(R15), !bits);
            self.asm.alu_r_rm(Alu::Or, false, R15, Rm::Reg(R14));
            dynasm!(self.asm ; .arch x64 ; mov [rbp + disp], r15w);
        }
        self.flags_in_slot(mask);
    }

    pub(super) fn flip_flags(&mut self, op: &Op, mask: Flags) {
        if on_host(op) {
            return self.change_carry(op, 0xf5);
        }
        let (disp, bits) = (self.flags_disp(), slot_bits(mask));
        dynasm!(self.asm ; .arch x64 ; xor WORD [rbp + disp], bits as i16);
        self.flags_in_slot(mask);
    }

    /// The slot has been changed: the flags in `mask` are there, and the others that are needed.
    fn flags_in_slot(&mut self, mask: Flags) {
        let in_slot = self.flags.in_slot.union(mask);
        self.flags = FlagState { in_slot, ..FlagState::default() };
    }

    /// `clc`, `stc` or `cmc`.
    fn change_carry(&mut self, op: &Op, opcode: u8) {
        if !self.flags_wanted(op) {
            return self.flags_from(op);
        }
        self.flags_for(op);
        self.asm.push(opcode);
        self.flags_from(op);
    }
}

/// The recipe for the flags that a branch behind `ops` tests, if whoever needs them in `ops`, executed again from the
/// start, can follow it: it is not spoilt before they are set anew, and nothing there tests them.
pub(super) fn around(ops: &[Op]) -> Option<Recipe> {
    let last = ops.iter().rposition(produces)?;
    let producer = ops.get(last)?;
    let recipe = recipe_of(producer, false).filter(|_| flags_written(producer).1 == Flags::ALL)?;
    if ops.iter().skip(last + 1).any(|op| is_spoilt(recipe, op)) {
        return None;
    }
    for (i, op) in ops.iter().enumerate() {
        if !flags_read(op).is_empty() || !needed_in_slot(op, ops.get(i + 1)).is_empty() {
            return None;
        }
        match (produces(op), flags_written(op).1 == Flags::ALL) {
            (true, true) => return Some(recipe),
            (true, false) => return None,
            (false, _) if is_spoilt(recipe, op) => return None,
            _ => {}
        }
    }
    None
}

impl FlagState {
    /// Before which operation they will be saved.
    pub(super) fn save_before(&self) -> usize {
        self.save_before
    }

    /// They are a product's, of which the frame has a part.
    pub(super) fn is_product(&self) -> bool {
        self.recipe.is_some_and(|recipe| recipe.how == How::Product)
    }

    /// Those that were saved a moment ago: all are in both places.
    pub(super) fn in_both() -> FlagState {
        FlagState { in_host: Flags::ALL, ..FlagState::default() }
    }

    /// Whether all are in the slot, and none are to be saved.
    pub(super) fn is_in_slot(&self) -> bool {
        self.in_slot == Flags::ALL && self.save_before == usize::MAX
    }

    pub(super) fn has_in_host(&self, flags: Flags) -> bool {
        self.in_host.contains(flags)
    }

    /// The flags are what `recipe` makes, and nowhere.
    pub(super) fn carried(recipe: Recipe) -> FlagState {
        FlagState { in_slot: Flags::NONE, recipe: Some(recipe), ..FlagState::default() }
    }

    /// Whether code lowered in one state is right in the other.
    pub(super) fn is_like(&self, other: &FlagState) -> bool {
        let parts = |s: &FlagState| (s.in_host, s.in_slot, s.recipe, s.save_before);
        parts(self) == parts(other)
    }
}

/// Whether an operation is `inc` or `dec`, whose recipe takes CF from the slot.
fn is_step(op: &Op) -> bool {
    matches!(op, Op::AluF { op: FlagOp::Inc | FlagOp::Dec, .. })
}
