//! Interrupts: every way from a device to a vCPU, with the controllers in the kernel, split, and outside.

use crate::harness::*;
use iced_x86::code_asm::*;
use mimus_arch::x86::irqchip::*;
use mimus_arch::x86::msr;
use mimus_core::accel::*;
use mimus_core::bus::{AccessSize, GuestPhys, MemTxResult, Requester};
use mimus_core::irq::IrqLine;
use rustix::event::{EventfdFlags, eventfd};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

type Result = std::result::Result<(), iced_x86::IcedError>;

pub const LAPIC: u64 = 0xfee0_0000;
const IOAPIC: u64 = 0xfec0_0000;

/// Sets the pair up: vectors from 0x20 and 0x28, `mask` for both.
pub fn init_pic(a: &mut CodeAssembler, mask: [u8; 2]) -> Result {
    for (port, base, wiring, mask) in [(0x20, 0x20, 4, mask[0]), (0xa0, 0x28, 2, mask[1])] {
        for (offset, value) in [(0, 0x11), (1, base), (1, wiring), (1, 1), (1, i32::from(mask))] {
            a.mov(al, value)?;
            a.out(port + offset, al)?;
        }
    }
    Ok(())
}

/// Software enable, spurious vector 0xff.
fn enable_lapic(a: &mut CodeAssembler) -> Result {
    a.mov(ebx, LAPIC as u32)?;
    a.mov(dword_ptr(rbx + 0xf0), 0x1ff)
}

/// `sti`, then halts for ever.
fn idle(a: &mut CodeAssembler) -> Result {
    let mut again = a.create_label();
    a.sti()?;
    a.set_label(&mut again)?;
    a.hlt()?;
    a.jmp(again)
}

/// An interrupt handler at `at` that writes `value` to port 0x70, does `end`, and stops if `stop`.
fn handler(g: &Guest, vector: u8, at: u64, stop: bool, end: impl Fn(&mut CodeAssembler) -> Result) {
    g.gate(vector, at);
    g.code(at, 64, |a| {
        a.push(rax)?;
        a.mov(al, i32::from(vector))?;
        a.out(0x70, al)?;
        end(a)?;
        if stop {
            a.out(i32::from(PORT_STOP), al)?;
        }
        a.pop(rax)?;
        a.iretq()
    });
}

fn pic_eoi(a: &mut CodeAssembler) -> Result {
    a.mov(al, 0x20)?;
    a.out(0x20, al)
}

fn lapic_eoi(a: &mut CodeAssembler) -> Result {
    a.mov(eax, (LAPIC + 0xb0) as u32)?;
    a.mov(dword_ptr(rax), 0)
}

fn event() -> OwnedFd {
    eventfd(0, EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC).expect("an eventfd")
}

fn signal(fd: &OwnedFd) {
    rustix::io::write(fd, &1u64.to_ne_bytes()).expect("signalled");
}

/// The counter of an eventfd; 0 if it was not signalled.
fn signals(fd: &OwnedFd) -> u64 {
    let mut count = [0; 8];
    match rustix::io::read(fd, &mut count) {
        Ok(_) => u64::from_ne_bytes(count),
        Err(_) => 0,
    }
}

/// Does `f` on another thread once the guest has had time to halt.
pub fn soon<R: Send>(g: &mut Guest, f: impl FnOnce() + Send, run: impl FnOnce(&mut Guest) -> R) -> R {
    std::thread::scope(|s| {
        s.spawn(|| {
            std::thread::sleep(Duration::from_millis(10));
            f();
        });
        run(g)
    })
}

fn line(g: &Guest, gsi: u32) -> IrqLine {
    IrqLine::new(g.chip.as_ref().expect("a chip").gsi(), gsi)
}

#[test]
fn pic_in_the_kernel() {
    let Some(mut g) = Setup::mode(IrqChipMode::Kernel).build("pic_in_the_kernel") else { return };
    g.long(0);
    handler(&g, 0x24, 0x2000, true, pic_eoi);
    handler(&g, 0x2a, 0x2100, true, |a| {
        a.mov(al, 0x20)?;
        a.out(0xa0, al)?;
        a.out(0x20, al)
    });
    g.code(CODE, 64, |a| {
        init_pic(a, [0xeb, 0xfb])?;
        idle(a)
    });
    let com1 = line(&g, 4);
    // It waits in the kernel.
    soon(&mut g, || com1.raise(), |g| g.run_to_stop(0));
    com1.lower();
    let slave = line(&g, 10);
    slave.raise();
    g.run_to_stop(0);
    assert_eq!(g.bus.out_values(0x70), [0x24, 0x2a]);
    assert_eq!(g.statistic("halt exits"), 0);
}

