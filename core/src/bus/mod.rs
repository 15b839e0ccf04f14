//! What travels on a bus: access sizes, requesters, results, and the dispatch of one
//! access to the device behind a region.

pub mod access;
pub mod mmio;
pub mod pio;
pub mod shortcut;

pub use access::{
    AccessRules, AccessSize, BusFault, GuestPhys, GuestVirt, MemTxAttrs, MemTxResult, MmioAccess, PioAccess, Requester,
};
pub use mmio::IoBinding;
pub use pio::PioSpace;
pub use shortcut::{Doorbell, Shortcut};
