//! System management mode: entry by an SMI, the state save area, RSM.
//!
//! Spec: SDM volume 3 chapter 32 (32.3 entry, 32.4 and table 32-1 the save area of 32-bit processors, 32.10 auto-halt,
//! 32.11 relocation, 32.12 restarted I/O instructions), APM volume 2 section 10.2 (table 10-1, the save area of 64-bit processors, which firmware for
//! emulated machines expects of every processor with long mode). Hidden parts of segments have no place in table
//! 32-1; they are where its reserved bytes are, and so is what an I/O instruction is restarted with: the registers from
//! before it. (The revision is one below 30004H, which has no I/O state fields.)
//! An SMI is taken behind the instruction whose port access raised it; DEBUGCTL stays as it is (there is no
//! FREEZE_WHILE_SMM). Left out: the dual-monitor treatment.

use mimus_arch::x86::regs::*;
use mimus_arch::x86::state::{Segment, TableRegister, attr};

use crate::control;
use crate::debugging::SINGLE_STEP;
use crate::host::{Flush, Host, Stop};
use crate::paging;
use crate::segment::set_segment;
use crate::state::{ARITH, CS, DS, ES, FS, GS, SS, SYSTEM};

/// SMBASE at reset.
pub const SMBASE_RESET: u64 = 0x3_0000;
/// Offset from SMBASE of the handler.
const HANDLER: u64 = 0x8000;
/// Offset from SMBASE that the tables count from.
const AREA: u64 = 0x8000;
/// Revision: SMBASE can be relocated, I/O instructions can be restarted; the lower half is the layout.
const REVISION_CAN: u32 = 1 << 17 | 1 << 16;
const REVISION_32: u32 = REVISION_CAN;
const REVISION_64: u32 = REVISION_CAN | 0x64;
/// What a handler writes to the I/O restart field.
const RESTART: u64 = 0xff;
const AUTO_HALT: u64 = 1;

/// Access rights as they are saved: those of a descriptor.
const SAVED_RIGHTS: u32 = 0xf0ff;

/// Offsets in the 64-bit area.
mod at64 {
    pub const SEGMENTS: [u64; 6] = [0x7e00, 0x7e10, 0x7e20, 0x7e30, 0x7e40, 0x7e50];
    pub const GDTR: u64 = 0x7e60;
    pub const LDTR: u64 = 0x7e70;
    pub const IDTR: u64 = 0x7e80;
    pub const TR: u64 = 0x7e90;
    pub const IO_RIP: u64 = 0x7ea0;
    pub const IO_RCX: u64 = 0x7ea8;
    pub const IO_RSI: u64 = 0x7eb0;
    pub const IO_RDI: u64 = 0x7eb8;
    pub const IO_TRAP: u64 = 0x7ec0;
    pub const IO_RESTART: u64 = 0x7ec8;
    pub const AUTO_HALT: u64 = 0x7ec9;
    pub const EFER: u64 = 0x7ed0;
    pub const REVISION: u64 = 0x7efc;
    pub const SMBASE: u64 = 0x7f00;
    pub const CR4: u64 = 0x7f48;
    pub const CR3: u64 = 0x7f50;
    pub const CR0: u64 = 0x7f58;
    pub const DR7: u64 = 0x7f60;
    pub const DR6: u64 = 0x7f68;
    pub const RFLAGS: u64 = 0x7f70;
    pub const RIP: u64 = 0x7f78;
    /// RAX; the others follow downwards.
    pub const RAX: u64 = 0x7ff8;
}

