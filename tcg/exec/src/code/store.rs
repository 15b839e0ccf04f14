//! What is known about translated code: pages, blocks, links, and which guest instruction a host
//! address belongs to.
//!
//! Blocks are keyed by the guest's *physical* page (here: its host address), the code mode they were translated
//! for, and the offset, so every address space that maps a page shares its code. A page's blocks, of all modes,
//! live and die together: a store that overlaps translated bytes withdraws all of them. Withdrawn code is not reused before the whole cache is emptied,
//! so a vCPU still inside it is safe.

mod run_on;

use std::collections::HashMap;
use std::hash::{BuildHasherDefault, Hasher};
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use mimus_core::memory::PAGE_CODE;
use mimus_tcg_ir::backend::{Emitted, FaultEntry, Hints, LinkSite, Optimise};
use mimus_tcg_ir::flags::Recipe;
use mimus_tcg_ir::{Block, PagePc};

use super::counts::Counts;
use super::mapping::{CodeMapping, HUGE};
use crate::frontend::Starts;

mod learning;

use learning::Known;

/// Code is taken out of the writable mapping each time this many more bytes have been written: whole huge pages, of which what is
/// not written yet would come back a small page at a time.
const SETTLE: usize = HUGE;

/// Bytes of a huge page that have been written when it is made one.
const HUGE_FROM: usize = 128 << 10;

/// Log2 of the bytes of code for which [`Inner::block_at`] knows where to look.
const STRETCH: u32 = 12;

/// Bytes of guest memory per bit of a page's map of translated bytes.
const GRANULE: u32 = 64;

/// A page of guest memory that holds code, by its host address, and a code mode (below 4096).
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, PartialOrd, Ord)]
pub struct PageKey(u64);

impl PageKey {
    /// The page at `host` (or with that address in it) under a code mode.
    pub const fn new(host: u64, mode: u16) -> PageKey {
        PageKey(host & !0xfff | mode as u64 & 0xfff)
    }

    /// The page's host address.
    pub const fn host(self) -> u64 {
        self.0 & !0xfff
    }

    /// The code mode.
    pub const fn mode(self) -> u16 {
        (self.0 & 0xfff) as u16
    }
}

/// Hashes page addresses with modes: they are distinct already, only their low bits say little.
#[derive(Default)]
pub struct PageHasher(u64);

impl Hasher for PageHasher {
    fn finish(&self) -> u64 {
        self.0
    }
    fn write(&mut self, bytes: &[u8]) {
        for &b in bytes {
            self.0 = (self.0 ^ u64::from(b)).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        }
    }
    fn write_u64(&mut self, n: u64) {
        self.0 = (n >> 12 ^ n << 52).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    }
}

type PageMap<V> = HashMap<PageKey, V, BuildHasherDefault<PageHasher>>;

#[derive(Default)]
struct Page {
    table: u32,
    blocks: Vec<u32>,
    /// Which granules hold translated bytes.
    granules: u64,
    /// Linked jumps from other pages into this one.
    incoming: Vec<PatchPoint>,
    /// Linked jumps within the page, if its blocks are made anew one by one.
    inner_links: Vec<PatchPoint>,
    /// Where blocks begin that are not to be compact.
    warm: Vec<u16>,
    /// Where blocks begin that were found running, one by one: they are hot.
    hot: Vec<u16>,
    /// Pages with a block whose last instruction reaches into this one.
    crossed_from: Vec<PageKey>,
    /// Counts stores to the page while it was marked as code: a translation begun before one is stale.
    stores: u32,
    /// Entry table that the block reaching into the next page was made for; 0 if none.
    next_table: u32,
    /// Some of them may run on into it, beside an instruction that begins in this page.
    ran_on: bool,
    /// Where blocks begin: empty, or a bit for each offset.
    starts: Vec<u64>,
}

/// Where to undo a link: code offsets.
#[derive(Clone, Copy)]
struct PatchPoint {
    patch: u32,
    unlinked: u32,
    /// See [`LinkSite::guard`].
    guard: u32,
    /// Number of the block it leads to.
    to: u32,
}

struct BlockRecord {
    code: u32,
    code_len: u32,
    page: PageKey,
    start: u16,
    live: bool,
    compact: bool,
    /// It has begun often once before.
    asked: bool,
    hot: bool,
    sites: (u32, u32),
    faults: (u32, u32),
    /// Number of the first of its recipes.
    recipes: u32,
}

/// What has been translated since the machine was made, whether it is still there or not.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Translated {
    /// Blocks.
    pub blocks: u64,
    /// Instructions of the guest in them.
    pub insns: u64,
    /// Bytes of those.
    pub guest_bytes: u64,
    /// Bytes of code made of them.
    pub host_bytes: u64,
}

