//! Small machines: RAM, tables, a bus that records.

use iced_x86::code_asm::CodeAssembler;
use mimus_accel_kvm::{KvmAccelerator, Quirks};
use mimus_arch::x86::regs::*;
use mimus_arch::x86::state::attr;
use mimus_arch::x86::{Segment, X86State};
use mimus_arch::{CpuModel, CpuState, GuestArch, StateGroups};
use mimus_core::accel::*;
use mimus_core::bus::{AccessSize, GuestPhys, MemTxAttrs, MemTxResult};
use mimus_core::clock::VirtualClock;
use mimus_core::device::Device;
use mimus_core::memory::*;
use std::collections::{BTreeMap, VecDeque};
use std::io::Write;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

/// RAM from 0.
pub const RAM: u64 = 0x40_0000;
/// Mapped by the page tables, no memory there.
pub const HOLE: u64 = 0x80_0000;
/// Where supervisor code is put.
pub const CODE: u64 = 0x1000;
/// Where user code is put.
pub const USER: u64 = 0x4_0000;
/// Top of the supervisor's stack.
pub const STACK: u64 = 0x8000;
/// Top of the user's stack.
pub const USER_STACK: u64 = 0x4_8000;
pub const GDT: u64 = 0x9000;
pub const IDT: u64 = 0xa000;
pub const TSS: u64 = 0xb000;
pub const PML4: u64 = 0x1_0000;
/// The table of the first 2 MiB, in 4 KiB pages.
pub const PT: u64 = 0x1_6000;
/// Free for data.
pub const DATA: u64 = 0x2_0000;

pub const KERNEL_CODE: u16 = 8;
pub const KERNEL_DATA: u16 = 0x10;
pub const USER_CODE: u16 = 0x18 | 3;
pub const USER_DATA: u16 = 0x20 | 3;
pub const KERNEL_CODE32: u16 = 0x28;

/// A write here ends `run`.
pub const PORT_STOP: u16 = 0xf4;

const PRESENT: u64 = 1;
const WRITE: u64 = 2;
const USER_PAGE: u64 = 4;
const LARGE: u64 = 0x80;

/// Says that a test does not run here.
pub fn skipped(name: &str, reason: impl std::fmt::Display) {
    // In one piece: tests run side by side.
    let _ = std::io::stderr().write_all(format!("SKIPPED ({name}): {reason}\n").as_bytes());
}

/// What the vCPU asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Seen {
    In(u16, u64),
    Out(u16, u64, u64),
    Read(u64, u64),
    Write(u64, u64, u64),
    Eoi(u32),
}

type Handler = Box<dyn Fn(VcpuIndex, &Seen) -> Option<u64> + Send + Sync>;

/// The machine's side.
pub struct Bus {
    clock: Arc<VirtualClock>,
    memory: Arc<AddressSpace>,
    seen: Mutex<Vec<Seen>>,
    /// Values of reads, in order.
    pub answers: Mutex<VecDeque<u64>>,
    /// Vectors of interrupt acknowledge cycles; INTR goes low with the last.
    pub vectors: Mutex<VecDeque<u8>>,
    /// System registers that exist.
    pub sysregs: Mutex<BTreeMap<u32, u64>>,
    pub cr8: Mutex<Option<u64>>,
    handler: OnceLock<Handler>,
    handles: Mutex<Vec<Arc<dyn VcpuHandle>>>,
    /// Every access ends `run`.
    pub stop_always: AtomicBool,
    /// Do not record, for loops.
    pub quiet: AtomicBool,
}

