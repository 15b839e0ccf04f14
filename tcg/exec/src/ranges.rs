//! Range entries of a context: where single accesses of hot code expect to stay (see `ContextLayout`).
//!
//! An entry may say no more than the page entries it was made from, and goes when one of them does. That another page
//! takes an index over does not matter: what is dropped later is looked for among the ranges in any case.
#![allow(unsafe_code)]

use std::ops::Range;

use mimus_tcg_ir::Size;
use mimus_tcg_ir::backend::ContextLayout;

use crate::context::{Context, index_of};

const PAGE: u64 = 4096;
const L: ContextLayout = ContextLayout::STANDARD;
/// Misses that are served by the page entries before an entry is filled anew, at step 0. Each step doubles them.
const PATIENCE: u32 = 8;
/// The step after the last.
const STEPS: u8 = 13;
/// Filling an entry again within this many microseconds does not pay: one step up.
const TOO_SOON: u32 = 1000;
/// After this long the step is halved ...
const LATER: u32 = 4 * TOO_SOON;
/// ... and after this long it is 0.
const MUCH_LATER: u32 = 100 * TOO_SOON;
/// An access that strays from its range, and gets to this step, first has its range made longer.
const STEP_LONG: u8 = 4;
/// At this step, with a long range, it is better served by the page entries alone.
const STEP_SCATTERED: u8 = 6;
/// Misses of an access whose entry roves until it is looked at again, ...
const ROVES: u32 = 1024;
/// ... and how many microseconds they have to last: a miss takes some 10 ns more than a look-up.
const ROVES_LONG: u32 = ROVES / 2;
/// Pages that are looked at in each direction for a range, for a long one, and where that is all one, too.
const REACH: [u64; 3] = [4, 256, MOST_GATHERED];
/// Pages that are gathered together, at most (see `gather`).
pub(crate) const MOST_GATHERED: u64 = 2048;

/// Whether an access that missed its range is served by one.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Verdict {
    Stays,
    /// It had better have one of two parts.
    InParts,
    /// It had better have none.
    Scatters,
}

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
    /// Misses until the entry is filled again; all ones: now.
    patience: u32,
    /// The power of two that [`PATIENCE`] is multiplied with.
    step: u8,
    /// How long ranges are: which [`REACH`].
    long: u8,
    /// Whether it goes with local pages: which list it is in.
    local: u8,
    /// Whether generated code fills it, with the page of each access that missed: it is in [`Context::roving`] then, and in no other
    /// list.
    roves: u8,
    /// Bytes of both parts.
    len: u64,
    /// When it was filled, in microseconds.
    since: u32,
    /// Where in its list it is, if it is not empty.
    place: u32,
}

const _: () = assert!(
    size_of::<Entry>() == ContextLayout::RANGE_BYTES
        && std::mem::offset_of!(Entry, patience) == ContextLayout::RANGE_PATIENCE
        && std::mem::offset_of!(Entry, roves) == ContextLayout::RANGE_ROVES
);

/// What a filled range entry spans, for those who look for pages in all of them.
#[derive(Clone, Copy)]
struct FilledRange {
    number: u32,
    /// Index of the first page, and how many there are.
    index: u32,
    pages: u32,
}

/// A set of indices of pages.
pub(crate) struct IndexSet(Vec<u64>);

impl IndexSet {
    pub(crate) fn new() -> IndexSet {
        IndexSet(vec![0; ContextLayout::ENTRIES / 64])
    }

    pub(crate) fn insert(&mut self, index: usize) {
        self.0[index / 64] |= 1 << (index % 64);
    }

    pub(crate) fn remove(&mut self, index: usize) {
        self.0[index / 64] &= !(1 << (index % 64));
    }

    /// Does `f` to the words with `pages` indices from `first` on, which may go round, and to which bits of them.
    fn words(&mut self, first: usize, pages: usize, mut f: impl FnMut(&mut u64, u64)) {
        let (mut at, mut left) = (first % ContextLayout::ENTRIES, pages.min(ContextLayout::ENTRIES));
        while left != 0 {
            let bit = at % 64;
            let count = left.min(64 - bit);
            f(&mut self.0[at / 64], (!0 >> (64 - count)) << bit);
            (at, left) = ((at + count) % ContextLayout::ENTRIES, left - count);
        }
    }

    fn insert_all(&mut self, filled: FilledRange) {
        self.words(filled.index as usize, filled.pages as usize, |word, bits| *word |= bits);
    }

