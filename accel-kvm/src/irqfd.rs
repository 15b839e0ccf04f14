//! irqfd: interrupts by signalling a descriptor.

use crate::error::refused;
use crate::routing::{Message, Routing};
use crate::sys::ioctl;
use kvm_bindings::{KVM_IRQFD_FLAG_DEASSIGN, KVM_IRQFD_FLAG_RESAMPLE, kvm_irqfd};
use kvm_ioctls::VmFd;
use mimus_core::accel::{AccelError, IrqFds};
use mimus_core::irq::MsiRoute;
use rustix::event::{EventfdFlags, eventfd};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

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

/// Messages outside of this window are memory writes, not interrupts (SDM vol. 3, 11.11.1).
const MESSAGE_WINDOW: std::ops::Range<u64> = 0xfee0_0000..0xfef0_0000;

/// A message's own descriptor and interrupt number.
pub struct KvmMsiRoute {
    irqfds: KvmIrqFds,
    event: OwnedFd,
    /// Its number, once it has one, and whether the descriptor is attached to it.
    state: Mutex<(Option<u32>, bool)>,
}

impl KvmMsiRoute {
    /// Connected to nothing; `None` if there are no descriptors left.
    pub fn make(vm: &Arc<VmFd>, routing: &Arc<Routing>) -> Option<Arc<dyn MsiRoute>> {
        let event = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK);
        let event = event.map_err(|e| log::debug!("kvm: no descriptor for an interrupt: {e}")).ok()?;
        let irqfds = KvmIrqFds { vm: vm.clone(), routing: routing.clone(), pins: 0 };
        Some(Arc::new(Self { irqfds, event, state: Mutex::default() }))
    }

    fn lock(&self) -> MutexGuard<'_, (Option<u32>, bool)> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn try_connect(&self, address: u64, data: u32) -> Result<(), AccelError> {
        let mut state = self.lock();
        let gsi = match state.0 {
            Some(gsi) => {
                self.irqfds.change_message(gsi, address, data)?;
                gsi
            }
            None => *state.0.insert(self.irqfds.add_message(address, data)?),
        };
        if !state.1 {
            self.irqfds.attach(gsi, self.event.as_fd(), None)?;
            state.1 = true;
        }
        Ok(())
    }
}

impl MsiRoute for KvmMsiRoute {
    fn connect(&self, address: u64, data: u32) -> bool {
        let interrupt = MESSAGE_WINDOW.contains(&(address & 0xffff_ffff));
        let connected = match interrupt {
            true => self.try_connect(address, data).map_err(|e| log::debug!("{e}")).is_ok(),
            false => false,
        };
        if !connected {
            self.disconnect();
        }
        connected
    }

    fn disconnect(&self) {
        let mut state = self.lock();
        // The kernel waits for deliveries that are under way.
        if std::mem::take(&mut state.1)
            && let Some(Err(e)) = state.0.map(|gsi| self.irqfds.detach(gsi, self.event.as_fd()))
        {
            log::warn!("{e}");
        }
    }

    fn signal(&self) {
        // The kernel takes the count at once: it cannot be full.
        let _ = rustix::io::write(&self.event, &1u64.to_ne_bytes());
    }
}

impl Drop for KvmMsiRoute {
    fn drop(&mut self) {
        self.disconnect();
        if let Some(gsi) = self.lock().0.take() {
            let _ = self.irqfds.remove_message(gsi);
        }
    }
}
