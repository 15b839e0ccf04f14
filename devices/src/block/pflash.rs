//! Parallel NOR flash with the Intel command set (CFI 0x0001): firmware and its variables.
//!
//! Spec: Intel StrataFlash 28F256J3 datasheet (commands, status register), JEDEC JEP137 and the CFI specification
//! (query table). A bank is made as a [`Geometry`] says: on the `virt` boards of two 16-bit chips side by side, so
//! that each register and command appears in both halves of a 32-bit word; on PCs of one 8-bit chip.
//! Modelled: array, identifier, query and status reads; word program, buffered program, block erase; locks are
//! accepted without effect. Programming and erasing take no time.
//! Not modelled: suspend, one-time-programmable registers.

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex, mpsc};

use mimus_core::backend::{BlockBackend, BlockBuffer, BlockError, BlockOp, BlockRequest};
use mimus_core::bus::{AccessRules, AccessSize, BusFault, MmioAccess};
use mimus_core::device::{Drain, DrainToken, MutLifecycle, MutMmioDevice, ResetPhase, lock};
use mimus_core::memory::{RamBlock, RamSlice, RegionHandle};
use mimus_core::snapshot::{SaveRestore, Schema, SnapshotError};
use serde::{Deserialize, Serialize};

/// Accesses the region takes.
pub const RULES: AccessRules = AccessRules::sizes(AccessSize::B1, AccessSize::B4);
/// Bytes of an erase block of a `virt` board's bank: 128 KiB of each chip.
pub const SECTOR: u64 = 256 << 10;

/// How a bank is made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Geometry {
    /// Bytes of an erase block of the bank, a multiple of 256 for each chip.
    pub sector: u64,
    /// Bytes per word of the bank.
    pub width: u64,
    /// Chips side by side.
    pub chips: u64,
    /// The size need not be the power of two that the query table can say: its firmware knows it.
    pub any_size: bool,
    /// "Clear status register" clears the ready bit too, until the next operation: by that OVMF tells flash from
    /// RAM and ROM.
    pub clears_ready: bool,
}

/// Two 16-bit chips.
pub const VIRT: Geometry = Geometry { sector: SECTOR, width: 4, chips: 2, any_size: false, clears_ready: false };
/// One 8-bit chip with small blocks, as firmware of PCs knows it.
pub const PC: Geometry = Geometry { sector: 4 << 10, width: 1, chips: 1, any_size: true, clears_ready: true };

/// Bytes of one chip's write buffer, as a power of two.
const BUFFER_LOG2: u8 = 11;
/// Most bus words in one buffered program.
const BUFFER_WORDS: u32 = (1 << BUFFER_LOG2) / 2;
const MANUFACTURER: u16 = 0x89;
const DEVICE: u16 = 0x18;

const STATUS_READY: u8 = 0x80;
const STATUS_ERASE_ERROR: u8 = 0x20;
const STATUS_PROGRAM_ERROR: u8 = 0x10;
const STATUS_LOCKED: u8 = 0x02;

/// Why a flash bank cannot be made.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum FlashError {
    /// The region is not a ROM device of whole sectors.
    #[error("flash {0}: its region is no ROM device of a size that flash has")]
    Region(String),
    /// The image's size does not match.
    #[error("flash {name}: the image {image} has {found} bytes, the bank has {expected}: {}", size_hint(*found, *expected))]
    Size { name: String, image: String, found: u64, expected: u64 },
    /// The image cannot be read.
    #[error("flash {name}: cannot read {image}: {source}")]
    Read { name: String, image: String, source: BlockError },
}

fn size_hint(found: u64, expected: u64) -> String {
    if found > expected {
        return "use a smaller image".to_owned();
    }
    format!("pad it with `truncate -s {expected}`, or make it read-only")
}

/// What reads give.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
enum Mode {
    Array,
    Status,
    Identifier,
    Query,
}

/// What the next write is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
enum Cycle {
    Command,
    /// Data of a word program.
    Program,
    EraseConfirm,
    LockConfirm,
    /// Number of words, less one, of a buffered program.
    BufferCount,
    /// Data for the buffer; so many words after this one.
    BufferData {
        left: u32,
    },
    BufferConfirm,
}

