// UNSAFE: ioctls.
//! The ioctls of x86, and its time-stamp counter.
//!
//! Spec: `Documentation/virt/kvm/api.rst`; numbers from `include/uapi/linux/kvm.h`.
#![allow(unsafe_code)]

use super::ioctl::{READ, WRITE, number, result, with_mut, with_none, with_ref};
use kvm_bindings::*;
use kvm_ioctls::VmFd;
use std::io;
use std::mem::size_of;
use std::os::fd::AsRawFd;

const KVM_GET_XSAVE2: libc::Ioctl = number(READ, 0xcf, size_of::<kvm_xsave>());
const KVM_GET_XSAVE: libc::Ioctl = number(READ, 0xa4, size_of::<kvm_xsave>());
const KVM_SET_XSAVE: libc::Ioctl = number(WRITE, 0xa5, size_of::<kvm_xsave>());
const KVM_GET_SREGS2: libc::Ioctl = number(READ, 0xcc, size_of::<kvm_sregs2>());
const KVM_SET_SREGS2: libc::Ioctl = number(WRITE, 0xcd, size_of::<kvm_sregs2>());
const KVM_REINJECT_CONTROL: libc::Ioctl = number(0, 0x71, 0);
const KVM_INTERRUPT: libc::Ioctl = number(WRITE, 0x86, size_of::<kvm_interrupt>());

/// Queues an external interrupt (no local APIC in the kernel, or an ExtINT).
pub fn interrupt(vcpu: &impl AsRawFd, vector: u8) -> io::Result<()> {
    with_ref(vcpu, KVM_INTERRUPT, &kvm_interrupt { irq: vector.into() }).map(drop)
}

/// Whether PIT ticks that could not be delivered are delivered later.
pub fn pit_reinject(vm: &VmFd, on: bool) -> io::Result<()> {
    let control = kvm_reinject_control { pit_reinject: on.into(), reserved: [0; 31] };
    with_ref(vm, KVM_REINJECT_CONTROL, &control).map(drop)
}

/// Segments and control registers with PDPTRs.
pub fn get_sregs2(vcpu: &impl AsRawFd) -> io::Result<kvm_sregs2> {
    let mut sregs = kvm_sregs2::default();
    with_mut(vcpu, KVM_GET_SREGS2, &mut sregs)?;
    Ok(sregs)
}

/// Sets them.
pub fn set_sregs2(vcpu: &impl AsRawFd, sregs: &kvm_sregs2) -> io::Result<()> {
    with_ref(vcpu, KVM_SET_SREGS2, sregs).map(drop)
}

/// Reads the XSAVE area. `size` is what `KVM_CAP_XSAVE2` says, 0 without it.
pub fn get_xsave(vcpu: &impl AsRawFd, size: usize) -> io::Result<Vec<u8>> {
    let request = if size > 0 { KVM_GET_XSAVE2 } else { KVM_GET_XSAVE };
    let size = size.max(size_of::<kvm_xsave>());
    // The kernel copies to any address; u64 keeps it aligned.
    let mut area = vec![0u64; size.div_ceil(8)];
    // SAFETY: KVM_GET_XSAVE writes 4096 bytes, KVM_GET_XSAVE2 as many as the capability says.
    result(unsafe { libc::ioctl(vcpu.as_raw_fd(), request, area.as_mut_ptr()) })?;
    Ok(area.iter().flat_map(|w| w.to_ne_bytes()).take(size).collect())
}

/// Sets it; `size` as in [`get_xsave`]. A shorter area is filled up with zeros.
pub fn set_xsave(vcpu: &impl AsRawFd, size: usize, area: &[u8]) -> io::Result<()> {
    let size = size.max(size_of::<kvm_xsave>());
    let mut words = vec![0u64; size.div_ceil(8)];
    for (word, bytes) in words.iter_mut().zip(area.chunks(8)) {
        let mut buffer = [0; 8];
        buffer[..bytes.len()].copy_from_slice(bytes);
        *word = u64::from_ne_bytes(buffer);
    }
    // SAFETY: the kernel reads as many bytes as KVM_CAP_XSAVE2 says, at least 4096, and that many are there.
    result(unsafe { libc::ioctl(vcpu.as_raw_fd(), KVM_SET_XSAVE, words.as_ptr()) }).map(drop)
}

/// The host's time-stamp counter.
pub fn host_tsc() -> u64 {
    // SAFETY: reads a counter; every x86-64 processor has it.
    unsafe { std::arch::x86_64::_rdtsc() }
}

/// An IOAPIC's redirection entry as a number.
pub fn redirection_bits(entry: &kvm_ioapic_state__bindgen_ty_1) -> u64 {
    // SAFETY: both views of the union are plain integers of the same 64 bits.
    unsafe { entry.bits }
}

/// The clock the kernel's PIT counts in (CLOCK_MONOTONIC), in ns.
pub fn monotonic_ns() -> i64 {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: writes one timespec, which is there.
    unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC, &mut time) };
    time.tv_sec * 1_000_000_000 + time.tv_nsec
}

/// The PIC in what `KVM_GET_IRQCHIP` gave for one.
pub fn pic_of(chip: &kvm_irqchip) -> kvm_pic_state {
    // SAFETY: any bytes are valid for the plain integers of every chip's struct.
    unsafe { chip.chip.pic }
}

/// The IOAPIC in what `KVM_GET_IRQCHIP` gave for it.
pub fn ioapic_of(chip: &kvm_irqchip) -> kvm_ioapic_state {
    // SAFETY: as in `pic_of`.
    unsafe { chip.chip.ioapic }
}

/// Frequency of a VM's or vCPU's time-stamp counter in kHz; 0 if unknown.
pub fn tsc_khz(fd: &impl AsRawFd) -> u32 {
    const KVM_GET_TSC_KHZ: libc::Ioctl = number(0, 0xa3, 0);
    with_none(fd, KVM_GET_TSC_KHZ).unwrap_or(0)
}
