//! The options of `-netdev user`, and the checked form the stack runs on.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use serde::{Deserialize, Serialize};

use super::hostfwd::HostFwd;

/// A string in a list: plain, or QEMU's `{"str": "…"}` object form.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum ListString {
    /// `"tcp::2222-:22"`
    Plain(String),
    /// `{"str": "tcp::2222-:22"}`, QEMU's `String` type.
    Object {
        /// The text.
        str: String,
    },
}

impl ListString {
    /// The text, whichever way it was written.
    pub fn as_str(&self) -> &str {
        match self {
            ListString::Plain(s) | ListString::Object { str: s } => s,
        }
    }
}

impl From<&str> for ListString {
    fn from(s: &str) -> Self {
        ListString::Plain(s.to_owned())
    }
}

/// Options of `-netdev user`, under QEMU's names. Absent options take the
/// defaults of the 10.0.2.0/24 network.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields, default)]
pub struct UserNetConfig {
    /// Serve IPv4 (default on).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ipv4: Option<bool>,
    /// Serve IPv6 (default on).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ipv6: Option<bool>,
    /// The guest's network: `addr`, `addr/bits` or `addr/netmask`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub net: Option<String>,
    /// The gateway, which stands for the host's loopback (default: net + 2).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub host: Option<Ipv4Addr>,
    /// The DNS forwarder (default: net + 3).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub dns: Option<Ipv4Addr>,
    /// First of the 16 addresses DHCP gives out (default: net + 15).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub dhcpstart: Option<Ipv4Addr>,
    /// The guest's IPv6 network (default `fec0::`).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ipv6_prefix: Option<Ipv6Addr>,
    /// Its prefix length in bits (default 64; router advertisements need 64).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ipv6_prefixlen: Option<u8>,
    /// The IPv6 gateway (default: prefix + 2).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ipv6_host: Option<Ipv6Addr>,
    /// The IPv6 address of the DNS forwarder (default: prefix + 3).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ipv6_dns: Option<Ipv6Addr>,
    /// Host name DHCP tells the guest.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub hostname: Option<String>,
    /// Domain name DHCP tells the guest.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub domainname: Option<String>,
    /// Domain search list DHCP tells the guest (RFC 3397).
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub dnssearch: Vec<ListString>,
    /// Boot file name DHCP tells the guest.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub bootfile: Option<String>,
    /// Boot server name DHCP tells the guest (RFC 2132 option 66).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tftp_server_name: Option<String>,
    /// Isolate the guest: only DHCP, pings of the gateway and `hostfwd` work.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub restrict: Option<bool>,
    /// `tcp|udp:[hostaddr]:hostport-[guestaddr]:guestport`, repeated.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub hostfwd: Vec<ListString>,
    /// Resolvers the DNS forwarder asks, instead of the host's
    /// `/etc/resolv.conf`. Not a QEMU option.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub dns_servers: Vec<SocketAddr>,
}

/// The checked configuration.
#[derive(Debug, Clone)]
pub(super) struct Net {
    pub v4: Option<Net4>,
    pub v6: Option<Net6>,
    pub restrict: bool,
    pub hostname: Option<String>,
    pub domainname: Option<String>,
    pub dnssearch: Vec<String>,
    pub bootfile: Option<String>,
    pub tftp_server_name: Option<String>,
    pub dns_servers: Vec<SocketAddr>,
}

/// The IPv4 side of the virtual network.
#[derive(Debug, Clone, Copy)]
pub(super) struct Net4 {
    pub net: Ipv4Addr,
    pub mask: Ipv4Addr,
    pub host: Ipv4Addr,
    pub dns: Ipv4Addr,
    pub dhcpstart: Ipv4Addr,
}

/// The IPv6 side of the virtual network.
#[derive(Debug, Clone, Copy)]
pub(super) struct Net6 {
    pub prefix: Ipv6Addr,
    pub prefixlen: u8,
    pub host: Ipv6Addr,
    pub dns: Ipv6Addr,
}

impl Net4 {
    /// Is `addr` inside the virtual network?
    pub fn contains(&self, addr: Ipv4Addr) -> bool {
        addr.to_bits() & self.mask.to_bits() == self.net.to_bits()
    }

    /// The network's directed broadcast address.
    pub fn broadcast(&self) -> Ipv4Addr {
        Ipv4Addr::from_bits(self.net.to_bits() | !self.mask.to_bits())
    }
}

