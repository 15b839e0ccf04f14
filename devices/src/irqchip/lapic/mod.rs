//! Local APICs of all vCPUs: xAPIC and x2APIC.
//!
//! Spec: Intel SDM volume 3, chapter 11 (June 2024). Section numbers below are its.
//! Modelled: interrupts from LVT, IPIs, messages of I/O APIC and PCI devices; priorities; physical and logical
//! destinations, flat and cluster; INIT, start-up, NMI, SMI; the timer in its three modes; errors; software and
//! hardware disabling; both modes and the transitions between them.
//! Not modelled: other places than 0xfee00000 for the registers, delivery status and retries (messages arrive at
//! once), arbitration by focus, suppressed EOI broadcasts, remote reads, CMCI, ExtINT messages.
//! Beyond the manual: the bootstrap processor's LINT0 is unmasked ExtINT at power-on, as firmware sets it up.
//! Checked with: its tests; register sequences of Linux's apic driver.
//!
//! Locks. Each APIC has one, for what its vCPU changes; it is held for no longer than a look at registers, and
//! nothing is called under it but the vCPU's pins and its timer. What others do to an APIC is an atomic OR into
//! its IRR and, if that may interrupt, a raised pin. Ends of interrupt, IPIs and INTA cycles of the PIC are
//! called out with no lock held.

mod apic;
mod ipi;
mod message;
mod registers;
mod saved;
mod timer;

#[cfg(test)]
mod tests;

pub use message::{Delivery, Message};
pub use timer::TIMER_HZ;

use std::sync::Arc;
use std::sync::atomic::AtomicU32;

use mimus_arch::x86::msr;
pub use mimus_core::accel::TscClock;
use mimus_core::accel::{CpuPin, VcpuHandle, VcpuIndex};
use mimus_core::bus::{AccessRules, AccessSize, BusFault, MemTxResult, MmioAccess, Requester};
use mimus_core::clock::Timer;
use mimus_core::device::{Lifecycle, MmioDevice, ResetPhase, lock};
use mimus_core::irq::IrqController;

use apic::Apic;

/// Where the registers are.
pub const BASE: u64 = msr::APIC_BASE_ADDRESS;
/// Bytes of the register map.
pub const SIZE: u64 = 0x1000;
/// Accesses the region takes: "32-bit loads and stores" (section 11.4.1).
pub const RULES: AccessRules = AccessRules::sizes(AccessSize::B4, AccessSize::B4);

/// Pin of [`Lapics::lints`] for LINT0: the PIC's INT.
pub const LINT0: u32 = 0;
/// Pin of [`Lapics::lints`] for LINT1: NMI.
pub const LINT1: u32 = 1;

/// What INIT and start-up IPIs do, which the board knows. Called with no lock held, on the sender's thread.
pub trait Processors: Send + Sync {
    /// An INIT: the vCPU stops. False if it has to take the INIT later, in system management mode, and goes on: it
    /// calls [`Lapics::take_init`] then.
    fn stop(&self, vcpu: VcpuIndex) -> bool;
    /// It has stopped for an INIT, and waits for a start-up IPI; the bootstrap processor starts at its reset vector.
    fn init(&self, vcpu: VcpuIndex);
    /// A start-up IPI: the vCPU, if it waits for one, starts at `vector << 12` in real mode; else nothing happens.
    fn start_up(&self, vcpu: VcpuIndex, vector: u8);
}

/// One vCPU's APIC as the board wires it.
pub struct LapicCpu {
    /// The vCPU; its index is the APIC's place in the list.
    pub vcpu: Arc<dyn VcpuHandle>,
    /// Its APIC id.
    pub id: u32,
    /// A timer of the virtual clock.
    pub timer: Timer,
}

/// Whom the APICs call.
pub struct LapicLinks {
    /// INIT and start-up IPIs.
    pub processors: Arc<dyn Processors>,
    /// End of a level-triggered interrupt, by vector: [`IoApic::end_of_interrupt`](super::ioapic::IoApic).
    pub end_of_interrupt: Box<dyn Fn(u8) + Send + Sync>,
    /// INTA cycle of the PIC: [`I8259::acknowledge`](super::i8259::I8259::acknowledge).
    pub acknowledge_pic: Option<Box<dyn Fn() -> u8 + Send + Sync>>,
    /// Without it there is no TSC-deadline mode; CPUID must not say there is.
    pub tsc: Option<Arc<dyn TscClock>>,
}

/// The local APICs of a machine.
pub struct Lapics {
    apics: Vec<Arc<Apic>>,
    links: LapicLinks,
    /// Where the search for the next lowest-priority interrupt's taker begins.
    turn: AtomicU32,
}

/// The LINT inputs of all APICs.
struct Lints(Arc<Lapics>);

impl Lapics {
    /// One APIC for each of `cpus`, of which the first is the bootstrap processor.
    pub fn new(cpus: Vec<LapicCpu>, links: LapicLinks) -> Arc<Lapics> {
        let apic = |(n, cpu): (usize, LapicCpu)| Apic::new(n as u32, cpu, links.tsc.clone());
        let apics = cpus.into_iter().enumerate().map(apic).collect();
        Arc::new(Lapics { apics, links, turn: AtomicU32::new(0) })
    }

