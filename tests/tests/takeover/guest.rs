//! A vCPU over some RAM, run by KVM with the translator behind it, or by the translator alone.

use std::collections::BTreeMap;
use std::fmt::Display;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use iced_x86::IcedError;
use iced_x86::code_asm::CodeAssembler;
use mimus_accel_kvm::{KvmAccelerator, Quirks};
use mimus_arch::x86::regs::*;
use mimus_arch::x86::state::attr;
use mimus_arch::x86::{MpState, Segment, X86State};
use mimus_arch::{CpuModel, CpuState, GuestArch, StateGroups};
use mimus_core::accel::*;
use mimus_core::clock::VirtualClock;
use mimus_core::memory::*;
use mimus_tcg::{TcgAccelerator, TcgFallback};

use crate::bus::{Bus, Seen};

/// RAM from 0.
pub const RAM: u64 = 0x40_0000;
/// Mapped by the page tables, no memory there.
pub const HOLE: u64 = 0x80_0000;
pub const CODE: u64 = 0x10_0000;
/// Exception stubs and handlers.
pub const HANDLERS: u64 = 0x5000;
pub const STACK: u64 = 0x8000;
pub const GDT: u64 = 0x9000;
pub const IDT: u64 = 0xa000;
pub const TSS: u64 = 0xb000;
pub const PML4: u64 = 0x1_0000;
/// The table of the first 2 MiB, in 4 KiB pages.
pub const PT: u64 = 0x1_6000;
/// Free for data.
pub const DATA: u64 = 0x2_0000;
/// Page whose entry a test may change; not mapped, not writable.
pub const UNMAPPED: u64 = 0x3_0000;
pub const READ_ONLY: u64 = 0x3_2000;
/// Where programs note exceptions, and results.
pub const TRAPS: u64 = 0x4_0000;
pub const RESULTS: u64 = 0x20_0000;
pub const USER: u64 = 0x6_0000;
pub const USER_STACK: u64 = 0x7_0000;

pub const KERNEL_CODE: u16 = 8;
pub const KERNEL_DATA: u16 = 0x10;
pub const USER_CODE: u16 = 0x18 | 3;
pub const USER_DATA: u16 = 0x20 | 3;
pub const KERNEL_CODE32: u16 = 0x28;

const PRESENT: u64 = 1;
const WRITE: u64 = 2;
const USER_PAGE: u64 = 4;
const LARGE: u64 = 0x80;

/// Who runs the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Engine {
    Kvm,
    Tcg,
}

pub fn skipped(name: &str, reason: impl Display) {
    use std::io::Write;
    // In one piece: tests run side by side.
    let _ = std::io::stderr().write_all(format!("SKIPPED ({name}): {reason}\n").as_bytes());
}

/// Whether there is KVM; says under the test's name if not.
pub fn kvm(test: &str) -> bool {
    if let Err(e) = KvmAccelerator.probe(GuestArch::X86_64) {
        skipped(test, e);
        return false;
    }
    true
}

/// What this host's KVM does differently.
pub fn quirks() -> Quirks {
    static QUIRKS: OnceLock<Quirks> = OnceLock::new();
    *QUIRKS.get_or_init(|| Quirks::of_host().unwrap())
}

/// Code caches take much of the address space below 2 GiB: one test at a time.
pub fn alone() -> MutexGuard<'static, ()> {
    static ONE: Mutex<()> = Mutex::new(());
    ONE.lock().unwrap_or_else(PoisonError::into_inner)
}

pub struct Guest {
    pub engine: Engine,
    pub ram: Arc<RamBlock>,
    pub vm: Arc<dyn AccelVm>,
    pub vcpu: Box<dyn Vcpu>,
    pub bus: Arc<Bus>,
    _all: Arc<GuestRam>,
    _map: Arc<MemoryMap>,
}

pub fn x86(state: CpuState) -> X86State {
    match state {
        CpuState::X86(s) => *s,
        other => panic!("{other:?}"),
    }
}

