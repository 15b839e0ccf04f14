//! Pages that become code: no TLB lets stores through to them from then on, so that every store is noticed.
//!
//! A page's flags say which vCPUs' TLBs may have store permission for it. Who makes it a page of code takes these marks off, has
//! those vCPUs withdraw the permission, and waits until they have. Since that stops them, and programs are read to memory page
//! behind page, the pages around lose their marks and the permission with it: they can become code without any asking.

use std::sync::atomic::Ordering;

use mimus_core::accel::VcpuIndex;
use mimus_core::memory::{PAGE_CODE, RamBlock};

use crate::code::{Counts, PageKey};
use crate::env::{Cpu, Request};
use crate::frontend::GuestFrontend;

const PAGE: u64 = 4096;

/// Page flags: a TLB of the vCPUs with one of these marks has, or had, store permission for the page.
const STORES_CACHED: u8 = 0b0111_1100;
/// Page flag: the marks have been taken off, but not all vCPUs have withdrawn the permission yet.
const REVOKING: u8 = 1 << 7;

const FIRST_MARK: u32 = STORES_CACHED.trailing_zeros();
const MARKS: u32 = STORES_CACHED.count_ones();

/// Pages whose permissions are withdrawn together: aligned, and as many as a word has bits.
pub(crate) const GROUP: u64 = 64;

/// The mark of a vCPU, and of every so many behind it.
pub(crate) const fn mark_of(index: VcpuIndex) -> u8 {
    1 << (FIRST_MARK + index.0 % MARKS)
}

/// Pages of a block: the first, and which of those from there on.
struct Group<'a> {
    block: &'a RamBlock,
    first: u64,
    pages: u64,
    /// Marks that they had.
    marks: u8,
}

impl Group<'_> {
    /// Takes the marks off pages around that are not code, if there are none but those of `may_ask`.
    fn collect(&mut self, may_ask: u8) {
        let end = (self.first + GROUP).min(self.block.page_count());
        for page in self.first..end {
            let flags = self.block.page_flags(page);
            let before = flags.load(Ordering::Relaxed);
            let marks = before & STORES_CACHED;
            if before & (PAGE_CODE | REVOKING) != 0 || marks == 0 || marks & !may_ask != 0 {
                continue;
            }
            let after = before & !STORES_CACHED | REVOKING;
            if flags.compare_exchange(before, after, Ordering::SeqCst, Ordering::SeqCst).is_ok() {
                self.pages |= 1 << (page - self.first);
                self.marks |= marks;
            }
        }
    }

    /// Second addresses of those that are gathered.
    fn second_addresses(&self) -> impl Iterator<Item = u64> {
        let of = |bit: u64| self.block.place_of(self.first + bit).and_then(|place| self.block.second_address(place));
        (0..GROUP).filter(|bit| self.pages >> bit & 1 != 0).filter_map(of).map(|host| host as u64)
    }

    fn is_done(&self) {
        for page in (0..GROUP).filter(|bit| self.pages >> bit & 1 != 0) {
            self.block.page_flags(self.first + page).fetch_and(!REVOKING, Ordering::SeqCst);
        }
    }
}

impl<F: GuestFrontend> Cpu<F> {
    /// Marks a page as code, so that stores to it are noticed, and answers its stamp. `None`: not now.
    pub(crate) fn claim(&mut self, key: PageKey, pa: u64, in_guest: bool) -> Option<u32> {
        let machine = self.machine.clone();
        loop {
            let (block, page) = self.code_block(pa)?;
            let flags = block.page_flags(page);
            let before = flags.load(Ordering::SeqCst);
            if before & REVOKING != 0 {
                if in_guest {
                    return None;
                }
                // Who revokes waits for vCPUs that are in guest code, and this one is not.
                std::thread::yield_now();
                continue;
            }
            let marks = before & STORES_CACHED;
            if before & PAGE_CODE != 0 || marks == 0 {
                match machine.store.begin(key, flags, before, before | PAGE_CODE) {
                    Some(stamp) => return Some(stamp),
                    None => continue,
                }
            }
            // Every vCPU that may store withdraws its permission before the page's bytes are read. In guest code this one
            // can only wait for itself.
            let may_ask = if in_guest { self.own_mark() } else { STORES_CACHED };
            if marks & !may_ask != 0 {
                return None;
            }
            let after = before & !STORES_CACHED | PAGE_CODE | REVOKING;
            let Some(stamp) = machine.store.begin(key, flags, before, after) else { continue };
            let first = page / GROUP * GROUP;
            let mut group = Group { block: &block, first, pages: 1 << (page - first), marks };
            group.collect(may_ask);
            self.revoke_writes(&group);
            group.is_done();
            return Some(stamp);
        }
    }

    /// The mark of this vCPU if no other has it.
    fn own_mark(&self) -> u8 {
        if self.machine.peers().len() > MARKS as usize { 0 } else { mark_of(self.index()) }
    }

    /// Has the group's store permissions withdrawn by all vCPUs that may have some.
    fn revoke_writes(&mut self, group: &Group<'_>) {
        let host = group.block.host_ptr(group.first * PAGE) as u64;
        let machine = self.machine.clone();
        let counts = machine.store.counts();
        Counts::add(&counts.revocations, 1);
        if group.marks & mark_of(self.index()) != 0 {
            self.mmu.revoke_write(host, group.pages);
            for host in group.second_addresses() {
                self.mmu.revoke_write(host, 1);
            }
        }
        let peers = machine.peers();
        let others = || {
            let is_asked = |index: VcpuIndex| index != self.index() && group.marks & mark_of(index) != 0;
            peers.iter().filter(move |p| is_asked(p.mailbox.index))
        };
        for peer in others() {
            Counts::add(&counts.asked, 1);
            peer.post(Request::RevokeWrite(host, group.pages));
            for host in group.second_addresses() {
                peer.post(Request::RevokeWrite(host, 1));
            }
        }
        for peer in others() {
            peer.wait_outside();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn marks_are_the_flags_of_stores() {
        let all = (0..MARKS).fold(0, |all, n| all | mark_of(VcpuIndex(n)));
        assert_eq!((all, all & (PAGE_CODE | mimus_core::memory::PAGE_DIRTY | REVOKING)), (STORES_CACHED, 0));
        assert_eq!(mark_of(VcpuIndex(MARKS + 1)), mark_of(VcpuIndex(1)));
    }
}
