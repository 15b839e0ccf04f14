//! ICMP: echo, and the errors that tell the guest why nothing comes back.
//! The gateway answers pings itself; others go out by the host's unprivileged
//! ping sockets, where `net.ipv4.ping_group_range` permits them.

use std::collections::HashMap;
use std::io::ErrorKind;
use std::net::{IpAddr, SocketAddr, UdpSocket};

use rustix::net::{AddressFamily, SocketFlags, SocketType, ipproto};
use smoltcp::time::{Duration, Instant};
use smoltcp::wire::IpProtocol;

use super::config::Target;
use super::env::{Env, IpInfo, Token};

const IDLE: Duration = Duration::from_secs(20);
const SOCKETS: usize = 32;
/// Replies taken from one socket per event; ping sockets are edge-watched, so
/// the rest is read with the next reply.
const BATCH: usize = 256;

const ECHO_REPLY: u8 = 0;
const ECHO_REQUEST: u8 = 8;
pub(super) const ECHO_REQUEST6: u8 = 128;
const ECHO_REPLY6: u8 = 129;

/// Why a packet went nowhere.
#[derive(Debug, Clone, Copy)]
pub(super) enum Unreachable {
    Net,
    Host,
    Port,
}

struct Ping {
    guest: IpAddr,
    ident: [u8; 2],
    socket: UdpSocket,
    last: Instant,
}

/// Echo requests on their way, by guest address and identifier.
#[derive(Default)]
pub(super) struct Pings {
    pings: HashMap<u64, Ping>,
    denied: bool,
}

/// An ICMP message of the guest over IPv4.
pub(super) fn input4(env: &mut Env, pings: &mut Pings, ip: IpInfo, message: &[u8]) {
    if ip.dst.is_ipv4() && message.len() >= 8 && message[..2] == [ECHO_REQUEST, 0] {
        echo(env, pings, ip, message);
    }
}

/// An echo request of the guest, of either family.
pub(super) fn echo(env: &mut Env, pings: &mut Pings, ip: IpInfo, message: &[u8]) {
    if ip.src.is_unspecified() {
        return;
    }
    if env.net.is_ours(ip.dst) {
        return reply(env, ip.dst, ip.src, message.to_vec());
    }
    match env.net.classify(ip.dst) {
        Target::Host(dst) => pings.send(env, ip.src, dst, message),
        Target::Gateway(_) | Target::Dns | Target::Forbidden => {}
    }
}

/// Sends `message` as an echo reply.
fn reply(env: &mut Env, src: IpAddr, dst: IpAddr, mut message: Vec<u8>) {
    message[0] = if dst.is_ipv4() { ECHO_REPLY } else { ECHO_REPLY6 };
    send(env, src, dst, message);
}

/// Sends an ICMP message after filling its checksum.
pub(super) fn send(env: &mut Env, src: IpAddr, dst: IpAddr, mut message: Vec<u8>) {
    message[2..4].fill(0);
    let pseudo = match (src, dst) {
        (IpAddr::V6(s), IpAddr::V6(d)) => {
            // RFC 8200, section 8.1: addresses, length, next header.
            let words = words(&s.octets()) + words(&d.octets());
            words + message.len() as u64 + u64::from(u8::from(IpProtocol::Icmpv6))
        }
        _ => 0,
    };
    let sum = checksum(pseudo + words(&message));
    message[2..4].copy_from_slice(&sum.to_be_bytes());
    let proto = if dst.is_ipv4() { IpProtocol::Icmp } else { IpProtocol::Icmpv6 };
    env.link.send_datagram(src, dst, proto, &message);
}

/// The sum of the 16-bit words of `bytes` (RFC 1071), not yet folded.
fn words(bytes: &[u8]) -> u64 {
    let (pairs, rest) = bytes.as_chunks::<2>();
    let sum: u64 = pairs.iter().map(|p| u64::from(u16::from_be_bytes(*p))).sum();
    sum + rest.first().map_or(0, |b| u64::from(*b) << 8)
}

fn checksum(mut sum: u64) -> u16 {
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !(sum as u16)
}

