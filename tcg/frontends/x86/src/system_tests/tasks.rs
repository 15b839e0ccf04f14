//! SDM volume 3 chapter 9 (tasks), section 6.8.3 (call gates), volume 2 SYSRET, SYSEXIT, IRET: the corners.

use super::*;
use crate::exception::Exception;
use crate::far;
use crate::host::Host;
use crate::interrupt;
use crate::state::Mode;
use crate::syscall;
use crate::task::{Switch, switch};

/// Where the other tasks are, and what names them.
const OTHER: u16 = 0x38;
const SMALL: u16 = 0x50;
const OTHER_AT: u64 = 0x4000;
const SMALL_AT: u64 = 0x4100;
const FREE: u64 = 9;
const BUSY: u64 = 11;

fn kind(h: &mut TestHost, selector: u16) -> u64 {
    h.get(GDT + u64::from(selector), 8) >> 40 & 15
}

/// Protected mode in the task of [`TSS32`], with a 32-bit and a 16-bit task beside it.
fn tasked() -> TestHost {
    let mut h = protected();
    h.put(GDT + u64::from(TSS32), 8, 0x0000_8b00_3000_0067);
    h.put(GDT + u64::from(OTHER), 8, 0x0000_8900_4000_0067);
    h.put(GDT + u64::from(SMALL), 8, 0x0000_8100_4100_002b);
    for (at, v) in [(0x1c, 0), (0x20, 0xaaaa), (0x24, 0x202), (0x28, 0x77), (0x38, 0x5000), (0x60, 0), (0x64, 0)] {
        h.put(OTHER_AT + at, 4, v);
    }
    for (i, s) in [DATA0, CODE0, DATA0, DATA0, DATA0, 0].into_iter().enumerate() {
        h.put(OTHER_AT + 0x48 + 4 * i as u64, 4, s.into());
    }
    for (at, v) in [(0xe, 0xbbbb), (0x10, 0x0202), (0x12, 0x1234), (0x1a, 0x5800), (0x2a, 0)] {
        h.put(SMALL_AT + at, 2, v);
    }
    for (i, s) in [DATA0, CODE0, DATA0, DATA0].into_iter().enumerate() {
        h.put(SMALL_AT + 0x22 + 2 * i as u64, 2, s.into());
    }
    h.gpr[RAX] = 0x8765_4321;
    h.st.seg[crate::state::FS] = Segment::flat(DATA0, attr::DATA | attr::DB);
    h
}

#[test]
fn a_jump_leaves_its_task_free() {
    let mut h = tasked();
    h.st.dr7 |= 0x355;
    switch(&mut h, OTHER, Switch::Jump, 0x1111).unwrap();
    assert_eq!((h.ip, h.gpr[RAX], h.st.tr.selector, h.st.tr.attributes & 15), (0xaaaa, 0x77, OTHER, BUSY as u32));
    assert_eq!((kind(&mut h, TSS32), kind(&mut h, OTHER)), (FREE, BUSY));
    assert_eq!((h.st.flags & RFLAGS_NT, h.get(OTHER_AT, 2)), (0, 0), "not nested, no way back");
    assert_eq!((h.get(TSS + 0x20, 4), h.get(TSS + 0x28, 4)), (0x1111, 0x8765_4321));
    assert_eq!((h.st.cr0 & CR0_TS, h.st.dr7 & 0x355), (CR0_TS, 0x200), "local breakpoints go");
    // To itself: busy.
    assert_eq!(switch(&mut h, OTHER, Switch::Jump, 0), Err(Exception::gp_sel(OTHER)));
}

