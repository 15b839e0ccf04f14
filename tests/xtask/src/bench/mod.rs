//! Mimus beside QEMU: the same kernel, initrd and machine, in turn, several times.
//!
//! Figures are CPU time of the emulator's process. The guest stops before and after each row
//! until it is told to go on, so that the clock is read at exactly that point. The same rows run
//! natively as well: the guest's own programs on a host of its kind, else the same sources compiled
//! for the host, once as its compiler likes and once without vectors. Only ratios from runs made in
//! turn on one machine mean anything.

mod build;
mod child;
mod native;
mod sets;
mod start;
mod table;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, bail};

use self::sets::{JOBS, PARALLEL, PHASES, Set};
use crate::guests;

const BOOT: &str = "boot to /init";
const BOOT_WALL: &str = "  of it, wall clock";
const RSS: &str = "RSS after boot, MiB";
const OWN: &str = "  of it not guest RAM";
const START: &str = "start to first store, ms";
const WHOLE: &str = "whole run";

/// A guest that can be measured.
pub struct Guest {
    /// Its name with mimus, and the end of QEMU's.
    pub arch: &'static str,
    /// What both are told of the machine.
    board: &'static [&'static str],
    /// What QEMU is told besides. Its model is the default one, which its translator runs
    /// fastest, with the instructions that some rows are made of.
    qemu: &'static [&'static str],
    qemu_package: &'static str,
    /// Compilers with their first arguments, first choice first.
    compilers: &'static [&'static [&'static str]],
    compiler_package: &'static str,
}

const X86_BOARD: &[&str] = &["-M", "q35", "-nic", "none"];

/// All of them.
const GUESTS: [Guest; 3] = [
    Guest {
        arch: "riscv64",
        board: &["-M", "virt"],
        qemu: &[],
        qemu_package: "qemu-system-misc (newer releases: qemu-system-riscv)",
        compilers: &[&["riscv64-linux-gnu-gcc"]],
        compiler_package: "gcc-riscv64-linux-gnu libc6-dev-riscv64-cross",
    },
    Guest {
        arch: "x86_64",
        board: X86_BOARD,
        qemu: &["-vga", "none", "-cpu", "qemu64,+ssse3,+sse4.1,+aes,+pclmulqdq,+sha-ni"],
        qemu_package: "qemu-system-x86",
        compilers: &[&["x86_64-linux-gnu-gcc"], &["gcc", "-m64"]],
        compiler_package: "gcc libc6-dev (on another host: gcc-x86-64-linux-gnu)",
    },
    Guest {
        arch: "i386",
        board: X86_BOARD,
        qemu: &["-vga", "none", "-cpu", "qemu32,+ssse3,+sse4.1,+aes,+pclmulqdq,+sha-ni"],
        qemu_package: "qemu-system-x86",
        compilers: &[&["i686-linux-gnu-gcc"], &["gcc", "-m32"]],
        compiler_package: "gcc-i686-linux-gnu libc6-dev-i386-cross (or gcc-multilib)",
    },
];

struct Options {
    guest: &'static Guest,
    runs: usize,
    smp: u32,
    set: Set,
    emulators: Vec<String>,
    phases: bool,
    programs: bool,
    native: bool,
    rows: Vec<String>,
    cpu: Option<String>,
    kernel: Option<PathBuf>,
}

/// One measured row: its name, its figure, and what the program computed.
pub type Row = (String, f64, Option<String>);

