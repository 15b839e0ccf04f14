//! A virtual machine.

use crate::coalesced::Coalescer;
use crate::dirty::KvmDirtyLog;
use crate::doorbell::KvmDoorbells;
use crate::entry::{Entries, LOOK};
use crate::error::{cannot_create, cannot_open, errno, lacks, refused, too_many_vcpus, wrong_version};
use crate::handle::{COUNTERS, VcpuCore};
use crate::irqfd::KvmIrqFds;
use crate::options::{KvmOptions, RING_ENTRY};
use crate::routing::Routing;
use crate::slots::{SlotLimits, Slots};
use crate::sys::ring::DirtyRing;
use crate::sys::run_page::RunPage;
use crate::sys::{ioctl, signal, x86 as sys_x86};
use crate::x86::clock::Tsc;
use crate::x86::cpuid::HostCpu;
use crate::x86::irqchip::KvmIrqChip;
use crate::x86::msrs;
use crate::x86::quirks;
use crate::x86::regs::EventCaps;
use crate::x86::vcpu::KvmVcpu;
use kvm_bindings::*;
use kvm_ioctls::{Cap, Kvm, MsrFilterDefaultAction, MsrFilterRange, MsrFilterRangeFlags, VcpuFd, VmFd};
use mimus_arch::x86::irqchip::IOAPIC_PINS;
use mimus_arch::x86::{X86Model, msr};
use mimus_arch::{CpuModel, ModelError};
use mimus_core::accel::{
    AccelCaps, AccelError, AccelVm, CoalescedIo, DirtyLog, Doorbells, EmulationFailure, GuestClock, IrqChip,
    IrqChipMode, IrqFds, TscClock, Vcpu, VcpuHandle, VcpuIndex, VmConfig,
};
use mimus_core::clock::VirtualClock;
use mimus_core::memory::{AddressSpace, GuestRam, MemoryListener, PAGE_SIZE, RamBacking, RamBlock};
use std::ffi::CString;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

/// Three pages below the firmware that Intel processors without "unrestricted guest" need for real mode, and one
/// for its page table. A board says in its memory map that these are taken.
const TSS_ADDRESS: usize = 0xfeff_d000;
const IDENTITY_MAP_ADDRESS: u64 = 0xfeff_c000;

/// What this kernel has.
#[derive(Clone, Copy, Debug)]
pub struct KernelCaps {
    /// kvmclock can be set.
    pub clock: bool,
    /// `KVM_GET_SREGS2`.
    pub sregs2: bool,
    /// Bytes of an XSAVE area, 0 if only 4096.
    pub xsave_size: usize,
    /// System management mode, with a memory of its own.
    pub smm: bool,
    /// Which parts of events.
    pub events: EventCaps,
    /// The sets of registers that `KVM_RUN` can copy to and from the run page.
    pub sync_regs: u32,
    /// Accesses to MSRs can be refused to the kernel.
    pub msr_filter: bool,
    /// The TSC can have another frequency than the host's.
    pub tsc_scaling: bool,
}

/// A VM, as all its parts see it.
pub struct VmShared {
    pub fd: Arc<VmFd>,
    pub caps: KernelCaps,
    pub host: HostCpu,
    pub entries: Arc<Entries>,
    pub slots: Arc<Slots>,
    /// What there is in system management mode.
    pub smm_slots: Option<Arc<Slots>>,
    pub routing: Arc<Routing>,
    pub coalescer: Coalescer,
    pub clock: Arc<VirtualClock>,
    pub memory: Arc<AddressSpace>,
    pub host_tsc_khz: u32,
    /// MSRs that may be state.
    pub msr_candidates: Vec<u32>,
    pub smp: u32,
    /// Who finishes what the kernel cannot execute, once it is known.
    pub fallback: OnceLock<Arc<dyn EmulationFailure>>,
    msr_list: OnceLock<Vec<u32>>,
    mode: OnceLock<IrqChipMode>,
    vcpus: Mutex<Vec<Arc<VcpuCore>>>,
    mmap_size: usize,
    ring: u32,
    /// Instructions replaced by breakpoints.
    pub patches: crate::x86::patches::Patches,
    scratch: OnceLock<Arc<RamBlock>>,
    forgotten: AtomicU64,
    shadow_paging: OnceLock<bool>,
    device: std::path::PathBuf,
}

impl VmShared {
    /// All vCPUs made so far, in index order.
    pub fn vcpus(&self) -> MutexGuard<'_, Vec<Arc<VcpuCore>>> {
        self.vcpus.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Who runs the interrupt controllers.
    pub fn mode(&self) -> IrqChipMode {
        self.mode.get().copied().unwrap_or(IrqChipMode::User)
    }

