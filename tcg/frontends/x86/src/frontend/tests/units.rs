//! Vector and x87 instructions at their edges: faults in the middle, exceptions, units that are off, code they write.

use super::*;

/// `movups xmm0, [0x100000]`
const LOAD: [u8; 8] = [0x0f, 0x10, 0x04, 0x25, 0x00, 0x00, 0x10, 0x00];

fn xmm(s: &X86State, n: usize) -> u128 {
    u128::from_le_bytes(s.xsave[160 + 16 * n..176 + 16 * n].try_into().unwrap())
}

/// Where exception `vector`'s handler halts.
const fn handler(vector: u64) -> u64 {
    0xa000 + 16 * vector + 1
}

/// Runs `code` in 64-bit mode and expects an exception at offset `at`.
fn faults(g: &mut Guest, code: &[u8], vector: u64, at: u64) -> X86State {
    g.put(CODE, code);
    let s = g.run();
    assert_eq!(s.rip, handler(vector), "{code:x?}");
    let coded = matches!(vector, 8 | 10..=14 | 17);
    assert_eq!(g.u64_at(s.gpr[RSP] + if coded { 8 } else { 0 }), CODE + at, "{code:x?}");
    s
}

const PATTERN: u128 = 0x0f0e_0d0c_0b0a_0908_0706_0504_0302_0100;

fn ready(g: &mut Guest) {
    g.long();
    g.put(DATA, &PATTERN.to_le_bytes());
    g.put_u64(DATA + 16, 0x3ff0_0000_0000_0000);
    g.change(|s| s.mp_state = MpState::Running);
}

#[test]
fn a_misaligned_operand_faults_behind_what_came_before() {
    both(|mut g| {
        ready(&mut g);
        g.change(|s| s.gpr[RBX] = DATA + 8);
        // movaps xmm1,xmm0; paddb xmm1,xmm0; movaps xmm0,[rbx]; hlt
        let code = [&LOAD[..], &[0x0f, 0x28, 0xc8, 0x66, 0x0f, 0xfc, 0xc8, 0x0f, 0x28, 0x03, 0xf4]].concat();
        let s = faults(&mut g, &code, 13, 15);
        assert_eq!((xmm(&s, 0), xmm(&s, 1)), (PATTERN, PATTERN * 2));
        // Several at once: movaps xmm2,[rbx-8]; movaps xmm3,[rbx]; hlt
        ready(&mut g);
        g.change(|s| s.gpr[RBX] = DATA + 8);
        let code = [&LOAD[..], &[0x0f, 0x28, 0x53, 0xf8, 0x0f, 0x28, 0x1b, 0xf4]].concat();
        let s = faults(&mut g, &code, 13, 12);
        assert_eq!(xmm(&s, 2), PATTERN);
    });
}

#[test]
fn an_operand_in_two_pages_of_which_one_is_missing() {
    both(|mut g| {
        ready(&mut g);
        // Nothing is mapped from 1 GiB on.
        g.change(|s| s.gpr[RBX] = 0x3fff_fff8);
        let code = [&LOAD[..], &[0x0f, 0x10, 0x03, 0xf4]].concat();
        let s = faults(&mut g, &code, 14, 8);
        assert_eq!((s.cr2, xmm(&s, 0)), (0x4000_0000, PATTERN));
        // fld1; fistp qword [rbx]: what was to be stored is still there.
        ready(&mut g);
        g.change(|s| s.gpr[RBX] = 0x3fff_fffc);
        let s = faults(&mut g, &[0xd9, 0xe8, 0xdf, 0x3b, 0xf4], 14, 2);
        assert_eq!(s.cr2, 0x4000_0000);
        assert_eq!((s.xsave[3] >> 3 & 7, s.xsave[4]), (7, 0x80), "one register in use");
    });
}

#[test]
fn a_result_that_ends_a_group_of_accesses_is_not_lost() {
    let check = |mut g: Guest| {
        // add rax,[rbx]; add rax,[rbx+8]; cvttsd2si r14d,[rbx+16]; xor r14,0x69; hlt
        let code =
            [0x48, 0x03, 0x03, 0x48, 0x03, 0x43, 8, 0xf2, 0x44, 0x0f, 0x2c, 0x73, 16, 0x49, 0x83, 0xf6, 0x69, 0xf4];
        for _ in 0..3 {
            ready(&mut g);
            g.put(CODE, &code);
            g.change(|s| (s.rip, s.gpr[RBX], s.gpr[14]) = (CODE, DATA, 0));
            assert_eq!(g.run().gpr[14], 0x68);
        }
    };
    both(check);
    let _one = ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner);
    check(Guest::optimised(false, mimus_tcg_ir::backend::Optimise::Forced));
}

