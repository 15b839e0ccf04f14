//! What a program has mapped: the areas (`vm_area_struct`) of its memory (`mm_struct`), and the files behind them.
//!
//! Areas are in a maple tree (6.1 and later; Documentation/core-api/maple_tree.rst) or on a list (before). Members are
//! where BTF says; a kernel without types is asked by what must hold: by a program's page tables the kernel is where it always is,
//! an area begins and ends where the tree says, a program's arguments end where its environment begins, and a path ends in a
//! folder that is its own parent.

use super::Linux;
use super::btf::Btf;
use super::memory::Memory;
use super::tasks::Task;

/// Most areas of a program.
const MOST: usize = 65_536;
/// Most folders of a path.
const DEEPEST: usize = 64;
/// Deepest tree.
const LEVELS: u32 = 16;
const READ: u64 = 1;
const WRITE: u64 = 2;
const EXECUTE: u64 = 4;
const SHARED: u64 = 8;
const GROWS_DOWN: u64 = 0x100;

/// A stretch of a program's memory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mapping {
    pub from: u64,
    /// Behind its last byte.
    pub to: u64,
    /// As `/proc/PID/maps` has them; empty: not known.
    pub rights: String,
    /// Where in the file it begins, in bytes.
    pub offset: u64,
    /// Virtual address of the kernel's `struct file`; 0: it is no file's.
    pub file: u64,
    /// The file's path within its file system, or what it is; empty: neither.
    pub name: String,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Areas {
    /// A maple tree's root in `mm_struct`.
    Tree(u64),
    /// The first in `mm_struct`, and the next in each.
    List(u64, u64),
}

/// Offsets in `mm_struct`, `vm_area_struct`, `file` and `dentry`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Layout {
    pgd: u64,
    areas: Areas,
    start: u64,
    end: u64,
    flags: Option<u64>,
    ops: Option<u64>,
    /// `vm_ops` of the vDSO and its data.
    special: Option<u64>,
    /// `vm_pgoff` and `vm_file`.
    file: Option<(u64, u64)>,
    paths: Option<Paths>,
    /// `start_brk` and `brk`.
    brk: Option<(u64, u64)>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Paths {
    /// In `file`.
    dentry: u64,
    /// In `dentry`.
    parent: u64,
    name: u64,
}

impl Layout {
    /// Where a kernel has these members.
    ///
    /// # Errors
    /// It has no types, and they were not found.
    pub fn find(m: &Memory<'_>, linux: &Linux, tasks: &[Task]) -> Result<Layout, String> {
        let told = linux.types.as_ref().and_then(|types| Layout::of_types(types, linux));
        let found = told.or_else(|| Layout::guess(m, tasks));
        found.ok_or_else(|| {
            "what programs have mapped was not found: the kernel has no types (BTF), and no program is there yet whose \
             memory could be recognised; continue until one is"
                .to_owned()
        })
    }

    fn of_types(types: &Btf, linux: &Linux) -> Option<Layout> {
        let at = |structure, path| types.member(structure, path).map(|m| m.offset());
        let tree = at("mm_struct", "mm_mt.ma_root").map(Areas::Tree);
        let list = || Some(Areas::List(at("mm_struct", "mmap")?, at("vm_area_struct", "vm_next")?));
        let paths = || {
            let dentry = at("file", "f_path.dentry").or_else(|| at("file", "__f_path.dentry"))?;
            Some(Paths { dentry, parent: at("dentry", "d_parent")?, name: at("dentry", "d_name.name")? })
        };
        Some(Layout {
            pgd: at("mm_struct", "pgd")?,
            areas: tree.or_else(list)?,
            start: at("vm_area_struct", "vm_start")?,
            end: at("vm_area_struct", "vm_end")?,
            flags: at("vm_area_struct", "vm_flags"),
            ops: at("vm_area_struct", "vm_ops"),
            special: linux.symbol("special_mapping_vmops").ok(),
            file: at("vm_area_struct", "vm_pgoff").zip(at("vm_area_struct", "vm_file")),
            paths: paths(),
            brk: at("mm_struct", "start_brk").zip(at("mm_struct", "brk")),
        })
    }

    /// The physical address of a program's topmost page table.
    pub fn page_tables(&self, m: &Memory<'_>, mm: u64) -> Option<u64> {
        m.translate(m.long(mm.wrapping_add(self.pgd))?)
    }

