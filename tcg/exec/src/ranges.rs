//! Range entries of a context: where single accesses of hot code expect to stay (see `ContextLayout`).
//!
//! An entry may say no more than the page entries it was made from, and goes when one of them does. That another page
//! takes an index over does not matter: what is dropped later is looked for among the ranges in any case.
#![allow(unsafe_code)]

use mimus_tcg_ir::Size;
use mimus_tcg_ir::backend::ContextLayout;

use crate::context::{Context, index_of};

const PAGE: u64 = 4096;
const L: ContextLayout = ContextLayout::STANDARD;
/// An access that misses this often ...
const MISSES: u32 = 32;
/// ... within this many microseconds first has its range made longer, then is better served by the page entries.
const MICROSECONDS: u32 = 32;
/// The same for those with long ranges, which take longer to find.
const MICROSECONDS_LONG: u32 = 1000;
/// Pages that are looked at in each direction for a range, and for a long one.
const REACH: [u64; 2] = [4, 256];
/// The bit of [`Entry::fills`] that says that ranges are long.
const LONG: u32 = 1 << 31;

/// A range entry in memory.
#[derive(Clone, Copy, Default)]
#[repr(C)]
struct Entry {
    first: u64,
    /// Behind `first`, where accesses may begin, perhaps in multiples of their size; 0: empty.
    limit: u64,
    addend: u64,
    /// Where the second part begins, and what to add there.
    boundary: u64,
    second: u64,
    /// Bytes of both.
    len: u64,
    /// Times it was filled since it was empty, and [`LONG`].
    fills: u32,
    /// When that was last a multiple of [`MISSES`].
    since: u32,
    /// Where in [`Context::ranges`] it is, if it is not empty.
    place: u32,
}

/// What a filled range entry spans, for those who look for pages in all of them.
#[derive(Clone, Copy)]
pub(crate) struct FilledRange {
    number: u32,
    /// Index of the first page, and how many there are.
    index: u32,
    pages: u32,
}

/// A range of pages with one addend.
#[derive(Clone, Copy)]
struct Part {
    first: u64,
    len: u64,
    addend: u64,
}

impl Part {
    fn end(&self) -> u64 {
        self.first.wrapping_add(self.len)
    }

    /// An entry without a second part.
    fn alone(self) -> Entry {
        let Part { first, len, addend } = self;
        Entry { first, len, addend, boundary: !0, second: addend, ..Entry::default() }
    }

    /// An entry of this and the one of `others` that is beside it, if one is.
    fn beside(self, others: &[Part; 2]) -> Entry {
        let before = others.iter().find(|part| part.len != 0 && part.end() == self.first && self.first != 0);
        let behind = others.iter().find(|part| part.len != 0 && part.first == self.end() && part.first != 0);
        let (low, high) = match (before, behind) {
            (Some(low), _) => (*low, self),
            (None, Some(high)) => (self, *high),
            _ => return self.alone(),
        };
        Entry {
            first: low.first,
            len: low.len + high.len,
            addend: low.addend,
            boundary: high.first,
            second: high.addend,
            ..Entry::default()
        }
    }
}

impl Entry {
    /// The parts; an empty one has no length.
    fn parts(&self) -> [Part; 2] {
        if self.limit == 0 {
            return [Part { first: 0, len: 0, addend: 0 }; 2];
        }
        let low = self.boundary.wrapping_sub(self.first).min(self.len);
        [
            Part { first: self.first, len: low, addend: self.addend },
            Part { first: self.boundary, len: self.len - low, addend: self.second },
        ]
    }
}

impl Context {
    fn entry(&self, number: u32) -> *mut Entry {
        assert!((number as usize) < ContextLayout::RANGES, "a range entry");
        // The entries are behind the arrays of 8-byte words.
        self.cell_at(L.ranges as usize + number as usize * ContextLayout::RANGE_BYTES).cast()
    }

    fn read_entry(&self, number: u32) -> Entry {
        // SAFETY: in the mapping and aligned; only this vCPU's thread reads or writes it. Any bits are an entry.
        unsafe { self.entry(number).read() }
    }

    fn write_entry(&mut self, number: u32, entry: Entry) {
        // SAFETY: as in `read_entry`.
        unsafe { self.entry(number).write(entry) }
    }