pub fn lock<T>(m: &Mutex<T>) -> MutexGuard<'_, T> {
    m.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Bus {
    /// What was seen, and forget it.
    pub fn take(&self) -> Vec<Seen> {
        std::mem::take(&mut lock(&self.seen))
    }

    /// Records again what was taken.
    pub fn put_back(&self, seen: Vec<Seen>) {
        *lock(&self.seen) = seen;
    }

    /// Values written to a port.
    pub fn out_values(&self, port: u16) -> Vec<u64> {
        let seen = lock(&self.seen);
        seen.iter().filter_map(|s| if let Seen::Out(p, _, v) = s { (*p == port).then_some(*v) } else { None }).collect()
    }

    /// Who is asked first; `None`: as usual.
    pub fn set_handler(&self, f: impl Fn(VcpuIndex, &Seen) -> Option<u64> + Send + Sync + 'static) {
        assert!(self.handler.set(Box::new(f)).is_ok(), "one handler");
    }

    fn see(&self, vcpu: VcpuIndex, what: Seen) -> Option<u64> {
        if !self.quiet.load(Ordering::Relaxed) {
            lock(&self.seen).push(what);
        }
        let stop = matches!(what, Seen::Out(PORT_STOP, ..)) || self.stop_always.load(Ordering::Relaxed);
        if stop {
            lock(&self.handles)[vcpu.as_usize()].kick();
        }
        self.handler.get().and_then(|f| f(vcpu, &what))
    }

    fn answer(&self, vcpu: VcpuIndex, what: Seen, size: AccessSize) -> u64 {
        let value = self.see(vcpu, what).or_else(|| lock(&self.answers).pop_front());
        value.unwrap_or(u64::MAX) & size.mask()
    }
}

impl CpuIo for Bus {
    fn mem_read(&self, vcpu: VcpuIndex, pa: GuestPhys, size: AccessSize, attrs: MemTxAttrs) -> (u64, MemTxResult) {
        assert_eq!(attrs, MemTxAttrs::vcpu(vcpu.0));
        if self.memory.view().lookup(pa).is_some() {
            lock(&self.seen).push(Seen::Read(pa.0, size.bytes()));
            return self.memory.read(pa, size, attrs);
        }
        (self.answer(vcpu, Seen::Read(pa.0, size.bytes()), size), MemTxResult::Ok)
    }

    fn mem_write(
        &self,
        vcpu: VcpuIndex,
        pa: GuestPhys,
        size: AccessSize,
        attrs: MemTxAttrs,
        value: u64,
    ) -> MemTxResult {
        self.see(vcpu, Seen::Write(pa.0, size.bytes(), value));
        if self.memory.view().lookup(pa).is_some() {
            self.memory.write(pa, size, value, attrs)
        } else {
            MemTxResult::Ok
        }
    }

    fn pio_read(&self, vcpu: VcpuIndex, port: u16, size: AccessSize) -> u64 {
        self.answer(vcpu, Seen::In(port, size.bytes()), size)
    }

    fn pio_write(&self, vcpu: VcpuIndex, port: u16, size: AccessSize, value: u64) {
        self.see(vcpu, Seen::Out(port, size.bytes(), value));
    }

    fn acknowledge_interrupt(&self, vcpu: VcpuIndex) -> Option<u8> {
        let mut vectors = lock(&self.vectors);
        let vector = vectors.pop_front();
        if vectors.is_empty() {
            lock(&self.handles)[vcpu.as_usize()].set_pin(CpuPin::Intr, false);
        }
        vector
    }

    fn end_of_interrupt(&self, vcpu: VcpuIndex, vector: u32) {
        self.see(vcpu, Seen::Eoi(vector));
    }

    fn sysreg_read(&self, _: VcpuIndex, reg: SysReg) -> Option<u64> {
        match reg {
            SysReg::Msr(i) => lock(&self.sysregs).get(&i).copied(),
            SysReg::Cr8 => *lock(&self.cr8),
            _ => None,
        }
    }

    fn sysreg_write(&self, _: VcpuIndex, reg: SysReg, value: u64) -> Option<()> {
        match reg {
            SysReg::Msr(i) => lock(&self.sysregs).get_mut(&i).map(|r| *r = value),
            SysReg::Cr8 => lock(&self.cr8).as_mut().map(|r| *r = value),
            _ => None,
        }
    }

    fn clock(&self) -> &VirtualClock {
        &self.clock
    }

