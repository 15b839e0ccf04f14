//! Access to control and status registers: who may access which register,
//! which values each takes (WARL), and what a write changes for the engine.
//!
//! A register that is not implemented, not accessible from the current mode
//! or gated off is an illegal instruction; the caller raises it. What the
//! engine must do after a write is recorded in [`Hart::effects`].

#[cfg(test)]
pub(crate) mod tests;

use mimus_arch::riscv::Privilege;
use mimus_arch::riscv::csr::number::*;

use crate::state::{Hart, envcfg, irq, mstatus};

// The ends of the numbered families.
const MHPMEVENT3: u16 = 0x323;
const MHPMEVENT31: u16 = 0x33f;
const PMPCFG0: u16 = 0x3a0;
const PMPCFG2: u16 = 0x3a2;
const PMPADDR0: u16 = 0x3b0;
const PMPADDR15: u16 = 0x3bf;
const MHPMCOUNTER3: u16 = 0xb03;
const MHPMCOUNTER31: u16 = 0xb1f;
const HPMCOUNTER3: u16 = 0xc03;
const HPMCOUNTER31: u16 = 0xc1f;

bitflags::bitflags! {
    /// What a CSR access changed beyond the register itself.
    #[derive(Clone, Copy, PartialEq, Eq, Debug)]
    pub struct CsrEffect: u8 {
        /// `satp` was written: another address space or translation mode.
        const SATP = 1 << 0;
        /// The same address space is seen differently: MPRV, MPP, SUM or MXR.
        const TRANSLATION = 1 << 1;
        /// An interrupt may have become deliverable.
        const INTERRUPTS = 1 << 2;
        /// `stimecmp` or its gate changed: set or clear the STIP pin and
        /// program the timer.
        const TIMER = 1 << 3;
        /// `fp_bad` or the rounding mode changed.
        const FP_STATE = 1 << 4;
        /// Cached translations are stale: PMP, ADUE or PBMTE changed.
        const STALE = 1 << 5;
        /// The rest of the block was translated under other assumptions.
        const BLOCK_END = 1 << 6;
    }
}

/// The host FPU's view of `fcsr`, while guest code runs.
pub trait FpFlags {
    /// Returns the flags accrued since the last call, in `fflags` order (NV
    /// DZ OF UF NX in bits 4 to 0), and clears them.
    fn take_flags(&mut self) -> u8;
    /// Replaces the accrued flags.
    fn set_flags(&mut self, flags: u8);
    /// Sets the dynamic rounding mode; encodings the host lacks (4 to 7) are
    /// passed too and may leave it at round to nearest even.
    fn set_rounding(&mut self, frm: u8);
}

/// What CSRs need from outside the hart.
pub trait CsrEnv: FpFlags {
    /// `mtime`, in ticks of the platform's timer.
    fn time(&mut self) -> u64;
    /// Instructions retired since reset, not counting the current one.
    fn instret(&mut self) -> u64;
    /// Cycles since reset.
    fn cycle(&mut self) -> u64 {
        self.instret()
    }
    /// Interrupt pins in `mip` positions.
    fn pins(&self) -> u64;
    /// Clears pins that software may clear (SSIP, set as an edge by other
    /// harts).
    fn clear_pins(&mut self, mask: u64);
}

/// Whether [`access`] of this CSR may ask the environment for the time or a
/// count, which is costly to have at hand for every access.
pub const fn reads_clock(csr: u16) -> bool {
    matches!(csr, MIP | SIP | MCOUNTINHIBIT | MCYCLE | MINSTRET | CYCLE | TIME | INSTRET)
}

/// What a CSR instruction does with the register.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u8)]
pub enum CsrOp {
    /// `csrrs`/`csrrc` with `x0` or a zero immediate: no write at all.
    Read = 0,
    /// `csrrw`, also with `x0`.
    Write = 1,
    /// `csrrs` with another register.
    Set = 2,
    /// `csrrc` with another register.
    Clear = 3,
}

