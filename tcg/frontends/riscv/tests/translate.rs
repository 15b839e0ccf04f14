//! What blocks look like, and what they do on the IR's interpreter.

use mimus_arch::riscv::Features;
use mimus_tcg_frontend_riscv::helper_ids as ids;
use mimus_tcg_frontend_riscv::translate::{NeedNextPage, TranslateConfig, translate_block};
use mimus_tcg_ir::interp::{self, CallOutcome, Fault, InterpHost, Outcome};
use mimus_tcg_ir::verify::verify;
use mimus_tcg_ir::*;

const BASE: u64 = 0xffff_ffc0_1234_5000;

fn config() -> TranslateConfig {
    let isa = "rv64imafdc_zicsr_zifencei_zihintpause_zicbom_zicboz_zba_zbb_zbs_svinval_zicond_zcb";
    TranslateConfig::new(Features::parse_isa_string(isa).unwrap())
}

/// Halfwords at `start`, with zeros (illegal) after them; nothing in the next page.
fn halfwords(insns: &[u32]) -> Vec<u16> {
    let mut out = Vec::new();
    for &insn in insns {
        out.push(insn as u16);
        if insn & 3 == 3 {
            out.push((insn >> 16) as u16);
        }
    }
    out
}

fn block_at(start: u16, insns: &[u32], cfg: &TranslateConfig) -> Result<Block, NeedNextPage> {
    let code = halfwords(insns);
    let window = |at: u32| {
        let index = (at as usize).checked_sub(usize::from(start))? / 2;
        if at < 4096 { Some(code.get(index).copied().unwrap_or(0)) } else { None }
    };
    let mut block = Block::default();
    translate_block(&mut block, &window, start, cfg)?;
    verify(&block).unwrap_or_else(|error| panic!("{error}: {:?}", block.ops));
    Ok(block)
}

fn block(insns: &[u32]) -> Block {
    block_at(0x100, insns, &config()).unwrap()
}

/// R-type.
fn r_type(opcode: u32, f7: u32, f3: u32, rd: u32, rs1: u32, rs2: u32) -> u32 {
    f7 << 25 | rs2 << 20 | rs1 << 15 | f3 << 12 | rd << 7 | opcode
}

/// Sequences of shifts, additions and the like, as one block and an instruction at a time.
#[test]
fn folded_sequences_compute_the_same() {
    let mut state = 0x1234_5678_9abc_def1u64;
    let mut next = move |n: u64| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 20) % n
    };
    for _ in 0..20_000 {
        let mut insns = Vec::new();
        for _ in 0..2 + next(9) {
            let mut reg = || 10 + next(4) as u32;
            let (rd, rs1, rs2) = (reg(), reg(), reg());
            let rd = if next(3) == 0 { rs1 } else { rd };
            let amount = [1, 2, 3, 7, 25, 31, 12, 20][next(8) as usize];
            let wide = [1, 2, 3, 32, 32, 28, 40, 24][next(8) as usize];
            insns.push(match next(16) {
                0 => r_type(0x1b, 0, 1, rd, rs1, amount),
                1 => r_type(0x1b, 0, 5, rd, rs1, amount),
                2 => r_type(0x1b, 0, 5, rd, rs1, 32 - amount),
                3 | 4 => r_type(0x13, 0, 1, rd, rs1, wide),
                5 | 6 => r_type(0x13, 0, 5, rd, rs1, wide),
                7 | 8 => r_type(0x33, 0, 6, rd, rs1, rs2),
                9 => r_type(0x33, 0, 0, rd, rs1, rs2),
                10 => r_type(0x1b, 0, 0, rd, rs1, 0),
                11 => r_type(0x3b, 0, 0, rd, rs1, rs2),
                12 => r_type(0x33, 0, 4, rd, rs1, rs2),
                // andi, zext.h
                13 => [255, 1, 0x7ff, 0x800, 0xfff][next(5) as usize] << 20 | rs1 << 15 | 7 << 12 | rd << 7 | 0x13,
                14 => 0x0800_403b | rs1 << 15 | rd << 7,
                _ => r_type(0x33, 0, 0, rd, rd, rs2),
            });
            // Both halves of a rotation.
            if next(3) == 0 {
                let (x, y, z) = (10 + next(4) as u32, 10 + next(4) as u32, 10 + next(4) as u32);
                let (opcode, bits) = if next(2) == 0 { (0x1b, 32) } else { (0x13, 64) };
                let (left, right) = (r_type(opcode, 0, 1, y, x, amount), r_type(opcode, 0, 5, z, x, bits - amount));
                insns.extend(if next(2) == 0 { [left, right] } else { [right, left] });
                insns.push(r_type(0x33, 0, 6, 10 + next(4) as u32, y, z));
            }
        }
        let mut folded = Machine::new();
        for n in 10..14 {
            let wide = next(u64::MAX);
            folded.slots[n] = [wide, wide as i32 as u64, wide & 0xff, 1 << 31][next(4) as usize];
        }
        let mut single = Machine::new();
        single.slots.clone_from(&folded.slots);
        interp::run(&block(&insns), &mut folded);
        for &insn in &insns {
            let mut one = config();
            one.max_insns = 1;
            interp::run(&block_at(0x100, &[insn], &one).unwrap(), &mut single);
        }
        assert_eq!(folded.slots[..32], single.slots[..32], "{insns:x?}\n{:?}", block(&insns).ops);
    }
}

