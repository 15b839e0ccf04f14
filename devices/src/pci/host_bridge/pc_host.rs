//! Host bridges of PCs: what the chips have in common, of which each says where its registers are ([`Chip`]).

use super::config_ports::{self, ConfigPorts};
use super::pc_memory::{
    PAM_BITS, PAM_REGISTERS, PcMemory, PcRegions, SMRAM_BASE_SEGMENT, SMRAM_CLOSED, SMRAM_ENABLE, SMRAM_LOCK,
    SMRAM_OPEN,
};
use crate::pci::bus::{PciBus, PciFunction, PciSlot};
use crate::pci::config_space::{ConfigSpace, ConfigState, PciIds};
use crate::pci::intx::IntxRouter;
use crate::pci::{DevFn, PciError};
use crate::virtio::device::decode_payload;
use mimus_core::bus::AccessSize;
use mimus_core::device::{Lifecycle, ResetPhase, lock};
use mimus_core::irq::{IrqLine, MsiTarget};
use mimus_core::memory::MemoryRegion;
use mimus_core::snapshot::{Payload, Schema, Snapshot, SnapshotError};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

/// What one chip has of its own.
pub trait Chip: Send + Sync + 'static {
    /// Its saved form.
    const SCHEMA: Schema;
    /// What it is.
    const IDS: PciIds;
    /// The first PAM register.
    const PAM0: usize;
    /// SMRAM control.
    const SMRAM: usize;
    /// Registers by which the map of memory changes are from here on.
    const MAP_FROM: usize;
    /// Registers that SMRAM's lock makes read-only beside it, and which of their bits can be written before.
    const LOCKED: &'static [(usize, &'static [u8])];

    /// The PIRQ that a pin of a device on the root bus is on.
    fn pirq(device: u8, pin: u8) -> usize;

    /// Adds its other registers.
    fn add_registers(config: &mut ConfigSpace);

    /// ESMRAMC; 0 if it has none.
    fn esmramc(_config: &ConfigSpace) -> u8 {
        0
    }

    /// Registers that a waking system's firmware counts on beside PAM, with what they are to be.
    fn kept(_config: &ConfigSpace) -> Vec<(usize, Vec<u8>)> {
        Vec::new()
    }

    /// Has its own registers take effect on the memory map, by queued changes.
    fn apply(&self, _config: &ConfigSpace) {}
}

/// A host bridge with its root bus.
pub struct PcHost<C> {
    slot: PciSlot,
    bus: Arc<PciBus>,
    ports: Arc<ConfigPorts>,
    /// Device-level lock.
    config: Mutex<ConfigSpace>,
    regions: PcRegions,
    /// See [`Self::keep_map`].
    keep_map: AtomicBool,
    chip: C,
}

impl<C: Chip> PcHost<C> {
    pub(super) fn build(
        name: &str,
        memory: &PcMemory<'_>,
        pirqs: Vec<IrqLine>,
        msi: Option<MsiTarget>,
        reset: impl Fn() + Send + Sync + 'static,
        chip: impl FnOnce(&Arc<PciBus>) -> C,
    ) -> Result<Arc<Self>, PciError> {
        let bus = PciBus::new(name, memory.system, IntxRouter::with_map(pirqs, C::pirq), msi);
        let slot = bus.reserve(Some(DevFn(0)))?;
        let config = Mutex::new(config_space::<C>(&slot));
        let regions = PcRegions::new(name, memory, &bus);
        let chip = chip(&bus);
        let ports = ConfigPorts::new(&bus, reset);
        map_ports(name, memory, &ports);
        let this = Arc::new(Self { slot, bus, ports, config, regions, keep_map: AtomicBool::new(false), chip });
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

    /// The next reset leaves the segments below 1 MiB as they are: a system wakes through its firmware, which is in RAM
    /// there with its variables, and finds configuration space where it has put it.
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
        self.regions.set_pam(&std::array::from_fn(|n| byte(C::PAM0 + n)));
        self.regions.set_smram(byte(C::SMRAM), C::esmramc(config));
        self.chip.apply(config);
    }
}