impl CsrOp {
    /// The operation numbered `bits`, see the discriminants.
    pub const fn from_bits(bits: u64) -> Self {
        match bits & 3 {
            0 => Self::Read,
            1 => Self::Write,
            2 => Self::Set,
            _ => Self::Clear,
        }
    }

    /// The register's new value.
    const fn apply(self, old: u64, src: u64) -> u64 {
        match self {
            Self::Read => old,
            Self::Write => src,
            Self::Set => old | src,
            Self::Clear => old & !src,
        }
    }
}

/// The instruction is illegal here; its trap value is the instruction.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct IllegalInsn;

/// Performs one CSR instruction and returns the register's old value.
///
/// # Errors
/// [`IllegalInsn`] when the register does not exist, is not accessible from
/// the current mode, or is written although read-only. The hart is unchanged.
pub fn access<E: CsrEnv + ?Sized>(
    hart: &mut Hart,
    csr: u16,
    op: CsrOp,
    src: u64,
    env: &mut E,
) -> Result<u64, IllegalInsn> {
    check_access(hart, csr, op != CsrOp::Read)?;
    if op != CsrOp::Read {
        match csr {
            MIP => return Ok(write_mip(hart, op, src, irq::S_ALL, env)),
            SIP => {
                let delegated = hart.mideleg;
                return Ok(write_mip(hart, op, src, irq::SSI & delegated, env) & delegated);
            }
            _ => {}
        }
    }
    let old = read(hart, csr, env)?;
    if op != CsrOp::Read {
        write(hart, csr, op.apply(old, src), env)?;
    }
    Ok(old)
}

/// The rules the address itself encodes (section 2.1), and the gates.
fn check_access(hart: &Hart, csr: u16, writes: bool) -> Result<(), IllegalInsn> {
    let read_only = csr >> 10 & 3 == 3;
    let lowest = u64::from(csr >> 8 & 3);
    if writes && read_only || (hart.privilege as u64) < lowest {
        return Err(IllegalInsn);
    }
    let allowed = match csr {
        FFLAGS | FRM | FCSR => hart.fp_enabled(),
        SATP => hart.privilege == Privilege::Machine || hart.mstatus & mstatus::TVM == 0,
        STIMECMP => stimecmp_accessible(hart),
        CYCLE..=INSTRET => hart.config.zicntr && counter_enabled(hart, csr - CYCLE),
        HPMCOUNTER3..=HPMCOUNTER31 => hart.config.zihpm && counter_enabled(hart, csr - CYCLE),
        _ => true,
    };
    if allowed { Ok(()) } else { Err(IllegalInsn) }
}

/// Whether the counter with this number may be read through its user alias.
fn counter_enabled(hart: &Hart, number: u16) -> bool {
    let bit = 1u64 << number;
    match hart.privilege {
        Privilege::Machine => true,
        Privilege::Supervisor => hart.mcounteren & bit != 0,
        Privilege::User => hart.mcounteren & hart.scounteren & bit != 0,
    }
}

/// Sstc: below M-mode both `menvcfg.STCE` and `mcounteren.TM` must be set.
fn stimecmp_accessible(hart: &Hart) -> bool {
    const TM: u64 = 2;
    hart.config.sstc && (hart.privilege == Privilege::Machine || hart.sstc_enabled() && hart.mcounteren & TM != 0)
}

