//! Every device model of this program: what `-device` can name.

use mimus_core::device::{ModelEntry, Registry, UnknownModel};
use mimus_devices::block::sata;
use mimus_devices::{isa, virtio};

use crate::machine::boot_list::is_bootable;

/// The models, by class.
pub const DEVICES: Registry = Registry::new(&[virtio::models::MODELS, isa::MODELS, sata::MODELS]);

/// Short names, as QEMU has them.
const ALIASES: &[(&str, &str)] = &[
    ("virtio-blk", "virtio-blk-pci"),
    ("virtio-net", "virtio-net-pci"),
    ("virtio-rng", "virtio-rng-pci"),
    ("virtio-serial", "virtio-serial-pci"),
    ("virtio-balloon", "virtio-balloon-pci"),
];

/// The model of a name or alias.
pub fn find(name: &str) -> Result<&'static ModelEntry, UnknownModel> {
    let alias = ALIASES.iter().find(|(short, _)| *short == name);
    DEVICES.find(alias.map_or(name, |(_, full)| full))
}

/// The text of `-device help`.
pub fn list() -> String {
    let width = DEVICES.models().map(|m| m.name.len()).max().unwrap_or(0);
    let mut out = String::from("devices:\n");
    for model in DEVICES.models() {
        out.push_str(&format!("  {:<width$}  {}\n", model.name, model.summary));
    }
    out.push_str("\n-device NAME,help lists the properties of one\n");
    out
}

/// Properties of a model that are the machine's, not the device's.
pub fn common_properties(model: &str) -> &'static [&'static str] {
    if is_bootable(model) { &["id", "bus", "bootindex"] } else { &["id", "bus"] }
}

/// The text of `-device NAME,help`, or why there is none.
pub fn properties(name: &str) -> String {
    match find(name) {
        Ok(model) => {
            let mut out = format!("{}: {}\nproperties:\n", model.name, model.summary);
            for property in common_properties(model.name).iter().chain((model.properties)()) {
                out.push_str(&format!("  {property}\n"));
            }
            out
        }
        Err(e) => format!("{e}\n"),
    }
}
