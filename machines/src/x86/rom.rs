//! Firmware of a PC: a BIOS in ROM, or flash.
//!
//! Both end at 4 GiB, where the reset vector is. The last 128 KiB of a ROM are seen
//! below 1 MiB too, where 16-bit code runs.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use mimus_core::memory::{MemoryRegion, RamBlock};
use mimus_devices::block::pflash::{self, Pflash};

use super::layout::FOUR_GIB;
use crate::boot::{self, human};
use crate::config::{Bios, ConfigError, DriveInterface, MachineConfig};
use crate::guests;
use crate::machine::backends::drive_id;
use crate::machine::{MachineBuilder, MachineError};

/// The file name of the BIOS of `pc` and `q35`.
pub const PC_BIOS: &str = "bios-256k.bin";
/// Where distributions put BIOSes.
const DIRECTORIES: &[&str] = &[
    "/usr/share/seabios",
    "/usr/share/qemu",
    "/usr/share/qemu-kvm",
    "/usr/local/share/qemu",
    "/usr/share/kvm",
    "/usr/share/edk2/ovmf",
];
/// Largest ROM: below it is the local APICs' and other chips' room.
const MAX_ROM: u64 = 16 << 20;
/// ROM comes in units of this.
const UNIT: u64 = 64 << 10;
/// Flash comes in units of this.
const FLASH_UNIT: u64 = 4 << 10;
/// How much of a ROM's end is seen below 1 MiB.
const ISA_WINDOW: u64 = 128 << 10;
const MIB: u64 = 1 << 20;
/// Banks of flash, below one another from 4 GiB down.
const BANKS: usize = 2;
/// Largest flash, both banks together.
const MAX_FLASH: u64 = 8 << 20;

/// What starts a machine.
#[derive(Clone, Debug)]
pub enum Firmware {
    /// Nothing: a kernel is entered directly.
    None,
    /// A BIOS in ROM.
    Rom(Arc<RamBlock>),
    /// Flash.
    Flash,
}

impl Firmware {
    /// Whether it is UEFI.
    pub fn is_uefi(&self) -> bool {
        let mut start = [0; 64];
        match self {
            Self::None => false,
            Self::Rom(block) => block.read(0, &mut start) && is_volume(&start),
            Self::Flash => true,
        }
    }
}

/// Drives of flash banks: the one whose `unit=` or `index=` names it, or the next that names none.
fn banks(config: &MachineConfig) -> Result<[Option<String>; BANKS], ConfigError> {
    let mut banks = [const { None }; BANKS];
    for (i, drive) in config.drives.iter().enumerate().filter(|(_, d)| d.interface == DriveInterface::Pflash) {
        let fail = |why: String| ConfigError::new("-drive", "if=pflash", why);
        let bank = match drive.index {
            Some(n) => n as usize,
            None => banks.iter().position(Option::is_none).unwrap_or(BANKS),
        };
        match banks.get_mut(bank) {
            Some(free @ None) => *free = Some(drive_id(i, drive)),
            Some(_) => return Err(fail(format!("unit={bank} has a drive already"))),
            None => return Err(fail(format!("there are {BANKS} banks of flash: use unit=0 and unit={}", BANKS - 1))),
        }
    }
    if banks[0].is_none() && banks[1].is_some() {
        return Err(ConfigError::new("-drive", "if=pflash,unit=1", "flash starts with unit=0, which has no drive"));
    }
    Ok(banks)
}

/// Whether there is firmware in flash.
pub fn has_flash(config: &MachineConfig) -> bool {
    config.drives.iter().any(|d| d.interface == DriveInterface::Pflash)
}

