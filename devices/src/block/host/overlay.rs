//! Temporary copy-on-write over another disk (`snapshot=on`): writes go to a file without
//! a name, which ends with the program; the disk below is only read.

use super::OpenError;
use super::pool::Pool;
use super::raw::check_range;
use mimus_core::backend::block::SECTOR_SIZE;
use mimus_core::backend::{BlockBackend, BlockBuffer, BlockCompletion, BlockError, BlockOp, BlockRequest};
use mimus_core::device::lock;
use mimus_core::memory::{RamSlice, read_fd_into, write_fd_from};
use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, mpsc};

/// Unit of copying, in bytes.
const CLUSTER: u64 = 64 << 10;
/// Zeros written at a time.
const ZERO_CHUNK: u64 = 1 << 20;
const MAX_THREADS: usize = 4;

/// A disk whose changes are temporary.
pub struct OverlayBlock {
    layers: Arc<Layers>,
    pool: Pool,
}

struct Layers {
    base: Arc<dyn BlockBackend>,
    top: File,
    size: u64,
    /// Which clusters are in `top`, a bit each. Held while a cluster is copied up.
    present: Mutex<Vec<u64>>,
}

/// Bytes of a request that lie in one layer.
struct Run {
    at: u64,
    len: u64,
    top: bool,
}

impl OverlayBlock {
    /// An overlay on `base`, in a file in `$TMPDIR` or `/var/tmp`.
    pub fn new(base: Arc<dyn BlockBackend>) -> Result<Self, OpenError> {
        let dir = std::env::var_os("TMPDIR").map_or_else(|| PathBuf::from("/var/tmp"), PathBuf::from);
        let top = nameless_file(&dir).map_err(|e| OpenError {
            path: base.describe(),
            reason: format!("cannot keep its temporary changes in {}: {e}; set TMPDIR", dir.display()),
        })?;
        let size = base.capacity();
        let words = size.div_ceil(CLUSTER).div_ceil(64) as usize;
        let layers = Layers { base, top, size, present: Mutex::new(vec![0; words]) };
        Ok(Self { layers: Arc::new(layers), pool: Pool::new("worker-snapshot", MAX_THREADS) })
    }
}

fn nameless_file(dir: &std::path::Path) -> io::Result<File> {
    let mut how = OpenOptions::new();
    how.read(true).write(true).mode(0o600);
    if let Ok(file) = how.clone().custom_flags(libc::O_TMPFILE).open(dir) {
        return Ok(file);
    }
    // A file system without O_TMPFILE: a name for a moment.
    let mut number = 0u32;
    loop {
        let path = dir.join(format!("mimus-snapshot-{}-{number}", std::process::id()));
        match how.clone().create_new(true).open(&path) {
            Ok(file) => return std::fs::remove_file(&path).map(|()| file),
            Err(e) if e.kind() == io::ErrorKind::AlreadyExists && number < 1000 => number += 1,
            Err(e) => return Err(e),
        }
    }
}

fn is_present(map: &[u64], cluster: u64) -> bool {
    map.get((cluster / 64) as usize).is_some_and(|w| w >> (cluster % 64) & 1 != 0)
}

fn set_present(map: &mut [u64], cluster: u64) {
    if let Some(word) = map.get_mut((cluster / 64) as usize) {
        *word |= 1 << (cluster % 64);
    }
}

/// Bytes `[at, at+len)` of scattered RAM.
fn part(slices: &[RamSlice], mut at: u64, mut len: u64) -> Vec<RamSlice> {
    let mut out = Vec::new();
    for s in slices {
        let skip = at.min(s.len());
        at -= skip;
        let n = len.min(s.len() - skip);
        if let Some(piece) = s.slice(skip, n).filter(|_| n > 0) {
            out.push(piece);
            len -= n;
        }
    }
    out
}

impl Layers {
    fn run(&self, request: &mut BlockRequest) -> Result<(), BlockError> {
        let at = check_range(request, self.size)?;
        match request.op {
            BlockOp::Read => self.read(at, &mut request.buffer),
            BlockOp::Write => self.write(at, &request.buffer),
            // Nothing here outlives the program, and a discard is a hint.
            BlockOp::Flush | BlockOp::Discard => Ok(()),
            BlockOp::WriteZeroes { .. } => self.write_zeroes(at, request.len),
        }
    }

