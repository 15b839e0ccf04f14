// UNSAFE: maps parts of guest RAM anew, with their contents kept.
//! Pages of a RAM block that are far from one another, gathered: they get a second host address each, one behind the other.
//!
//! Guests' programs have memory that is contiguous to them and scattered in the guest's RAM. Where an accelerator wants to
//! reach it by one sum, it has pages *gathered*: their contents move to an arena of shared memory that is mapped as a whole, and the
//! place that each has in the block is mapped to the same memory. The address in the block is valid all the time; the
//! second is until the page is given another, or the arena's oldest run of pages makes room.
//!
//! Only plain anonymous memory is gathered: shared memory as a whole would mostly have no transparent huge pages (hosts keep
//! `shmem_enabled` at `never`), which costs every guest more than gathering saves.
//!
//! A page that the host refuses to map anew stays where it is, with its contents: limits are tested before an old mapping goes.
#![allow(unsafe_code)]

use super::guest_ram::{PAGE_SIZE, RamBlock};
use memmap2::{MmapOptions, MmapRaw};
use rustix::fs::MemfdFlags;
use std::collections::VecDeque;
use std::fs::File;
use std::io;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

/// Pages that an arena has room for. Each is up to two mappings of the host's more.
pub const GATHERED_PAGES: usize = 8192;
/// So many mappings a process must be allowed to have: others need some, too. Hosts allow 65530 unless told otherwise.
const FEWEST_MAPPINGS: usize = 4 * GATHERED_PAGES;

const PAGE: usize = PAGE_SIZE as usize;

/// Where a block's gathered pages are.
pub(super) struct Arena {
    map: MmapRaw,
    file: File,
    /// By page of the block: its place in the arena counted from 1, or 0. As a mapping, of which only what is used is there.
    places: MmapRaw,
    runs: Mutex<Runs>,
}

#[derive(Default)]
struct Runs {
    /// Where the next begins, if there is room.
    next: usize,
    /// First place and length, the oldest first.
    list: VecDeque<(usize, usize)>,
    /// By place: the block's page there counted from 1, or 0.
    owners: Vec<u32>,
}

/// Pages that have been gathered.
#[derive(Clone, Debug)]
pub struct Gathered {
    /// Place of the first in the arena.
    pub place: u32,
    /// How many: fewer than were asked for if the host gave no more, perhaps none.
    pub pages: usize,
    /// Places whose second addresses were other pages', or none are any more.
    pub left: Vec<u32>,
}

impl Arena {
    fn new(block: &RamBlock) -> io::Result<Arena> {
        let size = GATHERED_PAGES * PAGE;
        let file = File::from(rustix::fs::memfd_create("gathered", MemfdFlags::CLOEXEC)?);
        file.set_len(size as u64)?;
        let map = MmapOptions::new().len(size).no_reserve_swap().map_raw(&file)?;
        let bytes = block.page_count() as usize * size_of::<u32>();
        let places = MmapOptions::new().len(bytes).no_reserve_swap().map_anon()?.into();
        let runs = Mutex::new(Runs { owners: vec![0; GATHERED_PAGES], ..Runs::default() });
        Ok(Arena { map, file, places, runs })
    }

    fn lock(&self) -> MutexGuard<'_, Runs> {
        self.runs.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The cell of `places` of a page that the block has.
    fn cell(&self, page: u64) -> &AtomicU32 {
        // SAFETY: the mapping has a word for each page of the block, lives as long as self, and is only accessed so.
        unsafe { AtomicU32::from_ptr(self.places.as_mut_ptr().cast::<u32>().add(page as usize)) }
    }

    fn place_of(&self, page: u64) -> Option<u32> {
        self.cell(page).load(Ordering::Acquire).checked_sub(1)
    }

    fn address(&self, place: usize) -> *mut u8 {
        assert!(place < GATHERED_PAGES, "place {place} outside the arena");
        self.map.as_mut_ptr().wrapping_add(place * PAGE)
    }

    /// Gives the memory of a place back.
    fn vacate(&self, place: usize) {
        // SAFETY: a page of the arena, which no page of the block is mapped to any more.
        let _wish = unsafe { libc::madvise(self.address(place).cast(), PAGE, libc::MADV_REMOVE) };
    }

