//! Small guest programs, saved in the middle and gone on with in another machine.

use mimus_tests::cpus::alone;
use mimus_tests::riscv::reg::*;
use mimus_tests::riscv::{Amo, Asm, addi, amo_d, csrrci, csrrs, csrrw, i, insn, ld, s};

use crate::harness::{Engine, Guest, Setup};

const MEMORY: u64 = 16 << 20;
const KERNEL: u64 = 0x8020_0000;
const COUNTER: i32 = 0x600;
const STEPS: u64 = 60;
const UART: u64 = 0x1000_0000;

const SIE: u16 = 0x104;
const SIP: u16 = 0x144;
const STIMECMP: u16 = 0x14d;
const TIME: u16 = 0xc01;

fn andi(rd: u32, rs: u32, bits: i32) -> u32 {
    i(0x13, 7, rd, rs, bits)
}

fn sbi(a: &mut Asm, extension: u64, function: u64) {
    a.li(A7, extension).li(A6, function).op([insn::ECALL]);
}

/// What each step prints.
fn letter(step: u64) -> char {
    char::from(64 + (step % 32) as u8)
}

fn whole_text() -> String {
    (1..=STEPS).map(letter).collect()
}

/// Hart 0 waits for its timer, then for hart 1, which an IPI wakes, to count; then prints a letter. Every part of
/// a step would be missed for good if it were lost. `sstc`: the timer is the hart's own, not the firmware's.
fn program(sstc: bool) -> Vec<u8> {
    let mut a = Asm::new(KERNEL);
    // a0 is the hart; S1 the address of the counter, S0 the step.
    a.la(S1, "data").li(S0, 0).li(T0, 1 << 5).op([csrrs(ZERO, SIE, T0)]);
    a.li(A0, 1).la(A1, "second").li(A2, 0);
    sbi(&mut a, 0x48_534d, 0);
    a.label("step").li(T1, 2000).op([csrrs(T0, TIME, ZERO), mimus_tests::riscv::add(A0, T0, T1)]);
    if sstc {
        a.op([csrrw(ZERO, STIMECMP, A0)]);
    } else {
        sbi(&mut a, 0x5449_4d45, 0);
    }
    a.label("sleep").op([insn::WFI, csrrs(T0, SIP, ZERO), andi(T0, T0, 1 << 5)]).beqz(T0, "sleep");
    a.li(A0, u64::MAX);
    if sstc {
        a.op([csrrw(ZERO, STIMECMP, A0)]);
    } else {
        sbi(&mut a, 0x5449_4d45, 0);
    }
    a.op([addi(S0, S0, 1)]).li(A0, 2).li(A1, 0);
    sbi(&mut a, 0x73_5049, 0);
    a.label("spin").op([insn::PAUSE, ld(T0, S1, 0)]).branch(1, T0, S0, "spin");
    a.li(T1, UART).label("full").op([i(0x03, 4, T0, T1, 5), andi(T0, T0, 0x20)]).beqz(T0, "full");
    a.op([andi(T0, S0, 31), addi(T0, T0, 64), s(0, T0, T1, 0)]);
    a.li(T0, STEPS).branch(1, T0, S0, "step");
    a.li(A0, 0).li(A1, 0);
    sbi(&mut a, 0x5352_5354, 0);
    a.label("never").jump(ZERO, "never");

    a.label("second").la(S1, "data").li(T0, 2).op([csrrs(ZERO, SIE, T0)]);
    a.label("wait").op([insn::WFI, csrrs(T0, SIP, ZERO), andi(T0, T0, 2)]).beqz(T0, "wait");
    a.op([csrrci(ZERO, SIP, 2), addi(T2, ZERO, 1), amo_d(Amo::Add, ZERO, T2, S1)]).jump(ZERO, "wait");
    while a.here() < KERNEL + COUNTER as u64 {
        a.op([0]);
    }
    a.label("data").op([0, 0]);
    a.finish()
}

fn setup(sstc: bool) -> Setup {
    Setup::new(2, MEMORY).kernel(&program(sstc))
}

/// Runs until `n` more letters are there.
fn letters(guest: &mut Guest, n: usize) {
    let want = guest.console.text().len() + n;
    guest.run_until(move |text| text.len() >= want);
}

#[test]
fn a_program_runs() {
    let _alone = alone();
    for sstc in [false, true] {
        let mut guest = setup(sstc).start(Engine::Jit);
        guest.run_to_end();
        assert_eq!(guest.console.text(), whole_text(), "sstc {sstc}");
    }
}

#[test]
fn from_machine_to_machine() {
    let _alone = alone();
    for sstc in [false, true] {
        let setup = setup(sstc);
        let mut guest = setup.start(Engine::Jit);
        let mut text = String::new();
        for engine in [Engine::Jit, Engine::Interp, Engine::Null, Engine::Interp, Engine::Jit] {
            if guest.engine == Engine::Null {
                // Runs nothing, but keeps everything.
                guest.machine.resume();
                guest.machine.pause();
            } else {
                letters(&mut guest, 9);
            }
            let snapshot = guest.save();
            text += &guest.console.text();
            drop(guest);
            guest = setup.restored(engine, &snapshot);
            assert_eq!(guest.console.text(), "", "nothing is printed by restoring");
        }
        guest.run_to_end();
        assert_eq!(text + &guest.console.text(), whole_text(), "sstc {sstc}");
    }
}

