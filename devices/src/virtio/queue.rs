//! Split virtqueues, from the device's side.
//!
//! Spec: Virtual I/O Device (VIRTIO) 1.2, §2.7. Modelled: indirect descriptors,
//! `VIRTIO_F_EVENT_IDX`. Not modelled: packed rings, in-order use.
//!
//! Everything in a ring is the guest's word. Indices, lengths and chains are checked
//! here, once; a ring that breaks the rules gives a [`QueueError`], after which the
//! device needs a reset. Work per call is bounded by the queue size.

use super::chain::{Chain, Segment};
use mimus_core::bus::{BusFault, GuestPhys};
use mimus_core::memory::DmaHandle;
use serde::{Deserialize, Serialize};
use std::sync::atomic::{Ordering, fence};

/// Largest queue any device offers, and the longest indirect table taken.
pub const MAX_QUEUE_SIZE: u16 = 1024;

/// Descriptor continues in `next`.
const DESC_NEXT: u16 = 1;
/// Buffer is written by the device.
const DESC_WRITE: u16 = 2;
/// Buffer is a table of descriptors.
const DESC_INDIRECT: u16 = 4;
/// Driver: no interrupts when a buffer is used.
const AVAIL_NO_INTERRUPT: u16 = 1;
/// Device: no notifications when a buffer is made available.
const USED_NO_NOTIFY: u16 = 1;

/// How a driver broke a ring.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum QueueError {
    /// A ring or table is not in RAM, or bus mastering is off.
    #[error("the ring at {addr} cannot be accessed: {fault}")]
    Memory { addr: GuestPhys, fault: BusFault },
    /// The available index moved further than the ring is long.
    #[error("available index {index} is more than {size} ahead of {seen}")]
    AvailIndex { index: u16, seen: u16, size: u16 },
    /// A descriptor number outside its table.
    #[error("descriptor {index} is outside a table of {len}")]
    Descriptor { index: u16, len: u16 },
    /// A chain that loops or is too long.
    #[error("a descriptor chain has more than {limit} descriptors")]
    ChainLength { limit: u16 },
    /// An indirect table of a bad length, nested, followed by more, or not negotiated.
    #[error("bad indirect descriptor: {0}")]
    Indirect(&'static str),
    /// A device-readable buffer after a writable one.
    #[error("a readable descriptor follows a writable one")]
    Order,
    /// More than 4 GiB in one chain, or past the end of the address space.
    #[error("the buffers of one chain exceed 4 GiB or the address space")]
    Length,
    /// More buffers in use than the ring has.
    #[error("more than {size} buffers are in use")]
    InUse { size: u16 },
    /// A chain without the buffers the device type demands.
    #[error("a request has {0}")]
    Request(&'static str),
}

/// What the driver sets up for one queue, and how far the device got.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct QueueState {
    /// Entries, a power of two.
    pub size: u16,
    /// The driver has enabled it.
    pub ready: bool,
    /// Descriptor table.
    pub desc: u64,
    /// Available ring ("driver area").
    pub avail: u64,
    /// Used ring ("device area").
    pub used: u64,
    /// Next entry of the available ring to take.
    pub next_avail: u16,
    /// Next entry of the used ring to fill.
    pub next_used: u16,
}

/// One split virtqueue.
#[derive(Debug)]
pub struct Queue {
    max_size: u16,
    state: QueueState,
    event_idx: bool,
    indirect: bool,
    /// Used index when the driver was last considered for an interrupt; `None` makes the
    /// next one unconditional.
    signalled: Option<u16>,
    /// Chains popped and not yet pushed.
    in_use: u16,
    /// Counts resets, so that completions of before do not touch a new ring.
    epoch: u32,
}

impl Queue {
    /// A queue of at most `max_size` entries, a power of two up to [`MAX_QUEUE_SIZE`].
    ///
    /// # Panics
    /// If `max_size` is not that: a mistake of the device's author.
    pub fn new(max_size: u16) -> Self {
        assert!(max_size.is_power_of_two() && max_size <= MAX_QUEUE_SIZE);
        let state = QueueState { size: max_size, ..QueueState::default() };
        Self { max_size, state, event_idx: false, indirect: false, signalled: None, in_use: 0, epoch: 0 }
    }

    /// Largest size the driver may set.
    pub fn max_size(&self) -> u16 {
        self.max_size
    }

    /// What the driver set up.
    pub fn state(&self) -> &QueueState {
        &self.state
    }

    /// What a snapshot keeps. A chain that the device holds on to (nothing else is in use
    /// then) counts as not popped: the restored device pops it again.
    pub fn saved_state(&self) -> QueueState {
        let next_avail = self.state.next_avail.wrapping_sub(self.in_use);
        QueueState { next_avail, ..self.state.clone() }
    }

    /// True once the driver enabled the queue.
    pub fn is_ready(&self) -> bool {
        self.state.ready
    }

    /// Chains popped and not yet pushed.
    pub fn in_use(&self) -> u16 {
        self.in_use
    }

