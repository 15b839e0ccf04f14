//! Output to a file; no input.

use std::fs::OpenOptions;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use mimus_core::backend::CharBackend;
use mimus_core::backend::char::CharReceiver;
use mimus_core::error::{HostError, why_not_made};
use mimus_core::io_thread::IoThreadHandle;

use super::port::Port;
use super::sink::Sink;

/// `file`.
pub struct FileChar {
    path: PathBuf,
    port: Arc<Port>,
    sink: Sink,
}

impl FileChar {
    /// Opens or makes the file at `path`, and empties it unless `append`.
    pub fn open(io: &IoThreadHandle, path: &Path, append: bool) -> Result<Arc<Self>, HostError> {
        let name = path.display().to_string();
        let file = OpenOptions::new().create(true).write(true).append(append).truncate(!append).open(path);
        let file = file.map_err(|e| {
            let why = io::Error::new(e.kind(), why_not_made(path, &e));
            HostError::new(format!("open {name} for output"), why)
        })?;
        let port = Arc::new(Port::default());
        let sink = Sink::spawn(&name, file.into(), port.clone(), io)?;
        Ok(Arc::new(FileChar { path: path.to_owned(), port, sink }))
    }
}

impl CharBackend for FileChar {
    fn write(&self, data: &[u8]) -> usize {
        self.sink.write(data)
    }

    fn set_receiver(&self, _: CharReceiver) {}

    fn input_ready(&self) {}

    fn set_writable_listener(&self, listener: Box<dyn Fn() + Send + Sync>) {
        self.port.set_writable_listener(listener);
    }

    fn flush(&self) {
        self.sink.flush();
    }

    fn describe(&self) -> String {
        format!("file {}", self.path.display())
    }
}
