//! Flags of a stretch and of its copy ([`super::super::stretch`]), in which they may be in different places: in the stretch, accesses that
//! it has checked do not fault, so flags stay in the host's across them; in the copy they are saved.
//!
//! Where a way leads from one to the other, both are made to agree, on the copy's side: it is the one that runs seldom.

use super::{FlagState, Lower, NOT_NOTED, PRODUCT, Routine};
use dynasm::dynasm;
use dynasmrt::DynasmApi;
use mimus_tcg_ir::flags::Flags;

impl FlagState {
    fn is_followed_as(&self, other: &FlagState) -> bool {
        self.recipe.is_some() && self.recipe == other.recipe
    }
}

impl Lower<'_> {
    /// The flags that are needed before operation `index`.
    fn needed_before(&self, index: usize) -> Flags {
        self.needs.get(index.wrapping_sub(1)).map_or(Flags::NONE, |needs| needs.any())
    }

    /// At the beginning of a stretch, operation `first`, of which other needs hold now: whether flags that are in a recipe alone are
    /// to be had from it all the same.
    pub(in super::super) fn lasts_in_stretch(&self, first: usize) -> bool {
        let pending = self.needed_before(first);
        let FlagState { recipe, in_slot, .. } = self.flags;
        in_slot.contains(pending) || self.plan_from(first, pending, (recipe, in_slot), false) == usize::MAX
    }

    /// In a copy, before operation `index`, to which ways lead from an access of the stretch's that missed, with the flags
    /// where `there` says: has them in the slot, unless both know the same recipe. Whether those ways have to do the same
    /// ([`Lower::flags_from_stretch`]).
    pub(in super::super) fn join_flags(&mut self, index: usize, there: FlagState) -> bool {
        let needed = self.needed_before(index);
        let (mine, theirs) = (self.flags.in_slot.contains(needed), there.in_slot.contains(needed));
        if mine && theirs || !mine && !theirs && self.flags.is_followed_as(&there) {
            let in_slot = self.flags.in_slot.and(there.in_slot);
            let recipe = self.flags.recipe.filter(|_| !self.flags.is_product() || there.is_product());
            self.flags = FlagState { in_slot, recipe, ..self.flags };
            return false;
        }
        if !mine {
            self.flags_to_slot(needed);
        }
        let recipe = self.flags.recipe.filter(|_| self.flags.is_followed_as(&there));
        let in_slot = if theirs { self.flags.in_slot.and(there.in_slot) } else { self.flags.in_slot };
        self.flags = FlagState { in_slot, recipe, ..FlagState::default() };
        !theirs
    }

    /// On a way into a copy: flags that are nowhere but in the recipe of `there` to their slot.
    pub(in super::super) fn flags_from_stretch(&mut self, there: FlagState) {
        let here = self.flags;
        self.flags = FlagState { in_host: Flags::NONE, ..there };
        self.flags_to_slot(Flags::ALL);
        self.flags = here;
    }

    /// At the end of a copy, before operation `next`, where the stretch has the flags where `there` says: has them there too.
    pub(in super::super) fn flags_as_in_stretch(&mut self, next: usize, there: FlagState) {
        let needed = self.needed_before(next);
        let in_frame = there.is_product() && !there.in_slot.union(there.in_host).contains(needed);
        let by_product = in_frame && !self.flags.is_product();
        let in_slot = if by_product { needed } else { there.in_slot.and(needed) };
        if !self.flags.in_slot.contains(in_slot) {
            self.flags_to_slot(needed);
        }
        if by_product {
            let disp = self.flags_disp();
            // What the slot has of OF.
            dynasm!(self.asm ; .arch x64
                ; movzx r14d, BYTE [rbp + disp]
                ; mov [rsp + PRODUCT], r14b
            );
        }
        let in_host = there.in_host.and(needed);
        if !self.flags.in_host.contains(in_host) {
            self.keeping_rax(|l| match l.flags.recipe.filter(|_| !l.flags.in_slot.contains(in_host)) {
                Some(recipe) => l.follow(recipe),
                None => {
                    debug_assert!(l.flags.in_slot.contains(in_host), "flags {in_host} are nowhere: {:?}", l.flags);
                    l.restore_flags();
                }
            });
        }
    }

    /// Has the flags in their slot. Every register stays but `r14` and `r15`.
    fn flags_to_slot(&mut self, needed: Flags) {
        let in_host = self.flags.in_host.contains(needed);
        let recipe = self.flags.recipe.filter(|_| !in_host);
        debug_assert!(in_host || recipe.is_some(), "flags {needed} are nowhere: {:?}", self.flags);
        self.keeping_rax(|l| {
            if let Some(recipe) = recipe {
                l.follow(recipe);
            }
            l.save_at_exit();
        });
        if recipe.is_some() {
            self.flags.in_host = Flags::ALL;
        }
        self.flags.in_slot = Flags::ALL;
        (self.flags.routine, self.flags.noted) = (Routine::NONE, NOT_NOTED);
        self.flags.save_before = usize::MAX;
    }

    fn keeping_rax(&mut self, what: impl FnOnce(&mut Self)) {
        // The frame's second word.
        dynasm!(self.asm ; .arch x64 ; mov [rsp + 8], rax);
        what(self);
        dynasm!(self.asm ; .arch x64 ; mov rax, [rsp + 8]);
    }
}
