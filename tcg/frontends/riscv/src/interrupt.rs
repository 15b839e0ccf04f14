//! Which interrupts are pending, and which one is taken next.
//!
//! The pins of a hart are levels in an atomic word other threads write; this
//! module only ever sees a snapshot of them.

use mimus_arch::riscv::Privilege;

use crate::state::{Hart, irq, mstatus};

#[cfg(test)]
mod tests;

/// An interrupt, numbered as in `mcause` without the interrupt bit.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u8)]
pub enum Interrupt {
    /// Supervisor software.
    SupervisorSoftware = 1,
    /// Machine software.
    MachineSoftware = 3,
    /// Supervisor timer.
    SupervisorTimer = 5,
    /// Machine timer.
    MachineTimer = 7,
    /// Supervisor external.
    SupervisorExternal = 9,
    /// Machine external.
    MachineExternal = 11,
}

impl Interrupt {
    /// Highest priority first (section 3.1.9).
    pub const PRIORITY: [Self; 6] = [
        Self::MachineExternal,
        Self::MachineSoftware,
        Self::MachineTimer,
        Self::SupervisorExternal,
        Self::SupervisorSoftware,
        Self::SupervisorTimer,
    ];

    /// The interrupt's bit in `mip`.
    pub const fn bit(self) -> u64 {
        1 << self as u8
    }
}

impl Hart {
    /// `mip` for these pin levels. STIP is that of a firmware service of the
    /// machine, and beside it that of `stimecmp` while Sstc is on, else
    /// software's.
    pub const fn mip(&self, pins: u64) -> u64 {
        let (software, timer) = if self.sstc_enabled() { (!irq::STI, pins & irq::TIMER_PIN) } else { (!0, 0) };
        let timer = if timer != 0 { irq::STI } else { 0 };
        pins & irq::ALL | timer | self.mip_soft & software
    }
}

/// The interrupt to take before the next instruction, if any.
pub const fn pending_interrupt(hart: &Hart, pins: u64) -> Option<Interrupt> {
    let pending = hart.mip(pins) & hart.mie;
    if pending == 0 {
        return None;
    }
    // Interrupts for M-mode come first whatever their number.
    let machine = pending & !hart.mideleg;
    if machine != 0 && machine_enabled(hart) {
        return highest(machine);
    }
    let supervisor = pending & hart.mideleg;
    if supervisor != 0 && supervisor_enabled(hart) {
        return highest(supervisor);
    }
    None
}

/// Whether `wfi` resumes: an enabled interrupt is pending, whatever the
/// global enables and delegation say (section 3.3.3).
pub const fn wakes_wfi(hart: &Hart, pins: u64) -> bool {
    hart.mip(pins) & hart.mie != 0
}

const fn machine_enabled(hart: &Hart) -> bool {
    match hart.privilege {
        Privilege::Machine => hart.mstatus & mstatus::MIE != 0,
        _ => true,
    }
}

const fn supervisor_enabled(hart: &Hart) -> bool {
    match hart.privilege {
        Privilege::Machine => false,
        Privilege::Supervisor => hart.mstatus & mstatus::SIE != 0,
        Privilege::User => true,
    }
}

const fn highest(pending: u64) -> Option<Interrupt> {
    let mut i = 0;
    while i < Interrupt::PRIORITY.len() {
        if pending & Interrupt::PRIORITY[i].bit() != 0 {
            return Some(Interrupt::PRIORITY[i]);
        }
        i += 1;
    }
    None
}
