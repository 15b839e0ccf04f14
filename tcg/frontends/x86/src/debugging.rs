//! Debug exceptions: breakpoints of instructions, data and ports, and single steps.
//!
//! While one of them is on, instructions are executed one by one. What an instruction is going to access is found out
//! before it, from its operands.
//!
//! Spec: SDM volume 3 sections 18.2 (debug registers) and 18.3.1 (debug exceptions). Left out: data breakpoints on
//! what gathers, BT with a register, and the delivery of exceptions access.

use iced_x86::{Instruction, InstructionInfoFactory, Mnemonic, OpAccess, OpKind, Register};
use mimus_arch::x86::regs::*;

use crate::blame::instruction;
use crate::exception::Exception;
use crate::frontend::{X86Cpu, raise};
use crate::host::Host;
use crate::state::{SS, State};
use crate::translate::segment_number;

/// What a breakpoint is of: R/W in DR7.
const WRITE: u64 = 1;
const PORT: u64 = 2;
const READ_WRITE: u64 = 3;
/// DR6: a single step.
const BS: u64 = 1 << 14;

/// Whether instructions are executed one by one.
pub(crate) fn steps(st: &State) -> bool {
    st.flags & RFLAGS_TF != 0 || st.dr7 & 0xff != 0
}

/// Breakpoints that are on, of these kinds: number, first address and bytes.
fn enabled(st: &State, kinds: &'static [u64]) -> impl Iterator<Item = (usize, u64, u64)> {
    (0..4).filter_map(move |n| {
        let on = st.dr7 >> (2 * n) & 3 != 0 && kinds.contains(&(st.dr7 >> (16 + 4 * n) & 3));
        let bytes = [1, 2, 8, 4][(st.dr7 >> (18 + 4 * n) & 3) as usize];
        on.then_some((n, st.dr[n] & !(bytes - 1), bytes))
    })
}

/// The DR6 bits of instruction breakpoints at `pc`.
fn breakpoints(st: &State, pc: u64) -> u64 {
    (0..4)
        .filter(|&n| st.dr7 >> (2 * n) & 3 != 0 && st.dr7 >> (16 + 4 * n) & 15 == 0 && st.dr[n] == pc)
        .fold(0, |bits, n| bits | 1 << n)
}

/// The DR6 bits of breakpoints that `bytes` from `at` on hit.
fn overlapping(st: &State, kinds: &'static [u64], at: u64, bytes: u64) -> u64 {
    enabled(st, kinds)
        .filter(|&(_, first, len)| first < at.wrapping_add(bytes) && at < first.wrapping_add(len))
        .fold(0, |bits, (n, ..)| bits | 1 << n)
}

/// The DR6 bits of what an instruction is going to access.
fn accesses(cpu: &X86Cpu, insn: &Instruction) -> u64 {
    let st = &cpu.guest.st;
    if enabled(st, &[WRITE, PORT, READ_WRITE]).next().is_none() {
        return 0;
    }
    let repeated = insn.is_string_instruction() && (insn.has_rep_prefix() || insn.has_repne_prefix());
    if repeated && register(cpu, counter(insn)) == Some(0) {
        return 0;
    }
    let mut hits = 0;
    for m in InstructionInfoFactory::new().info(insn).used_memory() {
        let Some(va) = m.virtual_address(0, |r, _, _| register(cpu, r)) else { continue };
        let kinds: &'static [u64] = match m.access() {
            OpAccess::None | OpAccess::NoMemAccess => continue,
            OpAccess::Read | OpAccess::CondRead => &[READ_WRITE],
            _ => &[WRITE, READ_WRITE],
        };
        hits |= overlapping(st, kinds, cpu.wrap(va), m.memory_size().size().max(1) as u64);
    }
    if st.cr4 & CR4_DE != 0
        && let Some((port, bytes)) = port(cpu, insn)
    {
        hits |= overlapping(st, &[PORT], port, bytes);
    }
    hits
}

/// The counter register of a repeated instruction.
fn counter(insn: &Instruction) -> Register {
    let wide = |i: u32| match insn.op_kind(i) {
        OpKind::MemorySegRSI | OpKind::MemorySegRDI | OpKind::MemoryESRDI => Some(Register::RCX),
        OpKind::MemorySegESI | OpKind::MemorySegEDI | OpKind::MemoryESEDI => Some(Register::ECX),
        OpKind::MemorySegSI | OpKind::MemorySegDI | OpKind::MemoryESDI => Some(Register::CX),
        _ => None,
    };
    (0..insn.op_count()).find_map(wide).unwrap_or(Register::RCX)
}

