//! Floating point on the host's unit.
//!
//! MXCSR holds the guest's rounding mode and collects its flags, whose meaning is the same; tininess is
//! detected after rounding on both sides. What differs is put right here: NaN results are the canonical one,
//! singles are NaN-boxed in their slots, and out-of-range conversions saturate. The rare cases, and every
//! operation with a rounding mode of its own, go through the runtime's function.
//!
//! Slots of singles are read and written in halves, never whole, so that the host forwards its own stores.
//!
//! Some slots have a vector register that holds their value from [`Lower::revive_fp`] on ([`Lower::src`]); their memory is
//! out of date then. Stubs that call something put the registers into memory and mark them dead, and those that return to the
//! middle of a block load them again. Other operations that read such a slot have it put into memory first.

use super::{Cold, Fixups, Lower, Opnd, boxed_bit};
use crate::asm::{Alu, Cc, Fixup, Map, R14, R15, RAX, Rm as Place, Vex};
use crate::stubs::FpMask;
use dynasm::dynasm;
use dynasmrt::DynasmApi;
use mimus_tcg_ir::backend::pack_fp;
use mimus_tcg_ir::verify::{for_each_read, for_each_written};
use mimus_tcg_ir::{CallKind, Ext, FpFmt, FpOp, Op, Rm, Size, Slot, Val};

/// A floating-point operand.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Src {
    /// A vector register: a single is NaN-boxed if its slot is.
    Reg(u8),
    /// Memory at `rbp + disp`.
    Mem(i32),
}

/// Scalar instructions of the form `op t, a, b`.
macro_rules! scalar {
    ($l:expr, $fmt:expr, $double:tt, $single:tt, $t:expr, $a:expr, $b:expr) => {
        match ($fmt, $b) {
            (FpFmt::F64, Src::Reg(b)) => dynasm!($l.asm ; .arch x64 ; $double Rx($t), Rx($a), Rx(b)),
            (FpFmt::F32, Src::Reg(b)) => dynasm!($l.asm ; .arch x64 ; $single Rx($t), Rx($a), Rx(b)),
            (FpFmt::F64, Src::Mem(b)) => dynasm!($l.asm ; .arch x64 ; $double Rx($t), Rx($a), QWORD [rbp + b]),
            (FpFmt::F32, Src::Mem(b)) => dynasm!($l.asm ; .arch x64 ; $single Rx($t), Rx($a), DWORD [rbp + b]),
        }
    };
}

