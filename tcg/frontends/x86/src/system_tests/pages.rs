//! SDM volume 3 chapter 5.

use super::*;
use crate::exception::Exception;
use crate::paging::{Access, D, G, NX, PS, RW, US, load_pdptrs, peek, walk};

fn code(result: Result<crate::paging::Leaf, Exception>) -> u32 {
    result.unwrap_err().error.unwrap()
}

#[test]
fn no_paging_is_the_identity() {
    let mut h = TestHost::new();
    assert_eq!(walk(&mut h, 0x1_2345_6789, Access::Store, true).unwrap().pa, 0x2345_6789);
}

#[test]
fn four_levels_and_accessed_dirty() {
    let mut h = long();
    let leaf = peek(&mut h, 0x5123, Access::Load, false).unwrap();
    assert_eq!((leaf.pa, leaf.write, leaf.size), (0x5123, false, 4096));
    assert_eq!(h.get(0x13028, 8), 0x5007, "a peek changes nothing");
    walk(&mut h, 0x5123, Access::Load, false).unwrap();
    assert_eq!(h.get(0x13028, 8), 0x5027);
    assert_eq!(h.get(0x10000, 8), 0x11027);
    let leaf = walk(&mut h, 0x5123, Access::Store, false).unwrap();
    assert!(leaf.write);
    assert_eq!(h.get(0x13028, 8), 0x5067);
    assert_eq!(walk(&mut h, 0x8000_0000_0000, Access::Load, false), Err(Exception::GP0));
}

/// Section 5.7: the error code.
#[test]
fn error_codes() {
    let mut h = long();
    h.put(0x13028, 8, 0);
    assert_eq!(code(walk(&mut h, 0x5000, Access::Store, true)), 6);
    assert_eq!(code(walk(&mut h, 0x5000, Access::Fetch, false)), 16);
    h.put(0x13028, 8, 0x5001);
    assert_eq!(code(walk(&mut h, 0x5000, Access::Load, true)), 5);
    h.st.cr0 |= CR0_WP;
    assert_eq!(code(walk(&mut h, 0x5000, Access::Store, false)), 3);
    h.st.cr0 &= !CR0_WP;
    assert!(walk(&mut h, 0x5000, Access::Store, false).is_ok());
    h.put(0x13028, 8, 0x5007 | NX);
    assert_eq!(code(walk(&mut h, 0x5000, Access::Fetch, true)), 0x15);
    h.st.efer &= !EFER_NXE;
    assert_eq!(code(walk(&mut h, 0x5000, Access::Load, true)), 13, "reserved without NXE");
    h.put(0x13028, 8, 0x5007 | 1 << 45);
    assert_eq!(code(walk(&mut h, 0x5000, Access::Load, false)), 9);
}

/// Section 5.6.1: SMEP and SMAP.
#[test]
fn supervisor_and_user_pages() {
    let mut h = long();
    h.st.cr4 |= CR4_SMEP | CR4_SMAP;
    assert_eq!(code(walk(&mut h, 0x5000, Access::Fetch, false)), 0x11);
    assert_eq!(code(walk(&mut h, 0x5000, Access::Load, false)), 1);
    h.st.flags |= RFLAGS_AC;
    assert!(walk(&mut h, 0x5000, Access::Load, false).is_ok());
    // An implicit access of user code is not excused.
    h.st.cpl = 3;
    assert!(walk(&mut h, 0x5000, Access::Load, false).is_err());
    assert!(walk(&mut h, 0x5000, Access::Load, true).is_ok());
}