/// The value of a register of an address: of a segment, its base.
fn register(cpu: &X86Cpu, r: Register) -> Option<u64> {
    let st = &cpu.guest.st;
    if r.is_segment_register() {
        let unused = st.is_64bit() && !matches!(r, Register::FS | Register::GS);
        return Some(if unused { 0 } else { st.seg[segment_number(r)].base });
    }
    if !r.is_gpr() {
        return None;
    }
    let value = cpu.gpr(r.full_register().number());
    Some(value & crate::state::mask(r.size() as u32))
}

/// The port that an instruction accesses, and how many bytes.
fn port(cpu: &X86Cpu, insn: &Instruction) -> Option<(u64, u64)> {
    use Mnemonic as M;
    let dx = cpu.gpr(RDX) & 0xffff;
    let named = |i: u32| if insn.op_kind(i) == OpKind::Register { dx } else { u64::from(insn.immediate8()) };
    Some(match insn.mnemonic() {
        M::In => (named(1), insn.op_register(0).size() as u64),
        M::Out => (named(0), insn.op_register(1).size() as u64),
        M::Insb | M::Outsb => (dx, 1),
        M::Insw | M::Outsw => (dx, 2),
        M::Insd | M::Outsd => (dx, 4),
        _ => return None,
    })
}

/// MOV and POP to SS hold debug exceptions back until after the next instruction (SDM section 7.8.3).
fn loads_ss(insn: &Instruction) -> bool {
    matches!(insn.mnemonic(), Mnemonic::Mov | Mnemonic::Pop)
        && insn.op_kind(0) == OpKind::Register
        && insn.op_register(0).is_segment_register()
        && segment_number(insn.op_register(0)) == SS
}

/// Instructions whose entry of a handler is their completion, not a fault.
fn enters_by_itself(insn: &Instruction) -> bool {
    use Mnemonic as M;
    matches!(insn.mnemonic(), M::Int | M::Int1 | M::Int3 | M::Into | M::Syscall | M::Sysenter)
}

/// Executes one instruction, with the debug exceptions around it.
pub(crate) fn step(cpu: &mut X86Cpu) {
    let pc = cpu.head.pc;
    let st = &cpu.guest.st;
    let hit = breakpoints(st, pc);
    if hit != 0 && st.flags & RFLAGS_RF == 0 {
        raise(cpu, Exception { vector: VECTOR_DB, error: None, payload: hit }, pc);
        cpu.head.exit_request = 0;
        return;
    }
    let trap = st.flags & RFLAGS_TF != 0;
    let (before, cpl) = (cpu.guest.deliveries, st.cpl);
    let insn = instruction(cpu, pc);
    let accessed = insn.as_ref().map_or(0, |i| accesses(cpu, i));
    cpu.step_careful();
    if cpu.hit_abandoned() {
        return;
    }
    // An IRET has set what is to be there for the instruction it returns to.
    if !insn.is_some_and(|i| matches!(i.mnemonic(), Mnemonic::Iret | Mnemonic::Iretd | Mnemonic::Iretq)) {
        cpu.guest.st.flags &= !RFLAGS_RF;
    }
    let held = u64::from(std::mem::take(&mut cpu.guest.st.held_breakpoints));
    if insn.is_some_and(|i| loads_ss(&i)) && cpu.guest.deliveries == before {
        cpu.guest.st.held_breakpoints = (held | accessed) as u8 & 0xf;
        return;
    }
    let entered = cpl == 3 && cpu.guest.st.cpl == 0;
    let payload = if cpu.guest.deliveries == before && !entered {
        held | accessed | if trap { BS } else { 0 }
    } else if insn.is_some_and(|i| enters_by_itself(&i)) {
        // What was held back comes as soon as the handler is entered, before its first instruction.
        held
    } else {
        0
    };
    if payload != 0 {
        let pc = cpu.head.pc;
        raise(cpu, Exception { vector: VECTOR_DB, error: None, payload }, pc);
        cpu.head.exit_request = 0;
    }
}
