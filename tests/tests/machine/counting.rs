//! Timers of a machine whose time is its instructions (`-icount`): each fires before the very instruction that its time
//! says, wherever in a block of translated code that is.

use mimus_machines::config::Icount;
use mimus_tests::cpus::alone;
use mimus_tests::riscv::reg::*;
use mimus_tests::riscv::{Asm, Reg, add, addi, csrrs, csrrw, insn, r, s};

use crate::harness::{Engine, Setup};

const KERNEL: u64 = 0x8020_0000;
const UART: u64 = 0x1000_0000;
/// An instruction takes 1 ns and the timer counts in 100 ns: this many instructions.
const TICK: u64 = 100;
const TIMES: u64 = 400;

const SSTATUS: u16 = 0x100;
const SIE: u16 = 0x104;
const STVEC: u16 = 0x105;
const STIMECMP: u16 = 0x14d;
const TIME: u16 = 0xc01;
const INSTRET: u16 = 0xc02;

fn remu(rd: Reg, rs1: Reg, rs2: Reg) -> u32 {
    r(0x33, 7, 1, rd, rs1, rs2)
}

/// Interrupts a loop of seven instructions, some in stretches of one, at multiples of [`TICK`]. The handler prints `.` if as
/// many instructions (mod `TICK`) have been executed as the first time.
fn program() -> Vec<u8> {
    let mut a = Asm::new(KERNEL);
    a.la(T0, "timer").op([csrrw(ZERO, STVEC, T0)]);
    a.li(S0, 0).li(S1, TIMES).li(S2, UART).li(S3, TICK).li(A4, 70);
    a.op([csrrs(T0, TIME, ZERO), add(T0, T0, A4), csrrw(ZERO, STIMECMP, T0)]);
    a.li(T0, 1 << 5).op([csrrs(ZERO, SIE, T0), csrrs(ZERO, SSTATUS, T0)]).li(T0, 2).op([csrrs(ZERO, SSTATUS, T0)]);
    a.label("loop").op([addi(A0, A0, 1)]).jump(ZERO, "one");
    a.label("two").op([addi(A0, A0, 1)]).beqz(ZERO, "three");
    a.label("one").beqz(ZERO, "two");
    a.label("three").op([addi(A1, ZERO, 1)]).bnez(A1, "loop");

    a.label("timer").op([csrrs(T1, INSTRET, ZERO), remu(T1, T1, S3)]).bnez(S0, "later");
    a.op([add(A5, T1, ZERO)]);
    a.label("later").li(T2, u64::from(b'.')).branch(0, T1, A5, "same").op([addi(T2, ZERO, i32::from(b'x'))]);
    a.label("same").op([s(0, T2, S2, 0), addi(S0, S0, 1)]).branch(0, S0, S1, "end");
    // From 70 ticks on; a deadline is moved forward by no less than 4096 instructions.
    a.op([addi(A4, A4, 1), csrrs(T0, TIME, ZERO), add(T0, T0, A4), csrrw(ZERO, STIMECMP, T0), insn::SRET]);
    a.label("end").li(A0, 0).li(A1, 0).li(A7, 0x5352_5354).li(A6, 0).op([insn::ECALL]);
    a.label("never").jump(ZERO, "never");
    a.finish()
}

#[test]
fn timers_fire_at_their_instruction() {
    let _alone = alone();
    for engine in [Engine::Jit, Engine::Interp] {
        let mut setup = Setup::new(1, 16 << 20).kernel(&program());
        setup.config.icount = Some(Icount { shift: Some(0), sleep: false });
        let mut guest = setup.start(engine);
        guest.run_to_end();
        assert_eq!(guest.console.text(), ".".repeat(TIMES as usize), "{engine:?}");
    }
}
