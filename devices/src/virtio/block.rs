//! Block device.
//!
//! Spec: VIRTIO 1.2 §5.2. Modelled: read, write, flush, discard, write-zeroes, get-id,
//! several queues, write-cache switch. Not modelled: secure erase, zoned devices,
//! lifetime. Checked with: Linux virtio_blk.
//!
//! Requests are parsed where the notification arrives and handed to the host backend,
//! which never blocks; data move between guest RAM and the file without a copy. Each
//! completes on whichever thread the backend finishes it.

use super::chain::Chain;
use super::device::{VirtioDevice, VirtioLink, attached, decode_payload, lock};
use super::device_id;
use super::queue::QueueError;
use mimus_core::backend::block::SECTOR_SIZE;
use mimus_core::backend::{BlockBackend, BlockBuffer, BlockError, BlockOp, BlockRequest};
use mimus_core::device::{Drain, DrainToken};
use mimus_core::snapshot::{Payload, Schema, SnapshotError};
use serde::{Deserialize, Serialize};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, OnceLock, PoisonError};

/// Feature bits (§5.2.3).
mod feature {
    pub const SEG_MAX: u64 = 1 << 2;
    pub const RO: u64 = 1 << 5;
    pub const BLK_SIZE: u64 = 1 << 6;
    pub const FLUSH: u64 = 1 << 9;
    pub const TOPOLOGY: u64 = 1 << 10;
    pub const CONFIG_WCE: u64 = 1 << 11;
    pub const MQ: u64 = 1 << 12;
    pub const DISCARD: u64 = 1 << 13;
    pub const WRITE_ZEROES: u64 = 1 << 14;
}

/// Request types (§5.2.6).
mod request {
    pub const IN: u32 = 0;
    pub const OUT: u32 = 1;
    pub const FLUSH: u32 = 4;
    pub const GET_ID: u32 = 8;
    pub const DISCARD: u32 = 11;
    pub const WRITE_ZEROES: u32 = 13;
}

/// Answer to a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
enum Status {
    Ok = 0,
    IoErr = 1,
    Unsupported = 2,
}

/// Type, reserved, sector.
const HEADER_LEN: u64 = 16;
/// Bytes of a serial number.
pub const SERIAL_LEN: usize = 20;
/// Offset of the write-cache switch in the configuration space.
const CONFIG_WRITEBACK: usize = 32;
/// Most sectors one discard or write-zeroes may name: 1 GiB.
const MAX_RANGE_SECTORS: u32 = 1 << 21;
/// Flag of a write-zeroes range: it may be deallocated.
const RANGE_UNMAP: u32 = 1;

const SCHEMA: Schema = Schema::new("virtio-blk", 1);

/// What a disk's user may choose.
#[derive(Clone, Debug)]
pub struct VirtioBlockOptions {
    /// What `get-id` answers; at most [`SERIAL_LEN`] bytes count.
    pub serial: String,
    /// Number of queues, from 1.
    pub queues: u16,
    /// Entries per queue, a power of two.
    pub queue_size: u16,
    /// Offer discard and write-zeroes if the backend has them.
    pub discard: bool,
}

impl Default for VirtioBlockOptions {
    fn default() -> Self {
        Self { serial: String::new(), queues: 1, queue_size: 256, discard: true }
    }
}

/// A block device over a host backend.
pub struct VirtioBlock(Arc<Inner>);

struct Inner {
    backend: Arc<dyn BlockBackend>,
    options: VirtioBlockOptions,
    link: OnceLock<Arc<VirtioLink>>,
    /// The driver's wish, if it negotiated `CONFIG_WCE`.
    writeback: AtomicBool,
    /// Leaf lock.
    in_flight: Mutex<InFlight>,
    none_in_flight: Condvar,
}

#[derive(Default)]
struct InFlight {
    count: usize,
    /// Who waits for `count` to become 0.
    drains: Vec<DrainToken>,
}