/// Offsets in the 32-bit area.
mod at32 {
    pub const SMBASE: u64 = 0x7ef8;
    pub const REVISION: u64 = 0x7efc;
    pub const IO_RESTART: u64 = 0x7f00;
    pub const AUTO_HALT: u64 = 0x7f02;
    pub const IO_EDI: u64 = 0x7f04;
    pub const IO_ECX: u64 = 0x7f08;
    pub const IO_ESI: u64 = 0x7f0c;
    pub const IO_EIP: u64 = 0x7f10;
    pub const CR4: u64 = 0x7f14;
    /// Access rights, limit and base of ES, CS, SS, DS, FS, GS.
    pub const HIDDEN: [u64; 6] = [0x7f84, 0x7f90, 0x7f9c, 0x7f2c, 0x7f38, 0x7f44];
    /// ES; the others follow upwards.
    pub const SELECTORS: u64 = 0x7fa8;
    pub const IDTR: u64 = 0x7f54;
    pub const TR_HIDDEN: u64 = 0x7f5c;
    pub const GDTR: u64 = 0x7f70;
    pub const LDTR_HIDDEN: u64 = 0x7f78;
    pub const LDTR: u64 = 0x7fc0;
    pub const TR: u64 = 0x7fc4;
    pub const DR7: u64 = 0x7fc8;
    pub const DR6: u64 = 0x7fcc;
    /// EAX; the others follow upwards.
    pub const EAX: u64 = 0x7fd0;
    pub const EIP: u64 = 0x7ff0;
    pub const EFLAGS: u64 = 0x7ff4;
    pub const CR3: u64 = 0x7ff8;
    pub const CR0: u64 = 0x7ffc;
}

/// What RSM brings back, but for general registers.
struct Saved {
    seg: [Segment; 6],
    ldtr: Segment,
    tr: Segment,
    gdtr: TableRegister,
    idtr: TableRegister,
    cr0: u64,
    cr3: u64,
    cr4: u64,
    efer: u64,
    dr6: u64,
    dr7: u64,
    rflags: u64,
    rip: u64,
    smbase: u64,
    auto_halt: bool,
    /// What a restarted I/O instruction begins with.
    restart: Option<Restart>,
    /// The debug exceptions that wait, as in DR6.
    debug: u64,
}

/// Where an I/O instruction is, and its registers from before it.
#[derive(Clone, Copy)]
struct Restart {
    ip: u64,
    rcx: u64,
    rsi: u64,
    rdi: u64,
}

/// An access to a port during which an SMI came.
#[derive(Clone, Copy, Debug)]
pub struct PortAccess {
    pub port: u16,
    pub bytes: u32,
    /// IN or INS.
    pub reads: bool,
    pub string: bool,
    pub repeated: bool,
    /// Offset in CS of the instruction.
    pub ip: u64,
    pub rcx: u64,
    pub rsi: u64,
    pub rdi: u64,
    /// The linear address that is next behind it.
    pub goes_on_at: u64,
    /// The debug exceptions that wait, as in DR6.
    pub debug: u64,
}

/// How RSM goes on.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Resumed {
    Running,
    /// The interrupted HLT goes on waiting.
    Halted,
    /// With the debug exception that the SMI came before.
    Debug(u64),
}

impl PortAccess {
    /// The I/O trap doubleword of the 64-bit area.
    fn word(&self) -> u64 {
        let bit = |n: u32, on: bool| u64::from(on) << n;
        let size = u64::from(self.bytes & 7) << 4;
        let what = bit(0, self.reads) | bit(1, true) | bit(2, self.string) | bit(3, self.repeated) | size;
        what | bit(11, self.debug & SINGLE_STEP != 0) | (self.debug & 15) << 12 | u64::from(self.port) << 16
    }
}

/// The debug exceptions that an I/O trap doubleword says wait.
fn waiting_debug(word: u64) -> u64 {
    let step = if word >> 11 & 1 != 0 { SINGLE_STEP } else { 0 };
    if word & 2 == 0 { 0 } else { word >> 12 & 15 | step }
}

