//! A vCPU: the way into the guest and what is done about each exit.

use crate::entry::{KICK, LOOK};
use crate::error::refused;
use crate::handle::{Count, INIT, INTR, LATCHED, NMI, SMI, VcpuCore};
use crate::sys::{ioctl, x86 as sys_x86};
use crate::vm::{VmShared, handle};
use crate::x86::debug::Debug;
use crate::x86::{clock, msrs};
use kvm_bindings::*;
use mimus_arch::x86::state::{Exception, Msr};
use mimus_arch::x86::{MpState, msr};
use mimus_arch::{CpuState, StateGroups};
use mimus_core::accel::{
    AccelError, Access, Caught, CpuIo, DebugStop, EmulationFailure, IrqChipMode, ResetCause, ResetKind, ShutdownCause,
    StartRequest, StateError, SysReg, TranslateFault, Translation, Vcpu, VcpuDebug, VcpuExit, VcpuHandle,
};
use mimus_core::bus::{AccessSize, GuestPhys, GuestVirt, MemTxAttrs};
use mimus_core::memory::PAGE_SIZE;
use std::io;
use std::sync::Arc;

/// One vCPU, on its thread.
pub struct KvmVcpu {
    pub(super) vm: Arc<VmShared>,
    pub(super) core: Arc<VcpuCore>,
    pub(super) mode: IrqChipMode,
    /// Whether it executes, when the kernel has no local APIC and so does not know.
    pub(super) wait: MpState,
    /// The kernel finishes the last exit's instruction in the next `KVM_RUN`.
    pub(super) pending: bool,
    /// The run page's interrupt flags are those of the current state.
    pub(super) flags_known: bool,
    /// `KVM_RUN` returns when an interrupt can be taken.
    window: bool,
    /// `User`: there is a local APIC among the devices; unknown before the first run.
    has_lapic: Option<bool>,
    /// CR8 as the local APIC and the kernel last agreed.
    pub(super) cr8: u64,
    pub(super) hook: Option<Arc<dyn EmulationFailure>>,
    pub(super) debug: Debug,
    /// Have every exit copy registers: emulation failures are frequent.
    pub(super) copy_regs: bool,
    /// The run page has a copy of the registers as they are now.
    pub(super) copied: bool,
    /// A software exception (`INT3`, `INTO`) that was given to the kernel, with RIP and RSP then: it does not tell
    /// of these, and RIP is past the instruction already.
    pub(super) untold: Option<(Exception, u64, u64)>,
    /// MSRs as they were at creation.
    pub(super) initial_msrs: Vec<Msr>,
}

impl KvmVcpu {
    /// One in its reset state.
    pub fn new(vm: &Arc<VmShared>, core: Arc<VcpuCore>) -> Result<Self, AccelError> {
        let mode = vm.mode();
        if mode == IrqChipMode::User {
            vm.filter_apic_msrs()?;
        }
        let initial_msrs = msrs::read_available(&core.fd, vm.available_msrs(&core.fd)?)?;
        let mut vcpu = Self {
            vm: vm.clone(),
            core,
            mode,
            wait: MpState::Running,
            pending: false,
            flags_known: false,
            window: false,
            has_lapic: None,
            cr8: 0,
            hook: None,
            debug: Debug::default(),
            copy_regs: false,
            copied: false,
            untold: None,
            initial_msrs,
        };
        vcpu.reset_all(ResetKind::Cold)?;
        clock::note_offset(vm, &vcpu.core);
        Ok(vcpu)
    }

    /// Goes into the kernel once, whoever else wants something, and comes out again before guest code is run:
    /// finishes an instruction, copies registers.
    pub(super) fn pass_through(&mut self) -> io::Result<()> {
        let core = &self.core;
        let pass = core.entry.enter(KICK | LOOK, || {
            core.page.set_immediate_exit(true);
            ioctl::run(&core.fd)
        });
        self.after_entry();
        pass.unwrap_or(Ok(()))
    }

