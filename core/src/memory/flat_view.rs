//! A rendered, immutable memory map: sorted ranges without overlap.

use super::guest_ram::RamBlock;
use crate::bus::{GuestPhys, IoBinding};
use std::sync::Arc;

/// What a range of addresses leads to.
#[derive(Clone, Debug)]
pub enum FlatKind {
    /// RAM, or ROM if `readonly` (writes are ignored).
    Ram {
        /// The block.
        block: Arc<RamBlock>,
        /// Offset of the range's first byte in the block.
        offset: u64,
        /// Writes are ignored.
        readonly: bool,
    },
    /// Flash and the like: reads come from RAM, writes go to the device.
    RomDevice {
        /// The block reads come from.
        block: Arc<RamBlock>,
        /// Offset of the range's first byte in the block and in the device's region.
        offset: u64,
        /// Where writes go.
        binding: Arc<IoBinding>,
    },
    /// A device.
    Mmio {
        /// The device's region.
        binding: Arc<IoBinding>,
        /// Offset of the range's first byte in the region.
        offset: u64,
    },
}

impl FlatKind {
    /// The same thing `by` bytes further on.
    fn advanced(&self, by: u64) -> Self {
        let mut kind = self.clone();
        match &mut kind {
            Self::Ram { offset, .. } | Self::RomDevice { offset, .. } | Self::Mmio { offset, .. } => {
                *offset += by;
            }
        }
        kind
    }

    /// True if `other` continues `self` after `len` bytes.
    fn continues(&self, len: u64, other: &Self) -> bool {
        self.advanced(len).same(other)
    }

    fn same(&self, other: &Self) -> bool {
        match (self, other) {
            (Self::Ram { block, offset, readonly }, Self::Ram { block: b, offset: o, readonly: r }) => {
                Arc::ptr_eq(block, b) && offset == o && readonly == r
            }
            (Self::RomDevice { block, offset, binding }, Self::RomDevice { block: b, offset: o, binding: d }) => {
                Arc::ptr_eq(block, b) && offset == o && Arc::ptr_eq(binding, d)
            }
            (Self::Mmio { binding, offset }, Self::Mmio { binding: d, offset: o }) => {
                Arc::ptr_eq(binding, d) && offset == o
            }
            _ => false,
        }
    }
}

/// A range of guest physical addresses and what it leads to.
#[derive(Clone, Debug)]
pub struct FlatRange {
    /// First address.
    pub base: GuestPhys,
    /// Length in bytes, never 0; `base + len` does not overflow.
    pub len: u64,
    /// What is there.
    pub kind: FlatKind,
}

impl FlatRange {
    /// One past the last address.
    pub fn end(&self) -> u64 {
        self.base.0 + self.len
    }

    /// True if `addr` is inside.
    pub fn contains(&self, addr: GuestPhys) -> bool {
        addr.0.wrapping_sub(self.base.0) < self.len
    }

    /// The block and the offset in it of `addr`, for ranges that read from RAM.
    pub fn ram_at(&self, addr: GuestPhys) -> Option<(&Arc<RamBlock>, u64)> {
        match &self.kind {
            FlatKind::Ram { block, offset, .. } | FlatKind::RomDevice { block, offset, .. } => {
                self.contains(addr).then(|| (block, offset + (addr.0 - self.base.0)))
            }
            FlatKind::Mmio { .. } => None,
        }
    }

    /// True if both say the same thing about the same addresses.
    pub fn same(&self, other: &Self) -> bool {
        self.base == other.base && self.len == other.len && self.kind.same(&other.kind)
    }
}

/// A memory map at one moment.
#[derive(Debug, Default)]
pub struct FlatView {
    ranges: Vec<FlatRange>,
}

impl FlatView {
    /// Makes a view of sorted ranges without overlap, joining neighbours that continue
    /// each other.
    pub(super) fn from_sorted(ranges: Vec<FlatRange>) -> Self {
        let mut joined: Vec<FlatRange> = Vec::with_capacity(ranges.len());
        for r in ranges {
            match joined.last_mut() {
                Some(last) if last.end() == r.base.0 && last.kind.continues(last.len, &r.kind) => {
                    last.len += r.len;
                }
                _ => joined.push(r),
            }
        }
        Self { ranges: joined }
    }

    /// The range that holds `addr`.
    pub fn lookup(&self, addr: GuestPhys) -> Option<&FlatRange> {
        let after = self.ranges.partition_point(|r| r.base <= addr);
        self.ranges[..after].last().filter(|r| r.contains(addr))
    }

    /// All ranges, lowest first.
    pub fn ranges(&self) -> &[FlatRange] {
        &self.ranges
    }
}
