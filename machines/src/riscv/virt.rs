//! The `virt` board: RAM, ACLINT, PLIC, a 16550A, an RTC, a test finisher, eight
//! virtio-mmio slots and a PCI Express root, where software written for QEMU's board of
//! that name expects them.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use mimus_core::accel::{Accelerator, CpuPin, ResetCause, ShutdownCause};
use mimus_core::arch::{CpuModel, GuestArch};
use mimus_core::backend::CharBackend;
use mimus_core::clock::ClockKind;
use mimus_core::device::{DeviceContext, Options};
use mimus_core::irq::{IrqController, IrqLine};
use mimus_devices::char::ns16550::{self, Ns16550};
use mimus_devices::irqchip::aclint::{self, Aclint};
use mimus_devices::irqchip::plic::{self, Plic, PlicTarget};
use mimus_devices::misc::syscon::{self, Syscon, SysconRequest};
use mimus_devices::pci::PciBus;
use mimus_devices::pci::host_bridge::{Gpex, GpexWindows};
use mimus_devices::timer::goldfish_rtc::{self, GoldfishRtc};
use mimus_devices::virtio::console::VirtioConsole;
use mimus_devices::virtio::transport::mmio::EmptySlot;
use mimus_devices::virtio::virtio_device_of;

use super::boot::VirtBoot;
use super::fdt::FdtConfig;
use super::{firmware, map};
use super::sbi::Sbi;
use crate::config::keyval::nearest;
use crate::config::{Bios, ConfigError, DriveInterface, MachineConfig, Rtc, RtcBase, RtcClock};
use crate::machine::backends::{DEFAULT_NETWORK, default_network, drive_id, nic_id};
use crate::machine::{HostIo, Hypercalls, Machine, MachineBuilder, MachineControl, MachineError, MachineSpec, Policy, Request};
use crate::registry;

/// Most harts.
pub const MAX_HARTS: u32 = 8;

/// What the host gives a machine.
pub struct Host<'a> {
    /// How guest code is run.
    pub accel: &'a dyn Accelerator,
    /// `-accel` options.
    pub accel_options: BTreeMap<String, String>,
    /// Clocks and I/O thread; disks, networks and character devices by their names in the
    /// configuration.
    pub io: HostIo,
    /// The character device of the serial port.
    pub serial: Option<String>,
}