    /// Makes the runs that have places from `at` on make room. `left`: gets the places that pages have left.
    fn make_room(
        &self,
        block: &RamBlock,
        runs: &mut Runs,
        (at, len): (usize, usize),
        left: &mut Vec<u32>,
    ) -> io::Result<()> {
        let overlaps = |run: &(usize, usize)| run.0 < at + len && at < run.0 + run.1;
        while let Some(i) = runs.list.iter().position(overlaps) {
            let (first, pages) = runs.list[i];
            for place in first..first + pages {
                if let Some(page) = runs.owners[place].checked_sub(1) {
                    self.put_back(block, page.into(), place)?;
                    left.push(place as u32);
                    runs.owners[place] = 0;
                    self.vacate(place);
                }
            }
            runs.list.remove(i);
        }
        Ok(())
    }

    /// Makes a gathered page of the block one of anonymous memory again.
    ///
    /// It is mapped in place, so that it becomes one mapping with what is around it: one that was filled elsewhere and moved
    /// there would stay one of its own, and the host's limit would be reached by and by.
    fn put_back(&self, block: &RamBlock, page: u64, place: usize) -> io::Result<()> {
        assert!(page < block.page_count(), "page {page} outside the block");
        let at = block.host_ptr(page * PAGE_SIZE);
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED | libc::MAP_NORESERVE;
        let _readers_look_again = block.unsettle();
        // SAFETY: one page of the block's own mapping, which nobody writes meanwhile (`gather`'s callers and the lock it holds
        // see to it) and whoever reads it reads again. Its contents are those of its place in the arena.
        unsafe {
            if libc::mmap(at.cast(), PAGE, protection, flags, -1, 0) == libc::MAP_FAILED {
                return Err(io::Error::last_os_error());
            }
            // As the memory around it, and before it is touched: only then they become one.
            let _wish = libc::madvise(at.cast(), PAGE, libc::MADV_HUGEPAGE);
            std::ptr::copy_nonoverlapping(self.address(place).cast_const(), at, PAGE);
        }
        self.cell(page).store(0, Ordering::Release);
        Ok(())
    }

    /// Maps consecutive pages of the block, whose contents are at places from `place` on, there.
    fn map_pages(&self, block: &RamBlock, page: u64, pages: usize, place: usize) -> io::Result<()> {
        use std::os::fd::AsRawFd;
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        let flags = libc::MAP_SHARED | libc::MAP_FIXED | libc::MAP_NORESERVE;
        let (at, offset) = (block.host_ptr(page * PAGE_SIZE), (place * PAGE) as libc::off_t);
        assert!(block.contains(page * PAGE_SIZE, (pages * PAGE) as u64) && place + pages <= GATHERED_PAGES);
        // SAFETY: inside the block's own mapping, whose pages become others with the same contents.
        let done = unsafe { libc::mmap(at.cast(), pages * PAGE, protection, flags, self.file.as_raw_fd(), offset) };
        if done == libc::MAP_FAILED { Err(io::Error::last_os_error()) } else { Ok(()) }
    }

    /// Copies pages to places from `at` on, and maps them there. How many it were. `left`: gets the places that they had before.
    fn take(&self, block: &RamBlock, pages: &[u32], at: usize, runs: &mut Runs, left: &mut Vec<u32>) -> usize {
        // SAFETY: a range of the arena that nothing is mapped to but the arena itself.
        let there =
            unsafe { libc::madvise(self.address(at).cast(), pages.len() * PAGE, libc::MADV_POPULATE_WRITE) } == 0;
        // A host without memory would end the process when it is touched.
        if !there {
            return 0;
        }
        let mut done = 0;
        for part in pages.chunk_by(|a, b| a + 1 == *b) {
            for (i, page) in part.iter().enumerate() {
                let from = block.host_ptr(u64::from(*page) * PAGE_SIZE).cast_const();
                // SAFETY: a page of the block, which nobody writes meanwhile, to one of the arena.
                unsafe { std::ptr::copy_nonoverlapping(from, self.address(at + done + i), PAGE) };
            }
            if self.map_pages(block, part[0].into(), part.len(), at + done).is_err() {
                break;
            }
            for page in part {
                let before = self.cell((*page).into()).swap((at + done + 1) as u32, Ordering::AcqRel) as usize;
                if let Some(before) = before.checked_sub(1) {
                    left.push(before as u32);
                    runs.owners[before] = 0;
                    self.vacate(before);
                }
                runs.owners[at + done] = page + 1;
                done += 1;
            }
        }
        done
    }

