//! Guest programs of a few instructions, run by the interpreter and by the
//! host backend: traps, interrupts, translation and the helpers as the whole
//! engine executes them.

use std::sync::{Arc, Mutex, PoisonError, Weak};

use super::*;
use crate::state::irq;
use mimus_arch::StateGroups;
use mimus_arch::riscv::Privilege;
use mimus_arch::riscv::csr::number::*;
use mimus_core::accel::{CpuIo, HypercallResult, Vcpu, VcpuExit};
use mimus_core::clock::VirtualClock;
use mimus_core::memory::{AddressSpace, CodeWriteListener, GuestRam, MemoryMap, MemoryRegion, RamBacking, RamBlock};
use mimus_tcg_backend_x86_64::X86_64;
use mimus_tcg_exec::engine::{EngineConfig, Machine};
use mimus_tcg_exec::vcpu::TcgVcpu;
use mimus_tcg_ir::backend::Optimise;

mod border;

const RAM: u64 = 0x8000_0000;
const RAM_LEN: u64 = 1 << 20;
/// Where programs start, where their trap handlers are, and data.
const CODE: u64 = RAM + 0x1000;
const M_HANDLER: u64 = RAM + 0x2000;
const S_HANDLER: u64 = RAM + 0x3000;
const DATA: u64 = RAM + 0x4000;
/// Page tables.
const TABLES: u64 = RAM + 0x10000;

const A0: u32 = 10;
const A1: u32 = 11;
const A2: u32 = 12;
const A3: u32 = 13;

const ECALL: u32 = 0x73;
const EBREAK: u32 = 0x0010_0073;
const MRET: u32 = 0x3020_0073;
const SRET: u32 = 0x1020_0073;
const WFI: u32 = 0x1050_0073;
const SFENCE_ALL: u32 = 0x1200_0073;

const fn addi(rd: u32, rs1: u32, imm: i32) -> u32 {
    (imm as u32) << 20 | rs1 << 15 | rd << 7 | 0x13
}
const fn csrrw(rd: u32, csr: u16, rs1: u32) -> u32 {
    (csr as u32) << 20 | rs1 << 15 | 1 << 12 | rd << 7 | 0x73
}
const fn csrrs(rd: u32, csr: u16, rs1: u32) -> u32 {
    (csr as u32) << 20 | rs1 << 15 | 2 << 12 | rd << 7 | 0x73
}
const fn csrrsi(rd: u32, csr: u16, imm: u32) -> u32 {
    (csr as u32) << 20 | imm << 15 | 6 << 12 | rd << 7 | 0x73
}
const fn ld(rd: u32, rs1: u32, imm: i32) -> u32 {
    (imm as u32) << 20 | rs1 << 15 | 3 << 12 | rd << 7 | 0x03
}
const fn sd(rs2: u32, rs1: u32, imm: i32) -> u32 {
    let imm = imm as u32;
    (imm >> 5) << 25 | rs2 << 20 | rs1 << 15 | 3 << 12 | (imm & 31) << 7 | 0x23
}
const fn cbo(op: u32, rs1: u32) -> u32 {
    op << 20 | rs1 << 15 | 2 << 12 | 0x0f
}

/// What the machine was asked for.
#[derive(Default)]
struct Asked {
    timer: Vec<Option<u64>>,
    calls: Vec<[u64; 8]>,
}

struct TestIo {
    clock: Arc<VirtualClock>,
    memory: Arc<AddressSpace>,
    asked: Mutex<Asked>,
    call_result: HypercallResult,
}

