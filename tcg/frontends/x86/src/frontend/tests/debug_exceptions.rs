//! Debug exceptions: data and port breakpoints, the resume flag, single steps through repeated instructions.

use super::*;

/// The handler of #DB.
const HANDLER: u64 = 0xa010;
const COUNTER: u64 = DATA + 0x100;

fn u32_at(g: &Guest, at: u64) -> u64 {
    g.u64_at(at) & 0xffff_ffff
}

#[test]
fn data_breakpoint_traps_behind_a_write() {
    both(|mut g| {
        g.protected();
        // mov eax,DATA; mov dr0,eax; mov eax,0xd0001 (write, 4 bytes); mov dr7,eax; mov ebx,[DATA];
        // mov byte [DATA+4],1; mov byte [DATA+2],1; hlt
        let mut code = vec![0xb8, 0, 0, 0x10, 0, 0x0f, 0x23, 0xc0, 0xb8, 1, 0, 0x0d, 0, 0x0f, 0x23, 0xf8];
        code.extend([0x8b, 0x1d, 0, 0, 0x10, 0, 0xc6, 0x05, 4, 0, 0x10, 0, 1, 0xc6, 0x05, 2, 0, 0x10, 0, 1]);
        let after = CODE + code.len() as u64;
        code.push(0xf4);
        g.put(CODE, &code);
        let s = g.run();
        assert_eq!(s.rip, HANDLER + 1);
        assert_eq!(u32_at(&g, s.gpr[RSP]), after, "a trap: behind the instruction");
        assert_eq!(s.dr6 & 0x400f, 1);
        let mut byte = [0];
        g.get(DATA + 2, &mut byte);
        assert_eq!(byte, [1], "it was written");
    });
}

#[test]
fn read_breakpoint_and_length() {
    both(|mut g| {
        g.protected();
        // mov eax,DATA+5; mov dr1,eax; mov eax,0x700004 (any access, 2 bytes, aligned down to DATA+4); mov dr7,eax;
        // mov bl,[DATA+3]; mov bl,[DATA+6]; mov bl,[DATA+5]; hlt
        let mut code = vec![0xb8, 5, 0, 0x10, 0, 0x0f, 0x23, 0xc8, 0xb8, 4, 0, 0x70, 0, 0x0f, 0x23, 0xf8];
        code.extend([0x8a, 0x1d, 3, 0, 0x10, 0, 0x8a, 0x1d, 6, 0, 0x10, 0, 0x8a, 0x1d, 5, 0, 0x10, 0]);
        let after = CODE + code.len() as u64;
        code.push(0xf4);
        g.put(CODE, &code);
        let s = g.run();
        assert_eq!((s.rip, u32_at(&g, s.gpr[RSP])), (HANDLER + 1, after));
        assert_eq!(s.dr6 & 0x400f, 2);
    });
}

#[test]
fn port_breakpoints_need_cr4_de() {
    for de in [false, true] {
        both(|mut g| {
            g.protected();
            g.change(|s| {
                s.cr4 = s.cr4 & !CR4_DE | if de { CR4_DE } else { 0 };
                s.dr[0] = 0xe9;
                s.dr7 = 0x400 | 0x2_0001;
            });
            // out 0xe9,al; nop; hlt
            g.put(CODE, &[0xe6, 0xe9, 0x90, 0xf4]);
            let s = g.run();
            assert_eq!(s.rip, if de { HANDLER + 1 } else { CODE + 4 });
            if de {
                assert_eq!(u32_at(&g, s.gpr[RSP]), CODE + 2);
            }
        });
    }
}

#[test]
fn the_resume_flag_goes_on_at_a_breakpoint() {
    both(|mut g| {
        g.protected();
        // or dword [esp+8],0x10000; inc dword [COUNTER]; iret
        let mut handler = vec![0x81, 0x4c, 0x24, 8, 0, 0, 1, 0, 0xff, 0x05];
        handler.extend((COUNTER as u32).to_le_bytes());
        handler.push(0xcf);
        g.put(HANDLER, &handler);
        g.change(|s| {
            s.dr[0] = CODE + 1;
            s.dr7 = 0x401;
        });
        // nop; nop; hlt
        g.put(CODE, &[0x90, 0x90, 0xf4]);
        let s = g.run();
        assert_eq!((s.rip, u32_at(&g, COUNTER)), (CODE + 3, 1));
    });
}

