//! What is found out about code by running it, and which code is made anew for that.

use mimus_tcg_ir::backend::{FaultEntry, Hints, Optimise};

use super::{BlockRecord, CodeStore, Counts, Inner, PageKey};

/// What is known of a page's code.
#[derive(Default)]
pub(super) struct Known {
    pub hints: Hints,
    /// Something has been found out since the code was made.
    news: bool,
    /// Blocks do not run on into the next page: it is not the same page everywhere.
    pub stays: bool,
    /// Times that code was made anew for such news, and samples to wait for before it is again.
    renewals: u32,
    wait: u32,
}

impl Known {
    /// A vCPU is seen in the code. Whether it is to be made anew: for the first time at once, but not each time that one more of
    /// many accesses turns out to scatter, since all of the page goes.
    fn is_due(&mut self) -> bool {
        /// Samples between two times, at most: what scatters is slower until then.
        const PATIENCE: u32 = 4;
        if !std::mem::replace(&mut self.hints.hot, true) {
            return true;
        }
        if !self.news {
            return false;
        }
        if self.wait != 0 {
            self.wait -= 1;
            return false;
        }
        self.news = false;
        self.wait = self.renewals.min(PATIENCE - 1);
        self.renewals += 1;
        true
    }
}

/// Whether it was not in the list.
fn add(list: &mut Vec<u16>, pc: u16) -> bool {
    let is_new = !list.contains(&pc);
    if is_new {
        list.push(pc);
    }
    is_new
}

impl CodeStore {
    /// A vCPU was seen in code of the page with this entry table, about to go on at `offset`: from now on it is made for running
    /// often. Whether the block there is to be made anew by itself.
    pub fn sampled(&self, table: u32, offset: u16) -> bool {
        if !self.optimise.learns() {
            return false;
        }
        let Some(page) = self.page_of(table) else { return false };
        let mut guard = self.lock();
        let inner = &mut *guard;
        if self.optimise == Optimise::Tiered {
            return self.sampled_block(inner, page, offset);
        }
        if inner.hints.entry(page).or_default().is_due() {
            Counts::add(&self.counts.renewed, self.withdraw_and_outdate(inner, page));
        }
        false
    }

    /// The same where blocks are made anew one by one: a page's first sample says something of the block alone, the next of all
    /// that have begun often.
    fn sampled_block(&self, inner: &mut Inner, page: PageKey, start: u16) -> bool {
        let Some(p) = inner.pages.get_mut(&page) else { return false };
        let first = p.hot.is_empty();
        let is_new = !p.hot.contains(&start) && self.mapping.entry(p.table, start.into()) != 0;
        if is_new {
            p.hot.push(start);
            if !p.warm.contains(&start) {
                p.warm.push(start);
            }
            Counts::add(&self.counts.renewed, 1);
        }
        if first {
            return is_new;
        }
        let known = inner.hints.entry(page).or_default();
        let was_hot = known.hints.hot;
        if known.is_due() {
            // At first what was not hot yet, then what is made of what has been found out since.
            self.retire_where(inner, page, |block| block.hot == was_hot);
        }
        is_new
    }

    /// Withdraws one block.
    fn retire(&self, inner: &mut Inner, page: PageKey, number: u32) {
        let block = &mut inner.blocks[number as usize];
        block.live = false;
        let Some(p) = inner.pages.get_mut(&page) else { return };
        self.mapping.set_entry(p.table, u32::from(block.start), 0);
        for links in [&mut p.incoming, &mut p.inner_links] {
            links.retain(|point| {
                let leads_on = point.to != number;
                if !leads_on {
                    self.unlink(*point);
                }
                leads_on
            });
        }
    }

    /// No code is taken to run often any more, until it is found running again.
    pub fn cool(&self) {
        if !self.optimise.learns() {
            return;
        }
        let mut guard = self.lock();
        let inner = &mut *guard;
        let mut pages: Vec<PageKey> =
            inner.pages.iter().filter(|(_, p)| !p.hot.is_empty()).map(|(key, _)| *key).collect();
        for page in &pages {
            if let Some(p) = inner.pages.get_mut(page) {
                p.hot.clear();
            }
        }
        let hot =
            |(page, known): (&PageKey, &mut Known)| std::mem::replace(&mut known.hints.hot, false).then_some(*page);
        pages.extend(inner.hints.iter_mut().filter_map(hot));
        for page in pages {
            if self.optimise == Optimise::Tiered {
                self.retire_where(inner, page, |block| block.hot);
            } else {
                Counts::add(&self.counts.renewed, self.withdraw_and_outdate(inner, page));
            }
        }
    }

    /// Withdraws those of a page's blocks alone that are not compact and for which `goes`.
    fn retire_where(&self, inner: &mut Inner, page: PageKey, goes: impl Fn(&BlockRecord) -> bool) {
        let numbers: Vec<u32> = inner.pages.get(&page).map_or_else(Vec::new, |p| p.blocks.clone());
        for number in numbers {
            let block = &inner.blocks[number as usize];
            if block.live && !block.compact && goes(block) {
                self.retire(inner, page, number);
                Counts::add(&self.counts.renewed, 1);
            }
        }
    }

