//! Keeps the last output in memory, for the monitor and for tests, which may type as well.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex};

use mimus_core::backend::CharBackend;
use mimus_core::backend::char::CharReceiver;
use mimus_core::device::lock;

use super::port::Port;

/// A memory of the last bytes written; older ones are forgotten.
pub struct RingBuf {
    capacity: usize,
    kept: Mutex<VecDeque<u8>>,
    port: Port,
}

impl RingBuf {
    /// A buffer of `capacity` bytes, at least one.
    pub fn new(capacity: usize) -> Arc<Self> {
        Arc::new(RingBuf { capacity: capacity.max(1), kept: Mutex::default(), port: Port::default() })
    }

    /// Takes out the oldest bytes, at most `max`.
    pub fn take(&self, max: usize) -> Vec<u8> {
        let mut kept = lock(&self.kept);
        let n = max.min(kept.len());
        kept.drain(..n).collect()
    }

    /// What is kept.
    pub fn contents(&self) -> Vec<u8> {
        lock(&self.kept).iter().copied().collect()
    }

    /// Types into the device, from a thread that holds no device's lock. What the device does not take waits.
    pub fn type_in(&self, data: &[u8]) {
        self.port.input(data);
    }

    /// Offers again what the device did not take; true if nothing is left.
    pub fn deliver(&self) -> bool {
        self.port.deliver()
    }
}

impl CharBackend for RingBuf {
    fn write(&self, data: &[u8]) -> usize {
        let mut kept = lock(&self.kept);
        let keep = &data[data.len().saturating_sub(self.capacity)..];
        let excess = (kept.len() + keep.len()).saturating_sub(self.capacity);
        kept.drain(..excess);
        kept.extend(keep);
        data.len()
    }

    fn set_receiver(&self, receiver: CharReceiver) {
        self.port.set_receiver(receiver);
    }

    fn input_ready(&self) {
        self.port.input_ready();
    }

    fn describe(&self) -> String {
        format!("ringbuf of {} bytes, {} used", self.capacity, lock(&self.kept).len())
    }
}
