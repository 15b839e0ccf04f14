//! The wire to the guest: framing, neighbours, and frames the guest refuses.
//!
//! Nothing here grows without bound: while the guest takes no frames, senders
//! that can wait ask [`Link::ready`] first, and replies beyond the queue's
//! bound are dropped as a full wire would.

use std::collections::{HashMap, VecDeque};
use std::net::IpAddr;

use smoltcp::wire::{EthernetAddress, EthernetFrame, EthernetProtocol, IpProtocol, Ipv4Packet, Ipv6Packet};

/// Length of an Ethernet header.
pub(super) const ETH: usize = 14;
/// Largest IP packet on the wire.
pub(super) const MTU: usize = 1500;

const QUEUE_FRAMES: usize = 256;
const NEIGHBOURS: usize = 64;
const WAITING: usize = 32;

/// Hands one frame to the guest; `false` refuses it until
/// [`guest_can_receive`](super::UserNet::guest_can_receive).
pub(super) type Deliver = Box<dyn Fn(&[u8]) -> bool + Send>;

pub(super) struct Link {
    deliver: Deliver,
    pub mac: EthernetAddress,
    blocked: bool,
    queue: VecDeque<Vec<u8>>,
    scratch: Vec<u8>,
    neighbours: HashMap<IpAddr, EthernetAddress>,
    /// Packets whose destination has not answered who it is.
    waiting: VecDeque<(IpAddr, Vec<u8>)>,
    /// Destinations to ask for; drained by the neighbour protocols.
    pub unresolved: Vec<IpAddr>,
    ident: u16,
}

impl Link {
    pub fn new(deliver: Deliver, mac: EthernetAddress) -> Link {
        Link {
            deliver,
            mac,
            blocked: false,
            queue: VecDeque::new(),
            scratch: Vec::with_capacity(ETH + MTU),
            neighbours: HashMap::new(),
            waiting: VecDeque::new(),
            unresolved: Vec::new(),
            ident: 1,
        }
    }

    /// Does the guest take frames?
    pub fn ready(&self) -> bool {
        !self.blocked
    }

    /// The guest says it takes frames again: sends what it refused.
    pub fn unblock(&mut self) {
        self.blocked = false;
        while let Some(frame) = self.queue.pop_front() {
            if !(self.deliver)(&frame) {
                self.queue.push_front(frame);
                self.blocked = true;
                return;
            }
        }
    }

    /// Sends one Ethernet frame whose header and `len` payload bytes (zeroed
    /// before) are set up here and by `fill`.
    pub fn send_frame<R>(
        &mut self,
        dst: EthernetAddress,
        ethertype: EthernetProtocol,
        len: usize,
        fill: impl FnOnce(&mut [u8]) -> R,
    ) -> R {
        let mut buffer = std::mem::take(&mut self.scratch);
        buffer.clear();
        buffer.resize(ETH + len, 0);
        let mut frame = EthernetFrame::new_unchecked(&mut buffer[..]);
        frame.set_dst_addr(dst);
        frame.set_src_addr(self.mac);
        frame.set_ethertype(ethertype);
        let result = fill(&mut buffer[ETH..]);
        self.scratch = self.transmit(buffer);
        result
    }

    /// Returns a buffer for the next frame.
    fn transmit(&mut self, frame: Vec<u8>) -> Vec<u8> {
        if !self.blocked && (self.deliver)(&frame) {
            return frame;
        }
        self.blocked = true;
        if self.queue.len() < QUEUE_FRAMES {
            self.queue.push_back(frame);
            return Vec::with_capacity(ETH + MTU);
        }
        frame
    }

    /// Sends an IP packet of `len` bytes which `fill` writes, to the
    /// neighbour `dst`, or keeps it while the neighbour is being asked for.
    pub fn send_ip<R>(&mut self, dst: IpAddr, len: usize, fill: impl FnOnce(&mut [u8]) -> R) -> R {
        let ethertype = ethertype_of(dst);
        if let Some(mac) = self.neighbour(dst) {
            return self.send_frame(mac, ethertype, len, fill);
        }
        let mut packet = vec![0; len];
        let result = fill(&mut packet);
        if self.waiting.len() >= WAITING {
            self.waiting.pop_front();
        }
        self.waiting.push_back((dst, packet));
        if !self.unresolved.contains(&dst) && self.unresolved.len() < WAITING {
            self.unresolved.push(dst);
        }
        result
    }

