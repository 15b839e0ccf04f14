//! Memory that scatters in RAM and is gathered for it (`mimus_core::memory`, `RamBlock::gather`): programs that go all over a heap
//! must leave the same as on the interpreter, which gathers nothing, whatever is done to the pages meanwhile.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use mimus_arch::riscv::{Privilege, RiscvState};
use mimus_tests::cpus::{Engine, RAM, RAM_LEN, Solo, alone, open_pmp};
use mimus_tests::random::Random;
use mimus_tests::riscv::reg::*;
use mimus_tests::riscv::*;
use mimus_tests::scale;

const PAGE: u64 = 4096;
const CODE: u64 = RAM + 0x1000;
const HANDLER: u64 = RAM + 0x3000;
const TABLES: u64 = RAM + 0x4000;
/// Where data is in RAM: the rest of it.
const DATA: u64 = RAM + 0x10000;
const DATA_PAGES: u64 = (RAM_LEN - 0x10000) / PAGE;
/// Where the heap is for the program, and where some of its pages are once more.
const HEAP: u64 = 1 << 30;
const OTHER: u64 = HEAP + 0x20_0000;
/// Pages that are accessed; one more is there for what crosses the last one's end.
const HEAP_PAGES: u64 = 256;
const OTHER_PAGES: u64 = 64;
const LIMIT: Duration = Duration::from_secs(60);

/// `mul`.
const fn mul(rd: Reg, rs1: Reg, rs2: Reg) -> u32 {
    r(0x33, 0, 1, rd, rs1, rs2)
}

const fn srli(rd: Reg, rs1: Reg, by: u32) -> u32 {
    i(0x13, 5, rd, rs1, by as i32)
}

const fn and(rd: Reg, rs1: Reg, rs2: Reg) -> u32 {
    r(0x33, 7, 0, rd, rs1, rs2)
}

/// What virtual pages are mapped to, by number from [`DATA`] on.
#[derive(Clone)]
struct Mapping {
    heap: Vec<u64>,
    other: Vec<u64>,
}

impl Mapping {
    fn new(random: &mut Random) -> Mapping {
        let mut pages: Vec<u64> = (0..DATA_PAGES).collect();
        for i in (1..pages.len()).rev() {
            pages.swap(i, random.below(i as u64 + 1) as usize);
        }
        let other = (0..=OTHER_PAGES).map(|_| pages[random.below(HEAP_PAGES) as usize]).collect();
        pages.truncate(HEAP_PAGES as usize + 1);
        Mapping { heap: pages, other }
    }

    fn put(&self, on: &Solo) {
        let pte = |pa: u64, bits: u64| pa >> 12 << 10 | bits;
        on.base.put_u64(TABLES + 2 * 8, pte(RAM, 0xcf));
        on.base.put_u64(TABLES + 8, pte(TABLES + 0x1000, 1));
        for (i, pages) in (0..).zip([&self.heap, &self.other]) {
            let table = TABLES + 0x2000 + i * PAGE;
            on.base.put_u64(TABLES + 0x1000 + 8 * i, pte(table, 1));
            for (n, page) in (0..).zip(pages) {
                on.base.put_u64(table + 8 * n, pte(DATA + page * PAGE, 0xcf));
            }
        }
    }
}

/// One of the program's accesses: at a random address, its value into the sum.
fn access(a: &mut Asm, random: &mut Random, halves_only: bool) {
    a.op([mul(S0, S0, A3), add(S0, S0, A4), srli(T0, S0, 13 + random.below(16) as u32)]);
    let (base, mask) = if random.one_in(4) { (S3, T6) } else { (S1, S2) };
    a.op([and(T0, T0, mask)]);
    let kind = random.below(10);
    let size = random.below(4) as u32;
    // Most are aligned; the others may cross the end of a page.
    let aligned = halves_only || kind >= 8 || random.below(4) != 0;
    if aligned {
        a.op([i(0x13, 7, T0, T0, -8)]);
    }
    a.op([add(T0, T0, base)]);
    let imm = if halves_only { 0 } else { 8 * random.below(8) as i32 };
    match kind {
        // All widths, with signs and without but for doublewords.
        0..4 => a.op([i(0x03, if size < 3 { size + 4 * random.below(2) as u32 } else { size }, T1, T0, imm)]),
        4..8 => a.op([s(size, S0, T0, imm), add(T1, T0, ZERO)]),
        8 => a.op([amo_d(random.pick(&[Amo::Add, Amo::Xor, Amo::Swap, Amo::Maxu]), T1, S0, T0)]),
        _ => a.op([lr_d(T1, T0), add(T2, T1, S0), sc_d(T3, T2, T0), add(T1, T1, T3)]),
    };
    a.op([mul(A0, A0, A3), add(A0, A0, T1)]);
}

