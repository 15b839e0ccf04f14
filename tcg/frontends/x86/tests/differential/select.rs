//! Which instructions are tried, and which sequences can be.

use iced_x86::{Code, EncodingKind, FlowControl, Instruction, Mnemonic};
use mimus_arch::x86::Vendor;
use mimus_arch::{CpuModel, GuestArch};
use mimus_tcg_frontend_x86::cpuid::{self, Features};
use mimus_tcg_frontend_x86::decode::decode;

/// A part of the instruction set.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Class {
    Integer,
    /// SSE and AVX.
    Vector,
    /// x87 and MMX.
    X87,
    All,
}

impl Class {
    /// By its name on a command line.
    pub fn named(name: &str) -> Option<Class> {
        Some(match name {
            "integer" => Class::Integer,
            "vector" => Class::Vector,
            "x87" => Class::X87,
            "all" => Class::All,
            _ => return None,
        })
    }

    fn has(self, code: Code) -> bool {
        use iced_x86::CpuidFeature as C;
        let unit = code.cpuid_features().iter().fold(Class::Integer, |class, f| match f {
            C::FPU | C::FPU287 | C::FPU387 | C::MMX => Class::X87,
            C::SSE
            | C::SSE2
            | C::SSE3
            | C::SSSE3
            | C::SSE4_1
            | C::SSE4_2
            | C::AES
            | C::PCLMULQDQ
            | C::SHA
            | C::AVX
            | C::AVX2
            | C::FMA
            | C::F16C
            | C::GFNI
            | C::VAES
            | C::VPCLMULQDQ
                if class == Class::Integer =>
            {
                Class::Vector
            }
            _ => class,
        });
        self == Class::All || self == unit
    }
}

/// Whether the host's kernel uses protection keys.
fn has_keys() -> bool {
    std::arch::x86_64::__cpuid(0).eax >= 7 && std::arch::x86_64::__cpuid_count(7, 0).ecx & 1 << 4 != 0
}

pub fn host_is_amd() -> bool {
    let host = std::arch::x86_64::__cpuid(0);
    [host.ebx, host.edx, host.ecx].map(u32::to_le_bytes).concat() == b"AuthenticAMD"
}

/// Everything the translator has, of the host's maker.
pub fn model() -> CpuModel {
    let CpuModel::X86(mut model) = CpuModel::parse(GuestArch::X86_64, "max").unwrap() else { unreachable!() };
    model.vendor = if host_is_amd() { Vendor::Amd } else { Vendor::Intel };
    CpuModel::X86(model)
}

/// The model's features, as far as this host can do them.
pub fn features() -> Features {
    let CpuModel::X86(model) = model() else { unreachable!() };
    Features::new(&model.restricted_to(cpuid::supported()).unwrap(), 0)
}

/// What gives different answers on different processors, or would not come back.
pub fn excluded(m: Mnemonic) -> bool {
    use Mnemonic as M;
    matches!(
        m,
        // The host's kernel.
        M::Syscall
        // Executed by the host's kernel instead of #GP.
        | M::Sgdt | M::Sidt | M::Sldt | M::Str | M::Smsw
        | M::Xabort | M::Xbegin | M::Xend
        | M::Monitor | M::Mwait | M::Umonitor | M::Umwait | M::Tpause | M::Enqcmd | M::Enqcmds
        // Hypervisors that intercept it report it as a fault, at the instruction instead of behind it.
        | M::Int1
        | M::Rdpru | M::Ptwrite | M::Pconfig
    )
}

/// What the decoder never finds as the model's: two instructions in one name, those of earlier processors, and what is a
/// reserved NOP here.
fn never_decoded(code: Code, features: &Features) -> bool {
    use Code::*;
    use Mnemonic as M;
    use iced_x86::CpuidFeature as C;
    let pair = matches!(
        code.mnemonic(),
        M::Fstenv | M::Fstcw | M::Feni | M::Fdisi | M::Fclex | M::Finit | M::Fsetpm | M::Fsave | M::Fstsw
    );
    let intels = matches!(code, Reservednop_rm16_r16_0F0D | Reservednop_rm32_r32_0F0D | Reservednop_rm64_r64_0F0D);
    pair || code == Popw_CS
        || intels && features.amd
        || if features.amd { matches!(code, Ud0_r16_rm16 | Ud0_r32_rm32 | Ud0_r64_rm64) } else { code == Ud0 }
        || code.cpuid_features().iter().any(|f| matches!(f, C::MPX | C::CET_IBT | C::CLDEMOTE))
}

