//! How runs end: power-off, reset, panic, signals; and what one may cost.

use std::time::{Duration, Instant};

use rustix::process::Signal;

use crate::harness::{Mimus, commands};

#[test]
fn a_reset_ends_a_run_without_reboot() {
    let Some(c) = commands("a_reset_ends_a_run_without_reboot") else { return };
    let mut guest = c.boot(&["-no-reboot"]);
    guest.send("reboot -f\n");
    guest.end_well();
}

#[test]
fn a_kernel_panic_ends_a_run_without_reboot() {
    let Some(c) = commands("a_kernel_panic_ends_a_run_without_reboot") else { return };
    let mut guest = c.boot(&["-no-reboot"]);
    guest.send("exit 3\n");
    guest.wait_for("Attempted to kill init");
    guest.end_well();
}

#[test]
fn signals_end_it_and_say_so() {
    let Some(c) = commands("signals_end_it_and_say_so") else { return };
    for (signal, status) in [(Signal::TERM, 143), (Signal::INT, 130), (Signal::HUP, 129)] {
        let mut guest = c.boot(&[]);
        let asked = Instant::now();
        guest.signal(signal);
        assert_eq!(guest.end().code(), Some(status));
        assert!(asked.elapsed() < Duration::from_secs(10));
        let text = guest.transcript();
        assert!(text.contains(&format!("mimus: ended by signal {}", status - 128)), "{text}");
    }
}

#[test]
fn no_shutdown_waits_for_the_monitor() {
    let Some(c) = commands("no_shutdown_waits_for_the_monitor") else { return };
    let mut guest = c.boot(&["-no-shutdown"]);
    guest.send("poweroff -f\n");
    guest.send("\x01c");
    guest.wait_for("(mimus) ");
    for _ in 0..200 {
        guest.send("info status\n");
        if guest.wait_for("(mimus) ").contains("shutdown") {
            guest.send("quit\n");
            return guest.end_well();
        }
        std::thread::sleep(Duration::from_millis(50));
    }
    panic!("it never was shut down:\n{}", guest.transcript());
}

#[test]
fn a_machine_starts_paused_on_demand() {
    let Some(c) = commands("a_machine_starts_paused_on_demand") else { return };
    let args = ["-S", "-kernel", &c.kernel, "-initrd", &c.initrd, "-append", "console=ttyS0 earlycon=sbi"];
    let mut guest = Mimus::riscv64(&args);
    guest.send("\x01c");
    guest.wait_for("(mimus) ");
    guest.send("info status\n");
    let status = guest.wait_for("(mimus) ");
    assert!(status.contains("paused"), "{status}");
    std::thread::sleep(Duration::from_millis(300));
    assert!(!guest.transcript().contains("Linux version"));
    guest.send("cont\n\x01c");
    guest.wait_for("Linux version");
}
