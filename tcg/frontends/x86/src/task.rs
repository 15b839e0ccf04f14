//! Task-state segments: stacks of inner levels, task switches, the I/O permission map.
//!
//! Spec: SDM volume 3 chapter 9; volume 1 section 19.5.2 (I/O permission).

use mimus_arch::x86::regs::*;
use mimus_arch::x86::state::{Segment, attr};

use crate::exception::{Exception, Result};
use crate::host::{Flush, Host};
use crate::segment::{self, check_stack, fetch, set_segment, system, v86_segment};
use crate::state::{CS, DS, ES, FS, GS, SS};

/// Why tasks switch.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Switch {
    Jump,
    Call,
    /// `resume`: the old task goes on with RF.
    Interrupt {
        resume: bool,
    },
    Return,
}

fn tss_read<H: Host + ?Sized>(h: &mut H, offset: u64, bytes: u32) -> Result<u64> {
    let tr = h.st().tr;
    if offset + u64::from(bytes) - 1 > u64::from(tr.limit) {
        return Err(Exception::ts(tr.selector));
    }
    let at = h.wrap(tr.base.wrapping_add(offset));
    h.table_read(at, bytes)
}

/// A stack pointer of a 64-bit TSS.
///
/// # Errors
/// `#TS` past the limit, a page fault, or `#SS(0)` if it is not canonical.
pub fn read_tss64<H: Host + ?Sized>(h: &mut H, offset: u64) -> Result<u64> {
    let sp = tss_read(h, offset, 8)?;
    if h.st().canonical(sp) { Ok(sp) } else { Err(Exception::ss(0)) }
}

/// The stack of privilege level `cpl` in a 16- or 32-bit TSS, checked.
///
/// # Errors
/// `#TS`, `#SS`, or a page fault.
pub fn inner_stack<H: Host + ?Sized>(h: &mut H, cpl: u8) -> Result<(Segment, u64)> {
    let level = u64::from(cpl);
    let (selector, sp) = if h.st().tr.attributes & 8 != 0 {
        (tss_read(h, 8 + 8 * level, 2)?, tss_read(h, 4 + 8 * level, 4)?)
    } else {
        (tss_read(h, 4 + 4 * level, 2)?, tss_read(h, 2 + 4 * level, 2)?)
    };
    let selector = selector as u16;
    if selector & !3 == 0 {
        return Err(Exception::ts(selector));
    }
    let d = fetch(h, selector, Exception::ts)?;
    check_stack(selector, d, cpl, Exception::ts)?;
    let d = segment::mark_accessed(h, selector, d)?;
    Ok((d.segment(selector), sp))
}

/// Checks access to `bytes` ports from `port` on.
///
/// # Errors
/// `#GP(0)`
pub fn check_io<H: Host + ?Sized>(h: &mut H, port: u16, bytes: u32) -> Result<()> {
    let st = h.st();
    if st.cr0 & CR0_PE == 0 || st.flags & RFLAGS_VM == 0 && st.cpl <= st.iopl() {
        return Ok(());
    }
    if st.tr.attributes & 8 == 0 {
        return Err(Exception::GP0);
    }
    let denied = |_| Exception::GP0;
    let page = |e: Exception| if e.vector == VECTOR_PF { e } else { denied(e) };
    let map = tss_read(h, 0x66, 2).map_err(page)?;
    // Two bytes are always read.
    let bits = tss_read(h, map + u64::from(port / 8), 2).map_err(page)?;
    let wanted = ((1u64 << bytes) - 1) << (port % 8);
    if bits & wanted != 0 { Err(Exception::GP0) } else { Ok(()) }
}

/// Whether `INT n` of a virtual-8086 program goes to the system whatever its vector table says: a bit of the 32 bytes
/// below the I/O map (SDM section 21.3.3.5).
///
/// # Errors
/// `#GP(0)` if they are not in the task's segment; a page fault.
pub fn is_protected_vector<H: Host + ?Sized>(h: &mut H, vector: u8) -> Result<bool> {
    if h.st().tr.attributes & 8 == 0 {
        return Err(Exception::GP0);
    }
    let page = |e: Exception| if e.vector == VECTOR_PF { e } else { Exception::GP0 };
    let map = tss_read(h, 0x66, 2).map_err(page)?;
    let at = (map + u64::from(vector / 8)).checked_sub(32).ok_or(Exception::GP0)?;
    Ok(tss_read(h, at, 1).map_err(page)? >> (vector % 8) & 1 != 0)
}

