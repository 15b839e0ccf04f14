//! Memory of programs that is gathered in the host's address space (`mimus_core::memory`, `RamBlock::gather`), so that one
//! range entry serves all of it.
//!
//! A program's heap is contiguous to it and scattered in the guest's RAM. Accesses that go all over it leave every range, and
//! looking each page up puts a load of the addend between the address and the access. Where a program spends so long in code with
//! such accesses that moving the pages would have cost less, the pages around get second addresses one behind the other, and the
//! TLB's entries for them say those: all have one addend then, ranges are made of them as of any others, and the code is made
//! anew for that. Nothing is counted on the way: what does not run for long loses nothing.
//!
//! Whatever code scatters over a heap counts: what fills it says that it is worth moving before what reads it is found at all.
//! Times are CPU time of the vCPU's thread, in nanoseconds: what else the host does tells nothing of the guest.
//!
//! Pages are moved outside of generated code, by the machine's only vCPU: others might be storing to them.

use std::collections::HashSet;
use std::ops::Range;
use std::sync::Arc;

use mimus_core::bus::GuestPhys;
use mimus_core::memory::{FlatKind, GATHERED_PAGES, Gathered, PAGE_CODE, RamBlock, RamBlockId};
use mimus_tcg_ir::backend::{FaultEntry, Optimise};

use crate::code::Counts;
use crate::env::Cpu;
use crate::frontend::{Access, GuestFrontend};
use crate::ranges::MOST_GATHERED;

const PAGE: u64 = 4096;
/// Whether anything is gathered at all: without it accesses that scatter look their pages up.
const GATHERS: bool = true;
/// What a sample stands for, at most: guests' timers tick so often. Where several things find a vCPU one
/// behind the other, it is the time between them.
const SAMPLE: u64 = 4_000_000;
/// Whether there are more pages than before is looked at so far apart. An eighth more in a sample's time is more.
const APART: u64 = SAMPLE / 2;
const MORE: u64 = 8;
/// This part of the time that code spends whose accesses scatter is gained where memory has links in it, which code follows:
/// the next access waits for the look-up. Elsewhere look-ups are mostly made while other things are.
const GAIN: u64 = 3;
const GAIN_WITHOUT_LINKS: u64 = 20;
/// One word in so many at least is a link where memory has links.
const LINKS: usize = 32;
/// Pages that are looked at for links.
const LOOKED_AT: usize = 16;
/// What moving any costs besides: a huge page of the host's is split, code is made anew.
const COST_OF_ANY: u64 = 200_000;
/// What moving a page costs until that has been measured, and what is believed of it: where no two pages follow one another in
/// RAM and the host's huge pages are split for them, it is most.
const COST: u64 = 8000;
const COSTS: std::ops::RangeInclusive<u64> = 2000..=16_000;
/// Places in code that are remembered.
const PLACES: usize = 8;
/// Heaps that are.
const HEAPS: usize = 8;
/// Pages that are gathered together, at least and at most: an array of a stack's may lie over the end of one.
const FEWEST: usize = 2;
const MOST: usize = MOST_GATHERED as usize;
/// As many are few.
const FEW: u64 = 32;
/// What may be spent on it in a row, and the part of all time.
const IN_A_ROW: u64 = 8_000_000;
const PART: u64 = 64;
/// Of pages that are gathered already, where a run has grown: this many in so many are too many to begin anew.
const TOO_MANY: (usize, usize) = (3, 4);

/// Code with accesses that scatter.
#[derive(Debug)]
struct Place {
    /// Entry table of its page, and the context it runs in.
    table: u32,
    key: u64,
    /// Offsets of their instructions in the page, and what each accessed when it was found, the last one at the end.
    accesses: Vec<(u16, u64)>,
}

/// Memory over which accesses scatter.
#[derive(Debug)]
struct Heap {
    /// The context it is in, and an address in it.
    key: u64,
    va: u64,
    /// Pages that there were around when that was looked at, and whether they were more than the time before, which nobody
    /// knows at first.
    pages: u64,
    looked: u64,
    grows: bool,
    /// How long code ran whose accesses scatter there.
    ran: u64,
    /// There are no links in these pages.
    unlinked: bool,
}