    /// A CPU model as this VM can give it.
    fn restrict(&self, model: &X86Model) -> Result<X86Model, AccelError> {
        self.host.restrict(model)
    }

    /// The MSRs that are state, found out with the first vCPU.
    pub fn available_msrs(&self, vcpu: &VcpuFd) -> Result<&[u32], AccelError> {
        if let Some(list) = self.msr_list.get() {
            return Ok(list);
        }
        let list = msrs::read_available(vcpu, &self.msr_candidates)?;
        Ok(self.msr_list.get_or_init(|| list.iter().map(|m| m.index).collect()))
    }

    /// Has accesses to the MSRs of a local APIC that the kernel does not run come to us.
    pub fn filter_apic_msrs(&self) -> Result<(), AccelError> {
        if !self.caps.msr_filter {
            return Ok(());
        }
        let reasons = KVM_MSR_EXIT_REASON_INVAL | KVM_MSR_EXIT_REASON_UNKNOWN | KVM_MSR_EXIT_REASON_FILTER;
        let what = "have accesses to the local APIC's registers come to us (kernel-irqchip=off)";
        self.enable_cap(KVM_CAP_X86_USER_SPACE_MSR, [reasons.into(), 0]).map_err(errno(what))?;
        let range = |base| MsrFilterRange {
            flags: MsrFilterRangeFlags::READ | MsrFilterRangeFlags::WRITE,
            base,
            msr_count: 1,
            // The kernel reads whole words.
            bitmap: &[0; 8],
        };
        let ranges = [range(msr::APIC_BASE), range(msr::TSC_DEADLINE)];
        self.fd.set_msr_filter(MsrFilterDefaultAction::ALLOW, &ranges).map_err(errno(what))
    }

    /// Turns a capability of the VM on.
    pub fn enable_cap(&self, cap: u32, args: [u64; 2]) -> Result<(), kvm_ioctls::Error> {
        enable_cap(&self.fd, cap, args)
    }

    /// The flags of `KVM_SET_GUEST_DEBUG` that this kernel knows, or 0.
    pub fn known_debug_flags(&self) -> u32 {
        ioctl::check_extension(&*self.fd, KVM_CAP_SET_GUEST_DEBUG2)
    }

    /// Whether the VM has a capability.
    pub fn has_cap(&self, cap: u32) -> bool {
        ioctl::check_extension(&*self.fd, cap) != 0
    }

    /// Whether guests see the host's time-stamp counter, whatever it is set to.
    pub fn tsc_is_fixed(&self) -> bool {
        open(&self.device).ok().and_then(|kvm| quirks::tsc_fixed(&kvm).ok()).unwrap_or(false)
    }

    /// Whether the kernel shadows page tables, found out the first time it is asked for.
    fn shadows_page_tables(&self) -> bool {
        let probe = || open(&self.device).ok().and_then(|kvm| quirks::shadow_paging(&kvm).ok());
        // If it cannot be found out, forgetting is the safe side.
        *self.shadow_paging.get_or_init(|| probe().unwrap_or(true))
    }

    /// Guest page tables were changed by us: has the kernel forget what it has cached of them.
    pub fn forget_page_tables(&self) -> Result<(), AccelError> {
        if !self.shadows_page_tables() {
            return Ok(());
        }
        if self.scratch.get().is_none() {
            let made = GuestRam::new().add_block("kvm.scratch", PAGE_SIZE, RamBacking::Private);
            let _ = self.scratch.set(made.map_err(|e| AccelError::Other(e.to_string()))?);
        }
        match self.scratch.get() {
            Some(scratch) => {
                self.forgotten.fetch_add(1, Ordering::Relaxed);
                self.slots.drop_shadows(scratch).map_err(errno("forget guest page tables"))
            }
            None => Ok(()),
        }
    }
}

fn enable_cap(fd: &VmFd, cap: u32, args: [u64; 2]) -> Result<(), kvm_ioctls::Error> {
    let mut request = kvm_enable_cap { cap, ..Default::default() };
    request.args[..2].copy_from_slice(&args);
    fd.enable_cap(&request)
}

/// Opens the device node and checks that it is KVM's.
pub fn open(device: &std::path::Path) -> Result<Kvm, AccelError> {
    let path = CString::new(device.as_os_str().as_bytes())
        .map_err(|_| cannot_open(device, io::Error::from_raw_os_error(libc::ENOENT)))?;
    let kvm = Kvm::new_with_path(path).map_err(|e| cannot_open(device, io::Error::from_raw_os_error(e.errno())))?;
    match kvm.get_api_version() {
        12 => Ok(kvm),
        version => Err(wrong_version(device, version).into()),
    }
}

