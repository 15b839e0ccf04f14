//! The vCPU threads and memory of a machine as a [`Target`].

use crate::registers::Model;
use crate::target::{Action, Point, Target};
use mimus_arch::{CpuState, StateGroups};
use mimus_core::accel::{AccelError, Access, Vcpu, VcpuDebug, VcpuIndex};
use mimus_core::bus::{GuestPhys, GuestVirt, MemTxAttrs, MemTxResult};
use mimus_core::memory::{AddressSpace, FlatKind};
use mimus_core::vcpu::VcpuThreads;
use std::sync::Arc;
use std::time::Duration;

/// Whoever starts and stops the machine. Calls but `settle` return at once.
pub trait Operator: Send + Sync {
    /// Whether it runs.
    fn running(&self) -> bool;
    /// Lets it run.
    fn resume(&self);
    /// Has it stop.
    fn stop(&self);
    /// Waits until what was asked for so far has been done; false if it takes longer than `limit`.
    fn settle(&self, limit: Duration) -> bool;
    /// Ends it.
    fn kill(&self);
    /// A command of the monitor; what it prints.
    fn monitor(&self, line: &str) -> String;
}

/// A machine to debug.
pub struct Vm {
    model: Model,
    threads: VcpuThreads,
    memory: Arc<AddressSpace>,
    operator: Arc<dyn Operator>,
    /// Some breakpoints replace instructions.
    breakpoints_in_memory: bool,
}

impl Vm {
    /// The machine of these vCPUs and this memory.
    pub fn new(model: Model, threads: VcpuThreads, memory: Arc<AddressSpace>, operator: Arc<dyn Operator>) -> Self {
        let caps = threads.run_on_sync(VcpuIndex(0), |v| v.debug().map(|d| d.capabilities()));
        let breakpoints_in_memory = caps.ok().flatten().is_some_and(|c| c.watchpoints.is_some());
        Self { model, threads, memory, operator, breakpoints_in_memory }
    }

    fn indices(&self) -> impl Iterator<Item = VcpuIndex> + use<> {
        (0..self.threads.count() as u32).map(VcpuIndex)
    }

    fn on<R: Send + 'static>(
        &self,
        vcpu: VcpuIndex,
        f: impl FnOnce(&mut dyn Vcpu) -> R + Send + 'static,
    ) -> Result<R, String> {
        self.threads.run_on_sync(vcpu, f).map_err(|e| format!("vCPU {vcpu}: {e}"))
    }

    fn debug(
        &self,
        vcpu: VcpuIndex,
        f: impl FnOnce(&mut dyn VcpuDebug) -> Result<(), AccelError> + Send + 'static,
    ) -> Result<(), String> {
        let none = "the accelerator cannot stop vCPUs for a debugger; use -accel tcg";
        let done = self.on(vcpu, move |v| v.debug().map(|d| f(d).map_err(|e| e.to_string())))?;
        done.unwrap_or_else(|| Err(none.to_owned())).map_err(|e| format!("vCPU {vcpu}: {e}"))
    }

    /// What each vCPU does when the machine runs.
    fn apply(&self, actions: &[Action]) {
        for (vcpu, action) in self.indices().zip(actions) {
            self.threads.set_held(vcpu, *action == Action::Hold);
            let step = matches!(action, Action::Step { .. });
            let interrupts = !matches!(action, Action::Step { interrupts: false });
            let set = self.on(vcpu, move |v| {
                if let Some(d) = v.debug() {
                    d.set_step_interrupts(interrupts);
                    d.set_single_step(step);
                }
            });
            if let Err(e) = set {
                log::warn!("gdb: {e}");
            }
        }
    }

    fn remove_on(&self, vcpu: VcpuIndex, point: Point) -> Result<(), String> {
        self.debug(vcpu, move |d| match point {
            Point::Break { va } => d.remove_breakpoint(GuestVirt(va)),
            Point::Watch { va, len, kind } => d.remove_watchpoint(GuestVirt(va), len, kind),
        })
    }

    /// Whether `len` bytes at `pa` are memory.
    fn is_ram(&self, pa: u64, len: usize) -> bool {
        let view = self.memory.view();
        let (mut at, end) = (pa, pa.saturating_add(len as u64));
        while at < end {
            match view.lookup(GuestPhys(at)) {
                Some(range) if range.ram_at(GuestPhys(at)).is_some() => at = range.end(),
                _ => return false,
            }
        }
        true
    }
}

impl Target for Vm {
    fn model(&self) -> Model {
        self.model
    }

