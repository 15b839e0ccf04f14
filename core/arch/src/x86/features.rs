//! CPUID features by name.
//!
//! Spec: SDM volume 2 "CPUID"; APM volume 3 appendix E; `Documentation/virt/kvm/x86/cpuid.rst` for the
//! paravirtual ones. Names are those of `/proc/cpuinfo` with hyphens, and what users of other emulators
//! write (`sse4.2`, `sse4_2`).

use serde::{Deserialize, Serialize};
use std::fmt;

/// A CPUID output register that holds features.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(u8)]
pub enum FeatureWord {
    /// Leaf 1 EDX.
    F1Edx,
    /// Leaf 1 ECX.
    F1Ecx,
    /// Leaf 6 EAX: thermal and power.
    F6Eax,
    /// Leaf 7, subleaf 0, EBX.
    F7Ebx,
    /// Leaf 7, subleaf 0, ECX.
    F7Ecx,
    /// Leaf 7, subleaf 0, EDX.
    F7Edx,
    /// Leaf 7, subleaf 1, EAX.
    F7s1Eax,
    /// Leaf 0xd, subleaf 1, EAX: kinds of XSAVE.
    FdEax,
    /// Leaf 0x8000_0001 EDX.
    F81Edx,
    /// Leaf 0x8000_0001 ECX.
    F81Ecx,
    /// Leaf 0x8000_0007 EDX: power.
    F87Edx,
    /// Leaf 0x8000_0008 EBX.
    F88Ebx,
    /// Leaf 0x4000_0001 EAX: KVM's paravirtual features.
    KvmEax,
}

/// Number of feature words.
pub const WORDS: usize = 13;

/// An output register of CPUID.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum CpuidReg {
    Eax,
    Ebx,
    Ecx,
    Edx,
}

impl FeatureWord {
    /// All of them, in the order of their numbers.
    pub const ALL: [Self; WORDS] = [
        Self::F1Edx,
        Self::F1Ecx,
        Self::F6Eax,
        Self::F7Ebx,
        Self::F7Ecx,
        Self::F7Edx,
        Self::F7s1Eax,
        Self::FdEax,
        Self::F81Edx,
        Self::F81Ecx,
        Self::F87Edx,
        Self::F88Ebx,
        Self::KvmEax,
    ];

    /// Leaf, subleaf and register.
    pub const fn place(self) -> (u32, u32, CpuidReg) {
        use CpuidReg::*;
        match self {
            Self::F1Edx => (1, 0, Edx),
            Self::F1Ecx => (1, 0, Ecx),
            Self::F6Eax => (6, 0, Eax),
            Self::F7Ebx => (7, 0, Ebx),
            Self::F7Ecx => (7, 0, Ecx),
            Self::F7Edx => (7, 0, Edx),
            Self::F7s1Eax => (7, 1, Eax),
            Self::FdEax => (0xd, 1, Eax),
            Self::F81Edx => (0x8000_0001, 0, Edx),
            Self::F81Ecx => (0x8000_0001, 0, Ecx),
            Self::F87Edx => (0x8000_0007, 0, Edx),
            Self::F88Ebx => (0x8000_0008, 0, Ebx),
            Self::KvmEax => (0x4000_0001, 0, Eax),
        }
    }
}

/// One feature.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct CpuidFeature {
    /// Where it is.
    pub word: FeatureWord,
    /// Which bit.
    pub bit: u8,
}

impl CpuidFeature {
    /// By name; hyphens, underscores and dots are the same.
    pub fn from_name(name: &str) -> Option<Self> {
        let wanted = normal(name);
        let wanted = ALIASES.iter().find(|(alias, _)| *alias == wanted).map_or(&*wanted, |a| a.1);
        NAMED.iter().find(|(n, ..)| *n == wanted).map(|&(_, word, bit)| Self { word, bit })
    }

    /// Its name, if it has one.
    pub fn name(self) -> Option<&'static str> {
        NAMED.iter().find(|(_, w, b)| *w == self.word && *b == self.bit).map(|(n, ..)| *n)
    }

    /// All names, in table order.
    pub fn names() -> impl Iterator<Item = &'static str> {
        NAMED.iter().map(|(n, ..)| *n)
    }
}