#[test]
fn operands_in_two_pages_are_whole() {
    both(|mut g| {
        ready(&mut g);
        let edge = DATA + 0x1000;
        for before in 1..16 {
            g.put(edge - 32, &[0xee; 64]);
            g.put(edge - before, &PATTERN.to_le_bytes());
            // movups xmm0,[rbx]; movups [rcx],xmm0; hlt, twice: once to fill the TLB.
            g.change(|s| {
                s.rip = CODE;
                s.mp_state = MpState::Running;
                s.gpr[RBX] = edge - before;
                s.gpr[RCX] = edge + 0x1000 - (16 - before);
            });
            g.put(edge + 0xfe0, &[0xee; 64]);
            g.put(CODE, &[0x0f, 0x10, 0x03, 0x0f, 0x11, 0x01, 0x0f, 0x10, 0x03, 0x0f, 0x11, 0x01, 0xf4]);
            let s = g.run();
            assert_eq!(xmm(&s, 0), PATTERN);
            let mut bytes = [0; 64];
            g.get(edge + 0xfe0, &mut bytes);
            let at = 32 - (16 - before as usize);
            assert_eq!(bytes[at..at + 16], PATTERN.to_le_bytes());
            assert!(bytes[..at].iter().chain(&bytes[at + 16..]).all(|b| *b == 0xee), "{bytes:x?}");
        }
    });
}

#[test]
fn an_unmasked_exception_leaves_the_operands() {
    both(|mut g| {
        ready(&mut g);
        g.put(DATA + 32, &0x1d80u32.to_le_bytes());
        g.change(|s| s.gpr[RBX] = DATA + 32);
        // ldmxcsr [rbx]; movups; xorps xmm1,xmm1; divps xmm0,xmm1
        let code = [&[0x0f, 0xae, 0x13], &LOAD[..], &[0x0f, 0x57, 0xc9, 0x0f, 0x5e, 0xc1, 0xf4]].concat();
        let s = faults(&mut g, &code, 19, 14);
        assert_eq!(xmm(&s, 0), PATTERN);
        assert_eq!(u32::from_le_bytes(s.xsave[24..28].try_into().unwrap()) & 4, 4, "ZE");
    });
}

#[test]
fn flags_of_masked_exceptions_add_up() {
    both(|mut g| {
        ready(&mut g);
        // movups; xorps xmm1,xmm1; divps xmm0,xmm1; stmxcsr [rbx]; hlt
        g.change(|s| s.gpr[RBX] = DATA + 64);
        let tail = [0x0f, 0x57, 0xc9, 0x0f, 0x5e, 0xc1, 0x0f, 0xae, 0x1b, 0xf4];
        g.put(CODE, &[&LOAD[..], &tail].concat());
        let s = g.run();
        let word = u32::from_le_bytes(s.xsave[24..28].try_into().unwrap());
        assert_eq!(word, g.u64_at(DATA + 64) as u32);
        assert_eq!(word & 0x1f85, 0x1f84, "ZE, and nothing else but DE");
    });
}

#[test]
fn a_unit_that_goes_off_in_the_block() {
    both(|mut g| {
        ready(&mut g);
        // movups; paddb xmm0,xmm0; mov rax,cr0; or eax,8; mov cr0,rax; paddb xmm0,xmm0
        let tail = [
            0x66, 0x0f, 0xfc, 0xc0, 0x0f, 0x20, 0xc0, 0x83, 0xc8, 0x08, 0x0f, 0x22, 0xc0, 0x66, 0x0f, 0xfc, 0xc0, 0xf4,
        ];
        let s = faults(&mut g, &[&LOAD[..], &tail].concat(), 7, 21);
        assert_eq!(xmm(&s, 0), PATTERN * 2);
        // The same with x87: fld1; ...; fld1
        ready(&mut g);
        let code = [0xd9, 0xe8, 0x0f, 0x20, 0xc0, 0x83, 0xc8, 0x08, 0x0f, 0x22, 0xc0, 0xd9, 0xe8, 0xf4];
        faults(&mut g, &code, 7, 11);
    });
}

#[test]
fn an_unmasked_x87_exception_comes_with_the_next_instruction() {
    both(|mut g| {
        ready(&mut g);
        g.put(DATA + 32, &0x37bu16.to_le_bytes());
        g.change(|s| s.gpr[RBX] = DATA + 32);
        // fninit; fldcw [rbx]; fld1; fldz; fdivp; fwait
        faults(&mut g, &[0xdb, 0xe3, 0xd9, 0x2b, 0xd9, 0xe8, 0xd9, 0xee, 0xde, 0xf9, 0x9b, 0xf4], 16, 10);
    });
}

