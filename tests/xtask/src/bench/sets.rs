//! The sets of rows that can be measured.

use std::path::{Path, PathBuf};

use anyhow::Context;
use mimus_machines::guests::cpio::Archive;

/// Timed by scripts/bench-phases.sh.
pub const PHASES: [&str; 6] = ["md5sum", "sha256sum", "gzip", "shell", "fork+exec", "parallel"];
/// Of several threads and processes: bench/parallel.c.
pub const PARALLEL: [&str; 4] = ["spin-locks", "futex-ping-pong", "shared-counters", "parallel-make"];
/// Done by a distribution's programs: bench/job/job.sh.
pub const JOBS: [&str; 4] = ["job-tar", "job-python", "job-gcc", "job-make"];
/// CPU time of a guest that waits at its prompt.
pub const IDLE: &str = "idle, % of a core";
/// How often threads of the emulator slept meanwhile.
pub const WAKEUPS: &str = "idle, wake-ups a second";
/// What the translator says of itself once the guest has booted.
pub const BLOCK_TIME: &str = "translation, ns a block";
/// The same by instruction of the guest.
pub const INSN_TIME: &str = "translation, ns an insn";
/// Bytes of code made, by bytes of the guest's.
pub const GROWTH: &str = "code growth";

/// What is measured beside booting.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Set {
    /// Busybox's phases and the programs, or either.
    Usual,
    Parallel,
    Job,
    Idle,
    Translation,
}

impl Set {
    /// By the option's name.
    pub fn parse(option: &str) -> Option<Set> {
        Some(match option {
            "--parallel" => Set::Parallel,
            "--job" => Set::Job,
            "--idle" => Set::Idle,
            "--translation" => Set::Translation,
            _ => return None,
        })
    }

    /// vCPUs unless said otherwise.
    pub fn smp(self) -> u32 {
        if self == Set::Parallel { 4 } else { 1 }
    }

    /// Guest RAM, in MiB: also how its mapping is told from the others.
    pub fn ram_mib(self) -> u64 {
        if self == Set::Job { 1024 } else { 512 }
    }

    /// Whether wall time is given a row as well: it says something where threads wait for each other.
    pub fn has_wall_rows(self, smp: u32) -> bool {
        smp > 1 && matches!(self, Set::Parallel | Set::Job)
    }
}

/// An initrd of a distribution's programs, the jobs, and what `bench` has. The archive that is not compressed comes first, as
/// its members have to be aligned.
pub fn job_initrd(userland: &Path, bench: &Path, target: &Path) -> anyhow::Result<PathBuf> {
    let from = crate::root().join("tests/xtask/bench");
    let read = |path: &Path| std::fs::read(path).with_context(|| path.display().to_string());
    let mut jobs = Archive::default();
    jobs.directory("root/job");
    for name in job_files() {
        let file = Path::new(name).file_name().unwrap_or_default().to_string_lossy();
        jobs.file(&format!("root/job/{file}"), 0o755, &read(&from.join(name))?);
    }
    let mut bytes = read(userland)?;
    bytes.extend(jobs.finish_gzip()?);
    bytes.extend(read(bench)?);
    let path = target.join("job-initrd");
    std::fs::write(&path, bytes).with_context(|| path.display().to_string())?;
    Ok(path)
}

/// Puts the jobs where the host's own run looks for them.
pub fn copy_jobs(root: &Path) -> anyhow::Result<()> {
    let to = root.join("job");
    std::fs::create_dir_all(&to).with_context(|| to.display().to_string())?;
    for name in job_files() {
        let path = to.join(Path::new(name).file_name().unwrap_or_default());
        std::fs::copy(crate::root().join("tests/xtask/bench").join(name), &path)
            .with_context(|| path.display().to_string())?;
    }
    Ok(())
}

fn job_files() -> [&'static str; 8] {
    ["job/job.sh", "job/loop.py", "job/Makefile", "bench.h", "integer.c", "structure.c", "memory.c", "float.c"]
}

/// The rows in what the translator says of itself: ours to `info accel`, QEMU's to `info jit`, which has no times.
pub fn translation_rows(answer: &[String]) -> Vec<(String, f64, Option<String>)> {
    let number = |text: &str| text.split_whitespace().last().and_then(|n| n.trim_end_matches(')').parse::<f64>().ok());
    let field = |name: &str| answer.iter().find(|l| l.trim_start().starts_with(name)).and_then(|l| number(l));
    let mut rows = Vec::new();
    let mut row = |name: &str, value: Option<f64>| rows.extend(value.map(|v| (name.to_owned(), v, None)));
    let by = |a: &str, b: &str| Some(field(a)? / field(b).filter(|b| *b > 0.0)?);
    row(BLOCK_TIME, by("translation ns", "blocks translated"));
    row(INSN_TIME, by("translation ns", "guest instructions translated"));
    row(GROWTH, by("host code bytes made", "guest code bytes translated").or_else(|| field("TB avg host size")));
    rows
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lines(text: &str) -> Vec<String> {
        text.lines().map(str::to_owned).collect()
    }

    #[test]
    fn answers_of_both_are_read() {
        let rows = translation_rows(&lines(
            "TB avg target size  17 max=4096 bytes\nTB avg host size    326 bytes (expansion ratio: 18.4)",
        ));
        assert_eq!(rows, [(GROWTH.to_owned(), 18.4, None)]);
        let rows = translation_rows(&lines(
            "blocks translated: 10\nguest instructions translated: 80\nguest code bytes translated: 300\nhost code bytes made: 1500\ntranslation ns: 20000",
        ));
        let values: Vec<(&str, f64)> = rows.iter().map(|r| (r.0.as_str(), r.1)).collect();
        assert_eq!(values, [(BLOCK_TIME, 2000.0), (INSN_TIME, 250.0), (GROWTH, 5.0)]);
    }
}
