//! Blocks that run on over a page's end, as those of code that runs often do.

use super::*;
use mimus_tcg_ir::backend::Optimise;

/// With the interpreter, as usual, and optimised from the first; in 32-bit and 64-bit code.
fn all(test: impl Fn(Guest)) {
    let _one = ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner);
    for (interpret, optimise) in [(true, Optimise::Usual), (false, Optimise::Usual), (false, Optimise::Forced)] {
        for long in [false, true] {
            let mut g = Guest::optimised(interpret, optimise);
            if long {
                g.long()
            } else {
                g.protected()
            }
            test(g);
        }
    }
}

/// The last bytes of the first page of the loop, and where it begins.
const HEAD: u64 = CODE + 0xff0;

/// From the second page, which is known then: `eax` = 0, `ecx` rounds, to the loop's head.
fn start(g: &mut Guest, rounds: u32) {
    let mut code = vec![0x31, 0xc0, 0xb9];
    code.extend(rounds.to_le_bytes());
    // jmp HEAD
    code.extend([0xe9, 0xe4, 0xfe, 0xff, 0xff]);
    g.put(CODE + 0x1100, &code);
    g.change(|s| (s.rip, s.mp_state) = (CODE + 0x1100, MpState::Running));
}

#[test]
fn a_loop_in_two_pages() {
    all(|mut g| {
        let mut code = [0x90; 0x18];
        // add eax, 3; ...; add eax, 7, which crosses; dec ecx; jnz HEAD; hlt
        code[..3].copy_from_slice(&[0x83, 0xc0, 3]);
        code[0xe..].copy_from_slice(&[0x05, 7, 0, 0, 0, 0xff, 0xc9, 0x75, 0xe9, 0xf4]);
        g.put(HEAD, &code);
        for _ in 0..3 {
            start(&mut g, 1000);
            assert_eq!(g.run().gpr[RAX], 10_000);
        }
        // From outside: another loop. sub eax, 1 in place of add eax, 7.
        g.put(CODE + 0xffe, &[0x2d, 1, 0, 0, 0]);
        start(&mut g, 100);
        assert_eq!(g.run().gpr[RAX], 200);
        g.put(CODE + 0x1000, &[1]);
        start(&mut g, 1);
        assert_eq!(g.run().gpr[RAX], 0u32.wrapping_add(3).wrapping_sub(0x101).into());
    });
}

#[test]
fn a_loop_that_changes_itself_in_both_pages() {
    all(|mut g| {
        let mut code = [0x90; 0x20];
        // add eax, 1; inc byte [the second immediate]
        code[..10].copy_from_slice(&[0x83, 0xc0, 1, 0xfe, 0x04, 0x25, 0x03, 0x10, 0x01, 0]);
        // In the next page: add eax, 0x10; inc byte [the first immediate]; dec ecx; jnz HEAD; hlt
        code[0x11..]
            .copy_from_slice(&[0x83, 0xc0, 0x10, 0xfe, 0x04, 0x25, 0xf2, 0x0f, 0x01, 0, 0xff, 0xc9, 0x75, 0xe1, 0xf4]);
        for rounds in [1, 5, 60] {
            g.put(HEAD, &code);
            start(&mut g, rounds);
            let first: u32 = (0..rounds).map(|k| 1 + k).sum();
            let second: u32 = (0..rounds).map(|k| 0x11 + k).sum();
            assert_eq!(g.run().gpr[RAX], u64::from(first + second), "{rounds} rounds");
        }
    });
}

#[test]
fn a_loop_near_a_page_s_end_does_not_mind_what_is_behind_it() {
    all(|mut g| {
        // add eax, 3; dec ecx; jnz HEAD; hlt
        g.put(HEAD, &[0x83, 0xc0, 3, 0xff, 0xc9, 0x75, 0xf9, 0xf4]);
        // The second page is known when the loop's code is made, and is not the next time.
        start(&mut g, 1000);
        assert_eq!(g.run().gpr[RAX], 3000);
        let steps = |g: &Guest| {
            let counts = g.machine.statistics();
            counts.iter().find(|(name, _)| name.contains("with care")).map_or(0, |(_, n)| *n)
        };
        let before = steps(&g);
        g.change(|s| {
            (s.rip, s.mp_state) = (HEAD, MpState::Running);
            (s.gpr[RAX], s.gpr[RCX]) = (0, 1000);
        });
        assert_eq!(g.run().gpr[RAX], 3000);
        assert!(steps(&g) - before < 20, "{} instructions of 3000 executed with care", steps(&g) - before);
    });
}