/// Fails if the kernel lacks what cannot be done without.
pub fn require(kvm: &Kvm) -> Result<(), AccelError> {
    let needed = [
        (Cap::UserMemory, "memory slots (KVM_CAP_USER_MEMORY)"),
        (Cap::SetTssAddr, "a place for its task state (KVM_CAP_SET_TSS_ADDR)"),
        (Cap::ExtCpuid, "CPUID tables (KVM_CAP_EXT_CPUID)"),
        (Cap::ImmediateExit, "kicks without a race (KVM_CAP_IMMEDIATE_EXIT, Linux 4.13)"),
        (Cap::VcpuEvents, "saved events (KVM_CAP_VCPU_EVENTS)"),
        (Cap::Xsave, "saved vector registers (KVM_CAP_XSAVE)"),
        (Cap::Debugregs, "saved debug registers (KVM_CAP_DEBUGREGS)"),
    ];
    match needed.into_iter().find(|(cap, _)| !kvm.check_extension(*cap)) {
        Some((_, what)) => Err(lacks(what).into()),
        None => Ok(()),
    }
}

/// Makes a virtual machine, of which there is nothing yet.
pub fn create_fd(kvm: &Kvm) -> Result<VmFd, AccelError> {
    kvm.create_vm().map_err(|e| cannot_create(io::Error::from_raw_os_error(e.errno())))
}

/// Most vCPUs of a machine.
pub fn most_vcpus(kvm: &Kvm) -> u32 {
    kvm.get_max_vcpus().min(kvm.get_max_vcpu_id()) as u32
}

/// A VM as the machine sees it.
pub struct KvmVm {
    shared: Arc<VmShared>,
    options: KvmOptions,
    caps: AccelCaps,
    doorbells: KvmDoorbells,
    dirty_log: KvmDirtyLog,
    irqfds: OnceLock<KvmIrqFds>,
}

impl KvmVm {
    /// Makes one.
    pub fn create(config: &VmConfig) -> Result<Arc<Self>, AccelError> {
        let options = KvmOptions::parse(&config.options)?;
        let kvm = open(&options.device)?;
        require(&kvm)?;
        let most = most_vcpus(&kvm);
        if config.smp > most {
            return Err(too_many_vcpus(config.smp, most));
        }
        signal::install();
        let fd = Arc::new(create_fd(&kvm)?);
        fd.set_identity_map_address(IDENTITY_MAP_ADDRESS).map_err(errno("place its page table"))?;
        fd.set_tss_address(TSS_ADDRESS).map_err(errno("place its task state"))?;
        let kernel = kernel_caps(&fd);
        let ring = set_up_dirty_log(&fd, &options)?;
        if let Some(ns) = options.halt_poll_ns {
            enable_cap(&fd, KVM_CAP_HALT_POLL, [ns.into(), 0]).map_err(errno("set halt-poll-ns"))?;
        }
        if options.cpu_pm {
            keep_processors(&fd)?;
        }
        let entries = Arc::new(Entries::default());
        let limits = SlotLimits {
            slots: fd.check_extension_int(Cap::NrMemslots).max(32) as u32,
            readonly: fd.check_extension(Cap::ReadonlyMem),
            manual_clear: ring == 0 && enable_manual_clear(&fd),
            ring,
        };
        let routes = fd.check_extension_int(Cap::IrqRouting).max(0) as u32;
        let shared = Arc::new(VmShared {
            caps: kernel,
            host: HostCpu::read(&kvm)?,
            slots: Slots::new(fd.clone(), entries.clone(), limits, 0),
            // The rings do not tell the two apart.
            smm_slots: (kernel.smm && ring == 0).then(|| Slots::new(fd.clone(), entries.clone(), limits, 1)),
            routing: Arc::new(Routing::new(fd.clone(), IOAPIC_PINS as u32, routes)),
            coalescer: Coalescer::new(fd.clone()),
            clock: config.clock.clone(),
            memory: config.memory.clone(),
            host_tsc_khz: sys_x86::tsc_khz(&*fd),
            msr_candidates: msrs::candidates(&kvm)?,
            smp: config.smp,
            fallback: OnceLock::new(),
            msr_list: OnceLock::new(),
            mode: OnceLock::new(),
            vcpus: Mutex::default(),
            mmap_size: kvm.get_vcpu_mmap_size().map_err(errno("size its run page"))?,
            ring,
            patches: Default::default(),
            scratch: OnceLock::new(),
            forgotten: AtomicU64::new(0),
            shadow_paging: OnceLock::new(),
            device: options.device.clone(),
            entries,
            fd,
        });
        let doorbells = KvmDoorbells::new(shared.fd.clone());
        let caps = AccelCaps { max_vcpus: most, debug: true, icount: false };
        let dirty_log =
            KvmDirtyLog([Some(&shared.slots), shared.smm_slots.as_ref()].into_iter().flatten().cloned().collect());
        Ok(Arc::new(Self { shared, options, caps, doorbells, dirty_log, irqfds: OnceLock::new() }))
    }
}

