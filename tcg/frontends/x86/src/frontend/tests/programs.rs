//! Programs in real, protected and 64-bit mode.

use super::*;

#[test]
fn real_mode_arithmetic_and_calls() {
    both(|mut g| {
        g.real();
        // mov ax,0x1234; mov bl,5; mul bl; push ax; call +1; hlt; pop bx (the return address); pop cx; hlt
        let code = [0xb8, 0x34, 0x12, 0xb3, 0x05, 0xf6, 0xe3, 0x50, 0xe8, 0x01, 0x00, 0xf4, 0x5b, 0x59, 0xf4];
        g.put(CODE, &code);
        let s = g.run();
        assert_eq!((s.gpr[RAX] & 0xffff, s.gpr[RBX] & 0xffff, s.gpr[RCX] & 0xffff), (0x104, 11, 0x104));
        assert_eq!((s.rip, s.gpr[RSP]), (15, 0x8000));
    });
}

#[test]
fn real_mode_interrupt_and_string() {
    both(|mut g| {
        g.real();
        // int 0x21 -> handler at 0:0x600 that stores "AB" by rep stosb and returns.
        g.put(0x84, &[0x00, 0x06, 0x00, 0x00]);
        // mov di,0x700; mov cx,5; mov al,'x'; cld; rep stosb; iret
        g.put(0x600, &[0xbf, 0x00, 0x07, 0xb9, 0x05, 0x00, 0xb0, b'x', 0xfc, 0xf3, 0xaa, 0xcf]);
        // int 0x21; mov si,0x700; lodsw; hlt
        g.put(CODE, &[0xcd, 0x21, 0xbe, 0x00, 0x07, 0xad, 0xf4]);
        let s = g.run();
        assert_eq!((s.gpr[RDI], s.gpr[RCX], s.gpr[RAX] & 0xffff), (0x705, 0, 0x7878));
    });
}

#[test]
fn real_mode_jumps_wrap_at_64k() {
    both(|mut g| {
        g.change(|s| {
            s.cs = Segment::real(0x1000, attr::CODE);
            s.rip = 0xfffc;
        });
        // jmp short +0x10 at 0xfffe would be beyond 64 KiB: it goes to 0x000e.
        g.put(0x1_fffc, &[0x90, 0x90, 0xeb, 0x0e]);
        g.put(0x1_000e, &[0xf4]);
        assert_eq!(g.run().rip, 0xf);
    });
}

#[test]
fn eight_bytes_are_compared_and_exchanged_in_32_bit_code() {
    for (stored, flags) in [(0x1122_3344_5566_7788u64, 0x8d7), (0x1122_3344_5566_7789, 0x897)] {
        both(|mut g| {
            g.tables();
            g.protected();
            g.change(|s| {
                (s.gpr[RDX], s.gpr[RAX]) = (0x1122_3344, 0x5566_7788);
                (s.gpr[RCX], s.gpr[RBX]) = (0x99aa_bbcc, 0xddee_ff00);
                (s.gpr[RSI], s.gpr[RSP]) = (DATA, 0x8_0000);
            });
            g.put_u64(DATA + 4, stored);
            // push 0x8d7 (or without ZF, which is replaced); popfd; lock cmpxchg8b [esi+4]; pushfd; pop edi; hlt
            let mut code = vec![0x68, 0xd7 ^ (flags as u8 & 0x40), 0x08, 0x00, 0x00, 0x9d];
            code.extend([0xf0, 0x0f, 0xc7, 0x4e, 0x04, 0x9c, 0x5f, 0xf4]);
            g.put(CODE, &code);
            let s = g.run();
            let same = stored == 0x1122_3344_5566_7788;
            let expected = if same { 0x99aa_bbcc_ddee_ff00 } else { stored };
            assert_eq!(g.u64_at(DATA + 4), expected);
            assert_eq!((s.gpr[RDX], s.gpr[RAX]), (0x1122_3344, stored & 0xffff_ffff));
            assert_eq!((s.gpr[RCX], s.gpr[RBX]), (0x99aa_bbcc, 0xddee_ff00));
            assert_eq!(s.gpr[RDI] & 0x8d5, flags & 0x8d5);
        });
    }
}

