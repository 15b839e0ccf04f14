//! With `-icount` and `-seed`, a run repeats to the last instruction.

use std::path::Path;

use crate::harness::{Dir, Mimus, commands, skipped, x86_64_commands};

/// Boots a kernel without a root file system twice: it panics, and resets. Both runs' order of pages and address
/// spaces is the same to the end, and so is what they print.
fn repeats(test: &str, kernel: &str, args: &[&str]) {
    if !Path::new(kernel).exists() {
        return skipped(test, "the kernel is not there");
    }
    let dir = Dir::new(test);
    let run = |n: &str| {
        let (trace, serial) = (dir.path(&format!("{n}.trc")), dir.path(&format!("{n}.txt")));
        // No code is in this address space: what remains is where code is.
        let traced = format!("{trace},what=blocks,space=0x1234567");
        let written = format!("file:{serial}");
        let options = ["-icount", "shift=0,sleep=off", "-seed", "7", "-trace", &traced, "-serial", &written];
        let machine = ["-m", "256M", "-display", "none", "-no-reboot", "-kernel", kernel];
        let append = ["-append", "console=ttyS0 panic=-1 quiet"];
        let mut guest = Mimus::start(&[args, &machine, &append, &options].concat());
        guest.end();
        (std::fs::read(trace).unwrap(), std::fs::read(serial).unwrap())
    };
    let (first, again) = (run("first"), run("again"));
    let text = String::from_utf8_lossy(&first.1);
    assert!(text.contains("Kernel panic"), "{text}");
    assert!(first.1 == again.1, "{text}\n{}", String::from_utf8_lossy(&again.1));
    assert!(first.0.len() > 10_000);
    assert!(first.0 == again.0, "the traces have {} and {} bytes", first.0.len(), again.0.len());
}

#[test]
fn riscv64_repeats() {
    let Some(c) = commands("riscv64_repeats") else { return };
    repeats("riscv64_repeats", &c.kernel, &["system", "riscv64", "-M", "virt"]);
}

#[test]
fn x86_64_repeats() {
    let Some(c) = x86_64_commands("x86_64_repeats") else { return };
    repeats("x86_64_repeats", &c.kernel, &["system", "x86_64", "-M", "q35", "-accel", "tcg"]);
}
