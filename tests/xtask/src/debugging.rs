//! `cargo xtask bench debug`: what debugging costs, beside what of QEMU's is nearest.
//!
//! The guests are small programs without an operating system (`bench/debug`), one for each architecture. A figure is
//! the CPU time of the whole process, vCPUs and writers of traces alike, for a round of the program: that of a long
//! run less that of a short one, the least of several made in turn. Breakpoints and watchpoints are set as any
//! debugger sets them, by packets over a socket; none of them is ever hit.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, bail};

use crate::kvm::children_time;

/// Longest wait for an answer.
const LIMIT: Duration = Duration::from_secs(120);
/// Rounds of a long run that nothing slows down.
const ROUNDS: u32 = 400_000;

struct Guest {
    arch: &'static str,
    compiler: &'static [&'static str],
    package: &'static str,
    /// Where its code begins.
    base: u64,
    board: &'static [&'static str],
    qemu: &'static [&'static str],
}

const GUESTS: [Guest; 3] = [
    Guest {
        arch: "riscv64",
        compiler: &["riscv64-linux-gnu-gcc", "-mcmodel=medany"],
        package: "gcc-riscv64-linux-gnu",
        base: 0x8000_0000,
        board: &["-M", "virt", "-bios", "none"],
        qemu: &[],
    },
    Guest {
        arch: "x86_64",
        compiler: &["x86_64-linux-gnu-gcc", "-mno-red-zone", "-mno-sse"],
        package: "gcc (on another host: gcc-x86-64-linux-gnu)",
        base: 0x10_0000,
        board: &["-M", "q35", "-nic", "none", "-device", "isa-debug-exit,iobase=0xf4,iosize=4"],
        qemu: &["-vga", "none"],
    },
    Guest {
        arch: "i386",
        compiler: &["i686-linux-gnu-gcc", "-mno-sse"],
        package: "gcc-i686-linux-gnu",
        base: 0x10_0000,
        board: &["-M", "q35", "-nic", "none", "-device", "isa-debug-exit,iobase=0xf4,iosize=4"],
        qemu: &["-vga", "none"],
    },
];

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Who {
    Mimus,
    Qemu,
}

/// What is done to the guest.
#[derive(Clone, Copy)]
enum How {
    /// Options.
    With(&'static [&'static str]),
    /// A debugger sets this many breakpoints and, if any, a watchpoint this far behind the watched page's begin.
    Debugged { breakpoints: u64, watch: Option<u64> },
}

struct Row {
    name: &'static str,
    mimus: Option<How>,
    /// By how much less is done than freely, in a time as long.
    less: u32,
    qemu: Option<How>,
    qemu_less: u32,
}

const TRACE: &str = "TRACE";

const ROWS: [Row; 10] = {
    const fn both(name: &'static str, how: How) -> Row {
        Row { name, mimus: Some(how), less: 1, qemu: Some(how), qemu_less: 1 }
    }
    const fn debugged(breakpoints: u64, watch: Option<u64>) -> How {
        How::Debugged { breakpoints, watch }
    }
    [
        both("free", How::With(&[])),
        both("debugger attached", debugged(0, None)),
        Row { qemu_less: 20, ..both("1 breakpoint in the hot page", debugged(1, None)) },
        Row { qemu_less: 5000, ..both("1,000 breakpoints there", debugged(1000, None)) },
        both("watchpoint on another page", debugged(0, Some(4096))),
        Row { less: 2, qemu_less: 4, ..both("watchpoint on a page in use", debugged(0, Some(3072))) },
        Row {
            name: "block trace (QEMU: -d exec,nochain)",
            mimus: Some(How::With(&["-trace", TRACE])),
            less: 3,
            qemu: Some(How::With(&["-d", "exec,nochain", "-D", "/dev/null"])),
            qemu_less: 300,
        },
        Row {
            name: "memory trace",
            mimus: Some(How::With(&["-trace", "TRACE,what=mem"])),
            less: 15,
            qemu: None,
            qemu_less: 1,
        },
        both("-icount shift=0", How::With(&["-icount", "shift=0"])),
        Row {
            name: "one-insn-per-tb",
            mimus: None,
            less: 1,
            qemu: Some(How::With(&["-accel", "tcg,one-insn-per-tb=on"])),
            qemu_less: 10,
        },
    ]
};

/// Steps of the longer runs.
const OWN_STEPS: u64 = 4_000_000;
const GDB_STEPS: u64 = 4_000;

struct Bench {
    dir: PathBuf,
    runs: u32,
    rows: Vec<String>,
    qemu: bool,
}

