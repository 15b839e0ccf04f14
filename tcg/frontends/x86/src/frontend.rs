//! x86 as the translator's runtime wants it: [`X86`] implements [`GuestFrontend`] by the other modules of this crate.

use std::mem::offset_of;
use std::sync::Arc;

use iced_x86::{Formatter, NasmFormatter};
use mimus_arch::x86::regs::*;
use mimus_arch::x86::{MpState, X86State};
use mimus_arch::{CpuModel, CpuState, GuestArch};
use mimus_core::accel::{
    CpuPin, RemoteFence, ResetCause, ResetKind, StartRequest, SysReg, SystemRegister, VcpuExit, VcpuIndex, catch,
};
use mimus_tcg_exec::env::Cpu;
use mimus_tcg_exec::frontend::{
    Access, CodeWindow, GuestFrontend, Helper, Leaf, MemFault, PublishedTsc, TranslateMode,
};
use mimus_tcg_ir::backend::VectorLayout;
use mimus_tcg_ir::flags::{FLAGS, Flags};
use mimus_tcg_ir::unit::UnitInsn;
use mimus_tcg_ir::{Block, FpFmt, FpOp, Rm, Size, Slot, Val};

use crate::blame::{instruction, not_canonical};
use crate::convert::{Registers, from_arch, to_arch};
use crate::cpuid;
use crate::debugging;
use crate::decode::{MAX_LEN, fetch};
use crate::exception::{Exception, Result};
use crate::exec::waiting::Waiting;
use crate::exec::{self, Decoded};
use crate::fpu;
use crate::host::{Flush, Host, Stop, change_byte};
use crate::interrupt;
use crate::native::Native;
use crate::paging;
use crate::segment;
use crate::smm::{self, PortAccess};
use crate::state::{CS, CodeMode, GUARD_AVX, GUARD_SSE, Mode, State, key_pcid, mask};
use crate::translate::{self, BASE0};

#[cfg(test)]
mod tests;

/// Bits of `Cpu::pins`.
pub(crate) const PIN_INTR: u64 = 1;
pub(crate) const PIN_NMI: u64 = 2;
pub(crate) const PIN_SMI: u64 = 4;
pub(crate) const PIN_A20_MASK: u64 = 8;
pub(crate) const PIN_INIT: u64 = 16;
/// Physical addresses with A20 masked.
const A20_MASK: u64 = !(1 << 20);
/// Instructions executed one by one before the run loop is looked at.
const STEPS: u32 = 256;

/// The x86 guest.
pub struct X86;

/// What a vCPU has beside its registers. The state comes first: generated code knows offsets in it.
#[repr(C)]
pub struct X86Guest {
    pub st: State,
    pub native: Native,
    /// Decoded instructions of helpers.
    pub(crate) decoded: Vec<Option<Decoded>>,
    /// Why the last walk failed.
    pub(crate) fault: Option<Exception>,
    /// The rest of the block is not what would execute.
    pub(crate) leave: bool,
    /// Events delivered so far.
    pub(crate) deliveries: u64,
    /// The x87 unit is the guest's: inside `run`.
    pub(crate) fpu_loaded: bool,
    pub(crate) waiting: Waiting,
    /// What physical addresses are masked with outside of system management mode.
    pub(crate) phys_mask: u64,
    /// The address after the HLT that waits, or waited until the event now to be taken.
    pub(crate) halted_at: Option<u64>,
    /// The repeated string instruction that was left to go on with what remains of it.
    pub(crate) repeats: Option<u64>,
    /// The last instruction's access to a port, if an SMI came during it.
    pub(crate) port_access: Option<PortAccess>,
}

pub(crate) type X86Cpu = Cpu<X86>;

/// The address that a processor's pins show for a physical one: A20M is ignored in system management mode.
fn on_bus(cpu: &X86Cpu, pa: u64) -> u64 {
    if cpu.guest.st.smm { pa } else { pa & cpu.guest.phys_mask }
}

/// Runs `f` over memory accesses inside pages: (offset, address, bytes), each at most 8 bytes and a power of two.
fn pieces(va: u64, bytes: u32, wide: bool, mut f: impl FnMut(u32, u64, Size) -> Result<()>) -> Result<()> {
    let wrap = if wide { !0 } else { 0xffff_ffff };
    let mut done = 0;
    while done < bytes {
        let at = va.wrapping_add(u64::from(done)) & wrap;
        let left = (bytes - done).min((4096 - (at & 4095)) as u32);
        let size = match left {
            8.. => Size::B8,
            4.. => Size::B4,
            2.. => Size::B2,
            _ => Size::B1,
        };
        f(done, at, size)?;
        done += size.bytes();
    }
    Ok(())
}

