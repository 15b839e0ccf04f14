//! What translated code calls: the functions numbered in
//! [`helper_ids`](crate::helper_ids).
//!
//! A helper that raises an exception, or after which the rest of the block is
//! not what would execute, leaves the block through [`Cpu::jump`].

use mimus_arch::riscv::Privilege;
use mimus_core::accel::{HypercallResult, SystemRegister};
use mimus_tcg_exec::env::Cpu;
use mimus_tcg_exec::frontend::{Access, GuestFrontend, Helper};
use mimus_tcg_exec::hostfp;
use mimus_tcg_ir::Slot;

use crate::csr::{self, CsrEffect, CsrEnv, CsrOp, FpFlags};
use crate::frontend::{Riscv, arm_timer, flush_translations, host_rounding, now};
use crate::helper_ids::*;
use crate::interrupt::{pending_interrupt, wakes_wfi};
use crate::trap::{self, Cause, CboOp, Exception};

/// Nanoseconds per tick of the `time` CSR: 10 MHz.
pub(crate) const TICK_NS: u64 = 100;
/// After how many `pause` instructions the host may run something else.
const PAUSES_PER_YIELD: u8 = 32;

type RiscvCpu = Cpu<Riscv>;

/// Every helper, in the order of its number.
pub(crate) fn table() -> Vec<Helper<Riscv>> {
    let table = vec![
        Helper::new(NAMES[CSR as usize], csr_access, csr_access),
        Helper::new(NAMES[FENCE_I as usize], fence_i, fence_i),
        Helper::new(NAMES[PAUSE as usize], pause, pause),
        Helper::new(NAMES[FP_CHECK as usize], fp_check, fp_check),
        Helper::new(NAMES[ECALL as usize], ecall, ecall),
        Helper::new(NAMES[EBREAK as usize], ebreak, ebreak),
        Helper::new(NAMES[MRET as usize], mret, mret),
        Helper::new(NAMES[SRET as usize], sret, sret),
        Helper::new(NAMES[WFI as usize], wfi, wfi),
        Helper::new(NAMES[SFENCE_VMA as usize], sfence_vma, sfence_vma),
        Helper::new(NAMES[SFENCE_INVAL as usize], sfence_inval, sfence_inval),
        Helper::new(NAMES[ILLEGAL as usize], illegal, illegal),
        Helper::new(NAMES[CBO as usize], cbo, cbo),
        Helper::new(NAMES[CHECK_TARGET as usize], check_target, check_target),
        Helper::new(NAMES[FFLAGS as usize], fflags, fflags),
    ];
    debug_assert_eq!(table.len(), COUNT);
    table
}

/// Takes the trap of `exception` at the current instruction.
fn raise(cpu: &mut RiscvCpu, exception: Exception) -> u64 {
    let (pc, _) = cpu.current_insn();
    cpu.note_exception(exception.cause as u64, pc, exception.tval);
    let handler = trap::take_exception(&mut cpu.guest.hart, exception, pc);
    cpu.guest.hart.take_effects();
    cpu.switch_context();
    cpu.jump(handler);
    0
}

/// Goes on at the next instruction, outside the block.
fn leave_after(cpu: &mut RiscvCpu) {
    let (pc, len) = cpu.current_insn();
    cpu.jump(pc.wrapping_add(u64::from(len)));
}

fn illegal(cpu: &mut RiscvCpu, raw: u64, _: u64, _: u64) -> u64 {
    raise(cpu, Exception::illegal(raw as u32))
}

/// What CSRs see of the vCPU: a snapshot of the clock and the pins, and the
/// host FPU as it is.
struct EngineEnv {
    now_ns: u64,
    pins: u64,
    cleared: u64,
}

impl FpFlags for EngineEnv {
    fn take_flags(&mut self) -> u8 {
        let flags = hostfp::flags();
        if flags != 0 {
            hostfp::set_flags(0);
        }
        flags
    }
    fn set_flags(&mut self, flags: u8) {
        hostfp::set_flags(flags);
    }
    fn set_rounding(&mut self, frm: u8) {
        hostfp::set_rounding(host_rounding(frm));
    }
}

impl CsrEnv for EngineEnv {
    fn time(&mut self) -> u64 {
        self.now_ns / TICK_NS
    }
    /// Instructions are not counted: like cycles, they pass at 1 GHz.
    fn instret(&mut self) -> u64 {
        self.now_ns
    }
    fn pins(&self) -> u64 {
        self.pins
    }
    fn clear_pins(&mut self, mask: u64) {
        self.cleared |= mask;
    }
}

