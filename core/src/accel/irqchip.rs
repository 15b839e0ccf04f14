//! Interrupt controllers that an accelerator runs itself, and the other abilities a host's kernel may
//! offer a machine: doorbells, interrupts by descriptor, the log of dirty pages.

use super::VcpuIndex;
use super::accelerator::AccelError;
use super::cpu_io::CpuIo;
use crate::bus::{AccessSize, GuestPhys};
use crate::device::Device;
use crate::irq::IrqController;
use mimus_arch::x86::irqchip::{SCHEMA_IOAPIC, SCHEMA_LAPIC, SCHEMA_PIC, SCHEMA_PIT};
use std::os::fd::BorrowedFd;
use std::sync::Arc;

use crate::snapshot::Schema;

/// Schemas of the chips of a PC, the same whoever runs them; the states are in
/// [`mimus_arch::x86::irqchip`].
pub const PIC_SCHEMA: Schema = Schema::new(SCHEMA_PIC, 1);
/// See [`PIC_SCHEMA`].
pub const IOAPIC_SCHEMA: Schema = Schema::new(SCHEMA_IOAPIC, 1);
/// See [`PIC_SCHEMA`].
pub const PIT_SCHEMA: Schema = Schema::new(SCHEMA_PIT, 1);
/// See [`PIC_SCHEMA`]; of all local APICs together.
pub const LAPIC_SCHEMA: Schema = Schema::new(SCHEMA_LAPIC, 1);

/// Who runs the interrupt controllers of an x86 machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum IrqChipMode {
    /// The accelerator all of them: local APICs, PIC pair, IOAPIC, and the PIT.
    Kernel,
    /// The accelerator the local APICs; PIC and IOAPIC are device models.
    Split,
    /// All are device models.
    User,
}

impl IrqChipMode {
    /// True if INIT and start-up IPIs are the accelerator's: all vCPUs are then to be powered on,
    /// the application processors wait in [`MpState::WaitForSipi`](mimus_arch::x86::MpState).
    pub const fn starts_vcpus(self) -> bool {
        !matches!(self, Self::User)
    }
}

/// Interrupt controllers that the accelerator runs.
pub trait IrqChip: Send + Sync {
    /// Which.
    fn mode(&self) -> IrqChipMode;

    /// Where interrupts go in. `Kernel`: `set_input(gsi, level)` drives a global system interrupt
    /// (0-15 both PIC and IOAPIC, GSI 0 on IOAPIC pin 2; 16-23 IOAPIC only) and `msi` sends a message.
    /// `Split`: `msi` only: the IOAPIC model's messages and those of devices alike; ends of
    /// level-triggered ones come by [`CpuIo::end_of_interrupt`](super::CpuIo::end_of_interrupt).
    fn gsi(&self) -> Arc<dyn IrqController>;

    /// The chips, to be reset, started, stopped and saved like devices, by name: `pic`, `ioapic`,
    /// `pit`, `lapic` with [`IrqChipMode::Kernel`], `lapic` with [`IrqChipMode::Split`].
    /// Same schemas as the models. Called after all vCPUs are made. Not while a vCPU is in `run`
    /// are the devices used.
    fn devices(&self) -> Vec<(&'static str, Arc<dyn Device>)>;

    /// `Split`: the message that input `pin` of the IOAPIC model sends from now on, `None` while it is masked: the
    /// accelerator then knows which vectors' ends it must report. Called with the IOAPIC locked; must not call back.
    fn ioapic_route(&self, _pin: u32, _route: Option<(u64, u32)>) {}

    /// `Kernel`: the PIT's interrupt is taken over by an HPET (KVM_PIT_FLAGS_HPET_LEGACY), or no longer. Any thread, vCPUs may run.
    fn replace_pit(&self, _on: bool) {}
}

/// Where a doorbell is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct DoorbellAddress {
    /// In the port space, not in memory.
    pub pio: bool,
    /// Address or port.
    pub addr: GuestPhys,
    /// Only writes of this width; `None`: any.
    pub size: Option<AccessSize>,
    /// Only writes of this value; needs a width.
    pub value: Option<u64>,
}

