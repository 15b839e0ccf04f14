//! Breakpoints, watchpoints, single steps.

use crate::harness::*;
use iced_x86::code_asm::*;
use mimus_core::accel::*;
use mimus_core::bus::{GuestPhys, GuestVirt};

fn stop(g: &mut Guest) -> DebugStop {
    match g.run(0) {
        VcpuExit::Debug(stop) => stop,
        other => panic!("{other:?} at {:#x}", g.state(0).linear_pc()),
    }
}

fn debug(g: &mut Guest) -> &mut dyn VcpuDebug {
    g.vcpus[0].debug().expect("debugging")
}

/// Ten times `inc eax` and a loop back.
fn program(g: &mut Guest) {
    g.long(0);
    g.change(0, |s| s.gpr[0] = 0);
    g.code(CODE, 64, |a| {
        let mut again = a.create_label();
        a.set_label(&mut again)?;
        for _ in 0..10 {
            // Two bytes each.
            a.inc(eax)?;
        }
        a.out(0x70, al)?;
        a.jmp(again)
    });
}

#[test]
fn single_steps() {
    let Some(mut g) = Setup::default().build("single_steps") else { return };
    program(&mut g);
    debug(&mut g).set_single_step(true);
    for i in 1..=10 {
        assert_eq!(stop(&mut g), DebugStop::Step);
        let s = g.state(0);
        assert_eq!((s.rip, s.gpr[0]), (CODE + 2 * i, i));
    }
    assert_eq!(stop(&mut g), DebugStop::Step);
    assert_eq!((g.state(0).rip, g.bus.take()), (CODE + 22, vec![Seen::Out(0x70, 1, 10)]), "OUT is one step");
    debug(&mut g).set_single_step(false);
    g.bus.stop_always.store(true, std::sync::atomic::Ordering::Relaxed);
    g.run_to_stop(0);
    assert_eq!(g.state(0).gpr[0], 20);
}

#[test]
fn single_steps_in_real_mode() {
    let Some(mut g) = Setup::default().build("single_steps_in_real_mode") else { return };
    g.real(0);
    g.code(CODE, 16, |a| {
        a.nop()?;
        a.in_(al, 0x60)?;
        a.nop()?;
        a.hlt()
    });
    lock(&g.bus.answers).push_back(7);
    debug(&mut g).set_single_step(true);
    for rip in [1, 3, 4] {
        assert_eq!(stop(&mut g), DebugStop::Step);
        assert_eq!(g.state(0).rip, CODE + rip);
    }
    assert_eq!(g.state(0).gpr[0] & 0xff, 7, "IN is complete at its stop");
}

#[test]
fn breakpoints_in_registers() {
    let Some(mut g) = Setup::default().build("breakpoints_in_registers") else { return };
    program(&mut g);
    let at = |i: u64| GuestVirt(CODE + 2 * i);
    for i in [3, 5] {
        debug(&mut g).insert_breakpoint(at(i)).expect("inserted");
    }
    // Twice round: it goes on from each.
    for value in [3, 5, 13, 15] {
        assert_eq!(stop(&mut g), DebugStop::Breakpoint);
        let s = g.state(0);
        assert_eq!((s.rip, s.gpr[0]), (CODE + 2 * (value % 10), value), "before the instruction");
    }
    // A step from a breakpoint is one step.
    debug(&mut g).set_single_step(true);
    assert_eq!(stop(&mut g), DebugStop::Step);
    assert_eq!(g.state(0).gpr[0], 16);
    debug(&mut g).set_single_step(false);
    debug(&mut g).remove_breakpoint(at(3)).expect("removed");
    assert!(debug(&mut g).remove_breakpoint(at(3)).is_err());
    assert_eq!(stop(&mut g), DebugStop::Breakpoint);
    assert_eq!(g.state(0).gpr[0], 25);
    debug(&mut g).remove_breakpoint(at(5)).expect("removed");
    g.bus.stop_always.store(true, std::sync::atomic::Ordering::Relaxed);
    g.run_to_stop(0);
}

