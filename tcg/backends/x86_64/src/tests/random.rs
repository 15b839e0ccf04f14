//! Random blocks through the backend and the interpreter.

use super::harness::*;
use super::native::is_amd;
use mimus_tcg_ir::backend::{Emitted, ExitCode, HostBackend, Optimise};
use mimus_tcg_ir::flags::{FLAGS, Flags};
use mimus_tcg_ir::interp::{self, Outcome};
use mimus_tcg_ir::*;

pub const FP_OPS: [FpOp; 29] = {
    use FpOp::*;
    [
        Add, Sub, Mul, Div, Sqrt, MAdd, MSub, NMSub, NMAdd, Min, Max, Eq, Lt, Le, Class, Sgnj, Sgnjn, Sgnjx, ToI32,
        ToU32, ToI64, ToU64, FromI32, FromU32, FromI64, FromU64, CvtFmt, MvToInt, MvFromInt,
    ]
};

const ALU_OPS: [AluOp; 34] = {
    use AluOp::*;
    [
        Add, Sub, And, Or, Xor, Andn, Orn, Xnor, Shl, Shr, Sar, Rol, Ror, Mul, MulHiS, MulHiU, MulHiSU, DivS, DivU,
        RemS, RemU, MinS, MinU, MaxS, MaxU, SetLtS, SetLtU, Sh1Add, Sh2Add, Sh3Add, BSet, BClr, BInv, BExt,
    ]
};

const UN_OPS: [UnOp; 12] = {
    use UnOp::*;
    [Mov, SextB, SextH, SextW, ZextB, ZextH, ZextW, Clz, Ctz, Popcnt, Bswap, OrcB]
};

const AMO_OPS: [AmoOp; 9] = {
    use AmoOp::*;
    [Swap, Add, Xor, And, Or, MinS, MaxS, MinU, MaxU]
};

/// Slots that hold addresses in guest memory; a few operations overwrite them all the same.
pub const ADDRESS_SLOTS: [u8; 4] = [2, 5, 20, 21];

/// xorshift64*.
pub struct Rng(pub u64);

impl Rng {
    pub fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    pub fn below(&mut self, n: u64) -> u64 {
        (self.next() >> 32) % n
    }

    pub fn one<T: Copy>(&mut self, from: &[T]) -> T {
        from[self.below(from.len() as u64) as usize]
    }

    pub fn chance(&mut self, percent: u64) -> bool {
        self.below(100) < percent
    }

    /// A number of an interesting kind.
    pub fn number(&mut self) -> u64 {
        let r = self.next();
        match self.below(8) {
            0 => self.one(&[0, 1, u64::MAX, i64::MIN as u64, i64::MAX as u64, 0x7fff_ffff, 0x8000_0000]),
            1 => self.one(&[0xffff_ffff, 0x1_0000_0000, 0xffff_ffff_8000_0000, 63, 64, 0xff, 0x80]),
            2 => r & 0xff,
            3 => (r as i8) as u64,
            4 => (r as i32) as u64,
            5 => r & 0xffff_ffff,
            _ => r,
        }
    }

    /// A floating-point register.
    pub fn float(&mut self) -> u64 {
        const BOX: u64 = 0xffff_ffff_0000_0000;
        let r = self.next();
        match self.below(10) {
            0 => self.one(&[0, 1 << 63, 0x7ff0_0000_0000_0000, 0xfff0_0000_0000_0000, 0x7ff8_0000_0000_0001]),
            1 => self.one(&[
                0x7ff0_0000_0000_0001,
                1,
                0x3ff0_0000_0000_0000,
                0x41df_ffff_ffc0_0000,
                0xc1e0_0000_0000_0000,
            ]),
            2 => BOX | self.one(&[0u64, 0x8000_0000, 0x7f80_0000, 0xff80_0000, 0x7fc0_0000, 0x7f80_0001, 1]),
            3 => BOX | (r as u32) as u64,
            4..7 => BOX | u64::from(((r as i32 >> 12) as f32 / 64.0).to_bits()),
            7 | 8 => ((r as i64 >> 30) as f64 / 1024.0).to_bits(),
            _ => r,
        }
    }
}

