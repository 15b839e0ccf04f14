//! `cargo xtask fuzz x86`: the differential test of the x86 translator against the host, at length.

use std::process::Command;

use anyhow::{Context, bail};

use crate::root;

const USAGE: &str = "\
cargo xtask fuzz x86 [OPTION...]   random sequences, by generated code, interpreter and host

  --count N        instructions (default 10000000)
  --seed N         where to begin (default: the clock); what a failure prints reproduces it
  --class C        integer, vector, x87 or all (default)
  --bits N         16, 32, 64, or all (default)
  --length N       instructions of a sequence (default 16)
  --keep-going N   report N differences before stopping (default 1)
  --debug          do not optimise
";

/// Options and the variables of the test that they set (see tcg/frontends/x86/tests/differential).
const OPTIONS: [(&str, &str); 6] = [
    ("--count", "MIMUS_FUZZ_COUNT"),
    ("--seed", "MIMUS_FUZZ_SEED"),
    ("--class", "MIMUS_FUZZ_CLASS"),
    ("--bits", "MIMUS_FUZZ_BITS"),
    ("--length", "MIMUS_FUZZ_LENGTH"),
    ("--keep-going", "MIMUS_FUZZ_KEEP_GOING"),
];

/// Runs it.
pub fn run(args: &[&str]) -> anyhow::Result<()> {
    let Some((&"x86", rest)) = args.split_first() else {
        print!("{USAGE}");
        bail!("what to fuzz: x86");
    };
    let mut variables = vec![("MIMUS_FUZZ_COUNT", "10000000".to_owned())];
    let clock = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).map_or(1, |t| t.as_secs());
    variables.push(("MIMUS_FUZZ_SEED", (clock << 24).to_string()));
    let mut release = true;
    let mut words = rest.iter();
    while let Some(&word) = words.next() {
        match word {
            "--debug" => release = false,
            "--help" | "-h" => {
                print!("{USAGE}");
                return Ok(());
            }
            _ => {
                let Some((_, variable)) = OPTIONS.iter().find(|(option, _)| *option == word) else {
                    bail!("there is no option '{word}'; see cargo xtask fuzz x86 --help");
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
    command.args(["test", "-p", "mimus-tcg-frontend-x86", "--test", "differential"]).current_dir(root());
    if release {
        command.arg("--release");
    }
    let status = command.args(["fuzz", "--", "--nocapture"]).envs(variables).status().context("cargo")?;
    if !status.success() {
        bail!("the engines differ");
    }
    Ok(())
}
