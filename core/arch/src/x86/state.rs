//! The state of one x86 vCPU.

use super::msr;
use super::regs::*;
use serde::{Deserialize, Serialize};

/// Everything a vCPU is made of as far as software can tell, but for its local APIC
/// ([`LapicState`](super::irqchip::LapicState), saved as a device).
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct X86State {
    /// General registers in encoding order: RAX, RCX, RDX, RBX, RSP, RBP, RSI, RDI, R8 to R15.
    pub gpr: [u64; 16],
    /// Instruction pointer, as an offset in CS.
    pub rip: u64,
    /// Flags.
    pub rflags: u64,
    /// ES.
    pub es: Segment,
    /// CS. Its attributes hold the mode: L and D; the privilege level is SS's DPL.
    pub cs: Segment,
    /// SS.
    pub ss: Segment,
    /// DS.
    pub ds: Segment,
    /// FS, with the whole 64-bit base.
    pub fs: Segment,
    /// GS, with the whole 64-bit base.
    pub gs: Segment,
    /// LDTR.
    pub ldtr: Segment,
    /// TR.
    pub tr: Segment,
    /// GDTR.
    pub gdtr: TableRegister,
    /// IDTR.
    pub idtr: TableRegister,
    /// Control registers.
    pub cr0: u64,
    /// Address of the last page fault.
    pub cr2: u64,
    /// Page tables.
    pub cr3: u64,
    /// Extensions that are on.
    pub cr4: u64,
    /// Task priority (bits 3:0); with an APIC, bits 7:4 of its TPR.
    pub cr8: u64,
    /// Extended features that are on.
    pub efer: u64,
    /// The four page-directory-pointer entries that PAE paging holds in the processor; `None`
    /// outside of PAE paging or if they are to be loaded from memory.
    pub pdptrs: Option<[u64; 4]>,
    /// IA32_APIC_BASE.
    pub apic_base: u64,
    /// Breakpoint addresses DR0 to DR3.
    pub dr: [u64; 4],
    /// Debug status.
    pub dr6: u64,
    /// Debug control.
    pub dr7: u64,
    /// State components that XSAVE handles.
    pub xcr0: u64,
    /// The XSAVE area in its standard (not compacted) form, at least [`XSAVE_MIN`] bytes. Components
    /// whose bit in `XSTATE_BV` is clear are in their initial state.
    pub xsave: Vec<u8>,
    /// The time-stamp counter.
    pub tsc: u64,
    /// Its frequency; 0 if unknown.
    pub tsc_khz: u32,
    /// All other model-specific registers, by index, each once
    /// (not those of [`msr::has_own_field`]).
    pub msrs: Vec<Msr>,
    /// What is about to happen between two instructions.
    pub events: Events,
    /// Whether it executes.
    pub mp_state: MpState,
}

/// A segment register with its hidden part.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Segment {
    /// The visible part.
    pub selector: u16,
    /// Linear address of offset 0.
    pub base: u64,
    /// Last valid offset in bytes (granularity applied).
    pub limit: u32,
    /// Access rights, see [`attr`].
    pub attributes: u32,
}

/// Access rights of a segment: the second descriptor word shifted right by 8, without the limit's
/// bits, and bit 16 for a segment that cannot be used (SDM volume 3 sections 3.4.5 and 25.4.1).
pub mod attr {
    /// Type, 4 bits.
    pub const TYPE: u32 = 0xf;
    /// Code or data, not system.
    pub const S: u32 = 1 << 4;
    /// Shift of the privilege level, 2 bits.
    pub const DPL_SHIFT: u32 = 5;
    /// Present.
    pub const P: u32 = 1 << 7;
    /// For software.
    pub const AVL: u32 = 1 << 12;
    /// 64-bit code.
    pub const L: u32 = 1 << 13;
    /// 32-bit operands (code), stack or limit.
    pub const DB: u32 = 1 << 14;
    /// The limit is in pages.
    pub const G: u32 = 1 << 15;
    /// Loaded with a null selector, or not at all.
    pub const UNUSABLE: u32 = 1 << 16;
    /// All bits that mean something.
    pub const ALL: u32 = 0x1_f0ff;
    /// Present, accessed, read-write data.
    pub const DATA: u32 = P | S | 3;
    /// Present, accessed, readable code.
    pub const CODE: u32 = P | S | 0xb;
}