/// One request on its way.
struct Pending {
    queue: u16,
    chain: Chain,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct State {
    writeback: bool,
}

impl VirtioBlock {
    /// A disk on `backend`.
    pub fn new(backend: Arc<dyn BlockBackend>, options: VirtioBlockOptions) -> Arc<Self> {
        let inner = Arc::new(Inner {
            backend,
            options,
            link: OnceLock::new(),
            writeback: AtomicBool::new(true),
            in_flight: Mutex::default(),
            none_in_flight: Condvar::new(),
        });
        let weak = Arc::downgrade(&inner);
        inner.backend.set_resize_listener(Arc::new(move |_| {
            if let Some(link) = weak.upgrade().and_then(|i| i.link.get().cloned()) {
                link.config_changed();
            }
        }));
        Arc::new(Self(inner))
    }

    /// The host side.
    pub fn backend(&self) -> &Arc<dyn BlockBackend> {
        &self.0.backend
    }
}

impl VirtioDevice for VirtioBlock {
    fn device_id(&self) -> u32 {
        device_id::BLOCK
    }

    fn name(&self) -> &'static str {
        "virtio-blk"
    }

    fn queue_sizes(&self) -> Vec<u16> {
        vec![self.0.options.queue_size; self.0.options.queues.max(1).into()]
    }

    fn features(&self) -> u64 {
        let inner = &self.0;
        let mut f = feature::SEG_MAX | feature::BLK_SIZE | feature::FLUSH | feature::TOPOLOGY | feature::CONFIG_WCE;
        let mut add = |on, bit| f |= if on { bit } else { 0 };
        let (writable, discard) = (!inner.backend.read_only(), inner.options.discard);
        add(!writable, feature::RO);
        add(inner.options.queues > 1, feature::MQ);
        add(writable && discard && inner.backend.can_discard(), feature::DISCARD);
        add(writable && discard && inner.backend.can_write_zeroes(), feature::WRITE_ZEROES);
        f
    }

    /// §5.2.4.
    fn config(&self) -> Vec<u8> {
        let inner = &self.0;
        let mut c = vec![0; 60];
        let mut put = |at: usize, bytes: &[u8]| c[at..at + bytes.len()].copy_from_slice(bytes);
        put(0, &(inner.backend.capacity() / SECTOR_SIZE).to_le_bytes());
        // Room for header and status in a chain without indirection.
        let seg_max = u32::from(inner.options.queue_size).saturating_sub(2).max(1);
        put(12, &seg_max.to_le_bytes());
        put(20, &inner.backend.block_size().to_le_bytes());
        put(CONFIG_WRITEBACK, &[u8::from(inner.writeback.load(Ordering::Relaxed))]);
        put(34, &inner.options.queues.max(1).to_le_bytes());
        let alignment = (inner.backend.block_size() / SECTOR_SIZE as u32).max(1);
        put(36, &MAX_RANGE_SECTORS.to_le_bytes());
        put(40, &1u32.to_le_bytes());
        put(44, &alignment.to_le_bytes());
        put(48, &MAX_RANGE_SECTORS.to_le_bytes());
        put(52, &1u32.to_le_bytes());
        put(56, &[1]);
        c
    }

    fn config_write(&self, offset: usize, data: &[u8]) {
        let negotiated = self.0.link.get().is_some_and(|l| l.has_feature(feature::CONFIG_WCE));
        if let (CONFIG_WRITEBACK, true, [value, ..]) = (offset, negotiated, data) {
            self.0.writeback.store(value & 1 != 0, Ordering::Relaxed);
        }
    }

    fn attach(&self, link: Arc<VirtioLink>) {
        let _ = self.0.link.set(link);
    }

    fn notify(&self, queue: u16) {
        let link = attached(&self.0.link);
        link.for_each_chain(queue, |chain| {
            self.0.start(Pending { queue, chain });
            true
        });
    }

