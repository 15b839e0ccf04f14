// UNSAFE: asks the kernel to give, lock and prepare memory.
//! Where guest RAM's host memory comes from: anonymous memory, a memfd, a file; in huge pages or not; locked; taken at
//! once or when it is touched.
#![allow(unsafe_code)]

use super::guest_ram::{PAGE_SIZE, RamError};
use memmap2::{Advice, MmapOptions, MmapRaw};
use rustix::fs::MemfdFlags;
use std::fs::{File, OpenOptions};
use std::io;
use std::path::{Path, PathBuf};

/// How the host memory of a block is had.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RamOptions {
    /// Where from.
    pub source: RamSource,
    /// Other mappings of the same file or memfd see what the guest writes. Anonymous memory becomes a memfd.
    pub share: bool,
    /// All of it is taken from the host when the block is made.
    pub prealloc: bool,
}

/// Where host memory comes from.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum RamSource {
    /// Anonymous memory.
    #[default]
    Anonymous,
    /// A memfd: in huge pages of this many bytes from the host's pool; 0: of the host's default size.
    Memfd { huge: Option<u64> },
    /// A file, made if it is not there and with its contents kept if it is; or a directory, in which a file without a
    /// name is made (such as `/dev/hugepages`).
    File(PathBuf),
}

/// Whether blocks stay in memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum RamLock {
    /// The host may swap them out.
    #[default]
    Off,
    /// They are taken at once and never swapped out.
    Now,
    /// What was touched is never swapped out.
    OnFault,
}

/// How pages are given back to the host so that they read as zero.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Discard {
    /// Private memory with zeros below it.
    DontNeed,
    /// A hole in the file.
    Remove,
    /// Not at all: below it are the contents of a file.
    Never,
}

/// Mapped host memory.
pub(super) struct Mapping {
    pub(super) map: MmapRaw,
    pub(super) file: Option<File>,
    pub(super) discard: Discard,
}

/// What is known of a block before it is mapped.
pub(super) struct Wanted<'a> {
    pub(super) name: &'a str,
    pub(super) size: usize,
    pub(super) options: &'a RamOptions,
    pub(super) lock: RamLock,
}