    /// `KVM_RUN` finishes the last exit's instruction before anything else, even if it is cut short.
    fn after_entry(&mut self) {
        self.flags_known = true;
        self.pending = false;
        self.copied = self.copy_regs;
        self.core.page.clear_dirty_regs();
    }

    /// Finishes the instruction of the last exit, so that the state is complete.
    fn finish_pending(&mut self, io: &dyn CpuIo) -> Option<VcpuExit> {
        while self.pending {
            let result = self.pass_through();
            if let Some(exit) = self.after_run(result, io) {
                return Some(exit);
            }
        }
        None
    }

    /// What must be seen to before the guest goes on.
    fn before_entry(&mut self, io: &dyn CpuIo) -> Option<VcpuExit> {
        let pins = self.core.pins();
        if pins & LATCHED != 0 {
            if let Some(exit) = self.finish_pending(io) {
                return Some(exit);
            }
            self.take_latched();
        }
        if self.mode == IrqChipMode::Kernel {
            return None;
        }
        if self.wait != MpState::Running && !self.wakes() {
            return Some(VcpuExit::Halted);
        }
        self.offer_interrupt(io);
        if self.mode == IrqChipMode::User {
            self.load_cr8(io);
        }
        None
    }

    /// NMI, SMI and INIT that came.
    pub(super) fn take_latched(&mut self) {
        let came = self.core.take_pins(LATCHED);
        if came != 0 {
            self.copied = false;
        }
        if came & INIT != 0 {
            // An SMI or NMI that came with it is lost, as in a processor that is reset.
            return self.init();
        }
        if came & NMI != 0 {
            if let Err(e) = self.core.fd.nmi() {
                log::warn!("kvm: an NMI is lost: {e}");
            }
            self.wake_up();
        }
        let has_smm = self.vm.smm_slots.as_ref().is_some_and(|s| s.count() > 0);
        if came & SMI != 0 && has_smm {
            if let Err(e) = self.core.fd.smi() {
                log::warn!("kvm: an SMI is lost: {e}");
            }
            self.wake_up();
        }
    }

    /// Ends a halt.
    fn wake_up(&mut self) {
        if self.wait == MpState::Halted {
            self.wait = MpState::Running;
        }
    }

    fn interrupts_open(&mut self) -> bool {
        if !self.flags_known {
            // A pass through the kernel fills the page in; there is nothing pending now.
            let _ = self.pass_through();
        }
        self.core.page.if_flag()
    }

    /// `User` and `Split`: whether it goes on after a halt.
    fn wakes(&mut self) -> bool {
        if self.wait == MpState::Halted && self.core.pins() & INTR != 0 && self.interrupts_open() {
            self.wait = MpState::Running;
        }
        self.wait == MpState::Running
    }

    /// INTR is high: takes the vector if that is possible now, or asks to be told when it is.
    fn offer_interrupt(&mut self, io: &dyn CpuIo) {
        let mut wanted = self.core.pins() & INTR != 0;
        // An instruction that is not finished yet comes first.
        if wanted && self.flags_known && !self.pending && self.core.page.ready_for_interrupt() {
            self.flags_known = false;
            self.copied = false;
            if let Some(vector) = io.acknowledge_interrupt(self.core.index) {
                self.inject(vector);
            }
            wanted = self.core.pins() & INTR != 0;
        }
        if wanted != self.window {
            self.window = wanted;
            self.core.page.request_interrupt_window(wanted);
        }
    }

    fn inject(&mut self, vector: u8) {
        let fd = &self.core.fd;
        let injected = if self.mode == IrqChipMode::Split {
            // KVM_INTERRUPT would put the vector where no saved state has it: this way it is an event.
            self.inject_as_event(vector)
        } else {
            sys_x86::interrupt(fd, vector)
        };
        if let Err(e) = injected {
            log::error!("kvm: interrupt vector {vector:#x} is lost: {e}");
        }
    }

