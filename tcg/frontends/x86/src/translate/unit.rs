//! Vector, x87 and MMX instructions: taken apart for [`Op::Unit`], which executes them as they are.
//!
//! A guard comes before the first of a block, and after each call: it finds out whether the unit may be used, and
//! whether an exception may come up; then the helper executes the instruction, in careful mode. Left to the helper, too:
//! control words and images, instructions with implied general registers, gathers and masked moves, memory operands in
//! segments that have to be looked at.

use std::mem::offset_of;

use iced_x86::{
    Code, EncodingKind, Instruction, MandatoryPrefix, Mnemonic, OpCodeOperandKind, OpCodeTableKind, OpKind, Register,
    RflagsBits,
};
use mimus_tcg_ir::flags::Flags;
use mimus_tcg_ir::unit::{UnitGpr, UnitInsn, UnitMemory};
use mimus_tcg_ir::{Op, Slot, Val};

use super::operands::{Mem, gpr};
use super::{Flow, Tr};
use crate::exec::is_native;
use crate::native::{Unit, needs_alignment, unit_of, uses_mmx, uses_mxcsr};
use crate::state::{GUARD_AVX, GUARD_MXCSR, GUARD_SSE, GUARD_X87, State};

/// An instruction, its result's register and its general-register operand.
struct Taken {
    insn: UnitInsn,
    d: Option<Slot>,
    a: Option<Slot>,
    guards: u8,
}

impl Tr<'_> {
    /// Instructions of the vector, x87 and MMX units; `None` if it is something else, or the helper's.
    pub(crate) fn unit(&mut self) -> Option<Flow> {
        if self.careful || !self.flat || self.real || self.aligned {
            return None;
        }
        match self.insn.mnemonic() {
            // Nothing waits if every exception is masked.
            Mnemonic::Wait => {
                self.guard(GUARD_X87);
                return Some(Flow::Next);
            }
            Mnemonic::Fldcw => return self.load_control(),
            _ => {}
        }
        let taken = taken_apart(self.insn)?;
        // With Intel's processors its flags come before a fault of its store: the helper knows.
        if self.insn.mnemonic() == Mnemonic::Vcvtps2ph && taken.insn.memory == UnitMemory::Store && !self.amd {
            return None;
        }
        let memory = taken.insn.memory != UnitMemory::None;
        if memory && self.is_checked() {
            return None;
        }
        self.guard(taken.guards);
        let Mem { base, off } = if memory {
            self.memory(taken.insn.bytes.into(), taken.insn.memory == UnitMemory::Store)
        } else {
            Mem { base: taken.a.map_or(Val::Imm(0), Val::Slot), off: 0 }
        };
        self.op(Op::Unit { insn: taken.insn, d: taken.d, a: base, off });
        Some(Flow::Next)
    }

    /// Whether the memory operand's address takes a call.
    fn is_checked(&self) -> bool {
        self.bits != 64 && self.is_based()
    }

    /// Leaves to careful mode unless what the guards stand for is as it usually is.
    fn guard(&mut self, mask: u8) {
        if self.guards & mask != mask {
            self.guards |= mask;
            self.op(Op::GuardEnv { off: offset_of!(State, guards) as i32, mask });
        }
    }

    fn load_control(&mut self) -> Option<Flow> {
        if self.is_checked() {
            return None;
        }
        self.guard(GUARD_X87);
        let value = self.read(0, 2);
        self.op(Op::Call {
            helper: crate::helper_ids::FLDCW,
            kind: mimus_tcg_ir::CallKind::MayExit,
            ret: None,
            args: [value, Val::Imm(0), Val::Imm(0)],
        });
        Some(Flow::Next)
    }
}

/// Takes an instruction apart; `None` if it is none of the units', or has operands that are not in its encoding.
fn taken_apart(insn: &Instruction) -> Option<Taken> {
    let unit = match insn.mnemonic() {
        Mnemonic::Fnstsw if insn.op_kind(0) == OpKind::Register => return Some(status_to_ax()),
        Mnemonic::Fnstsw | Mnemonic::Fnstcw => Unit::X87,
        // Outside of 64-bit mode these know of eight registers.
        Mnemonic::Vzeroupper | Mnemonic::Vzeroall if insn.code_size() != iced_x86::CodeSize::Code64 => return None,
        m if implies_more(m) || insn.is_vsib() || !is_native(insn) => return None,
        _ => unit_of(insn),
    };
    let mut guards = match unit {
        Unit::Integer => return None,
        Unit::X87 | Unit::Mmx => GUARD_X87,
        Unit::Sse if uses_mmx(insn) => GUARD_SSE | GUARD_X87,
        Unit::Sse => GUARD_SSE,
        Unit::Avx => GUARD_AVX,
    };
    if uses_mxcsr(insn, unit) {
        guards |= GUARD_MXCSR | if unit == Unit::Mmx { GUARD_SSE } else { 0 };
    }
    let mut taken = Taken { insn: opcode(insn)?, d: None, a: None, guards };
    for i in 0..insn.op_count() {
        operand(insn, i, &mut taken)?;
    }
    flags(insn, &mut taken.insn)?;
    Some(taken)
}

/// FNSTSW AX
fn status_to_ax() -> Taken {
    let insn = UnitInsn { opcode: 0xdf, reg: 4, gpr: UnitGpr::OutAx, ..UnitInsn::default() };
    Taken { insn, d: Some(gpr(Register::AX)), a: None, guards: GUARD_X87 }
}

