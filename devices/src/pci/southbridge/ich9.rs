//! LPC bridge of the ICH9: PCI interrupt routing, the place of the power management block, chip set registers.
//!
//! Spec: Intel ICH9 data sheet, 316972-004, section 13.1 (LPC), chapter 10 (chip set configuration).
//! Modelled: PIRQA to H, PMBASE with ACPI_EN, RCBA with the registers that tell interrupt routes and the HPET.
//! Not modelled: routing by the D25IR to D31IR registers (they keep what is written; devices 25 to 31 stay on PIRQA
//! to D), another SCI than IRQ 9, decode ranges (they keep what is written), GPIO, serial interrupts.
//! Checked with: its tests; register sequences of SeaBIOS, OVMF and Linux.

use super::pirq::{PirqRouter, ROUTE_BITS, ROUTE_DISABLED};
use super::{place, pm_region};
use crate::acpi::pm::AcpiPm;
use crate::pci::bus::{PciBus, PciFunction, PciSlot};
use crate::pci::config_space::{ConfigSpace, ConfigState, PciIds};
use crate::pci::{CHIPSET, DevFn, PciError};
use crate::virtio::device::decode_payload;
use mimus_core::bus::{AccessRules, AccessSize, BusFault, MmioAccess};
use mimus_core::device::{Lifecycle, MmioDevice, ResetPhase, lock};
use mimus_core::memory::{MemoryRegion, RegionHandle};
use mimus_core::snapshot::{Payload, Schema, Snapshot, SnapshotError};
use serde::{Deserialize, Serialize};
use std::sync::{Arc, Mutex};

/// Number of PIRQs.
pub const PIRQS: usize = 8;
/// Where it is on the root bus.
pub const DEVICE: DevFn = DevFn(31 << 3);

const SCHEMA: Schema = Schema::new("ich9-lpc", 1);
const IDS: PciIds = PciIds { vendor: 0x8086, device: 0x2918, revision: 2, class: 0x06_0100, ..CHIPSET };

const PMBASE: usize = 0x40;
const ACPI_CNTL: usize = 0x44;
const PIRQ_A: usize = 0x60;
const PIRQ_E: usize = 0x68;
const RCBA: usize = 0xf0;
const ACPI_EN: u8 = 0x80;
/// GEN_PMCON_1, whose SMI_LOCK stays set until a reset.
const GEN_PMCON_1: usize = 0xa0;
const SMI_LOCK: u8 = 1 << 4;
const BASE_ENABLE: u32 = 1;
const RCBA_LEN: u64 = 0x4000;

/// Registers that keep what is written, with their reset values: GPIOBASE and its control, serial interrupts, I/O
/// decode, general decodes, power management, firmware hub, BIOS control.
const PLAIN: [(usize, &[u8], &[u8]); 7] = [
    (0x48, &[1, 0, 0, 0, 0], &[0x80, 0xff, 0, 0, 0x17]),
    (0x64, &[0x10], &[0xff]),
    (0x80, &[0; 4], &[0xff; 4]),
    (0x84, &[0; 16], &[0xff; 16]),
    (0xa0, &[0; 16], &[0xff; 16]),
    (0xd0, &[0x33, 0x22, 0x11, 0x00, 0x67, 0x45, 0, 0, 0xcf, 0xff], &[0xff; 10]),
    (0xdc, &[0], &[0x23]),
];

/// Chip set registers that are there: from here on in the root complex's block.
const CHIPSET_BASE: u64 = 0x3000;
const CHIPSET_LEN: usize = 0x600;
/// Device interrupt routes D31IR to D25IR: pins A to D on PIRQA to D.
const INTERRUPT_ROUTES: [usize; 7] = [0x140, 0x142, 0x144, 0x146, 0x148, 0x14c, 0x150];
const ROUTES_IN_ORDER: [u8; 2] = [0x10, 0x32];
/// HPTC: the HPET's address is decoded, at the first of its places.
const HPET_CONFIG: usize = 0x404;
const HPET_ENABLE: u8 = 0x80;

/// The bridge, as saved.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct State {
    config: ConfigState,
    /// Levels of PIRQA and so on.
    pirq_levels: u32,
    /// Chip set registers, from 0x3000 on.
    chipset: Vec<u8>,
}

/// Chip set registers. Device-level lock.
struct Chipset(Mutex<Vec<u8>>);

/// The LPC bridge, function 0 of device 31.
pub struct Ich9Lpc {
    slot: PciSlot,
    /// Device-level lock.
    config: Mutex<ConfigSpace>,
    chipset: Arc<Chipset>,
    pirqs: Arc<PirqRouter>,
    block: Arc<Mutex<AcpiPm>>,
    pm: RegionHandle,
    rcba: RegionHandle,
}

impl Ich9Lpc {
    /// The bridge on `bus`, programming `pirqs` (of [`PIRQS`] inputs), and giving `pm` its place among the ports.
    /// `root` is the container of system memory.
    pub fn new(
        bus: &Arc<PciBus>,
        root: &MemoryRegion,
        pirqs: &Arc<PirqRouter>,
        pm: &Arc<Mutex<AcpiPm>>,
    ) -> Result<Arc<Self>, PciError> {
        let slot = bus.reserve(Some(DEVICE))?;
        let config = Mutex::new(config_space(&slot));
        let len = lock(pm).block_len();
        let block = pm.clone();
        let pm = pm_region("ich9-pm", &slot, pm, len);
        let chipset = Arc::new(Chipset(Mutex::new(chipset_reset())));
        let region = MemoryRegion::mmio("ich9-rcba", RCBA_LEN, AccessRules::sizes(AccessSize::B1, AccessSize::B4));
        let rcba = RegionHandle::new(bus.map(), region, Some(root), 0);
        rcba.bind(0, &chipset);
        let this = Arc::new(Self { slot, config, chipset, pirqs: pirqs.clone(), block, pm, rcba });
        this.slot.plug(this.clone());
        Ok(this)
    }

