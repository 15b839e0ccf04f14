//! A hart's registers as gdb numbers, names and describes them.
//!
//! Spec: Debugging with GDB, "RISC-V Features" (Appendix G.5.10) and gdb's own numbering of RISC-V registers, which it
//! uses without a description too: `x0`-`x31` are 0-31, `pc` 32, `f0`-`f31` 33-64, CSR `n` 65 + n, `priv` 65 + 4096.
//! Left out: vector registers.

use super::csr::{self, number as n};
use super::regs::{FREG_NAMES, XREG_NAMES};
use super::state::{Privilege, RiscvState};
use std::fmt::Write;

/// gdb's number of `pc`.
pub const PC: u32 = 32;
/// gdb's number of `f0`.
pub const F0: u32 = 33;
/// gdb's number of CSR 0.
pub const CSR0: u32 = 65;
/// gdb's number of the privilege mode.
pub const PRIV: u32 = CSR0 + 4096;
/// Registers of a `g` packet: `x0`-`x31` and `pc`.
pub const GENERAL: u32 = 33;

/// `sstatus` as a part of `mstatus` (vol. II, 4.1.1).
const SSTATUS: u64 = 1 << 63 | 3 << 32 | 1 << 19 | 1 << 18 | 3 << 15 | 3 << 13 | 3 << 9 | 1 << 8 | 1 << 6 | 1 << 5 | 2;

/// The CSRs that a hart's state has.
#[rustfmt::skip]
const CSRS: &[u16] = &[
    n::SSTATUS, n::SIE, n::STVEC, n::SCOUNTEREN, n::SENVCFG, n::SSCRATCH, n::SEPC, n::SCAUSE, n::STVAL, n::SIP,
    n::STIMECMP, n::SATP, n::MSTATUS, n::MISA, n::MEDELEG, n::MIDELEG, n::MIE, n::MTVEC, n::MCOUNTEREN, n::MENVCFG,
    n::MCOUNTINHIBIT, n::MSCRATCH, n::MEPC, n::MCAUSE, n::MTVAL, n::MIP, n::MSECCFG, n::MCYCLE, n::MINSTRET,
    n::CYCLE, n::INSTRET, n::MHARTID,
];

/// What a debugger may read as registers besides the general ones, with their names: in the order of the description.
fn all_csrs() -> impl Iterator<Item = u16> {
    let pmp = (0..2).map(|i| n::PMPCFG0 + 2 * i).chain((0..16).map(|i| n::PMPADDR0 + i));
    CSRS.iter().copied().chain(pmp)
}

/// The target description (`qXfer:features:read`).
pub fn target_xml() -> String {
    let mut x = String::from(
        "<?xml version=\"1.0\"?>\n<!DOCTYPE target SYSTEM \"gdb-target.dtd\">\n<target version=\"1.0\">\n\
         <architecture>riscv:rv64</architecture>\n<feature name=\"org.gnu.gdb.riscv.cpu\">\n",
    );
    let mut reg = |name: &str, bits: u32, number: u32, kind: &str, group: &str| {
        let _ = writeln!(x, "<reg name=\"{name}\" bitsize=\"{bits}\" regnum=\"{number}\" type=\"{kind}\"{group}/>");
    };
    for (number, name) in (0..).zip(XREG_NAMES) {
        // gdb's name of s0 is its other one.
        let name = if name == "s0" { "fp" } else { name };
        let kind = match name {
            "ra" => "code_ptr",
            "sp" | "gp" | "tp" | "fp" => "data_ptr",
            _ => "int",
        };
        reg(name, 64, number, kind, "");
    }
    reg("pc", 64, PC, "code_ptr", "");
    x.push_str("</feature>\n<feature name=\"org.gnu.gdb.riscv.fpu\">\n");
    x.push_str(
        "<union id=\"riscv_double\"><field name=\"float\" type=\"ieee_single\"/>\
         <field name=\"double\" type=\"ieee_double\"/></union>\n",
    );
    let mut reg = |name: &str, bits: u32, number: u32, kind: &str, group: &str| {
        let _ = writeln!(x, "<reg name=\"{name}\" bitsize=\"{bits}\" regnum=\"{number}\" type=\"{kind}\"{group}/>");
    };
    for (number, name) in (F0..).zip(FREG_NAMES) {
        reg(name, 64, number, "riscv_double", "");
    }
    for csr in [n::FFLAGS, n::FRM, n::FCSR] {
        reg(csr::name(csr).unwrap_or("?"), 32, CSR0 + u32::from(csr), "int", " group=\"float\"");
    }
    x.push_str("</feature>\n<feature name=\"org.gnu.gdb.riscv.virtual\">\n");
    let _ = writeln!(x, "<reg name=\"priv\" bitsize=\"64\" regnum=\"{PRIV}\" type=\"int\" group=\"system\"/>");
    x.push_str("</feature>\n<feature name=\"org.gnu.gdb.riscv.csr\">\n");
    for csr in all_csrs() {
        let (name, number) = (csr::name(csr).unwrap_or("?"), CSR0 + u32::from(csr));
        let _ = writeln!(x, "<reg name=\"{name}\" bitsize=\"64\" regnum=\"{number}\" type=\"int\" group=\"csr\"/>");
    }
    x.push_str("</feature>\n</target>\n");
    x
}