impl Heap {
    /// There are so many pages now.
    fn look(&mut self, pages: u64, now: u64) {
        let since = now.saturating_sub(self.looked).min(SAMPLE);
        if since < APART {
            return;
        }
        // Where there are fewer, another program's heap may have come.
        let fewer = pages < self.pages - self.pages / MORE;
        self.grows = fewer || pages.saturating_sub(self.pages) * MORE * SAMPLE > self.pages * since;
        self.unlinked &= !self.grows;
        if fewer {
            self.ran = 0;
        }
        (self.pages, self.looked) = (pages, now);
    }

    /// Whether moving its pages, at `cost` each, has come to less than what accesses lost for want of that. What is gathered
    /// while there are more and more pages does not last.
    fn pays(&self, pages: u64, cost: u64) -> bool {
        let gain = if self.unlinked { GAIN_WITHOUT_LINKS } else { GAIN };
        !self.grows && pages >= FEWEST as u64 && self.ran >= gain * (COST_OF_ANY + pages * cost)
    }
}

/// What a vCPU knows of gathered pages.
pub(crate) struct Gathering {
    /// Whether memory is gathered. Not known before the first look.
    allowed: Option<bool>,
    /// Where accesses scatter, what was found last at the end, and what they scatter over.
    places: Vec<Place>,
    heaps: Vec<Heap>,
    /// For which memory is to be gathered, and where.
    due: Option<(Place, u64)>,
    /// When the last sample was.
    sampled: u64,
    /// What moving a page costs.
    cost: u64,
    /// Whose pages they are.
    block: Option<RamBlockId>,
    /// Host address of its arena.
    arena: u64,
    /// By place there: the virtual page that it was gathered as.
    pages: Vec<u64>,
    /// What may be spent now, as of when.
    credit: u64,
    as_of: u64,
}

impl Default for Gathering {
    fn default() -> Gathering {
        Gathering {
            allowed: None,
            places: Vec::new(),
            heaps: Vec::new(),
            due: None,
            sampled: 0,
            cost: COST,
            block: None,
            arena: 0,
            pages: Vec::new(),
            credit: IN_A_ROW,
            as_of: 0,
        }
    }
}

impl Gathering {
    /// The access at `offset` of code with this table scatters, to `va` among others, around which there are `around`. Whether
    /// memory is to be gathered for it.
    fn note(&mut self, (table, key): (u32, u64), access: (u16, u64), around: &Range<u64>, now: u64) -> bool {
        let i = self.places.iter().position(|p| p.table == table && p.key == key).unwrap_or_else(|| {
            self.remember(Place { table, key, accesses: Vec::new() });
            self.places.len() - 1
        });
        self.places[i].accesses.retain(|other| other.0 != access.0);
        self.places[i].accesses.push(access);
        let due = self.pays(key, access.1, around, (0, now));
        if due {
            self.due = Some((self.places.remove(i), access.1));
        }
        due
    }

    /// Remembers a place, rather than the one that has been there for longest.
    fn remember(&mut self, place: Place) {
        if self.places.len() >= PLACES {
            self.places.remove(0);
        }
        self.places.push(place);
    }

    /// Code has run for `ran` more whose accesses scatter to `va` among others, around which there are `around`. Whether
    /// gathering that pays now.
    fn pays(&mut self, key: u64, va: u64, around: &Range<u64>, (ran, now): (u64, u64)) -> bool {
        let (pages, cost) = (pages_in(around), self.cost);
        if pages == 0 {
            return false;
        }
        let heap = self.heap(key, va, around, now);
        heap.ran += ran;
        heap.look(pages, now);
        let pays = heap.pays(pages, cost);
        if pays {
            heap.va = va;
        }
        pays
    }

