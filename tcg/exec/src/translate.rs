//! From a guest address to code that runs: the context's code map, the store, and translation on a miss.

use std::rc::Rc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use mimus_tcg_ir::Block;
use mimus_tcg_ir::backend::{Emitted, Optimise};
use mimus_tcg_ir::verify::MAX_INSN_LEN;

use crate::access::{copy_code, copy_page};
use crate::code::{PageKey, Published};
use crate::debug::{NEVER, cut_block};
use crate::env::{Cpu, KICK_FULL, KICK_SELF};
use crate::frontend::{Access, CodePage, CodeWindow, GuestFrontend, Leaf, MemFault, Starts, TranslateMode};
use crate::trace;

const PAGE_MASK: u64 = 4095;
/// Bytes of guest code from its start on that a translation may look at.
const MOST_CODE: usize = 1536;
/// Bytes before a block that its translation may look at: the heads of loops that it is the end of.
const LOOK_BACK: usize = 512;
/// The same for compact code, which is made quickly and not for long. (Both are multiples of what the host copies at once.)
const COMPACT_CODE: usize = 320;
const COMPACT_BACK: usize = 64;
/// Bytes of the next page that a block may run on for, and where one begins that does.
const RUN_ON: usize = 512;
const RUN_FROM: usize = 4096 - (MOST_CODE - RUN_ON);
/// Longer than any block takes.
const MAX_TRANSLATION: Duration = Duration::from_millis(1);
/// Bytes that an instruction may have.
const LONGEST: usize = MAX_INSN_LEN as usize + 1;

/// Buffers for translation, kept from block to block.
pub(crate) struct Scratch {
    pub block: Block,
    page: Box<CodePage>,
    /// The bytes of `page` that are of this translation.
    copied: (usize, usize),
    next: Box<CodePage>,
    /// Where blocks begin in the page, if compact code is to end there.
    starts: Box<Starts>,
    compact: bool,
    buffers: (Vec<u8>, Emitted),
}

impl Default for Scratch {
    fn default() -> Scratch {
        Scratch {
            block: Block::default(),
            page: Box::new([0; 4096]),
            copied: (0, 0),
            next: Box::new([0; 4096]),
            starts: Box::new([0; 64]),
            compact: false,
            buffers: Default::default(),
        }
    }
}

impl Scratch {
    /// Takes what is `from..end` of the page at `host`.
    fn copy(&mut self, host: *const u8, (from, end): (usize, usize)) {
        copy_code(host, from, &mut self.page[from..end]);
        self.copied = (from, end);
    }
}

/// What is to be there of a page for a block.
fn around(start: u16, compact: bool) -> (usize, usize) {
    let first = usize::from(start);
    let (before, behind) = if compact { (COMPACT_BACK, COMPACT_CODE) } else { (LOOK_BACK, MOST_CODE) };
    (first.saturating_sub(before), (first + behind).min(4096))
}

/// Code to go on in.
#[derive(Clone, Copy)]
pub(crate) struct Code {
    pub host: usize,
    pub page: PageKey,
}

/// Why there is no code at an address.
pub(crate) enum NoCode {
    /// Fetching it trapped; `head.pc` is the handler's.
    Trapped,
    /// To be settled outside guest code, by the run loop; it has been asked to look.
    Later,
    /// The page cannot be remembered: execute instruction by instruction.
    Careful,
}

/// A page of code found by a walk.
#[derive(Clone, Copy)]
struct Fetched {
    key: PageKey,
    table: u32,
    leaf: Leaf,
}

