//! The `virt` board: RAM, ACLINT, PLIC, a 16550A, an RTC, a test finisher, eight
//! virtio-mmio slots and a PCI Express root, where software written for QEMU's board of
//! that name expects them.

use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use mimus_core::accel::{CpuPin, ResetCause, ShutdownCause};
use mimus_core::arch::{CpuModel, GuestArch};
use mimus_core::backend::CharBackend;
use mimus_core::clock::ClockKind;
use mimus_core::irq::{IrqController, IrqLine};
use mimus_devices::char::ns16550::{self, Ns16550};
use mimus_devices::irqchip::aclint::{self, Aclint};
use mimus_devices::irqchip::plic::{self, Plic, PlicTarget};
use mimus_devices::misc::syscon::{self, Syscon, SysconRequest};
use mimus_devices::pci::PciBus;
use mimus_devices::pci::host_bridge::{Gpex, GpexWindows};
use mimus_devices::timer::goldfish_rtc::{self, GoldfishRtc};

use super::boot::VirtBoot;
use super::fdt::FdtConfig;
use super::sbi::Sbi;
use super::{firmware, map};
use crate::config::keyval::nearest;
use crate::config::{Bios, ConfigError, MachineConfig, Rtc};
use crate::machine::peripherals::{MmioSlots, Peripherals};
use crate::machine::{
    Host, Hypercalls, Machine, MachineBuilder, MachineControl, MachineError, MachineSpec, Policy, RamRange, Request,
    time,
};

/// Most harts.
pub const MAX_HARTS: u32 = 8;

/// Builds the machine `config` describes. It is paused and not powered on yet.
pub fn build(config: &MachineConfig, host: Host<'_>) -> Result<Machine, MachineError> {
    check(config)?;
    let cpu = match &config.cpu {
        Some(text) => CpuModel::parse(GuestArch::Riscv64, text),
        None => host.accel.default_cpu(GuestArch::Riscv64),
    };
    let cpu = cpu.map_err(|e| MachineError::other(format!("-cpu: {e}")))?;
    let builder = MachineBuilder::new(MachineSpec {
        board: "riscv64-virt",
        arch: GuestArch::Riscv64,
        accel: host.accel,
        accel_options: host.accel_options,
        cpu,
        smp: config.smp.cpus,
        ram: vec![RamRange { base: map::DRAM_BASE, len: config.memory }],
        host_memory: &config.host_memory,
        ports: false,
        irqchip: None,
        emulation_failure: host.emulation_failure,
        io: host.io,
    })?;
    let serial = match host.serials.iter().flatten().next() {
        Some(id) => Some(builder.context("/machine/serial").char_backend(id)?),
        None => None,
    };
    let plic = Plic::new(map::PLIC_SOURCES, plic_targets(&builder));
    let irqs = Plic::irqs(&plic);
    let mut board = Virt { builder, irqs };
    board.interrupt_controllers(plic)?;
    board.platform_devices(serial.clone(), &config.rtc)?;
    let pci = board.pci(config.memory)?;
    let slots = (0..map::VIRTIO_SLOTS).map(|i| board.irq(map::IRQ_VIRTIO + i)).collect();
    let slots = MmioSlots::new(map::VIRTIO.base, map::VIRTIO.size, slots);
    let mut peripherals = Peripherals::mmio(slots, Some(pci));
    peripherals.add_configured(&mut board.builder, config)?;
    if let Some(slots) = &peripherals.slots {
        slots.map_empty(&board.builder);
    }
    let flash = firmware::add_flash(&mut board.builder, config)?;
    firmware::add_fw_cfg(&mut board.builder, config, flash)?;
    board.finish(config, serial, flash)
}

/// What the configuration asks for that this board cannot be.
fn check(config: &MachineConfig) -> Result<(), MachineError> {
    let cpus = config.smp.cpus;
    if !(1..=MAX_HARTS).contains(&cpus) {
        let reason = format!("the virt board has 1 to {MAX_HARTS} CPUs; use -smp {}", cpus.clamp(1, MAX_HARTS));
        return Err(ConfigError::new("-smp", &cpus.to_string(), reason).into());
    }
    if config.serials.len() > 1 {
        return Err(ConfigError::new("-serial", "", "the virt board has one serial port").into());
    }
    // Properties of QEMU's board that are here with one value only.
    const FIXED: &[(&str, &[&str])] = &[
        ("acpi", &["off", "auto"]),
        ("aclint", &["off"]),
        ("aia", &["none"]),
        ("usb", &["off"]),
        ("iommu-sys", &["off", "auto"]),
    ];
    for (key, value) in &config.machine.options {
        let reason = match FIXED.iter().find(|(k, _)| k == key) {
            Some((_, values)) if values.contains(&value.as_str()) => continue,
            Some((_, values)) => format!("only {key}={} is there", values[0]),
            None => {
                let near = nearest(key, FIXED.iter().map(|f| f.0));
                let hint = near.map_or(String::new(), |n| format!(" (did you mean {n}?)"));
                format!("the virt board has no property '{key}'{hint}")
            }
        };
        return Err(ConfigError::new("-machine", &format!("{key}={value}"), reason).into());
    }
    Ok(())
}

fn plic_targets(builder: &MachineBuilder) -> Vec<PlicTarget> {
    let target = |vcpu: &Arc<_>, pin| PlicTarget { vcpu: Arc::clone(vcpu), pin };
    builder.vcpus().iter().flat_map(|v| [target(v, CpuPin::Meip), target(v, CpuPin::Seip)]).collect()
}

