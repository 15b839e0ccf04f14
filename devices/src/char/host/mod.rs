//! The host side of character devices: where a serial port's bytes come from and go to.
//!
//! All of them keep the rules of [`CharBackend`](mimus_core::backend::CharBackend): `write` queues and never
//! waits, and everything told to the device happens on the I/O thread with no lock held, so a device may call in
//! with its own lock held.

/// The [`CharBackend`](mimus_core::backend::CharBackend) methods of a back end with a field `stream`.
macro_rules! stream_methods {
    () => {
        fn write(&self, data: &[u8]) -> usize {
            self.stream.write(data)
        }

        fn set_receiver(&self, receiver: mimus_core::backend::char::CharReceiver) {
            self.stream.set_receiver(receiver);
        }

        fn input_ready(&self) {
            self.stream.input_ready();
        }

        fn set_writable_listener(&self, listener: Box<dyn Fn() + Send + Sync>) {
            self.stream.set_writable_listener(listener);
        }

        fn set_event_listener(&self, listener: Box<dyn Fn(mimus_core::backend::CharEvent) + Send + Sync>) {
            self.stream.set_event_listener(listener);
        }

        fn has_connections(&self) -> bool {
            true
        }

        fn flush(&self) {
            self.stream.flush();
        }
    };
}
use stream_methods;

pub mod file;
pub mod null;
pub mod pipe;
mod port;
pub mod pty;
pub mod ringbuf;
mod sink;
pub mod socket;
pub mod stdio;
mod stream;
mod telnet;

pub use file::FileChar;
pub use null::NullChar;
pub use pipe::PipeChar;
pub use pty::PtyChar;
pub use ringbuf::RingBuf;
pub use socket::{SocketAddress, SocketChar, SocketOptions};
pub use stdio::StdioChar;