    fn memory(&self) -> &AddressSpace {
        &self.memory
    }
}

/// How to make a machine.
#[derive(Clone)]
pub struct Setup {
    pub mode: IrqChipMode,
    pub smp: u32,
    pub model: String,
    pub options: Vec<(&'static str, String)>,
}

impl Default for Setup {
    fn default() -> Self {
        Self { mode: IrqChipMode::User, smp: 1, model: "max".to_owned(), options: Vec::new() }
    }
}

impl Setup {
    pub fn mode(mode: IrqChipMode) -> Self {
        Self { mode, ..Self::default() }
    }

    pub fn smp(self, smp: u32) -> Self {
        Self { smp, ..self }
    }

    pub fn option(mut self, key: &'static str, value: &str) -> Self {
        self.options.push((key, value.to_owned()));
        self
    }

    /// The machine, or says that there is no KVM.
    pub fn build(self, test: &str) -> Option<Guest> {
        if let Err(e) = KvmAccelerator.probe(GuestArch::X86_64) {
            skipped(test, e);
            return None;
        }
        Some(Guest::new(self))
    }
}

/// A machine with KVM's vCPUs.
pub struct Guest {
    pub map: Arc<MemoryMap>,
    pub root: MemoryRegion,
    pub ram: Arc<RamBlock>,
    pub guest_ram: Arc<GuestRam>,
    pub vm: Arc<dyn AccelVm>,
    pub chip: Option<Arc<dyn IrqChip>>,
    pub vcpus: Vec<Box<dyn Vcpu>>,
    pub bus: Arc<Bus>,
    pub setup: Setup,
}

/// The configuration of a VM over a memory.
pub fn config(setup: &Setup, memory: &Arc<AddressSpace>, ram: &Arc<GuestRam>, clock: &Arc<VirtualClock>) -> VmConfig {
    VmConfig {
        arch: GuestArch::X86_64,
        memory: memory.clone(),
        ram: ram.clone(),
        smp: setup.smp,
        clock: clock.clone(),
        options: setup.options.iter().map(|(k, v)| ((*k).to_owned(), v.clone())).collect(),
    }
}

impl Guest {
    fn new(setup: Setup) -> Self {
        let map = MemoryMap::new();
        let root = MemoryRegion::container("system", 1 << 40);
        let memory = map.address_space("system", &root);
        let guest_ram = GuestRam::new();
        let ram = guest_ram.add_block("ram", RAM, RamBacking::Private).expect("RAM");
        let clock = VirtualClock::new();
        let vm = KvmAccelerator.create_vm(&config(&setup, &memory, &guest_ram, &clock)).expect("a VM");
        memory.add_listener(vm.memory_listener().expect("a listener"));
        map.change(|t| _ = t.map(&root, 0, &MemoryRegion::ram("ram", &ram)));
        let chip = vm.create_irqchip(setup.mode).expect("interrupt controllers");
        let model = CpuModel::parse(GuestArch::X86_64, &setup.model).expect("a model");
        let model = vm.filter_cpu_model(&model).expect("the model");
        let vcpus: Vec<_> = (0..setup.smp).map(|i| vm.create_vcpu(VcpuIndex(i), &model).expect("a vCPU")).collect();
        let bus = Arc::new(Bus {
            clock,
            memory,
            seen: Mutex::default(),
            answers: Mutex::default(),
            vectors: Mutex::default(),
            sysregs: Mutex::default(),
            cr8: Mutex::default(),
            handler: OnceLock::new(),
            handles: Mutex::new(vcpus.iter().map(|v| v.handle()).collect()),
            stop_always: AtomicBool::new(false),
            quiet: AtomicBool::new(false),
        });
        let guest = Self { map, root, ram, guest_ram, vm, chip, vcpus, bus, setup };
        guest.write_tables();
        guest
    }