/// The size of an access that is a single one and leaves no page.
fn in_page(va: u64, bytes: u32) -> Option<Size> {
    let size = match bytes {
        1 => Size::B1,
        2 => Size::B2,
        4 => Size::B4,
        8 => Size::B8,
        _ => return None,
    };
    (va & 4095 <= 4096 - u64::from(bytes)).then_some(size)
}

pub(crate) fn taken(cpu: &mut X86Cpu, va: u64) -> Exception {
    cpu.guest.fault.take().unwrap_or(Exception::page(0, va))
}

impl Host for X86Cpu {
    fn note_event(&mut self, vector: u8, hardware: bool, ip: u64, value: u64) {
        let pc = self.cs_base().wrapping_add(ip);
        self.note_exception(u64::from(hardware) << 63 | u64::from(vector), pc, value);
    }
    fn note_access(&mut self, writes: bool, va: u64, bytes: u32, value: u64) {
        match bytes {
            1 | 2 | 4 | 8 => {
                let size = [Size::B1, Size::B2, Size::B4, Size::B8][bytes.trailing_zeros() as usize];
                self.trace_data(writes, va, size, value);
            }
            _ => self.trace_bulk(writes, va, bytes.into()),
        }
    }
    fn st(&self) -> &State {
        &self.guest.st
    }
    fn st_mut(&mut self) -> &mut State {
        &mut self.guest.st
    }
    fn gpr(&self, n: usize) -> u64 {
        self.head.slots[n]
    }
    fn set_gpr(&mut self, n: usize, value: u64) {
        self.head.slots[n] = value;
    }
    fn arith(&self) -> u64 {
        u64::from(Flags::unpack(self.slot(FLAGS)).0)
    }
    fn set_arith(&mut self, flags: u64) {
        self.set_slot(FLAGS, Flags::from_eflags(flags).pack());
    }
    fn base_changed(&mut self, seg: usize) {
        let base = self.guest.st.seg[seg].base;
        self.set_slot(Slot(BASE0 + seg as u8), base);
    }
    fn set_ip(&mut self, ip: u64) {
        let st = &self.guest.st;
        let pc = if st.is_64bit() { ip } else { st.seg[CS].base.wrapping_add(ip & 0xffff_ffff) & 0xffff_ffff };
        self.jump(pc);
    }
    fn resume_flag_set(&mut self) {
        self.guest.st.resume_at = self.head.pc;
    }
    fn mode_changed(&mut self) {
        self.guest.leave = true;
        self.switch_context();
    }
    fn smm_changed(&mut self) {
        let smm = self.guest.st.smm;
        self.use_alternate_memory(smm);
    }
    fn check_events(&mut self) {
        self.guest.leave = true;
        Cpu::check_events(self);
    }
    fn event_waits(&self) -> bool {
        self.pins() != 0 || self.guest.st.nmi_pending
    }
    fn flush(&mut self, what: Flush) {
        self.guest.leave = true;
        match what {
            Flush::All => self.mmu.flush_all(),
            Flush::NonGlobal(None) => self.mmu.drop_local_where(|_| true),
            Flush::NonGlobal(Some(pcid)) => self.mmu.drop_local_where(|key| key_pcid(key) == pcid),
            // Global translations are in every context that used them.
            Flush::Page(va, _) => self.mmu.drop_page_where(va & !4095, |_| true),
        }
    }
    fn phys_read(&mut self, pa: u64, bytes: u32) -> u64 {
        let pa = on_bus(self, pa);
        if let Some(size) = in_page(pa, bytes) {
            return self.phys_load(pa, size).unwrap_or(!0) & mask(bytes);
        }
        let mut value = 0;
        let read = pieces(pa, bytes, true, |done, at, size| {
            value |= self.phys_load(at, size).unwrap_or(!0) << (8 * done);
            Ok(())
        });
        debug_assert!(read.is_ok());
        value & mask(bytes)
    }
    fn phys_write(&mut self, pa: u64, bytes: u32, value: u64) {
        let pa = on_bus(self, pa);
        let written = pieces(pa, bytes, true, |done, at, size| {
            // Where nothing is, stores are lost.
            let _lost = self.phys_store(at, value >> (8 * done), size);
            Ok(())
        });
        debug_assert!(written.is_ok());
    }
    fn phys_cmpxchg(&mut self, pa: u64, bytes: u32, old: u64, new: u64) -> bool {
        let size = if bytes == 4 { Size::B4 } else { Size::B8 };
        let pa = on_bus(self, pa);
        // Tables in ROM keep what they have.
        self.phys_compare_exchange(pa, old, new, size).unwrap_or(true)
    }
    fn now(&self) -> u64 {
        self.io(|io| io.clock().now()).unwrap_or(0)
    }
    fn sysreg_read(&mut self, reg: SysReg) -> Option<u64> {
        let index = self.index();
        self.io(|io| io.sysreg_read(index, reg)).flatten()
    }
    fn sysreg_write(&mut self, reg: SysReg, value: u64) -> Option<()> {
        let index = self.index();
        self.io(|io| io.sysreg_write(index, reg, value)).flatten()
    }
    fn stop(&mut self, why: Stop) {
        let Stop::TripleFault = why;
        let pc = self.head.pc;
        self.jump(pc);
        // A PC's chip set answers the processor's shutdown with a reset.
        log::debug!(target: "guest_errors", "vCPU {}: triple fault at {pc:#x}; the machine is reset", self.index());
        Cpu::stop(self, VcpuExit::Reset(ResetCause::TripleFault));
    }

