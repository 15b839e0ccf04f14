//! Stubs: one guest instruction as a function.
#![allow(unsafe_code)]

use iced_x86::{
    Code, CpuidFeature, Encoder, EncodingKind, Instruction, InstructionInfoFactory, Mnemonic, OpAccess, OpKind,
    Register,
};

use super::arena::Arena;
use crate::state::{MXCSR_MM, State};

/// Where the guest's registers are, as stubs get them.
pub type StubFn = extern "C" fn(slots: *mut u64, memory: *mut u8, vectors: *mut [u64; 4], flags: u64) -> u64;

/// What the memory operand is used for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Memory {
    None,
    Read,
    Write,
    ReadWrite,
}

/// Which unit an instruction belongs to: what must be on for it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Unit {
    Integer,
    X87,
    Mmx,
    Sse,
    Avx,
}

/// A stub and what its caller must know.
#[derive(Clone, Copy)]
pub struct Built {
    pub run: StubFn,
    pub memory: Memory,
    /// Bytes of the memory operand.
    pub bytes: u32,
    /// The memory operand must be aligned to its size.
    pub aligned: bool,
    pub unit: Unit,
    /// Depends on MXCSR and sets its flags.
    pub mxcsr: bool,
    /// The instruction sets RFLAGS.
    pub sets_flags: bool,
}

/// General registers that explicit operands are moved to.
const POOL: [Register; 4] = [Register::R8, Register::R9, Register::RAX, Register::RCX];

#[derive(Clone, Copy)]
struct Gpr {
    guest: u8,
    host: Register,
    read: bool,
    write: bool,
}

/// String comparisons with lengths in RAX and RDX.
fn is_explicit_length(m: Mnemonic) -> bool {
    use Mnemonic::*;
    matches!(
        m,
        Pcmpestri | Pcmpestri64 | Pcmpestrm | Pcmpestrm64 | Vpcmpestri | Vpcmpestri64 | Vpcmpestrm | Vpcmpestrm64
    )
}

/// How a register is written in the encodings below: its number.
fn number(r: Register) -> u8 {
    r.full_register().number() as u8
}

/// Builds stubs.
pub struct Native {
    arena: Arena,
    generation: u32,
    info: InstructionInfoFactory,
    avx: bool,
}

impl Native {
    /// An empty one.
    ///
    /// # Errors
    /// One line: what the host lacks.
    pub fn new() -> Result<Self, String> {
        let arena = Arena::new().map_err(|e| format!("executable memory: {e}"))?;
        Ok(Self { arena, generation: 0, info: InstructionInfoFactory::new(), avx: is_x86_feature_detected!("avx") })
    }

    /// Stubs of earlier generations are not there any more.
    pub fn generation(&self) -> u32 {
        self.generation
    }

    /// Makes the stub for an instruction; `None` if it cannot be one.
    pub fn build(&mut self, insn: &Instruction) -> Option<Built> {
        let mut code = Vec::new();
        let mut built = self.emit(insn, &mut code)?;
        let at = match self.arena.push(&code) {
            Some(at) => at,
            None => {
                self.arena.clear();
                self.generation = self.generation.wrapping_add(1);
                self.arena.push(&code)?
            }
        };
        // SAFETY: a function of this type has just been written there.
        built.run = unsafe { std::mem::transmute::<usize, StubFn>(at) };
        Some(built)
    }

