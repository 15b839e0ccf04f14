//! `mimus trace`: what is in a trace.

use std::ffi::OsString;
use std::io::{BufWriter, Write};
use std::ops::ControlFlow;
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{anyhow, bail};
use mimus_debug::trace::filter::number;
use mimus_debug::trace::report::{Counts, Coverage, Flame, LastWrite, line};
use mimus_debug::trace::{Filter, Reader, Record};
use mimus_machines::config::keyval::nearest;

use mimus_debug::symbols::Symbols;

const USAGE: &str = "\
mimus trace: what is in a file that mimus system -trace FILE wrote

usage:
  mimus trace print FILE        every record in a line
  mimus trace count FILE        how much of what, and the hottest blocks
  mimus trace coverage FILE     the code executed: --drcov OUT (for IDA, Ghidra) or --lcov OUT (needs --symbols)
  mimus trace flame FILE        folded stacks for flame graphs: mimus trace flame t.trc | flamegraph.pl > t.svg
  mimus trace last-write FILE ADDRESS [--before N]
                                who wrote there last, before instruction N

options:
  --symbols FILE   ELF file (vmlinux), or System.map as the debugger's 'kallsyms FILE' writes it, for names; several times
  --disas          print: the instructions of each block
  -n N             print, count: that many lines
  --out OUT        write there instead of to the terminal
  KEY=VALUE        only what matches: range=A-B (code), addr=A-B (data), space=ROOT, vcpu=N, mode=user|kernel|machine
";

const OPTIONS: [&str; 7] = ["--symbols", "--disas", "-n", "--out", "--drcov", "--lcov", "--before"];

#[derive(Default)]
struct Args {
    words: Vec<String>,
    symbols: Vec<PathBuf>,
    out: Option<PathBuf>,
    drcov: Option<PathBuf>,
    lcov: Option<PathBuf>,
    disas: bool,
    lines: Option<usize>,
    before: Option<u64>,
    filter: Filter,
}

fn parse(words: Vec<OsString>) -> anyhow::Result<Args> {
    let mut args = Args::default();
    let mut words = words.into_iter().map(|w| w.to_string_lossy().into_owned());
    while let Some(word) = words.next() {
        let mut value = || words.next().ok_or_else(|| anyhow!("trace: {word}: its value is missing"));
        match word.trim_start_matches('-') {
            "symbols" if word.starts_with('-') => args.symbols.push(value()?.into()),
            "out" if word.starts_with('-') => args.out = Some(value()?.into()),
            "drcov" if word.starts_with('-') => args.drcov = Some(value()?.into()),
            "lcov" if word.starts_with('-') => args.lcov = Some(value()?.into()),
            "disas" if word.starts_with('-') => args.disas = true,
            "n" if word.starts_with('-') => {
                let text = value()?;
                let lines = text.parse().map_err(|_| anyhow!("trace -n {text}: this is no number of lines"))?;
                args.lines = Some(lines);
            }
            "before" if word.starts_with('-') => args.before = Some(number(&value()?).map_err(|e| anyhow!(e))?),
            "help" | "h" => args.words = vec!["help".to_owned()],
            _ if word.starts_with('-') => {
                let near =
                    nearest(&word, OPTIONS.into_iter()).map_or(String::new(), |n| format!("; did you mean {n}?"));
                bail!("trace: there is no option {word}{near}; see mimus trace help");
            }
            _ => match word.split_once('=').and_then(|(key, value)| args.filter.add(key, value)) {
                Some(result) => result.map_err(|e| anyhow!("trace {word}: {e}"))?,
                None => args.words.push(word),
            },
        }
    }
    Ok(args)
}