    fn table_change(&mut self, va: u64, set: u8, clear: u8) -> Result<u8> {
        let old = change_byte(self, va, set, clear)?;
        let at = self.wrap(va);
        // For whoever watches it.
        Cpu::note_access(self, at, 1, (true, true));
        Ok(old)
    }
    fn lin_read(&mut self, va: u64, bytes: u32, user: bool) -> Result<u64> {
        if user != self.user() {
            return default_read(self, va, bytes, user);
        }
        if let Some(size) = in_page(va, bytes) {
            let at = self.wrap(va);
            return self.try_load(at, size).map_err(|_| taken(self, at));
        }
        let mut value = 0;
        let wide = self.guest.st.long();
        pieces(va, bytes, wide, |done, at, size| {
            match self.try_load(at, size) {
                Ok(part) => value |= part << (8 * done),
                Err(_) => return Err(taken(self, at)),
            }
            Ok(())
        })?;
        Ok(value)
    }

    fn lin_write(&mut self, va: u64, bytes: u32, value: u64, user: bool) -> Result<()> {
        if user != self.user() {
            return default_write(self, va, bytes, value, user);
        }
        if let Some(size) = in_page(va, bytes) {
            let at = self.wrap(va);
            return self.try_store(at, value, size).map_err(|_| taken(self, at));
        }
        let wide = self.guest.st.long();
        if va & 4095 > 4096 - u64::from(bytes) {
            // Nothing is stored unless all can be.
            let end = self.wrap(va.wrapping_add(u64::from(bytes) - 1)) & !4095;
            for at in [va, end] {
                if self.host_for_store(at).is_err() {
                    return Err(taken(self, at));
                }
            }
        }
        pieces(va, bytes, wide, |done, at, size| match self.try_store(at, value >> (8 * done), size) {
            Ok(()) => Ok(()),
            Err(_) => Err(taken(self, at)),
        })
    }
}

/// As another privilege: by what the TLB has of the system's, or through the tables.
fn default_read(cpu: &mut X86Cpu, va: u64, bytes: u32, user: bool) -> Result<u64> {
    cpu.note_access(va, bytes.into(), (true, false));
    let wide = cpu.guest.st.long();
    let at = cpu.wrap(va);
    if let (false, Some(size)) = (user, in_page(at, bytes)) {
        let (mask, bits) = cpu.guest.st.system_key();
        if let Some(value) = cpu.load_by_context(mask, bits, at, size) {
            return Ok(value);
        }
    }
    let mut value = 0;
    pieces(va, bytes, wide, |done, at, size| {
        let leaf = paging::walk(cpu, at, paging::Access::Load, user)?;
        value |= cpu.phys_read(leaf.pa, size.bytes()) << (8 * done);
        Ok(())
    })?;
    Ok(value)
}

fn default_write(cpu: &mut X86Cpu, va: u64, bytes: u32, value: u64, user: bool) -> Result<()> {
    let wide = cpu.guest.st.long();
    let at = cpu.wrap(va);
    if let (false, Some(size)) = (user, in_page(at, bytes)) {
        let (mask, bits) = cpu.guest.st.system_key();
        if cpu.store_by_context(mask, bits, at, value, size) {
            cpu.note_access(va, bytes.into(), (false, true));
            return Ok(());
        }
    }
    let end = cpu.wrap(va.wrapping_add(u64::from(bytes) - 1));
    for at in [Some(va), ((va ^ end) & !4095 != 0).then_some(end & !4095)].into_iter().flatten() {
        paging::walk(cpu, at, paging::Access::Store, user)?;
    }
    cpu.note_access(va, bytes.into(), (false, true));
    pieces(va, bytes, wide, |done, at, size| {
        let leaf = paging::walk(cpu, at, paging::Access::Store, user)?;
        cpu.phys_write(leaf.pa, size.bytes(), value >> (8 * done));
        Ok(())
    })
}

