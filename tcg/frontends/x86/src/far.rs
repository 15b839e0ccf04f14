//! Far jumps, calls and returns, call gates, IRET.
//!
//! Spec: SDM volume 2 "JMP", "CALL", "RET", "IRET"; volume 3 sections 6.8, 21.2.

use mimus_arch::x86::regs::*;
use mimus_arch::x86::state::{Segment, attr};

use crate::exception::{Exception, Result};
use crate::host::Host;
use crate::interrupt;
use crate::segment::{self, Descriptor, check_stack, fetch, in_limit, set_segment, system, v86_segment};
use crate::stack::Stack;
use crate::state::{CS, DS, ES, FS, GS, Mode, SS, mask};
use crate::task::{self, Switch};

fn real_like<H: Host + ?Sized>(h: &H) -> bool {
    matches!(h.st().mode(), Mode::Real | Mode::V86)
}

/// Checks an instruction pointer against a code segment.
fn check_ip<H: Host + ?Sized>(h: &H, code: &Segment, ip: u64) -> Result<()> {
    let long = h.st().long() && code.attributes & attr::L != 0;
    let valid = if long { h.st().canonical(ip) } else { in_limit(code, ip, 1) };
    if valid { Ok(()) } else { Err(Exception::GP0) }
}

/// A code segment that a jump or call goes to directly.
fn direct_code<H: Host + ?Sized>(h: &mut H, selector: u16, d: Descriptor) -> Result<Segment> {
    let cpl = h.st().cpl;
    let rpl = (selector & 3) as u8;
    let allowed = if d.conforming() { d.dpl() <= cpl } else { rpl <= cpl && d.dpl() == cpl };
    if !allowed || h.st().long() && d.long() && d.big() {
        return Err(Exception::gp_sel(selector));
    }
    if !d.present() {
        return Err(Exception::np(selector));
    }
    let d = segment::mark_accessed(h, selector, d)?;
    Ok(d.segment(selector & !3 | u16::from(cpl)))
}

fn descriptor<H: Host + ?Sized>(h: &mut H, selector: u16) -> Result<Descriptor> {
    if selector & !3 == 0 {
        return Err(Exception::GP0);
    }
    fetch(h, selector, Exception::gp_sel)
}

/// Far JMP with an operand size of `bytes`; `next` is the next instruction's offset.
///
/// # Errors
/// As the manual says.
pub fn jump<H: Host + ?Sized>(h: &mut H, selector: u16, offset: u64, bytes: u32, next: u64) -> Result<()> {
    let offset = offset & mask(bytes);
    if real_like(h) {
        check_real(h, offset)?;
        segment::load_real_cs(h, selector);
        h.set_ip(offset);
        return Ok(());
    }
    let d = descriptor(h, selector)?;
    if d.is_code() {
        let code = direct_code(h, selector, d)?;
        check_ip(h, &code, offset)?;
        set_segment(h, CS, code);
        h.set_ip(offset);
        return Ok(());
    }
    match gate_kind(h, selector, d)? {
        Gate::Call => {
            let (target, ip, _) = call_gate(h, selector, d)?;
            let code_d = descriptor(h, target)?;
            let cpl = h.st().cpl;
            let allowed = if code_d.conforming() { code_d.dpl() <= cpl } else { code_d.dpl() == cpl };
            if !code_d.is_code() || !allowed || h.st().long() && (!code_d.long() || code_d.big()) {
                return Err(Exception::gp_sel(target));
            }
            if !code_d.present() {
                return Err(Exception::np(target));
            }
            let code = segment::mark_accessed(h, target, code_d)?.segment(target & !3 | u16::from(cpl));
            check_ip(h, &code, ip)?;
            set_segment(h, CS, code);
            h.set_ip(ip);
            Ok(())
        }
        Gate::Task(tss) => task::switch(h, tss, Switch::Jump, next).map(drop),
    }
}

/// Far CALL.
///
/// # Errors
/// As the manual says.
pub fn call<H: Host + ?Sized>(h: &mut H, selector: u16, offset: u64, bytes: u32, next: u64) -> Result<()> {
    let offset = offset & mask(bytes);
    let old_cs = u64::from(h.st().seg[CS].selector);
    if real_like(h) {
        check_real(h, offset)?;
        let mut stack = Stack::current(h);
        stack.push(h, old_cs, bytes)?;
        stack.push(h, next, bytes)?;
        stack.commit(h);
        segment::load_real_cs(h, selector);
        h.set_ip(offset);
        return Ok(());
    }
    let d = descriptor(h, selector)?;
    if d.is_code() {
        let code = direct_code(h, selector, d)?;
        let mut stack = Stack::current(h);
        stack.push(h, old_cs, bytes)?;
        stack.push(h, next, bytes)?;
        check_ip(h, &code, offset)?;
        stack.commit(h);
        set_segment(h, CS, code);
        h.set_ip(offset);
        return Ok(());
    }
    match gate_kind(h, selector, d)? {
        Gate::Call => through_gate(h, selector, d, next),
        Gate::Task(tss) => task::switch(h, tss, Switch::Call, next).map(drop),
    }
}

