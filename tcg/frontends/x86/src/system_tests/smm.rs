//! SDM volume 3 chapter 32: the save area in both layouts, what RSM refuses.

use super::*;
use crate::host::{Host, Stop};
use crate::smm::{self, PortAccess, Resumed, SMBASE_RESET};
use crate::state::{FS, GS, State};
use mimus_arch::GuestArch;
use mimus_arch::x86::X86Model;

const AREA: u64 = SMBASE_RESET + 0x8000;

/// Registers that differ from one another, so that none is taken for another.
fn interrupted(mut h: TestHost) -> TestHost {
    for n in 0..16 {
        h.gpr[n] = 0x1000 + n as u64;
    }
    h.arith = RFLAGS_CF | RFLAGS_OF;
    h.st.flags = RFLAGS_IF | RFLAGS_DF;
    h.st.dr7 = 0x455;
    h.st.cr3 = 0x9000;
    h.st.seg[FS] = Segment { selector: 0x63, base: 0x1234_5678, limit: 0xffff, attributes: attr::DATA };
    h.st.seg[GS] = Segment::UNUSABLE;
    h
}

fn round_trip(mut h: TestHost) -> TestHost {
    let before = (h.gpr, h.rflags(), h.st.seg, h.st.ldtr, h.st.tr, h.st.gdtr, h.st.idtr, h.st.cpl);
    let control = (h.st.cr0, h.st.cr3, h.st.cr4, h.st.efer, h.st.dr6, h.st.dr7);
    smm::enter(&mut h, 0x5555, false, None);
    assert!(h.st.smm && h.st.nmi_masked);
    assert_eq!((h.ip, h.st.cr0 & (CR0_PE | CR0_PG), h.st.cr4, h.st.efer, h.st.dr7), (0x8000, 0, 0, 0, 0x400));
    assert_eq!((h.st.seg[CS].base, h.st.seg[CS].selector, h.st.seg[DS].limit), (0x3_0000, 0x3000, u32::MAX));
    assert_eq!((h.rflags(), h.st.cpl), (RFLAGS_FIXED, 0));
    h.gpr = [0; 16];
    h.st.gdtr.base = 1;
    assert_eq!((smm::resume(&mut h), h.stopped), (Resumed::Running, None));
    assert!(!h.st.smm && !h.st.nmi_masked);
    let wide = if h.st.features.long_mode { 16 } else { 8 };
    assert_eq!(h.gpr[..wide], before.0[..wide]);
    assert_eq!((h.rflags(), h.st.seg, h.st.ldtr, h.st.tr), (before.1, before.2, before.3, before.4));
    assert_eq!((h.st.gdtr, h.st.idtr, h.st.cpl, h.ip), (before.5, before.6, before.7, 0x5555));
    assert_eq!((h.st.cr0, h.st.cr3, h.st.cr4, h.st.efer, h.st.dr6, h.st.dr7), control);
    h
}

#[test]
fn the_64_bit_area() {
    let mut h = round_trip(interrupted(long()));
    assert_eq!((h.get(AREA + 0x7efc, 4), h.get(AREA + 0x7f00, 4)), (0x3_0064, 0x3_0000));
    assert_eq!((h.get(AREA + 0x7ff8, 8), h.get(AREA + 0x7f80, 8)), (0x1000, 0x100f), "RAX and R15");
    assert_eq!((h.get(AREA + 0x7f78, 8), h.get(AREA + 0x7f50, 8)), (0x5555, 0x9000), "RIP and CR3");
    assert_eq!((h.get(AREA + 0x7e40, 2), h.get(AREA + 0x7e48, 8)), (0x63, 0x1234_5678), "FS");
    let mut user = interrupted(long());
    to_user(&mut user);
    round_trip(user);
}