    /// What is known of the memory at `va`, around which there are these pages.
    fn heap(&mut self, key: u64, va: u64, around: &Range<u64>, now: u64) -> &mut Heap {
        let i = self.heaps.iter().position(|heap| heap.key == key && around.contains(&heap.va)).unwrap_or_else(|| {
            if self.heaps.len() == HEAPS {
                self.heaps.remove(0);
            }
            let pages = pages_in(around);
            self.heaps.push(Heap { key, va, pages, looked: now, grows: true, ran: 0, unlinked: false });
            self.heaps.len() - 1
        });
        &mut self.heaps[i]
    }

    /// Code with this table was found running; `around`: which pages there are around an address. Whether memory is to be
    /// gathered for it.
    fn dwells(&mut self, table: u32, key: u64, around: impl Fn(u64) -> Range<u64>, now: u64) -> bool {
        let since = now.saturating_sub(self.sampled).min(SAMPLE);
        self.sampled = now;
        let Some(i) = self.places.iter().position(|p| p.table == table && p.key == key) else { return false };
        let (mut seen, mut due): (Vec<Range<u64>>, _) = (Vec::new(), None);
        for at in (0..self.places[i].accesses.len()).rev() {
            let va = self.places[i].accesses[at].1;
            if !seen.iter().any(|range| range.contains(&va)) {
                let range = around(va);
                let pays = self.pays(key, va, &range, (since, now));
                due = due.or(pays.then_some(va));
                seen.push(range);
            }
        }
        if let Some(va) = due {
            self.due = Some((self.places.remove(i), va));
        }
        due.is_some()
    }

    /// Nothing more is to be done for the memory at these addresses: what scatters over it from now on counts anew.
    fn is_served(&mut self, key: u64, range: &Range<u64>) {
        self.heaps.retain(|heap| heap.key != key || !range.contains(&heap.va));
    }

    /// Learns what it cost to move pages.
    fn moved(&mut self, pages: usize, time: u64) {
        let Some(measured) = time.saturating_sub(COST_OF_ANY).checked_div(pages as u64) else { return };
        self.cost = (self.cost * 3 + measured.clamp(*COSTS.start(), *COSTS.end())) / 4;
        log::debug!("gathered {pages} pages in {} µs", time / 1000);
    }
}

/// The time that this thread has had.
fn now() -> u64 {
    let t = rustix::time::clock_gettime(rustix::time::ClockId::ThreadCPUTime);
    t.tv_sec as u64 * 1_000_000_000 + t.tv_nsec as u64
}

fn pages_in(range: &Range<u64>) -> u64 {
    (range.end - range.start) / PAGE
}

/// Pages to gather.
struct Run {
    block: Arc<RamBlock>,
    /// Virtual address of the first.
    first: u64,
    /// Numbers in the block.
    pages: Vec<u32>,
    /// Where the TLB grants something: whether that is stores too.
    entered: Vec<Option<bool>>,
}

impl Run {
    /// Its virtual addresses.
    fn range(&self) -> Range<u64> {
        self.first..self.first + self.pages.len() as u64 * PAGE
    }

    /// Whether addresses of these pages are in some of them.
    fn has_links(&self) -> bool {
        let range = self.range();
        let mut buffer = [0; PAGE as usize];
        let (mut words, mut links) = (0, 0);
        for page in self.pages.iter().step_by(self.pages.len().div_ceil(LOOKED_AT).max(1)) {
            if self.block.read(u64::from(*page) * PAGE, &mut buffer) {
                let found = links_in(&buffer, &range);
                (words, links) = (words + found.0, links + found.1);
            }
        }
        links * LINKS >= words.max(1)
    }
}

/// Words that may be addresses, and which of them are in `range`.
fn links_in(bytes: &[u8], range: &Range<u64>) -> (usize, usize) {
    // Guests whose addresses have 32 bits have them in so many; the halves of others' are in the range, too.
    let size = if range.end > 1 << 32 { 8 } else { 4 };
    let value = |word: &[u8]| word.iter().rev().fold(0, |value, byte| value << 8 | u64::from(*byte));
    (bytes.len() / size, bytes.chunks_exact(size).filter(|word| range.contains(&value(word))).count())
}

