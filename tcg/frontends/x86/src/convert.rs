//! To and from the state that the rest of the emulator exchanges.

use mimus_arch::x86::msr::DEBUGCTL_BTF;
use mimus_arch::x86::regs::*;
use mimus_arch::x86::state::{Events, Msr, X86State, attr};

use crate::control::valid_xcr0;
use crate::msr::Msrs;
use crate::state::{ARITH, CS, DS, ES, FS, FpuPointers, GS, SS, SYSTEM, State};

/// Bytes of the exchanged XSAVE area with AVX.
const WITH_AVX: usize = 832;
const YMM_HIGH: usize = 576;
const XMM: usize = 160;
/// PKRU's place in it.
const PKRU: usize = 2688;

/// What is in the state's slots rather than in [`State`].
#[derive(Clone, Copy, Debug, Default)]
pub struct Registers {
    pub gpr: [u64; 16],
    pub ip: u64,
    pub arith: u64,
}

/// The exchanged state, but for events that the caller knows and `mp_state`. The clock stands at `now` ns.
pub fn to_arch(st: &State, regs: &Registers, now: u64) -> X86State {
    let mut out = X86State::reset(st.index == 0);
    core_to_arch(st, regs, &mut out);
    out.apic_base = st.apic_base;
    (out.dr, out.dr6, out.dr7) = (st.dr, st.dr6, st.dr7);
    out.xcr0 = st.xcr0;
    out.xsave = xsave_area(st);
    out.tsc = st.tsc(now);
    out.tsc_khz = st.tsc_khz;
    let mut msrs = st.msrs.clone();
    out.msrs = Msrs::stored_numbers()
        .filter_map(|index| msrs.stored(index).map(|value| Msr { index, value: *value }))
        .collect();
    out.events = Events {
        shadow_sti: st.shadow && !st.shadow_ss,
        shadow_mov_ss: st.shadow && st.shadow_ss,
        held_breakpoints: (st.held_back & 0xf) as u8,
        nmi_masked: st.nmi_masked,
        nmi_pending: st.nmi_pending,
        smm: st.smm,
        smm_inside_nmi: st.smm_inside_nmi,
        ..Events::default()
    };
    out
}

/// General registers, segments and control registers.
pub(crate) fn core_to_arch(st: &State, regs: &Registers, out: &mut X86State) {
    out.gpr = regs.gpr;
    out.rip = regs.ip;
    out.rflags = regs.arith & ARITH | st.flags & SYSTEM | RFLAGS_FIXED;
    [out.es, out.cs, out.ss, out.ds, out.fs, out.gs] = st.seg;
    // The privilege level is the stack segment's.
    out.ss.attributes = out.ss.attributes & !(3 << attr::DPL_SHIFT) | u32::from(st.cpl) << attr::DPL_SHIFT;
    (out.ldtr, out.tr, out.gdtr, out.idtr) = (st.ldtr, st.tr, st.gdtr, st.idtr);
    (out.cr0, out.cr2, out.cr3, out.cr4, out.cr8) = (st.cr0, st.cr2, st.cr3, st.cr4, st.cr8);
    out.efer = st.efer;
    out.pdptrs = crate::paging::uses_pdptrs(st).then_some(st.pdptr);
}

fn xsave_area(st: &State) -> Vec<u8> {
    let size = if st.features.avx { WITH_AVX } else { XSAVE_MIN };
    let mut area = vec![0; size];
    area[..512].copy_from_slice(&st.fx.0);
    area[XSAVE_MXCSR..XSAVE_MXCSR + 4].copy_from_slice(&st.mxcsr.to_le_bytes());
    area[XSAVE_MXCSR + 4..XSAVE_MXCSR + 8].copy_from_slice(&st.mxcsr_mask().to_le_bytes());
    let mut components = XCR0_X87 | XCR0_SSE;
    for (i, ymm) in st.vec.iter().enumerate() {
        for (j, word) in ymm.iter().enumerate() {
            let at = if j < 2 { XMM + i * 16 + j * 8 } else { YMM_HIGH + i * 16 + (j - 2) * 8 };
            if let Some(bytes) = area.get_mut(at..at + 8) {
                bytes.copy_from_slice(&word.to_le_bytes());
            }
        }
    }
    if st.features.avx {
        components |= XCR0_AVX;
    }
    if st.pkru != 0 {
        components |= XCR0_PKRU;
        area.resize(PKRU + 8, 0);
        area[PKRU..PKRU + 4].copy_from_slice(&st.pkru.to_le_bytes());
    }
    area[XSAVE_XSTATE_BV..XSAVE_XSTATE_BV + 8].copy_from_slice(&components.to_le_bytes());
    area
}

