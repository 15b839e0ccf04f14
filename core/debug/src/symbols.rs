//! Names of addresses, both ways, and source lines: from ELF files with DWARF, `System.map`, or lists of names that
//! are found elsewhere (a guest's kallsyms).

use std::collections::{BTreeSet, HashMap};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use gimli::{EndianArcSlice, RunTimeEndian, SectionId};
use object::{Object, ObjectSection, ObjectSegment, ObjectSymbol, SymbolKind};

use crate::linux::memory::printable;
use crate::orc::Orc;
use crate::trace::report::Image;

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
    files: Vec<File>,
    /// Names that were read from the guest's memory: asked after the files'.
    guest: Option<Arc<Names>>,
}

/// What one file says.
#[derive(Default)]
struct File {
    names: Names,
    lines: Option<Lines>,
    /// Call frame information: see [`Symbols::frames`].
    frames: Vec<Frames>,
    /// A kernel's own tables for finding callers.
    orc: Option<Orc>,
    /// Where its segments are, lowest and highest, and its path.
    image: Option<(u64, u64)>,
    path: PathBuf,
    /// Added to every address of the file.
    bias: u64,
    /// It can be anywhere, and nobody has said where.
    moves: bool,
}

/// A section of call frame information.
pub struct Frames {
    pub bytes: Vec<u8>,
    pub address: u64,
    /// `.eh_frame`, not `.debug_frame`.
    pub eh: bool,
    pub big_endian: bool,
}

