//! A stream socket: TCP or Unix, server or client, raw or telnet. One connection at a time.

use std::net::{SocketAddr, TcpListener, TcpStream, ToSocketAddrs};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileTypeExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::Duration;
use std::{fmt, fs, io};

use mimus_core::backend::CharBackend;
use mimus_core::device::lock;
use mimus_core::error::HostError;
use mimus_core::io_thread::{FdRegistration, Interest, IoThreadHandle};

use super::stream::{Stream, Telneting};

/// How long connecting may take.
const CONNECT: Duration = Duration::from_secs(10);

/// Where.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SocketAddress {
    /// Host name or address (empty: any as a server, this host as a client) and port (0: the host chooses).
    Tcp { host: String, port: u16 },
    /// Path of a Unix socket.
    Unix(PathBuf),
}

impl fmt::Display for SocketAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            SocketAddress::Tcp { host, port } if host.contains(':') => write!(f, "tcp:[{host}]:{port}"),
            SocketAddress::Tcp { host, port } => write!(f, "tcp:{host}:{port}"),
            SocketAddress::Unix(path) => write!(f, "unix:{}", path.display()),
        }
    }
}

/// How a socket is used.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SocketOptions {
    /// Where.
    pub address: SocketAddress,
    /// Listen rather than connect.
    pub server: bool,
    /// Negotiate telnet's options.
    pub telnet: bool,
}

enum Listener {
    Tcp(TcpListener),
    Unix(UnixListener),
}

impl AsFd for Listener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match self {
            Listener::Tcp(l) => l.as_fd(),
            Listener::Unix(l) => l.as_fd(),
        }
    }
}

impl Listener {
    fn accept(&self) -> io::Result<OwnedFd> {
        Ok(match self {
            Listener::Tcp(l) => {
                let (stream, _) = l.accept()?;
                // Typed characters are not worth collecting; failing to say so is harmless.
                let _ = stream.set_nodelay(true);
                stream.into()
            }
            Listener::Unix(l) => l.accept()?.0.into(),
        })
    }
}

/// `socket`.
pub struct SocketChar {
    options: SocketOptions,
    stream: Arc<Stream>,
    local: Option<SocketAddr>,
    /// Registration of the listener; idle while somebody is connected.
    listening: Arc<Mutex<Option<FdRegistration>>>,
    /// A Unix socket we made.
    made: Option<PathBuf>,
}

impl SocketChar {
    /// Listens, or connects (waiting for that at most 10 s). A server that must have somebody connected before the
    /// guest starts calls [`SocketChar::wait_connected`].
    pub fn open(io: &IoThreadHandle, options: SocketOptions) -> Result<Arc<Self>, HostError> {
        let stream = Stream::new(options.address.to_string(), io);
        let listening = Arc::new(Mutex::new(None));
        let (mut local, mut made) = (None, None);
        if options.server {
            let listener = listen(&options.address)?;
            match (&listener, &options.address) {
                (Listener::Tcp(l), _) => local = l.local_addr().ok(),
                (_, SocketAddress::Unix(path)) => made = Some(path.clone()),
                _ => {}
            }
            serve(&stream, listener, &listening, if options.telnet { Telneting::Server } else { Telneting::Off })?;
        } else {
            let fd = connect(&options.address)?;
            stream.attach(fd, if options.telnet { Telneting::Client } else { Telneting::Off })?;
        }
        Ok(Arc::new(SocketChar { options, stream, local, listening, made }))
    }

    /// Where a TCP server listens: the port the host chose.
    pub fn local_addr(&self) -> Option<SocketAddr> {
        self.local
    }

    /// True while there is a connection.
    pub fn is_connected(&self) -> bool {
        self.stream.is_connected()
    }

    /// Waits for a connection; false if `timeout` passes first. Not on the I/O thread.
    pub fn wait_connected(&self, timeout: Option<Duration>) -> bool {
        self.stream.wait_connected(timeout)
    }
}