impl<F: GuestFrontend> Cpu<F> {
    /// Whether memory may be gathered.
    fn gathers(&mut self) -> bool {
        let machine = &self.machine;
        *self.gathering.allowed.get_or_insert_with(|| {
            // Where runs are to repeat nothing depends on time; another engine's guest is not for long.
            GATHERS && machine.peers().len() == 1 && !machine.interpret && !self.counting.on && self.lent.is_none()
        })
    }

    /// Whether there are so few pages around `va`, a stack's for instance, that gathering them pays for an access that would do
    /// with two parts of a range: these cost it two or three cycles.
    pub(crate) fn is_among_few_pages(&self, va: u64) -> bool {
        pages_in(&self.mmu.context().pages_around(va)) <= FEW
    }

    /// The access that missed its range for `va`, from code whose call returns to `ret`, scatters, or is to have two parts.
    pub(crate) fn note_scattered(&mut self, ret: usize, va: u64) {
        if !self.gathers() {
            return;
        }
        let Some(FaultEntry { pc, .. }) = self.machine.store.resolve_fault(ret) else { return };
        let Some(table) = self.mmu.context().code_table(self.guest_pc(ret)) else { return };
        let (key, around) = (self.mmu.key(), self.mmu.context().pages_around(va));
        if self.gathering.note((table, key), (pc.0 as u16, va), &around, now()) {
            self.check_events();
        }
        // Where everything is tried, at once.
        if self.machine.optimise == Optimise::Forced {
            let place = self.gathering.places.pop();
            self.gathering.due = place.map(|place| (place, va)).or(self.gathering.due.take());
            self.check_events();
        }
    }

    /// A sample found the vCPU in the code with this entry table. Called outside of generated code.
    pub(crate) fn note_dwelling(&mut self, table: u32) {
        if self.gathering.places.is_empty() {
            return;
        }
        let (key, context) = (self.mmu.key(), self.mmu.context());
        if self.gathering.dwells(table, key, |va| context.pages_around(va), now()) {
            self.check_events();
        }
    }

    /// Gathers what is to be. Outside of generated code.
    pub(crate) fn gather(&mut self) {
        let Some((mut place, va)) = self.gathering.due.take() else { return };
        let began = now();
        let g = &mut self.gathering;
        g.credit = IN_A_ROW.min(g.credit + began.saturating_sub(g.as_of) / PART);
        g.as_of = began;
        // A vCPU may have come since this one had an answer.
        if self.mmu.key() != place.key || g.credit < IN_A_ROW / 8 || self.machine.peers().len() != 1 {
            return;
        }
        let forced = self.machine.optimise == Optimise::Forced;
        if let Some(run) = self.run_around(va) {
            let heap = self.gathering.heaps.iter_mut().find(|heap| heap.key == place.key && heap.va == va);
            if !forced && !heap.as_ref().is_some_and(|heap| heap.unlinked) && !run.has_links() {
                heap.into_iter().for_each(|heap| heap.unlinked = true);
                self.gathering.remember(place);
                return;
            }
            match run.block.gather(&run.pages) {
                Some(gathered) => {
                    self.gathered(&run, &gathered);
                    self.gathering.moved(gathered.pages, now() - began);
                    let is_in = |va: u64| va.wrapping_sub(run.first) < gathered.pages as u64 * PAGE;
                    let served: Vec<u16> = place.accesses.iter().filter(|a| is_in(a.1)).map(|a| a.0).collect();
                    self.machine.store.has_memory_gathered(place.table, &served);
                    self.gathering.is_served(place.key, &run.range());
                    // What scatters over other memory still does, a stack's pages being the first that are worth it.
                    place.accesses.retain(|access| !is_in(access.1));
                    if !place.accesses.is_empty() {
                        self.gathering.remember(place);
                    }
                }
                // Another time: at the next sample, perhaps.
                None => self.gathering.remember(place),
            }
        } else {
            self.gathering.is_served(place.key, &(va..va + 1));
        }
        self.gathering.credit = self.gathering.credit.saturating_sub(now() - began);
    }