/// Bytes of all names of a file of the guest's.
pub(crate) const MOST_OF_GUEST: usize = 64 << 20;
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
            let mut symbols = Symbols::elf(&bytes).map_err(fail)?;
            symbols.files.iter_mut().for_each(|f| f.path = path.to_owned());
            return Ok(symbols);
        }
        let text = std::str::from_utf8(&bytes).map_err(|_| fail("this is neither ELF nor a System.map".to_owned()))?;
        Symbols::map(text).map_err(fail)
    }

    /// From the bytes of an ELF file.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn elf(bytes: &[u8]) -> Result<Symbols, String> {
        Symbols::of_elf(bytes, true)
    }

    /// From the bytes of an ELF file that the guest has made: what says that it is much longer once it is unpacked is left
    /// out.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn elf_of_guest(bytes: &[u8]) -> Result<Symbols, String> {
        Symbols::of_elf(bytes, false)
    }

    fn of_elf(bytes: &[u8], unpack: bool) -> Result<Symbols, String> {
        let file = object::File::parse(bytes).map_err(|e| e.to_string())?;
        // What was stripped has those that a loader needs.
        let own = file.symbols().next().is_some();
        let all: Box<dyn Iterator<Item = _>> =
            if own { Box::new(file.symbols()) } else { Box::new(file.dynamic_symbols()) };
        // Many symbols may have one long name.
        let mut room = if unpack { usize::MAX } else { MOST_OF_GUEST };
        let list = all.filter_map(|s| {
            let name = s.name().ok().filter(|n| !n.is_empty() && !n.starts_with('$') && !n.starts_with(".L"))?;
            let wanted =
                matches!(s.kind(), SymbolKind::Text | SymbolKind::Data | SymbolKind::Unknown | SymbolKind::Label);
            if !wanted || !s.is_definition() {
                return None;
            }
            room = room.checked_sub(name.len())?;
            let name = if unpack { name.to_owned() } else { printable(name.as_bytes()) };
            Some(Symbol { address: s.address(), size: s.size(), name, code: s.kind() != SymbolKind::Data })
        });
        let names = Names::from_list(list.collect());
        let image = file.segments().map(|s| (s.address(), s.address().saturating_add(s.size())));
        let image = image.reduce(|a, b| (a.0.min(b.0), a.1.max(b.1)));
        let moves = file.kind() == object::ObjectKind::Dynamic;
        let sections = Sections { file, unpack };
        let (lines, frames, orc) = (lines(&sections).ok(), frames(&sections), orc(&sections));
        let this = File { names, lines, frames, orc, image, path: PathBuf::new(), bias: 0, moves };
        Ok(Symbols { files: vec![this], guest: None })
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
        Symbols { files: vec![File { names: Names::from_list(list), ..File::default() }], guest: None }
    }

    /// Adds the files of others.
    pub fn add(&mut self, other: Symbols) {
        self.files.extend(other.files);
    }

    /// Names from the guest's memory, instead of those there were; `None`: no longer. A file of the same kernel that
    /// was linked for another address moves to where the guest has it.
    pub fn set_guest(&mut self, guest: Option<Arc<Names>>) {
        for file in &mut self.files {
            let both = |name: &&str| Some((guest.as_ref()?.address(name)?, file.names.address(name)?));
            if let Some((here, linked)) = ["_stext", "_text"].iter().find_map(both) {
                file.bias = here.wrapping_sub(linked);
            }
        }
        self.guest = guest;
    }

    /// Whether there are names from the guest's memory.
    pub fn has_guest(&self) -> bool {
        self.guest.is_some()
    }

    /// What there is, in words.
    pub fn contents(&self) -> String {
        let frames = || self.frames().next().is_some();
        let lines = || {
            self.files.iter().any(|f| {
                f.lines
                    .as_ref()
                    .is_some_and(|l| l.find_location_range(0, u64::MAX).is_ok_and(|mut r| r.next().is_some()))
            })
        };
        let others = [(lines(), "source lines"), (frames(), "call frames"), (self.orc().next().is_some(), "ORC")];
        let others: String = others.iter().filter(|(there, _)| *there).map(|(_, name)| format!(", {name}")).collect();
        format!("{} symbols{others}", self.len())
    }

    /// The guest's own names as a System.map.
    pub fn guest_map(&self) -> String {
        let all = self.guest.iter().flat_map(|g| g.sorted.iter());
        all.map(|s| format!("{:016x} {} {}\n", s.address, if s.code { 'T' } else { 'D' }, s.name)).collect()
    }

    /// The files' addresses are this far below the guest's (KASLR, modules).
    pub fn set_bias(&mut self, bias: u64) {
        self.files.iter_mut().for_each(|f| (f.bias, f.moves) = (bias, f.moves && bias == 0));
    }

    /// Whether there is a file that can be anywhere, and nobody has said where.
    pub fn may_move(&self) -> bool {
        self.files.iter().any(|f| f.moves)
    }

    /// Moves such files to where those of their names are, if they are anywhere.
    pub fn follow(&mut self, place: impl Fn(&str) -> Option<u64>) {
        for file in self.files.iter_mut().filter(|f| f.moves) {
            let name = file.path.file_name().and_then(|n| n.to_str()).unwrap_or_default();
            if let Some(bias) = place(name) {
                file.bias = bias;
            }
        }
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// How many.
    pub fn len(&self) -> usize {
        self.files.iter().map(|f| f.names.len()).sum::<usize>() + self.guest.as_ref().map_or(0, |g| g.len())
    }

    /// The name at or before an address, and how far before.
    pub fn lookup(&self, address: u64) -> Option<(&Symbol, u64)> {
        let known = self.files.iter().filter_map(|f| {
            let at = address.wrapping_sub(f.bias);
            // A name without a size does not reach into what is loaded behind the file.
            f.image.is_none_or(|(from, to)| (from..to).contains(&at)).then(|| f.names.lookup(at)).flatten()
        });
        known.min_by_key(|(_, off)| *off).or_else(|| self.guest.as_ref()?.lookup(address))
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
        let own = self.files.iter().find_map(|f| Some(f.names.address(name)?.wrapping_add(f.bias)));
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
        let own = self.files.iter().flat_map(|f| f.names.sorted.iter());
        own.chain(self.guest.iter().flat_map(|g| g.sorted.iter()))
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
        self.files.iter().find_map(|file| {
            let location = file.lines.as_ref()?.find_location(address.wrapping_sub(file.bias)).ok()??;
            Some((location.file?.to_owned(), location.line?))
        })
    }

    /// The lowest address of the code of a source line, or of the first line behind it that has code. `file` may be the
    /// end of a path.
    pub fn line_address(&self, file: &str, line: u32) -> Option<u64> {
        let mut best: Option<(u32, u64)> = None;
        self.each_line(|path, at, start| {
            if at >= line && path_ends_with(path, file) && best.is_none_or(|b| (at, start) < b) {
                best = Some((at, start));
            }
        });
        best.map(|(_, address)| address)
    }

    /// Every line that has code: source file, line and an address of it.
    pub fn each_line(&self, mut f: impl FnMut(&str, u32, u64)) {
        for file in &self.files {
            let Some(ranges) = file.lines.as_ref().and_then(|l| l.find_location_range(0, u64::MAX).ok()) else {
                continue;
            };
            for (start, _, location) in ranges {
                if let (Some(path), Some(line)) = (location.file, location.line) {
                    f(path, line, start.wrapping_add(file.bias));
                }
            }
        }
    }

    /// Source files that code comes from.
    pub fn source_files(&self) -> BTreeSet<String> {
        let mut all = BTreeSet::new();
        self.each_line(|path, _, _| {
            if !all.contains(path) {
                all.insert(path.to_owned());
            }
        });
        all
    }

    /// Where the files that are programs are in memory.
    pub fn images(&self) -> Vec<Image> {
        let image = |f: &File| {
            let (base, end) = f.image?;
            let path = f.path.display().to_string();
            Some(Image { path, base: base.wrapping_add(f.bias), end: end.wrapping_add(f.bias) })
        };
        self.files.iter().filter_map(image).collect()
    }

    /// Call frame information of all files, and what is added to its addresses.
    pub fn frames(&self) -> impl Iterator<Item = (&Frames, u64)> {
        self.files.iter().flat_map(|f| f.frames.iter().map(|frames| (frames, f.bias)))
    }

    /// Kernels' ORC tables, and what is added to their addresses.
    pub fn orc(&self) -> impl Iterator<Item = (&Orc, u64)> {
        self.files.iter().filter_map(|f| Some((f.orc.as_ref()?, f.bias)))
    }
}

