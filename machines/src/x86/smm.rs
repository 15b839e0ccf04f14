//! System management mode and the A20 gate: what a PC's chips ask of its processors beside interrupts.
//!
//! Processors in system management mode see an address space of their own: memory with SMRAM over it, as the host
//! bridge's registers say.

use std::sync::{Arc, Mutex};

use mimus_core::accel::{CpuPin, VcpuHandle};
use mimus_core::device::{MutLifecycle, ResetPhase, lock};
use mimus_core::irq::{IrqController, IrqLine};
use mimus_core::memory::MemoryRegion;
use mimus_core::snapshot::{SaveRestore, Schema, SnapshotError};
use mimus_core::vcpu::thread::current_vcpu;
use mimus_devices::misc::fw_cfg::{FwCfg, FwCfgError};
use serde::{Deserialize, Serialize};

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
/// caused it, and others are told by IPI; or to all, if firmware has asked for that.
struct Smi {
    vcpus: Vec<Arc<dyn VcpuHandle>>,
    features: Option<Arc<Mutex<SmiFeatures>>>,
}

impl IrqController for Smi {
    fn set_input(&self, _pin: u32, level: bool) {
        if !level {
            return;
        }
        let current = current_vcpu().map_or(0, |v| v.as_usize());
        let all = self.features.as_ref().is_some_and(|f| lock(f).s.negotiated & BROADCAST != 0);
        let takers = self.vcpus.iter().enumerate().filter(|(n, _)| all || *n == current);
        takers.for_each(|(_, handle)| handle.set_pin(CpuPin::Smi, true));
    }
}

/// The chipset's SMI output.
pub fn line(b: &MachineBuilder, features: Option<Arc<Mutex<SmiFeatures>>>) -> IrqLine {
    IrqLine::new(Arc::new(Smi { vcpus: b.vcpus().to_vec(), features }), 0)
}

/// What firmware may negotiate of it. There also where there is no SMI, as state that moves between accelerators.
pub fn features(b: &mut MachineBuilder) -> Result<Arc<Mutex<SmiFeatures>>, MachineError> {
    let features = Arc::new(Mutex::new(SmiFeatures::default()));
    b.add_device("/machine/smi-features", features.clone())?;
    Ok(features)
}

/// A write of the APM command port is an SMI of all processors.
const BROADCAST: u64 = 1 << 0;

/// What firmware wants of SMIs, as it says through fw_cfg: it reads the features there are, writes those it wants, and
/// selects a file that says whether it got them (as OVMF's SmmControl2Dxe does). A leaf lock.
#[derive(Default)]
pub struct SmiFeatures {
    s: SmiState,
}

/// The same, as saved.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SmiState {
    /// As written last.
    requested: u64,
    /// In force.
    negotiated: u64,
    /// Nothing changes any more until a reset.
    agreed: bool,
}

impl SmiFeatures {
    fn agree(&mut self) -> bool {
        if !self.s.agreed && self.s.requested & !BROADCAST == 0 {
            (self.s.agreed, self.s.negotiated) = (true, self.s.requested);
        }
        self.s.agreed
    }
}

impl MutLifecycle for SmiFeatures {
    fn reset(&mut self, phase: ResetPhase) {
        if phase == ResetPhase::Enter {
            self.s = SmiState::default();
        }
    }
}

impl SaveRestore for SmiFeatures {
    const SCHEMA: Schema = Schema::new("smi-features", 1);
    type State = SmiState;

    fn save_state(&self) -> SmiState {
        self.s.clone()
    }

    fn restore_state(&mut self, state: SmiState) -> Result<(), SnapshotError> {
        if state.negotiated & !BROADCAST != 0 || !state.agreed && state.negotiated != 0 {
            return Err(SnapshotError::invalid(Self::SCHEMA, "negotiated", format!("{:#x}", state.negotiated)));
        }
        self.s = state;
        Ok(())
    }
}

/// The files of fw_cfg by which firmware negotiates.
pub fn add_files(f: &mut FwCfg, features: &Arc<Mutex<SmiFeatures>>) -> Result<(), FwCfgError> {
    f.add_file("etc/smi/supported-features", BROADCAST.to_le_bytes())?;
    let (requested, written, asked) = (features.clone(), features.clone(), features.clone());
    let requested = move || lock(&requested).s.requested.to_le_bytes().to_vec();
    let write = move |data: &[u8]| lock(&written).s.requested = data.try_into().map_or(0, u64::from_le_bytes);
    f.add_made_file("etc/smi/requested-features", 8, Box::new(requested), Some(Box::new(write)))?;
    let agreed = move || vec![u8::from(lock(&asked).agree())];
    f.add_made_file("etc/smi/features-ok", 1, Box::new(agreed), None)?;
    Ok(())
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