struct Generator<'a> {
    rng: &'a mut Rng,
    block: Block,
    pc: i32,
    self_loops: bool,
    last_base: Slot,
}

impl Generator<'_> {
    /// An integer slot to read.
    fn slot(&mut self) -> Slot {
        if self.rng.chance(15) {
            return Slot::temp(self.rng.below(3) as u8);
        }
        Slot(self.rng.below(22) as u8)
    }

    fn val(&mut self) -> Val {
        if self.rng.chance(25) { Val::Imm(self.rng.number() as i64) } else { Val::Slot(self.slot()) }
    }

    /// A slot to write.
    fn dest(&mut self) -> Slot {
        loop {
            let d = self.slot();
            if !ADDRESS_SLOTS.contains(&d.0) || self.rng.chance(1) {
                return d;
            }
        }
    }

    fn fp_slot(&mut self) -> Slot {
        Slot(32 + self.rng.below(6) as u8)
    }

    fn base(&mut self) -> (Val, i32) {
        let off = self.rng.one(&[0, 0, 4, 8, -8, 16, 1, 0x7f8, -0x400]);
        if self.rng.chance(3) {
            return (Val::Imm((DATA + self.rng.below(DATA_LEN)) as i64), off);
        }
        // Often the same one again: such accesses are checked together.
        if self.rng.chance(40) {
            self.last_base = Slot(self.rng.one(&ADDRESS_SLOTS));
        }
        let s = self.last_base;
        if self.rng.chance(15) {
            // Through a temporary.
            let t = Slot::temp(0);
            self.push(Op::Alu { op: AluOp::Add, ty: Ty::I64, d: t, a: s.into(), b: Val::Imm(i64::from(off)) });
            return (t.into(), 0);
        }
        (s.into(), off)
    }

    fn push(&mut self, op: Op) {
        self.block.ops.push(op);
    }

    fn size(&mut self) -> Size {
        self.rng.one(&[Size::B1, Size::B2, Size::B4, Size::B8])
    }

    fn target(&mut self) -> PagePc {
        let to = self.rng.one(&[
            0x100,
            0xffe,
            0x1000,
            0x1234,
            -2,
            -0x2000,
            i32::from(self.block.start),
            self.pc + 8,
            self.pc - 4,
        ]);
        self.self_loops |= to == i32::from(self.block.start);
        PagePc(to)
    }

    fn op(&mut self, fp: bool) {
        let ty = self.rng.one(&[Ty::I64, Ty::I64, Ty::I32, Ty::U32]);
        match self.rng.below(if fp { 40 } else { 26 }) {
            0..10 => {
                let op = self.rng.one(&ALU_OPS);
                let op = if self.rng.chance(40) { self.rng.one(&ALU_OPS[..11]) } else { op };
                let (d, a, b) = (self.dest(), self.val(), self.val());
                self.push(Op::Alu { op, ty, d, a, b });
                // Both halves of a division, with or without something between.
                let other = match op {
                    AluOp::DivS => AluOp::RemS,
                    AluOp::RemS => AluOp::DivS,
                    AluOp::DivU => AluOp::RemU,
                    AluOp::RemU => AluOp::DivU,
                    _ => return,
                };
                if self.rng.chance(60) {
                    if self.rng.chance(50) {
                        let (op, d, a) = (self.rng.one(&UN_OPS), self.dest(), self.val());
                        self.push(Op::Un { op, ty: Ty::I64, d, a });
                    }
                    let d = self.dest();
                    self.push(Op::Alu { op: other, ty, d, a, b });
                }
            }
            10..13 => {
                let (op, d, a) = (self.rng.one(&UN_OPS), self.dest(), self.val());
                self.push(Op::Un { op, ty, d, a });
            }
            13..16 => {
                let (base, off) = self.base();
                let (size, ext) = (self.size(), self.rng.one(&[Ext::Zero, Ext::Sign, Ext::Ones]));
                let d = if self.rng.chance(20) { self.fp_slot() } else { self.dest() };
                self.push(Op::Load { d, base, off, size, ext });
            }
            16..19 => {
                let (base, off) = self.base();
                let (size, src) = (self.size(), self.val());
                let src = if self.rng.chance(20) { self.fp_slot().into() } else { src };
                self.push(Op::Store { src, base, off, size });
            }
            19 => {
                let (base, _) = self.base();
                let (size, ext) = (self.size(), self.rng.one(&[Ext::Zero, Ext::Sign]));
                let d = self.dest();
                self.push(Op::LoadReserved { d, base, size, ext });
                if self.rng.chance(70) {
                    let (d, src) = (self.dest(), self.val());
                    self.push(Op::StoreConditional { d, src, base, size });
                }
            }
            20 => {
                let (base, _) = self.base();
                let (op, size, src) = (self.rng.one(&AMO_OPS), self.size(), self.val());
                let d = if self.rng.chance(60) { Some(self.dest()) } else { None };
                self.push(Op::Amo { op, d, src, base, size });
            }
            21 => {
                let (d, pc) = (self.dest(), PagePc(self.pc));
                self.push(Op::GetPc { d, pc });
            }
            22 => match self.rng.below(3) {
                0 => self.push(Op::Fence),
                1 => {
                    let (off, val) = (self.rng.below(16) as i32, self.rng.next() as u8);
                    self.push(Op::SetEnvByte { off, val });
                }
                _ => {
                    let (off, mask) = (self.rng.below(16) as i32, 1 << self.rng.below(8));
                    self.push(Op::GuardEnv { off, mask });
                }
            },
            23 => {
                let pure = self.rng.chance(60);
                let kind = if pure { CallKind::Pure } else { CallKind::MayExit };
                let ret = if self.rng.chance(70) { Some(self.dest()) } else { None };
                let args = [self.val(), self.val(), self.val()];
                self.push(Op::Call { helper: u16::from(!pure), kind, ret, args });
            }
            24 | 25 => {
                let cond = self.rng.one(&[Cond::Eq, Cond::Ne, Cond::LtS, Cond::GeS, Cond::LtU, Cond::GeU]);
                // Rather unlikely to be taken.
                let (a, b) =
                    if self.rng.chance(70) { (self.slot().into(), Val::Imm(0)) } else { (self.val(), self.val()) };
                let cond = if b == Val::Imm(0) { Cond::Eq } else { cond };
                let to = self.target();
                self.push(Op::Branch { cond, a, b, to });
            }
            39 if self.rng.chance(60) => {
                // As compilers compare without flags; now and then not quite so.
                let [was, d] = [self.dest(), self.dest()];
                let call = |ret, args| Op::Call { helper: HELPER_FP_FLAGS, kind: CallKind::Pure, ret, args };
                let zero = Val::Imm(0);
                let ret = if self.rng.chance(90) { Some(was) } else { None };
                self.push(call(ret, [zero, zero, zero]));
                let op = self.rng.one(&[FpOp::Lt, FpOp::Le, FpOp::Eq, FpOp::Lt]);
                let (a, b) = (self.fp_slot(), self.fp_slot());
                self.push(Op::Fp { op, fmt: FpFmt::F64, rm: Rm::NearestEven, d, a, b, c: a });
                let new = if self.rng.chance(90) { was.into() } else { self.val() };
                let ret = if self.rng.chance(10) { Some(self.dest()) } else { None };
                self.push(call(ret, [Val::Imm(1), new, zero]));
                if self.rng.chance(50) {
                    let (cond, to) = (self.rng.one(&[Cond::Eq, Cond::Ne]), self.target());
                    self.push(Op::Branch { cond, a: d.into(), b: zero, to });
                }
            }
            _ => {
                let op = self.rng.one(&FP_OPS);
                let fmt = self.rng.one(&[FpFmt::F32, FpFmt::F64]);
                let rm = self.rng.one(&[Rm::Dynamic, Rm::Dynamic, Rm::Dynamic, Rm::ToZero, Rm::NearestMaxMag, Rm::Up]);
                let from_int =
                    matches!(op, FpOp::FromI32 | FpOp::FromI64 | FpOp::FromU32 | FpOp::FromU64 | FpOp::MvFromInt);
                let a = if from_int { self.slot() } else { self.fp_slot() };
                let d = if crate::lower::result_is_float(op) { self.fp_slot() } else { self.dest() };
                let (b, c) = (self.fp_slot(), self.fp_slot());
                self.push(Op::Fp { op, fmt, rm, d, a, b, c });
            }
        }
    }

    fn terminal(&mut self) {
        match self.rng.below(4) {
            0 | 1 => {
                let to = self.target();
                self.push(Op::Jump { to });
            }
            _ => {
                let base = self.slot();
                let off = self.rng.one(&[0, 0, 16, -3, 0x7ff]);
                let link = if self.rng.chance(50) { Some((self.dest(), PagePc(self.pc + 4))) } else { None };
                self.push(Op::JumpReg { base, off, link, hint: JumpHint::None });
            }
        }
    }
}

