//! Decoding: iced-x86 finds out what the bytes are; here is which of that the model has.

use iced_x86::{Code, CpuidFeature, Decoder, DecoderOptions, Instruction, Mnemonic, OpKind, Register};
use mimus_tcg_exec::frontend::CodeWindow;

use crate::cpuid::Features;

/// Most bytes of an instruction.
pub const MAX_LEN: usize = 15;

/// An instruction's bytes for helpers: 15 bytes, then length in bits 3:0 and code size (0: 16, 1: 32, 2: 64) in bits
/// 5:4 of the last one.
pub type Packed = [u64; 2];

/// Packs an instruction.
pub fn pack(bytes: &[u8], bits: u32) -> Packed {
    let mut all = [0; 16];
    all[..bytes.len()].copy_from_slice(bytes);
    all[15] = bytes.len() as u8 | (bits.trailing_zeros() as u8 - 4) << 4;
    let half = |i: usize| {
        let mut word = [0; 8];
        word.copy_from_slice(&all[i..i + 8]);
        u64::from_le_bytes(word)
    };
    [half(0), half(8)]
}

/// Decodes a packed instruction, at address `ip`.
pub fn unpack(packed: &Packed, ip: u64, features: &Features) -> Instruction {
    let mut all = [0; 16];
    all[..8].copy_from_slice(&packed[0].to_le_bytes());
    all[8..].copy_from_slice(&packed[1].to_le_bytes());
    let len = usize::from(all[15] & 15).min(MAX_LEN);
    let bits = 16 << (all[15] >> 4 & 3).min(2);
    decode(&all[..len], bits, ip, features)
}

/// What the makers decode differently in 64-bit code. AMD's processors heed an operand-size prefix of near branches, and
/// know no far pointers with 64-bit offsets (APM volume 3 "JMP (Near)", "LSS"; SDM volume 2 "JMP", "LSS").
pub const fn maker_options(amd: bool) -> u32 {
    if amd { DecoderOptions::AMD } else { DecoderOptions::NONE }
}

/// Decodes; bytes that are no instruction of the model give an invalid one.
pub fn decode(bytes: &[u8], bits: u32, ip: u64, features: &Features) -> Instruction {
    let mut insn = decoder(bytes, bits, ip, features).decode();
    to_model(&mut insn, bytes, bits, features);
    insn
}

/// A decoder of consecutive instructions, each to be given to [`to_model`].
pub fn decoder<'a>(bytes: &'a [u8], bits: u32, ip: u64, features: &Features) -> Decoder<'a> {
    let mut options = maker_options(features.amd);
    // Without these features the prefix means nothing.
    if !features.lzcnt {
        options |= DecoderOptions::NO_MPFX_0FBD;
    }
    if !features.bmi1 {
        options |= DecoderOptions::NO_MPFX_0FBC;
    }
    Decoder::with_ip(bits, bytes, ip, options)
}

/// Makes what a decoder has made of `bytes` the model's instruction. In its place: to copy an instruction just decoded is to wait for
/// its parts.
#[inline]
pub fn to_model(insn: &mut Instruction, bytes: &[u8], bits: u32, features: &Features) {
    if features.amd
        && insn.code() == Code::Pause
        && bits == 64
        && insn.len() > 1
        && bytes[insn.len() - 2] & 0xf1 == 0x41
    {
        // With REX.B it is an exchange of R8; of Intel's it is not (both measured).
        let wide = bytes[insn.len() - 2] & 8 != 0;
        let len = insn.len();
        let sized = !wide && bytes[..len].contains(&0x66);
        insn.set_code(if wide {
            Code::Xchg_r64_RAX
        } else if sized {
            Code::Xchg_r16_AX
        } else {
            Code::Xchg_r32_EAX
        });
        let (first, second) = if wide {
            (Register::R8, Register::RAX)
        } else if sized {
            (Register::R8W, Register::AX)
        } else {
            (Register::R8D, Register::EAX)
        };
        insn.set_op0_kind(OpKind::Register);
        insn.set_op0_register(first);
        insn.set_op1_kind(OpKind::Register);
        insn.set_op1_register(second);
    }
    if !available(insn, features) && !insn.is_invalid() {
        let len = insn.len();
        *insn = Instruction::default();
        insn.set_len(len);
        insn.set_code(Code::INVALID);
    }
}

