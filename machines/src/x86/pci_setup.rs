//! What firmware does to PCI before it starts a system, for machines without firmware:
//! addresses for all BARs, decoding on, interrupts to the PIC pair, the registers of the
//! chipset.
//!
//! Spec: PCI Local Bus 3.0 §6.2.5 (sizing BARs); the chips' data sheets for their
//! registers (see their models).

use std::sync::{Arc, Mutex};

use mimus_core::bus::AccessSize;
use mimus_core::device::lock;
use mimus_devices::acpi::pm::AcpiPm;
use mimus_devices::pci::host_bridge::q35;
use mimus_devices::pci::southbridge::{ich9, piix};
use mimus_devices::pci::{DevFn, PciBus};

use super::acpi::Window;
use super::options::Kind;

/// First port of the power management block.
pub const PM_BASE: u16 = 0x600;
/// First port that BARs get.
const PORTS_BASE: u64 = 0xc000;
/// Interrupts of the PIC pair for PIRQA, B, C, D, and the same again.
pub const PIRQ_IRQS: [u8; 4] = [10, 10, 11, 11];
/// PAM registers: RAM for reading and writing, in the two halves of a register.
const PAM_RAM: u32 = 0x33;
/// The first has the BIOS area only.
const PAM0_RAM: u32 = 0x30;
const HOST: DevFn = DevFn(0);

const COMMAND: u16 = 0x04;
const HEADER_TYPE: u16 = 0x0e;
const BAR0: u16 = 0x10;
const INTERRUPT_LINE: u16 = 0x3c;
const INTERRUPT_PIN: u16 = 0x3d;
const DECODE_IO: u32 = 1;
const DECODE_MEMORY: u32 = 2;
const BAR_IO: u32 = 1;
const BAR_64: u32 = 2 << 1;

/// A machine's PCI.
pub struct PciSetup {
    /// Which board.
    pub kind: Kind,
    /// Its bus.
    pub bus: Arc<PciBus>,
    /// Its power management.
    pub pm: Arc<Mutex<AcpiPm>>,
    /// Memory below 4 GiB that BARs may have.
    pub mmio32: Window,
    /// The PIRQ of a device and pin.
    pub pirq_of: fn(u8, u8) -> usize,
}

impl PciSetup {
    /// Sets everything up. Map changes are queued.
    pub fn run(&self) {
        self.chipset();
        let mut places = Places { memory: self.mmio32.0, end: self.mmio32.0 + self.mmio32.1, ports: PORTS_BASE };
        for function in self.bus.list() {
            self.function(function, &mut places);
        }
        lock(&self.pm).set_acpi_enabled(true);
    }

    fn write(&self, function: DevFn, at: u16, size: AccessSize, value: u32) {
        self.bus.config_write(function, at, size, value);
    }

    fn write8(&self, function: DevFn, at: u16, value: u32) {
        self.write(function, at, AccessSize::B1, value);
    }

    fn write32(&self, function: DevFn, at: u16, value: u32) {
        self.write(function, at, AccessSize::B4, value);
    }

    fn chipset(&self) {
        let pam0 = if self.kind == Kind::Q35 { 0x90 } else { 0x59 };
        self.write8(HOST, pam0, PAM0_RAM);
        (1..7).for_each(|n| self.write8(HOST, pam0 + n, PAM_RAM));
        let block = u32::from(PM_BASE) | 1;
        let routes = |function: DevFn, at: u16| {
            (0..4).for_each(|n| self.write8(function, at + n, PIRQ_IRQS[usize::from(n)].into()));
        };
        match self.kind {
            Kind::Q35 => {
                // PCIEXBAR: the upper half first, so that it is never enabled at a wrong place.
                self.write32(HOST, 0x64, (q35::ECAM_BASE >> 32) as u32);
                self.write32(HOST, 0x60, q35::ECAM_BASE as u32 | 1);
                routes(ich9::DEVICE, 0x60);
                routes(ich9::DEVICE, 0x68);
                self.write32(ich9::DEVICE, 0x40, block);
                // ACPI_CNTL: enabled, SCI on interrupt 9.
                self.write8(ich9::DEVICE, 0x44, 0x80);
            }
            Kind::Pc | Kind::Microvm => {
                routes(piix::ISA, 0x60);
                self.write32(piix::POWER, 0x40, block);
                // PMREGMISC: the block is decoded.
                self.write8(piix::POWER, 0x80, 1);
            }
        }
    }

