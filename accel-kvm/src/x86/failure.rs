//! Instructions that the kernel's emulator cannot execute, and other internal errors.

use crate::handle::Count;
use crate::sys::run_page::InternalError;
use crate::x86::vcpu::KvmVcpu;
use crate::x86::{clock, msrs, regs};
use kvm_bindings::*;
use mimus_arch::x86::{MpState, X86State};
use mimus_arch::{CpuState, StateGroups};
use mimus_core::accel::{
    AccelError, Access, CpuIo, Done, FailedInstruction, Finished, IrqChipMode, ResetCause, StateError, StatePart,
    StateSource, Vcpu, VcpuExit,
};
use mimus_core::bus::GuestVirt;
use mimus_core::memory::PAGE_SIZE;

/// Longest instruction.
const LONGEST: usize = 15;

impl KvmVcpu {
    /// `KVM_EXIT_INTERNAL_ERROR`.
    pub(super) fn internal_error(&mut self, io: &dyn CpuIo) -> Option<VcpuExit> {
        let error = self.core.page.internal_error();
        if error.suberror != KVM_INTERNAL_ERROR_EMULATION {
            let InternalError { suberror, data, .. } = error;
            return Some(self.failed(format!("internal error {suberror} of KVM (data {data:x?})")));
        }
        if let Some(stop) = self.stopped_at_patch(&error.insn) {
            return Some(stop);
        }
        self.core.count(Count::EmulationFailure);
        // The next one is likely to follow: its registers come with the exit.
        self.copy_registers_always();
        let before = match self.basic_registers() {
            Ok(before) => before,
            Err(e) => return Some(VcpuExit::Failed(e)),
        };
        let mut state = CpuState::X86(Box::new(self.read_state(StateGroups::Core)));
        let reason = match self.hook.clone() {
            None => "nothing else here can either".to_owned(),
            Some(hook) => {
                let (vcpu, single) = (self.core.index, self.debugging());
                let finished = hook.finish(FailedInstruction {
                    vcpu,
                    bytes: &error.insn,
                    state: &mut state,
                    rest: self,
                    single,
                    io,
                });
                match finished {
                    Finished::NotHandled(reason) => reason,
                    Finished::Done(done) => return self.take_over(&before, &state, done),
                    Finished::TripleFault => {
                        let stopped = self.take_over(&before, &state, Done::default());
                        return stopped.or(Some(VcpuExit::Reset(ResetCause::TripleFault)));
                    }
                }
            }
        };
        let bytes = if error.insn.is_empty() { self.bytes_at(state.pc()) } else { error.insn };
        let text: Vec<String> = bytes.iter().map(|b| format!("{b:02x}")).collect();
        Some(self.failed(format!(
            "this host's KVM cannot execute the instruction at {:#x} ({}): {reason}",
            state.pc(),
            text.join(" ")
        )))
    }

    /// The bytes from a linear address on, as far as they are mapped.
    fn bytes_at(&mut self, at: u64) -> Vec<u8> {
        let mut bytes = Vec::new();
        while bytes.len() < LONGEST {
            let va = at.wrapping_add(bytes.len() as u64);
            let Ok(found) = self.translate(GuestVirt(va), Access::Execute) else { break };
            let view = self.vm.memory.view();
            let Some((block, offset)) = view.lookup(found.pa).and_then(|r| r.ram_at(found.pa)) else { break };
            let len = (LONGEST - bytes.len()).min((PAGE_SIZE - va % PAGE_SIZE) as usize);
            let mut part = vec![0; len];
            if !block.read(offset, &mut part) {
                break;
            }
            bytes.append(&mut part);
        }
        bytes
    }

    /// The instruction was finished outside.
    fn take_over(&mut self, before: &kvm_sync_regs, after: &CpuState, done: Done) -> Option<VcpuExit> {
        let CpuState::X86(after) = after else {
            return Some(self.failed("the finished instruction's state is not an x86 one".to_owned()));
        };
        if let Err(e) = after.check() {
            return Some(self.failed(format!("the finished instruction's state is impossible: {e}")));
        }
        let written = self.write_finished(before, after, done);
        if let Err(e) = written {
            return Some(self.failed(format!("a finished instruction: {e}")));
        }
        if done.tables_written
            && let Err(e) = self.vm.forget_page_tables()
        {
            return Some(VcpuExit::Failed(e));
        }
        if self.stepping() { self.step_after_access() } else { None }
    }

    fn write_finished(&mut self, before: &kvm_sync_regs, after: &X86State, done: Done) -> Result<(), StateError> {
        if done.vector_control {
            self.write_vector_control(after)?;
        }
        if done.vectors {
            self.write_vectors(after)?;
        }
        self.write_basic(before, after).map_err(|e| StateError(format!("registers: {e}")))?;
        if after.mp_state == MpState::Running {
            return Ok(());
        }
        match self.mode {
            IrqChipMode::User => self.wait = after.mp_state,
            _ => {
                let set = self.core.fd.set_mp_state(regs::mp_from(after.mp_state));
                set.map_err(|e| StateError(format!("whether it runs: {e}")))?;
            }
        }
        Ok(())
    }

    /// General registers, segments and control registers, events: with the next entry where the kernel can.
    fn write_basic(&mut self, before: &kvm_sync_regs, after: &X86State) -> Result<(), kvm_ioctls::Error> {
        // What is not in the state stays.
        let sregs = kvm_sregs { interrupt_bitmap: before.sregs.interrupt_bitmap, ..regs::sregs_from(after) };
        let changed = sregs != before.sregs;
        let events = regs::events_from(after, self.vm.caps.events);
        let general = regs::regs_from(after);
        self.flags_known = false;
        self.copied = false;
        self.note_untold(after);
        let fd = &self.core.fd;
        if !self.can_copy() {
            if changed {
                fd.set_sregs(&sregs)?;
            }
            fd.set_regs(&general)?;
            return fd.set_vcpu_events(&events);
        }
        let sets = KVM_SYNC_X86_REGS | KVM_SYNC_X86_EVENTS | if changed { KVM_SYNC_X86_SREGS } else { 0 };
        self.core.page.set_sync_regs(sets, &kvm_sync_regs { regs: general, sregs, events });
        // Whoever reads the state before the next entry must see it.
        self.pending = true;
        Ok(())
    }
}

impl StateSource for KvmVcpu {
    fn fetch(&mut self, part: StatePart, state: &mut CpuState) -> Result<(), AccelError> {
        let CpuState::X86(state) = state else {
            return Err(AccelError::Other("it is not an x86 processor's".to_owned()));
        };
        match part {
            StatePart::Vectors => self.read_vectors(state),
            StatePart::VectorControl => self.read_vector_control(state),
            StatePart::System => {
                let fd = &self.core.fd;
                state.msrs = msrs::read_available(fd, self.vm.available_msrs(fd)?)?;
                state.tsc = clock::read_tsc(&self.core);
                state.tsc_khz = fd.get_tsc_khz().unwrap_or(0);
                Ok(())
            }
        }
    }
}
