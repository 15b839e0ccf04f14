//! What running vCPUs ask of the machine.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use mimus_core::accel::{CpuIo, CpuPin, HypercallResult, StartRequest, SysReg, VcpuHandle, VcpuIndex, VcpuSignal};
use mimus_core::bus::{AccessSize, MemTxAttrs, PioSpace};
use mimus_core::clock::VirtualClock;
use mimus_core::memory::AddressSpace;
use mimus_core::vcpu::{PinTimers, VcpuThreads};

/// Firmware that is part of the board: SBI, PSCI.
pub trait Hypercalls: Send + Sync {
    /// A call by `vcpu`, on its thread; see [`CpuIo::hypercall`].
    fn call(&self, io: &dyn CpuIo, vcpu: VcpuIndex, regs: &mut [u64; 8]) -> HypercallResult;
}

/// Interrupt controllers of the board that a vCPU talks to other than by its pins (x86).
pub trait CpuInterrupts: Send + Sync {
    /// See [`CpuIo::acknowledge_interrupt`].
    fn acknowledge(&self, vcpu: VcpuIndex) -> Option<u8>;
    /// See [`CpuIo::take_init`].
    fn take_init(&self, _vcpu: VcpuIndex) {}
    /// See [`CpuIo::end_of_interrupt`].
    fn end_of_interrupt(&self, vcpu: VcpuIndex, vector: u32);
    /// See [`CpuIo::sysreg_read`].
    fn sysreg_read(&self, vcpu: VcpuIndex, reg: SysReg) -> Option<u64>;
    /// See [`CpuIo::sysreg_write`].
    fn sysreg_write(&self, vcpu: VcpuIndex, reg: SysReg, value: u64) -> Option<()>;
}

/// What of a board its vCPUs reach directly.
#[derive(Clone, Default)]
pub struct CpuHooks {
    /// Firmware that is part of the board.
    pub firmware: Option<Arc<dyn Hypercalls>>,
    /// Ports; filled in by the builder.
    pub ports: Option<Arc<PioSpace>>,
    /// Interrupt controllers.
    pub interrupts: Option<Arc<dyn CpuInterrupts>>,
}

impl From<Option<Arc<dyn Hypercalls>>> for CpuHooks {
    fn from(firmware: Option<Arc<dyn Hypercalls>>) -> Self {
        Self { firmware, ..Self::default() }
    }
}

/// Pins that accelerators arm timers for.
const TIMER_PINS: [CpuPin; 2] = [CpuPin::Sstc, CpuPin::Mtip];

/// The machine as its vCPUs see it.
pub(super) struct MachineIo {
    memory: Arc<AddressSpace>,
    clock: Arc<VirtualClock>,
    threads: VcpuThreads,
    timers: PinTimers,
    /// Per vCPU: bits of [`TIMER_PINS`] whose timers were ever armed.
    armed: Vec<AtomicU32>,
    hooks: CpuHooks,
}

impl MachineIo {
    pub(super) fn new(
        memory: &Arc<AddressSpace>,
        clock: &Arc<VirtualClock>,
        threads: &VcpuThreads,
        timers: PinTimers,
        hooks: CpuHooks,
    ) -> Arc<Self> {
        Arc::new(Self {
            memory: memory.clone(),
            clock: clock.clone(),
            threads: threads.clone(),
            timers,
            armed: (0..threads.count()).map(|_| AtomicU32::new(0)).collect(),
            hooks,
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
    fn pio_read(&self, vcpu: VcpuIndex, port: u16, size: AccessSize) -> u64 {
        let ports = self.hooks.ports.as_ref();
        ports.map_or(size.mask(), |p| p.read(port, size, MemTxAttrs::vcpu(vcpu.0)))
    }

    fn pio_write(&self, vcpu: VcpuIndex, port: u16, size: AccessSize, value: u64) {
        if let Some(ports) = &self.hooks.ports {
            ports.write(port, size, value, MemTxAttrs::vcpu(vcpu.0));
        }
    }

    fn acknowledge_interrupt(&self, vcpu: VcpuIndex) -> Option<u8> {
        self.hooks.interrupts.as_ref()?.acknowledge(vcpu)
    }

    fn take_init(&self, vcpu: VcpuIndex) {
        if let Some(controllers) = &self.hooks.interrupts {
            controllers.take_init(vcpu);
        }
    }

    fn end_of_interrupt(&self, vcpu: VcpuIndex, vector: u32) {
        if let Some(controllers) = &self.hooks.interrupts {
            controllers.end_of_interrupt(vcpu, vector);
        }
    }

    fn sysreg_read(&self, vcpu: VcpuIndex, reg: SysReg) -> Option<u64> {
        self.hooks.interrupts.as_ref()?.sysreg_read(vcpu, reg)
    }

    fn sysreg_write(&self, vcpu: VcpuIndex, reg: SysReg, value: u64) -> Option<()> {
        self.hooks.interrupts.as_ref()?.sysreg_write(vcpu, reg, value)
    }

    fn hypercall(&self, vcpu: VcpuIndex, regs: &mut [u64; 8]) -> HypercallResult {
        match &self.hooks.firmware {
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

    fn wait_for_interrupt(&self, signal: &Arc<VcpuSignal>, all: bool) {
        if all {
            self.timers.io_thread().keep_time(signal);
        } else {
            signal.wait(None);
        }
    }

    fn clock(&self) -> &VirtualClock {
        &self.clock
    }

    fn memory(&self) -> &AddressSpace {
        &self.memory
    }
}
