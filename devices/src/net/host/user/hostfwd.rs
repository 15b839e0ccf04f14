//! `hostfwd`: ports of the host that lead into the guest.

use std::fmt;
use std::io::{self, ErrorKind};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener, UdpSocket};

use super::config::Net;

/// Transport of a forwarding.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Proto {
    Tcp,
    Udp,
}

/// One parsed `hostfwd=` value.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct HostFwd {
    pub proto: Proto,
    pub host: SocketAddr,
    pub guest: SocketAddr,
}

impl fmt::Display for HostFwd {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let proto = match self.proto {
            Proto::Tcp => "tcp",
            Proto::Udp => "udp",
        };
        write!(f, "{proto}:{}", self.host)
    }
}

/// The host socket of a forwarding.
#[derive(Debug)]
pub(super) enum Listener {
    Tcp(TcpListener),
    Udp(UdpSocket),
}

impl HostFwd {
    /// Parses `tcp|udp:[hostaddr]:hostport-[guestaddr]:guestport`. IPv6
    /// addresses go in brackets. An empty host address means every address of
    /// the host, an empty guest address the first one DHCP gives out.
    pub fn parse(text: &str, net: &Net) -> Result<HostFwd, String> {
        let (proto, host, guest) = split(text).ok_or_else(|| {
            format!("hostfwd {text}: not of the form tcp|udp:[hostaddr]:hostport-[guestaddr]:guestport")
        })?;
        let host = endpoint(host, text, "host", true)?;
        let guest = endpoint(guest, text, "guest", false)?;
        let default_guest = || net.v4.map(|n| IpAddr::V4(n.dhcpstart));
        let guest_ip = guest
            .0
            .or_else(default_guest)
            .ok_or_else(|| format!("hostfwd {text}: without IPv4 there is no default guest address; write one"))?;
        let known = match guest_ip {
            IpAddr::V4(a) => net.v4.is_some_and(|n| n.contains(a)),
            IpAddr::V6(a) => net.v6.is_some_and(|n| n.contains(a)),
        };
        if !known || net.is_ours(guest_ip) {
            return Err(format!("hostfwd {text}: {guest_ip} is not a guest's address in this network"));
        }
        let host_ip = host.0.unwrap_or(Ipv4Addr::UNSPECIFIED.into());
        Ok(HostFwd { proto, host: (host_ip, host.1).into(), guest: (guest_ip, guest.1).into() })
    }

    /// Parses `tcp|udp:[hostaddr]:hostport`, the name of a forwarding.
    pub fn parse_host(text: &str) -> Result<(Proto, SocketAddr), String> {
        // The same grammar with a guest side that is left out.
        let (proto, host, _) = split(&format!("{text}-"))
            .map(|(p, h, _)| (p, h.to_owned(), ()))
            .ok_or_else(|| format!("hostfwd {text}: not of the form tcp|udp:[hostaddr]:hostport"))?;
        let (ip, port) = endpoint(&host, text, "host", true)?;
        Ok((proto, (ip.unwrap_or(Ipv4Addr::UNSPECIFIED.into()), port).into()))
    }

    /// Opens the host's port.
    pub fn listen(&self) -> Result<Listener, String> {
        let opened = match self.proto {
            Proto::Tcp => TcpListener::bind(self.host).and_then(|l| l.set_nonblocking(true).map(|()| Listener::Tcp(l))),
            Proto::Udp => UdpSocket::bind(self.host).and_then(|s| s.set_nonblocking(true).map(|()| Listener::Udp(s))),
        };
        opened.map_err(|e| self.explain(&e))
    }

    fn explain(&self, e: &io::Error) -> String {
        match e.kind() {
            ErrorKind::AddrInUse => {
                format!("hostfwd {self}: address already in use; pick another host port")
            }
            ErrorKind::PermissionDenied => {
                format!("hostfwd {self}: permission denied; pick a host port of 1024 or above")
            }
            ErrorKind::AddrNotAvailable => {
                format!("hostfwd {self}: the host has no address {}; use one it has", self.host.ip())
            }
            _ => format!("hostfwd {self}: cannot listen: {e}"),
        }
    }
}

fn split(text: &str) -> Option<(Proto, &str, &str)> {
    let (proto, rest) = text.split_once(':')?;
    let proto = match proto {
        "tcp" | "" => Proto::Tcp,
        "udp" => Proto::Udp,
        _ => return None,
    };
    let (host, guest) = rest.split_once('-')?;
    Some((proto, host, guest))
}

fn endpoint(part: &str, text: &str, side: &str, zero_ok: bool) -> Result<(Option<IpAddr>, u16), String> {
    let bad = |what: &str| format!("hostfwd {text}: bad {side} {what} in '{part}'");
    let (addr, port) = part.rsplit_once(':').ok_or_else(|| bad("port (it is missing)"))?;
    let addr = addr.strip_prefix('[').and_then(|a| a.strip_suffix(']')).unwrap_or(addr);
    let ip = match addr {
        "" => None,
        _ => Some(addr.parse().map_err(|_| bad("address"))?),
    };
    match port.parse() {
        Ok(0) if !zero_ok => Err(bad("port")),
        Ok(port) => Ok((ip, port)),
        Err(_) => Err(bad("port")),
    }
}