#[test]
fn large_pages() {
    let mut h = long();
    h.put(0x12008, 8, 0x4000_0000 | PS | RW | US | G | D | 1);
    h.st.cr4 |= CR4_PGE;
    let leaf = walk(&mut h, 0x21_2345, Access::Load, false).unwrap();
    assert_eq!((leaf.pa, leaf.size, leaf.global, leaf.write), (0x4001_2345, 2 << 20, true, true));
    h.put(0x12008, 8, 0x4000_2000 | PS | 1);
    assert_eq!(code(walk(&mut h, 0x20_0000, Access::Load, false)), 9, "bits below the size are reserved");
    h.put(0x11008, 8, 0x8000_0000 | PS | 1);
    let leaf = walk(&mut h, 0x4123_4567, Access::Load, false).unwrap();
    assert_eq!((leaf.pa, leaf.size), (0x8123_4567, 1 << 30));
}

#[test]
fn thirty_two_bit_paging() {
    let mut h = protected();
    h.st.cr0 |= CR0_PG;
    h.st.cr3 = 0x10000;
    h.put(0x10000, 4, 0x11007);
    h.put(0x11014, 4, 0x5003);
    assert_eq!(walk(&mut h, 0x5678, Access::Store, false).unwrap().pa, 0x5678);
    assert_eq!(h.get(0x11014, 4), 0x5063);
    assert_eq!(code(walk(&mut h, 0x5678, Access::Load, true)), 5);
    // A 4 MiB page, with bits 39:32 of its address in 20:13.
    h.put(0x10004, 4, 0x0000_e083);
    assert_eq!(code(walk(&mut h, 0x40_0000, Access::Load, false)), 0, "without PSE it is a table");
    h.st.cr4 |= CR4_PSE;
    h.put(0x10004, 4, 0x0080_0083 | 1 << 13);
    let leaf = walk(&mut h, 0x41_2345, Access::Load, false).unwrap();
    assert_eq!((leaf.pa, leaf.size), (0x1_0081_2345, 4 << 20));
}

#[test]
fn pae_pointers_are_loaded_and_checked() {
    let mut h = protected();
    h.st.cr0 |= CR0_PG;
    h.st.cr4 |= CR4_PAE;
    h.put(0x10008, 8, 0x11001);
    h.put(0x11000, 8, 0x12007);
    h.put(0x12000, 8, 0x5007);
    load_pdptrs(&mut h, 0x10000).unwrap();
    h.put(0x10008, 8, 0);
    assert_eq!(walk(&mut h, 0x4000_0123, Access::Load, true).unwrap().pa, 0x5123, "registers, not memory, are used");
    h.put(0x10000, 8, 3);
    assert_eq!(load_pdptrs(&mut h, 0x10000), Err(Exception::GP0));
}

#[test]
fn five_levels() {
    let mut h = long();
    h.put(0xf000, 8, 0x10007);
    h.st.cr3 = 0xf000;
    h.st.cr4 |= CR4_LA57;
    assert_eq!(walk(&mut h, 0x5123, Access::Load, true).unwrap().pa, 0x5123);
    assert_eq!(code(walk(&mut h, 0x0080_0000_0000_0000, Access::Load, false)), 0);
}

/// Section 5.6.2: protection keys, of user pages and data accesses alone.
#[test]
fn protection_keys() {
    let mut h = long();
    h.st.cr0 |= CR0_WP;
    h.put(0x13028, 8, 0x5007 | 2 << 59);
    // Key 2: access disabled.
    h.st.pkru = 1 << 4;
    assert!(walk(&mut h, 0x5000, Access::Store, true).is_ok(), "off");
    h.st.cr4 |= CR4_PKE;
    assert_eq!(code(walk(&mut h, 0x5000, Access::Load, true)), 0x25);
    assert_eq!(code(walk(&mut h, 0x5000, Access::Store, false)), 0x23, "the supervisor's too");
    assert!(walk(&mut h, 0x5000, Access::Fetch, true).is_ok());
    // Writes disabled.
    h.st.pkru = 2 << 4;
    let leaf = walk(&mut h, 0x5000, Access::Load, true).unwrap();
    assert!(leaf.read && !leaf.write);
    assert_eq!(code(walk(&mut h, 0x5000, Access::Store, true)), 0x27);
    assert_eq!(code(walk(&mut h, 0x5000, Access::Store, false)), 0x23);
    h.st.cr0 &= !CR0_WP;
    assert!(walk(&mut h, 0x5000, Access::Store, false).is_ok(), "without WP, the supervisor writes what it likes");
    assert_eq!(code(walk(&mut h, 0x5000, Access::Store, true)), 0x27);
    // A supervisor's page has no key; another page, another key.
    h.st.pkru = !0;
    h.put(0x13028, 8, 0x5003 | 2 << 59);
    assert!(walk(&mut h, 0x5000, Access::Load, false).is_ok());
    h.st.pkru = !3;
    h.put(0x13028, 8, 0x5007);
    assert!(walk(&mut h, 0x5000, Access::Store, true).is_ok());
    // The key does not hide what else is wrong.
    h.st.pkru = !0;
    h.put(0x13028, 8, 0x5005);
    assert_eq!(code(walk(&mut h, 0x5000, Access::Store, true)), 0x27);
    h.put(0x13028, 8, 0);
    assert_eq!(code(walk(&mut h, 0x5000, Access::Store, true)), 6, "no page, no key");
}

