//! The accelerator that runs nothing: device tests drive the bus and the clock themselves.

use super::accelerator::{AccelCaps, AccelError, AccelVm, Accelerator, Unavailable, VmConfig};
use super::cpu_io::CpuIo;
use super::exit::VcpuExit;
use super::signal::VcpuSignal;
use super::vcpu::{
    Access, CpuPin, RemoteFence, ResetKind, StartRequest, StateError, TranslateFault, Translation, Vcpu, VcpuHandle,
    VcpuIndex,
};
use crate::bus::{GuestPhys, GuestVirt};
use mimus_arch::riscv::RiscvState;
use mimus_arch::x86::X86State;
use mimus_arch::{CpuModel, CpuState, GuestArch, StateGroups};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

/// Makes vCPUs that are always halted.
#[derive(Clone, Copy, Debug, Default)]
pub struct NullAccelerator;

const CAPS: AccelCaps = AccelCaps { max_vcpus: 512, debug: false, icount: false };

impl Accelerator for NullAccelerator {
    fn name(&self) -> &'static str {
        "null"
    }

    fn probe(&self, _guest: GuestArch) -> Result<AccelCaps, Unavailable> {
        Ok(CAPS)
    }

    fn create_vm(&self, config: &VmConfig) -> Result<Arc<dyn AccelVm>, AccelError> {
        if let Some(option) = config.options.keys().next() {
            let reason = "there are no options".to_owned();
            return Err(AccelError::Option { accel: "null", option: option.clone(), reason });
        }
        Ok(Arc::new(NullVm))
    }
}

struct NullVm;

impl AccelVm for NullVm {
    fn caps(&self) -> &AccelCaps {
        &CAPS
    }

    fn create_vcpu(&self, index: VcpuIndex, model: &CpuModel) -> Result<Box<dyn Vcpu>, AccelError> {
        let handle = Arc::new(NullHandle { index, pins: AtomicU32::new(0), signal: VcpuSignal::new() });
        let model = model.clone();
        let state = reset_state(&model, index);
        Ok(Box::new(NullVcpu { handle, state, model }))
    }
}

struct NullVcpu {
    handle: Arc<NullHandle>,
    state: CpuState,
    model: CpuModel,
}

fn reset_state(model: &CpuModel, index: VcpuIndex) -> CpuState {
    match model.as_riscv() {
        Some(m) => {
            let state = RiscvState::new(u64::from(index.0), m.features.misa(), 0);
            CpuState::Riscv(Box::new(state))
        }
        None => CpuState::X86(Box::new(X86State::reset(index.0 == 0))),
    }
}

/// The handle of a null vCPU: remembers its pins for tests to look at.
pub struct NullHandle {
    index: VcpuIndex,
    pins: AtomicU32,
    signal: Arc<VcpuSignal>,
}

impl NullHandle {
    /// A handle without a vCPU.
    pub fn new(index: VcpuIndex) -> Arc<Self> {
        Arc::new(Self { index, pins: AtomicU32::new(0), signal: VcpuSignal::new() })
    }

    /// The level of a pin.
    pub fn pin(&self, pin: CpuPin) -> bool {
        self.pins.load(Ordering::SeqCst) >> pin as u32 & 1 != 0
    }
}

impl VcpuHandle for NullHandle {
    fn kick(&self) {
        self.signal.wake();
    }

    fn set_pin(&self, pin: CpuPin, level: bool) {
        let bit = 1 << pin as u32;
        if level {
            self.pins.fetch_or(bit, Ordering::SeqCst);
            self.signal.wake();
        } else {
            self.pins.fetch_and(!bit, Ordering::SeqCst);
        }
    }

    fn index(&self) -> VcpuIndex {
        self.index
    }

    fn remote_fence(&self, _fence: RemoteFence) {}

    fn signal(&self) -> &Arc<VcpuSignal> {
        &self.signal
    }
}

impl Vcpu for NullVcpu {
    fn handle(&self) -> Arc<dyn VcpuHandle> {
        self.handle.clone()
    }

    fn run(&mut self, _io: &dyn CpuIo) -> VcpuExit {
        VcpuExit::Halted
    }

    fn get_state(&mut self, _groups: StateGroups) -> CpuState {
        self.state.clone()
    }

    fn set_state(&mut self, state: &CpuState) -> Result<(), StateError> {
        self.state = state.clone();
        Ok(())
    }

    fn reset(&mut self, _kind: ResetKind, start: Option<StartRequest>) {
        self.state = reset_state(&self.model, self.handle.index);
        let Some(how) = start else { return };
        match &mut self.state {
            CpuState::Riscv(s) => {
                s.pc = how.pc;
                s.x[10] = how.arg0;
                s.x[11] = how.arg1;
            }
            CpuState::X86(s) => s.start_real_mode(how.pc),
            _ => {}
        }
    }

    fn translate(&mut self, va: GuestVirt, _access: Access) -> Result<Translation, TranslateFault> {
        Ok(Translation { pa: GuestPhys(va.0), page_size: 4096 })
    }
}
