//! State: out of one machine, into a fresh one, in the middle of whatever it does.

use crate::harness::*;
use crate::interrupts::init_pic;
use iced_x86::code_asm::*;
use mimus_arch::x86::regs::*;
use mimus_arch::x86::state::{Exception, Interrupt};
use mimus_arch::x86::{MpState, X86State, msr};
use mimus_arch::{CpuState, StateGroups};
use mimus_core::accel::*;
use std::sync::atomic::Ordering;

type Result = std::result::Result<(), iced_x86::IcedError>;

/// Answers that depend on the question only.
fn deterministic(g: &Guest) {
    g.bus.set_handler(|_, seen| match seen {
        Seen::In(port, size) => Some(u64::from(*port) * 0x0101_0101 + size),
        Seen::Read(addr, size) => Some(addr.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ size),
        _ => None,
    });
    g.bus.stop_always.store(true, Ordering::Relaxed);
}

fn memory(g: &Guest) -> Vec<u8> {
    let mut bytes = vec![0; RAM as usize];
    assert!(g.ram.read(0, &mut bytes));
    bytes
}

/// What must not differ: all but time.
fn timeless(mut s: X86State) -> X86State {
    (s.tsc, s.tsc_khz) = (0, 0);
    s.msrs.retain(|m| m.index != msr::TSC_ADJUST);
    s
}

/// Runs until the guest stops; how many exits, what was seen, memory and state at the end.
fn unbroken(g: &mut Guest) -> (usize, Vec<Seen>, Vec<u8>, X86State) {
    let mut exits = 0;
    loop {
        g.run_to_stop(0);
        exits += 1;
        assert!(exits < 200, "it does not end");
        if lock_last(g) {
            break;
        }
    }
    (exits, g.bus.take(), memory(g), timeless(g.state(0)))
}

/// True if the last thing seen was the end. User code ends by a write behind the hole.
fn lock_last(g: &Guest) -> bool {
    let seen = g.bus.take();
    let end = matches!(seen.last(), Some(Seen::Out(PORT_STOP, ..) | Seen::Write(END, ..)));
    g.bus.put_back(seen);
    end
}

const END: u64 = HOLE + 0x1_0000;

/// Breaks the program off at each of its exits and finishes it in a fresh machine.
fn at_every_exit(name: &str, setup: Setup, prepare: impl Fn(&mut Guest)) {
    let make = || {
        let mut g = setup.clone().build(name)?;
        deterministic(&g);
        prepare(&mut g);
        Some(g)
    };
    let Some(mut whole) = make() else { return };
    let (exits, seen, ram, end) = unbroken(&mut whole);
    assert!(exits >= 12, "{exits} exits are few");
    for at in 1..exits {
        let Some(mut first) = make() else { return };
        for _ in 0..at {
            first.run_to_stop(0);
        }
        let mut second = first.twin();
        deterministic(&second);
        move_state(&mut first, &mut second);
        let mut all = first.bus.take();
        drop(first);
        let (_, rest, memory, state) = unbroken(&mut second);
        all.extend(rest);
        assert_eq!(all, seen, "after exit {at}");
        assert!(memory == ram, "memory differs after exit {at}");
        assert_eq!(state, end, "after exit {at}");
    }
}

/// vCPUs first, then chips, as a machine restores them. Through bytes, as a file has them.
fn move_state(from: &mut Guest, to: &mut Guest) {
    for i in 0..from.vcpus.len() {
        let state = from.vcpus[i].get_state(StateGroups::All);
        to.vcpus[i].set_state(&state).expect("a valid state");
    }
    for ((name, a), (_, b)) in from.devices().into_iter().zip(to.devices()) {
        b.restore(&a.save().expect("saved")).unwrap_or_else(|e| panic!("{name}: {e}"));
    }
}