impl Net6 {
    /// Is `addr` inside the virtual network?
    pub fn contains(&self, addr: Ipv6Addr) -> bool {
        let mask = u128::MAX.checked_shl(128 - u32::from(self.prefixlen)).unwrap_or(0);
        addr.to_bits() & mask == self.prefix.to_bits()
    }
}

/// What an address the guest sends to stands for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Target {
    /// An address of the host or of the world behind it.
    Host(IpAddr),
    /// The gateway itself: the host's loopback.
    Gateway(IpAddr),
    /// The DNS forwarder.
    Dns,
    /// Nothing the guest may reach.
    Forbidden,
}

impl Net {
    /// Checks `config`; every error names the option at fault.
    pub fn new(config: &UserNetConfig) -> Result<Net, String> {
        let v4 = config.ipv4.unwrap_or(true).then(|| net4(config)).transpose()?;
        let v6 = config.ipv6.unwrap_or(true).then(|| net6(config)).transpose()?;
        if v4.is_none() && v6.is_none() {
            return Err("netdev user: ipv4=off and ipv6=off leave no network; turn one on".into());
        }
        for (name, value) in [
            ("hostname", &config.hostname),
            ("domainname", &config.domainname),
            ("tftp-server-name", &config.tftp_server_name),
        ] {
            if value.as_ref().is_some_and(|v| v.len() > 255) {
                return Err(format!("netdev user: {name} is longer than the 255 bytes of a DHCP option"));
            }
        }
        if config.bootfile.as_ref().is_some_and(|b| b.len() > 127) {
            return Err("netdev user: bootfile is longer than the 127 bytes of its DHCP field".into());
        }
        Ok(Net {
            v4,
            v6,
            restrict: config.restrict.unwrap_or(false),
            hostname: config.hostname.clone(),
            domainname: config.domainname.clone(),
            dnssearch: config.dnssearch.iter().map(|s| s.as_str().to_owned()).collect(),
            bootfile: config.bootfile.clone(),
            tftp_server_name: config.tftp_server_name.clone(),
            dns_servers: config.dns_servers.clone(),
        })
    }

    /// The forwardings of `config`, parsed.
    pub fn hostfwds(&self, config: &UserNetConfig) -> Result<Vec<HostFwd>, String> {
        config.hostfwd.iter().map(|s| HostFwd::parse(s.as_str(), self)).collect()
    }

    /// What the guest's destination `dst` stands for. Loopback addresses in
    /// any spelling are refused: only the gateway stands for the host.
    pub fn classify(&self, dst: IpAddr) -> Target {
        if self.restrict {
            return Target::Forbidden;
        }
        match dst {
            IpAddr::V4(a) => self.classify4(a),
            IpAddr::V6(a) => self.classify6(a),
        }
    }

    fn classify4(&self, a: Ipv4Addr) -> Target {
        let Some(net) = &self.v4 else { return Target::Forbidden };
        if a == net.host {
            Target::Gateway(Ipv4Addr::LOCALHOST.into())
        } else if a == net.dns {
            Target::Dns
        } else if net.contains(a) || a.is_loopback() || a.is_multicast() || a.is_broadcast() || a.octets()[0] == 0 {
            Target::Forbidden
        } else {
            Target::Host(a.into())
        }
    }

    fn classify6(&self, a: Ipv6Addr) -> Target {
        let Some(net) = &self.v6 else { return Target::Forbidden };
        if a == net.host {
            Target::Gateway(Ipv6Addr::LOCALHOST.into())
        } else if a == net.dns {
            Target::Dns
        } else if net.contains(a)
            || a.is_loopback()
            || a.is_multicast()
            || a.is_unspecified()
            || a.is_unicast_link_local()
            || a.to_ipv4_mapped().is_some()
        {
            Target::Forbidden
        } else {
            Target::Host(a.into())
        }
    }

    /// The address under which the guest sees the host's peer `addr`.
    pub fn peer_as_seen(&self, addr: IpAddr, guest: IpAddr) -> Option<IpAddr> {
        let addr = addr.to_canonical();
        let gateway = self.gateway(guest)?;
        let foreign = addr.is_loopback()
            || addr.is_unspecified()
            || addr.is_ipv4() != guest.is_ipv4()
            || self.is_ours(addr)
            || addr == guest;
        Some(if foreign { gateway } else { addr })
    }

    /// The gateway of the guest address's family.
    pub fn gateway(&self, guest: IpAddr) -> Option<IpAddr> {
        match guest {
            IpAddr::V4(_) => self.v4.map(|n| n.host.into()),
            IpAddr::V6(_) => self.v6.map(|n| n.host.into()),
        }
    }

