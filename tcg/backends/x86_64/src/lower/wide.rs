//! Multiplication to, and division of, twice the width: the host's own instructions, on `rdx:rax`.

use super::flags::Routine;
use super::{Cold, Fixups, Insn, Lower, Opnd};
use crate::asm::{Alu, Cc, Map, R14, R15, RAX, RDX, Rm, fits32};
use dynasm::dynasm;
use dynasmrt::DynasmApi;
use mimus_tcg_ir::{Op, Size, Slot, Val};

/// A signed division that is not a plain one.
#[derive(Clone, Copy, Debug)]
pub(super) struct SlowDivision {
    from: Fixups,
    back: u32,
    size: Size,
    high: Opnd,
    insn: Insn,
    /// What saves the flags before leaving.
    flags: Routine,
}

impl Lower<'_> {
    pub(super) fn mul_wide(&mut self, signed: bool, size: Size, (lo, hi): (Slot, Slot), a: Val, b: Val) {
        self.flags_for(&Op::MulWideF { signed, size, lo, hi, a, b });
        let (a, b) = (self.home_val(a), self.home_val(b));
        let replaces_rdx = size >= Size::B4 && self.pin_of(hi) == Some(RDX);
        if size != Size::B1 && !replaces_rdx {
            self.save_rdx();
        }
        // A constant must be in a register, and what is in rax is about to go.
        let b = self.as_rm(b, R14);
        self.mov(RAX, a);
        self.asm.sized_ext(Map::Base, size, 0xf6, if signed { 5 } else { 4 }, b);
        if size == Size::B1 {
            self.fill(lo, Size::B2, RAX);
        } else {
            self.place_pair(size, lo, hi);
        }
        self.flags_from(&Op::MulWideF { signed, size, lo, hi, a: Val::Imm(0), b: Val::Imm(0) });
    }

    /// `rax` to `first`, `rdx` to `second`, and what `rdx` held back, if it is neither. No flag changes.
    fn place_pair(&mut self, size: Size, first: Slot, second: Slot) {
        let whole = size >= Size::B4;
        if self.pin_of(second) == Some(RDX) && whole {
            return self.fill(first, size, RAX);
        }
        self.mov(R14, Opnd::Reg(RDX));
        if self.is_pin(RDX) {
            self.mov(RDX, Opnd::Reg(R15));
        }
        self.fill(first, size, RAX);
        self.fill(second, size, R14);
    }

    pub(super) fn div_wide(&mut self, signed: bool, size: Size, (q, r): (Slot, Slot), [hi, lo, b]: [Val; 3]) {
        let [hi, lo, b] = [hi, lo, b].map(|v| self.home_val(v));
        let flags = self.flags_at_fault();
        // Whatever is in rdx is put aside, and operands read from there.
        self.save_rdx();
        let [hi, lo, b] = [hi, lo, b].map(|v| self.beside_rdx(v));
        let mut careful = Fixups::default();
        if size < Size::B4 {
            self.divide_small(signed, size, [hi, lo, b], &mut careful);
        } else if signed {
            self.divide_signed(size, [hi, lo, b], &mut careful, flags);
        } else {
            self.mov(R14, b);
            self.mov(RAX, lo);
            self.mov(RDX, hi);
            let w = size == Size::B8;
            // Zero divisors are not above anything either.
            self.asm.alu_r_rm(Alu::Cmp, w, RDX, Rm::Reg(R14));
            careful.add(self.asm.jcc(Cc::Ae));
            self.asm.ins(Map::Base, w, 0xf7, 6, Rm::Reg(R14));
        }
        if size == Size::B1 {
            // remainder:quotient to the low two bytes.
            dynasm!(self.asm ; .arch x64
                ; shl edx, 8
                ; movzx eax, al
                ; or eax, edx
            );
            if self.is_pin(RDX) {
                self.mov(RDX, Opnd::Reg(R15));
            }
            self.fill(q, Size::B2, RAX);
        } else {
            self.place_pair(size, q, r);
        }
        let insn = self.insn;
        self.put_off(Cold::CarefulDivision { from: careful, insn, flags });
        self.flags_from(&Op::DivWideF { signed, size, q, r, hi: Val::Imm(0), lo: Val::Imm(0), b: Val::Imm(0) });
    }

    /// Division of 16 or 32 bits, in 64.
    fn divide_small(&mut self, signed: bool, size: Size, [hi, lo, b]: [Opnd; 3], careful: &mut Fixups) {
        // movsx or movzx.
        let extend = |l: &mut Self, r: u8, size: Size| match (signed, size) {
            (true, Size::B1) => l.asm.ins(Map::Of, true, 0xbe, r, Rm::Reg(r)),
            (false, Size::B1) => l.asm.ins8(Map::Of, 0xb6, r, Rm::Reg(r)),
            (true, Size::B2) => l.asm.ins(Map::Of, true, 0xbf, r, Rm::Reg(r)),
            (false, Size::B2) => l.asm.ins(Map::Of, false, 0xb7, r, Rm::Reg(r)),
            (true, _) => l.asm.movsxd(r, Rm::Reg(r)),
            (false, _) => l.asm.mov_r_rm(false, r, Rm::Reg(r)),
        };
        self.mov(RAX, lo);
        if size == Size::B2 {
            self.mov(R14, hi);
            self.asm.shift_i(crate::asm::Shift::Shl, false, Rm::Reg(R14), 16);
            self.asm.ins(Map::Of, false, 0xb7, RAX, Rm::Reg(RAX));
            self.asm.alu_r_rm(Alu::Or, false, RAX, Rm::Reg(R14));
            extend(self, RAX, Size::B4);
        } else {
            extend(self, RAX, Size::B2);
        }
        self.mov(R14, b);
        extend(self, R14, size);
        self.asm.test_rr(true, R14);
        careful.add(self.asm.jcc(Cc::E));
        if signed {
            dynasm!(self.asm ; .arch x64 ; cqo ; idiv r14);
        } else {
            dynasm!(self.asm ; .arch x64 ; xor edx, edx ; div r14);
        }
        // Does the quotient fit?
        self.mov(R14, Opnd::Reg(RAX));
        extend(self, R14, size);
        self.asm.alu_r_rm(Alu::Cmp, true, R14, Rm::Reg(RAX));
        careful.add(self.asm.jcc(Cc::Ne));
    }

    /// The plain case is a dividend that is the sign extension of its low half, and a divisor that is neither 0
    /// nor −1.
    fn divide_signed(&mut self, size: Size, [hi, lo, b]: [Opnd; 3], careful: &mut Fixups, flags: Routine) {
        let w = size == Size::B8;
        let code = |l: &mut Self| {
            if w {
                dynasm!(l.asm ; .arch x64 ; cqo);
            } else {
                dynasm!(l.asm ; .arch x64 ; cdq);
            }
        };
        self.mov(R14, b);
        self.mov(RAX, lo);
        code(self);
        // cmp rdx, hi; constants of any width.
        let mut from = Fixups::default();
        match hi {
            // No register is left for it.
            Opnd::Imm(imm) if w && !fits32(imm) => from.add(self.asm.jmp()),
            hi => {
                self.alu_r(Alu::Cmp, w, RDX, hi);
                from.add(self.asm.jcc(Cc::Ne));
            }
        }
        self.asm.alu_rm_i(Alu::Cmp, w, Rm::Reg(R14), -1);
        from.add(self.asm.jcc(Cc::E));
        self.asm.test_rr(w, R14);
        careful.add(self.asm.jcc(Cc::E));
        self.asm.ins(Map::Base, w, 0xf7, 7, Rm::Reg(R14));
        let back = self.asm.pos();
        let insn = self.insn;
        let slow = SlowDivision { from, back, size, high: hi, insn, flags };
        self.put_off(Cold::Division(slow));
    }

    /// Any signed dividend and divisor: `rax` is the low half, `r14` the divisor.
    pub(super) fn slow_division(&mut self, slow: SlowDivision) {
        self.bind(slow.from);
        self.mov(RDX, slow.high);
        if slow.size == Size::B4 {
            // As 128 by 64 bits.
            dynasm!(self.asm ; .arch x64
                ; shl rdx, 32
                ; mov eax, eax
                ; or rax, rdx
                ; cqo
                ; movsxd r14, r14d
            );
        }
        self.asm.call_abs(self.be.stubs.divide);
        let mut careful = Fixups::default();
        careful.add(self.asm.jcc(Cc::B));
        if slow.size == Size::B4 {
            dynasm!(self.asm ; .arch x64 ; movsxd r14, eax ; cmp r14, rax);
            careful.add(self.asm.jcc(Cc::Ne));
            dynasm!(self.asm ; .arch x64 ; mov eax, eax ; mov edx, edx);
        }
        self.asm.jmp_back(slow.back);
        self.put_off(Cold::CarefulDivision { from: careful, insn: slow.insn, flags: slow.flags });
    }

    /// Leaves before a division that cannot be done.
    pub(super) fn careful_division(&mut self, from: Fixups, insn: Insn, flags: Routine) {
        if from.0.iter().all(Option::is_none) {
            return;
        }
        self.bind(from);
        if self.is_pin(RDX) {
            self.mov(RDX, Opnd::Reg(R15));
        }
        self.save_at_fault(flags);
        self.leave_carefully(insn);
    }
}
