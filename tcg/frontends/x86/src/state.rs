//! Everything of an x86 vCPU that is not in slots.
//!
//! Spec: SDM volume 1 chapter 3, volume 3 chapters 2, 3, 10 and 18.

use mimus_arch::x86::msr as number;
use mimus_arch::x86::regs::*;
use mimus_arch::x86::state::{Segment, TableRegister, attr};
use mimus_arch::x86::{X86Model, X86State};
use mimus_tcg_exec::frontend::PublishedTsc;
use std::sync::Arc;

use crate::cpuid::Features;
use crate::exception::{Exception, Result};
use crate::msr::Msrs;

/// Segment registers, in encoding order.
pub const ES: usize = 0;
pub const CS: usize = 1;
pub const SS: usize = 2;
pub const DS: usize = 3;
pub const FS: usize = 4;
pub const GS: usize = 5;
/// How many there are.
pub const SEGMENTS: usize = 6;

/// The flags that arithmetic sets: they are in a slot, the others in [`State::flags`].
pub const ARITH: u64 = RFLAGS_CF | RFLAGS_PF | RFLAGS_AF | RFLAGS_ZF | RFLAGS_SF | RFLAGS_OF;
/// The flags in [`State::flags`].
pub const SYSTEM: u64 = RFLAGS_TF
    | RFLAGS_IF
    | RFLAGS_DF
    | RFLAGS_IOPL
    | RFLAGS_NT
    | RFLAGS_RF
    | RFLAGS_VM
    | RFLAGS_AC
    | RFLAGS_VIF
    | RFLAGS_VIP
    | RFLAGS_ID;

/// SSE instructions cannot be used.
pub const GUARD_SSE: u8 = 1;
/// AVX instructions cannot be used.
pub const GUARD_AVX: u8 = 2;
/// MXCSR has exceptions that are not masked.
pub const GUARD_MXCSR: u8 = 4;
/// x87 and MMX instructions cannot be used, or may raise exceptions.
pub const GUARD_X87: u8 = 8;

/// Exception masks of MXCSR.
pub const MXCSR_MASKS: u32 = 0x1f80;
/// MXCSR of AMD's: SSE operands need not be aligned.
pub const MXCSR_MM: u32 = 1 << 17;
/// Exception masks of the x87 control word.
const FCW_MASKS: u16 = 0x3f;

/// How instructions are decoded and addresses made.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Mode {
    /// Real mode.
    Real,
    /// Virtual-8086 mode.
    V86,
    /// Protected mode, or the compatibility mode of long mode.
    Protected,
    /// 64-bit code.
    Long,
}

/// The x87 and SSE registers as FXSAVE stores them.
#[repr(C, align(64))]
#[derive(Clone, Copy)]
pub struct FxArea(pub [u8; 512]);

/// An unmasked SSE or x87 exception state and where the last x87 instruction was (SDM volume 1 section 8.1.8).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct FpuPointers {
    /// Last instruction's selector, offset and opcode.
    pub cs: u16,
    pub ip: u64,
    pub opcode: u16,
    /// Its operand's selector and offset.
    pub ds: u16,
    pub dp: u64,
}

