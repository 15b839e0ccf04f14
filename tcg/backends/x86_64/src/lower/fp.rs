//! Floating point on the host's unit.
//!
//! MXCSR holds the guest's rounding mode and collects its flags, whose meaning is the same; tininess is
//! detected after rounding on both sides. What differs is put right here: NaN results are the canonical one,
//! singles are NaN-boxed in their slots, and out-of-range conversions saturate. The rare cases, and every
//! operation with a rounding mode of its own, go through the runtime's function.
//!
//! Slots of singles are read and written in halves, never whole, so that the host forwards its own stores.

use super::{Cold, Fixups, Lower, Opnd, boxed_bit};
use crate::asm::{Alu, Cc, Fixup, Map, R14, RAX, Rm as Place, Shift};
use dynasm::dynasm;
use dynasmrt::DynasmApi;
use mimus_tcg_ir::backend::pack_fp;
use mimus_tcg_ir::{FpFmt, FpOp, Rm, Slot};

/// Scalar instructions of the form `op xmm0, xmm0, [b]`.
macro_rules! scalar {
    ($l:expr, $fmt:expr, $double:tt, $single:tt, $b:expr) => {
        match $fmt {
            FpFmt::F64 => dynasm!($l.asm ; .arch x64 ; $double xmm0, xmm0, QWORD [rbp + $b]),
            FpFmt::F32 => dynasm!($l.asm ; .arch x64 ; $single xmm0, xmm0, DWORD [rbp + $b]),
        }
    };
}

/// Fused operations of the form `op xmm0, xmm1, [c]`.
macro_rules! fused {
    ($l:expr, $fmt:expr, $double:tt, $single:tt, $c:expr) => {
        match $fmt {
            FpFmt::F64 => dynasm!($l.asm ; .arch x64 ; $double xmm0, xmm1, QWORD [rbp + $c]),
            FpFmt::F32 => dynasm!($l.asm ; .arch x64 ; $single xmm0, xmm1, DWORD [rbp + $c]),
        }
    };
}

