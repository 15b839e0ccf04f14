//! Loops that follow pointers: jumps back that test flags and find the next load's page themselves.

use super::harness::*;
use super::random::Rng;
use mimus_tcg_ir::backend::{ContextLayout, Emitted, ExitCode, HostBackend, Optimise};
use mimus_tcg_ir::flags::{FLAGS, Flags};
use mimus_tcg_ir::*;

/// The key that is looked for, the node, and the side to go.
const KEY: Slot = Slot(1);
const NODE: Slot = Slot(10);
const SIDE: Slot = Slot(2);
/// What is added to the node for its side.
const BYTES: Slot = Slot(8);
const START: i32 = 0x200;
/// Where a null pointer and the key lead.
const NULL: PagePc = PagePc(0x300);
const FOUND: PagePc = PagePc(0x400);

/// `early`: without flags, what comes next is computed before the branch back.
fn block(flags: bool, early: bool) -> Block {
    let mut block = Block::default();
    block.clear(START as u16);
    let insn = |n: i32| Op::Insn { pc: PagePc(START + 2 * n), len: 2 };
    let (link, key) = (Slot::temp(0), Slot::temp(1));
    let back = PagePc(START);
    let load = |d, base: Slot, off, size| Op::Load { d, base: base.into(), off, size, ext: Ext::Zero };
    let compare = |op, a: Slot, b: Slot| Op::AluF { op, size: Size::B4, d: None, a: a.into(), b: b.into() };
    let test = Op::AluF { op: FlagOp::And, size: Size::B8, d: None, a: NODE.into(), b: NODE.into() };
    let dead = Flags::NONE;
    let ops = if flags {
        vec![
            insn(0),
            Op::SetCondF { cond: CondF::B, d: SIDE },
            insn(1),
            Op::Un { op: UnOp::ZextB, ty: Ty::I64, d: SIDE, a: SIDE.into() },
            insn(2),
            Op::Lea { d: link, base: NODE.into(), index: SIDE.into(), shift: 3, disp: 0, size: Size::B8 },
            load(NODE, link, 0, Size::B8),
            insn(3),
            test,
            insn(4),
            Op::BranchF { cond: CondF::E, to: NULL, dead },
            insn(5),
            load(key, NODE, 16, Size::B4),
            compare(FlagOp::Sub, key, KEY),
            insn(6),
            Op::BranchF { cond: CondF::Ne, to: back, dead },
            Op::Jump { to: FOUND },
        ]
    } else if early {
        let branch = |cond, a: Slot, b: Val, to| Op::Branch { cond, a: a.into(), b, to };
        let alu = |op, d, a: Slot, b: Val| Op::Alu { op, ty: Ty::I64, d, a: a.into(), b };
        vec![
            insn(0),
            load(NODE, NODE, 0, Size::B8),
            insn(1),
            branch(Cond::Eq, NODE, Val::Imm(0), NULL),
            insn(2),
            load(SIDE, NODE, 16, Size::B4),
            insn(3),
            alu(AluOp::SetLtU, BYTES, SIDE, KEY.into()),
            insn(4),
            alu(AluOp::Shl, BYTES, BYTES, Val::Imm(3)),
            insn(5),
            alu(AluOp::Add, NODE, NODE, BYTES.into()),
            insn(6),
            branch(Cond::Ne, SIDE, KEY.into(), back),
            Op::Jump { to: FOUND },
        ]
    } else {
        let branch = |cond, a: Slot, b: Val, to| Op::Branch { cond, a: a.into(), b, to };
        let alu = |op, d, a: Slot, b: Slot| Op::Alu { op, ty: Ty::I64, d, a: a.into(), b: b.into() };
        vec![
            insn(0),
            alu(AluOp::SetLtU, SIDE, SIDE, KEY),
            insn(1),
            alu(AluOp::Sh3Add, NODE, SIDE, NODE),
            insn(2),
            load(NODE, NODE, 0, Size::B8),
            insn(3),
            branch(Cond::Eq, NODE, Val::Imm(0), NULL),
            insn(4),
            load(SIDE, NODE, 16, Size::B4),
            insn(5),
            branch(Cond::Ne, SIDE, KEY.into(), back),
            Op::Jump { to: FOUND },
        ]
    };
    block.ops.extend(ops);
    (block.insns, block.len) = (7, 14);
    block
}

/// The guest's second page is the host's fourth.
fn place(va: u64) -> usize {
    match (va - DATA) as usize {
        off @ 4096..8192 => off + 2 * 4096,
        off => off,
    }
}

/// Nodes of two links and a key, by address; links lead to later ones. None is in two pages, but for one that the TLB does not
/// have all of.
fn nodes(rng: &mut Rng, data: &mut [u8]) -> Vec<u64> {
    let mut all: Vec<u64> = (0..123).map(|n| DATA + 100 * n + rng.below(70)).collect();
    all.retain(|va| va & 4095 >= 64 && va & 4095 <= 4096 - 24 && va - DATA < 0x2fc0);
    all.push(DATA + 0x3000 - rng.below(24));
    for i in (1..all.len()).rev() {
        all.swap(i, rng.below(i as u64 + 1) as usize);
    }
    for (i, &va) in all.iter().enumerate() {
        let later = &all[i + 1..];
        let mut link =
            || if later.is_empty() || rng.chance(3) { 0 } else { later[rng.below(later.len().min(6) as u64) as usize] };
        let mut bytes = [link().to_le_bytes(), link().to_le_bytes()].concat();
        bytes.extend((rng.below(100) as u32).to_le_bytes());
        for (byte, n) in bytes.into_iter().zip(0..) {
            data[place(va + n)] = byte;
        }
    }
    all
}

