//! The vCPU as the run loop sees it, and the loop around generated code.
#![allow(unsafe_code)]

use std::sync::Arc;
use std::sync::atomic::Ordering;

use mimus_arch::{CpuModel, CpuState, StateGroups};
use mimus_core::accel::{
    self, CpuIo, CpuPin, RemoteFence, ResetKind, StartRequest, StateError, TranslateFault, Translation, Vcpu,
    VcpuDebug, VcpuExit, VcpuHandle, VcpuIndex, VcpuSignal,
};
use mimus_core::bus::{GuestPhys, GuestVirt};
use mimus_tcg_ir::backend::ExitCode;
use mimus_tcg_ir::interp::{Outcome, run};

use crate::engine::Machine;
use crate::env::{Cpu, CpuCell, KICK_EVENT, KICK_FULL, KICK_LEAVE, Mailbox, Peer, Request};
use crate::frontend::{Access, GuestFrontend, PublishedTsc};
use crate::sampling::watch_beginning;
use crate::translate::{Code, NoCode};

/// A vCPU under the translator.
pub struct TcgVcpu<F: GuestFrontend> {
    peer: Arc<Peer<F>>,
    machine: Arc<Machine<F>>,
    signal: Arc<VcpuSignal>,
    /// Its beginning is watched, or has been.
    watched: bool,
}

impl<F: GuestFrontend> TcgVcpu<F> {
    /// Adds vCPU `index` to `machine`.
    ///
    /// # Errors
    /// What of the model cannot be done, or what the host lacks.
    pub fn new(machine: &Arc<Machine<F>>, index: VcpuIndex, model: &CpuModel) -> Result<TcgVcpu<F>, String> {
        let state = F::new_state(model, index)?;
        let mailbox = Arc::new(Mailbox::new(index));
        let cpu = Cpu::new(machine.clone(), mailbox.clone(), state).map_err(|e| format!("vCPU {index}: {e}"))?;
        let peer = Arc::new(Peer { mailbox, cell: CpuCell::new(cpu) });
        machine.add_peer(peer.clone());
        let mut vcpu = TcgVcpu { peer, machine: machine.clone(), signal: VcpuSignal::new(), watched: false };
        F::reset(vcpu.cpu(), ResetKind::Cold, None);
        Ok(vcpu)
    }

    /// Where it publishes its time-stamp counter, if it has one.
    pub fn published_tsc(&mut self) -> Option<Arc<PublishedTsc>> {
        F::published_tsc(&self.cpu().guest)
    }

    /// Runs `f` on the vCPU, whose guest is another engine's: see [`crate::lent`].
    pub fn lend<R>(&mut self, io: &dyn CpuIo, f: impl FnOnce(&mut Cpu<F>) -> R) -> R {
        let cpu = self.cpu();
        cpu.lent.get_or_insert_default().begin();
        cpu.head.take_asked();
        cpu.halted = false;
        cpu.process_requests();
        cpu.with_io(io, f)
    }

    fn cpu(&mut self) -> &mut Cpu<F> {
        // SAFETY: the cell's contents are this value's; `&mut self` makes the borrow unique. Handles only
        // touch the kick word, an atomic.
        unsafe { &mut *self.peer.cell.as_ptr() }
    }
}

impl<F: GuestFrontend> Vcpu for TcgVcpu<F> {
    fn handle(&self) -> Arc<dyn VcpuHandle> {
        Arc::new(TcgHandle { peer: self.peer.clone(), signal: self.signal.clone() })
    }

    fn run(&mut self, io: &dyn CpuIo) -> VcpuExit {
        if !std::mem::replace(&mut self.watched, true) {
            watch_beginning(&self.machine);
        }
        self.cpu().with_io(io, run_guest)
    }

    fn get_state(&mut self, _groups: StateGroups) -> CpuState {
        F::get_state(self.cpu())
    }

    fn set_state(&mut self, state: &CpuState) -> Result<(), StateError> {
        let cpu = self.cpu();
        cpu.mmu.flush_all();
        cpu.halted = false;
        cpu.debug.forget_pending();
        F::set_state(cpu, state).map_err(StateError)
    }

    fn reset(&mut self, kind: ResetKind, start: Option<StartRequest>) {
        self.watched &= kind == ResetKind::Init;
        let cpu = self.cpu();
        cpu.mmu.flush_all();
        cpu.halted = false;
        cpu.head.reserve_addr = !0;
        cpu.debug.forget_pending();
        F::reset(cpu, kind, start);
    }

