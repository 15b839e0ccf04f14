//! The code cache's memory: one reservation below 2 GiB that never moves.
//!
//! Code is mapped twice, executable where it runs and writable elsewhere, so no page is ever both and
//! publishing or patching needs no system call. Below 2 GiB, because then an address fits 31 bits:
//! entry tables hold 32-bit words and generated code compares table addresses with immediates.
#![allow(unsafe_code)]

use std::io;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

use rustix::mm::{
    Advice, MapFlags, MprotectFlags, MremapFlags, ProtFlags, madvise, mmap_anonymous, mprotect, mremap_fixed, munmap,
};

/// Bytes of a page.
const PAGE: usize = 4096;
/// Bytes of a huge page of the host.
pub const HUGE: usize = 2 << 20;

const LOWEST: usize = 0x0100_0000;
const HIGHEST: usize = 0x7ff0_0000;
const STEP: usize = 0x0100_0000;

/// The reservation: code, then entry tables.
pub struct CodeMapping {
    exec: NonNull<u8>,
    write: NonNull<u8>,
    code_len: usize,
    tables: NonNull<u8>,
    tables_len: usize,
    /// Which pages of the tables have had an entry. To look at one that has not would be a fault of the host's, and another
    /// when it gets its first.
    filled: Box<[AtomicBool]>,
    /// Guest code begins at multiples of this.
    code_align: usize,
}

// SAFETY: plain memory at fixed addresses; all writes go through `&self` methods that use atomics for what
// other threads may be executing or reading, or are to space not yet published.
unsafe impl Send for CodeMapping {}
// SAFETY: as above.
unsafe impl Sync for CodeMapping {}

impl CodeMapping {
    /// Reserves `code_len` bytes for code and room for `tables` entry tables, of a 4-byte word for each multiple of
    /// `code_align` in a page.
    ///
    /// # Errors
    /// No room below 2 GiB, or the host's own error.
    pub fn new(code_len: usize, tables: usize, code_align: u32) -> io::Result<CodeMapping> {
        let code_align = code_align as usize;
        let tables_len = tables * (PAGE / code_align * 4);
        let base = reserve_low(code_len + tables_len)?;
        // SAFETY: replaces a part of the reservation just made, which nothing else knows of.
        // No file: `perf` looks for names of generated code (perf.rs) in anonymous memory only.
        let exec = unsafe {
            mmap_anonymous(
                base.cast(),
                code_len,
                ProtFlags::READ | ProtFlags::EXEC,
                MapFlags::SHARED | MapFlags::FIXED | MapFlags::NORESERVE,
            )?
        };
        // SAFETY: as above, the reservation's second part.
        let tables = unsafe {
            mmap_anonymous(
                base.add(code_len).cast(),
                tables_len,
                ProtFlags::READ | ProtFlags::WRITE,
                MapFlags::PRIVATE | MapFlags::FIXED | MapFlags::NORESERVE,
            )?
        };
        // SAFETY: an old size of 0 makes another mapping of the same shared memory (mremap(2)), in place of a part of a
        // reservation that nothing else knows of; nothing knows of it yet either, so its protection can change.
        let write = unsafe {
            let room = mmap_anonymous(
                std::ptr::null_mut(),
                code_len + HUGE,
                ProtFlags::empty(),
                MapFlags::PRIVATE | MapFlags::NORESERVE,
            )?;
            // Where a huge page of the one can be one of the other too.
            let before = (exec as usize).wrapping_sub(room as usize) % HUGE;
            let write = mremap_fixed(exec, 0, code_len, MremapFlags::MAYMOVE, room.byte_add(before))?;
            mprotect(write, code_len, MprotectFlags::READ | MprotectFlags::WRITE)?;
            if before != 0 {
                munmap(room, before)?;
            }
            munmap(write.byte_add(code_len), HUGE - before)?;
            write
        };
        let non_null = |p: *mut std::ffi::c_void| NonNull::new(p.cast::<u8>()).ok_or(io::ErrorKind::OutOfMemory);
        Ok(CodeMapping {
            exec: non_null(exec)?,
            write: non_null(write)?,
            code_len,
            tables: non_null(tables)?,
            tables_len,
            filled: (0..tables_len.div_ceil(PAGE)).map(|_| AtomicBool::new(false)).collect(),
            code_align,
        })
    }

