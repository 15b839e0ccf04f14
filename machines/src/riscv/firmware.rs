//! What the `virt` board has for firmware in flash: the two banks of CFI flash, and fw_cfg,
//! through which firmware there gets `-kernel`, `-initrd` and `-append`.

use std::path::Path;
use std::sync::{Arc, Mutex};

use mimus_devices::block::pflash::{self, Pflash};
use mimus_devices::misc::fw_cfg::{self, FwCfg, key};

use super::map;
use crate::boot;
use crate::config::{ConfigError, DriveInterface, MachineConfig};
use crate::machine::backends::drive_id;
use crate::machine::{MachineBuilder, MachineError, firmware_items};

/// Banks of flash, one after another.
pub(super) const BANKS: usize = 2;

/// The drive of each bank: the one whose `unit=` or `index=` names it, or the next that
/// names none.
fn assign(config: &MachineConfig) -> Result<[Option<String>; BANKS], MachineError> {
    let mut banks = [const { None }; BANKS];
    for (i, drive) in config.drives.iter().enumerate().filter(|(_, d)| d.interface == DriveInterface::Pflash) {
        let fail = |value: String, why: String| MachineError::from(ConfigError::new("-drive", &value, why));
        let bank = match drive.index {
            Some(n) => n as usize,
            None => banks.iter().position(Option::is_none).unwrap_or(BANKS),
        };
        match banks.get_mut(bank) {
            Some(free @ None) => *free = Some(drive_id(i, drive)),
            Some(_) => {
                return Err(fail(format!("if=pflash,unit={bank}"), "this bank of flash has a drive already".into()));
            }
            None => {
                let why = format!("the virt board has {BANKS} banks of flash: use unit=0 to unit={}", BANKS - 1);
                return Err(fail("if=pflash".into(), why));
            }
        }
    }
    Ok(banks)
}

/// Puts the flash in. True if there is an image in the first bank, which is then what starts.
pub(super) fn add_flash(b: &mut MachineBuilder, config: &MachineConfig) -> Result<bool, MachineError> {
    let banks = assign(config)?;
    let bootable = banks[0].is_some();
    let len = map::FLASH.size / BANKS as u64;
    for (i, drive) in banks.into_iter().enumerate() {
        let path = format!("/machine/flash.{i}");
        let mut ctx = b.context(&path);
        let image = drive.map(|id| ctx.block_backend(&id)).transpose()?;
        let region = ctx.rom_device_region("flash", len, pflash::RULES)?;
        let flash = Pflash::new(region.clone(), image).map_err(|e| MachineError::other(e.to_string()))?;
        region.map(map::FLASH.base + i as u64 * len);
        b.add_device(&path, flash)?;
    }
    Ok(bootable)
}

/// Puts fw_cfg in. `for_firmware`: with the kernel and what belongs to it.
pub(super) fn add_fw_cfg(
    b: &mut MachineBuilder,
    config: &MachineConfig,
    for_firmware: bool,
) -> Result<(), MachineError> {
    let path = "/machine/fw_cfg";
    let device: Arc<Mutex<FwCfg>> = FwCfg::new(b.context(path).dma());
    fill(&mut mimus_core::device::lock(&device), config, for_firmware)?;
    b.add_mmio(path, (map::FW_CFG.base, map::FW_CFG.size), fw_cfg::RULES, device)
}

fn fill(f: &mut FwCfg, config: &MachineConfig, for_firmware: bool) -> Result<(), MachineError> {
    let fail = |e: fw_cfg::FwCfgError| MachineError::other(e.to_string());
    let cpus = u16::try_from(config.smp.cpus).unwrap_or(u16::MAX);
    f.add_u64(key::RAM_SIZE, config.memory).map_err(fail)?;
    f.add_u16(key::NB_CPUS, cpus).map_err(fail)?;
    f.add_u16(key::MAX_CPUS, cpus).map_err(fail)?;
    f.add_u16(key::NOGRAPHIC, 1).map_err(fail)?;
    firmware_items::add(f, config)?;
    if !for_firmware {
        return Ok(());
    }
    let images = [
        ("-kernel", &config.boot.kernel, key::KERNEL_SIZE, key::KERNEL_DATA),
        ("-initrd", &config.boot.initrd, key::INITRD_SIZE, key::INITRD_DATA),
    ];
    for (option, path, size_key, data_key) in images {
        let Some(path) = path else { continue };
        add_image(f, option, path, size_key, data_key)?;
    }
    if let Some(text) = &config.boot.append {
        f.add_u32(key::CMDLINE_SIZE, text.len() as u32 + 1).map_err(fail)?;
        f.add_string(key::CMDLINE_DATA, text).map_err(fail)?;
    }
    Ok(())
}

fn add_image(
    f: &mut FwCfg,
    option: &'static str,
    path: &Path,
    size_key: u16,
    data_key: u16,
) -> Result<(), MachineError> {
    let data = boot::read_file(option, path)?;
    let fail = |e: fw_cfg::FwCfgError| MachineError::other(format!("{option} {}: {e}", path.display()));
    let size = u32::try_from(data.len()).unwrap_or(u32::MAX);
    f.add_bytes(data_key, data).map_err(fail)?;
    f.add_u32(size_key, size).map_err(fail)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Drive;

    fn flash(index: Option<u32>) -> Drive {
        Drive { interface: DriveInterface::Pflash, index, ..Drive::default() }
    }

    fn banks(indices: &[Option<u32>]) -> Result<[Option<String>; BANKS], String> {
        let mut config = MachineConfig::new("riscv64");
        config.drives = indices.iter().map(|i| flash(*i)).collect();
        assign(&config).map_err(|e| e.to_string())
    }

    #[test]
    fn drives_find_their_banks() {
        let id = |n: usize| Some(format!("#drive{n}"));
        assert_eq!(banks(&[]).unwrap(), [None, None]);
        assert_eq!(banks(&[None, None]).unwrap(), [id(0), id(1)]);
        assert_eq!(banks(&[Some(1), None]).unwrap(), [id(1), id(0)]);
        assert!(banks(&[Some(1), Some(1)]).unwrap_err().contains("has a drive already"));
        assert!(banks(&[Some(2)]).unwrap_err().contains("2 banks"));
        assert!(banks(&[None, None, None]).unwrap_err().contains("2 banks"));
    }
}
