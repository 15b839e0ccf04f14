//! Moves, extensions, stack operations of the common kind.

use std::mem::offset_of;

use iced_x86::{Code, ConditionCode, Mnemonic, OpKind, Register};
use mimus_arch::x86::regs::*;
use mimus_arch::x86::state::Segment;
use mimus_tcg_ir::{AluOp, CondF, Ext, Op, Size, Slot, Ty, UnOp, Val};

use super::operands::{Mem, gpr, is_high, segment};
use super::{Flow, Tr, size};
use crate::stack::selector_bytes;
use crate::state::{SS, State};

/// The IR's condition.
pub(crate) fn condition(c: ConditionCode) -> Option<CondF> {
    use ConditionCode as C;
    Some(match c {
        C::o => CondF::O,
        C::no => CondF::No,
        C::b => CondF::B,
        C::ae => CondF::Ae,
        C::e => CondF::E,
        C::ne => CondF::Ne,
        C::be => CondF::Be,
        C::a => CondF::A,
        C::s => CondF::S,
        C::ns => CondF::Ns,
        C::p => CondF::P,
        C::np => CondF::Np,
        C::l => CondF::L,
        C::ge => CondF::Ge,
        C::le => CondF::Le,
        C::g => CondF::G,
        C::None => return None,
    })
}

