//! Read-modify-writes of guest memory with flags, and compare-and-exchange: one host instruction on the memory
//! itself where the TLB serves the address, with `lock` or without; through the runtime otherwise.
//!
//! The access needs store permission only, which on guests that have these instructions includes loads.

use super::compact::Kind;
use super::flagged::{Form, form_of};
use super::flags::Routine;
use super::mem::Address;
use super::{Cold, Fixups, Insn, Lower, Opnd};
use crate::asm::{Fixup, Map, R14, R15, RAX, RCX, RSP, Rm, fits32};
use dynasmrt::DynasmApi;
use mimus_tcg_ir::backend::{RMW_LOCK, Stored, rmw_kind};
use mimus_tcg_ir::verify::has_count;
use mimus_tcg_ir::{FlagOp, Op, RmwOp, Size, Slot, Val};

/// An access that the TLB did not serve.
#[derive(Clone, Copy, Debug)]
pub(super) struct Slow {
    from: Fixup,
    /// Where it goes on with the addend in `r14`.
    access: u32,
    back: u32,
    base: u8,
    off: i32,
    descriptor: u32,
    /// The operand; for a compare-and-exchange, what is expected.
    src: Opnd,
    /// For a compare-and-exchange, the new value.
    new: Option<Opnd>,
    d: Option<Slot>,
    insn: Insn,
    /// What saves the flags first.
    flags: Routine,
    /// The flags are wanted in the host's afterwards.
    restore: bool,
    /// The number of its range entry.
    range: Option<u32>,
    size: Size,
}

/// Place in the frame for a fourth argument.
const FRAME: Rm = Rm::Mem { base: crate::asm::RSP, index: None, disp: 8 };

