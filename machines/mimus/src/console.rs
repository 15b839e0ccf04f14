//! The terminal as the guest's serial port, shared with the monitor by Ctrl-A.
//!
//! Two threads of its own: one reads what is typed, one writes what the guest and the
//! monitor print, so that a slow terminal never holds up a vCPU. Which keys are whose is
//! decided by [`Mux`]; the machine is told through [`Control`]. Input reaches the device on
//! the machine's I/O thread only: a device may ask for more with its own lock held.

use std::collections::VecDeque;
use std::io::{Read, Write};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, Weak};
use std::time::{Duration, Instant};

use mimus_core::backend::char::{CharBackend, CharEvent, CharReceiver};
use mimus_core::io_thread::IoThreadHandle;

use crate::monitor::{self, Control, Session};
use crate::mux::{self, Event, Focus, Mux};

/// Most output waiting for the terminal; the guest's UART waits beyond.
const OUTPUT_LIMIT: usize = 64 << 10;
/// Most typed bytes waiting for the guest; more are dropped, as a serial line would.
const INPUT_LIMIT: usize = 64 << 10;
/// How long the end of the program waits for the terminal to take the rest.
const FLUSH_TIME: Duration = Duration::from_secs(2);
/// How long the writing thread waits, once woken, for what else is to be written.
const GATHERING: Duration = Duration::from_micros(500);

/// How the terminal is shared.
#[derive(Debug, Clone, Copy)]
pub struct Sharing {
    /// Ctrl-A is for mimus.
    pub escape: bool,
    /// Ctrl-A c leads to a monitor.
    pub monitor: bool,
}

/// The terminal.
pub struct Console {
    /// What is to be printed.
    output: Mutex<Output>,
    /// Told when `output` changes, in both directions.
    output_changed: Condvar,
    /// Typed and not taken yet.
    input: Mutex<VecDeque<u8>>,
    receiver: OnceLock<CharReceiver>,
    io_thread: IoThreadHandle,
    this: Weak<Console>,
    writable: OnceLock<Box<dyn Fn() + Send + Sync>>,
    events: OnceLock<Box<dyn Fn(CharEvent) + Send + Sync>>,
    control: OnceLock<Arc<dyn Control>>,
    monitor: OnceLock<Session>,
    /// The keyboard is the monitor's.
    in_monitor: AtomicBool,
}

#[derive(Default)]
struct Output {
    waiting: VecDeque<u8>,
    /// The writing thread waits for something to write.
    asleep: bool,
    /// It has taken bytes that it has not written yet.
    writing: bool,
    /// Somebody got fewer bytes in than they had.
    refused: bool,
    /// The terminal is gone: output is dropped.
    broken: bool,
}

impl Console {
    /// Starts the threads. `input` and `output` are standard input and output, but for tests.
    pub fn start(
        input: Box<dyn Read + Send>,
        output: Box<dyn Write + Send>,
        sharing: Sharing,
        io_thread: &IoThreadHandle,
    ) -> std::io::Result<Arc<Self>> {
        let console = Arc::new_cyclic(|this| Console {
            output: Mutex::default(),
            output_changed: Condvar::new(),
            input: Mutex::default(),
            receiver: OnceLock::new(),
            io_thread: io_thread.clone(),
            this: this.clone(),
            writable: OnceLock::new(),
            events: OnceLock::new(),
            control: OnceLock::new(),
            monitor: OnceLock::new(),
            in_monitor: AtomicBool::new(false),
        });
        if sharing.monitor {
            let (for_machine, for_print) = (Arc::downgrade(&console), Arc::downgrade(&console));
            // What comes before the machine is there waits for it: building one takes milliseconds, and fails by ending
            // the program.
            let machine = move || match for_machine.upgrade() {
                Some(console) => console.control.wait().clone(),
                None => unreachable!("the reading thread holds it"),
            };
            let print = move |bytes: &[u8]| {
                if let Some(console) = for_print.upgrade() {
                    console.output().waiting.extend(bytes);
                    console.output_changed.notify_all();
                }
            };
            let _ = console.monitor.set(Session::start(machine, print)?);
        }
        let writer = Arc::clone(&console);
        std::thread::Builder::new().name("console-out".into()).spawn(move || writer.write_loop(output))?;
        let reader = Arc::clone(&console);
        std::thread::Builder::new().name("console-in".into()).spawn(move || reader.read_loop(input, sharing))?;
        Ok(console)
    }

