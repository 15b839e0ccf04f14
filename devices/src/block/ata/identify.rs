//! What drives say of themselves: IDENTIFY DEVICE and IDENTIFY PACKET DEVICE (ATA8-ACS sections 7.16, 7.17).

use super::{Drive, MAX_MULTIPLE, SERIAL_LEN};

/// The geometry that drives pretend to (ATA-5 annex C).
pub const HEADS: u64 = 16;
/// Sectors of a track.
pub const SECTORS_PER_TRACK: u64 = 63;

const WORDS: usize = 256;
/// Commands a queue holds.
const QUEUE_DEPTH: u16 = 32;

fn text(words: &mut [u16; WORDS], at: usize, len: usize, text: &str) {
    let bytes: Vec<u8> =
        text.bytes().filter(|b| (0x20..0x7f).contains(b)).chain(std::iter::repeat(b' ')).take(len).collect();
    // The first character of two is in the upper byte.
    for (word, pair) in words[at..].iter_mut().zip(bytes.chunks(2)) {
        *word = u16::from_be_bytes([pair[0], pair[1]]);
    }
}

/// What both kinds say.
fn common(drive: &Drive, model: &str) -> [u16; WORDS] {
    let mut w = [0; WORDS];
    let serial = if drive.serial.is_empty() { "MM0001" } else { &drive.serial };
    text(&mut w, 10, SERIAL_LEN, serial);
    text(&mut w, 23, 8, "1.0");
    text(&mut w, 27, 40, model);
    // LBA, DMA, IORDY; words 64 to 70 and 88 are valid.
    w[49] = 1 << 9 | 1 << 8 | 1 << 11 | 1 << 10;
    w[53] = 7;
    // Multiword DMA 0 to 2, PIO 3 and 4, with 120 ns each.
    w[63] = 7;
    w[64] = 3;
    w[65..69].fill(120);
    // SATA 1.5 Gbit/s; ATA-4 to ATA-8.
    w[76] = 1 << 1;
    w[80] = 0x1f0;
    w[83] = 1 << 14;
    w[84] = 1 << 14;
    w[87] = 1 << 14;
    // Ultra DMA 0 to 5; the chosen mode.
    let mode = drive.state.transfer_mode;
    w[88] = 0x3f;
    match mode >> 3 {
        4 => w[63] |= 0x100 << (mode & 7),
        8 => w[88] |= 0x100 << (mode & 7),
        _ => w[88] |= 0x100 << 5,
    }
    w
}

/// With the integrity word (ATA8-ACS section 7.16.7.88).
fn bytes(mut words: [u16; WORDS]) -> Vec<u8> {
    words[255] = 0xa5;
    let mut out: Vec<u8> = words.iter().flat_map(|w| w.to_le_bytes()).collect();
    let sum = out.iter().fold(0u8, |s, b| s.wrapping_add(*b));
    out[511] = sum.wrapping_neg();
    out
}

/// A disk's.
pub fn disk(drive: &Drive) -> Vec<u8> {
    let mut w = common(drive, "MIMUS HARDDISK");
    let sectors = drive.sectors();
    let cylinders = (sectors / (HEADS * SECTORS_PER_TRACK)).min(16383);
    let chs = cylinders * HEADS * SECTORS_PER_TRACK;
    let low = sectors.min(0xfff_ffff);
    w[0] = 1 << 6;
    (w[1], w[3], w[6]) = (cylinders as u16, HEADS as u16, SECTORS_PER_TRACK as u16);
    w[47] = 0x8000 | u16::from(MAX_MULTIPLE);
    (w[54], w[55], w[56]) = (w[1], w[3], w[6]);
    (w[57], w[58]) = (chs as u16, (chs >> 16) as u16);
    if drive.state.multiple > 0 {
        w[59] = 0x100 | u16::from(drive.state.multiple);
    }
    (w[60], w[61]) = (low as u16, (low >> 16) as u16);
    w[75] = QUEUE_DEPTH - 1;
    w[76] |= 1 << 8;
    // Write cache, look-ahead; flush, flush ext, 48-bit; FUA. The same, on.
    w[82] = 1 << 5 | 1 << 6;
    w[83] |= 1 << 12 | 1 << 13 | 1 << 10;
    // The log with the failed queued command; writes that go to the medium.
    w[84] |= 1 << 5 | 1 << 6;
    w[85] = u16::from(drive.state.write_cache) << 5 | 1 << 6;
    w[86] = 1 << 12 | 1 << 13 | 1 << 10;
    w[87] |= w[84];
    for (i, word) in w[100..104].iter_mut().enumerate() {
        *word = (sectors >> (16 * i)) as u16;
    }
    // One logical sector for each physical one of 512 bytes; a medium that does not turn.
    w[106] = 1 << 14;
    w[217] = 1;
    bytes(w)
}

/// A CD-ROM drive's.
pub fn cdrom(drive: &Drive) -> Vec<u8> {
    let mut w = common(drive, "MIMUS DVD-ROM");
    // ATAPI, CD-ROM, removable, 12-byte packets, DRQ within 50 µs.
    w[0] = 2 << 14 | 5 << 8 | 1 << 7 | 2 << 5;
    // PACKET, DEVICE RESET; on.
    w[82] = 1 << 4 | 1 << 9;
    w[85] = w[82];
    bytes(w)
}