    /// A machine like this one, with nothing of its state but RAM.
    pub fn twin(&self) -> Self {
        let twin = Self::new(self.setup.clone());
        let mut bytes = vec![0; RAM as usize];
        assert!(self.ram.read(0, &mut bytes) && twin.ram.write(0, &bytes));
        twin
    }

    pub fn store(&self, at: u64, value: u64) {
        assert!(self.ram.store(at, value), "{at:#x}");
    }

    pub fn load(&self, at: u64) -> u64 {
        self.ram.load(at).expect("inside RAM")
    }

    pub fn write(&self, at: u64, bytes: &[u8]) {
        assert!(self.ram.write(at, bytes), "{at:#x}");
    }

    /// Assembles code and puts it into RAM.
    pub fn code(&self, at: u64, bits: u32, f: impl FnOnce(&mut CodeAssembler) -> Result<(), iced_x86::IcedError>) {
        self.write(at, &assemble(at, bits, f));
    }

    /// 4 GiB mapped to themselves, the first 2 MiB in small pages; all for everybody. A GDT, a TSS.
    fn write_tables(&self) {
        let all = PRESENT | WRITE | USER_PAGE;
        let (pdpt, pd) = (PML4 + 0x1000, PML4 + 0x2000);
        self.store(PML4, pdpt | all);
        for i in 0..4 {
            self.store(pdpt + i * 8, (pd + i * 0x1000) | all);
        }
        for i in 1..2048 {
            self.store(pd + i * 8, i << 21 | LARGE | all);
        }
        self.store(pd, PT | all);
        for i in 0..512 {
            self.store(PT + i * 8, i << 12 | all);
        }
        let (code, data, dpl3) = (0x00af_9b00_0000_ffffu64, 0x00cf_9300_0000_ffffu64, 3u64 << 45);
        let code32 = 0x00cf_9b00_0000_ffff;
        let tss = 0x0000_8900_0000_0067 | TSS << 16;
        for (i, d) in [0, code, data, code | dpl3, data | dpl3, code32, tss, 0].into_iter().enumerate() {
            self.store(GDT + i as u64 * 8, d);
        }
        // RSP0.
        self.store(TSS + 4, STACK);
    }

    /// An interrupt gate of long mode.
    pub fn gate(&self, vector: u8, handler: u64) {
        let at = IDT + u64::from(vector) * 16;
        // For everybody: software may raise it too.
        let flags = 0xee00u64 << 32 | u64::from(KERNEL_CODE) << 16;
        self.store(at, handler & 0xffff | flags | (handler >> 16 & 0xffff) << 48);
        self.store(at + 8, handler >> 32);
    }

    /// The state of a vCPU.
    pub fn state(&mut self, vcpu: usize) -> X86State {
        x86(self.vcpus[vcpu].get_state(StateGroups::All))
    }

    pub fn set(&mut self, vcpu: usize, state: X86State) {
        self.vcpus[vcpu].set_state(&CpuState::X86(Box::new(state))).expect("a valid state");
    }

    /// Changes a state.
    pub fn change(&mut self, vcpu: usize, f: impl FnOnce(&mut X86State)) {
        let mut state = self.state(vcpu);
        f(&mut state);
        self.set(vcpu, state);
    }

    pub fn run(&mut self, vcpu: usize) -> VcpuExit {
        let bus = self.bus.clone();
        self.vcpus[vcpu].run(&*bus)
    }

    /// Runs until the guest writes to [`PORT_STOP`].
    pub fn run_to_stop(&mut self, vcpu: usize) {
        let exit = self.run(vcpu);
        let state = self.state(vcpu);
        assert!(matches!(exit, VcpuExit::Kicked), "{exit:?} at {:#x}; {:?}", state.linear_pc(), self.bus.take());
    }

    /// Real mode at [`CODE`], flat low segments.
    pub fn real(&mut self, vcpu: usize) {
        self.change(vcpu, |s| {
            let data = Segment::real(0, attr::DATA);
            (s.ss, s.ds, s.es) = (data, data, data);
            s.cs = Segment::real(0, attr::CODE);
            s.rip = CODE;
            s.gpr[RSP] = STACK;
            s.mp_state = mimus_arch::x86::MpState::Running;
        });
    }

