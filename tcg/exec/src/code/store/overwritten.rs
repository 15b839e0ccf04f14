//! Stores to pages of code: what was translated from the bytes that are written is withdrawn.
//!
//! A kernel that is starting writes its own text in thousands of places (alternatives, static calls and branches), a few bytes
//! in each, so the blocks beside such a place stay. But each store to a page with code takes long; a page that is filled, or
//! written again and again, is given up as a whole.

use std::sync::atomic::{AtomicU8, Ordering};

use mimus_core::memory::PAGE_CODE;

use super::{BlockRecord, CodeStore, Counts, Inner, Page, PageKey, granules};

/// Stores that overlap blocks of a page until all of them are withdrawn, unless one was made meanwhile.
const PATIENCE: u32 = 64;
/// Stores that go on where the one before ended: what overlaps code then is filling the page.
const FILLS: u32 = 4;

/// Bytes of a page that were written, and the granules with some of them.
#[derive(Clone, Copy)]
struct Written {
    from: u32,
    end: u32,
    granules: u64,
}

impl Written {
    fn new(offset: u32, len: u32) -> Written {
        let end = offset.saturating_add(len).min(4096);
        Written { from: offset, end, granules: granules(offset, end) }
    }

    /// Whether a block of the page was made from some of them.
    fn overlap(&self, block: &BlockRecord) -> bool {
        let start = u32::from(block.start);
        let covers = start < self.end && self.from < start + u32::from(block.len);
        covers || block.granules & self.granules != 0
    }
}

impl Page {
    /// This was written now. Whether the page is being filled.
    fn is_filled(&mut self, written: Written) -> bool {
        let (end, row) = self.written;
        self.written = (written.end, if written.from == end { row + 1 } else { 0 });
        self.written.1 >= FILLS || written.granules == !0
    }
}

impl BlockRecord {
    /// Whether it reaches into the next page.
    fn crosses(&self) -> bool {
        u32::from(self.start) + u32::from(self.len) > 4096
    }

    /// The granules of its page that it was made from.
    fn all_granules(&self) -> u64 {
        let start = u32::from(self.start);
        granules(start, (start + u32::from(self.len)).min(4096)) | self.granules
    }
}

impl CodeStore {
    /// A store of `len` bytes at `offset` of the page at `host`, which is marked as code, has been made: withdraws
    /// the blocks that it overlaps, and takes the mark off `flags` once no code is left. Whether there were any.
    pub fn store_to_code(&self, host: u64, offset: u32, len: u32, flags: &AtomicU8) -> bool {
        let mut guard = self.lock();
        let inner = &mut *guard;
        let written = Written::new(offset, len);
        // Copied: the list is in `inner`.
        let keys = inner.modes.get(&PageKey::new(host, 0)).map_or_else(Vec::new, Clone::clone);
        let (mut code, mut overlaps) = (0, false);
        for key in keys {
            let Some(p) = inner.pages.get_mut(&key) else { continue };
            p.stores = p.stores.wrapping_add(1);
            let fills = p.is_filled(written);
            if p.granules & written.granules != 0 {
                let withdrawn = if fills || p.overwritten >= PATIENCE {
                    self.withdraw_for_good(inner, key)
                } else {
                    self.withdraw_overlapped(inner, key, written)
                };
                overlaps |= withdrawn != 0;
                if let Some(p) = inner.pages.get_mut(&key).filter(|_| withdrawn != 0) {
                    p.overwritten += 1;
                }
            }
            code |= inner.pages.get(&key).map_or(0, |p| p.granules);
        }
        if code == 0 {
            flags.fetch_and(!PAGE_CODE, Ordering::SeqCst);
        }
        overlaps
    }

    /// Whether a store of `len` bytes at `offset` of the page at `host` would withdraw the block whose code is
    /// around host address `ret`, or blocks beside it in its page.
    pub fn hits_own_code(&self, ret: usize, host: u64, offset: u32, len: u32) -> bool {
        let inner = self.lock();
        let Some(number) = self.offset(ret).and_then(|at| inner.block_at(at)) else { return false };
        let own = inner.blocks[number].page;
        let written = granules(offset, offset.saturating_add(len).min(4096));
        let key = PageKey::new(host, own.mode());
        let Some(page) = inner.pages.get(&key) else { return false };
        page.granules & written != 0 && (key == own || page.crossed_from.contains(&own))
    }