    /// Memory has been gathered for accesses of the page with this entry table, by the offsets of their instructions: they may
    /// have ranges again.
    pub fn has_memory_gathered(&self, table: u32, accesses: &[u16]) {
        let Some(page) = self.page_of(table).filter(|_| self.optimise.learns()) else { return };
        let mut guard = self.lock();
        let inner = &mut *guard;
        let Some(known) = inner.hints.get_mut(&page) else { return };
        let hints = &mut known.hints;
        let before = hints.scattered.len() + hints.parted.len();
        hints.scattered.retain(|pc| !accesses.contains(pc));
        hints.parted.retain(|pc| !accesses.contains(pc));
        if hints.scattered.len() + hints.parted.len() == before {
            return;
        }
        known.news = false;
        if self.optimise != Optimise::Tiered {
            Counts::add(&self.counts.renewed, self.withdraw_and_outdate(inner, page));
            return;
        }
        let (blocks, faults) = (&inner.blocks, &inner.faults);
        let has_one = |number: &u32| {
            let block = &blocks[*number as usize];
            let mut own = faults[block.faults.0 as usize..block.faults.1 as usize].iter();
            block.live && block.hot && own.any(|fault| accesses.contains(&(fault.pc.0 as u16)))
        };
        let blocks = inner.pages.get(&page).map_or_else(Vec::new, |p| p.blocks.clone());
        let goes: Vec<u32> = blocks.into_iter().filter(has_one).collect();
        for number in &goes {
            self.retire(inner, page, *number);
        }
        Counts::add(&self.counts.renewed, goes.len());
    }

    /// The access whose call returns to host address `ret` does not stay in a range, `in_parts`: but perhaps in one of two
    /// parts. When the page is sampled again its code is made anew.
    pub fn scattered(&self, ret: usize, in_parts: bool) {
        if !self.optimise.learns() {
            return;
        }
        self.learn(ret, |hints, pc| {
            let list = if in_parts { &mut hints.parted } else { &mut hints.scattered };
            add(list, pc)
        });
    }

    /// The indirect jump whose call returns to host address `ret` leads to other pages, or even `strays` to many places. When the
    /// page is sampled again its code is made anew.
    pub fn jumps_far(&self, ret: usize, strays: bool) {
        if self.optimise.learns() {
            self.learn(ret, |hints, pc| add(if strays { &mut hints.strays } else { &mut hints.far }, pc));
        }
    }