/// Puts x87, SSE and AVX into an XSAVE area in standard form that may have more: the rest of it stays.
pub(crate) fn update_xsave(st: &State, area: &mut Vec<u8>) {
    let new = xsave_area(st);
    let mut used = [0; 8];
    used.copy_from_slice(&area[XSAVE_XSTATE_BV..XSAVE_XSTATE_BV + 8]);
    let mut used = u64::from_le_bytes(used) | XCR0_X87 | XCR0_SSE;
    let constant = area[XSAVE_MXCSR + 4..XSAVE_MXCSR + 8].to_vec();
    area[..416].copy_from_slice(&new[..416]);
    area[XSAVE_MXCSR + 4..XSAVE_MXCSR + 8].copy_from_slice(&constant);
    let upper = new.get(YMM_HIGH..WITH_AVX).unwrap_or_default();
    let avx = used & XCR0_AVX != 0 || upper.iter().any(|b| *b != 0);
    if avx && !upper.is_empty() {
        used |= XCR0_AVX;
        if area.len() < WITH_AVX {
            area.resize(WITH_AVX, 0);
        }
        area[YMM_HIGH..WITH_AVX].copy_from_slice(upper);
    }
    if used & XCR0_PKRU != 0 || st.pkru != 0 {
        used |= XCR0_PKRU;
        if area.len() < PKRU + 8 {
            area.resize(PKRU + 8, 0);
        }
        area[PKRU..PKRU + 4].copy_from_slice(&st.pkru.to_le_bytes());
    }
    area[XSAVE_XSTATE_BV..XSAVE_XSTATE_BV + 8].copy_from_slice(&used.to_le_bytes());
}

/// Takes x87, SSE and AVX over from an XSAVE area in standard form.
pub(crate) fn set_xsave(st: &mut State, area: &[u8]) {
    let word = |at: usize| {
        let mut bytes = [0; 8];
        bytes.copy_from_slice(&area[at..at + 8]);
        u64::from_le_bytes(bytes)
    };
    let components = word(XSAVE_XSTATE_BV);
    st.reset_fpu();
    // FNINIT's control word is the initial state of the component.
    st.fx.0[..2].copy_from_slice(&0x37fu16.to_le_bytes());
    if components & XCR0_X87 != 0 {
        st.fx.0[..XSAVE_MXCSR].copy_from_slice(&area[..XSAVE_MXCSR]);
        st.fx.0[32..160].copy_from_slice(&area[32..160]);
        let short = |at: usize| u16::from_le_bytes([area[at], area[at + 1]]);
        st.fpu_pointers = FpuPointers { opcode: short(6), ip: word(8), dp: word(16), ..FpuPointers::default() };
    }
    let avx = components & XCR0_AVX != 0 && area.len() >= WITH_AVX;
    if components & (XCR0_SSE | XCR0_AVX) != 0 {
        st.mxcsr = word(XSAVE_MXCSR) as u32 & st.mxcsr_mask();
    }
    st.pkru = if components & XCR0_PKRU != 0 && area.len() >= PKRU + 8 { word(PKRU) as u32 } else { 0 };
    for i in 0..16 {
        if components & XCR0_SSE != 0 {
            st.vec[i][0] = word(XMM + i * 16);
            st.vec[i][1] = word(XMM + i * 16 + 8);
        }
        if avx {
            st.vec[i][2] = word(YMM_HIGH + i * 16);
            st.vec[i][3] = word(YMM_HIGH + i * 16 + 8);
        }
    }
}

