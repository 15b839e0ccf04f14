//! Rules that show between instructions: interrupt shadows, NMIs that wait, process-context identifiers.

use super::*;

const COUNTER: u64 = DATA + 0x100;

/// Has an interrupt wait with this vector.
fn interrupt(g: &Guest, vector: u8) {
    *g.io.vector.lock().unwrap() = Some(vector);
    let handle = g.vcpu.handle();
    *g.io.handle.lock().unwrap() = Some(handle.clone());
    handle.set_pin(CpuPin::Intr, true);
}

/// STI, and a load of SS, let one more instruction through: a waiting interrupt comes behind it (SDM section 7.8.3,
/// volume 2 STI).
#[test]
fn interrupts_wait_behind_a_shadow() {
    // Code, where IF is from the beginning; where the interrupt returns to.
    let cases: [(&[u8], bool, u64); 5] = [
        // sti; inc eax; inc eax
        (&[0xfb, 0xff, 0xc0, 0xff, 0xc0, 0xf4], false, 3),
        // sti; sti; inc eax: the second has no shadow
        (&[0xfb, 0xfb, 0xff, 0xc0, 0xf4], false, 2),
        // sti; cli; inc eax; hlt: never
        (&[0xfb, 0xfa, 0xff, 0xc0, 0xf4], false, 0),
        // sti; mov ss,ecx; inc eax; inc eax: both shadows
        (&[0xfb, 0x8e, 0xd1, 0xff, 0xc0, 0xff, 0xc0, 0xf4], false, 5),
        // sti; hlt: the halt is entered, and left
        (&[0xfb, 0xf4, 0xff, 0xc0, 0xf4], false, 2),
    ];
    for (code, flag, returns) in cases {
        both(|mut g| {
            g.long();
            g.put(CODE, code);
            g.change(|s| {
                s.gpr[RCX] = 0x10;
                s.rflags = s.rflags & !RFLAGS_IF | if flag { RFLAGS_IF } else { 0 };
            });
            interrupt(&g, 0x30);
            let s = g.run();
            if returns == 0 {
                assert_eq!(s.rip, CODE + code.len() as u64, "{code:x?}");
            } else {
                assert_eq!((s.rip, g.u64_at(s.gpr[RSP])), (0xa301, CODE + returns), "{code:x?}");
            }
        });
    }
}

/// An NMI that comes in the handler of one waits for its IRET, even one that faults; a third is lost (section 7.7.1).
#[test]
fn nmis_wait_for_iret() {
    both(|mut g| {
        g.long();
        // The handler at 0xa020 goes on elsewhere: inc qword [COUNTER]; hlt; iretq
        let mut handler = vec![0x48, 0xff, 0x04, 0x25];
        handler.extend((COUNTER as u32).to_le_bytes());
        handler.extend([0xf4, 0x48, 0xcf]);
        g.put(0xb000, &handler);
        g.put(0xa020, &[0xe9, 0xdb, 0x0f, 0, 0]);
        g.put(CODE, &[0x90, 0xf4, 0xf4]);
        let pulse = |g: &Guest| {
            g.vcpu.handle().set_pin(CpuPin::Nmi, true);
            g.vcpu.handle().set_pin(CpuPin::Nmi, false);
        };
        pulse(&g);
        let s = g.run();
        assert_eq!((s.rip, s.events.nmi_masked, g.u64_at(COUNTER)), (0xb009, true, 1));
        // Two more: they do not wake it, and are one.
        pulse(&g);
        pulse(&g);
        let s = g.run();
        assert_eq!((s.rip, s.events.nmi_pending, g.u64_at(COUNTER)), (0xb009, true, 1));
        // It goes on from a saved state; the one that waits comes right behind IRET.
        let mut state = g.state();
        state.mp_state = MpState::Running;
        g.set(state);
        let s = g.run();
        assert_eq!((s.rip, s.events.nmi_masked, g.u64_at(COUNTER)), (0xb009, true, 2));
        let interrupted = g.u64_at(s.gpr[RSP]);
        assert!((CODE..CODE + 2).contains(&interrupted), "{interrupted:#x}");
        g.change(|s| s.mp_state = MpState::Running);
        let s = g.run();
        assert_eq!((s.rip & !1, s.events.nmi_masked, g.u64_at(COUNTER)), (CODE + 2, false, 2));
    });
}

