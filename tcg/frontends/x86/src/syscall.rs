//! SYSCALL, SYSRET, SYSENTER, SYSEXIT.
//!
//! Spec: SDM volume 2; volume 3 section 6.8.7. AMD's manual, 24594 rev. 3.36, "SYSCALL" and "SYSRET", for what Intel's
//! processors have in 64-bit code only.

use mimus_arch::x86::regs::*;
use mimus_arch::x86::state::{Segment, attr};

use crate::exception::{Exception, Result};
use crate::host::Host;
use crate::segment::change_level;
use crate::state::{Mode, SS, State};

const CODE: u32 = attr::CODE;
const DATA: u32 = attr::DATA;

fn flat(selector: u16, attributes: u32, cpl: u8) -> Segment {
    Segment::flat(selector, attributes | u32::from(cpl) << attr::DPL_SHIFT)
}

/// Whether SYSCALL and SYSRET exist in code of this kind: in 64-bit code; on AMD's processors in all of protected mode.
fn exists(st: &State) -> bool {
    let here = st.is_64bit() || st.features.amd && matches!(st.mode(), Mode::Protected | Mode::Long);
    st.efer & EFER_SCE != 0 && st.features.syscall && here
}

/// SYSCALL; `next` is the next instruction's address.
///
/// # Errors
/// `#UD` where it does not exist.
pub fn syscall<H: Host + ?Sized>(h: &mut H, next: u64) -> Result<()> {
    let st = h.st();
    if !exists(st) {
        return Err(Exception::UD);
    }
    let msrs = &st.msrs;
    let (star, selector) = (msrs.star, (msrs.star >> 32) as u16);
    let (target, mask, size) = match (st.is_64bit(), st.long()) {
        (true, _) => (msrs.lstar, msrs.fmask, attr::L),
        // Compatibility mode has an entry of its own, in 64-bit code.
        (_, true) => (msrs.cstar, msrs.fmask, attr::L),
        // Legacy mode has neither mask nor flags in R11.
        _ => (star & 0xffff_ffff, RFLAGS_VM | RFLAGS_IF, attr::DB),
    };
    let (long, flags) = (st.long(), h.rflags());
    h.set_gpr(RCX, next);
    if long {
        h.set_gpr(R11, flags & !RFLAGS_RF);
    }
    h.set_rflags(0, mask | RFLAGS_RF);
    // The code segment's selector is without a level, the stack's as it is.
    let stack = flat(selector.wrapping_add(8), DATA | attr::DB, 0);
    change_level(h, 0, flat(selector & !3, CODE | size, 0), Some(stack));
    h.set_ip(target);
    Ok(())
}

/// SYSRET; `wide` with REX.W. An address that is not canonical is found out here by Intel's processors, and at the next
/// instruction, at level 3, by AMD's.
///
/// # Errors
/// `#UD`, `#GP(0)`
pub fn sysret<H: Host + ?Sized>(h: &mut H, wide: bool) -> Result<()> {
    if !exists(h.st()) {
        return Err(Exception::UD);
    }
    h.need_cpl0()?;
    let target = h.gpr(RCX);
    if wide && !h.st().features.amd && !h.st().canonical(target) {
        return Err(Exception::GP0);
    }
    let selector = (h.st().msrs.star >> 48) as u16;
    let code = if wide {
        flat(selector.wrapping_add(16) | 3, CODE | attr::L, 3)
    } else {
        flat(selector | 3, CODE | attr::DB, 3)
    };
    if h.st().is_64bit() {
        let flags = h.gpr(R11);
        h.set_rflags(flags, !(RFLAGS_RF | RFLAGS_VM));
    } else {
        h.set_rflags(RFLAGS_IF, RFLAGS_IF | RFLAGS_RF);
    }
    let stack = selector.wrapping_add(8) | 3;
    let stack = if h.st().features.amd {
        // AMD's loads the selector alone: base, limit and attributes stay.
        Segment { selector: stack, ..h.st().seg[SS] }
    } else {
        flat(stack, DATA | attr::DB, 3)
    };
    change_level(h, 3, code, Some(stack));
    h.set_ip(if wide { target } else { target & 0xffff_ffff });
    Ok(())
}

/// SYSENTER
///
/// # Errors
/// `#GP(0)` without a code segment, or in real mode; `#UD` in AMD's long mode (APM volume 3 "SYSENTER").
pub fn sysenter<H: Host + ?Sized>(h: &mut H) -> Result<()> {
    let st = h.st();
    if st.features.amd && st.long() {
        return Err(Exception::UD);
    }
    let selector = st.msrs.sysenter_cs as u16;
    if st.mode() == Mode::Real || selector & !3 == 0 {
        return Err(Exception::GP0);
    }
    let long = st.long();
    let (ip, sp) = (st.msrs.sysenter_eip, st.msrs.sysenter_esp);
    h.set_rflags(0, RFLAGS_VM | RFLAGS_IF | RFLAGS_RF);
    let size = if long { attr::L } else { attr::DB };
    let stack = flat((selector & !3).wrapping_add(8), DATA | attr::DB, 0);
    change_level(h, 0, flat(selector & !3, CODE | size, 0), Some(stack));
    let bits = if long { !0 } else { 0xffff_ffff };
    h.set_gpr(RSP, sp & bits);
    h.set_ip(ip & bits);
    Ok(())
}

/// SYSEXIT; `wide` with REX.W.
///
/// # Errors
/// `#GP(0)`; `#UD` in AMD's long mode.
pub fn sysexit<H: Host + ?Sized>(h: &mut H, wide: bool) -> Result<()> {
    let st = h.st();
    let selector = st.msrs.sysenter_cs as u16 & !3;
    if st.mode() == Mode::Real || selector == 0 || st.cpl != 0 {
        return Err(Exception::GP0);
    }
    // Found out behind the privilege, unlike SYSENTER's.
    if st.features.amd && st.long() {
        return Err(Exception::UD);
    }
    let (ip, sp) = (h.gpr(RDX), h.gpr(RCX));
    if wide && !(h.st().canonical(ip) && h.st().canonical(sp)) {
        return Err(Exception::GP0);
    }
    let (code, stack) = if wide { (32, 40) } else { (16, 24) };
    let size = if wide { attr::L } else { attr::DB };
    let stack = flat(selector.wrapping_add(stack) | 3, DATA | attr::DB, 3);
    change_level(h, 3, flat(selector.wrapping_add(code) | 3, CODE | size, 3), Some(stack));
    let bits = if wide { !0 } else { 0xffff_ffff };
    h.set_gpr(RSP, sp & bits);
    h.set_ip(ip & bits);
    Ok(())
}
