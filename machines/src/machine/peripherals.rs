//! The devices a configuration asks for: `-drive if=virtio`, `-device`, `-nic`, and the
//! default network card.
//!
//! A board says what it has to plug them into: virtio-mmio slots, a PCI bus, or both.

use std::sync::Arc;

use mimus_core::backend::MacAddress;
use mimus_core::device::{DeviceContext, Options};
use mimus_core::irq::IrqLine;
use mimus_devices::block::ahci::Ahci;
use mimus_devices::isa::IsaBus;
use mimus_devices::pci::PciBus;
use mimus_devices::virtio::console::VirtioConsole;
use mimus_devices::virtio::transport::mmio::EmptySlot;
use mimus_devices::virtio::virtio_device_of;

use super::backends::{DEFAULT_NETWORK, default_network, drive_id, nic_id};
use super::boot_list::{BootList, Place, parse_index};
use super::{MachineBuilder, MachineError};
use crate::config::{ConfigError, DriveInterface, MachineConfig};
use crate::registry;

/// The virtio-mmio slots of a board.
pub struct MmioSlots {
    base: u64,
    stride: u64,
    irqs: Vec<IrqLine>,
    /// Free slots, lowest first.
    free: Vec<u32>,
    used: Vec<u32>,
}

impl MmioSlots {
    /// Slots `stride` bytes apart from `base` on, one for each interrupt. The highest is
    /// used first.
    pub fn new(base: u64, stride: u64, irqs: Vec<IrqLine>) -> Self {
        let free = (0..irqs.len() as u32).collect();
        Self { base, stride, irqs, free, used: Vec::new() }
    }

    /// The same slots, the lowest used first.
    pub fn lowest_first(mut self) -> Self {
        self.free.reverse();
        self
    }

    /// The slots with something in them, lowest first.
    pub fn used(&self) -> Vec<u32> {
        let mut used = self.used.clone();
        used.sort_unstable();
        used
    }

    fn address(&self, slot: u32) -> u64 {
        self.base + u64::from(slot) * self.stride
    }

    fn take(&mut self, bus: Option<&str>) -> Result<u32, String> {
        let slot = self.find(bus)?;
        self.used.push(slot);
        Ok(slot)
    }

    fn find(&mut self, bus: Option<&str>) -> Result<u32, String> {
        let count = self.irqs.len();
        let Some(bus) = bus else {
            return self
                .free
                .pop()
                .ok_or_else(|| format!("all {count} virtio-mmio slots are in use; use the model that ends in -pci"));
        };
        let slot = bus.strip_prefix("virtio-mmio-bus.").and_then(|n| n.parse::<u32>().ok());
        let slot = slot.filter(|s| (*s as usize) < count);
        let slot = slot.ok_or_else(|| format!("bus={bus}: the buses are virtio-mmio-bus.0 to .{}", count - 1))?;
        let at = self.free.iter().position(|s| *s == slot).ok_or_else(|| format!("bus={bus} is in use"))?;
        Ok(self.free.remove(at))
    }

    /// Maps the slots that stay empty.
    pub fn map_empty(&self, builder: &MachineBuilder) {
        self.free.iter().for_each(|s| builder.map(self.address(*s), &EmptySlot::region()));
    }
}

/// What a board has to plug devices into.
pub struct Peripherals {
    /// Its virtio-mmio slots.
    pub slots: Option<MmioSlots>,
    /// Its PCI bus.
    pub pci: Option<Arc<PciBus>>,
    /// Its ISA bus.
    pub isa: Option<IsaBus>,
    /// Its SATA controller.
    pub sata: Option<Arc<Ahci>>,
    /// What disks and network cards without a model become: `device` or `pci`.
    virtio: &'static str,
    /// The console a `virtconsole` is plugged into.
    console: Option<Arc<VirtioConsole>>,
    /// `-device`s so far.
    count: u32,
    /// What firmware is to boot from, if this board tells it.
    boot_list: Option<BootList>,
}

impl Peripherals {
    /// A board whose own virtio devices are on virtio-mmio.
    pub fn mmio(slots: MmioSlots, pci: Option<Arc<PciBus>>) -> Self {
        Self {
            slots: Some(slots),
            pci,
            isa: None,
            sata: None,
            virtio: "device",
            console: None,
            count: 0,
            boot_list: None,
        }
    }

