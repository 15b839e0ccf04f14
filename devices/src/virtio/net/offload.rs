//! Checksum and segmentation offload in software: what a guest leaves undone because the
//! device said it would do it (VIRTIO 1.2 §5.1.6.2), and checking what it receives.
//!
//! A host computes checksums many times faster than translated guest code does.

use super::header::{GsoType, Header};

const ETHERNET_LEN: usize = 14;
const ETHERTYPE_IPV4: u16 = 0x0800;
const ETHERTYPE_IPV6: u16 = 0x86dd;
const IPV6_LEN: usize = 40;
const PROTOCOL_TCP: u8 = 6;
const PROTOCOL_UDP: u8 = 17;
/// Offset of the checksum in a TCP header.
const TCP_CHECKSUM: usize = 16;
/// Flags cleared in all segments but the last: FIN and PSH.
const TCP_LAST_ONLY: u8 = 0x01 | 0x08;
/// Flag kept in the first segment only: CWR.
const TCP_FIRST_ONLY: u8 = 0x80;

/// Sum of 16-bit big-endian words, folded; `RFC 1071`.
fn sum(start: u64, data: &[u8]) -> u64 {
    let (words, rest) = data.as_chunks::<4>();
    let mut total = words.iter().fold(start, |t, w| t + u64::from(u32::from_be_bytes(*w)));
    let mut tail = [0; 4];
    tail[..rest.len()].copy_from_slice(rest);
    total += u64::from(u32::from_be_bytes(tail));
    fold(total)
}

fn fold(mut total: u64) -> u64 {
    while total >> 16 != 0 {
        total = (total & 0xffff) + (total >> 16);
    }
    total
}

fn be16(frame: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_be_bytes(*frame.get(at..)?.first_chunk()?))
}

fn be32(frame: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_be_bytes(*frame.get(at..)?.first_chunk()?))
}

fn put(frame: &mut [u8], at: usize, bytes: &[u8]) -> Option<()> {
    frame.get_mut(at..at.checked_add(bytes.len())?)?.copy_from_slice(bytes);
    Some(())
}

/// Completes the checksum the header describes: the field holds the sum of the pseudo
/// header. `None` if it is outside the frame.
pub fn complete_checksum(frame: &mut [u8], start: usize, offset: usize) -> Option<()> {
    let at = start.checked_add(offset)?;
    be16(frame, at)?;
    let value = !(sum(0, frame.get(start..)?) as u16);
    // An all-zero UDP checksum means there is none; its other spelling is the same to TCP.
    let value = if value == 0 { 0xffff } else { value };
    put(frame, at, &value.to_be_bytes())
}

/// Where the parts of an IP frame are.
#[derive(Clone, Copy)]
struct Layout {
    ip: usize,
    v6: bool,
    protocol: u8,
    transport: usize,
    /// End of the IP packet; the frame may have padding after it.
    end: usize,
}

fn layout(frame: &[u8]) -> Option<Layout> {
    let ip = ETHERNET_LEN;
    match be16(frame, 12)? {
        ETHERTYPE_IPV4 => {
            let first = *frame.get(ip)?;
            let header = usize::from(first & 15) * 4;
            let total = usize::from(be16(frame, ip + 2)?);
            // Fragments have no transport header to speak of.
            let whole = be16(frame, ip + 6)? & 0x3fff == 0;
            let sane = first >> 4 == 4 && header >= 20 && total >= header && whole;
            let protocol = *frame.get(ip + 9)?;
            sane.then_some(Layout { ip, v6: false, protocol, transport: ip + header, end: ip + total })
        }
        ETHERTYPE_IPV6 => {
            let total = IPV6_LEN + usize::from(be16(frame, ip + 4)?);
            let protocol = *frame.get(ip + 6)?;
            let sane = frame.get(ip)? >> 4 == 6;
            sane.then_some(Layout { ip, v6: true, protocol, transport: ip + IPV6_LEN, end: ip + total })
        }
        _ => None,
    }
}

