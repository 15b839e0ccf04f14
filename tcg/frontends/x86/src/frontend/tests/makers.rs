//! Where instructions of Intel's processors and AMD's differ, as measured on both by the differential test: which fault
//! comes first, and what one leaves behind.

use super::*;

const INTEL: &str = "kvm64,+pdpe1gb,+xsave,+avx,+avx2";
const AMD: &str = "qemu64,+pdpe1gb,+xsave,+avx,+avx2";
/// Nothing is here, or at the pages behind.
const NOTHING: u64 = 0x4020_0000;

/// Runs `code`, and a HLT, in 64-bit mode on processors of both makers: by interpreter and generated code.
fn of_makers(code: &[u8], change: impl Fn(&mut X86State), check: impl Fn(&Guest, &X86State, bool)) {
    for (model, amd) in [(INTEL, false), (AMD, true)] {
        both_of(model, |mut g| {
            g.long();
            g.put(CODE, &[code, &[0xf4]].concat());
            g.change(&change);
            let s = g.run();
            check(&g, &s, amd);
        });
    }
}

/// The vector of the handler that has halted; `None`: the program's own HLT.
fn vector(s: &X86State) -> Option<u64> {
    (s.rip < CODE).then(|| (s.rip - 1 - 0xa000) / 16)
}

#[test]
fn comparisons_load_their_operands_in_another_order() {
    // cmpsb, alone and repeated
    for code in [&[0xa6][..], &[0xf3, 0xa6]] {
        let change = |s: &mut X86State| {
            (s.gpr[RSI], s.gpr[RDI], s.gpr[RCX]) = (NOTHING, NOTHING + 0x5000, 9);
        };
        of_makers(code, change, |_, s, amd| {
            let address = if amd { NOTHING } else { NOTHING + 0x5000 };
            assert_eq!((vector(s), s.cr2), (Some(14), address), "amd: {amd}");
        });
    }
}

#[test]
fn repeated_comparisons_that_fault_give_the_flags_back() {
    let end = 0x4000_0000;
    // stc; repne scasb: two bytes, then nothing
    let change = |s: &mut X86State| (s.gpr[RDI], s.gpr[RCX], s.gpr[RAX]) = (DATA + 0xffe, 9, 7);
    for (model, amd) in [(INTEL, false), (AMD, true)] {
        both_of(model, |mut g| {
            g.long();
            g.put(CODE, &[0xf9, 0xf2, 0xae]);
            // The last page before `end` is that of the data.
            g.put_u64(TABLES + 0x1000 + 8, (TABLES + 0x2000) | 7);
            g.put_u64(TABLES + 0x2000, (TABLES + 0x3000) | 7);
            g.put_u64(TABLES + 0x3000, DATA | 7);
            g.change(change);
            g.change(|s| s.gpr[RDI] = end + 0xffe);
            let s = g.run();
            let flags = g.u64_at(s.gpr[RSP] + 24);
            assert_eq!((vector(&s), s.cr2, s.gpr[RCX]), (Some(14), end + 0x1000, 7));
            // 7 - 0: neither carry nor zero.
            assert_eq!(flags & RFLAGS_CF != 0, !amd, "amd: {amd}");
        });
    }
}

#[test]
fn masked_stores_begin_at_another_half() {
    // maskmovdqu xmm0, xmm0
    let code = [0x66, 0x0f, 0xf7, 0xc0];
    of_makers(
        &code,
        |s| s.gpr[RDI] = NOTHING + 0x11,
        |_, s, amd| {
            assert_eq!((vector(s), s.cr2), (Some(14), NOTHING + if amd { 0x11 } else { 0x19 }), "amd: {amd}");
        },
    );
}

#[test]
fn a_store_of_mmx_that_faults_moves_the_top_of_the_stack() {
    // fninit; fld1; movq [rdi], mm0: at a page that is missing, and where no address is
    let code = [0xdb, 0xe3, 0xd9, 0xe8, 0x0f, 0x7f, 0x07];
    for (address, number) in [(NOTHING, 14), (1 << 63, 13)] {
        of_makers(
            &code,
            |s| s.gpr[RDI] = address,
            |_, s, amd| {
                let top = u16::from_le_bytes([s.xsave[2], s.xsave[3]]) >> 11 & 7;
                assert_eq!((vector(s), top), (Some(number), if amd { 7 } else { 0 }), "amd: {amd}");
            },
        );
    }
}

#[test]
fn unmasked_exceptions_come_before_faults_of_the_store() {
    // fninit; push 0x36f; fldcw [rsp]: underflows are not masked; fldpi; push of 2^-1000, fmul of it twice; fst dword [rdi]
    let mut code = vec![0xdb, 0xe3, 0x68, 0x6f, 3, 0, 0, 0xd9, 0x2c, 0x24, 0xd9, 0xeb];
    // mov rax, 0x0170000000000000; push rax; fmul qword [rsp]
    code.extend([0x48, 0xb8, 0, 0, 0, 0, 0, 0, 0x70, 1, 0x50, 0xdc, 0x0c, 0x24]);
    code.extend([0xd9, 0x17]);
    of_makers(
        &code,
        |s| s.gpr[RDI] = NOTHING,
        |_, s, amd| {
            let status = u16::from_le_bytes([s.xsave[2], s.xsave[3]]);
            let expected = if amd { (Some(14), false) } else { (None, true) };
            assert_eq!((vector(s), status & 0x10 != 0), expected, "amd: {amd}");
        },
    );
}

