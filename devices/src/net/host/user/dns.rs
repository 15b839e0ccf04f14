//! The DNS forwarder: passes the guest's queries to the host's resolvers and
//! their answers back, unread but for the identifier. DNS over TCP goes
//! through [`tcp_nat`](super::tcp_nat) to the same resolvers.

use std::collections::HashMap;
use std::io::Read;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV6, UdpSocket};

use smoltcp::time::{Duration, Instant};

use super::env::{Env, Token};
use super::udp_nat;

const RESOLV_CONF: &str = "/etc/resolv.conf";
/// How long a reading of the resolver list holds.
const REREAD: Duration = Duration::from_secs(5);
/// Resolvers used, as in the C library (MAXNS).
const SERVERS: usize = 3;
/// Queries in flight; each has a socket, and so a port, of its own.
const QUERIES: usize = 64;
/// Wait for one resolver before asking the next.
const PATIENCE: Duration = Duration::from_secs(3);
/// Largest query passed on.
const MAX_QUERY: usize = 4096;

struct Query {
    guest: SocketAddr,
    /// The forwarder's address as the guest wrote it.
    forwarder: SocketAddr,
    socket: UdpSocket,
    question: Vec<u8>,
    /// Resolvers still to ask.
    left: Vec<SocketAddr>,
    deadline: Instant,
}

pub(super) struct DnsForwarder {
    fixed: Vec<SocketAddr>,
    servers: Vec<SocketAddr>,
    read_at: Option<Instant>,
    queries: HashMap<u64, Query>,
}

impl DnsForwarder {
    /// `fixed` resolvers, or when empty those of the host.
    pub fn new(fixed: Vec<SocketAddr>) -> DnsForwarder {
        DnsForwarder { fixed, servers: Vec::new(), read_at: None, queries: HashMap::new() }
    }

    /// The resolvers, in order of preference.
    pub fn servers(&mut self, now: Instant) -> &[SocketAddr] {
        if !self.fixed.is_empty() {
            return &self.fixed;
        }
        if self.read_at.is_none_or(|at| at + REREAD <= now) {
            self.read_at = Some(now);
            self.servers = parse_resolv_conf(&read_resolv_conf());
        }
        &self.servers
    }

    /// A query of the guest.
    pub fn query(&mut self, env: &mut Env, guest: SocketAddr, forwarder: SocketAddr, question: &[u8]) {
        // Shorter than a header (RFC 1035, 4.1.1) or a response: not a query.
        if question.len() < 12 || question.len() > MAX_QUERY || question[2] & 0x80 != 0 {
            return;
        }
        // The guest repeats itself: start over, with the resolvers in order.
        self.queries.retain(|_, q| q.guest != guest || q.question[..2] != question[..2]);
        if self.queries.len() >= QUERIES {
            let oldest = self.queries.iter().min_by_key(|(_, q)| q.deadline).map(|(id, _)| *id);
            oldest.map(|id| self.queries.remove(&id));
        }
        let mut left = self.servers(env.now).to_vec();
        left.reverse();
        self.ask(env, guest, forwarder, question.to_vec(), left);
    }

    /// Asks the first resolver left that can be asked.
    fn ask(
        &mut self,
        env: &mut Env,
        guest: SocketAddr,
        forwarder: SocketAddr,
        question: Vec<u8>,
        mut left: Vec<SocketAddr>,
    ) {
        while let Some(server) = left.pop() {
            let id = env.next_id();
            let Ok(socket) = open(server) else { continue };
            if env.watch(&socket, Token::Dns(id)).is_err() || socket.send(&question).is_err() {
                continue;
            }
            let deadline = env.now + PATIENCE;
            self.queries.insert(id, Query { guest, forwarder, socket, question, left, deadline });
            return;
        }
        server_failure(env, forwarder, guest, question);
    }

