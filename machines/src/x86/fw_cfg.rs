//! What a PC's firmware is told through fw_cfg and CMOS.
//!
//! Spec: QEMU `docs/specs/fw_cfg` for items and files; SeaBIOS `docs` and EDK2's OvmfPkg
//! for those they read. CMOS bytes: the IBM AT's map, and from 0x30 on what BIOSes of
//! emulated machines agreed on.

use std::path::Path;
use std::sync::{Arc, Mutex};

use mimus_devices::misc::fw_cfg::{FwCfg, FwCfgError, key};

use super::acpi::{SleepStates, TableSet, loader};
use super::smm::SmiFeatures;
use super::{kernel_rom, layout, smbios, smm};
use crate::boot::x86::{CMDLINE, Image, Memory, bzimage, check_cmdline, place};
use crate::boot::{self, BootError};
use crate::config::{BootOrder, MachineConfig};
use crate::machine::boot_list::BootList;
use crate::machine::{MachineError, firmware_items};

/// Numbers of the architecture's own items.
mod x86_key {
    /// 1: the interval timer is on input 2 of the I/O APIC, as the MADT says. 8 bits.
    pub const IRQ0_OVERRIDE: u16 = 0x8002;
}
/// Numbers of Linux's set-up part.
const SETUP_SIZE: u16 = 0x17;
pub(super) const SETUP_DATA: u16 = 0x18;
/// Where a boot loader puts it.
pub(super) const SETUP_ADDRESS: u64 = 0x1_0000;
/// RAM below 4 GiB that a BIOS may use at its end.
const BIOS_ROOM: u64 = 1 << 20;

/// What firmware is told.
pub struct Contents<'a> {
    /// The machine.
    pub config: &'a MachineConfig,
    /// Its RAM.
    pub memory: Memory,
    /// Its ACPI tables, if it has them.
    pub acpi: Option<&'a TableSet>,
    /// Its SMBIOS structures.
    pub smbios: &'a [u8],
    /// Firmware loads the kernel.
    pub kernel: bool,
    /// What it is to boot from.
    pub boot_list: BootList,
    /// What firmware may negotiate of SMIs.
    pub smi: Option<Arc<Mutex<SmiFeatures>>>,
    /// Its sleep states.
    pub sleep: Option<SleepStates>,
}

/// Fills the device.
pub fn fill(f: &mut FwCfg, c: &Contents<'_>) -> Result<(), MachineError> {
    let fail = |e: FwCfgError| MachineError::other(e.to_string());
    let cpus = u16::try_from(c.config.smp.cpus).unwrap_or(u16::MAX);
    f.add_u64(key::RAM_SIZE, c.config.memory).map_err(fail)?;
    f.add_u16(key::NB_CPUS, cpus).map_err(fail)?;
    f.add_u16(key::MAX_CPUS, cpus).map_err(fail)?;
    f.add_u16(key::NOGRAPHIC, 1).map_err(fail)?;
    f.add_bytes(x86_key::IRQ0_OVERRIDE, [1]).map_err(fail)?;
    f.add_file("etc/e820", layout::ram_map(c.memory).packed()).map_err(fail)?;
    f.add_file(smbios::ANCHOR_FILE, smbios::anchor(c.smbios.len(), 0)).map_err(fail)?;
    f.add_file(smbios::TABLES_FILE, c.smbios).map_err(fail)?;
    if let Some(set) = c.acpi {
        for (name, data) in loader::files(set) {
            f.add_file(name, data).map_err(fail)?;
        }
    }
    if let Some(features) = &c.smi {
        smm::add_files(f, features).map_err(fail)?;
    }
    if let Some(states) = c.sleep {
        f.add_file("etc/system-states", states.packed()).map_err(fail)?;
    }
    let rom = if c.kernel { add_kernel(f, c)? } else { None };
    let strict = c.config.firmware.order.strict.then_some("HALT");
    let order: Vec<&str> = rom.into_iter().chain(c.boot_list.paths()).chain(strict).collect();
    if !order.is_empty() {
        f.add_file("bootorder", format!("{}\0", order.join("\n"))).map_err(fail)?;
    }
    firmware_items::add(f, c.config)
}

/// Kernel, initrd and command line, for firmware that boots them (OVMF), and the ROM by which a BIOS does: its place in
/// the boot order, if there is one.
fn add_kernel(f: &mut FwCfg, c: &Contents<'_>) -> Result<Option<&'static str>, MachineError> {
    let boot = &c.config.boot;
    let read = |option: &'static str, path: &Path| -> Result<(String, Vec<u8>), BootError> {
        Ok((format!("{option} {}", path.display()), boot::read_file(option, path)?))
    };
    let Some(path) = &boot.kernel else { return Ok(None) };
    let (what, mut file) = read("-kernel", path)?;
    let initrd = boot.initrd.as_ref().map(|path| read("-initrd", path)).transpose()?;
    let mut cmdline = boot.append.clone().unwrap_or_default().into_bytes();
    cmdline.push(0);
    let mut first = None;
    if bzimage::is_bzimage(&file) {
        let kernel = bzimage::parse(&what, &file, &c.config.guest)?;
        let setup_len = bzimage::setup_len(&file).min(file.len());
        let code = file.split_off(setup_len);
        let image = Image::Linux(kernel);
        check_cmdline(&image, boot.append.as_deref().unwrap_or_default())?;
        let named = initrd.as_ref().map(|(what, data)| (what.as_str(), data.len() as u64));
        // Real-mode code is told of an initrd below 4 GiB only.
        let placed = place(Memory { high: 0, ..c.memory }, (&what, &image), named, BIOS_ROOM)?;
        let at = placed.initrd.map(|r| (r.start, r.end - r.start));
        bzimage::patch_setup(&mut file, CMDLINE as u32, at, kernel_rom::HEAP_END);
        if let Image::Linux(kernel) = &image {
            let rom = kernel_rom::build(kernel, setup_len, at, cmdline.len());
            f.add_file(kernel_rom::FILE, rom).map_err(|e| MachineError::other(e.to_string()))?;
            first = Some(kernel_rom::BOOT_ORDER);
        }
        add_item(f, &what, file, SETUP_SIZE, SETUP_DATA)?;
        file = code;
    }
    add_item(f, &what, file, key::KERNEL_SIZE, key::KERNEL_DATA)?;
    if let Some((what, data)) = initrd {
        add_item(f, &what, data, key::INITRD_SIZE, key::INITRD_DATA)?;
    }
    add_item(f, "-append", cmdline, key::CMDLINE_SIZE, key::CMDLINE_DATA)?;
    Ok(first)
}

