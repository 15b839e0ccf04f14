//! RV64I: constants, arithmetic, memory, jumps and branches.

use super::Translator;
use crate::decode::{ArgsB, ArgsI, ArgsJ, ArgsR, ArgsS, ArgsShift, ArgsU};
use crate::helper_ids;
use mimus_tcg_ir::{AluOp, Cond, Ext, JumpHint, Op, PagePc, Size, Ty, Val};

impl Translator<'_> {
    pub(super) fn op_reg(&mut self, op: AluOp, ty: Ty, a: ArgsR) -> bool {
        let (x, y) = (self.x(a.rs1), self.x(a.rs2));
        self.binary(op, ty, a.rd, x, y)
    }

    pub(super) fn op_imm(&mut self, op: AluOp, ty: Ty, a: ArgsI) -> bool {
        let x = self.x(a.rs1);
        self.binary(op, ty, a.rd, x, Val::Imm(i64::from(a.imm)))
    }

    pub(super) fn op_shift(&mut self, op: AluOp, ty: Ty, a: ArgsShift) -> bool {
        let x = self.x(a.rs1);
        self.binary(op, ty, a.rd, x, Val::Imm(i64::from(a.shamt)))
    }

    /// `addi`, the second half of an `auipc` pair if its source is known relative to the page.
    pub(super) fn add_imm(&mut self, a: ArgsI) -> bool {
        if a.rs1 != 0
            && a.rs1 as u8 == self.pc_reg
            && let Some(value) = self.pc_value.0.checked_add(a.imm)
        {
            return self.page_address(a.rd, PagePc(value));
        }
        self.op_imm(AluOp::Add, Ty::I64, a)
    }

    pub(super) fn load_upper(&mut self, a: ArgsU) -> bool {
        self.mov(a.rd, Val::Imm(i64::from(a.imm)))
    }

    pub(super) fn add_upper_pc(&mut self, a: ArgsU) -> bool {
        // At most 0x7fff_f000 + 4095: never overflows.
        self.page_address(a.rd, self.relative(a.imm))
    }

    fn page_address(&mut self, rd: i32, value: PagePc) -> bool {
        if rd != 0 {
            let d = self.dest(rd);
            self.emit(Op::GetPc { d, pc: value });
            self.pc_reg = rd as u8;
            self.pc_value = value;
        }
        true
    }

    pub(super) fn load(&mut self, size: Size, ext: Ext, a: ArgsI) -> bool {
        let base = self.x(a.rs1);
        // A load to x0 still accesses memory.
        let d = self.dest_or_temp(a.rd);
        self.emit(Op::Load { d, base, off: a.imm, size, ext });
        true
    }

    pub(super) fn store(&mut self, size: Size, a: ArgsS) -> bool {
        let (src, base) = (self.x(a.rs2), self.x(a.rs1));
        self.emit(Op::Store { src, base, off: a.imm, size });
        true
    }

    pub(super) fn jump_and_link(&mut self, a: ArgsJ) -> bool {
        let to = self.relative(a.imm);
        if self.misaligned(to) {
            return self.misaligned_target(to);
        }
        self.link(a.rd);
        match self.follow {
            Some(on) => (self.next, self.went_on) = (on, true),
            None => self.end(Op::Jump { to }),
        }
        true
    }

    pub(super) fn jump_and_link_reg(&mut self, a: ArgsI) -> bool {
        if let Some(to) = self.known_target(a) {
            if self.misaligned(to) {
                return self.misaligned_target(to);
            }
            self.drop_dead_auipc(a);
            self.link(a.rd);
            self.end(Op::Jump { to });
            return true;
        }
        let base = self.x_slot(a.rs1);
        if !self.cfg.features.has(mimus_arch::riscv::Ext::Zca) {
            let target = self.temp();
            let (base, off) = (Val::Slot(base), Val::Imm(i64::from(a.imm)));
            self.emit(Op::Alu { op: AluOp::Add, ty: Ty::I64, d: target, a: base, b: off });
            self.call(helper_ids::CHECK_TARGET, None, [Val::Slot(target), Val::Imm(0), Val::Imm(0)]);
        }
        let link = (a.rd != 0).then(|| (self.dest(a.rd), self.next_pc()));
        self.end(Op::JumpReg { base, off: a.imm, link, hint: jump_hint(a.rd, a.rs1) });
        true
    }

    /// The target of a `jalr` whose base came from an `auipc` in the block.
    fn known_target(&self, a: ArgsI) -> Option<PagePc> {
        if a.rs1 == 0 || a.rs1 as u8 != self.pc_reg {
            return None;
        }
        // Pages begin at even addresses, so clearing bit 0 of the offset clears that of the address.
        self.pc_value.0.checked_add(a.imm).map(|to| PagePc(to & !1))
    }

    /// In `auipc ra; jalr ra, ra` the link overwrites what `auipc` computed.
    fn drop_dead_auipc(&mut self, a: ArgsI) {
        let ops = &mut self.block.ops;
        if a.rd == a.rs1
            && let [.., Op::GetPc { d, .. }, Op::Insn { .. }] = ops[..]
            && i32::from(d.0) == a.rd
        {
            ops.remove(ops.len() - 2);
        }
    }

    fn link(&mut self, rd: i32) {
        if rd != 0 {
            let d = self.dest(rd);
            self.emit(Op::GetPc { d, pc: self.next_pc() });
        }
    }

    /// A jump that raises instruction-address-misaligned.
    fn misaligned_target(&mut self, to: PagePc) -> bool {
        let target = self.temp();
        self.emit(Op::GetPc { d: target, pc: to });
        self.call(helper_ids::CHECK_TARGET, None, [Val::Slot(target), Val::Imm(0), Val::Imm(0)]);
        self.end(Op::Dispatch);
        true
    }

    pub(super) fn branch(&mut self, cond: Cond, a: ArgsB) -> bool {
        let to = self.relative(a.imm);
        if a.rs1 == a.rs2 {
            return self.constant_branch(cond, to);
        }
        let (x, y) = (self.x(a.rs1), self.x(a.rs2));
        if self.misaligned(to) {
            // Only a taken branch raises the exception.
            self.emit(Op::Branch { cond: negate(cond), a: x, b: y, to: self.next_pc() });
            return self.misaligned_target(to);
        }
        match self.follow {
            Some(on) => {
                self.emit(Op::Branch { cond: negate(cond), a: x, b: y, to: self.next_pc() });
                self.next = on;
            }
            None => self.emit(Op::Branch { cond, a: x, b: y, to }),
        }
        self.exits += 1;
        true
    }

    /// A branch that compares a register with itself.
    fn constant_branch(&mut self, cond: Cond, to: PagePc) -> bool {
        if !matches!(cond, Cond::Eq | Cond::GeS | Cond::GeU) {
            return true;
        }
        if self.misaligned(to) {
            return self.misaligned_target(to);
        }
        self.end(Op::Jump { to });
        true
    }
}

/// Return-address prediction hints (vol. I, 2.5.1): x1 and x5 are link registers.
fn jump_hint(rd: i32, rs1: i32) -> JumpHint {
    let is_link = |reg| matches!(reg, 1 | 5);
    if is_link(rd) {
        JumpHint::Call
    } else if is_link(rs1) {
        JumpHint::Return
    } else {
        JumpHint::None
    }
}

fn negate(cond: Cond) -> Cond {
    match cond {
        Cond::Eq => Cond::Ne,
        Cond::Ne => Cond::Eq,
        Cond::LtS => Cond::GeS,
        Cond::GeS => Cond::LtS,
        Cond::LtU => Cond::GeU,
        Cond::GeU => Cond::LtU,
    }
}