    fn emit(&mut self, insn: &Instruction, out: &mut Vec<u8>) -> Option<Built> {
        let unit = unit_of(insn);
        if unit == Unit::Avx && !self.avx || insn.is_vsib() {
            return None;
        }
        let mut host = *insn;
        let used = self.info.info(insn);
        let mut gprs: Vec<Gpr> = Vec::new();
        let mut vectors: Vec<(u8, bool, bool)> = Vec::new();
        let code = insn.code().op_code();
        let fixed = |i: u32| {
            use iced_x86::OpCodeOperandKind as K;
            matches!(code.op_kind(i), K::al | K::cl | K::ax | K::dx | K::eax | K::rax)
        };
        let named =
            (0..insn.op_count()).filter(|&i| insn.op_kind(i) == OpKind::Register && insn.op_register(i).is_gpr());
        let (fixed_operands, free): (Vec<u32>, Vec<u32>) = named.partition(|&i| fixed(i));
        let explicit: Vec<Register> = free.iter().map(|&i| insn.op_register(i).full_register()).collect();
        let writes = |r: Register| {
            used.used_registers().iter().any(|u| u.register().full_register() == r && access(u.access()).1)
        };
        for &i in &fixed_operands {
            let full = insn.op_register(i).full_register();
            gprs.push(Gpr {
                guest: number(full),
                host: full,
                read: true,
                write: writes(full) && !explicit.contains(&full),
            });
        }
        if insn.mnemonic() == Mnemonic::Mulx {
            // Multiplies by RDX, whatever its operands are.
            gprs.push(Gpr { guest: number(Register::RDX), host: Register::RDX, read: true, write: false });
        }
        let is_address = |r: Register| {
            let full = r.full_register();
            full == insn.memory_base().full_register() || full == insn.memory_index().full_register()
        };
        for r in used.used_registers() {
            let (read, write) = access(r.access());
            let register = r.register();
            if register.is_vector_register() {
                // A legacy SSE instruction leaves what is above its register; so does a partial write.
                vectors.push((number(register), true, write));
                let _ = read;
            } else if register.is_gpr() {
                let full = register.full_register();
                let named = explicit.contains(&full);
                if !named && is_address(full) && !write {
                    continue;
                }
                if !named && !gprs.iter().any(|g| g.host == full) {
                    // Implicit: only those a stub can leave in place.
                    if !matches!(full, Register::RAX | Register::RCX | Register::RDX) {
                        return None;
                    }
                    gprs.push(Gpr { guest: number(full), host: full, read: true, write });
                }
            } else if !(register.is_st() || register.is_mm() || register.is_segment_register() || register.is_ip()) {
                return None;
            }
        }
        // Read besides what is named, even if it is a destination or part of the address too.
        let besides: &[Register] = match insn.mnemonic() {
            Mnemonic::Mulx => &[Register::RDX],
            m if is_explicit_length(m) => &[Register::RAX, Register::RDX],
            _ => &[],
        };
        for &r in besides {
            if !gprs.iter().any(|g| g.host == r) {
                gprs.push(Gpr { guest: number(r), host: r, read: true, write: false });
            }
        }
        let mut pool = POOL.iter().filter(|&&p| !gprs.iter().any(|g| g.host == p)).collect::<Vec<_>>().into_iter();
        let mut moved: Vec<Gpr> = Vec::new();
        for &i in &free {
            let operand = insn.op_register(i);
            if matches!(operand, Register::AH | Register::CH | Register::DH | Register::BH) {
                return None;
            }
            let full = operand.full_register();
            let guest = number(full);
            let to = match moved.iter().find(|g| g.guest == guest) {
                Some(g) => g.host,
                None => {
                    let to = *pool.next()?;
                    moved.push(Gpr { guest, host: to, read: true, write: writes(full) });
                    to
                }
            };
            host.set_op_register(i, sized(to, operand.size()));
        }
        gprs.extend(moved);
        let memory = memory_of(used.used_memory().iter().map(|m| m.access()));
        let has_memory = (0..insn.op_count()).any(|i| insn.op_kind(i) == OpKind::Memory);
        if memory != Memory::None && !has_memory {
            return None;
        }
        if has_memory {
            host.set_memory_base(Register::RSI);
            host.set_memory_index(Register::None);
            host.set_memory_index_scale(1);
            host.set_memory_displacement64(0);
            host.set_memory_displ_size(0);
            host.set_segment_prefix(Register::None);
        }
        let sets_flags = insn.rflags_modified() != 0;
        let rflags_read = sets_flags || insn.rflags_read() != 0;
        self.write(&host, unit, &gprs, &vectors, rflags_read, sets_flags, out)?;
        let bytes = insn.memory_size().size() as u32;
        Some(Built {
            run: nothing,
            memory: if has_memory { memory } else { Memory::None },
            bytes: if bytes == 0 { odd_size(insn) } else { bytes },
            aligned: needs_alignment(insn),
            unit,
            mxcsr: uses_mxcsr(insn, unit),
            sets_flags,
        })
    }