    /// Gives the keys of Ctrl-A and the monitor a machine to act on. Only the first call counts.
    pub fn attach(&self, control: Arc<dyn Control>) {
        let _ = self.control.set(control);
    }

    /// Says something to whoever sits there, whose keyboard it is or not.
    pub fn announce(&self, text: &str) {
        match self.monitor.get() {
            Some(session) if self.in_monitor.load(Ordering::Relaxed) => session.announce(text),
            Some(_) => self.print(&format!("\n{text}(Ctrl-A c leads to the monitor)\n")),
            None => self.print(&format!("\n{text}")),
        }
    }

    fn output(&self) -> MutexGuard<'_, Output> {
        self.output.lock().unwrap_or_else(|e| e.into_inner())
    }

    /// Prints text of ours, with line ends as a raw terminal needs them. Never refused.
    fn print(&self, text: &str) {
        self.output().waiting.extend(text.replace('\n', "\r\n").bytes());
        self.output_changed.notify_all();
    }

    fn write_loop(&self, mut terminal: Box<dyn Write + Send>) {
        loop {
            let mut state = self.output();
            let mut woken = false;
            while state.waiting.is_empty() {
                (state.asleep, woken) = (true, true);
                state = self.output_changed.wait(state).unwrap_or_else(|e| e.into_inner());
            }
            if woken {
                // More is on its way, mostly, a character at a time: whoever writes it need not wake us for each.
                drop(state);
                std::thread::sleep(GATHERING);
                state = self.output();
            }
            let bytes: Vec<u8> = state.waiting.drain(..).collect();
            state.writing = true;
            let tell = std::mem::take(&mut state.refused);
            let broken = state.broken;
            drop(state);
            let failed = !broken && terminal.write_all(&bytes).and_then(|()| terminal.flush()).is_err();
            {
                let mut state = self.output();
                state.writing = false;
                state.broken |= failed;
            }
            self.output_changed.notify_all();
            if let Some(listener) = self.writable.get().filter(|_| tell) {
                listener();
            }
        }
    }

    fn read_loop(&self, mut keyboard: Box<dyn Read + Send>, sharing: Sharing) {
        let mut mux = Mux::new(sharing.monitor);
        let mut buffer = [0; 4096];
        loop {
            let count = match keyboard.read(&mut buffer) {
                Ok(0) => return,
                Ok(n) => n,
                Err(e) if e.kind() == std::io::ErrorKind::Interrupted => continue,
                Err(_) => return,
            };
            if !sharing.escape {
                self.typed(&buffer[..count]);
                continue;
            }
            for event in mux.feed(&buffer[..count]) {
                self.handle(event);
            }
        }
    }

    fn handle(&self, event: Event) {
        match event {
            Event::Serial(bytes) => self.typed(&bytes),
            Event::Monitor(bytes) => {
                if let Some(session) = self.monitor.get() {
                    session.typed(&bytes);
                }
            }
            Event::Help => self.print(&format!("\n{}", mux::HELP)),
            Event::Switch(Focus::Monitor) => {
                self.in_monitor.store(true, Ordering::Relaxed);
                self.print(&format!("\n{}{}", monitor::GREETING, monitor::PROMPT));
            }
            Event::Switch(Focus::Serial) => {
                self.in_monitor.store(false, Ordering::Relaxed);
                self.print("\n");
            }
            Event::Break => {
                if let Some(listener) = self.events.get() {
                    listener(CharEvent::Break);
                }
            }
            Event::Sync => {
                if let Some(control) = self.control.get() {
                    control.sync();
                }
            }
            Event::Quit => match self.control.get() {
                Some(control) => control.quit(),
                // The machine is not built yet: there is nothing to end but this program.
                None => {
                    crate::terminal::restore();
                    std::process::exit(0);
                }
            },
        }
    }

    /// On the I/O thread: offers what was typed to the device.
    fn deliver(&self) {
        let Some(receiver) = self.receiver.get() else {
            return;
        };
        // Taken out while the device looks at it, so that no lock of ours is held there.
        let waiting: Vec<u8> = std::mem::take(&mut *self.input.lock().unwrap_or_else(|e| e.into_inner())).into();
        if waiting.is_empty() {
            return;
        }
        let taken = receiver(&waiting).min(waiting.len());
        let mut input = self.input.lock().unwrap_or_else(|e| e.into_inner());
        for byte in waiting[taken..].iter().rev() {
            input.push_front(*byte);
        }
    }

    fn typed(&self, bytes: &[u8]) {
        {
            let mut input = self.input.lock().unwrap_or_else(|e| e.into_inner());
            let room = INPUT_LIMIT - input.len().min(INPUT_LIMIT);
            input.extend(&bytes[..bytes.len().min(room)]);
        }
        self.input_ready();
    }
}

