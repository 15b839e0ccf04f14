//! Linux, saved in the middle of its boot and gone on with in another machine.

use std::io::Write;
use std::path::PathBuf;

use mimus_machines::guests::cpio::Archive;
use mimus_machines::guests::{self, GuestSpec};
use mimus_tests::cpus::alone;

use crate::harness::{Engine, Guest, Setup};

const MEMORY: u64 = 256 << 20;

/// Says on the real standard error, which the test runner does not keep to itself, that a test does not run.
fn skipped(test: &str, reason: &str) {
    let _ = writeln!(std::io::stderr(), "SKIPPED ({test}): {reason}");
}

/// The files of a guest that was fetched before.
fn installed(test: &str, spec: &GuestSpec) -> Option<PathBuf> {
    let dir = guests::cache_dir().ok().and_then(|cache| guests::installed(spec, &cache));
    if dir.is_none() {
        skipped(test, &format!("guest {} is not there: cargo xtask guests", spec.name));
    }
    dir
}

/// Works, shows what came out, waits on timers, works on another CPU; ends.
const INIT: &str = r#"#!/bin/busybox sh
/bin/busybox mkdir -p /proc
/bin/busybox mount -t proc proc /proc
/bin/busybox --install -s /bin
export PATH=/bin
for i in 1 2 3 4 5 6; do
    echo "<$i> $(seq 1 1500 | sha256sum) $(grep -c ^processor /proc/cpuinfo)"
    sleep 0.05
done
echo 'taskset:' $(taskset 1 echo one) $(taskset 2 echo two)
poweroff -f
"#;

fn setup(test: &str) -> Option<Setup> {
    let kernel = installed(test, &guests::RISCV64_KERNEL)?;
    let busybox = installed(test, &guests::RISCV64_BUSYBOX)?;
    let mut archive = Archive::default();
    ["bin", "dev", "proc"].into_iter().for_each(|d| _ = archive.directory(d));
    archive.character_device("dev/console", 0o600, 5, 1);
    archive.file("bin/busybox", 0o755, &std::fs::read(busybox.join("busybox")).unwrap());
    archive.file("init", 0o755, INIT.as_bytes());
    let mut setup = Setup::new(2, MEMORY).device("virtio-rng-device");
    setup.config.boot.initrd = Some(setup.file("initrd", &archive.finish_gzip().unwrap()));
    setup.config.boot.kernel = Some(kernel.join("linux"));
    setup.config.boot.append = Some("console=ttyS0 panic=-1".into());
    Some(setup)
}

/// The lines without their times, what the time is, and complaints about a host that was busy.
fn lines(text: &str) -> Vec<String> {
    const BUSY: [&str; 5] = ["rcu", "clocksource", "watchdog", "hrtimer", "setting system clock"];
    let without_time = |line: &str| match line.split_once("] ") {
        Some((time, rest)) if time.starts_with('[') => rest.to_owned(),
        _ => line.to_owned(),
    };
    let lines = text.lines().map(|l| without_time(l.trim_end()));
    lines.filter(|l| !BUSY.iter().any(|b| l.contains(b))).collect()
}

/// In an order that does not depend on which of two CPUs is faster.
fn sorted(mut lines: Vec<String>) -> Vec<String> {
    lines.sort();
    lines
}

/// Runs until there are `n` more lines.
fn run_lines(guest: &mut Guest, n: usize) {
    let count = |text: &[u8]| text.iter().filter(|b| **b == b'\n').count();
    let want = count(guest.console.text().as_bytes()) + n;
    guest.run_until(move |text| count(text) >= want);
}

#[test]
fn saved_while_it_boots() {
    let Some(setup) = setup("saved_while_it_boots") else { return };
    let _alone = alone();
    let mut guest = setup.start(Engine::Jit);
    let mut text = String::new();
    // Early, while drivers start, and in the shell script, on the way from machine to machine.
    for more in [5, 60, 40] {
        run_lines(&mut guest, more);
        let snapshot = guest.save();
        text += &guest.console.text();
        drop(guest);
        guest = setup.restored(Engine::Jit, &snapshot);
    }
    let middle = guest.save();
    guest.run_to_end();
    let rest = guest.console.text();
    drop(guest);
    // The same snapshot again gives the same again.
    let mut again = setup.restored(Engine::Jit, &middle);
    again.run_to_end();
    assert_eq!(sorted(lines(&rest)), sorted(lines(&again.console.text())));
    let whole = lines(&(text + &rest));
    let steps = whole.iter().filter(|l| l.starts_with('<')).collect::<Vec<_>>();
    assert_eq!(steps.len(), 6, "{whole:#?}");
    for (i, step) in steps.iter().enumerate() {
        let sum = "123a62492188c25fed39dd119a4c03de7a17c6740d63efe9ed1578689fb9d80d";
        assert!(step.starts_with(&format!("<{}> {sum}", i + 1)) && step.ends_with(" 2"), "{step}");
    }
    assert!(whole.iter().any(|l| l == "taskset: one two"), "{whole:#?}");
}
