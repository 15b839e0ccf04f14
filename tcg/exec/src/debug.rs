//! Debugging of a vCPU: breakpoints, watchpoints, single steps.
//!
//! **Breakpoints** are virtual addresses of one vCPU. Code is shared by physical page, so a page whose mapping has
//! breakpoints gets *cuts*: offsets at which blocks end, and at which a block begins that only asks for careful
//! execution. What asks is then compared with the vCPU's own breakpoints: no match (another address space, another
//! vCPU, a breakpoint long removed) and the instruction is executed carefully. Code without cuts costs nothing.
//! A page gets its cuts when a vCPU enters it into its code map, which inserting a breakpoint makes it do again.
//! Cuts that no breakpoint wants any more go when they are next run into, so that debuggers which take all
//! breakpoints out at every stop cause no new translation.
//!
//! **Watchpoints** withhold the TLB's permission for their pages: accesses there take the slow path, which compares
//! addresses. A hit abandons the instruction before its access; the instruction is then executed carefully, and the
//! stop is reported after it, as debuggers expect. A helper that accesses memory in the midst of what it does cannot
//! be abandoned: it has the block end after it. Accesses by page walks and by devices are not watched.
//!
//! **Steps** are careful executions. One ends after an instruction, or at the first instruction of the handler of the
//! trap or interrupt it took instead.

use std::collections::btree_map::Entry;
use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use mimus_core::accel::{AccelError, Catch, DebugCaps, DebugStop, VcpuDebug, WatchKind};
use mimus_core::bus::GuestVirt;
use mimus_tcg_ir::{Block, Op, PagePc};

use crate::code::PageKey;
use crate::env::Cpu;
use crate::frontend::{CodeWindow, GuestFrontend, TranslateMode};

const PAGE: u64 = 4096;
/// A watchpoint of more pages than this empties the TLB instead of looking for each.
const MAX_DROPS: u64 = 4096;
/// Bytes of the longest instruction of any guest, and one more.
const LONGEST_INSN: u16 = 16;
/// An entry guard that no page's table equals: the block always asks for careful execution.
pub(crate) const NEVER: u32 = u32::MAX;

/// A machine's cuts.
#[derive(Default)]
pub(crate) struct Cuts {
    /// There is one, or has been: translation asks for each block.
    any: AtomicBool,
    table: Mutex<CutTable>,
}

#[derive(Default)]
struct CutTable {
    /// How many vCPUs have a breakpoint at an address.
    wanted: HashMap<u64, u32>,
    /// Cut offsets of a page, each with the addresses it is for.
    pages: HashMap<PageKey, HashMap<u16, HashSet<u64>>>,
}

