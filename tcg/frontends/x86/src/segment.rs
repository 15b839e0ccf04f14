//! Segment descriptors: reading, checking, loading.
//!
//! Spec: SDM volume 3 chapters 3 and 6; volume 2 "MOV", "LDS", "VERR", "LAR", "LSL".

use mimus_arch::x86::regs::*;
use mimus_arch::x86::state::{Segment, attr};

use crate::exception::{Exception, Result};
use crate::host::Host;
use crate::state::{CS, FS, GS, Mode, SS, State};

/// Types of system descriptors (SDM table 3-2).
pub mod system {
    pub const TSS16: u32 = 1;
    pub const LDT: u32 = 2;
    pub const TSS16_BUSY: u32 = 3;
    pub const CALL16: u32 = 4;
    pub const TASK_GATE: u32 = 5;
    pub const INT16: u32 = 6;
    pub const TRAP16: u32 = 7;
    pub const TSS32: u32 = 9;
    pub const TSS32_BUSY: u32 = 11;
    pub const CALL32: u32 = 12;
    pub const INT32: u32 = 14;
    pub const TRAP32: u32 = 15;
}

/// A descriptor's eight bytes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Descriptor(pub u64);

impl Descriptor {
    pub const fn base(self) -> u64 {
        self.0 >> 16 & 0xff_ffff | (self.0 >> 56 & 0xff) << 24
    }
    /// In bytes.
    pub const fn limit(self) -> u32 {
        let limit = (self.0 & 0xffff | self.0 >> 32 & 0xf_0000) as u32;
        if self.0 & 1 << 55 != 0 { limit << 12 | 0xfff } else { limit }
    }
    /// As [`Segment::attributes`].
    pub const fn attributes(self) -> u32 {
        (self.0 >> 40) as u32 & attr::ALL & !attr::UNUSABLE
    }
    pub const fn kind(self) -> u32 {
        (self.0 >> 40) as u32 & 15
    }
    pub const fn dpl(self) -> u8 {
        (self.0 >> 45 & 3) as u8
    }
    pub const fn present(self) -> bool {
        self.0 & 1 << 47 != 0
    }
    /// Code or data, not a system descriptor.
    pub const fn is_segment(self) -> bool {
        self.0 & 1 << 44 != 0
    }
    pub const fn is_code(self) -> bool {
        self.is_segment() && self.kind() & 8 != 0
    }
    pub const fn is_data(self) -> bool {
        self.is_segment() && self.kind() & 8 == 0
    }
    pub const fn conforming(self) -> bool {
        self.is_code() && self.kind() & 4 != 0
    }
    pub const fn readable(self) -> bool {
        self.is_data() || self.kind() & 2 != 0
    }
    pub const fn writable(self) -> bool {
        self.is_data() && self.kind() & 2 != 0
    }
    /// 64-bit code.
    pub const fn long(self) -> bool {
        self.0 & 1 << 53 != 0
    }
    /// D/B.
    pub const fn big(self) -> bool {
        self.0 & 1 << 54 != 0
    }
    /// The segment register it makes.
    pub const fn segment(self, selector: u16) -> Segment {
        Segment { selector, base: self.base(), limit: self.limit(), attributes: self.attributes() }
    }
    /// Gates: selector and offset of 32 bits.
    pub const fn gate(self) -> (u16, u64) {
        ((self.0 >> 16) as u16, self.0 & 0xffff | (self.0 >> 48) << 16)
    }
}

/// The linear address of a selector's descriptor; `None` past the table's limit, or without an LDT.
pub fn descriptor_address(st: &State, selector: u16, bytes: u32) -> Option<u64> {
    let offset = u32::from(selector & !7);
    let (base, limit) = if selector & 4 == 0 {
        (st.gdtr.base, u32::from(st.gdtr.limit))
    } else {
        if st.ldtr.attributes & attr::UNUSABLE != 0 || st.ldtr.attributes & attr::P == 0 {
            return None;
        }
        (st.ldtr.base, st.ldtr.limit)
    };
    (offset + bytes - 1 <= limit).then(|| base.wrapping_add(u64::from(offset)))
}

/// Reads a descriptor; outside of its table, `fault(selector)`.
///
/// # Errors
/// `fault`, or a page fault.
pub fn fetch<H: Host + ?Sized>(h: &mut H, selector: u16, fault: fn(u16) -> Exception) -> Result<Descriptor> {
    let at = descriptor_address(h.st(), selector, 8).ok_or(fault(selector))?;
    Ok(Descriptor(h.table_read(at, 8)?))
}