#[test]
fn the_32_bit_area() {
    let mut h = interrupted(protected());
    let model = X86Model::parse(GuestArch::I386, "qemu32").unwrap();
    let kept = std::mem::replace(&mut h.st, State::new(&model, 0));
    assert!(!h.st.features.long_mode);
    (h.st.seg, h.st.gdtr, h.st.idtr, h.st.tr) = (kept.seg, kept.gdtr, kept.idtr, kept.tr);
    (h.st.cr0, h.st.cr3, h.st.flags, h.st.dr7) = (kept.cr0, 0x9000, kept.flags, 0x455);
    let mut h = round_trip(h);
    assert_eq!((h.get(AREA + 0x7efc, 4), h.get(AREA + 0x7ef8, 4)), (0x3_0000, 0x3_0000));
    assert_eq!((h.get(AREA + 0x7fd0, 4), h.get(AREA + 0x7fec, 4)), (0x1000, 0x1007), "EAX and EDI");
    assert_eq!((h.get(AREA + 0x7ff0, 4), h.get(AREA + 0x7ffc, 4)), (0x5555, h.st.cr0), "EIP and CR0");
    assert_eq!((h.get(AREA + 0x7fb8, 4), h.get(AREA + 0x7fac, 4)), (0x63, u64::from(CODE0)), "FS and CS");
}

#[test]
fn the_handler_changes_what_it_returns_to() {
    let mut h = interrupted(long());
    smm::enter(&mut h, 0x5555, true, None);
    assert_eq!(h.get(AREA + 0x7ec9, 1), 1, "it was halted");
    h.put(AREA + 0x7ff8, 8, 0xabcd);
    h.put(AREA + 0x7f00, 4, 0xa_0000);
    assert_eq!(smm::resume(&mut h), Resumed::Halted, "and goes on being");
    assert_eq!((h.gpr[0], h.st.msrs.smbase), (0xabcd, 0xa_0000));
    // The next SMI is at the new place; auto-halt can be declined.
    smm::enter(&mut h, 0x6666, true, None);
    assert_eq!((h.st.seg[CS].base, h.get(0xa_ff78, 8)), (0xa_0000, 0x6666));
    h.put(0xa_fec9, 1, 0);
    assert_eq!(smm::resume(&mut h), Resumed::Running);
}

#[test]
fn what_resume_refuses() {
    let broken = [
        (0x7f58, CR0_PG, "paging without protection"),
        (0x7f58, CR0_PE | CR0_NW, "NW without CD"),
        (0x7f48, 1 << 31, "reserved bits of CR4"),
        (0x7ed0, 1 << 20, "reserved bits of EFER"),
        (0x7ed0, EFER_LMA, "long mode active but not on"),
        (0x7f50, 1 << 40, "a root beyond physical addresses"),
        (0x7f60, 1 << 32, "reserved bits of DR7"),
        (0x7f68, 1 << 32, "reserved bits of DR6"),
        (0x7f70, RFLAGS_VM, "virtual-8086 in long mode"),
        (0x7e12, 0xffff_ffff_e09b, "code of 32 and of 64 bits"),
        (0x7f48, 0, "long mode without PAE"),
        (0x7e08, 1 << 32, "a base above 4 GiB"),
    ];
    for (at, value, why) in broken {
        let mut h = interrupted(long());
        smm::enter(&mut h, 0, false, None);
        h.put(AREA + at, 8, value);
        smm::resume(&mut h);
        assert_eq!(h.stopped, Some(Stop::TripleFault), "{why}");
    }
}

/// LMA follows from what turns long mode on; bits of CR0 that there are not are ignored.
#[test]
fn long_mode_is_found_again() {
    let mut h = interrupted(long());
    smm::enter(&mut h, 0x5555, false, None);
    let efer = h.get(AREA + 0x7ed0, 8);
    h.put(AREA + 0x7ed0, 8, efer & !EFER_LMA);
    let cr0 = h.get(AREA + 0x7f58, 8);
    h.put(AREA + 0x7f58, 8, cr0 | 0x40);
    smm::resume(&mut h);
    assert_eq!((h.stopped, h.st.efer, h.st.cr0), (None, efer, cr0));
}

fn access(debug: u64) -> PortAccess {
    let (rcx, rsi, rdi) = (7, 0x111, 0x222);
    let (string, repeated) = (true, true);
    PortAccess { port: 0xb2, bytes: 2, reads: true, string, repeated, ip: 0x5550, rcx, rsi, rdi, goes_on_at: 0, debug }
}

