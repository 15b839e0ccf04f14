//! What CPUID says of a model.
//!
//! Spec: SDM volume 2 "CPUID"; APM volume 3 appendix E; `Documentation/virt/kvm/x86/cpuid.rst` for leaves
//! 0x4000_00xx.
//! Topology: one package, one thread per core; the APIC id is the vCPU's number.

use super::features::{CpuidReg, FeatureWord, X86Features};
use super::models::{Vendor, X86Model};
use super::xsave::{COMPONENTS, XsaveLayout, components};

/// One leaf, or one subleaf of a leaf that has several.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CpuidEntry {
    /// EAX of the question.
    pub leaf: u32,
    /// ECX of the question.
    pub subleaf: u32,
    /// The answer depends on ECX.
    pub indexed: bool,
    /// The answer: EAX, EBX, ECX, EDX.
    pub regs: [u32; 4],
}

/// What CPUID says besides the model.
#[derive(Clone, Copy, Debug)]
pub struct CpuidSetup {
    /// The vCPU's number and APIC id.
    pub apic_id: u32,
    /// vCPUs of the machine.
    pub vcpus: u32,
    /// Width of physical addresses, unless the model says.
    pub phys_bits: u8,
    /// Where XSAVE components are.
    pub layout: XsaveLayout,
    /// State components that exist at all.
    pub components: u64,
}

/// Size and associativity of the caches shown: L1 data and instruction, L2, L3.
const CACHES: [(u32, u32, u32, u32); 4] = [
    // (type 1 data, 2 code, 3 both; level; KiB; ways)
    (1, 1, 32, 8),
    (2, 1, 32, 8),
    (3, 2, 1024, 16),
    (3, 3, 16384, 16),
];
const LINE: u32 = 64;

/// Bits needed to number `n` things.
fn bits_for(n: u32) -> u32 {
    n.max(1).next_power_of_two().trailing_zeros()
}

impl X86Model {
    /// The features this CPU has: those of the model with what the number of vCPUs implies.
    fn effective(&self, setup: &CpuidSetup) -> X86Features {
        let mut f = self.features;
        let multi = setup.vcpus > 1;
        if multi {
            f = f.union(X86Features::of(&["ht"]));
            if self.vendor == Vendor::Amd && f.has_name("lm") {
                f = f.union(X86Features::of(&["cmp-legacy"]));
            }
        }
        // These two follow CR4, which is not set at reset.
        f.difference(X86Features::of(&["osxsave", "ospke"]))
    }

    /// Leaf 1 EAX.
    pub fn signature(&self) -> u32 {
        let family = u32::from(self.family);
        let (base, extended) = if family > 15 { (15, family - 15) } else { (family, 0) };
        let model = u32::from(self.model);
        extended << 20 | (model >> 4) << 16 | base << 8 | (model & 15) << 4 | u32::from(self.stepping & 15)
    }

    /// All entries of one vCPU.
    pub fn cpuid(&self, setup: &CpuidSetup) -> Vec<CpuidEntry> {
        let f = self.effective(setup);
        let mut out = Table { f, entries: Vec::new() };
        self.basic_leaves(setup, &mut out);
        if f.has_name("xsave") {
            xsave_leaves(setup, &mut out);
        }
        if self.kvm && f.has_name("hypervisor") {
            let [b, c, d] = words(b"KVMKVMKVM\0\0\0");
            out.add(0x4000_0000, [0x4000_0001, b, c, d]);
            out.add(0x4000_0001, [0; 4]);
        }
        self.extended_leaves(setup, &mut out);
        out.finish()
    }

