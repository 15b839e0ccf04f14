//! Traces: their files, and what can be asked of them.
//!
//! A trace is one file: a header in JSON, then sections, each a letter, a length and its contents. `D` says what code
//! a number stands for; `C` is a stretch of one vCPU's trace; `E` ends it with what it holds. All numbers are little
//! endian.
//!
//! A vCPU's words ([`mimus_core::accel::trace::words`]) are mostly what followed the same two words last time, and
//! its addresses and values what the same instruction's were, and a stride: [`encode`] writes what differs. The
//! encoder's and the reader's state goes on from stretch to stretch, so a trace is read from its begin.

pub mod encode;
pub mod file;
pub mod filter;
pub mod read;
pub mod report;
pub mod writer;

pub use file::{Header, TraceError};
pub use filter::Filter;
pub use read::{Reader, Record};
pub use writer::TraceWriter;
