//! Instructions that need more around them: images of the units' state, transfers to other segments.

use iced_x86::{Code, Instruction, MemoryOperand, Mnemonic, OpKind};
use mimus_arch::x86::regs::*;

use crate::build::{Generator, Place, encode, gpr, load};
use crate::layout::*;
use crate::sequence::Item;

/// Selectors that code cannot be in, of all kinds.
const BAD: [u8; 9] = [0, 3, 0x10, 0x18, 0x2b, 0x43, 0x0f, 0x7b, 0x47];

fn is_image(m: Mnemonic) -> bool {
    use Mnemonic as M;
    matches!(
        m,
        M::Xsave
            | M::Xsave64
            | M::Xsavec
            | M::Xsavec64
            | M::Xsaveopt
            | M::Xsaveopt64
            | M::Xrstor
            | M::Xrstor64
            | M::Fxsave
            | M::Fxsave64
            | M::Fxrstor
            | M::Fxrstor64
    )
}

pub fn is_far(code: Code) -> bool {
    use Code::*;
    matches!(code.mnemonic(), Mnemonic::Retf | Mnemonic::Iret | Mnemonic::Iretd | Mnemonic::Iretq)
        || matches!(
            code,
            Jmp_m1616
                | Jmp_m1632
                | Jmp_m1664
                | Call_m1616
                | Call_m1632
                | Call_m1664
                | Jmp_ptr1616
                | Jmp_ptr1632
                | Call_ptr1616
                | Call_ptr1632
        )
}

/// Whether [`Generator::special`] makes its items.
pub fn is_special(code: Code) -> bool {
    is_image(code.mnemonic())
        || is_far(code)
        || is_unpredictable(code.mnemonic())
        || matches!(code, Code::Popaw | Code::Popad)
}

/// Identification, clocks, randomness.
fn is_unpredictable(m: Mnemonic) -> bool {
    use Mnemonic as M;
    matches!(m, M::Cpuid | M::Rdtsc | M::Rdtscp | M::Rdpid | M::Rdrand | M::Rdseed | M::Xgetbv)
}

/// `mov dword [at], value`, or of two bytes.
fn store(item: &mut Item, bits: u32, at: u64, bytes: usize, value: u32) {
    with_immediate(item, bits, 0xc7, 0, at, bytes, value);
}

/// `and dword [at], value`
fn and(item: &mut Item, bits: u32, at: u64, value: u32) {
    with_immediate(item, bits, 0x81, 4, at, 4, value);
}

/// An operation of memory and a constant; `field` is its ModRM byte's middle.
fn with_immediate(item: &mut Item, bits: u32, opcode: u8, field: u8, at: u64, bytes: usize, value: u32) {
    let mut code = if (bytes == 2) != (bits == 16) { vec![0x66, opcode] } else { vec![opcode] };
    match bits {
        64 => code.extend([field << 3 | 0x04, 0x25]),
        32 => code.push(field << 3 | 0x05),
        _ => code.push(field << 3 | 0x06),
    }
    code.extend(&(at as u32).to_le_bytes()[..if bits == 16 { 2 } else { 4 }]);
    code.extend(&value.to_le_bytes()[..bytes]);
    item.add(&code);
}

impl Generator {
    /// An item around such an instruction.
    pub fn special(&mut self, p: &mut Place<'_>, code: Code) -> Option<Item> {
        if is_image(code.mnemonic()) {
            image(p, code)
        } else if is_far(code) {
            far(p, code)
        } else if matches!(code, Code::Popaw | Code::Popad) {
            all_registers(p, code)
        } else {
            unpredictable(p, code)
        }
    }
}

/// PUSHA, a change of what it has stored, and POPA.
fn all_registers(p: &mut Place<'_>, code: Code) -> Option<Item> {
    let wide = code == Code::Popad;
    let bytes = if wide { 4 } else { 2 };
    let n = p.r.below(8) as usize;
    if p.roles.contains(n) {
        return None;
    }
    let mut item = Item::default();
    let narrow = p.bits == 16;
    let prefixed = |opcode: u8| if wide != narrow { vec![opcode] } else { vec![0x66, opcode] };
    item.add(&prefixed(0x60));
    // What is stored of ESP is not loaded.
    let value = p.r.value() as u32;
    if narrow {
        // mov bp, sp; mov word [bp + at], value
        item.add(&[0x89, 0xe5]);
        item.add(&[0xc7, 0x46, (bytes * (7 - n)) as u8, value as u8, (value >> 8) as u8]);
    } else {
        on_stack(&mut item, (bytes * (7 - n)) as u8, bytes, value);
    }
    item.add(&prefixed(0x61));
    Some(item)
}

