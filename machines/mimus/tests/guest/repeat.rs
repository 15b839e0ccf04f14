//! With `-icount` and `-seed`, a run repeats to the last instruction.

use std::path::Path;

use crate::harness::{Commands, Dir, Mimus, commands, i386_commands, skipped, x86_64_commands};

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

#[test]
fn i386_repeats() {
    let Some(c) = i386_commands("i386_repeats") else { return };
    repeats("i386_repeats", &c.kernel, &["system", "i386", "-M", "pc", "-accel", "tcg"]);
}

/// A Linux with a disk that is read and written, from its first instruction to its last: what was typed comes again at the
/// same instructions, and nothing else does; what the disk answers comes at the same instructions of itself.
fn recorded_input_comes_again(test: &str, c: Option<Commands>, args: &[&str]) {
    let Some(c) = c else { return };
    let dir = Dir::new(test);
    let (inputs, disk) = (dir.path("inputs"), dir.path("disk"));
    let contents: Vec<u8> = (0..1u32 << 20).map(|i| (i.wrapping_mul(0x9e37_79b9) >> 24) as u8).collect();
    std::fs::write(&disk, contents).unwrap();
    let drive = format!("file={disk},format=raw,if=virtio");
    let run = |option: &str, trace: &str| {
        let traced = format!("{trace},what=blocks,space=0x1234567");
        let own = ["-icount", "shift=0", option, &inputs, "-trace", &traced, "-drive", &drive, "-snapshot"];
        let mut guest = c.boot(&[args, &own].concat());
        if option == "-record" {
            assert_eq!(guest.run("echo $((6 * 7))"), "42");
            let sum = guest.run("md5sum < /dev/vda");
            guest.run("dd if=/dev/vda of=/dev/vda bs=4k count=64 seek=100 conv=notrunc,fsync 2>/dev/null");
            guest.run("echo 3 > /proc/sys/vm/drop_caches");
            assert_ne!(guest.run("md5sum < /dev/vda"), sum);
            guest.send("poweroff -f\n");
        } else {
            guest.send("echo wrong\n");
        }
        guest.end_well();
        let text = guest.transcript();
        // What mimus itself says of the trace comes by another pipe, and may be read before the guest's last words.
        let (before, after) = text.split_once("mimus: trace").unwrap_or((&text, ""));
        let printed = format!("{before}{}", after.split_once('\n').map_or("", |(_, rest)| rest));
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

#[test]
fn recorded_input_comes_again_riscv64() {
    let test = "recorded_input_comes_again_riscv64";
    recorded_input_comes_again(test, commands(test), &[]);
}

#[test]
fn recorded_input_comes_again_x86_64() {
    let test = "recorded_input_comes_again_x86_64";
    recorded_input_comes_again(test, x86_64_commands(test), &["-M", "q35", "-accel", "tcg"]);
}

#[test]
fn recorded_input_comes_again_i386() {
    let test = "recorded_input_comes_again_i386";
    recorded_input_comes_again(test, i386_commands(test), &["-M", "pc", "-accel", "tcg"]);
}
