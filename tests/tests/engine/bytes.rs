//! A guest made up for this test, of the kind that RISC-V is not: instructions of 1 to 15 bytes at any address,
//! code modes, flags, stores to the code being executed, devices that take any access.
//!
//! Registers are slots 0 to 7. `A` and `B` are bytes that name one.
//!
//! | bytes | does |
//! |---|---|
//! | `01 A imm64` | `A = imm` |
//! | `02 A B`, `0b A B` | stores 1 or 8 bytes of `B` at `A` |
//! | `03 A B`, `0c A B` | loads 8 or 4 bytes at `A` to `B` |
//! | `04 A B` | adds 8 bytes of `B` to memory at `A`, locked |
//! | `05 A` | `A += 1 + mode` |
//! | `06 A rel8` | decrements `A`, jumps if it is not zero |
//! | `07 A` | jumps to `A` |
//! | `08 m` | the mode is `m` |
//! | `09` | halts |
//! | `0a` and 14 bytes | `7 += 1` |
//! | `0d A`, `0e A` | `A -= 1`, `A += 0 + carry` |
//! | `0f A B` | helper: stores 8 bytes of `B` at `A` |

use std::sync::Arc;

use mimus_arch::riscv::RiscvState;
use mimus_arch::{CpuModel, CpuState, GuestArch, StateGroups};
use mimus_core::accel::{
    CpuIo, CpuPin, RemoteFence, ResetKind, StartRequest, SystemRegister, Vcpu, VcpuExit, VcpuIndex,
};
use mimus_core::clock::VirtualClock;
use mimus_core::memory::{AddressSpace, GuestRam, MemoryMap, MemoryRegion, RamBacking, RamBlock};
use mimus_tcg_backend_x86_64::X86_64;
use mimus_tcg_exec::engine::{EngineConfig, Machine};
use mimus_tcg_exec::env::Cpu;
use mimus_tcg_exec::frontend::{Access, CodeWindow, GuestFrontend, Helper, Leaf, MemFault, TranslateMode};
use mimus_tcg_exec::vcpu::TcgVcpu;
use mimus_tcg_ir::flags::Flags;
use mimus_tcg_ir::*;
use mimus_tests::cpus::alone;

const RAM: u64 = 0x10_0000;
const RAM_LEN: u64 = 1 << 20;
/// Where a fault leads: a halt.
const FAULT: u64 = RAM + RAM_LEN - 0x1000;
const CODE: u64 = RAM + 0x1000;
const DATA: u64 = RAM + 0x8000;

#[derive(Default)]
struct State {
    mode: u16,
    faults: u64,
}

struct Bytes;

fn set_mode(cpu: &mut Cpu<Bytes>, mode: u64, _: u64, _: u64) -> u64 {
    cpu.guest.mode = mode as u16;
    cpu.switch_context();
    let (pc, len) = cpu.current_insn();
    cpu.jump(pc + u64::from(len));
    0
}

fn halt(cpu: &mut Cpu<Bytes>, _: u64, _: u64, _: u64) -> u64 {
    let pc = cpu.current_insn().0;
    cpu.jump(pc);
    cpu.halt();
    0
}

fn store(cpu: &mut Cpu<Bytes>, va: u64, value: u64, _: u64) -> u64 {
    let (pc, len) = cpu.current_insn();
    if cpu.store_data(va, value, Size::B8).is_ok() && cpu.code_changed() {
        cpu.jump(pc + u64::from(len));
    }
    0
}

/// The length of the instruction that begins with a byte.
fn length(first: u8) -> u32 {
    match first {
        1 => 10,
        2 | 3 | 4 | 6 | 0xb | 0xc | 0xf => 3,
        5 | 7 | 8 | 0xd | 0xe => 2,
        0xa => 15,
        _ => 1,
    }
}

