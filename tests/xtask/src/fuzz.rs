//! `cargo xtask fuzz`: tests with random input, at length.

use std::process::Command;

use anyhow::{Context, bail};

use crate::root;

/// Options of a kind and the variables of its tests that they set.
type Options = &'static [(&'static str, &'static str)];

struct Kind {
    name: &'static str,
    usage: &'static str,
    /// What `cargo test` is told; behind it comes what the tests are told.
    test: &'static [&'static str],
    filter: &'static [&'static str],
    options: Options,
    /// Variables that are set without an option.
    usual: Options,
    /// Everything optimised.
    release: bool,
    failed: &'static str,
}

const KINDS: [Kind; 2] = [
    // See tcg/frontends/x86/tests/differential.
    Kind {
        name: "x86",
        usage: "\
cargo xtask fuzz x86 [OPTION...]   random sequences, by generated code, interpreter and host

  --count N        instructions (default 10000000)
  --seed N         what the sequences are made from (default: the clock): another number, other sequences, however near;
                   what a failure prints reproduces it
  --class C        integer, vector, x87 or all (default)
  --bits N         16, 32, 64, or all (default)
  --length N       instructions of a sequence (default 16)
  --bad N          of 100 accesses and stack pointers, how many more may fault (default 0)
  --keep-going N   report N differences before stopping (default 1)
  --debug          do not optimise
",
        test: &["-p", "mimus-tcg-frontend-x86", "--test", "differential"],
        filter: &["fuzz"],
        options: &[
            ("--count", "MIMUS_FUZZ_COUNT"),
            ("--seed", "MIMUS_FUZZ_SEED"),
            ("--class", "MIMUS_FUZZ_CLASS"),
            ("--bits", "MIMUS_FUZZ_BITS"),
            ("--length", "MIMUS_FUZZ_LENGTH"),
            ("--bad", "MIMUS_FUZZ_BAD"),
            ("--keep-going", "MIMUS_FUZZ_KEEP_GOING"),
        ],
        usual: &[("MIMUS_FUZZ_COUNT", "10000000")],
        release: true,
        failed: "the engines differ",
    },
    // See tests/tests/gdb/hostile.rs and clients.rs.
    Kind {
        name: "gdb",
        usage: "\
cargo xtask fuzz gdb [OPTION...]   a debugger's packets that make no sense, to machines of each guest; and debuggers
                                   that come and go while the guest works

  --count N        packets, of all machines together (default 10000000)
  --seed N         where to begin (default: the clock); what is printed reproduces it
  --visits N       debuggers that come and go, for each guest and engine (default 1000)
",
        test: &["-p", "mimus-tests", "--test", "gdb"],
        filter: &["hostile", "come_and_go"],
        options: &[("--count", "MIMUS_FUZZ_PACKETS"), ("--seed", "MIMUS_FUZZ_SEED"), ("--visits", "MIMUS_GDB_VISITS")],
        usual: &[("MIMUS_FUZZ_PACKETS", "10000000"), ("MIMUS_GDB_VISITS", "1000")],
        release: false,
        failed: "the debugger's server or its guest did not stand it",
    },
];

/// Runs it.
pub fn run(args: &[&str]) -> anyhow::Result<()> {
    let (kind, rest) = match args.split_first() {
        Some((name, rest)) => (KINDS.iter().find(|k| k.name == *name), rest),
        None => (None, args),
    };
    let Some(kind) = kind else {
        KINDS.iter().for_each(|k| println!("{}", k.usage));
        bail!("what to fuzz: x86 or gdb");
    };
    let mut variables: Vec<(&str, String)> = kind.usual.iter().map(|(k, v)| (*k, (*v).to_owned())).collect();
    let clock = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).map_or(1, |t| t.as_secs());
    variables.push(("MIMUS_FUZZ_SEED", (clock << 24).to_string()));
    let mut release = kind.release;
    let mut words = rest.iter();
    while let Some(&word) = words.next() {
        match word {
            "--debug" if kind.release => release = false,
            "--help" | "-h" => {
                print!("{}", kind.usage);
                return Ok(());
            }
            _ => {
                let Some((_, variable)) = kind.options.iter().find(|(option, _)| *option == word) else {
                    bail!("there is no option '{word}'; see cargo xtask fuzz {} --help", kind.name);
                };
                let value = words.next().with_context(|| format!("{word} wants a value"))?;
                if word != "--class" {
                    value.parse::<u64>().with_context(|| format!("{word}: '{value}' is no number"))?;
                }
                variables.push((variable, (*value).to_owned()));
            }
        }
    }
    let program = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let mut command = Command::new(program);
    command.arg("test").args(kind.test).current_dir(root());
    if release {
        command.arg("--release");
    }
    command.arg("--").args(kind.filter).arg("--nocapture");
    let status = command.envs(variables).status().context("cargo")?;
    if !status.success() {
        bail!("{}", kind.failed);
    }
    Ok(())
}
