//! Code that changes itself: the next instruction, itself, or one that a loop comes back to.
//!
//! Processors see a store to code at the address that is executed before the next instruction (SDM volume 3 section
//! 11.6, APM volume 2 section 7.6.1); code and data at two addresses would be another thing.

use mimus_arch::x86::regs::*;

use crate::build::{Place, load};
use crate::sequence::Item;

/// An instruction with an operand in the item itself.
struct Patch<'a> {
    opcode: &'a [u8],
    /// The ModRM byte's middle field.
    field: u8,
    immediate: &'a [u8],
}

impl Patch<'_> {
    fn length(&self) -> usize {
        self.opcode.len() + 5 + self.immediate.len()
    }

    /// Adds it, for the byte at `target` of the item.
    fn add(&self, item: &mut Item, bits: u32, target: usize) {
        let at = item.bytes.len();
        let mut code = self.opcode.to_vec();
        code.push(self.field << 3 | 5);
        let displacement = if bits == 64 { target.wrapping_sub(at + self.length()) as u32 } else { 0 };
        if bits != 64 {
            item.absolute.push((at + code.len(), target));
        }
        code.extend(displacement.to_le_bytes());
        code.extend(self.immediate);
        item.add(&code);
    }
}

/// A patch of the instruction behind it, at a byte of that.
fn next(patch: Patch<'_>, at: usize) -> (usize, Patch<'_>) {
    (patch.length() + at, patch)
}

/// An item, or none if the registers it wants hold addresses.
pub fn item(p: &mut Place<'_>) -> Option<Item> {
    // One that needs no REX prefix and is nothing else.
    let n = p.r.pick(&[RAX, RDX, RBX, RBP, RSI, RDI]);
    let free = |n: usize| !p.roles.contains(n);
    if !free(n) {
        return None;
    }
    let reg = n as u8;
    let bits = p.bits;
    let value = (p.r.value() as u32).to_le_bytes();
    let other = (p.r.value() as u32).to_le_bytes();
    let mut item = Item { modifies: true, ..Item::default() };
    match p.r.below(8) {
        // The immediate of the next instruction: mov dword [next + 1], value; next: mov reg, other
        0 => {
            let (target, patch) = next(Patch { opcode: &[0xc7], field: 0, immediate: &value }, 1);
            patch.add(&mut item, bits, target);
            item.add(&[&[0xb8 | reg][..], &other].concat());
        }
        // Its operation: xor byte [next + 1], 8; next: inc reg, which becomes dec, or push, which becomes no instruction.
        1 => {
            let (target, patch) = next(Patch { opcode: &[0x80], field: 6, immediate: &[8] }, 1);
            patch.add(&mut item, bits, target);
            let form = p.r.pick(&[0xc0, 0xc8, 0xc0, 0xc8, 0xc0, 0xc8, 0xc0, 0xf0]);
            item.add(&[0xff, form | reg]);
        }
        // All of it: mov byte [next], …; next: clc
        2 => {
            let flags = [0xf8, 0xf9, 0xf5, 0xfc, 0x90, 0x98, 0x99];
            let to = [p.r.pick(&flags)];
            let (target, patch) = next(Patch { opcode: &[0xc6], field: 0, immediate: &to }, 0);
            if matches!(to[0], 0x98 | 0x99) && !(free(RAX) && free(RDX)) {
                return None;
            }
            patch.add(&mut item, bits, target);
            item.add(&[p.r.pick(&flags[..4])]);
        }
        // By an exchange: xchg [next + 1], reg; next: mov reg', other
        3 => {
            let opcode: &[u8] = if p.r.chance(50) { &[0x87] } else { &[0xf0, 0x87] };
            let (target, patch) = next(Patch { opcode, field: reg, immediate: &[] }, 1);
            patch.add(&mut item, bits, target);
            item.add(&[&[0xb8 | reg][..], &other].concat());
        }
        // Its own immediate, in a loop: add dword [itself + 6], value
        4 => {
            let turns = turns(p, &mut item)?;
            let patch = Patch { opcode: &[0x81], field: 0, immediate: &value };
            patch.add(&mut item, bits, turns + 6);
            back(&mut item, turns);
        }
        // An earlier one's, in a loop: add reg, value; add dword [it + 2], other
        5 => {
            let turns = turns(p, &mut item)?;
            // 81 /0, which for EAX is the long form.
            item.add(&[&[0x81, 0xc0 | reg][..], &value].concat());
            let patch = Patch { opcode: &[0x81], field: 0, immediate: &other };
            patch.add(&mut item, bits, turns + 2);
            back(&mut item, turns);
        }
        // A later one's, in a loop: inc byte [it + 2]; add reg, imm8
        6 => {
            let turns = turns(p, &mut item)?;
            let patch = Patch { opcode: &[0xfe], field: 0, immediate: &[] };
            patch.add(&mut item, bits, turns + patch.length() + 2);
            item.add(&[0x83, 0xc0 | reg, value[0]]);
            back(&mut item, turns);
        }
        // Several become nothing: mov edi, …; mov ecx, …; mov eax, 0x90; cld; rep stosb; inc reg; …
        _ => {
            if !(free(RDI) && free(RCX) && free(RAX)) {
                return None;
            }
            let count = 2 * (1 + p.r.below(6));
            load(&mut item, bits, RCX, count);
            load(&mut item, bits, RAX, 0x90);
            // lea rdi, [rip + 3], or mov edi, there
            if bits == 64 {
                item.add(&[0x48, 0x8d, 0x3d, 3, 0, 0, 0]);
            } else {
                let at = item.bytes.len();
                item.add(&[0xbf, 0, 0, 0, 0]);
                item.absolute.push((at + 1, at + 8));
            }
            item.add(&[0xfc]);
            item.add(&[0xf3, 0xaa]);
            (0..6).for_each(|_| item.add(&[0xff, 0xc0 | reg]));
        }
    }
    Some(item)
}

/// `mov ecx, n`; answers where the loop begins.
fn turns(p: &mut Place<'_>, item: &mut Item) -> Option<usize> {
    if p.roles.contains(RCX) {
        return None;
    }
    let n = 1 + p.r.below(4);
    load(item, p.bits, RCX, n);
    Some(item.bytes.len())
}

/// `loop`
fn back(item: &mut Item, to: usize) {
    let displacement = to.wrapping_sub(item.bytes.len() + 2) as u8;
    item.add(&[0xe2, displacement]);
}
