//! Loops that look for something, through the backend and the interpreter.

use super::harness::*;
use super::random::{ROUNDS, Rng, check_how, guest, run_loop};
use mimus_tcg_ir::backend::{Emitted, Optimise};
use mimus_tcg_ir::*;

/// Slots that no round changes, and those that rounds compute.
const STAYS: [u8; 5] = [8, 14, 15, 18, 0];
const COMPUTED: [u8; 5] = [10, 11, 12, 13, 16];
/// What goes through memory, and what is counted down beside it.
const POINTERS: [u8; 2] = [2, 20];
const LEFT: Slot = Slot(9);

struct Generator<'a> {
    rng: &'a mut Rng,
    ops: Vec<Op>,
    pc: i32,
    insns: u16,
}

impl Generator<'_> {
    fn insn(&mut self, op: Op) {
        self.ops.extend([Op::Insn { pc: PagePc(self.pc), len: 2 }, op]);
        self.pc += 2;
        self.insns += 1;
    }

    fn computed(&mut self) -> Slot {
        Slot(self.rng.one(&COMPUTED))
    }

    fn value(&mut self) -> Val {
        match self.rng.below(8) {
            0 => Val::Imm(self.rng.one(&[0, -1, 0x7f, 0x6161_6161_6161_6161])),
            1..4 => Slot(self.rng.one(&STAYS)).into(),
            _ => self.computed().into(),
        }
    }

    fn compute(&mut self) {
        use AluOp::{Add, And, Andn, Mul, Or, Orn, SetLtU, Shl, Shr, Sub, Xnor, Xor};
        let (d, a, b) = (self.computed(), self.value(), self.value());
        let op = self.rng.one(&[Add, Sub, And, Or, Xor, Andn, Orn, Xnor, Xor, And, Shl, Shr, Mul, SetLtU]);
        match op {
            Shl | Shr => {
                let b = Val::Imm(self.rng.one(&[0, 1, 8, 63]));
                self.insn(Op::Alu { op, ty: Ty::I64, d, a, b });
            }
            _ if self.rng.chance(10) => self.insn(Op::Un { op: UnOp::Mov, ty: Ty::I64, d, a }),
            _ => self.insn(Op::Alu { op, ty: Ty::I64, d, a, b }),
        }
    }
}

/// A loop that leaves for what it has loaded, or when [`ROUNDS`] is zero.
fn block(rng: &mut Rng) -> Block {
    let start = (rng.below(0x700) * 2) as u16;
    let (to, out) = (PagePc(i32::from(start)), PagePc(0xf02));
    let mut g = Generator { rng, ops: Vec::new(), pc: i32::from(start), insns: 0 };
    let size = g.rng.one(&[Size::B8, Size::B8, Size::B4, Size::B2, Size::B1]);
    let step = i64::from(size.bytes());
    let add = |d: Slot, by| Op::Alu { op: AluOp::Add, ty: Ty::I64, d, a: d.into(), b: Val::Imm(by) };
    let pointers = 1 + g.rng.below(2) as usize;
    let late = g.rng.chance(50);
    for pointer in POINTERS.into_iter().take(pointers).map(Slot) {
        let (d, ext) = (g.computed(), g.rng.one(&[Ext::Zero, Ext::Sign]));
        let off = g.rng.one(&[0, 0, 8, -8, 3]);
        g.insn(Op::Load { d, base: pointer.into(), off, size, ext });
        if !late {
            g.insn(add(pointer, step));
        }
    }
    let leaves = 1 + g.rng.below(2);
    for _ in 0..leaves {
        for _ in 0..g.rng.below(4) {
            g.compute();
        }
        let (a, b, cond) = (g.computed().into(), g.value(), g.rng.one(&[Cond::Eq, Cond::Ne]));
        g.insn(Op::Branch { cond, a, b, to: out });
        if g.rng.chance(30) {
            let by = g.rng.one(&[-1, -8, 1, 8]);
            g.insn(add(LEFT, by));
            let cond = g.rng.one(&[Cond::Eq, Cond::LtU, Cond::GeU, Cond::LtS, Cond::GeS]);
            let limit = Val::from(Slot(g.rng.one(&STAYS)));
            let (a, b) = if g.rng.chance(50) { (LEFT.into(), limit) } else { (limit, LEFT.into()) };
            g.insn(Op::Branch { cond, a, b, to: out });
        }
    }
    if late {
        for pointer in POINTERS.into_iter().take(pointers).map(Slot) {
            g.insn(add(pointer, step));
        }
    }
    g.insn(add(ROUNDS, -1));
    let (a, b) = (ROUNDS.into(), Val::Imm(0));
    if g.rng.chance(70) {
        g.insn(Op::Branch { cond: Cond::Ne, a, b, to });
        g.ops.push(Op::Jump { to: out });
    } else {
        g.insn(Op::Branch { cond: Cond::Eq, a, b, to: out });
        g.ops.push(Op::Jump { to });
    }
    let (ops, pc, insns) = (g.ops, g.pc, g.insns);
    let mut block = Block::default();
    block.clear(start);
    (block.ops, block.len, block.insns) = (ops, (pc - i32::from(start)) as u16, insns);
    block
}

