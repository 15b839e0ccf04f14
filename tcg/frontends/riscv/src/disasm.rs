//! The disassembler: instructions in the syntax of the RISC-V assembler, with ABI register names, without
//! pseudo-instructions.

use crate::decode::{find16, find32, format, insn_len};

/// Disassembles the instruction `insn` (of 16 bits if its low two bits are not both set) at `pc`, whatever
/// extensions the guest has; `None` if it is no instruction.
pub fn disassemble(insn: u32, pc: u64) -> Option<String> {
    let short = insn_len(insn as u16) == 2;
    let pattern = if short { find16(insn as u16, |_| true) } else { find32(insn, |_| true) }?;
    let insn = if short { insn & 0xffff } else { insn };
    let mut out = String::with_capacity(32);
    format(pattern, &mut out, insn, pc);
    Some(out)
}

/// How arguments are shown: one function per kind that the tables name. `pc` is the instruction's address.
pub mod display {
    use mimus_arch::riscv::csr::CSRS;
    use mimus_arch::riscv::regs::{FREG_NAMES, XREG_NAMES};
    use std::fmt::Write;

    /// Writing to a `String` cannot fail.
    macro_rules! put {
        ($out:expr, $($arg:tt)*) => {{ let _ = write!($out, $($arg)*); }};
    }

    /// An integer register.
    pub fn x(out: &mut String, value: i64, _pc: u64) {
        out.push_str(XREG_NAMES[(value & 31) as usize]);
    }

    /// A floating-point register.
    pub fn f(out: &mut String, value: i64, _pc: u64) {
        out.push_str(FREG_NAMES[(value & 31) as usize]);
    }

    /// A signed number.
    pub fn dec(out: &mut String, value: i64, _pc: u64) {
        put!(out, "{value}");
    }

    /// An unsigned number.
    pub fn hex(out: &mut String, value: i64, _pc: u64) {
        put!(out, "{value:#x}");
    }

    /// The upper 20 bits that `lui` and `auipc` take.
    pub fn upper(out: &mut String, value: i64, _pc: u64) {
        put!(out, "{:#x}", value >> 12 & 0xf_ffff);
    }

    /// The address a jump or branch goes to.
    pub fn target(out: &mut String, value: i64, pc: u64) {
        put!(out, "{:#x}", pc.wrapping_add(value as u64));
    }

    /// A control and status register.
    pub fn csr(out: &mut String, value: i64, _pc: u64) {
        match CSRS.binary_search_by_key(&value, |(number, _)| i64::from(*number)) {
            Ok(index) => out.push_str(CSRS[index].1),
            Err(_) => put!(out, "{value:#x}"),
        }
    }

    /// The rounding mode, where it is not the dynamic one.
    pub fn rm(out: &mut String, value: i64, _pc: u64) {
        match value {
            0 => out.push_str(",rne"),
            1 => out.push_str(",rtz"),
            2 => out.push_str(",rdn"),
            3 => out.push_str(",rup"),
            4 => out.push_str(",rmm"),
            7 => {}
            _ => put!(out, ",unknown{value}"),
        }
    }

    /// The rounding mode of a conversion that is always exact: assemblers write `rne`.
    pub fn rm_exact(out: &mut String, value: i64, pc: u64) {
        if value != 0 {
            rm(out, value, pc);
        }
    }

    /// Acquire and release bits.
    pub fn aqrl(out: &mut String, value: i64, _pc: u64) {
        out.push_str(["", ".rl", ".aq", ".aqrl"][(value & 3) as usize]);
    }

    /// A set of a fence.
    pub fn iorw(out: &mut String, value: i64, _pc: u64) {
        if value & 15 == 0 {
            out.push('0');
        }
        for (bit, letter) in [(8, 'i'), (4, 'o'), (2, 'r'), (1, 'w')] {
            if value & bit != 0 {
                out.push(letter);
            }
        }
    }
}