#[test]
fn ioapic_in_the_kernel() {
    let Some(mut g) = Setup::mode(IrqChipMode::Kernel).build("ioapic_in_the_kernel") else { return };
    g.long(0);
    handler(&g, 0x51, 0x2000, true, lapic_eoi);
    handler(&g, 0x52, 0x2100, true, lapic_eoi);
    handler(&g, 0x53, 0x2200, true, lapic_eoi);
    g.code(CODE, 64, |a| {
        init_pic(a, [0xff, 0xff])?;
        enable_lapic(a)?;
        a.mov(ebx, IOAPIC as u32)?;
        // Pin 20 edge to vector 0x51, pin 21 level to 0x52, pin 2 (the timer's) to 0x53.
        for (pin, entry) in [(20, 0x51), (21, 0x8052), (2, 0x53)] {
            a.mov(dword_ptr(rbx), 0x10 + pin * 2)?;
            a.mov(dword_ptr(rbx + 0x10), entry)?;
        }
        idle(a)
    });
    let (edge, level) = (line(&g, 20), line(&g, 21));
    soon(&mut g, || edge.raise(), |g| g.run_to_stop(0));
    level.raise();
    g.run_to_stop(0);
    // Still high at its end: it was requested again there.
    level.lower();
    g.run_to_stop(0);
    edge.lower();
    edge.raise();
    g.run_to_stop(0);
    line(&g, 0).raise();
    g.run_to_stop(0);
    assert_eq!(g.bus.out_values(0x70), [0x51, 0x52, 0x52, 0x51, 0x53]);
}

/// The handler lowers a level before it ends its interrupt: it is taken once. Where the local APIC takes it as ended
/// when it is delivered (`early_eoi`), the level is still high then, and the I/O APIC delivers it a second time.
#[test]
fn level_lowered_before_its_end() {
    let name = "level_lowered_before_its_end";
    let Some(mut g) = Setup::mode(IrqChipMode::Kernel).build(name) else { return };
    g.long(0);
    // Stops first: the level is lowered outside.
    g.gate(0x52, 0x2000);
    g.code(0x2000, 64, |a| {
        a.out(i32::from(PORT_STOP), al)?;
        lapic_eoi(a)?;
        a.inc(dword_ptr(DATA))?;
        a.iretq()
    });
    g.code(CODE, 64, |a| {
        init_pic(a, [0xff, 0xff])?;
        enable_lapic(a)?;
        a.mov(ebx, IOAPIC as u32)?;
        a.mov(dword_ptr(rbx), 0x10 + 21 * 2)?;
        a.mov(dword_ptr(rbx + 0x10), 0x8052)?;
        a.sti()?;
        a.hlt()?;
        // An interrupt that is still pending is taken after one of these.
        a.out(0x72, al)?;
        a.nop()?;
        a.out(0x72, al)?;
        a.cli()?;
        a.mov(al, 0xaa)?;
        a.out(i32::from(PORT_STOP), al)
    });
    let level = line(&g, 21);
    soon(&mut g, || level.raise(), |g| g.run_to_stop(0));
    level.lower();
    let mut delivered = 1;
    loop {
        g.bus.take();
        g.run_to_stop(0);
        if g.bus.out_values(PORT_STOP) == [0xaa] {
            break;
        }
        delivered += 1;
    }
    assert_eq!(delivered, if quirks().early_eoi { 2 } else { 1 });
    assert_eq!(g.load(DATA) & 0xff, delivered, "as many ended");
    assert_eq!(g.statistic("halt exits"), 0);
}