    fn gathered(&mut self, run: &Run, gathered: &Gathered) {
        let counts = self.machine.store.counts();
        Counts::add(&counts.gathered, 1);
        Counts::add(&counts.pages_gathered, gathered.pages);
        let second = |place: &u32| run.block.second_address(*place).map(|host| host as u64);
        let left: Vec<u64> = gathered.left.iter().filter_map(second).collect();
        if !left.is_empty() {
            self.mmu.drop_hosts(&left);
        }
        // Only one block of a machine's has an arena.
        let g = &mut self.gathering;
        g.block = Some(run.block.id());
        g.arena = run.block.second_address(0).map_or(0, |host| host as u64);
        // No page but the first has its address: these are none's.
        g.pages.resize(GATHERED_PAGES, !0);
        for i in 0..gathered.pages {
            g.pages[gathered.place as usize + i] = run.first + i as u64 * PAGE;
        }
        for (i, entered) in run.entered.iter().enumerate().take(gathered.pages) {
            let access = match entered {
                Some(true) => Access::Store,
                Some(false) => Access::Load,
                None => continue,
            };
            // Without it the page is entered when it is accessed.
            let _entered = self.locate(run.first + i as u64 * PAGE, access);
        }
    }

    /// The second address of a page of a block, if it has one where it is next to its neighbours at `va`.
    pub(crate) fn second_address(&self, block: &RamBlock, offset: u64, va: u64) -> Option<u64> {
        let g = &self.gathering;
        if g.block != Some(block.id()) {
            return None;
        }
        let place = block.place_of(offset / PAGE)?;
        let is_its = g.pages.get(place as usize) == Some(&(va & !(PAGE - 1)));
        is_its.then(|| block.second_address(place)).flatten().map(|host| host as u64)
    }

    /// Whether a host address of RAM is a second one of its page.
    pub fn is_second_address(&self, host: *const u8) -> bool {
        let g = &self.gathering;
        (host as u64).wrapping_sub(g.arena) < g.pages.len() as u64 * PAGE
    }

    /// Two host addresses of RAM as such that can be compared. A page has one second address at most: only where one of them
    /// is such and the other is not, it is looked up where it is in its block's own memory.
    pub fn comparable(&self, addresses: [*mut u8; 2]) -> [*mut u8; 2] {
        let [a, b] = addresses.map(|host| self.is_second_address(host));
        if a == b { addresses } else { addresses.map(|host| self.own_address(host)) }
    }

    /// Where the byte at a host address of RAM is in its block's own memory.
    fn own_address(&self, host: *mut u8) -> *mut u8 {
        if !self.is_second_address(host) {
            return host;
        }
        let own = |block: &Arc<RamBlock>| Some(block.host_ptr(block.offset_of_second(host as u64)?));
        self.view.ranges().iter().find_map(|range| own(range.ram_at(range.base)?.0)).unwrap_or(host)
    }

    /// The page of RAM at physical address `pa`, if it may be gathered.
    fn gatherable(&self, pa: u64) -> Option<(&Arc<RamBlock>, u32)> {
        let range = self.view.lookup(GuestPhys(pa))?;
        if !matches!(range.kind, FlatKind::Ram { readonly: false, .. }) {
            return None;
        }
        let (block, offset) = range.ram_at(GuestPhys(pa & !(PAGE - 1)))?;
        Some((block, u32::try_from(offset / PAGE).ok()?))
    }