/// A repeated instruction is one: that its breakpoint is passed holds for all repetitions, also where one of data comes
/// in between (SDM section 18.3.1.1).
#[test]
fn the_resume_flag_stays_for_all_repetitions() {
    for (control, hits) in [(0x401, 1), (0x401 | 0x10_0004, 2)] {
        both(|mut g| {
            g.protected();
            // or dword [esp+8],0x10000 where DR6 says 0: mov eax,dr6; test al,1; jz on; or …; on: xor eax,eax; mov dr6,eax;
            // inc dword [COUNTER]; iret
            let mut handler = vec![0x0f, 0x21, 0xf0, 0xa8, 1, 0x74, 8, 0x81, 0x4c, 0x24, 8, 0, 0, 1, 0];
            handler.extend([0x31, 0xc0, 0x0f, 0x23, 0xf0, 0xff, 0x05]);
            handler.extend((COUNTER as u32).to_le_bytes());
            handler.push(0xcf);
            g.put(HANDLER - 0x1000, &handler);
            g.put(HANDLER, &[0xe9, 0xfb, 0xef, 0xff, 0xff]);
            g.change(|s| {
                (s.gpr[RCX], s.gpr[RSI], s.gpr[RDI]) = (5, DATA, DATA + 0x20);
                s.dr[0] = CODE + 1;
                s.dr[1] = DATA + 0x22;
                s.dr7 = control;
            });
            g.put(DATA, &[1, 2, 3, 4, 5]);
            // nop; rep movsb; hlt
            g.put(CODE, &[0x90, 0xf3, 0xa4, 0xf4]);
            let s = g.run();
            assert_eq!((s.rip, s.gpr[RCX], u32_at(&g, COUNTER)), (CODE + 4, 0, hits), "{control:#x}");
            assert_eq!(g.u64_at(DATA + 0x20), 0x05_0403_0201);
        });
    }
}

#[test]
fn single_steps_stop_after_each_repetition() {
    both(|mut g| {
        g.protected();
        // inc dword [COUNTER]; iret
        let mut handler = vec![0xff, 0x05];
        handler.extend((COUNTER as u32).to_le_bytes());
        handler.push(0xcf);
        g.put(HANDLER, &handler);
        // mov ecx,3; mov esi,DATA; mov edi,DATA+16; pushf; or dword [esp],0x100; popf; rep movsb; mov ss,[…]
        let mut code = vec![0xb9, 3, 0, 0, 0, 0xbe, 0, 0, 0x10, 0, 0xbf, 0x10, 0, 0x10, 0];
        code.extend([0x9c, 0x81, 0x0c, 0x24, 0, 1, 0, 0, 0x9d, 0xf3, 0xa4]);
        // mov ax,ss; mov ss,ax; nop; pushf; and dword [esp],~0x100; popf; hlt
        code.extend([0x66, 0x8c, 0xd0, 0x8e, 0xd0, 0x90, 0x9c, 0x81, 0x24, 0x24, 0xff, 0xfe, 0xff, 0xff, 0x9d, 0xf4]);
        g.put(CODE, &code);
        let s = g.run();
        assert_eq!(s.gpr[RCX], 0);
        // Three repetitions; MOV from SS; MOV to SS and NOP together; PUSHF, AND, POPF.
        assert_eq!(u32_at(&g, COUNTER), 3 + 1 + 1 + 3);
    });
}