    /// Host address at which code offset 0 executes.
    pub fn code_base(&self) -> usize {
        self.exec.as_ptr() as usize
    }

    /// Bytes of code space.
    pub fn code_len(&self) -> usize {
        self.code_len
    }

    /// Bytes of an entry table.
    pub fn table_bytes(&self) -> usize {
        PAGE / self.code_align * 4
    }

    /// Host address of table number `n`.
    pub fn table(&self, n: usize) -> u32 {
        debug_assert!((n + 1) * self.table_bytes() <= self.tables_len);
        (self.tables.as_ptr() as usize + n * self.table_bytes()) as u32
    }

    /// Number of tables there is room for.
    pub fn table_count(&self) -> usize {
        self.tables_len / self.table_bytes()
    }

    /// Copies code to offset `at`, which nothing refers to yet.
    ///
    /// # Panics
    /// If it does not fit: the caller checked.
    pub fn write_code(&self, at: usize, code: &[u8]) {
        assert!(at + code.len() <= self.code_len);
        // SAFETY: in bounds by the assertion; unpublished, so no thread executes or writes it.
        unsafe { std::ptr::copy_nonoverlapping(code.as_ptr(), self.write.as_ptr().add(at), code.len()) };
    }

    /// Takes code from `from` to `to` out of the writable mapping's resident set: it stays executable, and a
    /// later patch faults its page in again.
    pub fn settle(&self, from: usize, to: usize) {
        let (from, to) = (from.next_multiple_of(4096), to & !4095);
        if from >= to || to > self.code_len {
            return;
        }
        // SAFETY: the mapping is shared memory: this drops page-table entries, not contents.
        if let Err(e) = unsafe { madvise(self.write.as_ptr().add(from).cast(), to - from, Advice::LinuxDontNeed) } {
            log::debug!("code cache: cannot settle {from:#x}..{to:#x}: {e}");
        }
    }

    /// Has the code around offset `at` in a huge page, if the host can: code is spread widely, and finding each of its small pages'
    /// addresses is what much of it would wait for. Something of it has been written. May take long: other threads go on.
    pub fn use_huge_page(&self, at: usize) {
        let from = at / HUGE * HUGE;
        if from + HUGE > self.code_len {
            return;
        }
        // SAFETY: moves memory of the mapping to another place of the host's, as it may at any time; where the kernel does not
        // know of it (before Linux 6.1) it refuses.
        if unsafe { libc::madvise(self.exec.as_ptr().add(from).cast(), HUGE, libc::MADV_COLLAPSE) } != 0 {
            log::debug!("code cache: no huge page at {from:#x}: {}", io::Error::last_os_error());
        }
    }

    /// The bytes at `at`, for disassembly.
    pub fn read_code(&self, at: usize, len: usize) -> Vec<u8> {
        assert!(at + len <= self.code_len);
        // SAFETY: in bounds; concurrent patches of aligned words may or may not be seen, both are code.
        unsafe { std::slice::from_raw_parts(self.write.as_ptr().add(at), len).to_vec() }
    }

    fn code_word(&self, at: usize) -> &AtomicU32 {
        assert!(at.is_multiple_of(4) && at + 4 <= self.code_len);
        // SAFETY: aligned and in bounds; patched words are only ever accessed as this atomic (and by
        // instruction fetch, for which aligned 4-byte stores are single-copy atomic on x86).
        unsafe { &*self.write.as_ptr().add(at).cast::<AtomicU32>() }
    }

    /// Reads the patchable word at code offset `at`.
    pub fn patched(&self, at: usize) -> u32 {
        self.code_word(at).load(Ordering::Relaxed)
    }

    /// Stores the patchable word at code offset `at`.
    pub fn patch(&self, at: usize, word: u32) {
        self.code_word(at).store(word, Ordering::Release);
    }

    /// An entry, and whether its page of the host's has had one.
    fn table_word(&self, table: u32, page_offset: u32) -> (&AtomicU32, &AtomicBool) {
        let at = table as usize - self.tables.as_ptr() as usize + (page_offset as usize / self.code_align) * 4;
        assert!(at + 4 <= self.tables_len && page_offset < 4096);
        // SAFETY: aligned and in bounds; entries are only accessed as atomics and by generated code's loads.
        let word = unsafe { &*self.tables.as_ptr().add(at).cast::<AtomicU32>() };
        (word, &self.filled[at / PAGE])
    }

