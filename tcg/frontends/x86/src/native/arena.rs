//! Memory that is written through one mapping and executed through another.
#![allow(unsafe_code)]

use std::io;

use memmap2::{Mmap, MmapMut, MmapOptions};
use rustix::fs::{MemfdFlags, ftruncate, memfd_create};

/// Bytes of stubs a vCPU keeps.
const SIZE: usize = 1 << 20;

/// An append-only store of code.
pub(super) struct Arena {
    write: MmapMut,
    run: Mmap,
    used: usize,
}

impl Arena {
    /// An empty one.
    pub fn new() -> io::Result<Self> {
        let file = std::fs::File::from(memfd_create("mimus-x86-stubs", MemfdFlags::CLOEXEC)?);
        ftruncate(&file, SIZE as u64)?;
        // SAFETY: the file is this value's alone, and keeps its size.
        let write = unsafe { MmapOptions::new().len(SIZE).map_mut(&file)? };
        // SAFETY: as above; what is executed has been written by `push`.
        let run = unsafe { MmapOptions::new().len(SIZE).map_exec(&file)? };
        Ok(Self { write, run, used: 0 })
    }

    /// Adds code; answers its address. `None`: full.
    pub fn push(&mut self, code: &[u8]) -> Option<usize> {
        let start = self.used;
        let end = start.checked_add(code.len())?;
        self.write.get_mut(start..end)?.copy_from_slice(code);
        self.used = end.next_multiple_of(16);
        Some(self.run.as_ptr() as usize + start)
    }

    /// Forgets everything.
    pub fn clear(&mut self) {
        self.used = 0;
    }
}
