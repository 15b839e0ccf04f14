//! The boundary between the machine and whatever runs guest code.

pub mod accelerator;
pub mod cpu_io;
pub mod exit;
pub mod null;
pub mod vcpu;

pub use accelerator::{AccelCaps, AccelError, AccelVm, Accelerator, Unavailable, VmConfig};
pub use cpu_io::{CpuIo, HypercallResult};
pub use exit::{DebugStop, ResetCause, ShutdownCause, VcpuExit, WatchKind};
pub use null::NullAccelerator;
pub use vcpu::{
    Access, CpuPin, DebugCaps, RemoteFence, ResetKind, StartRequest, StateError, TranslateFault,
    Translation, Vcpu, VcpuDebug, VcpuHandle, VcpuIndex, VcpuSignal,
};