#[derive(Default)]
struct Inner {
    hints: PageMap<Known>,
    translated: Translated,
    bump: usize,
    tables_used: usize,
    page_of_table: Vec<PageKey>,
    pages: PageMap<Page>,
    /// The keys in `pages` of each page, under its key of mode 0.
    modes: PageMap<Vec<PageKey>>,
    /// In order of code offset.
    blocks: Vec<BlockRecord>,
    /// Their code offsets, side by side for who searches.
    block_codes: Vec<u32>,
    /// For each stretch of code of [`STRETCH`] bytes the number of the first block that begins in it or after it.
    first_in: Vec<u32>,
    sites: Vec<LinkSite>,
    faults: Vec<FaultEntry>,
    recipes: Vec<Recipe>,
}

/// All translated code of a machine.
pub struct CodeStore {
    mapping: CodeMapping,
    /// End of the stubs.
    first_block: usize,
    optimise: Optimise,
    counts: Counts,
    inner: Mutex<Inner>,
}

/// What [`CodeStore::publish`] says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Published {
    /// Runs at this host address.
    At(usize),
    /// The same has been published meanwhile, at this host address.
    There(usize),
    /// No room: the cache must be emptied.
    Full,
    /// The page was written meanwhile: translate again.
    Stale,
}

/// A block that has begun often.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Warm {
    /// Its number.
    pub number: usize,
    /// Where it begins.
    pub page: PageKey,
    pub start: u16,
    /// It is to be made again.
    pub due: bool,
}

/// The jump a link request came from.
#[derive(Clone, Copy, Debug)]
pub struct Resolved {
    block: u32,
    site: LinkSite,
    page: PageKey,
}

impl Resolved {
    /// Where the jump leads, relative to its block's page.
    pub fn to(&self) -> PagePc {
        self.site.to
    }

    /// The page of the block that jumps.
    pub fn page(&self) -> PageKey {
        self.page
    }
}

impl CodeStore {
    /// A store over `mapping`, whose first `stubs` bytes are taken.
    /// `optimise`: whether code is taken to run often from the first, or never.
    pub fn new(mapping: CodeMapping, stubs: usize, optimise: Optimise) -> CodeStore {
        let first_block = stubs.next_multiple_of(64);
        let inner = Inner::new(first_block);
        CodeStore { mapping, first_block, optimise, counts: Counts::default(), inner: Mutex::new(inner) }
    }

