//! Model-specific registers: numbers, and which of them are part of a vCPU's state.
//!
//! Spec: SDM volume 4; APM volume 2 appendix A; `Documentation/virt/kvm/x86/msr.rst` for the
//! paravirtual ones.

pub const TSC: u32 = 0x10;
pub const APIC_BASE: u32 = 0x1b;
pub const FEATURE_CONTROL: u32 = 0x3a;
pub const TSC_ADJUST: u32 = 0x3b;
pub const SPEC_CTRL: u32 = 0x48;
/// Where system management mode has its handler; KVM exchanges it under this number.
pub const SMBASE: u32 = 0x9e;
pub const MTRR_CAP: u32 = 0xfe;
pub const ARCH_CAPABILITIES: u32 = 0x10a;
pub const SYSENTER_CS: u32 = 0x174;
pub const SYSENTER_ESP: u32 = 0x175;
pub const SYSENTER_EIP: u32 = 0x176;
pub const MCG_CAP: u32 = 0x179;
pub const MCG_STATUS: u32 = 0x17a;
pub const MCG_CTL: u32 = 0x17b;
pub const MISC_ENABLE: u32 = 0x1a0;
pub const DEBUGCTL: u32 = 0x1d9;
pub const MTRR_PHYS_BASE0: u32 = 0x200;
pub const MTRR_FIX64K_00000: u32 = 0x250;
pub const MTRR_FIX16K_80000: u32 = 0x258;
pub const MTRR_FIX16K_A0000: u32 = 0x259;
pub const MTRR_FIX4K_C0000: u32 = 0x268;
pub const PAT: u32 = 0x277;
pub const MTRR_DEF_TYPE: u32 = 0x2ff;
pub const MC0_CTL: u32 = 0x400;
pub const TSC_DEADLINE: u32 = 0x6e0;
pub const X2APIC_FIRST: u32 = 0x800;
pub const X2APIC_LAST: u32 = 0x8ff;
pub const XSS: u32 = 0xda0;
pub const EFER: u32 = 0xc000_0080;
pub const STAR: u32 = 0xc000_0081;
pub const LSTAR: u32 = 0xc000_0082;
pub const CSTAR: u32 = 0xc000_0083;
pub const FMASK: u32 = 0xc000_0084;
pub const FS_BASE: u32 = 0xc000_0100;
pub const GS_BASE: u32 = 0xc000_0101;
pub const KERNEL_GS_BASE: u32 = 0xc000_0102;
pub const TSC_AUX: u32 = 0xc000_0103;

/// APIC_BASE: this is the bootstrap processor.
pub const APIC_BASE_BSP: u64 = 1 << 8;
/// APIC_BASE: x2APIC mode.
pub const APIC_BASE_X2APIC: u64 = 1 << 10;
/// APIC_BASE: the APIC is on.
pub const APIC_BASE_ENABLE: u64 = 1 << 11;
/// Where the APIC's page is at reset.
pub const APIC_BASE_ADDRESS: u64 = 0xfee0_0000;

/// MISC_ENABLE: CPUID has no leaves above 2.
pub const MISC_ENABLE_LIMIT_CPUID: u64 = 1 << 22;
/// MISC_ENABLE: there is no NX.
pub const MISC_ENABLE_XD_DISABLE: u64 = 1 << 34;

/// DEBUGCTL: RFLAGS.TF is for branches only.
pub const DEBUGCTL_BTF: u64 = 2;

/// PAT at reset.
pub const PAT_RESET: u64 = 0x0007_0406_0007_0406;

/// MSRs that have a field of their own in [`X86State`](super::X86State), or belong to the saved
/// local APIC, and so are not in its list.
pub const fn has_own_field(index: u32) -> bool {
    matches!(index, TSC | APIC_BASE | EFER | FS_BASE | GS_BASE | TSC_DEADLINE)
        || X2APIC_FIRST <= index && index <= X2APIC_LAST
}