    fn translate(&mut self, va: GuestVirt, access: accel::Access) -> Result<Translation, TranslateFault> {
        let access = match access {
            accel::Access::Read => Access::Load,
            accel::Access::Write => Access::Store,
            accel::Access::Execute => Access::Fetch,
        };
        let found = F::debug_walk(self.cpu(), va.0, access);
        let (pa, page_size) = found.ok_or(TranslateFault { va })?;
        Ok(Translation { pa: GuestPhys(pa), page_size })
    }

    fn recent_events(&self) -> Vec<mimus_core::accel::RecentEvent> {
        // SAFETY: as in `cpu`.
        unsafe { &*self.peer.cell.as_ptr() }.recent.list()
    }

    fn recent_jumps(&self) -> Vec<u64> {
        // SAFETY: as in `cpu`.
        unsafe { &*self.peer.cell.as_ptr() }.head.jumps.list()
    }

    fn remembered_translations(&mut self) -> Option<Vec<accel::RememberedTranslation>> {
        let view = self.machine.memory.view();
        Some(self.cpu().mmu.list(&view))
    }

    fn sync_trace(&mut self) {
        self.cpu().sync_trace();
    }

    fn debug(&mut self) -> Option<&mut dyn VcpuDebug> {
        Some(self.cpu())
    }
}

impl<F: GuestFrontend> Drop for TcgVcpu<F> {
    fn drop(&mut self) {
        // The machine's list and the vCPUs hold each other.
        self.machine.forget_peers();
    }
}

/// A vCPU as other threads see it.
struct TcgHandle<F: GuestFrontend> {
    peer: Arc<Peer<F>>,
    signal: Arc<VcpuSignal>,
}

impl<F: GuestFrontend> VcpuHandle for TcgHandle<F> {
    fn kick(&self) {
        self.peer.cell.kick(KICK_LEAVE);
        self.signal.wake();
    }

    fn set_pin(&self, pin: CpuPin, level: bool) {
        let Some(bit) = F::pin_bit(pin) else { return };
        let mask = 1u64 << bit;
        if !level && F::LATCHED_PINS & mask != 0 {
            return;
        }
        let pins = &self.peer.mailbox.pins;
        let before =
            if level { pins.fetch_or(mask, Ordering::SeqCst) } else { pins.fetch_and(!mask, Ordering::SeqCst) };
        let changed = (before & mask != 0) != level;
        if changed && (level || F::MODE_PINS & mask != 0) {
            self.peer.cell.kick(KICK_EVENT);
            self.signal.wake();
        }
    }

    fn in_smm(&self) -> bool {
        self.peer.mailbox.alternate.load(Ordering::SeqCst)
    }

    fn index(&self) -> VcpuIndex {
        self.peer.mailbox.index
    }

    fn remote_fence(&self, fence: RemoteFence) {
        self.peer.post(Request::Fence(fence));
        self.peer.wait_outside();
    }

    fn signal(&self) -> &Arc<VcpuSignal> {
        &self.signal
    }
}

/// Runs the guest until the run loop is needed.
fn run_guest<F: GuestFrontend>(cpu: &mut Cpu<F>) -> VcpuExit {
    loop {
        let kick = cpu.head.take_asked();
        if let Some(exit) = cpu.stopped.take() {
            return exit;
        }
        cpu.process_requests();
        if kick & KICK_FULL != 0 {
            cpu.machine.clone().flush_code();
            cpu.process_requests();
            cpu.interp_blocks.clear();
        }
        if kick & KICK_LEAVE != 0 && !(cpu.halted && F::wakes(cpu)) {
            return VcpuExit::Kicked;
        }
        if cpu.halted {
            if !F::wakes(cpu) {
                if cpu.idle() {
                    continue;
                }
                return VcpuExit::Halted;
            }
            cpu.halted = false;
        }
        if kick & KICK_LEAVE != 0 {
            return VcpuExit::Kicked;
        }
        if cpu.budget_spent() {
            cpu.new_budget();
            continue;
        }
        if cpu.debug_due() {
            match cpu.debug_before() {
                Some(stop) => return VcpuExit::Debug(stop),
                None => continue,
            }
        }
        F::take_interrupt(cpu);
        if cpu.budget_spent() || cpu.debug.is_stopping() {
            continue;
        }
        if cpu.step_at.take() == Some(cpu.head.pc) {
            cpu.step_careful();
            continue;
        }
        if cpu.machine.interpret { interpret(cpu) } else { compile_and_run(cpu) }
    }
}

