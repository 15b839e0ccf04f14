//! The contexts of one vCPU: which exist, which is current, and what to drop.

use std::time::Instant;

use mimus_core::accel::RememberedTranslation;
use mimus_core::bus::{GuestPhys, GuestVirt};
use mimus_core::memory::FlatView;
use mimus_tcg_ir::Size;

use crate::context::{Context, DataFill, Filled};
use crate::ranges::Verdict;

/// How many contexts a vCPU keeps. The one used longest ago makes room.
const CONTEXTS: usize = 40;

struct Entry {
    key: u64,
    last_use: u64,
    context: Context,
}

/// The software MMU's cached state of a vCPU.
///
/// A *key* names an address space as the frontend sees it (mode, privilege, ASID …); equal keys share a
/// context, which therefore survives switches between them.
pub struct Mmu {
    entries: Vec<Entry>,
    current: usize,
    clock: u64,
    /// Which one was current before.
    previous: usize,
    /// Times that contexts lost entries by the thousand, perhaps; and how many of them there were at the last sample.
    losses: u64,
    losses_at_sample: u64,
    /// What times are counted from.
    began: Instant,
}

impl Mmu {
    /// An MMU whose current context has key `key`.
    ///
    /// # Errors
    /// The host has no address space left.
    pub fn new(key: u64) -> std::io::Result<Mmu> {
        let entries = vec![Entry { key, last_use: 0, context: Context::new()? }];
        Ok(Mmu { entries, current: 0, clock: 0, previous: 0, losses: 0, losses_at_sample: 0, began: Instant::now() })
    }

    /// Makes the context of `key` current; answers its base for the GS register.
    pub fn switch(&mut self, key: u64) -> u64 {
        if self.entries[self.current].key != key {
            let next = self.find_or_make(key);
            self.previous = std::mem::replace(&mut self.current, next);
            self.clock += 1;
            self.entries[self.current].last_use = self.clock;
        }
        self.base()
    }

    fn find_or_make(&mut self, key: u64) -> usize {
        if let Some(i) = self.entries.iter().position(|e| e.key == key) {
            return i;
        }
        self.losses += 1;
        if self.entries.len() < CONTEXTS
            && let Ok(context) = Context::new()
        {
            self.entries.push(Entry { key, last_use: 0, context });
            return self.entries.len() - 1;
        }
        let oldest = (0..self.entries.len()).min_by_key(|&i| self.entries[i].last_use).unwrap_or(0);
        self.entries[oldest].context.flush();
        self.entries[oldest].key = key;
        oldest
    }

    /// Whether contexts have kept what they had, but for a few times, since this was asked last.
    pub(crate) fn calm_since_sample(&mut self) -> bool {
        const FEW: u64 = 4;
        let before = std::mem::replace(&mut self.losses_at_sample, self.losses);
        self.losses - before <= FEW
    }

    /// The current context's base.
    pub fn base(&self) -> u64 {
        self.entries[self.current].context.base()
    }

    /// The current context's key.
    pub fn key(&self) -> u64 {
        self.entries[self.current].key
    }

    /// The current context.
    pub fn context(&self) -> &Context {
        &self.entries[self.current].context
    }

    /// A context whose key has `bits` in `mask`, if there is one: of several the one that was current last.
    pub(crate) fn context_with(&self, mask: u64, bits: u64) -> Option<&Context> {
        let matches = |e: &&Entry| e.key & mask == bits;
        let previous = self.entries.get(self.previous).filter(matches);
        let found = previous.or_else(|| self.entries.iter().filter(matches).max_by_key(|e| e.last_use));
        found.map(|e| &e.context)
    }

    pub(crate) fn fill_data(&mut self, fill: &DataFill) {
        self.entries[self.current].context.fill_data(fill);
    }

    pub(crate) fn fill_code(&mut self, va: u64, table: u32, local: bool, mapping_size: u64) {
        self.entries[self.current].context.fill_code(va, table, local, mapping_size);
    }

    /// See [`Context::fill_range`]; for the current context. `counted`: the time, in microseconds, of a vCPU whose time is its
    /// instructions.
    pub(crate) fn fill_range(&mut self, number: u32, va: u64, size: Size, counted: Option<u32>, soon: bool) -> Verdict {
        let began = self.began;
        let now = || counted.unwrap_or_else(|| began.elapsed().as_micros() as u32);
        self.entries[self.current].context.fill_range(number, va, size, now, soon)
    }

    /// See [`Context::judge_jump`]; for the current context, with time as for [`Mmu::fill_range`].
    pub(crate) fn judge_jump(&mut self, number: u32, counted: Option<u32>) -> bool {
        let now = counted.unwrap_or_else(|| self.began.elapsed().as_micros() as u32);
        self.entries[self.current].context.judge_jump(number, now)
    }

