//! A small table of instructions that emulating KVMs lack and system software meets early.
//!
//! Spec: SDM volume 2. Until a translator can take over, this is what finishes instructions
//! ([`EmulationFailure`]): `INT3`, `FWAIT`, `STAC`, `CLAC`, `XGETBV`, `POPCNT`, `CMPXCHG16B`, moves between general
//! and XMM registers and memory, bitwise XMM operations, and packed 64-bit addition. Anything else is refused.

use crate::sys::atomic;
use iced_x86::{Code, Decoder, DecoderOptions, Instruction, Mnemonic, OpKind, Register};
use mimus_arch::CpuState;
use mimus_arch::x86::regs::*;
use mimus_arch::x86::state::{Exception, attr};
use mimus_arch::x86::{Segment, X86State};
use mimus_core::accel::{Access, EmulationFailure, FailedInstruction, Finished};
use mimus_core::bus::{AccessSize, GuestVirt, MemTxAttrs};
use std::sync::atomic::{AtomicU64, Ordering};

/// Finishes the instructions of the table.
#[derive(Debug, Default)]
pub struct Repairs {
    done: AtomicU64,
}

impl Repairs {
    /// How many instructions were finished.
    pub fn count(&self) -> u64 {
        self.done.load(Ordering::Relaxed)
    }
}

/// Why an instruction was not finished normally.
enum Stop {
    Exception(Exception),
    Unknown(String),
}

fn fault(vector: u8, error_code: Option<u32>) -> Stop {
    Stop::Exception(Exception { vector, error_code, payload: None })
}

impl EmulationFailure for Repairs {
    fn finish(&self, failed: FailedInstruction<'_>) -> Finished {
        let FailedInstruction { vcpu, bytes, state: whole, io, translate } = failed;
        let CpuState::X86(state) = whole else {
            return Finished::NotHandled("it is no x86 processor".to_owned());
        };
        let bits = mode_bits(state);
        let instruction = Decoder::with_ip(bits, bytes, state.rip, DecoderOptions::NONE).decode();
        if instruction.is_invalid() {
            return Finished::NotHandled("the bytes are no instruction known here".to_owned());
        }
        let before = state.clone();
        let mut repair = Repair { state, i: &instruction, attrs: MemTxAttrs::vcpu(vcpu.0), io, translate };
        match repair.execute() {
            Ok(()) => {
                let mask = if bits == 64 { u64::MAX } else { 0xffff_ffff };
                repair.state.rip = instruction.next_ip() & mask;
                // The instruction ends an interrupt shadow.
                (repair.state.events.shadow_sti, repair.state.events.shadow_mov_ss) = (false, false);
            }
            Err(Stop::Exception(e)) => {
                *repair.state = *before;
                if e.vector == VECTOR_BP {
                    // A trap: it returns behind.
                    repair.state.rip = instruction.next_ip();
                }
                // CR2 is stored here: not every kernel takes it with the exception.
                if let Some(address) = e.payload.filter(|_| e.vector == VECTOR_PF) {
                    repair.state.cr2 = address;
                }
                repair.state.events.exception = Some(Exception { payload: None, ..e });
            }
            Err(Stop::Unknown(reason)) => {
                *repair.state = *before;
                return Finished::NotHandled(reason);
            }
        }
        self.done.fetch_add(1, Ordering::Relaxed);
        Finished::Done
    }
}

/// 16, 32 or 64.
fn mode_bits(state: &X86State) -> u32 {
    let cs = state.cs.attributes;
    if state.efer & EFER_LMA != 0 && cs & attr::L != 0 {
        64
    } else if cs & attr::DB != 0 {
        32
    } else {
        16
    }
}

struct Repair<'a> {
    state: &'a mut X86State,
    i: &'a Instruction,
    attrs: MemTxAttrs,
    io: &'a dyn mimus_core::accel::CpuIo,
    translate: &'a mut dyn FnMut(
        GuestVirt,
        Access,
    ) -> Result<mimus_core::accel::Translation, mimus_core::accel::TranslateFault>,
}

const XMM: usize = 160;

