//! TCP of the guest to sockets of the host, and of `hostfwd` ports to the
//! guest. A guest's SYN is answered once the host's own connection stands:
//! a refused connection is refused to the guest, too.

use std::collections::{BTreeSet, HashMap, VecDeque};
use std::io;
use std::net::{IpAddr, SocketAddr, TcpStream};
use std::os::fd::OwnedFd;
use std::panic::{AssertUnwindSafe, catch_unwind};

use rustix::event::epoll::EventFlags;
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketFlags, SocketType};
use smoltcp::time::Instant;
use smoltcp::wire::{IpProtocol, IpRepr, TcpControl, TcpPacket, TcpRepr};

use super::config::Target;
use super::env::{Env, IpInfo, Token};
use super::icmp;
use super::link::ETH;
use super::tcp_flow::{Flow, FlowKey, Turn};

/// A connection to the host that is being set up.
struct Pending {
    key: FlowKey,
    host: TcpStream,
    /// The guest's SYN with its Ethernet header, and where TCP starts in it.
    syn: Vec<u8>,
    tcp_at: usize,
    /// Where to try when this address fails.
    targets: VecDeque<SocketAddr>,
}

enum Entry {
    Pending(Pending),
    Open(Box<Flow>),
}

#[derive(Default)]
pub(super) struct TcpNat {
    entries: HashMap<u64, Entry>,
    by_key: HashMap<FlowKey, u64>,
    dirty: VecDeque<u64>,
    is_dirty: std::collections::HashSet<u64>,
    timers: BTreeSet<(Instant, u64)>,
    timer_of: HashMap<u64, Instant>,
}

impl TcpNat {
    /// Takes a TCP segment of the guest; `tcp_at` is where it starts in `frame`.
    pub fn input(&mut self, env: &mut Env, ip: IpInfo, frame: Vec<u8>, tcp_at: usize, dns: &[SocketAddr]) {
        let Ok(segment) = TcpPacket::new_checked(&frame[tcp_at..]) else { return };
        let key = FlowKey { guest: (ip.src, segment.src_port()).into(), remote: (ip.dst, segment.dst_port()).into() };
        if key.guest.port() == 0 || key.remote.port() == 0 {
            return;
        }
        let (syn, ack, rst) = (segment.syn(), segment.ack(), segment.rst());
        if let Some(&id) = self.by_key.get(&key) {
            match self.entries.get_mut(&id) {
                Some(Entry::Open(flow)) => {
                    flow.input(frame);
                    self.mark(id);
                }
                Some(Entry::Pending(_)) if rst => self.remove(id),
                // The guest repeats its SYN while the host connects.
                _ => {}
            }
        } else if syn && !ack && !rst {
            self.open(env, key, frame, tcp_at, dns);
        } else if !rst {
            reset(env, ip, &frame[tcp_at..]);
        }
    }

    fn open(&mut self, env: &mut Env, key: FlowKey, syn: Vec<u8>, tcp_at: usize, dns: &[SocketAddr]) {
        let port = key.remote.port();
        let targets: VecDeque<SocketAddr> = match env.net.classify(key.remote.ip()) {
            Target::Host(a) | Target::Gateway(a) => [SocketAddr::new(a, port)].into(),
            Target::Dns if port == 53 => dns.iter().copied().collect(),
            Target::Dns | Target::Forbidden => VecDeque::new(),
        };
        if self.entries.len() >= env.max_sockets {
            return refuse(env, key, &syn, tcp_at, Errno::CONNREFUSED);
        }
        self.try_next(env, None, key, syn, tcp_at, targets);
    }

    /// Starts connecting to the first of `targets` that takes it.
    fn try_next(
        &mut self,
        env: &mut Env,
        id: Option<u64>,
        key: FlowKey,
        syn: Vec<u8>,
        tcp_at: usize,
        mut targets: VecDeque<SocketAddr>,
    ) {
        let mut last = Errno::CONNREFUSED;
        while let Some(target) = targets.pop_front() {
            match start_connect(target) {
                Ok(host) => {
                    let id = id.unwrap_or_else(|| env.next_id());
                    if env.watch(&host, Token::Tcp(id)).is_err() {
                        break;
                    }
                    self.by_key.insert(key, id);
                    self.entries.insert(id, Entry::Pending(Pending { key, host, syn, tcp_at, targets }));
                    return;
                }
                Err(e) => last = e,
            }
        }
        if let Some(id) = id {
            self.remove(id);
        }
        refuse(env, key, &syn, tcp_at, last);
    }

