//! Operands: registers and their parts, immediates, memory.

use iced_x86::{Instruction, OpKind, Register};
use mimus_tcg_ir::{AluOp, CallKind, Ext, Op, PagePc, Size, Slot, Ty, UnOp, Val};

use super::{BASE0, Tr, size};
use crate::helper_ids::{LINEAR, segment_access};
use crate::state::{CS, DS, ES, FS, GS, SS, sext};

/// A memory operand: for `Load` and `Store`.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Mem {
    pub base: Val,
    pub off: i32,
}

/// Number of a segment register.
pub(crate) fn segment(r: Register) -> usize {
    match r {
        Register::ES => ES,
        Register::CS => CS,
        Register::SS => SS,
        Register::FS => FS,
        Register::GS => GS,
        _ => DS,
    }
}

/// The segment of an instruction's memory operand; `long`: in 64-bit mode, where overrides other than FS and GS mean
/// nothing.
pub(crate) fn segment_of(insn: &Instruction, long: bool) -> usize {
    let seg = segment(insn.memory_segment());
    if !long || seg == FS || seg == GS {
        return seg;
    }
    match insn.memory_base() {
        Register::RSP | Register::ESP | Register::RBP | Register::EBP => SS,
        _ => DS,
    }
}

/// Slot of a general register.
pub(crate) fn gpr(r: Register) -> Slot {
    Slot(r.full_register().number() as u8)
}

pub(crate) fn is_high(r: Register) -> bool {
    matches!(r, Register::AH | Register::CH | Register::DH | Register::BH)
}

/// Slot of the register that a high byte is in.
fn high_slot(r: Register) -> Slot {
    Slot(match r {
        Register::AH => 0,
        Register::CH => 1,
        Register::DH => 2,
        _ => 3,
    })
}

