//! SDM volume 3 section 2.5, volume 2 "CPUID", volume 4.

use super::*;
use crate::control::{invpcid, read_cr, read_dr, write_cr, write_dr, xsetbv};
use crate::convert::{Registers, from_arch, to_arch};
use crate::cpuid::cpuid;
use crate::exception::Exception;
use crate::host::Flush;
use crate::{msr, state::State};
use mimus_arch::x86::msr as number;

#[test]
fn control_registers() {
    let mut h = protected();
    assert_eq!(write_cr(&mut h, 0, CR0_PG), Err(Exception::GP0), "paging without protection");
    assert_eq!(write_cr(&mut h, 4, 1 << 31), Err(Exception::GP0));
    assert_eq!(write_cr(&mut h, 1, 0), Err(Exception::UD));
    write_cr(&mut h, 4, CR4_PAE).unwrap();
    msr::write(&mut h, number::EFER, EFER_LME).unwrap();
    write_cr(&mut h, 3, 0x10000).unwrap();
    write_cr(&mut h, 0, CR0_PE | CR0_PG).unwrap();
    assert_eq!(h.st.efer, EFER_LME | EFER_LMA);
    assert_eq!(msr::write(&mut h, number::EFER, 0), Err(Exception::GP0), "LME is fixed while paging");
    assert_eq!(write_cr(&mut h, 4, 0), Err(Exception::GP0), "PAE is needed");
    write_cr(&mut h, 0, CR0_PE).unwrap();
    assert_eq!(h.st.efer, EFER_LME);
    to_user(&mut h);
    assert_eq!(read_cr(&mut h, 0), Err(Exception::GP0));
}

#[test]
fn address_spaces() {
    let mut h = long();
    write_cr(&mut h, 4, CR4_PAE | CR4_PCIDE).unwrap();
    let key = h.st.context_key();
    h.flushes.clear();
    write_cr(&mut h, 3, 0x10005).unwrap();
    assert_eq!(h.flushes, [Flush::NonGlobal(Some(5))]);
    assert_ne!(h.st.context_key(), key);
    h.flushes.clear();
    write_cr(&mut h, 3, 1 << 63 | 0x10006).unwrap();
    assert_eq!((h.flushes.len(), h.st.cr3), (0, 0x10006));
    invpcid(&mut h, 1, 7, 0).unwrap();
    assert_eq!(h.flushes, [Flush::NonGlobal(Some(7))]);
    assert_eq!(invpcid(&mut h, 4, 0, 0), Err(Exception::GP0));
    assert_eq!(invpcid(&mut h, 0, 1 << 12, 0), Err(Exception::GP0));
}

#[test]
fn debug_registers() {
    let mut h = protected();
    write_dr(&mut h, 7, 0x155).unwrap();
    assert_eq!(read_dr(&mut h, 5), Ok(0x555), "5 is 7, bit 10 is set");
    h.st.cr4 |= CR4_DE;
    assert_eq!(read_dr(&mut h, 5), Err(Exception::UD));
    h.st.dr7 |= 1 << 13;
    assert_eq!(read_dr(&mut h, 0).unwrap_err().vector, VECTOR_DB);
}

#[test]
fn model_specific_registers() {
    let mut h = long();
    h.st.features.la57 = false;
    assert_eq!(msr::write(&mut h, number::LSTAR, 1 << 47), Err(Exception::GP0));
    msr::write(&mut h, number::LSTAR, 0x1234).unwrap();
    assert_eq!(msr::read(&mut h, number::LSTAR), Ok(0x1234));
    msr::write(&mut h, number::TSC, 1_000_000).unwrap();
    assert_eq!(msr::read(&mut h, number::TSC), Ok(1_000_000));
    assert_eq!(msr::read(&mut h, number::TSC_ADJUST), Ok(1_000_000));
    assert_eq!(msr::write(&mut h, number::PAT, 2), Err(Exception::GP0));
    assert_eq!(msr::read(&mut h, 0x1234_5678), Err(Exception::GP0));
    h.sysregs.insert(mimus_core::accel::SysReg::Msr(0x808), 0x20);
    assert_eq!(msr::read(&mut h, 0x808), Ok(0x20));
    assert_eq!(msr::read(&mut h, 0x809), Err(Exception::GP0));
    msr::write(&mut h, number::GS_BASE, 0x5000).unwrap();
    assert_eq!(h.st.seg[crate::state::GS].base, 0x5000);
    h.st.cpl = 3;
    assert_eq!(msr::read(&mut h, number::TSC), Err(Exception::GP0));
}

#[test]
fn extended_state() {
    let mut h = long();
    assert_eq!(xsetbv(&mut h, 0, 3), Err(Exception::UD));
    h.st.cr4 |= CR4_OSXSAVE;
    xsetbv(&mut h, 0, 3).unwrap();
    assert_eq!(xsetbv(&mut h, 0, 2), Err(Exception::GP0), "x87 is always on");
    assert_eq!(xsetbv(&mut h, 0, 0x103), Err(Exception::GP0));
    assert_eq!(cpuid(&h.st, 1, 0)[2] >> 27 & 1, 1);
}

