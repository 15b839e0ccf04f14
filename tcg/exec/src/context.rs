//! One address-space context of the software TLB: the arrays that generated code probes.
//!
//! A context is a sparse reservation of five arrays (see `ContextLayout`) indexed by bits 12..32 of the
//! virtual address, so there are almost no conflict misses, an empty context costs no memory, and 4 KiB of
//! host memory describe 2 MiB of guest addresses. Fills are remembered in a list: emptying a context costs as much
//! as filling it did.
#![allow(unsafe_code)]

use memmap2::{MmapMut, MmapOptions};
use mimus_tcg_ir::backend::ContextLayout;

use crate::ranges::{FilledRanges, IndexSet};

/// The empty tag at an index: it differs in bits 12 to 31 from every address that has the index, so that an exclusive-or of the two
/// is 4096 or more.
const fn invalid(index: usize) -> u64 {
    if index == 0 { !0 } else { 0 }
}

const PAGE: u64 = 4096;
const INDEX_MASK: u64 = (ContextLayout::ENTRIES - 1) as u64;

/// Large mappings of the guest's of which a page was filled: dropping any of it drops all (see [`Context::drop_page`]).
#[derive(Default)]
struct LargeRegions {
    /// First address and size, in order: a kernel's own map of its memory has hundreds.
    list: Vec<(u64, u64)>,
    /// All sizes, which are powers of two, together.
    sizes: u64,
}

impl LargeRegions {
    fn insert(&mut self, va: u64, size: u64) {
        let region = (va & !(size - 1), size);
        if let Err(place) = self.list.binary_search(&region) {
            self.list.insert(place, region);
        }
        self.sizes |= size;
    }

    /// Takes one with the page at `va` out.
    fn take(&mut self, va: u64) -> Option<(u64, u64)> {
        let mut sizes = self.sizes;
        while sizes != 0 {
            let size = 1 << sizes.trailing_zeros();
            if let Ok(place) = self.list.binary_search(&(va & !(size - 1), size)) {
                return Some(self.list.remove(place));
            }
            sizes &= sizes - 1;
        }
        None
    }

    fn clear(&mut self) {
        self.list.clear();
        self.sizes = 0;
    }
}

/// An index that was filled.
#[derive(Clone, Copy)]
struct Fill {
    index: u32,
    /// The fill before it of a host page with the same hash: its number counted from 1, or 0.
    next: u32,
    /// The host page's hash; none for code.
    hash: Option<u16>,
}

/// Lists of fills by their host page's hash.
const LISTS: usize = 1024;

fn hash_of(host: u64) -> u16 {
    // Fibonacci hashing: the upper bits of the product.
    ((host >> 12).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> (64 - LISTS.ilog2())) as u16
}

/// What a fill grants.
#[derive(Clone, Copy, Debug)]
pub struct DataFill {
    /// Page-aligned virtual address.
    pub va: u64,
    /// Host address of the page.
    pub host: u64,
    pub read: bool,
    pub write: bool,
    /// The entry goes away at the next [`Context::drop_local`].
    pub local: bool,
    /// Size of the guest's mapping in bytes.
    pub mapping_size: u64,
}

/// A page that is entered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Filled {
    pub va: u64,
    /// Host address of the page, if it is entered for data.
    pub host: Option<u64>,
    pub read: bool,
    pub write: bool,
    pub execute: bool,
}

/// The TLB and code maps of one address space.
pub struct Context {
    map: MmapMut,
    /// Indices that have been filled since the last flush (an index may appear more than once).
    fills: Vec<Fill>,
    /// The last fill with each hash, counted from 1: who looks for a host page need not go through all.
    lists: Box<[u32; LISTS]>,
    /// The subset to drop on [`Context::drop_local`].
    local: Vec<u32>,
    /// The indices of `local`.
    pub(crate) local_indices: IndexSet,
    large: LargeRegions,
    /// Range entries that are filled: those of other pages only, then those that go with local ones.
    pub(crate) ranges: [FilledRanges; 2],
    /// Those that generated code fills.
    pub(crate) roving: Vec<u32>,
}

impl Context {
    /// An empty context.
    ///
    /// # Errors
    /// The host has no address space left.
    pub fn new() -> std::io::Result<Context> {
        let map = MmapOptions::new().len(ContextLayout::SIZE).no_reserve_swap().map_anon()?;
        let mut context = Context {
            map,
            fills: Vec::new(),
            lists: Box::new([0; LISTS]),
            local: Vec::new(),
            local_indices: IndexSet::new(),
            large: LargeRegions::default(),
            ranges: [FilledRanges::new(), FilledRanges::new()],
            roving: Vec::new(),
        };
        // Zero-filled memory is an empty TLB but for index 0, where a tag of 0 is page 0's.
        context.clear(0);
        context.init_jumps();
        Ok(context)
    }

