// UNSAFE: maps guest RAM and copies to and from it through raw pointers.
//! Guest RAM: named blocks of host memory, with flags per 4 KiB page.
//!
//! RAM is never lent as `&[u8]` or `&mut [u8]`: vCPUs and devices write it at any
//! time. All access is by copies, by atomic words, or by the kernel through
//! `preadv`/`pwritev`. Whoever writes through this module tells the translator when
//! the page holds translated code ([`CodeWriteListener`]).
#![allow(unsafe_code)]

use super::backing::{Discard, Mapping, RamLock, RamOptions, RamSource, Wanted};
use super::gather::Arena;
use memmap2::{MmapOptions, MmapRaw};
use std::fmt;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::path::PathBuf;
use std::sync::atomic::{AtomicU8, AtomicU16, AtomicU32, AtomicU64, Ordering, fence};
use std::sync::{Arc, Mutex, OnceLock, PoisonError, RwLock, RwLockReadGuard};

/// Granularity of the page flags, in bytes.
pub const PAGE_SIZE: u64 = 4096;

/// Page flag: the page holds code that was translated. Set by the translator before it
/// reads the page, cleared by it when the last translation goes.
pub const PAGE_CODE: u8 = 1 << 0;

/// Page flag: written since whoever watches (display, migration) cleared it.
pub const PAGE_DIRTY: u8 = 1 << 1;

/// Told when something other than translated code wrote to a page with [`PAGE_CODE`].
pub trait CodeWriteListener: Send + Sync {
    /// `len` bytes at `offset` of `block` have been written. Called after the write, on
    /// any thread, with the writer's device lock possibly held: must not wait for a vCPU.
    fn code_written(&self, block: &RamBlock, offset: u64, len: u64);
}

/// Number of a block, unique in its [`GuestRam`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RamBlockId(pub u32);

/// What kind of host memory a block is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum RamBacking {
    /// Anonymous memory: the kernel gives it transparent huge pages by default, which
    /// it does not to shared memory.
    #[default]
    Private,
    /// A memfd, for another process or mapping to share.
    Shared,
}

/// Why a RAM block cannot be had.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RamError {
    /// The length is zero, not whole pages, or does not fit the host's address space.
    #[error("RAM block {name}: length {len:#x} is not a positive multiple of 4 KiB that fits the host")]
    BadLength { name: String, len: u64 },
    /// The host does not have that much memory.
    #[error(
        "RAM block {name}: {len_mib} MiB is more than the host's memory and swap together \
         ({host_mib} MiB): use a smaller -m"
    )]
    TooLarge { name: String, len_mib: u64, host_mib: u64 },
    /// The host does not let it be locked.
    #[error(
        "RAM block {name}: cannot lock {len_mib} MiB in memory: {source}: raise the limit (ulimit -l, or \
         LimitMEMLOCK= of the service), or leave mem-lock=on out"
    )]
    Lock { name: String, len_mib: u64, source: io::Error },
    /// The host refuses the mapping.
    #[error("RAM block {name}: the host gives no {} MiB of memory: {source}: use a smaller -m", len >> 20)]
    Map { name: String, len: u64, source: io::Error },
    /// The host has not got that many pages now.
    #[error(
        "RAM block {name}: the host cannot give all {len_mib} MiB at once: {source}: use a smaller -m, or no prealloc=on"
    )]
    Prealloc { name: String, len_mib: u64, source: io::Error },
    /// A file cannot be used.
    #[error("RAM block {name}: {}: {source}", path.display())]
    File { name: String, path: PathBuf, source: io::Error },
    /// The host has no huge pages of this size.
    #[error(
        "RAM block {name}: the host has no huge pages of {}: see /sys/kernel/mm/hugepages for the sizes it has",
        page_text(*page)
    )]
    NoHugePages { name: String, page: u64 },
    /// The pool of huge pages is too small.
    #[error(
        "RAM block {name}: the host's pool has not {pages} huge pages of {} left: reserve more (sudo sysctl \
         vm.nr_hugepages={pages}), or use a smaller -m",
        page_text(*page)
    )]
    PoolEmpty { name: String, page: u64, pages: u64 },
    /// Huge pages are given out whole.
    #[error("RAM block {name}: {len_mib} MiB are not whole huge pages of {}: use another -m", page_text(*page))]
    NotWholePages { name: String, len_mib: u64, page: u64 },
    /// The name is taken.
    #[error("RAM block {name} exists already")]
    Duplicate { name: String },
}

