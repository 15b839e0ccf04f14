//! Stacks made by hand.

use super::*;
use crate::linux::tests::Ram;
use crate::symbols::{Symbol, Symbols};
use crate::target::Target;
use mimus_arch::x86::X86State;

const BASE: u64 = 0xffff_ffff_8100_0000;

fn symbols(base: u64) -> Symbols {
    let names = ["outer", "middle", "inner"];
    let named = |(i, name): (usize, &&str)| Symbol {
        address: base + 0x100 * i as u64,
        size: 0x100,
        name: (*name).into(),
        code: true,
    };
    Symbols::from_list(names.iter().enumerate().map(named).collect())
}

fn cpu(ram: &Ram, change: impl Fn(&mut X86State)) -> CpuState {
    let CpuState::X86(mut s) = ram.state(0).unwrap() else { panic!("it is x86") };
    s.cs.attributes = if s.efer & 0x400 != 0 { 0xa09b } else { 0xc09b };
    s.cs.base = 0;
    change(&mut s);
    CpuState::X86(s)
}

fn methods(view: &View<'_>) -> Vec<(u64, Method)> {
    frames(view, 20).into_iter().map(|f| (f.pc, f.method)).collect()
}

fn put(image: &mut [u8], at: usize, value: u64, word: usize) {
    image[at..at + word].copy_from_slice(&value.to_le_bytes()[..word]);
}

#[test]
fn frame_pointers_of_both_widths() {
    for (word, base) in [(8usize, BASE), (4, 0xc100_0000)] {
        let mut image = vec![0; 0x3000];
        let stack = base + 0x1000;
        let w = word as u64;
        // inner's frame, then middle's, the last.
        put(&mut image, 0x1100, stack + 0x180, word);
        put(&mut image, 0x1100 + word, base + 0x140, word);
        put(&mut image, 0x1180, 0, word);
        put(&mut image, 0x1180 + word, base + 0x20, word);
        // Of a function that was just entered: its return address alone.
        put(&mut image, 0x10f0, base + 0x150, word);
        let ram = Ram::new(word, base, image);
        let names = symbols(base);
        let at = |rip: u64, rsp: u64| cpu(&ram, move |s| (s.rip, s.gpr[4], s.gpr[5]) = (rip, rsp, stack + 0x100));
        let view = |cpu| View::new(&ram, 0, cpu, &names);
        let state = at(base + 0x240, stack + 0xe0);
        let chain = [(base + 0x140, Method::FramePointer), (base + 0x20, Method::FramePointer)];
        assert_eq!(methods(&view(&state)), [&[(base + 0x240, Method::Pc)][..], &chain].concat(), "{word}");
        let state = at(base + 0x200, stack + 0xf0);
        let found = methods(&view(&state));
        assert_eq!(found[..2], [(base + 0x200, Method::Pc), (base + 0x150, Method::Entry)], "{w}");
        assert_eq!(found[2..], chain);
    }
}

#[test]
fn orc_through_an_exception() {
    let mut image = vec![0; 0x3000];
    let stack = BASE + 0x1000;
    // inner keeps 8 bytes, middle is the handler of an exception that outer had.
    put(&mut image, 0x1108, BASE + 0x140, 8);
    put(&mut image, 0x1110 + 16 * 8, BASE + 0x50, 8);
    put(&mut image, 0x1110 + 4 * 8, 0x77, 8);
    put(&mut image, 0x1110 + 19 * 8, stack + 0x400, 8);
    put(&mut image, 0x1400, BASE + 0x60, 8);
    let ram = Ram::new(8, BASE, image);
    let entries = [
        (0u64, [8i16 as u8, 0, 0, 0, 5, 2]),
        (0x100, [0, 0, 0, 0, 5, 3]),
        (0x200, [16, 0, 0, 0, 5, 2]),
        (0x300, [0; 6]),
    ];
    let distances: Vec<u8> =
        entries.iter().enumerate().flat_map(|(i, e)| (e.0 as i32 - 0x5000 - 4 * i as i32).to_le_bytes()).collect();
    let orc = Orc::new(&distances, BASE + 0x5000, &entries.iter().flat_map(|e| e.1).collect::<Vec<u8>>()).unwrap();
    let names = symbols(BASE);
    let state = cpu(&ram, |s| (s.rip, s.gpr[4]) = (BASE + 0x240, stack + 0x100));
    let view = View { orc: Some(&orc), ..View::new(&ram, 0, &state, &names) };
    let found = methods(&view);
    assert_eq!(
        found[..4],
        [
            (BASE + 0x240, Method::Pc),
            (BASE + 0x140, Method::Orc),
            (BASE + 0x50, Method::Exception),
            (BASE + 0x60, Method::Orc)
        ]
    );
    assert!(view.backtrace().contains("<middle+0x40>  [ORC]"), "{}", view.backtrace());
}

/// A stack whose frames refer to themselves, and one of noise: an end in any case.
#[test]
fn hostile_stacks() {
    let mut seed = 3;
    for round in 0..200 {
        let mut image = vec![0; 0x3000];
        for i in (0x1000..0x2000).step_by(8) {
            let noise = crate::linux::tests::random(&mut seed);
            let value = if noise & 3 == 0 { noise } else { BASE + 0x1000 + ((noise % 0x1000) & !7) };
            put(&mut image, i, value, 8);
        }
        let ram = Ram::new(8, BASE, image);
        let names = symbols(BASE);
        let state = cpu(&ram, |s| {
            (s.rip, s.gpr[4], s.gpr[5]) = (BASE + 0x10, BASE + 0x1000, BASE + 0x1000 + 8 * round + round % 2);
        });
        let view = View::new(&ram, 0, &state, &names);
        assert!(frames(&view, 64).len() <= 64);
    }
}
