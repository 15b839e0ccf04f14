//! Debug exceptions: breakpoints of instructions, data and ports, and single steps.
//!
//! While one of them is on, instructions are executed one by one. What an instruction is going to access is found out
//! before it, from its operands.
//!
//! Spec: SDM volume 3 sections 18.2 (debug registers) and 18.3.1 (debug exceptions), 7.8.3 (loads of SS). Left out: data
//! breakpoints on what the delivery of exceptions accesses.
//! Of 18.4.3 (steps from branch to branch) what an exception or interrupt leads to is no branch: its delivery clears TF.

use iced_x86::{ConditionCode, FlowControl, Instruction, InstructionInfoFactory, Mnemonic, OpAccess, OpKind, Register};
use mimus_arch::x86::msr::DEBUGCTL_BTF;
use mimus_arch::x86::regs::*;

use crate::blame::instruction;
use crate::exception::Exception;
use crate::frontend::{X86Cpu, raise, resume_repeated, settle_resume_flag};
use crate::host::Host;
use crate::state::{SS, State};
use crate::translate::{count_bytes, segment_number};

/// What a breakpoint is of: R/W in DR7.
const WRITE: u64 = 1;
const PORT: u64 = 2;
const READ_WRITE: u64 = 3;
/// DR6: a single step.
pub(crate) const SINGLE_STEP: u64 = 1 << 14;

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

/// The DR6 bits of breakpoints that a load hits.
pub(crate) fn load_hits(st: &State, va: u64, bytes: u64) -> u64 {
    overlapping(st, &[READ_WRITE], va, bytes)
}

/// Whether an instruction is going to branch: what a step is to end at with DEBUGCTL.BTF (SDM section 18.4.3).
fn branches(cpu: &X86Cpu, insn: &Instruction) -> bool {
    match insn.flow_control() {
        FlowControl::ConditionalBranch => takes(cpu, insn),
        // Of those that are one-way; interrupts and exceptions are delivered.
        FlowControl::Next | FlowControl::Interrupt | FlowControl::Exception | FlowControl::XbeginXabortXend => false,
        FlowControl::UnconditionalBranch
        | FlowControl::IndirectBranch
        | FlowControl::Return
        | FlowControl::Call
        | FlowControl::IndirectCall => true,
    }
}

/// Whether a conditional branch is going to be taken.
fn takes(cpu: &X86Cpu, insn: &Instruction) -> bool {
    let flags = cpu.arith();
    let set = |flag: u64| flags & flag != 0;
    let count = cpu.gpr(RCX) & crate::state::mask(count_bytes(insn.code()));
    if insn.is_jcx_short() {
        return count == 0;
    }
    if insn.is_loop() || insn.is_loopcc() {
        let wanted = match insn.mnemonic() {
            Mnemonic::Loope => set(RFLAGS_ZF),
            Mnemonic::Loopne => !set(RFLAGS_ZF),
            _ => true,
        };
        return count != 1 && wanted;
    }
    let less = set(RFLAGS_SF) != set(RFLAGS_OF);
    match insn.condition_code() {
        ConditionCode::None => true,
        ConditionCode::o => set(RFLAGS_OF),
        ConditionCode::no => !set(RFLAGS_OF),
        ConditionCode::b => set(RFLAGS_CF),
        ConditionCode::ae => !set(RFLAGS_CF),
        ConditionCode::e => set(RFLAGS_ZF),
        ConditionCode::ne => !set(RFLAGS_ZF),
        ConditionCode::be => set(RFLAGS_CF | RFLAGS_ZF),
        ConditionCode::a => !set(RFLAGS_CF | RFLAGS_ZF),
        ConditionCode::s => set(RFLAGS_SF),
        ConditionCode::ns => !set(RFLAGS_SF),
        ConditionCode::p => set(RFLAGS_PF),
        ConditionCode::np => !set(RFLAGS_PF),
        ConditionCode::l => less,
        ConditionCode::ge => !less,
        ConditionCode::le => less || set(RFLAGS_ZF),
        ConditionCode::g => !(less || set(RFLAGS_ZF)),
    }
}

