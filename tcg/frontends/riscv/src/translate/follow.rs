//! Which side of a branch a block goes on at.
//!
//! A loop may have what seldom happens behind a branch that is nearly always taken (C libraries look at a word of a string,
//! and go past the code for the end of it), and from there a jump to its head. A block that goes on at such a branch's target
//! is the whole loop.
//!
//! An interpreter's operations end with a jump to the place that looks for the next one. A block that goes on there jumps through
//! a register by itself, which the host foretells better than a jump that all of them share.

use super::{CodeWindow, LONGEST_LOOP, MAX_SIDE_EXITS, PAGE, fetch};

/// Instructions behind the branch's target to look at.
const REACH: u32 = 16;
/// The same behind a jump's.
const SHORT: usize = 8;

/// What an instruction does to the flow of control.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Flow {
    On,
    /// By so many bytes; whatever it compares.
    Branch(i32),
    Jump(i32),
    /// Anywhere, or away.
    Leaves,
}

/// If the branch `insn` at `pc`, in the block that begins at `start`, is to be followed: where it leads.
pub(super) fn follows<W: CodeWindow + ?Sized>(code: &W, start: u32, pc: u32, insn: u32, len: u8) -> Option<u32> {
    let Flow::Branch(by) = flow(insn, len) else { return None };
    let next = pc + u32::from(len);
    let to = pc.checked_add_signed(by).filter(|to| (next + 1..end(code)).contains(to))?;
    if to < PAGE && code.has_block(to) {
        return None;
    }
    let other_side = || leads_to(code, next, start, MAX_SIDE_EXITS - 1, REACH * MAX_SIDE_EXITS);
    (leads_to(code, to, start, 0, REACH) && !other_side()).then_some(to)
}

/// Whether a block that begins at `start` and has got to `pc` is a loop that ends soon.
pub(super) fn is_loop<W: CodeWindow + ?Sized>(code: &W, start: u32, pc: u32) -> bool {
    leads_to(code, pc, start, 2, LONGEST_LOOP.into())
}

/// If the jump `insn` at `pc` leads to a jump through a register, but for a return, that is near: where.
pub(super) fn dispatches<W: CodeWindow + ?Sized>(code: &W, start: u32, pc: u32, insn: u32, len: u8) -> Option<u32> {
    let Flow::Jump(by) = flow(insn, len) else { return None };
    let to = pc.checked_add_signed(by).filter(|to| *to < PAGE && code.goes_on_elsewhere())?;
    let (mut at, mut exits) = (to, 0);
    for _ in 0..SHORT {
        let (insn, len) = fetch(code, at).filter(|_| at < PAGE && !code.has_block(at))?;
        // Not an instruction of the block once more.
        if to <= pc && at + u32::from(len) > start {
            return None;
        }
        match flow(insn, len) {
            Flow::On => {}
            Flow::Branch(_) if exits == 0 => exits += 1,
            Flow::Leaves => return jumps_by_register(insn, len).then_some(to),
            _ => return None,
        }
        at += u32::from(len);
    }
    None
}

/// Whether it is `jr` by another register than `ra`.
fn jumps_by_register(insn: u32, len: u8) -> bool {
    let (register, is_jr) =
        if len == 2 { (insn >> 7 & 31, insn & 0xf07f == 0x8002) } else { (insn >> 15 & 31, insn & 0x7fff == 0x67) };
    is_jr && register > 1
}

/// What a block may not go past.
fn end<W: CodeWindow + ?Sized>(code: &W) -> u32 {
    PAGE + code.runs_on()
}

/// Whether code at `from`, past at most `exits` branches, jumps or branches to `head`.
fn leads_to<W: CodeWindow + ?Sized>(code: &W, from: u32, head: u32, exits: u32, reach: u32) -> bool {
    let (mut pc, mut passed) = (from, 0);
    for _ in 0..reach {
        let Some((insn, len)) = fetch(code, pc).filter(|_| pc < end(code)) else { return false };
        let leads = |by: i32| pc.checked_add_signed(by) == Some(head);
        match flow(insn, len) {
            Flow::On => {}
            Flow::Branch(by) | Flow::Jump(by) if leads(by) => return true,
            Flow::Branch(_) if passed < exits => passed += 1,
            _ => return false,
        }
        pc += u32::from(len);
    }
    false
}

fn flow(insn: u32, len: u8) -> Flow {
    let bits = |from: u32, count: u32, to: u32| (insn >> from & ((1 << count) - 1)) << to;
    let extended = |value: u32, width: u32| (value << (32 - width)) as i32 >> (32 - width);
    if len == 2 {
        return match insn & 0xe003 {
            // c.j (Zca: imm[11|4|9:8|10|6|7|3:1|5])
            0xa001 => {
                let imm = bits(12, 1, 11) | bits(11, 1, 4) | bits(9, 2, 8) | bits(8, 1, 10);
                Flow::Jump(extended(imm | bits(7, 1, 6) | bits(6, 1, 7) | bits(3, 3, 1) | bits(2, 1, 5), 12))
            }
            // c.beqz, c.bnez (imm[8|4:3], imm[7:6|2:1|5])
            0xc001 | 0xe001 => {
                let imm = bits(12, 1, 8) | bits(10, 2, 3) | bits(5, 2, 6) | bits(3, 2, 1) | bits(2, 1, 5);
                Flow::Branch(extended(imm, 9))
            }
            // c.jr, c.jalr, c.ebreak
            0x8002 if insn & 0x7c == 0 => Flow::Leaves,
            _ => Flow::On,
        };
    }
    match insn & 0x7f {
        0x63 => {
            let imm = bits(31, 1, 12) | bits(7, 1, 11) | bits(25, 6, 5) | bits(8, 4, 1);
            Flow::Branch(extended(imm, 13))
        }
        // jal with x0 as its link
        0x6f if bits(7, 5, 0) == 0 => {
            let imm = bits(31, 1, 20) | bits(12, 8, 12) | bits(20, 1, 11) | bits(21, 10, 1);
            Flow::Jump(extended(imm, 21))
        }
        0x6f | 0x67 | 0x73 | 0x0f => Flow::Leaves,
        _ => Flow::On,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn flows() {
        let cases = [
            (0xbf6d, 2, Flow::Jump(-0x46)),
            (0xcb0d, 2, Flow::Branch(0x32)),
            (0xd3fd, 2, Flow::Branch(-0x1a)),
            (0xe799, 2, Flow::Branch(0xe)),
            (0x8082, 2, Flow::Leaves),
            (0x87b6, 2, Flow::On),
            (0xfed79be3, 4, Flow::Branch(-0xa)),
            (0x05c68c63, 4, Flow::Branch(0x58)),
            (0x7770f0ef, 4, Flow::Leaves),
            (0x00878693, 4, Flow::On),
        ];
        for (insn, len, flow_of) in cases {
            assert_eq!(flow(insn, len), flow_of, "{insn:#x}");
        }
    }
}