impl Lower<'_> {
    pub(super) fn fp(&mut self, op: FpOp, fmt: FpFmt, rm: Rm, d: Slot, abc: [Slot; 3]) {
        let [a, b, c] = abc;
        let packed = pack_fp(op, fmt, rm, d, a, b, c);
        if self.in_software(op, fmt, rm, d, abc) {
            self.call_fp(packed);
        } else {
            let [da, db, dc] = abc.map(|slot| self.be.slot_disp(slot));
            match op {
                FpOp::Add | FpOp::Sub | FpOp::Mul | FpOp::Div | FpOp::Sqrt => {
                    self.arithmetic(op, fmt, packed, d, abc);
                }
                FpOp::MAdd | FpOp::MSub | FpOp::NMSub | FpOp::NMAdd => {
                    let from = self.check_boxes(fmt, &abc);
                    self.fused(op, fmt, packed, d, from, [da, db, dc]);
                }
                FpOp::Min | FpOp::Max => self.fp_min_max(op, fmt, packed, d, [a, b]),
                FpOp::Eq | FpOp::Lt | FpOp::Le => self.fp_compare(op, fmt, packed, d, [a, b]),
                FpOp::Sgnj | FpOp::Sgnjn | FpOp::Sgnjx => {
                    self.sign_inject(op, fmt, packed, d, [a, b]);
                }
                FpOp::ToI32 | FpOp::ToI64 => self.round_to_int(op, fmt, rm, packed, d, a),
                FpOp::FromI32 | FpOp::FromU32 | FpOp::FromI64 | FpOp::FromU64 => {
                    self.convert_int(op, fmt, packed, d, a);
                }
                FpOp::CvtFmt => self.convert_format(fmt, packed, d, a),
                FpOp::MvToInt => self.move_to_int(fmt, d, a),
                FpOp::MvFromInt => self.move_from_int(fmt, d, a),
                FpOp::ToU32 | FpOp::ToU64 | FpOp::Class => {}
            }
        }
    }

    /// Whether the runtime's function does all of the operation: the host has no such operation, or rounds
    /// by MXCSR only, or a floating-point slot is (unusually) in a general register.
    fn in_software(&self, op: FpOp, fmt: FpFmt, rm: Rm, d: Slot, [a, b, c]: [Slot; 3]) -> bool {
        let rounds = match op {
            FpOp::Add
            | FpOp::Sub
            | FpOp::Mul
            | FpOp::Div
            | FpOp::Sqrt
            | FpOp::MAdd
            | FpOp::MSub
            | FpOp::NMSub
            | FpOp::NMAdd
            | FpOp::FromI64
            | FpOp::FromU64 => true,
            FpOp::FromI32 | FpOp::FromU32 | FpOp::CvtFmt => fmt == FpFmt::F32,
            FpOp::ToI32 | FpOp::ToI64 => rm != Rm::ToZero,
            FpOp::ToU32 | FpOp::ToU64 | FpOp::Class => return true,
            _ => false,
        };
        let pinned = |slot| self.be.pin_of(slot).is_some();
        let operands = match op {
            FpOp::FromI32 | FpOp::FromU32 | FpOp::FromI64 | FpOp::FromU64 | FpOp::MvFromInt => false,
            FpOp::MAdd | FpOp::MSub | FpOp::NMSub | FpOp::NMAdd => pinned(a) || pinned(b) || pinned(c),
            FpOp::Sqrt | FpOp::CvtFmt | FpOp::MvToInt | FpOp::ToI32 | FpOp::ToI64 => pinned(a),
            _ => pinned(a) || pinned(b),
        };
        rounds && rm != Rm::Dynamic || operands || result_is_float(op) && pinned(d)
    }

    /// Jumps out unless the operands, if singles, are NaN-boxed.
    fn check_boxes(&mut self, fmt: FpFmt, slots: &[Slot]) -> Fixups {
        let mut from = Fixups::default();
        if fmt == FpFmt::F64 {
            return from;
        }
        for &slot in slots {
            if self.boxed & boxed_bit(slot) != 0 {
                continue;
            }
            let high = Place::Env(self.be.slot_disp(slot) + 4);
            self.asm.alu_rm_i(Alu::Cmp, false, high, -1);
            // Still not known to be boxed after it: software's work comes back here too.
            from.add(self.asm.jcc(Cc::Ne));
        }
        from
    }

    /// Has the whole operation done in software when a jump of `from` is taken; continues here.
    fn soften(&mut self, from: Fixups, packed: u64) {
        let back = self.asm.pos();
        if from.0.iter().any(Option::is_some) {
            self.cold.push(Cold::Fp { from, packed, back });
        }
    }

    /// `xmm0` = the operand at `disp`.
    fn load_fp(&mut self, fmt: FpFmt, disp: i32) {
        match fmt {
            FpFmt::F64 => dynasm!(self.asm ; .arch x64 ; vmovsd xmm0, QWORD [rbp + disp]),
            FpFmt::F32 => dynasm!(self.asm ; .arch x64 ; vmovss xmm0, DWORD [rbp + disp]),
        }
    }

    /// `d` = `xmm0`, boxed.
    fn store_fp(&mut self, fmt: FpFmt, d: Slot) {
        let disp = self.be.slot_disp(d);
        match fmt {
            FpFmt::F64 => dynasm!(self.asm ; .arch x64 ; vmovsd QWORD [rbp + disp], xmm0),
            FpFmt::F32 => {
                dynasm!(self.asm ; .arch x64 ; vmovss DWORD [rbp + disp], xmm0);
                self.write_box(d);
            }
        }
    }

    /// Upper half of a slot with a single.
    pub(super) fn write_box(&mut self, d: Slot) {
        if self.boxed & boxed_bit(d) == 0 {
            let high = Place::Env(self.be.slot_disp(d) + 4);
            self.asm.mov_rm_i(false, high, -1);
        }
    }

    /// Jumps if `xmm0` is a NaN.
    fn nan_jump(&mut self, fmt: FpFmt) -> Fixup {
        match fmt {
            FpFmt::F64 => dynasm!(self.asm ; .arch x64 ; vucomisd xmm0, xmm0),
            FpFmt::F32 => dynasm!(self.asm ; .arch x64 ; vucomiss xmm0, xmm0),
        }
        self.asm.jcc(Cc::P)
    }

    /// Makes a NaN in `xmm0` the canonical one.
    fn canonicalize(&mut self, fmt: FpFmt) {
        let from = self.nan_jump(fmt);
        let back = self.asm.pos();
        self.cold.push(Cold::Nan { from, fmt, back });
    }

    pub(super) fn canonical_nan(&mut self, from: Fixup, fmt: FpFmt, back: u32) {
        self.asm.bind(from);
        let nan = match fmt {
            FpFmt::F64 => 0x7ff8_0000_0000_0000,
            FpFmt::F32 => 0x7fc0_0000,
        };
        self.asm.mov_ri(RAX, nan);
        dynasm!(self.asm ; .arch x64 ; vmovq xmm0, rax);
        self.asm.jmp_back(back);
    }

    fn arithmetic(&mut self, op: FpOp, fmt: FpFmt, packed: u64, d: Slot, [a, b, _]: [Slot; 3]) {
        let from = if op == FpOp::Sqrt { self.check_boxes(fmt, &[a]) } else { self.check_boxes(fmt, &[a, b]) };
        let (da, db) = (self.be.slot_disp(a), self.be.slot_disp(b));
        if op == FpOp::Sqrt {
            dynasm!(self.asm ; .arch x64 ; vxorps xmm0, xmm0, xmm0);
        } else {
            self.load_fp(fmt, da);
        }
        match op {
            FpOp::Add => scalar!(self, fmt, vaddsd, vaddss, db),
            FpOp::Sub => scalar!(self, fmt, vsubsd, vsubss, db),
            FpOp::Mul => scalar!(self, fmt, vmulsd, vmulss, db),
            FpOp::Div => scalar!(self, fmt, vdivsd, vdivss, db),
            _ => scalar!(self, fmt, vsqrtsd, vsqrtss, da),
        }
        self.canonicalize(fmt);
        self.store_fp(fmt, d);
        self.soften(from, packed);
    }

    /// A NaN result is redone in software: an invalid product with a quiet NaN addend raises a flag that the
    /// host does not.
    fn fused(&mut self, op: FpOp, fmt: FpFmt, packed: u64, d: Slot, mut from: Fixups, [da, db, dc]: [i32; 3]) {
        self.load_fp(fmt, da);
        match fmt {
            FpFmt::F64 => dynasm!(self.asm ; .arch x64 ; vmovsd xmm1, QWORD [rbp + db]),
            FpFmt::F32 => dynasm!(self.asm ; .arch x64 ; vmovss xmm1, DWORD [rbp + db]),
        }
        match op {
            FpOp::MAdd => fused!(self, fmt, vfmadd213sd, vfmadd213ss, dc),
            FpOp::MSub => fused!(self, fmt, vfmsub213sd, vfmsub213ss, dc),
            FpOp::NMSub => fused!(self, fmt, vfnmadd213sd, vfnmadd213ss, dc),
            _ => fused!(self, fmt, vfnmsub213sd, vfnmsub213ss, dc),
        }
        from.add(self.nan_jump(fmt));
        self.store_fp(fmt, d);
        self.soften(from, packed);
    }

    /// Equal operands (zeros of either sign) and NaNs go to software.
    fn fp_min_max(&mut self, op: FpOp, fmt: FpFmt, packed: u64, d: Slot, [a, b]: [Slot; 2]) {
        let mut from = self.check_boxes(fmt, &[a, b]);
        let (da, db) = (self.be.slot_disp(a), self.be.slot_disp(b));
        self.load_fp(fmt, da);
        match fmt {
            FpFmt::F64 => dynasm!(self.asm ; .arch x64 ; vucomisd xmm0, QWORD [rbp + db]),
            FpFmt::F32 => dynasm!(self.asm ; .arch x64 ; vucomiss xmm0, DWORD [rbp + db]),
        }
        // Also set by "unordered".
        from.add(self.asm.jcc(Cc::E));
        match op {
            FpOp::Min => scalar!(self, fmt, vminsd, vminss, db),
            _ => scalar!(self, fmt, vmaxsd, vmaxss, db),
        }
        self.store_fp(fmt, d);
        self.soften(from, packed);
    }

    fn fp_compare(&mut self, op: FpOp, fmt: FpFmt, packed: u64, d: Slot, [a, b]: [Slot; 2]) {
        let from = self.check_boxes(fmt, &[a, b]);
        let (da, db) = (self.be.slot_disp(a), self.be.slot_disp(b));
        // Predicates EQ_OQ (quiet), LT_OS and LE_OS (signalling).
        let predicate = match op {
            FpOp::Eq => 0i8,
            FpOp::Lt => 1,
            _ => 2,
        };
        self.load_fp(fmt, da);
        match fmt {
            FpFmt::F64 => {
                dynasm!(self.asm ; .arch x64 ; vcmpsd xmm0, xmm0, QWORD [rbp + db], predicate);
            }
            FpFmt::F32 => {
                // Reads 4 bytes; the assembler's table has the operand as 8, which encodes the same.
                dynasm!(self.asm ; .arch x64 ; vcmpss xmm0, xmm0, QWORD [rbp + db], predicate);
            }
        }
        let t = self.target(d);
        dynasm!(self.asm ; .arch x64 ; vmovd Rd(t), xmm0);
        self.asm.alu_rm_i(Alu::And, false, Place::Reg(t), 1);
        self.put_int(d);
        self.soften(from, packed);
    }

    /// Ends an operation that computed an integer in [`Lower::target`]. Where software may have put it in the
    /// slot's memory, `rax` is not known to hold it.
    fn put_int(&mut self, d: Slot) {
        if self.be.pin_of(d).is_none() {
            self.asm.mov_rm_r(true, Place::Env(self.be.slot_disp(d)), RAX);
        }
    }

    fn sign_inject(&mut self, op: FpOp, fmt: FpFmt, packed: u64, d: Slot, [a, b]: [Slot; 2]) {
        let from = self.check_boxes(fmt, &[a, b]);
        let w = fmt == FpFmt::F64;
        let (da, db) = (self.be.slot_disp(a), self.be.slot_disp(b));
        let sign: u8 = if w { 63 } else { 31 };
        self.asm.mov_r_rm(w, RAX, Place::Env(da));
        // Opcode extensions of the bit operations: 6 resets, 7 complements.
        match (op, a == b) {
            (FpOp::Sgnj, true) => {}
            (FpOp::Sgnjn, true) => self.bit_of_rax(7, w, sign),
            (_, true) => self.bit_of_rax(6, w, sign),
            (op, false) => {
                self.asm.mov_r_rm(w, R14, Place::Env(db));
                if op == FpOp::Sgnjn {
                    self.asm.ins(Map::Base, w, 0xf7, 2, Place::Reg(R14));
                }
                self.asm.shift_i(Shift::Shr, w, Place::Reg(R14), sign);
                self.asm.shift_i(Shift::Shl, w, Place::Reg(R14), sign);
                if op == FpOp::Sgnjx {
                    self.asm.alu_r_rm(Alu::Xor, w, RAX, Place::Reg(R14));
                } else {
                    self.bit_of_rax(6, w, sign);
                    self.asm.alu_r_rm(Alu::Or, w, RAX, Place::Reg(R14));
                }
            }
        }
        self.asm.mov_rm_r(w, Place::Env(self.be.slot_disp(d)), RAX);
        if !w {
            self.write_box(d);
        }
        self.soften(from, packed);
    }

    /// `btr`/`btc rax, n`.
    fn bit_of_rax(&mut self, ext: u8, w: bool, n: u8) {
        self.asm.ins(Map::Of, w, 0xba, ext, Place::Reg(RAX));
        self.asm.push(n);
    }

    /// The host's result for what does not fit is the most negative integer: done again in software.
    fn round_to_int(&mut self, op: FpOp, fmt: FpFmt, rm: Rm, packed: u64, d: Slot, a: Slot) {
        let mut from = self.check_boxes(fmt, &[a]);
        let da = self.be.slot_disp(a);
        let cut = rm == Rm::ToZero;
        let wide = op == FpOp::ToI64;
        match (fmt, cut, wide) {
            (FpFmt::F64, true, true) => {
                dynasm!(self.asm ; .arch x64 ; cvttsd2si rax, QWORD [rbp + da]);
            }
            (FpFmt::F64, true, false) => {
                dynasm!(self.asm ; .arch x64 ; cvttsd2si eax, QWORD [rbp + da]);
            }
            (FpFmt::F64, false, true) => {
                dynasm!(self.asm ; .arch x64 ; cvtsd2si rax, QWORD [rbp + da]);
            }
            (FpFmt::F64, false, false) => {
                dynasm!(self.asm ; .arch x64 ; cvtsd2si eax, QWORD [rbp + da]);
            }
            (FpFmt::F32, true, true) => {
                dynasm!(self.asm ; .arch x64 ; cvttss2si rax, DWORD [rbp + da]);
            }
            (FpFmt::F32, true, false) => {
                dynasm!(self.asm ; .arch x64 ; cvttss2si eax, DWORD [rbp + da]);
            }
            (FpFmt::F32, false, true) => {
                dynasm!(self.asm ; .arch x64 ; cvtss2si rax, DWORD [rbp + da]);
            }
            (FpFmt::F32, false, false) => {
                dynasm!(self.asm ; .arch x64 ; cvtss2si eax, DWORD [rbp + da]);
            }
        }
        // Only the most negative integer overflows when one is taken from it.
        self.asm.alu_rm_i(Alu::Cmp, wide, Place::Reg(RAX), 1);
        from.add(self.asm.jcc(Cc::O));
        if !wide {
            self.asm.movsxd(RAX, Place::Reg(RAX));
        }
        match self.be.pin_of(d) {
            Some(t) => self.mov(t, Opnd::Reg(RAX)),
            None => self.put_int(d),
        }
        self.soften(from, packed);
    }

    fn convert_int(&mut self, op: FpOp, fmt: FpFmt, packed: u64, d: Slot, a: Slot) {
        let mut from = Fixups::default();
        let home = self.home(a);
        match op {
            FpOp::FromI32 => {
                let a = self.as_rm(home, RAX);
                self.asm.movsxd(RAX, a);
            }
            FpOp::FromU32 => self.mov32(RAX, home),
            _ => self.mov(RAX, home),
        }
        if op == FpOp::FromU64 {
            self.asm.test_rr(true, RAX);
            from.add(self.asm.jcc(Cc::S));
        }
        // Clears the upper half, which the conversion would otherwise wait for.
        dynasm!(self.asm ; .arch x64 ; vxorps xmm0, xmm0, xmm0);
        match fmt {
            FpFmt::F64 => dynasm!(self.asm ; .arch x64 ; vcvtsi2sd xmm0, xmm0, rax),
            FpFmt::F32 => dynasm!(self.asm ; .arch x64 ; vcvtsi2ss xmm0, xmm0, rax),
        }
        self.store_fp(fmt, d);
        self.soften(from, packed);
    }

    fn convert_format(&mut self, fmt: FpFmt, packed: u64, d: Slot, a: Slot) {
        let da = self.be.slot_disp(a);
        let from = match fmt {
            FpFmt::F64 => self.check_boxes(FpFmt::F32, &[a]),
            FpFmt::F32 => Fixups::default(),
        };
        dynasm!(self.asm ; .arch x64 ; vxorps xmm0, xmm0, xmm0);
        match fmt {
            FpFmt::F64 => dynasm!(self.asm ; .arch x64 ; vcvtss2sd xmm0, xmm0, DWORD [rbp + da]),
            FpFmt::F32 => dynasm!(self.asm ; .arch x64 ; vcvtsd2ss xmm0, xmm0, QWORD [rbp + da]),
        }
        self.canonicalize(fmt);
        self.store_fp(fmt, d);
        self.soften(from, packed);
    }

    fn move_to_int(&mut self, fmt: FpFmt, d: Slot, a: Slot) {
        let t = self.target(d);
        let place = Place::Env(self.be.slot_disp(a));
        match fmt {
            FpFmt::F64 => self.asm.mov_r_rm(true, t, place),
            FpFmt::F32 => self.asm.movsxd(t, place),
        }
        self.finish(d);
    }

    fn move_from_int(&mut self, fmt: FpFmt, d: Slot, a: Slot) {
        let home = self.home(a);
        let a = self.in_reg(home, RAX);
        let place = Place::Env(self.be.slot_disp(d));
        self.asm.mov_rm_r(fmt == FpFmt::F64, place, a);
        if fmt == FpFmt::F32 {
            self.write_box(d);
        }
    }
}

/// Whether an operation's result is a floating-point value.
pub fn result_is_float(op: FpOp) -> bool {
    !matches!(
        op,
        FpOp::Eq
            | FpOp::Lt
            | FpOp::Le
            | FpOp::Class
            | FpOp::ToI32
            | FpOp::ToU32
            | FpOp::ToI64
            | FpOp::ToU64
            | FpOp::MvToInt
    )
}