fn word(data: &[u8], va: u64, bytes: u64) -> u64 {
    (0..bytes).rev().fold(0, |word, n| word << 8 | u64::from(data[place(va + n)]))
}

/// What the block does: the node, the side, and where it leaves for.
fn walk(data: &[u8], (mut node, mut side, key): (u64, u64, u64), flags: bool) -> (u64, u64, PagePc) {
    loop {
        node = word(data, node + 8 * side, 8);
        if node == 0 {
            return (0, side, NULL);
        }
        let found = word(data, node + 16, 4);
        if found == key {
            return (node, if flags { side } else { found }, FOUND);
        }
        side = u64::from(found < key);
    }
}

/// The key that was read last before a null pointer.
fn last_key(data: &[u8], node: u64, key: u64) -> Option<u64> {
    let (mut node, mut side, mut last) = (node, 0, None);
    loop {
        node = word(data, node + 8 * side, 8);
        if node == 0 {
            return last;
        }
        let found = word(data, node + 16, 4);
        last = Some(found);
        side = u64::from(found < key);
    }
}

#[test]
fn loops_that_follow_pointers() {
    let forms = [(true, false), (false, false), (false, true)];
    for ((flags, early), variant) in forms.into_iter().flat_map(|form| [0, 1, 3].map(|variant| (form, variant))) {
        let m = Machine::optimising(pins(variant), if flags { 1 } else { 2 }, Optimise::Usual);
        let l = ContextLayout::STANDARD;
        m.context_entry(l.addend, DATA + 4096, m.data_addend().wrapping_add(2 * 4096));
        let block = block(flags, early);
        for seed in 1..400 {
            let mut rng = Rng(seed << 20 | 0x55);
            rng.next();
            let mut start = Guest::new();
            let all = nodes(&mut rng, &mut start.data);
            let (node, side, key) = (all[rng.below(10) as usize], rng.below(2), rng.below(120));
            let carry = if side != 0 { Flags::CF } else { Flags::NONE };
            start.slots[usize::from(FLAGS.0)] = carry.pack();
            start.slots[usize::from(NODE.0)] = node;
            start.slots[usize::from(KEY.0)] = key;
            // A part of it is overwritten; or it is the key that was read last.
            start.slots[usize::from(SIDE.0)] = if flags { rng.next() } else { (key + 1) * (1 - side) };
            let side = match (flags, early) {
                (false, true) => 0,
                (false, false) => u64::from((key + 1) * (1 - side) < key),
                (true, _) => side,
            };
            let mut expected = walk(&start.data, (node, side, key), flags);
            if early && expected.2 == NULL {
                expected.1 = last_key(&start.data, node, key).unwrap_or(start.slots[usize::from(SIDE.0)]);
            }
            let mut info = Emitted::default();
            info.hints.hot = true;
            // (What has a range entry would be served by the runtime, which knows nothing of the second page.)
            info.hints.scattered = (0x200..0x20e).collect();
            let mut out = Vec::new();
            m.backend.emit(&block, m.blocks_at, None, &mut out, &mut info);
            m.write_code(m.blocks_at, &out);
            let what = format!("flags {flags}, early {early}, variant {variant}, seed {seed}");
            let mut env = start.env();
            env.dispatch = m.stubs.dispatch;
            env.blocks.push((m.blocks_at as u64, info));
            let kicked = rng.chance(10);
            env.set_kick(u32::from(kicked));
            let (code, pc) = m.run(&mut env, m.blocks_at);
            let slot = |slot: Slot| env.guest.slots[usize::from(slot.0)];
            // (What is not linked looks at the kick word as well.)
            let expected_code = if kicked { ExitCode::Kicked } else { ExitCode::Lookup };
            if code == ExitCode::Kicked && pc < CODE + NULL.0 as u64 {
                assert!(kicked, "{what}");
                let first = word(&env.guest.data, node + 8 * side, 8);
                let found = word(&env.guest.data, first + 16, 4);
                let on = if early { 8 * u64::from(found < key) } else { 0 };
                assert_eq!(slot(NODE), first + on, "{what}: after one round");
                let carry = Flags::unpack(slot(FLAGS)).contains(Flags::CF);
                if flags {
                    assert_eq!(carry, found < key, "{what}");
                }
                match pc - CODE {
                    0x200 => assert_eq!(slot(SIDE), if flags { side } else { found }, "{what}"),
                    // The first instruction has been executed too.
                    0x202 => assert_eq!(slot(SIDE), side & !0xff | u64::from(found < key), "{what}"),
                    other => panic!("{what}: left at {other:#x}"),
                }
                continue;
            }
            assert_eq!((code, pc), (expected_code, CODE + expected.2.0 as u64), "{what}");
            assert_eq!((slot(NODE), slot(SIDE)), (expected.0, expected.1), "{what}");
            if flags {
                let zero = Flags::unpack(slot(FLAGS)).contains(Flags::ZF);
                assert!(zero, "{what}: both ways out are taken on equality");
            }
        }
    }
}