pub type Assembled = Result<(), IcedError>;

pub fn assemble(at: u64, bits: u32, f: impl FnOnce(&mut CodeAssembler) -> Assembled) -> Vec<u8> {
    let mut a = CodeAssembler::new(bits).unwrap();
    f(&mut a).unwrap();
    a.assemble(at).unwrap()
}

impl Guest {
    pub fn new(engine: Engine) -> Self {
        let map = MemoryMap::new();
        let root = MemoryRegion::container("system", 1 << 40);
        let memory = map.address_space("system", &root);
        let all = GuestRam::new();
        let ram = all.add_block("ram", RAM, RamBacking::Private).unwrap();
        let clock = VirtualClock::new();
        let options = match engine {
            Engine::Kvm => BTreeMap::new(),
            Engine::Tcg => BTreeMap::from([("tb-size".to_owned(), "16M".to_owned())]),
        };
        let config = VmConfig {
            arch: GuestArch::X86_64,
            memory: memory.clone(),
            ram: all.clone(),
            smp: 1,
            clock: clock.clone(),
            options,
        };
        let vm = match engine {
            Engine::Kvm => KvmAccelerator.create_vm(&config),
            Engine::Tcg => TcgAccelerator.create_vm(&config),
        };
        let vm = vm.unwrap();
        memory.add_listener(vm.memory_listener().unwrap());
        map.change(|t| _ = t.map(&root, 0, &MemoryRegion::ram("ram", &ram)));
        assert!(vm.create_irqchip(IrqChipMode::User).unwrap().is_none());
        let model = CpuModel::parse(GuestArch::X86_64, "max").unwrap();
        let model = vm.filter_cpu_model(&model).unwrap();
        let mut vcpu = vm.create_vcpu(VcpuIndex(0), &model).unwrap();
        if engine == Engine::Kvm {
            vcpu.set_emulation_failure(TcgFallback.create(&config).unwrap());
        }
        let bus = Bus::new(clock, memory);
        assert!(bus.handle.set(vcpu.handle()).is_ok());
        let guest = Self { engine, ram, vm, vcpu, bus, _all: all, _map: map };
        guest.write_tables();
        guest
    }

    pub fn store(&self, at: u64, value: u64) {
        assert!(self.ram.store(at, value), "{at:#x}");
    }

    pub fn load(&self, at: u64) -> u64 {
        self.ram.load(at).unwrap()
    }

    pub fn write(&self, at: u64, bytes: &[u8]) {
        assert!(self.ram.write(at, bytes), "{at:#x}");
    }

    pub fn bytes(&self) -> Vec<u8> {
        let mut bytes = vec![0; RAM as usize];
        assert!(self.ram.read(0, &mut bytes));
        bytes
    }

    pub fn code(&self, at: u64, bits: u32, f: impl FnOnce(&mut CodeAssembler) -> Assembled) -> u64 {
        let code = assemble(at, bits, f);
        self.write(at, &code);
        at + code.len() as u64
    }

    /// 4 GiB mapped to themselves, the first 2 MiB in small pages; data and user code for everybody. A GDT, a TSS.
    fn write_tables(&self) {
        let all = PRESENT | WRITE | USER_PAGE;
        let (pdpt, pd) = (PML4 + 0x1000, PML4 + 0x2000);
        self.store(PML4, pdpt | all);
        for i in 0..4 {
            self.store(pdpt + i * 8, (pd + i * 0x1000) | all);
        }
        for i in 1..2048 {
            self.store(pd + i * 8, i << 21 | LARGE | PRESENT | WRITE);
        }
        self.store(pd, PT | all);
        for i in 0..512 {
            let at = i << 12;
            let user = (DATA..TRAPS).contains(&at) || (USER..USER_STACK).contains(&at);
            self.store(PT + i * 8, at | if user { all } else { PRESENT | WRITE });
        }
        self.store(PT + (UNMAPPED >> 12) * 8, 0);
        self.store(PT + (READ_ONLY >> 12) * 8, READ_ONLY | PRESENT | USER_PAGE);
        let (code, data, dpl3) = (0x00af_9b00_0000_ffffu64, 0x00cf_9300_0000_ffffu64, 3u64 << 45);
        let code32 = 0x00cf_9b00_0000_ffff;
        let tss = 0x0000_8900_0000_0067 | TSS << 16;
        for (i, d) in [0, code, data, code | dpl3, data | dpl3, code32, tss, 0].into_iter().enumerate() {
            self.store(GDT + i as u64 * 8, d);
        }
        // RSP0.
        self.store(TSS + 4, STACK);
    }