/// A vCPU's state.
#[repr(C, align(64))]
pub struct State {
    /// YMM registers, 32 bytes each.
    pub vec: [[u64; 4]; 16],
    /// The x87 unit while the vCPU does not run (see [`crate::native`]).
    pub fx: FxArea,
    /// SSE control and status.
    pub mxcsr: u32,
    /// The x87 control word while the vCPU runs.
    pub fcw: u16,
    /// What units' instructions have to be looked at one by one: `GUARD_` bits, see [`State::update_guards`].
    pub guards: u8,
    /// The current privilege level.
    pub cpl: u8,
    /// [`SYSTEM`] flags.
    pub flags: u64,
    /// ES, CS, SS, DS, FS, GS. Their bases are also in slots.
    pub seg: [Segment; SEGMENTS],
    pub ldtr: Segment,
    pub tr: Segment,
    pub gdtr: TableRegister,
    pub idtr: TableRegister,
    pub cr0: u64,
    pub cr2: u64,
    pub cr3: u64,
    pub cr4: u64,
    /// Task priority where no local APIC holds it.
    pub cr8: u64,
    pub efer: u64,
    /// PAE's page-directory-pointer entries.
    pub pdptr: [u64; 4],
    pub dr: [u64; 4],
    pub dr6: u64,
    pub dr7: u64,
    pub xcr0: u64,
    /// What the protection keys of pages allow: two bits a key.
    pub pkru: u32,
    pub apic_base: u64,
    /// Model-specific registers.
    pub msrs: Msrs,
    /// TSC = virtual clock × `tsc_khz` / 10^6 + `tsc_offset`.
    pub tsc_khz: u32,
    pub tsc_offset: u64,
    /// Both, for the local APIC's timer.
    pub tsc_published: Arc<PublishedTsc>,
    pub fpu_pointers: FpuPointers,
    /// Interrupts wait until after the next instruction.
    pub shadow: bool,
    /// It was a load of SS: an instruction breakpoint there is not met either.
    pub shadow_ss: bool,
    /// The instruction that RF is of, if it is set: what stands in the flags behind it has gone.
    pub resume_at: u64,
    /// Where a task goes on whose switch has raised an exception: the exception is the new task's.
    pub task_entry: Option<u64>,
    /// DR6 bits of data breakpoints that a load of SS met: raised after the next instruction.
    pub held_back: u64,
    /// An NMI handler runs.
    pub nmi_masked: bool,
    /// An NMI waits for it.
    pub nmi_pending: bool,
    /// In system management mode.
    pub smm: bool,
    /// [`State::nmi_masked`] outside of it.
    pub smm_inside_nmi: bool,
    /// What the model has, for CPUID and for the decoder.
    pub features: Features,
    /// Number of the vCPU.
    pub index: u32,
    /// Physical address bits.
    pub phys_bits: u8,
}

impl State {
    /// The state at power-on of vCPU `index`.
    pub fn new(model: &X86Model, index: u32) -> Self {
        let features = Features::new(model, index);
        let reset = X86State::reset(index == 0);
        let phys_bits = features.phys_bits;
        let mut state = Self {
            vec: [[0; 4]; 16],
            fx: FxArea([0; 512]),
            mxcsr: MXCSR_RESET,
            fcw: FCW_RESET,
            guards: GUARD_SSE | GUARD_AVX | GUARD_X87,
            cpl: 0,
            flags: 0,
            seg: [Segment::default(); 6],
            ldtr: reset.ldtr,
            tr: reset.tr,
            gdtr: reset.gdtr,
            idtr: reset.idtr,
            cr0: reset.cr0,
            cr2: 0,
            cr3: 0,
            cr4: 0,
            cr8: 0,
            efer: 0,
            pdptr: [0; 4],
            dr: [0; 4],
            dr6: DR6_FIXED,
            dr7: DR7_FIXED,
            xcr0: XCR0_X87,
            pkru: 0,
            apic_base: reset.apic_base,
            msrs: Msrs::new(),
            tsc_khz: 1_000_000,
            tsc_offset: 0,
            tsc_published: Arc::default(),
            fpu_pointers: FpuPointers::default(),
            shadow: false,
            shadow_ss: false,
            resume_at: 0,
            task_entry: None,
            held_back: 0,
            nmi_masked: false,
            nmi_pending: false,
            smm: false,
            smm_inside_nmi: false,
            features,
            index,
            phys_bits,
        };
        state.seg = [reset.es, reset.cs, reset.ss, reset.ds, reset.fs, reset.gs];
        state.reset_fpu();
        state
    }

    /// x87 and SSE as at power-on.
    pub fn reset_fpu(&mut self) {
        self.vec = [[0; 4]; 16];
        self.fx = FxArea([0; 512]);
        self.fx.0[..2].copy_from_slice(&FCW_RESET.to_le_bytes());
        self.mxcsr = MXCSR_RESET;
        self.fpu_pointers = FpuPointers::default();
    }

