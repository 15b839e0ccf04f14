//! Instructions that the kernel's emulator cannot execute, and other internal errors.

use crate::handle::Count;
use crate::sys::run_page::InternalError;
use crate::x86::regs;
use crate::x86::vcpu::KvmVcpu;
use kvm_bindings::*;
use mimus_arch::x86::X86State;
use mimus_arch::{CpuState, StateGroups};
use mimus_core::accel::{Access, CpuIo, FailedInstruction, Finished, Vcpu, VcpuExit};
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
        let mut state = CpuState::X86(Box::new(self.read_state(StateGroups::Execution)));
        let bytes = if error.insn.is_empty() { self.bytes_at(state.pc()) } else { error.insn };
        let reason = match self.hook.clone() {
            None => "nothing else here can either".to_owned(),
            Some(hook) => {
                let before = state.clone();
                let finished = hook.finish(FailedInstruction {
                    vcpu: self.core.index,
                    bytes: &bytes,
                    state: &mut state,
                    io,
                    translate: &mut |va, access| self.translate(va, access),
                });
                match finished {
                    Finished::NotHandled(reason) => reason,
                    Finished::Done => return self.take_over(&before, &state, false),
                    Finished::DoneTablesWritten => return self.take_over(&before, &state, true),
                }
            }
        };
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
    fn take_over(&mut self, before: &CpuState, after: &CpuState, tables_written: bool) -> Option<VcpuExit> {
        let (CpuState::X86(before), CpuState::X86(after)) = (before, after) else {
            return Some(self.failed("the finished instruction's state is not an x86 one".to_owned()));
        };
        if let Err(e) = after.check() {
            return Some(self.failed(format!("the finished instruction's state is impossible: {e}")));
        }
        if (&after.xsave, after.xcr0) != (&before.xsave, before.xcr0)
            && let Err(e) = self.write_vectors(after)
        {
            return Some(self.failed(format!("a finished instruction: {e}")));
        }
        if let Err(e) = self.write_basic(before, after) {
            return Some(self.failed(format!("a finished instruction: {e}")));
        }
        if tables_written && let Err(e) = self.vm.forget_page_tables() {
            return Some(VcpuExit::Failed(e));
        }
        None
    }

    /// General registers, segments and control registers, events: with the next entry where the kernel can.
    fn write_basic(&mut self, before: &X86State, after: &X86State) -> Result<(), kvm_ioctls::Error> {
        let sregs = regs::sregs_from(after);
        let changed = sregs != regs::sregs_from(before);
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