fn page_text(bytes: u64) -> String {
    match bytes {
        0 => "its default size".to_owned(),
        b if b >= 1 << 30 => format!("{} GiB", b >> 30),
        b if b >= 1 << 20 => format!("{} MiB", b >> 20),
        b => format!("{} KiB", b >> 10),
    }
}

#[derive(Default)]
struct Shared {
    /// Whether blocks are kept in memory.
    lock: Mutex<RamLock>,
    listener: OnceLock<Arc<dyn CodeWriteListener>>,
    /// The block that has pages gathered: the host's mappings are not for more than one.
    gatherer: OnceLock<RamBlockId>,
}

impl Shared {
    fn lock(&self) -> RamLock {
        *self.lock.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// All RAM blocks of a machine.
#[derive(Default)]
pub struct GuestRam {
    blocks: Mutex<Vec<Arc<RamBlock>>>,
    shared: Arc<Shared>,
}

impl GuestRam {
    /// No RAM yet.
    pub fn new() -> Arc<Self> {
        Arc::new(Self::default())
    }

    /// Makes a zero-filled block. Host memory is taken page by page on first touch.
    pub fn add_block(&self, name: &str, len: u64, backing: RamBacking) -> Result<Arc<RamBlock>, RamError> {
        let options = match backing {
            RamBacking::Private => RamOptions::default(),
            RamBacking::Shared => RamOptions { source: RamSource::Memfd { huge: None }, share: true, prealloc: false },
        };
        self.add_block_with(name, len, &options)
    }

    /// Makes a block of the host memory that is asked for; zero-filled, unless it is a file's.
    pub fn add_block_with(&self, name: &str, len: u64, options: &RamOptions) -> Result<Arc<RamBlock>, RamError> {
        let mut blocks = self.blocks.lock().unwrap_or_else(PoisonError::into_inner);
        if blocks.iter().any(|b| b.name == name) {
            return Err(RamError::Duplicate { name: name.to_owned() });
        }
        let id = RamBlockId(blocks.last().map_or(0, |b| b.id.0 + 1));
        let block = Arc::new(RamBlock::map(id, name, len, options, self.shared.clone())?);
        blocks.push(block.clone());
        Ok(block)
    }

    /// Whether blocks made from now on stay in memory (`-overcommit mem-lock=on`).
    pub fn lock_in_memory(&self, lock: RamLock) {
        *self.shared.lock.lock().unwrap_or_else(PoisonError::into_inner) = lock;
    }

    /// Forgets a block; the memory is freed when its last user lets go.
    pub fn remove_block(&self, name: &str) {
        self.blocks.lock().unwrap_or_else(PoisonError::into_inner).retain(|b| b.name != name);
    }

    /// The block called `name`.
    pub fn block(&self, name: &str) -> Option<Arc<RamBlock>> {
        self.blocks().into_iter().find(|b| b.name == name)
    }

    /// All blocks, oldest first.
    pub fn blocks(&self) -> Vec<Arc<RamBlock>> {
        self.blocks.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Names the translator that wants to hear of writes to code. Once per machine;
    /// false if there is one already.
    pub fn set_code_write_listener(&self, listener: Arc<dyn CodeWriteListener>) -> bool {
        self.shared.listener.set(listener).is_ok()
    }
}

/// One contiguous block of guest RAM.
pub struct RamBlock {
    id: RamBlockId,
    name: String,
    len: u64,
    map: MmapRaw,
    flags: MmapRaw,
    file: Option<File>,
    discard: Discard,
    shared: Arc<Shared>,
    /// Anonymous memory that nobody expects to be of a certain kind.
    pub(super) plain: bool,
    /// Held for reading by who writes in another way than vCPUs do, or has the kernel read; for writing, to move pages.
    pub(super) moving: RwLock<()>,
    /// Counts when a page becomes unsettled, and when it is settled again: see [`RamBlock::unsettle`].
    unsettled: AtomicU64,
    /// Pages that have a second address.
    pub(super) arena: OnceLock<Arena>,
}

/// A page of the block does not have its contents while it lives.
pub(super) struct Unsettled<'a>(&'a AtomicU64);

impl Drop for Unsettled<'_> {
    fn drop(&mut self) {
        self.0.fetch_add(1, Ordering::SeqCst);
    }
}

/// Memory and swap of the host in bytes: the limit the kernel's own overcommit
/// heuristic applies to one mapping. `None` if it cannot be read.
fn host_memory() -> Option<u64> {
    let text = std::fs::read_to_string("/proc/meminfo").ok()?;
    let field = |key: &str| {
        let line = text.lines().find(|l| l.starts_with(key))?;
        line.split_whitespace().nth(1)?.parse::<u64>().ok()
    };
    field("MemTotal:")?.checked_add(field("SwapTotal:").unwrap_or(0))?.checked_mul(1024)
}

impl RamBlock {
    fn map(id: RamBlockId, name: &str, len: u64, options: &RamOptions, shared: Arc<Shared>) -> Result<Self, RamError> {
        let bad = || RamError::BadLength { name: name.to_owned(), len };
        if len == 0 || !len.is_multiple_of(PAGE_SIZE) || len > isize::MAX as u64 {
            return Err(bad());
        }
        if let Some(host) = host_memory().filter(|&h| len > h) {
            let name = name.to_owned();
            return Err(RamError::TooLarge { name, len_mib: len >> 20, host_mib: host >> 20 });
        }
        let size = usize::try_from(len).map_err(|_| bad())?;
        let Mapping { map, file, discard } = Wanted { name, size, options, lock: shared.lock() }.map()?;
        let failed = |source| RamError::Map { name: name.to_owned(), len, source };
        let pages = size / PAGE_SIZE as usize;
        let flags = MmapOptions::new().len(pages).no_reserve_swap().map_anon().map_err(failed)?;
        let plain = *options == RamOptions::default() && shared.lock() == RamLock::Off;
        Ok(Self {
            id,
            name: name.to_owned(),
            len,
            map,
            flags: flags.into(),
            file,
            discard,
            shared,
            plain,
            moving: RwLock::new(()),
            unsettled: AtomicU64::new(0),
            arena: OnceLock::new(),
        })
    }

