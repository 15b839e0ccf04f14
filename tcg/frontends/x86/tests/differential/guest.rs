//! The translator: a machine whose guest is one privileged page table away from the sequences, with handlers that halt.

use std::sync::{Arc, Weak};
use std::time::Duration;

use mimus_arch::x86::X86State;
use mimus_arch::x86::regs::*;
use mimus_arch::x86::state::{Segment, attr};
use mimus_arch::{CpuState, StateGroups};
use mimus_core::accel::{CpuIo, Vcpu, VcpuExit, VcpuHandle, VcpuIndex};
use mimus_core::bus::AccessSize;
use mimus_core::clock::VirtualClock;
use mimus_core::memory::{AddressSpace, CodeWriteListener, GuestRam, MemoryMap, MemoryRegion, RamBacking, RamBlock};
use mimus_tcg_backend_x86_64::X86_64;
use mimus_tcg_exec::engine::{EngineConfig, Machine};
use mimus_tcg_exec::vcpu::TcgVcpu;
use mimus_tcg_frontend_x86::frontend::X86;

use crate::layout::*;
use crate::regs::{AREA, Exit, Outcome, Regs};

/// The supervisor's view of memory, where RAM is from its beginning.
const KERNEL: u64 = 0xffff_ffff_8000_0000;
const RAM_LEN: u64 = 4 << 20;
/// Physical addresses.
const GDT: u64 = 0x1000;
const LDT: u64 = 0x4000;
const IDT: u64 = 0x2000;
const TSS: u64 = 0x3000;
const STACK: u64 = 0x5000;
/// Where the stack of handlers is seen, of 16-bit code and of others: IRET to a 16-bit stack leaves the upper half of ESP
/// as it is, so it is that of the sequences' stacks.
const STACKS: [u64; 2] = [0xffff_ffff_0000_0000, 0xffff_ffff_1000_0000];
const HANDLERS: u64 = 0x8000;
const TABLES: u64 = 0x10_0000;
const DATA_AT: u64 = 0x20_0000;
const CODE_AT: u64 = 0x30_0000;
/// Leads out of a sequence.
const LEAVE_VECTOR: u8 = 0x82;
/// A sequence that has not ended by then never does.
const PATIENCE: Duration = Duration::from_secs(4);

/// Where debug exceptions are handled that do not end a sequence, and what the handler knows: how many there were, the
/// manner ([`STEPPED`], [`WATCHED`]), and where they came from.
const DEBUG: u64 = 0x9000;
const DEBUG_COUNT: u64 = 0xa000;
const DEBUG_MANNER: u64 = 0xa008;
const DEBUG_TRAIL: u64 = 0xa010;
const STEPPED: u64 = 1;
const WATCHED: u64 = 2;

/// ```text
///       push rax
///       push rcx
///       mov rax, dr6
///       mov ecx, 0xffff0ff0
///       mov dr6, rcx
///       cmp byte [MANNER], STEPPED
///       je count
///       test ah, 0x40                    ; a single step is the sequence's own
///       jnz out
///       or dword [rsp + 32], 0x10000     ; RF: on from a breakpoint
/// count:
///       mov rcx, [COUNT]
///       inc qword [COUNT]
///       cmp rcx, 0x200
///       jae full
///       mov rax, [rsp + 16]
///       mov [TRAIL + rcx * 8], rax
/// full: pop rcx
///       pop rax
///       iretq
/// out:  pop rcx
///       pop rax
///       jmp HANDLERS + 0x15
/// ```
#[rustfmt::skip]
const DEBUG_HANDLER: [u8; 85] = [
    0x50, 0x51, 0x0f, 0x21, 0xf0, 0xb9, 0xf0, 0x0f, 0xff, 0xff, 0x0f, 0x23, 0xf1, 0x80, 0x3c, 0x25,
    0x08, 0xa0, 0x00, 0x80, 0x01, 0x74, 0x0d, 0xf6, 0xc4, 0x40, 0x75, 0x32, 0x81, 0x4c, 0x24, 0x20,
    0x00, 0x00, 0x01, 0x00, 0x48, 0x8b, 0x0c, 0x25, 0x00, 0xa0, 0x00, 0x80, 0x48, 0xff, 0x04, 0x25,
    0x00, 0xa0, 0x00, 0x80, 0x48, 0x81, 0xf9, 0x00, 0x02, 0x00, 0x00, 0x73, 0x0d, 0x48, 0x8b, 0x44,
    0x24, 0x10, 0x48, 0x89, 0x04, 0xcd, 0x10, 0xa0, 0x00, 0x80, 0x59, 0x58, 0x48, 0xcf, 0x59, 0x58,
    0xe9, 0xc0, 0xef, 0xff, 0xff,
];