/// Tells the guest that its `packet` cannot be delivered (RFC 792, RFC 4443).
pub(super) fn unreachable(env: &mut Env, ip: IpInfo, why: Unreachable, packet: &[u8]) {
    let Some(gateway) = env.net.gateway(ip.src) else { return };
    if ip.src.is_unspecified() {
        return;
    }
    // From the address itself where it is ours: it is we who refuse.
    let source = if env.net.is_ours(ip.dst) { ip.dst } else { gateway };
    let (kind, quoted) = match (ip.src, why) {
        (IpAddr::V4(_), Unreachable::Net) => ([3, 0], 548),
        (IpAddr::V4(_), Unreachable::Host) => ([3, 1], 548),
        (IpAddr::V4(_), Unreachable::Port) => ([3, 3], 548),
        (IpAddr::V6(_), Unreachable::Net) => ([1, 0], 1232),
        (IpAddr::V6(_), Unreachable::Host) => ([1, 3], 1232),
        (IpAddr::V6(_), Unreachable::Port) => ([1, 4], 1232),
    };
    let mut message = vec![kind[0], kind[1], 0, 0, 0, 0, 0, 0];
    message.extend_from_slice(&packet[..packet.len().min(quoted)]);
    send(env, source, ip.src, message);
}

impl Pings {
    fn send(&mut self, env: &mut Env, guest: IpAddr, dst: IpAddr, message: &[u8]) {
        let ident = [message[4], message[5]];
        let known = self.pings.iter().find(|(_, p)| p.guest == guest && p.ident == ident);
        let id = match known.map(|(id, _)| *id).or_else(|| self.open(env, guest, ident)) {
            Some(id) => id,
            None => return,
        };
        let Some(ping) = self.pings.get_mut(&id) else { return };
        ping.last = env.now;
        let _ = ping.socket.send_to(message, SocketAddr::new(dst, 0));
    }

    fn open(&mut self, env: &mut Env, guest: IpAddr, ident: [u8; 2]) -> Option<u64> {
        if self.denied {
            return None;
        }
        let (family, proto) = match guest {
            IpAddr::V4(_) => (AddressFamily::INET, ipproto::ICMP),
            IpAddr::V6(_) => (AddressFamily::INET6, ipproto::ICMPV6),
        };
        let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
        let socket = match rustix::net::socket_with(family, SocketType::DGRAM, flags, Some(proto)) {
            Ok(fd) => UdpSocket::from(fd),
            Err(e) => {
                self.denied = matches!(e, rustix::io::Errno::ACCESS | rustix::io::Errno::PERM);
                log::debug!("netdev user: cannot ping for the guest: {e}");
                return None;
            }
        };
        if self.pings.len() >= SOCKETS {
            let oldest = self.pings.iter().min_by_key(|(_, p)| p.last).map(|(id, _)| *id);
            oldest.map(|id| self.pings.remove(&id));
        }
        let id = env.next_id();
        env.watch(&socket, Token::Ping(id)).ok()?;
        self.pings.insert(id, Ping { guest, ident, socket, last: env.now });
        Some(id)
    }

    /// Passes replies to the guest.
    pub fn event(&mut self, env: &mut Env, id: u64) {
        let Some(ping) = self.pings.get(&id) else { return };
        let mut buffer = [0; 65536];
        for _ in 0..BATCH {
            match ping.socket.recv_from(&mut buffer) {
                Ok((n, peer)) if n >= 8 => {
                    let mut message = buffer[..n].to_vec();
                    // The host's kernel put its own identifier in.
                    message[4..6].copy_from_slice(&ping.ident);
                    if let Some(src) = env.net.peer_as_seen(peer.ip(), ping.guest) {
                        reply(env, src, ping.guest, message);
                    }
                }
                Ok(_) => {}
                Err(e) if e.kind() == ErrorKind::WouldBlock => return,
                Err(_) => {}
            }
        }
    }

    pub fn expire(&mut self, now: Instant) {
        self.pings.retain(|_, p| p.last + IDLE > now);
    }

    pub fn next_timer(&self) -> Option<Instant> {
        self.pings.values().map(|p| p.last + IDLE).min()
    }
}