    /// What is remembered, the current context's first.
    pub(crate) fn list(&self, view: &FlatView) -> Vec<RememberedTranslation> {
        let mut order: Vec<usize> = (0..self.entries.len()).collect();
        order.sort_by_key(|i| *i != self.current);
        let mut out = Vec::new();
        for i in order {
            let Entry { key, context, .. } = &self.entries[i];
            let of = |e: Filled| RememberedTranslation {
                space: *key,
                current: i == self.current,
                va: GuestVirt(e.va),
                pa: e.host.and_then(|host| physical(view, host)),
                read: e.read,
                write: e.write,
                execute: e.execute,
            };
            out.extend(context.filled().into_iter().map(of));
        }
        out
    }

    /// Empties every context.
    pub fn flush_all(&mut self) {
        self.losses += 1;
        for e in &mut self.entries {
            e.context.flush();
        }
    }

    /// Empties the contexts whose key `matches`.
    pub fn flush_where(&mut self, matches: impl Fn(u64) -> bool) {
        self.losses += 1;
        for e in self.entries.iter_mut().filter(|e| matches(e.key)) {
            e.context.flush();
        }
    }

    /// Drops the entries filled as local from the contexts whose key `matches`.
    pub fn drop_local_where(&mut self, matches: impl Fn(u64) -> bool) {
        self.losses += 1;
        for e in self.entries.iter_mut().filter(|e| matches(e.key)) {
            e.context.drop_local();
        }
    }

    /// Drops what maps the page at `va` from the contexts whose key `matches`.
    pub fn drop_page_where(&mut self, va: u64, matches: impl Fn(u64) -> bool) {
        for e in self.entries.iter_mut().filter(|e| matches(e.key)) {
            e.context.drop_page(va);
        }
    }

    /// Drops the entries of the page at `va` alone from all contexts: it will be entered again.
    pub(crate) fn drop_exactly(&mut self, va: u64) {
        for e in &mut self.entries {
            e.context.drop_entry(va);
        }
    }

    /// See [`Context::drop_hosts`]; in all contexts.
    pub(crate) fn drop_hosts(&mut self, hosts: &[u64]) {
        for e in &mut self.entries {
            e.context.drop_hosts(hosts);
        }
    }

    /// See [`Context::revoke_write`]; in all contexts.
    pub(crate) fn revoke_write(&mut self, host: u64, pages: u64) {
        for e in &mut self.entries {
            e.context.revoke_write(host, pages);
        }
    }
}

/// Where a page of the host's memory is in the guest's.
fn physical(view: &FlatView, host: u64) -> Option<GuestPhys> {
    view.ranges().iter().find_map(|r| {
        let (block, offset) = r.ram_at(r.base)?;
        let host = block.offset_of_second(host).map_or(host, |second| block.host_ptr(second) as u64);
        let from_begin = host.wrapping_sub(block.host_ptr(offset) as u64);
        (from_begin < r.len).then(|| GuestPhys(r.base.0 + from_begin))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn contexts_are_found_by_parts_of_their_keys() {
        let mut mmu = Mmu::new(0x10).unwrap();
        for key in [0x21, 0x32, 0x12, 0x30] {
            mmu.switch(key);
        }
        let bases: Vec<u64> = mmu.entries.iter().map(|e| e.context.base()).collect();
        let find = |mmu: &Mmu, mask, bits| mmu.context_with(mask, bits).map(Context::base);
        assert_eq!((find(&mmu, 0xf0, 0x20), find(&mmu, 0xf0, 0x40)), (Some(bases[1]), None));
        assert_eq!(find(&mmu, 0x0f, 2), Some(bases[3]), "the one that was current before");
        mmu.switch(0x21);
        mmu.switch(0x22);
        assert_eq!(find(&mmu, 0xf0, 0x10), Some(bases[3]), "of two the one that was current last");
        assert_eq!((find(&mmu, 0x0f, 0), find(&mmu, 0xf0, 0x20)), (Some(bases[4]), Some(bases[1])));
    }

    #[test]
    fn contexts_that_are_emptied_now_and_then_are_calm() {
        let mut mmu = Mmu::new(0).unwrap();
        assert!(mmu.calm_since_sample());
        for _ in 0..2 {
            mmu.drop_local_where(|_| true);
            mmu.drop_page_where(0x1000, |_| true);
            mmu.switch(1);
            mmu.switch(0);
        }
        assert!(mmu.calm_since_sample());
        for key in 0..10 {
            mmu.switch(100 + key);
        }
        assert!(!mmu.calm_since_sample());
        for key in 0..10 {
            mmu.switch(100 + key);
        }
        assert!(mmu.calm_since_sample(), "they were there");
        for _ in 0..10 {
            mmu.drop_local_where(|_| true);
        }
        assert!(!mmu.calm_since_sample());
    }
}