/// The offset in CS of a linear address.
pub(crate) fn ip_of(cpu: &X86Cpu, pc: u64) -> u64 {
    if cpu.guest.st.is_64bit() { pc } else { pc.wrapping_sub(cpu.guest.st.seg[CS].base) & 0xffff_ffff }
}

/// Whether code at a linear address is outside of its segment.
fn beyond_code(st: &State, va: u64) -> bool {
    let code = &st.seg[CS];
    !st.is_64bit() && !segment::in_limit(code, va.wrapping_sub(code.base) & 0xffff_ffff, 1)
}

/// Clears RF if the instruction it was of has been executed: at `pc` is another one. Only where instructions are executed
/// one by one is it cleared at once.
pub(crate) fn settle_resume_flag(cpu: &mut X86Cpu, pc: u64) {
    let st = &mut cpu.guest.st;
    if st.flags & RFLAGS_RF != 0 && st.resume_at != pc {
        st.flags &= !RFLAGS_RF;
    }
}

/// Sets RF for what interrupts a repeated string instruction that is to go on at `pc`, so that its breakpoint does not hit
/// again: Intel's processors do (SDM section 18.3.1.1); AMD's manual has RF set for faults only.
pub(crate) fn resume_repeated(cpu: &mut X86Cpu, pc: u64) {
    if cpu.guest.repeats.take() == Some(pc) && !cpu.guest.st.features.amd {
        cpu.guest.st.flags |= RFLAGS_RF;
        cpu.guest.st.resume_at = pc;
    }
}

/// Takes an exception of the instruction at `pc`.
/// Whether the instruction that has faulted at the beginning of a page stores what is before it nevertheless: of ten
/// bytes Intel's processors do (see `exec::vector`).
fn leaves_part_stored(cpu: &mut X86Cpu) -> bool {
    let pc = cpu.head.pc;
    !cpu.guest.st.features.amd && instruction(cpu, pc).is_some_and(|insn| insn.memory_size().size() == 10)
}

/// Whether the access at `va` that found no page ends where addresses are not canonical, which comes first.
fn over_the_border(cpu: &mut X86Cpu, va: u64, access: Access) -> bool {
    if access == Access::Fetch || !cpu.guest.st.is_64bit() || cpu.guest.st.canonical((va | 4095).wrapping_add(1)) {
        return false;
    }
    let pc = cpu.head.pc;
    let bytes = instruction(cpu, pc).map_or(0, |insn| insn.memory_size().size() as u64);
    (va & 4095) + bytes > 4096
}

/// The store of the instruction at `pc` has faulted.
pub(crate) fn after_fault_of_store(cpu: &mut X86Cpu, pc: u64) {
    if fpu::minds_faults_of_stores(&cpu.guest) {
        let insn = instruction(cpu, pc);
        fpu::after_fault_of_store(&mut cpu.guest, insn);
    }
}

pub(crate) fn raise(cpu: &mut X86Cpu, exception: Exception, pc: u64) {
    if cpu.abandoned() {
        return cpu.jump(pc);
    }
    cpu.guest.deliveries += 1;
    settle_resume_flag(cpu, pc);
    let ip = ip_of(cpu, pc);
    // A stop goes on where it was.
    cpu.head.pc = pc;
    interrupt::raise(cpu, exception, ip);
    cpu.guest.st.update_guards();
    cpu.switch_context();
}

/// Takes note of the A20M pin.
fn update_a20(cpu: &mut X86Cpu, pins: u64) {
    let wanted = if pins & PIN_A20_MASK != 0 { A20_MASK } else { !0 };
    if cpu.guest.phys_mask != wanted {
        cpu.guest.phys_mask = wanted;
        cpu.mmu.flush_all();
    }
}

/// Enters system management mode if an SMI waits: before all else that does.
fn take_smi(cpu: &mut X86Cpu, pins: u64) -> bool {
    if pins & PIN_SMI == 0 || cpu.guest.st.smm {
        return false;
    }
    if !cpu.has_alternate_memory() {
        cpu.change_pins(PIN_SMI, 0);
        cpu.guest.port_access = None;
        return false;
    }
    if !cpu.announce_alternate_memory() {
        return false;
    }
    cpu.change_pins(PIN_SMI, 0);
    cpu.guest.deliveries += 1;
    let (pc, ip) = (cpu.head.pc, ip_of(cpu, cpu.head.pc));
    settle_resume_flag(cpu, pc);
    let halted = cpu.guest.halted_at.take() == Some(pc);
    let access = cpu.guest.port_access.take().filter(|a| a.goes_on_at == pc);
    smm::enter(cpu, ip, halted, access);
    cpu.guest.st.update_guards();
    cpu.switch_context();
    cpu.head.exit_request = 0;
    true
}

