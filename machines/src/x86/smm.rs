//! System management mode and the A20 gate: what a PC's chips ask of its processors beside interrupts.
//!
//! Processors in system management mode see an address space of their own: memory with SMRAM over it, as the host
//! bridge's registers say.

use std::sync::Arc;

use mimus_core::accel::{CpuPin, VcpuHandle};
use mimus_core::irq::{IrqController, IrqLine};
use mimus_core::memory::MemoryRegion;
use mimus_core::vcpu::thread::current_vcpu;

use super::options::Options;
use super::rom::Firmware;
use crate::config::ConfigError;
use crate::machine::{MachineBuilder, MachineError};

/// SMRAM hides memory.
const OVER_MEMORY: i32 = 1;

/// Whether the machine has system management mode: if firmware starts it, which alone uses the mode, and the
/// accelerator can.
pub fn wanted(b: &MachineBuilder, options: &Options, firmware: &Firmware) -> Result<bool, MachineError> {
    let able = b.vm().smm_memory_listener().is_some();
    if options.smm == Some(true) && !able {
        let reason = "the accelerator has no system management mode on this host; use smm=off, or -accel tcg";
        return Err(ConfigError::new("-machine", "smm=on", reason).into());
    }
    let used = options.smm.unwrap_or(true) && !matches!(firmware, Firmware::None);
    Ok(used && able)
}

/// Gives processors in system management mode their memory: `overlay` on top of everybody's.
pub fn add(b: &mut MachineBuilder, overlay: &MemoryRegion) {
    let Some(listener) = b.vm().smm_memory_listener() else { return };
    let root = MemoryRegion::container("smm", u64::MAX);
    let system = b.memory().root();
    let below = MemoryRegion::alias("smm-memory", system, 0, system.len());
    let space = b.services().map.address_space("smm", &root);
    b.services().map.change(|t| {
        t.map(&root, 0, &below).map_with_priority(&root, 0, OVER_MEMORY, overlay);
    });
    space.add_listener(listener);
    b.keep_address_space(space);
}

/// SMI# of the chipset. As firmware for emulated machines expects it, the interrupt goes to the processor whose access
/// caused it; others are told by IPI.
struct Smi(Vec<Arc<dyn VcpuHandle>>);

impl IrqController for Smi {
    fn set_input(&self, _pin: u32, level: bool) {
        let vcpu = current_vcpu().map_or(0, |v| v.as_usize());
        if let Some(handle) = self.0.get(vcpu).filter(|_| level) {
            handle.set_pin(CpuPin::Smi, true);
        }
    }
}

/// The chipset's SMI output.
pub fn line(b: &MachineBuilder) -> IrqLine {
    IrqLine::new(Arc::new(Smi(b.vcpus().to_vec())), 0)
}

/// Passes A20 on to all processors, as their A20M pins: the other way round.
struct A20(Vec<Arc<dyn VcpuHandle>>);

impl IrqController for A20 {
    fn set_input(&self, _pin: u32, passes: bool) {
        self.0.iter().for_each(|handle| handle.set_pin(CpuPin::A20Mask, !passes));
    }
}

/// The line that is high while A20 passes.
pub fn a20_gate(b: &MachineBuilder) -> IrqLine {
    IrqLine::new(Arc::new(A20(b.vcpus().to_vec())), 0)
}