impl CpuIo for TestIo {
    fn clock(&self) -> &VirtualClock {
        &self.clock
    }
    fn memory(&self) -> &AddressSpace {
        &self.memory
    }
    fn arm_pin_timer(&self, _: VcpuIndex, pin: CpuPin, deadline_ns: Option<u64>) {
        assert_eq!(pin, CpuPin::Sstc);
        self.asked.lock().unwrap().timer.push(deadline_ns);
    }
    fn hypercall(&self, _: VcpuIndex, regs: &mut [u64; 8]) -> HypercallResult {
        self.asked.lock().unwrap().calls.push(*regs);
        if self.call_result != HypercallResult::NotHandled {
            regs[0] = 0x1234;
        }
        self.call_result
    }
}

/// Passes writes to code on without keeping the machine alive.
struct Listener(Weak<Machine<Riscv>>);

impl CodeWriteListener for Listener {
    fn code_written(&self, block: &RamBlock, offset: u64, len: u64) {
        if let Some(machine) = self.0.upgrade() {
            machine.code_written(block, offset, len);
        }
    }
}

struct Guest {
    vcpu: TcgVcpu<Riscv>,
    io: TestIo,
    ram: Arc<RamBlock>,
}

impl Guest {
    fn new(interpret: bool) -> Guest {
        Guest::optimised(interpret, Optimise::from_environment())
    }

    fn optimised(interpret: bool, optimise: Optimise) -> Guest {
        let all_ram = GuestRam::new();
        let ram = all_ram.add_block("ram", RAM_LEN, RamBacking::Private).unwrap();
        let map = MemoryMap::new();
        let root = MemoryRegion::container("system", u64::MAX);
        let memory = map.address_space("system", &root);
        map.change(|t| {
            t.map(&root, RAM, &MemoryRegion::ram("ram", &ram));
        });
        let config = EngineConfig { code_size: 1 << 20, interpret, optimise, ..EngineConfig::default() };
        let machine = Machine::<Riscv>::new::<X86_64>(memory.clone(), config).unwrap();
        assert!(all_ram.set_code_write_listener(Arc::new(Listener(Arc::downgrade(&machine)))));
        let model = CpuModel::parse(GuestArch::Riscv64, "rv64,svpbmt=on").unwrap();
        let mut vcpu = TcgVcpu::new(&machine, VcpuIndex(0), &model).unwrap();
        let mut state = riscv_state(&mut vcpu);
        state.pc = CODE;
        state.mtvec = M_HANDLER;
        state.stvec = S_HANDLER;
        state.pmpcfg[15] = 0x1f;
        state.pmpaddr[15] = !0;
        vcpu.set_state(&CpuState::Riscv(Box::new(state))).unwrap();
        let io = TestIo {
            clock: VirtualClock::new(),
            memory,
            asked: Mutex::default(),
            call_result: HypercallResult::NotHandled,
        };
        let mut guest = Guest { vcpu, io, ram };
        // Handlers that stop: in M-mode with nothing enabled `wfi` never wakes.
        guest.put(M_HANDLER, &[csrrw(0, MIE, 0), WFI]);
        guest.put(S_HANDLER, &[csrrw(0, SIE, 0), WFI]);
        guest
    }

    fn put(&mut self, at: u64, code: &[u32]) {
        let bytes: Vec<u8> = code.iter().flat_map(|insn| insn.to_le_bytes()).collect();
        assert!(self.ram.write(at - RAM, &bytes));
    }

    fn put_u64(&self, at: u64, value: u64) {
        assert!(self.ram.store(at - RAM, value));
    }

    fn u64_at(&self, at: u64) -> u64 {
        self.ram.load(at - RAM).unwrap()
    }

    fn state(&mut self) -> RiscvState {
        riscv_state(&mut self.vcpu)
    }

    fn change(&mut self, f: impl FnOnce(&mut RiscvState)) {
        let mut state = self.state();
        f(&mut state);
        self.vcpu.set_state(&CpuState::Riscv(Box::new(state))).unwrap();
    }

    /// Runs until the guest waits for an interrupt, and answers its state.
    fn run(&mut self) -> RiscvState {
        match self.vcpu.run(&self.io) {
            VcpuExit::Halted => self.state(),
            other => panic!("{other:?} at {:#x}", self.state().pc),
        }
    }
}

