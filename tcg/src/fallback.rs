//! The translator beside another engine: it executes the instructions that KVM's emulator cannot.

use std::sync::{Arc, Mutex, PoisonError};

use mimus_arch::{CpuModel, GuestArch};
use mimus_core::accel::{
    AccelError, EmulationFailure, EmulationFallback, FailedInstruction, Finished, Unavailable, VmConfig,
};
use mimus_tcg_backend_x86_64::X86_64;
use mimus_tcg_exec::engine::{EngineConfig, Machine};
use mimus_tcg_exec::vcpu::TcgVcpu;
use mimus_tcg_frontend_x86::cpuid;
use mimus_tcg_frontend_x86::frontend::X86;
use mimus_tcg_frontend_x86::takeover::{self, Counters};

use crate::NAME;

/// Bytes for translated code: nothing is compiled.
const CODE: usize = 1 << 20;

/// The translator as the one who finishes what another accelerator cannot execute.
#[derive(Clone, Copy, Debug, Default)]
pub struct TcgFallback;

impl EmulationFallback for TcgFallback {
    fn create(&self, config: &VmConfig) -> Result<Arc<dyn EmulationFailure>, AccelError> {
        if !matches!(config.arch, GuestArch::X86_64 | GuestArch::I386) {
            let reason = format!("it executes nothing for another engine's {} guests", config.arch);
            return Err(Unavailable { accel: NAME, reason }.into());
        }
        let slots = (0..config.smp).map(|_| Mutex::default()).collect();
        Ok(Arc::new(Fallback {
            config: config.clone(),
            machine: Mutex::default(),
            slots,
            counters: Counters::default(),
        }))
    }
}

/// For the vCPUs of one machine, each of which gets one of ours when it first needs it.
struct Fallback {
    config: VmConfig,
    machine: Mutex<Option<Arc<Machine<X86>>>>,
    slots: Vec<Mutex<Option<TcgVcpu<X86>>>>,
    counters: Counters,
}

impl Fallback {
    fn machine(&self) -> Result<Arc<Machine<X86>>, String> {
        let mut machine = self.machine.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(machine) = &*machine {
            return Ok(machine.clone());
        }
        let engine = EngineConfig { code_size: CODE, interpret: true, ..EngineConfig::default() };
        let new = Machine::<X86>::new::<X86_64>(self.config.memory.clone(), engine)?;
        *machine = Some(new.clone());
        Ok(new)
    }

    /// One that has every instruction there is: the other engine's guests can use those of the host's processor,
    /// whatever their model says.
    fn vcpu(&self, failed: &FailedInstruction<'_>) -> Result<TcgVcpu<X86>, String> {
        let model = CpuModel::parse(self.config.arch, "max").map_err(|e| e.to_string())?;
        let CpuModel::X86(model) = model else { return Err("its model is not an x86 one".to_owned()) };
        let model = model.restricted_to(cpuid::supported()).map_err(|e| e.to_string())?;
        TcgVcpu::new(&self.machine()?, failed.vcpu, &CpuModel::X86(model))
    }
}

impl EmulationFailure for Fallback {
    fn finish(&self, failed: FailedInstruction<'_>) -> Finished {
        let Some(slot) = self.slots.get(failed.vcpu.as_usize()) else {
            return Finished::NotHandled("there is no such vCPU".to_owned());
        };
        // Only its own thread comes here.
        let mut slot = slot.lock().unwrap_or_else(PoisonError::into_inner);
        if slot.is_none() {
            match self.vcpu(&failed) {
                Ok(vcpu) => *slot = Some(vcpu),
                Err(reason) => return Finished::NotHandled(format!("the translator cannot: {reason}")),
            }
        }
        match &mut *slot {
            Some(vcpu) => takeover::finish(vcpu, failed, &self.counters),
            None => Finished::NotHandled("the translator has no vCPU".to_owned()),
        }
    }

    fn statistics(&self) -> Vec<(String, u64)> {
        self.counters.statistics()
    }
}