impl<F: GuestFrontend> Cpu<F> {
    /// The code at `va`. `in_guest`: called by generated code, so nothing may wait for other vCPUs.
    pub(crate) fn code_for(&mut self, va: u64, in_guest: bool) -> Result<Code, NoCode> {
        let offset = (va & PAGE_MASK) as u32;
        let (table, key) = match self.mmu.context().code_table(va) {
            Some(table) => {
                if let Some(host) = self.machine.store.find(table, offset) {
                    let page = self.machine.store.page_of(table).unwrap_or(PageKey::new(0, 0));
                    return Ok(Code { host, page });
                }
                match self.machine.store.page_of(table) {
                    Some(key) => (table, key),
                    // The code cache has been emptied since.
                    None => self.fetch_page(va, va).map(|page| (page.table, page.key))?,
                }
            }
            None => {
                let page = self.fetch_page(va, va)?;
                (page.table, page.key)
            }
        };
        if let Some(host) = self.machine.store.find(table, offset) {
            return Ok(Code { host, page: key });
        }
        self.translate_timed(va, key, in_guest)
    }

    /// The block at `va`, whose page in the current context is `key`, as code made for running often. It replaces the one
    /// that is there.
    pub(crate) fn make_anew(&mut self, va: u64, key: PageKey) -> Result<Code, NoCode> {
        self.translate_timed(va, key, true)
    }

    fn translate_timed(&mut self, va: u64, key: PageKey, in_guest: bool) -> Result<Code, NoCode> {
        let Some(from) = self.machine.translation_time.is_some().then(Instant::now) else {
            return self.translate_at(va, key, in_guest);
        };
        let code = self.translate_at(va, key, in_guest);
        let took = from.elapsed();
        // What takes longer was waiting for a processor.
        if let (Some(all), true) = (&self.machine.translation_time, took < MAX_TRANSLATION) {
            all.fetch_add(took.as_nanos() as u64, Ordering::Relaxed);
        }
        code
    }

    /// Walks for the page of code at `va` and enters it into the current context. A fault is the fault of
    /// the instruction at `pc`.
    fn fetch_page(&mut self, pc: u64, va: u64) -> Result<Fetched, NoCode> {
        let leaf = match F::walk(self, va, Access::Fetch) {
            Ok(leaf) => leaf,
            Err(fault) => return Err(self.fetch_fault(pc, va, fault)),
        };
        let Some((host, _)) = self.code_page(leaf.pa) else {
            return Err(self.fetch_fault(pc, va, MemFault::Access));
        };
        if !leaf.cacheable {
            return Err(NoCode::Careful);
        }
        let key = PageKey::new(host as u64, F::code_mode(self));
        let place = (key.host() >> 12) as usize % self.code_places.len();
        self.code_places[place] = (key.host(), leaf.pa);
        let Some(table) = self.table_of(key) else { return Err(self.later(KICK_FULL)) };
        self.cut_page(va, key);
        self.mmu.fill_code(va & !PAGE_MASK, table, leaf.local, leaf.mapping_size);
        Ok(Fetched { key, table, leaf })
    }

    /// The entry table of a page of code. Each new process enters some hundred pages that others have had, too.
    fn table_of(&mut self, key: PageKey) -> Option<u32> {
        let place = (key.host() >> 12) as usize % self.code_tables.len();
        let (known, table) = self.code_tables[place];
        if known == key {
            return Some(table);
        }
        let table = self.machine.store.table(key)?;
        self.code_tables[place] = (key, table);
        Some(table)
    }

    fn fetch_fault(&mut self, pc: u64, va: u64, fault: MemFault) -> NoCode {
        self.head.pc = pc;
        self.trap(va, Access::Fetch, fault);
        NoCode::Trapped
    }

    fn later(&mut self, why: u32) -> NoCode {
        self.head.ask(why);
        NoCode::Later
    }

    /// A physical address of the page that the context has at `va`, for what is known of pages by it.
    fn physical(&mut self, va: u64, key: PageKey) -> Result<u64, NoCode> {
        let place = (key.host() >> 12) as usize % self.code_places.len();
        let (host, pa) = self.code_places[place];
        let is_there = |pa| self.code_page(pa).is_some_and(|(host, _)| host as u64 == key.host());
        if host == key.host() && is_there(pa) {
            return Ok(pa);
        }
        let pa = match F::walk(self, va, Access::Fetch) {
            Ok(leaf) => leaf.pa,
            Err(fault) => return Err(self.fetch_fault(va, va, fault)),
        };
        if self.code_page(pa).is_none_or(|(host, _)| host as u64 != key.host()) {
            // The tables changed under an entry that has not been flushed: both answers are allowed; take the new one.
            return self.fetch_page(va, va).and_then(|_| Err(self.later(KICK_SELF)));
        }
        self.code_places[place] = (key.host(), pa);
        Ok(pa)
    }