fn read<E: CsrEnv + ?Sized>(hart: &mut Hart, csr: u16, env: &mut E) -> Result<u64, IllegalInsn> {
    Ok(match csr {
        SSTATUS => hart.mstatus() & mstatus::S_READABLE,
        SIE => hart.mie & hart.mideleg,
        STVEC => hart.stvec,
        SCOUNTEREN => hart.scounteren,
        SENVCFG => hart.senvcfg,
        SSCRATCH => hart.sscratch,
        SEPC => hart.sepc,
        SCAUSE => hart.scause,
        STVAL => hart.stval,
        SIP => read_mip(hart, env) & hart.mideleg,
        STIMECMP => hart.stimecmp,
        SATP => hart.satp,
        FFLAGS => u64::from(read_fflags(hart, env)),
        FRM => u64::from(hart.frm),
        FCSR => u64::from(hart.frm) << 5 | u64::from(read_fflags(hart, env)),
        CYCLE | MCYCLE => hart.cycle.value(env.cycle()),
        TIME => env.time(),
        INSTRET | MINSTRET => hart.instret.value(env.instret()),
        _ => return read_machine(hart, csr, env),
    })
}

fn read_machine<E: CsrEnv + ?Sized>(hart: &mut Hart, csr: u16, env: &mut E) -> Result<u64, IllegalInsn> {
    Ok(match csr {
        MSTATUS => hart.mstatus(),
        MISA => hart.config.misa,
        MEDELEG => hart.medeleg,
        MIDELEG => hart.mideleg,
        MIE => hart.mie,
        MTVEC => hart.mtvec,
        MCOUNTEREN => hart.mcounteren,
        MENVCFG => hart.menvcfg,
        MCOUNTINHIBIT => hart.mcountinhibit,
        MSCRATCH => hart.mscratch,
        MEPC => hart.mepc,
        MCAUSE => hart.mcause,
        MTVAL => hart.mtval,
        MIP => read_mip(hart, env),
        PMPCFG0 | PMPCFG2 if hart.pmp.entries() != 0 => hart.pmp.config_word(usize::from(csr - PMPCFG0) / 2),
        PMPADDR0..=PMPADDR15 if hart.pmp.entries() != 0 => hart.pmp.address(usize::from(csr - PMPADDR0)),
        // No events: the counters are read-only zero (section 3.1.10).
        MHPMCOUNTER3..=MHPMCOUNTER31 | HPMCOUNTER3..=HPMCOUNTER31 | MHPMEVENT3..=MHPMEVENT31 => 0,
        MVENDORID | MARCHID | MIMPID | MCONFIGPTR => 0,
        MHARTID => hart.config.hart_id,
        _ => return Err(IllegalInsn),
    })
}

fn write<E: CsrEnv + ?Sized>(hart: &mut Hart, csr: u16, value: u64, env: &mut E) -> Result<(), IllegalInsn> {
    match csr {
        SSTATUS => hart.write_mstatus(value, mstatus::S_WRITABLE),
        SIE => write_mie(hart, value, hart.mideleg),
        STVEC => hart.stvec = legal_tvec(value),
        SCOUNTEREN => hart.scounteren = value & 0xffff_ffff,
        SENVCFG => hart.set_senvcfg(value),
        SSCRATCH => hart.sscratch = value,
        SEPC => hart.sepc = value & hart.config.pc_mask(),
        SCAUSE => hart.scause = legal_cause(value),
        STVAL => hart.stval = value,
        STIMECMP => {
            hart.stimecmp = value;
            hart.record(CsrEffect::TIMER | CsrEffect::INTERRUPTS);
        }
        SATP => write_satp(hart, value),
        FFLAGS => write_fcsr(hart, None, Some(value), env),
        FRM => write_fcsr(hart, Some(value), None, env),
        FCSR => write_fcsr(hart, Some(value >> 5), Some(value), env),
        _ => return write_machine(hart, csr, value, env),
    }
    Ok(())
}

