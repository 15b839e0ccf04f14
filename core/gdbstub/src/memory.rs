//! Memory in packets: by virtual address as a vCPU sees it, or physical; the memory map.

use crate::target::Target;
use std::fmt::Write;

/// Which addresses a client's are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Space {
    /// Virtual ones of a vCPU. Devices are not touched.
    Virtual(u32),
    /// Physical.
    Physical,
}

/// The pieces of `len` bytes at `addr` that are physically contiguous, up to the first that is not there: offset,
/// physical address, length.
fn pieces(target: &dyn Target, space: Space, addr: u64, len: usize) -> Vec<(usize, u64, usize)> {
    let Space::Virtual(vcpu) = space else { return vec![(0, addr, len)] };
    let mut found = Vec::new();
    let mut at = 0;
    while at < len {
        let Some((pa, left)) = target.translate(vcpu, addr.wrapping_add(at as u64)) else { break };
        let n = (len - at).min(usize::try_from(left).unwrap_or(usize::MAX)).max(1);
        found.push((at, pa, n));
        at += n;
    }
    found
}

/// Reads up to `len` bytes: as many as are there.
pub fn read(target: &dyn Target, space: Space, addr: u64, len: usize) -> Vec<u8> {
    let mut out = vec![0; len];
    let mut have = 0;
    for (at, pa, n) in pieces(target, space, addr, len) {
        if !target.read(pa, &mut out[at..at + n], space == Space::Physical) {
            break;
        }
        have = at + n;
    }
    out.truncate(have);
    out
}

/// Writes bytes; false if some of them cannot be, and then none may be.
pub fn write(target: &dyn Target, space: Space, addr: u64, bytes: &[u8]) -> bool {
    let pieces = pieces(target, space, addr, bytes.len());
    if pieces.iter().map(|p| p.2).sum::<usize>() != bytes.len() {
        return false;
    }
    pieces.iter().all(|&(at, pa, n)| target.write(pa, &bytes[at..at + n], space == Space::Physical))
}

/// The memory map (E.17). The client applies it to virtual addresses too, and refuses what is in no region: so it has
/// the ROMs, and everything between them as RAM.
pub fn map_xml(rom: &[(u64, u64)]) -> String {
    let mut x = String::from(
        "<?xml version=\"1.0\"?>\n<!DOCTYPE memory-map PUBLIC \"+//IDN gnu.org//DTD GDB Memory Map V1.0//EN\" \
         \"http://sourceware.org/gdb/gdb-memory-map.dtd\">\n<memory-map>\n",
    );
    let mut region = |kind: &str, from: u64, len: u64| {
        let _ = writeln!(x, "<memory type=\"{kind}\" start=\"{from:#x}\" length=\"{len:#x}\"/>");
    };
    let mut rom: Vec<_> = rom.iter().copied().filter(|r| r.1 != 0).collect();
    rom.sort_unstable();
    let mut at = 0u64;
    for (from, len) in rom {
        if from > at {
            region("ram", at, from - at);
        }
        region("rom", from, len);
        at = from.saturating_add(len);
    }
    // Up to the end of all addresses: 2^64 - at.
    region("ram", at, at.wrapping_neg().max(if at == 0 { u64::MAX } else { 0 }));
    x.push_str("</memory-map>\n");
    x
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_map_has_every_address_once() {
        let x = map_xml(&[(0x2000_0000, 0x200_0000), (0x1000, 0xf000)]);
        let lines: Vec<&str> = x.lines().filter(|l| l.starts_with("<memory type")).collect();
        assert_eq!(
            lines,
            [
                "<memory type=\"ram\" start=\"0x0\" length=\"0x1000\"/>",
                "<memory type=\"rom\" start=\"0x1000\" length=\"0xf000\"/>",
                "<memory type=\"ram\" start=\"0x10000\" length=\"0x1fff0000\"/>",
                "<memory type=\"rom\" start=\"0x20000000\" length=\"0x2000000\"/>",
                "<memory type=\"ram\" start=\"0x22000000\" length=\"0xffffffffde000000\"/>",
            ]
        );
        assert!(map_xml(&[]).contains("start=\"0x0\" length=\"0xffffffffffffffff\""));
    }
}