    fn inject_as_event(&mut self, vector: u8) -> io::Result<()> {
        let fd = &self.core.fd;
        let os = |e: kvm_ioctls::Error| io::Error::from_raw_os_error(e.errno());
        let mut events = fd.get_vcpu_events().map_err(os)?;
        events.interrupt.injected = 1;
        events.interrupt.nr = vector;
        events.interrupt.soft = 0;
        events.flags &= !KVM_VCPUEVENT_VALID_PAYLOAD;
        fd.set_vcpu_events(&events).map_err(os)?;
        if fd.get_mp_state().map_err(os)?.mp_state == KVM_MP_STATE_HALTED {
            fd.set_mp_state(kvm_mp_state { mp_state: KVM_MP_STATE_RUNNABLE }).map_err(os)?;
        }
        Ok(())
    }

    /// The local APIC's task priority, into the kernel.
    fn load_cr8(&mut self, io: &dyn CpuIo) {
        if self.has_lapic == Some(false) {
            return;
        }
        let value = io.sysreg_read(self.core.index, SysReg::Cr8);
        self.has_lapic = Some(value.is_some());
        if let Some(value) = value.filter(|v| *v != self.cr8) {
            self.cr8 = value;
            self.core.page.set_cr8(value);
        }
    }

    /// And out of it.
    fn store_cr8(&mut self, io: &dyn CpuIo) {
        if self.mode != IrqChipMode::User || self.has_lapic != Some(true) {
            return;
        }
        let value = self.core.page.cr8();
        if value != self.cr8 {
            self.cr8 = value;
            let _ = io.sysreg_write(self.core.index, SysReg::Cr8, value);
        }
    }

    /// `KVM_RUN` returned.
    fn after_run(&mut self, result: io::Result<()>, io: &dyn CpuIo) -> Option<VcpuExit> {
        self.vm.coalescer.make_writes(io, self.core.index);
        self.store_cr8(io);
        match result {
            Ok(()) => {
                self.untold = None;
                self.handle_exit(io)
            }
            Err(e) => match e.raw_os_error() {
                Some(libc::EINTR) => {
                    self.core.count(Count::Interrupted);
                    None
                }
                // An application processor got its start-up interrupt.
                Some(libc::EAGAIN) => None,
                _ => Some(self.run_failed(e)),
            },
        }
    }

    fn run_failed(&mut self, e: io::Error) -> VcpuExit {
        let memory = self.core.page.exit_reason() == KVM_EXIT_MEMORY_FAULT;
        let what = match e.raw_os_error() {
            Some(libc::EFAULT) if memory => "reach guest memory (is the host out of memory or huge pages?)",
            Some(libc::EFAULT) => "reach guest memory or its own tables",
            Some(libc::EHWPOISON) => "use guest memory that has a hardware error",
            _ => "run it",
        };
        VcpuExit::Failed(refused(format!("vCPU {}: {what}", self.core.index))(e))
    }

    fn handle_exit(&mut self, io: &dyn CpuIo) -> Option<VcpuExit> {
        let reason = self.core.page.exit_reason();
        match reason {
            KVM_EXIT_IO => self.port_access(io),
            KVM_EXIT_MMIO => self.memory_access(io),
            KVM_EXIT_HLT => {
                self.core.count(Count::Halt);
                self.wait = MpState::Halted;
            }
            KVM_EXIT_IRQ_WINDOW_OPEN => self.core.count(Count::InterruptWindow),
            KVM_EXIT_IOAPIC_EOI => {
                self.core.count(Count::Eoi);
                io.end_of_interrupt(self.core.index, self.core.page.eoi_vector().into());
            }
            KVM_EXIT_X86_RDMSR | KVM_EXIT_X86_WRMSR => self.msr_access(reason == KVM_EXIT_X86_WRMSR, io),
            // CR8 was handled after the run; a signal's arrival needs nothing.
            KVM_EXIT_SET_TPR | KVM_EXIT_INTR => self.core.count(Count::Other),
            KVM_EXIT_DEBUG => return self.debug_exit(),
            KVM_EXIT_SHUTDOWN => return Some(VcpuExit::Reset(ResetCause::TripleFault)),
            KVM_EXIT_INTERNAL_ERROR => return self.internal_error(io),
            KVM_EXIT_DIRTY_RING_FULL => {
                self.core.count(Count::DirtyRing);
                if let Err(e) = self.vm.slots.empty_rings() {
                    return Some(VcpuExit::Failed(refused("empty the dirty rings")(e)));
                }
            }
            KVM_EXIT_SYSTEM_EVENT => return Some(self.system_event()),
            KVM_EXIT_FAIL_ENTRY => {
                let hardware = self.core.page.fail_entry();
                return Some(self.failed(format!("the processor refuses its state (hardware reason {hardware:#x})")));
            }
            other => return Some(self.failed(format!("KVM exit {other} is not known"))),
        }
        None
    }

