//! Why a vCPU left `run`.

use super::accelerator::AccelError;
use super::catch::Caught;
use crate::bus::GuestVirt;

/// Why a vCPU left `run`.
#[derive(Debug)]
pub enum VcpuExit {
    /// Something was queued for this vCPU.
    Kicked,
    /// The guest waits for an interrupt (`WFI`, `HLT`) and none is pending.
    Halted,
    /// The guest turned the machine off.
    Shutdown(ShutdownCause),
    /// The guest reset the machine.
    Reset(ResetCause),
    /// A breakpoint, watchpoint or step.
    Debug(DebugStop),
    /// The accelerator cannot go on; the machine stops with its state intact.
    Failed(AccelError),
}

/// Who turned the machine off, and how it ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum ShutdownCause {
    /// The guest, properly.
    GuestPowerOff,
    /// The guest, with an exit code for the host (test devices).
    GuestExit(u32),
    /// The guest crashed and asks to be turned off.
    GuestPanic,
    /// A triple fault or the like.
    TripleFault,
    /// The host: monitor, signal.
    HostRequest,
}

/// Who reset the machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum ResetCause {
    /// The guest.
    Guest,
    /// A watchdog.
    Watchdog,
    /// The guest's processor shut down (x86 triple fault); a PC's chipset resets it then.
    TripleFault,
    /// The host: monitor.
    HostRequest,
}

/// Why a vCPU stopped for the debugger.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DebugStop {
    /// A single step is done.
    Step,
    /// A breakpoint the debugger set.
    Breakpoint,
    /// A watchpoint.
    Watch {
        /// The address accessed.
        va: GuestVirt,
        /// What was watched for.
        kind: WatchKind,
    },
    /// Something it was to be stopped at.
    Caught(Caught),
}

/// What a watchpoint watches for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WatchKind {
    /// Loads.
    Read,
    /// Stores.
    Write,
    /// Both.
    ReadWrite,
}