/// Takes an SMI, an NMI or an external interrupt if there is one for now.
fn take_external(cpu: &mut X86Cpu) -> bool {
    let pins = cpu.pins();
    update_a20(cpu, pins);
    if take_smi(cpu, pins) {
        return true;
    }
    // One that came in system management mode, where it waits (SDM volume 3, section 32.3.2).
    if pins & PIN_INIT != 0 && !cpu.guest.st.smm {
        cpu.change_pins(PIN_INIT, 0);
        let index = cpu.index();
        cpu.io(|io| io.take_init(index));
        return true;
    }
    if pins & PIN_NMI != 0 {
        cpu.change_pins(PIN_NMI, 0);
        cpu.guest.st.nmi_pending = true;
    }
    if cpu.guest.st.nmi_pending && !cpu.guest.st.nmi_masked {
        cpu.guest.st.nmi_pending = false;
        cpu.guest.st.nmi_masked = true;
        deliver(cpu, VECTOR_NMI);
        return true;
    }
    if pins & PIN_INTR == 0 || !cpu.guest.st.interrupts_open() {
        return false;
    }
    let index = cpu.index();
    let vector = cpu.io(|io| io.acknowledge_interrupt(index)).flatten();
    if let Some(vector) = vector {
        deliver(cpu, vector);
    }
    vector.is_some()
}

fn deliver(cpu: &mut X86Cpu, vector: u8) {
    cpu.guest.deliveries += 1;
    cpu.guest.halted_at = None;
    let pc = cpu.head.pc;
    settle_resume_flag(cpu, pc);
    resume_repeated(cpu, pc);
    let ip = ip_of(cpu, pc);
    interrupt::hardware(cpu, vector, ip);
    cpu.guest.st.update_guards();
    cpu.switch_context();
    cpu.head.exit_request = 0;
}

fn x86_model(model: &CpuModel) -> std::result::Result<mimus_arch::x86::X86Model, String> {
    let CpuModel::X86(model) = model else {
        return Err(format!("CPU model {} is not an x86 one", model.name()));
    };
    model.restricted_to(cpuid::supported()).map_err(|e| e.to_string())
}

fn walked(cpu: &mut X86Cpu, va: u64, access: Access) -> std::result::Result<paging::Leaf, Exception> {
    let user = cpu.user();
    let access = match access {
        Access::Fetch => paging::Access::Fetch,
        Access::Load => paging::Access::Load,
        Access::Store => paging::Access::Store,
    };
    let leaf = paging::walk(cpu, va, access, user)?;
    Ok(paging::Leaf { pa: on_bus(cpu, leaf.pa), ..leaf })
}

