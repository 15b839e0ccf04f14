//! SDM volume 3 chapter 7.

use super::*;
use crate::exception::Exception;
use crate::far;
use crate::host::{Host, Stop};
use crate::interrupt::{hardware, raise, software};
use crate::state::FS;

#[test]
fn real_mode() {
    let mut h = TestHost::new();
    h.st.seg[CS] = Segment::real(0x1234, attr::CODE);
    h.st.seg[SS] = Segment::real(0x0100, attr::DATA);
    h.st.flags = RFLAGS_IF | RFLAGS_TF;
    h.gpr[RSP] = 0xabcd_0010;
    h.st.idtr.base = 0;
    h.put(0x21 * 4, 4, 0xf000_e123);
    software(&mut h, 0x21, 0x102).unwrap();
    assert_eq!((h.st.seg[CS].base, h.ip, h.gpr[RSP]), (0xf0000, 0xe123, 0xabcd_000a));
    assert_eq!(h.get(0x100a, 6), 0x0302_1234_0102);
    assert_eq!(h.st.flags, 0);
    far::iret(&mut h, 2, 0).unwrap();
    assert_eq!((h.st.seg[CS].selector, h.ip, h.st.flags), (0x1234, 0x102, RFLAGS_IF | RFLAGS_TF));
}

#[test]
fn same_level() {
    let mut h = protected();
    h.st.flags = RFLAGS_IF;
    h.arith = RFLAGS_ZF;
    raise(&mut h, Exception::gp(0x28), 0x1234);
    assert_eq!((h.ip, h.gpr[RSP], h.st.cpl), (0x80d0, 0x5ff0, 0));
    assert_eq!(h.get(0x5ff0, 8), 0x1234_0000_0028);
    // RF is set in the flags pushed by a fault.
    assert_eq!(h.get(0x5ff8, 8), 0x1_0242_0000_0008);
    assert_eq!(h.st.flags & RFLAGS_IF, 0);
}

#[test]
fn to_level_0_and_back() {
    let mut h = protected();
    to_user(&mut h);
    h.st.flags = RFLAGS_IF;
    h.gpr[RSP] = 0x6abc;
    software(&mut h, 0x80, 0x1002).unwrap();
    assert_eq!((h.st.cpl, h.ip, h.gpr[RSP]), (0, 0x8800, 0x7000 - 20));
    assert_eq!((h.st.seg[CS].selector, h.st.seg[SS].selector), (CODE0, DATA0));
    assert_eq!(h.get(0x7000 - 8, 8), u64::from(DATA3) << 32 | 0x6abc);
    far::iret(&mut h, 4, 0).unwrap();
    assert_eq!((h.st.cpl, h.ip, h.gpr[RSP], h.st.flags), (3, 0x1002, 0x6abc, RFLAGS_IF));
    assert_eq!((h.st.seg[CS].selector, h.st.seg[SS].selector), (CODE3, DATA3));
    // A gate of level 0 is not for `INT n`, but for interrupts.
    assert_eq!(software(&mut h, 0x21, 0), Err(Exception::gp(0x21 * 8 + 2)));
    hardware(&mut h, 0x21, 0x55);
    assert_eq!(h.ip, 0x8210);
}

#[test]
fn data_segments_of_the_inner_level_are_dropped() {
    let mut h = protected();
    h.st.seg[DS] = Segment::flat(DATA0, attr::DATA | attr::DB);
    h.gpr[RSP] = 0x5f00;
    for (i, v) in [0x1000, u64::from(CODE3), 2, 0x6000, u64::from(DATA3)].into_iter().enumerate() {
        h.put(0x5f00 + 4 * i as u64, 4, v);
    }
    far::iret(&mut h, 4, 0).unwrap();
    assert_eq!(h.st.cpl, 3);
    assert_eq!(h.st.seg[DS].attributes & attr::UNUSABLE, attr::UNUSABLE);
}