#[test]
fn more_breakpoints_than_registers() {
    let Some(mut g) = Setup::default().build("more_breakpoints_than_registers") else { return };
    program(&mut g);
    let at = |i: u64| GuestVirt(CODE + 2 * i);
    for i in 1..=6 {
        debug(&mut g).insert_breakpoint(at(i)).expect("inserted");
    }
    assert_eq!(debug(&mut g).capabilities().breakpoints, None);
    for round in 0..2 {
        for i in 1..=6 {
            assert_eq!(stop(&mut g), DebugStop::Breakpoint);
            let s = g.state(0);
            assert_eq!((s.rip, s.gpr[0]), (CODE + 2 * i, round * 10 + i));
        }
    }
    for i in 1..=6 {
        debug(&mut g).remove_breakpoint(at(i)).expect("removed");
    }
    let mut code = [0; 20];
    assert!(g.ram.read(CODE, &mut code));
    assert_eq!(code, [0xff, 0xc0].repeat(10)[..], "the code is as it was");
    assert!(debug(&mut g).insert_breakpoint(GuestVirt(1 << 46)).is_ok(), "registers need no memory");
}

#[test]
fn watchpoints() {
    let name = "watchpoints";
    let Some(mut g) = Setup::default().build(name) else { return };
    let long = debug(&mut g).insert_watchpoint(GuestVirt(DATA + 1), 15, WatchKind::Write);
    assert!(long.is_ok(), "1, 2, 4 and 8 bytes");
    debug(&mut g).remove_watchpoint(GuestVirt(DATA + 1), 15, WatchKind::Write).expect("removed");
    let long = debug(&mut g).insert_watchpoint(GuestVirt(DATA + 1), 16, WatchKind::Write);
    assert!(long.unwrap_err().to_string().contains("4 debug registers"));
    for i in 0..4 {
        debug(&mut g).insert_watchpoint(GuestVirt(DATA + i * 8), 8, WatchKind::Write).expect("inserted");
    }
    let fifth = debug(&mut g).insert_watchpoint(GuestVirt(DATA + 64), 8, WatchKind::Write);
    assert!(fifth.unwrap_err().to_string().contains("all 4"));
    if !without(name, quirks().no_watchpoints, "does not report watched accesses") {
        return;
    }
    g.long(0);
    g.code(CODE, 64, |a| {
        a.mov(qword_ptr(DATA + 16), 1)?;
        a.nop()?;
        a.hlt()
    });
    assert_eq!(stop(&mut g), DebugStop::Watch { va: GuestVirt(DATA + 16), kind: WatchKind::Write });
}

/// Breakpoints leave their registers to watchpoints, and points inserted twice are removed twice.
#[test]
fn registers_are_shared() {
    let Some(mut g) = Setup::default().build("registers_are_shared") else { return };
    program(&mut g);
    let at = |i: u64| GuestVirt(CODE + 2 * i);
    for i in [1, 2, 3, 4, 4, 5, 5] {
        debug(&mut g).insert_breakpoint(at(i)).expect("inserted");
    }
    let watch = |g: &mut Guest, n: u64| debug(g).insert_watchpoint(GuestVirt(DATA + 8 * n), 8, WatchKind::Write);
    for n in 0..4 {
        watch(&mut g, n).expect("inserted");
    }
    assert!(watch(&mut g, 4).unwrap_err().to_string().contains("all 4"));
    let byte = |g: &Guest, i| {
        let mut b = [0];
        assert!(g.ram.read(at(i).0, &mut b));
        b[0]
    };
    for i in 1..=5 {
        assert_eq!(byte(&g, i), 0xcc, "{i} is in memory now");
    }
    let mut seen = [0xcc; 12];
    debug(&mut g).hide_breakpoints(GuestPhys(CODE), &mut seen);
    assert_eq!(seen[..4], [0xcc, 0xcc, 0xff, 0xcc]);
    for i in 1..=5 {
        assert_eq!(stop(&mut g), DebugStop::Breakpoint);
        assert_eq!(g.state(0).gpr[0], i);
    }
    for i in [1, 2, 3, 4, 5] {
        debug(&mut g).remove_breakpoint(at(i)).expect("removed");
    }
    assert_eq!((byte(&g, 3), byte(&g, 4), byte(&g, 5)), (0xff, 0xcc, 0xcc));
    for i in [4, 5] {
        debug(&mut g).remove_breakpoint(at(i)).expect("removed");
        assert!(debug(&mut g).remove_breakpoint(at(i)).is_err());
    }
    assert_eq!((byte(&g, 4), byte(&g, 5)), (0xff, 0xff));
    for n in 0..4 {
        debug(&mut g).remove_watchpoint(GuestVirt(DATA + 8 * n), 8, WatchKind::Write).expect("removed");
    }
    assert!(debug(&mut g).remove_watchpoint(GuestVirt(DATA), 8, WatchKind::Write).is_err());
}

