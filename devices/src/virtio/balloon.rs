//! Traditional memory balloon.
//!
//! Spec: VIRTIO 1.2 §5.5. Modelled: inflate, deflate, statistics, deflate on
//! out-of-memory, free page reporting. Not modelled: free page hints, page poisoning.
//! Checked with: Linux virtio_balloon.

use super::chain::{Buffers, Chain};
use super::device::{VirtioDevice, VirtioLink, attached, decode_payload, lock};
use super::device_id;
use mimus_core::bus::GuestPhys;
use mimus_core::memory::PAGE_SIZE;
use mimus_core::snapshot::{Payload, Schema, SnapshotError};
use serde::{Deserialize, Serialize};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, OnceLock};

const FEATURE_STATS_VQ: u64 = 1 << 1;
const FEATURE_DEFLATE_ON_OOM: u64 = 1 << 2;
const FEATURE_REPORTING: u64 = 1 << 5;

/// Queue numbers; 1 deflates.
const INFLATE: u16 = 0;
const STATS: u16 = 2;

/// Offset of `actual` in the configuration space.
const CONFIG_ACTUAL: usize = 4;
/// Bytes of page numbers read at a time.
const CHUNK: usize = 4096;
/// Most statistics kept: tags beyond are unknown.
const MAX_STATS: usize = 32;
const SCHEMA: Schema = Schema::new("virtio-balloon", 1);

/// What a balloon's user may choose.
#[derive(Clone, Copy, Debug, Default)]
pub struct VirtioBalloonOptions {
    /// The guest may take pages back when it runs out.
    pub deflate_on_oom: bool,
    /// The guest reports free pages, which the host takes until they are used.
    pub free_page_reporting: bool,
}

/// A memory balloon.
pub struct VirtioBalloon {
    options: VirtioBalloonOptions,
    link: OnceLock<Arc<VirtioLink>>,
    /// Pages the host wants.
    wanted: AtomicU32,
    /// Pages the guest says it gave.
    actual: AtomicU32,
    /// Device-level lock.
    stats: Mutex<Stats>,
}

#[derive(Default)]
struct Stats {
    /// The driver's buffer, given back to ask for new statistics.
    buffer: Option<Chain>,
    values: Vec<(u16, u64)>,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct State {
    wanted: u32,
    actual: u32,
}

impl VirtioBalloon {
    /// An empty balloon.
    pub fn new(options: VirtioBalloonOptions) -> Arc<Self> {
        Arc::new(Self {
            options,
            link: OnceLock::new(),
            wanted: AtomicU32::new(0),
            actual: AtomicU32::new(0),
            stats: Mutex::default(),
        })
    }

    /// Asks the guest to give `bytes` of its memory, in whole pages.
    pub fn set_wanted(&self, bytes: u64) {
        let pages = u32::try_from(bytes / PAGE_SIZE).unwrap_or(u32::MAX);
        self.wanted.store(pages, Ordering::Relaxed);
        if let Some(link) = self.link.get() {
            link.config_changed();
        }
    }

    /// Bytes the guest says it gave.
    pub fn actual(&self) -> u64 {
        u64::from(self.actual.load(Ordering::Relaxed)) * PAGE_SIZE
    }

    /// The guest's latest statistics: (tag of §5.5.6.3, value), at most 32.
    pub fn statistics(&self) -> Vec<(u16, u64)> {
        lock(&self.stats).values.clone()
    }

    /// Asks the guest for new statistics; false if it cannot give any.
    pub fn request_statistics(&self) -> bool {
        let Some((link, queue)) = self.link.get().zip(self.stats_queue()) else { return false };
        let Some(buffer) = lock(&self.stats).buffer.take() else { return false };
        link.complete(queue, &buffer, 0);
        true
    }

    fn stats_queue(&self) -> Option<u16> {
        attached(&self.link).has_feature(FEATURE_STATS_VQ).then_some(STATS)
    }

    /// Queues of features that were not negotiated are left out (§5.5.2).
    fn reporting_queue(&self) -> Option<u16> {
        let on = attached(&self.link).has_feature(FEATURE_REPORTING);
        on.then(|| STATS + u16::from(self.stats_queue().is_some()))
    }

    /// Gives the host the pages whose numbers are in `list`, joined to long runs.
    fn inflate(&self, list: &Buffers) {
        let link = attached(&self.link);
        let mut run = Run::default();
        let mut buf = [0; CHUNK];
        let mut at = 0;
        while let Ok(n @ 4..) = list.read(link.dma(), at, &mut buf) {
            for number in buf[..n].as_chunks::<4>().0 {
                run.add(link, u64::from(u32::from_le_bytes(*number)));
            }
            at += n as u64;
        }
        run.discard(link);
    }

    /// Gives the host the memory of free pages the guest reports.
    fn report(&self, chain: &Chain) {
        let link = attached(&self.link);
        for s in chain.writable.segments() {
            discard(link, s.addr, s.len.into());
        }
    }

