//! Networks and network cards: `-netdev`, `-nic`.

use std::net::Ipv4Addr;

use serde::{Deserialize, Serialize};

use super::{ConfigError, KeyValues};

/// `-netdev user,id=…`
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Netdev {
    /// Name, for `-device …,netdev=ID`.
    pub id: String,
    /// What the card is connected to.
    pub backend: NetdevBackend,
}

/// What a network card is connected to.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "kebab-case")]
pub enum NetdevBackend {
    /// User networking: NAT to the host's network without privileges.
    User(UserNet),
}

/// Settings of user networking.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct UserNet {
    /// The guest's network.
    pub network: Ipv4Addr,
    /// Its prefix length.
    pub prefix: u8,
    /// Address of the host (and gateway) as the guest sees it; `None` is the network's second.
    pub host: Option<Ipv4Addr>,
    /// Address of the name server; `None` is the network's third.
    pub dns: Option<Ipv4Addr>,
    /// First address given out; `None` is the network's fifteenth.
    pub dhcp_start: Option<Ipv4Addr>,
    /// Name given to the guest.
    pub hostname: Option<String>,
    /// No traffic to outside, forwards apart.
    pub restrict: bool,
    /// Ports of the host that lead to the guest.
    pub forwards: Vec<HostForward>,
}

impl Default for UserNet {
    fn default() -> Self {
        UserNet {
            network: Ipv4Addr::new(10, 0, 2, 0),
            prefix: 24,
            host: None,
            dns: None,
            dhcp_start: None,
            hostname: None,
            restrict: false,
            forwards: Vec::new(),
        }
    }
}

/// `hostfwd=tcp:127.0.0.1:2222-:22`
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct HostForward {
    /// TCP or UDP.
    pub protocol: Protocol,
    /// Address to listen on; `None` is all of the host's.
    pub host_address: Option<Ipv4Addr>,
    /// Port to listen on; 0 lets the host choose.
    pub host_port: u16,
    /// The guest's address; `None` is the first that DHCP gives out.
    pub guest_address: Option<Ipv4Addr>,
    /// The guest's port.
    pub guest_port: u16,
}

/// A transport protocol.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Protocol {
    /// TCP
    Tcp,
    /// UDP
    Udp,
}

/// `-nic`: a network and a card in one.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Nic {
    /// `None` is `-nic none`: no card, not even the board's default one.
    pub backend: Option<NetdevBackend>,
    /// `model=`; `None` is the board's default model.
    pub model: Option<String>,
    /// `mac=`
    pub mac: Option<[u8; 6]>,
    /// `id=`
    pub id: Option<String>,
}

/// Back ends of QEMU that are not here, and what to use.
const MISSING: &[&str] = &[
    "tap",
    "bridge",
    "socket",
    "stream",
    "dgram",
    "l2tpv3",
    "vde",
    "hubport",
    "vhost-user",
    "vhost-vdpa",
    "af-xdp",
    "passt",
    "vmnet-host",
    "vmnet-shared",
    "vmnet-bridged",
    "netmap",
];

impl Netdev {
    /// `-netdev BACKEND,id=ID,…`
    pub fn parse(text: &str) -> Result<Self, ConfigError> {
        let mut kv = KeyValues::parse("-netdev", text, Some("type"))?;
        let kind = kv.take("type").ok_or_else(|| kv.error("the type is missing: -netdev user,id=n0"))?;
        let id = kv.take("id").ok_or_else(|| {
            kv.error("id= is missing: a netdev is used by its name (-device virtio-net-device,netdev=NAME)")
        })?;
        let backend = backend(&mut kv, &kind)?;
        kv.finish()?;
        Ok(Netdev { id, backend })
    }
}

impl Nic {
    /// `-nic user,model=…,mac=…,hostfwd=…` or `-nic none`
    pub fn parse(text: &str) -> Result<Self, ConfigError> {
        let mut kv = KeyValues::parse("-nic", text, Some("type"))?;
        let kind = kv.take("type").unwrap_or_else(|| "user".into());
        let model = kv.take("model");
        let id = kv.take("id");
        let mac = match kv.take("mac") {
            Some(text) => Some(parse_mac(&text).ok_or_else(|| {
                kv.error(format!("mac={text}: write six hexadecimal bytes, the first even, as 52:54:00:12:34:56"))
            })?),
            None => None,
        };
        let backend = if kind == "none" { None } else { Some(backend(&mut kv, &kind)?) };
        kv.finish()?;
        Ok(Nic { backend, model, mac, id })
    }
}

fn backend(kv: &mut KeyValues, kind: &str) -> Result<NetdevBackend, ConfigError> {
    match kind {
        "user" => Ok(NetdevBackend::User(user_net(kv)?)),
        other if MISSING.contains(&other) => Err(kv.error(format!("{other} is a network back end of QEMU that mimus does not have (yet); there is user, which needs no privileges"))),
        other => Err(kv.error(format!("there is no network back end '{other}'; there is user"))),
    }
}