/// Section 32.12 and APM volume 2 section 10.2.4: what the area says of the I/O instruction, and going on before it.
#[test]
fn io_instructions_are_restarted() {
    for restarts in [false, true] {
        let mut h = interrupted(long());
        smm::enter(&mut h, 0x5555, false, Some(access(0)));
        // Port, two bytes, repeated, of strings, valid, read.
        assert_eq!((h.get(AREA + 0x7ec0, 4), h.get(AREA + 0x7ec8, 1)), (0x00b2_002f, 0));
        let saved = [0x7ea0, 0x7ea8, 0x7eb0, 0x7eb8].map(|at| h.get(AREA + at, 8));
        assert_eq!(saved, [0x5550, 7, 0x111, 0x222]);
        if restarts {
            h.put(AREA + 0x7ec8, 1, 0xff);
        }
        assert_eq!(smm::resume(&mut h), Resumed::Running);
        let expected = if restarts { (0x5550, 7, 0x111, 0x222) } else { (0x5555, 0x1001, 0x1006, 0x1007) };
        assert_eq!((h.ip, h.gpr[RCX], h.gpr[RSI], h.gpr[RDI]), expected);
        assert_eq!(h.gpr[RAX], 0x1000);
    }
    // Behind any other instruction there is nothing to go back to.
    let mut h = interrupted(long());
    smm::enter(&mut h, 0x5555, false, None);
    assert_eq!(h.get(AREA + 0x7ec0, 4), 0);
    h.put(AREA + 0x7ec8, 1, 0xff);
    assert_eq!((smm::resume(&mut h), h.ip, h.gpr[RCX]), (Resumed::Running, 0x5555, 0x1001));
}

#[test]
fn io_instructions_are_restarted_by_32_bit_processors() {
    let model = X86Model::parse(GuestArch::I386, "qemu32").unwrap();
    for restarts in [false, true] {
        let mut h = interrupted(protected());
        h.st.features = crate::cpuid::Features::new(&model, 0);
        smm::enter(&mut h, 0x5555, false, Some(access(0)));
        let saved = [0x7f10, 0x7f08, 0x7f0c, 0x7f04].map(|at| h.get(AREA + at, 4));
        assert_eq!((saved, h.get(AREA + 0x7f00, 2)), ([0x5550, 7, 0x111, 0x222], 0));
        if restarts {
            h.put(AREA + 0x7f00, 2, 0xff);
        }
        assert_eq!(smm::resume(&mut h), Resumed::Running);
        let expected = if restarts { (0x5550, 7, 0x111, 0x222) } else { (0x5555, 0x1001, 0x1006, 0x1007) };
        assert_eq!((h.ip, h.gpr[RCX], h.gpr[RSI], h.gpr[RDI]), expected);
    }
}

/// An SMI comes before the debug exceptions of the instruction that raised it; they come with RSM, unless the instruction
/// is to be executed again.
#[test]
fn debug_exceptions_wait_for_resume() {
    for (debug, word) in [(1 << 14, 1 << 11), (5, 5 << 12), (1 << 14 | 8, 1 << 11 | 8 << 12)] {
        let mut h = interrupted(long());
        smm::enter(&mut h, 0x5555, false, Some(access(debug)));
        assert_eq!(h.get(AREA + 0x7ec0, 4), 0x00b2_002f | word);
        assert_eq!((smm::resume(&mut h), h.ip), (Resumed::Debug(debug), 0x5555));
        smm::enter(&mut h, 0x5555, false, Some(access(debug)));
        h.put(AREA + 0x7ec8, 1, 0xff);
        assert_eq!((smm::resume(&mut h), h.ip), (Resumed::Running, 0x5550));
    }
}

/// There is no FREEZE_WHILE_SMM: DEBUGCTL stays.
#[test]
fn branch_steps_stay_on() {
    let mut h = interrupted(long());
    h.st.msrs.debugctl = 2;
    smm::enter(&mut h, 0x5555, false, None);
    assert_eq!((h.st.msrs.debugctl, h.rflags() & RFLAGS_TF), (2, 0));
    smm::resume(&mut h);
    assert_eq!(h.st.msrs.debugctl, 2);
}
