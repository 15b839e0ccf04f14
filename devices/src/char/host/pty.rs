//! A new pseudo-terminal, for another program to open.

use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Weak};
use std::time::Duration;

use mimus_core::backend::CharBackend;
use mimus_core::clock::{ClockKind, Timer};
use mimus_core::error::HostError;
use mimus_core::io_thread::IoThreadHandle;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{Mode, OFlags};
use rustix::pty::OpenptFlags;
use rustix::termios::{OptionalActions, tcgetattr, tcsetattr};

use super::stream::{Stream, Telneting};

/// How often it is looked whether somebody opened the terminal: the host has no event for it.
const LOOK: Duration = Duration::from_millis(200);

/// `pty`.
pub struct PtyChar {
    path: PathBuf,
    stream: Arc<Stream>,
    _look: Timer,
}

impl PtyChar {
    /// Makes a pseudo-terminal in raw mode.
    pub fn open(io: &IoThreadHandle) -> Result<Arc<Self>, HostError> {
        let (master, path) = open().map_err(|e| HostError::new("make a pseudo-terminal", e))?;
        let master = Arc::new(master);
        let stream = Stream::new(format!("pty {}", path.display()), io);
        let look = io.timer(ClockKind::Realtime);
        let (weak, timer) = (Arc::downgrade(&stream), look.clone());
        let again = move || timer.arm(timer.now().saturating_add(LOOK.as_nanos() as u64));
        let rearm = again.clone();
        // The stream owns what re-arms the timer, and the timer's callback holds the stream weakly.
        stream.on_close(again);
        look.bind(move || look_for_peer(&weak, &master));
        rearm();
        Ok(Arc::new(PtyChar { path, stream, _look: look }))
    }

    /// The terminal to open: `/dev/pts/N`.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

/// Starts the connection if the terminal is open.
fn look_for_peer(stream: &Weak<Stream>, master: &OwnedFd) {
    let Some(stream) = stream.upgrade() else { return };
    let open = !hung_up(master) && {
        let fd = rustix::io::fcntl_dupfd_cloexec(master, 3).map_err(|e| HostError::new("use a pseudo-terminal", e));
        fd.and_then(|fd| stream.attach(fd, Telneting::Off)).inspect_err(|e| log::error!("{e}")).is_ok()
    };
    if !open {
        stream.run_on_close();
    }
}

fn hung_up(master: &OwnedFd) -> bool {
    let fd = master.as_fd();
    let mut fds = [PollFd::new(&fd, PollFlags::IN)];
    let polled = poll(&mut fds, Some(&Timespec { tv_sec: 0, tv_nsec: 0 }));
    polled.is_err() || fds[0].revents().contains(PollFlags::HUP)
}

fn open() -> rustix::io::Result<(OwnedFd, PathBuf)> {
    let master = rustix::pty::openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC)?;
    rustix::pty::grantpt(&master)?;
    rustix::pty::unlockpt(&master)?;
    let name = rustix::pty::ptsname(&master, Vec::new())?;
    // Opened and closed once: for raw mode, so that nothing is echoed back, and because only then does the host
    // report the other side as gone.
    let flags = OFlags::RDWR | OFlags::NOCTTY | OFlags::CLOEXEC;
    let slave = rustix::fs::open(name.as_c_str(), flags, Mode::empty())?;
    let mut settings = tcgetattr(&slave)?;
    settings.make_raw();
    tcsetattr(&slave, OptionalActions::Now, &settings)?;
    Ok((master, PathBuf::from(name.to_string_lossy().into_owned())))
}

impl CharBackend for PtyChar {
    super::stream_methods!();

    fn describe(&self) -> String {
        format!("pty {}", self.path.display())
    }
}