impl Wanted<'_> {
    fn len(&self) -> u64 {
        self.size as u64
    }

    fn failed(&self, source: impl Into<io::Error>) -> RamError {
        RamError::Map { name: self.name.to_owned(), len: self.len(), source: source.into() }
    }

    fn file_failed(&self, path: &Path, source: impl Into<io::Error>) -> RamError {
        RamError::File { name: self.name.to_owned(), path: path.to_owned(), source: source.into() }
    }

    /// Maps it.
    pub(super) fn map(&self) -> Result<Mapping, RamError> {
        let mapping = match &self.options.source {
            RamSource::Anonymous if !self.options.share => self.anonymous()?,
            RamSource::Anonymous => self.memfd(None)?,
            RamSource::Memfd { huge } => self.memfd(*huge)?,
            RamSource::File(path) => self.file(path)?,
        };
        // Transparent huge pages are a wish; a host without them still works.
        let _ = mapping.map.advise(Advice::HugePage);
        self.lock(&mapping.map)?;
        if self.options.prealloc {
            self.populate(&mapping.map)?;
        }
        Ok(mapping)
    }

    fn anonymous(&self) -> Result<Mapping, RamError> {
        let map = MmapOptions::new().len(self.size).no_reserve_swap().map_anon().map_err(|e| self.failed(e))?;
        Ok(Mapping { map: map.into(), file: None, discard: Discard::DontNeed })
    }

    fn memfd(&self, huge: Option<u64>) -> Result<Mapping, RamError> {
        let mut flags = MemfdFlags::CLOEXEC;
        if let Some(bytes) = huge {
            flags |= MemfdFlags::HUGETLB;
            flags |= match bytes {
                0 => MemfdFlags::empty(),
                b if b == 2 << 20 => MemfdFlags::HUGE_2MB,
                b if b == 1 << 30 => MemfdFlags::HUGE_1GB,
                b => return Err(RamError::NoHugePages { name: self.name.to_owned(), page: b }),
            };
        }
        let fd = rustix::fs::memfd_create(self.name, flags).map_err(|e| match huge {
            Some(page) => RamError::NoHugePages { name: self.name.to_owned(), page },
            None => self.failed(e),
        })?;
        let file = File::from(fd);
        let page = huge.map(|_| page_size_of(&file));
        self.fits(page)?;
        file.set_len(self.len()).map_err(|e| self.failed(e))?;
        let map = self.map_file(&file, self.options.share, page)?;
        // Nobody else has the memfd: a private mapping of it has zeros below.
        let discard = if self.options.share { Discard::Remove } else { Discard::DontNeed };
        Ok(Mapping { map, file: self.options.share.then_some(file), discard })
    }

    fn file(&self, path: &Path) -> Result<Mapping, RamError> {
        let failed = |e: io::Error| self.file_failed(path, e);
        let unnamed = path.is_dir();
        let file = match unnamed {
            true => unnamed_file(path).map_err(failed)?,
            false => {
                OpenOptions::new().read(true).write(true).create(true).truncate(false).open(path).map_err(failed)?
            }
        };
        let size = page_size_of(&file);
        let page = (size > PAGE_SIZE).then_some(size);
        self.fits(page)?;
        let there = file.metadata().map_err(failed)?.len();
        if there < self.len() {
            file.set_len(self.len()).map_err(failed)?;
        }
        let map = self.map_file(&file, self.options.share, page)?;
        let discard = match (self.options.share, unnamed) {
            (true, _) => Discard::Remove,
            (false, true) => Discard::DontNeed,
            (false, false) => Discard::Never,
        };
        Ok(Mapping { map, file: self.options.share.then_some(file), discard })
    }

    /// Huge pages are given out whole.
    fn fits(&self, page: Option<u64>) -> Result<(), RamError> {
        match page {
            Some(page) if !self.len().is_multiple_of(page) => {
                Err(RamError::NotWholePages { name: self.name.to_owned(), len_mib: self.len() >> 20, page })
            }
            _ => Ok(()),
        }
    }

    fn map_file(&self, file: &File, share: bool, huge: Option<u64>) -> Result<MmapRaw, RamError> {
        let mut options = MmapOptions::new();
        options.len(self.size);
        // Huge pages are reserved here and now: else the guest would end when the pool is empty.
        if huge.is_none() {
            options.no_reserve_swap();
        }
        let mapped = match share {
            true => options.map_raw(file),
            // SAFETY: the mapping is private, and becomes raw at once: no reference to its bytes is formed, and
            // what the file's other users do to it is no different from what the guest does.
            false => unsafe { options.map_copy(file) }.map(MmapRaw::from),
        };
        mapped.map_err(|e| match huge.filter(|_| e.raw_os_error() == Some(libc::ENOMEM)) {
            Some(page) => RamError::PoolEmpty { name: self.name.to_owned(), page, pages: self.len().div_ceil(page) },
            None => self.failed(e),
        })
    }

    fn lock(&self, map: &MmapRaw) -> Result<(), RamError> {
        let locked = match self.lock {
            RamLock::Off => return Ok(()),
            RamLock::Now => map.lock(),
            RamLock::OnFault => {
                // SAFETY: the range is that of our mapping; its contents do not change.
                let done = unsafe { libc::mlock2(map.as_ptr().cast(), self.size, libc::MLOCK_ONFAULT) };
                if done == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
            }
        };
        locked.map_err(|source| RamError::Lock { name: self.name.to_owned(), len_mib: self.len() >> 20, source })
    }

    fn populate(&self, map: &MmapRaw) -> Result<(), RamError> {
        // SAFETY: the range is that of our mapping; its contents do not change.
        let done = unsafe { libc::madvise(map.as_mut_ptr().cast(), self.size, libc::MADV_POPULATE_WRITE) };
        if done == 0 {
            return Ok(());
        }
        let source = io::Error::last_os_error();
        // Before Linux 5.14: every page is touched, which may end us where the call above would have failed.
        if source.raw_os_error() == Some(libc::EINVAL) {
            for at in (0..self.size).step_by(PAGE_SIZE as usize) {
                // SAFETY: inside our mapping, which nobody else uses yet; the byte stays as it is.
                unsafe {
                    let byte = map.as_mut_ptr().add(at);
                    byte.write_volatile(byte.read_volatile());
                }
            }
            return Ok(());
        }
        Err(RamError::Prealloc { name: self.name.to_owned(), len_mib: self.len() >> 20, source })
    }
}

/// Bytes of a page of the file system that a file is on: 2 MiB or more on hugetlbfs.
fn page_size_of(file: &File) -> u64 {
    const HUGETLBFS_MAGIC: rustix::fs::FsWord = 0x9584_58f6;
    match rustix::fs::fstatfs(file) {
        Ok(s) if s.f_type == HUGETLBFS_MAGIC => s.f_bsize as u64,
        _ => PAGE_SIZE,
    }
}

/// A file in a directory that has no name any more.
fn unnamed_file(dir: &Path) -> io::Result<File> {
    for attempt in 0..100u32 {
        let path = dir.join(format!(".mimus-ram-{}-{attempt}", std::process::id()));
        match OpenOptions::new().read(true).write(true).create_new(true).open(&path) {
            Ok(file) => return std::fs::remove_file(&path).map(|()| file),
            Err(e) if e.kind() == io::ErrorKind::AlreadyExists => {}
            Err(e) => return Err(e),
        }
    }
    Err(io::ErrorKind::AlreadyExists.into())
}
