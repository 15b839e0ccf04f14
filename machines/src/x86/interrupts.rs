//! The interrupt controllers of a PC and its interval timer, whoever runs them: the
//! accelerator all of them, the accelerator the local APICs only, or the models.
//!
//! A global system interrupt below 16 is an input of both the PIC pair and the I/O APIC
//! (where 0 is on input 2, MADT); those from 16 on are the I/O APIC's alone.

use std::sync::{Arc, Mutex, OnceLock, Weak};

use mimus_core::accel::irqchip::PIC_SCHEMA;
use mimus_core::accel::{CpuPin, IrqChip, IrqChipMode, ResetKind, StartRequest, SysReg, VcpuHandle, VcpuIndex};
use mimus_core::arch::x86::irqchip::PicState;
use mimus_core::bus::MemTxResult;
use mimus_core::bus::Requester;
use mimus_core::clock::ClockKind;
use mimus_core::device::{Device, lock};
use mimus_core::irq::{IrqController, IrqLine, MsiTarget, OrGate};
use mimus_core::snapshot::{Payload, SnapshotError};
use mimus_core::vcpu::VcpuThreads;
use mimus_devices::irqchip::i8259::{self, I8259};
use mimus_devices::irqchip::ioapic::{self, IoApic};
use mimus_devices::irqchip::lapic::{self, LapicCpu, LapicLinks, Lapics, Processors};
use mimus_devices::timer::i8254::{self, I8254};

use crate::machine::{CpuInterrupts, MachineBuilder, MachineError};

/// Global system interrupts of a PC.
pub const GSIS: u32 = ioapic::PINS;

/// The controllers, wired.
pub struct Interrupts {
    /// One for each global system interrupt: several devices may share one.
    gates: Vec<Arc<OrGate>>,
    /// Takes messages.
    apics: Arc<dyn IrqController>,
    /// The PIC pair, whoever runs it.
    pub pic: Arc<dyn Device>,
    /// The line of the interval timer.
    pub timer: IrqLine,
    /// While high, an HPET has the interval timer's interrupt.
    pub timer_replaced: IrqLine,
    /// What vCPUs ask of controllers here.
    pub hooks: Option<Arc<dyn CpuInterrupts>>,
    /// All vCPUs are to be powered on: INIT and start-up IPIs are the accelerator's.
    pub accelerator_starts: bool,
}

impl Interrupts {
    /// A wire to a global system interrupt, which is asserted while any of its wires is.
    ///
    /// # Panics
    /// If there is no such interrupt.
    pub fn line(&self, gsi: u32) -> IrqLine {
        self.gates[gsi as usize].input()
    }

    /// The way to send messages.
    pub fn msi(&self) -> MsiTarget {
        MsiTarget::new(self.apics.clone(), Requester::Unspecified)
    }

    /// Puts the controllers of the accelerator's mode in.
    pub fn add(b: &mut MachineBuilder) -> Result<Self, MachineError> {
        match b.irqchip().cloned() {
            Some(chip) if chip.mode() == IrqChipMode::Kernel => kernel(b, &chip),
            Some(chip) => split(b, &chip),
            None => user(b),
        }
    }
}

fn gates(gsi: &Arc<dyn IrqController>) -> Vec<Arc<OrGate>> {
    (0..GSIS).map(|n| OrGate::new(IrqLine::new(gsi.clone(), n))).collect()
}

/// Leaves a PIC pair as firmware does: initialised, at the vectors of real mode, all inputs masked. By its saved
/// state: the accelerator's has no ports here.
pub fn mask_pic(pic: &dyn Device) -> Result<(), SnapshotError> {
    let mut state: PicState = pic.save()?.decode()?;
    for (chip, base) in [(&mut state.master, 0x08), (&mut state.slave, 0x70)] {
        (chip.base, chip.imr, chip.initialised) = (base, 0xff, true);
    }
    pic.restore(&Payload::encode(PIC_SCHEMA, &state)?)
}

fn path(name: &str) -> String {
    format!("/machine/{name}")
}

fn add_chips(b: &mut MachineBuilder, chip: &Arc<dyn IrqChip>) -> Result<(), MachineError> {
    chip.devices().into_iter().try_for_each(|(name, device)| b.add_device(&path(name), device))
}

fn kernel(b: &mut MachineBuilder, chip: &Arc<dyn IrqChip>) -> Result<Interrupts, MachineError> {
    add_chips(b, chip)?;
    let gsi = chip.gsi();
    let pic = chip.devices().into_iter().find(|d| d.0 == "pic").map(|d| d.1);
    let gates = gates(&gsi);
    Ok(Interrupts {
        pic: pic.ok_or_else(|| MachineError::other("the accelerator's interrupt controllers have no PIC"))?,
        timer: gates[0].input(),
        timer_replaced: IrqLine::new(Arc::new(ReplacePit(chip.clone())), 0),
        apics: gsi,
        gates,
        hooks: None,
        accelerator_starts: true,
    })
}

