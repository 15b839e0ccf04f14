//! vCPUs of the translator over some RAM, without a board: what tests of guest code run on.

use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use mimus_arch::riscv::RiscvState;
use mimus_arch::{CpuModel, CpuState, GuestArch, StateGroups};
use mimus_core::accel::{
    AccelVm, Accelerator, CpuIo, CpuPin, HypercallResult, RemoteFence, Vcpu, VcpuExit, VcpuHandle, VcpuIndex, VmConfig,
};
use mimus_core::clock::{Clocks, VirtualClock};
use mimus_core::io_thread::IoThread;
use mimus_core::memory::{AddressSpace, GuestRam, MemoryMap, MemoryRegion, RamBacking, RamBlock};
use mimus_core::vcpu::{PinTimers, VcpuEvent, VcpuThreads};
use mimus_tcg::TcgAccelerator;

/// Where RAM begins.
pub const RAM: u64 = 0x8000_0000;
/// Its length.
pub const RAM_LEN: u64 = 4 << 20;

/// What runs the code.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Engine {
    /// Generated code.
    Jit,
    /// The interpreter of the same intermediate code.
    Interp,
    /// Generated code with every optimisation from the first execution on.
    Forced,
    /// Generated code without those that can be left out.
    Plain,
    /// Generated code that is compact, and stays so.
    Compact,
    /// Generated code that is compact until it is found running.
    Tiered,
}

/// All.
pub const ENGINES: [Engine; 6] =
    [Engine::Interp, Engine::Jit, Engine::Forced, Engine::Plain, Engine::Compact, Engine::Tiered];

/// Code caches take much of the address space below 2 GiB: one test at a time in a process.
pub fn alone() -> MutexGuard<'static, ()> {
    static ONE: Mutex<()> = Mutex::new(());
    ONE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// RAM and an accelerator's virtual machine over it.
pub struct Base {
    /// The RAM at [`RAM`].
    pub ram: Arc<RamBlock>,
    /// What vCPUs see.
    pub memory: Arc<AddressSpace>,
    /// The clock behind `time`.
    pub clock: Arc<VirtualClock>,
    vm: Arc<dyn AccelVm>,
    _all_ram: Arc<GuestRam>,
}

impl Base {
    /// With `smp` vCPUs to come.
    pub fn new(engine: Engine, smp: u32) -> Base {
        Base::with_cache(engine, smp, 16)
    }

    /// With `mib` MiB for translated code.
    pub fn with_cache(engine: Engine, smp: u32, mib: u32) -> Base {
        let all_ram = GuestRam::new();
        let ram = all_ram.add_block("ram", RAM_LEN, RamBacking::Private).expect("RAM");
        let map = MemoryMap::new();
        let root = MemoryRegion::container("system", u64::MAX);
        let memory = map.address_space("system", &root);
        map.change(|t| {
            t.map(&root, RAM, &MemoryRegion::ram("ram", &ram));
        });
        let clock = VirtualClock::new();
        let (name, optimise) = match engine {
            Engine::Interp => ("interp", None),
            Engine::Jit => ("jit", None),
            Engine::Forced => ("jit", Some("force")),
            Engine::Plain => ("jit", Some("off")),
            Engine::Compact => ("jit", Some("compact")),
            Engine::Tiered => ("jit", Some("tiered")),
        };
        let optimise = optimise.map(|o| ("opt", o));
        let size = mib.to_string();
        let options = [("engine", name), ("tb-size", &size)]
            .into_iter()
            .chain(optimise)
            .map(|(k, v)| (k.to_owned(), v.to_owned()));
        let config = VmConfig {
            arch: GuestArch::Riscv64,
            memory: memory.clone(),
            ram: all_ram.clone(),
            smp,
            clock: clock.clone(),
            options: options.collect(),
        };
        let vm = TcgAccelerator.create_vm(&config).expect("the translator");
        Base { ram, memory, clock, vm, _all_ram: all_ram }
    }

    /// Empties the code cache, as a debugger's thread may at any time.
    pub fn forget_code(&self) {
        self.vm.flush_all();
    }

