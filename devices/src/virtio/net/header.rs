//! The header before each frame in a ring (VIRTIO 1.2 §5.1.6).

/// Bytes of the header: `num_buffers` is always there in a modern device.
pub const HEADER_LEN: usize = 12;

const FLAG_NEEDS_CSUM: u8 = 1;
const FLAG_DATA_VALID: u8 = 2;
const GSO_NONE: u8 = 0;
const GSO_TCPV4: u8 = 1;
const GSO_TCPV6: u8 = 4;
const GSO_ECN: u8 = 0x80;

/// Segmentation the driver wants done.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum GsoType {
    /// None.
    #[default]
    None,
    /// Of TCP over IPv4 or IPv6.
    Tcp {
        /// Over IPv6.
        v6: bool,
    },
}

/// A transmit header.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Header {
    /// The checksum from `csum_start` is to be completed at `csum_offset` behind it.
    pub needs_checksum: bool,
    /// Segmentation.
    pub gso_type: GsoType,
    /// Bytes of data per segment.
    pub gso_size: u16,
    /// First byte the checksum covers.
    pub csum_start: u16,
    /// Where it goes, from `csum_start`.
    pub csum_offset: u16,
}

impl Header {
    /// Reads a header; `None` if it asks for what was never offered.
    pub fn parse(raw: &[u8; HEADER_LEN]) -> Option<Self> {
        let gso_type = match raw[1] & !GSO_ECN {
            GSO_NONE => GsoType::None,
            GSO_TCPV4 => GsoType::Tcp { v6: false },
            GSO_TCPV6 => GsoType::Tcp { v6: true },
            _ => return None,
        };
        let half = |at: usize| u16::from_le_bytes([raw[at], raw[at + 1]]);
        Some(Self {
            needs_checksum: raw[0] & FLAG_NEEDS_CSUM != 0,
            gso_type,
            gso_size: half(4),
            csum_start: half(6),
            csum_offset: half(8),
        })
    }

    /// The header of a received frame over `buffers` chains.
    pub fn received(checksum_valid: bool, buffers: u16) -> [u8; HEADER_LEN] {
        let mut raw = [0; HEADER_LEN];
        raw[0] = if checksum_valid { FLAG_DATA_VALID } else { 0 };
        raw[10..].copy_from_slice(&buffers.to_le_bytes());
        raw
    }
}
