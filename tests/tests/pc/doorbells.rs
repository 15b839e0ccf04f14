//! Virtio devices under KVM: notifications that never leave the kernel, interrupts by descriptor, and neither is lost
//! when the machine is paused, saved and restored in between.

use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use iced_x86::code_asm::*;
use mimus_accel_kvm::{KvmAccelerator, Quirks};
use mimus_core::accel::Accelerator;
use mimus_core::arch::GuestArch;
use mimus_machines::machine::RunEnd;
use mimus_tcg::TcgFallback;

use crate::harness::{Pc, Setup, bzimage, handle_interrupts, skipped};

const DESC: u64 = 0x30_0000;
const AVAIL: u64 = 0x30_1000;
const USED: u64 = 0x30_2000;
const IDT: u64 = 0x30_3000;
/// Interrupts taken.
const COUNT: u64 = 0x30_4000;
/// Notifications given.
const ROUND: u64 = 0x30_4008;
const IDTR: u64 = 0x30_4010;
/// Interrupts taken with an interrupt status of 0: the device did not ask for them.
const SPURIOUS: u64 = 0x30_4020;
const BUFFER: u64 = 0x30_5000;
const STACK: u64 = 0x30_8000;
const ENTRY: u64 = 0x10_0200;

const VECTOR: u64 = 0x51;
const LAPIC: u64 = 0xfee0_0000;
const IOAPIC: u64 = 0xfec0_0000;
/// The last slot of virtio-mmio, and its input of the I/O APIC.
const SLOT: u64 = 0xfeb0_0e00;
const SLOT_PIN: u32 = 23;

/// How a device is reached.
#[derive(Clone, Copy)]
struct Wiring {
    board: &'static str,
    device: &'static str,
    /// The notification register.
    notify: u64,
    /// Status and acknowledgement of a level-triggered interrupt.
    level: Option<(u64, u64)>,
}

const BAR: u64 = 0xe000_0000;
const MMIO: Wiring = Wiring {
    board: "microvm",
    device: "virtio-rng-device",
    notify: SLOT + 0x50,
    level: Some((SLOT + 0x60, SLOT + 0x64)),
};
const PCI: Wiring = Wiring { board: "q35", device: "virtio-rng-pci,addr=6", notify: BAR + 0x3000, level: None };

/// `rounds` times: one buffer for the device, a notification, a halt until the interrupt has come.
fn program(w: &Wiring, rounds: u32) -> Vec<u8> {
    let mut a = CodeAssembler::new(64).unwrap();
    let mut build = || -> Result<(), IcedError> {
        let (mut round, mut wait, mut done, mut handler) =
            (a.create_label(), a.create_label(), a.create_label(), a.create_label());
        let mut count = a.create_label();
        a.mov(rsp, STACK)?;
        handle_interrupts(&mut a, handler, IDT, IDTR, VECTOR)?;
        if w.level.is_some() {
            a.mov(ebx, IOAPIC as u32)?;
            for (register, value) in [(0x11 + SLOT_PIN * 2, 0), (0x10 + SLOT_PIN * 2, 0x8000 | VECTOR as u32)] {
                a.mov(dword_ptr(rbx), register as i32)?;
                a.mov(dword_ptr(rbx + 0x10), value as i32)?;
            }
        }
        a.set_label(&mut round)?;
        a.mov(ebx, ROUND as u32)?;
        a.mov(ecx, dword_ptr(rbx))?;
        a.inc(ecx)?;
        a.mov(dword_ptr(rbx), ecx)?;
        a.mov(ebx, AVAIL as u32)?;
        a.mov(word_ptr(rbx + 2), cx)?;
        a.mov(ebx, w.notify as u32)?;
        match w.level {
            Some(_) => a.mov(dword_ptr(rbx), 0)?,
            None => a.mov(word_ptr(rbx), 0)?,
        }
        a.mov(ebx, COUNT as u32)?;
        a.set_label(&mut wait)?;
        a.cli()?;
        a.cmp(dword_ptr(rbx), ecx)?;
        a.jae(done)?;
        a.sti()?;
        a.hlt()?;
        a.jmp(wait)?;
        a.set_label(&mut done)?;
        a.cmp(ecx, rounds as i32)?;
        a.jb(round)?;
        a.mov(dx, 0xf4)?;
        a.mov(al, 0)?;
        a.out(dx, al)?;
        a.hlt()?;
        a.set_label(&mut handler)?;
        a.push(rax)?;
        a.push(rbx)?;
        if let Some((status, acknowledge)) = w.level {
            a.mov(ebx, status as u32)?;
            a.mov(eax, dword_ptr(rbx))?;
            a.mov(ebx, SPURIOUS as u32)?;
            a.test(eax, eax)?;
            a.je(count)?;
            a.mov(ebx, acknowledge as u32)?;
            a.mov(dword_ptr(rbx), eax)?;
        }
        a.mov(ebx, COUNT as u32)?;
        a.set_label(&mut count)?;
        a.inc(dword_ptr(rbx))?;
        a.mov(ebx, LAPIC as u32)?;
        a.mov(dword_ptr(rbx + 0xb0), 0)?;
        a.pop(rbx)?;
        a.pop(rax)?;
        a.iretq()
    };
    build().unwrap();
    a.assemble(ENTRY).unwrap()
}