impl Tr<'_> {
    /// Moves and the like; `None` if it is something else.
    pub(crate) fn moves(&mut self) -> Option<Flow> {
        use Mnemonic as M;
        match self.insn.mnemonic() {
            M::Mov => return self.mov(),
            M::Movzx | M::Movsx | M::Movsxd => self.extend(),
            M::Lea => self.lea(),
            M::Cbw => self.accumulator(UnOp::SextB, Register::AX),
            M::Cwde => self.accumulator(UnOp::SextH, Register::EAX),
            M::Cdqe => self.accumulator(UnOp::SextW, Register::RAX),
            M::Cwd => self.sign(UnOp::SextH, Register::DX),
            M::Cdq => self.sign(UnOp::SextW, Register::EDX),
            M::Cqo => self.sign(UnOp::Mov, Register::RDX),
            M::Bswap => {
                let r = self.insn.op_register(0);
                // With 16 bits it is undefined; processors clear them.
                let ty = if r.size() == 8 { Ty::I64 } else { Ty::U32 };
                let a = if r.size() == 2 { Val::Imm(0) } else { Val::Slot(gpr(r)) };
                let v = self.un(UnOp::Bswap, ty, a);
                self.write_reg(r, v);
            }
            M::Movbe => self.movbe(),
            M::Movnti => {
                let bytes = self.bytes(0);
                let a = self.read(1, bytes);
                self.write(0, bytes, a);
            }
            M::Xlatb => return None,
            M::Push => return self.push_operand(),
            M::Pop => return self.pop_operand(),
            M::Leave => return self.leave(),
            M::Pushf | M::Pushfd | M::Pushfq => return self.pushf(),
            M::Cld | M::Std => self.direction(),
            M::Nop
            | M::Endbr32
            | M::Endbr64
            | M::Prefetchnta
            | M::Prefetcht0
            | M::Prefetcht1
            | M::Prefetcht2
            | M::Prefetchw
            | M::Prefetch
            | M::Reservednop
            | M::Lfence
            | M::Sfence => {}
            M::Mfence => self.op(Op::Fence),
            M::Lodsb
            | M::Lodsw
            | M::Lodsd
            | M::Lodsq
            | M::Stosb
            | M::Stosw
            | M::Stosd
            | M::Stosq
            | M::Movsb
            | M::Movsw
            | M::Movsq
            | M::Scasb
            | M::Scasw
            | M::Scasd
            | M::Scasq
            | M::Cmpsb
            | M::Cmpsw
            | M::Cmpsq
            | M::Insb
            | M::Insw
            | M::Insd
            | M::Outsb
            | M::Outsw
            | M::Outsd => return Some(self.string()),
            M::Movsd if self.insn.is_string_instruction() => return Some(self.string()),
            M::Cmpsd if self.insn.is_string_instruction() => return Some(self.string()),
            _ => return self.flag_moves().or_else(|| self.conditional()),
        }
        Some(Flow::Next)
    }

    fn mov(&mut self) -> Option<Flow> {
        let kind =
            |i: u32| if self.insn.op_kind(i) == OpKind::Register { self.insn.op_register(i) } else { Register::None };
        let (to, from) = (kind(0), kind(1));
        if to.is_segment_register()
            || to.is_cr()
            || from.is_cr()
            || to.is_dr()
            || from.is_dr()
            || to.is_tr()
            || from.is_tr()
        {
            return None;
        }
        if from.is_segment_register() {
            let selector = self.selector(from);
            let bytes = if self.is_memory(0) { 2 } else { self.bytes(0) };
            self.write(0, bytes, selector);
            return Some(Flow::Next);
        }
        if matches!(self.insn.op_kind(0), OpKind::Memory) && self.insn.op_kind(1) == OpKind::Memory {
            return None;
        }
        let bytes = self.bytes(0);
        if self.is_memory(1) && bytes >= 4 {
            let Mem { base, off } = self.memory(bytes, false);
            self.op(Op::Load { d: gpr(to), base, off, size: size(bytes), ext: Ext::Zero });
            return Some(Flow::Next);
        }
        let a = self.read(1, bytes);
        self.write(0, bytes, a);
        Some(Flow::Next)
    }

    /// What a segment register was loaded with.
    fn selector(&mut self, from: Register) -> Val {
        let off = offset_of!(State, seg) + segment(from) * size_of::<Segment>() + offset_of!(Segment, selector);
        let d = self.temp();
        self.op(Op::LoadEnv { d, off: off as i32, size: Size::B2, ext: Ext::Zero });
        Val::Slot(d)
    }

    fn lea(&mut self) {
        let to = self.insn.op_register(0);
        let plain = !self.insn.is_ip_rel_memory_operand() && self.address_bytes() >= 4 && to.size() >= 4;
        if !plain {
            let a = self.offset();
            return self.write_reg(to, a);
        }
        let insn = self.insn;
        let slot = |r: Register| if r == Register::None { Val::Imm(0) } else { Val::Slot(gpr(r)) };
        let bytes = self.address_bytes().min(to.size() as u32);
        self.op(Op::Lea {
            d: gpr(to),
            base: slot(insn.memory_base()),
            index: slot(insn.memory_index()),
            shift: insn.memory_index_scale().trailing_zeros() as u8,
            disp: insn.memory_displacement64() as i32,
            size: size(bytes),
        });
    }

    fn extend(&mut self) {
        // AMD's loads as many bytes as without the prefix.
        let narrow = self.insn.code() == Code::Movsxd_r16_rm16 && self.amd;
        let from = if narrow { 4 } else { self.bytes(1) };
        let signed = self.insn.mnemonic() != Mnemonic::Movzx;
        let to = self.insn.op_register(0);
        if self.is_memory(1) && (to.size() == 8 || to.size() == 4 && !signed) {
            let Mem { base, off } = self.memory(from, false);
            let ext = if signed { Ext::Sign } else { Ext::Zero };
            return self.op(Op::Load { d: gpr(to), base, off, size: size(from), ext });
        }
        let a = self.read(1, from);
        let whole = to.size() == 8 || to.size() == 4 && !signed;
        let op = match (from, signed) {
            (1, false) => UnOp::ZextB,
            (1, true) => UnOp::SextB,
            (2, false) => UnOp::ZextH,
            (2, true) => UnOp::SextH,
            (_, _) => UnOp::SextW,
        };
        if whole {
            return self.op(Op::Un { op, ty: Ty::I64, d: gpr(to), a });
        }
        let v = self.un(op, Ty::I64, a);
        self.write_reg(to, v);
    }

    fn accumulator(&mut self, op: UnOp, to: Register) {
        let v = self.un(op, Ty::I64, Val::Slot(Slot(0)));
        self.write_reg(to, v);
    }

    fn sign(&mut self, op: UnOp, to: Register) {
        let v = self.un(op, Ty::I64, Val::Slot(Slot(0)));
        let v = self.alu(AluOp::Sar, Ty::I64, v, Val::Imm(63));
        self.write_reg(to, v);
    }

    fn movbe(&mut self) {
        let bytes = self.bytes(0);
        let a = self.read(1, bytes);
        let swapped = if bytes == 8 { self.un(UnOp::Bswap, Ty::I64, a) } else { self.un(UnOp::Bswap, Ty::U32, a) };
        let v = if bytes == 2 { self.alu(AluOp::Shr, Ty::U32, swapped, Val::Imm(16)) } else { swapped };
        self.write(0, bytes, v);
    }

    fn conditional(&mut self) -> Option<Flow> {
        let cond = condition(self.insn.condition_code())?;
        let m = self.insn.mnemonic();
        if self.insn.is_jcc_short_or_near() {
            return None;
        }
        let code = self.insn.code();
        if code.is_jcc_short_or_near() || code.is_loopcc() || code.is_loop() {
            return None;
        }
        if is_cmov(m) {
            let bytes = self.bytes(0);
            let a = self.read(1, bytes);
            let d = gpr(self.insn.op_register(0));
            self.op(Op::CMovF { cond, size: size(bytes), d, a });
            return Some(Flow::Next);
        }
        if !is_setcc(m) {
            return None;
        }
        if !self.is_memory(0) && !is_high(self.insn.op_register(0)) {
            self.op(Op::SetCondF { cond, d: gpr(self.insn.op_register(0)) });
            return Some(Flow::Next);
        }
        let d = self.temp();
        self.op(Op::Un { op: UnOp::Mov, ty: Ty::I64, d, a: Val::Imm(0) });
        self.op(Op::SetCondF { cond, d });
        self.write(0, 1, Val::Slot(d));
        Some(Flow::Next)
    }

    /// Bytes that PUSH, POP, CALL and the like move.
    pub(crate) fn stack_item(&self) -> u32 {
        let bytes = self.insn.stack_pointer_increment().unsigned_abs();
        match bytes {
            2 | 4 | 8 => bytes,
            _ => self.bits / 8,
        }
    }

    /// Stores below the stack pointer, then moves it.
    pub(crate) fn push(&mut self, bytes: u32, a: Val) {
        self.push_into(bytes, a, bytes);
    }

    /// Pushes `written` bytes of `a` into an item of `bytes`.
    fn push_into(&mut self, bytes: u32, a: Val, written: u32) {
        let sp = Slot(RSP as u8);
        if let Some((_, ty)) = self.plain_stack() {
            self.op(Op::Store { src: a, base: Val::Slot(sp), off: -(bytes as i32), size: size(written) });
            return self.op(Op::Alu { op: AluOp::Add, ty, d: sp, a: Val::Slot(sp), b: Val::Imm(-i64::from(bytes)) });
        }
        let new = self.temp();
        self.op(Op::Lea {
            d: new,
            base: Val::Slot(sp),
            index: Val::Imm(0),
            shift: 0,
            disp: -(bytes as i32),
            size: size(self.stack),
        });
        let mem = self.linear(SS, Val::Slot(new), written, true);
        self.store(mem, written, a);
        self.set_sp(Val::Slot(new));
    }

    /// What is on the stack `skip` bytes above the stack pointer.
    pub(crate) fn peek(&mut self, bytes: u32) -> Val {
        let mem = if self.plain_stack().is_some() {
            Mem { base: Val::Slot(Slot(RSP as u8)), off: 0 }
        } else {
            self.stack_memory(bytes)
        };
        self.load(mem, bytes)
    }

    fn stack_memory(&mut self, bytes: u32) -> Mem {
        let sp = Val::Slot(Slot(RSP as u8));
        let offset = match self.stack {
            8 => sp,
            4 => self.un(UnOp::ZextW, Ty::I64, sp),
            _ => self.un(UnOp::ZextH, Ty::I64, sp),
        };
        self.linear(SS, offset, bytes, false)
    }

    /// Moves the stack pointer up.
    pub(crate) fn release(&mut self, bytes: i64) {
        let sp = Slot(RSP as u8);
        if self.stack >= 4 {
            let ty = if self.stack == 8 { Ty::I64 } else { Ty::U32 };
            return self.op(Op::Alu { op: AluOp::Add, ty, d: sp, a: Val::Slot(sp), b: Val::Imm(bytes) });
        }
        let new = self.alu(AluOp::Add, Ty::U32, Val::Slot(sp), Val::Imm(bytes));
        self.set_sp(new);
    }

    fn set_sp(&mut self, a: Val) {
        let d = Slot(RSP as u8);
        if self.stack == 8 {
            self.op(Op::Un { op: UnOp::Mov, ty: Ty::I64, d, a });
        } else if self.stack == 2 {
            self.op(Op::SetPart { d, size: Size::B2, a });
        } else {
            self.op(Op::Un { op: UnOp::ZextW, ty: Ty::I64, d, a });
        }
    }

    fn push_operand(&mut self) -> Option<Flow> {
        let bytes = self.stack_item();
        if self.insn.op_kind(0) == OpKind::Register && self.insn.op_register(0).is_segment_register() {
            let a = self.selector(self.insn.op_register(0));
            self.push_into(bytes, a, selector_bytes(bytes, self.amd));
            return Some(Flow::Next);
        }
        let a = match self.insn.op_kind(0) {
            // SP is pushed as it was.
            OpKind::Register => self.read_reg(self.insn.op_register(0)),
            OpKind::Memory => self.read(0, bytes),
            _ => self.immediate(0, bytes),
        };
        self.push(bytes, a);
        Some(Flow::Next)
    }

    fn pop_operand(&mut self) -> Option<Flow> {
        if self.insn.op_kind(0) != OpKind::Register || self.insn.op_register(0).is_segment_register() {
            return None;
        }
        let bytes = self.stack_item();
        let to = self.insn.op_register(0);
        if let Some((whole, _)) = self.plain_stack()
            && whole == size(bytes)
            && gpr(to) != Slot(RSP as u8)
        {
            let base = Val::Slot(Slot(RSP as u8));
            self.op(Op::Load { d: gpr(to), base, off: 0, size: whole, ext: Ext::Zero });
            self.release(bytes.into());
            return Some(Flow::Next);
        }
        let a = self.peek(bytes);
        self.release(i64::from(bytes));
        self.write_reg(to, a);
        Some(Flow::Next)
    }

    fn leave(&mut self) -> Option<Flow> {
        let (_, ty) = self.plain_stack()?;
        let bytes = match (self.insn.code(), ty) {
            (Code::Leaveq, Ty::I64) => 8,
            (Code::Leaved, Ty::U32) => 4,
            _ => return None,
        };
        let (sp, bp) = (Slot(RSP as u8), Slot(RBP as u8));
        let a = self.load(Mem { base: Val::Slot(bp), off: 0 }, bytes);
        self.op(Op::Alu { op: AluOp::Add, ty, d: sp, a: Val::Slot(bp), b: Val::Imm(bytes.into()) });
        self.op(Op::Un { op: UnOp::Mov, ty: Ty::I64, d: bp, a });
        Some(Flow::Next)
    }

    fn pushf(&mut self) -> Option<Flow> {
        if self.real {
            return None;
        }
        let bytes = self.stack_item();
        let system = self.temp();
        self.op(Op::LoadEnv { d: system, off: offset_of!(State, flags) as i32, size: Size::B8, ext: Ext::Zero });
        let shown = !(RFLAGS_RF | RFLAGS_VM);
        let system = self.alu(AluOp::And, Ty::I64, Val::Slot(system), Val::Imm(shown as i64));
        let d = self.temp();
        self.op(Op::GetFlags { d });
        let all = self.alu(AluOp::Or, Ty::I64, Val::Slot(d), system);
        let all = self.alu(AluOp::Or, Ty::I64, all, Val::Imm(2));
        self.push(bytes, all);
        Some(Flow::Next)
    }

    fn direction(&mut self) {
        let off = offset_of!(State, flags) as i32;
        let d = self.temp();
        self.op(Op::LoadEnv { d, off, size: Size::B8, ext: Ext::Zero });
        let v = if self.insn.mnemonic() == Mnemonic::Std {
            self.alu(AluOp::Or, Ty::I64, Val::Slot(d), Val::Imm(RFLAGS_DF as i64))
        } else {
            self.alu(AluOp::And, Ty::I64, Val::Slot(d), Val::Imm(!RFLAGS_DF as i64))
        };
        self.op(Op::StoreEnv { src: v, off, size: Size::B8 });
    }
}

pub(super) fn is_cmov(m: Mnemonic) -> bool {
    use Mnemonic::*;
    matches!(
        m,
        Cmova
            | Cmovae
            | Cmovb
            | Cmovbe
            | Cmove
            | Cmovg
            | Cmovge
            | Cmovl
            | Cmovle
            | Cmovne
            | Cmovno
            | Cmovnp
            | Cmovns
            | Cmovo
            | Cmovp
            | Cmovs
    )
}

pub(super) fn is_setcc(m: Mnemonic) -> bool {
    use Mnemonic::*;
    matches!(
        m,
        Seta | Setae
            | Setb
            | Setbe
            | Sete
            | Setg
            | Setge
            | Setl
            | Setle
            | Setne
            | Setno
            | Setnp
            | Setns
            | Seto
            | Setp
            | Sets
    )
}
