//! Random blocks of guests with flags and partial registers, and what the code for a few of them looks like.

use super::harness::*;
use super::native::is_amd;
use super::random::{ADDRESS_SLOTS, Rng, check, guest};
use mimus_tcg_ir::backend::{Emitted, HostBackend, Optimise};
use mimus_tcg_ir::flags::{self, FLAGS, Flags};
use mimus_tcg_ir::verify::{flags_read, flags_written, least_size, rmw_allowed, verify};
use mimus_tcg_ir::*;

/// How slots are given to registers: as an x86 frontend does, nothing pinned, and otherwise.
pub(super) fn pin_variants() -> [Vec<Slot>; 4] {
    [
        [3u8, 4, 5, 6, 7, 2, 1, 8, 9, 0, 12].map(Slot).to_vec(),
        vec![],
        [10u8, 20, 33, 5, 64, 11, 7].map(Slot).to_vec(),
        [0u8, 1, 2, 3, 4, 5, 6, 7, 8, 65, 66].map(Slot).to_vec(),
    ]
}

struct Generator<'a> {
    rng: &'a mut Rng,
    block: Block,
    pc: i32,
    self_loops: bool,
    /// The base of most accesses.
    favourite: Option<Slot>,
    /// Flags whose values are not to be looked at.
    open: Flags,
}

const SIZES: [Size; 4] = [Size::B1, Size::B2, Size::B4, Size::B8];

