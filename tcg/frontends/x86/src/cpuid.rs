//! CPUID: what the model has.
//!
//! Spec: SDM volume 2 "CPUID"; APM volume 3 appendix E for the extended leaves.

use mimus_arch::GuestArch;
use mimus_arch::x86::features::FeatureWord;
use mimus_arch::x86::msr as number;
use mimus_arch::x86::regs::*;
use mimus_arch::x86::{Vendor, X86Features, X86Model};

use crate::native;
use crate::state::State;

/// What this frontend can do on any host, beside what every 64-bit processor has.
const HAVE: &[&str] = &[
    "ss",
    "cx16",
    "pcid",
    "movbe",
    "x2apic",
    "xsave",
    "arat",
    "fsgsbase",
    "tsc-adjust",
    "tsc-deadline",
    "smep",
    "erms",
    "invpcid",
    "rdseed",
    "rdrand",
    "smap",
    "clflushopt",
    "clwb",
    "umip",
    "pku",
    "la57",
    "rdpid",
    "fsrm",
    "xsaveopt",
    "xsavec",
    "xsaves",
    "xgetbv1",
    "pdpe1gb",
    "rdtscp",
    "lahf-lm",
    "cr8legacy",
    "3dnowprefetch",
    "invtsc",
    "wbnoinvd",
    "arch-capabilities",
    "kvmclock",
    "kvmclock-stable-bit",
    "kvm-nopiodelay",
];

/// What runs on the host's own units, if it has them.
const NEED_HOST: &[&str] = &[
    "ssse3",
    "sse4-1",
    "sse4-2",
    "popcnt",
    "aes",
    "pclmulqdq",
    "avx",
    "f16c",
    "fma",
    "avx2",
    "bmi1",
    "bmi2",
    "adx",
    "lzcnt",
    "sha-ni",
    "vaes",
    "vpclmulqdq",
    "gfni",
    "sse4a",
    "misalignsse",
];

/// Leaf 0x4000_0000: 12 characters. KVM's, of a model with KVM's paravirtual features.
const SIGNATURE: &[u8; 12] = b"MimusMimusMi";
const KVM_SIGNATURE: &[u8; 12] = b"KVMKVMKVM\0\0\0";

/// The features that can be had on this host.
pub fn supported() -> X86Features {
    let units = X86Features::of(NEED_HOST).intersection(native::host_features());
    X86Model::base64().union(X86Features::of(HAVE)).union(units)
}

/// A model as CPUID shows it, and what of it the rest of the frontend asks often.
#[derive(Clone, Debug)]
pub struct Features {
    pub set: X86Features,
    pub pdpe1gb: bool,
    pub pse36: bool,
    pub la57: bool,
    /// Bits of CR4 that are not reserved.
    pub cr4: u64,
    pub long_mode: bool,
    pub nx: bool,
    pub syscall: bool,
    pub tsc_deadline: bool,
    pub avx: bool,
    pub lzcnt: bool,
    pub bmi1: bool,
    /// MXCSR has a bit that excuses SSE operands from alignment.
    pub misaligned_sse: bool,
    /// KVM's signature and paravirtual features are shown.
    pub kvm: bool,
    /// Which instructions there are, by the decoder's numbers.
    pub(crate) codes: Vec<bool>,
    /// The model is one of AMD's: where the makers' processors differ, it does as theirs do.
    pub amd: bool,
    pub phys_bits: u8,
    vendor: [u32; 3],
    signature: u32,
    brand: [u8; 48],
    index: u32,
}

impl Features {
    /// Those of `model`, on vCPU `index`.
    pub fn new(model: &X86Model, index: u32) -> Self {
        let set = model.features;
        let name = model.vendor.name().as_bytes();
        let word = |i: usize| u32::from_le_bytes([name[i], name[i + 1], name[i + 2], name[i + 3]]);
        let mut brand = [0; 48];
        for (to, from) in brand.iter_mut().zip(model.brand.bytes().take(47)) {
            *to = from;
        }
        let long_mode = set.has_name("lm") && model.arch == GuestArch::X86_64;
        let phys_bits = match model.phys_bits {
            0 if long_mode => 40,
            0 => 36,
            bits => bits,
        };
        let mut features = Self {
            pdpe1gb: set.has_name("pdpe1gb"),
            pse36: set.has_name("pse36"),
            la57: set.has_name("la57") && long_mode,
            cr4: cr4_bits(&set),
            long_mode,
            nx: set.has_name("nx"),
            syscall: set.has_name("syscall"),
            tsc_deadline: set.has_name("tsc-deadline"),
            avx: set.has_name("avx") && set.has_name("xsave"),
            lzcnt: set.has_name("lzcnt"),
            bmi1: set.has_name("bmi1"),
            misaligned_sse: set.has_name("misalignsse"),
            kvm: model.kvm && set.has_name("hypervisor"),
            amd: model.vendor == Vendor::Amd,
            phys_bits,
            vendor: [word(0), word(4), word(8)],
            signature: signature(model),
            brand,
            index,
            codes: Vec::new(),
            set,
        };
        features.codes = crate::decode::codes(&features);
        features
    }

