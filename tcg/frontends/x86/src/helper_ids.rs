//! Numbers of the helpers that translated code calls, and how their arguments are packed.

/// Executes an instruction: its packed bytes, and the offset of its memory operand in its segment.
pub const EXECUTE: u16 = 0;
/// Checks an access and makes its linear address: [`SegmentAccess`], offset.
pub const LINEAR: u16 = 1;
/// Raises the exception of an invalid instruction.
pub const INVALID: u16 = 2;
/// A string instruction: [`StringOp`], offset-mask of the address size.
pub const STRING: u16 = 3;
/// Loads the x87 control word: its value.
pub const FLDCW: u16 = 4;
/// One of the frequent system instructions: which.
pub const QUICK: u16 = 5;
/// Checks that code is inside its segment, or canonical: [`CODE_ITSELF`] or [`CODE_TARGET`], an offset in CS,
/// and how many bytes are pushed first.
pub const CODE: u16 = 6;
/// How many there are.
pub const COUNT: usize = 7;

/// For [`CODE`]: the instruction's own bytes.
pub const CODE_ITSELF: i64 = 0;
/// For [`CODE`]: where a near branch leads.
pub const CODE_TARGET: i64 = 1;

/// An access as [`LINEAR`] is told of it: segment in bits 2:0, bytes in 15:8, whether it stores in bit 16.
pub const fn segment_access(seg: usize, bytes: u32, write: bool) -> i64 {
    seg as i64 | (bytes as i64) << 8 | (write as i64) << 16
}