    fn translate_at(&mut self, va: u64, key: PageKey, in_guest: bool) -> Result<Code, NoCode> {
        let start = (va & PAGE_MASK) as u16;
        let pa = self.physical(va, key)?;
        let Some(stamp) = self.claim(key, pa, in_guest) else { return Err(self.later(KICK_SELF)) };
        let Some((host, _)) = self.code_page(pa) else { return Err(self.later(KICK_SELF)) };
        let mut scratch = self.scratch.take().unwrap_or_default();
        let optimise = self.machine.optimise;
        let compact = matches!(optimise, Optimise::Tiered | Optimise::Compact)
            && self.machine.store.is_made_compact(key, start, &mut scratch.starts);
        scratch.compact = compact;
        if optimise == Optimise::Forced {
            // Blocks made ahead may begin anywhere.
            scratch.copy(host, (0, 4096));
        } else {
            scratch.copy(host, around(start, compact));
        }
        let result = self.translate_page(va, start, (key, stamp), in_guest, &mut scratch);
        if let (Ok(code), Optimise::Forced) = (&result, optimise) {
            self.link_ahead(va & !PAGE_MASK, (key, stamp), code.host, &mut scratch);
        }
        self.scratch = Some(scratch);
        result
    }

    /// When optimisations are forced: the jumps within the page of the block at `host` that has just been made, and of those
    /// they lead to, are linked before they are executed. `scratch` has the page.
    fn link_ahead(&mut self, page_base: u64, page: (PageKey, u32), host: usize, scratch: &mut Scratch) {
        /// Blocks to make for one that was asked for.
        const MOST: usize = 8;
        let machine = self.machine.clone();
        let mut todo: Vec<usize> = scratch.buffers.1.sites.iter().map(|s| host + s.return_offset as usize).collect();
        let mut made = 0;
        while let Some(ret) = todo.pop() {
            let Some(site) = machine.store.resolve_site(ret) else { continue };
            let to = site.to();
            if !to.same_page() {
                continue;
            }
            let offset = to.0 as u16;
            let Some(table) = self.mmu.context().code_table(page_base) else { return };
            let there = machine.store.find(table, offset.into()).or_else(|| {
                let window = CodeWindow::new(&scratch.page, None).with_mode(page.0.mode());
                if made == MOST || F::crosses_page(window, offset) {
                    return None;
                }
                made += 1;
                let code = self.translate_page(page_base + u64::from(offset), offset, page, true, scratch).ok()?;
                todo.extend(scratch.buffers.1.sites.iter().map(|s| code.host + s.return_offset as usize));
                Some(code.host)
            });
            if let Some(there) = there {
                machine.store.link(&site, there, page.0, |field, to| machine.emitter.link_word(field, to));
            }
        }
    }

