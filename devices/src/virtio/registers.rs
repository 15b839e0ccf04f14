//! Negotiation, set-up and status of a virtio device: what virtio-mmio and virtio-pci
//! have in common behind their different register layouts.

use super::device::{VirtioDevice, VirtioInterrupt, VirtioLink};
use super::queue::QueueState;
use super::{feature, status};
use mimus_core::device::{BuildError, DeviceContext, DoorbellWrite, Drain};
use mimus_core::io_thread::FdRegistration;
use mimus_core::memory::{DmaHandle, MemoryRegion};
use mimus_core::snapshot::{Payload, Schema, SnapshotError};
use serde::{Deserialize, Serialize};
use std::sync::Arc;

/// A device behind its transport. The transport holds this in its own lock; `notify`
/// alone goes past that.
pub struct VirtioRegisters {
    device: Arc<dyn VirtioDevice>,
    link: Arc<VirtioLink>,
    /// Which half of the device's features is read.
    pub device_feature_select: u32,
    /// Which half of the driver's features is accessed.
    pub driver_feature_select: u32,
    driver_features: u64,
    /// Which queue the queue registers are about.
    pub queue_select: u16,
}

/// Has notifications of all queues of `device` come on the I/O thread where the accelerator can do that; `at` says
/// where the register of a queue is in `region`.
pub(super) fn doorbells(
    (device, link): (&Arc<dyn VirtioDevice>, &Arc<VirtioLink>),
    ctx: &DeviceContext<'_>,
    region: &MemoryRegion,
    at: impl Fn(u16) -> DoorbellWrite,
) -> Result<Vec<FdRegistration>, BuildError> {
    let mut registrations = Vec::new();
    for queue in 0..link.queue_count() {
        let (device, link) = (device.clone(), link.clone());
        let ring = move || link.notify(&*device, queue);
        registrations.extend(ctx.doorbell(region, at(queue), ring)?);
    }
    Ok(registrations)
}

/// The saved form: registers, queues, and the device type's own state.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VirtioState {
    device_id: u32,
    status: u8,
    device_feature_select: u32,
    driver_feature_select: u32,
    driver_features: u64,
    queue_select: u16,
    queues: Vec<QueueState>,
    schema: String,
    version: u32,
    body: Vec<u8>,
}

impl VirtioRegisters {
    /// `device` over `dma`, with interrupts through `interrupt`.
    pub fn new(device: Arc<dyn VirtioDevice>, dma: DmaHandle, interrupt: Arc<dyn VirtioInterrupt>) -> Self {
        let link = VirtioLink::new(&*device, dma, interrupt);
        device.attach(link.clone());
        Self { device, link, device_feature_select: 0, driver_feature_select: 0, driver_features: 0, queue_select: 0 }
    }

    /// The device.
    pub fn device(&self) -> &Arc<dyn VirtioDevice> {
        &self.device
    }

    /// Its link.
    pub fn link(&self) -> &Arc<VirtioLink> {
        &self.link
    }

    fn offered(&self) -> u64 {
        self.device.features() | feature::COMMON
    }

    /// The selected half of the features offered.
    pub fn device_features(&self) -> u32 {
        half(self.offered(), self.device_feature_select)
    }

    /// The selected half of the features the driver took.
    pub fn driver_features(&self) -> u32 {
        half(self.driver_features, self.driver_feature_select)
    }

    /// The driver takes features; ignored once they are agreed on.
    pub fn set_driver_features(&mut self, value: u32) {
        if self.link.status() & status::FEATURES_OK != 0 {
            return;
        }
        let (value, old) = (u64::from(value), self.driver_features);
        self.driver_features = match self.driver_feature_select {
            0 => old & !0xffff_ffff | value,
            1 => old & 0xffff_ffff | value << 32,
            _ => old,
        };
    }

    /// Device status.
    pub fn status(&self) -> u8 {
        self.link.status()
    }

    /// The driver writes the status: 0 resets, other bits are added in the order of
    /// §3.1.1.
    pub fn set_status(&mut self, value: u8) {
        if value == 0 {
            return self.reset();
        }
        let old = self.link.status();
        let mut new = old | value & !status::NEEDS_RESET;
        if new & !old & status::FEATURES_OK != 0 && !self.agree_on_features() {
            new &= !status::FEATURES_OK;
        }
        if new & status::FEATURES_OK == 0 {
            new &= !status::DRIVER_OK;
        }
        self.link.add_status(new);
        if new & !old & status::DRIVER_OK != 0 {
            self.device.activate();
        }
    }

    /// True, and the features take effect, if the driver took only what was offered and
    /// is not a legacy driver.
    fn agree_on_features(&self) -> bool {
        let features = self.driver_features;
        if features & !self.offered() != 0 || features & feature::VERSION_1 == 0 {
            log::debug!("{}: the guest's features {features:#x} are refused", self.device.name());
            return false;
        }
        self.link.set_features(features);
        true
    }

