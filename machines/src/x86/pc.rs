//! The `pc` (440FX, PIIX3) and `q35` (Q35, ICH9) boards.
//!
//! Addresses, interrupts and functions are those of QEMU's boards of these names, for
//! which their firmware is written (SeaBIOS, OVMF).

use std::sync::{Arc, Mutex};

use mimus_core::clock::ClockKind;
use mimus_core::device::lock;
use mimus_core::irq::{IrqLine, OrGate};
use mimus_core::memory::{DmaHandle, MemoryRegion};
use mimus_devices::acpi::pm::{self, AcpiPm, PmLayout, PmLines, Suspend};
use mimus_devices::block::ahci::Ahci;
use mimus_devices::input::i8042::{self, I8042, I8042Lines};
use mimus_devices::misc::i8257::{self, I8257};
use mimus_devices::misc::port92::{self, Port92};
use mimus_devices::misc::post::{self, PostPort};
use mimus_devices::pci::PciBus;
use mimus_devices::pci::host_bridge::{I440fx, PcMemory, Q35, i440fx, q35};
use mimus_devices::pci::southbridge::{Ich9Lpc, Piix3, Piix4Pm, PirqRouter, ich9, piix};
use mimus_devices::timer::hpet::{self, Hpet, HpetLines};
use mimus_devices::timer::mc146818::Mc146818;

use super::boot::{Sleep, Started};
use super::common::{self, GuestRequests};
use super::finish::{self, Parts};
use super::interrupts::{GSIS, Interrupts};
use super::options::{Kind, Options};
use super::pci_setup::{PIRQ_IRQS, PM_BASE, PciSetup};
use super::rom::{self, Firmware};
use super::{acpi, isa, layout, smm};
use crate::boards;
use crate::boot::x86::Memory;
use crate::config::MachineConfig;
use crate::machine::peripherals::Peripherals;
use crate::machine::{Host, Machine, MachineBuilder, MachineError};

/// System control interrupt.
const IRQ_SCI: u32 = 9;
/// First input of the I/O APIC that the PIRQs of Q35 are on.
const GSI_PIRQ: u32 = 16;
/// SLP_TYP of the sleep states.
const SLEEP: acpi::SleepStates =
    acpi::SleepStates { ram: pm::SLEEP_TYPE_RAM, disk: pm::SLEEP_TYPE_DISK, off: pm::SLEEP_TYPE_OFF };
/// Timers of the HPET.
const HPET_TIMERS: usize = 3;
/// Inputs of the I/O APIC that they can be routed to.
const HPET_ROUTES: u32 = 0xff_0000;
/// Serial ports there can be.
const SERIALS: usize = 4;

/// Builds a `pc`. It is paused and not powered on yet.
pub fn build_pc(config: &MachineConfig, host: Host<'_>) -> Result<Machine, MachineError> {
    build(Kind::Pc, config, host)
}

/// Builds a `q35`. It is paused and not powered on yet.
pub fn build_q35(config: &MachineConfig, host: Host<'_>) -> Result<Machine, MachineError> {
    build(Kind::Q35, config, host)
}

