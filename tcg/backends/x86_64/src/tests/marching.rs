//! Loops of guests with flags that go through memory by constant steps, through the backend and the interpreter.

use super::flagged::pin_variants;
use super::harness::*;
use super::random::{ROUNDS, Rng, check_how, guest, run_loop};
use mimus_tcg_ir::backend::{Emitted, ExitCode, HostBackend, Optimise};
use mimus_tcg_ir::flags::{FLAGS, Flags};
use mimus_tcg_ir::*;

struct Generator<'a> {
    rng: &'a mut Rng,
    ops: Vec<Op>,
}

const SIZES: [Size; 4] = [Size::B1, Size::B2, Size::B4, Size::B8];
const POINTERS: [u8; 6] = [2, 5, 20, 21, 6, 7];

impl Generator<'_> {
    fn push(&mut self, op: Op) {
        self.ops.push(op);
    }

    fn data(&mut self) -> Slot {
        Slot(self.rng.one(&[0, 1, 3, 8, 10, 11, 12, 14]))
    }

    /// An operation that defines all flags.
    fn alu(&mut self, size: Size, d: Option<Slot>, a: Val, b: Val) {
        let op = self.rng.one(&[FlagOp::Add, FlagOp::Sub, FlagOp::Xor, FlagOp::And, FlagOp::Or]);
        self.push(Op::AluF { op, size, d, a, b });
        // What logical operations leave open is not looked at.
        let cond = self.rng.one(&[CondF::E, CondF::Ne, CondF::S, CondF::L, CondF::B, CondF::A]);
        match self.rng.below(6) {
            0 => {
                let (d, a) = (self.data(), self.data().into());
                self.push(Op::CMovF { cond, size: Size::B8, d, a });
            }
            1 => {
                let d = self.data();
                self.push(Op::SetCondF { cond, d });
            }
            2 => self.push(Op::BranchF { cond, to: PagePc(0x1008), dead: Flags::ALL }),
            _ => {}
        }
    }

    fn insn(&mut self) {
        let pointer = Slot(self.rng.one(&POINTERS));
        let other = Slot(self.rng.one(&POINTERS));
        let index = Slot(self.rng.one(&[19, 9]));
        let off = self.rng.one(&[0, 0, 8, -8, 16, 3, 520, -0x400]);
        let step = self.rng.one(&[1i64, 2, 4, 8, 8, 8, 16, -8, -1, 64, 520]);
        let (size, data, t) = (self.rng.one(&SIZES), self.data(), Slot::temp(0));
        match self.rng.below(16) {
            0..3 => {
                let ext = self.rng.one(&[Ext::Zero, Ext::Sign]);
                self.push(Op::Load { d: data, base: pointer.into(), off, size, ext });
            }
            3..6 => self.push(Op::Store { src: data.into(), base: pointer.into(), off, size }),
            6 => {
                self.push(Op::Load { d: t, base: pointer.into(), off, size, ext: Ext::Zero });
                self.alu(size, Some(data), data.into(), t.into());
            }
            7..10 => {
                let op = self.rng.one(&[FlagOp::Add, FlagOp::Sub]);
                let (d, a) = (Some(pointer), pointer.into());
                self.push(Op::AluF { op, size: Size::B8, d, a, b: Val::Imm(step) });
            }
            10 => {
                let op = self.rng.one(&[FlagOp::Inc, FlagOp::Dec]);
                self.push(Op::AluF { op, size: Size::B8, d: Some(index), a: index.into(), b: Val::Imm(0) });
            }
            11 | 12 => {
                let shift = self.rng.below(4) as u8;
                let (base, index) = (pointer.into(), index.into());
                self.push(Op::Lea { d: t, base, index, shift, disp: off, size: Size::B8 });
                if self.rng.chance(50) {
                    self.push(Op::Load { d: data, base: t.into(), off: 0, size, ext: Ext::Zero });
                } else {
                    self.push(Op::Store { src: data.into(), base: t.into(), off: 0, size });
                }
            }
            13 => {
                let index = Val::Imm(0);
                self.push(Op::Lea { d: other, base: pointer.into(), index, shift: 0, disp: off, size: Size::B8 });
            }
            14 if self.rng.chance(30) => {
                let (off, mask) = (self.rng.below(16) as i32, 1 << self.rng.below(8));
                self.push(Op::GuardEnv { off, mask });
            }
            _ => {
                let b = if self.rng.chance(40) { Val::Imm(7) } else { self.data().into() };
                let size = self.rng.one(&[Size::B4, Size::B8]);
                self.alu(size, Some(data), data.into(), b);
            }
        }
    }
}