/// Accesses of all kinds, an exception, flags and vector registers in flight.
fn supervisor(a: &mut CodeAssembler) -> Result {
    let mut again = a.create_label();
    a.mov(ebx, HOLE as u32)?;
    a.mov(r12, 0x0123_4567_89ab_cdefu64)?;
    a.mov(ecx, 4)?;
    a.set_label(&mut again)?;
    a.movdqu(xmm1, xmmword_ptr(rbx + 0x40))?;
    a.in_(eax, 0x60)?;
    a.add(r12, rax)?;
    a.out(0x61, eax)?;
    a.mov(qword_ptr(rbx), r12)?;
    a.movdqu(xmmword_ptr(DATA + 0x100), xmm1)?;
    a.mov(rax, qword_ptr(rbx + 0x1ffc))?;
    a.lock().xadd(qword_ptr(DATA), rax)?;
    a.stc()?;
    a.in_(al, 0x62)?;
    a.adc(r12, rax)?;
    a.mov(qword_ptr(DATA + 8), r12)?;
    a.ud2()?;
    a.dec(ecx)?;
    a.jnz(again)?;
    // Strings, both ways.
    a.mov(edi, DATA as u32 + 0x200)?;
    a.mov(edx, 0x63)?;
    a.mov(ecx, 5)?;
    a.rep().insd()?;
    a.mov(esi, DATA as u32 + 0x200)?;
    a.mov(ecx, 3)?;
    a.rep().outsb()?;
    a.mov(edi, HOLE as u32 + 0x800)?;
    a.mov(ecx, 3)?;
    a.rep().stosd()?;
    a.out(i32::from(PORT_STOP), al)?;
    a.hlt()
}

fn skip_ud2(g: &Guest) {
    g.gate(6, 0x2000);
    g.code(0x2000, 64, |a| {
        a.add(qword_ptr(rsp), 2)?;
        a.out(0x64, al)?;
        a.iretq()
    });
}

#[test]
fn supervisor_program_moved_at_every_exit() {
    for mode in [IrqChipMode::User, IrqChipMode::Split, IrqChipMode::Kernel] {
        at_every_exit("supervisor_program_moved_at_every_exit", Setup::mode(mode), |g| {
            skip_ud2(g);
            g.code(CODE, 64, supervisor);
            g.long(0);
        });
    }
}

#[test]
fn user_program_moved_at_every_exit() {
    at_every_exit("user_program_moved_at_every_exit", Setup::default(), |g| {
        g.code(USER, 64, |a| {
            let mut again = a.create_label();
            a.mov(ebx, HOLE as u32)?;
            a.mov(ecx, 6)?;
            a.mov(eax, 3)?;
            a.cvtsi2sd(xmm1, eax)?;
            a.finit()?;
            a.fldpi()?;
            a.set_label(&mut again)?;
            a.mov(rax, qword_ptr(rbx + 8))?;
            a.and(eax, 0xffff)?;
            a.cvtsi2sd(xmm2, eax)?;
            a.addsd(xmm1, xmm2)?;
            a.sqrtsd(xmm3, xmm1)?;
            a.mulsd(xmm1, xmm3)?;
            a.fld1()?;
            a.faddp(st1, st0)?;
            a.mov(dword_ptr(rbx), ecx)?;
            a.popcnt(edx, eax)?;
            a.mov(dword_ptr(DATA + 0x20), edx)?;
            a.movsd_2(qword_ptr(DATA), xmm1)?;
            a.fst(qword_ptr(DATA + 8))?;
            a.dec(ecx)?;
            a.jnz(again)?;
            a.mov(dword_ptr(END), ecx)
        });
        g.user(0);
    });
}

#[test]
fn real_mode_program_moved_at_every_exit() {
    at_every_exit("real_mode_program_moved_at_every_exit", Setup::default(), |g| {
        g.write(0x21 * 4, &[0, 0x20, 0, 0]);
        g.code(0x2000, 16, |a| {
            a.in_(al, 0x20)?;
            a.iret()
        });
        g.code(CODE, 16, |a| {
            let mut again = a.create_label();
            a.mov(cx, 5)?;
            a.set_label(&mut again)?;
            a.int(0x21)?;
            a.out(0x30, al)?;
            a.mov(bx, cx)?;
            a.mov(word_ptr(bx + 0x6000), ax)?;
            a.loop_(again)?;
            a.mov(di, 0x5000)?;
            a.mov(dx, 0x40)?;
            a.mov(cx, 4)?;
            a.rep().insw()?;
            a.out(i32::from(PORT_STOP), al)?;
            a.hlt()
        });
        g.real(0);
    });
}