#[test]
fn a_call_nests_and_iret_comes_back() {
    let mut h = tasked();
    switch(&mut h, OTHER, Switch::Call, 0x1111).unwrap();
    assert_eq!((kind(&mut h, TSS32), kind(&mut h, OTHER)), (BUSY, BUSY));
    assert_eq!((h.st.flags & RFLAGS_NT, h.get(OTHER_AT, 2)), (RFLAGS_NT, u64::from(TSS32)));
    // The caller is busy: it cannot be called back.
    assert_eq!(switch(&mut h, TSS32, Switch::Call, 0), Err(Exception::gp_sel(TSS32)));
    far::iret(&mut h, 4, 0x2222).unwrap();
    assert_eq!((h.ip, h.gpr[RAX], h.st.tr.selector), (0x1111, 0x8765_4321, TSS32));
    assert_eq!((kind(&mut h, TSS32), kind(&mut h, OTHER)), (BUSY, FREE));
    assert_eq!(h.get(OTHER_AT + 0x24, 4) & RFLAGS_NT, 0, "saved without NT");
    assert_eq!(h.get(OTHER_AT + 0x20, 4), 0x2222, "goes on there");
    // A way back to a task that is not busy is none.
    switch(&mut h, OTHER, Switch::Call, 0x1111).unwrap();
    h.put(GDT + u64::from(TSS32), 8, 0x0000_8900_3000_0067);
    assert_eq!(far::iret(&mut h, 4, 0), Err(Exception::ts(TSS32)));
    // Nor one in an LDT.
    h.put(OTHER_AT, 2, 0x0c);
    assert_eq!(far::iret(&mut h, 4, 0), Err(Exception::ts(0x0c)));
}

#[test]
fn sixteen_bit_tasks() {
    let mut h = tasked();
    switch(&mut h, SMALL, Switch::Call, 0x1111).unwrap();
    assert_eq!((h.ip, h.gpr[RAX] & 0xffff, h.gpr[RSP] & 0xffff), (0xbbbb, 0x1234, 0x5800));
    assert_eq!((h.st.seg[crate::state::FS].selector, h.get(SMALL_AT, 2)), (0, u64::from(TSS32)));
    assert_eq!((kind(&mut h, SMALL), h.st.tr.attributes & 15), (3, 3));
    h.gpr[RAX] = 0xffff_5678;
    far::iret(&mut h, 2, 0xbbcc).unwrap();
    assert_eq!((h.get(SMALL_AT + 0xe, 2), h.get(SMALL_AT + 0x12, 2)), (0xbbcc, 0x5678));
    assert_eq!(h.get(SMALL_AT + 0x2c, 2), 0, "nothing is saved behind a 16-bit TSS");
    assert_eq!((h.ip, h.gpr[RAX], h.st.seg[crate::state::FS].selector), (0x1111, 0x8765_4321, DATA0));
}

#[test]
fn what_no_task_can_be() {
    let mut h = tasked();
    let other = u64::from(OTHER);
    let state = (h.ip, h.st.tr.selector, h.gpr[RSP]);
    let cases = [
        (0x0000_8900_4000_0066, Exception::ts(OTHER), "a limit that is too low"),
        (0x0000_0900_4000_0067, Exception::np(OTHER), "not present"),
        (0x0000_8200_4000_0067, Exception::gp_sel(OTHER), "an LDT"),
        (flat(0xc093), Exception::gp_sel(OTHER), "a data segment"),
    ];
    for (descriptor, exception, what) in cases {
        h.put(GDT + other, 8, descriptor);
        assert_eq!(switch(&mut h, OTHER, Switch::Jump, 0), Err(exception), "{what}");
        assert_eq!((h.ip, h.st.tr.selector, h.gpr[RSP]), state, "{what}");
    }
    assert_eq!(switch(&mut h, OTHER | 4, Switch::Jump, 0), Err(Exception::gp_sel(OTHER | 4)), "of the LDT");
    // By privilege: a TSS is called at its level, a task gate at the gate's.
    h.put(GDT + other, 8, 0x0000_8900_4000_0067);
    to_user(&mut h);
    assert_eq!(far::call(&mut h, OTHER, 0, 4, 0), Err(Exception::gp_sel(OTHER)));
    h.put(GDT + u64::from(GATE), 8, gate(OTHER, 0, 5, 3));
    far::call(&mut h, GATE, 0x1234, 4, 0x1111).unwrap();
    assert_eq!((h.ip, h.st.cpl, h.st.tr.selector), (0xaaaa, 0, OTHER), "the gate's offset does not count");
}

