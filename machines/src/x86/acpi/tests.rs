use std::process::Command;

use super::table::{RSDP_LEN, checksum};
use super::*;

pub(crate) fn q35() -> Config {
    Config {
        apic_ids: (0..4).collect(),
        platform: Platform::Pc(Pc {
            chipset: Chipset::Q35,
            pm_base: 0x600,
            gpe0: 0x620,
            gpe0_len: 16,
            sci: 9,
            smi: Some(SmiCommand { port: 0xb2, acpi_enable: 2, acpi_disable: 3 }),
            level_irqs: vec![5, 10, 11],
            mmio32: (0xc000_0000, 0x3ec0_0000),
            mmio64: Some((0x1_8000_0000, 0x7e_8000_0000)),
            ecam: Some((0xb000_0000, 256)),
            hpet: Some((0xfed0_0000, 0x8086_a201)),
            serials: [true, true],
            i8042: true,
            sleep: SleepStates { ram: 1, disk: 2, off: 0 },
        }),
    }
}

pub(crate) fn pc() -> Config {
    let mut config = q35();
    if let Platform::Pc(p) = &mut config.platform {
        (p.chipset, p.gpe0, p.gpe0_len, p.ecam, p.mmio64) = (Chipset::I440fx, 0xafe0, 4, None, None);
        (p.smi, p.serials) = (None, [true, false]);
    }
    config
}

pub(crate) fn microvm() -> Config {
    Config {
        apic_ids: vec![0, 1, 0x100],
        platform: Platform::Microvm(Microvm {
            ged_event: 0xfea0_0000,
            ged_registers: 0xfea0_0200,
            ged_irq: 9,
            virtio: (0..8).map(|i| (0xfeb0_0000 + i * 0x200, 16 + i as u32)).collect(),
            rtc: true,
            serial: true,
            fw_cfg: true,
        }),
    }
}

