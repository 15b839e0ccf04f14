//! CSRs: the access rules for every address, the legal values of every
//! register, and the registers with behaviour of their own.

use super::*;
use crate::state::{FP_BAD_FRM, FP_BAD_OFF, HartConfig};
use mimus_arch::riscv::models::RiscvModel;

/// An environment whose every part a test can set.
#[derive(Default)]
pub(crate) struct Env {
    time: u64,
    instret: u64,
    pins: u64,
    flags: u8,
    rounding: u8,
}

impl FpFlags for Env {
    fn take_flags(&mut self) -> u8 {
        std::mem::take(&mut self.flags)
    }
    fn set_flags(&mut self, flags: u8) {
        self.flags = flags;
    }
    fn set_rounding(&mut self, frm: u8) {
        self.rounding = frm;
    }
}

impl CsrEnv for Env {
    fn time(&mut self) -> u64 {
        self.time
    }
    fn instret(&mut self) -> u64 {
        self.instret
    }
    fn pins(&self) -> u64 {
        self.pins
    }
    fn clear_pins(&mut self, mask: u64) {
        self.pins &= !mask;
    }
}

const MODES: [Privilege; 3] = [Privilege::User, Privilege::Supervisor, Privilege::Machine];
const OPS: [CsrOp; 4] = [CsrOp::Read, CsrOp::Write, CsrOp::Set, CsrOp::Clear];

fn hart() -> Hart {
    let model = RiscvModel::parse("rv64,svpbmt=on,svnapot=on").unwrap();
    Hart::new(HartConfig::new(&model, 5))
}

/// Everything on, in M-mode.
fn open_hart() -> Hart {
    let mut hart = hart();
    hart.write_mstatus(mstatus::FS, mstatus::FS);
    hart.menvcfg = envcfg::STCE | envcfg::ADUE | envcfg::PBMTE | envcfg::SENVCFG;
    hart.mcounteren = 0xffff_ffff;
    hart.scounteren = 0xffff_ffff;
    hart.mideleg = irq::S_ALL;
    hart
}

fn read(hart: &mut Hart, csr: u16) -> Result<u64, IllegalInsn> {
    access(hart, csr, CsrOp::Read, 0, &mut Env::default())
}

fn write(hart: &mut Hart, csr: u16, value: u64) -> u64 {
    let mut env = Env::default();
    access(hart, csr, CsrOp::Write, value, &mut env).unwrap();
    access(hart, csr, CsrOp::Read, 0, &mut env).unwrap()
}

fn is_implemented(csr: u16) -> bool {
    matches!(csr,
        1..=3 | 0x100 | 0x104..=0x106 | 0x10a | 0x140..=0x144 | 0x14d | 0x180
        | 0x300..=0x306 | 0x30a | 0x320 | 0x323..=0x33f | 0x340..=0x344 | 0x3a0 | 0x3a2 | 0x3b0..=0x3bf
        | 0xb00 | 0xb02..=0xb1f | 0xc00..=0xc1f | 0xf11..=0xf15)
}

#[test]
fn every_address_in_every_mode_with_every_operation() {
    for csr in 0..0x1000u16 {
        for privilege in MODES {
            for op in OPS {
                let mut hart = open_hart();
                hart.privilege = privilege;
                let legal = is_implemented(csr)
                    && privilege as u8 >= mimus_arch::riscv::csr::lowest_privilege(csr)
                    && (op == CsrOp::Read || !mimus_arch::riscv::csr::is_read_only(csr));
                let before = format!("{hart:?}");
                let result = access(&mut hart, csr, op, 0x5555_aaaa_5555_aaaa, &mut Env::default());
                assert_eq!(result.is_ok(), legal, "csr {csr:#x} {privilege:?} {op:?}");
                if !legal {
                    assert_eq!(format!("{hart:?}"), before, "an illegal access changes nothing");
                }
            }
        }
    }
}

