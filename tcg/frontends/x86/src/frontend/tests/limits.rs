//! Where code may be: the code segment's limit and canonical addresses, at the exact state; virtual interrupt flags; what
//! the makers do differently.

use super::*;
use mimus_arch::x86::Vendor;

/// Handlers are here, 16 bytes each, and halt.
const HANDLERS: u64 = 0xa000;

/// The vector whose handler halted, and the stack it was given, as `bytes`-byte words.
fn halted_in(g: &Guest, s: &X86State, bytes: u64) -> (u64, Vec<u64>) {
    let at = |i: u64| g.u64_at(s.gpr[RSP] + bytes * i) & if bytes == 4 { 0xffff_ffff } else { !0 };
    ((s.rip - 1 - HANDLERS) / 16, (0..6).map(at).collect())
}

#[test]
fn code_beyond_the_limit_faults_at_the_instruction_that_crosses() {
    // nop; nop; nop; mov eax, 1; hlt
    let code = [0x90, 0x90, 0x90, 0xb8, 1, 0, 0, 0, 0xf4];
    for limit in [3, 6, 7, 8] {
        both(|mut g| {
            g.protected();
            g.put(CODE, &code);
            g.change(|s| {
                s.gpr[RAX] = 7;
                s.cs.base = CODE;
                s.cs.limit = limit;
                s.rip = 0;
            });
            let s = g.run();
            let (eax, at) = match limit {
                3 | 6 => (7, 3),
                7 => (1, 8),
                _ => {
                    assert_eq!((s.rip, s.gpr[RAX]), (9, 1));
                    return;
                }
            };
            let (vector, stack) = halted_in(&g, &s, 4);
            assert_eq!((vector, stack[0], stack[1], s.gpr[RAX]), (13, 0, at, eax), "limit {limit}");
        });
    }
}

#[test]
fn near_branches_beyond_the_limit_change_nothing() {
    // Each at offset 3, to offset 0x100, with the limit at 0xff; EBX is 0x100, and on the stack.
    let branches: [&[u8]; 7] = [
        &[0xe9, 0xf8, 0, 0, 0],
        &[0xff, 0xe3],
        &[0xff, 0xd3],
        &[0xc3],
        &[0xe8, 0xf8, 0, 0, 0],
        // jz, taken; loop, taken.
        &[0x0f, 0x84, 0xf7, 0, 0, 0],
        &[0xe2, 0x7b],
    ];
    for (i, branch) in branches.into_iter().enumerate() {
        both(|mut g| {
            g.protected();
            // push ebx; xor eax, eax
            let mut code = vec![0x53, 0x31, 0xc0];
            code.extend(branch);
            g.put(CODE, &code);
            let reach = if i == 6 { 0x7f } else { 0xff };
            g.change(|s| {
                s.gpr[RBX] = 0x100;
                s.gpr[RCX] = 5;
                s.cs.base = CODE;
                s.cs.limit = reach;
                s.rip = 0;
            });
            let s = g.run();
            let (vector, stack) = halted_in(&g, &s, 4);
            assert_eq!((vector, stack[0], stack[1], s.gpr[RCX]), (13, 0, 3, 5), "branch {i}");
            // The frame is right below what was pushed.
            assert_eq!((s.gpr[RSP] + 16, stack[4]), (STACK - 4, 0x100), "branch {i}");
        });
    }
}

#[test]
fn a_branch_not_taken_may_lead_anywhere() {
    both(|mut g| {
        g.protected();
        // xor eax, eax; jnz beyond; mov ecx, 1; loop beyond; hlt
        g.put(CODE, &[0x31, 0xc0, 0x0f, 0x85, 0, 0x10, 0, 0, 0xb9, 1, 0, 0, 0, 0xe2, 0x60, 0xf4]);
        g.change(|s| {
            s.cs.base = CODE;
            s.cs.limit = 0x1f;
            s.rip = 0;
        });
        let s = g.run();
        assert_eq!((s.rip, s.gpr[RCX]), (0x10, 0));
    });
}