#[test]
fn loops_that_look_for_something() {
    for optimise in [Optimise::Forced, Optimise::Usual] {
        for variant in 0..4 {
            let m = Machine::optimising(pins(variant), 2, optimise);
            let mut scratch = (Vec::new(), Emitted::default());
            for n in 0..6000u64 {
                let mut rng = Rng((variant as u64 + 1) << 32 | (n + 1) << 8 | 0x5e);
                rng.next();
                let block = block(&mut rng);
                let mut start = guest(&mut rng);
                // Mostly the same, so that rounds go by.
                let usual = rng.one(&[0u8, 0x61, 0xff]);
                let seldom = rng.one(&[1u64, 40, 400]);
                for byte in &mut start.data {
                    *byte = if rng.below(8 * seldom) == 0 { rng.next() as u8 } else { usual };
                }
                for slot in STAYS {
                    let word = rng.one(&[0, !0, u64::from(usual) * 0x0101_0101_0101_0101, u64::from(usual)]);
                    let any = rng.number();
                    start.slots[usize::from(slot)] = rng.one(&[word, word, any]);
                }
                let near = start.slots[usize::from(rng.one(&STAYS))];
                let (above, below, any) = (8 * rng.below(300), rng.below(300), rng.number());
                let left = [near, near.wrapping_add(above), near.wrapping_sub(below), any];
                start.slots[usize::from(LEFT.0)] = rng.one(&left);
                let most = rng.one(&[40, 600]);
                let some = 1 + rng.below(most);
                start.slots[usize::from(ROUNDS.0)] = rng.one(&[some, some, 100_000]);
                if rng.chance(50) {
                    start.slots[2] = DATA + (rng.below(600) & !7);
                }
                let kicked = rng.chance(5);
                check_how(&m, &block, start, kicked, &mut rng, &mut scratch, |block, oracle| {
                    run_loop(block, oracle, kicked)
                });
            }
        }
    }
}

/// A loop that copies so many words a round, each of which it, or the round before, has loaded.
fn copying_block(rng: &mut Rng) -> Block {
    let start = (rng.below(0x700) * 2) as u16;
    let (to, out) = (PagePc(i32::from(start)), PagePc(0xf02));
    let mut g = Generator { rng, ops: Vec::new(), pc: i32::from(start), insns: 0 };
    let size = g.rng.one(&[Size::B8, Size::B8, Size::B8, Size::B4, Size::B1]);
    let (words, bytes) = (1 + g.rng.below(8) as i32, size.bytes() as i32);
    let step = i64::from(words * bytes);
    let (from, to_slot) = (Slot(POINTERS[0]), Slot(POINTERS[1]));
    let add = |d: Slot, a: Slot, by| Op::Alu { op: AluOp::Add, ty: Ty::I64, d, a: a.into(), b: Val::Imm(by) };
    let kind = g.rng.below(4);
    let late = kind == 1 && size == Size::B8;
    let slots: Vec<Slot> = COMPUTED.iter().map(|n| Slot(*n)).collect();
    let at = |n: i32| slots[n as usize % 2];
    let ext = g.rng.one(&[Ext::Zero, Ext::Sign]);
    let load = |d: Slot, off: i32| Op::Load { d, base: from.into(), off, size, ext };
    let store = |src: Slot, off: i32| Op::Store { src: src.into(), base: to_slot.into(), off, size };
    for n in 0..words {
        if late {
            // Stores what was loaded before, through a pointer of its own at times.
            let t = slots[2 + n as usize % 2];
            g.insn(load(at(n + 1), (n + 1) * bytes));
            if g.rng.chance(50) {
                g.insn(add(t, to_slot, i64::from(n * bytes)));
                g.insn(Op::Store { src: at(n).into(), base: t.into(), off: 0, size });
            } else {
                g.insn(store(at(n), n * bytes));
            }
        } else {
            g.insn(load(at(n), n * bytes));
            // Now and then something else.
            let n = if kind == 3 && g.rng.chance(10) { n + 1 } else { n };
            g.insn(store(at(n), n * bytes));
        }
    }
    if late && words % 2 == 1 {
        g.insn(Op::Un { op: UnOp::Mov, ty: Ty::I64, d: at(0), a: at(1).into() });
    }
    g.insn(add(from, from, step));
    g.insn(add(to_slot, to_slot, step));
    g.insn(add(ROUNDS, ROUNDS, -1));
    g.insn(Op::Branch { cond: Cond::Ne, a: ROUNDS.into(), b: Val::Imm(0), to });
    g.ops.push(Op::Jump { to: out });
    let (ops, pc, insns) = (g.ops, g.pc, g.insns);
    let mut block = Block::default();
    block.clear(start);
    (block.ops, block.len, block.insns) = (ops, (pc - i32::from(start)) as u16, insns);
    block
}

#[test]
fn loops_that_copy() {
    for optimise in [Optimise::Forced, Optimise::Usual] {
        for variant in 0..4 {
            let m = Machine::optimising(pins(variant), 2, optimise);
            let mut scratch = (Vec::new(), Emitted::default());
            for n in 0..3000u64 {
                let mut rng = Rng((variant as u64 + 1) << 32 | (n + 1) << 8 | 0xc0);
                rng.next();
                let block = copying_block(&mut rng);
                let mut start = guest(&mut rng);
                start.slots[2] = DATA + rng.below(5000);
                let near = rng.below(600);
                let at = start.slots[2];
                let other = DATA + rng.below(8000);
                start.slots[20] = rng.one(&[other, other, at + near, at.wrapping_sub(near)]);
                if rng.chance(80) {
                    start.slots[2] &= !7;
                    start.slots[20] &= !7;
                }
                // Now and then the same memory by another address.
                for pointer in POINTERS.into_iter().filter(|_| rng.chance(30)) {
                    let va = &mut start.slots[usize::from(pointer)];
                    *va = va.wrapping_sub(DATA).wrapping_add(ALIAS);
                }
                let some = 1 + rng.below(300);
                start.slots[usize::from(ROUNDS.0)] = rng.one(&[some, some, 100_000]);
                let kicked = rng.chance(5);
                check_how(&m, &block, start, kicked, &mut rng, &mut scratch, |block, oracle| {
                    run_loop(block, oracle, kicked)
                });
            }
        }
    }
}