/// Takes an SMI between two instructions. `ip` is the next one's; `halted`: the last was HLT, which still waits; `access`:
/// it was the I/O instruction that raised the SMI.
pub fn enter<H: Host + ?Sized>(h: &mut H, ip: u64, halted: bool, access: Option<PortAccess>) {
    let st = h.st_mut();
    st.smm = true;
    st.smm_inside_nmi = st.nmi_masked;
    st.nmi_masked = true;
    (st.shadow, st.shadow_ss) = (false, false);
    h.smm_changed();
    let at = h.st().msrs.smbase.wrapping_add(AREA) & 0xffff_ffff;
    if h.st().features.long_mode {
        save_64(h, at, ip, halted);
        save_access_64(h, at, ip, access);
    } else {
        save_32(h, at, ip, halted);
        save_access_32(h, at, ip, access);
    }
    enter_state(h);
}

/// SDM section 32.3 and table 32-4.
fn enter_state<H: Host + ?Sized>(h: &mut H) {
    h.set_rflags(0, ARITH | SYSTEM);
    let st = h.st_mut();
    let base = st.msrs.smbase;
    st.cr0 &= !(CR0_PE | CR0_EM | CR0_TS | CR0_PG);
    st.cr4 = 0;
    st.efer = 0;
    st.dr7 = DR7_FIXED;
    // No handler of the interrupted program may run.
    st.idtr = TableRegister::default();
    let rights = attr::DATA | attr::G;
    set_segment(h, CS, Segment { selector: (base >> 4) as u16, base, limit: u32::MAX, attributes: rights });
    for seg in [ES, SS, DS, FS, GS] {
        set_segment(h, seg, Segment { selector: 0, base: 0, limit: u32::MAX, attributes: rights });
    }
    h.set_cpl(0);
    h.flush(Flush::All);
    h.mode_changed();
    h.set_ip(HANDLER);
}

fn put<H: Host + ?Sized>(h: &mut H, at: u64, bytes: u32, value: u64) {
    h.phys_write(at, bytes, value);
}

fn rights(s: &Segment) -> u64 {
    u64::from(s.attributes & SAVED_RIGHTS)
}

/// A segment register from what is saved of it; one that is not present was a null selector's.
fn segment(selector: u64, attributes: u64, limit: u64, base: u64) -> Segment {
    let attributes = attributes as u32 & SAVED_RIGHTS;
    let unusable = if attributes & attr::P == 0 { attr::UNUSABLE } else { 0 };
    Segment { selector: selector as u16, base, limit: limit as u32, attributes: attributes | unusable }
}

/// SS with the privilege level where it is kept.
fn stack_segment<H: Host + ?Sized>(h: &H) -> Segment {
    let (ss, cpl) = (h.st().seg[SS], u32::from(h.st().cpl));
    Segment { attributes: ss.attributes & !(3 << attr::DPL_SHIFT) | cpl << attr::DPL_SHIFT, ..ss }
}

fn segments<H: Host + ?Sized>(h: &H) -> [Segment; 6] {
    let mut seg = h.st().seg;
    seg[SS] = stack_segment(h);
    seg
}

fn save_64<H: Host + ?Sized>(h: &mut H, area: u64, ip: u64, halted: bool) {
    use at64::*;
    let named = SEGMENTS.into_iter().zip(segments(h)).chain([(LDTR, h.st().ldtr), (TR, h.st().tr)]);
    for (at, s) in named.collect::<Vec<_>>() {
        put(h, area + at, 2, s.selector.into());
        put(h, area + at + 2, 2, rights(&s));
        put(h, area + at + 4, 4, s.limit.into());
        put(h, area + at + 8, 8, s.base);
    }
    for (at, table) in [(GDTR, h.st().gdtr), (IDTR, h.st().idtr)] {
        put(h, area + at + 4, 4, table.limit.into());
        put(h, area + at + 8, 8, table.base);
    }
    for n in 0..16 {
        let value = h.gpr(n);
        put(h, area + RAX - 8 * n as u64, 8, value);
    }
    let rflags = h.rflags();
    let st = h.st();
    let words = [
        (EFER, 8, st.efer),
        (CR0, 8, st.cr0),
        (CR3, 8, st.cr3),
        (CR4, 8, st.cr4),
        (DR6, 8, st.dr6),
        (DR7, 8, st.dr7),
        (RFLAGS, 8, rflags),
        (RIP, 8, ip),
        (REVISION, 4, REVISION_64.into()),
        (SMBASE, 4, st.msrs.smbase),
        (AUTO_HALT, 1, u64::from(halted)),
    ];
    words.into_iter().for_each(|(at, bytes, value)| put(h, area + at, bytes, value));
}

