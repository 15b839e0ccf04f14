//! Compact code: what a block is made of first, before it is known to run often.
//!
//! An access is three instructions: its address to `r15`, a call of the check that all accesses of its kind share, and the
//! access itself at `[r14]`. What the check does not find in the TLB the runtime is asked for, by the return address: the
//! block's side table has the instruction, what is stored, and how to compute flags that are in no slot yet
//! ([`FaultEntry`]). It answers with the guest's memory, or with a buffer: one that has what was loaded, or one that takes
//! what has been stored already. Checks leave `rax` alone.

use super::{Insn, Lower, Opnd};
use crate::asm::{R14, R15, RAX, Rm, fits32};
use dynasm::dynasm;
use dynasmrt::DynasmApi;
use mimus_tcg_ir::backend::{FaultEntry, LinkSite, Stored};
use mimus_tcg_ir::unit::{UnitInsn, UnitMemory};
use mimus_tcg_ir::{AluOp, Ext, Op, PagePc, Size, Slot, Ty, Val};

/// How memory is accessed.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Kind {
    write: bool,
    /// Only where the address is a multiple of the size.
    aligned: bool,
}

impl Kind {
    pub(super) const LOAD: Kind = Kind { write: false, aligned: false };
    pub(super) const STORE: Kind = Kind { write: true, aligned: false };
}