/// Offsets in a 32-bit TSS (SDM figure 9-2).
mod tss32 {
    pub const LINK: u64 = 0;
    pub const CR3: u64 = 0x1c;
    pub const EIP: u64 = 0x20;
    pub const EFLAGS: u64 = 0x24;
    pub const GPR: u64 = 0x28;
    pub const SEG: u64 = 0x48;
    pub const LDT: u64 = 0x60;
    pub const TRAP: u64 = 0x64;
}

/// Offsets in a 16-bit TSS (SDM figure 9-10).
mod tss16 {
    pub const IP: u64 = 0xe;
    pub const FLAGS: u64 = 0x10;
    pub const GPR: u64 = 0x12;
    pub const SEG: u64 = 0x22;
    pub const LDT: u64 = 0x2a;
}

/// The registers of a task.
struct Task {
    cr3: Option<u64>,
    ip: u64,
    flags: u64,
    gpr: [u64; 8],
    seg: [u16; 6],
    ldt: u16,
    trap: bool,
}

/// Switches to the task of TSS `selector`; `ip` is where the old one goes on (SDM section 9.3). Answers where the new one
/// does.
///
/// # Errors
/// Those of section 9.3. Past the commit point the new task is in place and takes the exception
/// ([`crate::state::State::task_entry`]).
pub fn switch<H: Host + ?Sized>(h: &mut H, selector: u16, how: Switch, ip: u64) -> Result<u64> {
    let wrong = if how == Switch::Return { Exception::ts } else { Exception::gp_sel };
    if selector & 4 != 0 {
        return Err(wrong(selector));
    }
    let d = fetch(h, selector, wrong)?;
    let (free, busy) = match d.kind() & 8 {
        0 => (system::TSS16, system::TSS16_BUSY),
        _ => (system::TSS32, system::TSS32_BUSY),
    };
    let expected = if how == Switch::Return { busy } else { free };
    if d.is_segment() || d.kind() != expected {
        return Err(wrong(selector));
    }
    if !d.present() {
        return Err(Exception::np(selector));
    }
    let wide = d.kind() & 8 != 0;
    if d.limit() < if wide { 0x67 } else { 0x2b } {
        return Err(Exception::ts(selector));
    }
    let base = d.base();
    let new = read_task(h, base, wide)?;
    save_task(h, how, ip)?;
    let old = h.st().tr.selector;
    if matches!(how, Switch::Jump | Switch::Return) {
        segment::set_busy(h, old, false)?;
    }
    let nests = matches!(how, Switch::Call | Switch::Interrupt { .. });
    if nests {
        h.table_write(base + tss32::LINK, 2, u64::from(old))?;
    }
    if how != Switch::Return {
        segment::set_busy(h, selector, true)?;
    }
    let mut tr = d.segment(selector);
    tr.attributes |= 2;
    h.st_mut().tr = tr;
    h.st_mut().cr0 |= CR0_TS;
    h.st_mut().dr7 &= !0x155;
    let nested = if nests { RFLAGS_NT } else { 0 };
    if let Err(e) = load_task(h, &new, nested) {
        h.st_mut().task_entry = Some(new.ip);
        return Err(e);
    }
    h.resume_flag_set();
    Ok(new.ip)
}

fn read_task<H: Host + ?Sized>(h: &mut H, base: u64, wide: bool) -> Result<Task> {
    let mut at = |offset: u64, bytes: u32| h.table_read(base.wrapping_add(offset) & 0xffff_ffff, bytes);
    let mut task = Task { cr3: None, ip: 0, flags: 0, gpr: [0; 8], seg: [0; 6], ldt: 0, trap: false };
    if wide {
        task.cr3 = Some(at(tss32::CR3, 4)?);
        task.ip = at(tss32::EIP, 4)?;
        task.flags = at(tss32::EFLAGS, 4)?;
        for i in 0..8 {
            task.gpr[i] = at(tss32::GPR + 4 * i as u64, 4)?;
        }
        for i in 0..6 {
            task.seg[i] = at(tss32::SEG + 4 * i as u64, 2)? as u16;
        }
        task.ldt = at(tss32::LDT, 2)? as u16;
        task.trap = at(tss32::TRAP, 2)? & 1 != 0;
    } else {
        task.ip = at(tss16::IP, 2)?;
        task.flags = at(tss16::FLAGS, 2)?;
        for i in 0..8 {
            task.gpr[i] = at(tss16::GPR + 2 * i as u64, 2)? | 0xffff_0000;
        }
        for i in 0..4 {
            task.seg[i] = at(tss16::SEG + 2 * i as u64, 2)? as u16;
        }
        task.ldt = at(tss16::LDT, 2)? as u16;
    }
    Ok(task)
}

