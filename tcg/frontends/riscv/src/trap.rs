//! Traps and the instructions around them: exception and interrupt entry,
//! `mret`, `sret`, and the legality of `wfi`, `sfence.vma` and `cbo.*`.

use mimus_arch::riscv::Privilege;

use crate::csr::{CsrEffect, IllegalInsn};
use crate::interrupt::Interrupt;
use crate::state::{Hart, envcfg, mstatus};

#[cfg(test)]
mod tests;

/// A synchronous exception, numbered as in `mcause`.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u8)]
pub enum Cause {
    /// Instruction address misaligned.
    FetchMisaligned = 0,
    /// Instruction access fault.
    FetchAccess = 1,
    /// Illegal instruction.
    IllegalInstruction = 2,
    /// Breakpoint.
    Breakpoint = 3,
    /// Load address misaligned.
    LoadMisaligned = 4,
    /// Load access fault.
    LoadAccess = 5,
    /// Store or AMO address misaligned.
    StoreMisaligned = 6,
    /// Store or AMO access fault.
    StoreAccess = 7,
    /// Environment call from U-mode.
    UserCall = 8,
    /// Environment call from S-mode.
    SupervisorCall = 9,
    /// Environment call from M-mode.
    MachineCall = 11,
    /// Instruction page fault.
    FetchPage = 12,
    /// Load page fault.
    LoadPage = 13,
    /// Store or AMO page fault.
    StorePage = 15,
}

impl Cause {
    /// Every cause, in order of number.
    pub const ALL: [Self; 14] = [
        Self::FetchMisaligned,
        Self::FetchAccess,
        Self::IllegalInstruction,
        Self::Breakpoint,
        Self::LoadMisaligned,
        Self::LoadAccess,
        Self::StoreMisaligned,
        Self::StoreAccess,
        Self::UserCall,
        Self::SupervisorCall,
        Self::MachineCall,
        Self::FetchPage,
        Self::LoadPage,
        Self::StorePage,
    ];

    /// The exception with this `mcause` code.
    pub const fn from_code(code: u64) -> Option<Self> {
        Some(match code {
            0 => Self::FetchMisaligned,
            1 => Self::FetchAccess,
            2 => Self::IllegalInstruction,
            3 => Self::Breakpoint,
            4 => Self::LoadMisaligned,
            5 => Self::LoadAccess,
            6 => Self::StoreMisaligned,
            7 => Self::StoreAccess,
            8 => Self::UserCall,
            9 => Self::SupervisorCall,
            11 => Self::MachineCall,
            12 => Self::FetchPage,
            13 => Self::LoadPage,
            15 => Self::StorePage,
            _ => return None,
        })
    }

    /// The cause of `ecall` in this mode.
    pub const fn ecall(privilege: Privilege) -> Self {
        match privilege {
            Privilege::User => Self::UserCall,
            Privilege::Supervisor => Self::SupervisorCall,
            Privilege::Machine => Self::MachineCall,
        }
    }
}

/// An exception and its trap value: the faulting address, the illegal
/// instruction's bits, the pc of `ebreak`, else 0.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Exception {
    /// What happened.
    pub cause: Cause,
    /// The value for `mtval` or `stval`.
    pub tval: u64,
}

impl Exception {
    /// An illegal instruction with these bits (16 or 32).
    pub const fn illegal(insn: u32) -> Self {
        Self { cause: Cause::IllegalInstruction, tval: insn as u64 }
    }

    /// The exception `ecall` raises in this mode.
    pub const fn ecall(privilege: Privilege) -> Self {
        Self { cause: Cause::ecall(privilege), tval: 0 }
    }

    /// The exception `ebreak` at `pc` raises.
    pub const fn ebreak(pc: u64) -> Self {
        Self { cause: Cause::Breakpoint, tval: pc }
    }
}

/// Enters the handler of a synchronous exception at `pc` and returns the
/// handler's address.
pub fn take_exception(hart: &mut Hart, exception: Exception, pc: u64) -> u64 {
    let code = exception.cause as u64;
    let delegated = hart.privilege <= Privilege::Supervisor && hart.medeleg >> code & 1 != 0;
    enter(hart, code, exception.tval, pc, delegated);
    // Exceptions always go to the base, even in vectored mode.
    (if delegated { hart.stvec } else { hart.mtvec }) & !3
}

/// Enters the handler of `interrupt` before the instruction at `pc` and
/// returns the handler's address.
pub fn take_interrupt(hart: &mut Hart, interrupt: Interrupt, pc: u64) -> u64 {
    let code = interrupt as u64;
    let delegated = hart.privilege <= Privilege::Supervisor && hart.mideleg & interrupt.bit() != 0;
    enter(hart, 1 << 63 | code, 0, pc, delegated);
    let vector = if delegated { hart.stvec } else { hart.mtvec };
    let base = vector & !3;
    if vector & 1 != 0 { base.wrapping_add(4 * code) } else { base }
}

