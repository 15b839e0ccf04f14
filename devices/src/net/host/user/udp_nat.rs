//! UDP of the guest: one socket of the host per guest port, which any host
//! may answer (an endpoint-independent mapping, RFC 4787), and the sockets of
//! `hostfwd=udp`.

use std::collections::{HashMap, VecDeque};
use std::io::ErrorKind;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};

use smoltcp::time::{Duration, Instant};
use smoltcp::wire::{IpProtocol, UdpPacket};

use super::config::Target;
use super::env::{Env, IpInfo, Token};
use super::hostfwd::HostFwd;
use super::icmp::{self, Unreachable};

/// A mapping goes this long after its last datagram (slirp's time, and above
/// the two minutes of RFC 4787, REQ-5).
const IDLE: Duration = Duration::from_secs(240);
/// Datagrams taken from one socket before others get a turn.
const BATCH: usize = 64;
/// Peers a forwarding remembers.
const PEERS: usize = 64;

struct Mapping {
    guest: SocketAddr,
    socket: UdpSocket,
    last: Instant,
    readable: bool,
    /// The host address of a `hostfwd`; such a mapping does not expire.
    forward: Option<SocketAddr>,
    /// Of a forwarding: its peers as the guest sees them, and as they are.
    peers: VecDeque<(SocketAddr, SocketAddr)>,
}

#[derive(Default)]
pub(super) struct UdpNat {
    mappings: HashMap<u64, Mapping>,
    by_guest: HashMap<SocketAddr, u64>,
    forwards: Vec<u64>,
    ready: VecDeque<u64>,
    next_sweep: Option<Instant>,
}

impl UdpNat {
    pub fn add_forward(&mut self, env: &mut Env, fwd: HostFwd, socket: UdpSocket) {
        let id = env.next_id();
        if let Err(e) = env.watch(&socket, Token::Udp(id)) {
            log::error!("hostfwd {fwd}: cannot watch the port: {e}");
            return;
        }
        self.forwards.push(id);
        self.mappings.insert(
            id,
            Mapping {
                guest: fwd.guest,
                socket,
                last: env.now,
                readable: false,
                forward: Some(fwd.host),
                peers: VecDeque::new(),
            },
        );
        self.event(id);
    }

    pub fn remove_forward(&mut self, host: SocketAddr) -> bool {
        let found = self.forwards.iter().position(|id| self.mappings.get(id).is_some_and(|m| m.forward == Some(host)));
        found.map(|at| self.mappings.remove(&self.forwards.remove(at))).is_some()
    }

    /// A datagram of the guest; `packet` is the IP packet it came in.
    #[allow(clippy::too_many_arguments)]
    pub fn output(
        &mut self,
        env: &mut Env,
        ip: IpInfo,
        src: SocketAddr,
        dst: SocketAddr,
        target: Target,
        packet: &[u8],
        data: &[u8],
    ) {
        // An answer leaves by the port its question came in by.
        for m in self.forwards.iter().filter_map(|id| self.mappings.get(id)) {
            if m.guest == src
                && let Some((_, peer)) = m.peers.iter().find(|(seen, _)| *seen == dst)
            {
                let _ = m.socket.send_to(data, peer);
                return;
            }
        }
        let to = match target {
            Target::Host(a) | Target::Gateway(a) => SocketAddr::new(a, dst.port()),
            Target::Dns => return icmp::unreachable(env, ip, Unreachable::Port, packet),
            Target::Forbidden => return,
        };
        let Some(m) = self.mapping(env, src) else { return };
        m.last = env.now;
        match m.socket.send_to(data, to) {
            Err(e) if e.kind() == ErrorKind::NetworkUnreachable => {
                icmp::unreachable(env, ip, Unreachable::Net, packet);
            }
            Err(e) if e.kind() == ErrorKind::HostUnreachable => {
                icmp::unreachable(env, ip, Unreachable::Host, packet);
            }
            // A datagram may be lost: a full socket, a filter, a size.
            _ => {}
        }
    }

