//! What a virtio device type implements, and the link between it and its transport.

use super::chain::Chain;
use super::queue::{Queue, QueueError};
use super::transport::mmio::VirtioMmio;
use super::transport::pci::VirtioPci;
use super::{feature, status};
use mimus_core::device::{Device, Drain};
use mimus_core::memory::DmaHandle;
use mimus_core::snapshot::{Payload, Schema, SnapshotError};
use serde::de::DeserializeOwned;
use std::any::Any;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, RwLock};

pub(super) fn lock<T: ?Sized>(m: &Mutex<T>) -> MutexGuard<'_, T> {
    m.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A device type: its features, its configuration space and what it does with its
/// queues. All methods may be called on any thread.
pub trait VirtioDevice: Any + Send + Sync {
    /// Device type number (§5).
    fn device_id(&self) -> u32;

    /// Name for messages: `virtio-blk`.
    fn name(&self) -> &'static str;

    /// Largest size of each queue.
    fn queue_sizes(&self) -> Vec<u16>;

    /// Features of the device type, besides [`feature::COMMON`].
    fn features(&self) -> u64;

    /// The whole configuration space; reads past the end give zero.
    fn config(&self) -> Vec<u8>;

    /// The driver writes `data` at `offset` of the configuration space.
    fn config_write(&self, _offset: usize, _data: &[u8]) {}

    /// The transport is there. Called once, before anything else.
    fn attach(&self, link: Arc<VirtioLink>);

    /// The driver is set up (`DRIVER_OK`): queues and features are final.
    fn activate(&self) {}

    /// The driver made buffers available in `queue`. Never blocks.
    fn notify(&self, queue: u16);

    /// Back to the state of power-on. On return nothing accesses guest memory for requests
    /// of before. The queues have been reset already.
    fn reset(&self);

    /// The machine stops: report what is in flight to `drain`.
    fn stop(&self, _drain: &Drain) {}

    /// What the device type saves besides its queues and features. The machine is stopped
    /// and nothing is in flight.
    fn save(&self) -> Result<Payload, SnapshotError>;

    /// Takes over a saved state. Queues and features are restored already.
    fn restore(&self, payload: &Payload) -> Result<(), SnapshotError>;
}

/// How a transport tells the driver that something happened.
pub trait VirtioInterrupt: Send + Sync {
    /// Buffers of `queue` were used.
    fn queue(&self, queue: u16);
    /// The configuration changed, or the device needs a reset.
    fn config(&self);
}

/// What a transport and its device share: rings, memory, interrupts, status. Holds
/// neither of them.
///
/// A ring the driver broke makes the device need a reset (§2.1): the link notes that,
/// tells the driver, and gives no more buffers.
pub struct VirtioLink {
    name: &'static str,
    dma: DmaHandle,
    interrupt: Arc<dyn VirtioInterrupt>,
    /// Written by the transport under its own lock; `NEEDS_RESET` by anyone.
    status: AtomicU8,
    /// Negotiated features.
    features: AtomicU64,
    config_generation: AtomicU32,
    /// The machine stands: no guest memory is touched.
    stopped: AtomicBool,
    /// Held, shared, by whoever handles a notification. Above the device's own locks.
    notifying: RwLock<()>,
    /// Leaf locks, one per queue.
    queues: Box<[Mutex<Queue>]>,
}

impl VirtioLink {
    /// A link for `device`, whose queues are made to its wishes.
    pub fn new(device: &dyn VirtioDevice, dma: DmaHandle, interrupt: Arc<dyn VirtioInterrupt>) -> Arc<Self> {
        let queues = device.queue_sizes().into_iter().map(|n| Mutex::new(Queue::new(n))).collect();
        Arc::new(Self {
            name: device.name(),
            dma,
            interrupt,
            status: AtomicU8::new(0),
            features: AtomicU64::new(0),
            config_generation: AtomicU32::new(0),
            stopped: AtomicBool::new(false),
            notifying: RwLock::new(()),
            queues,
        })
    }

    /// Access to guest memory.
    pub fn dma(&self) -> &DmaHandle {
        &self.dma
    }

    /// Number of queues.
    pub fn queue_count(&self) -> u16 {
        self.queues.len() as u16
    }