impl Repair<'_> {
    fn execute(&mut self) -> Result<(), Stop> {
        match self.i.mnemonic() {
            Mnemonic::Int3 => Err(fault(VECTOR_BP, None)),
            Mnemonic::Wait => self.fwait(),
            Mnemonic::Stac => self.set_ac(true),
            Mnemonic::Clac => self.set_ac(false),
            Mnemonic::Xgetbv => self.xgetbv(),
            Mnemonic::Popcnt => self.popcnt(),
            Mnemonic::Cmpxchg16b => self.cmpxchg16b(),
            _ if self.i.code().mnemonic() == Mnemonic::INVALID => Err(self.unknown()),
            _ => self.vector(),
        }
    }

    fn unknown(&self) -> Stop {
        Stop::Unknown(format!("{:?} is not in the table of repairs", self.i.mnemonic()).to_lowercase())
    }

    fn fwait(&mut self) -> Result<(), Stop> {
        const WAITS: u64 = CR0_MP | CR0_TS;
        if self.state.cr0 & WAITS == WAITS {
            return Err(fault(VECTOR_NM, None));
        }
        // Status word bit 7: an unmasked exception waits. Offset 2 of the legacy area.
        if self.state.cr0 & CR0_NE != 0 && self.state.xsave[2] & 0x80 != 0 {
            return Err(fault(VECTOR_MF, None));
        }
        Ok(())
    }

    fn set_ac(&mut self, on: bool) -> Result<(), Stop> {
        if self.state.cpl() != 0 || self.state.cr4 & CR4_SMAP == 0 && self.state.cr0 & CR0_PE == 0 {
            return Err(fault(VECTOR_UD, None));
        }
        self.state.rflags = self.state.rflags & !RFLAGS_AC | if on { RFLAGS_AC } else { 0 };
        Ok(())
    }

    fn xgetbv(&mut self) -> Result<(), Stop> {
        if self.state.cr4 & CR4_OSXSAVE == 0 {
            return Err(fault(VECTOR_UD, None));
        }
        if self.state.gpr[RCX] as u32 != 0 {
            return Err(fault(VECTOR_GP, Some(0)));
        }
        self.state.gpr[RAX] = self.state.xcr0 & 0xffff_ffff;
        self.state.gpr[RDX] = self.state.xcr0 >> 32;
        Ok(())
    }

    fn popcnt(&mut self) -> Result<(), Stop> {
        let size = self.i.op0_register().size();
        let value = u64::from(self.read_low(1, size)?.count_ones());
        self.write_gpr(self.i.op0_register(), value);
        let flags = RFLAGS_CF | RFLAGS_PF | RFLAGS_AF | RFLAGS_ZF | RFLAGS_SF | RFLAGS_OF;
        self.state.rflags = self.state.rflags & !flags | if value == 0 { RFLAGS_ZF } else { 0 };
        Ok(())
    }

    fn cmpxchg16b(&mut self) -> Result<(), Stop> {
        let at = self.address(0)?;
        if at % 16 != 0 {
            return Err(fault(VECTOR_GP, Some(0)));
        }
        let wide = |high: u64, low: u64| u128::from(high) << 64 | u128::from(low);
        let g = &self.state.gpr;
        let (old, new) = (wide(g[RDX], g[RAX]), wide(g[RCX], g[RBX]));
        let found = self.translated(at, Access::Write)?;
        let view = self.io.memory().view();
        let place = view.lookup(found).and_then(|r| r.ram_at(found));
        let Some((block, offset)) = place else {
            return Err(Stop::Unknown("cmpxchg16b of a device".to_owned()));
        };
        let Some(was) = atomic::compare_exchange(block, offset, old, new) else {
            return Err(Stop::Unknown("cmpxchg16b, which this host's processor lacks too".to_owned()));
        };
        self.state.rflags = self.state.rflags & !RFLAGS_ZF | if was == old { RFLAGS_ZF } else { 0 };
        if was != old {
            (self.state.gpr[RAX], self.state.gpr[RDX]) = (was as u64, (was >> 64) as u64);
        }
        Ok(())
    }

    /// SSE operations.
    fn vector(&mut self) -> Result<(), Stop> {
        if self.i.op_count() < 2 || self.i.is_vex_or_more() {
            return Err(self.unknown());
        }
        let (low, wide) = (u128::from(u64::MAX), u128::MAX);
        let (read, combine): (usize, fn(u128, u128) -> u128) = match self.i.mnemonic() {
            Mnemonic::Pxor | Mnemonic::Xorps | Mnemonic::Xorpd => (16, |a, b| a ^ b),
            Mnemonic::Pand | Mnemonic::Andps | Mnemonic::Andpd => (16, |a, b| a & b),
            Mnemonic::Por | Mnemonic::Orps | Mnemonic::Orpd => (16, |a, b| a | b),
            Mnemonic::Pandn | Mnemonic::Andnps | Mnemonic::Andnpd => (16, |a, b| !a & b),
            Mnemonic::Paddq => (16, add_quads),
            Mnemonic::Movd => (4, |_, b| b),
            Mnemonic::Movq => (8, |_, b| b),
            Mnemonic::Lddqu => (16, |_, b| b),
            Mnemonic::Movss | Mnemonic::Movsd => return self.move_scalar(),
            _ => return Err(self.unknown()),
        };
        self.check_sse()?;
        let source = self.read_operand(1, read)?;
        match self.i.op0_kind() {
            OpKind::Register if self.i.op0_register().is_xmm() => {
                let old = self.xmm(self.i.op0_register());
                self.set_xmm(self.i.op0_register(), combine(old, source) & if read == 16 { wide } else { low });
            }
            OpKind::Register if self.i.op0_register().is_gpr() => {
                self.write_gpr(self.i.op0_register(), source as u64);
            }
            OpKind::Memory => self.write_memory(0, read, source)?,
            _ => return Err(self.unknown()),
        }
        Ok(())
    }

    /// `MOVSS`, `MOVSD`: a load clears the rest of the register, a move between registers keeps it.
    fn move_scalar(&mut self) -> Result<(), Stop> {
        if matches!(self.i.code(), Code::Movsd_m32_m32) {
            return Err(self.unknown());
        }
        self.check_sse()?;
        let size = if self.i.mnemonic() == Mnemonic::Movss { 4 } else { 8 };
        let mask = (1u128 << (size * 8)) - 1;
        let source = self.read_operand(1, size)? & mask;
        if self.i.op0_kind() == OpKind::Memory {
            return self.write_memory(0, size, source);
        }
        let register = self.i.op0_register();
        let kept = if self.i.op1_kind() == OpKind::Memory { 0 } else { self.xmm(register) & !mask };
        self.set_xmm(register, kept | source);
        Ok(())
    }

    fn check_sse(&self) -> Result<(), Stop> {
        if self.state.cr0 & CR0_EM != 0 || self.state.cr4 & CR4_OSFXSR == 0 {
            return Err(fault(VECTOR_UD, None));
        }
        if self.state.cr0 & CR0_TS != 0 {
            return Err(fault(VECTOR_NM, None));
        }
        Ok(())
    }

    fn xmm(&self, register: Register) -> u128 {
        let at = XMM + 16 * register.number();
        let mut bytes = [0; 16];
        // A register whose component is not in use is zero, whatever the area holds.
        if self.state.xsave[XSAVE_XSTATE_BV] & XCR0_SSE as u8 != 0 {
            bytes.copy_from_slice(&self.state.xsave[at..at + 16]);
        }
        u128::from_le_bytes(bytes)
    }

    fn set_xmm(&mut self, register: Register, value: u128) {
        let area = &mut self.state.xsave;
        if area[XSAVE_XSTATE_BV] & XCR0_SSE as u8 == 0 {
            area[XMM..XMM + 256].fill(0);
            area[XSAVE_XSTATE_BV] |= XCR0_SSE as u8;
        }
        let at = XMM + 16 * register.number();
        area[at..at + 16].copy_from_slice(&value.to_le_bytes());
    }

    fn write_gpr(&mut self, register: Register, value: u64) {
        let full = &mut self.state.gpr[register.full_register().number()];
        *full = match register.size() {
            2 => *full & !0xffff | value & 0xffff,
            4 => value & 0xffff_ffff,
            _ => value,
        };
    }

    fn read_low(&mut self, operand: u32, size: usize) -> Result<u64, Stop> {
        let mask = if size >= 8 { u64::MAX } else { (1 << (size * 8)) - 1 };
        Ok(self.read_operand(operand, size)? as u64 & mask)
    }

    fn read_operand(&mut self, operand: u32, size: usize) -> Result<u128, Stop> {
        let mask = if size == 16 { u128::MAX } else { (1 << (size * 8)) - 1 };
        match self.i.op_kind(operand) {
            OpKind::Register => {
                let register = self.i.op_register(operand);
                if register.is_xmm() {
                    Ok(self.xmm(register) & mask)
                } else if register.is_gpr() {
                    Ok(u128::from(self.state.gpr[register.full_register().number()]) & mask)
                } else {
                    Err(self.unknown())
                }
            }
            OpKind::Memory => {
                let at = self.address(operand)?;
                let mut bytes = [0; 16];
                for (i, byte) in bytes.iter_mut().enumerate().take(size) {
                    let pa = self.translated(at.wrapping_add(i as u64), Access::Read)?;
                    *byte = self.io.memory().read(pa, AccessSize::B1, self.attrs).0 as u8;
                }
                Ok(u128::from_le_bytes(bytes))
            }
            _ => Err(self.unknown()),
        }
    }

    fn write_memory(&mut self, operand: u32, size: usize, value: u128) -> Result<(), Stop> {
        let at = self.address(operand)?;
        let bytes = value.to_le_bytes();
        // All of it must be writable before any of it is written.
        let places = (0..size as u64).map(|i| self.translated(at.wrapping_add(i), Access::Write));
        let places: Vec<_> = places.collect::<Result<_, _>>()?;
        for (pa, byte) in places.into_iter().zip(bytes) {
            let _ = self.io.memory().write(pa, AccessSize::B1, byte.into(), self.attrs);
        }
        Ok(())
    }

    /// Linear address of a memory operand.
    fn address(&self, operand: u32) -> Result<u64, Stop> {
        let s = &*self.state;
        let long = mode_bits(s) == 64;
        let base = |segment: &Segment| segment.base;
        let found = self.i.try_virtual_address(operand, 0, |register, _, _| {
            Some(match register {
                Register::FS => base(&s.fs),
                Register::GS => base(&s.gs),
                Register::ES | Register::CS | Register::SS | Register::DS if long => 0,
                Register::ES => base(&s.es),
                Register::CS => base(&s.cs),
                Register::SS => base(&s.ss),
                Register::DS => base(&s.ds),
                _ => {
                    let value = s.gpr[register.full_register().number()];
                    match register.size() {
                        2 => value & 0xffff,
                        4 => value & 0xffff_ffff,
                        _ => value,
                    }
                }
            })
        });
        let at = found.ok_or_else(|| self.unknown())?;
        Ok(if long { at } else { at & 0xffff_ffff })
    }

    fn translated(&mut self, at: u64, access: Access) -> Result<mimus_core::bus::GuestPhys, Stop> {
        let found = (self.translate)(GuestVirt(at), access).map_err(|_| {
            // Not present: bit 0 of the error code is clear.
            let write = u32::from(access == Access::Write) << 1;
            let user = u32::from(self.state.cpl() == 3) << 2;
            let error_code = Some(write | user);
            Stop::Exception(Exception { vector: VECTOR_PF, error_code, payload: Some(at) })
        })?;
        Ok(found.pa)
    }
}

fn add_quads(a: u128, b: u128) -> u128 {
    let half = |v: u128, i: u32| (v >> (64 * i)) as u64;
    let sum = |i| u128::from(half(a, i).wrapping_add(half(b, i)));
    sum(0) | sum(1) << 64
}

trait VexOrMore {
    fn is_vex_or_more(&self) -> bool;
}

impl VexOrMore for Instruction {
    fn is_vex_or_more(&self) -> bool {
        self.encoding() != iced_x86::EncodingKind::Legacy
    }
}
