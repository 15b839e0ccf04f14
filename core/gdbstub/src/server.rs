//! Sockets, and a pipe: one client at a time, on a thread of its own.

use crate::session::{Event, Flow, Session};
use crate::target::Target;
use std::fmt;
use std::io::{self, Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// How long a machine may take to stop for a client that has come.
const STOP_TIME: Duration = Duration::from_secs(40);
/// How long the end of the machine waits for the client to be told.
const END_TIME: Duration = Duration::from_secs(1);

/// Where to listen.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Address {
    /// TCP; port 0 is any free one.
    Tcp {
        /// Host name or address.
        host: String,
        /// Port.
        port: u16,
    },
    /// Unix socket.
    Unix(PathBuf),
    /// Standard input and output, for gdb's `target remote | mimus ...`.
    Stdio,
}

impl Address {
    /// Parses the argument of `-gdb`: `tcp:HOST:PORT` or `tcp::PORT` (this host only), `unix:PATH`, either with
    /// QEMU's `,server=on,wait=off` behind it; `stdio`; `none` is `None`.
    ///
    /// # Errors
    /// One line: what is wrong, and what to write.
    pub fn parse(text: &str) -> Result<Option<Address>, String> {
        let (place, flags) = text.split_once(',').unwrap_or((text, ""));
        let known = ["server", "server=on", "nowait", "wait=off", "nodelay", "nodelay=on", ""];
        if let Some(flag) = flags.split(',').find(|f| !known.contains(f)) {
            return Err(format!("-gdb {text}: {flag} is not supported; mimus listens and does not wait"));
        }
        if let Some(path) = place.strip_prefix("unix:").filter(|p| !p.is_empty()) {
            return Ok(Some(Address::Unix(path.into())));
        }
        if let Some((host, port)) = place.strip_prefix("tcp:").and_then(|r| r.rsplit_once(':')) {
            let port = port.parse().map_err(|_| format!("-gdb {text}: {port:?} is not a port number"))?;
            let host = if host.is_empty() { "127.0.0.1" } else { host.trim_matches(['[', ']']) };
            return Ok(Some(Address::Tcp { host: host.to_owned(), port }));
        }
        match text {
            "none" => Ok(None),
            "stdio" => Ok(Some(Address::Stdio)),
            _ => Err(format!("-gdb {text}: give tcp::PORT, tcp:HOST:PORT, unix:PATH, stdio or none")),
        }
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp { host, port } if host.contains(':') => write!(f, "tcp:[{host}]:{port}"),
            Self::Tcp { host, port } => write!(f, "tcp:{host}:{port}"),
            Self::Unix(path) => write!(f, "unix:{}", path.display()),
            Self::Stdio => f.write_str("stdio"),
        }
    }
}

trait Stream: Read + Write + Send {
    fn copy(&self) -> io::Result<Box<dyn Stream>>;
    fn end(&self);
}

impl Stream for TcpStream {
    fn copy(&self) -> io::Result<Box<dyn Stream>> {
        Ok(Box::new(self.try_clone()?))
    }
    fn end(&self) {
        let _ = self.shutdown(Shutdown::Both);
    }
}

impl Stream for UnixStream {
    fn copy(&self) -> io::Result<Box<dyn Stream>> {
        Ok(Box::new(self.try_clone()?))
    }
    fn end(&self) {
        let _ = self.shutdown(Shutdown::Both);
    }
}

/// Standard input and output.
struct Pipe;

impl Read for Pipe {
    fn read(&mut self, to: &mut [u8]) -> io::Result<usize> {
        io::stdin().read(to)
    }
}

impl Write for Pipe {
    fn write(&mut self, from: &[u8]) -> io::Result<usize> {
        io::stdout().write(from)
    }
    fn flush(&mut self) -> io::Result<()> {
        io::stdout().flush()
    }
}

impl Stream for Pipe {
    fn copy(&self) -> io::Result<Box<dyn Stream>> {
        Ok(Box::new(Pipe))
    }
    /// The other side closes it.
    fn end(&self) {}
}

enum Socket {
    /// Until it has been served.
    Pipe(AtomicBool),
    Tcp(TcpListener),
    Unix(UnixListener),
}

/// A socket that waits for a client.
pub struct Listener {
    socket: Socket,
    address: Address,
}

