//! The devices that firmware is to boot from, in the order of their `bootindex=`.
//!
//! Firmware knows a device by its path in a device tree (IEEE 1275), as SeaBIOS and OVMF build it from where they find the
//! device: a line of fw_cfg's file `bootorder` each.

use std::collections::BTreeMap;

use mimus_devices::block::ahci;
use mimus_devices::pci::DevFn;

/// Where a device is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// On the first PCI bus.
    Pci(DevFn),
    /// Behind virtio-mmio registers at this address.
    Mmio(u64),
    /// On this port of the board's SATA controller.
    Sata(usize),
}

/// Those that were given an index.
#[derive(Debug, Default)]
pub struct BootList(BTreeMap<u32, String>);

impl BootList {
    /// Adds the device of a model, which must be one to boot from. The message is for the option that asked for it.
    pub fn add(&mut self, index: u32, model: &str, place: Place) -> Result<(), String> {
        let path = path(model, place)
            .ok_or_else(|| format!("bootindex={index}: firmware boots from disks and network cards; leave it out"))?;
        match self.0.insert(index, path) {
            None => Ok(()),
            Some(_) => Err(format!("bootindex={index} is another device's already; each has a number of its own")),
        }
    }

    /// Their paths, the first to boot from first.
    pub fn paths(&self) -> impl Iterator<Item = &str> {
        self.0.values().map(String::as_str)
    }
}

/// What `bootindex=` says: `None` for -1, which is "not to boot from".
pub fn parse_index(text: &str) -> Result<Option<u32>, String> {
    match text.parse::<i64>() {
        Ok(-1) => Ok(None),
        Ok(n) if (0..=i64::from(i32::MAX)).contains(&n) => Ok(Some(n as u32)),
        _ => Err(format!("bootindex={text}: it takes a whole number from 0 (booted first) up, or -1 for never")),
    }
}

/// True for a model that firmware can boot from.
pub fn is_bootable(model: &str) -> bool {
    kind(model).is_some()
}

/// Name on the bus, and of the thing booted.
fn kind(model: &str) -> Option<(&'static str, &'static str)> {
    if matches!(model, "ide-hd" | "ide-cd") {
        // OVMF tells the controller by this name; SeaBIOS by its place.
        return Some(("pci8086,2922", "disk@0"));
    }
    match model.strip_suffix("-pci").or_else(|| model.strip_suffix("-device"))? {
        "virtio-blk" => Some(("scsi", "disk@0,0")),
        "virtio-net" => Some(("ethernet", "ethernet-phy@0")),
        _ => None,
    }
}

fn path(model: &str, place: Place) -> Option<String> {
    let (name, unit) = kind(model)?;
    Some(match place {
        Place::Sata(port) => {
            let (device, function) = (ahci::DEVICE.device(), ahci::DEVICE.function());
            format!("/pci@i0cf8/{name}@{device:x},{function:x}/drive@{port:x}/{unit}")
        }
        Place::Mmio(at) => format!("/virtio-mmio@{at:016x}/{unit}"),
        Place::Pci(at) if at.function() == 0 => format!("/pci@i0cf8/{name}@{:x}/{unit}", at.device()),
        Place::Pci(at) => format!("/pci@i0cf8/{name}@{:x},{:x}/{unit}", at.device(), at.function()),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn in_order_of_the_numbers() {
        let mut list = BootList::default();
        let pci = |device, function| Place::Pci(DevFn::new(device, function).unwrap());
        list.add(7, "virtio-blk-pci", pci(0x1e, 0)).unwrap();
        list.add(1, "virtio-net-pci", pci(3, 2)).unwrap();
        list.add(2, "virtio-blk-device", Place::Mmio(0xfeb0_0e00)).unwrap();
        list.add(5, "ide-cd", Place::Sata(3)).unwrap();
        list.add(4, "ide-hd", Place::Sata(0)).unwrap();
        let paths: Vec<_> = list.paths().collect();
        let expected = [
            "/pci@i0cf8/ethernet@3,2/ethernet-phy@0",
            "/virtio-mmio@00000000feb00e00/disk@0,0",
            "/pci@i0cf8/pci8086,2922@1f,2/drive@0/disk@0",
            "/pci@i0cf8/pci8086,2922@1f,2/drive@3/disk@0",
            "/pci@i0cf8/scsi@1e/disk@0,0",
        ];
        assert_eq!(paths, expected);
        assert!(list.add(7, "virtio-blk-pci", pci(4, 0)).unwrap_err().contains("bootindex=7"));
        assert!(list.add(3, "virtio-rng-pci", pci(4, 0)).unwrap_err().contains("disks"));
    }

    #[test]
    fn numbers() {
        assert_eq!((parse_index("0"), parse_index("-1")), (Ok(Some(0)), Ok(None)));
        for bad in ["", "x", "-2", "2147483648", "1.5"] {
            assert!(parse_index(bad).unwrap_err().contains("whole number"), "{bad}");
        }
    }
}