impl Cuts {
    fn lock(&self) -> MutexGuard<'_, CutTable> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn want(&self, va: u64) {
        *self.lock().wanted.entry(va).or_default() += 1;
    }

    fn unwant(&self, va: u64) {
        let mut table = self.lock();
        if let Some(n) = table.wanted.get_mut(&va) {
            *n -= 1;
            if *n == 0 {
                table.wanted.remove(&va);
            }
        }
    }

    /// Adds cuts for the addresses `vas`, which are in page `key`; true if a place is cut that was not.
    fn add(&self, key: PageKey, vas: impl Iterator<Item = u64>) -> bool {
        let mut table = self.lock();
        self.any.store(true, Ordering::SeqCst);
        let page = table.pages.entry(key).or_default();
        let mut new = false;
        for va in vas {
            let at = page.entry((va & (PAGE - 1)) as u16).or_default();
            new |= at.is_empty();
            at.insert(va);
        }
        new
    }

    /// Whether page `key` is cut at `offset`.
    pub fn at(&self, key: PageKey, offset: u16) -> bool {
        self.any.load(Ordering::SeqCst) && self.lock().pages.get(&key).is_some_and(|page| page.contains_key(&offset))
    }

    /// The first cut of page `key` from `offset` on.
    pub fn first_from(&self, key: PageKey, offset: u16) -> Option<u16> {
        if !self.any.load(Ordering::SeqCst) {
            return None;
        }
        self.lock().pages.get(&key)?.keys().copied().filter(|&o| o >= offset).min()
    }

    /// Forgets the cut at `offset` of page `key` if nobody wants it any more; true if so.
    fn forget(&self, key: PageKey, offset: u16) -> bool {
        let mut guard = self.lock();
        let table = &mut *guard;
        let Some(page) = table.pages.get_mut(&key) else { return false };
        let Some(vas) = page.get_mut(&offset) else { return false };
        vas.retain(|va| table.wanted.contains_key(va));
        let gone = vas.is_empty();
        if gone {
            page.remove(&offset);
        }
        if page.is_empty() {
            table.pages.remove(&key);
        }
        gone
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
struct Watchpoint {
    va: u64,
    len: u64,
    kind: WatchKind,
}

impl Watchpoint {
    fn overlaps(&self, va: u64, len: u64) -> bool {
        va.wrapping_sub(self.va) < self.len || self.va.wrapping_sub(va) < len
    }

    fn reads(&self) -> bool {
        self.kind != WatchKind::Write
    }

    fn writes(&self) -> bool {
        self.kind != WatchKind::Read
    }
}

/// What a vCPU is debugged for.
#[derive(Default)]
pub(crate) struct DebugState {
    /// Each with how often it was inserted.
    breakpoints: BTreeMap<u64, u32>,
    watchpoints: Vec<Watchpoint>,
    stepping: bool,
    /// Steps do not take interrupts.
    mask_interrupts: bool,
    /// Stopped before the breakpoint here: the first instruction is executed whatever is there.
    resume_over: Option<u64>,
    /// An access has hit a watchpoint: its instruction is to be executed carefully.
    watch_hit: bool,
    /// During that: what was accessed.
    recording: bool,
    recorded: Option<DebugStop>,
    /// A reason to leave `run`.
    stop: Option<DebugStop>,
    /// Steps to make before stopping for one.
    more_steps: u64,
    pub(crate) catches: crate::catch::Catches,
}

impl DebugState {
    /// The vCPU goes on elsewhere: what was about to happen does not.
    pub fn forget_pending(&mut self) {
        self.watch_hit = false;
        self.stop = None;
    }

    /// A stop that has not been told is not wanted any more.
    pub fn drop_stop(&mut self) {
        self.stop = None;
    }

    /// The guest is to stop for `stop`, if not for something before.
    pub fn stop_for(&mut self, stop: DebugStop) {
        self.stop.get_or_insert(stop);
    }

    /// Whether the guest is about to stop.
    pub fn is_stopping(&self) -> bool {
        self.stop.is_some() || self.catches.moved
    }

    /// An instruction is executed carefully, and stopped after if it does what is recorded.
    pub fn is_recording(&self) -> bool {
        self.recording
    }

    pub fn record(&mut self, stop: DebugStop) {
        self.recorded.get_or_insert(stop);
    }

    /// The access of the current instruction did not happen.
    pub fn not_accessed(&mut self) {
        self.recorded = None;
    }

    /// What of a page's permission to read and to write the TLB may hold. Who may write may read and write at once.
    pub fn tlb_may(&self, page: u64) -> (bool, bool) {
        let (mut read, mut write) = (true, true);
        for w in self.watchpoints.iter().filter(|w| w.overlaps(page & !(PAGE - 1), PAGE)) {
            read &= !w.reads();
            write = false;
        }
        (read, write)
    }

    fn hit(&self, va: u64, len: u64, (reads, writes): (bool, bool)) -> Option<DebugStop> {
        let hit = |w: &&Watchpoint| w.overlaps(va, len) && (reads && w.reads() || writes && w.writes());
        let w = self.watchpoints.iter().find(hit)?;
        // The address inside the watchpoint: that is how debuggers find which it was.
        let at = if va.wrapping_sub(w.va) < w.len { va } else { w.va };
        Some(DebugStop::Watch { va: GuestVirt(at), kind: w.kind })
    }
}

impl<F: GuestFrontend> Cpu<F> {
    /// Before an access by the current instruction: true if a watchpoint has the instruction abandoned. `pc` finds
    /// the instruction's address.
    #[inline]
    pub(crate) fn watched(
        &mut self,
        va: u64,
        len: u64,
        (reads, writes): (bool, bool),
        pc: impl FnOnce(&Self) -> u64,
    ) -> bool {
        !self.debug.watchpoints.is_empty() && self.watch_hit(va, len, (reads, writes), pc)
    }

    #[cold]
    fn watch_hit(&mut self, va: u64, len: u64, kinds: (bool, bool), pc: impl FnOnce(&Self) -> u64) -> bool {
        let Some(stop) = self.debug.hit(va, len, kinds) else { return false };
        if self.debug.recording {
            self.debug.recorded.get_or_insert(stop);
            return false;
        }
        let pc = pc(self);
        self.do_carefully(pc);
        true
    }

    /// Abandons the instruction at `pc`, which has changed nothing; it is then executed carefully, and the guest stops
    /// after it if it does what is recorded.
    pub(crate) fn do_carefully(&mut self, pc: u64) {
        self.head.pc = pc;
        self.head.exit_request = 1;
        self.give_back(true);
        self.debug.watch_hit = true;
        self.check_events();
    }

    /// At an access by a helper, which goes on: if it is watched, the guest stops after the instruction.
    #[inline]
    pub(crate) fn note_watched(&mut self, va: u64, len: u64, kinds: (bool, bool)) {
        if !self.debug.watchpoints.is_empty() {
            self.note_hit(va, len, kinds);
        }
    }

    #[cold]
    fn note_hit(&mut self, va: u64, len: u64, kinds: (bool, bool)) {
        let Some(stop) = self.debug.hit(va, len, kinds) else { return };
        if self.debug.recording {
            self.debug.recorded.get_or_insert(stop);
            return;
        }
        self.debug.stop.get_or_insert(stop);
        // The helper leaves its block as if that had changed.
        self.code_changed = true;
        self.check_events();
    }

    /// [`Cpu::note_watched`] for accesses that do not go by the current privilege: (loads, stores).
    pub fn note_access(&mut self, va: u64, len: u64, kinds: (bool, bool)) {
        self.note_watched(va, len, kinds);
    }

    pub(crate) fn watches_no_load_of(&self, va: u64) -> bool {
        self.debug.watchpoints.is_empty() || self.debug.tlb_may(va).0
    }

    /// Before an instruction that the frontend executes by itself: true, and the guest stops, if a breakpoint is
    /// there.
    pub fn stops_at_breakpoint(&mut self) -> bool {
        let pc = self.head.pc;
        let hit = !self.debug.breakpoints.is_empty() && self.debug.breakpoints.contains_key(&pc);
        if hit {
            self.debug.resume_over = Some(pc);
            self.debug.stop = Some(DebugStop::Breakpoint);
            self.check_events();
        }
        hit
    }

    /// True if the instruction that was executed just now was abandoned before an access that is watched.
    pub fn hit_abandoned(&self) -> bool {
        self.debug.watch_hit
    }

    /// Executes the instruction at `head.pc`, reporting what it accesses of what is watched.
    fn step_recording(&mut self) -> Option<DebugStop> {
        self.debug.recording = true;
        self.debug.recorded = None;
        F::step(self);
        self.debug.recording = false;
        self.settle_space();
        // What its exception was caught for is told now too.
        self.debug.recorded.take().or_else(|| self.debug.stop.take())
    }

    /// Before guest code runs, with no kick to serve: does a step if one is to be done. A stop is a reason to leave.
    pub(crate) fn debug_before(&mut self) -> Option<DebugStop> {
        self.settle_space();
        if let Some(stop) = self.debug.stop.take() {
            return Some(stop);
        }
        let over = self.debug.resume_over.take() == Some(self.head.pc);
        if std::mem::take(&mut self.debug.watch_hit) {
            let stop = self.step_recording();
            return stop.or(self.debug.stepping.then_some(DebugStop::Step));
        }
        if self.debug.stepping {
            if !self.debug.mask_interrupts && F::accept_interrupt(self) {
                self.settle_space();
                return self.debug.stop.take().or_else(|| self.stepped());
            }
            return self.step_recording().or_else(|| self.stepped());
        }
        if over {
            return self.step_recording();
        }
        None
    }

    /// A step is done: the stop, if it was the last of several.
    fn stepped(&mut self) -> Option<DebugStop> {
        if self.debug.more_steps == 0 || self.halted {
            return Some(DebugStop::Step);
        }
        if self.stops_at_breakpoint() {
            return self.debug.stop.take();
        }
        self.debug.more_steps -= 1;
        None
    }

    /// Whether [`Cpu::debug_before`] has anything to do.
    #[inline]
    pub(crate) fn debug_due(&self) -> bool {
        let d = &self.debug;
        d.stepping || d.watch_hit || d.stop.is_some() || d.resume_over.is_some() || d.catches.moved
    }

    /// Instead of [`Cpu::step_careful`] where a breakpoint may be meant.
    pub(crate) fn careful_or_break(&mut self) {
        if self.stops_at_breakpoint() {
            return;
        }
        let pc = self.head.pc;
        self.forget_cut(pc);
        self.step_careful();
    }

    fn forget_cut(&mut self, pc: u64) {
        let Some(table) = self.mmu.context().code_table(pc) else { return };
        let Some(key) = self.machine.store.page_of(table) else { return };
        if self.machine.cuts.forget(key, (pc & (PAGE - 1)) as u16) {
            self.machine.store.withdraw_page(key);
        }
    }

    /// A page of code is about to be entered at `va`: it gets the cuts that this vCPU wants there.
    pub(crate) fn cut_page(&mut self, va: u64, key: PageKey) {
        if self.debug.breakpoints.is_empty() {
            return;
        }
        let page = va & !(PAGE - 1);
        let here = self.debug.breakpoints.range(page..=page | (PAGE - 1)).map(|b| *b.0);
        if self.machine.cuts.add(key, here) {
            self.machine.store.withdraw_page(key);
        }
    }
}

impl<F: GuestFrontend> Cpu<F> {
    /// Translates the block at `start` of page `key`, up to the next cut.
    pub(crate) fn translate_uncut(&self, window: CodeWindow<'_>, key: PageKey, start: u16, block: &mut Block) {
        let mut end = self.machine.cuts.first_from(key, start + 1);
        if end.is_some_and(|cut| cut - start < LONGEST_INSN) {
            // A cut inside the first instruction is no place to end.
            F::translate(&self.guest, window, start, TranslateMode::Careful, block);
            end = self.machine.cuts.first_from(key, start.saturating_add(block.len));
        }
        let cut = self.machine.cuts.first_from(key, 0).is_some();
        let window = window.until(end).and_elsewhere(!cut && !self.machine.is_instrumented());
        F::translate(&self.guest, window, start, TranslateMode::Block, block);
        if cut {
            // Somebody will look.
            block.keep_all_flags();
        }
    }
}

/// The block at a cut, of which only the entry guard [`NEVER`] is ever executed.
pub(crate) fn cut_block(block: &mut Block, start: u16) {
    block.clear(start);
    let at = PagePc(i32::from(start));
    block.ops.push(Op::Insn { pc: at, len: 1 });
    block.ops.push(Op::Jump { to: at });
    (block.len, block.insns) = (1, 1);
}

impl<F: GuestFrontend> VcpuDebug for Cpu<F> {
    fn capabilities(&self) -> DebugCaps {
        DebugCaps { breakpoints: None, watchpoints: None }
    }

    fn set_single_step(&mut self, on: bool) {
        self.debug.stepping = on;
    }

    fn set_step_interrupts(&mut self, on: bool) {
        self.debug.mask_interrupts = !on;
    }

    fn set_more_steps(&mut self, steps: u64) {
        self.debug.more_steps = steps;
    }

    fn more_steps(&self) -> Option<u64> {
        Some(self.debug.more_steps)
    }

    fn insert_catch(&mut self, catch: Catch) -> Result<(), AccelError> {
        self.add_catch(catch)
    }

    fn remove_catch(&mut self, catch: Catch) -> Result<(), AccelError> {
        self.drop_catch(catch)
    }

    fn insert_breakpoint(&mut self, va: GuestVirt) -> Result<(), AccelError> {
        let times = self.debug.breakpoints.entry(va.0).or_default();
        *times += 1;
        if *times == 1 {
            self.machine.cuts.want(va.0);
            self.mmu.drop_exactly(va.0);
        }
        Ok(())
    }

    fn remove_breakpoint(&mut self, va: GuestVirt) -> Result<(), AccelError> {
        let Entry::Occupied(mut times) = self.debug.breakpoints.entry(va.0) else {
            return Err(AccelError::Other(format!("there is no breakpoint at {va}")));
        };
        *times.get_mut() -= 1;
        if *times.get() > 0 {
            return Ok(());
        }
        times.remove();
        self.machine.cuts.unwant(va.0);
        // It may have been hit, and another reason to leave have come first.
        self.debug.stop = None;
        Ok(())
    }

    fn insert_watchpoint(&mut self, va: GuestVirt, len: u64, kind: WatchKind) -> Result<(), AccelError> {
        if len == 0 || va.0.checked_add(len - 1).is_none() {
            return Err(AccelError::Other(format!("{len} bytes at {va} cannot be watched")));
        }
        self.debug.watchpoints.push(Watchpoint { va: va.0, len, kind });
        let (first, last) = (va.0 / PAGE, (va.0 + (len - 1)) / PAGE);
        if last - first > MAX_DROPS {
            self.mmu.flush_all();
        } else {
            (first..=last).for_each(|page| self.mmu.drop_exactly(page * PAGE));
        }
        Ok(())
    }

    fn remove_watchpoint(&mut self, va: GuestVirt, len: u64, kind: WatchKind) -> Result<(), AccelError> {
        let wanted = Watchpoint { va: va.0, len, kind };
        let Some(at) = self.debug.watchpoints.iter().position(|w| *w == wanted) else {
            return Err(AccelError::Other(format!("there is no such watchpoint at {va}")));
        };
        self.debug.watchpoints.swap_remove(at);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cuts_go_when_unwanted_and_run_into() {
        let (cuts, page) = (Cuts::default(), PageKey::new(0x7000, 0));
        cuts.want(0x1010);
        assert!(cuts.add(page, [0x1010, 0x1020].into_iter()));
        assert!(!cuts.add(page, [0x1010].into_iter()), "it is cut there already");
        assert!(cuts.at(page, 0x10) && !cuts.at(page, 0x11));
        assert_eq!(cuts.first_from(page, 0x10), Some(0x10));
        assert_eq!(cuts.first_from(page, 0x11), Some(0x20));
        assert_eq!(cuts.first_from(page, 0x21), None);
        assert!(!cuts.forget(page, 0x10), "it is wanted");
        assert!(cuts.forget(page, 0x20));
        cuts.unwant(0x1010);
        assert!(cuts.forget(page, 0x10));
        assert_eq!(cuts.first_from(page, 0), None);
    }

    #[test]
    fn watchpoints_take_the_permission_they_need() {
        let mut d = DebugState::default();
        d.watchpoints.push(Watchpoint { va: 0x1ffc, len: 8, kind: WatchKind::Write });
        d.watchpoints.push(Watchpoint { va: 0x5000, len: 1, kind: WatchKind::Read });
        assert_eq!(d.tlb_may(0x1000), (true, false));
        assert_eq!(d.tlb_may(0x2000), (true, false));
        assert_eq!(d.tlb_may(0x3000), (true, true));
        assert_eq!(d.tlb_may(0x5000), (false, false));
    }
}
