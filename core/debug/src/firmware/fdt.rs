//! The flattened device tree (Devicetree specification 0.4, chapter 5).

use super::physical;
use crate::linux::memory::printable;
use crate::target::Target;

const MAGIC: [u8; 4] = [0xd0, 0x0d, 0xfe, 0xed];
/// Pages of RAM that are searched: 4 GiB.
const MOST_PAGES: u64 = 1 << 20;
/// Most lines, and deepest nesting.
const MOST_LINES: usize = 20_000;
const DEEPEST: usize = 32;

fn be(bytes: &[u8], at: usize) -> Option<u32> {
    bytes.get(at..at.checked_add(4)?)?.try_into().ok().map(u32::from_be_bytes)
}

/// A tree that has been checked as far as its header goes.
struct Tree {
    at: u64,
    bytes: Vec<u8>,
    structure: usize,
    strings: usize,
}

impl Tree {
    fn read(target: &dyn Target, at: u64) -> Option<Tree> {
        let header = physical(target, at, 40)?;
        let (size, version, compatible) = (be(&header, 4)?, be(&header, 20)?, be(&header, 24)?);
        if !header.starts_with(&MAGIC) || version < 16 || compatible > 17 || !(48..=2 << 20).contains(&size) {
            return None;
        }
        let bytes = physical(target, at, size.into())?;
        let (structure, strings) = (be(&bytes, 8)? as usize, be(&bytes, 12)? as usize);
        // It begins with the root, which has no name.
        let root = be(&bytes, structure)? == 1 && be(&bytes, structure + 4)? == 0;
        (root && strings < bytes.len()).then_some(Tree { at, bytes, structure, strings })
    }

    /// The first in RAM.
    fn find(target: &dyn Target) -> Option<Tree> {
        let (mut left, mut page) = (MOST_PAGES, vec![0; 4096]);
        for region in target.regions().iter().filter(|r| r.kind != "device") {
            let mut at = region.base.next_multiple_of(4096);
            while at.saturating_add(4096) <= region.base.saturating_add(region.len) {
                left = left.checked_sub(1)?;
                if target.read(at, &mut page) {
                    let places = page.chunks_exact(8).enumerate().filter(|(_, c)| c.starts_with(&MAGIC));
                    if let Some(tree) = places.filter_map(|(i, _)| Tree::read(target, at + 8 * i as u64)).next() {
                        return Some(tree);
                    }
                }
                at += 4096;
            }
        }
        None
    }

    fn text(&self, at: usize) -> &[u8] {
        let text = self.bytes.get(at..).unwrap_or_default();
        &text[..text.iter().position(|b| *b == 0).unwrap_or(text.len())]
    }
}

/// The tree as source, or the nodes whose path begins so.
///
/// # Errors
/// There is none.
pub fn fdt(path: &str, target: &dyn Target) -> Result<String, String> {
    let tree = Tree::find(target).ok_or(
        "no flattened device tree is in memory: this machine describes itself by ACPI (info acpi), or the guest has \
         used the memory for something else",
    )?;
    let mut out = format!("device tree at {:#x}, {} bytes\n", tree.at, tree.bytes.len());
    let before = out.len();
    let end = source(&tree, path.trim_end_matches('/'), &mut out);
    if out.len() == before {
        return Err(format!("there is no node {path} in the device tree; 'info fdt' shows all"));
    }
    if let Err(why) = end {
        out.push_str(&format!("({why})\n"));
    }
    Ok(out)
}

fn source(tree: &Tree, wanted: &str, out: &mut String) -> Result<(), &'static str> {
    let mut at = tree.structure;
    let mut path: Vec<String> = Vec::new();
    let mut lines = 0;
    let shown = |path: &[String]| {
        let full = path.join("/");
        let rest = full.strip_prefix(wanted);
        wanted.is_empty() || rest.is_some_and(|r| r.is_empty() || r.starts_with(['/', '@']))
    };
    loop {
        let token = be(&tree.bytes, at).ok_or("the tree is cut off")?;
        at += 4;
        lines += 1;
        if lines > MOST_LINES {
            return Err("and more");
        }
        let indent = "    ".repeat(path.len());
        match token {
            // FDT_BEGIN_NODE
            1 => {
                let name = tree.text(at);
                at = (at + name.len() + 1).next_multiple_of(4);
                let name = printable(name);
                path.push(name.clone());
                if path.len() > DEEPEST {
                    return Err("the tree is too deep");
                }
                if shown(&path) {
                    out.push_str(&format!("{indent}{} {{\n", if name.is_empty() { "/" } else { &name }));
                }
            }
            // FDT_END_NODE
            2 => {
                let was = shown(&path);
                path.pop().ok_or("the tree has an end too many")?;
                if was {
                    out.push_str(&format!("{}}};\n", "    ".repeat(path.len())));
                }
                if path.is_empty() {
                    return Ok(());
                }
            }
            // FDT_PROP
            3 => {
                let len = be(&tree.bytes, at).ok_or("the tree is cut off")? as usize;
                let name = be(&tree.bytes, at + 4).ok_or("the tree is cut off")? as usize;
                let value = tree.bytes.get(at + 8..(at + 8).saturating_add(len)).ok_or("a property is cut off")?;
                at = (at + 8 + len).next_multiple_of(4);
                if shown(&path) {
                    let name = printable(tree.text(tree.strings.saturating_add(name)));
                    out.push_str(&format!("{indent}{name}{};\n", property(value)));
                }
            }
            // FDT_NOP
            4 => {}
            _ => return Err("what is no token follows"),
        }
    }
}

/// A value as source: texts, cells or bytes, whichever it looks like.
fn property(value: &[u8]) -> String {
    const SHOWN: usize = 256;
    if value.is_empty() {
        return String::new();
    }
    let texts = value.strip_suffix(&[0]).map(|v| v.split(|b| *b == 0).collect::<Vec<_>>());
    let is_text = |t: &&[u8]| !t.is_empty() && t.iter().all(|b| (0x20..0x7f).contains(b));
    if let Some(texts) = texts.filter(|t| t.iter().all(is_text)) {
        let quoted: Vec<String> = texts.iter().map(|t| format!("{:?}", printable(t))).collect();
        return format!(" = {}", quoted.join(", "));
    }
    let more = if value.len() > SHOWN { " …" } else { "" };
    let value = &value[..value.len().min(SHOWN)];
    if value.len().is_multiple_of(4) {
        let cells: Vec<String> = value.chunks(4).filter_map(|c| be(c, 0)).map(|c| format!("{c:#x}")).collect();
        return format!(" = <{}{more}>", cells.join(" "));
    }
    let bytes: Vec<String> = value.iter().map(|b| format!("{b:02x}")).collect();
    format!(" = [{}{more}]", bytes.join(" "))
}