fn riscv_state(vcpu: &mut TcgVcpu<Riscv>) -> RiscvState {
    match vcpu.get_state(StateGroups::All) {
        CpuState::Riscv(state) => *state,
        other => panic!("{other:?}"),
    }
}

/// A code cache takes half a GiB of the addresses below 2 GiB: one machine at a time.
static ONE: Mutex<()> = Mutex::new(());

/// Runs a test with the interpreter and with generated code.
fn both(test: impl Fn(Guest)) {
    let _one = ONE.lock().unwrap_or_else(PoisonError::into_inner);
    for interpret in [true, false] {
        test(Guest::new(interpret));
    }
}

#[test]
fn environment_calls_go_down_and_up() {
    both(|mut g| {
        // U-mode calls S-mode, which returns past the call; the second call ends in M-mode.
        g.put(CODE, &[ECALL, addi(A0, A0, 1), EBREAK]);
        g.put(S_HANDLER, &[csrrs(A1, SCAUSE, 0), csrrs(A2, SEPC, 0), addi(A2, A2, 4), csrrw(0, SEPC, A2), SRET]);
        g.change(|s| {
            s.privilege = Privilege::User;
            s.medeleg = 1 << 8;
        });
        let s = g.run();
        assert_eq!((s.x[A0 as usize], s.x[A1 as usize]), (1, 8));
        assert_eq!((s.mcause, s.mepc, s.mtval), (3, CODE + 8, CODE + 8));
        assert_eq!(s.mstatus >> 11 & 3, 0);
        assert_eq!(s.privilege, Privilege::Machine);
        assert!(s.waiting);
    });
}

#[test]
fn illegal_accesses_name_the_instruction() {
    both(|mut g| {
        for (privilege, insn) in [
            (Privilege::User, csrrs(A0, SSTATUS, 0)),
            (Privilege::User, csrrs(A0, TIME, 0)),
            (Privilege::Supervisor, csrrs(A0, MSTATUS, 0)),
            (Privilege::Supervisor, MRET),
            (Privilege::User, SRET),
            (Privilege::User, SFENCE_ALL),
            (Privilege::User, WFI),
            (Privilege::Supervisor, cbo(4, A0)),
            (Privilege::Machine, csrrw(0, MHARTID, A0)),
            (Privilege::Machine, 0),
            (Privilege::Machine, 0x0200_7053), // fadd.d with FS off
        ] {
            g.put(CODE, &[insn]);
            g.change(|s| {
                s.pc = CODE;
                s.privilege = privilege;
                s.waiting = false;
                s.mcause = 0;
            });
            let s = g.run();
            let raw = if insn & 3 == 3 { u64::from(insn) } else { 0 };
            assert_eq!((s.mcause, s.mtval, s.mepc), (2, raw, CODE), "{insn:#x} in {privilege:?}");
        }
    });
}

#[test]
fn mret_enters_the_mode_below() {
    both(|mut g| {
        g.put(CODE, &[csrrw(0, MEPC, A0), csrrw(0, MSTATUS, A1), MRET]);
        g.put(DATA, &[ECALL]);
        g.change(|s| {
            s.x[A0 as usize] = DATA;
            s.x[A1 as usize] = 1 << 11;
        });
        let s = g.run();
        assert_eq!((s.mcause, s.mepc), (9, DATA));
    });
}

#[test]
fn interrupts_are_taken_when_unmasked() {
    both(|mut g| {
        // Masked while the first instructions run, then enabled.
        g.put(CODE, &[addi(A0, 0, 5), csrrsi(A1, MSTATUS, 8), addi(A0, 0, 6), WFI]);
        g.change(|s| s.mie = irq::MSI | irq::MEI);
        g.vcpu.handle().set_pin(CpuPin::Msip, true);
        g.vcpu.handle().set_pin(CpuPin::Seip, true);
        let s = g.run();
        assert_eq!((s.mcause, s.mepc), (1 << 63 | 3, CODE + 8));
        assert_eq!(s.x[A0 as usize], 5);
        assert_eq!(s.mip, irq::MSI | irq::SEI);
        assert_eq!(s.x[A1 as usize] & 8, 0, "the old value is assigned although the block is left");
    });
}