fn build(kind: Kind, config: &MachineConfig, host: Host<'_>) -> Result<Machine, MachineError> {
    let options = Options::parse(kind, config)?;
    let memory = layout::split(kind, config.memory, options.max_ram_below_4g);
    let (mut b, serials) = common::builder(kind, config, &options, memory, host)?;
    let ints = Interrupts::add(&mut b)?;
    let window = MemoryRegion::container("bios-window", rom::WINDOW_LEN);
    let firmware = rom::add(&mut b, config, &window, rom::PC_BIOS)?;
    let smm = smm::wanted(&b, &options, &firmware)?;
    // Those who read it know the ICH9's only.
    let features = if kind == Kind::Q35 { Some(smm::features(&mut b)?) } else { None };
    let smi = smm.then(|| smm::line(&b, features.clone()));
    let pm = add_pm(&mut b, kind, &ints, smi)?;
    let (bus, keep_map) = add_pci(&mut b, kind, &ints, &pm, memory, &window, smm)?;
    let serials = isa::add_serials(&mut b, &ints, config, &serials, SERIALS)?;
    let cmos = super::fw_cfg::cmos(memory, config.smp.cpus, &config.firmware.order);
    let (rtc, rtc_irq) = isa::add_rtc(&mut b, &ints, config, &cmos)?;
    lock(&rtc).connect_alarm(AcpiPm::alarm(&pm));
    if options.hpet {
        add_hpet(&mut b, &ints, &rtc, rtc_irq)?;
    }
    add_legacy(&mut b, &options, &ints)?;
    let mut peripherals = Peripherals::pci(bus.clone()).with_boot_list();
    peripherals.isa = Some(isa::bus(&b, &ints));
    if kind == Kind::Q35 {
        let sata = Ahci::new(&bus).map_err(|e| MachineError::other(e.to_string()))?;
        b.add_device("/machine/sata", sata.clone())?;
        peripherals.sata = Some(sata);
    }
    peripherals.add_configured(&mut b, config)?;
    let boot_list = peripherals.take_boot_list();

    let (mmio32, bits) = (layout::mmio32(kind, memory), common::phys_bits(&b, boards::guest(config)?));
    let platform =
        description(kind, &options, &serials, pm_base(kind, &firmware), mmio32, layout::mmio64(memory, bits));
    let apic_ids = (0..config.smp.cpus).collect();
    let tables = options.acpi.then(|| acpi::build(&acpi::Config { apic_ids, platform }));
    let pirq_of = if kind == Kind::Q35 { q35::pirq_of } else { i440fx::pirq_of };
    let setup = PciSetup { kind, bus, pm: pm.clone(), mmio32, pirq_of };
    let sleep = sleep(&pm, &rtc, keep_map);
    let parts = Parts {
        kind,
        config,
        memory,
        firmware: !matches!(firmware, Firmware::None),
        acpi: tables,
        sleep_states: options.acpi.then_some(SLEEP),
        boot_list,
        smi: features,
        cmdline: String::new(),
        set_up: Box::new(move || setup.run()),
        power_button: Box::new(move || {
            lock(&pm).press_power_button();
            true
        }),
        sleep: Some(sleep),
        started: Started::new(boot_order_after_once(rtc, config)),
    };
    finish::finish(b, ints, parts)
}

/// How it sleeps with its memory kept, and wakes.
fn sleep(pm: &Arc<Mutex<AcpiPm>>, rtc: &Arc<Mutex<Mc146818>>, keep_map: KeepMap) -> Sleep {
    /// The shutdown status byte of CMOS RAM, and what has firmware resume the system.
    const RESUME: (u8, u8) = (0x0f, 0xfe);
    let (asleep, pm, rtc) = (pm.clone(), pm.clone(), rtc.clone());
    Sleep {
        asleep: Box::new(move || lock(&asleep).is_asleep()),
        waking: Box::new(move || {
            lock(&rtc).set_ram(RESUME.0, RESUME.1);
            lock(&pm).wake();
            keep_map();
        }),
    }
}

/// What `-boot once=` named was tried: from now on it is `order=`.
fn boot_order_after_once(rtc: Arc<Mutex<Mc146818>>, config: &MachineConfig) -> impl Fn() + Send + 'static {
    let order = config.firmware.order.clone();
    move || {
        if order.once.is_some() {
            let bytes = super::fw_cfg::boot_bytes(order.order.as_ref());
            bytes.into_iter().for_each(|(at, value)| lock(&rtc).set_ram(at, value));
        }
    }
}

/// Where firmware places the power management block, which the tables name before it has: OVMF has a place of its own
/// for the PIIX4's.
fn pm_base(kind: Kind, firmware: &Firmware) -> u16 {
    const OVMF_PIIX4: u16 = 0xb000;
    if kind == Kind::Pc && firmware.is_uefi() { OVMF_PIIX4 } else { PM_BASE }
}

const fn pm_layout(kind: Kind) -> PmLayout {
    match kind {
        Kind::Q35 => pm::ICH9,
        _ => pm::PIIX4,
    }
}

