//! Operations that set or test flags, and those on parts of registers.
//!
//! They are the host's own instructions of the same names, so flags come out as they should; what is left to do
//! is to have the flags where they are needed ([`super::flags`]). Operands are where the slots live: nothing here
//! takes a value from `rax` that the operation before left there.

use super::{Lower, Opnd};
use crate::asm::{Alu, Cc, Map, R14, R15, RAX, RCX, Rm, Shift, Vex, fits32};
use dynasmrt::DynasmApi;
use mimus_tcg_ir::flags;
use mimus_tcg_ir::{CondF, Ext, FlagOp, Op, PagePc, Size, Slot, Val};

/// The host's condition.
pub(super) fn cc_of(cond: CondF) -> Cc {
    match cond {
        CondF::O => Cc::O,
        CondF::No => Cc::No,
        CondF::B => Cc::B,
        CondF::Ae => Cc::Ae,
        CondF::E => Cc::E,
        CondF::Ne => Cc::Ne,
        CondF::Be => Cc::Be,
        CondF::A => Cc::A,
        CondF::S => Cc::S,
        CondF::Ns => Cc::Ns,
        CondF::P => Cc::P,
        CondF::Np => Cc::Np,
        CondF::L => Cc::L,
        CondF::Ge => Cc::Ge,
        CondF::Le => Cc::Le,
        CondF::G => Cc::G,
    }
}

/// How an operation of two operands of which the first is the destination is encoded.
#[derive(Clone, Copy)]
pub(super) enum Form {
    /// One of the eight classic ones.
    Classic(Alu),
    /// A shift or rotate.
    Shift(Shift),
    /// `0f`-map bit test: opcode of the register form, extension of the immediate form.
    Bit(u8, u8),
    /// One operand: opcode (byte form) and extension.
    Unary(u8, u8),
    /// None of these.
    Other,
}

/// The extension of `bt`, which changes nothing.
const BT: u8 = 4;

pub(super) fn form_of(op: FlagOp) -> Form {
    match op {
        FlagOp::Add => Form::Classic(Alu::Add),
        FlagOp::Adc => Form::Classic(Alu::Adc),
        FlagOp::Sub => Form::Classic(Alu::Sub),
        FlagOp::Sbb => Form::Classic(Alu::Sbb),
        FlagOp::And => Form::Classic(Alu::And),
        FlagOp::Or => Form::Classic(Alu::Or),
        FlagOp::Xor => Form::Classic(Alu::Xor),
        FlagOp::Shl => Form::Shift(Shift::Shl),
        FlagOp::Shr => Form::Shift(Shift::Shr),
        FlagOp::Sar => Form::Shift(Shift::Sar),
        FlagOp::Rol => Form::Shift(Shift::Rol),
        FlagOp::Ror => Form::Shift(Shift::Ror),
        FlagOp::Rcl => Form::Shift(Shift::Rcl),
        FlagOp::Rcr => Form::Shift(Shift::Rcr),
        FlagOp::Bt => Form::Bit(0xa3, BT),
        FlagOp::Bts => Form::Bit(0xab, 5),
        FlagOp::Btr => Form::Bit(0xb3, 6),
        FlagOp::Btc => Form::Bit(0xbb, 7),
        FlagOp::Not => Form::Unary(0xf6, 2),
        FlagOp::Neg => Form::Unary(0xf6, 3),
        FlagOp::Inc => Form::Unary(0xfe, 0),
        FlagOp::Dec => Form::Unary(0xfe, 1),
        FlagOp::Andn
        | FlagOp::Mul
        | FlagOp::Bsf
        | FlagOp::Bsr
        | FlagOp::Popcnt
        | FlagOp::Lzcnt
        | FlagOp::Tzcnt
        | FlagOp::Bextr
        | FlagOp::Bzhi
        | FlagOp::Blsi
        | FlagOp::Blsr
        | FlagOp::Blsmsk => Form::Other,
    }
}

