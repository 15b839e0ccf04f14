//! The dynamic binary translator as an accelerator: the guests it has, the host it compiles for.
//!
//! This crate is the façade: it chooses a frontend by the guest's architecture and the backend by the host's, and
//! hands out [`mimus_core::accel`] traits. The work is in `ir` (what the two meet in), `exec` (the runtime),
//! `frontends/*` and `backends/*`.

mod fallback;

pub use fallback::TcgFallback;

use std::sync::{Arc, Mutex, PoisonError};

use mimus_arch::{CpuModel, GuestArch, ModelError};
use mimus_core::accel::{
    AccelCaps, AccelError, AccelVm, Accelerator, Names, Tracer, TscClock, Unavailable, Vcpu, VcpuIndex, VmConfig,
};
use mimus_core::clock::VirtualClock;
use mimus_core::memory::{CodeWriteListener, MemoryListener, RamBlock};
use mimus_tcg_backend_x86_64::X86_64;
use mimus_tcg_exec::Optimise;
use mimus_tcg_exec::engine::{EngineConfig, Machine};
use mimus_tcg_exec::frontend::{CodeWindow, GuestFrontend, PublishedTsc};
use mimus_tcg_exec::vcpu::TcgVcpu;
use mimus_tcg_frontend_riscv::frontend::{Riscv, SUPPORTED};
use mimus_tcg_frontend_x86::cpuid;
use mimus_tcg_frontend_x86::frontend::X86;

/// Disassembles the instruction that `bytes` begin with, at `pc`: the text and its length. `bits`: 16, 32 or 64 for
/// x86, 0 for RISC-V.
pub fn disassemble(bits: u8, bytes: &[u8], pc: u64) -> (String, usize) {
    let mut page = [0; 4096];
    let len = bytes.len().min(64);
    page[..len].copy_from_slice(&bytes[..len]);
    let window = CodeWindow::new(&page, None);
    let (text, len) = if bits == 0 {
        Riscv::disassemble(window, 0, pc)
    } else {
        mimus_tcg_frontend_x86::frontend::disassemble(u32::from(bits), &page[..len], pc)
    };
    (text, len as usize)
}

const NAME: &str = "tcg";
const CAPS: AccelCaps = AccelCaps { max_vcpus: 512, debug: true, icount: true };
const MIB: u64 = 1 << 20;

/// The translator.
#[derive(Clone, Copy, Debug, Default)]
pub struct TcgAccelerator;

impl Accelerator for TcgAccelerator {
    fn name(&self) -> &'static str {
        NAME
    }

    fn probe(&self, guest: GuestArch) -> Result<AccelCaps, Unavailable> {
        match guest {
            GuestArch::Riscv64 | GuestArch::X86_64 | GuestArch::I386 => Ok(CAPS),
            other => Err(Unavailable { accel: NAME, reason: format!("no translator for {other} guests yet") }),
        }
    }

    /// An x86 guest gets all that is translated, as it runs faster with it: but for a fifth level of page tables,
    /// which costs walks and gives nothing to guests of this size, and SMAP, which makes each copy from or to a user a
    /// switch of address spaces.
    fn default_cpu(&self, guest: GuestArch) -> Result<CpuModel, ModelError> {
        match guest {
            GuestArch::X86_64 | GuestArch::I386 => CpuModel::parse(guest, "max,-la57,-smap"),
            _ => CpuModel::default_for(guest),
        }
    }

    fn create_vm(&self, config: &VmConfig) -> Result<Arc<dyn AccelVm>, AccelError> {
        let mut engine = engine_config(config)?;
        engine.narrow = config.arch == GuestArch::I386;
        match config.arch {
            GuestArch::Riscv64 => create::<Riscv>(config, engine),
            GuestArch::X86_64 | GuestArch::I386 => create::<X86>(config, engine),
            other => Err(Unavailable { accel: NAME, reason: format!("no translator for {other} guests yet") }.into()),
        }
    }
}

fn create<F: GuestFrontend>(config: &VmConfig, engine: EngineConfig) -> Result<Arc<dyn AccelVm>, AccelError> {
    let machine = Machine::<F>::new::<X86_64>(config.memory.clone(), engine)
        .map_err(|reason| Unavailable { accel: NAME, reason })?;
    config.ram.set_code_write_listener(Arc::new(CodeWrites(Arc::downgrade(&machine))));
    let tsc = Arc::new(Tsc { clock: config.clock.clone(), vcpus: Mutex::default() });
    Ok(Arc::new(TcgVm { machine, tsc, x86: matches!(config.arch, GuestArch::X86_64 | GuestArch::I386) }))
}

/// The vCPUs' time-stamp counters.
struct Tsc {
    clock: Arc<VirtualClock>,
    vcpus: Mutex<Vec<(VcpuIndex, Arc<PublishedTsc>)>>,
}

impl Tsc {
    fn of<R>(&self, wanted: impl Fn(VcpuIndex) -> bool, f: impl FnOnce(&PublishedTsc) -> R) -> Option<R> {
        let vcpus = self.vcpus.lock().unwrap_or_else(PoisonError::into_inner);
        vcpus.iter().find(|(index, _)| wanted(*index)).map(|(_, tsc)| f(tsc))
    }
}