/// Runs `mimus trace …`.
pub fn main(words: Vec<OsString>) -> anyhow::Result<ExitCode> {
    let args = parse(words)?;
    let mut words = args.words.iter().map(String::as_str);
    let Some(command) = words.next().filter(|c| *c != "help") else {
        print!("{USAGE}");
        return Ok(ExitCode::SUCCESS);
    };
    const COMMANDS: [&str; 5] = ["print", "count", "coverage", "flame", "last-write"];
    if !COMMANDS.contains(&command) {
        let near = nearest(command, COMMANDS.into_iter()).map_or(String::new(), |n| format!("; did you mean {n}?"));
        bail!("trace {command}: there is no such command{near} There are {}", COMMANDS.join(", "));
    }
    let file = words.next().ok_or_else(|| anyhow!("trace {command}: the file is missing"))?;
    let address = words.next().map(number).transpose().map_err(|e| anyhow!("trace {command}: {e}"))?;
    let mut reader = Reader::open(file.as_ref()).map_err(|e| anyhow!("{file}: {e}"))?;
    let mut symbols = Symbols::default();
    for path in &args.symbols {
        symbols.add(Symbols::open(path)?);
    }
    let out: Box<dyn Write> = match &args.out {
        Some(path) => Box::new(std::fs::File::create(path).map_err(|e| anyhow!("{}: {e}", path.display()))?),
        None => Box::new(std::io::stdout().lock()),
    };
    let mut out = BufWriter::new(out);
    let name = |at: u64| symbols.describe(at);
    match command {
        "print" => print(&mut reader, &args, file, &mut out, &symbols)?,
        "count" => {
            let mut counts = Counts::default();
            each(&mut reader, &args.filter, file, |r| counts.add(r))?;
            out.write_all(counts.text(args.lines.unwrap_or(20), &name).as_bytes())?;
        }
        "coverage" => coverage(&mut reader, &args, file, &symbols, &mut out)?,
        "flame" => {
            let mut flame = Flame::default();
            let function = |at: u64| symbols.function(at);
            each(&mut reader, &args.filter, file, |r| flame.add(r, &function))?;
            out.write_all(flame.text().as_bytes())?;
        }
        _ => {
            let at = address.ok_or_else(|| anyhow!("trace last-write: the address is missing"))?;
            if !reader.header.memory {
                bail!("{file} has no stores in it: make it with -trace FILE,what=mem");
            }
            let mut last = LastWrite::new(at, args.before);
            each(&mut reader, &args.filter, file, |r| last.add(r, &name))?;
            out.write_all(last.text().as_bytes())?;
        }
    }
    match out.flush() {
        Err(e) if e.kind() == std::io::ErrorKind::BrokenPipe => Ok(ExitCode::SUCCESS),
        result => Ok(result.map(|()| ExitCode::SUCCESS)?),
    }
}

type FileReader = Reader<std::io::BufReader<std::fs::File>>;

fn each(reader: &mut FileReader, filter: &Filter, file: &str, mut f: impl FnMut(&Record<'_>)) -> anyhow::Result<()> {
    let result = reader.each(filter, |record| {
        f(record);
        ControlFlow::Continue(())
    });
    result.map_err(|e| anyhow!("{file}: {e}"))?;
    warn_if_incomplete(reader, file);
    Ok(())
}

fn warn_if_incomplete(reader: &FileReader, file: &str) {
    if !reader.complete {
        eprintln!("mimus: warning: {file} breaks off: what was written last is missing");
    }
}

fn print(
    reader: &mut FileReader,
    args: &Args,
    file: &str,
    out: &mut impl Write,
    symbols: &Symbols,
) -> anyhow::Result<()> {
    let riscv = reader.header.guest.starts_with("riscv");
    let disassemble =
        |bytes: &[u8], pc: u64, bits: u8| mimus_tcg::disassemble(if riscv { 0 } else { bits.max(16) }, bytes, pc);
    let name = |at: u64| symbols.describe(at);
    let mut left = args.lines.unwrap_or(usize::MAX);
    let mut failed = Ok(());
    let result = reader.each(&args.filter, |record| {
        if left == 0 {
            return ControlFlow::Break(());
        }
        left -= 1;
        let text = line(record, args.disas.then_some(&disassemble as _), &name);
        failed = writeln!(out, "{text}");
        if failed.is_err() { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    });
    result.map_err(|e| anyhow!("{file}: {e}"))?;
    if left > 0 && failed.is_ok() {
        warn_if_incomplete(reader, file);
    }
    match failed {
        Err(e) if e.kind() != std::io::ErrorKind::BrokenPipe => Err(e.into()),
        _ => Ok(()),
    }
}

fn coverage(
    reader: &mut FileReader,
    args: &Args,
    file: &str,
    symbols: &Symbols,
    out: &mut impl Write,
) -> anyhow::Result<()> {
    let mut coverage = Coverage::default();
    each(reader, &args.filter, file, |r| coverage.add(r))?;
    if let Some(path) = &args.drcov {
        std::fs::write(path, coverage.drcov(&symbols.images())).map_err(|e| anyhow!("{}: {e}", path.display()))?;
    }
    if let Some(path) = &args.lcov {
        let text = coverage.lcov(&|at| symbols.source_line(at), &|each| symbols.each_line(each));
        if text.is_empty() {
            bail!(
                "--lcov: no source line is known for this code: give --symbols FILE with an ELF file with debug information"
            );
        }
        std::fs::write(path, text).map_err(|e| anyhow!("{}: {e}", path.display()))?;
    }
    let (insns, stretches) = coverage.size();
    writeln!(out, "{insns} instructions in {stretches} blocks were executed")?;
    Ok(())
}