    /// Whether the model has a feature, by name.
    pub fn has(&self, name: &str) -> bool {
        self.set.has_name(name)
    }

    /// State components XSAVE can handle.
    pub fn xcr0_mask(&self) -> u64 {
        if !self.has("xsave") {
            return XCR0_X87 | XCR0_SSE;
        }
        let pku = if self.has("pku") { XCR0_PKRU } else { 0 };
        XCR0_X87 | XCR0_SSE | if self.avx { XCR0_AVX } else { 0 } | pku
    }

    /// Where PKRU is in an XSAVE area in standard form: each maker has a place of its own.
    pub fn pkru_offset(&self) -> u32 {
        if self.amd { 832 } else { 2688 }
    }

    /// Bytes of the XSAVE area for these components, in its standard form.
    pub fn xsave_size(&self, components: u64) -> u32 {
        let avx = if components & XCR0_AVX != 0 { 832 } else { 576 };
        if components & XCR0_PKRU != 0 { self.pkru_offset() + 8 } else { avx }
    }

    /// The vendor's twelve characters.
    pub fn vendor_name(&self) -> String {
        self.vendor.iter().flat_map(|w| w.to_le_bytes()).map(char::from).collect()
    }

    /// The highest basic leaf: IA32_MISC_ENABLE can hide those of younger processors (SDM volume 4 table 2-2).
    fn basic_max(&self, misc_enable: u64) -> u32 {
        if misc_enable & number::MISC_ENABLE_LIMIT_CPUID != 0 { 2 } else { 0x16 }
    }
}

/// Bits of CR4 that a model has (SDM volume 3 section 2.5).
fn cr4_bits(set: &X86Features) -> u64 {
    let bits = [
        ("vme", CR4_VME | CR4_PVI),
        ("tsc", CR4_TSD),
        ("de", CR4_DE),
        ("pse", CR4_PSE),
        ("pae", CR4_PAE),
        ("mce", CR4_MCE),
        ("pge", CR4_PGE),
        ("fxsr", CR4_OSFXSR),
        ("sse", CR4_OSXMMEXCPT),
        ("umip", CR4_UMIP),
        ("la57", CR4_LA57),
        ("fsgsbase", CR4_FSGSBASE),
        ("pcid", CR4_PCIDE),
        ("xsave", CR4_OSXSAVE),
        ("smep", CR4_SMEP),
        ("smap", CR4_SMAP),
        ("pku", CR4_PKE),
    ];
    bits.iter().filter(|(name, _)| set.has_name(name)).fold(CR4_PCE, |all, (_, bit)| all | bit)
}

fn signature(model: &X86Model) -> u32 {
    let family = u32::from(model.family);
    let (base, extended) = if family >= 15 { (15, family - 15) } else { (family, 0) };
    let number = u32::from(model.model);
    u32::from(model.stepping & 15) | (number & 15) << 4 | base << 8 | (number >> 4) << 16 | extended << 20
}

