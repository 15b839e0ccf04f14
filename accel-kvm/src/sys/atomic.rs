// UNSAFE: an atomic operation on guest RAM that the standard library has no stable type for.
//! A 16-byte compare-and-exchange on guest RAM.
#![allow(unsafe_code)]

use mimus_core::memory::RamBlock;

/// What was at `at`, which holds `new` now if that was `old`. By hand: the intrinsic is a library call, which is not
/// there, unless it is inlined.
///
/// # Safety
/// `at` is aligned to 16 bytes that stay mapped, and the processor has CMPXCHG16B.
unsafe fn exchange(at: *mut u128, old: u128, new: u128) -> u128 {
    let (mut low, mut high) = (old as u64, (old >> 64) as u64);
    // SAFETY: as for this function; RBX, which the compiler keeps for itself, is restored.
    unsafe {
        std::arch::asm!(
            "xchg rbx, rsi",
            "lock cmpxchg16b [rdi]",
            "xchg rbx, rsi",
            in("rdi") at,
            inout("rsi") new as u64 => _,
            in("rcx") (new >> 64) as u64,
            inout("rax") low,
            inout("rdx") high,
            options(nostack),
        );
    }
    u128::from(high) << 64 | u128::from(low)
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
