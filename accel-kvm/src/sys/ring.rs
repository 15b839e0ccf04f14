// UNSAFE: rings shared with the kernel.
//! The rings that KVM fills: coalesced writes (one per VM) and dirty pages (one per vCPU).
//!
//! Spec: `Documentation/virt/kvm/api.rst` sections 4.116 (coalesced I/O) and 8.29 (dirty ring).
#![allow(unsafe_code)]

use kvm_bindings::{KVM_COALESCED_MMIO_PAGE_OFFSET, KVM_DIRTY_LOG_PAGE_OFFSET, kvm_coalesced_mmio, kvm_dirty_gfn};
use memmap2::{MmapOptions, MmapRaw};
use std::io;
use std::mem::size_of;
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Mutex, PoisonError};

const PAGE: usize = 4096;
/// `first` and `last` of the coalesced ring, before its entries.
const RING_HEADER: usize = 8;
const RING_ENTRIES: u32 = ((PAGE - RING_HEADER) / size_of::<kvm_coalesced_mmio>()) as u32;

/// A write the kernel kept for later.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CoalescedWrite {
    pub pio: bool,
    pub addr: u64,
    pub len: u32,
    pub data: [u8; 8],
}

/// The ring of coalesced writes.
pub struct CoalescedRing {
    map: MmapRaw,
    /// One reader at a time: writes stay in order.
    reader: Mutex<()>,
}

impl CoalescedRing {
    /// Maps it through any vCPU of the VM.
    pub fn map(vcpu: &impl AsRawFd) -> io::Result<Self> {
        let offset = u64::from(KVM_COALESCED_MMIO_PAGE_OFFSET) * PAGE as u64;
        Ok(Self {
            map: MmapOptions::new().len(PAGE).offset(offset).map_raw(vcpu.as_raw_fd())?,
            reader: Mutex::default(),
        })
    }

    fn index(&self, which: usize) -> &AtomicU32 {
        // SAFETY: the first two words of the page, which is mapped as long as self, are the ring's indices;
        // both sides access them as single words.
        unsafe { AtomicU32::from_ptr(self.map.as_mut_ptr().cast::<u32>().add(which)) }
    }

    /// True if nothing was collected by now that has not been made.
    pub fn is_empty(&self) -> bool {
        self.index(0).load(Ordering::Acquire) == self.index(1).load(Ordering::Acquire)
    }

    /// Has all collected writes made, the oldest first. One leaves the ring when it is made: whoever finds the ring empty
    /// comes after all of them.
    pub fn drain(&self, mut make: impl FnMut(&CoalescedWrite)) {
        let _one = self.reader.lock().unwrap_or_else(PoisonError::into_inner);
        loop {
            let first = self.index(0).load(Ordering::Relaxed) % RING_ENTRIES;
            if first == self.index(1).load(Ordering::Acquire) % RING_ENTRIES {
                return;
            }
            let at = RING_HEADER + first as usize * size_of::<kvm_coalesced_mmio>();
            // SAFETY: `first` is below the number of entries that fit the page. The kernel does not write an
            // entry again before `first` has passed it.
            let (entry, pio) = unsafe {
                let entry = self.map.as_mut_ptr().add(at).cast::<kvm_coalesced_mmio>().read();
                (entry, entry.__bindgen_anon_1.pio != 0)
            };
            make(&CoalescedWrite { pio, addr: entry.phys_addr, len: entry.len.min(8), data: entry.data });
            self.index(0).store((first + 1) % RING_ENTRIES, Ordering::Release);
        }
    }
}

/// `kvm_dirty_gfn.flags`: filled by the kernel.
const DIRTY: u32 = 1;
/// `kvm_dirty_gfn.flags`: collected by us.
const COLLECTED: u32 = 2;

/// The dirty ring of a vCPU. One collector at a time.
pub struct DirtyRing {
    map: MmapRaw,
    entries: u32,
    next: u32,
}

impl DirtyRing {
    /// Maps it; `entries` is a power of two, as the VM was set up with.
    pub fn map(vcpu: &impl AsRawFd, entries: u32) -> io::Result<Self> {
        let offset = u64::from(KVM_DIRTY_LOG_PAGE_OFFSET) * PAGE as u64;
        let len = entries as usize * size_of::<kvm_dirty_gfn>();
        let map = MmapOptions::new().len(len).offset(offset).map_raw(vcpu.as_raw_fd())?;
        Ok(Self { map, entries, next: 0 })
    }

    /// Takes the oldest page: slot number and page in it.
    pub fn pop(&mut self) -> Option<(u32, u64)> {
        let at = (self.next & (self.entries - 1)) as usize;
        let entry = self.map.as_mut_ptr().cast::<kvm_dirty_gfn>().wrapping_add(at);
        // SAFETY: the index is below the number of entries, all of which are mapped; flags are accessed as
        // atomics on both sides, and the rest is the kernel's no longer once DIRTY is seen.
        unsafe {
            let flags = AtomicU32::from_ptr(&raw mut (*entry).flags);
            if flags.load(Ordering::Acquire) & DIRTY == 0 {
                return None;
            }
            let page = ((&raw const (*entry).slot).read(), (&raw const (*entry).offset).read());
            flags.store(COLLECTED, Ordering::Release);
            self.next = self.next.wrapping_add(1);
            Some(page)
        }
    }
}