#[test]
fn to_protected_mode_and_back() {
    both(|mut g| {
        g.tables();
        g.real();
        g.put(0x500, &[0x4f, 0x00, 0x00, 0x40, 0x00, 0x00]);
        // lgdt [0x500]; mov eax,cr0; or al,1; mov cr0,eax; jmp 8:0x10100
        let mut code = vec![0x0f, 0x01, 0x16, 0x00, 0x05, 0x0f, 0x20, 0xc0, 0x0c, 0x01, 0x0f, 0x22, 0xc0];
        code.extend([0x66, 0xea, 0x00, 0x01, 0x01, 0x00, 0x08, 0x00]);
        g.put(CODE, &code);
        // mov ax,0x10; mov ds,ax; mov ss,ax; mov esp,0x80000; mov dword [0x100000],0xdeadbeef; push 0x55; pop ebx; hlt
        let code = [
            0x66, 0xb8, 0x10, 0x00, 0x8e, 0xd8, 0x8e, 0xd0, 0xbc, 0x00, 0x00, 0x08, 0x00, 0xc7, 0x05, 0x00, 0x00, 0x10,
            0x00, 0xef, 0xbe, 0xad, 0xde, 0x6a, 0x55, 0x5b, 0xf4,
        ];
        g.put(CODE + 0x100, &code);
        let s = g.run();
        assert_eq!((s.cs.selector, s.ss.selector, s.gpr[RBX], s.gpr[RSP]), (8, 0x10, 0x55, 0x80000));
        assert_eq!(g.u64_at(DATA) as u32, 0xdead_beef);
    });
}

#[test]
fn exceptions_are_precise() {
    both(|mut g| {
        g.long();
        // mov rax,1; mov rbx,[0x40000000]; (page fault)
        g.put(CODE, &[0x48, 0xc7, 0xc0, 1, 0, 0, 0, 0x48, 0x8b, 0x1c, 0x25, 0, 0, 0, 0x40]);
        let s = g.run();
        assert_eq!((s.rip, s.cr2, s.gpr[RAX]), (0xa0e1, 0x4000_0000, 1));
        let frame: Vec<u64> = (0..6).map(|i| g.u64_at(s.gpr[RSP] + 8 * i)).collect();
        assert_eq!(frame[..3], [0, CODE + 7, 0x18]);
        assert_eq!(frame[4], STACK);
        // push to an unmapped stack leaves rsp; division by zero; invalid opcode
        for (bytes, vector) in [
            (&[0x31u8, 0xc9, 0xf7, 0xf1][..], 0u64),
            (&[0x90, 0x90, 0x0f, 0x0b], 6),
            (&[0xb0, 0x01, 0xff, 0xff], 6),
            (&[0x31, 0xc0, 0x0f, 0x22, 0xe8], 6),
            (&[0x90, 0x48, 0x0f, 0x01, 0xf9, 0x0f, 0x0b], 6),
        ] {
            g.put(CODE, bytes);
            g.change(|s| (s.rip, s.gpr[RSP], s.mp_state) = (CODE, STACK, MpState::Running));
            let s = g.run();
            assert_eq!(s.rip, 0xa000 + 16 * vector + 1, "{bytes:x?}");
        }
    });
}

#[test]
fn user_mode_system_calls_and_back() {
    both(|mut g| {
        g.long();
        // The kernel: mov [DATA], rcx; sysretq
        g.put(0x3000, &[0x48, 0x89, 0x0c, 0x25, 0, 0, 0x10, 0, 0x48, 0x0f, 0x07]);
        // User: mov eax,7; syscall; mov ebx,9; int3
        g.put(CODE, &[0xb8, 7, 0, 0, 0, 0x0f, 0x05, 0xbb, 9, 0, 0, 0, 0xcc]);
        g.change(|s| {
            s.set_msr(mimus_arch::x86::msr::STAR, 0x18 << 32 | 0x18 << 48);
            s.set_msr(mimus_arch::x86::msr::LSTAR, 0x3000);
            s.set_msr(mimus_arch::x86::msr::FMASK, RFLAGS_IF);
            s.cs = Segment::flat(0x2b, attr::CODE | attr::L | 3 << attr::DPL_SHIFT);
            s.ss = Segment::flat(0x33, attr::DATA | 3 << attr::DPL_SHIFT);
        });
        let s = g.run();
        assert_eq!((s.cpl(), s.rip, s.gpr[RBX]), (0, 0xa031, 9));
        assert_eq!(g.u64_at(DATA), CODE + 7);
        assert_eq!((g.u64_at(s.gpr[RSP]), g.u64_at(s.gpr[RSP] + 8)), (CODE + 13, 0x2b));
    });
}