    /// 32-bit protected mode at [`CODE`], flat.
    pub fn protected(&mut self, vcpu: usize) {
        self.real(vcpu);
        self.change(vcpu, |s| {
            s.cr0 = CR0_PE | CR0_ET | CR0_NE;
            s.gdtr.base = GDT;
            s.idtr.base = IDT;
            s.cs = Segment::flat(KERNEL_CODE32, attr::CODE | attr::DB);
            let data = Segment::flat(KERNEL_DATA, attr::DATA | attr::DB);
            (s.ss, s.ds, s.es) = (data, data, data);
        });
    }

    /// Long mode at [`CODE`].
    pub fn long(&mut self, vcpu: usize) {
        self.change(vcpu, long_mode);
    }

    /// Long mode, user, at [`USER`].
    pub fn user(&mut self, vcpu: usize) {
        self.change(vcpu, |s| {
            long_mode(s);
            let dpl = 3 << attr::DPL_SHIFT;
            s.cs = Segment::flat(USER_CODE, attr::CODE | attr::L | dpl);
            let data = Segment::flat(USER_DATA, attr::DATA | attr::DB | dpl);
            (s.ss, s.ds, s.es) = (data, data, data);
            s.rip = USER;
            s.gpr[RSP] = USER_STACK;
        });
    }

    /// The chips of the accelerator.
    pub fn devices(&self) -> Vec<(&'static str, Arc<dyn Device>)> {
        self.chip.as_ref().map(|c| c.devices()).unwrap_or_default()
    }

    pub fn statistic(&self, name: &str) -> u64 {
        let all = self.vm.statistics();
        all.iter().find(|(n, _)| n == name).unwrap_or_else(|| panic!("no {name} in {all:?}")).1
    }
}

/// Long mode, supervisor, at [`CODE`].
pub fn long_mode(s: &mut X86State) {
    s.cr0 = CR0_PE | CR0_ET | CR0_NE | CR0_WP | CR0_PG;
    s.cr3 = PML4;
    s.cr4 = CR4_PAE | CR4_OSFXSR | CR4_OSXMMEXCPT;
    s.efer = EFER_LME | EFER_LMA | EFER_SCE | EFER_NXE;
    (s.gdtr.base, s.gdtr.limit) = (GDT, 0x3f);
    (s.idtr.base, s.idtr.limit) = (IDT, 0xfff);
    s.tr = Segment { selector: 0x30, base: TSS, limit: 0x67, attributes: attr::P | 0xb };
    s.cs = Segment::flat(KERNEL_CODE, attr::CODE | attr::L);
    let data = Segment::flat(KERNEL_DATA, attr::DATA | attr::DB);
    (s.ss, s.ds, s.es) = (data, data, data);
    s.rip = CODE;
    s.gpr[RSP] = STACK;
    s.mp_state = mimus_arch::x86::MpState::Running;
}

pub fn x86(state: CpuState) -> X86State {
    match state {
        CpuState::X86(s) => *s,
        other => panic!("{other:?}"),
    }
}

pub fn assemble(at: u64, bits: u32, f: impl FnOnce(&mut CodeAssembler) -> Result<(), iced_x86::IcedError>) -> Vec<u8> {
    let mut a = CodeAssembler::new(bits).expect("an assembler");
    f(&mut a).expect("code");
    a.assemble(at).expect("code")
}

/// What this host does differently, found out once.
pub fn quirks() -> Quirks {
    static QUIRKS: OnceLock<Quirks> = OnceLock::new();
    *QUIRKS.get_or_init(|| Quirks::of_host().expect("probes"))
}

/// True if the quirk is not there; else says that the test is skipped.
pub fn without(test: &str, quirk: bool, what: &str) -> bool {
    if quirk {
        skipped(test, format_args!("this host's KVM {what}"));
    }
    !quirk
}
