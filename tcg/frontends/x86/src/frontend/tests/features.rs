//! What features change for privileged and user programs: SMAP and SMEP, FSGSBASE, RDTSCP and RDPID, INT1, RDRAND.

use mimus_arch::x86::msr;

use super::*;

/// A page of users' that supervisors see too; the rest is the supervisor's.
const LEAVES: u64 = TABLES + 0x1_0000;
const USERS: u64 = 0x4000_0000;

/// Where the handler of a vector has halted.
const fn handler(vector: u64) -> u64 {
    0xa001 + 16 * vector
}

fn split(g: &mut Guest) {
    g.long();
    g.put_u64(TABLES + 0x1000, 0x83);
    g.put_u64(TABLES + 0x1000 + 8, (LEAVES + 0x1000) | 7);
    g.put_u64(LEAVES + 0x1000, LEAVES | 7);
    g.put_u64(LEAVES, DATA | 7);
    g.put_u64(DATA, 0xf4f4_1111);
    g.change(|s| s.gpr[RSI] = USERS);
}

/// SDM volume 3 section 4.6: RFLAGS.AC lets the supervisor at users' data, in code that has run before too.
#[test]
fn stac_and_clac() {
    // mov edi,3; 1: stac; mov rbx,[rsi]; mov [rsi+8],rbx; clac; dec edi; jnz 1b; mov rcx,[rsi]; hlt
    let code = [
        0xbf, 3, 0, 0, 0, 0x0f, 0x01, 0xcb, 0x48, 0x8b, 0x1e, 0x48, 0x89, 0x5e, 8, 0x0f, 0x01, 0xca, 0xff, 0xcf, 0x75,
        0xef, 0x48, 0x8b, 0x0e, 0xf4,
    ];
    for smap in [true, false] {
        both(|mut g| {
            split(&mut g);
            g.put(CODE, &code);
            g.change(|s| s.cr4 |= if smap { CR4_SMAP } else { 0 });
            let s = g.run();
            assert_eq!((s.gpr[RBX], g.u64_at(DATA + 8)), (0xf4f4_1111, 0xf4f4_1111));
            if smap {
                let frame = s.gpr[RSP];
                assert_eq!((s.rip, s.cr2, g.u64_at(frame), g.u64_at(frame + 8)), (handler(14), USERS, 1, CODE + 22));
            } else {
                assert_eq!((s.rip, s.gpr[RCX]), (CODE + 26, 0xf4f4_1111));
            }
        });
    }
}

/// The same section, implicit supervisor accesses: what AC has let the kernel at is not for the frame of a user's exception.
#[test]
fn stacks_of_exceptions_are_no_users() {
    // stac; mov rbx,[rsi+0xff0]; mov [rsi+0xff0],rbx; clac; push 0x33; push rsi; push 2; push 0x2b; push rdi; iretq
    let code = [
        0x0f, 0x01, 0xcb, 0x48, 0x8b, 0x9e, 0xf0, 0x0f, 0, 0, 0x48, 0x89, 0x9e, 0xf0, 0x0f, 0, 0, 0x0f, 0x01, 0xca,
        0x6a, 0x33, 0x56, 0x6a, 2, 0x6a, 0x2b, 0x57, 0x48, 0xcf,
    ];
    for smap in [true, false] {
        both(|mut g| {
            split(&mut g);
            g.put(CODE, &code);
            // ud2, whose frame goes to the page before; a double fault's goes to a stack of its own (IST 1).
            g.put_u64(LEAVES + 8, (DATA + 0x1000) | 7);
            g.put(DATA + 0x1000, &[0x0f, 0x0b]);
            g.put_u64(TSS + 4, USERS + 0x1000);
            g.put_u64(TSS + 0x24, STACK - 0x1000);
            g.put(IDT + 16 * 8 + 4, &[1]);
            g.change(|s| {
                s.cr4 |= if smap { CR4_SMAP } else { 0 };
                s.gpr[RDI] = USERS + 0x1000;
            });
            let s = g.run();
            if smap {
                assert_eq!((s.rip, s.cr2, s.gpr[RSP]), (handler(8), USERS + 0xff8, STACK - 0x1000 - 48));
            } else {
                let frame = s.gpr[RSP];
                assert_eq!((s.rip, frame, g.u64_at(DATA + 0xfd8)), (handler(6), USERS + 0xfd8, USERS + 0x1000));
            }
        });
    }
}