    /// A counter of the accelerator's.
    pub fn counter(&self, name: &str) -> u64 {
        let list = self.vm.statistics();
        list.iter().find(|(n, _)| n == name).unwrap_or_else(|| panic!("no counter {name}: {list:?}")).1
    }

    /// Makes a vCPU.
    pub fn vcpu(&self, index: u32) -> Box<dyn Vcpu> {
        let model = CpuModel::parse(GuestArch::Riscv64, "max").expect("model");
        let model = self.vm.filter_cpu_model(&model).expect("filter");
        self.vm.create_vcpu(VcpuIndex(index), &model).expect("vCPU")
    }

    /// Writes RAM as a device does.
    pub fn put(&self, at: u64, bytes: &[u8]) {
        assert!(self.ram.write(at - RAM, bytes), "{at:#x} is not in RAM");
    }

    /// Writes instructions.
    pub fn put_code(&self, at: u64, insns: &[u32]) {
        let bytes: Vec<u8> = insns.iter().flat_map(|i| i.to_le_bytes()).collect();
        self.put(at, &bytes);
    }

    /// Writes a doubleword.
    pub fn put_u64(&self, at: u64, value: u64) {
        assert!(self.ram.store(at - RAM, value), "{at:#x} is not in RAM");
    }

    /// Reads a doubleword.
    pub fn u64_at(&self, at: u64) -> u64 {
        self.ram.load(at - RAM).unwrap_or_else(|| panic!("{at:#x} is not in RAM"))
    }

    /// Reads RAM.
    pub fn bytes(&self, at: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        assert!(self.ram.read(at - RAM, &mut bytes), "{at:#x} is not in RAM");
        bytes
    }
}

/// The RISC-V state of a vCPU.
pub fn riscv_state(vcpu: &mut dyn Vcpu) -> RiscvState {
    match vcpu.get_state(StateGroups::All) {
        CpuState::Riscv(state) => *state,
        other => panic!("{other:?}"),
    }
}

/// Changes the RISC-V state of a vCPU.
pub fn set_riscv_state(vcpu: &mut dyn Vcpu, state: RiscvState) {
    vcpu.set_state(&CpuState::Riscv(Box::new(state))).expect("a valid state");
}

/// All of memory for all modes.
pub fn open_pmp(s: &mut RiscvState) {
    s.pmpcfg[15] = 0x1f;
    s.pmpaddr[15] = !0;
}

struct SoloIo {
    clock: Arc<VirtualClock>,
    memory: Arc<AddressSpace>,
}

impl CpuIo for SoloIo {
    fn clock(&self) -> &VirtualClock {
        &self.clock
    }
    fn memory(&self) -> &AddressSpace {
        &self.memory
    }
}

/// One vCPU, run on the caller's thread.
pub struct Solo {
    /// What runs its code.
    pub engine: Engine,
    /// RAM.
    pub base: Base,
    /// The vCPU.
    pub vcpu: Box<dyn Vcpu>,
    io: SoloIo,
    watch: Arc<Watch>,
    /// Joined at the end: it holds the vCPU's handle, and that the code cache.
    watcher: Option<JoinHandle<()>>,
}

/// Kicks a vCPU that runs too long.
struct Watch {
    /// When the present run must end, in ms since `epoch`; 0 if there is none.
    deadline: AtomicU64,
    epoch: Instant,
    ended: (Mutex<bool>, Condvar),
}

impl Watch {
    fn start(handle: Arc<dyn VcpuHandle>) -> (Arc<Watch>, JoinHandle<()>) {
        let watch = Arc::new(Watch { deadline: AtomicU64::new(0), epoch: Instant::now(), ended: Default::default() });
        let own = watch.clone();
        let thread = std::thread::spawn(move || {
            let mut ended = own.ended.0.lock().unwrap_or_else(PoisonError::into_inner);
            while !*ended {
                let due = own.deadline.load(Ordering::SeqCst);
                if due != 0 && own.now() > due {
                    handle.kick();
                }
                let tick = Duration::from_millis(50);
                ended = own.ended.1.wait_timeout(ended, tick).unwrap_or_else(PoisonError::into_inner).0;
            }
        });
        (watch, thread)
    }