/// Builds the machine `config` describes. It is paused and not powered on yet.
pub fn build(config: &MachineConfig, host: Host<'_>) -> Result<Machine, MachineError> {
    check(config)?;
    let cpu = match &config.cpu {
        Some(text) => CpuModel::parse(GuestArch::Riscv64, text),
        None => CpuModel::default_for(GuestArch::Riscv64),
    };
    let cpu = cpu.map_err(|e| MachineError::other(format!("-cpu: {e}")))?;
    let builder = MachineBuilder::new(MachineSpec {
        board: "riscv64-virt",
        arch: GuestArch::Riscv64,
        accel: host.accel,
        accel_options: host.accel_options,
        cpu,
        smp: config.smp.cpus,
        ram_base: map::DRAM_BASE,
        ram_size: config.memory,
        io: host.io,
    })?;
    let serial = match &host.serial {
        Some(id) => Some(builder.context("/machine/serial").char_backend(id)?),
        None => None,
    };
    let plic = Plic::new(map::PLIC_SOURCES, plic_targets(&builder));
    let irqs = Plic::irqs(&plic);
    let mut board = Virt { builder, irqs, slots: (0..map::VIRTIO_SLOTS).collect(), console: None, devices: 0 };
    board.interrupt_controllers(plic)?;
    board.platform_devices(serial.clone(), &config.rtc)?;
    let pci = board.pci(config.memory)?;
    board.configured_devices(config, &pci)?;
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
    const FIXED: &[(&str, &[&str])] =
        &[("acpi", &["off", "auto"]), ("aclint", &["off"]), ("aia", &["none"]), ("usb", &["off"]), ("iommu-sys", &["off", "auto"])];
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
    /// Free virtio-mmio slots, lowest first.
    slots: Vec<u32>,
    /// The console a `virtconsole` is plugged into.
    console: Option<Arc<VirtioConsole>>,
    /// `-device`s so far.
    devices: u32,
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
        let (timer, offset) = self.rtc_time(rtc)?;
        let rtc = GoldfishRtc::new(self.irq(map::IRQ_RTC), timer, offset);
        let b = &mut self.builder;
        b.add_mmio("/machine/serial", span(map::UART), ns16550::RULES, uart)?;
        b.add_mmio("/machine/rtc", span(map::RTC), goldfish_rtc::RULES, rtc)?;
        let finisher = Syscon::new(guest_requests(b.control()));
        b.add_mmio("/machine/test-finisher", span(map::TEST), syscon::RULES, finisher)?;
        b.add_rom("mrom", span(map::MROM), &[]).map(drop)
    }

    /// The clock behind the RTC, and what is added to it, in ns.
    fn rtc_time(&self, rtc: &Rtc) -> Result<(mimus_core::clock::Timer, u64), MachineError> {
        let services = self.builder.services();
        let kind = match rtc.clock {
            RtcClock::Host => ClockKind::Host,
            RtcClock::Rt => ClockKind::Realtime,
            RtcClock::Vm => ClockKind::Virtual,
        };
        let timer = services.io_thread.timer(kind);
        let base = match rtc.base {
            RtcBase::Utc => services.clocks.get(ClockKind::Host).now(),
            RtcBase::Seconds(s) => u64::try_from(s).unwrap_or(0).saturating_mul(1_000_000_000),
            RtcBase::Localtime => {
                let reason = "guests of this board keep the clock in UTC; use base=utc, or a date";
                return Err(ConfigError::new("-rtc", "base=localtime", reason).into());
            }
        };
        let offset = if (rtc.base, rtc.clock) == (RtcBase::Utc, RtcClock::Host) { 0 } else { base.wrapping_sub(timer.now()) };
        Ok((timer, offset))
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
        Ok(bridge.bus().clone())
    }

    /// Devices of `-drive if=virtio`, `-device` and `-nic`, and the default card.
    fn configured_devices(&mut self, config: &MachineConfig, pci: &Arc<PciBus>) -> Result<(), MachineError> {
        for (i, drive) in config.drives.iter().enumerate() {
            match drive.interface {
                DriveInterface::Virtio => {
                    let mut options = Options::new();
                    options.set("drive", &drive_id(i, drive))?;
                    if let Some(serial) = &drive.serial {
                        options.set("serial", serial)?;
                    }
                    self.add_model("-drive", "virtio-blk-device", options, pci)?;
                }
                // A device's, or a bank of the flash (super::firmware).
                DriveInterface::None | DriveInterface::Pflash => {}
            }
        }
        for text in &config.devices {
            let (driver, options) = Options::parse_with_first(text, "driver")?;
            let driver = driver.ok_or_else(|| ConfigError::new("-device", text, "the name is missing; see -device help"))?;
            self.add_model("-device", &driver, options, pci)?;
        }
        for (i, nic) in config.nics.iter().enumerate().filter(|(_, n)| n.backend.is_some()) {
            let mut options = Options::new();
            options.set("netdev", &nic_id(i, nic.id.as_deref()))?;
            if let Some(mac) = nic.mac {
                options.set("mac", &mimus_core::backend::MacAddress(mac).to_string())?;
            }
            let model = match nic.model.as_deref() {
                None | Some("virtio") => "virtio-net-device",
                Some(model) => model,
            };
            self.add_model("-nic", model, options, pci)?;
        }
        if default_network(config) {
            let mut options = Options::new();
            options.set("netdev", DEFAULT_NETWORK)?;
            self.add_model("-nic", "virtio-net-device", options, pci)?;
        }
        Ok(())
    }

    fn add_model(&mut self, option: &str, driver: &str, mut options: Options, pci: &Arc<PciBus>) -> Result<(), MachineError> {
        let fail = |e: &dyn std::fmt::Display| MachineError::other(format!("{option} {driver}: {e}"));
        let model = registry::find(driver).map_err(|e| MachineError::other(format!("{option}: {e}")))?;
        let number = self.devices;
        self.devices += 1;
        let id = options.take("id");
        let bus = options.take("bus");
        let path = match &id {
            Some(id) => format!("/machine/peripheral/{id}"),
            None => format!("/machine/peripheral-anon/{}.{number}", model.name),
        };
        let slot = match model.name.strip_suffix("-device") {
            Some(_) => Some(self.take_slot(bus.as_deref()).map_err(|e| fail(&e))?),
            None => None,
        };
        let irq = slot.map(|s| self.irq(map::IRQ_VIRTIO + s));
        let mut ctx: DeviceContext<'_> = self.builder.context(&path).with_attachment(pci.clone());
        if let Some(irq) = irq {
            ctx = ctx.with_irq("irq", irq);
        }
        if let Some(console) = &self.console {
            ctx = ctx.with_attachment(console.clone());
        }
        let device = (model.build)(&options, &mut ctx).map_err(|e| fail(&e))?;
        if let Some((slot, registers)) = slot.zip(ctx.region("regs").cloned()) {
            registers.map(map::VIRTIO.base + u64::from(slot) * map::VIRTIO.size);
        }
        if let Some(console) = virtio_device_of::<VirtioConsole>(&*device) {
            self.console = Some(console);
        }
        self.builder.add_device(&path, device).map_err(|e| fail(&e))
    }

    /// The first device gets the highest slot: guests look at them from there down.
    fn take_slot(&mut self, bus: Option<&str>) -> Result<u32, String> {
        let Some(bus) = bus else {
            return self.slots.pop().ok_or_else(|| {
                format!("all {} virtio-mmio slots are in use; use the model that ends in -pci", map::VIRTIO_SLOTS)
            });
        };
        let slot = bus.strip_prefix("virtio-mmio-bus.").and_then(|n| n.parse::<u32>().ok());
        let slot = slot.filter(|s| *s < map::VIRTIO_SLOTS);
        let slot = slot.ok_or_else(|| format!("bus={bus}: the buses are virtio-mmio-bus.0 to .{}", map::VIRTIO_SLOTS - 1))?;
        let at = self.slots.iter().position(|s| *s == slot).ok_or_else(|| format!("bus={bus} is in use"))?;
        Ok(self.slots.remove(at))
    }

    fn finish(
        mut self,
        config: &MachineConfig,
        serial: Option<Arc<dyn CharBackend>>,
        flash: bool,
    ) -> Result<Machine, MachineError> {
        for slot in &self.slots {
            self.builder.map(map::VIRTIO.base + u64::from(*slot) * map::VIRTIO.size, &EmptySlot::region());
        }
        let firmware: Option<Arc<dyn Hypercalls>> = match config.boot.bios {
            Bios::Default => Some(self.sbi(serial)?),
            Bios::None | Bios::File(_) => None,
        };
        let mut config = config.clone();
        if flash {
            // Firmware in flash gets them through fw_cfg, and loads them itself.
            (config.boot.kernel, config.boot.initrd) = (None, None);
        }
        let board = VirtBoot {
            fdt: self.fdt(&config),
            config: config.clone(),
            flash,
            used: AtomicBool::new(false),
        };
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
