//! Delivery of interrupts and exceptions.
//!
//! Spec: SDM volume 3 chapter 7 (7.12 protected mode, 7.14 long mode), 21.3 (virtual-8086 mode), 22.1 (real mode).

use mimus_arch::x86::msr::DEBUGCTL_BTF;
use mimus_arch::x86::regs::*;
use mimus_arch::x86::state::{Segment, attr};

use crate::exception::{Exception, Result};
use crate::host::{Host, Stop};
use crate::segment::{self, Descriptor, fetch, set_segment, system};
use crate::stack::Stack;
use crate::state::{CS, DS, ES, FS, GS, Mode, SS};
use crate::task::{self, Switch};

/// Where an event comes from.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Source {
    /// INTR, NMI.
    Hardware,
    /// `INT n`, `INT3`, `INTO`.
    Software,
    /// `INT1`, or an exception.
    Exception,
}

/// What is to be delivered.
#[derive(Clone, Copy, Debug)]
struct Event {
    vector: u8,
    source: Source,
    error: Option<u32>,
    /// What is pushed as instruction pointer.
    ip: u64,
    /// RF in the pushed flags: faults, so that an instruction breakpoint does not recur.
    resume: bool,
}

/// Takes an exception of the instruction at `ip`: delivers it, or the double fault that its delivery becomes, or stops.
/// Traps (`#DB`, `#BP`, `#OF`) come with the address of the next instruction.
pub fn raise<H: Host + ?Sized>(h: &mut H, exception: Exception, ip: u64) {
    let mut current = exception;
    let mut ip = ip;
    loop {
        // Behind a task switch, it is the new task's.
        ip = h.st_mut().task_entry.take().unwrap_or(ip);
        match current.vector {
            VECTOR_PF => h.st_mut().cr2 = current.payload,
            VECTOR_DB => {
                h.st_mut().dr6 |= current.payload;
                h.st_mut().dr7 &= !(1 << 13);
                // Whoever goes on from branch to branch asks for it anew (SDM section 18.4.3).
                h.st_mut().msrs.debugctl &= !DEBUGCTL_BTF;
            }
            _ => {}
        }
        let real = h.st().mode() == Mode::Real;
        let event = Event {
            vector: current.vector,
            source: Source::Exception,
            error: if real { None } else { current.error },
            ip,
            resume: match current.vector {
                // General detect is a fault, and not one of an instruction breakpoint.
                VECTOR_DB => current.payload == 1 << 13,
                vector => !matches!(vector, VECTOR_BP | VECTOR_OF),
            },
        };
        let Err(next) = deliver(h, event) else { return };
        if current.vector == VECTOR_DF {
            // Left as it was, for whoever looks.
            h.set_ip(ip);
            h.stop(Stop::TripleFault);
            return;
        }
        current = if next.doubles_after(current.vector) { Exception::with_code(VECTOR_DF, 0) } else { next };
    }
}

/// Takes a hardware interrupt between two instructions; `ip` is the next one's.
pub fn hardware<H: Host + ?Sized>(h: &mut H, vector: u8, ip: u64) {
    let event = Event { vector, source: Source::Hardware, error: None, ip, resume: false };
    if let Err(e) = deliver(h, event) {
        raise(h, e, ip);
    }
}

/// `INT n`: `next` is pushed. In virtual-8086 mode it is sensitive to IOPL, and with CR4.VME the task may have it go to
/// the program's own handler (SDM section 21.3.3).
///
/// # Errors
/// What the instruction itself faults with.
pub fn software<H: Host + ?Sized>(h: &mut H, vector: u8, next: u64) -> Result<()> {
    let st = h.st();
    if st.mode() == Mode::V86 {
        if st.cr4 & CR4_VME != 0 && !task::is_protected_vector(h, vector)? {
            return to_program(h, vector, next);
        }
        if h.st().iopl() < 3 {
            return Err(Exception::GP0);
        }
    }
    trap(h, vector, next)
}

