//! Exceptions (SDM volume 3 chapter 7).

use mimus_arch::x86::regs::*;

/// An exception that an instruction, or the delivery of another event, raised.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Exception {
    /// Vector, 0 to 31.
    pub vector: u8,
    /// Error code, of those that have one.
    pub error: Option<u32>,
    /// Page fault: the linear address. Debug: the bits to set in DR6.
    pub payload: u64,
}

/// What instructions answer.
pub type Result<T> = std::result::Result<T, Exception>;

impl Exception {
    /// One without an error code.
    pub const fn plain(vector: u8) -> Self {
        Self { vector, error: None, payload: 0 }
    }

    /// One with an error code.
    pub const fn with_code(vector: u8, code: u32) -> Self {
        Self { vector, error: Some(code), payload: 0 }
    }

    /// `#GP(code)`
    pub const fn gp(code: u32) -> Self {
        Self::with_code(VECTOR_GP, code)
    }

    /// `#GP(selector)`: the index and table of it.
    pub const fn gp_sel(selector: u16) -> Self {
        Self::gp(selector as u32 & 0xfffc)
    }

    /// `#SS(code)`
    pub const fn ss(code: u32) -> Self {
        Self::with_code(VECTOR_SS, code)
    }

    /// `#NP(selector)`
    pub const fn np(selector: u16) -> Self {
        Self::with_code(VECTOR_NP, selector as u32 & 0xfffc)
    }

    /// `#TS(selector)`
    pub const fn ts(selector: u16) -> Self {
        Self::with_code(VECTOR_TS, selector as u32 & 0xfffc)
    }

    /// `#PF`
    pub const fn page(code: u32, address: u64) -> Self {
        Self { vector: VECTOR_PF, error: Some(code), payload: address }
    }

    /// `#UD`
    pub const UD: Self = Self::plain(VECTOR_UD);
    /// `#NM`
    pub const NM: Self = Self::plain(VECTOR_NM);
    /// `#DE`
    pub const DE: Self = Self::plain(VECTOR_DE);
    /// `#GP(0)`
    pub const GP0: Self = Self::gp(0);

    /// Contributory exceptions and page faults combine to a double fault (SDM table 7-5).
    pub const fn doubles_after(&self, first: u8) -> bool {
        const fn is_contributory(v: u8) -> bool {
            matches!(v, VECTOR_DE | VECTOR_TS | VECTOR_NP | VECTOR_SS | VECTOR_GP)
        }
        (is_contributory(first) && is_contributory(self.vector))
            || (first == VECTOR_PF && (is_contributory(self.vector) || self.vector == VECTOR_PF))
    }
}
