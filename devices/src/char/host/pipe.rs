//! Named pipes that exist already: `PATH.in` for input and `PATH.out` for output, or `PATH` for both.

use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use mimus_core::backend::CharBackend;
use mimus_core::error::HostError;
use mimus_core::io_thread::IoThreadHandle;
use rustix::fs::{Mode, OFlags};

use super::stream::{Stream, Telneting};

/// `pipe`.
pub struct PipeChar {
    path: PathBuf,
    stream: Arc<Stream>,
}

impl PipeChar {
    /// Opens the pipes at `path`.
    pub fn open(io: &IoThreadHandle, path: &Path) -> Result<Arc<Self>, HostError> {
        let with = |suffix: &str| {
            let mut name = path.as_os_str().to_owned();
            name.push(suffix);
            PathBuf::from(name)
        };
        let stream = Stream::new(format!("pipe {}", path.display()), io);
        let (input, output) = (with(".in"), with(".out"));
        if input.exists() && output.exists() {
            stream.attach_pair(open(&input)?, open(&output)?, Telneting::Off)?;
        } else {
            let fd = open(path).map_err(|e| HostError {
                what: format!("{} (make it, or {} and {}, with mkfifo)", e.what, input.display(), output.display()),
                ..e
            })?;
            stream.attach(fd, Telneting::Off)?;
        }
        Ok(Arc::new(PipeChar { path: path.to_owned(), stream }))
    }
}

fn open(path: &Path) -> Result<OwnedFd, HostError> {
    // For both directions, so that it never ends when the other side closes it.
    let flags = OFlags::RDWR | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
    rustix::fs::open(path, flags, Mode::empty()).map_err(|e| HostError::new(format!("open pipe {}", path.display()), e))
}

impl CharBackend for PipeChar {
    super::stream_methods!();

    fn describe(&self) -> String {
        format!("pipe {}", self.path.display())
    }
}
