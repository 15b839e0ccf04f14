//! A CD-ROM drive's packets (MMC-3, SPC-2): what firmware, boot loaders and systems need to read a disc.

use mimus_core::backend::BlockOp;
use mimus_core::backend::block::SECTOR_SIZE;

use super::{Action, CD_SECTOR, Drive, Protocol, Registers, Sense, TaskFile, error};

/// Illegal request: the packet's command is not known.
const BAD_COMMAND: Sense = Sense { key: 5, code: 0x20, qualifier: 0 };
/// The same: a field of it cannot be.
const BAD_FIELD: Sense = Sense { key: 5, code: 0x24, qualifier: 0 };
/// The same: the sectors are not there.
const OUT_OF_RANGE: Sense = Sense { key: 5, code: 0x21, qualifier: 0 };
/// Where a track ends: the lead-out.
const LEAD_OUT: u8 = 0xaa;

fn be32(bytes: &[u8], at: usize) -> u32 {
    bytes.get(at..at + 4).map_or(0, |b| u32::from_be_bytes([b[0], b[1], b[2], b[3]]))
}

fn be16(bytes: &[u8], at: usize) -> u16 {
    bytes.get(at..at + 2).map_or(0, |b| u16::from_be_bytes([b[0], b[1]]))
}

impl Drive {
    fn cd_sectors(&self) -> u32 {
        u32::try_from(self.backend.capacity() / CD_SECTOR).unwrap_or(u32::MAX)
    }

    /// Interrupt reason: command done, to the host.
    pub(super) fn packet_done(task: &TaskFile) -> Registers {
        Registers { lba: task.lba, count: 3, device: task.device }
    }

    /// The error register: the sense key, and that it was aborted.
    pub(super) fn sense_error(&mut self, sense: Sense) -> u8 {
        self.state.sense = sense;
        sense.key << 4 | error::ABRT
    }

    pub(super) fn packet(&mut self, task: &TaskFile, packet: &[u8]) -> Action {
        let protocol = if task.features & 1 != 0 { Protocol::Dma } else { Protocol::Pio };
        let opcode = packet.first().copied().unwrap_or(0);
        let sense = self.state.sense;
        if opcode != 0x03 {
            self.state.sense = Sense::default();
        }
        let done = Action::Done(Self::packet_done(task));
        let (data, allowed) = match opcode {
            // TEST UNIT READY, START STOP UNIT, PREVENT ALLOW MEDIUM REMOVAL, SYNCHRONIZE CACHE, SEEK, SET CD SPEED.
            0x00 | 0x1b | 0x1e | 0x35 | 0x2b | 0xbb => return done,
            0x03 => (self.request_sense(sense), packet.get(4).copied().unwrap_or(0).into()),
            0x12 => (inquiry(), be16(packet, 3).into()),
            0x1a => (mode_page(packet, false), packet.get(4).copied().unwrap_or(0).into()),
            0x5a => (mode_page(packet, true), be16(packet, 7).into()),
            0x25 => (self.capacity(), 8),
            0x28 => return self.read(protocol, be32(packet, 2), be16(packet, 7).into(), task),
            0xa8 => return self.read(protocol, be32(packet, 2), be32(packet, 6), task),
            0x43 => (self.toc(packet), be16(packet, 7).into()),
            0x46 => (configuration(), be16(packet, 7).into()),
            0x4a => (event(packet), be16(packet, 7).into()),
            0x51 => (disc_information(), be16(packet, 7).into()),
            _ => return Action::Failed(self.sense_error(BAD_COMMAND)),
        };
        let Some(mut data) = data else { return Action::Failed(self.sense_error(BAD_FIELD)) };
        data.truncate(allowed);
        if data.is_empty() { done } else { Action::Data(protocol, data) }
    }

    fn request_sense(&mut self, sense: Sense) -> Option<Vec<u8>> {
        self.state.sense = Sense::default();
        let mut data = vec![0; 18];
        (data[0], data[2], data[7]) = (0x70, sense.key, 10);
        (data[12], data[13]) = (sense.code, sense.qualifier);
        Some(data)
    }

    fn capacity(&self) -> Option<Vec<u8>> {
        let last = self.cd_sectors().saturating_sub(1);
        Some([last.to_be_bytes(), (CD_SECTOR as u32).to_be_bytes()].concat())
    }

