//! One TCP connection: the guest's end is a smoltcp socket, the host's end a
//! socket of the host. Each flow has an interface of its own, so a segment
//! costs the same however many flows there are, and no flow sees another.
//!
//! Flow control is end to end: bytes the guest does not take stay in the host
//! socket's buffer, bytes the host does not take close the guest's window.

use std::collections::VecDeque;
use std::io::{ErrorKind, Read, Write};
use std::net::{IpAddr, Shutdown, SocketAddr, TcpStream};

use smoltcp::iface::{Config, Interface, SocketHandle, SocketSet};
use smoltcp::phy::{self, Checksum, Device, DeviceCapabilities, Medium};
use smoltcp::socket::tcp::{CongestionControl, Socket, SocketBuffer, State};
use smoltcp::time::{Duration, Instant};
use smoltcp::wire::HardwareAddress;

use super::link::{ETH, Link, MTU};

/// Rounds of copying before other flows get a turn.
const ROUNDS: usize = 4;
/// Segments one poll may emit before other flows get a turn.
const BURST: usize = 512;

/// Largest window offered to the guest: one that needs no scaling. A scaled
/// window is rounded, and where rounding draws its edge back smoltcp drops
/// the bytes beyond, which the guest was right to send.
const MAX_WINDOW: usize = 65535;

/// The two ends of a flow as the guest sees them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct FlowKey {
    pub guest: SocketAddr,
    pub remote: SocketAddr,
}

/// What became of a flow after a turn.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Turn {
    /// Nothing more to do until an event or the time in `poll_at`.
    Idle,
    /// There is more to do at once.
    Again,
    /// Both ends are finished.
    Done,
}

pub(super) struct Flow {
    pub key: FlowKey,
    host: TcpStream,
    iface: Interface,
    sockets: SocketSet<'static>,
    handle: SocketHandle,
    /// Frames of the guest not yet processed, with their Ethernet headers.
    rx: VecDeque<Vec<u8>>,
    readable: bool,
    writable: bool,
    /// The host's end sent its last byte.
    host_eof: bool,
    /// The guest is being told so.
    closed: bool,
    /// The guest's last byte went to the host.
    host_shut: bool,
    /// The guest sent its FIN.
    guest_fin: bool,
    aborted: bool,
}

impl Flow {
    /// A flow whose host end is connected. `buffer` is the size in bytes of
    /// the buffer to the guest; the other one is at most that.
    pub fn new(key: FlowKey, host: TcpStream, buffer: usize, seed: u64, now: Instant, link: &mut Link) -> Flow {
        // Latency is the guest's own business: it has its own Nagle.
        let _ = host.set_nodelay(true);
        let mut config = Config::new(HardwareAddress::Ip);
        config.random_seed = seed;
        let mut rx = VecDeque::new();
        let mut iface = Interface::new(config, &mut Port::new(&mut rx, link, key.guest.ip()), now);
        iface.set_any_ip(true);
        let mut socket =
            Socket::new(SocketBuffer::new(vec![0; buffer.min(MAX_WINDOW)]), SocketBuffer::new(vec![0; buffer]));
        // The wire to the guest does not congest: it says when it is full.
        socket.set_congestion_control(CongestionControl::None);
        socket.set_nagle_enabled(false);
        // Segments are taken in batches, and a batch is acknowledged once; a
        // delay would keep back the acknowledgement of the guest's FIN, too.
        socket.set_ack_delay(None);
        // A guest that was reset no longer answers: its flows go away.
        socket.set_keep_alive(Some(Duration::from_secs(75)));
        socket.set_timeout(Some(Duration::from_secs(300)));
        let mut sockets = SocketSet::new(Vec::with_capacity(1));
        let handle = sockets.add(socket);
        Flow {
            key,
            host,
            iface,
            sockets,
            handle,
            rx,
            readable: true,
            writable: true,
            host_eof: false,
            closed: false,
            host_shut: false,
            guest_fin: false,
            aborted: false,
        }
    }

