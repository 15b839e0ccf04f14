//! Programs of several blocks: links within the page and across pages, indirect jumps, the kick word.

use super::harness::*;
use mimus_tcg_ir::backend::{ContextLayout, Emitted, ExitCode, HostBackend, Optimise};
use mimus_tcg_ir::*;

const S1: Slot = Slot(11);
const S2: Slot = Slot(12);
const RA: Slot = Slot(1);
/// Not among the pinned ones.
const COUNT: Slot = Slot(25);

/// Where every program ends: a page without code.
const END: PagePc = PagePc(0x7_0000);

struct Program {
    m: Machine,
    env: Env,
    next: usize,
    /// Code is made for running often.
    hot: bool,
    /// Where indirect jumps lead to other pages, and where to many places.
    far: Vec<u16>,
    strays: Vec<u16>,
}

impl Program {
    fn new() -> Program {
        Program::of(Machine::new(pins(0)))
    }

    fn of(m: Machine) -> Program {
        let mut env = Guest::new().env();
        env.dispatch = m.stubs.dispatch;
        let next = m.blocks_at;
        let p = Program { m, env, next, hot: false, far: Vec::new(), strays: Vec::new() };
        p.map_code(0, true);
        p.map_code(1, true);
        p
    }

    fn table(&self, page: u64) -> u32 {
        self.m.tables as u32 + 8192 * page as u32
    }

    /// Puts page `page` (0 or 1) of the code into the context, or takes it out.
    fn map_code(&self, page: u64, present: bool) {
        let l = ContextLayout::STANDARD;
        let va = CODE + page * 4096;
        self.m.context_entry(l.exec_tag, va, if present { va } else { !0 });
        self.m.context_entry(l.exec_table, va, u64::from(self.table(page)));
        self.m.empty_jumps();
    }

    /// Translates a block of page `page` and enters it in the page's table; gives its host address.
    fn block(&mut self, page: u64, start: u16, insns: u16, ops: Vec<Op>, guard: Option<u32>) -> usize {
        let block = Block { ops, start, len: insns * 4, insns, narrow: false, granules: 0 };
        let (mut out, mut info) = (Vec::new(), Emitted::default());
        if self.hot {
            info.hints.hot = true;
            (info.hints.far, info.hints.strays) = (self.far.clone(), self.strays.clone());
            info.table = self.table(page);
        }
        let at = self.next;
        self.m.backend.emit(&block, at, guard, &mut out, &mut info);
        self.m.write_code(at, &out);
        self.next += out.len();
        self.env.blocks.push((at as u64, info));
        let entry = (self.table(page) as usize + 4 * (usize::from(start) / 2)) as *mut u32;
        self.m.write_word(entry, (at - self.m.code as usize) as u32);
        let table = if page == 0 { 0 } else { self.table(page) };
        self.env.targets.push((CODE + page * 4096 + u64::from(start), at, table));
        at
    }

    fn run(&mut self, code: usize) -> (ExitCode, u64) {
        self.m.run(&mut self.env, code)
    }
}

fn insn(pc: i32) -> Op {
    Op::Insn { pc: PagePc(pc), len: 4 }
}

fn add(d: Slot, a: Slot, b: impl Into<Val>) -> Op {
    Op::Alu { op: AluOp::Add, ty: Ty::I64, d, a: a.into(), b: b.into() }
}

fn va(pc: PagePc) -> u64 {
    CODE.wrapping_add(pc.0 as i64 as u64)
}

/// `s1 += s2; s2 -= 1; if s2 != 0 goto self; goto then`.
fn sum_loop(then: PagePc) -> Vec<Op> {
    vec![
        insn(0x100),
        add(S1, S1, S2),
        insn(0x104),
        add(S2, S2, -1),
        insn(0x108),
        Op::Branch { cond: Cond::Ne, a: S2.into(), b: Val::Imm(0), to: PagePc(0x100) },
        insn(0x10c),
        Op::Jump { to: then },
    ]
}

#[test]
fn a_loop_runs_by_itself_and_notices_the_kick_word() {
    let mut p = Program::new();
    let at = p.block(0, 0x100, 4, sum_loop(END), None);
    p.env.guest.slots[12] = 1000;
    assert_eq!(p.run(at), (ExitCode::Lookup, va(END)));
    assert_eq!(p.env.guest.slots[11], 500_500);
    assert_eq!(p.env.links, 1, "the way out asked for its target");

    p.env.set_kick(1);
    p.env.guest.slots[12] = 7;
    assert_eq!(p.run(at), (ExitCode::Kicked, va(PagePc(0x100))));
    assert_eq!(p.env.guest.slots[12], 6, "one round");
}

