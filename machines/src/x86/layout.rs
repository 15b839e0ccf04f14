//! Where RAM and windows of a PC are.
//!
//! The hole below 4 GiB is where software written for QEMU's boards expects it: fw_cfg,
//! CMOS and the memory map say so too, and firmware follows them.

use mimus_devices::pci::host_bridge::q35;

use super::acpi::Window;
use super::options::Kind;
use crate::boot::x86::{self, Memory, MemoryMap};
use crate::machine::RamRange;

/// Where addresses above 4 GiB begin.
pub const FOUR_GIB: u64 = 1 << 32;
/// PCI Express configuration space of the `q35` board, as its firmware places it.
pub const ECAM: (u64, u32) = (q35::ECAM_BASE, 256);
/// The I/O APIC: PCI's memory ends below it.
const PCI_END: u64 = super::acpi::IOAPIC_BASE as u64;
/// Granularity of the window above RAM.
const GIB: u64 = 1 << 30;
/// PCI windows above 4 GiB end here at most (46 bits), whatever the CPU can address.
const HIGH_END: u64 = 1 << 46;
/// Extended BIOS data area and what follows it up to 1 MiB.
const LOW_RAM_END: u64 = 0x9_fc00;
const BIOS_AREA: u64 = 0xf_0000;
const MIB: u64 = 1 << 20;

/// How much of `ram` is below 4 GiB. `max` is the user's wish.
pub fn split(kind: Kind, ram: u64, max: Option<u64>) -> Memory {
    // If RAM does not fit below the hole it is cut at a rounder boundary.
    let (whole, cut) = match kind {
        Kind::Microvm => (0xc000_0000, 0xc000_0000),
        Kind::Pc => (0xe000_0000, 0xc000_0000),
        Kind::Q35 => (0xb000_0000, 0x8000_0000),
    };
    let (whole, cut) = match max {
        Some(max) => (whole.min(max), cut.min(max)),
        None => (whole, cut),
    };
    let low = if ram < whole || ram <= cut { ram } else { cut };
    Memory { low, high: ram - low }
}

/// RAM as ranges.
pub fn ranges(m: Memory) -> Vec<RamRange> {
    let low = RamRange { base: 0, len: m.low };
    let high = RamRange { base: FOUR_GIB, len: m.high };
    [low, high].into_iter().filter(|r| r.len > 0).collect()
}

/// PCI's memory below 4 GiB.
pub fn mmio32(kind: Kind, m: Memory) -> Window {
    let base = match kind {
        Kind::Q35 => ECAM.0 + (u64::from(ECAM.1) << 20),
        // As the BIOS of this board has it.
        _ if m.low <= 0x8000_0000 => 0x8000_0000,
        _ if m.low <= 0xc000_0000 => 0xc000_0000,
        _ => 0xe000_0000,
    };
    (base, PCI_END - base)
}

/// PCI's memory above 4 GiB: all the CPU can address above RAM.
pub fn mmio64(m: Memory, phys_bits: u8) -> Option<Window> {
    let base = (FOUR_GIB + m.high).next_multiple_of(GIB);
    let end = 1u64.checked_shl(phys_bits.into()).unwrap_or(HIGH_END).min(HIGH_END);
    (end > base).then(|| (base, end - base))
}

/// The memory map of a machine without firmware. `tables` are at the top of low RAM.
pub fn e820(kind: Kind, m: Memory, tables: std::ops::Range<u64>) -> MemoryMap {
    use x86::Kind::{Ram, Reserved};
    let mut map = MemoryMap::default();
    map.set(0, m.low, Ram);
    // Video memory, option ROMs: not RAM for anybody's use.
    map.set(LOW_RAM_END, 0xa_0000 - LOW_RAM_END, Reserved);
    map.remove(0xa_0000, BIOS_AREA - 0xa_0000);
    map.set(BIOS_AREA, MIB - BIOS_AREA, Reserved);
    map.set(tables.start, m.low.max(tables.end) - tables.start, Reserved);
    if kind == Kind::Q35 {
        map.set(ECAM.0, u64::from(ECAM.1) << 20, Reserved);
    }
    map.set(FOUR_GIB, m.high, Ram);
    map
}

/// RAM alone, as firmware is told it.
pub fn ram_map(m: Memory) -> MemoryMap {
    let mut map = MemoryMap::default();
    map.set(0, m.low, x86::Kind::Ram).set(FOUR_GIB, m.high, x86::Kind::Ram);
    map
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_hole() {
        const G: u64 = 1 << 30;
        let low = |kind, ram| split(kind, ram, None).low;
        assert_eq!(low(Kind::Q35, 2 * G), 2 * G);
        assert_eq!(low(Kind::Q35, 0xb000_0000 - 4096), 0xb000_0000 - 4096);
        assert_eq!(low(Kind::Q35, 3 * G), 2 * G);
        assert_eq!(low(Kind::Pc, 3 * G), 3 * G);
        assert_eq!(low(Kind::Pc, 0xe000_0000), 3 * G);
        assert_eq!(low(Kind::Microvm, 4 * G), 3 * G);
        assert_eq!(split(Kind::Pc, 4 * G, Some(G)), Memory { low: G, high: 3 * G });
        for kind in [Kind::Microvm, Kind::Pc, Kind::Q35] {
            for ram in (1..200).map(|i| i * 0x400_0000) {
                let m = split(kind, ram, None);
                assert_eq!(m.low + m.high, ram);
                assert!(m.low <= mmio32(kind, m).0, "{kind:?} {ram:#x}");
            }
        }
    }

    #[test]
    fn windows() {
        let m = Memory { low: 2 << 30, high: 0 };
        assert_eq!(mmio32(Kind::Q35, m), (0xc000_0000, 0x3ec0_0000));
        assert_eq!(mmio32(Kind::Pc, m), (0x8000_0000, 0x7ec0_0000));
        assert_eq!(mmio64(Memory { low: 0, high: 1 << 20 }, 40), Some((0x1_4000_0000, (1 << 40) - 0x1_4000_0000)));
        assert_eq!(mmio64(m, 32), None);
        assert_eq!(mmio64(m, 255).unwrap().0, FOUR_GIB);
    }

    #[test]
    fn maps() {
        let m = Memory { low: 0x2000_0000, high: 0x1000_0000 };
        let map = e820(Kind::Q35, m, 0x1ffd_0000..0x1fff_0000);
        let shape: Vec<_> = map.entries().iter().map(|e| (e.base, e.end(), e.kind as u32)).collect();
        let want = [
            (0, 0x9_fc00, 1),
            (0x9_fc00, 0xa_0000, 2),
            (0xf_0000, 0x10_0000, 2),
            (0x10_0000, 0x1ffd_0000, 1),
            (0x1ffd_0000, 0x2000_0000, 2),
            (0xb000_0000, 0xc000_0000, 2),
            (0x1_0000_0000, 0x1_1000_0000, 1),
        ];
        assert_eq!(shape, want);
        assert_eq!(ram_map(m).entries().len(), 2);
    }
}