    /// The block's number.
    pub fn id(&self) -> RamBlockId {
        self.id
    }

    /// The block's name, stable over saves.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Length in bytes, whole pages.
    #[allow(clippy::len_without_is_empty)]
    pub fn len(&self) -> u64 {
        self.len
    }

    /// The memfd or file behind a shared block.
    pub fn fd(&self) -> Option<BorrowedFd<'_>> {
        self.file.as_ref().map(|f| f.as_fd())
    }

    /// Host address of byte `offset`, for accelerators. Valid as long as the block.
    ///
    /// # Panics
    /// If `offset` is beyond the end.
    pub fn host_ptr(&self, offset: u64) -> *mut u8 {
        assert!(offset <= self.len, "offset {offset:#x} outside RAM block {}", self.name);
        self.map.as_mut_ptr().wrapping_add(offset as usize)
    }

    /// Number of pages.
    pub fn page_count(&self) -> u64 {
        self.len / PAGE_SIZE
    }

    /// The flags of page number `page`.
    ///
    /// # Panics
    /// If there is no such page.
    pub fn page_flags(&self, page: u64) -> &AtomicU8 {
        assert!(page < self.page_count(), "page {page} outside RAM block {}", self.name);
        // SAFETY: the flags mapping has one byte per page, the page number was checked, the
        // mapping lives as long as self, and it is only ever accessed as AtomicU8.
        unsafe { AtomicU8::from_ptr(self.flags.as_mut_ptr().add(page as usize)) }
    }

    /// Host address of the flags of page 0, one byte per page, for accelerators.
    pub fn page_flags_ptr(&self) -> *mut u8 {
        self.flags.as_mut_ptr()
    }

    /// True if `len` bytes at `offset` are inside.
    pub fn contains(&self, offset: u64, len: u64) -> bool {
        offset.checked_add(len).is_some_and(|end| end <= self.len)
    }

    /// Marks pages dirty and tells the translator, after a write by other means
    /// (the host kernel, an accelerator's helper).
    pub fn note_write(&self, offset: u64, len: u64) {
        if len == 0 || !self.contains(offset, len) {
            return;
        }
        // The translator sets PAGE_CODE, then reads the page; here the page is written,
        // then the flag read. One of the two sees the other.
        fence(Ordering::SeqCst);
        let mut code = false;
        for page in offset / PAGE_SIZE..=(offset + len - 1) / PAGE_SIZE {
            let cell = self.page_flags(page);
            let flags = cell.load(Ordering::Relaxed);
            if flags & PAGE_DIRTY == 0 {
                cell.fetch_or(PAGE_DIRTY, Ordering::Relaxed);
            }
            code |= flags & PAGE_CODE != 0;
        }
        if let Some(listener) = self.shared.listener.get().filter(|_| code) {
            listener.code_written(self, offset, len);
        }
    }