    fn now(&self) -> u64 {
        self.epoch.elapsed().as_millis() as u64
    }
}

impl Drop for Solo {
    fn drop(&mut self) {
        *self.watch.ended.0.lock().unwrap_or_else(PoisonError::into_inner) = true;
        self.watch.ended.1.notify_all();
        if let Some(thread) = self.watcher.take() {
            let _ = thread.join();
        }
    }
}

impl Solo {
    /// On the given engine.
    pub fn new(engine: Engine) -> Solo {
        let base = Base::new(engine, 1);
        let vcpu = base.vcpu(0);
        let io = SoloIo { clock: base.clock.clone(), memory: base.memory.clone() };
        let (watch, thread) = Watch::start(vcpu.handle());
        Solo { engine, base, vcpu, io, watch, watcher: Some(thread) }
    }

    /// Its state.
    pub fn state(&mut self) -> RiscvState {
        riscv_state(&mut *self.vcpu)
    }

    /// Replaces its state.
    pub fn set(&mut self, state: RiscvState) {
        set_riscv_state(&mut *self.vcpu, state);
    }

    /// Runs until it has a reason to stop: after `limit`, a kick.
    pub fn exit(&mut self, limit: Duration) -> VcpuExit {
        self.watch.deadline.store(self.watch.now() + limit.as_millis() as u64, Ordering::SeqCst);
        let exit = self.vcpu.run(&self.io);
        self.watch.deadline.store(0, Ordering::SeqCst);
        exit
    }

    /// Runs until the guest waits for an interrupt; `None` if it has not after `limit`.
    pub fn run(&mut self, limit: Duration) -> Option<RiscvState> {
        match self.exit(limit) {
            VcpuExit::Halted => Some(self.state()),
            VcpuExit::Kicked => None,
            other => panic!("{other:?}"),
        }
    }
}

/// What the test machine's firmware call does; `a7` of an `ecall` in S-mode.
pub mod call {
    /// Raises `ssip` of the harts in the mask `a0`.
    pub const IPI: u64 = 1;
    /// `fence.i` on the harts in the mask `a0`.
    pub const FENCE_I: u64 = 2;
    /// `sfence.vma` of everything on the harts in the mask `a0`.
    pub const FENCE_TLB: u64 = 3;
    /// `sfence.vma` of `a2` bytes at `a1` on the harts in the mask `a0`.
    pub const FENCE_RANGE: u64 = 4;
}

struct ClusterIo {
    clock: Arc<VirtualClock>,
    memory: Arc<AddressSpace>,
    handles: Vec<Arc<dyn VcpuHandle>>,
    timers: PinTimers,
    calls: AtomicU32,
}

impl ClusterIo {
    fn each(&self, mask: u64, f: impl Fn(&dyn VcpuHandle)) {
        for (_, handle) in self.handles.iter().enumerate().filter(|(i, _)| mask >> i & 1 != 0) {
            f(&**handle);
        }
    }
}

impl CpuIo for ClusterIo {
    fn clock(&self) -> &VirtualClock {
        &self.clock
    }
    fn memory(&self) -> &AddressSpace {
        &self.memory
    }
    fn arm_pin_timer(&self, vcpu: VcpuIndex, pin: CpuPin, deadline_ns: Option<u64>) {
        self.timers.arm(vcpu, pin, deadline_ns);
    }
    fn hypercall(&self, _: VcpuIndex, regs: &mut [u64; 8]) -> HypercallResult {
        self.calls.fetch_add(1, Ordering::Relaxed);
        match regs[7] {
            call::IPI => self.each(regs[0], |h| h.set_pin(CpuPin::Ssip, true)),
            call::FENCE_I => self.each(regs[0], |h| h.remote_fence(RemoteFence::Icache)),
            call::FENCE_TLB => self.each(regs[0], |h| h.remote_fence(RemoteFence::TlbAll)),
            call::FENCE_RANGE => {
                let start = mimus_core::bus::GuestVirt(regs[1]);
                let range = RemoteFence::TlbRange { start, len: regs[2], asid: None };
                self.each(regs[0], |h| h.remote_fence(range));
            }
            _ => return HypercallResult::NotHandled,
        }
        HypercallResult::Done
    }
}

