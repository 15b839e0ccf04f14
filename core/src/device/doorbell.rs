//! Doorbells of a device: guest writes that end on the I/O thread without a vCPU's doing.

use super::context::{BuildError, DeviceContext};
use crate::bus::{AccessSize, Doorbell, Shortcut};
use crate::error::HostError;
use crate::io_thread::{FdRegistration, Interest, SharedFd};
use crate::memory::MemoryRegion;
use rustix::event::{EventfdFlags, eventfd};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

/// Which writes ring.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DoorbellWrite {
    /// Offset in the region.
    pub offset: u64,
    /// Only writes of this width; `None`: any.
    pub size: Option<AccessSize>,
    /// Only writes of this value; needs a width.
    pub value: Option<u64>,
}

impl DeviceContext<'_> {
    /// Where the accelerator can do so, writes `at` of `region` no longer reach the device but call `ring` on the I/O
    /// thread, once for any number of them, until the registration is dropped. Elsewhere nothing changes, and there is
    /// no registration. Before the region is mapped.
    pub fn doorbell(
        &self,
        region: &MemoryRegion,
        at: DoorbellWrite,
        ring: impl Fn() + Send + 'static,
    ) -> Result<Option<FdRegistration>, BuildError> {
        let Some(binding) = region.binding().filter(|_| self.services().doorbells) else { return Ok(None) };
        let fd = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK);
        let fd = Arc::new(fd.map_err(|e| HostError::new(format!("make a doorbell of {}", self.path()), e))?);
        let waits = fd.clone();
        let registration = self.io_thread().register_fd(fd.clone(), Interest::READ, move |_| {
            answer(&waits);
            ring();
        })?;
        let fd: SharedFd = fd;
        binding.add_shortcut(Shortcut::Doorbell(Doorbell { offset: at.offset, size: at.size, value: at.value, fd }));
        Ok(Some(registration))
    }
}

/// Takes what was rung so far: what is rung later calls again.
fn answer(fd: &OwnedFd) {
    let mut count = [0; 8];
    let _ = rustix::io::read(fd.as_fd(), &mut count);
}
