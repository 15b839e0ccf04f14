//! BTF: the types of a kernel, which it keeps in its memory (CONFIG_DEBUG_INFO_BTF).
//!
//! Format: Documentation/bpf/btf.rst. Only what leads to members of structures is kept.

use std::collections::HashMap;

use super::memory::{Memory, printable};

const MAGIC: u64 = 0xeb9f;
/// Longest type and string sections.
const MOST: u64 = 32 << 20;
/// Bytes of a name.
const LONGEST_NAME: usize = 512;
/// Deepest nesting that a path of members, typedefs and anonymous structures takes.
const DEEPEST: u32 = 32;
/// Most members that one question looks at.
const MOST_WORK: u32 = 1 << 16;

const ARRAY: u32 = 3;
const STRUCT: u32 = 4;
const UNION: u32 = 5;
const TYPEDEF: u32 = 8;
const VOLATILE: u32 = 9;
const CONST: u32 = 10;
const RESTRICT: u32 = 11;
const TYPE_TAG: u32 = 18;

/// A kernel's types.
#[derive(Debug)]
pub struct Btf {
    types: Vec<u8>,
    strings: Vec<u8>,
    /// Where type `i` begins; type 0 is void.
    starts: Vec<u32>,
    /// The first structure or union of each name.
    structures: HashMap<Vec<u8>, u32>,
    /// Bytes of a pointer.
    word: u64,
}

/// Where a member is in its structure.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Member {
    /// Bits from the structure's begin.
    pub bit: u64,
    /// Bytes of its type; 0: not known.
    pub size: u64,
    /// Bits, of a bit field.
    pub bits: Option<u32>,
    kind: u32,
}

impl Member {
    /// Bytes from the structure's begin.
    pub fn offset(&self) -> u64 {
        self.bit / 8
    }
}

struct Type {
    name: u32,
    kind: u32,
    count: u32,
    flag: bool,
    size: u32,
    /// Where what follows the header is.
    rest: usize,
}