    /// An interrupt gate of long mode, for everybody.
    pub fn gate(&self, vector: u8, handler: u64) {
        let at = IDT + u64::from(vector) * 16;
        let flags = 0xee00u64 << 32 | u64::from(KERNEL_CODE) << 16;
        self.store(at, handler & 0xffff | flags | (handler >> 16 & 0xffff) << 48);
        self.store(at + 8, handler >> 32);
    }

    pub fn state(&mut self) -> X86State {
        x86(self.vcpu.get_state(StateGroups::All))
    }

    pub fn set(&mut self, state: X86State) {
        self.vcpu.set_state(&CpuState::X86(Box::new(state))).unwrap();
    }

    pub fn change(&mut self, f: impl FnOnce(&mut X86State)) {
        let mut state = self.state();
        f(&mut state);
        self.set(state);
    }

    pub fn run(&mut self) -> VcpuExit {
        let bus = self.bus.clone();
        loop {
            match self.vcpu.run(&*bus) {
                VcpuExit::Kicked if !bus.stopped.swap(false, Ordering::SeqCst) => {}
                exit => return exit,
            }
        }
    }

    /// Runs until the guest asks to end.
    pub fn run_to_stop(&mut self) {
        let exit = self.run();
        let engine = self.engine;
        let state = self.state();
        let (at, result) = (state.linear_pc(), state.gpr[14]);
        assert!(matches!(exit, VcpuExit::Kicked), "{engine:?}: {exit:?} at {at:#x}, R14 {result:#x}");
    }

    pub fn statistic(&self, name: &str) -> u64 {
        self.vm.statistics().into_iter().find(|(n, _)| n == name).map_or(0, |(_, v)| v)
    }
}

/// Long mode, supervisor, at [`CODE`].
pub fn long(s: &mut X86State) {
    s.cr0 = CR0_PE | CR0_MP | CR0_ET | CR0_NE | CR0_WP | CR0_PG;
    s.cr3 = PML4;
    s.cr4 = CR4_PAE | CR4_OSFXSR | CR4_OSXMMEXCPT | CR4_OSXSAVE;
    s.xcr0 = XCR0_X87 | XCR0_SSE | XCR0_AVX;
    s.efer = EFER_LME | EFER_LMA | EFER_SCE | EFER_NXE;
    (s.gdtr.base, s.gdtr.limit) = (GDT, 0x3f);
    (s.idtr.base, s.idtr.limit) = (IDT, 0xfff);
    s.tr = Segment { selector: 0x30, base: TSS, limit: 0x67, attributes: attr::P | 0xb };
    s.ldtr = Segment::UNUSABLE;
    s.cs = Segment::flat(KERNEL_CODE, attr::CODE | attr::L);
    let data = Segment::flat(KERNEL_DATA, attr::DATA | attr::DB);
    (s.ss, s.ds, s.es, s.fs, s.gs) = (data, data, data, data, data);
    s.gpr = [0; 16];
    s.rip = CODE;
    s.gpr[RSP] = STACK;
    s.rflags = RFLAGS_FIXED;
    s.mp_state = MpState::Running;
}

/// What a guest ended with.
pub struct End {
    pub state: X86State,
    pub memory: Vec<u8>,
    pub seen: Vec<Seen>,
}