/// A hart as the interpreter sees it.
#[derive(Default)]
struct Machine {
    slots: Vec<u64>,
    memory: std::collections::BTreeMap<u64, u8>,
    hot: [u8; 3],
    calls: Vec<(u16, [u64; 3])>,
    result: u64,
    reserved: Option<u64>,
}

impl Machine {
    fn new() -> Machine {
        Machine { slots: vec![0; SLOTS], ..Machine::default() }
    }

    fn x(mut self, reg: usize, value: u64) -> Machine {
        self.slots[reg] = value;
        self
    }

    fn run(&mut self, insns: &[u32]) -> Outcome {
        let outcome = interp::run(&block(insns), self);
        assert_eq!(self.slots[0], 0, "x0 was written");
        outcome
    }
}

impl InterpHost for Machine {
    fn slot(&self, slot: Slot) -> u64 {
        assert_ne!(slot, Slot(0), "x0 is read as a slot");
        self.slots[usize::from(slot.0)]
    }
    fn set_slot(&mut self, slot: Slot, value: u64) {
        self.slots[usize::from(slot.0)] = value;
    }
    fn page_base(&self) -> u64 {
        BASE
    }
    fn begin_insn(&mut self, _pc: PagePc, _len: u8) {}
    fn load(&mut self, va: u64, size: Size, ext: Ext) -> Result<u64, Fault> {
        let mut raw = 0;
        for i in 0..u64::from(size.bytes()) {
            raw |= u64::from(*self.memory.get(&va.wrapping_add(i)).ok_or(Fault)?) << (8 * i);
        }
        Ok(interp::extend(raw, size, ext))
    }
    fn store(&mut self, va: u64, val: u64, size: Size) -> Result<(), Fault> {
        for i in 0..u64::from(size.bytes()) {
            self.memory.insert(va.wrapping_add(i), (val >> (8 * i)) as u8);
        }
        Ok(())
    }
    fn load_reserved(&mut self, va: u64, size: Size, ext: Ext) -> Result<u64, Fault> {
        self.reserved = Some(va);
        self.load(va, size, ext)
    }
    fn store_conditional(&mut self, va: u64, val: u64, size: Size) -> Result<u64, Fault> {
        if self.reserved.take() != Some(va) {
            return Ok(1);
        }
        self.store(va, val, size).map(|()| 0)
    }
    fn amo(&mut self, op: AmoOp, va: u64, val: u64, size: Size) -> Result<u64, Fault> {
        let old = self.load(va, size, Ext::Sign)?;
        self.store(va, interp::amo(op, size, old, val), size)?;
        Ok(old)
    }
    fn rmw(&mut self, va: u64, size: Size, _lock: bool, new: &mut dyn FnMut(u64) -> u64) -> Result<u64, Fault> {
        let old = self.load(va, size, Ext::Zero)?;
        self.store(va, new(old), size)?;
        Ok(old)
    }
    fn fence(&mut self) {}
    fn fp(&mut self, op: FpOp, fmt: FpFmt, _rm: Rm, a: u64, b: u64, _c: u64) -> u64 {
        match (op, fmt) {
            (FpOp::Add, FpFmt::F64) => (f64::from_bits(a) + f64::from_bits(b)).to_bits(),
            (FpOp::FromI64, FpFmt::F64) => (a as i64 as f64).to_bits(),
            (FpOp::MvFromInt, FpFmt::F64) => a,
            (FpOp::MvFromInt, FpFmt::F32) => a | !0xffff_ffff,
            _ => 0,
        }
    }
    /// Nothing here has the units: careful mode is to do it.
    fn unit(
        &mut self,
        _: &mimus_tcg_ir::unit::UnitInsn,
        _: Option<Slot>,
        _: mimus_tcg_ir::Val,
        _: u64,
    ) -> Result<bool, Fault> {
        Ok(false)
    }
    fn env_byte(&self, off: i32) -> u8 {
        self.hot[off as usize]
    }
    fn set_env_byte(&mut self, off: i32, val: u8) {
        self.hot[off as usize] = val;
    }
    fn call(&mut self, helper: u16, args: [u64; 3]) -> (u64, CallOutcome) {
        self.calls.push((helper, args));
        (self.result, CallOutcome::Continue)
    }
}

/// Ends a test's block: `ecall`.
const END: u32 = 0x73;

fn r(opcode: u32, funct3: u32, funct7: u32, rd: u32, rs1: u32, rs2: u32) -> u32 {
    opcode | rd << 7 | funct3 << 12 | rs1 << 15 | rs2 << 20 | funct7 << 25
}

fn i(opcode: u32, funct3: u32, rd: u32, rs1: u32, imm: i32) -> u32 {
    opcode | rd << 7 | funct3 << 12 | rs1 << 15 | (imm as u32) << 20
}