    /// Paging, protection and code size in one.
    pub fn mode(&self) -> Mode {
        if self.cr0 & CR0_PE == 0 {
            Mode::Real
        } else if self.flags & RFLAGS_VM != 0 {
            Mode::V86
        } else if self.long() && self.seg[CS].attributes & attr::L != 0 {
            Mode::Long
        } else {
            Mode::Protected
        }
    }

    /// Bits of MXCSR that exist.
    pub fn mxcsr_mask(&self) -> u32 {
        if self.features.misaligned_sse { 0xffff | MXCSR_MM } else { 0xffff }
    }

    /// Sets what translated code looks at, after control registers may have changed.
    pub fn update_guards(&mut self) {
        let bit = |mask: u8, on: bool| if on { mask } else { 0 };
        let task_switched = self.cr0 & CR0_TS != 0;
        let emulated = task_switched || self.cr0 & CR0_EM != 0;
        self.guards = bit(GUARD_SSE, emulated || self.cr4 & CR4_OSFXSR == 0)
            | bit(GUARD_AVX, task_switched || self.cr4 & CR4_OSXSAVE == 0 || self.xcr0 & 6 != 6)
            | bit(GUARD_MXCSR, self.mxcsr & MXCSR_MASKS != MXCSR_MASKS)
            | bit(GUARD_X87, emulated || self.fcw & FCW_MASKS != FCW_MASKS);
    }

    /// Pages can be barred from execution: the processor can, and IA32_MISC_ENABLE does not hide it.
    pub fn has_nx(&self) -> bool {
        self.features.nx && self.msrs.misc_enable & number::MISC_ENABLE_XD_DISABLE == 0
    }

    /// IA-32e mode is active.
    pub fn long(&self) -> bool {
        self.efer & EFER_LMA != 0
    }

    /// 64-bit code runs.
    pub fn is_64bit(&self) -> bool {
        self.long() && self.seg[CS].attributes & attr::L != 0
    }

    /// Bits of code: 16, 32 or 64.
    pub fn code_bits(&self) -> u32 {
        if self.is_64bit() {
            64
        } else if self.seg[CS].attributes & attr::DB != 0 {
            32
        } else {
            16
        }
    }

    /// What the instruction pointer is truncated to.
    pub fn ip_mask(&self) -> u64 {
        if self.is_64bit() { !0 } else { 0xffff_ffff }
    }

    /// Width of the stack pointer in bytes (SDM volume 1 section 6.2.3).
    pub fn stack_bytes(&self) -> u32 {
        if self.is_64bit() {
            8
        } else if self.seg[SS].attributes & attr::DB != 0 {
            4
        } else {
            2
        }
    }

    /// The mask of [`State::stack_bytes`].
    pub fn stack_mask(&self) -> u64 {
        mask(self.stack_bytes())
    }

    /// I/O privilege level.
    pub fn iopl(&self) -> u8 {
        (self.flags >> 12 & 3) as u8
    }

    /// Whether external interrupts are open.
    pub fn interrupts_open(&self) -> bool {
        self.flags & RFLAGS_IF != 0 && !self.shadow
    }

    /// A canonical address (SDM volume 1 section 3.3.7.1).
    pub fn canonical(&self, va: u64) -> bool {
        let shift = if self.cr4 & CR4_LA57 != 0 { 64 - 57 } else { 64 - 48 };
        ((va << shift) as i64 >> shift) as u64 == va
    }

    /// Whether the base of a segment or table, an MSR or an invalidation takes the address: processors that can have 57 bits
    /// take as many whatever CR4.LA57 says.
    pub fn canonical_base(&self, va: u64) -> bool {
        let shift = if self.features.la57 { 64 - 57 } else { 64 - 48 };
        ((va << shift) as i64 >> shift) as u64 == va
    }