    /// The inputs that are wired to all APICs: pins [`LINT0`] and [`LINT1`].
    pub fn lints(lapics: &Arc<Lapics>) -> Arc<dyn IrqController> {
        Arc::new(Lints(lapics.clone()))
    }

    fn apic(&self, vcpu: VcpuIndex) -> Option<&Arc<Apic>> {
        self.apics.get(vcpu.as_usize())
    }

    /// The vector the vCPU takes next: of its APIC, else, if its LINT0 passes the PIC's interrupts on, of the PIC.
    /// `None` if there is nothing (any more).
    pub fn acknowledge(&self, vcpu: VcpuIndex) -> Option<u8> {
        let apic = self.apic(vcpu)?;
        if let Some(vector) = apic.acknowledge() {
            return Some(vector);
        }
        let pic = self.links.acknowledge_pic.as_ref().filter(|_| apic.wants_pic())?;
        Some(pic())
    }

    /// CR8: bits 7:4 of the task priority.
    pub fn cr8(&self, vcpu: VcpuIndex) -> u64 {
        self.apic(vcpu).map_or(0, |a| u64::from(lock(&a.regs).tpr >> 4))
    }

    /// Writes CR8; `None` if the value is none.
    pub fn set_cr8(&self, vcpu: VcpuIndex, value: u64) -> Option<()> {
        let tpr = u8::try_from(value).ok().filter(|v| *v < 16)? << 4;
        self.apic(vcpu)?.change(|regs| regs.tpr = tpr);
        Some(())
    }

    /// Reads IA32_APIC_BASE, IA32_TSC_DEADLINE or an x2APIC register; `None` if the MSR is not the APIC's, or is
    /// not there in the current mode.
    pub fn msr_read(&self, vcpu: VcpuIndex, index: u32) -> Option<u64> {
        let apic = self.apic(vcpu)?;
        match index {
            msr::APIC_BASE => Some(lock(&apic.regs).base),
            msr::TSC_DEADLINE => apic.tsc_deadline(),
            msr::X2APIC_FIRST..=msr::X2APIC_LAST => apic.read_x2apic(index),
            _ => None,
        }
    }

    /// Writes one; `None` if the MSR is not the APIC's, or does not take the value.
    pub fn msr_write(&self, vcpu: VcpuIndex, index: u32, value: u64) -> Option<()> {
        let apic = self.apic(vcpu)?;
        match index {
            msr::APIC_BASE => apic.set_base(value),
            msr::TSC_DEADLINE => apic.set_tsc_deadline(value),
            msr::X2APIC_FIRST..=msr::X2APIC_LAST => {
                let effect = apic.write_x2apic(index, value)?;
                self.perform(apic, effect);
                Some(())
            }
            _ => None,
        }
    }

    /// An NMI for one vCPU, whatever its LINT1 says (monitor).
    pub fn inject_nmi(&self, vcpu: VcpuIndex) {
        if let Some(apic) = self.apic(vcpu) {
            apic.pulse(CpuPin::Nmi);
        }
    }
}

impl IrqController for Lapics {
    /// Nothing is wired to all APICs but [`Lapics::lints`].
    fn set_input(&self, _pin: u32, _level: bool) {}

    fn msi(&self, address: u64, data: u32, _requester: Requester) -> MemTxResult {
        match Message::from_msi(address, data) {
            Some(message) if self.deliver(&message, None) => MemTxResult::Ok,
            _ => MemTxResult::DecodeError,
        }
    }
}

impl IrqController for Lints {
    fn set_input(&self, pin: u32, level: bool) {
        let reset = self.0.apics.iter().filter(|apic| apic.set_lint(pin, level));
        for apic in reset {
            self.0.init(apic);
        }
    }
}

impl MmioDevice for Lapics {
    fn mmio_read(&self, a: MmioAccess) -> Result<u64, BusFault> {
        let vcpu = match a.attrs.requester {
            Requester::Vcpu(n) => n,
            // A debugger's view of memory: reading has no effects.
            Requester::Unspecified => 0,
            Requester::Device(_) => return Err(BusFault::Decode),
        };
        let apic = self.apic(VcpuIndex(vcpu)).ok_or(BusFault::Decode)?;
        Ok(apic.read_xapic(a.offset).into())
    }

    fn mmio_write(&self, a: MmioAccess, value: u64) -> Result<(), BusFault> {
        let Requester::Vcpu(vcpu) = a.attrs.requester else { return Err(BusFault::Decode) };
        let apic = self.apic(VcpuIndex(vcpu)).ok_or(BusFault::Decode)?;
        let effect = apic.write_xapic(a.offset, value as u32);
        self.perform(apic, effect);
        Ok(())
    }
}

impl Lifecycle for Lapics {
    fn reset(&self, phase: ResetPhase) {
        for apic in &self.apics {
            match phase {
                ResetPhase::Enter => apic.power_on_reset(),
                ResetPhase::Hold => apic.change(|_| {}),
                ResetPhase::Exit => {}
            }
        }
    }

    fn start(&self) {
        self.apics.iter().for_each(|apic| apic.resume_timer());
    }
}
