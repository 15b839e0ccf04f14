//! A debugger's breakpoints, watchpoints and single steps in x86 code.

use super::*;
use mimus_core::accel::{DebugStop, VcpuDebug, WatchKind};
use mimus_core::bus::GuestVirt;

fn debug(g: &mut Guest) -> &mut dyn VcpuDebug {
    g.vcpu.debug().expect("the translator debugs")
}

fn stop(g: &mut Guest) -> DebugStop {
    match g.vcpu.run(&g.io) {
        VcpuExit::Debug(stop) => stop,
        other => panic!("{other:?} at {:x?}", g.state()),
    }
}

/// Instructions one after the other; their addresses, and that behind the last.
fn place(g: &Guest, at: u64, insns: &[&[u8]]) -> Vec<u64> {
    let mut places = vec![at];
    for insn in insns {
        let here = places[places.len() - 1];
        g.put(here, insn);
        places.push(here + insn.len() as u64);
    }
    places
}

/// Every way to memory: inline, read-modify-write, vector, string and system instructions, the stack.
#[test]
fn watchpoints_stop_after_the_access_whatever_makes_it() {
    both(|mut g| {
        g.long();
        let insns: [&[u8]; 12] = [
            &[0xbf, 0x00, 0x00, 0x10, 0x00],             // 0 mov edi, DATA
            &[0xc7, 0x07, 0x05, 0x00, 0x00, 0x00],       // 1 mov dword [rdi], 5
            &[0x48, 0x8b, 0x47, 0x02],                   // 2 mov rax, [rdi+2]
            &[0xff, 0x07],                               // 3 inc dword [rdi]
            &[0xf0, 0x48, 0x0f, 0xc1, 0x07],             // 4 lock xadd [rdi], rax
            &[0x0f, 0x11, 0x07],                         // 5 movups [rdi], xmm0
            &[0x0f, 0x10, 0x4f, 0x10],                   // 6 movups xmm1, [rdi+16]
            &[0x0f, 0xae, 0x87, 0x00, 0xfe, 0xff, 0xff], // 7 fxsave [rdi-512]
            &[0x0f, 0x01, 0x07],                         // 8 sgdt [rdi]
            &[0x0f, 0x31],                               // 9 rdtsc
            &[0x48, 0x0f, 0xc7, 0x0f],                   // 10 cmpxchg16b [rdi]
            &[0xf4],                                     // 11 hlt
        ];
        let places = place(&g, CODE, &insns);
        let start = g.state();
        let mut run = |va: u64, len: u64, kind: WatchKind, expected: &[usize]| {
            g.set(start.clone());
            debug(&mut g).insert_watchpoint(GuestVirt(va), len, kind).unwrap();
            for &insn in expected {
                let stop = stop(&mut g);
                assert!(matches!(stop, DebugStop::Watch { kind: k, .. } if k == kind), "{stop:?}");
                assert_eq!(g.state().rip, places[insn + 1], "{kind:?} of {va:#x}: after instruction {insn}");
            }
            g.run();
            debug(&mut g).remove_watchpoint(GuestVirt(va), len, kind).unwrap();
        };
        run(DATA, 4, WatchKind::Write, &[1, 3, 4, 5, 8, 10]);
        run(DATA, 8, WatchKind::Read, &[2, 3, 4, 10]);
        run(DATA + 3, 1, WatchKind::ReadWrite, &[1, 2, 3, 4, 5, 8, 10]);
        run(DATA + 31, 2, WatchKind::ReadWrite, &[6]);
        run(DATA - 2, 1, WatchKind::Read, &[]);
        run(DATA - 500, 100, WatchKind::Write, &[7]);
    });
}

#[test]
fn watchpoints_in_string_instructions_stop_in_between() {
    both(|mut g| {
        g.long();
        // mov edi, DATA; mov ecx, 100; mov al, 'x'; rep stosb; hlt
        let places = place(
            &g,
            CODE,
            &[&[0xbf, 0x00, 0x00, 0x10, 0x00], &[0xb9, 100, 0, 0, 0], &[0xb0, b'x'], &[0xf3, 0xaa], &[0xf4]],
        );
        debug(&mut g).insert_watchpoint(GuestVirt(DATA + 40), 2, WatchKind::Write).unwrap();
        for left in [59, 58] {
            assert!(matches!(stop(&mut g), DebugStop::Watch { .. }));
            let s = g.state();
            assert_eq!((s.rip, s.gpr[RCX], s.gpr[RDI]), (places[3], left, DATA + 100 - left));
        }
        g.run();
        let mut bytes = [0; 101];
        g.get(DATA, &mut bytes);
        assert_eq!(bytes[..100], [b'x'; 100]);
        assert_eq!(bytes[100], 0);
    });
}