fn insn(code: &CodeWindow<'_>, at: u32, block: &mut Block) -> bool {
    let mut buffer = [0; 15];
    let bytes = code.bytes(at, &mut buffer);
    let byte = |i: usize| bytes.get(i).copied().unwrap_or(0);
    let reg = |i: usize| Slot(byte(i) & 7);
    let next = PagePc((at + length(byte(0))) as i32);
    let (a, b) = (reg(1), reg(2));
    let mut op = |op| block.ops.push(op);
    let base = Val::Slot(a);
    match byte(0) {
        1 => {
            let imm = (0..8).fold(0u64, |v, i| v | u64::from(byte(2 + i)) << (8 * i));
            op(Op::Un { op: UnOp::Mov, ty: Ty::I64, d: a, a: Val::Imm(imm as i64) });
        }
        2 => op(Op::Store { src: b.into(), base, off: 0, size: Size::B1 }),
        3 => op(Op::Load { d: b, base, off: 0, size: Size::B8, ext: Ext::Zero }),
        4 => op(Op::Rmw {
            op: RmwOp::F(FlagOp::Add),
            size: Size::B8,
            lock: true,
            old: None,
            src: b.into(),
            base,
            off: 0,
        }),
        5 => {
            let by = Val::Imm(1 + i64::from(code.mode()));
            op(Op::AluF { op: FlagOp::Add, size: Size::B8, d: Some(a), a: base, b: by });
        }
        6 => {
            op(Op::AluF { op: FlagOp::Dec, size: Size::B8, d: Some(a), a: base, b: Val::Imm(0) });
            let to = PagePc(next.0 + i32::from(byte(2) as i8));
            op(Op::BranchF { cond: CondF::Ne, to, dead: Flags::NONE });
        }
        7 => {
            op(Op::JumpReg { base: a, off: 0, link: None, hint: JumpHint::None });
            return true;
        }
        8 | 9 => {
            let args = [Val::Imm(i64::from(byte(1))), Val::Imm(0), Val::Imm(0)];
            op(Op::Call { helper: u16::from(byte(0) - 8), kind: CallKind::MayExit, ret: None, args });
            op(Op::Dispatch);
            return true;
        }
        0xa => op(Op::Alu { op: AluOp::Add, ty: Ty::I64, d: Slot(7), a: Slot(7).into(), b: Val::Imm(1) }),
        0xb => op(Op::Store { src: b.into(), base, off: 0, size: Size::B8 }),
        0xc => op(Op::Load { d: b, base, off: 0, size: Size::B4, ext: Ext::Zero }),
        0xd => op(Op::AluF { op: FlagOp::Sub, size: Size::B8, d: Some(a), a: base, b: Val::Imm(1) }),
        0xe => op(Op::AluF { op: FlagOp::Adc, size: Size::B8, d: Some(a), a: base, b: Val::Imm(0) }),
        0xf => op(Op::Call { helper: 2, kind: CallKind::MayExit, ret: None, args: [base, b.into(), Val::Imm(0)] }),
        _ => {}
    }
    false
}

impl GuestFrontend for Bytes {
    type State = State;
    const ARCH: GuestArch = GuestArch::X86_64;
    const CODE_ALIGN: u32 = 1;
    const FLAGS: bool = true;
    const COHERENT_CODE: bool = true;
    const LENIENT_BUS: bool = true;
    const PIN_ORDER: &'static [Slot] = &[Slot(0), Slot(1), Slot(2), Slot(3)];

    fn helpers() -> Vec<Helper<Self>> {
        vec![
            Helper::new("set_mode", set_mode, set_mode),
            Helper::new("halt", halt, halt),
            Helper::new("store", store, store),
        ]
    }
    fn new_state(_: &CpuModel, _: VcpuIndex) -> Result<State, String> {
        Ok(State::default())
    }
    fn reset(cpu: &mut Cpu<Self>, _: ResetKind, _: Option<StartRequest>) {
        cpu.head.slots.fill(0);
        cpu.head.pc = CODE;
    }
    fn translate(_: &State, code: CodeWindow<'_>, start: u16, mode: TranslateMode, block: &mut Block) {
        block.clear(start);
        let mut at = u32::from(start);
        loop {
            let len = length(code.byte(at).unwrap_or(0));
            let first = at == u32::from(start);
            if !first && (mode == TranslateMode::Careful || at + len > 4096) {
                break;
            }
            block.ops.push(Op::Insn { pc: PagePc(at as i32), len: len as u8 });
            block.insns += 1;
            let ended = insn(&code, at, block);
            at += len;
            block.len = (at - u32::from(start)) as u16;
            if ended {
                return;
            }
            if at >= 4096 {
                break;
            }
        }
        block.ops.push(Op::Jump { to: PagePc(at as i32) });
    }
    fn crosses_page(code: CodeWindow<'_>, start: u16) -> bool {
        u32::from(start) + length(code.byte(start.into()).unwrap_or(0)) > 4096
    }
    fn code_mode(cpu: &Cpu<Self>) -> u16 {
        cpu.guest.mode
    }
    fn context_key(cpu: &Cpu<Self>) -> u64 {
        cpu.guest.mode.into()
    }
    fn address_space(_: &Cpu<Self>) -> (u64, u8) {
        (0, 0)
    }
    fn can_catch(_: SystemRegister) -> Result<(), String> {
        Err("it has none".to_owned())
    }