fn write_machine<E: CsrEnv + ?Sized>(hart: &mut Hart, csr: u16, value: u64, env: &mut E) -> Result<(), IllegalInsn> {
    match csr {
        MSTATUS => hart.write_mstatus(value, mstatus::WRITABLE),
        // misa is WARL and fixed; performance counters are read-only zero.
        MISA | MHPMCOUNTER3..=MHPMCOUNTER31 | MHPMEVENT3..=MHPMEVENT31 => {}
        MEDELEG => hart.medeleg = value & MEDELEG_WRITABLE,
        MIDELEG => {
            hart.mideleg = value & irq::S_ALL;
            hart.record(CsrEffect::INTERRUPTS);
        }
        MIE => write_mie(hart, value, irq::ALL),
        MTVEC => hart.mtvec = legal_tvec(value),
        MCOUNTEREN => hart.mcounteren = value & 0xffff_ffff,
        MENVCFG => hart.set_menvcfg(value),
        MCOUNTINHIBIT => write_mcountinhibit(hart, value, env),
        MSCRATCH => hart.mscratch = value,
        MEPC => hart.mepc = value & hart.config.pc_mask(),
        MCAUSE => hart.mcause = legal_cause(value),
        MTVAL => hart.mtval = value,
        MCYCLE => hart.cycle.set(env.cycle(), value),
        // The written value is what the next instruction reads: the increment
        // of this one comes before the write (section 3.1.10 of the
        // unprivileged counters).
        MINSTRET => {
            let source = env.instret().wrapping_add(u64::from(!hart.instret.is_stopped()));
            hart.instret.set(source, value);
        }
        PMPCFG0 | PMPCFG2 if hart.pmp.entries() != 0 => {
            hart.pmp.set_config_word(usize::from(csr - PMPCFG0) / 2, value);
            hart.record(CsrEffect::STALE);
        }
        PMPADDR0..=PMPADDR15 if hart.pmp.entries() != 0 => {
            hart.pmp.set_address(usize::from(csr - PMPADDR0), value);
            hart.record(CsrEffect::STALE);
        }
        _ => return Err(IllegalInsn),
    }
    Ok(())
}

/// Exceptions that can be delegated: all the implemented ones except an
/// environment call from M-mode, which cannot happen below it.
pub(crate) const MEDELEG_WRITABLE: u64 = 0xb3ff;

/// `mip` with the levels of `pins`.
///
/// With Sstc STIP follows `stimecmp` by comparison, so that a guest that polls
/// does not depend on when the pin is raised.
fn read_mip<E: CsrEnv + ?Sized>(hart: &Hart, env: &mut E) -> u64 {
    let due = hart.sstc_enabled() && hart.timer_due(env.time());
    hart.mip(env.pins() & !irq::TIMER_PIN | if due { irq::TIMER_PIN } else { 0 })
}

/// Changes the software-writable bits of `mip` within `writable` and returns
/// all of the old `mip`.
///
/// The pin of SEIP takes no part in the read-modify-write (section 3.1.9),
/// and SSIP, which other harts set as an edge, is only cleared when the
/// instruction itself clears it: a set racing with `csrrs` must not be lost.
fn write_mip<E: CsrEnv + ?Sized>(hart: &mut Hart, op: CsrOp, src: u64, writable: u64, env: &mut E) -> u64 {
    let old = read_mip(hart, env);
    let mut writable = writable;
    if hart.sstc_enabled() {
        writable &= !irq::STI;
    }
    let (set, clear) = match op {
        CsrOp::Read => (0, 0),
        CsrOp::Write => (src, !src),
        CsrOp::Set => (src, 0),
        CsrOp::Clear => (0, src),
    };
    let clear = clear & writable;
    hart.mip_soft = hart.mip_soft & !clear | set & writable;
    if clear & irq::SSI != 0 {
        env.clear_pins(irq::SSI);
    }
    hart.record(CsrEffect::INTERRUPTS);
    old
}

fn write_mie(hart: &mut Hart, value: u64, mask: u64) {
    let old = hart.mie;
    hart.mie = old & !mask | value & mask;
    if hart.mie & !old != 0 {
        hart.record(CsrEffect::INTERRUPTS);
    }
}

/// Trap vectors: 4-byte aligned base, mode 0 (direct) or 1 (vectored).
const fn legal_tvec(value: u64) -> u64 {
    value & !2
}

