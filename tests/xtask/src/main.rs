//! `cargo xtask`: the project's own tasks.

mod bench;
mod debugging;
mod deps;
mod fuzz;
mod guests;
mod kvm;
mod lint;

use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

use anyhow::{Context, bail};

const USAGE: &str = "\
usage: cargo xtask <task>

  check-deps                          who may depend on whom
  lint                                format, clippy, file lengths, names of this machine
  guests                              fetch what tests and benchmarks boot, into mimus's cache
  bench riscv64|x86_64|i386           mimus beside qemu-system-…, on the same guest, and native
      [--runs N] [--smp N]              how often, and with how many vCPUs
      [--phases | --programs]           busybox's rows, or those of tests/xtask/bench, only
      [--parallel]                      instead: several threads and processes on 4 vCPUs, wall time beside CPU time
      [--job]                           instead: tar, python3, gcc and make, from Debian's packages
      [--idle | --translation]          instead: a guest at its prompt; the translator's speed and code growth
      [--rows NAME,NAME]                only these
      [--only qemu|mimus] [--no-native] [--cpu MODEL] [--kernel FILE]
  bench kvm                           what exits and starts cost under KVM, beside qemu-system-x86_64
  bench debug [riscv64|x86_64|i386]   what breakpoints, traces and steps cost, beside QEMU's
      [--runs N] [--rows WORD,…] [--only mimus]
  fuzz x86 [--count N] [--seed N]     random sequences by the x86 translator and by the host; see fuzz x86 --help
  fuzz gdb [--count N] [--seed N]     packets that make no sense, debuggers that come and go; see fuzz gdb --help
  ci                                  check-deps, lint, and the whole test suite
";

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = args.iter().map(String::as_str).collect();
    let wants_help = words.iter().skip(1).any(|w| matches!(*w, "--help" | "-h"));
    let result = match words.as_slice() {
        [task, rest @ ..] if wants_help => help(task, rest),
        ["check-deps"] => deps::check(),
        ["lint"] => lint::run(),
        ["guests"] => guests::fetch(),
        ["bench", "kvm", rest @ ..] => kvm::bench(rest),
        ["bench", "debug", rest @ ..] => debugging::run(rest),
        ["bench", rest @ ..] => bench::run(rest),
        ["fuzz", rest @ ..] => fuzz::run(rest),
        ["ci"] => ci(),
        [] | ["help" | "-h" | "--help"] => {
            print!("{USAGE}");
            Ok(())
        }
        [other, ..] => Err(anyhow::anyhow!("there is no task '{other}'; see cargo xtask help")),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("xtask: {e:#}");
            ExitCode::FAILURE
        }
    }
}

/// What there is of one task: its lines of [`USAGE`], with those that belong to them.
fn help(task: &str, rest: &[&str]) -> anyhow::Result<()> {
    if task == "fuzz" {
        return fuzz::run(&["x86", "--help"]);
    }
    let which = rest.iter().copied().find(|w| matches!(*w, "kvm" | "debug"));
    let text = usage_of(task, which);
    if text.is_empty() {
        bail!("there is no task '{task}'; see cargo xtask help");
    }
    print!("usage: cargo xtask <task>\n\n{text}");
    Ok(())
}

/// The lines of `task`, or of the variant of it that `which` names.
fn usage_of(task: &str, which: Option<&str>) -> String {
    let (mut text, mut inside) = (String::new(), false);
    for line in USAGE.lines().skip(2) {
        // A task's options are further in.
        if !line.starts_with("   ") {
            let mut words = line.split_whitespace();
            inside = words.next() == Some(task) && which.is_none_or(|w| words.next() == Some(w));
        }
        if inside {
            text += line;
            text.push('\n');
        }
    }
    text
}

fn ci() -> anyhow::Result<()> {
    deps::check()?;
    lint::run()?;
    cargo(&["test", "--workspace"])
}

/// The repository.
pub fn root() -> PathBuf {
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    here.ancestors().nth(2).unwrap_or(here).to_owned()
}

/// Runs cargo at the root and wants success.
pub fn cargo(args: &[&str]) -> anyhow::Result<()> {
    let program = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let status = Command::new(program).args(args).current_dir(root()).status().context("cargo")?;
    if !status.success() {
        bail!("cargo {} failed", args.join(" "));
    }
    Ok(())
}

/// `cargo metadata` without third-party packages.
pub fn metadata() -> anyhow::Result<serde_json::Value> {
    let program = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let output = Command::new(program)
        .args(["metadata", "--no-deps", "--format-version", "1"])
        .current_dir(root())
        .output()
        .context("cargo metadata")?;
    if !output.status.success() {
        bail!("cargo metadata: {}", String::from_utf8_lossy(&output.stderr).trim());
    }
    Ok(serde_json::from_slice(&output.stdout)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn help_of_each_task() {
        for (task, which, says, lines) in [
            ("lint", None, "file lengths", 1),
            ("bench", Some("kvm"), "under KVM", 1),
            ("bench", Some("debug"), "--only mimus", 2),
            ("fuzz", None, "random sequences", 1),
        ] {
            let text = usage_of(task, which);
            assert!(text.contains(says) && text.lines().count() == lines, "{task}: {text}");
        }
        let bench = usage_of("bench", None);
        assert!(bench.contains("--parallel") && bench.contains("bench kvm") && !bench.contains("lint"), "{bench}");
        assert_eq!(usage_of("nothing", None), "");
    }
}