#[test]
fn data_breakpoints_on_bit_strings_and_gathers() {
    both(|mut g| {
        g.protected();
        // mov ecx, 100; bts [DATA], ecx: bit 4 of the word at DATA + 12; hlt
        let mut code = vec![0xb9, 100, 0, 0, 0, 0x0f, 0xab, 0x0d, 0, 0, 0x10, 0];
        let after = CODE + code.len() as u64;
        code.push(0xf4);
        g.put(CODE, &code);
        g.change(|s| {
            s.dr[0] = DATA;
            s.dr[1] = DATA + 12;
            s.dr7 = 0x400 | 0xdd_0005;
        });
        let s = g.run();
        assert_eq!((s.rip, u32_at(&g, s.gpr[RSP])), (HANDLER + 1, after));
        assert_eq!(s.dr6 & 0xf, 2, "not the word that the operand names");
    });
    if !cpuid::supported().has_name("avx2") {
        println!("SKIPPED (gathers): the host has no AVX2");
        return;
    }
    both(|mut g| {
        g.long();
        // vpgatherdd xmm0, [DATA + 4 * xmm1], xmm2: elements 0 and 2 are wanted, at 0x10 and 0x30
        let mut code = vec![0xc4, 0xe2, 0x69, 0x90, 0x04, 0x8d, 0, 0, 0x10, 0];
        let after = CODE + code.len() as u64;
        code.push(0xf4);
        g.put(CODE, &code);
        g.change(|s| {
            for (i, index) in [4u32, 8, 12, 16].into_iter().enumerate() {
                s.xsave[176 + 4 * i..180 + 4 * i].copy_from_slice(&index.to_le_bytes());
            }
            s.xsave[192 + 3] = 0x80;
            s.xsave[192 + 11] = 0x80;
            s.dr[0] = DATA + 0x20;
            s.dr[1] = DATA + 0x30;
            s.dr7 = 0x400 | 0xff_0005;
        });
        let s = g.run();
        assert_eq!((s.rip, g.u64_at(s.gpr[RSP])), (HANDLER + 1, after));
        assert_eq!(s.dr6 & 0xf, 2);
    });
}

/// A breakpoint on what MOV to SS loads is reported after the next instruction.
#[test]
fn loads_of_ss_hold_breakpoints_back() {
    both(|mut g| {
        g.protected();
        g.put(DATA, &[0x10, 0]);
        // mov ss, [DATA]; nop; nop; hlt
        g.put(CODE, &[0x8e, 0x15, 0, 0, 0x10, 0, 0x90, 0x90, 0xf4]);
        g.change(|s| {
            s.dr[0] = DATA;
            s.dr7 = 0x400 | 0x7_0001;
        });
        let s = g.run();
        assert_eq!((s.rip, u32_at(&g, s.gpr[RSP])), (HANDLER + 1, CODE + 7));
        assert_eq!(s.dr6 & 0x400f, 1);
    });
}

/// General detect: any access to debug registers faults, and clears the bit so that the handler may look.
#[test]
fn general_detect() {
    both(|mut g| {
        g.protected();
        // mov eax, dr0; hlt
        g.put(CODE, &[0x0f, 0x21, 0xc0, 0xf4]);
        g.change(|s| s.dr7 = 0x2400);
        let s = g.run();
        assert_eq!((s.rip, u32_at(&g, s.gpr[RSP])), (HANDLER + 1, CODE), "a fault");
        assert_eq!((s.dr6 & 0x2000, s.dr7 & 0x2000), (0x2000, 0));
    });
}

