//! A program's memory with its names: of the files it has mapped, read from the guest's own memory.
//!
//! A file is put together from what is mapped of it and what else the page cache has. What is in neither is 0: names and
//! tables that are there are found all the same.

use std::cell::OnceCell;

use object::elf::{self, FileHeader32, FileHeader64};
use object::read::elf::{Dyn, FileHeader, ProgramHeader, Sym};
use object::{Endianness, pod};

use super::Linux;
use super::mappings::{Layout, Mapping};
use super::memory::{Memory, printable};
use super::page_cache::Cache;
use super::tasks::{self, Task};
use crate::symbols::{MOST_OF_GUEST, Symbol, Symbols};

/// Longest file that is looked at; what is behind is left out.
const LONGEST: u64 = 32 << 20;
/// Most files of a program that a name is looked for in.
const MOST_FILES: usize = 64;
/// Most names of an image.
const MOST_NAMES: usize = 1 << 20;
const PAGE: u64 = 4096;

/// A file, or the kernel's vDSO, in a program's memory.
struct Image {
    name: String,
    path: String,
    /// From its first to its last mapping.
    from: u64,
    to: u64,
    /// Its mappings are these of the program's.
    mappings: std::ops::Range<usize>,
    symbols: OnceCell<Option<Symbols>>,
}

/// A program's address space.
pub struct Space<'a> {
    pub task: Task,
    pub mappings: Vec<Mapping>,
    images: Vec<Image>,
    /// By the program's own page tables.
    m: Memory<'a>,
    linux: &'a Linux,
}

