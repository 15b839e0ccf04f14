//! Networks: Ethernet frames in and out.

use serde::{Deserialize, Deserializer, Serialize, Serializer};
use std::fmt;
use std::str::FromStr;

/// Largest frame a backend must take: 64 KiB of payload with segmentation offload, and
/// headers.
pub const MAX_FRAME: usize = 65536 + 64;

/// An Ethernet address, written `52:54:00:12:34:56`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct MacAddress(pub [u8; 6]);

impl MacAddress {
    /// The n-th address of the range emulators use: `52:54:00:12:34:56` and on.
    pub const fn nth(n: u8) -> Self {
        Self([0x52, 0x54, 0x00, 0x12, 0x34, 0x56u8.wrapping_add(n)])
    }

    /// True for group addresses, which no interface can have.
    pub const fn is_multicast(self) -> bool {
        self.0[0] & 1 != 0
    }
}

impl fmt::Display for MacAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

/// A text that is not an Ethernet address.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is not an Ethernet address such as 52:54:00:12:34:56")]
pub struct BadMac(String);

impl FromStr for MacAddress {
    type Err = BadMac;

    fn from_str(s: &str) -> Result<Self, BadMac> {
        let bad = || BadMac(s.to_owned());
        let mut out = [0; 6];
        let mut parts = s.split([':', '-']);
        for byte in &mut out {
            let digits = |p: &&str| p.len() == 2 && p.bytes().all(|b| b.is_ascii_hexdigit());
            let part = parts.next().filter(digits).ok_or_else(bad)?;
            *byte = u8::from_str_radix(part, 16).map_err(|_| bad())?;
        }
        parts.next().is_none().then_some(Self(out)).ok_or_else(bad)
    }
}

impl Serialize for MacAddress {
    fn serialize<S: Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        s.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for MacAddress {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        String::deserialize(d)?.parse().map_err(serde::de::Error::custom)
    }
}

/// Takes one frame; false if the device has no room now. On the I/O thread, no lock held.
pub type NetReceiver = Box<dyn Fn(&[u8]) -> bool + Send + Sync>;

/// The host side of a network card.
pub trait NetBackend: Send + Sync {
    /// Sends one frame from the guest (no FCS). Never blocks; a frame that cannot be sent
    /// is dropped.
    fn send(&self, frame: &[u8]);

    /// Sets who takes frames for the guest. A frame not taken may be kept or dropped.
    fn set_receiver(&self, receiver: NetReceiver);

    /// The device can take frames again.
    fn receive_ready(&self);

    /// Sets who is told, on any thread, that the link went up or down.
    fn set_link_listener(&self, _listener: Box<dyn Fn(bool) + Send + Sync>) {}

    /// True if the link is up.
    fn link_up(&self) -> bool {
        true
    }

    /// One line for the monitor.
    fn describe(&self) -> String {
        "network backend".to_owned()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mac_addresses() {
        let mac: MacAddress = "52:54:00:12:34:56".parse().unwrap();
        assert_eq!((mac, mac.to_string()), (MacAddress::nth(0), "52:54:00:12:34:56".to_owned()));
        for bad in ["", "52:54:00:12:34", "52:54:00:12:34:56:78", "52:54:00:12:34:5g", "+2:54:00:12:34:56"] {
            assert!(bad.parse::<MacAddress>().is_err(), "{bad}");
        }
    }
}
