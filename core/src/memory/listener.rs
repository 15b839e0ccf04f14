//! Who follows an address space: KVM's memory slots, a translator's TLBs, doorbells.

use super::flat_view::{FlatRange, FlatView};
use std::sync::Arc;

/// Told of every change of an address space, in order: `begin`, all `region_del`, all
/// `region_add`, `commit`. Called under the commit lock, with no device lock held; must
/// not wait for a vCPU and must not change the map.
pub trait MemoryListener: Send + Sync {
    /// A set of changes starts.
    fn begin(&self) {}
    /// A range is gone.
    fn region_del(&self, _range: &FlatRange) {}
    /// A range is new.
    fn region_add(&self, _range: &FlatRange) {}
    /// The set is complete; the address space already shows `view`.
    fn commit(&self, _view: &Arc<FlatView>) {}
}