#[test]
fn messages_and_descriptors() {
    let Some(mut g) = Setup::mode(IrqChipMode::Kernel).build("messages_and_descriptors") else { return };
    g.long(0);
    for (i, vector) in [0x60, 0x61, 0x62].into_iter().enumerate() {
        handler(&g, vector, 0x2000 + i as u64 * 0x100, true, lapic_eoi);
    }
    g.code(CODE, 64, |a| {
        enable_lapic(a)?;
        idle(a)
    });
    let gsi = g.chip.as_ref().expect("a chip").gsi();
    soon(&mut g, || assert_eq!(gsi.msi(LAPIC, 0x60, Requester::Unspecified), MemTxResult::Ok), |g| g.run_to_stop(0));
    let vm = g.vm.clone();
    let irqfds = vm.irqfds().expect("irqfds");
    let fd = event();
    let number = irqfds.add_message(LAPIC, 0x61).expect("a number");
    irqfds.attach(number, fd.as_fd(), None).expect("attached");
    soon(&mut g, || signal(&fd), |g| g.run_to_stop(0));
    irqfds.change_message(number, LAPIC, 0x62).expect("changed");
    signal(&fd);
    g.run_to_stop(0);
    assert_eq!(g.bus.out_values(0x70), [0x60, 0x61, 0x62]);
    irqfds.detach(number, fd.as_fd()).expect("detached");
    irqfds.remove_message(number).expect("given back");
    assert!(irqfds.change_message(number, LAPIC, 0x60).is_err() && irqfds.remove_message(number).is_err());
    assert!(irqfds.attach(number, fd.as_fd(), None).is_err(), "no pin and no message");
}

#[test]
fn descriptor_with_resample() {
    let Some(mut g) = Setup::mode(IrqChipMode::Kernel).build("descriptor_with_resample") else { return };
    g.long(0);
    handler(&g, 0x52, 0x2000, true, lapic_eoi);
    g.code(CODE, 64, |a| {
        enable_lapic(a)?;
        a.mov(ebx, IOAPIC as u32)?;
        a.mov(dword_ptr(rbx), 0x10 + 21 * 2)?;
        a.mov(dword_ptr(rbx + 0x10), 0x8052)?;
        idle(a)
    });
    let vm = g.vm.clone();
    let irqfds = vm.irqfds().expect("irqfds");
    let (fd, resample) = (event(), event());
    irqfds.attach(21, fd.as_fd(), Some(resample.as_fd())).expect("attached");
    assert_eq!(signals(&resample), 0);
    soon(&mut g, || signal(&fd), |g| g.run_to_stop(0));
    assert_eq!(signals(&resample), 1, "the end of the interrupt was told");
    signal(&fd);
    g.run_to_stop(0);
    assert_eq!((signals(&resample), g.bus.out_values(0x70)), (1, vec![0x52, 0x52]));
    irqfds.detach(21, fd.as_fd()).expect("detached");
}

#[test]
fn doorbells() {
    let Some(mut g) = Setup::default().build("doorbells") else { return };
    g.long(0);
    let (any, exact, port) = (event(), event(), event());
    let vm = g.vm.clone();
    let bells = vm.doorbells().expect("doorbells");
    let at = |pio, addr, size, value| DoorbellAddress { pio, addr: GuestPhys(addr), size, value };
    let (a_any, a_exact, a_port) = (
        at(false, HOLE, None, None),
        at(false, HOLE + 0x1000, Some(AccessSize::B4), Some(7)),
        at(true, 0x510, Some(AccessSize::B2), Some(0x1234)),
    );
    bells.attach(a_any, any.as_fd()).expect("attached");
    bells.attach(a_exact, exact.as_fd()).expect("attached");
    bells.attach(a_port, port.as_fd()).expect("attached");
    assert!(bells.attach(at(false, HOLE, None, Some(1)), any.as_fd()).is_err(), "a value needs a width");
    g.code(CODE, 64, |a| {
        a.mov(ebx, HOLE as u32)?;
        a.mov(byte_ptr(rbx), 1)?;
        a.mov(dword_ptr(rbx), 2)?;
        a.mov(dword_ptr(rbx + 0x1000), 7)?;
        a.mov(dword_ptr(rbx + 0x1000), 8)?;
        a.mov(byte_ptr(rbx + 0x1000), 7)?;
        a.mov(dx, 0x510)?;
        a.mov(ax, 0x1234)?;
        a.out(dx, ax)?;
        a.inc(eax)?;
        a.out(dx, ax)?;
        a.out(i32::from(PORT_STOP), al)
    });
    g.run_to_stop(0);
    assert_eq!((signals(&any), signals(&exact), signals(&port)), (2, 1, 1));
    let stop = Seen::Out(PORT_STOP, 1, 0x35);
    let others = [Seen::Write(HOLE + 0x1000, 4, 8), Seen::Write(HOLE + 0x1000, 1, 7), Seen::Out(0x510, 2, 0x1235)];
    assert_eq!(g.bus.take(), [&others[..], &[stop]].concat());
    bells.detach(a_any, any.as_fd()).expect("detached");
    assert!(bells.detach(a_any, any.as_fd()).is_err(), "not twice");
    g.long(0);
    g.run_to_stop(0);
    assert_eq!(g.bus.take()[0], Seen::Write(HOLE, 1, 1));
}

