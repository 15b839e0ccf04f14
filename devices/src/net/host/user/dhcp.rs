//! The DHCP server (RFC 2131), with BOOTP requests (RFC 951) answered alike.

use std::net::Ipv4Addr;

use smoltcp::wire::{EthernetAddress, EthernetProtocol, IpProtocol, Ipv4Packet, UdpPacket};

use super::config::{Net, Net4};
use super::env::Env;

/// Addresses given out, from `dhcpstart` on (slirp's number).
const LEASES: usize = 16;
/// Lease time in seconds (slirp's: a day).
const LEASE_SECONDS: u32 = 24 * 3600;
/// Offset of the options, behind the fixed fields and the magic cookie.
const OPTIONS: usize = 240;
const COOKIE: [u8; 4] = [99, 130, 83, 99];
/// BOOTP clients may insist on this much (RFC 1542, 2.1).
const MIN_REPLY: usize = 300;
/// Largest reply that every client takes (RFC 2131, section 2: 576 of IP).
const MAX_REPLY: usize = 548;

const DISCOVER: u8 = 1;
const OFFER: u8 = 2;
const REQUEST: u8 = 3;
const DECLINE: u8 = 4;
const ACK: u8 = 5;
const NAK: u8 = 6;
const RELEASE: u8 = 7;
const INFORM: u8 = 8;

/// Who holds each address.
#[derive(Default)]
pub(super) struct DhcpServer {
    leases: [Option<EthernetAddress>; LEASES],
}

/// What a client asks.
struct Request<'a> {
    message: &'a [u8],
    kind: Option<u8>,
    mac: EthernetAddress,
    client: Ipv4Addr,
    wanted: Option<Ipv4Addr>,
    server: Option<Ipv4Addr>,
}

impl<'a> Request<'a> {
    fn parse(message: &'a [u8]) -> Option<Request<'a>> {
        // BOOTREQUEST over Ethernet.
        if message.len() < OPTIONS - 4 || message[..3] != [1, 1, 6] {
            return None;
        }
        let mac = EthernetAddress::from_bytes(&message[28..34]);
        let mut request =
            Request { message, kind: None, mac, client: addr(&message[12..16])?, wanted: None, server: None };
        if message.get(OPTIONS - 4..OPTIONS) == Some(&COOKIE) {
            request.options(&message[OPTIONS..]);
        }
        mac.is_unicast().then_some(request)
    }

    fn options(&mut self, mut rest: &[u8]) {
        while let [code, tail @ ..] = rest {
            match code {
                0 => rest = tail,
                255 => return,
                _ => {
                    let Some((&len, tail)) = tail.split_first() else { return };
                    let Some((value, tail)) = tail.split_at_checked(usize::from(len)) else {
                        return;
                    };
                    match code {
                        53 => self.kind = value.first().copied(),
                        50 => self.wanted = addr(value),
                        54 => self.server = addr(value),
                        _ => {}
                    }
                    rest = tail;
                }
            }
        }
    }
}

fn addr(bytes: &[u8]) -> Option<Ipv4Addr> {
    bytes.first_chunk().map(|o: &[u8; 4]| Ipv4Addr::from(*o))
}

impl DhcpServer {
    /// A message of the guest to the server's port, from the station `from`.
    pub fn input(&mut self, env: &mut Env, from: EthernetAddress, message: &[u8]) {
        let (Some(net), Some(request)) = (env.net.v4, Request::parse(message)) else { return };
        if request.server.is_some_and(|s| s != net.host) {
            return self.release(&request);
        }
        match request.kind {
            Some(DISCOVER) => {
                if let Some(lease) = self.lease(&net, &request) {
                    send(env, &net, &request, from, OFFER, lease);
                }
            }
            Some(REQUEST) => {
                let asked = request.wanted.unwrap_or(request.client);
                match self.lease(&net, &request) {
                    Some(lease) if lease == asked => grant(env, &net, &request, from, Some(ACK), lease),
                    _ => send(env, &net, &request, from, NAK, Ipv4Addr::UNSPECIFIED),
                }
            }
            Some(INFORM) => send(env, &net, &request, from, ACK, Ipv4Addr::UNSPECIFIED),
            Some(RELEASE | DECLINE) => self.release(&request),
            Some(_) => {}
            None => {
                if let Some(lease) = self.lease(&net, &request) {
                    grant(env, &net, &request, from, None, lease);
                }
            }
        }
    }

    /// The client's address: the one it has, the one it wants if that is
    /// free, else the first free one.
    fn lease(&mut self, net: &Net4, request: &Request<'_>) -> Option<Ipv4Addr> {
        let usable = |a: &Ipv4Addr| net.contains(*a) && ![net.host, net.dns, net.broadcast()].contains(a);
        let address = |i: usize| Some(Ipv4Addr::from_bits(net.dhcpstart.to_bits() + i as u32)).filter(usable);
        let held = self.leases.iter().position(|l| *l == Some(request.mac));
        let wanted = request.wanted.or(Some(request.client)).filter(|a| !a.is_unspecified());
        let free = |i: &usize| self.leases[*i].is_none() && address(*i).is_some();
        let slot = held
            .or_else(|| (0..LEASES).filter(free).find(|i| wanted.is_some() && address(*i) == wanted))
            .or_else(|| (0..LEASES).find(free))?;
        self.leases[slot] = Some(request.mac);
        address(slot)
    }