/// The default model is AMD's: 32-bit code enters at CSTAR, and comes back to 32-bit code.
#[test]
fn system_calls_from_compatibility_mode_and_back() {
    both(|mut g| {
        g.long();
        // The kernel: mov [DATA], rcx; mov [DATA+8], r11; sysret
        g.put(0x3000, &[0x48, 0x89, 0x0c, 0x25, 0, 0, 0x10, 0, 0x4c, 0x89, 0x1c, 0x25, 8, 0, 0x10, 0, 0x0f, 0x07]);
        // User: mov eax,7; syscall; inc ebx (0x43: a prefix in 64-bit code); int3
        g.put(CODE, &[0xb8, 7, 0, 0, 0, 0x0f, 0x05, 0x43, 0xcc]);
        g.change(|s| {
            s.set_msr(mimus_arch::x86::msr::STAR, 0x18 << 32 | 0x28 << 48);
            s.set_msr(mimus_arch::x86::msr::LSTAR, 0x4000);
            s.set_msr(mimus_arch::x86::msr::CSTAR, 0x3000);
            s.set_msr(mimus_arch::x86::msr::FMASK, RFLAGS_IF);
            s.cs = Segment::flat(0x2b, attr::CODE | attr::DB | 3 << attr::DPL_SHIFT);
            s.ss = Segment::flat(0x33, attr::DATA | attr::DB | 3 << attr::DPL_SHIFT);
            s.gpr[RBX] = 8;
        });
        let flags = g.state().rflags;
        let s = g.run();
        assert_eq!((s.cpl(), s.rip, s.gpr[RBX]), (0, 0xa031, 9));
        assert_eq!((g.u64_at(DATA), g.u64_at(DATA + 8)), (CODE + 7, flags));
        assert_eq!((g.u64_at(s.gpr[RSP]), g.u64_at(s.gpr[RSP] + 8)), (CODE + 9, 0x2b));
    });
}

#[test]
fn self_modifying_code() {
    both(|mut g| {
        g.long();
        // mov byte [rip+1], 0x42; mov al, 0x11; hlt : the store changes the immediate that follows.
        g.put(CODE, &[0xc6, 0x05, 1, 0, 0, 0, 0x42, 0xb0, 0x11, 0xf4]);
        assert_eq!(g.run().gpr[RAX] & 0xff, 0x42);
    });
}

#[test]
fn interrupts_and_halt() {
    both(|mut g| {
        g.long();
        // sti; hlt; mov ebx, 3; hlt — the handler at vector 0x30 returns.
        g.put(0xa300, &[0xb8, 5, 0, 0, 0, 0x48, 0xcf]);
        g.put(CODE, &[0xfb, 0xf4, 0xbb, 3, 0, 0, 0, 0xf4]);
        let s = g.run();
        assert_eq!((s.rip, s.mp_state), (CODE + 2, MpState::Halted));
        *g.io.vector.lock().unwrap() = Some(0x30);
        let handle = g.vcpu.handle();
        *g.io.handle.lock().unwrap() = Some(handle.clone());
        handle.set_pin(CpuPin::Intr, true);
        let s = g.run();
        assert_eq!((s.gpr[RAX], s.gpr[RBX]), (5, 3));
    });
}

#[test]
fn single_steps() {
    both(|mut g| {
        g.long();
        // The #DB handler counts in rcx: inc rcx; iretq. pushfq; or word [rsp],0x100; popfq; nop; nop; nop; hlt
        g.put(0xa010, &[0x48, 0xff, 0xc1, 0x48, 0xcf]);
        g.put(CODE, &[0x9c, 0x66, 0x81, 0x0c, 0x24, 0x00, 0x01, 0x9d, 0x90, 0x90, 0x90, 0xf4]);
        g.change(|s| s.gpr[RCX] = 0);
        let s = g.run();
        assert!((3..=4).contains(&s.gpr[RCX]), "{}", s.gpr[RCX]);
        assert_eq!(s.dr6 & 1 << 14, 1 << 14);
    });
}

#[test]
fn ports() {
    both(|mut g| {
        g.protected();
        // mov al,'h'; out 0xe9,al; mov dx,0x60; in al,dx; hlt
        g.put(CODE, &[0xb0, b'h', 0xe6, 0xe9, 0x66, 0xba, 0x60, 0, 0xec, 0xf4]);
        assert_eq!(g.run().gpr[RAX] & 0xff, 0x60);
        assert_eq!(*g.io.output.lock().unwrap(), b"h");
    });
}

