//! Files of this host's own programs, as a guest would have them in its memory.

use super::*;
use object::{Object, ObjectSymbol};

/// The C library of this test's process.
fn library() -> Vec<u8> {
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
    let path =
        maps.lines().filter_map(|l| l.split_whitespace().nth(5)).find(|p| p.contains("libc.so") || p.contains("libc-"));
    std::fs::read(path.expect("a C library")).unwrap()
}

#[test]
fn names_that_a_loader_needs() {
    let bytes = library();
    let found = dynamic_symbols(&bytes).unwrap();
    let file = object::File::parse(&*bytes).unwrap();
    let wanted = file.dynamic_symbols().filter(|s| s.is_definition() && s.name() == Ok("read")).map(|s| s.address());
    let wanted: Vec<u64> = wanted.collect();
    let read: Vec<u64> = found.iter().filter(|s| s.name == "read" && s.code).map(|s| s.address).collect();
    assert!(!wanted.is_empty() && read == wanted, "{read:x?}, not {wanted:x?}");
    assert!(found.len() > 1000, "{}", found.len());
    // Without what is not mapped, the section headers behind all segments, the names are the same.
    let parts = parts(&bytes).unwrap();
    let end = parts.loads.iter().map(|l| l.offset + l.bytes).max().unwrap();
    assert_eq!(dynamic_symbols(&bytes[..end as usize]), Some(found));
    assert!(Symbols::elf(&bytes).unwrap().address("read").is_ok(), "of a stripped file");
}

#[test]
fn damaged_files() {
    let (bytes, mut seed) = (library(), 5);
    let begin = bytes[..(256 << 10).min(bytes.len())].to_vec();
    for _ in 0..2000 {
        let mut bad = begin.clone();
        for _ in 0..4 {
            let at = crate::linux::tests::random(&mut seed) as usize % 1024;
            bad[at] = crate::linux::tests::random(&mut seed) as u8;
        }
        let _ = (dynamic_symbols(&bad), bias(&[], &bad), Symbols::elf_of_guest(&bad).is_ok());
    }
    assert_eq!(dynamic_symbols(b"\x7fELF"), None);
}

#[test]
fn files_in_a_programs_memory() {
    let mapping = |from: u64, offset: u64, file: u64, name: &str| Mapping {
        from,
        to: from + 0x1000,
        rights: "r--p".to_owned(),
        offset,
        file,
        name: name.to_owned(),
    };
    let all = [
        mapping(0x1000, 0, 1, "/bin/a"),
        mapping(0x2000, 0x1000, 1, "/bin/a"),
        mapping(0x3000, 0, 0, "[heap]"),
        mapping(0x4000, 0, 2, "/lib/b"),
        // Twice: each at a place of its own.
        mapping(0x5000, 0, 2, "/lib/b"),
        mapping(0x6000, 0, 0, "[vdso]"),
        mapping(0x7000, 0, 3, ""),
    ];
    let found: Vec<_> = images(&all).into_iter().map(|i| (i.name, i.from, i.to, i.mappings)).collect();
    let wanted = [
        ("a", 0x1000, 0x3000, 0..2),
        ("b", 0x4000, 0x5000, 3..4),
        ("b", 0x5000, 0x6000, 4..5),
        ("[vdso]", 0x6000, 0x7000, 5..6),
    ];
    assert_eq!(found, wanted.map(|(n, a, b, r)| (n.to_owned(), a, b, r)));
}

/// What a terminal must not be told is not in a name.
#[test]
fn names_that_would_do_harm() {
    let mut bytes = library();
    let at = {
        let file = object::File::parse(&*bytes).unwrap();
        let read = file.dynamic_symbols().find(|s| s.name() == Ok("read")).unwrap();
        read.name_bytes().unwrap().as_ptr() as usize - bytes.as_ptr() as usize
    };
    bytes[at..at + 4].copy_from_slice(b"\x1b[2J");
    let found = dynamic_symbols(&bytes).unwrap();
    assert!(found.iter().any(|s| s.name == ".[2J") && !found.iter().any(|s| s.name.contains('\x1b')));
    let all = Symbols::elf_of_guest(&bytes).unwrap();
    assert!(all.address(".[2J").is_ok() && all.address("\x1b[2J").is_err());
}
