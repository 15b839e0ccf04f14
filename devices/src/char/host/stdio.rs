//! Standard input and output, as plain bytes: raw mode and the escape keys are the program's business.

use std::os::fd::OwnedFd;
use std::sync::{Arc, Condvar, Mutex, PoisonError, Weak};

use mimus_core::backend::char::CharReceiver;
use mimus_core::backend::{CharBackend, CharEvent};
use mimus_core::device::lock;
use mimus_core::error::HostError;
use mimus_core::io_thread::{FdRegistration, Interest, IoThreadHandle};
use rustix::io::Errno;

use super::port::Port;
use super::sink::Sink;

/// `stdio`: descriptors 0 and 1.
pub struct StdioChar {
    inner: Arc<Inner>,
    sink: Sink,
}

struct Inner {
    port: Arc<Port>,
    io: IoThreadHandle,
    input: Mutex<Input>,
    /// For the reader thread: input may go on.
    resume: Condvar,
}

enum Input {
    /// Nothing more comes.
    Ended,
    /// Polled by the I/O thread.
    Polled(FdRegistration),
    /// Read by a thread, as the file cannot be polled; true while it must wait.
    Threaded(bool),
}

impl StdioChar {
    /// A back end on the process's standard input and output.
    pub fn open(io: &IoThreadHandle) -> Result<Arc<Self>, HostError> {
        let dup = |fd, what: &str| {
            rustix::io::fcntl_dupfd_cloexec(fd, 3).map_err(|e| HostError::new(format!("use standard {what}"), e))
        };
        // A closed standard input is one at its end.
        let input = rustix::io::fcntl_dupfd_cloexec(rustix::stdio::stdin(), 3).ok();
        Self::with_fds(io, input, dup(rustix::stdio::stdout(), "output")?)
    }

    /// The same with descriptors of one's own; neither is made non-blocking, as others may share them.
    pub fn with_fds(io: &IoThreadHandle, input: Option<OwnedFd>, output: OwnedFd) -> Result<Arc<Self>, HostError> {
        let port = Arc::new(Port::default());
        let sink = Sink::spawn("standard output", output, port.clone(), io)?;
        let inner = Inner { port, io: io.clone(), input: Mutex::new(Input::Ended), resume: Condvar::new() };
        let inner = Arc::new(inner);
        if let Some(fd) = input {
            inner.start(Arc::new(fd))?;
        }
        Ok(Arc::new(StdioChar { inner, sink }))
    }
}

impl Inner {
    fn start(self: &Arc<Self>, fd: Arc<OwnedFd>) -> Result<(), HostError> {
        let (weak, ours) = (Arc::downgrade(self), fd.clone());
        // Held while registering, so that the first callback finds the registration.
        let mut input = lock(&self.input);
        let callback = move |_| {
            if let Some(this) = Weak::upgrade(&weak) {
                this.readable(&ours);
            }
        };
        if let Ok(registration) = self.io.register_fd(fd.clone(), Interest::READ, callback) {
            *input = Input::Polled(registration);
            return Ok(());
        }
        // epoll does not take regular files and /dev/null.
        *input = Input::Threaded(false);
        drop(input);
        let weak = Arc::downgrade(self);
        self.io.spawn_worker("stdin", move || {
            let mut buf = [0; 4096];
            while let Some(n) = read(&fd, &mut buf).filter(|&n| n > 0) {
                let Some(this) = Weak::upgrade(&weak) else { return };
                if !this.hand_over(&buf[..n]) {
                    return;
                }
            }
            if let Some(this) = Weak::upgrade(&weak) {
                let this2 = this.clone();
                this.io.run_soon(move || this2.end());
            }
        })?;
        Ok(())
    }

    fn readable(&self, fd: &OwnedFd) {
        let mut buf = [0; 4096];
        match rustix::io::read(fd, &mut buf) {
            Ok(n) if n > 0 => {
                let all = self.port.input(&buf[..n]);
                self.set_reading(all);
            }
            Err(Errno::AGAIN | Errno::INTR) => {}
            _ => self.end(),
        }
    }

    fn set_reading(&self, on: bool) {
        let interest = if on { Interest::READ } else { Interest::NONE };
        match &mut *lock(&self.input) {
            Input::Polled(registration) => {
                if let Err(e) = registration.set_interest(interest) {
                    log::error!("standard input: {e}");
                }
            }
            Input::Threaded(paused) => {
                *paused = !on;
                self.resume.notify_all();
            }
            Input::Ended => {}
        }
    }

    /// On the reader thread: gives input to the I/O thread and waits until it was taken.
    fn hand_over(self: &Arc<Self>, data: &[u8]) -> bool {
        self.set_reading(false);
        let (this, data) = (Arc::downgrade(self), data.to_vec());
        self.io.run_soon(move || {
            if let Some(this) = this.upgrade() {
                let all = this.port.input(&data);
                this.set_reading(all);
            }
        });
        let mut input = lock(&self.input);
        while matches!(*input, Input::Threaded(true)) {
            input = self.resume.wait(input).unwrap_or_else(PoisonError::into_inner);
        }
        matches!(*input, Input::Threaded(false))
    }

    fn deliver(&self) {
        let all = self.port.deliver();
        self.set_reading(all);
    }

    fn end(&self) {
        *lock(&self.input) = Input::Ended;
        self.port.event(CharEvent::Closed);
    }
}

/// `None` on an error that does not pass.
fn read(fd: &OwnedFd, buf: &mut [u8]) -> Option<usize> {
    loop {
        match rustix::io::read(fd, &mut *buf) {
            Ok(n) => return Some(n),
            Err(Errno::INTR) => {}
            Err(_) => return None,
        }
    }
}

impl CharBackend for StdioChar {
    fn write(&self, data: &[u8]) -> usize {
        self.sink.write(data)
    }

    fn set_receiver(&self, receiver: CharReceiver) {
        self.inner.port.set_receiver(receiver);
        let inner = self.inner.clone();
        self.inner.io.run_soon(move || inner.deliver());
    }

    fn input_ready(&self) {
        if self.inner.port.input_ready() {
            let inner = self.inner.clone();
            self.inner.io.run_soon(move || inner.deliver());
        }
    }

    fn set_writable_listener(&self, listener: Box<dyn Fn() + Send + Sync>) {
        self.inner.port.set_writable_listener(listener);
    }

    fn set_event_listener(&self, listener: Box<dyn Fn(CharEvent) + Send + Sync>) {
        self.inner.port.set_event_listener(listener);
    }

    fn flush(&self) {
        self.sink.flush();
    }

    fn describe(&self) -> String {
        "stdio".to_owned()
    }
}

impl Drop for StdioChar {
    fn drop(&mut self) {
        // Lets a waiting reader thread go.
        *lock(&self.inner.input) = Input::Ended;
        self.inner.resume.notify_all();
    }
}