/// Instructions whose encodings or operands makers disagree on.
fn disputed(code: Code, features: &Features) -> bool {
    code == Code::Sysretd && !features.amd
}

/// Loads of a segment register and another.
pub fn loads_far(m: Mnemonic) -> bool {
    use Mnemonic as M;
    matches!(m, M::Lds | M::Les | M::Lfs | M::Lgs | M::Lss)
}

/// Instructions that fault at any rate, or nearly: they end a sequence.
pub fn faults(code: Code) -> bool {
    use Mnemonic as M;
    code.is_privileged()
        || loads_far(code.mnemonic())
        || matches!(
            code.mnemonic(),
            M::Int3
                | M::Int
                | M::Int1
                | M::Ud1
                | M::Ud2
                | M::In
                | M::Out
                | M::Insb
                | M::Insw
                | M::Insd
                | M::Outsb
                | M::Outsw
                | M::Outsd
                | M::Cli
                | M::Sti
                | M::Bound
                | M::Hlt
                | M::Rdpmc
                | M::Stac
                | M::Clac
                | M::Rsm
                | M::Rdpkru
                | M::Wrpkru
                // Of AMD's in long mode.
                | M::Sysenter
                | M::Sysexit
                | M::Sysexitq
        )
}

/// Every instruction of the model in code of `bits` bits.
pub fn advertised(bits: u32, features: &Features) -> Vec<Code> {
    Code::values()
        .filter(|&code| {
            let op = code.op_code();
            let decodes = if features.amd { op.amd_decoder64() } else { op.intel_decoder64() };
            let modes = match bits {
                64 => op.mode64() && decodes,
                32 => op.mode32(),
                _ => op.mode16(),
            };
            let encoding = matches!(op.encoding(), EncodingKind::Legacy | EncodingKind::VEX);
            op.is_instruction() && modes && encoding && available(code, features) && !never_decoded(code, features)
        })
        .collect()
}

/// Whether it is tried: by this test, on this host.
pub fn tried(code: Code, bits: u32, features: &Features) -> bool {
    use Mnemonic as M;
    // Others' processors have these in compatibility mode.
    let entry = matches!(code.mnemonic(), M::Sysenter | M::Sysexit | M::Sysexitq) && !features.amd;
    // Without CR4.PKE they are none, as with the guest's.
    let keys = matches!(code.mnemonic(), M::Rdpkru | M::Wrpkru) && has_keys();
    // Transfers to other segments are those of 32-bit code.
    let far = bits == 16 && crate::special::is_far(code);
    !excluded(code.mnemonic()) && !disputed(code, features) && !entry && !keys && !far
}

/// The advertised that are tried, in two parts: those that go on, and those that fault.
pub fn instructions(class: Class, bits: u32, features: &Features) -> (Vec<Code>, Vec<Code>) {
    let mut all = advertised(bits, features);
    all.retain(|&code| tried(code, bits, features));
    if class != Class::All {
        all.retain(|&code| class.has(code));
    }
    all.into_iter().partition(|&code| !faults(code))
}

/// Whether the model has it: what the frontend itself says of an instruction with this code.
fn available(code: Code, features: &Features) -> bool {
    let mut insn = Instruction::default();
    insn.set_code(code);
    mimus_tcg_frontend_x86::decode::available(&insn, features)
}

/// Decodes as the frontend does.
pub fn decoded(bytes: &[u8], bits: u32, features: &Features) -> Instruction {
    decode(bytes, bits, 0, features)
}

/// Whether an instruction that the model does not have may be one of the host's.
pub fn unknown_only_here(bytes: &[u8], bits: u32) -> bool {
    let mut decoder = iced_x86::Decoder::new(bits, bytes, iced_x86::DecoderOptions::NONE);
    let insn = decoder.decode();
    let amd = iced_x86::Decoder::new(bits, bytes, iced_x86::DecoderOptions::AMD).decode();
    !insn.is_invalid() || !amd.is_invalid()
}

/// Whether these are the first bytes of an instruction, and what follows would be the rest.
pub fn truncated(bytes: &[u8], bits: u32, amd: bool) -> bool {
    bytes.len() < 15 && mimus_tcg_frontend_x86::length::length(bytes, bits, amd).is_none()
}

/// Goes on with the next instruction unless it faults.
pub fn straight(insn: &Instruction) -> bool {
    matches!(insn.flow_control(), FlowControl::Next | FlowControl::Exception)
        || insn.mnemonic() == Mnemonic::Into
        || faults(insn.code())
        || insn.is_invalid()
}
