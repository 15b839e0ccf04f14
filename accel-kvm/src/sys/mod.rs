//! The unsafe half of the crate: ioctls that `kvm-ioctls` lacks, the pages shared with the kernel, the
//! signal that ends `KVM_RUN`. What is outside of this folder has no `unsafe`, except for the one call
//! that gives guest RAM to the kernel, which is here too.

pub mod ioctl;
pub mod ring;
pub mod run_page;
pub mod signal;
#[cfg(target_arch = "x86_64")]
pub mod x86;
