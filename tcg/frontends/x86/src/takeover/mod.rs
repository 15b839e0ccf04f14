//! Executing what another engine cannot: the instructions of a guest that KVM runs and whose emulator fails on them.
//!
//! The other engine's state is taken over in parts, as an instruction needs them. After the instruction this goes on for
//! as long as there are further ones of the kind close by: handing over costs as much as some thirty instructions. It
//! stops in front of whatever concerns the other engine's own devices: accesses to anything but RAM, ports, privileged
//! registers, interrupts.

mod kinds;
mod tables;

pub use kinds::Counters;

use mimus_arch::CpuState;
use mimus_arch::x86::regs::*;
use mimus_arch::x86::state::{Exception as Pending, X86State};
use mimus_core::accel::{Done, FailedInstruction, Finished, StatePart, StateSource, VcpuExit};
use mimus_tcg_exec::frontend::GuestFrontend;
use mimus_tcg_exec::vcpu::TcgVcpu;

use iced_x86::Instruction;

use crate::control::valid_xcr0;
use crate::convert::{Registers, check, core_from_arch, core_to_arch, set_xsave, update_xsave};
use crate::decode::{MAX_LEN, decode};
use crate::exception::Exception;
use crate::frontend::{X86, X86Cpu, ip_of, set_registers};
use crate::host::Host;
use crate::{interrupt, paging};
use kinds::{Needs, belongs_to_other, needs};

/// Most instructions in a row: how long interrupts may wait for the other engine (a tenth of a millisecond or so).
const LONGEST: u32 = 256;
/// How many instructions the other engine could execute may come between two that it cannot.
const PATIENCE: u32 = 32;
/// Most physical address bits there can be: what the other engine's guest has is not known.
const PHYS_BITS: u8 = 52;

/// Executes the instruction, and perhaps some after it.
pub fn finish(vcpu: &mut TcgVcpu<X86>, failed: FailedInstruction<'_>, counters: &Counters) -> Finished {
    let FailedInstruction { state, rest, single, io, .. } = failed;
    if state.as_x86().is_none() {
        return Finished::NotHandled("the state is not an x86 one".to_owned());
    }
    vcpu.lend(io, |cpu| {
        let mut run =
            Takeover { cpu, state, rest, have: Needs::default(), before: Vec::new(), changes: Done::default() };
        match run.execute(single, counters) {
            Ok(()) => {
                counters.add_executed(run.changes.instructions);
                Finished::Done(run.hand_back())
            }
            Err(Stop::TripleFault) => {
                run.hand_back();
                Finished::TripleFault
            }
            Err(Stop::Unknown(reason)) => Finished::NotHandled(reason),
        }
    })
}

enum Stop {
    TripleFault,
    Unknown(String),
}

struct Takeover<'a> {
    cpu: &'a mut X86Cpu,
    state: &'a mut CpuState,
    rest: &'a mut dyn StateSource,
    /// Parts of the state that have been fetched.
    have: Needs,
    /// The vector registers as they were.
    before: Vec<u8>,
    changes: Done,
}

