//! Tables made by hand, in a memory of their own, in the forms of different kernels.

use super::*;
use crate::linux::tests::{Ram, random};

/// Names of a made-up kernel.
fn names(n: usize) -> Vec<String> {
    (0..n).map(|i| format!("T{}_function_{i:x}", ["vfs", "net", "mm"][i % 3])).collect()
}

/// Where things are put: the image begins at the base.
const BASE: u64 = 0xffff_ffff_8100_0000;

/// An image with tables: their order (`new`: 6.4 and later), and how addresses are made.
fn image(n: usize, word: usize, new: bool, percpu: bool) -> (Vec<u8>, u64) {
    let base = if word == 8 { BASE } else { 0xc100_0000 };
    let mut out = vec![0u8; 0x3000];
    let align = |out: &mut Vec<u8>| out.resize(out.len().next_multiple_of(word), 0);
    let offsets = |out: &mut Vec<u8>| {
        align(out);
        for i in 0..n as u32 {
            let offset = if percpu && i < 10 {
                i * 8
            } else if percpu {
                (-1 - i as i32 * 16) as u32
            } else {
                i * 16
            };
            out.extend(offset.to_le_bytes());
        }
        align(out);
        out.extend(&base.to_le_bytes()[..word]);
        align(out);
    };
    if !new {
        offsets(&mut out);
    }
    out.extend((n as u32).to_le_bytes());
    align(&mut out);
    let start = out.len();
    let mut markers = Vec::new();
    for (i, name) in names(n).iter().enumerate() {
        if i.is_multiple_of(256) {
            markers.push((out.len() - start) as u32);
        }
        // Token 1 is "_function_"; all else its own character. The longest has a length of two bytes.
        let mut codes: Vec<u8> = name.replace("_function_", "\u{1}").into_bytes();
        if i == 300 {
            codes.extend([b'z'; 150]);
            out.extend([codes.len() as u8 | 0x80, (codes.len() >> 7) as u8]);
        } else {
            out.push(codes.len() as u8);
        }
        out.extend(codes);
    }
    align(&mut out);
    markers.iter().for_each(|m| out.extend(m.to_le_bytes()));
    align(&mut out);
    let mut index = Vec::new();
    let table = out.len();
    for i in 0..=255u8 {
        index.extend(((out.len() - table) as u16).to_le_bytes());
        match i {
            1 => out.extend(b"_function_"),
            b' '..=b'~' => out.push(i),
            _ => out.extend(format!("q{i}").bytes()),
        }
        out.push(0);
    }
    align(&mut out);
    out.extend(index);
    if new {
        offsets(&mut out);
    }
    out.resize(out.len().next_multiple_of(4096) + 4096, 0);
    (out, base)
}

#[test]
fn tables_of_all_forms() {
    for (word, new, percpu) in [(8, true, false), (8, false, true), (4, false, false), (4, true, false)] {
        let (bytes, base) = image(2000, word, new, percpu);
        let ram = Ram::new(word, base, bytes);
        let m = ram.memory();
        let places = search(&m).unwrap_or_else(|| panic!("{word} {new} {percpu}"));
        let symbols = read(&m, &places).unwrap();
        assert_eq!(symbols.len(), 2000);
        assert_eq!((symbols[999].name.as_str(), symbols[999].code), ("vfs_function_3e7", true));
        let address = if percpu { base - 1 + 1 + 999 * 16 } else { base + 999 * 16 };
        assert_eq!(symbols[999].address, address);
        assert!(symbols[300].name.ends_with("zzz") && symbols[300].name.len() > 150);
        assert_eq!(symbols[5].address, if percpu { 40 } else { base + 80 });
    }
}

/// Memory that a guest has spoilt on purpose: refused or read, never a panic, never without end.
#[test]
fn hostile() {
    let (good, base) = image(700, 8, true, false);
    let ram = Ram::new(8, base, good.clone());
    let places = search(&ram.memory()).unwrap();
    let mut seed = 1;
    for round in 0..400 {
        let mut bad = good.clone();
        for _ in 0..1 + round % 20 {
            let at = random(&mut seed) as usize % bad.len();
            bad[at] = random(&mut seed) as u8;
        }
        let ram = Ram::new(8, base, bad);
        let m = ram.memory();
        let _ = read(&m, &places);
        if round % 8 == 0
            && let Some(places) = search(&m)
        {
            assert!(read(&m, &places).is_ok(), "only what can be read is found");
        }
    }
    // Places that are nonsense.
    for _ in 0..200 {
        let mut any = || base + random(&mut seed) % 0x8000;
        let places = Places {
            num_syms: any(),
            names: any(),
            token_table: any(),
            token_index: any(),
            offsets: any(),
            relative_base: any(),
        };
        let _ = read(&ram.memory(), &places);
    }
}
