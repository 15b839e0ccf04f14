//! The same rows on the host itself, where it runs the guest's programs.

use std::path::Path;
use std::process::Command;

use anyhow::{Context, bail};

use super::sets::{self, JOBS, Set};
use super::{Options, PHASES, Row};
use crate::guests;

/// Runs the rows; those of the shell need the programs too, which time them.
pub fn run(options: &Options, programs: Option<&Path>, files: &guests::Bench) -> anyhow::Result<Vec<Row>> {
    let Some(programs) = programs else { return Ok(Vec::new()) };
    let mut rows = Vec::new();
    if options.phases {
        let dir = programs.with_file_name("bin");
        let _ = std::fs::remove_dir_all(&dir);
        std::fs::create_dir_all(&dir).with_context(|| dir.display().to_string())?;
        std::fs::copy(&files.busybox, dir.join("busybox")).context("busybox")?;
        output(Command::new(dir.join("busybox")).args(["--install", "-s"]).arg(&dir))?;
        for phase in PHASES.into_iter().filter(|p| options.wants(p) && *p != "parallel") {
            let mut command = Command::new(programs);
            command.args(["-r", phase]).arg(dir.join("busybox")).arg("sh").arg(&files.phases).arg(phase);
            rows.extend(ends(&output(command.env("PATH", &dir))?));
        }
    }
    if options.any_program() {
        rows.extend(ends(&output(Command::new(programs).args(options.program_rows()))?));
    }
    if let (Set::Job, Some(root)) = (options.set, &files.userland) {
        sets::copy_jobs(root)?;
        for job in options.wanted(&JOBS) {
            let mut command = Command::new(programs);
            command.args(["-r", job, "/usr/bin/unshare", "--map-root-user", "--root"]).arg(root);
            for (name, seconds, status) in ends(&output(command.args(["/bin/sh", "/job/job.sh", job]))?) {
                if status.is_none_or(|s| !s.trim_matches('0').is_empty()) {
                    bail!("{name} fails on the host itself: leave it out with --no-native");
                }
                rows.push((name, seconds, None));
            }
        }
    }
    Ok(rows)
}

/// Runs the rows by a program that is the guest's only by its source. Its values are left out if it need not compute the
/// same: products and sums are fused or not as it suits the compiler.
pub fn run_other(options: &Options, program: &Path, same: bool) -> anyhow::Result<Vec<Row>> {
    if !options.any_program() {
        return Ok(Vec::new());
    }
    let mut rows = ends(&output(Command::new(program).args(options.program_rows()))?);
    if !same {
        rows.iter_mut().for_each(|row| row.2 = None);
    }
    Ok(rows)
}

fn output(command: &mut Command) -> anyhow::Result<String> {
    let output = command.output().with_context(|| format!("{:?}", command.get_program()))?;
    if !output.status.success() {
        bail!("{command:?} failed: {}", String::from_utf8_lossy(&output.stderr).trim());
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// CPU seconds and values of finished rows.
fn ends(text: &str) -> Vec<Row> {
    let row = |line: &str| match line.split_whitespace().collect::<Vec<_>>().as_slice() {
        ["END", name, _, cpu, value] => Some(((*name).to_owned(), cpu.parse().ok()?, Some((*value).to_owned()))),
        _ => None,
    };
    text.lines().filter_map(row).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_are_read() {
        let rows = ends("BEGIN a\nEND a 0.5 0.25 00ff\nEND b x y\n");
        assert_eq!(rows, [("a".to_owned(), 0.25, Some("00ff".to_owned()))]);
    }
}