    /// Back to power-on.
    pub fn reset(&mut self) {
        self.link.set_status(0);
        for i in 0..self.link.queue_count() {
            if let Some(mut q) = self.link.queue(i) {
                q.reset();
            }
        }
        self.link.settle();
        self.device.reset();
        self.link.set_features(0);
        self.device_feature_select = 0;
        self.driver_feature_select = 0;
        self.driver_features = 0;
        self.queue_select = 0;
    }

    /// Largest size of the selected queue, 0 if there is none.
    pub fn queue_max_size(&self) -> u16 {
        self.link.queue(self.queue_select).map_or(0, |q| q.max_size())
    }

    /// Set-up of the selected queue.
    pub fn queue_state(&self) -> QueueState {
        self.link.queue(self.queue_select).map(|q| q.state().clone()).unwrap_or_default()
    }

    /// Changes the set-up of the selected queue.
    pub fn configure_queue(&self, change: impl FnOnce(&mut QueueState)) {
        if let Some(mut q) = self.link.queue(self.queue_select) {
            q.configure(change);
        }
    }

    /// Enables or disables the selected queue.
    pub fn set_queue_ready(&self, ready: bool) {
        let Some(mut q) = self.link.queue(self.queue_select) else { return };
        if !ready {
            q.disable();
        } else if !q.is_ready() && !q.enable() {
            log::warn!(
                "{}: queue {} has an impossible size or alignment; it stays disabled",
                self.device.name(),
                self.queue_select
            );
        }
    }

    /// Reads `data.len()` bytes of the configuration space.
    pub fn config_read(&self, offset: u64, data: &mut [u8]) {
        let config = self.device.config();
        let at = usize::try_from(offset).unwrap_or(usize::MAX);
        for (i, byte) in data.iter_mut().enumerate() {
            *byte = at.checked_add(i).and_then(|at| config.get(at)).copied().unwrap_or(0);
        }
    }

    /// Reads up to 8 bytes of the configuration space as a little-endian number.
    pub fn config_read_value(&self, offset: u64, bytes: u64) -> u64 {
        let mut raw = [0; 8];
        self.config_read(offset, &mut raw[..bytes.min(8) as usize]);
        u64::from_le_bytes(raw)
    }

    /// The driver writes the configuration space.
    pub fn config_write_value(&self, offset: u64, bytes: u64, value: u64) {
        if let Ok(at) = usize::try_from(offset) {
            self.device.config_write(at, &value.to_le_bytes()[..bytes.min(8) as usize]);
        }
    }

    /// The machine stops.
    pub fn stop(&self, drain: &Drain) {
        self.link.set_stopped(true);
        // What is taken from a queue now would be in nobody's count of what is in flight.
        self.link.settle();
        self.device.stop(drain);
    }

    /// The machine runs. Looks at all queues, for what came while it stood.
    pub fn start(&self) {
        self.link.set_stopped(false);
        if self.link.is_live() {
            (0..self.link.queue_count()).for_each(|i| self.device.notify(i));
        }
    }

    /// What a snapshot keeps.
    pub fn save(&self) -> Result<VirtioState, SnapshotError> {
        let payload = self.device.save()?;
        let queues = (0..self.link.queue_count()).filter_map(|i| self.link.queue(i).map(|q| q.saved_state()));
        Ok(VirtioState {
            device_id: self.device.device_id(),
            status: self.link.status(),
            device_feature_select: self.device_feature_select,
            driver_feature_select: self.driver_feature_select,
            driver_features: self.driver_features,
            queue_select: self.queue_select,
            queues: queues.collect(),
            schema: payload.schema,
            version: payload.version,
            body: payload.body,
        })
    }

    /// Takes over a saved state; `schema` is the transport's, for messages.
    pub fn restore(&mut self, schema: Schema, s: VirtioState) -> Result<(), SnapshotError> {
        let invalid = |field, reason: &str| Err(SnapshotError::invalid(schema, field, reason));
        if s.device_id != self.device.device_id() {
            return invalid("device_id", "it is another type of device");
        }
        if s.queues.len() != usize::from(self.link.queue_count()) {
            return invalid("queues", "the device has another number of queues");
        }
        let agreed = s.status & status::FEATURES_OK != 0;
        if agreed && s.driver_features & !self.offered() != 0 {
            return invalid("driver_features", "the device does not offer all of them: same options as when saved?");
        }
        if s.status & status::DRIVER_OK != 0 && !agreed {
            return invalid("status", "DRIVER_OK without FEATURES_OK");
        }
        self.reset();
        for (i, state) in (0..).zip(s.queues) {
            let restored = self.link.queue(i).is_some_and(|mut q| q.restore(state));
            if !restored {
                return invalid("queues", "impossible size or alignment");
            }
        }
        self.device_feature_select = s.device_feature_select;
        self.driver_feature_select = s.driver_feature_select;
        self.driver_features = s.driver_features;
        self.queue_select = s.queue_select;
        if agreed {
            self.link.set_features(s.driver_features);
        }
        self.link.set_status(s.status);
        self.device.restore(&Payload { schema: s.schema, version: s.version, body: s.body })
    }
}

fn half(features: u64, select: u32) -> u32 {
    match select {
        0 => features as u32,
        1 => (features >> 32) as u32,
        _ => 0,
    }
}
