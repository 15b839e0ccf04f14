//! Loads whose address has a base and an index: where the access has a range entry, the address is computed for the check
//! alone. What is to be added to addresses is added to the base beforehand, and the load takes the index as it is: it need not
//! wait for the sum, which takes processors two cycles if the index is scaled.

use super::mem::Slow;
use super::{Lower, Opnd};
use crate::asm::{Alu, Cc, Fixup, R14, R15, RAX, Rm};
use dynasm::dynasm;
use dynasmrt::DynasmApi;
use mimus_tcg_ir::backend::{ContextLayout, Optimise};
use mimus_tcg_ir::{Ext, FIRST_TEMP, Op, Size, Slot, Val};

/// An address that was not computed: of the load that comes next, and of nothing else.
#[derive(Clone, Copy, Debug)]
pub(super) struct Folded {
    pub temp: Slot,
    pub base: u8,
    pub index: u8,
    pub shift: u8,
    pub disp: i32,
    /// The register that has the address if the load does not take place.
    pub stays: Option<u8>,
}

/// Where a load goes on if it is not served, where it is made, and its range entry.
pub(super) struct Checked {
    pub from: Fixup,
    pub access: u32,
    pub range: u32,
    pub place: Rm,
}

impl Lower<'_> {
    /// Whether the sum being lowered is left to the load behind it; remembers it then.
    pub(super) fn folds(&mut self, d: Slot, (base, index): (Opnd, Opnd), (shift, disp): (u8, i64)) -> bool {
        let (Opnd::Reg(base), Opnd::Reg(index)) = (base, index) else { return false };
        let load = self.next;
        let Some(Op::Load { base: Val::Slot(address), off, ext, .. }) = self.ops.get(load) else { return false };
        let reach = disp.checked_add(i64::from(*off)).is_some_and(|disp| i32::try_from(disp).is_ok());
        let plain = self.in_block() && !self.in_slow_group && !self.in_windows() && !self.narrow && !self.compact;
        if *address != d
            || *ext == Ext::Ones
            || d.0 < FIRST_TEMP
            || base == RAX
            || index == RAX
            || !(plain && reach)
            || self.be.config.optimise == Optimise::Off
            || self.pin_of(d).is_some()
            || !self.stays_in_range(self.insn.pc.0)
            || self.leaves_windows(load..load + 1)
            || !self.dies_at_next(d)
        {
            return false;
        }
        self.folded = Some(Folded { temp: d, base, index, shift, disp: disp as i32, stays: None });
        true
    }

    /// The address of the load being lowered, if it was left to it.
    pub(super) fn folded(&mut self, base: Val) -> Option<Folded> {
        self.folded.take().filter(|folded| base == Val::Slot(folded.temp))
    }

    /// Looks it up.
    pub(super) fn check_folded(&mut self, folded: Folded, off: i32, size: Size) -> Checked {
        let Folded { base, index, shift, disp, .. } = folded;
        let disp = disp.wrapping_add(off);
        let range = self.range_for(size, false).unwrap_or_else(|| self.be.new_range(size, false, false));
        let entry = self.range_entry(range);
        self.asm.lea_sib(true, R15, Some(base), Some((index, shift)), disp);
        if ContextLayout::range_has_parts(range) {
            // The index waits for no more than a compare and a move.
            dynasm!(self.asm ; .arch x64
                ; gs mov r14, [DWORD entry + 16]
                ; gs mov rax, [DWORD entry + 32]
                ; add r14, Rq(base)
                ; add rax, Rq(base)
                ; gs cmp r15, [DWORD entry + 24]
                ; cmovae r14, rax
                ; gs sub r15, [DWORD entry]
            );
            if size != Size::B1 {
                let log2 = size as i8;
                dynasm!(self.asm ; .arch x64 ; ror r15, log2);
            }
            dynasm!(self.asm ; .arch x64 ; gs cmp r15, [DWORD entry + 8]);
            let from = self.asm.jcc(Cc::Ae);
            return Checked {
                from,
                access: self.asm.pos(),
                range,
                place: Rm::Scaled { base: R14, index, shift, disp },
            };
        }
        dynasm!(self.asm ; .arch x64
            ; gs sub r15, [DWORD entry]
            ; gs cmp r15, [DWORD entry + 8]
        );
        let from = self.asm.jcc(Cc::Ae);
        dynasm!(self.asm ; .arch x64 ; gs mov r14, [DWORD entry + 16]);
        self.asm.alu_r_rm(Alu::Add, true, R14, Rm::Reg(base));
        Checked { from, access: self.asm.pos(), range, place: Rm::Scaled { base: R14, index, shift, disp } }
    }

    /// Out of line: computes the address after all.
    pub(super) fn unfold(&mut self, slow: &Slow) {
        if let Some(Folded { base, index, shift, disp, .. }) = slow.folded {
            self.asm.lea_sib(true, RAX, Some(base), Some((index, shift)), disp);
        }
    }

    /// Before the runtime is called for the load: its address where the guest has it, from `rax`.
    pub(super) fn keep_sum(&mut self, slow: &Slow) {
        if let Some(reg) = slow.folded.and_then(|folded| folded.stays) {
            self.asm.mov_r_rm(true, reg, Rm::Reg(RAX));
        }
    }

    /// Before going back to where the load is made, with the addend in `r14`.
    pub(super) fn refold(&mut self, slow: &Slow) {
        if let Some(Folded { base, .. }) = slow.folded {
            self.asm.alu_r_rm(Alu::Add, true, R14, Rm::Reg(base));
        }
    }
}
