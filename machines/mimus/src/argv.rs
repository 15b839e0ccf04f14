//! QEMU's way of writing options, for clap.
//!
//! QEMU writes long options with one dash and their value as the next word, whatever that
//! word looks like (`-append -x`). clap wants two dashes and would read `-name` as five
//! letters. [`rewrite`] turns the first into `--name=value`, and reports what is no option.

use std::collections::HashMap;
use std::ffi::OsString;

use clap::Command;
use mimus_machines::config::keyval::nearest;

use crate::qemu_options;

/// `-name value`, `--name value` and `--name=value` of every option of `command` as
/// `--name=value`; other words are left as they are.
pub fn rewrite(command: &Command, words: Vec<OsString>) -> anyhow::Result<Vec<OsString>> {
    let known = known_options(command);
    let mut out = Vec::new();
    let mut words = words.into_iter();
    while let Some(word) = words.next() {
        let text = word.to_string_lossy();
        let Some(written) = text.strip_prefix('-').filter(|t| !t.is_empty()) else {
            out.push(word);
            continue;
        };
        let (name, inline) = match written.strip_prefix('-') {
            Some(long) => long.split_once('=').map_or((long, None), |(n, v)| (n, Some(v))),
            None => (written, None),
        };
        match (known.get(name), inline) {
            (Some(Option_ { canonical, takes_value: true }), Some(value)) => {
                out.push(format!("--{canonical}={value}").into())
            }
            (Some(Option_ { canonical, takes_value: true }), None) => {
                let value = words.next().ok_or_else(|| anyhow::anyhow!("-{name}: its value is missing"))?;
                let mut joined = OsString::from(format!("--{canonical}="));
                joined.push(value);
                out.push(joined);
            }
            (Some(Option_ { canonical, takes_value: false }), None) => out.push(format!("--{canonical}").into()),
            (Some(_), Some(value)) => anyhow::bail!("--{name}={value}: this option takes no value"),
            (None, _) => return Err(unknown(name, &text, known.keys().map(String::as_str))),
        }
    }
    Ok(out)
}

#[derive(Clone)]
struct Option_ {
    canonical: String,
    takes_value: bool,
}

fn known_options(command: &Command) -> HashMap<String, Option_> {
    let mut known = HashMap::new();
    for arg in command.get_arguments() {
        let Some(long) = arg.get_long() else { continue };
        let option = Option_ { canonical: long.to_owned(), takes_value: arg.get_action().takes_values() };
        for alias in arg.get_all_aliases().unwrap_or_default() {
            known.insert(alias.to_owned(), option.clone());
        }
        known.insert(long.to_owned(), option);
    }
    known
}

/// What to say about an option that is not there.
fn unknown<'a>(name: &str, written: &str, known: impl Iterator<Item = &'a str>) -> anyhow::Error {
    if let Some(instead) = qemu_options::missing(name) {
        return anyhow::anyhow!("-{name} is an option of QEMU that mimus does not have (yet): {instead}");
    }
    match nearest(name, known.chain(qemu_options::names().map(|n| -> &str { n }))) {
        Some(near) => anyhow::anyhow!("{written}: there is no such option; did you mean -{near}?"),
        None => anyhow::anyhow!("{written}: there is no such option; see -help"),
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;
    use crate::cli::SystemArgs;

    fn run(words: &[&str]) -> Result<Vec<String>, String> {
        let words = words.iter().map(OsString::from).collect();
        let out = rewrite(&SystemArgs::command(), words).map_err(|e| e.to_string())?;
        Ok(out.into_iter().map(|w| w.to_string_lossy().into_owned()).collect())
    }

    #[test]
    fn one_dash_two_dashes_and_equals() {
        for words in [&["-accel", "kvm"][..], &["--accel", "kvm"], &["--accel=kvm"]] {
            assert_eq!(run(words).unwrap(), ["--accel=kvm"]);
        }
        assert_eq!(run(&["-M", "virt", "-m", "2G"]).unwrap(), ["--machine=virt", "--m=2G"]);
        assert_eq!(run(&["-append", "-x --y=z", "-S"]).unwrap(), ["--append=-x --y=z", "--S"]);
        assert_eq!(run(&["disk.img", "-nographic"]).unwrap(), ["disk.img", "--nographic"]);
    }

    #[test]
    fn what_is_not_there() {
        assert_eq!(
            run(&["-spice", "port=1"]).unwrap_err().split(':').next(),
            Some("-spice is an option of QEMU that mimus does not have (yet)")
        );
        assert!(run(&["-nographics"]).unwrap_err().ends_with("did you mean -nographic?"));
        assert!(run(&["-kernl", "x"]).unwrap_err().ends_with("did you mean -kernel?"));
        assert!(run(&["-xyzzyplugh"]).unwrap_err().ends_with("see -help"));
        assert!(run(&["-kernel"]).unwrap_err().contains("value is missing"));
        assert!(run(&["--nographic=1"]).unwrap_err().contains("takes no value"));
    }

    /// Every option of QEMU 10 is either ours or in the table, never both.
    #[test]
    fn the_table_and_our_options_are_disjoint() {
        let ours = known_options(&SystemArgs::command());
        for name in qemu_options::names() {
            assert!(!ours.contains_key(name), "-{name} is in both");
            assert!(run(&[&format!("-{name}"), "x"]).is_err());
        }
    }
}
