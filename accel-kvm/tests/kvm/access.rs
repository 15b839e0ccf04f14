//! Exits: ports, memory-mapped registers, HLT, shutdown.

use crate::harness::*;
use iced_x86::code_asm::*;
use mimus_arch::x86::regs::*;
use mimus_core::accel::{IrqChipMode, ResetCause, ResetKind, VcpuExit};

#[test]
fn ports_in_real_mode() {
    let Some(mut g) = Setup::default().build("ports_in_real_mode") else { return };
    g.real(0);
    g.code(CODE, 16, |a| {
        a.mov(dx, 0x1234)?;
        a.mov(al, 0x5a)?;
        a.out(dx, al)?;
        a.mov(ax, 0x1122)?;
        a.out(dx, ax)?;
        a.mov(eax, 0x5566_7788)?;
        a.out(dx, eax)?;
        a.in_(al, 0x40)?;
        a.mov(byte_ptr(0x6000), al)?;
        a.in_(ax, dx)?;
        a.mov(word_ptr(0x6002), ax)?;
        a.in_(eax, dx)?;
        a.mov(dword_ptr(0x6004), eax)?;
        a.out(i32::from(PORT_STOP), al)?;
        a.hlt()
    });
    lock(&g.bus.answers).extend([0x1aa, 0x1bbcc, 0x1_ddee_ff00]);
    g.run_to_stop(0);
    assert_eq!(
        g.bus.take(),
        [
            Seen::Out(0x1234, 1, 0x5a),
            Seen::Out(0x1234, 2, 0x1122),
            Seen::Out(0x1234, 4, 0x5566_7788),
            Seen::In(0x40, 1),
            Seen::In(0x1234, 2),
            Seen::In(0x1234, 4),
            Seen::Out(PORT_STOP, 1, 0)
        ]
    );
    assert_eq!(g.load(0x6000), 0xddee_ff00_bbcc_00aa);
    // The state is that after the instruction.
    let s = g.state(0);
    g.run(0);
    assert_eq!(g.state(0).rip, s.rip + 1, "only HLT was left");
}

#[test]
fn string_ports() {
    let Some(mut g) = Setup::default().build("string_ports") else { return };
    g.real(0);
    g.write(0x6000, &[1, 2, 3, 4, 5]);
    g.code(CODE, 16, |a| {
        a.mov(dx, 0x70)?;
        a.mov(di, 0x5000)?;
        a.mov(cx, 5)?;
        a.rep().insb()?;
        a.mov(di, 0x5010)?;
        a.mov(cx, 3)?;
        a.rep().insd()?;
        a.mov(si, 0x6000)?;
        a.mov(cx, 5)?;
        a.rep().outsb()?;
        a.out(i32::from(PORT_STOP), al)?;
        a.hlt()
    });
    lock(&g.bus.answers).extend([11, 12, 13, 14, 15, 0x1111_1111, 0x2222_2222, 0x3333_3333]);
    g.run_to_stop(0);
    assert_eq!(g.load(0x5000), 0x0f_0e0d_0c0b);
    assert_eq!((g.load(0x5010), g.load(0x5018)), (0x2222_2222_1111_1111, 0x3333_3333));
    assert_eq!(g.bus.out_values(0x70), [1, 2, 3, 4, 5]);
}

#[test]
fn memory_mapped_registers() {
    let Some(mut g) = Setup::default().build("memory_mapped_registers") else { return };
    g.long(0);
    g.code(CODE, 64, |a| {
        a.mov(rbx, HOLE)?;
        a.mov(rax, 0x1122_3344_5566_7788u64)?;
        a.mov(byte_ptr(rbx + 1), al)?;
        a.mov(word_ptr(rbx + 2), ax)?;
        a.mov(dword_ptr(rbx + 4), eax)?;
        a.mov(qword_ptr(rbx + 8), rax)?;
        // Crosses a page: comes in two parts.
        a.mov(qword_ptr(rbx + 0xffc), rax)?;
        a.movzx(ecx, byte_ptr(rbx))?;
        a.mov(rdx, qword_ptr(rbx + 0x1ffc))?;
        a.movdqu(xmm0, xmmword_ptr(rbx + 0x20))?;
        a.movdqu(xmmword_ptr(DATA), xmm0)?;
        a.mov(al, byte_ptr(rbx + 0x40))?;
        a.out(i32::from(PORT_STOP), al)?;
        a.hlt()
    });
    lock(&g.bus.answers).extend([0xab, 0x4444_3333, 0x2222_1111, 0x0123_4567_89ab_cdef, 0xfedc_ba98_7654_3210, 0x7f]);
    g.run_to_stop(0);
    let low = 0x5566_7788;
    assert_eq!(
        g.bus.take(),
        [
            Seen::Write(HOLE + 1, 1, 0x88),
            Seen::Write(HOLE + 2, 2, 0x7788),
            Seen::Write(HOLE + 4, 4, low),
            Seen::Write(HOLE + 8, 8, 0x1122_3344_5566_7788),
            Seen::Write(HOLE + 0xffc, 4, low),
            Seen::Write(HOLE + 0x1000, 4, 0x1122_3344),
            Seen::Read(HOLE, 1),
            Seen::Read(HOLE + 0x1ffc, 4),
            Seen::Read(HOLE + 0x2000, 4),
            Seen::Read(HOLE + 0x20, 8),
            Seen::Read(HOLE + 0x28, 8),
            Seen::Read(HOLE + 0x40, 1),
            Seen::Out(PORT_STOP, 1, 0x7f)
        ]
    );
    let s = g.state(0);
    assert_eq!((s.gpr[RCX], s.gpr[RDX]), (0xab, 0x2222_1111_4444_3333));
    assert_eq!((g.load(DATA), g.load(DATA + 8)), (0x0123_4567_89ab_cdef, 0xfedc_ba98_7654_3210));
}