/// A random block, and whether it may jump to itself.
pub fn block(rng: &mut Rng, fp: bool) -> (Block, bool) {
    let start = (rng.below(0x700) * 2) as u16;
    let mut block = Block::default();
    block.clear(start);
    let mut g = Generator { rng, block, pc: i32::from(start), self_loops: false, last_base: Slot(2) };
    for _ in 0..1 + g.rng.below(24) {
        let len = g.rng.one(&[2u8, 4]);
        g.push(Op::Insn { pc: PagePc(g.pc), len });
        for t in 0..3 {
            // Temporaries are undefined at first.
            let a = Val::Slot(Slot(g.rng.below(22) as u8));
            if g.rng.chance(30) {
                g.push(Op::Un { op: UnOp::Mov, ty: Ty::I64, d: Slot::temp(t), a });
            } else {
                g.push(Op::Un { op: UnOp::Mov, ty: Ty::I64, d: Slot::temp(t), a: Val::Imm(t.into()) });
            }
        }
        for _ in 0..1 + g.rng.below(3) {
            g.op(fp);
        }
        g.pc += i32::from(len);
        g.block.insns += 1;
    }
    g.terminal();
    g.block.len = (g.pc - i32::from(start)) as u16;
    (g.block, g.self_loops)
}

/// Counts the rounds of [`loop_block`]; nothing else uses it.
pub(super) const ROUNDS: Slot = Slot(23);