enum Gate {
    Call,
    Task(u16),
}

/// What kind of gate or TSS a far transfer's selector names, with its privilege checked.
fn gate_kind<H: Host + ?Sized>(h: &mut H, selector: u16, d: Descriptor) -> Result<Gate> {
    let rpl = (selector & 3) as u8;
    let long = h.st().long();
    let known = match d.kind() {
        system::CALL32 => true,
        system::CALL16 | system::TASK_GATE | system::TSS16 | system::TSS32 => !long,
        _ => false,
    };
    if d.is_segment() || !known || d.dpl() < h.st().cpl || d.dpl() < rpl {
        return Err(Exception::gp_sel(selector));
    }
    if !d.present() {
        return Err(Exception::np(selector));
    }
    Ok(match d.kind() {
        system::TASK_GATE => Gate::Task(d.gate().0),
        system::TSS16 | system::TSS32 => Gate::Task(selector),
        _ => Gate::Call,
    })
}

/// Selector, offset and number of parameters of a call gate.
fn call_gate<H: Host + ?Sized>(h: &mut H, selector: u16, d: Descriptor) -> Result<(u16, u64, u32)> {
    let (target, mut ip) = d.gate();
    if h.st().long() {
        let at = segment::descriptor_address(h.st(), selector, 16).ok_or(Exception::gp_sel(selector))?;
        let high = h.table_read(at.wrapping_add(8), 8)?;
        if high >> 40 & 0x1f != 0 {
            return Err(Exception::gp_sel(selector));
        }
        ip |= high << 32;
        return Ok((target, ip, 0));
    }
    if d.kind() == system::CALL16 {
        ip &= 0xffff;
    }
    Ok((target, ip, (d.0 >> 32 & 31) as u32))
}

fn through_gate<H: Host + ?Sized>(h: &mut H, selector: u16, gate: Descriptor, next: u64) -> Result<()> {
    let (target, ip, parameters) = call_gate(h, selector, gate)?;
    let long = h.st().long();
    let d = descriptor(h, target)?;
    let cpl = h.st().cpl;
    if !d.is_code() || d.dpl() > cpl || long && (!d.long() || d.big()) {
        return Err(Exception::gp_sel(target));
    }
    if !d.present() {
        return Err(Exception::np(target));
    }
    let bytes = match (long, gate.kind()) {
        (true, _) => 8,
        (_, system::CALL16) => 2,
        _ => 4,
    };
    let d = segment::mark_accessed(h, target, d)?;
    let inner = !d.conforming() && d.dpl() < cpl;
    let new_cpl = if inner { d.dpl() } else { cpl };
    let code = d.segment(target & !3 | u16::from(new_cpl));
    let old = Stack::current(h);
    let mut stack = old;
    if inner {
        stack = if long {
            let sp = task::read_tss64(h, 4 + 8 * u64::from(new_cpl))?;
            Stack::long(crate::interrupt::long_null_ss(new_cpl), sp, new_cpl)
        } else {
            let (ss, sp) = task::inner_stack(h, new_cpl)?;
            Stack::new(ss, sp, new_cpl)
        };
        stack.push(h, u64::from(old.ss.selector), bytes)?;
        stack.push(h, old.sp, bytes)?;
        for i in (0..parameters).rev() {
            let mut from = old;
            from.skip(u64::from(i * bytes));
            let value = from.pop(h, bytes)?;
            stack.push(h, value, bytes)?;
        }
    }
    let old_cs = u64::from(h.st().seg[CS].selector);
    stack.push(h, old_cs, bytes)?;
    stack.push(h, next, bytes)?;
    check_ip(h, &code, ip)?;
    if inner {
        set_segment(h, SS, stack.ss);
    }
    stack.commit(h);
    if long {
        h.set_gpr(4, stack.sp);
    }
    h.set_cpl(new_cpl);
    set_segment(h, CS, code);
    h.set_ip(ip);
    Ok(())
}

/// In real mode a code segment's limit stays what it was.
fn check_real<H: Host + ?Sized>(h: &H, offset: u64) -> Result<()> {
    if in_limit(&h.st().seg[CS], offset, 1) { Ok(()) } else { Err(Exception::GP0) }
}

