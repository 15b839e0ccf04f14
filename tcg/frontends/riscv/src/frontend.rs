//! RISC-V as the translator's runtime wants it: [`Riscv`] implements
//! [`GuestFrontend`] by the engine-independent modules of this crate.
//!
//! Slots 0 to 31 are the integer registers (slot 0 is never written), 32 to
//! 63 the floating-point registers. While the vCPU runs, the dynamic rounding
//! mode and accrued exception flags are in the host's control word.

use std::mem::offset_of;

use mimus_arch::riscv::models::RiscvModel;
use mimus_arch::riscv::state::Privilege;
use mimus_arch::riscv::{Ext, Features, RiscvState};
use mimus_arch::{CpuModel, CpuState, GuestArch};
use mimus_core::accel::{CpuPin, RemoteFence, ResetKind, StartRequest, SystemRegister, VcpuIndex};
use mimus_tcg_exec::env::Cpu;
use mimus_tcg_exec::frontend::{Access, CodeWindow, GuestFrontend, Helper, Leaf, MemFault, TranslateMode};
use mimus_tcg_exec::hostfp;
use mimus_tcg_ir::backend::FpFlagsHelper;
use mimus_tcg_ir::{Block, FpFmt, FpOp, Rm, Slot};
use mimus_tcg_softfloat::{Flags, FloatStatus, Rounding, riscv as softfloat};

use crate::decode::insn_len;
use crate::helper_ids;
use crate::helpers::{self, TICK_NS};
use crate::interrupt::{Interrupt, pending_interrupt, wakes_wfi};
use crate::mmu::{self, Fault, NoMemory, PhysMem};
use crate::state::{Hart, HartConfig, envcfg, irq, mstatus};
use crate::translate::{TranslateConfig, translate_block};
use crate::trap::{self, Exception};

#[cfg(test)]
mod tests;

/// Where a hart starts executing after a reset without a start address.
pub const RESET_PC: u64 = 0x1000;
/// Slot of the first floating-point register.
const F0: u8 = 32;
/// Pages of a range beyond which all of an address space is flushed.
const FLUSH_PAGES: u64 = 32;
const PAGE: u64 = 4096;

/// The extensions of this frontend.
pub const SUPPORTED: Features = {
    use Ext::*;
    Features::of(&[
        I,
        M,
        A,
        F,
        D,
        C,
        B,
        Zic64b,
        Zicbom,
        Zicbop,
        Zicboz,
        Ziccamoa,
        Ziccif,
        Zicclsm,
        Ziccrse,
        Zicntr,
        Zicsr,
        Zifencei,
        Zihintntl,
        Zihintpause,
        Zihpm,
        Zmmul,
        Za64rs,
        Zaamo,
        Zalrsc,
        Zca,
        Zcd,
        Zba,
        Zbb,
        Zbs,
        Zicond,
        Zawrs,
        Zcb,
        Zimop,
        Zcmop,
        Ssccptr,
        Sscounterenw,
        Sstc,
        Sstvala,
        Sstvecd,
        Ssu64xl,
        Svade,
        Svadu,
        Svbare,
        Svinval,
        Svnapot,
        Svpbmt,
        Svvptc,
    ])
};

/// The RISC-V guest.
pub struct Riscv;

/// What a vCPU has beside its registers. The hart comes first: generated code
/// knows the offsets of its hot bytes.
#[repr(C)]
pub struct RiscvGuest {
    /// The hart.
    pub hart: Hart,
    translate: TranslateConfig,
    /// `stimecmp` was changed while not running: program the timer.
    timer_changed: bool,
    /// `pause` instructions since the host was last given up.
    pub(crate) pauses: u8,
}

/// The virtual clock in ns; 0 outside `run`.
pub(crate) fn now(cpu: &Cpu<Riscv>) -> u64 {
    cpu.io(|io| io.clock().now()).unwrap_or(0)
}

/// The host's rounding mode for `frm`.
pub(crate) const fn host_rounding(frm: u8) -> Rm {
    match frm {
        1 => Rm::ToZero,
        2 => Rm::Down,
        3 => Rm::Up,
        _ => Rm::NearestEven,
    }
}