/// A source file for people: without the folder one is in.
pub fn shown(path: &str) -> &str {
    let here = std::env::current_dir().unwrap_or_default();
    Path::new(path).strip_prefix(here).ok().and_then(Path::to_str).unwrap_or(path)
}

fn path_ends_with(path: &str, end: &str) -> bool {
    path.strip_suffix(end).is_some_and(|rest| rest.is_empty() || rest.ends_with('/'))
}

/// A file's sections.
struct Sections<'a> {
    file: object::File<'a>,
    /// Those that are compressed too.
    unpack: bool,
}

impl Sections<'_> {
    /// Where a section is, and its bytes, if there are any.
    fn section(&self, name: &str) -> Option<(u64, Vec<u8>)> {
        let section = self.file.section_by_name(name)?;
        let packed = section.compressed_data().ok()?;
        let data = match packed.format {
            object::CompressionFormat::None => packed.data.to_vec(),
            _ if self.unpack => section.uncompressed_data().ok()?.into_owned(),
            _ => return None,
        };
        (!data.is_empty()).then(|| (section.address(), data))
    }
}

fn lines(sections: &Sections<'_>) -> Result<Lines, gimli::Error> {
    let endian = if sections.file.is_little_endian() { RunTimeEndian::Little } else { RunTimeEndian::Big };
    let load = |id: SectionId| {
        let (_, data) = sections.section(id.name()).unwrap_or_default();
        Ok::<_, gimli::Error>(EndianArcSlice::new(data.into(), endian))
    };
    let dwarf = gimli::Dwarf::load(load)?;
    addr2line::Context::from_dwarf(dwarf)
}

/// A file may have both, each of other functions: what assemblers and compilers make of `-g` and of `-funwind-tables`.
fn frames(sections: &Sections<'_>) -> Vec<Frames> {
    let section = |(name, eh)| {
        let (address, bytes) = sections.section(name)?;
        Some(Frames { bytes, address, eh, big_endian: !sections.file.is_little_endian() })
    };
    [(".eh_frame", true), (".debug_frame", false)].into_iter().filter_map(section).collect()
}

fn orc(sections: &Sections<'_>) -> Option<Orc> {
    let ((address, distances), (_, entries)) = (sections.section(".orc_unwind_ip")?, sections.section(".orc_unwind")?);
    Orc::new(&distances, address, &entries)
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
    fn several_files() {
        let mut s = Symbols::map(MAP).unwrap();
        let mut program = Symbols::map("0000000000001000 T main\n0000000000001100 T helper\n").unwrap();
        program.set_bias(0x40_0000);
        s.add(program);
        assert_eq!(s.describe(0x40_1010).as_deref(), Some("main+0x10"));
        assert_eq!((s.address("helper"), s.address("jiffies")), (Ok(0x40_1100), Ok(0xffff_ffff_8200_0000)));
        // Only the kernel's file moves with the kernel.
        let moved = Symbol { address: 0xffff_ffff_9100_0000, size: 0, name: "_text".to_owned(), code: true };
        s.set_guest(Some(Arc::new(Names::from_list(vec![moved]))));
        assert_eq!((s.address("helper"), s.address("jiffies")), (Ok(0x40_1100), Ok(0xffff_ffff_9200_0000)));
        assert_eq!(s.len(), 7);
    }

    #[test]
    fn of_this_program() {
        let path = std::env::current_exe().unwrap();
        let s = Symbols::open(&path).unwrap();
        let (symbol, off) = s.lookup(s.address("main").unwrap()).unwrap();
        assert_eq!((symbol.name.as_str(), off), ("main", 0));
        let mine = s.all().find(|s| s.name.contains("of_this_program")).expect("this test");
        let (file, line) = s.source_line(mine.address).expect("tests have line tables");
        assert!(file.ends_with("symbols.rs"), "{file}");
        assert!(s.line_address("debug/src/symbols.rs", line).is_some());
        assert!(s.frames().next().is_some() && s.images()[0].path == path.display().to_string());
        assert!(s.source_files().iter().any(|f| f.ends_with("symbols.rs")));
        assert!(Symbols::open(Path::new("/nowhere")).is_err());
    }
}