    /// The areas of a program, by address; those that are being changed are left out.
    fn areas(&self, m: &Memory<'_>, mm: u64) -> Option<Vec<u64>> {
        let mut out = Vec::new();
        match self.areas {
            Areas::Tree(root) => {
                let root = m.long(mm.wrapping_add(root))?;
                // A node in the root is marked as such.
                if root != 0 {
                    (root & 3 == 2).then_some(())?;
                    let last = m.address(u64::MAX);
                    self.tree(m, root, (0, last), LEVELS, &mut out)?;
                }
            }
            Areas::List(first, next) => {
                let mut at = m.long(mm.wrapping_add(first))?;
                let mut last = 0;
                while at != 0 {
                    let (from, to) = self.range(m, at)?;
                    (m.is_kernel(at) && from >= last && out.len() < MOST).then_some(())?;
                    out.push(at);
                    last = to;
                    at = m.long(at.wrapping_add(next))?;
                }
            }
        }
        Some(out)
    }

    fn range(&self, m: &Memory<'_>, area: u64) -> Option<(u64, u64)> {
        let (from, to) = (m.long(area.wrapping_add(self.start))?, m.long(area.wrapping_add(self.end))?);
        (from < to && is_programs(m, from)).then_some((from, to))
    }

    /// A node's 256 bytes: the parent, the last address of each slot but the last one, the slots.
    fn tree(&self, m: &Memory<'_>, node: u64, range: (u64, u64), levels: u32, out: &mut Vec<u64>) -> Option<()> {
        const LEAF: u64 = 1;
        let kind = node >> 3 & 15;
        let slots = match (kind, m.word) {
            (1 | 2, 8) => 16,
            (1 | 2, _) => 32,
            (3, 8) => 10,
            (3, _) => 21,
            _ => return None,
        };
        let (at, levels) = (node & !0xff, levels.checked_sub(1)?);
        let bytes = m.is_kernel(at).then(|| m.bytes(at, 256))??;
        let words: Vec<u64> =
            bytes.chunks(m.word).map(|c| c.iter().rev().fold(0, |n, b| n << 8 | u64::from(*b))).collect();
        let mut first = range.0;
        for i in 0..slots {
            let pivot = if i + 1 < slots { words[1 + i] } else { range.1 };
            let last = if pivot == 0 { range.1 } else { pivot.min(range.1) };
            let entry = words[slots + i];
            (first <= last && out.len() < MOST).then_some(())?;
            if kind != LEAF {
                self.tree(m, entry, (first, last), levels, out)?;
            } else if m.is_kernel(entry) && self.range(m, entry) == Some((first, last.wrapping_add(1))) {
                out.push(entry);
            }
            if last == range.1 {
                break;
            }
            first = last + 1;
        }
        Some(())
    }

    fn path(&self, m: &Memory<'_>, file: u64) -> Option<String> {
        let paths = self.paths?;
        let mut at = m.long(file.wrapping_add(paths.dentry)).filter(|at| m.is_kernel(*at))?;
        let mut names = Vec::new();
        for _ in 0..DEEPEST {
            let name = m.long(at.wrapping_add(paths.name)).filter(|name| m.is_kernel(*name))?;
            let parent = m.long(at.wrapping_add(paths.parent)).filter(|at| m.is_kernel(*at))?;
            let name = m.name(name, 255)?;
            if parent == at {
                // What belongs to no folder has a name of its own.
                return Some(if names.is_empty() {
                    name
                } else {
                    format!("/{}", names.into_iter().rev().collect::<Vec<_>>().join("/"))
                });
            }
            names.push(name);
            at = parent;
        }
        None
    }