/// Far RET, dropping `parameters` bytes.
///
/// # Errors
/// As the manual says.
pub fn ret<H: Host + ?Sized>(h: &mut H, bytes: u32, parameters: u32) -> Result<()> {
    let mut stack = Stack::current(h);
    let ip = stack.pop(h, bytes)?;
    let selector = stack.pop(h, bytes)? as u16;
    if real_like(h) {
        check_real(h, ip)?;
        stack.skip(u64::from(parameters));
        stack.commit(h);
        segment::load_real_cs(h, selector);
        h.set_ip(ip);
        return Ok(());
    }
    let code = return_code(h, selector)?;
    let rpl = (selector & 3) as u8;
    stack.skip(u64::from(parameters));
    if rpl == h.st().cpl {
        check_ip(h, &code, ip)?;
        stack.commit(h);
        set_segment(h, CS, code);
        h.set_ip(ip);
        return Ok(());
    }
    let sp = stack.pop(h, bytes)?;
    let ss = stack.pop(h, bytes)? as u16;
    check_ip(h, &code, ip)?;
    to_outer(h, code, ip, ss, sp, u64::from(parameters), bytes)
}

/// The code segment a return goes to.
fn return_code<H: Host + ?Sized>(h: &mut H, selector: u16) -> Result<Segment> {
    let d = descriptor(h, selector)?;
    let rpl = (selector & 3) as u8;
    let fits = if d.conforming() { d.dpl() <= rpl } else { d.dpl() == rpl };
    if rpl < h.st().cpl || !d.is_code() || !fits || h.st().long() && d.long() && d.big() {
        return Err(Exception::gp_sel(selector));
    }
    if !d.present() {
        return Err(Exception::np(selector));
    }
    Ok(segment::mark_accessed(h, selector, d)?.segment(selector))
}

/// Returns to an outer level (or, in 64-bit mode, to any) with a stack of its own.
fn to_outer<H: Host + ?Sized>(
    h: &mut H,
    code: Segment,
    ip: u64,
    ss: u16,
    sp: u64,
    release: u64,
    bytes: u32,
) -> Result<()> {
    let cpl = (code.selector & 3) as u8;
    let to_long = h.st().long() && code.attributes & attr::L != 0;
    let stack_segment = if ss & !3 == 0 {
        if !to_long || cpl == 3 || ss & 3 != u16::from(cpl) {
            return Err(Exception::GP0);
        }
        Segment { selector: ss, ..crate::interrupt::long_null_ss(cpl) }
    } else {
        let d = fetch(h, ss, Exception::gp_sel)?;
        check_stack(ss, d, cpl, Exception::gp_sel)?;
        segment::mark_accessed(h, ss, d)?.segment(ss)
    };
    let outwards = cpl > h.st().cpl;
    segment::change_level(h, cpl, code, Some(stack_segment));
    let sp_mask = h.st().stack_mask();
    let sp = sp.wrapping_add(release);
    let old = h.gpr(4);
    // A 16-bit return to a 32-bit stack takes 16 bits of it.
    let new = if sp_mask == 0xffff || bytes == 2 && !to_long { old & !0xffff | sp & 0xffff } else { sp & sp_mask };
    h.set_gpr(4, new);
    if outwards {
        drop_inner_segments(h, cpl);
    }
    h.set_ip(ip & if to_long { !0 } else { 0xffff_ffff });
    Ok(())
}

/// Data segments that the outer level may not use become null (SDM section 6.8.6). One that is null already has no
/// privilege of its own: its selector becomes 0, the base stays.
fn drop_inner_segments<H: Host + ?Sized>(h: &mut H, cpl: u8) {
    for seg in [ES, DS, FS, GS] {
        let s = h.st().seg[seg];
        let conforming = s.attributes & 0xc == 0xc;
        if s.attributes & attr::UNUSABLE != 0 {
            h.st_mut().seg[seg].selector = 0;
        } else if !conforming && s.dpl() < cpl {
            set_segment(h, seg, Segment::UNUSABLE);
        }
    }
}

/// Flags that IRET and POPF may change at privilege level `cpl` (SDM volume 2 "POPF").
pub fn writable_flags<H: Host + ?Sized>(h: &H, cpl: u8, bytes: u32) -> u64 {
    let mut flags = crate::state::ARITH | RFLAGS_TF | RFLAGS_DF | RFLAGS_NT | RFLAGS_AC | RFLAGS_ID;
    if cpl == 0 {
        flags |= RFLAGS_IOPL;
    }
    if cpl <= h.st().iopl() {
        flags |= RFLAGS_IF;
    }
    flags & mask(bytes)
}

