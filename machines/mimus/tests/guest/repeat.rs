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

/// What was typed comes again at the same instructions, and nothing else does.
#[test]
fn recorded_input_comes_again() {
    let Some(c) = commands("recorded_input_comes_again") else { return };
    let dir = Dir::new("recorded_input");
    let inputs = dir.path("inputs");
    let run = |option: &str, trace: &str| {
        let traced = format!("{trace},what=blocks,space=0x1234567");
        let mut guest = c.boot(&["-icount", "shift=0", option, &inputs, "-trace", &traced]);
        if option == "-record" {
            assert_eq!(guest.run("echo $((6 * 7))"), "42");
            guest.send("poweroff -f\n");
        } else {
            guest.send("echo wrong\n");
        }
        guest.end_well();
        let text = guest.transcript();
        let printed = text.split("mimus: trace").next().unwrap_or_default().to_owned();
        (printed, std::fs::read(trace).unwrap())
    };
    let first = run("-record", &dir.path("first.trc"));
    let again = run("-replay", &dir.path("again.trc"));
    let noted = std::fs::read_to_string(&inputs).unwrap();
    assert!(noted.starts_with("mimus-inputs 1 seed=1\n") && noted.lines().count() > 1, "{noted}");
    assert!(first.0.contains("42") && first.0 == again.0, "{}\n{}", first.0, again.0);
    assert!(first.1 == again.1, "the traces have {} and {} bytes", first.1.len(), again.1.len());
    assert!(first.1.len() > 10_000);
}