    /// The request as runs of whole or partial clusters of one layer.
    fn runs(&self, at: u64, len: u64) -> Vec<Run> {
        let map = lock(&self.present);
        let mut out: Vec<Run> = Vec::new();
        let mut done = 0;
        while done < len {
            let here = at + done;
            let n = (CLUSTER - here % CLUSTER).min(len - done);
            let top = is_present(&map, here / CLUSTER);
            match out.last_mut() {
                Some(last) if last.top == top => last.len += n,
                _ => out.push(Run { at: here, len: n, top }),
            }
            done += n;
        }
        out
    }

    fn read(&self, at: u64, buffer: &mut BlockBuffer) -> Result<(), BlockError> {
        for run in self.runs(at, buffer.len()) {
            let (from, len) = (run.at - at, run.len);
            match buffer {
                BlockBuffer::None => {}
                BlockBuffer::Ram(slices) => {
                    let slices = part(slices, from, len);
                    match run.top {
                        true => self.read_top(run.at, &slices)?,
                        false => drop(self.read_base(run.at, BlockBuffer::Ram(slices))?),
                    }
                }
                BlockBuffer::Owned(bytes) => {
                    let bytes = &mut bytes[from as usize..(from + len) as usize];
                    match run.top {
                        true => self.top.read_exact_at(bytes, run.at)?,
                        false => bytes.copy_from_slice(&self.base_bytes(run.at, len)?),
                    }
                }
            }
        }
        Ok(())
    }

    fn read_top(&self, at: u64, slices: &[RamSlice]) -> Result<(), BlockError> {
        let want: u64 = slices.iter().map(RamSlice::len).sum();
        let got = read_fd_into(self.top.as_fd(), at, slices)?;
        if got == want { Ok(()) } else { Err(io::Error::from(io::ErrorKind::UnexpectedEof).into()) }
    }

    /// Reads the disk below and waits: this is a worker's thread.
    fn read_base(&self, at: u64, buffer: BlockBuffer) -> Result<BlockBuffer, BlockError> {
        let (tx, rx) = mpsc::channel();
        let request = BlockRequest::transfer(BlockOp::Read, at / SECTOR_SIZE, buffer);
        let done = move |result: Result<(), BlockError>, buffer| drop(tx.send(result.map(|()| buffer)));
        self.base.submit(request, Box::new(done));
        rx.recv().unwrap_or_else(|_| Err(BlockError::Io("the request was lost".to_owned())))
    }

    fn base_bytes(&self, at: u64, len: u64) -> Result<Vec<u8>, BlockError> {
        match self.read_base(at, BlockBuffer::Owned(vec![0; len as usize]))? {
            BlockBuffer::Owned(bytes) if bytes.len() as u64 == len => Ok(bytes),
            _ => Err(BlockError::Io("the disk below lost its buffer".to_owned())),
        }
    }

    /// Brings up the clusters that `[at, at+len)` covers in part: the first and the last.
    fn copy_up(&self, at: u64, len: u64) -> Result<(), BlockError> {
        let end = at + len;
        let mut map = lock(&self.present);
        for cluster in [at / CLUSTER, (end - 1) / CLUSTER] {
            let start = cluster * CLUSTER;
            let stop = (start + CLUSTER).min(self.size);
            if is_present(&map, cluster) || at <= start && stop <= end {
                continue;
            }
            let bytes = self.base_bytes(start, stop - start)?;
            self.top.write_all_at(&bytes, start)?;
            set_present(&mut map, cluster);
        }
        Ok(())
    }

    /// Writes by `put`, which writes `[at, at+len)` of the top layer.
    fn write_with(&self, at: u64, len: u64, put: impl FnOnce() -> Result<(), BlockError>) -> Result<(), BlockError> {
        if len == 0 {
            return Ok(());
        }
        self.copy_up(at, len)?;
        put()?;
        let mut map = lock(&self.present);
        (at / CLUSTER..=(at + len - 1) / CLUSTER).for_each(|c| set_present(&mut map, c));
        Ok(())
    }

    fn write(&self, at: u64, buffer: &BlockBuffer) -> Result<(), BlockError> {
        self.write_with(at, buffer.len(), || match buffer {
            BlockBuffer::None => Ok(()),
            BlockBuffer::Owned(bytes) => Ok(self.top.write_all_at(bytes, at)?),
            BlockBuffer::Ram(slices) => match write_fd_from(self.top.as_fd(), at, slices)? {
                n if n == buffer.len() => Ok(()),
                _ => Err(BlockError::NoSpace),
            },
        })
    }