    fn mapping(&mut self, env: &mut Env, guest: SocketAddr) -> Option<&mut Mapping> {
        if let Some(id) = self.by_guest.get(&guest) {
            return self.mappings.get_mut(id);
        }
        if self.by_guest.len() >= env.max_sockets {
            self.evict_oldest();
        }
        let any: IpAddr = match guest {
            SocketAddr::V4(_) => Ipv4Addr::UNSPECIFIED.into(),
            SocketAddr::V6(_) => Ipv6Addr::UNSPECIFIED.into(),
        };
        let socket = UdpSocket::bind((any, 0)).ok()?;
        socket.set_nonblocking(true).ok()?;
        let id = env.next_id();
        env.watch(&socket, Token::Udp(id)).ok()?;
        self.by_guest.insert(guest, id);
        self.next_sweep.get_or_insert(env.now + IDLE);
        let mapping = Mapping { guest, socket, last: env.now, readable: false, forward: None, peers: VecDeque::new() };
        Some(self.mappings.entry(id).or_insert(mapping))
    }

    fn evict_oldest(&mut self) {
        let oldest = self.by_guest.iter().min_by_key(|(_, id)| self.mappings.get(id).map(|m| m.last));
        if let Some((&guest, &id)) = oldest {
            self.by_guest.remove(&guest);
            self.mappings.remove(&id);
        }
    }

    /// A socket has datagrams.
    pub fn event(&mut self, id: u64) {
        if let Some(m) = self.mappings.get_mut(&id)
            && !std::mem::replace(&mut m.readable, true)
        {
            self.ready.push_back(id);
        }
    }

    /// Passes datagrams to the guest; true when there are more.
    pub fn turn(&mut self, env: &mut Env) -> bool {
        let mut buffer = [0; 65536];
        for _ in 0..self.ready.len() {
            let Some(id) = self.ready.pop_front() else { break };
            let Some(m) = self.mappings.get_mut(&id) else { continue };
            for _ in 0..BATCH {
                if !m.readable || !env.link.ready() {
                    break;
                }
                match m.socket.recv_from(&mut buffer) {
                    Ok((n, peer)) => m.input(env, peer, &buffer[..n]),
                    Err(e) if e.kind() == ErrorKind::WouldBlock => m.readable = false,
                    // An earlier datagram's ICMP error; it is consumed.
                    Err(_) => {}
                }
            }
            if m.readable {
                self.ready.push_back(id);
            }
        }
        !self.ready.is_empty()
    }

    /// Ends mappings that are idle.
    pub fn expire(&mut self, now: Instant) {
        if self.next_sweep.is_none_or(|at| at > now) {
            return;
        }
        let dead = |m: &Mapping| m.forward.is_none() && m.last + IDLE <= now;
        self.mappings.retain(|_, m| !dead(m));
        self.by_guest.retain(|_, id| self.mappings.contains_key(id));
        self.next_sweep = self.by_guest.values().filter_map(|id| self.mappings.get(id)).map(|m| m.last + IDLE).min();
    }

    pub fn next_timer(&self) -> Option<Instant> {
        self.next_sweep
    }
}

impl Mapping {
    fn input(&mut self, env: &mut Env, peer: SocketAddr, data: &[u8]) {
        self.last = env.now;
        let Some(ip) = env.net.peer_as_seen(peer.ip(), self.guest.ip()) else { return };
        let seen = SocketAddr::new(ip, peer.port());
        if self.forward.is_some() && self.peers.front() != Some(&(seen, peer)) {
            self.peers.retain(|(s, _)| *s != seen);
            self.peers.push_front((seen, peer));
            self.peers.truncate(PEERS);
        }
        send(env, seen, self.guest, data);
    }
}

/// Sends a datagram to the guest.
pub(super) fn send(env: &mut Env, src: SocketAddr, dst: SocketAddr, data: &[u8]) {
    let Ok(len) = u16::try_from(8 + data.len()) else { return };
    let mut buffer = vec![0; usize::from(len)];
    let mut udp = UdpPacket::new_unchecked(&mut buffer[..]);
    udp.set_src_port(src.port());
    udp.set_dst_port(dst.port());
    udp.set_len(len);
    udp.payload_mut().copy_from_slice(data);
    udp.fill_checksum(&src.ip().into(), &dst.ip().into());
    env.link.send_datagram(src.ip(), dst.ip(), IpProtocol::Udp, &buffer);
}