#[test]
fn gates_close() {
    let closed = |csr, privilege, change: fn(&mut Hart)| {
        let mut hart = open_hart();
        hart.privilege = privilege;
        assert!(read(&mut hart, csr).is_ok());
        change(&mut hart);
        assert_eq!(read(&mut hart, csr), Err(IllegalInsn), "csr {csr:#x} {privilege:?}");
    };
    use Privilege::{Machine, Supervisor, User};
    for csr in [FFLAGS, FRM, FCSR] {
        closed(csr, Machine, |h| h.write_mstatus(0, mstatus::FS));
    }
    closed(SATP, Supervisor, |h| h.write_mstatus(!0, mstatus::TVM));
    closed(STIMECMP, Supervisor, |h| h.menvcfg &= !envcfg::STCE);
    closed(STIMECMP, Supervisor, |h| h.mcounteren &= !2);
    closed(STIMECMP, Machine, |h| h.config.sstc = false);
    closed(TIME, Supervisor, |h| h.mcounteren &= !2);
    closed(TIME, User, |h| h.scounteren &= !2);
    closed(CYCLE, User, |h| h.mcounteren &= !1);
    closed(INSTRET, Machine, |h| h.config.zicntr = false);
    closed(0xc1f, User, |h| h.scounteren &= !(1 << 31));
    closed(0xc03, Machine, |h| h.config.zihpm = false);
    closed(0x3a0, Machine, |h| h.pmp = crate::pmp::Pmp::new(0));
    let mut hart = open_hart();
    hart.write_mstatus(mstatus::TVM, mstatus::TVM);
    assert!(read(&mut hart, SATP).is_ok(), "TVM does not bind M-mode");
}

#[test]
fn values_read_back_legal_and_stay() {
    let patterns = [0, !0, 0x5555_5555_5555_5555, 0xaaaa_aaaa_aaaa_aaaa, 1 << 63, 3 << 60, 0x0123_4567_89ab_cdef];
    for csr in 0..0xc00u16 {
        if !is_implemented(csr) {
            continue;
        }
        for pattern in patterns {
            for op in OPS {
                let mut hart = open_hart();
                let mut env = Env::default();
                access(&mut hart, csr, op, pattern, &mut env).unwrap();
                env.instret += 1;
                let first = access(&mut hart, csr, CsrOp::Read, 0, &mut env).unwrap();
                access(&mut hart, csr, CsrOp::Write, first, &mut env).unwrap();
                // The counters count the instruction between.
                env.instret += u64::from(matches!(csr, MINSTRET));
                let second = access(&mut hart, csr, CsrOp::Read, 0, &mut env).unwrap();
                assert_eq!(first, second, "csr {csr:#x} {op:?} {pattern:#x} is not stable");
            }
        }
    }
}

#[test]
fn writable_bits() {
    let mut h = open_hart();
    for (csr, ones, zeros) in [
        (MSTATUS, 0x8000_000a_007e_79aa, 0xa_0000_0000),
        (SSTATUS, 0x8000_0002_000c_6122, 0x2_0000_0000),
        (MISA, h.config.misa, h.config.misa),
        (MEDELEG, 0xb3ff, 0),
        (MIDELEG, 0x222, 0),
        (MIE, 0xaaa, 0),
        (MTVEC, !2, 0),
        (STVEC, !2, 0),
        (MCOUNTEREN, 0xffff_ffff, 0),
        (SCOUNTEREN, 0xffff_ffff, 0),
        (MCOUNTINHIBIT, 5, 0),
        (MENVCFG, 0xe000_0000_0000_00f1, 0),
        (SENVCFG, 0xf1, 0),
        (MEPC, !1, 0),
        (SEPC, !1, 0),
        (MCAUSE, 1 << 63 | 0x3f, 0),
        (SCAUSE, 1 << 63 | 0x3f, 0),
        (MTVAL, !0, 0),
        (STVAL, !0, 0),
        (MSCRATCH, !0, 0),
        (SSCRATCH, !0, 0),
        (STIMECMP, !0, 0),
        (PMPADDR0, (1 << 54) - 1, 0),
        (MHPMEVENT3, 0, 0),
        (MHPMCOUNTER31, 0, 0),
        (FCSR, 0xff, 0),
        (FRM, 7, 0),
        (FFLAGS, 0x1f, 0),
    ] {
        // mstatus's MPP keeps its value for the pattern's reserved encodings only.
        assert_eq!(write(&mut h, csr, !0), ones, "csr {csr:#x}");
        let after = write(&mut h, csr, 0);
        assert_eq!(after, zeros, "csr {csr:#x}");
        h.write_mstatus(mstatus::FS, mstatus::FS);
        if csr == MIDELEG {
            h.mideleg = irq::S_ALL;
        }
        h.menvcfg = open_hart().menvcfg;
    }
    assert_eq!(read(&mut h, MHARTID), Ok(5));
}