    /// What the GS base is to be while this context is current.
    pub fn base(&self) -> u64 {
        self.map.as_ptr() as u64
    }

    fn cell(&self, array: i32, index: usize) -> *mut u64 {
        debug_assert!(index < ContextLayout::ENTRIES);
        let offset = array as usize + index * 8;
        // SAFETY: the offset is inside the mapping: arrays are ENTRIES * 8 bytes and SIZE covers all five.
        unsafe { self.map.as_ptr().cast_mut().add(offset).cast() }
    }

    /// What is at an offset from the base; aligned to 8 bytes.
    pub(crate) fn cell_at(&self, offset: usize) -> *mut u64 {
        debug_assert!(offset + 8 <= ContextLayout::SIZE && offset.is_multiple_of(8));
        // SAFETY: inside the mapping.
        unsafe { self.map.as_ptr().cast_mut().add(offset).cast() }
    }

    pub(crate) fn get(&self, array: i32, index: usize) -> u64 {
        // SAFETY: `cell` is in the mapping and aligned; only this vCPU's thread reads or writes it.
        unsafe { self.cell(array, index).read() }
    }

    fn set(&mut self, array: i32, index: usize, value: u64) {
        // SAFETY: as in `get`; generated code, which also reads it, runs on this same thread.
        unsafe { self.cell(array, index).write(value) }
    }

    fn clear(&mut self, index: usize) {
        const L: ContextLayout = ContextLayout::STANDARD;
        for array in [L.read_tag, L.write_tag, L.exec_tag] {
            self.set(array, index, invalid(index));
        }
    }

    fn remember(&mut self, index: usize, va: u64, host: Option<u64>, local: bool, mapping_size: u64) {
        let mut fill = Fill { index: index as u32, next: 0, hash: host.map(hash_of) };
        let number = self.fills.len() as u32 + 1;
        if let Some(list) = fill.hash.and_then(|hash| self.lists.get_mut(usize::from(hash))) {
            fill.next = std::mem::replace(list, number);
        }
        self.fills.push(fill);
        if local {
            self.local.push(index as u32);
            self.local_indices.insert(index);
        }
        if mapping_size > PAGE {
            self.large.insert(va, mapping_size);
        }
    }

    /// Enters a RAM page for loads and stores.
    pub fn fill_data(&mut self, fill: &DataFill) {
        const L: ContextLayout = ContextLayout::STANDARD;
        let index = index_of(fill.va);
        let (read, write) = (self.get(L.read_tag, index), self.get(L.write_tag, index));
        let addend = fill.host.wrapping_sub(fill.va);
        let moved = self.get(L.addend, index) != addend;
        if read == fill.va && (moved || !fill.read) || write == fill.va && (moved || !fill.write) {
            self.drop_ranges_at(index, 1);
        }
        self.set(L.addend, index, addend);
        // The addend is shared: a tag of another page must not survive it.
        self.set(L.read_tag, index, if fill.read { fill.va } else { invalid(index) });
        self.set(L.write_tag, index, if fill.write { fill.va } else { invalid(index) });
        if (read != fill.va && write != fill.va) || moved || fill.local {
            self.remember(index, fill.va, Some(fill.host), fill.local, fill.mapping_size);
        }
    }

    /// Enters a page of code, whose entry table is at host address `table`.
    pub fn fill_code(&mut self, va: u64, table: u32, local: bool, mapping_size: u64) {
        const L: ContextLayout = ContextLayout::STANDARD;
        let index = index_of(va);
        if self.get(L.exec_tag, index) == va && self.get(L.exec_table, index) != u64::from(table) {
            self.drop_jumps();
        }
        self.set(L.exec_tag, index, va);
        self.set(L.exec_table, index, u64::from(table));
        self.remember(index, va, None, local, mapping_size);
    }

    /// The entry table of the page at `va` if it has been entered.
    pub fn code_table(&self, va: u64) -> Option<u32> {
        const L: ContextLayout = ContextLayout::STANDARD;
        let index = index_of(va);
        let tag = self.get(L.exec_tag, index);
        // Index 0's empty tag is no page's; elsewhere 0 never equals a page with that index.
        (tag == va & !(PAGE - 1)).then(|| self.get(L.exec_table, index) as u32)
    }