/// `INT3` and `INTO`: `next` is pushed.
///
/// # Errors
/// What the instruction itself faults with.
pub fn trap<H: Host + ?Sized>(h: &mut H, vector: u8, next: u64) -> Result<()> {
    deliver(h, Event { vector, source: Source::Software, error: None, ip: next, resume: false })
}

/// A virtual-8086 program's own handler: as in real mode, with the vectors at linear address 0.
fn to_program<H: Host + ?Sized>(h: &mut H, vector: u8, next: u64) -> Result<()> {
    h.note_event(vector, false, next, 0);
    let entry = h.lin_read(u64::from(vector) * 4, 4, true)?;
    let virtualised = h.st().iopl() < 3;
    let flags = if virtualised { virtual_flags(h) } else { h.rflags() };
    let mut stack = Stack::current(h);
    stack.push(h, flags, 2)?;
    let cs = u64::from(h.st().seg[CS].selector);
    stack.push(h, cs, 2)?;
    stack.push(h, next, 2)?;
    stack.commit(h);
    h.set_rflags(0, RFLAGS_TF | if virtualised { RFLAGS_VIF } else { RFLAGS_IF });
    segment::load_real_cs(h, (entry >> 16) as u16);
    h.set_ip(entry & 0xffff);
    Ok(())
}

/// What a program sees whose interrupt flag is virtual: VIF in the place of IF, and IOPL 3 (SDM section 21.3.2).
pub fn virtual_flags<H: Host + ?Sized>(h: &H) -> u64 {
    let flags = h.rflags();
    let open = if flags & RFLAGS_VIF != 0 { RFLAGS_IF } else { 0 };
    flags & !RFLAGS_IF | open | RFLAGS_IOPL
}

/// Flags of 16 bits that a virtual-8086 program with a virtual interrupt flag loads (POPF, IRET).
///
/// # Errors
/// `#GP(0)` if it asks for single steps, or opens interrupts while one waits.
pub fn set_virtual_flags<H: Host + ?Sized>(h: &mut H, flags: u64) -> Result<()> {
    check_virtual_flags(h, flags)?;
    let open = if flags & RFLAGS_IF != 0 { RFLAGS_VIF } else { 0 };
    let loaded = crate::state::ARITH | RFLAGS_TF | RFLAGS_DF | RFLAGS_NT;
    h.set_rflags(flags & !RFLAGS_VIF | open, loaded | RFLAGS_VIF);
    Ok(())
}

/// Whether [`set_virtual_flags`] will do.
///
/// # Errors
/// `#GP(0)`
pub fn check_virtual_flags<H: Host + ?Sized>(h: &H, flags: u64) -> Result<()> {
    let waits = h.st().flags & RFLAGS_VIP != 0 && flags & RFLAGS_IF != 0;
    if flags & RFLAGS_TF != 0 || waits { Err(Exception::GP0) } else { Ok(()) }
}

fn deliver<H: Host + ?Sized>(h: &mut H, event: Event) -> Result<()> {
    // SDM section 7.13: errors during the delivery of what the program did not ask for say so.
    let external = u32::from(event.source != Source::Software);
    let value = if event.vector == VECTOR_PF { h.st().cr2 } else { event.error.unwrap_or(0).into() };
    h.note_event(event.vector, event.source == Source::Hardware, event.ip, value);
    let result = match h.st().mode() {
        Mode::Real => deliver_real(h, event),
        _ if h.st().long() => deliver_long(h, event),
        _ => deliver_protected(h, event),
    };
    result.map_err(|mut e| {
        if e.vector != VECTOR_PF {
            e.error = e.error.map(|code| code | external);
        }
        e
    })
}