impl Layout {
    /// Sum of the pseudo header for a transport part of `len` bytes.
    fn pseudo_header(&self, frame: &[u8], len: usize) -> Option<u64> {
        let addresses = match self.v6 {
            true => frame.get(self.ip + 8..self.ip + 40)?,
            false => frame.get(self.ip + 12..self.ip + 20)?,
        };
        Some(sum(u64::from(self.protocol) + len as u64, addresses))
    }
}

/// True if the frame is TCP or UDP over IP and its checksum is right.
pub fn checksum_is_valid(frame: &[u8]) -> bool {
    let check = || {
        let l = layout(frame)?;
        let known = l.protocol == PROTOCOL_TCP || l.protocol == PROTOCOL_UDP;
        if !known || l.protocol == PROTOCOL_UDP && be16(frame, l.transport + 6)? == 0 {
            return None;
        }
        let part = frame.get(l.transport..l.end)?;
        let total = sum(l.pseudo_header(frame, part.len())?, part);
        (total == 0xffff).then_some(())
    };
    check().is_some()
}

/// Finishes one frame of the guest as its header asks and hands the result, one frame or
/// several, to `send`. `None`, having sent nothing, if header and frame disagree.
pub fn transmit(header: &Header, frame: &mut [u8], mut send: impl FnMut(&[u8])) -> Option<()> {
    match header.gso_type {
        GsoType::None => {
            if header.needs_checksum {
                complete_checksum(frame, header.csum_start.into(), header.csum_offset.into())?;
            }
            send(frame);
            Some(())
        }
        GsoType::Tcp { v6 } => segment_tcp(frame, v6, header.gso_size.into(), send),
    }
}

/// Cuts one long TCP frame into frames of `mss` bytes of data each.
fn segment_tcp(frame: &mut [u8], v6: bool, mss: usize, mut send: impl FnMut(&[u8])) -> Option<()> {
    let l = layout_of_long(frame, v6)?;
    let tcp_header = usize::from(frame.get(l.transport + 12)? >> 4) * 4;
    let data = l.transport + tcp_header;
    if mss == 0 || tcp_header < 20 || l.protocol != PROTOCOL_TCP || data > frame.len() {
        return None;
    }
    let (headers, payload) = frame.split_at(data);
    let sequence = be32(headers, l.transport + 4)?;
    let id = if v6 { 0 } else { be16(headers, l.ip + 4)? };
    let flags = *headers.get(l.transport + 13)?;
    let count = payload.len().div_ceil(mss).max(1);
    let mut out = Vec::with_capacity(data + mss.min(payload.len()));
    for i in 0..count {
        let part = &payload[i * mss..payload.len().min((i + 1) * mss)];
        out.clear();
        out.extend_from_slice(headers);
        out.extend_from_slice(part);
        let last = if i + 1 == count { 0 } else { TCP_LAST_ONLY };
        let first = if i == 0 { 0 } else { TCP_FIRST_ONLY };
        *out.get_mut(l.transport + 13)? = flags & !last & !first;
        let at = sequence.wrapping_add((i * mss) as u32);
        put(&mut out, l.transport + 4, &at.to_be_bytes())?;
        finish_segment(&mut out, &l, id.wrapping_add(i as u16))?;
        send(&out);
    }
    Some(())
}

/// The layout of a frame whose length fields may not hold its real length.
fn layout_of_long(frame: &[u8], v6: bool) -> Option<Layout> {
    let ip = ETHERNET_LEN;
    let (ethertype, protocol, transport) = match v6 {
        true => (ETHERTYPE_IPV6, *frame.get(ip + 6)?, ip + IPV6_LEN),
        false => (ETHERTYPE_IPV4, *frame.get(ip + 9)?, ip + usize::from(frame.get(ip)? & 15) * 4),
    };
    let sane = be16(frame, 12)? == ethertype && transport >= ip + 20;
    sane.then_some(Layout { ip, v6, protocol, transport, end: frame.len() })
}