fn all() -> [(&'static str, Config); 3] {
    [("q35", q35()), ("pc", pc()), ("microvm", microvm())]
}

fn number(bytes: &[u8], at: usize, width: usize) -> u64 {
    (0..width).map(|i| u64::from(bytes[at + i]) << (8 * i)).sum()
}

/// The tables one finds from the root pointer on, as a system does.
fn walk(rsdp: &[u8], blob: &[u8], base: u64) -> Vec<(String, Vec<u8>)> {
    assert_eq!(&rsdp[..8], b"RSD PTR ");
    assert_eq!((checksum(&rsdp[..20]), checksum(rsdp)), (0, 0));
    let table = |address: u64| {
        let at = (address - base) as usize;
        let len = number(blob, at + 4, 4) as usize;
        blob[at..at + len].to_vec()
    };
    let name = |t: &[u8]| String::from_utf8(t[..4].to_vec()).unwrap();
    let list =
        |root: &[u8], width: usize| -> Vec<u64> { root[36..].chunks(width).map(|c| number(c, 0, width)).collect() };
    let (rsdt, xsdt) = (table(number(rsdp, 16, 4)), table(number(rsdp, 24, 8)));
    assert_eq!((name(&rsdt), name(&xsdt)), ("RSDT".into(), "XSDT".into()));
    assert_eq!(list(&rsdt, 4), list(&xsdt, 8));
    let mut out = vec![(name(&rsdt), rsdt.clone()), (name(&xsdt), xsdt.clone())];
    for address in list(&xsdt, 8) {
        let t = table(address);
        if name(&t) == "FACP" {
            let dsdt = number(&t, fixed::fadt::X_DSDT, 8);
            assert_eq!(dsdt, number(&t, fixed::fadt::DSDT, 4));
            out.push(("DSDT".into(), table(dsdt)));
            let facs = number(&t, fixed::fadt::FIRMWARE_CTRL, 4);
            if facs != 0 {
                assert_eq!(facs % 64, 0);
                out.push(("FACS".into(), table(facs)));
            }
        }
        out.push((name(&t), t));
    }
    out
}

#[test]
fn every_table_is_found_and_sums_to_zero() {
    let base = 0x1ffe_0000;
    for (board, config) in all() {
        let set = build(&config);
        let tables = walk(&set.rsdp(base), &set.place(base), base);
        for (name, t) in tables.iter().filter(|t| t.0 != "FACS") {
            assert_eq!(checksum(t), 0, "{board} {name}");
        }
        let names: Vec<&str> = tables.iter().map(|t| t.0.as_str()).collect();
        let want: &[&str] = match board {
            "q35" => &["RSDT", "XSDT", "DSDT", "FACS", "FACP", "APIC", "HPET", "MCFG", "WAET"],
            "pc" => &["RSDT", "XSDT", "DSDT", "FACS", "FACP", "APIC", "HPET", "WAET"],
            _ => &["RSDT", "XSDT", "DSDT", "FACP", "APIC"],
        };
        assert_eq!(names, want, "{board}");
    }
}

/// Firmware that follows the instructions gets what [`TableSet::place`] gives.
#[test]
fn the_loader_says_the_same() {
    let (base, root_at) = (0x7ffd_0040u64, 0xf_5a00u64);
    for (_, config) in all() {
        let set = build(&config);
        let files = loader::files(&set);
        let mut blobs = [(loader::TABLES, files[0].1.clone(), base), (loader::RSDP, files[1].1.clone(), root_at)];
        let text = |e: &[u8], at: usize| {
            String::from_utf8(e[at..at + 56].iter().copied().take_while(|b| *b != 0).collect()).unwrap()
        };
        assert_eq!(files[2].1.len() % 128, 0);
        let mut allocated = Vec::new();
        for e in files[2].1.chunks(128) {
            let file = text(e, 4);
            let i = blobs.iter().position(|b| b.0 == file).unwrap();
            match number(e, 0, 4) {
                1 => allocated.push(file),
                2 => {
                    let source = text(e, 60);
                    let target = blobs.iter().find(|b| b.0 == source).unwrap().2;
                    let (at, width) = (number(e, 116, 4) as usize, e[120] as usize);
                    let value = number(&blobs[i].1, at, width) + target;
                    blobs[i].1[at..at + width].copy_from_slice(&value.to_le_bytes()[..width]);
                }
                3 => {
                    let [at, start, len] = [60, 64, 68].map(|o| number(e, o, 4) as usize);
                    assert_eq!(blobs[i].1[at], 0);
                    blobs[i].1[at] = checksum(&blobs[i].1[start..start + len]);
                }
                other => panic!("command {other}"),
            }
        }
        assert_eq!(allocated, [loader::TABLES, loader::RSDP]);
        assert_eq!(blobs[0].1, set.place(base));
        assert_eq!(blobs[1].1, set.rsdp(base));
        assert_eq!(blobs[1].1.len(), RSDP_LEN);
    }
}

#[test]
fn fixed_hardware() {
    let set = build(&q35());
    let tables = walk(&set.rsdp(0x1000), &set.place(0x1000), 0x1000);
    let fadt = &tables.iter().find(|t| t.0 == "FACP").unwrap().1;
    assert_eq!(fadt.len(), 276);
    assert_eq!((number(fadt, 46, 2), number(fadt, 48, 4), fadt[52], fadt[53]), (9, 0xb2, 2, 3));
    assert_eq!((number(fadt, 56, 4), number(fadt, 64, 4), number(fadt, 76, 4)), (0x600, 0x604, 0x608));
    assert_eq!((number(fadt, 80, 4), fadt[92]), (0x620, 16));
    // RESET_REG: a byte at port 0xcf9.
    assert_eq!((&fadt[116..120], number(fadt, 120, 8), fadt[128]), (&[1, 8, 0, 1][..], 0xcf9, 0xe));
    // X_PM1a_EVT, X_PM_TMR.
    assert_eq!((&fadt[148..152], number(fadt, 152, 8)), (&[1, 32, 0, 3][..], 0x600));
    assert_eq!(number(fadt, 212, 8), 0x608);
    let madt = &tables.iter().find(|t| t.0 == "APIC").unwrap().1;
    assert_eq!(entries(madt).iter().filter(|e| e[0] == 0).count(), 4);
    let sources: Vec<(u8, u64, u64)> =
        entries(madt).iter().filter(|e| e[0] == 2).map(|e| (e[3], number(e, 4, 4), number(e, 8, 2))).collect();
    assert_eq!(sources, [(0, 2, 0), (5, 5, 0xd), (9, 9, 0xd), (10, 10, 0xd), (11, 11, 0xd)]);
}

#[test]
fn reduced_hardware() {
    let set = build(&microvm());
    let tables = walk(&set.rsdp(0x1000), &set.place(0x1000), 0x1000);
    let fadt = &tables.iter().find(|t| t.0 == "FACP").unwrap().1;
    assert_eq!(fadt.len(), 276);
    assert_eq!(number(fadt, 112, 4) >> 20 & 1, 1);
    assert!(fadt[48..109].iter().all(|b| *b == 0));
    assert_eq!((number(fadt, 120, 8), fadt[128]), (0xfea0_0202, 0x42));
    assert_eq!((number(fadt, 248, 8), number(fadt, 260, 8)), (0xfea0_0200, 0xfea0_0201));
    let madt = &tables.iter().find(|t| t.0 == "APIC").unwrap().1;
    let kinds: Vec<u8> = entries(madt).iter().map(|e| e[0]).collect();
    // Two processors with 8-bit ids, one without, I/O APIC, timer, NMIs of both kinds.
    assert_eq!(kinds, [0, 0, 9, 1, 2, 4, 10]);
}

fn entries(madt: &[u8]) -> Vec<&[u8]> {
    let (mut at, mut out) = (44, Vec::new());
    while at < madt.len() {
        out.push(&madt[at..at + madt[at + 1] as usize]);
        at += madt[at + 1] as usize;
    }
    assert_eq!(at, madt.len());
    out
}

/// ACPICA reads the tables, and compiles its own reading of the definition block without
/// a complaint.
#[test]
fn acpica_agrees() {
    if Command::new("iasl").arg("-v").output().is_err() {
        println!("SKIPPED (acpica_agrees): there is no iasl; install acpica-tools");
        return;
    }
    for (board, config) in all() {
        let dir = std::env::temp_dir().join(format!("mimus-acpi-{board}-{}", std::process::id()));
        std::fs::create_dir_all(&dir).unwrap();
        let set = build(&config);
        for (name, t) in walk(&set.rsdp(0), &set.place(0), 0) {
            let file = format!("{}.aml", name.to_lowercase());
            std::fs::write(dir.join(&file), t).unwrap();
            let (ok, text) = iasl(&dir, &["-d", &file]);
            assert!(ok && !text.contains("rror") && !text.contains("arning"), "{board} {name}: {text}");
        }
        let (ok, text) = iasl(&dir, &["-p", "again", "dsdt.dsl"]);
        assert!(ok && text.contains("0 Errors, 0 Warnings"), "{board}: {text}");
        std::fs::remove_dir_all(&dir).unwrap();
    }
}

fn iasl(dir: &std::path::Path, args: &[&str]) -> (bool, String) {
    let out = Command::new("iasl").args(args).current_dir(dir).output().unwrap();
    let text = [out.stdout, out.stderr].map(|b| String::from_utf8_lossy(&b).into_owned()).concat();
    (out.status.success(), text)
}

/// Interrupt routing as the boards are wired: swizzled by slot.
#[test]
fn routing() {
    use super::dsdt::pci_link_of as link;
    assert_eq!([1, 2, 3, 4].map(|slot| link(Chipset::I440fx, slot, 0)), [0, 1, 2, 3]);
    assert_eq!(link(Chipset::I440fx, 3, 2), 0);
    assert_eq!([0, 1, 2].map(|slot| link(Chipset::Q35, slot, 0)), [4, 5, 6]);
    assert_eq!(link(Chipset::Q35, 31, 2), 2);
}