#[test]
fn collected_writes_keep_their_order() {
    let Some(mut g) = Setup::default().build("collected_writes_keep_their_order") else { return };
    g.long(0);
    let vm = g.vm.clone();
    let collected = vm.coalesced_io().expect("collected writes");
    collected.add(false, GuestPhys(HOLE), 0x100).expect("added");
    collected.add(true, GuestPhys(0x80), 1).expect("added");
    g.code(CODE, 64, |a| {
        a.mov(ebx, HOLE as u32)?;
        a.mov(eax, 3)?;
        a.mov(dword_ptr(rbx), eax)?;
        a.out(0x80, al)?;
        a.mov(byte_ptr(rbx + 0x10), al)?;
        a.mov(dword_ptr(rbx + 0x100), eax)?;
        a.mov(word_ptr(rbx + 4), ax)?;
        a.hlt()
    });
    assert!(matches!(g.run(0), VcpuExit::Halted));
    let first = [Seen::Write(HOLE, 4, 3), Seen::Out(0x80, 1, 3), Seen::Write(HOLE + 0x10, 1, 3)];
    let then = [Seen::Write(HOLE + 0x100, 4, 3), Seen::Write(HOLE + 4, 2, 3)];
    assert_eq!(g.bus.take(), [&first[..], &then[..]].concat());
    assert_eq!(g.statistic("mmio exits"), 1, "the others did not exit");
    collected.remove(false, GuestPhys(HOLE), 0x100).expect("removed");
    collected.flush(&*g.bus);
    assert_eq!(g.bus.take(), []);
}

/// An index port that is collected and a data port that is not: the index is there when the data are asked for, whoever
/// makes collected writes meanwhile.
#[test]
fn collected_writes_are_made_before_what_follows() {
    let name = "collected_writes_are_made_before_what_follows";
    let Some(mut g) = Setup::default().build(name) else { return };
    g.long(0);
    let vm = g.vm.clone();
    let collected = vm.coalesced_io().expect("collected writes");
    collected.add(true, GuestPhys(0x70), 1).expect("added");
    let index = AtomicU64::new(0);
    g.bus.set_handler(move |_, seen| match *seen {
        Seen::Out(0x70, _, value) => {
            // Time for the guest to overtake it.
            std::thread::sleep(Duration::from_millis(1));
            index.store(value, Ordering::SeqCst);
            None
        }
        Seen::In(0x71, _) => Some(index.load(Ordering::SeqCst)),
        _ => None,
    });
    g.code(CODE, 64, |a| {
        let [mut again, mut wait, mut right] = std::array::from_fn(|_| a.create_label());
        a.mov(ecx, 200)?;
        a.set_label(&mut again)?;
        a.mov(eax, ecx)?;
        a.out(0x70, al)?;
        // Longer from round to round, so that the other thread is in the middle of it in some.
        a.set_label(&mut wait)?;
        a.pause()?;
        a.dec(eax)?;
        a.jnz(wait)?;
        a.in_(al, 0x71)?;
        a.cmp(al, cl)?;
        a.je(right)?;
        a.inc(dword_ptr(DATA))?;
        a.set_label(&mut right)?;
        a.dec(ecx)?;
        a.jnz(again)?;
        a.hlt()
    });
    let (bus, done) = (g.bus.clone(), AtomicBool::new(false));
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !done.load(Ordering::SeqCst) {
                collected.flush(&*bus);
                std::thread::yield_now();
            }
        });
        let exit = g.run(0);
        done.store(true, Ordering::SeqCst);
        assert!(matches!(exit, VcpuExit::Halted), "{exit:?}");
    });
    assert_eq!(g.load(DATA), 0, "indices that were not there yet");
}