/// A block that jumps to itself until [`ROUNDS`] is zero, now and then out of the middle.
fn loop_block(rng: &mut Rng) -> Block {
    loop {
        let (mut block, self_loops) = block(rng, true);
        let ends = block.ops.iter().position(|op| matches!(op, Op::Insn { .. }) && rng.chance(20));
        let Some(at) = ends.filter(|at| !self_loops && *at > 1) else { continue };
        let to = PagePc(i32::from(block.start));
        // Loops with calls are not copied.
        let calls = |op: &Op| {
            matches!(
                op,
                Op::Call { .. } | Op::Fence | Op::LoadReserved { .. } | Op::StoreConditional { .. } | Op::Amo { .. }
            )
        };
        let behind = block.ops.split_off(at);
        block.ops.retain(|op| !calls(op) || rng.chance(3));
        let pc = PagePc(i32::from(block.start) + 2 * block.ops.len() as i32);
        let (a, b) = (ROUNDS.into(), Val::Imm(0));
        block.ops.push(Op::Insn { pc, len: 2 });
        block.ops.push(Op::Alu { op: AluOp::Add, ty: Ty::I64, d: ROUNDS, a, b: Val::Imm(-1) });
        block.ops.push(Op::Branch { cond: Cond::Ne, a, b, to });
        block.ops.extend(behind);
        return block;
    }
}

