//! Where kernel, initrd and tables go in a PC's RAM.
//!
//! The kernel goes where its file says. The tables firmware would have made go to the
//! top of RAM below 4 GiB, the initrd as high as it may below them (boot.rst: "as high
//! in memory as possible"), or above 4 GiB if the kernel takes it there.

use std::ops::Range;

use super::{Image, LOW_END, bzimage};
use crate::boot::{BootError, human};

const PAGE: u64 = 4096;
const MIB: u64 = 1 << 20;
const FOUR_GIB: u64 = 1 << 32;
/// Where the display's memory and firmware would be.
const LOW_RAM_END: u64 = 0x9_fc00;

/// RAM of a PC.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Memory {
    /// Bytes from address 0 on.
    pub low: u64,
    /// Bytes from 4 GiB on.
    pub high: u64,
}

/// Where things go.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Placement {
    /// The tables.
    pub tables: Range<u64>,
    /// The initrd.
    pub initrd: Option<Range<u64>>,
}

/// Places an initrd of some bytes and `tables` bytes of tables beside `kernel`. Names
/// are for errors.
pub fn place(
    memory: Memory,
    kernel: (&str, &Image),
    initrd: Option<(&str, u64)>,
    tables: u64,
) -> Result<Placement, BootError> {
    let tables = tables.next_multiple_of(PAGE);
    let top = memory.low.saturating_sub(tables) & !(0x1_0000 - 1);
    place_kernel(memory, top, kernel, initrd.map_or(0, |i| i.1))?;
    let initrd = match initrd {
        Some((what, len)) => Some(place_initrd(memory, top, kernel.1, what, len)?),
        None => None,
    };
    Ok(Placement { tables: top..top + tables, initrd })
}

fn place_kernel(memory: Memory, top: u64, (what, kernel): (&str, &Image), initrd: u64) -> Result<(), BootError> {
    let (start, end) = kernel.extent();
    let linked = |detail: String| BootError::Damaged { what: what.into(), detail };
    for piece in kernel.pieces() {
        let end = piece.address.saturating_add(piece.memory_size);
        let hits = |low: u64, high: u64| piece.address < high && end > low;
        if hits(0, LOW_END) || hits(LOW_RAM_END, bzimage::LOAD_ADDRESS) {
            let detail = format!(
                "it is linked for {:#x}..{end:#x}; below {:#x} only {LOW_END:#x}..{LOW_RAM_END:#x} is free",
                piece.address,
                bzimage::LOAD_ADDRESS
            );
            return Err(linked(detail));
        }
    }
    if start >= FOUR_GIB {
        return Err(linked(format!("it is linked for address {start:#x}, above 4 GiB, where no kernel is entered")));
    }
    if end > top {
        return Err(BootError::TooBig {
            what: what.into(),
            detail: format!("it needs memory up to {end:#x}, {} of RAM leave it {top:#x}", human(memory.low)),
            suggest_mib: suggest(end, initrd),
        });
    }
    Ok(())
}

fn place_initrd(memory: Memory, top: u64, kernel: &Image, what: &str, len: u64) -> Result<Range<u64>, BootError> {
    let floor = kernel.extent().1;
    let (limit, above) = match kernel {
        Image::Linux(k) if !k.above_4g => (k.initrd_max.saturating_add(1), false),
        _ => (u64::MAX, true),
    };
    let ceiling = top.min(limit);
    if let Some(start) = ceiling.checked_sub(len).map(|s| s & !(PAGE - 1)).filter(|s| *s >= floor) {
        return Ok(start..start + len);
    }
    if above && len <= memory.high {
        return Ok(FOUR_GIB..FOUR_GIB + len);
    }
    if limit < top {
        return Err(BootError::Damaged {
            what: what.into(),
            detail: format!("it has {}, and this kernel takes an initrd only below {limit:#x}", human(len)),
        });
    }
    let left = ceiling.saturating_sub(floor);
    Err(BootError::TooBig {
        what: what.into(),
        detail: format!(
            "it has {}, and {} of RAM leave {} after the kernel",
            human(len),
            human(memory.low),
            human(left)
        ),
        suggest_mib: suggest(floor, len),
    })
}

/// A RAM size, in MiB, that holds kernel and initrd, and the initrd once more unpacked
/// (initrds are compressed, to about 40 %).
fn suggest(kernel_end: u64, initrd: u64) -> u64 {
    let need = kernel_end + initrd * 4 + 32 * MIB;
    need.div_ceil(MIB).next_power_of_two().max(64)
}
