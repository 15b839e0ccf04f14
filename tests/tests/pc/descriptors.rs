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

use crate::harness::{Pc, Setup, bzimage, skipped};

const ENTRY: u64 = 0x10_0200;
const IDT: u64 = 0x30_0000;
const IDTR: u64 = 0x30_1000;
/// Interrupts taken.
const COUNT: u64 = 0x30_1010;
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
        a.lea(rax, ptr(handler))?;
        // Low word, selector and type, middle word, high half of the gate.
        a.mov(ebx, (IDT + VECTOR * 16) as u32)?;
        a.mov(word_ptr(rbx), ax)?;
        a.shr(rax, 16)?;
        a.mov(dword_ptr(rbx + 2), 0x8e00_0010u32 as i32)?;
        a.mov(word_ptr(rbx + 6), ax)?;
        a.mov(qword_ptr(rbx + 8), 0)?;
        a.mov(ebx, IDTR as u32)?;
        a.lidt(ptr(rbx))?;
        a.mov(ebx, LAPIC as u32)?;
        a.mov(dword_ptr(rbx + 0xf0), 0x1ff)?;
        a.mov(ebx, IOAPIC as u32)?;
        for (register, value) in [(0x11 + GSI * 2, 0), (0x10 + GSI * 2, 0x8000 | VECTOR as u32)] {
            a.mov(dword_ptr(rbx), register as i32)?;
            a.mov(dword_ptr(rbx + 0x10), value as i32)?;
        }
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

/// The counter of an eventfd, once it is not 0.
fn wait_signalled(fd: &OwnedFd, what: &str) -> u64 {
    let deadline = Instant::now() + Duration::from_secs(120);
    let mut count = [0; 8];
    while rustix::io::read(fd, &mut count).is_err() {
        assert!(Instant::now() < deadline, "{what}: the end of the interrupt is not told");
        std::thread::sleep(Duration::from_micros(100));
    }
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
        // Each signal is one interrupt and one end, whether it comes as news or because the device asks again at an end.
        for round in 1..=200 {
            signal(&fd);
            let ends = wait_signalled(&resample, board);
            let deadline = Instant::now() + Duration::from_secs(120);
            while pc.load(COUNT, 4) < round {
                assert!(Instant::now() < deadline, "{board}: interrupt {round} does not come");
                std::thread::sleep(Duration::from_micros(100));
            }
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