/// Programs the machine's timer by `stimecmp` and sets its pin to what it is
/// now (Sstc, section 12.1.1: STIP is `time >= stimecmp`).
pub(crate) fn arm_timer(cpu: &mut Cpu<Riscv>) {
    let hart = &cpu.guest.hart;
    let enabled = hart.sstc_enabled();
    let deadline = hart.stimecmp;
    if enabled && hart.timer_due(now(cpu) / TICK_NS) {
        cpu.change_pins(0, irq::TIMER_PIN);
        return;
    }
    // Too far to express: never.
    let deadline_ns = if enabled { deadline.checked_mul(TICK_NS) } else { None };
    let index = cpu.index();
    // Lowered first: the new deadline may be reached before the call returns, and that must not be undone. An old
    // one that is being delivered meanwhile raises the pin again; `take_interrupt` sees that it is too early.
    cpu.change_pins(irq::TIMER_PIN, 0);
    cpu.io(|io| io.arm_pin_timer(index, CpuPin::Sstc, deadline_ns));
}

/// `sfence.vma`, of one address and of one address space if given.
pub(crate) fn flush_translations(cpu: &mut Cpu<Riscv>, va: Option<u64>, asid: Option<u16>) {
    let concerns = |key| mmu::key_translates(key) && asid.is_none_or(|asid| mmu::key_asid(key) == asid);
    match (va, asid) {
        (Some(va), _) => cpu.mmu.drop_page_where(va & !(PAGE - 1), concerns),
        (None, None) => cpu.mmu.flush_where(concerns),
        // Global translations survive (section 12.2.1).
        (None, Some(_)) => cpu.mmu.drop_local_where(concerns),
    }
}

/// Page tables in guest memory. The update of an entry is left to the caller,
/// who has the vCPU to itself then.
struct Tables<'a> {
    cpu: &'a Cpu<Riscv>,
    update: Option<(u64, u64, u64)>,
}

impl PhysMem for Tables<'_> {
    fn read_pte(&mut self, pa: u64) -> Result<u64, NoMemory> {
        self.cpu.phys_read_u64(pa).ok_or(NoMemory)
    }

    fn compare_exchange_pte(&mut self, pa: u64, old: u64, new: u64) -> Result<bool, NoMemory> {
        self.update = Some((pa, old, new));
        Ok(true)
    }
}

const fn mmu_access(access: Access) -> mmu::Access {
    match access {
        Access::Fetch => mmu::Access::Fetch,
        Access::Load => mmu::Access::Load,
        Access::Store => mmu::Access::Store,
    }
}

const fn mem_fault(fault: Fault) -> MemFault {
    match fault {
        Fault::Page => MemFault::Page,
        Fault::Access => MemFault::Access,
    }
}

/// Walks and makes the walk's update of the page table.
fn walk_tables(cpu: &mut Cpu<Riscv>, va: u64, access: Access) -> Result<mmu::Leaf, MemFault> {
    loop {
        let hart = &cpu.guest.hart;
        let privilege = if access == Access::Fetch { hart.privilege } else { hart.data_privilege() };
        let mut tables = Tables { cpu, update: None };
        let leaf = mmu::walk(hart, va, mmu_access(access), privilege, &mut tables).map_err(mem_fault)?;
        let Some((pa, old, new)) = tables.update else {
            return Ok(leaf);
        };
        match cpu.phys_compare_exchange_u64(pa, old, new) {
            Some(true) => return Ok(leaf),
            // Another vCPU was quicker: look again.
            Some(false) => {}
            None => return Err(MemFault::Access),
        }
    }
}

/// The model without what this frontend lacks.
fn supported(model: &CpuModel) -> Result<RiscvModel, String> {
    let Some(model) = model.as_riscv() else {
        return Err(format!("CPU model {} is not a RISC-V one", model.name()));
    };
    model.restricted_to(SUPPORTED).map_err(|e| e.to_string())
}

impl GuestFrontend for Riscv {
    type State = RiscvGuest;

    const ARCH: GuestArch = GuestArch::Riscv64;

    const CODE_ALIGN: u32 = 2;
    const FLAGS: bool = false;
    // fence.i says so.
    const COHERENT_CODE: bool = false;
    const LENIENT_BUS: bool = false;