#[test]
fn near_branches_to_addresses_that_are_not_canonical_change_nothing() {
    const BAD: u64 = 0x8000_1234_5678_9000;
    for (i, branch) in [&[0xff, 0xe0][..], &[0xff, 0xd0], &[0xc3], &[0xc2, 8, 0]].into_iter().enumerate() {
        both(|mut g| {
            g.long();
            g.put_u64(STACK - 16, 0x1111);
            // push rax; nop
            let mut code = vec![0x50, 0x90];
            code.extend(branch);
            g.put(CODE, &code);
            g.change(|s| s.gpr[RAX] = BAD);
            let s = g.run();
            let (vector, stack) = halted_in(&g, &s, 8);
            // Error code, RIP, CS, RFLAGS, RSP.
            assert_eq!((vector, stack[0], stack[1], stack[4]), (13, 0, CODE + 2, STACK - 8), "branch {i}");
            assert_eq!((g.u64_at(STACK - 8), g.u64_at(STACK - 16)), (BAD, 0x1111), "branch {i}");
        });
    }
}

/// A call's return address has to have a place before it matters where the call leads.
#[test]
fn calls_push_before_they_look_where_they_lead() {
    const BAD: u64 = 0x8000_1234_5678_9000;
    const MISSING: u64 = 0x4000_0000;
    // The stack pointer, and the exception: #PF of the write, #SS, #GP.
    for (sp, vector) in [(MISSING + 8, 14), (BAD, 12), (STACK, 13)] {
        both(|mut g| {
            g.long();
            // call rax, on a stack of another page table entry's; exceptions have one of their own.
            g.put(CODE, &[0xff, 0xd0]);
            g.put_u64(TSS + 0x24, 0x7000);
            for v in 12..15 {
                g.put(IDT + 16 * v + 4, &[1]);
            }
            g.change(|s| (s.gpr[RAX], s.gpr[RSP]) = (BAD, sp));
            let s = g.run();
            let (found, stack) = halted_in(&g, &s, 8);
            assert_eq!((found, stack[1], stack[4]), (vector, CODE, sp), "{sp:#x}");
            if vector == 14 {
                assert_eq!((stack[0], s.cr2), (2, MISSING));
            }
        });
    }
    // Beyond the code segment's limit, likewise: call +0x100, by a user with a stack segment of 4 KiB.
    for (sp, vector) in [(0x3000, 12), (0x800, 13)] {
        both(|mut g| {
            user(&mut g, &[0xe8, 0xfb, 0, 0, 0]);
            g.change(|s| {
                (s.cs.base, s.cs.limit, s.rip) = (CODE, 0xff, 0);
                (s.ss.limit, s.gpr[RSP]) = (0xfff, sp);
            });
            let s = g.run();
            let (found, stack) = halted_in(&g, &s, 4);
            // Error code, EIP, CS, EFLAGS, ESP.
            assert_eq!((found, stack[0], stack[1], stack[4]), (vector, 0, 0, sp), "{sp:#x}");
        });
    }
}

/// The last thing that ENTER does is to see whether the new top of the stack could be written (volume 2, ENTER).
#[test]
fn enter_faults_as_a_write_to_the_new_top() {
    both(|mut g| {
        g.long();
        // enter 0x1000, 0; the page below the stack's is the last one that is mapped
        g.put(CODE, &[0xc8, 0, 0x10, 0, 0]);
        g.put_u64(TABLES + 0x1000 + 8, (TABLES + 0x2000) | 7);
        g.put_u64(TABLES + 0x2000 + 8, (TABLES + 0x3000) | 7);
        g.put_u64(TABLES + 0x3000 + 8, DATA | 7);
        g.put_u64(TSS + 0x24, 0x7000);
        g.put(IDT + 16 * 14 + 4, &[1]);
        g.change(|s| (s.gpr[RSP], s.gpr[RBP]) = (0x4020_1010, 0x77));
        let s = g.run();
        let (vector, stack) = halted_in(&g, &s, 8);
        assert_eq!((vector, stack[0], stack[1], s.cr2), (14, 2, CODE, 0x4020_0008));
        assert_eq!((stack[4], s.gpr[RBP]), (0x4020_1010, 0x77));
    });
}

#[test]
fn operand_size_prefixes_of_near_branches_are_amds() {
    for vendor in [Vendor::Amd, Vendor::Intel] {
        let CpuModel::X86(mut model) = CpuModel::parse(GuestArch::X86_64, "max").unwrap() else { panic!("not x86") };
        model.vendor = vendor;
        let state = State::new(&model.restricted_to(cpuid::supported()).unwrap(), 0);
        let features = &state.features;
        // jmp with a 16-bit displacement, or a 32-bit one; lss with REX.W
        let jump = crate::decode::decode(&[0x66, 0xe9, 0, 0, 0, 0], 64, 0, features);
        let lss = crate::decode::decode(&[0x48, 0x0f, 0xb2, 0x01], 64, 0, features);
        // With REX.W it is a 64-bit one in any case, as linkers write calls for thread-local storage.
        let call = crate::decode::decode(&[0x66, 0x48, 0xe8, 0, 0, 0, 0], 64, 0, features);
        let amd = vendor == Vendor::Amd;
        assert_eq!((jump.len(), lss.memory_size().size()), if amd { (4, 6) } else { (6, 10) });
        assert_eq!((call.len(), call.stack_pointer_increment()), (7, -8));
    }
}

