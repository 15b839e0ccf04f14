//! What every back end has: those who are told, and input the device has not taken yet.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use mimus_core::backend::CharEvent;
use mimus_core::backend::char::CharReceiver;
use mimus_core::device::lock;

type Listener<F> = Mutex<Option<Arc<F>>>;

/// Those who are told. Nobody is called with a lock of ours held.
#[derive(Default)]
pub(super) struct Port {
    receiver: Listener<CharReceiver>,
    writable: Listener<Box<dyn Fn() + Send + Sync>>,
    event: Listener<Box<dyn Fn(CharEvent) + Send + Sync>>,
    /// Input not taken yet. Only the I/O thread (or one reader thread) adds and removes.
    pending: Mutex<VecDeque<u8>>,
    /// The receiver took less than it was offered.
    stalled: AtomicBool,
    /// Counts calls of `input_ready`.
    ready: AtomicU64,
}

/// Most bytes offered at once.
const CHUNK: usize = 4096;

fn current<F>(listener: &Listener<F>) -> Option<Arc<F>> {
    lock(listener).clone()
}

impl Port {
    pub(super) fn set_receiver(&self, receiver: CharReceiver) {
        *lock(&self.receiver) = Some(Arc::new(receiver));
    }

    pub(super) fn set_writable_listener(&self, listener: Box<dyn Fn() + Send + Sync>) {
        *lock(&self.writable) = Some(Arc::new(listener));
    }

    pub(super) fn set_event_listener(&self, listener: Box<dyn Fn(CharEvent) + Send + Sync>) {
        *lock(&self.event) = Some(Arc::new(listener));
    }

    /// Says that writing can go on.
    pub(super) fn writable(&self) {
        if let Some(listener) = current(&self.writable) {
            listener();
        }
    }

    /// Says what happened.
    pub(super) fn event(&self, event: CharEvent) {
        if let Some(listener) = current(&self.event) {
            listener(event);
        }
    }

    /// Offers input; true if all that waits was taken.
    pub(super) fn input(&self, data: &[u8]) -> bool {
        lock(&self.pending).extend(data);
        self.deliver()
    }

    /// Offers what waits; true if all of it was taken.
    pub(super) fn deliver(&self) -> bool {
        loop {
            let seen = self.ready.load(Ordering::SeqCst);
            let chunk: Vec<u8> = lock(&self.pending).iter().take(CHUNK).copied().collect();
            if chunk.is_empty() {
                return true;
            }
            let taken = current(&self.receiver).map_or(0, |r| r(&chunk)).min(chunk.len());
            lock(&self.pending).drain(..taken);
            if taken == chunk.len() {
                continue;
            }
            // Either `input_ready` sees this, or its count is seen here: no wake-up is lost.
            self.stalled.store(true, Ordering::SeqCst);
            if self.ready.load(Ordering::SeqCst) == seen {
                return false;
            }
        }
    }

    /// The device can take input; true if some waits for it, so that [`Port::deliver`] is due.
    pub(super) fn input_ready(&self) -> bool {
        self.ready.fetch_add(1, Ordering::SeqCst);
        self.stalled.swap(false, Ordering::SeqCst)
    }
}
