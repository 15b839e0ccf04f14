//! What translated code calls: the functions numbered in [`helper_ids`](crate::helper_ids).
//!
//! Instructions come as bytes and are decoded once: a vCPU keeps what it decoded by its bytes. An exception an
//! instruction raises is taken at the end, when nothing else of it can happen any more.

mod exact;
mod legacy;
pub(crate) mod quick;
mod string;
mod system;
mod vector;
pub(crate) mod waiting;
mod xstate;

use iced_x86::{EncodingKind, Instruction, OpKind, Register};
use mimus_arch::x86::regs::RSI;
use mimus_tcg_exec::frontend::{Access, Helper};
use mimus_tcg_ir::flags::{FLAGS, Flags};
use mimus_tcg_ir::unit::{UnitGpr, UnitInsn, UnitMemory, UnitPlace};
use mimus_tcg_ir::{Slot, Val};

use crate::blame::not_canonical;
use crate::decode::{MAX_LEN, Packed, pack};
use crate::exception::{Exception, Result};
use crate::frontend::{X86, X86Cpu, after_fault_of_store, decode_packed, ip_of, raise};
use crate::helper_ids::{CODE_ITSELF, COUNT};
use crate::host::Host;
use crate::native::{Built, Unit, unit_of};
use crate::segment;
use crate::stack::Stack;
use crate::state::{CS, Mode, mask};
use crate::translate::{is_high, segment_of};

/// Decoded instructions a vCPU keeps.
const DECODED: usize = 1024;

/// A decoded instruction.
#[derive(Clone, Copy)]
pub(crate) struct Decoded {
    packed: Packed,
    insn: Instruction,
    run: fn(&mut Exec<'_>) -> Result<()>,
    /// Of an instruction that runs on the host's units: its stub, valid in this generation of the stubs.
    built: Option<(Built, u32)>,
}

pub(crate) fn no_decoded() -> Vec<Option<Decoded>> {
    vec![None; DECODED]
}

/// Every helper, in the order of its number.
pub(crate) fn table() -> Vec<Helper<X86>> {
    let table = vec![
        Helper::new("execute", execute, execute),
        Helper::new("linear", linear, linear),
        Helper::new("invalid", invalid, invalid),
        Helper::new("string", execute, execute),
        Helper::new("fldcw", load_control, load_control),
        Helper::new("quick", quick::quick, quick::quick),
        Helper::new("code", code, code),
    ];
    debug_assert_eq!(table.len(), COUNT);
    table
}

/// One instruction being executed.
pub(crate) struct Exec<'a> {
    pub cpu: &'a mut X86Cpu,
    pub insn: Instruction,
    pub packed: Packed,
    /// Offset of the memory operand in its segment.
    pub offset: u64,
    /// Linear address of the instruction.
    pub pc: u64,
    /// Offset in CS of the next one.
    pub next: u64,
    /// See [`Decoded::built`].
    built: Option<(Built, u32)>,
}

fn slot_of(packed: &Packed) -> usize {
    let mix = (packed[0] ^ packed[1].rotate_left(31)).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    (mix >> 44) as usize % DECODED
}

/// Where an instruction is among those decoded: at one of two places.
fn find(all: &[Option<Decoded>], packed: &Packed) -> Option<usize> {
    let slot = slot_of(packed);
    [slot, slot ^ 1].into_iter().find(|at| matches!(all.get(*at), Some(Some(d)) if d.packed == *packed))
}

fn decoded(cpu: &mut X86Cpu, packed: Packed, pc: u64) -> Decoded {
    if let Some(d) = find(&cpu.guest.decoded, &packed).and_then(|at| cpu.guest.decoded[at]) {
        return d;
    }
    let insn = decode_packed(cpu, &packed, pc);
    let d = Decoded { packed, insn, run: runner(&insn), built: None };
    let slot = slot_of(&packed);
    // A stub takes longest to make anew.
    let has_stub = |at: usize| cpu.guest.decoded[at].map(|d| d.built.is_some());
    let at = if has_stub(slot ^ 1) < has_stub(slot) { slot ^ 1 } else { slot };
    cpu.guest.decoded[at] = Some(d);
    d
}

/// What executes an instruction, if that is not one of the host's units.
fn own(insn: &Instruction) -> Option<fn(&mut Exec<'_>) -> Result<()>> {
    if insn.is_string_instruction() {
        return Some(string::run);
    }
    system::find(insn).or_else(|| legacy::find(insn)).or_else(|| xstate::find(insn))
}

/// Whether an instruction is executed as it is by one of the host's units.
pub(crate) fn is_native(insn: &Instruction) -> bool {
    own(insn).is_none()
}

fn runner(insn: &Instruction) -> fn(&mut Exec<'_>) -> Result<()> {
    own(insn).unwrap_or(match unit_of(insn) {
        Unit::Integer if insn.encoding() == EncodingKind::Legacy => vector::integer,
        _ => vector::run,
    })
}