    /// Has the registers take effect; map changes are queued.
    fn apply(&self, config: &ConfigSpace) {
        self.pirqs.set_routes(&routes(config));
        self.place(config);
    }

    fn place(&self, config: &ConfigSpace) {
        let dword = |at| u32::from_le_bytes(config.bytes(at, 4).try_into().unwrap_or_default());
        lock(&self.block).set_smi_lock(config.bytes(GEN_PMCON_1, 1)[0] & SMI_LOCK != 0);
        let acpi = config.bytes(ACPI_CNTL, 1)[0] & ACPI_EN != 0;
        place(&self.pm, acpi.then(|| u64::from(dword(PMBASE) & 0xff80)));
        let rcba = dword(RCBA);
        place(&self.rcba, (rcba & BASE_ENABLE != 0).then(|| u64::from(rcba & 0xffff_c000)));
    }
}

fn config_space(slot: &PciSlot) -> ConfigSpace {
    let mut config = ConfigSpace::new(IDS, slot, false);
    // Bit 0 says that it is an address of ports.
    config.add_register(PMBASE, &[1, 0, 0, 0], &[0x80, 0xff, 0, 0]);
    config.add_register(ACPI_CNTL, &[0], &[ACPI_EN | 7]);
    for at in [PIRQ_A, PIRQ_E] {
        config.add_register(at, &[ROUTE_DISABLED; 4], &[ROUTE_BITS; 4]);
    }
    config.add_register(RCBA, &[0; 4], &(0xffff_c000 | BASE_ENABLE).to_le_bytes());
    for (at, reset, writable) in PLAIN {
        config.add_register(at, reset, writable);
    }
    config
}

fn routes(config: &ConfigSpace) -> [u8; PIRQS] {
    std::array::from_fn(|n| config.bytes(if n < 4 { PIRQ_A + n } else { PIRQ_E + n - 4 }, 1)[0])
}

fn chipset_reset() -> Vec<u8> {
    let mut registers = vec![0; CHIPSET_LEN];
    for at in INTERRUPT_ROUTES {
        registers[at..at + 2].copy_from_slice(&ROUTES_IN_ORDER);
    }
    registers[HPET_CONFIG] = HPET_ENABLE;
    registers
}

impl MmioDevice for Chipset {
    fn mmio_read(&self, a: MmioAccess) -> Result<u64, BusFault> {
        let registers = lock(&self.0);
        let byte = |n: u64| {
            let at = (a.offset + n).checked_sub(CHIPSET_BASE)?;
            registers.get(at as usize).copied()
        };
        Ok((0..a.size.bytes()).fold(0, |value, n| value | u64::from(byte(n).unwrap_or(0)) << (8 * n)))
    }

    fn mmio_write(&self, a: MmioAccess, value: u64) -> Result<(), BusFault> {
        let mut registers = lock(&self.0);
        for n in 0..a.size.bytes() {
            let at = (a.offset + n).checked_sub(CHIPSET_BASE);
            if let Some(byte) = at.and_then(|at| registers.get_mut(at as usize)) {
                *byte = (value >> (8 * n)) as u8;
            }
        }
        Ok(())
    }
}

impl PciFunction for Ich9Lpc {
    fn config_read(&self, offset: u16, size: AccessSize) -> u32 {
        lock(&self.config).read(offset, size)
    }

    fn config_write(&self, offset: u16, size: AccessSize, value: u32) {
        let mut config = lock(&self.config);
        let locked = config.bytes(GEN_PMCON_1, 1)[0] & SMI_LOCK;
        config.write(offset, size, value);
        let general = config.bytes(GEN_PMCON_1, 1)[0] | locked;
        config.set_register(GEN_PMCON_1, general);
        if usize::from(offset) + size.bytes() as usize > PMBASE {
            self.apply(&config);
        }
    }
}

impl Lifecycle for Ich9Lpc {
    fn reset(&self, phase: ResetPhase) {
        match phase {
            ResetPhase::Enter => {
                lock(&self.config).reset();
                *lock(&self.chipset.0) = chipset_reset();
            }
            ResetPhase::Hold => self.apply(&lock(&self.config)),
            ResetPhase::Exit => {}
        }
    }
}

impl Snapshot for Ich9Lpc {
    fn schema(&self) -> Schema {
        SCHEMA
    }

    fn save(&self) -> Result<Payload, SnapshotError> {
        let config = lock(&self.config).save();
        let chipset = lock(&self.chipset.0).clone();
        Payload::encode(SCHEMA, &State { config, pirq_levels: self.pirqs.levels(), chipset })
    }

    fn restore(&self, payload: &Payload) -> Result<(), SnapshotError> {
        let state: State = decode_payload(SCHEMA, payload)?;
        if !self.pirqs.fits(state.pirq_levels) || state.chipset.len() != CHIPSET_LEN {
            let reason = format!("{:#x}, {} bytes", state.pirq_levels, state.chipset.len());
            return Err(SnapshotError::invalid(SCHEMA, "pirq_levels, chipset", reason));
        }
        let mut config = lock(&self.config);
        config.restore(state.config).map_err(|why| SnapshotError::invalid(SCHEMA, "config", why))?;
        *lock(&self.chipset.0) = state.chipset;
        self.pirqs.restore(state.pirq_levels, &routes(&config));
        self.place(&config);
        Ok(())
    }
}
