//! Instructions that the kernel's emulator cannot execute.

use crate::harness::*;
use iced_x86::code_asm::*;
use mimus_accel_kvm::Repairs;
use mimus_core::accel::*;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

/// A machine whose supervisor code is emulated, with the table of repairs.
fn with_repairs(name: &str, setup: Setup) -> Option<(Guest, Arc<Repairs>)> {
    let mut g = setup.build(name)?;
    if !quirks().emulated_cpl0 {
        skipped(name, "this host's processor executes every instruction");
        return None;
    }
    let repairs = Arc::new(Repairs::default());
    for vcpu in &mut g.vcpus {
        vcpu.set_emulation_failure(repairs.clone());
    }
    Some((g, repairs))
}

#[test]
fn failures_are_repaired_and_go_on() {
    let name = "failures_are_repaired_and_go_on";
    let Some((mut g, repairs)) = with_repairs(name, Setup::default()) else { return };
    g.long(0);
    g.gate(3, 0x2000);
    g.code(0x2000, 64, |a| {
        // The frame's RIP is behind INT3.
        a.mov(rax, qword_ptr(rsp))?;
        a.out(0x71, eax)?;
        a.iretq()
    });
    g.store(DATA, 0x1111);
    g.store(DATA + 8, 0x2222);
    g.code(CODE, 64, |a| {
        let mut again = a.create_label();
        a.int3()?;
        a.mov(rcx, 0xf0f0u64)?;
        a.popcnt(rax, rcx)?;
        a.out(0x70, eax)?;
        a.mov(ebx, 0x3333)?;
        a.mov(ecx, 0x4444)?;
        a.mov(eax, 0x1111)?;
        a.mov(edx, 0x2222)?;
        a.lock().cmpxchg16b(xmmword_ptr(DATA))?;
        a.setz(al)?;
        a.movzx(eax, al)?;
        a.out(0x70, eax)?;
        a.mov(eax, 7)?;
        a.movd(xmm1, eax)?;
        a.xor(r8d, r8d)?;
        a.mov(esi, 50)?;
        a.set_label(&mut again)?;
        a.paddq(xmm1, xmm1)?;
        a.movq(rax, xmm1)?;
        a.xor(r8, rax)?;
        a.dec(esi)?;
        a.jnz(again)?;
        a.movss(dword_ptr(DATA + 0x10), xmm1)?;
        a.wait()?;
        a.mov(rax, r8)?;
        a.out(0x70, eax)?;
        a.out(i32::from(PORT_STOP), al)
    });
    g.run_to_stop(0);
    let mut value = 7u64;
    let sum = (0..50).fold(0, |s, _| {
        value = value.wrapping_add(value);
        s ^ value
    });
    assert_eq!(g.bus.out_values(0x70), [8, 1, sum & 0xffff_ffff]);
    assert_eq!(g.bus.out_values(0x71), [CODE + 1]);
    assert_eq!((g.load(DATA), g.load(DATA + 8)), (0x3333, 0x4444));
    assert_eq!(repairs.count(), 106);
    assert_eq!(g.statistic("emulation failures"), 106);
}

#[test]
fn faults_of_repaired_instructions() {
    let name = "faults_of_repaired_instructions";
    let Some((mut g, _)) = with_repairs(name, Setup::default()) else { return };
    g.gate(14, 0x2000);
    g.code(0x2000, 64, |a| {
        a.pop(rax)?;
        a.out(0x70, eax)?;
        a.mov(rax, cr2)?;
        a.out(0x70, eax)?;
        a.out(i32::from(PORT_STOP), al)
    });
    g.store(PT + (DATA >> 12) * 8, 0);
    g.long(0);
    g.code(CODE, 64, |a| a.popcnt(rax, qword_ptr(DATA + 8)));
    g.run_to_stop(0);
    assert_eq!(g.bus.out_values(0x70), [0, DATA + 8]);
    // A misaligned operand.
    g.gate(13, 0x2000);
    g.long(0);
    g.code(CODE, 64, |a| a.cmpxchg16b(xmmword_ptr(DATA + 0x1008)));
    g.bus.take();
    g.run_to_stop(0);
    assert_eq!(g.bus.out_values(0x70)[0], 0);
}

#[test]
fn nobody_can_execute_it() {
    let name = "nobody_can_execute_it";
    let Some((mut g, _)) = with_repairs(name, Setup::default()) else { return };
    g.long(0);
    g.code(CODE, 64, |a| a.vaddpd(ymm0, ymm1, ymm2));
    let VcpuExit::Failed(e) = g.run(0) else { panic!("it ran") };
    let e = e.to_string();
    assert!(e.contains("0x1000") && e.contains("c5 f5 58 c2") && e.contains("vaddpd"), "{e}");
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
        if self.tables { Finished::DoneTablesWritten } else { Finished::Done }
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
