//! virtio-mmio, version 2.
//!
//! Spec: VIRTIO 1.2 §4.2. Not modelled: version 1 ("legacy") registers, shared memory
//! regions, queue reset. Checked with: Linux virtio_mmio.

use crate::virtio::device::{VirtioDevice, VirtioInterrupt, VirtioLink, decode_payload, lock};
use crate::virtio::queue::QueueState;
use crate::virtio::registers::{VirtioRegisters, VirtioState, doorbells};
use mimus_core::bus::{AccessRules, AccessSize, BusFault, MmioAccess};
use mimus_core::device::{BuildError, DeviceContext, DoorbellWrite, Drain, Lifecycle, MmioDevice, ResetPhase};
use mimus_core::io_thread::FdRegistration;
use mimus_core::irq::IrqLine;
use mimus_core::memory::{DmaHandle, MemoryRegion};
use mimus_core::snapshot::{Payload, Schema, Snapshot, SnapshotError};
use serde::{Deserialize, Serialize};
use std::sync::{Arc, Mutex, OnceLock};

/// Bytes of registers and configuration space; boards place slots this far apart or more.
pub const REGION_LEN: u64 = 0x200;

/// Widths the registers take.
pub const ACCESS_RULES: AccessRules = AccessRules::sizes(AccessSize::B1, AccessSize::B4);

const MAGIC: u32 = u32::from_le_bytes(*b"virt");
const VERSION: u32 = 2;
const VENDOR: u32 = u32::from_le_bytes(*b"MIMU");

/// Register offsets (§4.2.2).
mod reg {
    pub const MAGIC_VALUE: u64 = 0x000;
    pub const VERSION: u64 = 0x004;
    pub const DEVICE_ID: u64 = 0x008;
    pub const VENDOR_ID: u64 = 0x00c;
    pub const DEVICE_FEATURES: u64 = 0x010;
    pub const DEVICE_FEATURES_SEL: u64 = 0x014;
    pub const DRIVER_FEATURES: u64 = 0x020;
    pub const DRIVER_FEATURES_SEL: u64 = 0x024;
    pub const QUEUE_SEL: u64 = 0x030;
    pub const QUEUE_NUM_MAX: u64 = 0x034;
    pub const QUEUE_NUM: u64 = 0x038;
    pub const QUEUE_READY: u64 = 0x044;
    pub const QUEUE_NOTIFY: u64 = 0x050;
    pub const INTERRUPT_STATUS: u64 = 0x060;
    pub const INTERRUPT_ACK: u64 = 0x064;
    pub const STATUS: u64 = 0x070;
    pub const QUEUE_DESC_LOW: u64 = 0x080;
    pub const QUEUE_DESC_HIGH: u64 = 0x084;
    pub const QUEUE_DRIVER_LOW: u64 = 0x090;
    pub const QUEUE_DRIVER_HIGH: u64 = 0x094;
    pub const QUEUE_DEVICE_LOW: u64 = 0x0a0;
    pub const QUEUE_DEVICE_HIGH: u64 = 0x0a4;
    pub const SHM_LEN_LOW: u64 = 0x0b0;
    pub const SHM_BASE_HIGH: u64 = 0x0bc;
    pub const CONFIG_GENERATION: u64 = 0x0fc;
    pub const CONFIG: u64 = 0x100;
}

/// Interrupt status: a buffer was used.
const INT_VRING: u8 = 1;
/// Interrupt status: the configuration changed.
const INT_CONFIG: u8 = 2;

/// The interrupt status register and the line it drives.
struct MmioInterrupt {
    /// Leaf lock: keeps status and line together.
    status: Mutex<u8>,
    line: IrqLine,
}

impl MmioInterrupt {
    fn change(&self, f: impl FnOnce(u8) -> u8) {
        let mut status = lock(&self.status);
        *status = f(*status);
        self.line.set_level(*status != 0);
    }
}

impl VirtioInterrupt for MmioInterrupt {
    fn queue(&self, _queue: u16) {
        self.change(|s| s | INT_VRING);
    }
    fn config(&self) {
        self.change(|s| s | INT_CONFIG);
    }
}

/// A virtio device behind memory-mapped registers.
pub struct VirtioMmio {
    device: Arc<dyn VirtioDevice>,
    link: Arc<VirtioLink>,
    interrupt: Arc<MmioInterrupt>,
    /// Device-level lock.
    regs: Mutex<VirtioRegisters>,
    /// Notifications that come without the registers.
    doorbells: OnceLock<Vec<FdRegistration>>,
}

