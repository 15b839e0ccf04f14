//! The local APIC's TSC-deadline timer under the translator, and under KVM whoever runs the local APIC: never early, never
//! lost, over a move to another machine as well.

use std::sync::Arc;
use std::time::{Duration, Instant};

use iced_x86::code_asm::*;
use mimus_accel_kvm::KvmAccelerator;
use mimus_core::accel::Accelerator;
use mimus_core::arch::GuestArch;
use mimus_core::arch::x86::msr;
use mimus_machines::machine::RunEnd;
use mimus_tcg::TcgFallback;

use crate::harness::{Setup, bzimage, handle_interrupts, skipped};

const ENTRY: u64 = 0x10_0200;
const IDT: u64 = 0x30_0000;
const IDTR: u64 = 0x30_1000;
/// Interrupts taken.
const COUNT: u64 = 0x30_1010;
const STACK: u64 = 0x30_4000;
const LAPIC: u64 = 0xfee0_0000;
const VECTOR: u64 = 0x61;

/// The guest found out that the processor has no such timer; that it was early; that it still counts after it fired.
const NONE: i32 = 2;
const EARLY: i32 = 3;
const ARMED: i32 = 4;
/// Code `c` by the exit port.
const fn exit(c: u32) -> RunEnd {
    RunEnd::Exit(c * 2 + 1)
}

/// `rounds` times: a deadline `ticks` from now, and one that has passed already.
fn program(rounds: u32, ticks: u32) -> Vec<u8> {
    let mut a = CodeAssembler::new(64).unwrap();
    let mut build = || -> Result<(), IcedError> {
        let [mut round, mut past, mut wait, mut handler, mut end, mut arm, mut sleep] =
            [(); 7].map(|()| a.create_label());
        a.mov(rsp, STACK)?;
        a.mov(edi, NONE)?;
        a.mov(eax, 1)?;
        a.cpuid()?;
        a.test(ecx, 1 << 24)?;
        a.je(end)?;
        handle_interrupts(&mut a, handler, IDT, IDTR, VECTOR)?;
        a.mov(dword_ptr(rbx + 0x320), 0x4_0000 | VECTOR as i32)?;
        // esi: interrupts that must have come.
        a.xor(esi, esi)?;
        a.set_label(&mut round)?;
        a.rdtsc()?;
        a.shl(rdx, 32)?;
        a.or(rax, rdx)?;
        a.add(rax, ticks as i32)?;
        a.call(arm)?;
        a.set_label(&mut past)?;
        a.mov(eax, 1)?;
        a.call(arm)?;
        a.cmp(esi, (rounds * 2) as i32)?;
        a.jb(round)?;
        a.xor(edi, edi)?;
        a.set_label(&mut end)?;
        a.mov(eax, edi)?;
        a.mov(dx, 0xf4)?;
        a.out(dx, al)?;
        a.hlt()?;
        // Arms it for rax, waits for its interrupt and looks whether that was right.
        a.set_label(&mut arm)?;
        a.mov(r8, rax)?;
        a.mov(rdx, rax)?;
        a.shr(rdx, 32)?;
        a.mov(ecx, msr::TSC_DEADLINE)?;
        a.wrmsr()?;
        a.inc(esi)?;
        a.mov(ebx, COUNT as u32)?;
        a.set_label(&mut wait)?;
        a.cli()?;
        a.cmp(dword_ptr(rbx), esi)?;
        a.jae(sleep)?;
        a.sti()?;
        a.hlt()?;
        a.jmp(wait)?;
        a.set_label(&mut sleep)?;
        a.mov(edi, EARLY)?;
        a.rdtsc()?;
        a.shl(rdx, 32)?;
        a.or(rax, rdx)?;
        a.cmp(rax, r8)?;
        a.jb(end)?;
        a.mov(edi, ARMED)?;
        a.mov(ecx, msr::TSC_DEADLINE)?;
        a.rdmsr()?;
        a.or(eax, edx)?;
        a.jne(end)?;
        a.ret()?;
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

/// In the place of who runs the interrupt controllers under KVM.
const TRANSLATOR: &str = "translator";

fn setup(irqchip: &str, rounds: u32, ticks: u32) -> Setup {
    let mut kernel = bzimage();
    let code = program(rounds, ticks);
    kernel[0x600..0x600 + code.len()].copy_from_slice(&code);
    let setup = Setup::new("microvm").kernel(&kernel).device("isa-debug-exit");
    let mut setup = if irqchip == TRANSLATOR { setup.translated() } else { setup.option("kernel-irqchip", irqchip) };
    setup.config.memory = 32 << 20;
    setup.config.cpu = Some("max".to_owned());
    if irqchip == TRANSLATOR {
        return setup;
    }
    Setup { accel: Box::new(KvmAccelerator), emulation_failure: Some(Arc::new(TcgFallback)), ..setup }
}

fn kvm_works(test: &str) -> bool {
    KvmAccelerator.probe(GuestArch::X86_64).map_err(|why| skipped(test, &why.to_string())).is_ok()
}

#[test]
fn deadlines_are_kept() {
    if kvm_works("deadlines_are_kept") {
        keeps_deadlines(&["off", "split", "on"]);
    }
}

#[test]
#[cfg(target_arch = "x86_64")]
fn deadlines_are_kept_by_the_translator() {
    keeps_deadlines(&[TRANSLATOR]);
}

fn keeps_deadlines(irqchips: &[&str]) {
    for irqchip in irqchips {
        let mut pc = setup(irqchip, 100, 200_000).start();
        pc.store(IDTR, 8, 0xfff | IDT << 16);
        pc.store(IDTR + 8, 8, IDT >> 48);
        pc.machine.resume();
        assert_eq!(pc.machine.wait(), exit(0), "{irqchip}: after {} interrupts", pc.load(COUNT, 4));
        assert_eq!(pc.load(COUNT, 4), 200, "{irqchip}");
    }
}

#[test]
fn deadlines_are_kept_over_save_and_restore() {
    if kvm_works("deadlines_are_kept_over_save_and_restore") {
        keeps_deadlines_over_moves(&["off", "on"]);
    }
}

#[test]
#[cfg(target_arch = "x86_64")]
fn deadlines_are_kept_by_the_translator_over_save_and_restore() {
    keeps_deadlines_over_moves(&[TRANSLATOR]);
}

fn keeps_deadlines_over_moves(irqchips: &[&str]) {
    for irqchip in irqchips {
        let make = || setup(irqchip, 1 << 20, 20_000_000).start();
        let mut pc = make();
        pc.store(IDTR, 8, 0xfff | IDT << 16);
        pc.store(IDTR + 8, 8, IDT >> 48);
        pc.machine.resume();
        let mut seen = 0;
        for _ in 0..6 {
            let deadline = Instant::now() + Duration::from_secs(120);
            while pc.load(COUNT, 4) < seen + 1 {
                assert!(Instant::now() < deadline, "{irqchip}: nothing after {seen} interrupts");
                std::thread::sleep(Duration::from_micros(200));
            }
            pc.machine.pause();
            seen = pc.load(COUNT, 4);
            let mut file = std::io::Cursor::new(Vec::new());
            pc.machine.save(&mut file).unwrap();
            drop(pc);
            pc = make();
            pc.machine.restore(&mut &file.into_inner()[..]).unwrap();
            pc.machine.resume();
        }
    }
}
