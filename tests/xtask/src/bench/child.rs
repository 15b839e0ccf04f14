//! One run of one emulator: the guest says where it is, and goes on when it is told to.

use std::io::{BufRead, BufReader, Write};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::{Duration, Instant};

use anyhow::{Context, bail};

use super::sets::{self, Set};
use super::{BOOT, BOOT_WALL, OWN, Options, RSS, Row, WHOLE};
use crate::guests;

/// Ends the name of a row of wall time.
pub const WALL: &str = ", wall";

/// Longest wait for a line.
const LIMIT: Duration = Duration::from_secs(300);

/// Ends the emulator whatever happens.
pub struct Running(pub Child);

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Boots and times; the rows, in order.
pub fn run(mut command: Command, files: &guests::Bench, options: &Options) -> anyhow::Result<Vec<Row>> {
    let start = Instant::now();
    command
        .args(["-m", &options.set.ram_mib().to_string(), "-nographic", "-no-reboot", "-smp", &options.smp.to_string()])
        .args(["-append", &options.append()])
        .arg("-kernel")
        .arg(&files.kernel)
        .arg("-initrd")
        .arg(&files.initrd);
    let child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::inherit()).spawn();
    let mut running = Running(child.with_context(|| format!("{:?}", command.get_program()))?);
    let lines = lines_of(running.0.stdout.take().context("no output")?);
    let mut input = running.0.stdin.take().context("no input")?;
    let pid = running.0.id();
    let (mut rows, mut last): (Vec<Row>, Vec<String>) = (Vec::new(), Vec::new());
    let mut began = (0.0, start);
    loop {
        let (at, line) = match lines.recv_timeout(LIMIT) {
            Ok(got) => got,
            Err(RecvTimeoutError::Timeout) => {
                bail!("nothing for {} s; its last lines:\n{}", LIMIT.as_secs(), last.join("\n"))
            }
            Err(RecvTimeoutError::Disconnected) => {
                bail!("it ended before the benchmark did; its last lines:\n{}", last.join("\n"))
            }
        };
        match line.split_whitespace().collect::<Vec<_>>().as_slice() {
            ["BENCH", "boot"] => {
                rows.push((BOOT.to_owned(), cpu_seconds(pid)?, None));
                rows.push((BOOT_WALL.to_owned(), (at - start).as_secs_f64(), None));
                rows.extend(resident_mib(pid).map(|mib| (RSS.to_owned(), mib, None)));
                rows.extend(own_mib(pid, options.set.ram_mib()).map(|mib| (OWN.to_owned(), mib, None)));
                match options.set {
                    Set::Idle => rows.extend(idle_rows(pid)?),
                    Set::Translation => rows.extend(ask_translator(&mut input, &lines)?),
                    _ => {}
                }
                go_on(&mut input)?;
            }
            ["BEGIN", _] => {
                began = (cpu_seconds(pid)?, Instant::now());
                go_on(&mut input)?;
            }
            ["END", name, value @ ..] => {
                if value.is_empty() && options.set == Set::Job {
                    bail!("{name} failed in the guest:\n{}", last.join("\n"));
                }
                // A program's times are before its value.
                let value = match options.set {
                    Set::Job => Some(value.join(" ")),
                    _ => value.last().map(|v| (*v).to_owned()),
                };
                rows.push(((*name).to_owned(), cpu_seconds(pid)? - began.0, value));
                if options.set.has_wall_rows(options.smp) {
                    rows.push((format!("{name}{WALL}"), (at - began.1).as_secs_f64(), None));
                }
                go_on(&mut input)?;
            }
            ["BENCH", "done"] => {
                rows.push((WHOLE.to_owned(), cpu_seconds(pid)?, None));
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

/// What a guest costs that does nothing, over a while.
fn idle_rows(pid: u32) -> anyhow::Result<Vec<Row>> {
    /// What the kernel has put off until after its start is done by then.
    const SETTLE: Duration = Duration::from_secs(4);
    const LENGTH: Duration = Duration::from_secs(10);
    std::thread::sleep(SETTLE);
    let (cpu, switches, from) = (cpu_seconds(pid)?, voluntary_switches(pid), Instant::now());
    std::thread::sleep(LENGTH);
    let seconds = from.elapsed().as_secs_f64();
    let percent = (cpu_seconds(pid)? - cpu) / seconds * 100.0;
    let wakeups = voluntary_switches(pid).saturating_sub(switches) as f64 / seconds;
    Ok(vec![(sets::IDLE.to_owned(), percent, None), (sets::WAKEUPS.to_owned(), wakeups, None)])
}

/// Times that threads have gone to sleep (proc_pid_status(5)).
fn voluntary_switches(pid: u32) -> u64 {
    let of = |task: std::fs::DirEntry| {
        let text = std::fs::read_to_string(task.path().join("status")).ok()?;
        text.lines().find_map(|l| l.strip_prefix("voluntary_ctxt_switches:"))?.trim().parse::<u64>().ok()
    };
    std::fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten().filter_map(of).sum()
}

/// Asks both kinds of monitor what was translated, and gives the keyboard back to the guest.
fn ask_translator(input: &mut ChildStdin, lines: &Receiver<(Instant, String)>) -> anyhow::Result<Vec<Row>> {
    const SWITCH: &[u8] = b"\x01c";
    let mut answer = Vec::new();
    input.write_all(SWITCH).and_then(|()| input.flush()).context("the monitor")?;
    for question in ["info jit\n", "info accel\n"] {
        input.write_all(question.as_bytes()).and_then(|()| input.flush()).context("the monitor")?;
        // Whichever of them it does not know has one line of answer.
        let until = Instant::now() + Duration::from_secs(5);
        while let Ok((_, line)) = lines.recv_timeout(until.saturating_duration_since(Instant::now())) {
            answer.push(line);
        }
    }
    input.write_all(SWITCH).and_then(|()| input.flush()).context("the monitor")?;
    Ok(sets::translation_rows(&answer))
}

fn go_on(input: &mut ChildStdin) -> anyhow::Result<()> {
    input.write_all(b"\n").and_then(|()| input.flush()).context("the guest's serial port")
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

/// What all threads ran, from their schedstat files: nanoseconds (Linux
/// `Documentation/scheduler/sched-stats.rst`). Threads that ended are not counted, which
/// emulators' vCPU threads do not do.
fn cpu_seconds(pid: u32) -> anyhow::Result<f64> {
    let dir = format!("/proc/{pid}/task");
    let mut nanoseconds = 0u64;
    for task in std::fs::read_dir(&dir).context(dir)?.flatten() {
        let text = std::fs::read_to_string(task.path().join("schedstat")).unwrap_or_default();
        nanoseconds += text.split_whitespace().next().and_then(|n| n.parse::<u64>().ok()).unwrap_or(0);
    }
    Ok(nanoseconds as f64 / 1e9)
}

/// Resident memory without the mapping of guest RAM: the one of its size (proc_pid_smaps(5)).
fn own_mib(pid: u32, ram_mib: u64) -> Option<f64> {
    let text = std::fs::read_to_string(format!("/proc/{pid}/smaps")).ok()?;
    let kib = |line: &str, name: &str| line.strip_prefix(name)?.trim().strip_suffix("kB")?.trim().parse::<u64>().ok();
    let (mut size, mut own) = (0, 0);
    for line in text.lines() {
        size = kib(line, "Size:").unwrap_or(size);
        own += kib(line, "Rss:").filter(|_| size != ram_mib << 10).unwrap_or(0);
    }
    Some(own as f64 / 1024.0)
}

fn resident_mib(pid: u32) -> Option<f64> {
    let text = std::fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let line = text.lines().find_map(|l| l.strip_prefix("VmRSS:"))?;
    line.trim().strip_suffix(" kB")?.trim().parse::<f64>().ok().map(|kib| kib / 1024.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn own_process_is_readable() {
        assert!(resident_mib(std::process::id()).is_some_and(|m| m > 0.1));
        assert!(cpu_seconds(std::process::id()).is_ok());
    }
}
