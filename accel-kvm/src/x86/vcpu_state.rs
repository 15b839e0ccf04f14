//! The state of a vCPU: reading, setting, resetting, in groups.

use crate::error::{errno, refused};
use crate::sys::x86 as sys_x86;
use crate::x86::irqchip;
use crate::x86::vcpu::KvmVcpu;
use crate::x86::{clock, msrs, regs};
use kvm_bindings::*;
use mimus_arch::StateGroups;
use mimus_arch::x86::regs::{CR0_CD, CR0_NW, RSP, VECTOR_BP, VECTOR_OF};
use mimus_arch::x86::xsave::{LAYOUT, normalise};
use mimus_arch::x86::{MpState, X86State};
use mimus_core::accel::{AccelError, IrqChipMode, ResetKind, StateError};
use std::sync::atomic::Ordering;

/// The sets of registers that can be copied through the run page: general, segments and control, events.
const ALL_SETS: u32 = KVM_SYNC_X86_REGS | KVM_SYNC_X86_SREGS | KVM_SYNC_X86_EVENTS;

impl KvmVcpu {
    fn bsp(&self) -> bool {
        self.core.index.0 == 0
    }

    /// True if registers can be copied through the run page.
    pub(super) fn can_copy(&self) -> bool {
        self.vm.caps.sync_regs & ALL_SETS == ALL_SETS
    }

    /// General registers, segments and control registers, events: with one call where the kernel can.
    pub(super) fn basic_registers(&mut self) -> Result<kvm_sync_regs, AccelError> {
        let page = self.core.page.clone();
        if self.copied && !self.pending {
            return Ok(page.sync_regs());
        }
        if self.can_copy() {
            page.set_valid_regs(ALL_SETS);
            let result = self.pass_through();
            page.set_valid_regs(if self.copy_regs { ALL_SETS } else { 0 });
            // It ends with EINTR; anything else would have been an exit.
            if result.as_ref().err().and_then(|e| e.raw_os_error()) == Some(libc::EINTR) {
                return Ok(page.sync_regs());
            }
        }
        let fd = &self.core.fd;
        Ok(kvm_sync_regs {
            regs: fd.get_regs().map_err(errno("read general registers"))?,
            sregs: fd.get_sregs().map_err(errno("read segments and control registers"))?,
            events: fd.get_vcpu_events().map_err(errno("read pending events"))?,
        })
    }

    /// Has every exit copy registers from now on.
    pub(super) fn copy_registers_always(&mut self) {
        if !self.copy_regs && self.can_copy() {
            self.copy_regs = true;
            self.core.page.set_valid_regs(ALL_SETS);
        }
    }

    /// The state. What cannot be read is logged and left at its reset value.
    pub(super) fn read_state(&mut self, groups: StateGroups) -> X86State {
        // What came and was not taken yet is in the kernel's events then.
        self.take_latched();
        let mut state = X86State::reset(self.bsp());
        if let Err(e) = self.read_into(&mut state, groups) {
            log::error!("kvm: the state of vCPU {} is incomplete: {e}", self.core.index);
        }
        state
    }

    fn read_into(&mut self, state: &mut X86State, groups: StateGroups) -> Result<(), AccelError> {
        let basic = self.basic_registers()?;
        regs::regs_to(state, &basic.regs);
        regs::sregs_to(state, &basic.sregs);
        regs::events_to(state, &basic.events);
        if let Some((exception, rip, rsp)) = self.untold
            && (rip, rsp) == (state.rip, state.gpr[RSP])
        {
            state.events.exception = Some(exception);
        }
        state.events.intr = self.core.pins() & crate::handle::INTR != 0;
        state.mp_state = MpState::Running;
        if groups == StateGroups::Core {
            return Ok(());
        }
        self.read_vectors(state)?;
        self.read_vector_control(state)?;
        if groups == StateGroups::Execution {
            return Ok(());
        }
        let fd = &self.core.fd;
        regs::debug_to(state, &fd.get_debug_regs().map_err(errno("read debug registers"))?);
        state.mp_state = match self.mode {
            IrqChipMode::User => self.wait,
            _ => regs::mp_to(&fd.get_mp_state().map_err(errno("read whether it runs"))?),
        };
        if self.vm.caps.sregs2 {
            let sregs = sys_x86::get_sregs2(fd).map_err(refused("read segments and control registers"))?;
            regs::sregs2_to(state, &sregs);
        }
        state.msrs = msrs::read_available(fd, self.vm.available_msrs(fd)?)?;
        state.tsc = clock::read_tsc(&self.core);
        state.tsc_khz = fd.get_tsc_khz().unwrap_or(0);
        Ok(())
    }