/// The same section: the supervisor does not execute users' pages.
#[test]
fn supervisor_mode_execution_prevention() {
    for smep in [true, false] {
        both(|mut g| {
            split(&mut g);
            // add rsi,2; jmp rsi, to HLT.
            g.put(CODE, &[0x48, 0x83, 0xc6, 2, 0xff, 0xe6]);
            g.change(|s| s.cr4 |= if smep { CR4_SMEP } else { 0 });
            let s = g.run();
            if smep {
                assert_eq!((s.rip, s.cr2, g.u64_at(s.gpr[RSP])), (handler(14), USERS + 2, 0x11));
            } else {
                assert_eq!(s.rip, USERS + 3);
            }
        });
    }
}

/// SDM volume 3 section 2.5, FSGSBASE; volume 2 "WRFSBASE", "SWAPGS".
#[test]
fn bases_of_fs_and_gs() {
    both(|mut g| {
        g.long();
        g.put_u64(DATA, 0x77);
        // wrfsbase rax; mov rbx,fs:[0]; rdfsbase rcx; wrgsbase rdx; swapgs; rdgsbase rdi; wrfsbase ebp; rdfsbase r8; hlt
        g.put(
            CODE,
            &[
                0xf3, 0x48, 0x0f, 0xae, 0xd0, 0x64, 0x48, 0x8b, 0x1c, 0x25, 0, 0, 0, 0, 0xf3, 0x48, 0x0f, 0xae, 0xc1,
                0xf3, 0x48, 0x0f, 0xae, 0xda, 0x0f, 0x01, 0xf8, 0xf3, 0x48, 0x0f, 0xae, 0xcf, 0xf3, 0x0f, 0xae, 0xd5,
                0xf3, 0x49, 0x0f, 0xae, 0xc0, 0xf4,
            ],
        );
        g.change(|s| {
            s.cr4 |= CR4_FSGSBASE;
            s.set_msr(msr::KERNEL_GS_BASE, 0x1234);
            (s.gpr[RAX], s.gpr[RDX], s.gpr[RBP]) = (DATA, !0 << 47, 0x1_8000_0000);
        });
        let s = g.run();
        assert_eq!((s.rip, s.gpr[RBX], s.gpr[RCX], s.gpr[RDI]), (CODE + 42, 0x77, DATA, 0x1234));
        assert_eq!((s.gpr[R8], s.fs.base, s.msr(msr::KERNEL_GS_BASE)), (0x8000_0000, 0x8000_0000, Some(!0 << 47)));
    });
    // No address; not enabled.
    for (cr4, vector) in [(CR4_FSGSBASE, 13), (0, 6)] {
        both(|mut g| {
            g.long();
            g.put(CODE, &[0xf3, 0x48, 0x0f, 0xae, 0xda]);
            g.change(|s| {
                s.cr4 |= cr4;
                s.gpr[RDX] = 1 << 63;
            });
            assert_eq!(g.run().rip, handler(vector));
        });
    }
}