/// Lengths, identification and checksums of one segment.
fn finish_segment(out: &mut [u8], l: &Layout, id: u16) -> Option<()> {
    let transport_len = out.len() - l.transport;
    if l.v6 {
        let len = u16::try_from(out.len() - l.ip - IPV6_LEN).ok()?;
        put(out, l.ip + 4, &len.to_be_bytes())?;
    } else {
        let len = u16::try_from(out.len() - l.ip).ok()?;
        put(out, l.ip + 2, &len.to_be_bytes())?;
        put(out, l.ip + 4, &id.to_be_bytes())?;
        put(out, l.ip + 10, &[0, 0])?;
        let value = !(sum(0, out.get(l.ip..l.transport)?) as u16);
        put(out, l.ip + 10, &value.to_be_bytes())?;
    }
    put(out, l.transport + TCP_CHECKSUM, &[0, 0])?;
    let total = sum(l.pseudo_header(out, transport_len)?, out.get(l.transport..)?);
    put(out, l.transport + TCP_CHECKSUM, &(!(total as u16)).to_be_bytes())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A TCP frame with an unfinished checksum and `len` bytes of data.
    fn tcp_frame(len: usize) -> Vec<u8> {
        let mut f = vec![0; 12];
        f.extend([0x08, 0x00]);
        let total = (40 + len).min(0xffff) as u16;
        f.extend([0x45, 0, (total >> 8) as u8, total as u8, 0x12, 0x34, 0, 0, 64, 6, 0, 0, 10, 0, 2, 15, 10, 0, 2, 2]);
        f.extend([0x10, 0, 0, 80, 0, 0, 1, 0, 0, 0, 0, 1, 0x50, 0x19, 0x20, 0, 0, 0, 0, 0]);
        f.extend((0..len).map(|i| i as u8));
        f
    }

    #[test]
    fn checksum_is_completed() {
        let mut f = tcp_frame(101);
        let l = layout(&f).unwrap();
        let pseudo = l.pseudo_header(&f, 121).unwrap() as u16;
        put(&mut f, 14 + 20 + 16, &pseudo.to_be_bytes()).unwrap();
        assert!(!checksum_is_valid(&f));
        complete_checksum(&mut f, 34, 16).unwrap();
        assert!(checksum_is_valid(&f));
        f[60] ^= 1;
        assert!(!checksum_is_valid(&f));
        assert!(complete_checksum(&mut f, 0xffff, 16).is_none());
        assert!(complete_checksum(&mut f, 34, 0xffff).is_none());
    }

    #[test]
    fn long_frames_are_cut() {
        let mut f = tcp_frame(2500);
        let header = Header { gso_type: GsoType::Tcp { v6: false }, gso_size: 1000, ..Header::default() };
        let mut sent = Vec::new();
        transmit(&header, &mut f, |s| sent.push(s.to_vec())).unwrap();
        assert_eq!(sent.iter().map(Vec::len).collect::<Vec<_>>(), [1054, 1054, 554]);
        for (i, s) in sent.iter().enumerate() {
            assert!(checksum_is_valid(s), "segment {i}");
            assert_eq!(sum(0, &s[14..34]), 0xffff, "IP header of segment {i}");
            assert_eq!(be32(s, 38).unwrap(), 0x100 + 1000 * i as u32);
            assert_eq!(s[47], if i == 2 { 0x19 } else { 0x10 });
            assert_eq!(s[54..], f[54 + 1000 * i..54 + (1000 * (i + 1)).min(2500)]);
        }
    }

    #[test]
    fn nonsense_is_refused() {
        for len in 0..60 {
            let mut f = tcp_frame(100);
            f.truncate(len);
            for gso_type in [GsoType::Tcp { v6: false }, GsoType::Tcp { v6: true }] {
                let header = Header { gso_type, gso_size: 9, ..Header::default() };
                let _ = transmit(&header, &mut f, |_| {});
            }
            checksum_is_valid(&f);
        }
        let mut f = tcp_frame(100);
        let header = Header { gso_type: GsoType::Tcp { v6: false }, gso_size: 0, ..Header::default() };
        assert!(transmit(&header, &mut f, |_| {}).is_none());
    }
}
