//! Memory slots: the RAM and ROM of the flat view, given to the kernel.
//!
//! RAM is a slot; ROM, and ROM devices that read from RAM, are read-only slots whose writes exit; everything
//! else has no slot, and accesses exit. Aliases are slots over the same host memory. Ranges are cut down to
//! whole pages: what is left over is reached through exits, like a device.
//!
//! A commit that takes something away and puts something else there is made with all vCPUs held out of the
//! kernel: no vCPU sees the map in between.

use crate::entry::Entries;
use crate::sys::ioctl::{self, SlotRequest};
use crate::sys::ring::DirtyRing;
use kvm_bindings::{KVM_MEM_LOG_DIRTY_PAGES, KVM_MEM_READONLY};
use kvm_ioctls::VmFd;
use mimus_core::memory::{FlatKind, FlatRange, FlatView, MemoryListener, PAGE_SIZE, RamBlock};
use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// What the kernel offers.
#[derive(Clone, Copy, Debug)]
pub struct SlotLimits {
    /// Number of slots.
    pub slots: u32,
    /// Read-only slots exist.
    pub readonly: bool,
    /// `KVM_CLEAR_DIRTY_LOG` is on.
    pub manual_clear: bool,
    /// Entries of the dirty rings; 0: bitmaps.
    pub ring: u32,
}

/// A range of guest memory over a block.
#[derive(Clone)]
pub(crate) struct Mapping {
    pub(crate) base: u64,
    pub(crate) len: u64,
    pub(crate) block: Arc<RamBlock>,
    pub(crate) offset: u64,
    pub(crate) readonly: bool,
}

impl Mapping {
    /// The whole pages of a range that reads from RAM.
    fn of(range: &FlatRange) -> Option<Self> {
        let (block, offset, readonly) = match &range.kind {
            FlatKind::Ram { block, offset, readonly } => (block, *offset, *readonly),
            FlatKind::RomDevice { block, offset, .. } => (block, *offset, true),
            FlatKind::Mmio { .. } => return None,
        };
        let base = range.base.0.checked_next_multiple_of(PAGE_SIZE)?;
        let end = range.end() & !(PAGE_SIZE - 1);
        let offset = offset + (base - range.base.0);
        // Guest and host pages must coincide.
        (base < end && offset.is_multiple_of(PAGE_SIZE)).then(|| Self {
            base,
            len: end - base,
            block: block.clone(),
            offset,
            readonly,
        })
    }

    fn same(&self, other: &Self) -> bool {
        (self.base, self.len, self.offset, self.readonly) == (other.base, other.len, other.offset, other.readonly)
            && Arc::ptr_eq(&self.block, &other.block)
    }
}

pub(crate) struct Slot {
    pub(crate) id: u32,
    pub(crate) map: Mapping,
}

#[derive(Default)]
pub(crate) struct State {
    /// By first guest address.
    pub(crate) slots: BTreeMap<u64, Slot>,
    free: Vec<u32>,
    next: u32,
    gone: Vec<Mapping>,
    new: Vec<Mapping>,
    pub(crate) logging: bool,
    pub(crate) rings: Vec<DirtyRing>,
}

/// The slots of a VM.
pub struct Slots {
    pub(crate) vm: Arc<VmFd>,
    pub(crate) entries: Arc<Entries>,
    pub(crate) limits: SlotLimits,
    /// The kernel's number of the address space: 0, or 1 for system management mode.
    space: u32,
    state: Mutex<State>,
    failed: AtomicBool,
    failure: Mutex<String>,
    /// How often vCPUs were held out of the kernel for a change.
    held: AtomicU64,
}

impl Slots {
    /// None yet.
    pub fn new(vm: Arc<VmFd>, entries: Arc<Entries>, limits: SlotLimits, space: u32) -> Arc<Self> {
        Arc::new(Self {
            vm,
            entries,
            limits,
            space,
            state: Mutex::default(),
            failed: AtomicBool::new(false),
            failure: Mutex::default(),
            held: AtomicU64::new(0),
        })
    }

    pub(crate) fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What went wrong when the map changed, if anything did: no vCPU may run then.
    pub fn failure(&self) -> Option<String> {
        let failed = self.failed.load(Ordering::Acquire);
        failed.then(|| self.failure.lock().unwrap_or_else(PoisonError::into_inner).clone())
    }

    /// How often vCPUs were held out of the kernel for a change.
    pub fn times_held(&self) -> u64 {
        self.held.load(Ordering::Relaxed)
    }

