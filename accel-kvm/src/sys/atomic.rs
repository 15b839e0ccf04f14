// UNSAFE: an atomic operation on guest RAM that the standard library has no stable type for.
//! A 16-byte compare-and-exchange on guest RAM.
#![allow(unsafe_code)]

use mimus_core::memory::RamBlock;
use std::sync::atomic::Ordering;

#[target_feature(enable = "cmpxchg16b")]
unsafe fn exchange(at: *mut u128, old: u128, new: u128) -> u128 {
    // SAFETY: the caller gives an aligned address of 16 bytes that stay mapped.
    unsafe { std::arch::x86_64::cmpxchg16b(at, old, new, Ordering::SeqCst, Ordering::SeqCst) }
}

/// Stores `new` at `offset` if `old` is there; what was there. `None` if it is not inside, not aligned, or the
/// host's processor cannot.
pub fn compare_exchange(block: &RamBlock, offset: u64, old: u128, new: u128) -> Option<u128> {
    if !block.contains(offset, 16) || !offset.is_multiple_of(16) || !is_x86_feature_detected!("cmpxchg16b") {
        return None;
    }
    // SAFETY: inside the block and aligned; guest RAM is only accessed by copies and atomics.
    let found = unsafe { exchange(block.host_ptr(offset).cast(), old, new) };
    block.note_write(offset, 16);
    Some(found)
}
