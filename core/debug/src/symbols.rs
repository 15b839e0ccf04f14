//! Names of addresses, both ways, and source lines: from ELF files with DWARF, `System.map`, or lists of names that
//! are found elsewhere (a guest's kallsyms).

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use gimli::{EndianArcSlice, RunTimeEndian, SectionId};
use object::{Object, ObjectSection, ObjectSymbol, SymbolKind};

/// Why symbols cannot be had, in one line.
#[derive(Debug, thiserror::Error)]
#[error("{}: {reason}", path.display())]
pub struct SymbolError {
    path: PathBuf,
    reason: String,
}

type Lines = addr2line::Context<EndianArcSlice<RunTimeEndian>>;

/// A name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Symbol {
    pub address: u64,
    /// Bytes; 0 if nobody says.
    pub size: u64,
    pub name: String,
    /// It is code.
    pub code: bool,
}

/// Names, sorted by address.
#[derive(Default)]
pub struct Symbols {
    sorted: Vec<Symbol>,
    by_name: HashMap<String, usize>,
    lines: Option<Lines>,
    /// Call frame information: see [`Symbols::frames`].
    frames: Option<Frames>,
    /// Added to every address of the files.
    bias: u64,
}

/// A file's call frame information.
pub struct Frames {
    pub bytes: Vec<u8>,
    pub address: u64,
    /// `.eh_frame`, not `.debug_frame`.
    pub eh: bool,
    pub big_endian: bool,
}

/// An address without a size reaches this far.
const REACH: u64 = 1 << 20;

impl Symbols {
    /// From a file: ELF, or text as of `System.map` and `/proc/kallsyms`.
    ///
    /// # Errors
    /// It cannot be read, or is neither.
    pub fn open(path: &Path) -> Result<Symbols, SymbolError> {
        let fail = |reason: String| SymbolError { path: path.to_owned(), reason };
        let bytes = std::fs::read(path).map_err(|e| fail(e.to_string()))?;
        if bytes.starts_with(b"\x7fELF") {
            return Symbols::elf(&bytes).map_err(fail);
        }
        let text = std::str::from_utf8(&bytes).map_err(|_| fail("this is neither ELF nor a System.map".to_owned()))?;
        Symbols::map(text).map_err(fail)
    }