    /// After an access at `va` that missed range entry `number`: lets it say what the page entries around say.
    /// `now`: microseconds. Whether the access misses too often.
    pub fn fill_range(&mut self, number: u32, va: u64, size: Size, now: impl FnOnce() -> u32) -> bool {
        let tags = if ContextLayout::range_is_write(number) { L.write_tag } else { L.read_tag };
        let page = va & !(PAGE - 1);
        let addend = self.get(L.addend, index_of(page));
        let grants = |page: u64| {
            let index = index_of(page);
            self.get(tags, index) == page && self.get(L.addend, index) == addend
        };
        if !grants(page) {
            return false;
        }
        let old = self.read_entry(number);
        let long = old.fills & LONG != 0;
        let reach = REACH[usize::from(long)];
        let old_parts = old.parts();
        let (mut first, mut end) = (page, page.wrapping_add(PAGE));
        match old_parts.iter().find(|part| part.addend == addend && part.len != 0 && part.end() == page) {
            Some(part) => first = part.first,
            None => {
                for _ in 0..reach {
                    match first.wrapping_sub(PAGE) {
                        before if before < first && grants(before) => first = before,
                        _ => break,
                    }
                }
            }
        }
        for _ in 0..reach {
            // A range does not wrap.
            if end == 0 || !grants(end) {
                break;
            }
            end = end.wrapping_add(PAGE);
        }
        let found = Part { first, len: end.wrapping_sub(first), addend };
        let size = u64::from(size.bytes());
        let parts = ContextLayout::range_has_parts(number);
        let mut entry = if parts { found.beside(&old_parts) } else { found.alone() };
        entry.limit = if parts { entry.len / size } else { entry.len - (size - 1) };
        (entry.fills, entry.since) = (old.fills.wrapping_add(1), old.since);
        let filled = FilledRange { number, index: index_of(entry.first) as u32, pages: (entry.len >> 12) as u32 };
        entry.place = if old.limit == 0 { self.ranges.len() as u32 } else { old.place };
        match self.ranges.get_mut(entry.place as usize) {
            Some(place) => *place = filled,
            None => self.ranges.push(filled),
        }
        let mut scattered = false;
        if old.fills.is_multiple_of(MISSES) {
            entry.since = now();
            let too_often = if long { MICROSECONDS_LONG } else { MICROSECONDS };
            if old.fills != 0 && entry.since.wrapping_sub(old.since) < too_often {
                scattered = long;
                entry.fills = LONG | 1;
            }
        }
        self.write_entry(number, entry);
        scattered
    }

    /// Empties all range entries.
    pub(crate) fn drop_ranges(&mut self) {
        for filled in std::mem::take(&mut self.ranges) {
            self.write_entry(filled.number, Entry::default());
        }
    }

    /// Empties those that say something of a page with this index.
    pub(crate) fn drop_ranges_at(&mut self, index: usize) {
        const MASK: u32 = ContextLayout::ENTRIES as u32 - 1;
        self.drop_ranges_where(|_, filled| (index as u32).wrapping_sub(filled.index) & MASK < filled.pages);
    }

    /// Empties those that let stores through to the host page `host`.
    pub(crate) fn drop_writable_ranges(&mut self, host: u64) {
        let maps = |part: &Part| host.wrapping_sub(part.first.wrapping_add(part.addend)) < part.len;
        self.drop_ranges_where(|context, filled| {
            ContextLayout::range_is_write(filled.number) && context.read_entry(filled.number).parts().iter().any(maps)
        });
    }