/// `x10` after one instruction with these `x11` and `x12`.
fn result(insn: u32, x11: u64, x12: u64) -> u64 {
    let mut machine = Machine::new().x(11, x11).x(12, x12);
    machine.run(&[insn, END]);
    machine.slots[10]
}

#[test]
fn words_are_sign_extended() {
    let (op32, imm32) = (0x3b, 0x1b);
    let big = 0x1_8000_0000;
    assert_eq!(result(r(op32, 0, 0, 10, 11, 12), 0x7fff_ffff, 1), 0xffff_ffff_8000_0000, "addw");
    assert_eq!(result(r(op32, 0, 0x20, 10, 11, 12), 0, 1), u64::MAX, "subw");
    assert_eq!(result(i(imm32, 0, 10, 11, 0), big, 0), 0xffff_ffff_8000_0000, "sext.w");
    assert_eq!(result(i(imm32, 0, 10, 11, -1), 0, 0), u64::MAX, "addiw");
    assert_eq!(result(i(imm32, 1, 10, 11, 31), 1, 0), 0xffff_ffff_8000_0000, "slliw");
    assert_eq!(result(i(imm32, 5, 10, 11, 31), big, 0), 1, "srliw");
    assert_eq!(result(i(imm32, 5, 10, 11, 0x400 | 31), big, 0), u64::MAX, "sraiw");
    assert_eq!(result(r(op32, 1, 0, 10, 11, 12), 1, 0x3f), 0xffff_ffff_8000_0000, "sllw takes 5 bits");
    assert_eq!(result(r(op32, 5, 1, 10, 11, 12), 0xffff_fffe, 1), 0xffff_ffff_ffff_fffe, "divuw");
    assert_eq!(result(r(op32, 4, 1, 10, 11, 12), 5, 0x1_0000_0000), u64::MAX, "divw by zero");
    assert_eq!(result(r(op32, 7, 1, 10, 11, 12), 0x8000_0001, 0), 0xffff_ffff_8000_0001, "remuw by zero");
    assert_eq!(result(r(op32, 0, 1, 10, 11, 12), 0x1_0000_ffff, 0x1_0001), 0xffff_ffff_ffff_ffff, "mulw");
}

#[test]
fn x0_operands_fold() {
    let op = 0x33;
    assert_eq!(result(r(op, 0, 0, 10, 0, 12), 1, 7), 7, "add of x0 moves");
    assert_eq!(result(r(op, 0, 0x20, 10, 0, 12), 1, 7), 7u64.wrapping_neg(), "neg");
    assert_eq!(result(r(op, 3, 0, 10, 0, 12), 1, 7), 1, "snez");
    assert_eq!(result(i(0x13, 3, 10, 11, 1), 0, 0), 1, "seqz");
    assert_eq!(result(i(0x13, 3, 10, 11, -1), 5, 0), 1, "sltiu compares with a sign-extended immediate");
    assert_eq!(result(r(op, 4, 1, 10, 0, 0), 3, 3), u64::MAX, "div of x0 by x0");
    assert_eq!(result(r(op, 6, 1, 10, 11, 0), 3, 3), 3, "rem by x0");
    assert_eq!(result(r(0x3b, 0, 0, 10, 11, 0), 0x8000_0000, 0), 0xffff_ffff_8000_0000, "addw of x0");
    assert_eq!(result(r(0x3b, 0, 0x20, 10, 0, 12), 0, 1), u64::MAX, "negw");
    assert_eq!(result(r(op, 1, 0, 10, 0, 12), 1, 7), 0, "sll of x0");
    // Of x0 as destination nothing remains.
    assert_eq!(block(&[r(op, 0, 1, 0, 11, 12), i(0x13, 0, 0, 0, 0), END]).ops.len(), 5);
}

