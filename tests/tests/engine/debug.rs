//! Breakpoints, watchpoints and single steps of a vCPU, on both engines.

use std::time::{Duration, Instant};

use mimus_arch::riscv::RiscvState;
use mimus_core::accel::{DebugStop, VcpuDebug, VcpuExit, WatchKind};
use mimus_core::bus::GuestVirt;
use mimus_tests::cpus::{ENGINES, Engine, RAM, Solo, alone, open_pmp};
use mimus_tests::riscv::reg::*;
use mimus_tests::riscv::*;

pub const CODE: u64 = RAM + 0x1000;
pub const TRAPPED: u64 = RAM + 0x8000;
pub const DATA: u64 = RAM + 0x20000;
pub const LIMIT: Duration = Duration::from_secs(20);

pub fn on_both(test: impl Fn(Engine)) {
    let _alone = alone();
    ENGINES.into_iter().for_each(test);
}

/// A hart about to run `a`, whose traps end at [`TRAPPED`].
pub fn solo(engine: Engine, a: &mut Asm) -> Solo {
    let mut solo = Solo::new(engine);
    solo.base.put(CODE, &a.finish());
    solo.base.put_code(TRAPPED, &[csrrw(0, 0x304, 0), insn::WFI]);
    let mut state = solo.state();
    open_pmp(&mut state);
    state.pc = CODE;
    state.mtvec = TRAPPED;
    solo.set(state);
    solo
}

pub fn debug(solo: &mut Solo) -> &mut dyn VcpuDebug {
    solo.vcpu.debug().expect("the translator debugs")
}

fn stop(solo: &mut Solo) -> DebugStop {
    match solo.exit(LIMIT) {
        VcpuExit::Debug(stop) => stop,
        other => panic!("{other:?} at {:#x}", solo.state().pc),
    }
}

/// A loop of `n` rounds: calls a function, stores and loads, traps on an `ecall`, and comes back.
pub fn busy(n: u64) -> Asm {
    let mut asm = Asm::new(CODE);
    let a = &mut asm;
    a.li(S0, DATA).li(A2, n).op([addi(A0, 0, 0)]).la(T0, "handler").op([csrrw(0, 0x305, T0)]);
    a.label("again").op([ld(T1, S0, 0), addi(T1, T1, 3), sd(T1, S0, 0), add(A0, A0, T1)]);
    a.jump(RA, "function").op([insn::ECALL, amo_d(Amo::Add, T2, A0, S0), addi(A2, A2, -1)]).bnez(A2, "again");
    a.la(T0, "out").op([csrrw(0, 0x305, T0), insn::EBREAK]);
    a.label("out").op([csrrw(0, 0x304, 0), insn::WFI]);
    a.label("function").op([xor(A3, A0, A2), jalr(0, RA, 0)]);
    while !a.here().is_multiple_of(4) {
        a.half(1);
    }
    a.label("handler").op([csrrs(T3, 0x341, 0), addi(T3, T3, 4), csrrw(0, 0x341, T3), insn::MRET]);
    asm
}

/// All but what depends on time.
pub fn timeless(mut s: RiscvState) -> RiscvState {
    (s.mcycle, s.minstret) = (0, 0);
    s
}

#[test]
fn a_long_single_step_run_ends_as_the_free_run() {
    on_both(|engine| {
        let mut free = solo(engine, &mut busy(2000));
        let wanted = timeless(free.run(LIMIT).expect("an end"));
        let memory = free.base.bytes(DATA, 64);
        drop(free);
        let mut s = solo(engine, &mut busy(2000));
        debug(&mut s).set_single_step(true);
        let (begun, mut steps) = (Instant::now(), 0u64);
        loop {
            match s.exit(LIMIT) {
                VcpuExit::Debug(DebugStop::Step) => steps += 1,
                VcpuExit::Halted => break,
                other => panic!("{other:?}"),
            }
        }
        println!("{engine:?}: {:.0} steps/s", steps as f64 / begun.elapsed().as_secs_f64());
        assert!(steps > 30_000, "{steps}");
        assert_eq!(timeless(s.state()), wanted, "{engine:?}");
        assert_eq!(s.base.bytes(DATA, 64), memory);
    });
}