/// A null selector that names a level is one of level 0 where a return leads outwards; at the same level it stays.
#[test]
fn null_selectors_lose_their_level_on_the_way_out() {
    for (code, stack, left) in [(CODE3, DATA3, 0), (CODE0, DATA0, 3)] {
        let mut h = protected();
        crate::segment::load(&mut h, FS, 3).unwrap();
        h.st.seg[FS].base = 0x1234;
        h.gpr[RSP] = 0x5f00;
        for (i, v) in [0x1000, code.into(), 2, 0x6000, stack.into()].into_iter().enumerate() {
            h.put(0x5f00 + 4 * i as u64, 4, v);
        }
        far::iret(&mut h, 4, 0).unwrap();
        let fs = h.st.seg[FS];
        assert_eq!((fs.selector, fs.base, fs.attributes & attr::UNUSABLE), (left, 0x1234, attr::UNUSABLE));
    }
}

/// Table 7-5 and section 7.15.
#[test]
fn double_and_triple_faults() {
    let mut h = protected();
    h.put(IDT + 8 * 13, 8, 0);
    raise(&mut h, Exception::GP0, 0x1000);
    assert_eq!((h.ip, h.get(h.gpr[RSP], 4)), (0x8080, 0), "#GP without a gate");
    // A page fault after a benign exception is just taken.
    h.put(IDT + 8 * 6, 8, 0);
    h.put(IDT + 8 * 13, 8, gate(CODE0, 0x80d0, 14, 0));
    raise(&mut h, Exception::UD, 0x1000);
    assert_eq!((h.ip, h.get(h.gpr[RSP], 4)), (0x80d0, 6 * 8 + 3), "IDT and EXT in the error code");
    h.st.idtr.limit = 0;
    raise(&mut h, Exception::GP0, 0x1000);
    assert_eq!(h.stopped, Some(Stop::TripleFault));
}

/// Section 7.14.
#[test]
fn long_mode() {
    let mut h = long();
    h.gpr[RSP] = 0x6005;
    raise(&mut h, Exception::page(2, 0xdead), 0x1234);
    assert_eq!((h.ip, h.gpr[RSP], h.st.cr2), (0x80e0, 0x6000 - 48, 0xdead));
    let frame: Vec<u64> = (0..6).map(|i| h.get(0x6000 - 48 + 8 * i, 8)).collect();
    assert_eq!(frame, [2, 0x1234, u64::from(LONG0), 0x1_0002, 0x6005, u64::from(DATA0)]);
    h.gpr[RSP] += 8;
    far::iret(&mut h, 8, 0).unwrap();
    assert_eq!((h.ip, h.gpr[RSP]), (0x1234, 0x6005));
    // A user's exception takes the stack of the TSS, with a null SS.
    h.st.cpl = 3;
    h.st.seg[CS] = Segment::flat(LONG3, attr::CODE | attr::L | 3 << attr::DPL_SHIFT);
    h.st.seg[SS] = Segment::flat(DATA3, attr::DATA | 3 << attr::DPL_SHIFT);
    software(&mut h, 3, 0x1001).unwrap();
    assert_eq!((h.gpr[RSP], h.st.cpl, h.st.seg[SS].selector), (0x7000 - 40, 0, 0));
    far::iret(&mut h, 8, 0).unwrap();
    assert_eq!((h.st.cpl, h.ip, h.st.seg[SS].selector), (3, 0x1001, DATA3));
}

#[test]
fn interrupt_stack_table() {
    let mut h = long();
    h.put(IDT + 16 * 13, 8, 0);
    raise(&mut h, Exception::GP0, 0x1234);
    assert_eq!((h.ip, h.gpr[RSP]), (0x8080, 0x7800 - 48));
}

#[test]
fn failed_delivery_changes_nothing() {
    let mut h = protected();
    to_user(&mut h);
    h.put(TSS + 8, 4, u64::from(DATA3));
    let before = (h.gpr[RSP], h.st.seg[CS], h.st.seg[SS], h.st.cpl);
    assert_eq!(software(&mut h, 0x80, 2), Err(Exception::ts(DATA3)));
    assert_eq!((h.gpr[RSP], h.st.seg[CS], h.st.seg[SS], h.st.cpl), before);
}

