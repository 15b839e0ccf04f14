//! A vCPU that executes single instructions of a guest which another engine runs: what that engine cannot execute.
//!
//! The other engine's guest changes its page tables and its code without this vCPU's noticing, so that nothing is
//! remembered of either from one instruction to the next: accesses walk the tables and enter nothing into the TLB, and
//! instructions are executed by [`Cpu::step_careful`].
//!
//! Every page that is stored to is marked as dirty and kept as it was before: whoever lent the vCPU its guest can tell
//! whether something was changed that the other engine had to see, such as page tables.

use std::cell::{Cell, RefCell};
use std::sync::atomic::Ordering;

use mimus_core::accel::VcpuExit;
use mimus_core::memory::{PAGE_DIRTY, RamBlock};

use crate::access::{copy_code, copy_page};
use crate::env::Cpu;
use crate::frontend::{Access, CodePage, GuestFrontend};

const PAGE: u64 = 4096;

/// A page as it was before the first store to it.
struct Stored {
    host: *const u8,
    before: Box<CodePage>,
}

/// What is known about the instructions executed since the guest was lent.
#[derive(Default)]
pub(crate) struct Lent {
    /// The first `count` are in use, the others keep their memory.
    stored: RefCell<Vec<Stored>>,
    count: Cell<usize>,
    /// Accesses to anything but RAM abandon their instruction.
    ram_only: Cell<bool>,
    abandoned: Cell<bool>,
}

impl Lent {
    pub fn begin(&self) {
        self.count.set(0);
        self.ram_only.set(false);
        self.abandoned.set(false);
    }

    /// Before a store to the page of `offset`.
    pub fn note_store(&self, block: &RamBlock, offset: u64) {
        let host = block.host_ptr(offset & !(PAGE - 1)).cast_const();
        let mut stored = self.stored.borrow_mut();
        let count = self.count.get();
        if stored[..count].iter().any(|s| s.host == host) {
            return;
        }
        block.page_flags(offset / PAGE).fetch_or(PAGE_DIRTY, Ordering::Relaxed);
        if count == stored.len() {
            stored.push(Stored { host, before: Box::new([0; PAGE as usize]) });
        }
        let place = &mut stored[count];
        place.host = host;
        copy_page(host, &mut place.before);
        self.count.set(count + 1);
    }
}

impl<F: GuestFrontend> Cpu<F> {
    /// Whether an access to a device abandons its instruction; notes that it did.
    pub(crate) fn refuses_devices(&self) -> bool {
        let Some(lent) = self.lent.as_ref().filter(|l| l.ram_only.get()) else { return false };
        lent.abandoned.set(true);
        true
    }

    /// From now on an instruction that accesses anything but RAM is abandoned before it has changed anything, as if it
    /// had faulted: see [`Cpu::abandoned`].
    pub fn set_ram_only(&self, on: bool) {
        if let Some(lent) = &self.lent {
            lent.ram_only.set(on);
        }
    }

    /// An instruction was abandoned: instead of taking the fault its access ended with, the frontend leaves everything
    /// as it was.
    pub fn abandoned(&self) -> bool {
        self.lent.as_ref().is_some_and(|l| l.abandoned.get())
    }

    /// For a guest that was lent: each page stored to since, as it was before and as it is now.
    pub fn stored_pages(&self, mut f: impl FnMut(&CodePage, &CodePage)) {
        let Some(lent) = &self.lent else { return };
        let mut now = Box::new([0; PAGE as usize]);
        for page in &lent.stored.borrow()[..lent.count.get()] {
            copy_page(page.host, &mut now);
            f(&page.before, &now);
        }
    }

    /// Bytes of code from `va` on, as many as are mapped and in memory.
    pub fn peek_code(&mut self, va: u64, out: &mut [u8]) -> usize {
        let mut done = 0;
        while done < out.len() {
            let at = va.wrapping_add(done as u64);
            let Some((pa, _)) = F::debug_walk(self, at, Access::Fetch) else { break };
            let Some((host, _)) = self.code_page(pa) else { break };
            let offset = (at & (PAGE - 1)) as usize;
            let part = (out.len() - done).min(PAGE as usize - offset);
            copy_code(host, offset, &mut out[done..done + part]);
            done += part;
        }
        done
    }

    /// The first guest physical address behind everything there is.
    pub fn memory_end(&self) -> u64 {
        self.view.ranges().last().map_or(0, |r| r.end())
    }

    /// Why the vCPU stopped for good, if it did.
    pub fn take_stopped(&mut self) -> Option<VcpuExit> {
        self.stopped.take()
    }
}
