//! An error of the host side that names what was being done.

use std::io;

/// The host refused something.
#[derive(Debug, thiserror::Error)]
#[error("cannot {what}: {source}")]
pub struct HostError {
    /// What was being done: "open disk.img", "start thread io-0".
    pub what: String,
    /// What the host said.
    pub source: io::Error,
}

impl HostError {
    /// For `map_err`.
    pub fn new(what: impl Into<String>, source: impl Into<io::Error>) -> Self {
        Self { what: what.into(), source: source.into() }
    }
}