#[test]
fn wfi_wakes_and_the_interrupt_follows() {
    both(|mut g| {
        g.put(CODE, &[WFI, addi(A0, A0, 1), WFI]);
        g.change(|s| {
            s.mie = irq::MEI;
            s.mstatus |= 8;
        });
        let s = g.run();
        assert_eq!((s.pc, s.waiting, s.mcause), (CODE + 4, true, 0));
        assert!(matches!(g.vcpu.run(&g.io), VcpuExit::Halted), "still");
        g.vcpu.handle().set_pin(CpuPin::Meip, true);
        let s = g.run();
        assert_eq!((s.mcause, s.mepc), (1 << 63 | 11, CODE + 4));
    });
}

#[test]
fn software_interrupts_of_other_harts_can_be_cleared() {
    both(|mut g| {
        g.put(CODE, &[csrrs(A0, MIP, 0), csrrw(0, MIP, 0), csrrs(A1, MIP, 0), WFI]);
        g.vcpu.handle().set_pin(CpuPin::Ssip, true);
        let s = g.run();
        assert_eq!((s.x[A0 as usize], s.x[A1 as usize]), (2, 0));
    });
}

#[test]
fn the_supervisor_timer_fires_once_due() {
    both(|mut g| {
        let program = [csrrw(0, STIMECMP, A0), csrrs(A1, SIP, 0), WFI, addi(A2, A2, 1), WFI, addi(A2, A2, 1)];
        g.put(CODE, &program);
        g.change(|s| {
            s.privilege = Privilege::Supervisor;
            s.menvcfg = 1 << 63;
            s.mcounteren = 2;
            s.mideleg = irq::S_ALL;
            s.mie = irq::STI;
            s.mstatus |= 2;
            s.x[A0 as usize] = 50;
        });
        let s = g.run();
        assert_eq!(s.x[A1 as usize], 0);
        assert_eq!(g.io.asked.lock().unwrap().timer.last(), Some(&Some(5000)));
        // A deadline that is no longer the one in stimecmp is not believed.
        g.io.clock.advance(4000);
        g.vcpu.handle().set_pin(CpuPin::Sstc, true);
        let s = g.run();
        assert_eq!((s.scause, s.x[A2 as usize]), (0, 1));
        g.io.clock.advance(1000);
        g.vcpu.handle().set_pin(CpuPin::Sstc, true);
        let s = g.run();
        assert_eq!((s.scause, s.sepc), (1 << 63 | 5, CODE + 20));
        // A deadline in the past is due at once.
        g.change(|s| {
            s.pc = CODE;
            s.scause = 0;
            s.stimecmp = u64::MAX;
            s.mie = irq::STI;
            s.mstatus |= 2;
            s.privilege = Privilege::Supervisor;
            s.waiting = false;
        });
        let s = g.run();
        assert_eq!((s.scause, s.sepc), (1 << 63 | 5, CODE + 4));
    });
}