impl Btf {
    /// From the kernel's memory, between its two symbols.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn read(m: &Memory<'_>, start: u64, stop: u64) -> Result<Btf, String> {
        let length =
            stop.checked_sub(start).filter(|l| *l <= 2 * MOST).ok_or("BTF: its end is not behind its begin")?;
        let bytes = m.bytes(start, length as usize).ok_or("BTF: the guest's memory cannot be read")?;
        Btf::parse(&bytes, m.word as u64)
    }

    /// From its bytes.
    ///
    /// # Errors
    /// What is wrong with them.
    pub fn parse(bytes: &[u8], word: u64) -> Result<Btf, String> {
        let number = |at: usize, n: usize| {
            bytes.get(at..at + n).map(|b| b.iter().rev().fold(0u64, |v, b| v << 8 | u64::from(*b)))
        };
        if number(0, 2) != Some(MAGIC) || number(2, 1) != Some(1) {
            return Err("BTF: it has no header of version 1".to_owned());
        }
        let part = |at: usize| {
            let (header, offset, length) = (number(4, 4)?, number(at, 4)?, number(at + 4, 4)?);
            let begin = header.checked_add(offset)?;
            bytes.get(usize::try_from(begin).ok()?..usize::try_from(begin.checked_add(length.min(MOST))?).ok()?)
        };
        let types = part(8).ok_or("BTF: its types are not in it")?.to_vec();
        let strings = part(16).ok_or("BTF: its strings are not in it")?.to_vec();
        let mut btf = Btf { types, strings, starts: vec![u32::MAX], structures: HashMap::new(), word };
        let mut at = 0;
        while at < btf.types.len() {
            let t = btf.header(at).ok_or("BTF: a type is cut off")?;
            let rest = match t.kind {
                1 | 14 | 17 => 4,
                ARRAY => 12,
                STRUCT | UNION | 15 | 19 => 12 * t.count as usize,
                6 | 13 => 8 * t.count as usize,
                0 | 2 | 7..=12 | 16 | TYPE_TAG => 0,
                kind => return Err(format!("BTF: kind {kind} is not known")),
            };
            if matches!(t.kind, STRUCT | UNION) {
                let name = btf.name(t.name).to_vec();
                btf.structures.entry(name).or_insert(btf.starts.len() as u32);
            }
            btf.starts.push(at as u32);
            at = t.rest + rest;
        }
        Ok(btf)
    }

    fn u32(&self, at: usize) -> Option<u32> {
        self.types.get(at..at + 4).and_then(|b| b.try_into().ok()).map(u32::from_le_bytes)
    }

    fn header(&self, at: usize) -> Option<Type> {
        let (name, info, size) = (self.u32(at)?, self.u32(at + 4)?, self.u32(at + 8)?);
        let (kind, count, flag) = (info >> 24 & 0x1f, info & 0xffff, info >> 31 != 0);
        Some(Type { name, kind, count, flag, size, rest: at + 12 })
    }

    fn ty(&self, id: u32) -> Option<Type> {
        self.header(*self.starts.get(id as usize)? as usize)
    }

    fn name(&self, at: u32) -> &[u8] {
        let text = self.strings.get(at as usize..).unwrap_or_default();
        let text = &text[..text.len().min(LONGEST_NAME)];
        &text[..text.iter().position(|b| *b == 0).unwrap_or(text.len())]
    }

    /// Number of types.
    pub fn len(&self) -> usize {
        self.starts.len() - 1
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    fn structure(&self, name: &str) -> Option<u32> {
        self.structures.get(name.as_bytes()).copied()
    }

    /// Bytes of a structure.
    pub fn size_of(&self, name: &str) -> Option<u64> {
        self.ty(self.structure(name)?).map(|t| u64::from(t.size))
    }

    /// A type without its names and qualifiers.
    fn plain(&self, mut id: u32) -> Option<(u32, Type)> {
        for _ in 0..DEEPEST {
            let t = self.ty(id)?;
            match t.kind {
                TYPEDEF | VOLATILE | CONST | RESTRICT | TYPE_TAG => id = t.size,
                _ => return Some((id, t)),
            }
        }
        None
    }

    fn bytes_of(&self, id: u32, depth: u32) -> u64 {
        match self.plain(id) {
            Some((_, t)) if t.kind == 2 => self.word,
            Some((_, t)) if t.kind == ARRAY && depth < DEEPEST => {
                let (element, count) = (self.u32(t.rest).unwrap_or(0), self.u32(t.rest + 8).unwrap_or(0));
                self.bytes_of(element, depth + 1).saturating_mul(u64::from(count))
            }
            Some((_, t)) if t.kind != ARRAY => u64::from(t.size),
            _ => 0,
        }
    }

    /// A member: `structure`, then a path such as `core_layout.base` or `mem[0].size`. Anonymous structures are looked
    /// into.
    pub fn member(&self, structure: &str, path: &str) -> Option<Member> {
        let (mut id, mut bit) = (self.structure(structure)?, 0);
        let mut found = None;
        for step in path.split('.') {
            let (name, index) = match step.split_once('[') {
                Some((name, index)) => (name, Some(index.strip_suffix(']')?.parse::<u64>().ok()?)),
                None => (step, None),
            };
            let (mut member, ty) = self.in_structure(id, name.as_bytes(), &mut { MOST_WORK })?;
            id = ty;
            if let Some(index) = index {
                let (_, array) = self.plain(id).filter(|(_, t)| t.kind == ARRAY)?;
                id = self.u32(array.rest)?;
                member.size = self.bytes_of(id, 0);
                member.bit = member.bit.checked_add(member.size.checked_mul(index)?.checked_mul(8)?)?;
            }
            bit += member.bit;
            found = Some(Member { bit, ..member });
        }
        found
    }

    fn in_structure(&self, id: u32, name: &[u8], work: &mut u32) -> Option<(Member, u32)> {
        let (_, t) = self.plain(id)?;
        if !matches!(t.kind, STRUCT | UNION) || name.is_empty() {
            return None;
        }
        for i in 0..t.count {
            *work = work.checked_sub(1)?;
            let at = t.rest + 12 * i as usize;
            let (own, ty, place) = (self.u32(at)?, self.u32(at + 4)?, self.u32(at + 8)?);
            let (bit, bits) = if t.flag { (place & 0xff_ffff, place >> 24) } else { (place, 0) };
            let own = self.name(own);
            if own == name {
                let kind = self.plain(ty).map_or(0, |(_, t)| t.kind);
                let bits = (bits != 0).then_some(bits);
                return Some((Member { bit: bit.into(), size: self.bytes_of(ty, 0), bits, kind }, ty));
            }
            if own.is_empty()
                && let Some((inner, ty)) = self.deeper(ty, name, work)
            {
                return Some((Member { bit: inner.bit + u64::from(bit), ..inner }, ty));
            }
        }
        None
    }

    /// In an anonymous member; each counts for more than it has members, so that one in itself ends.
    fn deeper(&self, id: u32, name: &[u8], work: &mut u32) -> Option<(Member, u32)> {
        *work = work.checked_sub(MOST_WORK / DEEPEST)?;
        let found = self.in_structure(id, name, work);
        *work += MOST_WORK / DEEPEST;
        found
    }

    /// The members of a structure by name, anonymous ones looked into: at most some thousands.
    pub fn members(&self, structure: &str) -> Option<Vec<(String, Member)>> {
        let mut out = Vec::new();
        self.list(self.structure(structure)?, 0, &mut { MOST_WORK }, &mut out)?;
        Some(out)
    }

    fn list(&self, id: u32, base: u64, work: &mut u32, out: &mut Vec<(String, Member)>) -> Option<()> {
        let (_, t) = self.plain(id)?;
        if !matches!(t.kind, STRUCT | UNION) {
            return None;
        }
        for i in 0..t.count {
            *work = work.checked_sub(1)?;
            let at = t.rest + 12 * i as usize;
            let (own, ty, place) = (self.u32(at)?, self.u32(at + 4)?, self.u32(at + 8)?);
            let (bit, bits) = if t.flag { (place & 0xff_ffff, place >> 24) } else { (place, 0) };
            let bit = base + u64::from(bit);
            if self.name(own).is_empty() {
                *work = work.checked_sub(MOST_WORK / DEEPEST)?;
                self.list(ty, bit, work, out);
                *work += MOST_WORK / DEEPEST;
                continue;
            }
            let kind = self.plain(ty).map_or(0, |(_, t)| t.kind);
            let member = Member { bit, size: self.bytes_of(ty, 0), bits: (bits != 0).then_some(bits), kind };
            out.push((printable(self.name(own)), member));
        }
        Some(())
    }

    /// Structures whose names begin so, at most `most`.
    pub fn names(&self, begin: &str, most: usize) -> Vec<String> {
        let all = (1..self.starts.len() as u32).filter_map(|id| self.ty(id));
        let names = all.filter(|t| matches!(t.kind, STRUCT | UNION)).map(|t| printable(self.name(t.name)));
        let found: std::collections::BTreeSet<String> =
            names.filter(|n| !n.is_empty() && n.starts_with(begin)).take(16 * most).collect();
        found.into_iter().take(most).collect()
    }

    /// Structures with a name like one that is not there.
    pub fn near(&self, name: &str) -> Option<String> {
        let all = (1..self.starts.len() as u32).filter_map(|id| self.ty(id));
        let names = all.filter(|t| matches!(t.kind, STRUCT | UNION)).map(|t| printable(self.name(t.name)));
        let likely = names.filter(|n| n.len().abs_diff(name.len()) <= 2 && !n.is_empty());
        let nearest = likely.map(|n| (strsim::damerau_levenshtein(&n, name), n)).min()?;
        (nearest.0 <= 1 + name.len() / 5).then_some(nearest.1)
    }
}

impl Member {
    /// It is a structure, a union or an array.
    pub fn is_composite(&self) -> bool {
        matches!(self.kind, ARRAY | STRUCT | UNION)
    }
}

#[cfg(test)]
#[path = "btf_tests.rs"]
mod tests;
