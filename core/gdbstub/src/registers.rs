//! Registers in packets `g`, `G`, `p`, `P`, and their description, by architecture.

use crate::packet::{from_hex, to_hex};
use mimus_arch::CpuState;
use mimus_arch::riscv::gdb as riscv;

/// The target description of a machine whose vCPUs have such a state.
pub fn description(state: &CpuState) -> Option<String> {
    state.as_riscv().map(|_| riscv::target_xml())
}

fn value_hex(value: u64, size: usize) -> String {
    to_hex(&value.to_le_bytes()[..size.min(8)])
}

/// One register in target byte order.
pub fn read(state: &CpuState, number: u32) -> Option<String> {
    let s = state.as_riscv()?;
    Some(value_hex(riscv::get(s, number)?, riscv::size(number)?))
}

/// Changes one register; false if there is none such, or not of that size.
pub fn write(state: &mut CpuState, number: u32, hex: &str) -> bool {
    let Some(s) = state.as_riscv_mut() else { return false };
    let (Some(bytes), Some(size)) = (from_hex(hex), riscv::size(number)) else { return false };
    if bytes.len() != size {
        return false;
    }
    let mut value = [0; 8];
    value[..size].copy_from_slice(&bytes);
    riscv::set(s, number, u64::from_le_bytes(value))
}

/// The general registers, all at once.
pub fn read_general(state: &CpuState) -> Option<String> {
    (0..riscv::GENERAL).map(|n| read(state, n)).collect()
}

/// Changes the general registers.
pub fn write_general(state: &mut CpuState, hex: &str) -> bool {
    hex.is_ascii()
        && hex.len() == riscv::GENERAL as usize * 16
        && (0..riscv::GENERAL).all(|n| write(state, n, &hex[n as usize * 16..][..16]))
}