#[test]
fn bit_manipulation() {
    let (op, op32) = (0x33, 0x3b);
    let (a, b) = (0xffff_ffff_8000_0001, 0x10);
    assert_eq!(result(r(op32, 0, 4, 10, 11, 12), a, b), 0x8000_0011, "add.uw");
    assert_eq!(result(r(op32, 0, 4, 10, 11, 0), a, b), 0x8000_0001, "zext.w");
    assert_eq!(result(r(op32, 0, 4, 10, 0, 12), a, b), b, "add.uw of x0");
    assert_eq!(result(r(op32, 2, 0x10, 10, 11, 12), a, b), 0x1_0000_0012, "sh1add.uw");
    assert_eq!(result(r(op32, 6, 0x10, 10, 11, 0), a, b), 0x4_0000_0008, "sh3add.uw of x0");
    assert_eq!(result(r(op, 4, 0x10, 10, 11, 12), 3, b), 28, "sh2add");
    assert_eq!(result(i(0x1b, 1, 10, 11, 0x080 | 36), a, 0), 0x8000_0001 << 36, "slli.uw");
    assert_eq!(result(i(0x13, 5, 10, 11, 0x6b8), 0x0102_0304_0506_0708, 0), 0x0807_0605_0403_0201, "rev8");
    assert_eq!(result(i(0x13, 5, 10, 11, 0x287), 0x0100_0000_0000_8000, 0), 0xff00_0000_0000_ff00, "orc.b");
    assert_eq!(result(i(0x1b, 1, 10, 11, 0x600), 1 << 40, 0), 32, "clzw");
    assert_eq!(result(i(0x1b, 1, 10, 11, 0x601), 1 << 40, 0), 32, "ctzw");
    assert_eq!(result(i(0x1b, 1, 10, 11, 0x602), u64::MAX, 0), 32, "cpopw");
    assert_eq!(result(i(0x13, 1, 10, 0, 0x600), 9, 9), 64, "clz of x0");
    assert_eq!(result(r(op32, 5, 0x30, 10, 11, 12), 1, 1), 0xffff_ffff_8000_0000, "rorw");
    assert_eq!(result(i(0x1b, 5, 10, 11, 0x600 | 1), 1, 0), 0xffff_ffff_8000_0000, "roriw");
    assert_eq!(result(i(0x13, 5, 10, 11, 0x600 | 63), 1, 0), 2, "rori");
    assert_eq!(result(r(op, 7, 0x20, 10, 11, 12), 0xff, 0x0f), 0xf0, "andn");
    assert_eq!(result(r(op, 4, 5, 10, 11, 12), u64::MAX, 1), u64::MAX, "min");
    assert_eq!(result(r(op, 5, 5, 10, 11, 12), u64::MAX, 1), 1, "minu");
    assert_eq!(result(i(0x13, 1, 10, 11, 0x280 | 63), 0, 0), 1 << 63, "bseti");
    assert_eq!(result(r(op, 5, 0x24, 10, 11, 12), 0x10, 64 + 4), 1, "bext");
    assert_eq!(result(r(op32, 4, 4, 10, 11, 0), a, 0), 1, "zext.h");
}

#[test]
fn conditional_zero() {
    let (eqz, nez) = (r(0x33, 5, 7, 10, 11, 12), r(0x33, 7, 7, 10, 11, 12));
    assert_eq!((result(eqz, 9, 0), result(eqz, 9, 1 << 63)), (0, 9));
    assert_eq!((result(nez, 9, 0), result(nez, 9, 1 << 63)), (9, 0));
    let (eqz, nez) = (r(0x33, 5, 7, 10, 11, 0), r(0x33, 7, 7, 10, 11, 0));
    assert_eq!((result(eqz, 9, 5), result(nez, 9, 5)), (0, 9));
    assert_eq!(result(r(0x33, 5, 7, 12, 11, 12), 9, 5), 0, "only a0 is looked at");
}

#[test]
fn memory() {
    let mut m = Machine::new().x(11, 0x1000).x(12, 0xffff_ffff_8123_4567);
    // sd x12,-8(x11); lw x10,-8(x11); lhu x13,-6(x11); lb x0,-8(x11); flw f1,-8(x11)
    let insns = [0xfec5_bc23, 0xff85_a503, 0xffa5_d683, 0xff85_8003, 0xff85_a087, END];
    assert_eq!(m.run(&insns), Outcome::Dispatch);
    assert_eq!(m.slots[10], 0xffff_ffff_8123_4567);
    assert_eq!(m.slots[13], 0x8123);
    assert_eq!(m.slots[33], 0xffff_ffff_8123_4567, "NaN-boxed");
    assert_eq!(m.hot[1], 1, "FS is dirty");
    // A load to x0 accesses memory.
    assert_eq!(Machine::new().x(11, 0x1000).run(&[0x0005_8003, END]), Outcome::Faulted);
    // A faulting flw does not make FS dirty.
    let mut m = Machine::new();
    assert_eq!(m.run(&[0xff85_a087, END]), Outcome::Faulted);
    assert_eq!(m.hot[1], 0);
}

#[test]
fn atomics() {
    let mut m = Machine::new().x(11, 0x1000).x(12, 5);
    m.store(0x1000, 0xffff_fffe, Size::B8).unwrap();
    // lr.w x10,(x11); sc.w x13,x12,(x11); sc.w x14,x12,(x11); amoadd.d x15,x12,(x11); amoswap.w x0,x0,(x11)
    let insns = [0x1005_a52f, 0x18c5_a6af, 0x18c5_a72f, 0x00c5_b7af, 0x0805_a02f, END];
    m.run(&insns);
    assert_eq!(m.slots[10], 0xffff_ffff_ffff_fffe);
    assert_eq!((m.slots[13], m.slots[14], m.slots[15]), (0, 1, 5));
    assert_eq!(m.load(0x1000, Size::B8, Ext::Zero).unwrap(), 0);
}

