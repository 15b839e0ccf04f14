//! Where the processors of the two makers differ: SDM and APM, and what systems that run on both have to say.

use super::*;
use crate::exception::Exception;
use crate::msr;
use crate::paging::{Access, G, walk};
use crate::state::Mode;
use crate::{control, far, syscall};
use mimus_arch::x86::msr as number;

fn of(amd: bool, mut h: TestHost) -> TestHost {
    h.st.features.amd = amd;
    h
}

/// SYSRET to an address that is none: Intel's fault at level 0, AMD's at the next instruction, at level 3.
#[test]
fn sysret_to_no_address() {
    for amd in [false, true] {
        let mut h = of(amd, long());
        h.st.msrs.star = 0x30 << 48;
        h.gpr[RCX] = 1 << 63;
        h.gpr[R11] = RFLAGS_IF;
        let result = syscall::sysret(&mut h, true);
        if amd {
            assert_eq!((result, h.st.cpl, h.ip), (Ok(()), 3, 1 << 63));
        } else {
            assert_eq!((result, h.st.cpl, h.ip), (Err(Exception::GP0), 0, 0));
        }
    }
}

/// SYSRET loads the stack's selector; its hidden part Intel's set, AMD's leave (APM volume 3 "SYSRET").
#[test]
fn sysret_and_the_stack_segment() {
    for amd in [false, true] {
        for wide in [false, true] {
            let mut h = of(amd, long());
            h.st.msrs.star = 0x30 << 48;
            h.st.seg[SS] = Segment { selector: 0, ..Segment::UNUSABLE };
            syscall::sysret(&mut h, wide).unwrap();
            let ss = h.st.seg[SS];
            assert_eq!((ss.selector, h.st.cpl), (0x3b, 3));
            let flat = Segment::flat(0x3b, attr::DATA | attr::DB | 3 << attr::DPL_SHIFT);
            let kept = Segment { selector: 0x3b, ..Segment::UNUSABLE };
            assert_eq!(ss, if amd { kept } else { flat });
            // A stack that cannot be used, in compatibility mode.
            let push = crate::segment::linear(&h.st, SS, 0x100, 4, true);
            assert_eq!(push.is_err(), amd && !wide);
        }
    }
}

/// DEBUGCTL: bits that one maker has and the other reserves; branch steps are all that is kept.
#[test]
fn debug_control() {
    for (value, amd, takes) in [
        (2, false, true),
        (2, true, true),
        (0xffc3, false, true),
        (0xffc3, true, false),
        (0x3f, true, true),
        (0x3f, false, false),
        (1 << 32, false, false),
        (1 << 32, true, false),
    ] {
        let mut h = of(amd, long());
        assert_eq!(msr::write(&mut h, number::DEBUGCTL, value).is_ok(), takes, "{value:#x}");
        assert_eq!(msr::read(&mut h, number::DEBUGCTL), Ok(if takes { 2 } else { 0 }));
    }
}

/// AMD's long mode has neither SYSENTER nor SYSEXIT.
#[test]
fn sysexit_in_long_mode() {
    for amd in [false, true] {
        let mut h = of(amd, long());
        h.st.msrs.sysenter_cs = 8;
        (h.gpr[RDX], h.gpr[RCX]) = (0x1234, 0x5678);
        let expected = if amd { Err(Exception::UD) } else { Ok(()) };
        assert_eq!(syscall::sysexit(&mut h, true), expected);
        assert_eq!(h.st.cpl, if amd { 0 } else { 3 });
    }
}

/// EFER.LMA is the processor's: Intel's ignore what is written, AMD's want it as it is.
#[test]
fn long_mode_active_is_written() {
    for amd in [false, true] {
        let mut h = of(amd, long());
        let result = msr::write(&mut h, number::EFER, EFER_LME | EFER_SCE);
        assert_eq!(result, if amd { Err(Exception::GP0) } else { Ok(()) });
        assert_eq!(h.st.efer & (EFER_LMA | EFER_LME), EFER_LMA | EFER_LME);
        let mut h = of(amd, protected());
        assert_eq!(msr::write(&mut h, number::EFER, EFER_LMA | EFER_LME).is_err(), amd);
        assert_eq!(h.st.efer & EFER_LMA, 0);
    }
}

/// TSC_AUX has 32 bits: Intel's refuse more, AMD's drop it. AMD's SYSENTER registers have 32, too.
#[test]
fn registers_of_32_bits() {
    for amd in [false, true] {
        let mut h = of(amd, long());
        assert_eq!(msr::write(&mut h, number::TSC_AUX, 5 << 32 | 7).is_ok(), amd);
        assert_eq!(msr::read(&mut h, number::TSC_AUX), Ok(if amd { 7 } else { 0 }));
        for n in [number::SYSENTER_EIP, number::SYSENTER_ESP] {
            assert_eq!(msr::write(&mut h, n, 1 << 63 | 7).is_ok(), amd);
            msr::write(&mut h, n, 0xffff_8000_0000_1234).unwrap();
            assert_eq!(msr::read(&mut h, n), Ok(if amd { 0x1234 } else { 0xffff_8000_0000_1234 }));
        }
    }
}

/// Where a page has G, an entry of the highest levels has a bit that AMD reserves and Intel ignores.
#[test]
fn the_global_bit_of_tables() {
    for amd in [false, true] {
        let mut h = of(amd, long());
        h.put(0x10000, 8, 0x11007 | G);
        let result = walk(&mut h, 0x5000, Access::Load, true);
        assert_eq!(result.err().and_then(|e| e.error), amd.then_some(13));
        h.put(0x10000, 8, 0x11007);
        h.put(0x11000, 8, 0x12007 | G);
        assert!(walk(&mut h, 0x5000, Access::Load, true).is_ok(), "further down it is ignored");
    }
}

/// Long mode with a 16-bit TSS: Intel's check (section 11.8.5) that AMD does not have (APM volume 2 table 14-4).
#[test]
fn long_mode_with_a_16_bit_tss() {
    for (amd, kind, ok) in [(false, 3, false), (false, 1, false), (true, 3, true), (false, 0xb, true)] {
        let mut h = of(amd, protected());
        h.st.cr4 = CR4_PAE;
        h.st.efer = EFER_LME;
        h.st.tr.attributes = attr::P | kind;
        assert_eq!(control::write_cr(&mut h, 0, CR0_PE | CR0_PG).is_ok(), ok, "{amd} {kind}");
        assert_eq!(h.st.long(), ok);
    }
}

/// IRET to virtual-8086 mode beyond 64 KiB: refused (SDM), truncated (APM).
#[test]
fn virtual_8086_mode_beyond_its_segment() {
    for amd in [false, true] {
        let mut h = of(amd, protected());
        h.gpr[RSP] = 0x5f00;
        for (i, v) in [0x1_0100, 0x200, RFLAGS_VM | 2, 0x300, 0x400, 0, 0, 0, 0].into_iter().enumerate() {
            h.put(0x5f00 + 4 * i as u64, 4, v);
        }
        let result = far::iret(&mut h, 4, 0);
        if amd {
            assert_eq!((result, h.st.mode(), h.ip), (Ok(()), Mode::V86, 0x100));
        } else {
            assert_eq!((result, h.st.mode(), h.gpr[RSP]), (Err(Exception::GP0), Mode::Protected, 0x5f00));
        }
    }
}
