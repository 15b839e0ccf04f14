//! Disks and CD-ROM drives as their controllers see them: ATA's command set, and ATAPI's.
//!
//! Spec: ATA8-ACS (T13/1699-D revision 6a), for packets SFF-8020i and MMC-3. A controller hands over the registers of a
//! command ([`TaskFile`]) and is told what is to happen ([`Action`]); it moves the data and answers in its own way.
//! Not modelled: security, SMART, streaming, DATA SET MANAGEMENT, removal of media.
//! Checked with: its tests; SeaBIOS, GRUB, Linux libata.

mod identify;
mod packet;

use std::sync::Arc;

use mimus_core::backend::block::SECTOR_SIZE;
use mimus_core::backend::{BlockBackend, BlockError, BlockOp};
use serde::{Deserialize, Serialize};

/// Status register.
pub mod status {
    /// The command failed.
    pub const ERR: u8 = 1 << 0;
    /// Data are to be moved.
    pub const DRQ: u8 = 1 << 3;
    /// Seek complete: always.
    pub const DSC: u8 = 1 << 4;
    /// Ready.
    pub const DRDY: u8 = 1 << 6;
    /// Busy.
    pub const BSY: u8 = 1 << 7;
    /// What a drive says when all is well.
    pub const READY: u8 = DRDY | DSC;
}

/// Error register.
pub mod error {
    /// The command is not known, or its parameters are wrong.
    pub const ABRT: u8 = 1 << 2;
    /// The sectors are not on the disk.
    pub const IDNF: u8 = 1 << 4;
    /// The medium cannot be read or written.
    pub const UNC: u8 = 1 << 6;
}

/// Commands that controllers look at themselves.
pub mod command {
    /// PACKET.
    pub const PACKET: u8 = 0xa0;
    /// READ FPDMA QUEUED.
    pub const READ_QUEUED: u8 = 0x60;
    /// WRITE FPDMA QUEUED.
    pub const WRITE_QUEUED: u8 = 0x61;
}

/// Most bytes of a serial number.
pub const SERIAL_LEN: usize = 20;
/// Bytes of a CD-ROM's sector.
const CD_SECTOR: u64 = 2048;
/// Most sectors of READ MULTIPLE's block.
const MAX_MULTIPLE: u8 = 16;

/// The registers of a command, with both bytes of those that have two.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct TaskFile {
    /// The command.
    pub command: u8,
    /// Features.
    pub features: u16,
    /// LBA low, mid and high.
    pub lba: u64,
    /// Count.
    pub count: u16,
    /// Device: bit 6 says LBA.
    pub device: u8,
}

/// What the registers say when a command is done.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Registers {
    /// LBA low, mid and high.
    pub lba: u64,
    /// Count.
    pub count: u16,
    /// Device.
    pub device: u8,
}

/// How data are moved.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Protocol {
    /// By the processor; over SATA, with PIO Setup.
    Pio,
    /// By the controller.
    Dma,
    /// By the controller, beside others.
    Queued,
}

/// What a command is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Action {
    /// It is done.
    Done(Registers),
    /// It failed: the error register.
    Failed(u8),
    /// These bytes for the host.
    Data(Protocol, Vec<u8>),
    /// Sectors of the disk.
    Transfer {
        /// Read or write.
        op: BlockOp,
        /// How.
        protocol: Protocol,
        /// First sector of 512 bytes.
        sector: u64,
        /// How many bytes.
        bytes: u64,
        /// The write counts once it is on stable storage.
        through: bool,
    },
    /// What was written is to be on stable storage.
    Flush,
}

/// What kind of drive.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Medium {
    /// A hard disk.
    Disk,
    /// A CD-ROM drive with a disc in it.
    Cdrom,
}

/// SCSI's key, code and qualifier of an error.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Sense {
    key: u8,
    code: u8,
    qualifier: u8,
}

/// What commands change of a drive, as saved.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DriveState {
    medium: Medium,
    /// Sectors of READ MULTIPLE's block; 0: not set.
    multiple: u8,
    write_cache: bool,
    /// The last of SET FEATURES' transfer modes.
    transfer_mode: u8,
    sense: Sense,
    /// What READ LOG EXT tells of the queued command that failed: tag and error.
    queue_error: Option<(u8, u8)>,
}

/// One drive. Its controller's lock is around it.
pub struct Drive {
    backend: Arc<dyn BlockBackend>,
    serial: String,
    state: DriveState,
}

impl Drive {
    /// A drive with this medium.
    pub fn new(backend: Arc<dyn BlockBackend>, medium: Medium, serial: &str) -> Self {
        Self { backend, serial: serial.to_owned(), state: DriveState::reset(medium) }
    }

    /// The host side.
    pub fn backend(&self) -> &Arc<dyn BlockBackend> {
        &self.backend
    }

    /// What it is.
    pub fn medium(&self) -> Medium {
        self.state.medium
    }

