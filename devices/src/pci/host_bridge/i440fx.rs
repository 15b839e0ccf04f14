//! Host bridge of the 440FX chip set (PMC) with its PCI root bus.
//!
//! Spec: Intel 440FX PCIset data sheet, 290549-001, section 3.2.
//! Modelled: PAM, SMRAM with its lock, configuration ports.
//! Not modelled: DRAM controller: its registers keep what firmware writes.
//! Checked with: its tests; register sequences of SeaBIOS.

use super::config_ports::ConfigPorts;
use super::pc_memory::{
    PAM_BITS, PAM_REGISTERS, PcMemory, PcRegions, SMRAM_BASE_SEGMENT, SMRAM_CLOSED, SMRAM_ENABLE, SMRAM_LOCK,
    SMRAM_OPEN,
};
use super::q35::map_ports;
use crate::pci::bus::{PciBus, PciFunction, PciSlot};
use crate::pci::config_space::{ConfigSpace, ConfigState, PciIds};
use crate::pci::intx::IntxRouter;
use crate::pci::{CHIPSET, DevFn, PciError};
use crate::virtio::device::decode_payload;
use mimus_core::bus::AccessSize;
use mimus_core::device::{Lifecycle, ResetPhase, lock};
use mimus_core::irq::{IrqLine, MsiTarget};
use mimus_core::memory::MemoryRegion;
use mimus_core::snapshot::{Payload, Schema, Snapshot, SnapshotError};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

const SCHEMA: Schema = Schema::new("i440fx-host", 1);
const IDS: PciIds = PciIds { vendor: 0x8086, device: 0x1237, revision: 2, class: 0x06_0000, ..CHIPSET };

/// Configuration and DRAM timing, which keep what is written: PMCCFG to DRAMT, and DRAM row boundaries.
const DRAM: std::ops::Range<usize> = 0x50..0x59;
const DRAM_ROWS: std::ops::Range<usize> = 0x60..0x68;
const PAM0: usize = 0x59;
const SMRAM: usize = 0x72;

/// The wires of the root bus, as firmware and operating systems take it: in turn, from device 1 on.
fn pirq(device: u8, pin: u8) -> usize {
    IntxRouter::wire(device.wrapping_sub(1), pin)
}

/// The PIRQ (0 is A) that pin `pin` (0 is INTA) of device `device` is on, for ACPI's tables.
pub fn pirq_of(device: u8, pin: u8) -> usize {
    pirq(device, pin)
}

/// The host bridge.
pub struct I440fx {
    slot: PciSlot,
    bus: Arc<PciBus>,
    ports: Arc<ConfigPorts>,
    /// Device-level lock.
    config: Mutex<ConfigSpace>,
    regions: PcRegions,
    /// See [`Self::keep_map`].
    keep_map: AtomicBool,
}

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
        let bus = PciBus::new(name, memory.system, IntxRouter::with_map(pirqs.to_vec(), pirq), msi);
        let slot = bus.reserve(Some(DevFn(0)))?;
        let config = Mutex::new(config_space(&slot));
        let regions = PcRegions::new(name, memory, &bus);
        let ports = ConfigPorts::new(&bus, reset);
        map_ports(name, memory, &ports);
        let this = Arc::new(Self { slot, bus, ports, config, regions, keep_map: AtomicBool::new(false) });
        this.slot.plug(this.clone());
        Ok(this)
    }

    /// The root bus.
    pub fn bus(&self) -> &Arc<PciBus> {
        &self.bus
    }

    /// Configuration ports and reset control: a device to be reset and saved.
    pub fn ports(&self) -> &Arc<ConfigPorts> {
        &self.ports
    }

    /// The next reset leaves the segments below 1 MiB as they are: a system wakes through its
    /// firmware, which is in RAM there with its variables.
    pub fn keep_map(&self) {
        self.keep_map.store(true, Ordering::Relaxed);
    }

    /// What CPUs in SMM see on top of memory.
    pub fn smm_overlay(&self) -> &MemoryRegion {
        self.regions.overlay()
    }

    fn apply(&self, config: &ConfigSpace) {
        let byte = |at: usize| config.bytes(at, 1)[0];
        self.regions.set_pam(&std::array::from_fn(|n| byte(PAM0 + n)));
        self.regions.set_smram(byte(SMRAM), 0);
    }
}

fn config_space(slot: &PciSlot) -> ConfigSpace {
    let mut config = ConfigSpace::new(IDS, slot, false);
    for range in [DRAM, DRAM_ROWS] {
        config.add_register(range.start, &vec![0; range.len()], &vec![0xff; range.len()]);
    }
    config.add_register(PAM0, &[0; PAM_REGISTERS], &[PAM_BITS; PAM_REGISTERS]);
    config.add_register(PAM0, &[0], &[PAM_BITS & 0xf0]);
    let smram = SMRAM_ENABLE | SMRAM_LOCK | SMRAM_CLOSED | SMRAM_OPEN;
    config.add_register(SMRAM, &[SMRAM_BASE_SEGMENT], &[smram]);
    config
}

impl PciFunction for I440fx {
    fn config_read(&self, offset: u16, size: AccessSize) -> u32 {
        lock(&self.config).read(offset, size)
    }

    fn config_write(&self, offset: u16, size: AccessSize, value: u32) {
        let mut config = lock(&self.config);
        let smram = config.bytes(SMRAM, 1)[0];
        config.write(offset, size, value);
        if smram & SMRAM_LOCK != 0 {
            // "DLCK: SMRAM is read-only until a reset."
            config.set_register(SMRAM, smram);
        } else if config.bytes(SMRAM, 1)[0] & SMRAM_LOCK != 0 {
            let locked = config.bytes(SMRAM, 1)[0] & !SMRAM_OPEN;
            config.set_register(SMRAM, locked);
        }
        if offset >= DRAM.start as u16 {
            self.apply(&config);
        }
    }
}

impl Lifecycle for I440fx {
    fn reset(&self, phase: ResetPhase) {
        let mut config = lock(&self.config);
        match phase {
            ResetPhase::Enter => {
                let kept = self.keep_map.swap(false, Ordering::Relaxed);
                let pam = if kept { config.bytes(PAM0, PAM_REGISTERS).to_vec() } else { Vec::new() };
                config.reset();
                (PAM0..).zip(pam).for_each(|(at, byte)| config.set_register(at, byte));
            }
            ResetPhase::Hold => self.apply(&config),
            ResetPhase::Exit => {}
        }
    }
}

impl Snapshot for I440fx {
    fn schema(&self) -> Schema {
        SCHEMA
    }

    fn save(&self) -> Result<Payload, SnapshotError> {
        Payload::encode(SCHEMA, &lock(&self.config).save())
    }

    fn restore(&self, payload: &Payload) -> Result<(), SnapshotError> {
        let state: ConfigState = decode_payload(SCHEMA, payload)?;
        let mut config = lock(&self.config);
        config.restore(state).map_err(|why| SnapshotError::invalid(SCHEMA, "registers", why))?;
        self.apply(&config);
        Ok(())
    }
}