/// `bench debug [riscv64|x86_64|i386] [--runs N] [--rows WORD,…] [--only mimus]`
pub fn run(words: &[&str]) -> anyhow::Result<()> {
    let mut bench = Bench {
        dir: std::env::temp_dir().join(format!("mimus-bench-debug-{}", std::process::id())),
        runs: 3,
        rows: Vec::new(),
        qemu: true,
    };
    let mut guests: Vec<&Guest> = Vec::new();
    let mut words = words.iter();
    while let Some(word) = words.next() {
        let mut value = || words.next().with_context(|| format!("{word} takes a value"));
        match *word {
            "--runs" => bench.runs = value()?.parse().ok().filter(|n| *n > 0).context("--runs takes a number")?,
            "--rows" => bench.rows = value()?.split(',').map(str::to_owned).collect(),
            "--only" if *value()? == "mimus" => bench.qemu = false,
            name => match GUESTS.iter().find(|g| g.arch == name) {
                Some(guest) => guests.push(guest),
                None => bail!("bench debug [riscv64|x86_64|i386] [--runs N] [--rows WORD,…] [--only mimus]: {name}?"),
            },
        }
    }
    if guests.is_empty() {
        guests.extend(&GUESTS);
    }
    crate::cargo(&["build", "--release", "-p", "mimus"])?;
    std::fs::create_dir_all(&bench.dir)?;
    let result = guests.into_iter().try_for_each(|guest| bench.guest(guest));
    let _ = std::fs::remove_dir_all(&bench.dir);
    result
}

impl Bench {
    fn wants(&self, name: &str) -> bool {
        self.rows.is_empty() || self.rows.iter().any(|r| name.contains(r.as_str())) || name == "free"
    }

    fn guest(&self, guest: &Guest) -> anyhow::Result<()> {
        println!(
            "\n{:<38} {:>12} {:>8} {:>12} {:>8} {:>8}   ({}, CPU time)",
            "row", "mimus, ns", "×free", "QEMU, ns", "×free", "ratio", guest.arch
        );
        let mut free = [f64::NAN; 2];
        for row in ROWS.iter().filter(|r| self.wants(r.name)) {
            let mut least = [f64::INFINITY; 2];
            for _ in 0..self.runs {
                for (who, how, less) in [(Who::Qemu, row.qemu, row.qemu_less), (Who::Mimus, row.mimus, row.less)] {
                    let Some(how) = how.filter(|_| who == Who::Mimus || self.qemu) else { continue };
                    let slot = &mut least[usize::from(who == Who::Qemu)];
                    *slot = slot.min(self.round(guest, who, how, ROUNDS / less)?);
                }
            }
            if row.name == "free" {
                free = least;
            }
            let cell = |ns: f64| if ns.is_finite() { format!("{ns:.0}") } else { "-".to_owned() };
            let times = |n: f64| if n.is_finite() { format!("{n:.2}") } else { "-".to_owned() };
            println!(
                "{:<38} {:>12} {:>8} {:>12} {:>8} {:>8}",
                row.name,
                cell(least[0]),
                times(least[0] / free[0]),
                cell(least[1]),
                times(least[1] / free[1]),
                times(least[1] / least[0])
            );
        }
        if self.wants("steps") {
            self.steps(guest)?;
        }
        Ok(())
    }

    /// Single steps per second of CPU time.
    fn steps(&self, guest: &Guest) -> anyhow::Result<()> {
        let rate = |steps: u64, time: &dyn Fn(u64) -> anyhow::Result<f64>| -> anyhow::Result<f64> {
            let mut least = f64::INFINITY;
            for _ in 0..self.runs {
                least = least.min(time(steps + 10)? - time(10)?);
            }
            Ok(steps as f64 / least.max(0.001) / 1e6)
        };
        let own = rate(OWN_STEPS, &|n| self.own_steps(guest, n))?;
        println!("{:<38} {own:>12.2}            million a second", "steps, `mimus debug`'s step N");
        let ours = rate(GDB_STEPS, &|n| self.gdb_steps(guest, Who::Mimus, n))?;
        let theirs = if self.qemu { rate(GDB_STEPS, &|n| self.gdb_steps(guest, Who::Qemu, n))? } else { f64::NAN };
        println!("{:<38} {ours:>12.3}          {theirs:>12.3}   million a second", "steps, by gdb's packets");
        Ok(())
    }

