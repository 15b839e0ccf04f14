//! Control and debug registers, and the instructions around them.
//!
//! Spec: SDM volume 3 sections 2.5 (control registers), 18.2 (debug registers), 5.10 (invalidation); volume 2 "MOV
//! — Move to/from Control Registers", "INVPCID", "XSETBV".

use mimus_arch::x86::regs::*;
use mimus_arch::x86::state::attr;
use mimus_core::accel::SysReg;

use crate::exception::{Exception, Result};
use crate::host::{Flush, Host};
use crate::paging;
use crate::segment::system;
use crate::state::{CS, State};

/// MOV from a control register.
///
/// # Errors
/// `#UD` if there is no such register, `#GP(0)` without privilege.
pub fn read_cr<H: Host + ?Sized>(h: &mut H, n: u8) -> Result<u64> {
    if !matches!(n, 0 | 2 | 3 | 4 | 8) {
        return Err(Exception::UD);
    }
    h.need_cpl0()?;
    Ok(match n {
        0 => h.st().cr0,
        2 => h.st().cr2,
        3 => h.st().cr3,
        4 => h.st().cr4,
        _ => h.sysreg_read(SysReg::Cr8).unwrap_or_else(|| h.st().cr8),
    })
}

/// MOV to a control register.
///
/// # Errors
/// `#UD` if there is no such register, `#GP(0)` without privilege or for values it does not take.
pub fn write_cr<H: Host + ?Sized>(h: &mut H, n: u8, value: u64) -> Result<()> {
    if !matches!(n, 0 | 2 | 3 | 4 | 8) {
        return Err(Exception::UD);
    }
    h.need_cpl0()?;
    match n {
        0 => write_cr0(h, value),
        2 => {
            h.st_mut().cr2 = value;
            Ok(())
        }
        3 => write_cr3(h, value),
        4 => write_cr4(h, value),
        _ => {
            if value > 15 {
                return Err(Exception::GP0);
            }
            if h.sysreg_write(SysReg::Cr8, value).is_none() {
                h.st_mut().cr8 = value;
            }
            h.check_events();
            Ok(())
        }
    }
}

/// Bits of CR0 that there are; the others of the lower half are ignored.
pub(crate) const CR0_ALL: u64 =
    CR0_PE | CR0_MP | CR0_EM | CR0_TS | CR0_ET | CR0_NE | CR0_WP | CR0_AM | CR0_NW | CR0_CD | CR0_PG;

/// Sets CR0, entering or leaving protection, paging and long mode.
///
/// # Errors
/// `#GP(0)`
pub fn write_cr0<H: Host + ?Sized>(h: &mut H, value: u64) -> Result<()> {
    let st = h.st();
    let old = st.cr0;
    let new = value & CR0_ALL | CR0_ET;
    if value >> 32 != 0 || new & CR0_PG != 0 && new & CR0_PE == 0 || new & CR0_NW != 0 && new & CR0_CD == 0 {
        return Err(Exception::GP0);
    }
    if new & CR0_PG == 0 && st.cr4 & CR4_PCIDE != 0 {
        return Err(Exception::GP0);
    }
    let enables = new & !old & CR0_PG != 0;
    let disables = old & !new & CR0_PG != 0;
    if enables && st.efer & EFER_LME != 0 {
        // Intel's do not take a 16-bit TSS along (section 11.8.5).
        let small =
            !st.features.amd && st.tr.attributes & attr::UNUSABLE == 0 && st.tr.attributes & 0xd == system::TSS16;
        if st.cr4 & CR4_PAE == 0 || st.seg[CS].attributes & attr::L != 0 || small {
            return Err(Exception::GP0);
        }
        h.st_mut().efer |= EFER_LMA;
    } else if disables && st.long() {
        if st.is_64bit() {
            return Err(Exception::GP0);
        }
        h.st_mut().efer &= !EFER_LMA;
    } else if (old ^ new) & (CR0_PG | CR0_CD | CR0_NW) != 0 && new & CR0_PG != 0 && st.cr4 & CR4_PAE != 0 && !st.long()
    {
        let cr3 = st.cr3;
        paging::load_pdptrs(h, cr3)?;
    }
    h.st_mut().cr0 = new;
    if (old ^ new) & (CR0_PG | CR0_WP | CR0_PE) != 0 {
        h.flush(Flush::All);
    }
    if (old ^ new) & (CR0_PG | CR0_PE | CR0_AM) != 0 {
        h.mode_changed();
    }
    Ok(())
}