fn save_32<H: Host + ?Sized>(h: &mut H, area: u64, ip: u64, halted: bool) {
    use at32::*;
    let selectors = (0..6).map(|n| SELECTORS + 4 * n);
    let named = selectors.zip(HIDDEN).zip(segments(h));
    let named: Vec<_> = named.chain([((LDTR, LDTR_HIDDEN), h.st().ldtr), ((TR, TR_HIDDEN), h.st().tr)]).collect();
    for ((selector, hidden), s) in named {
        put(h, area + selector, 4, s.selector.into());
        put(h, area + hidden, 4, rights(&s));
        put(h, area + hidden + 4, 4, s.limit.into());
        put(h, area + hidden + 8, 4, s.base);
    }
    for (at, table) in [(GDTR, h.st().gdtr), (IDTR, h.st().idtr)] {
        put(h, area + at, 4, table.limit.into());
        put(h, area + at + 4, 4, table.base);
    }
    for n in 0..8 {
        let value = h.gpr(n);
        put(h, area + EAX + 4 * n as u64, 4, value);
    }
    let rflags = h.rflags();
    let st = h.st();
    let words = [
        (CR0, 4, st.cr0),
        (CR3, 4, st.cr3),
        (CR4, 4, st.cr4),
        (DR6, 4, st.dr6),
        (DR7, 4, st.dr7),
        (EFLAGS, 4, rflags),
        (EIP, 4, ip),
        (REVISION, 4, REVISION_32.into()),
        (SMBASE, 4, st.msrs.smbase),
        (AUTO_HALT, 2, u64::from(halted)),
    ];
    words.into_iter().for_each(|(at, bytes, value)| put(h, area + at, bytes, value));
}

/// Without an I/O instruction, what is restarted is the next one.
fn restart<H: Host + ?Sized>(h: &H, ip: u64, access: Option<PortAccess>) -> Restart {
    match access {
        Some(PortAccess { ip, rcx, rsi, rdi, .. }) => Restart { ip, rcx, rsi, rdi },
        None => Restart { ip, rcx: h.gpr(RCX), rsi: h.gpr(RSI), rdi: h.gpr(RDI) },
    }
}

fn save_access_64<H: Host + ?Sized>(h: &mut H, area: u64, ip: u64, access: Option<PortAccess>) {
    use at64::*;
    let r = restart(h, ip, access);
    for (at, value) in [(IO_RIP, r.ip), (IO_RCX, r.rcx), (IO_RSI, r.rsi), (IO_RDI, r.rdi)] {
        put(h, area + at, 8, value);
    }
    put(h, area + IO_TRAP, 4, access.map_or(0, |a| a.word()));
    put(h, area + IO_RESTART, 1, 0);
}

fn save_access_32<H: Host + ?Sized>(h: &mut H, area: u64, ip: u64, access: Option<PortAccess>) {
    use at32::*;
    let r = restart(h, ip, access);
    for (at, value) in [(IO_EIP, r.ip), (IO_ECX, r.rcx), (IO_ESI, r.rsi), (IO_EDI, r.rdi)] {
        put(h, area + at, 4, value);
    }
    put(h, area + IO_RESTART, 2, 0);
}

