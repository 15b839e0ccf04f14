//! Interrupt controllers in the kernel: all of them, or the local APICs only.

use crate::error::{errno, refused};
use crate::irqfd::KvmMsiRoute;
use crate::options::KvmOptions;
use crate::routing::{Message, PinRoute};
use crate::sys::{ioctl, x86 as sys_x86};
use crate::vm::VmShared;
use crate::x86::{chips, msrs};
use kvm_bindings::*;
use mimus_arch::x86::irqchip::{IOAPIC_PINS, IoApicState, LVT_LINT0, LapicState, LapicsState, PicState, PitState};
use mimus_arch::x86::msr;
use mimus_arch::x86::state::Msr;
use mimus_core::accel::irqchip::{IOAPIC_SCHEMA, LAPIC_SCHEMA, PIC_SCHEMA, PIT_SCHEMA};
use mimus_core::accel::{AccelError, IrqChip, IrqChipMode};
use mimus_core::bus::{MemTxResult, Requester};
use mimus_core::device::{Device, Drain, Lifecycle, ResetPhase};
use mimus_core::irq::{IrqController, MsiRoute};
use mimus_core::snapshot::{Payload, Schema, Snapshot, SnapshotError};
use serde::Serialize;
use serde::de::DeserializeOwned;
use std::collections::VecDeque;
use std::io;
use std::sync::atomic::{AtomicBool, AtomicI64, AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Level-triggered, in a message's data.
const DATA_LEVEL: u32 = 1 << 15;
/// Delivery mode ExtINT: 7 in bits 10:8.
const DATA_MODE: u32 = 7 << 8;

/// The controllers of a VM.
pub struct KvmIrqChip {
    vm: Arc<VmShared>,
    mode: IrqChipMode,
    input: Arc<Input>,
}

/// Where interrupts go in.
struct Input {
    vm: Arc<VmShared>,
    mode: IrqChipMode,
    /// Levels of the lines as they were last driven.
    lines: AtomicU32,
    /// `Split`: the level-triggered messages whose ends the kernel tells us, oldest first, by route.
    level_messages: Mutex<VecDeque<(u32, Message)>>,
    /// The IOAPIC model tells its messages: there is nothing to be learnt from those it sends.
    told: AtomicBool,
    /// `Kernel`: the state that the IOAPIC was set to since the machine stopped.
    restored: Mutex<Option<IoApicState>>,
}

/// Pins and their numbers as a PC has them: the first 16 on the PIC and the IOAPIC, but the timer, number 0, on
/// IOAPIC pin 2 (see the interrupt source overrides of the MADT).
fn pc_routes() -> Vec<PinRoute> {
    let mut routes = Vec::new();
    for gsi in 0..IOAPIC_PINS as u32 {
        if gsi == 2 {
            continue;
        }
        if gsi < 16 {
            let chip = if gsi < 8 { KVM_IRQCHIP_PIC_MASTER } else { KVM_IRQCHIP_PIC_SLAVE };
            routes.push(PinRoute { gsi, chip, pin: gsi % 8 });
        }
        let pin = if gsi == 0 { 2 } else { gsi };
        routes.push(PinRoute { gsi, chip: KVM_IRQCHIP_IOAPIC, pin });
    }
    routes
}

impl KvmIrqChip {
    /// Makes them. Before vCPUs are made.
    pub fn create(vm: &Arc<VmShared>, mode: IrqChipMode, options: &KvmOptions) -> Result<Arc<Self>, AccelError> {
        match mode {
            IrqChipMode::Kernel => {
                vm.fd.create_irq_chip().map_err(errno("make interrupt controllers"))?;
                let pit = kvm_pit_config { flags: KVM_PIT_SPEAKER_DUMMY, ..Default::default() };
                vm.fd.create_pit2(pit).map_err(errno("make an interval timer"))?;
                if !options.pit_reinject {
                    sys_x86::pit_reinject(&vm.fd, false).map_err(refused("turn pit-reinject off"))?;
                }
                vm.routing.set_pins(pc_routes())?;
            }
            IrqChipMode::Split => {
                vm.enable_cap(KVM_CAP_SPLIT_IRQCHIP, [IOAPIC_PINS as u64, 0])
                    .map_err(errno("leave PIC and IOAPIC to us (kernel-irqchip=split)"))?;
            }
            IrqChipMode::User => unreachable!("user mode has no chip in the kernel"),
        }
        // Destinations above 255, and no broadcast by 255 in x2APIC mode.
        let format = KVM_X2APIC_API_USE_32BIT_IDS | KVM_X2APIC_API_DISABLE_BROADCAST_QUIRK;
        if vm.has_cap(KVM_CAP_X2APIC_API) {
            vm.enable_cap(KVM_CAP_X2APIC_API, [format.into(), 0]).map_err(errno("use 32-bit APIC ids"))?;
        }
        let (lines, level_messages) = (AtomicU32::new(0), Mutex::default());
        let told = AtomicBool::new(false);
        let restored = Mutex::default();
        let input = Arc::new(Input { vm: vm.clone(), mode, lines, level_messages, told, restored });
        Ok(Arc::new(Self { vm: vm.clone(), mode, input }))
    }
}

impl IrqChip for KvmIrqChip {
    fn mode(&self) -> IrqChipMode {
        self.mode
    }

    fn gsi(&self) -> Arc<dyn IrqController> {
        self.input.clone()
    }

    fn devices(&self) -> Vec<(&'static str, Arc<dyn Device>)> {
        let vm = &self.vm;
        let lapic: Arc<dyn Device> = Arc::new(KernelChip(Lapics(self.input.clone())));
        match self.mode {
            IrqChipMode::Kernel => {
                let now = AtomicI64::new(sys_x86::monotonic_ns());
                vec![
                    ("pic", Arc::new(KernelChip(Pic(vm.clone())))),
                    ("ioapic", Arc::new(KernelChip(IoApic(self.input.clone())))),
                    ("pit", Arc::new(KernelChip(Pit { vm: vm.clone(), stopped: now }))),
                    ("lapic", lapic),
                ]
            }
            _ => vec![("lapic", lapic)],
        }
    }

    fn ioapic_route(&self, pin: u32, route: Option<(u64, u32)>) {
        self.input.told.store(true, Ordering::Relaxed);
        // An interrupt may be in service when its input is masked, and its end must be told: the route stays until
        // there is another one. Ends of edge-triggered ones do not matter.
        let Some((address, data)) = route.filter(|(_, data)| data & DATA_LEVEL != 0) else { return };
        if self.mode == IrqChipMode::Split
            && pin < IOAPIC_PINS as u32
            && let Err(e) = self.vm.routing.set_message(pin, Message { address, data })
        {
            log::warn!("{e}");
        }
    }

    fn replace_pit(&self, on: bool) {
        if self.mode != IrqChipMode::Kernel {
            return;
        }
        let set = self.vm.fd.get_pit2().and_then(|mut pit| {
            pit.flags &= !KVM_PIT_FLAGS_HPET_LEGACY;
            pit.flags |= if on { KVM_PIT_FLAGS_HPET_LEGACY } else { 0 };
            self.vm.fd.set_pit2(&pit)
        });
        if let Err(e) = set {
            log::warn!("kvm: the interval timer's interrupt cannot be replaced: {e}");
        }
    }
}

impl Input {
    /// Has the kernel tell us the end of a level-triggered message: it does for those among the routes that are
    /// reserved for the IOAPIC. There are as many as the IOAPIC has pins, so that the oldest is stale.
    fn watch(&self, message: Message) {
        let mut known = self.level_messages.lock().unwrap_or_else(PoisonError::into_inner);
        if known.iter().any(|(_, m)| *m == message) {
            return;
        }
        let gsi =
            if known.len() < IOAPIC_PINS { known.len() as u32 } else { known.pop_front().map_or(0, |(gsi, _)| gsi) };
        known.push_back((gsi, message));
        if let Err(e) = self.vm.routing.set_message(gsi, message) {
            log::warn!("{e}");
        }
    }
}

impl Input {
    fn restored(&self) -> MutexGuard<'_, Option<IoApicState>> {
        self.restored.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Sets the kernel's IOAPIC; what waits for delivery in `state` is delivered at once.
    fn set_ioapic(&self, state: &IoApicState) -> io::Result<()> {
        let chip = kvm_irqchip__bindgen_ty_1 { ioapic: chips::ioapic_from(state) };
        let chip = kvm_irqchip { chip_id: KVM_IRQCHIP_IOAPIC, pad: 0, chip };
        self.vm.fd.set_irqchip(&chip).map_err(os)?;
        self.lines.store(lines_of(state.lines), Ordering::SeqCst);
        Ok(())
    }
}

impl IrqController for Input {
    fn set_input(&self, pin: u32, level: bool) {
        if self.mode != IrqChipMode::Kernel || pin >= IOAPIC_PINS as u32 {
            return log::warn!("kvm: interrupt line {pin} leads nowhere");
        }
        if level {
            self.lines.fetch_or(1 << pin, Ordering::SeqCst);
        } else {
            self.lines.fetch_and(!(1 << pin), Ordering::SeqCst);
        }
        if let Err(e) = ioctl::irq_line(&self.vm.fd, pin, level) {
            log::warn!("kvm: interrupt {pin} cannot be driven: {e}");
        }
    }

    fn msi(&self, address: u64, data: u32, _requester: Requester) -> MemTxResult {
        let message = Message { address, data };
        let learns = self.mode == IrqChipMode::Split && !self.told.load(Ordering::Relaxed);
        if learns && data & DATA_LEVEL != 0 && data & DATA_MODE != DATA_MODE {
            self.watch(message);
        }
        let (address_lo, address_hi) = message.halves();
        let msi = kvm_msi { address_lo, address_hi, data, ..Default::default() };
        match self.vm.fd.signal_msi(msi) {
            // 0: blocked by the guest, which is as good as delivered.
            Ok(_) => MemTxResult::Ok,
            Err(_) => MemTxResult::AccessError,
        }
    }

    fn holds(&self, vector: u8) -> Option<bool> {
        if self.mode != IrqChipMode::Split {
            return None;
        }
        let (word, bit) = (usize::from(vector / 32), vector % 32);
        let has = |apic: LapicState| (apic.irr[word] | apic.isr[word]) >> bit & 1 != 0;
        // If it cannot be found out, the end may come still.
        Some(self.vm.vcpus().iter().any(|v| get_lapic(&v.fd).map_or(true, has)))
    }

    fn msi_route(&self) -> Option<Arc<dyn MsiRoute>> {
        KvmMsiRoute::make(&self.vm.fd, &self.vm.routing)
    }
}

/// A chip in the kernel, as its accessors see it.
trait Chip: Send + Sync + 'static {
    const SCHEMA: Schema;
    type State: Serialize + DeserializeOwned;
    fn get(&self) -> io::Result<Self::State>;
    fn set(&self, state: &Self::State) -> io::Result<()>;
    fn check(state: &Self::State) -> Result<(), (&'static str, String)>;
    fn reset(&self) -> io::Result<()>;
    fn start(&self) {}
    fn stop(&self) {}
}

/// A chip in the kernel as a device.
struct KernelChip<C>(C);

impl<C: Chip> Lifecycle for KernelChip<C> {
    fn reset(&self, phase: ResetPhase) {
        if phase == ResetPhase::Enter
            && let Err(e) = self.0.reset()
        {
            log::error!("kvm: {} cannot be reset: {e}", C::SCHEMA.name);
        }
    }

    fn start(&self) {
        self.0.start();
    }

    fn stop(&self, _drain: &Drain) {
        self.0.stop();
    }
}

impl<C: Chip> Snapshot for KernelChip<C> {
    fn schema(&self) -> Schema {
        C::SCHEMA
    }

    fn save(&self) -> Result<Payload, SnapshotError> {
        Payload::encode(C::SCHEMA, &self.0.get()?)
    }

    fn restore(&self, payload: &Payload) -> Result<(), SnapshotError> {
        let Schema { name, version } = C::SCHEMA;
        if payload.schema != name {
            return Err(SnapshotError::WrongSchema { found: payload.schema.clone(), expected: name });
        }
        if payload.version != version {
            return Err(SnapshotError::WrongVersion { schema: name, found: payload.version, expected: version });
        }
        let state: C::State = payload.decode()?;
        C::check(&state).map_err(|(field, reason)| SnapshotError::invalid(C::SCHEMA, field, reason))?;
        Ok(self.0.set(&state)?)
    }
}

fn os(e: kvm_ioctls::Error) -> io::Error {
    io::Error::from_raw_os_error(e.errno())
}

fn get_chip(vm: &VmShared, chip_id: u32) -> io::Result<kvm_irqchip> {
    let mut chip = kvm_irqchip { chip_id, ..Default::default() };
    vm.fd.get_irqchip(&mut chip).map_err(os)?;
    Ok(chip)
}

struct Pic(Arc<VmShared>);

impl Chip for Pic {
    const SCHEMA: Schema = PIC_SCHEMA;
    type State = PicState;

    fn get(&self) -> io::Result<PicState> {
        let master = get_chip(&self.0, KVM_IRQCHIP_PIC_MASTER)?;
        let slave = get_chip(&self.0, KVM_IRQCHIP_PIC_SLAVE)?;
        Ok(chips::pic_to(&sys_x86::pic_of(&master), &sys_x86::pic_of(&slave)))
    }

    fn set(&self, state: &PicState) -> io::Result<()> {
        let (master, slave) = chips::pic_from(state);
        for (chip_id, pic) in [(KVM_IRQCHIP_PIC_SLAVE, slave), (KVM_IRQCHIP_PIC_MASTER, master)] {
            let chip = kvm_irqchip { chip_id, pad: 0, chip: kvm_irqchip__bindgen_ty_1 { pic } };
            self.0.fd.set_irqchip(&chip).map_err(os)?;
        }
        Ok(())
    }

    fn check(state: &PicState) -> Result<(), (&'static str, String)> {
        state.check()
    }

    fn reset(&self) -> io::Result<()> {
        // Lines keep their levels.
        let old = self.get()?;
        let mut state = PicState::reset();
        (state.master.lines, state.slave.lines) = (old.master.lines, old.slave.lines);
        self.set(&state)
    }
}

struct IoApic(Arc<Input>);

impl Chip for IoApic {
    const SCHEMA: Schema = IOAPIC_SCHEMA;
    type State = IoApicState;

    fn get(&self) -> io::Result<IoApicState> {
        let chip = get_chip(&self.0.vm, KVM_IRQCHIP_IOAPIC)?;
        Ok(chips::ioapic_to(&sys_x86::ioapic_of(&chip), pins_of(self.0.lines.load(Ordering::SeqCst))))
    }

    fn set(&self, state: &IoApicState) -> io::Result<()> {
        self.0.set_ioapic(state)?;
        *self.0.restored() = Some(state.clone());
        Ok(())
    }

    fn check(state: &IoApicState) -> Result<(), (&'static str, String)> {
        state.check()
    }

    fn start(&self) {
        *self.0.restored() = None;
    }

    fn reset(&self) -> io::Result<()> {
        let lines = pins_of(self.0.lines.load(Ordering::SeqCst));
        self.set(&IoApicState { lines, ..IoApicState::reset() })
    }
}

/// Line levels by number to levels by IOAPIC pin: number 0 is pin 2.
fn pins_of(lines: u32) -> u32 {
    lines & !7 | (lines & 1) << 2 | lines & 2
}

fn lines_of(pins: u32) -> u32 {
    pins & !7 | pins >> 2 & 1 | pins & 2
}

struct Pit {
    vm: Arc<VmShared>,
    /// Host time at which the machine stopped; 0 while it runs.
    stopped: AtomicI64,
}

impl Pit {
    fn now(&self) -> i64 {
        match self.stopped.load(Ordering::SeqCst) {
            0 => sys_x86::monotonic_ns(),
            stopped => stopped,
        }
    }

    /// Virtual time minus host time, and virtual time.
    fn times(&self) -> (i64, i64) {
        let now = self.vm.clock.now() as i64;
        (now - self.now(), now)
    }
}

impl Chip for Pit {
    const SCHEMA: Schema = PIT_SCHEMA;
    type State = PitState;

    fn get(&self) -> io::Result<PitState> {
        let (offset, now) = self.times();
        Ok(chips::pit_to(&self.vm.fd.get_pit2().map_err(os)?, offset, now))
    }

    fn set(&self, state: &PitState) -> io::Result<()> {
        let (offset, now) = self.times();
        self.vm.fd.set_pit2(&chips::pit_from(state, offset, now)).map_err(os)
    }

    fn check(state: &PitState) -> Result<(), (&'static str, String)> {
        state.check()
    }

    fn reset(&self) -> io::Result<()> {
        self.set(&PitState::reset())
    }

    fn start(&self) {
        let stopped = self.stopped.swap(0, Ordering::SeqCst);
        if stopped == 0 {
            return;
        }
        let paused = sys_x86::monotonic_ns() - stopped;
        let shift = self.vm.fd.get_pit2().and_then(|mut pit| {
            pit.channels.iter_mut().for_each(|c| c.count_load_time += paused);
            self.vm.fd.set_pit2(&pit)
        });
        if let Err(e) = shift {
            log::warn!("kvm: the interval timer cannot be started: {e}");
        }
    }

    fn stop(&self) {
        self.stopped.store(sys_x86::monotonic_ns(), Ordering::SeqCst);
    }
}

struct Lapics(Arc<Input>);

/// The state of one local APIC in the kernel. The vCPU is not in `KVM_RUN`.
fn get_lapic(fd: &kvm_ioctls::VcpuFd) -> io::Result<LapicState> {
    let page = fd.get_lapic().map_err(os)?;
    let apic_base = fd.get_sregs().map_err(os)?.apic_base;
    let deadline = msrs::read_one(fd, msr::TSC_DEADLINE).unwrap_or(0);
    Ok(chips::lapic_to(&page, apic_base, deadline))
}

/// The local APIC of a vCPU at reset. The bootstrap processor's LINT0 lets the PIC through (virtual wire mode), as
/// firmware would set it.
pub fn reset_state(index: u32) -> LapicState {
    let mut state = LapicState::reset(index);
    if index == 0 {
        state.apic_base |= msr::APIC_BASE_BSP;
        state.lvt[LVT_LINT0] = DATA_MODE;
    }
    state
}

/// Sets it.
pub fn set_lapic(fd: &kvm_ioctls::VcpuFd, state: &LapicState) -> io::Result<()> {
    let mut sregs = fd.get_sregs().map_err(os)?;
    // The mode decides what the page means.
    if sregs.apic_base != state.apic_base {
        sregs.apic_base = state.apic_base;
        fd.set_sregs(&sregs).map_err(os)?;
    }
    let version = chips::lapic_version(&fd.get_lapic().map_err(os)?);
    fd.set_lapic(&chips::lapic_from(state, version)).map_err(os)?;
    let deadline = Msr { index: msr::TSC_DEADLINE, value: state.tsc_deadline };
    msrs::write(fd, &[deadline], &[]).map_err(|e| io::Error::other(e.to_string()))
}

impl Chip for Lapics {
    const SCHEMA: Schema = LAPIC_SCHEMA;
    type State = LapicsState;

    fn get(&self) -> io::Result<LapicsState> {
        let apics = self.0.vm.vcpus().iter().map(|v| get_lapic(&v.fd)).collect::<io::Result<_>>()?;
        Ok(LapicsState { apics })
    }

    fn set(&self, state: &LapicsState) -> io::Result<()> {
        let vcpus = self.0.vm.vcpus();
        if vcpus.len() != state.apics.len() {
            return Err(io::Error::other(format!("{} local APICs for {} vCPUs", state.apics.len(), vcpus.len())));
        }
        vcpus.iter().zip(&state.apics).try_for_each(|(v, apic)| set_lapic(&v.fd, apic))?;
        // What the IOAPIC delivered when it was set is overwritten now: it delivers it again.
        match self.0.restored().take() {
            Some(ioapic) => self.0.set_ioapic(&ioapic),
            None => Ok(()),
        }
    }

    fn check(state: &LapicsState) -> Result<(), (&'static str, String)> {
        state.apics.iter().try_for_each(LapicState::check)
    }

    fn reset(&self) -> io::Result<()> {
        self.0.vm.vcpus().iter().try_for_each(|v| set_lapic(&v.fd, &reset_state(v.index.0)))
    }
}