    /// Answers the guest's SYN, the frame that opened the flow.
    pub fn accept(&mut self, syn: Vec<u8>) -> bool {
        self.rx.push_back(syn);
        let remote = self.key.remote;
        let socket = self.sockets.get_mut::<Socket<'_>>(self.handle);
        socket.listen((remote.ip(), remote.port())).is_ok()
    }

    /// Connects to the guest's port.
    pub fn connect(&mut self) -> bool {
        let FlowKey { guest, remote } = self.key;
        let socket = self.sockets.get_mut::<Socket<'_>>(self.handle);
        let to = (guest.ip(), guest.port());
        socket.connect(self.iface.context(), to, (remote.ip(), remote.port())).is_ok()
    }

    /// Queues a frame of the guest.
    pub fn input(&mut self, frame: Vec<u8>) {
        self.rx.push_back(frame);
    }

    /// The host's socket reported readiness.
    pub fn host_event(&mut self, readable: bool, writable: bool) {
        self.readable |= readable;
        self.writable |= writable;
    }

    /// When the flow next has something to do by itself.
    pub fn poll_at(&mut self, now: Instant) -> Option<Instant> {
        self.iface.poll_at(now, &self.sockets)
    }

    /// Moves bytes both ways.
    pub fn turn(&mut self, now: Instant, link: &mut Link) -> Turn {
        for _ in 0..ROUNDS {
            let exhausted = self.poll(now, link);
            let moved = self.guest_to_host() | self.host_to_guest();
            if self.finished() {
                self.poll(now, link);
                self.close_host();
                return Turn::Done;
            }
            if !moved && !exhausted {
                return Turn::Idle;
            }
            if !link.ready() {
                return Turn::Idle;
            }
        }
        Turn::Again
    }

    /// Runs the guest's end; true when it had more to send than its share.
    fn poll(&mut self, now: Instant, link: &mut Link) -> bool {
        let mut port = Port::new(&mut self.rx, link, self.key.guest.ip());
        self.iface.poll(now, &mut port, &mut self.sockets);
        let exhausted = port.budget == 0;
        let state = self.sockets.get::<Socket<'_>>(self.handle).state();
        self.guest_fin |= matches!(state, State::CloseWait | State::LastAck | State::Closing | State::TimeWait);
        exhausted
    }

    fn guest_to_host(&mut self) -> bool {
        let socket = self.sockets.get_mut::<Socket<'_>>(self.handle);
        let host = &mut self.host;
        let mut moved = false;
        let mut failed = false;
        while self.writable && socket.can_recv() {
            let result = socket.recv(|data| match host.write(data) {
                Ok(n) => (n, Ok(n)),
                Err(e) => (0, Err(e.kind())),
            });
            match result {
                Ok(Ok(n)) => moved |= n > 0,
                Ok(Err(ErrorKind::Interrupted)) => {}
                Ok(Err(ErrorKind::WouldBlock)) => self.writable = false,
                Ok(Err(_)) | Err(_) => {
                    failed = true;
                    break;
                }
            }
        }
        if failed {
            self.abort();
            return true;
        }
        if self.guest_fin && !self.host_shut && !socket.can_recv() {
            self.host_shut = true;
            let _ = self.host.shutdown(Shutdown::Write);
        }
        moved
    }

