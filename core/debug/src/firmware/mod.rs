//! What firmware told the guest of the machine, read from the guest's memory as the guest finds it: ACPI tables and the
//! flattened device tree. Sizes and links are the guest's to change: all are bounded.

mod acpi;
mod fdt;

pub use acpi::acpi;
pub use fdt::fdt;

use crate::target::Target;

/// Physical memory; `None` if some of it is not RAM, or there is absurdly much of it.
fn physical(target: &dyn Target, at: u64, len: u64) -> Option<Vec<u8>> {
    const MOST: u64 = 4 << 20;
    if len > MOST {
        return None;
    }
    let mut out = vec![0; len as usize];
    for (i, piece) in out.chunks_mut(4096).enumerate() {
        if !target.read(at.checked_add(4096 * i as u64)?, piece) {
            return None;
        }
    }
    Some(out)
}

/// A little-endian number of a table; 0 behind its end.
fn number(table: &[u8], at: usize, bytes: usize) -> u64 {
    let part = table.get(at..at.saturating_add(bytes)).unwrap_or_default();
    part.iter().rev().fold(0, |n, b| n << 8 | u64::from(*b))
}

#[cfg(test)]
#[path = "../firmware_tests.rs"]
mod tests;
