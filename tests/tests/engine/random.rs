//! The same random code on generated code and on the interpreter must leave the same hart and memory, whatever
//! it does: run through, trap in the middle, change itself, miss a page.

use std::time::Duration;

use mimus_arch::riscv::{Privilege, RiscvState};
use mimus_tcg_frontend_riscv::disasm::disassemble;
use mimus_tests::cpus::{Engine, RAM, Solo, alone, open_pmp};
use mimus_tests::random::Random;
use mimus_tests::random_code::{CODE_POINTER, COUNTER, DATA_POINTERS, Generator, Item, PATCH, encode, without};
use mimus_tests::riscv::{addi, csrrw, insn};
use mimus_tests::scale;

const M_HANDLER: u64 = RAM + 0x2000;
const S_HANDLER: u64 = RAM + 0x3000;
/// Two pages of code; cases lie across their border or in the first.
const CODE: u64 = RAM + 0x10000;
const DATA: u64 = RAM + 0x20000;
const DATA_LEN: u64 = 4 << 12;
const TABLES: u64 = RAM + 0x40000;
/// Where data is when translation is on.
const VA: u64 = 1 << 30;
const LIMIT: Duration = Duration::from_secs(2);

/// How a case runs.
#[derive(Clone, Copy, Debug)]
enum Mode {
    Machine,
    /// With Sv39 and data pages that differ in what they allow.
    Supervisor,
    User,
}

struct Case {
    items: Vec<Item>,
    state: RiscvState,
    data: Vec<u8>,
    start: u64,
    mode: Mode,
    /// The bits of the four data pages' entries.
    pages: [u64; 4],
}

fn case(generator: &Generator, template: &RiscvState, seed: u64, mode: Mode) -> Case {
    let random = &mut Random::new(seed);
    let n = 4 + random.below(36) as usize;
    let items = generator.case(random, n);
    // Most cases in the middle of a page, some across its end.
    let start = if random.one_in(3) { CODE + 0x1000 - 2 * random.below(80) } else { CODE + 2 * random.below(512) };
    let mut state = template.clone();
    state.pc = start;
    for r in 1..32 {
        state.x[r] = random.value();
        state.f[r] = random.float();
    }
    state.f[0] = random.float();
    let data = if matches!(mode, Mode::Machine) { DATA } else { VA };
    for (n, r) in DATA_POINTERS.iter().enumerate() {
        // Aligned mostly, so that atomics work; the second one away from the edges.
        let slack = if random.one_in(8) { random.below(64) } else { 8 * random.below(8) };
        state.x[*r as usize] = data + 0x1000 * random.below(4) * (1 - n as u64) + 0x800 * n as u64 + slack;
    }
    state.x[CODE_POINTER as usize] = start;
    state.x[COUNTER as usize] = random.below(4);
    state.x[PATCH as usize] = u64::from(addi(10, 11, random.below(100) as i32));
    // Modes 5 and 6 are reserved: instructions with the dynamic mode are illegal.
    let frm = if random.one_in(20) { random.below(8) } else { random.below(5) };
    state.fcsr = frm << 5 | random.below(32);
    state.mstatus |= random.pick(&[1, 2, 3, 3, 3, 3]) << 13;
    state.mtvec = M_HANDLER;
    state.stvec = S_HANDLER;
    open_pmp(&mut state);
    let (rw, rwx) = (0xc7, 0xcf);
    let pages = match random.below(3) {
        0 => [rwx, rw, rw, rw],
        _ => std::array::from_fn(|_| random.pick(&[rw, rw, 0xc3, 0x47, 0x03, 0])),
    };
    match mode {
        Mode::Machine => state.privilege = Privilege::Machine,
        Mode::Supervisor => {
            state.privilege = Privilege::Supervisor;
            state.satp = 8 << 60 | TABLES >> 12;
            state.medeleg = random.pick(&[0, 0xb3ff]);
            state.menvcfg = random.pick(&[0, 1 << 61, 0xf0]);
        }
        Mode::User => {
            state.privilege = Privilege::User;
            state.satp = 8 << 60 | TABLES >> 12;
        }
    }
    let data = (0..DATA_LEN / 8).flat_map(|_| random.value().to_le_bytes()).collect();
    Case { items, state, data, start, mode, pages }
}

