//! Registers with rules of their own: reserved bits, what a write to one makes the processor load.

use super::*;
use crate::control::{invpcid, write_cr};
use crate::cpuid::Features;
use crate::exception::Exception;
use crate::msr;
use mimus_arch::GuestArch;
use mimus_arch::x86::X86Model;
use mimus_arch::x86::msr as number;
use mimus_core::accel::SysReg;

const GP: Result<(), Exception> = Err(Exception::GP0);

/// A host with the features of a model as `-cpu` names it.
fn model(text: &str) -> TestHost {
    let mut h = protected();
    let model = X86Model::parse(GuestArch::X86_64, text).unwrap().restricted_to(crate::cpuid::supported()).unwrap();
    h.st.features = Features::new(&model, 0);
    h
}

/// Bits of CR4 without their feature are reserved.
#[test]
fn cr4_has_the_bits_of_the_model() {
    for (feature, bit) in [
        ("vme", CR4_VME),
        ("tsc", CR4_TSD),
        ("de", CR4_DE),
        ("pse", CR4_PSE),
        ("mce", CR4_MCE),
        ("pge", CR4_PGE),
        ("umip", CR4_UMIP),
        ("fsgsbase", CR4_FSGSBASE),
        ("smep", CR4_SMEP),
        ("smap", CR4_SMAP),
        ("xsave", CR4_OSXSAVE),
        ("pku", CR4_PKE),
    ] {
        assert_eq!(write_cr(&mut model("max"), 4, bit), Ok(()), "{feature}");
        assert_eq!(write_cr(&mut model(&format!("max,-{feature}")), 4, bit), GP, "{feature}");
    }
}

/// Section 5.4.1: the pointers are loaded again when caching or what paging does changes, not otherwise.
#[test]
fn page_directory_pointers_are_loaded_by_cr0_and_cr4() {
    type Change = fn(&mut TestHost) -> Result<(), Exception>;
    let changes: [(&str, Change, bool); 7] = [
        ("CD", |h| write_cr(h, 0, h.st.cr0 ^ CR0_CD), true),
        ("CD and NW", |h| write_cr(h, 0, h.st.cr0 ^ CR0_CD ^ CR0_NW), true),
        ("WP", |h| write_cr(h, 0, h.st.cr0 ^ CR0_WP), false),
        ("TS", |h| write_cr(h, 0, h.st.cr0 ^ CR0_TS), false),
        ("PGE", |h| write_cr(h, 4, h.st.cr4 ^ CR4_PGE), true),
        ("SMEP", |h| write_cr(h, 4, h.st.cr4 ^ CR4_SMEP), true),
        ("DE", |h| write_cr(h, 4, h.st.cr4 ^ CR4_DE), false),
    ];
    for (what, change, loads) in changes {
        let mut h = protected();
        h.put(0x10000, 8, 0x11001);
        (h.st.cr3, h.st.cr4) = (0x10000, CR4_PAE);
        write_cr(&mut h, 0, CR0_PE | CR0_PG).unwrap();
        assert_eq!(h.st.pdptr[0], 0x11001);
        h.put(0x10000, 8, 0x12001);
        change(&mut h).unwrap();
        assert_eq!(h.st.pdptr[0], if loads { 0x12001 } else { 0x11001 }, "{what}");
        // And checked, with the register as it was.
        h.put(0x10000, 8, 0x13003);
        let (cr0, cr4) = (h.st.cr0, h.st.cr4);
        assert_eq!(change(&mut h).is_err(), loads, "{what}");
        if loads {
            assert_eq!((h.st.cr0, h.st.cr4), (cr0, cr4), "{what}");
        }
    }
}

/// Addresses in MSRs, bases and invalidations have as many bits as the processor can have, not as paging has.
#[test]
fn addresses_in_registers() {
    for la57 in [false, true] {
        let mut h = long();
        h.st.features.la57 = la57;
        let expected = if la57 { Ok(()) } else { GP };
        for n in [number::LSTAR, number::CSTAR, number::FS_BASE, number::GS_BASE, number::KERNEL_GS_BASE] {
            assert_eq!(msr::write(&mut h, n, 1 << 47), expected, "{n:#x}");
            assert_eq!(msr::write(&mut h, n, 1 << 56), GP, "{n:#x}");
        }
        assert_eq!(invpcid(&mut h, 0, 0, 1 << 47), expected);
        assert_eq!(invpcid(&mut h, 0, 0, 1 << 56), GP);
        // The task register's base.
        h.put(GDT + u64::from(TSS32), 8, 0x0000_8900_3000_0067);
        h.put(GDT + u64::from(TSS32) + 8, 8, 0x8000);
        assert_eq!(crate::segment::load_tr(&mut h, TSS32).is_ok(), la57);
    }
}

