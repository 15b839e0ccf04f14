//! SDM volume 3 chapters 6 and 9; volume 2 "JMP", "CALL", "RET", "SYSCALL".

use super::*;
use crate::exception::Exception;
use crate::host::Host;
use crate::segment::{access_rights, limit, linear, load, load_tr, verify};
use crate::state::Mode;
use crate::task::{Switch, check_io, switch};
use crate::{far, syscall};

#[test]
fn loading_segments() {
    let mut h = protected();
    load(&mut h, DS, DATA3).unwrap();
    assert_eq!(h.st.seg[DS].selector, DATA3);
    assert_eq!(load(&mut h, SS, DATA3), Err(Exception::gp_sel(DATA3)));
    assert_eq!(load(&mut h, SS, 0), Err(Exception::GP0));
    assert_eq!(load(&mut h, DS, ABSENT), Err(Exception::np(ABSENT)));
    assert_eq!(load(&mut h, DS, 0x60), Err(Exception::gp_sel(0x60)), "past the limit");
    assert_eq!(load(&mut h, DS, TSS32), Err(Exception::gp_sel(TSS32)));
    load(&mut h, DS, 3).unwrap();
    assert_eq!(linear(&h.st, DS, 0, 1, false), Err(Exception::GP0));
    to_user(&mut h);
    assert_eq!(load(&mut h, DS, DATA0), Err(Exception::gp_sel(DATA0)));
}

#[test]
fn accessed_bit() {
    let mut h = protected();
    h.put(GDT + u64::from(DATA3 & !7), 8, flat(0xc0f2));
    load(&mut h, DS, DATA3).unwrap();
    assert_eq!(h.get(GDT + u64::from(DATA3 & !7), 8), flat(0xc0f3));
}

#[test]
fn limits() {
    let mut h = protected();
    h.st.seg[DS] = Segment { selector: 8, base: 0x1000, limit: 0xfff, attributes: attr::DATA };
    assert_eq!(linear(&h.st, DS, 0xffc, 4, true), Ok(0x1ffc));
    assert_eq!(linear(&h.st, DS, 0xffd, 4, true), Err(Exception::GP0));
    // Expand-down: above the limit.
    h.st.seg[SS] = Segment { selector: 8, base: 0, limit: 0xfff, attributes: attr::DATA | 4 };
    assert_eq!(linear(&h.st, SS, 0xfff, 1, true), Err(Exception::ss(0)));
    assert_eq!(linear(&h.st, SS, 0x1000, 1, true), Ok(0x1000));
    assert_eq!(linear(&h.st, SS, 0xfffe, 4, true), Err(Exception::ss(0)));
    // Code is never written, and read only if readable.
    assert_eq!(linear(&h.st, CS, 0, 4, true), Err(Exception::GP0));
    h.st.seg[CS].attributes &= !2;
    assert_eq!(linear(&h.st, CS, 0, 4, false), Err(Exception::GP0));
}

#[test]
fn examining_selectors() {
    let mut h = protected();
    assert_eq!(access_rights(&mut h, CODE3).unwrap(), Some(0xcf_fb00));
    assert_eq!(limit(&mut h, DATA0).unwrap(), Some(u32::MAX));
    assert_eq!(limit(&mut h, GATE).unwrap(), None);
    assert_eq!(access_rights(&mut h, 0).unwrap(), None);
    assert!(verify(&mut h, DATA3, true).unwrap() && !verify(&mut h, CODE3, true).unwrap());
    to_user(&mut h);
    assert_eq!(access_rights(&mut h, DATA0).unwrap(), None);
}

#[test]
fn real_mode_keeps_limits() {
    let mut h = TestHost::new();
    h.st.seg[DS].limit = u32::MAX;
    load(&mut h, DS, 0x1234).unwrap();
    assert_eq!((h.st.seg[DS].base, h.st.seg[DS].limit), (0x12340, u32::MAX));
}

