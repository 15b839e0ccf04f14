//! RF and TF across what interrupts, enters the system and switches tasks: SDM section 18.3.1.

use super::*;
use mimus_arch::x86::msr;

const INTEL: &str = "kvm64";
const AMD: &str = "qemu64";
/// The handlers of #DB, `INT 0x80` and interrupt 0x30.
const DEBUG: u64 = 0xa010;
const SYSTEM: u64 = 0xa800;
const INTERRUPT: u64 = 0xa300;

fn word(g: &Guest, at: u64) -> u64 {
    g.u64_at(at) & 0xffff_ffff
}

/// Runs to a handler that halts: which, where it was called, the flags it was given.
fn called(g: &mut Guest) -> (u64, u64, u64) {
    let s = g.run();
    (s.rip - 1, word(g, s.gpr[RSP]), word(g, s.gpr[RSP] + 8))
}

/// RF that an IRET sets is of one instruction.
#[test]
fn the_resume_flag_is_of_one_instruction() {
    both(|mut g| {
        g.protected();
        // push flags with RF; push 8; push offset; iret; inc eax; int 0x80
        let mut code = vec![0x68, 2, 0, 1, 0, 0x6a, 8, 0x68];
        code.extend((CODE as u32 + 13).to_le_bytes());
        code.push(0xcf);
        code.extend([0x40, 0xcd, 0x80]);
        g.put(CODE, &code);
        let (handler, at, flags) = called(&mut g);
        assert_eq!((handler, at, flags & RFLAGS_RF), (SYSTEM, CODE + 16, 0));
    });
    // The state that others see has none either.
    both(|mut g| {
        g.protected();
        let mut code = vec![0x68, 2, 0, 1, 0, 0x6a, 8, 0x68];
        code.extend((CODE as u32 + 13).to_le_bytes());
        code.extend([0xcf, 0x40, 0xf4]);
        g.put(CODE, &code);
        assert_eq!(g.run().rflags & RFLAGS_RF, 0);
    });
}

/// An interrupt in the middle of a repeated instruction has Intel's processors push RF; behind its last repetition, and
/// on AMD's, it is as it was.
#[test]
fn interrupted_repetitions() {
    for (model, count, pushed) in [(INTEL, 3, true), (INTEL, 1, false), (AMD, 3, false)] {
        both_of(model, |mut g| {
            g.protected();
            *g.io.handle.lock().unwrap() = Some(g.vcpu.handle());
            // rep insb; nop; hlt
            g.put(CODE, &[0xf3, 0x6c, 0x90, 0xf4]);
            g.change(|s| {
                (s.gpr[RCX], s.gpr[RDI], s.gpr[RDX]) = (count, DATA, INTERRUPTS.into());
                s.rflags |= RFLAGS_IF;
            });
            let (handler, at, flags) = called(&mut g);
            assert_eq!(
                (handler, at == CODE, flags & RFLAGS_RF != 0),
                (INTERRUPT, count != 1, pushed),
                "{model} {count}"
            );
            assert_eq!(g.state().gpr[RCX], count - 1);
        });
    }
}

/// The same of the single steps of its repetitions.
#[test]
fn stepped_repetitions() {
    for (model, count, pushed) in [(INTEL, 3, true), (INTEL, 1, false), (AMD, 3, false)] {
        both_of(model, |mut g| {
            g.protected();
            // rep stosb; nop; hlt
            g.put(CODE, &[0xf3, 0xaa, 0x90, 0xf4]);
            g.change(|s| {
                (s.gpr[RCX], s.gpr[RDI]) = (count, DATA);
                s.rflags |= RFLAGS_TF;
            });
            let (handler, at, flags) = called(&mut g);
            let expected = if count == 1 { CODE + 2 } else { CODE };
            assert_eq!((handler, at, flags & RFLAGS_RF != 0), (DEBUG, expected, pushed), "{model} {count}");
        });
    }
}

/// An instruction breakpoint right behind a load of SS: Intel's processors do not meet it.
#[test]
fn breakpoints_behind_loads_of_ss() {
    for (model, code) in [(INTEL, &[0x8e, 0xd0][..]), (AMD, &[0x8e, 0xd0]), (INTEL, &[0x17]), (AMD, &[0x17])] {
        both_of(model, |mut g| {
            g.protected();
            // mov ss,eax or pop ss; nop; nop; hlt
            let mut program = code.to_vec();
            program.extend([0x90, 0x90, 0xf4]);
            g.put(CODE, &program);
            g.put_u64(STACK, 0x10);
            let next = CODE + code.len() as u64;
            g.change(|s| {
                s.gpr[RAX] = 0x10;
                (s.dr[0], s.dr[1]) = (next, next + 1);
                s.dr7 = 0x405;
            });
            let (handler, at, _) = called(&mut g);
            let met = if model == INTEL { (next + 1, 2) } else { (next, 1) };
            assert_eq!((handler, (at, g.state().dr6 & 0xf)), (DEBUG, met), "{model}");
        });
    }
}