impl GuestFrontend for X86 {
    type State = X86Guest;
    const ARCH: GuestArch = GuestArch::X86_64;
    /// By how often compiled code uses them, but that RDX and RCX come where instructions have them implied.
    const PIN_ORDER: &'static [Slot] = &{
        const ORDER: [u8; 16] = [0, 4, 5, 6, 7, 2, 1, 3, 8, 9, 12, 13, 10, 14, 15, 11];
        let mut slots = [Slot(0); 16];
        let mut i = 0;
        while i < 16 {
            slots[i] = Slot(ORDER[i]);
            i += 1;
        }
        slots
    };
    /// Those of 32-bit processors, and temporaries; one register is left to the backend.
    const PIN_ORDER_NARROW: &'static [Slot] =
        &[Slot(0), Slot(4), Slot(5), Slot(6), Slot(7), Slot(2), Slot(1), Slot(3), Slot::temp(0), Slot::temp(1)];
    const STACK: Option<Slot> = Some(Slot(4));
    const CODE_ALIGN: u32 = 1;
    const FLAGS: bool = true;
    const COHERENT_CODE: bool = true;
    const LENIENT_BUS: bool = true;
    const LATCHED_PINS: u64 = PIN_NMI | PIN_SMI | PIN_INIT;
    const MODE_PINS: u64 = PIN_A20_MASK;
    const ALTERNATE_MEMORY: bool = true;
    const TRAPS_USE_SLOTS: bool = true;
    const VECTOR: Option<VectorLayout> = Some(VectorLayout {
        registers: (offset_of!(X86Guest, st) + offset_of!(State, vec)) as i32,
        mxcsr: (offset_of!(X86Guest, st) + offset_of!(State, mxcsr)) as i32,
        guard: (offset_of!(X86Guest, st) + offset_of!(State, guards)) as i32,
        vector: GUARD_SSE | GUARD_AVX,
        upper: GUARD_AVX,
    });

    fn helpers() -> Vec<Helper<Self>> {
        exec::table()
    }

    fn new_state(model: &CpuModel, index: VcpuIndex) -> std::result::Result<X86Guest, String> {
        let model = x86_model(model)?;
        Ok(X86Guest {
            st: State::new(&model, index.0),
            native: Native::new()?,
            decoded: exec::no_decoded(),
            fault: None,
            leave: false,
            deliveries: 0,
            fpu_loaded: false,
            waiting: Waiting::default(),
            phys_mask: !0,
            halted_at: None,
            repeats: None,
            port_access: None,
        })
    }

    fn published_tsc(state: &X86Guest) -> Option<Arc<PublishedTsc>> {
        Some(state.st.tsc_published.clone())
    }

    fn reset(cpu: &mut Cpu<Self>, kind: ResetKind, start: Option<StartRequest>) {
        let init = kind == ResetKind::Init || kind == ResetKind::Warm && start.is_some();
        let mut reset = if init { init_state(cpu) } else { X86State::reset(cpu.guest.st.index == 0) };
        let st = &mut cpu.guest.st;
        let tsc_offset = st.tsc_offset;
        // The board's reset of the local APICs sets the base anew.
        if kind == ResetKind::Warm {
            reset.apic_base = st.apic_base;
        }
        reset.gpr[RDX] = u64::from(cpuid::cpuid(st, 1, 0)[0]);
        if let Some(start) = start {
            reset.start_real_mode(start.pc);
        }
        let halted = reset.mp_state != MpState::Running;
        let registers = from_arch(st, &reset, 0);
        debug_assert!(registers.is_ok(), "the reset state is valid");
        if let Ok(registers) = registers {
            set_registers(cpu, &registers);
        }
        if init {
            cpu.guest.st.set_tsc_offset(tsc_offset);
        }
        cpu.change_pins(PIN_NMI | PIN_SMI | PIN_INIT, 0);
        cpu.guest.halted_at = None;
        cpu.halted = halted;
    }

    fn code_mode(cpu: &Cpu<Self>) -> u16 {
        cpu.guest.st.code_mode()
    }

    fn translate(guest: &X86Guest, code: CodeWindow<'_>, start: u16, mode: TranslateMode, block: &mut Block) {
        translate::translate(&guest.st, code, start, mode, block);
    }

    fn runs_on(mode: u16) -> bool {
        translate::runs_on(mode)
    }

    fn crosses_page(code: CodeWindow<'_>, start: u16) -> bool {
        translate::crosses_page(code, start)
    }

    fn context_key(cpu: &Cpu<Self>) -> u64 {
        cpu.guest.st.context_key()
    }

    const PROGRAMS: u8 = 3;

    fn address_space(cpu: &Cpu<Self>) -> (u64, u8) {
        (cpu.guest.st.cr3, cpu.guest.st.cpl)
    }

    fn operating_mode(cpu: &Cpu<Self>) -> u32 {
        let st = &cpu.guest.st;
        let kind = match st.mode() {
            Mode::Real => catch::MODE_REAL,
            Mode::V86 => catch::MODE_V86,
            Mode::Long => catch::MODE_LONG,
            Mode::Protected if st.long() => catch::MODE_COMPATIBILITY,
            Mode::Protected => catch::MODE_PROTECTED,
        };
        kind | u32::from(st.cpl) | if st.smm { catch::MODE_SMM } else { 0 }
    }

    fn can_catch(register: SystemRegister) -> std::result::Result<(), String> {
        match register {
            SystemRegister::Msr(_) | SystemRegister::Control(0 | 2 | 3 | 4 | 8) => Ok(()),
            SystemRegister::Control(n) => Err(format!("there is no control register {n}: 0, 2, 3, 4 and 8")),
            SystemRegister::Csr(_) => Err("an x86 processor has MSRs and control registers, no CSRs".to_owned()),
        }
    }

    fn code_bits(mode: u16) -> u8 {
        CodeMode(mode).bits() as u8
    }

    fn walk(cpu: &mut Cpu<Self>, va: u64, access: Access) -> std::result::Result<Leaf, MemFault> {
        match walked(cpu, va, access) {
            Ok(leaf) => Ok(Leaf {
                pa: leaf.pa,
                read: leaf.read,
                write: leaf.write,
                local: !leaf.global,
                mapping_size: leaf.size,
                // Code of 32 bits compares addresses before it truncates them (`Block::narrow`). Beyond 4 GiB are
                // tables that the processor reads for itself in compatibility mode.
                cacheable: va >> 32 == 0 || cpu.guest.st.is_64bit(),
            }),
            Err(exception) => {
                cpu.guest.fault = Some(exception);
                Err(MemFault::Page)
            }
        }
    }

    fn debug_walk(cpu: &mut Cpu<Self>, va: u64, access: Access) -> Option<(u64, u64)> {
        let access = match access {
            Access::Fetch => paging::Access::Fetch,
            Access::Load => paging::Access::Load,
            Access::Store => paging::Access::Store,
        };
        // At whatever privilege it is mapped for.
        let leaf = [cpu.user(), !cpu.user()].into_iter().find_map(|user| paging::peek(cpu, va, access, user).ok())?;
        Some((on_bus(cpu, leaf.pa), leaf.size))
    }

    fn deliver_fault(cpu: &mut Cpu<Self>, va: u64, access: Access, fault: MemFault) {
        if access == Access::Store && va.is_multiple_of(4096) && leaves_part_stored(cpu) {
            // Generated code has looked before it stored anything: the helper does as the processor.
            cpu.guest.fault = None;
            return Self::step(cpu);
        }
        let taken = cpu.guest.fault.take();
        let exception = match (fault, taken) {
            // Outside of the code segment is found out first.
            _ if access == Access::Fetch && beyond_code(&cpu.guest.st, va) => Exception::GP0,
            (MemFault::Page, Some(Exception::GP0)) => not_canonical(cpu, cpu.head.pc, va, access),
            (MemFault::Page, Some(_)) if over_the_border(cpu, va, access) => {
                not_canonical(cpu, cpu.head.pc, va, access)
            }
            (MemFault::Page, Some(exception)) => exception,
            // Code where nothing is: reads as ones, which are no instruction.
            _ if access == Access::Fetch => Exception::UD,
            _ => Exception::GP0,
        };
        let pc = cpu.head.pc;
        if access == Access::Store {
            after_fault_of_store(cpu, pc);
        }
        raise(cpu, exception, pc);
    }

    fn take_interrupt(cpu: &mut Cpu<Self>) -> bool {
        if cpu.guest.st.shadow && !cpu.stops_at_breakpoint() {
            Self::step(cpu);
        }
        let mut taken = false;
        for _ in 0..STEPS {
            if cpu.halted || cpu.guest.st.shadow {
                return taken;
            }
            let took = take_external(cpu);
            taken |= took;
            if !took {
                // A HLT before this has ended: an instruction follows.
                cpu.guest.halted_at = None;
            }
            if !debugging::steps(&cpu.guest.st) || cpu.stops_at_breakpoint() {
                return taken;
            }
            debugging::step(cpu, false);
            if cpu.kicked() {
                break;
            }
        }
        Cpu::check_events(cpu);
        taken
    }

    fn accept_interrupt(cpu: &mut Cpu<Self>) -> bool {
        !cpu.guest.st.shadow && take_external(cpu)
    }

    fn step(cpu: &mut Cpu<Self>) {
        let st = &mut cpu.guest.st;
        let (shadow, behind_ss) = (std::mem::take(&mut st.shadow), std::mem::take(&mut st.shadow_ss));
        if debugging::steps(st) {
            debugging::step(cpu, behind_ss)
        } else {
            cpu.step_careful()
        }
        if cpu.hit_abandoned() {
            (cpu.guest.st.shadow, cpu.guest.st.shadow_ss) = (shadow, behind_ss);
        }
    }

    fn wakes(cpu: &Cpu<Self>) -> bool {
        let st = &cpu.guest.st;
        let pins = cpu.pins();
        let nmi = (pins & PIN_NMI != 0 || st.nmi_pending) && !st.nmi_masked;
        let outside = pins & (PIN_SMI | PIN_INIT) != 0 && !st.smm;
        nmi || outside || pins & PIN_INTR != 0 && st.flags & RFLAGS_IF != 0
    }

    fn pin_bit(pin: CpuPin) -> Option<u32> {
        match pin {
            CpuPin::Intr => Some(PIN_INTR.trailing_zeros()),
            CpuPin::Nmi => Some(PIN_NMI.trailing_zeros()),
            CpuPin::Smi => Some(PIN_SMI.trailing_zeros()),
            CpuPin::Init => Some(PIN_INIT.trailing_zeros()),
            CpuPin::A20Mask => Some(PIN_A20_MASK.trailing_zeros()),
            _ => None,
        }
    }

    /// No x86 instruction is translated to these operations.
    fn fp(_: &mut Cpu<Self>, _: FpOp, _: FpFmt, _: Rm, _: u64, _: u64, _: u64) -> u64 {
        0
    }

    fn unit(cpu: &mut Cpu<Self>, insn: &UnitInsn, d: Option<Slot>, a: Val, va: u64) {
        exec::unit(cpu, insn, d, a, va);
    }

    fn remote_fence(cpu: &mut Cpu<Self>, fence: RemoteFence) {
        if fence != RemoteFence::Icache {
            cpu.mmu.flush_all();
        }
    }

    fn enter_run(cpu: &mut Cpu<Self>) {
        fpu::load(&mut cpu.guest);
        cpu.guest.st.update_guards();
    }

    fn leave_run(cpu: &mut Cpu<Self>) {
        fpu::unload(&mut cpu.guest);
    }

    fn get_state(cpu: &mut Cpu<Self>) -> CpuState {
        settle_resume_flag(cpu, cpu.head.pc);
        let registers = Registers {
            gpr: std::array::from_fn(|i| cpu.head.slots[i]),
            ip: ip_of(cpu, cpu.head.pc),
            arith: cpu.arith(),
        };
        let mut state = to_arch(&cpu.guest.st, &registers, cpu.now());
        let pins = cpu.pins();
        state.events.intr = pins & PIN_INTR != 0;
        state.events.nmi_pending |= pins & PIN_NMI != 0;
        state.events.smi_pending = pins & PIN_SMI != 0;
        state.events.init_latched = pins & PIN_INIT != 0;
        if cpu.halted {
            state.mp_state = MpState::Halted;
        }
        CpuState::X86(Box::new(state))
    }

    fn set_state(cpu: &mut Cpu<Self>, state: &CpuState) -> std::result::Result<(), String> {
        let Some(state) = state.as_x86() else {
            return Err("the state is not an x86 one".to_owned());
        };
        let now = cpu.now();
        let registers = from_arch(&mut cpu.guest.st, state, now)?;
        let smi = if state.events.smi_pending { PIN_SMI } else { 0 };
        let init = if state.events.init_latched { PIN_INIT } else { 0 };
        cpu.change_pins(PIN_NMI | PIN_SMI | PIN_INIT, smi | init);
        set_registers(cpu, &registers);
        cpu.halted = state.mp_state != MpState::Running;
        cpu.guest.halted_at = (state.mp_state == MpState::Halted).then_some(cpu.head.pc);
        let ip = registers.ip;
        if let Some(e) = state.events.exception {
            let payload = e.payload.unwrap_or(cpu.guest.st.cr2);
            interrupt::raise(cpu, Exception { vector: e.vector, error: e.error_code, payload }, ip);
        } else if let Some(i) = state.events.interrupt {
            interrupt::hardware(cpu, i.vector, ip);
        }
        cpu.head.exit_request = 0;
        Ok(())
    }

    fn disassemble(code: CodeWindow<'_>, offset: u32, pc: u64) -> (String, u32) {
        let mut bytes = [0; MAX_LEN];
        let have = fetch(code, offset, &mut bytes);
        disassemble(CodeMode(code.mode()).bits(), &bytes[..have], pc)
    }
}