/// The kernel's PIT gives up its interrupt.
struct ReplacePit(Arc<dyn IrqChip>);

impl IrqController for ReplacePit {
    fn set_input(&self, _pin: u32, level: bool) {
        self.0.replace_pit(level);
    }
}

fn split(b: &mut MachineBuilder, chip: &Arc<dyn IrqChip>) -> Result<Interrupts, MachineError> {
    add_chips(b, chip)?;
    let io = IoApic::new(chip.gsi());
    let routes = chip.clone();
    lock(&io).set_route_listener(Box::new(move |pin, route| {
        routes.ioapic_route(pin, route.map(|r| (r.address, r.data)));
    }));
    let intr = IrqLine::new(Arc::new(Intr(b.vcpus()[0].clone())), 0);
    let pic = I8259::new(intr);
    let hooks = Arc::new(SplitHooks { pic: pic.clone(), io: io.clone() });
    models(b, pic, io, chip.gsi(), Some(hooks), true)
}

/// INTR of the bootstrap processor.
struct Intr(Arc<dyn VcpuHandle>);

impl IrqController for Intr {
    fn set_input(&self, _pin: u32, level: bool) {
        self.0.set_pin(CpuPin::Intr, level);
    }
}

fn user(b: &mut MachineBuilder) -> Result<Interrupts, MachineError> {
    let cpus = b.vcpus().iter().map(|vcpu| LapicCpu {
        vcpu: vcpu.clone(),
        id: vcpu.index().0,
        timer: b.services().io_thread.timer(ClockKind::Virtual),
    });
    let (io_of, pic_of) = (Arc::new(OnceLock::new()), Arc::new(OnceLock::new()));
    let links = LapicLinks {
        processors: Arc::new(Starter { threads: b.threads().clone(), handles: b.vcpus().to_vec() }),
        end_of_interrupt: end_of_interrupt(&io_of),
        acknowledge_pic: Some(acknowledge(&pic_of)),
        tsc: b.vm().tsc(),
    };
    let lapics = Lapics::new(cpus.collect(), links);
    let io = IoApic::new(lapics.clone());
    let pic = I8259::new(IrqLine::new(Lapics::lints(&lapics), lapic::LINT0));
    let _ = io_of.set(Arc::downgrade(&io));
    let _ = pic_of.set(Arc::downgrade(&pic));
    b.add_mmio(&path("lapic"), (lapic::BASE, lapic::SIZE), lapic::RULES, lapics.clone())?;
    let hooks = Arc::new(UserHooks(lapics.clone()));
    models(b, pic, io, lapics, Some(hooks), false)
}

type Later<T> = Arc<OnceLock<Weak<Mutex<T>>>>;

fn end_of_interrupt(io: &Later<IoApic>) -> Box<dyn Fn(u8) + Send + Sync> {
    let io = io.clone();
    Box::new(move |vector| {
        if let Some(io) = io.get().and_then(Weak::upgrade) {
            lock(&io).end_of_interrupt(vector);
        }
    })
}

fn acknowledge(pic: &Later<I8259>) -> Box<dyn Fn() -> u8 + Send + Sync> {
    /// What an INTA cycle gives without a PIC: the bus floats high.
    const FLOATING: u8 = 0xff;
    let pic = pic.clone();
    Box::new(move || pic.get().and_then(Weak::upgrade).map_or(FLOATING, |pic| lock(&pic).acknowledge()))
}

/// The chips that are models when the accelerator does not have all of them.
fn models(
    b: &mut MachineBuilder,
    pic: Arc<Mutex<I8259>>,
    io: Arc<Mutex<IoApic>>,
    apics: Arc<dyn IrqController>,
    hooks: Option<Arc<dyn CpuInterrupts>>,
    accelerator_starts: bool,
) -> Result<Interrupts, MachineError> {
    let gsi: Arc<dyn IrqController> = Arc::new(Gsis { pic: I8259::irqs(&pic), io: IoApic::irqs(&io) });
    let ports = mimus_devices::ports::BYTE_PORTS;
    for (base, region) in [(0x20, i8259::REGION_MASTER), (0xa0, i8259::REGION_SLAVE), (0x4d0, i8259::REGION_ELCR)] {
        b.map_pio("pic", (base, 2), ports, region, pic.clone())?;
    }
    b.add_device(&path("pic"), pic.clone())?;
    b.add_mmio(&path("ioapic"), (ioapic::BASE, ioapic::SIZE), ioapic::RULES, io)?;
    let gates = gates(&gsi);
    let timer = gates[0].input();
    let pit = I8254::new(timer.clone(), b.services().io_thread.timer(ClockKind::Virtual));
    b.map_pio("pit", (0x40, i8254::PORTS), i8254::RULES, i8254::REGION_COUNTERS, pit.clone())?;
    b.map_pio("pit", (0x61, 1), i8254::RULES, i8254::REGION_CONTROL, pit.clone())?;
    let timer_replaced = I8254::replaced(&pit);
    b.add_device(&path("pit"), pit as Arc<dyn Device>)?;
    Ok(Interrupts { gates, apics, pic, timer, timer_replaced, hooks, accelerator_starts })
}

