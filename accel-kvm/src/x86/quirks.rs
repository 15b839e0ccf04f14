//! What a host's KVM does differently from a processor, found by running a few instructions, never by name.
//!
//! A KVM may have no hardware behind it and emulate or shadow what a processor does itself. Each probe runs a
//! tiny guest in a machine of its own; all take a few milliseconds together.

use crate::sys::ioctl::{self, SlotRequest};
use crate::sys::run_page::RunPage;
use crate::sys::x86 as sys_x86;
use kvm_bindings::*;
use kvm_ioctls::{Kvm, VcpuFd, VmFd};
use mimus_arch::x86::msr::APIC_BASE_X2APIC;
use mimus_arch::x86::regs::*;
use mimus_arch::x86::state::attr;
use mimus_arch::x86::{Segment, X86State};
use mimus_core::memory::{GuestRam, RamBacking, RamBlock};
use std::io;
use std::sync::Arc;

use super::regs;

/// Differences. All false on a host with hardware virtualisation, but `no_smm` in kernels built without it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Quirks {
    /// Supervisor code is emulated instruction by instruction: many it cannot, and it is slow.
    pub emulated_cpl0: bool,
    /// Paging works in long mode only.
    pub no_32bit_paging: bool,
    /// `IRET` in 32-bit mode cannot be executed.
    pub no_32bit_iret: bool,
    /// `SYSCALL` does not change the privilege level.
    pub syscall_keeps_cpl: bool,
    /// `CPUID` in user mode shows the host.
    pub cpuid_leaks: bool,
    /// The time-stamp counter is the host's and cannot be set.
    pub tsc_fixed: bool,
    /// Page tables changed from outside of the guest are not noticed, even after a flush by the guest.
    pub shadow_paging: bool,
    /// There is no system management mode.
    pub no_smm: bool,
    /// Single steps of user code are not reported.
    pub no_user_step: bool,
    /// Watchpoints on data do not fire.
    pub no_watchpoints: bool,
    /// `INT3` is not reported as a breakpoint.
    pub no_int3: bool,
    /// The local APIC takes an interrupt as ended when it is delivered: handlers are not protected from lower
    /// priorities, and ends are told early.
    pub early_eoi: bool,
}

/// Memory of a probe's machine: code, tables, data.
const MEMORY: u64 = 0x20_0000;
const CODE: u64 = 0x1000;
const STACK: u64 = 0x8000;
const GDT: u64 = 0x9000;
const IDT: u64 = 0xa000;
const PML4: u64 = 0x1_0000;
const DATA: u64 = 0x2_0000;
/// Mapped by the page tables, but there is no memory.
const HOLE: u64 = 0x40_0000;
/// Selectors of the GDT.
const USER_CODE: u16 = 0x18 | 3;
const USER_DATA: u16 = 0x20 | 3;

const PRESENT_ALL: u64 = 7;
const LARGE: u64 = 0x80;

/// Why a run ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum End {
    /// `HLT`.
    Halt,
    /// A write to the hole: offset and value.
    Mark(u64, u64),
    Other(u32),
}

struct Probe {
    _vm: VmFd,
    vcpu: VcpuFd,
    page: RunPage,
    ram: Arc<RamBlock>,
}

fn os(e: kvm_ioctls::Error) -> io::Error {
    io::Error::from_raw_os_error(e.errno())
}

impl Probe {
    fn new(kvm: &Kvm) -> io::Result<Self> {
        Self::with_chips(kvm, false)
    }

