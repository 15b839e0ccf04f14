//! Floating-point flags read before a comparison and written back behind it, which hot code reads only if somebody looks.

use super::harness::*;
use super::random::{ADDRESS_SLOTS, Rng, guest};
use mimus_tcg_ir::backend::{Emitted, ExitCode, HostBackend};
use mimus_tcg_ir::flags::Flags;
use mimus_tcg_ir::interp::{self, Outcome};
use mimus_tcg_ir::*;

/// Where the flags are until something else is.
const WAS: Slot = Slot(14);

fn call(write: bool) -> Op {
    let (ret, args) = if write {
        (None, [Val::Imm(1), Val::Slot(WAS), Val::Imm(0)])
    } else {
        (Some(WAS), [Val::Imm(0), Val::Imm(0), Val::Imm(0)])
    };
    Op::Call { helper: HELPER_FP_FLAGS, kind: CallKind::Pure, ret, args }
}

/// Flags, a comparison, flags; perhaps a branch; arithmetic and loads; what overwrites the flags, or does not.
fn block(rng: &mut Rng) -> Block {
    let float = |rng: &mut Rng| Slot(33 + rng.below(8) as u8);
    let fp = |rng: &mut Rng, op: FpOp, d: Slot| Op::Fp {
        op,
        fmt: FpFmt::F64,
        rm: Rm::NearestEven,
        d,
        a: float(rng),
        b: float(rng),
        c: float(rng),
    };
    let compared = Slot(rng.one(&[13, 15, 20]));
    let less = rng.one(&[FpOp::Lt, FpOp::Lt, FpOp::Le]);
    let mut list = Vec::new();
    if rng.chance(50) {
        let d = float(rng);
        list.push(fp(rng, FpOp::Add, d));
    }
    list.push(call(false));
    list.push(fp(rng, less, compared));
    list.push(call(true));
    let exit = |rng: &mut Rng, a: Slot| Op::Branch {
        cond: rng.one(&[Cond::Ne, Cond::Eq]),
        a: a.into(),
        b: Val::Imm(0),
        to: PagePc(rng.one(&[0x400, 0x1000, 0])),
    };
    if rng.chance(70) {
        list.push(exit(rng, compared));
    }
    for _ in 0..rng.below(6) {
        let base = Slot(rng.one(&ADDRESS_SLOTS)).into();
        let off = 8 * rng.below(4) as i32;
        let d = float(rng);
        list.push(match rng.below(8) {
            0..3 => {
                let op = rng.one(&[FpOp::Add, FpOp::Mul, FpOp::Div, FpOp::Sqrt]);
                fp(rng, op, d)
            }
            3..6 => Op::Load { d, base, off, size: Size::B8, ext: Ext::Zero },
            6 => exit(rng, compared),
            _ => Op::Alu { op: AluOp::Add, ty: Ty::I64, d: Slot(rng.one(&[21, 22, 2, 14])), a: base, b: Val::Imm(8) },
        });
    }
    if rng.chance(80) {
        list.push(Op::Un { op: UnOp::Mov, ty: Ty::I64, d: WAS, a: Val::Slot(Slot(15)) });
    }
    let insns = list.len() as u16 + 1;
    let mut ops = Vec::new();
    for (n, op) in (0..).zip(list) {
        ops.extend([Op::Insn { pc: PagePc(0x100 + 4 * n), len: 4 }, op]);
    }
    ops.push(Op::Insn { pc: PagePc(0x100 + 4 * (i32::from(insns) - 1)), len: 4 });
    ops.push(Op::Jump { to: PagePc(0x400) });
    Block { ops, start: 0x100, len: 4 * insns, insns, narrow: false, granules: 0 }
}

#[test]
fn flags_that_are_read_for_nothing() {
    for variant in 0..4 {
        let m = Machine::new(pins(variant));
        for n in 0..1500u64 {
            let mut rng = Rng((variant as u64 + 1) << 32 | (n + 1) << 8 | 0x51);
            rng.next();
            let block = block(&mut rng);
            let (mut out, mut info) = (Vec::new(), Emitted::default());
            info.hints.hot = true;
            if rng.chance(10) {
                info.hints.scattered.push(0x100 + 4 * rng.below(8) as u16);
            }
            m.backend.emit(&block, m.blocks_at, None, &mut out, &mut info);
            m.write_code(m.blocks_at, &out);
            let mut list = vec![(m.blocks_at as u64, info)];
            // Ranges are filled by the first of them.
            for run in 0..6 {
                let mut start = guest(&mut rng);
                start.flags = rng.one(&[0, 1, 3, 16, 31]);
                start.hot = [0; 16];
                if rng.chance(70) {
                    for slot in 33..41 {
                        start.slots[slot] = ((rng.next() as i32 >> 8) as f64 / 16.0).abs().to_bits();
                    }
                }
                if run < 3 {
                    for slot in ADDRESS_SLOTS {
                        start.slots[usize::from(slot)] = DATA + 8 * rng.below(256);
                    }
                }
                let mut oracle = Oracle {
                    guest: start.clone(),
                    insn: (PagePc(0), 0),
                    undefined: Flags::NONE,
                    dropped: Flags::NONE,
                    code_align: 2,
                };
                let outcome = interp::run(&block, &mut oracle);
                let mut env = start.env();
                env.blocks = list;
                env.dispatch = m.stubs.dispatch;
                let (code, pc) = m.run(&mut env, m.blocks_at);
                let expected = match outcome {
                    Outcome::Next(va) => (false, va),
                    Outcome::Dispatch | Outcome::Faulted => (false, TRAP),
                    Outcome::Careful(va) => (true, va),
                };
                for t in usize::from(FIRST_TEMP)..SLOTS {
                    env.guest.slots[t] = oracle.guest.slots[t];
                }
                let differ = (0..64).find(|&s| env.guest.slots[s] != oracle.guest.slots[s]);
                assert_eq!(differ.map(|s| (s, env.guest.slots[s], oracle.guest.slots[s])), None, "run {run}\n{block}");
                assert_eq!((code == ExitCode::Careful, pc), expected, "run {run}\n{block}");
                assert!(env.guest == oracle.guest, "{} {} run {run}\n{block}", env.guest.flags, oracle.guest.flags);
                list = env.blocks;
            }
        }
    }
}
