//! Raw image files and host disks.
//!
//! Data go straight between guest RAM and the file by `preadv` and `pwritev` on the
//! threads of a [`Pool`]. A file whose length is not whole sectors is rounded up; what
//! is beyond its end reads as zeros.

use super::OpenError;
use super::pool::Pool;
use mimus_core::backend::block::SECTOR_SIZE;
use mimus_core::backend::{BlockBackend, BlockBuffer, BlockCompletion, BlockError, BlockOp, BlockRequest};
use mimus_core::memory::{RamSlice, read_fd_into, write_fd_from};
use rustix::fs::{FallocateFlags, fallocate};
use std::fs::{File, OpenOptions, TryLockError};
use std::io::{self, ErrorKind, Seek, SeekFrom};
use std::os::fd::AsFd;
use std::os::unix::fs::{FileExt, FileTypeExt, OpenOptionsExt};
use std::path::Path;
use std::sync::Arc;

/// Most threads per disk.
const MAX_THREADS: usize = 8;
/// Zeros written at a time where the host cannot write zeros itself.
const ZERO_CHUNK: u64 = 1 << 20;

/// How to open an image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RawOptions {
    /// Never write; other processes may read it too.
    pub read_only: bool,
    /// Discards free space on the host.
    pub discard: bool,
    /// Take a lock that keeps other processes away.
    pub lock: bool,
    /// Each write reaches the disk before it completes (`cache=writethrough`).
    pub sync: bool,
}

impl Default for RawOptions {
    fn default() -> Self {
        Self { read_only: false, discard: true, lock: true, sync: false }
    }
}

/// A raw image file or host disk.
pub struct RawBlock {
    image: Arc<Image>,
    pool: Pool,
}

struct Image {
    file: File,
    path: String,
    /// Bytes, whole sectors.
    size: u64,
    options: RawOptions,
}

impl RawBlock {
    /// Opens `path`.
    pub fn open(path: &Path, options: RawOptions) -> Result<Self, OpenError> {
        let fail = |reason: String| OpenError { path: path.display().to_string(), reason };
        // Without O_NONBLOCK, opening a FIFO would wait for its other end.
        let mut how = OpenOptions::new();
        let how = how
            .read(true)
            .write(!options.read_only)
            .custom_flags(libc::O_NONBLOCK | if options.sync { libc::O_DSYNC } else { 0 });
        let file = how.open(path);
        let mut file = file.map_err(|e| fail(open_reason(&e, options)))?;
        let kind = file.metadata().map_err(|e| fail(e.to_string()))?.file_type();
        if kind.is_dir() {
            return Err(fail("it is a directory; name an image file".to_owned()));
        }
        if !kind.is_file() && !kind.is_block_device() {
            return Err(fail("it is neither a file nor a disk".to_owned()));
        }
        if options.lock {
            take_lock(&file, options.read_only).map_err(fail)?;
        }
        let len = file.seek(SeekFrom::End(0)).map_err(|e| fail(format!("cannot tell its size: {e}")))?;
        let size = len.checked_next_multiple_of(SECTOR_SIZE).filter(|&s| s <= i64::MAX as u64);
        let size = size.ok_or_else(|| fail("it is too large".to_owned()))?;
        let image = Arc::new(Image { file, path: path.display().to_string(), size, options });
        Ok(Self { image, pool: Pool::new("worker-disk", MAX_THREADS) })
    }
}

fn open_reason(e: &io::Error, options: RawOptions) -> String {
    match e.kind() {
        ErrorKind::NotFound => "there is no such file; check the path or create the image".to_owned(),
        ErrorKind::IsADirectory => "it is a directory; name an image file".to_owned(),
        ErrorKind::PermissionDenied | ErrorKind::ReadOnlyFilesystem if !options.read_only => {
            format!("cannot be opened for writing ({e}); change its permissions or add readonly=on")
        }
        _ => format!("cannot be opened: {e}"),
    }
}

/// Keeps writers out, and readers too if we write. `Err` is the reason.
fn take_lock(file: &File, read_only: bool) -> Result<(), String> {
    let locked = if read_only { file.try_lock_shared() } else { file.try_lock() };
    match locked {
        Ok(()) => Ok(()),
        Err(TryLockError::WouldBlock) if read_only => Err("another process is writing to it".to_owned()),
        Err(TryLockError::WouldBlock) => {
            Err("it is in use by another process; stop that one, or use a copy or readonly=on in both".to_owned())
        }
        // A file system without locks is no reason not to run.
        Err(TryLockError::Error(e)) => {
            log::debug!("cannot lock a disk image: {e}");
            Ok(())
        }
    }
}