#[test]
fn interval_timer_in_the_kernel() {
    let Some(mut g) = Setup::mode(IrqChipMode::Kernel).build("interval_timer_in_the_kernel") else { return };
    g.long(0);
    g.gate(0x20, 0x2000);
    g.code(0x2000, 64, |a| {
        let mut more = a.create_label();
        a.push(rax)?;
        pic_eoi(a)?;
        a.inc(dword_ptr(DATA))?;
        a.cmp(dword_ptr(DATA), 3)?;
        a.jb(more)?;
        a.out(i32::from(PORT_STOP), al)?;
        a.set_label(&mut more)?;
        a.pop(rax)?;
        a.iretq()
    });
    g.code(CODE, 64, |a| {
        init_pic(a, [0xfe, 0xff])?;
        // Channel 0, both bytes, mode 2: every 5 ms.
        for (port, value) in [(0x43, 0x34), (0x40, 5966 & 0xff), (0x40, 5966 >> 8)] {
            a.mov(al, value)?;
            a.out(port, al)?;
        }
        idle(a)
    });
    let start = std::time::Instant::now();
    g.run_to_stop(0);
    assert!(start.elapsed() >= Duration::from_millis(10), "{:?}", start.elapsed());
    assert_eq!(g.load(DATA) & 0xff, 3);
    let pit = g.devices().into_iter().find(|(n, _)| *n == "pit").expect("a timer").1;
    let state: PitState = pit.save().expect("saved").decode().expect("decoded");
    assert_eq!((state.channels[0].count, state.channels[0].mode, state.channels[0].access), (5966, 2, 3));
    state.check().expect("valid");
    // Its interrupt goes to an HPET.
    let chip = g.chip.clone().expect("a chip");
    chip.replace_pit(true);
    let state: PitState = pit.save().expect("saved").decode().expect("decoded");
    assert!(state.irq_disabled);
    chip.replace_pit(false);
    // At reset no channel counts, and none is started by a restore.
    pit.reset(mimus_core::device::ResetPhase::Enter);
    let state: PitState = pit.save().expect("saved").decode().expect("decoded");
    assert!(state.channels.iter().all(|c| c.waiting) && !state.irq_disabled);
}

#[test]
fn local_timer() {
    let Some(mut g) = Setup::mode(IrqChipMode::Kernel).build("local_timer") else { return };
    g.long(0);
    handler(&g, 0x70, 0x2000, true, lapic_eoi);
    g.code(CODE, 64, |a| {
        enable_lapic(a)?;
        // Periodic, divided by 1, every millisecond at a bus clock of 1 GHz.
        a.mov(dword_ptr(rbx + 0x3e0), 0xb)?;
        a.mov(dword_ptr(rbx + 0x320), 0x2_0070)?;
        a.mov(dword_ptr(rbx + 0x380), 1_000_000)?;
        idle(a)
    });
    for _ in 0..3 {
        g.run_to_stop(0);
    }
    // TSC-deadline mode: once, 200,000 ticks from now.
    handler(&g, 0x71, 0x2100, true, lapic_eoi);
    g.long(0);
    g.code(CODE, 64, |a| {
        enable_lapic(a)?;
        a.mov(dword_ptr(rbx + 0x380), 0)?;
        a.mov(dword_ptr(rbx + 0x320), 0x4_0071)?;
        a.rdtsc()?;
        a.add(eax, 200_000)?;
        a.adc(edx, 0)?;
        a.mov(ecx, msr::TSC_DEADLINE)?;
        a.wrmsr()?;
        idle(a)
    });
    g.run_to_stop(0);
    assert_eq!(g.bus.out_values(0x70), [0x70, 0x70, 0x70, 0x71]);
}

#[test]
fn x2apic() {
    let Some(mut g) = Setup::mode(IrqChipMode::Kernel).build("x2apic") else { return };
    g.long(0);
    handler(&g, 0x72, 0x2000, true, |a| {
        a.push(rcx)?;
        a.push(rdx)?;
        a.xor(eax, eax)?;
        a.xor(edx, edx)?;
        a.mov(ecx, 0x80b)?;
        a.wrmsr()?;
        a.pop(rdx)?;
        a.pop(rcx)
    });
    g.code(CODE, 64, |a| {
        a.mov(ecx, msr::APIC_BASE)?;
        a.rdmsr()?;
        a.or(eax, msr::APIC_BASE_X2APIC as u32)?;
        a.wrmsr()?;
        // Software enable, then an interrupt to itself (register 0x83f).
        a.mov(ecx, 0x80f)?;
        a.mov(eax, 0x1ff)?;
        a.xor(edx, edx)?;
        a.wrmsr()?;
        a.mov(ecx, 0x83f)?;
        a.mov(eax, 0x72)?;
        a.wrmsr()?;
        idle(a)
    });
    g.run_to_stop(0);
    assert_eq!(g.bus.out_values(0x70), [0x72]);
    let s = g.state(0);
    assert_ne!(s.apic_base & msr::APIC_BASE_X2APIC, 0);
    // 32-bit destinations reach it by their upper half.
    g.bus.take();
    let gsi = g.chip.as_ref().expect("a chip").gsi();
    assert_eq!(gsi.msi(LAPIC, 0x72, Requester::Unspecified), MemTxResult::Ok);
    g.run_to_stop(0);
    assert_eq!(g.bus.out_values(0x70), [0x72]);
}

