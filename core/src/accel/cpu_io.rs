//! What a running vCPU asks of the machine: the slow path only. Accelerators reach RAM
//! directly.

use super::signal::VcpuSignal;
use super::vcpu::{CpuPin, StartRequest, VcpuIndex};
use crate::bus::{AccessSize, GuestPhys, MemTxAttrs, MemTxResult};
use crate::clock::VirtualClock;
use crate::memory::AddressSpace;
use std::sync::Arc;

/// How a hypercall ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HypercallResult {
    /// Done; the registers hold the results. The vCPU goes on after the call.
    Done,
    /// The machine offers no hypercalls: the vCPU takes its architectural trap.
    NotHandled,
    /// Done, and the vCPU must leave `run` with [`Kicked`](super::VcpuExit::Kicked) after
    /// the call: it was stopped, reset, or must look again.
    Leave,
    /// Done, and the vCPU waits for an interrupt after the call (SBI suspend).
    Wait,
}

/// A system register that is not in the CPU but in a device: an x86 local APIC, a GIC's CPU
/// interface.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum SysReg {
    /// An x86 model-specific register: `IA32_APIC_BASE`, `IA32_TSC_DEADLINE`, x2APIC.
    Msr(u32),
    /// x86 CR8, bits 7:4 of the task priority.
    Cr8,
}

/// Implemented once, by the machine. Any thread.
pub trait CpuIo: Sync {
    /// Reads physical memory; all-ones if it fails.
    fn mem_read(&self, vcpu: VcpuIndex, pa: GuestPhys, size: AccessSize, attrs: MemTxAttrs) -> (u64, MemTxResult) {
        let _ = vcpu;
        self.memory().read(pa, size, attrs)
    }

    /// Writes physical memory.
    fn mem_write(
        &self,
        vcpu: VcpuIndex,
        pa: GuestPhys,
        size: AccessSize,
        attrs: MemTxAttrs,
        value: u64,
    ) -> MemTxResult {
        let _ = vcpu;
        self.memory().write(pa, size, value, attrs)
    }

    /// Reads an x86 port; all-ones where there are none.
    fn pio_read(&self, _vcpu: VcpuIndex, _port: u16, size: AccessSize) -> u64 {
        size.mask()
    }

    /// Writes an x86 port.
    fn pio_write(&self, _vcpu: VcpuIndex, _port: u16, _size: AccessSize, _value: u64) {}

    /// A call to the machine's firmware interface (SBI, PSCI). `regs` are the argument
    /// registers in order: RISC-V `a0`-`a7` (`x10`-`x17`), changed in place.
    fn hypercall(&self, _vcpu: VcpuIndex, _regs: &mut [u64; 8]) -> HypercallResult {
        HypercallResult::NotHandled
    }

    /// Starts a vCPU that is off. False if it is not.
    fn start_vcpu(&self, _target: VcpuIndex, _how: StartRequest) -> bool {
        false
    }

    /// Sets (`Some`) or cancels (`None`) the deadline, in ns of the virtual clock, at which
    /// the machine raises `pin` of the vCPU (Sstc, generic timer). The accelerator lowers
    /// the pin itself. One deadline per vCPU and pin.
    fn arm_pin_timer(&self, _vcpu: VcpuIndex, _pin: CpuPin, _deadline_ns: Option<u64>) {}

    /// The vCPU waits for an interrupt: sleeps until it is given `signal`. `all`: so do all others, or they are off; then whoever
    /// sleeps may see to it that timers fire meanwhile.
    fn wait_for_interrupt(&self, signal: &Arc<VcpuSignal>, all: bool) {
        let _ = all;
        signal.wait(None);
    }

    /// x86 INTA cycle: the vector to take; of the local APIC first, else of the PIC.
    /// Called with [`CpuPin::Intr`] high and interrupts open; `None` if it was withdrawn.
    fn acknowledge_interrupt(&self, _vcpu: VcpuIndex) -> Option<u8> {
        None
    }

    /// An x86 INIT that waited ([`CpuPin::Init`]) is due: the machine resets the vCPU. On its thread; it leaves `run` then.
    fn take_init(&self, _vcpu: VcpuIndex) {}

    /// EOI broadcast to an I/O interrupt controller.
    fn end_of_interrupt(&self, _vcpu: VcpuIndex, _vector: u32) {}

    /// Reads a system register that a device may have; `None` if none has it, or the guest may
    /// not read it (`#GP`).
    fn sysreg_read(&self, _vcpu: VcpuIndex, _reg: SysReg) -> Option<u64> {
        None
    }

    /// Writes one; `None` if no device has it, or takes the value (`#GP`).
    fn sysreg_write(&self, _vcpu: VcpuIndex, _reg: SysReg, _value: u64) -> Option<()> {
        None
    }

    /// The machine's clock.
    fn clock(&self) -> &VirtualClock;

    /// The memory vCPUs see.
    fn memory(&self) -> &AddressSpace;
}