fn setup(w: &Wiring, irqchip: &str, rounds: u32) -> Setup {
    let mut kernel = bzimage();
    let code = program(w, rounds);
    kernel[0x600..0x600 + code.len()].copy_from_slice(&code);
    let mut setup = Setup::new(w.board).kernel(&kernel).device("isa-debug-exit").device(w.device);
    setup = setup.option("kernel-irqchip", irqchip);
    setup.config.memory = 32 << 20;
    Setup { accel: Box::new(KvmAccelerator), emulation_failure: Some(Arc::new(TcgFallback)), ..setup }
}

/// A driver's work: registers, the ring with one buffer again and again, the message.
fn prepare(pc: &Pc, w: &Wiring) {
    pc.store(DESC, 8, BUFFER);
    pc.store(DESC + 8, 8, 16 | 2 << 32);
    pc.store(IDTR, 8, 0xfff | IDT << 16);
    pc.store(IDTR + 8, 8, IDT >> 48);
    let rings = [DESC, AVAIL, USED];
    if w.level.is_some() {
        let set = |at: u64, value: u64| pc.store(SLOT + at, 4, value);
        [1, 3].into_iter().for_each(|status| set(0x70, status));
        set(0x24, 1);
        set(0x20, 1);
        set(0x70, 11);
        set(0x38, 8);
        rings.into_iter().zip([0x80, 0x90, 0xa0]).for_each(|(ring, at)| set(at, ring));
        set(0x44, 1);
        return set(0x70, 15);
    }
    let config = |at: u32| {
        pc.output(0xcf8, 4, u64::from(0x8000_3000 | at & !3));
        0xcfc + (at & 3) as u16
    };
    let (registers, table) = (BAR, BAR + 0x1_0000);
    for (at, value) in [(0x20, registers), (0x24, 0), (0x14, table), (4, 6)] {
        pc.output(config(at), 4, value);
    }
    for (at, value) in [(0x10, LAPIC), (0x14, 0), (0x18, VECTOR), (0x1c, 0)] {
        pc.store(table + at, 4, value);
    }
    let capability = (0x40..0x100).step_by(4).find(|c| pc.input(config(*c), 1) == 0x11).unwrap();
    pc.output(config(capability + 2), 2, 0x8000);
    let set = |at: u64, bytes: u64, value: u64| pc.store(registers + at, bytes, value);
    [1, 3].into_iter().for_each(|status| set(0x14, 1, status));
    set(8, 4, 1);
    set(0xc, 4, 1);
    set(0x14, 1, 11);
    set(0x18, 2, 8);
    set(0x1a, 2, 1);
    rings.into_iter().zip([0x20, 0x28, 0x30]).for_each(|(ring, at)| set(at, 4, ring));
    set(0x1c, 2, 1);
    set(0x14, 1, 15);
}

fn kvm_works(test: &str) -> bool {
    KvmAccelerator.probe(GuestArch::X86_64).map_err(|why| skipped(test, &why.to_string())).is_ok()
}

/// Until the guest has taken so many interrupts.
fn wait_for(pc: &Pc, interrupts: u64, what: &str) {
    let deadline = Instant::now() + Duration::from_secs(120);
    while pc.load(COUNT, 4) < interrupts {
        let so_far = (pc.load(ROUND, 4), pc.load(USED + 2, 2), pc.load(COUNT, 4));
        assert!(Instant::now() < deadline, "{what}: notifications, answers and interrupts are {so_far:?}");
        std::thread::sleep(Duration::from_micros(100));
    }
}

/// No interrupt was taken that the device had not asked for. A local APIC that takes an interrupt as ended when it
/// is delivered (`early_eoi`) has the I/O APIC deliver a level again that the handler has not lowered yet: at most
/// once for each time it was raised, and nowhere else. The interrupt status tells the guest.
fn check_spurious(pc: &Pc, w: &Wiring, irqchip: &str) {
    let (spurious, given) = (pc.load(SPURIOUS, 4), pc.load(ROUND, 4));
    let again = w.level.is_some() && irqchip != "off" && early_eoi();
    let most = if again { given } else { 0 };
    assert!(spurious <= most, "{} {irqchip}: {spurious} interrupts were not asked for, of {given}", w.board);
}