fn normal(name: &str) -> String {
    name.to_ascii_lowercase().replace(['_', '.'], "-")
}

impl fmt::Display for CpuidFeature {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (leaf, subleaf, reg) = self.word.place();
        match self.name() {
            Some(name) => f.write_str(name),
            None => write!(f, "CPUID.{leaf:X}:{subleaf}:{reg:?}[{}]", self.bit),
        }
    }
}

/// A set of features.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct X86Features([u32; WORDS]);

impl X86Features {
    /// None.
    pub const EMPTY: Self = Self([0; WORDS]);

    /// Those with these names. Panics on a name that does not exist: for tables.
    pub fn of(names: &[&str]) -> Self {
        let mut set = Self::EMPTY;
        for name in names {
            let feature = CpuidFeature::from_name(name);
            set.insert(feature.unwrap_or_else(|| panic!("no feature {name}")));
        }
        set
    }

    /// A whole word.
    pub fn word(&self, word: FeatureWord) -> u32 {
        self.0[word as usize]
    }

    /// Replaces a whole word.
    pub fn set_word(&mut self, word: FeatureWord, bits: u32) {
        self.0[word as usize] = bits;
    }

    /// True if `feature` is in it.
    pub fn has(&self, feature: CpuidFeature) -> bool {
        self.0[feature.word as usize] >> feature.bit & 1 != 0
    }

    /// True if the feature of this name is in it; false for names that do not exist.
    pub fn has_name(&self, name: &str) -> bool {
        CpuidFeature::from_name(name).is_some_and(|f| self.has(f))
    }

    /// Adds one.
    pub fn insert(&mut self, feature: CpuidFeature) {
        self.0[feature.word as usize] |= 1 << feature.bit;
    }

    /// Takes one out.
    pub fn remove(&mut self, feature: CpuidFeature) {
        self.0[feature.word as usize] &= !(1 << feature.bit);
    }

    /// Those in either.
    pub fn union(self, other: Self) -> Self {
        Self(std::array::from_fn(|i| self.0[i] | other.0[i]))
    }

    /// Those in both.
    pub fn intersection(self, other: Self) -> Self {
        Self(std::array::from_fn(|i| self.0[i] & other.0[i]))
    }

    /// Those not in `other`.
    pub fn difference(self, other: Self) -> Self {
        Self(std::array::from_fn(|i| self.0[i] & !other.0[i]))
    }

    /// True if there are none.
    pub fn is_empty(&self) -> bool {
        self.0.iter().all(|w| *w == 0)
    }

    /// All of them.
    pub fn iter(&self) -> impl Iterator<Item = CpuidFeature> + '_ {
        let bits = move |word: FeatureWord| (0..32).map(move |bit| CpuidFeature { word, bit });
        FeatureWord::ALL.into_iter().flat_map(bits).filter(|f| self.has(*f))
    }
}

impl fmt::Display for X86Features {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (i, feature) in self.iter().enumerate() {
            write!(f, "{}{feature}", if i == 0 { "" } else { " " })?;
        }
        Ok(())
    }
}

/// Other names: (name, name in [`NAMED`]).
const ALIASES: &[(&str, &str)] = &[
    ("sse3", "pni"),
    ("pclmul", "pclmulqdq"),
    ("fxsr-opt", "ffxsr"),
    ("cmpxchg16b", "cx16"),
    ("cmpxchg8b", "cx8"),
    ("sse4a-amd", "sse4a"),
    ("i64", "lm"),
    ("xd", "nx"),
    ("abm", "lzcnt"),
    ("sha", "sha-ni"),
    ("tsc-deadline-timer", "tsc-deadline"),
    ("lahf-sahf", "lahf-lm"),
    ("kvmclock2", "kvmclock"),
];

use FeatureWord::*;

