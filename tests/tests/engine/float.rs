//! Every F and D instruction on generated code against the exact soft-float reference:
//! results and accrued flags of millions of random operands, all rounding modes, static and
//! dynamic, with subnormals, infinities, both kinds of NaN and singles that are not boxed.

use std::time::Duration;

use mimus_tcg_softfloat::riscv::{FpFmt, Rm, RvFpOp, exec};
use mimus_tcg_softfloat::{FloatStatus, Rounding};
use mimus_tests::cpus::{Engine, RAM, Solo, alone, open_pmp};
use mimus_tests::random::Random;

/// Operand triples per instruction and rounding mode.
const BATCH: usize = 8000;
/// Bytes of a row: three operands, the result, the flags.
const ROW: u64 = 40;
const DATA: u64 = RAM + 0x10_0000;
const LIMIT: Duration = Duration::from_secs(60);

const MODES: [(Rm, Rounding); 5] = [
    (Rm::NearestEven, Rounding::NearestEven),
    (Rm::ToZero, Rounding::ToZero),
    (Rm::Down, Rounding::Down),
    (Rm::Up, Rounding::Up),
    (Rm::NearestMaxMag, Rounding::NearestMaxMag),
];
/// `rm` of instructions that take the mode from `frm`.
const DYNAMIC: u32 = 7;

/// Where an instruction's operand or result is.
#[derive(Clone, Copy, PartialEq)]
enum File {
    Integer,
    Float,
}
use File::{Float, Integer};

/// How an operation is encoded (unprivileged specification, instruction listings): the
/// word without registers, rounding mode and format; what `rm` is if it does not round; the
/// register files of operand and result.
fn encoding(op: RvFpOp, fmt: FpFmt) -> (u32, Option<u32>, File, File) {
    let op_fp = |funct5: u32, rs2: u32| 0x53 | funct5 << 27 | rs2 << 20;
    match op {
        RvFpOp::Add => (op_fp(0x00, 11), None, Float, Float),
        RvFpOp::Sub => (op_fp(0x01, 11), None, Float, Float),
        RvFpOp::Mul => (op_fp(0x02, 11), None, Float, Float),
        RvFpOp::Div => (op_fp(0x03, 11), None, Float, Float),
        RvFpOp::Sqrt => (op_fp(0x0b, 0), None, Float, Float),
        RvFpOp::MAdd => (0x43 | 12 << 27 | 11 << 20, None, Float, Float),
        RvFpOp::MSub => (0x47 | 12 << 27 | 11 << 20, None, Float, Float),
        RvFpOp::NMSub => (0x4b | 12 << 27 | 11 << 20, None, Float, Float),
        RvFpOp::NMAdd => (0x4f | 12 << 27 | 11 << 20, None, Float, Float),
        RvFpOp::Min => (op_fp(0x05, 11), Some(0), Float, Float),
        RvFpOp::Max => (op_fp(0x05, 11), Some(1), Float, Float),
        RvFpOp::Le => (op_fp(0x14, 11), Some(0), Float, Integer),
        RvFpOp::Lt => (op_fp(0x14, 11), Some(1), Float, Integer),
        RvFpOp::Eq => (op_fp(0x14, 11), Some(2), Float, Integer),
        RvFpOp::Sgnj => (op_fp(0x04, 11), Some(0), Float, Float),
        RvFpOp::Sgnjn => (op_fp(0x04, 11), Some(1), Float, Float),
        RvFpOp::Sgnjx => (op_fp(0x04, 11), Some(2), Float, Float),
        RvFpOp::Class => (op_fp(0x1c, 0), Some(1), Float, Integer),
        RvFpOp::ToI32 => (op_fp(0x18, 0), None, Float, Integer),
        RvFpOp::ToU32 => (op_fp(0x18, 1), None, Float, Integer),
        RvFpOp::ToI64 => (op_fp(0x18, 2), None, Float, Integer),
        RvFpOp::ToU64 => (op_fp(0x18, 3), None, Float, Integer),
        RvFpOp::FromI32 => (op_fp(0x1a, 0), None, Integer, Float),
        RvFpOp::FromU32 => (op_fp(0x1a, 1), None, Integer, Float),
        RvFpOp::FromI64 => (op_fp(0x1a, 2), None, Integer, Float),
        RvFpOp::FromU64 => (op_fp(0x1a, 3), None, Integer, Float),
        RvFpOp::CvtFmt => (op_fp(0x08, u32::from(fmt == FpFmt::F32)), None, Float, Float),
        RvFpOp::MvToInt => (op_fp(0x1c, 0), Some(0), Float, Integer),
        RvFpOp::MvFromInt => (op_fp(0x1e, 0), Some(0), Integer, Float),
    }
}