    /// From the bytes of an ELF file.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn elf(bytes: &[u8]) -> Result<Symbols, String> {
        let file = object::File::parse(bytes).map_err(|e| e.to_string())?;
        let list = file.symbols().filter_map(|s| {
            let name = s.name().ok().filter(|n| !n.is_empty() && !n.starts_with('$') && !n.starts_with(".L"))?;
            let wanted =
                matches!(s.kind(), SymbolKind::Text | SymbolKind::Data | SymbolKind::Unknown | SymbolKind::Label);
            (wanted && s.is_definition()).then(|| Symbol {
                address: s.address(),
                size: s.size(),
                name: name.to_owned(),
                code: s.kind() != SymbolKind::Data,
            })
        });
        let mut symbols = Symbols::from_list(list.collect());
        symbols.lines = lines(&file).ok();
        symbols.frames = frames(&file);
        Ok(symbols)
    }

    /// From lines of address, type and name.
    ///
    /// # Errors
    /// A line is none such.
    pub fn map(text: &str) -> Result<Symbols, String> {
        let mut list = Vec::new();
        for (number, line) in (1..).zip(text.lines()) {
            let mut words = line.split_ascii_whitespace();
            let (Some(address), Some(kind), Some(name)) = (words.next(), words.next(), words.next()) else {
                if line.trim().is_empty() {
                    continue;
                }
                return Err(format!("line {number} is not: address type name"));
            };
            let address = u64::from_str_radix(address, 16);
            let address = address.map_err(|_| format!("line {number}: {:?} is no address", line))?;
            let code = matches!(kind, "t" | "T" | "w" | "W");
            list.push(Symbol { address, size: 0, name: name.to_owned(), code });
        }
        Ok(Symbols::from_list(list))
    }

    /// From names found elsewhere.
    pub fn from_list(mut sorted: Vec<Symbol>) -> Symbols {
        // Of several names of an address: functions first, then names with a size.
        sorted.sort_by(|a, b| (a.address, b.code, b.size != 0).cmp(&(b.address, a.code, a.size != 0)));
        let mut symbols = Symbols { sorted, ..Symbols::default() };
        symbols.index();
        symbols
    }

    fn index(&mut self) {
        self.by_name = self.sorted.iter().enumerate().rev().map(|(i, s)| (s.name.clone(), i)).collect();
    }

    /// Adds the names of others.
    pub fn add(&mut self, other: Symbols) {
        let bias = self.bias;
        let moved = other.sorted.into_iter().map(|mut s| {
            s.address = s.address.wrapping_add(other.bias).wrapping_sub(bias);
            s
        });
        let all = std::mem::take(&mut self.sorted).into_iter().chain(moved).collect();
        let merged = Symbols::from_list(all);
        (self.sorted, self.by_name) = (merged.sorted, merged.by_name);
        if self.lines.is_none() && other.bias == bias {
            self.lines = other.lines;
        }
        if self.frames.is_none() && other.bias == bias {
            self.frames = other.frames;
        }
    }

    /// The files' addresses are this far below the guest's (KASLR, modules).
    pub fn set_bias(&mut self, bias: u64) {
        self.bias = bias;
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.sorted.is_empty()
    }

    /// How many.
    pub fn len(&self) -> usize {
        self.sorted.len()
    }

    /// The name at or before an address, and how far before.
    pub fn lookup(&self, address: u64) -> Option<(&Symbol, u64)> {
        let at = address.wrapping_sub(self.bias);
        let after = self.sorted.partition_point(|s| s.address <= at);
        // The first of several names of one address.
        let nearest = self.sorted.get(after.checked_sub(1)?)?.address;
        let first = self.sorted.partition_point(|s| s.address < nearest);
        let symbol = &self.sorted[first];
        let off = at - nearest;
        let reach = if symbol.size == 0 { REACH } else { symbol.size };
        (off < reach).then_some((symbol, off))
    }

    /// `name+0x12`.
    pub fn describe(&self, address: u64) -> Option<String> {
        let (symbol, off) = self.lookup(address)?;
        Some(if off == 0 { symbol.name.clone() } else { format!("{}+{off:#x}", symbol.name) })
    }

    /// The name of the function that an address is in.
    pub fn function(&self, address: u64) -> Option<String> {
        self.lookup(address).map(|(symbol, _)| symbol.name.clone())
    }

    /// The address of a name.
    ///
    /// # Errors
    /// There is none; says which is near.
    pub fn address(&self, name: &str) -> Result<u64, String> {
        if let Some(&i) = self.by_name.get(name) {
            return Ok(self.sorted[i].address.wrapping_add(self.bias));
        }
        let near = self.near(name);
        Err(match near {
            _ if self.is_empty() => format!("{name}: there are no symbols; load some with: symbols FILE"),
            Some(near) => format!("{name}: there is no such symbol; did you mean {near}?"),
            None => format!("{name}: there is no such symbol"),
        })
    }

    fn near(&self, name: &str) -> Option<&str> {
        let candidates = self.sorted.iter().map(|s| s.name.as_str());
        let likely = candidates.filter(|c| c.len().abs_diff(name.len()) <= 2);
        likely
            .map(|c| (strsim::damerau_levenshtein(c, name), c))
            .filter(|(distance, _)| *distance <= 1 + name.len() / 5)
            .min()
            .map(|(_, c)| c)
    }

    /// Names that begin so, at most `most`.
    pub fn complete(&self, prefix: &str, most: usize) -> Vec<&str> {
        let mut found: Vec<&str> =
            self.sorted.iter().map(|s| s.name.as_str()).filter(|n| n.starts_with(prefix)).take(most).collect();
        found.sort_unstable();
        found.dedup();
        found
    }

    /// File and line of the source of an address.
    pub fn source_line(&self, address: u64) -> Option<(String, u32)> {
        let location = self.lines.as_ref()?.find_location(address.wrapping_sub(self.bias)).ok()??;
        Some((location.file?.to_owned(), location.line?))
    }

    /// The addresses at which the code of a source line begins. `file` may be the end of a path.
    pub fn line_address(&self, file: &str, line: u32) -> Option<u64> {
        let lines = self.lines.as_ref()?;
        // Every range whose line this is; the lowest address of the first line at or behind it.
        let mut best: Option<(u32, u64)> = None;
        let ranges = lines.find_location_range(0, u64::MAX).ok()?;
        for (start, _, location) in ranges {
            let (Some(path), Some(at)) = (location.file, location.line) else { continue };
            if at >= line && path_ends_with(path, file) && best.is_none_or(|b| (at, start) < b) {
                best = Some((at, start));
            }
        }
        best.map(|(_, address)| address.wrapping_add(self.bias))
    }

    /// Call frame information, and what is added to its addresses.
    pub fn frames(&self) -> Option<(&Frames, u64)> {
        self.frames.as_ref().map(|f| (f, self.bias))
    }
}