    fn walk(_: &mut Cpu<Self>, va: u64, _: Access) -> Result<Leaf, MemFault> {
        if va >= 1 << 32 {
            return Err(MemFault::Page);
        }
        Ok(Leaf { pa: va, read: true, write: true, local: false, mapping_size: 4096, cacheable: true })
    }
    fn debug_walk(_: &mut Cpu<Self>, va: u64, _: Access) -> Option<(u64, u64)> {
        Some((va, 4096))
    }
    fn deliver_fault(cpu: &mut Cpu<Self>, _: u64, _: Access, _: MemFault) {
        cpu.guest.faults = cpu.head.pc;
        cpu.head.pc = FAULT;
    }
    fn take_interrupt(_: &mut Cpu<Self>) -> bool {
        false
    }
    fn wakes(_: &Cpu<Self>) -> bool {
        false
    }
    fn pin_bit(_: CpuPin) -> Option<u32> {
        None
    }
    fn fp(_: &mut Cpu<Self>, _: FpOp, _: FpFmt, _: Rm, _: u64, _: u64, _: u64) -> u64 {
        0
    }
    fn remote_fence(_: &mut Cpu<Self>, _: RemoteFence) {}
    fn enter_run(_: &mut Cpu<Self>) {}
    fn leave_run(_: &mut Cpu<Self>) {}
    fn get_state(cpu: &mut Cpu<Self>) -> CpuState {
        let mut state = RiscvState::new(0, 0, cpu.head.pc);
        state.x[..8].copy_from_slice(&cpu.head.slots[..8]);
        state.mepc = cpu.guest.faults;
        state.mtval = Flags::unpack(cpu.slot(flags::FLAGS)).0.into();
        CpuState::Riscv(Box::new(state))
    }
    fn set_state(_: &mut Cpu<Self>, _: &CpuState) -> Result<(), String> {
        Err("not needed".into())
    }
    fn disassemble(code: CodeWindow<'_>, offset: u32, _: u64) -> (String, u32) {
        let first = code.byte(offset).unwrap_or(0);
        (format!("{first:02x}"), length(first))
    }
}

struct Io(Arc<VirtualClock>, Arc<AddressSpace>);

impl CpuIo for Io {
    fn clock(&self) -> &VirtualClock {
        &self.0
    }
    fn memory(&self) -> &AddressSpace {
        &self.1
    }
}

struct Guest {
    ram: Arc<RamBlock>,
    vcpu: TcgVcpu<Bytes>,
    io: Io,
    _all: Arc<GuestRam>,
}

impl Guest {
    fn new(interpret: bool, code: &[(u64, &[u8])]) -> Guest {
        let all = GuestRam::new();
        let ram = all.add_block("ram", RAM_LEN, RamBacking::Private).expect("RAM");
        let map = MemoryMap::new();
        let root = MemoryRegion::container("system", u64::MAX);
        let memory = map.address_space("system", &root);
        map.change(|t| {
            t.map(&root, RAM, &MemoryRegion::ram("ram", &ram));
        });
        let config = EngineConfig { code_size: 16 << 20, interpret, ..EngineConfig::default() };
        let machine = Machine::<Bytes>::new::<X86_64>(memory.clone(), config).expect("a machine");
        let model = CpuModel::parse(GuestArch::Riscv64, "max").expect("a model");
        let vcpu = TcgVcpu::new(&machine, VcpuIndex(0), &model).expect("a vCPU");
        let guest = Guest { ram, vcpu, io: Io(VirtualClock::new(), memory), _all: all };
        guest.put(FAULT, &[9]);
        for (at, bytes) in code {
            guest.put(*at, bytes);
        }
        guest
    }