impl<'a> Space<'a> {
    /// Of the program whose page tables are in use; `None` if they are nobody's, or it is not known what is mapped.
    pub fn current(m: &Memory<'a>, linux: &'a Linux) -> Option<Space<'a>> {
        let all = tasks::read(m, linux).ok()?;
        let layout = Layout::find(m, linux, &all).ok()?;
        // With page-table isolation the program's half is in the next page.
        let same = |a: u64, b: u64| a == b || !m.riscv && a == b & !PAGE;
        let found = all
            .iter()
            .find(|t| t.mm.and_then(|mm| layout.page_tables(m, mm)).is_some_and(|root| same(root, m.root())))?;
        Space::with(m, linux, &layout, found).ok()
    }

    /// Of a task.
    ///
    /// # Errors
    /// It is the kernel's own, or its memory cannot be read.
    pub fn of(m: &Memory<'a>, linux: &'a Linux, all: &[Task], task: &Task) -> Result<Space<'a>, String> {
        Space::with(m, linux, &Layout::find(m, linux, all)?, task)
    }

    fn with(m: &Memory<'a>, linux: &'a Linux, layout: &Layout, task: &Task) -> Result<Space<'a>, String> {
        let mm = task
            .mm
            .ok_or_else(|| format!("task {} ({}) is the kernel's own: it has mapped nothing", task.pid, task.name))?;
        let mappings = layout.mappings(m, mm)?;
        let root = layout.page_tables(m, mm).ok_or("the program's page tables are not in memory")?;
        let images = images(&mappings);
        Ok(Space { task: task.clone(), mappings, images, m: m.of_space(root), linux })
    }

    /// Memory by its page tables.
    pub fn memory(&self) -> &Memory<'a> {
        &self.m
    }

    fn image(&self, at: u64) -> Option<&Image> {
        self.images.iter().find(|i| (i.from..i.to).contains(&at))
    }

    /// What is known of an address by the file that is mapped there.
    pub fn symbols(&self, at: u64) -> Option<&Symbols> {
        self.of_image(self.image(at)?)
    }

    fn of_image<'b>(&'b self, image: &'b Image) -> Option<&'b Symbols> {
        image.symbols.get_or_init(|| self.read(image)).as_ref()
    }

    /// The name at or before an address, or the file that is mapped there, and how far before.
    pub fn lookup(&self, at: u64) -> Option<(String, u64)> {
        if let Some((symbol, off)) = self.symbols(at).and_then(|s| s.lookup(at)) {
            return Some((symbol.name.clone(), off));
        }
        if let Some(image) = self.image(at) {
            return Some((image.name.clone(), at - image.from));
        }
        let mapping = self.mappings.iter().find(|a| (a.from..a.to).contains(&at) && !a.name.is_empty())?;
        Some((mapping.name.clone(), at - mapping.from))
    }

    /// The address of a name of one of its files.
    pub fn address(&self, name: &str) -> Option<u64> {
        self.images.iter().take(MOST_FILES).find_map(|i| self.of_image(i)?.address(name).ok())
    }

    /// What is added to the addresses in a file of this name.
    pub fn bias_of(&self, file: &str) -> Option<u64> {
        let image = self.images.iter().find(|i| i.name == file)?;
        bias(&self.mappings[image.mappings.clone()], &self.bytes(image))
    }

    fn read(&self, image: &Image) -> Option<Symbols> {
        let bytes = self.bytes(image);
        let bias = bias(&self.mappings[image.mappings.clone()], &bytes)?;
        let mut symbols = Symbols::elf_of_guest(&bytes).unwrap_or_default();
        if symbols.is_empty()
            && let Some(list) = dynamic_symbols(&bytes)
        {
            symbols.add(Symbols::from_list(list));
        }
        symbols.set_bias(bias);
        Some(symbols)
    }

    /// The file as far as it is in memory.
    fn bytes(&self, image: &Image) -> Vec<u8> {
        let mappings = &self.mappings[image.mappings.clone()];
        let end = mappings.iter().map(|a| a.offset.saturating_add(a.to - a.from)).max().unwrap_or(0);
        let mut bytes = vec![0; end.min(LONGEST) as usize];
        let mut mapped = Vec::new();
        // Of several that map a page, the file's own is the one that cannot be written to. Nobody looks for ever: what is
        // mapped may be anything.
        let own = mappings.iter().filter(|a| !a.rights.contains('w'));
        let pages =
            own.flat_map(|a| (a.from..a.to).step_by(PAGE as usize).map(|at| (at, a.offset.wrapping_add(at - a.from))));
        for (at, offset) in pages.take(2 * (LONGEST / PAGE) as usize) {
            let place = usize::try_from(offset).ok().and_then(|at| bytes.get_mut(at..)?.get_mut(..PAGE as usize));
            let Some((pa, page)) = self.m.translate(at).zip(place) else { continue };
            if self.m.read_physical(pa, page) {
                mapped.push((offset / PAGE, pa));
            }
        }
        let file = mappings.first().map_or(0, |a| a.file);
        let types = self.linux.types.as_ref().filter(|_| file != 0);
        let cache = types.and_then(|types| Cache::open(&self.m, types, file, &mapped));
        if let Some(cache) = cache {
            bytes.resize(cache.size.min(LONGEST) as usize, 0);
            let known: std::collections::HashSet<u64> = mapped.iter().map(|(number, _)| *number).collect();
            for (number, page) in (0..).zip(bytes.chunks_mut(PAGE as usize)) {
                if let Some(pa) = cache.frame(number).filter(|_| !known.contains(&number)) {
                    self.m.read_physical(pa, page);
                }
            }
        }
        bytes
    }
}

/// Mappings of the same file that follow one another.
fn images(mappings: &[Mapping]) -> Vec<Image> {
    let mut images: Vec<Image> = Vec::new();
    for (i, a) in mappings.iter().enumerate() {
        if a.file == 0 && a.name != "[vdso]" || a.name.is_empty() {
            continue;
        }
        match images.last_mut().filter(|last| last.path == a.name && a.offset != 0) {
            Some(last) => (last.to, last.mappings.end) = (a.to, i + 1),
            None => {
                let name = a.name.rsplit('/').next().unwrap_or_default().to_owned();
                let (path, symbols) = (a.name.clone(), OnceCell::new());
                images.push(Image { name, path, from: a.from, to: a.to, mappings: i..i + 1, symbols });
            }
        }
    }
    images
}

/// What is added to a file's addresses where it is mapped so.
fn bias(mappings: &[Mapping], bytes: &[u8]) -> Option<u64> {
    let first = mappings.first()?;
    let parts = parts(bytes)?;
    let load = parts.loads.iter().find(|l| l.offset & !(PAGE - 1) == first.offset)?;
    Some(first.from.wrapping_sub(load.address & !(PAGE - 1)))
}

struct Load {
    offset: u64,
    address: u64,
    bytes: u64,
}