/// A firmware's timer raises STIP from outside: neither a state that is set nor `stimecmp` lowers it, and only the
/// firmware does.
#[test]
fn the_timer_of_a_firmware_is_not_lost() {
    both(|mut g| {
        for stce in [0, 1 << 63] {
            g.put(CODE, &[WFI, addi(A2, A2, 1), csrrw(0, SIE, 0), WFI]);
            let prepare = |s: &mut RiscvState| {
                s.pc = CODE;
                s.privilege = Privilege::Supervisor;
                (s.menvcfg, s.mideleg, s.mie) = (stce, irq::S_ALL, irq::STI);
                (s.waiting, s.x[A2 as usize]) = (false, 0);
            };
            g.change(prepare);
            assert_eq!(g.run().pc, CODE + 4, "it waits");
            // Due before the vCPU goes on with the state it was given.
            g.change(|_| {});
            g.vcpu.handle().set_pin(CpuPin::Stip, true);
            let s = g.run();
            assert_eq!((s.x[A2 as usize], s.mip & irq::STI, s.pc), (1, irq::STI, CODE + 16), "stce {stce:#x}");
            // A debugger's write does not make it a bit of software's.
            g.change(|_| {});
            g.vcpu.handle().set_pin(CpuPin::Stip, false);
            assert_eq!(g.state().mip & irq::STI, 0);
            // And it is taken, where it is enabled.
            g.change(prepare);
            g.change(|s| {
                s.mstatus |= 2;
                s.scause = 0;
            });
            g.vcpu.handle().set_pin(CpuPin::Stip, true);
            assert_eq!(g.run().scause, 1 << 63 | 5);
            g.vcpu.handle().set_pin(CpuPin::Stip, false);
        }
    });
}

/// Sv39 tables that map the code and handlers to themselves and `va` = 1 GiB
/// to `DATA`'s page with `bits`.
fn map(g: &Guest, bits: u64) {
    const VALID_RWX_AD: u64 = 0xcf;
    let pte = |pa: u64, bits: u64| pa >> 12 << 10 | bits;
    g.put_u64(TABLES + 2 * 8, pte(RAM, VALID_RWX_AD)); // a gigapage
    g.put_u64(TABLES + 8, pte(TABLES + 0x1000, 1));
    g.put_u64(TABLES + 0x1000, pte(TABLES + 0x2000, 1));
    g.put_u64(TABLES + 0x2000, pte(DATA, bits));
}

const VA: u64 = 1 << 30;
const SATP_SV39: u64 = 8 << 60 | TABLES >> 12;

fn supervisor(s: &mut RiscvState) {
    s.privilege = Privilege::Supervisor;
    s.satp = SATP_SV39;
    s.medeleg = 0xb3ff;
    s.x[A0 as usize] = VA;
}

#[test]
fn page_faults_carry_their_address() {
    both(|mut g| {
        for (insn, bits, cause) in [
            (ld(A1, A0, 8), 0, 13),
            (sd(A1, A0, 8), 0xc3, 15),
            (ld(A1, A0, 8), 0xd3, 13),         // a user page
            (0x0005_0067 | 8 << 20, 0xc3, 12), // jalr x0, 8(a0) to a page that is not executable
        ] {
            map(&g, bits);
            g.put(CODE, &[SFENCE_ALL, insn, EBREAK]);
            g.change(|s| {
                supervisor(s);
                s.pc = CODE;
                s.waiting = false;
            });
            let s = g.run();
            let pc = if cause == 12 { VA + 8 } else { CODE + 4 };
            assert_eq!((s.scause, s.stval, s.sepc), (cause, VA + 8, pc), "{insn:#x} {bits:#x}");
        }
    });
}

#[test]
fn loads_and_stores_go_through_the_tables() {
    both(|mut g| {
        map(&g, 0xc7);
        g.put_u64(DATA + 8, 77);
        g.put(CODE, &[ld(A1, A0, 8), sd(A1, A0, 16), ECALL]);
        g.change(supervisor);
        let s = g.run();
        assert_eq!((s.scause, s.x[A1 as usize], g.u64_at(DATA + 16)), (9, 77, 77));
        let translation = g.vcpu.translate(mimus_core::bus::GuestVirt(VA + 5), mimus_core::accel::Access::Read);
        assert_eq!(translation.unwrap().pa.0, DATA + 5);
    });
}

