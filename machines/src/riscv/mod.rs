//! RISC-V boards.

pub mod fdt;
pub mod map;
pub mod sbi;