/// Several vCPUs, each on its thread, in the machine's own run loop.
pub struct Cluster {
    /// RAM.
    pub base: Base,
    /// The vCPUs.
    pub threads: VcpuThreads,
    failed: Arc<Mutex<Option<String>>>,
    _io_thread: IoThread,
}

impl Cluster {
    /// `n` vCPUs in reset; `prepare` sets the state of each.
    pub fn new(engine: Engine, n: u32, prepare: impl Fn(u32, &mut RiscvState)) -> Cluster {
        Cluster::over(Base::new(engine, n), n, prepare)
    }

    /// The same over what there is already.
    pub fn over(base: Base, n: u32, prepare: impl Fn(u32, &mut RiscvState)) -> Cluster {
        let mut vcpus: Vec<_> = (0..n).map(|i| base.vcpu(i)).collect();
        for (i, vcpu) in vcpus.iter_mut().enumerate() {
            let mut state = riscv_state(&mut **vcpu);
            open_pmp(&mut state);
            prepare(i as u32, &mut state);
            set_riscv_state(&mut **vcpu, state);
        }
        let handles: Vec<_> = vcpus.iter().map(|v| v.handle()).collect();
        let failed = Arc::new(Mutex::new(None));
        let note = failed.clone();
        let threads = VcpuThreads::new(handles.clone(), move |event: VcpuEvent| {
            *note.lock().unwrap_or_else(PoisonError::into_inner) = Some(format!("{event:?}"));
        });
        let clocks = Clocks { virt: base.clock.clone(), ..Clocks::new() };
        let io_thread = IoThread::spawn("test-io", &clocks).expect("I/O thread");
        let io = ClusterIo {
            clock: base.clock.clone(),
            memory: base.memory.clone(),
            timers: PinTimers::new(io_thread.handle(), &handles),
            handles,
            calls: AtomicU32::new(0),
        };
        threads.spawn(vcpus, Arc::new(io)).expect("threads");
        Cluster { base, threads, failed, _io_thread: io_thread }
    }

    /// Lets them go.
    pub fn start(&self) {
        self.base.clock.start();
        for i in 0..self.threads.count() {
            assert!(self.threads.power_on(VcpuIndex(i as u32), None));
        }
        self.threads.resume();
    }

    /// Waits until each of the doublewords is not 0.
    pub fn wait_for(&self, what: &str, words: impl Iterator<Item = u64> + Clone, limit: Duration) {
        let end = Instant::now() + limit;
        loop {
            if words.clone().all(|at| self.base.u64_at(at) != 0) {
                return;
            }
            if let Some(event) = self.failed.lock().unwrap_or_else(PoisonError::into_inner).take() {
                panic!("{what}: {event}");
            }
            if Instant::now() > end {
                self.threads.pause();
                let where_: Vec<String> = (0..self.threads.count() as u32).map(|i| self.describe(i)).collect();
                panic!("{what}: not after {limit:?}:\n{}", where_.join("\n"));
            }
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    /// The state of a vCPU. It is stopped by this.
    pub fn state(&self, index: u32) -> RiscvState {
        self.threads.run_on_sync(VcpuIndex(index), |v| riscv_state(v)).expect("the vCPU")
    }

    fn describe(&self, index: u32) -> String {
        let s = self.state(index);
        format!(
            "vCPU {index}: pc {:#x} {:?} waiting {} mcause {:#x} mepc {:#x} mtval {:#x} scause {:#x} sepc {:#x} mip {:#x}",
            s.pc, s.privilege, s.waiting, s.mcause, s.mepc, s.mtval, s.scause, s.sepc, s.mip
        )
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        self.threads.stop();
    }
}