#[test]
fn accessed_and_dirty_bits_appear_in_memory() {
    both(|mut g| {
        map(&g, 0x07);
        g.put(CODE, &[ld(A1, A0, 0), ld(A1, A2, 0), sd(A1, A0, 0), ld(A3, A2, 0), ECALL]);
        g.change(|s| {
            supervisor(s);
            s.menvcfg = 1 << 61;
            // The leaf's address, in the gigapage.
            s.x[A2 as usize] = TABLES + 0x2000;
        });
        let s = g.run();
        assert_eq!(s.scause, 9);
        assert_eq!((s.x[A1 as usize] & 0xff, s.x[A3 as usize] & 0xff), (0x47, 0xc7));
        // Without hardware updating the same is a fault.
        map(&g, 0x07);
        g.change(|s| {
            supervisor(s);
            s.pc = CODE;
            s.waiting = false;
            s.menvcfg = 0;
        });
        assert_eq!(g.run().scause, 13);
    });
}

#[test]
fn changed_tables_count_after_the_fence() {
    both(|mut g| {
        map(&g, 0xc3);
        g.put_u64(DATA, 1);
        g.put_u64(DATA + 0x1000, 2);
        let other = (DATA + 0x1000) >> 12 << 10 | 0xc3;
        for fence in [SFENCE_ALL, 0x1200_0073 | A0 << 15, 0x1200_0073 | A0 << 15 | A3 << 20] {
            map(&g, 0xc3);
            g.put(CODE, &[SFENCE_ALL, ld(A1, A0, 0), sd(A2, A3, 0), fence, ld(A2, A0, 0), ECALL]);
            g.change(|s| {
                supervisor(s);
                s.pc = CODE;
                s.waiting = false;
                s.satp |= ((TABLES + 0x2000) & 0xffff) << 44; // so that a3 names the current ASID too
                s.x[A2 as usize] = other;
                s.x[A3 as usize] = TABLES + 0x2000;
            });
            let s = g.run();
            assert_eq!((s.scause, s.x[A1 as usize], s.x[A2 as usize]), (9, 1, 2), "{fence:#x}");
        }
    });
}

#[test]
fn supervisor_access_to_user_pages_follows_sum() {
    both(|mut g| {
        map(&g, 0xd7);
        g.put_u64(DATA, 9);
        g.put(CODE, &[csrrs(0, SSTATUS, A2), ld(A1, A0, 0), csrrw(0, SSTATUS, 0), ld(A3, A0, 0)]);
        g.change(|s| {
            supervisor(s);
            s.x[A2 as usize] = 1 << 18;
        });
        let s = g.run();
        assert_eq!((s.scause, s.sepc, s.x[A1 as usize]), (13, CODE + 12, 9));
    });
}

#[test]
fn mprv_loads_as_the_previous_mode() {
    both(|mut g| {
        map(&g, 0xd3);
        g.put_u64(DATA, 5);
        g.put(CODE, &[csrrs(0, MSTATUS, A1), ld(A2, A0, 0), csrrw(0, MSTATUS, 0), ld(A3, A0, 0)]);
        g.change(|s| {
            s.satp = SATP_SV39;
            s.x[A0 as usize] = VA;
            s.x[A1 as usize] = 1 << 17; // MPP is user
        });
        let s = g.run();
        assert_eq!(s.x[A2 as usize], 5);
        assert_eq!((s.mcause, s.mtval, s.mepc), (5, VA, CODE + 12), "untranslated: nothing is there");
    });
}

#[test]
fn physical_protection_denies() {
    both(|mut g| {
        g.put(CODE, &[sd(A1, A0, 0), csrrw(0, 0x3a0, A2), ld(A1, A0, 0), sd(A1, A0, 0)]);
        g.change(|s| {
            s.x[A0 as usize] = DATA;
            s.x[A1 as usize] = 3;
            s.x[A2 as usize] = 0x99; // locked, read-only
            s.pmpaddr[0] = DATA >> 2 | 0x1ff;
        });
        let s = g.run();
        assert_eq!((s.mcause, s.mtval, s.mepc, s.x[A1 as usize]), (7, DATA, CODE + 12, 3));
    });
}

