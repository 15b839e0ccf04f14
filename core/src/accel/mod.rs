//! The boundary between the machine and whatever runs guest code.

pub mod accelerator;
pub mod catch;
pub mod cpu_io;
pub mod emulation;
pub mod exit;
pub mod irqchip;
pub mod null;
pub mod shortcuts;
pub mod signal;
pub mod trace;
pub mod vcpu;

pub use accelerator::{AccelCaps, AccelError, AccelVm, Accelerator, Names, Unavailable, VmConfig};
pub use catch::{Catch, Caught, SystemRegister};
pub use cpu_io::{CpuIo, HypercallResult, SysReg};
pub use emulation::{Done, EmulationFailure, EmulationFallback, FailedInstruction, Finished, StatePart, StateSource};
pub use exit::{DebugStop, ResetCause, ShutdownCause, VcpuExit, WatchKind};
pub use irqchip::{
    CoalescedIo, DirtyLog, DoorbellAddress, Doorbells, GuestClock, IrqChip, IrqChipMode, IrqFds, TscClock,
};
pub use null::NullAccelerator;
pub use shortcuts::Shortcuts;
pub use signal::VcpuSignal;
pub use trace::{RecentEvent, TraceKinds, TraceSink, TracedCode, Tracer};
pub use vcpu::{
    Access, CpuPin, DebugCaps, RememberedTranslation, RemoteFence, ResetKind, StartRequest, StateError, TranslateFault,
    Translation, Vcpu, VcpuDebug, VcpuHandle, VcpuIndex,
};
