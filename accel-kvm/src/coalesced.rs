//! Coalesced I/O: guest writes the kernel collects in a ring, made here before anything else.
//!
//! Lock order: the ring's lock is outside of everything that handlers of writes take; it is taken by vCPU
//! threads with nothing held, and by callers of `flush`, who may hold no device's lock.

use crate::error::refused;
use crate::sys::ioctl;
use crate::sys::ring::{CoalescedRing, CoalescedWrite};
use kvm_ioctls::VmFd;
use mimus_core::accel::{AccelError, CoalescedIo, CpuIo, VcpuIndex};
use mimus_core::bus::{AccessSize, GuestPhys, MemTxAttrs};
use std::os::fd::AsRawFd;
use std::sync::{Arc, OnceLock};

/// The collected writes of a VM.
pub struct Coalescer {
    vm: Arc<VmFd>,
    ring: OnceLock<CoalescedRing>,
}

impl Coalescer {
    /// No ranges yet.
    pub fn new(vm: Arc<VmFd>) -> Self {
        Self { vm, ring: OnceLock::new() }
    }

    /// Maps the ring through the first vCPU.
    pub fn map(&self, vcpu: &impl AsRawFd) -> Result<(), AccelError> {
        if self.ring.get().is_none() {
            let ring = CoalescedRing::map(vcpu).map_err(refused("map the ring of collected writes"))?;
            let _ = self.ring.set(ring);
        }
        Ok(())
    }

    /// Makes the collected writes, as vCPU `vcpu` (which of them made them is not known). None of those collected before
    /// is still to be made after it, even if another thread is at it.
    pub fn make_writes(&self, io: &dyn CpuIo, vcpu: VcpuIndex) {
        let Some(ring) = self.ring.get().filter(|r| !r.is_empty()) else { return };
        ring.drain(|write| make(io, vcpu, write));
    }

    fn set(&self, on: bool, pio: bool, addr: GuestPhys, len: u32) -> Result<(), AccelError> {
        let what = if on { "collect" } else { "stop collecting" };
        ioctl::coalesce(&self.vm, on, pio, addr.0, len).map_err(refused(format!("{what} writes to {addr}")))
    }
}

fn make(io: &dyn CpuIo, vcpu: VcpuIndex, write: &CoalescedWrite) {
    let value = u64::from_le_bytes(write.data);
    let Some(size) = AccessSize::from_bytes(write.len.into()) else {
        return log::warn!("kvm: a collected write of {} bytes is lost", write.len);
    };
    let value = value & size.mask();
    if write.pio {
        io.pio_write(vcpu, write.addr as u16, size, value);
    } else {
        let attrs = MemTxAttrs::vcpu(vcpu.0);
        let _ = io.mem_write(vcpu, GuestPhys(write.addr), size, attrs, value);
    }
}

impl CoalescedIo for Coalescer {
    fn add(&self, pio: bool, addr: GuestPhys, len: u32) -> Result<(), AccelError> {
        self.set(true, pio, addr, len)
    }

    fn remove(&self, pio: bool, addr: GuestPhys, len: u32) -> Result<(), AccelError> {
        self.set(false, pio, addr, len)
    }

    fn flush(&self, io: &dyn CpuIo) {
        self.make_writes(io, VcpuIndex(0));
    }
}