fn write_cr3<H: Host + ?Sized>(h: &mut H, value: u64) -> Result<()> {
    let st = h.st();
    let pcid = st.cr4 & CR4_PCIDE != 0;
    let keep = pcid && value >> 63 != 0;
    let value = if pcid { value & !(1 << 63) } else { value };
    if st.long() && value >> st.phys_bits != 0 {
        return Err(Exception::GP0);
    }
    let value = if st.long() { value } else { value & 0xffff_ffff };
    if paging::uses_pdptrs(st) {
        paging::load_pdptrs(h, value)?;
    }
    h.st_mut().cr3 = value;
    if !keep {
        h.flush(Flush::NonGlobal(pcid.then_some(value & 0xfff)));
    }
    if pcid {
        h.mode_changed();
    }
    Ok(())
}

fn write_cr4<H: Host + ?Sized>(h: &mut H, value: u64) -> Result<()> {
    let st = h.st();
    let old = st.cr4;
    let changed = old ^ value;
    if value & !st.features.cr4 != 0 {
        return Err(Exception::GP0);
    }
    if st.long() && (value & CR4_PAE == 0 || changed & CR4_LA57 != 0) {
        return Err(Exception::GP0);
    }
    if value & CR4_PCIDE & !old != 0 && (!st.long() || st.cr3 & 0xfff != 0) {
        return Err(Exception::GP0);
    }
    let paging_bits = CR4_PSE | CR4_PAE | CR4_PGE;
    let cr3 = st.cr3;
    let loads = st.cr0 & CR0_PG != 0 && !st.long() && value & CR4_PAE != 0;
    if loads && changed & (paging_bits | CR4_SMEP) != 0 {
        paging::load_pdptrs(h, cr3)?;
    }
    h.st_mut().cr4 = value;
    if changed & (paging_bits | CR4_SMEP | CR4_SMAP | CR4_PCIDE | CR4_LA57 | CR4_PKE) != 0 {
        h.flush(Flush::All);
        h.mode_changed();
    }
    Ok(())
}

/// LMSW: the low four bits of CR0; PE cannot be cleared.
///
/// # Errors
/// `#GP(0)` without privilege.
pub fn lmsw<H: Host + ?Sized>(h: &mut H, value: u64) -> Result<()> {
    h.need_cpl0()?;
    let old = h.st().cr0;
    write_cr0(h, old & !0xe | value & 0xf)
}

/// CLTS
///
/// # Errors
/// `#GP(0)` without privilege.
pub fn clts<H: Host + ?Sized>(h: &mut H) -> Result<()> {
    h.need_cpl0()?;
    h.st_mut().cr0 &= !CR0_TS;
    Ok(())
}

/// UMIP: SGDT, SIDT, SLDT, SMSW and STR of user code fault.
///
/// # Errors
/// `#GP(0)`
pub fn check_umip<H: Host + ?Sized>(h: &H) -> Result<()> {
    if h.st().cr4 & CR4_UMIP != 0 && h.st().cpl != 0 { Err(Exception::GP0) } else { Ok(()) }
}

/// INVLPG
///
/// # Errors
/// `#GP(0)` without privilege.
pub fn invlpg<H: Host + ?Sized>(h: &mut H, va: u64) -> Result<()> {
    h.need_cpl0()?;
    let st = h.st();
    let pcid = (st.cr4 & CR4_PCIDE != 0).then_some(st.cr3 & 0xfff);
    h.flush(Flush::Page(va, pcid));
    Ok(())
}

/// INVPCID with its descriptor.
///
/// # Errors
/// `#GP(0)`
pub fn invpcid<H: Host + ?Sized>(h: &mut H, kind: u64, pcid: u64, va: u64) -> Result<()> {
    h.need_cpl0()?;
    let enabled = h.st().cr4 & CR4_PCIDE != 0;
    if pcid >> 12 != 0 || kind < 2 && pcid != 0 && !enabled {
        return Err(Exception::GP0);
    }
    match kind {
        0 if !h.st().canonical_base(va) => return Err(Exception::GP0),
        0 => h.flush(Flush::Page(va, Some(pcid))),
        1 => h.flush(Flush::NonGlobal(Some(pcid))),
        2 => h.flush(Flush::All),
        3 => h.flush(Flush::NonGlobal(None)),
        _ => return Err(Exception::GP0),
    }
    Ok(())
}

