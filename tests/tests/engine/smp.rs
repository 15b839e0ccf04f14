//! Four vCPUs at once: atomics, ordering, interrupts between them, timers, remote fences.

use std::time::Duration;

use mimus_arch::riscv::{Privilege, RiscvState};
use mimus_tests::cpus::{Cluster, ENGINES, Engine, RAM, alone, call};
use mimus_tests::riscv::reg::*;
use mimus_tests::riscv::*;
use mimus_tests::scale;

pub const HARTS: u32 = 4;
const CODE: u64 = RAM + 0x1000;
/// Traps end here, waiting for ever.
const TRAPPED: u64 = RAM + 0x8000;
/// Shared data: a cache block for each word.
const SHARED: u64 = RAM + 0x10000;
/// A doubleword for each hart, not 0 when it is done.
const DONE: u64 = RAM + 0x11000;
/// A doubleword for each hart: what it found wrong.
const WRONG: u64 = RAM + 0x12000;
const TABLES: u64 = RAM + 0x20000;
const PAGES: u64 = RAM + 0x30000;
const VA: u64 = 1 << 30;
const LIMIT: Duration = Duration::from_secs(50);

const SIE: u16 = 0x104;
const SIP: u16 = 0x144;
const TIME: u16 = 0xc01;
const STIMECMP: u16 = 0x14d;

/// Starts harts at [`CODE`]: `a0` is the hart, `a1` [`SHARED`], `a2` rounds, `s0` and `s1` where it says that it is
/// done and what was wrong.
pub fn prepare(hart: u32, s: &mut RiscvState, rounds: u64) {
    s.pc = CODE;
    s.mtvec = TRAPPED;
    s.stvec = TRAPPED;
    s.x[A0 as usize] = u64::from(hart);
    s.x[A1 as usize] = SHARED;
    s.x[A2 as usize] = rounds;
    s.x[S0 as usize] = DONE + 8 * u64::from(hart);
    s.x[S1 as usize] = WRONG + 8 * u64::from(hart);
}

/// As the kernel runs: in S-mode, with the firmware's call for what harts do to each other.
pub fn supervisor(s: &mut RiscvState) {
    s.privilege = Privilege::Supervisor;
    s.mideleg = 0x222;
    s.medeleg = 0xb1ff;
    s.mcounteren = 7;
    s.menvcfg = 1 << 63;
}

/// The end of every program.
pub fn done(a: &mut Asm) -> &mut Asm {
    a.op([insn::FENCE, addi(T0, 0, 1), sd(T0, S0, 0)]).label("end").op([insn::WFI]).jump(0, "end")
}

/// Runs a program on all harts and answers the cluster when they are done.
pub fn run(engine: Engine, what: &str, program: &mut Asm, prepare: impl Fn(u32, &mut RiscvState)) -> Cluster {
    let cluster = Cluster::new(engine, HARTS, prepare);
    start(&cluster, what, program);
    cluster
}

/// Loads a program, starts all harts and waits until they are done.
pub fn start(cluster: &Cluster, what: &str, program: &mut Asm) {
    cluster.base.put(CODE, &program.finish());
    cluster.base.put_code(TRAPPED, &[csrrw(0, 0x304, 0), insn::WFI, jal(0, -4)]);
    cluster.start();
    cluster.wait_for(what, (0..u64::from(HARTS)).map(|i| DONE + 8 * i), LIMIT);
    cluster.threads.pause();
    for i in 0..u64::from(HARTS) {
        assert_eq!(cluster.base.u64_at(WRONG + 8 * i), 0, "{what}: hart {i} saw what must not be");
    }
}

/// Fewer rounds for the interpreter, and for what is run besides.
fn rounds(engine: Engine, n: u64) -> u64 {
    let part = match engine {
        Engine::Jit => 1,
        Engine::Forced | Engine::Tiered => 4,
        Engine::Interp | Engine::Plain | Engine::Compact => 10,
    };
    scale() * n / part
}

fn on_both(test: impl Fn(Engine)) {
    let _alone = alone();
    ENGINES.into_iter().for_each(test);
}