/// A loop that ends when [`ROUNDS`] is zero.
fn block(rng: &mut Rng) -> Block {
    let start = rng.below(0xe00) as u16;
    let mut block = Block::default();
    block.clear(start);
    let (mut pc, to) = (i32::from(start), PagePc(i32::from(start)));
    let mut g = Generator { rng, ops: Vec::new() };
    for _ in 0..2 + g.rng.below(10) {
        g.push(Op::Insn { pc: PagePc(pc), len: 3 });
        g.push(Op::Un { op: UnOp::Mov, ty: Ty::I64, d: Slot::temp(0), a: Val::Imm(0) });
        g.insn();
        pc += 3;
        block.insns += 1;
    }
    g.push(Op::Insn { pc: PagePc(pc), len: 3 });
    let dead = if g.rng.chance(50) { Flags::ALL } else { Flags::NONE };
    if g.rng.chance(70) {
        let (d, a) = (Some(ROUNDS), ROUNDS.into());
        g.push(Op::AluF { op: FlagOp::Sub, size: Size::B8, d, a, b: Val::Imm(1) });
    } else {
        let (d, a) = (ROUNDS, ROUNDS.into());
        g.push(Op::Alu { op: AluOp::Sub, ty: Ty::I64, d, a, b: Val::Imm(1) });
        g.push(Op::AluF { op: FlagOp::Sub, size: Size::B8, d: None, a, b: Val::Imm(0) });
    }
    g.push(Op::BranchF { cond: CondF::Ne, to, dead });
    g.push(Op::Jump { to: PagePc(0x1004) });
    block.ops = g.ops;
    block.len = (pc + 3 - i32::from(start)) as u16;
    block
}

#[test]
fn loops_with_flags_that_go_through_memory() {
    for optimise in [Optimise::Forced, Optimise::Usual] {
        for (variant, pins) in pin_variants().into_iter().enumerate() {
            let m = Machine::optimising(pins, 1, optimise);
            let mut scratch = (Vec::new(), Emitted::default());
            for n in 0..4000u64 {
                let mut rng = Rng((variant as u64 + 1) << 32 | (n + 1) << 8 | 0x9b);
                rng.next();
                let block = block(&mut rng);
                let mut start = guest(&mut rng);
                start.slots[usize::from(ROUNDS.0)] = 1 + rng.below(80);
                start.slots[19] = rng.below(64);
                start.slots[9] = rng.below(300);
                for pointer in [6, 7] {
                    start.slots[pointer] = start.slots[2].wrapping_add(8 * rng.below(200));
                }
                start.slots[usize::from(FLAGS.0)] = Flags(rng.next() as u16 & Flags::ALL.0).pack();
                let kicked = rng.chance(10);
                check_how(&m, &block, start, kicked, &mut rng, &mut scratch, |block, oracle| {
                    run_loop(block, oracle, kicked)
                });
            }
        }
    }
}