    /// Back to power-on.
    pub fn reset(&mut self) {
        self.state = DriveState::reset(self.state.medium);
    }

    /// For a snapshot.
    pub fn save(&self) -> DriveState {
        self.state.clone()
    }

    /// Why a saved state does not fit.
    pub fn check(&self, state: &DriveState) -> Result<(), &'static str> {
        if state.medium != self.state.medium {
            return Err("the drive was another kind: same -drive options as when saved?");
        }
        if state.multiple > MAX_MULTIPLE {
            return Err("a block of READ MULTIPLE that cannot be");
        }
        Ok(())
    }

    /// Takes over a saved state that was checked.
    pub fn restore(&mut self, state: DriveState) {
        self.state = state;
    }

    /// What the registers say after a reset (ATA8-ACS table 184).
    pub fn signature(&self) -> Registers {
        let lba = match self.state.medium {
            Medium::Disk => 0x00_0001,
            Medium::Cdrom => 0xeb_1401,
        };
        Registers { lba, count: 1, device: 0 }
    }

    fn sectors(&self) -> u64 {
        self.backend.capacity() / SECTOR_SIZE
    }

    /// Decides on a command. `packet` is what comes with PACKET.
    pub fn execute(&mut self, task: &TaskFile, packet: &[u8]) -> Action {
        let echo = Registers { lba: task.lba, count: task.count, device: task.device };
        match (self.state.medium, task.command) {
            (Medium::Cdrom, command::PACKET) => self.packet(task, packet),
            (Medium::Cdrom, 0xa1) => Action::Data(Protocol::Pio, identify::cdrom(self)),
            // DEVICE RESET; and commands of disks, which tell by the signature that it is none.
            (Medium::Cdrom, 0x08) => Action::Done(self.signature()),
            (Medium::Disk, 0xec) => Action::Data(Protocol::Pio, identify::disk(self)),
            (Medium::Disk, _) if transfer_kind(task.command).is_some() => self.transfer(task),
            (Medium::Disk, 0x40..=0x42) => self.verify(task, echo),
            (Medium::Disk, 0x27 | 0xf8) => {
                let last = self.sectors().saturating_sub(1);
                let short = last.min(0xfff_ffff);
                Action::Done(match task.command {
                    0x27 => Registers { lba: last, ..echo },
                    _ => Registers { lba: short & 0xff_ffff, device: echo.device & 0xf0 | (short >> 24) as u8, ..echo },
                })
            }
            (Medium::Disk, 0x2f) => self.read_log(task),
            (Medium::Disk, 0xc6) => self.set_multiple(task.count as u8, echo),
            // INITIALIZE DEVICE PARAMETERS, RECALIBRATE: of drives with cylinders.
            (Medium::Disk, 0x91 | 0x10..=0x1f) => Action::Done(echo),
            (_, 0xe7 | 0xea) => Action::Flush,
            (_, 0xef) => self.set_features(task, echo),
            (_, 0xe0..=0xe3 | 0xe6) => Action::Done(echo),
            // CHECK POWER MODE: active.
            (_, 0xe5) => Action::Done(Registers { count: 0xff, ..echo }),
            (_, 0x90) => Action::Done(self.signature()),
            _ => Action::Failed(error::ABRT),
        }
    }

    fn transfer(&mut self, task: &TaskFile) -> Action {
        let Some((op, protocol, wide)) = transfer_kind(task.command) else { return Action::Failed(error::ABRT) };
        if matches!(task.command, 0xc4 | 0xc5 | 0x29 | 0x39 | 0xce) && self.state.multiple == 0 {
            return Action::Failed(error::ABRT);
        }
        let (sector, count) = if protocol == Protocol::Queued {
            (Some(task.lba), or_all(task.features, 0x1_0000))
        } else {
            (sector(task, wide), sectors(task, wide))
        };
        let (Some(sector), bytes) = (sector, count * SECTOR_SIZE) else { return Action::Failed(error::IDNF) };
        if op == BlockOp::Write && self.backend.read_only() {
            return Action::Failed(error::ABRT);
        }
        if sector.checked_add(count).is_none_or(|end| end > self.sectors()) {
            return Action::Failed(error::IDNF);
        }
        // FUA: bit 7 of a queued write's device register, or commands of their own.
        let fua = match protocol {
            Protocol::Queued => task.device & 0x80 != 0,
            _ => matches!(task.command, 0x3d | 0xce),
        };
        let through = op == BlockOp::Write && (fua || !self.state.write_cache);
        Action::Transfer { op, protocol, sector, bytes, through }
    }

    fn verify(&self, task: &TaskFile, echo: Registers) -> Action {
        let wide = task.command == 0x42;
        let end = sector(task, wide).and_then(|s| s.checked_add(sectors(task, wide)));
        match end {
            Some(end) if end <= self.sectors() => Action::Done(echo),
            _ => Action::Failed(error::IDNF),
        }
    }

    fn set_multiple(&mut self, count: u8, echo: Registers) -> Action {
        if count > MAX_MULTIPLE || !(count == 0 || count.is_power_of_two()) {
            return Action::Failed(error::ABRT);
        }
        self.state.multiple = count;
        Action::Done(echo)
    }

    /// SET FEATURES (ATA8-ACS section 7.48).
    fn set_features(&mut self, task: &TaskFile, echo: Registers) -> Action {
        match task.features as u8 {
            0x02 => self.state.write_cache = true,
            0x82 => self.state.write_cache = false,
            0x03 => self.state.transfer_mode = task.count as u8,
            // Read look-ahead, and what settings survive a reset.
            0x55 | 0xaa | 0x66 | 0xcc => {}
            _ => return Action::Failed(error::ABRT),
        }
        Action::Done(echo)
    }

    /// READ LOG EXT: the directory, and the queued command that failed (ATA8-ACS section A.12).
    fn read_log(&mut self, task: &TaskFile) -> Action {
        let (log, pages) = (task.lba as u8, or_all(task.count, 0x1_0000));
        if pages != 1 || task.lba >> 8 & 0xff != 0 {
            return Action::Failed(error::ABRT);
        }
        let mut page = vec![0; SECTOR_SIZE as usize];
        match log {
            0 => {
                page[0] = 1;
                page[2 * 0x10] = 1;
            }
            0x10 => {
                match self.state.queue_error.take() {
                    Some((tag, error)) => {
                        (page[0], page[2], page[3]) = (tag, status::READY | status::ERR, error);
                    }
                    // The last that failed was not queued.
                    None => page[0] = 0x80,
                }
                let sum = page.iter().fold(0u8, |s, b| s.wrapping_add(*b));
                page[511] = sum.wrapping_neg();
            }
            _ => return Action::Failed(error::ABRT),
        }
        Action::Data(Protocol::Pio, page)
    }

    /// The error register for what the host side said of a transfer, which a queued command's `tag` is kept for.
    pub fn failed(&mut self, why: &BlockError, tag: Option<u8>) -> u8 {
        log::warn!("ata: {}: {why}", self.backend.describe());
        let error = match why {
            BlockError::OutOfRange { .. } => error::IDNF,
            BlockError::ReadOnly | BlockError::Unsupported => error::ABRT,
            _ => error::UNC,
        };
        self.note_queue_error(tag, error);
        match self.state.medium {
            Medium::Disk => error,
            Medium::Cdrom => self.sense_error(Sense { key: 3, code: 0x11, qualifier: 0 }),
        }
    }

    /// A queued command failed before it began.
    pub fn note_queue_error(&mut self, tag: Option<u8>, error: u8) {
        if let Some(tag) = tag {
            self.state.queue_error = Some((tag, error));
        }
    }
}

