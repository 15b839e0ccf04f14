//! A non-blocking connection on the I/O thread: what pipes, pseudo-terminals and sockets share.
//!
//! Without a connection output is dropped, as on a cable nobody has plugged in.

use std::collections::VecDeque;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Arc, Condvar, Mutex, PoisonError, Weak};
use std::time::{Duration, Instant};

use mimus_core::backend::CharEvent;
use mimus_core::backend::char::CharReceiver;
use mimus_core::device::lock;
use mimus_core::error::HostError;
use mimus_core::io_thread::{FdRegistration, Interest, IoThreadHandle};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;

use super::port::Port;
use super::sink::{QUEUE, STUCK};
use super::telnet::Telnet;

/// Where a connection's bytes go through.
pub(super) struct Stream {
    name: String,
    port: Arc<Port>,
    io: IoThreadHandle,
    state: Mutex<State>,
    /// The connection came or went.
    changed: Condvar,
    /// What else is done when a connection ends, on the I/O thread.
    on_close: Mutex<Option<Arc<dyn Fn() + Send + Sync>>>,
}

/// Whether a connection speaks telnet, and from which side.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Telneting {
    Off,
    Client,
    Server,
}

#[derive(Default)]
struct State {
    link: Option<Link>,
    /// Number of the current link: a callback of an earlier one does nothing.
    generation: u64,
    out: VecDeque<u8>,
    /// A writer was told to wait.
    starved: bool,
    telnet: Option<Telnet>,
}

struct Link {
    read: Arc<OwnedFd>,
    write: Arc<OwnedFd>,
    reading: FdRegistration,
    writing: FdRegistration,
}

impl Stream {
    pub(super) fn new(name: impl Into<String>, io: &IoThreadHandle) -> Arc<Self> {
        Arc::new(Stream {
            name: name.into(),
            port: Arc::default(),
            io: io.clone(),
            state: Mutex::default(),
            changed: Condvar::new(),
            on_close: Mutex::default(),
        })
    }

    pub(super) fn io(&self) -> &IoThreadHandle {
        &self.io
    }

    pub(super) fn on_close(&self, f: impl Fn() + Send + Sync + 'static) {
        *lock(&self.on_close) = Some(Arc::new(f));
    }

    /// Starts a connection that reads from and writes to `fd`, which is made non-blocking.
    pub(super) fn attach(self: &Arc<Self>, fd: OwnedFd, telnet: Telneting) -> Result<(), HostError> {
        // epoll takes a description twice only by two descriptors.
        let second =
            rustix::io::fcntl_dupfd_cloexec(&fd, 3).map_err(|e| HostError::new(format!("use {}", self.name), e))?;
        self.attach_pair(fd, second, telnet)
    }

    /// Starts a connection on two descriptors, which are made non-blocking.
    pub(super) fn attach_pair(
        self: &Arc<Self>,
        read: OwnedFd,
        write: OwnedFd,
        telnet: Telneting,
    ) -> Result<(), HostError> {
        for fd in [&read, &write] {
            rustix::io::ioctl_fionbio(fd, true).map_err(|e| HostError::new(format!("use {}", self.name), e))?;
        }
        let (read, write) = (Arc::new(read), Arc::new(write));
        let mut s = lock(&self.state);
        s.generation += 1;
        let generation = s.generation;
        let (r, w) = (Arc::downgrade(self), Arc::downgrade(self));
        let upgrade = move |this: &Weak<Self>| this.upgrade();
        let reading = self.io.register_fd(read.clone(), Interest::NONE, move |_| {
            if let Some(this) = upgrade(&r) {
                this.readable(generation);
            }
        })?;
        let writing = self.io.register_fd(write.clone(), Interest::NONE, move |_| {
            if let Some(this) = upgrade(&w) {
                this.flush_out(generation);
            }
        })?;
        reading.set_interest(Interest::READ)?;
        s.out.clear();
        s.link = Some(Link { read, write, reading, writing });
        s.telnet = (telnet != Telneting::Off).then(Telnet::default);
        s.out.extend(Telnet::greeting(telnet == Telneting::Server));
        drop(s);
        self.changed.notify_all();
        let this = self.clone();
        self.io.run_soon(move || {
            this.port.event(CharEvent::Opened);
            this.flush_out(generation);
            this.deliver();
        });
        Ok(())
    }

    pub(super) fn is_connected(&self) -> bool {
        lock(&self.state).link.is_some()
    }

    /// Waits for a connection; false if `timeout` passes first.
    pub(super) fn wait_connected(&self, timeout: Option<Duration>) -> bool {
        let deadline = timeout.map(|t| Instant::now() + t);
        let mut s = lock(&self.state);
        while s.link.is_none() {
            let left = deadline.map(|d| d.saturating_duration_since(Instant::now()));
            s = match left {
                Some(Duration::ZERO) => return false,
                Some(left) => self.changed.wait_timeout(s, left).unwrap_or_else(PoisonError::into_inner).0,
                None => self.changed.wait(s).unwrap_or_else(PoisonError::into_inner),
            };
        }
        true
    }