/// Takes over an exchanged state; answers what belongs in slots. The clock stands at `now` ns.
///
/// # Errors
/// One line: what of it cannot be.
pub fn from_arch(st: &mut State, from: &X86State, now: u64) -> Result<Registers, String> {
    from.check().map_err(|e| e.to_string())?;
    if !valid_xcr0(st, from.xcr0) {
        return Err(format!("xcr0: the model has no {:#x}", from.xcr0));
    }
    check(st, from)?;
    let registers = core_from_arch(st, from);
    st.apic_base = from.apic_base;
    st.dr = from.dr;
    st.dr6 = from.dr6 & 0xe00f | DR6_FIXED;
    st.dr7 = from.dr7 & 0xffff_2bff | DR7_FIXED;
    st.xcr0 = from.xcr0;
    set_xsave(st, &from.xsave);
    st.msrs = Msrs::new();
    for m in &from.msrs {
        // Of another accelerator's, those we lack had no effect here anyway.
        if let Some(value) = st.msrs.stored(m.index) {
            *value = m.value;
        }
    }
    if from.tsc_khz != 0 {
        st.tsc_khz = from.tsc_khz;
    }
    st.set_tsc(now, from.tsc);
    st.shadow = from.events.shadow_sti || from.events.shadow_mov_ss;
    st.shadow_ss = from.events.shadow_mov_ss;
    st.held_back = u64::from(from.events.held_breakpoints & 0xf);
    st.nmi_masked = from.events.nmi_masked;
    st.nmi_pending = from.events.nmi_pending;
    st.smm = from.events.smm;
    st.smm_inside_nmi = st.smm && from.events.smm_inside_nmi;
    st.msrs.smbase &= 0xffff_ffff;
    // Of another accelerator's, the rest has no effect here and is not there to be read.
    st.msrs.debugctl &= DEBUGCTL_BTF;
    Ok(registers)
}

/// Takes over general registers, segments and control registers, which were checked.
pub(crate) fn core_from_arch(st: &mut State, from: &X86State) -> Registers {
    st.cpl = from.cpl();
    st.flags = from.rflags & SYSTEM;
    st.seg = [from.es, from.cs, from.ss, from.ds, from.fs, from.gs];
    (st.ldtr, st.tr, st.gdtr, st.idtr) = (from.ldtr, from.tr, from.gdtr, from.idtr);
    (st.cr0, st.cr2, st.cr3, st.cr4, st.cr8) = (from.cr0 | CR0_ET, from.cr2, from.cr3, from.cr4, from.cr8);
    st.efer = from.efer;
    st.pdptr = from.pdptrs.unwrap_or_default();
    Registers { gpr: from.gpr, ip: from.rip, arith: from.rflags & ARITH }
}

/// Whether general registers, segments and control registers can be taken over.
///
/// # Errors
/// One line: what cannot be.
pub(crate) fn check(st: &State, from: &X86State) -> Result<(), String> {
    let efer = EFER_SCE | EFER_NXE | if st.features.long_mode { EFER_LME | EFER_LMA } else { 0 };
    if from.efer & !efer != 0 {
        return Err(format!("efer: the model has no {:#x}", from.efer));
    }
    let long = from.efer & EFER_LMA != 0;
    if long && (from.cr0 & CR0_PG == 0 || from.cr4 & CR4_PAE == 0 || from.efer & EFER_LME == 0) {
        return Err(format!("efer: {:#x} with cr0 {:#x} and cr4 {:#x}", from.efer, from.cr0, from.cr4));
    }
    let names = [(ES, &from.es), (CS, &from.cs), (SS, &from.ss), (DS, &from.ds), (FS, &from.fs), (GS, &from.gs)];
    let wide = |seg: usize| long && (seg == FS || seg == GS);
    if let Some((seg, s)) = names.iter().find(|(seg, s)| !wide(*seg) && s.base >> 32 != 0) {
        return Err(format!("segment {seg}: base {:#x} above 4 GiB", s.base));
    }
    Ok(())
}