impl Lower<'_> {
    /// The address of an access.
    fn rmw_address(&mut self, base: Val, off: i32) -> Address {
        if let Val::Imm(imm) = base {
            let at = self.constant_address(imm, off);
            self.asm.mov_ri(RAX, at);
            return Address { base: RAX, off: 0, slot: None };
        }
        let from = self.val(base);
        Address { base: self.in_reg(from, RAX), off, slot: None }
    }

    /// Looks the page up for a store, and gives the host's place. `r15` is free after it, and the register `free`.
    fn rmw_translate(&mut self, at: Address, size: Size, free: Option<u8>) -> ((Fixup, u32), Rm, Option<u32>) {
        let (miss, range) = self.translate(at, size, true);
        let miss = (miss, self.asm.pos());
        self.flags_lost();
        let place = Rm::Mem { base: at.base, index: Some(R14), disp: at.off };
        if Some(at.base) != free {
            return (miss, place, range);
        }
        self.asm.ins(Map::Base, true, 0x8d, R14, place);
        (miss, Rm::Mem { base: R14, index: None, disp: 0 }, range)
    }

    pub(super) fn rmw(&mut self, whole: &Op) {
        let Op::Rmw { op, size, lock, old, src, base, off } = *whole else {
            return;
        };
        let src = self.home_val(src);
        if self.compact {
            let place = self.compact_place((base, off), size.bytes() as u8, Stored::Unknown, Kind::STORE);
            // What was held in `rax` may not be any more.
            self.cached = None;
            self.flags_lost();
            self.rmw_at(whole, place, RSP);
            if matches!(op, RmwOp::F(_)) {
                self.flags_from(whole);
            }
            return;
        }
        if let Some(place) = self.rmw_in_stretch(whole) {
            self.cached = None;
            self.rmw_at(whole, place, RSP);
            return self.flags_from(whole);
        }
        let at = self.rmw_address(base, off);
        let flags = self.flags_at_fault();
        let free = match op {
            // For a bit number's mask.
            RmwOp::F(FlagOp::Bts | FlagOp::Btr | FlagOp::Btc) => Some(RAX),
            // For the count.
            RmwOp::F(op) if has_count(op) && at.base == RCX => Some(RCX),
            // For the flags before it.
            _ => Some(RAX).filter(|_| self.carries(whole)),
        };
        let ((miss, access), place, range) = self.rmw_translate(at, size, free);
        self.rmw_at(whole, place, at.base);
        let back = self.asm.pos();
        let restore = self.flags_wanted(whole);
        if matches!(op, RmwOp::F(_)) {
            self.flags_from(whole);
        }
        let descriptor = size as u32 | rmw_kind(op) << 16 | if lock { RMW_LOCK } else { 0 };
        let insn = self.insn;
        if self.divert(self.next - 1, self.before, Fixups::one(miss)) {
            return;
        }
        self.put_off(Cold::Rmw(Slow {
            from: miss,
            access,
            back,
            base: at.base,
            off: at.off,
            descriptor,
            src,
            new: None,
            d: old,
            insn,
            flags,
            restore,
            range,
            size,
        }));
    }

    /// The operation on memory at `place`, whose guest address is in `address`.
    fn rmw_at(&mut self, whole: &Op, place: Rm, address: u8) {
        let Op::Rmw { op, size, lock, old, src, .. } = *whole else { return };
        let src = self.home_val(src);
        self.flags_for(whole);
        match op {
            RmwOp::Swap => {
                let d = old.filter(|_| size >= Size::B4);
                // Not over the address.
                let t = d.and_then(|d| self.pin_of(d)).filter(|t| *t != address).unwrap_or(R15);
                self.mov(t, src);
                // Locked without saying so.
                self.asm.sized(Map::Base, size, 0x86, t, place);
                self.old_value(old, size, t);
            }
            RmwOp::F(FlagOp::Add) if old.is_some() => {
                self.mov(R15, src);
                self.lock(lock);
                self.asm.sized(Map::Of, size, 0xc0, R15, place);
                self.old_value(old, size, R15);
            }
            RmwOp::F(op) => self.rmw_plain(op, (size, lock), src, place),
        }
    }

    fn lock(&mut self, lock: bool) {
        if lock {
            self.asm.push(0xf0);
        }
    }

    /// The old value, in `from`, to its slot, with zeros above. No flag changes.
    fn old_value(&mut self, d: Option<Slot>, size: Size, from: u8) {
        let Some(d) = d else { return };
        let t = self.pin_of(d).unwrap_or(R15);
        match size {
            Size::B1 => self.asm.ins8(Map::Of, 0xb6, t, Rm::Reg(from)),
            Size::B2 => self.asm.ins(Map::Of, false, 0xb7, t, Rm::Reg(from)),
            Size::B4 => self.mov32(t, Opnd::Reg(from)),
            Size::B8 => self.mov(t, Opnd::Reg(from)),
        }
        self.set(d, t);
    }

    fn rmw_plain(&mut self, op: FlagOp, (size, lock): (Size, bool), src: Opnd, place: Rm) {
        match (form_of(op), src) {
            (Form::Classic(alu), src) => {
                let src = match src {
                    Opnd::Imm(imm) if size != Size::B8 || fits32(imm) => src,
                    other => Opnd::Reg(self.in_reg(other, R15)),
                };
                self.lock(lock);
                self.classic_at(alu, size, place, src, R15);
            }
            (Form::Shift(shift), Opnd::Imm(imm)) => self.shift_at_imm(shift, size, place, imm),
            (Form::Shift(shift), src) => {
                let saved = self.load_count(src);
                self.asm.sized_ext(Map::Base, size, 0xd2, shift as u8, place);
                self.restore_count(saved);
            }
            (Form::Bit(_, ext), Opnd::Imm(imm)) => {
                self.lock(lock);
                self.asm.wide(Map::Of, size, 0xba, ext, place);
                self.asm.push(imm as u8 & (8 * size.bytes() - 1) as u8);
            }
            (Form::Bit(opcode, _), src) => {
                // The host would take the bit number beyond the operand.
                let mask = 8 * size.bytes() as i32 - 1;
                self.mov32(R15, src);
                // `and` changes flags that the instruction leaves alone: take the bits without.
                self.low_bits(R15, mask);
                self.lock(lock);
                self.asm.wide(Map::Of, size, opcode, R15, place);
            }
            (Form::Unary(opcode, ext), _) => {
                self.lock(lock);
                self.asm.sized_ext(Map::Base, size, opcode, ext, place);
            }
            (Form::Other, _) => {}
        }
    }

    /// `reg &= mask` for a mask of 4 to 6 ones, leaving the flags alone.
    fn low_bits(&mut self, reg: u8, mask: i32) {
        self.asm.mov_ri(RAX, i64::from(mask));
        self.asm.vex(crate::asm::Vex::PEXT, false, reg, reg, Rm::Reg(RAX));
    }

    pub(super) fn cmpxchg(&mut self, d: Slot, size: Size, [expected, new, base]: [Val; 3], off: i32) {
        let (expected, new) = (self.home_val(expected), self.home_val(new));
        if self.compact {
            let place = self.compact_place((base, off), size.bytes() as u8, Stored::Unknown, Kind::STORE);
            self.cached = None;
            self.flags_lost();
            return self.cmpxchg_at(d, size, [expected, new], place);
        }
        let at = self.rmw_address(base, off);
        let flags = self.flags_at_fault();
        let ((miss, access), place, range) = self.rmw_translate(at, size, Some(RAX));
        self.cmpxchg_at(d, size, [expected, new], place);
        let back = self.asm.pos();
        let insn = self.insn;
        self.put_off(Cold::Rmw(Slow {
            from: miss,
            access,
            back,
            base: at.base,
            off: at.off,
            descriptor: size as u32,
            src: expected,
            new: Some(new),
            d: Some(d),
            insn,
            flags,
            restore: false,
            range,
            size,
        }));
    }

    fn cmpxchg_at(&mut self, d: Slot, size: Size, [expected, new]: [Opnd; 2], place: Rm) {
        self.mov(RAX, expected);
        let reg = self.in_reg(new, R15);
        self.lock(true);
        self.asm.sized(Map::Of, size, 0xb0, reg, place);
        self.old_value(Some(d), size, RAX);
    }

    pub(super) fn slow_rmw(&mut self, slow: Slow) {
        self.asm.bind(slow.from);
        let Slow { base, off, size, .. } = slow;
        self.not_served_here((base, off), (slow.range, size), slow.access, slow.insn, |l, at| {
            l.translate_by_page(at, size, true)
        });
        self.save_at_fault(slow.flags);
        if let Some(new) = slow.new {
            let new = self.in_reg(new, R14);
            self.asm.mov_rm_r(true, FRAME, new);
        }
        self.mov(RAX, slow.src);
        self.asm.mov_ri(R14, i64::from(slow.descriptor));
        let stub = if slow.new.is_some() { self.be.stubs.cmpxchg } else { self.be.stubs.atomic };
        self.asm.call_abs(stub);
        self.fault_entry(slow.insn);
        if let Some(d) = slow.d {
            self.set(d, RAX);
        }
        if slow.restore {
            self.restore_flags();
        }
        self.asm.jmp_back(slow.back);
    }
}
