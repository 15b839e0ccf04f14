//! Instructions that the kernel's emulator cannot execute.

use crate::harness::*;
use iced_x86::code_asm::*;
use mimus_core::accel::*;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

/// Executes `POPCNT RAX, RCX` and nothing else; page faults at `ADDPD` with a memory operand.
#[derive(Default)]
struct OneInstruction {
    calls: AtomicU64,
    fetches: Mutex<Vec<StatePart>>,
}

impl EmulationFailure for OneInstruction {
    fn finish(&self, failed: FailedInstruction<'_>) -> Finished {
        self.calls.fetch_add(1, Ordering::Relaxed);
        if failed.bytes[..5] != [0xf3, 0x48, 0x0f, 0xb8, 0xc1] {
            return Finished::NotHandled("only popcnt is known".to_owned());
        }
        let parts = self.fetches.lock().expect("fetches").clone();
        for part in &parts {
            failed.rest.fetch(*part, failed.state).expect("a part of the state");
        }
        let s = failed.state.as_x86_mut().expect("x86");
        s.gpr[0] = s.gpr[1].count_ones().into();
        s.rip += 5;
        let vectors = parts.contains(&StatePart::Vectors);
        if vectors {
            // XMM1.
            s.xsave[176] += 1;
        }
        Finished::Done(Done { instructions: 1, vectors, ..Done::default() })
    }

    fn statistics(&self) -> Vec<(String, u64)> {
        vec![("calls".to_owned(), self.calls.load(Ordering::Relaxed))]
    }
}

/// A machine whose supervisor code is emulated, with that instruction.
fn with_popcnt(name: &str) -> Option<(Guest, Arc<OneInstruction>)> {
    let mut g = Setup::default().build(name)?;
    if !quirks().emulated_cpl0 {
        skipped(name, "this host's processor executes every instruction");
        return None;
    }
    let hook = Arc::new(OneInstruction::default());
    g.vcpus[0].set_emulation_failure(hook.clone());
    Some((g, hook))
}

#[test]
fn failures_are_finished_and_go_on() {
    let Some((mut g, hook)) = with_popcnt("failures_are_finished_and_go_on") else { return };
    *hook.fetches.lock().expect("fetches") = vec![StatePart::Vectors, StatePart::VectorControl, StatePart::System];
    g.long(0);
    g.code(CODE, 64, |a| {
        let mut again = a.create_label();
        a.mov(esi, 50)?;
        a.xor(ebx, ebx)?;
        a.set_label(&mut again)?;
        a.mov(ecx, esi)?;
        a.popcnt(rax, rcx)?;
        a.add(ebx, eax)?;
        a.dec(esi)?;
        a.jnz(again)?;
        a.movaps(xmmword_ptr(DATA), xmm1)?;
        a.out(i32::from(PORT_STOP), al)
    });
    g.run_to_stop(0);
    assert_eq!(g.state(0).gpr[3], (1..=50u64).map(|i| u64::from(i.count_ones())).sum::<u64>());
    assert_eq!(g.load(DATA), 50, "XMM1 was changed each time");
    assert_eq!((g.statistic("emulation failures"), g.statistic("calls")), (50, 50));
}

#[test]
fn a_step_ends_after_the_finished_instruction() {
    let Some((mut g, _)) = with_popcnt("a_step_ends_after_the_finished_instruction") else { return };
    g.long(0);
    g.code(CODE, 64, |a| {
        a.popcnt(rax, rcx)?;
        a.nop()?;
        a.nop()
    });
    g.vcpus[0].debug().expect("debugging").set_single_step(true);
    for rip in [CODE + 5, CODE + 6] {
        assert!(matches!(g.run(0), VcpuExit::Debug(DebugStop::Step)));
        assert_eq!(g.state(0).rip, rip);
    }
}