/// An instruction of which only the registers and flags that it leaves alone are known: others are loaded after it.
fn unpredictable(p: &mut Place<'_>, code: Code) -> Option<Item> {
    use Mnemonic as M;
    let mut item = Item::default();
    let mut insn = Instruction::default();
    insn.set_code(code);
    let mut results: &[usize] = &[RAX, RDX];
    let one;
    match code.mnemonic() {
        M::Rdpid | M::Rdrand | M::Rdseed => {
            one = [p.r.below(if p.bits == 64 { 16 } else { 8 }) as usize];
            results = &one;
            let bytes = match code {
                Code::Rdrand_r16 | Code::Rdseed_r16 => 2,
                Code::Rdrand_r32 | Code::Rdseed_r32 | Code::Rdpid_r32 => 4,
                _ => 8,
            };
            insn.set_op_kind(0, OpKind::Register);
            insn.set_op_register(0, gpr(one[0], bytes, false));
        }
        M::Cpuid => results = &[RAX, RCX, RDX, RBX],
        M::Rdtscp => results = &[RAX, RCX, RDX],
        _ => {}
    }
    if results.iter().any(|&n| p.roles.contains(n) || n == RSP) {
        return None;
    }
    match code.mnemonic() {
        M::Cpuid => {
            let leaf = p.r.pick(&[0, 1, 7, 0xd, 0x8000_0000, 0x8000_0001, 0x4000_0000]);
            load(&mut item, p.bits, RAX, leaf);
        }
        // Another register than there is: #GP.
        M::Xgetbv if p.roles.contains(RCX) => return None,
        M::Xgetbv => {
            let register = if p.r.chance(90) { 0 } else { 2 + p.r.below(0x1000) };
            load(&mut item, p.bits, RCX, register);
        }
        _ => {}
    }
    item.add(&encode(p.bits, &insn)?.0);
    item.random = results.to_vec();
    for &n in results {
        let value = p.r.value();
        load(&mut item, p.bits, n, value);
    }
    if matches!(code.mnemonic(), M::Rdrand | M::Rdseed) {
        // There may be none: clc
        item.add(&[0xf8]);
    }
    Some(item)
}