impl Generator<'_> {
    fn slot(&mut self) -> Slot {
        match self.rng.below(100) {
            0..12 => Slot::temp(self.rng.below(3) as u8),
            // A few, so that they meet.
            12..70 => Slot(self.rng.below(8) as u8),
            _ => Slot(self.rng.one(&[8, 9, 10, 11, 12, 13, 14, 15, 16, 19, 20, 21])),
        }
    }

    fn val(&mut self) -> Val {
        if self.rng.chance(25) { Val::Imm(self.rng.number() as i64) } else { Val::Slot(self.slot()) }
    }

    fn dest(&mut self) -> Slot {
        loop {
            let d = self.slot();
            if !ADDRESS_SLOTS.contains(&d.0) || self.rng.chance(1) {
                return d;
            }
        }
    }

    fn base(&mut self) -> (Val, i32) {
        let off = self.rng.one(&[0, 0, 4, 8, -8, 16, 1, 0x7f8, -0x400]);
        if self.rng.chance(3) {
            return (Val::Imm((DATA + self.rng.below(DATA_LEN)) as i64), off);
        }
        if let Some(favourite) = self.favourite.filter(|_| self.rng.chance(60)) {
            return (favourite.into(), off.clamp(-64, 64));
        }
        let s = Slot(self.rng.one(&ADDRESS_SLOTS));
        if self.rng.chance(25) {
            let t = Slot::temp(0);
            let index = Val::Imm(i64::from(self.rng.below(64) as u8));
            let shift = self.rng.below(4) as u8;
            self.push(Op::Lea { d: t, base: s.into(), index, shift, disp: off, size: Size::B8 });
            return (t.into(), 0);
        }
        (s.into(), off)
    }

    /// Adds an operation, after one that settles what flags it reads.
    fn push(&mut self, op: Op) {
        let looks = match op {
            Op::Call { kind: CallKind::MayExit, .. } => Flags::ALL,
            op => flags_read(&op),
        };
        if looks.intersects(self.open) {
            let (a, mask) = (self.val(), self.open);
            self.block.ops.push(Op::SetFlags { a, mask });
            self.open = Flags::NONE;
        }
        self.block.ops.push(op);
        let (_, must) = flags_written(&op);
        let loose = |op: FlagOp| if is_amd() { Flags::NONE } else { flags::undefined(op) };
        let open = match op {
            Op::AluF { op, .. } | Op::Rmw { op: RmwOp::F(op), .. } => loose(op),
            Op::ShiftDoubleF { .. } => loose(FlagOp::Shl),
            Op::MulWideF { .. } => loose(FlagOp::Mul),
            _ => Flags::NONE,
        };
        self.open = self.open.without(must).union(open);
    }

    fn target(&mut self) -> PagePc {
        let start = i32::from(self.block.start);
        let to = self.rng.one(&[0x100, 0xffe, 0x1000, 0x1234, -2, start, self.pc + 8, self.pc - 4]);
        self.self_loops |= to == start;
        PagePc(to)
    }

    fn flags(&mut self) -> Flags {
        loop {
            let flags = Flags(self.rng.next() as u16 & Flags::ALL.0);
            if !flags.is_empty() {
                return flags;
            }
        }
    }

    fn cond(&mut self) -> CondF {
        self.rng.one(&CondF::ALL)
    }

    /// A size of at least `least`.
    fn size(&mut self, least: Size) -> Size {
        loop {
            let size = self.rng.one(&SIZES);
            if size >= least {
                return size;
            }
        }
    }

    /// A second operand: often in range for a count or a bit number.
    fn second(&mut self, op: FlagOp) -> Val {
        let counts = flags::written_by(op) != Flags::ALL || verify::has_count(op);
        if counts && self.rng.chance(50) {
            return Val::Imm(self.rng.below(40) as i64);
        }
        if self.rng.chance(20) { Slot(1).into() } else { self.val() }
    }

    fn alu_f(&mut self) {
        use FlagOp::*;
        let op = if self.rng.chance(50) { self.rng.one(&[Add, Sub, And, Or, Xor]) } else { self.rng.one(&FlagOp::ALL) };
        let size = self.size(least_size(op));
        let a = self.val();
        let b = self.second(op);
        let d = match a {
            _ if self.rng.chance(25) => None,
            Val::Slot(a) if self.rng.chance(70) => Some(a),
            _ => Some(self.dest()),
        };
        let d = d.filter(|d| !ADDRESS_SLOTS.contains(&d.0));
        self.push(Op::AluF { op, size, d, a, b });
    }

    fn plain(&mut self) {
        let (d, a, b) = (self.dest(), self.val(), self.val());
        let ty = self.rng.one(&[Ty::I64, Ty::I32, Ty::U32]);
        let op = match self.rng.below(14) {
            0..4 => {
                let op = self.rng.one(&[AluOp::Add, AluOp::Sub, AluOp::And, AluOp::Shl, AluOp::Sar, AluOp::Mul]);
                Op::Alu { op, ty, d, a, b }
            }
            4 => Op::Alu {
                op: self.rng.one(&[AluOp::DivS, AluOp::MulHiU, AluOp::MinS, AluOp::Rol]),
                ty: Ty::I64,
                d,
                a,
                b,
            },
            5 | 6 => Op::Un { op: UnOp::Mov, ty, d, a },
            7 => Op::Un { op: self.rng.one(&[UnOp::SextB, UnOp::ZextH, UnOp::Bswap, UnOp::Popcnt]), ty, d, a },
            8 | 9 => {
                let (shift, disp) = (self.rng.below(4) as u8, self.rng.one(&[0, 8, -8, 0x7fff_ffff, i32::MIN]));
                let (a, b) = if self.rng.chance(50) { (a, b) } else { (self.slot().into(), self.slot().into()) };
                Op::Lea { d, base: a, index: b, shift, disp, size: self.size(Size::B2) }
            }
            10 => Op::SetPart { d, size: self.rng.one(&[Size::B1, Size::B2]), a },
            11 => Op::GetHigh { d, a: self.slot() },
            12 => Op::SetHigh { d, a },
            _ => Op::GetPc { d, pc: PagePc(self.pc) },
        };
        self.push(op);
    }

    /// Pushes, pops, and what compilers put around them.
    fn stack(&mut self) {
        let sp = Slot(self.rng.one(&ADDRESS_SLOTS));
        let adjust = |by: i32, how: u64| match how {
            0 => Op::Lea { d: sp, base: sp.into(), index: Val::Imm(0), shift: 0, disp: by, size: Size::B8 },
            1 => Op::Alu { op: AluOp::Add, ty: Ty::I64, d: sp, a: sp.into(), b: Val::Imm(by.into()) },
            _ => Op::AluF { op: FlagOp::Sub, size: Size::B8, d: Some(sp), a: sp.into(), b: Val::Imm((-by).into()) },
        };
        for _ in 0..1 + self.rng.below(4) {
            let how = self.rng.below(3);
            if self.rng.chance(50) {
                let src = self.val();
                self.push(Op::Store { src, base: sp.into(), off: -8, size: Size::B8 });
                self.push(adjust(-8, how));
            } else {
                let d = self.dest();
                let d = if d == sp { Slot::temp(2) } else { d };
                self.push(Op::Load { d, base: sp.into(), off: 0, size: Size::B8, ext: Ext::Zero });
                self.push(adjust(8, how));
            }
            if self.rng.chance(20) {
                self.alu_f();
            }
        }
    }

    fn memory(&mut self) {
        if self.rng.chance(15) {
            return self.stack();
        }
        let (base, off) = self.base();
        let size = self.rng.one(&SIZES);
        match self.rng.below(20) {
            0..6 => {
                let (d, ext) = (self.dest(), self.rng.one(&[Ext::Zero, Ext::Sign]));
                self.push(Op::Load { d, base, off, size, ext });
                if self.rng.chance(50) {
                    // Used at once, as instructions with a memory operand do.
                    let (op, a) = (self.rng.one(&[FlagOp::Add, FlagOp::Sub, FlagOp::And, FlagOp::Xor]), self.slot());
                    let to = if self.rng.chance(50) { Some(a) } else { None };
                    let to = to.filter(|d| !ADDRESS_SLOTS.contains(&d.0));
                    self.push(Op::AluF { op, size, d: to, a: a.into(), b: d.into() });
                }
            }
            6..11 => {
                let src = self.val();
                self.push(Op::Store { src, base, off, size });
            }
            11..17 => {
                let op = self.rng.one(&FlagOp::ALL);
                let (size, op) = if rmw_allowed(op) {
                    (self.size(least_size(op)), RmwOp::F(op))
                } else {
                    (size, self.rng.one(&[RmwOp::Swap, RmwOp::F(FlagOp::Add)]))
                };
                let old = if matches!(op, RmwOp::Swap | RmwOp::F(FlagOp::Add)) && self.rng.chance(60) {
                    Some(self.dest())
                } else {
                    None
                };
                let src = match op {
                    RmwOp::F(op) => self.second(op),
                    RmwOp::Swap => self.val(),
                };
                let lockable = !matches!(op, RmwOp::F(op) if verify::has_count(op));
                let lock = lockable && self.rng.chance(40);
                self.push(Op::Rmw { op, size, lock, old, src, base, off });
            }
            _ => {
                let (d, new) = (self.dest(), self.val());
                let mut expected = self.val();
                if self.rng.chance(60) {
                    let t = Slot::temp(1);
                    self.push(Op::Load { d: t, base, off, size, ext: Ext::Sign });
                    expected = t.into();
                }
                self.push(Op::CmpXchg { d, size, expected, new, base, off });
            }
        }
    }

    fn consumer(&mut self) {
        let (cond, d) = (self.cond(), self.dest());
        let op = match self.rng.below(10) {
            0 | 1 => Op::SetCondF { cond, d },
            2..5 => Op::CMovF { cond, size: self.size(Size::B2), d, a: self.val() },
            5 => Op::GetFlags { d },
            6 => Op::SetFlags { a: self.val(), mask: self.flags() },
            7 => Op::FlipFlags { mask: if self.rng.chance(60) { Flags::CF } else { self.flags() } },
            _ => {
                let to = self.target();
                let dead = if self.rng.chance(60) { Flags::ALL } else { Flags(self.rng.next() as u16 & 0x8d5) };
                Op::BranchF { cond, to, dead }
            }
        };
        self.push(op);
    }

    fn other(&mut self) {
        let size = self.rng.one(&SIZES);
        match self.rng.below(10) {
            0..2 => {
                let (left, d) = (self.rng.chance(50), self.dest());
                let (a, b, n) = (self.val(), self.val(), self.second(FlagOp::Shl));
                let size = size.max(Size::B2);
                let beyond = matches!(n, Val::Imm(n) if n as u32 & 31 <= 16);
                let size = if size == Size::B2 && !is_amd() && !beyond { Size::B4 } else { size };
                self.push(Op::ShiftDoubleF { left, size, d, a, b, n });
            }
            2..5 => {
                let (lo, hi) = if self.rng.chance(50) { (Slot(0), Slot(3)) } else { self.two() };
                let (signed, a, b) = (self.rng.chance(50), self.val(), self.val());
                self.push(Op::MulWideF { signed, size, lo, hi, a, b });
            }
            5 => {
                let (pure, ret) = (self.rng.chance(50), Some(self.dest()));
                let kind = if pure { CallKind::Pure } else { CallKind::MayExit };
                let args = [self.val(), self.val(), self.val()];
                self.push(Op::Call { helper: u16::from(!pure), kind, ret, args });
            }
            6 => {
                let (d, off) = (self.dest(), self.rng.below(8) as i32);
                let ext = self.rng.one(&[Ext::Zero, Ext::Sign]);
                self.push(Op::LoadEnv { d, off, size, ext });
            }
            7 => {
                let (src, off) = (self.val(), self.rng.below(8) as i32);
                self.push(Op::StoreEnv { src, off, size });
            }
            8 => self.push(Op::Fence),
            _ => {
                let (a, b) = (self.slot().into(), Val::Imm(0));
                let to = self.target();
                self.push(Op::Branch { cond: Cond::Eq, a, b, to });
            }
        }
    }

    /// An operation that leaves some flags alone or is done again where its flags are wanted, an access, and tests of
    /// which the first ones change what it was done with.
    fn partly(&mut self) {
        let d = loop {
            let d = self.dest();
            if !ADDRESS_SLOTS.contains(&d.0) {
                break d;
            }
        };
        let op = self.rng.one(&[FlagOp::Inc, FlagOp::Dec, FlagOp::Mul, FlagOp::Neg, FlagOp::Add, FlagOp::Shl]);
        let (size, b) = (self.size(least_size(op)), self.second(op));
        self.push(Op::AluF { op, size, d: Some(d), a: d.into(), b });
        for _ in 0..1 + self.rng.below(4) {
            let (cond, size, a) = (self.cond(), self.size(Size::B2), self.val());
            match self.rng.below(6) {
                0 | 1 => {
                    let (base, off) = self.base();
                    self.push(Op::Load { d: Slot::temp(1), base, off, size, ext: Ext::Zero });
                }
                2 => self.push(Op::CMovF { cond, size, d, a }),
                3 => self.push(Op::SetCondF { cond, d }),
                4 => self.plain(),
                _ => self.consumer(),
            }
        }
    }

    fn two(&mut self) -> (Slot, Slot) {
        loop {
            let (a, b) = (self.dest(), self.dest());
            if a != b {
                return (a, b);
            }
        }
    }

    fn divide(&mut self) {
        let size = self.rng.one(&SIZES);
        let (q, r) = if self.rng.chance(50) { (Slot(0), Slot(2)) } else { self.two() };
        let q = if q == Slot(2) { Slot(1) } else { q };
        let r = if r == q { Slot(3) } else { r };
        let (lo, b) = (self.val(), self.val());
        let mut hi = if self.rng.chance(20) { self.val() } else { Val::Imm(0) };
        let signed = self.rng.chance(50);
        if signed && self.rng.chance(70) {
            let t = Slot::temp(1);
            let n = i64::from(8 * size.bytes() - 1);
            let ty = if size == Size::B8 { Ty::I64 } else { Ty::I32 };
            self.push(Op::Alu { op: AluOp::Sar, ty, d: t, a: lo, b: Val::Imm(n) });
            hi = t.into();
        }
        self.push(Op::DivWideF { signed, size, q, r, hi, lo, b });
    }

    fn insn(&mut self) {
        let len = self.rng.one(&[1u8, 2, 3, 7, 15]);
        self.push(Op::Insn { pc: PagePc(self.pc), len });
        for t in 0..3 {
            let a = if self.rng.chance(30) { Val::Slot(Slot(self.rng.below(16) as u8)) } else { Val::Imm(t) };
            self.push(Op::Un { op: UnOp::Mov, ty: Ty::I64, d: Slot::temp(t as u8), a });
        }
        if self.rng.chance(6) {
            self.divide();
        } else if self.rng.chance(3) {
            let (off, mask) = (self.rng.below(16) as i32, 1 << self.rng.below(8));
            self.push(Op::GuardEnv { off, mask });
        } else if self.rng.chance(3) {
            let cond = self.rng.one(&[Cond::Eq, Cond::Ne, Cond::LtS, Cond::GeS, Cond::LtU, Cond::GeU]);
            let (a, b) = (self.val(), self.val());
            let bits = self.rng.one(&[32, 48]);
            let guard = if self.rng.chance(50) { Op::Guard { cond, a, b } } else { Op::GuardFits { a, bits } };
            self.push(guard);
        }
        for _ in 0..1 + self.rng.below(3) {
            match self.rng.below(20) {
                0 => self.partly(),
                1..7 => self.alu_f(),
                7..10 => self.plain(),
                10..14 => self.memory(),
                14..18 => self.consumer(),
                _ => self.other(),
            }
        }
        self.pc += i32::from(len);
        self.block.insns += 1;
    }

    /// A call, mostly of an address from memory: the address of what is behind it is stored before the jump.
    fn call(&mut self) {
        let (target, address) = (Slot::temp(0), Slot::temp(1));
        self.push(Op::Insn { pc: PagePc(self.pc), len: 5 });
        self.pc += 5;
        self.block.insns += 1;
        let (base, off) = self.base();
        match self.rng.below(4) {
            0 => {
                let a = Val::Slot(Slot(self.rng.below(12) as u8));
                self.push(Op::Un { op: UnOp::Mov, ty: Ty::I64, d: target, a });
            }
            n => {
                let size = if n == 1 { Size::B4 } else { Size::B8 };
                self.push(Op::Load { d: target, base, off, size, ext: Ext::Zero });
            }
        }
        if self.rng.chance(40) {
            let cond = self.rng.one(&[Cond::Eq, Cond::GeU]);
            self.push(Op::Guard { cond, a: target.into(), b: Val::Imm(1 << 47) });
        }
        self.push(Op::GetPc { d: address, pc: PagePc(self.pc) });
        let mut stored = address;
        if self.rng.chance(40) {
            stored = Slot::temp(2);
            self.push(Op::Un { op: UnOp::ZextW, ty: Ty::I64, d: stored, a: address.into() });
        }
        let size = if self.rng.chance(90) == (stored == address) { Size::B8 } else { Size::B4 };
        let base = Slot(self.rng.one(&ADDRESS_SLOTS));
        let off = self.rng.one(&[-8, -4, 0, 16]);
        self.push(Op::Store { src: stored.into(), base: base.into(), off, size });
        let (op, a) = (AluOp::Sub, base.into());
        self.push(Op::Alu { op, ty: Ty::I64, d: base, a, b: Val::Imm(8) });
        if self.rng.chance(30) {
            let to = self.target();
            return self.push(Op::Jump { to });
        }
        self.push(Op::JumpReg { base: target, off: 0, link: None, hint: JumpHint::Call });
    }

    fn terminal(&mut self) {
        if self.rng.chance(30) {
            return self.call();
        }
        if self.rng.chance(40) {
            let mask = if self.rng.chance(60) { Flags::ALL } else { self.flags() };
            self.push(Op::DeadFlags { mask });
        }
        if self.rng.chance(50) {
            let to = self.target();
            return self.push(Op::Jump { to });
        }
        let base = self.rng.below(12) as u8;
        let off = self.rng.one(&[0, 0, 16, -3, 0x7ff]);
        self.push(Op::JumpReg { base: Slot(base), off, link: None, hint: JumpHint::None });
    }
}

