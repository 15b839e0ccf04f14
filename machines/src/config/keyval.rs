//! `key=value,key=value`, as every option with several values is written.
//!
//! Rules are those of QEMU's options: values end at a comma, a doubled comma is a comma, the
//! first element may be a value without its key, a key alone is `on`, `nokey` alone is `off`.

use super::ConfigError;

/// The pairs of one option, each taken once; what is left at the end is an error.
#[derive(Debug, Clone)]
pub struct KeyValues {
    option: String,
    text: String,
    pairs: Vec<(String, String)>,
    asked: Vec<&'static str>,
}

impl KeyValues {
    /// Splits `text`. `implied` is the key of a first element without `=`.
    pub fn parse(option: &str, text: &str, implied: Option<&str>) -> Result<Self, ConfigError> {
        let mut pairs = Vec::new();
        for (i, element) in split(text).into_iter().enumerate() {
            match element.split_once('=') {
                Some(("", _)) => {
                    return Err(ConfigError::new(option, text, format!("'{element}' has no key before the '='")));
                }
                Some((key, value)) => pairs.push((key.to_owned(), value.to_owned())),
                None if element.is_empty() && i == 0 && text.is_empty() => {}
                None if element.is_empty() => {
                    return Err(ConfigError::new(
                        option,
                        text,
                        "there is an empty part (two commas are one comma in a value)",
                    ));
                }
                None => match implied.filter(|_| i == 0) {
                    Some(key) => pairs.push((key.to_owned(), element)),
                    None => pairs.push(bare(element)),
                },
            }
        }
        Ok(KeyValues { option: option.into(), text: text.into(), pairs, asked: Vec::new() })
    }

    /// The value of `key` (the last, if given more than once).
    pub fn take(&mut self, key: &'static str) -> Option<String> {
        self.take_all(key).pop()
    }

    /// All values of `key`, in order.
    pub fn take_all(&mut self, key: &'static str) -> Vec<String> {
        self.asked.push(key);
        let mut found = Vec::new();
        self.pairs.retain_mut(|(k, v)| {
            let hit = k == key;
            if hit {
                found.push(std::mem::take(v));
            }
            !hit
        });
        found
    }

    /// `on`/`off` (also `yes`/`no`, `true`/`false`).
    pub fn take_bool(&mut self, key: &'static str) -> Result<Option<bool>, ConfigError> {
        match self.take(key).as_deref() {
            None => Ok(None),
            Some("on" | "yes" | "true" | "y") => Ok(Some(true)),
            Some("off" | "no" | "false" | "n") => Ok(Some(false)),
            Some(other) => Err(self.error(format!("{key}={other}: it is on or off"))),
        }
    }

    /// A whole number.
    pub fn take_number(&mut self, key: &'static str) -> Result<Option<u64>, ConfigError> {
        let Some(value) = self.take(key) else {
            return Ok(None);
        };
        let parsed = match value.strip_prefix("0x") {
            Some(hex) => u64::from_str_radix(hex, 16),
            None => value.parse(),
        };
        parsed.map(Some).map_err(|_| self.error(format!("{key}={value}: it takes a whole number")))
    }

    /// One of a few words.
    pub fn take_word<T: Copy>(&mut self, key: &'static str, words: &[(&str, T)]) -> Result<Option<T>, ConfigError> {
        let Some(value) = self.take(key) else {
            return Ok(None);
        };
        match words.iter().find(|(w, _)| *w == value) {
            Some((_, v)) => Ok(Some(*v)),
            None => {
                let known: Vec<&str> = words.iter().map(|(w, _)| *w).collect();
                Err(self.error(format!("{key}={value}: it is one of {}", known.join(", "))))
            }
        }
    }

    /// What nothing has taken, in order.
    pub fn rest(self) -> Vec<(String, String)> {
        self.pairs
    }

    /// An error if something is left, naming the keys there are.
    pub fn finish(self) -> Result<(), ConfigError> {
        let Some((key, _)) = self.pairs.first() else {
            return Ok(());
        };
        let near = nearest(key, self.asked.iter().copied());
        let mut known = self.asked.clone();
        known.sort_unstable();
        known.dedup();
        let hint = match near {
            Some(near) => format!("did you mean {near}?"),
            None => format!("known: {}", known.join(", ")),
        };
        Err(self.error(format!("there is no key '{key}'; {hint}")))
    }

    /// An error about this option.
    pub fn error(&self, reason: impl Into<String>) -> ConfigError {
        ConfigError::new(&self.option, &self.text, reason)
    }
}

/// A key alone: `nokey` is the old way to write `key=off`, known for these.
fn bare(element: String) -> (String, String) {
    match element.strip_prefix("no") {
        Some(key) if matches!(key, "wait" | "delay" | "server") => (key.to_owned(), "off".into()),
        _ => (element, "on".into()),
    }
}

/// Splits at single commas; two commas are one.
pub fn split(text: &str) -> Vec<String> {
    let mut parts = vec![String::new()];
    let mut chars = text.chars().peekable();
    while let Some(c) = chars.next() {
        match c {
            ',' if chars.peek() == Some(&',') => {
                chars.next();
                push(&mut parts, ',');
            }
            ',' => parts.push(String::new()),
            c => push(&mut parts, c),
        }
    }
    parts
}

fn push(parts: &mut [String], c: char) {
    if let Some(last) = parts.last_mut() {
        last.push(c);
    }
}

/// The candidate nearest to `word`, if one is near enough to be what was meant.
pub fn nearest<'a>(word: &str, candidates: impl Iterator<Item = &'a str>) -> Option<&'a str> {
    candidates
        .map(|c| (strsim::damerau_levenshtein(word, c), c))
        .filter(|(distance, c)| *distance <= 1 + word.len().min(c.len()) / 4)
        .min_by_key(|(distance, _)| *distance)
        .map(|(_, c)| c)
}

/// A size with QEMU's suffixes: `512M`, `2G`, `1.5G`, `65536k`; `default_shift` is the unit of a
/// number without one (20 for MiB).
pub fn parse_size(text: &str, default_shift: u32) -> Result<u64, String> {
    let help = "write a size as 512M or 2G";
    let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let shift = match &text[digits.len()..] {
        "" => default_shift,
        "b" | "B" => 0,
        "k" | "K" | "KiB" => 10,
        "m" | "M" | "MiB" => 20,
        "g" | "G" | "GiB" => 30,
        "t" | "T" | "TiB" => 40,
        "p" | "P" => 50,
        other => return Err(format!("'{other}' is no unit of size (K, M, G, T): {help}")),
    };
    if let Ok(whole) = digits.parse::<u64>() {
        return whole.checked_mul(1 << shift).ok_or_else(|| format!("it is more than 64 bits can count: {help}"));
    }
    match digits.parse::<f64>() {
        Ok(n) if n.is_finite() && n >= 0.0 && digits.contains('.') && n * ((1u64 << shift) as f64) < 9e18 => {
            Ok((n * (1u64 << shift) as f64) as u64)
        }
        _ => Err(format!("'{digits}' is no number: {help}")),
    }
}