/// An image of the state is stored, what processors store differently is cleared, and it is loaded again; or one is
/// loaded from whatever is there.
fn image(p: &mut Place<'_>, code: Code) -> Option<Item> {
    use Mnemonic as M;
    if [RAX, RDX].iter().any(|&n| p.roles.contains(n)) {
        return None;
    }
    let m = code.mnemonic();
    let fx = matches!(m, M::Fxsave | M::Fxsave64 | M::Fxrstor | M::Fxrstor64);
    let stores = !matches!(m, M::Xrstor | M::Xrstor64 | M::Fxrstor | M::Fxrstor64);
    let misaligned = if p.r.chance(8) { 1 + p.r.below(63) } else { 0 };
    let place = match p.r.below(24) {
        // Over the end of a page, into the page that is not writable, and past the end.
        0 => 0x1000 * (1 + p.r.below(4)) - 64 * p.r.below(14),
        1 => 0x2000 + 64 * p.r.below(132),
        _ => 0x800 + 64 * p.r.below(64),
    };
    let at = DATA - data_base(p.bits) + place + misaligned;
    let mut item = Item::default();
    let components = if p.r.chance(60) { 7 } else { p.r.below(8) };
    if !fx {
        load(&mut item, p.bits, RAX, components);
        load(&mut item, p.bits, RDX, 0);
    }
    if !fx && stores {
        // All components are in use, or the processor may think so or not: vpcmpeqd ymm0, ymm0, ymm0; fld1
        item.add(&[0xc5, 0xfd, 0x76, 0xc0]);
        item.add(&[0xd9, 0xe8]);
    }
    if !fx && (stores || p.r.chance(70)) {
        // XSTATE_BV and XCOMP_BV, and in some cases what must be zero behind them.
        let words = p.r.pick(&[4, 6, 16]);
        (0..words).for_each(|i| store(&mut item, p.bits, at + 512 + 4 * i, 4, 0));
    }
    if !fx && !stores {
        // Components that the host's kernel has on and the guest's has not: what the guest refuses, the host loads.
        for place in [at + 512, at + 520] {
            and(&mut item, p.bits, place, !(crate::host::components() & !GUEST_XCR0) as u32);
        }
    }
    let operand = MemoryOperand::with_displ(at, p.bits / 8);
    // What has been modified since the last XRSTOR, only the processor knows: the same is there already.
    let before = match m {
        M::Xsaveopt => Some(Code::Xsave_mem),
        M::Xsaveopt64 => Some(Code::Xsave64_mem),
        _ => None,
    };
    if let Some(before) = before {
        item.add(&encode(p.bits, &Instruction::with1(before, operand).ok()?)?.0);
    }
    item.add(&encode(p.bits, &Instruction::with1(code, operand).ok()?)?.0);
    if !stores {
        return Some(item);
    }
    // Where the last x87 instruction was, and the bits that MXCSR has.
    item.image = true;
    store(&mut item, p.bits, at + 6, 2, 0);
    [8, 12, 16, 20, 28].iter().for_each(|i| store(&mut item, p.bits, at + i, 4, 0));
    if !p.r.chance(50) {
        return Some(item);
    }
    let wide = matches!(m, M::Xsave64 | M::Xsavec64 | M::Xsaveopt64 | M::Fxsave64);
    let back = match (fx, wide) {
        (true, false) => Code::Fxrstor_m512byte,
        (true, true) => Code::Fxrstor64_m512byte,
        (false, false) => Code::Xrstor_mem,
        (false, true) => Code::Xrstor64_mem,
    };
    if !fx {
        let components = if p.r.chance(60) { 7 } else { p.r.below(8) };
        load(&mut item, p.bits, RAX, components);
    }
    item.add(&encode(p.bits, &Instruction::with1(back, operand).ok()?)?.0);
    Some(item)
}

/// Bytes of a `mov word/dword [rsp + at], value`.
fn on_stack(item: &mut Item, at: u8, bytes: usize, value: u32) {
    let mut code = if bytes == 2 { vec![0x66, 0xc7] } else { vec![0xc7] };
    code.extend([0x44, 0x24, at]);
    code.extend(&value.to_le_bytes()[..bytes]);
    item.add(&code);
}

/// Puts the address `after` bytes behind the code of it into register `n`.
fn address(p: &Place<'_>, n: usize, after: u8) -> Vec<Vec<u8>> {
    let n = n as u8;
    if p.bits == 64 {
        return vec![vec![0x48 | (n >> 3) << 2, 0x8d, 0x05 | (n & 7) << 3, after, 0, 0, 0]];
    }
    // call $+5; pop n; add n, …
    vec![vec![0xe8, 0, 0, 0, 0], vec![0x58 | n], vec![0x83, 0xc0 | n, 4 + after]]
}

fn push(n: usize) -> Vec<u8> {
    let n = n as u8;
    if n < 8 { vec![0x50 | n] } else { vec![0x41, 0x50 | (n & 7)] }
}