/// Tables 5-4 to 5-20: bits that must be zero.
#[test]
fn reserved_bits() {
    let beyond = 1u64 << 40;
    let fails = |h: &mut TestHost, at: u64, entry: u64, address: u64| {
        let old = h.get(at, 8);
        h.put(at, 8, entry);
        assert_eq!(code(walk(h, address, Access::Load, true)), 13, "{entry:#x} at {at:#x}");
        h.put(at, 8, old);
    };
    let mut h = long();
    assert_eq!(h.st.phys_bits, 40);
    // 4 levels: addresses beyond the processor's in any entry, PS in the highest.
    for (at, next) in [(0x10000, 0x11007), (0x11000, 0x12007), (0x12000, 0x13007), (0x13028, 0x5007)] {
        fails(&mut h, at, next | beyond, 0x5000);
        fails(&mut h, at, next | 1 << 51, 0x5000);
    }
    fails(&mut h, 0x10000, 0x11007 | PS, 0x5000);
    // Bits 62:52 are for software and protection keys.
    h.put(0x13028, 8, 0x5007 | 0x7ff0_0000_0000_0000);
    assert!(walk(&mut h, 0x5000, Access::Load, true).is_ok());
    // Large pages: below their size, PAT aside.
    fails(&mut h, 0x12008, 0x4000_2087, 0x20_0000);
    fails(&mut h, 0x12008, 0x4010_0087, 0x20_0000);
    fails(&mut h, 0x11008, 0x8000_2087, 0x4000_0000);
    h.put(0x12008, 8, 0x4000_1087);
    assert!(walk(&mut h, 0x20_0000, Access::Load, true).is_ok(), "PAT");
    // Without pages of 1 GiB, PS there is reserved.
    h.st.features.pdpe1gb = false;
    fails(&mut h, 0x11008, 0x8000_0087, 0x4000_0000);
    // 5 levels: PS in the highest two.
    let mut h = long();
    h.put(0xf000, 8, 0x10007);
    h.st.cr3 = 0xf000;
    h.st.cr4 |= CR4_LA57;
    fails(&mut h, 0xf000, 0x10087, 0x5000);
    fails(&mut h, 0x10000, 0x11087, 0x5000);
    fails(&mut h, 0xf000, 0x10007 | beyond, 0x5000);
}