/// What is wrong with the new task's segments is an exception of the new task (section 9.3, step 11 on).
#[test]
fn faults_behind_the_switch_are_the_new_tasks() {
    let cases = [
        (0x50, CODE0, Exception::ts(CODE0)),
        (0x4c, DATA0, Exception::ts(DATA0)),
        (0x48, ABSENT, Exception::np(ABSENT)),
    ];
    for (at, selector, exception) in cases {
        let mut h = tasked();
        h.put(OTHER_AT + at, 4, selector.into());
        assert_eq!(switch(&mut h, OTHER, Switch::Jump, 0x1111), Err(exception), "{at:#x}");
        assert_eq!((h.ip, h.st.tr.selector, kind(&mut h, TSS32)), (0xaaaa, OTHER, FREE), "{at:#x}");
    }
    // T: a debug exception before its first instruction.
    let mut h = tasked();
    h.put(OTHER_AT + 0x64, 2, 1);
    let e = switch(&mut h, OTHER, Switch::Jump, 0).unwrap_err();
    assert_eq!((e.vector, e.payload, h.ip), (VECTOR_DB, 1 << 15, 0xaaaa));
}

/// An exception through a task gate: its error code is on the new task's stack, as wide as its TSS says.
#[test]
fn exceptions_through_task_gates() {
    for (selector, sp, bytes) in [(OTHER, 0x5000, 4), (SMALL, 0x5800, 2)] {
        let mut h = tasked();
        // A stack of 16 bits for the 16-bit task, whose ESP has no upper half.
        h.put(GDT + u64::from(ABSENT), 8, flat(0x8093));
        h.put(SMALL_AT + 0x26, 2, ABSENT.into());
        h.put(IDT + 8 * 13, 8, gate(selector, 0, 5, 0));
        interrupt::raise(&mut h, Exception::gp_sel(0x18), 0x1111);
        assert_eq!((h.st.tr.selector, h.gpr[RSP] & 0xffff), (selector, sp - bytes));
        assert_eq!(h.get(sp - bytes, bytes as u32), 0x18);
        assert_eq!((h.get(TSS + 0x20, 4), h.st.flags & RFLAGS_NT), (0x1111, RFLAGS_NT));
    }
}

/// A task in virtual-8086 mode, by its flags.
#[test]
fn a_task_in_virtual_8086_mode() {
    let mut h = tasked();
    h.put(OTHER_AT + 0x24, 4, RFLAGS_VM | 0x202);
    h.put(OTHER_AT + 0x4c, 4, 0x1234);
    switch(&mut h, OTHER, Switch::Jump, 0).unwrap();
    assert_eq!((h.st.mode(), h.st.cpl, h.st.seg[CS].base, h.st.seg[CS].limit), (Mode::V86, 3, 0x12340, 0xffff));
}

#[test]
fn call_gates_that_lead_nowhere() {
    let mut h = protected();
    to_user(&mut h);
    let before = (h.ip, h.st.cpl, h.gpr[RSP], h.st.seg[CS].selector);
    let cases = [
        (gate(CODE0, 0x9000, 12, 0), Exception::gp_sel(GATE), "of another level"),
        (gate(CODE0, 0x9000, 12, 3) & !(0x80 << 40), Exception::np(GATE), "absent"),
        (gate(DATA0, 0x9000, 12, 3), Exception::gp_sel(DATA0), "to data"),
        (gate(ABSENT, 0x9000, 12, 3), Exception::gp_sel(ABSENT), "to absent data"),
        (gate(0, 0x9000, 12, 3), Exception::GP0, "to nothing"),
        (gate(CODE0, 0x9000, 14, 3), Exception::gp_sel(GATE), "an interrupt gate"),
        (gate(0x200, 0x9000, 12, 3), Exception::gp_sel(0x200), "beyond the table"),
    ];
    for (descriptor, exception, what) in cases {
        h.put(GDT + u64::from(GATE), 8, descriptor);
        assert_eq!(far::call(&mut h, GATE, 0, 4, 0x1007), Err(exception), "{what}");
        assert_eq!((h.ip, h.st.cpl, h.gpr[RSP], h.st.seg[CS].selector), before, "{what}");
    }
    // A jump does not change the level; a call through a 16-bit gate pushes words.
    h.put(GDT + u64::from(GATE), 8, gate(CODE0, 0x9000, 12, 3));
    assert_eq!(far::jump(&mut h, GATE, 0, 4, 0), Err(Exception::gp_sel(CODE0)));
    h.put(GDT + u64::from(GATE), 8, gate(CODE0, 0x1_9000, 4, 3) | 1 << 32);
    h.put(h.gpr[RSP], 4, 0x4444_3333);
    far::call(&mut h, GATE, 0, 4, 0x1007).unwrap();
    let words: Vec<u64> = (0..5).map(|i| h.get(0x7000 - 10 + 2 * i, 2)).collect();
    assert_eq!((h.ip, words), (0x9000, vec![0x1007, CODE3.into(), 0x3333, before.2, DATA3.into()]));
}

