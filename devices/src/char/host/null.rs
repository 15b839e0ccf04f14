//! Drops output, gives no input.

use std::sync::Arc;

use mimus_core::backend::CharBackend;
use mimus_core::backend::char::CharReceiver;

/// `null`.
#[derive(Debug, Default)]
pub struct NullChar;

impl NullChar {
    /// A back end that is not there.
    pub fn new() -> Arc<Self> {
        Arc::new(NullChar)
    }
}

impl CharBackend for NullChar {
    fn write(&self, data: &[u8]) -> usize {
        data.len()
    }

    fn set_receiver(&self, _: CharReceiver) {}

    fn input_ready(&self) {}

    fn describe(&self) -> String {
        "null".to_owned()
    }
}