    fn translate_page(
        &mut self,
        va: u64,
        start: u16,
        page: (PageKey, u32),
        in_guest: bool,
        scratch: &mut Scratch,
    ) -> Result<Code, NoCode> {
        let cut_here = self.machine.cuts.at(page.0, start);
        let mut next = None;
        let mode = page.0.mode();
        if !cut_here && F::crosses_page(CodeWindow::new(&scratch.page, None).with_mode(mode), start) {
            let next_va = (va | PAGE_MASK).wrapping_add(1);
            let fetched = self.fetch_page(va, next_va)?;
            let Some(stamp) = self.claim(fetched.key, fetched.leaf.pa, in_guest) else {
                return Err(self.later(KICK_SELF));
            };
            if let Some((host, _)) = self.code_page(fetched.leaf.pa) {
                copy_page(host, &mut scratch.next);
            }
            next = Some((fetched, stamp));
            let key = page.0;
            let before = self.machine.store.next_table(key);
            if before != 0 && before != fetched.table && self.machine.store.has_run_on(key) {
                self.machine.store.stay(key);
            }
        }
        let mut runs_on = 0;
        if !cut_here && next.is_none() && !scratch.compact && usize::from(start) >= RUN_FROM && F::runs_on(mode) {
            next = self.next_to_run_on(va, page.0, in_guest);
            if let Some((host, _)) = next.and_then(|(fetched, _)| self.code_page(fetched.leaf.pa)) {
                // An instruction's length, or two of them, is looked at behind the end.
                copy_code(host, 0, &mut scratch.next[..RUN_ON + 2 * LONGEST]);
                runs_on = RUN_ON as u16;
            }
        }
        let (from, end) = scratch.copied;
        let window = CodeWindow::new(&scratch.page, next.map(|_| &*scratch.next)).copied(from, end).with_mode(mode);
        let window = window.running_on(runs_on);
        let window = window.up_to_blocks(scratch.compact.then_some(&*scratch.starts));
        if cut_here {
            cut_block(&mut scratch.block, start);
        } else {
            self.translate_uncut(window, page.0, start, &mut scratch.block);
            if self.machine.is_instrumented() && !self.machine.interpret {
                let more = self.machine.instrumentation();
                more.apply(&mut scratch.block, window, F::code_bits(mode));
            }
        }
        // With everything forced the whole page is there, and a block that follows a jump may span more than MOST_CODE.
        debug_assert!(next.is_some() || usize::from(scratch.block.start) + usize::from(scratch.block.len) <= end);
        trace::block::<F>(va, window, &scratch.block);
        let machine = self.machine.clone();
        let block = &scratch.block;
        // A block that might have run on and does not is none of the page behind's affair.
        let behind = next.filter(|_| block.crosses_page()).map(|(fetched, _)| fetched.table);
        let guard = if cut_here { Some(NEVER) } else { behind };
        let emit = |at: usize, code: &mut Vec<u8>, info: &mut Emitted| {
            machine.emitter.emit(block, at, guard, code, info);
        };
        let next_page = next.map(|(fetched, stamp)| (fetched.key, stamp));
        match machine.store.publish(page, next_page, block, emit, &mut scratch.buffers) {
            Published::There(host) => {
                self.keep_interpreted(host, cut_here, scratch);
                Ok(Code { host, page: page.0 })
            }
            Published::At(host) => {
                trace::code(va, &scratch.buffers.0, host, &*machine.emitter);
                if let Some(map) = &machine.perf_map {
                    map.block(va, host, scratch.buffers.0.len(), &scratch.buffers.1.hints);
                }
                self.keep_interpreted(host, cut_here, scratch);
                Ok(Code { host, page: page.0 })
            }
            Published::Full => Err(self.later(KICK_FULL)),
            Published::Stale => Err(self.later(KICK_SELF)),
        }
    }

    /// The page behind that of `va`, with its stamp, if the current context has it and a block may run on into it.
    fn next_to_run_on(&mut self, va: u64, key: PageKey, in_guest: bool) -> Option<(Fetched, u32)> {
        let machine = self.machine.clone();
        if machine.interpret || machine.optimise == Optimise::Off || machine.is_instrumented() {
            return None;
        }
        let next_va = (va | PAGE_MASK).wrapping_add(1);
        let table = self.mmu.context().code_table(next_va)?;
        let next = machine.store.page_of(table)?;
        let cut = [key, next].iter().any(|key| machine.cuts.first_from(*key, 0).is_some());
        if cut || next.mode() != key.mode() || next.host() == key.host() || !machine.store.runs_on(key, table) {
            return None;
        }
        // It has been walked to before, so this finds the same, or that it is gone.
        let leaf = F::walk(self, next_va, Access::Fetch).ok().filter(|leaf| leaf.cacheable)?;
        let (host, _) = self.code_page(leaf.pa)?;
        if host as u64 != next.host() {
            return None;
        }
        let stamp = self.claim(next, leaf.pa, in_guest)?;
        Some((Fetched { key: next, table, leaf }, stamp))
    }