/// A random block, and whether it may jump to itself.
fn block(rng: &mut Rng) -> (Block, bool) {
    block_with(rng, None)
}

/// The same with accesses off one base mostly.
fn block_with(rng: &mut Rng, favourite: Option<Slot>) -> (Block, bool) {
    let start = rng.below(0xe00) as u16;
    let mut block = Block::default();
    block.clear(start);
    let mut g = Generator { rng, block, pc: i32::from(start), self_loops: false, favourite, open: Flags::NONE };
    for _ in 0..1 + g.rng.below(16) {
        g.insn();
    }
    g.terminal();
    g.block.len = (g.pc - i32::from(start)) as u16;
    assert_eq!(verify(&g.block), Ok(()), "{}", g.block);
    (g.block, g.self_loops)
}

#[test]
fn random_blocks_with_flags() {
    many(BLOCKS, Optimise::from_environment());
}

#[test]
fn random_blocks_with_flags_and_every_optimisation_or_none() {
    many(BLOCKS / 4, Optimise::Forced);
    many(BLOCKS / 4, Optimise::Off);
    many(BLOCKS / 2, Optimise::Compact);
}

fn many(blocks: u64, optimise: Optimise) {
    for (variant, pins) in pin_variants().into_iter().enumerate() {
        let m = Machine::optimising(pins, 1, optimise);
        let mut scratch = (Vec::new(), Emitted::default());
        let scale = std::env::var("MIMUS_TEST_SCALE").ok().and_then(|s| s.parse().ok()).unwrap_or(1);
        for n in 0..blocks * scale {
            let mut rng = Rng((variant as u64 + 1) << 40 | (n + 1) << 8 | 0x77);
            rng.next();
            let (block, self_loops) = block(&mut rng);
            let mut start = guest(&mut rng);
            start.slots[usize::from(FLAGS.0)] = Flags(rng.next() as u16 & Flags::ALL.0).pack();
            check(&m, &block, start, self_loops, &mut rng, &mut scratch);
        }
    }
}

