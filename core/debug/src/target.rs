//! What a debugger needs of a machine.

use mimus_arch::CpuState;
use mimus_core::accel::{Catch, Caught, RecentEvent, WatchKind};

use crate::steps::StepKind;

use crate::devices::DeviceState;
use crate::pci::PciFunction;

/// A place to stop at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Point {
    /// Before the instruction at this virtual address.
    Break { va: u64 },
    /// After an access to these bytes.
    Watch { va: u64, len: u64, kind: WatchKind },
    /// At an event.
    Catch(Catch),
}

/// Why a vCPU stopped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stop {
    /// A step is done.
    Step {
        vcpu: u32,
    },
    Breakpoint {
        vcpu: u32,
    },
    Watch {
        vcpu: u32,
        va: u64,
    },
    /// Something that was to be caught.
    Caught {
        vcpu: u32,
        caught: Caught,
    },
    /// The machine was paused, or ended.
    Paused,
}

/// A stretch of the physical address space.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Region {
    pub base: u64,
    pub len: u64,
    /// `ram`, `rom`, `device`.
    pub kind: &'static str,
    pub name: String,
}

/// A translation that an accelerator remembers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TlbEntry {
    /// Its name for the address space.
    pub space: u64,
    /// It is the one in use.
    pub current: bool,
    pub va: u64,
    /// The physical address, where it is known.
    pub pa: Option<u64>,
    pub read: bool,
    pub write: bool,
    pub execute: bool,
}

/// A machine. Calls are made by one thread, which is none of the machine's own.
pub trait Target: Send + Sync {
    fn vcpus(&self) -> u32;
    /// Whether a vCPU has been started.
    fn is_on(&self, _vcpu: u32) -> bool {
        true
    }
    /// The architectural state.
    fn state(&self, vcpu: u32) -> Result<CpuState, String>;
    fn set_state(&self, vcpu: u32, state: CpuState) -> Result<(), String>;
    /// The physical address of a virtual one as the vCPU sees it, and the bytes to its page's end.
    fn translate(&self, vcpu: u32, va: u64) -> Option<(u64, u64)>;
    /// Reads memory; false if it is not RAM.
    fn read(&self, pa: u64, to: &mut [u8]) -> bool;
    /// Writes memory; false if it is not RAM.
    fn write(&self, pa: u64, from: &[u8]) -> bool;
    fn insert(&self, point: Point) -> Result<(), String>;
    fn remove(&self, point: Point) -> Result<(), String>;
    fn running(&self) -> bool;
    /// Lets the machine run and waits until it stops.
    fn go(&self) -> Stop;
    /// Lets it run without waiting.
    fn resume(&self);
    /// Makes `n` steps of the vCPU, the others standing.
    fn step(&self, vcpu: u32, n: u64, kind: StepKind) -> Result<Stop, String>;
    /// Pauses it.
    fn pause(&self);
    /// The last exceptions and interrupts, oldest first.
    fn recent(&self, vcpu: u32) -> Vec<RecentEvent>;
    /// Where its jumps and calls by pointer and its traps led last, oldest first.
    fn jumps(&self, vcpu: u32) -> Vec<u64>;
    /// Text and length of the instruction that `bytes` begin with; `bits` is 0 for RISC-V.
    fn disassemble(&self, bits: u8, bytes: &[u8], pc: u64) -> (String, usize);
    /// What is where in physical memory.
    fn regions(&self) -> Vec<Region>;
    /// The states of its devices, by path; the machine must stand.
    fn devices(&self) -> Result<Vec<DeviceState>, String> {
        Ok(Vec::new())
    }
    /// Its PCI functions.
    fn pci(&self) -> Vec<PciFunction> {
        Vec::new()
    }
    /// The translations that are remembered for a vCPU.
    fn tlb(&self, _vcpu: u32) -> Result<Vec<TlbEntry>, String> {
        Err("this accelerator does not tell which translations it remembers; with -accel tcg it does".to_owned())
    }
}

/// Virtual memory of a vCPU: as many bytes as are there.
pub fn read_virtual(target: &dyn Target, vcpu: u32, va: u64, len: usize) -> Vec<u8> {
    let mut out = vec![0; len];
    let mut have = 0;
    while have < len {
        let Some((pa, left)) = target.translate(vcpu, va.wrapping_add(have as u64)) else { break };
        let n = (len - have).min(usize::try_from(left).unwrap_or(usize::MAX)).max(1);
        if !target.read(pa, &mut out[have..have + n]) {
            break;
        }
        have += n;
    }
    out.truncate(have);
    out
}

/// Writes virtual memory; false if some of it is not there (what is before that is written).
pub fn write_virtual(target: &dyn Target, vcpu: u32, va: u64, bytes: &[u8]) -> bool {
    let mut done = 0;
    while done < bytes.len() {
        let Some((pa, left)) = target.translate(vcpu, va.wrapping_add(done as u64)) else { return false };
        let n = (bytes.len() - done).min(usize::try_from(left).unwrap_or(usize::MAX)).max(1);
        if !target.write(pa, &bytes[done..done + n]) {
            return false;
        }
        done += n;
    }
    true
}

/// A little-endian number of up to 8 bytes at a virtual address.
pub fn read_number(target: &dyn Target, vcpu: u32, va: u64, bytes: usize) -> Option<u64> {
    let read = read_virtual(target, vcpu, va, bytes.min(8));
    (read.len() == bytes.min(8)).then(|| read.iter().rev().fold(0, |n, byte| n << 8 | u64::from(*byte)))
}