impl CharBackend for Console {
    fn write(&self, data: &[u8]) -> usize {
        let mut state = self.output();
        let room = OUTPUT_LIMIT.saturating_sub(state.waiting.len());
        let taken = data.len().min(room);
        state.waiting.extend(&data[..taken]);
        state.refused |= taken < data.len();
        // A system call for each byte otherwise, needed or not: the writing thread looks again before it sleeps.
        if std::mem::take(&mut state.asleep) {
            drop(state);
            self.output_changed.notify_all();
        }
        taken
    }

    fn set_receiver(&self, receiver: CharReceiver) {
        let _ = self.receiver.set(receiver);
        self.input_ready();
    }

    fn input_ready(&self) {
        let this = self.this.clone();
        self.io_thread.run_soon(move || {
            if let Some(console) = this.upgrade() {
                console.deliver();
            }
        });
    }

    fn set_writable_listener(&self, listener: Box<dyn Fn() + Send + Sync>) {
        let _ = self.writable.set(listener);
    }

    fn set_event_listener(&self, listener: Box<dyn Fn(CharEvent) + Send + Sync>) {
        let _ = self.events.set(listener);
    }

    fn flush(&self) {
        let end = Instant::now() + FLUSH_TIME;
        let mut state = self.output();
        while (!state.waiting.is_empty() || state.writing) && Instant::now() < end {
            let left = end.saturating_duration_since(Instant::now());
            state = self.output_changed.wait_timeout(state, left).unwrap_or_else(|e| e.into_inner()).0;
        }
    }

    fn describe(&self) -> String {
        "this terminal".into()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::{Receiver, channel};

    use mimus_core::clock::Clocks;
    use mimus_core::io_thread::IoThread;

    use super::*;

    /// Gives what is sent to it, one message for each read.
    struct Keyboard(Receiver<Vec<u8>>);

    impl Read for Keyboard {
        fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
            let Ok(bytes) = self.0.recv() else {
                return Ok(0);
            };
            buffer[..bytes.len()].copy_from_slice(&bytes);
            Ok(bytes.len())
        }
    }

    #[derive(Clone, Default)]
    struct Screen(Arc<Mutex<Vec<u8>>>);