/// A handler of #DB that notes where it was called from, asks for the next branch, and goes on: the places end up at
/// [`COUNTER`] + 8, their number at [`COUNTER`].
fn note_branches(g: &mut Guest) {
    // push rax; push rcx; push rdx; mov rax,[COUNTER]; inc rax; mov [COUNTER],rax; mov rcx,[rsp+24];
    // mov [COUNTER+8*rax],rcx; mov ecx,0x1d9; rdmsr; mov [SEEN],eax; mov eax,2; xor edx,edx; wrmsr; pop rdx; pop rcx;
    // pop rax; iretq
    let mut handler = vec![0x50, 0x51, 0x52, 0x48, 0x8b, 0x04, 0x25, 0, 1, 0x10, 0, 0x48, 0xff, 0xc0];
    handler.extend([0x48, 0x89, 0x04, 0x25, 0, 1, 0x10, 0, 0x48, 0x8b, 0x4c, 0x24, 24]);
    handler.extend([0x48, 0x89, 0x0c, 0xc5, 0, 1, 0x10, 0, 0xb9, 0xd9, 1, 0, 0, 0x0f, 0x32]);
    handler.extend([0x89, 0x04, 0x25, 0xf0, 0, 0x10, 0, 0xb8, 2, 0, 0, 0, 0x31, 0xd2, 0x0f, 0x30]);
    handler.extend([0x5a, 0x59, 0x58, 0x48, 0xcf]);
    g.put(HANDLER - 0x1000, &handler);
    g.put(HANDLER, &[0xe9, 0xfb, 0xef, 0xff, 0xff]);
    g.put_u64(DATA + 0xf0, !0);
}

/// With DEBUGCTL.BTF steps end at branches that are taken (SDM section 18.4.3); a debug exception clears the bit.
#[test]
fn steps_from_branch_to_branch() {
    both(|mut g| {
        g.long();
        note_branches(&mut g);
        let mut code = Vec::new();
        let mut ends = Vec::new();
        let mut at = |code: &mut Vec<u8>, bytes: &[u8], ends_at: Option<i64>| {
            code.extend(bytes);
            if let Some(relative) = ends_at {
                ends.push(CODE.wrapping_add(code.len() as u64).wrapping_add_signed(relative));
            }
        };
        // pushfq; or dword [rsp],0x100; popfq: steps begin.
        at(&mut code, &[0x9c, 0x81, 0x0c, 0x24, 0, 1, 0, 0, 0x9d], None);
        // xor eax,eax; jnz (not taken); jz +0; nop; jz +1 (over a HLT).
        at(&mut code, &[0x31, 0xc0, 0x75, 1], None);
        at(&mut code, &[0x74, 0], Some(0));
        at(&mut code, &[0x90, 0x74, 1], Some(1));
        at(&mut code, &[0xf4], None);
        // mov ecx,3; loop itself: taken twice.
        at(&mut code, &[0xb9, 3, 0, 0, 0], None);
        at(&mut code, &[0xe2, 0xfe], Some(-2));
        ends.push(ends[ends.len() - 1]);
        let mut at = |code: &mut Vec<u8>, bytes: &[u8], ends_at: Option<i64>| {
            code.extend(bytes);
            if let Some(relative) = ends_at {
                ends.push(CODE.wrapping_add(code.len() as u64).wrapping_add_signed(relative));
            }
        };
        // jrcxz +1, over a HLT; inc ecx; jrcxz (not taken); jmp +1; hlt
        at(&mut code, &[0xe3, 1], Some(1));
        at(&mut code, &[0xf4, 0xff, 0xc1, 0xe3, 1], None);
        at(&mut code, &[0xeb, 1], Some(1));
        // hlt; call +0; lea rax,[rip+3]; push rax; ret, to behind itself.
        at(&mut code, &[0xf4], None);
        at(&mut code, &[0xe8, 0, 0, 0, 0], Some(0));
        at(&mut code, &[0x48, 0x8d, 0x05, 2, 0, 0, 0, 0x50], None);
        at(&mut code, &[0xc3], Some(0));
        // rep stosb is none, nor is an interrupt's delivery, whose IRETQ sets TF behind itself: int 0x31; nop.
        at(&mut code, &[0xb9, 2, 0, 0, 0, 0xbf, 0, 2, 0x10, 0, 0xf3, 0xaa, 0xcd, 0x31, 0x90], None);
        // pushfq; and dword [rsp],~0x100; popfq: POPFQ is none either, so nothing more ends. hlt
        at(&mut code, &[0x9c, 0x81, 0x24, 0x24, 0xff, 0xfe, 0xff, 0xff, 0x9d, 0xf4], None);
        g.put(CODE, &code);
        g.put(0xa000 + 16 * 0x31, &[0x48, 0xcf]);
        g.change(|s| {
            for m in s.msrs.iter_mut().filter(|m| m.index == mimus_arch::x86::msr::DEBUGCTL) {
                m.value = 2;
            }
        });
        let s = g.run();
        assert_eq!(s.rip, CODE + code.len() as u64);
        let count = g.u64_at(COUNTER);
        let found: Vec<u64> = (1..=count).map(|i| g.u64_at(COUNTER + 8 * i)).collect();
        assert_eq!(found, ends, "{:x?}", (found.clone(), ends.clone()));
        assert_eq!(g.u64_at(DATA + 0xf0) as u32, 0, "BTF is clear in the handler");
        assert_eq!(s.msr(mimus_arch::x86::msr::DEBUGCTL), Some(2));
    });
}