fn early_eoi() -> bool {
    static FOUND: OnceLock<bool> = OnceLock::new();
    *FOUND.get_or_init(|| Quirks::of_host().expect("KVM works").early_eoi)
}

fn statistic(pc: &Pc, name: &str) -> u64 {
    pc.machine.vm().statistics().iter().find(|s| s.0 == name).unwrap_or_else(|| panic!("{name}")).1
}

#[test]
fn notifications_stay_in_the_kernel() {
    const ROUNDS: u32 = 300;
    for (w, irqchip) in [(MMIO, "on"), (PCI, "on"), (PCI, "split"), (MMIO, "split"), (MMIO, "off"), (PCI, "off")] {
        let name = "notifications_stay_in_the_kernel";
        if !kvm_works(name) {
            return;
        }
        let mut pc = setup(&w, irqchip, ROUNDS).start();
        prepare(&pc, &w);
        assert!(statistic(&pc, "doorbells") >= 1, "{}", w.board);
        pc.machine.resume();
        wait_for(&pc, u64::from(ROUNDS), &format!("{} {irqchip}", w.board));
        assert_eq!(pc.machine.wait(), RunEnd::Exit(1), "{} {irqchip}", w.board);
        let (count, used) = (pc.load(COUNT, 4), pc.load(USED + 2, 2));
        assert_eq!((count, used), (ROUNDS.into(), ROUNDS.into()), "{} {irqchip}", w.board);
        check_spurious(&pc, &w, irqchip);
        let exits = statistic(&pc, "mmio exits");
        let each = match (w.level, irqchip) {
            (None, "on" | "split") => 0,
            // Status and acknowledgement of the interrupt.
            (Some(_), "on" | "split") => 2,
            // And the end of interrupt, in the local APIC's model.
            (None, _) => 1,
            (Some(_), _) => 3,
        };
        // One that was not asked for reads the status, too.
        let most = each * u64::from(ROUNDS) + pc.load(SPURIOUS, 4) + 30;
        assert!(exits <= most, "{} {irqchip}: {exits} exits", w.board);
        // With the I/O APIC outside of the kernel its level-triggered inputs are messages, too.
        let expected = irqchip == "split" || irqchip == "on" && w.level.is_none();
        assert_eq!(statistic(&pc, "message routes") > 0, expected, "{} {irqchip}", w.board);
    }
}

/// The same program where every notification is an access like any other.
#[test]
fn the_same_under_the_translator() {
    const ROUNDS: u32 = 300;
    for w in [MMIO, PCI] {
        let mut pc = Setup { emulation_failure: None, ..setup(&w, "off", ROUNDS).translated() }.start();
        prepare(&pc, &w);
        pc.machine.resume();
        wait_for(&pc, ROUNDS.into(), w.board);
        assert_eq!(pc.machine.wait(), RunEnd::Exit(1), "{}", w.board);
        assert_eq!((pc.load(COUNT, 4), pc.load(USED + 2, 2)), (ROUNDS.into(), ROUNDS.into()), "{}", w.board);
        assert_eq!(pc.load(SPURIOUS, 4), 0, "{}", w.board);
    }
}

/// The machine is paused, saved and restored into another at any moment: the guest would wait for ever for a
/// notification or an interrupt that is lost.
#[test]
fn nothing_is_lost_over_save_and_restore() {
    let name = "nothing_is_lost_over_save_and_restore";
    if !kvm_works(name) {
        return;
    }
    let moves = std::env::var("MIMUS_STRESS_ROUNDS").ok().and_then(|n| n.parse().ok()).unwrap_or(24);
    for (w, irqchip) in [(PCI, "on"), (PCI, "split"), (MMIO, "on"), (MMIO, "split"), (PCI, "off")] {
        let mut pc = setup(&w, irqchip, u32::from(u16::MAX)).start();
        prepare(&pc, &w);
        pc.machine.resume();
        let mut seen = 0;
        for round in 0..moves {
            wait_for(&pc, seen + 3, &format!("{} {irqchip}, round {round}", w.board));
            pc.machine.pause();
            if round % 3 == 0 {
                let mut file = std::io::Cursor::new(Vec::new());
                pc.machine.save(&mut file).unwrap();
                drop(pc);
                pc = setup(&w, irqchip, u32::from(u16::MAX)).start();
                pc.machine.restore(&mut &file.into_inner()[..]).unwrap();
            }
            // In between, an interrupt may be on its way; none is there twice.
            let (given, used, taken) = (pc.load(ROUND, 4), pc.load(USED + 2, 2), pc.load(COUNT, 4));
            let order = taken <= used && used <= given && given - taken <= 1;
            assert!(order, "{} {irqchip}, round {round}: {given}, {used} and {taken}", w.board);
            check_spurious(&pc, &w, irqchip);
            seen = taken;
            pc.machine.resume();
        }
    }
}