    /// The memory underneath.
    pub fn mapping(&self) -> &CodeMapping {
        &self.mapping
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The page an entry table belongs to.
    pub fn page_of(&self, table: u32) -> Option<PageKey> {
        let number = (table as usize).checked_sub(self.mapping.table(0) as usize)? / self.mapping.table_bytes();
        self.lock().page_of_table.get(number).copied()
    }

    /// Changes the flags of `page` from `before` to `after`, which says that it holds code, and answers its stamp for
    /// [`CodeStore::publish`]. `None`: they were something else. To be called before the page's bytes are read.
    pub fn begin(&self, page: PageKey, flags: &AtomicU8, before: u8, after: u8) -> Option<u32> {
        let inner = self.lock();
        flags.compare_exchange(before, after, Ordering::SeqCst, Ordering::SeqCst).ok()?;
        Some(inner.pages.get(&page).map_or(0, |p| p.stores))
    }

    /// How often what had to be made again.
    pub fn counts(&self) -> &Counts {
        &self.counts
    }

    /// Whether a block at `start` of `page` would be made compact. If so, `starts` gets where in the page blocks begin.
    pub fn is_made_compact(&self, page: PageKey, start: u16, starts: &mut Starts) -> bool {
        let inner = self.lock();
        let p = inner.pages.get(&page);
        let compact = self.makes_compact(p, start);
        if compact {
            match p.and_then(|p| p.starts.as_array()) {
                Some(there) => *starts = *there,
                None => starts.fill(0),
            }
        }
        compact
    }

    /// The same for a page that is known.
    fn makes_compact(&self, page: Option<&Page>, start: u16) -> bool {
        match self.optimise {
            Optimise::Compact => true,
            Optimise::Tiered => page.is_none_or(|p| !p.warm.contains(&start)),
            Optimise::Off | Optimise::Usual | Optimise::Forced => false,
        }
    }

    /// The entry table that the blocks of `page` that reach into the next page were made for.
    pub fn next_table(&self, page: PageKey) -> u32 {
        self.lock().pages.get(&page).map_or(0, |p| p.next_table)
    }

    /// The entry table of `page`, made if the page is new. `None`: no table is left.
    pub fn table(&self, page: PageKey) -> Option<u32> {
        let mut inner = self.lock();
        if let Some(p) = inner.pages.get(&page) {
            return Some(p.table);
        }
        if inner.tables_used == self.mapping.table_count() {
            return None;
        }
        let table = self.mapping.table(inner.tables_used);
        inner.tables_used += 1;
        inner.page_of_table.push(page);
        inner.pages.insert(page, Page { table, ..Page::default() });
        inner.modes.entry(PageKey::new(page.host(), 0)).or_default().push(page);
        Some(table)
    }

    /// Host address of the block at `offset` of the page with `table`.
    pub fn find(&self, table: u32, offset: u32) -> Option<usize> {
        match self.mapping.entry(table, offset) {
            0 => None,
            code => Some(self.mapping.code_base() + code as usize),
        }
    }

    /// Emits a block with `emit`, which is given the host address it will run at, and publishes it.
    ///
    /// `page` and, if its last instruction reaches into it, `next_page`: with their stamps.
    pub fn publish(
        &self,
        (page, stamp): (PageKey, u32),
        next_page: Option<(PageKey, u32)>,
        block: &Block,
        emit: impl FnOnce(usize, &mut Vec<u8>, &mut Emitted),
        buffers: &mut (Vec<u8>, Emitted),
    ) -> Published {
        let mut guard = self.lock();
        let inner = &mut *guard;
        let fresh = |key: PageKey, stamp: u32| inner.pages.get(&key).filter(|p| p.stores == stamp);
        let Some(p) = fresh(page, stamp) else { return Published::Stale };
        if next_page.is_some_and(|(key, stamp)| fresh(key, stamp).is_none()) {
            return Published::Stale;
        }
        let (code, info) = buffers;
        let compact = self.makes_compact(Some(p), block.start);
        match inner.hints.get(&page) {
            Some(known) if !compact => info.hints.clone_from(&known.hints),
            _ => info.hints = Hints { compact, hot: self.optimise == Optimise::Forced, ..Hints::default() },
        }
        info.hints.hot |= p.hot.contains(&block.start);
        if let Some(there) = inner.block_of(&self.mapping, p, block.start)
            && (there.compact, there.hot) == (compact, info.hints.hot)
        {
            // Another vCPU was quicker.
            Counts::add(&self.counts.twice, 1);
            return Published::There(self.mapping.code_base() + there.code as usize);
        }
        let at = inner.bump.next_multiple_of(16);
        info.table = p.table;
        let number = inner.blocks.len() as u32;
        info.number = number;
        emit(self.mapping.code_base() + at, code, info);
        if at + code.len() > self.mapping.code_len() {
            return Published::Full;
        }
        self.mapping.write_code(at, code);
        if (at + code.len()) / SETTLE != inner.bump / SETTLE {
            let end = inner.bump / SETTLE * SETTLE;
            // Now and then all of it again: late links have faulted pages in.
            let all = (end / SETTLE).is_multiple_of(2);
            self.mapping.settle(if all { 0 } else { end.saturating_sub(SETTLE) }, end);
        }
        inner.bump = at + code.len();
        let all = &mut inner.translated;
        all.blocks += 1;
        all.insns += u64::from(block.insns);
        all.guest_bytes += u64::from(block.len);
        all.host_bytes += code.len() as u64;
        let stretches = (at >> STRETCH) + 1;
        if inner.first_in.len() < stretches {
            inner.first_in.resize(stretches, number);
        }
        let sites = append(&mut inner.sites, &info.sites);
        let faults = append(&mut inner.faults, &info.faults);
        let recipes = append(&mut inner.recipes, &info.recipes).0;
        inner.block_codes.push(at as u32);
        inner.blocks.push(BlockRecord {
            code: at as u32,
            code_len: code.len() as u32,
            page,
            start: block.start,
            live: true,
            compact: info.hints.compact,
            asked: false,
            hot: info.hints.hot,
            sites,
            faults,
            recipes,
        });
        let start = u32::from(block.start);
        let end = start + u32::from(block.len);
        let mut next_table = 0;
        if let (Some((next, _)), true) = (next_page, end > 4096) {
            let p = inner.pages.entry(next).or_default();
            p.granules |= granules(0, end - 4096);
            next_table = p.table;
            if !p.crossed_from.contains(&page) {
                p.crossed_from.push(page);
            }
        }
        let p = inner.pages.entry(page).or_default();
        p.granules |= granules(start, end.min(4096)) | block.granules;
        p.blocks.push(number);
        p.starts.resize(64, 0);
        if let Some(word) = p.starts.get_mut(usize::from(block.start / 64)) {
            *word |= 1 << (block.start % 64);
        }
        if next_table != 0 {
            p.next_table = next_table;
        }
        if self.optimise == Optimise::Tiered {
            self.replace(inner, page, number);
        }
        let Some(p) = inner.pages.get(&page) else { return Published::Stale };
        self.mapping.set_entry(p.table, start, at as u32);
        let (before, now) = ((at.saturating_sub(HUGE_FROM)) / HUGE, (inner.bump.saturating_sub(HUGE_FROM)) / HUGE);
        let begins = inner.bump >= HUGE_FROM && (before != now || at < HUGE_FROM);
        drop(guard);
        if begins {
            self.mapping.use_huge_page(now * HUGE);
        }
        Published::At(self.mapping.code_base() + at)
    }

    /// The link site whose cold code's call returns to host address `ret`.
    pub fn resolve_site(&self, ret: usize) -> Option<Resolved> {
        let inner = self.lock();
        let number = inner.block_at(self.offset(ret)?)?;
        let block = &inner.blocks[number];
        let within = self.offset(ret)? - block.code;
        let sites = &inner.sites[block.sites.0 as usize..block.sites.1 as usize];
        let site = *sites.iter().find(|s| s.return_offset == within)?;
        Some(Resolved { block: number as u32, site, page: block.page })
    }

    /// Links the jump to `target` (host address), in page `target_page`. Does nothing if the jump's block
    /// has been withdrawn, or if it is already linked into a different page.
    pub fn link(&self, from: &Resolved, target: usize, target_page: PageKey, word: impl Fn(usize, usize) -> u32) {
        let mut inner = self.lock();
        let Some(block) = inner.blocks.get(from.block as usize) else { return };
        if !block.live || block.page != from.page {
            return;
        }
        let base = block.code;
        let patch = base + from.site.patch;
        let field = self.mapping.code_base() + patch as usize;
        // An address in the block, not the end of the one before it.
        let Some(to) = self.offset(target).and_then(|at| inner.block_at(at + 1)) else { return };
        if !inner.blocks[to].live {
            // Withdrawn since it was found.
            return;
        }
        let to = to as u32;
        if from.site.guard == u32::MAX {
            self.mapping.patch(patch as usize, word(field, target));
            let point = PatchPoint { patch, unlinked: base + from.site.unlinked, guard: u32::MAX, to };
            let replaced = self.optimise == Optimise::Tiered;
            if let Some(page) = inner.pages.get_mut(&target_page).filter(|_| replaced) {
                page.inner_links.push(point);
            }
            return;
        }
        let guard = base + from.site.guard;
        if self.mapping.patched(guard as usize) != 0 {
            return;
        }
        let Some(page) = inner.pages.get_mut(&target_page) else { return };
        // The jump first: its guard keeps it closed until it leads somewhere.
        self.mapping.patch(patch as usize, word(field, target));
        self.mapping.patch(guard as usize, page.table);
        let unlinked = match from.site.unlinked {
            LinkSite::STAYS => LinkSite::STAYS,
            offset => base + offset,
        };
        page.incoming.push(PatchPoint { patch, unlinked, guard, to });
    }

    /// The guest instruction a call with return address `ret` belongs to.
    pub fn resolve_fault(&self, ret: usize) -> Option<FaultEntry> {
        let inner = self.lock();
        let offset = self.offset(ret)?;
        let block = &inner.blocks[inner.block_at(offset)?];
        let within = offset - block.code;
        let faults = &inner.faults[block.faults.0 as usize..block.faults.1 as usize];
        faults.iter().find(|f| f.host == within).copied()
    }

    /// The same, with how flags are to be computed first.
    pub fn resolve_access(&self, ret: usize) -> Option<(FaultEntry, Option<Recipe>)> {
        let inner = self.lock();
        let offset = self.offset(ret)?;
        let block = &inner.blocks[inner.block_at(offset)?];
        let within = offset - block.code;
        let faults = &inner.faults[block.faults.0 as usize..block.faults.1 as usize];
        let entry = *faults.iter().find(|f| f.host == within)?;
        let recipe =
            (entry.recipe != u16::MAX).then(|| inner.recipes.get(block.recipes as usize + usize::from(entry.recipe)));
        Some((entry, recipe.flatten().copied()))
    }

    /// A store of `len` bytes at `offset` of the page at `host`, which is marked as code, has been made: withdraws
    /// the page's blocks if it overlaps any, and takes the mark off `flags` once no code is left. Whether it did.
    pub fn store_to_code(&self, host: u64, offset: u32, len: u32, flags: &AtomicU8) -> bool {
        let mut guard = self.lock();
        let inner = &mut *guard;
        let written = granules(offset, offset.saturating_add(len).min(4096));
        let mut code = 0;
        let mut keys: &[PageKey] = &[];
        if let Some(modes) = inner.modes.get(&PageKey::new(host, 0)) {
            keys = modes;
            for key in keys {
                if let Some(p) = inner.pages.get_mut(key) {
                    p.stores = p.stores.wrapping_add(1);
                    code |= p.granules;
                }
            }
        }
        let overlaps = code & written != 0;
        if overlaps {
            // Copied: the list is in `inner`.
            let keys = keys.to_vec();
            for key in keys {
                Counts::add(&self.counts.overwritten, self.withdraw(inner, key));
                // What is there now is another program's.
                inner.hints.remove(&key);
                if let Some(p) = inner.pages.get_mut(&key) {
                    p.warm.clear();
                    p.hot.clear();
                }
            }
            code = 0;
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

    /// Withdraws all blocks of a page in one mode; a translation begun before is stale.
    pub fn withdraw_page(&self, page: PageKey) {
        self.withdraw_and_outdate(&mut self.lock(), page);
    }

    /// The block around host address `ret`, which has begun often. If it is compact, it is no longer when it is made again; if
    /// `patient`, only once it has been asked about before.
    pub fn warm(&self, ret: usize, patient: bool) -> Option<Warm> {
        let mut guard = self.lock();
        let inner = &mut *guard;
        let number = inner.block_at(self.offset(ret)?)?;
        let block = &mut inner.blocks[number];
        let due = self.optimise.learns() && (!patient || block.asked);
        block.asked = true;
        let BlockRecord { page, start, live, .. } = *block;
        if live
            && due
            && let Some(page) = inner.pages.get_mut(&page).filter(|p| !p.warm.contains(&start))
        {
            page.warm.push(start);
        }
        Some(Warm { number, page, start, due })
    }

    /// Has what leads to the compact block where block `number` begins lead to that, which is not published yet. Who is in the
    /// other goes on there: nothing is wrong with it.
    fn replace(&self, inner: &mut Inner, page: PageKey, number: u32) {
        let BlockRecord { start, code, .. } = inner.blocks[number as usize];
        let Some(p) = inner.pages.get(&page) else { return };
        let old = self.mapping.entry(p.table, start.into());
        let Some(old) = (old != 0).then(|| inner.block_at(old + 1)).flatten() else { return };
        inner.blocks[old].live = false;
        let Some(p) = inner.pages.get_mut(&page) else { return };
        for point in p.incoming.iter_mut().chain(&mut p.inner_links).filter(|point| point.to == old as u32) {
            self.mapping.patch(point.patch as usize, code.wrapping_sub(point.patch.wrapping_add(4)));
            point.to = number;
        }
    }

    /// Undoes a link.
    fn unlink(&self, point: PatchPoint) {
        if point.guard != u32::MAX {
            self.mapping.patch(point.guard as usize, 0);
        }
        if point.unlinked != LinkSite::STAYS {
            let next = point.patch.wrapping_add(4);
            self.mapping.patch(point.patch as usize, point.unlinked.wrapping_sub(next));
        }
    }

    fn withdraw_and_outdate(&self, inner: &mut Inner, page: PageKey) -> usize {
        if let Some(p) = inner.pages.get_mut(&page) {
            p.stores = p.stores.wrapping_add(1);
        }
        self.withdraw(inner, page)
    }

    /// Withdraws the page's blocks, and those that reach into it; how many there were.
    fn withdraw(&self, inner: &mut Inner, page: PageKey) -> usize {
        let mut count = 0;
        let mut pages = vec![page];
        while let Some(key) = pages.pop() {
            let Some(p) = inner.pages.get_mut(&key) else { continue };
            let blocks = std::mem::take(&mut p.blocks);
            let incoming = std::mem::take(&mut p.incoming);
            p.inner_links.clear();
            p.starts.clear();
            let table = p.table;
            p.granules = 0;
            p.next_table = 0;
            p.ran_on = false;
            pages.append(&mut p.crossed_from);
            count += blocks.len();
            for number in blocks {
                let block = &mut inner.blocks[number as usize];
                block.live = false;
                self.mapping.set_entry(table, u32::from(block.start), 0);
            }
            for point in incoming {
                self.unlink(point);
            }
        }
        count
    }

    /// Forgets everything. No vCPU is in generated code, and each drops its contexts before it is again.
    pub fn clear(&self) -> Vec<PageKey> {
        let mut inner = self.lock();
        let pages = inner.pages.keys().copied().collect();
        *inner = Inner { translated: inner.translated, ..Inner::new(self.first_block) };
        self.mapping.discard(self.first_block);
        pages
    }

    fn offset(&self, host: usize) -> Option<u32> {
        let offset = host.checked_sub(self.mapping.code_base())?;
        (offset < self.mapping.code_len()).then_some(offset as u32)
    }

    /// What has been translated in all.
    pub fn translated(&self) -> Translated {
        self.lock().translated
    }

    /// Bytes of code, blocks and pages in the store.
    pub fn statistics(&self) -> (usize, usize, usize) {
        let inner = self.lock();
        (inner.bump, inner.blocks.len(), inner.pages.len())
    }
}

impl Inner {
    /// Nothing yet, with room for what a boot translates: memory that is not touched costs nothing, while a list that grows is
    /// copied to other memory again and again.
    fn new(bump: usize) -> Inner {
        const BLOCKS: usize = 128 << 10;
        Inner {
            bump,
            blocks: Vec::with_capacity(BLOCKS),
            block_codes: Vec::with_capacity(BLOCKS),
            sites: Vec::with_capacity(2 * BLOCKS),
            faults: Vec::with_capacity(8 * BLOCKS),
            recipes: Vec::with_capacity(2 * BLOCKS),
            ..Inner::default()
        }
    }

    /// The block at an offset of a page.
    fn block_of(&self, mapping: &CodeMapping, page: &Page, start: u16) -> Option<&BlockRecord> {
        let code = mapping.entry(page.table, start.into());
        let number = (code != 0).then(|| self.block_at(code + 1)).flatten()?;
        self.blocks.get(number)
    }

    /// The block whose code contains `offset` (or ends there: a return address may be its end).
    fn block_at(&self, offset: u32) -> Option<usize> {
        let stretch = (offset >> STRETCH) as usize;
        // Behind the last block's beginning there is no entry.
        let from = self.first_in.get(stretch).map_or(self.blocks.len(), |n| *n as usize);
        let to = self.first_in.get(stretch + 1).map_or(self.blocks.len(), |n| *n as usize);
        let after = from + self.block_codes.get(from..to)?.partition_point(|code| *code < offset);
        let number = after.checked_sub(1)?;
        let block = &self.blocks[number];
        (offset <= block.code + block.code_len).then_some(number)
    }
}

fn append<T: Copy>(to: &mut Vec<T>, from: &[T]) -> (u32, u32) {
    let first = to.len() as u32;
    to.extend_from_slice(from);
    (first, to.len() as u32)
}

/// The granules of bytes `start..end` of a page.
fn granules(start: u32, end: u32) -> u64 {
    if start >= end {
        return 0;
    }
    let first = start / GRANULE;
    let last = (end - 1) / GRANULE;
    let upto_last = if last == 63 { !0 } else { (1 << (last + 1)) - 1 };
    upto_last & !((1u64 << first) - 1)
}

#[cfg(test)]
mod tests {
    use super::*;
    use mimus_tcg_ir::backend::Stored;

    fn store() -> CodeStore {
        CodeStore::new(CodeMapping::new(1 << 20, 16, 2).unwrap(), 100, Optimise::Usual)
    }

    fn block(start: u16, len: u16) -> Block {
        Block { ops: Vec::new(), start, len, insns: 1, narrow: false, granules: 0 }
    }

    fn begin(s: &CodeStore, page: PageKey, flags: &AtomicU8) -> u32 {
        let before = flags.load(Ordering::SeqCst);
        s.begin(page, flags, before, before | PAGE_CODE).unwrap()
    }

    fn publish(s: &CodeStore, page: PageKey, b: &Block) -> usize {
        s.table(page).unwrap();
        let stamp = begin(s, page, &AtomicU8::new(0));
        let emit = |_at: usize, code: &mut Vec<u8>, _: &mut Emitted| *code = vec![0xcc; 32];
        match s.publish((page, stamp), None, b, emit, &mut Default::default()) {
            Published::At(at) => at,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn granule_maps() {
        assert_eq!(granules(0, 64), 1);
        assert_eq!(granules(63, 65), 3);
        assert_eq!(granules(4032, 4096), 1 << 63);
        assert_eq!(granules(0, 4096), !0);
        assert_eq!(granules(8, 8), 0);
    }

    #[test]
    fn blocks_are_found_by_their_code() {
        let s = store();
        let page = PageKey::new(0x7000, 0);
        s.table(page).unwrap();
        let stamp = begin(&s, page, &AtomicU8::new(0));
        let lengths = [32, 9000, 16, 4096, 5000, 64];
        let starts: Vec<usize> = (0..6u16)
            .map(|i| {
                let emit = |_: usize, code: &mut Vec<u8>, _: &mut Emitted| *code = vec![0; lengths[usize::from(i)]];
                match s.publish((page, stamp), None, &block(i * 64, 4), emit, &mut Default::default()) {
                    Published::At(at) => at - s.mapping().code_base(),
                    other => panic!("{other:?}"),
                }
            })
            .collect();
        let inner = s.lock();
        for (number, (start, length)) in starts.iter().zip(lengths).enumerate() {
            for within in [1, 2, length / 2, length] {
                assert_eq!(inner.block_at((start + within) as u32), Some(number), "{within} in {number}");
            }
        }
        assert_eq!(inner.block_at(10), None);
        assert_eq!(inner.block_at(900_000), None);
    }

    #[test]
    fn a_store_beside_code_keeps_it() {
        let s = store();
        let page = PageKey::new(0x7000, 0);
        let at = publish(&s, page, &block(0x100, 8));
        let table = s.table(page).unwrap();
        let flags = AtomicU8::new(PAGE_CODE);
        s.store_to_code(0x7000, 0x800, 8, &flags);
        assert_eq!(s.find(table, 0x100), Some(at));
        assert_eq!(s.translated(), Translated { blocks: 1, insns: 1, guest_bytes: 8, host_bytes: 32 });
        assert_eq!(flags.load(Ordering::SeqCst), PAGE_CODE);
        s.store_to_code(0x7000, 0x104, 1, &flags);
        assert_eq!(s.find(table, 0x100), None);
        assert_eq!(flags.load(Ordering::SeqCst), 0);
    }

    #[test]
    fn a_store_withdraws_every_mode() {
        let s = store();
        let modes = [0, 3, 0xfff].map(|mode| PageKey::new(0x7000, mode));
        let other = PageKey::new(0x8000, 3);
        publish(&s, modes[0], &block(0x100, 8));
        publish(&s, modes[1], &block(0x200, 8));
        let kept = publish(&s, other, &block(0x100, 8));
        let tables = modes.map(|page| s.table(page).unwrap());
        assert_eq!(s.page_of(tables[1]), Some(modes[1]));
        assert_eq!(s.find(tables[1], 0x100), None, "each mode has a table of its own");
        let stamp = begin(&s, modes[2], &AtomicU8::new(0));
        let flags = AtomicU8::new(PAGE_CODE);
        s.store_to_code(0x7000, 0x200, 1, &flags);
        assert_eq!((s.find(tables[0], 0x100), s.find(tables[1], 0x200)), (None, None));
        assert_eq!(flags.load(Ordering::SeqCst), 0);
        assert_eq!(s.find(s.table(other).unwrap(), 0x100), Some(kept));
        let emit = |_: usize, code: &mut Vec<u8>, _: &mut Emitted| *code = vec![0; 16];
        let late = s.publish((modes[2], stamp), None, &block(0, 4), emit, &mut Default::default());
        assert_eq!(late, Published::Stale, "a translation begun before the store");
    }

    #[test]
    fn a_block_knows_stores_to_itself() {
        let s = store();
        let page = PageKey::new(0x7000, 1);
        let at = publish(&s, page, &block(0x100, 8));
        publish(&s, page, &block(0x400, 8));
        let elsewhere = publish(&s, PageKey::new(0x8000, 1), &block(0x100, 8));
        assert!(s.hits_own_code(at + 8, 0x7000, 0x104, 1));
        assert!(s.hits_own_code(at + 8, 0x7000, 0x400, 1), "a block beside it, which it may be linked to");
        assert!(!s.hits_own_code(at + 8, 0x7000, 0x800, 8));
        assert!(!s.hits_own_code(at + 8, 0x8000, 0x104, 1));
        assert!(!s.hits_own_code(elsewhere + 8, 0x7000, 0x104, 1));
    }

    #[test]
    fn a_store_during_translation_makes_it_stale() {
        let s = store();
        let page = PageKey::new(0x7000, 0);
        let flags = AtomicU8::new(0);
        s.table(page).unwrap();
        let stamp = begin(&s, page, &flags);
        s.store_to_code(0x7000, 0x800, 8, &flags);
        let emit = |_: usize, code: &mut Vec<u8>, _: &mut Emitted| *code = vec![0; 16];
        let result = s.publish((page, stamp), None, &block(0, 4), emit, &mut Default::default());
        assert_eq!(result, Published::Stale);
    }

    #[test]
    fn what_is_found_out_withdraws_code_once_and_goes_with_it() {
        let s = store();
        let page = PageKey::new(0x7000, 3);
        let emitted = |offset: u16| {
            let mut told = Hints::default();
            let emit = |_: usize, code: &mut Vec<u8>, info: &mut Emitted| {
                *code = vec![0; 16];
                info.sites.clear();
                let (pc, stored) = (PagePc(i32::from(offset) + 4), Stored::Unknown);
                info.faults = vec![FaultEntry { host: 8, pc, len: 4, left: 0, stored, recipe: u16::MAX }];
                told = info.hints.clone();
            };
            let stamp = begin(&s, page, &AtomicU8::new(0));
            let Published::At(at) = s.publish((page, stamp), None, &block(offset, 8), emit, &mut Default::default())
            else {
                panic!("there is room")
            };
            (at, told)
        };
        let table = s.table(page).unwrap();
        assert!(!emitted(0x100).1.hot);
        s.sampled(table, 0x100);
        assert_eq!(s.find(table, 0x100), None);
        let (at, told) = emitted(0x100);
        assert!(told.hot && told.scattered.is_empty());
        s.sampled(table, 0x100);
        assert_eq!(s.find(table, 0x100), Some(at), "it is known already");
        s.scattered(at + 8, true);
        assert_eq!(s.find(table, 0x100), Some(at), "more may be found out");
        s.sampled(table, 0x100);
        assert_eq!(s.find(table, 0x100), None);
        let (again, told) = emitted(0x100);
        assert_eq!((&*told.parted, &*told.scattered), (&[0x104][..], &[][..]));
        s.scattered(at + 8, false);
        s.sampled(table, 0x100);
        assert_eq!(s.find(table, 0x100), Some(again), "by a vCPU that is still in the old code");
        s.scattered(again + 8, false);
        s.sampled(table, 0x100);
        assert_eq!(s.find(table, 0x100), None);
        let (third, told) = emitted(0x100);
        assert_eq!((&*told.parted, &*told.scattered), (&[0x104][..], &[0x104][..]));
        emitted(0x200);
        let other = s.find(table, 0x200).unwrap();
        s.scattered(other + 8, false);
        s.sampled(table, 0x100);
        assert_eq!(s.find(table, 0x100), Some(third), "not again each time");
        s.sampled(table, 0x100);
        assert_eq!(s.find(table, 0x100), None);
        assert_eq!(&*emitted(0x100).1.scattered, &[0x104, 0x204]);
        s.store_to_code(0x7000, 0x100, 4, &AtomicU8::new(PAGE_CODE));
        assert!(!emitted(0x100).1.hot, "another program's");
    }

    #[test]
    fn what_has_run_often_may_cool() {
        let s = store();
        let pages = [PageKey::new(0x7000, 3), PageKey::new(0x8000, 3)];
        let is_hot = |page: PageKey| {
            let mut hot = false;
            let emit = |_: usize, code: &mut Vec<u8>, info: &mut Emitted| {
                *code = vec![0; 16];
                hot = info.hints.hot;
            };
            let stamp = begin(&s, page, &AtomicU8::new(0));
            assert!(matches!(
                s.publish((page, stamp), None, &block(0x100, 8), emit, &mut Default::default()),
                Published::At(_)
            ));
            hot
        };
        let tables = pages.map(|page| s.table(page).unwrap());
        assert!(!pages.map(is_hot).contains(&true));
        s.sampled(tables[0], 0x100);
        assert!(is_hot(pages[0]));
        let stamp = begin(&s, pages[0], &AtomicU8::new(0));
        s.cool();
        assert_eq!(s.find(tables[0], 0x100), None);
        assert!(s.find(tables[1], 0x100).is_some(), "it was not hot");
        let late = s.publish((pages[0], stamp), None, &block(0, 4), |_, _, _| (), &mut Default::default());
        assert_eq!(late, Published::Stale, "a translation begun before");
        assert!(!is_hot(pages[0]));
        s.sampled(tables[0], 0x100);
        assert!(is_hot(pages[0]), "found running again");
    }

    #[test]
    fn compact_blocks_found_running_are_made_anew_one_by_one() {
        let s = CodeStore::new(CodeMapping::new(1 << 20, 16, 2).unwrap(), 100, Optimise::Tiered);
        let page = PageKey::new(0x7000, 3);
        let make = |start: u16| {
            let mut told = Hints::default();
            let emit = |_: usize, code: &mut Vec<u8>, info: &mut Emitted| {
                *code = vec![0; 64];
                told = info.hints.clone();
                info.sites =
                    vec![LinkSite { patch: 12, unlinked: 32, return_offset: 40, guard: u32::MAX, to: PagePc(0x100) }];
            };
            s.table(page).unwrap();
            let stamp = begin(&s, page, &AtomicU8::new(0));
            match s.publish((page, stamp), None, &block(start, 4), emit, &mut Default::default()) {
                Published::At(at) => (at, told.compact),
                other => panic!("{other:?}"),
            }
        };
        let ((one, compact), (two, _)) = (make(0x100), make(0x200));
        assert!(compact);
        let site = s.resolve_site(two + 40).unwrap();
        s.link(&site, one, page, |field, to| to.wrapping_sub(field + 4) as u32);
        let linked = |block: usize| s.mapping().patched(block + 12 - s.mapping().code_base());
        assert_eq!(linked(two), one.wrapping_sub(two + 16) as u32);
        assert_eq!(s.warm(one + 8, true), Some(Warm { number: 0, page, start: 0x100, due: false }));
        assert_eq!(s.warm(one + 8, true), Some(Warm { number: 0, page, start: 0x100, due: true }));
        let table = s.table(page).unwrap();
        assert_eq!(s.find(table, 0x100), Some(one), "until there is another");
        let (anew, compact) = make(0x100);
        assert!(!compact);
        assert_eq!((s.find(table, 0x100), s.find(table, 0x200)), (Some(anew), Some(two)));
        assert_eq!(linked(two), anew.wrapping_sub(two + 16) as u32, "the jump leads there");
        s.link(&site, one, page, |_, _| 0);
        assert_ne!(linked(two), 0, "nothing is linked to what has been replaced");
        assert!(make(0x300).1);
        s.store_to_code(0x7000, 0x100, 4, &AtomicU8::new(PAGE_CODE));
        assert!(make(0x100).1, "another program's");
    }

    #[test]
    fn a_full_store_says_so_and_clears() {
        let s = store();
        let page = PageKey::new(0x7000, 0);
        s.table(page).unwrap();
        let emit = |_: usize, code: &mut Vec<u8>, _: &mut Emitted| *code = vec![0; 2 << 20];
        assert_eq!(s.publish((page, 0), None, &block(0, 4), emit, &mut Default::default()), Published::Full);
        assert_eq!(s.clear(), vec![page]);
    }
}
