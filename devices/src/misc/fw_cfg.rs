//! Firmware configuration device: how firmware gets the kernel, the command line and tables.
//!
//! Spec: QEMU's `docs/specs/fw_cfg`. One device, two attachments:
//! * memory-mapped, binding `qemu,fw-cfg-mmio`: data register at 0 (1 to 8 bytes, first byte of the item in the
//!   lowest address), selector at 8 (big-endian 16 bits), DMA address at 16 (big-endian 64 bits, or its halves, the
//!   low one starting the transfer);
//! * x86 ports from 0x510 on: selector at 0 (little-endian 16 bits), data register at 1 (a byte at a time), DMA
//!   address at 4 (the halves, big-endian).
//!
//! Checked with: the specification; Linux qemu_fw_cfg and EDK2's QemuFwCfgLib use the same paths.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

use mimus_core::bus::{AccessRules, AccessSize, BusFault, GuestPhys, MmioAccess, PioAccess};
use mimus_core::device::{MutLifecycle, MutMmioDevice, MutPioDevice, ResetPhase};
use mimus_core::memory::DmaHandle;
use mimus_core::snapshot::{SaveRestore, Schema, SnapshotError};
use serde::{Deserialize, Serialize};

/// Bytes of the register map.
pub const SIZE: u64 = 0x18;
/// Accesses the region takes.
pub const RULES: AccessRules = AccessRules::sizes(AccessSize::B1, AccessSize::B8).big_endian();

/// First of the x86 ports.
pub const PORT: u16 = 0x510;
/// Number of x86 ports.
pub const PORTS: u64 = 12;
/// Accesses the x86 ports take.
pub const PORT_RULES: AccessRules = AccessRules::sizes(AccessSize::B1, AccessSize::B4).with_unaligned();

/// Numbers of the items that have one; files get theirs from [`key::FILE_FIRST`] on.
pub mod key {
    /// "QEMU".
    pub const SIGNATURE: u16 = 0x00;
    /// Features, 32 bits: 1 traditional interface, 2 DMA.
    pub const ID: u16 = 0x01;
    /// The machine's UUID, 16 bytes.
    pub const UUID: u16 = 0x02;
    /// RAM in bytes, 64 bits.
    pub const RAM_SIZE: u16 = 0x03;
    /// 1 without a display, 16 bits.
    pub const NOGRAPHIC: u16 = 0x04;
    /// vCPUs present, 16 bits.
    pub const NB_CPUS: u16 = 0x05;
    /// Load address of the kernel, 32 bits.
    pub const KERNEL_ADDR: u16 = 0x07;
    /// Length of the kernel, 32 bits.
    pub const KERNEL_SIZE: u16 = 0x08;
    /// Load address of the initial RAM disk, 32 bits.
    pub const INITRD_ADDR: u16 = 0x0a;
    /// Length of the initial RAM disk, 32 bits.
    pub const INITRD_SIZE: u16 = 0x0b;
    /// 1 shows a boot menu, 16 bits.
    pub const BOOT_MENU: u16 = 0x0e;
    /// Most vCPUs there may be, 16 bits.
    pub const MAX_CPUS: u16 = 0x0f;
    /// The kernel.
    pub const KERNEL_DATA: u16 = 0x11;
    /// The initial RAM disk.
    pub const INITRD_DATA: u16 = 0x12;
    /// Length of the command line with its NUL, 32 bits.
    pub const CMDLINE_SIZE: u16 = 0x14;
    /// The command line with its NUL.
    pub const CMDLINE_DATA: u16 = 0x15;
    /// The directory of files.
    pub const FILE_DIR: u16 = 0x19;
    /// Number of the first file.
    pub const FILE_FIRST: u16 = 0x20;
}