    fn reset(&self) {
        // A driver may reuse its memory as soon as the reset is done (§2.4.1), so what the
        // host still moves has to end first. This waits for the disk, as real ones do.
        let mut state = lock(&self.0.in_flight);
        while state.count > 0 {
            state = self.0.none_in_flight.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        drop(state);
        self.0.writeback.store(true, Ordering::Relaxed);
    }

    fn stop(&self, drain: &Drain) {
        let mut state = lock(&self.0.in_flight);
        if state.count > 0 {
            state.drains.push(drain.token());
        }
    }

    fn save(&self) -> Result<Payload, SnapshotError> {
        Payload::encode(SCHEMA, &State { writeback: self.0.writeback.load(Ordering::Relaxed) })
    }

    fn restore(&self, payload: &Payload) -> Result<(), SnapshotError> {
        let state: State = decode_payload(SCHEMA, payload)?;
        self.0.writeback.store(state.writeback, Ordering::Relaxed);
        Ok(())
    }
}

impl Inner {
    fn link(&self) -> &Arc<VirtioLink> {
        attached(&self.link)
    }

    /// Parses one request and sends it on its way.
    fn start(self: &Arc<Self>, p: Pending) {
        let dma = self.link().dma();
        if p.chain.writable.is_empty() {
            return self.link().broken(p.queue, QueueError::Request("no room for the status"));
        }
        let header = match p.chain.readable.read_array::<{ HEADER_LEN as usize }>(dma, 0) {
            Ok(Some(h)) => u128::from_le_bytes(h),
            Ok(None) => return self.link().broken(p.queue, QueueError::Request("a short header")),
            Err(_) => return self.finish(&p, Status::IoErr, 0),
        };
        let (kind, sector) = (header as u32, (header >> 64) as u64);
        match kind {
            request::IN | request::OUT => self.transfer(p, kind == request::OUT, sector),
            request::FLUSH => self.submit(p, BlockRequest::flush()),
            request::GET_ID => self.get_id(&p),
            request::DISCARD | request::WRITE_ZEROES => self.range(p, kind == request::DISCARD),
            _ => self.finish(&p, Status::Unsupported, 0),
        }
    }

    fn transfer(self: &Arc<Self>, p: Pending, write: bool, sector: u64) {
        let dma = self.link().dma();
        let slices = match write {
            true => p.chain.readable.ram_slices(dma, HEADER_LEN, p.chain.readable.len() - HEADER_LEN, false),
            false => p.chain.writable.ram_slices(dma, 0, p.chain.writable.len() - 1, true),
        };
        let Ok(slices) = slices else { return self.finish(&p, Status::IoErr, 0) };
        let op = if write { BlockOp::Write } else { BlockOp::Read };
        let request = BlockRequest::transfer(op, sector, BlockBuffer::Ram(slices));
        if !self.on_disk(sector, request.len) || write && self.backend.read_only() {
            return self.finish(&p, Status::IoErr, 0);
        }
        match request.len {
            0 => self.finish(&p, Status::Ok, 0),
            _ => self.submit(p, request),
        }
    }

    /// True if `len` bytes from `sector` are whole blocks of the disk.
    fn on_disk(&self, sector: u64, len: u64) -> bool {
        let block = u64::from(self.backend.block_size()).max(SECTOR_SIZE);
        let start = sector.checked_mul(SECTOR_SIZE);
        let end = start.and_then(|s| s.checked_add(len));
        let aligned = len.is_multiple_of(block) && start.is_some_and(|s| s % block == 0);
        aligned && end.is_some_and(|e| e <= self.backend.capacity())
    }

    fn get_id(&self, p: &Pending) {
        let mut id = [0; SERIAL_LEN];
        let serial = self.options.serial.as_bytes();
        let n = serial.len().min(SERIAL_LEN);
        id[..n].copy_from_slice(&serial[..n]);
        let room = (p.chain.writable.len() - 1).min(SERIAL_LEN as u64) as usize;
        match p.chain.writable.write(self.link().dma(), 0, &id[..room]) {
            Ok(_) => self.finish(p, Status::Ok, room as u64),
            Err(_) => self.finish(p, Status::IoErr, 0),
        }
    }