#[test]
fn saving_disturbs_nothing() {
    let _alone = alone();
    let setup = setup(true);
    let mut guest = setup.start(Engine::Jit);
    let mut last = Vec::new();
    for _ in 0..20 {
        letters(&mut guest, 2);
        last = guest.save();
        assert_eq!(guest.save(), last, "paused, it stays the same");
    }
    let before = guest.console.text().len();
    guest.run_to_end();
    assert_eq!(guest.console.text(), whole_text());
    // The last snapshot, in a machine that ran something else.
    let mut other = setup.start(Engine::Jit);
    letters(&mut other, 3);
    other.restore(&last).unwrap();
    let own = other.console.text().len();
    other.run_to_end();
    assert_eq!(other.console.text()[own..], whole_text()[before..]);
}

#[test]
fn restored_twice_from_one_snapshot() {
    let _alone = alone();
    let setup = setup(false);
    let mut guest = setup.start(Engine::Jit);
    letters(&mut guest, 11);
    let snapshot = guest.save();
    let before = guest.console.text().len();
    drop(guest);
    let mut first = setup.restored(Engine::Jit, &snapshot);
    first.run_to_end();
    let mut second = setup.restored(Engine::Jit, &snapshot);
    letters(&mut second, 5);
    second.restore(&snapshot).unwrap();
    let again = second.console.text().len();
    second.run_to_end();
    assert_eq!(first.console.text(), whole_text()[before..]);
    assert_eq!(second.console.text()[again..], whole_text()[before..], "back and on again");
}

#[test]
fn reset_after_a_restore() {
    let _alone = alone();
    let setup = setup(true);
    let mut guest = setup.start(Engine::Jit);
    letters(&mut guest, 9);
    let snapshot = guest.save();
    drop(guest);
    let mut guest = setup.restored(Engine::Jit, &snapshot);
    guest.machine.reset().unwrap();
    guest.run_to_end();
    assert_eq!(guest.console.text(), whole_text(), "from the beginning");
}

/// Firmware's mode, without the SBI: the machine's timer through the ACLINT, an interrupt of the UART through the
/// PLIC, taken as traps.
#[test]
fn machine_mode_with_interrupts() {
    let _alone = alone();
    const BASE: u64 = 0x8000_0000;
    let mut a = Asm::new(BASE);
    a.la(T0, "trap").op([csrrw(ZERO, 0x305, T0)]);
    // PLIC: priority of source 10, enabled for machine mode of hart 0. UART: transmitter-empty interrupt.
    a.li(T1, 0xc00_0000).li(T2, 1).op([mimus_tests::riscv::sw(T2, T1, 40)]);
    a.li(T1, 0xc00_2000).li(T2, 1 << 10).op([mimus_tests::riscv::sw(T2, T1, 0)]);
    a.li(S2, UART).li(S3, 0xc20_0000).li(S0, 0).li(S1, 0);
    a.li(T0, 1 << 7 | 1 << 11).op([csrrs(ZERO, 0x304, T0), mimus_tests::riscv::csrrsi(ZERO, 0x300, 8)]);
    a.label("arm").li(T1, 0x200_bff8).op([ld(T0, T1, 0), addi(T0, T0, 2000)]);
    a.li(T1, 0x200_4000).op([mimus_tests::riscv::sd(T0, T1, 0), addi(S1, S1, 1)]);
    a.label("wait").op([insn::WFI]).branch(1, S0, S1, "wait");
    a.li(T0, STEPS).branch(1, T0, S1, "arm");
    a.li(T1, 0x10_0000).li(T0, 0x5555).op([mimus_tests::riscv::sw(T0, T1, 0)]);
    a.label("never").jump(ZERO, "never");
    // The timer: enables the UART's interrupt, which prints the next letter and counts the step.
    a.label("trap").op([csrrs(T3, 0x342, ZERO), andi(T3, T3, 15)]).li(T4, 7).branch(1, T3, T4, "external");
    a.li(T3, u64::MAX).li(T4, 0x200_4000).op([mimus_tests::riscv::sd(T3, T4, 0)]);
    a.li(T3, 2).op([s(0, T3, S2, 1), insn::MRET]);
    a.label("external").op([mimus_tests::riscv::lw(T4, S3, 4), i(0x03, 4, T3, S2, 2)]);
    a.op([s(0, ZERO, S2, 1), addi(S0, S0, 1), andi(T3, S0, 31), addi(T3, T3, 64), s(0, T3, S2, 0)]);
    a.op([mimus_tests::riscv::sw(T4, S3, 4), insn::MRET]);
    let setup = Setup::new(1, MEMORY).bare().kernel(&a.finish());
    let mut guest = setup.start(Engine::Jit);
    let mut text = String::new();
    for engine in [Engine::Jit, Engine::Interp, Engine::Jit] {
        letters(&mut guest, 13);
        let snapshot = guest.save();
        text += &guest.console.text();
        drop(guest);
        guest = setup.restored(engine, &snapshot);
    }
    guest.run_to_end();
    assert_eq!(text + &guest.console.text(), whole_text());
}