/// Up to 15 bytes of code at an offset, as many as may be read.
pub fn fetch(code: CodeWindow<'_>, offset: u32, out: &mut [u8; MAX_LEN]) -> usize {
    code.bytes(offset, out).len()
}

/// Whether the model has the instruction.
pub fn available(insn: &Instruction, f: &Features) -> bool {
    f.codes.get(insn.code() as usize).is_some_and(|there| *there)
}

/// Which of the decoder's instructions the model has.
pub fn codes(f: &Features) -> Vec<bool> {
    let sets: Vec<bool> = CpuidFeature::values().map(|feature| has(feature, f)).collect();
    let code = |code: Code| match code.mnemonic() {
        // 64-bit processors have it, or do nothing.
        Mnemonic::Prefetch | Mnemonic::Prefetchw => f.has("3dnowprefetch") || f.long_mode,
        _ => code.cpuid_features().iter().all(|&feature| sets[feature as usize]),
    };
    Code::values().map(code).collect()
}

fn has(feature: CpuidFeature, f: &Features) -> bool {
    use CpuidFeature as C;
    match feature {
        C::INTEL8086 | C::INTEL186 | C::INTEL286 | C::INTEL386 | C::INTEL486 | C::INTEL8086_ONLY => true,
        C::CPUID | C::SMM | C::MULTIBYTENOP | C::PAUSE => true,
        C::FPU | C::FPU287 | C::FPU387 => f.has("fpu"),
        C::X64 => f.long_mode,
        C::MSR => f.has("msr"),
        C::TSC => f.has("tsc"),
        C::CX8 => f.has("cx8"),
        C::CMPXCHG16B => f.has("cx16"),
        C::CMOV => f.has("cmov"),
        C::SEP => f.has("sep"),
        C::SYSCALL => f.has("syscall"),
        C::CLFSH => f.has("clflush"),
        C::CLFLUSHOPT => f.has("clflushopt"),
        C::CLWB => f.has("clwb"),
        C::FXSR => f.has("fxsr"),
        C::MMX => f.has("mmx"),
        C::SSE => f.has("sse"),
        C::SSE2 => f.has("sse2"),
        C::SSE3 => f.has("pni"),
        C::SSSE3 => f.has("ssse3"),
        C::SSE4_1 => f.has("sse4-1"),
        C::SSE4_2 => f.has("sse4-2"),
        C::POPCNT => f.has("popcnt"),
        C::LZCNT => f.lzcnt,
        C::BMI1 => f.bmi1,
        C::BMI2 => f.has("bmi2"),
        C::ADX => f.has("adx"),
        C::MOVBE => f.has("movbe"),
        C::AES => f.has("aes"),
        C::PCLMULQDQ => f.has("pclmulqdq"),
        C::SHA => f.has("sha-ni"),
        C::GFNI => f.has("gfni"),
        C::VAES => f.has("vaes"),
        C::VPCLMULQDQ => f.has("vpclmulqdq"),
        C::XSAVE => f.has("xsave"),
        C::XSAVEOPT => f.has("xsaveopt"),
        C::XSAVEC => f.has("xsavec"),
        C::XSAVES => f.has("xsaves"),
        C::PKU => f.has("pku"),
        C::AVX => f.avx,
        C::AVX2 => f.avx && f.has("avx2"),
        C::F16C => f.avx && f.has("f16c"),
        C::FMA => f.avx && f.has("fma"),
        C::RDTSCP => f.has("rdtscp"),
        C::RDPID => f.has("rdpid"),
        C::RDRAND => f.has("rdrand"),
        C::RDSEED => f.has("rdseed"),
        C::RDPMC => true,
        C::FSGSBASE => f.has("fsgsbase"),
        C::INVPCID => f.has("invpcid"),
        C::SMAP => f.has("smap"),
        C::WBNOINVD => f.has("wbnoinvd"),
        // Hints that are NOPs to processors without them.
        C::CET_IBT | C::CLDEMOTE | C::MPX => true,
        _ => false,
    }
}