#[test]
fn links_within_and_across_pages() {
    let mut p = Program::new();
    // 0x100: the sum, then on in the next page; there count and come back through the same page's 0x200.
    let a = p.block(0, 0x100, 4, sum_loop(PagePc(0x1000)), None);
    p.block(
        1,
        0,
        2,
        vec![
            insn(0),
            add(COUNT, COUNT, 1),
            insn(4),
            Op::Branch { cond: Cond::Ne, a: COUNT.into(), b: Val::Imm(50), to: PagePc(0x200 - 4096) },
            Op::Jump { to: PagePc(END.0 - 4096) },
        ],
        None,
    );
    p.block(0, 0x200, 2, vec![insn(0x200), add(S2, S2, 3), insn(0x204), Op::Jump { to: PagePc(0x100) }], None);
    // Page 0 is another page for the block of page 1.
    let table0 = p.table(0);
    for t in &mut p.env.targets {
        if t.0 == CODE + 0x200 {
            t.2 = table0;
        }
    }
    p.env.guest.slots[12] = 3;
    assert_eq!(p.run(a), (ExitCode::Lookup, va(END)));
    assert_eq!(p.env.guest.slots[11], 6 * 50);
    assert_eq!(p.env.guest.slots[25], 50);
    // Four sites linked once each, but for the way out.
    assert_eq!(p.env.links, 4);

    // With its page gone from the context the link is not followed.
    p.map_code(1, false);
    p.env.targets.clear();
    (p.env.guest.slots[12], p.env.guest.slots[25]) = (3, 0);
    assert_eq!(p.run(a), (ExitCode::Lookup, CODE + 0x1000));
    assert_eq!((p.env.links, p.env.guest.slots[25]), (5, 0));
    p.map_code(1, true);

    // A kick is noticed on the way to the other page.
    p.env.set_kick(1);
    p.env.guest.slots[12] = 1;
    assert_eq!(p.run(a), (ExitCode::Kicked, CODE + 0x1000));
}

#[test]
fn indirect_jumps_go_through_the_context() {
    let mut p = Program::new();
    let link = Some((RA, PagePc(0x304)));
    let call =
        p.block(0, 0x300, 1, vec![insn(0x300), Op::JumpReg { base: S1, off: 3, link, hint: JumpHint::Call }], None);
    p.block(
        1,
        0x10,
        2,
        vec![
            insn(0x10),
            add(COUNT, COUNT, 1),
            insn(0x14),
            Op::JumpReg { base: RA, off: 0, link: None, hint: JumpHint::Return },
        ],
        None,
    );
    p.block(0, 0x304, 1, vec![insn(0x304), Op::Jump { to: END }], None);
    p.env.guest.slots[11] = CODE + 0x1010 - 2;
    assert_eq!(p.run(call), (ExitCode::Lookup, va(END)));
    assert_eq!(p.env.guest.slots[25], 1);
    assert_eq!(p.env.guest.slots[1], CODE + 0x304);
    assert_eq!(p.env.page_base, CODE);

    // No block there: the table's zero leads to the miss stub.
    p.env.guest.slots[11] = CODE + 0x1020 - 3;
    assert_eq!(p.run(call), (ExitCode::Lookup, CODE + 0x1020));
    assert_eq!(p.env.page_base, CODE + 0x1000);
    // No such page, and bit 0 set.
    p.env.guest.slots[11] = 0x1235 - 3;
    assert_eq!(p.run(call), (ExitCode::Lookup, 0x1234));
    // The link is written before the kick is noticed.
    (p.env.kick, p.env.guest.slots[1]) = (1, 0);
    p.env.guest.slots[11] = CODE + 0x1010 - 2;
    assert_eq!(p.run(call), (ExitCode::Kicked, CODE + 0x1010));
    assert_eq!(p.env.guest.slots[1], CODE + 0x304);
}