    /// CPU time of a round, in ns.
    fn round(&self, guest: &Guest, who: Who, how: How, rounds: u32) -> anyhow::Result<f64> {
        let short = (rounds / 10).max(1);
        let long = self.timed(guest, who, how, short + rounds)?;
        Ok((long - self.timed(guest, who, how, short)?) * 1e9 / f64::from(rounds))
    }

    /// CPU seconds of a whole run.
    fn timed(&self, guest: &Guest, who: Who, how: How, rounds: u32) -> anyhow::Result<f64> {
        let image = self.image(guest, rounds)?;
        let mut command = command(guest, who, &image);
        let (trace, socket) = (self.dir.join("trace"), self.dir.join("gdb"));
        let before = children_time()?;
        let mut child = match how {
            How::With(options) => {
                // Of several accelerators QEMU takes the first.
                if !options.contains(&"-accel") {
                    command.args(["-accel", "tcg"]);
                }
                let named = |o: &&str| o.replace(TRACE, &trace.display().to_string());
                Running(command.args(options.iter().map(named)).spawn()?)
            }
            How::Debugged { breakpoints, watch } => {
                let (child, mut gdb) = Gdb::start(command, &socket)?;
                let unused = guest.base + 0x1800;
                for i in 0..breakpoints {
                    gdb.ok(&format!("Z0,{:x},2", unused + 2 * i))?;
                }
                if let Some(offset) = watch {
                    gdb.ok(&format!("Z2,{:x},8", guest.base + 0x20_0000 + offset))?;
                }
                gdb.send("c")?;
                let end = gdb.reply()?;
                if !end.starts_with('W') {
                    bail!("{} stopped for the debugger: {end}", guest.arch);
                }
                child
            }
        };
        child.ended()?;
        let time = children_time()? - before;
        let _ = std::fs::remove_file(trace);
        Ok(time)
    }

    /// CPU seconds of `steps` steps by our own debugger.
    fn own_steps(&self, guest: &Guest, steps: u64) -> anyhow::Result<f64> {
        let image = self.image(guest, ROUNDS)?;
        let mut command = Command::new(mimus());
        command.args(["debug", guest.arch, "-accel", "tcg"]).args(guest.board).args(["-m", "64", "-serial", "none"]);
        command.arg("-kernel").arg(image).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::inherit());
        let before = children_time()?;
        let mut child = Running(command.spawn()?);
        let work = guest.base + 0x1000;
        let mut input = child.0.stdin.take().context("a pipe")?;
        write!(input, "break {work:#x}\ncontinue\ndelete\nstep {steps}\nquit\n")?;
        drop(input);
        let mut text = String::new();
        child.0.stdout.take().context("a pipe")?.read_to_string(&mut text)?;
        child.ended()?;
        if text.matches("=>").count() < 3 {
            bail!("the debugger did not step:\n{text}");
        }
        Ok(children_time()? - before)
    }

    /// CPU seconds of `steps` steps by packets.
    fn gdb_steps(&self, guest: &Guest, who: Who, steps: u64) -> anyhow::Result<f64> {
        let image = self.image(guest, ROUNDS)?;
        let before = children_time()?;
        let (mut child, mut gdb) = Gdb::start(command(guest, who, &image), &self.dir.join("gdb"))?;
        let work = guest.base + 0x1000;
        gdb.ok(&format!("Z0,{work:x},2"))?;
        gdb.send("c")?;
        gdb.reply()?;
        gdb.ok(&format!("z0,{work:x},2"))?;
        for _ in 0..steps {
            gdb.send("vCont;s:1")?;
            gdb.reply()?;
        }
        gdb.send("k")?;
        child.0.wait()?;
        Ok(children_time()? - before)
    }

    /// The program, of so many rounds.
    fn image(&self, guest: &Guest, rounds: u32) -> anyhow::Result<PathBuf> {
        let image = self.dir.join(format!("{}-{rounds}", guest.arch));
        if image.exists() {
            return Ok(image);
        }
        let from = crate::root().join("tests/xtask/bench/debug");
        let layout = std::fs::read_to_string(from.join("layout.ld")).context("bench/debug/layout.ld")?;
        let script = self.dir.join("layout.ld");
        std::fs::write(&script, layout.replace("BASE", &format!("{:#x}", guest.base)))?;
        let mut command = Command::new(guest.compiler[0]);
        command.args(&guest.compiler[1..]).args([
            "-O2",
            "-ffreestanding",
            "-fno-pic",
            "-no-pie",
            "-nostdlib",
            "-static",
        ]);
        command.args(["-fno-stack-protector", "-Wl,--build-id=none"]).arg(format!("-DROUNDS={rounds}"));
        command.arg("-T").arg(&script).arg(from.join(guest.arch).with_extension("S")).arg(from.join("work.c"));
        let output = command.arg("-o").arg(&image).output().with_context(|| {
            format!("no compiler for {} ({}): apt-get install {}", guest.arch, guest.compiler[0], guest.package)
        })?;
        if !output.status.success() {
            bail!("{command:?}: {}", String::from_utf8_lossy(&output.stderr).trim());
        }
        Ok(image)
    }
}