fn csr_access(cpu: &mut RiscvCpu, what: u64, source: u64, raw: u64) -> u64 {
    let csr = what as u16 & 0xfff;
    let op = CsrOp::from_bits(what >> CSR_OP_SHIFT);
    let now_ns = if csr::reads_clock(csr) { now(cpu) } else { 0 };
    let mut env = EngineEnv { now_ns, pins: cpu.pins(), cleared: 0 };
    let Ok(old) = csr::access(&mut cpu.guest.hart, csr, op, source, &mut env) else {
        return illegal(cpu, raw, 0, 0);
    };
    if env.cleared != 0 {
        cpu.change_pins(env.cleared, 0);
    }
    let (writes, value) = match op {
        CsrOp::Read => (false, old),
        CsrOp::Write => (true, source),
        CsrOp::Set => (true, old | source),
        CsrOp::Clear => (true, old & !source),
    };
    let stops = cpu.note_register(SystemRegister::Csr(csr), writes, value);
    if apply_effects(cpu) || stops {
        // Leaving the block skips the assignment of the result.
        let rd = (raw >> 7 & 31) as u8;
        if rd != 0 {
            cpu.set_slot(Slot(rd), old);
        }
        leave_after(cpu);
    }
    old
}

/// `frflags` and `fsflags`, which compilers put around comparisons.
fn fflags(cpu: &mut RiscvCpu, write: u64, value: u64, _: u64) -> u64 {
    let (hart, host) = (&mut cpu.guest.hart, hostfp::flags());
    let old = hart.fflags | host;
    if write != 0 && value as u8 & 0x1f != old {
        hart.fflags = value as u8 & 0x1f;
        if host != 0 {
            hostfp::set_flags(0);
        }
    }
    old.into()
}

/// Does what changes of CSRs entail; answers whether to leave the block.
fn apply_effects(cpu: &mut RiscvCpu) -> bool {
    let effects = cpu.guest.hart.take_effects();
    if effects.is_empty() {
        return false;
    }
    if effects.contains(CsrEffect::STALE) {
        cpu.mmu.flush_all();
    }
    if effects.intersects(CsrEffect::SATP | CsrEffect::TRANSLATION) {
        cpu.switch_context();
    }
    if effects.contains(CsrEffect::TIMER) {
        arm_timer(cpu);
    }
    let interrupt = effects.contains(CsrEffect::INTERRUPTS) && pending_interrupt(&cpu.guest.hart, cpu.pins()).is_some();
    if interrupt {
        cpu.check_events();
    }
    let changed = CsrEffect::SATP | CsrEffect::TRANSLATION | CsrEffect::STALE | CsrEffect::FP_STATE;
    interrupt || effects.intersects(changed)
}

/// Stores to code withdraw what was translated from it at once. What is left are direct links from this block
/// to withdrawn ones: the next instruction is looked up afresh.
fn fence_i(cpu: &mut RiscvCpu, _: u64, _: u64, _: u64) -> u64 {
    leave_after(cpu);
    0
}

/// The guest spins: lets the vCPU it waits for run if the host is short of
/// processors.
fn pause(cpu: &mut RiscvCpu, _: u64, _: u64, _: u64) -> u64 {
    cpu.guest.pauses += 1;
    if cpu.guest.pauses >= PAUSES_PER_YIELD {
        cpu.guest.pauses = 0;
        std::thread::yield_now();
    } else {
        std::hint::spin_loop();
    }
    0
}

fn fp_check(cpu: &mut RiscvCpu, raw: u64, dynamic: u64, _: u64) -> u64 {
    let hart = &cpu.guest.hart;
    if !hart.fp_enabled() || dynamic != 0 && hart.frm > 4 {
        return illegal(cpu, raw, 0, 0);
    }
    0
}

fn ecall(cpu: &mut RiscvCpu, _: u64, _: u64, _: u64) -> u64 {
    let privilege = cpu.guest.hart.privilege;
    if privilege == Privilege::Supervisor && firmware_call(cpu) {
        return 0;
    }
    raise(cpu, Exception::ecall(privilege))
}