#[test]
fn code_that_a_vector_store_writes() {
    both(|mut g| {
        ready(&mut g);
        // mov eax,0x1234; hlt, to where no-ops were.
        g.put(DATA, &[0xb8, 0x34, 0x12, 0, 0, 0xf4, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
        g.change(|s| s.gpr[RBX] = DATA);
        let mut code = vec![0x0f, 0x10, 0x03, 0x0f, 0x11, 0x05, 0, 0, 0, 0];
        code.extend([0x90; 16]);
        code.push(0xf4);
        g.put(CODE, &code);
        let s = g.run();
        assert_eq!((s.gpr[RAX], s.rip), (0x1234, CODE + 16));
    });
}

#[test]
fn comparisons_set_flags_that_outlive_vector_loads() {
    both(|mut g| {
        ready(&mut g);
        g.change(|s| {
            s.gpr[RBX] = DATA + 8;
            s.gpr[RAX] = 0;
            s.gpr[RCX] = 0;
            s.gpr[RDX] = 0;
        });
        // movsd xmm0,[rbx+8]; ucomisd xmm0,[rbx]; seta al; setp cl; movups xmm1,[rbx]; setb dl; hlt
        let code = [
            0xf2, 0x0f, 0x10, 0x43, 0x08, 0x66, 0x0f, 0x2e, 0x03, 0x0f, 0x97, 0xc0, 0x0f, 0x9a, 0xc1, 0x0f, 0x10, 0x0b,
            0x0f, 0x92, 0xc2, 0xf4,
        ];
        g.put(CODE, &code);
        let s = g.run();
        assert_eq!((s.gpr[RAX], s.gpr[RCX], s.gpr[RDX]), (1, 0, 0));
    });
}

#[test]
fn conditional_moves_and_status_of_the_x87_unit() {
    both(|mut g| {
        ready(&mut g);
        g.change(|s| {
            s.gpr[RBX] = DATA + 32;
            s.gpr[RAX] = 0x1234_5678_9abc_def0;
        });
        // fninit; fldz; fld1; fcomi st0,st1; fcmovnbe st0,st1; fnstsw ax; fist dword [rbx]; fnstcw [rbx+4]; hlt
        let code = [
            0xdb, 0xe3, 0xd9, 0xee, 0xd9, 0xe8, 0xdb, 0xf1, 0xdb, 0xd1, 0xdf, 0xe0, 0xdb, 0x13, 0xd9, 0x7b, 0x04, 0xf4,
        ];
        g.put(CODE, &code);
        let s = g.run();
        assert_eq!((s.gpr[RAX], g.u64_at(DATA + 32) & 0xffff_ffff_ffff), (0x1234_5678_9abc_3000, 0x037f_0000_0000));
    });
}

#[test]
fn flags_at_a_fault_in_a_loop_are_those_of_the_round_before() {
    both(|mut g| {
        ready(&mut g);
        g.change(|s| {
            (s.gpr[RSI], s.gpr[RDI], s.gpr[RDX]) = (0x4000_0000 - 0x80, 0x4000_0f00, 0);
            s.rflags = 2 | RFLAGS_OF;
        });
        // movups xmm0,[rsi]; paddb xmm1,xmm0; mov rax,[rsi+8]; lea rdx,[rdx+1]; add rsi,16; cmp rsi,rdi; jne; hlt
        let code = [
            0x0f, 0x10, 0x06, 0x66, 0x0f, 0xfc, 0xc8, 0x48, 0x8b, 0x46, 0x08, 0x48, 0x8d, 0x52, 0x01, 0x48, 0x83, 0xc6,
            0x10, 0x48, 0x39, 0xfe, 0x75, 0xe8, 0xf4,
        ];
        let s = faults(&mut g, &code, 14, 0);
        assert_eq!((s.cr2, s.gpr[RSI], s.gpr[RDX]), (0x4000_0000, 0x4000_0000, 8));
        // 0x40000000 - 0x40000f00
        let flags = g.u64_at(s.gpr[RSP] + 24) & 0x8d5;
        assert_eq!(flags, RFLAGS_CF | RFLAGS_SF | RFLAGS_PF, "{flags:#x}");
        // To its end, and what is behind it: sbb rax,rax; sete cl
        ready(&mut g);
        let mut code = code.to_vec();
        code.pop();
        code.extend([0x48, 0x19, 0xc0, 0x0f, 0x94, 0xc1, 0xf4]);
        g.put(CODE, &code);
        g.change(|s| (s.gpr[RSI], s.gpr[RDI], s.gpr[RDX], s.gpr[RCX]) = (DATA, DATA + 0x2000, 0, 0));
        let s = g.run();
        assert_eq!((s.gpr[RSI], s.gpr[RDX], s.gpr[RAX], s.gpr[RCX]), (DATA + 0x2000, 0x200, 0, 1));
    });
}

/// FCMOV finds the flags computed anew; they are still there when what they are computed from is gone.
#[test]
fn flags_that_a_unit_has_looked_at_are_kept() {
    both(|mut g| {
        g.long();
        // or esi, r14d; mov edx, [rbx]; fcmovne st0, st3; movzx si, r14w; adc al, r10b; hlt
        let code = [0x44, 0x09, 0xf6, 0x8b, 0x13, 0xdb, 0xcb, 0x66, 0x41, 0x0f, 0xb7, 0xf6, 0x41, 0x12, 0xc2, 0xf4];
        g.put(CODE, &code);
        g.change(|s| {
            s.rflags |= RFLAGS_CF;
            s.gpr[RBX] = DATA;
            s.gpr[RSI] = 0xf0f0_f0f0;
            s.gpr[R14] = 0x0f0f_0f0f;
            (s.gpr[RAX], s.gpr[R10]) = (0x20, 0x03);
        });
        let s = g.run();
        assert_eq!((s.rip, s.gpr[RAX], s.gpr[RSI]), (CODE + code.len() as u64, 0x23, 0xffff_0f0f));
    });
}