/// A program that stores a function to the heap, calls it, changes it through another address and calls it again; and then
/// accesses the heap at `A2` times some places.
fn program(random: &mut Random, halves_only: bool) -> Vec<u8> {
    let a = &mut Asm::new(CODE);
    a.op([insn::SFENCE_ALL]);
    if !halves_only {
        a.op([sw(T4, A6, 0), sw(T5, A6, 4), insn::FENCE_I, jalr(RA, A5, 0)]);
        a.op([addi(T1, T4, 0), add(T1, T4, A7), sw(T1, A5, 0), insn::FENCE_I, jalr(RA, A6, 0), jalr(RA, A5, 0)]);
    }
    a.label("again");
    for _ in 0..4 + random.below(6) {
        access(a, random, halves_only);
    }
    a.op([addi(A2, A2, -1)]).bnez(A2, "again").op([insn::EBREAK]);
    a.finish()
}

fn beginning(template: &RiscvState, random: &mut Random, times: u64) -> RiscvState {
    let mut s = template.clone();
    open_pmp(&mut s);
    s.privilege = Privilege::Supervisor;
    s.satp = 8 << 60 | TABLES >> 12;
    (s.pc, s.mtvec) = (CODE, HANDLER);
    let mut set = |reg: Reg, value: u64| s.x[reg as usize] = value;
    set(S0, random.u64());
    set(S1, HEAP);
    set(S2, HEAP_PAGES * PAGE - 1);
    set(S3, OTHER);
    set(T6, OTHER_PAGES * PAGE - 1);
    set(A2, times);
    set(A3, 6_364_136_223_846_793_005);
    set(A4, 1_442_695_040_888_963_407);
    s
}

fn solo(engine: Engine, code: &[u8]) -> Solo {
    let solo = Solo::new(engine);
    solo.base.put(CODE, code);
    solo.base.put_code(HANDLER, &[csrrw(0, 0x304, 0), insn::WFI]);
    solo
}

fn run_one(seed: u64) -> u64 {
    let random = &mut Random::new(seed);
    let code = program(random, false);
    let mut solos = [Engine::Interp, Engine::Forced].map(|engine| solo(engine, &code));
    let template = solos[0].state();
    let mut mapping = Mapping::new(random);
    for phase in 0..8 {
        if phase != 0 && random.one_in(2) {
            for _ in 0..random.below(40) {
                let (i, j) = (random.below(HEAP_PAGES) as usize, random.below(HEAP_PAGES) as usize);
                mapping.heap.swap(i, j);
            }
        }
        // A page of the heap that is at another address, too.
        let there = random.below(HEAP_PAGES);
        let other = random.below(OTHER_PAGES);
        mapping.other[other as usize] = mapping.heap[there as usize];
        let mut state = beginning(&template, random, 4000);
        let offset = 8 * random.below(512);
        for (reg, value) in [
            (A5, HEAP + there * PAGE + offset),
            (A6, OTHER + other * PAGE + offset),
            (T4, addi(A0, A0, random.below(100) as i32).into()),
            (T5, jalr(0, RA, 0).into()),
            (A7, 1 << 20),
        ] {
            state.x[reg as usize] = value;
        }
        let written: Vec<(u64, u64)> =
            (0..random.below(300)).map(|_| (8 * random.below(DATA_PAGES * PAGE / 8), random.u64())).collect();
        let discarded: Vec<u64> = (0..random.below(4)).map(|_| random.below(DATA_PAGES)).collect();
        let left = solos.each_mut().map(|on| {
            mapping.put(on);
            for (at, value) in &written {
                on.base.put_u64(DATA + at, *value);
            }
            for page in &discarded {
                assert!(on.base.ram.discard(DATA - RAM + page * PAGE, PAGE));
            }
            on.set(state.clone());
            let s = on.run(LIMIT).expect("an end");
            assert_eq!(s.mcause, 3, "seed {seed} phase {phase} {:?}: {:#x} at {:#x}", on.engine, s.mtval, s.mepc);
            (s.x, on.base.bytes(DATA, (DATA_PAGES * PAGE) as usize))
        });
        assert_eq!(left[0].0, left[1].0, "seed {seed} phase {phase}: registers");
        if let Some(at) = (0..left[0].1.len()).find(|at| left[0].1[*at] != left[1].1[*at]) {
            panic!("seed {seed} phase {phase}: memory at {:#x}", DATA + at as u64);
        }
    }
    solos[1].base.counter("pages gathered")
}