/// What the guest asks of the test finisher or the SBI, as requests to the machine.
fn guest_requests(control: &MachineControl) -> impl Fn(SysconRequest) + Clone + Send + Sync + 'static {
    let control = control.clone();
    move |request| {
        control.guest_request(match request {
            SysconRequest::PowerOff => Request::Shutdown(ShutdownCause::GuestPowerOff),
            SysconRequest::Reset => Request::Reset(ResetCause::Guest),
            SysconRequest::Fail(code) => Request::Shutdown(ShutdownCause::GuestExit(code.into())),
        });
    }
}

struct Virt {
    builder: MachineBuilder,
    irqs: Arc<dyn IrqController>,
}

fn span(range: map::Range) -> (u64, u64) {
    (range.base, range.size)
}

impl Virt {
    fn irq(&self, source: u32) -> IrqLine {
        IrqLine::new(self.irqs.clone(), source)
    }

    fn interrupt_controllers(&mut self, plic: Arc<std::sync::Mutex<Plic>>) -> Result<(), MachineError> {
        let b = &mut self.builder;
        b.add_mmio("/machine/plic", span(map::PLIC), plic::RULES, plic)?;
        let harts = b.vcpus().to_vec();
        let timers = harts.iter().map(|_| b.services().io_thread.timer(ClockKind::Virtual)).collect();
        let aclint = Aclint::new(harts, timers, map::TICK_NS);
        b.add_mmio("/machine/aclint", span(map::CLINT), aclint::RULES, aclint)
    }

    fn platform_devices(&mut self, serial: Option<Arc<dyn CharBackend>>, rtc: &Rtc) -> Result<(), MachineError> {
        let uart = Ns16550::new(self.irq(map::IRQ_UART), serial);
        let (timer, offset) = time::rtc(self.builder.services(), rtc)?;
        // The device adds modulo 2^64.
        let rtc = GoldfishRtc::new(self.irq(map::IRQ_RTC), timer, offset as u64);
        let b = &mut self.builder;
        b.add_mmio("/machine/serial", span(map::UART), ns16550::RULES, uart)?;
        b.add_mmio("/machine/rtc", span(map::RTC), goldfish_rtc::RULES, rtc)?;
        let finisher = Syscon::new(guest_requests(b.control()));
        b.add_mmio("/machine/test-finisher", span(map::TEST), syscon::RULES, finisher)?;
        b.add_rom("mrom", span(map::MROM), &[]).map(drop)
    }

    fn pci(&mut self, ram: u64) -> Result<Arc<PciBus>, MachineError> {
        let windows = GpexWindows {
            ecam: span(map::PCIE_ECAM),
            mmio32: span(map::PCIE_MMIO),
            mmio64: Some(span(map::pcie_mmio_high(ram))),
            pio: Some(span(map::PCIE_PIO)),
        };
        let irqs = std::array::from_fn(|i| self.irq(map::IRQ_PCIE + i as u32));
        let bridge = Gpex::new("pcie.0", self.builder.memory(), &windows, irqs, None);
        let bridge = bridge.map_err(|e| MachineError::other(e.to_string()))?;
        self.builder.add_device("/machine/pcie.0", bridge.function().clone())?;
        self.builder.add_pci_bus(bridge.bus());
        Ok(bridge.bus().clone())
    }

    fn finish(
        mut self,
        config: &MachineConfig,
        serial: Option<Arc<dyn CharBackend>>,
        flash: bool,
    ) -> Result<Machine, MachineError> {
        let firmware: Option<Arc<dyn Hypercalls>> = match config.boot.bios {
            Bios::Default => Some(self.sbi(serial)?),
            Bios::None | Bios::File(_) => None,
        };
        let mut config = config.clone();
        if flash {
            // Firmware in flash gets them through fw_cfg, and loads them itself.
            (config.boot.kernel, config.boot.initrd) = (None, None);
        }
        let board = VirtBoot { fdt: self.fdt(&config), config: config.clone(), flash, used: AtomicBool::new(false) };
        let policy = Policy { no_reboot: config.no_reboot, no_shutdown: config.no_shutdown };
        self.builder.finish(Box::new(board), firmware, policy)
    }

    fn sbi(&mut self, serial: Option<Arc<dyn CharBackend>>) -> Result<Arc<Sbi>, MachineError> {
        let b = &mut self.builder;
        let timers = |v: &Arc<_>| (Arc::clone(v), b.services().io_thread.timer(ClockKind::Virtual));
        let harts = b.vcpus().iter().map(timers).collect();
        let threads = b.threads().clone();
        let sbi = Sbi::new(harts, serial, guest_requests(b.control()), move |hart| threads.power_off(hart));
        b.add_device("/machine/sbi", sbi.clone())?;
        Ok(sbi)
    }

    fn fdt(&self, config: &MachineConfig) -> FdtConfig {
        let cpu = self.builder.cpu().as_riscv();
        FdtConfig {
            harts: config.smp.cpus,
            isa: cpu.map(|c| c.features.isa_string()).unwrap_or_default(),
            extensions: cpu.map(|c| c.features.iter().map(|e| e.name().to_owned()).collect()).unwrap_or_default(),
            mmu: cpu.map_or("sv39", |c| c.mmu.name()),
            ram: config.memory,
            bootargs: config.boot.append.clone(),
            initrd: None,
            rng_seed: [0; 32],
            reserved: None,
            machine_mode: config.boot.bios != Bios::Default,
            fw_cfg: true,
            flash: true,
            pcie: true,
        }
    }
}