    impl Write for Screen {
        fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
            self.0.lock().unwrap().extend(bytes);
            Ok(bytes.len())
        }
        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }

    struct Machine(std::sync::mpsc::Sender<&'static str>);

    impl Control for Machine {
        fn status(&self) -> String {
            "running".into()
        }
        fn stop(&self) {}
        fn cont(&self) {}
        fn reset(&self) {}
        fn powerdown(&self) {}
        fn wakeup(&self) -> String {
            String::new()
        }
        fn input(&self, _: &[mimus_core::backend::InputEvent]) -> String {
            String::new()
        }
        fn sync(&self) {}
        fn registers(&self) -> String {
            String::new()
        }
        fn accelerator(&self) -> String {
            String::new()
        }
        fn quit(&self) {
            let _ = self.0.send("quit");
        }
    }

    fn io_thread() -> IoThread {
        IoThread::spawn("io-test", &Clocks::new()).unwrap()
    }

    #[test]
    fn guest_monitor_and_quit_share_a_terminal() {
        let io = io_thread();
        let (keys, keyboard) = channel();
        let (told, machine) = channel();
        let screen = Screen::default();
        let sharing = Sharing { escape: true, monitor: true };
        let console =
            Console::start(Box::new(Keyboard(keyboard)), Box::new(screen.clone()), sharing, io.handle()).unwrap();
        console.attach(Arc::new(Machine(told)));
        let (got, guest) = channel();
        let got = Mutex::new(got);
        // A UART with a one-byte FIFO.
        console.set_receiver(Box::new(move |bytes| {
            let _ = got.lock().unwrap().send(bytes[0]);
            1
        }));
        assert_eq!(console.write(b"login: "), 7);
        keys.send(b"ab\x01\x01".to_vec()).unwrap();
        assert_eq!(guest.recv().unwrap(), b'a');
        console.input_ready();
        console.input_ready();
        assert_eq!((guest.recv().unwrap(), guest.recv().unwrap()), (b'b', 1));
        keys.send(b"\x01cinfo status\r\x01c\x01x".to_vec()).unwrap();
        assert_eq!(machine.recv().unwrap(), "quit");
        console.flush();
        let text = String::from_utf8(screen.0.lock().unwrap().clone()).unwrap();
        assert!(
            text.starts_with("login: ") && text.contains("(mimus) info status\r\nVM status: running\r\n"),
            "{text:?}"
        );
    }

    #[test]
    fn without_the_escape_every_byte_is_the_guests() {
        let io = io_thread();
        let (keys, keyboard) = channel();
        let console = Console::start(
            Box::new(Keyboard(keyboard)),
            Box::new(Screen::default()),
            Sharing { escape: false, monitor: false },
            io.handle(),
        )
        .unwrap();
        keys.send(b"\x01x".to_vec()).unwrap();
        let (got, guest) = channel();
        let got = Mutex::new(got);
        console.set_receiver(Box::new(move |bytes| {
            let _ = got.lock().unwrap().send(bytes.to_vec());
            bytes.len()
        }));
        assert_eq!(guest.recv().unwrap(), b"\x01x");
    }

    #[test]
    fn characters_that_come_one_by_one_are_written_together() {
        struct Counting(Screen, Arc<std::sync::atomic::AtomicU32>);
        impl Write for Counting {
            fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
                self.1.fetch_add(1, Ordering::Relaxed);
                self.0.write(bytes)
            }
            fn flush(&mut self) -> std::io::Result<()> {
                Ok(())
            }
        }
        let (screen, writes) = (Screen::default(), Arc::default());
        let io = io_thread();
        let (_keys, keyboard) = channel();
        let console = Console::start(
            Box::new(Keyboard(keyboard)),
            Box::new(Counting(screen.clone(), Arc::clone(&writes))),
            Sharing { escape: false, monitor: false },
            io.handle(),
        )
        .unwrap();
        let text: Vec<u8> = (0..200).map(|n| b'a' + n % 26).collect();
        for character in text.chunks(1) {
            assert_eq!(console.write(character), 1);
            // As long as a kernel takes for one.
            let now = Instant::now();
            while now.elapsed() < Duration::from_micros(20) {}
        }
        console.flush();
        assert_eq!(*screen.0.lock().unwrap(), text);
        let writes = writes.load(Ordering::Relaxed);
        assert!(writes <= 100, "{writes} writes");
    }

    #[test]
    fn output_is_bounded_while_the_terminal_is_stuck() {
        struct Stuck(Receiver<()>);
        impl Write for Stuck {
            fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
                let _ = self.0.recv();
                Ok(bytes.len())
            }
            fn flush(&mut self) -> std::io::Result<()> {
                Ok(())
            }
        }
        let (release, held) = channel();
        let io = io_thread();
        let (_keys, keyboard) = channel();
        let console = Console::start(
            Box::new(Keyboard(keyboard)),
            Box::new(Stuck(held)),
            Sharing { escape: true, monitor: false },
            io.handle(),
        )
        .unwrap();
        let (tell, told) = channel();
        let tell = Mutex::new(tell);
        console.set_writable_listener(Box::new(move || {
            let _ = tell.lock().unwrap().send(());
        }));
        let mut total = 0;
        while console.write(&[b'x'; 1000]) == 1000 {
            total += 1000;
            assert!(total <= 3 * OUTPUT_LIMIT);
        }
        release.send(()).unwrap();
        release.send(()).unwrap();
        told.recv_timeout(Duration::from_secs(5)).unwrap();
    }
}