    fn release(&mut self, request: &Request<'_>) {
        self.leases.iter_mut().filter(|l| **l == Some(request.mac)).for_each(|l| *l = None);
    }
}

fn grant(env: &mut Env, net: &Net4, request: &Request<'_>, from: EthernetAddress, kind: Option<u8>, lease: Ipv4Addr) {
    // hostfwd connections may wait for this guest.
    env.link.learn(lease.into(), from);
    match kind {
        Some(kind) => send(env, net, request, from, kind, lease),
        None => send_reply(env, net, from, &reply(&env.net, net, request, None, lease)),
    }
}

fn send(env: &mut Env, net: &Net4, request: &Request<'_>, from: EthernetAddress, kind: u8, lease: Ipv4Addr) {
    let message = reply(&env.net, net, request, Some(kind), lease);
    send_reply(env, net, from, &message);
}

/// The reply's bytes; `kind` is `None` for BOOTP.
fn reply(options: &Net, net: &Net4, request: &Request<'_>, kind: Option<u8>, lease: Ipv4Addr) -> Vec<u8> {
    let mut m = vec![0; OPTIONS];
    m[..4].copy_from_slice(&[2, 1, 6, 0]);
    m[4..8].copy_from_slice(&request.message[4..8]);
    m[10..12].copy_from_slice(&request.message[10..12]);
    if kind != Some(NAK) {
        m[12..16].copy_from_slice(&request.client.octets());
        m[16..20].copy_from_slice(&lease.octets());
        m[20..24].copy_from_slice(&net.host.octets());
    }
    m[24..28].copy_from_slice(&request.message[24..28]);
    m[28..34].copy_from_slice(&request.mac.0);
    if let Some(file) = &options.bootfile {
        m[108..108 + file.len()].copy_from_slice(file.as_bytes());
    }
    m[OPTIONS - 4..].copy_from_slice(&COOKIE);
    if let Some(kind) = kind {
        option(&mut m, 53, &[kind]);
        option(&mut m, 54, &net.host.octets());
    }
    if kind != Some(NAK) {
        parameters(&mut m, options, net, kind.is_some_and(|k| k != ACK || !lease.is_unspecified()));
    }
    m.push(255);
    if m.len() < MIN_REPLY {
        m.resize(MIN_REPLY, 0);
    }
    m
}

fn parameters(m: &mut Vec<u8>, options: &Net, net: &Net4, leased: bool) {
    option(m, 1, &net.mask.octets());
    option(m, 3, &net.host.octets());
    option(m, 6, &net.dns.octets());
    if leased {
        option(m, 51, &LEASE_SECONDS.to_be_bytes());
    }
    for (code, text) in
        [(12, &options.hostname), (15, &options.domainname), (66, &options.tftp_server_name), (67, &options.bootfile)]
    {
        if let Some(text) = text {
            option(m, code, text.as_bytes());
        }
    }
    let search = search_list(&options.dnssearch);
    if !search.is_empty() {
        option(m, 119, &search);
    }
}

/// Appends an option that fits in the reply and is not empty.
fn option(m: &mut Vec<u8>, code: u8, value: &[u8]) {
    let Ok(len) = u8::try_from(value.len()) else { return };
    if len > 0 && m.len() + 3 + value.len() <= MAX_REPLY {
        m.extend_from_slice(&[code, len]);
        m.extend_from_slice(value);
    }
}

/// Domain names in DNS's encoding (RFC 3397), as many as fit in an option.
fn search_list(domains: &[String]) -> Vec<u8> {
    let mut list = Vec::new();
    for domain in domains {
        let mut name = Vec::new();
        for label in domain.trim_matches('.').split('.') {
            name.push(label.len() as u8);
            name.extend_from_slice(label.as_bytes());
        }
        name.push(0);
        let valid = domain.split('.').all(|l| l.len() < 64);
        if valid && list.len() + name.len() <= 255 {
            list.extend(name);
        }
    }
    list
}

/// Sends a reply to the station that asked: it may have no address yet.
fn send_reply(env: &mut Env, net: &Net4, to: EthernetAddress, message: &[u8]) {
    let total = 20 + 8 + message.len();
    let (src, dst) = (net.host, Ipv4Addr::BROADCAST);
    env.link.send_frame(to, EthernetProtocol::Ipv4, total, |b| {
        let mut ip = Ipv4Packet::new_unchecked(&mut b[..]);
        ip.set_version(4);
        ip.set_header_len(20);
        ip.set_total_len(total as u16);
        ip.set_hop_limit(64);
        ip.set_next_header(IpProtocol::Udp);
        ip.set_src_addr(src);
        ip.set_dst_addr(dst);
        ip.fill_checksum();
        let mut udp = UdpPacket::new_unchecked(&mut b[20..]);
        udp.set_src_port(67);
        udp.set_dst_port(68);
        udp.set_len((total - 20) as u16);
        udp.payload_mut().copy_from_slice(message);
        udp.fill_checksum(&src.into(), &dst.into());
    });
}