impl Tr<'_> {
    pub(crate) fn is_memory(&self, i: u32) -> bool {
        self.insn.op_kind(i) == OpKind::Memory
    }

    /// Bytes of an operand.
    pub(crate) fn bytes(&self, i: u32) -> u32 {
        match self.insn.op_kind(i) {
            OpKind::Register => self.insn.op_register(i).size() as u32,
            OpKind::Memory => self.insn.memory_size().size() as u32,
            _ => self.bytes(0),
        }
    }

    pub(crate) fn un(&mut self, op: UnOp, ty: Ty, a: Val) -> Val {
        let d = self.temp();
        self.op(Op::Un { op, ty, d, a });
        Val::Slot(d)
    }

    pub(crate) fn alu(&mut self, op: AluOp, ty: Ty, a: Val, b: Val) -> Val {
        let d = self.temp();
        self.op(Op::Alu { op, ty, d, a, b });
        Val::Slot(d)
    }

    /// A general register, of which the low bits count; a high byte is extracted.
    pub(crate) fn read_reg(&mut self, r: Register) -> Val {
        if is_high(r) {
            let d = self.temp();
            self.op(Op::GetHigh { d, a: high_slot(r) });
            return Val::Slot(d);
        }
        Val::Slot(gpr(r))
    }

    /// Writes a general register as x86 does: 32 bits clear the upper half, fewer leave the rest.
    pub(crate) fn write_reg(&mut self, r: Register, a: Val) {
        if is_high(r) {
            return self.op(Op::SetHigh { d: high_slot(r), a });
        }
        let d = gpr(r);
        match r.size() {
            1 => self.op(Op::SetPart { d, size: Size::B1, a }),
            2 => self.op(Op::SetPart { d, size: Size::B2, a }),
            4 => self.op(Op::Un { op: UnOp::ZextW, ty: Ty::I64, d, a }),
            _ => self.op(Op::Un { op: UnOp::Mov, ty: Ty::I64, d, a }),
        }
    }

    /// An immediate, sign-extended from `bytes`.
    pub(crate) fn immediate(&self, i: u32, bytes: u32) -> Val {
        Val::Imm(sext(self.insn.immediate(i), bytes) as i64)
    }

    /// An operand's value: loaded, if it is memory.
    pub(crate) fn read(&mut self, i: u32, bytes: u32) -> Val {
        match self.insn.op_kind(i) {
            OpKind::Register => self.read_reg(self.insn.op_register(i)),
            OpKind::Memory => {
                let mem = self.memory(bytes, false);
                self.load(mem, bytes)
            }
            _ => self.immediate(i, bytes),
        }
    }

    /// Writes an operand; memory is stored to.
    pub(crate) fn write(&mut self, i: u32, bytes: u32, a: Val) {
        if self.is_memory(i) {
            let mem = self.memory(bytes, true);
            return self.store(mem, bytes, a);
        }
        self.write_reg(self.insn.op_register(i), a);
    }

    pub(crate) fn load(&mut self, mem: Mem, bytes: u32) -> Val {
        let d = self.temp();
        self.op(Op::Load { d, base: mem.base, off: mem.off, size: size(bytes), ext: Ext::Zero });
        Val::Slot(d)
    }

    pub(crate) fn store(&mut self, mem: Mem, bytes: u32, src: Val) {
        self.op(Op::Store { src, base: mem.base, off: mem.off, size: size(bytes) });
    }

    /// Bytes of addresses in this instruction.
    pub(crate) fn address_bytes(&self) -> u32 {
        let insn = &self.insn;
        let base = if insn.memory_base() != Register::None { insn.memory_base() } else { insn.memory_index() };
        match base {
            Register::None if insn.memory_displ_size() == 8 => 8,
            // A displacement alone: the prefix decides, which the decoder shows by its size.
            Register::None => match (self.bits, insn.memory_displ_size()) {
                (64, _) => 8,
                (_, 2) => 2,
                _ => 4,
            },
            Register::EIP => 4,
            Register::RIP => 8,
            r => r.size() as u32,
        }
    }

    /// The offset of the memory operand in its segment.
    pub(crate) fn offset(&mut self) -> Val {
        let insn = self.insn;
        let bytes = self.address_bytes();
        if insn.is_ip_rel_memory_operand() {
            let d = self.temp();
            // The decoder was told the offset in the page as the address.
            let target = insn.memory_displacement64() as i64;
            let near = i32::try_from(target).unwrap_or(0);
            self.op(Op::GetPc { d, pc: PagePc(near) });
            let mut value = Val::Slot(d);
            if i64::from(near) != target {
                value = self.alu(AluOp::Add, Ty::I64, value, Val::Imm(target));
            }
            if bytes == 4 {
                value = self.un(UnOp::ZextW, Ty::I64, value);
            }
            return value;
        }
        let disp = insn.memory_displacement64() as i64;
        let base = if insn.memory_base() == Register::None { Val::Imm(0) } else { Val::Slot(gpr(insn.memory_base())) };
        let index = match insn.memory_index() {
            Register::None => Val::Imm(0),
            // XLATB
            Register::AL => self.alu(AluOp::And, Ty::I64, Val::Slot(gpr(Register::AL)), Val::Imm(0xff)),
            r => Val::Slot(gpr(r)),
        };
        if base == Val::Imm(0) && index == Val::Imm(0) {
            let disp = disp as u64 & crate::state::mask(bytes);
            return Val::Imm(disp as i64);
        }
        let shift = insn.memory_index_scale().trailing_zeros() as u8;
        let d = self.temp();
        self.op(Op::Lea { d, base, index, shift, disp: disp as i32, size: size(bytes) });
        Val::Slot(d)
    }

    /// Whether the memory operand is in a segment with a base, or in code, which cannot be written.
    pub(crate) fn is_based(&self) -> bool {
        matches!(segment(self.insn.memory_segment()), FS | GS | CS)
    }

    /// The memory operand of an access of `bytes`, checked where segments are not flat.
    pub(crate) fn memory(&mut self, bytes: u32, write: bool) -> Mem {
        let seg = segment_of(self.insn, self.bits == 64);
        let simple = self.is_plain()
            && seg != FS
            && seg != GS
            && (self.bits == 64 || !write || seg != CS)
            && self.address_bytes() == if self.bits == 64 { 8 } else { 4 }
            && self.insn.memory_index() == Register::None
            && self.insn.memory_base() != Register::None
            && !self.insn.is_ip_rel_memory_operand();
        if simple {
            let base = Val::Slot(gpr(self.insn.memory_base()));
            return Mem { base, off: self.insn.memory_displacement64() as i32 };
        }
        let offset = self.offset();
        self.linear(seg, offset, bytes, write)
    }

    /// The linear address of an offset.
    pub(crate) fn linear(&mut self, seg: usize, offset: Val, bytes: u32, write: bool) -> Mem {
        let based = seg == FS || seg == GS;
        if self.aligned && bytes > 1 {
            return self.checked(seg, offset, bytes, write);
        }
        if self.bits == 64 {
            if !based {
                return Mem { base: offset, off: 0 };
            }
            let base = self.alu(AluOp::Add, Ty::I64, offset, Val::Slot(Slot(BASE0 + seg as u8)));
            return Mem { base, off: 0 };
        }
        // Code cannot be written, however flat its segment is.
        if self.flat && !based && !(write && seg == CS) {
            return Mem { base: offset, off: 0 };
        }
        if based && self.based[seg - FS] {
            let base = self.alu(AluOp::Add, Ty::U32, offset, Val::Slot(Slot(BASE0 + seg as u8)));
            return Mem { base, off: 0 };
        }
        self.checked(seg, offset, bytes, write)
    }

    /// The linear address of an offset, its segment and alignment checked.
    fn checked(&mut self, seg: usize, offset: Val, bytes: u32, write: bool) -> Mem {
        let d = self.temp();
        self.op(Op::Call {
            helper: LINEAR,
            kind: CallKind::MayExit,
            ret: Some(d),
            args: [Val::Imm(segment_access(seg, bytes, write)), offset, Val::Imm(0)],
        });
        Mem { base: Val::Slot(d), off: 0 }
    }
}