/// The saved form of [`VirtioMmio`].
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct MmioState {
    interrupt_status: u8,
    virtio: VirtioState,
}

const SCHEMA: Schema = Schema::new("virtio-mmio", 1);

impl VirtioMmio {
    /// `device` with memory through `dma` and its interrupt on `line`.
    pub fn new(device: Arc<dyn VirtioDevice>, dma: DmaHandle, line: IrqLine) -> Arc<Self> {
        let interrupt = Arc::new(MmioInterrupt { status: Mutex::new(0), line });
        let regs = VirtioRegisters::new(device.clone(), dma, interrupt.clone());
        let link = regs.link().clone();
        Arc::new(Self { device, link, interrupt, regs: Mutex::new(regs), doorbells: OnceLock::new() })
    }

    /// Has notifications come on the I/O thread where the accelerator can do that. Before `region` is mapped.
    pub fn add_doorbells(&self, ctx: &DeviceContext<'_>, region: &MemoryRegion) -> Result<(), BuildError> {
        let at = |queue: u16| DoorbellWrite {
            offset: reg::QUEUE_NOTIFY,
            size: Some(AccessSize::B4),
            value: Some(queue.into()),
        };
        let _ = self.doorbells.set(doorbells((&self.device, &self.link), ctx, region, at)?);
        Ok(())
    }

    /// The same with a region bound to it, for the board to map.
    pub fn with_region(device: Arc<dyn VirtioDevice>, dma: DmaHandle, line: IrqLine) -> (Arc<Self>, MemoryRegion) {
        let region = MemoryRegion::mmio(device.name(), REGION_LEN, ACCESS_RULES);
        let this = Self::new(device, dma, line);
        if let Some(binding) = region.binding() {
            binding.bind_mmio(this.clone(), 0);
        }
        (this, region)
    }

    /// The device behind the registers.
    pub fn device(&self) -> &Arc<dyn VirtioDevice> {
        &self.device
    }

    fn read_register(&self, offset: u64) -> u32 {
        let regs = lock(&self.regs);
        match offset {
            reg::MAGIC_VALUE => MAGIC,
            reg::VERSION => VERSION,
            reg::DEVICE_ID => self.device.device_id(),
            reg::VENDOR_ID => VENDOR,
            reg::DEVICE_FEATURES => regs.device_features(),
            reg::QUEUE_NUM_MAX => regs.queue_max_size().into(),
            reg::QUEUE_READY => regs.queue_state().ready.into(),
            reg::INTERRUPT_STATUS => (*lock(&self.interrupt.status)).into(),
            reg::STATUS => regs.status().into(),
            // No shared memory: length and base are all ones (§4.2.2).
            reg::SHM_LEN_LOW..=reg::SHM_BASE_HIGH => u32::MAX,
            reg::CONFIG_GENERATION => regs.link().config_generation(),
            _ => 0,
        }
    }

    fn write_register(&self, offset: u64, value: u32) {
        if offset == reg::QUEUE_NOTIFY {
            // Past the register lock: devices lock their own queues.
            if let Ok(queue) = u16::try_from(value) {
                self.link.notify(&*self.device, queue);
            }
            return;
        }
        let mut regs = lock(&self.regs);
        match offset {
            reg::DEVICE_FEATURES_SEL => regs.device_feature_select = value,
            reg::DRIVER_FEATURES => regs.set_driver_features(value),
            reg::DRIVER_FEATURES_SEL => regs.driver_feature_select = value,
            reg::QUEUE_SEL => regs.queue_select = u16::try_from(value).unwrap_or(u16::MAX),
            reg::QUEUE_NUM => {
                let size = u16::try_from(value).unwrap_or(0);
                regs.configure_queue(|q| q.size = size);
            }
            reg::QUEUE_READY => regs.set_queue_ready(value & 1 != 0),
            reg::INTERRUPT_ACK => self.interrupt.change(|s| s & !(value as u8)),
            reg::STATUS => {
                regs.set_status(value as u8);
                if value as u8 == 0 {
                    self.interrupt.change(|_| 0);
                }
            }
            reg::QUEUE_DESC_LOW..=reg::QUEUE_DEVICE_HIGH => {
                regs.configure_queue(|q| set_ring_address(q, offset, value));
            }
            _ => log::debug!("virtio-mmio: write of {value:#x} to register {offset:#x} is ignored"),
        }
    }
}