#[test]
fn nmi_with_the_controllers_in_the_kernel() {
    let name = "nmi_with_the_controllers_in_the_kernel";
    let Some(mut g) = Setup::mode(IrqChipMode::Kernel).build(name) else { return };
    g.long(0);
    handler(&g, 2, 0x2000, true, |_| Ok(()));
    g.code(CODE, 64, |a| {
        let mut again = a.create_label();
        a.set_label(&mut again)?;
        a.hlt()?;
        a.jmp(again)
    });
    let handle = g.vcpus[0].handle();
    soon(&mut g, || handle.set_pin(CpuPin::Nmi, true), |g| g.run_to_stop(0));
    assert_eq!(g.bus.out_values(0x70), [2]);
    assert!(g.state(0).events.nmi_masked, "until IRET");
    // One that has not been taken yet is part of the state.
    handle.set_pin(CpuPin::Nmi, true);
    assert!(g.state(0).events.nmi_pending);
    g.run_to_stop(0);
    assert_eq!(g.bus.out_values(0x70), [2, 2]);
}

#[test]
fn system_management_mode() {
    let name = "system_management_mode";
    let Some(mut g) = Setup::mode(IrqChipMode::Kernel).build(name) else { return };
    let Some(listener) = g.vm.smm_memory_listener() else {
        // The pin is ignored.
        g.vcpus[0].handle().set_pin(CpuPin::Smi, true);
        assert!(!g.state(0).events.smi_pending);
        return skipped(name, "this host's KVM has no system management mode");
    };
    // The handler is where only that mode sees it, over the entry point at SMBASE + 0x8000.
    let hidden = g.guest_ram.add_block("smram", 0x1000, mimus_core::memory::RamBacking::Private).expect("a block");
    assert!(hidden.write(
        0,
        &assemble(0x3_8000, 16, |a| {
            a.mov(al, 0x55)?;
            a.out(0x70, al)?;
            a.rsm()
        })
    ));
    let root = mimus_core::memory::MemoryRegion::container("smm", 1 << 40);
    let space = g.map.address_space("smm", &root);
    space.add_listener(listener);
    let ram = mimus_core::memory::MemoryRegion::ram("ram", &g.ram);
    let smram = mimus_core::memory::MemoryRegion::ram("smram", &hidden);
    g.map.change(|t| _ = t.map(&root, 0, &ram).map_with_priority(&root, 0x3_8000, 1, &smram));
    g.long(0);
    g.code(CODE, 64, |a| {
        a.out(i32::from(PORT_STOP), al)?;
        a.hlt()
    });
    g.vcpus[0].handle().set_pin(CpuPin::Smi, true);
    g.run_to_stop(0);
    assert_eq!(g.bus.out_values(0x70), [0x55]);
    assert!(!g.state(0).events.smm);
}