/// The registers, as saved. The contents are a RAM block and saved as one.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct State {
    mode: Mode,
    cycle: Cycle,
    /// Error bits of the status register.
    errors: u8,
    /// The ready bit was cleared: see [`Geometry::clears_ready`].
    #[serde(default)]
    cleared: bool,
    /// Sector a buffered program is for.
    sector: u64,
    /// Offset, width in bytes and value of each write to the buffer.
    buffer: Vec<(u64, u8, u32)>,
}

fn reset_state() -> State {
    State { mode: Mode::Array, cycle: Cycle::Command, errors: 0, cleared: false, sector: 0, buffer: Vec::new() }
}

/// A bank of flash.
pub struct Pflash {
    s: State,
    region: RegionHandle,
    block: Arc<RamBlock>,
    geometry: Geometry,
    query: [u8; 0x40],
    read_only: bool,
    write_back: Option<Arc<WriteBack>>,
    /// The contents came from a snapshot and the image does not have them.
    restored: bool,
}

impl Pflash {
    /// Flash in `region`, made with [`DeviceContext::rom_device_region`](mimus_core::device::DeviceContext) and
    /// [`RULES`], holding what `image` does and writing changes to it. Without an image it starts as zeros and
    /// forgets. Binds the region (number 0). Reads the image now: not on an I/O thread.
    pub fn new(region: RegionHandle, image: Option<Arc<dyn BlockBackend>>) -> Result<Arc<Mutex<Pflash>>, FlashError> {
        Self::with_geometry(region, image, VIRT)
    }

    /// The same, made as `geometry` says.
    pub fn with_geometry(
        region: RegionHandle,
        image: Option<Arc<dyn BlockBackend>>,
        geometry: Geometry,
    ) -> Result<Arc<Mutex<Pflash>>, FlashError> {
        let name = region.region().name().to_owned();
        let block = region.region().ram_block().cloned();
        let whole = |len: u64| {
            let sized = geometry.any_size || len.is_power_of_two();
            sized && len.is_multiple_of(geometry.sector) && len >= 2 * geometry.sector
        };
        let fits = |b: &Arc<RamBlock>| region.region().binding().is_some() && whole(b.len());
        let block = block.filter(fits).ok_or_else(|| FlashError::Region(name.clone()))?;
        let read_only = image.as_ref().is_some_and(|i| i.read_only());
        if let Some(image) = &image {
            load(&name, &block, image)?;
        }
        let write_back = image.filter(|_| !read_only).map(|image| WriteBack::new(name, block.clone(), image));
        let query = query_table(block.len(), geometry);
        let handle = region.clone();
        let flash = Pflash { s: reset_state(), region, block, geometry, query, read_only, write_back, restored: false };
        let flash = Arc::new(Mutex::new(flash));
        handle.bind(0, &flash);
        Ok(flash)
    }

    /// Bytes of the bank.
    pub fn size(&self) -> u64 {
        self.block.len()
    }

    fn enter(&mut self, mode: Mode) {
        if (mode == Mode::Array) != (self.s.mode == Mode::Array) {
            self.region.set_direct(mode == Mode::Array);
        }
        self.s.mode = mode;
    }

    /// Goes back to commands, with reads giving status.
    fn finish(&mut self, errors: u8) {
        self.s.cycle = Cycle::Command;
        self.s.errors |= errors;
        self.s.cleared = false;
        self.s.buffer.clear();
        self.enter(Mode::Status);
    }

    fn await_write(&mut self, cycle: Cycle) {
        self.s.cycle = cycle;
        self.enter(Mode::Status);
    }

    fn sector_of(&self, offset: u64) -> u64 {
        offset - offset % self.geometry.sector
    }

    fn command(&mut self, offset: u64, command: u8) {
        match command {
            0x10 | 0x40 => self.await_write(Cycle::Program),
            0x20 | 0x28 => self.await_write(Cycle::EraseConfirm),
            0x60 => self.await_write(Cycle::LockConfirm),
            0xe8 => {
                self.s.sector = self.sector_of(offset);
                self.await_write(Cycle::BufferCount);
            }
            0x70 | 0xb0 | 0xd0 => self.enter(Mode::Status),
            0x90 => self.enter(Mode::Identifier),
            0x98 => self.enter(Mode::Query),
            0x50 => {
                self.s.errors = 0;
                self.s.cleared = self.geometry.clears_ready;
                self.enter(Mode::Array);
            }
            // 0xf0 is the other command set's way back, which drivers write while they probe.
            0x00 | 0xf0 | 0xff => self.enter(Mode::Array),
            other => {
                log::debug!(target: "guest_errors", "flash {}: no command {other:#x}", self.block.name());
                self.enter(Mode::Array);
            }
        }
    }

