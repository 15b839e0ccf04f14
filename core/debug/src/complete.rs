//! What a line that is being typed may go on with.

use std::path::Path;

use mimus_arch::riscv::csr;

use crate::catch;
use crate::debugger::Debugger;
use crate::help::{COMMANDS, SHORT};
use crate::info;
use crate::registers;

/// Most candidates.
const MOST: usize = 100;
/// Most files of a folder that are looked at.
const MOST_FILES: usize = 4096;

impl Debugger {
    /// Where the last word of a line begins, and what it may be: a command, and in its arguments what they take. `more`:
    /// commands of others.
    pub fn complete(&self, line: &str, more: &[&str]) -> (usize, Vec<String>) {
        // Each command's words are looked for in what is behind the blank.
        let before = line.trim_start();
        let lead = line.len() - before.len();
        let Some((command, rest)) = before.split_once([' ', '/']) else {
            let others = more.iter().map(|m| m.split(' ').next().unwrap_or_default());
            let all = COMMANDS.iter().map(|c| c.0).chain(others);
            return (lead, begin(before, all.map(str::to_owned)));
        };
        let command = SHORT.iter().find(|(short, _)| *short == command).map_or(command, |(_, long)| long);
        let from = |word: &str| line.len() - word.len();
        let word = rest.rsplit(' ').next().unwrap_or_default();
        let first = rest.trim_start() == word;
        let words = |all: Vec<String>| (from(word), begin(word, all));
        match command {
            "help" => {
                let views = info::names().map(|name| format!("info {name}"));
                let all =
                    COMMANDS.iter().map(|c| c.0.to_owned()).chain(views).chain(more.iter().map(|m| (*m).to_owned()));
                (from(rest), begin(rest, all))
            }
            "info" => self.info_words(rest, word, line.len(), more),
            "catch" => match self.catch_words(rest, word, first) {
                Some(all) => words(all),
                None => self.expression(line),
            },
            "symbols" | "dump" | "kallsyms" if first => (from(word), files(word)),
            "struct" if first => (from(word), self.types(word)),
            "step" if !word.starts_with('$') => {
                words(["branch", "call", "return", "exception", "instruction"].map(str::to_owned).to_vec())
            }
            "registers" if first => {
                let (at, mut found) = self.expression(line);
                found.splice(..0, begin(word, ["all".to_owned()]));
                (at, found)
            }
            _ => self.expression(line),
        }
    }

    fn info_words(&self, rest: &str, word: &str, end: usize, more: &[&str]) -> (usize, Vec<String>) {
        let from = end - word.len();
        match rest.rsplit_once(' ') {
            None => {
                let others = more.iter().filter_map(|m| m.strip_prefix("info "));
                (from, begin(word, info::names().map(str::to_owned).chain(others.map(str::to_owned))))
            }
            Some(("device", _)) => {
                let all = self.with_state(|_, _, target, _| target.devices()).unwrap_or_default();
                (from, begin(word, all.into_iter().map(|d| d.path)))
            }
            Some((view, _)) if info::takes_address(view) => self.expression(rest).shifted(end - rest.len()),
            Some(_) => (from, Vec::new()),
        }
    }

    fn catch_words(&self, rest: &str, word: &str, first: bool) -> Option<Vec<String>> {
        const EVENTS: [&str; 9] = ["exception", "interrupt", "csr", "msr", "cr", "port", "device", "mode", "process"];
        let owned = |all: &[&str]| Some(all.iter().map(|s| (*s).to_owned()).collect());
        if first {
            return owned(&EVENTS);
        }
        let arguments = rest.split_whitespace().count() - usize::from(!word.is_empty());
        match (rest.split_whitespace().next()?, arguments) {
            ("csr", 1) => Some(csr::CSRS.iter().map(|(_, name)| (*name).to_owned()).collect()),
            ("msr", 1) => Some(catch::msr_names().map(str::to_owned).collect()),
            ("mode", 1) => {
                let cpu = self.with_state(|_, _, target, vcpu| target.state(vcpu)).ok()?;
                Some(catch::mode_names(&cpu).map(str::to_owned).collect())
            }
            ("csr" | "msr" | "cr" | "port" | "device", 2) => owned(&["r", "w", "rw", "if"]),
            _ => None,
        }
    }

    fn types(&self, word: &str) -> Vec<String> {
        self.with_state(|_, linux, _, _| {
            linux.and_then(|l| l.types.as_ref()).map_or_else(Vec::new, |t| t.names(word, MOST))
        })
    }

    /// Symbols, and registers behind a `$`.
    fn expression(&self, line: &str) -> (usize, Vec<String>) {
        let at = line
            .rfind(|c: char| !(c.is_alphanumeric() || "_.$".contains(c)))
            .map_or(0, |at| at + line[at..].chars().next().map_or(1, char::len_utf8));
        let word = &line[at..];
        self.with_state(|symbols, _, target, vcpu| {
            if let Some(name) = word.strip_prefix('$') {
                let Ok(cpu) = target.state(vcpu) else { return (at, Vec::new()) };
                let all = registers::names(&cpu).into_iter().filter(|n| n.starts_with(name));
                return (at, all.map(|n| format!("${n}")).collect());
            }
            // All there are would help nobody.
            let found = if word.is_empty() { Vec::new() } else { symbols.complete(word, MOST) };
            (at, found.into_iter().map(str::to_owned).collect())
        })
    }
}

/// A begin within a part of a line, as one within the line.
trait Shifted {
    fn shifted(self, by: usize) -> Self;
}

impl Shifted for (usize, Vec<String>) {
    fn shifted(self, by: usize) -> Self {
        (self.0 + by, self.1)
    }
}

fn begin(word: &str, all: impl IntoIterator<Item = String>) -> Vec<String> {
    let mut found: Vec<String> = all.into_iter().filter(|name| name.starts_with(word)).collect();
    found.sort_unstable();
    found.dedup();
    found
}

/// Files and folders of the host that begin so.
fn files(word: &str) -> Vec<String> {
    let (folder, name) = word.rsplit_once('/').map_or(("", word), |(folder, name)| (folder, name));
    let place = match folder {
        "" if word.starts_with('/') => Path::new("/"),
        "" => Path::new("."),
        folder => Path::new(folder),
    };
    let Ok(entries) = std::fs::read_dir(place) else { return Vec::new() };
    let candidates = entries.flatten().take(MOST_FILES).filter_map(|entry| {
        let found = entry.file_name().into_string().ok().filter(|n| n.starts_with(name))?;
        // Hidden ones are for those who ask.
        if found.starts_with('.') && !name.starts_with('.') {
            return None;
        }
        let end = if entry.path().is_dir() { "/" } else { "" };
        Some(format!("{}{found}{end}", &word[..word.len() - name.len()]))
    });
    let mut all: Vec<String> = candidates.collect();
    all.sort_unstable();
    all.truncate(MOST);
    all
}
