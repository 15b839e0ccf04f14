//! Mimus beside QEMU: the same kernel, initrd and machine, in turn, several times.
//!
//! The guest times its phases by its own clock and prints them; the boot is timed on the
//! host, from the start of the process to the guest's first line. Only ratios from runs
//! made in turn on one machine mean anything.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use mimus_machines::guests::init::BENCH_APPEND;

use crate::guests;

/// Longest that one run may take.
const LIMIT: Duration = Duration::from_secs(600);
/// Clock ticks in a second in /proc/PID/stat: USER_HZ, 100 on every Linux.
const USER_HZ: f64 = 100.0;
const BOOT: &str = "boot to /init";
const CPU: &str = "CPU time";
const RSS: &str = "RSS after boot, MiB";
const OWN: &str = "  of it not guest RAM";
const START: &str = "start to first store, ms";
/// Guest RAM, in MiB: also how its mapping is told from the others.
const RAM_MIB: u64 = 512;

struct Options {
    runs: usize,
    smp: u32,
    emulators: Vec<String>,
}

/// `bench riscv64 [--runs N] [--smp N]`
pub fn run(words: &[&str]) -> anyhow::Result<()> {
    let options = parse(words)?;
    let files = guests::bench()?;
    if options.emulators.iter().any(|e| e == "mimus") {
        crate::cargo(&["build", "--release", "--package", "mimus"])?;
    }
    let target = crate::metadata()?["target_directory"]
        .as_str()
        .map(PathBuf::from)
        .context("cargo metadata names no target directory")?;
    let mimus = target.join("release/mimus");
    let with_qemu = options.emulators.iter().any(|e| e == "qemu");
    if with_qemu && Command::new("qemu-system-riscv64").arg("-version").stdout(Stdio::null()).status().is_err() {
        bail!(
            "qemu-system-riscv64 is not installed: apt-get install qemu-system-misc (newer releases: qemu-system-riscv), or time mimus alone with --only mimus"
        );
    }
    let mut results: BTreeMap<String, Vec<Vec<(String, f64)>>> = BTreeMap::new();
    for round in 1..=options.runs {
        for name in &options.emulators {
            let command = if name == "qemu" { qemu() } else { ours(&mimus) };
            let starting = if name == "qemu" { qemu() } else { ours(&mimus) };
            let mut rows = one(command, &files, options.smp).with_context(|| format!("run {round} of {name}"))?;
            rows.insert(1, (START.to_owned(), start(starting, &target)?));
            let boot = rows.iter().find(|(row, _)| row == BOOT).map_or(0.0, |(_, s)| *s);
            println!("run {round} of {name}: {boot:.2} s to /init");
            results.entry(name.clone()).or_default().push(rows);
        }
    }
    print!("{}", table(&results, options.smp));
    Ok(())
}

fn parse(words: &[&str]) -> anyhow::Result<Options> {
    let mut options = Options { runs: 3, smp: 1, emulators: vec!["qemu".into(), "mimus".into()] };
    let mut words = words.iter();
    match words.next() {
        Some(&"riscv64") => {}
        _ => bail!("bench: the guest is missing or unknown: cargo xtask bench riscv64"),
    }
    while let Some(word) = words.next() {
        let mut number = || {
            words
                .next()
                .and_then(|n| n.parse::<u32>().ok())
                .filter(|n| *n > 0)
                .with_context(|| format!("{word} takes a number above 0"))
        };
        match *word {
            "--runs" => options.runs = number()? as usize,
            "--smp" => options.smp = number()?,
            "--only" => match words.next() {
                Some(&name @ ("qemu" | "mimus")) => options.emulators = vec![name.into()],
                _ => bail!("--only takes qemu or mimus"),
            },
            other => bail!("bench: there is no option '{other}'; there are --runs N, --smp N, --only qemu|mimus"),
        }
    }
    Ok(options)
}

fn qemu() -> Command {
    let mut command = Command::new("qemu-system-riscv64");
    command.args(["-accel", "tcg"]);
    command
}

fn ours(mimus: &Path) -> Command {
    let mut command = Command::new(mimus);
    command.args(["system", "riscv64", "-accel", "tcg"]);
    command
}