/// A step of a gather that faults when it has loaded an element is told before the fault, with RF; a breakpoint that an
/// element has hit is, too (SDM volume 2 "VPGATHERDD").
#[test]
fn gathers_that_fault_half_way() {
    if !cpuid::supported().has_name("avx2") {
        println!("SKIPPED (gathers_that_fault_half_way): the host has no AVX2");
        return;
    }
    let index = |s: &mut X86State, indices: [u32; 4]| {
        for (i, index) in indices.into_iter().enumerate() {
            s.xsave[176 + 4 * i..180 + 4 * i].copy_from_slice(&index.to_le_bytes());
            s.xsave[192 + 4 * i..196 + 4 * i].copy_from_slice(&0x8000_0000u32.to_le_bytes());
        }
    };
    for (steps, watches, branches) in
        [(true, false, false), (false, true, false), (false, false, false), (true, false, true)]
    {
        both(|mut g| {
            g.long();
            // The second element is beyond what the tables map.
            let beyond = (0x4000_0000 - DATA as u32) / 4;
            g.put(CODE, &[0xc4, 0xe2, 0x69, 0x90, 0x04, 0x8d, 0, 0, 0x10, 0, 0xf4]);
            g.put(DATA + 16, &[0x11, 0x22, 0x33, 0x44]);
            // The handler of #DB goes on.
            let handler =
                [0xff, 0x04, 0x25, 0, 1, 0x10, 0, 0x48, 0x8b, 0x44, 0x24, 16, 0x48, 0x8b, 0x1c, 0x24, 0x48, 0xcf];
            g.put(HANDLER - 0x1000, &handler);
            g.put(HANDLER, &[0xe9, 0xfb, 0xef, 0xff, 0xff]);
            g.change(|s| {
                index(s, [4, beyond, 4, 4]);
                s.rflags |= if steps { RFLAGS_TF } else { 0 };
                s.dr[0] = if watches { DATA + 16 } else { DATA + 0x40 };
                s.dr[1] = CODE;
                s.dr7 = 0x400 | if watches { 0xf_0001 } else { 0 };
                for m in s.msrs.iter_mut().filter(|m| m.index == mimus_arch::x86::msr::DEBUGCTL) {
                    m.value = if branches { 2 } else { 0 };
                }
            });
            let s = g.run();
            // The page fault at last.
            assert_eq!((s.rip, s.cr2, g.u64_at(s.gpr[RSP] + 8)), (0xa0e1, 0x4000_0000, CODE));
            let told = steps && !branches || watches;
            assert_eq!(u32_at(&g, COUNTER), u64::from(told));
            if told {
                assert_eq!((s.gpr[RBX], s.gpr[RAX] & RFLAGS_RF), (CODE, RFLAGS_RF));
                assert_eq!(s.dr6 & 0x400f, if watches { 1 } else { 0x4000 });
            }
            // The first element has been loaded, and is wanted no more.
            assert_eq!(s.xsave[160..164], [0x11, 0x22, 0x33, 0x44]);
            assert_eq!((s.xsave[195], s.xsave[199]), (0, 0x80));
        });
    }
}