/// Puts the firmware in that `config` asks for: flash, `-bios FILE`, or without a kernel the BIOS of the host.
/// `window` is where the end of a ROM is seen below 1 MiB, `bios` the name of the host's BIOS.
pub fn add(
    b: &mut MachineBuilder,
    config: &MachineConfig,
    window: &MemoryRegion,
    bios: &str,
) -> Result<Firmware, MachineError> {
    let flash = banks(config)?;
    let path = match &config.boot.bios {
        _ if flash[0].is_some() => {
            if let Bios::File(path) = &config.boot.bios {
                let why = "firmware is in flash already (-drive if=pflash); leave one out";
                return Err(ConfigError::new("-bios", &path.display().to_string(), why).into());
            }
            return add_flash(b, config, flash, window);
        }
        Bios::File(path) => path.clone(),
        Bios::Default if config.boot.kernel.is_none() => find(config, bios)?,
        Bios::None if config.boot.kernel.is_none() => {
            return Err(ConfigError::new("-bios", "none", "there is nothing to run then: give -kernel FILE").into());
        }
        Bios::Default | Bios::None => return Ok(Firmware::None),
    };
    add_rom(b, &path, window)
}

/// The BIOS's file in `directories`, the usual places of this host, or among the guests that were fetched.
pub fn find_bios(directories: &[PathBuf], bios: &str) -> Option<PathBuf> {
    let fetched = guests::cache_dir().ok().map(|c| c.join(guests::x86::SEABIOS.name));
    let all = directories.iter().cloned().chain(DIRECTORIES.iter().map(PathBuf::from)).chain(fetched);
    all.map(|d| d.join(bios)).find(|p| p.is_file())
}

fn find(config: &MachineConfig, bios: &str) -> Result<PathBuf, MachineError> {
    find_bios(&config.data_dirs, bios).ok_or_else(|| {
        MachineError::other(format!(
            "there is no BIOS ({bios}) in the usual places: install the package seabios, name one with -bios FILE, or give -kernel FILE"
        ))
    })
}

fn add_rom(b: &mut MachineBuilder, path: &Path, window: &MemoryRegion) -> Result<Firmware, MachineError> {
    let data = boot::read_file("-bios", path)?;
    let len = data.len() as u64;
    if !len.is_multiple_of(UNIT) || len > MAX_ROM {
        let why = match is_volume(&data) && len <= MAX_FLASH {
            true => format!(
                "it is UEFI firmware that belongs in flash: use -drive if=pflash,format=raw,readonly=on,file={0} and, with a copy of its variables (*_VARS*), -drive if=pflash,format=raw,file=VARS",
                path.display()
            ),
            false => format!(
                "it has {len} bytes; firmware is a multiple of {} and has at most {}: {}",
                human(UNIT),
                human(MAX_ROM),
                if len > MAX_ROM { "is it a disk image (-drive file=…)?" } else { "is the file cut short?" }
            ),
        };
        return Err(ConfigError::new("-bios", &path.display().to_string(), why).into());
    }
    let block = b.add_rom("bios", (FOUR_GIB - len, len), &data)?;
    show_below_1_mib(b, &MemoryRegion::rom("bios-low", &block), len, window);
    Ok(Firmware::Rom(block))
}

/// Whether it begins with a firmware volume (PI 1.8, volume 3 section 3.2.1), as UEFI images and their halves do.
fn is_volume(data: &[u8]) -> bool {
    const SIGNATURE: usize = 40;
    data.get(SIGNATURE..SIGNATURE + 4) == Some(b"_FVH")
}

/// Shows the end of a ROM of `len` bytes in `window`, which begins at 0xc0000 and ends at 1 MiB.
fn show_below_1_mib(b: &MachineBuilder, rom: &MemoryRegion, len: u64, window: &MemoryRegion) {
    let seen = len.min(ISA_WINDOW);
    let alias = MemoryRegion::alias("isa-bios", rom, len - seen, seen);
    b.services().map.change(|t| {
        t.map(window, MIB - seen - WINDOW_BASE, &alias);
    });
}

/// Where the window below 1 MiB begins.
pub const WINDOW_BASE: u64 = 0xc_0000;
/// Its length.
pub const WINDOW_LEN: u64 = MIB - WINDOW_BASE;

/// The file of the drive whose back end has this name.
fn file_of<'a>(config: &'a MachineConfig, id: &str) -> Option<&'a PathBuf> {
    let named = config.drives.iter().enumerate().find(|(i, d)| drive_id(*i, d) == id);
    named?.1.file.as_ref()
}