    /// Queues what fits.
    pub(super) fn write(self: &Arc<Self>, data: &[u8]) -> usize {
        let mut s = lock(&self.state);
        if s.link.is_none() {
            return data.len();
        }
        let (was_idle, escaped) = (s.out.is_empty(), s.telnet.is_some());
        // An escaped byte takes two.
        let room = QUEUE.saturating_sub(s.out.len()) / if escaped { 2 } else { 1 };
        let taken = data.len().min(room);
        if escaped {
            s.out.extend(data[..taken].iter().flat_map(|&b| Telnet::encode(b)));
        } else {
            s.out.extend(&data[..taken]);
        }
        s.starved |= taken < data.len();
        let generation = s.generation;
        drop(s);
        if was_idle && taken > 0 {
            let this = self.clone();
            self.io.run_soon(move || this.flush_out(generation));
        }
        taken
    }

    pub(super) fn set_receiver(self: &Arc<Self>, receiver: CharReceiver) {
        self.port.set_receiver(receiver);
        let this = self.clone();
        self.io.run_soon(move || this.deliver());
    }

    pub(super) fn set_writable_listener(&self, listener: Box<dyn Fn() + Send + Sync>) {
        self.port.set_writable_listener(listener);
    }

    /// Who is told of events; of a connection that is there already, too.
    pub(super) fn set_event_listener(self: &Arc<Self>, listener: Box<dyn Fn(CharEvent) + Send + Sync>) {
        self.port.set_event_listener(listener);
        if self.is_connected() {
            let port = self.port.clone();
            self.io.run_soon(move || port.event(CharEvent::Opened));
        }
    }

    pub(super) fn input_ready(self: &Arc<Self>) {
        if self.port.input_ready() {
            let this = self.clone();
            self.io.run_soon(move || this.deliver());
        }
    }

    fn deliver(&self) {
        let all = self.port.deliver();
        self.set_reading(all);
    }

    fn set_reading(&self, on: bool) {
        let interest = if on { Interest::READ } else { Interest::NONE };
        if let Some(link) = &lock(&self.state).link
            && let Err(e) = link.reading.set_interest(interest)
        {
            log::error!("{}: {e}", self.name);
        }
    }

    fn link_fd(&self, generation: u64, pick: fn(&Link) -> &Arc<OwnedFd>) -> Option<Arc<OwnedFd>> {
        let s = lock(&self.state);
        s.link.as_ref().filter(|_| s.generation == generation).map(|l| pick(l).clone())
    }

    fn readable(&self, generation: u64) {
        let Some(fd) = self.link_fd(generation, |l| &l.read) else { return };
        let mut buf = [0; 4096];
        match rustix::io::read(&*fd, &mut buf) {
            Ok(n) if n > 0 => self.received(&buf[..n]),
            Err(Errno::AGAIN | Errno::INTR) => {}
            _ => self.close(generation),
        }
    }

    fn received(&self, data: &[u8]) {
        let decoded = lock(&self.state).telnet.as_mut().map(|t| t.decode(data));
        let all = match decoded {
            None => self.port.input(data),
            Some((plain, breaks)) => {
                let all = self.port.input(&plain);
                (0..breaks).for_each(|_| self.port.event(CharEvent::Break));
                all
            }
        };
        self.set_reading(all);
    }

    /// On the I/O thread: writes what the other side takes.
    fn flush_out(&self, generation: u64) {
        let mut s = lock(&self.state);
        if s.generation != generation {
            return;
        }
        let alive = s.write_out();
        let room = s.starved && s.out.len() <= QUEUE / 2;
        s.starved &= !room;
        drop(s);
        if !alive {
            self.close(generation);
        } else if room {
            self.port.writable();
        }
    }

    /// Ends the connection, on the I/O thread.
    pub(super) fn close(&self, generation: u64) {
        let mut s = lock(&self.state);
        if s.generation != generation || s.link.is_none() {
            return;
        }
        let link = s.link.take();
        s.out.clear();
        s.telnet = None;
        let starved = std::mem::take(&mut s.starved);
        drop(s);
        drop(link);
        self.changed.notify_all();
        self.port.event(CharEvent::Closed);
        if starved {
            self.port.writable();
        }
        self.run_on_close();
    }

    /// What is done when a connection ends, without one (a look for a new one found none).
    pub(super) fn run_on_close(&self) {
        let on_close = lock(&self.on_close).clone();
        if let Some(f) = on_close {
            f();
        }
    }

    /// Waits until all is written, or nothing moves for a while.
    pub(super) fn flush(&self) {
        let mut deadline = Instant::now() + STUCK;
        loop {
            let mut s = lock(&self.state);
            let before = s.out.len();
            let alive = s.write_out();
            let Some(fd) = s.link.as_ref().map(|l| l.write.clone()) else { return };
            let left = s.out.len();
            drop(s);
            if left < before {
                deadline = Instant::now() + STUCK;
            }
            if left == 0 || !alive || Instant::now() >= deadline {
                return;
            }
            let fd = fd.as_fd();
            let step = Timespec { tv_sec: 0, tv_nsec: 100_000_000 };
            let _ = poll(&mut [PollFd::new(&fd, PollFlags::OUT)], Some(&step));
        }
    }
}

impl State {
    /// Writes what goes without waiting; false if the other side is gone.
    fn write_out(&mut self) -> bool {
        let Some(link) = &self.link else { return true };
        while !self.out.is_empty() {
            match rustix::io::write(&*link.write, self.out.as_slices().0) {
                Ok(n) => drop(self.out.drain(..n)),
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => break,
                Err(_) => return false,
            }
        }
        let interest = if self.out.is_empty() { Interest::NONE } else { Interest::WRITE };
        link.writing.set_interest(interest).is_ok()
    }
}
