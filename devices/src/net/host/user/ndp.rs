//! IPv6 neighbour discovery (RFC 4861): the gateway and the DNS forwarder
//! answer for themselves, and router advertisements let the guest configure
//! itself, resolver included (RFC 8106).

use std::net::{IpAddr, Ipv6Addr};

use smoltcp::wire::EthernetAddress;

use super::config::{LINK_LOCAL_GATEWAY, Net6};
use super::env::{Env, IpInfo};
use super::icmp::{self, ECHO_REQUEST6, Pings};

const ROUTER_SOLICIT: u8 = 133;
const ROUTER_ADVERT: u8 = 134;
const NEIGHBOUR_SOLICIT: u8 = 135;
const NEIGHBOUR_ADVERT: u8 = 136;
const OPT_SOURCE: u8 = 1;
const OPT_TARGET: u8 = 2;

const ALL_NODES: Ipv6Addr = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 1);
/// Lifetime of what a router advertisement says, in seconds.
const LIFETIME: u32 = 86400;
const ROUTER_LIFETIME: u16 = 9000;

/// An ICMPv6 message of the guest.
pub(super) fn input(env: &mut Env, pings: &mut Pings, ip: IpInfo, mac: EthernetAddress, message: &[u8]) {
    let (IpAddr::V6(src), IpAddr::V6(_), Some(net)) = (ip.src, ip.dst, env.net.v6) else { return };
    if message.len() < 8 || message[1] != 0 {
        return;
    }
    match message[0] {
        ECHO_REQUEST6 => icmp::echo(env, pings, ip, message),
        ROUTER_SOLICIT => advertise_router(env, &net),
        NEIGHBOUR_SOLICIT => solicited(env, &net, src, mac, message),
        NEIGHBOUR_ADVERT => {
            if let Some(target) = target(message).filter(|t| !env.net.is_ours((*t).into())) {
                env.link.learn(target.into(), mac);
            }
        }
        _ => {}
    }
}

fn target(message: &[u8]) -> Option<Ipv6Addr> {
    message.get(8..24)?.first_chunk().map(|o: &[u8; 16]| Ipv6Addr::from(*o))
}

fn solicited(env: &mut Env, net: &Net6, src: Ipv6Addr, mac: EthernetAddress, message: &[u8]) {
    let Some(target) = target(message) else { return };
    if ![net.host, net.dns, LINK_LOCAL_GATEWAY].contains(&target) {
        return;
    }
    // Router, solicited, override; a duplicate address probe is told at large.
    let (dst, flags) = if src.is_unspecified() { (ALL_NODES, 0xa0) } else { (src, 0xe0) };
    if !src.is_unspecified() {
        env.link.learn(src.into(), mac);
    }
    let mut advert = vec![NEIGHBOUR_ADVERT, 0, 0, 0, flags, 0, 0, 0];
    advert.extend_from_slice(&target.octets());
    link_option(&mut advert, OPT_TARGET, env.link.mac);
    icmp::send(env, target.into(), dst.into(), advert);
}

/// Asks who has `target`. The question goes to all nodes: the guest's group
/// of the target is one of them, and this wire has no more.
pub(super) fn solicit(env: &mut Env, target: Ipv6Addr) {
    let mut message = vec![NEIGHBOUR_SOLICIT, 0, 0, 0, 0, 0, 0, 0];
    message.extend_from_slice(&target.octets());
    link_option(&mut message, OPT_SOURCE, env.link.mac);
    let o = target.octets();
    let group = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 1, 0xff00 | u16::from(o[13]), u16::from_be_bytes([o[14], o[15]]));
    icmp::send(env, LINK_LOCAL_GATEWAY.into(), group.into(), message);
}

/// Advertises the gateway, the prefix and the resolver.
pub(super) fn advertise_router(env: &mut Env, net: &Net6) {
    let mut m = vec![ROUTER_ADVERT, 0, 0, 0, 64, 0];
    m.extend_from_slice(&ROUTER_LIFETIME.to_be_bytes());
    m.extend_from_slice(&[0; 8]);
    link_option(&mut m, OPT_SOURCE, env.link.mac);
    // Prefix information: on-link, autonomous.
    m.extend_from_slice(&[3, 4, net.prefixlen, 0xc0]);
    m.extend_from_slice(&LIFETIME.to_be_bytes());
    m.extend_from_slice(&LIFETIME.to_be_bytes());
    m.extend_from_slice(&[0; 4]);
    m.extend_from_slice(&net.prefix.octets());
    // Recursive DNS server.
    m.extend_from_slice(&[25, 3, 0, 0]);
    m.extend_from_slice(&LIFETIME.to_be_bytes());
    m.extend_from_slice(&net.dns.octets());
    icmp::send(env, LINK_LOCAL_GATEWAY.into(), ALL_NODES.into(), m);
}

fn link_option(message: &mut Vec<u8>, kind: u8, mac: EthernetAddress) {
    message.extend_from_slice(&[kind, 1]);
    message.extend_from_slice(&mac.0);
}