/// Instructions with operands that their encoding does not name, or with memory operands of which they may leave out
/// parts.
fn implies_more(m: Mnemonic) -> bool {
    use Mnemonic::*;
    matches!(
        m,
        Pcmpestri
            | Pcmpestri64
            | Pcmpestrm
            | Pcmpestrm64
            | Pcmpistri
            | Pcmpistrm
            | Vpcmpestri
            | Vpcmpestri64
            | Vpcmpestrm
            | Vpcmpestrm64
            | Vpcmpistri
            | Vpcmpistrm
            | Maskmovq
            | Maskmovdqu
            | Vmaskmovdqu
            | Vmaskmovps
            | Vmaskmovpd
            | Vpmaskmovd
            | Vpmaskmovq
    )
}

fn opcode(insn: &Instruction) -> Option<UnitInsn> {
    let code = insn.op_code();
    let vex = match code.encoding() {
        EncodingKind::Legacy => false,
        EncodingKind::VEX => true,
        _ => return None,
    };
    let map = match code.table() {
        OpCodeTableKind::Normal => 0,
        OpCodeTableKind::T0F => 1,
        OpCodeTableKind::T0F38 => 2,
        OpCodeTableKind::T0F3A => 3,
        _ => return None,
    };
    let prefix = match code.mandatory_prefix() {
        MandatoryPrefix::None | MandatoryPrefix::PNP => 0,
        MandatoryPrefix::P66 => 1,
        MandatoryPrefix::PF3 => 2,
        MandatoryPrefix::PF2 => 3,
    };
    let mut unit = UnitInsn {
        map,
        prefix,
        opcode: code.op_code() as u8,
        vex,
        w: if vex { code.w() == 1 } else { code.operand_size() == 64 },
        wide: vex && code.l() == 1,
        bare: matches!(insn.code(), Code::Emms | Code::VEX_Vzeroupper | Code::VEX_Vzeroall),
        reg: code.group_index().max(0) as u8,
        ..UnitInsn::default()
    };
    if code.op_code_len() == 2 {
        // The second byte is a ModRM byte of two registers.
        unit.opcode = (code.op_code() >> 8) as u8;
        unit.reg = code.op_code() as u8 >> 3 & 7;
        unit.rm = code.op_code() as u8 & 7;
    }
    Some(unit)
}

/// Puts operand `i` where the encoding has it.
fn operand(insn: &Instruction, i: u32, taken: &mut Taken) -> Option<()> {
    use OpCodeOperandKind as K;
    let unit = &mut taken.insn;
    if insn.op_kind(i) == OpKind::Memory {
        unit.memory = if i == 0 && stores(insn.mnemonic()) { UnitMemory::Store } else { UnitMemory::Load };
        unit.bytes = u8::try_from(insn.memory_size().size()).ok().filter(|n| (1..=32).contains(n))?;
        unit.aligned = needs_alignment(insn);
        return Some(());
    }
    let register = insn.op_register(i);
    let number = register.number() as u8;
    match insn.op_code().op_kind(i) {
        K::xmm_reg | K::ymm_reg | K::mm_reg => unit.reg = number,
        K::xmm_rm | K::ymm_rm | K::mm_rm | K::xmm_or_mem | K::ymm_or_mem | K::mm_or_mem => unit.rm = number,
        K::xmm_vvvv | K::ymm_vvvv => unit.v = number,
        K::xmm_is4 | K::ymm_is4 => unit.imm = Some(number << 4),
        K::imm8 => unit.imm = Some(insn.immediate(i) as u8),
        K::sti_opcode => unit.rm += number,
        // The top of the stack, and XMM0, are implied.
        K::st0 => {}
        _ if register == Register::XMM0 => {}
        K::r32_reg | K::r64_reg if i == 0 => {
            unit.gpr = UnitGpr::OutReg;
            taken.d = Some(gpr(register));
        }
        K::r32_or_mem | K::r64_or_mem if i == 0 => {
            unit.gpr = UnitGpr::OutRm;
            taken.d = Some(gpr(register));
        }
        K::r32_or_mem | K::r64_or_mem => {
            unit.gpr = UnitGpr::InRm;
            taken.a = Some(gpr(register));
        }
        _ => return None,
    }
    Some(())
}

/// Whether an instruction's first operand, if it is memory, is stored to. (No instruction both loads and stores.)
fn stores(m: Mnemonic) -> bool {
    use Mnemonic::*;
    !matches!(
        m,
        Fld | Fild
            | Fbld
            | Fadd
            | Fmul
            | Fcom
            | Fcomp
            | Fsub
            | Fsubr
            | Fdiv
            | Fdivr
            | Fiadd
            | Fimul
            | Ficom
            | Ficomp
            | Fisub
            | Fisubr
            | Fidiv
            | Fidivr
    )
}

/// All flags are set, or some are tested, or none of it.
fn flags(insn: &Instruction, unit: &mut UnitInsn) -> Option<()> {
    const ALL: u32 =
        RflagsBits::CF | RflagsBits::PF | RflagsBits::AF | RflagsBits::ZF | RflagsBits::SF | RflagsBits::OF;
    let modified = insn.rflags_modified() & ALL;
    if modified != 0 && modified != ALL {
        return None;
    }
    unit.sets_flags = modified != 0;
    for (bit, flag) in [(RflagsBits::CF, Flags::CF), (RflagsBits::PF, Flags::PF), (RflagsBits::ZF, Flags::ZF)] {
        if insn.rflags_read() & bit != 0 {
            unit.reads_flags = unit.reads_flags.union(flag);
        }
    }
    Some(())
}
