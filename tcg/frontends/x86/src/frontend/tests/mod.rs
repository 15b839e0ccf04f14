//! Guest programs of a few instructions, run by the interpreter and by the host backend, and random instructions
//! against the host's own processor.

mod border;
mod catches;
mod debug;
mod debug_exceptions;
mod far;
mod features;
mod limits;
mod makers;
mod native;
mod programs;
mod resume;
mod rules;
mod smm;
mod strings;
mod units;

use std::sync::{Arc, Mutex, PoisonError, Weak};

use super::*;
use mimus_arch::StateGroups;
use mimus_arch::x86::state::{Segment, attr};
use mimus_core::accel::{CpuIo, Vcpu, VcpuExit, VcpuHandle};
use mimus_core::bus::AccessSize;
use mimus_core::clock::VirtualClock;
use mimus_core::memory::{AddressSpace, CodeWriteListener, GuestRam, MemoryMap, MemoryRegion, RamBacking, RamBlock};
use mimus_tcg_backend_x86_64::X86_64;
use mimus_tcg_exec::engine::{EngineConfig, Machine};
use mimus_tcg_exec::vcpu::TcgVcpu;

/// RAM begins at 0.
pub const RAM_LEN: u64 = 4 << 20;
/// Where programs start.
pub const CODE: u64 = 0x1_0000;
pub const DATA: u64 = 0x10_0000;
pub const STACK: u64 = 0x8_0000;
pub const TABLES: u64 = 0x20_0000;
pub const GDT: u64 = 0x4000;
pub const IDT: u64 = 0x5000;
pub const TSS: u64 = 0x6000;

/// A port whose reading requests interrupt 0x30.
pub const INTERRUPTS: u16 = 0x71;
/// A port whose accesses request an SMI; what is written goes to the output.
pub const SMIS: u16 = 0xb2;

pub struct TestIo {
    clock: Arc<VirtualClock>,
    memory: Arc<AddressSpace>,
    /// Bytes written to port 0xe9, and what port 0x60 gives.
    pub output: Mutex<Vec<u8>>,
    pub vector: Mutex<Option<u8>>,
    /// Whose INTR pin falls with the acknowledgement.
    pub handle: Mutex<Option<Arc<dyn VcpuHandle>>>,
    /// INITs taken: the machine would turn the vCPU off and have it leave.
    pub inits: Mutex<u32>,
    /// How often [`SMIS`] was read.
    pub reads: Mutex<u32>,
}

impl TestIo {
    fn request_smi(&self) {
        if let Some(handle) = self.handle.lock().unwrap().as_ref() {
            handle.set_pin(CpuPin::Smi, true);
            handle.set_pin(CpuPin::Smi, false);
        }
    }
}

impl CpuIo for TestIo {
    fn clock(&self) -> &VirtualClock {
        &self.clock
    }
    fn memory(&self) -> &AddressSpace {
        &self.memory
    }
    fn pio_read(&self, _: VcpuIndex, port: u16, size: AccessSize) -> u64 {
        if let Some(handle) = self.handle.lock().unwrap().as_ref()
            && port == INTERRUPTS
        {
            *self.vector.lock().unwrap() = Some(0x30);
            handle.set_pin(CpuPin::Intr, true);
        }
        if port == SMIS {
            *self.reads.lock().unwrap() += 1;
            self.request_smi();
        }
        (u64::from(port) * 0x0101_0101) & size.mask()
    }
    fn pio_write(&self, _: VcpuIndex, port: u16, _: AccessSize, value: u64) {
        if port == 0xe9 || port == SMIS {
            self.output.lock().unwrap().push(value as u8);
        }
        if port == SMIS {
            self.request_smi();
        }
    }
    fn take_init(&self, _: VcpuIndex) {
        *self.inits.lock().unwrap() += 1;
        if let Some(handle) = &*self.handle.lock().unwrap() {
            handle.kick();
        }
    }
    fn acknowledge_interrupt(&self, _: VcpuIndex) -> Option<u8> {
        if let Some(handle) = &*self.handle.lock().unwrap() {
            handle.set_pin(CpuPin::Intr, false);
        }
        self.vector.lock().unwrap().take()
    }
}

/// Passes writes to code on without keeping the machine alive.
struct Listener(Weak<Machine<X86>>);

