//! Guests that sleep (S3) and are woken by the RTC's alarm, on the host's KVM, where it has one, and under the translator;
//! with firmware and without.

use std::time::{Duration, Instant};

use iced_x86::IcedError;
use iced_x86::code_asm::*;
use mimus_machines::config::{Drive, DriveInterface};
use mimus_machines::machine::RunEnd;

use crate::harness::{Pc, Setup, acpi_tables, bzimage, number};
use crate::programs::{Engine, LIMIT, on, wait_for};

/// Where the guest sees that all is in place.
const GO: u64 = 0x8000;
/// What it is to have kept.
const KEPT: u64 = 0x8800;
/// Its waking vector, where nothing is of what a kernel is handed over, and nothing of a BIOS.
const AWAKE: u64 = 0x5_0000;

fn print(a: &mut CodeAssembler, c: u8) -> Result<(), IcedError> {
    a.mov(dx, 0x3f8)?;
    a.mov(al, u32::from(c))?;
    a.out(dx, al)
}

fn cmos(a: &mut CodeAssembler, register: u32, value: u32) -> Result<(), IcedError> {
    a.mov(al, register)?;
    a.out(0x70, al)?;
    a.mov(al, value)?;
    a.out(0x71, al)
}

/// PM1_CNT: SLP_EN with this SLP_TYP, and SCI_EN.
fn power_management(a: &mut CodeAssembler, slp_typ: u32) -> Result<(), IcedError> {
    a.mov(dx, 0x604)?;
    a.mov(ax, 1 << 13 | slp_typ << 10 | 1)?;
    a.out(dx, ax)?;
    a.hlt()
}

/// Says `!`, waits until it may, sets the alarm to any second, says `S` and sleeps. As a boot sector or a 64-bit kernel.
fn sleeper(bits: u32, at: u64) -> Result<Vec<u8>, IcedError> {
    let mut a = CodeAssembler::new(bits)?;
    let mut wait = a.create_label();
    a.cli()?;
    if bits == 16 {
        a.xor(ax, ax)?;
        a.mov(ds, ax)?;
    }
    print(&mut a, b'!')?;
    a.set_label(&mut wait)?;
    a.pause()?;
    if bits == 16 {
        a.cmp(byte_ptr(GO as u32), 0)?;
    } else {
        a.mov(rsi, GO)?;
        a.cmp(byte_ptr(rsi), 0)?;
    }
    a.je(wait)?;
    // "Don't care" in each byte of the alarm; then its enable, with 24-hour BCD.
    for register in [1, 3, 5] {
        cmos(&mut a, register, 0xc0)?;
    }
    cmos(&mut a, 11, 0x22)?;
    // PM1_EN: RTC_EN.
    a.mov(dx, 0x602)?;
    a.mov(ax, 1 << 10)?;
    a.out(dx, ax)?;
    print(&mut a, b'S')?;
    power_management(&mut a, 1)?;
    a.assemble(at)
}

/// At the waking vector: says `W` if memory is as it was, and turns the machine off.
fn waker() -> Result<Vec<u8>, IcedError> {
    let mut a = CodeAssembler::new(16)?;
    let mut lost = a.create_label();
    a.xor(ax, ax)?;
    a.mov(ds, ax)?;
    a.cmp(dword_ptr(KEPT as u32), 0x1234_5678)?;
    a.jne(lost)?;
    print(&mut a, b'W')?;
    a.set_label(&mut lost)?;
    power_management(&mut a, 0)?;
    a.assemble(0)
}

fn sleeps(engine: Engine, test: &str, board: &str, setup: Setup) {
    let Some(mut pc) = on(engine, test, setup) else { return };
    wait_for(&pc, "!");
    lay_out(&pc);
    let deadline = Instant::now() + LIMIT;
    let end = loop {
        if let Some(end) = pc.settle() {
            break end;
        }
        let (state, text) = (pc.machine.state(), pc.output_text());
        assert!(Instant::now() < deadline, "{board}: {state:?} after {text:?}: {}", pc.bootstrap());
        std::thread::sleep(Duration::from_millis(20));
    };
    assert_eq!(end, RunEnd::PowerOff, "{board}: {}", pc.output_text());
    let text = pc.output_text();
    assert!(text.contains("!S") && text.ends_with('W'), "{board}: {text}");
}

/// Puts the waking vector where firmware looks for it, the code it leads to, and what is to stay; lets the guest go.
fn lay_out(pc: &Pc) {
    let tables = acpi_tables(pc);
    let fadt = &tables.iter().find(|t| t.0 == "FACP").unwrap().1;
    let facs = number(fadt, 36, 4);
    pc.store(facs + 12, 4, AWAKE);
    for (at, byte) in (AWAKE..).zip(waker().unwrap()) {
        pc.store(at, 1, byte.into());
    }
    pc.store(KEPT, 4, 0x1234_5678);
    pc.store(GO, 1, 1);
}

fn without_firmware(engine: Engine) {
    for board in ["q35", "pc"] {
        let mut kernel = bzimage();
        let code = sleeper(64, 0x10_0200).unwrap();
        kernel[0x600..0x600 + code.len()].copy_from_slice(&code);
        sleeps(engine, "without_firmware", board, Setup::new(board).kernel(&kernel).cpus(2));
    }
}

fn through_seabios(engine: Engine) {
    for board in ["q35", "pc"] {
        let mut disk = sleeper(16, 0x7c00).unwrap();
        disk.resize(510, 0);
        disk.extend([0x55, 0xaa]);
        disk.resize(1 << 20, 0);
        let mut setup = Setup::new(board).cpus(2);
        let file = Some(setup.file("disk.img", &disk));
        let interface = DriveInterface::Virtio;
        setup.config.drives.push(Drive { file, interface, format: Some("raw".into()), ..Drive::default() });
        sleeps(engine, "through_seabios", board, setup);
    }
}

#[test]
fn kvm_without_firmware() {
    without_firmware(Engine::Kvm);
}

#[test]
fn tcg_without_firmware() {
    without_firmware(Engine::Tcg);
}

#[test]
fn kvm_through_seabios() {
    through_seabios(Engine::Kvm);
}

#[test]
fn tcg_through_seabios() {
    through_seabios(Engine::Tcg);
}