    fn write_zeroes(&self, at: u64, len: u64) -> Result<(), BlockError> {
        self.write_with(at, len, || {
            let zeros = vec![0; len.min(ZERO_CHUNK) as usize];
            let mut done = 0;
            while done < len {
                let n = (len - done).min(ZERO_CHUNK);
                self.top.write_all_at(&zeros[..n as usize], at + done)?;
                done += n;
            }
            Ok(())
        })
    }
}

impl BlockBackend for OverlayBlock {
    fn submit(&self, mut request: BlockRequest, done: BlockCompletion) {
        let layers = self.layers.clone();
        self.pool.run(move || {
            let result = layers.run(&mut request);
            done(result, request.buffer);
        });
    }

    fn capacity(&self) -> u64 {
        self.layers.size
    }

    fn read_only(&self) -> bool {
        false
    }

    fn block_size(&self) -> u32 {
        self.layers.base.block_size()
    }

    fn drain(&self) {
        self.pool.drain();
    }

    fn describe(&self) -> String {
        format!("{}, changes are temporary", self.layers.base.describe())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::block::host::{RawBlock, RawOptions};
    use mimus_core::memory::{GuestRam, RamBacking};

    fn run(disk: &dyn BlockBackend, request: BlockRequest) -> BlockBuffer {
        let (tx, rx) = mpsc::channel();
        disk.submit(request, Box::new(move |r, b| tx.send((r, b)).unwrap()));
        let (result, buffer) = rx.recv().unwrap();
        assert_eq!(result, Ok(()));
        buffer
    }

    #[test]
    fn behaves_like_a_disk_and_leaves_the_image_alone() {
        const LEN: usize = 5 * CLUSTER as usize + 3 * 512;
        let file = tempfile::NamedTempFile::new().unwrap();
        let mut model: Vec<u8> = (0..LEN).map(|i| (i / 512) as u8).collect();
        std::fs::write(file.path(), &model).unwrap();
        let original = model.clone();
        let base = RawBlock::open(file.path(), RawOptions { read_only: true, ..RawOptions::default() }).unwrap();
        let disk = OverlayBlock::new(Arc::new(base)).unwrap();
        let block = GuestRam::new().add_block("ram", 1 << 20, RamBacking::Private).unwrap();
        let slice = |at, len| RamSlice::new(block.clone(), at, len).unwrap();
        let mut seed = 12345u64;
        let mut random = move |n: u64| {
            seed = seed.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            (seed >> 33) % n
        };
        for round in 0..200u8 {
            let sector = random(LEN as u64 / 512);
            let count = 1 + random((LEN as u64 / 512 - sector).min(300));
            let (at, len) = ((sector * 512) as usize, (count * 512) as usize);
            match random(4) {
                0 => {
                    run(&disk, BlockRequest::transfer(BlockOp::Write, sector, BlockBuffer::Owned(vec![round; len])));
                    model[at..at + len].fill(round);
                }
                1 => {
                    let op = BlockOp::WriteZeroes { unmap: true };
                    run(&disk, BlockRequest { op, sector, len: len as u64, buffer: BlockBuffer::None });
                    model[at..at + len].fill(0);
                }
                2 => {
                    let first = random(len as u64);
                    let buffer = BlockBuffer::Ram(vec![slice(7, first), slice(500_000, len as u64 - first)]);
                    run(&disk, BlockRequest::transfer(BlockOp::Read, sector, buffer));
                    let mut got = vec![0; len];
                    assert!(
                        block.read(7, &mut got[..first as usize]) && block.read(500_000, &mut got[first as usize..])
                    );
                    assert!(got == model[at..at + len], "round {round}");
                }
                _ => {
                    assert!(block.fill(0, 1 << 20, round ^ 0x80));
                    let buffer = BlockBuffer::Ram(vec![slice(100, len as u64)]);
                    run(&disk, BlockRequest::transfer(BlockOp::Write, sector, buffer));
                    model[at..at + len].fill(round ^ 0x80);
                }
            }
        }
        let all = run(&disk, BlockRequest::transfer(BlockOp::Read, 0, BlockBuffer::Owned(vec![0; LEN])));
        assert!(matches!(all, BlockBuffer::Owned(bytes) if bytes == model));
        assert!(std::fs::read(file.path()).unwrap() == original);
    }
}
