//! Names of addresses, both ways, and source lines: from ELF files with DWARF, `System.map`, or lists of names that
//! are found elsewhere (a guest's kallsyms).

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use gimli::{EndianArcSlice, RunTimeEndian, SectionId};
use object::{Object, ObjectSection, ObjectSymbol, SymbolKind};

use crate::orc::Orc;

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
#[derive(Clone, Debug, Default)]
pub struct Names {
    sorted: Vec<Symbol>,
    by_name: HashMap<String, usize>,
}

/// Names with what else files say of addresses.
#[derive(Default)]
pub struct Symbols {
    names: Names,
    lines: Option<Lines>,
    /// Call frame information: see [`Symbols::frames`].
    frames: Option<Frames>,
    /// A kernel's own tables for finding callers.
    orc: Option<Orc>,
    /// Added to every address of the files.
    bias: u64,
    /// Names that were read from the guest's memory: asked after the files'.
    guest: Option<Arc<Names>>,
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

impl Names {
    /// From names in any order.
    pub fn from_list(mut sorted: Vec<Symbol>) -> Names {
        // Of several names of an address: functions first, then names with a size.
        sorted.sort_by(|a, b| (a.address, b.code, b.size != 0).cmp(&(b.address, a.code, a.size != 0)));
        let by_name = sorted.iter().enumerate().rev().map(|(i, s)| (s.name.clone(), i)).collect();
        Names { sorted, by_name }
    }

    /// These and more names.
    pub fn with(&self, more: Vec<Symbol>) -> Names {
        Names::from_list(self.sorted.iter().cloned().chain(more).collect())
    }

    /// How many.
    pub fn len(&self) -> usize {
        self.sorted.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.sorted.is_empty()
    }

    /// The address of a name.
    pub fn address(&self, name: &str) -> Option<u64> {
        self.by_name.get(name).map(|i| self.sorted[*i].address)
    }

    /// The name at or before an address, and how far before.
    pub fn lookup(&self, at: u64) -> Option<(&Symbol, u64)> {
        let after = self.sorted.partition_point(|s| s.address <= at);
        // The first of several names of one address.
        let nearest = self.sorted.get(after.checked_sub(1)?)?.address;
        let first = self.sorted.partition_point(|s| s.address < nearest);
        let symbol = &self.sorted[first];
        let off = at - nearest;
        let reach = if symbol.size == 0 { REACH } else { symbol.size };
        (off < reach).then_some((symbol, off))
    }
}

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
        symbols.orc = orc(&file);
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
    pub fn from_list(list: Vec<Symbol>) -> Symbols {
        Symbols { names: Names::from_list(list), ..Symbols::default() }
    }

    /// Adds the names of others.
    pub fn add(&mut self, other: Symbols) {
        let bias = self.bias;
        let moved = other.names.sorted.into_iter().map(|mut s| {
            s.address = s.address.wrapping_add(other.bias).wrapping_sub(bias);
            s
        });
        self.names = self.names.with(moved.collect());
        if self.lines.is_none() && other.bias == bias {
            self.lines = other.lines;
        }
        if self.frames.is_none() && other.bias == bias {
            self.frames = other.frames;
        }
        if self.orc.is_none() && other.bias == bias {
            self.orc = other.orc;
        }
    }

    /// Names from the guest's memory, instead of those there were; `None`: no longer. A file of the same kernel that
    /// was linked for another address moves to where the guest has it.
    pub fn set_guest(&mut self, guest: Option<Arc<Names>>) {
        let ends = ["_stext", "_text"];
        let both = |name: &&str| Some((guest.as_ref()?.address(name)?, self.names.address(name)?));
        if let Some((here, linked)) = ends.iter().find_map(both) {
            self.bias = here.wrapping_sub(linked);
        }
        self.guest = guest;
    }

    /// Whether there are names from the guest's memory.
    pub fn has_guest(&self) -> bool {
        self.guest.is_some()
    }