    fn drop_ranges_where(&mut self, goes: impl Fn(&Context, FilledRange) -> bool) {
        let mut i = 0;
        while let Some(&filled) = self.ranges.get(i) {
            if !goes(self, filled) {
                i += 1;
                continue;
            }
            self.write_entry(filled.number, Entry::default());
            self.ranges.swap_remove(i);
            if let Some(moved) = self.ranges.get(i).copied() {
                let entry = Entry { place: i as u32, ..self.read_entry(moved.number) };
                self.write_entry(moved.number, entry);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::context::DataFill;

    const HOST: u64 = 0x7000_0000;

    fn fill(c: &mut Context, va: u64, host: u64) {
        c.fill_data(&DataFill { va, host, read: true, write: true, local: false, mapping_size: PAGE });
    }

    fn load(n: u32) -> u32 {
        ContextLayout::range(n, Size::B4, false, false)
    }

    fn store(n: u32) -> u32 {
        ContextLayout::range(n, Size::B4, true, false)
    }

    /// What generated code does.
    fn hits(c: &Context, number: u32, va: u64) -> Option<u64> {
        let entry = c.read_entry(number);
        (va.wrapping_sub(entry.first) < entry.limit).then(|| va.wrapping_add(entry.addend))
    }

    #[test]
    fn a_range_is_what_the_pages_around_say() {
        let mut c = Context::new().unwrap();
        for page in [0x5000, 0x6000, 0x7000] {
            fill(&mut c, page, HOST + page);
        }
        fill(&mut c, 0x8000, HOST);
        assert_eq!(hits(&c, load(0), 0), None, "an empty entry");
        assert!(!c.fill_range(load(0), 0x6010, Size::B4, || 0));
        for va in [0x5000, 0x6ffe, 0x7ffc] {
            assert_eq!(hits(&c, load(0), va), Some(HOST + va));
        }
        for va in [0x4fff, 0x7ffd, 0x8000] {
            assert_eq!(hits(&c, load(0), va), None, "{va:#x}");
        }
        c.fill_range(load(0), 0x9000, Size::B4, || 0);
        assert_eq!(hits(&c, load(0), 0x6000), Some(HOST + 0x6000), "nothing is known of the page");
    }

    #[test]
    fn the_first_page_and_the_last() {
        let mut c = Context::new().unwrap();
        fill(&mut c, 0, HOST);
        fill(&mut c, 0u64.wrapping_sub(PAGE), HOST - PAGE);
        c.fill_range(load(0), 8, Size::B4, || 0);
        c.fill_range(load(1), !7, Size::B4, || 0);
        assert_eq!((hits(&c, load(0), 0), hits(&c, load(0), !3)), (Some(HOST), None));
        assert_eq!((hits(&c, load(1), !3), hits(&c, load(1), !2)), (Some(HOST - 4), None));
    }

    #[test]
    fn a_range_goes_with_any_of_its_pages() {
        let mut c = Context::new().unwrap();
        let ready = |c: &mut Context| {
            for page in [0x5000, 0x6000, 0x20_5000] {
                fill(c, page, HOST + page);
            }
            c.fill_range(load(0), 0x5000, Size::B4, || 0);
            c.fill_range(load(1), 0x20_5000, Size::B4, || 0);
            c.fill_range(store(0), 0x5000, Size::B4, || 0);
            assert!(hits(c, load(0), 0x6000).is_some() && hits(c, store(0), 0x6000).is_some());
        };
        ready(&mut c);
        c.drop_page(0x6000);
        assert_eq!((hits(&c, load(0), 0x5000), hits(&c, store(0), 0x5000)), (None, None));
        assert!(hits(&c, load(1), 0x20_5000).is_some());
        ready(&mut c);
        c.drop_entry(0xffff_ffff_0000_5000);
        assert_eq!(hits(&c, load(0), 0x6000), None, "under another name of 32 bits");
        ready(&mut c);
        c.revoke_write(HOST + 0x6000);
        assert_eq!((hits(&c, load(0), 0x5000), hits(&c, store(0), 0x5000)), (Some(HOST + 0x5000), None));
        ready(&mut c);
        c.fill_data(&DataFill { va: 0x6000, host: HOST, read: true, write: false, local: false, mapping_size: PAGE });
        assert_eq!((hits(&c, load(0), 0x5000), hits(&c, store(0), 0x6000)), (None, None), "it has moved");
        for drop in [Context::flush, Context::drop_local] {
            ready(&mut c);
            drop(&mut c);
            assert_eq!((hits(&c, load(0), 0x5000), hits(&c, load(1), 0x20_5000)), (None, None));
            assert!(c.ranges.is_empty());
        }
        ready(&mut c);
        let large =
            DataFill { va: 0x6000, host: HOST + 0x6000, read: true, write: true, local: false, mapping_size: 2 << 20 };
        c.drop_page(0x6000);
        c.fill_data(&large);
        c.fill_range(load(0), 0x6000, Size::B4, || 0);
        c.drop_page(0x10_0000);
        assert_eq!(hits(&c, load(0), 0x6000), None, "of a large mapping");
    }

    #[test]
    fn another_page_of_the_same_index_leaves_a_range_that_can_still_be_dropped() {
        let mut c = Context::new().unwrap();
        fill(&mut c, 0x5000, HOST);
        c.fill_range(store(0), 0x5000, Size::B4, || 0);
        fill(&mut c, 0x1_0000_5000, HOST + PAGE);
        assert_eq!(hits(&c, store(0), 0x5000), Some(HOST));
        c.revoke_write(HOST);
        assert_eq!(hits(&c, store(0), 0x5000), None);
        fill(&mut c, 0x5000, HOST);
        c.fill_range(store(0), 0x5000, Size::B4, || 0);
        fill(&mut c, 0x1_0000_5000, HOST + PAGE);
        c.drop_page(0x5000);
        assert_eq!(hits(&c, store(0), 0x5000), None);
    }

    #[test]
    fn accesses_that_miss_often_are_told_from_those_that_go_on() {
        let mut c = Context::new().unwrap();
        for n in 0..100 {
            fill(&mut c, 0x10_0000 + 2 * n * PAGE, HOST + n * PAGE);
        }
        let mut run = |number: u32, microseconds_a_miss: u32| {
            (0..100).any(|n| {
                let va = 0x10_0000 + 2 * u64::from(n) * PAGE;
                c.fill_range(number, va, Size::B4, || n * microseconds_a_miss)
            })
        };
        assert!(run(load(0), 0));
        assert!(!run(load(1), 10));
    }

    /// What generated code does with an entry of two parts.
    fn hits_parts(c: &Context, number: u32, va: u64) -> Option<u64> {
        let entry = c.read_entry(number);
        let addend = if va >= entry.boundary { entry.second } else { entry.addend };
        (va.wrapping_sub(entry.first).rotate_right(2) < entry.limit).then(|| va.wrapping_add(addend))
    }

    #[test]
    fn two_parts_are_neighbours_with_addends_of_their_own() {
        let mut c = Context::new().unwrap();
        let hosts = [HOST + 0x9000, HOST + 0x3000, HOST + 0x4000, HOST];
        for (page, host) in [0x5000, 0x6000, 0x7000, 0x8000].into_iter().zip(hosts) {
            fill(&mut c, page, host);
        }
        let number = ContextLayout::range(0, Size::B4, true, true);
        assert_eq!(hits_parts(&c, number, 0), None);
        c.fill_range(number, 0x6010, Size::B4, || 0);
        assert_eq!(hits_parts(&c, number, 0x7ffc), Some(HOST + 0x4ffc));
        assert_eq!((hits_parts(&c, number, 0x8000), hits_parts(&c, number, 0x5ffc)), (None, None));
        // The one before, then the one behind in its place.
        c.fill_range(number, 0x5010, Size::B4, || 0);
        for (va, host) in [(0x5000, HOST + 0x9000), (0x5ffc, HOST + 0x9ffc), (0x6000, HOST + 0x3000)] {
            assert_eq!(hits_parts(&c, number, va), Some(host));
        }
        assert_eq!((hits_parts(&c, number, 0x5ffe), hits_parts(&c, number, 0x8000)), (None, None));
        c.fill_range(number, 0x8010, Size::B4, || 0);
        for (va, host) in [(0x6000, HOST + 0x3000), (0x7ffc, HOST + 0x4ffc), (0x8ffc, HOST + 0xffc)] {
            assert_eq!(hits_parts(&c, number, va), Some(host));
        }
        assert_eq!((hits_parts(&c, number, 0x5ffc), hits_parts(&c, number, 0x9000)), (None, None));
        // Either part takes both along.
        c.revoke_write(HOST + 0x4000);
        assert_eq!(hits_parts(&c, number, 0x8000), None);
        c.fill_range(number, 0x8010, Size::B4, || 0);
        c.fill_range(number, 0x6010, Size::B4, || 0);
        assert_eq!(hits_parts(&c, number, 0x8000), None, "the page between cannot be written");
        c.drop_page(0x6000);
        assert_eq!(hits_parts(&c, number, 0x6000), None);
    }

    #[test]
    fn a_range_grows_page_by_page() {
        let mut c = Context::new().unwrap();
        for n in 0..3000 {
            let page = 0x10_0000 + n * PAGE;
            fill(&mut c, page, HOST + n * PAGE);
            c.fill_range(load(0), page, Size::B1, || 0);
            assert_eq!(hits(&c, load(0), 0x10_0000), Some(HOST));
            assert_eq!(hits(&c, load(0), page + PAGE - 4), Some(HOST + (n + 1) * PAGE - 4));
        }
    }
}