    fn contains_any(&mut self, filled: FilledRange) -> bool {
        let mut any = 0;
        self.words(filled.index as usize, filled.pages as usize, |word, bits| any |= *word & bits);
        any != 0
    }

    /// Whether any was in it.
    fn remove_all(&mut self, first: usize, pages: usize) -> bool {
        let mut any = 0;
        self.words(first, pages, |word, bits| {
            any |= *word & bits;
            *word &= !bits;
        });
        any != 0
    }
}

/// Range entries that are filled.
pub(crate) struct FilledRanges {
    list: Vec<FilledRange>,
    /// Indices of the pages in them, and perhaps of others that were.
    covered: IndexSet,
}

impl FilledRanges {
    pub(crate) fn new() -> FilledRanges {
        FilledRanges { list: Vec::new(), covered: IndexSet::new() }
    }

    /// Enters `filled` at `place`, or behind all others if there is none; where it is.
    fn put(&mut self, place: Option<u32>, filled: FilledRange) -> u32 {
        self.covered.insert_all(filled);
        match place.and_then(|place| Some((place, self.list.get_mut(place as usize)?))) {
            Some((place, at)) => {
                *at = filled;
                place
            }
            None => {
                self.list.push(filled);
                self.list.len() as u32 - 1
            }
        }
    }
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
    /// An access missed as often as was allowed, `after` microseconds from the last time: how often it may miss from now on.
    /// Whether it had better have no range.
    fn pace(&mut self, after: u32, strayed: bool) -> bool {
        self.step = match after {
            0..TOO_SOON => (self.step + 1).min(STEPS - 1),
            TOO_SOON..LATER => self.step,
            LATER..MUCH_LATER => self.step / 2,
            _ => 0,
        };
        let mut scattered = false;
        if strayed && after < TOO_SOON {
            scattered = self.long != 0 && self.step >= STEP_SCATTERED;
            if self.long == 0 && self.step >= STEP_LONG {
                (self.long, self.step) = (1, 0);
            }
        }
        self.patience = (PATIENCE << self.step) - 1;
        scattered
    }

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

    /// Empties an entry. What is known of its access stays.
    fn empty_entry(&mut self, number: u32) {
        // SAFETY: as in `read_entry`.
        unsafe { (&raw mut (*self.entry(number)).limit).write(0) }
    }

    /// After an access at `va` that missed range entry `number`: if it is time, lets it say what the page entries around
    /// say. `now`: microseconds. `soon`: for tests, every other entry roves at once.
    pub fn fill_range(&mut self, number: u32, va: u64, size: Size, now: impl FnOnce() -> u32, soon: bool) -> Verdict {
        let old = self.read_entry(number);
        if old.patience != u32::MAX {
            return Verdict::Stays;
        }
        // What is in two pages says nothing of ranges: the next miss is told.
        if va & (PAGE - 1) > PAGE - u64::from(size.bytes()) {
            self.write_entry(number, Entry { patience: 0, ..old });
            return Verdict::Stays;
        }
        let mut next = Entry { since: now(), ..old };
        if old.roves != 0 {
            return self.judge_roving(number, va, &old, next.since);
        }
        let strayed = old.limit != 0;
        let mut scattered = next.pace(next.since.wrapping_sub(old.since), strayed);
        let found = self.range_around(number, va, &old, next.long);
        if scattered && next.long == 1 && found.is_some_and(|(_, found)| found.len > REACH[1] * PAGE) {
            (next.long, next.step, scattered) = (2, 0, false);
        }
        if (scattered || soon && !number.is_multiple_of(2)) && !ContextLayout::range_has_parts(number) {
            self.rove(number, &old, next.since);
            return Verdict::Stays;
        }
        let verdict = if scattered { Verdict::Scatters } else { Verdict::Stays };
        if let Some((page, found)) = found {
            self.enter_range(number, size, (page, found), (old, next));
        } else {
            self.write_entry(number, next);
        }
        verdict
    }

    /// From now on generated code has the entry follow its access from page to page.
    fn rove(&mut self, number: u32, old: &Entry, since: u32) {
        if old.limit != 0 {
            self.unlist(usize::from(old.local != 0), old.place as usize);
        }
        self.roving.push(number);
        self.write_entry(number, Entry { roves: 1, patience: ROVES - 1, since, ..Entry::default() });
    }

