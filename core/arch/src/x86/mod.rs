//! x86 in all its widths: registers, MSRs, CPUID features, CPU models, the state of a vCPU, and the
//! saved states of the interrupt and timer chips of a PC.
//!
//! Spec: Intel 64 and IA-32 Architectures Software Developer's Manual (SDM), volumes 1 to 4; AMD64
//! Architecture Programmer's Manual (APM), volume 2, for what AMD defines.

pub mod cpuid;
pub mod features;
pub mod gdb;
pub mod irqchip;
mod model_table;
pub mod models;
pub mod msr;
pub mod regs;
pub mod state;
pub mod xsave;

pub use features::{CpuidFeature, FeatureWord, X86Features};
pub use models::{Vendor, X86Model};
pub use state::{MpState, Segment, TableRegister, X86State};
