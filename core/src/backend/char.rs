//! Character devices: terminals, pipes, sockets.

/// What happens to the host side besides data.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CharEvent {
    /// Somebody connected.
    Opened,
    /// They left.
    Closed,
    /// A break condition.
    Break,
}

/// Takes input; returns how many bytes it took. On the I/O thread, no lock held.
pub type CharReceiver = Box<dyn Fn(&[u8]) -> usize + Send + Sync>;

/// The host side of a serial port or console.
pub trait CharBackend: Send + Sync {
    /// Sends bytes; returns how many were taken, without blocking. If fewer than given,
    /// the writable listener is called when it is worth trying again.
    fn write(&self, data: &[u8]) -> usize;

    /// Sets who takes input. Bytes not taken are kept and offered again after
    /// [`CharBackend::input_ready`].
    fn set_receiver(&self, receiver: CharReceiver);

    /// The device can take input again.
    fn input_ready(&self);

    /// Sets who is told, on the I/O thread, that [`CharBackend::write`] can go on.
    fn set_writable_listener(&self, _listener: Box<dyn Fn() + Send + Sync>) {}

    /// Sets who is told of events, on the I/O thread.
    fn set_event_listener(&self, _listener: Box<dyn Fn(CharEvent) + Send + Sync>) {}

    /// Whether somebody connects and leaves, of which the event listener is told; until somebody has, output is dropped.
    fn has_connections(&self) -> bool {
        false
    }

    /// Writes everything out before the program ends.
    fn flush(&self) {}

    /// One line for the monitor.
    fn describe(&self) -> String {
        "character backend".to_owned()
    }
}