    /// Programs bits from one to zero; returns status bits.
    fn program(&mut self, offset: u64, size: u64, value: u32) -> u8 {
        if self.read_only {
            return STATUS_PROGRAM_ERROR | STATUS_LOCKED;
        }
        let mut bytes = [0; 4];
        let bytes = &mut bytes[..size.min(4) as usize];
        if !self.block.read(offset, bytes) {
            return STATUS_PROGRAM_ERROR;
        }
        bytes.iter_mut().zip(value.to_le_bytes()).for_each(|(old, new)| *old &= new);
        if !self.block.write(offset, bytes) {
            return STATUS_PROGRAM_ERROR;
        }
        self.changed(offset, size);
        0
    }

    fn erase(&mut self, sector: u64) -> u8 {
        if self.read_only {
            return STATUS_ERASE_ERROR | STATUS_LOCKED;
        }
        let len = self.geometry.sector;
        if !self.block.fill(sector, len, 0xff) {
            return STATUS_ERASE_ERROR;
        }
        self.changed(sector, len);
        0
    }

    fn changed(&self, offset: u64, len: u64) {
        if let Some(w) = &self.write_back {
            w.mark(offset, len);
            w.pump();
        }
    }

    fn buffer_write(&mut self, offset: u64, size: u64, value: u32, left: u32) {
        if self.sector_of(offset) != self.s.sector {
            return self.finish(STATUS_PROGRAM_ERROR | STATUS_ERASE_ERROR);
        }
        self.s.buffer.push((offset, size as u8, value));
        self.s.cycle = if left == 0 { Cycle::BufferConfirm } else { Cycle::BufferData { left: left - 1 } };
    }

    fn program_buffer(&mut self) {
        let writes = std::mem::take(&mut self.s.buffer);
        let errors =
            writes.into_iter().fold(0, |e, (offset, size, value)| e | self.program(offset, size.into(), value));
        self.finish(errors);
    }

    fn write(&mut self, offset: u64, size: u64, value: u32) {
        const SEQUENCE_ERROR: u8 = STATUS_PROGRAM_ERROR | STATUS_ERASE_ERROR;
        let command = value as u8;
        match self.s.cycle {
            Cycle::Command => self.command(offset, command),
            Cycle::Program => {
                let errors = self.program(offset, size, value);
                self.finish(errors);
            }
            Cycle::EraseConfirm if command == 0xd0 => {
                let errors = self.erase(self.sector_of(offset));
                self.finish(errors);
            }
            Cycle::LockConfirm if matches!(command, 0x01 | 0x2f | 0xd0) => self.finish(0),
            Cycle::BufferCount => match value & 0xffff {
                n if n < BUFFER_WORDS => self.s.cycle = Cycle::BufferData { left: n },
                _ => self.finish(SEQUENCE_ERROR),
            },
            Cycle::BufferData { left } => self.buffer_write(offset, size, value, left),
            Cycle::BufferConfirm if command == 0xd0 => self.program_buffer(),
            // A reset instead of the confirmation.
            Cycle::EraseConfirm | Cycle::LockConfirm | Cycle::BufferConfirm if command == 0xff => {
                self.finish(0);
                self.enter(Mode::Array);
            }
            Cycle::EraseConfirm | Cycle::LockConfirm | Cycle::BufferConfirm => self.finish(SEQUENCE_ERROR),
        }
    }

    fn read(&self, offset: u64, size: AccessSize) -> u64 {
        if self.s.mode == Mode::Array {
            return self.read_array(offset, size);
        }
        let Geometry { width, chips, .. } = self.geometry;
        let byte = |at: u64| {
            let value = self.chip_word((at / width) as usize).to_le_bytes();
            value[(at % width % (width / chips)) as usize]
        };
        (0..size.bytes()).fold(0, |value, n| value | u64::from(byte(offset + n)) << (8 * n))
    }

    /// What a chip gives at a word address, other than its array.
    fn chip_word(&self, word: usize) -> u16 {
        match self.s.mode {
            Mode::Array | Mode::Status => {
                let ready = if self.s.cleared { 0 } else { STATUS_READY };
                (ready | self.s.errors).into()
            }
            Mode::Identifier => match word & 0xff {
                0 => MANUFACTURER,
                1 => DEVICE,
                // Block lock status: unlocked.
                _ => 0,
            },
            Mode::Query => self.query.get(word & 0xff).copied().unwrap_or(0).into(),
        }
    }