    /// The files' addresses are this far below the guest's (KASLR, modules).
    pub fn set_bias(&mut self, bias: u64) {
        self.bias = bias;
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// How many.
    pub fn len(&self) -> usize {
        self.names.len() + self.guest.as_ref().map_or(0, |g| g.len())
    }

    /// The name at or before an address, and how far before.
    pub fn lookup(&self, address: u64) -> Option<(&Symbol, u64)> {
        self.names.lookup(address.wrapping_sub(self.bias)).or_else(|| self.guest.as_ref()?.lookup(address))
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
        let own = self.names.address(name).map(|at| at.wrapping_add(self.bias));
        if let Some(at) = own.or_else(|| self.guest.as_ref()?.address(name)) {
            return Ok(at);
        }
        let near = self.near(name);
        Err(match near {
            _ if self.is_empty() => format!(
                "{name}: there are no symbols; load some with: symbols FILE, or, of a Linux that is up: kallsyms"
            ),
            Some(near) => format!("{name}: there is no such symbol; did you mean {near}?"),
            None => format!("{name}: there is no such symbol"),
        })
    }

    fn all(&self) -> impl Iterator<Item = &Symbol> {
        self.names.sorted.iter().chain(self.guest.iter().flat_map(|g| g.sorted.iter()))
    }

    fn near(&self, name: &str) -> Option<&str> {
        let candidates = self.all().map(|s| s.name.as_str());
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
            self.all().map(|s| s.name.as_str()).filter(|n| n.starts_with(prefix)).take(most).collect();
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

    /// A kernel's ORC tables, and what is added to their addresses.
    pub fn orc(&self) -> Option<(&Orc, u64)> {
        self.orc.as_ref().map(|o| (o, self.bias))
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

fn orc(file: &object::File<'_>) -> Option<Orc> {
    let section = |name| file.section_by_name(name);
    let (distances, entries) = (section(".orc_unwind_ip")?, section(".orc_unwind")?);
    Orc::new(&distances.uncompressed_data().ok()?, distances.address(), &entries.uncompressed_data().ok()?)
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
    fn names_of_the_guest() {
        let mut s = Symbols::map(MAP).unwrap();
        let symbol = |name: &str, address| Symbol { address, size: 0, name: name.to_owned(), code: true };
        let found = [symbol("_text", 0xffff_ffff_9100_0000), symbol("of_a_module", 0xffff_ffff_c000_0000)];
        s.set_guest(Some(Arc::new(Names::from_list(found.to_vec()))));
        assert_eq!(s.address("start_kernel"), Ok(0xffff_ffff_9100_0100), "the file moves to where the kernel is");
        assert_eq!(s.address("of_a_module"), Ok(0xffff_ffff_c000_0000));
        assert_eq!(s.describe(0xffff_ffff_c000_0004).as_deref(), Some("of_a_module+0x4"));
        assert!(s.address("of_a_modlue").unwrap_err().contains("did you mean of_a_module?"));
        assert_eq!(s.complete("of", 9), ["of_a_module"]);
        s.set_guest(None);
        assert!(s.address("of_a_module").is_err());
    }

    #[test]
    fn of_this_program() {
        let path = std::env::current_exe().unwrap();
        let s = Symbols::open(&path).unwrap();
        let (symbol, off) = s.lookup(s.address("main").unwrap()).unwrap();
        assert_eq!((symbol.name.as_str(), off), ("main", 0));
        let mine = s.names.sorted.iter().find(|s| s.name.contains("of_this_program")).expect("this test");
        let (file, line) = s.source_line(mine.address).expect("tests have line tables");
        assert!(file.ends_with("symbols.rs"), "{file}");
        assert!(s.line_address("debug/src/symbols.rs", line).is_some());
        assert!(s.frames().is_some());
        assert!(Symbols::open(Path::new("/nowhere")).is_err());
    }
}
