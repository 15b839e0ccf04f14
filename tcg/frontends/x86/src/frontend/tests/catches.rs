//! What a debugger catches in x86 code: exceptions, accesses to registers, ports and devices, changes of mode.

use super::*;
use mimus_core::accel::catch::{MODE_COMPATIBILITY, MODE_KIND, MODE_LONG, MODE_PROTECTED, MODE_REAL};
use mimus_core::accel::{Catch, Caught, DebugStop, SystemRegister, VcpuDebug, WatchKind};

/// Nothing is there: reads give ones, writes are lost.
const DEVICE: u64 = 0x80_0000;

fn debug(g: &mut Guest) -> &mut dyn VcpuDebug {
    g.vcpu.debug().expect("the translator debugs")
}

fn caught(g: &mut Guest) -> Caught {
    match g.vcpu.run(&g.io) {
        VcpuExit::Debug(DebugStop::Caught(caught)) => caught,
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

#[test]
fn accesses_are_caught_after_their_instruction() {
    both(|mut g| {
        g.long();
        let insns: [&[u8]; 16] = [
            &[0x66, 0xba, 0xf8, 0x03],       // 0 mov dx, 0x3f8
            &[0xb0, 0x41],                   // 1 mov al, 'A'
            &[0xee],                         // 2 out dx, al
            &[0xec],                         // 3 in al, dx
            &[0xb9, 0x03, 0x01, 0x00, 0xc0], // 4 mov ecx, TSC_AUX
            &[0xb8, 7, 0, 0, 0],             // 5 mov eax, 7
            &[0x31, 0xd2],                   // 6 xor edx, edx
            &[0x0f, 0x30],                   // 7 wrmsr
            &[0x0f, 0x32],                   // 8 rdmsr
            &[0x0f, 0x20, 0xd8],             // 9 mov rax, cr3
            &[0x0f, 0x22, 0xd8],             // 10 mov cr3, rax
            &[0xbf, 0x00, 0x00, 0x80, 0x00], // 11 mov edi, DEVICE
            &[0x89, 0x47, 0x10],             // 12 mov [rdi+16], eax
            &[0x8b, 0x5f, 0x10],             // 13 mov ebx, [rdi+16]
            &[0xff, 0xc3],                   // 14 inc ebx
            &[0xf4],                         // 15 hlt
        ];
        let places = place(&g, CODE, &insns);
        let start = g.state();
        let mut run = |catch: Catch, expected: &[(usize, Caught)]| {
            g.set(start.clone());
            debug(&mut g).insert_catch(catch).unwrap();
            for (insn, what) in expected {
                assert_eq!(caught(&mut g), *what, "{catch:?}");
                assert_eq!(g.state().rip, places[insn + 1], "{catch:?}: after instruction {insn}");
            }
            assert_eq!(g.run().gpr[RBX], 0, "the last instructions were executed");
            debug(&mut g).remove_catch(catch).unwrap();
            assert!(debug(&mut g).remove_catch(catch).is_err());
        };
        let port = |writes, value| Caught::Port { port: 0x3f8, writes, value };
        let ports = |kind| Catch::Port { first: 0x3f0, last: 0x3ff, kind };
        run(ports(WatchKind::Write), &[(2, port(true, 0x41))]);
        run(ports(WatchKind::ReadWrite), &[(2, port(true, 0x41)), (3, port(false, 0xf8))]);
        run(Catch::Port { first: 0x60, last: 0x60, kind: WatchKind::ReadWrite }, &[]);
        let register = SystemRegister::Msr(0xc000_0103);
        let msr = |writes, value| Caught::Register { register, writes, value };
        run(Catch::Register { register, kind: WatchKind::ReadWrite }, &[(7, msr(true, 7)), (8, msr(false, 7))]);
        let register = SystemRegister::Control(3);
        let written = Caught::Register { register, writes: true, value: TABLES };
        run(Catch::Register { register, kind: WatchKind::Write }, &[(10, written)]);
        let device = |writes, value| Caught::Device { pa: DEVICE + 16, writes, value };
        let devices = |kind| Catch::Device { first: DEVICE, last: DEVICE + 0xff, kind };
        run(devices(WatchKind::Read), &[(13, device(false, 0xffff_ffff))]);
        run(devices(WatchKind::ReadWrite), &[(12, device(true, TABLES)), (13, device(false, 0xffff_ffff))]);
        let refused =
            debug(&mut g).insert_catch(Catch::Register { register: SystemRegister::Csr(0x300), kind: WatchKind::Read });
        assert!(refused.unwrap_err().to_string().contains("no CSRs"));
    });
}

#[test]
fn exceptions_and_interrupts_are_caught_before_their_handler() {
    both(|mut g| {
        g.long();
        *g.io.handle.lock().unwrap() = Some(g.vcpu.handle());
        // nop; ud2
        let places = place(&g, CODE, &[&[0x90], &[0x0f, 0x0b]]);
        let start = g.state();
        for catch in [Catch::Exception(None), Catch::Exception(Some(6))] {
            g.set(start.clone());
            debug(&mut g).insert_catch(catch).unwrap();
            let what = caught(&mut g);
            assert!(
                matches!(what, Caught::Exception { interrupt: false, cause: 6, pc, .. } if pc == places[1]),
                "{what:?}"
            );
            let s = g.state();
            assert_eq!((s.rip, g.u64_at(s.gpr[RSP])), (0xa060, places[1]), "its frame is there");
            g.run();
            debug(&mut g).remove_catch(catch).unwrap();
        }
        g.set(start.clone());
        debug(&mut g).insert_catch(Catch::Exception(Some(13))).unwrap();
        g.run();
        debug(&mut g).remove_catch(Catch::Exception(Some(13))).unwrap();
        g.set(start);
        g.change(|s| s.rflags |= RFLAGS_IF);
        debug(&mut g).insert_catch(Catch::Interrupt(Some(0x21))).unwrap();
        *g.io.vector.lock().unwrap() = Some(0x21);
        g.vcpu.handle().set_pin(CpuPin::Intr, true);
        let what = caught(&mut g);
        assert!(matches!(what, Caught::Exception { interrupt: true, cause: 0x21, .. }), "{what:?}");
        assert_eq!(g.state().rip, 0xa000 + 16 * 0x21);
        g.run();
    });
}

/// From real mode to protected mode to long mode, and to user code and back.
#[test]
fn modes_and_address_spaces() {
    both(|mut g| {
        g.long();
        let long = g.state();
        let catch = Catch::Mode { mask: MODE_KIND, value: MODE_COMPATIBILITY };
        let to_user = Catch::Mode { mask: 3, value: 3 };
        // push 0x33; push STACK; push 0x202; push 0x3b; push 0x20000; iretq to compatibility mode; ud2 there
        let insns: [&[u8]; 6] = [
            &[0x6a, 0x33],
            &[0x68, 0x00, 0x00, 0x08, 0x00],
            &[0x68, 0x02, 0x02, 0x00, 0x00],
            &[0x6a, 0x3b],
            &[0x68, 0x00, 0x00, 0x02, 0x00],
            &[0x48, 0xcf],
        ];
        place(&g, CODE, &insns);
        g.put(0x2_0000, &[0x90, 0x0f, 0x0b]);
        for wanted in [catch, to_user] {
            g.set(long.clone());
            debug(&mut g).insert_catch(wanted).unwrap();
            assert_eq!(caught(&mut g), Caught::Mode { from: MODE_LONG, to: MODE_COMPATIBILITY | 3 });
            assert_eq!(g.state().rip, 0x2_0000, "{wanted:?}");
            g.run();
            debug(&mut g).remove_catch(wanted).unwrap();
        }
        g.set(long.clone());
        debug(&mut g).insert_catch(Catch::Mode { mask: 3, value: 0 }).unwrap();
        assert_eq!(caught(&mut g), Caught::Mode { from: MODE_COMPATIBILITY | 3, to: MODE_LONG });
        assert_eq!(g.state().rip, 0xa060, "the handler of #UD");
        debug(&mut g).remove_catch(Catch::Mode { mask: 3, value: 0 }).unwrap();
        g.run();

        // mov rax, cr3; or al, 8; mov cr3, rax; hlt
        place(&g, CODE, &[&[0x0f, 0x20, 0xd8], &[0x0c, 0x08], &[0x0f, 0x22, 0xd8], &[0xf4]]);
        g.set(long);
        debug(&mut g).insert_catch(Catch::Space(None)).unwrap();
        assert_eq!(caught(&mut g), Caught::Space { from: TABLES, to: TABLES | 8 });
        assert_eq!(g.state().rip, CODE + 8);
        g.run();
        debug(&mut g).remove_catch(Catch::Space(None)).unwrap();
    });
    both(|mut g| {
        g.real();
        // mov eax, cr0; or al, 1; mov cr0, eax; hlt
        g.put(CODE, &[0x0f, 0x20, 0xc0, 0x0c, 1, 0x0f, 0x22, 0xc0, 0xf4]);
        debug(&mut g).insert_catch(Catch::Mode { mask: 0, value: 0 }).unwrap();
        assert_eq!(caught(&mut g), Caught::Mode { from: MODE_REAL, to: MODE_PROTECTED });
        assert_eq!(g.state().rip, 8);
        g.run();
    });
}