/// SDM volume 2 "RDTSCP", "RDPID"; volume 3 section 2.5, TSD.
#[test]
fn time_stamps_and_processor_numbers() {
    both(|mut g| {
        g.long();
        // rdtsc; mov ebx,eax; mov r8,rdx; rdtscp; mov edi,ecx; rdpid rcx; hlt
        g.put(
            CODE,
            &[0x0f, 0x31, 0x89, 0xc3, 0x49, 0x89, 0xd0, 0x0f, 0x01, 0xf9, 0x89, 0xcf, 0xf3, 0x0f, 0xc7, 0xf9, 0xf4],
        );
        g.change(|s| {
            s.set_msr(msr::TSC_AUX, 0x8000_0003);
            // The upper halves are cleared.
            (s.gpr[RAX], s.gpr[RCX], s.gpr[RDX]) = (!0, !0, !0);
            s.cr4 |= CR4_TSD;
        });
        let s = g.run();
        assert_eq!((s.rip, s.gpr[RDI], s.gpr[RCX]), (CODE + 17, 0x8000_0003, 0x8000_0003));
        let (first, second) = (s.gpr[R8] << 32 | s.gpr[RBX], s.gpr[RDX] << 32 | s.gpr[RAX]);
        assert!(s.gpr[RAX] >> 32 == 0 && s.gpr[RDX] >> 32 == 0 && second >= first, "{first:#x} {second:#x}");
    });
    // Users, with TSD and without it: rdtsc or rdtscp, then ud2.
    for code in [&[0x0f, 0x31, 0x0f, 0x0b][..], &[0x0f, 0x01, 0xf9, 0x0f, 0x0b]] {
        for (tsd, vector) in [(CR4_TSD, 13), (0, 6)] {
            both(|mut g| {
                g.long();
                g.put(CODE, code);
                g.change(|s| {
                    s.cr4 |= tsd;
                    s.cs = Segment::flat(0x2b, attr::CODE | attr::L | 3 << attr::DPL_SHIFT);
                    s.ss = Segment::flat(0x33, attr::DATA | attr::DB | 3 << attr::DPL_SHIFT);
                });
                assert_eq!(g.run().rip, handler(vector), "{code:x?}");
            });
        }
    }
}

/// SDM volume 2 "INT n/INTO/INT3/INT1": a trap, which no privilege of the gate keeps back, and DR6 does not show.
#[test]
fn int1_is_a_trap() {
    both(|mut g| {
        g.long();
        let offset = 0xa010u64;
        g.put_u64(IDT + 16, offset & 0xffff | 0x18 << 16 | 0x8e00 << 32);
        g.put(CODE, &[0x90, 0xf1, 0x90]);
        g.change(|s| {
            s.cs = Segment::flat(0x2b, attr::CODE | attr::L | 3 << attr::DPL_SHIFT);
            s.ss = Segment::flat(0x33, attr::DATA | attr::DB | 3 << attr::DPL_SHIFT);
        });
        let s = g.run();
        assert_eq!((s.rip, g.u64_at(s.gpr[RSP]), s.dr6 & 0xe00f), (handler(1), CODE + 2, 0));
    });
}

/// RDRAND and RDSEED give what nobody knows, say that they have (CF), clear the other flags, and write as much of the register
/// as others do.
#[test]
fn random_numbers() {
    both(|mut g| {
        g.long();
        // mov rbx,-1; mov rdi,rbx; xor ecx,ecx; rdrand rax; setc cl; rdrand rdx; rdseed rsi; rdrand ebx; rdseed di; pushfq; hlt
        let mut code =
            vec![0x48, 0xc7, 0xc3, 0xff, 0xff, 0xff, 0xff, 0x48, 0x89, 0xdf, 0x31, 0xc9, 0x48, 0x0f, 0xc7, 0xf0];
        code.extend([0x0f, 0x92, 0xc1, 0x48, 0x0f, 0xc7, 0xf2, 0x48, 0x0f, 0xc7, 0xfe, 0x0f, 0xc7, 0xf3]);
        code.extend([0x66, 0x0f, 0xc7, 0xff, 0x9c, 0xf4]);
        g.put(CODE, &code);
        let s = g.run();
        assert_eq!(s.rip, CODE + code.len() as u64);
        let numbers = [s.gpr[RAX], s.gpr[RDX], s.gpr[RSI]];
        assert!(numbers[0] != numbers[1] && numbers[1] != numbers[2] && numbers[0] != numbers[2], "{numbers:x?}");
        assert!(numbers.iter().all(|n| *n != 0 && *n >> 32 != 0 && *n as u32 != 0), "{numbers:x?}");
        assert_eq!((s.gpr[RCX], s.gpr[RBX] >> 32, s.gpr[RDI] >> 16), (1, 0, !0 >> 16));
        let arithmetic = RFLAGS_CF | RFLAGS_PF | RFLAGS_AF | RFLAGS_ZF | RFLAGS_SF | RFLAGS_OF;
        assert_eq!(g.u64_at(s.gpr[RSP]) & arithmetic, RFLAGS_CF);
    });
}