/// What is pending when an instruction faults behind loads that hit the breakpoints `hits`: it is told in place of the
/// fault, and the instruction goes on with RF set (SDM volume 2 "VPGATHERDD").
pub(crate) fn pending_in_between(cpu: &mut X86Cpu, pc: u64, hits: u64) -> Option<Exception> {
    let st = &mut cpu.guest.st;
    let steps = st.flags & RFLAGS_TF != 0 && st.msrs.debugctl & DEBUGCTL_BTF == 0;
    let payload = hits | if steps { SINGLE_STEP } else { 0 };
    if payload == 0 {
        return None;
    }
    st.flags |= RFLAGS_RF;
    st.resume_at = pc;
    Some(Exception { vector: VECTOR_DB, error: None, payload })
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
    if let Some(hits) = bit_string(cpu, insn) {
        return hits;
    }
    let mut hits = elements(cpu, insn);
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

/// The DR6 bits of the elements that a gather is going to load.
fn elements(cpu: &X86Cpu, insn: &Instruction) -> u64 {
    if !insn.is_vsib() {
        return 0;
    }
    let st = &cpu.guest.st;
    let bytes = insn.memory_size().element_size().clamp(4, 8);
    let count =
        insn.op_register(0).size().max(insn.memory_index().size()) / bytes.max(if insn.is_vsib64() { 8 } else { 4 });
    let mask = st.vec[insn.op_register(2).number() & 15];
    let part = |v: &[u64; 4], i: usize, bytes: usize| v[(i * bytes / 8) & 3] >> (8 * (i * bytes % 8));
    let wanted = (0..count).filter(|&i| part(&mask, i, bytes) >> (8 * bytes - 1) & 1 != 0);
    let address = |i: usize| {
        insn.virtual_address(1, i, |r, i, bytes| {
            if r.is_vector_register() {
                return Some(part(&st.vec[r.number() & 15], i, bytes));
            }
            register(cpu, r)
        })
    };
    wanted.filter_map(address).fold(0, |hits, va| hits | overlapping(st, &[READ_WRITE], cpu.wrap(va), bytes as u64))
}

/// Of BT with a register and memory, the DR6 bits of the word of the bit string that it is going to look at.
fn bit_string(cpu: &X86Cpu, insn: &Instruction) -> Option<u64> {
    use Mnemonic as M;
    let m = insn.mnemonic();
    let string = matches!(m, M::Bt | M::Bts | M::Btr | M::Btc)
        && insn.op_kind(0) == OpKind::Memory
        && insn.op_kind(1) == OpKind::Register;
    let number = if string { register(cpu, insn.op_register(1))? } else { return None };
    let bytes = insn.op_register(1).size() as u32;
    let words = crate::state::sext(number, bytes) as i64 >> (3 + bytes.trailing_zeros());
    let operand = insn.virtual_address(0, 0, |r, _, _| register(cpu, r));
    let va = operand?.wrapping_add_signed(words * i64::from(bytes));
    let kinds: &'static [u64] = if m == M::Bt { &[READ_WRITE] } else { &[WRITE, READ_WRITE] };
    Some(overlapping(&cpu.guest.st, kinds, cpu.wrap(va), bytes.into()))
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

/// Whether RF stays as the instruction has left it: it has set what is to be there for the instruction it goes to, or it is
/// repeated and not at its end.
fn keeps_resume_flag(cpu: &X86Cpu, insn: &Instruction, pc: u64, task: u16) -> bool {
    use Mnemonic as M;
    match insn.mnemonic() {
        M::Iret | M::Iretd | M::Iretq | M::Rsm => true,
        M::Ltr => false,
        // A task switch.
        _ if cpu.guest.st.tr.selector != task => true,
        _ => cpu.head.pc == pc && insn.is_string_instruction() && (insn.has_rep_prefix() || insn.has_repne_prefix()),
    }
}

/// Executes one instruction, with the debug exceptions around it. `behind_ss`: the last one has loaded SS; then Intel's
/// processors meet no breakpoint at this one (SDM section 18.3.1.1), AMD's do.
pub(crate) fn step(cpu: &mut X86Cpu, behind_ss: bool) {
    let pc = cpu.head.pc;
    settle_resume_flag(cpu, pc);
    let st = &cpu.guest.st;
    let hit = breakpoints(st, pc);
    if hit != 0 && st.flags & RFLAGS_RF == 0 && (!behind_ss || st.features.amd) {
        raise(cpu, Exception { vector: VECTOR_DB, error: None, payload: hit }, pc);
        cpu.head.exit_request = 0;
        return;
    }
    let (trap, from_branches) = (st.flags & RFLAGS_TF != 0, st.msrs.debugctl & DEBUGCTL_BTF != 0);
    let (before, cpl, task) = (cpu.guest.deliveries, st.cpl, st.tr.selector);
    let insn = instruction(cpu, pc);
    let accessed = insn.as_ref().map_or(0, |i| accesses(cpu, i));
    let trap = trap && (!from_branches || insn.as_ref().is_some_and(|i| branches(cpu, i)));
    cpu.step_careful();
    if cpu.hit_abandoned() {
        return;
    }
    if !insn.is_some_and(|i| keeps_resume_flag(cpu, &i, pc, task)) {
        cpu.guest.st.flags &= !RFLAGS_RF;
    }
    let elsewhere = cpu.guest.deliveries != before;
    // What enters the system by itself (SYSCALL, SYSENTER, a call gate) is stepped over if it leaves TF as it is.
    let entered = cpl == 3 && cpu.guest.st.cpl == 0;
    let trap = trap && (!entered || cpu.guest.st.flags & RFLAGS_TF != 0);
    if !elsewhere && insn.is_some_and(|i| loads_ss(&i)) {
        // Held back, even if an interrupt's handler is what comes next.
        cpu.guest.st.held_back |= accessed;
        return;
    }
    let held_back = std::mem::take(&mut cpu.guest.st.held_back);
    if elsewhere && held_back == 0 {
        return;
    }
    let payload = held_back | if elsewhere { 0 } else { accessed | if trap { SINGLE_STEP } else { 0 } };
    if payload != 0 {
        let pc = cpu.head.pc;
        if !elsewhere && smi_comes_first(cpu, payload) {
            return;
        }
        resume_repeated(cpu, pc);
        raise(cpu, Exception { vector: VECTOR_DB, error: None, payload }, pc);
        cpu.head.exit_request = 0;
    }
}

/// An SMI that came during an access to a port is taken before the debug exception behind it, which is noted in the save
/// area: RSM raises it. Only the area of 64-bit processors has a place for it.
fn smi_comes_first(cpu: &mut X86Cpu, payload: u64) -> bool {
    let pc = cpu.head.pc;
    if !cpu.guest.st.features.long_mode {
        return false;
    }
    match &mut cpu.guest.port_access {
        Some(access) if access.goes_on_at == pc => {
            access.debug = payload;
            true
        }
        _ => false,
    }
}