impl TscClock for Tsc {
    fn now(&self, vcpu: VcpuIndex) -> u64 {
        let ns = self.clock.now();
        self.of(|index| index == vcpu, |tsc| tsc.at(ns)).unwrap_or(ns)
    }

    fn hz(&self) -> u64 {
        self.of(|_| true, |tsc| u64::from(tsc.khz()) * 1000).filter(|hz| *hz != 0).unwrap_or(1_000_000_000)
    }
}

/// `on` or `off`.
fn switch(value: &str) -> Result<bool, String> {
    match value {
        "on" => Ok(true),
        "off" => Ok(false),
        _ => Err(format!("{value:?} is not known; use on or off")),
    }
}

/// `-accel tcg,tb-size=MIB,engine=jit|interp,opt=on|off|tiered|compact|force,stats=on|off,perfmap=on|off,thread=multi`
fn engine_config(config: &VmConfig) -> Result<EngineConfig, AccelError> {
    let mut engine = EngineConfig { count: config.clock.counted().is_some(), ..EngineConfig::default() };
    if engine.count && config.smp > 1 {
        let reason = "instructions are counted on one vCPU only: use -smp 1, or leave -icount out".to_owned();
        return Err(AccelError::Other(reason));
    }
    for (option, value) in &config.options {
        let fail = |reason: String| AccelError::Option { accel: NAME, option: option.clone(), reason };
        match option.as_str() {
            "tb-size" => {
                let text = value.trim_end_matches(['M', 'm']);
                let mib: u64 = text.parse().map_err(|_| fail(format!("{value:?} is not a number of MiB")))?;
                if !(1..=1024).contains(&mib) {
                    return Err(fail(format!("{mib} is not between 1 and 1024 MiB")));
                }
                engine.code_size = (mib * MIB) as usize;
            }
            "engine" => {
                engine.interpret = match value.as_str() {
                    "jit" => false,
                    "interp" => true,
                    _ => return Err(fail(format!("{value:?} is not known; use jit or interp"))),
                };
            }
            "opt" => {
                let known = Optimise::parse(value);
                let unknown = || fail(format!("{value:?} is not known; use on, off, tiered, compact or force"));
                engine.optimise = known.ok_or_else(unknown)?;
            }
            "stats" => engine.time_translation = switch(value).map_err(fail)?,
            "perfmap" => engine.perf_map = switch(value).map_err(fail)?,
            "thread" if value == "multi" => {}
            "thread" => return Err(fail(format!("{value:?} is not supported; use multi"))),
            _ => return Err(fail("unknown; there are tb-size, engine, opt, stats, perfmap and thread".to_owned())),
        }
    }
    Ok(engine)
}

/// Tells a machine that lives on about stores by others.
struct CodeWrites<F: GuestFrontend>(std::sync::Weak<Machine<F>>);

impl<F: GuestFrontend> CodeWriteListener for CodeWrites<F> {
    fn code_written(&self, block: &RamBlock, offset: u64, len: u64) {
        if let Some(machine) = self.0.upgrade() {
            machine.code_written(block, offset, len);
        }
    }
}

struct TcgVm<F: GuestFrontend> {
    machine: Arc<Machine<F>>,
    tsc: Arc<Tsc>,
    x86: bool,
}

impl<F: GuestFrontend> AccelVm for TcgVm<F> {
    fn caps(&self) -> &AccelCaps {
        &CAPS
    }

    fn filter_cpu_model(&self, model: &CpuModel) -> Result<CpuModel, AccelError> {
        match model {
            CpuModel::Riscv(m) => Ok(CpuModel::Riscv(m.restricted_to(SUPPORTED)?)),
            // A translated processor is none of the host's: what stands for "everything" is `max`.
            CpuModel::X86(m) if m.host => {
                let reason = "the host's own processor is there with -accel kvm only; use -cpu max".to_owned();
                Err(ModelError::Conflict { model: m.name.clone(), reason }.into())
            }
            CpuModel::X86(m) => Ok(CpuModel::X86(m.restricted_to(cpuid::supported())?)),
            other => Ok(other.clone()),
        }
    }

    fn create_vcpu(&self, index: VcpuIndex, model: &CpuModel) -> Result<Box<dyn Vcpu>, AccelError> {
        let mut vcpu = TcgVcpu::<F>::new(&self.machine, index, model).map_err(AccelError::Other)?;
        if let Some(tsc) = vcpu.published_tsc() {
            self.tsc.vcpus.lock().unwrap_or_else(PoisonError::into_inner).push((index, tsc));
        }
        Ok(Box::new(vcpu))
    }

    fn memory_listener(&self) -> Option<Arc<dyn MemoryListener>> {
        Some(self.machine.listener())
    }

    fn tracer(&self) -> Option<&dyn Tracer> {
        Some(&*self.machine)
    }

    fn tsc(&self) -> Option<Arc<dyn TscClock>> {
        if self.x86 { Some(self.tsc.clone()) } else { None }
    }

    fn smm_memory_listener(&self) -> Option<Arc<dyn MemoryListener>> {
        F::ALTERNATE_MEMORY.then(|| self.machine.alternate_listener())
    }

    fn flush_all(&self) {
        self.machine.flush_code();
    }

    fn name_code(&self, names: Names) {
        self.machine.name_code(names);
    }

    fn statistics(&self) -> Vec<(String, u64)> {
        self.machine.statistics().into_iter().map(|(name, value)| (name.to_owned(), value)).collect()
    }
}
