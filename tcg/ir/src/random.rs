//! Random valid blocks and states, for comparing a backend with the interpreter.
//!
//! Everything follows from the [`Rng`]'s seed, so a failure is reported as a seed. Blocks are made to be
//! interesting rather than uniform: operands are often edge values, destinations often alias sources, most
//! accesses hit the mapped window, some miss it, some cross pages, some atomics are misaligned.

mod flagged;

use crate::filetest::{FpFn, GUEST_SLOTS, PAGE, TestHost};
use crate::flags::Flags;
use crate::op::*;
use crate::verify::{alu_type_allowed, un_type_allowed};

/// A small generator of pseudo-random numbers (SplitMix64).
#[derive(Clone, Debug)]
pub struct Rng(u64);

impl Rng {
    /// A generator whose numbers follow from `seed`.
    pub const fn new(seed: u64) -> Rng {
        Rng(seed)
    }

    /// The next 64 bits.
    pub fn u64(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ self.0 >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ z >> 31
    }

    /// A number below `n`; 0 if `n` is 0.
    pub fn below(&mut self, n: u64) -> u64 {
        ((u128::from(self.u64()) * u128::from(n)) >> 64) as u64
    }

    /// True `percent` times out of 100.
    pub fn chance(&mut self, percent: u64) -> bool {
        self.below(100) < percent
    }

    /// One of `items`, which must not be empty.
    pub fn pick<T: Copy>(&mut self, items: &[T]) -> T {
        items[self.below(items.len() as u64) as usize]
    }

    /// A 64-bit value as tests of arithmetic like it: often near a power of two or the ends of a range.
    pub fn edge(&mut self) -> u64 {
        match self.below(8) {
            0 => self.below(9).wrapping_sub(4),
            1 => self.pick(&EDGES),
            2 => self.pick(&EDGES).wrapping_add(self.below(5)).wrapping_sub(2),
            3 => (1u64 << self.below(64)).wrapping_sub(self.below(2)),
            4 => !(1u64 << self.below(64)),
            5 => self.u64() as i32 as u64,
            6 => self.u64() >> self.below(64),
            _ => self.u64(),
        }
    }

    /// A floating-point register value: a double or a NaN-boxed single, often an edge, now and then neither.
    pub fn fp_edge(&mut self) -> u64 {
        let value = match self.below(4) {
            0 => self.pick(&F64_EDGES),
            1 => (self.below(2001) as f64 - 1000.0).to_bits(),
            2 => u64::from(self.pick(&F32_EDGES)) | 0xffff_ffff_0000_0000,
            _ => return self.edge(),
        };
        if self.chance(10) { value ^ 1 << self.below(64) } else { value }
    }
}

const EDGES: [u64; 12] = [
    0,
    1,
    0x7f,
    0x80,
    0x7fff,
    0x8000,
    0x7fff_ffff,
    0x8000_0000,
    0xffff_ffff,
    0x7fff_ffff_ffff_ffff,
    0x8000_0000_0000_0000,
    0xffff_ffff_ffff_ffff,
];

/// Zeros, ones, subnormals, largest, infinities, quiet and signalling NaNs, limits of the integer types.
const F64_EDGES: [u64; 18] = [
    0,
    1 << 63,
    0x3ff0_0000_0000_0000,
    0xbff0_0000_0000_0000,
    0x3fe0_0000_0000_0000,
    1,
    0x000f_ffff_ffff_ffff,
    0x0010_0000_0000_0000,
    0x7fef_ffff_ffff_ffff,
    0x7ff0_0000_0000_0000,
    0xfff0_0000_0000_0000,
    0x7ff8_0000_0000_0000,
    0xfff8_0000_0000_0001,
    0x7ff0_0000_0000_0001,
    0x41df_ffff_ffc0_0000,
    0x41e0_0000_0000_0000,
    0xc3e0_0000_0000_0000,
    0x43f0_0000_0000_0000,
];

const F32_EDGES: [u32; 14] = [
    0,
    1 << 31,
    0x3f80_0000,
    0xbf80_0000,
    0x3f00_0000,
    1,
    0x007f_ffff,
    0x0080_0000,
    0x7f7f_ffff,
    0x7f80_0000,
    0xff80_0000,
    0x7fc0_0000,
    0x7f80_0001,
    0x4f00_0000,
];

