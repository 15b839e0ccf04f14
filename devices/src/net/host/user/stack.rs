//! The network's thread: takes the guest's frames, waits for the host's
//! sockets, and gives each protocol its turn.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::Ordering;

use rustix::event::epoll::{Event, EventFlags};
use smoltcp::time::{Duration, Instant};
use smoltcp::wire::{EthernetAddress, EthernetFrame, EthernetProtocol, IpProtocol, Ipv4Packet, Ipv6Packet, UdpPacket};

use super::arp;
use super::config::{Net, Target};
use super::dhcp::DhcpServer;
use super::dns::DnsForwarder;
use super::env::{Env, IpInfo, Token};
use super::frag::Reassembly;
use super::hostfwd::{HostFwd, Listener, Proto};
use super::icmp::{self, Pings};
use super::link::{ETH, Link};
use super::ndp;
use super::tcp_nat::TcpNat;
use super::udp_nat::UdpNat;
use super::{Command, Inbox, Shared};

/// Events taken per wait.
const EVENTS: usize = 128;
/// Connections accepted per port and turn.
const ACCEPTS: usize = 32;
/// Wait before accepting again when the host is out of descriptors, in µs.
const ACCEPT_RETRY: i64 = 200_000;

/// Between unsolicited router advertisements (RFC 4861, 6.2.1: the default
/// MaxRtrAdvInterval).
const ADVERT_INTERVAL: Duration = Duration::from_secs(600);

struct TcpListen {
    id: u64,
    fwd: HostFwd,
    listener: std::net::TcpListener,
    ready: bool,
}

pub(super) struct Stack {
    env: Env,
    shared: Arc<Shared>,
    tcp: TcpNat,
    udp: UdpNat,
    dns: DnsForwarder,
    dhcp: DhcpServer,
    pings: Pings,
    frag: Reassembly,
    listeners: Vec<TcpListen>,
    accept_again: Option<Instant>,
    /// When the router is next advertised without being asked.
    next_advert: Option<Instant>,
    clock: std::time::Instant,
}

impl Stack {
    pub fn new(net: Net, shared: Arc<Shared>) -> Result<Stack, String> {
        let guest = Arc::clone(&shared);
        let deliver = Box::new(move |frame: &[u8]| guest.deliver(frame));
        let o = net.v4.map_or([10, 0, 2, 2], |n| n.host.octets());
        let mac = EthernetAddress([0x52, 0x55, o[0], o[1], o[2], o[3]]);
        let dns = DnsForwarder::new(net.dns_servers.clone());
        let next_advert = net.v6.map(|_| Instant::ZERO);
        let env = Env::new(net, Link::new(deliver, mac))?;
        env.watch(&shared.wake, Token::Wake)
            .map_err(|e| format!("netdev user: cannot watch the wake-up counter: {e}"))?;
        Ok(Stack {
            env,
            shared,
            tcp: TcpNat::default(),
            udp: UdpNat::default(),
            dns,
            dhcp: DhcpServer::default(),
            pings: Pings::default(),
            frag: Reassembly::default(),
            listeners: Vec::new(),
            accept_again: None,
            next_advert,
            clock: std::time::Instant::now(),
        })
    }

    pub fn run(&mut self) {
        let mut events = Vec::with_capacity(EVENTS);
        while !self.shared.stop.load(Ordering::SeqCst) {
            #[cfg(test)]
            self.shared.turns.fetch_add(1, Ordering::Relaxed);
            self.tick();
            self.take_inbox();
            let more = self.work();
            self.wait(&mut events, more);
            for event in &events {
                if let Some(token) = Token::unpack(event.data.u64()) {
                    self.event(token, event.flags);
                }
            }
        }
    }

    /// Advances the flows' clock, which stands still while the guest takes
    /// no frames: a paused machine must not time its connections out.
    fn tick(&mut self) {
        let now = std::time::Instant::now();
        let passed = now.saturating_duration_since(self.clock);
        self.clock = now;
        if self.env.link.ready() {
            self.env.now += passed.into();
        }
        if self.shared.can_receive.swap(false, Ordering::SeqCst) && !self.env.link.ready() {
            self.env.link.unblock();
            if self.env.link.ready() {
                self.tcp.unblocked();
            }
        }
    }

    fn take_inbox(&mut self) {
        let Inbox { frames, commands, .. } = std::mem::take(&mut *self.shared.inbox());
        for command in commands {
            self.command(command);
        }
        for frame in frames {
            self.frame(frame);
        }
    }

    /// Gives every protocol its turn; true when there is more to do at once.
    fn work(&mut self) -> bool {
        let now = self.env.now;
        self.tcp.expire(now);
        self.dns.expire(&mut self.env);
        self.udp.expire(now);
        self.pings.expire(now);
        self.frag.expire(now);
        self.advertise();
        self.accept();
        let mut more = self.tcp.turn(&mut self.env);
        if self.env.link.ready() {
            more |= self.udp.turn(&mut self.env);
        }
        for addr in std::mem::take(&mut self.env.link.unresolved) {
            match (addr, self.env.net.v4, self.env.net.v6) {
                (IpAddr::V4(a), Some(net), _) => arp::request(&mut self.env.link, &net, a),
                (IpAddr::V6(a), _, Some(_)) => ndp::solicit(&mut self.env, a),
                _ => {}
            }
        }
        more && self.env.link.ready()
    }