/// `bench GUEST [--runs N] [--smp N] …`
pub fn run(words: &[&str]) -> anyhow::Result<()> {
    let options = parse(words)?;
    let guest = options.guest;
    let target = crate::metadata()?["target_directory"]
        .as_str()
        .map(PathBuf::from)
        .context("cargo metadata names no target directory")?;
    let programs = options.programs.then(|| build::programs(guest, &target)).transpose()?;
    let mut files = guests::bench(guest.arch, programs.as_deref())?;
    if options.set == Set::Job {
        let (root, archive) = guests::userland(guest.arch)?;
        files.initrd = sets::job_initrd(&archive, &files.initrd, &target)?;
        files.userland = Some(root);
    }
    if let Some(kernel) = &options.kernel {
        files.kernel.clone_from(kernel);
    }
    if options.emulators.iter().any(|e| e == "mimus") {
        crate::cargo(&["build", "--release", "--package", "mimus"])?;
    }
    let host = (options.native && options.programs && !runs_natively(guest.arch))
        .then(|| build::for_host(&target))
        .transpose()?;
    let mimus = target.join("release/mimus");
    let name = format!("qemu-system-{}", guest.arch);
    let with_qemu = options.emulators.iter().any(|e| e == "qemu");
    if with_qemu && Command::new(&name).arg("-version").stdout(Stdio::null()).status().is_err() {
        bail!("{name} is not installed: apt-get install {}, or time mimus alone with --only mimus", guest.qemu_package);
    }
    let mut results: BTreeMap<String, Vec<Vec<Row>>> = BTreeMap::new();
    for round in 1..=options.runs {
        for emulator in &options.emulators {
            let command = || if emulator == "qemu" { qemu(&options) } else { ours(&mimus, &options) };
            let mut rows =
                child::run(command(), &files, &options).with_context(|| format!("run {round} of {emulator}"))?;
            if guest.arch == "riscv64" && options.set == Set::Usual {
                rows.insert(1, (START.to_owned(), start::milliseconds(command(), &target)?, None));
            }
            let boot = rows.iter().find(|row| row.0 == BOOT).map_or(0.0, |row| row.1);
            println!("run {round} of {emulator}: {boot:.2} s to /init");
            results.entry(emulator.clone()).or_default().push(rows);
        }
        if let Some(host) = &host {
            for (name, program) in host {
                let rows = native::run_other(&options, program, *name == "scalar")?;
                results.entry((*name).to_owned()).or_default().push(rows);
            }
        } else if options.native {
            let rows = native::run(&options, programs.as_deref(), &files)?;
            results.entry("native".to_owned()).or_default().push(rows);
        }
    }
    print!("{}", table::table(&results, guest.arch, options.smp));
    let differing = table::differing(&results);
    if !differing.is_empty() {
        bail!("rows that do not compute the same everywhere: {}", differing.join(", "));
    }
    Ok(())
}

fn parse(words: &[&str]) -> anyhow::Result<Options> {
    let mut words = words.iter();
    let names: Vec<&str> = GUESTS.iter().map(|g| g.arch).collect();
    let guest = words
        .next()
        .and_then(|w| GUESTS.iter().find(|g| g.arch == *w))
        .with_context(|| format!("bench: the guest is missing or unknown: cargo xtask bench {}", names.join("|")))?;
    let mut options = Options {
        guest,
        runs: 3,
        smp: 0,
        set: Set::Usual,
        emulators: vec!["qemu".into(), "mimus".into()],
        phases: true,
        programs: true,
        native: true,
        rows: Vec::new(),
        cpu: None,
        kernel: None,
    };
    while let Some(word) = words.next() {
        let mut value = || words.next().with_context(|| format!("{word} takes a value"));
        let number = |text: &str| {
            text.parse::<u32>().ok().filter(|n| *n > 0).with_context(|| format!("{word} takes a number above 0"))
        };
        match *word {
            "--runs" => options.runs = number(value()?)? as usize,
            "--smp" => options.smp = number(value()?)?,
            "--only" => match *value()? {
                name @ ("qemu" | "mimus") => options.emulators = vec![name.into()],
                _ => bail!("--only takes qemu or mimus"),
            },
            "--phases" => options.programs = false,
            "--programs" => options.phases = false,
            "--no-native" => options.native = false,
            "--rows" => options.rows = value()?.split(',').map(str::to_owned).collect(),
            "--cpu" => options.cpu = Some((*value()?).to_owned()),
            "--kernel" => options.kernel = Some(PathBuf::from(value()?)),
            other => match Set::parse(other) {
                Some(set) if options.set == Set::Usual => options.set = set,
                Some(_) => {
                    bail!("bench: --parallel, --job, --idle and --translation are sets of their own: give one of them")
                }
                None => bail!(
                    "bench: there is no option '{other}'; there are --runs N, --smp N, --only qemu|mimus, --phases, \
                     --programs, --parallel, --job, --idle, --translation, --no-native, --rows NAME,NAME, --cpu MODEL, \
                     --kernel FILE"
                ),
            },
        }
    }
    if options.smp == 0 {
        options.smp = options.set.smp();
    }
    if options.set != Set::Usual {
        if !options.phases || !options.programs {
            bail!("bench: --phases and --programs are other sets of rows: give one of them");
        }
        options.phases = false;
        options.programs = options.set == Set::Parallel;
        options.native &= matches!(options.set, Set::Parallel | Set::Job);
        return Ok(options);
    }
    if !options.phases && !options.programs {
        bail!("bench: --phases and --programs each leave out the other: give one of them, or none for both");
    }
    Ok(options)
}