/// A virtual-8086 task at [`CODE`] whose interrupt flag is virtual; all vectors but 0x21 are its own.
fn virtual_8086(g: &mut Guest, flags: u64, code: &[u8]) {
    g.protected();
    g.put(CODE, code);
    // The redirection bitmap, then the I/O map.
    g.put(TSS + 0x66, &[0x88, 0]);
    g.put(TSS + 0x68, &[0; 32]);
    g.put(TSS + 0x68 + 0x21 / 8, &[1 << (0x21 % 8)]);
    g.put(TSS + 0x88, &[0xff; 2]);
    // Handlers of the program: vector 0x20 at 0:0x600.
    g.put(0x80, &[0, 6, 0, 0]);
    g.change(|s| {
        s.cr4 |= CR4_VME | CR4_PVI;
        s.tr.limit = 0x89;
        s.rflags = RFLAGS_FIXED | RFLAGS_VM | RFLAGS_IF | flags;
        let segment = |selector: u16| Segment::real(selector, attr::DATA | 3 << attr::DPL_SHIFT);
        s.cs = segment((CODE >> 4) as u16);
        s.ss = segment(0);
        (s.ds, s.es, s.fs, s.gs) = (s.ss, s.ss, s.ss, s.ss);
        s.rip = 0;
        s.gpr[RSP] = 0x800;
    });
}

#[test]
fn virtual_interrupt_flags_of_virtual_8086_programs() {
    both(|mut g| {
        // sti; pushf; cli; pushf; popf; int 0x21 (the system's)
        virtual_8086(&mut g, 0, &[0xfb, 0x9c, 0xfa, 0x9c, 0x9d, 0xcd, 0x21]);
        let s = g.run();
        let (vector, stack) = halted_in(&g, &s, 4);
        // IOPL is below 3: the protected handler is #GP's, with INT as the instruction.
        assert_eq!((vector, stack[0], stack[1]), (13, 0, 5));
        let pushed = g.u64_at(0x7fe) & 0xffff;
        assert_eq!(pushed & (RFLAGS_IF | RFLAGS_IOPL), RFLAGS_IF | RFLAGS_IOPL, "VIF in IF's place, IOPL 3");
        assert_eq!(g.u64_at(0x7fc) & RFLAGS_IF, 0);
        assert_eq!(stack[3] & (RFLAGS_IF | RFLAGS_VIF | RFLAGS_IOPL), RFLAGS_IF, "the real flag is untouched");
    });
}

#[test]
fn interrupts_of_virtual_8086_programs_go_where_the_bitmap_says() {
    both(|mut g| {
        // sti; int 0x20; int 0x21
        virtual_8086(&mut g, 0, &[0xfb, 0xcd, 0x20, 0xcd, 0x21]);
        // pushf; pop ax; iret
        g.put(0x600, &[0x9c, 0x58, 0xcf]);
        let s = g.run();
        let (vector, stack) = halted_in(&g, &s, 4);
        assert_eq!((vector, stack[1]), (13, 3), "back from the program's handler, then the system's");
        assert_eq!(s.gpr[RAX] & RFLAGS_IF, 0, "closed in the handler");
        assert_ne!(stack[3] & RFLAGS_VIF, 0, "and open again");
        assert_eq!(g.u64_at(0x7fa) & 0xffff, 3, "the frame that it had: the return address");
    });
}

#[test]
fn waiting_virtual_interrupts_fault() {
    // With VIP: sti; and popf and iret of an image with IF.
    let programs: [&[u8]; 3] =
        [&[0x90, 0xfb], &[0x6a, 0, 0x58, 0x68, 0, 2, 0x9d], &[0x68, 0, 2, 0x6a, 0, 0x6a, 0, 0xcf]];
    for (i, at) in [1, 6, 7].into_iter().enumerate() {
        both(|mut g| {
            virtual_8086(&mut g, RFLAGS_VIP, programs[i]);
            let s = g.run();
            let (vector, stack) = halted_in(&g, &s, 4);
            assert_eq!((vector, stack[0], stack[1]), (13, 0, at), "program {i}");
        });
    }
}