    /// What is contiguous to the guest around `va`: of one block, without code, no page twice. Pages that the TLB does not
    /// know are taken along where they are not most.
    fn run_around(&mut self, va: u64) -> Option<Run> {
        let middle = va & !(PAGE - 1);
        let (pa, _) = F::debug_walk(self, va, Access::Load)?;
        let block = self.gatherable(pa)?.0.clone();
        if !block.can_be_gathered() {
            return None;
        }
        let mut seen = HashSet::new();
        let mut known = 1;
        let mut unknown = 0;
        let mut look = |cpu: &mut Self, at: u64| -> Option<(u32, Option<bool>)> {
            let context = cpu.mmu.context();
            let write = context.lookup_write(at);
            let (page, entered) = match write.or_else(|| context.lookup_read(at)) {
                Some(host) => {
                    let own = host.wrapping_sub(block.host_ptr(0) as u64);
                    let offset = if own < block.len() { own } else { block.offset_of_second(host)? };
                    known += 1;
                    ((offset / PAGE) as u32, Some(write.is_some()))
                }
                None => {
                    unknown += 1;
                    if unknown > 2 * known {
                        return None;
                    }
                    let (pa, _) = F::debug_walk(cpu, at, Access::Load)?;
                    let (other, page) = cpu.gatherable(pa)?;
                    Arc::ptr_eq(other, &block).then_some((page, None))?
                }
            };
            let is_code = block.page_flags(page.into()).load(std::sync::atomic::Ordering::SeqCst) & PAGE_CODE != 0;
            (!is_code && seen.insert(page)).then_some((page, entered))
        };
        let mut before = Vec::new();
        let mut at = middle;
        while let Some(next) = at.checked_sub(PAGE).filter(|_| before.len() < MOST / 2)
            && let Some(page) = look(self, next)
        {
            before.push(page);
            at = next;
        }
        let mut list: Vec<(u32, Option<bool>)> = before.into_iter().rev().collect();
        let mut next = Some(middle);
        while let Some(page) = next.filter(|_| list.len() < MOST).and_then(|at| look(self, at)) {
            list.push(page);
            next = next.and_then(|at| at.checked_add(PAGE));
        }
        let (pages, entered) = list.into_iter().unzip();
        let run = Run { block, first: at, pages, entered };
        (run.pages.len() >= FEWEST && self.gains(&run)).then_some(run)
    }

