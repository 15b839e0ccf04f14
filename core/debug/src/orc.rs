//! ORC: how Linux on x86-64 finds callers without frame pointers.
//!
//! Two arrays of the same length: where each entry begins to hold, as distances from the array's own elements; and six
//! bytes each: offsets of the caller's stack pointer and of the saved `rbp`, the registers they are relative to, and what
//! is on the stack. The numbers of the kinds changed in 6.4, with nothing that would say so but that most entries are
//! calls. Description: Documentation/arch/x86/orc-unwinder.rst.

/// Most entries; Debian's kernels have 250,000.
const MOST: usize = 4 << 20;

/// What the caller's stack pointer is relative to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Base {
    Sp,
    Bp,
    /// A register by DWARF's number.
    Dwarf(usize),
}

/// The caller's stack pointer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sp {
    /// There is no caller, or none can be told.
    None,
    At(Base, i64),
    /// In memory at the first offset; the second is added to what is there.
    In(Base, i64, i64),
}

/// The caller's `rbp`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Bp {
    Same,
    /// Saved at this offset from the caller's stack pointer.
    AtSp(i64),
    AtBp(i64),
}

/// What is on the stack.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A return address below the caller's stack pointer.
    Call,
    /// All registers.
    Regs,
    /// What the processor pushes at an exception.
    Partial,
}

/// An entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Entry {
    pub sp: Sp,
    pub bp: Bp,
    pub kind: Kind,
}

/// A kernel's tables.
#[derive(Debug)]
pub struct Orc {
    /// Where each entry begins to hold, ascending.
    begins: Vec<u64>,
    entries: Vec<[u8; 6]>,
    /// The kinds of 6.4 and later.
    new: bool,
}

impl Orc {
    /// From the two arrays; `address` is the first's. `None` if they cannot be such.
    pub fn new(distances: &[u8], address: u64, entries: &[u8]) -> Option<Orc> {
        let n = distances.len() / 4;
        if n == 0 || n > MOST || entries.len() / 6 != n {
            return None;
        }
        let begin = |(i, d): (usize, &[u8])| {
            let distance = i32::from_le_bytes(d.try_into().unwrap_or_default());
            address.wrapping_add(4 * i as u64).wrapping_add(i64::from(distance) as u64)
        };
        let begins: Vec<u64> = distances.chunks_exact(4).enumerate().map(begin).collect();
        if !begins.is_sorted() {
            return None;
        }
        let entries: Vec<[u8; 6]> = entries.chunks_exact(6).map(|e| e.try_into().unwrap_or_default()).collect();
        let calls = |kind: u8, mask: u8| entries.iter().filter(|e| e[5] & mask == kind).count();
        let new = calls(2, 7) > calls(0, 3);
        Some(Orc { begins, entries, new })
    }

    /// How many entries.
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// The entry that holds at an address; `None` outside, and where no caller can be told.
    pub fn find(&self, pc: u64) -> Option<Entry> {
        let after = self.begins.partition_point(|b| *b <= pc);
        let e = self.entries.get(after.checked_sub(1)?)?;
        // Behind the last entry is no code.
        if after == self.begins.len() && pc - self.begins[after - 1] > 1 << 20 {
            return None;
        }
        let sp_offset = i64::from(i16::from_le_bytes([e[0], e[1]]));
        let bp_offset = i64::from(i16::from_le_bytes([e[2], e[3]]));
        let kind = match (self.new, e[5] & 7) {
            (true, 2) => Kind::Call,
            (true, 3) => Kind::Regs,
            (true, 4) => Kind::Partial,
            (true, _) => return None,
            // The third bit is another's.
            (false, k) => [Kind::Call, Kind::Regs, Kind::Partial, Kind::Call][usize::from(k & 3)],
        };
        let sp = match e[4] & 0xf {
            2 => Sp::At(Base::Dwarf(1), sp_offset),
            3 => Sp::At(Base::Dwarf(5), sp_offset),
            4 => Sp::At(Base::Bp, sp_offset),
            5 => Sp::At(Base::Sp, sp_offset),
            6 => Sp::At(Base::Dwarf(10), sp_offset),
            7 => Sp::At(Base::Dwarf(13), sp_offset),
            8 => Sp::In(Base::Bp, sp_offset, 0),
            9 => Sp::In(Base::Sp, 0, sp_offset),
            _ => return None,
        };
        let bp = match e[4] >> 4 {
            1 => Bp::AtSp(bp_offset),
            4 => Bp::AtBp(bp_offset),
            _ => Bp::Same,
        };
        Some(Entry { sp, bp, kind })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tables(entries: &[(u64, [u8; 6])]) -> (Vec<u8>, Vec<u8>) {
        let distance = |(i, (begin, _)): (usize, &(u64, [u8; 6]))| (*begin as i64 - 0x9000 - 4 * i as i64) as i32;
        let distances = entries.iter().enumerate().flat_map(|e| distance(e).to_le_bytes()).collect();
        (distances, entries.iter().flat_map(|e| e.1).collect())
    }

    const CALL_OLD: [u8; 6] = [8, 0, 0, 0, 5, 0];
    const CALL_NEW: [u8; 6] = [8, 0, 0, 0, 5, 2];

    #[test]
    fn kinds_of_both_ages() {
        // sp+16, rbp saved 16 below; then all registers at the stack pointer; then nothing.
        let old = [
            (0x1000, [16, 0, 0xf0, 0xff, 0x15, 0]),
            (0x1010, [0, 0, 0, 0, 5, 1]),
            (0x1020, [0; 6]),
            (0x1030, CALL_OLD),
        ];
        let new = [
            (0x1000, [16, 0, 0xf0, 0xff, 0x15, 2]),
            (0x1010, [0, 0, 0, 0, 5, 3]),
            (0x1020, [0; 6]),
            (0x1030, CALL_NEW),
        ];
        for table in [&old, &new] {
            let (distances, entries) = tables(table);
            let orc = Orc::new(&distances, 0x9000, &entries).unwrap();
            let call = Entry { sp: Sp::At(Base::Sp, 16), bp: Bp::AtSp(-16), kind: Kind::Call };
            assert_eq!(orc.find(0x1004), Some(call));
            assert_eq!(orc.find(0x1010).map(|e| e.kind), Some(Kind::Regs));
            assert_eq!((orc.find(0xfff), orc.find(0x1025), orc.find(u64::MAX)), (None, None, None));
        }
    }

    #[test]
    fn what_cannot_be_tables() {
        assert!(Orc::new(&[], 0, &[]).is_none());
        assert!(Orc::new(&[0; 8], 0, &[0; 6]).is_none(), "of different lengths");
        assert!(Orc::new(&[0xff, 0xff, 0xff, 0x7f, 0, 0, 0, 0], 0, &[0; 12]).is_none(), "not in order");
    }
}