/// What a case left behind.
#[derive(PartialEq, Eq)]
struct Left {
    state: RiscvState,
    data: Vec<u8>,
    code: Vec<u8>,
    tables: Vec<u64>,
}

/// Runs a case; `None` if it does not end.
fn run(on: &mut Solo, case: &Case) -> Option<Left> {
    let base = &on.base;
    let user = if matches!(case.mode, Mode::User) { 0x10 } else { 0 };
    let pte = |pa: u64, bits: u64| pa >> 12 << 10 | bits;
    base.put_u64(TABLES + 2 * 8, pte(RAM, 0xcf | user));
    base.put_u64(TABLES + 8, pte(TABLES + 0x1000, 1));
    base.put_u64(TABLES + 0x1000, pte(TABLES + 0x2000, 1));
    for (i, bits) in (0..).zip(case.pages) {
        base.put_u64(TABLES + 0x2000 + 8 * i, pte(DATA + 0x1000 * i, if bits == 0 { 0 } else { bits | user }));
    }
    base.put(DATA, &case.data);
    base.put(CODE, &[0; 0x2000]);
    base.put(case.start, &encode(&case.items));
    on.set(case.state.clone());
    let mut state = on.run(LIMIT)?;
    // How often counters were looked at differs.
    (state.mcycle, state.minstret) = (0, 0);
    let tables = (0..4).map(|i| on.base.u64_at(TABLES + 0x2000 + 8 * i)).collect();
    let data = on.base.bytes(DATA, DATA_LEN as usize);
    Some(Left { state, data, code: on.base.bytes(CODE, 0x2000), tables })
}

/// How the others differ from the first, which is the interpreter.
fn differs(solos: &mut [Solo], case: &Case) -> Option<String> {
    let (first, others) = solos.split_first_mut()?;
    let expected = run(first, case);
    others.iter_mut().find_map(|solo| {
        let (engine, found) = (solo.engine, run(solo, case));
        match (&expected, &found) {
            (None, None) => None,
            (Some(a), Some(b)) if a == b => None,
            (Some(a), Some(b)) => Some(format!("{engine:?}:\n{}", differences(a, b))),
            (a, _) => Some(format!("only {} ended", if a.is_some() { "the interpreter" } else { "generated code" })),
        }
    })
}

fn differences(interp: &Left, jit: &Left) -> String {
    let mut out = Vec::new();
    let (a, b) = (&interp.state, &jit.state);
    for r in 0..32 {
        if a.x[r] != b.x[r] {
            out.push(format!("x{r}: interpreter {:#x}, generated {:#x}", a.x[r], b.x[r]));
        }
        if a.f[r] != b.f[r] {
            out.push(format!("f{r}: interpreter {:#x}, generated {:#x}", a.f[r], b.f[r]));
        }
    }
    let rest = |s: &RiscvState| RiscvState { x: [0; 32], f: [0; 32], ..s.clone() };
    let (a, b) = (format!("{:#?}", rest(a)), format!("{:#?}", rest(b)));
    for (a, b) in a.lines().zip(b.lines()).filter(|(a, b)| a != b) {
        out.push(format!("interpreter {}, generated {}", a.trim(), b.trim()));
    }
    for (name, a, b) in [("data", &interp.data, &jit.data), ("code", &interp.code, &jit.code)] {
        if let Some(at) = (0..a.len()).find(|i| a[*i] != b[*i]) {
            out.push(format!("{name}+{at:#x}: interpreter {:#x}, generated {:#x}", a[at], b[at]));
        }
    }
    if interp.tables != jit.tables {
        out.push(format!("tables: interpreter {:x?}, generated {:x?}", interp.tables, jit.tables));
    }
    out.join("\n")
}