fn serve(
    stream: &Arc<Stream>,
    listener: Listener,
    listening: &Arc<Mutex<Option<FdRegistration>>>,
    telnet: Telneting,
) -> Result<(), HostError> {
    let listener = Arc::new(listener);
    let (accepting, slot, weak) = (listener.clone(), listening.clone(), Arc::downgrade(stream));
    let set = |slot: &Mutex<Option<FdRegistration>>, interest| {
        if let Some(Err(e)) = lock(slot).as_ref().map(|r| r.set_interest(interest)) {
            log::error!("a listening socket: {e}");
        }
    };
    let idle = Arc::downgrade(listening);
    stream.on_close(move || {
        if let Some(slot) = idle.upgrade() {
            set(&slot, Interest::READ);
        }
    });
    let weak_slot = Arc::downgrade(&slot);
    let callback = move |_| {
        let (Some(stream), Some(slot)) = (weak.upgrade(), weak_slot.upgrade()) else { return };
        let fd = match accepting.accept() {
            Ok(fd) => fd,
            // Whoever wanted to connect is gone again.
            Err(e) => return log::debug!("accept: {e}"),
        };
        // Others wait in the backlog until this one leaves.
        set(&slot, Interest::NONE);
        if let Err(e) = stream.attach(fd, telnet) {
            log::error!("{e}");
            set(&slot, Interest::READ);
        }
    };
    // Under the lock, so that the callback finds its registration.
    let mut slot = lock(listening);
    *slot = Some(stream.io().register_fd(listener, Interest::READ, callback)?);
    Ok(())
}

fn listen(address: &SocketAddress) -> Result<Listener, HostError> {
    let failed = |e: io::Error| HostError::new(format!("listen on {address}"), e);
    match address {
        SocketAddress::Tcp { host, port } => {
            let host = if host.is_empty() { "0.0.0.0" } else { host };
            let l = TcpListener::bind((host, *port)).map_err(failed)?;
            l.set_nonblocking(true).map_err(failed)?;
            Ok(Listener::Tcp(l))
        }
        SocketAddress::Unix(path) => {
            remove_stale(path);
            let l = UnixListener::bind(path).map_err(failed)?;
            l.set_nonblocking(true).map_err(failed)?;
            Ok(Listener::Unix(l))
        }
    }
}

/// Removes a socket an earlier run left behind: nobody listens on it.
fn remove_stale(path: &Path) {
    let is_socket = fs::symlink_metadata(path).is_ok_and(|m| m.file_type().is_socket());
    let refused = || UnixStream::connect(path).is_err_and(|e| e.kind() == io::ErrorKind::ConnectionRefused);
    if is_socket && refused() {
        // If it cannot be removed, binding says so.
        let _ = fs::remove_file(path);
    }
}

fn connect(address: &SocketAddress) -> Result<OwnedFd, HostError> {
    let failed = |e: io::Error| HostError::new(format!("connect to {address}"), e);
    match address {
        SocketAddress::Tcp { host, port } => {
            let host = if host.is_empty() { "localhost" } else { host };
            let mut last = io::Error::new(io::ErrorKind::NotFound, "the name has no address");
            for address in (host, *port).to_socket_addrs().map_err(failed)? {
                match TcpStream::connect_timeout(&address, CONNECT) {
                    Ok(stream) => {
                        let _ = stream.set_nodelay(true);
                        return Ok(stream.into());
                    }
                    Err(e) => last = e,
                }
            }
            Err(failed(last))
        }
        SocketAddress::Unix(path) => Ok(UnixStream::connect(path).map_err(failed)?.into()),
    }
}

impl CharBackend for SocketChar {
    super::stream_methods!();

    fn describe(&self) -> String {
        let role = if self.options.server { ", server" } else { "" };
        let telnet = if self.options.telnet { ", telnet" } else { "" };
        let state = if self.is_connected() { "connected" } else { "disconnected" };
        match self.local {
            Some(a) => format!("socket tcp:{a}{role}{telnet}, {state}"),
            None => format!("socket {}{role}{telnet}, {state}", self.options.address),
        }
    }
}

impl Drop for SocketChar {
    fn drop(&mut self) {
        *lock(&self.listening) = None;
        if let Some(path) = &self.made {
            let _ = fs::remove_file(path);
        }
    }
}