fn save_task<H: Host + ?Sized>(h: &mut H, how: Switch, ip: u64) -> Result<()> {
    let tr = h.st().tr;
    let mut flags = h.rflags();
    if how == Switch::Return {
        flags &= !RFLAGS_NT;
    }
    if how == (Switch::Interrupt { resume: true }) {
        flags |= RFLAGS_RF;
    }
    let wide = tr.attributes & 8 != 0;
    let (bytes, ip_at, flags_at, gpr_at, seg_at, segs) = if wide {
        (4, tss32::EIP, tss32::EFLAGS, tss32::GPR, tss32::SEG, 6)
    } else {
        (2, tss16::IP, tss16::FLAGS, tss16::GPR, tss16::SEG, 4)
    };
    let mut put =
        |offset: u64, bytes: u32, value: u64| h.table_write(tr.base.wrapping_add(offset) & 0xffff_ffff, bytes, value);
    put(ip_at, bytes, ip)?;
    put(flags_at, bytes, flags)?;
    for i in 0..8 {
        let value = h.gpr(i);
        h.table_write(tr.base + gpr_at + u64::from(bytes) * i as u64, bytes, value)?;
    }
    for i in 0..segs {
        let value = u64::from(h.st().seg[i].selector);
        h.table_write(tr.base + seg_at + u64::from(bytes) * i as u64, 2, value)?;
    }
    Ok(())
}

fn load_task<H: Host + ?Sized>(h: &mut H, task: &Task, nested: u64) -> Result<()> {
    if let Some(cr3) = task.cr3
        && h.st().cr0 & CR0_PG != 0
    {
        h.st_mut().cr3 = cr3;
        h.flush(Flush::NonGlobal(None));
        if crate::paging::uses_pdptrs(h.st()) {
            crate::paging::load_pdptrs(h, cr3)?;
        }
    }
    for (i, value) in task.gpr.into_iter().enumerate() {
        h.set_gpr(i, value);
    }
    h.set_rflags(task.flags | nested, !0);
    // First the selectors, so that a fault finds them; then what they stand for.
    for (i, selector) in task.seg.into_iter().enumerate() {
        set_segment(h, i, Segment { selector, ..Segment::UNUSABLE });
    }
    h.st_mut().ldtr = Segment { selector: task.ldt, ..Segment::UNUSABLE };
    h.set_cpl((task.seg[CS] & 3) as u8);
    h.set_ip(task.ip);
    load_ldt(h, task.ldt)?;
    if task.flags & RFLAGS_VM != 0 {
        for (i, selector) in task.seg.into_iter().enumerate() {
            set_segment(h, i, v86_segment(selector));
        }
        h.set_cpl(3);
    } else {
        load_segments(h, task)?;
    }
    h.set_ip(task.ip);
    if !segment::in_limit(&h.st().seg[CS], task.ip, 1) {
        return Err(Exception::GP0);
    }
    if task.trap {
        // BT in DR6; taken before the new task's first instruction.
        return Err(Exception { vector: VECTOR_DB, error: None, payload: 1 << 15 });
    }
    Ok(())
}

fn load_ldt<H: Host + ?Sized>(h: &mut H, selector: u16) -> Result<()> {
    segment::load_ldtr(h, selector).map_err(|e| if e.vector == VECTOR_PF { e } else { Exception::ts(selector) })
}

fn load_segments<H: Host + ?Sized>(h: &mut H, task: &Task) -> Result<()> {
    let as_ts = |selector: u16| move |e: Exception| if e.vector == VECTOR_GP { Exception::ts(selector) } else { e };
    let cs = task.seg[CS];
    let cpl = (cs & 3) as u8;
    let d = fetch(h, cs, Exception::ts)?;
    let fits = if d.conforming() { d.dpl() <= cpl } else { d.dpl() == cpl };
    if !d.is_code() || !fits {
        return Err(Exception::ts(cs));
    }
    if !d.present() {
        return Err(Exception::np(cs));
    }
    let d = segment::mark_accessed(h, cs, d)?;
    set_segment(h, CS, d.segment(cs));
    let ss = task.seg[SS];
    let d = fetch(h, ss, Exception::ts)?;
    check_stack(ss, d, cpl, Exception::ts)?;
    let d = segment::mark_accessed(h, ss, d)?;
    set_segment(h, SS, d.segment(ss));
    for seg in [ES, DS, FS, GS] {
        segment::load(h, seg, task.seg[seg]).map_err(as_ts(task.seg[seg]))?;
    }
    Ok(())
}

/// Whether TR holds a TSS that is in use: for state that comes from outside.
pub fn valid_tr(tr: &Segment) -> bool {
    tr.attributes & attr::UNUSABLE == 0
}
