//! Execution by the IR interpreter: single careful steps beside generated code, or everything
//! (`-accel tcg,engine=interp`).

use std::sync::atomic::{Ordering, fence};

use mimus_core::accel::trace::words;
use mimus_tcg_ir::backend::pack_insn;
use mimus_tcg_ir::interp::{CallOutcome, Fault, InterpHost, Outcome, run};
use mimus_tcg_ir::unit::UnitInsn;
use mimus_tcg_ir::{AmoOp, Ext, FpFmt, FpOp, PagePc, Rm, Size, Slot, Val};

use crate::access::{At, Trapped};
use crate::code::Counts;
use crate::env::Cpu;
use crate::frontend::GuestFrontend;
use crate::translate::NoCode;

impl From<Trapped> for Fault {
    fn from(_: Trapped) -> Fault {
        Fault
    }
}

impl<F: GuestFrontend> InterpHost for Cpu<F> {
    fn slot(&self, slot: Slot) -> u64 {
        self.head.slots[slot.0 as usize]
    }
    fn set_slot(&mut self, slot: Slot, value: u64) {
        self.head.slots[slot.0 as usize] = value;
    }
    fn page_base(&self) -> u64 {
        self.head.page_base
    }
    fn begin_insn(&mut self, pc: PagePc, len: u8) {
        self.head.cur_insn = pack_insn(pc, len);
        self.count_one();
        self.trace_step(self.head.page_base.wrapping_add_signed(pc.0.into()), len);
    }
    fn stops(&mut self) -> bool {
        F::COHERENT_CODE && self.code_changed()
    }
    fn load(&mut self, va: u64, size: Size, ext: Ext) -> Result<u64, Fault> {
        let pc = At::Pc(self.current_insn().0);
        let value = Cpu::load(self, pc, va, size, ext)?;
        self.trace_access(0, va, size, value);
        Ok(value)
    }
    fn store(&mut self, va: u64, value: u64, size: Size) -> Result<(), Fault> {
        let pc = At::Pc(self.current_insn().0);
        Cpu::store(self, pc, va, value, size)?;
        self.trace_access(words::WRITE, va, size, value);
        Ok(())
    }
    fn load_reserved(&mut self, va: u64, size: Size, ext: Ext) -> Result<u64, Fault> {
        let pc = At::Pc(self.current_insn().0);
        let value = Cpu::load_reserved(self, pc, va, size, ext)?;
        self.trace_access(0, va, size, value);
        Ok(value)
    }
    fn store_conditional(&mut self, va: u64, value: u64, size: Size) -> Result<u64, Fault> {
        let pc = At::Pc(self.current_insn().0);
        let failed = Cpu::store_conditional(self, pc, va, value, size)?;
        self.trace_access(words::UPDATE, va, size, value);
        Ok(failed)
    }
    fn amo(&mut self, op: AmoOp, va: u64, value: u64, size: Size) -> Result<u64, Fault> {
        let pc = At::Pc(self.current_insn().0);
        let old = Cpu::amo(self, pc, op, va, value, size)?;
        self.trace_access(words::UPDATE, va, size, value);
        Ok(old)
    }
    fn rmw(&mut self, va: u64, size: Size, lock: bool, new: &mut dyn FnMut(u64) -> u64) -> Result<u64, Fault> {
        let pc = At::Pc(self.current_insn().0);
        let old = Cpu::rmw(self, pc, va, size, lock, new)?;
        if self.traces_memory() {
            let value = new(old);
            self.trace_access(words::WRITE, va, size, value);
        }
        Ok(old)
    }
    fn code_align(&self) -> u64 {
        F::CODE_ALIGN.into()
    }
    fn fence(&mut self) {
        fence(Ordering::SeqCst);
    }
    fn fp(&mut self, op: FpOp, fmt: FpFmt, rm: Rm, a: u64, b: u64, c: u64) -> u64 {
        F::fp(self, op, fmt, rm, a, b, c)
    }
    fn env_byte(&self, offset: i32) -> u8 {
        self.hot_byte(offset)
    }
    fn set_env_byte(&mut self, offset: i32, value: u8) {
        self.set_hot_byte(offset, value);
    }
    fn unit(&mut self, insn: &UnitInsn, d: Option<Slot>, a: Val, va: u64) -> Result<bool, Fault> {
        self.head.exit_request = 0;
        F::unit(self, insn, d, a, va);
        if self.head.exit_request != 0 { Err(Fault) } else { Ok(true) }
    }
    fn call(&mut self, helper: u16, args: [u64; 3]) -> (u64, CallOutcome) {
        let call = self.machine.helpers[helper as usize].call;
        self.head.exit_request = 0;
        let value = call(self, args[0], args[1], args[2]);
        let leave = std::mem::take(&mut self.head.exit_request) != 0;
        (value, if leave { CallOutcome::Leave } else { CallOutcome::Continue })
    }
}

impl<F: GuestFrontend> Cpu<F> {
    /// Executes the one instruction at `head.pc`, with every check made at run time. A trap it takes is part
    /// of that; afterwards `head.pc` is where to go on.
    pub fn step_careful(&mut self) {
        let pc = self.head.pc;
        Counts::add(&self.machine.store.counts().careful, 1);
        match self.translate_careful(pc) {
            Ok(()) => {}
            Err(NoCode::Trapped) => return,
            Err(NoCode::Later | NoCode::Careful) => return self.check_events(),
        }
        let Some(scratch) = self.scratch.take() else { return };
        self.code_changed = false;
        self.head.page_base = pc & !4095;
        match run(&scratch.block, self) {
            Outcome::Next(va) => self.head.pc = va,
            Outcome::Careful(va) => {
                debug_assert!(false, "a careful block asked for careful execution at {va:#x}");
                self.head.pc = va;
            }
            // A helper or the trap has set the pc.
            Outcome::Dispatch | Outcome::Faulted => self.head.exit_request = 0,
        }
        self.scratch = Some(scratch);
    }
}