/// Disassembles the instruction that `bytes` begin with; also its length.
pub fn disassemble(bits: u32, bytes: &[u8], pc: u64) -> (String, u32) {
    let mut decoder = iced_x86::Decoder::with_ip(bits, bytes, pc, iced_x86::DecoderOptions::NONE);
    let insn = decoder.decode();
    let mut text = String::new();
    NasmFormatter::new().format(&insn, &mut text);
    (text, insn.len().max(1) as u32)
}

/// The reset state with what INIT leaves as it is (SDM volume 3 table 10-1): the floating-point units,
/// model-specific registers, caching, SMBASE.
fn init_state(cpu: &X86Cpu) -> X86State {
    let st = &cpu.guest.st;
    let now = to_arch(st, &Registers::default(), 0);
    let reset = X86State::reset(st.index == 0);
    let caching = CR0_CD | CR0_NW;
    X86State {
        cr0: reset.cr0 & !caching | st.cr0 & caching,
        xcr0: now.xcr0,
        xsave: now.xsave,
        msrs: now.msrs,
        apic_base: now.apic_base,
        ..reset
    }
}

pub(crate) fn set_registers(cpu: &mut X86Cpu, registers: &Registers) {
    for (i, value) in registers.gpr.into_iter().enumerate() {
        cpu.set_gpr(i, value);
    }
    cpu.set_arith(registers.arith);
    for seg in 0..6 {
        cpu.base_changed(seg);
    }
    cpu.smm_changed();
    cpu.set_ip(registers.ip);
    cpu.resume_flag_set();
    cpu.guest.repeats = None;
    cpu.guest.port_access = None;
    cpu.head.exit_request = 0;
    cpu.guest.st.update_guards();
    cpu.switch_context();
}

/// Decodes as the helpers do.
pub(crate) fn decode_packed(cpu: &X86Cpu, packed: &crate::decode::Packed, pc: u64) -> iced_x86::Instruction {
    crate::decode::unpack(packed, pc, &cpu.guest.st.features)
}