/// In long mode gates have 16 bytes, lead to 64-bit code only, and take the stack from the TSS (section 6.8.3.1).
#[test]
fn call_gates_in_long_mode() {
    let mut h = long();
    let at = GDT + u64::from(GATE);
    h.put(at, 8, gate(LONG0, 0x9000, 12, 3));
    h.put(at + 8, 8, 0xffff_8000);
    h.st.cpl = 3;
    h.st.seg[CS] = Segment::flat(LONG3, attr::CODE | attr::L | 3 << attr::DPL_SHIFT);
    h.st.seg[SS] = Segment::flat(DATA3, attr::DATA | attr::DB | 3 << attr::DPL_SHIFT);
    h.gpr[RSP] = 0x6000;
    far::call(&mut h, GATE, 0, 4, 0x1007).unwrap();
    assert_eq!((h.ip, h.st.cpl, h.gpr[RSP], h.st.seg[SS].selector), (0xffff_8000_0000_9000, 0, 0x7000 - 32, 0));
    let frame: Vec<u64> = (0..4).map(|i| h.get(0x7000 - 32 + 8 * i, 8)).collect();
    assert_eq!(frame, [0x1007, LONG3.into(), 0x6000, DATA3.into()]);
    far::ret(&mut h, 8, 0).unwrap();
    assert_eq!((h.ip, h.st.cpl, h.gpr[RSP]), (0x1007, 3, 0x6000));
    // To 32-bit code; an offset that is no address; something in the upper half's type.
    for (low, high, exception) in [
        (gate(CODE0, 0x9000, 12, 3), 0, Exception::gp_sel(CODE0)),
        (gate(LONG0, 0x9000, 12, 3), 0x8000, Exception::GP0),
        (gate(LONG0, 0x9000, 12, 3), 0x0c00 << 32, Exception::gp_sel(GATE)),
        (gate(LONG0, 0x9000, 5, 3), 0, Exception::gp_sel(GATE)),
    ] {
        h.put(at, 8, low);
        h.put(at + 8, 8, high);
        assert_eq!(far::call(&mut h, GATE, 0, 4, 0x1007), Err(exception));
        assert_eq!((h.ip, h.st.cpl, h.gpr[RSP]), (0x1007, 3, 0x6000));
    }
}

#[test]
fn sysret_and_sysexit_to_no_address() {
    let mut h = long();
    h.st.features.amd = false;
    h.st.msrs.star = 0x30 << 48;
    h.st.msrs.sysenter_cs = 8;
    let before = (h.ip, h.st.cpl, h.gpr[RSP], h.st.seg[CS].selector, h.rflags());
    h.gpr[R11] = 0x3_7fd7;
    for address in [1u64 << 47, 1 << 63, 0xffff_7fff_ffff_ffff] {
        h.gpr[RCX] = address;
        assert_eq!(syscall::sysret(&mut h, true), Err(Exception::GP0), "{address:#x}");
        (h.gpr[RDX], h.gpr[RCX]) = (address, 0);
        assert_eq!(syscall::sysexit(&mut h, true), Err(Exception::GP0), "{address:#x}");
        (h.gpr[RDX], h.gpr[RCX]) = (0, address);
        assert_eq!(syscall::sysexit(&mut h, true), Err(Exception::GP0), "{address:#x}");
        assert_eq!((h.ip, h.st.cpl, h.gpr[RSP], h.st.seg[CS].selector, h.rflags()), before, "at level 0, as it was");
    }
    // 32-bit code: the upper half of RCX does not count. RF and VM are not loaded, reserved bits neither.
    h.gpr[RCX] = 1 << 63 | 0x1234;
    h.gpr[R11] = !0;
    syscall::sysret(&mut h, false).unwrap();
    assert_eq!((h.ip, h.st.cpl, h.st.code_bits()), (0x1234, 3, 32));
    assert_eq!(h.rflags() & (RFLAGS_RF | RFLAGS_VM | 1 << 15 | 1 << 3 | !0x3f_ffff), 0);
}

