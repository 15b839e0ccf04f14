//! The benchmark's programs (tests/xtask/bench), compiled for a guest.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, bail};

use super::Guest;

/// Each source with arguments of its own; the bool: only for x86.
const SOURCES: [(&str, &str, &[&str], bool); 9] = [
    ("main.c", "main", &[], false),
    ("integer.c", "integer", &[], false),
    ("structure.c", "structure", &[], false),
    ("float.c", "float", &[], false),
    ("memory.c", "memory", &[], false),
    ("kernel.c", "kernel", &[], false),
    ("parallel.c", "parallel", &["-pthread"], false),
    ("simd.c", "simd", &["-msse2"], true),
    ("float.c", "x87", &["-DX87", "-mfpmath=387"], true),
];

/// Builds them; gives the one static program, below `target`.
pub fn programs(guest: &Guest, target: &Path) -> anyhow::Result<PathBuf> {
    let compiler = guest.compilers.iter().find(|c| works(c)).with_context(|| {
        let names: Vec<String> = guest.compilers.iter().map(|c| c.join(" ")).collect();
        format!(
            "no C compiler for {} ({}): apt-get install {}, or leave the programs out with --phases",
            guest.arch,
            names.join(" or "),
            guest.compiler_package
        )
    })?;
    let dir = target.join("bench").join(guest.arch);
    std::fs::create_dir_all(&dir).with_context(|| dir.display().to_string())?;
    let from = crate::root().join("tests/xtask/bench");
    let x86 = guest.arch != "riscv64";
    let mut objects = Vec::new();
    for (source, name, own, for_x86) in SOURCES {
        if for_x86 && !x86 {
            continue;
        }
        let object = dir.join(name).with_extension("o");
        let mut command = Command::new(compiler[0]);
        command.args(&compiler[1..]).args(["-O2", "-std=gnu11", "-Wall", "-Wextra", "-c"]);
        // Debian's i386 compilers take any 686; its double arithmetic is measured both ways.
        if guest.arch == "i386" && name == "float" {
            command.args(["-msse2", "-mfpmath=sse"]);
        }
        if x86 {
            command.arg("-DWITH_X86");
        }
        command.args(own).arg(from.join(source)).arg("-o").arg(&object);
        run(&mut command)?;
        objects.push(object);
    }
    let program = dir.join("programs");
    let mut command = Command::new(compiler[0]);
    run(command.args(&compiler[1..]).args(["-static", "-pthread"]).args(&objects).args(["-lm", "-o"]).arg(&program))?;
    Ok(program)
}

/// Whether it makes static programs: a compiler may be there without the library.
fn works(compiler: &[&str]) -> bool {
    let mut command = Command::new(compiler[0]);
    command.args(&compiler[1..]).args(["-static", "-x", "c", "-", "-o", "/dev/null"]);
    let child = command.stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::null()).spawn();
    let Ok(mut child) = child else { return false };
    if let Some(mut input) = child.stdin.take() {
        let _ = std::io::Write::write_all(&mut input, b"#include <stdio.h>\nint main(void) { return puts(\"\"); }\n");
    }
    child.wait().is_ok_and(|status| status.success())
}

fn run(command: &mut Command) -> anyhow::Result<()> {
    let output = command.output().with_context(|| format!("{:?}", command.get_program()))?;
    if !output.status.success() {
        bail!("{command:?} failed: {}", String::from_utf8_lossy(&output.stderr).trim());
    }
    Ok(())
}