    /// Advertises the router every so often: its lifetime is finite.
    fn advertise(&mut self) {
        if let Some(net) = self.env.net.v6
            && self.next_advert.is_some_and(|at| at <= self.env.now)
        {
            ndp::advertise_router(&mut self.env, &net);
            self.next_advert = Some(self.env.now + ADVERT_INTERVAL);
        }
    }

    fn wait(&mut self, events: &mut Vec<Event>, more: bool) {
        let timers = [
            self.tcp.next_timer(),
            self.dns.next_timer(),
            self.udp.next_timer(),
            self.pings.next_timer(),
            self.accept_again,
            self.next_advert,
        ];
        // The clock stands still while the guest takes nothing: no timer comes.
        let next = timers.into_iter().flatten().min().filter(|_| self.env.link.ready());
        let mut timeout = next.map(|at| (at.total_micros() - self.env.now.total_micros()).max(0));
        self.shared.sleeping.store(true, Ordering::SeqCst);
        if more || self.has_work() {
            timeout = Some(0);
        }
        self.env.wait(events, timeout);
        self.shared.sleeping.store(false, Ordering::SeqCst);
    }

    fn has_work(&self) -> bool {
        let inbox = self.shared.inbox();
        !inbox.frames.is_empty()
            || !inbox.commands.is_empty()
            || self.shared.stop.load(Ordering::SeqCst)
            || self.shared.can_receive.load(Ordering::SeqCst)
    }

    fn event(&mut self, token: Token, flags: EventFlags) {
        match token {
            Token::Wake => {
                let _ = rustix::io::read(&self.shared.wake, &mut [0u8; 8]);
            }
            Token::Tcp(id) => self.tcp.event(&mut self.env, id, flags),
            Token::Udp(id) => self.udp.event(id),
            Token::Dns(id) => self.dns.event(&mut self.env, id),
            Token::Ping(id) => self.pings.event(&mut self.env, id),
            Token::Listener(id) => {
                if let Some(l) = self.listeners.iter_mut().find(|l| l.id == id) {
                    l.ready = true;
                }
            }
        }
    }

    fn command(&mut self, command: Command) {
        match command {
            Command::Add(fwd, Listener::Tcp(listener)) => {
                let id = self.env.next_id();
                match self.env.watch(&listener, Token::Listener(id)) {
                    Ok(()) => self.listeners.push(TcpListen { id, fwd, listener, ready: true }),
                    Err(e) => log::error!("hostfwd {fwd}: cannot watch the port: {e}"),
                }
            }
            Command::Add(fwd, Listener::Udp(socket)) => self.udp.add_forward(&mut self.env, fwd, socket),
            Command::Remove(Proto::Tcp, host, reply) => {
                let before = self.listeners.len();
                self.listeners.retain(|l| l.fwd.host != host);
                let _ = reply.send(self.listeners.len() < before);
            }
            Command::Remove(Proto::Udp, host, reply) => {
                let _ = reply.send(self.udp.remove_forward(host));
            }
        }
    }

    fn accept(&mut self) {
        if self.accept_again.is_some_and(|at| at <= self.env.now) {
            self.accept_again = None;
            self.listeners.iter_mut().for_each(|l| l.ready = true);
        }
        for l in self.listeners.iter_mut().filter(|l| l.ready) {
            l.ready = false;
            for turn in 0.. {
                if turn == ACCEPTS {
                    l.ready = true;
                    self.accept_again = Some(self.env.now);
                    break;
                }
                match l.listener.accept() {
                    Ok((host, peer)) => self.tcp.forward(&mut self.env, host, peer, l.fwd.guest),
                    Err(e) if e.kind() == std::io::ErrorKind::WouldBlock => break,
                    Err(e) => {
                        log::warn!("hostfwd {}: cannot accept a connection: {e}", l.fwd);
                        let later = Duration::from_micros(ACCEPT_RETRY as u64);
                        self.accept_again = Some(self.env.now + later);
                        break;
                    }
                }
            }
        }
    }

