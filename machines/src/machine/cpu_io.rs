//! What running vCPUs ask of the machine.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use mimus_core::accel::{CpuIo, CpuPin, HypercallResult, StartRequest, VcpuHandle, VcpuIndex};
use mimus_core::clock::VirtualClock;
use mimus_core::memory::AddressSpace;
use mimus_core::vcpu::{PinTimers, VcpuThreads};

/// Firmware that is part of the board: SBI, PSCI.
pub trait Hypercalls: Send + Sync {
    /// A call by `vcpu`, on its thread; see [`CpuIo::hypercall`].
    fn call(&self, io: &dyn CpuIo, vcpu: VcpuIndex, regs: &mut [u64; 8]) -> HypercallResult;
}

/// Pins that accelerators arm timers for.
const TIMER_PINS: [CpuPin; 2] = [CpuPin::Stip, CpuPin::Mtip];

/// The machine as its vCPUs see it.
pub(super) struct MachineIo {
    memory: Arc<AddressSpace>,
    clock: Arc<VirtualClock>,
    threads: VcpuThreads,
    timers: PinTimers,
    /// Per vCPU: bits of [`TIMER_PINS`] whose timers were ever armed.
    armed: Vec<AtomicU32>,
    hypercalls: Option<Arc<dyn Hypercalls>>,
}

impl MachineIo {
    pub(super) fn new(
        memory: &Arc<AddressSpace>,
        clock: &Arc<VirtualClock>,
        threads: &VcpuThreads,
        timers: PinTimers,
        hypercalls: Option<Arc<dyn Hypercalls>>,
    ) -> Arc<Self> {
        Arc::new(Self {
            memory: memory.clone(),
            clock: clock.clone(),
            threads: threads.clone(),
            timers,
            armed: (0..threads.count()).map(|_| AtomicU32::new(0)).collect(),
            hypercalls,
        })
    }

    /// Disarms all pin timers and lowers their pins. No vCPU runs.
    pub(super) fn reset_timers(&self, handles: &[Arc<dyn VcpuHandle>]) {
        for (handle, armed) in handles.iter().zip(&self.armed) {
            let armed = armed.swap(0, Ordering::SeqCst);
            for (bit, pin) in TIMER_PINS.into_iter().enumerate() {
                if armed >> bit & 1 != 0 {
                    self.timers.arm(handle.index(), pin, None);
                    handle.set_pin(pin, false);
                }
            }
        }
    }
}

impl CpuIo for MachineIo {
    fn hypercall(&self, vcpu: VcpuIndex, regs: &mut [u64; 8]) -> HypercallResult {
        match &self.hypercalls {
            Some(firmware) => firmware.call(self, vcpu, regs),
            None => HypercallResult::NotHandled,
        }
    }

    fn start_vcpu(&self, target: VcpuIndex, how: StartRequest) -> bool {
        self.threads.start_vcpu(target, how)
    }

    fn arm_pin_timer(&self, vcpu: VcpuIndex, pin: CpuPin, deadline_ns: Option<u64>) {
        if let Some(bit) = TIMER_PINS.iter().position(|p| *p == pin)
            && let Some(armed) = self.armed.get(vcpu.as_usize())
            && armed.load(Ordering::Relaxed) >> bit & 1 == 0
        {
            armed.fetch_or(1 << bit, Ordering::SeqCst);
        }
        self.timers.arm(vcpu, pin, deadline_ns);
    }

    fn clock(&self) -> &VirtualClock {
        &self.clock
    }

    fn memory(&self) -> &AddressSpace {
        &self.memory
    }
}
