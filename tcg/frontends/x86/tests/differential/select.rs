//! Which instructions are tried, and which sequences can be.

use iced_x86::{Code, EncodingKind, FlowControl, Instruction, Mnemonic, OpCodeOperandKind};
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
        // Identification, clocks, randomness.
        M::Cpuid | M::Rdtsc | M::Rdtscp | M::Rdpid | M::Rdrand | M::Rdseed | M::Xgetbv
        // The host's kernel.
        | M::Syscall | M::Sysenter | M::Sysexit | M::Sysexitq
        // Executed by the host's kernel instead of #GP.
        | M::Sgdt | M::Sidt | M::Sldt | M::Str | M::Smsw
        // What a processor thinks has been modified since the last XRSTOR, only it knows. (Its relatives are in
        // `transfers`.)
        | M::Xsaveopt | M::Xsaveopt64
        | M::Xabort | M::Xbegin | M::Xend
        | M::Rsm | M::Monitor | M::Mwait | M::Umonitor | M::Umwait | M::Tpause | M::Enqcmd | M::Enqcmds
        // Hypervisors that intercept it report it as a fault, at the instruction instead of behind it.
        | M::Int1
        | M::Rdpru | M::Ptwrite | M::Rdpkru | M::Wrpkru | M::Pconfig
    )
}

/// Instructions whose encodings or operands makers disagree on.
fn disputed(code: Code) -> bool {
    use Code::*;
    matches!(
        code,
        Sysretd | Reservednop_rm16_r16_0F0D | Reservednop_rm32_r32_0F0D | Reservednop_rm64_r64_0F0D
        // 286 and 486 only.
        | Fstdw_AX | Fstsg_AX | Frstpm | Fneni | Fndisi | Fnsetpm
        | Mov_tr_r32 | Mov_r32_tr | Storeall | Loadall286 | Loadall386
    )
}

/// Instructions that fault at any rate, or nearly: they end a sequence.
pub fn faults(code: Code) -> bool {
    use Mnemonic as M;
    code.is_privileged()
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
                | M::Lds
                | M::Les
                | M::Lfs
                | M::Lgs
                | M::Lss
        )
}

/// Every instruction of the model in code of `bits` bits, in two parts: those that go on, and those that fault.
pub fn instructions(class: Class, bits: u32, features: &Features) -> (Vec<Code>, Vec<Code>) {
    let mut all: Vec<Code> = Code::values()
        .filter(|&code| {
            let op = code.op_code();
            let decodes = if features.amd { op.amd_decoder64() } else { op.intel_decoder64() };
            let modes = if bits == 64 { op.mode64() && decodes } else { op.mode32() };
            let encoding = matches!(op.encoding(), EncodingKind::Legacy | EncodingKind::VEX);
            let usable = (0..op.op_count()).all(|i| {
                use OpCodeOperandKind as K;
                !matches!(op.op_kind(i), K::tr_reg | K::bnd_reg | K::k_reg | K::k_rm)
            });
            op.is_instruction()
                && modes
                && encoding
                && usable
                && !excluded(code.mnemonic())
                && !disputed(code)
                && available(code, features)
        })
        .collect();
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
        || faults(insn.code())
        || insn.is_invalid()
}