    pub(super) fn failed(&self, reason: String) -> VcpuExit {
        VcpuExit::Failed(AccelError::Other(format!("kvm: vCPU {}: {reason}", self.core.index)))
    }

    fn system_event(&self) -> VcpuExit {
        match self.core.page.system_event() {
            KVM_SYSTEM_EVENT_SHUTDOWN => VcpuExit::Shutdown(ShutdownCause::GuestPowerOff),
            KVM_SYSTEM_EVENT_CRASH => VcpuExit::Shutdown(ShutdownCause::GuestPanic),
            _ => VcpuExit::Reset(ResetCause::Guest),
        }
    }

    fn port_access(&mut self, io: &dyn CpuIo) {
        let page = &self.core.page;
        self.core.count(Count::Pio);
        let access = page.io();
        let size = AccessSize::from_bytes(access.size.into()).unwrap_or(AccessSize::B1);
        for i in 0..access.count {
            let value = if access.write {
                let value = page.io_value(&access, i);
                io.pio_write(self.core.index, access.port, size, value);
                value
            } else {
                let value = io.pio_read(self.core.index, access.port, size);
                page.set_io_value(&access, i, value);
                value
            };
            self.debug.note(Caught::Port { port: access.port, writes: access.write, value });
        }
        self.pending = true;
    }

    fn memory_access(&mut self, io: &dyn CpuIo) {
        let (index, page) = (self.core.index, &self.core.page);
        self.core.count(Count::Mmio);
        let mut access = page.mmio();
        let attrs = MemTxAttrs { secure: page.in_smm(), ..MemTxAttrs::vcpu(index.0) };
        let mut done = 0u64;
        // The parts of an access that crosses a page need not be powers of two.
        while done < access.len.into() {
            let left = u64::from(access.len) - done;
            let bytes = if left.is_power_of_two() { left } else { left.next_power_of_two() / 2 };
            let size = AccessSize::from_bytes(bytes).unwrap_or(AccessSize::B1);
            let (pa, at) = (GuestPhys(access.addr.wrapping_add(done)), done as usize);
            let value = if access.write {
                let mut data = [0; 8];
                data[..bytes as usize].copy_from_slice(&access.data[at..at + bytes as usize]);
                let value = u64::from_le_bytes(data);
                // Nobody on a PC tells the processor that a write went nowhere.
                let _ = io.mem_write(index, pa, size, attrs, value);
                value
            } else {
                let (value, _) = io.mem_read(index, pa, size, attrs);
                access.data[at..at + bytes as usize].copy_from_slice(&value.to_le_bytes()[..bytes as usize]);
                value
            };
            self.debug.note(Caught::Device { pa: pa.0, writes: access.write, value });
            done += bytes;
        }
        if !access.write {
            page.set_mmio_data(access.data);
        }
        self.pending = true;
    }

    fn msr_access(&mut self, write: bool, io: &dyn CpuIo) {
        let (index, page) = (self.core.index, &self.core.page);
        self.core.count(Count::Msr);
        let access = page.msr();
        let reg = SysReg::Msr(access.index);
        if write {
            if access.index == msr::TSC_DEADLINE {
                clock::note_offset(&self.vm, &self.core);
            }
            let done = io.sysreg_write(index, reg, access.data);
            if done.is_some() && access.index == msr::APIC_BASE {
                self.set_apic_base(access.data);
            }
            self.core.page.answer_msr(done.map(|()| access.data));
        } else {
            page.answer_msr(io.sysreg_read(index, reg));
        }
        self.pending = true;
    }

