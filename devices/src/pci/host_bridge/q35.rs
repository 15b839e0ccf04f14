//! Host bridge of the Q35 chip set (MCH) with its PCI Express root bus.
//!
//! Spec: Intel 3 Series Express Chipset Family (Q35) data sheet, 316966-002, section 5.1.
//! Modelled: PCIEXBAR, PAM, SMRAM and ESMRAMC with their lock, configuration ports.
//! Not modelled: what has no effect in a machine without its timing and graphics: DRAM controller, MCHBAR, DMIBAR,
//! EPBAR, TOUUD (0), remapping. TOLUD, TSEGMB and what belongs to graphics keep what firmware writes, which reads TSEG's
//! place there; RAM's end is what TSEG is below.
//! Checked with: its tests; register sequences of SeaBIOS and OVMF.

use super::config_ports::{self, ConfigPorts};
use super::ecam::{ECAM_BUS_LEN, Ecam};
use super::pc_memory::{
    EXTENDED_TSEG_MIB, PAM_BITS, PAM_REGISTERS, PcMemory, PcRegions, SMRAM_BASE_SEGMENT, SMRAM_CLOSED, SMRAM_ENABLE,
    SMRAM_LOCK, SMRAM_OPEN, TSEG_ENABLE,
};
use crate::pci::bus::{PciBus, PciFunction, PciSlot};
use crate::pci::config_space::{ConfigSpace, ConfigState, PciIds};
use crate::pci::intx::IntxRouter;
use crate::pci::{CHIPSET, DevFn, PciError};
use crate::virtio::device::decode_payload;
use mimus_core::bus::{AccessRules, AccessSize};
use mimus_core::device::{Lifecycle, ResetPhase, lock};
use mimus_core::irq::{IrqLine, MsiTarget};
use mimus_core::memory::{MemoryRegion, RegionHandle};
use mimus_core::snapshot::{Payload, Schema, Snapshot, SnapshotError};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

const SCHEMA: Schema = Schema::new("q35-host", 1);
const IDS: PciIds = PciIds { vendor: 0x8086, device: 0x29c0, revision: 2, class: 0x06_0000, ..CHIPSET };

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
const PAM0: usize = 0x90;
const SMRAM: usize = 0x9d;
const ESMRAMC: usize = 0x9e;

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

/// The wires of the root bus: PIRQA to D for devices 25 to 31, which are the chip set's own; E to H, in turn, for
/// the others, as firmware and operating systems take it.
fn pirq(device: u8, pin: u8) -> usize {
    match device {
        25.. => usize::from(pin) % 4,
        _ => 4 + IntxRouter::wire(device, pin),
    }
}

/// The PIRQ (0 is A) that pin `pin` (0 is INTA) of device `device` is on, for ACPI's tables.
pub fn pirq_of(device: u8, pin: u8) -> usize {
    pirq(device, pin)
}

/// The host bridge.
pub struct Q35 {
    slot: PciSlot,
    bus: Arc<PciBus>,
    ports: Arc<ConfigPorts>,
    /// Device-level lock.
    config: Mutex<ConfigSpace>,
    regions: PcRegions,
    /// See [`Self::keep_map`].
    keep_map: AtomicBool,
    ecam: [RegionHandle; 3],
}

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
        let bus = PciBus::new(name, memory.system, IntxRouter::with_map(pirqs.to_vec(), pirq), msi);
        let slot = bus.reserve(Some(DevFn(0)))?;
        let config = Mutex::new(config_space(&slot));
        let regions = PcRegions::new(name, memory, &bus);
        let ecam = ECAM_LEN.map(|len| {
            let rules = AccessRules::sizes(AccessSize::B1, AccessSize::B4);
            let region = MemoryRegion::mmio(format!("{name}-ecam"), len, rules);
            let handle = RegionHandle::new(memory.system.map(), region, Some(memory.system.root()), 0);
            handle.bind(0, &Arc::new(Ecam::new(&bus)));
            handle
        });
        let ports = ConfigPorts::new(&bus, reset);
        map_ports(name, memory, &ports);
        let this = Arc::new(Self { slot, bus, ports, config, regions, keep_map: AtomicBool::new(false), ecam });
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

    /// The next reset leaves the segments below 1 MiB and PCIEXBAR as they are: a system wakes through its
    /// firmware, which is in RAM there with its variables, and finds configuration space where it has put it.
    pub fn keep_map(&self) {
        self.keep_map.store(true, Ordering::Relaxed);
    }

    /// What CPUs in SMM see on top of memory.
    pub fn smm_overlay(&self) -> &MemoryRegion {
        self.regions.overlay()
    }

    /// Has the registers take effect on the memory map, by queued changes.
    fn apply(&self, config: &ConfigSpace) {
        let byte = |at: usize| config.bytes(at, 1)[0];
        self.regions.set_pam(&std::array::from_fn(|n| byte(PAM0 + n)));
        self.regions.set_smram(byte(SMRAM), byte(ESMRAMC));
        let value = u64::from_le_bytes(config.bytes(PCIEXBAR, 8).try_into().unwrap_or_default());
        let (on, size) = (value & PCIEXBAR_ENABLE != 0, (value >> 1 & 3) as usize);
        for (n, region) in self.ecam.iter().enumerate() {
            match on && n == size {
                // Naturally aligned: lower bits of the base count only where the window is small enough.
                true => region.map(value & !(ECAM_LEN[n] - 1)),
                false => region.unmap(),
            }
        }
    }
}