#[test]
fn the_frame_of_an_exception_and_descriptors_are_watched() {
    both(|mut g| {
        g.long();
        let places = place(&g, CODE, &[&[0x90], &[0x0f, 0x0b]]); // nop; ud2
        debug(&mut g).insert_watchpoint(GuestVirt(STACK - 16), 8, WatchKind::Write).unwrap();
        assert_eq!(stop(&mut g), DebugStop::Watch { va: GuestVirt(STACK - 16), kind: WatchKind::Write });
        // Vector 6's handler has not begun.
        let s = g.state();
        assert_eq!((s.rip, g.u64_at(s.gpr[RSP])), (0xa060, places[1]));
        debug(&mut g).remove_watchpoint(GuestVirt(STACK - 16), 8, WatchKind::Write).unwrap();
        g.run();
        // mov ds, ax of descriptor 2
        g.change(|s| (s.rip, s.gpr[RAX], s.mp_state) = (CODE + 0x100, 0x10, MpState::Running));
        let places = place(&g, CODE + 0x100, &[&[0x8e, 0xd8], &[0xf4]]);
        debug(&mut g).insert_watchpoint(GuestVirt(GDT + 0x10), 8, WatchKind::Read).unwrap();
        assert!(matches!(stop(&mut g), DebugStop::Watch { kind: WatchKind::Read, .. }));
        assert_eq!(g.state().rip, places[1]);
    });
}

#[test]
fn breakpoints_are_linear_addresses_in_every_mode_and_are_counted() {
    both(|mut g| {
        g.real();
        // Loop: inc ax; dec cx; jnz -4; hlt
        g.put(CODE, &[0x40, 0x49, 0x75, 0xfc, 0xf4]);
        g.change(|s| s.gpr[RCX] = 10);
        for _ in 0..2 {
            debug(&mut g).insert_breakpoint(GuestVirt(CODE + 1)).unwrap();
        }
        for round in 1..=3 {
            assert_eq!(stop(&mut g), DebugStop::Breakpoint);
            let s = g.state();
            assert_eq!((s.rip, s.linear_pc(), s.gpr[RAX]), (1, CODE + 1, round));
        }
        debug(&mut g).remove_breakpoint(GuestVirt(CODE + 1)).unwrap();
        assert_eq!(stop(&mut g), DebugStop::Breakpoint, "another still wants it");
        debug(&mut g).remove_breakpoint(GuestVirt(CODE + 1)).unwrap();
        assert!(debug(&mut g).remove_breakpoint(GuestVirt(CODE + 1)).is_err());
        assert_eq!(g.run().gpr[RAX], 10);
    });
}

/// A guest that single-steps itself meets the debugger's breakpoints and watchpoints all the same, and its own
/// debug exceptions come once each.
#[test]
fn a_guest_that_steps_itself() {
    both(|mut g| {
        g.long();
        // The handler of #DB: inc rbx; cmp rbx, 4; jne +8; and dword [rsp+16], ~TF; iretq.
        let handler = [0x48, 0xff, 0xc3, 0x48, 0x83, 0xfb, 4, 0x75, 8, 0x81, 0x64, 0x24, 16, 0xff, 0xfe, 0xff, 0xff];
        g.put(0xa010, &[&handler[..], &[0x48, 0xcf]].concat());
        let insns: [&[u8]; 5] =
            [&[0x90], &[0x90], &[0xc7, 0x04, 0x25, 0x00, 0x00, 0x10, 0x00, 5, 0, 0, 0], &[0x90], &[0xf4]];
        let places = place(&g, CODE, &insns);
        g.change(|s| s.rflags |= RFLAGS_TF);
        debug(&mut g).insert_breakpoint(GuestVirt(places[1])).unwrap();
        debug(&mut g).insert_watchpoint(GuestVirt(DATA), 4, WatchKind::Write).unwrap();
        assert_eq!(stop(&mut g), DebugStop::Breakpoint);
        assert_eq!((g.state().rip, g.state().gpr[RBX]), (places[1], 1));
        assert!(matches!(stop(&mut g), DebugStop::Watch { .. }));
        // The trap behind the store has been taken: its handler is next.
        assert_eq!((g.state().rip, g.state().gpr[RBX]), (0xa010, 2));
        let s = g.run();
        assert_eq!((s.rip, s.gpr[RBX]), (places[5], 4));
    });
}