    fn put(&self, at: u64, bytes: &[u8]) {
        assert!(self.ram.write(at - RAM, bytes), "{at:#x} is not in RAM");
    }

    fn u64_at(&self, at: u64) -> u64 {
        self.ram.load(at - RAM).expect("RAM")
    }

    /// Runs to the halt; the registers, where a fault was, the flags.
    fn run(&mut self) -> ([u64; 8], u64, Flags) {
        match self.vcpu.run(&self.io) {
            VcpuExit::Halted => {}
            other => panic!("{other:?}"),
        }
        let CpuState::Riscv(state) = self.vcpu.get_state(StateGroups::All) else { panic!("not the toy's state") };
        let regs = std::array::from_fn(|i| state.x[i]);
        (regs, state.mepc, Flags(state.mtval as u16))
    }
}

/// Runs a program on both engines, which must agree; the registers.
fn run(code: &[(u64, &[u8])]) -> [u64; 8] {
    let _one = alone();
    let results = [true, false].map(|interpret| Guest::new(interpret, code).run());
    assert_eq!(results[0], results[1], "interpreter and generated code");
    results[1].0
}

fn mov(reg: u8, imm: u64) -> Vec<u8> {
    [&[1, reg][..], &imm.to_le_bytes()].concat()
}

#[test]
fn code_at_odd_addresses() {
    let loops = [mov(0, 5), vec![5, 1, 6, 0, 0xfb, 7, 2]].concat();
    let code = [mov(2, CODE + 0x101), mov(3, CODE + 0x301), vec![7, 3]].concat();
    let end = [5, 4, 9];
    let regs = run(&[(CODE, &code), (CODE + 0x301, &loops), (CODE + 0x101, &end)]);
    assert_eq!((regs[0], regs[1], regs[4]), (0, 5, 1));
}

#[test]
fn code_means_what_its_mode_says() {
    // The same bytes in two modes, three times.
    let code = [mov(2, CODE + 0x100), vec![7, 2]].concat();
    let shared = [5u8, 0, 6, 1, 2, 9, 0, 7, 3];
    let first = [mov(1, 3), mov(3, CODE + 0x201), mov(4, CODE + 0x400), vec![7, 4]].concat();
    let to_one = [8u8, 1, 1, 3, 0x41, 0x12, 0x10, 0, 0, 0, 0, 0, 7, 4];
    let to_two = [8u8, 2, 1, 3, 0x01, 0x12, 0x10, 0, 0, 0, 0, 0, 7, 4];
    let regs = run(&[
        (CODE, &code),
        (CODE + 0x100, &first),
        (CODE + 0x400, &shared),
        (CODE + 0x201, &to_one),
        (CODE + 0x241, &to_two),
    ]);
    // In mode 0, then 1, then 2, which ends.
    assert_eq!(regs[0], 1 + 2 + 3);
}

#[test]
fn instructions_of_fifteen_bytes_across_pages() {
    let long = [0xau8; 15];
    for before in 1..15 {
        let at = CODE + 0x1000 - before;
        let code = [mov(2, at), mov(0, 20), vec![7, 2]].concat();
        let jump_back = CODE + 0x1000 - before + 15;
        let back = [6u8, 0, 1, 9, 7, 2];
        let regs = run(&[(CODE, &code), (at, &long), (jump_back, &back)]);
        assert_eq!(regs[7], 20, "{before} bytes in the first page");
    }
}

#[test]
fn the_page_behind_a_crossing_instruction_changes() {
    let _one = alone();
    let at = CODE + 0xffe;
    // mov r1, imm: two bytes of it in the first page.
    let insn = mov(1, 0x1111);
    // Afterwards the program overwrites the constant and does it again.
    let rest = [vec![6, 0, 1, 9], mov(3, CODE + 0x1000), mov(4, 0x2222), vec![0xb, 3, 4, 7, 2]].concat();
    let code = [mov(2, at), mov(0, 2), vec![7, 2]].concat();
    for interpret in [true, false] {
        let mut guest = Guest::new(interpret, &[(CODE, &code), (at, &insn), (at + 10, &rest)]);
        assert_eq!(guest.run().0[1], 0x2222, "interpreter: {interpret}");
    }
}