const PORT_SELECTOR: u16 = 0;
const PORT_DATA: u16 = 1;
const PORT_DMA: u16 = 4;
const PORT_DMA_LOW: u16 = 8;
const DATA: u64 = 0;
const SELECTOR: u64 = 8;
const DMA: u64 = 16;
const DMA_LOW: u64 = 20;
/// What the DMA register reads as.
const DMA_SIGNATURE: u64 = u64::from_be_bytes(*b"QEMU CFG");
const FEATURES: u32 = 1 | 2;
/// Selector bits that name an item: 14 is the obsolete write flag.
const KEY_MASK: u16 = 0xbfff;
/// Files' numbers end below the architecture's own items and the write flag.
const FILE_END: u16 = 0x4000;
/// Bytes of a name in the directory, with its NUL.
const NAME_BYTES: usize = 56;
/// Sanity limit of one item: lengths are 32 bits in the directory.
const MAX_ITEM: usize = u32::MAX as usize;

const DMA_ERROR: u32 = 1;
const DMA_READ: u32 = 2;
const DMA_SKIP: u32 = 4;
const DMA_SELECT: u32 = 8;
const DMA_WRITE: u32 = 16;

/// Why an item cannot be added.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum FwCfgError {
    /// The name is empty, too long or not plain text.
    #[error("fw_cfg: the name {0:?} is not 1 to 55 printable ASCII characters")]
    Name(String),
    /// The name or number is taken.
    #[error("fw_cfg: there is an item {0} already")]
    Duplicate(String),
    /// The item is 4 GiB or more.
    #[error("fw_cfg: {0} has {1} bytes: an item is smaller than 4 GiB")]
    TooLarge(String, usize),
    /// All numbers are used.
    #[error("fw_cfg: no number is left for file {0}")]
    Full(String),
}

/// Told of the whole contents when the guest has written to an item, with the device locked: must not wait nor
/// access the device.
pub type WriteListener = Box<dyn Fn(&[u8]) + Send>;

/// Asked for the contents of an item when the guest selects it, as [`WriteListener`] is called.
pub type SelectListener = Box<dyn Fn() -> Vec<u8> + Send>;

#[derive(Default)]
struct Item {
    data: Vec<u8>,
    /// The guest may write it by DMA.
    writable: Option<WriteListener>,
    /// It is made when it is selected: what it is made of is saved elsewhere.
    made: Option<SelectListener>,
}

impl Item {
    /// Its contents are not what the machine's configuration says.
    fn changes(&self) -> bool {
        self.writable.is_some() || self.made.is_some()
    }
}

/// The registers, as saved. Items are part of the configuration, except those the guest can write.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct State {
    selected: u16,
    offset: u32,
    /// High half written to the DMA address.
    dma_high: u32,
    /// Contents of the items the guest can write.
    written: BTreeMap<u16, Vec<u8>>,
}

/// A fw_cfg device.
pub struct FwCfg {
    items: BTreeMap<u16, Item>,
    files: BTreeMap<String, u16>,
    selected: u16,
    offset: u32,
    dma_high: u32,
    dma: DmaHandle,
}

impl FwCfg {
    /// A device with signature, features and an empty directory, doing DMA through `dma`.
    pub fn new(dma: DmaHandle) -> Arc<Mutex<FwCfg>> {
        let (items, files) = (BTreeMap::new(), BTreeMap::new());
        let mut f = FwCfg { items, files, selected: key::SIGNATURE, offset: 0, dma_high: 0, dma };
        f.set(key::SIGNATURE, b"QEMU".to_vec());
        f.set(key::ID, FEATURES.to_le_bytes().to_vec());
        f.update_directory();
        Arc::new(Mutex::new(f))
    }

    /// Adds a file; returns its number. Names are paths such as `etc/table-loader` or `opt/org.example/x`.
    pub fn add_file(&mut self, name: &str, data: impl Into<Vec<u8>>) -> Result<u16, FwCfgError> {
        self.insert_file(name, Item { data: data.into(), ..Item::default() })
    }

    /// Adds a file whose contents are made each time the guest selects it, `len` bytes; with a listener the guest may
    /// overwrite it then.
    pub fn add_made_file(
        &mut self,
        name: &str,
        len: usize,
        make: SelectListener,
        writable: Option<WriteListener>,
    ) -> Result<u16, FwCfgError> {
        self.insert_file(name, Item { data: vec![0; len], writable, made: Some(make) })
    }

