//! Four vCPUs under load, paused, saved, restored, moved to other machines: nothing is lost or done twice.

use crate::harness::*;
use crate::interrupts::{LAPIC, init_pic};
use iced_x86::code_asm::*;
use mimus_arch::{CpuState, StateGroups};
use mimus_core::accel::*;
use mimus_core::vcpu::{VcpuEvent, VcpuThreads};
use std::sync::{Arc, Mutex, mpsc};
use std::time::{Duration, Instant};

/// A machine whose vCPUs have threads.
pub struct Live {
    pub guest: Guest,
    pub threads: VcpuThreads,
    events: mpsc::Receiver<VcpuEvent>,
}

impl Live {
    /// All vCPUs off, the machine paused.
    pub fn paused(mut guest: Guest) -> Self {
        let vcpus = std::mem::take(&mut guest.vcpus);
        let (send, events) = mpsc::channel();
        let send = Mutex::new(send);
        let handles = vcpus.iter().map(|v| v.handle()).collect();
        let threads = VcpuThreads::new(handles, move |e| _ = lock(&send).send(e));
        threads.spawn(vcpus, guest.bus.clone()).expect("threads");
        Self { guest, threads, events }
    }

    /// All vCPUs on and running.
    pub fn start(guest: Guest) -> Self {
        let live = Self::paused(guest);
        live.power_on();
        live.threads.resume();
        live
    }

    fn power_on(&self) {
        for i in 0..self.threads.count() {
            assert!(self.threads.power_on(VcpuIndex(i as u32), None));
        }
    }

    /// Waits until it is so; an event of a vCPU is not expected.
    pub fn wait_for(&self, what: &str, f: impl Fn(&Guest) -> bool) {
        let start = Instant::now();
        while !f(&self.guest) {
            self.check();
            assert!(start.elapsed() < Duration::from_secs(120), "timed out: {what}");
            std::thread::sleep(Duration::from_micros(500));
        }
    }

    fn check(&self) {
        if let Ok(event) = self.events.try_recv() {
            panic!("{event:?}");
        }
    }

    /// Ends the threads.
    pub fn stop(self) -> Guest {
        self.check();
        self.threads.stop();
        self.guest
    }

    fn states(&self) -> Vec<CpuState> {
        let state = |i| self.threads.run_on_sync(VcpuIndex(i as u32), |v| v.get_state(StateGroups::All));
        (0..self.threads.count()).map(|i| state(i).expect("a state")).collect()
    }

    fn set_states(&self, states: Vec<CpuState>) {
        for (i, state) in states.into_iter().enumerate() {
            let set = self.threads.run_on_sync(VcpuIndex(i as u32), move |v| v.set_state(&state));
            set.expect("served").expect("a valid state");
        }
    }
}

const VCPUS: usize = 4;
/// Per vCPU, 64 bytes: rounds, ticks of the timer.
const COUNTS: u64 = DATA;
const TOTAL: u64 = DATA + 0x800;
const WRONG: u16 = 0xee;

/// What the bus must see: every vCPU's accesses count up by one.
#[derive(Default)]
struct Sequences {
    out: [u64; VCPUS],
    read: [u64; VCPUS],
    write: [u64; VCPUS],
    errors: Vec<String>,
}

impl Sequences {
    fn see(&mut self, seen: &Seen) -> Option<u64> {
        let next = |last: &mut u64, value: u64, what: &Seen| {
            let error = (value != *last + 1).then(|| format!("{what:?} after {last}"));
            *last = value;
            error
        };
        let error = match *seen {
            Seen::Out(WRONG, _, value) => Some(format!("the guest read something else, vCPU {value}")),
            Seen::Out(port @ 0x80..0x84, _, value) => next(&mut self.out[usize::from(port) - 0x80], value, seen),
            Seen::Write(addr, _, value) => next(&mut self.write[((addr - HOLE) >> 12) as usize], value, seen),
            Seen::In(port @ 0x80..0x84, _) => {
                let count = &mut self.read[usize::from(port) - 0x80];
                *count += 1;
                return Some(*count);
            }
            _ => None,
        };
        self.errors.extend(error);
        None
    }
}

fn watch(g: &Guest, sequences: &Arc<Mutex<Sequences>>) {
    let sequences = sequences.clone();
    g.bus.quiet.store(true, std::sync::atomic::Ordering::Relaxed);
    g.bus.set_handler(move |_, seen| lock(&sequences).see(seen));
}

/// Counts, reads and writes ports and registers, halts now and then until its timer ticks.
fn supervisor(a: &mut CodeAssembler) -> Result<(), iced_x86::IcedError> {
    let mut again = a.create_label();
    let mut right = a.create_label();
    let mut awake = a.create_label();
    a.mov(ebx, LAPIC as u32)?;
    a.mov(dword_ptr(rbx + 0xf0), 0x1ff)?;
    a.mov(dword_ptr(rbx + 0x3e0), 0xb)?;
    a.mov(dword_ptr(rbx + 0x320), 0x2_0040)?;
    a.mov(dword_ptr(rbx + 0x380), 500_000)?;
    a.sti()?;
    a.set_label(&mut again)?;
    a.lock().inc(qword_ptr(TOTAL))?;
    a.inc(qword_ptr(r14))?;
    a.mov(rax, qword_ptr(r14))?;
    a.mov(edx, r15d)?;
    a.add(edx, 0x80)?;
    a.out(dx, eax)?;
    a.in_(eax, dx)?;
    a.cmp(rax, qword_ptr(r14))?;
    a.je(right)?;
    a.mov(eax, r15d)?;
    a.out(i32::from(WRONG), al)?;
    a.set_label(&mut right)?;
    a.mov(rax, qword_ptr(r14))?;
    a.mov(dword_ptr(r13), eax)?;
    a.test(al, 31)?;
    a.jnz(awake)?;
    a.hlt()?;
    a.set_label(&mut awake)?;
    a.jmp(again)
}