    /// A connection to a `hostfwd` port: connects on to the guest.
    pub fn forward(&mut self, env: &mut Env, host: TcpStream, peer: SocketAddr, guest: SocketAddr) {
        if self.entries.len() >= env.max_sockets || host.set_nonblocking(true).is_err() {
            return;
        }
        let Some(ip) = env.net.peer_as_seen(peer.ip(), guest.ip()) else { return };
        let mut key = FlowKey { guest, remote: (ip, peer.port()).into() };
        // Two peers may look the same to the guest: keep their ports apart.
        for _ in 0..16 {
            if !self.by_key.contains_key(&key) && key.remote.port() != 0 {
                break;
            }
            key.remote.set_port(49152 + (env.random() % 16384) as u16);
        }
        let id = env.next_id();
        if self.by_key.contains_key(&key) || env.watch(&host, Token::Tcp(id)).is_err() {
            return;
        }
        let mut flow = self.flow(env, key, host);
        if flow.connect() {
            self.insert(id, flow);
        }
    }

    fn flow(&self, env: &mut Env, key: FlowKey, host: TcpStream) -> Box<Flow> {
        let seed = env.random();
        let buffer = buffer_size(self.entries.len());
        Box::new(Flow::new(key, host, buffer, seed, env.now, &mut env.link))
    }

    fn insert(&mut self, id: u64, flow: Box<Flow>) {
        self.by_key.insert(flow.key, id);
        self.entries.insert(id, Entry::Open(flow));
        self.mark(id);
    }

    /// Readiness of a host socket.
    pub fn event(&mut self, env: &mut Env, id: u64, flags: EventFlags) {
        let broken = flags.intersects(EventFlags::ERR | EventFlags::HUP);
        match self.entries.get_mut(&id) {
            Some(Entry::Open(flow)) => {
                let readable = broken || flags.intersects(EventFlags::IN | EventFlags::RDHUP);
                flow.host_event(readable, broken || flags.contains(EventFlags::OUT));
                self.mark(id);
            }
            Some(Entry::Pending(_)) if broken || flags.contains(EventFlags::OUT) => {
                self.connected(env, id);
            }
            _ => {}
        }
    }

    fn connected(&mut self, env: &mut Env, id: u64) {
        let Some(Entry::Pending(p)) = self.entries.remove(&id) else { return };
        let error = match p.host.take_error() {
            Ok(None) => p.host.peer_addr().err(),
            Ok(error) => error,
            Err(error) => Some(error),
        };
        match error {
            None => {
                let mut flow = self.flow(env, p.key, p.host);
                if flow.accept(p.syn) {
                    self.insert(id, flow);
                } else {
                    self.by_key.remove(&p.key);
                }
            }
            Some(e) if p.targets.is_empty() => {
                self.by_key.remove(&p.key);
                refuse(env, p.key, &p.syn, p.tcp_at, errno(&e));
            }
            Some(_) => {
                drop(p.host);
                self.try_next(env, Some(id), p.key, p.syn, p.tcp_at, p.targets);
            }
        }
    }

    fn mark(&mut self, id: u64) {
        if self.is_dirty.insert(id) {
            self.dirty.push_back(id);
        }
    }

    /// Marks the flows whose time has come.
    pub fn expire(&mut self, now: Instant) {
        while let Some(&(at, id)) = self.timers.first() {
            if at > now {
                break;
            }
            self.timers.pop_first();
            self.timer_of.remove(&id);
            self.mark(id);
        }
    }

    /// Marks every flow: the guest takes frames again.
    pub fn unblocked(&mut self) {
        let ids: Vec<u64> = self.entries.keys().copied().collect();
        ids.into_iter().for_each(|id| self.mark(id));
    }

    /// Gives every flow with work one turn; true when some have more to do.
    pub fn turn(&mut self, env: &mut Env) -> bool {
        for _ in 0..self.dirty.len() {
            let Some(id) = self.dirty.pop_front() else { break };
            self.is_dirty.remove(&id);
            let Some(Entry::Open(flow)) = self.entries.get_mut(&id) else { continue };
            let (now, link) = (env.now, &mut env.link);
            // A defect that some segment brings out ends its flow, not the network.
            let turn = catch_unwind(AssertUnwindSafe(|| {
                let turn = flow.turn(now, link);
                (flow.poll_at(now), turn)
            }));
            match turn {
                Ok((_, Turn::Done)) => self.remove(id),
                Ok((_, Turn::Again)) => self.mark(id),
                Ok((at, Turn::Idle)) => self.set_timer(id, at, env),
                Err(_) => {
                    log::error!("netdev user: a TCP flow failed on what the guest sent; it is closed");
                    if let Some(Entry::Open(flow)) = self.take(id) {
                        flow.kill();
                    }
                }
            }
        }
        !self.dirty.is_empty()
    }