/// Offers an environment call from S-mode to the machine's own firmware
/// services; answers whether it took it.
fn firmware_call(cpu: &mut RiscvCpu) -> bool {
    const A0: u8 = 10;
    let delegated = cpu.guest.hart.medeleg >> Cause::SupervisorCall as u64 & 1 != 0;
    if delegated {
        return false;
    }
    let mut regs: [u64; 8] = std::array::from_fn(|i| cpu.slot(Slot(A0 + i as u8)));
    let index = cpu.index();
    // With Sstc a firmware's timer is `stimecmp` too (SBI, section 6.1): whichever was set last counts.
    let own_timer = (cpu.guest.hart.sstc_enabled() && is_set_timer(regs[7], regs[6])).then_some(regs[0]);
    if own_timer.is_some() {
        regs[0] = u64::MAX;
    }
    let result = cpu.io_outside_guest(|io| io.hypercall(index, &mut regs));
    match result {
        None | Some(HypercallResult::NotHandled) => return false,
        Some(HypercallResult::Done) => {
            if let Some(deadline) = own_timer {
                cpu.guest.hart.stimecmp = deadline;
                arm_timer(cpu);
            }
        }
        Some(HypercallResult::Leave) => cpu.leave_run_loop(),
        Some(HypercallResult::Wait) => cpu.halt(),
    }
    for (i, value) in regs.into_iter().enumerate() {
        cpu.set_slot(Slot(A0 + i as u8), value);
    }
    leave_after(cpu);
    true
}

/// Whether an SBI call sets the timer: the TIME extension's, or the legacy one.
const fn is_set_timer(extension: u64, function: u64) -> bool {
    const TIME: u64 = 0x5449_4d45;
    extension == 0 || extension == TIME && function == 0
}

fn ebreak(cpu: &mut RiscvCpu, _: u64, _: u64, _: u64) -> u64 {
    let (pc, _) = cpu.current_insn();
    raise(cpu, Exception::ebreak(pc))
}

fn mret(cpu: &mut RiscvCpu, raw: u64, _: u64, _: u64) -> u64 {
    let to = trap::mret(&mut cpu.guest.hart);
    return_to(cpu, to.ok(), raw)
}

fn sret(cpu: &mut RiscvCpu, raw: u64, _: u64, _: u64) -> u64 {
    let to = trap::sret(&mut cpu.guest.hart);
    return_to(cpu, to.ok(), raw)
}

fn return_to(cpu: &mut RiscvCpu, to: Option<u64>, raw: u64) -> u64 {
    let Some(pc) = to else {
        return illegal(cpu, raw, 0, 0);
    };
    apply_effects(cpu);
    cpu.jump(pc);
    0
}

fn wfi(cpu: &mut RiscvCpu, raw: u64, _: u64, _: u64) -> u64 {
    if trap::check_wfi(&cpu.guest.hart).is_err() {
        return illegal(cpu, raw, 0, 0);
    }
    leave_after(cpu);
    if !wakes_wfi(&cpu.guest.hart, cpu.pins()) {
        cpu.halt();
    }
    0
}

fn sfence_vma(cpu: &mut RiscvCpu, va: u64, asid: u64, flags: u64) -> u64 {
    if trap::check_sfence_vma(&cpu.guest.hart).is_err() {
        return illegal(cpu, flags >> 32, 0, 0);
    }
    let va = (flags & SFENCE_HAS_ADDRESS != 0).then_some(va);
    let asid = (flags & SFENCE_HAS_ASID != 0).then_some(asid as u16);
    flush_translations(cpu, va, asid);
    // The code after it is fetched through the new tables.
    leave_after(cpu);
    0
}

fn sfence_inval(cpu: &mut RiscvCpu, raw: u64, _: u64, _: u64) -> u64 {
    if cpu.guest.hart.privilege == Privilege::User {
        return illegal(cpu, raw, 0, 0);
    }
    0
}

fn cbo(cpu: &mut RiscvCpu, va: u64, kind: u64, raw: u64) -> u64 {
    let op = match kind {
        CBO_INVAL => CboOp::Inval,
        CBO_CLEAN => CboOp::Clean,
        CBO_FLUSH => CboOp::Flush,
        _ => CboOp::Zero,
    };
    if trap::check_cbo(&cpu.guest.hart, op).is_err() {
        return illegal(cpu, raw, 0, 0);
    }
    let (pc, _) = cpu.current_insn();
    if op == CboOp::Zero {
        // A fault has set the pc and the request to leave.
        let _faulted = cpu.zero_block(pc, va & !(CACHE_BLOCK - 1), CACHE_BLOCK);
        return 0;
    }
    // Memory is coherent: only the permissions remain. Either of load and
    // store will do, and a fault is a store's (CMO manual, section 2.5.2).
    if Riscv::walk(cpu, va, Access::Load).is_err()
        && let Err(fault) = Riscv::walk(cpu, va, Access::Store)
    {
        cpu.head.pc = pc;
        cpu.abandon();
        Riscv::deliver_fault(cpu, va, Access::Store, fault);
    }
    0
}

fn check_target(cpu: &mut RiscvCpu, target: u64, _: u64, _: u64) -> u64 {
    if target & 2 != 0 {
        raise(cpu, Exception { cause: Cause::FetchMisaligned, tval: target & !1 });
    }
    0
}