    /// Where the interpreter runs everything: what it is to do for the code at `host`.
    fn keep_interpreted(&mut self, host: usize, cut_here: bool, scratch: &Scratch) {
        if self.machine.interpret && !cut_here {
            self.interp_blocks.insert(host, Rc::new(scratch.block.clone()));
        }
    }

    /// Translates the one instruction at `va` for careful execution, into `scratch.block`.
    pub(crate) fn translate_careful(&mut self, va: u64) -> Result<(), NoCode> {
        let start = (va & PAGE_MASK) as u16;
        let leaf = F::walk(self, va, Access::Fetch).map_err(|f| self.fetch_fault(va, va, f))?;
        let Some((host, _)) = self.code_page(leaf.pa) else {
            return Err(self.fetch_fault(va, va, MemFault::Access));
        };
        let mut scratch = self.scratch.take().unwrap_or_default();
        let end = (usize::from(start) + LONGEST).min(scratch.page.len());
        copy_code(host, start.into(), &mut scratch.page[start.into()..end]);
        let mode = F::code_mode(self);
        let mut result = Ok(());
        let mut has_next = false;
        if F::crosses_page(CodeWindow::new(&scratch.page, None).with_mode(mode), start) {
            let next_va = (va | PAGE_MASK).wrapping_add(1);
            match F::walk(self, next_va, Access::Fetch) {
                Ok(leaf) => match self.code_page(leaf.pa) {
                    Some((host, _)) => {
                        copy_code(host, 0, &mut scratch.next[..LONGEST]);
                        has_next = true;
                    }
                    None => result = Err(self.fetch_fault(va, next_va, MemFault::Access)),
                },
                Err(fault) => result = Err(self.fetch_fault(va, next_va, fault)),
            }
        }
        if result.is_ok() {
            let next = has_next.then_some(&*scratch.next);
            let window = CodeWindow::new(&scratch.page, next).copied(start.into(), end).with_mode(mode);
            F::translate(&self.guest, window, start, TranslateMode::Careful, &mut scratch.block);
        }
        self.scratch = Some(scratch);
        result
    }

    /// After a block refused to run, perhaps one that reaches into the next page: makes it run next time.
    pub(crate) fn refresh_crossing(&mut self, va: u64) {
        let offset = (va & PAGE_MASK) as usize;
        let last = 4096 - usize::from(MAX_INSN_LEN) < offset;
        if offset < RUN_FROM {
            return;
        }
        let Some(table) = self.mmu.context().code_table(va) else { return };
        let Some(key) = self.machine.store.page_of(table) else { return };
        let runs_on = self.machine.store.has_run_on(key);
        if !last && !runs_on {
            return;
        }
        let made_for = self.machine.store.next_table(key);
        let next_va = (va | PAGE_MASK).wrapping_add(1);
        if made_for == 0 || self.mmu.context().code_table(next_va) == Some(made_for) {
            return;
        }
        let there = self.enter_next(next_va, key);
        if there == Some(made_for) {
            return;
        }
        // An instruction that reaches over the end is made again for the page that is there; where there is none, it faults.
        if runs_on {
            // Blocks that end at the page's end do not mind.
            self.machine.store.stay(key);
        } else if there.is_some() {
            self.machine.store.withdraw_page(key);
        }
    }

    /// Enters the page at `va`, behind page `key`, into the context's code map; its entry table.
    fn enter_next(&mut self, va: u64, key: PageKey) -> Option<u32> {
        let leaf = F::walk(self, va, Access::Fetch).ok().filter(|leaf| leaf.cacheable)?;
        let (host, _) = self.code_page(leaf.pa)?;
        let next = PageKey::new(host as u64, key.mode());
        let table = self.machine.store.table(next)?;
        self.cut_page(va, next);
        self.mmu.fill_code(va, table, leaf.local, leaf.mapping_size);
        Some(table)
    }
}
