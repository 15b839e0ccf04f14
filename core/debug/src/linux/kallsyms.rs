//! Kallsyms: the names that a Linux kernel has of itself, read from guest memory.
//!
//! Names are compressed: each is a length and that many indices of a table of 256 tokens; the first character is the
//! type. Addresses are 32-bit offsets from a base (with absolute per-CPU symbols: non-negative offsets are values, others
//! count down from one below the base). A length above 127 takes two bytes since 6.1. The order of the tables changed in
//! 6.4; where they are is said by vmcoreinfo since 6.0, and found by their own structure otherwise. Each step checks what
//! the tables say of one another, so that a chance match, or memory that is meant to mislead, is refused.

use super::memory::Memory;
use crate::symbols::Symbol;

/// Most names; Debian's kernels have 200,000.
const MOST_NAMES: u64 = 4 << 20;
/// Longest names table.
const MOST_BYTES: u64 = 48 << 20;
/// Most characters of all names together.
const MOST_TEXT: usize = 192 << 20;
/// The token table is at most so long: 256 tokens.
const TOKENS: usize = 16 << 10;
/// Longest name (KSYM_NAME_LEN).
const LONGEST: usize = 512;

/// Where the tables are: virtual addresses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Places {
    pub num_syms: u64,
    pub names: u64,
    pub token_table: u64,
    pub token_index: u64,
    pub offsets: u64,
    pub relative_base: u64,
}

/// The tokens, in order.
type Tokens = Vec<Vec<u8>>;

/// The names and their addresses.
///
/// # Errors
/// What of it is not as it must be.
pub fn read(m: &Memory<'_>, places: &Places) -> Result<Vec<Symbol>, String> {
    let missing = |what: &str| format!("kallsyms: the guest's {what} cannot be read");
    let n = m.number(places.num_syms, 4).ok_or_else(|| missing("number of symbols"))?;
    if !(100..=MOST_NAMES).contains(&n) {
        return Err(format!("kallsyms: there cannot be {n} symbols"));
    }
    let n = n as usize;
    let index = m.bytes(places.token_index, 512).ok_or_else(|| missing("token index"))?;
    let table = up_to(m, places.token_table, TOKENS);
    let tokens = tokens(&table, &index).ok_or("kallsyms: token table and index do not agree")?;
    let offsets = m.bytes(places.offsets, 4 * n).ok_or_else(|| missing("offsets"))?;
    let offsets: Vec<u32> =
        offsets.chunks_exact(4).map(|c| u32::from_le_bytes(c.try_into().unwrap_or_default())).collect();
    let base = m.long(places.relative_base).ok_or_else(|| missing("base"))?;
    if !m.is_kernel(base) {
        return Err(format!("kallsyms: {base:#x} is no base of kernel addresses"));
    }
    let length = places.token_table.checked_sub(places.names).filter(|l| *l <= MOST_BYTES);
    let length = length.ok_or("kallsyms: the names are not before the tokens")?;
    let names = m.bytes(places.names, length as usize).ok_or_else(|| missing("names"))?;
    let symbols = expand(&names, &tokens, &offsets, base, m.word)?;
    check_order(&symbols, m)?;
    Ok(symbols)
}

/// What can be read from `va` on.
fn up_to(m: &Memory<'_>, va: u64, most: usize) -> Vec<u8> {
    let mut out = Vec::new();
    while out.len() < most {
        let at = va.wrapping_add(out.len() as u64);
        let n = (4096 - (at & 4095) as usize).min(most - out.len());
        match m.bytes(at, n) {
            Some(bytes) => out.extend(bytes),
            None => break,
        }
    }
    out
}

/// Splits the token table by its index, of which each entry must be where the token before it ends.
fn tokens(table: &[u8], index: &[u8]) -> Option<Tokens> {
    let mut at = 0;
    let mut tokens = Vec::with_capacity(256);
    for entry in index.chunks_exact(2) {
        if usize::from(u16::from_le_bytes([entry[0], entry[1]])) != at {
            return None;
        }
        let rest = table.get(at..)?;
        let len = rest.iter().position(|b| *b == 0)?;
        tokens.push(rest[..len].to_vec());
        at += len + 1;
    }
    (tokens.len() == 256).then_some(tokens)
}

