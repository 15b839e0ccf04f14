//! Integer operations.
//!
//! Operands are host registers, memory operands or constants; the result is computed in the destination's own
//! register, or in `rax` for a slot in memory. Because an operand may itself be in the target register, checks
//! for aliasing are on register numbers, never on slots. `r14` and `r15` are free for constants and counts.

use super::{Cold, Lower, Opnd};
use crate::asm::{Alu, Cc, Fixup, Map, R14, R15, RAX, RCX, RDX, Rm, Shift, Vex, fits32};
use dynasm::dynasm;
use dynasmrt::DynasmApi;
use mimus_tcg_ir::backend::{DIVISORS, Divisor, Optimise};
use mimus_tcg_ir::interp;
use mimus_tcg_ir::{AluOp, Op, PagePc, SLOTS, Slot, Ty, UnOp, Val};
use std::mem::{offset_of, size_of};

/// Where the other half of a division is kept: the last temporary, which no instruction has use for.
const KEPT: Slot = Slot((SLOTS - 1) as u8);

/// Whether the lowering of `op` takes its operands as they are before it changes `rax`.
pub fn reads_operands_first(op: AluOp) -> bool {
    !matches!(
        op,
        AluOp::Rol
            | AluOp::Ror
            | AluOp::MulHiS
            | AluOp::MulHiU
            | AluOp::MulHiSU
            | AluOp::DivS
            | AluOp::DivU
            | AluOp::RemS
            | AluOp::RemU
    )
}

/// A division by another number than the one that is remembered: `rax` by `r14`.
#[derive(Clone, Copy, Debug)]
pub(super) struct OtherDivisor {
    from: Fixup,
    back: u32,
    rem: bool,
    /// The other half is wanted too.
    keep: bool,
    /// Offset of the [`Divisor`] from `rbp`.
    entry: i32,
}