    /// Has `add` enter what was found out about the instruction whose call returns to host address `ret`.
    fn learn(&self, ret: usize, add: impl FnOnce(&mut Hints, u16) -> bool) {
        let Some(FaultEntry { pc, .. }) = self.resolve_fault(ret) else { return };
        let mut inner = self.lock();
        let Some(number) = self.offset(ret).and_then(|at| inner.block_at(at)) else { return };
        let BlockRecord { page, live, .. } = inner.blocks[number];
        if !live {
            return;
        }
        let known = inner.hints.entry(page).or_default();
        known.news |= add(&mut known.hints, pc.0 as u16);
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicU8;

    use mimus_core::memory::PAGE_CODE;
    use mimus_tcg_ir::backend::{Emitted, Stored};
    use mimus_tcg_ir::{Block, PagePc};

    use super::*;
    use crate::code::Published;
    use crate::code::mapping::CodeMapping;

    const PAGE: PageKey = PageKey::new(0x7000, 3);

    /// Makes the block at `start`: where it is, and whether it is compact and hot.
    fn make(s: &CodeStore, start: u16) -> (usize, bool, bool) {
        let block = Block { ops: Vec::new(), start, len: 4, insns: 1, narrow: false, granules: 0 };
        let mut told = (false, false);
        let emit = |_: usize, code: &mut Vec<u8>, info: &mut Emitted| {
            *code = vec![0; 64];
            told = (info.hints.compact, info.hints.hot);
        };
        let stamp = s.begin(PAGE, &AtomicU8::new(0), 0, PAGE_CODE).unwrap();
        match s.publish((PAGE, stamp), None, &block, emit, &mut Default::default()) {
            Published::At(at) => (at, told.0, told.1),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn a_block_seen_running_is_made_anew_alone_and_the_next_time_what_begins_often_too() {
        let s = CodeStore::new(CodeMapping::new(1 << 20, 16, 2).unwrap(), 100, Optimise::Tiered);
        let table = s.table(PAGE).unwrap();
        let (one, ..) = make(&s, 0x100);
        let (two, compact, hot) = make(&s, 0x200);
        assert!(compact && !hot);
        assert!(!s.sampled(table, 0x400), "there is no block");
        s.warm(two + 8, false);
        let (two, compact, hot) = make(&s, 0x200);
        assert!(!compact && !hot);
        let (three, ..) = make(&s, 0x300);
        assert!(s.sampled(table, 0x100));
        assert_eq!(s.find(table, 0x100), Some(one), "until it is made");
        let (anew, compact, hot) = make(&s, 0x100);
        assert!(!compact && hot);
        assert_eq!((s.find(table, 0x100), s.find(table, 0x200)), (Some(anew), Some(two)));
        assert!(!s.sampled(table, 0x100), "it is known already");
        assert_eq!((s.find(table, 0x100), s.find(table, 0x200)), (Some(anew), None), "what begins often is to be hot");
        assert_eq!(s.find(table, 0x300), Some(three), "what does not stays");
        assert!(make(&s, 0x200).2);
        s.cool();
        assert_eq!((s.find(table, 0x100), s.find(table, 0x200), s.find(table, 0x300)), (None, None, Some(three)));
        let (_, compact, hot) = make(&s, 0x100);
        assert!(!compact && !hot);
    }

    /// Makes the block at `start`, which has an access: its return address, and the hints that there were.
    fn make_accessing(s: &CodeStore, start: u16) -> (usize, Hints) {
        let block = Block { ops: Vec::new(), start, len: 8, insns: 2, narrow: false, granules: 0 };
        let mut told = Hints::default();
        let emit = |_: usize, code: &mut Vec<u8>, info: &mut Emitted| {
            *code = vec![0; 64];
            let (pc, stored) = (PagePc(i32::from(start) + 4), Stored::Unknown);
            info.faults = vec![FaultEntry { host: 8, pc, len: 4, left: 0, stored, recipe: u16::MAX }];
            told = info.hints.clone();
        };
        let stamp = s.begin(PAGE, &AtomicU8::new(0), 0, PAGE_CODE).unwrap();
        match s.publish((PAGE, stamp), None, &block, emit, &mut Default::default()) {
            Published::At(at) => (at + 8, told),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn blocks_whose_accesses_have_their_memory_gathered_are_made_anew() {
        let s = CodeStore::new(CodeMapping::new(1 << 20, 16, 2).unwrap(), 100, Optimise::Tiered);
        let table = s.table(PAGE).unwrap();
        let make_hot = |start| {
            make(&s, start);
            s.sampled(table, start);
            make_accessing(&s, start)
        };
        let (starts, accesses) = ([0x100u16, 0x200, 0x300], [0x104, 0x204, 0x304]);
        let find = |start: u16| s.find(table, start.into());
        for start in starts {
            let (ret, hints) = make_hot(start);
            assert!(hints.hot, "{start:#x}");
            s.scattered(ret, false);
        }
        s.sampled(table, 0x100);
        s.sampled(table, 0x100);
        let made = starts.map(|start| find(start).is_none().then(|| make_accessing(&s, start).1.scattered));
        assert!(made.iter().flatten().all(|scattered| *scattered == accesses), "{made:?}");
        let before = starts.map(find);
        assert!(before.iter().all(Option::is_some));
        s.has_memory_gathered(table, &[0x104, 0x304, 0x404]);
        assert_eq!(starts.map(find), [None, before[1], None]);
        assert_eq!(make_accessing(&s, 0x100).1.scattered, [0x204]);
        s.has_memory_gathered(table, &[0x104]);
        let there = s.find(table, 0x100);
        assert!(there.is_some(), "it has a range already");
        s.scattered(there.unwrap() + 8, true);
        s.has_memory_gathered(table, &[0x104]);
        assert_eq!((find(0x100), find(0x200)), (None, before[1]), "one of two parts is gone");
        assert!(make_accessing(&s, 0x100).1.parted.is_empty());
    }

    #[test]
    fn blocks_are_made_anew_for_where_their_jumps_lead() {
        let s = CodeStore::new(CodeMapping::new(1 << 20, 16, 2).unwrap(), 100, Optimise::Tiered);
        let table = s.table(PAGE).unwrap();
        make(&s, 0x100);
        s.sampled(table, 0x100);
        let (mut ret, mut told) = make_accessing(&s, 0x100);
        for (strays, far, stray) in [(false, vec![0x104], vec![]), (true, vec![0x104], vec![0x104])] {
            assert!(told.hot);
            // It is told once more before its code is made anew.
            s.jumps_far(ret, strays);
            s.jumps_far(ret, strays);
            let made = (0..4).find_map(|_| {
                s.sampled(table, 0x100);
                s.find(table, 0x100).is_none().then(|| make_accessing(&s, 0x100))
            });
            (ret, told) = made.unwrap();
            assert_eq!((&told.far, &told.strays), (&far, &stray));
        }
    }

    #[test]
    fn what_another_has_made_is_not_made_twice() {
        let s = CodeStore::new(CodeMapping::new(1 << 20, 16, 2).unwrap(), 100, Optimise::Usual);
        s.table(PAGE).unwrap();
        let (one, ..) = make(&s, 0x100);
        let block = Block { ops: Vec::new(), start: 0x100, len: 4, insns: 1, narrow: false, granules: 0 };
        let emit = |_: usize, _: &mut Vec<u8>, _: &mut Emitted| panic!("it is there");
        let stamp = s.begin(PAGE, &AtomicU8::new(0), 0, PAGE_CODE).unwrap();
        let there = s.publish((PAGE, stamp), None, &block, emit, &mut Default::default());
        assert_eq!(there, Published::There(one));
    }
}