#[test]
fn copies_of_pages() {
    both(|mut g| {
        g.long();
        let pattern: Vec<u8> = (0..12_000u32).map(|i| (i * 7) as u8).collect();
        g.put(DATA + 5, &pattern);
        // cld; rep movsb; hlt
        g.put(CODE, &[0xfc, 0xf3, 0xa4, 0xf4]);
        g.change(|s| (s.gpr[RSI], s.gpr[RDI], s.gpr[RCX]) = (DATA + 5, DATA + 0x8003, 12_000));
        let s = g.run();
        assert_eq!((s.gpr[RCX], s.gpr[RSI], s.gpr[RDI]), (0, DATA + 5 + 12_000, DATA + 0x8003 + 12_000));
        let mut copy = vec![0; 12_000];
        g.get(DATA + 0x8003, &mut copy);
        assert!(copy == pattern);
    });
}

#[test]
fn floating_point() {
    both(|mut g| {
        g.long();
        // fninit; fldpi; fldpi; faddp; fstp qword [DATA]; mov rax,[DATA]; movq xmm0,rax; addsd xmm0,xmm0; hlt
        g.put(
            CODE,
            &[
                0xdb, 0xe3, 0xd9, 0xeb, 0xd9, 0xeb, 0xde, 0xc1, 0xdd, 0x1c, 0x25, 0, 0, 0x10, 0, 0x48, 0x8b, 0x04,
                0x25, 0, 0, 0x10, 0, 0x66, 0x48, 0x0f, 0x6e, 0xc0, 0xf2, 0x0f, 0x58, 0xc0, 0xf4,
            ],
        );
        let s = g.run();
        assert_eq!(f64::from_bits(s.gpr[RAX]), 2.0 * std::f64::consts::PI);
        let xmm0 = u64::from_le_bytes(s.xsave[160..168].try_into().unwrap());
        assert_eq!(f64::from_bits(xmm0), 4.0 * std::f64::consts::PI);
    });
}

#[test]
fn unmasked_floating_point_exceptions() {
    both(|mut g| {
        g.long();
        // mov dword [DATA],0x1d80 (divide by zero unmasked); ldmxcsr; xorps xmm1,xmm1; divss xmm0,xmm1
        g.put(
            CODE,
            &[
                0xc7, 0x04, 0x25, 0, 0, 0x10, 0, 0x80, 0x1d, 0, 0, 0x0f, 0xae, 0x14, 0x25, 0, 0, 0x10, 0, 0x0f, 0x57,
                0xc9, 0xb8, 0, 0, 0x80, 0x3f, 0x66, 0x0f, 0x6e, 0xc0, 0xf3, 0x0f, 0x5e, 0xc1, 0xf4,
            ],
        );
        let s = g.run();
        assert_eq!(s.rip, 0xa131, "#XM");
        // The same of x87: fninit; fldcw [DATA] with ZM clear; fldz; fld1; fdivrp -> #MF at the next instruction
        g.put(DATA, &[0x7b, 0x03]);
        g.put(
            CODE,
            &[0xdb, 0xe3, 0xd9, 0x2c, 0x25, 0, 0, 0x10, 0, 0xd9, 0xe8, 0xd9, 0xee, 0xde, 0xf9, 0x90, 0x9b, 0xf4],
        );
        g.change(|s| (s.rip, s.gpr[RSP], s.mp_state) = (CODE, STACK, MpState::Running));
        let s = g.run();
        assert_eq!((s.rip, g.u64_at(s.gpr[RSP])), (0xa101, CODE + 16), "#MF at the WAIT");
    });
}

#[test]
fn triple_fault_ends_the_run() {
    both(|mut g| {
        g.long();
        g.put(CODE, &[0x0f, 0x0b]);
        g.change(|s| s.idtr.limit = 0);
        match g.vcpu.run(&g.io) {
            VcpuExit::Reset(ResetCause::TripleFault) => {}
            other => panic!("{other:?}"),
        }
    });
}

#[test]
fn instructions_over_a_page_border() {
    both(|mut g| {
        g.long();
        // mov eax, 0x12345678 at the last two bytes of a page, then hlt.
        g.put(CODE + 0xffe, &[0xb8, 0x78, 0x56, 0x34, 0x12, 0xf4]);
        g.change(|s| s.rip = CODE + 0xffe);
        assert_eq!(g.run().gpr[RAX], 0x1234_5678);
        // A hlt alone in the last byte.
        g.put(CODE + 0xfff, &[0xf4]);
        g.change(|s| (s.rip, s.mp_state) = (CODE + 0xfff, MpState::Running));
        assert_eq!(g.run().rip, CODE + 0x1000);
    });
}

