//! The same in 32-bit protected mode and in real mode, task switches, and the way from one mode to the next.

use iced_x86::code_asm::*;
use mimus_arch::x86::regs::*;
use mimus_arch::x86::state::attr;
use mimus_arch::x86::{MpState, Segment, X86State};

use crate::cases::{Body, RESULT, data, noise};
use crate::guest::*;

/// A task's state segment, beside the one of long mode.
const TASK: u64 = TSS + 0x200;
const TASK_SELECTOR: u16 = 0x38;

fn base(s: &mut X86State) {
    s.cr0 = CR0_MP | CR0_ET | CR0_NE;
    s.cr4 = CR4_OSFXSR | CR4_OSXMMEXCPT | CR4_OSXSAVE;
    s.xcr0 = XCR0_X87 | XCR0_SSE | XCR0_AVX;
    s.gpr = [0; 16];
    s.gpr[RSP] = STACK;
    s.rip = CODE;
    s.rflags = RFLAGS_FIXED;
    s.mp_state = MpState::Running;
}

/// 32-bit protected mode, flat, without paging.
fn protected(s: &mut X86State) {
    base(s);
    s.cr0 |= CR0_PE;
    (s.gdtr.base, s.gdtr.limit) = (GDT, 0x3f);
    (s.idtr.base, s.idtr.limit) = (IDT, 0x7ff);
    s.cs = Segment::flat(KERNEL_CODE32, attr::CODE | attr::DB);
    let data = Segment::flat(KERNEL_DATA, attr::DATA | attr::DB);
    (s.ss, s.ds, s.es, s.fs, s.gs) = (data, data, data, data, data);
    s.tr = Segment { selector: 0x30, base: TSS, limit: 0x67, attributes: attr::P | 0xb };
    s.ldtr = Segment::UNUSABLE;
}

/// Handlers of protected mode: vector, error code, EIP and flags are noted at EBP; ESI is where to go on.
fn handlers32(g: &Guest) {
    for vector in 0..48u8 {
        let at = HANDLERS + u64::from(vector) * 16;
        let gate = at & 0xffff | u64::from(KERNEL_CODE32) << 16 | 0xee00 << 32 | (at >> 16) << 48;
        g.store(IDT + u64::from(vector) * 8, gate);
        g.code(at, 32, |a| {
            if !matches!(vector, 8 | 10..=14 | 17) {
                a.push(0)?;
            }
            a.push(i32::from(vector))?;
            a.jmp(HANDLERS + 0x800)
        });
    }
    g.code(HANDLERS + 0x800, 32, |a| {
        a.push(eax)?;
        for (i, from) in [4, 8, 12, 20].into_iter().enumerate() {
            a.mov(eax, dword_ptr(esp + from))?;
            a.mov(dword_ptr(ebp + 4 * i as i32), eax)?;
        }
        a.add(ebp, 16)?;
        a.mov(dword_ptr(esp + 12), esi)?;
        a.and(dword_ptr(esp + 20), !0x100)?;
        a.pop(eax)?;
        a.add(esp, 8)?;
        a.iretd()
    });
}

/// One case at `at`: EAX to EBX have noise.
fn case32(at: u64, number: u64, body: Body) -> Vec<u8> {
    let first = |after: u64| {
        assemble(at, 32, |a| {
            let mut next = noise(number + 1000);
            for r in [eax, ecx, edx, ebx] {
                a.mov(r, next() as u32)?;
            }
            a.mov(esi, after as u32)?;
            a.push(0x8d7)?;
            a.popfd()?;
            body(a)
        })
    };
    let after = at + first(0).len() as u64;
    let mut code = first(after);
    code.extend(assemble(after, 32, |a| {
        for (i, r) in [eax, ecx, edx, ebx].into_iter().enumerate() {
            a.mov(dword_ptr(edi + 4 * i as i32), r)?;
        }
        a.pushfd()?;
        a.pop(dword_ptr(edi + 32))?;
        a.fxsave(ptr(edi + 128))?;
        a.mov(word_ptr(edi + 128 + 6), 0)?;
        for at in [8, 12, 16, 20, 28] {
            a.and(dword_ptr(edi + 128 + at), 0)?;
        }
        a.add(edi, RESULT)
    }));
    code
}