    /// With interrupt controllers in the kernel, or without.
    fn with_chips(kvm: &Kvm, chips: bool) -> io::Result<Self> {
        let vm = kvm.create_vm().map_err(os)?;
        vm.set_tss_address(0xfeff_d000).map_err(os)?;
        if chips {
            vm.create_irq_chip().map_err(os)?;
        }
        let ram = GuestRam::new().add_block("kvm.probe", MEMORY, RamBacking::Private).map_err(io::Error::other)?;
        let request = SlotRequest { slot: 0, flags: 0, guest: 0, len: MEMORY, block: &ram, offset: 0 };
        ioctl::set_memory(&vm, request).map_err(os)?;
        let vcpu = vm.create_vcpu(0).map_err(os)?;
        let page = RunPage::map(&vcpu, kvm.get_vcpu_mmap_size().map_err(os)?)?;
        let mut cpuid = kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES).map_err(os)?;
        // A vendor that no host has.
        if let Some(leaf) = cpuid.as_mut_slice().iter_mut().find(|e| e.function == 0) {
            leaf.ebx = VENDOR;
        }
        vcpu.set_cpuid2(&cpuid).map_err(os)?;
        let probe = Self { _vm: vm, vcpu, page, ram };
        probe.write_tables();
        Ok(probe)
    }

    /// All addresses of the probes are inside their memory.
    fn store(&self, at: u64, value: u64) {
        let _ = self.ram.store(at, value);
    }

    fn write(&self, at: u64, bytes: &[u8]) {
        let _ = self.ram.write(at, bytes);
    }

    /// Page tables that map the first 8 MiB to themselves, but the data pages by a table of their own; and a GDT.
    fn write_tables(&self) {
        let (pdpt, pd, pt) = (PML4 + 0x1000, PML4 + 0x2000, PML4 + 0x3000);
        self.store(PML4, pdpt | PRESENT_ALL);
        self.store(pdpt, pd | PRESENT_ALL);
        self.store(pd, pt | PRESENT_ALL);
        for i in 1..4 {
            self.store(pd + i * 8, i << 21 | LARGE | PRESENT_ALL);
        }
        for i in 0..512 {
            self.store(pt + i * 8, i << 12 | PRESENT_ALL);
        }
        // Kernel code and data, user code and data (the order of SYSRET), all 64-bit or flat.
        let code = 0x00af_9b00_0000_ffff;
        let data = 0x00cf_9300_0000_ffff;
        let dpl3 = 3 << 45;
        for (i, descriptor) in [0, code, data, code | dpl3, data | dpl3].into_iter().enumerate() {
            self.store(GDT + i as u64 * 8, descriptor);
        }
    }

    fn base(&self) -> X86State {
        let mut s = X86State::reset(true);
        s.gdtr.base = GDT;
        s.gdtr.limit = 0x27;
        s.gpr[RSP] = STACK;
        s.rip = CODE;
        s
    }

    /// Long mode, supervisor or user.
    fn long(&self, user: bool) -> X86State {
        let mut s = self.base();
        s.cr0 = CR0_PE | CR0_ET | CR0_NE | CR0_WP | CR0_PG;
        s.cr3 = PML4;
        s.cr4 = CR4_PAE | CR4_OSFXSR;
        s.efer = EFER_LME | EFER_LMA | EFER_SCE;
        let dpl = if user { 3 << attr::DPL_SHIFT } else { 0 };
        let (code, data) = if user { (USER_CODE, USER_DATA) } else { (8, 16) };
        s.cs = Segment::flat(code, attr::CODE | attr::L | dpl);
        let data = Segment::flat(data, attr::DATA | attr::DB | dpl);
        (s.ss, s.ds, s.es) = (data, data, data);
        s
    }

    /// 32-bit protected mode, flat.
    fn protected(&self) -> X86State {
        let mut s = self.base();
        s.cr0 = CR0_PE | CR0_ET | CR0_NE;
        s.cs = Segment::flat(8, attr::CODE | attr::DB);
        let data = Segment::flat(16, attr::DATA | attr::DB);
        (s.ss, s.ds, s.es) = (data, data, data);
        s
    }

    fn set(&self, state: &X86State) -> io::Result<()> {
        self.vcpu.set_sregs(&regs::sregs_from(state)).map_err(os)?;
        self.vcpu.set_regs(&regs::regs_from(state)).map_err(os)
    }

    /// Runs `code` from `state`.
    fn run(&self, state: &X86State, code: &[u8]) -> io::Result<End> {
        self.write(CODE, code);
        self.set(state)?;
        self.go_on()
    }

    fn go_on(&self) -> io::Result<End> {
        loop {
            match ioctl::run(&self.vcpu) {
                Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
                other => other?,
            }
            return Ok(match self.page.exit_reason() {
                KVM_EXIT_HLT => End::Halt,
                KVM_EXIT_MMIO => {
                    let access = self.page.mmio();
                    let value = u64::from_le_bytes(access.data) & (u64::MAX >> (64 - 8 * access.len.max(1)));
                    End::Mark(access.addr.wrapping_sub(HOLE), value)
                }
                reason => End::Other(reason),
            });
        }
    }

    fn debug(&self, control: u32, write_watch: Option<u64>) -> io::Result<()> {
        let mut request = kvm_guest_debug { control: KVM_GUESTDBG_ENABLE | control, ..Default::default() };
        request.arch.debugreg[7] = 0x700;
        if let Some(at) = write_watch {
            request.arch.debugreg[0] = at;
            // Register 0, writes, one byte.
            request.arch.debugreg[7] |= 2 | 1 << 16;
        }
        self.vcpu.set_guest_debug(&request).map_err(os)
    }
}

const VENDOR: u32 = 0x756d_694d;
const HLT: u8 = 0xf4;
const NOP: u8 = 0x90;
/// `mov [HOLE], eax` with a 32-bit absolute address, in long mode.
const MARK_EAX: [u8; 7] = [0x89, 0x04, 0x25, 0, 0, 0x40, 0];