    /// Host address of `va` if a load hits.
    pub fn lookup_read(&self, va: u64) -> Option<u64> {
        const L: ContextLayout = ContextLayout::STANDARD;
        let index = index_of(va);
        (self.get(L.read_tag, index) == va & !(PAGE - 1)).then(|| va.wrapping_add(self.get(L.addend, index)))
    }

    /// Host address of `va` if a store hits.
    pub fn lookup_write(&self, va: u64) -> Option<u64> {
        const L: ContextLayout = ContextLayout::STANDARD;
        let index = index_of(va);
        (self.get(L.write_tag, index) == va & !(PAGE - 1)).then(|| va.wrapping_add(self.get(L.addend, index)))
    }

    /// Empties the context.
    pub fn flush(&mut self) {
        let fills = std::mem::take(&mut self.fills);
        for fill in &fills {
            self.clear(fill.index as usize);
            if let Some(list) = fill.hash.and_then(|hash| self.lists.get_mut(usize::from(hash))) {
                *list = 0;
            }
        }
        self.fills = fills;
        self.fills.clear();
        self.forget_local();
        self.large.clear();
        self.drop_ranges();
        self.drop_jumps();
    }

    /// Drops the entries that were filled as local.
    pub fn drop_local(&mut self) {
        let local = std::mem::take(&mut self.local);
        for &index in &local {
            self.clear(index as usize);
        }
        self.local = local;
        self.forget_local();
        self.drop_local_ranges();
        self.drop_jumps();
    }

    fn forget_local(&mut self) {
        for &index in &self.local {
            self.local_indices.remove(index as usize);
        }
        self.local.clear();
    }

    /// Whether any local entry is present.
    pub fn has_local(&self) -> bool {
        !self.local.is_empty()
    }

    /// Drops the page at `va`, and every page of the large mappings that contain it; also what differs from it in
    /// bits 32 and up only, since a guest whose addresses have 32 bits may have entered the page under several.
    pub fn drop_page(&mut self, va: u64) {
        self.drop_entry(va);
        let mut flush_all = false;
        while let Some((base, size)) = self.large.take(va) {
            if size > (2 << 20) {
                flush_all = true;
            } else {
                let (first, pages) = (index_of(base), (size / PAGE) as usize);
                self.drop_ranges_at(first, pages);
                for index in first..first + pages {
                    self.clear_if_used(index & INDEX_MASK as usize);
                }
            }
        }
        if flush_all {
            self.flush();
        }
    }

    /// Drops the page at `va` alone, whatever size the guest's mapping has.
    pub fn drop_entry(&mut self, va: u64) {
        self.clear_if_used(index_of(va));
        self.drop_ranges_at(index_of(va), 1);
    }

    /// Clears an index without touching host memory that was never filled.
    fn clear_if_used(&mut self, index: usize) {
        const L: ContextLayout = ContextLayout::STANDARD;
        // A jump entry says where code is whose page is in the arrays, or another with its index (see `far.rs`).
        if self.get(L.exec_tag, index) != invalid(index) {
            self.drop_jumps();
        }
        for array in [L.read_tag, L.write_tag, L.exec_tag] {
            // Page 0's tag is zero.
            if self.get(array, index) != 0 || index == 0 {
                self.set(array, index, invalid(index));
            }
        }
    }

    /// Revokes store permission for every address that maps host pages: those from `host` on whose bits are set.
    pub fn revoke_write(&mut self, host: u64, pages: u64) {
        if self.fills.is_empty() {
            return;
        }
        let mut left = pages;
        while left != 0 {
            self.revoke_page(host + u64::from(left.trailing_zeros()) * PAGE);
            left &= left - 1;
        }
        // Also where another page has taken an index over.
        self.drop_writable_ranges(host, (64 - u64::from(pages.leading_zeros())) * PAGE);
    }

    /// Drops what maps these pages of the host's, at any address, for data; and all ranges.
    pub(crate) fn drop_hosts(&mut self, hosts: &[u64]) {
        const L: ContextLayout = ContextLayout::STANDARD;
        if self.fills.is_empty() {
            return;
        }
        for &host in hosts {
            let mut number = self.lists[usize::from(hash_of(host))];
            while let Some(&fill) = (number as usize).checked_sub(1).and_then(|i| self.fills.get(i)) {
                number = fill.next;
                let index = fill.index as usize;
                for array in [L.read_tag, L.write_tag] {
                    let tag = self.get(array, index);
                    if tag != invalid(index) && tag.wrapping_add(self.get(L.addend, index)) == host {
                        self.set(array, index, invalid(index));
                    }
                }
            }
        }
        self.drop_ranges();
    }