/// Length of the name at the begin of `bytes`, in tokens, and of its length itself.
fn name_length(bytes: &[u8]) -> Option<(usize, usize)> {
    let first = usize::from(*bytes.first()?);
    if first < 0x80 {
        return (first != 0).then_some((first, 1));
    }
    Some((first & 0x7f | usize::from(*bytes.get(1)?) << 7, 2))
}

/// Where `n` names that begin at `at` end, and where the 257th begins.
fn names_end(bytes: &[u8], mut at: usize, n: usize) -> Option<(usize, usize)> {
    let (start, mut marker) = (at, 0);
    for i in 0..n {
        if i == 256 {
            marker = at - start;
        }
        let (len, own) = name_length(bytes.get(at..)?)?;
        at += len + own;
    }
    (at <= bytes.len()).then_some((at, marker))
}

fn expand(names: &[u8], tokens: &Tokens, offsets: &[u32], base: u64, word: usize) -> Result<Vec<Symbol>, String> {
    // With absolute per-CPU symbols nearly all offsets are negative; otherwise none is: no kernel has 2 GiB.
    let negative = offsets.iter().filter(|o| **o >> 31 != 0).count();
    let percpu = negative > offsets.len() / 2;
    let mask = if word == 4 { 0xffff_ffff } else { u64::MAX };
    let (mut at, mut total) = (0, 0);
    let mut symbols = Vec::with_capacity(offsets.len());
    for &offset in offsets {
        let bad = || format!("kallsyms: name {} is damaged", symbols.len());
        let (len, own) = names.get(at..).and_then(name_length).ok_or_else(bad)?;
        let codes = names.get(at + own..at + own + len).ok_or_else(bad)?;
        at += len + own;
        let mut name = Vec::new();
        for &code in codes {
            name.extend_from_slice(&tokens[usize::from(code)]);
            if name.len() > LONGEST {
                return Err(bad());
            }
        }
        if name.len() < 2 || !name.iter().all(u8::is_ascii_graphic) {
            return Err(bad());
        }
        total += name.len();
        if total > MOST_TEXT {
            return Err("kallsyms: the names are too long".to_owned());
        }
        let kind = name.remove(0);
        let address = match (percpu, offset as i32) {
            (true, value @ 0..) => value as u64,
            (true, below) => base.wrapping_sub(1).wrapping_sub(i64::from(below) as u64),
            (false, _) => base.wrapping_add(u64::from(offset)),
        };
        let code = matches!(kind, b't' | b'T' | b'w' | b'W');
        symbols.push(Symbol {
            address: address & mask,
            size: 0,
            name: String::from_utf8(name).unwrap_or_default(),
            code,
        });
    }
    Ok(symbols)
}

/// The tables are sorted by address; per-CPU values and init code may be out of line, no more.
fn check_order(symbols: &[Symbol], m: &Memory<'_>) -> Result<(), String> {
    let kernel: Vec<u64> = symbols.iter().map(|s| s.address).filter(|a| m.is_kernel(*a)).collect();
    let wrong = kernel.windows(2).filter(|w| w[0] > w[1]).count();
    if kernel.len() < symbols.len() / 2 || wrong > symbols.len() / 100 {
        return Err("kallsyms: the addresses are not in order".to_owned());
    }
    Ok(())
}

/// Finds the tables in a kernel's image without any help.
pub fn search(m: &Memory<'_>) -> Option<Places> {
    // 64-bit kernels are in the last 2 GiB, 32-bit ones in the first of the upper half or quarter.
    let windows: &[(u64, u64)] = match m.word {
        4 => &[(0xc000_0000, 0xffff_f000), (0x8000_0000, 0xc000_0000)],
        _ => &[(0xffff_ffff_8000_0000, 0xffff_ffff_fff0_0000)],
    };
    windows.iter().find_map(|(from, to)| search_in(m, *from, *to))
}

/// The digits' tokens are themselves, one after another.
const DIGITS: &[u8] = b"0\x001\x002\x003\x004\x005\x006\x007\x008\x009\0";

