//! What the host's KVM can give a guest, and the CPUID tables of vCPUs.

use crate::error::errno;
use kvm_bindings::{CpuId, KVM_CPUID_FLAG_SIGNIFCANT_INDEX, KVM_MAX_CPUID_ENTRIES, kvm_cpuid_entry2};
use kvm_ioctls::{Cap, Kvm};
use mimus_arch::x86::cpuid::CpuidSetup;
use mimus_arch::x86::features::{CpuidReg, FeatureWord};
use mimus_arch::x86::xsave::{COMPONENTS, XsaveLayout};
use mimus_arch::x86::{Vendor, X86Features, X86Model};
use mimus_core::accel::AccelError;

/// Paravirtual features that need hypercalls: only if asked for by name, since not every KVM completes them.
const HYPERCALL_FEATURES: &[&str] = &["kvm-pv-unhalt", "kvm-pv-ipi", "kvm-pv-sched-yield", "kvm-pv-tlb-flush"];

/// What is never given unless asked for by name: nested virtualisation, which is not saved; and page faults
/// that are delivered later, which need help from the guest's interrupt handlers.
const RESERVED_FEATURES: &[&str] = &["vmx", "svm", "kvm-asyncpf", "kvm-asyncpf-int"];

/// The host's processor as KVM shows it.
#[derive(Clone, Debug)]
pub struct HostCpu {
    supported: X86Features,
    entries: Vec<kvm_cpuid_entry2>,
    /// Where the host's processor has XSAVE components.
    pub layout: XsaveLayout,
    /// Which ones there are.
    pub components: u64,
    /// Width of physical addresses.
    pub phys_bits: u8,
}

fn register(e: &kvm_cpuid_entry2, reg: CpuidReg) -> u32 {
    match reg {
        CpuidReg::Eax => e.eax,
        CpuidReg::Ebx => e.ebx,
        CpuidReg::Ecx => e.ecx,
        CpuidReg::Edx => e.edx,
    }
}

