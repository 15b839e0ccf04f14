//! The file of what came from outside: a line of text for each, so that it can be read and changed by hand.
//!
//! `mimus-inputs 1 seed=7`, then `TIME ID BYTES`: nanoseconds of the virtual clock, where to, and what, in hexadecimal.
//! `-` for bytes: something was there, and the device took nothing. The guest saw nothing of it, but the vCPU stopped there to
//! ask, and does again: so even the blocks of code that a trace shows are the same.

use std::collections::{HashMap, VecDeque};
use std::fs::File;
use std::io::{self, BufRead, BufReader, BufWriter, Write};
use std::path::Path;

const MAGIC: &str = "mimus-inputs 1 seed=";
/// No bytes.
const NOTHING: &str = "-";
/// Longest line taken: the largest frame, twice.
const MAX_LINE: u64 = 1 << 18;

/// Something that came.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Event {
    /// Time of the virtual clock, in ns.
    pub at: u64,
    pub bytes: Vec<u8>,
}

/// What is done with inputs besides.
#[derive(Default)]
pub enum Journal {
    /// Nothing.
    #[default]
    Off,
    /// They are written down; an error is kept for the end.
    Record(BufWriter<File>, Option<io::Error>),
    /// These come instead, each to its place.
    Replay(HashMap<String, VecDeque<Event>>),
}

fn bad(path: &Path, line: usize, why: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, format!("{}, line {line}: {why}", path.display()))
}

fn from_hex(text: &str) -> Option<Vec<u8>> {
    if text == NOTHING {
        return Some(Vec::new());
    }
    let digit = |b: &u8| char::from(*b).to_digit(16).map(|d| d as u8);
    let pairs = text.as_bytes().chunks(2).map(|pair| match pair {
        [a, b] => Some(digit(a)? << 4 | digit(b)?),
        _ => None,
    });
    pairs.collect()
}

/// `TIME ID BYTES`
fn parse(line: &str) -> Option<(String, Event)> {
    let mut words = line.split(' ');
    let (at, id, bytes) = (words.next()?, words.next()?, words.next()?);
    Some((id.to_owned(), Event { at: at.parse().ok()?, bytes: from_hex(bytes)? }))
}

impl Journal {
    pub fn record(path: &Path, seed: u64) -> io::Result<Journal> {
        let mut file = BufWriter::new(File::create(path)?);
        writeln!(file, "{MAGIC}{seed}")?;
        Ok(Journal::Record(file, None))
    }

    pub fn replay(path: &Path) -> io::Result<(Journal, u64)> {
        let mut reader = BufReader::new(File::open(path)?);
        let mut next = || -> io::Result<Option<String>> {
            let mut line = Vec::new();
            let read = io::Read::take(&mut reader, MAX_LINE).read_until(b'\n', &mut line)?;
            Ok((read > 0).then(|| String::from_utf8_lossy(&line).trim_end().to_owned()))
        };
        let first = next()?.unwrap_or_default();
        let seed = first.strip_prefix(MAGIC).and_then(|s| s.parse().ok());
        let seed = seed.ok_or_else(|| bad(path, 1, "this is no record of inputs; -record makes one"))?;
        let mut places: HashMap<String, VecDeque<Event>> = HashMap::new();
        let mut number = 1;
        while let Some(line) = next()? {
            number += 1;
            let (id, event) = parse(&line).ok_or_else(|| bad(path, number, "it is not TIME ID BYTES"))?;
            let place = places.entry(id).or_default();
            if place.back().is_some_and(|before| before.at > event.at) {
                return Err(bad(path, number, "it is earlier than the one before"));
            }
            place.push_back(event);
        }
        Ok((Journal::Replay(places), seed))
    }

    /// Notes that `bytes` reached `id`; none: that it was asked.
    pub fn note(&mut self, id: &str, at: u64, bytes: &[u8]) {
        if let Journal::Record(file, error) = self {
            let mut hex: String = bytes.iter().map(|b| format!("{b:02x}")).collect();
            if hex.is_empty() {
                hex.push_str(NOTHING);
            }
            if let Err(e) = writeln!(file, "{at} {id} {hex}") {
                error.get_or_insert(e);
            }
        }
    }

    pub fn finish(&mut self) -> io::Result<()> {
        match self {
            Journal::Record(file, error) => match error.take() {
                Some(e) => Err(e),
                None => file.flush(),
            },
            _ => Ok(()),
        }
    }
}