/// Causes: the interrupt bit and six bits of code hold every implemented one.
const fn legal_cause(value: u64) -> u64 {
    value & (1 << 63 | 0x3f)
}

fn write_satp(hart: &mut Hart, value: u64) {
    // An unsupported mode makes the whole write have no effect (section 12.1.11).
    if hart.is_legal_satp(value) {
        hart.satp = value;
        hart.record(CsrEffect::SATP);
    }
}

/// The bits of `senvcfg` this hart has.
fn senvcfg_mask(hart: &Hart) -> u64 {
    let mut mask = envcfg::FIOM;
    if hart.config.zicbom {
        mask |= envcfg::CBIE | envcfg::CBCFE;
    }
    if hart.config.zicboz {
        mask |= envcfg::CBZE;
    }
    mask
}

/// The new value of an environment configuration register: only the bits in
/// `mask`, and the reserved CBIE encoding 2 keeps the old field.
fn legal_envcfg(old: u64, value: u64, mask: u64) -> u64 {
    let new = value & mask;
    if new & envcfg::CBIE == 2 << envcfg::CBIE_SHIFT { new & !envcfg::CBIE | old & envcfg::CBIE } else { new }
}

impl Hart {
    /// Whether the hart has the mode in this value of `satp`.
    pub(crate) fn is_legal_satp(&self, value: u64) -> bool {
        let mode = value >> 60;
        mode == 0 || mode >= 8 && mode <= u64::from(self.config.max_satp_mode)
    }

    /// Writes `senvcfg`.
    pub(crate) fn set_senvcfg(&mut self, value: u64) {
        self.senvcfg = legal_envcfg(self.senvcfg, value, senvcfg_mask(self));
        self.update_cbz_bad();
    }

    /// Writes `menvcfg`.
    pub(crate) fn set_menvcfg(&mut self, value: u64) {
        let mut mask = senvcfg_mask(self);
        for (present, bit) in
            [(self.config.svadu, envcfg::ADUE), (self.config.svpbmt, envcfg::PBMTE), (self.config.sstc, envcfg::STCE)]
        {
            if present {
                mask |= bit;
            }
        }
        let old = self.menvcfg;
        self.menvcfg = legal_envcfg(old, value, mask);
        self.update_cbz_bad();
        let changed = old ^ self.menvcfg;
        if changed & (envcfg::ADUE | envcfg::PBMTE) != 0 {
            self.record(CsrEffect::STALE);
        }
        if changed & envcfg::STCE != 0 {
            self.record(CsrEffect::TIMER | CsrEffect::INTERRUPTS);
        }
    }
}

fn write_mcountinhibit<E: CsrEnv + ?Sized>(hart: &mut Hart, value: u64, env: &mut E) {
    const CY: u64 = 1;
    const IR: u64 = 4;
    hart.mcountinhibit = value & (CY | IR);
    hart.cycle.set_stopped(env.cycle(), value & CY != 0);
    hart.instret.set_stopped(env.instret(), value & IR != 0);
}

/// Moves the host FPU's flags into the hart and returns all accrued flags.
fn read_fflags<E: CsrEnv + ?Sized>(hart: &mut Hart, env: &mut E) -> u8 {
    hart.fflags |= env.take_flags() & 0x1f;
    hart.fflags
}

/// Writes the fields of `fcsr` that are given; any such write dirties FS.
fn write_fcsr<E: CsrEnv + ?Sized>(hart: &mut Hart, frm: Option<u64>, fflags: Option<u64>, env: &mut E) {
    if let Some(flags) = fflags {
        env.set_flags(0);
        hart.fflags = flags as u8 & 0x1f;
    }
    if let Some(frm) = frm {
        let frm = frm as u8 & 7;
        if frm != hart.frm {
            hart.set_frm(frm);
            env.set_rounding(frm);
            hart.record(CsrEffect::FP_STATE);
        }
    }
    hart.fp_dirty = 1;
}