/// Global system interrupts to both kinds of controller.
struct Gsis {
    pic: Arc<dyn IrqController>,
    io: Arc<dyn IrqController>,
}

impl IrqController for Gsis {
    fn set_input(&self, gsi: u32, level: bool) {
        // Input 2 of the PIC is the other PIC.
        if gsi < 16 && gsi != 2 {
            self.pic.set_input(gsi, level);
        }
        if gsi < GSIS {
            self.io.set_input(if gsi == 0 { 2 } else { gsi }, level);
        }
    }

    fn msi(&self, address: u64, data: u32, requester: Requester) -> MemTxResult {
        self.io.msi(address, data, requester)
    }
}

/// Starts and stops processors as IPIs say (SDM vol. 3, 9.4).
struct Starter {
    threads: VcpuThreads,
    handles: Vec<Arc<dyn VcpuHandle>>,
}

impl Processors for Starter {
    fn stop(&self, vcpu: VcpuIndex) -> bool {
        self.threads.power_off(vcpu);
        // One that is about to enter the mode finds that it is to leave first: see `VcpuHandle::in_smm`.
        let handle = self.handles.get(vcpu.as_usize()).filter(|h| h.in_smm());
        if let Some(handle) = handle {
            handle.set_pin(CpuPin::Init, true);
            self.threads.power_on(vcpu, None);
        }
        handle.is_none()
    }

    fn init(&self, vcpu: VcpuIndex) {
        if vcpu.0 == 0 {
            let reset = self.threads.run_on(vcpu, |v| v.reset(ResetKind::Init, None));
            if reset.is_ok() {
                self.threads.power_on(vcpu, None);
            }
        }
    }

    fn start_up(&self, vcpu: VcpuIndex, vector: u8) {
        let pc = u64::from(vector) << 12;
        self.threads.start_vcpu(vcpu, StartRequest { pc, arg0: 0, arg1: 0 });
    }
}

/// Local APICs here.
struct UserHooks(Arc<Lapics>);

impl CpuInterrupts for UserHooks {
    fn acknowledge(&self, vcpu: VcpuIndex) -> Option<u8> {
        self.0.acknowledge(vcpu)
    }

    fn take_init(&self, vcpu: VcpuIndex) {
        self.0.take_init(vcpu);
    }

    /// The models end interrupts among themselves.
    fn end_of_interrupt(&self, _vcpu: VcpuIndex, _vector: u32) {}

    fn sysreg_read(&self, vcpu: VcpuIndex, reg: SysReg) -> Option<u64> {
        match reg {
            SysReg::Msr(index) => self.0.msr_read(vcpu, index),
            SysReg::Cr8 => Some(self.0.cr8(vcpu)),
            _ => None,
        }
    }

    fn sysreg_write(&self, vcpu: VcpuIndex, reg: SysReg, value: u64) -> Option<()> {
        match reg {
            SysReg::Msr(index) => self.0.msr_write(vcpu, index, value),
            SysReg::Cr8 => self.0.set_cr8(vcpu, value),
            _ => None,
        }
    }
}

/// PIC and I/O APIC here, local APICs in the accelerator.
struct SplitHooks {
    pic: Arc<Mutex<I8259>>,
    io: Arc<Mutex<IoApic>>,
}

impl CpuInterrupts for SplitHooks {
    fn acknowledge(&self, vcpu: VcpuIndex) -> Option<u8> {
        let mut pic = lock(&self.pic);
        (vcpu.0 == 0 && pic.output()).then(|| pic.acknowledge())
    }

    fn end_of_interrupt(&self, _vcpu: VcpuIndex, vector: u32) {
        if let Ok(vector) = u8::try_from(vector) {
            lock(&self.io).end_of_interrupt(vector);
        }
    }

    fn sysreg_read(&self, _vcpu: VcpuIndex, _reg: SysReg) -> Option<u64> {
        None
    }

    fn sysreg_write(&self, _vcpu: VcpuIndex, _reg: SysReg, _value: u64) -> Option<()> {
        None
    }
}