/// Where an access off another base than a stretch's misses, the stretch's copy goes on from there, with flags that may be elsewhere.
#[test]
fn random_blocks_with_stretches_any_access_of_which_may_miss() {
    let scale = std::env::var("MIMUS_TEST_SCALE").ok().and_then(|s| s.parse().ok()).unwrap_or(1);
    for (variant, pins) in pin_variants().into_iter().enumerate() {
        let m = Machine::optimising(pins, 1, Optimise::Usual);
        let mut scratch = (Vec::new(), Emitted::default());
        for n in 0..BLOCKS * scale {
            let mut rng = Rng((variant as u64 + 1) << 40 | (n + 1) << 8 | 0x55);
            rng.next();
            let favourite = Slot(rng.one(&ADDRESS_SLOTS));
            let (block, self_loops) = block_with(&mut rng, Some(favourite));
            let mut start = guest(&mut rng);
            start.slots[usize::from(FLAGS.0)] = Flags(rng.next() as u16 & Flags::ALL.0).pack();
            m.fill_next_ranges(|_| rng.chance(70));
            check(&m, &block, start, self_loops, &mut rng, &mut scratch);
        }
    }
}

const BLOCKS: u64 = 8_000;

/// The code of a block in the text form, a line per instruction, without addresses.
fn code_of(text: &str) -> Vec<String> {
    let [pins, ..] = pin_variants();
    let m = Machine::optimising(pins, 1, Optimise::Usual);
    let block = text::parse(text).unwrap_or_else(|e| panic!("{e}"));
    assert_eq!(verify(&block), Ok(()), "{block}");
    let (mut out, mut info) = (Vec::new(), Emitted::default());
    m.backend.emit(&block, m.blocks_at, None, &mut out, &mut info);
    let text = m.backend.disassemble(&out, m.blocks_at);
    text.lines().filter_map(|line| line.split_once("  ")).map(|(_, ins)| ins.to_string()).collect()
}