impl CodeWriteListener for Listener {
    fn code_written(&self, block: &RamBlock, offset: u64, len: u64) {
        if let Some(machine) = self.0.upgrade() {
            machine.code_written(block, offset, len);
        }
    }
}

pub struct Guest {
    pub interprets: bool,
    pub vcpu: TcgVcpu<X86>,
    pub io: TestIo,
    machine: Arc<Machine<X86>>,
    all_ram: Arc<GuestRam>,
    ram: Arc<RamBlock>,
    /// More RAM at an address that the host has mapped too.
    pub shared: Option<Arc<RamBlock>>,
}

/// Addresses of the second RAM block.
pub const SHARED: u64 = 0x1000_0000;
pub const SHARED_LEN: u64 = 0x1_0000;

impl Guest {
    /// With a CPU model by its name.
    pub fn of(model: &str, interpret: bool) -> Guest {
        let config = EngineConfig { interpret, ..EngineConfig::default() };
        Guest::configured(model, config)
    }

    /// Optimised so.
    pub fn optimised(interpret: bool, optimise: mimus_tcg_ir::backend::Optimise) -> Guest {
        Guest::configured("max", EngineConfig { interpret, optimise, ..EngineConfig::default() })
    }

    fn configured(model: &str, config: EngineConfig) -> Guest {
        let interpret = config.interpret;
        let all_ram = GuestRam::new();
        let ram = all_ram.add_block("ram", RAM_LEN, RamBacking::Private).unwrap();
        let shared = all_ram.add_block("shared", SHARED_LEN, RamBacking::Private).unwrap();
        let map = MemoryMap::new();
        let root = MemoryRegion::container("system", u64::MAX);
        let memory = map.address_space("system", &root);
        map.change(|t| {
            t.map(&root, 0, &MemoryRegion::ram("ram", &ram));
            t.map(&root, SHARED, &MemoryRegion::ram("shared", &shared));
        });
        let config = EngineConfig { code_size: 4 << 20, ..config };
        let machine = Machine::<X86>::new::<X86_64>(memory.clone(), config).unwrap();
        assert!(all_ram.set_code_write_listener(Arc::new(Listener(Arc::downgrade(&machine)))));
        let model = CpuModel::parse(GuestArch::X86_64, model).unwrap();
        let vcpu = TcgVcpu::new(&machine, VcpuIndex(0), &model).unwrap();
        let io = TestIo {
            clock: VirtualClock::new(),
            memory,
            output: Mutex::default(),
            vector: Mutex::default(),
            handle: Mutex::default(),
            inits: Mutex::default(),
            reads: Mutex::default(),
        };
        Guest { interprets: interpret, vcpu, io, machine, all_ram, ram, shared: Some(shared) }
    }

    pub fn put(&self, at: u64, bytes: &[u8]) {
        if at >= SHARED {
            assert!(self.shared.as_ref().unwrap().write(at - SHARED, bytes));
        } else {
            assert!(self.ram.write(at, bytes));
        }
    }

    pub fn put_u64(&self, at: u64, value: u64) {
        self.put(at, &value.to_le_bytes());
    }

    pub fn get(&self, at: u64, to: &mut [u8]) {
        if at >= SHARED {
            assert!(self.shared.as_ref().unwrap().read(at - SHARED, to));
        } else {
            assert!(self.ram.read(at, to));
        }
    }

    pub fn u64_at(&self, at: u64) -> u64 {
        let mut bytes = [0; 8];
        self.get(at, &mut bytes);
        u64::from_le_bytes(bytes)
    }

    pub fn state(&mut self) -> X86State {
        match self.vcpu.get_state(StateGroups::All) {
            CpuState::X86(state) => *state,
            other => panic!("{other:?}"),
        }
    }

    pub fn set(&mut self, state: X86State) {
        self.vcpu.set_state(&CpuState::X86(Box::new(state))).unwrap();
    }

    pub fn change(&mut self, f: impl FnOnce(&mut X86State)) {
        let mut state = self.state();
        f(&mut state);
        self.set(state);
    }

    /// Runs until HLT, and answers the state.
    pub fn run(&mut self) -> X86State {
        match self.vcpu.run(&self.io) {
            VcpuExit::Halted => self.state(),
            other => panic!("{other:?} at {:x?}", self.state()),
        }
    }