#[test]
fn steps_in_user_code() {
    let name = "steps_in_user_code";
    let Some(mut g) = Setup::default().build(name) else { return };
    if !without(name, quirks().no_user_step, "gives steps of user code to the guest") {
        return;
    }
    g.user(0);
    g.code(USER, 64, |a| {
        a.nop()?;
        a.nop()
    });
    debug(&mut g).set_single_step(true);
    assert_eq!(stop(&mut g), DebugStop::Step);
}

#[test]
fn the_guests_own_breakpoint_exception() {
    let name = "the_guests_own_breakpoint_exception";
    let Some(mut g) = Setup::default().build(name) else { return };
    if !without(name, quirks().no_int3, "does not report INT3") {
        return;
    }
    g.long(0);
    g.gate(3, 0x2000);
    g.code(0x2000, 64, |a| a.out(i32::from(PORT_STOP), al));
    g.code(CODE, 64, |a| {
        a.int3()?;
        a.hlt()
    });
    // Five breakpoints elsewhere: one of them is an INT3, and INT3s are reported.
    for i in 0..5 {
        debug(&mut g).insert_breakpoint(GuestVirt(DATA + i)).expect("inserted");
    }
    g.run_to_stop(0);
}

#[test]
fn translations() {
    let Some(mut g) = Setup::default().build("translations") else { return };
    g.long(0);
    g.store(PT + (DATA >> 12) * 8, 0x5000 | 7);
    g.store(PT + ((DATA + 0x1000) >> 12) * 8, 0);
    let mut translate = |va| g.vcpus[0].translate(GuestVirt(va), Access::Read).map(|t| t.pa.0);
    assert_eq!(translate(DATA + 0x123), Ok(0x5123));
    assert!(translate(DATA + 0x1000).is_err());
    assert!(translate(1 << 40).is_err());
}

/// The guest steps itself, and its debug registers hold what it writes.
#[test]
fn the_guests_own_step_and_debug_registers() {
    let Some(mut g) = Setup::default().build("the_guests_own_step_and_debug_registers") else { return };
    g.long(0);
    g.gate(1, 0x2000);
    g.code(0x2000, 64, |a| {
        a.push(rax)?;
        a.mov(rax, dr6)?;
        a.out(0x70, eax)?;
        // No more steps: TF of the saved flags.
        a.and(dword_ptr(rsp + 0x18), !0x100)?;
        a.pop(rax)?;
        a.iretq()
    });
    g.code(CODE, 64, |a| {
        a.pushfq()?;
        a.or(dword_ptr(rsp), 0x100)?;
        a.popfq()?;
        a.nop()?;
        a.nop()?;
        a.mov(rbx, 0x1234_5678_9abc_u64)?;
        a.mov(dr2, rbx)?;
        a.mov(rcx, dr2)?;
        a.mov(rdx, dr7)?;
        a.out(i32::from(PORT_STOP), al)?;
        a.hlt()
    });
    g.run_to_stop(0);
    let seen = g.bus.out_values(0x70);
    assert_eq!((seen.len(), seen[0] & 0x4000), (1, 0x4000), "{seen:x?}");
    let s = g.state(0);
    assert_eq!((s.gpr[1], s.dr[2], s.gpr[2]), (0x1234_5678_9abc, 0x1234_5678_9abc, 0x400));
}

#[test]
fn ports_are_caught_after_the_access() {
    let Some(mut g) = Setup::default().build("ports_are_caught_after_the_access") else { return };
    program(&mut g);
    let catch = Catch::Port { first: 0x70, last: 0x71, kind: WatchKind::Write };
    debug(&mut g).insert_catch(catch).unwrap();
    for round in 1..=3u64 {
        assert_eq!(stop(&mut g), DebugStop::Caught(Caught::Port { port: 0x70, writes: true, value: 10 * round }));
        assert_eq!((g.state(0).rip, g.state(0).gpr[0]), (CODE + 22, 10 * round));
    }
    let refused = debug(&mut g).insert_catch(Catch::Exception(None)).unwrap_err().to_string();
    assert!(refused.contains("-accel tcg"), "{refused}");
    debug(&mut g).remove_catch(catch).unwrap();
    assert!(debug(&mut g).remove_catch(catch).is_err());
}