    /// Pages stay where they are while it is held.
    fn writes(&self) -> RwLockReadGuard<'_, ()> {
        self.moving.read().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether this is the block that may have pages gathered.
    pub(super) fn is_first_to_gather(&self) -> bool {
        *self.shared.gatherer.get_or_init(|| self.id) == self.id
    }

    /// A page will not have its contents for a moment. Only who holds `moving` for writing may say so.
    pub(super) fn unsettle(&self) -> Unsettled<'_> {
        self.unsettled.fetch_add(1, Ordering::SeqCst);
        Unsettled(&self.unsettled)
    }

    /// Reads when all pages have their contents: what was read while one had not is read again.
    fn settled<R>(&self, mut read: impl FnMut() -> R) -> R {
        let before = self.unsettled.load(Ordering::Acquire);
        let value = read();
        fence(Ordering::Acquire);
        if before.is_multiple_of(2) && self.unsettled.load(Ordering::Relaxed) == before {
            return value;
        }
        let _stays = self.writes();
        read()
    }

    /// Copies out. False, and nothing done, if the range is not inside.
    #[must_use]
    pub fn read(&self, offset: u64, buf: &mut [u8]) -> bool {
        if !self.contains(offset, buf.len() as u64) {
            return false;
        }
        // SAFETY: the range is inside the mapping and `buf` is ours alone. A guest that
        // writes the range meanwhile gives us torn bytes, which are as good as any others:
        // no reference to guest memory is formed.
        self.settled(|| unsafe {
            std::ptr::copy_nonoverlapping(self.host_ptr(offset), buf.as_mut_ptr(), buf.len());
        });
        true
    }

    /// Copies in. False, and nothing done, if the range is not inside.
    #[must_use]
    pub fn write(&self, offset: u64, data: &[u8]) -> bool {
        if !self.contains(offset, data.len() as u64) {
            return false;
        }
        let stays = self.writes();
        // SAFETY: as for `read`, in the other direction.
        unsafe {
            std::ptr::copy_nonoverlapping(data.as_ptr(), self.host_ptr(offset), data.len());
        }
        drop(stays);
        self.note_write(offset, data.len() as u64);
        true
    }

    /// Fills with `byte`. False, and nothing done, if the range is not inside.
    #[must_use]
    pub fn fill(&self, offset: u64, len: u64, byte: u8) -> bool {
        if !self.contains(offset, len) {
            return false;
        }
        let stays = self.writes();
        // SAFETY: as for `write`.
        unsafe {
            std::ptr::write_bytes(self.host_ptr(offset), byte, len as usize);
        }
        drop(stays);
        self.note_write(offset, len);
        true
    }

    /// Loads a little-endian word: atomically if aligned. `None` outside the block.
    pub fn load<T: RamWord>(&self, offset: u64) -> Option<T> {
        if !self.contains(offset, size_of::<T>() as u64) {
            return None;
        }
        let p = self.host_ptr(offset);
        if (p as usize).is_multiple_of(size_of::<T>()) {
            // SAFETY: inside the mapping and aligned; guest memory is only accessed
            // atomically or by copies of plain bytes.
            return Some(self.settled(|| unsafe { T::load(p) }));
        }
        // SAFETY: inside the mapping; the read is declared unaligned.
        Some(self.settled(|| unsafe { p.cast::<T>().read_unaligned() }).to_native())
    }

    /// Stores a little-endian word: atomically if aligned. False outside the block.
    #[must_use]
    pub fn store<T: RamWord>(&self, offset: u64, value: T) -> bool {
        if !self.contains(offset, size_of::<T>() as u64) {
            return false;
        }
        let stays = self.writes();
        let p = self.host_ptr(offset);
        if (p as usize).is_multiple_of(size_of::<T>()) {
            // SAFETY: as for `load`.
            unsafe { T::store(p, value) };
        } else {
            // SAFETY: inside the mapping; the write is declared unaligned.
            unsafe { p.cast::<T>().write_unaligned(value.to_le()) };
        }
        drop(stays);
        self.note_write(offset, size_of::<T>() as u64);
        true
    }

    /// Compares and exchanges a little-endian word (page-table A and D bits). `None` if
    /// misaligned or outside, else what was there: equal to `old` if `new` was stored.
    pub fn compare_exchange<T: RamWord>(&self, offset: u64, old: T, new: T) -> Option<T> {
        if !self.contains(offset, size_of::<T>() as u64) || !offset.is_multiple_of(size_of::<T>() as u64) {
            return None;
        }
        let stays = self.writes();
        // SAFETY: as for `load`; the mapping is page-aligned, so the offset's alignment is
        // the address's.
        let seen = unsafe { T::compare_exchange(self.host_ptr(offset), old, new) };
        drop(stays);
        self.note_write(offset, size_of::<T>() as u64);
        Some(seen)
    }

    /// Gives whole pages back to the host; they read as zero. False if the range is not
    /// inside, not whole pages, or the host refuses.
    pub fn discard(&self, offset: u64, len: u64) -> bool {
        if !self.contains(offset, len) || !offset.is_multiple_of(PAGE_SIZE) || !len.is_multiple_of(PAGE_SIZE) {
            return false;
        }
        if len == 0 {
            return true;
        }
        let advice = match self.discard {
            Discard::Remove => libc::MADV_REMOVE,
            Discard::DontNeed => libc::MADV_DONTNEED,
            Discard::Never => return false,
        };
        let stays = self.writes();
        // SAFETY: the pages belong to our mapping, and nobody holds references into it;
        // guests and devices then read zeros, which is what the caller asks for.
        let done = unsafe { libc::madvise(self.host_ptr(offset).cast(), len as usize, advice) } == 0;
        if let Some(arena) = self.arena.get() {
            arena.discard(offset / PAGE_SIZE..(offset + len) / PAGE_SIZE);
        }
        drop(stays);
        self.note_write(offset, len);
        done
    }

    /// True if page number `page` is all zero. Untouched pages of a private block stay
    /// untouched or share the host's zero page.
    pub fn page_is_zero(&self, page: u64) -> bool {
        let mut buf = [0u8; PAGE_SIZE as usize];
        self.read(page.saturating_mul(PAGE_SIZE), &mut buf) && buf.iter().all(|&b| b == 0)
    }
}