    fn host_to_guest(&mut self) -> bool {
        let socket = self.sockets.get_mut::<Socket<'_>>(self.handle);
        let host = &mut self.host;
        let mut moved = false;
        let mut failed = false;
        while self.readable && !self.host_eof && socket.can_send() {
            let result = socket.send(|space| match host.read(space) {
                Ok(n) => (n, Ok(n)),
                Err(e) => (0, Err(e.kind())),
            });
            match result {
                Ok(Ok(0)) => {
                    self.host_eof = true;
                    moved = true;
                }
                Ok(Ok(_)) => moved = true,
                Ok(Err(ErrorKind::Interrupted)) => {}
                Ok(Err(ErrorKind::WouldBlock)) => self.readable = false,
                Ok(Err(_)) | Err(_) => {
                    failed = true;
                    break;
                }
            }
        }
        if failed {
            self.abort();
            return true;
        }
        // Half-close: the guest may go on sending. Once it is done itself, our
        // FIN waits for our data: smoltcp in LAST-ACK takes a bare window
        // update for a duplicate and stalls until its window probe.
        let data_left = socket.state() == State::CloseWait && socket.send_queue() > 0;
        if self.host_eof && !self.closed && !data_left {
            self.closed = true;
            socket.close();
            moved = true;
        }
        moved
    }

    /// The host's end broke: the guest gets a reset with the next poll.
    fn abort(&mut self) {
        self.aborted = true;
        self.sockets.get_mut::<Socket<'_>>(self.handle).abort();
    }

    fn finished(&self) -> bool {
        let socket = self.sockets.get::<Socket<'_>>(self.handle);
        match socket.state() {
            State::Closed => self.aborted || !socket.can_recv(),
            // The guest took its SYN back, or it was none after all.
            State::Listen => true,
            // The peer that would need our TIME-WAIT is on a wire that does
            // not reorder; both directions are through.
            State::TimeWait => self.host_shut && self.rx.is_empty(),
            _ => false,
        }
    }

    /// Passes an abnormal end on to the host's peer as a reset.
    fn close_host(&mut self) {
        if self.aborted || !(self.guest_fin && self.host_eof) {
            let _ = rustix::net::sockopt::set_socket_linger(&self.host, Some(std::time::Duration::ZERO));
        }
    }

    /// Resets the host's end whatever the guest's end is doing.
    pub fn kill(mut self) {
        self.aborted = true;
        self.close_host();
    }
}

/// The flow's end of the wire.
struct Port<'a> {
    rx: &'a mut VecDeque<Vec<u8>>,
    link: &'a mut Link,
    guest: IpAddr,
    budget: usize,
}

impl<'a> Port<'a> {
    fn new(rx: &'a mut VecDeque<Vec<u8>>, link: &'a mut Link, guest: IpAddr) -> Port<'a> {
        Port { rx, link, guest, budget: BURST }
    }
}

impl Device for Port<'_> {
    type RxToken<'t>
        = RxToken
    where
        Self: 't;
    type TxToken<'t>
        = TxToken<'t>
    where
        Self: 't;

    fn capabilities(&self) -> DeviceCapabilities {
        let mut caps = DeviceCapabilities::default();
        caps.medium = Medium::Ip;
        caps.max_transmission_unit = MTU;
        // The guest's frames come from memory, not off a cable, and a guest
        // that leaves checksums to its network card has left them partial.
        caps.checksum.tcp = Checksum::Tx;
        caps.checksum.ipv4 = Checksum::Tx;
        caps
    }

    fn receive(&mut self, _now: Instant) -> Option<(RxToken, TxToken<'_>)> {
        let frame = self.rx.pop_front()?;
        Some((RxToken(frame), TxToken { link: self.link, guest: self.guest }))
    }

    fn transmit(&mut self, _now: Instant) -> Option<TxToken<'_>> {
        if self.budget == 0 || !self.link.ready() {
            return None;
        }
        self.budget -= 1;
        Some(TxToken { link: self.link, guest: self.guest })
    }
}

struct RxToken(Vec<u8>);

impl phy::RxToken for RxToken {
    fn consume<R, F: FnOnce(&[u8]) -> R>(self, f: F) -> R {
        f(self.0.get(ETH..).unwrap_or_default())
    }
}

struct TxToken<'a> {
    link: &'a mut Link,
    guest: IpAddr,
}

impl phy::TxToken for TxToken<'_> {
    fn consume<R, F: FnOnce(&mut [u8]) -> R>(self, len: usize, f: F) -> R {
        self.link.send_ip(self.guest, len, f)
    }
}
