//! A port for debug output of firmware: what is written goes to a character device, nothing comes back.
//!
//! Spec: the "port 0xe9 hack" of Bochs; port 0x402, where SeaBIOS and OVMF say what they do. Reading gives 0xe9, by
//! which software knows that somebody listens.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex};

use mimus_core::backend::CharBackend;
use mimus_core::bus::{BusFault, PioAccess};
use mimus_core::device::{MutLifecycle, MutPioDevice, lock};
use mimus_core::snapshot::{SaveRestore, Schema, SnapshotError, Stateless};

/// Bochs's port.
pub const PORT_BOCHS: u16 = 0xe9;
/// SeaBIOS's and OVMF's port.
pub const PORT_FIRMWARE: u16 = 0x402;
/// Access rules of the port.
pub use crate::ports::BYTE_PORTS as RULES;

const PRESENT: u8 = 0xe9;
/// Bytes kept while the host side takes none; more are lost.
const BACKLOG: usize = 64 * 1024;

/// A debug port.
pub struct DebugCon {
    host: Arc<dyn CharBackend>,
    waiting: VecDeque<u8>,
}

impl DebugCon {
    /// A port that writes to `host`.
    pub fn new(host: Arc<dyn CharBackend>) -> Arc<Mutex<DebugCon>> {
        let this = Arc::new(Mutex::new(DebugCon { host: host.clone(), waiting: VecDeque::new() }));
        let weak = Arc::downgrade(&this);
        host.set_writable_listener(Box::new(move || {
            if let Some(this) = weak.upgrade() {
                lock(&this).drain();
            }
        }));
        // A debug port hears nothing: input is taken and dropped.
        host.set_receiver(Box::new(|data| data.len()));
        this
    }

    fn drain(&mut self) {
        if self.waiting.is_empty() {
            return;
        }
        let sent = self.host.write(self.waiting.make_contiguous());
        self.waiting.drain(..sent.min(self.waiting.len()));
    }
}

impl MutPioDevice for DebugCon {
    fn pio_read(&mut self, _: PioAccess) -> Result<u64, BusFault> {
        Ok(PRESENT.into())
    }

    fn pio_write(&mut self, _: PioAccess, value: u64) -> Result<(), BusFault> {
        if self.waiting.len() < BACKLOG {
            self.waiting.push_back(value as u8);
        }
        self.drain();
        Ok(())
    }
}

impl MutLifecycle for DebugCon {}

impl SaveRestore for DebugCon {
    const SCHEMA: Schema = Schema::new("debugcon", 1);
    type State = Stateless;

    // What waits for the host is on its way.
    fn save_state(&self) -> Stateless {
        Stateless {}
    }

    fn restore_state(&mut self, _: Stateless) -> Result<(), SnapshotError> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{assert_round_trip, inb, outb};
    use mimus_core::backend::char::CharReceiver;
    use std::sync::atomic::{AtomicUsize, Ordering};

    #[derive(Default)]
    struct Host {
        text: Mutex<Vec<u8>>,
        room: AtomicUsize,
        listener: Mutex<Option<Box<dyn Fn() + Send + Sync>>>,
    }

    impl CharBackend for Host {
        fn write(&self, data: &[u8]) -> usize {
            let n = data.len().min(self.room.load(Ordering::Relaxed));
            self.room.fetch_sub(n, Ordering::Relaxed);
            lock(&self.text).extend(&data[..n]);
            n
        }
        fn set_receiver(&self, receiver: CharReceiver) {
            assert_eq!(receiver(b"abc"), 3);
        }
        fn input_ready(&self) {}
        fn set_writable_listener(&self, listener: Box<dyn Fn() + Send + Sync>) {
            *lock(&self.listener) = Some(listener);
        }
    }

    #[test]
    fn writes_and_waits() {
        let host = Arc::new(Host::default());
        host.room.store(3, Ordering::Relaxed);
        let port = DebugCon::new(host.clone());
        assert_eq!(inb(&*port, 0, 0), 0xe9);
        b"hello".iter().for_each(|b| outb(&*port, 0, 0, *b));
        assert_eq!(*lock(&host.text), b"hel");
        host.room.store(usize::MAX, Ordering::Relaxed);
        lock(&host.listener).as_ref().unwrap()();
        assert_eq!(*lock(&host.text), b"hello");
        host.room.store(0, Ordering::Relaxed);
        (0..2 * BACKLOG).for_each(|_| outb(&*port, 0, 0, b'x'));
        assert_eq!(lock(&port).waiting.len(), BACKLOG);
        assert_round_trip(&port, &DebugCon::new(host));
    }
}