fn user_net(kv: &mut KeyValues) -> Result<UserNet, ConfigError> {
    let mut net = UserNet::default();
    if let Some(text) = kv.take("net") {
        (net.network, net.prefix) =
            parse_network(&text).ok_or_else(|| kv.error(format!("net={text}: write a network as 10.0.2.0/24")))?;
    }
    net.host = address(kv, "host", net.network, net.prefix)?;
    net.dns = address(kv, "dns", net.network, net.prefix)?;
    net.dhcp_start = address(kv, "dhcpstart", net.network, net.prefix)?;
    net.hostname = kv.take("hostname");
    net.restrict = kv.take_bool("restrict")?.unwrap_or(false);
    if kv.take_bool("ipv4")? == Some(false) {
        return Err(kv.error("ipv4=off: user networking always has IPv4"));
    }
    kv.take_bool("ipv6")?;
    for text in kv.take_all("hostfwd") {
        net.forwards.push(HostForward::parse(&text).map_err(|reason| kv.error(format!("hostfwd={text}: {reason}")))?);
    }
    for (key, instead) in [
        ("guestfwd", "connect from the guest to the host's address instead"),
        ("tftp", "use -kernel and -initrd"),
        ("bootfile", "use -kernel and -initrd"),
        ("smb", "serve the files over ssh or HTTP"),
        ("dnssearch", "set the search list in the guest"),
        ("domainname", "set it in the guest"),
    ] {
        if kv.take(key).is_some() {
            return Err(kv.error(format!("{key}= is a key of QEMU that mimus does not have (yet): {instead}")));
        }
    }
    Ok(net)
}

/// An address of the guest's network, for `key`.
fn address(
    kv: &mut KeyValues,
    key: &'static str,
    network: Ipv4Addr,
    prefix: u8,
) -> Result<Option<Ipv4Addr>, ConfigError> {
    let Some(text) = kv.take(key) else {
        return Ok(None);
    };
    let parsed: Ipv4Addr =
        text.parse().map_err(|_| kv.error(format!("{key}={text}: write an IPv4 address as 10.0.2.2")))?;
    let mask = mask(prefix);
    if u32::from(parsed) & mask != u32::from(network) & mask {
        return Err(
            kv.error(format!("{key}={text}: it is not in the guest's network {network}/{prefix}; set that with net="))
        );
    }
    Ok(Some(parsed))
}

fn mask(prefix: u8) -> u32 {
    u32::MAX.checked_shl(32 - u32::from(prefix)).unwrap_or(0)
}

fn parse_network(text: &str) -> Option<(Ipv4Addr, u8)> {
    let (address, prefix) = text.split_once('/').unwrap_or((text, "24"));
    let prefix: u8 = prefix.parse().ok().filter(|p| (8..=29).contains(p))?;
    let address: Ipv4Addr = address.parse().ok()?;
    Some((Ipv4Addr::from(u32::from(address) & mask(prefix)), prefix))
}

/// `52:54:00:12:34:56`; a multicast address is no card's.
pub fn parse_mac(text: &str) -> Option<[u8; 6]> {
    let mut mac = [0; 6];
    let mut parts = text.split([':', '-']);
    for byte in &mut mac {
        *byte = parts.next().filter(|p| (1..=2).contains(&p.len())).and_then(|p| u8::from_str_radix(p, 16).ok())?;
    }
    (parts.next().is_none() && mac[0] & 1 == 0).then_some(mac)
}

impl HostForward {
    /// `[tcp|udp]:[hostaddr]:hostport-[guestaddr]:guestport`
    pub fn parse(text: &str) -> Result<Self, String> {
        const FORM: &str =
            "write tcp:127.0.0.1:2222-:22 (protocol, host address, host port, guest address, guest port)";
        let (host, guest) = text.rsplit_once('-').ok_or(FORM)?;
        let mut parts = host.splitn(3, ':');
        let protocol = match parts.next() {
            Some("tcp" | "") => Protocol::Tcp,
            Some("udp") => Protocol::Udp,
            _ => return Err(format!("the protocol is tcp or udp; {FORM}")),
        };
        let host_address = optional_address(parts.next().ok_or(FORM)?, FORM)?;
        let host_port = parts.next().and_then(|p| p.parse().ok()).ok_or(FORM)?;
        let (guest_address, guest_port) = guest.split_once(':').ok_or(FORM)?;
        let guest_address = optional_address(guest_address, FORM)?;
        let guest_port = guest_port.parse().ok().filter(|p| *p != 0).ok_or(FORM)?;
        Ok(HostForward { protocol, host_address, host_port, guest_address, guest_port })
    }
}

fn optional_address(text: &str, form: &str) -> Result<Option<Ipv4Addr>, String> {
    if text.is_empty() {
        Ok(None)
    } else {
        text.parse().map(Some).map_err(|_| format!("'{text}' is no IPv4 address; {form}"))
    }
}