#[test]
fn identification() {
    let h = TestHost::new();
    let [max, b, c, d] = cpuid(&h.st, 0, 0);
    let vendor: Vec<u8> = [b, d, c].into_iter().flat_map(u32::to_le_bytes).collect();
    assert_eq!((max, vendor.as_slice()), (0x16, h.st.features.vendor_name().as_bytes()));
    assert_eq!(cpuid(&h.st, 0x8000_0008, 0)[0] & 0xff, 40);
    assert_eq!(cpuid(&h.st, 0x8000_0001, 0)[3] >> 29 & 1, 1);
    // The model is AMD's: PKRU is behind AVX.
    assert_eq!((cpuid(&h.st, 0xd, 0)[2], cpuid(&h.st, 0xd, 9)), (840, [8, 832, 0, 0]));
    let mut h = h;
    for (xcr0, standard, compacted) in [(3, 576, 576), (7, 832, 832), (0x203, 840, 584), (0x207, 840, 840)] {
        h.st.xcr0 = xcr0;
        assert_eq!((cpuid(&h.st, 0xd, 0)[1], cpuid(&h.st, 0xd, 1)[1]), (standard, compacted), "{xcr0:#x}");
    }
    assert_eq!(cpuid(&h.st, 7, 0)[2] & 0x18, 8);
    h.st.cr4 |= CR4_PKE;
    assert_eq!(cpuid(&h.st, 7, 0)[2] & 0x18, 0x18, "OSPKE");
}

#[test]
fn exchanged_state() {
    let mut h = long();
    h.st.vec[3] = [1, 2, 3, 4];
    h.st.fx.0[32] = 0x55;
    h.st.msrs.lstar = 0x9999;
    h.st.cpl = 3;
    let regs = Registers { gpr: std::array::from_fn(|i| i as u64), ip: 0x1234, arith: RFLAGS_CF };
    let state = to_arch(&h.st, &regs, 0);
    assert!(state.check().is_ok());
    assert_eq!((state.cpl(), state.rip, state.msr(number::LSTAR)), (3, 0x1234, Some(0x9999)));
    let mut other = TestHost::new();
    let back = from_arch(&mut other.st, &state, 0).unwrap();
    assert_eq!((back.gpr, back.ip, back.arith), (regs.gpr, regs.ip, regs.arith));
    assert_eq!(to_arch(&other.st, &back, 0), state);
}

#[test]
fn hostile_states() {
    let mut h = TestHost::new();
    let good = to_arch(&h.st, &Registers::default(), 0);
    let mut refused = |change: fn(&mut mimus_arch::x86::X86State)| {
        let mut state = good.clone();
        change(&mut state);
        from_arch(&mut h.st, &state, 0).unwrap_err()
    };
    assert!(refused(|s| s.xcr0 = 0x100).contains("xcr0"));
    assert!(refused(|s| s.efer = 1 << 40).contains("efer"));
    assert!(refused(|s| s.efer = EFER_LMA).contains("efer"));
    assert!(refused(|s| s.ds.base = 1 << 40).contains("base"));
    assert!(refused(|s| s.xsave.clear()).contains("xsave"));
}

#[test]
fn the_power_on_state() {
    let h = TestHost::new();
    let state = to_arch(&h.st, &Registers { gpr: [0; 16], ip: 0xfff0, arith: 0 }, 0);
    assert_eq!(state.linear_pc(), 0xffff_fff0);
    assert_eq!(h.st.code_bits(), 16);
    let _: &State = &h.st;
}

#[test]
fn memory_types_have_reserved_values() {
    let mut h = protected();
    let gp = Err(Exception::GP0);
    assert_eq!(msr::write(&mut h, number::MTRR_DEF_TYPE, 0xc06), Ok(()));
    for bad in [0xc02, 0xc03, 0xd06, 0x1000] {
        assert_eq!(msr::write(&mut h, number::MTRR_DEF_TYPE, bad), gp, "{bad:#x}");
    }
    assert_eq!(msr::write(&mut h, 0x250, 0x0606_0606_0606_0606), Ok(()));
    assert_eq!(msr::write(&mut h, 0x250, 0x0606_0606_0602_0606), gp);
    assert_eq!(msr::write(&mut h, 0x200, 0xc000_0000), Ok(()));
    assert_eq!(msr::write(&mut h, 0x200, 0xc000_0100), gp, "reserved");
    assert_eq!(msr::write(&mut h, 0x200, 7), gp, "no such type");
    assert_eq!(msr::write(&mut h, 0x200, 1 << 60), gp, "beyond physical addresses");
    assert_eq!(msr::write(&mut h, 0x201, 0xc000_0800), Ok(()));
    assert_eq!(msr::write(&mut h, 0x201, 0xc000_0400), gp);
    assert_eq!(msr::write(&mut h, number::PAT, 0x0007_0406_0007_0402), gp);
}