#[test]
fn atomic_operations_lose_nothing() {
    on_both(|engine| {
        let n = rounds(engine, 20_000);
        let a = &mut Asm::new(CODE);
        // A bit of its own for each hart, and its number from 1.
        a.op([addi(T1, 0, 1), r(0x33, 1, 0, T1, T1, A0), addi(T4, A0, 1)]);
        a.label("again");
        a.op([addi(T0, 0, 1), amo_d(Amo::Add, 0, T0, A1)]);
        a.op([addi(T3, A1, 64), amo_w(Amo::Add, 0, T0, T3)]);
        a.op([addi(T3, A1, 128), amo_d(Amo::Xor, 0, T1, T3)]);
        a.op([addi(T3, A1, 192), amo_d(Amo::Max, 0, A2, T3)]);
        // Sets its own bit and clears it again: it must be as this hart left it.
        a.op([addi(T3, A1, 256), amo_w(Amo::Or, T5, T1, T3), r(0x33, 7, 0, T5, T5, T1)]);
        a.bnez(T5, "wrong");
        a.op([i(0x13, 4, T6, T1, -1), amo_w(Amo::And, T5, T6, T3), r(0x33, 7, 0, T5, T5, T1)]);
        a.beqz(T5, "wrong");
        // A counter of the upper half of a doubleword.
        a.op([addi(T3, A1, 324), amo_w(Amo::Add, 0, T4, T3)]);
        a.op([addi(A2, A2, -1)]).bnez(A2, "again").jump(0, "right");
        a.label("wrong").op([addi(T0, 0, 1), sd(T0, S1, 0)]);
        a.label("right");
        done(a);
        let c = run(engine, "AMOs", a, |hart, s| prepare(hart, s, n));
        let h = u64::from(HARTS);
        assert_eq!(c.base.u64_at(SHARED), h * n);
        assert_eq!(c.base.u64_at(SHARED + 64), h * n);
        assert_eq!(c.base.u64_at(SHARED + 128), if n.is_multiple_of(2) { 0 } else { 15 });
        assert_eq!(c.base.u64_at(SHARED + 192), n);
        assert_eq!(c.base.u64_at(SHARED + 256), 0);
        assert_eq!(c.base.u64_at(SHARED + 320), (h * (h + 1) / 2 * n) << 32);
    });
}

#[test]
fn load_reserved_and_store_conditional_lose_nothing() {
    on_both(|engine| {
        let n = rounds(engine, 20_000);
        let a = &mut Asm::new(CODE);
        a.label("again");
        a.label("d").op([lr_d(T0, A1), addi(T0, T0, 1), sc_d(T1, T0, A1)]).bnez(T1, "d");
        // Two words of one doubleword.
        a.op([addi(T3, A1, 64)]);
        a.label("w").op([lr_w(T0, T3), addi(T0, T0, 3), sc_w(T1, T0, T3)]).bnez(T1, "w");
        a.op([addi(T3, A1, 68)]);
        a.label("v").op([lr_w(T0, T3), addi(T0, T0, 1), sc_w(T1, T0, T3)]).bnez(T1, "v");
        a.op([addi(A2, A2, -1)]).bnez(A2, "again");
        done(a);
        let c = run(engine, "LR and SC", a, |hart, s| prepare(hart, s, n));
        let sum = u64::from(HARTS) * n;
        assert_eq!(c.base.u64_at(SHARED), sum);
        assert_eq!(c.base.u64_at(SHARED + 64), (sum << 32) | (3 * sum));
    });
}

/// A lock as Linux takes it, around plain loads and stores.
#[test]
fn a_lock_protects_plain_accesses() {
    on_both(|engine| {
        let n = rounds(engine, 10_000);
        let a = &mut Asm::new(CODE);
        a.label("again").op([addi(T0, 0, 1)]);
        // lr.w; try again while taken; sc.w.aq
        a.label("lock").op([r(0x2f, 2, 2 << 2, T1, A1, 0)]).bnez(T1, "lock");
        a.op([r(0x2f, 2, 3 << 2 | 2, T1, A1, T0)]).bnez(T1, "lock");
        a.op([ld(T2, A1, 64), ld(T3, A1, 1024), addi(T2, T2, 1), addi(T3, T3, -1), sd(T2, A1, 64), sd(T3, A1, 1024)]);
        a.op([add(T2, T2, T3)]).beqz(T2, "fine").op([sd(T2, S1, 0)]).label("fine");
        // amoswap.w.rl
        a.op([r(0x2f, 2, 1 << 2 | 1, 0, A1, 0)]);
        a.op([addi(A2, A2, -1)]).bnez(A2, "again");
        done(a);
        let c = run(engine, "a lock", a, |hart, s| prepare(hart, s, n));
        assert_eq!(c.base.u64_at(SHARED + 64), u64::from(HARTS) * n);
    });
}