impl HostCpu {
    /// Asks KVM.
    pub fn read(kvm: &Kvm) -> Result<Self, AccelError> {
        let table = kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES).map_err(errno("read the CPUID it supports"))?;
        let deadline = kvm.check_extension(Cap::TscDeadlineTimer);
        Ok(Self::from_entries(table.as_slice().to_vec(), deadline))
    }

    fn from_entries(entries: Vec<kvm_cpuid_entry2>, tsc_deadline: bool) -> Self {
        let find = |leaf, subleaf| entries.iter().find(|e| (e.function, e.index) == (leaf, subleaf));
        let mut supported = X86Features::EMPTY;
        for word in FeatureWord::ALL {
            let (leaf, subleaf, reg) = word.place();
            supported.set_word(word, find(leaf, subleaf).map_or(0, |e| register(e, reg)));
        }
        // What KVM or the local APIC provides whatever the processor has.
        supported = supported.union(X86Features::of(&["hypervisor", "x2apic", "arat", "ht", "cmp-legacy"]));
        if tsc_deadline {
            supported = supported.union(X86Features::of(&["tsc-deadline"]));
        }
        let components = find(0xd, 0).map_or(3, |e| u64::from(e.edx) << 32 | u64::from(e.eax));
        let mut layout = XsaveLayout([(0, 0); COMPONENTS]);
        for (bit, place) in layout.0.iter_mut().enumerate().skip(2) {
            if let Some(e) = find(0xd, bit as u32).filter(|e| components >> bit & 1 != 0 && e.ecx & 1 == 0) {
                *place = (e.ebx, e.eax);
            }
        }
        let phys_bits = find(0x8000_0008, 0).map_or(36, |e| (e.eax & 0xff) as u8);
        Self { supported, entries, layout, components, phys_bits }
    }

    fn entry(&self, leaf: u32) -> Option<&kvm_cpuid_entry2> {
        self.entries.iter().find(|e| e.function == leaf)
    }

    /// Gives the model the host's identity.
    fn identify(&self, model: &mut X86Model) {
        if let Some(e) = self.entry(0) {
            let name: Vec<u8> = [e.ebx, e.edx, e.ecx].into_iter().flat_map(u32::to_le_bytes).collect();
            let amd = name == b"AuthenticAMD" || name == b"HygonGenuine";
            model.vendor = if amd { Vendor::Amd } else { Vendor::Intel };
        }
        if let Some(e) = self.entry(1) {
            let (base, extended) = (e.eax >> 8 & 15, e.eax >> 20 & 0xff);
            model.family = (if base == 15 { base + extended } else { base }) as u16;
            let high = if base == 15 || base == 6 { e.eax >> 16 & 15 } else { 0 };
            model.model = (high << 4 | e.eax >> 4 & 15) as u8;
            model.stepping = (e.eax & 15) as u8;
        }
        let words = (0x8000_0002..=0x8000_0004).filter_map(|leaf| self.entry(leaf));
        let bytes: Vec<u8> = words.flat_map(|e| [e.eax, e.ebx, e.ecx, e.edx]).flat_map(u32::to_le_bytes).collect();
        let brand = String::from_utf8_lossy(bytes.split(|b| *b == 0).next().unwrap_or_default()).trim().to_owned();
        if !brand.is_empty() && brand.len() < 48 {
            model.brand = brand;
        }
    }

    /// The model as this host can give it; says what of it is missing.
    pub fn restrict(&self, model: &X86Model) -> Result<X86Model, AccelError> {
        if let Some(nested) = ["vmx", "svm"].into_iter().find(|f| self.lacks_asked_for(model, f)) {
            return Err(AccelError::Other(format!(
                "CPU model {}: {nested}: virtual machines inside the guest need nested virtualisation, which this \
                 host's KVM does not have (module kvm_intel or kvm_amd, parameter nested=1): leave +{nested} out",
                model.name
            )));
        }
        let mut wanted = model.clone();
        if model.host {
            self.identify(&mut wanted);
        }
        let held_back = X86Features::of(HYPERCALL_FEATURES).union(X86Features::of(RESERVED_FEATURES));
        let offered = if model.all {
            // All, but what is held back only by name.
            self.supported.difference(held_back.difference(model.explicit))
        } else {
            self.supported
        };
        let out = wanted.restricted_to(offered)?;
        let missing = wanted.features.difference(out.features);
        if !missing.is_empty() && !model.all {
            log::warn!("CPU model {}: this host's KVM has no {missing}; the guest runs without", model.name);
        }
        if out.phys_bits > self.phys_bits {
            let most = self.phys_bits;
            return Err(AccelError::Other(format!(
                "CPU model {}: phys-bits={} is more than this host's {most}: use phys-bits={most} or less",
                out.name, out.phys_bits
            )));
        }
        Ok(out)
    }

    fn lacks_asked_for(&self, model: &X86Model, feature: &'static str) -> bool {
        let f = X86Features::of(&[feature]);
        !f.difference(self.supported).is_empty() && f.difference(model.explicit).is_empty()
    }

    /// The table of one vCPU.
    pub fn table(&self, model: &X86Model, index: u32, vcpus: u32) -> Result<CpuId, AccelError> {
        let setup = CpuidSetup {
            apic_id: index,
            vcpus,
            phys_bits: self.phys_bits,
            layout: self.layout,
            components: self.components,
        };
        let entry = |e: mimus_arch::x86::cpuid::CpuidEntry| kvm_cpuid_entry2 {
            function: e.leaf,
            index: e.subleaf,
            flags: if e.indexed { KVM_CPUID_FLAG_SIGNIFCANT_INDEX } else { 0 },
            eax: e.regs[0],
            ebx: e.regs[1],
            ecx: e.regs[2],
            edx: e.regs[3],
            padding: [0; 3],
        };
        let entries: Vec<_> = model.cpuid(&setup).into_iter().map(entry).collect();
        CpuId::from_entries(&entries).map_err(|_| AccelError::Other("kvm: too many CPUID entries".to_owned()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use mimus_arch::GuestArch;

    fn entry(function: u32, index: u32, regs: [u32; 4]) -> kvm_cpuid_entry2 {
        let [eax, ebx, ecx, edx] = regs;
        kvm_cpuid_entry2 { function, index, eax, ebx, ecx, edx, ..Default::default() }
    }

    fn host() -> HostCpu {
        let entries = vec![
            entry(0, 0, [0xd, 0x756e_6547, 0x6c65_746e, 0x4965_6e69]),
            entry(1, 0, [0x0005_0657, 0, 1 << 28 | 1 << 26 | 1 << 5, u32::MAX]),
            entry(0xd, 0, [7, 576, 832, 0]),
            entry(0xd, 2, [256, 576, 0, 0]),
            entry(0x4000_0001, 0, [1 << 3 | 1 << 11, 0, 0, 0]),
            entry(0x8000_0001, 0, [0, 0, 1, 1 << 29 | 1 << 20 | 1 << 11]),
            entry(0x8000_0008, 0, [46, 0, 0, 0]),
        ];
        HostCpu::from_entries(entries, true)
    }

    fn restrict(text: &str) -> Result<X86Model, AccelError> {
        host().restrict(&X86Model::parse(GuestArch::X86_64, text).unwrap())
    }

    #[test]
    fn host_model() {
        let m = restrict("host,-avx").unwrap();
        assert_eq!((m.vendor, m.family, m.model, m.stepping), (Vendor::Intel, 6, 0x55, 7));
        assert!(m.features.has_name("xsave") && !m.features.has_name("avx"));
        // Nested virtualisation and hypercalls only by name.
        assert!(!m.features.has_name("vmx") && !m.features.has_name("kvm-pv-ipi"));
        let m = restrict("host,+vmx,+kvm-pv-ipi").unwrap();
        assert!(m.features.has_name("vmx") && m.features.has_name("kvm-pv-ipi"));
    }

    #[test]
    fn named_models() {
        let m = restrict("x86-64-v2").unwrap();
        assert!(m.features.has_name("lm") && !m.features.has_name("popcnt"));
        assert!(restrict("x86-64-v2,+popcnt").unwrap_err().to_string().contains("no popcnt"));
        assert!(restrict("qemu64,phys-bits=48").unwrap_err().to_string().contains("phys-bits=46"));
        let table = host().table(&restrict("qemu64").unwrap(), 1, 2).unwrap();
        let one = table.as_slice().iter().find(|e| e.function == 1).unwrap();
        assert_eq!(one.ebx >> 24, 1);
    }
}
