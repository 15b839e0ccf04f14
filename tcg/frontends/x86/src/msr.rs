//! Model-specific registers.
//!
//! Spec: SDM volume 4; volume 3 sections 12.11 (MTRR), 12.12 (PAT), 17.17 (TSC). Registers of machine checks, MTRRs
//! and miscellaneous features (but for those that CPUID shows) hold what is written and have no effect: memory is coherent
//! whatever its type.

use mimus_arch::x86::msr as number;
use mimus_arch::x86::regs::*;
use mimus_core::accel::SysReg;

use crate::exception::{Exception, Result};
use crate::host::{Flush, Host};
use crate::kvmclock;
use crate::smm;
use crate::state::{FS, GS, State};

/// Variable ranges of the MTRRs.
pub const MTRR_RANGES: usize = 8;
const FIXED: [u32; 11] = [0x250, 0x258, 0x259, 0x268, 0x269, 0x26a, 0x26b, 0x26c, 0x26d, 0x26e, 0x26f];
const BIOS_SIGN_ID: u32 = 0x8b;
const PLATFORM_INFO: u32 = 0xce;
/// What the processor is not susceptible to (SDM volume 4 table 2-2, register 0x10a): the translator speculates
/// about nothing. RDCL_NO, IBRS_ALL, SKIP_L1DFL_VMENTRY, SSB_NO, MDS_NO, PSCHANGE_MC_NO, TAA_NO; SBDR_SSDP_NO,
/// FBSDP_NO, PSDP_NO; BHI_NO; PBRSB_NO; GDS_NO, RFDS_NO; ITS_NO.
const ARCH_CAPABILITIES: u32 = 0x10a;
const NOT_SUSCEPTIBLE: u64 = 0x17a | 1 | 0xe000 | 1 << 20 | 1 << 24 | 3 << 26 | 1 << 62;
const MPERF: u32 = 0xe7;
const APERF: u32 = 0xe8;
const VM_HSAVE: u32 = 0xc001_0117;
const AMD_SYSCFG: u32 = 0xc001_0010;
const AMD_HWCR: u32 = 0xc001_0015;
const AMD_PATCH_LEVEL: u32 = 0xc001_001f;
/// C1E is off.
const AMD_INT_PENDING: u32 = 0xc001_0055;
const DE_CFG: u32 = 0xc001_1029;
const EBL_CR_POWERON: u32 = 0x2a;
/// DEBUGCTL's bits that are not reserved: the SDM's (volume 3 section 18.4.1; no bus-lock detection), the APM's (volume 2
/// section 13.1.1.6).
const DEBUGCTL_INTEL: u64 = 0xffc3;
const DEBUGCTL_AMD: u64 = 0x3f;

/// Those with a value of their own here.
#[derive(Clone, Debug)]
pub struct Msrs {
    pub sysenter_cs: u64,
    pub sysenter_esp: u64,
    pub sysenter_eip: u64,
    pub star: u64,
    pub lstar: u64,
    pub cstar: u64,
    pub fmask: u64,
    pub kernel_gs_base: u64,
    /// Where system management mode has its handler and save area.
    pub smbase: u64,
    pub tsc_aux: u64,
    pub tsc_adjust: u64,
    pub tsc_deadline: u64,
    pub pat: u64,
    pub misc_enable: u64,
    pub debugctl: u64,
    pub feature_control: u64,
    pub spec_ctrl: u64,
    pub xss: u64,
    pub mcg_status: u64,
    pub mtrr_def_type: u64,
    pub mtrr_fixed: [u64; 11],
    pub mtrr_variable: [u64; 2 * MTRR_RANGES],
    /// KVM's clock, see [`crate::kvmclock`].
    pub wall_clock: u64,
    pub system_time: u64,
}

impl Msrs {
    /// At power-on.
    pub fn new() -> Self {
        Self {
            sysenter_cs: 0,
            sysenter_esp: 0,
            sysenter_eip: 0,
            star: 0,
            lstar: 0,
            cstar: 0,
            fmask: 0,
            kernel_gs_base: 0,
            smbase: smm::SMBASE_RESET,
            tsc_aux: 0,
            tsc_adjust: 0,
            tsc_deadline: 0,
            pat: number::PAT_RESET,
            // Fast strings.
            misc_enable: 1,
            debugctl: 0,
            feature_control: 1,
            spec_ctrl: 0,
            xss: 0,
            mcg_status: 0,
            mtrr_def_type: 0,
            mtrr_fixed: [0; 11],
            mtrr_variable: [0; 2 * MTRR_RANGES],
            wall_clock: 0,
            system_time: 0,
        }
    }