    /// Number of slots in use.
    pub fn count(&self) -> usize {
        self.lock().slots.len()
    }

    fn fail(&self, reason: String) {
        log::error!("{reason}");
        *self.failure.lock().unwrap_or_else(PoisonError::into_inner) = reason;
        self.failed.store(true, Ordering::Release);
    }

    fn flags(&self, map: &Mapping, logging: bool) -> u32 {
        let log = if logging { KVM_MEM_LOG_DIRTY_PAGES } else { 0 };
        if map.readonly && self.limits.readonly { KVM_MEM_READONLY } else { log }
    }

    /// The kernel's number of a slot.
    pub(crate) fn number(&self, id: u32) -> u32 {
        self.space << 16 | id
    }

    pub(crate) fn set(&self, id: u32, map: &Mapping, len: u64, logging: bool) -> Result<(), kvm_ioctls::Error> {
        let flags = if len == 0 { 0 } else { self.flags(map, logging) };
        let (guest, block, offset) = (map.base, &*map.block, map.offset);
        ioctl::set_memory(&self.vm, SlotRequest { slot: self.number(id), flags, guest, len, block, offset })
    }

    fn remove(&self, state: &mut State, map: &Mapping) {
        let Some(slot) = state.slots.get(&map.base).filter(|s| s.map.same(map)) else { return };
        let id = slot.id;
        // What the guest wrote there until now is in the kernel's log only.
        if state.logging
            && let Err(e) = self.collect(state)
        {
            self.fail(format!("kvm: the log of written pages is lost: {e}"));
        }
        if let Err(e) = self.set(id, map, 0, false) {
            self.fail(format!("kvm: cannot take the memory at {:#x} away: {e}", map.base));
        }
        state.slots.remove(&map.base);
        state.free.push(id);
    }

    fn add(&self, state: &mut State, map: Mapping) {
        // Without read-only slots ROM is reached by exits, as on very old kernels.
        if map.readonly && !self.limits.readonly {
            return;
        }
        let id = match state.free.pop() {
            Some(id) => id,
            None if state.next < self.limits.slots => {
                state.next += 1;
                state.next - 1
            }
            None => {
                let most = self.limits.slots;
                return self.fail(format!("kvm: the machine's memory has more than {most} pieces"));
            }
        };
        if let Err(e) = self.set(id, &map, map.len, state.logging) {
            let (base, len) = (map.base, map.len);
            self.fail(format!("kvm: cannot map {len:#x} bytes of memory at {base:#x}: {e}"));
            state.free.push(id);
            return;
        }
        state.slots.insert(map.base, Slot { id, map });
    }

    /// Adds and removes a small slot, which makes a KVM that shadows page tables forget all of them.
    pub fn drop_shadows(&self, scratch: &Arc<RamBlock>) -> Result<(), kvm_ioctls::Error> {
        let mut state = self.lock();
        let end = state.slots.values().next_back().map_or(0, |s| s.map.base + s.map.len);
        let map = Mapping { base: end + PAGE_SIZE, len: PAGE_SIZE, block: scratch.clone(), offset: 0, readonly: false };
        let id = state.free.pop().unwrap_or_else(|| {
            state.next += 1;
            state.next - 1
        });
        state.free.push(id);
        self.set(id, &map, map.len, false)?;
        self.set(id, &map, 0, false)
    }
}

impl MemoryListener for Slots {
    fn begin(&self) {
        let mut state = self.lock();
        state.gone.clear();
        state.new.clear();
    }

    fn region_del(&self, range: &FlatRange) {
        if let Some(map) = Mapping::of(range) {
            self.lock().gone.push(map);
        }
    }

    fn region_add(&self, range: &FlatRange) {
        if let Some(map) = Mapping::of(range) {
            self.lock().new.push(map);
        }
    }

    fn commit(&self, _view: &Arc<FlatView>) {
        let mut state = self.lock();
        let mut gone = std::mem::take(&mut state.gone);
        let mut new = std::mem::take(&mut state.new);
        // What goes and comes back the same stays.
        gone.retain(|g| match new.iter().position(|n| n.same(g)) {
            Some(i) => {
                new.swap_remove(i);
                false
            }
            None => true,
        });
        let replaces = !gone.is_empty() && !new.is_empty();
        let mut apply = || {
            gone.iter().for_each(|map| self.remove(&mut state, map));
            new.drain(..).for_each(|map| self.add(&mut state, map));
        };
        if replaces {
            self.held.fetch_add(1, Ordering::Relaxed);
            self.entries.hold(apply);
        } else {
            apply();
        }
    }
}