#[test]
fn pc_relative_pairs() {
    // auipc ra,1; jalr ra,-4(ra)
    let b = block(&[0x0000_1097, 0xffc0_80e7]);
    let mark = |pc, len| Op::Insn { pc: PagePc(pc), len };
    let link = Op::GetPc { d: Slot(1), pc: PagePc(0x108) };
    assert_eq!(b.ops, [mark(0x100, 4), mark(0x104, 4), link, Op::Jump { to: PagePc(0x10fc) }]);
    // auipc t1,1; jr 5(t1): the register stays, bit 0 of the target goes.
    let b = block(&[0x0000_1317, 0x0053_0067]);
    assert_eq!(b.ops[1], Op::GetPc { d: Slot(6), pc: PagePc(0x1100) });
    assert_eq!(b.ops[3], Op::Jump { to: PagePc(0x1104) });
    // auipc a0,-1; addi a0,a0,8; jr a0, then with something between that writes a0.
    let mut m = Machine::new();
    assert_eq!(m.run(&[0xffff_f517, 0x0085_0513, 0x8502]), Outcome::Next(BASE - 0x1000 + 0x108));
    assert_eq!(m.slots[10], BASE - 0x1000 + 0x108);
    let mut m = Machine::new().x(11, 0x5000);
    assert_eq!(m.run(&[0xffff_f517, 0x852e, 0x8502]), Outcome::Next(0x5000));
    // The extremes of auipc stay within the offset's type.
    for (upper, expected) in [(0x7fff_f517, 0x7fff_f000i64), (0x8000_0517, -0x8000_0000)] {
        let mut m = Machine::new();
        m.run(&[upper, 0x7ff5_0513, END]);
        assert_eq!(m.slots[10], BASE.wrapping_add(expected as u64).wrapping_add(0x100 + 0x7ff));
    }
}

#[test]
fn indirect_jumps() {
    // jalr ra,4(ra): the base is read before the link is written.
    let mut m = Machine::new().x(1, 0x7001);
    assert_eq!(m.run(&[0x0040_80e7]), Outcome::Next(0x7004));
    assert_eq!(m.slots[1], BASE + 0x104);
    // jalr x0,16(x0)
    assert_eq!(Machine::new().run(&[0x0100_0067]), Outcome::Next(16));
    let hint = |insn| match block(&[insn]).ops.last() {
        Some(Op::JumpReg { hint, .. }) => *hint,
        other => panic!("{other:?}"),
    };
    assert_eq!(hint(0x8082), JumpHint::Return, "ret");
    assert_eq!(hint(0x9502), JumpHint::Call, "c.jalr a0");
    assert_eq!(hint(0x8502), JumpHint::None, "c.jr a0");
}

#[test]
fn superblocks_end_where_they_must() {
    // Six branches, then the next instruction.
    let beq = 0x00b5_0463;
    let b = block(&[beq; 20]);
    assert_eq!((b.insns, b.len), (6, 24));
    assert_eq!(b.ops.last(), Some(&Op::Jump { to: PagePc(0x118) }));
    // Many nops.
    let b = block(&[0x13; 60]);
    assert_eq!((b.insns, b.len), (48, 192));
    // More in a loop, but not without end.
    let loop_of = |n: usize| {
        let back = (-4 * n as i32) as u32;
        let bnez = (back >> 12 & 1) << 31
            | (back >> 5 & 63) << 25
            | 0x0005_1063
            | (back >> 1 & 15) << 8
            | (back >> 11 & 1) << 7;
        block(&[vec![0x0015_0513; n], vec![bnez, END]].concat())
    };
    assert_eq!((loop_of(47).insns, loop_of(60).insns, loop_of(140).insns), (48, 61, 141));
    assert_eq!(loop_of(300).insns, 48);
    // A branch on equal registers is none.
    assert_eq!(block(&[0x0000_0463, END]).ops.last(), Some(&Op::Jump { to: PagePc(0x108) }));
    assert_eq!(block(&[0x0000_1463, END]).insns, 2);
    // Backwards out of the page.
    assert_eq!(block(&[0xe01f_f06f]).ops.last(), Some(&Op::Jump { to: PagePc(-0x100) }));
    let mut cfg = config();
    cfg.max_insns = 3;
    assert_eq!(block_at(0, &[0x13; 9], &cfg).unwrap().insns, 3);
}

/// A loop past code that is seldom executed (`strlen` is one): the block goes on where the loop does.
#[test]
fn blocks_follow_branches_that_lead_back() {
    let (bnez, ret, nop) = (0x0005_1a63, 0x0000_8067, 0x13);
    let (head, tail) = (0xfff5_0513, 0x0015_8593);
    let back = 0xfe5f_f06f;
    let code = [head, bnez, ret, nop, nop, nop, tail, back];
    let b = block(&code);
    verify(&b).unwrap();
    let exit = Op::Branch { cond: Cond::Eq, a: Slot(10).into(), b: Val::Imm(0), to: PagePc(0x108) };
    assert!(b.ops.contains(&exit), "{:?}", b.ops);
    assert_eq!(b.ops.last(), Some(&Op::Jump { to: PagePc(0x100) }));
    assert_eq!((b.insns, b.len), (4, 0x20));
    let mut machine = Machine::new();
    machine.slots[10] = 3;
    for _ in 0..3 {
        interp::run(&b, &mut machine);
    }
    assert_eq!(machine.slots[10..12], [0, 2]);
    // By a branch, with the code behind it.
    let b = block(&[head, bnez, ret, nop, nop, nop, tail, 0xfe05_12e3, END]);
    assert_eq!(b.insns, 5);
    // What leads back on the other side as well is left as it is, and what leads elsewhere.
    let b = block(&[head, bnez, nop, nop, nop, nop, tail, back]);
    assert_eq!(b.insns, 8);
    let b = block(&[head, bnez, ret, nop, nop, nop, tail, ret]);
    assert_eq!(b.insns, 3);
    let b = block_at(0x100, &code, &config().careful()).unwrap();
    assert_eq!(b.insns, 1);
}

