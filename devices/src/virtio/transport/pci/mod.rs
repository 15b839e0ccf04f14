//! virtio-pci, modern.
//!
//! Spec: VIRTIO 1.2 §4.1. MSI-X with INTx as fallback. Not modelled: the legacy
//! interface and transitional device numbers, shared memory, queue reset, SR-IOV.
//! Checked with: Linux virtio_pci_modern.

mod interrupt;
mod layout;

use crate::pci::bus::{PciFunction, PciSlot};
use crate::pci::config_space::{BarKind, ConfigSpace, ConfigState, PciIds};
use crate::pci::msix::Msix;
use crate::virtio::device::{VirtioDevice, VirtioLink, decode_payload, lock};
use crate::virtio::device_id;
use crate::virtio::registers::{VirtioRegisters, VirtioState, doorbells};
use interrupt::{InterruptState, PciInterrupt};
use layout::{CfgAccess, Part, common};
use mimus_core::bus::{AccessRules, AccessSize, BusFault, MmioAccess};
use mimus_core::device::{BuildError, DeviceContext, DoorbellWrite, Drain, Lifecycle, MmioDevice, ResetPhase};
use mimus_core::io_thread::FdRegistration;
use mimus_core::memory::MemoryRegion;
use mimus_core::snapshot::{Payload, Schema, Snapshot, SnapshotError};
use serde::{Deserialize, Serialize};
use std::sync::{Arc, Mutex, OnceLock};

const VENDOR: u16 = 0x1af4;
/// Device number of type 0 (§4.1.2).
const DEVICE_BASE: u16 = 0x1040;
/// Subsystem number: drivers of modern devices do not look.
const SUBSYSTEM: u16 = 0x1100;
const BAR_MSIX: usize = 1;
const BAR_REGISTERS: usize = 4;
const SCHEMA: Schema = Schema::new("virtio-pci", 1);

/// How a virtio device is put on PCI.
#[derive(Clone, Copy, Debug, Default)]
pub struct VirtioPciOptions {
    /// MSI-X vectors; by default one per queue and one for the configuration. 0 for INTx
    /// only.
    pub vectors: Option<u16>,
}

/// A virtio device as a PCI function.
pub struct VirtioPci {
    slot: PciSlot,
    device: Arc<dyn VirtioDevice>,
    link: Arc<VirtioLink>,
    interrupt: Arc<PciInterrupt>,
    /// Device-level lock; not held together with `config`.
    regs: Mutex<VirtioRegisters>,
    /// Device-level lock.
    config: Mutex<ConfigSpace>,
    /// Offset of the configuration access capability (§4.1.4.9).
    cfg_access: usize,
    /// The BAR of registers.
    region: MemoryRegion,
    /// Notifications that come without the registers.
    doorbells: OnceLock<Vec<FdRegistration>>,
}

/// The saved form of [`VirtioPci`].
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct PciState {
    config: ConfigState,
    interrupt: InterruptState,
    virtio: VirtioState,
}

/// Class code of a device type.
fn class_of(device_id: u32) -> u32 {
    match device_id {
        device_id::NET => 0x02_0000,
        device_id::BLOCK => 0x01_8000,
        device_id::CONSOLE => 0x07_8000,
        _ => 0xff_0000,
    }
}

impl VirtioPci {
    /// `device` in `slot`, plugged.
    pub fn plug(device: Arc<dyn VirtioDevice>, slot: PciSlot, options: VirtioPciOptions) -> Arc<Self> {
        let ids = PciIds {
            vendor: VENDOR,
            device: DEVICE_BASE + device.device_id() as u16,
            revision: 1,
            class: class_of(device.device_id()),
            subsystem_vendor: VENDOR,
            subsystem: SUBSYSTEM,
        };
        let mut config = ConfigSpace::new(ids, &slot, true);
        let queues = device.queue_sizes().len() as u16;
        let vectors = options.vectors.unwrap_or(queues + 1);
        let msix = slot.msi().filter(|_| vectors > 0).map(|msi| Msix::new(vectors, msi, slot.dma_gate().clone()));
        if let Some(m) = &msix {
            config.add_msix(&slot, BAR_MSIX, m, &m.region(format!("{}-msix", device.name())));
        }
        let rules = AccessRules::sizes(AccessSize::B1, AccessSize::B4);
        let region = MemoryRegion::mmio(format!("{}-pci", device.name()), layout::BAR_LEN, rules);
        config.add_bar(&slot, BAR_REGISTERS, BarKind::Memory64 { prefetchable: true }, &region);
        let cfg_access = layout::add_capabilities(&mut config, BAR_REGISTERS as u8);
        let interrupt = PciInterrupt::new(msix, config.intx().clone(), queues);
        let regs = VirtioRegisters::new(device.clone(), slot.dma(), interrupt.clone());
        let (link, regs) = (regs.link().clone(), Mutex::new(regs));
        let (config, doorbells) = (Mutex::new(config), OnceLock::new());
        let this = Arc::new(Self { slot, device, link, interrupt, regs, config, cfg_access, region, doorbells });
        if let Some(binding) = this.region.binding() {
            binding.bind_mmio(this.clone(), 0);
        }
        this.slot.plug(this.clone());
        this
    }

