//! Frames no honest guest sends: the network must neither fall nor grow.

use std::sync::atomic::Ordering;

use smoltcp::socket::tcp::State;
use smoltcp::wire::{ArpPacket, Ipv4Packet, TcpPacket};

use super::UserNetConfig;
use super::guest::{Guest, MAC};

/// xorshift64*: the same frames in each run.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    fn below(&mut self, n: usize) -> usize {
        (self.next() % n as u64) as usize
    }
}

fn ethernet(ethertype: [u8; 2], payload: &[u8]) -> Vec<u8> {
    let mut frame = vec![0x52, 0x55, 10, 0, 2, 2];
    frame.extend_from_slice(&MAC.0);
    frame.extend_from_slice(&ethertype);
    frame.extend_from_slice(payload);
    frame
}

fn ipv4(proto: u8, dst: [u8; 4], payload: &[u8]) -> Vec<u8> {
    let mut packet = vec![0x45, 0, 0, 0, 0, 1, 0, 0, 64, proto, 0, 0, 10, 0, 2, 15];
    packet.extend_from_slice(&dst);
    packet.extend_from_slice(payload);
    let len = packet.len() as u16;
    packet[2..4].copy_from_slice(&len.to_be_bytes());
    Ipv4Packet::new_unchecked(&mut packet[..]).fill_checksum();
    ethernet([8, 0], &packet)
}

fn ipv6(proto: u8, payload: &[u8]) -> Vec<u8> {
    let mut packet = vec![0x60, 0, 0, 0];
    packet.extend_from_slice(&(payload.len() as u16).to_be_bytes());
    packet.extend_from_slice(&[proto, 255]);
    for last in [0x15, 2] {
        packet.extend_from_slice(&[0xfe, 0xc0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, last]);
    }
    packet.extend_from_slice(payload);
    ethernet([0x86, 0xdd], &packet)
}

fn tcp(src: u16, dst: u16, flags: u8, seq: u32) -> Vec<u8> {
    let mut segment = Vec::new();
    segment.extend_from_slice(&src.to_be_bytes());
    segment.extend_from_slice(&dst.to_be_bytes());
    segment.extend_from_slice(&seq.to_be_bytes());
    segment.extend_from_slice(&[0, 0, 0, 0, 0x60, flags, 0xff, 0xff, 0, 0, 0, 0, 2, 4, 0, 0]);
    segment
}

/// One valid frame of each protocol, to mutate.
fn seeds(port: u16) -> Vec<Vec<u8>> {
    let mut dhcp = vec![0; 8 + 240];
    dhcp[..8].copy_from_slice(&[0, 68, 0, 67, 0, 248, 0, 0]);
    dhcp[8..11].copy_from_slice(&[1, 1, 6]);
    dhcp[36..42].copy_from_slice(&MAC.0);
    dhcp[244..].copy_from_slice(&[99, 130, 83, 99]);
    dhcp.extend_from_slice(&[53, 1, 3, 50, 4, 10, 0, 2, 15, 255]);
    let len = dhcp.len() as u16;
    dhcp[4..6].copy_from_slice(&len.to_be_bytes());
    let mut arp = vec![0, 1, 8, 0, 6, 4, 0, 1];
    arp.extend_from_slice(&MAC.0);
    arp.extend_from_slice(&[10, 0, 2, 15, 0, 0, 0, 0, 0, 0, 10, 0, 2, 2]);
    assert!(ArpPacket::new_checked(&arp[..]).is_ok());
    let [hi, lo] = port.to_be_bytes();
    let mut fragment = ipv4(17, [10, 0, 2, 2], &[0; 64]);
    fragment[20] = 0x20;
    Ipv4Packet::new_unchecked(&mut fragment[14..]).fill_checksum();
    let mut solicit = vec![135, 0, 0, 0, 0, 0, 0, 0, 0xfe, 0xc0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 2];
    solicit.extend_from_slice(&[1, 1, 2, 3, 4, 5, 6, 7]);
    vec![
        ethernet([8, 6], &arp),
        ipv4(17, [255; 4], &dhcp),
        ipv4(6, [10, 0, 2, 2], &tcp(50000, port, 2, 1)),
        ipv4(6, [10, 0, 2, 2], &tcp(50000, port, 0x10, 2)),
        ipv4(6, [10, 0, 2, 2], &tcp(50000, port, 0x19, 2)),
        ipv4(17, [10, 0, 2, 2], &[0xc3, 0x50, hi, lo, 0, 12, 0, 0, 1, 2, 3, 4]),
        ipv4(17, [10, 0, 2, 3], b"\xc3\x50\x00\x35\x00\x14\x00\x00\x12\x34\x01\x00\x00\x00\x00\x00\x00\x00\x00\x00"),
        ipv4(1, [10, 0, 2, 2], &[8, 0, 0, 0, 1, 2, 3, 4, 5, 6, 7, 8]),
        fragment,
        ipv6(6, &tcp(50001, port, 2, 1)),
        ipv6(58, &solicit),
        ipv6(58, &[133, 0, 0, 0, 0, 0, 0, 0]),
        ipv6(58, &[128, 0, 0, 0, 0, 1, 0, 1]),
        ipv6(44, &[17, 0, 0, 1, 0, 0, 0, 1, 1, 2, 3, 4, 5, 6, 7, 8]),
    ]
}