    /// Discard and write-zeroes: one range of sectors (`max_*_seg` is 1).
    fn range(self: &Arc<Self>, p: Pending, discard: bool) {
        let bit = if discard { feature::DISCARD } else { feature::WRITE_ZEROES };
        if !self.link().has_feature(bit) {
            return self.finish(&p, Status::Unsupported, 0);
        }
        let range = p.chain.readable.read_array::<16>(self.link().dma(), HEADER_LEN);
        let Ok(Some(range)) = range else { return self.finish(&p, Status::IoErr, 0) };
        let word = u128::from_le_bytes(range);
        let (sector, count, flags) = (word as u64, (word >> 64) as u32, (word >> 96) as u32);
        // §5.2.6.2: unknown flags, and unmap on a discard, are unsupported.
        if flags & !RANGE_UNMAP != 0 || discard && flags != 0 || p.chain.readable.len() != HEADER_LEN + 16 {
            return self.finish(&p, Status::Unsupported, 0);
        }
        let len = u64::from(count) * SECTOR_SIZE;
        if count > MAX_RANGE_SECTORS || !self.on_disk(sector, len) || self.backend.read_only() {
            return self.finish(&p, Status::IoErr, 0);
        }
        let op = match discard {
            true => BlockOp::Discard,
            false => BlockOp::WriteZeroes { unmap: flags & RANGE_UNMAP != 0 },
        };
        match count {
            0 => self.finish(&p, Status::Ok, 0),
            _ => self.submit(p, BlockRequest { op, sector, len, buffer: BlockBuffer::None }),
        }
    }

    /// True if completed writes may be lost until a flush: what the driver chose
    /// (§5.2.5.2).
    fn write_back(&self) -> bool {
        match self.link().has_feature(feature::CONFIG_WCE) {
            true => self.writeback.load(Ordering::Relaxed),
            false => self.link().has_feature(feature::FLUSH),
        }
    }

    fn submit(self: &Arc<Self>, p: Pending, request: BlockRequest) {
        lock(&self.in_flight).count += 1;
        let read = matches!(request.op, BlockOp::Read);
        let modifies = matches!(request.op, BlockOp::Write | BlockOp::WriteZeroes { .. });
        let written = if read { request.len } else { 0 };
        let through = modifies && !self.write_back();
        let inner = self.clone();
        self.backend.submit(
            request,
            Box::new(move |result, _| match result {
                Ok(()) if through => inner.flush_after(p),
                result => inner.done(&p, result, written),
            }),
        );
    }

    /// Write-through: the write counts once it is on stable storage.
    fn flush_after(self: Arc<Self>, p: Pending) {
        let backend = self.backend.clone();
        backend.submit(BlockRequest::flush(), Box::new(move |result, _| self.done(&p, result, 0)));
    }

    fn done(&self, p: &Pending, result: Result<(), BlockError>, written: u64) {
        match result {
            Ok(()) => self.finish(p, Status::Ok, written),
            Err(BlockError::Unsupported) => self.finish(p, Status::Unsupported, 0),
            Err(e) => {
                log::warn!("virtio-blk: {}: {e}", self.backend.describe());
                self.finish(p, Status::IoErr, 0);
            }
        }
        let mut state = lock(&self.in_flight);
        state.count -= 1;
        if state.count == 0 {
            self.none_in_flight.notify_all();
            let drains = std::mem::take(&mut state.drains);
            drop(state);
            drop(drains);
        }
    }

    /// Answers: the status is the last writable byte.
    fn finish(&self, p: &Pending, status: Status, written: u64) {
        let last = p.chain.writable.len() - 1;
        let link = self.link();
        // DMA of before a reset must not touch memory of after it; the push is checked by
        // the queue itself.
        match p.chain.writable.write(link.dma(), last, &[status as u8]) {
            Ok(_) => link.complete(p.queue, &p.chain, (written + 1) as u32),
            Err(fault) => {
                let addr = p.chain.writable.segments().last().map_or_else(Default::default, |s| s.addr);
                link.broken(p.queue, QueueError::Memory { addr, fault });
            }
        }
    }
}