/// What a program's headers say.
struct Parts {
    loads: Vec<Load>,
    /// Offset and bytes of the dynamic section.
    dynamic: Option<(u64, u64)>,
    wide: bool,
}

fn parts(bytes: &[u8]) -> Option<Parts> {
    match bytes.get(4)? {
        2 => parts_of::<FileHeader64<Endianness>>(bytes, true),
        _ => parts_of::<FileHeader32<Endianness>>(bytes, false),
    }
}

fn parts_of<H: FileHeader<Endian = Endianness>>(bytes: &[u8], wide: bool) -> Option<Parts> {
    let header = H::parse(bytes).ok()?;
    let endian = header.endian().ok()?;
    let mut parts = Parts { loads: Vec::new(), dynamic: None, wide };
    for p in header.program_headers(endian, bytes).ok()? {
        let (offset, address, len) = (p.p_offset(endian).into(), p.p_vaddr(endian).into(), p.p_filesz(endian).into());
        match p.p_type(endian) {
            elf::PT_LOAD => parts.loads.push(Load { offset, address, bytes: len }),
            elf::PT_DYNAMIC => parts.dynamic = Some((offset, len)),
            _ => {}
        }
    }
    Some(parts)
}

/// The names that a loader needs, found as a loader finds them: a file's section headers are not mapped.
fn dynamic_symbols(bytes: &[u8]) -> Option<Vec<Symbol>> {
    let parts = parts(bytes)?;
    let list = match parts.wide {
        true => dynamic_symbols_of::<FileHeader64<Endianness>>(bytes, &parts)?,
        false => dynamic_symbols_of::<FileHeader32<Endianness>>(bytes, &parts)?,
    };
    (!list.is_empty()).then_some(list)
}

fn dynamic_symbols_of<H: FileHeader<Endian = Endianness>>(bytes: &[u8], parts: &Parts) -> Option<Vec<Symbol>> {
    let endian = H::parse(bytes).ok()?.endian().ok()?;
    let slice = |offset: u64, len: u64| {
        bytes.get(usize::try_from(offset).ok()?..usize::try_from(offset.checked_add(len)?).ok()?)
    };
    let (offset, len) = parts.dynamic?;
    let entries = slice(offset, len)?;
    let (entries, _) = pod::slice_from_bytes::<H::Dyn>(entries, entries.len() / size_of::<H::Dyn>()).ok()?;
    let value = |tag: elf::DynamicTag| {
        let found = entries.iter().find(|d| d.d_tag(endian) == tag);
        found.map(|d| d.d_val(endian).into())
    };
    let start = parts.loads.first()?.address & !(PAGE - 1);
    // A loader that has relocated the section has put addresses there; those of the file are less than its size.
    let place = |address: u64| {
        let load = parts.loads.iter().find(|l| address.wrapping_sub(l.address) < l.bytes);
        load.map(|l| address - l.address + l.offset)
    };
    let (table, strings) = (value(elf::DT_SYMTAB)?, value(elf::DT_STRTAB)?);
    let (table_at, strings_at) = (place(table)?, place(strings)?);
    let text = slice(strings_at, value(elf::DT_STRSZ)?)?;
    // Nothing says how many there are; linkers put their names behind them.
    let many = (strings.checked_sub(table)? as usize / size_of::<H::Sym>()).min(MOST_NAMES);
    let table = slice(table_at, (many * size_of::<H::Sym>()) as u64)?;
    let (table, _) = pod::slice_from_bytes::<H::Sym>(table, many).ok()?;
    // Many may have one long name.
    let mut room = MOST_OF_GUEST;
    let named = |s: &H::Sym| {
        let code = s.st_type() == elf::STT_FUNC;
        let at = usize::try_from(s.st_name(endian)).ok().filter(|at| *at != 0)?;
        let name = text.get(at..)?.split(|b| *b == 0).next()?;
        let wanted =
            s.st_shndx(endian) != elf::SHN_UNDEF && (code || s.st_type() == elf::STT_OBJECT) && !name.is_empty();
        let address = s.st_value(endian).into();
        if !wanted || address < start {
            return None;
        }
        room = room.checked_sub(name.len())?;
        Some(Symbol { address, size: s.st_size(endian).into(), name: printable(name), code })
    };
    Some(table.iter().filter_map(named).collect())
}

#[cfg(test)]
#[path = "programs_tests.rs"]
mod tests;
