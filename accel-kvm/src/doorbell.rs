//! ioeventfd: guest writes that only signal a descriptor.

use crate::error::refused;
use crate::sys::ioctl;
use kvm_bindings::{
    kvm_ioeventfd, kvm_ioeventfd_flag_nr_datamatch, kvm_ioeventfd_flag_nr_deassign, kvm_ioeventfd_flag_nr_pio,
};
use kvm_ioctls::VmFd;
use mimus_core::accel::{AccelError, DoorbellAddress, Doorbells};
use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// The doorbells of a VM.
pub struct KvmDoorbells {
    vm: Arc<VmFd>,
    attached: AtomicU64,
}

impl KvmDoorbells {
    /// None yet.
    pub fn new(vm: Arc<VmFd>) -> Self {
        Self { vm, attached: AtomicU64::new(0) }
    }

    /// How many there are.
    pub fn count(&self) -> u64 {
        self.attached.load(Ordering::Relaxed)
    }

    fn set(&self, at: DoorbellAddress, fd: BorrowedFd<'_>, detach: bool) -> Result<(), AccelError> {
        if at.value.is_some() && at.size.is_none() {
            return Err(AccelError::Other(format!("doorbell at {}: a value needs a width", at.addr)));
        }
        let flag = |on: bool, nr: u32| u32::from(on) << nr;
        let request = kvm_ioeventfd {
            datamatch: at.value.unwrap_or(0),
            addr: at.addr.0,
            len: at.size.map_or(0, |s| s.bytes() as u32),
            fd: fd.as_raw_fd(),
            flags: flag(at.pio, kvm_ioeventfd_flag_nr_pio)
                | flag(at.value.is_some(), kvm_ioeventfd_flag_nr_datamatch)
                | flag(detach, kvm_ioeventfd_flag_nr_deassign),
            pad: [0; 36],
        };
        let verb = if detach { "detach" } else { "attach" };
        ioctl::ioeventfd(&self.vm, &request).map_err(refused(format!("{verb} a doorbell at {}", at.addr)))
    }
}

impl Doorbells for KvmDoorbells {
    fn attach(&self, at: DoorbellAddress, fd: BorrowedFd<'_>) -> Result<(), AccelError> {
        self.set(at, fd, false)?;
        self.attached.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }

    fn detach(&self, at: DoorbellAddress, fd: BorrowedFd<'_>) -> Result<(), AccelError> {
        self.set(at, fd, true)?;
        self.attached.fetch_sub(1, Ordering::Relaxed);
        Ok(())
    }
}