/// Sets the accessed bit of a descriptor in memory, by a locked cycle (SDM section 9.1.2.1).
pub fn mark_accessed<H: Host + ?Sized>(h: &mut H, selector: u16, d: Descriptor) -> Result<Descriptor> {
    let accessed = Descriptor(d.0 | 1 << 40);
    if accessed != d
        && let Some(at) = descriptor_address(h.st(), selector, 8)
    {
        h.table_change(at.wrapping_add(5), 1, 0)?;
    }
    Ok(accessed)
}

/// Puts a segment register's contents in place.
pub fn set_segment<H: Host + ?Sized>(h: &mut H, seg: usize, segment: Segment) {
    if h.st().seg[seg] == segment {
        return;
    }
    let old = h.st().code_mode();
    h.st_mut().seg[seg] = segment;
    h.base_changed(seg);
    if h.st().code_mode() != old {
        h.mode_changed();
    }
}

/// Goes to privilege level `cpl` with another code segment and, if the stack's changes too, stack segment: all at once,
/// since what depends on them is found anew each time.
pub fn change_level<H: Host + ?Sized>(h: &mut H, cpl: u8, code: Segment, stack: Option<Segment>) {
    let st = h.st_mut();
    let old = (st.cpl, st.seg[CS], st.seg[SS]);
    let new = (cpl, code, stack.unwrap_or(old.2));
    if old == new {
        return;
    }
    (st.cpl, st.seg[CS], st.seg[SS]) = new;
    for (seg, old, new) in [(CS, old.1, new.1), (SS, old.2, new.2)] {
        if old.base != new.base {
            h.base_changed(seg);
        }
    }
    h.mode_changed();
}

/// Loads a segment register with a selector, as MOV, POP and LxS do. Not CS.
///
/// # Errors
/// As SDM volume 2 "MOV" says.
pub fn load<H: Host + ?Sized>(h: &mut H, seg: usize, selector: u16) -> Result<()> {
    match h.st().mode() {
        // The attributes, the limit among them, stay ("unreal mode").
        Mode::Real => {
            let segment = Segment { selector, base: u64::from(selector) << 4, ..h.st().seg[seg] };
            set_segment(h, seg, segment);
            return Ok(());
        }
        Mode::V86 => {
            set_segment(h, seg, v86_segment(selector));
            return Ok(());
        }
        Mode::Protected | Mode::Long => {}
    }
    let cpl = h.st().cpl;
    if selector & !3 == 0 {
        if seg == SS && !(h.st().is_64bit() && cpl != 3 && selector & 3 == u16::from(cpl)) {
            return Err(Exception::GP0);
        }
        set_segment(h, seg, null_segment(h.st(), seg, selector));
        return Ok(());
    }
    let d = fetch(h, selector, Exception::gp_sel)?;
    if seg == SS {
        check_stack(selector, d, cpl, Exception::gp_sel)?;
    } else {
        let rpl = (selector & 3) as u8;
        let private = !d.conforming() && (rpl > d.dpl() || cpl > d.dpl());
        if !d.is_segment() || !d.readable() || private {
            return Err(Exception::gp_sel(selector));
        }
        if !d.present() {
            return Err(Exception::np(selector));
        }
    }
    let d = mark_accessed(h, selector, d)?;
    set_segment(h, seg, d.segment(selector));
    Ok(())
}

/// A stack segment must be writable data of exactly the privilege level `cpl`.
///
/// # Errors
/// `wrong(selector)`, or `#SS(selector)` if it is not present.
pub fn check_stack(selector: u16, d: Descriptor, cpl: u8, wrong: fn(u16) -> Exception) -> Result<()> {
    if selector & 3 != u16::from(cpl) || !d.writable() || d.dpl() != cpl {
        return Err(wrong(selector));
    }
    if !d.present() {
        return Err(Exception::ss(u32::from(selector) & 0xfffc));
    }
    Ok(())
}

/// A null selector: the segment cannot be used. In 64-bit mode FS and GS lose their base, and a null SS keeps the
/// privilege level in its DPL.
pub fn null_segment(st: &State, seg: usize, selector: u16) -> Segment {
    let mut segment = Segment { selector, ..Segment::UNUSABLE };
    if seg == SS {
        segment.attributes |= u32::from(st.cpl) << attr::DPL_SHIFT | attr::DB;
    }
    segment
}