#[test]
fn single_steps_and_wide_flags_are_not_for_them() {
    // popf with TF; pushfd; popfd
    let programs: [&[u8]; 3] = [&[0x68, 0, 1, 0x9d], &[0x66, 0x9c], &[0x66, 0x9d]];
    for (i, at) in [3, 0, 0].into_iter().enumerate() {
        both(|mut g| {
            virtual_8086(&mut g, 0, programs[i]);
            let s = g.run();
            let (vector, stack) = halted_in(&g, &s, 4);
            assert_eq!((vector, stack[1]), (13, at), "program {i}");
        });
    }
}

#[test]
fn protected_mode_virtual_interrupts() {
    for (pvi, vip, expected) in [(true, false, (6, 3)), (true, true, (13, 1)), (false, false, (13, 0))] {
        both(|mut g| {
            g.protected();
            // cli; sti; nop; ud2
            g.put(CODE, &[0xfa, 0xfb, 0x90, 0x0f, 0x0b]);
            g.put_u64(TSS + 8, 0x10);
            g.change(|s| {
                s.cr4 |= if pvi { CR4_PVI } else { 0 };
                s.rflags |= RFLAGS_IF | if vip { RFLAGS_VIP } else { 0 };
                s.cs = Segment::flat(0x3b, attr::CODE | attr::DB | 3 << attr::DPL_SHIFT);
                s.ss = Segment::flat(0x33, attr::DATA | attr::DB | 3 << attr::DPL_SHIFT);
                (s.ds, s.es) = (s.ss, s.ss);
            });
            let s = g.run();
            let (vector, stack) = halted_in(&g, &s, 4);
            let frame = usize::from(vector == 13);
            assert_eq!((vector, stack[frame] - CODE), expected);
            if vector == 6 {
                assert_eq!(stack[2] & (RFLAGS_IF | RFLAGS_VIF), RFLAGS_IF | RFLAGS_VIF);
            }
        });
    }
}

#[test]
fn protection_key_rights() {
    both(|mut g| {
        g.long();
        // mov ecx, 0; mov edx, 0; mov eax, 0x55555554; wrpkru; mov eax, 0; rdpkru; hlt
        let mut code = vec![0xb9, 0, 0, 0, 0, 0xba, 0, 0, 0, 0, 0xb8, 0x54, 0x55, 0x55, 0x55, 0x0f, 0x01, 0xef];
        code.extend([0xb8, 0, 0, 0, 0, 0x0f, 0x01, 0xee, 0xf4]);
        g.put(CODE, &code);
        g.change(|s| s.cr4 |= CR4_PKE);
        let s = g.run();
        assert_eq!(s.gpr[RAX], 0x5555_5554);
        // It is part of the exchanged state.
        assert_eq!(s.xsave[2688..2692], 0x5555_5554u32.to_le_bytes());
        g.set(s);
        assert_eq!(g.state().xsave[2688..2692], 0x5555_5554u32.to_le_bytes());
    });
}

#[test]
fn protection_keys_that_are_off_are_no_instructions() {
    both(|mut g| {
        g.long();
        g.put(CODE, &[0x31, 0xc9, 0x0f, 0x01, 0xee]);
        let s = g.run();
        assert_eq!(halted_in(&g, &s, 8).0, 6);
        g.long();
        // ECX must be 0.
        g.change(|s| {
            s.cr4 |= CR4_PKE;
            s.gpr[RCX] = 1;
            s.rip = CODE + 2;
            s.mp_state = MpState::Running;
        });
        let s = g.run();
        assert_eq!(halted_in(&g, &s, 8).0, 13);
    });
}

