//! Near jumps, calls, returns and loops.

use iced_x86::{Code, Mnemonic, OpKind, Register};
use mimus_arch::x86::regs::{RCX, RSP};
use mimus_tcg_ir::flags::Flags;
use mimus_tcg_ir::{AluOp, Cond, CondF, JumpHint, Op, PagePc, Size, Slot, Ty, UnOp, Val};

use super::moves::condition;
use super::{BASE0, Flow, Tr};
use crate::helper_ids;
use crate::state::{CS, sext};

impl Tr<'_> {
    /// Near control flow; `None` if it is something else.
    pub(crate) fn control(&mut self) -> Option<Flow> {
        let insn = self.insn;
        if insn.is_jcc_short_or_near() {
            let cond = condition(insn.condition_code())?;
            return Some(self.branch_flags(cond));
        }
        if insn.is_loop() || insn.is_loopcc() || insn.is_jcx_short() {
            return Some(self.counted());
        }
        if insn.is_jmp_short_or_near() {
            let to = self.target();
            self.check_relative(to);
            self.go(to);
            return Some(Flow::End);
        }
        if insn.is_call_near() {
            let to = self.target();
            self.check_relative(to);
            let back = self.return_ip();
            self.push(self.stack_item(), back);
            self.go(to);
            return Some(Flow::End);
        }
        if insn.is_jmp_near_indirect() || insn.is_call_near_indirect() {
            return Some(self.indirect());
        }
        match insn.mnemonic() {
            Mnemonic::Ret => Some(self.ret()),
            _ => None,
        }
    }

    /// Bytes of instruction pointers that this instruction loads.
    fn ip_bytes(&self) -> u32 {
        match self.insn.op_kind(0) {
            OpKind::NearBranch16 => 2,
            OpKind::NearBranch32 => 4,
            OpKind::NearBranch64 => 8,
            OpKind::Register => self.insn.op_register(0).size() as u32,
            OpKind::Memory => self.insn.memory_size().size() as u32,
            _ => self.bits / 8,
        }
    }

    /// Where a relative jump leads. The decoder was told the offset in the page as the address, and truncated the
    /// target to the operand size.
    fn target(&self) -> PagePc {
        let bytes = self.ip_bytes();
        let next = i64::from(self.next.0);
        let distance = sext((self.insn.near_branch_target() as i64).wrapping_sub(next) as u64, bytes) as i64;
        PagePc((next + distance) as i32)
    }

    /// Bytes that this instruction, if it is a call, pushes before its target is looked at.
    fn pushed(&self) -> u32 {
        let calls = self.insn.is_call_near() || self.insn.is_call_near_indirect();
        if calls { self.stack_item() } else { 0 }
    }

    /// Checks where a relative branch leads, if it is taken for certain.
    fn check_relative(&mut self, to: PagePc) {
        let known = !self.limited && (!self.careful || self.bits != 64);
        if known {
            return;
        }
        let ip = self.offset_of_pc(to);
        let ip = if self.ip_bytes() == 2 { self.un(UnOp::ZextH, Ty::I64, ip) } else { ip };
        if self.careful {
            self.check_code(helper_ids::CODE_TARGET, ip, self.pushed());
        } else {
            self.guard_limit(ip);
        }
    }

    /// Checks where an indirect branch leads: `ip` has the bits of its operand (`bytes`), and zeros above.
    fn check_target(&mut self, ip: Val, bytes: u32) {
        let canonical = self.bits == 64 && bytes == 8;
        // Where a helper may have found the address, nothing is left to go back to.
        if self.careful || self.limited || canonical && self.aligned {
            return self.check_code(helper_ids::CODE_TARGET, ip, self.pushed());
        }
        if !canonical {
        } else if self.insn.is_call_near_indirect() && !self.kernel {
            // No user's code is in the upper half, where careful mode is left to find out. The other check can be put off
            // where nothing but a register changes before the jump, which is better still.
            self.op(Op::Guard { cond: Cond::GeU, a: ip, b: Val::Imm(1 << 47) });
        } else {
            // Canonical with 48 bits; careful mode knows if there are more.
            self.op(Op::GuardFits { a: ip, bits: 48 });
        }
    }

    /// Ends the block at `to`.
    fn go(&mut self, to: PagePc) {
        if self.ip_bytes() != 2 {
            return self.op(Op::Jump { to });
        }
        let t = self.wrapped(to);
        self.op(Op::JumpReg { base: t, off: 0, link: None, hint: JumpHint::None });
    }

    /// The linear address of `to` with its offset in CS truncated to 16 bits.
    fn wrapped(&mut self, to: PagePc) -> Slot {
        let ip = self.offset_of_pc(to);
        let ip = self.un(UnOp::ZextH, Ty::I64, ip);
        self.in_code(ip)
    }

    /// The offset in CS of an address in the page.
    pub(super) fn offset_of_pc(&mut self, pc: PagePc) -> Val {
        let d = self.temp();
        self.op(Op::GetPc { d, pc });
        if self.bits == 64 {
            return Val::Slot(d);
        }
        if self.flat {
            return self.un(UnOp::ZextW, Ty::I64, Val::Slot(d));
        }
        self.alu(AluOp::Sub, Ty::U32, Val::Slot(d), Val::Slot(Slot(BASE0 + CS as u8)))
    }

    /// The linear address of an offset in CS, in a temporary.
    fn in_code(&mut self, ip: Val) -> Slot {
        let v = if self.bits == 64 || self.flat {
            match ip {
                Val::Slot(_) => ip,
                Val::Imm(_) => self.un(UnOp::Mov, Ty::I64, ip),
            }
        } else {
            self.alu(AluOp::Add, Ty::U32, ip, Val::Slot(Slot(BASE0 + CS as u8)))
        };
        match v {
            Val::Slot(s) => s,
            Val::Imm(_) => Slot::temp(0),
        }
    }

    fn return_ip(&mut self) -> Val {
        self.offset_of_pc(self.next)
    }

    fn branch_flags(&mut self, cond: CondF) -> Flow {
        let to = self.target();
        if self.limited && !self.careful {
            // Whether it is taken or not.
            self.check_relative(to);
        }
        if self.ip_bytes() != 2 && !self.careful {
            self.op(Op::BranchF { cond, to, dead: Flags::NONE });
            return Flow::Next;
        }
        self.op(Op::BranchF { cond: cond.invert(), to: self.next, dead: Flags::NONE });
        if self.careful {
            self.check_relative(to);
        }
        self.go(to);
        Flow::End
    }

    /// LOOP, LOOPE, LOOPNE and JCXZ.
    fn counted(&mut self) -> Flow {
        let to = self.target();
        let insn = self.insn;
        let rcx = Slot(RCX as u8);
        let bytes = count_bytes(insn.code());
        let narrow = |tr: &mut Self, v: Val| match bytes {
            2 => tr.un(UnOp::ZextH, Ty::I64, v),
            4 => tr.un(UnOp::ZextW, Ty::I64, v),
            _ => v,
        };
        if !self.careful {
            // Whether it is taken or not.
            self.check_relative(to);
        }
        let mut left = None;
        let (cond, value) = if insn.is_jcx_short() {
            (Cond::Eq, narrow(self, Val::Slot(rcx)))
        } else {
            let less = self.alu(AluOp::Sub, Ty::I64, Val::Slot(rcx), Val::Imm(1));
            let count = narrow(self, less);
            left = Some(count);
            let wanted = match insn.mnemonic() {
                Mnemonic::Loope => Some(CondF::E),
                Mnemonic::Loopne => Some(CondF::Ne),
                _ => None,
            };
            (
                Cond::Ne,
                match wanted {
                    None => count,
                    Some(cond) => {
                        let d = self.temp();
                        self.op(Op::Un { op: UnOp::Mov, ty: Ty::I64, d, a: Val::Imm(0) });
                        self.op(Op::SetCondF { cond, d });
                        let more = self.alu(AluOp::SetLtU, Ty::I64, Val::Imm(0), count);
                        self.alu(AluOp::And, Ty::I64, Val::Slot(d), more)
                    }
                },
            )
        };
        if self.careful {
            self.check_counted(cond, value, to);
        }
        match (left, bytes) {
            (None, _) => {}
            (Some(count), 2) => self.op(Op::SetPart { d: rcx, size: Size::B2, a: count }),
            (Some(count), _) => self.op(Op::Un { op: UnOp::Mov, ty: Ty::I64, d: rcx, a: count }),
        }
        if self.ip_bytes() != 2 {
            self.op(Op::Branch { cond, a: value, b: Val::Imm(0), to });
            return Flow::Next;
        }
        let inverse = if cond == Cond::Eq { Cond::Ne } else { Cond::Eq };
        self.op(Op::Branch { cond: inverse, a: value, b: Val::Imm(0), to: self.next });
        self.go(to);
        Flow::End
    }

    /// In careful mode: checks where a branch leads that is taken if `value` is (or is not) zero.
    fn check_counted(&mut self, cond: Cond, value: Val, to: PagePc) {
        let ip = self.offset_of_pc(to);
        let ip = if self.ip_bytes() == 2 { self.un(UnOp::ZextH, Ty::I64, ip) } else { ip };
        let (a, b) = if cond == Cond::Eq { (value, Val::Imm(1)) } else { (Val::Imm(0), value) };
        let taken = self.alu(AluOp::SetLtU, Ty::I64, a, b);
        let mask = self.alu(AluOp::Sub, Ty::I64, Val::Imm(0), taken);
        // Offset 0, if it is not taken, is always inside.
        let ip = self.alu(AluOp::And, Ty::I64, ip, mask);
        self.check_code(helper_ids::CODE_TARGET, ip, 0);
    }

    fn indirect(&mut self) -> Flow {
        let bytes = self.ip_bytes();
        let v = self.read(0, bytes);
        let v = match bytes {
            2 => self.un(UnOp::ZextH, Ty::I64, v),
            4 => self.un(UnOp::ZextW, Ty::I64, v),
            // The push changes RSP before the jump.
            _ if v == Val::Slot(Slot(RSP as u8)) => self.un(UnOp::Mov, Ty::I64, v),
            _ => v,
        };
        self.check_target(v, bytes);
        let base = self.in_code(v);
        let call = self.insn.is_call_near_indirect();
        if call {
            let back = self.return_ip();
            self.push(self.stack_item(), back);
        }
        let hint = if call { JumpHint::Call } else { JumpHint::None };
        self.op(Op::JumpReg { base, off: 0, link: None, hint });
        Flow::End
    }

    fn ret(&mut self) -> Flow {
        let bytes = match self.insn.code() {
            Code::Retnw | Code::Retnw_imm16 => 2,
            Code::Retnd | Code::Retnd_imm16 => 4,
            _ => 8,
        };
        let parameters = if self.insn.op_count() == 1 { i64::from(self.insn.immediate16()) } else { 0 };
        let ip = self.peek(bytes);
        self.check_target(ip, bytes);
        self.release(i64::from(bytes) + parameters);
        let base = self.in_code(ip);
        self.op(Op::JumpReg { base, off: 0, link: None, hint: JumpHint::Return });
        Flow::End
    }
}

/// Bytes of the counter register.
pub(crate) fn count_bytes(code: Code) -> u32 {
    use Code::*;
    match code {
        Jcxz_rel8_16 | Jcxz_rel8_32 | Loop_rel8_16_CX | Loop_rel8_32_CX | Loope_rel8_16_CX | Loope_rel8_32_CX
        | Loopne_rel8_16_CX | Loopne_rel8_32_CX => 2,
        Jecxz_rel8_16 | Jecxz_rel8_32 | Jecxz_rel8_64 | Loop_rel8_16_ECX | Loop_rel8_32_ECX | Loop_rel8_64_ECX
        | Loope_rel8_16_ECX | Loope_rel8_32_ECX | Loope_rel8_64_ECX | Loopne_rel8_16_ECX | Loopne_rel8_32_ECX
        | Loopne_rel8_64_ECX => 4,
        _ => Register::RCX.size() as u32,
    }
}
