//! What a debugger catches in RISC-V code, on both engines.

use mimus_core::accel::{Catch, Caught, DebugStop, SystemRegister, VcpuExit, WatchKind};
use mimus_tests::cpus::Solo;
use mimus_tests::riscv::reg::*;
use mimus_tests::riscv::*;

use crate::debug::{CODE, DATA, LIMIT, TRAPPED, busy, debug, on_both, solo, timeless};

const MSCRATCH: u16 = 0x340;

fn caught(s: &mut Solo) -> Caught {
    match s.exit(LIMIT) {
        VcpuExit::Debug(DebugStop::Caught(caught)) => caught,
        other => panic!("{other:?} at {:#x}", s.state().pc),
    }
}

#[test]
fn exceptions_are_caught_before_their_handler_and_change_nothing() {
    on_both(|engine| {
        let wanted = timeless(solo(engine, &mut busy(30)).run(LIMIT).expect("an end"));
        let mut program = busy(30);
        program.finish();
        let handler = program.address("handler");
        for catch in [Catch::Exception(Some(11)), Catch::Exception(None)] {
            let mut s = solo(engine, &mut busy(30));
            debug(&mut s).insert_catch(catch).unwrap();
            for round in 0..30 {
                let what = caught(&mut s);
                assert!(matches!(what, Caught::Exception { interrupt: false, cause: 11, .. }), "{what:?}");
                assert_eq!(s.state().pc, handler, "{engine:?}, round {round}");
            }
            if catch == Catch::Exception(None) {
                assert!(matches!(caught(&mut s), Caught::Exception { cause: 3, .. }), "the ebreak");
            }
            assert_eq!(timeless(s.run(LIMIT).expect("an end")), wanted, "{engine:?}");
        }
    });
}

#[test]
fn accesses_to_csrs() {
    on_both(|engine| {
        let a = &mut Asm::new(CODE);
        a.li(T0, 0x50).op([csrrw(0, MSCRATCH, T0), csrrs(T1, MSCRATCH, 0)]);
        a.li(T2, 5).op([csrrs(T3, MSCRATCH, T2), csrrw(0, 0x304, 0), insn::WFI]);
        let mut s = solo(engine, a);
        let register = SystemRegister::Csr(MSCRATCH);
        debug(&mut s).insert_catch(Catch::Register { register, kind: WatchKind::ReadWrite }).unwrap();
        assert_eq!(caught(&mut s), Caught::Register { register, writes: true, value: 0x50 });
        assert_eq!(s.state().mscratch, 0x50);
        assert_eq!(caught(&mut s), Caught::Register { register, writes: false, value: 0x50 });
        assert_eq!(s.state().x[T1 as usize], 0x50, "the stop is after the instruction");
        assert_eq!(caught(&mut s), Caught::Register { register, writes: true, value: 0x55 });
        let end = s.run(LIMIT).expect("an end");
        assert_eq!((end.x[T3 as usize], end.mscratch), (0x50, 0x55), "{engine:?}");
        let fflags = Catch::Register { register: SystemRegister::Csr(1), kind: WatchKind::Read };
        assert!(debug(&mut s).insert_catch(fflags).unwrap_err().to_string().contains("fcsr is"));
    });
}

#[test]
fn modes_and_address_spaces() {
    on_both(|engine| {
        let a = &mut Asm::new(CODE);
        // satp, of no consequence in machine mode; then to user mode, which calls
        a.li(T0, 8 << 60 | 0x8_0000).op([csrrw(0, 0x180, T0), csrrw(0, 0x180, 0)]);
        a.la(T1, "user").op([csrrw(0, 0x341, T1), insn::MRET]);
        a.label("user").op([addi(A0, A0, 1), insn::ECALL]);
        a.finish();
        let user = a.address("user");
        let mut s = solo(engine, a);
        debug(&mut s).insert_catch(Catch::Space(None)).unwrap();
        debug(&mut s).insert_catch(Catch::Mode { mask: 0, value: 0 }).unwrap();
        let root = 8 << 60 | 0x8_0000;
        assert_eq!(caught(&mut s), Caught::Space { from: 0, to: root });
        assert_eq!(s.state().satp, root);
        assert_eq!(caught(&mut s), Caught::Space { from: root, to: 0 });
        assert_eq!(caught(&mut s), Caught::Mode { from: 3, to: 0 });
        assert_eq!((s.state().pc, s.state().x[A0 as usize]), (user, 0), "{engine:?}");
        assert_eq!(caught(&mut s), Caught::Mode { from: 0, to: 3 });
        assert_eq!((s.state().pc, s.state().x[A0 as usize]), (TRAPPED, 1));
        assert!(s.run(LIMIT).is_some());
    });
}

/// Several steps in one go are as many as one by one, and end at a breakpoint and at what is caught.
#[test]
fn steps_in_one_go() {
    on_both(|engine| {
        let mut program = busy(100);
        program.finish();
        let mut s = solo(engine, &mut busy(100));
        debug(&mut s).set_single_step(true);
        debug(&mut s).set_more_steps(99);
        assert!(matches!(s.exit(LIMIT), VcpuExit::Debug(DebugStop::Step)));
        let together = timeless(s.state());
        let mut s = solo(engine, &mut busy(100));
        debug(&mut s).set_single_step(true);
        for _ in 0..100 {
            assert!(matches!(s.exit(LIMIT), VcpuExit::Debug(DebugStop::Step)));
        }
        assert_eq!(timeless(s.state()), together, "{engine:?}");
        let function = program.address("function");
        debug(&mut s).insert_breakpoint(mimus_core::bus::GuestVirt(function)).unwrap();
        for _ in 0..3 {
            debug(&mut s).set_more_steps(999);
            assert!(matches!(s.exit(LIMIT), VcpuExit::Debug(DebugStop::Breakpoint)));
            assert_eq!(s.state().pc, function);
        }
        debug(&mut s).remove_breakpoint(mimus_core::bus::GuestVirt(function)).unwrap();
        debug(&mut s).insert_catch(Catch::Exception(Some(11))).unwrap();
        debug(&mut s).set_more_steps(999);
        assert!(matches!(caught(&mut s), Caught::Exception { cause: 11, .. }));
        assert_eq!(s.state().pc, program.address("handler"));
    });
}

/// Traps are remembered, without anybody having asked.
#[test]
fn the_last_jumps_are_remembered() {
    on_both(|engine| {
        let mut program = busy(3);
        program.finish();
        let mut s = solo(engine, &mut busy(3));
        s.run(LIMIT).expect("an end");
        let jumps = s.vcpu.recent_jumps();
        let handler = program.address("handler");
        let times = |at: u64| jumps.iter().filter(|j| **j == at).count();
        assert_eq!(times(handler), 3, "{engine:?}: {jumps:x?}");
        assert_eq!(jumps.first(), Some(&CODE), "{engine:?}: {jumps:x?}");
        assert!(times(program.address("out")) >= 1 && jumps.len() <= 256, "{engine:?}: {jumps:x?}");
        assert_ne!(s.base.u64_at(DATA), 0);
    });
}