#[test]
fn a_store_changes_the_next_instruction() {
    // 05 00 becomes 05 05 before it is executed, in the same block.
    for store in [[2u8, 1, 2], [0xb, 1, 2], [4, 1, 2], [0xf, 1, 2]] {
        let at = CODE + 23;
        // What is there: 05 00 09 00 …; the locked add adds.
        let value = if store[0] == 4 { 0x0500 } else { 0x0009_0505 };
        let (at, value) = if store[0] == 2 { (at + 1, 5) } else { (at, value) };
        let code = [mov(1, at), mov(2, value), store.to_vec(), vec![5, 0, 9]].concat();
        let regs = run(&[(CODE, &code)]);
        assert_eq!((regs[0], regs[5]), (0, 1), "store {:02x}", store[0]);
    }
}

#[test]
fn a_loop_that_rewrites_itself() {
    // The immediate of `mov r3, imm` is incremented in each round, by a locked add.
    let code = [mov(0, 100), mov(1, CODE + 32), mov(2, 1)].concat();
    let body = [mov(3, 0), vec![4, 1, 2, 6, 0, 0xf0u8, 9]].concat();
    let regs = run(&[(CODE, &code), (CODE + 30, &body)]);
    assert_eq!(regs[3], 99);
}

#[test]
fn flags_live_across_blocks_and_pages() {
    // Borrow in one page, added in the next.
    let at = CODE + 0xffe;
    let code = [mov(2, at), vec![7, 2]].concat();
    let regs = run(&[(CODE, &code), (at, &[0xd, 0]), (at + 2, &[0xe, 1, 0xe, 3, 9])]);
    assert_eq!((regs[0], regs[1], regs[3]), (u64::MAX, 1, 0));
}

#[test]
fn a_fault_has_the_flags_of_the_instruction_before() {
    let _one = alone();
    let code = [mov(1, 1 << 40), vec![0xd, 0, 3, 1, 2, 9]].concat();
    for interpret in [true, false] {
        let mut guest = Guest::new(interpret, &[(CODE, &code)]);
        let (regs, fault, flags) = guest.run();
        assert_eq!((regs[0], fault), (u64::MAX, CODE + 12));
        assert_eq!(flags.to_string(), "cpas");
    }
}

#[test]
fn locked_adds_across_pages_and_unaligned() {
    let _one = alone();
    for at in [DATA + 1, DATA + 0xffd] {
        let code = [mov(1, at), mov(2, 0x0102_0304_0506_0708), vec![4, 1, 2, 4, 1, 2, 9]].concat();
        for interpret in [true, false] {
            let mut guest = Guest::new(interpret, &[(CODE, &code), (at, &[0xff; 8])]);
            guest.run();
            let mut bytes = [0; 8];
            assert!(guest.ram.read(at - RAM, &mut bytes));
            assert_eq!(u64::from_le_bytes(bytes), 0x0204_0608_0a0c_0e0f, "at {at:#x}, interpreter: {interpret}");
            assert_eq!(guest.u64_at(DATA + 0x20), 0);
        }
    }
}

#[test]
fn nothing_answers_with_ones() {
    // Reads of nothing, aligned, unaligned and across pages; a store to nothing is ignored.
    let nothing = 0x8000_0000u64;
    let code = [
        mov(1, nothing),
        vec![3, 1, 2, 0xb, 1, 2],
        mov(1, nothing + 3),
        vec![3, 1, 3, 0xc, 1, 4, 0xb, 1, 2, 4, 1, 2],
        mov(1, nothing + 0xffd),
        vec![3, 1, 5, 0xb, 1, 2, 9],
    ]
    .concat();
    let regs = run(&[(CODE, &code)]);
    assert_eq!(regs[2..6], [!0, !0, 0xffff_ffff, !0]);
}