    /// The TSC when the virtual clock stands at `ns`.
    pub fn tsc(&self, ns: u64) -> u64 {
        ticks(ns, self.tsc_khz).wrapping_add(self.tsc_offset)
    }

    /// Makes the TSC `value` when the clock stands at `ns`.
    pub fn set_tsc(&mut self, ns: u64, value: u64) {
        self.set_tsc_offset(value.wrapping_sub(ticks(ns, self.tsc_khz)));
    }

    /// Makes the TSC so much more than the clock's ticks.
    pub fn set_tsc_offset(&mut self, offset: u64) {
        self.tsc_offset = offset;
        self.tsc_published.publish(self.tsc_khz, offset);
    }

    /// What of the state translated code depends on, beside the bytes: 12 bits.
    ///
    /// Bits 1:0 code size (0: 16, 1: 32, 2: 64), 2 stack is 32-bit, 3 all of CS, DS, ES and SS are flat,
    /// 4 real or virtual-8086 mode, 6:5 privilege (0, 3, other), 7 FS and 8 GS cover 4 GiB from a base. Systems keep
    /// what is theirs behind FS at privilege 0, where GS may be any program's: it does not count there, or the
    /// system's code would be translated again for each. 9: alignment is checked. 10: decoded as AMD does.
    pub fn code_mode(&self) -> u16 {
        let bits = match self.code_bits() {
            16 => 0,
            32 => 1,
            _ => 2,
        };
        let stack = u16::from(self.seg[SS].attributes & attr::DB != 0);
        let real = u16::from(matches!(self.mode(), Mode::Real | Mode::V86));
        let ring = match self.cpl {
            0 => 0,
            3 => 1,
            _ => 2,
        };
        let rest = ring << 5 | u16::from(self.alignment_checked()) << 9 | u16::from(self.features.amd) << 10;
        if bits == 2 {
            return bits | rest;
        }
        let fs = u16::from(real == 0 && covers(&self.seg[FS]));
        let gs = u16::from(real == 0 && ring != 0 && covers(&self.seg[GS]));
        bits | stack << 2 | u16::from(self.flat()) << 3 | real << 4 | rest | fs << 7 | gs << 8
    }

    /// Data accesses that are not aligned raise `#AC` (SDM volume 3 section 7.15, interrupt 17).
    pub fn alignment_checked(&self) -> bool {
        self.cpl == 3 && self.flags & RFLAGS_AC != 0 && self.cr0 & CR0_AM != 0
    }

    /// Checks the alignment of an access of `bytes` at a linear address, which are as much as it has to be aligned to:
    /// a power of two, or nothing is asked. Intel's processors ask nothing of what is wider than eight bytes (SDM volume 2
    /// table 2-21 "of 8 bytes or less").
    ///
    /// # Errors
    /// `#AC(0)`
    pub fn check_alignment(&self, va: u64, bytes: u32) -> Result<()> {
        let alignment = match bytes {
            10 => 8,
            16.. if !self.features.amd => 1,
            32.. => 16,
            other => other,
        };
        let wrong = alignment.is_power_of_two() && va & u64::from(alignment - 1) != 0;
        if wrong && self.alignment_checked() { Err(Exception::with_code(VECTOR_AC, 0)) } else { Ok(()) }
    }

    /// CS, DS, ES and SS cover all 4 GiB, readable and (but CS) writable: nothing needs a check.
    pub fn flat(&self) -> bool {
        let whole =
            |s: &Segment| s.base == 0 && s.limit == u32::MAX && s.attributes & (attr::UNUSABLE | attr::P) == attr::P;
        let data = |s: &Segment| whole(s) && s.attributes & 0xe == 2;
        whole(&self.seg[CS])
            && self.seg[CS].attributes & 2 != 0
            && [ES, SS, DS].iter().all(|&i| data(&self.seg[i]))
            && self.cr0 & CR0_PE != 0
            && self.flags & RFLAGS_VM == 0
    }