/// XSETBV
///
/// # Errors
/// `#GP(0)` for components there are not.
pub fn xsetbv<H: Host + ?Sized>(h: &mut H, index: u32, value: u64) -> Result<()> {
    if h.st().cr4 & CR4_OSXSAVE == 0 {
        return Err(Exception::UD);
    }
    h.need_cpl0()?;
    if index != 0 || !valid_xcr0(h.st(), value) {
        return Err(Exception::GP0);
    }
    h.st_mut().xcr0 = value;
    Ok(())
}

/// SDM volume 1 section 13.3.
pub fn valid_xcr0(st: &State, value: u64) -> bool {
    value & XCR0_X87 != 0 && value & !st.features.xcr0_mask() == 0 && (value & XCR0_AVX == 0 || value & XCR0_SSE != 0)
}

/// RDPKRU, with ECX.
///
/// # Errors
/// `#UD` if protection keys are off, `#GP(0)` for another register.
pub fn rdpkru<H: Host + ?Sized>(h: &H, index: u64) -> Result<u64> {
    if h.st().cr4 & CR4_PKE == 0 {
        return Err(Exception::UD);
    }
    if index != 0 { Err(Exception::GP0) } else { Ok(h.st().pkru.into()) }
}

/// WRPKRU, with ECX and EDX.
///
/// # Errors
/// As [`rdpkru`].
pub fn wrpkru<H: Host + ?Sized>(h: &mut H, index: u64, high: u64, value: u32) -> Result<()> {
    rdpkru(h, index | high)?;
    set_pkru(h, value);
    Ok(())
}

/// Sets the rights of protection keys.
pub fn set_pkru<H: Host + ?Sized>(h: &mut H, value: u32) {
    let old = std::mem::replace(&mut h.st_mut().pkru, value);
    if old != value && h.st().cr4 & CR4_PKE != 0 {
        // Cached translations have what it allowed.
        h.flush(Flush::All);
    }
}

/// The number of the debug register that 4 or 5 stand for; `#UD` with CR4.DE.
fn debug_number<H: Host + ?Sized>(h: &H, n: u8) -> Result<u8> {
    match n {
        4 | 5 if h.st().cr4 & CR4_DE != 0 => Err(Exception::UD),
        4 | 5 => Ok(n + 2),
        _ => Ok(n),
    }
}

/// Any access to debug registers with DR7.GD set traps (SDM section 18.2.4).
fn check_general_detect<H: Host + ?Sized>(h: &mut H) -> Result<()> {
    h.need_cpl0()?;
    if h.st().dr7 & 1 << 13 != 0 {
        return Err(Exception { vector: VECTOR_DB, error: None, payload: 1 << 13 });
    }
    Ok(())
}

/// MOV from a debug register.
///
/// # Errors
/// `#UD`, `#GP(0)`, `#DB`
pub fn read_dr<H: Host + ?Sized>(h: &mut H, n: u8) -> Result<u64> {
    let n = debug_number(h, n)?;
    check_general_detect(h)?;
    let st = h.st();
    Ok(match n {
        0..=3 => st.dr[usize::from(n)],
        6 => st.dr6,
        _ => st.dr7,
    })
}

/// MOV to a debug register.
///
/// # Errors
/// `#UD`, `#GP(0)`, `#DB`
pub fn write_dr<H: Host + ?Sized>(h: &mut H, n: u8, value: u64) -> Result<()> {
    let n = debug_number(h, n)?;
    check_general_detect(h)?;
    if n >= 6 && value >> 32 != 0 {
        return Err(Exception::GP0);
    }
    let st = h.st_mut();
    match n {
        0..=3 => st.dr[usize::from(n)] = value,
        6 => st.dr6 = value & 0xe00f | DR6_FIXED,
        _ => st.dr7 = value & 0xffff_2bff | DR7_FIXED,
    }
    if n != 6 {
        h.flush(Flush::All);
        h.check_events();
    }
    Ok(())
}