impl Generator<'_> {
    /// An instruction of a loop that goes through memory by constant steps, or does something else now and then.
    fn march(&mut self) {
        let pointers = [2u8, 5, 20, 21, 6, 7].map(Slot);
        let pointer = self.rng.one(&pointers);
        let off = self.rng.one(&[0, 0, 8, -8, 16, 24, 3, 520, -0x400]);
        let step = self.rng.one(&[0, 1, 2, 4, 8, 8, 8, 16, 24, -8, -1, 64, 100, 520, 3000]);
        let index = self.rng.one(&[Slot(22), Slot(9)]);
        let (size, base) = (self.size(), Val::Slot(pointer));
        match self.rng.below(16) {
            0..4 => {
                let (d, ext) = match self.rng.below(3) {
                    0 => (self.fp_slot(), if size == Size::B4 { Ext::Ones } else { Ext::Zero }),
                    1 => (Slot(8 + self.rng.below(12) as u8), Ext::Zero),
                    _ => (Slot(10 + self.rng.below(4) as u8), Ext::Sign),
                };
                self.push(Op::Load { d, base, off, size, ext });
            }
            4..8 => {
                let src = if self.rng.chance(30) { self.fp_slot() } else { Slot(self.rng.below(22) as u8) };
                self.push(Op::Store { src: src.into(), base, off, size });
            }
            8..11 => {
                let d = if self.rng.chance(60) { pointer } else { self.rng.one(&pointers) };
                self.push(Op::Alu { op: AluOp::Add, ty: Ty::I64, d, a: base, b: Val::Imm(step) });
            }
            11 => {
                let op = self.rng.one(&[AluOp::Add, AluOp::Sub, AluOp::Sh1Add, AluOp::Sh3Add]);
                let (a, b) = if op == AluOp::Sub { (base, index.into()) } else { (index.into(), base) };
                let t = Slot::temp(0);
                self.push(Op::Alu { op, ty: Ty::I64, d: t, a, b });
                self.push(Op::Load { d: Slot(11), base: t.into(), off: 0, size, ext: Ext::Zero });
            }
            12 => self.push(Op::Alu { op: AluOp::Add, ty: Ty::I64, d: index, a: index.into(), b: Val::Imm(step & 15) }),
            13 => {
                let d = self.rng.one(&pointers);
                self.push(Op::Un { op: UnOp::Mov, ty: Ty::I64, d, a: base });
            }
            14 => self.op(true),
            _ => {
                let (a, b) = (Slot(10).into(), Slot(self.rng.below(22) as u8).into());
                self.push(Op::Alu { op: AluOp::Xor, ty: Ty::I64, d: Slot(10), a, b });
            }
        }
    }
}

/// A loop of such instructions that ends when [`ROUNDS`] is zero.
fn marching_block(rng: &mut Rng) -> Block {
    let start = (rng.below(0x700) * 2) as u16;
    let mut block = Block::default();
    block.clear(start);
    let mut g = Generator { rng, block, pc: i32::from(start), self_loops: false, last_base: Slot(2) };
    for _ in 0..2 + g.rng.below(12) {
        g.push(Op::Insn { pc: PagePc(g.pc), len: 2 });
        g.push(Op::Un { op: UnOp::Mov, ty: Ty::I64, d: Slot::temp(1), a: Val::Slot(Slot(10)) });
        g.push(Op::Un { op: UnOp::Mov, ty: Ty::I64, d: Slot::temp(2), a: Val::Imm(2) });
        g.push(Op::Un { op: UnOp::Mov, ty: Ty::I64, d: Slot::temp(0), a: Val::Imm(0) });
        g.march();
        g.pc += 2;
        g.block.insns += 1;
    }
    // What does not go on to the end is for other tests, and what closes the loop is below.
    let to = PagePc(i32::from(start));
    let leaves = |op: &Op| op.is_terminal() || matches!(*op, Op::Branch { to: there, .. } if there == to);
    g.block.ops.retain(|op| !leaves(op));
    g.push(Op::Insn { pc: PagePc(g.pc), len: 2 });
    g.push(Op::Alu { op: AluOp::Add, ty: Ty::I64, d: ROUNDS, a: ROUNDS.into(), b: Val::Imm(-1) });
    let (a, b) = (ROUNDS.into(), Val::Imm(0));
    if g.rng.chance(50) {
        g.push(Op::Branch { cond: Cond::Ne, a, b, to });
        g.push(Op::Jump { to: PagePc(0x102) });
    } else {
        g.push(Op::Branch { cond: Cond::Eq, a, b, to: PagePc(0x102) });
        g.push(Op::Jump { to });
    }
    g.block.len = (g.pc + 2 - i32::from(start)) as u16;
    g.block
}