/// Remembers an instruction's stub.
fn keep(x: &mut Exec<'_>, built: (Built, u32)) {
    let at = find(&x.cpu.guest.decoded, &x.packed);
    if let Some(d) = at.and_then(|at| x.cpu.guest.decoded[at].as_mut()) {
        d.built = Some(built);
    }
}

/// Executes an instruction.
fn execute(cpu: &mut X86Cpu, low: u64, high: u64, offset: u64) -> u64 {
    let (pc, len) = cpu.current_insn();
    let pc = cpu.wrap(pc);
    let packed = [low, high];
    let d = decoded(cpu, packed, pc);
    cpu.guest.leave = false;
    let next = ip_of(cpu, pc).wrapping_add(u64::from(len)) & cpu.guest.st.ip_mask();
    let mut exec = Exec { cpu, insn: d.insn, packed, offset, pc, next, built: d.built };
    let result = (d.run)(&mut exec);
    cpu.guest.st.update_guards();
    if let Err(exception) = result {
        raise(cpu, exception, pc);
        return 0;
    }
    if cpu.head.exit_request == 0 && (cpu.guest.leave | cpu.code_changed()) {
        let after = pc.wrapping_add(u64::from(len));
        let after = cpu.wrap(after);
        cpu.jump(after);
    }
    0
}

/// FLDCW of a value, where the unit may be used and nothing is pending.
fn load_control(cpu: &mut X86Cpu, value: u64, _: u64, _: u64) -> u64 {
    crate::fpu::set_control(&mut cpu.guest, value as u16);
    cpu.guest.st.update_guards();
    0
}

/// Executes an instruction of the host's units, for the interpreter.
pub(crate) fn unit(cpu: &mut X86Cpu, insn: &UnitInsn, d: Option<Slot>, a: Val, va: u64) {
    let number = |v: Option<Val>| match v {
        Some(Val::Slot(slot)) => slot.0,
        _ => 0,
    };
    let to = number(d.map(Val::Slot));
    let reg = if insn.gpr == UnitGpr::OutReg { to } else { insn.reg };
    let place = match (insn.memory, insn.gpr) {
        (UnitMemory::None, UnitGpr::InRm) => UnitPlace::Reg(number(Some(a))),
        (UnitMemory::None, UnitGpr::OutRm) => UnitPlace::Reg(to),
        (UnitMemory::None, _) => UnitPlace::Reg(insn.rm),
        // The helper is told the address.
        _ => UnitPlace::Mem { base: RSI as u8, index: None, disp: 0 },
    };
    let mut bytes = Vec::with_capacity(MAX_LEN);
    insn.encode(reg, place, &mut bytes);
    let last = va.wrapping_add(u64::from(insn.bytes.max(1)) - 1);
    let st = &cpu.guest.st;
    if insn.memory != UnitMemory::None && st.is_64bit() && !(st.canonical(va) && st.canonical(last)) {
        let pc = cpu.current_insn().0;
        let access = if insn.memory == UnitMemory::Store { Access::Store } else { Access::Load };
        let exception = not_canonical(cpu, pc, va, access);
        if insn.memory == UnitMemory::Store {
            after_fault_of_store(cpu, pc);
        }
        return raise(cpu, exception, pc);
    }
    let [low, high] = pack(&bytes, 64);
    execute(cpu, low, high, va);
}

/// The linear address of an access, or its exception.
fn linear(cpu: &mut X86Cpu, what: u64, offset: u64, _: u64) -> u64 {
    let (seg, bytes, write) = ((what & 7) as usize, (what >> 8 & 0xff) as u32, what >> 16 & 1 != 0);
    let st = &cpu.guest.st;
    let aligned = |va| st.check_alignment(va, bytes).map(|()| va);
    match segment::linear(st, seg, offset, bytes, write).and_then(aligned) {
        Ok(va) => va,
        Err(exception) => {
            let pc = cpu.current_insn().0;
            let pc = cpu.wrap(pc);
            raise(cpu, exception, pc);
            0
        }
    }
}

/// Checks that an instruction, or where it leads, is inside the code segment; in 64-bit mode, canonical. A call's return
/// address, of `pushed` bytes, has to have a place before that.
fn code(cpu: &mut X86Cpu, what: u64, ip: u64, pushed: u64) -> u64 {
    let (pc, len) = cpu.current_insn();
    let pc = cpu.wrap(pc);
    if pushed != 0
        && let Err(exception) = Stack::current(cpu).probe_push(cpu, pushed as u32)
    {
        raise(cpu, exception, pc);
        return 0;
    }
    let itself = what == CODE_ITSELF as u64;
    let (ip, bytes) = if itself { (ip_of(cpu, pc), u32::from(len)) } else { (ip, 1) };
    let st = &cpu.guest.st;
    let inside = if st.is_64bit() { st.canonical(ip) } else { segment::in_limit(&st.seg[CS], ip, bytes) };
    if !inside {
        let st = &cpu.guest.st;
        if pushed != 0 && st.is_64bit() && !st.features.amd {
            // Measured: Intel's processors push before they look, and RSP alone stays as it was.
            let behind = pc.wrapping_add(len.into());
            if let Err(exception) = Stack::current(cpu).push(cpu, behind, pushed as u32) {
                raise(cpu, exception, pc);
                return 0;
            }
        }
        raise(cpu, Exception::GP0, pc);
    }
    0
}