/// IRET with an operand size of `bytes`.
///
/// # Errors
/// As the manual says.
pub fn iret<H: Host + ?Sized>(h: &mut H, bytes: u32, next: u64) -> Result<()> {
    if std::mem::take(&mut h.st_mut().nmi_masked) {
        // One may wait, and comes right behind this.
        h.check_events();
    }
    let mode = h.st().mode();
    iret_by_mode(h, bytes, next, mode)?;
    h.resume_flag_set();
    Ok(())
}

fn iret_by_mode<H: Host + ?Sized>(h: &mut H, bytes: u32, next: u64, mode: Mode) -> Result<()> {
    if matches!(mode, Mode::Real | Mode::V86) {
        return iret_real(h, bytes, mode);
    }
    if h.st().flags & RFLAGS_NT != 0 {
        if h.st().long() {
            return Err(Exception::GP0);
        }
        let base = h.st().tr.base;
        let link = h.table_read(base, 2)? as u16;
        return task::switch(h, link, Switch::Return, next).map(drop);
    }
    let mut stack = Stack::current(h);
    let ip = stack.pop(h, bytes)?;
    let selector = stack.pop(h, bytes)? as u16;
    let flags = stack.pop(h, bytes)?;
    let cpl = h.st().cpl;
    if flags & RFLAGS_VM != 0 && cpl == 0 && !h.st().long() && bytes == 4 {
        return iret_to_v86(h, stack, ip, selector, flags);
    }
    let code = return_code(h, selector)?;
    let new_cpl = (selector & 3) as u8;
    let mut bits = writable_flags(h, cpl, bytes) | RFLAGS_RF & mask(bytes);
    if cpl == 0 {
        bits |= (RFLAGS_VIF | RFLAGS_VIP) & mask(bytes);
    }
    if new_cpl == cpl && !h.st().is_64bit() {
        check_ip(h, &code, ip)?;
        stack.commit(h);
        set_segment(h, CS, code);
        h.set_ip(ip);
    } else {
        let sp = stack.pop(h, bytes)?;
        let ss = stack.pop(h, bytes)? as u16;
        check_ip(h, &code, ip)?;
        to_outer(h, code, ip, ss, sp, 0, bytes)?;
    }
    h.set_rflags(flags, bits);
    Ok(())
}

fn iret_real<H: Host + ?Sized>(h: &mut H, bytes: u32, mode: Mode) -> Result<()> {
    let virtualised = mode == Mode::V86 && h.st().iopl() < 3;
    if virtualised && (h.st().cr4 & CR4_VME == 0 || bytes != 2) {
        return Err(Exception::GP0);
    }
    let mut stack = Stack::current(h);
    let ip = stack.pop(h, bytes)?;
    let selector = stack.pop(h, bytes)? as u16;
    let flags = stack.pop(h, bytes)?;
    check_real(h, ip)?;
    if virtualised {
        interrupt::check_virtual_flags(h, flags)?;
    }
    stack.commit(h);
    segment::load_real_cs(h, selector);
    if virtualised {
        interrupt::set_virtual_flags(h, flags)?;
        h.set_ip(ip);
        return Ok(());
    }
    let mut bits =
        crate::state::ARITH | RFLAGS_TF | RFLAGS_IF | RFLAGS_DF | RFLAGS_NT | RFLAGS_AC | RFLAGS_ID | RFLAGS_RF;
    if mode == Mode::Real {
        bits |= RFLAGS_IOPL;
    }
    h.set_rflags(flags, bits & mask(bytes));
    h.set_ip(ip);
    Ok(())
}

fn iret_to_v86<H: Host + ?Sized>(h: &mut H, mut stack: Stack, ip: u64, cs: u16, flags: u64) -> Result<()> {
    let sp = stack.pop(h, 4)?;
    let ss = stack.pop(h, 4)? as u16;
    let mut data = [0u16; 4];
    for selector in &mut data {
        *selector = stack.pop(h, 4)? as u16;
    }
    // Intel's refuse what AMD's truncate (SDM volume 2 and APM volume 3 "IRET").
    if ip > 0xffff && !h.st().features.amd {
        return Err(Exception::GP0);
    }
    h.set_rflags(flags, !0);
    h.set_cpl(3);
    for (seg, selector) in [(CS, cs), (SS, ss), (ES, data[0]), (DS, data[1]), (FS, data[2]), (GS, data[3])] {
        set_segment(h, seg, v86_segment(selector));
    }
    h.set_gpr(4, sp);
    h.set_ip(ip & 0xffff);
    Ok(())
}