/// Ends the emulator whatever happens.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// One run: its rows, in order.
fn one(mut command: Command, files: &guests::Bench, smp: u32) -> anyhow::Result<Vec<(String, f64)>> {
    let start = Instant::now();
    let child = command
        .args([
            "-M",
            "virt",
            "-m",
            &RAM_MIB.to_string(),
            "-nographic",
            "-no-reboot",
            "-smp",
            &smp.to_string(),
            "-append",
            BENCH_APPEND,
        ])
        .arg("-kernel")
        .arg(&files.kernel)
        .arg("-initrd")
        .arg(&files.initrd)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::inherit())
        .spawn()
        .with_context(|| format!("{:?}", command.get_program()))?;
    let mut running = Running(child);
    let lines = lines_of(running.0.stdout.take().context("no output")?);
    let mut rows = Vec::new();
    let mut last = Vec::new();
    loop {
        let left = LIMIT.saturating_sub(start.elapsed());
        let (at, line) = match lines.recv_timeout(left) {
            Ok(got) => got,
            Err(RecvTimeoutError::Timeout) => {
                bail!("no end after {} s; its last lines:\n{}", LIMIT.as_secs(), last.join("\n"))
            }
            Err(RecvTimeoutError::Disconnected) => {
                bail!("it ended before the benchmark did; its last lines:\n{}", last.join("\n"))
            }
        };
        let pid = running.0.id();
        match line.split_whitespace().collect::<Vec<_>>().as_slice() {
            ["BENCH", "boot", _] => {
                rows.push((BOOT.to_owned(), (at - start).as_secs_f64()));
                rows.extend(resident_mib(pid).map(|mib| (RSS.to_owned(), mib)));
                rows.extend(own_mib(pid).map(|mib| (OWN.to_owned(), mib)));
            }
            ["SPAN", name, from, to] => {
                let (from, to): (f64, f64) = (from.parse()?, to.parse()?);
                rows.push(((*name).to_owned(), to - from));
            }
            ["BENCH", "done"] => {
                rows.push(("whole run".to_owned(), (at - start).as_secs_f64()));
                rows.extend(cpu_seconds(pid).map(|s| (CPU.to_owned(), s)));
                return Ok(rows);
            }
            _ => {}
        }
        last.push(line);
        if last.len() > 20 {
            last.remove(0);
        }
    }
}

/// Lines with the time they came, read on a thread so that waiting has an end.
fn lines_of(out: impl std::io::Read + Send + 'static) -> Receiver<(Instant, String)> {
    let (send, receive) = channel();
    std::thread::spawn(move || {
        let mut reader = BufReader::new(out);
        let mut line = Vec::new();
        while reader.read_until(b'\n', &mut line).is_ok_and(|n| n > 0) {
            let text = String::from_utf8_lossy(&line).trim_end().to_owned();
            if send.send((Instant::now(), text)).is_err() {
                return;
            }
            line.clear();
        }
    });
    receive
}

/// User and system time of all threads (proc_pid_stat(5), fields 14 and 15).
fn cpu_seconds(pid: u32) -> Option<f64> {
    let text = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let fields: Vec<&str> = text.rsplit_once(')')?.1.split_whitespace().collect();
    Some((fields.get(11)?.parse::<f64>().ok()? + fields.get(12)?.parse::<f64>().ok()?) / USER_HZ)
}

/// Milliseconds from the start of the emulator to the first thing its guest does: the
/// median of a few starts of a program that writes one byte to the serial port.
fn start(mut command: Command, target: &Path) -> anyhow::Result<f64> {
    let image = target.join("bench-start.bin");
    let mut code = START_IMAGE.map(u32::to_le_bytes).concat();
    code.resize(4096, 0);
    std::fs::write(&image, code).with_context(|| image.display().to_string())?;
    command.args(["-M", "virt", "-m", &RAM_MIB.to_string(), "-nographic", "-bios", "none"]);
    command.arg("-kernel").arg(&image).stdin(Stdio::null()).stdout(Stdio::piped());
    let mut times = Vec::new();
    for _ in 0..5 {
        let from = Instant::now();
        let mut running = Running(command.spawn().with_context(|| format!("{:?}", command.get_program()))?);
        let mut out = running.0.stdout.take().context("no output")?;
        let mut byte = [0];
        while byte != *b"!" {
            out.read_exact(&mut byte).context("the start program did not run")?;
        }
        times.push(from.elapsed().as_secs_f64() * 1000.0);
    }
    median(times).context("no times")
}