impl fmt::Debug for RamBlock {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RamBlock").field("name", &self.name).field("len", &self.len).finish_non_exhaustive()
    }
}

mod sealed {
    pub trait Sealed {}
}

/// Words that guest RAM can be accessed by: `u8`, `u16`, `u32`, `u64`.
pub trait RamWord: sealed::Sealed + Copy + Eq {
    #[doc(hidden)]
    fn to_native(self) -> Self;
    #[doc(hidden)]
    fn to_le(self) -> Self;
    /// # Safety
    /// `p` is valid and aligned.
    #[doc(hidden)]
    unsafe fn load(p: *mut u8) -> Self;
    /// # Safety
    /// `p` is valid and aligned.
    #[doc(hidden)]
    unsafe fn store(p: *mut u8, value: Self);
    /// # Safety
    /// `p` is valid and aligned.
    #[doc(hidden)]
    unsafe fn compare_exchange(p: *mut u8, old: Self, new: Self) -> Self;
}

macro_rules! ram_word {
    ($($word:ty, $atomic:ty;)*) => { $(
        impl sealed::Sealed for $word {}
        impl RamWord for $word {
            fn to_native(self) -> Self {
                <$word>::from_le(self)
            }
            fn to_le(self) -> Self {
                <$word>::to_le(self)
            }
            unsafe fn load(p: *mut u8) -> Self {
                // SAFETY: by the function's contract.
                let cell = unsafe { <$atomic>::from_ptr(p.cast()) };
                <$word>::from_le(cell.load(Ordering::Acquire))
            }
            unsafe fn store(p: *mut u8, value: Self) {
                // SAFETY: by the function's contract.
                let cell = unsafe { <$atomic>::from_ptr(p.cast()) };
                cell.store(value.to_le(), Ordering::Release);
            }
            unsafe fn compare_exchange(p: *mut u8, old: Self, new: Self) -> Self {
                // SAFETY: by the function's contract.
                let cell = unsafe { <$atomic>::from_ptr(p.cast()) };
                let (old, new) = (old.to_le(), new.to_le());
                let seen = cell
                    .compare_exchange(old, new, Ordering::SeqCst, Ordering::SeqCst)
                    .unwrap_or_else(|seen| seen);
                <$word>::from_le(seen)
            }
        }
    )* };
}
ram_word! { u8, AtomicU8; u16, AtomicU16; u32, AtomicU32; u64, AtomicU64; }

