//! A disk without contents (`null-co`): reads give zeros, writes vanish.

use mimus_core::backend::block::SECTOR_SIZE;
use mimus_core::backend::{BlockBackend, BlockBuffer, BlockCompletion, BlockError, BlockOp, BlockRequest};

/// A disk without contents.
#[derive(Clone, Copy, Debug)]
pub struct NullBlock {
    size: u64,
    read_zeroes: bool,
}

impl NullBlock {
    /// A disk of `size` bytes, rounded down to sectors. Without `read_zeroes`, reads leave
    /// the buffer as it is.
    pub fn new(size: u64, read_zeroes: bool) -> Self {
        Self { size: size / SECTOR_SIZE * SECTOR_SIZE, read_zeroes }
    }
}

impl BlockBackend for NullBlock {
    fn submit(&self, mut request: BlockRequest, done: BlockCompletion) {
        let result = super::raw::check_range(&request, self.size).map(|_| {
            if request.op == BlockOp::Read && self.read_zeroes {
                match &mut request.buffer {
                    BlockBuffer::Ram(slices) => slices.iter().for_each(|s| s.fill(0)),
                    BlockBuffer::Owned(bytes) => bytes.fill(0),
                    BlockBuffer::None => {}
                }
            }
        });
        done(result.map_err(|e: BlockError| e), request.buffer);
    }

    fn capacity(&self) -> u64 {
        self.size
    }

    fn read_only(&self) -> bool {
        false
    }

    fn can_discard(&self) -> bool {
        true
    }

    fn can_write_zeroes(&self) -> bool {
        true
    }

    fn describe(&self) -> String {
        "null-co".to_owned()
    }
}