/// Saves the interrupted context and changes mode (sections 3.1.6.1, 12.1.1).
fn enter(hart: &mut Hart, cause: u64, tval: u64, pc: u64, to_supervisor: bool) {
    let status = hart.mstatus;
    let from = hart.privilege as u64;
    if to_supervisor {
        hart.scause = cause;
        hart.stval = tval;
        hart.sepc = pc;
        let mut new = status & !(mstatus::SPIE | mstatus::SIE | mstatus::SPP);
        if status & mstatus::SIE != 0 {
            new |= mstatus::SPIE;
        }
        hart.mstatus = new | ((from & 1) * mstatus::SPP);
        hart.enter_mode(Privilege::Supervisor);
    } else {
        hart.mcause = cause;
        hart.mtval = tval;
        hart.mepc = pc;
        let mut new = status & !(mstatus::MPIE | mstatus::MIE | mstatus::MPP);
        if status & mstatus::MIE != 0 {
            new |= mstatus::MPIE;
        }
        hart.mstatus = new | from << mstatus::MPP_SHIFT;
        hart.enter_mode(Privilege::Machine);
    }
    hart.record(CsrEffect::TRANSLATION);
}

/// Executes `mret` and returns the new pc.
///
/// # Errors
/// [`IllegalInsn`] below M-mode.
pub fn mret(hart: &mut Hart) -> Result<u64, IllegalInsn> {
    if hart.privilege != Privilege::Machine {
        return Err(IllegalInsn);
    }
    let status = hart.mstatus;
    let to = Privilege::from_bits(status >> mstatus::MPP_SHIFT).unwrap_or(Privilege::User);
    let mut new = status & !(mstatus::MIE | mstatus::MPP) | mstatus::MPIE;
    if status & mstatus::MPIE != 0 {
        new |= mstatus::MIE;
    }
    if to != Privilege::Machine {
        new &= !mstatus::MPRV;
    }
    hart.mstatus = new;
    hart.enter_mode(to);
    hart.record(CsrEffect::TRANSLATION | CsrEffect::INTERRUPTS);
    Ok(hart.mepc)
}

/// Executes `sret` and returns the new pc.
///
/// # Errors
/// [`IllegalInsn`] in U-mode, and in S-mode while `mstatus.TSR` is set.
pub fn sret(hart: &mut Hart) -> Result<u64, IllegalInsn> {
    let status = hart.mstatus;
    let allowed = match hart.privilege {
        Privilege::Machine => true,
        Privilege::Supervisor => status & mstatus::TSR == 0,
        Privilege::User => false,
    };
    if !allowed {
        return Err(IllegalInsn);
    }
    let mut new = status & !(mstatus::SIE | mstatus::SPP | mstatus::MPRV) | mstatus::SPIE;
    if status & mstatus::SPIE != 0 {
        new |= mstatus::SIE;
    }
    hart.mstatus = new;
    hart.enter_mode(if status & mstatus::SPP != 0 { Privilege::Supervisor } else { Privilege::User });
    hart.record(CsrEffect::TRANSLATION | CsrEffect::INTERRUPTS);
    Ok(hart.sepc)
}

/// Whether `wfi` may be executed here (section 3.3.3). A hart with S-mode
/// has `wfi` illegal in U-mode; `mstatus.TW` takes it from S-mode too, with
/// a time limit of zero.
///
/// # Errors
/// [`IllegalInsn`] when it may not.
pub fn check_wfi(hart: &Hart) -> Result<(), IllegalInsn> {
    match hart.privilege {
        Privilege::Machine => Ok(()),
        Privilege::Supervisor if hart.mstatus & mstatus::TW == 0 => Ok(()),
        _ => Err(IllegalInsn),
    }
}

/// Whether `sfence.vma` or `sinval.vma` may be executed here.
///
/// # Errors
/// [`IllegalInsn`] in U-mode, and in S-mode while `mstatus.TVM` is set.
pub fn check_sfence_vma(hart: &Hart) -> Result<(), IllegalInsn> {
    match hart.privilege {
        Privilege::Machine => Ok(()),
        Privilege::Supervisor if hart.mstatus & mstatus::TVM == 0 => Ok(()),
        _ => Err(IllegalInsn),
    }
}

/// A cache-block operation.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum CboOp {
    /// `cbo.inval`.
    Inval,
    /// `cbo.clean`.
    Clean,
    /// `cbo.flush`.
    Flush,
    /// `cbo.zero`.
    Zero,
}

/// The operation to perform for `op` in the current mode: what was asked, or
/// a flush for an invalidation that `CBIE` demotes (CMO manual, section 2.5.3).
///
/// # Errors
/// [`IllegalInsn`] when the extension is absent or turned off for the mode.
pub fn check_cbo(hart: &Hart, op: CboOp) -> Result<CboOp, IllegalInsn> {
    let present = if op == CboOp::Zero { hart.config.zicboz } else { hart.config.zicbom };
    if !present {
        return Err(IllegalInsn);
    }
    // The configuration registers that apply; absent ones allow everything.
    let (m, s) = match hart.privilege {
        Privilege::Machine => (envcfg::SENVCFG, envcfg::SENVCFG),
        Privilege::Supervisor => (hart.menvcfg, envcfg::SENVCFG),
        Privilege::User => (hart.menvcfg, hart.senvcfg),
    };
    let allowed = m & s;
    let granted = match op {
        CboOp::Zero => allowed & envcfg::CBZE != 0,
        CboOp::Clean | CboOp::Flush => allowed & envcfg::CBCFE != 0,
        // CBIE is 0, 1 or 3 in both, so that the AND is the stricter one.
        CboOp::Inval => allowed & envcfg::CBIE != 0,
    };
    if !granted {
        return Err(IllegalInsn);
    }
    if op == CboOp::Inval && allowed & envcfg::CBIE != envcfg::CBIE { Ok(CboOp::Flush) } else { Ok(op) }
}
