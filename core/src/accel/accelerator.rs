//! Accelerators and the virtual machines inside them.

use super::irqchip::{CoalescedIo, DirtyLog, Doorbells, GuestClock, IrqChip, IrqChipMode, IrqFds, TscClock};
use super::trace::Tracer;
use super::vcpu::{Vcpu, VcpuIndex};
use crate::clock::VirtualClock;
use crate::memory::{AddressSpace, GuestRam, MemoryListener};
use mimus_arch::{CpuModel, GuestArch, ModelError};
use std::collections::BTreeMap;
use std::sync::Arc;

/// A way of running guest code. One value per kind.
pub trait Accelerator: Send + Sync {
    /// `tcg`, `kvm`, `null`.
    fn name(&self) -> &'static str;
    /// Whether this host can run `guest`, and how well.
    fn probe(&self, guest: GuestArch) -> Result<AccelCaps, Unavailable>;
    /// The same for a machine with these `-accel` options, as far as can be found out before it is made.
    fn probe_with(&self, guest: GuestArch, _options: &BTreeMap<String, String>) -> Result<AccelCaps, Unavailable> {
        self.probe(guest)
    }
    /// The CPU model of a machine that asks for none.
    fn default_cpu(&self, guest: GuestArch) -> Result<CpuModel, ModelError> {
        CpuModel::default_for(guest)
    }
    /// Makes a virtual machine without vCPUs.
    fn create_vm(&self, config: &VmConfig) -> Result<Arc<dyn AccelVm>, AccelError>;
}

/// One virtual machine inside an accelerator.
pub trait AccelVm: Send + Sync {
    /// What it can do.
    fn caps(&self) -> &AccelCaps;

    /// The model with what is not supported dropped; fails if something asked for by name
    /// is not supported.
    fn filter_cpu_model(&self, model: &CpuModel) -> Result<CpuModel, AccelError> {
        Ok(model.clone())
    }

    /// Makes a vCPU, in reset. Called once per index, before any vCPU runs.
    fn create_vcpu(&self, index: VcpuIndex, model: &CpuModel) -> Result<Box<dyn Vcpu>, AccelError>;

    /// Who wants to follow the system address space (memory slots, TLB flushes).
    fn memory_listener(&self) -> Option<Arc<dyn MemoryListener>> {
        None
    }

    /// Who runs the interrupt controllers if the board has no wish of its own (x86).
    fn irqchip_mode(&self) -> IrqChipMode {
        IrqChipMode::User
    }

    /// Makes the accelerator's interrupt controllers. `None`: it has none of this mode; the
    /// board uses its models. Called once at most, before vCPUs are made.
    fn create_irqchip(&self, _mode: IrqChipMode) -> Result<Option<Arc<dyn IrqChip>>, AccelError> {
        Ok(None)
    }

    /// Guest writes that signal a descriptor, if it has them.
    fn doorbells(&self) -> Option<&dyn Doorbells> {
        None
    }

    /// Guest writes that may wait, if it has them.
    fn coalesced_io(&self) -> Option<&dyn CoalescedIo> {
        None
    }

    /// Interrupts by descriptor, if it has them.
    fn irqfds(&self) -> Option<&dyn IrqFds> {
        None
    }

    /// The log of written pages. `None`: page flags are always up to date.
    fn dirty_log(&self) -> Option<&dyn DirtyLog> {
        None
    }

    /// Clocks of the guest to stop and start with the machine.
    fn guest_clock(&self) -> Option<&dyn GuestClock> {
        None
    }

    /// The vCPUs' time-stamp counters (x86), once it is known who runs the interrupt controllers. `None`: local APICs
    /// that are models have no TSC-deadline mode, and its CPU models do not offer it.
    fn tsc(&self) -> Option<Arc<dyn TscClock>> {
        None
    }

    /// Who wants to follow what vCPUs see in x86 system management mode; their accesses to devices then have
    /// [`MemTxAttrs::secure`](crate::bus::MemTxAttrs) set. `None`: there is no such mode. If nothing is told to
    /// it, SMIs are ignored.
    fn smm_memory_listener(&self) -> Option<Arc<dyn MemoryListener>> {
        None
    }

    /// Throws away everything translated or cached from guest memory (after a snapshot is
    /// loaded). No vCPU is in `run`.
    fn flush_all(&self) {}

    /// Traces of what vCPUs execute, if it makes them.
    fn tracer(&self) -> Option<&dyn Tracer> {
        None
    }

    /// How addresses of the guest's code are called, for those who profile what is made of it.
    fn name_code(&self, names: Names) {
        let _ = names;
    }

    /// Counters for the monitor, as (name, value).
    fn statistics(&self) -> Vec<(String, u64)> {
        Vec::new()
    }
}

/// A name for an address of the guest's, if there is one.
pub type Names = Arc<dyn Fn(u64) -> Option<String> + Send + Sync>;

/// What an accelerator can do for a guest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AccelCaps {
    /// Most vCPUs.
    pub max_vcpus: u32,
    /// Breakpoints, watchpoints and single steps are available.
    pub debug: bool,
    /// The guest's instructions are counted exactly.
    pub icount: bool,
}

/// What a virtual machine is made from.
#[derive(Clone)]
pub struct VmConfig {
    /// The guest architecture.
    pub arch: GuestArch,
    /// The memory vCPUs see.
    pub memory: Arc<AddressSpace>,
    /// The RAM blocks behind it, for the code-write listener.
    pub ram: Arc<GuestRam>,
    /// Number of vCPUs that will be made.
    pub smp: u32,
    /// The machine's virtual clock.
    pub clock: Arc<VirtualClock>,
    /// `-accel` options, as `tb-size=256M`. An unknown key is an error.
    pub options: BTreeMap<String, String>,
}

/// Why an accelerator cannot be used on this host.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("accelerator {accel} is not available: {reason}")]
pub struct Unavailable {
    /// Its name.
    pub accel: &'static str,
    /// What is missing, and what to do.
    pub reason: String,
}

/// An accelerator's failure.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum AccelError {
    /// It cannot be used here.
    #[error(transparent)]
    Unavailable(#[from] Unavailable),
    /// An option is unknown or its value is wrong.
    #[error("accelerator {accel}: option {option}: {reason}")]
    Option { accel: &'static str, option: String, reason: String },
    /// The CPU model cannot be had.
    #[error(transparent)]
    Model(#[from] ModelError),
    /// The host refuses something.
    #[error("accelerator {accel}: cannot {what}: {source}")]
    Host { accel: &'static str, what: String, source: std::io::Error },
    /// Anything else, in one line.
    #[error("{0}")]
    Other(String),
}