/// What enters the system with TF as it was is stepped over, before the first instruction there.
#[test]
fn single_steps_into_the_system() {
    let user = |s: &mut X86State| {
        s.cs = Segment::flat(0x3b, attr::CODE | attr::DB | 3 << attr::DPL_SHIFT);
        for seg in [&mut s.ss, &mut s.ds, &mut s.es] {
            *seg = Segment::flat(0x33, attr::DATA | attr::DB | 3 << attr::DPL_SHIFT);
        }
        s.rflags |= RFLAGS_TF;
    };
    both(|mut g| {
        g.protected();
        // sysenter, to inc eax
        g.put(CODE, &[0x0f, 0x34]);
        g.put(0x9000, &[0x40, 0xf4]);
        g.change(|s| {
            user(s);
            s.set_msr(msr::SYSENTER_CS, 8);
            s.set_msr(msr::SYSENTER_EIP, 0x9000);
            s.set_msr(msr::SYSENTER_ESP, 0x7000);
            s.gpr[RAX] = 0;
        });
        let (handler, at, _) = called(&mut g);
        assert_eq!((handler, at, g.state().gpr[RAX]), (DEBUG, 0x9000, 0));
        assert_eq!(g.state().dr6 & 0x400f, 0x4000);
    });
    both(|mut g| {
        g.protected();
        // A call gate in the place of the last entry: call 0x48:0
        g.put_u64(GDT + 0x48, 0x9000 | 8 << 16 | 0xec00 << 32);
        g.put(CODE, &[0x9a, 0, 0, 0, 0, 0x48, 0]);
        g.put(0x9000, &[0x40, 0xf4]);
        g.change(user);
        let (handler, at, _) = called(&mut g);
        assert_eq!((handler, at, g.state().dr6 & 0x400f), (DEBUG, 0x9000, 0x4000));
    });
    // INT clears TF: the handler is not stepped through.
    both(|mut g| {
        g.protected();
        g.put(CODE, &[0xcd, 0x80]);
        g.change(user);
        assert_eq!(called(&mut g).0, SYSTEM);
    });
}

/// SYSRET that sets TF traps before the instruction it leads to; IRET behind it.
#[test]
fn single_steps_out_of_the_system() {
    for (sysret, behind) in [(true, 0), (false, 2)] {
        both(|mut g| {
            g.long();
            let offset = DEBUG;
            g.put_u64(IDT + 16, offset & 0xffff | 0x18 << 16 | 0x8e00 << 32);
            // inc eax; nop
            g.put(0x9000, &[0xff, 0xc0, 0x90]);
            if sysret {
                g.put(CODE, &[0x48, 0x0f, 0x07]);
            } else {
                g.put(CODE, &[0x48, 0xcf]);
                let frame = [0x9000, 0x2b, RFLAGS_TF | 2, STACK, 0x33];
                frame.into_iter().enumerate().for_each(|(i, v)| g.put_u64(STACK + 8 * i as u64, v));
            }
            g.change(|s| {
                (s.gpr[RCX], s.gpr[R11], s.gpr[RAX]) = (0x9000, RFLAGS_TF | 2, 0);
                s.set_msr(msr::STAR, 0x1b << 48);
            });
            let s = g.run();
            assert_eq!((s.rip, g.u64_at(s.gpr[RSP])), (DEBUG + 1, 0x9000 + behind), "SYSRET: {sysret}");
            assert_eq!((s.gpr[RAX], s.dr6 & 0x400f), (behind / 2, 0x4000));
            assert_eq!(g.u64_at(s.gpr[RSP] + 8), 0x2b, "in the program");
        });
    }
}

/// RF that a task switch loads holds for the new task's first instruction.
#[test]
fn task_switches_load_the_resume_flag() {
    const OTHER: u64 = 0x6100;
    for resume in [false, true] {
        both(|mut g| {
            g.protected();
            g.put_u64(GDT + 0x48, 0x67 | OTHER << 16 | 0x8900 << 32);
            let flags = 2 | if resume { RFLAGS_RF } else { 0 };
            for (at, value) in [(0x20, 0x9000), (0x24, flags), (0x38, STACK), (0x60, 0), (0x64, 0)] {
                g.put(OTHER + at, &(value as u32).to_le_bytes());
            }
            for (i, selector) in [0x10u32, 8, 0x10, 0x10, 0, 0].into_iter().enumerate() {
                g.put(OTHER + 0x48 + 4 * i as u64, &selector.to_le_bytes());
            }
            // jmp 0x48:0, to nop; nop; hlt. Global breakpoints, which stay.
            g.put(CODE, &[0xea, 0, 0, 0, 0, 0x48, 0]);
            g.put(0x9000, &[0x90, 0x90, 0xf4]);
            g.change(|s| {
                (s.dr[0], s.dr[1]) = (0x9000, 0x9001);
                s.dr7 = 0x40a;
            });
            let (handler, at, _) = called(&mut g);
            assert_eq!((handler, at), (DEBUG, if resume { 0x9001 } else { 0x9000 }));
        });
    }
}

/// STAC and CLAC are for real mode too, not for virtual-8086 mode (volume 2).
#[test]
fn access_to_user_pages_in_real_mode() {
    both(|mut g| {
        g.real();
        // stac; hlt
        g.put(CODE, &[0x0f, 0x01, 0xcb, 0xf4]);
        let s = g.run();
        assert_eq!((s.rip, s.rflags & RFLAGS_AC), (4, RFLAGS_AC));
    });
}