#[test]
fn nobody_can_execute_it() {
    let Some((mut g, _)) = with_popcnt("nobody_can_execute_it") else { return };
    g.long(0);
    g.code(CODE, 64, |a| a.vaddpd(ymm0, ymm1, ymm2));
    let VcpuExit::Failed(e) = g.run(0) else { panic!("it ran") };
    let e = e.to_string();
    assert!(e.contains("0x1000") && e.contains("c5 f5 58 c2") && e.contains("only popcnt"), "{e}");
    // The state is that before the instruction, and it can go on behind it.
    let s = g.state(0);
    assert_eq!((s.rip, s.cpl()), (CODE, 0));
    g.change(0, |s| s.rip += 4);
    g.write(CODE + 4, &[0xe6, PORT_STOP as u8]);
    g.run_to_stop(0);
}

#[test]
fn without_a_hook_it_fails_in_words() {
    let name = "without_a_hook_it_fails_in_words";
    let Some(mut g) = Setup::default().build(name) else { return };
    if !quirks().emulated_cpl0 {
        return skipped(name, "this host's processor executes every instruction");
    }
    g.long(0);
    g.code(CODE, 64, |a| a.popcnt(eax, eax));
    let VcpuExit::Failed(e) = g.run(0) else { panic!("it ran") };
    assert!(e.to_string().contains("cannot execute the instruction at 0x1000"), "{e}");
}

/// Changes the page table entry of [`DATA`] and claims what `tables` says.
struct Remap {
    tables: bool,
    log: Mutex<Vec<Vec<u8>>>,
    calls: AtomicU64,
}

impl EmulationFailure for Remap {
    fn finish(&self, failed: FailedInstruction<'_>) -> Finished {
        self.log.lock().expect("log").push(failed.bytes.to_vec());
        self.calls.fetch_add(1, Ordering::Relaxed);
        let s = failed.state.as_x86_mut().expect("x86");
        s.rip += 5;
        let entry = (DATA + 0x1000) | 0x67;
        let at = mimus_core::bus::GuestPhys(PT + (DATA >> 12) * 8);
        let attrs = mimus_core::bus::MemTxAttrs::vcpu(0);
        assert!(failed.io.memory().write(at, mimus_core::bus::AccessSize::B8, entry, attrs).is_ok());
        Finished::Done(Done { instructions: 1, tables_written: self.tables, ..Done::default() })
    }
}

#[test]
fn changed_page_tables_are_seen() {
    let name = "changed_page_tables_are_seen";
    let Some(mut g) = Setup::default().build(name) else { return };
    if !quirks().emulated_cpl0 {
        return skipped(name, "this host's processor executes every instruction");
    }
    g.store(DATA, 1);
    g.store(DATA + 0x1000, 2);
    let hook = Arc::new(Remap { tables: true, log: Mutex::default(), calls: AtomicU64::new(0) });
    g.vcpus[0].set_emulation_failure(hook.clone());
    // User code reads the page; #PF of an unmapped address takes it to the supervisor, which fails to execute
    // POPCNT and returns.
    g.store(PT + ((DATA + 0x2000) >> 12) * 8, 0);
    g.gate(14, 0x2000);
    g.code(0x2000, 64, |a| {
        a.add(rsp, 8)?;
        a.popcnt(rax, rax)?;
        a.mov(rax, cr3)?;
        a.mov(cr3, rax)?;
        a.add(qword_ptr(rsp), 8)?;
        a.iretq()
    });
    g.user(0);
    g.code(USER, 64, |a| {
        a.mov(rbx, qword_ptr(DATA))?;
        // Eight bytes.
        a.mov(rcx, qword_ptr(DATA + 0x2000))?;
        a.add(rbx, qword_ptr(DATA))?;
        a.mov(dword_ptr(HOLE), ebx)
    });
    g.bus.stop_always.store(true, Ordering::Relaxed);
    g.run_to_stop(0);
    assert_eq!(g.bus.take(), [Seen::Write(HOLE, 4, 3)], "the second read is of the new page");
    assert_eq!(hook.log.lock().expect("log")[0][..5], [0xf3, 0x48, 0x0f, 0xb8, 0xc0]);
}