    /// Has notifications come on the I/O thread where the accelerator can do that. Before a driver maps the BARs.
    pub fn add_doorbells(&self, ctx: &DeviceContext<'_>) -> Result<(), BuildError> {
        // §4.1.4.4: drivers write 16 bits, or 32 with more than the queue's number in them.
        let at = |queue: u16| DoorbellWrite { offset: layout::notify_offset(queue), size: None, value: None };
        let _ = self.doorbells.set(doorbells((&self.device, &self.link), ctx, &self.region, at)?);
        Ok(())
    }

    /// The device behind the registers.
    pub fn device(&self) -> &Arc<dyn VirtioDevice> {
        &self.device
    }

    /// Where it is plugged.
    pub fn slot(&self) -> &PciSlot {
        &self.slot
    }

    fn read_bar(&self, offset: u64, size: AccessSize) -> u64 {
        match Part::of(offset) {
            Some((Part::Common, at)) => self.read_common(at, size),
            Some((Part::Isr, 0)) => self.interrupt.take_isr().into(),
            Some((Part::Device, at)) => lock(&self.regs).config_read_value(at, size.bytes()),
            _ => 0,
        }
    }

    fn write_bar(&self, offset: u64, size: AccessSize, value: u64) {
        match Part::of(offset) {
            Some((Part::Common, at)) => self.write_common(at, size, value),
            Some((Part::Device, at)) => lock(&self.regs).config_write_value(at, size.bytes(), value),
            // Past the register lock: devices lock their own queues.
            Some((Part::Notify, at)) => self.link.notify(&*self.device, (at / layout::NOTIFY_MULTIPLIER) as u16),
            _ => {}
        }
    }

    /// All of §4.1.4.3 at once: reads have no effects.
    fn read_common(&self, at: u64, size: AccessSize) -> u64 {
        let regs = lock(&self.regs);
        let (q, select) = (regs.queue_state(), regs.queue_select);
        let exists = select < regs.link().queue_count();
        let mut image = [0; common::LEN + 8];
        let mut put = |at: u64, bytes: &[u8]| image[at as usize..at as usize + bytes.len()].copy_from_slice(bytes);
        put(common::DEVICE_FEATURE_SELECT, &regs.device_feature_select.to_le_bytes());
        put(common::DEVICE_FEATURE, &regs.device_features().to_le_bytes());
        put(common::DRIVER_FEATURE_SELECT, &regs.driver_feature_select.to_le_bytes());
        put(common::DRIVER_FEATURE, &regs.driver_features().to_le_bytes());
        put(common::CONFIG_MSIX_VECTOR, &self.interrupt.config_vector().to_le_bytes());
        put(common::NUM_QUEUES, &regs.link().queue_count().to_le_bytes());
        put(common::DEVICE_STATUS, &[regs.status()]);
        put(common::CONFIG_GENERATION, &[regs.link().config_generation() as u8]);
        put(common::QUEUE_SELECT, &select.to_le_bytes());
        put(common::QUEUE_SIZE, &q.size.to_le_bytes());
        put(common::QUEUE_MSIX_VECTOR, &self.interrupt.queue_vector(select).to_le_bytes());
        put(common::QUEUE_ENABLE, &u16::from(q.ready).to_le_bytes());
        put(common::QUEUE_NOTIFY_OFF, &(if exists { select } else { 0 }).to_le_bytes());
        put(common::QUEUE_DESC, &q.desc.to_le_bytes());
        put(common::QUEUE_DRIVER, &q.avail.to_le_bytes());
        put(common::QUEUE_DEVICE, &q.used.to_le_bytes());
        let at = (at as usize).min(common::LEN);
        let bytes = image[at..].first_chunk().copied().unwrap_or_default();
        u64::from_le_bytes(bytes) & size.mask()
    }