#[test]
fn fields_absent_without_their_extension() {
    let model = RiscvModel::parse("rv64i,mmu=sv39").unwrap();
    let mut hart = Hart::new(HartConfig::new(&model, 0));
    assert_eq!(write(&mut hart, MSTATUS, !0) & mstatus::FS, 0, "no F: FS is read-only zero");
    assert_eq!(read(&mut hart, FCSR), Err(IllegalInsn));
    assert_eq!(write(&mut hart, MEPC, !0), !3, "no C: pc bits 1:0 are zero");
    assert_eq!(write(&mut hart, MENVCFG, !0), envcfg::FIOM);
    assert_eq!(write(&mut hart, SATP, 9 << 60), 0, "no Sv48");
    assert_eq!(write(&mut hart, SATP, 8 << 60), 8 << 60);
}

#[test]
fn satp_ignores_unsupported_modes() {
    let mut hart = hart();
    for mode in 0..16u64 {
        hart.satp = 7;
        let value = mode << 60 | 0xfff_ffff_ffff_ffff;
        let legal = matches!(mode, 0 | 8 | 9 | 10);
        assert_eq!(write(&mut hart, SATP, value), if legal { value } else { 7 }, "mode {mode}");
        assert_eq!(hart.take_effects().contains(CsrEffect::SATP), legal);
    }
    assert_eq!(hart.asid(), 0);
    write(&mut hart, SATP, 8 << 60 | 0xabcd << 44);
    assert_eq!(hart.asid(), 0xabcd);
}

#[test]
fn cbie_keeps_its_value_for_the_reserved_encoding() {
    let mut hart = hart();
    assert_eq!(write(&mut hart, MENVCFG, 1 << 4), 1 << 4);
    assert_eq!(write(&mut hart, MENVCFG, 2 << 4), 1 << 4);
    assert_eq!(write(&mut hart, SENVCFG, 2 << 4), 0);
}

#[test]
fn supervisor_views_show_what_is_delegated() {
    let mut hart = hart();
    hart.mideleg = irq::SSI | irq::STI;
    hart.mie = irq::ALL;
    assert_eq!(read(&mut hart, SIE), Ok(irq::SSI | irq::STI));
    write(&mut hart, SIE, 0);
    assert_eq!(hart.mie, irq::ALL & !(irq::SSI | irq::STI));
    let mut env = Env { pins: irq::ALL, ..Env::default() };
    hart.mip_soft = irq::STI;
    assert_eq!(access(&mut hart, SIP, CsrOp::Write, 0, &mut env), Ok(irq::SSI | irq::STI));
    assert_eq!(hart.mip_soft, irq::STI, "sip.STIP is read-only");
    assert_eq!(env.pins & irq::SSI, 0, "clearing SSIP clears the edge");
    hart.mideleg = 0;
    access(&mut hart, SIP, CsrOp::Write, !0, &mut env).unwrap();
    assert_eq!(hart.mip_soft, irq::STI);
}

#[test]
fn mip_read_modify_write_leaves_pins_out() {
    let mut hart = hart();
    let mut env = Env { pins: irq::SEI | irq::SSI, ..Env::default() };
    let old = access(&mut hart, MIP, CsrOp::Set, irq::STI, &mut env);
    assert_eq!(old, Ok(irq::SEI | irq::SSI));
    assert_eq!(hart.mip_soft, irq::STI, "the SEI pin is not copied into the software bit");
    assert_eq!(env.pins, irq::SEI | irq::SSI, "an unrelated csrrs does not lose the edge");
    access(&mut hart, MIP, CsrOp::Clear, irq::SSI | irq::SEI, &mut env).unwrap();
    assert_eq!(env.pins, irq::SEI);
    access(&mut hart, MIP, CsrOp::Write, !0, &mut env).unwrap();
    assert_eq!(hart.mip_soft, irq::S_ALL, "machine bits are read-only");
    assert!(hart.take_effects().contains(CsrEffect::INTERRUPTS));
}

