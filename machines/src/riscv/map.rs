//! The `virt` board's memory map and interrupt numbers: what software written for QEMU's board of that name
//! expects (its documentation, `system/riscv/virt`, and its device tree are the interface).

/// A range of physical addresses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Range {
    pub base: u64,
    pub size: u64,
}

const fn range(base: u64, size: u64) -> Range {
    Range { base, size }
}

/// Mask ROM with the reset code: vCPUs start at its base.
pub const MROM: Range = range(0x1000, 0xf000);
/// Test finisher: power-off and reset.
pub const TEST: Range = range(0x10_0000, 0x1000);
/// Real-time clock.
pub const RTC: Range = range(0x10_1000, 0x1000);
/// ACLINT.
pub const CLINT: Range = range(0x200_0000, 0x1_0000);
/// PCI I/O ports.
pub const PCIE_PIO: Range = range(0x300_0000, 0x1_0000);
/// PLIC.
pub const PLIC: Range = range(0xc00_0000, 0x60_0000);
/// Serial port.
pub const UART: Range = range(0x1000_0000, 0x100);
/// virtio-mmio slots, one after another.
pub const VIRTIO: Range = range(0x1000_1000, 0x1000);
/// Number of virtio-mmio slots.
pub const VIRTIO_SLOTS: u32 = 8;
/// Firmware configuration.
pub const FW_CFG: Range = range(0x1010_0000, 0x18);
/// CFI flash, two banks.
pub const FLASH: Range = range(0x2000_0000, 0x400_0000);
/// PCIe configuration space.
pub const PCIE_ECAM: Range = range(0x3000_0000, 0x1000_0000);
/// PCIe memory window below 4 GiB.
pub const PCIE_MMIO: Range = range(0x4000_0000, 0x4000_0000);
/// RAM.
pub const DRAM_BASE: u64 = 0x8000_0000;

/// PCIe 64-bit memory window: above RAM, aligned to its size.
pub fn pcie_mmio_high(ram: u64) -> Range {
    const SIZE: u64 = 16 << 30;
    range((DRAM_BASE + ram).next_multiple_of(SIZE), SIZE)
}

/// First virtio-mmio interrupt.
pub const IRQ_VIRTIO: u32 = 1;
/// Serial port's interrupt.
pub const IRQ_UART: u32 = 10;
/// Clock's interrupt.
pub const IRQ_RTC: u32 = 11;
/// First of the four PCI interrupts.
pub const IRQ_PCIE: u32 = 32;
/// Interrupt sources of the PLIC.
pub const PLIC_SOURCES: u32 = 95;

/// Nanoseconds per tick of `mtime`: 10 MHz.
pub const TICK_NS: u64 = 100;
/// Ticks per second.
pub const TIMEBASE: u32 = 10_000_000;