/// A far jump, call or return to the next instruction, or one that fails.
fn far(p: &mut Place<'_>, code: Code) -> Option<Item> {
    use Code::*;
    let count = if p.bits == 64 { 16 } else { 8 };
    let n = (0..count).find(|&n| !p.roles.contains(n) && n != RSP && p.r.chance(30))?;
    let same = if p.bits == 64 { CODE64 } else { CODE32 };
    let selector = if p.r.chance(75) { same as u8 } else { p.r.pick(&BAD) };
    let mut tail = Item::default();
    // A word of the stack that holds an offset, and behind it, inside it, the selector.
    let pair = |tail: &mut Item, bytes: usize, last: &[u8]| {
        tail.add(&push(n));
        if bytes == 4 && p.bits == 32 {
            // The word has four bytes: the selector goes below.
            tail.bytes.clear();
            tail.add(&[0x6a, selector]);
            tail.add(&push(n));
            tail.count = 2;
        } else {
            on_stack(tail, bytes as u8, 2, selector.into());
        }
        tail.add(last);
    };
    // AMD's processors do not heed REX.W here.
    let offset = if crate::select::host_is_amd() { 4 } else { 8 };
    match code {
        Retfq => {
            tail.add(&[0x6a, selector]);
            tail.add(&push(n));
            tail.add(&[0x48, 0xcb]);
        }
        Retfq_imm16 => {
            tail.add(&[0x6a, selector]);
            tail.add(&push(n));
            tail.add(&[0x48, 0xca, 8, 0]);
        }
        Retfd => pair(&mut tail, 4, &[0xcb]),
        Retfd_imm16 => pair(&mut tail, 4, &[0xca, 4, 0]),
        Retfw => pair(&mut tail, 2, &[0x66, 0xcb]),
        Retfw_imm16 => pair(&mut tail, 2, &[0x66, 0xca, 4, 0]),
        Jmp_m1632 => pair(&mut tail, 4, &[0xff, 0x2c, 0x24]),
        Jmp_m1616 => pair(&mut tail, 2, &[0x66, 0xff, 0x2c, 0x24]),
        Jmp_m1664 => pair(&mut tail, offset, &[0x48, 0xff, 0x2c, 0x24]),
        Call_m1632 => pair(&mut tail, 4, &[0xff, 0x1c, 0x24]),
        Call_m1616 => pair(&mut tail, 2, &[0x66, 0xff, 0x1c, 0x24]),
        Call_m1664 => pair(&mut tail, offset, &[0x48, 0xff, 0x1c, 0x24]),
        // To where nothing is.
        Jmp_ptr1632 => tail.add(&[0xea, 0, 0x10, 0, 0, selector, 0]),
        Jmp_ptr1616 => tail.add(&[0x66, 0xea, 0, 0x10, selector, 0]),
        Call_ptr1632 => tail.add(&[0x9a, 0, 0x10, 0, 0, selector, 0]),
        Call_ptr1616 => tail.add(&[0x66, 0x9a, 0, 0x10, selector, 0]),
        Iretq => {
            // push 0x2b; push rsp; pushfq; push selector; push n; iretq
            tail.add(&[0x6a, DATA32 as u8]);
            tail.add(&[0x54]);
            tail.add(&[0x9c]);
            tail.add(&[0x6a, selector]);
            tail.add(&push(n));
            tail.add(&[0x48, 0xcf]);
        }
        Iretd if p.bits == 32 => {
            tail.add(&[0x9c]);
            tail.add(&[0x6a, selector]);
            tail.add(&push(n));
            tail.add(&[0xcf]);
        }
        Iretw if p.bits == 32 => {
            tail.add(&[0x66, 0x9c]);
            tail.add(&[0x66, 0x6a, selector]);
            tail.add(&[0x66, 0x50 | n as u8]);
            tail.add(&[0x66, 0xcf]);
        }
        Iretd | Iretw => {
            let bytes = if code == Iretd { 4 } else { 2 };
            // push n; lea rsp, [rsp - 40]; push n; then what is above it.
            tail.add(&push(n));
            tail.add(&[0x48, 0x8d, 0x64, 0x24, 0xd8]);
            tail.add(&push(n));
            on_stack(&mut tail, bytes as u8, bytes, selector.into());
            on_stack(&mut tail, 2 * bytes as u8, bytes, 0x202);
            let sp = [0x89, 0x64, 0x24, 3 * bytes as u8];
            if bytes == 2 {
                tail.add(&[&[0x66][..], &sp[..]].concat());
            } else {
                tail.add(&sp);
            }
            on_stack(&mut tail, 4 * bytes as u8, bytes, DATA32.into());
            tail.add(if bytes == 4 { &[0xcf][..] } else { &[0x66, 0xcf][..] });
        }
        _ => return None,
    }
    let mut item = Item::default();
    address(p, n, tail.bytes.len() as u8).iter().for_each(|bytes| item.add(bytes));
    item.bytes.extend(&tail.bytes);
    item.count += tail.count;
    Some(item)
}
