//! Counting instructions for a clock that follows them (`mimus_core::clock::icount`).
//!
//! Blocks take their instructions from the vCPU's budget, a stretch at a time and before they are executed; what
//! leaves a stretch in the middle gives back those that were not (`EnvHead::count_left`). An instruction counts once it
//! begins, also if it faults. A block that is longer than what is left of the budget is executed an instruction at a
//! time, so that timers fire at an exact count.

use std::cell::Cell;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use mimus_core::clock::icount::GRACE;

use crate::env::Cpu;
use crate::frontend::GuestFrontend;

/// The count, beside the budget.
pub(crate) struct Counting {
    pub on: bool,
    /// Instructions executed when the budget is used up.
    end: Cell<u64>,
}

impl Counting {
    pub fn new(on: bool) -> Counting {
        Counting { on, end: Cell::new(0) }
    }
}

impl<F: GuestFrontend> Cpu<F> {
    /// Whether instructions are counted, and time is how many there were.
    pub fn counts_instructions(&self) -> bool {
        self.counting.on
    }

    /// Instructions executed, the current one included.
    pub(crate) fn executed(&self) -> u64 {
        let ahead = i64::from(self.head.budget.get()) + i64::from(self.head.count_left);
        self.counting.end.get().wrapping_sub(ahead as u64)
    }

    /// The instruction at hand begins, outside generated code.
    pub(crate) fn count_one(&mut self) {
        if self.counting.on {
            self.head.count_left = 0;
            self.head.budget.set(self.head.budget.get() - 1);
        }
    }

    /// A stretch is left: gives back what of it was not executed; with `again`, the current instruction too.
    pub(crate) fn give_back(&mut self, again: bool) {
        if self.counting.on {
            let left = std::mem::take(&mut self.head.count_left) + u32::from(again);
            self.head.budget.set(self.head.budget.get() + left as i32);
        }
    }

    /// An access by the code that returns to `ret` takes long: finds what was counted too early.
    pub(crate) fn find_left(&mut self, ret: usize) {
        if self.counting.on {
            self.head.count_left = self.machine.store.resolve_fault(ret).map_or(0, |entry| entry.left.into());
        }
    }

    /// Whether the budget is used up.
    pub(crate) fn budget_spent(&self) -> bool {
        self.counting.on && self.head.budget.get() <= 0
    }

    /// Whether a slow stretch of instructions may go past the budget.
    pub(crate) fn budget_short(&self) -> bool {
        self.counting.on && i64::from(self.head.budget.get()) < GRACE as i64
    }

    /// Has the timers that are due fired, and takes a new budget.
    pub(crate) fn new_budget(&mut self) {
        let executed = self.executed();
        let slice = self.io(|io| io.clock().counted().map(|clock| clock.slice(executed)));
        let slice = slice.flatten().unwrap_or(1 << 20).min(1 << 30);
        self.head.budget.set(slice as i32);
        self.counting.end.set(executed + slice);
    }

    /// While halted: goes on in time. False if nothing will happen by itself, or something has happened meanwhile.
    pub(crate) fn idle(&mut self) -> bool {
        if !self.counting.on {
            return false;
        }
        let executed = self.executed();
        let look = |cpu: &Self| cpu.io(|io| io.clock().counted()?.idle(executed)).flatten();
        let Some(wait) = look(self) else { return false };
        let end = (!wait.is_zero()).then(|| Instant::now() + wait);
        while let Some(left) = end.map(|end| end.saturating_duration_since(Instant::now())).filter(|d| !d.is_zero()) {
            if self.head.kick.load(Ordering::SeqCst) != 0 {
                return false;
            }
            // Something has come from outside.
            if look(self).is_some_and(|now| now < wait) {
                return true;
            }
            std::thread::sleep(left.min(Duration::from_millis(1)));
        }
        self.io(|io| io.clock().counted().map(|clock| clock.skip(executed)));
        self.new_budget();
        true
    }

    /// Before the machine is called: its clock is this vCPU's count.
    pub(crate) fn sync_clock(&self, io: &dyn mimus_core::accel::CpuIo) {
        if let Some(clock) = io.clock().counted() {
            clock.sync(self.executed());
        }
    }

    /// After it: a deadline may have moved forward.
    pub(crate) fn look_at_deadline(&self, io: &dyn mimus_core::accel::CpuIo) {
        if let Some(clock) = io.clock().counted()
            && clock.take_moved()
        {
            let executed = self.executed();
            let end = clock.deadline(executed).max(executed + GRACE);
            let now = self.counting.end.get();
            if end < now {
                self.counting.end.set(end);
                self.head.budget.set(self.head.budget.get() - (now - end) as i32);
            }
        }
    }
}