#[test]
fn virtual_8086() {
    let mut h = protected();
    h.gpr[RSP] = 0x5f00;
    let frame = [0x100, 0x200, RFLAGS_VM | RFLAGS_IOPL | 2, 0x300, 0x400, 0x500, 0x600, 0x700, 0x800];
    for (i, v) in frame.into_iter().enumerate() {
        h.put(0x5f00 + 4 * i as u64, 4, v);
    }
    far::iret(&mut h, 4, 0).unwrap();
    assert_eq!((h.st.cpl, h.ip, h.st.seg[CS].base, h.st.seg[ES].base), (3, 0x100, 0x2000, 0x5000));
    assert_eq!((h.st.seg[SS].base, h.gpr[RSP], h.st.mode()), (0x4000, 0x300, crate::state::Mode::V86));
    software(&mut h, 0x80, 0x102).unwrap();
    assert_eq!((h.st.cpl, h.gpr[RSP], h.st.flags & RFLAGS_VM), (0, 0x7000 - 36, 0));
    assert_eq!(h.get(0x7000 - 4, 4), 0x800);
    far::iret(&mut h, 4, 0).unwrap();
    h.st.flags &= !RFLAGS_IOPL;
    assert_eq!(software(&mut h, 0x80, 0x102), Err(Exception::GP0), "INT n needs IOPL 3");
}

#[test]
fn flags_and_privilege() {
    let mut h = protected();
    to_user(&mut h);
    let bits = far::writable_flags(&h, 3, 4);
    assert_eq!(bits & (RFLAGS_IF | RFLAGS_IOPL | RFLAGS_VM), 0);
    h.st.flags |= RFLAGS_IOPL;
    assert_eq!(far::writable_flags(&h, 3, 4) & (RFLAGS_IF | RFLAGS_IOPL), RFLAGS_IF);
    h.set_rflags(!0, far::writable_flags(&h, 0, 2));
    assert_eq!(h.rflags() & !0xffff, 0, "a 16-bit operand leaves the upper half");
}

/// What does not fit on the stack of an inner level names it (section 7.15, interrupt 12); on the current one it does not.
#[test]
fn stacks_without_room() {
    let small = |limit: u64| 0x0040_9300_0000_0000 | limit;
    let stack = ABSENT;
    for limit in [0x6ffe, 0x6fef, 0x6000] {
        let mut h = protected();
        h.put(GDT + u64::from(stack), 8, small(limit));
        h.put(TSS + 8, 4, stack.into());
        to_user(&mut h);
        assert_eq!(software(&mut h, 0x80, 2), Err(Exception::ss(stack.into())), "{limit:#x}");
        // As an exception's delivery it says that it came from outside of the program.
        h.put(IDT + 8 * 12, 8, 0);
        h.put(IDT + 8 * 11, 8, 0);
        raise(&mut h, Exception::UD, 0x1000);
        assert_eq!(h.stopped, Some(Stop::TripleFault));
        // A call gate.
        let mut h = protected();
        h.put(GDT + u64::from(stack), 8, small(limit));
        h.put(TSS + 8, 4, stack.into());
        h.put(TSS + 4, 4, 0x7100);
        to_user(&mut h);
        assert_eq!(far::call(&mut h, GATE, 0, 4, 0x1007), Err(Exception::ss(stack.into())));
    }
    let mut h = protected();
    h.put(GDT + u64::from(stack), 8, small(0x6fff));
    h.put(TSS + 8, 4, stack.into());
    to_user(&mut h);
    assert_eq!((software(&mut h, 0x80, 2), h.gpr[RSP]), (Ok(()), 0x7000 - 20), "all of it fits");
    let mut h = protected();
    h.st.seg[SS].limit = 0x5000;
    assert_eq!(software(&mut h, 0x80, 2), Err(Exception::ss(0)), "the current one");
}

/// RF in the pushed flags (section 18.3.1.1): of faults, general detect among them, not of traps.
#[test]
fn the_resume_flag_of_exceptions() {
    let debug = |payload| Exception { vector: VECTOR_DB, error: None, payload };
    let cases = [
        (Exception::UD, true),
        (Exception::DE, true),
        (debug(1 << 13), true),
        (debug(1 << 14), false),
        (debug(1), false),
        (Exception::plain(VECTOR_BP), false),
    ];
    for (exception, pushed) in cases {
        let mut h = protected();
        raise(&mut h, exception, 0x1000);
        assert_eq!(h.get(h.gpr[RSP] + 8, 4) & RFLAGS_RF != 0, pushed, "{exception:?}");
    }
}