/// A checked range of a block, for host I/O straight to and from guest RAM.
#[derive(Clone, Debug)]
pub struct RamSlice {
    block: Arc<RamBlock>,
    offset: u64,
    len: u64,
}

impl RamSlice {
    /// The range, if it is inside the block.
    pub fn new(block: Arc<RamBlock>, offset: u64, len: u64) -> Option<Self> {
        block.contains(offset, len).then_some(Self { block, offset, len })
    }

    /// The block.
    pub fn block(&self) -> &Arc<RamBlock> {
        &self.block
    }

    /// Start in the block, in bytes.
    pub fn offset(&self) -> u64 {
        self.offset
    }

    /// Length in bytes.
    pub fn len(&self) -> u64 {
        self.len
    }

    /// True if there are no bytes.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// A part of the slice.
    pub fn slice(&self, at: u64, len: u64) -> Option<Self> {
        let end = at.checked_add(len)?;
        (end <= self.len).then(|| Self { block: self.block.clone(), offset: self.offset + at, len })
    }

    /// Copies out from `at` bytes into the slice.
    #[must_use]
    pub fn read(&self, at: u64, buf: &mut [u8]) -> bool {
        self.holds(at, buf.len() as u64) && self.block.read(self.offset + at, buf)
    }

    /// Copies in at `at` bytes into the slice.
    #[must_use]
    pub fn write(&self, at: u64, data: &[u8]) -> bool {
        self.holds(at, data.len() as u64) && self.block.write(self.offset + at, data)
    }

    /// Fills the slice.
    pub fn fill(&self, byte: u8) {
        let _ = self.block.fill(self.offset, self.len, byte);
    }

    fn holds(&self, at: u64, len: u64) -> bool {
        at.checked_add(len).is_some_and(|end| end <= self.len)
    }
}

/// The kernel takes no more segments in one call (`UIO_MAXIOV`).
const MAX_IOV: usize = 1024;

/// The segments from byte `skip` on, as the kernel wants them.
fn io_vectors(slices: &[RamSlice], mut skip: u64) -> Vec<libc::iovec> {
    let mut out = Vec::with_capacity(slices.len().min(MAX_IOV));
    for s in slices {
        if skip >= s.len {
            skip -= s.len;
            continue;
        }
        let iov_base = s.block.host_ptr(s.offset + skip).cast();
        out.push(libc::iovec { iov_base, iov_len: (s.len - skip) as usize });
        skip = 0;
        if out.len() == MAX_IOV {
            break;
        }
    }
    out
}

/// Runs `call` on what is left until all is done, it returns 0, or it fails.
fn transfer(
    slices: &[RamSlice],
    position: u64,
    call: impl Fn(&[libc::iovec], libc::off_t) -> isize,
) -> io::Result<u64> {
    let total: u64 = slices.iter().map(|s| s.len).sum();
    let mut done = 0;
    while done < total {
        let at = position.checked_add(done).and_then(|p| libc::off_t::try_from(p).ok());
        let at = at.ok_or_else(|| io::Error::from(io::ErrorKind::InvalidInput))?;
        match call(&io_vectors(slices, done), at) {
            0 => break,
            n if n > 0 => done += n as u64,
            _ => {
                let e = io::Error::last_os_error();
                if e.kind() != io::ErrorKind::Interrupted {
                    return Err(e);
                }
            }
        }
    }
    Ok(done)
}

/// Has the pages of all these blocks stay where they are, each asked once: a thread that asks twice might wait for itself.
fn writes_to(slices: &[RamSlice]) -> Vec<RwLockReadGuard<'_, ()>> {
    let mut blocks: Vec<&Arc<RamBlock>> = Vec::new();
    for slice in slices {
        if !blocks.iter().any(|block| Arc::ptr_eq(block, &slice.block)) {
            blocks.push(&slice.block);
        }
    }
    blocks.into_iter().map(|block| block.writes()).collect()
}

/// Reads from `fd` at byte `position` straight into guest RAM. Returns the bytes read:
/// fewer than asked only at the end of the file.
pub fn read_fd_into(fd: BorrowedFd<'_>, position: u64, slices: &[RamSlice]) -> io::Result<u64> {
    let stay = writes_to(slices);
    let result = transfer(slices, position, |iov, at| {
        // SAFETY: every segment lies in a mapping that `slices` keeps alive, and guest RAM
        // may be written at any time by anyone.
        unsafe { libc::preadv(fd.as_raw_fd(), iov.as_ptr(), iov.len() as i32, at) }
    });
    drop(stay);
    for s in slices {
        s.block.note_write(s.offset, s.len);
    }
    result
}