#[test]
fn indirect_jumps_of_hot_code_go_through_the_pages_own_table() {
    let mut p = Program::new();
    p.hot = true;
    let jump = |at: i32| vec![insn(at), Op::JumpReg { base: S1, off: 0, link: None, hint: JumpHint::None }];
    let start = p.block(0, 0x300, 1, jump(0x300), None);
    p.block(0, 0x340, 1, vec![insn(0x340), add(COUNT, COUNT, 1), Op::Jump { to: END }], None);
    p.block(1, 0x10, 1, vec![insn(0x10), add(COUNT, COUNT, 2), Op::Jump { to: END }], None);
    // The context is not asked about the page that the block is in.
    p.map_code(0, false);
    p.env.guest.slots[11] = CODE + 0x341;
    assert_eq!(p.run(start), (ExitCode::Lookup, va(END)));
    assert_eq!((p.env.guest.slots[25], p.env.page_base), (1, CODE));
    // No block there.
    p.env.guest.slots[11] = CODE + 0x380;
    assert_eq!(p.run(start), (ExitCode::Lookup, CODE + 0x380));
    // Another page's, before and behind; and none.
    p.env.guest.slots[11] = CODE + 0x1010;
    assert_eq!(p.run(start), (ExitCode::Lookup, CODE + 0x1000 + END.0 as u64));
    assert_eq!((p.env.guest.slots[25], p.env.page_base), (3, CODE + 0x1000));
    p.env.page_base = CODE;
    p.env.guest.slots[11] = CODE - 2;
    assert_eq!(p.run(start), (ExitCode::Lookup, CODE - 2));
    p.env.set_kick(1);
    p.env.guest.slots[11] = CODE + 0x340;
    assert_eq!(p.run(start), (ExitCode::Kicked, CODE + 0x340));
}

#[test]
fn indirect_jumps_that_lead_to_another_page_go_by_their_entry() {
    for align in [1, 2] {
        let mut p = Program::of(Machine::optimising(pins(0), align, Optimise::Usual));
        (p.hot, p.far) = (true, vec![0x300]);
        let ops = vec![
            insn(0x300),
            Op::GuardFits { a: Val::Slot(S1), bits: 48 },
            add(S2, S2, 16),
            Op::JumpReg { base: S1, off: 0, link: None, hint: JumpHint::Return },
        ];
        let start = p.block(0, 0x300, 1, ops, None);
        // One block at the beginning of each page, where tables for both alignments agree.
        for page in [0, 1] {
            let add = add(COUNT, COUNT, 1 + page as i64 * 9);
            p.block(page, 0, 1, vec![insn(0), add, Op::Jump { to: PagePc(0x7_0000 - 4096 * page as i32) }], None);
        }
        let noted = JUMPS_NOTED.get();
        let run = |p: &mut Program, to: u64| {
            p.env.guest.slots[11] = to;
            (p.env.guest.slots[12], p.env.guest.slots[25]) = (0, 0);
            let (exit, pc) = p.run(start);
            (exit, pc, p.env.guest.slots[25], p.env.guest.slots[12], p.env.page_base)
        };
        for page in [1, 1, 0, 0, 1] {
            let base = CODE + 4096 * page;
            let there = (ExitCode::Lookup, va(END), 1 + page * 9, 16, base);
            assert_eq!(run(&mut p, base), there);
        }
        assert_eq!(JUMPS_NOTED.get() - noted, 2, "of three misses the first and the third");
        // A kick is noticed also where the entry says where to go; what is no address is still none.
        p.env.set_kick(1);
        for page in [1, 0] {
            assert_eq!(run(&mut p, CODE + 4096 * page).0, ExitCode::Kicked);
        }
        assert_eq!(run(&mut p, 1 << 47), (ExitCode::Careful, CODE + 0x300, 0, 0, CODE));
        p.env.set_kick(0);
        assert_eq!(run(&mut p, 1 << 47), (ExitCode::Careful, CODE + 0x300, 0, 0, CODE));
        // The entry says what the page's table says, also when that has changed.
        assert_eq!(run(&mut p, CODE + 4096).2, 10);
        let word = p.table(1) as usize as *mut u32;
        p.m.write_word(word, 0);
        assert_eq!(run(&mut p, CODE + 4096), (ExitCode::Lookup, CODE + 4096, 0, 16, CODE + 4096));
        // Nothing else has been filled in, so that the context is not asked ...
        let l = ContextLayout::STANDARD;
        p.m.context_entry(l.exec_tag, CODE + 4096, !0);
        assert_eq!(run(&mut p, CODE + 4096), (ExitCode::Lookup, CODE + 4096, 0, 16, CODE + 4096));
        // ... until it is emptied.
        p.map_code(1, false);
        assert_eq!(run(&mut p, CODE + 4096), (ExitCode::Lookup, CODE + 4096, 0, 16, CODE));
        assert_eq!(run(&mut p, CODE).2, 1);
        // What an empty entry is for.
        p.m.empty_jumps();
        assert_eq!(run(&mut p, ContextLayout::NO_JUMP), (ExitCode::Lookup, !1, 0, 16, !0xfff));
        assert_eq!(run(&mut p, !0xfff), (ExitCode::Lookup, !0xfff, 0, 16, CODE));
    }
}

