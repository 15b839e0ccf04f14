//! Programs that try what the processor and the kernel do together: signals at every instruction, returns to odd segments,
//! single steps through every class of instruction, ports, local descriptor tables, ways to call, FS and GS bases, pages
//! that are not to be executed, traps. They check themselves, and what they compute must be what the host's own processor
//! computes in the same program.
//!
//! `selftests/` has their source: C and assembly without a library, built for both widths by the host's gcc.

use std::path::{Path, PathBuf};
use std::process::Command;

use mimus_machines::guests::cpio::Archive;

use crate::harness::{Commands, Dir, generic_commands, i386_commands, skipped};

/// What `rt.c` calls them. The last ones the host does not run: its hypervisor may have no DEBUGCTL.BTF (`blocks`), and some make
/// an endless trap of `icebp`.
const TESTS: [&str; 10] =
    ["loops", "sigreturns", "steps", "ports", "ldts", "calls", "bases", "no_exec", "traps", "stack_loads"];
const LAST: [&str; 3] = ["initial_state", "blocks", "icebp"];

/// The program of this width, built into `dir`; what hinders, if it cannot be.
fn build(dir: &Dir, bits: u32) -> Result<PathBuf, String> {
    let from = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/guest/selftests");
    let entries = std::fs::read_dir(&from).unwrap().map(|e| e.unwrap().path());
    let mut sources: Vec<PathBuf> = entries.filter(|p| p.extension().is_some_and(|e| e == "c" || e == "S")).collect();
    sources.sort();
    let to = dir.0.join(format!("selftests{bits}"));
    let mut gcc = Command::new("gcc");
    gcc.arg(format!("-m{bits}")).args(["-std=gnu11", "-O2", "-Wall", "-Wextra"]);
    // No library; nothing in vector registers but what the tests put there; addresses that do not change.
    gcc.args(["-ffreestanding", "-nostdlib", "-static", "-no-pie", "-fno-pie", "-fno-stack-protector"]);
    gcc.args(["-mgeneral-regs-only", "-fcf-protection=none", "-Wl,-e,initial_entry", "-Wl,-z,noexecstack"]);
    let output = gcc.args(&sources).arg("-o").arg(&to).output().map_err(|e| format!("gcc: {e}"))?;
    if output.status.success() {
        return Ok(to);
    }
    let says = String::from_utf8_lossy(&output.stderr).into_owned();
    // Another processor's compiler has no such option; anything else is a mistake of ours.
    let foreign = cfg!(not(target_arch = "x86_64"));
    assert!(foreign, "gcc -m{bits}: {says}");
    Err(format!("this host's gcc does not build x86 programs: {}", says.lines().next().unwrap_or_default()))
}

/// Lines of results by the host's own processor and kernel; none if it does not run the program.
fn natively(test: &str, program: &Path) -> Option<String> {
    let output = Command::new(program).args(TESTS).output();
    match output {
        Ok(o) if o.status.success() => Some(String::from_utf8_lossy(&o.stdout).into_owned()),
        other => {
            skipped(test, &format!("{} does not run on the host itself: {other:?}", program.display()));
            None
        }
    }
}

/// What was computed, which is the same everywhere.
fn values(text: &str) -> Vec<&str> {
    text.lines().map(str::trim).filter(|l| l.starts_with("value ")).collect()
}

fn passes(test: &str, commands: Option<Commands>, widths: &[u32]) {
    let Some(mut c) = commands else { return };
    let dir = Dir::new(test);
    let mut archive = Archive::default();
    let mut programs = Vec::new();
    for bits in widths {
        match build(&dir, *bits) {
            Ok(program) => {
                archive.file(&format!("selftests{bits}"), 0o755, &std::fs::read(&program).unwrap());
                programs.push((*bits, program));
            }
            Err(why) => return skipped(test, &why),
        }
    }
    // The kernel unpacks archives that follow one another.
    let mut initrd = std::fs::read(&c.initrd).unwrap();
    initrd.extend(archive.finish_gzip().unwrap());
    let path = dir.path("initrd.gz");
    std::fs::write(&path, initrd).unwrap();
    c.initrd = path;
    let mut guest = c.boot(&["-M", "q35", "-no-reboot", "-accel", "tcg", "-nic", "none"]);
    for (bits, program) in programs {
        let native = natively(test, &program);
        for name in TESTS.into_iter().chain(LAST) {
            let text = guest.run(&format!("/selftests{bits} {name}"));
            let ended = text.lines().any(|l| l.trim() == format!("end {name}"));
            assert!(ended && !text.contains("FAIL"), "{bits} bits: {text}");
            assert!(text.contains(&format!("ok {name}:")) || text.contains(&format!("skip {name}:")), "{text}");
            let Some(native) = &native else { continue };
            assert!(!native.contains(&format!("FAIL {name}")), "the host itself, {bits} bits: {native}");
            let own = format!("value {name} ");
            let there: Vec<&str> = values(native).into_iter().filter(|l| l.starts_with(&own)).collect();
            let same = values(&text) == there
                || text.contains(&format!("skip {name}:"))
                || native.contains(&format!("skip {name}:"));
            assert!(same, "{bits} bits: the host has {there:?}\n{text}");
        }
    }
    guest.send("poweroff -f\n");
    guest.end_well();
}

/// 64-bit programs, and 32-bit ones under the same kernel.
#[test]
fn programs_of_both_widths_under_the_amd64_kernel() {
    let test = "programs_of_both_widths_under_the_amd64_kernel";
    passes(test, generic_commands(test), &[64, 32]);
}

#[test]
fn programs_under_the_686_kernel() {
    let test = "programs_under_the_686_kernel";
    passes(test, i386_commands(test), &[32]);
}
