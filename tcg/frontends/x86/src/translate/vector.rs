//! Moves between SSE registers, general registers and memory, and logic of whole registers: what needs no vector unit.
//!
//! Everything else of SSE goes through the helper. Left to it, too: memory operands that must be aligned.

use std::mem::offset_of;

use iced_x86::{Mnemonic, OpKind, Register};
use mimus_tcg_ir::{AluOp, Ext, Op, Size, Ty, UnOp, Val};

use super::operands::Mem;
use super::{Flow, Tr, size};
use crate::state::State;

/// Byte offset of a quadword of an XMM register.
fn quad(r: Register, half: usize) -> i32 {
    (offset_of!(State, vec) + 32 * r.number() + 8 * half) as i32
}

impl Tr<'_> {
    fn xmm_operand(&self, i: u32) -> Option<Register> {
        let register = self.insn.op_kind(i) == OpKind::Register;
        (register && self.insn.op_register(i).is_xmm()).then(|| self.insn.op_register(i))
    }

    fn load_env(&mut self, off: i32, size: Size) -> Val {
        let d = self.temp();
        self.op(Op::LoadEnv { d, off, size, ext: Ext::Zero });
        Val::Slot(d)
    }

    fn store_env(&mut self, off: i32, size: Size, src: Val) {
        self.op(Op::StoreEnv { src, off, size });
    }

    /// Leaves to careful mode unless SSE is on.
    fn guard_sse(&mut self) {
        self.op(Op::GuardEnv { off: offset_of!(State, sse_off) as i32, mask: 1 });
    }

    /// SSE moves and logic; `None` if it is something else.
    pub(crate) fn vector(&mut self) -> Option<Flow> {
        use Mnemonic as M;
        if self.careful {
            return None;
        }
        match self.insn.mnemonic() {
            M::Movups | M::Movupd | M::Movdqu | M::Lddqu => self.move_all(true),
            M::Movaps | M::Movapd | M::Movdqa => self.move_all(false),
            M::Movq | M::Movd => self.move_general(),
            M::Movss => self.move_scalar(4),
            M::Movsd if !self.insn.is_string_instruction() => self.move_scalar(8),
            M::Movlps | M::Movlpd => self.move_half(0),
            M::Movhps | M::Movhpd => self.move_half(1),
            M::Pxor | M::Xorps | M::Xorpd => self.logic(AluOp::Xor),
            M::Por | M::Orps | M::Orpd => self.logic(AluOp::Or),
            M::Pand | M::Andps | M::Andpd => self.logic(AluOp::And),
            _ => None,
        }
    }

    fn move_all(&mut self, unaligned: bool) -> Option<Flow> {
        let (to, from) = (self.xmm_operand(0), self.xmm_operand(1));
        match (to, from) {
            (Some(to), Some(from)) => {
                self.guard_sse();
                let low = self.load_env(quad(from, 0), Size::B8);
                let high = self.load_env(quad(from, 1), Size::B8);
                self.store_env(quad(to, 0), Size::B8, low);
                self.store_env(quad(to, 1), Size::B8, high);
            }
            (Some(to), None) if unaligned => {
                self.guard_sse();
                let mem = self.memory(16, false);
                let upper = above(mem)?;
                let low = self.load(mem, 8);
                let high = self.load(upper, 8);
                self.store_env(quad(to, 0), Size::B8, low);
                self.store_env(quad(to, 1), Size::B8, high);
            }
            (None, Some(from)) if unaligned => {
                self.guard_sse();
                let mem = self.memory(16, true);
                let upper = above(mem)?;
                let low = self.load_env(quad(from, 0), Size::B8);
                let high = self.load_env(quad(from, 1), Size::B8);
                // The higher address first: it is the one that can be on a page that faults.
                self.store(upper, 8, high);
                self.store(mem, 8, low);
            }
            _ => return None,
        }
        Some(Flow::Next)
    }

    /// MOVD and MOVQ: a general register or memory on the other side, or two XMM registers.
    fn move_general(&mut self) -> Option<Flow> {
        let uses_mm = (0..2).any(|i| self.insn.op_kind(i) == OpKind::Register && self.insn.op_register(i).is_mm());
        if uses_mm {
            return None;
        }
        if let Some(to) = self.xmm_operand(0) {
            self.guard_sse();
            let value = if let Some(from) = self.xmm_operand(1) {
                self.load_env(quad(from, 0), Size::B8)
            } else {
                let bytes = self.bytes(1);
                let v = self.read(1, bytes);
                if bytes == 4 && !self.is_memory(1) { self.un(UnOp::ZextW, Ty::I64, v) } else { v }
            };
            self.store_env(quad(to, 0), Size::B8, value);
            self.store_env(quad(to, 1), Size::B8, Val::Imm(0));
            return Some(Flow::Next);
        }
        let from = self.xmm_operand(1)?;
        self.guard_sse();
        let bytes = self.bytes(0);
        let value = self.load_env(quad(from, 0), size(bytes));
        self.write(0, bytes, value);
        Some(Flow::Next)
    }

    /// MOVSS and MOVSD: loads clear what is above, moves between registers leave it.
    fn move_scalar(&mut self, bytes: u32) -> Option<Flow> {
        self.guard_sse();
        match (self.xmm_operand(0), self.xmm_operand(1)) {
            (Some(to), Some(from)) => {
                let value = self.load_env(quad(from, 0), size(bytes));
                self.store_env(quad(to, 0), size(bytes), value);
            }
            (Some(to), None) => {
                let value = self.read(1, bytes);
                self.store_env(quad(to, 0), Size::B8, value);
                self.store_env(quad(to, 1), Size::B8, Val::Imm(0));
            }
            (None, Some(from)) => {
                let value = self.load_env(quad(from, 0), size(bytes));
                self.write(0, bytes, value);
            }
            _ => return None,
        }
        Some(Flow::Next)
    }

    fn move_half(&mut self, half: usize) -> Option<Flow> {
        self.guard_sse();
        match (self.xmm_operand(0), self.xmm_operand(1)) {
            (Some(to), None) => {
                let value = self.read(1, 8);
                self.store_env(quad(to, half), Size::B8, value);
            }
            (None, Some(from)) => {
                let value = self.load_env(quad(from, half), Size::B8);
                self.write(0, 8, value);
            }
            _ => return None,
        }
        Some(Flow::Next)
    }

    fn logic(&mut self, op: AluOp) -> Option<Flow> {
        let (to, from) = (self.xmm_operand(0)?, self.xmm_operand(1)?);
        self.guard_sse();
        for half in 0..2 {
            let value = if op == AluOp::Xor && to == from {
                Val::Imm(0)
            } else {
                let a = self.load_env(quad(to, half), Size::B8);
                let b = self.load_env(quad(from, half), Size::B8);
                self.alu(op, Ty::I64, a, b)
            };
            self.store_env(quad(to, half), Size::B8, value);
        }
        Some(Flow::Next)
    }
}

/// The upper quadword of a memory operand.
fn above(mem: Mem) -> Option<Mem> {
    Some(Mem { off: mem.off.checked_add(8)?, ..mem })
}