impl Listener {
    /// Opens it.
    ///
    /// # Errors
    /// It is taken, or not to be had.
    pub fn bind(address: &Address) -> io::Result<Self> {
        Ok(match address {
            Address::Stdio => Self { socket: Socket::Pipe(AtomicBool::new(true)), address: Address::Stdio },
            Address::Tcp { host, port } => {
                let socket = TcpListener::bind((host.as_str(), *port))?;
                let port = socket.local_addr()?.port();
                let address = Address::Tcp { host: host.clone(), port };
                Self { socket: Socket::Tcp(socket), address }
            }
            Address::Unix(path) => {
                // A socket nobody listens on is left from a run that was killed.
                if UnixStream::connect(path).is_err_and(|e| e.kind() == io::ErrorKind::ConnectionRefused) {
                    std::fs::remove_file(path)?;
                }
                Self { socket: Socket::Unix(UnixListener::bind(path)?), address: address.clone() }
            }
        })
    }

    /// Where it listens: with the port that was free.
    pub fn address(&self) -> &Address {
        &self.address
    }

    /// Serves clients from now on.
    ///
    /// # Errors
    /// The host has no thread left.
    pub fn serve(self, target: Arc<dyn Target>) -> io::Result<Arc<Server>> {
        let server = Arc::new(Server { inner: Mutex::default(), changed: Condvar::new(), address: self.address });
        let own = server.clone();
        let accept = move || match &self.socket {
            Socket::Tcp(s) => s.accept().and_then(|(stream, _)| {
                stream.set_nodelay(true)?;
                Ok(Box::new(stream) as Box<dyn Stream>)
            }),
            Socket::Unix(s) => s.accept().map(|(stream, _)| Box::new(stream) as Box<dyn Stream>),
            Socket::Pipe(fresh) => {
                while !fresh.swap(false, Ordering::SeqCst) {
                    std::thread::park();
                }
                Ok(Box::new(Pipe) as Box<dyn Stream>)
            }
        };
        std::thread::Builder::new().name("gdb".to_owned()).spawn(move || {
            loop {
                match accept() {
                    Ok(stream) => own.client(stream, &target),
                    Err(e) => {
                        log::warn!("gdb: {}: {e}", own.address);
                        std::thread::sleep(Duration::from_millis(200));
                    }
                }
            }
        })?;
        Ok(server)
    }
}

enum Message {
    Bytes(Vec<u8>),
    Gone,
    Event(Event),
}

/// A running server.
pub struct Server {
    inner: Mutex<Option<Sender<Message>>>,
    changed: Condvar,
    address: Address,
}

impl Server {
    fn lock(&self) -> MutexGuard<'_, Option<Sender<Message>>> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Tells the client, if there is one, what happened. Any thread; returns at once.
    pub fn event(&self, event: Event) {
        if let Some(client) = &*self.lock() {
            let _ = client.send(Message::Event(event));
        }
    }

    /// The machine is over: tells the client, and takes the socket away.
    pub fn end(&self) {
        self.event(Event::Ended);
        let until = Instant::now() + END_TIME;
        let mut inner = self.lock();
        while inner.is_some() {
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                break;
            }
            inner = self.changed.wait_timeout(inner, left).unwrap_or_else(PoisonError::into_inner).0;
        }
        if let Address::Unix(path) = &self.address {
            let _ = std::fs::remove_file(path);
        }
    }

    fn client(&self, mut stream: Box<dyn Stream>, target: &Arc<dyn Target>) {
        let (tx, rx) = channel();
        let credit = Arc::new(Credit(Mutex::new(CHUNKS), Condvar::new()));
        let reader = match stream.copy() {
            Ok(mut from) => {
                let (tx, credit) = (tx.clone(), credit.clone());
                let body = move || read(&mut *from, &tx, &credit);
                std::thread::Builder::new().name("gdb-read".to_owned()).spawn(body)
            }
            Err(e) => return log::warn!("gdb: {e}"),
        };
        *self.lock() = Some(tx);
        let was_running = target.settle(STOP_TIME) && target.running();
        let mut session = Session::new(target.clone());
        let mut ended = false;
        if reader.is_ok()
            && let Some((sent, chunks)) = wait_stopped(&**target, &rx)
        {
            credit.give(chunks);
            ended = serve(&mut session, &mut *stream, sent, &rx, &credit);
        }
        stream.end();
        if !ended && !session.killed() {
            // What its vCPUs still have to tell is told before they go on without a debugger.
            if session.runs() {
                let _ = wait_stopped(&**target, &rx);
            }
            let go_on = was_running || session.continued();
            session.end(go_on);
            // The next finds it as this one leaves it.
            target.settle(STOP_TIME);
        }
        *self.lock() = None;
        self.changed.notify_all();
        // Whoever reads and finds that nobody is left to take it, ends; a pipe's reader may wait for ever.
        drop(rx);
        credit.give(CHUNKS);
        if let Ok(reader) = reader
            && self.address != Address::Stdio
        {
            let _ = reader.join();
        }
    }
}