/// Store buffering: with a full fence between store and load, one of two harts sees the other's store.
#[test]
fn fences_order_a_store_before_a_load() {
    on_both(|engine| {
        let n = rounds(engine, 3_000);
        run(engine, "store buffering", &mut store_buffering(), |hart, s| prepare(hart, s, n));
    });
}

fn store_buffering() -> Asm {
    let mut asm = Asm::new(CODE);
    let a = &mut asm;
    // Harts 0 and 1 work on one block of memory, 2 and 3 on another.
    a.op([i(0x13, 5, T0, A0, 1), slli(T0, T0, 11), add(A1, A1, T0), i(0x13, 7, A0, A0, 1)]);
    // t1: mine, t2: the other's; 64 bytes on, what each saw. t3 counts arrivals, two at each of two meetings a round.
    a.op([slli(T1, A0, 7), add(T1, T1, A1), i(0x13, 4, T2, A0, 1), slli(T2, T2, 7), add(T2, T2, A1)]);
    a.op([addi(T3, A1, 512), addi(A3, 0, 0)]);
    a.label("again").op([addi(A3, A3, 1)]);
    a.op([addi(T0, 0, 1), amo_d(Amo::Add, 0, T0, T3), slli(T4, A3, 2), addi(T4, T4, -2)]);
    a.label("meet").op([insn::PAUSE, ld(T5, T3, 0)]).branch(6, T5, T4, "meet");
    a.op([sd(A3, T1, 0), insn::FENCE, ld(T6, T2, 0), sd(T6, T1, 64), insn::FENCE]);
    a.op([amo_d(Amo::Add, 0, T0, T3), addi(T4, T4, 2)]);
    a.label("look").op([insn::PAUSE, ld(T5, T3, 0)]).branch(6, T5, T4, "look");
    a.op([ld(T5, T2, 64)]).branch(0, T5, A3, "fine").branch(0, T6, A3, "fine").op([sd(A3, S1, 0)]);
    a.label("fine").branch(1, A3, A2, "again");
    done(a);
    asm
}

/// Message passing: data written before a release is there after the acquire.
#[test]
fn released_data_is_seen() {
    on_both(|engine| {
        let n = rounds(engine, 20_000);
        let a = &mut Asm::new(CODE);
        a.op([addi(A3, 0, 0)]).bnez(A0, "reader");
        a.label("write").op([addi(A3, A3, 1), sd(A3, A1, 64), sd(A3, A1, 1024), insn::FENCE, sd(A3, A1, 0)]);
        a.branch(1, A3, A2, "write").jump(0, "over");
        a.label("reader").op([insn::PAUSE, ld(T0, A1, 0), insn::FENCE, ld(T1, A1, 64), ld(T2, A1, 1024)]);
        a.branch(7, T1, T0, "one").op([sd(T0, S1, 0)]).label("one");
        a.branch(7, T2, T0, "two").op([sd(T0, S1, 0)]).label("two");
        a.branch(1, T0, A2, "reader").label("over");
        done(a);
        run(engine, "message passing", a, |hart, s| prepare(hart, s, n));
    });
}

fn call(a: &mut Asm, number: u64) -> &mut Asm {
    a.li(A7, number).op([insn::ECALL])
}

#[test]
fn software_interrupts_wake_harts_in_a_ring() {
    on_both(|engine| {
        let n = rounds(engine, 2_000);
        let a = &mut Asm::new(CODE);
        a.op([addi(A4, A0, 0), addi(T0, 0, 2), csrrw(0, SIE, T0)]);
        // a5: the mask of the next hart
        a.op([addi(T0, A4, 1), i(0x13, 7, T0, T0, 3), addi(A5, 0, 1), r(0x33, 1, 0, A5, A5, T0)]);
        a.bnez(A4, "wait");
        a.label("send").op([addi(A0, A5, 0)]);
        call(a, call::IPI);
        // The last round of hart 0 sends and is done; the others wait for one more.
        a.op([addi(A2, A2, -1)]).beqz(A2, "over");
        a.label("wait").op([insn::WFI, csrrs(T0, SIP, 0), i(0x13, 7, T0, T0, 2)]).beqz(T0, "wait");
        a.op([csrrci(0, SIP, 2), ld(T1, A1, 0), addi(T1, T1, 1), sd(T1, A1, 0)]).jump(0, "send");
        a.label("over");
        done(a);
        let c = run(engine, "IPIs", a, |hart, s| {
            prepare(hart, s, n);
            supervisor(s);
        });
        // Each of the others was woken each round, hart 0 but in the last.
        assert_eq!(c.base.u64_at(SHARED), u64::from(HARTS) * n - 1);
    });
}