fn code(parts: &[&[u8]]) -> Vec<u8> {
    parts.concat()
}

impl Quirks {
    /// Those of this host's `/dev/kvm`.
    pub fn of_host() -> io::Result<Self> {
        Self::probe(&Kvm::new().map_err(os)?)
    }

    /// Runs all probes.
    pub fn probe(kvm: &Kvm) -> io::Result<Self> {
        Ok(Self {
            emulated_cpl0: emulated_cpl0(kvm)?,
            no_32bit_paging: no_32bit_paging(kvm)?,
            no_32bit_iret: no_32bit_iret(kvm)?,
            syscall_keeps_cpl: syscall_keeps_cpl(kvm)?,
            cpuid_leaks: cpuid_leaks(kvm)?,
            tsc_fixed: tsc_fixed(kvm)?,
            shadow_paging: shadow_paging(kvm)?,
            no_smm: kvm.check_extension_raw(KVM_CAP_X86_SMM.into()) <= 0,
            no_user_step: no_user_step(kvm)?,
            no_watchpoints: no_watchpoints(kvm)?,
            no_int3: no_int3(kvm)?,
            early_eoi: early_eoi(kvm)?,
        })
    }

    /// The names of those there are.
    pub fn names(&self) -> Vec<&'static str> {
        [
            ("emulated-cpl0", self.emulated_cpl0),
            ("no-32bit-paging", self.no_32bit_paging),
            ("no-32bit-iret", self.no_32bit_iret),
            ("syscall-keeps-cpl", self.syscall_keeps_cpl),
            ("cpuid-leaks", self.cpuid_leaks),
            ("tsc-fixed", self.tsc_fixed),
            ("shadow-paging", self.shadow_paging),
            ("no-smm", self.no_smm),
            ("no-user-step", self.no_user_step),
            ("no-watchpoints", self.no_watchpoints),
            ("no-int3", self.no_int3),
            ("early-eoi", self.early_eoi),
        ]
        .into_iter()
        .filter_map(|(name, on)| on.then_some(name))
        .collect()
    }
}

fn emulated_cpl0(kvm: &Kvm) -> io::Result<bool> {
    let p = Probe::new(kvm)?;
    // popcnt rax, rcx
    let popcnt = [0xf3, 0x48, 0x0f, 0xb8, 0xc1];
    Ok(p.run(&p.long(false), &code(&[&popcnt, &[HLT]]))? == End::Other(KVM_EXIT_INTERNAL_ERROR))
}

fn no_32bit_paging(kvm: &Kvm) -> io::Result<bool> {
    let p = Probe::new(kvm)?;
    // One 4 MiB page over itself.
    p.write(PML4, &0x83u32.to_le_bytes());
    let mut s = p.protected();
    (s.cr3, s.cr4) = (PML4, CR4_PSE);
    s.cr0 |= CR0_PG;
    match p.run(&s, &[HLT]) {
        Ok(end) => Ok(end != End::Halt),
        // Refused at once.
        Err(e) if e.raw_os_error() == Some(libc::EINVAL) => Ok(true),
        Err(e) => Err(e),
    }
}

fn no_32bit_iret(kvm: &Kvm) -> io::Result<bool> {
    let p = Probe::new(kvm)?;
    // The frame: EIP, CS, EFLAGS. Descriptor 1 must be a 32-bit one.
    p.store(GDT + 8, 0x00cf_9b00_0000_ffff);
    for (i, word) in [CODE as u32 + 1, 8, 2].into_iter().enumerate() {
        p.write(STACK + i as u64 * 4, &word.to_le_bytes());
    }
    Ok(p.run(&p.protected(), &[0xcf, HLT])? != End::Halt)
}

fn syscall_keeps_cpl(kvm: &Kvm) -> io::Result<bool> {
    let p = Probe::new(kvm)?;
    let target = CODE + 0x100;
    let entry = |index, data| kvm_msr_entry { index, data, ..Default::default() };
    // STAR: kernel selectors from 8, user selectors from 0x10 (+16 is the 64-bit code, +8 the data).
    let star = entry(0xc000_0081, 0x10 << 48 | 8 << 32);
    let msrs = Msrs::from_entries(&[star, entry(0xc000_0082, target)]).map_err(|_| io::ErrorKind::InvalidInput)?;
    p.vcpu.set_msrs(&msrs).map_err(os)?;
    p.write(target, &MARK_EAX);
    let end = p.run(&p.long(true), &[0x0f, 0x05])?;
    let cs = p.vcpu.get_sregs().map_err(os)?.cs;
    Ok(!matches!(end, End::Mark(0, _)) || cs.selector & 3 != 0)
}

