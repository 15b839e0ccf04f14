//! DHCP, DNS, UDP both ways, and pings.

use std::net::UdpSocket;
use std::thread;

use smoltcp::socket::dhcpv4;
use smoltcp::wire::{EthernetFrame, EthernetProtocol, IpAddress, IpCidr, Ipv4Packet};

use super::guest::{Guest, MAC};
use super::{UserNetConfig, config};

const GATEWAY: [u8; 4] = [10, 0, 2, 2];
const DNS: [u8; 4] = [10, 0, 2, 3];

#[test]
fn dhcp_configures_the_guest() {
    let mut guest = Guest::bare(config(r#"{"hostname":"vm","domainname":"example.org","dnssearch":["a.example"]}"#));
    *guest.card.record.lock().unwrap() = Some(Vec::new());
    let handle = guest.sockets.add(dhcpv4::Socket::new());
    let (address, router, dns) =
        guest.until("a lease", |g| match g.sockets.get_mut::<dhcpv4::Socket<'_>>(handle).poll() {
            Some(dhcpv4::Event::Configured(c)) => Some((c.address, c.router, c.dns_servers.to_vec())),
            _ => None,
        });
    assert_eq!(IpCidr::Ipv4(address), IpCidr::new(IpAddress::v4(10, 0, 2, 15), 24));
    assert_eq!(router, Some(GATEWAY.into()));
    assert_eq!(dns, [std::net::Ipv4Addr::from(DNS)]);
    let frames = guest.card.record.lock().unwrap().take().unwrap();
    let has = |text: &[u8]| frames.iter().any(|f| f.windows(text.len()).any(|w| w == text));
    assert!(has(b"\x0c\x02vm") && has(b"\x0f\x0bexample.org") && has(b"\x77\x0b\x01a\x07example\x00"));
}

/// Answers each query with the query, flagged as a response, and `tail`.
fn stub_resolver() -> std::net::SocketAddr {
    let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
    let addr = socket.local_addr().unwrap();
    thread::spawn(move || {
        let mut buffer = [0; 4096];
        while let Ok((n, from)) = socket.recv_from(&mut buffer) {
            buffer[2] |= 0x80;
            let mut answer = buffer[..n].to_vec();
            answer.extend_from_slice(b"answer");
            let _ = socket.send_to(&answer, from);
        }
    });
    addr
}

const QUERY: &[u8] = b"\x12\x34\x01\x00\x00\x01\x00\x00\x00\x00\x00\x00\x04host\x00\x00\x01\x00\x01";

#[test]
fn dns_goes_to_the_first_resolver_that_answers() {
    let dead = UdpSocket::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let live = stub_resolver();
    let mut guest = Guest::new(config(&format!(r#"{{"dns-servers":["{dead}","{live}"]}}"#)));
    let socket = guest.udp(5000);
    guest.udp_send(socket, DNS, 53, QUERY);
    let (answer, from) = guest.udp_recv(socket);
    assert_eq!((from.addr, from.port), (IpAddress::from(std::net::Ipv4Addr::from(DNS)), 53));
    assert_eq!(answer[..2], QUERY[..2]);
    assert!(answer.ends_with(b"answer"));
}

#[test]
fn dns_without_a_resolver_fails_at_once() {
    let dead = UdpSocket::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let mut guest = Guest::new(config(&format!(r#"{{"dns-servers":["{dead}"]}}"#)));
    let socket = guest.udp(5000);
    guest.udp_send(socket, DNS, 53, QUERY);
    let (answer, _) = guest.udp_recv(socket);
    // A response, and SERVFAIL.
    assert_eq!((answer[2] & 0x80, answer[3] & 0x0f), (0x80, 2));
}

/// Echoes datagrams, and those that start with 'B' with 4000 bytes behind.
fn echo() -> u16 {
    let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
    let port = socket.local_addr().unwrap().port();
    thread::spawn(move || {
        let mut buffer = [0; 65536];
        while let Ok((n, from)) = socket.recv_from(&mut buffer) {
            let len = if buffer[0] == b'B' { n + 4000 } else { n };
            let _ = socket.send_to(&buffer[..len], from);
        }
    });
    port
}

#[test]
fn udp_echo_keeps_addresses_and_ports() {
    let port = echo();
    let mut guest = Guest::new(UserNetConfig::default());
    let (a, b) = (guest.udp(6000), guest.udp(6001));
    guest.udp_send(a, GATEWAY, port, b"one");
    guest.udp_send(b, GATEWAY, port, b"two");
    let (two, _) = guest.udp_recv(b);
    let (one, from) = guest.udp_recv(a);
    assert_eq!((&one[..], &two[..]), (&b"one"[..], &b"two"[..]));
    assert_eq!((from.addr, from.port), (IpAddress::v4(10, 0, 2, 2), port));
}

#[test]
fn datagrams_beyond_the_mtu_are_fragmented_to_the_guest() {
    let port = echo();
    let mut guest = Guest::new(UserNetConfig::default());
    let socket = guest.udp(6002);
    guest.udp_send(socket, GATEWAY, port, b"Big");
    let mut pieces = Vec::new();
    // The small guest does not reassemble; look at the wire while it does ARP.
    *guest.card.record.lock().unwrap() = Some(Vec::new());
    guest.until("the fragments", |g| {
        pieces = g.card.record.lock().unwrap().clone().unwrap().into_iter().filter(|f| fragment(f).is_some()).collect();
        pieces.iter().any(|f| fragment(f).is_some_and(|(_, more)| !more)).then_some(())
    });
    assert!(pieces.iter().all(|f| f.len() <= 1514));
    let total: usize = pieces.iter().map(|f| f.len() - 34).sum();
    assert_eq!(total, 8 + 4003);
    // Sent back to the network as they came, they are one datagram again.
    for piece in &pieces {
        let mut frame = piece.clone();
        let (dst, src) = (frame[..6].to_vec(), frame[6..12].to_vec());
        frame[..6].copy_from_slice(&src);
        frame[6..12].copy_from_slice(&dst);
        frame[26..30].copy_from_slice(&[10, 0, 2, 15]);
        frame[30..34].copy_from_slice(&GATEWAY);
        let mut ip = Ipv4Packet::new_unchecked(&mut frame[14..]);
        ip.fill_checksum();
        if ip.frag_offset() == 0 {
            // From port 6002 to the echo again; no checksum.
            frame[34..36].copy_from_slice(&6002u16.to_be_bytes());
            frame[36..38].copy_from_slice(&port.to_be_bytes());
            frame[40..42].fill(0);
        }
        guest.card.net.send(&frame);
    }
    *guest.card.record.lock().unwrap() = Some(Vec::new());
    guest.until("the echo of the fragments", |g| {
        let record = g.card.record.lock().unwrap();
        let total: usize =
            record.as_ref().unwrap().iter().filter(|f| fragment(f).is_some()).map(|f| f.len() - 34).sum();
        (total == 8 + 4003 + 4000).then_some(())
    });
}

/// (offset, more) of an IPv4 fragment.
fn fragment(frame: &[u8]) -> Option<(u16, bool)> {
    let eth = EthernetFrame::new_checked(frame).ok()?;
    if eth.ethertype() != EthernetProtocol::Ipv4 {
        return None;
    }
    let ip = Ipv4Packet::new_checked(eth.payload()).ok()?;
    (ip.more_frags() || ip.frag_offset() > 0).then(|| (ip.frag_offset(), ip.more_frags()))
}

#[test]
fn hostfwd_udp_goes_in_and_its_answers_out() {
    for extra in ["", r#""restrict":true,"#] {
        let mut guest = Guest::new(config(&format!(r#"{{{extra}"hostfwd":["udp:127.0.0.1:0-:7000"]}}"#)));
        let (to, _) = guest.card.net.hostfwds()[0];
        let client = UdpSocket::bind("127.0.0.1:0").unwrap();
        client.set_read_timeout(Some(super::guest::PATIENCE)).unwrap();
        client.connect(to).unwrap();
        let server = guest.udp(7000);
        client.send(b"hello").unwrap();
        let (data, from) = guest.udp_recv(server);
        assert_eq!(data, b"hello");
        assert_eq!(from.port, client.local_addr().unwrap().port());
        guest.udp_send(server, from.addr, from.port, b"world");
        for _ in 0..3 {
            guest.step();
        }
        let mut buffer = [0; 16];
        let n = client.recv(&mut buffer).unwrap();
        assert_eq!(&buffer[..n], b"world");
    }
}

#[test]
fn the_gateway_answers_pings() {
    let mut guest = Guest::new(UserNetConfig::default());
    let mut frame = vec![0x52, 0x55, 10, 0, 2, 2];
    frame.extend_from_slice(&MAC.0);
    frame.extend_from_slice(&[8, 0]);
    frame.extend_from_slice(&[0x45, 0, 0, 32, 0, 0, 0, 0, 64, 1, 0, 0, 10, 0, 2, 15, 10, 0, 2, 2]);
    frame.extend_from_slice(&[8, 0, 0, 0, 0xab, 0xcd, 0, 1, 1, 2, 3, 4]);
    guest.card.net.send(&frame);
    let reply = guest
        .raw("an echo reply", |f| (f.len() >= 46 && f[12..14] == [8, 0] && f[23] == 1).then(|| f[34..46].to_vec()));
    assert_eq!(reply[..2], [0, 0]);
    assert_eq!(reply[4..], frame[38..]);
    let sum: u32 = reply.chunks(2).map(|p| u32::from(u16::from_be_bytes([p[0], p[1]]))).sum();
    assert_eq!((sum & 0xffff) + (sum >> 16), 0xffff);
}

#[test]
fn routers_are_advertised_and_ipv6_udp_flows() {
    let Ok(host) = UdpSocket::bind("[::1]:0") else {
        // Not by a macro: the test runner keeps those to itself.
        let _ = std::io::Write::write_all(
            &mut std::io::stderr(),
            b"SKIPPED (routers_are_advertised_and_ipv6_udp_flows): the host has no ::1\n",
        );
        return;
    };
    let mut guest = Guest::new(UserNetConfig::default());
    let advert = guest.raw("a router advertisement", |f| {
        (f.len() > 54 && f[12..14] == [0x86, 0xdd] && f[54] == 134).then(|| f.to_vec())
    });
    assert!(advert.windows(16).any(|w| w == "fec0::3".parse::<std::net::Ipv6Addr>().unwrap().octets()));
    host.set_read_timeout(Some(super::guest::PATIENCE)).unwrap();
    let socket = guest.udp(6100);
    let gateway = IpAddress::v6(0xfec0, 0, 0, 0, 0, 0, 0, 2);
    guest.udp_send(socket, gateway, host.local_addr().unwrap().port(), b"six");
    for _ in 0..5 {
        guest.step();
    }
    let mut buffer = [0; 16];
    let (n, from) = host.recv_from(&mut buffer).unwrap();
    host.send_to(&buffer[..n], from).unwrap();
    let (data, seen) = guest.udp_recv(socket);
    assert_eq!((&data[..], seen.addr), (&b"six"[..], gateway));
}
