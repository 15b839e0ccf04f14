use super::bytes::u32_at;
use super::*;
use crate::boot::elf::tests::elf as elf64;
use crate::boot::gzip::tests::compress;

const MIB: u64 = 1 << 20;

fn linux() -> Image {
    load_kernel("-kernel k", bzimage::tests::bzimage(0x1000), "x86_64").unwrap()
}

fn low(mib: u64) -> Memory {
    Memory { low: mib * MIB, high: 0 }
}

/// An ELF with one segment and a note segment that holds Xen's entry note.
fn pvh_elf(entry: u32) -> Vec<u8> {
    let mut b = elf64(62, 0x10_0000, 0x100);
    let notes = b.len();
    for word in [4u32, 4, PHYS32_ENTRY] {
        b.extend(word.to_le_bytes());
    }
    b.extend(b"Xen\0");
    b.extend(entry.to_le_bytes());
    // A second program header, in place of the first segment's beginning.
    b.splice(120..120, [0; 56]);
    let start = (notes + 56) as u64;
    b[56] = 2;
    b[72..80].copy_from_slice(&176u64.to_le_bytes());
    b[120..124].copy_from_slice(&4u32.to_le_bytes());
    b[128..136].copy_from_slice(&start.to_le_bytes());
    b[152..160].copy_from_slice(&20u64.to_le_bytes());
    b[160..168].copy_from_slice(&20u64.to_le_bytes());
    b[168..176].copy_from_slice(&4u64.to_le_bytes());
    b
}

/// A minimal ELF32 for i386 with one segment.
fn elf32(address: u32, len: u32) -> Vec<u8> {
    let mut b = vec![0u8; 84];
    b[..7].copy_from_slice(b"\x7fELF\x01\x01\x01");
    b[16..20].copy_from_slice(&[2, 0, 3, 0]);
    b[20] = 1;
    b[24..28].copy_from_slice(&address.to_le_bytes());
    b[28] = 52;
    b[40..46].copy_from_slice(&[52, 0, 32, 0, 1, 0]);
    for (i, word) in [1, 84, address, address, len, len].iter().enumerate() {
        b[52 + i * 4..56 + i * 4].copy_from_slice(&word.to_le_bytes());
    }
    b.extend(std::iter::repeat_n(0x90, len as usize));
    b
}

#[test]
fn the_kinds_of_kernel() {
    assert!(matches!(linux(), Image::Linux(_)));
    assert_eq!(linux().entry(), Entry::Long { rip: 0x10_0200, rsi: BOOT_PARAMS });
    let Image::Elf(k) = load_kernel("-kernel k", pvh_elf(0x10_0040), "x86_64").unwrap() else { panic!("an ELF") };
    assert_eq!(k.pvh, Some(0x10_0040));
    assert_eq!(Image::Elf(k).entry(), Entry::Protected { eip: 0x10_0040, ebx: START_INFO as u32, esi: 0 });
    let bare = load_kernel("-kernel k", compress(&elf64(62, 0x100_0000, 64)), "x86_64").unwrap();
    assert_eq!(bare.entry(), Entry::Long { rip: 0x100_0010, rsi: BOOT_PARAMS });
    assert_eq!(bare.pieces()[0].address, 0x100_0000);
}

#[test]
fn what_is_no_kernel_for_a_pc() {
    let riscv = {
        let mut b = vec![0x13; 4096];
        b[..64].fill(0);
        b[56..60].copy_from_slice(b"RSC\x05");
        b
    };
    let cases = [
        (riscv, "is a riscv64 Linux Image; this is mimus system x86_64: use mimus system riscv64"),
        (elf64(243, 0, 10), "is a riscv64 ELF"),
        (b"#!/bin/sh\necho hello\n".repeat(50), "it looks like text"),
        (vec![0x90; 8192], "no header that is known"),
        (vec![0x90; 10], "shorter than any kernel's header"),
        (b"\xfd7zXZ\0rest of an xz file".to_vec(), "compressed with xz"),
        (b"070701 an initrd".to_vec(), "-initrd"),
        (elf32(0x10_0000, 64), "32-bit ELF without a PVH entry point"),
        (elf64(183, 0, 10), "use a x86_64 kernel"),
    ];
    for (bytes, says) in cases {
        let text = load_kernel("-kernel k", bytes, "x86_64").unwrap_err().to_string();
        assert!(text.contains(says) && text.lines().count() == 1, "{says}: {text}");
    }
    let text = load_kernel("-kernel k", vec![0x90; 8192], "x86_64").unwrap_err().to_string();
    assert!(text.contains("bzImage"), "{text}");
    assert!(load_kernel("-kernel k", elf64(62, 0, 10), "i386").unwrap_err().to_string().contains("is an x86-64 ELF"));
    assert!(matches!(load_kernel("-kernel k", Vec::new(), "i386"), Err(BootError::Empty { .. })));
}