#[test]
fn a_call_to_no_address_has_pushed() {
    for (model, amd) in [(INTEL, false), (AMD, true)] {
        both_of(model, |mut g| {
            g.long();
            // call rax; the handler has another stack
            g.put(CODE, &[0xff, 0xd0]);
            g.put_u64(TSS + 0x24, 0x7000);
            g.put(IDT + 16 * 13 + 4, &[1]);
            g.put_u64(STACK - 8, 0x1234);
            g.change(|s| s.gpr[RAX] = 1 << 63);
            let s = g.run();
            // Error code, RIP, CS, RFLAGS, RSP.
            assert_eq!((vector(&s), g.u64_at(s.gpr[RSP] + 8), g.u64_at(s.gpr[RSP] + 32)), (Some(13), CODE, STACK));
            assert_eq!(g.u64_at(STACK - 8), if amd { 0x1234 } else { CODE + 2 }, "{model}");
        });
    }
}

#[test]
fn the_pause_of_another_register_is_an_exchange() {
    // rep; xchg r8d, eax
    of_makers(
        &[0xf3, 0x41, 0x90],
        |s| (s.gpr[RAX], s.gpr[8]) = (1, 2),
        |_, s, amd| {
            assert_eq!((s.gpr[RAX], s.gpr[8]), if amd { (2, 1) } else { (1, 2) });
        },
    );
}

#[test]
fn a_gather_that_faults_settles_its_mask() {
    if !is_x86_feature_detected!("avx2") {
        println!("SKIPPED (a_gather_that_faults_settles_its_mask): the host has no AVX2");
        return;
    }
    // mov eax, 0x80000001; vmovd xmm1, eax; vpbroadcastd xmm1, xmm1; vpxor xmm2, xmm2, xmm2; vpgatherdd xmm0, [rdi + xmm2], xmm1
    let code = [
        0xb8, 1, 0, 0, 0x80, 0xc5, 0xf9, 0x6e, 0xc8, 0xc4, 0xe2, 0x79, 0x58, 0xc9, 0xc5, 0xe9, 0xef, 0xd2, 0xc4, 0xe2,
        0x71, 0x90, 0x04, 0x17,
    ];
    of_makers(
        &code,
        |s| s.gpr[RDI] = NOTHING,
        |_, s, amd| {
            let mask = u32::from_le_bytes(s.xsave[160 + 16..160 + 20].try_into().unwrap());
            assert_eq!((vector(s), mask), (Some(14), if amd { 0x8000_0001 } else { !0 }), "amd: {amd}");
        },
    );
}

/// A program of level 3 whose accesses have to be aligned.
#[test]
fn wide_accesses_are_checked_for_alignment() {
    // movups xmm0, [DATA + 4]; ud2
    let code = [&[0x0f, 0x10, 0x05][..], &(DATA as u32 + 4).to_le_bytes(), &[0x0f, 0x0b]].concat();
    for (model, number) in [(INTEL, 6), (AMD, 17)] {
        both_of(model, |mut g| {
            g.protected();
            g.put(CODE, &code);
            g.change(|s| {
                s.cs = Segment::flat(0x3b, attr::CODE | attr::DB | 3 << attr::DPL_SHIFT);
                s.ss = Segment::flat(0x33, attr::DATA | attr::DB | 3 << attr::DPL_SHIFT);
                s.cr0 |= CR0_AM;
                s.rflags |= RFLAGS_AC;
            });
            assert_eq!(vector(&g.run()), Some(number), "{model}");
        });
    }
}

#[test]
fn segment_registers_are_pushed_as_sixteen_bits() {
    for (model, amd) in [(INTEL, false), (AMD, true)] {
        both_of(model, |mut g| {
            g.protected();
            // push es; hlt
            g.put(CODE, &[0x06, 0xf4]);
            g.put_u64(STACK - 8, !0);
            let s = g.run();
            assert_eq!(s.gpr[RSP], STACK - 4);
            assert_eq!(g.u64_at(STACK - 8) >> 32, if amd { 0x10 } else { 0xffff_0010 });
        });
    }
}

#[test]
fn bounds_end_at_the_first_that_is_passed() {
    for (model, number) in [(INTEL, 5), (AMD, 13)] {
        both_of(model, |mut g| {
            g.protected();
            // bound eax, [DATA]; the segment ends behind the lower bound
            g.put(CODE, &[&[0x62, 0x05][..], &(DATA as u32).to_le_bytes()].concat());
            g.put_u64(DATA, 7);
            g.change(|s| s.ds.limit = DATA as u32 + 3);
            assert_eq!(vector(&g.run()), Some(number), "{model}");
        });
    }
}