    fn read_array(&self, offset: u64, size: AccessSize) -> u64 {
        let mut bytes = [0; 8];
        let n = size.bytes() as usize;
        if self.block.read(offset, &mut bytes[..n]) { u64::from_le_bytes(bytes) } else { size.mask() }
    }
}

/// The query table of one chip, indexed by word address (JEP137, CFI publication 100).
fn query_table(bank: u64, geometry: Geometry) -> [u8; 0x40] {
    let mut t = [0; 0x40];
    let mut put = |at: usize, bytes: &[u8]| t[at..at + bytes.len()].copy_from_slice(bytes);
    put(0x10, b"QRY");
    // Command set 0x0001 with its extended table at 0x31; no alternative.
    put(0x13, &[0x01, 0x00, 0x31, 0x00, 0, 0, 0, 0]);
    // Vcc 4.5 to 5.5 V; no Vpp. Word and buffer program 2^7 µs, erase 2^10 ms; at most 2^4 times that.
    put(0x1b, &[0x45, 0x55, 0, 0, 0x07, 0x07, 0x0a, 0, 0x04, 0x04, 0x04, 0]);
    let sectors = bank / geometry.sector;
    let region = geometry.sector / geometry.chips / 256;
    // Size, x8/x16 or x8 interface, write buffer, one erase region.
    let size = (bank / geometry.chips).next_power_of_two().trailing_zeros() as u8;
    let (interface, buffer) = if geometry.width == 1 { (0, BUFFER_LOG2 - 1) } else { (2, BUFFER_LOG2) };
    put(0x27, &[size, interface, 0, buffer, 0, 1]);
    put(0x2d, &((sectors - 1) as u16).to_le_bytes());
    put(0x2f, &(region as u16).to_le_bytes());
    put(0x31, b"PRI10");
    // No optional features; one protection field, empty.
    put(0x3f, &[0x01]);
    t
}

/// Reads the whole image into the block.
fn load(name: &str, block: &Arc<RamBlock>, image: &Arc<dyn BlockBackend>) -> Result<(), FlashError> {
    let (found, expected) = (image.capacity(), block.len());
    if found > expected || (found < expected && !image.read_only()) {
        return Err(FlashError::Size { name: name.to_owned(), image: image.describe(), found, expected });
    }
    let failed = |source| FlashError::Read { name: name.to_owned(), image: image.describe(), source };
    let slice = RamSlice::new(block.clone(), 0, found).ok_or_else(|| FlashError::Region(name.to_owned()))?;
    let (done, result) = mpsc::channel();
    let request = BlockRequest::transfer(BlockOp::Read, 0, BlockBuffer::Ram(vec![slice]));
    image.submit(request, Box::new(move |r, _| drop(done.send(r))));
    let dropped = || Err(BlockError::Io("the request was dropped".to_owned()));
    result.recv().unwrap_or_else(|_| dropped()).map_err(failed)?;
    if !block.fill(found, expected - found, 0xff) {
        return Err(FlashError::Region(name.to_owned()));
    }
    Ok(())
}

impl MutMmioDevice for Pflash {
    fn mmio_read(&mut self, a: MmioAccess) -> Result<u64, BusFault> {
        Ok(self.read(a.offset, a.size))
    }

    fn mmio_write(&mut self, a: MmioAccess, value: u64) -> Result<(), BusFault> {
        self.write(a.offset, a.size.bytes(), value as u32);
        Ok(())
    }
}

impl MutLifecycle for Pflash {
    fn reset(&mut self, phase: ResetPhase) {
        if phase == ResetPhase::Hold {
            // Whatever the mode was: an earlier change may still be queued.
            self.s = reset_state();
            self.region.set_direct(true);
        }
    }

    fn start(&mut self) {
        if std::mem::take(&mut self.restored) {
            self.changed(0, self.block.len());
        }
    }

    fn stop(&mut self, drain: &Drain) {
        if let Some(w) = &self.write_back {
            w.flush(drain.token());
        }
    }
}

impl SaveRestore for Pflash {
    const SCHEMA: Schema = Schema::new("cfi-flash", 1);
    type State = State;

    fn save_state(&self) -> State {
        self.s.clone()
    }

