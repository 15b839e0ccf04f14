//! Single steps of our own debugger, on the vCPU's thread, the machine standing.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use mimus_core::accel::{Access, CpuIo, Vcpu, VcpuExit};
use mimus_core::arch::StateGroups;
use mimus_core::bus::{GuestVirt, MemTxAttrs, MemTxResult};
use mimus_core::memory::AddressSpace;
use mimus_debug::registers;
use mimus_debug::steps::StepKind;
use mimus_debug::target::Stop;
use mimus_machines::machine::Request;

use crate::debugger::stop_of;

/// Steps to make.
pub struct Steps {
    pub vcpu: u32,
    pub count: u64,
    pub kind: StepKind,
    pub memory: Arc<AddressSpace>,
    /// Somebody wants them to end.
    pub interrupted: Arc<AtomicBool>,
}

/// Why they ended, and what the guest asked the machine for meanwhile.
pub type Ended = (Result<Stop, String>, Option<Request>);

impl Steps {
    /// Makes them.
    pub fn make(&self, v: &mut dyn Vcpu, io: &dyn CpuIo) -> Ended {
        let Some(debug) = v.debug() else {
            return (Err("the accelerator has no single steps".to_owned()), None);
        };
        debug.set_step_interrupts(true);
        debug.set_single_step(true);
        let ended = if self.kind == StepKind::Instruction { self.many(v, io) } else { self.each(v, io) };
        if let Some(debug) = v.debug() {
            debug.set_single_step(false);
            debug.set_more_steps(0);
        }
        ended
    }

    /// `count` instructions, as many as the accelerator does at once.
    fn many(&self, v: &mut dyn Vcpu, io: &dyn CpuIo) -> Ended {
        let mut left = self.count;
        while left > 0 {
            if let Some(debug) = v.debug() {
                debug.set_more_steps(left - 1);
            }
            let stop = self.run(v, io);
            let more = v.debug().and_then(|d| d.more_steps());
            match stop {
                (Ok(Stop::Step { .. }), None) => left = more.unwrap_or(left - 1),
                other => return other,
            }
            if self.interrupted.load(Ordering::SeqCst) {
                return (Ok(Stop::Paused), None);
            }
        }
        (Ok(Stop::Step { vcpu: self.vcpu }), None)
    }

    /// Until the `count`-th instruction of the kind.
    fn each(&self, v: &mut dyn Vcpu, io: &dyn CpuIo) -> Ended {
        let mut left = self.count;
        while left > 0 {
            let before = v.get_state(StateGroups::All);
            let insn = self.code(v, registers::pc(&before));
            match self.run(v, io) {
                (Ok(Stop::Step { .. }), None) => {}
                other => return other,
            }
            let after = registers::pc(&v.get_state(StateGroups::All));
            left -= u64::from(self.kind.ends(&insn, registers::bits(&before), registers::pc(&before), after));
        }
        (Ok(Stop::Step { vcpu: self.vcpu }), None)
    }

    /// Runs the vCPU to its next stop.
    fn run(&self, v: &mut dyn Vcpu, io: &dyn CpuIo) -> Ended {
        loop {
            return match v.run(io) {
                VcpuExit::Debug(stop) => (Ok(stop_of(self.vcpu, stop)), None),
                // Asked to look up, for this very work or to end it.
                VcpuExit::Kicked if self.interrupted.load(Ordering::SeqCst) => (Ok(Stop::Paused), None),
                VcpuExit::Kicked => continue,
                VcpuExit::Halted => {
                    (Err("the vCPU waits for an interrupt, and time stands: continue".to_owned()), None)
                }
                VcpuExit::Shutdown(cause) => (Ok(Stop::Paused), Some(Request::Shutdown(cause))),
                VcpuExit::Reset(cause) => (Ok(Stop::Paused), Some(Request::Reset(cause))),
                VcpuExit::Failed(error) => (Err(error.to_string()), None),
            };
        }
    }

    /// The code at `pc`, as much of the longest instruction as is there.
    fn code(&self, v: &mut dyn Vcpu, pc: u64) -> Vec<u8> {
        let mut code = Vec::new();
        while code.len() < 16 {
            let at = pc.wrapping_add(code.len() as u64);
            let Ok(found) = v.translate(GuestVirt(at), Access::Execute) else { break };
            let left = found.page_size - (at & (found.page_size - 1));
            let mut bytes = vec![0; (16 - code.len()).min(usize::try_from(left).unwrap_or(16))];
            if self.memory.read_bytes(found.pa, &mut bytes, MemTxAttrs::default()) != MemTxResult::Ok {
                break;
            }
            code.extend(bytes);
        }
        code
    }
}
