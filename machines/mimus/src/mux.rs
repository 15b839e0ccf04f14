//! Ctrl-A: the keys that are for mimus and not for the guest, on a shared terminal.

/// The escape character, Ctrl-A.
pub const ESCAPE: u8 = 0x01;

/// What `Ctrl-A h` prints.
pub const HELP: &str = "\
Ctrl-A h    this help
Ctrl-A x    end mimus
Ctrl-A c    switch between the console and the monitor
Ctrl-A b    send a break to the serial port
Ctrl-A s    write disks' pending data out
Ctrl-A Ctrl-A    send Ctrl-A to the guest
";

/// Who has the keyboard.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Focus {
    /// The guest's serial port.
    Serial,
    /// The monitor.
    Monitor,
}

/// What some input means.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event {
    /// Bytes for the guest.
    Serial(Vec<u8>),
    /// Bytes for the monitor.
    Monitor(Vec<u8>),
    /// Ctrl-A x
    Quit,
    /// Ctrl-A h
    Help,
    /// Ctrl-A c; the keyboard is now the named one's.
    Switch(Focus),
    /// Ctrl-A b
    Break,
    /// Ctrl-A s
    Sync,
}

/// Splits what is typed between guest, monitor and mimus itself.
#[derive(Debug)]
pub struct Mux {
    focus: Focus,
    monitor: bool,
    escaped: bool,
}

impl Mux {
    /// A multiplexer with the keyboard at the serial port; `monitor` says if there is a monitor.
    pub fn new(monitor: bool) -> Self {
        Mux { focus: Focus::Serial, monitor, escaped: false }
    }

    /// Takes input; the events are in order, bytes for the same receiver in one.
    pub fn feed(&mut self, input: &[u8]) -> Vec<Event> {
        let mut events = Vec::new();
        for &byte in input {
            if self.escaped {
                self.escaped = false;
                self.command(byte, &mut events);
            } else if byte == ESCAPE {
                self.escaped = true;
            } else {
                self.pass(byte, &mut events);
            }
        }
        events
    }

    fn command(&mut self, byte: u8, events: &mut Vec<Event>) {
        match byte {
            ESCAPE => self.pass(ESCAPE, events),
            b'x' => events.push(Event::Quit),
            b'h' | b'?' => events.push(Event::Help),
            b'b' => events.push(Event::Break),
            b's' => events.push(Event::Sync),
            b'c' if self.monitor => {
                self.focus = if self.focus == Focus::Serial { Focus::Monitor } else { Focus::Serial };
                events.push(Event::Switch(self.focus));
            }
            // Not a command: nobody gets it, as in QEMU.
            _ => {}
        }
    }

    fn pass(&self, byte: u8, events: &mut Vec<Event>) {
        match (self.focus, events.last_mut()) {
            (Focus::Serial, Some(Event::Serial(bytes))) | (Focus::Monitor, Some(Event::Monitor(bytes))) => {
                bytes.push(byte)
            }
            (Focus::Serial, _) => events.push(Event::Serial(vec![byte])),
            (Focus::Monitor, _) => events.push(Event::Monitor(vec![byte])),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn commands_and_bytes() {
        let mut mux = Mux::new(true);
        assert_eq!(mux.feed(b"ls\r"), [Event::Serial(b"ls\r".to_vec())]);
        assert_eq!(
            mux.feed(b"a\x01hb\x01\x01"),
            [Event::Serial(b"a".to_vec()), Event::Help, Event::Serial(b"b\x01".to_vec())]
        );
        assert_eq!(mux.feed(b"\x01"), []);
        assert_eq!(mux.feed(b"x"), [Event::Quit]);
        assert_eq!(
            mux.feed(b"\x01cinfo\x01cx"),
            [
                Event::Switch(Focus::Monitor),
                Event::Monitor(b"info".to_vec()),
                Event::Switch(Focus::Serial),
                Event::Serial(b"x".to_vec())
            ]
        );
        assert_eq!(mux.feed(b"\x01b\x01s\x01q"), [Event::Break, Event::Sync]);
    }

    #[test]
    fn without_a_monitor_there_is_nothing_to_switch_to() {
        assert_eq!(Mux::new(false).feed(b"\x01cx"), [Event::Serial(b"x".to_vec())]);
    }
}