    /// Forgets everything; chains of before are ignored when they are pushed.
    pub fn reset(&mut self) {
        self.state = QueueState { size: self.max_size, ..QueueState::default() };
        self.event_idx = false;
        self.indirect = false;
        self.signalled = None;
        self.in_use = 0;
        self.epoch = self.epoch.wrapping_add(1);
    }

    /// Takes what feature negotiation decided.
    pub fn set_features(&mut self, indirect: bool, event_idx: bool) {
        self.indirect = indirect;
        self.event_idx = event_idx;
    }

    /// Changes the set-up. Ignored once the queue is ready (§4.2.3.2: the driver must
    /// not).
    pub fn configure(&mut self, change: impl FnOnce(&mut QueueState)) {
        if !self.state.ready {
            let ready = self.state.ready;
            change(&mut self.state);
            self.state.ready = ready;
        }
    }

    /// Enables the queue if its set-up is possible; false if not: a size that is zero, too
    /// large or no power of two, or misaligned rings (§2.7).
    pub fn enable(&mut self) -> bool {
        self.state.ready = self.state.is_valid(self.max_size);
        self.state.ready
    }

    /// The driver disables the queue.
    pub fn disable(&mut self) {
        self.state.ready = false;
        self.epoch = self.epoch.wrapping_add(1);
        self.in_use = 0;
    }

    /// Takes over a saved state; false if it is impossible.
    pub fn restore(&mut self, state: QueueState) -> bool {
        if state.ready && !state.is_valid(self.max_size) {
            return false;
        }
        self.reset();
        self.state = state;
        true
    }

    /// The next available chain.
    pub fn pop(&mut self, dma: &DmaHandle) -> Result<Option<Chain>, QueueError> {
        if !self.state.ready {
            return Ok(None);
        }
        let (size, seen) = (self.state.size, self.state.next_avail);
        let index = self.avail_index(dma)?;
        if index == seen {
            return Ok(None);
        }
        if index.wrapping_sub(seen) > size {
            return Err(QueueError::AvailIndex { index, seen, size });
        }
        if self.in_use >= size {
            return Err(QueueError::InUse { size });
        }
        let slot = self.state.avail_entry(seen);
        let head = load16(dma, slot)?;
        if head >= size {
            return Err(QueueError::Descriptor { index: head, len: size });
        }
        let chain = self.walk(dma, head)?;
        self.state.next_avail = seen.wrapping_add(1);
        self.in_use += 1;
        Ok(Some(chain))
    }

    /// Gives back the chain popped last, untouched. Chains go back in the reverse order
    /// of [`Queue::pop`].
    pub fn undo_pop(&mut self, chain: &Chain) {
        if chain.epoch() == self.epoch && self.in_use > 0 {
            self.state.next_avail = self.state.next_avail.wrapping_sub(1);
            self.in_use -= 1;
        }
    }

    /// Puts a finished chain into the used ring; `written` bytes of it were written.
    pub fn push(&mut self, dma: &DmaHandle, chain: &Chain, written: u32) -> Result<(), QueueError> {
        self.push_unpublished(dma, chain, written, 0)?;
        self.publish(dma, u16::from(chain.epoch() == self.epoch))
    }

    /// Puts a finished chain `ahead` places into the used ring without showing it to the
    /// driver: several that belong together are shown by one [`Queue::publish`].
    pub fn push_unpublished(
        &mut self,
        dma: &DmaHandle,
        chain: &Chain,
        written: u32,
        ahead: u16,
    ) -> Result<(), QueueError> {
        if chain.epoch() != self.epoch || !self.state.ready {
            return Ok(());
        }
        let entry = self.state.used_entry(self.state.next_used.wrapping_add(ahead));
        let element = u64::from(written) << 32 | u64::from(chain.head());
        dma.write(GuestPhys(entry), &element.to_le_bytes()).map_err(|f| memory(entry, f))?;
        self.in_use = self.in_use.saturating_sub(1);
        Ok(())
    }

    /// Shows `count` more used entries to the driver.
    pub fn publish(&mut self, dma: &DmaHandle, count: u16) -> Result<(), QueueError> {
        if !self.state.ready || count == 0 {
            return Ok(());
        }
        self.state.next_used = self.state.next_used.wrapping_add(count);
        // The store is a release: entries are visible before the index.
        store16(dma, self.state.used.wrapping_add(2), self.state.next_used)
    }