fn add_pm(
    b: &mut MachineBuilder,
    kind: Kind,
    ints: &Interrupts,
    smi: Option<IrqLine>,
) -> Result<Arc<Mutex<AcpiPm>>, MachineError> {
    let requests = GuestRequests::new(b);
    let (sleep, wake) = (requests.clone(), requests.clone());
    let suspend = Suspend { sleep: Box::new(move || sleep.sleep()), wake: Box::new(move || wake.wake()) };
    let power_off = Box::new(move || requests.power_off());
    let lines = PmLines { sci: ints.line(IRQ_SCI), smi, power_off, suspend: Some(suspend) };
    let layout = pm_layout(kind);
    let events = layout.gpe_bytes;
    let apart = layout.gpe_offset.is_none();
    let device = AcpiPm::new(layout, lines, b.services().io_thread.timer(ClockKind::Virtual));
    b.map_pio("pm-apm", (pm::APM_PORT, pm::APM_PORTS), pm::RULES, pm::REGION_APM, device.clone())?;
    if apart {
        b.map_pio("pm-gpe", (piix::GPE_PORT, events), pm::RULES, pm::REGION_GPE, device.clone())?;
    }
    b.add_device("/machine/pm", device.clone())?;
    Ok(device)
}

/// Has the host bridge keep, at the next reset, what firmware counts on when it wakes a system.
type KeepMap = Box<dyn Fn() + Send>;

/// Host bridge and south bridge.
#[allow(clippy::too_many_arguments)]
fn add_pci(
    b: &mut MachineBuilder,
    kind: Kind,
    ints: &Interrupts,
    pm: &Arc<Mutex<AcpiPm>>,
    memory: Memory,
    rom: &MemoryRegion,
    smm: bool,
) -> Result<(Arc<PciBus>, KeepMap), MachineError> {
    let fail = |e: mimus_devices::pci::PciError| MachineError::other(e.to_string());
    let requests = GuestRequests::new(b);
    let reset = move || requests.reset();
    let io = b.ports().ok_or_else(|| MachineError::other("there are no ports"))?.root().clone();
    let (system, ram) = (b.memory().clone(), b.ram().clone());
    let parts = PcMemory { system: &system, io: &io, ram: &ram, ram_below_4g: memory.low, rom };
    let isa = (0..16).map(|n| ints.line(n)).collect();
    let msi = Some(ints.msi());
    if kind == Kind::Q35 {
        let direct = (0..ich9::PIRQS as u32).map(|n| ints.line(GSI_PIRQ + n)).collect();
        let pirqs = PirqRouter::new(ich9::PIRQS, isa, direct);
        let bridge = Q35::new("pcie.0", &parts, pirqs.inputs(), msi, reset).map_err(fail)?;
        let bus = bridge.bus().clone();
        b.add_pci_bus(&bus);
        if smm {
            smm::add(b, bridge.smm_overlay());
        }
        b.add_device("/machine/pcie.0/ports", bridge.ports().clone())?;
        b.add_device("/machine/pcie.0", bridge.clone())?;
        b.add_device("/machine/lpc", Ich9Lpc::new(&bus, system.root(), &pirqs, pm).map_err(fail)?)?;
        return Ok((bus, Box::new(move || bridge.keep_map())));
    }
    let pirqs = PirqRouter::new(piix::PIRQS, isa, Vec::new());
    let bridge = I440fx::new("pci.0", &parts, pirqs.inputs(), msi, reset).map_err(fail)?;
    let bus = bridge.bus().clone();
    b.add_pci_bus(&bus);
    if smm {
        smm::add(b, bridge.smm_overlay());
    }
    b.add_device("/machine/pci.0/ports", bridge.ports().clone())?;
    b.add_device("/machine/pci.0", bridge.clone())?;
    b.add_device("/machine/isa-bridge", Piix3::new(&bus, &pirqs).map_err(fail)?)?;
    b.add_device("/machine/pm-function", Piix4Pm::new(&bus, pm, smm).map_err(fail)?)?;
    Ok((bus, Box::new(move || bridge.keep_map())))
}