impl Guest {
    pub fn end(&mut self) -> End {
        End { state: self.state(), memory: self.bytes(), seen: self.bus.take() }
    }
}

/// Sets a guest up by `prepare` and runs it on both engines; what differs at the end is a failure. Answers KVM's.
pub fn on_both(test: &str, prepare: impl Fn(&mut Guest)) -> Option<Guest> {
    let _alone = alone();
    if !kvm(test) {
        return None;
    }
    let run = |engine| {
        let mut guest = Guest::new(engine);
        prepare(&mut guest);
        guest.run_to_stop();
        let end = guest.end();
        (guest, end)
    };
    let (_, tcg) = run(Engine::Tcg);
    let (guest, kvm) = run(Engine::Kvm);
    compare(test, &kvm, &tcg);
    Some(guest)
}

/// Last instruction's addresses, which AMD's FXSAVE leaves out unless it was at fault.
const POINTERS: std::ops::Range<usize> = 6..24;

/// Registers, memory and accesses to devices.
pub fn compare(test: &str, kvm: &End, tcg: &End) {
    let tidy = |s: &X86State| {
        let mut s = s.clone();
        s.msrs.clear();
        (s.tsc, s.tsc_khz, s.apic_base, s.cr8) = (0, 0, 0, 0);
        // It goes with the next instruction, for the translator when somebody looks.
        s.rflags &= !RFLAGS_RF;
        mimus_arch::x86::xsave::normalise(&mut s.xsave);
        s.xsave[POINTERS].fill(0);
        // A null stack segment of 64-bit handlers.
        if s.ss.attributes & attr::P == 0 {
            s.ss = Segment { selector: s.ss.selector, ..Segment::UNUSABLE };
        }
        // The accessed bit in an unusable segment's attributes, say.
        for segment in [&mut s.es, &mut s.ds, &mut s.fs, &mut s.gs, &mut s.ldtr] {
            if segment.attributes & attr::UNUSABLE != 0 {
                *segment = Segment { selector: segment.selector, ..Segment::UNUSABLE };
            }
        }
        s
    };
    // KVM's emulator may read what it then finds it cannot execute: a page is marked as accessed.
    let read = (PT + (READ_ONLY >> 12) * 8) as usize;
    let mut memory = tcg.memory.clone();
    memory[read] |= kvm.memory[read] & 0x20;
    let differ = || kvm.memory.iter().zip(&memory).enumerate().filter(|(_, (k, t))| k != t);
    let places: Vec<String> =
        differ().take(24).map(|(at, (k, t))| format!("{at:#x}: kvm {k:02x}, tcg {t:02x}")).collect();
    if !places.is_empty() {
        let record = |m: &[u8], i: usize| {
            let word = |k: usize| {
                let at = TRAPS as usize + i * 64 + k * 8;
                u64::from_le_bytes(std::array::from_fn(|j| m[at + j]))
            };
            format!("vector {} code {:#x} rip {:#x} flags {:#x} cr2 {:#x}", word(0), word(1), word(2), word(3), word(4))
        };
        for i in (0..64).filter(|i| record(&kvm.memory, *i) != record(&memory, *i)).take(4) {
            println!("exception {i}: kvm {}\n             tcg {}", record(&kvm.memory, i), record(&memory, i));
        }
    }
    assert!(places.is_empty(), "{test}: {} bytes differ: {}", differ().count(), places.join("; "));
    assert_eq!(kvm.seen, tcg.seen, "{test}: accesses to devices (left: kvm)");
    let (mut kvm, mut tcg) = (tidy(&kvm.state), tidy(&tcg.state));
    let (left, right) = (std::mem::take(&mut kvm.xsave), std::mem::take(&mut tcg.xsave));
    assert_eq!(kvm, tcg, "{test}: registers (left: kvm)");
    let differ = left.iter().zip(&right).position(|(k, t)| k != t).map(|at| (at, left[at], right[at]));
    assert_eq!((differ, left.len()), (None, right.len()), "{test}: the XSAVE area at, kvm, tcg");
}