/// A million steps, a thousand at a time.
#[test]
fn a_million_steps_end_as_the_free_run() {
    let _alone = alone();
    let rounds = 60_000;
    let mut free = solo(Engine::Jit, &mut busy(rounds));
    let wanted = timeless(free.run(LIMIT).expect("an end"));
    let memory = free.base.bytes(DATA, 64);
    drop(free);
    let mut s = solo(Engine::Jit, &mut busy(rounds));
    debug(&mut s).set_single_step(true);
    let (begun, mut steps) = (Instant::now(), 0u64);
    loop {
        debug(&mut s).set_more_steps(999);
        match s.exit(LIMIT) {
            VcpuExit::Debug(DebugStop::Step) => {
                steps += 1000 - debug(&mut s).more_steps().expect("the translator counts them")
            }
            VcpuExit::Halted => break,
            other => panic!("{other:?}"),
        }
    }
    println!("{:.0} steps/s", steps as f64 / begun.elapsed().as_secs_f64());
    assert!(steps > 900_000, "{steps}");
    assert_eq!(timeless(s.state()), wanted);
    assert_eq!(s.base.bytes(DATA, 64), memory);
}

#[test]
fn a_step_is_one_instruction_also_over_exceptions_and_interrupts() {
    on_both(|engine| {
        let a = &mut Asm::new(CODE);
        a.op([addi(A0, A0, 1), insn::ECALL, addi(A0, A0, 2)]);
        let mut s = solo(engine, a);
        debug(&mut s).set_single_step(true);
        assert_eq!((stop(&mut s), s.state().pc, s.state().x[A0 as usize]), (DebugStop::Step, CODE + 4, 1));
        // The exception's handler has not begun.
        assert_eq!((stop(&mut s), s.state().pc, s.state().mepc), (DebugStop::Step, TRAPPED, CODE + 4));
        let mut state = s.state();
        (state.pc, state.mie, state.mideleg) = (CODE + 8, 2, 0);
        state.mip |= 2;
        state.mstatus |= 8;
        s.set(state.clone());
        // Held off, then taken: the step ends at the handler.
        debug(&mut s).set_step_interrupts(false);
        assert_eq!((stop(&mut s), s.state().pc, s.state().x[A0 as usize]), (DebugStop::Step, CODE + 12, 3));
        s.set(state);
        debug(&mut s).set_step_interrupts(true);
        assert_eq!((stop(&mut s), s.state().pc, s.state().x[A0 as usize]), (DebugStop::Step, TRAPPED, 1));
        assert_eq!((s.state().mcause, s.state().mepc), (1 << 63 | 1, CODE + 8));
    });
}

#[test]
fn breakpoints_stop_before_the_instruction_each_time() {
    on_both(|engine| {
        let mut program = busy(50);
        program.finish();
        let places = ["again", "function", "handler", "out"].map(|l| program.address(l));
        let mut s = solo(engine, &mut busy(50));
        // Translated before there is a breakpoint.
        debug(&mut s).insert_breakpoint(GuestVirt(places[1])).unwrap();
        assert_eq!(stop(&mut s), DebugStop::Breakpoint);
        debug(&mut s).remove_breakpoint(GuestVirt(places[1])).unwrap();
        assert!(debug(&mut s).remove_breakpoint(GuestVirt(places[1])).is_err(), "it is gone");
        for at in places {
            debug(&mut s).insert_breakpoint(GuestVirt(at)).unwrap();
        }
        let mut hits = [0; 4];
        let end = loop {
            match s.exit(LIMIT) {
                VcpuExit::Debug(DebugStop::Breakpoint) => {
                    let pc = s.state().pc;
                    hits[places.iter().position(|p| *p == pc).expect("a place with a breakpoint")] += 1;
                }
                VcpuExit::Halted => break s.state(),
                other => panic!("{other:?}"),
            }
        };
        // The first round had begun, and its function been stopped at, before.
        assert_eq!(hits, [49, 49, 50, 1], "{engine:?}");
        let mut free = Solo::new(engine);
        free.base.put(CODE, &busy(50).finish());
        let mut state = free.state();
        open_pmp(&mut state);
        (state.pc, state.mtvec) = (CODE, TRAPPED);
        free.set(state);
        assert_eq!(timeless(end), timeless(free.run(LIMIT).expect("an end")));
    });
}

/// A breakpoint inside an instruction, between instructions of a block that is hot, and one that is taken out.
#[test]
fn breakpoints_where_no_instruction_begins_and_removed_ones_do_nothing() {
    on_both(|engine| {
        let mut s = solo(engine, &mut busy(2000));
        for at in (CODE..CODE + 0x100).step_by(2).filter(|a| a % 4 == 2) {
            debug(&mut s).insert_breakpoint(GuestVirt(at)).unwrap();
        }
        for at in (CODE..CODE + 0x100).step_by(4) {
            debug(&mut s).insert_breakpoint(GuestVirt(at)).unwrap();
        }
        assert_eq!(stop(&mut s), DebugStop::Breakpoint);
        for at in (CODE..CODE + 0x100).step_by(4) {
            debug(&mut s).remove_breakpoint(GuestVirt(at)).unwrap();
        }
        let end = s.run(LIMIT).expect("an end");
        assert_eq!(end.x[A2 as usize], 0, "{engine:?}");
    });
}