impl Segment {
    /// A segment that cannot be used.
    pub const UNUSABLE: Self = Self { selector: 0, base: 0, limit: 0, attributes: attr::UNUSABLE };

    /// A real-mode segment.
    pub const fn real(selector: u16, attributes: u32) -> Self {
        Self { selector, base: (selector as u64) << 4, limit: 0xffff, attributes }
    }

    /// A flat 4 GiB segment from 0.
    pub const fn flat(selector: u16, attributes: u32) -> Self {
        Self { selector, base: 0, limit: u32::MAX, attributes: attributes | attr::G }
    }

    /// Descriptor privilege level.
    pub const fn dpl(&self) -> u8 {
        (self.attributes >> attr::DPL_SHIFT & 3) as u8
    }
}

/// GDTR or IDTR.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TableRegister {
    /// Linear address.
    pub base: u64,
    /// Last valid offset.
    pub limit: u16,
}

/// A model-specific register.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Msr {
    /// Its number.
    pub index: u32,
    /// Its value.
    pub value: u64,
}

/// Whether a vCPU executes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum MpState {
    /// It executes.
    #[default]
    Running,
    /// It waits for an interrupt after `HLT`; RIP is past it.
    Halted,
    /// An application processor after power-on or INIT: it waits for a SIPI.
    WaitForSipi,
    /// An INIT has been received and not been acted on yet.
    InitReceived,
    /// A SIPI has been received and not been acted on yet.
    SipiReceived,
}

/// What is about to happen between two instructions.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Events {
    /// An exception that was raised and not delivered yet.
    pub exception: Option<Exception>,
    /// An external interrupt (or software one) that was accepted and not delivered yet.
    pub interrupt: Option<Interrupt>,
    /// No interrupt before the end of the next instruction: after `STI`.
    pub shadow_sti: bool,
    /// The same after a load of SS.
    pub shadow_mov_ss: bool,
    /// Data breakpoints (DR6 bits) that a load of SS met: held back until after the next instruction.
    #[serde(default)]
    pub held_breakpoints: u8,
    /// The level of the INTR input; false with a local APIC that the accelerator runs, unless a
    /// PIC outside of it drives INTR.
    pub intr: bool,
    /// An NMI is being delivered.
    pub nmi_injected: bool,
    /// An NMI waits.
    pub nmi_pending: bool,
    /// NMIs wait until `IRET`.
    pub nmi_masked: bool,
    /// In system management mode.
    pub smm: bool,
    /// An SMI waits.
    pub smi_pending: bool,
    /// The SMI came inside an NMI handler.
    pub smm_inside_nmi: bool,
    /// An INIT that came in system management mode.
    pub init_latched: bool,
    /// A triple fault that was not acted on yet.
    pub triple_fault: bool,
    /// Vector of the SIPI of [`MpState::SipiReceived`].
    pub sipi_vector: u8,
}

/// A raised exception.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Exception {
    /// Its vector.
    pub vector: u8,
    /// Its error code, if it has one.
    pub error_code: Option<u32>,
    /// CR2 (page fault) or DR6 (debug) that its delivery stores; `None` if stored already.
    pub payload: Option<u64>,
}

/// An accepted interrupt.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Interrupt {
    /// Its vector.
    pub vector: u8,
    /// By `INT n`.
    pub soft: bool,
}

/// An impossible state: which field, and why.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{field}: {reason}")]
pub struct InvalidState {
    pub field: &'static str,
    pub reason: String,
}