#[test]
fn compatibility_mode() {
    both(|mut g| {
        g.long();
        // push 8; push 0x11000 ; retfq to 32-bit code, which does inc eax (0x40, a REX prefix in 64-bit mode)
        g.put(CODE, &[0x6a, 0x08, 0x68, 0x00, 0x10, 0x01, 0x00, 0x48, 0xcb]);
        g.put(0x1_1000, &[0x40, 0x40, 0xf4]);
        g.change(|s| s.gpr[RAX] = 0xffff_ffff_ffff_fffe);
        let s = g.run();
        assert_eq!((s.gpr[RAX], s.cs.selector), (0, 8));
    });
}

#[test]
fn jumps_to_an_interpreter_s_dispatcher_are_followed_until_it_changes() {
    // lea rsi, [table]; lea rbx, [script]; xor ecx, ecx; xor edx, edx
    let mut code = vec![0x48, 0x8d, 0x35, 0x21, 1, 0, 0, 0x48, 0x8d, 0x1d, 0x42, 1, 0, 0, 0x31, 0xc9, 0x31, 0xd2];
    // 0x12: movzx eax, byte [rbx]; inc rbx; cmp eax, 4; ja 0x23; add edx, 1; jmp [rsi+rax*8]; hlt
    code.extend([0x0f, 0xb6, 0x03, 0x48, 0xff, 0xc3, 0x83, 0xf8, 4, 0x77, 6, 0x83, 0xc2, 1, 0xff, 0x24, 0xc6, 0xf4]);
    code.resize(0x100, 0x90);
    // 0x100: add ecx, 3; jmp 0x12. 0x108: shl ecx, 1; jmp 0x12. 0x10f: mov byte [0x1f], 5 (in the addition); jmp 0x12
    code.extend([0x83, 0xc1, 3, 0xe9, 0x0a, 0xff, 0xff, 0xff, 0xd1, 0xe1, 0xe9, 0x03, 0xff, 0xff, 0xff]);
    code.extend([0xc6, 0x05, 0x09, 0xff, 0xff, 0xff, 5, 0xe9, 0xf7, 0xfe, 0xff, 0xff]);
    // 0x11b: neg ecx; cmp ecx, -100; jmp 0x12. 0x125: hlt
    code.extend([0xf7, 0xd9, 0x83, 0xf9, 0x9c, 0xe9, 0xed, 0xfe, 0xff, 0xff, 0xf4]);
    code.resize(0x128, 0x90);
    for at in [0x100, 0x108, 0x10f, 0x11b, 0x125u64] {
        code.extend((CODE + at).to_le_bytes());
    }
    code.extend([0, 1, 0, 3, 0, 2, 1, 0, 3, 9]);
    let check = |mut g: Guest| {
        g.long();
        for _ in 0..3 {
            g.put(CODE, &code);
            g.change(|s| (s.rip, s.mp_state) = (CODE, MpState::Running));
            let s = g.run();
            assert_eq!((s.rip, s.gpr[RCX], s.gpr[RDX]), (CODE + 0x24, 9, 21));
        }
    };
    both(check);
    let _one = ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner);
    check(Guest::optimised(false, mimus_tcg_ir::backend::Optimise::Forced));
    check(Guest::optimised(false, mimus_tcg_ir::backend::Optimise::Usual));
}

#[test]
fn the_last_page_is_not_found_where_another_with_its_low_bits_was() {
    both(|mut g| {
        g.long();
        // 0xffe0_0000 to 0xffff_ffff is memory from 2 MiB on, the last page of it without permission to write.
        g.put_u64(TABLES + 0x1018, (TABLES + 0x2000) | 7);
        g.put_u64(TABLES + 0x2ff8, (TABLES + 0x3000) | 7);
        g.put_u64(TABLES + 0x3ff8, DATA | 5);
        g.put_u64(DATA, 0x1234);
        // mov edx, 0xfffff000; mov eax, [rdx]
        let load = [0xba, 0x00, 0xf0, 0xff, 0xff, 0x8b, 0x02];
        // mov rcx, cr3; mov cr3, rcx
        let flush = [0x0f, 0x20, 0xd9, 0x0f, 0x22, 0xd9];
        // mov ebx, [-8]; mov dword [-8], ebx
        let (read, write) = ([0x8b, 0x1c, 0x25, 0xf8, 0xff, 0xff, 0xff], [0x89, 0x1c, 0x25, 0xf8, 0xff, 0xff, 0xff]);
        for (code, at, error) in [
            ([&load[..], &flush, &read].concat(), 13, 0),
            ([&load[..], &write].concat(), 7, 2),
            ([&read[..]].concat(), 0, 0),
        ] {
            g.put(CODE, &code);
            g.change(|s| (s.rip, s.gpr[RSP], s.mp_state) = (CODE, STACK, MpState::Running));
            let s = g.run();
            assert_eq!((s.rip, s.cr2), (0xa0e1, !7));
            assert_eq!((g.u64_at(s.gpr[RSP]), g.u64_at(s.gpr[RSP] + 8)), (error, CODE + at));
        }
    });
}

