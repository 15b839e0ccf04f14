//! What the protocol asks of a machine.

use crate::registers::Model;
use mimus_arch::CpuState;
use mimus_core::accel::WatchKind;
use std::time::Duration;

/// Something to stop at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Point {
    /// Before the instruction at an address.
    Break {
        /// Virtual address.
        va: u64,
    },
    /// After an access.
    Watch {
        /// Virtual address.
        va: u64,
        /// Bytes.
        len: u64,
        /// Kind of access.
        kind: WatchKind,
    },
}

/// What a vCPU does while the machine runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// Nothing.
    Hold,
    /// It runs.
    Run,
    /// One instruction.
    Step {
        /// It may be the first of an interrupt's handler.
        interrupts: bool,
    },
}

/// A machine under a debugger. Errors are one line.
pub trait Target: Send + Sync {
    /// What its vCPUs are.
    fn model(&self) -> Model;
    /// Number of vCPUs.
    fn vcpus(&self) -> u32;
    /// What a vCPU does, for people.
    fn describe(&self, vcpu: u32) -> String;
    /// State of a vCPU.
    fn state(&self, vcpu: u32) -> Result<CpuState, String>;
    /// Changes it.
    fn set_state(&self, vcpu: u32, state: CpuState) -> Result<(), String>;
    /// Physical address of a virtual one as `vcpu` sees it, and the bytes from there to the end of its page.
    fn translate(&self, vcpu: u32, va: u64) -> Option<(u64, u64)>;
    /// Reads physical memory, of devices too if `devices`; false if some of it is not there.
    fn read(&self, pa: u64, to: &mut [u8], devices: bool) -> bool;
    /// Writes it.
    fn write(&self, pa: u64, from: &[u8], devices: bool) -> bool;
    /// Physical ranges of read-only memory: first address and length.
    fn rom(&self) -> Vec<(u64, u64)>;
    /// Sets a point on all vCPUs.
    fn insert(&self, point: Point) -> Result<(), String>;
    /// Takes one away.
    fn remove(&self, point: Point) -> Result<(), String>;
    /// Lets it run, each vCPU in its way. Returns at once; an [`Event`](crate::Event) tells when it stops.
    fn resume(&self, actions: &[Action]);
    /// Whether it runs or not, from now on each vCPU runs freely when it does.
    fn release(&self);
    /// Asks it to stop. An [`Event`](crate::Event) tells when it has.
    fn stop(&self);
    /// Waits until it has done what it was asked for so far; false if that takes longer than `limit`, or it is over.
    fn settle(&self, limit: Duration) -> bool;
    /// Whether it runs.
    fn running(&self) -> bool;
    /// Ends it.
    fn kill(&self);
    /// A command of the monitor; what it prints.
    fn monitor(&self, line: &str) -> String;
}