    /// Whether CPUID shows a local APIC depends on it.
    fn set_apic_base(&mut self, value: u64) {
        self.copied = false;
        let set = self.core.fd.get_sregs().and_then(|mut sregs| {
            sregs.apic_base = value;
            self.core.fd.set_sregs(&sregs)
        });
        if let Err(e) = set {
            log::debug!("kvm: IA32_APIC_BASE {value:#x} is not taken: {e}");
        }
    }
}

impl Vcpu for KvmVcpu {
    fn handle(&self) -> Arc<dyn VcpuHandle> {
        handle(&self.core)
    }

    fn run(&mut self, io: &dyn CpuIo) -> VcpuExit {
        self.core.entry.bind_thread();
        let smm = self.vm.smm_slots.as_ref().and_then(|s| s.failure());
        if let Some(reason) = self.vm.slots.failure().or(smm) {
            return VcpuExit::Failed(AccelError::Other(reason));
        }
        if let Err(e) = self.prepare_debug() {
            return VcpuExit::Failed(e);
        }
        let exit = self.run_loop(io);
        self.leave_debug();
        exit
    }

    fn get_state(&mut self, groups: StateGroups) -> CpuState {
        CpuState::X86(Box::new(self.read_state(groups)))
    }

    fn set_state(&mut self, state: &CpuState) -> Result<(), StateError> {
        let Some(state) = state.as_x86() else {
            return Err(StateError("it is not an x86 processor's".to_owned()));
        };
        state.check().map_err(|e| StateError(e.to_string()))?;
        self.write_state(state)?;
        clock::write_tsc(&self.core, state.tsc);
        clock::note_offset(&self.vm, &self.core);
        Ok(())
    }

    fn reset(&mut self, kind: ResetKind, start: Option<StartRequest>) {
        let done = match start {
            Some(how) => self.start_at(how.pc).map_err(|e| AccelError::Other(e.to_string())),
            None => self.reset_all(kind),
        };
        if let Err(e) = done {
            log::error!("kvm: vCPU {} cannot be reset: {e}", self.core.index);
        }
    }

    fn translate(&mut self, va: GuestVirt, _access: Access) -> Result<Translation, TranslateFault> {
        let found = self.core.fd.translate_gva(va.0).map_err(|_| TranslateFault { va })?;
        if found.valid == 0 {
            return Err(TranslateFault { va });
        }
        Ok(Translation { pa: GuestPhys(found.physical_address), page_size: PAGE_SIZE })
    }

    fn set_emulation_failure(&mut self, hook: Arc<dyn EmulationFailure>) {
        // The same for all vCPUs of a machine.
        let _ = self.vm.fallback.set(hook.clone());
        self.hook = Some(hook);
    }

    fn debug(&mut self) -> Option<&mut dyn VcpuDebug> {
        Some(self)
    }
}

impl KvmVcpu {
    fn run_loop(&mut self, io: &dyn CpuIo) -> VcpuExit {
        loop {
            if self.core.entry.take(KICK) {
                let exit = self.finish_pending(io);
                if exit.is_some() {
                    // The kick still counts.
                    self.core.entry.request(KICK);
                }
                return exit.unwrap_or(VcpuExit::Kicked);
            }
            self.core.entry.take(LOOK);
            if let Some(exit) = self.before_entry(io) {
                return exit;
            }
            let fd = &self.core.fd;
            let Some(result) = self.core.entry.enter(0, || ioctl::run(fd)) else {
                continue;
            };
            self.after_entry();
            if let Some(exit) = self.after_run(result, io) {
                return exit;
            }
            if let Some(caught) = self.debug.take_caught() {
                let exit = self.finish_pending(io);
                // Another part of the same access.
                self.debug.take_caught();
                return exit.unwrap_or(VcpuExit::Debug(DebugStop::Caught(caught)));
            }
            if self.pending && self.stepping() {
                let exit = self.finish_pending(io).or_else(|| self.step_after_access());
                if let Some(exit) = exit {
                    return exit;
                }
            }
        }
    }
}
