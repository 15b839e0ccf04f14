//! Breakpoints in memory: instructions replaced by `INT3`, for all vCPUs of a machine.

use mimus_core::bus::GuestPhys;
use mimus_core::memory::RamBlock;
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// `INT3`.
pub const INT3: u8 = 0xcc;

/// One byte of memory that was replaced.
struct Patch {
    block: Arc<RamBlock>,
    offset: u64,
    original: u8,
    /// How many want it.
    users: u32,
    /// How many have it out for a step.
    lifted: u32,
}

impl Patch {
    fn put(&self, byte: u8) {
        // The place was checked when the patch was made, and blocks do not shrink.
        let _ = self.block.write(self.offset, &[byte]);
    }
}

/// The replaced bytes of a machine by physical address.
#[derive(Default)]
pub struct Patches(Mutex<BTreeMap<u64, Patch>>);

impl Patches {
    fn lock(&self) -> MutexGuard<'_, BTreeMap<u64, Patch>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Replaces the byte at `pa`, which is at `offset` of `block`; false if it cannot be.
    pub fn add(&self, pa: GuestPhys, block: &Arc<RamBlock>, offset: u64) -> bool {
        let mut table = self.lock();
        if let Some(patch) = table.get_mut(&pa.0) {
            patch.users += 1;
            return true;
        }
        let mut original = [0];
        if !block.read(offset, &mut original) || !block.write(offset, &[INT3]) {
            return false;
        }
        let patch = Patch { block: block.clone(), offset, original: original[0], users: 1, lifted: 0 };
        table.insert(pa.0, patch);
        true
    }

    /// The byte at `pa` is no longer wanted by one of those who did.
    pub fn remove(&self, pa: GuestPhys) {
        let mut table = self.lock();
        let Some(patch) = table.get_mut(&pa.0) else { return };
        patch.users -= 1;
        if patch.users == 0 {
            patch.put(patch.original);
            table.remove(&pa.0);
        }
    }

    /// Takes the breakpoint out for a step.
    pub fn lift(&self, pa: GuestPhys) {
        if let Some(patch) = self.lock().get_mut(&pa.0) {
            patch.lifted += 1;
            patch.put(patch.original);
        }
    }

    /// And puts it back when nobody steps over it any more.
    pub fn put_back(&self, pa: GuestPhys) {
        if let Some(patch) = self.lock().get_mut(&pa.0) {
            patch.lifted = patch.lifted.saturating_sub(1);
            if patch.lifted == 0 {
                patch.put(INT3);
            }
        }
    }

    /// Has bytes that were read at `pa` be as the guest wrote them.
    pub fn hide(&self, pa: GuestPhys, bytes: &mut [u8]) {
        for (at, patch) in self.lock().range(pa.0..pa.0.saturating_add(bytes.len() as u64)) {
            bytes[(at - pa.0) as usize] = patch.original;
        }
    }

    /// Has bytes that are to be written at `pa` keep the breakpoints.
    pub fn keep(&self, pa: GuestPhys, bytes: &mut [u8]) {
        for (at, patch) in self.lock().range_mut(pa.0..pa.0.saturating_add(bytes.len() as u64)) {
            let byte = &mut bytes[(at - pa.0) as usize];
            patch.original = *byte;
            if patch.lifted == 0 {
                *byte = INT3;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use mimus_core::memory::{GuestRam, RamBacking};

    #[test]
    fn bytes_come_back_when_the_last_is_removed() {
        let block = GuestRam::new().add_block("ram", 4096, RamBacking::Private).unwrap();
        let patches = Patches::default();
        assert!(block.write(8, &[1, 2, 3]));
        let byte = || {
            let mut b = [0; 3];
            assert!(block.read(8, &mut b));
            b
        };
        let pa = GuestPhys(0x1009);
        assert!(patches.add(pa, &block, 9) && patches.add(pa, &block, 9));
        assert_eq!(byte(), [1, INT3, 3]);
        let mut seen = byte();
        patches.hide(GuestPhys(0x1008), &mut seen);
        assert_eq!(seen, [1, 2, 3]);
        patches.lift(pa);
        patches.lift(pa);
        patches.put_back(pa);
        assert_eq!(byte(), [1, 2, 3]);
        patches.put_back(pa);
        let mut new = [7, 8, 9];
        patches.keep(GuestPhys(0x1008), &mut new);
        assert_eq!(new, [7, INT3, 9]);
        assert!(block.write(8, &new));
        patches.remove(pa);
        assert_eq!(byte(), [7, INT3, 9]);
        patches.remove(pa);
        assert_eq!(byte(), [7, 8, 9]);
        assert!(!patches.add(pa, &block, 4096), "no such place");
    }
}