    fn read(&mut self, protocol: Protocol, first: u32, count: u32, task: &TaskFile) -> Action {
        if first.checked_add(count).is_none_or(|end| end > self.cd_sectors()) {
            return Action::Failed(self.sense_error(OUT_OF_RANGE));
        }
        // 32 MiB, as ATA's largest transfer.
        if u64::from(count) * CD_SECTOR > 0x1_0000 * SECTOR_SIZE {
            return Action::Failed(self.sense_error(BAD_FIELD));
        }
        if count == 0 {
            return Action::Done(Self::packet_done(task));
        }
        let sector = u64::from(first) * (CD_SECTOR / SECTOR_SIZE);
        let bytes = u64::from(count) * CD_SECTOR;
        Action::Transfer { op: BlockOp::Read, protocol, sector, bytes, through: false }
    }

    /// READ TOC: one data track from sector 0 on, and the lead-out (MMC-3 section 5.23).
    fn toc(&self, packet: &[u8]) -> Option<Vec<u8>> {
        let (time, format) = (packet.get(1)? & 2 != 0, (packet.get(2)? & 15) | packet.get(9)? >> 6);
        let from = *packet.get(6)?;
        let address = |sector: u32| match time {
            false => sector.to_be_bytes(),
            true => {
                let frames = sector.saturating_add(150);
                [0, (frames / 75 / 60) as u8, (frames / 75 % 60) as u8, (frames % 75) as u8]
            }
        };
        let mut data = vec![0, 0, 1, 1];
        match format {
            0 => {
                let end = self.cd_sectors();
                let tracks = [(1, 0), (LEAD_OUT, end)];
                if from > 1 && from != LEAD_OUT {
                    return None;
                }
                for (track, sector) in tracks.into_iter().filter(|t| t.0 >= from) {
                    data.extend([0, 0x14, track, 0]);
                    data.extend(address(sector));
                }
            }
            1 => {
                data.extend([0, 0x14, 1, 0]);
                data.extend(address(0));
            }
            _ => return None,
        }
        let len = (data.len() - 2) as u16;
        data[..2].copy_from_slice(&len.to_be_bytes());
        Some(data)
    }
}

fn inquiry() -> Option<Vec<u8>> {
    let mut data = vec![5, 0x80, 0, 0x21, 31, 0, 0, 0];
    data.extend(b"MIMUS   DVD-ROM         1.0 ");
    Some(data)
}

/// MODE SENSE: capabilities (MMC-3 section 6.3.11) and error recovery.
fn mode_page(packet: &[u8], long: bool) -> Option<Vec<u8>> {
    let page = packet.get(2)? & 0x3f;
    let mut pages = Vec::new();
    if matches!(page, 0x01 | 0x3f) {
        pages.extend([0x01, 6, 0, 5, 0, 0, 0, 0]);
    }
    if matches!(page, 0x2a | 0x3f) {
        let mut capabilities = [0; 22];
        // Reads CD-R, CD-RW, DVD; modes 2; loads by a tray, is locked; speeds.
        (capabilities[0], capabilities[1]) = (0x2a, 20);
        (capabilities[2], capabilities[4], capabilities[6]) = (0x3b, 0x70, 0x29);
        capabilities[8..10].copy_from_slice(&706u16.to_be_bytes());
        capabilities[14..16].copy_from_slice(&706u16.to_be_bytes());
        pages.extend(capabilities);
    }
    if pages.is_empty() {
        return None;
    }
    let mut data = if long { vec![0; 8] } else { vec![0; 4] };
    data.extend(pages);
    if long {
        let len = (data.len() - 2) as u16;
        data[..2].copy_from_slice(&len.to_be_bytes());
    } else {
        data[0] = (data.len() - 1) as u8;
    }
    Some(data)
}

/// GET CONFIGURATION: a CD-ROM is in it, and that is what it can do.
fn configuration() -> Option<Vec<u8>> {
    // Profile list with CD-ROM, current.
    let feature = [0, 0, 3, 4, 0, 8, 1, 0];
    let mut data = vec![0, 0, 0, 12, 0, 0, 0, 8];
    data.extend(feature);
    Some(data)
}

/// GET EVENT STATUS NOTIFICATION: a medium is there, and nothing happened.
fn event(packet: &[u8]) -> Option<Vec<u8>> {
    if packet.get(1)? & 1 == 0 {
        return None;
    }
    let media = packet.get(4)? & 1 << 4 != 0;
    Some(if media { vec![0, 6, 4, 1 << 4, 0, 2, 0, 0] } else { vec![0, 2, 0x80, 1 << 4] })
}

fn disc_information() -> Option<Vec<u8>> {
    let mut data = vec![0; 34];
    // Complete, one session with one track.
    (data[1], data[2], data[3], data[4], data[5], data[6]) = (32, 0x0e, 1, 1, 1, 1);
    Some(data)
}