    fn basic_leaves(&self, setup: &CpuidSetup, out: &mut Table) {
        let f = out.f;
        let [b, d, c] = words(self.vendor.name().as_bytes());
        let max = if f.has_name("xsave") {
            0xd
        } else if self.vendor == Vendor::Intel || f.has_name("x2apic") {
            0xb
        } else {
            7
        };
        out.add(0, [max, b, c, d]);
        let count = setup.vcpus.next_power_of_two().min(255);
        out.add(1, [self.signature(), setup.apic_id << 24 | count << 16 | (LINE / 8) << 8, 0, 0]);
        if self.vendor == Vendor::Intel {
            // 0xff: see leaf 4.
            out.add(2, [0xff01, 0, 0, 0]);
            let sharing = bits_for(setup.vcpus);
            let cores = (1u32 << sharing) - 1;
            for (i, (kind, level, kib, ways)) in CACHES.into_iter().enumerate() {
                let shared = if level == 3 { cores.min(0xfff) } else { 0 };
                let sets = kib * 1024 / ways / LINE;
                let eax = kind | level << 5 | 1 << 8 | shared << 14 | cores.min(63) << 26;
                out.indexed(4, i as u32, [eax, (ways - 1) << 22 | (LINE - 1), sets - 1, 0]);
            }
            out.indexed(4, CACHES.len() as u32, [0; 4]);
        }
        out.add(6, [0; 4]);
        let subleaves = u32::from(f.word(FeatureWord::F7s1Eax) != 0);
        out.indexed(7, 0, [subleaves, 0, 0, 0]);
        if subleaves > 0 {
            out.indexed(7, 1, [0; 4]);
        }
        if max >= 0xb {
            out.indexed(0xb, 0, [0, 1, 1 << 8, setup.apic_id]);
            out.indexed(0xb, 1, [bits_for(setup.vcpus), setup.vcpus, 2 << 8 | 1, setup.apic_id]);
            out.indexed(0xb, 2, [0, 0, 2, setup.apic_id]);
        }
    }

    fn extended_leaves(&self, setup: &CpuidSetup, out: &mut Table) {
        let f = out.f;
        let amd = self.vendor == Vendor::Amd;
        let [b, d, c] = if amd { words(self.vendor.name().as_bytes()) } else { [0; 3] };
        out.add(0x8000_0000, [0x8000_0008, b, c, d]);
        // AMD repeats the features of leaf 1 that it had first.
        let repeated = if amd { f.word(FeatureWord::F1Edx) & 0x0183_f3ff } else { 0 };
        out.add(0x8000_0001, [if amd { self.signature() } else { 0 }, 0, 0, repeated]);
        let mut brand = [0; 48];
        let len = self.brand.len().min(47);
        brand[..len].copy_from_slice(&self.brand.as_bytes()[..len]);
        for (leaf, part) in (0x8000_0002..).zip(brand.chunks(16)) {
            let word = |i: usize| u32::from_le_bytes([part[i], part[i + 1], part[i + 2], part[i + 3]]);
            out.add(leaf, [word(0), word(4), word(8), word(12)]);
        }
        let l1 = |i: usize| CACHES[i].2 << 24 | CACHES[i].3 << 16 | 1 << 8 | LINE;
        // Associativity is coded: 8 means 16 ways.
        let l2 = CACHES[2].2 << 16 | 8 << 12 | LINE;
        let l3 = (CACHES[3].2 / 512) << 18 | 8 << 12 | 1 << 8 | LINE;
        out.add(0x8000_0005, if amd { [0, 0, l1(0), l1(1)] } else { [0; 4] });
        out.add(0x8000_0006, [0, 0, l2, if amd { l3 } else { 0 }]);
        out.add(0x8000_0007, [0; 4]);
        let phys = if self.phys_bits > 0 { self.phys_bits } else { setup.phys_bits };
        let linear = match () {
            () if f.has_name("la57") => 57,
            () if f.has_name("lm") => 48,
            () => 32,
        };
        let cores = if amd { bits_for(setup.vcpus) << 12 | (setup.vcpus - 1).min(255) } else { 0 };
        out.add(0x8000_0008, [u32::from(phys) | linear << 8, 0, cores, 0]);
    }
}

fn xsave_leaves(setup: &CpuidSetup, out: &mut Table) {
    let mask = components(&out.f) & setup.components;
    let size = setup.layout.size(mask) as u32;
    let legacy = setup.layout.size(3) as u32;
    out.indexed(0xd, 0, [mask as u32, legacy, size, (mask >> 32) as u32]);
    out.indexed(0xd, 1, [0, legacy, 0, 0]);
    for bit in (2..COMPONENTS).filter(|bit| mask >> bit & 1 != 0) {
        let (offset, size) = setup.layout.0[bit];
        // TILEDATA is on a 64-byte boundary in the compacted form.
        let aligned = if bit == 17 || bit == 18 { 2 } else { 0 };
        out.indexed(0xd, bit as u32, [size, offset, aligned, 0]);
    }
}