/// Every feature with a name.
const NAMED: &[(&str, FeatureWord, u8)] = &[
    ("fpu", F1Edx, 0),
    ("vme", F1Edx, 1),
    ("de", F1Edx, 2),
    ("pse", F1Edx, 3),
    ("tsc", F1Edx, 4),
    ("msr", F1Edx, 5),
    ("pae", F1Edx, 6),
    ("mce", F1Edx, 7),
    ("cx8", F1Edx, 8),
    ("apic", F1Edx, 9),
    ("sep", F1Edx, 11),
    ("mtrr", F1Edx, 12),
    ("pge", F1Edx, 13),
    ("mca", F1Edx, 14),
    ("cmov", F1Edx, 15),
    ("pat", F1Edx, 16),
    ("pse36", F1Edx, 17),
    ("clflush", F1Edx, 19),
    ("mmx", F1Edx, 23),
    ("fxsr", F1Edx, 24),
    ("sse", F1Edx, 25),
    ("sse2", F1Edx, 26),
    ("ss", F1Edx, 27),
    ("ht", F1Edx, 28),
    ("pni", F1Ecx, 0),
    ("pclmulqdq", F1Ecx, 1),
    ("monitor", F1Ecx, 3),
    ("vmx", F1Ecx, 5),
    ("ssse3", F1Ecx, 9),
    ("fma", F1Ecx, 12),
    ("cx16", F1Ecx, 13),
    ("pdcm", F1Ecx, 15),
    ("pcid", F1Ecx, 17),
    ("sse4-1", F1Ecx, 19),
    ("sse4-2", F1Ecx, 20),
    ("x2apic", F1Ecx, 21),
    ("movbe", F1Ecx, 22),
    ("popcnt", F1Ecx, 23),
    ("tsc-deadline", F1Ecx, 24),
    ("aes", F1Ecx, 25),
    ("xsave", F1Ecx, 26),
    ("osxsave", F1Ecx, 27),
    ("avx", F1Ecx, 28),
    ("f16c", F1Ecx, 29),
    ("rdrand", F1Ecx, 30),
    ("hypervisor", F1Ecx, 31),
    ("arat", F6Eax, 2),
    ("fsgsbase", F7Ebx, 0),
    ("tsc-adjust", F7Ebx, 1),
    ("bmi1", F7Ebx, 3),
    ("hle", F7Ebx, 4),
    ("avx2", F7Ebx, 5),
    ("smep", F7Ebx, 7),
    ("bmi2", F7Ebx, 8),
    ("erms", F7Ebx, 9),
    ("invpcid", F7Ebx, 10),
    ("rtm", F7Ebx, 11),
    ("mpx", F7Ebx, 14),
    ("avx512f", F7Ebx, 16),
    ("avx512dq", F7Ebx, 17),
    ("rdseed", F7Ebx, 18),
    ("adx", F7Ebx, 19),
    ("smap", F7Ebx, 20),
    ("avx512ifma", F7Ebx, 21),
    ("clflushopt", F7Ebx, 23),
    ("clwb", F7Ebx, 24),
    ("avx512cd", F7Ebx, 28),
    ("sha-ni", F7Ebx, 29),
    ("avx512bw", F7Ebx, 30),
    ("avx512vl", F7Ebx, 31),
    ("avx512vbmi", F7Ecx, 1),
    ("umip", F7Ecx, 2),
    ("pku", F7Ecx, 3),
    ("ospke", F7Ecx, 4),
    ("waitpkg", F7Ecx, 5),
    ("avx512vbmi2", F7Ecx, 6),
    ("gfni", F7Ecx, 8),
    ("vaes", F7Ecx, 9),
    ("vpclmulqdq", F7Ecx, 10),
    ("avx512vnni", F7Ecx, 11),
    ("avx512bitalg", F7Ecx, 12),
    ("avx512-vpopcntdq", F7Ecx, 14),
    ("la57", F7Ecx, 16),
    ("rdpid", F7Ecx, 22),
    ("bus-lock-detect", F7Ecx, 24),
    ("cldemote", F7Ecx, 25),
    ("movdiri", F7Ecx, 27),
    ("movdir64b", F7Ecx, 28),
    ("fsrm", F7Edx, 4),
    ("avx512-vp2intersect", F7Edx, 8),
    ("md-clear", F7Edx, 10),
    ("serialize", F7Edx, 14),
    ("tsxldtrk", F7Edx, 16),
    ("amx-bf16", F7Edx, 22),
    ("avx512-fp16", F7Edx, 23),
    ("amx-tile", F7Edx, 24),
    ("amx-int8", F7Edx, 25),
    ("spec-ctrl", F7Edx, 26),
    ("stibp", F7Edx, 27),
    ("flush-l1d", F7Edx, 28),
    ("arch-capabilities", F7Edx, 29),
    ("core-capability", F7Edx, 30),
    ("ssbd", F7Edx, 31),
    ("avx-vnni", F7s1Eax, 4),
    ("avx512-bf16", F7s1Eax, 5),
    ("fzrm", F7s1Eax, 10),
    ("fsrs", F7s1Eax, 11),
    ("fsrc", F7s1Eax, 12),
    ("avx-ifma", F7s1Eax, 23),
    ("xsaveopt", FdEax, 0),
    ("xsavec", FdEax, 1),
    ("xgetbv1", FdEax, 2),
    ("xsaves", FdEax, 3),
    ("xfd", FdEax, 4),
    ("syscall", F81Edx, 11),
    ("nx", F81Edx, 20),
    ("mmxext", F81Edx, 22),
    ("ffxsr", F81Edx, 25),
    ("pdpe1gb", F81Edx, 26),
    ("rdtscp", F81Edx, 27),
    ("lm", F81Edx, 29),
    ("3dnowext", F81Edx, 30),
    ("3dnow", F81Edx, 31),
    ("lahf-lm", F81Ecx, 0),
    ("cmp-legacy", F81Ecx, 1),
    ("svm", F81Ecx, 2),
    ("cr8legacy", F81Ecx, 4),
    ("lzcnt", F81Ecx, 5),
    ("sse4a", F81Ecx, 6),
    ("misalignsse", F81Ecx, 7),
    ("3dnowprefetch", F81Ecx, 8),
    ("osvw", F81Ecx, 9),
    ("xop", F81Ecx, 11),
    ("fma4", F81Ecx, 16),
    ("tbm", F81Ecx, 21),
    ("topoext", F81Ecx, 22),
    ("perfctr-core", F81Ecx, 23),
    ("invtsc", F87Edx, 8),
    ("clzero", F88Ebx, 0),
    ("xsaveerptr", F88Ebx, 2),
    ("wbnoinvd", F88Ebx, 9),
    ("ibpb", F88Ebx, 12),
    ("ibrs", F88Ebx, 14),
    ("amd-stibp", F88Ebx, 15),
    ("amd-ssbd", F88Ebx, 24),
    ("virt-ssbd", F88Ebx, 25),
    ("kvm-nopiodelay", KvmEax, 1),
    ("kvmclock", KvmEax, 3),
    ("kvm-asyncpf", KvmEax, 4),
    ("kvm-steal-time", KvmEax, 5),
    ("kvm-pv-eoi", KvmEax, 6),
    ("kvm-pv-unhalt", KvmEax, 7),
    ("kvm-pv-tlb-flush", KvmEax, 9),
    ("kvm-pv-ipi", KvmEax, 11),
    ("kvm-poll-control", KvmEax, 12),
    ("kvm-pv-sched-yield", KvmEax, 13),
    ("kvm-asyncpf-int", KvmEax, 14),
    ("kvm-msi-ext-dest-id", KvmEax, 15),
    ("kvmclock-stable-bit", KvmEax, 24),
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_unique_and_found() {
        for (i, (name, word, bit)) in NAMED.iter().enumerate() {
            assert!(!NAMED[..i].iter().any(|(n, w, b)| n == name || (w, b) == (word, bit)), "{name}");
            assert_eq!(normal(name), *name);
            assert_eq!(CpuidFeature::from_name(name).unwrap().name(), Some(*name));
        }
        for (alias, name) in ALIASES {
            assert_eq!(CpuidFeature::from_name(alias), CpuidFeature::from_name(name), "{alias}");
            assert!(CpuidFeature::from_name(name).is_some());
        }
        assert_eq!(CpuidFeature::from_name("SSE4.2"), CpuidFeature::from_name("sse4_2"));
        assert_eq!(CpuidFeature::from_name("sse5"), None);
    }

    #[test]
    fn sets() {
        let a = X86Features::of(&["sse", "avx"]);
        let b = X86Features::of(&["avx", "lm"]);
        assert_eq!(a.intersection(b), X86Features::of(&["avx"]));
        assert_eq!(a.difference(b), X86Features::of(&["sse"]));
        assert_eq!(a.union(b).to_string(), "sse avx lm");
        assert!(!a.has_name("lm") && !a.is_empty());
    }
}