#[test]
fn accesses_off_a_register_are_checked_once_in_hot_code_whatever_is_between() {
    let text = "block start=0x10 len=16 insns=5 {
insn +0x10 4
s0 = load.b4.zero [s4 + 0x8]
insn +0x14 4
s1 = load.b4.zero [s6]
store.b4 [s4 + 0x10], s1
insn +0x18 3
s2 = load.b4.zero [s7]
insn +0x1b 3
s2 = load.b4.zero [s4 + 0x4]
jump +0x40
}";
    let block = text::parse(text).unwrap_or_else(|e| panic!("{e}"));
    // With a register left, and without.
    for pinned in [9, 11] {
        let pins = [3u8, 4, 5, 6, 7, 2, 1, 8, 0, 9, 12].map(Slot);
        let m = Machine::optimising(pins[..pinned].to_vec(), 1, Optimise::Usual);
        let (mut out, mut info) = (Vec::new(), Emitted::default());
        info.hints.hot = true;
        m.backend.emit(&block, m.blocks_at, None, &mut out, &mut info);
        let text = m.backend.disassemble(&out, m.blocks_at);
        let checks = |text: &str| text.lines().filter(|line| line.contains("sub r15,[gs:")).count();
        let main = text.split_once("jmp").map_or("", |(main, _)| main);
        assert_eq!((checks(main), checks(&text)), (3, 3 + 5), "{text}");
    }
}