fn mutate(random: &mut Random, frame: &mut Vec<u8>) {
    // Leave most Ethernet headers alone: past them is where it gets deep.
    let from = if random.below(8) == 0 { 0 } else { 14 };
    for _ in 0..random.below(6) {
        if frame.len() > from {
            let at = from + random.below(frame.len() - from);
            frame[at] = [0, 1, 0x7f, 0x80, 0xff, random.next() as u8][random.below(6)];
        }
    }
    match random.below(8) {
        0 => frame.truncate(random.below(frame.len() + 1)),
        1 => frame.extend((0..random.below(64)).map(|i| i as u8)),
        _ => {}
    }
    // No mutation may send what the test's host would let out.
    if frame.len() >= 34 && frame[12..14] == [8, 0] && frame[23] != 17 {
        frame[30..33].copy_from_slice(&[10, 0, 2]);
    }
    if frame.len() >= 34 && frame[12..14] == [8, 0] {
        let dst = if frame[30] == 255 { [255; 4] } else { [10, 0, 2, 2] };
        frame[30..34].copy_from_slice(&dst);
        let mut ip = Ipv4Packet::new_unchecked(&mut frame[14..]);
        if ip.header_len() >= 20 && 14 + usize::from(ip.header_len()) <= 34 {
            ip.fill_checksum();
        }
    }
    if frame.len() >= 54 && frame[12..14] == [0x86, 0xdd] {
        frame[38] = 0xfe;
        frame[39] = 0xc0;
    }
}

/// The network still serves: a refused connection is refused.
fn still_serves(guest: &mut Guest) {
    guest.card.full.store(false, Ordering::SeqCst);
    guest.card.net.guest_can_receive();
    let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let handle = guest.connect([10, 0, 2, 2], port, 60001);
    guest.until("the reset", |g| (g.tcp(handle).state() == State::Closed).then_some(()));
}

#[test]
fn mutated_and_random_frames() {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    // A resolver of the test's own, so that no query leaves the host.
    let config = super::config(r#"{"dns-servers":["127.0.0.1:9"]}"#);
    let mut guest = Guest::new(config);
    let seeds = seeds(port);
    let mut random = Random(0x1234_5678_9abc_def1);
    for round in 0..30_000 {
        let mut frame = if random.below(20) == 0 {
            let mut f = ethernet([[8, 0], [8, 6], [0x86, 0xdd]][random.below(3)], &[]);
            f.extend((0..random.below(200)).map(|_| 0).collect::<Vec<u8>>());
            f.iter_mut().skip(14).for_each(|b| *b = random.next() as u8);
            f
        } else {
            seeds[random.below(seeds.len())].clone()
        };
        mutate(&mut random, &mut frame);
        guest.card.net.send(&frame);
        if round % 64 == 0 {
            guest.poll();
        }
    }
    guest.card.net.send(&[]);
    guest.card.net.send(&vec![0; 70_000]);
    still_serves(&mut guest);
}

#[test]
fn a_flood_of_connections_is_bounded_and_survived() {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    let mut guest = Guest::new(UserNetConfig::default());
    for src in 1024..6000 {
        guest.card.net.send(&ipv4(6, [10, 0, 2, 2], &tcp(src, port, 2, 1)));
        if src % 256 == 0 {
            // The guest's stack knows none of these and resets them.
            guest.step();
        }
    }
    still_serves(&mut guest);
    drop(listener);
}

#[test]
fn replies_to_a_guest_that_takes_nothing_do_not_pile_up() {
    let mut guest = Guest::new(UserNetConfig::default());
    guest.card.full.store(true, Ordering::SeqCst);
    let ping = ipv4(1, [10, 0, 2, 2], &[8, 0, 0, 0, 1, 2, 3, 4]);
    for _ in 0..3000 {
        guest.card.net.send(&ping);
    }
    std::thread::sleep(std::time::Duration::from_millis(50));
    *guest.card.record.lock().unwrap() = Some(Vec::new());
    still_serves(&mut guest);
    let replies = guest.card.record.lock().unwrap().as_ref().unwrap().len();
    assert!(replies < 600, "{replies} frames were kept");
}

#[test]
fn a_stray_segment_is_reset_with_its_own_numbers() {
    let mut guest = Guest::new(UserNetConfig::default());
    guest.card.net.send(&ipv4(6, [10, 0, 2, 2], &tcp(50000, 1, 0x10, 77)));
    let segment =
        guest.raw("a reset", |f| (f.len() >= 54 && f[12..14] == [8, 0] && f[23] == 6).then(|| f[34..54].to_vec()));
    let packet = TcpPacket::new_checked(&segment[..]).unwrap();
    assert!(packet.rst() && !packet.ack());
    assert_eq!(packet.seq_number().0, 0);
}

#[test]
fn connections_the_guest_takes_back_go_away() {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    let guest = Guest::new(UserNetConfig::default());
    guest.card.net.send(&ipv4(6, [10, 0, 2, 2], &tcp(50000, port, 2, 1)));
    let (mut host, _) = listener.accept().unwrap();
    host.set_read_timeout(Some(super::guest::PATIENCE)).unwrap();
    std::thread::sleep(std::time::Duration::from_millis(20));
    guest.card.net.send(&ipv4(6, [10, 0, 2, 2], &tcp(50000, port, 4, 2)));
    let end = std::io::Read::read(&mut host, &mut [0; 1]);
    assert_eq!(end.unwrap_err().kind(), std::io::ErrorKind::ConnectionReset);
}