#[test]
fn whole_state_round_trip() {
    let Some(mut g) = Setup::default().build("whole_state_round_trip") else { return };
    g.long(0);
    let mut s = g.state(0);
    s.gpr = std::array::from_fn(|i| 0x0101_0101_0101_0101u64.wrapping_mul(i as u64 + 1));
    s.rflags = RFLAGS_FIXED | RFLAGS_CF | RFLAGS_DF | RFLAGS_IF | RFLAGS_AC;
    s.cr2 = 0x1234_5000;
    s.cr8 = 3;
    s.dr = [0x1000, 0x2000, 0x3000, 0x4000];
    s.dr7 = DR7_FIXED | 0x55;
    s.fs.base = 0x7fff_1234_5678;
    s.gs.base = 0xffff_8000_1234_5678;
    for (index, value) in [
        (msr::STAR, 0x0013_0008_0000_0000),
        (msr::LSTAR, 0xffff_ffff_8100_0000),
        (msr::FMASK, 0x4_7700),
        (msr::KERNEL_GS_BASE, 0xffff_8800_0000_0000),
        (msr::SYSENTER_EIP, 0x1000),
        (msr::PAT, 0x0407_0106_0007_0406),
    ] {
        s.set_msr(index, value);
    }
    s.msrs.sort_unstable();
    let avx = s.xcr0 | 7;
    s.xcr0 = avx;
    let used = XCR0_X87 | XCR0_SSE | XCR0_AVX;
    s.xsave.resize(832, 0);
    s.xsave[XSAVE_XSTATE_BV] = used as u8;
    (160..416).chain(576..832).for_each(|i| s.xsave[i] = i as u8);
    s.xsave[XSAVE_MXCSR..XSAVE_MXCSR + 4].copy_from_slice(&0x1fa0u32.to_le_bytes());
    s.events.shadow_sti = true;
    s.events.nmi_masked = true;
    s.events.interrupt = Some(Interrupt { vector: 0x41, soft: false });
    s.events.intr = true;
    g.set(0, s.clone());
    assert_eq!(timeless(g.state(0)), timeless(s.clone()));
    // Exceptions, alone.
    for exception in [
        Exception { vector: 13, error_code: Some(8), payload: None },
        Exception { vector: 14, error_code: Some(2), payload: Some(0x1_2345) },
        Exception { vector: 6, error_code: None, payload: None },
    ] {
        (s.events.interrupt, s.events.exception) = (None, Some(exception));
        g.set(0, s.clone());
        assert_eq!(g.state(0).events, s.events);
    }
    let core = x86(g.vcpus[0].get_state(StateGroups::Core));
    assert_eq!((core.gpr, core.rip, core.cr3), (s.gpr, s.rip, s.cr3));
    assert!(g.vcpus[0].get_state(StateGroups::Execution).as_x86().is_some_and(|e| e.xsave == s.xsave));
    let hart = mimus_arch::riscv::RiscvState::new(0, 0, 0);
    assert!(g.vcpus[0].set_state(&CpuState::Riscv(Box::new(hart))).is_err());
}

#[test]
fn pending_exception_is_delivered_elsewhere() {
    let name = "pending_exception_is_delivered_elsewhere";
    let Some(mut g) = Setup::default().build(name) else { return };
    g.long(0);
    g.gate(14, 0x2000);
    g.code(0x2000, 64, |a| {
        a.pop(rax)?;
        a.out(0x70, eax)?;
        a.mov(rax, cr2)?;
        a.out(0x70, eax)?;
        a.out(i32::from(PORT_STOP), al)
    });
    g.change(0, |s| {
        s.events.exception = Some(Exception { vector: 14, error_code: Some(6), payload: None });
        s.cr2 = 0x5_4321;
    });
    let state = g.state(0);
    let mut twin = g.twin();
    twin.set(0, state);
    twin.run_to_stop(0);
    assert_eq!(twin.bus.out_values(0x70), [6, 0x5_4321]);
}

#[test]
fn halted_and_waiting_vcpus() {
    for mode in [IrqChipMode::User, IrqChipMode::Kernel, IrqChipMode::Split] {
        let Some(mut g) = Setup::mode(mode).smp(2).build("halted_and_waiting_vcpus") else { return };
        assert_eq!(g.state(0).mp_state, MpState::Running);
        assert_eq!(g.state(1).mp_state, MpState::WaitForSipi);
        g.long(0);
        g.code(CODE, 64, |a| {
            init_pic(a, [0xff, 0xff])?;
            a.hlt()
        });
        let handle = g.vcpus[0].handle();
        std::thread::scope(|s| {
            s.spawn(|| {
                std::thread::sleep(std::time::Duration::from_millis(20));
                handle.kick();
            });
            let exit = g.run(0);
            assert!(matches!(exit, VcpuExit::Halted | VcpuExit::Kicked), "{exit:?}");
        });
        let s = g.state(0);
        assert_eq!(s.mp_state, MpState::Halted, "{mode:?}");
        let mut twin = g.twin();
        move_state(&mut g, &mut twin);
        assert_eq!(twin.state(0).mp_state, MpState::Halted);
        assert_eq!(twin.state(1).mp_state, MpState::WaitForSipi);
    }
}