    fn take_stats(&self, queue: u16, chain: Chain) {
        let link = attached(&self.link);
        let mut buf = [0; MAX_STATS * 10];
        let n = chain.readable.read(link.dma(), 0, &mut buf).unwrap_or(0);
        let value = |e: &[u8; 10]| {
            let word = e.iter().rev().fold(0u128, |w, b| w << 8 | u128::from(*b));
            (word as u16, (word >> 16) as u64)
        };
        let mut stats = lock(&self.stats);
        stats.values = buf[..n].as_chunks::<10>().0.iter().map(value).collect();
        // §5.5.6.3: there is one buffer; a second one is a driver's mistake and goes back.
        if let Some(old) = stats.buffer.replace(chain) {
            link.complete(queue, &old, 0);
        }
    }
}

/// Consecutive pages, in either direction.
#[derive(Default)]
struct Run {
    first: u64,
    count: u64,
}

impl Run {
    fn add(&mut self, link: &VirtioLink, page: u64) {
        if self.count > 0 && page == self.first + self.count {
            self.count += 1;
        } else if self.count > 0 && page + 1 == self.first {
            self.first = page;
            self.count += 1;
        } else {
            self.discard(link);
            *self = Self { first: page, count: 1 };
        }
    }

    fn discard(&self, link: &VirtioLink) {
        if self.count > 0 {
            discard(link, GuestPhys(self.first * PAGE_SIZE), self.count * PAGE_SIZE);
        }
    }
}

/// Gives whole pages of RAM back to the host; what is not RAM stays as it is.
fn discard(link: &VirtioLink, addr: GuestPhys, len: u64) {
    let Ok(slices) = link.dma().ram_slices(addr, len, true) else {
        log::debug!("virtio-balloon: {len:#x} bytes at {addr} are not RAM");
        return;
    };
    for s in slices {
        let start = s.offset().next_multiple_of(PAGE_SIZE);
        let end = (s.offset() + s.len()) / PAGE_SIZE * PAGE_SIZE;
        if start < end && !s.block().discard(start, end - start) {
            log::debug!("virtio-balloon: the host keeps {:#x} bytes at {addr}", end - start);
        }
    }
}

impl VirtioDevice for VirtioBalloon {
    fn device_id(&self) -> u32 {
        device_id::BALLOON
    }
    fn name(&self) -> &'static str {
        "virtio-balloon"
    }
    fn queue_sizes(&self) -> Vec<u16> {
        vec![128; if self.options.free_page_reporting { 4 } else { 3 }]
    }
    fn features(&self) -> u64 {
        let oom = if self.options.deflate_on_oom { FEATURE_DEFLATE_ON_OOM } else { 0 };
        let reporting = if self.options.free_page_reporting { FEATURE_REPORTING } else { 0 };
        FEATURE_STATS_VQ | oom | reporting
    }
    /// §5.5.4: pages wanted, pages given.
    fn config(&self) -> Vec<u8> {
        let mut c = self.wanted.load(Ordering::Relaxed).to_le_bytes().to_vec();
        c.extend(self.actual.load(Ordering::Relaxed).to_le_bytes());
        c
    }
    fn config_write(&self, offset: usize, data: &[u8]) {
        if let (CONFIG_ACTUAL, [a, b, c, d]) = (offset, data) {
            self.actual.store(u32::from_le_bytes([*a, *b, *c, *d]), Ordering::Relaxed);
        }
    }
    fn attach(&self, link: Arc<VirtioLink>) {
        let _ = self.link.set(link);
    }
    fn notify(&self, queue: u16) {
        let link = attached(&self.link);
        link.for_each_chain(queue, |chain| {
            if queue == INFLATE {
                self.inflate(&chain.readable);
            } else if Some(queue) == self.stats_queue() {
                self.take_stats(queue, chain);
                return true;
            } else if Some(queue) == self.reporting_queue() {
                self.report(&chain);
            }
            // Deflating needs nothing: pages come back by being touched.
            link.complete(queue, &chain, 0);
            true
        });
    }
    fn reset(&self) {
        *lock(&self.stats) = Stats::default();
        self.actual.store(0, Ordering::Relaxed);
    }
    fn save(&self) -> Result<Payload, SnapshotError> {
        let state = State { wanted: self.wanted.load(Ordering::Relaxed), actual: self.actual.load(Ordering::Relaxed) };
        Payload::encode(SCHEMA, &state)
    }
    fn restore(&self, payload: &Payload) -> Result<(), SnapshotError> {
        // The statistics buffer comes from the ring again when the machine starts.
        let state: State = decode_payload(SCHEMA, payload)?;
        self.wanted.store(state.wanted, Ordering::Relaxed);
        self.actual.store(state.actual, Ordering::Relaxed);
        Ok(())
    }
}