    /// A resolver answered, or cannot be reached.
    pub fn event(&mut self, env: &mut Env, id: u64) {
        let Some(q) = self.queries.get(&id) else { return };
        let mut buffer = [0; 65536];
        loop {
            match q.socket.recv(&mut buffer) {
                Ok(n) if n >= 12 && buffer[..2] == q.question[..2] => {
                    let (guest, forwarder) = (q.guest, q.forwarder);
                    self.queries.remove(&id);
                    return udp_nat::send(env, forwarder, guest, &buffer[..n]);
                }
                Ok(_) => {}
                Err(e) if e.kind() == std::io::ErrorKind::WouldBlock => return,
                Err(_) => return self.next(env, id),
            }
        }
    }

    fn next(&mut self, env: &mut Env, id: u64) {
        if let Some(q) = self.queries.remove(&id) {
            self.ask(env, q.guest, q.forwarder, q.question, q.left);
        }
    }

    /// Turns to the next resolver where one is silent.
    pub fn expire(&mut self, env: &mut Env) {
        let due: Vec<u64> = self.queries.iter().filter(|(_, q)| q.deadline <= env.now).map(|(id, _)| *id).collect();
        due.into_iter().for_each(|id| self.next(env, id));
    }

    pub fn next_timer(&self) -> Option<Instant> {
        self.queries.values().map(|q| q.deadline).min()
    }
}

fn open(server: SocketAddr) -> std::io::Result<UdpSocket> {
    let any: IpAddr = match server {
        SocketAddr::V4(_) => Ipv4Addr::UNSPECIFIED.into(),
        SocketAddr::V6(_) => Ipv6Addr::UNSPECIFIED.into(),
    };
    let socket = UdpSocket::bind((any, 0))?;
    socket.set_nonblocking(true)?;
    // Connected: only the resolver's own answers are taken.
    socket.connect(server)?;
    Ok(socket)
}

/// Answers SERVFAIL (RFC 1035, 4.1.1): the question back, flagged.
fn server_failure(env: &mut Env, forwarder: SocketAddr, guest: SocketAddr, mut message: Vec<u8>) {
    message[2] = message[2] & 0x79 | 0x80;
    message[3] = 0x82;
    udp_nat::send(env, forwarder, guest, &message);
}

fn read_resolv_conf() -> String {
    let mut text = Vec::new();
    if let Ok(file) = std::fs::File::open(RESOLV_CONF) {
        let _ = file.take(64 << 10).read_to_end(&mut text);
    }
    String::from_utf8_lossy(&text).into_owned()
}

/// `nameserver` lines; none means the resolver on this host (resolv.conf(5)).
fn parse_resolv_conf(text: &str) -> Vec<SocketAddr> {
    let mut servers: Vec<SocketAddr> = text
        .lines()
        .filter_map(|line| {
            let mut words = line.split_ascii_whitespace();
            (words.next()? == "nameserver").then(|| words.next()).flatten().and_then(parse_server)
        })
        .take(SERVERS)
        .collect();
    if servers.is_empty() {
        servers.push((Ipv4Addr::LOCALHOST, 53).into());
    }
    servers
}

fn parse_server(text: &str) -> Option<SocketAddr> {
    let Some((addr, scope)) = text.split_once('%') else {
        return Some(SocketAddr::new(text.parse().ok()?, 53));
    };
    let scope_id = scope.parse().ok().or_else(|| {
        let index = std::fs::read_to_string(format!("/sys/class/net/{scope}/ifindex")).ok()?;
        index.trim().parse().ok()
    })?;
    Some(SocketAddrV6::new(addr.parse().ok()?, 53, 0, scope_id).into())
}

#[cfg(test)]
mod resolv_conf {
    use super::*;

    #[test]
    fn nameservers_are_taken_in_order_up_to_three() {
        let text = "# c\nsearch x\nnameserver 1.2.3.4\nnameserver  bad\n nameserver ::1 # x\n\
                    nameserver fe80::1%7\nnameserver 5.6.7.8\n";
        let servers = parse_resolv_conf(text);
        let expected = ["1.2.3.4:53", "[::1]:53", "[fe80::1%7]:53"];
        assert_eq!(servers.iter().map(ToString::to_string).collect::<Vec<_>>(), expected);
        assert_eq!(parse_resolv_conf(""), [SocketAddr::from(([127, 0, 0, 1], 53))]);
    }
}