/// A copy in 32-bit code across the end of a page, its addresses made in several ways. Neighbouring pages of the guest are
/// none of the host's.
#[test]
fn narrow_loops_notice_the_ends_of_pages() {
    const BASE: u64 = 0x0123_4000;
    let l = mimus_tcg_ir::backend::ContextLayout::STANDARD;
    for (variant, pins) in pin_variants().into_iter().enumerate() {
        for (optimise, how) in [Optimise::Usual, Optimise::Forced].into_iter().flat_map(|o| (0..4).map(move |h| (o, h)))
        {
            let m = Machine::optimising(pins.clone(), 1, optimise);
            let addend = m.data_addend().wrapping_add(DATA).wrapping_sub(BASE);
            for (page, host) in [(0, 0), (1, 3)] {
                let va = BASE + page * 4096;
                m.context_entry(l.read_tag, va, va);
                m.context_entry(l.write_tag, va, va);
                m.context_entry(l.addend, va, addend.wrapping_add((host - page) * 4096));
            }
            let mut block = Block::default();
            block.clear(0x200);
            block.narrow = true;
            let (from, index, t) = (Slot(6), Slot(9), Slot::temp(0));
            let (base, off, rounds, end) = match how {
                // Off a register that is negative, or past the end, before the offset is added.
                0 => (Val::Slot(from), 0, 200u64, 0u64),
                1 => (from.into(), -0x4000, 200, 0x4000),
                // With an index that counts up to zero, or one that is added to something past the end.
                _ => (t.into(), 0, 200, if how == 2 { 0x1_0000_0000 - 8 * 200 } else { 0x2_0000_0000 - 0x800 }),
            };
            let insn = |n: i32| Op::Insn { pc: PagePc(0x200 + 2 * n), len: 2 };
            block.ops.push(insn(0));
            if how >= 2 {
                let (base, index) = (from.into(), index.into());
                block.ops.push(Op::Lea { d: t, base, index, shift: 0, disp: 0, size: Size::B4 });
            }
            let (d, ext) = (Slot(10), Ext::Zero);
            block.ops.push(Op::Load { d, base, off, size: Size::B4, ext });
            block.ops.push(insn(1));
            if how >= 2 {
                let (base, index) = (from.into(), index.into());
                block.ops.push(Op::Lea { d: t, base, index, shift: 0, disp: 0, size: Size::B4 });
            }
            block.ops.push(Op::Store { src: d.into(), base, off: off + 4, size: Size::B4 });
            block.ops.push(insn(2));
            let moves = if how >= 2 { index } else { from };
            let add =
                |d: Slot, b| Op::AluF { op: FlagOp::Add, size: Size::B4, d: Some(d), a: d.into(), b: Val::Imm(b) };
            block.ops.push(add(moves, 8));
            block.ops.push(insn(3));
            block.ops.push(add(ROUNDS, -1));
            block.ops.push(Op::BranchF { cond: CondF::Ne, to: PagePc(0x200), dead: Flags::ALL });
            block.ops.push(Op::Jump { to: PagePc(0x300) });
            (block.insns, block.len) = (4, 8);
            let mut rng = Rng(0x1234);
            let mut start = guest(&mut rng);
            start.hot = [0; 16];
            start.slots[usize::from(FLAGS.0)] = Flags::NONE.pack();
            start.slots[usize::from(ROUNDS.0)] = rounds;
            start.slots[9] = end as u32 as u64;
            start.slots[6] = match how {
                0 | 1 => BASE + 0xc00 + end,
                _ => u64::from((BASE + 0xc00).wrapping_sub(end) as u32),
            };
            let mut expected = start.data.clone();
            for n in 0..rounds as usize {
                let place = |at: usize| if at < 4096 { at } else { at + 2 * 4096 };
                let at = 0xc00 + 8 * n;
                let word: [u8; 4] = expected[place(at)..place(at) + 4].try_into().unwrap();
                expected[place(at + 4)..place(at + 4) + 4].copy_from_slice(&word);
            }
            let mut info = Emitted::default();
            info.hints.hot = true;
            info.hints.scattered = (0x200..0x208).collect();
            let mut out = Vec::new();
            m.backend.emit(&block, m.blocks_at, None, &mut out, &mut info);
            m.write_code(m.blocks_at, &out);
            let mut env = start.env();
            env.dispatch = m.stubs.dispatch;
            env.blocks.push((m.blocks_at as u64, info));
            let (code, pc) = m.run(&mut env, m.blocks_at);
            let what = format!("variant {variant}, {optimise:?}, way {how}");
            assert_eq!((code, pc), (ExitCode::Lookup, CODE + 0x300), "{what}");
            assert_eq!(env.guest.slots[usize::from(ROUNDS.0)], 0, "{what}");
            assert!(env.guest.data == expected, "{what}: memory differs");
        }
    }
}