    /// A board whose own virtio devices are on PCI.
    pub fn pci(bus: Arc<PciBus>) -> Self {
        Self {
            slots: None,
            pci: Some(bus),
            isa: None,
            sata: None,
            virtio: "pci",
            console: None,
            count: 0,
            boot_list: None,
        }
    }

    /// The board tells its firmware of `bootindex=`.
    pub fn with_boot_list(mut self) -> Self {
        self.boot_list = Some(BootList::default());
        self
    }

    /// What firmware is to boot from.
    pub fn take_boot_list(&mut self) -> BootList {
        self.boot_list.take().unwrap_or_default()
    }

    /// Adds all that `config` asks for.
    pub fn add_configured(&mut self, builder: &mut MachineBuilder, config: &MachineConfig) -> Result<(), MachineError> {
        for (i, drive) in config.drives.iter().enumerate() {
            let driver = match drive.interface {
                DriveInterface::Virtio => format!("virtio-blk-{}", self.virtio),
                DriveInterface::Ide if drive.cdrom => "ide-cd".to_owned(),
                DriveInterface::Ide => "ide-hd".to_owned(),
                // A device's, or a bank of flash.
                DriveInterface::None | DriveInterface::Pflash => continue,
            };
            let mut options = Options::new();
            if let Some(index) = drive.index.filter(|_| drive.interface == DriveInterface::Ide) {
                options.set("bus", &format!("ide.{index}"))?;
            }
            options.set("drive", &drive_id(i, drive))?;
            if let Some(serial) = &drive.serial {
                options.set("serial", serial)?;
            }
            if let Some(index) = drive.boot_index {
                options.set("bootindex", &index.to_string())?;
            }
            self.add(builder, "-drive", &driver, options)?;
        }
        for text in &config.devices {
            let (driver, options) = Options::parse_with_first(text, "driver")?;
            let driver =
                driver.ok_or_else(|| ConfigError::new("-device", text, "the name is missing; see -device help"))?;
            self.add(builder, "-device", &driver, options)?;
        }
        self.add_networks(builder, config)
    }

    fn add_networks(&mut self, builder: &mut MachineBuilder, config: &MachineConfig) -> Result<(), MachineError> {
        let card = format!("virtio-net-{}", self.virtio);
        for (i, nic) in config.nics.iter().enumerate().filter(|(_, n)| n.backend.is_some()) {
            let mut options = Options::new();
            options.set("netdev", &nic_id(i, nic.id.as_deref()))?;
            if let Some(mac) = nic.mac {
                options.set("mac", &MacAddress(mac).to_string())?;
            }
            let model = match nic.model.as_deref() {
                None | Some("virtio") => &card,
                Some(model) => model,
            };
            self.add(builder, "-nic", model, options)?;
        }
        if default_network(config) {
            let mut options = Options::new();
            options.set("netdev", DEFAULT_NETWORK)?;
            self.add(builder, "-nic", &card, options)?;
        }
        Ok(())
    }