/// Bytes of register `number`; `None` if there is no such register.
pub fn size(number: u32) -> Option<usize> {
    match number {
        0..CSR0 | PRIV => Some(8),
        _ => match u16::try_from(number - CSR0).ok()? {
            n::FFLAGS | n::FRM | n::FCSR => Some(4),
            csr => all_csrs().any(|c| c == csr).then_some(8),
        },
    }
}

/// The value of register `number`; `None` if there is no such register.
pub fn get(s: &RiscvState, number: u32) -> Option<u64> {
    size(number)?;
    Some(match number {
        0..PC => s.x[number as usize],
        PC => s.pc,
        F0..CSR0 => s.f[(number - F0) as usize],
        PRIV => s.privilege as u64,
        _ => get_csr(s, u16::try_from(number - CSR0).ok()?)?,
    })
}

fn get_csr(s: &RiscvState, csr: u16) -> Option<u64> {
    Some(match csr {
        n::FFLAGS => s.fcsr & 0x1f,
        n::FRM => s.fcsr >> 5 & 7,
        n::FCSR => s.fcsr,
        n::SSTATUS => s.mstatus & SSTATUS,
        n::SIE => s.mie & s.mideleg,
        n::SIP => s.mip & s.mideleg,
        n::MHARTID => s.mhartid,
        n::MISA => s.misa,
        n::CYCLE => s.mcycle,
        n::INSTRET => s.minstret,
        n::PMPCFG0..=0x3af => {
            let first = usize::from(csr - n::PMPCFG0) * 4;
            let bytes = s.pmpcfg.get(first..first + 8)?;
            bytes.iter().rev().fold(0, |v, b| v << 8 | u64::from(*b))
        }
        n::PMPADDR0..=0x3bf => s.pmpaddr[usize::from(csr - n::PMPADDR0)],
        // The others are fields of their own.
        _ => *field(&mut s.clone(), csr)?,
    })
}

fn field(s: &mut RiscvState, csr: u16) -> Option<&mut u64> {
    Some(match csr {
        n::STVEC => &mut s.stvec,
        n::SCOUNTEREN => &mut s.scounteren,
        n::SENVCFG => &mut s.senvcfg,
        n::SSCRATCH => &mut s.sscratch,
        n::SEPC => &mut s.sepc,
        n::SCAUSE => &mut s.scause,
        n::STVAL => &mut s.stval,
        n::STIMECMP => &mut s.stimecmp,
        n::SATP => &mut s.satp,
        n::MSTATUS => &mut s.mstatus,
        n::MEDELEG => &mut s.medeleg,
        n::MIDELEG => &mut s.mideleg,
        n::MIE => &mut s.mie,
        n::MTVEC => &mut s.mtvec,
        n::MCOUNTEREN => &mut s.mcounteren,
        n::MENVCFG => &mut s.menvcfg,
        n::MCOUNTINHIBIT => &mut s.mcountinhibit,
        n::MSCRATCH => &mut s.mscratch,
        n::MEPC => &mut s.mepc,
        n::MCAUSE => &mut s.mcause,
        n::MTVAL => &mut s.mtval,
        n::MIP => &mut s.mip,
        n::MSECCFG => &mut s.mseccfg,
        n::MCYCLE => &mut s.mcycle,
        n::MINSTRET => &mut s.minstret,
        _ => return None,
    })
}