impl Lower<'_> {
    /// A compact block counts how often it begins, if it would be quicker otherwise. Flags are in their slot there, and the
    /// host's vector registers do not matter.
    pub(super) fn count_beginnings(&mut self) {
        let env = &self.be.config.env;
        if !self.compact || env.heats == 0 || !self.ops.iter().any(is_slower) {
            return;
        }
        let place = self.info.number & (env.heats - 1);
        let heat = self.be.env(env.heat + 2 * place as i32);
        dynasm!(self.asm ; .arch x64 ; dec WORD [rbp + heat]);
        // jns over the call.
        self.asm.push(0x79);
        self.asm.push(5);
        self.asm.call_abs(self.be.stubs.warm);
    }

    /// The guest address `base + off` to `r15`. `rax` holds what it held, or what [`Lower::cached`] says.
    fn compact_address(&mut self, base: Val, off: i32) {
        let kept = self.last;
        match (base, self.val(base)) {
            (Val::Imm(imm), _) => {
                let at = self.constant_address(imm, off);
                self.asm.mov_ri(R15, at);
            }
            (_, Opnd::Reg(base)) => self.asm.lea(!self.narrow, R15, base, off),
            (Val::Slot(_), from) if off == 0 => {
                if self.narrow {
                    self.mov32(R15, from);
                } else {
                    self.mov(R15, from);
                }
            }
            (Val::Slot(_), from) => {
                self.mov(R15, from);
                self.asm.lea(!self.narrow, R15, R15, off);
            }
        }
        self.cached = kept;
    }

    /// Where an access of `bytes` at `base + off` is to be made: checked. `rax` holds what [`Lower::cached`] says.
    pub(super) fn compact_place(&mut self, (base, off): (Val, i32), bytes: u8, stored: Stored, kind: Kind) -> Rm {
        self.compact_address(base, off);
        self.check(bytes, stored, kind)
    }

    /// The check of an access to the stack whose pointer the next operation moves, which then is done as well: a push below
    /// it, a pop at it. `other`: the slot that is stored or loaded.
    fn stack_check(
        &mut self,
        (base, off): (Val, i32),
        size: Size,
        other: Val,
        stored: Stored,
        kind: Kind,
    ) -> Option<Rm> {
        let stack = self.be.config.stack.filter(|slot| base == Val::Slot(*slot) && other != base)?;
        let bytes = size.bytes() as i32;
        let (to, by) = if kind.write { (-bytes, -bytes) } else { (0, bytes) };
        let ops = self.ops;
        let next = ops.get(self.next).filter(|_| self.next < self.copy_end)?;
        let Op::Alu { op: AluOp::Add, ty, d, a, b: Val::Imm(moved) } = *next else { return None };
        let ty_fits = ty == if self.narrow { Ty::U32 } else { Ty::I64 };
        // Flags are saved where operations begin.
        if off != to || !ty_fits || (d, a, moved) != (stack, base, by.into()) || self.flags.save_before() == self.next {
            return None;
        }
        let check = self.be.stubs.stack_check(bytes as u8, kind.write, self.narrow)?;
        let place = self.call_check(check, stored);
        self.next += 1;
        self.skip = self.next;
        if self.flagged {
            self.flags_after(next, self.own_now());
        }
        Some(place)
    }

    fn check(&mut self, bytes: u8, stored: Stored, kind: Kind) -> Rm {
        let check = self.be.stubs.check(bytes, kind.write, kind.aligned);
        debug_assert!(check.is_some(), "a check for {bytes} bytes, {kind:?}");
        self.call_check(check.unwrap_or(self.be.stubs.dispatch), stored)
    }

    pub(super) fn call_check(&mut self, check: usize, stored: Stored) -> Rm {
        let recipe = self.recipe_at_fault();
        self.asm.call_abs(check);
        self.note(self.insn, stored, recipe);
        Rm::Mem { base: R14, index: None, disp: 0 }
    }

    /// What the call just emitted belongs to.
    fn note(&mut self, insn: Insn, stored: Stored, recipe: u16) {
        let host = self.asm.pos();
        self.info.faults.push(FaultEntry { host, pc: insn.pc, len: insn.len, left: insn.left, stored, recipe });
    }

    /// Leaves for careful execution of `insn`.
    pub(super) fn careful_by_table(&mut self, insn: Insn, recipe: u16) {
        self.asm.call_abs(self.be.stubs.careful_by_table);
        self.note(insn, Stored::Unknown, recipe);
    }

    /// A linkable jump to another page; see [`Lower::cross_page`]. What must be equal is an operand of the stub that
    /// compares: nothing but that changes when the jump is unlinked. (Who has passed it by then goes on in withdrawn code,
    /// as who was there already.)
    pub(super) fn compact_cross(&mut self, to: PagePc) {
        self.asm.mov_ri(RAX, i64::from(to.0 as u32));
        // mov r15d, 0 with the constant, the guard, aligned.
        self.asm.pad_nop(2);
        self.asm.push(0x41);
        self.asm.push(0xbf);
        let guard = self.asm.pos();
        self.asm.push_i32(0);
        self.asm.call_abs(self.be.stubs.cross);
        let return_offset = self.asm.pos();
        self.asm.pad_jump(1);
        self.asm.jmp_abs(self.be.stubs.crossed);
        let patch = self.asm.pos() - 4;
        self.info.sites.push(LinkSite { patch, unlinked: LinkSite::STAYS, return_offset, guard, to });
    }

    /// After a guard found the vector registers in memory, or what is in `mask` forbidden.
    pub(super) fn compact_revive(&mut self, mask: u8, insn: Insn, recipe: u16) {
        self.asm.mov_ri(R14, mask.into());
        self.asm.call_abs(self.be.stubs.revive_unless);
        self.note(insn, Stored::Unknown, recipe);
    }

    pub(super) fn compact_load(&mut self, d: Slot, at: (Val, i32), size: Size, ext: Ext) {
        let kept = self.last;
        let place = match self.stack_check(at, size, Val::Slot(d), Stored::Unknown, Kind::LOAD) {
            Some(place) => {
                self.cached = kept;
                place
            }
            None => self.compact_place(at, size.bytes() as u8, Stored::Unknown, Kind::LOAD),
        };
        let held = self.cached.take();
        let through_rax = matches!(self.home(d), Opnd::Mem(_)) && self.fp_pin_to_load(d, size, ext).is_none();
        self.load_from(d, place, size, ext);
        if !through_rax {
            self.cached = held.filter(|slot| *slot != d);
        }
    }

    /// `value`: the slot's or constant's, where it is.
    pub(super) fn compact_store(&mut self, (src, value): (Val, Opnd), (base, off): (Val, i32), size: Size) {
        // Neither clobbers `rax`; what does comes between the address and the check.
        let large = matches!(value, Opnd::Imm(imm) if size == Size::B8 && !fits32(imm));
        let stored = match (value, src) {
            (Opnd::Imm(imm), _) => Stored::Imm(imm as i32),
            (Opnd::Reg(RAX), _) => Stored::Scratch,
            (_, Val::Slot(slot)) => Stored::Slot(slot),
            (_, Val::Imm(_)) => Stored::Unknown,
        };
        if !large && let Some(place) = self.stack_check((base, off), size, src, stored, Kind::STORE) {
            self.cached = self.last;
            return self.store_to(place, value, size);
        }
        self.compact_address(base, off);
        let (value, stored) = match (value, src) {
            (Opnd::Imm(imm), _) if size != Size::B8 || fits32(imm) => (value, Stored::Imm(imm as i32)),
            (Opnd::Imm(imm), _) => {
                self.asm.mov_ri(RAX, imm);
                self.cached = None;
                (Opnd::Reg(RAX), Stored::Scratch)
            }
            (Opnd::Reg(RAX), _) => (value, Stored::Scratch),
            (_, Val::Slot(slot)) => (value, Stored::Slot(slot)),
            (_, Val::Imm(_)) => (value, Stored::Unknown),
        };
        let place = self.check(size.bytes() as u8, stored, Kind::STORE);
        self.store_to(place, value, size);
    }

    /// How an instruction of a unit accesses memory, if the block is compact and there is a check for that.
    pub(super) fn compact_unit(&self, insn: &UnitInsn) -> Option<Kind> {
        let kind = Kind { write: insn.memory == UnitMemory::Store, aligned: insn.aligned };
        let known = self.be.stubs.check(insn.bytes, kind.write, kind.aligned).is_some();
        Some(kind).filter(|_| self.compact && known)
    }
}

/// Whether compact code is slower than other code at an operation.
fn is_slower(op: &Op) -> bool {
    match *op {
        Op::Load { .. }
        | Op::Store { .. }
        | Op::Rmw { .. }
        | Op::CmpXchg { .. }
        | Op::Unit { .. }
        | Op::JumpReg { .. } => true,
        Op::Branch { to, .. } | Op::BranchF { to, .. } | Op::Jump { to } => !to.same_page(),
        _ => false,
    }
}