    /// Whether the driver wants an interrupt for what was pushed since it was last asked
    /// (§2.7.7).
    pub fn needs_interrupt(&mut self, dma: &DmaHandle) -> Result<bool, QueueError> {
        if !self.state.ready {
            return Ok(false);
        }
        // The driver writes its wish, then reads the used index; here the index is written,
        // then the wish read. One of the two sees the other.
        fence(Ordering::SeqCst);
        if !self.event_idx {
            return Ok(load16(dma, self.state.avail)? & AVAIL_NO_INTERRUPT == 0);
        }
        let event = load16(dma, self.state.avail_entry_raw(self.state.size))?;
        let new = self.state.next_used;
        let Some(old) = self.signalled.replace(new) else { return Ok(true) };
        Ok(new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old))
    }

    /// Asks the driver not to notify. A hint.
    pub fn disable_notify(&mut self, dma: &DmaHandle) -> Result<(), QueueError> {
        // With an event index, leaving the old one in place is enough.
        if !self.state.ready || self.event_idx {
            return Ok(());
        }
        store16(dma, self.state.used, USED_NO_NOTIFY)
    }

    /// Asks the driver to notify when it makes the next chain available. True if there is
    /// one already, for which no notification may come.
    pub fn enable_notify(&mut self, dma: &DmaHandle) -> Result<bool, QueueError> {
        if !self.state.ready {
            return Ok(false);
        }
        if self.event_idx {
            let event = self.state.used_entry_raw(self.state.size);
            store16(dma, event, self.state.next_avail)?;
        } else {
            store16(dma, self.state.used, 0)?;
        }
        fence(Ordering::SeqCst);
        Ok(self.avail_index(dma)? != self.state.next_avail)
    }

    fn avail_index(&self, dma: &DmaHandle) -> Result<u16, QueueError> {
        load16(dma, self.state.avail.wrapping_add(2))
    }

    /// Follows the chain from `head`.
    fn walk(&self, dma: &DmaHandle, head: u16) -> Result<Chain, QueueError> {
        let mut chain = Chain::new(head, self.epoch);
        let mut table = Table { base: self.state.desc, len: self.state.size, indirect: false };
        let (mut index, mut count) = (head, 0);
        loop {
            let d = table.descriptor(dma, index)?;
            if d.flags & DESC_INDIRECT != 0 {
                table = self.indirect_table(&table, &d)?;
                (index, count) = (0, 0);
                continue;
            }
            count += 1;
            if count > table.len {
                return Err(QueueError::ChainLength { limit: table.len });
            }
            let segment = Segment { addr: GuestPhys(d.addr), len: d.len };
            chain.add(segment, d.flags & DESC_WRITE != 0)?;
            if d.flags & DESC_NEXT == 0 {
                return Ok(chain);
            }
            index = d.next;
        }
    }

    fn indirect_table(&self, current: &Table, d: &Descriptor) -> Result<Table, QueueError> {
        let refuse = |why| Err(QueueError::Indirect(why));
        if !self.indirect {
            return refuse("the feature was not negotiated");
        }
        if current.indirect {
            return refuse("it is in an indirect table itself");
        }
        if d.flags & DESC_NEXT != 0 {
            return refuse("it has a next descriptor");
        }
        if d.len == 0 || !d.len.is_multiple_of(DESC_SIZE as u32) {
            return refuse("its length is not a positive multiple of 16");
        }
        match u16::try_from(d.len / DESC_SIZE as u32) {
            Ok(len) if len <= MAX_QUEUE_SIZE => Ok(Table { base: d.addr, len, indirect: true }),
            _ => refuse("it has more than 1024 entries"),
        }
    }
}

impl QueueState {
    fn is_valid(&self, max_size: u16) -> bool {
        let size_ok = self.size.is_power_of_two() && self.size <= max_size;
        // §2.7: alignments of the three parts.
        size_ok && self.desc.is_multiple_of(16) && self.avail.is_multiple_of(2) && self.used.is_multiple_of(4)
    }

    fn avail_entry(&self, index: u16) -> u64 {
        self.avail_entry_raw(index % self.size)
    }

    fn avail_entry_raw(&self, slot: u16) -> u64 {
        self.avail.wrapping_add(4 + u64::from(slot) * 2)
    }

    fn used_entry(&self, index: u16) -> u64 {
        self.used_entry_raw(index % self.size)
    }

    fn used_entry_raw(&self, slot: u16) -> u64 {
        self.used.wrapping_add(4 + u64::from(slot) * 8)
    }
}

/// Bytes of a descriptor.
const DESC_SIZE: u64 = 16;

struct Descriptor {
    addr: u64,
    len: u32,
    flags: u16,
    next: u16,
}

struct Table {
    base: u64,
    len: u16,
    indirect: bool,
}

impl Table {
    fn descriptor(&self, dma: &DmaHandle, index: u16) -> Result<Descriptor, QueueError> {
        if index >= self.len {
            return Err(QueueError::Descriptor { index, len: self.len });
        }
        let at = self.base.wrapping_add(u64::from(index) * DESC_SIZE);
        let mut raw = [0; DESC_SIZE as usize];
        dma.read(GuestPhys(at), &mut raw).map_err(|f| memory(at, f))?;
        let word = u128::from_le_bytes(raw);
        Ok(Descriptor {
            addr: word as u64,
            len: (word >> 64) as u32,
            flags: (word >> 96) as u16,
            next: (word >> 112) as u16,
        })
    }
}

fn memory(addr: u64, fault: BusFault) -> QueueError {
    QueueError::Memory { addr: GuestPhys(addr), fault }
}

fn load16(dma: &DmaHandle, addr: u64) -> Result<u16, QueueError> {
    dma.read_u16(GuestPhys(addr)).map_err(|f| memory(addr, f))
}

fn store16(dma: &DmaHandle, addr: u64, value: u16) -> Result<(), QueueError> {
    dma.write_u16(GuestPhys(addr), value).map_err(|f| memory(addr, f))
}