/// What random blocks are made of.
#[derive(Clone, Debug)]
pub struct RandomConfig {
    /// Most guest instructions of a block; at least 1 is made.
    pub max_insns: u16,
    /// Virtual address of the page the block begins in, for states.
    pub page_base: u64,
    /// Virtual address of the mapped window, a multiple of a page.
    pub window: u64,
    /// Pages of the window; a power of two. The pages before and after it are taken to fault.
    pub window_pages: u64,
    /// Guest slots for integers: s0 up to this, at most 32. s32 and up hold floating-point values.
    pub int_slots: u8,
    /// Load-reserved, store-conditional and atomics.
    pub atomics: bool,
    /// Atomics of 1 and 2 bytes too.
    pub small_atomics: bool,
    /// Floating-point operations.
    pub fp: bool,
    /// Calls of the test helpers ([`crate::filetest::helper`]).
    pub calls: bool,
    /// Operations on flags and parts of slots. There must be fewer than 22 integer slots then.
    pub flags: bool,
    /// Reads and writes of bytes 0 to 7 of the hot state.
    pub env: bool,
    /// Of 100 accesses, how many use an arbitrary address.
    pub wild_percent: u64,
}

impl Default for RandomConfig {
    fn default() -> Self {
        RandomConfig {
            max_insns: 8,
            page_base: 0x8000_0000,
            window: 0x10_0000,
            window_pages: 4,
            int_slots: 32,
            atomics: true,
            small_atomics: false,
            fp: false,
            calls: true,
            flags: false,
            env: true,
            wild_percent: 4,
        }
    }
}

/// Bytes of the hot state that random blocks use.
const ENV_BYTES: u64 = 8;

/// A random state to run a block in, with the window mapped.
pub fn random_host(rng: &mut Rng, config: &RandomConfig, fp: FpFn) -> TestHost {
    let mut host = TestHost::new(config.page_base, fp);
    for (i, slot) in host.slots[..GUEST_SLOTS].iter_mut().enumerate() {
        *slot = if i < 32 { rng.edge() } else { rng.fp_edge() };
    }
    host.memory.map(config.window, config.window_pages * PAGE);
    for i in 0..config.window_pages {
        let page = host.memory.page_mut(config.window.wrapping_add(i * PAGE));
        for word in page.into_iter().flat_map(|page| page.chunks_exact_mut(8)) {
            let value = if rng.chance(20) { rng.fp_edge() } else { rng.edge() };
            word.copy_from_slice(&value.to_le_bytes());
        }
    }
    if config.env && rng.chance(30) {
        let off = rng.below(ENV_BYTES) as i32;
        host.env.insert(off, 1 << rng.below(8));
    }
    host
}

/// A random block that verifies.
pub fn random_block(rng: &mut Rng, config: &RandomConfig) -> Block {
    let insns = layout(rng, config);
    let (Some(&(start, _)), Some(&(last, last_len))) = (insns.first(), insns.last()) else {
        return Block::default();
    };
    let mut g = Generator {
        reserved: config.window.wrapping_add(rng.below(config.window_pages * PAGE) & !7),
        reserve_size: rng.pick(&[Size::B4, Size::B8]),
        rng,
        config,
        ops: Vec::new(),
        temps: Vec::new(),
        next_temp: 0,
        targets: insns.iter().map(|(pc, _)| PagePc(i32::from(*pc))).collect(),
    };
    for (pc, len) in &insns {
        g.insn(*pc, *len);
    }
    let end = PagePc(i32::from(last) + i32::from(last_len));
    g.terminal(end);
    let narrow = config.flags && g.rng.chance(40);
    Block { ops: g.ops, start, len: last + u16::from(last_len) - start, insns: insns.len() as u16, narrow, granules: 0 }
}

/// Addresses and lengths of the instructions. Often near the end of the page, where the last one crosses.
fn layout(rng: &mut Rng, config: &RandomConfig) -> Vec<(u16, u8)> {
    let count = 1 + rng.below(config.max_insns.max(1).into());
    let first = if rng.chance(15) { 4096 - 4 * count.min(1000) } else { 0 };
    let mut pc = (first + rng.below(4096 - first)) as u16 & !1;
    let mut insns = Vec::new();
    while pc < 4096 && (insns.len() as u64) < count {
        let len = if rng.chance(30) { 2 } else { 4 };
        insns.push((pc, len));
        pc += u16::from(len);
    }
    insns
}

/// A block being made.
struct Generator<'a> {
    rng: &'a mut Rng,
    config: &'a RandomConfig,
    ops: Vec<Op>,
    /// Temporaries that this instruction has written.
    temps: Vec<Slot>,
    next_temp: u8,
    /// Starts of the block's instructions.
    targets: Vec<PagePc>,
    /// Where most load-reserved and store-conditional go, so that they meet.
    reserved: u64,
    reserve_size: Size,
}