fn cpuid_leaks(kvm: &Kvm) -> io::Result<bool> {
    let p = Probe::new(kvm)?;
    // xor eax, eax; cpuid; mov eax, ebx
    let ask = [0x31, 0xc0, 0x0f, 0xa2, 0x89, 0xd8];
    Ok(p.run(&p.long(true), &code(&[&ask, &MARK_EAX]))? != End::Mark(0, VENDOR.into()))
}

/// One of the probes alone.
pub fn tsc_fixed(kvm: &Kvm) -> io::Result<bool> {
    let p = Probe::new(kvm)?;
    let zero = Msrs::from_entries(&[kvm_msr_entry { index: 0x10, ..Default::default() }]);
    p.vcpu.set_msrs(&zero.map_err(|_| io::ErrorKind::InvalidInput)?).map_err(os)?;
    // rdtsc; mov eax, edx: the upper half of a counter that was just zero, and the host's is not.
    let end = p.run(&p.long(true), &code(&[&[0x0f, 0x31, 0x89, 0xd0], &MARK_EAX]))?;
    Ok(end != End::Mark(0, 0) && sys_x86::host_tsc() >> 32 != 0)
}

/// One of the probes alone.
pub fn shadow_paging(kvm: &Kvm) -> io::Result<bool> {
    let p = Probe::new(kvm)?;
    let entry = PML4 + 0x3000 + (DATA >> 12) * 8;
    p.store(DATA, 1);
    p.store(DATA + 0x1000, 2);
    // iretq to user code, which reads the data page.
    let user = CODE + 0x100;
    for (i, word) in [user, USER_CODE.into(), 2, STACK, USER_DATA.into()].into_iter().enumerate() {
        p.store(STACK + i as u64 * 8, word);
    }
    // mov eax, [DATA]
    p.write(user, &code(&[&[0x8b, 0x04, 0x25, 0, 0, 2, 0], &MARK_EAX]));
    // mov rax, cr3; mov cr3, rax; iretq
    let enter = [0x0f, 0x20, 0xd8, 0x0f, 0x22, 0xd8, 0x48, 0xcf];
    let first = p.run(&p.long(false), &enter)?;
    p.store(entry, (DATA + 0x1000) | PRESENT_ALL | 0x60);
    let second = p.run(&p.long(false), &enter)?;
    Ok(first == End::Mark(0, 1) && second == End::Mark(0, 1))
}

fn no_user_step(kvm: &Kvm) -> io::Result<bool> {
    let p = Probe::new(kvm)?;
    p.debug(KVM_GUESTDBG_SINGLESTEP, None)?;
    Ok(p.run(&p.long(true), &code(&[&[NOP, NOP], &MARK_EAX]))? != End::Other(KVM_EXIT_DEBUG))
}

fn no_watchpoints(kvm: &Kvm) -> io::Result<bool> {
    let p = Probe::new(kvm)?;
    p.debug(KVM_GUESTDBG_USE_HW_BP, Some(DATA))?;
    // mov [DATA], al
    let store = [0x88, 0x04, 0x25, 0, 0, 2, 0];
    Ok(p.run(&p.long(false), &code(&[&store, &[NOP, HLT]]))? != End::Other(KVM_EXIT_DEBUG))
}

fn no_int3(kvm: &Kvm) -> io::Result<bool> {
    let p = Probe::new(kvm)?;
    p.debug(KVM_GUESTDBG_USE_SW_BP, None)?;
    Ok(p.run(&p.long(false), &[0xcc, HLT])? != End::Other(KVM_EXIT_DEBUG))
}

fn early_eoi(kvm: &Kvm) -> io::Result<bool> {
    const VECTOR: u64 = 0x40;
    let p = Probe::with_chips(kvm, true)?;
    let handler = CODE + 0x100;
    p.store(IDT + VECTOR * 16, handler | 8 << 16 | 0x8e00 << 32);
    p.write(handler, &MARK_EAX);
    let mut s = p.long(false);
    (s.idtr.base, s.idtr.limit) = (IDT, 0xfff);
    s.apic_base |= APIC_BASE_X2APIC;
    // SVR: on, then an interrupt to itself, then open.
    let wrmsr = |msr: u32, value: u32| {
        let (msr, value) = (msr.to_le_bytes(), value.to_le_bytes());
        code(&[&[0xb9], &msr, &[0xb8], &value, &[0x31, 0xd2, 0x0f, 0x30]])
    };
    let sti = [0xfb, NOP, NOP, HLT];
    let end = p.run(&s, &code(&[&wrmsr(0x80f, 0x1ff), &wrmsr(0x83f, VECTOR as u32), &sti]))?;
    let page = p.vcpu.get_lapic().map_err(os)?;
    // Bit 0 of the third word of ISR.
    let in_service = page.regs[0x120] & 1 != 0;
    Ok(end == End::Mark(0, VECTOR) && !in_service)
}
