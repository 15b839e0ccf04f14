//! PIIX: the ISA bridge of the PIIX3, and the power management function of the PIIX4, which boards of the 440FX have
//! beside it.
//!
//! Spec: Intel 82371SB (PIIX3) data sheet, 290550-002, section 2.2; 82371AB (PIIX4) data sheet, 290562-001, section 7.1.
//! Modelled: PIRQA to D; PMBASE with its enable. The reset control register is among the host bridge's ports.
//! Not modelled: what has no effect without its ISA bus: timing, decodes, DMA requests (they keep what is written);
//! the PIIX4's device monitors, SMBus and SCI routing (IRQ 9).
//! Checked with: its tests; register sequences of SeaBIOS and Linux.

use super::pirq::{PirqRouter, ROUTE_BITS, ROUTE_DISABLED};
use super::{place, pm_region};
use crate::acpi::pm::AcpiPm;
use crate::pci::bus::{PciBus, PciFunction, PciSlot};
use crate::pci::config_space::{ConfigSpace, ConfigState, PciIds};
use crate::pci::{CHIPSET, DevFn, PciError};
use crate::virtio::device::decode_payload;
use mimus_core::bus::AccessSize;
use mimus_core::device::{Lifecycle, ResetPhase, lock};
use mimus_core::memory::RegionHandle;
use mimus_core::snapshot::{Payload, Schema, Snapshot, SnapshotError};
use serde::{Deserialize, Serialize};
use std::sync::{Arc, Mutex};

/// Number of PIRQs.
pub const PIRQS: usize = 4;
/// Where the ISA bridge is on the root bus.
pub const ISA: DevFn = DevFn(1 << 3);
/// Where the power management function is.
pub const POWER: DevFn = DevFn(1 << 3 | 3);
/// First of the ports that general-purpose events are at.
pub const GPE_PORT: u16 = 0xafe0;

const ISA_SCHEMA: Schema = Schema::new("piix3", 1);
const ISA_IDS: PciIds = PciIds { vendor: 0x8086, device: 0x7000, revision: 0, class: 0x06_0100, ..CHIPSET };
const PIRQ_A: usize = 0x60;

/// Registers that keep what is written, with their reset values: I/O recovery, X-bus select, memory top,
/// motherboard interrupts, DMA.
const PLAIN: [(usize, &[u8], &[u8]); 6] = [
    (0x4c, &[0x4d], &[0xff]),
    (0x4e, &[0x03, 0x00], &[0xff, 0x01]),
    (0x69, &[0x02], &[0xfe]),
    (0x70, &[0x80], &[0xaf]),
    (0x76, &[0x0c, 0x0c], &[0x8f, 0x8f]),
    (0x78, &[0x02, 0x00], &[0xff, 0xff]),
];

/// The ISA bridge, as saved.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct IsaState {
    config: ConfigState,
    /// Levels of PIRQA and so on.
    pirq_levels: u32,
}

/// The PIIX3's ISA bridge, function 0 of device 1.
pub struct Piix3 {
    slot: PciSlot,
    /// Device-level lock.
    config: Mutex<ConfigSpace>,
    pirqs: Arc<PirqRouter>,
}

impl Piix3 {
    /// The bridge on `bus`, programming `pirqs` (of [`PIRQS`] inputs).
    pub fn new(bus: &Arc<PciBus>, pirqs: &Arc<PirqRouter>) -> Result<Arc<Self>, PciError> {
        let slot = bus.reserve(Some(ISA))?;
        let mut config = ConfigSpace::new(ISA_IDS, &slot, false);
        config.add_register(PIRQ_A, &[ROUTE_DISABLED; PIRQS], &[ROUTE_BITS; PIRQS]);
        for (at, reset, writable) in PLAIN {
            config.add_register(at, reset, writable);
        }
        let this = Arc::new(Self { slot, config: Mutex::new(config), pirqs: pirqs.clone() });
        this.slot.plug(this.clone());
        Ok(this)
    }
}

impl PciFunction for Piix3 {
    fn config_read(&self, offset: u16, size: AccessSize) -> u32 {
        lock(&self.config).read(offset, size)
    }

    fn config_write(&self, offset: u16, size: AccessSize, value: u32) {
        let mut config = lock(&self.config);
        config.write(offset, size, value);
        self.pirqs.set_routes(config.bytes(PIRQ_A, PIRQS));
    }
}

impl Lifecycle for Piix3 {
    fn reset(&self, phase: ResetPhase) {
        let mut config = lock(&self.config);
        match phase {
            ResetPhase::Enter => config.reset(),
            ResetPhase::Hold => self.pirqs.set_routes(config.bytes(PIRQ_A, PIRQS)),
            ResetPhase::Exit => {}
        }
    }
}

impl Snapshot for Piix3 {
    fn schema(&self) -> Schema {
        ISA_SCHEMA
    }