#[test]
fn reserved_bits_of_32_bit_modes() {
    // PAE: 62:40 of everything; the pointers have more, which loading them checks.
    let mut h = protected();
    h.st.cr0 |= CR0_PG;
    h.st.cr4 |= CR4_PAE;
    h.st.efer |= EFER_NXE;
    h.put(0x10000, 8, 0x11001);
    h.put(0x11000, 8, 0x12007);
    h.put(0x12000, 8, 0x5007);
    load_pdptrs(&mut h, 0x10000).unwrap();
    for (at, entry) in [(0x11000, 0x12007u64), (0x12000, 0x5007)] {
        for bit in [40, 52, 59, 62] {
            h.put(at, 8, entry | 1 << bit);
            assert_eq!(code(walk(&mut h, 0x123, Access::Load, true)), 13, "bit {bit} at {at:#x}");
        }
        h.put(at, 8, entry);
    }
    h.st.efer &= !EFER_NXE;
    h.put(0x12000, 8, 0x5007 | NX);
    assert_eq!(code(walk(&mut h, 0x123, Access::Load, true)), 13);
    for bit in [1, 2, 5, 6, 7, 8, 40, 63] {
        h.put(0x10000, 8, 0x11001 | 1 << bit);
        assert_eq!(load_pdptrs(&mut h, 0x10000), Err(Exception::GP0), "bit {bit}");
    }
    // 32-bit paging: bit 21 of large pages.
    let mut h = protected();
    h.st.cr0 |= CR0_PG;
    h.st.cr4 |= CR4_PSE;
    h.st.cr3 = 0x10000;
    h.put(0x10004, 4, 0x0080_0087 | 1 << 21);
    assert_eq!(code(walk(&mut h, 0x40_0000, Access::Load, true)), 13);
    // Of bits 20:13 those that are address bits (table 5-4): all, some and none.
    for (phys_bits, pse36, first) in [(40, true, 21), (36, true, 17), (32, true, 13), (40, false, 13)] {
        h.st.phys_bits = phys_bits;
        h.st.features.pse36 = pse36;
        for bit in 13..21 {
            h.put(0x10004, 4, 0x0080_0087 | 1 << bit);
            let result = walk(&mut h, 0x40_0000, Access::Load, true).map(|leaf| leaf.pa);
            if bit < first {
                assert_eq!(result, Ok(0x80_0000 | 1 << (bit + 19)), "bit {bit} of {phys_bits}");
            } else {
                assert_eq!(result.unwrap_err().error, Some(13), "bit {bit} of {phys_bits}");
            }
        }
    }
}

/// Section 5.6.1: AC excuses a program's accesses to user pages, not the processor's own to its tables.
#[test]
fn implicit_accesses_and_smap() {
    let mut h = long();
    h.put(0x13008, 8, 0x1007);
    let load = |h: &mut TestHost| crate::segment::load(h, DS, DATA0);
    (h.st.cr4, h.st.flags) = (CR4_PAE | CR4_SMAP, RFLAGS_AC);
    assert!(walk(&mut h, GDT, Access::Load, false).is_ok());
    assert_eq!(load(&mut h), Err(Exception::page(1, GDT + u64::from(DATA0))), "the GDT");
    assert_eq!(h.st.flags, RFLAGS_AC);
    h.put(0x13008, 8, 0x1003);
    assert_eq!(load(&mut h), Ok(()));
    h.put(0x13008, 8, 0x1007);
    h.st.cr4 = CR4_PAE;
    assert_eq!(load(&mut h), Ok(()));
}

/// Five levels: 57 bits of address, and the boundary of what is canonical.
#[test]
fn canonical_addresses_of_five_levels() {
    let mut h = long();
    assert!(!h.st.canonical(1 << 47) && h.st.canonical(!0 << 47));
    h.st.cr4 |= CR4_LA57;
    for (address, canonical) in [
        ((1u64 << 56) - 1, true),
        (1 << 56, false),
        (!0 << 56, true),
        ((!0u64 << 56) - 1, false),
        (1 << 47, true),
        (1 << 63, false),
    ] {
        assert_eq!(h.st.canonical(address), canonical, "{address:#x}");
        assert_eq!(walk(&mut h, address, Access::Load, false) == Err(Exception::GP0), !canonical, "{address:#x}");
    }
    // Levels are not switched while long mode is on.
    let cr4 = h.st.cr4;
    assert_eq!(crate::control::write_cr(&mut h, 4, cr4 & !CR4_LA57), Err(Exception::GP0));
}