fn config_space<C: Chip>(slot: &PciSlot) -> ConfigSpace {
    let mut config = ConfigSpace::new(C::IDS, slot, false);
    C::add_registers(&mut config);
    config.add_register(C::PAM0, &[0; PAM_REGISTERS], &[PAM_BITS; PAM_REGISTERS]);
    config.add_register(C::PAM0, &[0], &[PAM_BITS & 0xf0]);
    let smram = SMRAM_ENABLE | SMRAM_LOCK | SMRAM_CLOSED | SMRAM_OPEN;
    config.add_register(C::SMRAM, &[SMRAM_BASE_SEGMENT], &[smram]);
    config
}

fn map_ports(name: &str, memory: &PcMemory<'_>, ports: &Arc<ConfigPorts>) {
    let region = MemoryRegion::mmio(format!("{name}-config"), config_ports::PORTS, config_ports::RULES);
    if let Some(binding) = region.binding() {
        binding.bind_pio(ports.clone(), 0);
    }
    memory.system.map().change(|t| {
        t.map(memory.io, config_ports::PORT.into(), &region);
    });
}

fn set(config: &mut ConfigSpace, at: usize, bytes: &[u8]) {
    (at..).zip(bytes).for_each(|(at, byte)| config.set_register(at, *byte));
}

impl<C: Chip> PciFunction for PcHost<C> {
    fn config_read(&self, offset: u16, size: AccessSize) -> u32 {
        lock(&self.config).read(offset, size)
    }

    fn config_write(&self, offset: u16, size: AccessSize, value: u32) {
        let mut config = lock(&self.config);
        let smram = config.bytes(C::SMRAM, 1)[0];
        let locked: Vec<_> = C::LOCKED.iter().map(|(at, bits)| (*at, config.bytes(*at, bits.len()).to_vec())).collect();
        config.write(offset, size, value);
        let now = config.bytes(C::SMRAM, 1)[0];
        if smram & SMRAM_LOCK != 0 {
            // "D_LCK: makes all of these registers read-only until a reset."
            config.set_register(C::SMRAM, smram);
            locked.iter().for_each(|(at, bytes)| set(&mut config, *at, bytes));
        } else if now & SMRAM_LOCK != 0 {
            // "When D_LCK is set, D_OPEN is reset to 0."
            config.set_register(C::SMRAM, now & !SMRAM_OPEN);
        }
        if usize::from(offset) >= C::MAP_FROM {
            self.apply(&config);
        }
    }
}

impl<C: Chip> Lifecycle for PcHost<C> {
    fn reset(&self, phase: ResetPhase) {
        let mut config = lock(&self.config);
        match phase {
            ResetPhase::Enter => {
                let mut kept = C::kept(&config);
                kept.push((C::PAM0, config.bytes(C::PAM0, PAM_REGISTERS).to_vec()));
                config.reset();
                if self.keep_map.swap(false, Ordering::Relaxed) {
                    kept.iter().for_each(|(at, bytes)| set(&mut config, *at, bytes));
                }
            }
            ResetPhase::Hold => self.apply(&config),
            ResetPhase::Exit => {}
        }
    }
}

impl<C: Chip> Snapshot for PcHost<C> {
    fn schema(&self) -> Schema {
        C::SCHEMA
    }

    fn save(&self) -> Result<Payload, SnapshotError> {
        Payload::encode(C::SCHEMA, &lock(&self.config).save())
    }

    fn restore(&self, payload: &Payload) -> Result<(), SnapshotError> {
        let state: ConfigState = decode_payload(C::SCHEMA, payload)?;
        let mut config = lock(&self.config);
        config.restore(state).map_err(|why| SnapshotError::invalid(C::SCHEMA, "registers", why))?;
        self.apply(&config);
        Ok(())
    }
}