/// Chunks of a client's bytes that may wait to be looked at.
const CHUNKS: usize = 16;

/// How much more may be read.
struct Credit(Mutex<usize>, Condvar);

impl Credit {
    fn take(&self) {
        let mut left = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        while *left == 0 {
            left = self.1.wait(left).unwrap_or_else(PoisonError::into_inner);
        }
        *left -= 1;
    }

    fn give(&self, chunks: usize) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) += chunks;
        self.1.notify_all();
    }
}

fn read(from: &mut dyn Stream, to: &Sender<Message>, credit: &Credit) {
    let mut buffer = [0; 4096];
    loop {
        credit.take();
        match from.read(&mut buffer) {
            Err(e) if e.kind() == io::ErrorKind::Interrupted => credit.give(1),
            Ok(n) if n > 0 && to.send(Message::Bytes(buffer[..n].to_vec())).is_ok() => {}
            _ => break,
        }
    }
    let _ = to.send(Message::Gone);
}

/// Stops the machine for a client; what that sent meanwhile, and in how many chunks. `None`: it does not stop, or the
/// client has gone. What others have asked of the machine is done before: a stop of theirs is not taken for this one.
fn wait_stopped(target: &dyn Target, messages: &Receiver<Message>) -> Option<(Vec<u8>, usize)> {
    let mut settled = target.settle(STOP_TIME);
    if settled && target.running() {
        target.stop();
        settled = target.settle(STOP_TIME);
    }
    if !settled || target.running() {
        log::warn!("gdb: the machine does not stop");
        return None;
    }
    let (mut sent, mut chunks, mut gone) = (Vec::new(), 0, false);
    for message in messages.try_iter() {
        match message {
            Message::Event(Event::Ended) => return None,
            Message::Event(_) => {}
            Message::Bytes(bytes) => {
                sent.extend(bytes);
                chunks += 1;
            }
            Message::Gone => gone = true,
        }
    }
    (!gone).then_some((sent, chunks))
}

/// Serves a client until it is done with; true if the machine is over.
fn serve(
    session: &mut Session,
    stream: &mut dyn Stream,
    sent: Vec<u8>,
    messages: &Receiver<Message>,
    credit: &Credit,
) -> bool {
    let mut out = Vec::new();
    for message in std::iter::once(Message::Bytes(sent)).chain(messages) {
        let (flow, over) = match message {
            Message::Bytes(bytes) => {
                let flow = session.bytes(&bytes, &mut out);
                credit.give(1);
                (flow, false)
            }
            Message::Event(event) => (session.event(event, &mut out), event == Event::Ended),
            Message::Gone => return false,
        };
        if stream.write_all(&out).and_then(|()| stream.flush()).is_err() {
            return over;
        }
        out.clear();
        if flow == Flow::Close {
            return over;
        }
    }
    false
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses() {
        let of = |text: &str| Address::parse(text).map(|a| a.map(|a| a.to_string()));
        assert_eq!(of("tcp::1234"), Ok(Some("tcp:127.0.0.1:1234".to_owned())));
        assert_eq!(of("tcp:[::1]:0,server,nowait"), Ok(Some("tcp:[::1]:0".to_owned())));
        assert_eq!(of("unix:/tmp/x,server=on,wait=off"), Ok(Some("unix:/tmp/x".to_owned())));
        assert_eq!(of("none"), Ok(None));
        assert_eq!(of("stdio"), Ok(Some("stdio".to_owned())));
        for bad in ["", "tcp", "tcp:1234", "tcp::x", "tcp::70000", "unix:", "stdin", "tcp::1,reconnect=1"] {
            assert!(of(bad).unwrap_err().starts_with("-gdb "), "{bad}");
        }
    }

    #[test]
    fn busy_ports_and_left_sockets() {
        let first = Listener::bind(&Address::Tcp { host: "127.0.0.1".to_owned(), port: 0 }).unwrap();
        assert_eq!(Listener::bind(first.address()).err().unwrap().kind(), io::ErrorKind::AddrInUse);
        let path = std::env::temp_dir().join(format!("mimus-gdb-{}", std::process::id()));
        let address = Address::Unix(path.clone());
        drop(Listener::bind(&address).unwrap());
        let again = Listener::bind(&address).expect("nobody listens there any more");
        assert_eq!(Listener::bind(&address).err().unwrap().kind(), io::ErrorKind::AddrInUse);
        drop(again);
        std::fs::remove_file(path).unwrap();
    }
}