/// Changes register `number`; false if there is none, or it cannot be written.
pub fn set(s: &mut RiscvState, number: u32, value: u64) -> bool {
    if size(number).is_none() {
        return false;
    }
    match number {
        0 => {}
        1..PC => s.x[number as usize] = value,
        PC => s.pc = value,
        F0..CSR0 => s.f[(number - F0) as usize] = value,
        PRIV => match Privilege::from_bits(value) {
            Some(p) if value < 4 => s.privilege = p,
            _ => return false,
        },
        _ => return set_csr(s, (number - CSR0) as u16, value),
    }
    true
}

fn set_csr(s: &mut RiscvState, csr: u16, value: u64) -> bool {
    let merge = |old: u64, mask: u64| old & !mask | value & mask;
    match csr {
        n::FFLAGS => s.fcsr = merge(s.fcsr, 0x1f),
        n::FRM => s.fcsr = s.fcsr & !0xe0 | (value & 7) << 5,
        n::FCSR => s.fcsr = value & 0xff,
        n::SSTATUS => s.mstatus = merge(s.mstatus, SSTATUS),
        n::SIE => s.mie = merge(s.mie, s.mideleg),
        n::SIP => s.mip = merge(s.mip, s.mideleg),
        n::PMPCFG0..=0x3af => {
            let first = usize::from(csr - n::PMPCFG0) * 4;
            s.pmpcfg[first..first + 8].copy_from_slice(&value.to_le_bytes());
        }
        n::PMPADDR0..=0x3bf => s.pmpaddr[usize::from(csr - n::PMPADDR0)] = value,
        _ => match field(s, csr) {
            Some(f) => *f = value,
            None => return false,
        },
    }
    true
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_described_register_can_be_read_and_nothing_else() {
        let xml = target_xml();
        let s = RiscvState::new(3, 0x8000_0000_0014_112d, 0x1000);
        for number in 0..5000 {
            let described = xml.contains(&format!("regnum=\"{number}\""));
            assert_eq!(get(&s, number).is_some(), described, "{number}");
        }
        for name in ["zero", "fp", "t6", "pc", "ft0", "fcsr", "priv", "satp", "sstatus", "mhartid", "pmpaddr15"] {
            assert_eq!(xml.matches(&format!("\"{name}\"")).count(), 1, "{name}");
        }
    }

    #[test]
    fn what_is_written_is_read() {
        let mut s = RiscvState::new(3, 0x8000_0000_0014_112d, 0x1000);
        s.mideleg = 0x222;
        for number in (1..CSR0).chain([CSR0 + 0x180, CSR0 + 0x300, CSR0 + 0x3a2, CSR0 + 0x3b1, CSR0 + 0x340]) {
            let value = 0x0123_4567_89ab_0000 | u64::from(number);
            assert!(set(&mut s, number, value), "{number}");
            assert_eq!(get(&s, number), Some(value), "{number}");
        }
        assert!(set(&mut s, 0, 7));
        assert_eq!(s.x[0], 0);
        assert!(set(&mut s, CSR0 + 2, 5) && set(&mut s, CSR0 + 1, 0xff));
        assert_eq!(get(&s, CSR0 + 3), Some(0xbf));
        assert!(set(&mut s, PRIV, 1) && !set(&mut s, PRIV, 2) && !set(&mut s, PRIV, 5));
        assert_eq!(s.privilege, Privilege::Supervisor);
        assert!(!set(&mut s, CSR0 + 0xf14, 1) && !set(&mut s, CSR0 + 0x7c0, 1));
    }

    /// What `sstatus` shows of `mstatus`, and no more of it is written.
    #[test]
    fn views() {
        let mut s = RiscvState::new(0, 0, 0);
        s.mstatus = 0xa_0000_1880;
        assert!(set(&mut s, CSR0 + 0x100, !0));
        assert_eq!(s.mstatus & !SSTATUS, 0x8_0000_1880);
        assert_eq!(get(&s, CSR0 + 0x100), Some(SSTATUS));
    }
}