    #[allow(clippy::too_many_arguments)]
    fn write(
        &self,
        host: &Instruction,
        unit: Unit,
        gprs: &[Gpr],
        vectors: &[(u8, bool, bool)],
        flags_in: bool,
        flags_out: bool,
        out: &mut Vec<u8>,
    ) -> Option<()> {
        let wide = unit == Unit::Avx;
        // mov r10, rdx
        out.extend([0x49, 0x89, 0xd2]);
        if flags_in {
            // push rcx; popfq
            out.extend([0x51, 0x9d]);
        }
        let mut done = [false; 16];
        for &(n, _, _) in vectors {
            if !std::mem::replace(&mut done[usize::from(n & 15)], true) {
                vector_move(out, n, wide, false);
            }
        }
        for g in gprs.iter().filter(|g| g.read) {
            gpr_move(out, g, false);
        }
        let mut encoder = Encoder::new(64);
        encoder.encode(host, 0).ok()?;
        out.extend(encoder.take_buffer());
        for g in gprs.iter().filter(|g| g.write) {
            gpr_move(out, g, true);
        }
        done = [false; 16];
        for &(n, _, _) in vectors.iter().filter(|v| v.2) {
            if !std::mem::replace(&mut done[usize::from(n & 15)], true) {
                vector_move(out, n, wide, true);
            }
        }
        if flags_out {
            // pushfq; pop rax
            out.extend([0x9c, 0x58]);
        }
        if wide {
            // vzeroupper
            out.extend([0xc5, 0xf8, 0x77]);
        }
        out.push(0xc3);
        Some(())
    }
}

extern "C" fn nothing(_: *mut u64, _: *mut u8, _: *mut [u64; 4], flags: u64) -> u64 {
    flags
}

fn access(access: OpAccess) -> (bool, bool) {
    match access {
        OpAccess::Read | OpAccess::CondRead => (true, false),
        OpAccess::Write | OpAccess::CondWrite => (false, true),
        OpAccess::ReadWrite | OpAccess::ReadCondWrite => (true, true),
        _ => (false, false),
    }
}

fn memory_of(accesses: impl Iterator<Item = OpAccess>) -> Memory {
    let (mut read, mut write) = (false, false);
    for a in accesses {
        let (r, w) = access(a);
        read |= r || a == OpAccess::CondWrite;
        write |= w;
    }
    match (read, write) {
        (false, false) => Memory::None,
        (true, false) => Memory::Read,
        (false, true) => Memory::Write,
        (true, true) => Memory::ReadWrite,
    }
}

fn sized(r: Register, bytes: usize) -> Register {
    let index = r as usize - Register::RAX as usize;
    let base = match bytes {
        1 => {
            // AL, CL, DL, BL, then the legacy high bytes, then SPL on; R8L follows DIL.
            return match r {
                Register::RAX => Register::AL,
                Register::RCX => Register::CL,
                Register::R8 => Register::R8L,
                _ => Register::R9L,
            };
        }
        2 => Register::AX,
        4 => Register::EAX,
        _ => Register::RAX,
    };
    base + index as u32
}

/// `vmovdqu ymmN, [r10 + 32 * N]` or `movups xmmN, …`, or the other way.
fn vector_move(out: &mut Vec<u8>, n: u8, wide: bool, store: bool) {
    let high = n >> 3 & 1;
    if wide {
        // VEX.256.F3.0F 6F / 7F: R inverted, B set for r10.
        out.extend([0xc4, (1 - high) << 7 | 0x41, 0x7e, if store { 0x7f } else { 0x6f }]);
    } else {
        out.extend([0x41 | high << 2, 0x0f, if store { 0x11 } else { 0x10 }]);
    }
    out.push(0x82 | (n & 7) << 3);
    out.extend((i32::from(n) * 32).to_le_bytes());
}