    /// Real mode at [`CODE`] with all segments 0 but CS.
    pub fn real(&mut self) {
        self.change(|s| {
            s.cs = Segment::real((CODE >> 4) as u16, attr::CODE);
            s.rip = 0;
            s.gpr[RSP] = 0x8000;
        });
    }

    /// The GDT of the tests: 8 code 32, 0x10 data, 0x18 code 64, 0x20 code 16, 0x28|3 user code 64, 0x30|3 user data,
    /// 0x38|3 user code 32, 0x40 TSS (64-bit).
    fn tables(&mut self) {
        let entries = [
            0,
            0x00cf_9b00_0000_ffff,
            0x00cf_9300_0000_ffff,
            0x00af_9b00_0000_ffff,
            0x008f_9b00_0000_ffff,
            0x00af_fb00_0000_ffff,
            0x00cf_f300_0000_ffff,
            0x00cf_fb00_0000_ffff,
            0x0000_8b00_6000_0067,
            0,
        ];
        for (i, e) in entries.into_iter().enumerate() {
            self.put_u64(GDT + 8 * i as u64, e);
        }
        // Handlers at 0xa000 + 16 × vector that halt.
        for v in 0..256u64 {
            self.put(0xa000 + 16 * v, &[0xf4]);
        }
    }

    /// Flat 32-bit protected mode at [`CODE`].
    pub fn protected(&mut self) {
        self.tables();
        for v in 0..256u64 {
            let offset = 0xa000 + 16 * v;
            self.put_u64(IDT + 8 * v, offset & 0xffff | 8 << 16 | 0xee00 << 32 | (offset >> 16) << 48);
        }
        self.put_u64(TSS + 4, 0x10_0000_7000);
        self.change(|s| {
            s.cr0 |= CR0_PE;
            s.cs = Segment::flat(8, attr::CODE | attr::DB);
            for seg in [&mut s.ds, &mut s.es, &mut s.ss, &mut s.fs, &mut s.gs] {
                *seg = Segment::flat(0x10, attr::DATA | attr::DB);
            }
            (s.gdtr.base, s.gdtr.limit) = (GDT, 0x4f);
            (s.idtr.base, s.idtr.limit) = (IDT, 0x7ff);
            s.tr = Segment { selector: 0x40, base: TSS, limit: 0x67, attributes: attr::P | 0xb };
            s.rip = CODE;
            s.gpr[RSP] = STACK;
            s.cr4 |= CR4_OSFXSR | CR4_OSXMMEXCPT;
            s.cr0 &= !(CR0_EM | CR0_TS);
            s.cr0 |= CR0_NE | CR0_MP;
        });
    }

    /// 64-bit mode at [`CODE`]: the first GiB maps to itself.
    pub fn long(&mut self) {
        self.protected();
        self.put_u64(TABLES, (TABLES + 0x1000) | 7);
        self.put_u64(TABLES + 0x1000, 0x87);
        for v in 0..64u64 {
            let offset = 0xa000 + 16 * v;
            self.put_u64(IDT + 16 * v, offset & 0xffff | 0x18 << 16 | 0xee00 << 32 | (offset >> 16) << 48);
            self.put_u64(IDT + 16 * v + 8, 0);
        }
        self.put_u64(TSS + 4, 0x7000);
        self.change(|s| {
            s.cr0 |= CR0_PG | CR0_WP;
            s.cr3 = TABLES;
            s.cr4 |= CR4_PAE | CR4_OSXSAVE;
            s.xcr0 = 7;
            s.efer = EFER_LME | EFER_LMA | EFER_NXE | EFER_SCE;
            s.cs = Segment::flat(0x18, attr::CODE | attr::L);
            (s.idtr.base, s.idtr.limit) = (IDT, 0x3ff);
        });
    }
}

static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());

/// Runs a test with the interpreter and with generated code.
pub fn both(test: impl Fn(Guest)) {
    both_of("max", test);
}

/// The same with a CPU model.
pub fn both_of(model: &str, test: impl Fn(Guest)) {
    // A code cache takes addresses below 2 GiB: one machine at a time.
    let _one = ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner);
    for interpret in [true, false] {
        test(Guest::of(model, interpret));
    }
}
