//! The `microvm` board: no PCI, no legacy chips but interrupt controllers, interval timer,
//! clock and a serial port; virtio-mmio devices; hardware-reduced ACPI with a generic event
//! device, or the kernel's command line instead. It does not sleep (S3): nothing of it but the power button could wake it.
//!
//! Addresses and interrupts are those of QEMU's board of that name (its documentation,
//! `system/i386/microvm`, and its DSDT are the interface).

use mimus_core::device::lock;
use mimus_core::memory::MemoryRegion;
use mimus_devices::acpi::ged::{self, Ged, GedRequest};

use super::boot::Started;
use super::common::{self, GuestRequests};
use super::finish::{self, Parts};
use super::interrupts::Interrupts;
use super::options::{Kind, Options};
use super::rom::{self, Firmware};
use super::{acpi, isa, layout};
use crate::config::MachineConfig;
use crate::machine::peripherals::{MmioSlots, Peripherals};
use crate::machine::{Host, Machine, MachineBuilder, MachineError};

/// The virtio-mmio slots.
const VIRTIO_BASE: u64 = 0xfeb0_0000;
const VIRTIO_STRIDE: u64 = 0x200;
const VIRTIO_SLOTS: u32 = 8;
/// Their interrupts where ACPI says so: the I/O APIC's own inputs.
const VIRTIO_IRQ_ACPI: u32 = 16;
/// Without ACPI: ISA ones from 5 on, but for the clock's.
const VIRTIO_IRQ_ISA: [u32; VIRTIO_SLOTS as usize] = [5, 6, 7, 14, 9, 10, 11, 12];
/// The generic event device.
const GED_EVENT: u64 = 0xfea0_0000;
const GED_REGISTERS: u64 = 0xfea0_0200;
const GED_IRQ: u32 = 9;
/// The BIOS of a machine that has no kernel.
const BIOS: &str = "bios-microvm.bin";

/// Builds the machine `config` describes. It is paused and not powered on yet.
pub fn build(config: &MachineConfig, host: Host<'_>) -> Result<Machine, MachineError> {
    let kind = Kind::Microvm;
    let options = Options::parse(kind, config)?;
    let memory = layout::split(kind, config.memory, options.max_ram_below_4g);
    let (mut b, serials) = common::builder(kind, config, &options, memory, host)?;
    let ints = Interrupts::add(&mut b)?;
    let ports = if options.isa_serial { 1 } else { 0 };
    let serials = isa::add_serials(&mut b, &ints, config, &serials, ports)?;
    if options.rtc {
        isa::add_rtc(&mut b, &ints, config, &super::fw_cfg::cmos(memory, config.smp.cpus, &config.firmware.order))?;
    }
    let ged = if options.acpi { Some(add_ged(&mut b, &ints)?) } else { None };
    let window = bios_window(&b);
    let firmware = rom::add(&mut b, config, &window, BIOS)?;
    show_window(&b, &firmware, &window);

    let lines = (0..VIRTIO_SLOTS).map(|i| ints.line(virtio_irq(i, options.acpi))).collect();
    let slots = MmioSlots::new(VIRTIO_BASE, VIRTIO_STRIDE, lines);
    let mut peripherals = Peripherals::mmio(slots, None).with_boot_list();
    peripherals.isa = Some(isa::bus(&b, &ints));
    peripherals.add_configured(&mut b, config)?;
    let boot_list = peripherals.take_boot_list();
    let used = peripherals.slots.map_or_else(Vec::new, |slots| {
        slots.map_empty(&b);
        slots.used()
    });

    let tables = options.acpi.then(|| acpi::build(&description(config, &options, &serials)));
    let cmdline = match options.acpi || !options.auto_kernel_cmdline {
        true => String::new(),
        false => virtio_arguments(&used),
    };
    let parts = Parts {
        kind,
        config,
        memory,
        firmware: !matches!(firmware, Firmware::None),
        acpi: tables,
        sleep_states: None,
        boot_list,
        smi: None,
        cmdline,
        set_up: Box::new(|| ()),
        power_button: Box::new(move || {
            let pressed = ged.as_ref().map(|ged| lock(ged).press_power_button());
            pressed.is_some()
        }),
        sleep: None,
        started: Started::new(|| {}),
    };
    finish::finish(b, ints, parts)
}

fn add_ged(b: &mut MachineBuilder, ints: &Interrupts) -> Result<std::sync::Arc<std::sync::Mutex<Ged>>, MachineError> {
    let requests = GuestRequests::new(b);
    let device = Ged::new(ints.line(GED_IRQ), move |request| match request {
        GedRequest::PowerOff => requests.power_off(),
        GedRequest::Reset => requests.reset(),
    });
    let blocks = [
        (GED_EVENT, ged::EVENTS_SIZE, ged::EVENTS_RULES, ged::REGION_EVENTS),
        (GED_REGISTERS, ged::REGISTERS_SIZE, ged::REGISTERS_RULES, ged::REGION_REGISTERS),
    ];
    for (base, len, rules, number) in blocks {
        let region = MemoryRegion::mmio("ged", len, rules);
        if let Some(binding) = region.binding() {
            binding.bind_mmio(device.clone(), number);
        }
        b.map(base, &region);
    }
    b.add_device("/machine/ged", device.clone())?;
    Ok(device)
}

/// Where the end of a ROM is seen below 1 MiB.
fn bios_window(_b: &MachineBuilder) -> MemoryRegion {
    MemoryRegion::container("bios-window", rom::WINDOW_LEN)
}

/// Nothing hides RAM there but a ROM.
fn show_window(b: &MachineBuilder, firmware: &Firmware, window: &MemoryRegion) {
    if !matches!(firmware, Firmware::None) {
        let root = b.memory().root().clone();
        b.services().map.change(|t| {
            t.map_with_priority(&root, rom::WINDOW_BASE, 1, window);
        });
    }
}

fn description(config: &MachineConfig, options: &Options, serials: &[bool]) -> acpi::Config {
    let slot = |i: u32| (VIRTIO_BASE + u64::from(i) * VIRTIO_STRIDE, virtio_irq(i, true));
    acpi::Config {
        apic_ids: (0..config.smp.cpus).collect(),
        platform: acpi::Platform::Microvm(acpi::Microvm {
            ged_event: GED_EVENT,
            ged_registers: GED_REGISTERS,
            ged_irq: GED_IRQ,
            virtio: (0..VIRTIO_SLOTS).map(slot).collect(),
            rtc: options.rtc,
            serial: serials.first() == Some(&true),
            fw_cfg: true,
        }),
    }
}

fn virtio_irq(slot: u32, acpi: bool) -> u32 {
    if acpi { VIRTIO_IRQ_ACPI + slot } else { VIRTIO_IRQ_ISA[slot as usize] }
}

/// The devices for a kernel without ACPI (Linux `virtio_mmio.device=`).
fn virtio_arguments(slots: &[u32]) -> String {
    let one = |i: &u32| {
        let base = VIRTIO_BASE + u64::from(*i) * VIRTIO_STRIDE;
        format!("virtio_mmio.device={VIRTIO_STRIDE}@{base:#x}:{}", virtio_irq(*i, false))
    };
    slots.iter().map(one).collect::<Vec<_>>().join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn arguments_for_a_kernel_without_acpi() {
        assert_eq!(
            virtio_arguments(&[6, 7]),
            "virtio_mmio.device=512@0xfeb00c00:11 virtio_mmio.device=512@0xfeb00e00:12"
        );
        assert_eq!(virtio_arguments(&[]), "");
    }
}