/// `mov host, [rdi + 8 * guest]` or the other way.
fn gpr_move(out: &mut Vec<u8>, g: &Gpr, store: bool) {
    let n = number(g.host);
    out.extend([0x48 | (n >> 3) << 2, if store { 0x89 } else { 0x8b }, 0x47 | (n & 7) << 3, g.guest * 8]);
}

/// The unit an instruction belongs to.
pub fn unit_of(insn: &Instruction) -> Unit {
    if insn.encoding() == EncodingKind::VEX {
        use CpuidFeature as C;
        let integer = insn.cpuid_features().iter().all(|f| matches!(f, C::BMI1 | C::BMI2 | C::ADX));
        return if integer { Unit::Integer } else { Unit::Avx };
    }
    let mut unit = Unit::Integer;
    for f in insn.cpuid_features() {
        match f {
            CpuidFeature::FPU | CpuidFeature::FPU287 | CpuidFeature::FPU387 => return Unit::X87,
            CpuidFeature::MMX if uses_mmx(insn) => return Unit::Mmx,
            CpuidFeature::SSE
            | CpuidFeature::SSE2
            | CpuidFeature::SSE3
            | CpuidFeature::SSSE3
            | CpuidFeature::SSE4_1
            | CpuidFeature::SSE4_2
            | CpuidFeature::SSE4A
            | CpuidFeature::AES
            | CpuidFeature::PCLMULQDQ
            | CpuidFeature::SHA
            | CpuidFeature::GFNI => unit = Unit::Sse,
            _ => {}
        }
    }
    if insn.mnemonic() == Mnemonic::Fisttp {
        return Unit::X87;
    }
    if unit == Unit::Sse && uses_mmx(insn) && !vector_operands(insn) {
        return Unit::Mmx;
    }
    // These belong to SSE by name only.
    let integer = matches!(
        insn.mnemonic(),
        Mnemonic::Crc32
            | Mnemonic::Movnti
            | Mnemonic::Popcnt
            | Mnemonic::Lfence
            | Mnemonic::Mfence
            | Mnemonic::Sfence
            | Mnemonic::Prefetchnta
            | Mnemonic::Prefetcht0
            | Mnemonic::Prefetcht1
            | Mnemonic::Prefetcht2
            | Mnemonic::Pause
    );
    if unit == Unit::Sse && integer {
        return Unit::Integer;
    }
    unit
}

fn vector_operands(insn: &Instruction) -> bool {
    let named =
        (0..insn.op_count()).any(|i| insn.op_kind(i) == OpKind::Register && insn.op_register(i).is_vector_register());
    named
        || matches!(
            insn.code(),
            Code::VEX_Vzeroupper | Code::VEX_Vzeroall | Code::VEX_Vldmxcsr_m32 | Code::VEX_Vstmxcsr_m32
        )
}

/// Whether an instruction names MMX registers, or is EMMS.
pub fn uses_mmx(insn: &Instruction) -> bool {
    let named = (0..insn.op_count()).any(|i| insn.op_kind(i) == OpKind::Register && insn.op_register(i).is_mm());
    named || insn.mnemonic() == Mnemonic::Emms
}

/// SDM volume 1 section 11.6.11 and volume 2 chapter 2.7: legacy SSE instructions with 16-byte operands ask for
/// alignment, but for those named unaligned; VEX forms only where the name says aligned.
pub fn needs_alignment(insn: &Instruction) -> bool {
    use Mnemonic::*;
    let size = insn.memory_size().size();
    if insn.encoding() == EncodingKind::VEX {
        return matches!(insn.mnemonic(), Vmovaps | Vmovapd | Vmovdqa | Vmovntps | Vmovntpd | Vmovntdq | Vmovntdqa);
    }
    size == 16
        && !matches!(insn.mnemonic(), Movups | Movupd | Movdqu | Lddqu | Pcmpistri | Pcmpistrm)
        && !is_explicit_length(insn.mnemonic())
}