fn set_ring_address(q: &mut QueueState, offset: u64, value: u32) {
    let low = |a: &mut u64| *a = *a & !0xffff_ffff | u64::from(value);
    let high = |a: &mut u64| *a = *a & 0xffff_ffff | u64::from(value) << 32;
    match offset {
        reg::QUEUE_DESC_LOW => low(&mut q.desc),
        reg::QUEUE_DESC_HIGH => high(&mut q.desc),
        reg::QUEUE_DRIVER_LOW => low(&mut q.avail),
        reg::QUEUE_DRIVER_HIGH => high(&mut q.avail),
        reg::QUEUE_DEVICE_LOW => low(&mut q.used),
        reg::QUEUE_DEVICE_HIGH => high(&mut q.used),
        _ => {}
    }
}

impl MmioDevice for VirtioMmio {
    fn mmio_read(&self, a: MmioAccess) -> Result<u64, BusFault> {
        if a.offset >= reg::CONFIG {
            return Ok(lock(&self.regs).config_read_value(a.offset - reg::CONFIG, a.size.bytes()));
        }
        // §4.2.2.2: registers are 32 bits wide and accessed as such.
        if a.size != AccessSize::B4 {
            log::debug!("virtio-mmio: {} byte read of register {:#x}", a.size.bytes(), a.offset);
            return Ok(0);
        }
        Ok(self.read_register(a.offset).into())
    }

    fn mmio_write(&self, a: MmioAccess, value: u64) -> Result<(), BusFault> {
        if a.offset >= reg::CONFIG {
            lock(&self.regs).config_write_value(a.offset - reg::CONFIG, a.size.bytes(), value);
        } else if a.size == AccessSize::B4 {
            self.write_register(a.offset, value as u32);
        } else {
            log::debug!("virtio-mmio: {} byte write of register {:#x}", a.size.bytes(), a.offset);
        }
        Ok(())
    }
}

impl Lifecycle for VirtioMmio {
    fn reset(&self, phase: ResetPhase) {
        match phase {
            ResetPhase::Enter => lock(&self.regs).reset(),
            ResetPhase::Hold => self.interrupt.change(|_| 0),
            ResetPhase::Exit => {}
        }
    }
    fn start(&self) {
        lock(&self.regs).start();
    }
    fn stop(&self, drain: &Drain) {
        lock(&self.regs).stop(drain);
    }
}

impl Snapshot for VirtioMmio {
    fn schema(&self) -> Schema {
        SCHEMA
    }
    fn save(&self) -> Result<Payload, SnapshotError> {
        let interrupt_status = *lock(&self.interrupt.status);
        let virtio = lock(&self.regs).save()?;
        Payload::encode(SCHEMA, &MmioState { interrupt_status, virtio })
    }
    fn restore(&self, payload: &Payload) -> Result<(), SnapshotError> {
        let state: MmioState = decode_payload(SCHEMA, payload)?;
        if state.interrupt_status & !(INT_VRING | INT_CONFIG) != 0 {
            return Err(SnapshotError::invalid(SCHEMA, "interrupt_status", "bits set that the register does not have"));
        }
        lock(&self.regs).restore(SCHEMA, state.virtio)?;
        let mut status = lock(&self.interrupt.status);
        *status = state.interrupt_status;
        self.interrupt.line.import_level(*status != 0);
        Ok(())
    }
}

/// A slot without a device: device ID 0, which drivers skip (§4.2.2.1).
pub struct EmptySlot;

impl EmptySlot {
    /// An empty slot's region, for the board to map.
    pub fn region() -> MemoryRegion {
        let region = MemoryRegion::mmio("virtio-mmio-empty", REGION_LEN, ACCESS_RULES);
        if let Some(binding) = region.binding() {
            binding.bind_mmio(Arc::new(Self), 0);
        }
        region
    }
}

impl MmioDevice for EmptySlot {
    fn mmio_read(&self, a: MmioAccess) -> Result<u64, BusFault> {
        Ok(match a.offset {
            reg::MAGIC_VALUE => MAGIC.into(),
            reg::VERSION => VERSION.into(),
            reg::VENDOR_ID => VENDOR.into(),
            _ => 0,
        })
    }
    fn mmio_write(&self, _a: MmioAccess, _value: u64) -> Result<(), BusFault> {
        Ok(())
    }
}