impl X86State {
    /// The state at power-on (SDM volume 3 table 10-1): the bootstrap processor (`bsp`) executes
    /// at the reset vector, others wait for a SIPI.
    pub fn reset(bsp: bool) -> Self {
        let data = Segment::real(0, attr::DATA);
        let mut xsave = vec![0; XSAVE_MIN];
        xsave[..2].copy_from_slice(&FCW_RESET.to_le_bytes());
        xsave[XSAVE_MXCSR..XSAVE_MXCSR + 4].copy_from_slice(&MXCSR_RESET.to_le_bytes());
        // All of x87's and SSE's state counts, so that FCW does.
        xsave[XSAVE_XSTATE_BV] = (XCR0_X87 | XCR0_SSE) as u8;
        let bsp_bit = if bsp { msr::APIC_BASE_BSP } else { 0 };
        let mut gpr = [0; 16];
        gpr[RDX] = 0x600;
        Self {
            gpr,
            rip: 0xfff0,
            rflags: RFLAGS_FIXED,
            es: data,
            cs: Segment { base: 0xffff_0000, ..Segment::real(0xf000, attr::CODE) },
            ss: data,
            ds: data,
            fs: data,
            gs: data,
            ldtr: Segment { attributes: attr::P | 2, limit: 0xffff, ..Segment::default() },
            tr: Segment { attributes: attr::P | 0xb, limit: 0xffff, ..Segment::default() },
            gdtr: TableRegister { base: 0, limit: 0xffff },
            idtr: TableRegister { base: 0, limit: 0xffff },
            cr0: CR0_CD | CR0_NW | CR0_ET,
            cr2: 0,
            cr3: 0,
            cr4: 0,
            cr8: 0,
            efer: 0,
            pdptrs: None,
            apic_base: msr::APIC_BASE_ADDRESS | msr::APIC_BASE_ENABLE | bsp_bit,
            dr: [0; 4],
            dr6: DR6_FIXED,
            dr7: DR7_FIXED,
            xcr0: XCR0_X87,
            xsave,
            tsc: 0,
            tsc_khz: 0,
            msrs: vec![Msr { index: msr::PAT, value: msr::PAT_RESET }],
            events: Events::default(),
            mp_state: if bsp { MpState::Running } else { MpState::WaitForSipi },
        }
    }

    /// Makes it execute in real mode at physical address `at`, below 1 MiB, as a start-up IPI
    /// with vector `at >> 12` does (SDM volume 3 section 10.4.4.1).
    pub fn start_real_mode(&mut self, at: u64) {
        self.cs = Segment::real((at >> 4) as u16, attr::CODE);
        self.rip = at & 0xf;
        self.mp_state = MpState::Running;
    }

    /// A model-specific register of the list.
    pub fn msr(&self, index: u32) -> Option<u64> {
        self.msrs.iter().find(|m| m.index == index).map(|m| m.value)
    }

    /// Sets a model-specific register of the list, adding it if it is not there.
    pub fn set_msr(&mut self, index: u32, value: u64) {
        match self.msrs.iter_mut().find(|m| m.index == index) {
            Some(m) => m.value = value,
            None => self.msrs.push(Msr { index, value }),
        }
    }

    /// The current privilege level: DPL of SS.
    pub fn cpl(&self) -> u8 {
        if self.cr0 & CR0_PE == 0 { 0 } else { self.ss.dpl() }
    }

    /// Linear address of the next instruction.
    pub fn linear_pc(&self) -> u64 {
        let long = self.efer & EFER_LMA != 0 && self.cs.attributes & attr::L != 0;
        if long { self.rip } else { self.cs.base.wrapping_add(self.rip) & 0xffff_ffff }
    }

    /// Has it go on at a linear address; outside 64-bit mode, as an offset in CS.
    pub fn set_linear_pc(&mut self, pc: u64) {
        let long = self.efer & EFER_LMA != 0 && self.cs.attributes & attr::L != 0;
        self.rip = if long { pc } else { pc.wrapping_sub(self.cs.base) & 0xffff_ffff };
    }

