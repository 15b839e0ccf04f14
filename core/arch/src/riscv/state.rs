//! The state of a RISC-V hart, with its reset values.
//!
//! CSRs that are views of another (`sstatus`, `sie`, `sip`, `fflags`, `frm`) are
//! not stored twice. `mip` holds the software-writable bits and the level of the
//! interrupt pins as the accelerator saw them last.

use serde::{Deserialize, Serialize};

/// Privilege mode, with the encoding of `mstatus.MPP`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[repr(u8)]
pub enum Privilege {
    /// User.
    User = 0,
    /// Supervisor.
    Supervisor = 1,
    /// Machine.
    Machine = 3,
}

impl Privilege {
    /// From the two-bit encoding; `None` for the reserved value 2.
    pub const fn from_bits(bits: u64) -> Option<Self> {
        match bits & 3 {
            0 => Some(Self::User),
            1 => Some(Self::Supervisor),
            3 => Some(Self::Machine),
            _ => None,
        }
    }
}

/// Number of PMP entries a hart has room for.
pub const PMP_ENTRIES: usize = 16;

/// One hart. Values are as the CSR reads in M-mode.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RiscvState {
    /// Integer registers; `x[0]` is zero.
    pub x: [u64; 32],
    /// Floating-point registers, narrower values NaN-boxed.
    pub f: [u64; 32],
    /// Program counter.
    pub pc: u64,
    /// Current privilege mode.
    pub privilege: Privilege,
    /// True while the hart waits in `WFI`.
    pub waiting: bool,

    /// `fcsr`: `fflags` in 4:0, `frm` in 7:5.
    pub fcsr: u64,
    /// Vector registers, VLEN/8 bytes each, one after another; empty without V.
    #[serde(default)]
    pub v: Vec<u8>,
    /// `vstart`.
    #[serde(default)]
    pub vstart: u64,
    /// `vcsr`: `vxsat` in 0, `vxrm` in 2:1.
    #[serde(default)]
    pub vcsr: u64,
    /// `vl`.
    #[serde(default)]
    pub vl: u64,
    /// `vtype`.
    #[serde(default)]
    pub vtype: u64,

    /// `mstatus`.
    pub mstatus: u64,
    /// `misa`.
    pub misa: u64,
    /// `medeleg`.
    pub medeleg: u64,
    /// `mideleg`.
    pub mideleg: u64,
    /// `mie`.
    pub mie: u64,
    /// `mip`.
    pub mip: u64,
    /// The bits of `mip` that are levels of interrupt pins: whoever takes the state over leaves them to what drives
    /// the pins, and takes the others as set by software.
    #[serde(default)]
    pub pins: u64,
    /// `mtvec`.
    pub mtvec: u64,
    /// `mcounteren`.
    pub mcounteren: u64,
    /// `mcountinhibit`.
    pub mcountinhibit: u64,
    /// `menvcfg`.
    pub menvcfg: u64,
    /// `mseccfg`.
    pub mseccfg: u64,
    /// `mscratch`.
    pub mscratch: u64,
    /// `mepc`.
    pub mepc: u64,
    /// `mcause`.
    pub mcause: u64,
    /// `mtval`.
    pub mtval: u64,
    /// `mhartid`.
    pub mhartid: u64,
    /// `mcycle`.
    pub mcycle: u64,
    /// `minstret`.
    pub minstret: u64,
    /// `pmpcfg0`-`pmpcfg2` as bytes, one per entry.
    pub pmpcfg: [u8; PMP_ENTRIES],
    /// `pmpaddr0`-`pmpaddr15`.
    pub pmpaddr: [u64; PMP_ENTRIES],

    /// `stvec`.
    pub stvec: u64,
    /// `scounteren`.
    pub scounteren: u64,
    /// `senvcfg`.
    pub senvcfg: u64,
    /// `sscratch`.
    pub sscratch: u64,
    /// `sepc`.
    pub sepc: u64,
    /// `scause`.
    pub scause: u64,
    /// `stval`.
    pub stval: u64,
    /// `satp`.
    pub satp: u64,
    /// `stimecmp` (Sstc), in timebase ticks.
    pub stimecmp: u64,
}

/// `mstatus.UXL` and `mstatus.SXL` = 2 (XLEN 64); vol. II, 3.1.6.3.
pub const MSTATUS_XL64: u64 = (2 << 32) | (2 << 34);

impl RiscvState {
    /// A hart just out of reset (vol. II, 3.4): M-mode, `mstatus.MIE` clear, PMP off,
    /// `satp` Bare, no timer armed.
    pub fn new(hartid: u64, misa: u64, reset_pc: u64) -> Self {
        Self {
            x: [0; 32],
            f: [0; 32],
            pc: reset_pc,
            privilege: Privilege::Machine,
            waiting: false,
            fcsr: 0,
            v: Vec::new(),
            vstart: 0,
            vcsr: 0,
            vl: 0,
            vtype: 1 << 63,
            mstatus: MSTATUS_XL64,
            misa,
            medeleg: 0,
            mideleg: 0,
            mie: 0,
            mip: 0,
            pins: 0,
            mtvec: 0,
            mcounteren: 0,
            mcountinhibit: 0,
            menvcfg: 0,
            mseccfg: 0,
            mscratch: 0,
            mepc: 0,
            mcause: 0,
            mtval: 0,
            mhartid: hartid,
            mcycle: 0,
            minstret: 0,
            pmpcfg: [0; PMP_ENTRIES],
            pmpaddr: [0; PMP_ENTRIES],
            stvec: 0,
            scounteren: 0,
            senvcfg: 0,
            sscratch: 0,
            sepc: 0,
            scause: 0,
            stval: 0,
            satp: 0,
            stimecmp: u64::MAX,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::state::CpuState;

    #[test]
    fn state_survives_msgpack() {
        let mut s = RiscvState::new(3, 0x8000_0000_0014_112d, 0x1000);
        s.x[31] = 7;
        s.pmpcfg[15] = 0x1f;
        let state = CpuState::Riscv(Box::new(s));
        let bytes = rmp_serde::to_vec_named(&state).unwrap();
        assert_eq!(rmp_serde::from_slice::<CpuState>(&bytes).unwrap(), state);
        assert_eq!(state.pc(), 0x1000);
    }

    #[test]
    fn reserved_privilege() {
        assert_eq!(Privilege::from_bits(2), None);
        assert_eq!(Privilege::from_bits(3), Some(Privilege::Machine));
    }
}