fn config_space(slot: &PciSlot) -> ConfigSpace {
    let mut config = ConfigSpace::new(IDS, slot, false);
    for (at, writable) in KEPT {
        config.add_register(at, &[0; 4][..writable.len()], writable);
    }
    config.add_register(EXTENDED_TSEG, &EXTENDED_TSEG_MIB.to_le_bytes(), &[0; 2]);
    // Bits 35:26 of the base, length, enable.
    config.add_register(PCIEXBAR, &0xe000_0000_u64.to_le_bytes(), &0xf_fc00_0007_u64.to_le_bytes());
    config.add_register(PAM0, &[0; PAM_REGISTERS], &[PAM_BITS; PAM_REGISTERS]);
    config.add_register(PAM0, &[0], &[PAM_BITS & 0xf0]);
    let smram = SMRAM_ENABLE | SMRAM_LOCK | SMRAM_CLOSED | SMRAM_OPEN;
    config.add_register(SMRAM, &[SMRAM_BASE_SEGMENT], &[smram]);
    config.add_register(ESMRAMC, &[ESMRAMC_FIXED], &[ESMRAMC_TSEG_SIZE | TSEG_ENABLE | 0x80]);
    config
}

/// Maps the configuration ports.
pub(super) fn map_ports(name: &str, memory: &PcMemory<'_>, ports: &Arc<ConfigPorts>) {
    let region = MemoryRegion::mmio(format!("{name}-config"), config_ports::PORTS, config_ports::RULES);
    if let Some(binding) = region.binding() {
        binding.bind_pio(ports.clone(), 0);
    }
    memory.system.map().change(|t| {
        t.map(memory.io, config_ports::PORT.into(), &region);
    });
}

impl PciFunction for Q35 {
    fn config_read(&self, offset: u16, size: AccessSize) -> u32 {
        lock(&self.config).read(offset, size)
    }

    fn config_write(&self, offset: u16, size: AccessSize, value: u32) {
        let mut config = lock(&self.config);
        let (smram, esmramc) = (config.bytes(SMRAM, 1)[0], config.bytes(ESMRAMC, 1)[0]);
        let kept = KEPT.map(|(at, bytes)| config.bytes(at, bytes.len()).to_vec());
        config.write(offset, size, value);
        if smram & SMRAM_LOCK != 0 {
            // "D_LCK: makes all of these registers read-only until a reset."
            config.set_register(SMRAM, smram);
            config.set_register(ESMRAMC, esmramc);
            for ((at, _), bytes) in KEPT.iter().zip(kept) {
                (*at..).zip(bytes).for_each(|(at, byte)| config.set_register(at, byte));
            }
        } else if config.bytes(SMRAM, 1)[0] & SMRAM_LOCK != 0 {
            // "When D_LCK is set, D_OPEN is reset to 0."
            let locked = config.bytes(SMRAM, 1)[0] & !SMRAM_OPEN;
            config.set_register(SMRAM, locked);
        }
        if offset >= PCIEXBAR as u16 - 3 {
            self.apply(&config);
        }
    }
}

impl Lifecycle for Q35 {
    fn reset(&self, phase: ResetPhase) {
        let mut config = lock(&self.config);
        match phase {
            ResetPhase::Enter => {
                let kept = self.keep_map.swap(false, Ordering::Relaxed);
                let pam = config.bytes(PAM0, PAM_REGISTERS).to_vec();
                let ecam: [u8; 8] = config.bytes(PCIEXBAR, 8).try_into().unwrap_or_default();
                config.reset();
                if kept {
                    (PAM0..).zip(pam).for_each(|(at, byte)| config.set_register(at, byte));
                    let ecam = if ecam[0] & PCIEXBAR_ENABLE as u8 != 0 { ecam } else { ECAM_AWAKE.to_le_bytes() };
                    (PCIEXBAR..).zip(ecam).for_each(|(at, byte)| config.set_register(at, byte));
                }
            }
            ResetPhase::Hold => self.apply(&config),
            ResetPhase::Exit => {}
        }
    }
}

impl Snapshot for Q35 {
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