    /// Whether the run is neither one piece of RAM nor mostly gathered.
    fn gains(&self, run: &Run) -> bool {
        let is_piece = run.pages.windows(2).all(|w| w[0] + 1 == w[1]);
        let addresses = (run.first..).step_by(PAGE as usize).zip(&run.pages);
        let second = |(va, page): (u64, &u32)| self.second_address(&run.block, u64::from(*page) * PAGE, va);
        let gathered = addresses.filter_map(second).count();
        !is_piece && gathered * TOO_MANY.1 < run.pages.len() * TOO_MANY.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// So many pages around 0x7000.
    fn pages(n: u64) -> Range<u64> {
        0x5000..0x5000 + n * PAGE
    }

    #[test]
    fn memory_is_gathered_for_code_that_runs_for_long() {
        let mut g = Gathering::default();
        let never = |_| panic!("nothing scatters there");
        let mut now = 0;
        let mut next = || {
            now += SAMPLE;
            now
        };
        assert!(!g.dwells(1, 7, never, next()));
        g.note((1, 7), (8, 0x5000), &pages(400), next());
        g.note((2, 7), (8, 0x6000), &pages(400), next());
        g.note((1, 7), (12, 0x7800), &pages(400), next());
        g.note((1, 7), (8, 0x7000), &pages(400), next());
        assert_eq!(g.heaps.len(), 1);
        // 400 pages cost 3.4 ms: a third of 3 samples.
        let mut find = |key, n| g.dwells(1, key, |_| pages(n), next());
        assert!(!find(7, 400) && !find(7, 400) && !find(8, 400));
        assert!(!find(7, 600) && find(7, 600), "not while there are more");
        let (place, va) = g.due.take().unwrap();
        assert_eq!((place.table, place.accesses, va), (1, vec![(12, 0x7800), (8, 0x7000)], 0x7000));
        assert!(!g.dwells(1, 7, never, next()), "until it is found to scatter again");
        // Without links it has to last for longer.
        g.is_served(7, &pages(1));
        assert_eq!(g.heaps.len(), 1);
        g.is_served(7, &pages(3));
        assert!(g.heaps.is_empty());
        g.note((3, 7), (8, 0x7000), &pages(400), next());
        assert!(!g.dwells(3, 7, |_| pages(400), next()));
        g.heaps[0].unlinked = true;
        assert_eq!((0..20).position(|_| g.dwells(3, 7, |_| pages(400), next())), Some(15));
        // It cost twice as much as was thought.
        for _ in 0..20 {
            g.moved(100, 1_800_000);
        }
        assert!((15_900..=16_000).contains(&g.cost), "{}", g.cost);
        g.remember(Place { table: 9, key: 7, accesses: Vec::new() });
        for table in 10..10 + 2 * PLACES as u32 {
            g.note((table, table.into()), (0, 0), &(0..PAGE), next());
        }
        assert_eq!((g.places.len(), g.heaps.len()), (PLACES, HEAPS));
    }

    #[test]
    fn who_fills_a_heap_says_how_long_it_was_looked_up_for_who_reads_it() {
        let mut g = Gathering::default();
        let at = |n: u64| n * SAMPLE;
        g.note((1, 7), (8, 0x6000), &pages(100), at(1));
        for n in 2..8 {
            assert!(!g.dwells(1, 7, |_| pages(n * 100), at(n)), "it grows");
        }
        assert!(
            !g.note((2, 7), (4, 0x5_0000), &pages(750), at(7) + APART / 2),
            "nobody knows yet whether it still does"
        );
        assert!(g.note((2, 7), (4, 0x4_0000), &pages(750), at(8)));
        assert_eq!(g.due.take().map(|due| (due.0.table, due.1)), Some((2, 0x4_0000)));
    }

    #[test]
    fn where_pages_have_gone_a_heap_begins_anew() {
        let mut g = Gathering::default();
        g.note((1, 7), (8, 0x6000), &pages(300), SAMPLE);
        let mut found = |n, at: u64| g.dwells(1, 7, |_| pages(n), at * SAMPLE);
        assert!(!found(300, 2), "2.6 ms at three times that are two samples");
        assert!(!found(40, 3) && !found(60, 4) && !found(80, 5), "it grows");
        assert!(found(80, 6));
    }

    #[test]
    fn samples_stand_for_the_time_between_them() {
        let mut g = Gathering::default();
        g.note((1, 7), (8, 0x7000), &pages(100), 0);
        // 100 pages cost 1 ms, which has to be a third; a page of a stack is not among them.
        g.note((1, 7), (12, 0x70_0000), &(0x70_0000..0x70_1000), 0);
        let around = |va: u64| if va == 0x7000 { pages(100) } else { 0x70_0000..0x70_1000 };
        let found = (1..).find(|n| g.dwells(1, 7, around, n * SAMPLE / 10));
        assert_eq!((found, g.due.take().map(|due| due.1)), (Some(8), Some(0x7000)));
        g.note((1, 7), (8, 0x30_0000), &(0x30_0000..0x30_2000), SAMPLE);
        assert!(g.dwells(1, 7, |va| va..va + 2 * PAGE, 2 * SAMPLE), "two of a stack's pages");
    }

    #[test]
    fn links_are_addresses_of_the_pages_themselves() {
        let words = |words: &[u64]| words.iter().flat_map(|w| w.to_le_bytes()).collect::<Vec<u8>>();
        let (low, high) = (0x8_1000..0x9_0000, 0x7f00_0000_1000..0x7f00_0010_0000);
        let bytes = words(&[0, 0x7f00_0000_1008, 5, 0x7f00_000f_fff8, 0x7f00_0010_0000, 0x8_1234]);
        assert_eq!((links_in(&bytes, &high), links_in(&bytes, &low)), ((6, 2), (12, 1)));
        assert_eq!(links_in(&words(&[0x8_1000_0008_ffff]), &low), (2, 2));
    }
}