    fn mapping(&self, m: &Memory<'_>, mm: u64, area: u64) -> Option<Mapping> {
        let (from, to) = self.range(m, area)?;
        let field = |offset: Option<u64>| offset.and_then(|o| m.long(area.wrapping_add(o)));
        let flags = field(self.flags);
        let file = field(self.file.map(|f| f.1)).filter(|file| m.is_kernel(*file)).unwrap_or(0);
        let offset = if file == 0 { 0 } else { field(self.file.map(|f| f.0)).unwrap_or(0).saturating_mul(4096) };
        let has = |flag| flags.is_some_and(|flags| flags & flag != 0);
        let brk = self.brk.and_then(|(a, b)| m.long(mm.wrapping_add(a)).zip(m.long(mm.wrapping_add(b))));
        let special = self.special.is_some() && field(self.ops) == self.special;
        let name = match () {
            () if file != 0 => self.path(m, file).unwrap_or_default(),
            () if special && has(EXECUTE) => "[vdso]".to_owned(),
            () if special => "[vvar]".to_owned(),
            () if has(GROWS_DOWN) => "[stack]".to_owned(),
            () if brk.is_some_and(|(first, end)| from < end && to > first) => "[heap]".to_owned(),
            () => String::new(),
        };
        let rights = flags.map_or(String::new(), |flags| {
            let letter = |flag, letter| if flags & flag != 0 { letter } else { '-' };
            let kind = if flags & SHARED != 0 { 's' } else { 'p' };
            [letter(READ, 'r'), letter(WRITE, 'w'), letter(EXECUTE, 'x'), kind].iter().collect()
        });
        Some(Mapping { from, to, rights, offset, file, name })
    }

    /// What a program has mapped, by address.
    ///
    /// # Errors
    /// It cannot be read.
    pub fn mappings(&self, m: &Memory<'_>, mm: u64) -> Result<Vec<Mapping>, String> {
        let areas = self.areas(m, mm);
        let areas =
            areas.ok_or("what the program has mapped is just being changed, or memory is damaged; step a little")?;
        Ok(areas.into_iter().filter_map(|area| self.mapping(m, mm, area)).collect())
    }

    /// The path of the file that a program executes: the first that it has mapped.
    pub fn program(&self, m: &Memory<'_>, mm: u64) -> Option<String> {
        let (_, file) = self.file?;
        let areas = self.areas(m, mm)?;
        let files = areas.into_iter().filter_map(|area| m.long(area.wrapping_add(file)));
        self.path(m, files.filter(|file| m.is_kernel(*file)).take(1).next()?)
    }

    fn guess(m: &Memory<'_>, tasks: &[Task]) -> Option<Layout> {
        let word = m.word as u64;
        let mut mms: Vec<u64> = tasks.iter().filter_map(|t| t.mm).collect();
        mms.sort_unstable();
        mms.dedup();
        mms.truncate(64);
        let all = |fits: &dyn Fn(u64) -> bool| !mms.is_empty() && mms.iter().all(|mm| fits(*mm));
        // By a program's tables the kernel's memory is where it always is.
        let tables = |at: u64| {
            let root = m.is_kernel(at).then(|| m.translate(at)).flatten()?;
            (at & 31 == 0 && m.of_space(root).translate(mms[0]) == m.translate(mms[0])).then_some(())
        };
        let pgd = (0..1024)
            .step_by(m.word)
            .find(|offset| all(&|mm| m.long(mm.wrapping_add(*offset)).and_then(tables).is_some()))?;
        let bare = |areas| {
            let (flags, ops, special, file, paths, brk) = (None, None, None, None, None, None);
            Layout { pgd, areas, start: 0, end: word, flags, ops, special, file, paths, brk }
        };
        let trees = (0..512).step_by(m.word).map(Areas::Tree);
        // The list of old kernels is `mm_struct`'s first member; `vm_next` follows the area's end.
        let candidates = trees.chain([Areas::List(0, 2 * word)]).map(bare);
        let some = |l: &Layout| all(&|mm| l.areas(m, mm).is_some_and(|areas| areas.len() >= 3));
        let mut layout = candidates.into_iter().find(some)?;
        let code = (0..2048).step_by(m.word).find(|offset| all(&|mm| is_places(m, mm.wrapping_add(*offset))));
        layout.brk = code.map(|code| (code + 4 * word, code + 5 * word));
        let areas: Vec<u64> = mms.iter().filter_map(|mm| layout.areas(m, *mm)).flatten().take(1000).collect();
        layout.guess_area(m, &areas);
        if let Some((code, ops)) = code.zip(layout.ops) {
            let at = |area: &&u64| layout.range(m, **area).map(|(from, _)| from);
            let vdso = mms.iter().find_map(|mm| vdso(m, mm.wrapping_add(code + 11 * word)));
            let area = vdso.and_then(|vdso| areas.iter().find(|area| at(area) == Some(vdso)));
            layout.special = area.and_then(|area| m.long(area.wrapping_add(ops))).filter(|ops| *ops != 0);
        }
        Some(layout)
    }