    fn save(&self) -> Result<Payload, SnapshotError> {
        let config = lock(&self.config).save();
        Payload::encode(ISA_SCHEMA, &IsaState { config, pirq_levels: self.pirqs.levels() })
    }

    fn restore(&self, payload: &Payload) -> Result<(), SnapshotError> {
        let state: IsaState = decode_payload(ISA_SCHEMA, payload)?;
        if !self.pirqs.fits(state.pirq_levels) {
            return Err(SnapshotError::invalid(ISA_SCHEMA, "pirq_levels", format!("{:#x}", state.pirq_levels)));
        }
        let mut config = lock(&self.config);
        config.restore(state.config).map_err(|why| SnapshotError::invalid(ISA_SCHEMA, "config", why))?;
        self.pirqs.restore(state.pirq_levels, config.bytes(PIRQ_A, PIRQS));
        Ok(())
    }
}

const POWER_SCHEMA: Schema = Schema::new("piix4-pm", 1);
const POWER_IDS: PciIds = PciIds { vendor: 0x8086, device: 0x7113, revision: 3, class: 0x06_8000, ..CHIPSET };
const PMBA: usize = 0x40;
const DEVACTB: usize = 0x58;
const PMREGMISC: usize = 0x80;
const PMIOSE: u8 = 1;
/// APMC_EN: writes of the APM control port are system management interrupts.
const APMC_ENABLE: u32 = 1 << 25;

/// The PIIX4's power management, function 3 of device 1.
pub struct Piix4Pm {
    slot: PciSlot,
    /// Device-level lock.
    config: Mutex<ConfigSpace>,
    block: Arc<Mutex<AcpiPm>>,
    pm: RegionHandle,
}

impl Piix4Pm {
    /// The function on `bus`, giving `pm` its place among the ports. `smm`: there is system management mode; without
    /// it, firmware is told that it is set up already, so that it does not try.
    pub fn new(bus: &Arc<PciBus>, pm: &Arc<Mutex<AcpiPm>>, smm: bool) -> Result<Arc<Self>, PciError> {
        let slot = bus.reserve(Some(POWER))?;
        let mut config = ConfigSpace::new(POWER_IDS, &slot, true);
        // Bit 0 says that it is an address of ports.
        config.add_register(PMBA, &[1, 0, 0, 0], &[0xc0, 0xff, 0, 0]);
        let apmc = if smm { 0 } else { APMC_ENABLE };
        config.add_register(DEVACTB, &apmc.to_le_bytes(), &[0xff; 4]);
        config.add_register(PMREGMISC, &[0], &[PMIOSE]);
        let len = lock(pm).block_len();
        let region = pm_region("piix4-pm", &slot, pm, len);
        let this = Arc::new(Self { slot, config: Mutex::new(config), block: pm.clone(), pm: region });
        this.slot.plug(this.clone());
        Ok(this)
    }

    /// Has the registers take effect; map changes are queued.
    fn apply(&self, config: &ConfigSpace) {
        let apm_smi = u32::from_le_bytes(config.bytes(DEVACTB, 4).try_into().unwrap_or_default()) & APMC_ENABLE;
        lock(&self.block).set_apm_smi(apm_smi != 0);
        let base = u16::from_le_bytes(config.bytes(PMBA, 2).try_into().unwrap_or_default()) & 0xffc0;
        place(&self.pm, (config.bytes(PMREGMISC, 1)[0] & PMIOSE != 0).then(|| base.into()));
    }
}

impl PciFunction for Piix4Pm {
    fn config_read(&self, offset: u16, size: AccessSize) -> u32 {
        lock(&self.config).read(offset, size)
    }

    fn config_write(&self, offset: u16, size: AccessSize, value: u32) {
        let mut config = lock(&self.config);
        config.write(offset, size, value);
        self.apply(&config);
    }
}

impl Lifecycle for Piix4Pm {
    fn reset(&self, phase: ResetPhase) {
        let mut config = lock(&self.config);
        match phase {
            ResetPhase::Enter => config.reset(),
            ResetPhase::Hold => self.apply(&config),
            ResetPhase::Exit => {}
        }
    }
}

impl Snapshot for Piix4Pm {
    fn schema(&self) -> Schema {
        POWER_SCHEMA
    }

    fn save(&self) -> Result<Payload, SnapshotError> {
        Payload::encode(POWER_SCHEMA, &lock(&self.config).save())
    }

    fn restore(&self, payload: &Payload) -> Result<(), SnapshotError> {
        let state: ConfigState = decode_payload(POWER_SCHEMA, payload)?;
        let mut config = lock(&self.config);
        config.restore(state).map_err(|why| SnapshotError::invalid(POWER_SCHEMA, "registers", why))?;
        self.apply(&config);
        Ok(())
    }
}