    /// Adds one device. `option` is what asked for it.
    fn add(
        &mut self,
        builder: &mut MachineBuilder,
        option: &str,
        driver: &str,
        mut options: Options,
    ) -> Result<(), MachineError> {
        let fail = |e: &dyn std::fmt::Display| MachineError::other(format!("{option} {driver}: {e}"));
        let model = registry::find(driver).map_err(|e| MachineError::other(format!("{option}: {e}")))?;
        let number = self.count;
        self.count += 1;
        options.allow_others(registry::common_properties(model.name));
        let id = options.take("id");
        let boot_index = self.boot_index(&mut options).map_err(|e| fail(&e))?;
        let path = match &id {
            Some(id) => format!("/machine/peripheral/{id}"),
            None => format!("/machine/peripheral-anon/{}.{number}", model.name),
        };
        let mut ctx: DeviceContext<'_> = builder.context(&path);
        if let Some(bus) = &self.isa {
            ctx = ctx.with_attachment(bus.clone());
        }
        if let Some(controller) = &self.sata {
            ctx = ctx.with_attachment(controller.clone());
        }
        match &self.pci {
            Some(bus) => ctx = ctx.with_attachment(bus.clone()),
            None if model.name.ends_with("-pci") => {
                return Err(fail(&"this board has no PCI bus; use the model that ends in -device"));
            }
            None => {}
        }
        if let Some(console) = &self.console {
            ctx = ctx.with_attachment(console.clone());
        }
        let mut address = None;
        if model.name.ends_with("-device") {
            let Some(slots) = &mut self.slots else {
                return Err(fail(&"this board has no virtio-mmio slots; use the model that ends in -pci"));
            };
            let slot = slots.take(options.take("bus").as_deref()).map_err(|e| fail(&e))?;
            ctx = ctx.with_irq("irq", slots.irqs[slot as usize].clone());
            address = Some(slots.address(slot));
        } else if model.name.starts_with("ide-") {
            if let Some(bus) = options.take("bus") {
                let port = bus.strip_prefix("ide.").filter(|n| n.parse::<u32>().is_ok());
                let port = port.ok_or_else(|| fail(&format!("bus={bus}: the buses are ide.0, ide.1 and so on")))?;
                options.set("port", port)?;
            }
        } else {
            self.check_bus(options.take("bus").as_deref()).map_err(|e| fail(&e))?;
        }
        let before = self.pci.as_ref().map(|bus| bus.list());
        let ports = self.sata.as_ref().map_or_else(Vec::new, |sata| sata.ports_in_use());
        let device = (model.build)(&options, &mut ctx).map_err(|e| fail(&e))?;
        if let Some((address, registers)) = address.zip(ctx.region("regs").cloned()) {
            registers.map(address);
        }
        if let Some(index) = boot_index {
            let before = before.unwrap_or_default();
            let new = |bus: &Arc<PciBus>| bus.list().into_iter().find(|d| !before.contains(d));
            let port = |sata: &Arc<Ahci>| sata.ports_in_use().into_iter().find(|p| !ports.contains(p));
            let place = address.map(Place::Mmio).or_else(|| self.sata.as_ref().and_then(port).map(Place::Sata));
            let place = place.or_else(|| self.pci.as_ref().and_then(new).map(Place::Pci));
            self.add_to_boot_list(index, model.name, place).map_err(|e| fail(&e))?;
        }
        if let Some(console) = virtio_device_of::<VirtioConsole>(&*device) {
            self.console = Some(console);
        }
        builder.add_device(&path, device).map_err(|e| fail(&e))
    }

    /// Takes `bootindex=`.
    fn boot_index(&self, options: &mut Options) -> Result<Option<u32>, String> {
        let index = options.take("bootindex").map_or(Ok(None), |text| parse_index(&text))?;
        match index {
            Some(n) if self.boot_list.is_none() => {
                Err(format!("bootindex={n}: this board's firmware is not told what to boot from; leave it out"))
            }
            other => Ok(other),
        }
    }

    fn add_to_boot_list(&mut self, index: u32, model: &str, place: Option<Place>) -> Result<(), String> {
        let list = self.boot_list.as_mut();
        // What sits on neither bus is not booted from, which the list says for such a model.
        list.map_or(Ok(()), |list| list.add(index, model, place.unwrap_or(Place::Mmio(0))))
    }

    /// There is one PCI bus; what other models sit on has no name here.
    fn check_bus(&self, bus: Option<&str>) -> Result<(), String> {
        match (bus, &self.pci) {
            (Some(name), Some(pci)) if name.contains("pci") && name != pci.name() => {
                Err(format!("bus={name}: there is one PCI bus, {}", pci.name()))
            }
            _ => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slots_are_given_out_once() {
        let irqs = vec![IrqLine::disconnected(); 3];
        let mut slots = MmioSlots::new(0x1000, 0x200, irqs.clone());
        assert_eq!(slots.take(None), Ok(2));
        assert_eq!(slots.take(Some("virtio-mmio-bus.1")), Ok(1));
        assert!(slots.take(Some("virtio-mmio-bus.1")).unwrap_err().contains("in use"));
        assert!(slots.take(Some("virtio-mmio-bus.3")).unwrap_err().contains("to .2"));
        assert_eq!((slots.take(None), slots.used()), (Ok(0), vec![0, 1, 2]));
        assert!(slots.take(None).unwrap_err().contains("all 3"));
        assert_eq!(MmioSlots::new(0, 0, irqs).lowest_first().take(None), Ok(0));
    }
}