/// An interpreter's operation, which jumps to what looks for the next one: a jump through a register.
#[test]
fn blocks_follow_jumps_to_dispatchers() {
    // 100: bltu a6, a5, +0x40; ld a5, 0(a5); jr a5; 110: addi a1, a1, 1; j 100
    let dispatcher = [0x04f8_6063, 0x0007_b783, 0x0007_8067, 0x13, 0x0015_8593, 0xfedf_f06f];
    let code = halfwords(&dispatcher);
    let window = |at: u32| code.get((at as usize).checked_sub(0x100)? / 2).copied();
    let mut b = Block::default();
    translate_block(&mut b, &window, 0x110, &config()).unwrap();
    verify(&b).unwrap();
    assert_eq!((b.insns, b.len, b.granules), (5, 8, 1 << 4));
    assert!(matches!(b.ops.last(), Some(Op::JumpReg { hint: JumpHint::None, .. })), "{:?}", b.ops);
    // Not into itself.
    translate_block(&mut b, &window, 0x10c, &config()).unwrap();
    verify(&b).unwrap();
    assert_eq!(b.insns, 6);
    translate_block(&mut b, &window, 0x104, &config()).unwrap();
    assert_eq!(b.insns, 2);
    let straight = config().careful();
    translate_block(&mut b, &window, 0x114, &straight).unwrap();
    assert_eq!((b.insns, b.ops.last()), (1, Some(&Op::Jump { to: PagePc(0x100) })));
    // A return is left where it is.
    let code = halfwords(&[0x0007_b783, 0x8067, 0x0015_8593, 0xff5f_f06f]);
    let window = |at: u32| code.get((at as usize).checked_sub(0x100)? / 2).copied();
    translate_block(&mut b, &window, 0x108, &config()).unwrap();
    assert_eq!((b.insns, b.ops.last()), (2, Some(&Op::Jump { to: PagePc(0x100) })));
}

/// Words are extended where somebody looks at all of them.
#[test]
fn only_words_that_are_read_whole_are_extended() {
    let addw = |rd, rs1, rs2| r_type(0x3b, 0, 0, rd, rs1, rs2);
    let extended = |insns: &[u32]| {
        let b = block(insns);
        let words = |op: &&Op| matches!(op, Op::Alu { ty: Ty::I32, .. } | Op::Un { op: UnOp::SextW, .. });
        b.ops.iter().filter(words).count()
    };
    assert_eq!(extended(&[addw(10, 11, 12), addw(10, 10, 13), addw(10, 10, 14), END]), 1);
    // Compared, stored, loaded past, and at an exit it is the whole.
    assert_eq!(extended(&[addw(10, 11, 12), r_type(0x33, 0, 3, 13, 10, 11), addw(10, 10, 13), END]), 2);
    assert_eq!(extended(&[addw(10, 11, 12), 0x0006_2583, addw(10, 10, 13), END]), 2);
    assert_eq!(extended(&[addw(10, 11, 12), 0x00b5_0463, addw(10, 10, 13), END]), 2);
    // Through what goes bit by bit.
    assert_eq!(extended(&[addw(10, 11, 12), r_type(0x33, 0, 4, 10, 10, 11), addw(10, 10, 13), END]), 1);
    // A right shift is not.
    assert_eq!(extended(&[addw(10, 11, 12), r_type(0x13, 0, 5, 10, 10, 3), addw(10, 10, 13), END]), 2);
}

#[test]
fn page_ends() {
    let cfg = config();
    // Ends exactly at the page's end.
    let b = block_at(4088, &[0x13, 0x13], &cfg).unwrap();
    assert_eq!((b.insns, b.len, b.crosses_page()), (2, 8, false));
    assert_eq!(b.ops.last(), Some(&Op::Jump { to: PagePc(4096) }));
    // The last instruction straddles: with the next page absent, it is left out…
    let b = block_at(4090, &[0x13, 0x13], &cfg).unwrap();
    assert_eq!((b.insns, b.len), (1, 4));
    assert_eq!(b.ops.last(), Some(&Op::Jump { to: PagePc(4094) }));
    // …and as a first instruction it cannot be translated.
    assert_eq!(block_at(4094, &[0x13], &cfg), Err(NeedNextPage));
    assert!(block_at(4094, &[0x0001], &cfg).is_ok());
    // With the next page, it is alone when first.
    let mut b = Block::default();
    let nops = |at: u32| Some(if at & 2 == 2 { 0x13 } else { 0 });
    translate_block(&mut b, &nops, 4094, &cfg).unwrap();
    verify(&b).unwrap();
    assert_eq!((b.insns, b.len, b.crosses_page()), (1, 4, true));
    assert_eq!(b.ops.last(), Some(&Op::Jump { to: PagePc(4098) }));
}