/// Where the remapped pages are, and where in memory: the first, and what may be behind it.
const AT: u64 = 0x4000_0000;
const FIRST: u64 = 0x30_0000;
const BEHIND: [u64; 2] = [0x30_1000, 0x30_2000];

/// Bytes of a program that calls the functions at these addresses or maps what is behind the first page.
enum Step {
    Call(u64),
    Map(u64),
}

fn program(steps: &[Step]) -> Vec<u8> {
    let mut code = vec![0x31, 0xc0];
    for step in steps {
        match step {
            // mov rbx, f; call rbx
            Step::Call(f) => {
                code.extend([0x48, 0xc7, 0xc3]);
                code.extend((*f as u32).to_le_bytes());
                code.extend([0xff, 0xd3]);
            }
            // mov qword [entry], value; invlpg [AT + 0x1000]
            Step::Map(entry) => {
                code.extend([0x48, 0xc7, 0x04, 0x25]);
                code.extend((TABLES as u32 + 0x3008).to_le_bytes());
                code.extend((*entry as u32).to_le_bytes());
                code.extend([0x0f, 0x01, 0x3c, 0x25]);
                code.extend((AT as u32 + 0x1000).to_le_bytes());
            }
        }
    }
    code.push(0xf4);
    code
}

#[test]
fn what_is_behind_a_page_changes() {
    all(|mut g| {
        if g.state().efer & EFER_LMA == 0 {
            return;
        }
        g.put_u64(TABLES + 0x1008, (TABLES + 0x2000) | 7);
        g.put_u64(TABLES + 0x2000, (TABLES + 0x3000) | 7);
        g.put_u64(TABLES + 0x3000, FIRST | 7);
        g.put_u64(TABLES + 0x3008, BEHIND[0] | 7);
        // add eax, 1; ...; add eax, 2, whose constant is in the next page but for a byte
        let mut code = [0x90; 0x10];
        code[..5].copy_from_slice(&[0x05, 1, 0, 0, 0]);
        code[0xe..].copy_from_slice(&[0x05, 2]);
        g.put(FIRST + 0xff0, &code);
        for (page, adds) in BEHIND.into_iter().zip([0x10u32, 0x1000]) {
            let mut code = vec![0, 0, 0, 0x05];
            code.extend(adds.to_le_bytes());
            code.push(0xc3);
            g.put(page, &code);
            // ret
            g.put(page + 0x800, &[0xc3]);
        }
        let (f, known) = (Step::Call(AT + 0xff0), || Step::Call(AT + 0x1800));
        let [one, two] = BEHIND;
        let steps = [
            known(),
            Step::Call(AT + 0xff0),
            Step::Map(two | 7),
            Step::Call(AT + 0xff0),
            Step::Map(one | 7),
            known(),
            Step::Call(AT + 0xff0),
            Step::Map(two | 7),
            known(),
            f,
        ];
        g.put(CODE, &program(&steps));
        g.change(|s| s.rip = CODE);
        assert_eq!(g.run().gpr[RAX], 4 * 3 + 2 * 0x10 + 2 * 0x1000);
        // Nothing is behind it.
        let steps = [known(), Step::Call(AT + 0xff0), Step::Map(0), Step::Call(AT + 0xff0)];
        g.put(CODE, &program(&steps));
        g.change(|s| (s.rip, s.mp_state) = (CODE, MpState::Running));
        let s = g.run();
        assert_eq!((s.gpr[RAX], s.cr2, s.rip), (3 + 0x1000 + 1, AT + 0x1000, 0xa000 + 16 * 14 + 1));
        assert_eq!(g.u64_at(s.gpr[RSP] + 8), AT + 0xffe);
    });
}