fn add_item(f: &mut FwCfg, what: &str, data: Vec<u8>, size_key: u16, data_key: u16) -> Result<(), MachineError> {
    let fail = |e: FwCfgError| MachineError::other(format!("{what}: {e}"));
    let size = u32::try_from(data.len()).unwrap_or(u32::MAX);
    f.add_bytes(data_key, data).map_err(fail)?;
    f.add_u32(size_key, size).map_err(fail)
}

/// The CMOS bytes of a PC: place and value.
pub fn cmos(memory: Memory, cpus: u32, order: &BootOrder) -> Vec<(u8, u8)> {
    let mut out = Vec::new();
    let mut word = |at: [u8; 2], value: u64| {
        out.extend([(at[0], value as u8), (at[1], (value >> 8) as u8)]);
    };
    // KiB of base memory; of memory above 1 MiB, twice; 64 KiB units above 16 MiB.
    let above = |start: u64| memory.low.saturating_sub(start);
    word([0x15, 0x16], 640);
    let extended = (above(1 << 20) >> 10).min(0xffff);
    word([0x17, 0x18], extended);
    word([0x30, 0x31], extended);
    word([0x34, 0x35], (above(16 << 20) >> 16).min(0xffff));
    // 64 KiB units above 4 GiB, three bytes.
    let high = (memory.high >> 16).min(0xff_ffff);
    word([0x5b, 0x5c], high);
    out.push((0x5d, (high >> 16) as u8));
    out.push((0x5f, (cpus.saturating_sub(1)).min(255) as u8));
    // Equipment: coprocessor, PS/2 mouse.
    out.push((0x14, 0x06));
    out.extend(boot_bytes(order.once.as_ref().or(order.order.as_ref())));
    out
}

/// The CMOS bytes that say what to boot, first to last: by default disk, floppy, optical disk.
pub fn boot_bytes(order: Option<&String>) -> [(u8, u8); 2] {
    let number = |c: char| match c {
        'a' => 1,
        'c' => 2,
        'd' => 3,
        _ => 4,
    };
    let numbers: Vec<u8> = order.map_or("cad", String::as_str).chars().map(number).collect();
    let nth = |i: usize| numbers.get(i).copied().unwrap_or(0);
    [(0x3d, nth(0) | nth(1) << 4), (0x38, nth(2) << 4)]
}

#[cfg(test)]
mod tests {
    use mimus_core::device::lock;
    use mimus_core::memory::{DmaHandle, MemoryMap, MemoryRegion};

    use super::*;

    fn device() -> Arc<std::sync::Mutex<FwCfg>> {
        let map = MemoryMap::new();
        FwCfg::new(DmaHandle::ungated(map.address_space("memory", &MemoryRegion::container("system", u64::MAX))))
    }

    #[test]
    fn items_are_added_once() {
        let config = MachineConfig::new("x86_64");
        let memory = Memory { low: 512 << 20, high: 0 };
        let set = super::super::acpi::build(&super::super::acpi::tests::q35());
        let device = device();
        let contents = Contents {
            config: &config,
            memory,
            acpi: Some(&set),
            smbios: &[1, 2, 3],
            kernel: true,
            boot_list: BootList::default(),
            smi: None,
            sleep: None,
        };
        let mut f = lock(&device);
        fill(&mut f, &contents).unwrap();
        assert!(f.add_file("etc/table-loader", [0]).is_err());
        assert!(f.add_file("etc/e820", [0]).is_err());
        assert!(f.add_u16(key::NB_CPUS, 1).is_err());
    }

    #[test]
    fn memory_in_cmos() {
        let bytes = cmos(Memory { low: 0x8000_0000, high: 0x1_2345_0000 }, 4, &BootOrder::default());
        let at = |n: u8| bytes.iter().find(|b| b.0 == n).unwrap().1;
        let word = |low: u8, high: u8| u32::from(at(low)) | u32::from(at(high)) << 8;
        assert_eq!((word(0x15, 0x16), word(0x30, 0x31), word(0x34, 0x35)), (640, 0xffff, 0x7f00));
        assert_eq!((word(0x5b, 0x5c), at(0x5d), at(0x5f)), (0x2345, 1, 3));
        let once = BootOrder::parse("order=c,once=ndc").unwrap();
        let small = cmos(Memory { low: 8 << 20, high: 0 }, 1, &once);
        assert!(small.contains(&(0x34, 0)) && small.contains(&(0x31, 0x1c)));
        assert_eq!((at(0x3d), at(0x38)), (0x12, 0x30));
        assert!(small.contains(&(0x3d, 0x34)) && small.contains(&(0x38, 0x20)));
        assert_eq!(boot_bytes(once.order.as_ref()), [(0x3d, 2), (0x38, 0)]);
    }
}