fn kernel_caps(fd: &VmFd) -> KernelCaps {
    let has = |cap| ioctl::check_extension(fd, cap);
    let on = |cap, arg| has(cap) != 0 && enable_cap(fd, cap, [arg, 0]).is_ok();
    KernelCaps {
        clock: fd.check_extension(Cap::AdjustClock),
        sregs2: has(KVM_CAP_SREGS2) != 0,
        xsave_size: has(KVM_CAP_XSAVE2) as usize,
        smm: has(KVM_CAP_X86_SMM) != 0 && has(KVM_CAP_MULTI_ADDRESS_SPACE) > 1,
        events: EventCaps {
            payload: on(KVM_CAP_EXCEPTION_PAYLOAD, 1),
            smm: has(KVM_CAP_X86_SMM) != 0,
            triple_fault: on(KVM_CAP_X86_TRIPLE_FAULT_EVENT, 1),
        },
        sync_regs: has(KVM_CAP_SYNC_REGS),
        msr_filter: has(KVM_CAP_X86_MSR_FILTER) != 0 && has(KVM_CAP_X86_USER_SPACE_MSR) != 0,
        tsc_scaling: has(KVM_CAP_TSC_CONTROL) != 0,
    }
}

/// Has guests that wait keep their processors: `HLT`, `MWAIT`, `PAUSE` and C-states do not exit, as far as the host can.
fn keep_processors(fd: &VmFd) -> Result<(), AccelError> {
    let wanted = KVM_X86_DISABLE_EXITS_MWAIT
        | KVM_X86_DISABLE_EXITS_HLT
        | KVM_X86_DISABLE_EXITS_PAUSE
        | KVM_X86_DISABLE_EXITS_CSTATE;
    let offered = ioctl::check_extension(fd, KVM_CAP_X86_DISABLE_EXITS) & wanted;
    if offered & KVM_X86_DISABLE_EXITS_HLT == 0 {
        let reason = "kvm: cpu-pm: this host's KVM cannot let guests wait on its processors: leave cpu-pm=on out";
        return Err(AccelError::Other(reason.into()));
    }
    enable_cap(fd, KVM_CAP_X86_DISABLE_EXITS, [offered.into(), 0]).map_err(errno("set cpu-pm"))
}

/// Turns the rings on if they were asked for; their entries.
fn set_up_dirty_log(fd: &VmFd, options: &KvmOptions) -> Result<u32, AccelError> {
    if options.dirty_ring == 0 {
        return Ok(0);
    }
    let bytes = u64::from(options.dirty_ring) * RING_ENTRY;
    let offered = [KVM_CAP_DIRTY_LOG_RING_ACQ_REL, KVM_CAP_DIRTY_LOG_RING];
    let Some(cap) = offered.into_iter().find(|cap| ioctl::check_extension(fd, *cap) != 0) else {
        return Err(AccelError::Other("kvm: dirty-ring-size: this host's KVM has no dirty rings: leave it out".into()));
    };
    let most = u64::from(ioctl::check_extension(fd, cap)) / RING_ENTRY;
    if u64::from(options.dirty_ring) > most {
        let reason = format!("kvm: dirty-ring-size: this host's KVM takes at most {most} entries");
        return Err(AccelError::Other(reason));
    }
    enable_cap(fd, cap, [bytes, 0]).map_err(errno("set dirty-ring-size"))?;
    Ok(options.dirty_ring)
}

fn enable_manual_clear(fd: &VmFd) -> bool {
    let cap = KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2;
    let arg = KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE;
    ioctl::check_extension(fd, cap) & arg != 0 && enable_cap(fd, cap, [arg.into(), 0]).is_ok()
}

impl AccelVm for KvmVm {
    fn caps(&self) -> &AccelCaps {
        &self.caps
    }

    fn filter_cpu_model(&self, model: &CpuModel) -> Result<CpuModel, AccelError> {
        match model {
            CpuModel::X86(m) => Ok(CpuModel::X86(self.shared.restrict(m)?)),
            other => Err(ModelError::NoModels(other.arch()).into()),
        }
    }