    fn revoke_page(&mut self, host: u64) {
        const L: ContextLayout = ContextLayout::STANDARD;
        let mut number = self.lists[usize::from(hash_of(host))];
        while let Some(&fill) = (number as usize).checked_sub(1).and_then(|i| self.fills.get(i)) {
            number = fill.next;
            let index = fill.index as usize;
            let tag = self.get(L.write_tag, index);
            if tag != invalid(index) && tag.wrapping_add(self.get(L.addend, index)) == host {
                self.set(L.write_tag, index, invalid(index));
            }
        }
    }

    /// What is entered, by address.
    pub fn filled(&self) -> Vec<Filled> {
        const L: ContextLayout = ContextLayout::STANDARD;
        let mut indices: Vec<u32> = self.fills.iter().map(|fill| fill.index).collect();
        indices.sort_unstable();
        indices.dedup();
        let mut out: Vec<Filled> = Vec::new();
        for index in indices.into_iter().map(|i| i as usize) {
            let (read, write) = (self.get(L.read_tag, index), self.get(L.write_tag, index));
            let execute = self.get(L.exec_tag, index);
            // Memory that was never written is an empty entry too, but for page 0's.
            let filled = |tag: &u64| index_of(*tag) == index;
            let mut tags: Vec<u64> = [read, write, execute].into_iter().filter(filled).collect();
            tags.dedup();
            for va in tags {
                let (read, write) = (read == va, write == va);
                // The addend is that of data.
                let host = (read || write).then(|| va.wrapping_add(self.get(L.addend, index)));
                out.push(Filled { va, host, read, write, execute: execute == va });
            }
        }
        out.sort_unstable_by_key(|e| e.va);
        out.dedup();
        out
    }

    /// Number of fills since the last flush.
    pub fn fill_count(&self) -> usize {
        self.fills.len()
    }
}