/// Twelve characters as three little-endian words.
fn words(text: &[u8]) -> [u32; 3] {
    std::array::from_fn(|i| text.get(i * 4..i * 4 + 4).map_or(0, |w| u32::from_le_bytes([w[0], w[1], w[2], w[3]])))
}

struct Table {
    f: X86Features,
    entries: Vec<CpuidEntry>,
}

impl Table {
    fn add(&mut self, leaf: u32, regs: [u32; 4]) {
        self.entries.push(CpuidEntry { leaf, subleaf: 0, indexed: false, regs });
    }

    fn indexed(&mut self, leaf: u32, subleaf: u32, regs: [u32; 4]) {
        self.entries.push(CpuidEntry { leaf, subleaf, indexed: true, regs });
    }

    /// Puts the features in.
    fn finish(mut self) -> Vec<CpuidEntry> {
        for word in FeatureWord::ALL {
            let (leaf, subleaf, reg) = word.place();
            let reg = match reg {
                CpuidReg::Eax => 0,
                CpuidReg::Ebx => 1,
                CpuidReg::Ecx => 2,
                CpuidReg::Edx => 3,
            };
            if let Some(e) = self.entries.iter_mut().find(|e| (e.leaf, e.subleaf) == (leaf, subleaf)) {
                e.regs[reg] |= self.f.word(word);
            }
        }
        self.entries
    }
}

#[cfg(test)]
mod tests {
    use super::super::xsave::LAYOUT;
    use super::*;
    use crate::guest_arch::GuestArch;

    fn entries(text: &str, vcpus: u32, apic_id: u32) -> Vec<CpuidEntry> {
        let model = X86Model::parse(GuestArch::X86_64, text).unwrap();
        let setup = CpuidSetup { apic_id, vcpus, phys_bits: 40, layout: LAYOUT, components: u64::MAX };
        model.cpuid(&setup)
    }

    fn find(all: &[CpuidEntry], leaf: u32, subleaf: u32) -> [u32; 4] {
        all.iter().find(|e| (e.leaf, e.subleaf) == (leaf, subleaf)).unwrap().regs
    }

    #[test]
    fn identity_and_features() {
        let all = entries("x86-64-v3", 1, 0);
        let [max, b, c, d] = find(&all, 0, 0);
        assert_eq!(max, 0xd);
        let name: Vec<u8> = [b, d, c].into_iter().flat_map(u32::to_le_bytes).collect();
        assert_eq!(name, b"GenuineIntel");
        let [sig, _, ecx, edx] = find(&all, 1, 0);
        assert_eq!(sig, 0x306c4);
        assert_eq!((ecx >> 28 & 1, edx >> 26 & 1, edx >> 28 & 1), (1, 1, 0));
        assert_eq!(find(&all, 7, 0)[1] >> 5 & 1, 1);
        // AVX's place, and the size with it.
        assert_eq!(find(&all, 0xd, 2), [256, 576, 0, 0]);
        assert_eq!(find(&all, 0xd, 0)[..3], [7, 576, 832]);
        assert_eq!(find(&all, 0x4000_0000, 0)[1].to_le_bytes(), *b"KVMK");
        assert_eq!(find(&all, 0x8000_0008, 0)[0], 40 | 48 << 8);
        let keys: Vec<_> = all.iter().map(|e| (e.leaf, e.subleaf)).collect();
        assert!(keys.iter().enumerate().all(|(i, k)| !keys[..i].contains(k)), "no entry twice");
    }

    #[test]
    fn topology_and_options() {
        let all = entries("qemu64,kvm=off,phys-bits=36", 5, 3);
        assert!(!all.iter().any(|e| e.leaf == 0x4000_0000));
        let [_, ebx, _, edx] = find(&all, 1, 0);
        assert_eq!((ebx >> 24, ebx >> 16 & 0xff, edx >> 28 & 1), (3, 8, 1));
        assert_eq!(find(&all, 0xb, 1), [3, 5, 0x201, 3]);
        assert_eq!(find(&all, 0x8000_0008, 0)[0] & 0xff, 36);
        assert_eq!(find(&all, 0x8000_0008, 0)[2], 3 << 12 | 4);
        // AMD's own leaf repeats the features of leaf 1.
        assert_eq!(find(&all, 0x8000_0001, 0)[3] & 1, 1);
        let all = entries("qemu64", 1, 0);
        assert_eq!(find(&all, 0x8000_0002, 0)[0].to_le_bytes(), *b"Mimu");
    }
}