    /// Adds a file the guest may overwrite, but not lengthen.
    pub fn add_writable_file(
        &mut self,
        name: &str,
        data: impl Into<Vec<u8>>,
        listener: WriteListener,
    ) -> Result<u16, FwCfgError> {
        self.insert_file(name, Item { data: data.into(), writable: Some(listener), made: None })
    }

    /// Replaces what a file holds; false if there is none of that name, or the data are 4 GiB or more.
    pub fn modify_file(&mut self, name: &str, data: impl Into<Vec<u8>>) -> bool {
        let (item, data) = (self.files.get(name).and_then(|key| self.items.get_mut(key)), data.into());
        let Some(item) = item.filter(|_| data.len() < MAX_ITEM) else { return false };
        item.data = data;
        self.update_directory();
        true
    }

    /// Adds an item with a number of its own (see [`key`]).
    pub fn add_bytes(&mut self, key: u16, data: impl Into<Vec<u8>>) -> Result<(), FwCfgError> {
        let (name, data) = (format!("{key:#x}"), data.into());
        let key = key & KEY_MASK;
        if self.items.contains_key(&key) || (key::FILE_FIRST..FILE_END).contains(&key) {
            return Err(FwCfgError::Duplicate(name));
        }
        check_len(&name, &data)?;
        self.set(key, data);
        Ok(())
    }

    /// Adds a NUL-terminated string.
    pub fn add_string(&mut self, key: u16, text: &str) -> Result<(), FwCfgError> {
        let mut data = text.as_bytes().to_vec();
        data.push(0);
        self.add_bytes(key, data)
    }

    /// Adds a little-endian number.
    pub fn add_u16(&mut self, key: u16, value: u16) -> Result<(), FwCfgError> {
        self.add_bytes(key, value.to_le_bytes())
    }

    /// Adds a little-endian number.
    pub fn add_u32(&mut self, key: u16, value: u32) -> Result<(), FwCfgError> {
        self.add_bytes(key, value.to_le_bytes())
    }

    /// Adds a little-endian number.
    pub fn add_u64(&mut self, key: u16, value: u64) -> Result<(), FwCfgError> {
        self.add_bytes(key, value.to_le_bytes())
    }

    fn set(&mut self, key: u16, data: Vec<u8>) {
        self.items.insert(key, Item { data, ..Item::default() });
    }

    fn insert_file(&mut self, name: &str, item: Item) -> Result<u16, FwCfgError> {
        let printable = name.bytes().all(|b| b.is_ascii_graphic() || b == b' ');
        if name.is_empty() || name.len() >= NAME_BYTES || !printable {
            return Err(FwCfgError::Name(name.to_owned()));
        }
        if self.files.contains_key(name) {
            return Err(FwCfgError::Duplicate(name.to_owned()));
        }
        check_len(name, &item.data)?;
        let next = key::FILE_FIRST + self.files.len() as u16;
        if next >= FILE_END {
            return Err(FwCfgError::Full(name.to_owned()));
        }
        self.items.insert(next, item);
        self.files.insert(name.to_owned(), next);
        self.update_directory();
        Ok(next)
    }

    fn update_directory(&mut self) {
        let mut dir = (self.files.len() as u32).to_be_bytes().to_vec();
        for (name, key) in &self.files {
            let len = self.items.get(key).map_or(0, |i| i.data.len() as u32);
            dir.extend(len.to_be_bytes());
            dir.extend(key.to_be_bytes());
            dir.extend([0; 2]);
            let mut padded = [0; NAME_BYTES];
            padded[..name.len()].copy_from_slice(name.as_bytes());
            dir.extend(padded);
        }
        self.set(key::FILE_DIR, dir);
    }

    fn select(&mut self, selector: u16) {
        self.selected = selector & KEY_MASK;
        self.offset = 0;
        if let Some(Item { data, made: Some(made), .. }) = self.items.get_mut(&self.selected) {
            let len = data.len();
            *data = made();
            data.resize(len, 0);
        }
    }