#[test]
fn protected_mode() {
    let cases: &[(&str, Body)] = cases! {
        "popcnt": |a| a.popcnt(ebx, ecx);
        "int n": |a| a.int(0x2f);
        "int3": |a| a.int3();
        "into": |a| a.into();
        "arpl": |a| a.arpl(ax, cx);
        "aam and its family": |a| { a.aam(10)?; a.aad(10)?; a.daa()?; a.das()?; a.aaa()?; a.aas() };
        "bound": |a| {
            a.mov(dword_ptr(DATA as i32), 5)?;
            a.mov(dword_ptr(DATA as i32 + 4), 9)?;
            a.mov(ecx, 12)?;
            a.bound(ecx, ptr(DATA as i32))
        };
        "pusha": |a| { a.pushad()?; a.popad() };
        "les": |a| {
            a.mov(dword_ptr(DATA as i32), 0x1234)?;
            a.mov(word_ptr(DATA as i32 + 4), i32::from(KERNEL_DATA))?;
            a.les(ecx, ptr(DATA as i32))
        };
        "x87": |a| { a.fninit()?; a.fld(qword_ptr(DATA as i32 + 0x400))?; a.fsqrt()?; a.fnstsw(ax) };
        "the environment": |a| {
            a.fnstenv(ptr(DATA as i32 + 0x800))?;
            for at in [12, 16, 20, 24] {
                a.and(dword_ptr(DATA as i32 + 0x800 + at), 0)?;
            }
            Ok(())
        };
        "sse": |a| { a.movups(xmm0, xmmword_ptr(DATA as i32 + 0x500))?; a.mulps(xmm0, xmm0)?; a.movd(ecx, xmm0) };
        "avx": |a| { a.vmovups(ymm1, ymmword_ptr(DATA as i32 + 0x500))?; a.vaddps(ymm2, ymm1, ymm1) };
        "bmi": |a| a.pdep(ebx, ecx, edx);
        "xgetbv": |a| { a.xor(ecx, ecx)?; a.xgetbv() };
        "lar": |a| { a.mov(ecx, i32::from(USER_CODE))?; a.lar(eax, ecx) };
        "verw": |a| { a.mov(eax, i32::from(KERNEL_CODE))?; a.verw(ax) };
        "a segment's limit": |a| {
            // A data segment of 16 bytes, in the descriptor after the last.
            a.mov(dword_ptr(GDT as i32 + 8), 0xf)?;
            a.mov(dword_ptr(GDT as i32 + 12), 0x0040_9300)?;
            a.mov(eax, 8)?;
            a.mov(fs, eax)?;
            a.movd(xmm0, dword_ptr(12).fs())?;
            a.movd(xmm0, dword_ptr(14).fs())
        };
    };
    let guest = on_both("protected_mode", |g| {
        handlers32(g);
        data(g);
        let mut at = CODE;
        for (i, (_, body)) in cases.iter().enumerate() {
            let code = case32(at, i as u64, *body);
            g.write(at, &code);
            at += code.len() as u64;
        }
        g.code(at, 32, crate::cases::end);
        g.change(|s| {
            protected(s);
            s.gpr[RBP] = TRAPS;
            s.gpr[RDI] = RESULTS;
        });
    });
    takeovers(guest, "protected_mode", 10);
}

fn takeovers(guest: Option<Guest>, test: &str, at_least: u64) {
    let Some(guest) = guest else { return };
    let count = guest.statistic("instructions taken over");
    if quirks().emulated_cpl0 {
        assert!(count >= at_least, "{test}: {:?}", guest.vm.statistics());
    }
}

#[test]
fn task_switches() {
    const OTHER: u64 = CODE + 0x1000;
    let guest = on_both("task_switches", |g| {
        handlers32(g);
        // The first task is busy, the second available.
        g.store(GDT + 0x30, 0x0000_8b00_0000_0067 | TSS << 16);
        g.store(GDT + 0x38, 0x0000_8900_0000_0067 | TASK << 16);
        let word = |at: u64, value: u64| g.write(TASK + at, &(value as u32).to_le_bytes());
        word(0x20, OTHER);
        word(0x24, 2);
        word(0x28, 0x1111);
        word(0x38, STACK - 0x800);
        for (at, selector) in [(0x48, KERNEL_DATA), (0x4c, KERNEL_CODE32), (0x50, KERNEL_DATA), (0x54, KERNEL_DATA)] {
            word(at, selector.into());
        }
        for at in [0x58, 0x5c] {
            word(at, KERNEL_DATA.into());
        }
        g.write(TASK + 0x66, &0x68u16.to_le_bytes());
        g.code(CODE, 32, |a| {
            a.mov(ebx, 0x2222)?;
            // JMP TASK_SELECTOR:0, then CALL.
            a.db(&[0xea, 0, 0, 0, 0, TASK_SELECTOR as u8, 0])?;
            a.add(ebx, 1)?;
            a.db(&[0x9a, 0, 0, 0, 0, TASK_SELECTOR as u8, 0])?;
            a.add(ebx, 2)?;
            crate::cases::end(a)
        });
        g.code(OTHER, 32, |a| {
            a.add(eax, 1)?;
            a.popcnt(ecx, eax)?;
            // Back to the first: JMP 0x30:0.
            a.db(&[0xea, 0, 0, 0, 0, 0x30, 0])?;
            // Called, it goes on here.
            a.add(eax, 0x10)?;
            a.str(dx)?;
            a.iretd()
        });
        g.change(protected);
    });
    takeovers(guest, "task_switches", 2);
}