    /// Floating point and vectors.
    pub(super) fn read_vectors(&self, state: &mut X86State) -> Result<(), AccelError> {
        let fd = &self.core.fd;
        let area = sys_x86::get_xsave(fd, self.vm.caps.xsave_size).map_err(refused("read vector registers"))?;
        let area = self.vm.host.layout.convert(&area, &LAYOUT);
        state.xsave = area.ok_or_else(|| AccelError::Other("vector registers are of an unknown form".to_owned()))?;
        normalise(&mut state.xsave);
        Ok(())
    }

    /// XCR0.
    pub(super) fn read_vector_control(&self, state: &mut X86State) -> Result<(), AccelError> {
        let xcrs = self.core.fd.get_xcrs().map_err(errno("read XCR0"))?;
        let known = &xcrs.xcrs[..xcrs.xcrs.len().min(xcrs.nr_xcrs as usize)];
        state.xcr0 = known.iter().find(|x| x.xcr == 0).map_or(1, |x| x.value);
        Ok(())
    }

    /// Sets XCR0.
    pub(super) fn write_vector_control(&self, state: &X86State) -> Result<(), StateError> {
        let mut xcrs = kvm_xcrs { nr_xcrs: 1, ..Default::default() };
        xcrs.xcrs[0] = kvm_xcr { xcr: 0, reserved: 0, value: state.xcr0 };
        self.core.fd.set_xcrs(&xcrs).map_err(|e| StateError(format!("XCR0 {:#x}: {e}", state.xcr0)))
    }

    /// Sets vector registers.
    pub(super) fn write_vectors(&self, state: &X86State) -> Result<(), StateError> {
        let bad = |e: std::io::Error| StateError(format!("vector registers: {e}"));
        let fd = &self.core.fd;
        let area = LAYOUT.convert(&state.xsave, &self.vm.host.layout);
        let area = area.ok_or_else(|| StateError("vector registers are not those of this host".to_owned()))?;
        sys_x86::set_xsave(fd, self.vm.caps.xsave_size, &area).map_err(bad)
    }

    /// Sets everything but time. The order matters: control registers decide what other values mean, MSRs of features come
    /// before what they turn on, events last.
    pub(super) fn write_state(&mut self, state: &X86State) -> Result<(), StateError> {
        let refused = |what: &'static str| move |e: kvm_ioctls::Error| StateError(format!("{what}: {e}"));
        // Whatever was not finished is of the old state.
        if self.pending {
            let _ = self.pass_through();
        }
        self.core.page.clear_dirty_regs();
        self.flags_known = false;
        self.copied = false;
        self.set_frequency(state.tsc_khz);
        let fd = &self.core.fd;
        if self.vm.caps.sregs2 {
            let sregs = regs::sregs2_from(state);
            sys_x86::set_sregs2(fd, &sregs).map_err(|e| StateError(format!("segments or control registers: {e}")))?;
        } else {
            fd.set_sregs(&regs::sregs_from(state)).map_err(refused("segments or control registers"))?;
        }
        fd.set_regs(&regs::regs_from(state)).map_err(refused("general registers"))?;
        self.write_vector_control(state)?;
        self.write_vectors(state)?;
        msrs::write(fd, &state.msrs, &self.initial_msrs)?;
        fd.set_debug_regs(&regs::debug_from(state)).map_err(refused("debug registers"))?;
        let events = regs::events_from(state, self.vm.caps.events);
        fd.set_vcpu_events(&events).map_err(refused("pending events"))?;
        match self.mode {
            IrqChipMode::User => {
                self.wait = state.mp_state;
                // The kernel takes CR8 from there with every entry.
                self.cr8 = state.cr8;
                self.core.page.set_cr8(state.cr8);
            }
            _ => fd.set_mp_state(regs::mp_from(state.mp_state)).map_err(refused("whether it runs"))?,
        }
        self.note_untold(state);
        self.core.set_restored_pins(state.events.intr);
        Ok(())
    }

