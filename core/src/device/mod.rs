//! What a device is, how it is described, configured, built and wired.

pub mod context;
#[allow(clippy::module_inception)]
pub mod device;
pub mod doorbell;
pub mod keyvalue;
pub mod lifecycle;
pub mod model;
pub mod registry;

pub use context::{Backends, BuildError, DeviceContext, Services};
pub use device::{Device, MmioDevice, MutMmioDevice, MutPioDevice, PioDevice, lock};
pub use doorbell::DoorbellWrite;
pub use keyvalue::{OptionError, Options};
pub use lifecycle::{Drain, DrainToken, Lifecycle, MutLifecycle, ResetPhase};
pub use model::{DeviceModel, ModelEntry};
pub use registry::{Registry, UnknownModel};