/// Runs generated code from `head.pc` until it exits.
fn compile_and_run<F: GuestFrontend>(cpu: &mut Cpu<F>) {
    let machine = cpu.machine.clone();
    let gate = machine.pass();
    let code = match cpu.code_for(cpu.head.pc, false) {
        Ok(code) => code,
        Err(NoCode::Careful) => {
            drop(gate);
            return cpu.careful_or_break();
        }
        Err(NoCode::Trapped | NoCode::Later) => return,
    };
    let mailbox = cpu.mailbox.clone();
    mailbox.in_guest.store(true, Ordering::SeqCst);
    // Whoever posted a request before this store saw the vCPU outside and does not wait for it.
    if cpu.head.kick.load(Ordering::SeqCst) == 0 {
        enter(cpu, code);
    } else {
        cpu.head.exit_code = ExitCode::Kicked as u32;
    }
    mailbox.in_guest.store(false, Ordering::SeqCst);
    cpu.sample();
    drop(gate);
    // With no budget left it is a timer's turn, and the instruction's afterwards.
    if ExitCode::from_raw(cpu.head.exit_code) == ExitCode::Careful && !cpu.budget_spent() {
        cpu.refresh_crossing(cpu.head.pc);
        cpu.careful_or_break();
    }
}

fn enter<F: GuestFrontend>(cpu: &mut Cpu<F>, code: Code) {
    cpu.head.page_base = cpu.head.pc & !4095;
    cpu.head.exit_request = 0;
    cpu.head.jumps.enter(cpu.head.pc);
    let entry = cpu.machine.stubs.enter;
    // SAFETY: the backend put a function of this signature at `enter`; `code` is a block's entry in the code
    // cache, which the gate keeps from being emptied; the environment is laid out as the backend was told.
    unsafe {
        let entry: extern "C" fn(*mut Cpu<F>, usize) = std::mem::transmute(entry);
        cpu.in_generated = true;
        entry(cpu, code.host);
    }
    cpu.in_generated = false;
    cpu.head.count_left = 0;
    if let Some((va, access, fault)) = cpu.fault_later.take() {
        F::deliver_fault(cpu, va, access, fault);
        cpu.head.exit_request = 0;
    }
}

/// Interprets blocks from `head.pc` on for a while.
fn interpret<F: GuestFrontend>(cpu: &mut Cpu<F>) {
    let machine = cpu.machine.clone();
    let mailbox = cpu.mailbox.clone();
    for _ in 0..1000 {
        if cpu.head.kick.load(Ordering::SeqCst) != 0 {
            return;
        }
        let pc = cpu.head.pc;
        if cpu.budget_short() {
            return cpu.careful_or_break();
        }
        let gate = machine.pass();
        let block = match cpu.code_for(pc, false) {
            // What a block that reaches into the next page was made from may not be there any more.
            Ok(code) => cpu.interp_blocks.get(&code.host).filter(|block| !block.crosses_page()).cloned(),
            Err(NoCode::Careful) => None,
            Err(NoCode::Trapped | NoCode::Later) => return,
        };
        let Some(block) = block else {
            drop(gate);
            cpu.careful_or_break();
            continue;
        };
        mailbox.in_guest.store(true, Ordering::SeqCst);
        if cpu.head.kick.load(Ordering::SeqCst) != 0 {
            mailbox.in_guest.store(false, Ordering::SeqCst);
            return;
        }
        cpu.head.page_base = pc & !4095;
        cpu.head.exit_request = 0;
        cpu.code_changed = false;
        cpu.head.jumps.push(pc);
        let outcome = run(&block, cpu);
        mailbox.in_guest.store(false, Ordering::SeqCst);
        drop(gate);
        match outcome {
            Outcome::Next(va) => cpu.head.pc = va,
            Outcome::Careful(va) => {
                cpu.head.pc = va;
                cpu.step_careful();
            }
            Outcome::Dispatch | Outcome::Faulted => cpu.head.exit_request = 0,
        }
    }
}