/// Whether [`needs_alignment`] counts now: AMD's SHA instructions ask for nothing, and a bit of MXCSR excuses SSE's but
/// for moves whose alignment is all there is to them (measured; APM volume 1 section 4.2.2).
pub fn asks_for_alignment(insn: &Instruction, st: &State) -> bool {
    use Mnemonic::*;
    let name = insn.mnemonic();
    let sha = matches!(name, Sha1msg1 | Sha1msg2 | Sha1nexte | Sha1rnds4 | Sha256msg1 | Sha256msg2 | Sha256rnds2);
    let moves = matches!(name, Movaps | Movapd | Movdqa | Movntps | Movntpd | Movntdq | Movntdqa);
    let excused =
        insn.encoding() == EncodingKind::Legacy && (st.mxcsr & MXCSR_MM != 0 && !moves || sha && st.features.amd);
    needs_alignment(insn) && !excused
}

/// Memory operands whose size the decoder does not say.
fn odd_size(insn: &Instruction) -> u32 {
    match insn.mnemonic() {
        Mnemonic::Fxsave | Mnemonic::Fxsave64 | Mnemonic::Fxrstor | Mnemonic::Fxrstor64 => 512,
        _ => 0,
    }
}

/// Whether an instruction rounds or raises floating-point flags.
pub fn uses_mxcsr(insn: &Instruction, unit: Unit) -> bool {
    use Mnemonic::*;
    if !matches!(unit, Unit::Sse | Unit::Avx | Unit::Mmx) {
        return false;
    }
    // All that is certainly integer, moves and logic; the rest may look at MXCSR.
    let name = insn.mnemonic();
    let quiet = matches!(
        name,
        Movaps
            | Movups
            | Movapd
            | Movupd
            | Movss
            | Movsd
            | Movlps
            | Movhps
            | Movlpd
            | Movhpd
            | Movhlps
            | Movlhps
            | Movd
            | Movq
            | Movdqa
            | Movdqu
            | Lddqu
            | Movntps
            | Movntpd
            | Movntdq
            | Movntdqa
            | Movntq
            | Movmskps
            | Movmskpd
            | Andps
            | Andpd
            | Andnps
            | Andnpd
            | Orps
            | Orpd
            | Xorps
            | Xorpd
            | Shufps
            | Shufpd
            | Unpcklps
            | Unpckhps
            | Unpcklpd
            | Unpckhpd
            | Movddup
            | Movsldup
            | Movshdup
            | Vmovaps
            | Vmovups
            | Vmovapd
            | Vmovupd
            | Vmovss
            | Vmovsd
            | Vmovdqa
            | Vmovdqu
            | Vmovd
            | Vmovq
            | Vzeroupper
            | Vzeroall
            | Vxorps
            | Vxorpd
            | Vandps
            | Vandpd
            | Vorps
            | Vorpd
    );
    if quiet {
        return false;
    }
    let floating = |m: iced_x86::MemorySize| {
        use iced_x86::MemorySize as M;
        matches!(m.element_type(), M::Float16 | M::Float32 | M::Float64 | M::BFloat16)
    };
    // The memory form of the instruction tells the element type, for register forms too.
    floating(element_of(insn)) || converts(name)
}

fn element_of(insn: &Instruction) -> iced_x86::MemorySize {
    insn.code().op_code().memory_size()
}

fn converts(m: Mnemonic) -> bool {
    use Mnemonic::*;
    matches!(
        m,
        Cvtsi2ss
            | Cvtsi2sd
            | Vcvtsi2ss
            | Vcvtsi2sd
            | Cvtpi2ps
            | Cvtpi2pd
            | Cvtdq2ps
            | Cvtdq2pd
            | Vcvtdq2ps
            | Vcvtdq2pd
            | Vcvtph2ps
            | Vcvtps2ph
    )
}
