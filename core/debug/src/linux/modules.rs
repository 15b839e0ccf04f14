//! Loaded modules, and their names: the list `modules`.
//!
//! `struct module` begins with its state, the list's node and its name, in every configuration. What else is wanted of it
//! is where BTF says, or found by what must hold: a module is in its own memory (up to 6.3).

use super::Linux;
use super::memory::Memory;
use super::tasks::ring;
use crate::symbols::Symbol;

/// Most modules.
const MOST: usize = 4096;
/// Most names of one.
const MOST_NAMES: u64 = 1 << 16;
/// Largest module.
const LARGEST: u64 = 256 << 20;

/// A module.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Module {
    /// Virtual address of its `struct module`.
    pub at: u64,
    pub name: String,
    /// 0 live, 1 coming, 2 going, 3 unformed.
    pub state: u32,
    /// Its code (up to 6.3: all that stays), and bytes of it.
    pub text: Option<(u64, u64)>,
}

/// The modules, last loaded first.
///
/// # Errors
/// What of it is not as it must be.
pub fn read(m: &Memory<'_>, linux: &Linux) -> Result<Vec<Module>, String> {
    let word = m.word as u64;
    let head = match linux.symbol("modules") {
        Ok(head) => head,
        Err(_) => find_head(m, linux).ok_or("modules: no list of modules was found; none may be loaded")?,
    };
    let nodes = ring(m, head, MOST);
    let nodes = nodes.ok_or("modules: their list is broken: it is being changed, or memory is damaged")?;
    let of = |node: u64| {
        // The state is an `int`, aligned with the node.
        let at = node.wrapping_sub(word);
        Some(Module {
            at,
            name: m.text(node.wrapping_add(2 * word), 64 - m.word)?,
            state: m.number(at, 4)? as u32,
            text: text(m, linux, at),
        })
    };
    let all: Option<Vec<Module>> = nodes.into_iter().skip(1).map(of).collect();
    let all = all.ok_or("modules: one cannot be read")?;
    match all.iter().find(|module| module.state > 3 || !is_name(&module.name)) {
        Some(module) => Err(format!("modules: what is at {:#x} is no module", module.at)),
        None => Ok(all),
    }
}

fn is_name(name: &str) -> bool {
    !name.is_empty() && name.bytes().all(|b| b.is_ascii_alphanumeric() || b"_-".contains(&b))
}

/// Where a module's code is.
fn text(m: &Memory<'_>, linux: &Linux, at: u64) -> Option<(u64, u64)> {
    let well = |base: u64, size: u64| {
        (m.is_kernel(base) && base & 0xfff == 0 && (1..=LARGEST).contains(&size)).then_some((base, size))
    };
    if let Some(types) = &linux.types {
        let member = |path| types.member("module", path).map(|f| at.wrapping_add(f.offset()));
        let (base, size) = match (member("mem[0].base"), member("core_layout.base")) {
            (Some(base), _) => (base, member("mem[0].size")?),
            (_, Some(base)) => (base, member("core_layout.size")?),
            _ => return None,
        };
        return well(m.long(base)?, m.number(size, 4)?);
    }
    let word = m.word as u64;
    // A page-aligned address and a size that the structure itself is inside of.
    (0..2048).step_by(m.word).find_map(|offset| {
        let base = m.long(at.wrapping_add(offset))?;
        let size = m.number(at.wrapping_add(offset + word), 4)?;
        well(base, size).filter(|(base, size)| at.wrapping_sub(*base) < *size)
    })
}

/// The list's head in the kernel's data, for kernels that have names of functions only.
fn find_head(m: &Memory<'_>, linux: &Linux) -> Option<u64> {
    let word = m.word as u64;
    let (from, to) = linux.image();
    let mut found = None;
    m.pages(from, to, &mut |va, page| {
        for (i, piece) in page.chunks_exact(m.word).enumerate() {
            let next = piece.iter().rev().fold(0, |n, b| n << 8 | u64::from(*b));
            // Modules are in memory of their own, not in the image.
            if next & (word - 1) != 0 || !m.is_kernel(next) || (from..to).contains(&next) {
                continue;
            }
            let head = va + (i * m.word) as u64;
            let back = m.long(next.wrapping_add(word));
            if back != Some(head) {
                continue;
            }
            let module = next.wrapping_sub(word);
            let named = m.text(next.wrapping_add(2 * word), 64 - m.word).is_some_and(|name| is_name(&name));
            if named && m.number(module, 4).is_some_and(|s| s <= 3) && text(m, linux, module).is_some() {
                found = Some(head);
                return true;
            }
        }
        false
    });
    found
}

/// The names of modules' functions, where BTF says where they are.
pub fn names(m: &Memory<'_>, linux: &Linux, modules: &[Module]) -> Vec<Symbol> {
    let Some(types) = &linux.types else { return Vec::new() };
    let own = |path| types.member("mod_kallsyms", path).map(|f| f.offset());
    let table = types.member("module", "kallsyms").map(|f| f.offset());
    let (Some(table), Some(symbols), Some(count), Some(text)) =
        (table, own("symtab"), own("num_symtab"), own("strtab"))
    else {
        return Vec::new();
    };
    let mut out = Vec::new();
    for module in modules {
        let mut add = || -> Option<()> {
            let table = m.long(module.at.wrapping_add(table))?;
            let number = |offset| m.long(table.wrapping_add(offset));
            let (symbols, count, text) = (number(symbols)?, m.number(table.wrapping_add(count), 4)?, number(text)?);
            for i in 0..count.min(MOST_NAMES) {
                out.extend(symbol(m, symbols, text, i));
            }
            Some(())
        };
        add();
    }
    out
}

/// An entry of an ELF symbol table (gABI, chapter 4): 24 bytes, or 16 in 32-bit files.
fn symbol(m: &Memory<'_>, table: u64, text: u64, index: u64) -> Option<Symbol> {
    let entry =
        m.bytes(table.wrapping_add(index * if m.word == 8 { 24 } else { 16 }), if m.word == 8 { 24 } else { 16 })?;
    let number = |at: usize, n: usize| entry[at..at + n].iter().rev().fold(0u64, |v, b| v << 8 | u64::from(*b));
    let (info, section, address, size) = match m.word {
        8 => (entry[4], number(6, 2), number(8, 8), number(16, 8)),
        _ => (entry[12], number(14, 2), number(4, 4), number(8, 4)),
    };
    let name = m.text(text.wrapping_add(number(0, 4)), 128)?;
    // Functions, objects and what has no type, defined here; not local labels.
    let wanted = section != 0 && info & 0xf <= 2 && m.is_kernel(address);
    let proper = !name.is_empty() && !name.starts_with(['$', '.']) && name.bytes().all(|b| b.is_ascii_graphic());
    (wanted && proper).then_some(Symbol { address, size: size.min(1 << 24), name, code: info & 0xf != 1 })
}

/// A table of them.
pub fn show(modules: &[Module]) -> String {
    const STATES: [&str; 4] = ["live", "coming", "going", "unformed"];
    if modules.is_empty() {
        return "no module is loaded\n".to_owned();
    }
    let line = |module: &Module| {
        let text = module.text.map_or(String::new(), |(base, size)| format!("{base:<#18x} {size:>9}"));
        let state = STATES.get(module.state as usize).unwrap_or(&"?");
        format!("{:<24} {state:<8} {text:<28} {:#x}\n", module.name, module.at)
    };
    let head = format!("{:<24} {:<8} {:<18} {:>9} {}\n", "name", "state", "code at", "bytes", "struct module");
    head + &modules.iter().map(line).collect::<String>()
}