/// An invalid instruction, or one of too many bytes.
fn invalid(cpu: &mut X86Cpu, too_long: u64, _: u64, _: u64) -> u64 {
    let pc = cpu.current_insn().0;
    let pc = cpu.wrap(pc);
    raise(cpu, if too_long != 0 { Exception::GP0 } else { Exception::UD }, pc);
    0
}

impl Exec<'_> {
    /// The memory operand's segment.
    pub fn segment(&self) -> usize {
        segment_of(&self.insn, self.cpu.guest.st.is_64bit())
    }

    /// Linear address of the memory operand, which is aligned to its size if alignment is checked.
    pub fn address(&self, bytes: u32, write: bool) -> Result<u64> {
        self.aligned_address(bytes, bytes, write)
    }

    /// Linear address of a memory operand of several parts of `alignment` bytes.
    pub fn aligned_address(&self, bytes: u32, alignment: u32, write: bool) -> Result<u64> {
        let seg = self.segment();
        let st = &self.cpu.guest.st;
        let va = segment::linear(st, seg, self.offset, bytes, write)?;
        st.check_alignment(va, alignment)?;
        Ok(va)
    }

    /// Bytes of an operand.
    pub fn bytes(&self, i: u32) -> u32 {
        match self.insn.op_kind(i) {
            OpKind::Register => self.insn.op_register(i).size() as u32,
            OpKind::Memory => self.insn.memory_size().size() as u32,
            _ => self.bytes(0),
        }
    }

    /// Low bytes of a general register.
    pub fn reg(&self, r: Register) -> u64 {
        let n = r.full_register().number();
        if is_high(r) {
            return self.cpu.gpr(r.number() - 4) >> 8 & 0xff;
        }
        self.cpu.gpr(n) & mask(r.size() as u32)
    }

    /// Writes a general register as x86 does.
    pub fn set_reg(&mut self, r: Register, value: u64) {
        let n = r.full_register().number();
        if is_high(r) {
            let n = r.number() - 4;
            let old = self.cpu.gpr(n);
            return self.cpu.set_gpr(n, old & !0xff00 | (value & 0xff) << 8);
        }
        let old = self.cpu.gpr(n);
        let new = match r.size() {
            8 => value,
            4 => value & 0xffff_ffff,
            bytes => old & !mask(bytes as u32) | value & mask(bytes as u32),
        };
        self.cpu.set_gpr(n, new);
    }

    /// An operand's value.
    pub fn read(&mut self, i: u32, bytes: u32) -> Result<u64> {
        Ok(match self.insn.op_kind(i) {
            OpKind::Register => self.reg(self.insn.op_register(i)) & mask(bytes),
            OpKind::Memory => {
                let at = self.address(bytes, false)?;
                self.load(at, bytes)?
            }
            _ => self.insn.immediate(i) & mask(bytes),
        })
    }

    /// Writes an operand.
    pub fn write(&mut self, i: u32, bytes: u32, value: u64) -> Result<()> {
        if self.insn.op_kind(i) == OpKind::Memory {
            let at = self.address(bytes, true)?;
            return self.store(at, bytes, value);
        }
        self.set_reg(self.insn.op_register(i), value);
        Ok(())
    }

    /// Loads as the current privilege.
    pub fn load(&mut self, va: u64, bytes: u32) -> Result<u64> {
        let user = self.cpu.user();
        self.cpu.lin_read(va, bytes, user)
    }

    /// Stores as the current privilege.
    pub fn store(&mut self, va: u64, bytes: u32, value: u64) -> Result<()> {
        let user = self.cpu.user();
        self.cpu.lin_write(va, bytes, value, user)
    }

    pub fn flags(&self) -> Flags {
        Flags::unpack(self.cpu.slot(FLAGS))
    }

    pub fn set_flags(&mut self, flags: Flags) {
        self.cpu.set_slot(FLAGS, flags.pack());
    }

    /// The operand size of stack and system instructions: 2, 4 or 8.
    pub fn mode(&self) -> Mode {
        self.cpu.guest.st.mode()
    }

    pub fn protected(&self) -> Result<()> {
        if matches!(self.mode(), Mode::Real | Mode::V86) { Err(Exception::UD) } else { Ok(()) }
    }
}
