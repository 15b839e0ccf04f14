//! Host bridge of the Q35 chip set (MCH) with its PCI Express root bus.
//!
//! Spec: Intel 3 Series Express Chipset Family (Q35) data sheet, 316966-002, section 5.1.
//! Modelled: PCIEXBAR, PAM, SMRAM and ESMRAMC with their lock, configuration ports.
//! Not modelled: what has no effect in a machine without its timing and graphics: DRAM controller, MCHBAR, DMIBAR,
//! EPBAR, TOUUD (0), remapping. TOLUD, TSEGMB and what belongs to graphics keep what firmware writes, which reads TSEG's
//! place there; RAM's end is what TSEG is below.
//! Checked with: its tests; register sequences of SeaBIOS and OVMF.

use super::ecam::{ECAM_BUS_LEN, Ecam};
use super::pc_host::{Chip, PcHost};
use super::pc_memory::{EXTENDED_TSEG_MIB, PcMemory, TSEG_ENABLE};
use crate::pci::config_space::{ConfigSpace, PciIds};
use crate::pci::intx::IntxRouter;
use crate::pci::{CHIPSET, PciError};
use mimus_core::bus::{AccessRules, AccessSize};
use mimus_core::irq::{IrqLine, MsiTarget};
use mimus_core::memory::{MemoryRegion, RegionHandle};
use mimus_core::snapshot::Schema;
use std::sync::Arc;

/// MiB of the extended TSEG. Reserved in the data sheet; firmware writes ones, and takes what it reads for the size if
/// it is anything else.
const EXTENDED_TSEG: usize = 0x50;
/// Registers that keep what is written, until D_LCK: GGC, GBSM, BGSM, TSEGMB, TOLUD.
const KEPT: [(usize, &[u8]); 5] = [
    (0x52, &[0x72, 0]),
    (0xa4, &[0, 0, 0xf0, 0xff]),
    (0xa8, &[0, 0, 0xf0, 0xff]),
    (0xac, &[0, 0, 0xf0, 0xff]),
    (0xb0, &[0xf0, 0xff]),
];
const PCIEXBAR: usize = 0x60;
const ESMRAMC: (usize, &[u8]) = (0x9e, &[ESMRAMC_TSEG_SIZE | TSEG_ENABLE | 0x80]);

const PCIEXBAR_ENABLE: u64 = 1;
/// Bits 2:1 say how many buses: 256, 128, 64.
const ECAM_LEN: [u64; 3] = [256 * ECAM_BUS_LEN, 128 * ECAM_BUS_LEN, 64 * ECAM_BUS_LEN];
/// Where firmware puts it: what a board without firmware says in its tables.
pub const ECAM_BASE: u64 = 0xb000_0000;
/// What PCIEXBAR is when a system wakes, if it was off: SeaBIOS sets configuration space up again through its own window,
/// whose first write there turns it off, and counts on it at the next waking.
const ECAM_AWAKE: u64 = ECAM_BASE | PCIEXBAR_ENABLE;

const ESMRAMC_TSEG_SIZE: u8 = 3 << 1;
/// Enables above 1 MiB and cacheability of the copies at 0xfeda0000, which are not there.
const ESMRAMC_FIXED: u8 = 0x38;

/// The PIRQ (0 is A) that pin `pin` (0 is INTA) of device `device` is on: PIRQA to D for devices 25 to 31, which are the
/// chip set's own; E to H, in turn, for the others, as firmware and operating systems take it.
pub fn pirq_of(device: u8, pin: u8) -> usize {
    match device {
        25.. => usize::from(pin) % 4,
        _ => 4 + IntxRouter::wire(device, pin),
    }
}

/// The chip: windows on configuration space, one for each size.
pub struct Mch([RegionHandle; 3]);

/// The host bridge.
pub type Q35 = PcHost<Mch>;

impl Q35 {
    /// A bridge with its root bus `name`. `pirqs` are the lines of PIRQA to PIRQH; `msi` is where functions'
    /// messages go; `reset` resets the machine and must not wait.
    ///
    /// The board maps nothing: PCI memory and ports are behind all else, the ROM is in its segments.
    pub fn new(
        name: &str,
        memory: &PcMemory<'_>,
        pirqs: [IrqLine; 8],
        msi: Option<MsiTarget>,
        reset: impl Fn() + Send + Sync + 'static,
    ) -> Result<Arc<Self>, PciError> {
        let rules = AccessRules::sizes(AccessSize::B1, AccessSize::B4);
        Self::build(name, memory, pirqs.to_vec(), msi, reset, |bus| {
            Mch(ECAM_LEN.map(|len| {
                let region = MemoryRegion::mmio(format!("{name}-ecam"), len, rules);
                let handle = RegionHandle::new(memory.system.map(), region, Some(memory.system.root()), 0);
                handle.bind(0, &Arc::new(Ecam::new(bus)));
                handle
            }))
        })
    }
}

fn pciexbar(config: &ConfigSpace) -> u64 {
    u64::from_le_bytes(config.bytes(PCIEXBAR, 8).try_into().unwrap_or_default())
}

impl Chip for Mch {
    const SCHEMA: Schema = Schema::new("q35-host", 1);
    const IDS: PciIds = PciIds { vendor: 0x8086, device: 0x29c0, revision: 2, class: 0x06_0000, ..CHIPSET };
    const PAM0: usize = 0x90;
    const SMRAM: usize = 0x9d;
    const MAP_FROM: usize = PCIEXBAR - 3;
    const LOCKED: &'static [(usize, &'static [u8])] = &[ESMRAMC, KEPT[0], KEPT[1], KEPT[2], KEPT[3], KEPT[4]];

    fn pirq(device: u8, pin: u8) -> usize {
        pirq_of(device, pin)
    }

    fn add_registers(config: &mut ConfigSpace) {
        for (at, writable) in KEPT {
            config.add_register(at, &[0; 4][..writable.len()], writable);
        }
        config.add_register(EXTENDED_TSEG, &EXTENDED_TSEG_MIB.to_le_bytes(), &[0; 2]);
        // Bits 35:26 of the base, length, enable.
        config.add_register(PCIEXBAR, &0xe000_0000_u64.to_le_bytes(), &0xf_fc00_0007_u64.to_le_bytes());
        config.add_register(ESMRAMC.0, &[ESMRAMC_FIXED], ESMRAMC.1);
    }

    fn esmramc(config: &ConfigSpace) -> u8 {
        config.bytes(ESMRAMC.0, 1)[0]
    }

    fn kept(config: &ConfigSpace) -> Vec<(usize, Vec<u8>)> {
        let ecam = pciexbar(config);
        let ecam = if ecam & PCIEXBAR_ENABLE != 0 { ecam } else { ECAM_AWAKE };
        vec![(PCIEXBAR, ecam.to_le_bytes().to_vec())]
    }

    fn apply(&self, config: &ConfigSpace) {
        let value = pciexbar(config);
        let (on, size) = (value & PCIEXBAR_ENABLE != 0, (value >> 1 & 3) as usize);
        for (n, region) in self.0.iter().enumerate() {
            match on && n == size {
                // Naturally aligned: lower bits of the base count only where the window is small enough.
                true => region.map(value & !(ECAM_LEN[n] - 1)),
                false => region.unmap(),
            }
        }
    }
}