#[test]
fn flags_stay_in_the_hosts_across_accesses_that_a_stretch_has_checked() {
    // A sum of two words with the carry between loads off the stack.
    let text = "block start=0x10 len=28 insns=7 {
insn +0x10 4
s0 = load.b4.zero [s4 + 0x8]
insn +0x14 4
s1 = load.b4.zero [s6]
insn +0x18 2
s1 = f.add.b4 s1, s0
insn +0x1a 4
s3 = load.b4.zero [s4 + 0x10]
store.b4 [s4 + 0xc], s1
insn +0x1e 2
s2 = f.adc.b4 s2, s3
insn +0x20 4
s3 = load.b4.zero [s7]
insn +0x24 4
store.b4 [s4 + 0x4], s3
s3 = f.xor.b4 s3, s3
deadflags cpazso
jump +0x40
}";
    let block = text::parse(text).unwrap_or_else(|e| panic!("{e}"));
    let pins = [3u8, 4, 5, 6, 7, 2, 1, 8, 0].map(Slot);
    let m = Machine::optimising(pins.to_vec(), 1, Optimise::Usual);
    let (mut out, mut info) = (Vec::new(), Emitted::default());
    info.hints.hot = true;
    m.backend.emit(&block, m.blocks_at, None, &mut out, &mut info);
    let text = m.backend.disassemble(&out, m.blocks_at);
    let main = text.split_once("jmp").map_or("", |(main, _)| main);
    let between = main.split_once("adc ").and_then(|(before, _)| before.rsplit_once("add ")).map_or("", |(_, b)| b);
    assert_eq!(between.matches("mov ").count(), 2, "{text}");
    assert!(!between.contains("lahf") && !between.contains("bt ") && !between.contains("cmp "), "{text}");
}