/// As few instructions as still differ.
fn shrink(solos: &mut [Solo], mut case: Case) -> (Case, String) {
    let mut says = differs(solos, &case).unwrap_or_else(|| "not again".into());
    for i in (0..case.items.len()).rev() {
        let Some(items) = without(&case.items, i) else { continue };
        let fewer = Case { items, state: case.state.clone(), data: case.data.clone(), ..case };
        if let Some(text) = differs(solos, &fewer) {
            (case, says) = (fewer, text);
        }
    }
    (case, says)
}

fn listing(case: &Case) -> String {
    let code = encode(&case.items);
    let mut at = 0;
    let mut out = Vec::new();
    while at < code.len() {
        let half = |i: usize| code.get(i..i + 2).map_or(0, |b| u32::from(u16::from_le_bytes([b[0], b[1]])));
        let len = if code[at] & 3 == 3 { 4 } else { 2 };
        let word = if len == 4 { half(at) | half(at + 2) << 16 } else { half(at) };
        let text = disassemble(word, case.start + at as u64).map_or("?".to_owned(), |d| d.to_string());
        if word != insn::NOP && word != 1 {
            out.push(format!("{:#x}: {word:08x} {text}", case.start + at as u64));
        }
        at += len;
    }
    let s = &case.state;
    for r in 0..32 {
        out.push(format!("x{r} {:#x} f{r} {:#x}", s.x[r], s.f[r]));
    }
    out.push(format!("fcsr {:#x} mstatus {:#x} pages {:x?}", s.fcsr, s.mstatus, case.pages));
    out.join("\n")
}

fn compare(mode: Mode, cases: u64) {
    let _alone = alone();
    compare_on(&[Engine::Interp, Engine::Jit], mode, cases);
    compare_on(&[Engine::Interp, Engine::Forced, Engine::Plain, Engine::Compact], mode, cases / 4);
}

fn compare_on(engines: &[Engine], mode: Mode, cases: u64) {
    let mut solos: Vec<Solo> = engines.iter().copied().map(Solo::new).collect();
    for solo in &mut solos {
        // Handlers that stop: with nothing enabled `wfi` never wakes.
        solo.base.put_code(M_HANDLER, &[csrrw(0, 0x304, 0), insn::WFI]);
        solo.base.put_code(S_HANDLER, &[csrrw(0, 0x104, 0), insn::WFI]);
    }
    let template = solos[0].state();
    let generator = Generator::default();
    let number = |name: &str| std::env::var(name).ok().and_then(|s| s.parse::<u64>().ok());
    // One case again, or as many as usual from another on.
    let others = (number("MIMUS_TEST_FIRST").unwrap_or(0), cases * scale());
    let (first, count) = number("MIMUS_TEST_SEED").map_or(others, |seed| (seed, 1));
    let (mut through, mut instructions) = (0, 0);
    for seed in first..first + count {
        let case = case(&generator, &template, seed, mode);
        if differs(&mut solos, &case).is_some() {
            let (case, says) = shrink(&mut solos, case);
            panic!("{mode:?}, MIMUS_TEST_SEED={seed}:\n{says}\n{}", listing(&case));
        }
        let end = case.start + encode(&case.items).len() as u64 - 4;
        let s = solos[0].state();
        through += u64::from([s.mepc, s.sepc].contains(&end));
        instructions += encode(&case.items).len() / 4;
    }
    println!("{mode:?}, {engines:?}: {count} cases of {instructions} instructions, {through} reached their end");
    assert!(count == 1 || through > count / 5, "of {count} cases only {through} reached their end");
}

#[test]
fn random_code_in_machine_mode() {
    compare(Mode::Machine, 3000);
}

#[test]
fn random_code_in_supervisor_mode() {
    compare(Mode::Supervisor, 3000);
}

#[test]
fn random_code_in_user_mode() {
    compare(Mode::User, 1500);
}
