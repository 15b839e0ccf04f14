//! Loops that go on over a page's end, which are blocks of their own in code that runs often.

use super::*;

/// With the interpreter, as usual, and optimised from the first.
fn all(test: impl Fn(Guest)) {
    let _one = ONE.lock().unwrap_or_else(PoisonError::into_inner);
    for (interpret, optimise) in [(true, Optimise::Usual), (false, Optimise::Usual), (false, Optimise::Forced)] {
        test(Guest::optimised(interpret, optimise));
    }
}

/// How far before the page's end the loop begins, and where in the page behind is what jumps to it.
const BEFORE: u64 = 12;
const ENTRY: u64 = 0x100;

const fn bne(rs1: u32, rs2: u32, by: i32) -> u32 {
    let by = by as u32;
    let high = (by >> 12 & 1) << 31 | (by >> 5 & 63) << 25;
    high | rs2 << 20 | rs1 << 15 | 1 << 12 | (by >> 1 & 15) << 8 | (by >> 11 & 1) << 7 | 0x63
}

const fn jal(by: i32) -> u32 {
    let by = by as u32;
    (by >> 20 & 1) << 31 | (by >> 1 & 0x3ff) << 21 | (by >> 11 & 1) << 20 | (by >> 12 & 0xff) << 12 | 0x6f
}

/// A loop: `a0` += 3, `a0` += `first`, `c.nop`, `a0` += `second` (this in both pages), `a1` -= 1, until that is zero. What is
/// before the page's end, and what is behind it.
fn code(first: i32, second: i32) -> (Vec<u8>, Vec<u8>) {
    let back = -(BEFORE as i32 + 6);
    let mut bytes = Vec::new();
    for insn in [addi(A0, A0, 3), addi(A0, A0, first)] {
        bytes.extend(insn.to_le_bytes());
    }
    bytes.extend(1u16.to_le_bytes());
    for insn in [addi(A0, A0, second), addi(A1, A1, -1), bne(A1, 0, back), csrrw(0, MIE, 0), WFI] {
        bytes.extend(insn.to_le_bytes());
    }
    let behind = bytes.split_off(BEFORE as usize);
    (bytes, behind)
}

fn write(g: &Guest, at: u64, bytes: &[u8]) {
    assert!(g.ram.write(at - RAM, bytes));
}

/// What so many rounds leave in `a0`, begun by the code at `pc`.
fn rounds(g: &mut Guest, pc: u64, rounds: u64) -> u64 {
    g.change(|s| {
        (s.pc, s.waiting) = (pc, false);
        (s.x[A0 as usize], s.x[A1 as usize]) = (0, rounds);
    });
    g.run().x[A0 as usize]
}

#[test]
fn a_loop_in_two_pages() {
    all(|mut g| {
        let page = RAM + 0x6000;
        let (before, behind) = code(4, 5);
        write(&g, page - BEFORE, &before);
        write(&g, page, &behind);
        g.put(page + ENTRY, &[jal(-((ENTRY + BEFORE) as i32))]);
        for _ in 0..3 {
            assert_eq!(rounds(&mut g, page + ENTRY, 1000), 12_000);
        }
        // From outside, in the second page and then in the first: another loop.
        write(&g, page, &code(4, 0x15).1);
        assert_eq!(rounds(&mut g, page + ENTRY, 10), 280);
        write(&g, page - BEFORE, &code(-7, 0x15).0);
        assert_eq!(rounds(&mut g, page + ENTRY, 10), 170);
        assert_eq!(rounds(&mut g, page + ENTRY, 1), 17);
    });
}

#[test]
fn another_page_behind_a_loop() {
    /// Where the loop begins, and two pages that may be behind that one.
    const FIRST: u64 = RAM + 0x8000;
    const BEHIND: [u64; 2] = [RAM + 0x9000, RAM + 0xb000];
    /// What changes pages: it is in none of them.
    const FENCE: u64 = RAM + 0xd000;
    all(|mut g| {
        for (page, second) in BEHIND.into_iter().zip([5, 0x15]) {
            let (before, behind) = code(4, second);
            write(&g, FIRST + 0x1000 - BEFORE, &before);
            write(&g, page, &behind);
            g.put(page + ENTRY, &[jal(-((ENTRY + BEFORE) as i32))]);
        }
        // sfence.vma; jr a2
        g.put(FENCE, &[SFENCE_ALL, A2 << 15 | 0x67]);
        map(&g, 0xcf);
        let pte = |pa: u64| pa >> 12 << 10 | 0xcf;
        g.put_u64(TABLES + 0x2000, pte(FIRST));
        for page in [0, 0, 1, 1, 0, 1] {
            g.put_u64(TABLES + 0x2008, pte(BEHIND[page]));
            g.change(|s| {
                supervisor(s);
                s.x[A2 as usize] = VA + 0x1000 + ENTRY;
            });
            assert_eq!(rounds(&mut g, FENCE, 100), [1200, 2800][page]);
        }
    });
}
