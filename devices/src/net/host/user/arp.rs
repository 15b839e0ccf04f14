//! ARP (RFC 826): the gateway and the DNS forwarder answer for themselves.

use std::net::Ipv4Addr;

use smoltcp::wire::{ArpOperation, ArpPacket, ArpRepr, EthernetAddress, EthernetProtocol};

use super::config::Net4;
use super::link::Link;

/// An ARP packet of the guest.
pub(super) fn input(link: &mut Link, net: &Net4, payload: &[u8]) {
    let Ok(packet) = ArpPacket::new_checked(payload) else { return };
    let Ok(ArpRepr::EthernetIpv4 {
        operation,
        source_hardware_addr: mac,
        source_protocol_addr: source,
        target_protocol_addr: target,
        ..
    }) = ArpRepr::parse(&packet)
    else {
        return;
    };
    let ours = |a| a == net.host || a == net.dns;
    if ours(source) || !mac.is_unicast() {
        return;
    }
    // Announcements and probes teach too, except the unspecified sender's.
    if net.contains(source) {
        link.learn(source.into(), mac);
    }
    if operation == ArpOperation::Request && ours(target) {
        send(link, ArpOperation::Reply, target, mac, mac, source);
    }
}

/// Asks who has `target`.
pub(super) fn request(link: &mut Link, net: &Net4, target: Ipv4Addr) {
    let unknown = EthernetAddress([0; 6]);
    send(link, ArpOperation::Request, net.host, EthernetAddress::BROADCAST, unknown, target);
}

fn send(
    link: &mut Link,
    operation: ArpOperation,
    source: Ipv4Addr,
    to: EthernetAddress,
    target_mac: EthernetAddress,
    target: Ipv4Addr,
) {
    let repr = ArpRepr::EthernetIpv4 {
        operation,
        source_hardware_addr: link.mac,
        source_protocol_addr: source,
        target_hardware_addr: target_mac,
        target_protocol_addr: target,
    };
    link.send_frame(to, EthernetProtocol::Arp, repr.buffer_len(), |b| {
        repr.emit(&mut ArpPacket::new_unchecked(b));
    });
}