#[test]
fn a_load_of_hot_code_does_not_wait_for_the_sum_of_its_base_and_index() {
    let text = "block start=0x10 len=8 insns=2 {
insn +0x10 4
t0 = lea.b8 s7, s1, 3, 0x10
s2 = load.b8.zero [t0 + 0x8]
insn +0x14 4
t0 = lea.b8 s6, s2, 2, 0x0
t1 = load.b4.zero [t0]
s0 = f.xor.b4 s0, t1
deadflags cpazso
jump +0x40
}";
    let block = text::parse(text).unwrap_or_else(|e| panic!("{e}"));
    let [pins, ..] = pin_variants();
    let m = Machine::optimising(pins, 1, Optimise::Usual);
    let (mut out, mut info) = (Vec::new(), Emitted::default());
    info.hints.hot = true;
    m.backend.emit(&block, m.blocks_at, None, &mut out, &mut info);
    let text = m.backend.disassemble(&out, m.blocks_at);
    let main = text.split_once("jmp").map_or("", |(main, _)| main);
    let count = |what: &str| main.lines().filter(|line| line.contains(what)).count();
    assert_eq!((count("lea r15,["), count("lea rax,["), count("[r14+"), count("add r14,")), (2, 0, 2, 2), "{text}");
}

#[test]
fn what_is_overwritten_before_anybody_can_see_it_is_not_stored_in_hot_code() {
    // s13 and s14 have no host register.
    let text = "block start=0x10 len=24 insns=8 {
insn +0x10 3
s13 = zextw.i64 s1
insn +0x13 4
s13 = f.ror.b4 s13, 0xb
insn +0x17 3
s3 = f.xor.b4 s3, s13
insn +0x1a 3
s13 = zextw.i64 s1
insn +0x1d 3
s13 = f.and.b4 s13, s2
insn +0x20 3
s14 = mov.i64 s13
insn +0x23 2
s3 = f.add.b4 s3, s14
deadflags cpazso
insn +0x25 2
jump +0x40
}";
    let block = text::parse(text).unwrap_or_else(|e| panic!("{e}"));
    let [pins, ..] = pin_variants();
    let m = Machine::optimising(pins, 1, Optimise::Usual);
    let stores = |hot: bool| {
        let (mut out, mut info) = (Vec::new(), Emitted::default());
        info.hints.hot = hot;
        m.backend.emit(&block, m.blocks_at, None, &mut out, &mut info);
        let text = m.backend.disassemble(&out, m.blocks_at);
        let stores = text.lines().filter(|line| line.contains("mov [rbp") && line.contains(",rax")).count();
        (stores, text)
    };
    let (hot, text) = stores(true);
    // The last of each.
    assert_eq!((hot, stores(false).0), (2, 5), "{text}");
}

