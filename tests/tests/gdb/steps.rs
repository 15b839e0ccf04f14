//! A PC that makes a million single steps ends as one that runs.

use std::time::Instant;

use mimus_arch::CpuState;
use mimus_arch::x86::X86State;
use mimus_core::accel::{DebugStop, VcpuIndex};
use mimus_core::bus::{GuestPhys, GuestVirt, MemTxAttrs};
use mimus_tests::cpus::alone;

use crate::harness::{Debuggee, Engine, Setup};
use crate::programs::x86;

/// Each is more than thirty instructions.
const ROUNDS: u32 = 40_000;
/// Steps that the engine makes in one go.
const AT_ONCE: u64 = 10_000;

/// A guest of `arch` that will stop at the program's end.
fn guest(arch: &str, rounds: u32) -> Debuggee {
    let guest = Setup::new(arch, "pc", 1).rom(&x86::busy(arch == "x86_64", rounds)).start(Engine::Jit);
    let end = GuestVirt(x86::ROM + x86::END);
    let set = guest.threads.run_on_sync(VcpuIndex(0), move |v| v.debug().expect("it debugs").insert_breakpoint(end));
    set.unwrap().unwrap();
    guest
}

/// What does not depend on time, and the memory the program works on.
fn outcome(guest: &Debuggee) -> (X86State, Vec<u8>) {
    let CpuState::X86(mut state) = guest.target.state(0).unwrap() else { panic!("an x86 processor") };
    assert_eq!(state.linear_pc(), x86::ROM + x86::END);
    state.tsc = 0;
    let mut memory = vec![0; x86::DATA_LEN];
    assert!(guest.memory.read_bytes(GuestPhys(x86::DATA), &mut memory, MemTxAttrs::default()).is_ok());
    (*state, memory)
}

fn steps_end_as_the_free_run(arch: &str) {
    let _one = alone();
    let free = guest(arch, ROUNDS);
    assert_eq!(free.go(), DebugStop::Breakpoint);
    let (wanted, memory) = outcome(&free);
    assert_eq!(memory[..4], ROUNDS.to_le_bytes());
    assert_eq!(memory[32..36], (3 * ROUNDS).to_le_bytes());
    drop(free);
    let stepped = guest(arch, ROUNDS);
    let (begun, mut steps) = (Instant::now(), 0);
    loop {
        let set = stepped.threads.run_on_sync(VcpuIndex(0), |v| {
            let debug = v.debug().expect("it debugs");
            debug.set_single_step(true);
            debug.set_more_steps(AT_ONCE - 1);
        });
        set.unwrap();
        let stop = stepped.go();
        let left = stepped.threads.run_on_sync(VcpuIndex(0), |v| v.debug().expect("it debugs").more_steps());
        steps += AT_ONCE - left.unwrap().expect("the translator counts them");
        match stop {
            DebugStop::Step => {}
            DebugStop::Breakpoint => break,
            other => panic!("{other:?}"),
        }
    }
    println!("{arch}: {steps} steps, {:.0} a second", steps as f64 / begun.elapsed().as_secs_f64());
    assert!(steps > 1_000_000, "{steps}");
    let (state, bytes) = outcome(&stepped);
    assert_eq!(state, wanted);
    assert!(bytes == memory);
}

#[test]
fn a_million_steps_end_as_the_free_run_x86_64() {
    steps_end_as_the_free_run("x86_64");
}

#[test]
fn a_million_steps_end_as_the_free_run_i386() {
    steps_end_as_the_free_run("i386");
}