impl Lower<'_> {
    pub(super) fn alu_f(&mut self, op: FlagOp, size: Size, d: Option<Slot>, a: Val, b: Val) {
        let whole = Op::AluF { op, size, d, a, b };
        if d.is_none() && !self.flags_wanted(&whole) {
            // Nothing of it is left.
            if op != FlagOp::Not {
                self.flags_from(&whole);
            }
            return;
        }
        let (a, b) = if self.takes_rax(self.next.wrapping_sub(1), &whole) {
            (self.val(a), self.val(b))
        } else {
            self.flags_for(&whole);
            (self.home_val(a), self.home_val(b))
        };
        let place = match form_of(op) {
            Form::Classic(alu) => self.classic_f(alu, size, d, a, b),
            Form::Shift(shift) => self.shift_f(shift, size, d, a, b),
            Form::Bit(opcode, ext) => self.bit_f(opcode, ext, size, d.filter(|_| op != FlagOp::Bt), a, b),
            Form::Unary(opcode, ext) => {
                let place = self.start(d, size, a, Opnd::Imm(0));
                self.asm.sized_ext(Map::Base, size, opcode, ext, place);
                place
            }
            Form::Other => self.other_f(op, size, d, a, b),
        };
        match (d.filter(|_| op != FlagOp::Bt), place) {
            // Left in rax for the next operation, which may be the only one to want it.
            (Some(d), Rm::Reg(RAX)) if size >= Size::B4 && self.pin_of(d).is_none() && !self.saves_next(&whole) => {
                self.finish(d);
            }
            (d, place) => self.settle(d, size, place),
        }
        if op != FlagOp::Not {
            self.flags_from(&whole);
        }
    }

    /// Whether lowering an operation, number `index`, takes its operands as they are before it changes `rax`.
    pub(super) fn takes_rax(&self, index: usize, op: &Op) -> bool {
        reads_rax(op) && self.carried_at(index, op).is_empty()
    }

    /// Where to compute a result that begins as `a` and goes to `d`: in place where `d` is `a` already, in the
    /// destination's register if `b`, the other operand, is not in it, else in `rax`.
    fn start(&mut self, d: Option<Slot>, size: Size, a: Opnd, b: Opnd) -> Rm {
        let Some(d) = d else {
            self.mov(RAX, a);
            return Rm::Reg(RAX);
        };
        match self.home(d) {
            Opnd::Reg(t) if a == Opnd::Reg(t) => return Rm::Reg(t),
            Opnd::Reg(t) if size >= Size::B4 && b != Opnd::Reg(t) => {
                self.mov_size(t, a, size);
                return Rm::Reg(t);
            }
            Opnd::Mem(disp) if a == Opnd::Mem(disp) && size != Size::B4 && !matches!(b, Opnd::Mem(_)) => {
                return Rm::Env(disp);
            }
            _ => {}
        }
        self.mov(RAX, a);
        Rm::Reg(RAX)
    }

    /// An operand of 4 bytes with zeros above, or of 8 bytes, to a register.
    fn mov_size(&mut self, t: u8, from: Opnd, size: Size) {
        if size == Size::B8 { self.mov(t, from) } else { self.mov32(t, from) }
    }

    /// Moves what [`Lower::start`] put in `rax` where it belongs. No flag changes.
    pub(super) fn settle(&mut self, d: Option<Slot>, size: Size, place: Rm) {
        if let (Some(d), Rm::Reg(RAX)) = (d, place) {
            self.fill(d, size, RAX);
        }
    }

    /// Fills `d` with a register's low bytes. No flag changes.
    pub(super) fn fill(&mut self, d: Slot, size: Size, from: u8) {
        let place = self.rm(d);
        match size {
            Size::B1 => self.asm.ins8(Map::Base, 0x88, from, place),
            Size::B2 => self.asm.wide(Map::Base, Size::B2, 0x89, from, place),
            // Into memory, all 8 bytes: the upper half of the register is zero after an operation of 4 bytes.
            Size::B4 if matches!(place, Rm::Reg(_)) => self.asm.mov_rm_r(false, place, from),
            _ => self.asm.mov_rm_r(true, place, from),
        }
    }

    /// A constant operand within 32 bits, or a register or memory operand.
    fn operand(&mut self, from: Opnd, size: Size, scratch: u8) -> Opnd {
        match from {
            Opnd::Imm(imm) if size == Size::B8 && !fits32(imm) => {
                self.asm.mov_ri(scratch, imm);
                Opnd::Reg(scratch)
            }
            other => other,
        }
    }

    /// `op place, b`.
    pub(super) fn classic_at(&mut self, op: Alu, size: Size, place: Rm, b: Opnd, scratch: u8) {
        let code = (op as u8) << 3;
        match (place, self.operand(b, size, scratch)) {
            (place, Opnd::Imm(imm)) => self.asm.alu_sized_i(op, size, place, imm),
            (Rm::Reg(t), Opnd::Mem(disp)) => self.asm.sized(Map::Base, size, code | 2, t, Rm::Env(disp)),
            (place, b) => {
                let b = self.in_reg(b, scratch);
                self.asm.sized(Map::Base, size, code, b, place);
            }
        }
    }

    fn classic_f(&mut self, op: Alu, size: Size, d: Option<Slot>, a: Opnd, b: Opnd) -> Rm {
        let nowhere = Rm::Reg(R15);
        match (op, d) {
            (Alu::Sub, None) => {
                let place = self.as_rm(a, if b == Opnd::Reg(RAX) { R15 } else { RAX });
                let b = if matches!(place, Rm::Env(_)) { self.in_reg_unless_imm(b, R15) } else { b };
                self.classic_at(Alu::Cmp, size, place, b, R15);
                nowhere
            }
            (Alu::And, None) => {
                self.test_f(size, a, b);
                nowhere
            }
            // How registers are cleared.
            (Alu::Xor, Some(d)) if (a, b) == (Opnd::Imm(0), Opnd::Imm(0)) && size >= Size::B4 => {
                let t = self.pin_of(d).unwrap_or(RAX);
                self.asm.alu_r_rm(Alu::Xor, false, t, Rm::Reg(t));
                Rm::Reg(t)
            }
            _ => {
                let commutes = !matches!(op, Alu::Sub | Alu::Sbb);
                let home = d.map(|d| self.home(d));
                let swap = commutes && (b == Opnd::Reg(RAX) || home == Some(b) && matches!(b, Opnd::Reg(_)));
                let (a, b) = if swap && home != Some(a) { (b, a) } else { (a, b) };
                let (place, b) = self.start_with(d, size, a, b);
                self.classic_at(op, size, place, b, R15);
                place
            }
        }
    }

    /// [`Lower::start`] where the other operand may be in `rax`.
    fn start_with(&mut self, d: Option<Slot>, size: Size, a: Opnd, b: Opnd) -> (Rm, Opnd) {
        if b != Opnd::Reg(RAX) || a == b {
            return (self.start(d, size, a, b), b);
        }
        let home = d.map(|d| self.home(d));
        let in_rax = match home {
            Some(Opnd::Reg(_)) => home != Some(a) && size < Size::B4,
            Some(home) => home != a || size == Size::B4,
            None => true,
        };
        if !in_rax {
            return (self.start(d, size, a, b), b);
        }
        self.mov(R15, b);
        (self.start(d, size, a, Opnd::Reg(R15)), Opnd::Reg(R15))
    }

    fn in_reg_unless_imm(&mut self, from: Opnd, scratch: u8) -> Opnd {
        match from {
            Opnd::Imm(_) => from,
            other => Opnd::Reg(self.in_reg(other, scratch)),
        }
    }

    pub(super) fn test_f(&mut self, size: Size, a: Opnd, b: Opnd) {
        let (a, b) = if matches!(a, Opnd::Imm(_)) { (b, a) } else { (a, b) };
        let place = self.as_rm(a, RAX);
        match self.operand(b, size, R15) {
            Opnd::Imm(imm) => {
                self.asm.sized_ext(Map::Base, size, 0xf6, 0, place);
                self.asm.imm_sized(size, imm);
            }
            b => {
                let b = self.in_reg(b, R15);
                self.asm.sized(Map::Base, size, 0x84, b, place);
            }
        }
    }

    fn shift_f(&mut self, op: Shift, size: Size, d: Option<Slot>, a: Opnd, b: Opnd) -> Rm {
        if let Opnd::Imm(imm) = b {
            let place = self.start(d, size, a, b);
            self.shift_at_imm(op, size, place, imm);
            return place;
        }
        let saved = self.load_count(b);
        // rcx is not what its slot holds now.
        let a = if a == Opnd::Reg(RCX) && saved { Opnd::Reg(R15) } else { a };
        let place = match self.start(d, size, a, Opnd::Reg(RCX)) {
            Rm::Reg(RCX) => {
                self.mov(RAX, a);
                Rm::Reg(RAX)
            }
            place => place,
        };
        self.asm.sized_ext(Map::Base, size, 0xd2, op as u8, place);
        self.restore_count(saved);
        place
    }

    pub(super) fn shift_at_imm(&mut self, op: Shift, size: Size, place: Rm, imm: i64) {
        if imm as u8 == 1 {
            self.asm.sized_ext(Map::Base, size, 0xd0, op as u8, place);
        } else {
            self.asm.sized_ext(Map::Base, size, 0xc0, op as u8, place);
            self.asm.push(imm as u8);
        }
    }

    /// Gets a shift count into `cl`; answers whether the slot in `rcx` was put aside, in `r15`.
    pub(super) fn load_count(&mut self, count: Opnd) -> bool {
        if count == Opnd::Reg(RCX) {
            return false;
        }
        let saved = self.is_pin(RCX);
        if saved {
            self.mov(R15, Opnd::Reg(RCX));
        }
        self.mov(RCX, count);
        saved
    }

    /// Puts the slot back that [`Lower::load_count`] put aside.
    pub(super) fn restore_count(&mut self, saved: bool) {
        if saved {
            self.mov(RCX, Opnd::Reg(R15));
        }
    }

    fn bit_f(&mut self, opcode: u8, ext: u8, size: Size, d: Option<Slot>, a: Opnd, b: Opnd) -> Rm {
        let place = if ext == BT && matches!(a, Opnd::Reg(_)) {
            self.as_rm(a, RAX)
        } else if matches!(b, Opnd::Imm(_)) {
            self.start(d, size, a, b)
        } else {
            // With a register, the bit number in memory would not be modulo the width.
            match self.start(d, size, a, b) {
                Rm::Reg(t) => Rm::Reg(t),
                _ => {
                    self.mov(RAX, a);
                    Rm::Reg(RAX)
                }
            }
        };
        match b {
            Opnd::Imm(imm) => {
                self.asm.wide(Map::Of, size, 0xba, ext, place);
                self.asm.push(imm as u8 & (8 * size.bytes() - 1) as u8);
            }
            b => {
                let b = self.in_reg(b, R15);
                self.asm.wide(Map::Of, size, opcode, b, place);
            }
        }
        place
    }

    fn other_f(&mut self, op: FlagOp, size: Size, d: Option<Slot>, a: Opnd, b: Opnd) -> Rm {
        // The register to compute in; 2 bytes are merged from rax.
        let pin = d.and_then(|d| self.pin_of(d));
        let t = pin.filter(|_| size != Size::B2).unwrap_or(RAX);
        let w = size == Size::B8;
        match op {
            FlagOp::Mul => return self.mul_f(size, d, a, b),
            FlagOp::Andn => {
                let a = self.in_reg(a, R14);
                let b = self.as_rm(b, R15);
                self.asm.vex(Vex::ANDN, w, t, a, b);
            }
            FlagOp::Bextr | FlagOp::Bzhi => {
                let b = self.in_reg(b, R15);
                let a = self.as_rm(a, R14);
                let code = if op == FlagOp::Bextr { Vex::BEXTR } else { Vex::BZHI };
                self.asm.vex(code, w, t, b, a);
            }
            FlagOp::Blsr | FlagOp::Blsmsk | FlagOp::Blsi => {
                let a = self.as_rm(a, R14);
                let ext = match op {
                    FlagOp::Blsr => 1,
                    FlagOp::Blsmsk => 2,
                    _ => 3,
                };
                self.asm.vex(Vex::BLS, w, ext, t, a);
            }
            FlagOp::Popcnt | FlagOp::Lzcnt | FlagOp::Tzcnt => {
                let a = self.as_rm(a, R14);
                if size == Size::B2 {
                    self.asm.push(0x66);
                }
                self.asm.push(0xf3);
                let opcode = match op {
                    FlagOp::Popcnt => 0xb8,
                    FlagOp::Lzcnt => 0xbd,
                    _ => 0xbc,
                };
                self.asm.ins(Map::Of, w, opcode, t, a);
            }
            _ => return self.scan_f(op, size, d, a),
        }
        Rm::Reg(t)
    }

    /// `bsf`, `bsr`: the host leaves the destination alone when it finds nothing, all of it.
    fn scan_f(&mut self, op: FlagOp, size: Size, d: Option<Slot>, a: Opnd) -> Rm {
        let opcode = if op == FlagOp::Bsf { 0xbc } else { 0xbd };
        let a = self.as_rm(a, R14);
        match d.map(|d| self.home(d)) {
            Some(Opnd::Reg(t)) => {
                self.asm.wide(Map::Of, size, opcode, t, a);
                Rm::Reg(t)
            }
            Some(home) => {
                self.mov(RAX, home);
                self.asm.wide(Map::Of, size, opcode, RAX, a);
                // All of it, whatever the size: it may be what it was.
                self.settle(d, Size::B8, Rm::Reg(RAX));
                Rm::Reg(R15)
            }
            None => {
                self.asm.wide(Map::Of, size, opcode, RAX, a);
                Rm::Reg(R15)
            }
        }
    }

    fn mul_f(&mut self, size: Size, d: Option<Slot>, a: Opnd, b: Opnd) -> Rm {
        let (a, b) = if matches!(a, Opnd::Imm(_)) { (b, a) } else { (a, b) };
        let pin = d.and_then(|d| self.pin_of(d));
        match self.operand(b, size, R15) {
            Opnd::Imm(imm) => {
                let t = pin.unwrap_or(RAX);
                let a = self.as_rm(a, R14);
                let byte = i64::from(imm as i8) == imm;
                self.asm.wide(Map::Base, size, if byte { 0x6b } else { 0x69 }, t, a);
                if byte {
                    self.asm.push(imm as u8);
                } else {
                    self.asm.imm_sized(size, imm);
                }
                Rm::Reg(t)
            }
            b => {
                let home = d.map(|d| self.home(d));
                let swap = b == Opnd::Reg(RAX) || home == Some(b) && pin.is_some();
                let (a, b) = if swap && home != Some(a) { (b, a) } else { (a, b) };
                let (place, b) = self.start_with(d, size, a, b);
                let (place, b) = match place {
                    Rm::Reg(t) => (t, b),
                    _ if b == Opnd::Reg(RAX) => (RAX, a),
                    _ => {
                        self.mov(RAX, a);
                        (RAX, b)
                    }
                };
                let b = self.as_rm(b, R14);
                self.asm.wide(Map::Of, size, 0xaf, place, b);
                Rm::Reg(place)
            }
        }
    }

    pub(super) fn shift_double(&mut self, left: bool, size: Size, d: Slot, [a, b, n]: [Val; 3]) {
        let whole = Op::ShiftDoubleF { left, size, d, a, b, n };
        self.flags_for(&whole);
        let [a, b, n] = [a, b, n].map(|v| self.home_val(v));
        let opcode = if left { 0xa4 } else { 0xac };
        let saved = match n {
            Opnd::Imm(_) => false,
            n => self.load_count(n),
        };
        if let (Opnd::Imm(n), Opnd::Reg(t)) = (n, a)
            && self.home(d) == a
            && size >= Size::B4
        {
            let b = self.in_reg(b, R14);
            self.asm.wide(Map::Of, size, opcode, b, Rm::Reg(t));
            self.asm.push(n as u8);
            return self.flags_from(&whole);
        }
        let moved = |v: Opnd| if v == Opnd::Reg(RCX) && saved { Opnd::Reg(R15) } else { v };
        // In rax throughout: rare enough.
        self.mov(RAX, moved(a));
        let b = self.in_reg(moved(b), R14);
        if let Opnd::Imm(n) = n {
            self.asm.wide(Map::Of, size, opcode, b, Rm::Reg(RAX));
            self.asm.push(n as u8);
        } else {
            self.asm.wide(Map::Of, size, opcode | 1, b, Rm::Reg(RAX));
        }
        self.restore_count(saved);
        self.fill(d, size, RAX);
        self.flags_from(&whole);
    }

    pub(super) fn set_cond(&mut self, cond: CondF, d: Slot) {
        let cc = self.condition(cond);
        let place = self.rm(d);
        self.asm.ins8(Map::Of, 0x90 | cc as u8, 0, place);
    }

    pub(super) fn cmov(&mut self, cond: CondF, size: Size, d: Slot, a: Val) {
        let cc = self.condition(cond);
        let a = self.home_val(a);
        let a = self.as_rm(a, R14);
        let opcode = 0x40 | cc as u8;
        match self.home(d) {
            Opnd::Reg(t) => self.asm.wide(Map::Of, size, opcode, t, a),
            home => {
                self.mov(RAX, home);
                self.asm.wide(Map::Of, size, opcode, RAX, a);
                self.fill(d, size, RAX);
            }
        }
    }

    pub(super) fn branch_f(&mut self, cond: CondF, to: PagePc, dead: flags::Flags) {
        let cc = self.condition(cond);
        if self.loop_branch(cc, to, dead) {
        } else if self.saves_at_exit(dead) {
            self.branch_and_save(cc, to);
        } else {
            self.branch_on(cc, to);
        }
    }

    pub(super) fn lea_op(&mut self, d: Slot, (base, index, shift): (Val, Val, u8), disp: i32, size: Size) {
        let (mut disp, mut base, mut index) = (i64::from(disp), self.val(base), self.val(index));
        // Constants join the displacement.
        if let Opnd::Imm(imm) = base {
            disp = disp.wrapping_add(imm);
            base = Opnd::Imm(0);
        }
        if let Opnd::Imm(imm) = index {
            disp = disp.wrapping_add(imm << shift);
            index = Opnd::Imm(0);
        }
        if size != Size::B8 {
            disp = i64::from(disp as i32);
        }
        let t = self.target(d);
        let w = size == Size::B8;
        if w && self.folds(d, (base, index), (shift, disp)) {
            return;
        }
        let disp = match i32::try_from(disp) {
            Ok(disp) => disp,
            Err(_) => {
                // No room for it: it becomes the base, or is added to it, which at most one of them prevents.
                self.asm.mov_ri(R15, disp);
                match base {
                    Opnd::Imm(_) => {}
                    base => {
                        let base = self.in_reg(base, R14);
                        self.asm.lea_sib(true, R15, Some(base), Some((R15, 0)), 0);
                    }
                }
                base = Opnd::Reg(R15);
                0
            }
        };
        let base = match base {
            Opnd::Imm(_) => None,
            base => Some(self.in_reg(base, R15)),
        };
        let index = match index {
            Opnd::Imm(_) => None,
            index => Some((self.in_reg(index, R14), shift)),
        };
        match (base, index) {
            (None, None) => self.asm.mov_ri(t, if w { i64::from(disp) } else { i64::from(disp as u32) }),
            (Some(base), None) => self.asm.lea(w, t, base, disp),
            (base, index) => self.asm.lea_sib(w, t, base, index, disp),
        }
        if size == Size::B2 {
            self.asm.ins(Map::Of, false, 0xb7, t, Rm::Reg(t));
        }
        self.finish(d);
    }

    pub(super) fn set_part(&mut self, d: Slot, size: Size, a: Val) {
        let a = self.home_val(a);
        let place = self.rm(d);
        if let Opnd::Imm(imm) = a {
            self.asm.sized_ext(Map::Base, size, 0xc6, 0, place);
            return self.asm.imm_sized(size, imm);
        }
        let a = self.in_reg(a, RAX);
        self.fill(d, size, a);
    }

    pub(super) fn get_high(&mut self, d: Slot, a: Slot) {
        let t = self.target(d);
        match self.home(a) {
            Opnd::Mem(disp) => self.asm.ins(Map::Of, false, 0xb6, t, Rm::Env(disp + 1)),
            // The registers that have a high byte, as long as no REX prefix is needed: its number is 4 more.
            Opnd::Reg(r @ 1..=3) if t < 8 => self.asm.ins(Map::Of, false, 0xb6, t, Rm::Reg(r + 4)),
            Opnd::Reg(r) => {
                self.asm.vex(Vex::RORX, false, t, 0, Rm::Reg(r));
                self.asm.push(8);
                self.asm.ins8(Map::Of, 0xb6, t, Rm::Reg(t));
            }
            Opnd::Imm(_) => {}
        }
        self.finish(d);
    }

    pub(super) fn set_high(&mut self, d: Slot, a: Val) {
        let a = self.home_val(a);
        match self.home(d) {
            Opnd::Mem(disp) => {
                let a = self.in_reg(a, RAX);
                self.asm.ins8(Map::Base, 0x88, a, Rm::Env(disp + 1));
            }
            Opnd::Reg(t @ 1..=3) => {
                self.mov(RAX, a);
                // mov ch, al and the like.
                self.asm.ins(Map::Base, false, 0x88, RAX, Rm::Reg(t + 4));
            }
            Opnd::Reg(t) => {
                let a = self.in_reg(a, RAX);
                let a = if a == t {
                    self.mov(RAX, Opnd::Reg(a));
                    RAX
                } else {
                    a
                };
                for (turn, replace) in [(8, true), (56, false)] {
                    self.asm.vex(Vex::RORX, true, t, 0, Rm::Reg(t));
                    self.asm.push(turn);
                    if replace {
                        self.asm.ins8(Map::Base, 0x88, a, Rm::Reg(t));
                    }
                }
            }
            Opnd::Imm(_) => {}
        }
    }

    pub(super) fn load_env(&mut self, d: Slot, off: i32, size: Size, ext: Ext) {
        let t = self.target(d);
        let place = Rm::Env(self.be.env(self.be.config.env.guest.wrapping_add(off)));
        self.load_value(t, place, size, ext);
        self.finish(d);
    }

    pub(super) fn store_env(&mut self, src: Val, off: i32, size: Size) {
        let src = self.home_val(src);
        let place = Rm::Env(self.be.env(self.be.config.env.guest.wrapping_add(off)));
        self.store_to(place, src, size);
    }
}

/// Whether the lowering of an operation takes its operands as they are before it changes `rax`, unless there are flags
/// that it leaves alone: those that need no flags before them, and have no count to make room for.
fn reads_rax(op: &Op) -> bool {
    let Op::AluF { op, size, b, .. } = *op else { return false };
    match op {
        FlagOp::Add
        | FlagOp::Sub
        | FlagOp::And
        | FlagOp::Or
        | FlagOp::Xor
        | FlagOp::Neg
        | FlagOp::Not
        | FlagOp::Mul
        | FlagOp::Popcnt
        | FlagOp::Andn
        | FlagOp::Bextr
        | FlagOp::Bzhi
        | FlagOp::Blsi
        | FlagOp::Blsr
        | FlagOp::Blsmsk => true,
        FlagOp::Shl | FlagOp::Shr | FlagOp::Sar | FlagOp::Rol | FlagOp::Ror => {
            matches!(b, Val::Imm(n) if flags::count(size, n as u64) != 0)
        }
        _ => false,
    }
}
