//! Disks: requests in, completions out, in any order.

use crate::memory::RamSlice;
use std::sync::Arc;

/// Bytes per sector of a request, whatever the disk's own block size is.
pub const SECTOR_SIZE: u64 = 512;

/// What a request does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum BlockOp {
    /// Disk to buffer.
    Read,
    /// Buffer to disk.
    Write,
    /// Everything completed before is on stable storage.
    Flush,
    /// The range's contents are no longer needed. A hint.
    Discard,
    /// The range reads as zero from now on.
    WriteZeroes {
        /// The range may be deallocated.
        unmap: bool,
    },
}

/// Where data comes from or goes to.
#[derive(Clone, Debug)]
pub enum BlockBuffer {
    /// No data: flush, discard, write-zeroes.
    None,
    /// Guest RAM, scattered.
    Ram(Vec<RamSlice>),
    /// A buffer of the device; handed back with the completion.
    Owned(Vec<u8>),
}

impl BlockBuffer {
    /// Length in bytes.
    pub fn len(&self) -> u64 {
        match self {
            Self::None => 0,
            Self::Ram(slices) => slices.iter().map(RamSlice::len).sum(),
            Self::Owned(bytes) => bytes.len() as u64,
        }
    }

    /// True if there are no bytes.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// One request. The submitter has checked range, alignment and rights against
/// [`BlockBackend`]'s answers; a backend checks again and fails, never panics.
#[derive(Clone, Debug)]
pub struct BlockRequest {
    /// What to do.
    pub op: BlockOp,
    /// First sector of [`SECTOR_SIZE`] bytes.
    pub sector: u64,
    /// Length in bytes of a discard or write-zeroes; of the buffer otherwise.
    pub len: u64,
    /// The data.
    pub buffer: BlockBuffer,
}

impl BlockRequest {
    /// A read into or a write from `buffer`.
    pub fn transfer(op: BlockOp, sector: u64, buffer: BlockBuffer) -> Self {
        Self { op, sector, len: buffer.len(), buffer }
    }

    /// A flush.
    pub fn flush() -> Self {
        Self { op: BlockOp::Flush, sector: 0, len: 0, buffer: BlockBuffer::None }
    }
}

/// Why a request failed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum BlockError {
    /// Beyond the end of the disk, or not whole sectors.
    #[error("sectors {sector} to {end} are not on the disk")]
    OutOfRange { sector: u64, end: u64 },
    /// The disk is read-only.
    #[error("the disk is read-only")]
    ReadOnly,
    /// The backend does not do this.
    #[error("the disk does not support this request")]
    Unsupported,
    /// The image cannot take more data: the host is full.
    #[error("no space left on the host")]
    NoSpace,
    /// The host failed.
    #[error("I/O error: {0}")]
    Io(String),
}

impl From<std::io::Error> for BlockError {
    fn from(e: std::io::Error) -> Self {
        match e.kind() {
            std::io::ErrorKind::StorageFull => Self::NoSpace,
            _ => Self::Io(e.to_string()),
        }
    }
}

/// Called once, on any thread, with no lock of the backend held; gives the buffer back.
pub type BlockCompletion = Box<dyn FnOnce(Result<(), BlockError>, BlockBuffer) + Send>;

/// A disk of the host.
pub trait BlockBackend: Send + Sync {
    /// Starts a request. Never blocks; `done` may be called before this returns.
    fn submit(&self, request: BlockRequest, done: BlockCompletion);

    /// Size in bytes, whole sectors. May grow.
    fn capacity(&self) -> u64;

    /// Writes fail.
    fn read_only(&self) -> bool;

    /// The guest-visible logical block size in bytes.
    fn block_size(&self) -> u32 {
        512
    }

    /// Discard does something.
    fn can_discard(&self) -> bool {
        false
    }

    /// Write-zeroes is cheaper than writing zeros.
    fn can_write_zeroes(&self) -> bool {
        false
    }

    /// Completed writes may be lost with the host's power until a flush.
    fn write_cache(&self) -> bool {
        true
    }

    /// Called on any thread when the size changes. Replaces an earlier one.
    fn set_resize_listener(&self, _listener: Arc<dyn Fn(u64) + Send + Sync>) {}

    /// Waits until nothing is in flight. Not on a vCPU or I/O thread.
    fn drain(&self) {}

    /// One line for the monitor: file and format.
    fn describe(&self) -> String {
        "block backend".to_owned()
    }
}
