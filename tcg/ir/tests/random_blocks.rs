//! Random blocks verify, survive the text form, and reach what they are meant to reach.

mod common;

use std::collections::BTreeMap;

use mimus_tcg_ir::filetest::Ending;
use mimus_tcg_ir::interp::run;
use mimus_tcg_ir::random::{RandomConfig, Rng, random_block, random_host};
use mimus_tcg_ir::verify::verify;
use mimus_tcg_ir::{Op, text};

fn everything() -> RandomConfig {
    RandomConfig { fp: true, small_atomics: true, ..RandomConfig::default() }
}

#[test]
fn every_block_verifies_and_survives_the_text_form() {
    for seed in 0..4000 {
        let mut rng = Rng::new(seed);
        let config = RandomConfig { max_insns: 1 + (seed % 40) as u16, fp: seed % 2 == 0, ..everything() };
        let block = random_block(&mut rng, &config);
        assert_eq!(verify(&block), Ok(()), "seed {seed}:\n{block}");
        assert_eq!(text::parse(&block.to_string()), Ok(block), "seed {seed}");
    }
}

#[test]
fn a_seed_gives_the_same_block_and_run() {
    for seed in 0..50 {
        let once = || {
            let mut rng = Rng::new(seed);
            let block = random_block(&mut rng, &everything());
            let mut host = random_host(&mut rng, &everything(), common::soft_fp);
            let outcome = run(&block, &mut host);
            (block, host.finish(outcome))
        };
        assert_eq!(once(), once());
    }
}

#[test]
fn every_ending_and_operation_is_reached() {
    let mut reached: BTreeMap<String, u32> = BTreeMap::new();
    let mut crossing = 0;
    for seed in 0..6000 {
        let mut rng = Rng::new(seed);
        let config = everything();
        let block = random_block(&mut rng, &config);
        let mut host = random_host(&mut rng, &RandomConfig { window_pages: 1, ..config.clone() }, common::soft_fp);
        host.memory.map(config.window, config.window_pages * 4096);
        let outcome = run(&block, &mut host);
        let ending = match host.finish(outcome).ending {
            Ending::Next(_) => "next".into(),
            Ending::Dispatch(_) => "dispatch".into(),
            Ending::Careful(_) => "careful".into(),
            Ending::Fault(record) => format!("fault {:?}", record.kind),
        };
        *reached.entry(ending).or_default() += 1;
        crossing += u32::from(block.crosses_page());
        for op in &block.ops {
            let text = op.to_string();
            let text = text.split(" = ").nth(1).filter(|_| !matches!(op, Op::SetEnvByte { .. })).unwrap_or(&text);
            let name = text.split([' ', '[']).next().unwrap_or_default();
            *reached.entry(name.split('.').take(2).collect::<Vec<_>>().join(".")).or_default() += 1;
        }
    }
    assert!(crossing > 50, "{crossing} blocks cross the page");
    for name in [
        "next",
        "dispatch",
        "careful",
        "fault Load",
        "fault Store",
        "fault MisalignedLoad",
        "fault MisalignedStore",
        "fence",
        "env",
        "guard",
        "jump",
        "jumpreg",
        "br.geu",
        "call.pure",
        "call.mayexit",
        "sc.b4",
        "sc.b8",
        "lr.b4",
        "amo.minu",
        "load.b8",
        "store.b1",
        "getpc",
        "mulhisu.i64",
        "orcb.i64",
        "bext.i32",
        "rol.u32",
        "fp.nmadd",
    ] {
        let count = reached.get(name).copied().unwrap_or(0);
        assert!(count >= 5, "{name} was reached {count} times");
    }
}

#[test]
fn most_runs_do_not_fault() {
    let faults = (0..2000)
        .filter(|seed| {
            let mut rng = Rng::new(*seed);
            let block = random_block(&mut rng, &everything());
            let mut host = random_host(&mut rng, &everything(), common::soft_fp);
            let outcome = run(&block, &mut host);
            matches!(host.finish(outcome).ending, Ending::Fault(_))
        })
        .count();
    assert!((20..600).contains(&faults), "{faults} of 2000 runs fault");
}

/// Damaged text is refused or read, and what was read can be judged and executed, without a panic.
#[test]
fn damaged_text_does_no_harm() {
    let mut read = 0;
    for seed in 0..3000 {
        let mut rng = Rng::new(seed);
        let mut bytes = random_block(&mut rng, &everything()).to_string().into_bytes();
        for _ in 0..=rng.below(3) {
            let at = rng.below(bytes.len() as u64) as usize;
            match rng.below(3) {
                0 => bytes[at] = rng.pick(b"0123456789abcdefst[]+-,.=(){}#x \n\xc3"),
                1 => drop(bytes.remove(at)),
                _ => bytes.insert(at, rng.pick(b"0123456789fst+-.\n")),
            }
        }
        if let Ok(block) = text::parse(&String::from_utf8_lossy(&bytes)) {
            read += 1;
            assert_eq!(text::parse(&block.to_string()).as_ref(), Ok(&block), "seed {seed}");
            let _ = verify(&block);
            run(&block, &mut random_host(&mut rng, &everything(), common::soft_fp));
        }
    }
    // Most damage is refused; the test means something as long as a fair number is not.
    assert!(read > 100, "{read} texts were still readable");
}
