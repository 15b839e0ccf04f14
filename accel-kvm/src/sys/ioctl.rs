// UNSAFE: ioctls.
//! ioctls that `kvm-ioctls` does not have, or only with types of its own.
//!
//! Spec: `Documentation/virt/kvm/api.rst`; numbers from `include/uapi/linux/kvm.h`.
#![allow(unsafe_code)]

use kvm_bindings::*;
use kvm_ioctls::VmFd;
use mimus_core::memory::RamBlock;
use std::io;
use std::mem::size_of;
use std::os::fd::AsRawFd;

pub(super) const WRITE: u64 = 1;
pub(super) const READ: u64 = 2;

/// The number of an ioctl: direction, size of the argument, type `KVMIO`, number.
pub(super) const fn number(direction: u64, nr: u64, size: usize) -> libc::Ioctl {
    (direction << 30 | (size as u64) << 16 | (KVMIO as u64) << 8 | nr) as libc::Ioctl
}

const KVM_GET_DIRTY_LOG: libc::Ioctl = number(WRITE, 0x42, size_of::<kvm_dirty_log>());
const KVM_IRQ_LINE: libc::Ioctl = number(WRITE, 0x61, size_of::<kvm_irq_level>());
const KVM_REGISTER_COALESCED_MMIO: libc::Ioctl = number(WRITE, 0x67, size_of::<kvm_coalesced_mmio_zone>());
const KVM_UNREGISTER_COALESCED_MMIO: libc::Ioctl = number(WRITE, 0x68, size_of::<kvm_coalesced_mmio_zone>());
const KVM_IRQFD: libc::Ioctl = number(WRITE, 0x76, size_of::<kvm_irqfd>());
const KVM_IOEVENTFD: libc::Ioctl = number(WRITE, 0x79, size_of::<kvm_ioeventfd>());
const KVM_RUN: libc::Ioctl = number(0, 0x80, 0);
const KVM_CLEAR_DIRTY_LOG: libc::Ioctl = number(READ | WRITE, 0xc0, size_of::<kvm_clear_dirty_log>());
const KVM_RESET_DIRTY_RINGS: libc::Ioctl = number(0, 0xc7, 0);
const KVM_SET_DEVICE_ATTR: libc::Ioctl = number(WRITE, 0xe1, size_of::<kvm_device_attr>());
const KVM_GET_DEVICE_ATTR: libc::Ioctl = number(WRITE, 0xe2, size_of::<kvm_device_attr>());

pub(super) fn result(value: libc::c_int) -> io::Result<u32> {
    u32::try_from(value).map_err(|_| io::Error::last_os_error())
}

pub(super) fn with_none(fd: &impl AsRawFd, request: libc::Ioctl) -> io::Result<u32> {
    // SAFETY: the request has no argument.
    result(unsafe { libc::ioctl(fd.as_raw_fd(), request, 0) })
}

pub(super) fn with_value(fd: &impl AsRawFd, request: libc::Ioctl, value: u64) -> io::Result<u32> {
    // SAFETY: the request takes its argument by value.
    result(unsafe { libc::ioctl(fd.as_raw_fd(), request, value) })
}

/// `request` must be one whose number holds the size of `T`, and that only reads or writes that many bytes.
pub(super) fn with_ref<T>(fd: &impl AsRawFd, request: libc::Ioctl, arg: &T) -> io::Result<u32> {
    // SAFETY: all requests given here were made with the size of their argument's type, and read it only.
    result(unsafe { libc::ioctl(fd.as_raw_fd(), request, arg as *const T) })
}

pub(super) fn with_mut<T>(fd: &impl AsRawFd, request: libc::Ioctl, arg: &mut T) -> io::Result<u32> {
    // SAFETY: as in `with_ref`; the kernel writes at most the size of the argument.
    result(unsafe { libc::ioctl(fd.as_raw_fd(), request, arg as *mut T) })
}

/// `KVM_RUN`; the exit is in the run page.
pub fn run(vcpu: &impl AsRawFd) -> io::Result<()> {
    with_none(vcpu, KVM_RUN).map(drop)
}

/// A memory slot as the kernel gets it.
#[derive(Clone, Copy, Debug)]
pub struct SlotRequest<'a> {
    pub slot: u32,
    pub flags: u32,
    pub guest: u64,
    /// 0 takes the slot away.
    pub len: u64,
    pub block: &'a RamBlock,
    pub offset: u64,
}

