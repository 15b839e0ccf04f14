//! Tables made by hand.

use super::*;
use crate::linux::tests::{Ram, START, random};
use mimus_core::accel::RecentEvent;

/// Bytes at an address; nothing else.
struct Flat(u64, Vec<u8>);

impl Target for Flat {
    fn vcpus(&self) -> u32 {
        1
    }
    fn state(&self, _: u32) -> Result<mimus_arch::CpuState, String> {
        Err("it has none".to_owned())
    }
    fn set_state(&self, _: u32, _: mimus_arch::CpuState) -> Result<(), String> {
        Ok(())
    }
    fn translate(&self, _: u32, _: u64) -> Option<(u64, u64)> {
        None
    }
    fn read(&self, pa: u64, to: &mut [u8]) -> bool {
        let Some(at) = pa.checked_sub(self.0).and_then(|at| usize::try_from(at).ok()) else { return false };
        self.1.get(at..at.saturating_add(to.len())).map(|from| to.copy_from_slice(from)).is_some()
    }
    fn write(&self, _: u64, _: &[u8]) -> bool {
        false
    }
    fn insert(&self, _: crate::target::Point) -> Result<(), String> {
        Ok(())
    }
    fn remove(&self, _: crate::target::Point) -> Result<(), String> {
        Ok(())
    }
    fn running(&self) -> bool {
        false
    }
    fn go(&self) -> crate::target::Stop {
        crate::target::Stop::Paused
    }
    fn resume(&self) {}
    fn step(&self, _: u32, _: u64, _: crate::steps::StepKind) -> Result<crate::target::Stop, String> {
        Err("it stands".to_owned())
    }
    fn pause(&self) {}
    fn recent(&self, _: u32) -> Vec<RecentEvent> {
        Vec::new()
    }
    fn jumps(&self, _: u32) -> Vec<u64> {
        Vec::new()
    }
    fn disassemble(&self, _: u8, _: &[u8], _: u64) -> (String, usize) {
        (String::new(), 1)
    }
    fn regions(&self) -> Vec<crate::target::Region> {
        vec![crate::target::Region { base: self.0, len: self.1.len() as u64, kind: "ram", name: String::new() }]
    }
}

fn table(name: &[u8; 4], body: &[u8]) -> Vec<u8> {
    let mut out = name.to_vec();
    out.extend((36 + body.len() as u32).to_le_bytes());
    out.extend([1, 0]);
    out.extend(b"MIMUS MIMUSTBL");
    out.resize(36, 0);
    out.extend(body);
    out[9] = out.iter().fold(0u8, |s, b| s.wrapping_add(*b)).wrapping_neg();
    out
}

/// Memory from 0xe0000 on with a root pointer, two tables, and one that is damaged.
fn pc() -> Vec<u8> {
    let mut m = vec![0; 0x2_0000];
    let mut put = |at: usize, bytes: &[u8]| m[at - 0xe_0000..][..bytes.len()].copy_from_slice(bytes);
    let mut rsdp = b"RSD PTR \0MIMUS \0".to_vec();
    rsdp.extend(0xe_2000u32.to_le_bytes());
    rsdp[8] = rsdp.iter().fold(0u8, |s, b| s.wrapping_add(*b)).wrapping_neg();
    put(0xe_0010, &rsdp);
    let links: Vec<u8> = [0xe_3000u32, 0xe_4000, 0xe_5000, 0xffff_0000].iter().flat_map(|l| l.to_le_bytes()).collect();
    put(0xe_2000, &table(b"RSDT", &links));
    let madt = [
        &[0u8, 0, 0xe0, 0xfe, 1, 0, 0, 0][..],
        &[0, 8, 0, 5, 1, 0, 0, 0],
        &[1, 12, 1, 0, 0, 0, 0xc0, 0xfe, 0, 0, 0, 0],
    ]
    .concat();
    put(0xe_3000, &table(b"APIC", &madt));
    put(0xe_4000, &table(b"HPET", &[1, 2, 3, 4, 0, 0, 0, 0, 0, 0, 0xd0, 0xfe, 0, 0, 0, 0, 7]));
    let mut bad = table(b"SSDT", &[9; 8]);
    bad[40] = 1;
    put(0xe_5000, &bad);
    m
}

