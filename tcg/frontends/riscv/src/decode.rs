//! The decoder generated from `decode/*.decode`; see `mimus_tcg_decode` for the notation.

#[allow(
    clippy::all,
    clippy::pedantic,
    missing_docs,
    unused_parens,
    unused_variables,
    reason = "generated source favours a simple generator"
)]
mod generated {
    include!(concat!(env!("OUT_DIR"), "/decode.rs"));
}

pub use generated::*;

/// Length in bytes of the instruction that starts with the halfword `low` (vol. I, 1.5). The longer formats
/// that are reserved for the future count as 4: they are illegal whatever follows.
pub const fn insn_len(low: u16) -> u8 {
    if low & 3 == 3 { 4 } else { 2 }
}
