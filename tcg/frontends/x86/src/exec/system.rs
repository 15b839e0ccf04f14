//! System instructions, far transfers, ports.

use iced_x86::{Code, Instruction, Mnemonic, OpKind, Register};
use mimus_arch::x86::regs::*;
use mimus_core::accel::SystemRegister;
use mimus_core::bus::AccessSize;
use mimus_tcg_ir::Size;
use mimus_tcg_ir::flags::Flags;

use super::Exec;
use super::waiting::Rest;
use crate::debugging::SINGLE_STEP;
use crate::exception::{Exception, Result};
use crate::frontend::{PIN_SMI, X86Cpu, ip_of, settle_resume_flag};
use crate::host::Host;
use crate::segment;
use crate::smm::{PortAccess, Resumed};
use crate::stack::Stack;
use crate::state::{FS, GS, Mode, SS};
use crate::translate::segment_number;
use crate::{control, cpuid, far, interrupt, msr, smm, syscall, task};

type Run = fn(&mut Exec<'_>) -> Result<()>;

/// The function for a system instruction.
pub(super) fn find(insn: &Instruction) -> Option<Run> {
    use Mnemonic as M;
    let is = |i: u32, kind: fn(Register) -> bool| {
        i < insn.op_count() && insn.op_kind(i) == OpKind::Register && kind(insn.op_register(i))
    };
    Some(match insn.mnemonic() {
        M::Mov if is(0, Register::is_segment_register) => mov_to_segment,
        M::Mov if is(0, Register::is_cr) => |x| {
            let n = x.insn.op_register(0).number() as u8;
            let value = wide_register(x, 1);
            control::write_cr(x.cpu, n, value)?;
            x.cpu.note_register(SystemRegister::Control(n), true, value);
            x.cpu.root_written();
            x.cpu.guest.leave = true;
            Ok(())
        },
        M::Mov if is(1, Register::is_cr) => |x| {
            let n = x.insn.op_register(1).number() as u8;
            let value = control::read_cr(x.cpu, n)?;
            x.cpu.note_register(SystemRegister::Control(n), false, value);
            let to = x.insn.op_register(0);
            x.set_reg(to, value);
            Ok(())
        },
        M::Mov if is(0, Register::is_dr) => |x| {
            let n = x.insn.op_register(0).number() as u8;
            let value = wide_register(x, 1);
            control::write_dr(x.cpu, n, value)
        },
        M::Mov if is(1, Register::is_dr) => |x| {
            let n = x.insn.op_register(1).number() as u8;
            let value = control::read_dr(x.cpu, n)?;
            let to = x.insn.op_register(0);
            x.set_reg(to, value);
            Ok(())
        },
        M::Clts => |x| control::clts(x.cpu),
        M::Lmsw => |x| {
            x.cpu.need_cpl0()?;
            let value = x.read(0, 2)?;
            control::lmsw(x.cpu, value)
        },
        M::Smsw => |x| {
            control::check_umip(x.cpu)?;
            let bytes = if x.insn.op_kind(0) == OpKind::Memory { 2 } else { x.bytes(0) };
            let value = x.cpu.guest.st.cr0;
            x.write(0, bytes, value)
        },
        M::Lgdt | M::Lidt => load_table,
        M::Sgdt | M::Sidt => store_table,
        M::Lldt => |x| {
            x.protected()?;
            x.cpu.need_cpl0()?;
            let selector = x.read(0, 2)? as u16;
            segment::load_ldtr(x.cpu, selector)
        },
        M::Ltr => |x| {
            x.protected()?;
            x.cpu.need_cpl0()?;
            let selector = x.read(0, 2)? as u16;
            segment::load_tr(x.cpu, selector)
        },
        M::Sldt => |x| {
            let selector = x.cpu.guest.st.ldtr.selector;
            store_selector(x, selector)
        },
        M::Str => |x| {
            let selector = x.cpu.guest.st.tr.selector;
            store_selector(x, selector)
        },
        M::Lar | M::Lsl => examine,
        M::Verr | M::Verw => |x| {
            x.protected()?;
            let selector = x.read(0, 2)? as u16;
            let ok = segment::verify(x.cpu, selector, x.insn.mnemonic() == Mnemonic::Verw)?;
            set_zf(x, ok);
            Ok(())
        },
        M::Arpl => |x| {
            x.protected()?;
            let (to, from) = (x.read(0, 2)?, x.read(1, 2)?);
            let lower = to & 3 < from & 3;
            let new = if lower { to & !3 | from & 3 } else { to };
            if !lower {
                // Nothing is written.
            } else if x.insn.op_kind(0) == OpKind::Register {
                // 16 bits, whatever the operand is called.
                let r = x.insn.op_register(0).full_register32();
                let old = x.reg(r);
                x.set_reg(r, old & !0xffff | new & 0xffff);
            } else {
                x.write(0, 2, new)?;
            }
            set_zf(x, lower);
            Ok(())
        },
        M::Invlpg => |x| {
            let seg = x.segment();
            let base =
                if seg == FS || seg == GS || !x.cpu.guest.st.is_64bit() { x.cpu.guest.st.seg[seg].base } else { 0 };
            let va = x.cpu.wrap(base.wrapping_add(x.offset));
            control::invlpg(x.cpu, va)
        },
        M::Invpcid => |x| {
            x.cpu.need_cpl0()?;
            let at = x.address(16, false)?;
            let (pcid, va) = (x.load(at, 8)?, x.load(at.wrapping_add(8), 8)?);
            let kind = wide_register(x, 0);
            control::invpcid(x.cpu, kind, pcid, va)
        },
        M::Invd | M::Wbinvd | M::Wbnoinvd => |x| x.cpu.need_cpl0(),
        M::Hlt => |x| {
            x.cpu.need_cpl0()?;
            let next = x.next;
            x.cpu.set_ip(next);
            x.cpu.guest.halted_at = Some(x.cpu.head.pc);
            x.cpu.halt();
            Ok(())
        },
        M::Rsm => resume,
        M::Cli | M::Sti => interrupt_flag,
        M::Pushf | M::Pushfd | M::Pushfq => pushf,
        M::Popf | M::Popfd | M::Popfq => popf,
        M::Rdmsr => |x| {
            let index = x.reg(Register::ECX) as u32;
            let value = msr::read(x.cpu, index)?;
            x.cpu.note_register(SystemRegister::Msr(index), false, value);
            x.set_reg(Register::EAX, value);
            x.set_reg(Register::EDX, value >> 32);
            Ok(())
        },
        M::Wrmsr => |x| {
            let value = x.reg(Register::EAX) | x.reg(Register::EDX) << 32;
            let index = x.reg(Register::ECX) as u32;
            msr::write(x.cpu, index, value)?;
            x.cpu.note_register(SystemRegister::Msr(index), true, value);
            x.cpu.guest.leave = true;
            Ok(())
        },
        M::Cpuid => |x| {
            let (leaf, subleaf) = (x.reg(Register::EAX) as u32, x.reg(Register::ECX) as u32);
            let values = cpuid::cpuid(&x.cpu.guest.st, leaf, subleaf);
            for (r, value) in [Register::EAX, Register::EBX, Register::ECX, Register::EDX].into_iter().zip(values) {
                x.set_reg(r, u64::from(value));
            }
            Ok(())
        },
        M::Rdtsc | M::Rdtscp => rdtsc,
        M::Rdpmc => |x| {
            let allowed = x.cpu.guest.st.cr4 & CR4_PCE != 0 || x.cpu.guest.st.cpl == 0;
            // No counters.
            let _ = allowed;
            Err(Exception::GP0)
        },
        M::Rdpid => |x| {
            let value = x.cpu.guest.st.msrs.tsc_aux;
            let to = x.insn.op_register(0);
            x.set_reg(to, value);
            Ok(())
        },
        M::Rdrand | M::Rdseed => random,
        M::Xgetbv => |x| {
            if x.cpu.guest.st.cr4 & CR4_OSXSAVE == 0 {
                return Err(Exception::UD);
            }
            let value = match x.reg(Register::ECX) {
                0 => x.cpu.guest.st.xcr0,
                // What is not in its initial state: all may be in use.
                1 if x.cpu.guest.st.features.has("xgetbv1") => x.cpu.guest.st.xcr0,
                _ => return Err(Exception::GP0),
            };
            x.set_reg(Register::EAX, value);
            x.set_reg(Register::EDX, value >> 32);
            Ok(())
        },
        M::Rdpkru => |x| {
            let value = control::rdpkru(x.cpu, x.reg(Register::ECX))?;
            x.set_reg(Register::EAX, value);
            x.set_reg(Register::EDX, 0);
            Ok(())
        },
        M::Wrpkru => |x| {
            let (index, high) = (x.reg(Register::ECX), x.reg(Register::EDX));
            control::wrpkru(x.cpu, index, high, x.reg(Register::EAX) as u32)
        },
        M::Xsetbv => |x| {
            let value = x.reg(Register::EAX) | x.reg(Register::EDX) << 32;
            control::xsetbv(x.cpu, x.reg(Register::ECX) as u32, value)
        },
        M::Stac | M::Clac => |x| {
            // Virtual-8086 mode has none, real mode does.
            if x.cpu.guest.st.cpl != 0 {
                return Err(Exception::UD);
            }
            let on = x.insn.mnemonic() == Mnemonic::Stac;
            x.cpu.set_rflags(if on { RFLAGS_AC } else { 0 }, RFLAGS_AC);
            Ok(())
        },
        M::Swapgs => |x| {
            if !x.cpu.guest.st.is_64bit() {
                return Err(Exception::UD);
            }
            x.cpu.need_cpl0()?;
            super::quick::swapgs(x.cpu);
            Ok(())
        },
        M::Rdfsbase | M::Rdgsbase | M::Wrfsbase | M::Wrgsbase => segment_bases,
        M::Syscall => |x| syscall::syscall(x.cpu, x.next),
        M::Sysret | M::Sysretq => |x| sysret(x.cpu, x.insn.mnemonic() == Mnemonic::Sysretq),
        M::Sysenter => |x| syscall::sysenter(x.cpu),
        M::Sysexit | M::Sysexitq => |x| syscall::sysexit(x.cpu, x.insn.mnemonic() == Mnemonic::Sysexitq),
        M::Int => |x| {
            let vector = x.insn.immediate8();
            software(x, vector)
        },
        M::Int3 => |x| trap(x, VECTOR_BP),
        M::Int1 => |x| {
            settle_resume_flag(x.cpu, x.pc);
            x.cpu.guest.deliveries += 1;
            let next = x.next;
            interrupt::raise(x.cpu, Exception::plain(VECTOR_DB), next);
            Ok(())
        },
        M::Into => |x| {
            if x.flags().contains(Flags::OF) { trap(x, VECTOR_OF) } else { Ok(()) }
        },
        M::Ud0 | M::Ud1 | M::Ud2 => |_| Err(Exception::UD),
        M::Iret | M::Iretd | M::Iretq => |x| {
            let bytes = match x.insn.mnemonic() {
                Mnemonic::Iret => 2,
                Mnemonic::Iretd => 4,
                _ => 8,
            };
            far::iret(x.cpu, bytes, x.next)
        },
        M::Retf => |x| {
            let bytes = match x.insn.code() {
                Code::Retfw | Code::Retfw_imm16 => 2,
                Code::Retfd | Code::Retfd_imm16 => 4,
                _ => 8,
            };
            let parameters = if x.insn.op_count() == 1 { u32::from(x.insn.immediate16()) } else { 0 };
            far::ret(x.cpu, bytes, parameters)
        },
        M::Call | M::Jmp => far_transfer,
        M::In => |x| {
            let bytes = x.insn.op_register(0).size() as u32;
            let port = if x.insn.op_kind(1) == OpKind::Register {
                x.reg(Register::DX) as u16
            } else {
                u16::from(x.insn.immediate8())
            };
            let value = port_in(x, port, bytes)?;
            let to = x.insn.op_register(0);
            x.set_reg(to, value);
            Ok(())
        },
        M::Out => |x| {
            let from = x.insn.op_register(1);
            let port = if x.insn.op_kind(0) == OpKind::Register {
                x.reg(Register::DX) as u16
            } else {
                u16::from(x.insn.immediate8())
            };
            let value = x.reg(from);
            port_out(x, port, from.size() as u32, value)
        },
        M::Pause => |x| {
            pause(x.cpu);
            Ok(())
        },
        // A hint that may do nothing, whatever its address.
        M::Cldemote => |_| Ok(()),
        M::Clflush | M::Clflushopt | M::Clwb => |x| {
            let at = segment::linear_to_flush(&x.cpu.guest.st, x.segment(), x.offset)?;
            x.load(at, 1).map(drop)
        },
        M::Lds | M::Les | M::Lss | M::Lfs | M::Lgs => load_far_pointer,
        _ => return None,
    })
}

/// SYSRET. If it sets TF, a step ends right there, before the instruction it leads to: unlike behind IRET.
pub(super) fn sysret(cpu: &mut X86Cpu, wide: bool) -> Result<()> {
    syscall::sysret(cpu, wide)?;
    if cpu.guest.st.flags & RFLAGS_TF != 0 {
        cpu.guest.deliveries += 1;
        let ip = ip_of(cpu, cpu.head.pc);
        interrupt::raise(cpu, Exception { vector: VECTOR_DB, error: None, payload: SINGLE_STEP }, ip);
    }
    Ok(())
}

/// A register operand of 64 bits in 64-bit mode, else of 32.
fn wide_register(x: &Exec<'_>, i: u32) -> u64 {
    x.reg(x.insn.op_register(i))
}

fn set_zf(x: &mut Exec<'_>, on: bool) {
    let flags = x.flags().replace(Flags::ZF, if on { Flags::ZF } else { Flags::NONE });
    x.set_flags(flags);
}

fn software(x: &mut Exec<'_>, vector: u8) -> Result<()> {
    settle_resume_flag(x.cpu, x.pc);
    interrupt::software(x.cpu, vector, x.next)?;
    x.cpu.guest.deliveries += 1;
    Ok(())
}

fn trap(x: &mut Exec<'_>, vector: u8) -> Result<()> {
    settle_resume_flag(x.cpu, x.pc);
    interrupt::trap(x.cpu, vector, x.next)?;
    x.cpu.guest.deliveries += 1;
    Ok(())
}

fn mov_to_segment(x: &mut Exec<'_>) -> Result<()> {
    let seg = segment_number(x.insn.op_register(0));
    if seg == crate::state::CS {
        return Err(Exception::UD);
    }
    let selector = x.read(1, 2)? as u16;
    load_segment(x.cpu, seg, selector)
}

/// MOV to a segment register, not CS.
pub(super) fn load_segment(cpu: &mut X86Cpu, seg: usize, selector: u16) -> Result<()> {
    segment::load(cpu, seg, selector)?;
    if seg == SS {
        inhibit_behind_ss(cpu);
    }
    Ok(())
}

fn resume(x: &mut Exec<'_>) -> Result<()> {
    if !x.cpu.guest.st.smm {
        return Err(Exception::UD);
    }
    match smm::resume(x.cpu) {
        Resumed::Halted => {
            x.cpu.guest.halted_at = Some(x.cpu.head.pc);
            x.cpu.halt();
        }
        Resumed::Debug(payload) => {
            x.cpu.guest.deliveries += 1;
            let ip = ip_of(x.cpu, x.cpu.head.pc);
            interrupt::raise(x.cpu, Exception { vector: VECTOR_DB, error: None, payload }, ip);
        }
        Resumed::Running => {}
    }
    Ok(())
}

/// No interrupt before the end of the next instruction.
pub(super) fn inhibit(cpu: &mut X86Cpu) {
    cpu.guest.st.shadow = true;
    Host::check_events(cpu);
}

/// The same behind a load of SS, which holds back more (SDM section 7.8.3).
pub(super) fn inhibit_behind_ss(cpu: &mut X86Cpu) {
    cpu.guest.st.shadow_ss = true;
    inhibit(cpu);
}

fn load_table(x: &mut Exec<'_>) -> Result<()> {
    let wide = x.cpu.guest.st.is_64bit();
    x.cpu.need_cpl0()?;
    let bytes = if wide { 8 } else { 4 };
    let at = x.address(2 + bytes, false)?;
    let limit = x.load(at, 2)? as u16;
    let at = x.cpu.wrap(at.wrapping_add(2));
    let mut base = x.load(at, bytes)?;
    // A 16-bit operand size loads 24 bits.
    if matches!(x.insn.code(), Code::Lgdt_m1632_16 | Code::Lidt_m1632_16) {
        base &= 0xff_ffff;
    }
    if wide && !x.cpu.guest.st.canonical_base(base) {
        return Err(Exception::GP0);
    }
    let st = &mut x.cpu.guest.st;
    let table = if x.insn.mnemonic() == Mnemonic::Lgdt { &mut st.gdtr } else { &mut st.idtr };
    (table.base, table.limit) = (base, limit);
    Ok(())
}

fn store_table(x: &mut Exec<'_>) -> Result<()> {
    control::check_umip(x.cpu)?;
    let bytes = if x.cpu.guest.st.is_64bit() { 8 } else { 4 };
    let st = &x.cpu.guest.st;
    let table = if x.insn.mnemonic() == Mnemonic::Sgdt { st.gdtr } else { st.idtr };
    let at = x.address(2 + bytes, true)?;
    x.store(at, 2, u64::from(table.limit))?;
    let at = x.cpu.wrap(at.wrapping_add(2));
    x.store(at, bytes, table.base)
}

fn store_selector(x: &mut Exec<'_>, selector: u16) -> Result<()> {
    x.protected()?;
    control::check_umip(x.cpu)?;
    let bytes = if x.insn.op_kind(0) == OpKind::Memory { 2 } else { x.bytes(0) };
    x.write(0, bytes, u64::from(selector))
}

fn examine(x: &mut Exec<'_>) -> Result<()> {
    x.protected()?;
    let selector = x.read(1, 2)? as u16;
    let found = if x.insn.mnemonic() == Mnemonic::Lar {
        segment::access_rights(x.cpu, selector)?
    } else {
        segment::limit(x.cpu, selector)?
    };
    if let Some(value) = found {
        let to = x.insn.op_register(0);
        x.set_reg(to, u64::from(value));
    }
    set_zf(x, found.is_some());
    Ok(())
}

fn interrupt_flag(x: &mut Exec<'_>) -> Result<()> {
    let st = &x.cpu.guest.st;
    if x.mode() != Mode::Real && st.cpl > st.iopl() {
        return virtual_interrupt_flag(x);
    }
    if x.insn.mnemonic() == Mnemonic::Cli {
        x.cpu.guest.st.flags &= !RFLAGS_IF;
        return Ok(());
    }
    if st.flags & RFLAGS_IF == 0 {
        x.cpu.guest.st.flags |= RFLAGS_IF;
        inhibit(x.cpu);
    }
    Ok(())
}

/// CLI and STI without the privilege: of VIF, with CR4.VME in virtual-8086 mode and with CR4.PVI in a user's protected
/// mode (SDM volume 3 sections 21.3.2 and 21.4).
fn virtual_interrupt_flag(x: &mut Exec<'_>) -> Result<()> {
    let v86 = x.mode() == Mode::V86;
    let st = &mut x.cpu.guest.st;
    let enabled = if v86 { st.cr4 & CR4_VME != 0 } else { st.cr4 & CR4_PVI != 0 && st.cpl == 3 };
    let opens = x.insn.mnemonic() == Mnemonic::Sti;
    if !enabled || opens && st.flags & RFLAGS_VIP != 0 {
        return Err(Exception::GP0);
    }
    st.flags = st.flags & !RFLAGS_VIF | if opens { RFLAGS_VIF } else { 0 };
    Ok(())
}

/// Whether flags are pushed and popped by a virtual-8086 program whose interrupt flag is virtual.
fn virtual_flags(x: &Exec<'_>, bytes: u32) -> Result<bool> {
    let st = &x.cpu.guest.st;
    if x.mode() != Mode::V86 || st.iopl() == 3 {
        return Ok(false);
    }
    if st.cr4 & CR4_VME != 0 && bytes == 2 { Ok(true) } else { Err(Exception::GP0) }
}

/// Only of virtual-8086 and real mode; elsewhere it is translated.
fn pushf(x: &mut Exec<'_>) -> Result<()> {
    let bytes = x.insn.stack_pointer_increment().unsigned_abs();
    let virtualised = virtual_flags(x, bytes)?;
    let mut stack = Stack::current(x.cpu);
    let flags = if virtualised { interrupt::virtual_flags(x.cpu) } else { x.cpu.rflags() };
    let flags = flags & !(RFLAGS_RF | RFLAGS_VM);
    stack.push(x.cpu, flags, bytes)?;
    stack.commit(x.cpu);
    Ok(())
}

fn popf(x: &mut Exec<'_>) -> Result<()> {
    let bytes = x.insn.stack_pointer_increment().unsigned_abs();
    if virtual_flags(x, bytes)? {
        let mut stack = Stack::current(x.cpu);
        let flags = stack.pop(x.cpu, bytes)?;
        interrupt::set_virtual_flags(x.cpu, flags)?;
        stack.commit(x.cpu);
        return Ok(());
    }
    pop_flags(x.cpu, bytes)
}

/// POPF, its privilege checked, of all flags that there are.
pub(super) fn pop_flags(cpu: &mut X86Cpu, bytes: u32) -> Result<()> {
    let mut stack = Stack::current(cpu);
    let flags = stack.pop(cpu, bytes)?;
    stack.commit(cpu);
    let cpl = cpu.guest.st.cpl;
    let mut bits = far::writable_flags(cpu, cpl, bytes);
    if cpu.guest.st.mode() == Mode::Real {
        bits |= (RFLAGS_IOPL | RFLAGS_IF) & crate::state::mask(bytes);
    }
    if bytes > 2 {
        bits |= RFLAGS_RF;
    }
    cpu.set_rflags(flags & !RFLAGS_RF, bits);
    Ok(())
}

fn pause(cpu: &mut X86Cpu) {
    let mut waiting = cpu.guest.waiting;
    let rest = waiting.pause(|| cpu.now());
    cpu.guest.waiting = waiting;
    match rest {
        Rest::Spin => std::hint::spin_loop(),
        // Where time is instructions, it passes by executing them.
        Rest::Sleep(time) if !cpu.counts_instructions() => std::thread::sleep(time),
        Rest::Yield | Rest::Sleep(_) => std::thread::yield_now(),
    }
}

fn rdtsc(x: &mut Exec<'_>) -> Result<()> {
    read_tsc(x.cpu)?;
    if x.insn.mnemonic() == Mnemonic::Rdtscp {
        let aux = x.cpu.guest.st.msrs.tsc_aux;
        x.set_reg(Register::ECX, aux);
    }
    Ok(())
}

/// RDTSC.
pub(super) fn read_tsc(cpu: &mut X86Cpu) -> Result<()> {
    let st = &cpu.guest.st;
    if st.cr4 & CR4_TSD != 0 && st.cpl != 0 {
        return Err(Exception::GP0);
    }
    let now = cpu.now();
    cpu.guest.waiting.time_read();
    let value = cpu.guest.st.tsc(now);
    cpu.set_gpr(RAX, value & 0xffff_ffff);
    cpu.set_gpr(RDX, value >> 32);
    Ok(())
}

fn random(x: &mut Exec<'_>) -> Result<()> {
    let mut bytes = [0; 8];
    let ok = mimus_core::outside::random(&mut bytes).is_ok();
    let to = x.insn.op_register(0);
    x.set_reg(to, if ok { u64::from_le_bytes(bytes) } else { 0 });
    x.set_flags(if ok { Flags::CF } else { Flags::NONE });
    Ok(())
}

fn segment_bases(x: &mut Exec<'_>) -> Result<()> {
    use Mnemonic as M;
    if x.cpu.guest.st.cr4 & CR4_FSGSBASE == 0 {
        return Err(Exception::UD);
    }
    let m = x.insn.mnemonic();
    let seg = if matches!(m, M::Rdfsbase | M::Wrfsbase) { FS } else { GS };
    let r = x.insn.op_register(0);
    if matches!(m, M::Rdfsbase | M::Rdgsbase) {
        let base = x.cpu.guest.st.seg[seg].base;
        x.set_reg(r, base);
        return Ok(());
    }
    let base = x.reg(r);
    if !x.cpu.guest.st.canonical_base(base) {
        return Err(Exception::GP0);
    }
    x.cpu.guest.st.seg[seg].base = base;
    x.cpu.base_changed(seg);
    Ok(())
}

/// A far pointer in memory: offset, then selector.
fn far_pointer(x: &mut Exec<'_>) -> Result<(u16, u64, u32)> {
    let bytes = x.insn.memory_size().size() as u32 - 2;
    // The selector is looked at when the offset has been loaded.
    let at = x.address(bytes, false)?;
    let offset = x.load(at, bytes)?;
    let at = x.aligned_address(bytes + 2, bytes, false)?;
    let at = x.cpu.wrap(at.wrapping_add(u64::from(bytes)));
    Ok((x.load(at, 2)? as u16, offset, bytes))
}

fn load_far_pointer(x: &mut Exec<'_>) -> Result<()> {
    use Mnemonic as M;
    let seg = match x.insn.mnemonic() {
        M::Lds => crate::state::DS,
        M::Les => crate::state::ES,
        M::Lss => SS,
        M::Lfs => FS,
        _ => GS,
    };
    let (selector, offset, _) = far_pointer(x)?;
    segment::load(x.cpu, seg, selector)?;
    let to = x.insn.op_register(0);
    x.set_reg(to, offset);
    Ok(())
}

fn far_transfer(x: &mut Exec<'_>) -> Result<()> {
    let (selector, offset, bytes) = match x.insn.op_kind(0) {
        OpKind::FarBranch16 => (x.insn.far_branch_selector(), u64::from(x.insn.far_branch16()), 2),
        OpKind::FarBranch32 => (x.insn.far_branch_selector(), u64::from(x.insn.far_branch32()), 4),
        OpKind::Memory => far_pointer(x)?,
        // Near forms are translated.
        _ => return Err(Exception::UD),
    };
    if x.insn.mnemonic() == Mnemonic::Jmp {
        far::jump(x.cpu, selector, offset, bytes, x.next)
    } else {
        far::call(x.cpu, selector, offset, bytes, x.next)
    }
}

fn size_of(bytes: u32) -> Size {
    match bytes {
        1 => Size::B1,
        2 => Size::B2,
        _ => Size::B4,
    }
}

fn access_size(bytes: u32) -> AccessSize {
    match bytes {
        1 => AccessSize::B1,
        2 => AccessSize::B2,
        _ => AccessSize::B4,
    }
}

/// Reads a port.
pub(super) fn port_in(x: &mut Exec<'_>, port: u16, bytes: u32) -> Result<u64> {
    task::check_io(x.cpu, port, bytes)?;
    let index = x.cpu.index();
    let pins = x.cpu.pins();
    let value = x.cpu.io(|io| io.pio_read(index, port, access_size(bytes))).unwrap_or(!0);
    x.cpu.trace_port(false, port, size_of(bytes), value);
    note_smi(x, pins, (port, bytes), true);
    Ok(value)
}

/// Takes note of the access to a port that made its device ask for an SMI, which is taken behind the instruction. `pins`
/// are those from before.
fn note_smi(x: &mut Exec<'_>, pins: u64, (port, bytes): (u16, u32), reads: bool) {
    if !pins & x.cpu.pins() & PIN_SMI == 0 || x.cpu.guest.st.smm {
        return;
    }
    x.cpu.guest.leave = true;
    let repeated = x.insn.has_rep_prefix() || x.insn.has_repne_prefix();
    let string = x.insn.is_string_instruction();
    let more = repeated && string && super::string::goes_on(x);
    let after = x.cpu.wrap(x.pc.wrapping_add(x.insn.len() as u64));
    x.cpu.guest.port_access = Some(PortAccess {
        port,
        bytes,
        reads,
        string,
        repeated: string && repeated,
        ip: ip_of(x.cpu, x.pc),
        rcx: x.cpu.gpr(RCX),
        rsi: x.cpu.gpr(RSI),
        rdi: x.cpu.gpr(RDI),
        goes_on_at: if more { x.pc } else { after },
        debug: 0,
    });
}

/// Writes a port.
pub(super) fn port_out(x: &mut Exec<'_>, port: u16, bytes: u32, value: u64) -> Result<()> {
    task::check_io(x.cpu, port, bytes)?;
    let index = x.cpu.index();
    let pins = x.cpu.pins();
    x.cpu.trace_port(true, port, size_of(bytes), value);
    x.cpu.io(|io| io.pio_write(index, port, access_size(bytes), value));
    // What the device asked of this vCPU (SMI, A20) is done before the next instruction.
    x.cpu.guest.leave |= x.cpu.kicked();
    note_smi(x, pins, (port, bytes), false);
    Ok(())
}
