//! Timers that raise an interrupt pin: what [`CpuIo::arm_pin_timer`] is made of.
//!
//! [`CpuIo::arm_pin_timer`]: crate::accel::CpuIo::arm_pin_timer

use crate::accel::{CpuPin, VcpuHandle, VcpuIndex};
use crate::clock::{ClockKind, Timer};
use crate::io_thread::IoThreadHandle;
use std::sync::{Arc, OnceLock};

/// Pins a vCPU can have.
const PINS: usize = CpuPin::Fiq as usize + 1;

/// One timer per vCPU and pin, made when first armed.
pub struct PinTimers {
    io_thread: IoThreadHandle,
    handles: Vec<Arc<dyn VcpuHandle>>,
    timers: Vec<[OnceLock<Timer>; PINS]>,
}

impl PinTimers {
    /// For these vCPUs, in index order.
    pub fn new(io_thread: &IoThreadHandle, handles: &[Arc<dyn VcpuHandle>]) -> Self {
        let timers = handles.iter().map(|_| std::array::from_fn(|_| OnceLock::new())).collect();
        Self { io_thread: io_thread.clone(), handles: handles.to_vec(), timers }
    }

    /// Raises `pin` of `vcpu` when the virtual clock reaches the deadline; `None` cancels.
    pub fn arm(&self, vcpu: VcpuIndex, pin: CpuPin, deadline_ns: Option<u64>) {
        let at = vcpu.as_usize();
        let (Some(timers), Some(handle)) = (self.timers.get(at), self.handles.get(at)) else {
            return;
        };
        let cell = &timers[pin as usize];
        match deadline_ns {
            Some(deadline) => cell.get_or_init(|| self.make(handle, pin)).arm(deadline),
            None => {
                if let Some(timer) = cell.get() {
                    timer.disarm();
                }
            }
        }
    }

    /// The thread whose timers they are.
    pub fn io_thread(&self) -> &IoThreadHandle {
        &self.io_thread
    }

    fn make(&self, handle: &Arc<dyn VcpuHandle>, pin: CpuPin) -> Timer {
        let timer = self.io_thread.timer(ClockKind::Virtual);
        let handle = handle.clone();
        timer.bind(move || handle.set_pin(pin, true));
        timer
    }
}
