//! Several vCPUs: start-up by INIT and SIPI, atomic operations across them, kicks.

use crate::harness::*;
use crate::interrupts::{LAPIC, init_pic};
use crate::stress::Live;
use iced_x86::code_asm::*;
use mimus_core::accel::*;
use std::time::{Duration, Instant};

const TOTAL: u64 = DATA;
const READY: u64 = DATA + 8;
const ROUNDS: u32 = 1000;

/// Each application processor adds to a counter in two ways, then says that it is done.
fn application(g: &Guest) {
    g.code(0x2000, 16, |a| {
        let mut again = a.create_label();
        let mut retry = a.create_label();
        a.xor(ax, ax)?;
        a.mov(ds, ax)?;
        // Segment DATA >> 4.
        a.mov(ax, (DATA >> 4) as i32)?;
        a.mov(ds, ax)?;
        a.mov(cx, ROUNDS as i32)?;
        a.set_label(&mut again)?;
        a.lock().inc(dword_ptr(0))?;
        a.set_label(&mut retry)?;
        a.mov(eax, dword_ptr(0))?;
        a.mov(ebx, eax)?;
        a.inc(ebx)?;
        a.lock().cmpxchg(dword_ptr(0), ebx)?;
        a.jnz(retry)?;
        a.loop_(again)?;
        a.lock().inc(dword_ptr(8))?;
        a.cli()?;
        a.hlt()
    });
}

#[test]
fn start_up_by_interrupts() {
    for mode in [IrqChipMode::Kernel, IrqChipMode::Split] {
        let Some(mut g) = Setup::mode(mode).smp(4).build("start_up_by_interrupts") else { return };
        application(&g);
        g.long(0);
        g.code(CODE, 64, |a| {
            let mut wait = a.create_label();
            init_pic(a, [0xff, 0xff])?;
            a.mov(ebx, LAPIC as u32)?;
            a.mov(dword_ptr(rbx + 0xf0), 0x1ff)?;
            // INIT, then SIPI to 0x2000, to all but itself.
            a.mov(dword_ptr(rbx + 0x300), 0xc_4500)?;
            a.mov(dword_ptr(rbx + 0x300), 0xc_4602)?;
            a.set_label(&mut wait)?;
            a.pause()?;
            a.cmp(dword_ptr(READY), 3)?;
            a.jb(wait)?;
            a.out(i32::from(PORT_STOP), al)?;
            a.hlt()
        });
        let live = Live::start(g);
        live.wait_for("all are done", |g| !g.bus.out_values(PORT_STOP).is_empty());
        let g = live.stop();
        assert_eq!(g.load(TOTAL), u64::from(ROUNDS) * 2 * 3, "{mode:?}");
    }
}

#[test]
fn start_up_by_the_machine() {
    let Some(g) = Setup::mode(IrqChipMode::User).smp(3).build("start_up_by_the_machine") else { return };
    application(&g);
    let live = Live::paused(g);
    let how = StartRequest { pc: 0x2000, arg0: 0, arg1: 0 };
    for i in 1..3 {
        assert!(live.threads.start_vcpu(VcpuIndex(i), how));
    }
    live.threads.resume();
    live.wait_for("both are done", |g| g.load(READY) == 2);
    let g = live.stop();
    assert_eq!(g.load(TOTAL), u64::from(ROUNDS) * 2 * 2);
}

#[test]
fn atomic_between_native_and_emulated_code() {
    let name = "atomic_between_native_and_emulated_code";
    let Some(mut g) = Setup::default().smp(4).build(name) else { return };
    const NATIVE: u32 = 200_000;
    for (at, rounds) in [(CODE, ROUNDS), (USER, NATIVE)] {
        g.code(at, 64, |a| {
            let mut again = a.create_label();
            let mut retry = a.create_label();
            let mut end = a.create_label();
            a.mov(ecx, rounds)?;
            a.set_label(&mut again)?;
            a.lock().inc(qword_ptr(TOTAL))?;
            a.set_label(&mut retry)?;
            a.mov(rax, qword_ptr(TOTAL))?;
            a.mov(rbx, rax)?;
            a.inc(rbx)?;
            a.lock().cmpxchg(qword_ptr(TOTAL), rbx)?;
            a.jnz(retry)?;
            a.dec(ecx)?;
            a.jnz(again)?;
            a.lock().inc(dword_ptr(READY))?;
            a.set_label(&mut end)?;
            a.pause()?;
            a.jmp(end)
        });
    }
    (0..2).for_each(|i| g.long(i));
    (2..4).for_each(|i| g.user(i));
    let live = Live::start(g);
    live.wait_for("all are done", |g| g.load(READY) == 4);
    let g = live.stop();
    assert_eq!(g.load(TOTAL), 2 * 2 * u64::from(ROUNDS + NATIVE));
}

#[test]
fn kicks_are_quick_and_not_lost() {
    let Some(mut g) = Setup::default().smp(4).build("kicks_are_quick_and_not_lost") else { return };
    let spin = |a: &mut CodeAssembler| {
        let mut again = a.create_label();
        a.set_label(&mut again)?;
        a.lock().inc(qword_ptr(TOTAL))?;
        a.jmp(again)
    };
    g.code(CODE, 64, spin);
    g.code(USER, 64, spin);
    (0..2).for_each(|i| g.long(i));
    (2..4).for_each(|i| g.user(i));
    // A kick before `run` counts.
    g.vcpus[0].handle().kick();
    assert!(matches!(g.run(0), VcpuExit::Kicked));
    let live = Live::start(g);
    let start = Instant::now();
    for _ in 0..1000 {
        for i in 0..4 {
            live.threads.handle(VcpuIndex(i)).expect("a handle").kick();
        }
        std::thread::sleep(Duration::from_micros(300));
    }
    let before = live.guest.load(TOTAL);
    live.wait_for("it still runs", |g| g.load(TOTAL) > before + 1000);
    // Each vCPU serves its queue at once, from inside the guest.
    for i in 0..4 {
        let asked = Instant::now();
        live.threads.run_on_sync(VcpuIndex(i), |v| v.handle().index()).expect("served");
        assert!(asked.elapsed() < Duration::from_secs(120), "{:?}", asked.elapsed());
    }
    assert!(start.elapsed() < Duration::from_secs(300));
    let g = live.stop();
    assert!(g.statistic("interrupted entries") > 100);
}
