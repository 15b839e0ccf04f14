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

/// A data breakpoint that MOV to SS meets comes behind the next instruction, or as that enters its handler; a fault of
/// the next instruction leaves none.
#[test]
fn a_load_of_ss_holds_its_breakpoint_back() {
    // What is behind the load; where #DB then returns to, if it comes.
    let cases: [(&[u8], Option<u64>); 4] = [
        (&[0x90, 0xf4], Some(CODE + 7)),
        (&[0x8e, 0x15, 0, 0, 0x10, 0, 0x90, 0xf4], Some(CODE + 13)),
        (&[0xcc, 0xf4], Some(0xa000 + 16 * 3)),
        (&[0x0f, 0x0b], None),
    ];
    for (rest, comes) in cases {
        both(|mut g| {
            g.protected();
            g.put(DATA, &[0x10, 0]);
            // mov ss,[DATA]
            g.put(CODE, &[&[0x8e, 0x15, 0, 0, 0x10, 0], rest].concat());
            g.change(|s| {
                s.dr[2] = DATA;
                s.dr7 = 0x400 | 0x0700_0010;
            });
            let s = g.run();
            match comes {
                Some(behind) => {
                    assert_eq!((s.rip, u32_at(&g, s.gpr[RSP])), (HANDLER + 1, behind), "{rest:x?}");
                    assert_eq!(s.dr6 & 0x400f, 4);
                }
                None => assert_eq!((s.rip, s.dr6 & 0x400f), (0xa000 + 16 * 6 + 1, 0), "{rest:x?}"),
            }
        });
    }
}