fn add_flash(
    b: &mut MachineBuilder,
    config: &MachineConfig,
    banks: [Option<String>; BANKS],
    window: &MemoryRegion,
) -> Result<Firmware, MachineError> {
    let mut top = FOUR_GIB;
    for (i, drive) in banks.into_iter().enumerate() {
        let Some(drive) = drive else { continue };
        let path = format!("/machine/flash.{i}");
        let mut ctx = b.context(&path);
        let image = ctx.block_backend(&drive)?;
        let len = image.capacity();
        let file = file_of(config, &drive);
        // The image's own length counts: disks are rounded up to whole sectors.
        let exact = file.as_ref().and_then(|f| Some(f.metadata().ok()?.len())).unwrap_or(len);
        if exact == 0 || !exact.is_multiple_of(FLASH_UNIT) || FOUR_GIB - top + len > MAX_FLASH {
            let why = format!(
                "it has {exact} bytes; flash is in multiples of {}, at most {} in both banks: is it a firmware image?",
                human(FLASH_UNIT),
                human(MAX_FLASH)
            );
            let name = file.map_or(String::new(), |f| format!(",file={}", f.display()));
            return Err(ConfigError::new("-drive", &format!("if=pflash,unit={i}{name}"), why).into());
        }
        let region = ctx.rom_device_region("flash", len, pflash::RULES)?;
        let flash = Pflash::with_geometry(region.clone(), Some(image), pflash::PC)
            .map_err(|e| MachineError::other(e.to_string()))?;
        top -= len;
        region.map(top);
        if i == 0 {
            // The reset code is in flash, but nothing below 1 MiB is written as flash.
            show_flash_below_1_mib(b, region.region(), len, window)?;
        }
        b.add_device(&path, flash)?;
    }
    Ok(Firmware::Flash)
}

fn show_flash_below_1_mib(
    b: &MachineBuilder,
    flash: &MemoryRegion,
    len: u64,
    window: &MemoryRegion,
) -> Result<(), MachineError> {
    let block = flash.ram_block().ok_or_else(|| MachineError::other("flash without memory"))?;
    show_below_1_mib(b, &MemoryRegion::rom("flash-low", block), len, window);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Drive;

    fn drives(indices: &[Option<u32>]) -> Result<[Option<String>; BANKS], String> {
        let mut config = MachineConfig::new("x86_64");
        let flash =
            |index: &Option<u32>| Drive { interface: DriveInterface::Pflash, index: *index, ..Drive::default() };
        config.drives = indices.iter().map(flash).collect();
        banks(&config).map_err(|e| e.to_string())
    }

    #[test]
    fn drives_find_their_banks() {
        let id = |n: usize| Some(format!("#drive{n}"));
        assert_eq!(drives(&[]), Ok([None, None]));
        assert_eq!(drives(&[None, None]), Ok([id(0), id(1)]));
        assert_eq!(drives(&[Some(1), Some(0)]), Ok([id(1), id(0)]));
        assert!(drives(&[Some(1)]).unwrap_err().contains("unit=0, which has no drive"));
        assert!(drives(&[Some(0), Some(0)]).unwrap_err().contains("already"));
        assert!(drives(&[Some(2)]).unwrap_err().contains("2 banks"));
    }

    #[test]
    fn the_bios_is_looked_for() {
        let dir = std::env::temp_dir().join(format!("mimus-rom-{}", std::process::id()));
        std::fs::create_dir_all(&dir).unwrap();
        std::fs::write(dir.join("b.bin"), [0]).unwrap();
        let mut config = MachineConfig::new("x86_64");
        config.data_dirs = vec![dir.clone()];
        assert_eq!(find(&config, "b.bin").unwrap(), dir.join("b.bin"));
        std::fs::remove_dir_all(&dir).unwrap();
        assert!(
            find(&MachineConfig::new("x86_64"), "no-such-bios.bin").unwrap_err().to_string().contains("-bios FILE")
        );
    }
}
