//! Guest memory: RAM blocks, the tree of memory regions, the flat views rendered from
//! it, and how devices reach RAM.

pub mod address_space;
mod backing;
pub mod dma;
pub mod flat_view;
mod gather;
pub mod guest_ram;
pub mod listener;
pub mod region;

pub use address_space::{AddressSpace, AddressSpaceId, MemoryMap, RegionHandle, Transaction};
pub use backing::{RamLock, RamOptions, RamSource};
pub use dma::{DmaGate, DmaHandle};
pub use flat_view::{FlatKind, FlatRange, FlatView};
pub use gather::{GATHERED_PAGES, Gathered};
pub use guest_ram::{
    CodeWriteListener, GuestRam, PAGE_CODE, PAGE_DIRTY, PAGE_SIZE, RamBacking, RamBlock, RamBlockId, RamError,
    RamSlice, read_fd_into, write_fd_from,
};
pub use listener::MemoryListener;
pub use region::MemoryRegion;