#[test]
fn a_step_is_one_instruction() {
    both(|mut g| {
        g.long();
        *g.io.handle.lock().unwrap() = Some(g.vcpu.handle());
        // sti; nop; nop; int 0x30 (its handler: hlt)
        let places = place(&g, CODE, &[&[0xfb], &[0x90], &[0x90], &[0xcd, 0x30]]);
        debug(&mut g).set_single_step(true);
        let step = |g: &mut Guest| {
            assert_eq!(stop(g), DebugStop::Step);
            g.state().rip
        };
        *g.io.vector.lock().unwrap() = Some(0x21);
        g.vcpu.handle().set_pin(CpuPin::Intr, true);
        assert_eq!(step(&mut g), places[1]);
        // STI holds interrupts off for one instruction.
        assert_eq!(step(&mut g), places[2]);
        // The interrupt instead of the instruction.
        assert_eq!(step(&mut g), 0xa000 + 16 * 0x21);
        g.change(|s| (s.rip, s.rflags) = (places[2], s.rflags & !RFLAGS_IF));
        assert_eq!(step(&mut g), places[3]);
        assert_eq!(step(&mut g), 0xa300);
        // Masked, it stays away.
        *g.io.vector.lock().unwrap() = Some(0x21);
        g.vcpu.handle().set_pin(CpuPin::Intr, true);
        debug(&mut g).set_step_interrupts(false);
        g.change(|s| (s.rip, s.rflags) = (places[1], s.rflags | RFLAGS_IF));
        assert_eq!((step(&mut g), step(&mut g), step(&mut g)), (places[2], places[3], 0xa300));
    });
}

/// A busy program of many instructions: its steps end as the free run does.
#[test]
fn a_million_steps_end_as_the_free_run() {
    let program = |g: &mut Guest, rounds: u32| {
        g.long();
        let mut insns: Vec<Vec<u8>> = vec![
            [&[0xb9][..], &rounds.to_le_bytes()].concat(),  // mov ecx, rounds
            vec![0xbf, 0x00, 0x00, 0x10, 0x00],             // mov edi, DATA
            vec![0x48, 0x01, 0x0f],                         // again: add [rdi], rcx
            vec![0x48, 0x8b, 0x07],                         // mov rax, [rdi]
            vec![0x48, 0x69, 0xc0, 0x8d, 0x66, 0x19, 0x00], // imul rax, rax, 1664525
            vec![0x50],                                     // push rax
            vec![0xe8, 0x00, 0x00, 0x00, 0x00],             // call next
            vec![0x5b],                                     // pop rbx
            vec![0x5a],                                     // pop rdx
            vec![0x66, 0x48, 0x0f, 0x6e, 0xc2],             // movq xmm0, rdx
            vec![0x66, 0x0f, 0xd4, 0xc8],                   // paddq xmm1, xmm0
            vec![0x48, 0x31, 0x57, 0x08],                   // xor [rdi+8], rdx
            vec![0x0f, 0x95, 0xc2],                         // setnz dl
            vec![0xff, 0xc9],                               // dec ecx
        ];
        let back: usize = insns[2..].iter().map(Vec::len).sum::<usize>() + 2;
        insns.extend([vec![0x75, (back as u8).wrapping_neg()], vec![0xf4]]); // jnz again; hlt
        place(g, CODE, &insns.iter().map(|i| &i[..]).collect::<Vec<_>>());
    };
    let timeless = |mut s: X86State| {
        s.tsc = 0;
        s
    };
    both(|mut g| {
        let rounds = if g.interprets { 5_000 } else { 80_000 };
        program(&mut g, rounds);
        let start = g.state();
        let wanted = timeless(g.run());
        let memory = [g.u64_at(DATA), g.u64_at(DATA + 8)];
        g.put(DATA, &[0; 16]);
        g.set(start);
        debug(&mut g).set_single_step(true);
        let (begun, mut steps) = (std::time::Instant::now(), 0u64);
        loop {
            match g.vcpu.run(&g.io) {
                VcpuExit::Debug(DebugStop::Step) => steps += 1,
                VcpuExit::Halted => break,
                other => panic!("{other:?}"),
            }
        }
        println!("{:.0} steps/s", steps as f64 / begun.elapsed().as_secs_f64());
        assert_eq!(steps, 3 + 13 * u64::from(rounds), "one for each instruction");
        assert_eq!((timeless(g.state()), [g.u64_at(DATA), g.u64_at(DATA + 8)]), (wanted, memory));
    });
}