    /// The value of one that is only stored, and part of the exchanged state.
    pub fn stored(&mut self, index: u32) -> Option<&mut u64> {
        Some(match index {
            number::SYSENTER_CS => &mut self.sysenter_cs,
            number::SYSENTER_ESP => &mut self.sysenter_esp,
            number::SYSENTER_EIP => &mut self.sysenter_eip,
            number::STAR => &mut self.star,
            number::LSTAR => &mut self.lstar,
            number::CSTAR => &mut self.cstar,
            number::FMASK => &mut self.fmask,
            number::KERNEL_GS_BASE => &mut self.kernel_gs_base,
            number::SMBASE => &mut self.smbase,
            number::TSC_AUX => &mut self.tsc_aux,
            number::TSC_ADJUST => &mut self.tsc_adjust,
            number::PAT => &mut self.pat,
            number::MISC_ENABLE => &mut self.misc_enable,
            number::DEBUGCTL => &mut self.debugctl,
            number::FEATURE_CONTROL => &mut self.feature_control,
            number::SPEC_CTRL => &mut self.spec_ctrl,
            number::XSS => &mut self.xss,
            number::MCG_STATUS => &mut self.mcg_status,
            number::MTRR_DEF_TYPE => &mut self.mtrr_def_type,
            kvmclock::WALL_CLOCK => &mut self.wall_clock,
            kvmclock::SYSTEM_TIME => &mut self.system_time,
            _ => {
                if let Some(i) = FIXED.iter().position(|&n| n == index) {
                    return Some(&mut self.mtrr_fixed[i]);
                }
                let i = index.wrapping_sub(number::MTRR_PHYS_BASE0) as usize;
                return self.mtrr_variable.get_mut(i);
            }
        })
    }

    /// The numbers [`Msrs::stored`] knows.
    pub fn stored_numbers() -> impl Iterator<Item = u32> {
        const NAMED: [u32; 21] = [
            number::SMBASE,
            kvmclock::WALL_CLOCK,
            kvmclock::SYSTEM_TIME,
            number::SYSENTER_CS,
            number::SYSENTER_ESP,
            number::SYSENTER_EIP,
            number::STAR,
            number::LSTAR,
            number::CSTAR,
            number::FMASK,
            number::KERNEL_GS_BASE,
            number::TSC_AUX,
            number::TSC_ADJUST,
            number::PAT,
            number::MISC_ENABLE,
            number::DEBUGCTL,
            number::FEATURE_CONTROL,
            number::SPEC_CTRL,
            number::XSS,
            number::MCG_STATUS,
            number::MTRR_DEF_TYPE,
        ];
        let variable = (0..2 * MTRR_RANGES as u32).map(|i| number::MTRR_PHYS_BASE0 + i);
        NAMED.into_iter().chain(FIXED).chain(variable)
    }
}

impl Default for Msrs {
    fn default() -> Self {
        Self::new()
    }
}

/// RDMSR.
///
/// # Errors
/// `#GP(0)` if the processor has no such register, or the privilege level is not 0.
pub fn read<H: Host + ?Sized>(h: &mut H, index: u32) -> Result<u64> {
    h.need_cpl0()?;
    let now = h.now();
    let st = h.st_mut();
    let long = st.features.long_mode;
    Ok(match index {
        number::TSC => st.tsc(now),
        _ if kvmclock::is_clock(index) && kvmclock::available(st) => kvmclock::read(st, index),
        MPERF | APERF => st.tsc(now),
        number::EFER if has_efer(st) => st.efer,
        number::FS_BASE if long => st.seg[FS].base,
        number::GS_BASE if long => st.seg[GS].base,
        number::APIC_BASE => h.sysreg_read(SysReg::Msr(index)).unwrap_or_else(|| h.st().apic_base),
        number::TSC_DEADLINE if !st.features.tsc_deadline => return Err(Exception::GP0),
        number::TSC_DEADLINE | number::X2APIC_FIRST..=number::X2APIC_LAST => {
            h.sysreg_read(SysReg::Msr(index)).ok_or(Exception::GP0)?
        }
        number::MTRR_CAP if st.features.has("mtrr") => MTRR_RANGES as u64 | 1 << 8 | 1 << 10,
        // No machine-check banks.
        number::MCG_CAP => 0,
        BIOS_SIGN_ID => 0x1_0000_0000,
        PLATFORM_INFO | EBL_CR_POWERON | AMD_SYSCFG | AMD_PATCH_LEVEL | AMD_INT_PENDING | VM_HSAVE => 0,
        // TscFreqSel: the TSC counts at a fixed rate.
        AMD_HWCR => 1 << 24,
        ARCH_CAPABILITIES if st.features.has("arch-capabilities") => NOT_SUSCEPTIBLE,
        // LFENCE waits for all earlier instructions.
        DE_CFG => 2,
        _ if !exists(st, index) => return Err(Exception::GP0),
        _ => *st.msrs.stored(index).ok_or(Exception::GP0)?,
    })
}

