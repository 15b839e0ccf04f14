//! Numbers and bits of the registers.
//!
//! Spec: SDM volume 1 section 3.4; volume 3 sections 2.3 (RFLAGS), 2.5 (control registers),
//! 2.2.1 (EFER), 18.2 (debug registers).

/// Index of a general register, in encoding order.
pub const RAX: usize = 0;
pub const RCX: usize = 1;
pub const RDX: usize = 2;
pub const RBX: usize = 3;
pub const RSP: usize = 4;
pub const RBP: usize = 5;
pub const RSI: usize = 6;
pub const RDI: usize = 7;
pub const R8: usize = 8;
pub const R9: usize = 9;
pub const R10: usize = 10;
pub const R11: usize = 11;
pub const R12: usize = 12;
pub const R13: usize = 13;
pub const R14: usize = 14;
pub const R15: usize = 15;

/// Names of the general registers, in encoding order.
pub const GPR_NAMES: [&str; 16] =
    ["rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi", "r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15"];

/// Bit 1 of RFLAGS is always set.
pub const RFLAGS_FIXED: u64 = 1 << 1;
pub const RFLAGS_CF: u64 = 1 << 0;
pub const RFLAGS_PF: u64 = 1 << 2;
pub const RFLAGS_AF: u64 = 1 << 4;
pub const RFLAGS_ZF: u64 = 1 << 6;
pub const RFLAGS_SF: u64 = 1 << 7;
pub const RFLAGS_TF: u64 = 1 << 8;
pub const RFLAGS_IF: u64 = 1 << 9;
pub const RFLAGS_DF: u64 = 1 << 10;
pub const RFLAGS_OF: u64 = 1 << 11;
pub const RFLAGS_IOPL: u64 = 3 << 12;
pub const RFLAGS_NT: u64 = 1 << 14;
pub const RFLAGS_RF: u64 = 1 << 16;
pub const RFLAGS_VM: u64 = 1 << 17;
pub const RFLAGS_AC: u64 = 1 << 18;
pub const RFLAGS_VIF: u64 = 1 << 19;
pub const RFLAGS_VIP: u64 = 1 << 20;
pub const RFLAGS_ID: u64 = 1 << 21;

pub const CR0_PE: u64 = 1 << 0;
pub const CR0_MP: u64 = 1 << 1;
pub const CR0_EM: u64 = 1 << 2;
pub const CR0_TS: u64 = 1 << 3;
pub const CR0_ET: u64 = 1 << 4;
pub const CR0_NE: u64 = 1 << 5;
pub const CR0_WP: u64 = 1 << 16;
pub const CR0_AM: u64 = 1 << 18;
pub const CR0_NW: u64 = 1 << 29;
pub const CR0_CD: u64 = 1 << 30;
pub const CR0_PG: u64 = 1 << 31;

pub const CR4_VME: u64 = 1 << 0;
pub const CR4_PVI: u64 = 1 << 1;
pub const CR4_TSD: u64 = 1 << 2;
pub const CR4_DE: u64 = 1 << 3;
pub const CR4_PSE: u64 = 1 << 4;
pub const CR4_PAE: u64 = 1 << 5;
pub const CR4_MCE: u64 = 1 << 6;
pub const CR4_PGE: u64 = 1 << 7;
pub const CR4_PCE: u64 = 1 << 8;
pub const CR4_OSFXSR: u64 = 1 << 9;
pub const CR4_OSXMMEXCPT: u64 = 1 << 10;
pub const CR4_UMIP: u64 = 1 << 11;
pub const CR4_LA57: u64 = 1 << 12;
pub const CR4_FSGSBASE: u64 = 1 << 16;
pub const CR4_PCIDE: u64 = 1 << 17;
pub const CR4_OSXSAVE: u64 = 1 << 18;
pub const CR4_SMEP: u64 = 1 << 20;
pub const CR4_SMAP: u64 = 1 << 21;
pub const CR4_PKE: u64 = 1 << 22;

pub const EFER_SCE: u64 = 1 << 0;
pub const EFER_LME: u64 = 1 << 8;
pub const EFER_LMA: u64 = 1 << 10;
pub const EFER_NXE: u64 = 1 << 11;

/// Bits of DR6 that read as one.
pub const DR6_FIXED: u64 = 0xffff_0ff0;
/// Bit 10 of DR7 reads as one.
pub const DR7_FIXED: u64 = 1 << 10;

/// Bits of XCR0 and of an XSAVE header: x87, SSE.
pub const XCR0_X87: u64 = 1 << 0;
pub const XCR0_SSE: u64 = 1 << 1;
pub const XCR0_AVX: u64 = 1 << 2;
/// Protection keys' rights.
pub const XCR0_PKRU: u64 = 1 << 9;

/// Bytes of the legacy region and header of an XSAVE area (SDM volume 1 section 13.4).
pub const XSAVE_MIN: usize = 576;
/// Most bytes of an XSAVE area that are accepted from a snapshot.
pub const XSAVE_MAX: usize = 64 << 10;
/// Offset of `XSTATE_BV` in an XSAVE area.
pub const XSAVE_XSTATE_BV: usize = 512;
/// Offset of MXCSR in the legacy region.
pub const XSAVE_MXCSR: usize = 24;
/// MXCSR at reset.
pub const MXCSR_RESET: u32 = 0x1f80;
/// x87 control word at reset (`FNINIT` gives 0x37f).
pub const FCW_RESET: u16 = 0x40;

/// Exception vectors (SDM volume 3 table 7-1).
pub const VECTOR_DE: u8 = 0;
pub const VECTOR_DB: u8 = 1;
pub const VECTOR_NMI: u8 = 2;
pub const VECTOR_BP: u8 = 3;
pub const VECTOR_OF: u8 = 4;
pub const VECTOR_BR: u8 = 5;
pub const VECTOR_UD: u8 = 6;
pub const VECTOR_NM: u8 = 7;
pub const VECTOR_DF: u8 = 8;
pub const VECTOR_TS: u8 = 10;
pub const VECTOR_NP: u8 = 11;
pub const VECTOR_SS: u8 = 12;
pub const VECTOR_GP: u8 = 13;
pub const VECTOR_PF: u8 = 14;
pub const VECTOR_MF: u8 = 16;
pub const VECTOR_AC: u8 = 17;
pub const VECTOR_MC: u8 = 18;
pub const VECTOR_XM: u8 = 19;