    /// Withdraws all of a page's blocks, since what is there now is another program's; how many.
    fn withdraw_for_good(&self, inner: &mut Inner, key: PageKey) -> usize {
        let withdrawn = self.withdraw(inner, key);
        Counts::add(&self.counts.overwritten, withdrawn);
        inner.hints.remove(&key);
        if let Some(p) = inner.pages.get_mut(&key) {
            p.warm.clear();
            p.hot.clear();
        }
        withdrawn
    }

    /// Withdraws a page's blocks that were made from what was written, and those that reach into it there; how many.
    fn withdraw_overlapped(&self, inner: &mut Inner, key: PageKey, written: Written) -> usize {
        let Some(p) = inner.pages.get_mut(&key) else { return 0 };
        let mut withdrawn = 0;
        if p.reached & written.granules != 0 {
            p.reached = 0;
            for before in std::mem::take(&mut p.crossed_from) {
                withdrawn += self.withdraw_some(inner, before, BlockRecord::crosses);
                if let Some(p) = inner.pages.get_mut(&before) {
                    p.next_table = 0;
                    p.ran_on = false;
                }
            }
        }
        withdrawn += self.withdraw_some(inner, key, |block| written.overlap(block));
        if inner.pages.get(&key).is_some_and(|p| p.granules == 0) {
            self.withdraw_for_good(inner, key);
        }
        withdrawn
    }

    /// Withdraws those of a page's blocks that `goes` is true of; how many.
    fn withdraw_some(&self, inner: &mut Inner, key: PageKey, goes: impl Fn(&BlockRecord) -> bool) -> usize {
        let Inner { pages, blocks, .. } = inner;
        let Some(p) = pages.get_mut(&key) else { return 0 };
        let (mut left, mut withdrawn) = (p.reached, 0);
        let numbers = std::mem::take(&mut p.blocks);
        p.blocks.extend(numbers.into_iter().filter(|number| {
            let block = &mut blocks[*number as usize];
            if block.live && goes(block) {
                block.live = false;
                withdrawn += 1;
                self.forget(p.table, block.start, (&mut p.starts, &mut p.warm, &mut p.hot));
            }
            if block.live {
                left |= block.all_granules();
            }
            block.live
        }));
        p.granules = left;
        let Page { incoming, inner_links, .. } = p;
        for links in [incoming, inner_links] {
            links.retain(|point| {
                let leads_on = blocks[point.to as usize].live;
                if !leads_on {
                    self.unlink(*point);
                }
                leads_on
            });
        }
        Counts::add(&self.counts.overwritten, withdrawn);
        withdrawn
    }

    /// There is no block at `start` any more.
    fn forget(&self, table: u32, start: u16, (starts, warm, hot): (&mut [u64], &mut Vec<u16>, &mut Vec<u16>)) {
        self.mapping.set_entry(table, start.into(), 0);
        if let Some(word) = starts.get_mut(usize::from(start / 64)) {
            *word &= !(1 << (start % 64));
        }
        for list in [warm, hot] {
            list.retain(|other| *other != start);
        }
    }
}

#[cfg(test)]
mod tests {
    use mimus_tcg_ir::backend::{Emitted, LinkSite, Optimise};
    use mimus_tcg_ir::{Block, PagePc};

    use super::*;
    use crate::code::Published;
    use crate::code::mapping::CodeMapping;

    const PAGE: PageKey = PageKey::new(0x7000, 3);
    const NEXT: PageKey = PageKey::new(0x8000, 3);

    fn store(optimise: Optimise) -> CodeStore {
        CodeStore::new(CodeMapping::new(1 << 20, 16, 2).unwrap(), 100, optimise)
    }

