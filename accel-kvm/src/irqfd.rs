//! irqfd: interrupts by signalling a descriptor.

use crate::error::refused;
use crate::routing::{Message, Routing};
use crate::sys::ioctl;
use kvm_bindings::{KVM_IRQFD_FLAG_DEASSIGN, KVM_IRQFD_FLAG_RESAMPLE, kvm_irqfd};
use kvm_ioctls::VmFd;
use mimus_core::accel::{AccelError, IrqFds};
use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::Arc;

/// The interrupts by descriptor of a VM.
pub struct KvmIrqFds {
    pub vm: Arc<VmFd>,
    pub routing: Arc<Routing>,
    /// Numbers below this are pins of a chip in the kernel.
    pub pins: u32,
}

impl KvmIrqFds {
    fn check(&self, gsi: u32, resample: bool) -> Result<(), AccelError> {
        let message = self.routing.is_message(gsi);
        if !message && gsi >= self.pins {
            return Err(AccelError::Other(format!(
                "kvm: interrupt {gsi} is not the kernel's: only messages are with kernel-irqchip=split"
            )));
        }
        if message && resample {
            return Err(AccelError::Other(format!("kvm: interrupt {gsi} is a message, which has no end to wait for")));
        }
        Ok(())
    }

    fn no_message(gsi: u32) -> AccelError {
        AccelError::Other(format!("kvm: interrupt {gsi} stands for no message"))
    }
}

impl IrqFds for KvmIrqFds {
    fn attach(&self, gsi: u32, fd: BorrowedFd<'_>, resample: Option<BorrowedFd<'_>>) -> Result<(), AccelError> {
        self.check(gsi, resample.is_some())?;
        let request = kvm_irqfd {
            fd: fd.as_raw_fd() as u32,
            gsi,
            flags: if resample.is_some() { KVM_IRQFD_FLAG_RESAMPLE } else { 0 },
            resamplefd: resample.map_or(0, |r| r.as_raw_fd() as u32),
            pad: [0; 16],
        };
        ioctl::irqfd(&self.vm, &request).map_err(refused(format!("attach a descriptor to interrupt {gsi}")))
    }

    fn detach(&self, gsi: u32, fd: BorrowedFd<'_>) -> Result<(), AccelError> {
        let (fd, flags) = (fd.as_raw_fd() as u32, KVM_IRQFD_FLAG_DEASSIGN);
        let request = kvm_irqfd { fd, gsi, flags, ..Default::default() };
        ioctl::irqfd(&self.vm, &request).map_err(refused(format!("detach a descriptor from interrupt {gsi}")))
    }

    fn add_message(&self, address: u64, data: u32) -> Result<u32, AccelError> {
        self.routing.add_message(Message { address, data })
    }

    fn change_message(&self, gsi: u32, address: u64, data: u32) -> Result<(), AccelError> {
        if !self.routing.is_message(gsi) {
            return Err(Self::no_message(gsi));
        }
        self.routing.set_message(gsi, Message { address, data })
    }

    fn remove_message(&self, gsi: u32) -> Result<(), AccelError> {
        if self.routing.remove_message(gsi)? { Ok(()) } else { Err(Self::no_message(gsi)) }
    }
}
