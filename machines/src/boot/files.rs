//! The files a [`BootConfig`] names, read and understood.

use crate::config::{Bios, MachineConfig};

use super::{BootError, Kernel, load_firmware, load_kernel, read_file};

/// A file's contents with the name errors give it: `-kernel vmlinux`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Named<T> {
    /// Option and path.
    pub what: String,
    /// What was in it.
    pub value: T,
}

/// Kernel, initrd, device tree and firmware of one machine. Nothing is placed yet.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct BootFiles {
    /// `-kernel`
    pub kernel: Option<Named<Kernel>>,
    /// `-initrd`
    pub initrd: Option<Named<Vec<u8>>>,
    /// `-dtb`
    pub dtb: Option<Named<Vec<u8>>>,
    /// `-bios FILE`
    pub firmware: Option<Named<Kernel>>,
}

impl BootFiles {
    /// Reads what `config` names.
    pub fn read(config: &MachineConfig) -> Result<Self, BootError> {
        let boot = &config.boot;
        let raw =
            |option: &'static str, path: &Option<std::path::PathBuf>| -> Result<Option<Named<Vec<u8>>>, BootError> {
                let Some(path) = path else { return Ok(None) };
                Ok(Some(Named { what: format!("{option} {}", path.display()), value: read_file(option, path)? }))
            };
        let kernel = match raw("-kernel", &boot.kernel)? {
            Some(file) => Some(Named { value: load_kernel(&file.what, file.value, &config.guest)?, what: file.what }),
            None => None,
        };
        let firmware = match &boot.bios {
            Bios::File(path) => match raw("-bios", &Some(path.clone()))? {
                Some(file) => {
                    Some(Named { value: load_firmware(&file.what, file.value, &config.guest)?, what: file.what })
                }
                None => None,
            },
            Bios::Default | Bios::None => None,
        };
        let dtb = raw("-dtb", &boot.dtb)?;
        if let Some(file) = &dtb {
            check_dtb(file)?;
        }
        Ok(BootFiles { kernel, initrd: raw("-initrd", &boot.initrd)?, dtb, firmware })
    }
}

/// Magic and length of a flattened device tree (Devicetree Specification 0.4, 5.2).
fn check_dtb(file: &Named<Vec<u8>>) -> Result<(), BootError> {
    let word = |at: usize| file.value.get(at..at + 4).and_then(|b| b.try_into().ok()).map(u32::from_be_bytes);
    if word(0) != Some(0xd00d_feed) {
        return Err(BootError::Damaged {
            what: file.what.clone(),
            detail: "it is no compiled device tree; compile a .dts with dtc -O dtb".into(),
        });
    }
    match word(4) {
        Some(len) if len as usize <= file.value.len() => Ok(()),
        len => Err(BootError::Truncated {
            what: file.what.clone(),
            detail: format!("its header says {} bytes, the file has {}", len.unwrap_or(0), file.value.len()),
        }),
    }
}