#[test]
fn loops_that_go_through_memory() {
    for optimise in [Optimise::Forced, Optimise::Usual] {
        for variant in 0..4 {
            let m = Machine::optimising(pins(variant), 2, optimise);
            let mut scratch = (Vec::new(), Emitted::default());
            for n in 0..4000u64 {
                let mut rng = Rng((variant as u64 + 1) << 32 | (n + 1) << 8 | 0x99);
                rng.next();
                let block = marching_block(&mut rng);
                let mut start = guest(&mut rng);
                start.slots[usize::from(ROUNDS.0)] = 1 + rng.below(80);
                start.slots[22] = rng.below(64);
                start.slots[9] = rng.below(300);
                let kicked = rng.chance(10);
                check_how(&m, &block, start, kicked, &mut rng, &mut scratch, |block, oracle| {
                    run_loop(block, oracle, kicked)
                });
            }
        }
    }
}

/// Neighbouring pages of the guest that are none of the host's: whoever goes on past a page's end by what is to be added
/// there goes wrong.
#[test]
fn loops_notice_the_ends_of_pages() {
    let l = mimus_tcg_ir::backend::ContextLayout::STANDARD;
    for (variant, step) in (0..4).flat_map(|v| [8i64, 24, 40, -8, -24].map(|s| (v, s))) {
        let m = Machine::optimising(pins(variant), 2, Optimise::Usual);
        let entry = |array, page: u64, value| m.context_entry(array, DATA + page * 4096, value);
        let addend = m.data_addend();
        // The guest's second page is the host's fourth.
        entry(l.addend, 1, addend.wrapping_add(2 * 4096));
        let mut block = Block::default();
        block.clear(0x200);
        let (from, to) = (Slot(2), Slot(5));
        let insn = |n: i32| Op::Insn { pc: PagePc(0x200 + 2 * n), len: 2 };
        let add = |d: Slot, by| Op::Alu { op: AluOp::Add, ty: Ty::I64, d, a: d.into(), b: Val::Imm(by) };
        let load = Op::Load { d: Slot(10), base: from.into(), off: 0, size: Size::B8, ext: Ext::Zero };
        let store = Op::Store { src: Slot(10).into(), base: to.into(), off: 0, size: Size::B8 };
        let branch = Op::Branch { cond: Cond::Ne, a: ROUNDS.into(), b: Val::Imm(0), to: PagePc(0x200) };
        let rounds = (4096 / step.unsigned_abs()).min(160);
        block.ops.extend([insn(0), load, insn(1), store, insn(2), add(from, step), insn(3), add(to, step)]);
        block.ops.extend([insn(4), add(ROUNDS, -1), insn(5), branch, Op::Jump { to: PagePc(0x300) }]);
        (block.insns, block.len) = (6, 12);
        let mut rng = Rng(77);
        let mut start = guest(&mut rng);
        start.hot = [0; 16];
        // From the middle of the first page across its end, or back, and from elsewhere in the same pages.
        let at = |at: u64| DATA + if step > 0 { at } else { 8192 - 8 - at };
        start.slots[2] = at(0x800);
        start.slots[5] = at(0xa00);
        start.slots[usize::from(ROUNDS.0)] = rounds;
        let mut expected = start.data.clone();
        let place = |va: u64| match va - DATA {
            off if off < 4096 => off as usize,
            off => off as usize + 2 * 4096,
        };
        for n in 0..rounds {
            let moved = |slot: usize| place(start.slots[slot].wrapping_add_signed(step * n as i64));
            let word: [u8; 8] = expected[moved(2)..moved(2) + 8].try_into().unwrap();
            expected[moved(5)..moved(5) + 8].copy_from_slice(&word);
        }
        let mut info = Emitted::default();
        info.hints.hot = true;
        info.hints.scattered = (0x200..0x20c).collect();
        let mut out = Vec::new();
        m.backend.emit(&block, m.blocks_at, None, &mut out, &mut info);
        m.write_code(m.blocks_at, &out);
        let mut env = start.env();
        env.dispatch = m.stubs.dispatch;
        env.blocks.push((m.blocks_at as u64, info));
        let (code, pc) = m.run(&mut env, m.blocks_at);
        assert_eq!((code, pc), (ExitCode::Lookup, CODE + 0x300), "variant {variant}, step {step}");
        assert_eq!(env.guest.slots[usize::from(ROUNDS.0)], 0);
        assert!(env.guest.data == expected, "variant {variant}, step {step}: memory differs");
    }
}