    fn neighbour(&self, dst: IpAddr) -> Option<EthernetAddress> {
        match dst {
            IpAddr::V4(a) if a.is_broadcast() => Some(EthernetAddress::BROADCAST),
            IpAddr::V6(a) if a.is_multicast() => {
                let o = a.octets();
                Some(EthernetAddress([0x33, 0x33, o[12], o[13], o[14], o[15]]))
            }
            _ => self.neighbours.get(&dst).copied(),
        }
    }

    /// Remembers that `ip` is at `mac`, and sends what waited for it.
    pub fn learn(&mut self, ip: IpAddr, mac: EthernetAddress) {
        if !mac.is_unicast() || ip.is_unspecified() || ip.is_multicast() || ip.is_loopback() {
            return;
        }
        if self.neighbours.get(&ip) == Some(&mac) {
            return;
        }
        if self.neighbours.len() >= NEIGHBOURS {
            self.neighbours.clear();
        }
        self.neighbours.insert(ip, mac);
        let (now, later): (VecDeque<_>, VecDeque<_>) =
            std::mem::take(&mut self.waiting).into_iter().partition(|(dst, _)| *dst == ip);
        self.waiting = later;
        for (dst, packet) in now {
            self.send_frame(mac, ethertype_of(dst), packet.len(), |b| b.copy_from_slice(&packet));
        }
    }

    /// Sends `payload` in IP, in fragments when it exceeds the MTU (RFC 791;
    /// for IPv6 the fragment header of RFC 8200, section 4.5).
    pub fn send_datagram(&mut self, src: IpAddr, dst: IpAddr, proto: IpProtocol, payload: &[u8]) {
        self.ident = self.ident.wrapping_add(1);
        match (src, dst) {
            (IpAddr::V4(src), IpAddr::V4(dst)) => {
                let step = (MTU - 20) & !7;
                let whole = payload.len() <= MTU - 20;
                self.pieces(payload, if whole { MTU - 20 } else { step }, |link, at, piece, more| {
                    let ident = link.ident;
                    link.send_ip(dst.into(), 20 + piece.len(), |b| {
                        let mut p = Ipv4Packet::new_unchecked(b);
                        p.set_version(4);
                        p.set_header_len(20);
                        p.set_total_len((20 + piece.len()) as u16);
                        p.set_ident(ident);
                        p.set_more_frags(more);
                        p.set_frag_offset(at as u16);
                        p.set_hop_limit(64);
                        p.set_next_header(proto);
                        p.set_src_addr(src);
                        p.set_dst_addr(dst);
                        p.fill_checksum();
                        p.payload_mut().copy_from_slice(piece);
                    });
                });
            }
            (IpAddr::V6(src), IpAddr::V6(dst)) => {
                let whole = payload.len() <= MTU - 40;
                let (extra, step) = if whole { (0, MTU - 40) } else { (8, (MTU - 48) & !7) };
                self.pieces(payload, step, |link, at, piece, more| {
                    let ident = link.ident;
                    link.send_ip(dst.into(), 40 + extra + piece.len(), |b| {
                        let mut p = Ipv6Packet::new_unchecked(&mut b[..]);
                        p.set_version(6);
                        p.set_payload_len((extra + piece.len()) as u16);
                        p.set_hop_limit(if proto == IpProtocol::Icmpv6 { 255 } else { 64 });
                        p.set_next_header(if whole { proto } else { IpProtocol::Ipv6Frag });
                        p.set_src_addr(src);
                        p.set_dst_addr(dst);
                        if !whole {
                            b[40] = proto.into();
                            let field = (at as u16) | u16::from(more);
                            b[42..44].copy_from_slice(&field.to_be_bytes());
                            b[46..48].copy_from_slice(&ident.to_be_bytes());
                        }
                        b[40 + extra..].copy_from_slice(piece);
                    });
                });
            }
            // The families of one datagram always agree; nothing to send else.
            _ => {}
        }
    }

    fn pieces(&mut self, payload: &[u8], step: usize, mut send: impl FnMut(&mut Link, usize, &[u8], bool)) {
        if payload.is_empty() {
            return send(self, 0, payload, false);
        }
        let mut at = 0;
        for piece in payload.chunks(step) {
            send(self, at, piece, at + piece.len() < payload.len());
            at += piece.len();
        }
    }
}

fn ethertype_of(ip: IpAddr) -> EthernetProtocol {
    match ip {
        IpAddr::V4(_) => EthernetProtocol::Ipv4,
        IpAddr::V6(_) => EthernetProtocol::Ipv6,
    }
}
