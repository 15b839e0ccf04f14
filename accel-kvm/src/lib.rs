//! The KVM accelerator: guest code is run by the host's processor, in the hands of the Linux kernel.
//!
//! Spec: `Documentation/virt/kvm/api.rst` of the kernel.
//!
//! * [`KvmAccelerator`] - probing and making VMs; `options` - `-accel kvm,…`; `error` - refusals, in words.
//! * `entry` - kicks, and holding vCPUs out of the kernel; `handle` - the shared part of a vCPU.
//! * `slots`, `dirty` - memory slots from the flat view, the log of written pages.
//! * `routing`, `irqfd`, `doorbell`, `coalesced` - interrupts and writes by descriptor, collected writes.
//! * `x86` - registers, CPUID, MSRs, chips, exits of x86; the only architecture so far: on other hosts the
//!   accelerator says that it is not available.
//! * `sys` - ioctls, shared pages, signals: the unsafe half.

// Without an architecture's half nothing uses the common one.
#![cfg_attr(not(target_arch = "x86_64"), allow(dead_code))]

#[cfg(target_arch = "x86_64")]
mod abilities;
mod accelerator;
mod coalesced;
mod dirty;
mod doorbell;
mod entry;
mod error;
mod irqfd;
mod options;
mod routing;
mod slots;
mod sys;

#[cfg(target_arch = "x86_64")]
mod handle;
#[cfg(target_arch = "x86_64")]
mod vm;
#[cfg(target_arch = "x86_64")]
mod x86;

#[cfg(target_arch = "x86_64")]
pub use abilities::Abilities;
pub use accelerator::KvmAccelerator;
#[cfg(target_arch = "x86_64")]
pub use x86::quirks::Quirks;