/// EAX, EBX, ECX, EDX of a leaf.
pub fn cpuid(st: &State, leaf: u32, subleaf: u32) -> [u32; 4] {
    let f = &st.features;
    let word = |w: FeatureWord| f.set.word(w);
    let last = f.basic_max(st.msrs.misc_enable);
    let leaf = match leaf {
        0..0x4000_0000 if leaf > last => last,
        0x8000_0009..=0x8fff_ffff => return [0; 4],
        other => other,
    };
    match leaf {
        0 => [last, f.vendor[0], f.vendor[2], f.vendor[1]],
        1 => {
            let osxsave = u32::from(st.cr4 & CR4_OSXSAVE != 0) << 27;
            let mut edx = word(FeatureWord::F1Edx);
            if st.apic_base & 1 << 11 == 0 {
                edx &= !(1 << 9);
            }
            // EBX: CLFLUSH line of 8 quadwords, one logical processor, the local APIC's number.
            let ebx = 8 << 8 | 1 << 16 | f.index << 24;
            [f.signature, ebx, word(FeatureWord::F1Ecx) & !(1 << 27) | osxsave, edx]
        }
        4 => cache(subleaf),
        5 => [0; 4],
        6 => [word(FeatureWord::F6Eax), 0, 0, 0],
        7 => match subleaf {
            0 => {
                let ospke = u32::from(st.cr4 & CR4_PKE != 0) << 4;
                [1, word(FeatureWord::F7Ebx), word(FeatureWord::F7Ecx) & !(1 << 4) | ospke, word(FeatureWord::F7Edx)]
            }
            1 => [word(FeatureWord::F7s1Eax), 0, 0, 0],
            _ => [0; 4],
        },
        0xb => match subleaf {
            // One thread to a core, one core to a package.
            0 => [0, 1, 1 << 8, f.index],
            1 => [0, 1, 2 << 8 | 1, f.index],
            _ => [0, 0, subleaf & 0xff, f.index],
        },
        0xd => xsave_leaf(st, subleaf),
        0x15 => [1, st.tsc_khz / 25_000, 25_000_000, 0],
        0x16 => [st.tsc_khz / 1000, st.tsc_khz / 1000, 100, 0],
        0x4000_0000 if f.has("hypervisor") => {
            let name = if f.kvm { KVM_SIGNATURE } else { SIGNATURE };
            let at = |i: usize| u32::from_le_bytes([name[i], name[i + 1], name[i + 2], name[i + 3]]);
            [0x4000_0001, at(0), at(4), at(8)]
        }
        0x4000_0001 if f.has("hypervisor") && f.kvm => [word(FeatureWord::KvmEax), 0, 0, 0],
        0x8000_0000 => [0x8000_0008, f.vendor[0], f.vendor[2], f.vendor[1]],
        0x8000_0001 => {
            let mut edx = word(FeatureWord::F81Edx);
            if !f.long_mode {
                edx &= !(1 << 29);
            }
            if !st.has_nx() {
                edx &= !(1 << 20);
            }
            [f.signature, 0, word(FeatureWord::F81Ecx), edx]
        }
        0x8000_0002..=0x8000_0004 => {
            let start = (leaf - 0x8000_0002) as usize * 16;
            std::array::from_fn(|i| {
                let at = start + i * 4;
                u32::from_le_bytes([f.brand[at], f.brand[at + 1], f.brand[at + 2], f.brand[at + 3]])
            })
        }
        // 32 KiB, 8-way, 64-byte lines, of data and of code.
        0x8000_0005 => [0x01ff_01ff, 0x01ff_01ff, 0x2008_0140, 0x2008_0140],
        // 512 KiB, 8-way second-level cache.
        // 16 MiB, 16-way third-level one: C libraries copy past the caches what is larger than three quarters of it.
        0x8000_0006 => [0, 0x4200_4200, 0x0200_6140, 0x0080_8140],
        0x8000_0007 => [0, 0, 0, word(FeatureWord::F87Edx)],
        0x8000_0008 => {
            let linear = if f.has("la57") { 57 } else { 48 };
            let linear = if f.long_mode { linear } else { 32 };
            [u32::from(f.phys_bits) | linear << 8, word(FeatureWord::F88Ebx), 0, 0]
        }
        _ => [0; 4],
    }
}

/// Leaf 4: first-level data and code caches of 32 KiB, a second level of 512 KiB.
fn cache(subleaf: u32) -> [u32; 4] {
    let (kind, level, ways, sets) = match subleaf {
        0 => (1, 1, 8, 64),
        1 => (2, 1, 8, 64),
        2 => (3, 2, 8, 1024),
        3 => (3, 3, 16, 16384),
        _ => return [0; 4],
    };
    [kind | level << 5 | 1 << 8, 63 | (ways - 1) << 22, sets - 1, 0]
}

/// Bytes of the XSAVE area for these components, in its compacted form.
pub fn compacted_size(components: u64) -> u32 {
    let avx = if components & XCR0_AVX != 0 { 832 } else { 576 };
    if components & XCR0_PKRU != 0 { avx + 8 } else { avx }
}

fn xsave_leaf(st: &State, subleaf: u32) -> [u32; 4] {
    let f = &st.features;
    if !f.has("xsave") {
        return [0; 4];
    }
    let all = f.xcr0_mask();
    match subleaf {
        0 => [all as u32, f.xsave_size(st.xcr0), f.xsave_size(all), 0],
        // No component is the supervisor's.
        1 => [f.set.word(FeatureWord::FdEax), compacted_size(st.xcr0 | st.msrs.xss), 0, 0],
        2 if f.avx => [256, 576, 0, 0],
        9 if all & XCR0_PKRU != 0 => [8, f.pkru_offset(), 0, 0],
        _ => [0; 4],
    }
}