/// Runs the block by the interpreter until it is left.
pub(super) fn run_loop(block: &Block, oracle: &mut Oracle, once: bool) -> Outcome {
    loop {
        let outcome = interp::run(block, oracle);
        let rounds = oracle.guest.slots[usize::from(ROUNDS.0)];
        if once || rounds == 0 || outcome != Outcome::Next(CODE + u64::from(block.start)) {
            return outcome;
        }
    }
}

#[test]
fn loops_of_random_blocks() {
    for optimise in [Optimise::Forced, Optimise::Usual] {
        for variant in 0..4 {
            let m = Machine::optimising(pins(variant), 2, optimise);
            let mut scratch = (Vec::new(), Emitted::default());
            for n in 0..3000u64 {
                let mut rng = Rng((variant as u64 + 1) << 32 | (n + 1) << 8 | 0x77);
                rng.next();
                let block = loop_block(&mut rng);
                let mut start = guest(&mut rng);
                start.slots[usize::from(ROUNDS.0)] = 1 + rng.below(5);
                let kicked = rng.chance(20);
                check_how(&m, &block, start, kicked, &mut rng, &mut scratch, |block, oracle| {
                    run_loop(block, oracle, kicked)
                });
            }
        }
    }
}

/// A random state of a guest.
pub fn guest(rng: &mut Rng) -> Guest {
    let mut g = Guest::new();
    for s in 0..32 {
        g.slots[s] = rng.number();
    }
    for s in 32..64 {
        g.slots[s] = rng.float();
    }
    for s in ADDRESS_SLOTS {
        let page = rng.one(&[0, 0, 1, 1, 1, 2, 3]);
        let aligned = if rng.chance(70) { !7 } else { !0 };
        g.slots[usize::from(s)] = DATA + page * 4096 + (rng.below(4096) & aligned);
        if rng.chance(5) {
            g.slots[usize::from(s)] = DATA + page * 4096 + 4096 - rng.below(9);
        }
    }
    for b in g.data.chunks_mut(8) {
        b.copy_from_slice(&rng.number().to_le_bytes());
    }
    g.hot = std::array::from_fn(|_| if rng.chance(90) { 0 } else { rng.next() as u8 });
    g.rounding = rng.below(4) as u8;
    g
}

/// Shows the block that could not be lowered.
struct PrintOnPanic<'a>(&'a Block);

impl Drop for PrintOnPanic<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("{}", self.0);
        }
    }
}

/// Runs one block both ways and compares.
pub fn check(
    m: &Machine,
    block: &Block,
    start: Guest,
    self_loops: bool,
    rng: &mut Rng,
    scratch: &mut (Vec<u8>, Emitted),
) {
    let kicked = self_loops || rng.chance(30);
    check_how(m, block, start, kicked, rng, scratch, interp::run);
}

/// The first of a block's instructions by itself.
fn first_instruction(block: &Block) -> Option<Block> {
    let is_insn = |op: &Op| matches!(op, Op::Insn { .. });
    let end = 1 + block.ops.get(1..)?.iter().position(is_insn)?;
    let Op::Insn { pc, .. } = block.ops[end] else { return None };
    let mut first = block.clone();
    first.ops.truncate(end);
    first.ops.push(Op::Jump { to: pc });
    Some(first)
}