    /// Bytes of the selected item from the current offset on.
    fn rest(&self) -> &[u8] {
        let data = self.items.get(&self.selected).map_or(&[][..], |i| &i.data);
        data.get(self.offset as usize..).unwrap_or(&[])
    }

    /// The next bytes as one value, first byte most significant; zeros after the end.
    fn read_data(&mut self, size: AccessSize) -> u64 {
        let mut value = 0;
        for _ in 0..size.bytes() {
            let next = self.rest().first().copied();
            value = value << 8 | u64::from(next.unwrap_or(0));
            self.offset += u32::from(next.is_some());
        }
        value
    }

    /// The low half of the DMA address was written.
    fn transfer_low(&mut self, low: u32) {
        let high = std::mem::take(&mut self.dma_high);
        self.transfer(GuestPhys(u64::from(high) << 32 | u64::from(low)));
    }

    /// One transfer as the descriptor at `at` says: control, length, address, all big-endian.
    fn transfer(&mut self, at: GuestPhys) {
        let mut raw = [0; 16];
        let control = match self.dma.read(at, &mut raw) {
            Ok(()) => {
                let (head, address) = raw.split_at(8);
                let head = u64::from_be_bytes(head.try_into().unwrap_or_default());
                let address = u64::from_be_bytes(address.try_into().unwrap_or_default());
                self.execute((head >> 32) as u32, head as u32, address)
            }
            Err(_) => DMA_ERROR,
        };
        // A descriptor that cannot be written was the guest's mistake, and there is nobody to tell.
        if let Err(fault) = self.dma.write(at, &control.to_be_bytes()) {
            log::debug!(target: "guest_errors", "fw_cfg: DMA descriptor at {at}: {fault}");
        }
    }

    /// Returns what the control field becomes: 0, or the error bit.
    fn execute(&mut self, control: u32, length: u32, address: u64) -> u32 {
        if control & DMA_SELECT != 0 {
            self.select((control >> 16) as u16);
        }
        let done = if length == 0 {
            Ok(())
        } else if control & DMA_READ != 0 {
            self.dma_read(length, GuestPhys(address))
        } else if control & DMA_WRITE != 0 {
            self.dma_write(length, GuestPhys(address))
        } else {
            if control & DMA_SKIP != 0 {
                self.offset += (self.rest().len() as u32).min(length);
            }
            Ok(())
        };
        if done.is_ok() { 0 } else { DMA_ERROR }
    }

    fn dma_read(&mut self, length: u32, to: GuestPhys) -> Result<(), BusFault> {
        let data = self.rest();
        let n = data.len().min(length as usize);
        self.dma.write(to, &data[..n])?;
        let zeros = u64::from(length) - n as u64;
        self.offset += n as u32;
        if zeros == 0 {
            return Ok(());
        }
        self.dma.fill(to.checked_add(n as u64).ok_or(BusFault::Decode)?, zeros, 0)
    }

    fn dma_write(&mut self, length: u32, from: GuestPhys) -> Result<(), BusFault> {
        let (start, n) = (self.offset as usize, length as usize);
        let item = self.items.get_mut(&self.selected).ok_or(BusFault::Access)?;
        let listener = item.writable.as_ref().ok_or(BusFault::Access)?;
        let target = item.data.get_mut(start..).and_then(|d| d.get_mut(..n)).ok_or(BusFault::Access)?;
        self.dma.read(from, target)?;
        listener(&item.data);
        self.offset += length;
        Ok(())
    }
}

fn check_len(name: &str, data: &[u8]) -> Result<(), FwCfgError> {
    match data.len() {
        n if n < MAX_ITEM => Ok(()),
        n => Err(FwCfgError::TooLarge(name.to_owned(), n)),
    }
}

impl MutMmioDevice for FwCfg {
    fn mmio_read(&mut self, a: MmioAccess) -> Result<u64, BusFault> {
        match a.offset {
            DATA => Ok(self.read_data(a.size)),
            SELECTOR..DMA => Ok(0),
            DMA..SIZE if a.offset + a.size.bytes() <= SIZE => {
                let below = (SIZE - a.offset - a.size.bytes()) * 8;
                Ok(DMA_SIGNATURE >> below & a.size.mask())
            }
            _ => Err(BusFault::Access),
        }
    }