#[test]
fn watchpoints_stop_after_the_access() {
    on_both(|engine| {
        let a = &mut Asm::new(CODE);
        a.li(S0, DATA).li(T0, 0x55);
        a.op([sd(T0, S0, 64), ld(T1, S0, 0), sw(T0, S0, 4), sw(T0, S0, 8), lw(T2, S0, 7)]);
        a.op([amo_w(Amo::Add, T3, T0, S0), lr_w(T4, S0), sc_w(T5, T0, S0), sd(T0, S0, -4), csrrw(0, 0x304, 0)]);
        a.op([insn::WFI]);
        let after = |n: u64| CODE + (a.here() - CODE) - 44 + 4 * n;
        let sites: Vec<u64> = (0..11).map(after).collect();
        let mut run = |va: u64, len: u64, kind: WatchKind, expected: &[(u64, u64)]| {
            let mut s = solo(engine, a);
            debug(&mut s).insert_watchpoint(GuestVirt(va), len, kind).unwrap();
            for &(site, at) in expected {
                let stop = stop(&mut s);
                assert_eq!(stop, DebugStop::Watch { va: GuestVirt(at), kind }, "{engine:?} {kind:?} {va:#x}");
                assert_eq!(s.state().pc, sites[site as usize], "{engine:?} {kind:?} {va:#x}");
            }
            assert!(s.run(LIMIT).is_some(), "{engine:?}: an end");
            let words = (s.base.u64_at(DATA), s.base.u64_at(DATA + 8), s.base.u64_at(DATA - 8));
            assert_eq!(words, (0x55 << 32, 0x55, 0x55 << 32), "{engine:?}: everything was done once");
            // A removed watchpoint is not hit.
            let removed = debug(&mut s).remove_watchpoint(GuestVirt(va), len, kind);
            assert!(removed.is_ok() && debug(&mut s).remove_watchpoint(GuestVirt(va), len, kind).is_err());
        };
        let (d, w) = (DATA, WatchKind::Write);
        // 1 sd far, 2 ld, 3 sw +4, 4 sw +8, 5 lw +7, 6 amo, 7 lr, 8 sc, 9 sd -4
        run(d, 8, w, &[(3, d + 4), (6, d), (8, d), (9, d)]);
        run(d + 7, 1, WatchKind::Read, &[(2, d + 7), (5, d + 7)]);
        run(d + 4, 8, WatchKind::ReadWrite, &[(2, d + 4), (3, d + 4), (4, d + 8), (5, d + 7)]);
        // Of any length: the whole of RAM behind the code.
        run(d + 12, RAM + (4 << 20) - d - 12, w, &[(1, d + 64)]);
    });
}

/// What is not hit costs nothing: breakpoints elsewhere in the page of a hot loop, a watchpoint on another page.
#[test]
fn what_is_not_hit_is_cheap() {
    let _alone = alone();
    let rounds = 30_000_000;
    let program = || {
        let mut asm = Asm::new(CODE);
        let a = &mut asm;
        a.li(S0, DATA).li(A2, rounds);
        a.label("again").op([ld(T1, S0, 0), addi(T1, T1, 3), sd(T1, S0, 0), addi(A2, A2, -1)]).bnez(A2, "again");
        a.op([csrrw(0, 0x304, 0), insn::WFI]);
        asm
    };
    let time = |prepare: &dyn Fn(&mut dyn VcpuDebug)| {
        let best = (0..3).map(|_| {
            let mut s = solo(Engine::Jit, &mut program());
            prepare(debug(&mut s));
            let begun = Instant::now();
            assert_eq!(s.run(LIMIT).expect("an end").x[A2 as usize], 0);
            begun.elapsed()
        });
        best.min().expect("runs").as_secs_f64()
    };
    let free = time(&|_| {});
    let broken = time(&|d| {
        for i in 0..1000 {
            d.insert_breakpoint(GuestVirt(CODE + 0x200 + 2 * i)).expect("a breakpoint");
        }
    });
    let watched = time(&|d| d.insert_watchpoint(GuestVirt(DATA + 4096), 8, WatchKind::ReadWrite).expect("one"));
    println!("free {free:.4} s, 1000 breakpoints {broken:.4} s, watchpoint {watched:.4} s");
    // Far from what executing carefully costs, and far from a loaded host's noise.
    assert!(broken < free * 5.0 && watched < free * 5.0, "{free} {broken} {watched}");
}