/// Section 11.12.5: what the local APIC does not take faults, and so do bits that are reserved.
#[test]
fn the_base_of_the_local_apic() {
    let mut h = protected();
    let base = number::APIC_BASE_ADDRESS;
    // Without a local APIC, only reserved bits count.
    for (value, ok) in [(0x900, true), (0xd00, true), (0x901, false), (0xb00, false), (1 << 40 | 0x900, false)] {
        assert_eq!(msr::write(&mut h, number::APIC_BASE, base | value).is_ok(), ok, "{value:#x}");
    }
    // One that refuses.
    let mut h = protected();
    h.sysregs.insert(SysReg::Msr(number::APIC_BASE), base | 0x900);
    h.refused = Some(SysReg::Msr(number::APIC_BASE));
    assert_eq!(msr::write(&mut h, number::APIC_BASE, base | 0x500), GP);
    assert_eq!(msr::read(&mut h, number::APIC_BASE), Ok(base | 0x900));
    h.st.features = model("max,-x2apic").st.features;
    h.refused = None;
    assert_eq!(msr::write(&mut h, number::APIC_BASE, base | 0xd00), GP, "no x2APIC");
    assert_eq!(msr::write(&mut h, number::APIC_BASE, base | 0x100), Ok(()));
}

/// Registers come with their features; what is locked, or has reserved bits, refuses.
#[test]
fn registers_of_features() {
    let mut h = model("max,-mtrr,-pat");
    for n in [number::MTRR_CAP, number::MTRR_DEF_TYPE, 0x200, 0x250, 0x26f, number::PAT] {
        assert_eq!(msr::read(&mut h, n), Err(Exception::GP0), "{n:#x}");
        assert_eq!(msr::write(&mut h, n, 0), GP, "{n:#x}");
    }
    let mut h = model("max,-lm,-nx,-syscall");
    assert_eq!(msr::read(&mut h, number::EFER), Err(Exception::GP0));
    assert_eq!(msr::write(&mut h, number::EFER, 0), GP);
    let mut h = long();
    assert_eq!(msr::read(&mut h, number::FEATURE_CONTROL), Ok(1));
    assert_eq!(msr::write(&mut h, number::FEATURE_CONTROL, 5), GP, "locked");
    assert_eq!(msr::write(&mut h, number::SPEC_CTRL, 1), Ok(()));
    assert_eq!(msr::write(&mut h, number::SPEC_CTRL, 1 << 20), GP);
}

/// The selector of LLDT and LTR names the GDT: found out before anything is read.
#[test]
fn system_segments_of_the_local_table() {
    let mut h = long();
    h.st.ldtr = Segment { selector: 0x50, base: 0x7000_0000, limit: 0xff, attributes: attr::P | 2 };
    assert_eq!(crate::segment::load_ldtr(&mut h, 0x0c), Err(Exception::gp_sel(0x0c)), "no page fault of the LDT");
    assert_eq!(crate::segment::load_tr(&mut h, 0x0c), Err(Exception::gp_sel(0x0c)));
}

/// IA32_TSC_DEADLINE is there with its feature; a new value of the TSC has the local APIC look at it again.
#[test]
fn the_deadline_of_the_local_apic() {
    let index = SysReg::Msr(number::TSC_DEADLINE);
    let mut h = model("max,-tsc-deadline");
    h.sysregs.insert(index, 5);
    assert_eq!(msr::read(&mut h, number::TSC_DEADLINE), Err(Exception::GP0));
    assert_eq!(msr::write(&mut h, number::TSC_DEADLINE, 7), GP);
    let mut h = model("max");
    h.sysregs.insert(index, 0);
    assert_eq!(msr::write(&mut h, number::TSC_DEADLINE, 7), Ok(()));
    assert_eq!(msr::read(&mut h, number::TSC_DEADLINE), Ok(7));
    for n in [number::TSC, number::TSC_ADJUST] {
        let before = h.written.len();
        msr::write(&mut h, n, 1 << 40).unwrap();
        assert_eq!(h.written[before..], [(index, 7)]);
        assert_eq!(h.st.tsc_published.at(1000), h.st.tsc(1000));
    }
    h.sysregs.insert(index, 0);
    let before = h.written.len();
    msr::write(&mut h, number::TSC, 0).unwrap();
    assert_eq!(h.written.len(), before, "none waits");
}

/// SDM volume 4 table 2-2: what IA32_MISC_ENABLE hides.
#[test]
fn miscellaneous_features_are_hidden() {
    use crate::cpuid::cpuid;
    let mut h = model("max");
    let nx = |h: &TestHost| cpuid(&h.st, 0x8000_0001, 0)[3] >> 20 & 1;
    assert_eq!((nx(&h), cpuid(&h.st, 0, 0)[0]), (1, 0x16));
    let before = msr::read(&mut h, number::MISC_ENABLE).unwrap();
    msr::write(&mut h, number::MISC_ENABLE, before | number::MISC_ENABLE_XD_DISABLE).unwrap();
    assert_eq!(nx(&h), 0);
    assert_eq!(msr::write(&mut h, number::EFER, EFER_NXE), GP);
    msr::write(&mut h, number::MISC_ENABLE, before | number::MISC_ENABLE_LIMIT_CPUID).unwrap();
    assert_eq!((nx(&h), cpuid(&h.st, 0, 0)[0], cpuid(&h.st, 7, 0)), (1, 2, cpuid(&h.st, 2, 0)));
    assert_eq!(cpuid(&h.st, 0x8000_0000, 0)[0], 0x8000_0008, "the others stay");
    assert_eq!(msr::write(&mut h, number::EFER, EFER_NXE), Ok(()));
    msr::write(&mut h, number::MISC_ENABLE, before).unwrap();
    assert_ne!(cpuid(&h.st, 7, 0), [0; 4]);
}
