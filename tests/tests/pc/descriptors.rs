//! A level-triggered interrupt of a board by descriptor: a signal raises it, the guest's end of interrupt lowers it and is
//! told (irqfd with resample), for devices outside of the process.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use iced_x86::code_asm::*;
use mimus_accel_kvm::KvmAccelerator;
use mimus_core::accel::Accelerator;
use mimus_core::arch::GuestArch;
use mimus_tcg::TcgFallback;
use rustix::event::{EventfdFlags, eventfd};

use crate::harness::{Pc, Setup, bzimage, handle_interrupts, skipped};

const ENTRY: u64 = 0x10_0200;
const IDT: u64 = 0x30_0000;
const IDTR: u64 = 0x30_1000;
/// Interrupts taken.
const COUNT: u64 = 0x30_1010;
/// Not 0 once the input is open.
const OPEN: u64 = 0x30_1018;
const STACK: u64 = 0x30_4000;
const VECTOR: u64 = 0x52;
const LAPIC: u64 = 0xfee0_0000;
const IOAPIC: u64 = 0xfec0_0000;
/// An input of the I/O APIC that nothing is on.
const GSI: u32 = 20;

/// Opens the input, level-triggered, and waits; each interrupt is counted.
fn program() -> Vec<u8> {
    let mut a = CodeAssembler::new(64).unwrap();
    let mut build = || -> Result<(), IcedError> {
        let (mut handler, mut wait) = (a.create_label(), a.create_label());
        a.mov(rsp, STACK)?;
        handle_interrupts(&mut a, handler, IDT, IDTR, VECTOR)?;
        a.mov(ebx, IOAPIC as u32)?;
        for (register, value) in [(0x11 + GSI * 2, 0), (0x10 + GSI * 2, 0x8000 | VECTOR as u32)] {
            a.mov(dword_ptr(rbx), register as i32)?;
            a.mov(dword_ptr(rbx + 0x10), value as i32)?;
        }
        a.mov(ebx, OPEN as u32)?;
        a.mov(dword_ptr(rbx), 1)?;
        a.sti()?;
        a.set_label(&mut wait)?;
        a.hlt()?;
        a.jmp(wait)?;
        a.set_label(&mut handler)?;
        a.push(rbx)?;
        a.mov(ebx, COUNT as u32)?;
        a.inc(dword_ptr(rbx))?;
        a.mov(ebx, LAPIC as u32)?;
        a.mov(dword_ptr(rbx + 0xb0), 0)?;
        a.pop(rbx)?;
        a.iretq()
    };
    build().unwrap();
    a.assemble(ENTRY).unwrap()
}

fn start(board: &str, irqchip: &str) -> Pc {
    let mut kernel = bzimage();
    let code = program();
    kernel[0x600..0x600 + code.len()].copy_from_slice(&code);
    let mut setup = Setup::new(board).kernel(&kernel).option("kernel-irqchip", irqchip);
    setup.config.memory = 32 << 20;
    let setup = Setup { accel: Box::new(KvmAccelerator), emulation_failure: Some(Arc::new(TcgFallback)), ..setup };
    let mut pc = setup.start();
    pc.store(IDTR, 8, 0xfff | IDT << 16);
    pc.store(IDTR + 8, 8, IDT >> 48);
    pc.machine.resume();
    pc
}

fn event() -> OwnedFd {
    eventfd(0, EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC).unwrap()
}

fn signal(fd: &OwnedFd) {
    rustix::io::write(fd, &1u64.to_ne_bytes()).unwrap();
}

fn wait_until(mut done: impl FnMut() -> bool, otherwise: impl Fn() -> String) {
    let deadline = Instant::now() + Duration::from_secs(120);
    while !done() {
        assert!(Instant::now() < deadline, "{}", otherwise());
        std::thread::sleep(Duration::from_micros(100));
    }
}

/// The counter of an eventfd, once it is not 0.
fn wait_signalled(fd: &OwnedFd, what: &str) -> u64 {
    let mut count = [0; 8];
    let told = || rustix::io::read(fd, &mut count).is_ok();
    wait_until(told, || format!("{what}: the end of the interrupt is not told"));
    u64::from_ne_bytes(count)
}

#[test]
fn a_level_by_descriptor() {
    let name = "a_level_by_descriptor";
    if let Err(why) = KvmAccelerator.probe(GuestArch::X86_64) {
        return skipped(name, &why.to_string());
    }
    for board in ["microvm", "q35"] {
        let mut pc = start(board, "on");
        let vm = pc.machine.vm().clone();
        let irqfds = vm.irqfds().unwrap();
        let (fd, resample) = (event(), event());
        irqfds.attach(GSI, fd.as_fd(), Some(resample.as_fd())).unwrap();
        // KVM does not deliver a level that was there before the input was opened: it tells its end, and the device
        // asks again. This one comes after.
        wait_until(|| pc.load(OPEN, 4) == 1, || format!("{board}: the input is not opened"));
        // Each signal is one interrupt and one end, whether it comes as news or because the device asks again at an end.
        for round in 1..=200 {
            signal(&fd);
            let ends = wait_signalled(&resample, board);
            wait_until(|| pc.load(COUNT, 4) >= round, || format!("{board}: interrupt {round} does not come"));
            assert_eq!((pc.load(COUNT, 4), ends), (round, 1), "{board}");
            if round % 50 == 0 {
                pc.machine.pause();
                pc.machine.resume();
            }
        }
        irqfds.detach(GSI, fd.as_fd()).unwrap();
        signal(&fd);
        pc.machine.pause();
        assert_eq!(pc.load(COUNT, 4), 200, "{board}: after it was detached");
    }
    // Lines are the model's then; those that the guest has opened are messages to the kernel.
    let pc = start("q35", "split");
    let vm = pc.machine.vm().clone();
    let refused = vm.irqfds().unwrap().attach(GSI + 1, event().as_fd(), Some(event().as_fd())).unwrap_err().to_string();
    assert!(refused.contains("kernel-irqchip=split"), "{refused}");
}