    /// By how often compiled code uses them: argument registers, the stack
    /// pointer, the first saved registers, the return address, then the rest.
    const PIN_ORDER: &'static [Slot] = &{
        const ORDER: [u8; 31] = [
            15, 14, 10, 2, 13, 11, 8, 12, 9, 1, 16, 17, 18, 19, 20, 21, 6, 5, 7, 28, 22, 23, 4, 24, 25, 29, 30, 26, 27,
            31, 3,
        ];
        let mut slots = [Slot(0); ORDER.len()];
        let mut i = 0;
        while i < ORDER.len() {
            slots[i] = Slot(ORDER[i]);
            i += 1;
        }
        slots
    };

    /// In the order in which compilers take them: arguments from the last on, then temporaries.
    const FP_PIN_ORDER: &'static [Slot] = &{
        const ORDER: [u8; 14] = [15, 14, 13, 12, 11, 10, 0, 1, 2, 3, 8, 9, 18, 19];
        let mut slots = [Slot(0); ORDER.len()];
        let mut i = 0;
        while i < ORDER.len() {
            slots[i] = Slot(32 + ORDER[i]);
            i += 1;
        }
        slots
    };

    const FP_FLAGS: Option<FpFlagsHelper> =
        Some(FpFlagsHelper { helper: helper_ids::FFLAGS, flags: offset_of!(RiscvGuest, hart.fflags) as i32 });

    fn helpers() -> Vec<Helper<Self>> {
        helpers::table()
    }

    fn new_state(model: &CpuModel, index: VcpuIndex) -> Result<RiscvGuest, String> {
        let model = supported(model)?;
        let config = HartConfig::new(&model, u64::from(index.0));
        Ok(RiscvGuest {
            hart: Hart::new(config),
            translate: TranslateConfig::new(model.features),
            timer_changed: true,
            pauses: 0,
        })
    }

    fn reset(cpu: &mut Cpu<Self>, _kind: ResetKind, start: Option<StartRequest>) {
        cpu.guest.hart.reset();
        cpu.guest.timer_changed = true;
        cpu.halted = false;
        cpu.head.reserve_addr = !0;
        cpu.head.slots.fill(0);
        cpu.head.pc = RESET_PC;
        if let Some(start) = start {
            cpu.guest.hart.enter_supervisor();
            cpu.head.pc = start.pc;
            cpu.set_slot(Slot(10), start.arg0);
            cpu.set_slot(Slot(11), start.arg1);
        }
        cpu.guest.hart.take_effects();
    }

    fn translate(state: &RiscvGuest, code: CodeWindow<'_>, start: u16, mode: TranslateMode, block: &mut Block) {
        let config = match mode {
            TranslateMode::Block => state.translate,
            TranslateMode::Careful => state.translate.careful(),
        };
        // The runtime has the next page ready if `crosses_page` said so.
        let missing = translate_block(block, &code, start, &config).is_err();
        debug_assert!(!missing, "the instruction at {start:#x} needs the next page");
    }

    fn runs_on(_mode: u16) -> bool {
        true
    }

    fn crosses_page(code: CodeWindow<'_>, start: u16) -> bool {
        let start = u32::from(start);
        code.halfword(start).is_some_and(|low| start + u32::from(insn_len(low)) > PAGE as u32)
    }

    fn context_key(cpu: &Cpu<Self>) -> u64 {
        mmu::context_key(&cpu.guest.hart)
    }

    fn address_space(cpu: &Cpu<Self>) -> (u64, u8) {
        (cpu.guest.hart.satp, cpu.guest.hart.privilege as u8)
    }

    fn can_catch(register: SystemRegister) -> Result<(), String> {
        match register {
            // Read and written without a call.
            SystemRegister::Csr(mimus_arch::riscv::csr::number::FFLAGS) => {
                Err("accesses to fflags are not caught: they are the host's own flags; fcsr is".to_owned())
            }
            SystemRegister::Csr(0..4096) => Ok(()),
            _ => Err("a RISC-V hart has CSRs only, numbered below 0x1000".to_owned()),
        }
    }

    fn walk(cpu: &mut Cpu<Self>, va: u64, access: Access) -> Result<Leaf, MemFault> {
        let leaf = walk_tables(cpu, va, access)?;
        let hart = &cpu.guest.hart;
        let privilege = if access == Access::Fetch { hart.privilege } else { hart.data_privilege() };
        let uniform = hart.pmp.page_permissions(leaf.pa, privilege);
        // Where PMP splits a page, an access is judged by its first byte.
        let allowed = match uniform {
            Some(permissions) => permissions.allows(mmu_access(access)),
            None => hart.pmp.check(leaf.pa, 1, mmu_access(access), privilege),
        };
        if !allowed {
            return Err(MemFault::Access);
        }
        Ok(Leaf {
            pa: leaf.pa,
            read: leaf.allowed.read && uniform.is_some_and(|p| p.read),
            write: leaf.allowed.write && uniform.is_some_and(|p| p.write),
            local: !leaf.global,
            mapping_size: leaf.page_size,
            cacheable: uniform.is_some(),
        })
    }

    fn debug_walk(cpu: &mut Cpu<Self>, va: u64, access: Access) -> Option<(u64, u64)> {
        // A copy that may read whatever is mapped, and whose updates go nowhere.
        let mut hart = cpu.guest.hart.clone();
        hart.mstatus |= mstatus::SUM | mstatus::MXR;
        hart.menvcfg |= envcfg::ADUE;
        let walk = |privilege| {
            let mut tables = Tables { cpu, update: None };
            mmu::walk(&hart, va, mmu_access(access), privilege, &mut tables).ok()
        };
        let privilege = hart.data_privilege();
        let leaf = walk(privilege).or_else(|| match privilege {
            Privilege::User => walk(Privilege::Supervisor),
            _ => None,
        })?;
        Some((leaf.pa, leaf.page_size))
    }

    fn deliver_fault(cpu: &mut Cpu<Self>, va: u64, access: Access, fault: MemFault) {
        use crate::trap::Cause::{FetchMisaligned, LoadMisaligned, StoreMisaligned};
        let exception = match (fault, access) {
            (MemFault::Page, _) => Fault::Page.exception(mmu_access(access), va),
            (MemFault::Access, _) => Fault::Access.exception(mmu_access(access), va),
            (MemFault::Misaligned, Access::Fetch) => Exception { cause: FetchMisaligned, tval: va },
            (MemFault::Misaligned, Access::Load) => Exception { cause: LoadMisaligned, tval: va },
            (MemFault::Misaligned, Access::Store) => Exception { cause: StoreMisaligned, tval: va },
        };
        cpu.note_exception(exception.cause as u64, cpu.head.pc, exception.tval);
        cpu.head.pc = trap::take_exception(&mut cpu.guest.hart, exception, cpu.head.pc);
        cpu.guest.hart.take_effects();
        cpu.switch_context();
    }

    fn take_interrupt(cpu: &mut Cpu<Self>) -> bool {
        let mut pins = cpu.pins();
        let mut next = pending_interrupt(&cpu.guest.hart, pins);
        // The pin of a deadline that `stimecmp` has left meanwhile.
        if next == Some(Interrupt::SupervisorTimer)
            && pins & irq::TIMER_PIN != 0
            && cpu.guest.hart.sstc_enabled()
            && !cpu.guest.hart.timer_due(now(cpu) / TICK_NS)
        {
            arm_timer(cpu);
            pins = cpu.pins() & !irq::TIMER_PIN;
            next = pending_interrupt(&cpu.guest.hart, pins);
        }
        let Some(interrupt) = next else { return false };
        cpu.note_exception(1 << 63 | interrupt as u64, cpu.head.pc, 0);
        cpu.head.pc = trap::take_interrupt(&mut cpu.guest.hart, interrupt, cpu.head.pc);
        cpu.guest.hart.take_effects();
        cpu.switch_context();
        true
    }

    fn wakes(cpu: &Cpu<Self>) -> bool {
        wakes_wfi(&cpu.guest.hart, cpu.pins())
    }

    fn pin_bit(pin: CpuPin) -> Option<u32> {
        if pin == CpuPin::Sstc { Some(irq::TIMER_PIN.trailing_zeros()) } else { pin.mip_bit() }
    }

    fn fp(cpu: &mut Cpu<Self>, op: FpOp, fmt: FpFmt, rm: Rm, a: u64, b: u64, c: u64) -> u64 {
        let Some(op) = softfloat::RvFpOp::from_index(op as u8) else {
            return 0;
        };
        let fmt = match fmt {
            FpFmt::F32 => softfloat::FpFmt::F32,
            FpFmt::F64 => softfloat::FpFmt::F64,
        };
        let rm = match rm {
            Rm::NearestEven => softfloat::Rm::NearestEven,
            Rm::ToZero => softfloat::Rm::ToZero,
            Rm::Down => softfloat::Rm::Down,
            Rm::Up => softfloat::Rm::Up,
            Rm::NearestMaxMag => softfloat::Rm::NearestMaxMag,
            Rm::Dynamic => softfloat::Rm::Dynamic,
        };
        // Reserved modes do not get here: the translated code checked.
        let rounding = Rounding::from_frm(cpu.guest.hart.frm).unwrap_or(Rounding::NearestEven);
        let mut status = FloatStatus::riscv(rounding);
        let result = softfloat::exec(op, fmt, rm, a, b, c, &mut status);
        if status.flags != Flags::NONE {
            hostfp::raise_flags(status.flags.bits());
        }
        result
    }

    fn remote_fence(cpu: &mut Cpu<Self>, fence: RemoteFence) {
        match fence {
            // Stores to code withdraw what was translated from it at once.
            RemoteFence::Icache => {}
            RemoteFence::TlbAll => flush_translations(cpu, None, None),
            RemoteFence::TlbRange { start, len, asid } => {
                let first = start.0 & !(PAGE - 1);
                let pages = (len.saturating_add(start.0 - first)).div_ceil(PAGE);
                if pages > FLUSH_PAGES {
                    return flush_translations(cpu, None, asid);
                }
                for page in 0..pages {
                    flush_translations(cpu, Some(first.wrapping_add(page * PAGE)), asid);
                }
            }
        }
    }

    fn enter_run(cpu: &mut Cpu<Self>) {
        let now = now(cpu);
        let guest = &mut cpu.guest;
        guest.hart.cycle.resume(now);
        guest.hart.instret.resume(now);
        hostfp::set_rounding(host_rounding(guest.hart.frm));
        if std::mem::take(&mut guest.timer_changed) {
            arm_timer(cpu);
        }
    }

    fn leave_run(cpu: &mut Cpu<Self>) {
        let now = now(cpu);
        let hart = &mut cpu.guest.hart;
        hart.cycle.suspend(now);
        hart.instret.suspend(now);
        hart.fflags |= hostfp::flags();
        hostfp::set_flags(0);
    }

    fn get_state(cpu: &mut Cpu<Self>) -> CpuState {
        let mut state: Box<RiscvState> = Box::new(cpu.guest.hart.to_arch(cpu.pins()));
        for i in 1..32u8 {
            state.x[usize::from(i)] = cpu.slot(Slot(i));
        }
        for i in 0..32u8 {
            state.f[usize::from(i)] = cpu.slot(Slot(F0 + i));
        }
        state.pc = cpu.head.pc;
        state.waiting = cpu.halted;
        CpuState::Riscv(state)
    }

    fn set_state(cpu: &mut Cpu<Self>, state: &CpuState) -> Result<(), String> {
        let Some(state) = state.as_riscv() else {
            return Err("the state is not a RISC-V one".to_owned());
        };
        cpu.guest.hart.set_arch(state)?;
        cpu.guest.hart.take_effects();
        cpu.guest.timer_changed = true;
        for i in 1..32u8 {
            cpu.set_slot(Slot(i), state.x[usize::from(i)]);
        }
        for i in 0..32u8 {
            cpu.set_slot(Slot(F0 + i), state.f[usize::from(i)]);
        }
        cpu.head.pc = state.pc & cpu.guest.hart.config.pc_mask();
        cpu.head.reserve_addr = !0;
        cpu.halted = state.waiting;
        Ok(())
    }

    fn disassemble(code: CodeWindow<'_>, offset: u32, pc: u64) -> (String, u32) {
        let Some(low) = code.halfword(offset) else {
            return ("(not in memory)".to_owned(), 2);
        };
        let len = u32::from(insn_len(low));
        let high = if len == 4 { code.halfword(offset + 2) } else { Some(0) };
        let Some(high) = high else {
            return ("(not in memory)".to_owned(), len);
        };
        let insn = u32::from(high) << 16 | u32::from(low);
        let text = crate::disasm::disassemble(insn, pc).unwrap_or_else(|| format!(".insn {len}, {insn:#x}"));
        (text, len)
    }
}