/// Guest writes that become a signal of an eventfd without leaving the kernel.
pub trait Doorbells: Send + Sync {
    /// From now on such writes only add 1 to `fd`.
    fn attach(&self, at: DoorbellAddress, fd: BorrowedFd<'_>) -> Result<(), AccelError>;
    /// No longer; the same arguments as when attached.
    fn detach(&self, at: DoorbellAddress, fd: BorrowedFd<'_>) -> Result<(), AccelError>;
}

/// Guest writes that may wait: the accelerator collects them and makes them, in order, before anything
/// else the vCPU asks of the machine. For regions where a write has no effect of its own that anybody waits
/// for: frame buffers, indexed registers.
pub trait CoalescedIo: Send + Sync {
    /// From now on writes of `len` bytes from `addr` (`pio`: ports) may wait.
    fn add(&self, pio: bool, addr: GuestPhys, len: u32) -> Result<(), AccelError>;
    /// No longer. What was collected is made by the next [`CoalescedIo::flush`].
    fn remove(&self, pio: bool, addr: GuestPhys, len: u32) -> Result<(), AccelError>;
    /// Makes what was collected: before a device's registers are looked at from outside, a display
    /// refreshed, a state saved. Holding no device's lock.
    fn flush(&self, io: &dyn CpuIo);
}

/// Interrupts raised by signalling an eventfd.
pub trait IrqFds: Send + Sync {
    /// Signals of `fd` pulse interrupt `gsi`. With `resample`, they raise it, and when the guest ends
    /// the interrupt it is lowered and `resample` is signalled.
    fn attach(&self, gsi: u32, fd: BorrowedFd<'_>, resample: Option<BorrowedFd<'_>>) -> Result<(), AccelError>;
    /// No longer.
    fn detach(&self, gsi: u32, fd: BorrowedFd<'_>) -> Result<(), AccelError>;
    /// A new interrupt number that stands for a message, for [`IrqFds::attach`].
    fn add_message(&self, address: u64, data: u32) -> Result<u32, AccelError>;
    /// Changes what it stands for.
    fn change_message(&self, gsi: u32, address: u64, data: u32) -> Result<(), AccelError>;
    /// Gives it back.
    fn remove_message(&self, gsi: u32) -> Result<(), AccelError>;
}

/// The accelerator's log of pages the guest wrote.
///
/// Between `start` and `stop` every guest write since the last `sync` ends as
/// [`PAGE_DIRTY`](crate::memory::PAGE_DIRTY) in the page flags of its RAM block, at the latest
/// in `sync`. An accelerator without one always sets the flags at once.
pub trait DirtyLog: Send + Sync {
    /// Starts logging for all RAM. What was written before is not in the log.
    fn start(&self) -> Result<(), AccelError>;
    /// Moves what was logged so far to the page flags. vCPUs may run.
    fn sync(&self) -> Result<(), AccelError>;
    /// Stops logging.
    fn stop(&self) -> Result<(), AccelError>;
}

/// The vCPUs' time-stamp counters (x86), for local APICs that are models: TSC-deadline mode.
pub trait TscClock: Send + Sync {
    /// What `RDTSC` gives on that vCPU now. Any thread; never waits for a vCPU.
    fn now(&self, vcpu: VcpuIndex) -> u64;
    /// Ticks a second.
    fn hz(&self) -> u64;
}

/// The guest's own clocks that do not come through the machine's: TSC, kvmclock.
pub trait GuestClock: Send + Sync {
    /// The machine is about to run: the clocks go on from where they were stopped (or set). Call it
    /// when the virtual clock runs, before vCPUs do.
    fn start(&self);
    /// The machine has been paused: no vCPU is in `run`.
    fn stop(&self);
}