#[test]
fn the_usual_places() {
    let k = linux();
    let p = place(low(512), ("-kernel k", &k), Some(("-initrd i", 25 * MIB + 1)), 0x1_2345).unwrap();
    assert_eq!(p.tables, 0x1ffe_0000..0x1fff_3000);
    let initrd = p.initrd.unwrap();
    assert_eq!((initrd.start % 4096, initrd.end <= p.tables.start), (0, true));
    assert!(p.tables.start - initrd.end < 4096);
}

#[test]
fn an_initrd_above_4_gib() {
    let k = linux();
    let memory = Memory { low: 64 * MIB, high: 2 << 30 };
    let p = place(memory, ("-kernel k", &k), Some(("-initrd i", 100 * MIB)), 0x1_0000).unwrap();
    assert_eq!(p.initrd, Some(FOUR..FOUR + 100 * MIB));
}

const FOUR: u64 = 1 << 32;

#[test]
fn what_does_not_fit() {
    let k = linux();
    let text = place(low(16), ("-kernel k", &k), None, 0x1_0000).unwrap_err().to_string();
    assert!(text.contains("use -m 128M or more"), "{text}");
    let text = place(low(64), ("-kernel k", &k), Some(("-initrd i", 30 * MIB)), 0x1_0000).unwrap_err().to_string();
    assert!(text.starts_with("-initrd i does not fit") && text.contains("-m 256M"), "{text}");
    let mut file = bzimage::tests::bzimage(0x1000);
    bzimage::tests::put(&mut file, 0x236, &1u16.to_le_bytes());
    bzimage::tests::put(&mut file, 0x22c, &0x37f_ffffu32.to_le_bytes());
    let old = load_kernel("-kernel k", file, "x86_64").unwrap();
    let text = place(low(512), ("-kernel k", &old), Some(("-initrd i", 20 * MIB)), 0x1_0000).unwrap_err().to_string();
    assert!(text.contains("only below 0x3800000"), "{text}");
    for address in [0x7000, 0x9_f000, 0xf_0000] {
        let elf = load_kernel("-kernel k", elf64(62, address, 4096), "x86_64").unwrap();
        let text = place(low(512), ("-kernel k", &elf), None, 0).unwrap_err().to_string();
        assert!(text.contains("is free"), "{text}");
    }
    let elf = load_kernel("-kernel k", elf64(62, 1 << 40, 4096), "x86_64").unwrap();
    assert!(place(low(512), ("-kernel k", &elf), None, 0).unwrap_err().to_string().contains("above 4 GiB"));
}

#[test]
fn nothing_of_the_hand_over_overlaps() {
    let cmdline = "x".repeat(2047);
    for k in [linux(), load_kernel("-kernel k", pvh_elf(0x10_0040), "x86_64").unwrap()] {
        check_cmdline(&k, &cmdline).unwrap();
        let mut memory = MemoryMap::default();
        (0..100).for_each(|i| _ = memory.set(i << 32, 0x1000, Kind::Ram));
        let h = Handover { initrd: Some((0x800_0000, 99)), rsdp: 0x1ffe_0000, memory, ..Handover::default() };
        let mut pieces = k.hand_over(&cmdline, &[1; 32], h);
        pieces.sort();
        for pair in pieces.windows(2) {
            assert!(pair[0].0 + pair[0].1.len() as u64 <= pair[1].0, "{:#x}", pair[0].0);
        }
        assert!(pieces.iter().all(|(at, data)| at + data.len() as u64 <= LOW_END));
        assert!(pieces.iter().any(|(at, data)| *at == CMDLINE && data.ends_with(b"x\0")));
    }
    let info = load_kernel("-kernel k", pvh_elf(0x10_0040), "x86_64").unwrap();
    let pieces = info.hand_over("", &[0; 32], Handover::default());
    let start = pieces.iter().find(|p| p.0 == START_INFO).unwrap();
    assert_eq!(u32_at(&start.1, 24), Some(CMDLINE as u32));
}

#[test]
fn a_long_command_line() {
    let text = check_cmdline(&linux(), &"x".repeat(2048)).unwrap_err().to_string();
    assert!(text.contains("2048 bytes") && text.contains("2047"), "{text}");
}
