//! One chain of buffers taken from a virtqueue: a readable part, then a writable part.

use super::queue::QueueError;
use mimus_core::bus::{BusFault, GuestPhys};
use mimus_core::memory::{DmaHandle, RamSlice};

/// One buffer in guest memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segment {
    /// First byte.
    pub addr: GuestPhys,
    /// Length in bytes, never 0 in a [`Chain`].
    pub len: u32,
}

/// Buffers one after another, seen as one range of bytes.
#[derive(Clone, Debug, Default)]
pub struct Buffers {
    segments: Vec<Segment>,
    len: u64,
}

impl Buffers {
    /// Total length in bytes.
    pub fn len(&self) -> u64 {
        self.len
    }

    /// True if there are no bytes.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The buffers, in order.
    pub fn segments(&self) -> &[Segment] {
        &self.segments
    }

    fn push(&mut self, segment: Segment) -> Result<(), QueueError> {
        // The address range must not wrap, so that all sums below are safe.
        segment.addr.checked_add(segment.len.into()).ok_or(QueueError::Length)?;
        self.len += u64::from(segment.len);
        if segment.len > 0 {
            self.segments.push(segment);
        }
        if self.len > u64::from(u32::MAX) { Err(QueueError::Length) } else { Ok(()) }
    }

    /// The pieces of bytes `[at, at+len)`, clipped to what there is.
    fn pieces(&self, at: u64, len: u64) -> impl Iterator<Item = Segment> + '_ {
        let end = at.saturating_add(len).min(self.len);
        let mut start = 0;
        self.segments.iter().filter_map(move |s| {
            let (first, last) = (start, start + u64::from(s.len));
            start = last;
            let (from, to) = (first.max(at), last.min(end));
            let addr = GuestPhys(s.addr.0 + from.saturating_sub(first));
            (from < to).then(|| Segment { addr, len: (to - from) as u32 })
        })
    }

    /// Copies out from byte `at`; returns how many bytes there were.
    pub fn read(&self, dma: &DmaHandle, at: u64, buf: &mut [u8]) -> Result<usize, BusFault> {
        let mut done = 0;
        for piece in self.pieces(at, buf.len() as u64) {
            let n = piece.len as usize;
            dma.read(piece.addr, &mut buf[done..done + n])?;
            done += n;
        }
        Ok(done)
    }

    /// Copies in at byte `at`; returns how many bytes had room.
    pub fn write(&self, dma: &DmaHandle, at: u64, data: &[u8]) -> Result<usize, BusFault> {
        let mut done = 0;
        for piece in self.pieces(at, data.len() as u64) {
            let n = piece.len as usize;
            dma.write(piece.addr, &data[done..done + n])?;
            done += n;
        }
        Ok(done)
    }

    /// Copies out exactly `N` bytes from byte `at`; `None` if there are fewer.
    pub fn read_array<const N: usize>(&self, dma: &DmaHandle, at: u64) -> Result<Option<[u8; N]>, BusFault> {
        let mut buf = [0; N];
        Ok((self.read(dma, at, &mut buf)? == N).then_some(buf))
    }

    /// Copies all out. `None` if that is more than `limit` bytes.
    pub fn read_all(&self, dma: &DmaHandle, limit: usize) -> Result<Option<Vec<u8>>, BusFault> {
        if self.len > limit as u64 {
            return Ok(None);
        }
        let mut data = vec![0; self.len as usize];
        self.read(dma, 0, &mut data)?;
        Ok(Some(data))
    }

    /// The RAM behind bytes `[at, at+len)`, for host I/O without a copy. `write` asks for
    /// memory that may be written.
    pub fn ram_slices(&self, dma: &DmaHandle, at: u64, len: u64, write: bool) -> Result<Vec<RamSlice>, BusFault> {
        let mut out = Vec::with_capacity(self.segments.len());
        for piece in self.pieces(at, len) {
            out.append(&mut dma.ram_slices(piece.addr, piece.len.into(), write)?);
        }
        Ok(out)
    }
}

/// One chain. Must be given back to its queue by a push or an undone pop.
#[derive(Clone, Debug)]
pub struct Chain {
    head: u16,
    epoch: u32,
    /// What the driver sends.
    pub readable: Buffers,
    /// Where the device answers.
    pub writable: Buffers,
}

impl Chain {
    pub(super) fn new(head: u16, epoch: u32) -> Self {
        Self { head, epoch, readable: Buffers::default(), writable: Buffers::default() }
    }

    /// Number of the first descriptor: the chain's name in the used ring.
    pub fn head(&self) -> u16 {
        self.head
    }

    pub(super) fn epoch(&self) -> u32 {
        self.epoch
    }

    pub(super) fn add(&mut self, segment: Segment, write: bool) -> Result<(), QueueError> {
        match write {
            true => self.writable.push(segment),
            // §2.7.4.2: readable ones come first.
            false if !self.writable.is_empty() => Err(QueueError::Order),
            false => self.readable.push(segment),
        }
    }
}
