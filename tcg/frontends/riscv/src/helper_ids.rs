//! Numbers of the helpers that translated code calls, and offsets in the hot state that it tests and sets.
//!
//! A helper that raises an exception, or that wants the block left, sets `exit_request` and the guest's pc.
//! "Raw" arguments are the instruction's bits, for `mtval`.

/// A CSR instruction. Arguments: `csr | op << 12 | (rd is x0) << 16` with op one of [`CSR_READ`] …, the
/// source value, raw. Result: the old value.
pub const CSR: u16 = 0;
/// `fence.i`. The block ends after it.
pub const FENCE_I: u16 = 1;
/// `pause`.
pub const PAUSE: u16 = 2;
/// In careful blocks, before a floating-point instruction: raises illegal instruction if FS is off, or if
/// the second argument is 1 and `frm` is not a rounding mode. Arguments: raw, uses dynamic rounding.
pub const FP_CHECK: u16 = 3;
/// `ecall`. Sets pc to the trap's handler.
pub const ECALL: u16 = 4;
/// `ebreak`. Sets pc to the trap's handler.
pub const EBREAK: u16 = 5;
/// `mret`. Arguments: raw. Sets pc.
pub const MRET: u16 = 6;
/// `sret`. Arguments: raw. Sets pc.
pub const SRET: u16 = 7;
/// `wfi`. Arguments: raw. Sets pc to the next instruction.
pub const WFI: u16 = 8;
/// `sfence.vma` and `sinval.vma`. Arguments: virtual address, ASID, [`SFENCE_HAS_ADDRESS`] and
/// [`SFENCE_HAS_ASID`] flags, with raw in bits 32 and up.
pub const SFENCE_VMA: u16 = 9;
/// `sfence.w.inval` and `sfence.inval.ir`: illegal in U-mode, else nothing. Arguments: raw.
pub const SFENCE_INVAL: u16 = 10;
/// An illegal instruction. Arguments: raw (16 bits for a short one). Sets pc to the trap's handler.
pub const ILLEGAL: u16 = 11;
/// A cache-block operation. Arguments: address (not aligned), kind ([`CBO_INVAL`] …), raw.
pub const CBO: u16 = 12;
/// Without compressed instructions, before a jump: raises instruction-address-misaligned if bit 1 of the
/// target (first argument) is set.
pub const CHECK_TARGET: u16 = 13;

/// Reads `fflags`, then writes it if the first argument is 1: to the second. Touches no slot, and the floating-point
/// unit is on. Result: the old value.
pub const FFLAGS: u16 = 14;

/// Number of helpers.
pub const COUNT: usize = 15;

/// Names of the helpers, by number.
pub const NAMES: [&str; COUNT] = [
    "csr",
    "fence_i",
    "pause",
    "fp_check",
    "ecall",
    "ebreak",
    "mret",
    "sret",
    "wfi",
    "sfence_vma",
    "sfence_inval",
    "illegal",
    "cbo",
    "check_target",
    "fflags",
];

/// CSR operation: read without side effect of a write (`csrrs`, `csrrc` with x0 or 0).
pub const CSR_READ: u64 = 0;
/// CSR operation: write the source.
pub const CSR_WRITE: u64 = 1;
/// CSR operation: set the source's bits.
pub const CSR_SET: u64 = 2;
/// CSR operation: clear the source's bits.
pub const CSR_CLEAR: u64 = 3;
/// Shift of the CSR operation in the first argument.
pub const CSR_OP_SHIFT: u32 = 12;
/// Bit of the first argument: the destination is x0, so a [`CSR_WRITE`] does not read.
pub const CSR_RD_IS_X0: u64 = 1 << 16;

/// `rs1` of an `sfence.vma` is not x0: one address only.
pub const SFENCE_HAS_ADDRESS: u64 = 1;
/// `rs2` of an `sfence.vma` is not x0: one address space only.
pub const SFENCE_HAS_ASID: u64 = 2;

/// Bytes of a cache block (Zic64b).
pub const CACHE_BLOCK: u64 = 64;
/// `cbo.inval`
pub const CBO_INVAL: u64 = 0;
/// `cbo.clean`
pub const CBO_CLEAN: u64 = 1;
/// `cbo.flush`
pub const CBO_FLUSH: u64 = 2;
/// `cbo.zero`
pub const CBO_ZERO: u64 = 4;

/// Offset in the hot state of a byte: [`FP_BAD_OFF`] and [`FP_BAD_FRM`].
pub const HOT_FP_BAD: i32 = 0;
/// Offset in the hot state of a byte that translated code sets to 1 when it changes floating-point state.
pub const HOT_FP_DIRTY: i32 = 1;
/// Offset in the hot state of a byte that is 0 where `cbo.zero` is legal.
pub const HOT_CBZ_BAD: i32 = 2;
/// Bit of [`HOT_FP_BAD`]: `mstatus.FS` is off.
pub const FP_BAD_OFF: u8 = 1;
/// Bit of [`HOT_FP_BAD`]: the host cannot round as `frm` says.
pub const FP_BAD_FRM: u8 = 2;
