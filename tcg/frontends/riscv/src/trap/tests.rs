//! Trap entry and return in every mode, and the rules of the instructions
//! that depend on it.

use super::*;
use crate::state::{HartConfig, irq};

const MODES: [Privilege; 3] = [Privilege::User, Privilege::Supervisor, Privilege::Machine];
const PC: u64 = 0xffff_ffff_8000_1234;

fn hart(privilege: Privilege) -> Hart {
    let mut hart = Hart::new(HartConfig::default());
    hart.privilege = privilege;
    hart.mtvec = 0x8000_0001;
    hart.stvec = 0xffff_ffff_8020_0001;
    hart
}

#[test]
fn each_cause_in_each_mode_delegated_or_not() {
    for privilege in MODES {
        for cause in Cause::ALL {
            assert_eq!(Cause::from_code(cause as u64), Some(cause));
            for delegate in [false, true] {
                let mut hart = hart(privilege);
                hart.medeleg = if delegate { 1 << cause as u64 } else { !(1 << cause as u64) };
                hart.write_mstatus(mstatus::SIE | mstatus::MIE, !0);
                let before = hart.mstatus;
                let pc = take_exception(&mut hart, Exception { cause, tval: 0x55 }, PC);
                if delegate && privilege != Privilege::Machine {
                    assert_eq!(pc, 0xffff_ffff_8020_0000);
                    assert_eq!((hart.scause, hart.stval, hart.sepc), (cause as u64, 0x55, PC));
                    assert_eq!((hart.mcause, hart.mtval, hart.mepc), (0, 0, 0));
                    assert_eq!(hart.privilege, Privilege::Supervisor);
                    let spp = if privilege == Privilege::Supervisor { mstatus::SPP } else { 0 };
                    assert_eq!(hart.mstatus, before & !mstatus::SIE | mstatus::SPIE | spp);
                } else {
                    assert_eq!(pc, 0x8000_0000);
                    assert_eq!((hart.mcause, hart.mtval, hart.mepc), (cause as u64, 0x55, PC));
                    assert_eq!((hart.scause, hart.stval, hart.sepc), (0, 0, 0));
                    assert_eq!(hart.privilege, Privilege::Machine);
                    let mpp = (privilege as u64) << mstatus::MPP_SHIFT;
                    assert_eq!(hart.mstatus, before & !mstatus::MIE | mstatus::MPIE | mpp);
                }
                assert!(hart.take_effects().contains(CsrEffect::TRANSLATION));
            }
        }
    }
}

#[test]
fn interrupts_use_the_vector_and_their_own_delegation() {
    for interrupt in Interrupt::PRIORITY {
        let code = interrupt as u64;
        for (delegated, vectored) in [(false, false), (false, true), (true, false), (true, true)] {
            let mut hart = hart(Privilege::User);
            if delegated {
                hart.mideleg = interrupt.bit();
            }
            if !vectored {
                hart.mtvec &= !1;
                hart.stvec &= !1;
            }
            let pc = take_interrupt(&mut hart, interrupt, PC);
            let base = if delegated { 0xffff_ffff_8020_0000 } else { 0x8000_0000 };
            assert_eq!(pc, if vectored { base + 4 * code } else { base });
            let cause = if delegated { hart.scause } else { hart.mcause };
            assert_eq!(cause, 1 << 63 | code);
            assert_eq!(if delegated { hart.sepc } else { hart.mepc }, PC);
        }
    }
    // A delegated interrupt is never taken by M-mode, and needs no wrap check.
    let mut hart = hart(Privilege::Machine);
    hart.mideleg = irq::SSI;
    hart.mtvec = !2;
    assert_eq!(take_interrupt(&mut hart, Interrupt::MachineExternal, 0), 40);
}

#[test]
fn mret_restores_the_mode_it_came_from() {
    for to in MODES {
        for mpie in [0, mstatus::MPIE] {
            let mut hart = hart(Privilege::Machine);
            hart.mepc = PC;
            hart.mstatus |= (to as u64) << mstatus::MPP_SHIFT | mpie | mstatus::MPRV;
            assert_eq!(mret(&mut hart), Ok(PC));
            assert_eq!(hart.privilege, to);
            assert_eq!(hart.mstatus & mstatus::MPP, 0);
            assert_eq!(hart.mstatus & mstatus::MIE != 0, mpie != 0);
            assert_ne!(hart.mstatus & mstatus::MPIE, 0);
            assert_eq!(hart.mstatus & mstatus::MPRV != 0, to == Privilege::Machine);
            assert!(hart.take_effects().contains(CsrEffect::INTERRUPTS));
        }
    }
    assert_eq!(mret(&mut hart(Privilege::Supervisor)), Err(IllegalInsn));
    assert_eq!(mret(&mut hart(Privilege::User)), Err(IllegalInsn));
}