/// A segment of virtual-8086 mode (SDM volume 3 section 21.2.1).
pub const fn v86_segment(selector: u16) -> Segment {
    Segment::real(selector, attr::DATA | 3 << attr::DPL_SHIFT)
}

/// Loads CS in real or virtual-8086 mode.
pub fn load_real_cs<H: Host + ?Sized>(h: &mut H, selector: u16) {
    let segment = match h.st().mode() {
        Mode::V86 => v86_segment(selector),
        _ => Segment { selector, base: u64::from(selector) << 4, ..h.st().seg[CS] },
    };
    set_segment(h, CS, segment);
}

/// Checks an access of `bytes` at `offset` in a segment and makes its linear address, outside of 64-bit mode
/// (SDM volume 3 sections 6.3 and 6.5).
///
/// # Errors
/// `#GP(0)`, or `#SS(0)` of the stack segment.
pub fn linear(st: &State, seg: usize, offset: u64, bytes: u32, write: bool) -> Result<u64> {
    let s = &st.seg[seg];
    let fault = if seg == SS { Exception::ss(0) } else { Exception::GP0 };
    if st.is_64bit() {
        let base = if seg == FS || seg == GS { s.base } else { 0 };
        let va = base.wrapping_add(offset);
        let last = va.wrapping_add(u64::from(bytes.max(1)) - 1);
        return if st.canonical(va) && st.canonical(last) { Ok(va) } else { Err(fault) };
    }
    let protected = st.cr0 & CR0_PE != 0 && st.flags & RFLAGS_VM == 0;
    if protected {
        if s.attributes & attr::UNUSABLE != 0 || s.attributes & attr::P == 0 {
            return Err(fault);
        }
        let code = s.attributes & 8 != 0;
        let right = s.attributes & 2 != 0;
        let allowed = if write { !code && right } else { !code || right };
        if !allowed {
            return Err(fault);
        }
    }
    if !in_limit(s, offset, bytes) {
        return Err(fault);
    }
    Ok(s.base.wrapping_add(offset) & 0xffff_ffff)
}

/// As [`linear`], of a byte whose cache line is flushed: code that may only be executed will do, too (SDM and APM volume
/// 3 "CLFLUSH").
///
/// # Errors
/// `#GP(0)`, `#SS(0)`
pub fn linear_to_flush(st: &State, seg: usize, offset: u64) -> Result<u64> {
    let s = &st.seg[seg];
    let executed = s.attributes & (attr::UNUSABLE | attr::P | 0xa) == attr::P | 8;
    if st.is_64bit() || !executed {
        return linear(st, seg, offset, 1, false);
    }
    if in_limit(s, offset, 1) { Ok(s.base.wrapping_add(offset) & 0xffff_ffff) } else { Err(Exception::GP0) }
}

/// Whether `bytes` from `offset` on are inside the limit, for expand-down segments above it.
pub fn in_limit(s: &Segment, offset: u64, bytes: u32) -> bool {
    let Some(last) = (offset & 0xffff_ffff).checked_add(u64::from(bytes.max(1)) - 1) else { return false };
    let limit = u64::from(s.limit);
    if s.attributes & 0xc == 4 && s.attributes & attr::S != 0 {
        let top = if s.attributes & attr::DB != 0 { 0xffff_ffff } else { 0xffff };
        return offset > limit && last <= top;
    }
    last <= limit
}

/// LLDT (SDM volume 2).
///
/// # Errors
/// As the manual says.
pub fn load_ldtr<H: Host + ?Sized>(h: &mut H, selector: u16) -> Result<()> {
    if selector & !3 == 0 {
        h.st_mut().ldtr = Segment { selector, ..Segment::UNUSABLE };
        return Ok(());
    }
    if selector & 4 != 0 {
        return Err(Exception::gp_sel(selector));
    }
    let (d, high) = system_descriptor(h, selector, Exception::gp_sel)?;
    if d.is_segment() || d.kind() != system::LDT {
        return Err(Exception::gp_sel(selector));
    }
    if !d.present() {
        return Err(Exception::np(selector));
    }
    let mut segment = d.segment(selector);
    segment.base |= high << 32;
    h.st_mut().ldtr = segment;
    Ok(())
}