#[test]
fn user_code_reaches_registers_and_runs_native() {
    let name = "user_code_reaches_registers_and_runs_native";
    let Some(mut g) = Setup::default().build(name) else { return };
    g.user(0);
    g.code(USER, 64, |a| {
        // A million rounds: too slow for an emulator to be the one that runs it.
        let mut again = a.create_label();
        a.mov(ecx, 1_000_000)?;
        a.xor(eax, eax)?;
        a.set_label(&mut again)?;
        a.add(rax, rcx)?;
        a.dec(ecx)?;
        a.jnz(again)?;
        a.cvtsi2sd(xmm0, rax)?;
        a.sqrtsd(xmm0, xmm0)?;
        a.cvtsd2si(rdx, xmm0)?;
        a.mov(rbx, HOLE)?;
        a.mov(qword_ptr(rbx), rax)?;
        a.mov(qword_ptr(rbx + 8), rdx)?;
        a.mov(al, byte_ptr(rbx + 16))
    });
    g.bus.stop_always.store(true, std::sync::atomic::Ordering::Relaxed);
    let start = std::time::Instant::now();
    for _ in 0..3 {
        g.run_to_stop(0);
    }
    let sum = 1_000_000u64 * 1_000_001 / 2;
    assert_eq!(
        g.bus.take(),
        [
            Seen::Write(HOLE, 8, sum),
            Seen::Write(HOLE + 8, 8, (sum as f64).sqrt().round() as u64),
            Seen::Read(HOLE + 16, 1)
        ]
    );
    assert!(start.elapsed().as_secs() < 2, "{:?}", start.elapsed());
}

#[test]
fn halt_and_interrupts_without_a_controller() {
    let name = "halt_and_interrupts_without_a_controller";
    let Some(mut g) = Setup::mode(IrqChipMode::User).build(name) else { return };
    g.real(0);
    g.write(0x40 * 4, &[0, 0x20, 0, 0]);
    g.code(0x2000, 16, |a| {
        a.inc(byte_ptr(0x6000))?;
        a.iret()
    });
    g.code(CODE, 16, |a| {
        let mut again = a.create_label();
        a.hlt()?;
        a.sti()?;
        a.set_label(&mut again)?;
        a.hlt()?;
        a.jmp(again)
    });
    let handle = g.vcpus[0].handle();
    assert!(matches!(g.run(0), VcpuExit::Halted));
    // Interrupts are off: it stays halted, again and again.
    handle.set_pin(mimus_core::accel::CpuPin::Intr, true);
    lock(&g.bus.vectors).push_back(0x40);
    assert!(matches!(g.run(0), VcpuExit::Halted));
    assert!(matches!(g.run(0), VcpuExit::Halted));
    assert_eq!(lock(&g.bus.vectors).len(), 1, "not acknowledged");
    // An NMI ends the halt; vector 2.
    g.write(2 * 4, &[0, 0x20, 0, 0]);
    handle.set_pin(mimus_core::accel::CpuPin::Nmi, true);
    handle.set_pin(mimus_core::accel::CpuPin::Nmi, false);
    assert!(matches!(g.run(0), VcpuExit::Halted));
    // NMI handler, then STI lets the interrupt in.
    assert_eq!((g.load(0x6000) & 0xff, lock(&g.bus.vectors).len()), (2, 0));
    assert!(matches!(g.run(0), VcpuExit::Halted), "nothing pending");
    lock(&g.bus.vectors).extend([0x40, 0x40, 0x40]);
    handle.set_pin(mimus_core::accel::CpuPin::Intr, true);
    assert!(matches!(g.run(0), VcpuExit::Halted));
    assert_eq!(g.load(0x6000) & 0xff, 5, "three in a row, each when the window opened");
}

#[test]
fn triple_fault_and_reset() {
    let Some(mut g) = Setup::default().build("triple_fault_and_reset") else { return };
    g.long(0);
    // The descriptor table has no room for any vector.
    g.change(0, |s| s.idtr.limit = 0);
    g.code(CODE, 64, |a| a.ud2());
    assert!(matches!(g.run(0), VcpuExit::Reset(ResetCause::TripleFault)));
    g.vcpus[0].reset(ResetKind::Warm, None);
    let s = g.state(0);
    assert_eq!((s.linear_pc(), s.cr0, s.efer), (0xffff_fff0, CR0_CD | CR0_NW | CR0_ET, 0));
    g.real(0);
    g.code(CODE, 16, |a| {
        a.out(i32::from(PORT_STOP), al)?;
        a.hlt()
    });
    g.run_to_stop(0);
}

#[test]
fn real_mode_software_interrupt() {
    let Some(mut g) = Setup::default().build("real_mode_software_interrupt") else { return };
    g.real(0);
    g.write(0x21 * 4, &[0, 0x20, 0, 0]);
    g.code(0x2000, 16, |a| {
        a.mov(bx, 0x1234)?;
        a.iret()
    });
    g.code(CODE, 16, |a| {
        a.int(0x21)?;
        a.mov(ax, bx)?;
        a.out(i32::from(PORT_STOP), ax)?;
        a.hlt()
    });
    g.run_to_stop(0);
    assert_eq!(g.bus.out_values(PORT_STOP), [0x1234]);
}