#[test]
fn stip_follows_stimecmp() {
    let mut hart = open_hart();
    let mut env = Env { time: 100, ..Env::default() };
    assert_eq!(access(&mut hart, MIP, CsrOp::Read, 0, &mut env), Ok(0));
    access(&mut hart, STIMECMP, CsrOp::Write, 100, &mut env).unwrap();
    assert!(hart.take_effects().contains(CsrEffect::TIMER | CsrEffect::BLOCK_END));
    assert_eq!(access(&mut hart, SIP, CsrOp::Read, 0, &mut env), Ok(irq::STI));
    access(&mut hart, MIP, CsrOp::Clear, irq::STI, &mut env).unwrap();
    assert_eq!(access(&mut hart, MIP, CsrOp::Read, 0, &mut env), Ok(irq::STI), "read-only with Sstc");
    access(&mut hart, STIMECMP, CsrOp::Write, 101, &mut env).unwrap();
    assert_eq!(access(&mut hart, MIP, CsrOp::Read, 0, &mut env), Ok(0));
}

#[test]
fn floating_point_status() {
    let mut hart = hart();
    assert_eq!(hart.fp_bad, FP_BAD_OFF);
    write(&mut hart, MSTATUS, 1 << mstatus::FS_SHIFT);
    assert_eq!(hart.fp_bad, 0);
    assert!(hart.take_effects().contains(CsrEffect::FP_STATE));
    let mut env = Env { flags: 0x11, ..Env::default() };
    assert_eq!(access(&mut hart, FFLAGS, CsrOp::Read, 0, &mut env), Ok(0x11));
    env.flags = 2;
    assert_eq!(access(&mut hart, FCSR, CsrOp::Set, 4 << 5, &mut env), Ok(0x13));
    assert_eq!((hart.fp_bad, env.rounding), (FP_BAD_FRM, 4));
    assert_eq!(read(&mut hart, MSTATUS).unwrap() >> 63, 1, "a write of fcsr dirties FS");
    env.flags = 8;
    assert_eq!(access(&mut hart, FFLAGS, CsrOp::Write, 0, &mut env), Ok(0x1b));
    assert_eq!(access(&mut hart, FCSR, CsrOp::Read, 0, &mut env), Ok(4 << 5));
    assert_eq!(access(&mut hart, FRM, CsrOp::Write, 9, &mut env), Ok(4));
    assert_eq!((hart.frm, hart.fp_bad, env.rounding), (1, 0, 1));
}

#[test]
fn counters_can_be_written_and_stopped() {
    let mut hart = hart();
    let mut env = Env { instret: 1000, ..Env::default() };
    access(&mut hart, MINSTRET, CsrOp::Write, 50, &mut env).unwrap();
    env.instret += 1;
    assert_eq!(
        access(&mut hart, INSTRET, CsrOp::Read, 0, &mut env),
        Ok(50),
        "the next instruction reads what was written"
    );
    access(&mut hart, MCOUNTINHIBIT, CsrOp::Write, 4, &mut env).unwrap();
    env.instret += 100;
    assert_eq!(access(&mut hart, MINSTRET, CsrOp::Read, 0, &mut env), Ok(50));
    assert_eq!(access(&mut hart, MCYCLE, CsrOp::Read, 0, &mut env), Ok(1101), "cycles go on");
    access(&mut hart, MCOUNTINHIBIT, CsrOp::Write, 0, &mut env).unwrap();
    env.instret += 3;
    assert_eq!(access(&mut hart, MINSTRET, CsrOp::Read, 0, &mut env), Ok(53));
}

#[test]
fn effects_of_status_writes() {
    let mut hart = hart();
    let mut effect = |csr, value| {
        let mut env = Env::default();
        hart.take_effects();
        access(&mut hart, csr, CsrOp::Write, value, &mut env).unwrap();
        hart.take_effects()
    };
    assert_eq!(effect(MSCRATCH, !0), CsrEffect::empty());
    assert_eq!(effect(MSTATUS, mstatus::SUM), CsrEffect::TRANSLATION | CsrEffect::BLOCK_END);
    assert_eq!(effect(MSTATUS, mstatus::SUM), CsrEffect::empty());
    assert_eq!(effect(SSTATUS, mstatus::SIE | mstatus::SUM), CsrEffect::INTERRUPTS | CsrEffect::BLOCK_END);
    assert_eq!(effect(SSTATUS, mstatus::SUM), CsrEffect::empty(), "disabling interrupts needs nothing");
    assert_eq!(effect(MENVCFG, envcfg::ADUE), CsrEffect::STALE | CsrEffect::BLOCK_END);
    assert_eq!(effect(PMPCFG0, 0x1f), CsrEffect::STALE | CsrEffect::BLOCK_END);
    assert_eq!(effect(PMPADDR0, 0x1f), CsrEffect::STALE | CsrEffect::BLOCK_END);
}