    /// The code offset of the block at `page_offset` of the page with `table`; 0 if none.
    pub fn entry(&self, table: u32, page_offset: u32) -> u32 {
        let (word, filled) = self.table_word(table, page_offset);
        if filled.load(Ordering::Relaxed) { word.load(Ordering::Acquire) } else { 0 }
    }

    /// Publishes (or, with 0, withdraws) a block.
    pub fn set_entry(&self, table: u32, page_offset: u32, code: u32) {
        let (word, filled) = self.table_word(table, page_offset);
        filled.store(true, Ordering::Relaxed);
        word.store(code, Ordering::Release);
    }

    /// Gives all tables' and, from `keep` on, all code's memory back. No thread is in generated code.
    pub fn discard(&self, keep: usize) {
        // SAFETY: the ranges are this mapping's; their contents are forgotten by the only owner.
        let result = unsafe {
            madvise(self.tables.as_ptr().cast(), self.tables_len, Advice::LinuxDontNeed).and_then(|()| {
                let keep = keep.next_multiple_of(4096).min(self.code_len);
                madvise(self.write.as_ptr().add(keep).cast(), self.code_len - keep, Advice::LinuxRemove)
            })
        };
        if let Err(e) = result {
            log::warn!("code cache: memory not returned to the host: {e}");
            return;
        }
        self.filled.iter().for_each(|filled| filled.store(false, Ordering::Relaxed));
    }
}

impl Drop for CodeMapping {
    fn drop(&mut self) {
        // SAFETY: the three mappings are this value's; no vCPU outlives the engine that owns it.
        unsafe {
            let _ = munmap(self.exec.as_ptr().cast(), self.code_len + self.tables_len);
            let _ = munmap(self.write.as_ptr().cast(), self.code_len);
        }
    }
}

/// Finds a free range of `len` bytes below 2 GiB and reserves it.
fn reserve_low(len: usize) -> io::Result<*mut u8> {
    let mut at = LOWEST;
    while at + len <= HIGHEST {
        // SAFETY: NOREPLACE: fails rather than touch anything that is there.
        let got = unsafe {
            mmap_anonymous(
                at as *mut _,
                len,
                ProtFlags::empty(),
                MapFlags::PRIVATE | MapFlags::NORESERVE | MapFlags::FIXED_NOREPLACE,
            )
        };
        match got {
            Ok(p) if p as usize == at => return Ok(p.cast()),
            // An old kernel took the address as a hint.
            // SAFETY: just mapped by us.
            Ok(p) => unsafe { munmap(p, len)? },
            Err(_) => {}
        }
        at += STEP;
    }
    Err(io::Error::new(
        io::ErrorKind::OutOfMemory,
        format!(
            "no {} MiB of address space are free below 2 GiB for translated code: use a smaller tb-size",
            len >> 20
        ),
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn code_is_low_and_dual_mapped() {
        let m = CodeMapping::new(1 << 20, 16, 2).unwrap();
        assert!(m.code_base() + (1 << 20) < 1 << 31);
        m.write_code(64, &[0xc3]);
        // SAFETY: reads one byte of the executable alias.
        assert_eq!(unsafe { *((m.code_base() + 64) as *const u8) }, 0xc3);
        assert_eq!(m.read_code(64, 1), [0xc3]);
    }

    #[test]
    fn tables_have_an_entry_for_each_address() {
        let m = CodeMapping::new(1 << 20, 16, 1).unwrap();
        let (t, next) = (m.table(3), m.table(4));
        m.set_entry(t, 0xfff, 77);
        m.set_entry(t, 0xffe, 78);
        assert_eq!((m.entry(t, 0xffe), m.entry(t, 0xfff), m.entry(next, 0)), (78, 77, 0));
        assert_eq!(m.table_count(), 16);
    }

    #[test]
    fn discarded_tables_are_empty() {
        let m = CodeMapping::new(1 << 20, 16, 2).unwrap();
        let t = m.table(3);
        m.set_entry(t, 0x10, 77);
        assert_eq!(m.entry(t, 0x10), 77);
        m.discard(4096);
        assert_eq!(m.entry(t, 0x10), 0);
        m.set_entry(t, 0x20, 78);
        assert_eq!((m.entry(t, 0x10), m.entry(t, 0x20), m.entry(m.table(4), 0x20)), (0, 78, 0));
    }
}