/// How a sequence is run.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Manner {
    Plain,
    /// With CR0.TS, which no program of the host's can have.
    Switched,
    /// With RFLAGS.TF, and a handler that goes on.
    Stepped,
    /// With breakpoints: addresses, and DR7.
    Watched([u64; 4], u64),
}

struct Io {
    clock: Arc<VirtualClock>,
    memory: Arc<AddressSpace>,
}

impl CpuIo for Io {
    fn clock(&self) -> &VirtualClock {
        &self.clock
    }
    fn memory(&self) -> &AddressSpace {
        &self.memory
    }
    fn pio_read(&self, _: VcpuIndex, _: u16, size: AccessSize) -> u64 {
        size.mask()
    }
    fn pio_write(&self, _: VcpuIndex, _: u16, _: AccessSize, _: u64) {}
    fn acknowledge_interrupt(&self, _: VcpuIndex) -> Option<u8> {
        None
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

/// A local descriptor's type, as Linux makes it: marked as accessed, of privilege level 3.
fn kind(local: &Local) -> u32 {
    let contents = if local.code { 2 } else { u32::from(local.down) };
    contents << 2 | u32::from(local.full) << 1 | 1
}

fn descriptor(local: &Local) -> u64 {
    let access = kind(local) | 0x70 | u32::from(local.present) << 7;
    let (base, limit) = (local.base, u64::from(local.limit));
    limit & 0xffff
        | (base & 0xff_ffff) << 16
        | u64::from(access) << 40
        | (limit >> 16 & 15) << 48
        | u64::from(local.wide) << 54
        | (base >> 24 & 0xff) << 56
}

/// What loading a local selector gives.
fn segment(selector: u16) -> Segment {
    let local = &LOCAL[usize::from(selector >> 3)];
    let attributes = kind(local) | attr::S | attr::P | 3 << attr::DPL_SHIFT;
    Segment { selector, base: local.base, limit: local.limit, attributes }
}

/// The guest.
pub struct Guest {
    vcpu: TcgVcpu<X86>,
    io: Io,
    ram: Arc<RamBlock>,
    local: bool,
    template: X86State,
}

impl Guest {
    /// With generated code, or the interpreter; `local`: with the local descriptors.
    pub fn new(interpret: bool, local: bool) -> Guest {
        let all_ram = GuestRam::new();
        let ram = all_ram.add_block("ram", RAM_LEN, RamBacking::Private).unwrap();
        let map = MemoryMap::new();
        let root = MemoryRegion::container("system", u64::MAX);
        let memory = map.address_space("system", &root);
        map.change(|t| {
            t.map(&root, 0, &MemoryRegion::ram("ram", &ram));
        });
        let config = EngineConfig { code_size: 4 << 20, interpret, ..EngineConfig::default() };
        let machine = Machine::<X86>::new::<X86_64>(memory.clone(), config).unwrap();
        assert!(all_ram.set_code_write_listener(Arc::new(Listener(Arc::downgrade(&machine)))));
        let mut vcpu = TcgVcpu::new(&machine, VcpuIndex(0), &crate::select::model()).unwrap();
        let CpuState::X86(template) = vcpu.get_state(StateGroups::All) else { unreachable!() };
        let mut guest = Guest { vcpu, io: Io { clock: VirtualClock::new(), memory }, ram, local, template: *template };
        guest.tables();
        guest.template();
        guest
    }

    fn put(&self, at: u64, bytes: &[u8]) {
        assert!(self.ram.write(at, bytes));
    }

    fn put_u64(&self, at: u64, value: u64) {
        self.put(at, &value.to_le_bytes());
    }

    fn u64_at(&self, at: u64) -> u64 {
        let mut bytes = [0; 8];
        assert!(self.ram.read(at, &mut bytes));
        u64::from_le_bytes(bytes)
    }

    /// Page tables, descriptors and handlers.
    fn tables(&self) {
        let table = |n: u64| TABLES + 0x1000 * n;
        self.put_u64(table(0), table(1) | 7);
        self.put_u64(table(0) + 8 * 511, table(5) | 3);
        self.put_u64(table(1), table(2) | 7);
        self.put_u64(table(2) + 8 * (DATA >> 21), table(3) | 7);
        self.put_u64(table(2) + 8 * (CODE >> 21), table(4) | 7);
        self.put_u64(table(5) + 8 * 510, table(6) | 3);
        self.put_u64(table(5) + 8 * 508, table(7) | 3);
        for stack in STACKS {
            self.put_u64(table(7) + 8 * (stack >> 21 & 511), 0x83);
        }
        for i in 0..2 {
            self.put_u64(table(6) + 8 * i, i << 21 | 0x83);
        }
        let no_execute = 1 << 63;
        for i in 0..DATA_LEN as u64 / 0x1000 {
            let write = if DATA + 0x1000 * i >= READ_ONLY { 0 } else { 2 };
            self.put_u64(table(3) + 8 * i, no_execute | (DATA_AT + 0x1000 * i) | 5 | write);
        }
        for i in 0..CODE_LEN as u64 / 0x1000 {
            let write = if CODE + 0x1000 * i >= LEAVE & !0xfff { 0 } else { 2 };
            self.put_u64(table(4) + 8 * i, (CODE_AT + 0x1000 * i) | 5 | write);
        }
        // Where Linux has them: 0x08 to 0x18 the kernel's, 0x20 to 0x30 the user's, 0x40 TSS, 0x78 the processor's number.
        let entries = [
            (1, 0x00cf_9b00_0000_ffff),
            (2, 0x00af_9b00_0000_ffff),
            (3, 0x00cf_9300_0000_ffff),
            (4, 0x00cf_fb00_0000_ffff),
            (5, 0x00cf_f300_0000_ffff),
            (6, 0x00af_fb00_0000_ffff),
            (8, 0x8000_8b00_0000_0067 | (TSS & 0xffff) << 16),
            (9, 0xffff_ffff),
            (15, 0x0040_f500_0000_0000),
        ];
        for (i, e) in entries {
            self.put_u64(GDT + 8 * i, e);
        }
        for (i, local) in LOCAL.iter().enumerate() {
            self.put_u64(LDT + 8 * i as u64, descriptor(local));
        }
        for v in 0..256u64 {
            let offset = KERNEL + HANDLERS + 16 * v;
            let dpl = if matches!(v, 3 | 4) || v == u64::from(LEAVE_VECTOR) { 3 } else { 0 };
            let low = offset & 0xffff | 0x10 << 16 | (0x8e | dpl << 5) << 40 | (offset >> 16 & 0xffff) << 48;
            self.put_u64(IDT + 16 * v, low);
            self.put_u64(IDT + 16 * v + 8, offset >> 32);
            self.put(HANDLERS + 16 * v, &[0xf4]);
        }
        self.put(DEBUG, &DEBUG_HANDLER);
        self.put(TSS + 0x66, &[0x68, 0]);
    }

    fn template(&mut self) {
        let s = &mut self.template;
        s.cr0 = CR0_PE | CR0_MP | CR0_ET | CR0_NE | CR0_WP | CR0_AM | CR0_PG;
        s.cr3 = TABLES;
        s.cr4 = CR4_PAE | CR4_OSFXSR | CR4_OSXMMEXCPT | CR4_OSXSAVE | CR4_FSGSBASE | CR4_UMIP | CR4_SMEP | CR4_SMAP;
        s.xcr0 = GUEST_XCR0;
        s.efer = EFER_LME | EFER_LMA | EFER_NXE | EFER_SCE;
        (s.gdtr.base, s.gdtr.limit) = (KERNEL + GDT, 0x7f);
        (s.idtr.base, s.idtr.limit) = (KERNEL + IDT, 0xfff);
        s.tr = Segment { selector: 0x40, base: KERNEL + TSS, limit: 0x67, attributes: attr::P | 0xb };
        s.ldtr = Segment::UNUSABLE;
        if self.local {
            let limit = 8 * LOCAL.len() as u32 - 1;
            s.ldtr = Segment { selector: 0x48, base: KERNEL + LDT, limit, attributes: attr::P | 2 };
        }
        s.ss = Segment::flat(DATA32, attr::DATA | attr::DB | 3 << attr::DPL_SHIFT);
        (s.ds, s.es) = (s.ss, s.ss);
        (s.fs, s.gs) = (Segment::UNUSABLE, Segment::UNUSABLE);
        s.mp_state = mimus_arch::x86::MpState::Running;
        s.xsave.resize(AREA.max(s.xsave.len()), 0);
    }

    /// What handles debug exceptions.
    fn handle_debug(&self, manner: Manner) {
        let debug = match manner {
            Manner::Plain | Manner::Switched => 0,
            Manner::Stepped => STEPPED,
            Manner::Watched(..) => WATCHED,
        };
        self.put_u64(DEBUG_COUNT, 0);
        if self.u64_at(DEBUG_MANNER) == debug {
            return;
        }
        self.put_u64(DEBUG_MANNER, debug);
        let slot = HANDLERS + 16;
        if debug == 0 {
            self.put(slot, &[0xf4]);
        } else {
            let to = (DEBUG - slot - 5) as u32;
            self.put(slot, &[&[0xe9][..], &to.to_le_bytes(), &[0xf4]].concat());
        }
    }

    /// Runs a sequence that was laid out at `start`.
    pub fn run(&mut self, bits: u32, start: u64, code: &[u8], before: &Regs, memory: &[u8], manner: Manner) -> Outcome {
        self.handle_debug(manner);
        self.put_u64(TSS + 4, STACKS[usize::from(bits != 16)] + STACK);
        self.put(DATA_AT, memory);
        let mut text = code.to_vec();
        text.extend([0xcd, LEAVE_VECTOR]);
        self.put(CODE_AT + (start - CODE), &text);
        let mut s = self.template.clone();
        s.gpr = before.gpr;
        s.rip = start - code_base(bits);
        s.rflags = before.flags;
        match manner {
            Manner::Plain => {}
            Manner::Switched => s.cr0 |= CR0_TS,
            Manner::Stepped => s.rflags |= RFLAGS_TF,
            Manner::Watched(addresses, control) => (s.dr, s.dr7) = (addresses, control),
        }
        s.cs = match bits {
            64 => Segment::flat(CODE64, attr::CODE | attr::L | 3 << attr::DPL_SHIFT),
            32 => Segment::flat(CODE32, attr::CODE | attr::DB | 3 << attr::DPL_SHIFT),
            _ => segment(CODE16),
        };
        if bits == 16 {
            (s.ds, s.es, s.ss) = (segment(DATA16), segment(DATA16), segment(DATA16));
        }
        (s.fs.base, s.gs.base) = (before.fs_base, before.gs_base);
        s.xsave[..AREA].copy_from_slice(&before.area);
        self.vcpu.set_state(&CpuState::X86(Box::new(s))).unwrap();
        let halted = self.until_halt();
        let CpuState::X86(s) = self.vcpu.get_state(StateGroups::All) else { unreachable!() };
        let mut memory = vec![0; DATA_LEN];
        assert!(self.ram.read(DATA_AT, &mut memory));
        self.outcome(&s, code_base(bits), halted, memory)
    }

    /// Runs until a handler halts; false if nothing leads there.
    fn until_halt(&mut self) -> bool {
        let began = std::time::Instant::now();
        loop {
            match self.vcpu.run(&self.io) {
                VcpuExit::Halted => return true,
                // The watchdog.
                VcpuExit::Kicked if began.elapsed() < PATIENCE => {}
                _ => return false,
            }
        }
    }

    /// What makes `run` look at the clock.
    pub fn handle(&self) -> Arc<dyn VcpuHandle> {
        self.vcpu.handle()
    }

    fn outcome(&self, s: &X86State, base: u64, halted: bool, memory: Vec<u8>) -> Outcome {
        let mut regs = Regs {
            gpr: s.gpr,
            rip: s.rip,
            flags: s.rflags,
            area: [0; AREA],
            selectors: [s.ds.selector, s.es.selector, s.fs.selector, s.gs.selector],
            fs_base: s.fs.base,
            gs_base: s.gs.base,
        };
        regs.area.copy_from_slice(&s.xsave[..AREA]);
        let vector = s.rip.wrapping_sub(KERNEL + HANDLERS) / 16;
        let steps = self.u64_at(DEBUG_COUNT);
        let trail = (0..steps.min(TRAIL as u64)).map(|i| self.u64_at(DEBUG_TRAIL + 8 * i)).collect();
        if !halted || vector > 255 {
            return Outcome { regs, memory, exit: Exit::Never, steps, trail };
        }
        let mut frame = s.gpr[RSP] & 0xffff;
        let mut error = 0;
        if matches!(vector, 8 | 10..=14 | 17 | 21) {
            error = self.u64_at(frame) as u32;
            frame += 8;
        }
        let word = |i: u64| self.u64_at(frame + 8 * i);
        regs.rip = word(0).wrapping_add(base);
        regs.flags = word(2);
        regs.gpr[RSP] = word(3);
        let mut exit = Exit::Exception { vector: vector as u8, error, address: 0 };
        if vector == u64::from(LEAVE_VECTOR) {
            regs.rip -= 2;
            exit = Exit::End;
        } else if let (Exit::Exception { address, .. }, 14) = (&mut exit, vector) {
            *address = s.cr2;
        }
        Outcome { regs, memory, exit, steps, trail }
    }
}
