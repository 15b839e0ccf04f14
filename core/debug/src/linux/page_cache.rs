//! A file as far as the kernel has it in memory: the page cache (Documentation/core-api/xarray.rst), which for programs on
//! a RAM disk is all of it.
//!
//! The cache holds `struct page`s. Which frame one is of is found from pages that are mapped too, whose frames the page
//! tables tell; nothing need be known of how the kernel arranges them.

use std::collections::HashMap;

use super::btf::Btf;
use super::memory::Memory;

/// Deepest tree: 64 bits, four or six at a time.
const LEVELS: u32 = 16;

/// A file's pages.
pub struct Cache<'a> {
    m: &'a Memory<'a>,
    head: u64,
    /// In `xa_node`; `chunk` of them.
    shift: u64,
    slots: u64,
    chunk: u64,
    /// In `struct page`, and its bytes.
    index: u64,
    page: u64,
    /// The `struct page` of frame 0.
    first: u64,
    /// Bytes of the file.
    pub size: u64,
}

impl<'a> Cache<'a> {
    /// Of a `struct file`. `mapped`: numbers of pages in the file that are known to be at physical addresses.
    pub fn open(m: &'a Memory<'a>, types: &Btf, file: u64, mapped: &[(u64, u64)]) -> Option<Cache<'a>> {
        let at = |structure, path| types.member(structure, path).map(|f| f.offset());
        let pointer = |from: u64, offset: u64| m.long(from.wrapping_add(offset)).filter(|to| m.is_kernel(*to));
        let inode = pointer(file, at("file", "f_inode")?)?;
        let mapping = pointer(file, at("file", "f_mapping")?)?;
        let slots = types.member("xa_node", "slots")?;
        let chunk = slots.size / m.word as u64;
        let mut cache = Cache {
            m,
            head: m.long(mapping.wrapping_add(at("address_space", "i_pages.xa_head")?))?,
            shift: at("xa_node", "shift")?,
            slots: slots.offset(),
            chunk: chunk.is_power_of_two().then_some(chunk)?,
            index: at("folio", "index").or_else(|| at("page", "index"))?,
            page: types.size_of("page").filter(|size| *size != 0)?,
            first: 0,
            size: m.number(inode.wrapping_add(at("inode", "i_size")?), 8)?,
        };
        let mut votes: HashMap<u64, usize> = HashMap::new();
        for (number, pa) in mapped {
            if let Some(page) = cache.structure(*number) {
                *votes.entry(page.wrapping_sub((pa >> 12).wrapping_mul(cache.page))).or_default() += 1;
            }
        }
        // A page that was written to is a copy.
        let (first, _) = votes.into_iter().max_by_key(|(_, n)| *n).filter(|(_, n)| 2 * n >= mapped.len().min(2))?;
        cache.first = first;
        Some(cache)
    }

    /// The physical address of a page of the file.
    pub fn frame(&self, number: u64) -> Option<u64> {
        let distance = self.structure(number)?.wrapping_sub(self.first);
        (distance.is_multiple_of(self.page) && distance / self.page < 1 << 40).then(|| distance / self.page * 4096)
    }

    /// Its `struct page`.
    fn structure(&self, number: u64) -> Option<u64> {
        let (word, mut entry) = (self.m.word as u64, self.head);
        let mut first = true;
        for _ in 0..LEVELS {
            let node = entry & 3 == 2 && entry > 4096;
            if !node {
                // Nothing, or a value: what was written out.
                let folio = (entry & 3 == 0 && self.m.is_kernel(entry)).then_some(entry)?;
                let begin = self.m.long(folio.wrapping_add(self.index))?;
                let behind = number.checked_sub(begin).filter(|n| *n < 1 << 20)?;
                return Some(folio.wrapping_add(behind * self.page));
            }
            let node = entry & !3;
            let shift = self.m.number(node.wrapping_add(self.shift), 1).filter(|s| *s < 64)?;
            let slot = number >> shift;
            if first && slot >= self.chunk {
                return None;
            }
            let load = |slot: u64| self.m.long(node.wrapping_add(self.slots).wrapping_add(slot * word));
            entry = load(slot & (self.chunk - 1))?;
            // One of several slots that are one entry names the first of them.
            if entry & 3 == 2 && entry < 4 * self.chunk {
                entry = load(entry >> 2)?;
            }
            first = false;
        }
        None
    }
}