fn search_in(m: &Memory<'_>, from: u64, to: u64) -> Option<Places> {
    let mut candidates = Vec::new();
    let (mut before, mut last): (Vec<u8>, u64) = (Vec::new(), 0);
    m.pages(from, to, &mut |va, page| {
        // The end of the page before belongs to it.
        if last.wrapping_add(4096) != va {
            before.clear();
        }
        let kept = before.len();
        before.extend_from_slice(page);
        for (i, window) in before.windows(DIGITS.len()).enumerate() {
            if window[0] == b'0' && window == DIGITS && candidates.len() < 64 {
                candidates.push(va.wrapping_sub(kept as u64).wrapping_add(i as u64));
            }
        }
        before.drain(..before.len() - (DIGITS.len() - 1));
        last = va;
        false
    });
    candidates.into_iter().find_map(|digits| around(m, digits))
}

/// Most names that are gone through in search of their number.
const MOST_WORK: u64 = 1 << 28;
/// How much before the tokens is looked at.
const BEFORE: u64 = 12 << 20;

/// The tables around the token table whose digits are at an address.
fn around(m: &Memory<'_>, digits: u64) -> Option<Places> {
    let align = m.word as u64;
    // Forty-eight tokens come before that of '0'.
    let head = m.bytes(digits.checked_sub(4096)?, 4096)?;
    let ends = head.iter().enumerate().rev().filter(|(_, b)| **b == 0).map(|(i, _)| i);
    let start = ends.clone().nth(48)? as u64 + 1;
    let token_table = digits - 4096 + start;
    if !token_table.is_multiple_of(align) {
        return None;
    }
    let table = up_to(m, token_table, TOKENS);
    let mut end = 0;
    let mut wanted = Vec::with_capacity(512);
    for _ in 0..256 {
        wanted.extend_from_slice(&(end as u16).to_le_bytes());
        end += table.get(end..)?.iter().position(|b| *b == 0)? + 1;
    }
    let after = (token_table + end as u64).next_multiple_of(align);
    let token_index = (0..8).map(|i| after + i * align).find(|at| m.bytes(*at, 512).as_ref() == Some(&wanted))?;
    let (num_syms, names, n) = count_and_names(m, token_table)?;
    let offsets_len = 4 * n as u64;
    // Since 6.4 addresses follow the tokens, before they preceded the number of names.
    let new = (token_index + 512).next_multiple_of(align);
    let old = num_syms.checked_sub(align)?;
    let places = |offsets, relative_base| Places { num_syms, names, token_table, token_index, offsets, relative_base };
    let candidates = [
        places(new, (new + offsets_len).next_multiple_of(align)),
        places(old.checked_sub(offsets_len.next_multiple_of(align))?, old),
    ];
    candidates.into_iter().find(|p| read(m, p).is_ok())
}

/// Number and place of the names, by the markers (the place of every 256th name) behind them.
fn count_and_names(m: &Memory<'_>, token_table: u64) -> Option<(u64, u64, usize)> {
    let align = m.word;
    // What is mapped before the tokens.
    let mut begin = token_table & !4095;
    while token_table - begin < BEFORE && m.translate(begin.checked_sub(4096)?).is_some() {
        begin -= 4096;
    }
    let bytes = m.bytes(begin, (token_table - begin) as usize)?;
    let number = |at: usize| Some(u32::from_le_bytes(bytes.get(at..at + 4)?.try_into().ok()?));
    let mut at = bytes.len() / align * align;
    let mut work = 0;
    while at >= align {
        at -= align;
        let n = u64::from(number(at)?);
        if !(512..=MOST_NAMES).contains(&n) || n > (bytes.len() - at) as u64 {
            continue;
        }
        // Few positions come so far, and of those few past the first names.
        let Some((_, first)) = names_end(&bytes, at + align, 257) else { continue };
        work += n;
        if work > MOST_WORK {
            return None;
        }
        let Some((end, _)) = names_end(&bytes, at + align, n as usize) else { continue };
        let markers = end.next_multiple_of(align);
        if number(markers) == Some(0) && number(markers + 4) == Some(first as u32) {
            return Some((begin + at as u64, begin + (at + align) as u64, n as usize));
        }
    }
    None
}

#[cfg(test)]
#[path = "kallsyms_tests.rs"]
mod tests;