fn mimus() -> PathBuf {
    crate::root().join("target/release/mimus")
}

fn command(guest: &Guest, who: Who, image: &Path) -> Command {
    let mut command = match who {
        Who::Mimus => {
            let mut c = Command::new(mimus());
            c.args(["system", guest.arch]);
            c
        }
        Who::Qemu => {
            let mut c = Command::new(format!("qemu-system-{}", guest.arch));
            c.args(guest.qemu);
            c
        }
    };
    command.args(guest.board).args(["-m", "64", "-nographic", "-kernel"]).arg(image);
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    command
}

/// Ends the emulator whatever happens.
struct Running(Child);

impl Running {
    fn ended(&mut self) -> anyhow::Result<()> {
        let status = self.0.wait()?;
        // The exit device's code is an odd number.
        match status.code() {
            Some(0 | 1) => Ok(()),
            _ => bail!("the emulator ended with {status}"),
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// A debugger's side of the remote protocol, without acknowledgements.
struct Gdb(UnixStream);

impl Gdb {
    /// Starts the emulator, stopped, and connects to it.
    fn start(mut command: Command, socket: &Path) -> anyhow::Result<(Running, Gdb)> {
        let _ = std::fs::remove_file(socket);
        command
            .args(["-accel", "tcg"])
            .arg("-S")
            .arg("-gdb")
            .arg(format!("unix:{},server=on,wait=off", socket.display()));
        let mut child = Running(command.spawn().with_context(|| format!("{command:?}"))?);
        let end = Instant::now() + LIMIT;
        let stream = loop {
            match UnixStream::connect(socket) {
                Ok(stream) => break stream,
                Err(e) if Instant::now() > end => return Err(e).context("the debugger's socket"),
                Err(_) => std::thread::sleep(Duration::from_millis(5)),
            }
            if let Some(status) = child.0.try_wait()? {
                bail!("{command:?} ended with {status}");
            }
        };
        stream.set_read_timeout(Some(LIMIT))?;
        let mut gdb = Gdb(stream);
        gdb.send("QStartNoAckMode")?;
        gdb.reply()?;
        gdb.0.write_all(b"+")?;
        Ok((child, gdb))
    }

    fn send(&mut self, body: &str) -> anyhow::Result<()> {
        let sum = body.bytes().fold(0u8, u8::wrapping_add);
        Ok(self.0.write_all(format!("${body}#{sum:02x}").as_bytes())?)
    }

    /// The body of the next packet.
    fn reply(&mut self) -> anyhow::Result<String> {
        let mut body = Vec::new();
        let mut byte = [0];
        while byte != *b"$" {
            self.0.read_exact(&mut byte).context("the debugger's server said nothing")?;
        }
        loop {
            self.0.read_exact(&mut byte)?;
            if byte == *b"#" {
                break;
            }
            body.push(byte[0]);
        }
        let mut sum = [0; 2];
        self.0.read_exact(&mut sum)?;
        Ok(String::from_utf8_lossy(&body).into_owned())
    }

    fn ok(&mut self, body: &str) -> anyhow::Result<()> {
        self.send(body)?;
        match self.reply()?.as_str() {
            "OK" => Ok(()),
            other => bail!("{body}: {other}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn options() {
        for words in [&["arm"][..], &["--runs", "0"], &["--runs"], &["--only", "qemu"]] {
            assert!(run(words).is_err(), "{words:?}");
        }
    }

    #[test]
    fn packets() {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let mut gdb = Gdb(ours);
        theirs.write_all(b"+$OK#9a$T05thread:1;#").unwrap();
        gdb.ok("Z0,1000,2").unwrap();
        let mut sent = [0; 13];
        theirs.read_exact(&mut sent).unwrap();
        assert!(sent.starts_with(b"$Z0,1000,2#"), "{sent:?}");
        theirs.write_all(b"d7").unwrap();
        assert_eq!(gdb.reply().unwrap(), "T05thread:1;");
    }
}
