//! The named CPU models of x86: levels of the ABI, plain virtual processors, and processors by their family.
//!
//! Facts: the x86-64 psABI's micro-architecture levels; CPUID values that the makers' manuals and specification
//! updates give for each family. A model has what matters to software, not the makers' every bit: no
//! transactional memory, no performance counters, no nested virtualisation.

use super::features::X86Features;
use super::models::Vendor::{self, Amd, Intel};

/// A named model.
pub(super) struct Named {
    pub name: &'static str,
    pub summary: &'static str,
    pub vendor: Vendor,
    pub family: u16,
    pub model: u8,
    pub stepping: u8,
    pub brand: &'static str,
    /// The model it adds to; empty: none.
    pub base: &'static str,
    pub adds: &'static [&'static [&'static str]],
}

impl Named {
    /// What it has.
    pub fn features(&self) -> X86Features {
        let base = MODELS.iter().find(|m| m.name == self.base);
        let base = base.map_or(X86Features::EMPTY, Named::features);
        self.adds.iter().fold(base, |all, set| all.union(X86Features::of(set)))
    }
}

/// What x86-64-v2 adds.
const V2: &[&str] = &["ssse3", "cx16", "sse4-1", "sse4-2", "popcnt", "lahf-lm"];
/// What x86-64-v3 adds.
const V3: &[&str] = &["avx", "avx2", "bmi1", "bmi2", "f16c", "fma", "lzcnt", "movbe", "xsave", "xsaveopt"];
/// What x86-64-v4 adds.
const V4: &[&str] = &["avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"];
/// What a 32-bit processor of the Pentium III to 4 has, and every 64-bit one.
pub(super) const BASE: &[&str] = &[
    "fpu",
    "vme",
    "de",
    "pse",
    "tsc",
    "msr",
    "pae",
    "mce",
    "cx8",
    "apic",
    "sep",
    "mtrr",
    "pge",
    "mca",
    "cmov",
    "pat",
    "pse36",
    "clflush",
    "mmx",
    "fxsr",
    "sse",
    "sse2",
    "pni",
    "hypervisor",
];
/// What every 64-bit processor has beside it: x86-64-v1, and what system software needs with it.
pub(super) const LONG: &[&str] = &["syscall", "nx", "lm"];
/// Paravirtual features that need nothing from the processor.
const PARAVIRTUAL: &[&str] = &["kvmclock", "kvmclock-stable-bit", "kvm-nopiodelay"];
/// A virtual machine's local APIC.
const APIC: &[&str] = &["x2apic", "tsc-deadline"];
/// Speculation control as makers' updates added it to older families.
const SPECULATION: &[&str] = &["spec-ctrl", "ssbd"];

macro_rules! models {
    ($($name:literal $summary:literal $vendor:ident $family:literal $model:literal $stepping:literal $brand:literal
       = $base:literal $(, $add:expr)*;)*) => {
        &[$(Named {
            name: $name,
            summary: $summary,
            vendor: $vendor,
            family: $family,
            model: $model,
            stepping: $stepping,
            brand: $brand,
            base: $base,
            adds: &[$($add),*],
        }),*]
    };
}

/// All of them, in the order help texts list them.
pub(super) const MODELS: &[Named] = models![
    "qemu64" "a plain 64-bit processor, runs anywhere (default with KVM)" Amd 15 107 1 "Mimus virtual CPU"
        = "", BASE, LONG, PARAVIRTUAL, &["cx16", "lahf-lm", "x2apic"];
    "kvm64" "a plain 64-bit processor of Intel's" Intel 15 6 1 "Mimus virtual CPU (Intel)"
        = "", BASE, LONG, PARAVIRTUAL, &["cx16", "x2apic"];
    "x86-64-v1" "the x86-64 baseline" Intel 6 15 11 "Mimus virtual CPU (x86-64-v1)" = "", BASE, LONG, PARAVIRTUAL, APIC;
    "x86-64-v2" "the x86-64-v2 level" Intel 6 26 3 "Mimus virtual CPU (x86-64-v2)" = "x86-64-v1", V2;
    "x86-64-v3" "the x86-64-v3 level: AVX2, BMI, FMA" Intel 6 60 4 "Mimus virtual CPU (x86-64-v3)" = "x86-64-v2", V3;
    "x86-64-v4" "the x86-64-v4 level: AVX-512" Intel 6 85 4 "Mimus virtual CPU (x86-64-v4)" = "x86-64-v3", V4;
    "qemu32" "a plain 32-bit processor" Intel 6 6 3 "Mimus virtual CPU (32-bit)" = "", BASE, PARAVIRTUAL;
    "Nehalem" "Intel Core i7 9xx (2008)" Intel 6 26 3 "Intel Core i7 9xx (Nehalem)" = "x86-64-v2", &["ss"];
    "Westmere" "Intel Xeon 56xx (2010)" Intel 6 44 1 "Intel Xeon E56xx (Westmere)"
        = "Nehalem", &["aes", "pclmulqdq"];
    "SandyBridge" "Intel Xeon E5 (2011)" Intel 6 42 1 "Intel Xeon E5 (Sandy Bridge)"
        = "Westmere", &["avx", "xsave", "xsaveopt", "rdtscp", "arat"];
    "IvyBridge" "Intel Xeon E5 v2 (2012)" Intel 6 58 9 "Intel Xeon E5 v2 (Ivy Bridge)"
        = "SandyBridge", &["f16c", "rdrand", "fsgsbase", "smep", "erms"];
    "Haswell" "Intel Xeon E5 v3 (2013), without TSX" Intel 6 60 4 "Intel Xeon E5 v3 (Haswell)"
        = "IvyBridge", &["avx2", "bmi1", "bmi2", "fma", "movbe", "lzcnt", "pcid", "invpcid"];
    "Broadwell" "Intel Xeon E5 v4 (2014), without TSX" Intel 6 61 2 "Intel Xeon E5 v4 (Broadwell)"
        = "Haswell", &["adx", "rdseed", "smap", "3dnowprefetch"];
    "Skylake-Client" "Intel Core, 6th generation (2015), without TSX" Intel 6 94 3 "Intel Core (Skylake)"
        = "Broadwell", &["xsavec", "xgetbv1"], SPECULATION;
    "Skylake-Server" "Intel Xeon Scalable (2017), without TSX" Intel 6 85 4 "Intel Xeon (Skylake)"
        = "Skylake-Client", V4, &["pdpe1gb", "clflushopt", "clwb", "pku"];
    "Cascadelake-Server" "Intel Xeon Scalable, 2nd generation (2019)" Intel 6 85 6 "Intel Xeon (Cascade Lake)"
        = "Skylake-Server", &["avx512vnni", "arch-capabilities"];
    "Icelake-Server" "Intel Xeon Scalable, 3rd generation (2021)" Intel 6 106 6 "Intel Xeon (Ice Lake)"
        = "Cascadelake-Server"
       , &["avx512ifma", "avx512vbmi", "avx512vbmi2", "avx512bitalg", "avx512-vpopcntdq", "gfni", "vaes", "vpclmulqdq",
            "sha-ni", "umip", "rdpid", "fsrm", "wbnoinvd", "la57", "xsaves"];
    "SapphireRapids" "Intel Xeon Scalable, 4th generation (2023), without AMX" Intel 6 143 4 "Intel Xeon (Sapphire Rapids)"
        = "Icelake-Server", &["avx-vnni", "avx512-bf16", "avx512-fp16", "serialize", "movdiri", "movdir64b", "fzrm", "fsrs"];
    "EPYC" "AMD EPYC 7001 (2017)" Amd 23 1 2 "AMD EPYC"
        = "x86-64-v3"
       , &["aes", "pclmulqdq", "rdrand", "rdseed", "adx", "fsgsbase", "smep", "smap", "clflushopt", "sha-ni", "rdtscp",
            "pdpe1gb", "mmxext", "ffxsr", "sse4a", "misalignsse", "3dnowprefetch", "osvw", "cr8legacy", "xsavec",
            "xgetbv1", "arat", "ibpb"];
    "EPYC-Rome" "AMD EPYC 7002 (2019)" Amd 23 49 0 "AMD EPYC (Rome)"
        = "EPYC", &["clwb", "umip", "rdpid", "wbnoinvd", "amd-stibp", "clzero", "xsaveerptr"];
    "EPYC-Milan" "AMD EPYC 7003 (2021)" Amd 25 1 1 "AMD EPYC (Milan)"
        = "EPYC-Rome", &["erms", "fsrm", "invpcid", "pcid", "pku", "vaes", "vpclmulqdq", "ibrs", "amd-ssbd"];
    "EPYC-Genoa" "AMD EPYC 9004 (2022)" Amd 25 17 0 "AMD EPYC (Genoa)"
        = "EPYC-Milan", V4
       , &["avx512ifma", "avx512vbmi", "avx512vbmi2", "avx512vnni", "avx512bitalg", "avx512-vpopcntdq", "avx512-bf16",
            "gfni", "la57"];
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bases_exist_and_come_first() {
        for (i, m) in MODELS.iter().enumerate() {
            assert!(m.base.is_empty() || MODELS[..i].iter().any(|b| b.name == m.base), "{}", m.name);
            assert!(m.brand.len() < 48 && !m.features().is_empty(), "{}", m.name);
            assert!(!MODELS[..i].iter().any(|b| b.name.eq_ignore_ascii_case(m.name)), "{} twice", m.name);
        }
    }

    #[test]
    fn families_have_what_they_are_known_for() {
        let has = |model: &str, feature: &str| {
            MODELS.iter().find(|m| m.name == model).is_some_and(|m| m.features().has_name(feature))
        };
        for (model, with, without) in [
            ("Nehalem", "sse4-2", "aes"),
            ("SandyBridge", "avx", "f16c"),
            ("IvyBridge", "f16c", "avx2"),
            ("Haswell", "avx2", "adx"),
            ("Broadwell", "adx", "avx512f"),
            ("Skylake-Server", "avx512f", "avx512vnni"),
            ("Icelake-Server", "la57", "avx512-fp16"),
            ("EPYC", "sha-ni", "clwb"),
            ("EPYC-Milan", "pku", "avx512f"),
            ("EPYC-Genoa", "avx512f", "avx512-fp16"),
        ] {
            assert!(has(model, with) && !has(model, without), "{model}");
        }
    }
}