pub(crate) fn index_of(va: u64) -> usize {
    ((va >> 12) & INDEX_MASK) as usize
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn large_regions_are_found_by_any_of_their_pages() {
        let mut regions = LargeRegions::default();
        assert_eq!(regions.take(0), None);
        for (va, size) in [(0x40_5000, 2 << 20), (0x7000, 64 << 10), (0x5f_f000, 2 << 20), (!0xfff, 1 << 30)] {
            regions.insert(va, size);
        }
        assert_eq!(regions.list.len(), 3);
        assert_eq!((regions.take(0x60_0000), regions.take(0x3f_f000), regions.take(0x1_0000)), (None, None, None));
        assert_eq!(regions.take(0x55_5000), Some((0x40_0000, 2 << 20)));
        assert_eq!((regions.take(0x55_5000), regions.take(0xf000)), (None, Some((0, 64 << 10))));
        assert_eq!(regions.take(!0xfff_ffff), Some((!0x3fff_ffff, 1 << 30)));
        regions.insert(0, 2 << 20);
        regions.clear();
        assert_eq!((regions.take(0), regions.sizes), (None, 0));
    }

    fn data(va: u64, host: u64, write: bool) -> DataFill {
        DataFill { va, host, read: true, write, local: false, mapping_size: PAGE }
    }

    #[test]
    fn page_zero_is_empty_at_first() {
        let c = Context::new().unwrap();
        assert_eq!(c.lookup_read(0), None);
        assert_eq!(c.code_table(0), None);
    }

    #[test]
    fn page_zero_can_be_dropped() {
        let mut c = Context::new().unwrap();
        c.fill_data(&data(0, 0x7000_0000, true));
        assert_eq!(c.lookup_read(8), Some(0x7000_0008));
        c.drop_page(0);
        assert_eq!(c.lookup_read(8), None);
        c.fill_data(&DataFill { mapping_size: 2 << 20, ..data(0, 0x7000_0000, true) });
        c.drop_page(0x10_0000);
        assert_eq!(c.lookup_read(8), None, "as part of a large mapping");
    }

    #[test]
    fn a_page_is_dropped_under_every_name_of_32_bits() {
        let mut c = Context::new().unwrap();
        let name = 0xffff_ffff_ffff_f000;
        c.fill_data(&data(name, 0x7000_0000, true));
        c.drop_page(0xffff_f000);
        assert_eq!(c.lookup_read(name), None);
    }

    #[test]
    fn fill_hits_and_flush_empties() {
        let mut c = Context::new().unwrap();
        c.fill_data(&data(0xffff_ffff_8000_1000, 0x7000_0000, true));
        assert_eq!(c.lookup_read(0xffff_ffff_8000_1234), Some(0x7000_0234));
        assert_eq!(c.lookup_read(0x8000_1234), None, "the upper half is compared too");
        c.flush();
        assert_eq!(c.lookup_read(0xffff_ffff_8000_1234), None);
    }

    #[test]
    fn dropping_one_page_of_a_large_mapping_drops_all_of_it() {
        let mut c = Context::new().unwrap();
        let mut f = data(0x20_3000, 0x7000_3000, true);
        f.mapping_size = 2 << 20;
        c.fill_data(&f);
        c.drop_page(0x3f_f000);
        assert_eq!(c.lookup_read(0x20_3000), None);
    }

    #[test]
    fn local_entries_go_alone() {
        let mut c = Context::new().unwrap();
        c.fill_data(&data(0x1000, 0x7000_0000, true));
        c.fill_data(&DataFill { local: true, ..data(0x2000, 0x7000_1000, true) });
        c.drop_local();
        assert!(c.lookup_read(0x1000).is_some());
        assert!(c.lookup_read(0x2000).is_none());
    }

    #[test]
    fn what_is_entered() {
        let mut c = Context::new().unwrap();
        c.fill_data(&data(0x5000, 0x7000_0000, false));
        c.fill_data(&data(0x2000, 0x7000_1000, true));
        c.fill_code(0x2000, 1, false, PAGE);
        c.fill_code(0xffff_ffff_8000_5000, 2, false, PAGE);
        c.fill_data(&data(0x9000, 0x7000_3000, true));
        c.drop_page(0x9000);
        let of = |va, host, read, write, execute| Filled { va, host, read, write, execute };
        let wanted = [
            of(0x2000, Some(0x7000_1000), true, true, true),
            of(0x5000, Some(0x7000_0000), true, false, false),
            of(0xffff_ffff_8000_5000, None, false, false, true),
        ];
        assert_eq!(c.filled(), wanted);
    }

    #[test]
    fn every_name_of_a_page_loses_its_permission() {
        let mut c = Context::new().unwrap();
        let host = |n: u64| 0x7000_0000 + n * PAGE;
        for n in 0..5000 {
            c.fill_data(&data(0x10_0000 + n * PAGE, host(n % 1700), true));
        }
        // Another page under a name that was in use.
        c.fill_data(&data(0x10_0000, host(3), true));
        c.revoke_write(host(3), 1);
        for n in 0..5000 {
            let va = 0x10_0000 + n * PAGE;
            let revoked = n % 1700 == 3 || n == 0;
            assert_eq!(c.lookup_write(va).is_none(), revoked, "{n}");
        }
        c.flush();
        c.fill_data(&data(0x10_0000, host(3), true));
        c.revoke_write(host(4), 1);
        assert!(c.lookup_write(0x10_0000).is_some());
        c.revoke_write(host(3), 1);
        assert!(c.lookup_write(0x10_0000).is_none());
    }

    #[test]
    fn pages_of_the_host_s_are_dropped_at_every_address() {
        let mut c = Context::new().unwrap();
        for n in 0..3000 {
            c.fill_data(&data(0x10_0000 + n * PAGE, 0x7000_0000 + n % 1000 * PAGE, n % 2 == 0));
        }
        c.fill_code(0x10_3000, 0x100, false, PAGE);
        c.drop_hosts(&[0x7000_3000, 0x7000_0000 + 998 * PAGE, 0x6000_0000]);
        for n in 0..3000 {
            let va = 0x10_0000 + n * PAGE;
            let dropped = n % 1000 == 3 || n % 1000 == 998;
            assert_eq!(
                (c.lookup_read(va).is_none(), c.lookup_write(va).is_none()),
                (dropped, dropped || n % 2 != 0),
                "{n}"
            );
        }
        assert_eq!(c.code_table(0x10_3000), Some(0x100));
    }

    #[test]
    fn revoked_pages_stay_readable() {
        let mut c = Context::new().unwrap();
        c.fill_data(&data(0x1000, 0x7000_0000, true));
        c.revoke_write(0x7000_0000, 1);
        assert!(c.lookup_read(0x1000).is_some());
        assert_eq!(c.get(ContextLayout::STANDARD.write_tag, 1), invalid(1));
    }
}