/// The same; `interpret` runs it the other way.
pub(super) fn check_how(
    m: &Machine,
    block: &Block,
    start: Guest,
    kicked: bool,
    rng: &mut Rng,
    scratch: &mut (Vec<u8>, Emitted),
    interpret: impl Fn(&Block, &mut Oracle) -> Outcome,
) {
    let code_align = u64::from(m.backend.config.code_align);
    let mut oracle =
        Oracle { guest: start.clone(), insn: (PagePc(0), 0), undefined: Flags::NONE, dropped: Flags::NONE, code_align };
    let outcome = interpret(block, &mut oracle);
    // With every start address modulo 16.
    let at = m.blocks_at + rng.below(16) as usize;
    let print = PrintOnPanic(block);
    scratch.1.hints.hot = rng.chance(50);
    scratch.1.hints.scattered.clear();
    scratch.1.hints.parted.clear();
    if rng.chance(50) {
        scratch.1.hints.parted.extend((0..24).map(|_| block.start + 2 * rng.below(48) as u16));
    }
    if rng.chance(20) {
        // One or the other in a block may be served by the page entries all the same.
        scratch.1.hints.scattered.extend((0..4).map(|_| block.start + 2 * rng.below(16) as u16));
    }
    m.backend.emit(block, at, None, &mut scratch.0, &mut scratch.1);
    drop(print);
    m.write_code(at, &scratch.0);
    let mut env = start.env();
    env.set_kick(u32::from(kicked));
    env.blocks.push((at as u64, std::mem::take(&mut scratch.1)));
    env.dispatch = m.stubs.dispatch;
    let (code, pc) = m.run(&mut env, at);
    let outcome = match first_instruction(block) {
        // A jump back may have done the first instruction when it notices the kick word.
        Some(first) if code == ExitCode::Kicked && outcome == Outcome::Next(CODE + u64::from(block.start)) => {
            if pc == CODE + u64::from(block.start) { outcome } else { interp::run(&first, &mut oracle) }
        }
        _ => outcome,
    };
    let expected = match outcome {
        Outcome::Next(va) => (false, va & code_align.wrapping_neg()),
        Outcome::Dispatch | Outcome::Faulted => (false, TRAP),
        Outcome::Careful(va) => (true, va),
    };
    for t in usize::from(FIRST_TEMP)..SLOTS {
        // Dead.
        env.guest.slots[t] = oracle.guest.slots[t];
    }
    // What the block leaves open.
    let open = oracle.dropped.union(if is_amd() { Flags::NONE } else { oracle.undefined });
    for slots in [&mut env.guest.slots, &mut oracle.guest.slots] {
        if !open.is_empty() {
            let slot = &mut slots[usize::from(FLAGS.0)];
            *slot = Flags::unpack(*slot).without(open).pack();
        }
    }
    let same = env.guest == oracle.guest && (code == ExitCode::Careful, pc) == expected;
    if same {
        scratch.1 = env.blocks.pop().map(|b| b.1).unwrap_or_default();
        return;
    }
    for s in 0..64 {
        let (is, was) = (env.guest.slots[s], oracle.guest.slots[s]);
        if is != was {
            eprintln!("slot {s}: {is:#x}, should be {was:#x}");
        }
    }
    eprintln!("{code:?} at {pc:#x}, should be {expected:x?}; flags {:x} {:x}", env.guest.flags, oracle.guest.flags);
    eprintln!("left at {:?}, should be {:?}", env.guest.left_at, oracle.guest.left_at);
    eprintln!(
        "reservation same: {}",
        env.guest.reserve_addr == oracle.guest.reserve_addr && env.guest.reserve_value == oracle.guest.reserve_value
    );
    eprintln!("memory same: {}", env.guest.data == oracle.guest.data);
    eprintln!("open flags: {open}\n{block}");
    eprintln!("{}", m.backend.disassemble(&scratch.0, at));
    panic!("generated code differs from the interpreter");
}

fn many(fp: bool, blocks: u64, optimise: Optimise) {
    for variant in 0..4 {
        let m = Machine::optimising(pins(variant), 2, optimise);
        let mut scratch = (Vec::new(), Emitted::default());
        for n in 0..blocks {
            let mut rng = Rng((variant as u64 + 1) << 32 | (n + 1) << 8 | u64::from(fp) << 4 | 5);
            rng.next();
            let (block, self_loops) = block(&mut rng, fp);
            let start = guest(&mut rng);
            check(&m, &block, start, self_loops, &mut rng, &mut scratch);
        }
    }
}

#[test]
fn random_integer_blocks() {
    many(false, 8000, Optimise::from_environment());
}

#[test]
fn random_floating_point_blocks() {
    many(true, 8000, Optimise::from_environment());
}

#[test]
fn random_blocks_with_every_optimisation_or_none() {
    for optimise in [Optimise::Forced, Optimise::Off, Optimise::Compact] {
        many(false, 2000, optimise);
        many(true, 1000, optimise);
    }
}