#[test]
fn call_gate_to_level_0_and_back() {
    let mut h = protected();
    // Two parameters.
    h.put(GDT + u64::from(GATE), 8, gate(CODE0, 0x9000, 12, 3) | 2 << 32);
    to_user(&mut h);
    h.gpr[RSP] = 0x6000;
    h.put(0x6000, 8, 0x2222_2222_1111_1111);
    far::call(&mut h, GATE, 0xdead, 4, 0x1007).unwrap();
    assert_eq!((h.st.cpl, h.ip, h.gpr[RSP]), (0, 0x9000, 0x7000 - 24));
    let frame: Vec<u64> = (0..6).map(|i| h.get(0x7000 - 24 + 4 * i, 4)).collect();
    assert_eq!(frame, [0x1007, u64::from(CODE3), 0x1111_1111, 0x2222_2222, 0x6000, u64::from(DATA3)]);
    far::ret(&mut h, 4, 8).unwrap();
    assert_eq!((h.st.cpl, h.ip, h.gpr[RSP]), (3, 0x1007, 0x6008));
    assert_eq!(far::jump(&mut h, CODE0, 0, 4, 0), Err(Exception::gp_sel(CODE0)));
}

#[test]
fn jumps_change_the_code_size() {
    let mut h = long();
    assert_eq!(h.st.mode(), Mode::Long);
    far::jump(&mut h, CODE0, 0x1000, 4, 0).unwrap();
    assert_eq!((h.st.mode(), h.st.code_bits()), (Mode::Protected, 32));
    far::jump(&mut h, LONG0, 0x2000, 4, 0).unwrap();
    assert_eq!(h.st.code_bits(), 64);
    assert_eq!(far::jump(&mut h, 0, 0, 4, 0), Err(Exception::GP0));
}

#[test]
fn fast_system_calls() {
    let mut h = long();
    h.st.msrs.star = u64::from(CODE0) << 32 | 0x30 << 48;
    h.st.msrs.lstar = 0xffff_8000_0000_1000;
    h.st.msrs.fmask = RFLAGS_IF | RFLAGS_CF;
    h.st.cpl = 3;
    h.st.seg[CS] = Segment::flat(LONG3, attr::CODE | attr::L | 3 << attr::DPL_SHIFT);
    h.st.flags = RFLAGS_IF;
    h.arith = RFLAGS_CF;
    syscall::syscall(&mut h, 0x1002).unwrap();
    assert_eq!((h.ip, h.st.cpl, h.gpr[RCX], h.gpr[R11]), (0xffff_8000_0000_1000, 0, 0x1002, 0x203));
    assert_eq!((h.rflags(), h.st.seg[CS].selector, h.st.seg[SS].selector), (2, 8, 0x10));
    syscall::sysret(&mut h, true).unwrap();
    assert_eq!((h.ip, h.st.cpl, h.rflags()), (0x1002, 3, 0x203));
    assert_eq!((h.st.seg[CS].selector, h.st.seg[SS].selector), (0x43, 0x3b));
    assert_eq!(syscall::sysret(&mut h, true), Err(Exception::GP0));
    h.st.efer &= !EFER_SCE;
    assert_eq!(syscall::syscall(&mut h, 0), Err(Exception::UD));
}

