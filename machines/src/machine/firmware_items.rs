//! What a configuration has firmware and systems told through fw_cfg, on every board that has the device.

use mimus_devices::misc::fw_cfg::{FwCfg, FwCfgError, key};

use super::MachineError;
use crate::boot::read_file;
use crate::config::{FwCfgItem, ItemData, MachineConfig};

/// Adds `-uuid`, `-boot` and the items of `-fw_cfg`; the last, when all of the board's own are there.
pub fn add(f: &mut FwCfg, config: &MachineConfig) -> Result<(), MachineError> {
    let fail = |e: FwCfgError| MachineError::other(e.to_string());
    let firmware = &config.firmware;
    f.add_bytes(key::UUID, firmware.uuid.unwrap_or_default()).map_err(fail)?;
    f.add_u16(key::BOOT_MENU, firmware.order.menu.unwrap_or(false).into()).map_err(fail)?;
    if let Some(ms) = firmware.order.splash_time {
        f.add_file("etc/boot-menu-wait", ms.to_le_bytes()).map_err(fail)?;
    }
    if let Some(ms) = firmware.order.reboot_timeout {
        f.add_file("etc/boot-fail-wait", ms.to_le_bytes()).map_err(fail)?;
    }
    firmware.items.iter().try_for_each(|item| add_item(f, item))
}

fn add_item(f: &mut FwCfg, item: &FwCfgItem) -> Result<(), MachineError> {
    let name = &item.name;
    if !name.starts_with("opt/") {
        log::warn!("-fw_cfg name={name}: names outside of opt/ are the firmware's own");
    }
    let data = match &item.data {
        ItemData::File(path) => read_file("-fw_cfg", path)?,
        ItemData::Text(text) => text.clone().into_bytes(),
    };
    f.add_file(name, data).map(drop).map_err(|e| MachineError::other(format!("-fw_cfg name={name}: {e}")))
}