fn guards(b: &Block) -> Vec<u8> {
    let mask = |op: &Op| match op {
        Op::GuardEnv { off: ids::HOT_FP_BAD, mask } => Some(*mask),
        _ => None,
    };
    b.ops.iter().filter_map(mask).collect()
}

fn dirties(b: &Block) -> usize {
    b.ops.iter().filter(|op| matches!(op, Op::SetEnvByte { off: ids::HOT_FP_DIRTY, val: 1 })).count()
}

#[test]
fn floating_point_guards() {
    // The helper of fcsr may have changed the rounding mode.
    let (fadd, fadd_rne, fsd, csrr) = (0x02c5_f553, 0x02c5_8553, 0x00a5_b027, 0x0030_2573);
    assert_eq!(guards(&block(&[fsd, fadd_rne, fadd, fadd, END])), [1, 2]);
    assert_eq!(guards(&block(&[fadd, fsd, fadd_rne, END])), [3]);
    assert_eq!(guards(&block(&[fadd, csrr, fadd, END])), [3, 3]);
    assert_eq!(dirties(&block(&[fsd, END])), 0);
    assert_eq!(dirties(&block(&[fadd, fadd, END])), 1);
    assert_eq!(dirties(&block(&[fadd, csrr, fadd, END])), 2);
    let frflags = 0x0010_2573;
    assert_eq!(guards(&block(&[frflags, fadd_rne, frflags, fadd, END])), [1, 2]);
    assert_eq!(dirties(&block(&[frflags, END])), 0);
    assert_eq!(dirties(&block(&[fadd, frflags, fadd, END])), 1);
    // fclass and fmv.x.d change nothing, feq to x0 flags.
    assert_eq!(dirties(&block(&[0xe205_9553, 0xe205_8553, END])), 0);
    assert_eq!(dirties(&block(&[0xa2c5_a053, END])), 1);
    let mut m = Machine::new();
    m.hot[0] = 2;
    assert_eq!(m.run(&[fsd, fadd, END]), Outcome::Careful(BASE + 0x104));
    // Careful: a check instead of the guard.
    let b = block_at(0x100, &[fadd, fadd], &config().careful()).unwrap();
    assert_eq!((b.insns, guards(&b).len(), dirties(&b)), (1, 0, 1));
    let mut m = Machine::new();
    assert_eq!(interp::run(&b, &mut m), Outcome::Next(BASE + 0x104));
    assert_eq!(m.calls, [(ids::FP_CHECK, [u64::from(fadd), 1, 0])]);
    // From x0: fcvt.d.l f10,x0; fmv.w.x f11,x0
    let mut m = Machine::new();
    m.slots[42] = 1;
    m.run(&[0xd220_7553, 0xf000_05d3, END]);
    assert_eq!((m.slots[42], m.slots[43]), (0, 0xffff_ffff_0000_0000));
}

#[test]
fn csr_instructions() {
    let call = |insn: u32| {
        let mut m = Machine::new().x(11, 0xb0b);
        m.result = 77;
        let b = block(&[insn, END]);
        interp::run(&b, &mut m);
        (m.calls[0], m.slots[10], b.insns)
    };
    let csr = |n: u64, op: u64, x0: bool| n | op << 12 | u64::from(x0) << 16;
    // csrr a0,mstatus: goes on; csrw satp,a1: ends.
    assert_eq!(call(0x3000_2573), ((ids::CSR, [csr(0x300, 0, false), 0, 0x3000_2573]), 77, 2));
    assert_eq!(call(0x1805_9073), ((ids::CSR, [csr(0x180, 1, true), 0xb0b, 0x1805_9073]), 0, 1));
    // csrrs a0,sstatus,a1: ends; csrrc a0,sscratch,a1 and csrrwi a0,frm,5: go on.
    assert_eq!(call(0x1005_a573), ((ids::CSR, [csr(0x100, 2, false), 0xb0b, 0x1005_a573]), 77, 1));
    assert_eq!(call(0x1405_b573), ((ids::CSR, [csr(0x140, 3, false), 0xb0b, 0x1405_b573]), 77, 2));
    assert_eq!(call(0x0022_d573), ((ids::CSR, [csr(0x002, 1, false), 5, 0x0022_d573]), 77, 2));
    // csrwi satp,0 writes, csrsi satp,0 reads.
    assert_eq!(call(0x1800_5073).0.1[0], csr(0x180, 1, true));
    assert_eq!(call(0x1800_6073).0.1[0], csr(0x180, 0, true));
}