/// The same in user code, which has no ports.
fn user(a: &mut CodeAssembler) -> Result<(), iced_x86::IcedError> {
    let mut again = a.create_label();
    a.cvtsi2sd(xmm0, r15)?;
    a.set_label(&mut again)?;
    a.lock().inc(qword_ptr(TOTAL))?;
    a.inc(qword_ptr(r14))?;
    a.mov(rax, qword_ptr(r14))?;
    a.cvtsi2sd(xmm0, rax)?;
    a.cvttsd2si(rax, xmm0)?;
    a.mov(dword_ptr(r13), eax)?;
    a.jmp(again)
}

fn prepare(g: &mut Guest) {
    g.gate(0x40, 0x2000);
    // The end of interrupt through a register: the address is above 2 GiB.
    g.code(0x2000, 64, |a| {
        a.push(rax)?;
        a.inc(qword_ptr(r14 + 8))?;
        a.mov(eax, (LAPIC + 0xb0) as u32)?;
        a.mov(dword_ptr(rax), 0)?;
        a.pop(rax)?;
        a.iretq()
    });
    g.code(CODE, 64, supervisor);
    g.code(USER, 64, user);
    // The PIC is masked by the first vCPU's state, not by code: it has none.
    g.code(0x3000, 64, |a| {
        init_pic(a, [0xff, 0xff])?;
        a.out(i32::from(PORT_STOP), al)
    });
    g.long(0);
    g.change(0, |s| s.rip = 0x3000);
    g.run_to_stop(0);
    for i in 0..VCPUS {
        if i == VCPUS - 1 {
            g.user(i)
        } else {
            g.long(i)
        }
        g.change(i, |s| {
            // A stack of its own: interrupts are taken on it.
            s.gpr[4] -= 0x400 * i as u64;
            s.gpr[13] = HOLE + i as u64 * 0x1000;
            s.gpr[14] = COUNTS + i as u64 * 64;
            s.gpr[15] = i as u64;
        });
    }
}

/// To a machine made anew.
fn move_to_another(live: Live, sequences: &Arc<Mutex<Sequences>>) -> Live {
    let states = live.states();
    let chips: Vec<_> = live.guest.devices().iter().map(|(_, d)| d.save().expect("saved")).collect();
    let old = live.stop();
    let twin = old.twin();
    drop(old);
    watch(&twin, sequences);
    let live = Live::paused(twin);
    live.set_states(states);
    for ((name, device), chip) in live.guest.devices().iter().zip(chips) {
        device.restore(&chip).unwrap_or_else(|e| panic!("{name}: {e}"));
    }
    live.power_on();
    live
}

#[test]
fn a_thousand_rounds_of_save_and_restore() {
    rounds("a_thousand_rounds_of_save_and_restore", IrqChipMode::Kernel, 1000);
}

#[test]
fn rounds_with_split_controllers() {
    rounds("rounds_with_split_controllers", IrqChipMode::Split, 200);
}

fn rounds(name: &str, mode: IrqChipMode, rounds: u64) {
    let Some(mut g) = Setup::mode(mode).smp(VCPUS as u32).build(name) else { return };
    let sequences = Arc::new(Mutex::new(Sequences::default()));
    watch(&g, &sequences);
    prepare(&mut g);
    let mut live = Live::paused(g);
    live.power_on();
    for round in 0..rounds {
        live.threads.resume();
        std::thread::sleep(Duration::from_micros(400 + round % 7 * 100));
        live.threads.pause();
        live.check();
        if round % 40 == 39 {
            live = move_to_another(live, &sequences);
        } else {
            let states = live.states();
            live.set_states(states);
            for (_, device) in live.guest.devices() {
                let saved = device.save().expect("saved");
                device.restore(&saved).expect("restored");
            }
        }
        let s = lock(&sequences);
        assert!(s.errors.is_empty(), "round {round}: {:?}", s.errors);
    }
    // All still run.
    let counts = |g: &Guest| -> Vec<u64> { (0..VCPUS as u64).map(|i| g.load(COUNTS + i * 64)).collect() };
    let ticks = |g: &Guest| -> Vec<u64> { (0..VCPUS as u64 - 1).map(|i| g.load(COUNTS + 8 + i * 64)).collect() };
    let (before, ticked) = (counts(&live.guest), ticks(&live.guest));
    live.threads.resume();
    live.wait_for("every vCPU goes on", |g| counts(g).iter().zip(&before).all(|(now, then)| *now > then + 10));
    live.wait_for("every timer ticks", |g| ticks(g).iter().zip(&ticked).all(|(now, then)| now > then));
    live.threads.pause();
    // No increment was lost or made twice, but for a pair of them that a pause came between.
    let (counts, total) = (counts(&live.guest), live.guest.load(TOTAL));
    let sum: u64 = counts.iter().sum();
    assert!(total.abs_diff(sum) <= VCPUS as u64, "{total} in all, {counts:?}");
    let g = live.stop();
    let s = lock(&sequences);
    assert!(s.errors.is_empty(), "{:?}", s.errors);
    for (i, count) in counts.iter().enumerate() {
        let seen = if i == VCPUS - 1 { s.write[i] } else { s.out[i] };
        assert!(count.abs_diff(seen) <= 1, "vCPU {i} counted {count} and was seen {seen} times");
    }
    println!("{counts:?} rounds, {:?} ticks", ticks(&g));
}