    fn set_timer(&mut self, id: u64, at: Option<Instant>, env: &Env) {
        // While the guest takes nothing every flow is due; it is woken later.
        let at = at.filter(|_| env.link.ready());
        if self.timer_of.get(&id).copied() == at {
            return;
        }
        if let Some(old) = self.timer_of.remove(&id) {
            self.timers.remove(&(old, id));
        }
        if let Some(at) = at {
            self.timer_of.insert(id, at);
            self.timers.insert((at, id));
        }
    }

    /// When the next flow is due.
    pub fn next_timer(&self) -> Option<Instant> {
        self.timers.first().map(|(at, _)| *at)
    }

    fn take(&mut self, id: u64) -> Option<Entry> {
        if let Some(at) = self.timer_of.remove(&id) {
            self.timers.remove(&(at, id));
        }
        let entry = self.entries.remove(&id);
        match &entry {
            Some(Entry::Open(f)) => self.by_key.remove(&f.key),
            Some(Entry::Pending(p)) => self.by_key.remove(&p.key),
            None => None,
        };
        entry
    }

    fn remove(&mut self, id: u64) {
        self.take(id);
    }
}

/// Buffers shrink as flows multiply: at most about 70 MB in all.
fn buffer_size(flows: usize) -> usize {
    match flows {
        0..32 => 256 << 10,
        32..256 => 64 << 10,
        _ => 16 << 10,
    }
}

fn errno(e: &io::Error) -> Errno {
    e.raw_os_error().map_or(Errno::CONNREFUSED, Errno::from_raw_os_error)
}

fn start_connect(target: SocketAddr) -> Result<TcpStream, Errno> {
    let family = if target.is_ipv4() { AddressFamily::INET } else { AddressFamily::INET6 };
    let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
    let fd: OwnedFd = rustix::net::socket_with(family, SocketType::STREAM, flags, None)?;
    match rustix::net::connect(&fd, &target) {
        Ok(()) | Err(Errno::INPROGRESS) => Ok(fd.into()),
        Err(e) => Err(e),
    }
}

/// Tells the guest that its SYN came to nothing.
fn refuse(env: &mut Env, key: FlowKey, syn: &[u8], tcp_at: usize, why: Errno) {
    let ip = IpInfo { src: key.guest.ip(), dst: key.remote.ip(), proto: IpProtocol::Tcp };
    match why {
        Errno::NETUNREACH => icmp::unreachable(env, ip, icmp::Unreachable::Net, &syn[ETH..]),
        Errno::HOSTUNREACH | Errno::TIMEDOUT => {
            icmp::unreachable(env, ip, icmp::Unreachable::Host, &syn[ETH..]);
        }
        _ => reset(env, ip, &syn[tcp_at..]),
    }
}

/// Answers a segment that belongs to nothing with a reset (RFC 9293, 3.5.2).
fn reset(env: &mut Env, ip: IpInfo, segment: &[u8]) {
    let Ok(packet) = TcpPacket::new_checked(segment) else { return };
    let usable = |a: IpAddr| !a.is_unspecified() && !a.is_multicast();
    if !usable(ip.src) || !usable(ip.dst) {
        return;
    }
    let seq = packet.seq_number() + packet.segment_len();
    let repr = TcpRepr {
        src_port: packet.dst_port(),
        dst_port: packet.src_port(),
        control: TcpControl::Rst,
        seq_number: if packet.ack() { packet.ack_number() } else { Default::default() },
        ack_number: (!packet.ack()).then_some(seq),
        window_len: 0,
        window_scale: None,
        max_seg_size: None,
        sack_permitted: false,
        sack_ranges: [None; 3],
        timestamp: None,
        payload: &[],
    };
    let (src, dst) = (ip.dst.into(), ip.src.into());
    let header = IpRepr::new(src, dst, IpProtocol::Tcp, repr.buffer_len(), 64);
    let caps = smoltcp::phy::ChecksumCapabilities::default();
    env.link.send_ip(ip.src, header.buffer_len(), |b| {
        header.emit(&mut *b, &caps);
        let mut packet = TcpPacket::new_unchecked(&mut b[header.header_len()..]);
        repr.emit(&mut packet, &src, &dst, &caps);
    });
}