fn load_64<H: Host + ?Sized>(h: &mut H, area: u64) -> Saved {
    use at64::*;
    let mut get = |at: u64, bytes: u32| h.phys_read(area + at, bytes);
    let mut seg = |at: u64| segment(get(at, 2), get(at + 2, 2), get(at + 4, 4), get(at + 8, 8));
    let (six, ldtr, tr) = (SEGMENTS.map(&mut seg), seg(LDTR), seg(TR));
    let mut table = |at: u64| TableRegister { limit: get(at + 4, 2) as u16, base: get(at + 8, 8) };
    let (gdtr, idtr) = (table(GDTR), table(IDTR));
    let saved = Saved {
        seg: six,
        ldtr,
        tr,
        gdtr,
        idtr,
        cr0: get(CR0, 8),
        cr3: get(CR3, 8),
        cr4: get(CR4, 8),
        efer: get(EFER, 8),
        dr6: get(DR6, 8),
        dr7: get(DR7, 8),
        rflags: get(RFLAGS, 8),
        rip: get(RIP, 8),
        smbase: get(SMBASE, 4),
        auto_halt: get(AUTO_HALT, 1) & self::AUTO_HALT != 0,
        restart: (get(IO_RESTART, 1) == RESTART).then(|| Restart {
            ip: get(IO_RIP, 8),
            rcx: get(IO_RCX, 8),
            rsi: get(IO_RSI, 8),
            rdi: get(IO_RDI, 8),
        }),
        debug: waiting_debug(get(IO_TRAP, 4)),
    };
    for n in 0..16 {
        let value = h.phys_read(area + RAX - 8 * n as u64, 8);
        h.set_gpr(n, value);
    }
    saved
}

fn load_32<H: Host + ?Sized>(h: &mut H, area: u64) -> Saved {
    use at32::*;
    let mut get = |at: u64| h.phys_read(area + at, 4);
    let mut seg = |selector: u64, hidden: u64| segment(get(selector), get(hidden), get(hidden + 4), get(hidden + 8));
    let six = std::array::from_fn(|n| seg(SELECTORS + 4 * n as u64, HIDDEN[n]));
    let (ldtr, tr) = (seg(LDTR, LDTR_HIDDEN), seg(TR, TR_HIDDEN));
    let mut table = |at: u64| TableRegister { limit: get(at) as u16, base: get(at + 4) };
    let (gdtr, idtr) = (table(GDTR), table(IDTR));
    let saved = Saved {
        seg: six,
        ldtr,
        tr,
        gdtr,
        idtr,
        cr0: get(CR0),
        cr3: get(CR3),
        cr4: get(CR4),
        efer: 0,
        dr6: get(DR6),
        dr7: get(DR7),
        rflags: get(EFLAGS),
        rip: get(EIP),
        smbase: get(SMBASE),
        auto_halt: get(AUTO_HALT & !3) >> (8 * (AUTO_HALT & 3)) & self::AUTO_HALT != 0,
        restart: (get(IO_RESTART) & 0xffff == RESTART).then(|| Restart {
            ip: get(IO_EIP),
            rcx: get(IO_ECX),
            rsi: get(IO_ESI),
            rdi: get(IO_EDI),
        }),
        debug: 0,
    };
    for n in 0..8 {
        let value = h.phys_read(area + EAX + 4 * n as u64, 4);
        h.set_gpr(n, value);
    }
    saved
}

