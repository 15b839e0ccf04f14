//! Programs of many short cases: each begins with known registers, and notes what it ended with.

use iced_x86::code_asm::*;

use crate::guest::*;

/// Bytes of a case's results.
pub const RESULT: i32 = 0x280;

pub type Body = fn(&mut CodeAssembler) -> Assembled;

/// A generator of register contents.
pub fn noise(seed: u64) -> impl FnMut() -> u64 {
    let mut x = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    move || {
        x ^= x << 13;
        x ^= x >> 7;
        x ^= x << 17;
        x
    }
}

/// Exception handlers of long mode: all note vector, error code, RIP, flags and CR2 at R13, and go on at R15 without TF.
pub fn handlers(g: &Guest) {
    for vector in 0..48u8 {
        let at = HANDLERS + u64::from(vector) * 16;
        g.gate(vector, at);
        g.code(at, 64, |a| {
            if !matches!(vector, 8 | 10..=14 | 17) {
                a.push(0)?;
            }
            a.push(i32::from(vector))?;
            a.jmp(HANDLERS + 0x800)
        });
    }
    g.code(HANDLERS + 0x800, 64, |a| {
        a.push(rax)?;
        for (i, from) in [8, 16, 24, 40].into_iter().enumerate() {
            a.mov(rax, qword_ptr(rsp + from))?;
            a.mov(qword_ptr(r13 + 8 * i as i32), rax)?;
        }
        a.mov(rax, cr2)?;
        a.mov(qword_ptr(r13 + 32), rax)?;
        // A program that gets nowhere does not go on for ever.
        let mut good = a.create_label();
        a.add(r13, 64)?;
        a.cmp(r13, TRAPS as i32 + 0x1_0000)?;
        a.jb(good)?;
        a.out(i32::from(crate::bus::PORT_STOP), al)?;
        a.hlt()?;
        a.set_label(&mut good)?;
        a.mov(qword_ptr(rsp + 24), r15)?;
        a.and(qword_ptr(rsp + 40), !0x100)?;
        a.pop(rax)?;
        a.add(rsp, 16)?;
        a.iretq()
    });
}

/// The end of a program.
pub fn end(a: &mut CodeAssembler) -> Assembled {
    let mut here = a.create_label();
    a.out(i32::from(crate::bus::PORT_STOP), al)?;
    a.set_label(&mut here)?;
    a.jmp(here)
}

/// One case of a 64-bit program: RAX to R11 have noise, R12 is [`DATA`], flags are known.
fn case(a: &mut CodeAssembler, number: u64, body: Body) -> Assembled {
    let mut next = noise(number + 1);
    let mut after = a.create_label();
    for (i, r) in [rax, rcx, rdx, rbx, rsi, rdi, r8, r9].into_iter().enumerate() {
        // Small numbers are likely to be of use too.
        let value = next();
        a.mov(r, if (number + i as u64).is_multiple_of(3) { value & 0x3f } else { value })?;
    }
    a.mov(r12, DATA)?;
    a.lea(r15, ptr(after))?;
    a.push(if number.is_multiple_of(2) { 0x8d7 } else { 2 })?;
    a.popfq()?;
    body(a)?;
    a.set_label(&mut after)?;
    for (i, r) in [rax, rcx, rdx, rbx, rsi, rdi, r8, r9].into_iter().enumerate() {
        a.mov(qword_ptr(r14 + 8 * i as i32), r)?;
    }
    a.pushfq()?;
    a.pop(qword_ptr(r14 + 64))?;
    a.fxsave64(ptr(r14 + 128))?;
    // Where the last instruction was: processors differ in when they keep it.
    a.mov(word_ptr(r14 + 128 + 6), 0)?;
    a.and(qword_ptr(r14 + 128 + 8), 0)?;
    a.and(qword_ptr(r14 + 128 + 16), 0)?;
    // Which bits of MXCSR there are.
    a.and(dword_ptr(r14 + 128 + 28), 0)?;
    a.add(r14, RESULT)
}

/// Noise in the data area: integers, and floating-point numbers of all formats.
pub fn data(g: &Guest) {
    let mut next = noise(77);
    for i in 0..512 {
        g.store(DATA + i * 8, next());
        g.store(UNMAPPED - 0x1000 + i * 8, next());
        g.store(READ_ONLY + i * 8, next());
    }
    for (i, v) in [1.5f64, -2.25, 1e300, 3.0e-310, f64::NAN, f64::INFINITY, 0.0, -0.0].into_iter().enumerate() {
        g.store(DATA + 0x400 + 8 * i as u64, v.to_bits());
    }
    for (i, v) in [0.5f32, -7.0, 1e38, 1e-40, f32::NAN, 1.0, 0.0, 3.25].into_iter().enumerate() {
        g.write(DATA + 0x500 + 4 * i as u64, &v.to_bits().to_le_bytes());
    }
    // Extended: 1.0 + a little, and a BCD number.
    g.write(DATA + 0x600, &[1, 0, 0, 0, 0, 0, 0, 0x80, 0xff, 0x3f]);
    g.write(DATA + 0x610, &[0x12, 0x34, 0x56, 0x78, 0x90, 0x12, 0x34, 0x56, 0x78, 0x80]);
}

/// Runs cases in 64-bit supervisor code on both engines. Each must need the translator if `needed` and the KVM here
/// emulates.
pub fn run_long(test: &str, cases: &[(&str, Body)], needed: bool) {
    let guest = on_both(test, |g| {
        handlers(g);
        data(g);
        let end = g.code(CODE, 64, |a| {
            for (i, (_, body)) in cases.iter().enumerate() {
                case(a, i as u64, *body)?;
            }
            end(a)
        });
        assert!(end < RESULTS && cases.len() as u64 * RESULT as u64 <= RAM - RESULTS);
        g.change(|s| {
            long(s);
            s.gpr[13] = TRAPS;
            s.gpr[14] = RESULTS;
        });
    });
    let Some(guest) = guest else { return };
    if !quirks().emulated_cpl0 {
        return assert_eq!(guest.statistic("emulation failures"), 0, "{test}");
    }
    let (handed, instructions) = (guest.statistic("takeovers"), guest.statistic("instructions taken over"));
    println!("{test}: {} cases, {instructions} instructions in {handed} takeovers", cases.len());
    if needed {
        assert!(instructions >= cases.len() as u64, "{test}: {:?}", guest.vm.statistics());
    }
}
