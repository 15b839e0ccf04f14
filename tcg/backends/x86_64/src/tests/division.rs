//! Unsigned divisions of hot code, which remember their last divisor.

use super::harness::*;
use super::random::Rng;
use mimus_tcg_ir::backend::{Emitted, ExitCode, HostBackend};
use mimus_tcg_ir::*;

const N: Slot = Slot(11);
const BY: Slot = Slot(12);

/// What a block divides, and how.
#[derive(Clone, Copy, Debug)]
struct Case {
    quotient: Option<Slot>,
    remainder: Option<Slot>,
    /// The remainder first.
    swapped: bool,
}

impl Case {
    fn ops(self) -> Vec<Op> {
        let op = |op: AluOp, d: Option<Slot>| d.map(|d| Op::Alu { op, ty: Ty::I64, d, a: N.into(), b: BY.into() });
        let mut both = vec![op(AluOp::DivU, self.quotient), op(AluOp::RemU, self.remainder)];
        if self.swapped {
            both.reverse();
        }
        let mut ops = Vec::new();
        for (pc, op) in [0x100, 0x104].into_iter().zip(both) {
            ops.push(Op::Insn { pc: PagePc(pc), len: 4 });
            ops.extend(op);
        }
        ops.push(Op::Jump { to: PagePc(0x7_0000) });
        ops
    }
}

#[test]
fn divisions_by_remembered_divisors() {
    let (x, y) = (Slot(13), Slot(14));
    let cases = [
        Case { quotient: Some(x), remainder: None, swapped: false },
        Case { quotient: None, remainder: Some(x), swapped: false },
        Case { quotient: Some(x), remainder: Some(y), swapped: false },
        Case { quotient: Some(y), remainder: Some(x), swapped: true },
        Case { quotient: Some(Slot(25)), remainder: Some(Slot(26)), swapped: false },
        Case { quotient: Some(x), remainder: Some(N), swapped: false },
        Case { quotient: Some(BY), remainder: None, swapped: false },
    ];
    let mut rng = Rng(1);
    for (variant, case) in (0..4).flat_map(|v| cases.map(|c| (v, c))) {
        let m = Machine::new(pins(variant));
        let mut env = Guest::new().env();
        env.dispatch = m.stubs.dispatch;
        let block = Block { ops: case.ops(), start: 0x100, len: 8, insns: 2, narrow: false, granules: 0 };
        let (mut out, mut info) = (Vec::new(), Emitted::default());
        info.hints.hot = true;
        let at = m.blocks_at;
        m.backend.emit(&block, at, None, &mut out, &mut info);
        m.write_code(at, &out);
        env.blocks.push((at as u64, info));
        let edges =
            [0, 1, 2, 3, 5, 7, 10, 1 << 31, 1 << 32, (1 << 63) - 1, 1 << 63, (1 << 63) + 1, u64::MAX - 1, u64::MAX];
        for round in 0..60 {
            let by = *edges.get(round).unwrap_or(&(rng.next() >> (rng.next() & 63)));
            for i in 0..80 {
                // Now and then by another: what is remembered is not what divides.
                let by = if i % 13 == 12 { rng.next() >> (rng.next() & 63) } else { by };
                let multiple = by.wrapping_mul(rng.next() >> (rng.next() & 63));
                let near = [0, 1, by, u64::MAX, multiple, rng.next()][i % 6];
                let n = near.wrapping_add([0, 1, u64::MAX][i % 3]);
                (env.guest.slots[11], env.guest.slots[12]) = (n, by);
                assert_eq!(m.run(&mut env, at).0, ExitCode::Lookup);
                let found = |slot: Option<Slot>| slot.map(|slot| env.guest.slots[usize::from(slot.0)]);
                let quotient = n.checked_div(by).unwrap_or(u64::MAX);
                let remainder = n.checked_rem(by).unwrap_or(n);
                let wanted = (case.quotient.map(|_| quotient), case.remainder.map(|_| remainder));
                assert_eq!((found(case.quotient), found(case.remainder)), wanted, "{n:#x} by {by:#x}, {case:?}");
            }
        }
    }
}