    /// A queue, if there is one of that number.
    pub fn queue(&self, index: u16) -> Option<MutexGuard<'_, Queue>> {
        self.queues.get(usize::from(index)).map(lock)
    }

    /// Negotiated features; 0 before negotiation.
    pub fn features(&self) -> u64 {
        self.features.load(Ordering::Acquire)
    }

    /// True if all of `mask` was negotiated.
    pub fn has_feature(&self, mask: u64) -> bool {
        self.features() & mask == mask
    }

    pub(super) fn set_features(&self, features: u64) {
        self.features.store(features, Ordering::Release);
        let (indirect, event_idx) = (features & feature::INDIRECT_DESC != 0, features & feature::EVENT_IDX != 0);
        self.queues.iter().for_each(|q| lock(q).set_features(indirect, event_idx));
    }

    /// Device status bits ([`status`]).
    pub fn status(&self) -> u8 {
        self.status.load(Ordering::Acquire)
    }

    pub(super) fn set_status(&self, value: u8) {
        self.status.store(value, Ordering::Release);
    }

    pub(super) fn add_status(&self, bits: u8) -> u8 {
        self.status.fetch_or(bits, Ordering::AcqRel)
    }

    /// True while buffers may be taken: the driver is set up, the device is not broken
    /// and the machine runs.
    pub fn is_live(&self) -> bool {
        let live = self.status() & (status::DRIVER_OK | status::NEEDS_RESET) == status::DRIVER_OK;
        live && !self.stopped.load(Ordering::Acquire)
    }

    pub(super) fn set_stopped(&self, stopped: bool) {
        self.stopped.store(stopped, Ordering::Release);
    }

    /// Tells `device`, whose link this is, that buffers are available. Any thread: a vCPU's, or that of a doorbell.
    pub fn notify(&self, device: &dyn VirtioDevice, queue: u16) {
        let _busy = self.notifying.read().unwrap_or_else(PoisonError::into_inner);
        device.notify(queue);
    }

    /// Waits for notifications that began before the queues were stopped or reset.
    pub(super) fn settle(&self) {
        drop(self.notifying.write().unwrap_or_else(PoisonError::into_inner));
    }

    /// Number that changes whenever the configuration does.
    pub fn config_generation(&self) -> u32 {
        self.config_generation.load(Ordering::Acquire)
    }

    /// The device changed its configuration space: tells the driver.
    pub fn config_changed(&self) {
        self.config_generation.fetch_add(1, Ordering::AcqRel);
        if self.status() & status::DRIVER_OK != 0 {
            self.interrupt.config();
        }
    }

    /// The driver broke the rules on `queue`: the device stops until it is reset.
    pub fn broken(&self, queue: u16, why: QueueError) {
        let before = self.add_status(status::NEEDS_RESET);
        if before & status::NEEDS_RESET == 0 {
            log::warn!("{}: queue {queue}: {why}; the device stops until the guest resets it", self.name);
            if before & status::DRIVER_OK != 0 {
                self.interrupt.config();
            }
        }
    }

    /// Runs `f` on a queue; `None` if there is none or it turned out broken.
    fn with<T>(&self, index: u16, f: impl FnOnce(&mut Queue, &DmaHandle) -> Result<T, QueueError>) -> Option<T> {
        let result = f(&mut *self.queue(index)?, &self.dma);
        result.map_err(|e| self.broken(index, e)).ok()
    }

    /// The next available chain of a queue.
    pub fn pop(&self, queue: u16) -> Option<Chain> {
        if !self.is_live() {
            return None;
        }
        self.with(queue, Queue::pop).flatten()
    }

    /// Gives back the chain popped last; see [`Queue::undo_pop`].
    pub fn undo_pop(&self, queue: u16, chain: &Chain) {
        if let Some(mut q) = self.queue(queue) {
            q.undo_pop(chain);
        }
    }

    /// Puts a finished chain into the used ring without telling the driver.
    pub fn push(&self, queue: u16, chain: &Chain, written: u32) {
        self.with(queue, |q, dma| q.push(dma, chain, written));
    }

    /// Puts chains that belong together into the used ring, shown to the driver at once.
    pub fn push_all(&self, queue: u16, chains: &[(Chain, u32)]) {
        self.with(queue, |q, dma| {
            for (ahead, (chain, written)) in chains.iter().enumerate() {
                q.push_unpublished(dma, chain, *written, ahead as u16)?;
            }
            q.publish(dma, chains.len() as u16)
        });
    }

    /// Interrupts if the driver wants to know of what was pushed.
    pub fn signal(&self, queue: u16) {
        if self.with(queue, Queue::needs_interrupt) == Some(true) {
            self.interrupt.queue(queue);
        }
    }

    /// [`VirtioLink::push`] and [`VirtioLink::signal`].
    pub fn complete(&self, queue: u16, chain: &Chain, written: u32) {
        let wanted = self.with(queue, |q, dma| {
            q.push(dma, chain, written)?;
            q.needs_interrupt(dma)
        });
        if wanted == Some(true) {
            self.interrupt.queue(queue);
        }
    }

    /// Asks for a notification when the next chain is available; true if one is already.
    pub fn enable_notify(&self, queue: u16) -> bool {
        self.is_live() && self.with(queue, Queue::enable_notify) == Some(true)
    }

    /// Asks not to be notified.
    pub fn disable_notify(&self, queue: u16) {
        if self.is_live() {
            self.with(queue, Queue::disable_notify);
        }
    }

    /// Hands `handle` every available chain and asks for a notification of the next.
    /// `handle` returns false to stop early, having given the chain back.
    pub fn for_each_chain(&self, queue: u16, mut handle: impl FnMut(Chain) -> bool) {
        loop {
            while let Some(chain) = self.pop(queue) {
                if !handle(chain) {
                    return;
                }
            }
            if !self.enable_notify(queue) {
                return;
            }
        }
    }
}

/// The virtio device of type `D` behind a machine's device, whatever its transport.
pub fn virtio_device_of<D: VirtioDevice>(device: &dyn Device) -> Option<Arc<D>> {
    let any: &dyn Any = device;
    let mmio = any.downcast_ref::<VirtioMmio>().map(|d| d.device().clone());
    let virtio = mmio.or_else(|| any.downcast_ref::<VirtioPci>().map(|d| d.device().clone()))?;
    let virtio: Arc<dyn Any + Send + Sync> = virtio;
    virtio.downcast().ok()
}

/// Decodes a payload that must be of exactly `schema`.
pub(crate) fn decode_payload<T: DeserializeOwned>(schema: Schema, payload: &Payload) -> Result<T, SnapshotError> {
    if payload.schema != schema.name {
        return Err(SnapshotError::WrongSchema { found: payload.schema.clone(), expected: schema.name });
    }
    if payload.version != schema.version {
        let (found, expected) = (payload.version, schema.version);
        return Err(SnapshotError::WrongVersion { schema: schema.name, found, expected });
    }
    payload.decode()
}

/// The link of a device that has been attached.
///
/// # Panics
/// If it has not: the transport's mistake.
pub(super) fn attached(cell: &OnceLock<Arc<VirtioLink>>) -> &Arc<VirtioLink> {
    cell.get().expect("a virtio device is used through its transport only")
}
