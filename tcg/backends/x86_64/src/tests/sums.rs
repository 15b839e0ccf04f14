//! Loops whose loads are at sums of registers, and that extend words again and again: through the backend and the interpreter.

use super::harness::*;
use super::random::{ROUNDS, Rng, check_how, guest, run_loop};
use mimus_tcg_ir::backend::{Emitted, Optimise};
use mimus_tcg_ir::*;

/// Slots that rounds compute, and those that point to memory.
const COMPUTED: [u8; 8] = [10, 11, 12, 13, 14, 16, 18, 20];
const POINTERS: [u8; 3] = [2, 8, 5];

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

    fn alu(&mut self, op: AluOp, ty: Ty, d: Slot, a: Slot, b: impl Into<Val>) {
        self.insn(Op::Alu { op, ty, d, a: a.into(), b: b.into() });
    }

    /// `d` = `a + b`, in either order.
    fn sum(&mut self, d: Slot, a: Slot, b: Slot) {
        let (a, b) = if self.rng.chance(50) { (a, b) } else { (b, a) };
        self.alu(AluOp::Add, Ty::I64, d, a, b);
    }

    /// An element of an array, to the register of its address mostly.
    fn element(&mut self) {
        let (d, t, y) = (self.computed(), self.computed(), Slot(self.rng.one(&POINTERS)));
        let x = if self.rng.chance(40) { d } else { self.computed() };
        if self.rng.chance(85) {
            let mask = self.rng.one(&[0x3f, 0xff, 0x3ff, 0xfff]);
            self.alu(AluOp::And, Ty::I64, x, x, Val::Imm(mask));
        }
        let (by, add) = (self.rng.one(&[0, 1, 2, 3, 4]), self.rng.one(&[1, 8, -8, 0x400, 0x1000]));
        match self.rng.below(7) {
            0 => self.sum(d, x, y),
            1 => {
                let op = self.rng.one(&[AluOp::Sh1Add, AluOp::Sh2Add, AluOp::Sh3Add]);
                self.alu(op, Ty::I64, d, x, y);
            }
            2 => {
                self.alu(AluOp::Shl, Ty::I64, d, x, Val::Imm(by));
                self.sum(d, d, y);
            }
            3 => {
                self.alu(AluOp::Shl, Ty::I64, d, x, Val::Imm(by));
                self.alu(AluOp::Add, Ty::I64, t, d, Val::Imm(add));
                self.sum(d, t, y);
            }
            4 => {
                self.alu(AluOp::Add, Ty::I64, d, y, Val::Imm(add));
                self.sum(d, d, x);
            }
            5 => {
                self.insn(Op::Un { op: UnOp::Mov, ty: Ty::I64, d, a: y.into() });
                self.sum(d, d, x);
            }
            _ => {
                self.alu(AluOp::Add, Ty::I64, x, x, Val::Imm(add));
                self.sum(d, x, y);
            }
        }
        let to = if self.rng.chance(80) { d } else { t };
        let size = self.rng.one(&[Size::B1, Size::B2, Size::B4, Size::B8]);
        let (off, ext) = (self.rng.one(&[0, 0, 8, -1, -0x400]), self.rng.one(&[Ext::Zero, Ext::Sign]));
        self.insn(Op::Load { d: to, base: d.into(), off, size, ext });
    }

    fn words(&mut self) {
        let (d, a, b) = (self.computed(), self.computed(), self.computed());
        match self.rng.below(8) {
            0..3 => self.insn(Op::Un { op: UnOp::SextW, ty: Ty::I64, d, a: a.into() }),
            3 => self.insn(Op::Un { op: UnOp::SextW, ty: Ty::I64, d, a: d.into() }),
            4 => self.insn(Op::Un { op: UnOp::Mov, ty: Ty::I64, d, a: a.into() }),
            5 => {
                let (op, ty) = (self.rng.one(&[AluOp::Add, AluOp::Xor, AluOp::Shl]), self.rng.one(&[Ty::I32, Ty::I64]));
                self.alu(op, ty, d, a, b);
            }
            6 => self.alu(AluOp::Shr, Ty::I64, d, a, Val::Imm(33)),
            _ => {
                let size = self.rng.one(&[Size::B4, Size::B8]);
                self.insn(Op::Store { src: a.into(), base: Slot(2).into(), off: 8, size });
            }
        }
    }
}

fn block(rng: &mut Rng) -> Block {
    let start = (rng.below(0x700) * 2) as u16;
    let to = PagePc(i32::from(start));
    let mut g = Generator { rng, ops: Vec::new(), pc: i32::from(start), insns: 0 };
    for _ in 0..1 + g.rng.below(5) {
        if g.rng.chance(55) {
            g.element();
        } else {
            g.words();
        }
    }
    g.alu(AluOp::Add, Ty::I64, ROUNDS, ROUNDS, Val::Imm(-1));
    g.insn(Op::Branch { cond: Cond::Ne, a: ROUNDS.into(), b: Val::Imm(0), to });
    g.ops.push(Op::Jump { to: PagePc(0xf02) });
    let (ops, pc, insns) = (g.ops, g.pc, g.insns);
    let mut block = Block::default();
    block.clear(start);
    (block.ops, block.len, block.insns) = (ops, (pc - i32::from(start)) as u16, insns);
    block
}

#[test]
fn loads_at_sums() {
    for optimise in [Optimise::Forced, Optimise::Usual] {
        for variant in 0..4 {
            let m = Machine::optimising(pins(variant), 2, optimise);
            let mut scratch = (Vec::new(), Emitted::default());
            for n in 0..8000u64 {
                let mut rng = Rng((variant as u64 + 1) << 32 | (n + 1) << 8 | 0x5a);
                rng.next();
                let block = block(&mut rng);
                let mut start = guest(&mut rng);
                for pointer in POINTERS {
                    let (inside, any) = (DATA + rng.below(0x3000), rng.number());
                    start.slots[usize::from(pointer)] = rng.one(&[inside, inside, inside, any]);
                }
                for slot in COMPUTED {
                    let small = rng.below(0x400);
                    if rng.chance(60) {
                        start.slots[usize::from(slot)] = small;
                    }
                }
                start.slots[usize::from(ROUNDS.0)] = 1 + rng.below(12);
                let kicked = rng.chance(10);
                check_how(&m, &block, start, kicked, &mut rng, &mut scratch, |block, oracle| {
                    run_loop(block, oracle, kicked)
                });
            }
        }
    }
}
