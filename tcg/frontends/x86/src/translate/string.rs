//! String instructions: single ones as loads and stores, repeated moves and stores at once where it is simple, else by
//! the helper.

use std::mem::offset_of;

use iced_x86::{Mnemonic, OpKind, Register};
use mimus_tcg_ir::{CallKind, FlagOp, Op, Rep, Size, Slot, Val};

use super::operands::{Mem, gpr};
use super::{Flow, Tr, size};
use crate::helper_ids;
use crate::state::State;

const SI: Slot = Slot(6);
const DI: Slot = Slot(7);
const CX: Slot = Slot(1);
/// The direction flag, in the flags' second byte.
const DOWN: (i32, u8) = (offset_of!(State, flags) as i32 + 1, 4);

#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    Movs,
    Stos,
    Lods,
    Scas,
    Cmps,
    Port,
}

fn kind(m: Mnemonic) -> (Kind, u32) {
    use Mnemonic as M;
    match m {
        M::Movsb => (Kind::Movs, 1),
        M::Movsw => (Kind::Movs, 2),
        M::Movsd => (Kind::Movs, 4),
        M::Movsq => (Kind::Movs, 8),
        M::Stosb => (Kind::Stos, 1),
        M::Stosw => (Kind::Stos, 2),
        M::Stosd => (Kind::Stos, 4),
        M::Stosq => (Kind::Stos, 8),
        M::Lodsb => (Kind::Lods, 1),
        M::Lodsw => (Kind::Lods, 2),
        M::Lodsd => (Kind::Lods, 4),
        M::Lodsq => (Kind::Lods, 8),
        M::Scasb => (Kind::Scas, 1),
        M::Scasw => (Kind::Scas, 2),
        M::Scasd => (Kind::Scas, 4),
        M::Scasq => (Kind::Scas, 8),
        M::Cmpsb => (Kind::Cmps, 1),
        M::Cmpsw => (Kind::Cmps, 2),
        M::Cmpsd => (Kind::Cmps, 4),
        M::Cmpsq => (Kind::Cmps, 8),
        _ => (Kind::Port, 0),
    }
}

fn accumulator(bytes: u32) -> Register {
    match bytes {
        1 => Register::AL,
        2 => Register::AX,
        4 => Register::EAX,
        _ => Register::RAX,
    }
}

impl Tr<'_> {
    /// A string instruction.
    pub(crate) fn string(&mut self) -> Flow {
        let (kind, bytes) = kind(self.insn.mnemonic());
        let repeated = self.insn.has_rep_prefix() || self.insn.has_repne_prefix();
        if self.careful || kind == Kind::Port || !self.plain_addresses() {
            return self.string_helper();
        }
        if !repeated {
            self.element(kind, bytes);
            return Flow::Next;
        }
        if matches!(kind, Kind::Movs | Kind::Stos) {
            self.op(Op::Rep(Rep {
                size: size(bytes),
                fill: (kind == Kind::Stos).then_some(Slot(0)),
                count: CX,
                from: SI,
                to: DI,
                narrow: self.bits == 32,
                down: DOWN.0,
                down_mask: DOWN.1,
            }));
        }
        self.string_helper()
    }

    /// Whether addresses are the registers' as they are.
    fn plain_addresses(&self) -> bool {
        use OpKind as K;
        let natural = (0..self.insn.op_count()).all(|i| match self.insn.op_kind(i) {
            K::MemorySegRSI | K::MemorySegRDI | K::MemoryESRDI => self.bits == 64,
            K::MemorySegESI | K::MemorySegEDI | K::MemoryESEDI => self.bits == 32,
            K::MemorySegSI | K::MemorySegDI | K::MemoryESDI => false,
            _ => true,
        });
        natural && self.flat && !self.aligned && !self.is_based()
    }

    fn string_helper(&mut self) -> Flow {
        let [low, high] = self.packed();
        self.op(Op::Call {
            helper: helper_ids::STRING,
            kind: CallKind::MayExit,
            ret: None,
            args: [Val::Imm(low as i64), Val::Imm(high as i64), Val::Imm(0)],
        });
        Flow::Next
    }

    /// One element, upwards; downwards in careful mode.
    fn element(&mut self, kind: Kind, bytes: u32) {
        self.op(Op::GuardEnv { off: DOWN.0, mask: DOWN.1 });
        let a = accumulator(bytes);
        let (source, target) = (self.pointer(SI), self.pointer(DI));
        match kind {
            Kind::Movs => {
                let value = self.load(source, bytes);
                self.store(target, bytes, value);
            }
            Kind::Stos => {
                let value = self.read_reg(a);
                self.store(target, bytes, value);
            }
            Kind::Lods => {
                let value = self.load(source, bytes);
                self.write_reg(a, value);
            }
            Kind::Scas => {
                let value = self.load(target, bytes);
                self.compare(bytes, Val::Slot(gpr(a)), value);
            }
            Kind::Cmps => {
                // As `exec::string` has it: whose fault comes first is the maker's.
                let early = if self.amd { None } else { Some(self.load(target, bytes)) };
                let left = self.load(source, bytes);
                let right = early.unwrap_or_else(|| self.load(target, bytes));
                self.compare(bytes, left, right);
            }
            Kind::Port => {}
        }
        if matches!(kind, Kind::Movs | Kind::Lods | Kind::Cmps) {
            self.advance(SI, bytes);
        }
        if kind != Kind::Lods {
            self.advance(DI, bytes);
        }
    }

    /// The address in a register.
    fn pointer(&mut self, register: Slot) -> Mem {
        if self.bits == 64 {
            return Mem { base: Val::Slot(register), off: 0 };
        }
        let d = self.temp();
        self.op(Op::Lea { d, base: Val::Slot(register), index: Val::Imm(0), shift: 0, disp: 0, size: Size::B4 });
        Mem { base: Val::Slot(d), off: 0 }
    }

    fn compare(&mut self, bytes: u32, a: Val, b: Val) {
        self.op(Op::AluF { op: FlagOp::Sub, size: size(bytes), d: None, a, b });
    }

    fn advance(&mut self, d: Slot, bytes: u32) {
        let width = if self.bits == 64 { Size::B8 } else { Size::B4 };
        self.op(Op::Lea { d, base: Val::Slot(d), index: Val::Imm(0), shift: 0, disp: bytes as i32, size: width });
    }
}