#[test]
fn split_controllers() {
    let Some(mut g) = Setup::mode(IrqChipMode::Split).build("split_controllers") else { return };
    g.long(0);
    handler(&g, 0x60, 0x2000, true, lapic_eoi);
    handler(&g, 0x52, 0x2100, true, lapic_eoi);
    handler(&g, 0x24, 0x2200, true, |_| Ok(()));
    g.code(CODE, 64, |a| {
        enable_lapic(a)?;
        idle(a)
    });
    let chip = g.chip.clone().expect("a chip");
    assert_eq!((chip.mode(), chip.devices().len()), (IrqChipMode::Split, 1));
    let gsi = chip.gsi();
    let send = |data| assert_eq!(gsi.msi(LAPIC, data, Requester::Unspecified), MemTxResult::Ok);
    soon(&mut g, || send(0x60), |g| g.run_to_stop(0));
    // An IOAPIC's level-triggered message: its end is told.
    send(0x8052 | 0x4000);
    g.run_to_stop(0);
    let seen = g.bus.take();
    let ends: Vec<_> = seen.iter().enumerate().filter(|(_, s)| matches!(s, Seen::Eoi(_))).collect();
    let [(at, Seen::Eoi(0x52))] = ends[..] else { panic!("{seen:?}") };
    assert_eq!(gsi.holds(0x52), Some(false), "ended");
    let handled = seen.iter().position(|s| *s == Seen::Out(0x70, 1, 0x52)).expect("handled");
    assert!(at > handled || quirks().early_eoi, "{seen:?}");
    let values: Vec<_> = seen.iter().filter(|s| matches!(s, Seen::Out(0x70, ..))).collect();
    assert_eq!(values, [&Seen::Out(0x70, 1, 0x60), &Seen::Out(0x70, 1, 0x52)]);
    // The same when the model tells its messages; masked, the route stays.
    chip.ioapic_route(5, Some((LAPIC, 0x8053 | 0x4000)));
    chip.ioapic_route(5, None);
    handler(&g, 0x53, 0x2300, true, lapic_eoi);
    send(0x8053 | 0x4000);
    assert_eq!((gsi.holds(0x53), gsi.holds(0x54)), (Some(true), Some(false)), "requested");
    g.run_to_stop(0);
    assert!(g.bus.take().contains(&Seen::Eoi(0x53)));
    // The PIC outside, through LINT0.
    let handle = g.vcpus[0].handle();
    lock(&g.bus.vectors).push_back(0x24);
    soon(&mut g, || handle.set_pin(CpuPin::Intr, true), |g| g.run_to_stop(0));
    assert_eq!(g.bus.out_values(0x70), [0x24]);
    let irqfds = g.vm.irqfds().expect("irqfds");
    assert!(irqfds.attach(4, event().as_fd(), None).is_err(), "lines are the model's");
}

#[test]
fn local_apic_outside() {
    let name = "local_apic_outside";
    let Some(mut g) = Setup::mode(IrqChipMode::User).build(name) else { return };
    lock(&g.bus.sysregs).extend([(msr::APIC_BASE, 0xfee0_0900), (msr::TSC_DEADLINE, 0), (0x802, 0x55)]);
    *lock(&g.bus.cr8) = Some(2);
    g.long(0);
    handler(&g, 13, 0x2000, true, |a| a.pop(rax));
    g.code(CODE, 64, |a| {
        a.mov(ecx, msr::APIC_BASE)?;
        a.rdmsr()?;
        a.out(0x71, eax)?;
        a.or(eax, msr::APIC_BASE_X2APIC as u32)?;
        a.wrmsr()?;
        a.mov(ecx, 0x802)?;
        a.rdmsr()?;
        a.out(0x71, eax)?;
        a.mov(rax, cr8)?;
        a.out(0x71, eax)?;
        a.mov(eax, 5)?;
        a.mov(cr8, rax)?;
        a.out(0x71, eax)?;
        // Nobody has this one: a general protection fault.
        a.mov(ecx, 0x808)?;
        a.rdmsr()
    });
    g.run_to_stop(0);
    assert_eq!(g.bus.out_values(0x71), [0xfee0_0900, 0x55, 2, 5]);
    assert_eq!(g.bus.out_values(0x70), [13]);
    assert_eq!(*lock(&g.bus.cr8), Some(5));
    assert_eq!(lock(&g.bus.sysregs)[&msr::APIC_BASE], 0xfee0_0d00);
    assert!(g.statistic("msr exits") >= 4);
}