/// XSAVES and XRSTORS: the compacted form, at privilege level 0.
#[test]
fn supervisor_images() {
    both(|mut g| {
        g.long();
        let image = DATA + 0x1000;
        // mov eax, 0x206; xor edx, edx; xsaves [image]; xrstors [image]; hlt
        let mut code = vec![0xb8, 6, 2, 0, 0, 0x31, 0xd2, 0x0f, 0xc7, 0x2c, 0x25];
        code.extend((image as u32).to_le_bytes());
        code.extend([0x0f, 0xc7, 0x1c, 0x25]);
        code.extend((image as u32).to_le_bytes());
        code.push(0xf4);
        g.put(CODE, &code);
        g.change(|s| {
            s.cr4 |= CR4_PKE;
            s.xcr0 = 0x207;
            s.xsave.resize(2696, 0);
            s.xsave[XSAVE_XSTATE_BV..XSAVE_XSTATE_BV + 8].copy_from_slice(&0x203u64.to_le_bytes());
            s.xsave[160] = 0x77;
            s.xsave[2688] = 0x40;
        });
        let s = g.run();
        assert_eq!(s.rip, CODE + code.len() as u64);
        assert_eq!(g.u64_at(image + 512), 0x202, "AVX is in its initial state");
        assert_eq!(g.u64_at(image + 520), 1 << 63 | 0x206, "compacted");
        assert_eq!(g.u64_at(image + 832) & 0xffff_ffff, 0x40, "behind AVX");
        assert_eq!((s.xsave[160], s.xsave[2688]), (0x77, 0x40));
        // An image in standard form is none of XRSTORS'.
        g.put_u64(image + 520, 0);
        g.change(|s| {
            s.rip = CODE + 15;
            s.mp_state = MpState::Running;
        });
        let s = g.run();
        assert_eq!(halted_in(&g, &s, 8).0, 13);
    });
}

/// A 32-bit program of a user's.
fn user(g: &mut Guest, code: &[u8]) {
    g.protected();
    g.put(CODE, code);
    g.change(|s| {
        s.cs = Segment::flat(0x3b, attr::CODE | attr::DB | 3 << attr::DPL_SHIFT);
        s.ss = Segment::flat(0x33, attr::DATA | attr::DB | 3 << attr::DPL_SHIFT);
        (s.ds, s.es) = (s.ss, s.ss);
    });
}

/// SDM volume 3 section 2.5, UMIP: user programs do not see the tables.
#[test]
fn user_mode_instruction_prevention() {
    let eax = |reg: u8| 0xc0 | reg << 3;
    let at_data = |opcode: u8, reg: u8| [&[0x0f, opcode, 0x05 | reg << 3][..], &(DATA as u32).to_le_bytes()].concat();
    // sgdt, sidt, sldt, str, smsw
    let programs = [
        at_data(1, 0),
        at_data(1, 1),
        vec![0x0f, 0, eax(0)],
        vec![0x0f, 0, eax(1)],
        vec![0x0f, 1, eax(4)],
        at_data(1, 4),
    ];
    for code in programs {
        for umip in [false, true] {
            both(|mut g| {
                // Behind it, ud2.
                user(&mut g, &[&code[..], &[0x0f, 0x0b]].concat());
                g.change(|s| s.cr4 |= if umip { CR4_UMIP } else { 0 });
                let s = g.run();
                let (vector, stack) = halted_in(&g, &s, 4);
                if umip {
                    assert_eq!((vector, stack[0], stack[1]), (13, 0, CODE), "{code:x?}");
                } else {
                    assert_eq!((vector, stack[0]), (6, CODE + code.len() as u64), "{code:x?}");
                }
            });
        }
    }
}

/// SDM volume 3 section 7.15, interrupt 17: of users, with CR0.AM and EFLAGS.AC.
#[test]
fn alignment_checks() {
    // mov eax, [DATA + 1]; push with an odd stack pointer; movzx of a word; fld of a double at 4 bytes; ud2
    let at = |offset: u32| (DATA as u32 + offset).to_le_bytes();
    let programs: [(Vec<u8>, bool); 5] = [
        ([&[0xa1][..], &at(1)].concat(), true),
        ([&[0xa1][..], &at(4)].concat(), false),
        (vec![0x6a, 0], true),
        ([&[0x0f, 0xb7, 0x05][..], &at(3)].concat(), true),
        ([&[0xdd, 0x05][..], &at(4)].concat(), true),
    ];
    for (code, faults) in programs {
        for on in [true, false] {
            both(|mut g| {
                user(&mut g, &[&code[..], &[0x0f, 0x0b]].concat());
                g.change(|s| {
                    s.rflags |= RFLAGS_AC;
                    s.cr0 |= if on { CR0_AM } else { 0 };
                    s.gpr[RSP] -= 2;
                });
                let s = g.run();
                let (vector, stack) = halted_in(&g, &s, 4);
                if faults && on {
                    assert_eq!((vector, stack[0], stack[1]), (17, 0, CODE), "{code:x?}");
                } else {
                    assert_eq!((vector, stack[0]), (6, CODE + code.len() as u64), "{code:x?}");
                }
            });
        }
    }
}