#[test]
fn acpi_tables() {
    let target = Flat(0xe_0000, pc());
    let list = acpi("", &target).unwrap();
    assert!(list.starts_with("RSDP at 0xe0010\nRSDT at 0xe2000"), "{list}");
    assert!(list.contains("APIC at 0xe3000, 64 bytes, revision 1, OEM \"MIMUS\" \"MIMUSTBL\"\n"), "{list}");
    assert!(
        list.contains("SSDT at 0xe5000, 44 bytes, revision 1, OEM \"MIMUS\" \"MIMUSTBL\" BAD CHECKSUM\n"),
        "{list}"
    );
    let madt = acpi("MADT", &target).unwrap();
    assert!(madt.contains("Processor Local APIC: UID 0, APIC ID 5, Flags 0x1\n"), "{madt}");
    assert!(madt.contains("I/O APIC: ID 1, at 0xfec00000, GSI base 0\n"), "{madt}");
    assert!(acpi("hpet", &target).unwrap().contains("BASE_ADDRESS                     0xfed00000\n"));
    assert!(acpi("SSDT", &target).unwrap().contains("0020: "));
    assert!(acpi("XYZ", &target).unwrap_err().contains("there are RSDT, APIC, HPET, SSDT"));
    assert!(acpi("", &Flat(0, vec![])).unwrap_err().contains("info fdt"));
}

fn tree() -> Vec<u8> {
    let (mut structure, strings) = (Vec::new(), b"compatible\0reg\0on\0");
    let mut word = |w: u32| structure.extend(w.to_be_bytes());
    // The root, compatible = "mimus,test", "x"
    [1, 0, 3, 13, 0].into_iter().for_each(&mut word);
    structure.extend(b"mimus,test\0x\0\0\0\0");
    let mut word = |w: u32| structure.extend(w.to_be_bytes());
    word(1);
    structure.extend(b"uart@10\0");
    let mut word = |w: u32| structure.extend(w.to_be_bytes());
    [3, 8, 11, 0, 0x1000_0000, 3, 0, 15, 3, 3, 11, 0x0102_0300, 2, 2, 9].into_iter().for_each(&mut word);
    let mut out = MAGIC_BYTES.to_vec();
    let size = 40 + structure.len() + strings.len();
    for w in [size, 40, 40 + structure.len(), 40, 17, 16, 0, strings.len(), structure.len()] {
        out.extend((w as u32).to_be_bytes());
    }
    out.extend(structure);
    out.extend(strings);
    out
}

const MAGIC_BYTES: [u8; 4] = [0xd0, 0x0d, 0xfe, 0xed];

fn ram_with_tree(tree: &[u8]) -> Flat {
    let mut bytes = vec![0; 0x3000];
    // A magic number that nothing follows is not one.
    bytes[0x800..0x804].copy_from_slice(&MAGIC_BYTES);
    bytes[0x1208..0x1208 + tree.len()].copy_from_slice(tree);
    Flat(0x8000_0000, bytes)
}

#[test]
fn a_device_tree() {
    let target = ram_with_tree(&tree());
    let text = fdt("", &target).unwrap();
    let wanted = "/ {\n    compatible = \"mimus,test\", \"x\";\n    uart@10 {\n        reg = <0x0 0x10000000>;\n        on;\n        \
                  reg = [01 02 03];\n    };\n};\n";
    assert!(text.starts_with("device tree at 0x80001208") && text.ends_with(wanted), "{text}");
    assert!(fdt("/uart", &target).unwrap().contains("    uart@10 {\n"));
    assert!(!fdt("/uart", &target).unwrap().contains("compatible"));
    assert!(fdt("/nowhere", &target).unwrap_err().contains("there is no node /nowhere"));
    assert!(fdt("", &Ram::new(8, START, vec![])).unwrap_err().contains("info acpi"));
}

/// Tables changed at random: answers or errors.
#[test]
fn hostile() {
    let (acpi_bytes, tree_bytes, mut seed) = (pc(), tree(), 7);
    for _ in 0..300 {
        let mut bad = acpi_bytes.clone();
        for _ in 0..4 {
            let at = [0x2000, 0x3000, 0x4000, 0x10][random(&mut seed) as usize % 4] + random(&mut seed) as usize % 64;
            bad[at] = random(&mut seed) as u8;
        }
        let target = Flat(0xe_0000, bad);
        for name in ["", "APIC", "HPET", "RSDT", "FACP", "MCFG"] {
            let _ = acpi(name, &target);
        }
        let mut bad = tree_bytes.clone();
        for _ in 0..2 {
            let at = random(&mut seed) as usize % bad.len();
            bad[at] = random(&mut seed) as u8;
        }
        let _ = fdt("", &ram_with_tree(&bad));
    }
}