#[test]
fn cache_blocks_are_zeroed() {
    const CBZE: u64 = 1 << 7;
    both(|mut g| {
        // As stores, and where it might be illegal in another mode or the address is not the block's first.
        for (envcfg, at) in [(0, 0x49), (CBZE, 0x49), (0, 0x40), (CBZE, 0x40)] {
            for i in 0..24 {
                g.put_u64(DATA + i * 8, !0);
            }
            for last in [cbo(0, A1), cbo(4, A1)] {
                g.put(CODE, &[cbo(4, A0), cbo(1, A0), last, ECALL]);
                g.change(|s| {
                    (s.pc, s.waiting, s.mcause) = (CODE, false, 0);
                    (s.menvcfg, s.senvcfg) = (envcfg, envcfg);
                    s.x[A0 as usize] = DATA + at;
                    s.x[A1 as usize] = DATA + 0x1000;
                    (s.pmpcfg[0], s.pmpaddr[0]) = (0x98, (DATA + 0x1000) >> 2 | 0x1ff);
                });
                let s = g.run();
                assert_eq!((s.mcause, s.mtval, s.mepc), (7, DATA + 0x1000, CODE + 8), "{envcfg:#x} {at:#x}");
            }
            let words: Vec<u64> = (0..24).map(|i| g.u64_at(DATA + i * 8)).collect();
            assert!((0..24).all(|i| words[i] == if (8..16).contains(&i) { 0 } else { !0 }));
        }
    });
}

#[test]
fn floating_point_state_and_flags() {
    const FADD_D: u32 = 0x0200_7053 | 1 << 20; // fadd.d f0, f0, f1, dyn
    both(|mut g| {
        // 1 + 2^-60 is inexact; the sum depends on the rounding mode.
        for (frm, sum) in [(0u64, 1f64), (3, 1.0 + f64::EPSILON), (4, 1.0)] {
            g.put(CODE, &[csrrw(0, FRM, A1), FADD_D, csrrs(A2, FFLAGS, 0), csrrs(A3, SSTATUS, 0), WFI]);
            g.change(|s| {
                s.pc = CODE;
                s.waiting = false;
                s.mstatus = s.mstatus & !(3 << 13) | 1 << 13;
                s.fcsr = 0;
                s.f[0] = 1f64.to_bits();
                s.f[1] = (0.5f64).powi(60).to_bits();
                s.x[A1 as usize] = frm;
            });
            let s = g.run();
            assert_eq!(f64::from_bits(s.f[0]), sum, "frm {frm}");
            assert_eq!(s.x[A2 as usize], 1);
            assert_eq!(s.x[A3 as usize] >> 13 & 3, 3, "dirty");
            assert_eq!(s.fcsr, frm << 5 | 1);
        }
        g.change(|s| {
            s.pc = CODE;
            s.waiting = false;
            s.x[A1 as usize] = 5;
        });
        let s = g.run();
        assert_eq!((s.mcause, s.mepc), (2, CODE + 4), "a reserved rounding mode");
    });
}

#[test]
fn flags_are_read_and_written() {
    const FADD_D: u32 = 0x0200_7053 | 1 << 20;
    both(|mut g| {
        g.put(CODE, &[csrrw(A1, FFLAGS, A1), FADD_D, csrrs(A2, FFLAGS, 0), csrrw(0, FFLAGS, 0), FADD_D, WFI]);
        g.change(|s| {
            s.mstatus = s.mstatus & !(3 << 13) | 1 << 13;
            s.fcsr = 4;
            s.f[0] = 1f64.to_bits();
            s.f[1] = (0.5f64).powi(60).to_bits();
            s.x[A1 as usize] = 0xf8;
        });
        let s = g.run();
        assert_eq!((s.x[A1 as usize], s.x[A2 as usize], s.fcsr), (4, 0x19, 1));
        assert_eq!(s.mstatus >> 13 & 3, 3, "dirty");
        g.put(CODE + 0x100, &[csrrs(A2, FFLAGS, 0), WFI]);
        g.change(|s| {
            s.pc = CODE + 0x100;
            s.waiting = false;
            s.mstatus &= !(3 << 13);
        });
        let s = g.run();
        assert_eq!((s.mcause, s.mepc), (2, CODE + 0x100), "the unit is off");
    });
}