/// Whether it is one of the variable ranges of the MTRRs.
fn variable(index: u32) -> bool {
    (number::MTRR_PHYS_BASE0..number::MTRR_PHYS_BASE0 + 2 * MTRR_RANGES as u32).contains(&index)
}

/// Whether the model has one of those that are stored.
fn exists(st: &State, index: u32) -> bool {
    match index {
        number::LSTAR | number::CSTAR | number::FMASK | number::KERNEL_GS_BASE => st.features.long_mode,
        number::STAR => st.features.has("syscall"),
        number::TSC_AUX => st.features.has("rdtscp") || st.features.has("rdpid"),
        number::TSC_ADJUST => st.features.has("tsc-adjust"),
        // Systems set IBRS once where the capabilities say that this is enough. The feature itself would have them
        // issue barriers at each switch of address spaces, which bar nothing here.
        number::PAT => st.features.has("pat"),
        number::MTRR_DEF_TYPE => st.features.has("mtrr"),
        _ if FIXED.contains(&index) || variable(index) => st.features.has("mtrr"),
        number::SPEC_CTRL => st.features.has("spec-ctrl") || st.features.has("arch-capabilities"),
        number::XSS => st.features.has("xsaves"),
        // RSM alone writes it.
        number::SMBASE => false,
        _ if kvmclock::is_clock(index) => false,
        _ => true,
    }
}

/// WRMSR.
///
/// # Errors
/// `#GP(0)` if there is no such register, it does not take the value, or the privilege level is not 0.
pub fn write<H: Host + ?Sized>(h: &mut H, index: u32, value: u64) -> Result<()> {
    h.need_cpl0()?;
    let now = h.now();
    let st = h.st_mut();
    match index {
        number::TSC => {
            let delta = value.wrapping_sub(st.tsc(now));
            st.msrs.tsc_adjust = st.msrs.tsc_adjust.wrapping_add(delta);
            st.set_tsc(now, value);
            counter_moved(h);
        }
        _ if kvmclock::is_clock(index) && kvmclock::available(st) => return kvmclock::write(h, index, value),
        number::TSC_ADJUST if exists(st, index) => {
            let delta = value.wrapping_sub(st.msrs.tsc_adjust);
            st.set_tsc_offset(st.tsc_offset.wrapping_add(delta));
            st.msrs.tsc_adjust = value;
            counter_moved(h);
        }
        number::EFER if has_efer(st) => return write_efer(h, value),
        number::FS_BASE | number::GS_BASE if st.features.long_mode => {
            canonical(st, value)?;
            let seg = if index == number::FS_BASE { FS } else { GS };
            st.seg[seg].base = value;
            h.base_changed(seg);
        }
        number::APIC_BASE => return write_apic_base(h, value),
        number::TSC_DEADLINE if !st.features.tsc_deadline => return Err(Exception::GP0),
        number::TSC_DEADLINE | number::X2APIC_FIRST..=number::X2APIC_LAST => {
            h.sysreg_write(SysReg::Msr(index), value).ok_or(Exception::GP0)?;
        }
        BIOS_SIGN_ID | AMD_INT_PENDING | AMD_SYSCFG | AMD_HWCR | DE_CFG | VM_HSAVE | MPERF | APERF => {}
        _ if !exists(st, index) => return Err(Exception::GP0),
        number::LSTAR | number::CSTAR | number::KERNEL_GS_BASE | number::SYSENTER_ESP | number::SYSENTER_EIP => {
            // AMD's SYSENTER is of 32 bits, and so are its registers.
            let short = st.features.amd && matches!(index, number::SYSENTER_ESP | number::SYSENTER_EIP);
            let value = if short { value & 0xffff_ffff } else { value };
            if st.features.long_mode {
                canonical(st, value)?;
            }
            *st.msrs.stored(index).ok_or(Exception::GP0)? = value;
        }
        number::PAT if (0..8).any(|i| !matches!(value >> (8 * i) & 0xff, 0 | 1 | 4..=7)) => {
            return Err(Exception::GP0);
        }
        _ if !valid_mtrr(st, index, value) => return Err(Exception::GP0),
        // AMD's drop what Intel's refuse.
        number::TSC_AUX if value >> 32 != 0 && !st.features.amd => return Err(Exception::GP0),
        number::TSC_AUX => st.msrs.tsc_aux = value & 0xffff_ffff,
        number::DEBUGCTL if value & !if st.features.amd { DEBUGCTL_AMD } else { DEBUGCTL_INTEL } != 0 => {
            return Err(Exception::GP0);
        }
        // Branches are neither recorded nor traced.
        number::DEBUGCTL => st.msrs.debugctl = value & number::DEBUGCTL_BTF,
        // Locked until the next reset.
        number::FEATURE_CONTROL if st.msrs.feature_control & 1 != 0 => return Err(Exception::GP0),
        // IBRS, STIBP, SSBD.
        number::SPEC_CTRL if value & !7 != 0 => return Err(Exception::GP0),
        number::XSS if value != 0 => return Err(Exception::GP0),
        number::FMASK => st.msrs.fmask = value & 0xffff_ffff,
        number::MTRR_CAP | number::MCG_CAP | PLATFORM_INFO | EBL_CR_POWERON | AMD_PATCH_LEVEL => {
            return Err(Exception::GP0);
        }
        _ => *st.msrs.stored(index).ok_or(Exception::GP0)? = value,
    }
    Ok(())
}