#[test]
fn sret_restores_the_mode_it_came_from() {
    for from in [Privilege::Supervisor, Privilege::Machine] {
        for spp in [0, mstatus::SPP] {
            for spie in [0, mstatus::SPIE] {
                let mut hart = hart(from);
                hart.sepc = PC;
                hart.mstatus |= spp | spie | mstatus::MPRV;
                assert_eq!(sret(&mut hart), Ok(PC));
                let to = if spp != 0 { Privilege::Supervisor } else { Privilege::User };
                assert_eq!(hart.privilege, to);
                assert_eq!(hart.mstatus & (mstatus::SPP | mstatus::MPRV), 0);
                assert_eq!(hart.mstatus & mstatus::SIE != 0, spie != 0);
                assert_ne!(hart.mstatus & mstatus::SPIE, 0);
            }
        }
    }
    assert_eq!(sret(&mut hart(Privilege::User)), Err(IllegalInsn));
    let mut trapped = hart(Privilege::Supervisor);
    trapped.mstatus |= mstatus::TSR;
    let before = trapped.mstatus;
    assert_eq!(sret(&mut trapped), Err(IllegalInsn));
    assert_eq!((trapped.mstatus, trapped.privilege), (before, Privilege::Supervisor));
    trapped.privilege = Privilege::Machine;
    assert!(sret(&mut trapped).is_ok());
}

#[test]
fn trap_and_return_leave_the_status_as_it_was() {
    let mut hart = hart(Privilege::User);
    hart.medeleg = !0;
    hart.mstatus |= mstatus::SIE | mstatus::MIE;
    let before = hart.mstatus;
    take_exception(&mut hart, Exception::ecall(Privilege::User), PC);
    assert_eq!(hart.scause, 8);
    assert_eq!(sret(&mut hart), Ok(PC));
    assert_eq!(hart.privilege, Privilege::User);
    assert_eq!(hart.mstatus, before | mstatus::SPIE);
}

#[test]
fn wfi_and_sfence_rules() {
    type Check = fn(&Hart) -> Result<(), IllegalInsn>;
    for (bit, check) in [(mstatus::TW, check_wfi as Check), (mstatus::TVM, check_sfence_vma)] {
        for status in [0, bit] {
            for privilege in MODES {
                let mut hart = hart(privilege);
                hart.mstatus |= status;
                let legal = match privilege {
                    Privilege::Machine => true,
                    Privilege::Supervisor => status == 0,
                    Privilege::User => false,
                };
                assert_eq!(check(&hart).is_ok(), legal, "{privilege:?} {status:x}");
            }
        }
    }
}

#[test]
fn generated_code_knows_whether_cbo_zero_is_legal() {
    let mut hart = Hart::new(HartConfig::default());
    assert_eq!(hart.cbz_bad, 0);
    hart.enter_mode(Privilege::Supervisor);
    assert_eq!(hart.cbz_bad, 1);
    hart.set_menvcfg(envcfg::CBZE);
    assert_eq!(hart.cbz_bad, 0);
    hart.enter_mode(Privilege::User);
    assert_eq!(hart.cbz_bad, 1);
    hart.set_senvcfg(envcfg::CBZE);
    assert_eq!(hart.cbz_bad, 0);
    take_exception(&mut hart, Exception { cause: Cause::IllegalInstruction, tval: 0 }, 0);
    hart.set_menvcfg(0);
    assert_eq!(hart.cbz_bad, 0);
    mret(&mut hart).unwrap();
    assert_eq!(hart.cbz_bad, 1);
}

#[test]
fn cbo_rules() {
    use Privilege::{Machine, Supervisor, User};
    let run = |privilege, menvcfg: u64, senvcfg: u64, op| {
        let mut hart = hart(privilege);
        hart.menvcfg = menvcfg;
        hart.senvcfg = senvcfg;
        check_cbo(&hart, op)
    };
    for op in [CboOp::Inval, CboOp::Clean, CboOp::Flush, CboOp::Zero] {
        assert_eq!(run(Machine, 0, 0, op), Ok(op));
        assert_eq!(run(Supervisor, 0, envcfg::SENVCFG, op), Err(IllegalInsn));
        assert_eq!(run(Supervisor, envcfg::SENVCFG, 0, op), Ok(op));
        assert_eq!(run(User, envcfg::SENVCFG, 0, op), Err(IllegalInsn));
        assert_eq!(run(User, 0, envcfg::SENVCFG, op), Err(IllegalInsn));
        assert_eq!(run(User, envcfg::SENVCFG, envcfg::SENVCFG, op), Ok(op));
    }
    let flush = 1 << envcfg::CBIE_SHIFT;
    assert_eq!(run(Supervisor, flush, 0, CboOp::Inval), Ok(CboOp::Flush));
    assert_eq!(run(User, envcfg::CBIE, flush, CboOp::Inval), Ok(CboOp::Flush));
    assert_eq!(run(User, flush, envcfg::CBIE, CboOp::Inval), Ok(CboOp::Flush));
    assert_eq!(run(Supervisor, envcfg::CBZE, 0, CboOp::Clean), Err(IllegalInsn));
    assert_eq!(run(Supervisor, envcfg::CBZE, 0, CboOp::Zero), Ok(CboOp::Zero));
    let mut absent = hart(Machine);
    absent.config.zicbom = false;
    assert_eq!(check_cbo(&absent, CboOp::Clean), Err(IllegalInsn));
}