#[test]
fn random_programs_over_gathered_memory() {
    let _alone = alone();
    let number = |name: &str| std::env::var(name).ok().and_then(|s| s.parse::<u64>().ok());
    let (first, count) = number("MIMUS_TEST_SEED").map_or((0, 6 * scale()), |seed| (seed, 1));
    let gathered: u64 = (first..first + count).map(run_one).sum();
    assert!(gathered > 100, "{gathered} pages were gathered");
}

/// A device owns the upper halves of the pages that a program goes all over: neither's stores are lost while they move.
#[test]
fn a_device_writes_to_pages_that_move() {
    let _alone = alone();
    let random = &mut Random::new(1);
    let code = program(random, true);
    let mapping = Mapping::new(random);
    let (mut gathered, began) = (0, Instant::now());
    // How far a device is when pages move differs, and how many move goes by the time it takes: until that was often enough.
    while gathered < 2000 && began.elapsed() < LIMIT {
        let seed = random.u64();
        let lefts = [Engine::Interp, Engine::Forced].map(|engine| {
            let mut on = solo(engine, &code);
            let random = &mut Random::new(seed);
            let mut state = beginning(&on.state(), random, 30_000);
            for reg in [S2, T6] {
                state.x[reg as usize] &= !2048;
            }
            let mut stored = Vec::new();
            mapping.put(&on);
            on.set(state);
            let (ram, done) = (on.base.ram.clone(), AtomicBool::new(false));
            std::thread::scope(|scope| {
                let device = scope.spawn(|| {
                    let mut written = vec![0u64; DATA_PAGES as usize];
                    let random = &mut Random::new(2);
                    while !done.load(Ordering::Relaxed) {
                        let page = random.below(DATA_PAGES);
                        let value = random.u64();
                        let at = DATA - RAM + page * PAGE + 2048;
                        assert!(ram.store(at, value) && ram.write(at + 1000, &value.to_le_bytes()));
                        let word = ram.load::<u64>(at + 1000);
                        assert_eq!((ram.load::<u64>(at), word), (Some(value), Some(value)), "what was stored");
                        written[page as usize] = value;
                    }
                    written
                });
                let s = on.run(LIMIT).expect("an end");
                assert_eq!(s.mcause, 3, "{:#x} at {:#x}", s.mtval, s.mepc);
                done.store(true, Ordering::Relaxed);
                stored = device.join().expect("the device");
            });
            for (page, value) in (0..).zip(stored) {
                let at = DATA + page * PAGE + 2048;
                assert_eq!((on.base.u64_at(at), on.base.u64_at(at + 1000)), (value, value), "page {page}");
            }
            gathered += on.base.counter("pages gathered");
            (0..DATA_PAGES).map(|page| on.base.bytes(DATA + page * PAGE, 2048)).collect::<Vec<_>>()
        });
        assert!(lefts[0] == lefts[1], "the program's halves, seed {seed}");
    }
    assert!(gathered >= 2000, "{gathered} pages were gathered");
}