/// The TSC has been set: a deadline that waits is another time of the clock's now.
fn counter_moved<H: Host + ?Sized>(h: &mut H) {
    kvmclock::refresh(h);
    let index = SysReg::Msr(number::TSC_DEADLINE);
    if let Some(deadline) = h.sysreg_read(index).filter(|d| *d != 0) {
        let _ = h.sysreg_write(index, deadline);
    }
}

/// Reserved bits and memory types of MTRRs (SDM volume 3 section 12.11.2).
fn valid_mtrr(st: &State, index: u32, value: u64) -> bool {
    let kind = |t: u64| matches!(t, 0 | 1 | 4..=6);
    let beyond = !((1u64 << st.phys_bits) - 1);
    match index {
        number::MTRR_DEF_TYPE => kind(value & 0xff) && value & !0xcff == 0,
        _ if FIXED.contains(&index) => (0..8).all(|i| kind(value >> (8 * i) & 0xff)),
        _ if !variable(index) => true,
        _ if (index - number::MTRR_PHYS_BASE0).is_multiple_of(2) => kind(value & 0xff) && value & (beyond | 0xf00) == 0,
        _ => value & (beyond | 0x7ff) == 0,
    }
}

fn canonical(st: &State, value: u64) -> Result<()> {
    if st.canonical_base(value) { Ok(()) } else { Err(Exception::GP0) }
}

fn has_efer(st: &State) -> bool {
    st.features.long_mode || st.features.nx || st.features.syscall
}

/// SDM volume 3 section 11.12.5: the local APIC says which modes follow which. Without one nothing depends on it.
fn write_apic_base<H: Host + ?Sized>(h: &mut H, value: u64) -> Result<()> {
    let st = h.st();
    let beyond = !((1u64 << st.phys_bits) - 1);
    let x2 = if st.features.has("x2apic") { number::APIC_BASE_X2APIC } else { 0 };
    let known = number::APIC_BASE_ENABLE | number::APIC_BASE_BSP | x2;
    if value & (beyond | 0xfff & !known) != 0 {
        return Err(Exception::GP0);
    }
    let index = SysReg::Msr(number::APIC_BASE);
    if h.sysreg_write(index, value).is_none() && h.sysreg_read(index).is_some() {
        return Err(Exception::GP0);
    }
    h.st_mut().apic_base = value;
    Ok(())
}

/// SDM volume 3 section 2.2.1: LME only while paging is off; LMA is the processor's.
fn write_efer<H: Host + ?Sized>(h: &mut H, value: u64) -> Result<()> {
    let st = h.st_mut();
    let mut writable = 0;
    if st.features.has("syscall") {
        writable |= EFER_SCE;
    }
    if st.features.long_mode {
        writable |= EFER_LME;
    }
    if st.has_nx() {
        writable |= EFER_NXE;
    }
    let old = st.efer;
    if value & !(writable | EFER_LMA) != 0 {
        return Err(Exception::GP0);
    }
    // Intel's ignore what is written to LMA, AMD's want it as it is (APM volume 2 section 3.1.7).
    if st.features.amd && (old ^ value) & EFER_LMA != 0 {
        return Err(Exception::GP0);
    }
    if (old ^ value) & EFER_LME != 0 && st.cr0 & CR0_PG != 0 {
        return Err(Exception::GP0);
    }
    st.efer = value & writable | old & EFER_LMA;
    if (old ^ value) & EFER_NXE != 0 {
        h.flush(Flush::All);
    }
    Ok(())
}