#[test]
fn an_iret_that_faults_ends_the_wait_for_nmis() {
    both(|mut g| {
        g.long();
        // nop; xor-ed selector: mov qword [rsp+8],0; iretq
        g.put(0xa020, &[0x48, 0xc7, 0x44, 0x24, 8, 0, 0, 0, 0, 0x48, 0xcf]);
        g.put(CODE, &[0x90, 0xf4]);
        g.vcpu.handle().set_pin(CpuPin::Nmi, true);
        g.vcpu.handle().set_pin(CpuPin::Nmi, false);
        let s = g.run();
        assert_eq!((s.rip, s.events.nmi_masked), (0xa0d1, false), "#GP's handler, where NMIs come again");
    });
}

/// The page of tables whose entry maps [`VIRTUAL`].
const LEAVES: u64 = TABLES + 0x1_0000;
const VIRTUAL: u64 = 0x4000_0000;

/// Long mode with PCIDs; [`VIRTUAL`] is mapped by one page table of two address spaces.
fn identified() -> impl Fn(&mut Guest) {
    |g| {
        g.long();
        // 1 GiB on: page directory pointer, directory, leaves.
        g.put_u64(TABLES + 0x1000 + 8, (LEAVES + 0x1000) | 7);
        g.put_u64(LEAVES + 0x1000, LEAVES | 7);
        g.put_u64(LEAVES, DATA | 7);
        g.put_u64(DATA, 0x1111);
        g.put_u64(DATA + 0x1000, 0x2222);
        g.change(|s| s.cr4 |= CR4_PCIDE);
    }
}

/// What a program reads at [`VIRTUAL`] before and after it maps the other page there and does as `between` says: rax is
/// CR3 with PCID 5, rdi a descriptor of INVPCID.
fn reads(g: &mut Guest, between: &[u8]) -> (u64, u64, u64) {
    mapped(g, between, 0)
}

/// The same, of pages with more bits in their entries.
fn mapped(g: &mut Guest, between: &[u8], bits: u64) -> (u64, u64, u64) {
    let mut code = vec![0x0f, 0x22, 0xd8]; // mov cr3,rax
    code.extend([0x48, 0x8b, 0x1e]); // mov rbx,[rsi]
    code.extend([0x49, 0x89, 0x10]); // mov [r8],rdx
    code.extend(between);
    code.extend([0x48, 0x8b, 0x0e, 0xf4]); // mov rcx,[rsi]; hlt
    g.put(CODE, &code);
    g.put_u64(DATA + 0x2000, 5);
    g.put_u64(DATA + 0x2008, VIRTUAL);
    g.put_u64(LEAVES, DATA | 7 | bits);
    g.change(|s| {
        s.gpr[RAX] = TABLES | 5;
        s.gpr[RSI] = VIRTUAL;
        s.gpr[R8] = LEAVES;
        s.gpr[RDX] = (DATA + 0x1000) | 7 | bits;
        s.gpr[RDI] = DATA + 0x2000;
        s.rip = CODE;
        s.mp_state = MpState::Running;
    });
    let s = g.run();
    (s.rip, s.gpr[RBX], s.gpr[RCX])
}

#[test]
fn process_context_identifiers() {
    let set_up = identified();
    // What makes the new page be seen: a load of CR3 without bit 63, INVLPG, every kind of INVPCID.
    let flushing: [&[u8]; 6] = [
        &[0x0f, 0x22, 0xd8],                               // mov cr3,rax
        &[0x0f, 0x01, 0x3e],                               // invlpg [rsi]
        &[0x31, 0xed, 0x66, 0x0f, 0x38, 0x82, 0x2f],       // xor ebp,ebp; invpcid rbp,[rdi]
        &[0xbd, 1, 0, 0, 0, 0x66, 0x0f, 0x38, 0x82, 0x2f], // one context
        &[0xbd, 2, 0, 0, 0, 0x66, 0x0f, 0x38, 0x82, 0x2f], // all, with global pages
        &[0xbd, 3, 0, 0, 0, 0x66, 0x0f, 0x38, 0x82, 0x2f], // all but these
    ];
    for between in flushing {
        both(|mut g| {
            set_up(&mut g);
            let (_, before, after) = reads(&mut g, between);
            assert_eq!((before, after), (0x1111, 0x2222), "{between:x?}");
            // Once more, with a translation of the last round to be forgotten.
            let (_, before, after) = reads(&mut g, between);
            assert_eq!((before, after), (0x1111, 0x2222), "again: {between:x?}");
        });
    }
}