impl Lower<'_> {
    pub(super) fn alu(&mut self, op: AluOp, ty: Ty, d: Slot, a: Val, b: Val) {
        if let (Val::Imm(a), Val::Imm(b)) = (a, b) {
            return self.set_imm(d, interp::alu(op, ty, a as u64, b as u64) as i64);
        }
        let ty = if interp::is_64_bit_only(op) { Ty::I64 } else { ty };
        match op {
            AluOp::Add => self.classic(Alu::Add, ty, d, a, b),
            AluOp::Sub => self.classic(Alu::Sub, ty, d, a, b),
            AluOp::And => self.classic(Alu::And, ty, d, a, b),
            AluOp::Or => self.classic(Alu::Or, ty, d, a, b),
            AluOp::Xor => self.classic(Alu::Xor, ty, d, a, b),
            AluOp::Andn | AluOp::Orn | AluOp::Xnor => self.with_complement(op, ty, d, a, b),
            AluOp::Shl => self.shift(Shift::Shl, ty, d, a, b),
            AluOp::Shr => self.shift(Shift::Shr, ty, d, a, b),
            AluOp::Sar => self.shift(Shift::Sar, ty, d, a, b),
            AluOp::Rol => self.rotate(Shift::Rol, ty, d, a, b),
            AluOp::Ror => self.rotate(Shift::Ror, ty, d, a, b),
            AluOp::Mul => self.mul(ty, d, a, b),
            AluOp::MulHiS => self.mul_high_signed(d, a, b),
            AluOp::MulHiU => self.mul_high(d, a, b, false),
            AluOp::MulHiSU => self.mul_high(d, a, b, true),
            AluOp::DivS => self.div(ty, d, a, b, true, false),
            AluOp::DivU => self.div(ty, d, a, b, false, false),
            AluOp::RemS => self.div(ty, d, a, b, true, true),
            AluOp::RemU => self.div(ty, d, a, b, false, true),
            AluOp::MinS => self.min_max(Cc::L, ty, d, a, b),
            AluOp::MinU => self.min_max(Cc::B, ty, d, a, b),
            AluOp::MaxS => self.min_max(Cc::G, ty, d, a, b),
            AluOp::MaxU => self.min_max(Cc::A, ty, d, a, b),
            AluOp::SetLtS => self.set_less(Cc::L, d, a, b),
            AluOp::SetLtU => self.set_less(Cc::B, d, a, b),
            AluOp::Sh1Add => self.shift_add(1, d, a, b),
            AluOp::Sh2Add => self.shift_add(2, d, a, b),
            AluOp::Sh3Add => self.shift_add(3, d, a, b),
            // Opcode extension and register form of bts, btr, btc.
            AluOp::BSet => self.bit_op(5, 0xab, ty, d, a, b),
            AluOp::BClr => self.bit_op(6, 0xb3, ty, d, a, b),
            AluOp::BInv => self.bit_op(7, 0xbb, ty, d, a, b),
            AluOp::BExt => self.bit_extract(ty, d, a, b),
        }
    }

    /// Add, subtract, and, or, exclusive or.
    fn classic(&mut self, op: Alu, ty: Ty, d: Slot, a: Val, b: Val) {
        let w = ty == Ty::I64;
        let (mut op, mut a, mut b) = (op, self.val(a), self.val(b));
        if matches!(a, Opnd::Imm(_)) && op != Alu::Sub {
            std::mem::swap(&mut a, &mut b);
        }
        if let (Alu::Sub, Opnd::Imm(imm)) = (op, b) {
            (op, b) = (Alu::Add, Opnd::Imm(imm.wrapping_neg()));
        }
        if !w {
            b = truncate(b);
            a = truncate(a);
        }
        if b == Opnd::Imm(0) && op != Alu::And {
            return self.un_opnd(UnOp::Mov, ty, d, a);
        }
        if w && op == Alu::And && b == Opnd::Imm(0xff) {
            return self.un_opnd(UnOp::ZextB, ty, d, a);
        }
        let b = self.imm32(b, R14);
        if self.kept && op == Alu::Add && ty != Ty::I32 {
            return self.add_as_lea(w, d, a, b);
        }
        if w && self.in_place(op, d, a, b) {
            return;
        }
        let t = self.target(d);
        match (a, b) {
            (Opnd::Reg(ra), Opnd::Reg(rb)) if op == Alu::Add && t != ra && t != rb => {
                self.lea_sum(w, t, ra, rb);
            }
            (Opnd::Reg(ra), Opnd::Imm(imm)) if op == Alu::Add && t != ra => {
                self.asm.lea(w, t, ra, imm as i32);
            }
            (a, Opnd::Reg(rb)) if rb == t && a != Opnd::Reg(t) => {
                if op == Alu::Sub {
                    // t = a - t
                    self.asm.ins(Map::Base, w, 0xf7, 3, Rm::Reg(t));
                    op = Alu::Add;
                }
                let a = self.imm32(a, R14);
                self.alu_r(op, w, t, a);
            }
            (a, b) => {
                if w {
                    self.mov(t, a)
                } else {
                    self.mov_low(t, a)
                }
                self.alu_r(op, w, t, b);
            }
        }
        self.finish_ty(d, ty);
    }

    /// `d = a + b` without a change of the host's flags.
    fn add_as_lea(&mut self, w: bool, d: Slot, a: Opnd, b: Opnd) {
        let t = self.target(d);
        // Not r14, which a group's accesses go by (`keeps_r14`).
        let spare = if matches!(a, Opnd::Reg(_)) { R15 } else { t };
        let a = self.in_reg(a, R15);
        match b {
            Opnd::Imm(imm) => self.asm.lea(w, t, a, imm as i32),
            b => {
                let b = self.in_reg(b, spare);
                self.lea_sum(w, t, a, b);
            }
        }
        self.finish(d);
    }

    /// `op [d], b`, where `d` is in memory, an operand too, and not wanted in a register next.
    fn in_place(&mut self, op: Alu, d: Slot, a: Opnd, b: Opnd) -> bool {
        let Opnd::Mem(disp) = self.home(d) else {
            return false;
        };
        let other = if a == Opnd::Mem(disp) {
            b
        } else if b == Opnd::Mem(disp) && op != Alu::Sub {
            a
        } else {
            return false;
        };
        if self.next_reads(d) {
            return false;
        }
        match other {
            Opnd::Reg(r) => self.asm.alu_rm_r(op, true, Rm::Env(disp), r),
            Opnd::Imm(imm) => self.asm.alu_rm_i(op, true, Rm::Env(disp), imm as i32),
            Opnd::Mem(_) => return false,
        }
        true
    }

    /// `lea t, [a + b]`.
    fn lea_sum(&mut self, w: bool, t: u8, a: u8, b: u8) {
        self.asm.ins(Map::Base, w, 0x8d, t, Rm::Mem { base: a, index: Some(b), disp: 0 });
    }

    /// The low half of an operand, unless it is in the register already.
    fn mov_low(&mut self, t: u8, a: Opnd) {
        if a != Opnd::Reg(t) {
            self.mov32(t, a);
        }
    }

    /// `a & !b`, `a | !b`, `!(a ^ b)`.
    fn with_complement(&mut self, op: AluOp, ty: Ty, d: Slot, a: Val, b: Val) {
        let w = ty == Ty::I64;
        let plain = match op {
            AluOp::Andn => Alu::And,
            AluOp::Orn => Alu::Or,
            _ => Alu::Xor,
        };
        if let Val::Imm(imm) = b {
            return self.classic(plain, ty, d, a, Val::Imm(!imm));
        }
        let t = self.target(d);
        let (a, b) = (self.val(a), self.val(b));
        match op {
            AluOp::Andn => {
                let b = self.in_reg(b, R15);
                let a = self.as_rm(a, R14);
                self.asm.vex(Vex::ANDN, w, t, b, a);
            }
            AluOp::Orn => {
                self.mov(R14, b);
                self.asm.ins(Map::Base, true, 0xf7, 2, Rm::Reg(R14));
                self.mov(t, a);
                self.asm.alu_r_rm(Alu::Or, w, t, Rm::Reg(R14));
            }
            _ => {
                let (a, b) = if b == Opnd::Reg(t) { (b, a) } else { (a, b) };
                let b = self.imm32(b, R14);
                self.mov(t, a);
                self.alu_r(Alu::Xor, w, t, b);
                self.asm.ins(Map::Base, w, 0xf7, 2, Rm::Reg(t));
            }
        }
        self.finish_ty(d, ty);
    }

    fn shift(&mut self, op: Shift, ty: Ty, d: Slot, a: Val, b: Val) {
        let w = ty == Ty::I64;
        let (a, b) = (self.val(a), self.val(b));
        let t = self.target(d);
        if let Opnd::Imm(imm) = b {
            return self.shift_imm(op, ty, d, a, (imm as u8) & if w { 63 } else { 31 });
        }
        let count = self.in_reg(b, R14);
        let a = self.as_rm(a, R15);
        let code = match op {
            Shift::Shl => Vex::SHLX,
            Shift::Sar => Vex::SARX,
            _ => Vex::SHRX,
        };
        self.asm.vex(code, w, t, count, a);
        self.finish_ty(d, ty);
    }

    fn shift_imm(&mut self, op: Shift, ty: Ty, d: Slot, a: Opnd, count: u8) {
        let t = self.target(d);
        if count == 0 {
            return self.un_opnd(UnOp::Mov, ty, d, a);
        }
        match (ty, op) {
            (Ty::I64, _) => {
                if let Opnd::Mem(disp) = self.home(d)
                    && a == Opnd::Mem(disp)
                    && !self.next_reads(d)
                {
                    return self.asm.shift_i(op, true, Rm::Env(disp), count);
                }
                self.mov(t, a);
                self.asm.shift_i(op, true, Rm::Reg(t), count);
                self.finish(d);
            }
            (Ty::I32, Shift::Sar) => {
                // The 64-bit shift of the sign-extended word is sign-extended already.
                let a = self.as_rm(a, t);
                self.asm.movsxd(t, a);
                self.asm.shift_i(op, true, Rm::Reg(t), count);
                self.finish(d);
            }
            _ => {
                self.mov_low(t, a);
                self.asm.shift_i(op, false, Rm::Reg(t), count);
                // A right shift has cleared the sign bit.
                self.finish_ty(d, if op == Shift::Shr { Ty::U32 } else { ty });
            }
        }
    }

    fn rotate(&mut self, op: Shift, ty: Ty, d: Slot, a: Val, b: Val) {
        let w = ty == Ty::I64;
        if let Val::Imm(imm) = b {
            let bits = if w { 64 } else { 32 };
            let left = (imm as u8) & (bits - 1);
            // rorx has a destination of its own.
            let right = if op == Shift::Ror { left } else { (bits - left) & (bits - 1) };
            let a = self.val(a);
            let t = self.target(d);
            let a = self.as_rm(a, R14);
            self.asm.vex(Vex::RORX, w, t, 0, a);
            self.asm.push(right);
            return self.finish_ty(d, ty);
        }
        // The count must be in cl.
        let (a, b) = (self.home_val(a), self.home_val(b));
        self.mov(RAX, a);
        let saved = b != Opnd::Reg(RCX) && self.is_pin(RCX);
        if saved {
            self.mov(R15, Opnd::Reg(RCX));
        }
        self.mov(RCX, b);
        self.asm.ins(Map::Base, w, 0xd3, op as u8, Rm::Reg(RAX));
        if saved {
            self.mov(RCX, Opnd::Reg(R15));
        }
        self.set_ty(d, RAX, ty);
    }

    /// Whether a host register holds a slot.
    pub(super) fn is_pin(&self, reg: u8) -> bool {
        self.be.pinned.iter().any(|&(r, _)| r == reg)
    }

    /// A result in `from` to `d`, extended as `ty` says.
    fn set_ty(&mut self, d: Slot, from: u8, ty: Ty) {
        if ty == Ty::I32 {
            let t = self.target(d);
            self.asm.movsxd(t, Rm::Reg(from));
            self.finish(d);
        } else {
            self.set(d, from);
        }
    }

    fn mul(&mut self, ty: Ty, d: Slot, a: Val, b: Val) {
        let w = ty == Ty::I64;
        let (mut a, mut b) = (self.val(a), self.val(b));
        let t = self.target(d);
        if matches!(a, Opnd::Imm(_)) || b == Opnd::Reg(t) {
            std::mem::swap(&mut a, &mut b);
        }
        if !w {
            b = truncate(b);
        }
        match self.imm32(b, R14) {
            Opnd::Imm(imm) => {
                let a = self.as_rm(a, R15);
                let byte = i64::from(imm as i8) == imm;
                self.asm.ins(Map::Base, w, if byte { 0x6b } else { 0x69 }, t, a);
                if byte { self.asm.push(imm as u8) } else { self.asm.push_i32(imm as i32) }
            }
            b => {
                self.mov(t, a);
                let b = self.as_rm(b, R14);
                self.asm.ins(Map::Of, w, 0xaf, t, b);
            }
        }
        self.finish_ty(d, ty);
    }

    /// Saves `rdx` in `r15` if it holds a slot; what to read for operands then.
    pub(super) fn save_rdx(&mut self) {
        if self.is_pin(RDX) {
            self.mov(R15, Opnd::Reg(RDX));
        }
    }

    /// Ends an operation with its result in `rax` and `rdx` overwritten.
    fn finish_with_rdx(&mut self, d: Slot, ty: Ty) {
        if self.is_pin(RDX) && self.pin_of(d) != Some(RDX) {
            self.mov(RDX, Opnd::Reg(R15));
        }
        self.set_ty(d, RAX, ty);
    }

    /// Where an operand is while `rdx` is saved.
    pub(super) fn beside_rdx(&self, from: Opnd) -> Opnd {
        if from == Opnd::Reg(RDX) { Opnd::Reg(R15) } else { from }
    }

    fn mul_high_signed(&mut self, d: Slot, a: Val, b: Val) {
        let (a, b) = (self.home_val(a), self.home_val(b));
        self.save_rdx();
        let b = self.beside_rdx(b);
        self.mov(RAX, a);
        let b = self.as_rm(b, R14);
        self.asm.ins(Map::Base, true, 0xf7, 5, b);
        self.mov(RAX, Opnd::Reg(RDX));
        self.finish_with_rdx(d, Ty::I64);
    }

    /// High half of an unsigned product, or of signed `a` by unsigned `b`.
    fn mul_high(&mut self, d: Slot, a: Val, b: Val, a_signed: bool) {
        let (a, b) = (self.home_val(a), self.home_val(b));
        self.save_rdx();
        let (a, b) = (self.beside_rdx(a), self.beside_rdx(b));
        self.mov(RDX, a);
        if a_signed {
            // A negative `a` read as unsigned is 2^64 too large: take `b` off the high half.
            self.mov(R14, b);
            self.asm.vex(Vex::MULX, true, RAX, RAX, Rm::Reg(R14));
            dynasm!(self.asm ; .arch x64
                ; sar rdx, 63
                ; and r14, rdx
                ; sub rax, r14
            );
        } else {
            let b = self.as_rm(b, R14);
            self.asm.vex(Vex::MULX, true, RAX, RAX, b);
        }
        self.finish_with_rdx(d, Ty::I64);
    }

    /// Division with RISC-V's results for a zero divisor and for overflow (chapter M): a divisor of −1 negates.
    ///
    /// The host's instruction gives quotient and remainder: if the other of the two comes soon, it is kept.
    fn div(&mut self, ty: Ty, d: Slot, a: Val, b: Val, signed: bool, rem: bool) {
        let w = ty == Ty::I64;
        let kept = self.be.slot_disp(KEPT);
        if self.kept_half == Some(self.next) {
            let t = self.target(d);
            self.mov(t, Opnd::Mem(kept));
            if ty == Ty::U32 {
                self.mov32(t, Opnd::Reg(t));
            }
            return self.finish_ty(d, ty);
        }
        let keep = self.other_half(ty, d, [a, b], signed, rem);
        self.kept_half = keep;
        let keep = keep.is_some();
        let (a, b) = (self.home_val(a), self.home_val(b));
        self.mov(RAX, a);
        self.mov(R14, b);
        self.save_rdx();
        if let Some(entry) = self.remembered_divisor().filter(|_| !signed && w) {
            self.divide_by_product(entry, rem, keep);
            return self.finish_with_rdx(d, ty);
        }
        self.asm.test_rr(w, R14);
        let zero = self.asm.jcc_short(Cc::E);
        let minus_one = signed.then(|| {
            self.asm.alu_rm_i(Alu::Cmp, w, Rm::Reg(R14), -1);
            self.asm.jcc_short(Cc::E)
        });
        match (signed, w) {
            (true, true) => dynasm!(self.asm ; .arch x64 ; cqo ; idiv r14),
            (true, false) => dynasm!(self.asm ; .arch x64 ; cdq ; idiv r14d),
            (false, true) => dynasm!(self.asm ; .arch x64 ; xor edx, edx ; div r14),
            (false, false) => dynasm!(self.asm ; .arch x64 ; xor edx, edx ; div r14d),
        }
        if keep {
            self.asm.mov_rm_r(true, Rm::Env(kept), if rem { RAX } else { RDX });
        }
        if rem {
            self.mov(RAX, Opnd::Reg(RDX));
        }
        let done = self.asm.jmp_short();
        if let Some(minus_one) = minus_one {
            self.asm.bind_short(minus_one);
            if !rem || keep {
                self.asm.ins(Map::Base, w, 0xf7, 3, Rm::Reg(RAX));
            }
            if keep && !rem {
                self.asm.mov_rm_i(true, Rm::Env(kept), 0);
            } else if keep {
                self.asm.mov_rm_r(true, Rm::Env(kept), RAX);
            }
            if rem {
                dynasm!(self.asm ; .arch x64 ; xor eax, eax);
            }
            let done = self.asm.jmp_short();
            self.zero_divisor(zero, rem, keep);
            self.asm.bind_short(done);
        } else {
            self.zero_divisor(zero, rem, keep);
        }
        self.asm.bind_short(done);
        if ty == Ty::U32 {
            // The paths that did not compute in 32 bits.
            self.mov32(RAX, Opnd::Reg(RAX));
        }
        self.finish_with_rdx(d, ty);
    }

    /// Where the division being lowered remembers its last divisor, in code that runs often.
    fn remembered_divisor(&self) -> Option<i32> {
        let (divisors, number) = (self.be.config.env.divisors, self.insn.pc.0 as usize / 2 % DIVISORS);
        let offset = (number * size_of::<Divisor>()) as i32;
        (divisors != 0 && self.info.hints.hot).then(|| self.be.env(divisors + offset))
    }

    /// `rax` by `r14`, which mostly is the divisor of the last time: a product takes the host half as long as a division.
    fn divide_by_product(&mut self, entry: i32, rem: bool, keep: bool) {
        let (magic, shift) = (entry + offset_of!(Divisor, magic) as i32, entry + offset_of!(Divisor, shift) as i32);
        dynasm!(self.asm ; .arch x64 ; cmp r14, [rbp + entry]);
        let from = self.asm.jcc(Cc::Ne);
        dynasm!(self.asm ; .arch x64
            ; mov rdx, [rbp + magic]
            ; mulx rdx, r14, rax
            ; mov r14, rax
            ; sub r14, rdx
            ; shr r14, 1
            ; add rdx, r14
            ; mov r14, [rbp + shift]
            ; shrx rdx, rdx, r14
        );
        if rem || keep {
            dynasm!(self.asm ; .arch x64 ; mov r14, [rbp + entry] ; imul r14, rdx ; sub rax, r14);
        }
        // The quotient is in rdx and the remainder in rax, the other way round than behind a division.
        if keep {
            let kept = Rm::Env(self.be.slot_disp(KEPT));
            self.asm.mov_rm_r(true, kept, if rem { RDX } else { RAX });
        }
        if !rem {
            self.mov(RAX, Opnd::Reg(RDX));
        }
        let back = self.asm.pos();
        self.put_off(Cold::DivideByHost(OtherDivisor { from, back, rem, keep, entry }));
    }

    /// The same by a number that is not remembered; now and then it is from now on.
    pub(super) fn divide_by_other(&mut self, other: OtherDivisor) {
        const PATIENCE: i32 = 16;
        let OtherDivisor { from, back, rem, keep, entry } = other;
        let at = |offset: usize| entry + offset as i32;
        let (magic, shift) = (at(offset_of!(Divisor, magic)), at(offset_of!(Divisor, shift)));
        let (patience, kept) = (at(offset_of!(Divisor, patience)), self.be.slot_disp(KEPT));
        self.asm.bind(from);
        dynasm!(self.asm ; .arch x64 ; sub QWORD [rbp + patience], BYTE 1);
        let not_yet = self.asm.jcc_short(Cc::Ae);
        // Powers of two, and 0, have no such product.
        dynasm!(self.asm ; .arch x64
            ; mov QWORD [rbp + patience], PATIENCE
            ; lea rdx, [r14 - 1]
            ; test rdx, r14
        );
        let power = self.asm.jcc_short(Cc::E);
        // 2^64 times the power of two below the divisor, divided by it; twice that, rounded up.
        dynasm!(self.asm ; .arch x64
            ; mov [rbp + kept], rax
            ; bsr rdx, r14
            ; mov [rbp + shift], rdx
            ; xor eax, eax
            ; bts rax, rdx
            ; mov rdx, rax
            ; xor eax, eax
            ; div r14
            ; add rax, rax
            ; add rdx, rdx
        );
        let carry = self.asm.jcc_short(Cc::B);
        dynasm!(self.asm ; .arch x64 ; cmp rdx, r14);
        let less = self.asm.jcc_short(Cc::B);
        self.asm.bind_short(carry);
        dynasm!(self.asm ; .arch x64 ; add rax, 1);
        self.asm.bind_short(less);
        dynasm!(self.asm ; .arch x64
            ; add rax, 1
            ; mov [rbp + magic], rax
            ; mov [rbp + entry], r14
            ; mov rax, [rbp + kept]
        );
        self.asm.bind_short(not_yet);
        self.asm.bind_short(power);
        self.asm.test_rr(true, R14);
        let zero = self.asm.jcc_short(Cc::E);
        dynasm!(self.asm ; .arch x64 ; xor edx, edx ; div r14);
        if keep {
            self.asm.mov_rm_r(true, Rm::Env(kept), if rem { RAX } else { RDX });
        }
        if rem {
            self.mov(RAX, Opnd::Reg(RDX));
        }
        self.asm.jmp_back(back);
        self.zero_divisor(zero, rem, keep);
        self.asm.jmp_back(back);
    }

    /// One more than the index of the operation that computes the other half of a division, if it comes soon and
    /// nothing is in its way.
    fn other_half(&self, ty: Ty, d: Slot, operands: [Val; 2], signed: bool, rem: bool) -> Option<usize> {
        let changes = |op: &Op| {
            let operand = |val: &Val| matches!(val, Val::Slot(slot) if super::writes(op, *slot));
            operands.iter().any(operand) || super::writes(op, KEPT) || super::reads(op, KEPT)
        };
        if self.be.config.optimise == Optimise::Off || operands.contains(&Val::Slot(d)) {
            return None;
        }
        let wanted = match (signed, rem) {
            (true, true) => AluOp::DivS,
            (true, false) => AluOp::RemS,
            (false, true) => AluOp::DivU,
            (false, false) => AluOp::RemU,
        };
        for (i, next) in self.ops.iter().enumerate().skip(self.next).take(12) {
            match *next {
                Op::Alu { op, ty: t, a, b, .. } if op == wanted && t == ty && [a, b] == operands => return Some(i + 1),
                Op::Call { .. } => return None,
                // It would be kept in the same place.
                Op::Alu { op: AluOp::DivS | AluOp::DivU | AluOp::RemS | AluOp::RemU, .. } => return None,
                _ if changes(next) => return None,
                _ => {}
            }
        }
        None
    }

    /// A quotient of all ones; the remainder, the dividend, is in `rax` already.
    fn zero_divisor(&mut self, from: crate::asm::ShortFixup, rem: bool, keep: bool) {
        self.asm.bind_short(from);
        let kept = Rm::Env(self.be.slot_disp(KEPT));
        match (keep, rem) {
            (true, true) => self.asm.mov_rm_i(true, kept, -1),
            (true, false) => self.asm.mov_rm_r(true, kept, RAX),
            _ => {}
        }
        if !rem {
            dynasm!(self.asm ; .arch x64 ; or rax, BYTE -1);
        }
    }

    /// `cc` says when the first operand is the result.
    fn min_max(&mut self, cc: Cc, ty: Ty, d: Slot, a: Val, b: Val) {
        let w = ty == Ty::I64;
        let (mut a, mut b) = (self.val(a), self.val(b));
        let t = self.target(d);
        if b == Opnd::Reg(t) || matches!(a, Opnd::Imm(_)) {
            std::mem::swap(&mut a, &mut b);
        }
        let b = self.as_rm(b, R14);
        self.mov(t, a);
        self.asm.alu_r_rm(Alu::Cmp, w, t, b);
        self.asm.cmov(cc.invert(), w, t, b);
        self.finish_ty(d, ty);
    }

    /// Emits a 64-bit compare and gives the condition to test for `cc` of `a` and `b`.
    pub(super) fn compare(&mut self, cc: Cc, a: Val, b: Val) -> Cc {
        let (mut a, mut b, mut cc) = (self.val(a), self.val(b), cc);
        if matches!(a, Opnd::Imm(_)) {
            std::mem::swap(&mut a, &mut b);
            cc = cc.swap();
        }
        let b = self.imm32(b, R14);
        match (a, b) {
            (Opnd::Reg(r), Opnd::Imm(0)) => self.asm.test_rr(true, r),
            (Opnd::Reg(r), b) => self.alu_r(Alu::Cmp, true, r, b),
            (Opnd::Mem(disp), Opnd::Imm(imm)) => {
                self.asm.alu_rm_i(Alu::Cmp, true, Rm::Env(disp), imm as i32);
            }
            (Opnd::Mem(disp), Opnd::Reg(r)) => {
                self.asm.alu_rm_r(Alu::Cmp, true, Rm::Env(disp), r);
            }
            (a, b) => {
                // r15, so that what `rax` holds stays.
                self.mov(R15, a);
                self.alu_r(Alu::Cmp, true, R15, b);
            }
        }
        cc
    }

    fn set_less(&mut self, cc: Cc, d: Slot, a: Val, b: Val) {
        let t = self.target(d);
        let free = self.val(a) != Opnd::Reg(t) && self.val(b) != Opnd::Reg(t);
        if free {
            // Before the compare: it writes the flags.
            self.asm.alu_r_rm(Alu::Xor, false, t, Rm::Reg(t));
        }
        let cc = self.compare(cc, a, b);
        self.asm.setcc(cc, t);
        if !free {
            self.asm.ins8(Map::Of, 0xb6, t, Rm::Reg(t));
        }
        self.finish(d);
    }

    /// `(a << n) + b`.
    fn shift_add(&mut self, n: u8, d: Slot, a: Val, b: Val) {
        let (a, b) = (self.val(a), self.val(b));
        let t = self.target(d);
        let b = self.imm32(b, R15);
        let a = self.in_reg(a, R14);
        match b {
            Opnd::Imm(imm) => self.asm.lea_scaled(t, None, a, n, imm as i32),
            b => {
                let b = self.in_reg(b, R15);
                self.asm.lea_scaled(t, Some(b), a, n, 0);
            }
        }
        self.finish(d);
    }

    /// bts, btr, btc.
    fn bit_op(&mut self, ext: u8, opcode: u8, ty: Ty, d: Slot, a: Val, b: Val) {
        let w = ty == Ty::I64;
        let (a, b) = (self.val(a), self.val(b));
        let t = self.target(d);
        match b {
            Opnd::Imm(imm) => {
                self.mov(t, a);
                self.asm.ins(Map::Of, w, 0xba, ext, Rm::Reg(t));
                self.asm.push(imm as u8 & if w { 63 } else { 31 });
            }
            b => {
                let b = if b == Opnd::Reg(t) && a != b {
                    self.mov(R14, b);
                    R14
                } else {
                    self.in_reg(b, R14)
                };
                self.mov(t, a);
                self.asm.ins(Map::Of, w, opcode, b, Rm::Reg(t));
            }
        }
        self.finish_ty(d, ty);
    }

    fn bit_extract(&mut self, ty: Ty, d: Slot, a: Val, b: Val) {
        let w = ty == Ty::I64;
        let (a, b) = (self.val(a), self.val(b));
        let t = self.target(d);
        match b {
            Opnd::Imm(imm) => {
                self.mov(t, a);
                let n = imm as u8 & if w { 63 } else { 31 };
                self.asm.shift_i(Shift::Shr, w, Rm::Reg(t), n);
            }
            b => {
                let b = self.in_reg(b, R14);
                let a = self.as_rm(a, R15);
                self.asm.vex(Vex::SHRX, w, t, b, a);
            }
        }
        self.asm.alu_rm_i(Alu::And, false, Rm::Reg(t), 1);
        self.finish(d);
    }

    pub(super) fn un(&mut self, op: UnOp, ty: Ty, d: Slot, a: Val) {
        if let Val::Imm(imm) = a {
            return self.set_imm(d, interp::un(op, ty, imm as u64) as i64);
        }
        if op == UnOp::SextW && self.is_extended_already() {
            if a == Val::Slot(d) {
                self.cached = self.last;
                return;
            }
            let a = self.val(a);
            return self.move_to(d, a);
        }
        let a = self.val(a);
        self.un_opnd(op, ty, d, a);
    }

    /// A one-operand operation on a register or memory operand (or a constant, which is moved first).
    fn un_opnd(&mut self, op: UnOp, ty: Ty, d: Slot, a: Opnd) {
        let t = self.target(d);
        let w = ty == Ty::I64;
        if let (UnOp::Mov, Ty::I64) = (op, ty) {
            return self.move_to(d, a);
        }
        let rm = self.as_rm(a, R14);
        match (op, ty) {
            (UnOp::Mov | UnOp::SextW, Ty::I64 | Ty::I32) | (UnOp::ZextW, Ty::I32) => {
                self.asm.movsxd(t, rm);
                return self.finish(d);
            }
            (UnOp::Mov | UnOp::SextW | UnOp::ZextW, _) => self.asm.mov_r_rm(false, t, rm),
            (UnOp::SextB, _) => self.extend8(w || ty == Ty::I32, 0xbe, t, rm),
            (UnOp::SextH, _) => self.asm.ins(Map::Of, w || ty == Ty::I32, 0xbf, t, rm),
            (UnOp::ZextB, _) => self.extend8(false, 0xb6, t, rm),
            (UnOp::ZextH, _) => self.asm.ins(Map::Of, false, 0xb7, t, rm),
            (UnOp::Clz, _) => self.count(w, 0xbd, t, rm),
            (UnOp::Ctz, _) => self.count(w, 0xbc, t, rm),
            (UnOp::Popcnt, _) => self.count(w, 0xb8, t, rm),
            (UnOp::Bswap, _) => {
                if rm != Rm::Reg(t) {
                    self.asm.mov_r_rm(w, t, rm);
                }
                self.byte_swap(w, t);
                return self.finish_ty(d, ty);
            }
            (UnOp::OrcB, _) => {
                self.or_combine(t, rm);
                if ty == Ty::U32 {
                    self.mov32(t, Opnd::Reg(t));
                }
                return self.finish_ty(d, ty);
            }
        }
        // Small or already extended: nothing to add.
        self.finish(d);
    }

    fn move_to(&mut self, d: Slot, a: Opnd) {
        match (self.pin_of(d), a) {
            (_, Opnd::Imm(imm)) => self.set_imm(d, imm),
            (Some(t), a) => self.mov(t, a),
            (None, Opnd::Reg(r)) if r != RAX => {
                self.asm.mov_rm_r(true, Rm::Env(self.be.slot_disp(d)), r);
            }
            (None, a) => {
                self.mov(RAX, a);
                self.finish(d);
            }
        }
    }

    /// `movzx`/`movsx t, rm8`.
    fn extend8(&mut self, w: bool, opcode: u8, t: u8, rm: Rm) {
        if w {
            // REX.W makes every byte register addressable.
            self.asm.ins(Map::Of, true, opcode, t, rm);
        } else {
            self.asm.ins8(Map::Of, opcode, t, rm);
        }
    }

    /// `lzcnt`, `tzcnt`, `popcnt`.
    fn count(&mut self, w: bool, opcode: u8, t: u8, rm: Rm) {
        self.asm.push(0xf3);
        self.asm.ins(Map::Of, w, opcode, t, rm);
    }

    fn byte_swap(&mut self, w: bool, t: u8) {
        let rex = 0x40 | u8::from(w) << 3 | t >> 3;
        if rex != 0x40 {
            self.asm.push(rex);
        }
        self.asm.push(0x0f);
        self.asm.push(0xc8 | (t & 7));
    }

    /// Every byte that is not zero to 0xff.
    fn or_combine(&mut self, t: u8, rm: Rm) {
        match rm {
            Rm::Reg(r) => dynasm!(self.asm ; .arch x64 ; vmovq xmm0, Rq(r)),
            Rm::Env(disp) => dynasm!(self.asm ; .arch x64 ; vmovq xmm0, QWORD [rbp + disp]),
            Rm::Mem { .. } | Rm::Scaled { .. } => {}
        }
        dynasm!(self.asm ; .arch x64
            ; vpxor xmm1, xmm1, xmm1
            ; vpcmpeqb xmm0, xmm0, xmm1
            ; vmovq Rq(t), xmm0
            ; not Rq(t)
        );
    }

    pub(super) fn get_pc(&mut self, d: Slot, pc: PagePc) {
        let t = self.target(d);
        self.page_va(t, pc);
        self.finish(d);
    }

    /// The virtual address of `pc` to a register.
    pub(super) fn page_va(&mut self, t: u8, pc: PagePc) {
        let page_base = self.be.env(self.be.config.env.page_base);
        self.mov(t, Opnd::Mem(page_base));
        if pc.0 != 0 && self.kept {
            self.asm.lea(true, t, t, pc.0);
        } else if pc.0 != 0 {
            self.asm.alu_rm_i(Alu::Add, true, Rm::Reg(t), pc.0);
        }
    }
}

/// A constant's low 32 bits, sign-extended.
fn truncate(from: Opnd) -> Opnd {
    match from {
        Opnd::Imm(imm) => {
            let low = i64::from(imm as i32);
            debug_assert!(fits32(low));
            Opnd::Imm(low)
        }
        other => other,
    }
}