fn path_ends_with(path: &str, end: &str) -> bool {
    path.strip_suffix(end).is_some_and(|rest| rest.is_empty() || rest.ends_with('/'))
}

fn endian(file: &object::File<'_>) -> RunTimeEndian {
    if file.is_little_endian() { RunTimeEndian::Little } else { RunTimeEndian::Big }
}

fn lines(file: &object::File<'_>) -> Result<Lines, gimli::Error> {
    let endian = endian(file);
    let load = |id: SectionId| {
        let data = file.section_by_name(id.name()).and_then(|s| s.uncompressed_data().ok());
        Ok::<_, gimli::Error>(EndianArcSlice::new(data.unwrap_or_default().into_owned().into(), endian))
    };
    let dwarf = gimli::Dwarf::load(load)?;
    addr2line::Context::from_dwarf(dwarf)
}

fn frames(file: &object::File<'_>) -> Option<Frames> {
    [(".eh_frame", true), (".debug_frame", false)].into_iter().find_map(|(name, eh)| {
        let section = file.section_by_name(name)?;
        let bytes = section.uncompressed_data().ok().filter(|d| !d.is_empty())?.into_owned();
        Some(Frames { bytes, address: section.address(), eh, big_endian: !file.is_little_endian() })
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const MAP: &str = "ffffffff81000000 T _text\nffffffff81000000 t startup_64\nffffffff81000100 T start_kernel\n\
                       ffffffff82000000 D jiffies\n";

    #[test]
    fn names_both_ways() {
        let mut s = Symbols::map(MAP).unwrap();
        assert_eq!(s.describe(0xffff_ffff_8100_0104).as_deref(), Some("start_kernel+0x4"));
        assert_eq!(s.describe(0xffff_ffff_8100_0000).as_deref(), Some("_text"));
        assert_eq!(s.describe(0xffff_ffff_8300_0000), None, "too far behind the last");
        assert_eq!(s.describe(5), None);
        assert_eq!(s.address("jiffies"), Ok(0xffff_ffff_8200_0000));
        assert!(s.address("start_kernle").unwrap_err().contains("did you mean start_kernel?"));
        assert!(s.address("zzz").unwrap_err().contains("no such symbol"));
        assert_eq!(s.complete("sta", 9), ["start_kernel", "startup_64"]);
        s.set_bias(0x1000);
        assert_eq!(s.address("jiffies"), Ok(0xffff_ffff_8200_1000));
        assert_eq!(s.function(0xffff_ffff_8100_1104).as_deref(), Some("start_kernel"));
        assert!(Symbols::default().address("x").unwrap_err().contains("no symbols"));
        assert!(Symbols::map("zz T x").is_err() && Symbols::map("hello").is_err());
    }

    #[test]
    fn of_this_program() {
        let path = std::env::current_exe().unwrap();
        let s = Symbols::open(&path).unwrap();
        let (symbol, off) = s.lookup(s.address("main").unwrap()).unwrap();
        assert_eq!((symbol.name.as_str(), off), ("main", 0));
        let mine = s.sorted.iter().find(|s| s.name.contains("of_this_program")).expect("this test");
        let (file, line) = s.source_line(mine.address).expect("tests have line tables");
        assert!(file.ends_with("symbols.rs"), "{file}");
        assert!(s.line_address("debug/src/symbols.rs", line).is_some());
        assert!(s.frames().is_some());
        assert!(Symbols::open(Path::new("/nowhere")).is_err());
    }
}