    fn restore_state(&mut self, state: State) -> Result<(), SnapshotError> {
        let invalid = |field, reason: &str| Err(SnapshotError::invalid(Self::SCHEMA, field, reason));
        let left = match state.cycle {
            Cycle::BufferData { left } => u64::from(left) + 1,
            _ => 0,
        };
        if state.buffer.len() as u64 + left > u64::from(BUFFER_WORDS) {
            return invalid("buffer", "more words than the buffer has");
        }
        let stray = |&(offset, size, _): &(u64, u8, u32)| {
            self.sector_of(offset) != state.sector
                || !matches!(size, 1 | 2 | 4)
                || !self.block.contains(offset, size.into())
        };
        if state.sector >= self.block.len() || state.buffer.iter().any(stray) {
            return invalid("sector", "the buffer's words are not in one sector of the bank");
        }
        if state.mode == Mode::Array && state.cycle != Cycle::Command {
            return invalid("mode", "array reads in the middle of a command");
        }
        if state.errors & STATUS_READY != 0 {
            return invalid("errors", "holds the ready bit");
        }
        self.s = state;
        self.region.set_direct(self.s.mode == Mode::Array);
        self.restored = true;
        Ok(())
    }
}

/// Granularity of what is written to the image, in bytes.
const PAGE: u64 = 4096;

/// Carries changes of the block to the image, one request at a time, so that writes of the same page stay in order.
struct WriteBack {
    name: String,
    block: Arc<RamBlock>,
    image: Arc<dyn BlockBackend>,
    s: Mutex<Pending>,
}

#[derive(Default)]
struct Pending {
    /// Numbers of pages that differ from the image.
    dirty: BTreeSet<u64>,
    in_flight: bool,
    /// Somebody is in [`WriteBack::pump`] and will look again.
    pumping: bool,
    /// A flush is wanted when nothing is dirty any more; these wait for it.
    flush: Vec<DrainToken>,
    failed: bool,
}

impl WriteBack {
    fn new(name: String, block: Arc<RamBlock>, image: Arc<dyn BlockBackend>) -> Arc<Self> {
        Arc::new(WriteBack { name, block, image, s: Mutex::default() })
    }

    fn mark(&self, offset: u64, len: u64) {
        let end = offset.saturating_add(len).min(self.block.len());
        lock(&self.s).dirty.extend(offset / PAGE..end.div_ceil(PAGE));
    }

    fn flush(self: &Arc<Self>, token: DrainToken) {
        lock(&self.s).flush.push(token);
        self.pump();
    }

    /// Submits what there is to do, unless a request is under way: its completion comes here again.
    fn pump(self: &Arc<Self>) {
        let mut s = lock(&self.s);
        if s.pumping {
            return;
        }
        s.pumping = true;
        while !s.in_flight {
            let Some((request, tokens)) = self.next(&mut s) else { break };
            s.in_flight = true;
            drop(s);
            let this = self.clone();
            // The completion may run right here, so no lock is held.
            self.image.submit(request, Box::new(move |result, _| this.completed(result, tokens)));
            s = lock(&self.s);
        }
        s.pumping = false;
    }

    fn next(&self, s: &mut Pending) -> Option<(BlockRequest, Vec<DrainToken>)> {
        let Some(&first) = s.dirty.first() else {
            let tokens = std::mem::take(&mut s.flush);
            return (!tokens.is_empty()).then(|| (BlockRequest::flush(), tokens));
        };
        let mut end = first;
        while s.dirty.remove(&end) {
            end += 1;
        }
        let slice = RamSlice::new(self.block.clone(), first * PAGE, (end - first) * PAGE)?;
        let buffer = BlockBuffer::Ram(vec![slice]);
        Some((BlockRequest::transfer(BlockOp::Write, first * PAGE / 512, buffer), Vec::new()))
    }

    fn completed(self: &Arc<Self>, result: Result<(), BlockError>, tokens: Vec<DrainToken>) {
        let mut s = lock(&self.s);
        s.in_flight = false;
        if let Err(e) = result
            && !std::mem::replace(&mut s.failed, true)
        {
            log::error!(
                "flash {}: cannot write {}: {e}; later changes may be lost too",
                self.name,
                self.image.describe()
            );
        }
        drop(s);
        drop(tokens);
        self.pump();
    }
}

#[cfg(test)]
#[path = "pflash_tests.rs"]
mod tests;
