//! Code that changes: by the hart itself, by another hart, by a device, under blocks that cross a page.

use std::time::Duration;

use mimus_arch::riscv::RiscvState;
use mimus_tests::cpus::{ENGINES, Engine, RAM, Solo, alone, call, open_pmp};
use mimus_tests::riscv::reg::*;
use mimus_tests::riscv::*;

use crate::smp::{done, prepare, run, supervisor};

const CODE: u64 = RAM + 0x1000;
const TRAPPED: u64 = RAM + 0x8000;
const FUNCTION: u64 = RAM + 0x9000;
const LIMIT: Duration = Duration::from_secs(20);

fn solo(engine: Engine) -> (Solo, RiscvState) {
    let mut solo = Solo::new(engine);
    solo.base.put_code(TRAPPED, &[csrrw(0, 0x304, 0), insn::WFI]);
    let mut state = solo.state();
    open_pmp(&mut state);
    state.pc = CODE;
    state.mtvec = TRAPPED;
    (solo, state)
}

fn on_both(test: impl Fn(Engine)) {
    let _alone = alone();
    ENGINES.into_iter().for_each(test);
}

/// `ret`
const RET: u32 = jalr(0, RA, 0);

/// A function is rewritten and called, many times, at every place around the end of a page.
#[test]
fn rewritten_functions_do_the_new_thing() {
    on_both(|engine| {
        let (mut solo, state) = solo(engine);
        for offset in (0x1ff0u64..0x2004).step_by(2) {
            let function = FUNCTION + offset;
            let a = &mut Asm::new(CODE);
            a.li(S0, function).li(S1, u64::from(addi(A0, A0, 0))).op([addi(A2, 0, 200), addi(A0, 0, 0)]);
            a.label("again");
            // addi a0, a0, i: the immediate is in the upper 12 bits.
            a.op([slli(T0, A2, 20), or(T0, T0, S1)]);
            a.op([s(1, T0, S0, 0), i(0x13, 5, T0, T0, 16), s(1, T0, S0, 2), insn::FENCE_I]);
            a.op([jalr(RA, S0, 0), jalr(RA, S0, 0), addi(A2, A2, -1)]).bnez(A2, "again").op([insn::EBREAK]);
            solo.base.put(CODE, &a.finish());
            solo.base.put_code(function, &[insn::NOP, RET]);
            solo.set(state.clone());
            let s = solo.run(LIMIT).expect("an end");
            assert_eq!((s.mcause, s.x[A0 as usize]), (3, 200 * 201), "{engine:?} at {function:#x}");
        }
    });
}

/// A loop that changes an instruction of its own block each time round.
#[test]
fn a_loop_that_changes_itself() {
    on_both(|engine| {
        let (mut solo, state) = solo(engine);
        let a = &mut Asm::new(CODE);
        a.op([addi(A0, 0, 0), addi(A2, 0, 500)]).la(S0, "patched").li(T1, 1 << 20);
        a.label("again").op([lw(T0, S0, 0), add(T0, T0, T1), sw(T0, S0, 0), insn::FENCE_I]);
        a.label("patched").op([addi(A0, 0, 0), addi(A2, A2, -1)]).bnez(A2, "again").op([insn::EBREAK]);
        solo.base.put(CODE, &a.finish());
        solo.set(state);
        let s = solo.run(LIMIT).expect("an end");
        assert_eq!((s.mcause, s.x[A0 as usize]), (3, 500), "{engine:?}");
    });
}

/// Data in the page of running code is written without end: slow at worst, never wrong.
#[test]
fn data_beside_code() {
    on_both(|engine| {
        let (mut solo, state) = solo(engine);
        let a = &mut Asm::new(CODE);
        a.op([addi(A0, 0, 0)]).li(A2, 20_000).la(S0, "data");
        a.label("again").op([ld(T0, S0, 0), addi(T0, T0, 1), sd(T0, S0, 0), addi(A2, A2, -1)]).bnez(A2, "again");
        a.op([ld(A0, S0, 0), insn::EBREAK, insn::NOP, insn::NOP]);
        while !a.here().is_multiple_of(8) {
            a.op([insn::NOP]);
        }
        a.label("data").op([0, 0]);
        solo.base.put(CODE, &a.finish());
        solo.set(state);
        let s = solo.run(LIMIT).expect("an end");
        assert_eq!((s.mcause, s.x[A0 as usize]), (3, 20_000), "{engine:?}");
    });
}

/// What a device writes over code is what runs next, even without `fence.i` once the vCPU has stopped.
#[test]
fn a_device_writes_over_code() {
    on_both(|engine| {
        let (mut solo, state) = solo(engine);
        for n in 0..50 {
            solo.base.put_code(CODE, &[addi(A0, 0, n), insn::EBREAK]);
            solo.set(state.clone());
            let s = solo.run(LIMIT).expect("an end");
            assert_eq!(s.x[A0 as usize], n as u64, "{engine:?}");
        }
    });
}

/// One hart rewrites a function and fences the others, which then run the new one: by the firmware's remote
/// fence, and by their own `fence.i`.
#[test]
fn other_harts_run_the_new_code() {
    for own_fence in [false, true] {
        on_both(|engine| {
            let n = if engine == Engine::Jit { 500 } else { 100 };
            let a = &mut Asm::new(CODE);
            a.li(S2, FUNCTION).li(S3, u64::from(addi(A5, 0, 0))).op([addi(A3, 0, 0)]).bnez(A0, "reader");
            a.label("write").op([addi(A3, A3, 1), slli(T0, A3, 20), or(T0, T0, S3), sw(T0, S2, 0), insn::FENCE]);
            if !own_fence {
                a.op([addi(A0, 0, 14)]).li(A7, call::FENCE_I).op([insn::ECALL]);
            }
            a.op([sd(A3, A1, 0), insn::FENCE, add(T1, A3, A3), add(T1, T1, A3)]);
            a.label("answers").op([insn::PAUSE, ld(T0, A1, 64)]).branch(1, T0, T1, "answers");
            a.branch(1, A3, A2, "write").jump(0, "over");
            // Calls it all the time: any version will do until a generation is told.
            a.label("reader").op([insn::PAUSE, jalr(RA, S2, 0), ld(T0, A1, 0)]).branch(0, T0, A3, "reader");
            a.op([insn::FENCE, if own_fence { insn::FENCE_I } else { insn::NOP }]);
            a.op([addi(A3, T0, 0), jalr(RA, S2, 0)]);
            a.branch(0, A5, A3, "fine").op([sd(A3, S1, 0)]).label("fine");
            a.op([addi(T1, 0, 1), addi(T3, A1, 64), amo_d(Amo::Add, 0, T1, T3)]).branch(1, A3, A2, "reader");
            a.label("over");
            done(a);
            // The function follows the program, so that one write puts both.
            let mut code = a.finish();
            code.resize((FUNCTION - CODE) as usize, 0);
            let words: Vec<u32> = code.chunks(4).map(|w| u32::from_le_bytes([w[0], w[1], w[2], w[3]])).collect();
            let whole = &mut Asm::new(CODE);
            whole.op(words).op([addi(A5, 0, 0), RET]);
            run(engine, "code of others", whole, |hart, s| {
                prepare(hart, s, n);
                supervisor(s);
            });
        });
    }
}