fn deliver_real<H: Host + ?Sized>(h: &mut H, event: Event) -> Result<()> {
    let idtr = h.st().idtr;
    let offset = u64::from(event.vector) * 4;
    if offset + 3 > u64::from(idtr.limit) {
        return Err(Exception::gp(u32::from(event.vector) * 8 + 2));
    }
    let entry = h.table_read(idtr.base.wrapping_add(offset), 4)?;
    let mut stack = Stack::current(h);
    let flags = h.rflags();
    stack.push(h, flags, 2)?;
    let cs = u64::from(h.st().seg[CS].selector);
    stack.push(h, cs, 2)?;
    stack.push(h, event.ip, 2)?;
    stack.commit(h);
    h.set_rflags(0, RFLAGS_IF | RFLAGS_TF | RFLAGS_AC | RFLAGS_RF);
    segment::load_real_cs(h, (entry >> 16) as u16);
    h.set_ip(entry & 0xffff);
    Ok(())
}

/// The gate's selector in an error code: index in the IDT, and that it is one.
fn idt_code(event: Event) -> u32 {
    u32::from(event.vector) * 8 + 2
}

fn deliver_protected<H: Host + ?Sized>(h: &mut H, event: Event) -> Result<()> {
    let idtr = h.st().idtr;
    let offset = u64::from(event.vector) * 8;
    if offset + 7 > u64::from(idtr.limit) {
        return Err(Exception::gp(idt_code(event)));
    }
    let gate = Descriptor(h.table_read(idtr.base.wrapping_add(offset) & 0xffff_ffff, 8)?);
    let kind = gate.kind();
    let known = matches!(kind, system::TASK_GATE | system::INT16 | system::TRAP16 | system::INT32 | system::TRAP32);
    if gate.is_segment() || !known {
        return Err(Exception::gp(idt_code(event)));
    }
    if event.source == Source::Software && gate.dpl() < h.st().cpl {
        return Err(Exception::gp(idt_code(event)));
    }
    if !gate.present() {
        return Err(Exception::with_code(VECTOR_NP, idt_code(event)));
    }
    let (selector, target) = gate.gate();
    if kind == system::TASK_GATE {
        let entry = task::switch(h, selector, Switch::Interrupt { resume: event.resume }, event.ip)?;
        if let Some(code) = event.error {
            let bytes = if h.st().tr.attributes & 8 != 0 { 4 } else { 2 };
            let mut stack = Stack::current(h);
            if let Err(e) = stack.push(h, u64::from(code), bytes) {
                h.st_mut().task_entry = Some(entry);
                return Err(e);
            }
            stack.commit(h);
        }
        return Ok(());
    }
    let wide = kind & 8 != 0;
    let target = if wide { target } else { target & 0xffff };
    let (code, cpl) = code_segment(h, selector, false)?;
    let from_v86 = h.st().mode() == Mode::V86;
    if from_v86 && cpl != 0 {
        return Err(Exception::gp_sel(selector));
    }
    let bytes = if wide { 4 } else { 2 };
    let old = h.st().seg;
    let old_sp = h.gpr(4);
    let mut stack = Stack::current(h);
    let inner = cpl < h.st().cpl || from_v86;
    if inner {
        let (ss, sp) = task::inner_stack(h, cpl)?;
        stack = Stack::new(ss, sp, cpl);
        if from_v86 {
            for seg in [GS, FS, DS, ES] {
                stack.push(h, u64::from(old[seg].selector), bytes)?;
            }
        }
        stack.push(h, u64::from(old[SS].selector), bytes)?;
        stack.push(h, old_sp, bytes)?;
    }
    push_frame(h, &mut stack, event, bytes)?;
    if !segment::in_limit(&code, target, 1) {
        return Err(Exception::GP0);
    }
    if inner {
        set_segment(h, SS, stack.ss);
        if from_v86 {
            for seg in [GS, FS, DS, ES] {
                set_segment(h, seg, Segment::UNUSABLE);
            }
        }
    }
    stack.commit(h);
    enter(h, code, cpl, target, kind & 1 == 0);
    Ok(())
}

fn push_frame<H: Host + ?Sized>(h: &mut H, stack: &mut Stack, event: Event, bytes: u32) -> Result<()> {
    let resume = if event.resume { RFLAGS_RF } else { 0 };
    let flags = h.rflags() | resume;
    let cs = u64::from(h.st().seg[CS].selector);
    stack.push(h, flags, bytes)?;
    stack.push(h, cs, bytes)?;
    stack.push(h, event.ip, bytes)?;
    match event.error {
        Some(code) => stack.push(h, u64::from(code), bytes),
        None => Ok(()),
    }
}