    fn vcpus(&self) -> u32 {
        self.threads.count() as u32
    }

    fn describe(&self, vcpu: u32) -> String {
        let status = self.threads.status(VcpuIndex(vcpu));
        format!("CPU#{vcpu} [{}]", status.map_or("?".to_owned(), |s| format!("{s:?}").to_lowercase()))
    }

    fn state(&self, vcpu: u32) -> Result<CpuState, String> {
        self.on(VcpuIndex(vcpu), |v| v.get_state(StateGroups::All))
    }

    fn set_state(&self, vcpu: u32, state: CpuState) -> Result<(), String> {
        self.on(VcpuIndex(vcpu), move |v| v.set_state(&state).map_err(|e| e.to_string()))?
    }

    fn translate(&self, vcpu: u32, va: u64) -> Option<(u64, u64)> {
        let found = self.on(VcpuIndex(vcpu), move |v| {
            let read = v.translate(GuestVirt(va), Access::Read);
            read.or_else(|_| v.translate(GuestVirt(va), Access::Execute)).ok()
        });
        let found = found.ok()??;
        Some((found.pa.0, found.page_size - (va & (found.page_size - 1))))
    }

    fn read(&self, pa: u64, to: &mut [u8], devices: bool) -> bool {
        if !devices && !self.is_ram(pa, to.len()) {
            return false;
        }
        if self.memory.read_bytes(GuestPhys(pa), to, MemTxAttrs::default()) != MemTxResult::Ok {
            return false;
        }
        if self.breakpoints_in_memory {
            let mut bytes = to.to_vec();
            let hidden = self.on(VcpuIndex(0), move |v| {
                if let Some(d) = v.debug() {
                    d.hide_breakpoints(GuestPhys(pa), &mut bytes);
                }
                bytes
            });
            if let Ok(bytes) = hidden {
                to.copy_from_slice(&bytes);
            }
        }
        true
    }

    fn write(&self, pa: u64, from: &[u8], devices: bool) -> bool {
        if devices && !self.is_ram(pa, from.len()) {
            return self.memory.write_bytes(GuestPhys(pa), from, MemTxAttrs::default()) == MemTxResult::Ok;
        }
        if !self.breakpoints_in_memory {
            return self.memory.load_bytes(GuestPhys(pa), from) == MemTxResult::Ok;
        }
        let (mut bytes, memory) = (from.to_vec(), self.memory.clone());
        let written = self.on(VcpuIndex(0), move |v| {
            if let Some(d) = v.debug() {
                d.keep_breakpoints(GuestPhys(pa), &mut bytes);
            }
            memory.load_bytes(GuestPhys(pa), &bytes) == MemTxResult::Ok
        });
        written.unwrap_or(false)
    }

    fn rom(&self) -> Vec<(u64, u64)> {
        let view = self.memory.view();
        let rom = view.ranges().iter().filter(|r| match r.kind {
            FlatKind::Ram { readonly, .. } => readonly,
            FlatKind::RomDevice { .. } => true,
            FlatKind::Mmio { .. } => false,
        });
        rom.map(|r| (r.base.0, r.len)).collect()
    }

    fn insert(&self, point: Point) -> Result<(), String> {
        for vcpu in self.indices() {
            let inserted = self.debug(vcpu, move |d| match point {
                Point::Break { va } => d.insert_breakpoint(GuestVirt(va)),
                Point::Watch { va, len, kind } => d.insert_watchpoint(GuestVirt(va), len, kind),
            });
            if let Err(e) = inserted {
                for before in self.indices().take(vcpu.as_usize()) {
                    self.remove_on(before, point)?;
                }
                return Err(e);
            }
        }
        Ok(())
    }

    fn remove(&self, point: Point) -> Result<(), String> {
        self.indices().map(|vcpu| self.remove_on(vcpu, point)).fold(Ok(()), Result::and)
    }

    fn resume(&self, actions: &[Action]) {
        self.apply(actions);
        self.operator.resume();
    }

    fn release(&self) {
        self.apply(&vec![Action::Run; self.threads.count()]);
    }

    fn stop(&self) {
        self.operator.stop();
    }

    fn settle(&self, limit: Duration) -> bool {
        self.operator.settle(limit)
    }

    fn running(&self) -> bool {
        self.operator.running()
    }

    fn kill(&self) {
        self.operator.kill();
    }

    fn monitor(&self, line: &str) -> String {
        self.operator.monitor(line)
    }
}