    /// BARs, decoding and interrupt line of one function.
    fn function(&self, f: DevFn, places: &mut Places) {
        let read8 = |at| self.bus.config_read(f, at, AccessSize::B1);
        // Bridges have two BARs and windows; there are none on these boards.
        if read8(HEADER_TYPE) & 0x7f != 0 {
            return;
        }
        let (mut bar, mut decode) = (0, 0);
        while bar < 6 {
            let at = BAR0 + bar * 4;
            let (kind, wide) = self.bar(f, at, places);
            decode |= kind;
            bar += if wide { 2 } else { 1 };
        }
        let command = self.bus.config_read(f, COMMAND, AccessSize::B2);
        self.write(f, COMMAND, AccessSize::B2, command | decode);
        let pin = read8(INTERRUPT_PIN);
        if (1..=4).contains(&pin) {
            let pirq = (self.pirq_of)(f.device(), (pin - 1) as u8);
            self.write8(f, INTERRUPT_LINE, PIRQ_IRQS[pirq % 4].into());
        }
    }

    /// Gives one BAR its address: what must be decoded for it, and whether it has 64 bits.
    fn bar(&self, f: DevFn, at: u16, places: &mut Places) -> (u32, bool) {
        let probe = |at| {
            self.write32(f, at, u32::MAX);
            self.bus.config_read(f, at, AccessSize::B4)
        };
        let low = probe(at);
        if low & BAR_IO != 0 {
            let len = u64::from(!(low & !3) & 0xffff) + 1;
            return match places.port(len) {
                Some(port) => {
                    self.write32(f, at, port as u32);
                    (DECODE_IO, false)
                }
                None => (0, false),
            };
        }
        let wide = low & 6 == BAR_64;
        let high = if wide { probe(at + 4) } else { u32::MAX };
        let mask = u64::from(high) << 32 | u64::from(low & !0xf);
        if low & !0xf == 0 && (!wide || high == 0) {
            return (0, wide);
        }
        // One that finds no room stays undecoded; a system may place it above 4 GiB.
        let address = places.memory((!mask).wrapping_add(1));
        self.write32(f, at, address.unwrap_or(0) as u32);
        if wide {
            self.write32(f, at + 4, (address.unwrap_or(0) >> 32) as u32);
        }
        (if address.is_some() { DECODE_MEMORY } else { 0 }, wide)
    }
}

/// What is free.
struct Places {
    memory: u64,
    end: u64,
    ports: u64,
}

impl Places {
    fn memory(&mut self, len: u64) -> Option<u64> {
        let at = self.memory.checked_next_multiple_of(len.max(0x1000))?;
        let next = at.checked_add(len).filter(|n| *n <= self.end)?;
        self.memory = next;
        Some(at)
    }

    fn port(&mut self, len: u64) -> Option<u64> {
        let at = self.ports.next_multiple_of(len);
        let next = Some(at + len).filter(|n| *n <= 0x1_0000)?;
        self.ports = next;
        Some(at)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_are_aligned_and_end() {
        let mut p = Places { memory: 0xc000_0000, end: 0xc010_0000, ports: PORTS_BASE };
        assert_eq!(p.memory(0x4000), Some(0xc000_0000));
        assert_eq!(p.memory(0x1_0000), Some(0xc001_0000));
        assert_eq!(p.memory(0x10), Some(0xc002_0000));
        assert_eq!(p.memory(0x10_0000), None);
        assert_eq!(p.memory(1 << 63), None);
        assert_eq!((p.port(0x20), p.port(0x40), p.port(0x8000)), (Some(0xc000), Some(0xc040), None));
    }
}