/// A 32-bit program under a 64-bit kernel: AMD's processors enter at CSTAR, in 64-bit code; Intel's do not know it.
#[test]
fn system_calls_from_compatibility_mode() {
    for amd in [true, false] {
        let mut h = long();
        h.st.features.amd = amd;
        h.st.msrs.star = 0x0b << 32 | 0x18 << 48;
        (h.st.msrs.lstar, h.st.msrs.cstar) = (0x1111, 0xffff_8000_0000_2000);
        h.st.msrs.fmask = RFLAGS_IF | RFLAGS_TF;
        to_user(&mut h);
        h.st.flags = RFLAGS_IF | RFLAGS_TF | RFLAGS_RF | RFLAGS_NT;
        h.arith = RFLAGS_CF;
        (h.gpr[RCX], h.gpr[R11], h.gpr[RSP]) = (!0, !0, 0x5000);
        let before = (h.ip, h.st.cpl, h.gpr, h.rflags());
        let result = syscall::syscall(&mut h, 0xffff_fffe);
        if !amd {
            assert_eq!(result, Err(Exception::UD));
            assert_eq!((h.ip, h.st.cpl, h.gpr, h.rflags()), before);
            continue;
        }
        result.unwrap();
        assert_eq!((h.ip, h.st.cpl, h.st.code_bits()), (0xffff_8000_0000_2000, 0, 64));
        assert_eq!((h.gpr[RCX], h.gpr[R11]), (0xffff_fffe, RFLAGS_IF | RFLAGS_TF | RFLAGS_NT | RFLAGS_CF | 2));
        assert_eq!((h.rflags(), h.gpr[RSP]), (RFLAGS_NT | RFLAGS_CF | 2, 0x5000));
        let (cs, ss) = (h.st.seg[CS], h.st.seg[SS]);
        assert_eq!((cs.selector, cs.base, cs.limit), (0x08, 0, u32::MAX));
        assert_eq!(
            (ss.selector, ss.base, ss.limit),
            (0x13, 0, u32::MAX),
            "the code's selector without its level, plus 8"
        );
        // And back to 32-bit code.
        h.gpr[RCX] |= 1 << 40;
        syscall::sysret(&mut h, false).unwrap();
        assert_eq!((h.ip, h.st.cpl, h.st.code_bits()), (0xffff_fffe, 3, 32));
        assert_eq!(h.rflags(), RFLAGS_IF | RFLAGS_TF | RFLAGS_NT | RFLAGS_CF | 2);
        assert_eq!((h.st.seg[CS].selector, h.st.seg[SS].selector), (0x1b, 0x23));
        h.st.efer &= !EFER_SCE;
        assert_eq!(syscall::syscall(&mut h, 0), Err(Exception::UD));
    }
}

/// Without long mode, on AMD's processors: the entry is in STAR, there is no mask, and R11 does not exist.
#[test]
fn system_calls_in_legacy_mode() {
    let mut h = protected();
    (h.st.efer, h.st.features.amd) = (EFER_SCE, true);
    (h.st.msrs.star, h.st.msrs.fmask) = (0x9abc_def0 | 0x08 << 32 | 0x18 << 48, !0);
    to_user(&mut h);
    h.st.flags = RFLAGS_IF | RFLAGS_DF;
    h.gpr[R11] = 0x77;
    syscall::syscall(&mut h, 0x1002).unwrap();
    assert_eq!((h.ip, h.st.cpl, h.gpr[RCX], h.gpr[R11], h.rflags()), (0x9abc_def0, 0, 0x1002, 0x77, RFLAGS_DF | 2));
    assert_eq!((h.st.seg[CS].selector, h.st.seg[SS].selector, h.st.code_bits()), (0x08, 0x10, 32));
    syscall::sysret(&mut h, false).unwrap();
    assert_eq!((h.ip, h.st.cpl, h.rflags()), (0x1002, 3, RFLAGS_IF | RFLAGS_DF | 2));
    assert_eq!((h.st.seg[CS].selector, h.st.seg[SS].selector), (0x1b, 0x23));
    assert_eq!(syscall::sysret(&mut h, false), Err(Exception::GP0), "at level 3");
    h.st.features.amd = false;
    assert_eq!(syscall::syscall(&mut h, 0), Err(Exception::UD));
    assert_eq!(syscall::sysret(&mut h, false), Err(Exception::UD));
    // Real mode has none.
    let mut h = TestHost::new();
    (h.st.efer, h.st.features.amd) = (EFER_SCE, true);
    assert_eq!(syscall::syscall(&mut h, 0), Err(Exception::UD));
}

#[test]
fn sysenter_and_sysexit() {
    let mut h = protected();
    to_user(&mut h);
    assert_eq!(syscall::sysenter(&mut h), Err(Exception::GP0));
    h.st.msrs.sysenter_cs = 8;
    h.st.msrs.sysenter_eip = 0x9000;
    h.st.msrs.sysenter_esp = 0x7000;
    h.st.flags |= RFLAGS_IF;
    syscall::sysenter(&mut h).unwrap();
    assert_eq!((h.ip, h.gpr[RSP], h.st.cpl, h.st.flags), (0x9000, 0x7000, 0, 0));
    (h.gpr[RDX], h.gpr[RCX]) = (0x1000, 0x6000);
    syscall::sysexit(&mut h, false).unwrap();
    assert_eq!((h.ip, h.gpr[RSP], h.st.cpl, h.st.seg[CS].selector), (0x1000, 0x6000, 3, 0x1b));
}