/// Adds, changes or removes a memory slot.
pub fn set_memory(vm: &VmFd, request: SlotRequest<'_>) -> Result<(), kvm_ioctls::Error> {
    assert!(request.block.contains(request.offset, request.len), "a slot is inside its block");
    let region = kvm_userspace_memory_region {
        slot: request.slot,
        flags: request.flags,
        guest_phys_addr: request.guest,
        memory_size: request.len,
        userspace_addr: request.block.host_ptr(request.offset) as u64,
    };
    // SAFETY: the range was checked to be inside the block, whose mapping is only ever accessed by
    // copies and atomics; the slot table keeps the block alive as long as the slot exists.
    unsafe { vm.set_user_memory_region(region) }
}

/// The log of a slot: one bit per page. `bitmap` must have a bit for every page of the slot.
pub fn get_dirty_log(vm: &VmFd, slot: u32, pages: u64, bitmap: &mut [u64]) -> io::Result<()> {
    assert!(bitmap.len() as u64 * 64 >= pages, "a bit for every page");
    let log = kvm_dirty_log {
        slot,
        padding1: 0,
        __bindgen_anon_1: kvm_dirty_log__bindgen_ty_1 { dirty_bitmap: bitmap.as_mut_ptr().cast() },
    };
    // The kernel writes whole words for `pages` pages, which is what the slot has.
    with_ref(vm, KVM_GET_DIRTY_LOG, &log).map(drop)
}

/// Forgets, and protects again, the pages whose bits are set. `first` is a multiple of 64, and so is
/// `pages` unless it reaches the slot's end.
pub fn clear_dirty_log(vm: &VmFd, slot: u32, first: u64, pages: u32, bitmap: &[u64]) -> io::Result<()> {
    assert!(bitmap.len() as u64 * 64 >= pages.into(), "a bit for every page");
    let mut log = kvm_clear_dirty_log {
        slot,
        num_pages: pages,
        first_page: first,
        __bindgen_anon_1: kvm_clear_dirty_log__bindgen_ty_1 { dirty_bitmap: bitmap.as_ptr() as *mut _ },
    };
    with_mut(vm, KVM_CLEAR_DIRTY_LOG, &mut log).map(drop)
}

/// Protects again all pages that were collected from rings; how many they were.
pub fn reset_dirty_rings(vm: &VmFd) -> io::Result<u32> {
    with_none(vm, KVM_RESET_DIRTY_RINGS)
}

/// Drives an interrupt line.
pub fn irq_line(vm: &VmFd, gsi: u32, level: bool) -> io::Result<()> {
    let line = kvm_irq_level { __bindgen_anon_1: kvm_irq_level__bindgen_ty_1 { irq: gsi }, level: level.into() };
    with_ref(vm, KVM_IRQ_LINE, &line).map(drop)
}

/// Attaches or detaches an eventfd that raises an interrupt.
pub fn irqfd(vm: &VmFd, request: &kvm_irqfd) -> io::Result<()> {
    with_ref(vm, KVM_IRQFD, request).map(drop)
}

/// Attaches or detaches an eventfd that a guest write signals.
pub fn ioeventfd(vm: &VmFd, request: &kvm_ioeventfd) -> io::Result<()> {
    with_ref(vm, KVM_IOEVENTFD, request).map(drop)
}

/// Starts or stops collecting writes to a range in the shared ring.
pub fn coalesce(vm: &VmFd, on: bool, pio: bool, addr: u64, size: u32) -> io::Result<()> {
    let zone = kvm_coalesced_mmio_zone {
        addr,
        size,
        __bindgen_anon_1: kvm_coalesced_mmio_zone__bindgen_ty_1 { pio: pio.into() },
    };
    let request = if on { KVM_REGISTER_COALESCED_MMIO } else { KVM_UNREGISTER_COALESCED_MMIO };
    with_ref(vm, request, &zone).map(drop)
}

/// Sets a 64-bit attribute of a vCPU.
pub fn set_vcpu_attr(vcpu: &impl AsRawFd, group: u32, attr: u64, value: u64) -> io::Result<()> {
    let request = kvm_device_attr { flags: 0, group, attr, addr: &raw const value as u64 };
    with_ref(vcpu, KVM_SET_DEVICE_ATTR, &request).map(drop)
}

/// Reads a 64-bit attribute of a vCPU.
pub fn get_vcpu_attr(vcpu: &impl AsRawFd, group: u32, attr: u64) -> io::Result<u64> {
    let mut value = 0u64;
    let request = kvm_device_attr { flags: 0, group, attr, addr: &raw mut value as u64 };
    with_ref(vcpu, KVM_GET_DEVICE_ATTR, &request)?;
    Ok(value)
}

/// Asks a file for an extension by number; 0 if it does not have it.
pub fn check_extension(fd: &impl AsRawFd, cap: u32) -> u32 {
    const KVM_CHECK_EXTENSION: libc::Ioctl = number(0, 0x03, 0);
    with_value(fd, KVM_CHECK_EXTENSION, cap.into()).unwrap_or(0)
}