    fn create_vcpu(&self, index: VcpuIndex, model: &CpuModel) -> Result<Box<dyn Vcpu>, AccelError> {
        let Some(model) = model.as_x86() else {
            return Err(ModelError::NoModels(model.arch()).into());
        };
        let vm = &self.shared;
        let model = vm.restrict(model)?;
        let fd = vm.fd.create_vcpu(index.0.into()).map_err(errno(format!("make vCPU {index}")))?;
        let page = RunPage::map(&fd, vm.mmap_size).map_err(refused(format!("map vCPU {index}'s run page")))?;
        let page = Arc::new(page);
        if vm.ring > 0 {
            let ring = DirtyRing::map(&fd, vm.ring).map_err(refused(format!("map vCPU {index}'s dirty ring")))?;
            vm.slots.add_ring(ring);
        }
        vm.coalescer.map(&fd)?;
        let table = vm.host.table(&model, index.0, vm.smp)?;
        fd.set_cpuid2(&table).map_err(errno(format!("set vCPU {index}'s CPUID")))?;
        let entry = vm.entries.add(page.clone());
        let core = VcpuCore::new(index, fd, page, entry);
        let vcpu = KvmVcpu::new(vm, core.clone())?;
        vm.vcpus().push(core);
        Ok(Box::new(vcpu))
    }

    fn memory_listener(&self) -> Option<Arc<dyn MemoryListener>> {
        Some(self.shared.slots.clone())
    }

    fn smm_memory_listener(&self) -> Option<Arc<dyn MemoryListener>> {
        self.shared.smm_slots.clone().map(|s| s as Arc<dyn MemoryListener>)
    }

    fn irqchip_mode(&self) -> IrqChipMode {
        self.options.irqchip.unwrap_or(IrqChipMode::Kernel)
    }

    fn create_irqchip(&self, mode: IrqChipMode) -> Result<Option<Arc<dyn IrqChip>>, AccelError> {
        let vm = &self.shared;
        if !vm.vcpus().is_empty() || vm.mode.set(mode).is_err() {
            return Err(AccelError::Other("kvm: interrupt controllers are made once, before vCPUs".to_owned()));
        }
        if mode == IrqChipMode::User {
            return Ok(None);
        }
        let chip = KvmIrqChip::create(vm, mode, &self.options)?;
        let pins = if mode == IrqChipMode::Kernel { IOAPIC_PINS as u32 } else { 0 };
        let irqfds = KvmIrqFds { vm: vm.fd.clone(), routing: vm.routing.clone(), pins };
        let _ = self.irqfds.set(irqfds);
        Ok(Some(chip))
    }

    fn doorbells(&self) -> Option<&dyn Doorbells> {
        Some(&self.doorbells)
    }

    fn coalesced_io(&self) -> Option<&dyn CoalescedIo> {
        Some(&self.shared.coalescer)
    }

    fn irqfds(&self) -> Option<&dyn IrqFds> {
        self.irqfds.get().map(|i| i as &dyn IrqFds)
    }

    fn dirty_log(&self) -> Option<&dyn DirtyLog> {
        Some(&self.dirty_log)
    }

    fn tsc(&self) -> Option<Arc<dyn TscClock>> {
        Some(Arc::new(Tsc::of(&self.shared)))
    }

    fn guest_clock(&self) -> Option<&dyn GuestClock> {
        Some(&*self.shared)
    }

    fn flush_all(&self) {
        // RAM was replaced from outside, page tables with it.
        if let Err(e) = self.shared.forget_page_tables() {
            log::warn!("{e}");
        }
        self.shared.entries.request_all(LOOK);
    }

    fn statistics(&self) -> Vec<(String, u64)> {
        let vcpus = self.shared.vcpus();
        let sum = |kind| vcpus.iter().map(|v| v.counter(kind)).sum();
        let mut all: Vec<_> = COUNTERS.iter().enumerate().map(|(i, name)| ((*name).to_owned(), sum(i))).collect();
        all.push(("memory slots".to_owned(), self.shared.slots.count() as u64));
        all.push(("doorbells".to_owned(), self.doorbells.count()));
        all.push(("message routes".to_owned(), self.shared.routing.messages()));
        all.push(("vCPUs held out".to_owned(), self.shared.slots.times_held()));
        all.push(("page tables forgotten".to_owned(), self.shared.forgotten.load(Ordering::Relaxed)));
        all.extend(self.shared.fallback.get().map(|f| f.statistics()).unwrap_or_default());
        all
    }
}

/// The handle of a vCPU.
pub fn handle(core: &Arc<VcpuCore>) -> Arc<dyn VcpuHandle> {
    core.clone()
}
