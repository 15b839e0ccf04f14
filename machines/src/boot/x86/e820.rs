//! The memory map a PC's firmware gives: ranges of addresses and what they are.
//!
//! Spec: ACPI 6.5 §15 ("System Address Map Interfaces"). The same list is in Linux's
//! `boot_params`, in PVH's `hvm_start_info` and in fw_cfg's `etc/e820`.

/// What a range of addresses is (ACPI 6.5, table 15.6).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum Kind {
    /// RAM the system may use.
    Ram = 1,
    /// Nothing the system may use.
    Reserved = 2,
    /// ACPI tables: RAM once they have been read.
    Acpi = 3,
    /// RAM that firmware and system share.
    Nvs = 4,
}

/// One range.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Entry {
    /// First address.
    pub base: u64,
    /// Bytes.
    pub len: u64,
    /// What it is.
    pub kind: Kind,
}

impl Entry {
    /// First address beyond.
    pub fn end(&self) -> u64 {
        self.base + self.len
    }
}

/// A memory map: sorted, without overlaps.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct MemoryMap(Vec<Entry>);

impl MemoryMap {
    /// Says what `len` bytes from `base` are, whatever was said of them before.
    pub fn set(&mut self, base: u64, len: u64, kind: Kind) -> &mut Self {
        if len == 0 {
            return self;
        }
        self.remove(base, len);
        self.0.push(Entry { base, len, kind });
        self.0.sort_by_key(|e| e.base);
        self.0.dedup_by(|next, e| {
            let joins = e.kind == next.kind && e.end() == next.base;
            if joins {
                e.len += next.len;
            }
            joins
        });
        self
    }

    /// Says nothing any more of `len` bytes from `base`.
    pub fn remove(&mut self, base: u64, len: u64) -> &mut Self {
        let end = base.saturating_add(len);
        let mut out = Vec::with_capacity(self.0.len() + 2);
        for e in self.0.drain(..) {
            if e.base < base {
                out.push(Entry { len: e.len.min(base - e.base), ..e });
            }
            if e.end() > end {
                let start = e.base.max(end);
                out.push(Entry { base: start, len: e.end() - start, kind: e.kind });
            }
        }
        self.0 = out;
        self
    }

    /// The ranges, lowest first.
    pub fn entries(&self) -> &[Entry] {
        &self.0
    }

    /// Each entry in 20 bytes: base, length, kind (`boot_params`, `etc/e820`).
    pub fn packed(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(self.0.len() * 20);
        for e in &self.0 {
            out.extend(e.base.to_le_bytes());
            out.extend(e.len.to_le_bytes());
            out.extend((e.kind as u32).to_le_bytes());
        }
        out
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shape(map: &MemoryMap) -> Vec<(u64, u64, Kind)> {
        map.entries().iter().map(|e| (e.base, e.end(), e.kind)).collect()
    }

    #[test]
    fn the_later_word_counts() {
        let mut map = MemoryMap::default();
        map.set(0, 0x1000_0000, Kind::Ram).set(0x9_f000, 0x6_1000, Kind::Reserved).set(
            0xfff_0000,
            0x1_0000,
            Kind::Acpi,
        );
        let want = [
            (0, 0x9_f000, Kind::Ram),
            (0x9_f000, 0x10_0000, Kind::Reserved),
            (0x10_0000, 0xfff_0000, Kind::Ram),
            (0xfff_0000, 0x1000_0000, Kind::Acpi),
        ];
        assert_eq!(shape(&map), want);
        map.set(0x1000_0000, 0x1000, Kind::Acpi).set(0, 0x1000, Kind::Ram).set(5, 0, Kind::Nvs);
        assert_eq!(shape(&map)[3], (0xfff_0000, 0x1000_1000, Kind::Acpi));
        map.set(0, 0x2000_0000, Kind::Reserved);
        assert_eq!(shape(&map), [(0, 0x2000_0000, Kind::Reserved)]);
    }

    #[test]
    fn the_packed_form() {
        let mut map = MemoryMap::default();
        map.set(0x10_0000, 0x2000, Kind::Nvs);
        let mut want = vec![0; 20];
        want[2] = 0x10;
        want[9] = 0x20;
        want[16] = 4;
        assert_eq!(map.packed(), want);
    }
}