    fn guess_area(&mut self, m: &Memory<'_>, areas: &[u64]) {
        let word = m.word as u64;
        let all = |offset: u64| areas.iter().filter_map(move |area| m.long(area.wrapping_add(offset)));
        // What may be done is never less than what is done (VM_MAYREAD … are VM_READ … four bits up), and there is code and
        // data.
        self.flags = (2 * word..16 * word).step_by(m.word).find(|offset| {
            let sound = all(*offset).all(|f| (f & 7) << 4 & !f == 0 && f & 0x70 != 0 && !m.is_kernel(f));
            sound && all(*offset).any(|f| f & 7 == 5) && all(*offset).any(|f| f & 7 == 3)
        });
        // `vm_ops`, `vm_pgoff` and `vm_file` are neighbours; files have paths.
        let found = (6 * word..32 * word).step_by(m.word).find_map(|offset| {
            let files: Vec<u64> = all(offset).filter(|at| *at != 0).collect();
            let sound = !files.is_empty() && files.iter().all(|at| m.is_kernel(*at));
            let paths = sound.then(|| files.iter().find_map(|file| guess_paths(m, *file))).flatten()?;
            Some((offset, paths))
        });
        let Some((file, paths)) = found else { return };
        (self.ops, self.file, self.paths) = (Some(file - 2 * word), Some((file - word, file)), Some(paths));
    }
}

/// Whether an address can be a program's. Where the halves meet is a 32-bit kernel's choice.
fn is_programs(m: &Memory<'_>, va: u64) -> bool {
    m.word == 4 || !m.is_kernel(va)
}

/// Whether these are `start_code`, `end_code`, `start_data`, `end_data`, `start_brk`, `brk`, `start_stack`, `arg_start`,
/// `arg_end`, `env_start` and `env_end`.
fn is_places(m: &Memory<'_>, at: u64) -> bool {
    let word = m.word as u64;
    let sound = |i: u64, v: u64| v > 0xfff && is_programs(m, v) || i == 2 && v == 0;
    let load = |i: u64| m.long(at.wrapping_add(i * word)).filter(|v| sound(i, *v));
    let Some(v) = (0..11).map(load).collect::<Option<Vec<u64>>>() else { return false };
    v[0] < v[1] && v[2] <= v[3] && v[4] <= v[5] && v[6] < v[7] && v[7] <= v[8] && v[8] == v[9] && v[9] <= v[10]
}

/// What the kernel told a program of its vDSO (AT_SYSINFO_EHDR of `saved_auxv`).
fn vdso(m: &Memory<'_>, auxv: u64) -> Option<u64> {
    const AT_SYSINFO_EHDR: u64 = 33;
    let word = m.word as u64;
    let pairs = (0..40).map(|i| auxv.wrapping_add(2 * i * word));
    let mut pairs = pairs.map_while(|at| Some((m.long(at)?, m.long(at.wrapping_add(word))?))).take_while(|p| p.0 != 0);
    pairs.find(|(key, _)| *key == AT_SYSINFO_EHDR).map(|(_, value)| value)
}

/// A file's entry in its folder: there `d_parent` is before the length and the text of its name, and the parents end in one
/// that is its own.
fn guess_paths(m: &Memory<'_>, file: u64) -> Option<Paths> {
    let word = m.word as u64;
    (0..256).step_by(m.word).find_map(|dentry| {
        let at = m.long(file.wrapping_add(dentry)).filter(|at| m.is_kernel(*at))?;
        (word + 8..96).step_by(m.word).find_map(|name| {
            let paths = Paths { dentry, parent: name - 8 - word, name };
            let probe = Layout {
                pgd: 0,
                areas: Areas::Tree(0),
                start: 0,
                end: 0,
                flags: None,
                ops: None,
                special: None,
                file: None,
                paths: Some(paths),
                brk: None,
            };
            // A short name is in the entry itself.
            let text = m.long(at.wrapping_add(name))?;
            let own = text > at && text - at < 256;
            (own && probe.path(m, file).is_some_and(|path| path.starts_with('/') && path.len() > 1)).then_some(paths)
        })
    })
}

/// As `/proc/PID/maps` shows them.
pub fn show(mappings: &[Mapping]) -> String {
    let line = |a: &Mapping| {
        let text = format!("{:08x}-{:08x} {} {:08x} {}", a.from, a.to, a.rights, a.offset, a.name);
        format!("{}\n", text.trim_end())
    };
    mappings.iter().map(line).collect()
}