#[test]
fn indirect_jumps_to_many_places_go_through_the_context() {
    let mut p = Program::of(Machine::optimising(pins(0), 2, Optimise::Usual));
    (p.hot, p.far, p.strays) = (true, vec![0x300], vec![0x300]);
    let jump = vec![insn(0x300), Op::JumpReg { base: S1, off: 0, link: None, hint: JumpHint::Call }];
    let start = p.block(0, 0x300, 1, jump, None);
    p.block(1, 0x10, 1, vec![insn(0x10), add(COUNT, COUNT, 1), Op::Jump { to: END }], None);
    let noted = JUMPS_NOTED.get();
    for n in 1..5 {
        p.env.guest.slots[11] = CODE + 0x1010;
        assert_eq!(p.run(start).0, ExitCode::Lookup);
        assert_eq!((p.env.guest.slots[25], p.env.page_base), (n, CODE + 0x1000));
    }
    assert_eq!(JUMPS_NOTED.get(), noted);
    p.env.set_kick(1);
    assert_eq!(p.run(start), (ExitCode::Kicked, CODE + 0x1010));
}

#[test]
fn a_targets_check_is_put_off_until_no_code_is_found() {
    for hot in [false, true] {
        let mut p = Program::new();
        p.hot = hot;
        // A return: the stack pointer has moved when the check is made.
        let ops = vec![
            insn(0x300),
            Op::GuardFits { a: Val::Slot(S1), bits: 48 },
            add(S2, S2, 16),
            Op::JumpReg { base: S1, off: 0, link: None, hint: JumpHint::Return },
        ];
        let start = p.block(0, 0x300, 1, ops, None);
        p.block(0, 0x340, 1, vec![insn(0x340), Op::Jump { to: END }], None);
        p.env.guest.slots[12] = 100;
        p.env.guest.slots[11] = CODE + 0x340;
        assert_eq!(p.run(start), (ExitCode::Lookup, va(END)));
        assert_eq!(p.env.guest.slots[12], 116);
        for kick in [0, 1] {
            p.env.set_kick(kick);
            p.env.page_base = CODE;
            for wrong in [1 << 47, 0x1234_5678_0000_0000, !0 << 48, i64::MAX as u64 & !1] {
                p.env.guest.slots[11] = wrong;
                assert_eq!(p.run(start), (ExitCode::Careful, CODE + 0x300), "{wrong:#x}");
                assert_eq!(p.env.guest.slots[12], 116, "as before the instruction");
            }
            p.env.guest.slots[11] = !0 << 47;
            let exit = if kick == 0 { ExitCode::Lookup } else { ExitCode::Kicked };
            assert_eq!(p.run(start), (exit, !0 << 47));
            assert_eq!(p.env.guest.slots[12], 132);
            p.env.guest.slots[12] = 116;
        }
    }
}

#[test]
fn an_entry_guard_wants_the_next_page() {
    let mut p = Program::new();
    let ops = || vec![insn(0xffe), add(S1, S1, 1), Op::Jump { to: END }];
    let guard = p.table(1);
    let good = p.block(0, 0xffe, 1, ops(), Some(guard));
    let bad = p.block(0, 0xffe, 1, ops(), Some(guard + 8));
    assert_eq!(p.run(good), (ExitCode::Lookup, va(END)));
    assert_eq!(p.run(bad), (ExitCode::Careful, CODE + 0xffe));
    p.map_code(1, false);
    assert_eq!(p.run(good), (ExitCode::Careful, CODE + 0xffe));
    assert_eq!(p.env.guest.slots[11], 1);
}

#[test]
fn dispatch_continues_at_pc() {
    let mut p = Program::new();
    let at = p.block(0, 0x40, 1, vec![insn(0x40), Op::Dispatch], None);
    p.block(1, 0x80, 1, vec![insn(0x80), add(S1, S1, 9), Op::Jump { to: END }], None);
    p.env.pc = CODE + 0x1080;
    p.env.exit_request = 1;
    let (code, _) = p.run(at);
    assert_eq!((code, p.env.guest.slots[11], p.env.exit_request), (ExitCode::Lookup, 9, 0));
}