/// A loop over the rows from `a0` to `a1`: operands in `fa0`-`fa2` (`a5` for integers),
/// result in `fa3` or `a6`.
fn program(op: RvFpOp, fmt: FpFmt, rm: u32) -> Vec<u32> {
    let (word, fixed, from, to) = encoding(op, fmt);
    let source = if from == Integer { 15 } else { 10 };
    let dest = if to == Integer { 16 } else { 13 };
    let rm = fixed.unwrap_or(rm);
    let insn = word | u32::from(fmt == FpFmt::F64) << 25 | source << 15 | rm << 12 | dest << 7;
    let fld = |rd: u32, offset: u32| offset << 20 | 10 << 15 | 3 << 12 | rd << 7 | 0x07;
    let store = |opcode: u32, rs: u32, offset: u32| {
        (offset >> 5) << 25 | rs << 20 | 10 << 15 | 3 << 12 | (offset & 31) << 7 | opcode
    };
    // bltu a0, a1, -40
    let back = 0x8000_0000 | (0x3f - 1) << 25 | 11 << 20 | 10 << 15 | 6 << 12 | 0b11001 << 7 | 0x63;
    vec![
        fld(10, 0),
        fld(11, 8),
        fld(12, 16),
        10 << 15 | 3 << 12 | 15 << 7 | 0x03, // ld a5, 0(a0)
        1 << 20 | 5 << 12 | 0x73,            // csrwi fflags, 0
        insn,
        1 << 20 | 2 << 12 | 17 << 7 | 0x73, // csrr a7, fflags
        if to == Integer { store(0x23, 16, 24) } else { store(0x27, 13, 24) },
        store(0x23, 17, 32),
        40 << 20 | 10 << 15 | 10 << 7 | 0x13, // addi a0, a0, 40
        back,
        0x1050_0073, // wfi
    ]
}

fn operand(random: &mut Random, file: File) -> u64 {
    match file {
        Integer => random.value(),
        // Now and then a single in a register that says it is none.
        Float if random.one_in(16) => u64::from(random.u64() as u32),
        Float => random.float(),
    }
}

/// One instruction with one rounding mode on a batch of operands.
fn check(on: &mut Solo, random: &mut Random, op: RvFpOp, fmt: FpFmt, rm: u32, frm: usize) {
    let file = encoding(op, fmt).2;
    let rows: Vec<[u64; 3]> = (0..BATCH).map(|_| [operand(random, file), random.float(), random.float()]).collect();
    let bytes = rows.iter().flat_map(|r| [r[0], r[1], r[2], 0, 0]).flat_map(u64::to_le_bytes);
    on.base.put(DATA, &bytes.collect::<Vec<u8>>());
    on.base.put_code(RAM, &program(op, fmt, rm));
    let mut state = on.state();
    open_pmp(&mut state);
    (state.pc, state.waiting) = (RAM, false);
    state.mstatus |= 3 << 13;
    state.fcsr = (frm as u64) << 5;
    (state.x[10], state.x[11]) = (DATA, DATA + ROW * BATCH as u64);
    on.set(state);
    on.run(LIMIT).expect("the loop ends");
    let left = on.base.bytes(DATA, ROW as usize * BATCH);
    let (mode, name) = match rm {
        DYNAMIC => (Rm::Dynamic, format!("dyn {:?}", MODES[frm].1)),
        _ => (MODES[rm as usize].0, format!("{:?}", MODES[rm as usize].1)),
    };
    for (row, left) in rows.iter().zip(left.chunks_exact(ROW as usize)) {
        let word = |i: usize| u64::from_le_bytes(left[8 * i..8 * i + 8].try_into().unwrap());
        let mut status = FloatStatus::riscv(MODES[frm].1);
        let result = exec(op, fmt, mode, row[0], row[1], row[2], &mut status);
        let flags = u64::from(status.flags.bits());
        assert_eq!(
            (word(3), word(4)),
            (result, flags),
            "{op:?} {fmt:?} {name}: {:#018x} {:#018x} {:#018x}: result and flags {:#x} {:#x}, exact {result:#x} {flags:#x}",
            row[0],
            row[1],
            row[2],
            word(3),
            word(4)
        );
    }
}

#[test]
fn every_instruction_is_exact() {
    let _alone = alone();
    let mut on = Solo::new(Engine::Jit);
    let mut random = Random::new(0xf10a7);
    let mut checked = 0;
    for op in RvFpOp::ALL {
        for fmt in [FpFmt::F32, FpFmt::F64] {
            let modes = if encoding(op, fmt).1.is_some() { 1 } else { MODES.len() };
            for mode in 0..modes {
                // The mode in the instruction, another in `frm`; then the other way.
                check(&mut on, &mut random, op, fmt, mode as u32, (mode + 2) % MODES.len());
                check(&mut on, &mut random, op, fmt, DYNAMIC, mode);
                checked += 2 * BATCH;
            }
        }
    }
    assert!(checked >= 3_000_000, "{checked} operands");
}