const ALU: [AluOp; 34] = {
    use AluOp::*;
    [
        Add, Sub, And, Or, Xor, Andn, Orn, Xnor, Shl, Shr, Sar, Rol, Ror, Mul, MulHiS, MulHiU, MulHiSU, DivS, DivU,
        RemS, RemU, MinS, MinU, MaxS, MaxU, SetLtS, SetLtU, Sh1Add, Sh2Add, Sh3Add, BSet, BClr, BInv, BExt,
    ]
};
const UN: [UnOp; 12] = {
    use UnOp::*;
    [Mov, SextB, SextH, SextW, ZextB, ZextH, ZextW, Clz, Ctz, Popcnt, Bswap, OrcB]
};
const FP: [FpOp; 29] = {
    use FpOp::*;
    [
        Add, Sub, Mul, Div, Sqrt, MAdd, MSub, NMSub, NMAdd, Min, Max, Eq, Lt, Le, Class, Sgnj, Sgnjn, Sgnjx, ToI32,
        ToU32, ToI64, ToU64, FromI32, FromU32, FromI64, FromU64, CvtFmt, MvToInt, MvFromInt,
    ]
};
const AMO: [AmoOp; 9] = {
    use AmoOp::*;
    [Swap, Add, Xor, And, Or, MinS, MaxS, MinU, MaxU]
};
const COND: [Cond; 6] = [Cond::Eq, Cond::Ne, Cond::LtS, Cond::GeS, Cond::LtU, Cond::GeU];
const TYPES: [Ty; 4] = [Ty::I64, Ty::I64, Ty::I32, Ty::U32];
const SIZES: [Size; 4] = [Size::B1, Size::B2, Size::B4, Size::B8];
const ROUNDING: [Rm; 8] =
    [Rm::Dynamic, Rm::Dynamic, Rm::Dynamic, Rm::NearestEven, Rm::ToZero, Rm::Down, Rm::Up, Rm::NearestMaxMag];