    /// Names the address space for the software TLB (see `GuestFrontend::context_key`): the code mode, whether
    /// data accesses are a user's, whether SMAP forbids a user's pages, SMM, and the PCID. Changes of anything else that
    /// translations depend on empty the TLB.
    pub fn context_key(&self) -> u64 {
        let user = u64::from(self.cpl == 3);
        let smap = u64::from(self.smap_active());
        u64::from(self.code_mode()) | user << 12 | smap << 13 | u64::from(self.smm) << 14 | self.pcid() << 16
    }

    fn pcid(&self) -> u64 {
        if self.cr4 & CR4_PCIDE != 0 { self.cr3 & 0xfff } else { 0 }
    }

    /// Mask and bits of the [`State::context_key`]s of contexts that have what implicit supervisor accesses are granted: to descriptor
    /// tables, task-state segments and stacks of exceptions. AC excuses none from SMAP (SDM volume 3 section 5.6.1).
    pub fn system_key(&self) -> (u64, u64) {
        let smap = u64::from(self.cr4 & CR4_SMAP != 0);
        (0xfff << 16 | 7 << 12, smap << 13 | u64::from(self.smm) << 14 | self.pcid() << 16)
    }

    /// SMAP forbids explicit supervisor accesses to user pages now (SDM volume 3 section 5.6.1).
    pub fn smap_active(&self) -> bool {
        self.cr4 & CR4_SMAP != 0 && self.cpl != 3 && self.flags & RFLAGS_AC == 0
    }
}

/// A [`State::code_mode`] taken apart.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct CodeMode(pub u16);

impl CodeMode {
    /// Code size: 16, 32 or 64.
    pub const fn bits(self) -> u32 {
        match self.0 & 3 {
            0 => 16,
            1 => 32,
            _ => 64,
        }
    }

    /// Width of the stack pointer in bytes.
    pub const fn stack_bytes(self) -> u32 {
        match (self.0 & 3, self.0 & 4) {
            (2.., _) => 8,
            (_, 0) => 2,
            _ => 4,
        }
    }

    /// CS, DS, ES and SS need no check.
    pub const fn flat(self) -> bool {
        self.bits() == 64 || self.0 & 8 != 0
    }

    /// Real or virtual-8086 mode.
    pub const fn real(self) -> bool {
        self.0 & 16 != 0
    }

    /// Protected or long mode at privilege level 0.
    pub const fn kernel(self) -> bool {
        !self.real() && self.0 >> 5 & 3 == 0
    }

    /// Alignment is checked.
    pub const fn aligned(self) -> bool {
        self.0 & 512 != 0
    }

    /// Decoded as AMD's processors do.
    pub const fn amd(self) -> bool {
        self.0 & 1024 != 0
    }

    /// FS or GS needs no check outside of 64-bit mode, but has a base.
    pub const fn whole(self, seg: usize) -> bool {
        self.bits() == 32 && self.0 >> (7 + seg - FS) & 1 != 0
    }
}

/// A readable and writable data segment of 4 GiB.
fn covers(s: &Segment) -> bool {
    s.limit == u32::MAX && s.attributes & (attr::UNUSABLE | attr::P) == attr::P && s.attributes & 0xe == 2
}

/// The PCID of a [`State::context_key`].
pub fn key_pcid(key: u64) -> u64 {
    key >> 16 & 0xfff
}

/// Low `bytes` bytes (1 to 8).
pub const fn mask(bytes: u32) -> u64 {
    if bytes >= 8 { !0 } else { (1 << (bytes * 8)) - 1 }
}

/// Sign-extends the low `bytes` bytes.
pub const fn sext(value: u64, bytes: u32) -> u64 {
    let shift = 64 - bytes * 8;
    ((value << shift) as i64 >> shift) as u64
}

fn ticks(ns: u64, khz: u32) -> u64 {
    // Without the long division in the first hours.
    match ns.checked_mul(khz.into()) {
        Some(product) => product / 1_000_000,
        None => (u128::from(ns) * u128::from(khz) / 1_000_000) as u64,
    }
}
