//! Calls by pointer to other pages, and returns from there, while these pages change.

use super::*;
use mimus_tcg_ir::backend::Optimise;

/// Where the remapped page is, and where in memory it may be.
const AT: u64 = 0x4000_0000;
const PAGES: [u64; 2] = [0x30_1000, 0x30_2000];
/// Offsets of functions in it.
const FUNCTIONS: [u64; 2] = [0x100, 0x200];
const ENTRY: u64 = TABLES + 0x3000;

/// Optimised from the first, where every other jump is taken for one that leads to one place in another page.
fn all(test: impl Fn(Guest)) {
    let _one = ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner);
    for (interpret, optimise) in [(true, Optimise::Usual), (false, Optimise::Usual), (false, Optimise::Forced)] {
        test(Guest::optimised(interpret, optimise));
    }
}

/// 64-bit mode with [`AT`] mapped to the first of the pages. Their functions add 1 and 2, or 0x100 and 0x200.
fn paged(g: &mut Guest) {
    g.long();
    g.put_u64(TABLES + 0x1008, (TABLES + 0x2000) | 7);
    g.put_u64(TABLES + 0x2000, (TABLES + 0x3000) | 7);
    g.put_u64(ENTRY, PAGES[0] | 7);
    g.put_u64(ENTRY + 8, PAGES[1] | 7);
    for (page, times) in PAGES.into_iter().zip([1u32, 0x100]) {
        for (f, n) in FUNCTIONS.into_iter().zip([1, 2]) {
            // add eax, n; ret
            let mut code = vec![0x05];
            code.extend((n * times).to_le_bytes());
            code.push(0xc3);
            g.put(page + f, &code);
        }
    }
}

/// A loop that calls each function twice and then does `step`; r8 and r9 change places each round.
fn calls(g: &mut Guest, rounds: u32, (r8, r9): (u64, u64), step: &[u8]) -> X86State {
    // xor eax, eax; mov ecx, rounds; mov r8, ...; mov r9, ...
    let mut code = vec![0x31, 0xc0, 0xb9];
    code.extend(rounds.to_le_bytes());
    for (opcode, value) in [(0xc0, r8), (0xc1, r9)] {
        code.extend([0x49, 0xc7, opcode]);
        code.extend((value as u32).to_le_bytes());
    }
    let head = code.len();
    for f in FUNCTIONS {
        // mov rbx, f; call rbx; call rbx
        code.extend([0x48, 0xc7, 0xc3]);
        code.extend(((AT + f) as u32).to_le_bytes());
        code.extend([0xff, 0xd3, 0xff, 0xd3]);
    }
    code.extend(step);
    // xchg r9, r8; dec ecx; jnz head; hlt
    code.extend([0x4d, 0x87, 0xc1, 0xff, 0xc9, 0x0f, 0x85]);
    code.extend((head as i32 - code.len() as i32 - 4).to_le_bytes());
    code.push(0xf4);
    g.put(CODE, &code);
    g.change(|s| (s.rip, s.mp_state) = (CODE, MpState::Running));
    g.run()
}

/// `mov [place], r8`.
fn store_r8(place: u64) -> Vec<u8> {
    let mut code = vec![0x4c, 0x89, 0x04, 0x25];
    code.extend((place as u32).to_le_bytes());
    code
}

#[test]
fn another_page_is_called_once_it_is_mapped_there() {
    // invlpg [AT + 0x800]; mov rdx, cr3, mov cr3, rdx
    let invlpg = [0x0f, 0x01, 0x3c, 0x25, 0x00, 0x08, 0x00, 0x40];
    let cr3 = [0x0f, 0x20, 0xda, 0x0f, 0x22, 0xda];
    for drop in [&invlpg[..], &cr3] {
        all(|mut g| {
            paged(&mut g);
            let step = [&store_r8(ENTRY), drop].concat();
            let s = calls(&mut g, 100, (PAGES[1] | 7, PAGES[0] | 7), &step);
            assert_eq!(s.gpr[RAX], 50 * 6 + 50 * 0x600);
            // No page, after the first round.
            let s = calls(&mut g, 3, (0, 0), &step);
            assert_eq!((s.gpr[RAX], s.cr2, s.rip), (6, AT + 0x100, 0xa000 + 16 * 14 + 1));
        });
    }
}

#[test]
fn a_part_of_a_large_page_is_dropped() {
    all(|mut g| {
        paged(&mut g);
        // The first 2 MiB of memory, whose functions are of another kind.
        for (f, n) in FUNCTIONS.into_iter().zip([0x10, 0x20]) {
            g.put(f, &[0x05, n, 0, 0, 0, 0xc3]);
        }
        let (small, large) = ((TABLES + 0x3000) | 7, 0x87);
        // invlpg [AT + 0x1f_0000]
        let step = [&store_r8(TABLES + 0x2000)[..], &[0x0f, 0x01, 0x3c, 0x25, 0x00, 0x00, 0x1f, 0x40]].concat();
        g.put_u64(TABLES + 0x2000, large);
        // (The small pages stay after that.)
        let s = calls(&mut g, 3, (small, small), &step);
        assert_eq!(s.gpr[RAX], 0x60 + 2 * 6);
    });
}

#[test]
fn code_that_is_called_changes() {
    all(|mut g| {
        paged(&mut g);
        // inc byte [the constant of the first function], by its address in memory
        let mut step = vec![0xfe, 0x04, 0x25];
        step.extend(((PAGES[0] + FUNCTIONS[0] + 1) as u32).to_le_bytes());
        let s = calls(&mut g, 100, (0, 0), &step);
        assert_eq!(s.gpr[RAX], (0..100).map(|k| 2 * (1 + k) + 4).sum());
        // From outside.
        g.put(PAGES[0] + FUNCTIONS[0] + 1, &[0x40]);
        assert_eq!(calls(&mut g, 10, (0, 0), &[0x90]).gpr[RAX], 10 * 0x84);
    });
}