    /// Empties gathered pages among these: what `MADV_DONTNEED` does to the others.
    pub(super) fn discard(&self, pages: std::ops::Range<u64>) {
        for place in pages.filter_map(|page| self.place_of(page)) {
            let at = self.address(place as usize);
            // SAFETY: a page of the arena; it and the block's page read as zeros then, which is what the caller asks for.
            unsafe {
                if libc::madvise(at.cast(), PAGE, libc::MADV_REMOVE) != 0 {
                    at.write_bytes(0, PAGE);
                }
            }
        }
    }
}

impl RamBlock {
    /// Gives pages, all different, second addresses one behind the other. `None`: not now, or not of this block.
    ///
    /// No vCPU may store to the block meanwhile, nor use a second address that it has from before, which may be another
    /// page's afterwards (see [`Gathered::left`]).
    pub fn gather(&self, pages: &[u32]) -> Option<Gathered> {
        let known = pages.iter().all(|&page| u64::from(page) < self.page_count());
        if !self.can_be_gathered() || !known || pages.is_empty() || pages.len() > GATHERED_PAGES {
            return None;
        }
        // Devices may be writing: then another time.
        let _nobody_writes = self.moving.try_write().ok()?;
        if self.arena.get().is_none() {
            if !self.is_first_to_gather() || host_mappings().is_none_or(|most| most < FEWEST_MAPPINGS) {
                return None;
            }
            let _another_was_first = self.arena.set(Arena::new(self).ok()?);
        }
        let arena = self.arena.get()?;
        let mut runs = arena.lock();
        let at = if runs.next + pages.len() > GATHERED_PAGES { 0 } else { runs.next };
        let mut left = Vec::new();
        let mut done = 0;
        if arena.make_room(self, &mut runs, (at, pages.len()), &mut left).is_ok() {
            done = arena.take(self, pages, at, &mut runs, &mut left);
        }
        if done != 0 {
            runs.list.push_back((at, done));
            runs.next = at + done;
        }
        Some(Gathered { place: at as u32, pages: done, left })
    }

    /// Whether pages can be gathered: nobody expects them in memory of a certain kind.
    pub fn can_be_gathered(&self) -> bool {
        self.plain
    }

    /// A page's place in the arena, if it is gathered.
    pub fn place_of(&self, page: u64) -> Option<u32> {
        self.arena.get()?.place_of(page)
    }

    /// Host address of a place in the arena: a second address of the page that is there.
    ///
    /// # Panics
    /// If there is no such place.
    pub fn second_address(&self, place: u32) -> Option<*mut u8> {
        Some(self.arena.get()?.address(place as usize))
    }

    /// The address in the block of a byte that has `host` as a second address.
    pub fn offset_of_second(&self, host: u64) -> Option<u64> {
        let arena = self.arena.get()?;
        let at = host.wrapping_sub(arena.map.as_ptr() as u64) as usize;
        if at >= GATHERED_PAGES * PAGE {
            return None;
        }
        let page = arena.lock().owners[at / PAGE].checked_sub(1)?;
        Some(u64::from(page) * PAGE_SIZE + (at % PAGE) as u64)
    }
}

