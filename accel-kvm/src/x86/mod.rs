//! The x86 half: registers, CPUID, MSRs, chips, exits.

pub mod chips;
pub mod clock;
pub mod cpuid;
pub mod debug;
pub mod failure;
pub mod irqchip;
pub mod msrs;
pub mod patches;
pub mod quirks;
pub mod regs;
pub mod vcpu;
pub mod vcpu_state;