#[test]
fn init_keeps_what_it_must() {
    let Some(mut g) = Setup::mode(IrqChipMode::User).smp(2).build("init_keeps_what_it_must") else { return };
    g.long(1);
    g.change(1, |s| {
        s.set_msr(msr::LSTAR, 0x1234);
        s.xsave[XSAVE_XSTATE_BV] |= XCR0_SSE as u8;
        s.xsave[160] = 9;
        s.gpr[RAX] = 5;
    });
    g.vcpus[1].handle().set_pin(CpuPin::Init, true);
    assert!(matches!(g.run(1), VcpuExit::Halted), "it waits for a start-up interrupt");
    let s = g.state(1);
    assert_eq!((s.mp_state, s.gpr[RAX], s.linear_pc()), (MpState::WaitForSipi, 0, 0xffff_fff0));
    assert_eq!((s.msr(msr::LSTAR), s.xsave[160]), (Some(0x1234), 9));
    g.vcpus[1].reset(ResetKind::Warm, Some(StartRequest { pc: 0x3000, arg0: 0, arg1: 0 }));
    let s = g.state(1);
    assert_eq!((s.mp_state, s.cs.selector, s.rip, s.msr(msr::LSTAR)), (MpState::Running, 0x300, 0, Some(0x1234)));
    g.code(0x3000, 16, |a| a.out(i32::from(PORT_STOP), al));
    g.run_to_stop(1);
    // The machine's reset resets all.
    g.vcpus[1].reset(ResetKind::Warm, None);
    let s = g.state(1);
    assert_eq!((s.mp_state, s.msr(msr::LSTAR), s.xsave[160]), (MpState::WaitForSipi, Some(0), 0));
}

#[test]
fn clocks_stand_still_with_the_machine() {
    let name = "clocks_stand_still_with_the_machine";
    let Some(mut g) = Setup::default().smp(2).build(name) else { return };
    let vm = g.vm.clone();
    let clock = vm.guest_clock().expect("a clock");
    clock.start();
    clock.stop();
    let (a, b) = (g.state(0).tsc, g.state(1).tsc);
    std::thread::sleep(std::time::Duration::from_millis(5));
    assert_eq!((g.state(0).tsc, g.state(1).tsc), (a, b), "they stand");
    g.change(0, |s| s.tsc = 1_000_000);
    assert_eq!(g.state(0).tsc, 1_000_000);
    clock.start();
    if !without(name, quirks().tsc_fixed, "shows the guest the host's time-stamp counter") {
        return;
    }
    let now = g.state(0).tsc;
    assert!((1_000_000..1_000_000_000).contains(&now), "{now}");
    let (a, b) = (g.state(0).tsc, g.state(1).tsc);
    assert!(b.wrapping_sub(a) > 0);
}

#[test]
fn kvmclock_is_the_virtual_clock() {
    let name = "kvmclock_is_the_virtual_clock";
    let Some(mut g) = Setup::mode(IrqChipMode::Kernel).build(name) else { return };
    let clock = g.bus.clock();
    clock.set(5_000_000_000);
    clock.start();
    let vm = g.vm.clone();
    let guest_clock = vm.guest_clock().expect("a clock");
    guest_clock.start();
    g.long(0);
    // KVM_SYSTEM_TIME_NEW: the page to fill in, and on.
    g.code(CODE, 64, |a| {
        a.mov(ecx, 0x4b56_4d01u32)?;
        a.mov(eax, DATA as u32 | 1)?;
        a.xor(edx, edx)?;
        a.wrmsr()?;
        a.out(i32::from(PORT_STOP), al)?;
        a.out(i32::from(PORT_STOP), al)?;
        a.hlt()
    });
    g.run_to_stop(0);
    g.run_to_stop(0);
    let system_time = |g: &Guest| g.load(DATA + 16);
    let first = system_time(&g);
    assert!((5_000_000_000..6_000_000_000).contains(&first), "{first}");
    // It stands while the machine does, and is told where it is when that goes on.
    guest_clock.stop();
    g.bus.clock().stop();
    std::thread::sleep(std::time::Duration::from_millis(50));
    g.bus.clock().set(7_000_000_000);
    g.bus.clock().start();
    guest_clock.start();
    g.code(CODE, 64, |a| a.out(i32::from(PORT_STOP), al));
    g.change(0, |s| s.rip = CODE);
    g.run_to_stop(0);
    let second = system_time(&g);
    assert!((7_000_000_000..8_000_000_000).contains(&second), "{second}");
}