/// Mappings that the host lets a process have.
fn host_mappings() -> Option<usize> {
    std::fs::read_to_string("/proc/sys/vm/max_map_count").ok()?.trim().parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::{GuestRam, RamBacking};
    use std::sync::Arc;

    const PAGES: u64 = 20_000;

    fn block() -> Arc<RamBlock> {
        let b = GuestRam::new().add_block("ram", PAGES * PAGE_SIZE, RamBacking::Private).unwrap();
        for page in 0..PAGES {
            assert!(b.store(page * PAGE_SIZE + 8, page as u32));
        }
        b
    }

    fn word(at: *mut u8) -> u32 {
        // SAFETY: of a gathered page.
        unsafe { at.add(8).cast::<u32>().read() }
    }

    fn is_whole(b: &RamBlock) {
        for page in 0..PAGES {
            assert_eq!(b.load::<u32>(page * PAGE_SIZE + 8), Some(page as u32), "page {page}");
            if let Some(place) = b.place_of(page) {
                let at = b.second_address(place).unwrap();
                assert_eq!(word(at), page as u32, "page {page} at its second address");
                assert_eq!(b.offset_of_second(at as u64 + 5), Some(page * PAGE_SIZE + 5));
            }
        }
    }

    #[test]
    fn gathered_pages_are_the_same_memory_one_behind_the_other() {
        let b = block();
        assert_eq!((b.place_of(7), b.offset_of_second(b.host_ptr(0) as u64)), (None, None));
        let pages = [900, 7, 8, 9, 100];
        let gathered = b.gather(&pages).unwrap();
        assert_eq!((gathered.pages, gathered.left.len()), (5, 0));
        let first = b.second_address(gathered.place).unwrap();
        for (i, page) in pages.iter().enumerate() {
            let at = first.wrapping_add(i * PAGE);
            assert_eq!(word(at), *page);
            // SAFETY: of a gathered page.
            unsafe { at.cast::<u32>().write(77) };
            assert_eq!(b.load::<u32>(u64::from(*page) * PAGE_SIZE), Some(77));
            assert!(b.store(u64::from(*page) * PAGE_SIZE, 78u32));
            // SAFETY: as above.
            assert_eq!(unsafe { at.cast::<u32>().read() }, 78);
        }
        is_whole(&b);
        // Again, with another.
        let gathered = b.gather(&[5000, 100, 7]).unwrap();
        assert!(gathered.left == [4, 1] && b.place_of(8).is_some());
        is_whole(&b);
    }

    /// Mappings of the host's that a block is made of.
    fn mappings(b: &RamBlock) -> usize {
        let (first, end) = (b.host_ptr(0) as usize, b.host_ptr(b.len()) as usize);
        let text = std::fs::read_to_string("/proc/self/maps").unwrap();
        let starts = text.lines().filter_map(|line| usize::from_str_radix(line.split('-').next()?, 16).ok());
        starts.filter(|start| (first..end).contains(start)).count()
    }

    #[test]
    fn pages_that_are_put_back_are_one_mapping_with_those_around() {
        let b = block();
        for round in 0..20 {
            // All of the arena, in single pages.
            for part in 0..4 {
                let pages: Vec<u32> = (0..GATHERED_PAGES as u32 / 4).map(|i| 8 * i + 2 * part + round % 2).collect();
                let gathered = b.gather(&pages).unwrap();
                let left = if round == 0 { 0 } else { pages.len() };
                assert_eq!((gathered.pages, gathered.left.len()), (pages.len(), left));
            }
            let mappings = mappings(&b);
            assert!(mappings <= 2 * GATHERED_PAGES + 2, "{mappings}");
        }
        is_whole(&b);
    }

    #[test]
    fn who_reads_meanwhile_reads_what_is_there() {
        use std::sync::atomic::AtomicBool;
        let b = block();
        let (file, done) = (tempfile::tempfile().unwrap(), AtomicBool::new(false));
        let reads = |step: u64| {
            let (mut page, mut count) = (0, 0u64);
            while !done.load(Ordering::Relaxed) {
                page = (page + step) % (PAGES - 3);
                assert_eq!(b.load::<u32>(page * PAGE_SIZE + 8), Some(page as u32));
                let mut buf = [0; 3 * PAGE];
                assert!(b.read(page * PAGE_SIZE, &mut buf));
                assert_eq!(buf[2 * PAGE + 8..][..4], (page as u32 + 2).to_le_bytes());
                count += 1;
            }
            count
        };
        // What devices wrote stays, and the kernel writes what is there to files.
        let writes = || {
            let (mut page, mut count) = (0, 0u32);
            let mut buf = [0; 4];
            while !done.load(Ordering::Relaxed) {
                page = (page + 4099) % PAGES;
                count += 1;
                assert!(b.store(page * PAGE_SIZE + 64, count) && b.write(page * PAGE_SIZE + 100, &count.to_le_bytes()));
                let slice = super::super::RamSlice::new(b.clone(), page * PAGE_SIZE, PAGE_SIZE).unwrap();
                use std::os::fd::AsFd;
                super::super::write_fd_from(file.as_fd(), 0, std::slice::from_ref(&slice)).unwrap();
                std::os::unix::fs::FileExt::read_exact_at(&file, &mut buf, 8).unwrap();
                assert_eq!(buf, (page as u32).to_le_bytes());
                std::os::unix::fs::FileExt::write_all_at(&file, &count.to_le_bytes(), 200).unwrap();
                super::super::read_fd_into(file.as_fd(), 0, &[slice]).unwrap();
                for at in [64, 100, 200] {
                    assert_eq!(b.load::<u32>(page * PAGE_SIZE + at), Some(count), "page {page}");
                }
            }
            count
        };
        std::thread::scope(|scope| {
            let threads = (scope.spawn(|| reads(7)), scope.spawn(|| reads(1009)), scope.spawn(writes));
            let mut moved = 0;
            for round in 0..60 {
                let pages: Vec<u32> = (0..1000).map(|i| (round * 37 + i * 19) % PAGES as u32).collect();
                for _again in 0..1000 {
                    if let Some(gathered) = b.gather(&pages) {
                        moved += u32::from(!gathered.left.is_empty());
                        break;
                    }
                    std::thread::yield_now();
                }
            }
            done.store(true, Ordering::Relaxed);
            assert!(moved > 20, "{moved}");
            assert!(threads.0.join().unwrap() > 0 && threads.1.join().unwrap() > 0 && threads.2.join().unwrap() > 0);
        });
        is_whole(&b);
    }

    #[test]
    fn the_oldest_make_room() {
        let b = block();
        let (mut seed, mut moved) = (1u64, 0);
        for _ in 0..60 {
            let mut pages: Vec<u32> = Vec::new();
            seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            let (len, step) = (1 + (seed >> 40) % 700, 1 + (seed >> 33) % 29);
            pages.extend((0..len).map(|i| (((seed >> 20) + i * step) % PAGES) as u32));
            pages.sort_unstable();
            pages.dedup();
            pages.reverse();
            let gathered = b.gather(&pages).unwrap();
            moved += u32::from(!gathered.left.is_empty());
            assert_eq!(gathered.pages, pages.len());
        }
        assert!(moved > 3, "{moved}");
        is_whole(&b);
    }

    #[test]
    fn discarded_pages_are_zero_at_both_addresses() {
        let b = block();
        let gathered = b.gather(&[30, 10, 20]).unwrap();
        let at = b.second_address(gathered.place).unwrap();
        assert!(b.discard(30 * PAGE_SIZE, PAGE_SIZE) && b.discard(11 * PAGE_SIZE, PAGE_SIZE));
        assert!(b.page_is_zero(30) && b.page_is_zero(11) && !b.page_is_zero(10));
        assert_eq!(word(at), 0);
        assert!(b.store(30 * PAGE_SIZE + 8, 5u32));
        assert_eq!(word(at), 5);
    }

    #[test]
    fn what_cannot_be_gathered() {
        let b = block();
        assert!(b.gather(&[]).is_none() && b.gather(&[PAGES as u32]).is_none());
        let all = GuestRam::new();
        let shared = all.add_block("shared", 0x4000, RamBacking::Shared).unwrap();
        assert!(!shared.can_be_gathered() && shared.gather(&[1]).is_none());
        let (first, second) =
            (all.add_block("a", 0x4000, RamBacking::Private), all.add_block("b", 0x4000, RamBacking::Private));
        assert!(first.unwrap().gather(&[1]).is_some() && second.unwrap().gather(&[1]).is_none(), "one of a machine's");
        let writes = b.moving.read().unwrap();
        assert!(b.gather(&[1]).is_none(), "a device is writing");
        drop(writes);
        assert!(b.gather(&[1]).is_some());
    }
}