    fn mmio_write(&mut self, a: MmioAccess, value: u64) -> Result<(), BusFault> {
        match (a.offset, a.size) {
            // Writing through the data register ended with QEMU 2.4.
            (DATA, _) => {}
            (SELECTOR, AccessSize::B2) => self.select(value as u16),
            (DMA, AccessSize::B8) => {
                self.dma_high = 0;
                self.transfer(GuestPhys(value));
            }
            (DMA, AccessSize::B4) => self.dma_high = value as u32,
            (DMA_LOW, AccessSize::B4) => self.transfer_low(value as u32),
            _ => return Err(BusFault::Access),
        }
        Ok(())
    }
}

impl MutPioDevice for FwCfg {
    fn pio_read(&mut self, a: PioAccess) -> Result<u64, BusFault> {
        let bytes = a.size.bytes() as usize;
        Ok(match a.offset {
            PORT_DATA if bytes == 1 => self.read_data(AccessSize::B1),
            PORT_DMA.. => {
                let at = usize::from(a.offset - PORT_DMA);
                let shown = DMA_SIGNATURE.to_be_bytes().into_iter().skip(at).take(bytes);
                shown.enumerate().fold(0, |value, (n, byte)| value | u64::from(byte) << (8 * n))
            }
            _ => 0,
        })
    }

    fn pio_write(&mut self, a: PioAccess, value: u64) -> Result<(), BusFault> {
        match (a.offset, a.size) {
            (PORT_SELECTOR, AccessSize::B2) => self.select(value as u16),
            (PORT_DMA, AccessSize::B4) => self.dma_high = (value as u32).swap_bytes(),
            (PORT_DMA_LOW, AccessSize::B4) => self.transfer_low((value as u32).swap_bytes()),
            // Ports have nobody to report an error to.
            _ => {}
        }
        Ok(())
    }
}

impl MutLifecycle for FwCfg {
    fn reset(&mut self, phase: ResetPhase) {
        if phase == ResetPhase::Enter {
            self.select(key::SIGNATURE);
            self.dma_high = 0;
        }
    }
}

impl SaveRestore for FwCfg {
    const SCHEMA: Schema = Schema::new("fw-cfg", 1);
    type State = State;

    fn save_state(&self) -> State {
        let writable = self.items.iter().filter(|(_, i)| i.changes());
        State {
            selected: self.selected,
            offset: self.offset,
            dma_high: self.dma_high,
            written: writable.map(|(k, i)| (*k, i.data.clone())).collect(),
        }
    }

    fn restore_state(&mut self, state: State) -> Result<(), SnapshotError> {
        let invalid = |field, reason: String| Err(SnapshotError::invalid(Self::SCHEMA, field, reason));
        for (key, data) in &state.written {
            let item = self.items.get(key).filter(|i| i.changes());
            if item.is_none_or(|i| i.data.len() != data.len()) {
                return invalid(
                    "written",
                    format!("this machine has no writable item {key:#x} of {} bytes", data.len()),
                );
            }
        }
        let len = self.items.get(&state.selected).map_or(0, |i| i.data.len());
        if state.selected & !KEY_MASK != 0 || state.offset as usize > len {
            return invalid("offset", format!("byte {} of item {:#x}", state.offset, state.selected));
        }
        (self.selected, self.offset, self.dma_high) = (state.selected, state.offset, state.dma_high);
        for (key, data) in state.written {
            if let Some(item) = self.items.get_mut(&key) {
                item.data = data;
                if let Item { data, writable: Some(listener), made: None } = item {
                    listener(data);
                }
            }
        }
        Ok(())
    }
}

#[cfg(test)]
#[path = "fw_cfg_tests.rs"]
mod tests;

#[cfg(test)]
#[path = "fw_cfg_mmio_tests.rs"]
mod mmio_tests;