    /// Is `addr` one of the stack's own addresses?
    pub fn is_ours(&self, addr: IpAddr) -> bool {
        match addr {
            IpAddr::V4(a) => self.v4.is_some_and(|n| a == n.host || a == n.dns),
            IpAddr::V6(a) => self.v6.is_some_and(|n| a == n.host || a == n.dns || a == LINK_LOCAL_GATEWAY),
        }
    }
}

/// The gateway's link-local address: router advertisements come from it.
pub(super) const LINK_LOCAL_GATEWAY: Ipv6Addr = Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, 2);

fn net4(config: &UserNetConfig) -> Result<Net4, String> {
    let (net, mask) = match &config.net {
        Some(text) => parse_net(text)?,
        None => (Ipv4Addr::new(10, 0, 2, 0), Ipv4Addr::new(255, 255, 255, 0)),
    };
    let at = |n: u32| Ipv4Addr::from_bits(net.to_bits() | (n & !mask.to_bits()));
    let this = Net4 {
        net,
        mask,
        host: config.host.unwrap_or(at(2)),
        dns: config.dns.unwrap_or(at(3)),
        dhcpstart: config.dhcpstart.unwrap_or(at(15)),
    };
    for (name, addr) in [("host", this.host), ("dns", this.dns), ("dhcpstart", this.dhcpstart)] {
        if !this.contains(addr) || addr == this.net || addr == this.broadcast() {
            return Err(format!(
                "netdev user: {name}={addr} is not a host address of net {net}/{}; give one that is",
                mask.to_bits().count_ones()
            ));
        }
    }
    if this.host == this.dns || this.dhcpstart == this.host || this.dhcpstart == this.dns {
        return Err(format!(
            "netdev user: host={}, dns={} and dhcpstart={} must differ",
            this.host, this.dns, this.dhcpstart
        ));
    }
    Ok(this)
}

/// `a.b.c.d`, `a.b.c.d/bits` or `a.b.c.d/netmask`; without a mask, the
/// address's class decides, as in QEMU.
fn parse_net(text: &str) -> Result<(Ipv4Addr, Ipv4Addr), String> {
    let bad = || format!("netdev user: net={text} is not an IPv4 network; write it like 10.0.2.0/24");
    let (addr, mask) = match text.split_once('/') {
        Some((addr, mask)) => (addr, Some(mask)),
        None => (text, None),
    };
    let addr: Ipv4Addr = addr.parse().map_err(|_| bad())?;
    let bits = match mask {
        None if addr.octets()[0] < 128 => 8,
        None if addr.octets()[0] < 192 => 16,
        None => 24,
        Some(m) if m.contains('.') => {
            let mask = m.parse::<Ipv4Addr>().map_err(|_| bad())?.to_bits();
            if mask.leading_ones() != mask.count_ones() {
                return Err(bad());
            }
            mask.count_ones()
        }
        Some(m) => m.parse().map_err(|_| bad())?,
    };
    // Room for the gateway, the DNS forwarder and one guest.
    if !(4..=28).contains(&bits) {
        return Err(format!("netdev user: net={text} must have a prefix of 4 to 28 bits"));
    }
    let mask = u32::MAX << (32 - bits);
    Ok((Ipv4Addr::from_bits(addr.to_bits() & mask), Ipv4Addr::from_bits(mask)))
}

fn net6(config: &UserNetConfig) -> Result<Net6, String> {
    let prefixlen = config.ipv6_prefixlen.unwrap_or(64);
    if !(4..=126).contains(&prefixlen) {
        return Err(format!("netdev user: ipv6-prefixlen={prefixlen} is not between 4 and 126; use 64"));
    }
    let given = config.ipv6_prefix.unwrap_or(Ipv6Addr::new(0xfec0, 0, 0, 0, 0, 0, 0, 0));
    let prefix = given.to_bits() & (u128::MAX << (128 - u32::from(prefixlen)));
    let this = Net6 {
        prefix: Ipv6Addr::from_bits(prefix),
        prefixlen,
        host: config.ipv6_host.unwrap_or(Ipv6Addr::from_bits(prefix | 2)),
        dns: config.ipv6_dns.unwrap_or(Ipv6Addr::from_bits(prefix | 3)),
    };
    for (name, addr) in [("ipv6-host", this.host), ("ipv6-dns", this.dns)] {
        if !this.contains(addr) || addr.is_multicast() {
            return Err(format!(
                "netdev user: {name}={addr} is not in {}/{prefixlen}; give an address that is",
                this.prefix
            ));
        }
    }
    if this.host == this.dns {
        return Err(format!("netdev user: ipv6-host and ipv6-dns are both {}; they must differ", this.host));
    }
    Ok(this)
}
