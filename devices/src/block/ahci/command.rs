//! Fetching a command from guest memory: header, command FIS, where its data are (AHCI section 4.2).

use mimus_core::backend::BlockRequest;
use mimus_core::bus::{BusFault, GuestPhys};
use mimus_core::memory::{DmaHandle, RamSlice};

use super::fis::COMMAND_LEN;

/// Bytes of a header.
const HEADER_LEN: u64 = 32;
/// Where the packet is in a command table, and where the list of its memory begins.
const PACKET: u64 = 0x40;
const REGIONS: u64 = 0x80;
const REGION_LEN: u64 = 16;

/// A command as its header and table have it.
pub struct Fetched {
    pub fis: [u8; COMMAND_LEN],
    pub packet: [u8; 16],
    header: u64,
    table: u64,
    regions: u16,
}

/// Something for the host to do.
pub struct Started {
    pub request: BlockRequest,
    /// It counts once it is on stable storage.
    pub through: bool,
    pub slot: u8,
    /// Commands of before a reset have another.
    pub age: u32,
}

/// Why data cannot be moved.
#[derive(Debug, PartialEq, Eq)]
pub enum NoData {
    /// The memory is not there.
    Bus,
    /// The list ends before the data do.
    TooShort,
}

/// Fetches the command of a slot of the list at `list`.
pub fn fetch(dma: &DmaHandle, list: u64, slot: u8) -> Result<Fetched, BusFault> {
    let header = list.wrapping_add(HEADER_LEN * u64::from(slot));
    let mut bytes = [0; 16];
    dma.read(GuestPhys(header), &mut bytes)?;
    let word = |at: usize| u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]);
    let table = u64::from(word(8) & !0x7f) | u64::from(word(12)) << 32;
    let flags = word(0);
    let mut out = Fetched { fis: [0; COMMAND_LEN], packet: [0; 16], header, table, regions: (flags >> 16) as u16 };
    dma.read(GuestPhys(table), &mut out.fis)?;
    dma.read(GuestPhys(table.wrapping_add(PACKET)), &mut out.packet)?;
    Ok(out)
}

impl Fetched {
    /// Memory for the first `bytes` of data; for the device to write if `to_memory`.
    pub fn memory(&self, dma: &DmaHandle, bytes: u64, to_memory: bool) -> Result<Vec<RamSlice>, NoData> {
        let (mut out, mut left) = (Vec::new(), bytes);
        for n in 0..u64::from(self.regions) {
            if left == 0 {
                break;
            }
            let mut region = [0; REGION_LEN as usize];
            let at = self.table.wrapping_add(REGIONS + n * REGION_LEN);
            dma.read(GuestPhys(at), &mut region).map_err(|_| NoData::Bus)?;
            let value = u128::from_le_bytes(region);
            // Bits 21:0 of the last word are the length less one.
            let (address, len) = (value as u64 & !1, (value >> 96) as u64 & 0x3f_ffff | 1);
            let len = (len + 1).min(left);
            out.extend(dma.ram_slices(GuestPhys(address), len, to_memory).map_err(|_| NoData::Bus)?);
            left -= len;
        }
        if left == 0 { Ok(out) } else { Err(NoData::TooShort) }
    }

    /// Says in the header how many bytes were moved.
    pub fn moved(&self, dma: &DmaHandle, bytes: u64) {
        let _ = dma.write_u32(GuestPhys(self.header.wrapping_add(4)), bytes.min(u32::MAX.into()) as u32);
    }
}