#[test]
fn timers_end_waits_in_time() {
    on_both(|engine| {
        let n = 50;
        let a = &mut Asm::new(CODE);
        a.op([addi(T0, 0, 32), csrrw(0, SIE, T0)]);
        // 200 µs at 10 MHz, and some more for each hart
        a.op([slli(T4, A0, 6)]).li(T1, 2000).op([add(T4, T4, T1)]);
        a.label("again").op([csrrs(T0, TIME, 0), add(T0, T0, T4), csrrw(0, STIMECMP, T0)]);
        a.label("wait").op([insn::WFI, csrrs(T1, SIP, 0), i(0x13, 7, T1, T1, 32), csrrs(T2, TIME, 0)]).beqz(T1, "wait");
        a.branch(7, T2, T0, "fine").op([sd(T2, S1, 0)]).label("fine");
        a.op([addi(A2, A2, -1)]).bnez(A2, "again");
        // Out of the way for the last wait.
        a.op([addi(T0, 0, -1), csrrw(0, STIMECMP, T0)]);
        done(a);
        run(engine, "timers", a, |hart, s| {
            prepare(hart, s, n);
            supervisor(s);
        });
    });
}

/// One hart changes a translation and has it fenced on the others; from then on they see the new page.
#[test]
fn remote_fences_of_translations() {
    for number in [call::FENCE_TLB, call::FENCE_RANGE] {
        on_both(|engine| {
            let n = rounds(engine, 1_000);
            let a = &mut Asm::new(CODE);
            a.li(S2, VA).li(S3, TABLES + 0x2000).op([addi(A3, 0, 0)]);
            a.bnez(A0, "reader");
            // Alternates the page, then tells the generation, then waits for three answers.
            a.label("write").op([addi(A3, A3, 1), i(0x13, 7, T0, A3, 1), slli(T0, T0, 10)]);
            a.li(T1, PAGES >> 12 << 10 | 0xc7).op([add(T1, T1, T0), sd(T1, S3, 0), insn::FENCE, insn::SFENCE_ALL]);
            a.op([addi(A4, A1, 0), addi(A6, A2, 0), addi(A0, 0, 14)]).li(A1, VA).li(A2, 4096);
            call(a, number).op([addi(A1, A4, 0), addi(A2, A6, 0), sd(A3, A1, 0), insn::FENCE]);
            a.op([add(T1, A3, A3), add(T1, T1, A3)]);
            a.label("answers").op([insn::PAUSE, ld(T0, A1, 64)]).branch(1, T0, T1, "answers");
            a.branch(1, A3, A2, "write").jump(0, "over");
            // Uses the translation all the time; once told of a generation, it must be the new one.
            a.label("reader").op([insn::PAUSE, ld(T2, S2, 0), ld(T0, A1, 0)]).branch(0, T0, A3, "reader");
            a.op([insn::FENCE, addi(A3, T0, 0), ld(T2, S2, 0), i(0x13, 7, T1, A3, 1)]);
            a.branch(0, T1, T2, "fine").op([addi(T3, A3, 0), sd(T3, S1, 0)]).label("fine");
            a.op([addi(T1, 0, 1), addi(T3, A1, 64), amo_d(Amo::Add, 0, T1, T3)]).branch(1, A3, A2, "reader");
            a.label("over");
            done(a);
            let cluster = Cluster::new(engine, HARTS, |hart, s| {
                prepare(hart, s, n);
                supervisor(s);
                s.satp = 8 << 60 | TABLES >> 12;
            });
            let pte = |pa: u64, bits: u64| pa >> 12 << 10 | bits;
            cluster.base.put_u64(TABLES + 2 * 8, pte(RAM, 0xcf));
            cluster.base.put_u64(TABLES + 8, pte(TABLES + 0x1000, 1));
            cluster.base.put_u64(TABLES + 0x1000, pte(TABLES + 0x2000, 1));
            cluster.base.put_u64(TABLES + 0x2000, pte(PAGES, 0xc7));
            cluster.base.put_u64(PAGES + 0x1000, 1);
            start(&cluster, "remote fences", a);
        });
    }
}
