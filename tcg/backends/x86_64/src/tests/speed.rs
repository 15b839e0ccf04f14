//! Speed of translation: a figure, and a ceiling that only a mistake exceeds.

use super::harness::*;
use super::random::{Rng, block};
use mimus_tcg_ir::backend::{Emitted, HostBackend};
use std::time::Instant;

#[test]
fn emission_speed() {
    let m = Machine::new(pins(0));
    let mut rng = Rng(42);
    let blocks: Vec<_> = (0..200).map(|_| block(&mut rng, false).0).collect();
    let (mut out, mut info) = (Vec::new(), Emitted::default());
    let (mut best, mut bytes, mut ops) = (u128::MAX, 0, 0);
    for _ in 0..20 {
        let start = Instant::now();
        (bytes, ops) = (0, 0);
        for b in &blocks {
            m.backend.emit(b, m.blocks_at, None, &mut out, &mut info);
            bytes += out.len();
            ops += b.ops.len();
        }
        best = best.min(start.elapsed().as_nanos());
    }
    let per_op = best as f64 / ops as f64;
    println!(
        "{:.0} ns per block of {:.1} operations and {:.0} bytes: {per_op:.1} ns an operation",
        best as f64 / 200.0,
        ops as f64 / 200.0,
        bytes as f64 / 200.0
    );
    assert!(per_op < 2000.0, "{per_op} ns an operation");
}
