//! What a PC's firmware is told through fw_cfg and CMOS.
//!
//! Spec: QEMU `docs/specs/fw_cfg` for items and files; SeaBIOS `docs` and EDK2's OvmfPkg
//! for those they read. CMOS bytes: the IBM AT's map, and from 0x30 on what BIOSes of
//! emulated machines agreed on.

use std::path::Path;

use mimus_devices::misc::fw_cfg::{FwCfg, FwCfgError, key};

use super::acpi::{TableSet, loader};
use super::{layout, smbios};
use crate::boot::x86::{Memory, bzimage};
use crate::boot::{self, BootError};
use crate::config::MachineConfig;
use crate::machine::MachineError;

/// Numbers of the architecture's own items.
mod x86_key {
    /// 1: the interval timer is on input 2 of the I/O APIC, as the MADT says. 8 bits.
    pub const IRQ0_OVERRIDE: u16 = 0x8002;
}
/// Numbers of Linux's set-up part.
const SETUP_SIZE: u16 = 0x17;
const SETUP_DATA: u16 = 0x18;

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
}

/// Fills the device.
pub fn fill(f: &mut FwCfg, c: &Contents<'_>) -> Result<(), MachineError> {
    let fail = |e: FwCfgError| MachineError::other(e.to_string());
    let cpus = u16::try_from(c.config.smp.cpus).unwrap_or(u16::MAX);
    f.add_u64(key::RAM_SIZE, c.config.memory).map_err(fail)?;
    f.add_u16(key::NB_CPUS, cpus).map_err(fail)?;
    f.add_u16(key::MAX_CPUS, cpus).map_err(fail)?;
    f.add_u16(key::NOGRAPHIC, 1).map_err(fail)?;
    f.add_u16(key::BOOT_MENU, 0).map_err(fail)?;
    f.add_bytes(x86_key::IRQ0_OVERRIDE, [1]).map_err(fail)?;
    f.add_file("etc/e820", layout::ram_map(c.memory).packed()).map_err(fail)?;
    f.add_file(smbios::ANCHOR_FILE, smbios::anchor(c.smbios.len(), 0)).map_err(fail)?;
    f.add_file(smbios::TABLES_FILE, c.smbios).map_err(fail)?;
    if let Some(set) = c.acpi {
        for (name, data) in loader::files(set) {
            f.add_file(name, data).map_err(fail)?;
        }
    }
    if c.kernel {
        add_kernel(f, c.config)?;
    }
    Ok(())
}

/// Kernel, initrd and command line, for firmware that boots them (OVMF).
fn add_kernel(f: &mut FwCfg, config: &MachineConfig) -> Result<(), MachineError> {
    let read = |option: &'static str, path: &Path| -> Result<(String, Vec<u8>), BootError> {
        Ok((format!("{option} {}", path.display()), boot::read_file(option, path)?))
    };
    let add = |f: &mut FwCfg, what: &str, data: Vec<u8>, size_key: u16, data_key: u16| {
        let fail = |e: FwCfgError| MachineError::other(format!("{what}: {e}"));
        let size = u32::try_from(data.len()).unwrap_or(u32::MAX);
        f.add_bytes(data_key, data).map_err(fail)?;
        f.add_u32(size_key, size).map_err(fail)
    };
    if let Some(path) = &config.boot.kernel {
        let (what, mut data) = read("-kernel", path)?;
        if bzimage::is_bzimage(&data) {
            bzimage::parse(&what, &data, &config.guest)?;
            let code = data.split_off(bzimage::setup_len(&data).min(data.len()));
            add(f, &what, data, SETUP_SIZE, SETUP_DATA)?;
            data = code;
        }
        add(f, &what, data, key::KERNEL_SIZE, key::KERNEL_DATA)?;
    }
    if let Some(path) = &config.boot.initrd {
        let (what, data) = read("-initrd", path)?;
        add(f, &what, data, key::INITRD_SIZE, key::INITRD_DATA)?;
    }
    if let Some(text) = &config.boot.append {
        let mut data = text.clone().into_bytes();
        data.push(0);
        add(f, "-append", data, key::CMDLINE_SIZE, key::CMDLINE_DATA)?;
    }
    Ok(())
}

/// The CMOS bytes of a PC: place and value.
pub fn cmos(memory: Memory, cpus: u32) -> Vec<(u8, u8)> {
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
    // Boot from disk, floppy, optical disk, in this order.
    out.extend([(0x3d, 0x12), (0x38, 0x30)]);
    out
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

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
        let contents = Contents { config: &config, memory, acpi: Some(&set), smbios: &[1, 2, 3], kernel: true };
        let mut f = lock(&device);
        fill(&mut f, &contents).unwrap();
        assert!(f.add_file("etc/table-loader", [0]).is_err());
        assert!(f.add_file("etc/e820", [0]).is_err());
        assert!(f.add_u16(key::NB_CPUS, 1).is_err());
    }

    #[test]
    fn memory_in_cmos() {
        let bytes = cmos(Memory { low: 0x8000_0000, high: 0x1_2345_0000 }, 4);
        let at = |n: u8| bytes.iter().find(|b| b.0 == n).unwrap().1;
        let word = |low: u8, high: u8| u32::from(at(low)) | u32::from(at(high)) << 8;
        assert_eq!((word(0x15, 0x16), word(0x30, 0x31), word(0x34, 0x35)), (640, 0xffff, 0x7f00));
        assert_eq!((word(0x5b, 0x5c), at(0x5d), at(0x5f)), (0x2345, 1, 3));
        let small = cmos(Memory { low: 8 << 20, high: 0 }, 1);
        assert!(small.contains(&(0x34, 0)) && small.contains(&(0x31, 0x1c)));
    }
}