    fn write_common(&self, at: u64, size: AccessSize, value: u64) {
        let mut regs = lock(&self.regs);
        let (v32, v16) = (value as u32, value as u16);
        match (at, size) {
            (common::DEVICE_FEATURE_SELECT, AccessSize::B4) => regs.device_feature_select = v32,
            (common::DRIVER_FEATURE_SELECT, AccessSize::B4) => regs.driver_feature_select = v32,
            (common::DRIVER_FEATURE, AccessSize::B4) => regs.set_driver_features(v32),
            (common::CONFIG_MSIX_VECTOR, AccessSize::B2) => self.interrupt.set_config_vector(v16),
            (common::DEVICE_STATUS, AccessSize::B1) => {
                regs.set_status(value as u8);
                if value as u8 == 0 {
                    self.interrupt.reset();
                }
            }
            (common::QUEUE_SELECT, AccessSize::B2) => regs.queue_select = v16,
            (common::QUEUE_SIZE, AccessSize::B2) => regs.configure_queue(|q| q.size = v16),
            (common::QUEUE_MSIX_VECTOR, AccessSize::B2) => self.interrupt.set_queue_vector(regs.queue_select, v16),
            // §4.1.4.3.2: a driver writes 1 only; disabling is a reset.
            (common::QUEUE_ENABLE, AccessSize::B2) if v16 == 1 => regs.set_queue_ready(true),
            (common::QUEUE_DESC..common::END_OF_RINGS, AccessSize::B4) => {
                regs.configure_queue(|q| layout::set_ring_address(q, at, v32));
            }
            _ => log::debug!("virtio-pci: {} byte write of common register {at:#x} is ignored", size.bytes()),
        }
    }

    /// The access that the configuration access capability describes now.
    fn cfg_target(&self) -> Option<CfgAccess> {
        CfgAccess::parse(lock(&self.config).bytes(self.cfg_access, layout::CFG_ACCESS_LEN), BAR_REGISTERS as u8)
    }

    fn is_cfg_data(&self, offset: u16) -> bool {
        usize::from(offset) == self.cfg_access + layout::CFG_DATA
    }
}

impl PciFunction for VirtioPci {
    fn config_read(&self, offset: u16, size: AccessSize) -> u32 {
        if self.is_cfg_data(offset) {
            return self.cfg_target().map_or(0, |t| self.read_bar(t.offset, t.size) as u32);
        }
        lock(&self.config).read(offset, size)
    }

    fn bar_lens(&self) -> [u64; 6] {
        lock(&self.config).bar_lens()
    }
    fn config_write(&self, offset: u16, size: AccessSize, value: u32) {
        lock(&self.config).write(offset, size, value);
        if self.is_cfg_data(offset)
            && let Some(t) = self.cfg_target()
        {
            self.write_bar(t.offset, t.size, u64::from(value) & t.size.mask());
        }
    }
}

impl MmioDevice for VirtioPci {
    fn mmio_read(&self, a: MmioAccess) -> Result<u64, BusFault> {
        Ok(self.read_bar(a.offset, a.size))
    }
    fn mmio_write(&self, a: MmioAccess, value: u64) -> Result<(), BusFault> {
        self.write_bar(a.offset, a.size, value);
        Ok(())
    }
}

impl Lifecycle for VirtioPci {
    fn reset(&self, phase: ResetPhase) {
        match phase {
            ResetPhase::Enter => lock(&self.regs).reset(),
            ResetPhase::Hold => {
                self.interrupt.reset();
                lock(&self.config).reset();
                self.slot.apply_map_changes();
            }
            ResetPhase::Exit => {}
        }
    }
    fn start(&self) {
        self.interrupt.start();
        lock(&self.regs).start();
    }
    fn stop(&self, drain: &Drain) {
        lock(&self.regs).stop(drain);
        self.interrupt.stop();
    }
}

impl Snapshot for VirtioPci {
    fn schema(&self) -> Schema {
        SCHEMA
    }
    fn save(&self) -> Result<Payload, SnapshotError> {
        let config = lock(&self.config).save();
        let interrupt = self.interrupt.save();
        let virtio = lock(&self.regs).save()?;
        Payload::encode(SCHEMA, &PciState { config, interrupt, virtio })
    }
    fn restore(&self, payload: &Payload) -> Result<(), SnapshotError> {
        let invalid = |field, why: &str| SnapshotError::invalid(SCHEMA, field, why);
        let state: PciState = decode_payload(SCHEMA, payload)?;
        lock(&self.regs).restore(SCHEMA, state.virtio)?;
        if !self.interrupt.restore(state.interrupt) {
            return Err(invalid("interrupt", "another number of queues"));
        }
        lock(&self.config).restore(state.config).map_err(|why| invalid("config", why))?;
        self.slot.apply_map_changes();
        Ok(())
    }
}