#[test]
fn firmware_calls_reach_the_machine() {
    both(|mut g| {
        g.io.call_result = HypercallResult::Done;
        g.put(CODE, &[ECALL, addi(A1, A0, 1), csrrw(0, SIE, 0), WFI]);
        g.change(|s| {
            s.privilege = Privilege::Supervisor;
            s.x[17] = 0x10;
        });
        let s = g.run();
        assert_eq!((s.x[A0 as usize], s.x[A1 as usize], s.mcause), (0x1234, 0x1235, 0));
        assert_eq!(g.io.asked.lock().unwrap().calls, [[0, 0, 0, 0, 0, 0, 0, 0x10]]);
        g.io.call_result = HypercallResult::Wait;
        g.change(|s| {
            s.pc = CODE;
            s.waiting = false;
        });
        assert_eq!(g.run().pc, CODE + 4);
        g.io.call_result = HypercallResult::Leave;
        g.change(|s| {
            s.pc = CODE;
            s.waiting = false;
        });
        assert!(matches!(g.vcpu.run(&g.io), VcpuExit::Kicked));
        assert_eq!(g.state().pc, CODE + 4);
    });
}

#[test]
fn a_firmware_start_enters_the_supervisor() {
    both(|mut g| {
        g.put(CODE, &[csrrs(A2, TIME, 0), sd(A0, A3, 0), csrrw(0, SIE, 0), WFI]);
        g.vcpu.reset(ResetKind::Warm, Some(StartRequest { pc: CODE, arg0: 7, arg1: 8 }));
        let s = g.state();
        assert_eq!((s.privilege, s.pc, s.x[10], s.x[11]), (Privilege::Supervisor, CODE, 7, 8));
        g.change(|s| s.x[A3 as usize] = DATA);
        g.io.clock.advance(12_300);
        let s = g.run();
        assert_eq!((s.pc, s.x[A2 as usize], g.u64_at(DATA)), (CODE + 16, 123, 7));
    });
}

#[test]
fn the_state_can_be_read_and_written() {
    both(|mut g| {
        g.change(|s| {
            s.x = std::array::from_fn(|i| i as u64);
            s.f = std::array::from_fn(|i| 100 + i as u64);
            s.mscratch = 5;
        });
        let state = g.state();
        assert_eq!((state.x[0], state.x[31], state.f[0], state.f[31]), (0, 31, 100, 131));
        g.change(|_| {});
        assert_eq!(g.state(), state);
        let mut other = state.clone();
        other.mhartid = 1;
        assert!(g.vcpu.set_state(&CpuState::Riscv(Box::new(other))).is_err());
        assert_eq!(g.state(), state);
    });
}

#[test]
fn models_are_cut_to_what_there_is() {
    let model = |text| CpuModel::parse(GuestArch::Riscv64, text).unwrap();
    let state = Riscv::new_state(&model("max"), VcpuIndex(3)).map_err(|e| panic!("{e}")).unwrap();
    assert_eq!(state.hart.config.hart_id, 3);
    assert_eq!(state.hart.config.misa >> 21 & 1, 0, "no V");
    let Err(error) = Riscv::new_state(&model("rv64,zacas=on"), VcpuIndex(0)) else { panic!("accepted") };
    assert!(error.contains("zacas"), "{error}");
}
