//! Several vCPUs whose code does not fit the code cache, which is emptied over and over while they run.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use mimus_tests::cpus::{Base, Cluster, ENGINES, Engine, RAM, alone};
use mimus_tests::riscv::reg::*;
use mimus_tests::riscv::*;
use mimus_tests::scale;

use crate::smp::{HARTS, done, prepare};

const CODE: u64 = RAM + 0x1000;
const TRAPPED: u64 = RAM + 0x8000;
const DONE: u64 = RAM + 0x11000;
/// What each hart computed last.
const RESULTS: u64 = DONE + 0x400;
/// One function a page.
const FUNCTIONS: u64 = RAM + 0x10_0000;
/// Entry tables that the smallest cache has room for: one a page.
const TABLES: u64 = 512;
const COUNT: u64 = 640;
const LIMIT: Duration = Duration::from_secs(120);

/// What the function of page `n` adds.
fn addend(n: u64) -> i32 {
    (n * 0x9e37 % 0x7ff) as i32
}

/// The function of page `n`: three times `a4` and something of its own, then on to the next page: by a jump that gets linked,
/// or by one that looks its target up.
fn function(n: u64) -> [u32; 5] {
    let next = match n {
        _ if n + 1 == COUNT => jalr(0, RA, 0),
        _ if n.is_multiple_of(2) => jal(0, 4096 - 16),
        _ => jalr(0, T1, 0),
    };
    [add(T1, T1, T2), slli(T0, A4, 1), add(A4, A4, T0), addi(A4, A4, addend(n)), next]
}

/// `a4` after a walk through all functions.
fn walk(before: u64) -> u64 {
    (0..COUNT).fold(before, |a, n| a.wrapping_mul(3).wrapping_add(addend(n) as u64))
}

/// Each hart walks through all functions, and waits for the others without leaving generated code and without a timer that would
/// make it: one that is let back in while another waits for it to be out stays there.
fn program() -> Asm {
    let mut asm = Asm::new(CODE);
    let a = &mut asm;
    a.op([addi(A3, 0, 0), addi(A5, 0, 0), addi(A4, A0, 0)]).li(S2, FUNCTIONS).li(T2, 4096);
    a.label("again").op([addi(T1, S2, 0), jalr(RA, S2, 0)]);
    // The round's meeting: four arrivals more.
    a.op([addi(A5, A5, HARTS as i32), addi(T0, 0, 1), amo_d(Amo::Add, 0, T0, A1)]);
    a.label("meet").op([ld(T0, A1, 0)]).branch(6, T0, A5, "meet");
    a.op([addi(A3, A3, 1)]).branch(1, A3, A2, "again");
    a.op([sd(A4, S0, (RESULTS - DONE) as i32)]);
    done(a);
    asm
}

/// Says so at the end, also at that of a test that fails.
struct EndsIt<'a>(&'a AtomicBool);

impl Drop for EndsIt<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

#[test]
fn vcpus_forget_what_the_cache_has_forgotten() {
    let _alone = alone();
    for engine in ENGINES {
        let rounds = scale() * if engine == Engine::Interp { 5 } else { 25 };
        let cluster = Cluster::over(Base::with_cache(engine, HARTS, 1), HARTS, |hart, s| {
            prepare(hart, s, rounds);
            s.x[S0 as usize] = DONE + 8 * u64::from(hart);
        });
        let base = &cluster.base;
        base.put(CODE, &program().finish());
        base.put_code(TRAPPED, &[csrrw(0, 0x304, 0), insn::WFI, jal(0, -4)]);
        for n in 0..COUNT {
            base.put_code(FUNCTIONS + n * 4096, &function(n));
        }
        cluster.start();
        let emptied = AtomicU64::new(0);
        let over = AtomicBool::new(false);
        std::thread::scope(|scope| {
            // Not on this thread, which has to notice it if nothing goes on.
            scope.spawn(|| {
                // Not for ever: on a slow host nothing would get done in between.
                while !over.load(Ordering::Relaxed) && emptied.load(Ordering::Relaxed) < 1000 {
                    base.forget_code();
                    emptied.fetch_add(1, Ordering::Relaxed);
                    std::thread::sleep(Duration::from_micros(500));
                }
            });
            let _ends = EndsIt(&over);
            let flags = (0..u64::from(HARTS)).map(|i| DONE + 8 * i);
            cluster.wait_for("walks through more code than fits", flags, LIMIT);
        });
        cluster.threads.pause();
        for hart in 0..u64::from(HARTS) {
            let right = (0..rounds).fold(hart, |a, _| walk(a));
            assert_eq!(base.u64_at(RESULTS + 8 * hart), right, "{engine:?}: hart {hart} went astray");
        }
        let translated = base.counter("blocks translated");
        assert!(translated >= rounds * (COUNT - TABLES), "{engine:?}: {translated} blocks: nothing was forgotten");
        println!("{engine:?}: {translated} blocks, emptied {} times besides", emptied.load(Ordering::Relaxed));
    }
}