    /// Remembers a software exception that is given to the kernel.
    pub(super) fn note_untold(&mut self, state: &X86State) {
        let soft = state.events.exception.filter(|e| matches!(e.vector, VECTOR_BP | VECTOR_OF));
        self.untold = soft.map(|e| (e, state.rip, state.gpr[RSP]));
    }

    fn set_frequency(&self, khz: u32) {
        let fd = &self.core.fd;
        if khz == 0 || fd.get_tsc_khz().unwrap_or(0) == khz {
            return;
        }
        if !self.vm.caps.tsc_scaling || fd.set_tsc_khz(khz).is_err() {
            log::warn!(
                "kvm: the state's time-stamp counter runs at {khz} kHz, which this host cannot give: the guest's \
                 clock will be wrong unless it uses kvmclock"
            );
        }
        self.core.tsc_khz.store(fd.get_tsc_khz().unwrap_or(0), Ordering::Relaxed);
    }

    /// The state at power-on or at the machine's reset.
    pub(super) fn reset_all(&mut self, kind: ResetKind) -> Result<(), AccelError> {
        let mut state = X86State::reset(self.bsp());
        state.msrs = self.initial_msrs.clone();
        self.write_state(&state).map_err(|e| AccelError::Other(e.to_string()))?;
        // Time goes on over the machine's reset, and starts anew with its power.
        if let Some(frozen) = self.core.frozen_tsc().as_mut().filter(|_| kind == ResetKind::Cold) {
            *frozen = 0;
        }
        if self.mode.starts_vcpus() {
            let lapic = irqchip::reset_state(self.core.index.0);
            irqchip::set_lapic(&self.core.fd, &lapic).map_err(refused("reset the local APIC"))?;
        }
        Ok(())
    }

    /// INIT: most is reset, but not MSRs, vector registers and time (SDM volume 3 table 10-1).
    fn init_state(&mut self) -> X86State {
        let old = self.read_state(StateGroups::All);
        let fresh = X86State::reset(self.bsp());
        let caching = old.cr0 & (CR0_CD | CR0_NW);
        X86State {
            cr0: fresh.cr0 & !(CR0_CD | CR0_NW) | caching,
            xcr0: old.xcr0,
            xsave: old.xsave,
            msrs: old.msrs,
            tsc: old.tsc,
            tsc_khz: old.tsc_khz,
            apic_base: old.apic_base,
            mp_state: if self.bsp() { MpState::Running } else { MpState::WaitForSipi },
            ..fresh
        }
    }

    /// The INIT pin, when no local APIC in the kernel sees to it.
    pub(super) fn init(&mut self) {
        let state = self.init_state();
        if let Err(e) = self.write_state(&state) {
            log::error!("kvm: INIT of vCPU {}: {e}", self.core.index);
        }
    }

    /// INIT and a start-up interrupt.
    pub(super) fn start_at(&mut self, pc: u64) -> Result<(), StateError> {
        let mut state = self.init_state();
        state.start_real_mode(pc);
        self.write_state(&state)
    }
}
