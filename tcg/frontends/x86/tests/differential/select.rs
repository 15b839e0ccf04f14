//! Which instructions are tried, and which sequences can be.

use iced_x86::{Code, EncodingKind, FlowControl, Instruction, Mnemonic, OpCodeOperandKind};
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

/// The model's features, as far as this host can do them.
pub fn features() -> Features {
    let CpuModel::X86(model) = CpuModel::parse(GuestArch::X86_64, "max").unwrap() else { unreachable!() };
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
        | M::Syscall | M::Sysenter | M::Sysexit | M::Sysexitq | M::Int
        // Executed by the host's kernel instead of #GP.
        | M::Sgdt | M::Sidt | M::Sldt | M::Str | M::Smsw
        // Depends on the host's descriptors.
        | M::Lar | M::Lsl | M::Verr | M::Verw
        // Depend on what a processor thinks is in its initial state: tested by themselves.
        | M::Xsave | M::Xsave64 | M::Xsavec | M::Xsavec64 | M::Xsaveopt | M::Xsaveopt64 | M::Xrstor | M::Xrstor64
        | M::Xsaves | M::Xsaves64 | M::Xrstors | M::Xrstors64 | M::Fxsave | M::Fxsave64 | M::Fxrstor | M::Fxrstor64
        // Transfers to other segments and from interrupts.
        | M::Iret | M::Iretd | M::Iretq | M::Retf | M::Xabort | M::Xbegin | M::Xend
        // To addresses that are not in the sequence.
        | M::Rsm | M::Monitor | M::Mwait | M::Umonitor | M::Umwait | M::Tpause | M::Enqcmd | M::Enqcmds
        // What is single-stepped by hand on some hosts.
        | M::Int1
        | M::Rdpru | M::Ptwrite | M::Rdpkru | M::Wrpkru | M::Pconfig
    )
}

/// Instructions whose encodings or operands makers disagree on.
fn disputed(code: Code) -> bool {
    use Code::*;
    matches!(
        code,
        // A segment's base and limit in the compatibility of old processors.
        Sysretd | Movsxd_r16_rm16 | Reservednop_rm16_r16_0F0D | Reservednop_rm32_r32_0F0D | Reservednop_rm64_r64_0F0D
        | Ud0 | Ud0_r16_rm16 | Ud0_r32_rm32 | Ud0_r64_rm64
        // 286 and 486 only.
        | Fstdw_AX | Fstsg_AX | Frstpm | Fneni | Fndisi | Fnsetpm
        // Near branches with an operand-size prefix in 64-bit mode, far ones with REX.W.
        | Jmp_m1664 | Call_m1664 | Lss_r64_m1664 | Lfs_r64_m1664 | Lgs_r64_m1664
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
            let modes = if bits == 64 { op.mode64() } else { op.mode32() };
            let encoding = matches!(op.encoding(), EncodingKind::Legacy | EncodingKind::VEX);
            let usable = (0..op.op_count()).all(|i| {
                use OpCodeOperandKind as K;
                !matches!(op.op_kind(i), K::tr_reg | K::bnd_reg | K::farbr2_2 | K::farbr4_2 | K::k_reg | K::k_rm)
            });
            let far = matches!(code, Code::Jmp_m1616 | Code::Jmp_m1632 | Code::Call_m1616 | Code::Call_m1632);
            op.is_instruction()
                && modes
                && encoding
                && usable
                && !far
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
pub fn truncated(bytes: &[u8], bits: u32) -> bool {
    let mut decoder = iced_x86::Decoder::new(bits, bytes, iced_x86::DecoderOptions::NONE);
    let _ = decoder.decode();
    // Of a REX prefix before VEX some know that it is wrong before they know how long it is.
    let vex = bytes.iter().position(|b| matches!(b, 0xc4 | 0xc5 | 0x62));
    let rex = bits == 64 && vex.is_some_and(|at| at > 0 && bytes[at - 1] & 0xf0 == 0x40);
    if rex && bytes.len() > 10 {
        return true;
    }
    bytes.len() < 15 && decoder.last_error() == iced_x86::DecoderError::NoMoreBytes
}

/// Goes on with the next instruction unless it faults.
pub fn straight(insn: &Instruction) -> bool {
    matches!(insn.flow_control(), FlowControl::Next | FlowControl::Exception)
        || faults(insn.code())
        || insn.is_invalid()
}