#[test]
fn real_mode() {
    let guest = on_both("real_mode", |g| {
        data(g);
        // Vector 0x21: counts in BX. Vector 0 (#DE) and 6 (#UD) count in CX and skip two bytes.
        g.code(HANDLERS, 16, |a| {
            a.inc(bx)?;
            a.iret()
        });
        g.code(HANDLERS + 0x20, 16, |a| {
            a.inc(si)?;
            a.mov(bp, sp)?;
            a.add(word_ptr(bp), 3)?;
            a.iret()
        });
        g.store(0x21 * 4, HANDLERS);
        g.write(6 * 4, &(HANDLERS as u32 + 0x20).to_le_bytes());
        g.code(0x1000, 16, |a| {
            a.xor(ebx, ebx)?;
            a.xor(esi, esi)?;
            a.mov(ecx, 0x1234_5678)?;
            a.popcnt(eax, ecx)?;
            a.int(0x21)?;
            a.fninit()?;
            a.fldpi()?;
            a.fld(qword_ptr(0x400))?;
            a.faddp(st1, st0)?;
            a.fstp(tbyte_ptr(0x700))?;
            a.fnstenv(ptr(0x720))?;
            a.movups(xmm0, xmmword_ptr(0x500))?;
            a.addps(xmm0, xmm0)?;
            a.movlps(qword_ptr(0x740), xmm0)?;
            // UD1 with a register: three bytes.
            a.db(&[0x0f, 0xb9, 0xc0])?;
            // VEX encodings are LES and LDS here.
            a.int(0x21)?;
            a.crc32(eax, ecx)?;
            a.wait()?;
            for at in [0x726, 0x728, 0x72a, 0x72c] {
                a.mov(word_ptr(at), 0)?;
            }
            crate::cases::end(a)
        });
        g.change(|s| {
            base(s);
            let low = Segment::real(0, attr::DATA);
            s.cs = Segment::real(0, attr::CODE);
            (s.ss, s.es, s.fs, s.gs) = (low, low, low, low);
            s.ds = Segment::real((DATA >> 4) as u16, attr::DATA);
            (s.idtr.base, s.idtr.limit) = (0, 0x3ff);
            s.rip = 0x1000;
        });
    });
    takeovers(guest, "real_mode", 4);
}

#[test]
fn from_real_to_long_mode() {
    const CODE32: u64 = 0x2000;
    const CODE64: u64 = 0x3000;
    const POINTER: u64 = 0x4000;
    let guest = on_both("from_real_to_long_mode", |g| {
        data(g);
        g.store(POINTER, 0x3f | GDT << 16);
        g.code(0x1000, 16, |a| {
            a.cli()?;
            a.fninit()?;
            a.fld1()?;
            a.popcnt(eax, esp)?;
            a.lgdt(ptr(POINTER as i32))?;
            a.mov(eax, cr0)?;
            a.or(eax, 1)?;
            a.mov(cr0, eax)?;
            // JMP 0x28:CODE32, with a 32-bit offset.
            a.db(&[0x66, 0xea, 0, CODE32.to_le_bytes()[1], 0, 0, KERNEL_CODE32 as u8, 0])
        });
        g.code(CODE32, 32, |a| {
            a.mov(eax, i32::from(KERNEL_DATA))?;
            for s in [ds, es, ss, fs, gs] {
                a.mov(s, eax)?;
            }
            a.fadd(qword_ptr(DATA as i32 + 0x400))?;
            a.movups(xmm1, xmmword_ptr(DATA as i32))?;
            a.paddd(xmm1, xmm1)?;
            a.mov(eax, PML4 as i32)?;
            a.mov(cr3, eax)?;
            a.mov(eax, cr4)?;
            a.or(eax, CR4_PAE as i32)?;
            a.mov(cr4, eax)?;
            a.mov(ecx, 0xc000_0080u32)?;
            a.rdmsr()?;
            a.or(eax, 0x100)?;
            a.wrmsr()?;
            a.mov(eax, cr0)?;
            a.or(eax, 0x8000_0000u32)?;
            a.mov(cr0, eax)?;
            a.popcnt(ebx, ecx)?;
            a.db(&[0xea, 0, CODE64.to_le_bytes()[1], 0, 0, KERNEL_CODE as u8, 0])
        });
        g.code(CODE64, 64, |a| {
            a.fadd(qword_ptr(DATA + 0x408))?;
            a.vaddps(ymm1, ymm1, ymmword_ptr(DATA + 0x500))?;
            a.popcnt(rdx, r8)?;
            a.movq(r9, xmm1)?;
            a.fstp(tbyte_ptr(DATA + 0x700))?;
            crate::cases::end(a)
        });
        g.change(|s| {
            base(s);
            let low = Segment::real(0, attr::DATA);
            s.cs = Segment::real(0, attr::CODE);
            (s.ss, s.ds, s.es, s.fs, s.gs) = (low, low, low, low, low);
            (s.idtr.base, s.idtr.limit) = (0, 0x3ff);
            s.ldtr = Segment::UNUSABLE;
            s.tr = Segment { selector: 0, base: 0, limit: 0xffff, attributes: attr::P | 0xb };
            s.rip = 0x1000;
        });
    });
    takeovers(guest, "from_real_to_long_mode", 4);
}