/// Writes guest RAM straight to `fd` at byte `position`. Returns the bytes written.
pub fn write_fd_from(fd: BorrowedFd<'_>, position: u64, slices: &[RamSlice]) -> io::Result<u64> {
    let _stay = writes_to(slices);
    transfer(slices, position, |iov, at| {
        // SAFETY: every segment lies in a mapping that `slices` keeps alive; the kernel
        // copies out, and torn data is the guest's own doing.
        unsafe { libc::pwritev(fd.as_raw_fd(), iov.as_ptr(), iov.len() as i32, at) }
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::AtomicUsize;

    fn block() -> (Arc<GuestRam>, Arc<RamBlock>) {
        let ram = GuestRam::new();
        let b = ram.add_block("ram", 0x10000, RamBacking::Private).unwrap();
        (ram, b)
    }

    #[test]
    fn locked_blocks_are_in_memory() {
        let locked_kib = || -> u64 {
            let text = std::fs::read_to_string("/proc/self/status").unwrap();
            let line = text.lines().find(|l| l.starts_with("VmLck:")).unwrap();
            line.split_whitespace().nth(1).unwrap().parse().unwrap()
        };
        for lock in [RamLock::Now, RamLock::OnFault] {
            let (ram, before) = (GuestRam::new(), locked_kib());
            ram.lock_in_memory(lock);
            match ram.add_block("locked", 0x10000, RamBacking::Private) {
                Ok(b) => assert_eq!((b.load::<u64>(0), locked_kib() - before), (Some(0), 64)),
                // Hosts may not let users lock that much.
                Err(e) => assert!(e.to_string().contains("ulimit -l"), "{e}"),
            }
        }
    }

    #[test]
    fn memory_taken_at_once() {
        let ram = GuestRam::new();
        let options = RamOptions { prealloc: true, ..RamOptions::default() };
        let b = ram.add_block_with("now", 4 << 20, &options).unwrap();
        let mut present = vec![0u8; 1024];
        // SAFETY: the range is the block's, and there is a byte for each of its pages.
        assert_eq!(unsafe { libc::mincore(b.host_ptr(0).cast(), 4 << 20, present.as_mut_ptr()) }, 0);
        assert!(present.iter().all(|p| p & 1 != 0));
    }

    #[test]
    fn memory_of_files() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("ram");
        std::fs::write(&file, b"what was there").unwrap();
        let options = |source, share| RamOptions { source, share, prealloc: false };
        // Private: the file's contents, but not its memory.
        let ram = GuestRam::new();
        let b = ram.add_block_with("a", 0x4000, &options(RamSource::File(file.clone()), false)).unwrap();
        assert_eq!(b.load::<u32>(0), Some(u32::from_le_bytes(*b"what")));
        assert!(b.write(0, b"mine") && !b.discard(0, 0x1000));
        assert_eq!(std::fs::read(&file).unwrap()[..4], *b"what");
        // Shared: the same memory.
        let b = ram.add_block_with("b", 0x4000, &options(RamSource::File(file.clone()), true)).unwrap();
        assert!(b.write(0, b"ours") && b.fd().is_some());
        assert_eq!(std::fs::read(&file).unwrap()[..4], *b"ours");
        assert!(b.discard(0, 0x1000) && b.page_is_zero(0));
        // A directory: a file that nobody else finds.
        let here = options(RamSource::File(dir.path().to_owned()), true);
        let b = ram.add_block_with("c", 0x4000, &here).unwrap();
        assert!(b.write(0, &[1]) && b.load::<u8>(0) == Some(1));
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1);
        let nowhere = options(RamSource::File("/nonexistent/ram".into()), true);
        let text = ram.add_block_with("d", 0x4000, &nowhere).unwrap_err().to_string();
        assert!(text.contains("/nonexistent/ram"), "{text}");
    }

    #[test]
    fn huge_pages_or_words() {
        let ram = GuestRam::new();
        let huge = |page| RamOptions { source: RamSource::Memfd { huge: Some(page) }, share: true, prealloc: false };
        // The pool is the host's administrator's: all of its answers are one line.
        match ram.add_block_with("huge", 4 << 20, &huge(2 << 20)) {
            Ok(b) => assert!(b.store(0, 1u8)),
            Err(e) => assert!(e.to_string().contains("huge pages of 2 MiB"), "{e}"),
        }
        let text = ram.add_block_with("odd", 0x1000, &huge(2 << 20)).unwrap_err().to_string();
        assert!(text.contains("not whole huge pages") || text.contains("has no huge pages"), "{text}");
        let text = ram.add_block_with("strange", 4 << 20, &huge(12345)).unwrap_err().to_string();
        assert!(text.contains("/sys/kernel/mm/hugepages"), "{text}");
    }

    #[test]
    fn words_and_bytes() {
        let (_ram, b) = block();
        assert!(b.write(0xffe, &[1, 2, 3, 4]));
        assert_eq!(b.load::<u32>(0xffe), Some(0x0403_0201));
        assert!(b.store(8, 0x1122_3344_5566_7788u64));
        assert_eq!(b.load::<u8>(8), Some(0x88));
        assert_eq!(b.compare_exchange(8, 0u64, 5), Some(0x1122_3344_5566_7788));
        assert_eq!(b.compare_exchange(12, 0u64, 5), None);
        assert_eq!(b.load::<u64>(0xfff9), None);
        assert!(!b.write(0xffff, &[0, 0]));
        assert!(!b.read(u64::MAX, &mut [0]));
        assert_eq!(b.page_flags(0).load(Ordering::Relaxed), PAGE_DIRTY);
        assert!(b.page_is_zero(2) && !b.page_is_zero(0));
        assert!(b.discard(0, 0x1000) && b.page_is_zero(0));
    }

    #[test]
    fn impossible_sizes_are_errors() {
        let (ram, _b) = block();
        let err = ram.add_block("huge", 1 << 44, RamBacking::Private).unwrap_err();
        assert!(err.to_string().contains("use a smaller -m"), "{err}");
        assert!(matches!(ram.add_block("odd", 5, RamBacking::Private), Err(RamError::BadLength { .. })));
        assert!(matches!(ram.add_block("x", !0xfff, RamBacking::Private), Err(RamError::BadLength { .. })));
        assert!(matches!(ram.add_block("ram", 0x1000, RamBacking::Private), Err(RamError::Duplicate { .. })));
    }

    #[test]
    fn code_pages_are_reported() {
        struct Count(AtomicUsize);
        impl CodeWriteListener for Count {
            fn code_written(&self, block: &RamBlock, offset: u64, len: u64) {
                assert_eq!((block.name(), offset, len), ("ram", 0x1ffe, 4));
                self.0.fetch_add(1, Ordering::Relaxed);
            }
        }
        let (ram, b) = block();
        let count = Arc::new(Count(AtomicUsize::new(0)));
        assert!(ram.set_code_write_listener(count.clone()));
        assert!(!ram.set_code_write_listener(count.clone()));
        b.page_flags(2).fetch_or(PAGE_CODE, Ordering::Relaxed);
        assert!(b.write(0x1000, &[1]));
        assert_eq!(count.0.load(Ordering::Relaxed), 0);
        assert!(b.store(0x1ffe, 1u32));
        assert_eq!(count.0.load(Ordering::Relaxed), 1);
    }

    #[test]
    fn file_io_without_copies() {
        let ram = GuestRam::new();
        let b = ram.add_block("ram", 0x4000, RamBacking::Shared).unwrap();
        assert!(b.fd().is_some());
        assert!(b.write(0, b"hello world"));
        let file = tempfile::tempfile().unwrap();
        let whole = [RamSlice::new(b.clone(), 0, 6).unwrap(), RamSlice::new(b.clone(), 6, 5).unwrap()];
        assert_eq!(write_fd_from(file.as_fd(), 3, &whole).unwrap(), 11);
        let target = [RamSlice::new(b.clone(), 0x1000, 8).unwrap(), RamSlice::new(b.clone(), 0x2000, 8).unwrap()];
        assert_eq!(read_fd_into(file.as_fd(), 3, &target).unwrap(), 11);
        let mut out = [0; 8];
        assert!(target[0].read(0, &mut out));
        assert_eq!(&out, b"hello wo");
        assert_eq!(b.load::<u8>(0x2002), Some(b'd'));
        assert!(RamSlice::new(b, 0x3fff, 2).is_none());
    }
}