/// SDM volume 3 section 4.10.4.1: INVLPG, and changes of CR4.PGE, forget global pages; a load of CR3 forgets the others.
#[test]
fn global_pages() {
    let set_up = identified();
    // mov rbp,cr4; xor rbp,0x80; mov cr4,rbp; xor rbp,0x80; mov cr4,rbp
    let toggled = [
        0x0f, 0x20, 0xe5, 0x48, 0x81, 0xf5, 0x80, 0, 0, 0, 0x0f, 0x22, 0xe5, 0x48, 0x81, 0xf5, 0x80, 0, 0, 0, 0x0f,
        0x22, 0xe5,
    ];
    let ways: [(&[u8], u64); 3] = [(&[0x0f, 0x01, 0x3e], 0x100), (&toggled, 0x100), (&[0x0f, 0x22, 0xd8], 0)];
    for (between, global) in ways {
        both(|mut g| {
            set_up(&mut g);
            g.change(|s| s.cr4 = s.cr4 & !CR4_PCIDE | CR4_PGE);
            for round in 0..2 {
                let (_, before, after) = mapped(&mut g, between, global);
                assert_eq!((before, after), (0x1111, 0x2222), "{between:x?} {round}");
                g.change(|s| s.cr3 = TABLES);
            }
        });
    }
}

#[test]
fn faults_of_identifiers() {
    let set_up = identified();
    // bts rax,63; mov cr3,rax: what was read is at most old. A descriptor or kind that cannot be: #GP.
    both(|mut g| {
        set_up(&mut g);
        let (rip, _, after) = reads(&mut g, &[0x48, 0x0f, 0xba, 0xe8, 63, 0x0f, 0x22, 0xd8, 0x0f, 0x20, 0xd8]);
        assert!(rip < 0x2_0000 && [0x1111, 0x2222].contains(&after));
        let s = g.state();
        assert_eq!((s.cr3, s.gpr[RAX]), (TABLES | 5, TABLES | 5), "bit 63 is not kept");
    });
    let bad: [(&[u8], &str); 4] = [
        (&[0xbd, 4, 0, 0, 0, 0x66, 0x0f, 0x38, 0x82, 0x2f], "kind 4"),
        (&[0xff, 0x47, 4, 0x31, 0xed, 0x66, 0x0f, 0x38, 0x82, 0x2f], "reserved bits of the descriptor"),
        (&[0xc6, 0x47, 15, 0x80, 0x31, 0xed, 0x66, 0x0f, 0x38, 0x82, 0x2f], "no address"),
        // mov rbp,cr4; btr rbp,17; mov cr4,rbp; bts rax,63; mov cr3,rax
        (
            &[
                0x0f, 0x20, 0xe5, 0x48, 0x0f, 0xba, 0xf5, 17, 0x0f, 0x22, 0xe5, 0x48, 0x0f, 0xba, 0xe8, 63, 0x0f, 0x22,
                0xd8,
            ],
            "bit 63 without identifiers",
        ),
    ];
    for (code, what) in bad {
        both(|mut g| {
            set_up(&mut g);
            assert_eq!(reads(&mut g, code).0, 0xa0d1, "{what}");
        });
    }
    // CR4.PCIDE with a PCID in CR3 already.
    both(|mut g| {
        g.long();
        // mov rax,cr4; bts rax,17; mov cr4,rax
        g.put(CODE, &[0x0f, 0x20, 0xe0, 0x48, 0x0f, 0xba, 0xe8, 17, 0x0f, 0x22, 0xe0, 0xf4]);
        g.change(|s| s.cr3 |= 8);
        assert_eq!(g.run().rip, 0xa0d1);
    });
}