    /// A block of 8 bytes with a jump in its page, patched at 12, and one to other pages, patched at 16.
    fn make(s: &CodeStore, page: PageKey, start: u16) -> usize {
        make_of(s, page, Block { ops: Vec::new(), start, len: 8, insns: 2, narrow: false, granules: 0 })
    }

    fn make_of(s: &CodeStore, page: PageKey, block: Block) -> usize {
        let emit = |_: usize, code: &mut Vec<u8>, info: &mut Emitted| {
            *code = vec![0; 64];
            let to = PagePc(0x100);
            info.sites = vec![
                LinkSite { patch: 12, unlinked: 32, return_offset: 40, guard: u32::MAX, to },
                LinkSite { patch: 16, unlinked: 48, return_offset: 56, guard: 24, to },
            ];
        };
        let begin = |page| {
            s.table(page).unwrap();
            s.begin(page, &AtomicU8::new(0), 0, PAGE_CODE).unwrap()
        };
        let next = block.crosses_page().then(|| (NEXT, begin(NEXT)));
        match s.publish((page, begin(page)), next, &block, emit, &mut Default::default()) {
            Published::At(at) => at,
            other => panic!("{other:?}"),
        }
    }

    fn word(s: &CodeStore, block: usize, offset: usize) -> u32 {
        s.mapping().patched(block + offset - s.mapping().code_base())
    }

    #[test]
    fn blocks_beside_what_is_written_stay_and_nothing_leads_to_the_others() {
        for optimise in [Optimise::Tiered, Optimise::Usual] {
            let s = store(optimise);
            let [one, two, three] = [0x100, 0x108, 0x300].map(|start| make(&s, PAGE, start));
            let far = make(&s, NEXT, 0x500);
            for (from, to) in [(three, one), (one, two)] {
                let site = s.resolve_site(from + 40).unwrap();
                s.link(&site, to, PAGE, |field, to| to.wrapping_sub(field + 4) as u32);
            }
            let site = s.resolve_site(far + 56).unwrap();
            s.link(&site, one, PAGE, |field, to| to.wrapping_sub(field + 4) as u32);
            let table = s.table(PAGE).unwrap();
            assert_eq!(word(&s, far, 24), table, "linked");
            let flags = AtomicU8::new(PAGE_CODE);
            assert!(s.store_to_code(PAGE.host(), 0x107, 1, &flags));
            assert_eq!(flags.load(Ordering::SeqCst), PAGE_CODE);
            let found = [0x100, 0x108, 0x300].map(|start| s.find(table, start));
            assert_eq!(found, [None, Some(two), Some(three)]);
            assert_eq!(word(&s, three, 12), 32 - 16, "back to where it was");
            assert_eq!(word(&s, one, 12), two.wrapping_sub(one + 16) as u32, "that one has stayed");
            assert_eq!(word(&s, far, 24), 0);
            let mut starts = [0; 64];
            s.is_made_compact(PAGE, 0x400, &mut starts);
            let wanted = [(0x100 / 64, 1 << 8), (0x300 / 64, 1)];
            if optimise == Optimise::Tiered {
                assert_eq!(wanted.map(|(word, _)| starts[word]), wanted.map(|(_, bits)| bits), "where blocks begin");
            }
            assert!(s.store_to_code(PAGE.host(), 0x10f, 1, &flags));
            assert!(!s.store_to_code(PAGE.host(), 0x130, 8, &flags), "no block is left around it");
            assert!(s.store_to_code(PAGE.host(), 0x300, 1, &flags));
            assert_eq!(flags.load(Ordering::SeqCst), 0);
        }
    }

    #[test]
    fn what_else_a_block_was_made_from_counts() {
        let s = store(Optimise::Tiered);
        let block = Block { ops: Vec::new(), start: 0x100, len: 8, insns: 2, narrow: false, granules: 1 << 3 };
        make_of(&s, PAGE, block);
        let kept = make(&s, PAGE, 0xc8);
        let table = s.table(PAGE).unwrap();
        assert!(s.store_to_code(PAGE.host(), 0xc0, 1, &AtomicU8::new(PAGE_CODE)));
        assert_eq!((s.find(table, 0x100), s.find(table, 0xc8)), (None, Some(kept)));
    }