    /// A frame of the guest.
    fn frame(&mut self, mut frame: Vec<u8>) {
        let Ok(eth) = EthernetFrame::new_checked(&frame[..]) else { return };
        let (src, dst) = (eth.src_addr(), eth.dst_addr());
        if !src.is_unicast() || src == self.env.link.mac {
            return;
        }
        if dst != self.env.link.mac && dst.is_unicast() {
            return;
        }
        match eth.ethertype() {
            EthernetProtocol::Arp => {
                if let Some(net) = self.env.net.v4 {
                    arp::input(&mut self.env.link, &net, &frame[ETH..]);
                }
            }
            EthernetProtocol::Ipv4 if self.env.net.v4.is_some() => {
                let Ok(packet) = Ipv4Packet::new_checked(&frame[ETH..]) else { return };
                if packet.version() != 4 || packet.header_len() < 20 {
                    return;
                }
                let ip = IpInfo {
                    src: packet.src_addr().into(),
                    dst: packet.dst_addr().into(),
                    proto: packet.next_header(),
                };
                let at = ETH + usize::from(packet.header_len());
                let end = ETH + usize::from(packet.total_len());
                let piece = (packet.more_frags() || packet.frag_offset() != 0)
                    .then(|| (u32::from(packet.ident()), usize::from(packet.frag_offset()), packet.more_frags()));
                frame.truncate(end);
                self.ip(ip, src, frame, at, piece);
            }
            EthernetProtocol::Ipv6 if self.env.net.v6.is_some() => {
                let Ok(packet) = Ipv6Packet::new_checked(&frame[ETH..]) else { return };
                if packet.version() != 6 {
                    return;
                }
                let mut ip = IpInfo {
                    src: packet.src_addr().into(),
                    dst: packet.dst_addr().into(),
                    proto: packet.next_header(),
                };
                let end = ETH + packet.total_len();
                frame.truncate(end);
                let mut at = ETH + 40;
                let mut piece = None;
                // Other extension headers have no business at this gateway.
                if ip.proto == IpProtocol::Ipv6Frag {
                    let Some(&[next, _, hi, lo, i0, i1, i2, i3]) = frame[at..].first_chunk() else {
                        return;
                    };
                    let field = u16::from_be_bytes([hi, lo]);
                    piece = Some((u32::from_be_bytes([i0, i1, i2, i3]), usize::from(field & !7), field & 1 != 0));
                    ip.proto = next.into();
                    at += 8;
                }
                self.ip(ip, src, frame, at, piece);
            }
            _ => {}
        }
    }

    /// An IP packet whose payload starts at `at`; `piece` is its fragment's
    /// identification, offset in bytes, and whether more follow.
    fn ip(&mut self, ip: IpInfo, mac: EthernetAddress, frame: Vec<u8>, at: usize, piece: Option<(u32, usize, bool)>) {
        if ip.src.is_multicast() || ip.src.is_loopback() || self.env.net.is_ours(ip.src) {
            return;
        }
        if matches!(ip.src, IpAddr::V4(a) if a.is_broadcast()) {
            return;
        }
        self.env.link.learn(ip.src, mac);
        match piece {
            None if ip.proto == IpProtocol::Tcp => {
                let dns = self.dns_for(ip.dst, &frame, at);
                self.tcp.input(&mut self.env, ip, frame, at, &dns);
            }
            None => self.payload(ip, mac, &frame[ETH..], &frame[at..]),
            Some(_) if ip.proto == IpProtocol::Tcp => {}
            Some((id, offset, more)) => {
                let whole = self.frag.add(self.env.now, ip, id, offset, more, &frame[at..]);
                if let Some(payload) = whole {
                    self.payload(ip, mac, &frame[ETH..], &payload);
                }
            }
        }
    }

    /// The resolvers, when this SYN asks for the DNS forwarder.
    fn dns_for(&mut self, dst: IpAddr, frame: &[u8], at: usize) -> Vec<SocketAddr> {
        let syn = frame.get(at + 13).is_some_and(|flags| flags & 2 != 0);
        if !syn || self.env.net.classify(dst) != Target::Dns {
            return Vec::new();
        }
        self.dns.servers(self.env.now).to_vec()
    }

    fn payload(&mut self, ip: IpInfo, mac: EthernetAddress, packet: &[u8], payload: &[u8]) {
        match ip.proto {
            IpProtocol::Udp => self.datagram(ip, mac, packet, payload),
            IpProtocol::Icmp => icmp::input4(&mut self.env, &mut self.pings, ip, payload),
            IpProtocol::Icmpv6 => ndp::input(&mut self.env, &mut self.pings, ip, mac, payload),
            _ => {}
        }
    }

    fn datagram(&mut self, ip: IpInfo, mac: EthernetAddress, packet: &[u8], payload: &[u8]) {
        let Ok(udp) = UdpPacket::new_checked(payload) else { return };
        let src = SocketAddr::new(ip.src, udp.src_port());
        let dst = SocketAddr::new(ip.dst, udp.dst_port());
        if ip.dst.is_ipv4() && dst.port() == 67 {
            return self.dhcp.input(&mut self.env, mac, udp.payload());
        }
        if src.ip().is_unspecified() || src.port() == 0 || dst.port() == 0 {
            return;
        }
        match self.env.net.classify(ip.dst) {
            Target::Dns if dst.port() == 53 => self.dns.query(&mut self.env, src, dst, udp.payload()),
            target => self.udp.output(&mut self.env, ip, src, dst, target, packet, udp.payload()),
        }
    }
}