/// Conversions to an integer in `rax` or `eax`.
macro_rules! to_int {
    ($l:expr, $wide:expr, $op:tt, $size:tt, $a:expr) => {
        match ($wide, $a) {
            (true, Src::Reg(a)) => dynasm!($l.asm ; .arch x64 ; $op rax, Rx(a)),
            (false, Src::Reg(a)) => dynasm!($l.asm ; .arch x64 ; $op eax, Rx(a)),
            (true, Src::Mem(a)) => dynasm!($l.asm ; .arch x64 ; $op rax, $size [rbp + a]),
            (false, Src::Mem(a)) => dynasm!($l.asm ; .arch x64 ; $op eax, $size [rbp + a]),
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
            if [d, a, b, c].into_iter().any(|slot| self.be.fp_pin_of(slot).is_some()) {
                self.revive_fp();
            }
            match op {
                FpOp::Add | FpOp::Sub | FpOp::Mul | FpOp::Div | FpOp::Sqrt => {
                    self.arithmetic(op, fmt, packed, d, abc);
                }
                FpOp::MAdd | FpOp::MSub | FpOp::NMSub | FpOp::NMAdd => {
                    let from = self.check_boxes(fmt, &abc);
                    self.fused(op, fmt, packed, d, from, abc);
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
    pub(super) fn in_software(&self, op: FpOp, fmt: FpFmt, rm: Rm, d: Slot, [a, b, c]: [Slot; 3]) -> bool {
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
        let pinned = |slot| self.pin_of(slot).is_some();
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
            match self.src(slot) {
                Src::Reg(reg) => {
                    dynasm!(self.asm ; .arch x64 ; vpextrd r15d, Rx(reg), 1);
                    self.asm.alu_rm_i(Alu::Cmp, false, Place::Reg(R15), -1);
                }
                Src::Mem(disp) => self.asm.alu_rm_i(Alu::Cmp, false, Place::Env(disp + 4), -1),
            }
            // Still not known to be boxed after it: software's work comes back here too.
            from.add(self.asm.jcc(Cc::Ne));
        }
        from
    }

    /// Has the whole operation done in software when a jump of `from` is taken; continues here.
    fn soften(&mut self, from: Fixups, packed: u64) {
        let back = self.asm.pos();
        if from.0.iter().any(Option::is_some) {
            self.put_off(Cold::Fp { from, packed, back });
        }
    }

    /// Where an operand is.
    fn src(&self, slot: Slot) -> Src {
        match self.be.fp_pin_of(slot) {
            Some(reg) if self.fp_alive => Src::Reg(reg),
            _ => Src::Mem(self.be.slot_disp(slot)),
        }
    }

    /// The bits of a double to a general register.
    pub(super) fn fp_bits(&mut self, t: u8, slot: Slot) {
        match self.src(slot) {
            Src::Reg(reg) => dynasm!(self.asm ; .arch x64 ; vmovq Rq(t), Rx(reg)),
            Src::Mem(disp) => dynasm!(self.asm ; .arch x64 ; mov Rq(t), [rbp + disp]),
        }
    }

    /// An operand in a register, `scratch` if it has none of its own.
    fn in_xmm(&mut self, fmt: FpFmt, slot: Slot, scratch: u8) -> u8 {
        match (self.src(slot), fmt) {
            (Src::Reg(reg), _) => return reg,
            (Src::Mem(disp), FpFmt::F64) => dynasm!(self.asm ; .arch x64 ; vmovsd Rx(scratch), QWORD [rbp + disp]),
            (Src::Mem(disp), FpFmt::F32) => dynasm!(self.asm ; .arch x64 ; vmovss Rx(scratch), DWORD [rbp + disp]),
        }
        scratch
    }

    /// The vector register in which to compute a slot's new value.
    fn xmm_target(&self, d: Slot) -> u8 {
        self.be.fp_pin_of(d).filter(|_| self.fp_alive).unwrap_or(0)
    }

    /// Boxes the single in a vector register. Clobbers `r15`.
    fn box_in(&mut self, t: u8) {
        self.mask_address(FpMask::Box);
        dynasm!(self.asm ; .arch x64 ; vorps Rx(t), Rx(t), [r15]);
    }

    /// `r15` = the address of a mask.
    fn mask_address(&mut self, mask: FpMask) {
        self.asm.mov_ri(R15, self.be.stubs.fp_masks as i64 + 16 * mask as i64);
    }

    /// `d` = the register of [`Lower::xmm_target`], boxed (if `is_boxed`, it is already).
    fn store_fp(&mut self, fmt: FpFmt, d: Slot, is_boxed: bool) {
        let (disp, t) = (self.be.slot_disp(d), self.xmm_target(d));
        match (t, fmt) {
            (0, FpFmt::F64) => dynasm!(self.asm ; .arch x64 ; vmovsd QWORD [rbp + disp], xmm0),
            (0, FpFmt::F32) => {
                dynasm!(self.asm ; .arch x64 ; vmovss DWORD [rbp + disp], xmm0);
                self.write_box(d);
            }
            (t, FpFmt::F32) if !is_boxed => self.box_in(t),
            _ => {}
        }
    }

    /// Upper half of a slot with a single.
    pub(super) fn write_box(&mut self, d: Slot) {
        if self.boxed & boxed_bit(d) == 0 {
            let high = Place::Env(self.be.slot_disp(d) + 4);
            self.asm.mov_rm_i(false, high, -1);
        }
    }

    /// Has the vector registers hold what their slots do.
    pub(super) fn revive_fp(&mut self) {
        if self.fp_alive {
            return;
        }
        self.fp_alive = true;
        let dead = Place::Env(self.be.env(self.be.config.env.vector_dead));
        self.asm.ins(Map::Base, false, 0x80, 7, dead);
        self.asm.push(0);
        let from = self.asm.jcc(Cc::Ne);
        let back = self.asm.pos();
        self.put_off(Cold::ReviveFp { from, back });
    }

    /// Before an operation: puts the slots that it reads from memory there. Answers whether [`Lower::reload_fp`] is to
    /// follow it, because it writes to the memory of some.
    pub(super) fn settle_fp_pins(&mut self, op: &Op) -> bool {
        let mut read = [None; 4];
        let mut places = read.iter_mut();
        for_each_read(op, |slot| {
            if let Some(place) = places.next() {
                *place = Some(slot);
            }
        });
        for slot in read.into_iter().flatten() {
            if !reads_xmm(op, slot) {
                self.spill_fp(slot);
            }
        }
        let known = match *op {
            Op::Fp { op, .. } => result_is_float(op),
            Op::Load { size: Size::B8, .. } | Op::Load { size: Size::B4, ext: Ext::Ones, .. } => true,
            Op::Call { .. } => true,
            _ => false,
        };
        let mut pinned = false;
        for_each_written(op, |d| pinned |= self.be.fp_pin_of(d).is_some());
        if pinned && op.is_terminal() {
            self.asm.call_abs(self.be.stubs.bury);
            return false;
        }
        if pinned && !matches!(op, Op::Call { .. }) {
            self.revive_fp();
        }
        pinned && !known
    }

    /// Puts a slot's value into its memory, if it may be in a vector register.
    fn spill_fp(&mut self, slot: Slot) {
        if let Some(reg) = self.be.fp_pin_of(slot) {
            self.revive_fp();
            let disp = self.be.slot_disp(slot);
            dynasm!(self.asm ; .arch x64 ; vmovsd QWORD [rbp + disp], Rx(reg));
        }
    }

    /// Copies what an operation wrote to slots' memory.
    pub(super) fn reload_fp(&mut self, op: &Op) {
        let mut written = [None; 2];
        let mut places = written.iter_mut();
        for_each_written(op, |d| {
            if let Some(place) = places.next() {
                *place = Some(d);
            }
        });
        for d in written.into_iter().flatten() {
            if let Some(reg) = self.be.fp_pin_of(d) {
                let disp = self.be.slot_disp(d);
                dynasm!(self.asm ; .arch x64 ; vmovsd Rx(reg), QWORD [rbp + disp]);
            }
        }
    }

    /// Loads slot `d`, which has a vector register: a double, or a single to be boxed.
    pub(super) fn load_fp_pin(&mut self, d: Slot, place: Place, size: Size) {
        let t = self.xmm_target(d);
        self.asm.vex(if size == Size::B8 { Vex::MOVSD } else { Vex::MOVSS }, false, t, 0, place);
        if size == Size::B4 {
            self.box_in(t);
        }
    }

    /// The helper for floating-point flags without a call, unless flags change: compilers read them before a comparison and
    /// write them back behind it, and the host takes long to change its control word. `false`: it is another helper.
    pub(super) fn fp_flags_in_line(&mut self, helper: u16, kind: CallKind, ret: Option<Slot>, args: [Val; 3]) -> bool {
        if self.be.config.fp_flags.is_none_or(|own| own.helper != helper || kind != CallKind::Pure) {
            return false;
        }
        let (Val::Imm(write), Some(&stub)) = (args[0], self.be.stubs.helpers_pure.get(usize::from(helper))) else {
            return false;
        };
        if ret.is_some_and(|ret| self.be.fp_pin_of(ret).is_some()) {
            return false;
        }
        if self.restored.is_some_and(|index| index + 1 == self.next) {
            return true;
        }
        if let (0, Some(ret)) = (write, ret)
            && self.put_flags_off(ret)
        {
            return true;
        }
        let new = self.home_val(args[1]);
        self.fp_flags_to_rax();
        if write != 0 {
            self.mov32(R14, new);
            dynasm!(self.asm ; .arch x64 ; and r14d, 31 ; cmp eax, r14d);
            let from = self.asm.jcc(Cc::Ne);
            let back = self.asm.pos();
            self.put_off(Cold::FpFlags { from, stub, revive: self.fp_alive, back });
        }
        if let Some(ret) = ret {
            self.set(ret, RAX);
        }
        true
    }

    pub(super) fn change_fp_flags(&mut self, from: Fixup, stub: usize, revive: bool, back: u32) {
        self.asm.bind(from);
        self.change_flags_to_r14(stub, revive);
        self.asm.jmp_back(back);
    }

    fn change_flags_to_r14(&mut self, stub: usize, revive: bool) {
        dynasm!(self.asm ; .arch x64 ; mov eax, 1 ; xor r15d, r15d);
        self.asm.call_abs(stub);
        if revive {
            self.asm.call_abs(self.be.stubs.revive);
        }
    }

    /// Jumps if what is in `t` is a NaN.
    fn nan_jump(&mut self, fmt: FpFmt, t: u8) -> Fixup {
        match fmt {
            FpFmt::F64 => dynasm!(self.asm ; .arch x64 ; vucomisd Rx(t), Rx(t)),
            FpFmt::F32 => dynasm!(self.asm ; .arch x64 ; vucomiss Rx(t), Rx(t)),
        }
        self.asm.jcc(Cc::P)
    }

    /// Makes a NaN in `t` the canonical one.
    fn canonicalize(&mut self, fmt: FpFmt, t: u8) {
        let from = self.nan_jump(fmt, t);
        let back = self.asm.pos();
        self.put_off(Cold::Nan { from, fmt, t, back });
    }

    pub(super) fn canonical_nan(&mut self, from: Fixup, fmt: FpFmt, t: u8, back: u32) {
        self.asm.bind(from);
        let nan = match fmt {
            FpFmt::F64 => 0x7ff8_0000_0000_0000,
            FpFmt::F32 => 0xffff_ffff_7fc0_0000u64 as i64,
        };
        self.asm.mov_ri(RAX, nan);
        dynasm!(self.asm ; .arch x64 ; vmovq Rx(t), rax);
        self.asm.jmp_back(back);
    }

    fn arithmetic(&mut self, op: FpOp, fmt: FpFmt, packed: u64, d: Slot, [a, b, _]: [Slot; 3]) {
        let from = if op == FpOp::Sqrt { self.check_boxes(fmt, &[a]) } else { self.check_boxes(fmt, &[a, b]) };
        let t = self.xmm_target(d);
        // What is above the result comes from the first operand.
        let first = if op == FpOp::Sqrt {
            dynasm!(self.asm ; .arch x64 ; vxorps xmm0, xmm0, xmm0);
            0
        } else {
            self.in_xmm(fmt, a, 0)
        };
        let (a, b) = (self.src(a), self.src(b));
        match op {
            FpOp::Add => scalar!(self, fmt, vaddsd, vaddss, t, first, b),
            FpOp::Sub => scalar!(self, fmt, vsubsd, vsubss, t, first, b),
            FpOp::Mul => scalar!(self, fmt, vmulsd, vmulss, t, first, b),
            FpOp::Div => scalar!(self, fmt, vdivsd, vdivss, t, first, b),
            _ => scalar!(self, fmt, vsqrtsd, vsqrtss, t, first, a),
        }
        self.canonicalize(fmt, t);
        self.store_fp(fmt, d, first != 0);
        self.soften(from, packed);
    }

    /// A NaN result is redone in software: an invalid product with a quiet NaN addend raises a flag that the
    /// host does not.
    fn fused(&mut self, op: FpOp, fmt: FpFmt, packed: u64, d: Slot, mut from: Fixups, [a, b, c]: [Slot; 3]) {
        // In a register of its own: software needs the operands as they were.
        let (first, second) = (self.in_xmm(fmt, a, 0), self.in_xmm(fmt, b, 1));
        let third = self.src(c);
        let is_boxed;
        if let (Src::Reg(third), true) = (third, first != 0) {
            // xmm0 = first * second + xmm0
            is_boxed = true;
            dynasm!(self.asm ; .arch x64 ; vmovaps xmm0, Rx(third));
            let second = Src::Reg(second);
            match op {
                FpOp::MAdd => scalar!(self, fmt, vfmadd231sd, vfmadd231ss, 0, first, second),
                FpOp::MSub => scalar!(self, fmt, vfmsub231sd, vfmsub231ss, 0, first, second),
                FpOp::NMSub => scalar!(self, fmt, vfnmadd231sd, vfnmadd231ss, 0, first, second),
                _ => scalar!(self, fmt, vfnmsub231sd, vfnmsub231ss, 0, first, second),
            }
        } else {
            // xmm0 = xmm0 * second + third
            is_boxed = first != 0;
            if first != 0 {
                dynasm!(self.asm ; .arch x64 ; vmovaps xmm0, Rx(first));
            }
            match op {
                FpOp::MAdd => scalar!(self, fmt, vfmadd213sd, vfmadd213ss, 0, second, third),
                FpOp::MSub => scalar!(self, fmt, vfmsub213sd, vfmsub213ss, 0, second, third),
                FpOp::NMSub => scalar!(self, fmt, vfnmadd213sd, vfnmadd213ss, 0, second, third),
                _ => scalar!(self, fmt, vfnmsub213sd, vfnmsub213ss, 0, second, third),
            }
        }
        from.add(self.nan_jump(fmt, 0));
        let t = self.xmm_target(d);
        if t != 0 {
            dynasm!(self.asm ; .arch x64 ; vmovaps Rx(t), xmm0);
        }
        self.store_fp(fmt, d, is_boxed);
        self.soften(from, packed);
    }

    /// Equal operands (zeros of either sign) and NaNs go to software.
    fn fp_min_max(&mut self, op: FpOp, fmt: FpFmt, packed: u64, d: Slot, [a, b]: [Slot; 2]) {
        let mut from = self.check_boxes(fmt, &[a, b]);
        let (first, t) = (self.in_xmm(fmt, a, 0), self.xmm_target(d));
        let b = self.src(b);
        match (fmt, b) {
            (FpFmt::F64, Src::Reg(b)) => dynasm!(self.asm ; .arch x64 ; vucomisd Rx(first), Rx(b)),
            (FpFmt::F32, Src::Reg(b)) => dynasm!(self.asm ; .arch x64 ; vucomiss Rx(first), Rx(b)),
            (FpFmt::F64, Src::Mem(b)) => dynasm!(self.asm ; .arch x64 ; vucomisd Rx(first), QWORD [rbp + b]),
            (FpFmt::F32, Src::Mem(b)) => dynasm!(self.asm ; .arch x64 ; vucomiss Rx(first), DWORD [rbp + b]),
        }
        // Also set by "unordered".
        from.add(self.asm.jcc(Cc::E));
        match op {
            FpOp::Min => scalar!(self, fmt, vminsd, vminss, t, first, b),
            _ => scalar!(self, fmt, vmaxsd, vmaxss, t, first, b),
        }
        self.store_fp(fmt, d, first != 0);
        self.soften(from, packed);
    }

    fn fp_compare(&mut self, op: FpOp, fmt: FpFmt, packed: u64, d: Slot, [a, b]: [Slot; 2]) {
        if let (FpOp::Lt | FpOp::Le, FpFmt::F64, Some(t)) = (op, fmt, self.pin_of(d)) {
            return self.fp_less(op, d, t, [a, b]);
        }
        let from = self.check_boxes(fmt, &[a, b]);
        // Predicates EQ_OQ (quiet), LT_OS and LE_OS (signalling).
        let predicate = match op {
            FpOp::Eq => 0i8,
            FpOp::Lt => 1,
            _ => 2,
        };
        let first = self.in_xmm(fmt, a, 0);
        match (fmt, self.src(b)) {
            (FpFmt::F64, Src::Reg(b)) => {
                dynasm!(self.asm ; .arch x64 ; vcmpsd xmm0, Rx(first), Rx(b), predicate);
            }
            (FpFmt::F32, Src::Reg(b)) => {
                dynasm!(self.asm ; .arch x64 ; vcmpss xmm0, Rx(first), Rx(b), predicate);
            }
            (FpFmt::F64, Src::Mem(b)) => {
                dynasm!(self.asm ; .arch x64 ; vcmpsd xmm0, Rx(first), QWORD [rbp + b], predicate);
            }
            (FpFmt::F32, Src::Mem(b)) => {
                // Reads 4 bytes; the assembler's table has the operand as 8, which encodes the same.
                dynasm!(self.asm ; .arch x64 ; vcmpss xmm0, Rx(first), QWORD [rbp + b], predicate);
            }
        }
        let t = self.target(d);
        dynasm!(self.asm ; .arch x64 ; vmovd Rd(t), xmm0);
        self.asm.alu_rm_i(Alu::And, false, Place::Reg(t), 1);
        self.put_int(d);
        self.soften(from, packed);
    }

    /// `d`, register `t`, = `a < b` or `a <= b`, by the flags of `b` compared with `a`: "unordered" is both below and equal.
    fn fp_less(&mut self, op: FpOp, d: Slot, t: u8, [a, b]: [Slot; 2]) {
        let first = self.in_xmm(FpFmt::F64, b, 0);
        self.asm.alu_r_rm(Alu::Xor, false, t, Place::Reg(t));
        match self.src(a) {
            Src::Reg(a) => dynasm!(self.asm ; .arch x64 ; vcomisd Rx(first), Rx(a)),
            Src::Mem(a) => dynasm!(self.asm ; .arch x64 ; vcomisd Rx(first), QWORD [rbp + a]),
        }
        let cc = if op == FpOp::Lt { Cc::A } else { Cc::Ae };
        self.asm.setcc(cc, t);
        self.compared = Some((d, cc, self.next));
        if let Some((index, was, stub)) = self.restores_flags(d) {
            // Nothing but "invalid", for unordered operands, can have been added to the flags.
            let from = self.asm.jcc(Cc::P);
            let back = self.asm.pos();
            let was = self.home(was);
            self.put_off(Cold::RestoreFpFlags { from, was, stub, back });
            self.restored = Some(index);
        }
    }

    /// If the flags were read right before the comparison being lowered, to `d`, and are written back right behind it: the
    /// index of the operation that does so, the slot with the flags, and the helper's stub.
    fn restores_flags(&self, d: Slot) -> Option<(usize, Slot, usize)> {
        let own = self.be.config.fp_flags?;
        let between = |op: &&(usize, &Op)| !matches!(op.1, Op::Insn { .. } | Op::SetEnvByte { .. });
        let all = || self.ops.iter().enumerate();
        let (_, before) = all().take(self.next.checked_sub(1)?).rev().take(4).find(|op| between(&op))?;
        let (index, behind) = all().skip(self.next).take(4).find(|op| between(&op))?;
        match (before, behind) {
            (
                &Op::Call { helper: read, kind: CallKind::Pure, ret: Some(was), args: [Val::Imm(0), ..] },
                &Op::Call { helper: write, kind: CallKind::Pure, ret: None, args: [Val::Imm(1), Val::Slot(new), _] },
            ) if read == own.helper && write == own.helper && was == new && was != d => {
                let stub = *self.be.stubs.helpers_pure.get(usize::from(own.helper))?;
                Some((index, was, stub))
            }
            _ => None,
        }
    }

    pub(super) fn restore_fp_flags(&mut self, from: Fixup, was: Opnd, stub: usize, back: u32) {
        self.asm.bind(from);
        self.mov(R14, was);
        self.change_flags_to_r14(stub, self.has_fp_pins);
        // Unordered operands compare as neither less nor equal.
        dynasm!(self.asm ; .arch x64 ; stc);
        self.asm.jmp_back(back);
    }

    /// The condition that is in the host's flags, if they still say whether `d` is other than zero.
    pub(super) fn still_compared(&self, d: Slot) -> Option<Cc> {
        let (slot, cc, index) = self.compared?;
        let between = self.ops.get(index..self.next.checked_sub(1)?)?;
        let keeps_flags = |(i, op): (usize, &Op)| {
            matches!(op, Op::Insn { .. } | Op::SetEnvByte { .. }) || self.restored == Some(index + i)
        };
        (slot == d && between.iter().enumerate().all(keeps_flags)).then_some(cc)
    }

    /// Ends an operation that computed an integer in [`Lower::target`]. Where software may have put it in the
    /// slot's memory, `rax` is not known to hold it.
    fn put_int(&mut self, d: Slot) {
        if self.pin_of(d).is_none() {
            self.asm.mov_rm_r(true, Place::Env(self.be.slot_disp(d)), RAX);
        }
    }

    fn sign_inject(&mut self, op: FpOp, fmt: FpFmt, packed: u64, d: Slot, [a, b]: [Slot; 2]) {
        let from = self.check_boxes(fmt, &[a, b]);
        if a == b && self.xmm_target(d) != 0 {
            return self.change_sign(op, fmt, d, a, (from, packed));
        }
        let double = fmt == FpFmt::F64;
        let (sign, rest) = if double {
            (FpMask::SignOfDouble, FpMask::AllButSignOfDouble)
        } else {
            (FpMask::SignOfSingle, FpMask::AllButSignOfSingle)
        };
        let (second, first) = (self.in_xmm(fmt, b, 0), self.in_xmm(fmt, a, 1));
        let is_boxed = matches!(self.src(a), Src::Reg(_));
        let t = self.xmm_target(d);
        self.mask_address(sign);
        match op {
            FpOp::Sgnjn => dynasm!(self.asm ; .arch x64 ; vandnps xmm0, Rx(second), [r15]),
            _ => dynasm!(self.asm ; .arch x64 ; vandps xmm0, Rx(second), [r15]),
        }
        if op == FpOp::Sgnjx {
            dynasm!(self.asm ; .arch x64 ; vxorps Rx(t), Rx(first), xmm0);
        } else {
            self.mask_address(rest);
            dynasm!(self.asm ; .arch x64 ; vandps xmm1, Rx(first), [r15] ; vorps Rx(t), xmm1, xmm0);
        }
        self.store_fp(fmt, d, is_boxed);
        self.soften(from, packed);
    }

    /// `d`, which has a vector register, = `a` (`sgnj`), -`a` (`sgnjn`) or |`a`| (`sgnjx`).
    fn change_sign(&mut self, op: FpOp, fmt: FpFmt, d: Slot, a: Slot, (from, packed): (Fixups, u64)) {
        let t = self.xmm_target(d);
        let first = self.in_xmm(fmt, a, t);
        let is_boxed = matches!(self.src(a), Src::Reg(_));
        let double = fmt == FpFmt::F64;
        match op {
            FpOp::Sgnj if first == t => {}
            FpOp::Sgnj => dynasm!(self.asm ; .arch x64 ; vmovaps Rx(t), Rx(first)),
            FpOp::Sgnjn => {
                self.mask_address(if double { FpMask::SignOfDouble } else { FpMask::SignOfSingle });
                dynasm!(self.asm ; .arch x64 ; vxorps Rx(t), Rx(first), [r15]);
            }
            _ => {
                self.mask_address(if double { FpMask::AllButSignOfDouble } else { FpMask::AllButSignOfSingle });
                dynasm!(self.asm ; .arch x64 ; vandps Rx(t), Rx(first), [r15]);
            }
        }
        self.store_fp(fmt, d, is_boxed);
        self.soften(from, packed);
    }

    /// The host's result for what does not fit is the most negative integer: done again in software.
    fn round_to_int(&mut self, op: FpOp, fmt: FpFmt, rm: Rm, packed: u64, d: Slot, a: Slot) {
        let mut from = self.check_boxes(fmt, &[a]);
        let a = self.src(a);
        let wide = op == FpOp::ToI64;
        match (fmt, rm == Rm::ToZero) {
            (FpFmt::F64, true) => to_int!(self, wide, cvttsd2si, QWORD, a),
            (FpFmt::F64, false) => to_int!(self, wide, cvtsd2si, QWORD, a),
            (FpFmt::F32, true) => to_int!(self, wide, cvttss2si, DWORD, a),
            (FpFmt::F32, false) => to_int!(self, wide, cvtss2si, DWORD, a),
        }
        // Only the most negative integer overflows when one is taken from it.
        self.asm.alu_rm_i(Alu::Cmp, wide, Place::Reg(RAX), 1);
        from.add(self.asm.jcc(Cc::O));
        if !wide {
            self.asm.movsxd(RAX, Place::Reg(RAX));
        }
        match self.pin_of(d) {
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
        let t = self.xmm_target(d);
        dynasm!(self.asm ; .arch x64 ; vxorps xmm0, xmm0, xmm0);
        match fmt {
            FpFmt::F64 => dynasm!(self.asm ; .arch x64 ; vcvtsi2sd Rx(t), xmm0, rax),
            FpFmt::F32 => dynasm!(self.asm ; .arch x64 ; vcvtsi2ss Rx(t), xmm0, rax),
        }
        self.store_fp(fmt, d, false);
        self.soften(from, packed);
    }

    fn convert_format(&mut self, fmt: FpFmt, packed: u64, d: Slot, a: Slot) {
        let from = match fmt {
            FpFmt::F64 => self.check_boxes(FpFmt::F32, &[a]),
            FpFmt::F32 => Fixups::default(),
        };
        let (t, a) = (self.xmm_target(d), self.src(a));
        dynasm!(self.asm ; .arch x64 ; vxorps xmm0, xmm0, xmm0);
        match (fmt, a) {
            (FpFmt::F64, Src::Reg(a)) => dynasm!(self.asm ; .arch x64 ; vcvtss2sd Rx(t), xmm0, Rx(a)),
            (FpFmt::F32, Src::Reg(a)) => dynasm!(self.asm ; .arch x64 ; vcvtsd2ss Rx(t), xmm0, Rx(a)),
            (FpFmt::F64, Src::Mem(a)) => dynasm!(self.asm ; .arch x64 ; vcvtss2sd Rx(t), xmm0, DWORD [rbp + a]),
            (FpFmt::F32, Src::Mem(a)) => dynasm!(self.asm ; .arch x64 ; vcvtsd2ss Rx(t), xmm0, QWORD [rbp + a]),
        }
        self.canonicalize(fmt, t);
        self.store_fp(fmt, d, false);
        self.soften(from, packed);
    }

    fn move_to_int(&mut self, fmt: FpFmt, d: Slot, a: Slot) {
        let t = self.target(d);
        let place = Place::Env(self.be.slot_disp(a));
        match (fmt, self.src(a)) {
            (FpFmt::F64, Src::Reg(a)) => dynasm!(self.asm ; .arch x64 ; vmovq Rq(t), Rx(a)),
            (FpFmt::F64, Src::Mem(_)) => self.asm.mov_r_rm(true, t, place),
            (FpFmt::F32, Src::Reg(a)) => {
                dynasm!(self.asm ; .arch x64 ; vmovd Rd(t), Rx(a));
                self.asm.movsxd(t, Place::Reg(t));
            }
            (FpFmt::F32, Src::Mem(_)) => self.asm.movsxd(t, place),
        }
        self.finish(d);
    }

    fn move_from_int(&mut self, fmt: FpFmt, d: Slot, a: Slot) {
        let home = self.home(a);
        let a = self.in_reg(home, RAX);
        let t = self.xmm_target(d);
        if t != 0 {
            match fmt {
                FpFmt::F64 => dynasm!(self.asm ; .arch x64 ; vmovq Rx(t), Rq(a)),
                FpFmt::F32 => dynasm!(self.asm ; .arch x64 ; vmovd Rx(t), Rd(a)),
            }
            return self.store_fp(fmt, d, false);
        }
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

/// Whether an operation's lowering looks for a slot that it reads in its vector register.
fn reads_xmm(op: &Op, slot: Slot) -> bool {
    match *op {
        Op::Fp { op, .. } => {
            !matches!(op, FpOp::FromI32 | FpOp::FromU32 | FpOp::FromI64 | FpOp::FromU64 | FpOp::MvFromInt)
        }
        Op::Store { src, base, size, .. } => src == Val::Slot(slot) && base != src && size >= Size::B4,
        _ => false,
    }
}
