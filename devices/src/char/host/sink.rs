//! Output through a thread of its own, for files and terminals, which may block and cannot be polled or must not
//! be switched to non-blocking because other programs share them.

use std::collections::VecDeque;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use mimus_core::device::lock;
use mimus_core::error::HostError;
use mimus_core::io_thread::IoThreadHandle;
use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;

use super::port::Port;

/// Bytes that may wait.
pub(super) const QUEUE: usize = 64 << 10;
/// Most bytes in one write.
const CHUNK: usize = 16 << 10;
/// How long [`Sink::flush`] waits while nothing moves.
pub(super) const STUCK: Duration = Duration::from_secs(2);

/// A bounded queue and the thread that writes it out.
pub(super) struct Sink {
    shared: Arc<Shared>,
}

struct Shared {
    state: Mutex<State>,
    /// There is work, or the end.
    work: Condvar,
    /// Some was written.
    progress: Condvar,
    port: Arc<Port>,
    io: IoThreadHandle,
}

#[derive(Default)]
struct State {
    queue: VecDeque<u8>,
    /// Taken from the queue, not written yet.
    in_hand: usize,
    /// A writer was told to wait.
    starved: bool,
    /// The file takes nothing any more.
    broken: bool,
    ended: bool,
}

fn wait<'a>(condition: &Condvar, guard: MutexGuard<'a, State>) -> MutexGuard<'a, State> {
    condition.wait(guard).unwrap_or_else(PoisonError::into_inner)
}

impl Sink {
    /// Starts a thread that writes to `fd`, called `name` in messages.
    pub(super) fn spawn(name: &str, fd: OwnedFd, port: Arc<Port>, io: &IoThreadHandle) -> Result<Self, HostError> {
        let (work, progress) = (Condvar::new(), Condvar::new());
        let shared = Arc::new(Shared { state: Mutex::default(), work, progress, port, io: io.clone() });
        let (theirs, name) = (shared.clone(), name.to_owned());
        io.spawn_worker("char-out", move || theirs.run(&name, &fd))?;
        Ok(Sink { shared })
    }

    /// Queues what fits; the port's listener hears when there is room again.
    pub(super) fn write(&self, data: &[u8]) -> usize {
        let mut s = lock(&self.shared.state);
        if s.broken {
            return data.len();
        }
        let taken = data.len().min(QUEUE.saturating_sub(s.queue.len()));
        let was_idle = s.queue.is_empty();
        s.queue.extend(&data[..taken]);
        s.starved |= taken < data.len();
        drop(s);
        if was_idle && taken > 0 {
            self.shared.work.notify_one();
        }
        taken
    }

    /// Waits until all is written, or nothing moves for [`STUCK`].
    pub(super) fn flush(&self) {
        let mut s = lock(&self.shared.state);
        let mut left = s.queue.len() + s.in_hand;
        let mut deadline = Instant::now() + STUCK;
        while left > 0 && !s.broken {
            let patience = deadline.saturating_duration_since(Instant::now());
            if patience.is_zero() {
                return;
            }
            let woken = self.shared.progress.wait_timeout(s, patience);
            s = woken.unwrap_or_else(PoisonError::into_inner).0;
            let now = s.queue.len() + s.in_hand;
            if now < left {
                deadline = Instant::now() + STUCK;
            }
            left = now;
        }
    }
}

impl Drop for Sink {
    fn drop(&mut self) {
        self.flush();
        lock(&self.shared.state).ended = true;
        self.shared.work.notify_one();
    }
}

impl Shared {
    fn run(&self, name: &str, fd: &OwnedFd) {
        while let Some(chunk) = self.next() {
            let mut rest = &chunk[..];
            while !rest.is_empty() {
                match write_some(fd, rest) {
                    Ok(n) => {
                        rest = &rest[n..];
                        lock(&self.state).in_hand = rest.len();
                        self.progress.notify_all();
                    }
                    Err(e) => {
                        log::error!("cannot write {name}: {e}; its further output is dropped");
                        return self.give_up();
                    }
                }
            }
        }
    }

    /// The next bytes to write; `None` at the end.
    fn next(&self) -> Option<Vec<u8>> {
        let mut s = lock(&self.state);
        loop {
            if s.starved && s.queue.len() <= QUEUE / 2 {
                s.starved = false;
                let port = self.port.clone();
                self.io.run_soon(move || port.writable());
            }
            if !s.queue.is_empty() {
                let n = s.queue.len().min(CHUNK);
                s.in_hand = n;
                return Some(s.queue.drain(..n).collect());
            }
            if s.ended {
                return None;
            }
            s = wait(&self.work, s);
        }
    }

    fn give_up(&self) {
        let mut s = lock(&self.state);
        s.broken = true;
        s.queue.clear();
        s.in_hand = 0;
        drop(s);
        self.progress.notify_all();
        let port = self.port.clone();
        self.io.run_soon(move || port.writable());
    }
}

/// Writes at least a byte, waiting if the file is non-blocking (a terminal may have been made so by others).
fn write_some(fd: &OwnedFd, data: &[u8]) -> Result<usize, Errno> {
    loop {
        match rustix::io::write(fd, data) {
            Ok(0) => return Err(Errno::IO),
            Err(Errno::INTR) => {}
            Err(Errno::AGAIN) => {
                let fd = fd.as_fd();
                match poll(&mut [PollFd::new(&fd, PollFlags::OUT)], None) {
                    Ok(_) | Err(Errno::INTR) => {}
                    Err(e) => return Err(e),
                }
            }
            result => return result,
        }
    }
}