/// The handler's code segment and the privilege level it runs at.
fn code_segment<H: Host + ?Sized>(h: &mut H, selector: u16, long: bool) -> Result<(Segment, u8)> {
    if selector & !3 == 0 {
        return Err(Exception::GP0);
    }
    let d = fetch(h, selector, Exception::gp_sel)?;
    let cpl = h.st().cpl;
    if !d.is_code() || d.dpl() > cpl || long && (!d.long() || d.big()) {
        return Err(Exception::gp_sel(selector));
    }
    if !d.present() {
        return Err(Exception::np(selector));
    }
    let d = segment::mark_accessed(h, selector, d)?;
    let cpl = if d.conforming() { cpl } else { d.dpl() };
    Ok((d.segment(selector & !3 | u16::from(cpl)), cpl))
}

/// Goes to the handler.
fn enter<H: Host + ?Sized>(h: &mut H, code: Segment, cpl: u8, ip: u64, interrupt_gate: bool) {
    let mut clear = RFLAGS_TF | RFLAGS_NT | RFLAGS_RF | RFLAGS_VM;
    if interrupt_gate {
        clear |= RFLAGS_IF;
    }
    h.set_rflags(0, clear);
    segment::change_level(h, cpl, code, None);
    h.set_ip(ip);
}

fn deliver_long<H: Host + ?Sized>(h: &mut H, event: Event) -> Result<()> {
    let idtr = h.st().idtr;
    let offset = u64::from(event.vector) * 16;
    if offset + 15 > u64::from(idtr.limit) {
        return Err(Exception::gp(idt_code(event)));
    }
    let at = idtr.base.wrapping_add(offset);
    let gate = Descriptor(h.table_read(at, 8)?);
    let high = h.table_read(at.wrapping_add(8), 8)?;
    if gate.is_segment() || !matches!(gate.kind(), system::INT32 | system::TRAP32) || high >> 40 & 0x1f != 0 {
        return Err(Exception::gp(idt_code(event)));
    }
    if event.source == Source::Software && gate.dpl() < h.st().cpl {
        return Err(Exception::gp(idt_code(event)));
    }
    if !gate.present() {
        return Err(Exception::with_code(VECTOR_NP, idt_code(event)));
    }
    let (selector, low) = gate.gate();
    let target = low | high << 32;
    let (code, cpl) = code_segment(h, selector, true)?;
    let ist = gate.0 >> 32 & 7;
    let inner = cpl < h.st().cpl;
    let old_ss = h.st().seg[SS];
    let old_sp = h.gpr(4);
    let sp = if ist != 0 {
        task::read_tss64(h, 0x24 + 8 * (ist - 1))?
    } else if inner {
        task::read_tss64(h, 4 + 8 * u64::from(cpl))?
    } else {
        old_sp
    };
    let ss = if inner { long_null_ss(cpl) } else { old_ss };
    let mut stack = Stack::long(ss, sp & !15, cpl);
    stack.push(h, u64::from(old_ss.selector), 8)?;
    stack.push(h, old_sp, 8)?;
    push_frame(h, &mut stack, event, 8)?;
    if !h.st().canonical(target) {
        return Err(Exception::GP0);
    }
    if inner {
        set_segment(h, SS, stack.ss);
    }
    h.set_gpr(4, stack.sp);
    enter(h, code, cpl, target, gate.kind() & 1 == 0);
    Ok(())
}

/// The null stack segment of 64-bit handlers, which keeps the privilege level.
pub fn long_null_ss(cpl: u8) -> Segment {
    Segment {
        selector: u16::from(cpl),
        attributes: attr::UNUSABLE | attr::DB | u32::from(cpl) << attr::DPL_SHIFT,
        ..Segment::default()
    }
}