/// The byte a request starts at, if it is whole sectors inside a disk of `size` bytes.
pub(super) fn check_range(r: &BlockRequest, size: u64) -> Result<u64, BlockError> {
    let len = match r.op {
        BlockOp::Read | BlockOp::Write => r.buffer.len(),
        BlockOp::Flush => 0,
        BlockOp::Discard | BlockOp::WriteZeroes { .. } => r.len,
    };
    let start = r.sector.checked_mul(SECTOR_SIZE);
    let end = start.and_then(|s| s.checked_add(len));
    let end_sector = r.sector.saturating_add(len.div_ceil(SECTOR_SIZE));
    match (start, end) {
        (Some(start), Some(end)) if end <= size && len % SECTOR_SIZE == 0 => Ok(start),
        _ => Err(BlockError::OutOfRange { sector: r.sector, end: end_sector }),
    }
}

impl Image {
    fn run(&self, request: &mut BlockRequest) -> Result<(), BlockError> {
        let at = check_range(request, self.size)?;
        if self.options.read_only && !matches!(request.op, BlockOp::Read | BlockOp::Flush) {
            return Err(BlockError::ReadOnly);
        }
        let len = request.len;
        match request.op {
            BlockOp::Read => Ok(self.read(at, &mut request.buffer)?),
            BlockOp::Write => Ok(self.write(at, &request.buffer)?),
            BlockOp::Flush if self.options.read_only => Ok(()),
            BlockOp::Flush => Ok(self.file.sync_data()?),
            BlockOp::Discard => Ok(self.discard(at, len)?),
            BlockOp::WriteZeroes { unmap } => Ok(self.write_zeroes(at, len, unmap)?),
        }
    }

    fn read(&self, at: u64, buffer: &mut BlockBuffer) -> io::Result<()> {
        match buffer {
            BlockBuffer::None => Ok(()),
            BlockBuffer::Ram(slices) => {
                let n = read_fd_into(self.file.as_fd(), at, slices)?;
                zero_from(slices, n);
                Ok(())
            }
            BlockBuffer::Owned(bytes) => {
                let mut done = 0;
                while done < bytes.len() {
                    match self.file.read_at(&mut bytes[done..], at + done as u64) {
                        Ok(0) => {
                            bytes[done..].fill(0);
                            break;
                        }
                        Ok(n) => done += n,
                        Err(e) if e.kind() == ErrorKind::Interrupted => {}
                        Err(e) => return Err(e),
                    }
                }
                Ok(())
            }
        }
    }

    fn write(&self, at: u64, buffer: &BlockBuffer) -> io::Result<()> {
        match buffer {
            BlockBuffer::None => Ok(()),
            BlockBuffer::Ram(slices) => {
                let n = write_fd_from(self.file.as_fd(), at, slices)?;
                if n == buffer.len() { Ok(()) } else { Err(ErrorKind::WriteZero.into()) }
            }
            BlockBuffer::Owned(bytes) => self.file.write_all_at(bytes, at),
        }
    }

    fn discard(&self, at: u64, len: u64) -> io::Result<()> {
        if !self.options.discard {
            return Ok(());
        }
        let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        match fallocate(&self.file, flags, at, len) {
            // A discard is a hint: a host that cannot is no error.
            Err(rustix::io::Errno::OPNOTSUPP | rustix::io::Errno::NOSYS) => Ok(()),
            other => Ok(other?),
        }
    }

    fn write_zeroes(&self, at: u64, len: u64, unmap: bool) -> io::Result<()> {
        let how = match unmap && self.options.discard {
            true => FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE,
            false => FallocateFlags::ZERO_RANGE | FallocateFlags::KEEP_SIZE,
        };
        if fallocate(&self.file, how, at, len).is_ok() {
            return Ok(());
        }
        let zeros = vec![0; len.min(ZERO_CHUNK) as usize];
        let mut done = 0;
        while done < len {
            let n = (len - done).min(ZERO_CHUNK);
            self.file.write_all_at(&zeros[..n as usize], at + done)?;
            done += n;
        }
        Ok(())
    }
}

/// Zeros what a read past the end of the file did not fill.
fn zero_from(slices: &[RamSlice], mut filled: u64) {
    for s in slices {
        let skip = filled.min(s.len());
        filled -= skip;
        if let Some(rest) = s.slice(skip, s.len() - skip).filter(|r| !r.is_empty()) {
            rest.fill(0);
        }
    }
}

impl BlockBackend for RawBlock {
    fn submit(&self, mut request: BlockRequest, done: BlockCompletion) {
        let image = self.image.clone();
        self.pool.run(move || {
            let result = image.run(&mut request);
            done(result, request.buffer);
        });
    }

    fn capacity(&self) -> u64 {
        self.image.size
    }

    fn read_only(&self) -> bool {
        self.image.options.read_only
    }

    fn can_discard(&self) -> bool {
        self.image.options.discard && !self.read_only()
    }

    fn can_write_zeroes(&self) -> bool {
        !self.read_only()
    }

    fn drain(&self) {
        self.pool.drain();
    }

    fn describe(&self) -> String {
        format!("{} (raw)", self.image.path)
    }
}

#[cfg(test)]
#[path = "raw_tests.rs"]
mod tests;