    /// An access at `va` whose entry roves has missed often: not if that took long.
    fn judge_roving(&mut self, number: u32, va: u64, old: &Entry, now: u32) -> Verdict {
        if now.wrapping_sub(old.since) >= ROVES_LONG {
            self.write_entry(number, Entry { patience: ROVES - 1, since: now, ..*old });
            return Verdict::Stays;
        }
        self.roving.retain(|other| *other != number);
        let step = STEPS - 1;
        self.write_entry(number, Entry { patience: (PATIENCE << step) - 1, step, since: now, ..Entry::default() });
        let page = va & !(PAGE - 1);
        let is_beside = [old.first.wrapping_add(PAGE), old.first.wrapping_sub(PAGE)].contains(&page);
        if old.limit != 0 && is_beside { Verdict::InParts } else { Verdict::Scatters }
    }

    /// Empties what generated code has filled since this was done last: it is quickly filled again.
    fn drop_roving(&mut self) {
        // SAFETY: as in `read_entry`.
        if unsafe { self.cell_at(L.roved as usize).replace(0) } == 0 {
            return;
        }
        for i in 0..self.roving.len() {
            self.empty_entry(self.roving[i]);
        }
    }

    /// The pages around `va` that its access may have and that are one range, as far as is looked; and its page.
    fn range_around(&self, number: u32, va: u64, old: &Entry, long: u8) -> Option<(u64, Part)> {
        let tags = if ContextLayout::range_is_write(number) { L.write_tag } else { L.read_tag };
        let page = va & !(PAGE - 1);
        let addend = self.get(L.addend, index_of(page));
        let grants = |page: u64| {
            let index = index_of(page);
            self.get(tags, index) == page && self.get(L.addend, index) == addend
        };
        if !grants(page) {
            return None;
        }
        let reach = REACH[usize::from(long).min(REACH.len() - 1)];
        let (mut first, mut end) = (page, page.wrapping_add(PAGE));
        match old.parts().iter().find(|part| part.addend == addend && part.len != 0 && part.end() == page) {
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
        Some((page, Part { first, len: end.wrapping_sub(first), addend }))
    }

    /// Pages around `va` that may be read and follow one another for the guest, wherever they are in RAM; none if its own may not.
    pub(crate) fn pages_around(&self, va: u64) -> Range<u64> {
        let grants = |page: u64| self.get(L.read_tag, index_of(page)) == page;
        let page = va & !(PAGE - 1);
        if !grants(page) {
            return page..page;
        }
        // Nothing wraps, nor ends at the end of all addresses.
        let before =
            (1..MOST_GATHERED / 2).take_while(|n| page.checked_sub(n * PAGE).is_some_and(grants)).count() as u64;
        let is_behind = |n: &u64| page.checked_add((n + 1) * PAGE).is_some() && grants(page + n * PAGE);
        let behind = (0..MOST_GATHERED / 2).take_while(is_behind).count() as u64;
        page - before * PAGE..page + behind * PAGE
    }

    /// Fills an entry: `next` is what is known of its access.
    fn enter_range(&mut self, number: u32, size: Size, (page, found): (u64, Part), (old, next): (Entry, Entry)) {
        let size = u64::from(size.bytes());
        let parts = ContextLayout::range_has_parts(number);
        let mut entry = if parts { found.beside(&old.parts()) } else { found.alone() };
        entry.limit = if parts { entry.len / size } else { entry.len - (size - 1) };
        let filled = FilledRange { number, index: index_of(entry.first) as u32, pages: (entry.len >> 12) as u32 };
        debug_assert!(page.wrapping_sub(entry.first) < entry.len);
        let local = self.local_indices.contains_any(filled);
        let stays = old.limit != 0 && (old.local != 0) == local;
        if old.limit != 0 && !stays {
            self.unlist(usize::from(old.local != 0), old.place as usize);
        }
        let place = self.ranges[usize::from(local)].put(stays.then_some(old.place), filled);
        let Entry { patience, step, long, since, .. } = next;
        self.write_entry(number, Entry { patience, step, long, since, local: u8::from(local), place, ..entry });
    }

    /// Empties all range entries.
    pub(crate) fn drop_ranges(&mut self) {
        self.drop_roving();
        self.drop_ranges_in(0);
        self.drop_ranges_in(1);
    }

    /// Empties those that say something of local pages.
    pub(crate) fn drop_local_ranges(&mut self) {
        self.drop_roving();
        self.drop_ranges_in(1);
    }

    fn drop_ranges_in(&mut self, list: usize) {
        let filled = std::mem::take(&mut self.ranges[list].list);
        for filled in &filled {
            self.empty_entry(filled.number);
            self.ranges[list].covered.remove_all(filled.index as usize, filled.pages as usize);
        }
        self.ranges[list].list = filled;
        self.ranges[list].list.clear();
    }

    /// Empties those that say something of a page with one of `pages` indices from this one on.
    pub(crate) fn drop_ranges_at(&mut self, index: usize, pages: usize) {
        const MASK: u32 = ContextLayout::ENTRIES as u32 - 1;
        self.drop_roving();
        for list in 0..self.ranges.len() {
            if self.ranges[list].covered.remove_all(index, pages) {
                let (first, pages) = (index as u32, pages as u32);
                self.drop_ranges_where(list, |_, filled| {
                    first.wrapping_sub(filled.index) & MASK < filled.pages
                        || filled.index.wrapping_sub(first) & MASK < pages
                });
            }
        }
    }

    /// Empties those that let stores through to any of `len` bytes of the host's from `host` on.
    pub(crate) fn drop_writable_ranges(&mut self, host: u64, len: u64) {
        self.drop_roving();
        let maps = |part: &Part| {
            let first = part.first.wrapping_add(part.addend);
            host.wrapping_sub(first) < part.len || first.wrapping_sub(host) < len && part.len != 0
        };
        for list in 0..self.ranges.len() {
            self.drop_ranges_where(list, |context, filled| {
                ContextLayout::range_is_write(filled.number)
                    && context.read_entry(filled.number).parts().iter().any(maps)
            });
        }
    }

    fn drop_ranges_where(&mut self, list: usize, goes: impl Fn(&Context, FilledRange) -> bool) {
        let mut i = 0;
        while let Some(&filled) = self.ranges[list].list.get(i) {
            if goes(self, filled) {
                self.empty_entry(filled.number);
                self.unlist(list, i);
            } else {
                i += 1;
            }
        }
    }

    /// Takes the `i`th out of a list.
    fn unlist(&mut self, list: usize, i: usize) {
        self.ranges[list].list.swap_remove(i);
        if let Some(moved) = self.ranges[list].list.get(i).copied() {
            let entry = Entry { place: i as u32, ..self.read_entry(moved.number) };
            self.write_entry(moved.number, entry);
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

    /// An access that missed and is told the runtime, at once.
    fn miss(c: &mut Context, number: u32, va: u64, size: Size) -> bool {
        c.write_entry(number, Entry { patience: u32::MAX, ..c.read_entry(number) });
        c.fill_range(number, va, size, || 0, false) != Verdict::Stays
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
        assert!(!miss(&mut c, load(0), 0x6010, Size::B4));
        for va in [0x5000, 0x6ffe, 0x7ffc] {
            assert_eq!(hits(&c, load(0), va), Some(HOST + va));
        }
        for va in [0x4fff, 0x7ffd, 0x8000] {
            assert_eq!(hits(&c, load(0), va), None, "{va:#x}");
        }
        miss(&mut c, load(0), 0x9000, Size::B4);
        assert_eq!(hits(&c, load(0), 0x6000), Some(HOST + 0x6000), "nothing is known of the page");
    }

    #[test]
    fn the_first_page_and_the_last() {
        let mut c = Context::new().unwrap();
        fill(&mut c, 0, HOST);
        fill(&mut c, 0u64.wrapping_sub(PAGE), HOST - PAGE);
        miss(&mut c, load(0), 8, Size::B4);
        miss(&mut c, load(1), !7, Size::B4);
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
            miss(c, load(0), 0x5000, Size::B4);
            miss(c, load(1), 0x20_5000, Size::B4);
            miss(c, store(0), 0x5000, Size::B4);
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
        c.revoke_write(HOST + 0x6000, 1);
        assert_eq!((hits(&c, load(0), 0x5000), hits(&c, store(0), 0x5000)), (Some(HOST + 0x5000), None));
        ready(&mut c);
        c.fill_data(&DataFill { va: 0x6000, host: HOST, read: true, write: false, local: false, mapping_size: PAGE });
        assert_eq!((hits(&c, load(0), 0x5000), hits(&c, store(0), 0x6000)), (None, None), "it has moved");
        for drop in [Context::flush, Context::drop_local] {
            for page in [0x5000, 0x6000, 0x20_5000] {
                c.fill_data(&DataFill {
                    va: page,
                    host: HOST + page,
                    read: true,
                    write: true,
                    local: true,
                    mapping_size: PAGE,
                });
            }
            miss(&mut c, load(0), 0x5000, Size::B4);
            miss(&mut c, load(1), 0x20_5000, Size::B4);
            assert!(hits(&c, load(0), 0x6000).is_some() && hits(&c, load(1), 0x20_5000).is_some());
            drop(&mut c);
            assert_eq!((hits(&c, load(0), 0x5000), hits(&c, load(1), 0x20_5000)), (None, None));
            assert!(c.ranges.iter().all(|ranges| ranges.list.is_empty()));
        }
        ready(&mut c);
        let large =
            DataFill { va: 0x6000, host: HOST + 0x6000, read: true, write: true, local: false, mapping_size: 2 << 20 };
        c.drop_page(0x6000);
        c.fill_data(&large);
        miss(&mut c, load(0), 0x6000, Size::B4);
        c.drop_page(0x10_0000);
        assert_eq!(hits(&c, load(0), 0x6000), None, "of a large mapping");
    }

    #[test]
    fn another_page_of_the_same_index_leaves_a_range_that_can_still_be_dropped() {
        let mut c = Context::new().unwrap();
        fill(&mut c, 0x5000, HOST);
        miss(&mut c, store(0), 0x5000, Size::B4);
        fill(&mut c, 0x1_0000_5000, HOST + PAGE);
        assert_eq!(hits(&c, store(0), 0x5000), Some(HOST));
        c.revoke_write(HOST, 1);
        assert_eq!(hits(&c, store(0), 0x5000), None);
        fill(&mut c, 0x5000, HOST);
        miss(&mut c, store(0), 0x5000, Size::B4);
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
            (0..4000).any(|n| {
                let va = 0x10_0000 + 2 * u64::from(n % 100) * PAGE;
                misses(&mut c, number, va, n * microseconds_a_miss)
            })
        };
        assert!(run(load(0), 0));
        assert!(!run(load(1), 10));
    }

    /// What generated code does when an access misses, and what comes of it.
    fn misses(c: &mut Context, number: u32, va: u64, now: u32) -> bool {
        missed(c, number, va, now) != Verdict::Stays
    }

    fn missed(c: &mut Context, number: u32, va: u64, now: u32) -> Verdict {
        let entry = c.read_entry(number);
        let patience = entry.patience.wrapping_sub(1);
        c.write_entry(number, Entry { patience, ..entry });
        if entry.patience == 0 {
            return c.fill_range(number, va, Size::B4, || now, false);
        }
        let host = if ContextLayout::range_is_write(number) { c.lookup_write(va) } else { c.lookup_read(va) };
        if let (Some(host), 1) = (host, entry.roves) {
            let (first, addend) = (va & !(PAGE - 1), host.wrapping_sub(va));
            c.write_entry(number, Entry { patience, first, addend, limit: PAGE - 3, ..entry });
            // SAFETY: as in `read_entry`.
            unsafe { c.cell_at(L.roved as usize).write(1) };
        }
        Verdict::Stays
    }

    #[test]
    fn an_entry_that_roves_goes_with_any_page() {
        let mut c = Context::new().unwrap();
        let va = |n: u64| 0x10_0000 + 2 * (n / 200 % 100) * PAGE + n % 200;
        let ready = |c: &mut Context| (0..100).for_each(|n| fill(c, 0x10_0000 + 2 * n * PAGE, HOST + n * PAGE));
        // A page each 20 microseconds.
        let run = |c: &mut Context, number: u32, accesses: u64| {
            let mut misses = 0;
            for n in 0..accesses {
                if hits(c, number, va(n)).is_none() {
                    misses += 1;
                    assert_eq!(missed(c, number, va(n), (n / 10) as u32), Verdict::Stays);
                }
            }
            misses
        };
        ready(&mut c);
        for number in [load(0), store(0)] {
            run(&mut c, number, 20_000);
            assert_eq!(c.read_entry(number).roves, 1);
            assert_eq!(run(&mut c, number, 20_000), 100);
            assert_eq!(hits(&c, number, va(19_999)), Some(HOST + 99 * PAGE + 199));
        }
        assert_eq!(c.roving, [load(0), store(0)]);
        let both = |c: &Context| [load(0), store(0)].map(|number| hits(c, number, va(19_999)).is_some());
        c.revoke_write(HOST + 99 * PAGE, 1);
        assert!(!both(&c)[1]);
        for drop in [Context::flush, Context::drop_local, |c: &mut Context| c.drop_page(0x10_0000 + 198 * PAGE)] {
            ready(&mut c);
            for number in [load(0), store(0)] {
                missed(&mut c, number, va(19_999), 0);
            }
            assert_eq!(both(&c), [true; 2]);
            drop(&mut c);
            assert_eq!(both(&c), [false; 2]);
        }
    }

    #[test]
    fn accesses_to_two_neighbours_are_told_from_those_to_many_places() {
        let mut c = Context::new().unwrap();
        for n in 0..100 {
            // Each page is far from its neighbour in the host's memory.
            fill(&mut c, 0x10_0000 + n * PAGE, HOST + (n * 37 % 100) * 2 * PAGE);
        }
        let verdict = |c: &mut Context, number: u32, place: fn(u64) -> u64| {
            (0..10_000).find_map(|n| {
                let va = 0x10_0000 + place(n) * PAGE;
                if hits(c, number, va).is_some() {
                    return None;
                }
                Some(missed(c, number, va, 0)).filter(|verdict| *verdict != Verdict::Stays)
            })
        };
        assert_eq!(verdict(&mut c, load(0), |n| 7 + n % 2), Some(Verdict::InParts));
        assert_eq!(verdict(&mut c, load(1), |n| n * 7 % 100), Some(Verdict::Scatters));
        let parted = ContextLayout::range(0, Size::B4, false, true);
        assert_eq!(verdict(&mut c, parted, |n| n * 7 % 100), Some(Verdict::Scatters), "not in two parts either");
    }

    #[test]
    fn all_of_a_large_heap_in_one_piece_is_one_range() {
        let mut c = Context::new().unwrap();
        let first = 0x4000_0000;
        for n in 0..1500 {
            fill(&mut c, first + n * PAGE, HOST + n * PAGE);
        }
        let all = first..first + 1500 * PAGE;
        assert_eq!((c.pages_around(first + 700 * PAGE), c.pages_around(first - PAGE).is_empty()), (all, true));
        let number = load(0);
        let mut misses = 0;
        for n in 0..100_000u64 {
            let va = first + n * 7 % 1500 * PAGE;
            if hits(&c, number, va).is_some() {
                continue;
            }
            misses += 1;
            let entry = c.read_entry(number);
            c.write_entry(number, Entry { patience: entry.patience.wrapping_sub(1), ..entry });
            if entry.patience == 0 {
                assert_eq!(c.fill_range(number, va, Size::B4, || 0, false), Verdict::Stays);
            }
        }
        assert!(misses < 2500, "{misses}");
        assert_eq!(c.read_entry(number).len, 1500 * PAGE);
    }

    #[test]
    fn an_access_whose_range_is_dropped_again_and_again_seldom_fills_it() {
        let mut c = Context::new().unwrap();
        fill(&mut c, 0x5000, HOST);
        let mut filled = 0;
        // It is dropped after each tenth access, one every microsecond.
        for n in 0..100_000 {
            if hits(&c, load(0), 0x5000).is_none() {
                assert!(!misses(&mut c, load(0), 0x5000, n));
                filled += u32::from(hits(&c, load(0), 0x5000).is_some());
            }
            if n % 10 == 9 {
                c.drop_page(0x5000);
                fill(&mut c, 0x5000, HOST);
            }
        }
        assert!((10..200).contains(&filled), "{filled}");
        // It goes on as one that is not, some time later.
        let then = 100_000 + MUCH_LATER;
        let before_filled = (0..10_000).take_while(|n| {
            misses(&mut c, load(0), 0x5000, then + n);
            hits(&c, load(0), 0x5000).is_none()
        });
        assert!(before_filled.count() < 2000);
        c.drop_page(0x5000);
        fill(&mut c, 0x5000, HOST);
        misses(&mut c, load(0), 0x5000, then + 10_000);
        assert_eq!(hits(&c, load(0), 0x5000), None);
        for _ in 0..PATIENCE {
            misses(&mut c, load(0), 0x5000, then + 10_000);
        }
        assert_eq!(hits(&c, load(0), 0x5000), Some(HOST));
    }

    #[test]
    fn ranges_of_global_pages_stay_when_local_ones_go() {
        let mut c = Context::new().unwrap();
        let local = |va| DataFill { va, host: HOST + va, read: true, write: true, local: true, mapping_size: PAGE };
        fill(&mut c, 0x5000, HOST + 0x5000);
        c.fill_data(&local(0x9000));
        c.fill_data(&local(0xa000));
        fill(&mut c, 0xb000, HOST + 0xb000);
        miss(&mut c, load(0), 0x5000, Size::B4);
        miss(&mut c, load(1), 0x9000, Size::B4);
        assert_eq!(hits(&c, load(1), 0xb000), Some(HOST + 0xb000));
        c.drop_local();
        assert_eq!((hits(&c, load(0), 0x5000), hits(&c, load(1), 0xb000)), (Some(HOST + 0x5000), None));
        // The access that was in local pages is in others now, and back.
        c.fill_data(&local(0x9000));
        miss(&mut c, load(1), 0x9000, Size::B4);
        miss(&mut c, load(1), 0xb000, Size::B4);
        c.drop_local();
        assert_eq!(hits(&c, load(1), 0xb000), Some(HOST + 0xb000));
        c.drop_page(0xb000);
        assert_eq!(hits(&c, load(1), 0xb000), None);
        assert_eq!(hits(&c, load(0), 0x5000), Some(HOST + 0x5000));
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
        miss(&mut c, number, 0x6010, Size::B4);
        assert_eq!(hits_parts(&c, number, 0x7ffc), Some(HOST + 0x4ffc));
        assert_eq!((hits_parts(&c, number, 0x8000), hits_parts(&c, number, 0x5ffc)), (None, None));
        // The one before, then the one behind in its place.
        miss(&mut c, number, 0x5010, Size::B4);
        for (va, host) in [(0x5000, HOST + 0x9000), (0x5ffc, HOST + 0x9ffc), (0x6000, HOST + 0x3000)] {
            assert_eq!(hits_parts(&c, number, va), Some(host));
        }
        assert_eq!((hits_parts(&c, number, 0x5ffe), hits_parts(&c, number, 0x8000)), (None, None));
        miss(&mut c, number, 0x8010, Size::B4);
        for (va, host) in [(0x6000, HOST + 0x3000), (0x7ffc, HOST + 0x4ffc), (0x8ffc, HOST + 0xffc)] {
            assert_eq!(hits_parts(&c, number, va), Some(host));
        }
        assert_eq!((hits_parts(&c, number, 0x5ffc), hits_parts(&c, number, 0x9000)), (None, None));
        // Either part takes both along.
        c.revoke_write(HOST + 0x4000, 1);
        assert_eq!(hits_parts(&c, number, 0x8000), None);
        miss(&mut c, number, 0x8010, Size::B4);
        miss(&mut c, number, 0x6010, Size::B4);
        assert_eq!(hits_parts(&c, number, 0x8000), None, "the page between cannot be written");
        c.drop_page(0x6000);
        assert_eq!(hits_parts(&c, number, 0x6000), None);
    }

    #[test]
    fn an_access_in_two_pages_does_not_end_the_asking() {
        let mut c = Context::new().unwrap();
        fill(&mut c, 0x10_0000, HOST);
        assert!(!miss(&mut c, load(0), 0x10_0ffd, Size::B4));
        assert_eq!((hits(&c, load(0), 0x10_0000), c.read_entry(load(0)).patience), (None, 0));
        assert!(!miss(&mut c, load(0), 0x10_0ffc, Size::B4));
        assert_eq!(hits(&c, load(0), 0x10_0000), Some(HOST));
    }

    #[test]
    fn a_range_grows_page_by_page() {
        let mut c = Context::new().unwrap();
        for n in 0..3000 {
            let page = 0x10_0000 + n * PAGE;
            fill(&mut c, page, HOST + n * PAGE);
            c.write_entry(load(0), Entry { patience: u32::MAX, ..c.read_entry(load(0)) });
            assert_eq!(c.fill_range(load(0), page, Size::B1, || n as u32 * TOO_SOON, false), Verdict::Stays);
            assert_eq!(hits(&c, load(0), 0x10_0000), Some(HOST));
            assert_eq!(hits(&c, load(0), page + PAGE - 4), Some(HOST + (n + 1) * PAGE - 4));
        }
    }
}
