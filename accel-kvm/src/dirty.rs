//! The log of written pages: a bitmap per slot, or a ring per vCPU.

use crate::error::{errno, refused};
use crate::slots::{Slot, Slots, State};
use crate::sys::ioctl;
use crate::sys::ring::DirtyRing;
use mimus_core::accel::{AccelError, DirtyLog};
use mimus_core::memory::{PAGE_DIRTY, PAGE_SIZE, RamBlock};
use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering;

/// Pages whose log is cleared by one call: a gibibyte's, so that no call is long.
const CLEAR_PAGES: u64 = 1 << 18;

/// Marks a page for whoever watches.
fn mark(block: &RamBlock, page: u64) {
    if page < block.page_count() {
        let flags = block.page_flags(page);
        if flags.load(Ordering::Relaxed) & PAGE_DIRTY == 0 {
            flags.fetch_or(PAGE_DIRTY, Ordering::Relaxed);
        }
    }
}

impl Slots {
    /// One more vCPU with a ring.
    pub fn add_ring(&self, ring: DirtyRing) {
        self.lock().rings.push(ring);
    }

    /// A vCPU's ring is full: empties all of them.
    pub fn empty_rings(&self) -> io::Result<()> {
        self.collect_rings(&mut self.lock())
    }

    /// Moves what the kernel logged to the page flags.
    pub(crate) fn collect(&self, state: &mut State) -> io::Result<()> {
        if self.limits.ring > 0 {
            return self.collect_rings(state);
        }
        let mut bitmap = Vec::new();
        for slot in state.slots.values().filter(|s| !s.map.readonly) {
            self.collect_bitmap(slot, &mut bitmap)?;
        }
        Ok(())
    }

    fn collect_rings(&self, state: &mut State) -> io::Result<()> {
        let State { slots, rings, .. } = state;
        let mut any = false;
        for ring in rings {
            while let Some((id, page)) = ring.pop() {
                any = true;
                // The upper half is the address space, of which there is one.
                if let Some(slot) = slots.values().find(|s| s.id == id & 0xffff) {
                    mark(&slot.map.block, slot.map.offset / PAGE_SIZE + page);
                }
            }
        }
        if any {
            ioctl::reset_dirty_rings(&self.vm)?;
        }
        Ok(())
    }

    fn collect_bitmap(&self, slot: &Slot, bitmap: &mut Vec<u64>) -> io::Result<()> {
        let pages = slot.map.len / PAGE_SIZE;
        bitmap.clear();
        bitmap.resize(pages.div_ceil(64) as usize, 0);
        ioctl::get_dirty_log(&self.vm, self.number(slot.id), pages, bitmap)?;
        for (i, word) in bitmap.iter().enumerate().filter(|(_, w)| **w != 0) {
            for bit in (0..64).filter(|bit| word >> bit & 1 != 0) {
                mark(&slot.map.block, slot.map.offset / PAGE_SIZE + i as u64 * 64 + bit);
            }
        }
        if !self.limits.manual_clear {
            return Ok(());
        }
        for first in (0..pages).step_by(CLEAR_PAGES as usize) {
            let count = CLEAR_PAGES.min(pages - first);
            let words = &bitmap[first as usize / 64..(first + count).div_ceil(64) as usize];
            if words.iter().any(|w| *w != 0) {
                ioctl::clear_dirty_log(&self.vm, self.number(slot.id), first, count as u32, words)?;
            }
        }
        Ok(())
    }

    fn sync(&self) -> Result<(), AccelError> {
        let collect = || {
            let mut state = self.lock();
            if state.logging { self.collect(&mut state) } else { Ok(()) }
        };
        // Processors with a buffer of their own (PML) put it into the ring when they leave the guest.
        let result = if self.limits.ring > 0 { self.entries.hold(collect) } else { collect() };
        result.map_err(refused("read the log of written pages"))
    }

    fn set_logging(&self, on: bool) -> Result<(), AccelError> {
        let mut state = self.lock();
        if state.logging == on {
            return Ok(());
        }
        for slot in state.slots.values().filter(|s| !s.map.readonly) {
            let set = self.set(slot.id, &slot.map, slot.map.len, on);
            set.map_err(errno("log writes to guest memory"))?;
        }
        state.logging = on;
        Ok(())
    }
}

/// The log of all address spaces.
pub struct KvmDirtyLog(pub Vec<Arc<Slots>>);

impl DirtyLog for KvmDirtyLog {
    fn start(&self) -> Result<(), AccelError> {
        self.0.iter().try_for_each(|slots| slots.set_logging(true))
    }

    fn sync(&self) -> Result<(), AccelError> {
        self.0.iter().try_for_each(|slots| slots.sync())
    }

    fn stop(&self) -> Result<(), AccelError> {
        self.sync()?;
        self.0.iter().try_for_each(|slots| slots.set_logging(false))
    }
}
