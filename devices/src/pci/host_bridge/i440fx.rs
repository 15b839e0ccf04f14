//! Host bridge of the 440FX chip set (PMC) with its PCI root bus.
//!
//! Spec: Intel 440FX PCIset data sheet, 290549-001, section 3.2.
//! Modelled: PAM, SMRAM with its lock, configuration ports.
//! Not modelled: DRAM controller: its registers keep what firmware writes.
//! Checked with: its tests; register sequences of SeaBIOS.

use super::pc_host::{Chip, PcHost};
use super::pc_memory::PcMemory;
use crate::pci::config_space::{ConfigSpace, PciIds};
use crate::pci::intx::IntxRouter;
use crate::pci::{CHIPSET, PciError};
use mimus_core::irq::{IrqLine, MsiTarget};
use mimus_core::snapshot::Schema;
use std::sync::Arc;

/// Configuration and DRAM timing, which keep what is written: PMCCFG to DRAMT, and DRAM row boundaries.
const DRAM: std::ops::Range<usize> = 0x50..0x59;
const DRAM_ROWS: std::ops::Range<usize> = 0x60..0x68;

/// The PIRQ (0 is A) that pin `pin` (0 is INTA) of device `device` is on, as firmware and operating systems take it: in
/// turn, from device 1 on.
pub fn pirq_of(device: u8, pin: u8) -> usize {
    IntxRouter::wire(device.wrapping_sub(1), pin)
}

/// The chip.
pub struct Pmc;

/// The host bridge.
pub type I440fx = PcHost<Pmc>;

impl I440fx {
    /// A bridge with its root bus `name`. `pirqs` are the lines of PIRQA to PIRQD; `msi` is where functions'
    /// messages go; `reset` resets the machine and must not wait.
    ///
    /// The board maps nothing: PCI memory and ports are behind all else, the ROM is in its segments.
    pub fn new(
        name: &str,
        memory: &PcMemory<'_>,
        pirqs: [IrqLine; 4],
        msi: Option<MsiTarget>,
        reset: impl Fn() + Send + Sync + 'static,
    ) -> Result<Arc<Self>, PciError> {
        Self::build(name, memory, pirqs.to_vec(), msi, reset, |_| Pmc)
    }
}

impl Chip for Pmc {
    const SCHEMA: Schema = Schema::new("i440fx-host", 1);
    const IDS: PciIds = PciIds { vendor: 0x8086, device: 0x1237, revision: 2, class: 0x06_0000, ..CHIPSET };
    const PAM0: usize = 0x59;
    const SMRAM: usize = 0x72;
    const MAP_FROM: usize = DRAM.start;
    const LOCKED: &'static [(usize, &'static [u8])] = &[];

    fn pirq(device: u8, pin: u8) -> usize {
        pirq_of(device, pin)
    }

    fn add_registers(config: &mut ConfigSpace) {
        for range in [DRAM, DRAM_ROWS] {
            config.add_register(range.start, &vec![0; range.len()], &vec![0xff; range.len()]);
        }
    }
}