impl Generator<'_> {
    fn insn(&mut self, pc: u16, len: u8) {
        self.temps.clear();
        self.ops.push(Op::Insn { pc: PagePc(pc.into()), len });
        if self.config.env && self.rng.chance(4) {
            let (off, mask) = (self.rng.below(ENV_BYTES) as i32, 1 + self.rng.below(255) as u8);
            self.ops.push(Op::GuardEnv { off, mask });
        }
        if self.rng.chance(3) {
            let cond = self.rng.pick(&COND);
            let (a, b) = (self.val(), self.val());
            let bits = self.rng.pick(&[32, 48, 57]);
            self.ops.push(if self.rng.chance(50) { Op::Guard { cond, a, b } } else { Op::GuardFits { a, bits } });
        }
        if self.config.flags && self.rng.chance(5) {
            self.divide();
        }
        for _ in 0..self.rng.pick(&[0, 1, 1, 1, 1, 2, 3]) {
            self.op();
        }
    }

    fn op(&mut self) {
        if self.config.flags && self.rng.chance(60) {
            return self.flagged();
        }
        match self.rng.below(100) {
            0..36 => self.alu(),
            36..46 => self.un(),
            46..49 => {
                let d = self.dest();
                let pc = self.far_pc();
                self.ops.push(Op::GetPc { d, pc });
            }
            49..64 => self.load(),
            64..76 => self.store(),
            76..85 if self.config.atomics => self.atomic(),
            85..87 => self.ops.push(Op::Fence),
            87..90 if self.config.env => {
                let (off, val) = (self.rng.below(ENV_BYTES) as i32, self.rng.u64() as u8);
                self.ops.push(Op::SetEnvByte { off, val });
            }
            90..93 if self.config.calls => self.call(),
            93..98 => {
                let (cond, a, b, to) = (self.rng.pick(&COND), self.val(), self.val(), self.near_pc());
                self.ops.push(Op::Branch { cond, a, b, to });
            }
            _ if self.config.fp => self.fp(),
            _ => self.alu(),
        }
        if self.config.fp && self.rng.chance(20) {
            self.fp();
        }
    }

    fn alu(&mut self) {
        let (op, ty) = (self.rng.pick(&ALU), self.rng.pick(&TYPES));
        let ty = if alu_type_allowed(op, ty) { ty } else { Ty::I64 };
        let (a, b) = (self.val(), self.val());
        let d = self.dest_near(&[a, b]);
        self.ops.push(Op::Alu { op, ty, d, a, b });
    }

    fn un(&mut self) {
        let (op, ty) = (self.rng.pick(&UN), self.rng.pick(&TYPES));
        let ty = if un_type_allowed(op, ty) { ty } else { Ty::I64 };
        let a = self.val();
        let d = self.dest_near(&[a]);
        self.ops.push(Op::Un { op, ty, d, a });
    }

    fn load(&mut self) {
        let (size, mut ext) = (self.rng.pick(&SIZES), self.rng.pick(&[Ext::Zero, Ext::Sign]));
        if size == Size::B4 && self.rng.chance(20) {
            ext = Ext::Ones;
        }
        let (base, off) = self.address(size);
        let d = if ext == Ext::Ones { self.fp_slot() } else { self.dest_near(&[base]) };
        self.ops.push(Op::Load { d, base, off, size, ext });
    }

    fn store(&mut self) {
        let size = self.rng.pick(&SIZES);
        let (base, off) = self.address(size);
        let src = if self.rng.chance(15) { self.fp_slot().into() } else { self.val() };
        self.ops.push(Op::Store { src, base, off, size });
    }

    fn atomic(&mut self) {
        if self.rng.chance(50) {
            let sizes: &[Size] = if self.config.small_atomics { &SIZES } else { &SIZES[2..] };
            let (op, size) = (self.rng.pick(&AMO), self.rng.pick(sizes));
            let base = self.atomic_address(size);
            let src = self.val();
            let d = if self.rng.chance(20) { None } else { Some(self.dest_near(&[base, src])) };
            self.ops.push(Op::Amo { op, d, src, base, size });
            return;
        }
        let size = self.reserve_size;
        let meet = self.rng.chance(75);
        let base = if meet { Val::Imm(self.reserved as i64) } else { self.atomic_address(size) };
        if self.rng.chance(55) {
            let (d, ext) = (self.dest_near(&[base]), self.rng.pick(&[Ext::Sign, Ext::Sign, Ext::Zero]));
            self.ops.push(Op::LoadReserved { d, base, size, ext });
        } else {
            let src = self.val();
            let d = self.dest_near(&[base, src]);
            self.ops.push(Op::StoreConditional { d, src, base, size });
        }
    }

    fn call(&mut self) {
        let args = [self.val(), self.val(), self.val()];
        let ret = if self.rng.chance(30) { None } else { Some(self.dest()) };
        let (helper, kind) = self.rng.pick(&[
            (0, CallKind::Pure),
            (0, CallKind::MayExit),
            (1, CallKind::MayExit),
            (2, CallKind::MayExit),
        ]);
        self.ops.push(Op::Call { helper, kind, ret, args });
    }

    fn fp(&mut self) {
        let (op, rm) = (self.rng.pick(&FP), self.rng.pick(&ROUNDING));
        let fmt = self.rng.pick(&[FpFmt::F32, FpFmt::F64]);
        let from_int = matches!(op, FpOp::FromI32 | FpOp::FromU32 | FpOp::FromI64 | FpOp::FromU64 | FpOp::MvFromInt);
        let a = if from_int { self.int_slot() } else { self.fp_slot() };
        let (b, c) = (self.fp_slot(), self.fp_slot());
        let to_int = matches!(
            op,
            FpOp::Eq
                | FpOp::Lt
                | FpOp::Le
                | FpOp::Class
                | FpOp::ToI32
                | FpOp::ToU32
                | FpOp::ToI64
                | FpOp::ToU64
                | FpOp::MvToInt
        );
        let d = match () {
            () if to_int => self.dest(),
            () if !from_int && self.rng.chance(25) => self.rng.pick(&[a, b, c]),
            () => self.fp_slot(),
        };
        self.ops.push(Op::Fp { op, fmt, rm, d, a, b, c });
    }

    fn terminal(&mut self, end: PagePc) {
        if self.rng.chance(35) {
            let (cond, a, b, to) = (self.rng.pick(&COND), self.val(), self.val(), self.near_pc());
            self.ops.push(Op::Branch { cond, a, b, to });
        }
        let dispatch = self.config.calls && self.rng.chance(8);
        let op = match self.rng.below(10) {
            _ if dispatch => {
                let args = [self.val(), self.val(), self.val()];
                self.ops.push(Op::Call { helper: 3, kind: CallKind::MayExit, ret: None, args });
                Op::Dispatch
            }
            0..4 => Op::Jump { to: end },
            4..7 => Op::Jump { to: self.near_pc() },
            _ => {
                let base = self.int_slot();
                let link = if self.rng.chance(50) {
                    let d = if self.rng.chance(30) { base } else { self.int_slot() };
                    Some((d, end))
                } else {
                    None
                };
                let hint = self.rng.pick(&[JumpHint::None, JumpHint::Call, JumpHint::Return]);
                let off = if self.rng.chance(50) { 0 } else { self.rng.below(4096) as i32 - 2048 };
                Op::JumpReg { base, off, link, hint }
            }
        };
        if self.config.flags && self.rng.chance(30) {
            self.ops.push(Op::DeadFlags { mask: Flags::ALL });
        }
        self.ops.push(op);
    }

    /// An address and offset for an access of `size`: mostly in the window.
    fn address(&mut self, size: Size) -> (Val, i32) {
        if self.rng.chance(self.config.wild_percent) {
            return (self.val(), self.rng.edge() as i32);
        }
        let off = match self.rng.below(4) {
            0 | 1 => 0,
            2 => self.rng.below(64) as i32 - 32,
            _ => self.rng.below(4096) as i32 - 2048,
        };
        if self.rng.chance(10) {
            let va = self.config.window.wrapping_add(self.rng.below(self.config.window_pages * PAGE));
            return (Val::Imm(va.wrapping_sub(off as i64 as u64) as i64), off);
        }
        let align = if self.rng.chance(60) { u64::from(size.bytes()) } else { 1 };
        (self.window_slot(align), if self.rng.chance(80) { off.clamp(-32, 32) & -(align as i32) } else { off })
    }

    /// An address for an atomic access: mostly aligned, in the window.
    fn atomic_address(&mut self, size: Size) -> Val {
        let align = if self.rng.chance(90) { u64::from(size.bytes()) } else { 1 };
        self.window_slot(align)
    }

    /// A temporary that holds an aligned address of the window, made from a guest slot.
    fn window_slot(&mut self, align: u64) -> Val {
        let mask = (self.config.window_pages * PAGE - 1) & !(align - 1);
        let source = self.int_slot();
        let d = self.new_temp();
        let mut alu = |op, a: Val, b: u64| {
            self.ops.push(Op::Alu { op, ty: Ty::I64, d, a, b: Val::Imm(b as i64) });
        };
        alu(AluOp::And, source.into(), mask);
        if self.rng.chance(12) {
            // The end of a page: an access that is not aligned crosses.
            alu(AluOp::Or, d.into(), 0xff8 & mask);
        }
        alu(AluOp::Add, d.into(), self.config.window);
        d.into()
    }

    fn int_slot(&mut self) -> Slot {
        let count = self.config.int_slots.clamp(1, 32);
        Slot(self.rng.below(count.into()) as u8)
    }

    fn fp_slot(&mut self) -> Slot {
        Slot(32 + self.rng.below(32) as u8)
    }

    fn new_temp(&mut self) -> Slot {
        let temp = Slot::temp(self.next_temp);
        self.next_temp = (self.next_temp + 1) % (SLOTS as u8 - FIRST_TEMP);
        if !self.temps.contains(&temp) {
            self.temps.push(temp);
        }
        temp
    }

    fn val(&mut self) -> Val {
        if !self.temps.is_empty() && self.rng.chance(20) {
            return Val::Slot(self.rng.pick(&self.temps));
        }
        match self.rng.below(10) {
            0 => Val::Imm(self.rng.edge() as i64),
            1 => Val::Imm(self.rng.below(4096) as i64 - 2048),
            _ => Val::Slot(self.int_slot()),
        }
    }

    fn dest(&mut self) -> Slot {
        if self.rng.chance(15) { self.new_temp() } else { self.int_slot() }
    }

    /// A destination that is often one of the sources.
    fn dest_near(&mut self, sources: &[Val]) -> Slot {
        match self.rng.pick(sources) {
            Val::Slot(slot) if self.rng.chance(35) => slot,
            _ => self.dest(),
        }
    }

    /// A target of a direct jump: an instruction of the block, or anything near.
    fn near_pc(&mut self) -> PagePc {
        match self.rng.below(4) {
            0 => self.rng.pick(&self.targets),
            1 => self.targets.first().copied().unwrap_or(PagePc(0)),
            2 => PagePc(self.rng.below(4096) as i32 & !1),
            _ => PagePc((self.rng.below(1 << 21) as i32 - (1 << 20)) & !1),
        }
    }

    /// An address as an `auipc` makes it.
    fn far_pc(&mut self) -> PagePc {
        if self.rng.chance(50) { self.near_pc() } else { PagePc(self.rng.u64() as i32) }
    }
}
