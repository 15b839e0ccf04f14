//! Instructions of the vector, x87 and MMX units: the guest's own, with general registers and memory operands placed
//! anew.
//!
//! The guest's vector register `n` is the host's register `n` from a guard on ([`Lower::guard_vectors`]) until something
//! is called: the stubs that call put the registers into memory first, those of accesses get them back afterwards.
//! x87 and MMX registers are the host's all the time.

use super::flags::Routine;
use super::group::size_within;
use super::mem::Address;
use super::{Cold, Fixups, Insn, Lower, Opnd};
use crate::asm::{Alu, Cc, Fixup, Map, R14, R15, RAX, Rm};
use dynasm::dynasm;
use dynasmrt::DynasmApi;
use mimus_tcg_ir::backend::{Stored, VectorLayout};
use mimus_tcg_ir::unit::{UnitGpr, UnitInsn, UnitMemory};
use mimus_tcg_ir::{Op, Slot, Val};

/// An access that the TLB did not serve.
#[derive(Clone, Copy, Debug)]
pub(super) struct Slow {
    from: Fixups,
    /// Where the access begins, with the addend in `r14`.
    access: u32,
    /// The number of its range entry.
    range: Option<u32>,
    back: u32,
    base: u8,
    off: i32,
    unit: UnitInsn,
    /// The register operand.
    reg: u8,
    insn: Insn,
    /// Displacement of the slot whose value `rax` must hold again.
    reload: Option<i32>,
    flags: Routine,
}

/// A guard that found the vector registers in memory, or the instructions forbidden.
#[derive(Clone, Copy, Debug)]
pub(super) struct Revive {
    from: Fixup,
    back: u32,
    mask: u8,
    insn: Insn,
    flags: Routine,
    /// In compact code in place of `flags`.
    recipe: Option<u16>,
}