#[test]
fn tasks() {
    let mut h = protected();
    let other = 0x38;
    h.put(GDT + other, 8, 0x0000_8900_4000_0067);
    for (at, v) in [(0x20, 0xaaaa), (0x24, 0x202), (0x28, 0x77), (0x38, 0x5000)] {
        h.put(0x4000 + at, 4, v);
    }
    for (i, s) in [DATA0, CODE0, DATA0, DATA0, 0, 0].into_iter().enumerate() {
        h.put(0x4048 + 4 * i as u64, 4, u64::from(s));
    }
    h.put(GDT + u64::from(TSS32), 8, 0x0000_8b00_3000_0067);
    h.gpr[RAX] = 0x1234;
    switch(&mut h, other as u16, Switch::Call, 0x1111).unwrap();
    assert_eq!((h.ip, h.gpr[RAX], h.gpr[RSP]), (0xaaaa, 0x77, 0x5000));
    assert_eq!((h.st.flags & RFLAGS_NT, h.st.cr0 & CR0_TS), (RFLAGS_NT, CR0_TS));
    assert_eq!((h.get(0x4000, 2), h.get(TSS + 0x20, 4)), (u64::from(TSS32), 0x1111));
    // IRET with NT goes back.
    far::iret(&mut h, 4, 0xaaab).unwrap();
    assert_eq!((h.ip, h.gpr[RAX], h.st.tr.selector), (0x1111, 0x1234, TSS32));
    assert_eq!(h.get(GDT + other, 8) >> 40 & 15, 9, "not busy any more");
}

#[test]
fn task_register_and_io_map() {
    let mut h = protected();
    load_tr(&mut h, TSS32).unwrap();
    assert_eq!(load_tr(&mut h, TSS32), Err(Exception::gp_sel(TSS32)), "busy");
    to_user(&mut h);
    h.put(TSS + 0x66, 2, 0xffff);
    assert_eq!(check_io(&mut h, 0x80, 1), Err(Exception::GP0));
    h.put(TSS + 0x66, 2, 0x68);
    h.st.tr.limit = 0x80;
    assert_eq!(check_io(&mut h, 0x80, 1), Ok(()));
    h.put(TSS + 0x68 + 0x10, 1, 2);
    assert_eq!(check_io(&mut h, 0x80, 1), Ok(()));
    assert_eq!(check_io(&mut h, 0x80, 2), Err(Exception::GP0));
    assert_eq!(check_io(&mut h, 0x800, 1), Err(Exception::GP0), "past the limit");
    h.st.flags |= RFLAGS_IOPL;
    assert!(check_io(&mut h, 0x800, 1).is_ok());
    assert_eq!(h.need_cpl0(), Err(Exception::GP0));
}

/// Accessed and busy bits are set by locked cycles (section 9.1.2.1): what another processor changes meanwhile stays, and
/// one of two that load the same TSS fails.
#[test]
fn descriptors_are_changed_by_locked_cycles() {
    let mut h = protected();
    let at = GDT + u64::from(DATA0);
    let rights = at + 5;
    h.put(rights, 1, 0x92);
    // Base and granularity change just before.
    h.raced = Some((at + 6, 2, 0x12cf));
    load(&mut h, DS, DATA0).unwrap();
    assert_eq!((h.get(rights, 1), h.get(at + 6, 2), h.raced), (0x93, 0x12cf, None));

    let busy = GDT + u64::from(TSS32) + 5;
    assert_eq!(load_tr(&mut h, TSS32), Ok(()));
    assert_eq!(h.get(busy, 1), 0x8b);
    h.put(busy, 1, 0x89);
    h.raced = Some((busy, 1, 0x8b));
    assert_eq!(load_tr(&mut h, TSS32), Err(Exception::gp_sel(TSS32)));
    // A table that is not aligned.
    let entry = h.get(at, 8) & !(1 << 40);
    h.st.gdtr.base += 3;
    h.put(at + 3, 8, entry);
    load(&mut h, ES, DATA0).unwrap();
    assert_eq!(h.get(at + 3, 8), entry | 1 << 40);
}