#[test]
fn dump() {
    for (name, text) in [
        (
            "loop",
            "block start=0x10 len=16 insns=5 {
insn +0x10 4
t0 = lea.b8 s7, s1, 3, 0x0
t1 = load.b8.zero [t0]
s2 = f.add.b8 s2, t1
insn +0x14 3
s1 = f.inc.b8 s1
insn +0x17 3
f.sub.b8 s1, s6
insn +0x1a 2
brf.ne -> +0x10 dead cpazso
insn +0x1c 4
s0 = f.xor.b4 s0, s0
deadflags cpazso
jump +0x20
}",
        ),
        (
            "prologue",
            "block start=0x10 len=16 insns=6 {
insn +0x10 1
store.b8 [s4 - 0x8], s5
s4 = lea.b8 s4, 0x0, 0, -0x8
insn +0x11 3
s5 = mov.i64 s4
insn +0x14 1
store.b8 [s4 - 0x8], s3
s4 = lea.b8 s4, 0x0, 0, -0x8
insn +0x15 4
s4 = f.sub.b8 s4, 0x18
insn +0x19 3
s3 = load.b8.zero [s7 + 0x8]
insn +0x1c 4
f.and.b4 s6, s6
brf.e -> +0x40 dead cpazso
store.b4 [s4 + 0x8], s0
jump +0x20
}",
        ),
        (
            "memory",
            "block start=0x10 len=16 insns=6 {
insn +0x10 1
rmw.add.b4 [s7 + 0x8], s0
insn +0x11 3
t0 = load.b1.zero [s6]
f.sub.b1 t0, 0x0
insn +0x14 1
brf.e -> +0x40 dead cpazso
insn +0x15 4
t0 = load.b8.zero [s3 + 0x10]
s0 = f.and.b8 s0, t0
insn +0x19 3
rmw.sub.b4.lock [s2], 0x1
insn +0x1c 4
brf.s -> +0x44 dead cpazso
t0 = load.b8.zero [s4]
s4 = lea.b8 s4, 0x0, 0, 0x8
jumpreg t0 ret
}",
        ),
    ] {
        println!("-- {name}");
        for line in code_of(text) {
            println!("  {line}");
        }
    }
}