#[test]
fn system_instructions() {
    let calls = |insn: u32| {
        let mut m = Machine::new().x(10, 0xabc).x(11, 7);
        let b = block(&[insn, 0x13, END]);
        let outcome = interp::run(&b, &mut m);
        (m.calls[0], outcome, b.insns)
    };
    let next = Outcome::Next(BASE + 0x104);
    for (insn, helper) in
        [(0x73, ids::ECALL), (0x10_0073, ids::EBREAK), (0x3020_0073, ids::MRET), (0x1020_0073, ids::SRET)]
    {
        assert_eq!(calls(insn), ((helper, [insn.into(), 0, 0]), Outcome::Dispatch, 1));
    }
    assert_eq!(calls(0x9002), ((ids::EBREAK, [0x9002, 0, 0]), Outcome::Dispatch, 1), "c.ebreak");
    assert_eq!(calls(0x1050_0073), ((ids::WFI, [0x1050_0073, 0, 0]), Outcome::Dispatch, 1));
    assert_eq!(calls(0x0000), ((ids::ILLEGAL, [0, 0, 0]), Outcome::Dispatch, 1));
    assert_eq!(calls(0xffff_ffff), ((ids::ILLEGAL, [0xffff_ffff, 0, 0]), Outcome::Dispatch, 1));
    assert_eq!(calls(0x0000_100f), ((ids::FENCE_I, [0x100f, 0, 0]), next, 1));
    // sfence.vma a0,a1; sfence.vma; sinval.vma zero,a1
    let flags = |insn: u64, flags: u64| insn << 32 | flags;
    assert_eq!(calls(0x12b5_0073), ((ids::SFENCE_VMA, [0xabc, 7, flags(0x12b5_0073, 3)]), next, 1));
    assert_eq!(calls(0x1200_0073), ((ids::SFENCE_VMA, [0, 0, flags(0x1200_0073, 0)]), next, 1));
    assert_eq!(calls(0x16b0_0073), ((ids::SFENCE_VMA, [0, 7, flags(0x16b0_0073, 2)]), next, 1));
    assert_eq!(calls(0x1800_0073), ((ids::SFENCE_INVAL, [0x1800_0073, 0, 0]), Outcome::Dispatch, 3));
    // cbo.clean (a0)
    assert_eq!(calls(0x0015_200f), ((ids::CBO, [0xabc, 1, 0x0015_200f]), Outcome::Dispatch, 3));
    assert_eq!(calls(0x0100_000f), ((ids::PAUSE, [0x0100_000f, 0, 0]), Outcome::Dispatch, 3));
}

#[test]
fn cache_blocks_are_zeroed_by_stores() {
    const CBO_ZERO: u32 = 0x0045_200f; // (a0)
    let run = |at: u64, hot: u8| {
        let mut m = Machine::new().x(10, at);
        m.hot[ids::HOT_CBZ_BAD as usize] = hot;
        let outcome = interp::run(&block(&[CBO_ZERO, 0x13, END]), &mut m);
        (outcome, m)
    };
    let (outcome, m) = run(0xac0, 0);
    assert_eq!((outcome, m.calls.len()), (Outcome::Dispatch, 1), "the end's");
    assert!(m.memory.keys().copied().eq(0xac0..0xb00) && m.memory.values().all(|byte| *byte == 0));
    for (at, hot) in [(0xac0, 1), (0xabc, 0), (0xac8, 0)] {
        let (outcome, m) = run(at, hot);
        assert_eq!((outcome, m.calls.len(), m.memory.len()), (Outcome::Careful(BASE + 0x100), 0, 0), "{at:#x}");
    }
    let mut m = Machine::new().x(10, 0xabc);
    interp::run(&block_at(0x100, &[CBO_ZERO], &config().careful()).unwrap(), &mut m);
    assert_eq!(m.calls, [(ids::CBO, [0xabc, 4, CBO_ZERO.into()])]);
}

#[test]
fn fences() {
    let fences = |insn: u32| block(&[insn, END]).ops.contains(&Op::Fence);
    assert!(fences(0x0330_000f), "rw,rw");
    assert!(fences(0x0ff0_000f), "iorw,iorw");
    assert!(fences(0x0120_000f), "w,r");
    assert!(fences(0x0480_000f), "o,i");
    assert!(!fences(0x0230_000f), "r,rw");
    assert!(!fences(0x0310_000f), "rw,w");
    assert!(!fences(0x8330_000f), "tso");
}

#[test]
fn without_compressed_instructions_targets_are_checked() {
    let cfg = TranslateConfig::new(Features::parse_isa_string("rv64g").unwrap());
    let run = |insn: u32, m: &mut Machine| {
        let b = block_at(0x100, &[insn, 0x13, END], &cfg).unwrap();
        interp::run(&b, m)
    };
    // jal ra,.+6: the exception comes before the link.
    let mut m = Machine::new();
    assert_eq!(run(0x0060_00ef, &mut m), Outcome::Dispatch);
    assert_eq!((m.calls[0], m.slots[1]), ((ids::CHECK_TARGET, [BASE + 0x106, 0, 0]), 0));
    // beq a0,a1,.+6: only where taken.
    let mut m = Machine::new();
    assert_eq!(run(0x00b5_0363, &mut m), Outcome::Dispatch);
    assert_eq!(m.calls[0].0, ids::CHECK_TARGET);
    let mut m = Machine::new().x(10, 1);
    assert_eq!(run(0x00b5_0363, &mut m), Outcome::Next(BASE + 0x104));
    // jalr ra,2(a0)
    let mut m = Machine::new().x(10, 0x6000);
    assert_eq!(run(0x0025_00e7, &mut m), Outcome::Next(0x6002));
    assert_eq!(m.calls[0], (ids::CHECK_TARGET, [0x6002, 0, 0]));
}
