//! Which of a vCPU's words are kept.

use mimus_core::accel::trace::words;

/// A range of addresses: first, and first behind.
pub type Range = (u64, u64);

/// What to keep: everything that each of these allows. An empty list allows all.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Filter {
    /// Virtual addresses of code.
    pub code: Vec<Range>,
    /// Addresses that are accessed.
    pub data: Vec<Range>,
    /// Roots of page tables: what `satp` or CR3 holds.
    pub spaces: Vec<u64>,
    /// vCPUs.
    pub vcpus: Vec<u32>,
    /// Privileges: RISC-V 0, 1, 3; x86 the CPL.
    pub modes: Vec<u8>,
}

/// A number, decimal or `0x…`.
pub fn number(text: &str) -> Result<u64, String> {
    let hex = text.strip_prefix("0x").or_else(|| text.strip_prefix("0X"));
    let parsed = match hex {
        Some(hex) => u64::from_str_radix(&hex.replace('_', ""), 16),
        None => text.parse(),
    };
    parsed.map_err(|_| format!("{text:?} is not a number; write 4096 or 0x1000"))
}

/// `FIRST-LAST` or `FIRST+BYTES` or one address.
pub fn range(text: &str) -> Result<Range, String> {
    if let Some((first, last)) = text.split_once('-') {
        return Ok((number(first)?, number(last)?.saturating_add(1)));
    }
    let (first, len) = text.split_once('+').unwrap_or((text, "1"));
    let first = number(first)?;
    Ok((first, first.saturating_add(number(len)?)))
}

fn within(ranges: &[Range], at: u64) -> bool {
    ranges.is_empty() || ranges.iter().any(|r| (r.0..r.1).contains(&at))
}

impl Filter {
    /// Adds the filter `key=value`; `None` if `key` is none.
    pub fn add(&mut self, key: &str, value: &str) -> Option<Result<(), String>> {
        let result = match key {
            "range" | "pc" => range(value).map(|r| self.code.push(r)),
            "addr" => range(value).map(|r| self.data.push(r)),
            "space" => number(value).map(|n| self.spaces.push(n)),
            "vcpu" => number(value).map(|n| self.vcpus.push(n as u32)),
            "mode" => mode(value).map(|modes| self.modes.extend(modes)),
            _ => return None,
        };
        Some(result)
    }

    /// Whether it keeps everything.
    pub fn is_empty(&self) -> bool {
        *self == Filter::default()
    }

    /// Whether an access at `at` is kept.
    pub fn data(&self, at: u64) -> bool {
        within(&self.data, at)
    }

    /// Whether code at `pc` is kept.
    pub fn code(&self, pc: u64) -> bool {
        within(&self.code, pc)
    }

    /// Whether an address space and privilege are kept.
    pub fn space(&self, root: u64, mode: u8) -> bool {
        (self.spaces.is_empty() || self.spaces.contains(&root)) && (self.modes.is_empty() || self.modes.contains(&mode))
    }

    /// Whether a vCPU is kept.
    pub fn vcpu(&self, vcpu: u32) -> bool {
        self.vcpus.is_empty() || self.vcpus.contains(&vcpu)
    }
}

fn mode(text: &str) -> Result<Vec<u8>, String> {
    Ok(match text {
        "user" => vec![0, 3],
        "supervisor" | "kernel" => vec![1, 0],
        "machine" => vec![3],
        _ => vec![u8::try_from(number(text)?).map_err(|_| format!("mode={text}: there is no such privilege"))?],
    })
}

/// A filter at work on one vCPU's words.
#[derive(Clone, Debug)]
pub struct Sieve {
    page: u64,
    /// Of the last stretch or step.
    pc_kept: bool,
    space_kept: bool,
}

impl Default for Sieve {
    fn default() -> Sieve {
        Sieve { page: 0, pc_kept: true, space_kept: true }
    }
}

impl Sieve {
    /// Copies what `filter` keeps of `input` to `out`. `offset` gives the page offset of a number's code.
    pub fn apply(&mut self, filter: &Filter, offset: impl Fn(u32) -> u16, input: &[u32], out: &mut Vec<u32>) {
        let pair = |args: &[u32], i: usize| match args.get(i..i + 2) {
            Some(&[low, high]) => u64::from(low) | u64::from(high) << 32,
            _ => 0,
        };
        let mut rest = input;
        while let Some((&word, after)) = rest.split_first() {
            let (args, after) = after.split_at(words::payload(word).min(after.len()));
            let keep = match word {
                _ if word < words::FIRST_TAG => {
                    self.pc_kept = filter.code.is_empty() || filter.code(self.page | u64::from(offset(word)));
                    self.space_kept && self.pc_kept
                }
                _ if word & words::ACCESS != 0 => self.space_kept && self.pc_kept && filter.data(pair(args, 0)),
                words::BULK => self.space_kept && self.pc_kept && filter.data(pair(args, 1)),
                words::DEVICE | words::PORT => self.space_kept && filter.data(pair(args, 1)),
                words::PAGE => {
                    self.page = pair(args, 0);
                    true
                }
                words::SPACE => {
                    self.space_kept = filter.space(pair(args, 0), args.get(2).copied().unwrap_or(0) as u8);
                    true
                }
                words::STEP => {
                    self.page = pair(args, 0) & !4095;
                    self.pc_kept = filter.code(pair(args, 0));
                    self.space_kept && self.pc_kept
                }
                words::EXCEPTION => self.space_kept && filter.code(pair(args, 2)),
                _ => true,
            };
            if keep {
                out.push(word);
                out.extend(args);
            } else if word == words::STEP {
                // What follows is in its page.
                out.extend([words::PAGE, self.page as u32, (self.page >> 32) as u32]);
            }
            rest = after;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_of_the_user() {
        assert_eq!(range("0x10-0x1f"), Ok((0x10, 0x20)));
        assert_eq!(range("16+4"), Ok((16, 20)));
        assert_eq!(range("7"), Ok((7, 8)));
        assert!(range("x").unwrap_err().contains("not a number"));
        let mut f = Filter::default();
        assert!(f.is_empty() && f.add("colour", "red").is_none());
        f.add("range", "0x1000-0x1fff").unwrap().unwrap();
        f.add("addr", "0x500").unwrap().unwrap();
        assert!(f.code(0x1800) && !f.code(0x2000) && f.data(0x500) && !f.data(0x501));
    }

    #[test]
    fn what_is_kept() {
        let mut filter = Filter::default();
        filter.add("range", "0x1000-0x1fff").unwrap().unwrap();
        filter.add("space", "5").unwrap().unwrap();
        let access = words::ACCESS | 3 << words::SIZE_SHIFT;
        let input = [
            [words::SPACE, 5, 0, 0].as_slice(),
            &[words::PAGE, 0x1000, 0, 1, access, 9, 0],
            &[words::PAGE, 0x2000, 0, 1, access, 9, 0],
            &[words::SPACE, 6, 0, 0, words::PAGE, 0x1000, 0, 1, access, 9, 0],
        ];
        let mut out = Vec::new();
        Sieve::default().apply(&filter, |_| 0x10, &input.concat(), &mut out);
        let expected = [
            [words::SPACE, 5, 0, 0].as_slice(),
            &[words::PAGE, 0x1000, 0, 1, access, 9, 0],
            &[words::PAGE, 0x2000, 0],
            &[words::SPACE, 6, 0, 0, words::PAGE, 0x1000, 0],
        ];
        assert_eq!(out, expected.concat());
    }
}