    #[test]
    fn what_reaches_into_the_next_page_goes_with_its_bytes_there() {
        let s = store(Optimise::Tiered);
        let (kept, crossing) = (make(&s, PAGE, 0x100), make(&s, PAGE, 0xffc));
        let beside = make(&s, NEXT, 0x38);
        let (table, next) = (s.table(PAGE).unwrap(), s.table(NEXT).unwrap());
        assert_eq!(s.next_table(PAGE), next);
        let flags = AtomicU8::new(PAGE_CODE);
        assert!(s.store_to_code(NEXT.host(), 0x3f, 1, &flags), "in the same granule");
        assert_eq!((s.find(table, 0x100), s.find(table, 0xffc), s.find(next, 0x38)), (Some(kept), None, None));
        assert_eq!((s.next_table(PAGE), flags.load(Ordering::SeqCst)), (0, 0));
        let again = make(&s, PAGE, 0xffc);
        assert_ne!(again, crossing);
        let beside_again = make(&s, NEXT, 0x40);
        assert_ne!(beside_again, beside);
        flags.store(PAGE_CODE, Ordering::SeqCst);
        assert!(s.store_to_code(NEXT.host(), 0x40, 4, &flags));
        assert_eq!((s.find(table, 0xffc), s.find(next, 0x40)), (Some(again), None));
        assert_eq!(flags.load(Ordering::SeqCst), PAGE_CODE, "for what reaches into it");
    }

    #[test]
    fn a_page_that_is_filled_is_given_up() {
        let s = store(Optimise::Tiered);
        make(&s, PAGE, 0x10);
        let (kept, table) = (make(&s, PAGE, 0x800), s.table(PAGE).unwrap());
        let flags = AtomicU8::new(PAGE_CODE);
        for offset in (0x400..0x500).step_by(8) {
            assert!(!s.store_to_code(PAGE.host(), offset, 8, &flags), "a buffer beside code");
        }
        for offset in [0, 8, 16, 24] {
            s.store_to_code(PAGE.host(), offset, 8, &flags);
        }
        assert_eq!((s.find(table, 0x10), s.find(table, 0x800)), (None, Some(kept)));
        make(&s, PAGE, 0x7e0);
        for offset in [0x7c0, 0x7c8, 0x7d0, 0x7d8] {
            assert!(!s.store_to_code(PAGE.host(), offset, 8, &flags));
        }
        assert!(s.store_to_code(PAGE.host(), 0x7e0, 1, &flags));
        assert_eq!((s.find(table, 0x7e0), s.find(table, 0x800), flags.load(Ordering::SeqCst)), (None, None, 0));
    }

    #[test]
    fn a_page_that_is_written_again_and_again_is_given_up() {
        let s = store(Optimise::Tiered);
        let starts = |n: u32| (0..n as u16).map(|i| i * 16);
        for start in starts(PATIENCE + 1) {
            make(&s, PAGE, start);
        }
        let (kept, table) = (make(&s, PAGE, 0x800), s.table(PAGE).unwrap());
        let flags = AtomicU8::new(PAGE_CODE);
        let overwrite = |start: u16| s.store_to_code(PAGE.host(), start.into(), 1, &flags);
        for start in starts(PATIENCE) {
            assert!(!overwrite(start + 8), "beside a block");
            assert!(overwrite(start));
        }
        assert_eq!(s.find(table, 0x800), Some(kept));
        make(&s, PAGE, 0);
        assert!(overwrite(0));
        assert_eq!(s.find(table, 0x800), Some(kept), "one has been made meanwhile");
        s.lock().pages.get_mut(&PAGE).unwrap().overwritten = PATIENCE;
        let last = PATIENCE as u16 * 16;
        assert!(overwrite(last));
        assert_eq!((s.find(table, 0x800), flags.load(Ordering::SeqCst)), (None, 0));
        make(&s, PAGE, 0x100);
        flags.store(PAGE_CODE, Ordering::SeqCst);
        assert!(s.store_to_code(PAGE.host(), 0, 4096, &flags));
        assert_eq!(flags.load(Ordering::SeqCst), 0);
    }
}
