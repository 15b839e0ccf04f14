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
    build(compiler, guest.arch, &target.join("bench").join(guest.arch), &[])
}

/// What the host's compiler makes for the host of the programs of a guest that it cannot run: as it would (`native`), and
/// (`scalar`) without what such a guest does not have, vectors, but with the fused multiplications that it has. The C
/// library's own functions use vectors in both.
pub fn for_host(target: &Path) -> anyhow::Result<[(&'static str, PathBuf); 2]> {
    let compiler: &[&str] = &["gcc"];
    if !works(compiler) {
        bail!(
            "no C compiler for the host's own figures: apt-get install gcc libc6-dev, or leave them out with --no-native"
        );
    }
    let dir = target.join("bench/host");
    let arch = std::env::consts::ARCH;
    let mut scalar = vec!["-fno-tree-vectorize", "-fno-tree-slp-vectorize", "-ffp-contract=fast"];
    if arch == "x86_64" {
        scalar.push("-mfma");
    }
    Ok([
        ("native", build(compiler, "host", &dir.join("native"), &[])?),
        ("scalar", build(compiler, "host", &dir.join("scalar"), &scalar)?),
    ])
}

fn build(compiler: &[&str], arch: &str, dir: &Path, more: &[&str]) -> anyhow::Result<PathBuf> {
    std::fs::create_dir_all(dir).with_context(|| dir.display().to_string())?;
    let from = crate::root().join("tests/xtask/bench");
    let x86 = matches!(arch, "x86_64" | "i386");
    let mut objects = Vec::new();
    for (source, name, own, for_x86) in SOURCES {
        if for_x86 && !x86 {
            continue;
        }
        let object = dir.join(name).with_extension("o");
        let mut command = Command::new(compiler[0]);
        command.args(&compiler[1..]).args(["-O2", "-std=gnu11", "-Wall", "-Wextra", "-c"]).args(more);
        // Debian's i386 compilers take any 686; its double arithmetic is measured both ways.
        if arch == "i386" && name == "float" {
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