/// Only level 0 goes to virtual-8086 mode by IRET; elsewhere VM is no flag that is loaded.
#[test]
fn iret_to_virtual_8086_mode_is_for_level_0() {
    let mut h = protected();
    to_user(&mut h);
    h.gpr[RSP] = 0x5f00;
    for (i, v) in [0x100, CODE3.into(), RFLAGS_VM | 0x202].into_iter().enumerate() {
        h.put(0x5f00 + 4 * i as u64, 4, v);
    }
    far::iret(&mut h, 4, 0).unwrap();
    assert_eq!((h.st.mode(), h.ip, h.gpr[RSP], h.st.flags & RFLAGS_VM), (Mode::Protected, 0x100, 0x5f0c, 0));
    // In long mode it is none either (volume 2, IRET: IA-32e mode).
    let mut h = long();
    h.gpr[RSP] = 0x5f00;
    for (i, v) in [0x100, LONG0.into(), RFLAGS_VM | 2, 0x6000, 0].into_iter().enumerate() {
        h.put(0x5f00 + 8 * i as u64, 8, v);
    }
    far::iret(&mut h, 8, 0).unwrap();
    assert_eq!((h.st.mode(), h.ip, h.st.flags & RFLAGS_VM), (Mode::Long, 0x100, 0));
}

/// Past the commit point, the exception has the new task's address: of what is wrong with its segments, of T, and of an error
/// code that its stack does not take.
#[test]
fn exceptions_of_a_new_task_have_its_address() {
    // The exception's handler is reached through an interrupt gate, in the new task.
    let frame = |h: &mut TestHost, at: u64| (h.ip, h.st.tr.selector, h.get(at, 4));
    for (at, value, handler) in [(0x48, u64::from(ABSENT), 11), (0x64, 1, 1)] {
        let mut h = tasked();
        h.put(OTHER_AT + at, 2, value);
        let e = switch(&mut h, OTHER, Switch::Jump, 0x1111).unwrap_err();
        interrupt::raise(&mut h, e, 0x1111);
        let code = if handler == 11 { 4 } else { 0 };
        let at = h.gpr[RSP] + code;
        assert_eq!(frame(&mut h, at), (0x8000 + 16 * handler, OTHER, 0xaaaa));
        // What comes later has its own.
        interrupt::raise(&mut h, Exception::UD, 0x2222);
        let at = h.gpr[RSP];
        assert_eq!(frame(&mut h, at), (0x8060, OTHER, 0x2222));
    }
    // An interrupt through a task gate to a task with T.
    let mut h = tasked();
    h.put(OTHER_AT + 0x64, 2, 1);
    h.put(IDT + 8 * 0x30, 8, gate(OTHER, 0, 5, 0));
    interrupt::hardware(&mut h, 0x30, 0x1111);
    let at = h.gpr[RSP];
    assert_eq!(frame(&mut h, at), (0x8010, OTHER, 0xaaaa));
    assert_eq!(h.get(TSS + 0x20, 4), 0x1111, "the old task goes on where it was");
    // No room for the error code: #SS(0) in the new task, whose handler is a task of its own.
    let mut h = tasked();
    h.put(OTHER_AT + 0x38, 4, 1);
    h.put(GDT + u64::from(ABSENT), 8, 0x0040_9300_0000_0fff);
    h.put(OTHER_AT + 0x50, 4, ABSENT.into());
    h.put(IDT + 8 * 13, 8, gate(OTHER, 0, 5, 0));
    h.put(IDT + 8 * 8, 8, gate(SMALL, 0, 5, 0));
    interrupt::raise(&mut h, Exception::GP0, 0x1111);
    assert_eq!((h.st.tr.selector, h.get(OTHER_AT + 0x20, 4)), (SMALL, 0xaaaa), "a double fault of the new task");
}

/// A fault's task gate saves RF with the old task's flags (section 18.3.1.1), an interrupt's does not.
#[test]
fn the_resume_flag_of_an_interrupted_task() {
    for fault in [false, true] {
        let mut h = tasked();
        h.put(IDT + 8 * 6, 8, gate(OTHER, 0, 5, 0));
        if fault {
            interrupt::raise(&mut h, Exception::UD, 0x1111);
        } else {
            interrupt::hardware(&mut h, 6, 0x1111);
        }
        assert_eq!(h.get(TSS + 0x24, 4) & RFLAGS_RF != 0, fault);
        assert_eq!(h.st.flags & RFLAGS_RF, 0);
    }
}