/// RSM: leaves the mode. A state that cannot be shuts the processor down
/// (SDM section 32.3.1).
pub fn resume<H: Host + ?Sized>(h: &mut H) -> Resumed {
    let area = h.st().msrs.smbase.wrapping_add(AREA) & 0xffff_ffff;
    let mut saved = if h.st().features.long_mode { load_64(h, area) } else { load_32(h, area) };
    if let Some(restart) = saved.restart {
        saved.rip = restart.ip;
        for (n, value) in [(RCX, restart.rcx), (RSI, restart.rsi), (RDI, restart.rdi)] {
            h.set_gpr(n, value);
        }
        // It meets them again.
        saved.debug = 0;
    }
    let st = h.st_mut();
    st.smm = false;
    st.nmi_masked = st.smm_inside_nmi;
    st.smm_inside_nmi = false;
    h.smm_changed();
    if !possible(h, &saved) {
        let Saved { cr0, cr4, efer, .. } = saved;
        log::warn!("RSM to a state that cannot be: CR0 {cr0:#x}, CR4 {cr4:#x}, EFER {efer:#x}");
        h.stop(Stop::TripleFault);
        return Resumed::Running;
    }
    restore(h, &saved);
    if paging::uses_pdptrs(h.st()) && paging::load_pdptrs(h, saved.cr3).is_err() {
        h.stop(Stop::TripleFault);
        return Resumed::Running;
    }
    match saved.debug {
        0 if saved.auto_halt => Resumed::Halted,
        0 => Resumed::Running,
        debug => Resumed::Debug(debug),
    }
}

fn possible<H: Host + ?Sized>(h: &H, s: &Saved) -> bool {
    let st = h.st();
    let paging = s.cr0 & CR0_PG != 0;
    let long = active(s);
    // Neither 32-bit nor 64-bit code; addresses that the processor does not have.
    let code = s.seg[CS].attributes & (attr::L | attr::DB) != attr::L | attr::DB;
    let root = s.cr3 >> if long { u32::from(st.phys_bits) } else { 32 } == 0;
    // Their upper halves are reserved.
    let debug = (s.dr6 | s.dr7) >> 32 == 0;
    let cr0 = s.cr0 >> 32 == 0 && (!paging || s.cr0 & CR0_PE != 0) && (s.cr0 & CR0_NW == 0 || s.cr0 & CR0_CD != 0);
    let efer = s.efer & !(EFER_SCE | EFER_LME | EFER_LMA | EFER_NXE) == 0
        && (s.efer & (EFER_LME | EFER_LMA) == 0 || st.features.long_mode)
        && (!long || s.cr4 & CR4_PAE != 0 && code && s.rflags & RFLAGS_VM == 0)
        && (long || s.efer & EFER_LMA == 0);
    let wide = |n: usize| long && (n == FS || n == GS);
    let bases = s.seg.iter().enumerate().all(|(n, s)| s.base >> 32 == 0 || wide(n));
    cr0 && efer && bases && root && debug && s.cr4 & !st.features.cr4 == 0 && (long || s.cr4 & CR4_PCIDE == 0)
}

/// Whether long mode is active: LMA follows from what turns it on.
fn active(s: &Saved) -> bool {
    s.cr0 & CR0_PG != 0 && s.efer & EFER_LME != 0
}

fn restore<H: Host + ?Sized>(h: &mut H, s: &Saved) {
    let lma = if active(s) { EFER_LMA } else { 0 };
    let st = h.st_mut();
    st.cr0 = s.cr0 & control::CR0_ALL | CR0_ET;
    (st.cr3, st.cr4, st.efer) = (s.cr3, s.cr4, s.efer | lma);
    st.dr6 = s.dr6 & 0xe00f | DR6_FIXED;
    st.dr7 = s.dr7 & 0xffff_2bff | DR7_FIXED;
    (st.ldtr, st.tr, st.gdtr, st.idtr) = (s.ldtr, s.tr, s.gdtr, s.idtr);
    st.msrs.smbase = s.smbase;
    h.set_rflags(s.rflags, ARITH | SYSTEM);
    let protected = s.cr0 & CR0_PE != 0;
    let cpl = match protected {
        true if s.rflags & RFLAGS_VM != 0 => 3,
        true => s.seg[SS].dpl(),
        false => 0,
    };
    for (n, seg) in s.seg.into_iter().enumerate() {
        set_segment(h, n, seg);
    }
    h.set_cpl(cpl);
    h.flush(Flush::All);
    h.mode_changed();
    h.check_events();
    h.set_ip(s.rip);
    h.resume_flag_set();
}