impl Lower<'_> {
    /// Leaves to careful mode if any bit of `mask` is set in the guard byte; else the vector registers are in the
    /// host's.
    pub(super) fn guard_vectors(&mut self, mask: u8) {
        if self.guarded_by_loop() {
            self.cached = self.last;
            return;
        }
        let dead = Rm::Env(self.be.env(self.be.config.env.vector_dead));
        self.asm.ins(Map::Base, false, 0xf6, 0, dead);
        self.asm.push(mask);
        let from = self.asm.jcc(Cc::Ne);
        let (back, insn) = (self.asm.pos(), self.insn);
        let (flags, recipe) = if self.compact && !self.counting {
            (Routine::NONE, Some(self.recipe_at_fault()))
        } else {
            (self.flags_at_fault(), None)
        };
        self.put_off(Cold::Revive(Revive { from, back, mask, insn, flags, recipe }));
        self.cached = self.last;
    }

    pub(super) fn revive(&mut self, revive: Revive, layout: VectorLayout) {
        let Revive { from, back, mask, insn, flags, recipe } = revive;
        self.asm.bind(from);
        if let Some(recipe) = recipe {
            self.compact_revive(mask, insn, recipe);
            return self.asm.jmp_back(back);
        }
        let guard = Rm::Env(self.be.env(self.be.config.env.guest.wrapping_add(layout.guard)));
        self.asm.ins(Map::Base, false, 0xf6, 0, guard);
        self.asm.push(mask);
        let from = Fixups::one(self.asm.jcc(Cc::Ne));
        self.asm.call_abs(self.be.stubs.revive);
        self.asm.jmp_back(back);
        self.put_off(Cold::Careful { from, insn, flags });
    }

    pub(super) fn unit(&mut self, op: &Op) {
        let Op::Unit { insn, d, a, off } = *op else { return };
        if insn.memory == UnitMemory::None {
            self.unit_on_registers(op, insn, d, a);
        } else {
            self.unit_on_memory(op, insn, d, (a, off));
        }
    }

    fn unit_on_registers(&mut self, op: &Op, insn: UnitInsn, d: Option<Slot>, a: Val) {
        if !insn.reads_flags.is_empty() {
            self.flags_for(op);
        }
        let t = d.map_or(RAX, |d| self.target(d));
        match insn.gpr {
            UnitGpr::None => {
                self.asm.unit(&insn, insn.reg, Rm::Reg(insn.rm));
                self.cached = self.last.filter(|_| insn.reads_flags.is_empty());
            }
            UnitGpr::InRm => {
                let from = self.val(a);
                let r = self.in_reg(from, RAX);
                self.asm.unit(&insn, insn.reg, Rm::Reg(r));
            }
            UnitGpr::OutRm => self.asm.unit(&insn, insn.reg, Rm::Reg(t)),
            UnitGpr::OutReg => self.asm.unit(&insn, t, Rm::Reg(insn.rm)),
            UnitGpr::OutAx => self.asm.unit(&insn, insn.reg, Rm::Reg(insn.rm)),
        }
        match (insn.gpr, d) {
            (UnitGpr::OutAx, Some(d)) => {
                self.asm.push(0x66);
                let place = self.rm(d);
                self.asm.mov_rm_r(false, place, RAX);
            }
            (_, Some(d)) => self.finish(d),
            _ => {}
        }
        if insn.sets_flags {
            self.flags_from(op);
        }
    }

    fn unit_on_memory(&mut self, op: &Op, insn: UnitInsn, d: Option<Slot>, (a, off): (Val, i32)) {
        let reg = d.map_or(insn.reg, |d| self.target(d));
        if let Some(place) = self.grouped(a, off) {
            self.grouped_alignment(&insn, place);
            self.asm.unit(&insn, reg, place);
            self.cached = self.last.filter(|_| d.is_none());
        } else if let Some(kind) = self.compact_unit(&insn) {
            let place = self.compact_place((a, off), insn.bytes, Stored::Unknown, kind);
            self.flags_lost();
            self.asm.unit(&insn, reg, place);
            self.cached = self.cached.filter(|_| d.is_none());
        } else {
            let at = self.address(a, off);
            let flags = self.flags_at_fault();
            let (from, range) = self.unit_translate(&insn, at);
            let access = self.asm.pos();
            self.flags_lost();
            self.asm.unit(&insn, reg, Rm::Mem { base: at.base, index: Some(R14), disp: at.off });
            let reload = if at.base == RAX && d.is_none() { self.keep_base(at) } else { None };
            let back = self.asm.pos();
            let (base, off, guest) = (at.base, at.off, self.insn);
            let slow = Slow { from, access, range, back, base, off, unit: insn, reg, insn: guest, reload, flags };
            if !self.divert(self.next - 1, self.before, from) {
                self.put_off(Cold::Unit(slow));
            }
        }
        if let Some(d) = d.filter(|d| self.pin_of(*d).is_none()) {
            // In `rax` alone it would be lost where a group or a stretch ends with this access ([`Lower::cached_behind`]).
            self.set(d, RAX);
        }
        if insn.sets_flags {
            self.flags_from(op);
        }
    }

    /// Looks up the memory operand; `r14` is the addend after it.
    fn unit_translate(&mut self, insn: &UnitInsn, at: Address) -> (Fixups, Option<u32>) {
        let load = insn.memory == UnitMemory::Load;
        let bytes = i32::from(insn.bytes);
        if self.stays_in_range(self.insn.pc.0)
            && let Some(range) = self.range_for(size_within(insn.bytes.into()), !load)
        {
            // An aligned operand is in the range if its beginning is.
            let extra = if insn.aligned { 0 } else { bytes - size_within(insn.bytes.into()).bytes() as i32 };
            let folded = at.off.checked_add(extra);
            self.asm.lea(true, R15, at.base, folded.unwrap_or(at.off));
            if insn.aligned {
                dynasm!(self.asm ; .arch x64 ; test r15b, BYTE insn.bytes as i8 - 1);
                let mut from = Fixups::one(self.asm.jcc(Cc::Ne));
                for other in self.compare_span(range, 0).0.into_iter().flatten() {
                    from.add(other);
                }
                return (from, Some(range));
            }
            if folded.is_none() {
                self.asm.alu_rm_i(Alu::Add, true, Rm::Reg(R15), extra);
            }
            return (self.compare_span(range, extra), Some(range));
        }
        (Fixups::one(self.unit_by_page(insn, at)), None)
    }

    /// The same by the page arrays.
    fn unit_by_page(&mut self, insn: &UnitInsn, at: Address) -> Fixup {
        let context = self.be.config.context;
        let bytes = i32::from(insn.bytes);
        self.look_up(at, if insn.memory == UnitMemory::Load { context.read_tag } else { context.write_tag });
        let from = if insn.aligned {
            // An aligned offset in the page has no other bits than these.
            let offset = 0x1000 - bytes;
            dynasm!(self.asm ; .arch x64 ; test r15, !offset);
            self.asm.jcc(Cc::Ne)
        } else {
            dynasm!(self.asm ; .arch x64 ; cmp r15, 4096 - bytes);
            self.asm.jcc(Cc::A)
        };
        dynasm!(self.asm ; .arch x64 ; gs mov r14, [r14*8 + context.addend]);
        from
    }

    /// In a group, whose check is not for alignment: leaves to careful mode if the operand at `place` is not aligned.
    fn grouped_alignment(&mut self, insn: &UnitInsn, place: Rm) {
        let Rm::Mem { base, disp, .. } = place else { return };
        if !insn.aligned || self.group_is_aligned(insn.bytes, disp) {
            return;
        }
        let flags = self.flags_at_fault();
        self.asm.lea(false, R15, base, disp);
        dynasm!(self.asm ; .arch x64 ; test r15b, BYTE insn.bytes as i8 - 1);
        let from = Fixups::one(self.asm.jcc(Cc::Ne));
        self.flags_lost();
        self.put_off(Cold::Careful { from, insn: self.insn, flags });
    }

    pub(super) fn slow_unit(&mut self, slow: Slow) {
        let Slow { from, access, range, back, base, off, unit, reg, insn, reload, flags } = slow;
        self.bind(from);
        let size = size_within(unit.bytes.into());
        self.not_served_here((base, off), (range, size), access, insn, |l, at| l.unit_by_page(&unit, at));
        self.save_at_fault(flags);
        if unit.aligned {
            dynasm!(self.asm ; .arch x64 ; test r15b, BYTE unit.bytes as i8 - 1);
            let from = Fixups::one(self.asm.jcc(Cc::Ne));
            // The flags are saved already.
            self.put_off(Cold::Careful { from, insn, flags: Routine::NONE });
        }
        self.asm.mov_ri(R14, i64::from(unit.bytes));
        let store = unit.memory == UnitMemory::Store;
        self.asm.call_abs(if store { self.be.stubs.unit_probe } else { self.be.stubs.unit_load });
        self.fault_entry(insn);
        self.asm.unit(&unit, reg, Rm::Env(self.be.env(self.be.config.env.unit_buffer)));
        if store {
            self.asm.mov_ri(R14, i64::from(unit.bytes));
            self.asm.call_abs(self.be.stubs.unit_store);
            self.fault_entry(insn);
        }
        if let Some(disp) = reload {
            self.mov(RAX, Opnd::Mem(disp));
        }
        self.asm.jmp_back(back);
    }
}