impl Takeover<'_> {
    /// Checked to be one.
    fn x86(&mut self) -> &mut X86State {
        match &mut *self.state {
            CpuState::X86(state) => state,
            _ => unreachable!("the state was found to be an x86 one"),
        }
    }

    fn execute(&mut self, single: bool, counters: &Counters) -> Result<(), Stop> {
        self.take_over()?;
        if self.deliver_pending() {
            return self.check_stopped();
        }
        let insn = self.next().ok_or_else(|| Stop::Unknown("there is no memory at its address".to_owned()))?;
        self.check_known(&insn)?;
        self.step(&insn)?;
        counters.count(&insn, true, self.cpu.head.pc);
        let mut since = 0;
        while !single && since < PATIENCE && self.changes.instructions < LONGEST && self.may_go_on() {
            let Some(insn) = self.next() else { break };
            let known = counters.is_known(&insn);
            if !known && belongs_to_other(&insn) || self.check_known(&insn).is_err() {
                break;
            }
            self.cpu.set_ram_only(true);
            if !self.step(&insn)? {
                break;
            }
            since = if known { 0 } else { since + 1 };
            if known {
                counters.count(&insn, false, 0);
            }
        }
        Ok(())
    }

    /// The registers.
    fn take_over(&mut self) -> Result<(), Stop> {
        let CpuState::X86(from) = &*self.state else { return Ok(()) };
        let st = &mut self.cpu.guest.st;
        from.check().map_err(|e| Stop::Unknown(e.to_string()))?;
        check(st, from).map_err(Stop::Unknown)?;
        let registers = core_from_arch(st, from);
        st.phys_bits = PHYS_BITS;
        st.apic_base = from.apic_base;
        st.shadow = from.events.shadow_sti || from.events.shadow_mov_ss;
        st.shadow_ss = from.events.shadow_mov_ss;
        st.held_back = 0;
        st.nmi_masked = from.events.nmi_masked;
        (st.nmi_pending, st.smm) = (false, false);
        (st.dr6, st.dr7) = (DR6_FIXED, DR7_FIXED);
        let pdptrs = from.pdptrs.is_none() && paging::uses_pdptrs(st);
        set_registers(self.cpu, &registers);
        let cr3 = self.cpu.guest.st.cr3;
        if pdptrs && paging::load_pdptrs(self.cpu, cr3).is_err() {
            return Err(Stop::Unknown("CR3 does not point to page directory pointers".to_owned()));
        }
        Ok(())
    }

    /// Delivers an event that came before the instruction; true if there was one.
    fn deliver_pending(&mut self) -> bool {
        let ip = ip_of(self.cpu, self.cpu.head.pc);
        let cr2 = self.cpu.guest.st.cr2;
        let events = &mut self.x86().events;
        if let Some(e) = events.exception.take() {
            let exception = Exception { vector: e.vector, error: e.error_code, payload: e.payload.unwrap_or(cr2) };
            interrupt::raise(self.cpu, exception, ip);
        } else if let Some(i) = events.interrupt.take() {
            interrupt::hardware(self.cpu, i.vector, ip);
        } else if std::mem::take(&mut events.nmi_injected) {
            events.nmi_masked = true;
            interrupt::hardware(self.cpu, VECTOR_NMI, ip);
        } else {
            return false;
        }
        self.cpu.guest.st.update_guards();
        true
    }

    /// The instruction at the program counter, invalid if it is none; `None` if it cannot be read, or perhaps faults.
    fn next(&mut self) -> Option<Instruction> {
        let mut bytes = [0; MAX_LEN];
        let pc = self.cpu.head.pc;
        let have = self.cpu.peek_code(pc, &mut bytes);
        let st = &self.cpu.guest.st;
        let insn = decode(&bytes[..have], st.code_bits(), pc, &st.features);
        (have > 0 && !(insn.is_invalid() && have < MAX_LEN)).then_some(insn)
    }

    /// Finds what the translator would do wrong, because it does not have the registers concerned.
    fn check_known(&mut self, insn: &Instruction) -> Result<(), Stop> {
        if kinds::writes_system(insn) {
            return Err(Stop::Unknown("it changes model-specific registers".to_owned()));
        }
        let mut bytes = [0; MAX_LEN];
        let mut whole = *insn;
        if insn.is_invalid() {
            let pc = self.cpu.head.pc;
            let have = self.cpu.peek_code(pc, &mut bytes);
            whole = kinds::of_any_processor(&bytes[..have], self.cpu.guest.st.code_bits(), pc);
        }
        if !kinds::handles_more_state(&whole) || self.cpu.guest.st.cr4 & CR4_OSXSAVE == 0 {
            return Ok(());
        }
        self.fetch(StatePart::VectorControl)?;
        let xcr0 = self.x86().xcr0;
        if valid_xcr0(&self.cpu.guest.st, xcr0) {
            return Ok(());
        }
        Err(Stop::Unknown(format!("the translator does not have all the registers of XCR0 {xcr0:#x}")))
    }

    fn fetch(&mut self, part: StatePart) -> Result<(), Stop> {
        let have = match part {
            StatePart::Vectors => &mut self.have.vectors,
            StatePart::VectorControl => &mut self.have.control,
            StatePart::System => &mut self.have.system,
        };
        if std::mem::replace(have, true) {
            return Ok(());
        }
        self.rest.fetch(part, self.state).map_err(|e| Stop::Unknown(e.to_string()))?;
        let CpuState::X86(from) = &*self.state else { return Ok(()) };
        let now = self.cpu.now();
        match part {
            StatePart::Vectors => {
                self.before.clone_from(&from.xsave);
                X86::leave_run(self.cpu);
                set_xsave(&mut self.cpu.guest.st, &from.xsave);
                X86::enter_run(self.cpu);
            }
            StatePart::VectorControl => self.cpu.guest.st.xcr0 = from.xcr0,
            StatePart::System => {
                let st = &mut self.cpu.guest.st;
                for m in &from.msrs {
                    if let Some(value) = st.msrs.stored(m.index) {
                        *value = m.value;
                    }
                }
                if from.tsc_khz != 0 {
                    st.tsc_khz = from.tsc_khz;
                }
                st.set_tsc(now, from.tsc);
            }
        }
        Ok(())
    }

    /// Executes the instruction at the program counter, with what it raises; false if it was abandoned.
    fn step(&mut self, insn: &Instruction) -> Result<bool, Stop> {
        let wants = needs(insn, &self.cpu.guest.st);
        for (wanted, part) in [
            (wants.vectors, StatePart::Vectors),
            (wants.control, StatePart::VectorControl),
            (wants.system, StatePart::System),
        ] {
            if wanted {
                self.fetch(part)?;
            }
        }
        let st = &mut self.cpu.guest.st;
        let trap = st.flags & RFLAGS_TF != 0;
        let shadow = (std::mem::take(&mut st.shadow), std::mem::take(&mut st.shadow_ss));
        let (cpl, delivered) = (st.cpl, self.cpu.guest.deliveries);
        self.cpu.step_careful();
        self.cpu.head.exit_request = 0;
        if self.cpu.abandoned() {
            (self.cpu.guest.st.shadow, self.cpu.guest.st.shadow_ss) = shadow;
            return Ok(false);
        }
        self.changes.instructions += 1;
        self.check_stopped()?;
        let st = &mut self.cpu.guest.st;
        let entered = st.cpl < cpl || self.cpu.guest.deliveries != delivered;
        if !entered {
            st.flags &= !RFLAGS_RF;
        }
        if trap && !entered {
            // The other engine has the debug registers that tell of it.
            self.x86().events.exception = Some(Pending { vector: VECTOR_DB, error_code: None, payload: Some(1 << 14) });
        }
        Ok(true)
    }

    fn check_stopped(&mut self) -> Result<(), Stop> {
        match self.cpu.take_stopped() {
            None => Ok(()),
            Some(VcpuExit::Failed(e)) => Err(Stop::Unknown(e.to_string())),
            Some(_) => Err(Stop::TripleFault),
        }
    }

    /// Whether a further instruction may be executed here. A user's run on the processor itself.
    fn may_go_on(&mut self) -> bool {
        let pending = self.x86().events.exception.is_some();
        let st = &self.cpu.guest.st;
        !pending && st.cpl != 3 && st.flags & RFLAGS_TF == 0 && !self.cpu.halted
    }

    /// Puts what has changed into the state.
    fn hand_back(&mut self) -> Done {
        let registers = Registers {
            gpr: std::array::from_fn(|i| self.cpu.gpr(i)),
            ip: ip_of(self.cpu, self.cpu.head.pc),
            arith: self.cpu.arith(),
        };
        let mut changes = self.changes;
        changes.tables_written = tables::written(self.cpu);
        X86::leave_run(self.cpu);
        let halted = self.cpu.halted;
        let CpuState::X86(out) = &mut *self.state else { return changes };
        let st = &self.cpu.guest.st;
        core_to_arch(st, &registers, out);
        out.events.shadow_sti = st.shadow && !st.shadow_ss;
        out.events.shadow_mov_ss = st.shadow && st.shadow_ss;
        out.events.nmi_masked = st.nmi_masked;
        if halted {
            out.mp_state = mimus_arch::x86::MpState::Halted;
        }
        if self.have.vectors {
            update_xsave(st, &mut out.xsave);
            changes.vectors = out.xsave != self.before;
        }
        if self.have.control {
            changes.vector_control = out.xcr0 != st.xcr0;
            out.xcr0 = st.xcr0;
        }
        changes
    }
}