/// Whether this host runs the guest's programs.
fn runs_natively(arch: &str) -> bool {
    match std::env::consts::ARCH {
        "x86_64" => matches!(arch, "x86_64" | "i386"),
        "x86" => arch == "i386",
        host => host == arch,
    }
}

impl Options {
    /// Whether a row was asked for.
    fn wants(&self, row: &str) -> bool {
        self.rows.is_empty() || self.rows.iter().any(|r| r == row)
    }

    /// Those of `all` that were asked for.
    fn wanted<'a>(&self, all: &[&'a str]) -> Vec<&'a str> {
        all.iter().copied().filter(|row| self.wants(row)).collect()
    }

    /// The programs' rows to run; empty for all of the usual ones.
    fn program_rows(&self) -> Vec<&str> {
        match self.set {
            Set::Parallel => self.wanted(&PARALLEL),
            _ => self.rows.iter().map(String::as_str).filter(|r| !PHASES.contains(r)).collect(),
        }
    }

    /// Whether any of the programs' rows is to run.
    fn any_program(&self) -> bool {
        self.programs && (self.rows.is_empty() || !self.program_rows().is_empty())
    }

    /// Kernel arguments: what the first process is to run is in its environment.
    fn append(&self) -> String {
        let phases = if self.phases { self.wanted(&PHASES).join(",") } else { String::new() };
        let programs = if self.any_program() { "yes" } else { "no" };
        let mut text =
            format!("console=ttyS0 phases={phases} programs={programs} rows={}", self.program_rows().join(","));
        if self.set == Set::Job {
            text.push_str(&format!(" jobs={}", self.wanted(&JOBS).join(",")));
        }
        text
    }

    fn common(&self, command: &mut Command) {
        command.args(self.guest.board);
        if let Some(cpu) = &self.cpu {
            command.args(["-cpu", cpu]);
        }
    }
}

fn qemu(options: &Options) -> Command {
    let mut command = Command::new(format!("qemu-system-{}", options.guest.arch));
    command.args(["-accel", "tcg"]).args(options.guest.qemu);
    options.common(&mut command);
    command
}

fn ours(mimus: &Path, options: &Options) -> Command {
    let mut command = Command::new(mimus);
    let accelerator = if options.set == Set::Translation { "tcg,stats=on" } else { "tcg" };
    command.args(["system", options.guest.arch, "-accel", accelerator]);
    options.common(&mut command);
    command
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn medians() {
        assert_eq!(median(vec![3.0, 1.0, 2.0]), Some(2.0));
        assert_eq!(median(vec![4.0, 1.0]), Some(2.5));
        assert_eq!(median(vec![]), None);
    }

    #[test]
    fn options() {
        let o = parse(&["riscv64", "--runs", "5", "--smp", "4", "--only", "qemu"]).unwrap();
        assert_eq!((o.runs, o.smp, o.emulators.len()), (5, 4, 1));
        let o = parse(&["x86_64", "--rows", "shell,sort"]).unwrap();
        assert_eq!(o.append(), "console=ttyS0 phases=shell programs=yes rows=sort");
        let o = parse(&["i386", "--rows", "shell"]).unwrap();
        assert_eq!(o.append(), "console=ttyS0 phases=shell programs=no rows=");
        let o = parse(&["i386", "--parallel"]).unwrap();
        let rows = "spin-locks,futex-ping-pong,shared-counters,parallel-make";
        assert_eq!((o.append(), o.smp), (format!("console=ttyS0 phases= programs=yes rows={rows}"), 4));
        let o = parse(&["x86_64", "--job", "--rows", "job-tar", "--smp", "2"]).unwrap();
        assert_eq!((o.append(), o.smp), ("console=ttyS0 phases= programs=no rows=job-tar jobs=job-tar".to_owned(), 2));
        let bad: &[&[&str]] = &[
            &["x86"],
            &["riscv64", "--runs", "0"],
            &["riscv64", "--rusn", "1"],
            &["i386", "--rows"],
            &["i386", "--phases", "--programs"],
            &["i386", "--job", "--programs"],
            &["i386", "--job", "--idle"],
            &[],
        ];
        for words in bad {
            assert!(parse(words).is_err(), "{words:?}");
        }
    }
}
