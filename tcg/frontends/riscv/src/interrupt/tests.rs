//! Pending interrupts: every combination of pins, enables and delegation
//! against the rules written down naively.

use super::*;
use crate::csr::tests::Env;
use crate::csr::{CsrOp, access};
use crate::state::HartConfig;
use mimus_arch::riscv::csr::number::*;

fn hart() -> Hart {
    Hart::new(HartConfig::default())
}

/// The rules as the manual states them.
fn expected(hart: &Hart, pending: u64) -> Option<Interrupt> {
    let enabled = |bit: u64| {
        let delegated = hart.mideleg & bit != 0;
        match (hart.privilege, delegated) {
            (Privilege::Machine, false) => hart.mstatus & mstatus::MIE != 0,
            (Privilege::Machine, true) => false,
            (Privilege::Supervisor, true) => hart.mstatus & mstatus::SIE != 0,
            _ => true,
        }
    };
    let machine_first = [false, true];
    for delegated in machine_first {
        for interrupt in Interrupt::PRIORITY {
            let bit = interrupt.bit();
            if pending & hart.mie & bit != 0 && (hart.mideleg & bit != 0) == delegated && enabled(bit) {
                return Some(interrupt);
            }
        }
    }
    None
}

#[test]
fn every_combination_follows_the_rules() {
    let bits = Interrupt::PRIORITY.map(Interrupt::bit);
    let spread = |n: u64| bits.iter().enumerate().map(|(i, b)| if n >> i & 1 != 0 { *b } else { 0 }).sum::<u64>();
    let mut hart = hart();
    hart.menvcfg = crate::state::envcfg::STCE;
    for privilege in [Privilege::User, Privilege::Supervisor, Privilege::Machine] {
        hart.privilege = privilege;
        for status in [0, mstatus::SIE, mstatus::MIE, mstatus::SIE | mstatus::MIE] {
            hart.mstatus = status;
            for n in 0..64 * 64 {
                hart.mie = spread(n >> 6);
                for mideleg in [0, irq::SSI, irq::S_ALL, irq::SEI | irq::STI] {
                    hart.mideleg = mideleg;
                    let pins = spread(n & 63);
                    assert_eq!(pending_interrupt(&hart, pins), expected(&hart, pins));
                    assert_eq!(wakes_wfi(&hart, pins), pins & hart.mie != 0);
                }
            }
        }
    }
}

#[test]
fn stip_is_the_pin_with_sstc_and_software_without() {
    let mut hart = hart();
    hart.mie = irq::ALL;
    hart.privilege = Privilege::User;
    hart.mip_soft = irq::STI;
    assert_eq!(pending_interrupt(&hart, 0), Some(Interrupt::SupervisorTimer));
    hart.privilege = Privilege::Machine;
    let mut env = Env::default();
    access(&mut hart, MENVCFG, CsrOp::Write, 1 << 63, &mut env).unwrap();
    hart.privilege = Privilege::User;
    assert_eq!(pending_interrupt(&hart, 0), None);
    assert_eq!(pending_interrupt(&hart, irq::TIMER_PIN), Some(Interrupt::SupervisorTimer));
    // A firmware's own timer, beside.
    assert_eq!(pending_interrupt(&hart, irq::STI), Some(Interrupt::SupervisorTimer));
}

#[test]
fn the_pin_of_stimecmp_means_nothing_without_sstc() {
    let mut hart = hart();
    (hart.mie, hart.privilege) = (irq::ALL, Privilege::User);
    assert_eq!((hart.mip(irq::TIMER_PIN), pending_interrupt(&hart, irq::TIMER_PIN)), (0, None));
}

#[test]
fn external_pin_and_software_bit_combine() {
    let mut hart = hart();
    hart.mip_soft = irq::SEI;
    assert_eq!(hart.mip(0), irq::SEI);
    assert_eq!(hart.mip(irq::SEI | irq::MEI), irq::SEI | irq::MEI);
    assert_eq!(hart.mip(!0), irq::ALL);
}