impl DriveState {
    fn reset(medium: Medium) -> Self {
        Self { medium, multiple: 0, write_cache: true, transfer_mode: 0, sense: Sense::default(), queue_error: None }
    }
}

/// What a command moves, how, and whether its LBA has 48 bits.
fn transfer_kind(command: u8) -> Option<(BlockOp, Protocol, bool)> {
    use BlockOp::{Read, Write};
    use Protocol::{Dma, Pio, Queued};
    Some(match command {
        0x20 | 0x21 | 0xc4 => (Read, Pio, false),
        0x24 | 0x29 => (Read, Pio, true),
        0x30 | 0x31 | 0xc5 => (Write, Pio, false),
        0x34 | 0x39 | 0xce => (Write, Pio, true),
        0xc8 | 0xc9 => (Read, Dma, false),
        0x25 => (Read, Dma, true),
        0xca | 0xcb => (Write, Dma, false),
        0x35 | 0x3d => (Write, Dma, true),
        command::READ_QUEUED => (Read, Queued, true),
        command::WRITE_QUEUED => (Write, Queued, true),
        _ => return None,
    })
}

/// A count of which zero means all.
fn or_all(count: u16, all: u64) -> u64 {
    if count == 0 { all } else { count.into() }
}

fn sectors(task: &TaskFile, wide: bool) -> u64 {
    if wide { or_all(task.count, 0x1_0000) } else { or_all(task.count & 0xff, 0x100) }
}

/// The first sector; none if it is by cylinder, head and sector, and there is no sector 0.
fn sector(task: &TaskFile, wide: bool) -> Option<u64> {
    if wide {
        return Some(task.lba);
    }
    let (low, head) = (task.lba & 0xff_ffff, u64::from(task.device & 15));
    if task.device & 0x40 != 0 {
        return Some(head << 24 | low);
    }
    let within = (low & 0xff).checked_sub(1)?;
    Some(((low >> 8) * identify::HEADS + head) * identify::SECTORS_PER_TRACK + within)
}

#[cfg(test)]
#[path = "tests.rs"]
mod tests;