fn add_hpet(
    b: &mut MachineBuilder,
    ints: &Interrupts,
    rtc: &Arc<Mutex<Mc146818>>,
    rtc_irq: IrqLine,
) -> Result<(), MachineError> {
    let routable = |n: u32| HPET_ROUTES >> n & 1 != 0;
    let input = |n: u32| if routable(n) { ints.line(n) } else { IrqLine::disconnected() };
    let lines = HpetLines {
        inputs: (0..GSIS).map(input).collect(),
        routable: HPET_ROUTES,
        irq0: ints.timer.clone(),
        irq8: rtc_irq,
        replace: [ints.timer_replaced.clone(), Mc146818::replaced(rtc)],
        fsb: None,
    };
    let device = Hpet::new(HPET_TIMERS, lines, b.services().io_thread.timer(ClockKind::Virtual));
    b.add_mmio("/machine/hpet", (hpet::BASE, hpet::SIZE), hpet::RULES, device)
}

/// Keyboard controller, port 0x92, DMA controllers, the POST port.
fn add_legacy(b: &mut MachineBuilder, options: &Options, ints: &Interrupts) -> Result<(), MachineError> {
    // Either may open A20.
    let a20 = OrGate::new(smm::a20_gate(b));
    let requests = GuestRequests::new(b);
    if options.i8042 {
        let reset = requests.clone();
        let lines = I8042Lines { keyboard: ints.line(1), mouse: ints.line(12), a20: a20.input() };
        let device = I8042::new(lines, Box::new(move || reset.reset()));
        b.map_pio("i8042-data", (0x60, 1), i8042::RULES, i8042::REGION_DATA, device.clone())?;
        b.map_pio("i8042-command", (0x64, 1), i8042::RULES, i8042::REGION_COMMAND, device.clone())?;
        b.add_input(I8042::sink(&device));
        b.add_device("/machine/i8042", device)?;
    } else {
        // Where its output would be, the line is pulled up.
        a20.input().raise();
    }
    let device = Port92::new(a20.input(), move || requests.reset());
    b.add_pio("/machine/port92", (port92::PORT, 1), port92::RULES, device)?;
    b.add_pio("/machine/post", (post::PORT, 1), post::RULES, PostPort::new())?;
    let dma = I8257::new(DmaHandle::ungated(b.memory().clone()));
    let regions = [i8257::REGION_BYTES, i8257::REGION_WORDS, i8257::REGION_PAGES];
    for ((region, base), len) in regions.into_iter().zip([0x00, 0xc0, 0x81]).zip(i8257::PORTS) {
        b.map_pio("i8257", (base, len), i8257::RULES, region, dma.clone())?;
    }
    b.add_device("/machine/i8257", dma)
}

fn description(
    kind: Kind,
    options: &Options,
    serials: &[bool],
    pm_base: u16,
    mmio32: acpi::Window,
    mmio64: Option<acpi::Window>,
) -> acpi::Platform {
    let layout = pm_layout(kind);
    let q35 = kind == Kind::Q35;
    let mut level_irqs = PIRQ_IRQS.to_vec();
    level_irqs.push(5);
    level_irqs.sort_unstable();
    level_irqs.dedup();
    let serial = |i: usize| serials.get(i) == Some(&true);
    acpi::Platform::Pc(acpi::Pc {
        chipset: if q35 { acpi::Chipset::Q35 } else { acpi::Chipset::I440fx },
        pm_base,
        gpe0: layout.gpe_offset.map_or(piix::GPE_PORT, |at| pm_base + at as u16),
        gpe0_len: layout.gpe_bytes as u8,
        sci: IRQ_SCI as u8,
        smi: Some(acpi::SmiCommand {
            port: pm::APM_PORT,
            acpi_enable: pm::ACPI_ENABLE,
            acpi_disable: pm::ACPI_DISABLE,
        }),
        level_irqs,
        mmio32,
        mmio64,
        ecam: q35.then_some(layout::ECAM),
        hpet: options.hpet.then(|| (hpet::BASE, hpet::block_id(HPET_TIMERS))),
        serials: [serial(0), serial(1)],
        i8042: options.i8042,
        sleep: SLEEP,
    })
}