/// Stores `!` to the virt board's serial port, then turns it off at the test finisher.
const START_IMAGE: [u32; 8] = [
    0x1000_02b7, // lui  t0, 0x10000
    0x0210_0313, // li   t1, '!'
    0x0062_8023, // sb   t1, 0(t0)
    0x0010_02b7, // lui  t0, 0x100
    0x0000_5337, // lui  t1, 0x5
    0x5553_0313, // addi t1, t1, 0x555
    0x0062_a023, // sw   t1, 0(t0)
    0x0000_006f, // j    .
];

/// Resident memory without the mapping of guest RAM: the one of its size (proc_pid_smaps(5)).
fn own_mib(pid: u32) -> Option<f64> {
    let text = std::fs::read_to_string(format!("/proc/{pid}/smaps")).ok()?;
    let kib = |line: &str, name: &str| line.strip_prefix(name)?.trim().strip_suffix("kB")?.trim().parse::<u64>().ok();
    let (mut size, mut own) = (0, 0);
    for line in text.lines() {
        size = kib(line, "Size:").unwrap_or(size);
        own += kib(line, "Rss:").filter(|_| size != RAM_MIB << 10).unwrap_or(0);
    }
    Some(own as f64 / 1024.0)
}

fn resident_mib(pid: u32) -> Option<f64> {
    let text = std::fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let line = text.lines().find_map(|l| l.strip_prefix("VmRSS:"))?;
    line.trim().strip_suffix(" kB")?.trim().parse::<f64>().ok().map(|kib| kib / 1024.0)
}

fn median(mut values: Vec<f64>) -> Option<f64> {
    values.sort_by(f64::total_cmp);
    let n = values.len();
    match n {
        0 => None,
        _ if n % 2 == 1 => Some(values[n / 2]),
        _ => Some((values[n / 2 - 1] + values[n / 2]) / 2.0),
    }
}

/// Medians side by side; the ratio is QEMU's time by mimus's, so more is better.
fn table(results: &BTreeMap<String, Vec<Vec<(String, f64)>>>, smp: u32) -> String {
    let names: Vec<&String> =
        results.values().flatten().next().map(|rows| rows.iter().map(|(row, _)| row).collect()).unwrap_or_default();
    let value = |emulator: &str, row: &str| {
        let runs = results.get(emulator)?;
        median(runs.iter().filter_map(|r| r.iter().find(|(n, _)| n == row)).map(|(_, v)| *v).collect())
    };
    let cell = |v: Option<f64>| v.map_or("-".into(), |v| format!("{v:.2}"));
    let mut out =
        format!("\n{:<22} {:>10} {:>10} {:>7}   (seconds, medians, -smp {smp})\n", "row", "QEMU", "mimus", "ratio");
    for row in names {
        let (qemu, mimus) = (value("qemu", row), value("mimus", row));
        let ratio = qemu.zip(mimus).filter(|(_, m)| *m > 0.0).map_or("-".into(), |(q, m)| format!("{:.2}×", q / m));
        out.push_str(&format!("{row:<22} {:>10} {:>10} {ratio:>7}\n", cell(qemu), cell(mimus)));
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn medians_and_table() {
        assert_eq!(median(vec![3.0, 1.0, 2.0]), Some(2.0));
        assert_eq!(median(vec![4.0, 1.0]), Some(2.5));
        assert_eq!(median(vec![]), None);
        let run = |s: f64| vec![(BOOT.to_owned(), s), ("gzip".to_owned(), s)];
        let results = BTreeMap::from([
            ("qemu".to_owned(), vec![run(2.0), run(4.0), run(3.0)]),
            ("mimus".to_owned(), vec![run(1.0), run(1.5), run(2.0)]),
        ]);
        let text = table(&results, 1);
        assert!(text.contains("2.00×") && text.contains("gzip"), "{text}");
    }

    #[test]
    fn options() {
        let o = parse(&["riscv64", "--runs", "5", "--smp", "4", "--only", "qemu"]).unwrap();
        assert_eq!((o.runs, o.smp, o.emulators.len()), (5, 4, 1));
        for bad in [&["x86"][..], &["riscv64", "--runs", "0"], &["riscv64", "--rusn", "1"], &[]] {
            assert!(parse(bad).is_err());
        }
    }

    #[test]
    fn own_process_is_readable() {
        assert!(resident_mib(std::process::id()).is_some_and(|m| m > 0.1));
        assert!(cpu_seconds(std::process::id()).is_some());
    }
}
