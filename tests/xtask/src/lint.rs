//! Format, clippy, and rules that neither knows.

use std::process::Command;

use anyhow::{Context, bail};

/// Longest source file, in lines. Tables are apart in files of their own.
const MAX_LINES: usize = 1000;

/// Runs every check; all that is wrong is shown.
pub fn run() -> anyhow::Result<()> {
    let mut wrong = tracked_files()?;
    for args in [&["fmt", "--all", "--check"][..], &["clippy", "--workspace", "--all-targets", "--", "-D", "warnings"]]
    {
        if let Err(e) = crate::cargo(args) {
            wrong.push(e.to_string());
        }
    }
    if wrong.is_empty() {
        println!("lint: clean");
        return Ok(());
    }
    for line in &wrong {
        eprintln!("{line}");
    }
    bail!("{} findings", wrong.len())
}

/// Words that belong to one machine or one network, not to the project. Written in two
/// parts so that this file is not a finding itself.
fn foreign_words() -> Vec<String> {
    [("/wo", "rk/"), ("/ho", "me/"), ("deb.deb", "ian.org"), ("archive.ubu", "ntu.com")]
        .iter()
        .map(|(a, b)| format!("{a}{b}"))
        .collect()
}

fn tracked_files() -> anyhow::Result<Vec<String>> {
    let output =
        Command::new("git").args(["ls-files", "-z"]).current_dir(crate::root()).output().context("git ls-files")?;
    let names = String::from_utf8_lossy(&output.stdout).into_owned();
    let mut wrong = Vec::new();
    for name in names.split('\0').filter(|n| !n.is_empty()) {
        // Binary and deleted files have no lines to look at.
        let Ok(text) = std::fs::read_to_string(crate::root().join(name)) else {
            continue;
        };
        wrong.extend(findings(name, &text, &foreign_words()));
    }
    Ok(wrong)
}

fn findings(name: &str, text: &str, foreign: &[String]) -> Vec<String> {
    let mut out = Vec::new();
    let lines = text.lines().count();
    if name.ends_with(".rs") && lines > MAX_LINES {
        out.push(format!("{name}: {lines} lines; split it (at most {MAX_LINES})"));
    }
    for (number, line) in text.lines().enumerate() {
        for word in foreign {
            if line.contains(word.as_str()) {
                out.push(format!("{name}:{}: names this machine or a mirror: {word}", number + 1));
            }
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_found() {
        let words = foreign_words();
        assert!(findings("a.rs", "fn main() {}\n", &words).is_empty());
        assert_eq!(findings("a.rs", &"\n".repeat(1001), &words).len(), 1);
        assert_eq!(findings("a.md", &format!("see {}x\n", words[0]), &words).len(), 1);
    }
}