#[test]
fn chips_keep_their_state_in_another_machine() {
    let name = "chips_keep_their_state_in_another_machine";
    let Some(mut g) = Setup::mode(IrqChipMode::Kernel).build(name) else { return };
    g.long(0);
    handler(&g, 0x24, 0x2000, true, pic_eoi);
    handler(&g, 0x52, 0x2100, true, lapic_eoi);
    g.code(CODE, 64, |a| {
        init_pic(a, [0xef, 0xff])?;
        enable_lapic(a)?;
        a.mov(ebx, IOAPIC as u32)?;
        a.mov(dword_ptr(rbx), 0x10 + 21 * 2)?;
        a.mov(dword_ptr(rbx + 0x10), 0x8052)?;
        for (port, value) in [(0x43, 0xb6), (0x42, 0x34), (0x42, 0x12)] {
            a.mov(al, value)?;
            a.out(port, al)?;
        }
        a.out(i32::from(PORT_STOP), al)?;
        idle(a)
    });
    g.run_to_stop(0);
    // Both wait: interrupts are off still.
    let (pic, level) = (line(&g, 4), line(&g, 21));
    pic.raise();
    level.raise();
    let mut twin = g.twin();
    let state = g.state(0);
    assert_eq!(state.events.interrupt, None);
    twin.set(0, state);
    for ((name, from), (_, to)) in g.devices().into_iter().zip(twin.devices()) {
        let saved = from.save().expect("saved");
        to.restore(&saved).unwrap_or_else(|e| panic!("{name}: {e}"));
        let again = to.save().expect("saved again");
        if name != "pit" {
            assert_eq!(again, saved, "{name}");
        }
    }
    twin.bus.take();
    twin.run_to_stop(0);
    twin.run_to_stop(0);
    let mut order = twin.bus.out_values(0x70);
    order.sort_unstable();
    assert_eq!(order, [0x24, 0x52]);
    // The level is still high, in the twin too.
    twin.run_to_stop(0);
    assert_eq!(twin.bus.out_values(0x70)[2], 0x52);
    line(&twin, 21).import_level(true);
    let low = line(&twin, 21);
    low.import_level(true);
    low.lower();
    let lapic: Arc<dyn mimus_core::device::Device> = twin.devices().pop().expect("local APICs").1;
    let state: LapicsState = lapic.save().expect("saved").decode().expect("decoded");
    state.apics[0].check().expect("valid");
    assert_eq!((state.apics[0].id, state.apics[0].svr), (0, 0x1ff));
}

#[test]
fn chips_refuse_what_cannot_be() {
    let name = "chips_refuse_what_cannot_be";
    let Some(g) = Setup::mode(IrqChipMode::Kernel).build(name) else { return };
    let devices = g.devices();
    let names: Vec<_> = devices.iter().map(|(n, _)| *n).collect();
    assert_eq!(names, ["pic", "ioapic", "pit", "lapic"]);
    let mut pic = PicState::reset();
    pic.master.lowest = 9;
    let bad = mimus_core::snapshot::Payload::encode(irqchip::PIC_SCHEMA, &pic).expect("encoded");
    assert!(devices[0].1.restore(&bad).unwrap_err().to_string().contains("lowest"));
    assert!(devices[1].1.restore(&bad).unwrap_err().to_string().contains("i8259"));
    let none = LapicsState::default();
    let none = mimus_core::snapshot::Payload::encode(irqchip::LAPIC_SCHEMA, &none).expect("encoded");
    assert!(devices[3].1.restore(&none).unwrap_err().to_string().contains("0 local APICs for 1"));
}

/// A level that no local APIC has is delivered, whatever is restored first.
#[test]
fn a_restored_level_is_delivered() {
    let name = "a_restored_level_is_delivered";
    let Some(mut g) = Setup::mode(IrqChipMode::Kernel).build(name) else { return };
    g.long(0);
    handler(&g, 0x52, 0x2000, true, lapic_eoi);
    g.code(CODE, 64, |a| {
        init_pic(a, [0xff, 0xff])?;
        enable_lapic(a)?;
        a.out(i32::from(PORT_STOP), al)?;
        idle(a)
    });
    g.run_to_stop(0);
    g.bus.take();
    let devices = g.devices();
    let saved: Vec<_> = devices.iter().map(|(_, d)| d.save().expect("saved")).collect();
    let mut ioapic: IoApicState = saved[1].decode().expect("decoded");
    ioapic.redirection[21] = 0x8052;
    ioapic.lines = 1 << 21;
    for ((name, device), payload) in devices.iter().zip(&saved) {
        let ours = mimus_core::snapshot::Payload::encode(irqchip::IOAPIC_SCHEMA, &ioapic).expect("encoded");
        let payload = if *name == "ioapic" { &ours } else { payload };
        device.restore(payload).unwrap_or_else(|e| panic!("{name}: {e}"));
    }
    for _ in 0..2 {
        devices.iter().for_each(|(_, device)| device.start());
    }
    let level = line(&g, 21);
    level.import_level(true);
    g.run_to_stop(0);
    level.lower();
    assert_eq!(g.bus.out_values(0x70), [0x52]);
}