/// A page that has been gathered (`mimus_tcg_exec::gather`) has two addresses in the host, one for each of these mappings of it:
/// what overlaps there must still repeat what is in between.
#[test]
fn copies_within_a_page_by_two_of_its_addresses() {
    const HEAP: u64 = 1 << 30;
    const OTHER: u64 = HEAP + (2 << 20);
    const PAGES: u64 = 128;
    // 0x0: imul r8, r8, 0x19660d; add r8, 0x3c6ef35f; mov rax, r8; shr rax, 12; and eax, 0x7fff8; add rax, rbx
    let mut code =
        vec![0x4d, 0x69, 0xc0, 0x0d, 0x66, 0x19, 0, 0x49, 0x81, 0xc0, 0x5f, 0xf3, 0x6e, 0x3c, 0x4c, 0x89, 0xc0];
    code.extend([0x48, 0xc1, 0xe8, 12, 0x25, 0xf8, 0xff, 7, 0, 0x48, 0x01, 0xd8]);
    // add r9, [rax]; dec ebp; jne 0x0; mov ecx, r12d
    code.extend([0x4c, 0x03, 0x08, 0xff, 0xcd, 0x75, 0xdd, 0x44, 0x89, 0xe1]);
    // rep movsb; rep movsw; the same downwards: std; …; cld
    let copies: [&[u8]; 5] = [
        &[0xf3, 0xa4],
        &[0x66, 0xf3, 0xa5],
        &[0xfd, 0xf3, 0xa4, 0xfc],
        &[0xfd, 0xf3, 0x48, 0xa5, 0xfc],
        &[0xf3, 0x48, 0xa5],
    ];
    let run = |interpret: bool| {
        let mut g = Guest::optimised(interpret, mimus_tcg_ir::backend::Optimise::Forced);
        g.long();
        g.put_u64(TABLES + 0x1008, (TABLES + 0x2000) | 7);
        for (at, table) in [(TABLES + 0x2000, TABLES + 0x3000), (TABLES + 0x2008, TABLES + 0x4000)] {
            g.put_u64(at, table | 7);
            for page in 0..PAGES {
                g.put_u64(table + 8 * page, (DATA + page * 37 % PAGES * 0x1000) | 7);
            }
        }
        let bytes: Vec<u8> = (0..PAGES * 0x1000).map(|i| ((i * i) >> 7) as u8).collect();
        g.put(DATA, &bytes);
        let mut left = Vec::new();
        for (i, copy) in (0..).zip(copies) {
            g.put(CODE, &[&code[..], copy, &[0xf4]].concat());
            for step in [1, 2, 8, 24, 200] {
                let (page, at) = (HEAP + (7 * i + step) % PAGES * 0x1000, 0x600);
                let other = page - HEAP + OTHER;
                for (from, to) in
                    [(page + at, other + at + step), (other + at + step, page + at), (other + at, page + at + step)]
                {
                    g.change(|s| {
                        (s.rip, s.mp_state) = (CODE, MpState::Running);
                        (s.gpr[RBX], s.gpr[RBP], s.gpr[8], s.gpr[12]) = (HEAP, 5000, step, 100);
                        (s.gpr[RSI], s.gpr[RDI]) = (from, to);
                    });
                    left.push((g.run().gpr[9], g.u64_at(DATA)));
                }
            }
        }
        let mut after = vec![0; bytes.len()];
        g.get(DATA, &mut after);
        let gathered =
            g.machine.statistics().into_iter().find(|(name, _)| *name == "pages gathered").map(|found| found.1);
        (left, after, gathered)
    };
    let _one = ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner);
    let (expected, found) = (run(true), run(false));
    assert_eq!(expected.0, found.0);
    assert!(expected.1 == found.1, "what was copied");
    assert!(found.2 >= Some(PAGES - 2), "{:?} pages were gathered", found.2);
}
