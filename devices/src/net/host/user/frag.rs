//! Reassembly of the guest's IP fragments (RFC 791, RFC 8200 section 4.5),
//! within fixed bounds. Overlapping fragments drop the datagram (RFC 5722).

use smoltcp::time::{Duration, Instant};

use super::env::IpInfo;

const DATAGRAMS: usize = 16;
const PIECES: usize = 128;
const MAX_PAYLOAD: usize = 65535;
const LIFETIME: Duration = Duration::from_secs(15);

struct Partial {
    ip: IpInfo,
    id: u32,
    born: Instant,
    total: Option<usize>,
    /// (offset, bytes), sorted.
    pieces: Vec<(usize, Vec<u8>)>,
}

#[derive(Default)]
pub(super) struct Reassembly {
    partials: Vec<Partial>,
}

impl Reassembly {
    /// Drops what did not complete in time.
    pub fn expire(&mut self, now: Instant) {
        self.partials.retain(|p| p.born + LIFETIME > now);
    }

    /// Adds a fragment; returns the payload it completes.
    pub fn add(
        &mut self,
        now: Instant,
        ip: IpInfo,
        id: u32,
        offset: usize,
        more: bool,
        data: &[u8],
    ) -> Option<Vec<u8>> {
        let end = offset + data.len();
        if end > MAX_PAYLOAD || data.is_empty() || (more && !data.len().is_multiple_of(8)) {
            return None;
        }
        let same = |p: &Partial| p.id == id && (p.ip.src, p.ip.dst, p.ip.proto) == (ip.src, ip.dst, ip.proto);
        let at = self.partials.iter().position(same).unwrap_or_else(|| {
            if self.partials.len() >= DATAGRAMS {
                self.partials.remove(0);
            }
            self.partials.push(Partial { ip, id, born: now, total: None, pieces: Vec::new() });
            self.partials.len() - 1
        });
        let partial = &mut self.partials[at];
        let fits = partial.insert(offset, end, more, data);
        if !fits {
            self.partials.remove(at);
            return None;
        }
        let whole = partial.whole()?;
        self.partials.remove(at);
        Some(whole)
    }
}

impl Partial {
    /// False when the fragment contradicts the others.
    fn insert(&mut self, offset: usize, end: usize, more: bool, data: &[u8]) -> bool {
        if !more && self.total.replace(end).is_some_and(|t| t != end) {
            return false;
        }
        if self.total.is_some_and(|t| end > t) || self.pieces.len() >= PIECES {
            return false;
        }
        let at = self.pieces.partition_point(|(o, _)| *o < offset);
        if self.pieces.get(at).is_some_and(|(o, d)| *o == offset && d == data) {
            return true;
        }
        let overlaps_next = self.pieces.get(at).is_some_and(|(o, _)| *o < end);
        let overlaps_prev = at > 0 && self.pieces[at - 1].0 + self.pieces[at - 1].1.len() > offset;
        if overlaps_next || overlaps_prev {
            return false;
        }
        self.pieces.insert(at, (offset, data.to_vec()));
        true
    }

    fn whole(&self) -> Option<Vec<u8>> {
        let have: usize = self.pieces.iter().map(|(_, d)| d.len()).sum();
        // The pieces do not overlap and none lies beyond the end.
        (self.total? == have).then(|| self.pieces.iter().flat_map(|(_, d)| d).copied().collect())
    }
}