    /// The segment registers with their names.
    pub fn segments(&self) -> [(&'static str, &Segment); 8] {
        [
            ("es", &self.es),
            ("cs", &self.cs),
            ("ss", &self.ss),
            ("ds", &self.ds),
            ("fs", &self.fs),
            ("gs", &self.gs),
            ("ldtr", &self.ldtr),
            ("tr", &self.tr),
        ]
    }

    /// Checks what no processor could be in. It may come from a file.
    pub fn check(&self) -> Result<(), InvalidState> {
        let bad = |field, reason: String| Err(InvalidState { field, reason });
        if !(XSAVE_MIN..=XSAVE_MAX).contains(&self.xsave.len()) {
            return bad("xsave", format!("{} bytes", self.xsave.len()));
        }
        if self.msrs.len() > 4096 {
            return bad("msrs", format!("{} of them", self.msrs.len()));
        }
        let mut indices: Vec<u32> = self.msrs.iter().map(|m| m.index).collect();
        indices.sort_unstable();
        if let Some(pair) = indices.windows(2).find(|p| p[0] == p[1]) {
            return bad("msrs", format!("{:#x} twice", pair[0]));
        }
        if let Some(i) = indices.into_iter().find(|&i| msr::has_own_field(i)) {
            return bad("msrs", format!("{i:#x} has a field of its own"));
        }
        if let Some((name, s)) = self.segments().into_iter().find(|(_, s)| s.attributes & !attr::ALL != 0) {
            return bad("segments", format!("{name}: attributes {:#x}", s.attributes));
        }
        if self.cr0 & CR0_PG != 0 && self.cr0 & CR0_PE == 0 {
            return bad("cr0", format!("{:#x}: paging without protection", self.cr0));
        }
        if self.cr8 > 15 {
            return bad("cr8", format!("{:#x}", self.cr8));
        }
        if self.events.exception.is_some_and(|e| e.vector > 31) {
            return bad("events", "an exception above vector 31".to_owned());
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::state::CpuState;

    #[test]
    fn reset_vector() {
        let s = X86State::reset(true);
        assert_eq!(s.linear_pc(), 0xffff_fff0);
        assert_eq!((s.cpl(), s.mp_state), (0, MpState::Running));
        assert!(s.check().is_ok());
        let mut ap = X86State::reset(false);
        assert_eq!(ap.mp_state, MpState::WaitForSipi);
        ap.start_real_mode(0x9_f000);
        assert_eq!((ap.cs.selector, ap.rip, ap.linear_pc()), (0x9f00, 0, 0x9_f000));
    }

    #[test]
    fn state_survives_msgpack() {
        let mut s = X86State::reset(true);
        s.set_msr(msr::LSTAR, 5);
        s.set_msr(msr::LSTAR, 6);
        s.events.exception = Some(Exception { vector: 14, error_code: Some(2), payload: Some(9) });
        assert_eq!(s.msr(msr::LSTAR), Some(6));
        let state = CpuState::X86(Box::new(s));
        let bytes = rmp_serde::to_vec_named(&state).unwrap();
        assert_eq!(rmp_serde::from_slice::<CpuState>(&bytes).unwrap(), state);
    }

    #[test]
    fn hostile_states() {
        let broken = |f: fn(&mut X86State)| {
            let mut s = X86State::reset(true);
            f(&mut s);
            s.check().unwrap_err().to_string()
        };
        assert!(broken(|s| s.xsave.clear()).contains("xsave: 0 bytes"));
        assert!(broken(|s| s.xsave = vec![0; 1 << 20]).contains("xsave"));
        assert!(broken(|s| s.msrs.push(Msr { index: msr::PAT, value: 0 })).contains("twice"));
        assert!(broken(|s| s.set_msr(msr::EFER, 0)).contains("own"));
        assert!(broken(|s| s.cs.attributes = 1 << 20).contains("cs"));
        assert!(broken(|s| s.cr0 = CR0_PG).contains("paging"));
        assert!(broken(|s| s.cr8 = 16).contains("cr8"));
    }
}