/// LTR.
///
/// # Errors
/// As the manual says.
pub fn load_tr<H: Host + ?Sized>(h: &mut H, selector: u16) -> Result<()> {
    if selector & !3 == 0 {
        return Err(Exception::GP0);
    }
    if selector & 4 != 0 {
        return Err(Exception::gp_sel(selector));
    }
    let (d, high) = system_descriptor(h, selector, Exception::gp_sel)?;
    let available = d.kind() == system::TSS32 || d.kind() == system::TSS16 && !h.st().long();
    if d.is_segment() || !available {
        return Err(Exception::gp_sel(selector));
    }
    if !d.present() {
        return Err(Exception::np(selector));
    }
    // Another processor may have taken it meanwhile.
    if !set_busy(h, selector, true)? {
        return Err(Exception::gp_sel(selector));
    }
    let mut segment = Descriptor(d.0 | 2 << 40).segment(selector);
    segment.base |= high << 32;
    h.st_mut().tr = segment;
    Ok(())
}

/// Sets or clears a TSS descriptor's busy bit, by a locked cycle (SDM section 9.1.2.1); false if it was so already.
///
/// # Errors
/// A page fault.
pub fn set_busy<H: Host + ?Sized>(h: &mut H, selector: u16, busy: bool) -> Result<bool> {
    let Some(at) = descriptor_address(h.st(), selector, 8) else { return Err(Exception::gp_sel(selector)) };
    let (set, clear) = if busy { (2, 0) } else { (0, 2) };
    let old = h.table_change(at.wrapping_add(5), set, clear)?;
    Ok((old & 2 != 0) != busy)
}

/// A system descriptor, and the upper half of its base: in long mode it has sixteen bytes.
fn system_descriptor<H: Host + ?Sized>(
    h: &mut H,
    selector: u16,
    fault: fn(u16) -> Exception,
) -> Result<(Descriptor, u64)> {
    let d = fetch(h, selector, fault)?;
    if !h.st().long() {
        return Ok((d, 0));
    }
    let at = descriptor_address(h.st(), selector, 16).ok_or(fault(selector))?;
    let high = h.table_read(at.wrapping_add(8), 8)?;
    if high >> 40 & 0x1f != 0 {
        return Err(fault(selector));
    }
    let base = high << 32 | d.base();
    if !h.st().canonical_base(base) {
        return Err(fault(selector));
    }
    Ok((d, high & 0xffff_ffff))
}

/// What LAR, LSL, VERR and VERW look at: the descriptor, if the selector may be examined.
fn examine<H: Host + ?Sized>(h: &mut H, selector: u16) -> Result<Option<Descriptor>> {
    if selector & !3 == 0 || descriptor_address(h.st(), selector, 8).is_none() {
        return Ok(None);
    }
    let d = fetch(h, selector, Exception::gp_sel)?;
    let rpl = (selector & 3) as u8;
    let hidden = !d.conforming() && (h.st().cpl > d.dpl() || rpl > d.dpl());
    Ok((!hidden).then_some(d))
}

/// LAR: the access rights, if the selector may be examined.
///
/// # Errors
/// A page fault.
pub fn access_rights<H: Host + ?Sized>(h: &mut H, selector: u16) -> Result<Option<u32>> {
    use system::*;
    let long = h.st().long();
    let valid = |d: &Descriptor| {
        d.is_segment()
            || matches!(d.kind(), LDT | TSS32 | TSS32_BUSY | CALL32)
            || !long && matches!(d.kind(), TSS16 | TSS16_BUSY | CALL16 | TASK_GATE)
    };
    Ok(examine(h, selector)?.filter(valid).map(|d| (d.0 >> 32) as u32 & 0x00ff_ff00))
}

/// LSL: the limit in bytes, if the selector may be examined.
///
/// # Errors
/// A page fault.
pub fn limit<H: Host + ?Sized>(h: &mut H, selector: u16) -> Result<Option<u32>> {
    use system::*;
    let long = h.st().long();
    let valid = |d: &Descriptor| {
        d.is_segment()
            || matches!(d.kind(), LDT | TSS32 | TSS32_BUSY)
            || !long && matches!(d.kind(), TSS16 | TSS16_BUSY)
    };
    Ok(examine(h, selector)?.filter(valid).map(Descriptor::limit))
}

/// VERR and VERW.
///
/// # Errors
/// A page fault.
pub fn verify<H: Host + ?Sized>(h: &mut H, selector: u16, write: bool) -> Result<bool> {
    let right = |d: Descriptor| d.is_segment() && if write { d.writable() } else { d.readable() };
    Ok(examine(h, selector)?.is_some_and(right))
}
