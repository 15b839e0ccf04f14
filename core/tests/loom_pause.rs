//! Model check of the pause protocol, all interleavings up to a bound:
//! `RUSTFLAGS="--cfg loom" cargo test -p mimus-core --test loom_pause --release`.
#![cfg(loom)]

use loom::sync::Arc;
use loom::sync::atomic::{AtomicUsize, Ordering};
use loom::thread;
use mimus_core::vcpu::pause::Power;
use mimus_core::vcpu::{Enter, PauseGate};

fn model(f: impl Fn() + Sync + Send + 'static) {
    let mut b = loom::model::Builder::new();
    b.preemption_bound = Some(3);
    b.check(f);
}

/// A vCPU that enters at most twice; `running` counts those inside.
fn vcpu(gate: Arc<PauseGate>, running: Arc<AtomicUsize>, index: usize) -> thread::JoinHandle<()> {
    thread::spawn(move || {
        for _ in 0..2 {
            match gate.enter(index, || false) {
                Enter::Run => {
                    running.fetch_add(1, Ordering::SeqCst);
                    running.fetch_sub(1, Ordering::SeqCst);
                    gate.leave();
                }
                Enter::Work => unreachable!("no work was queued"),
                Enter::Stop => return,
            }
        }
    })
}

fn gate(vcpus: usize) -> Arc<PauseGate> {
    let gate = PauseGate::new(vcpus);
    (0..vcpus).for_each(|i| gate.set_power(i, Power::On));
    gate.resume();
    Arc::new(gate)
}

#[test]
fn pause_waits_for_everyone() {
    model(|| {
        let (gate, running) = (gate(2), Arc::new(AtomicUsize::new(0)));
        let threads = [0, 1].map(|i| vcpu(gate.clone(), running.clone(), i));
        gate.request_pause();
        gate.wait_paused();
        assert_eq!(running.load(Ordering::SeqCst), 0);
        gate.resume();
        gate.stop();
        threads.into_iter().for_each(|t| t.join().unwrap());
    });
}

#[test]
fn exclusive_excludes() {
    model(|| {
        let (gate, running) = (gate(1), Arc::new(AtomicUsize::new(0)));
        let t = vcpu(gate.clone(), running.clone(), 0);
        gate.begin_exclusive(false, || ());
        assert_eq!(running.load(Ordering::SeqCst), 0);
        gate.end_exclusive(false);
        gate.stop();
        t.join().unwrap();
    });
}

#[test]
fn exclusive_from_inside_against_pause() {
    model(|| {
        let gate = gate(2);
        let sections = Arc::new(AtomicUsize::new(0));
        let threads = [0, 1].map(|i| {
            let (gate, sections) = (gate.clone(), sections.clone());
            thread::spawn(move || {
                if gate.enter(i, || false) == Enter::Run {
                    gate.begin_exclusive(true, || ());
                    assert_eq!(sections.fetch_add(1, Ordering::SeqCst), 0);
                    sections.fetch_sub(1, Ordering::SeqCst);
                    gate.end_exclusive(true);
                    gate.leave();
                }
            })
        });
        gate.request_pause();
        gate.wait_paused();
        assert_eq!(sections.load(Ordering::SeqCst), 0);
        gate.resume();
        threads.into_iter().for_each(|t| t.join().unwrap());
    });
}
