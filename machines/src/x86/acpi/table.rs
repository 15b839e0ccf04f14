//! ACPI tables as bytes, before it is known where in memory they go.
//!
//! Spec: ACPI 6.5 §5.2.5 (root pointer), §5.2.6 (table header), §5.2.7-8 (RSDT, XSDT).
//! A [`TableSet`] is one blob with links from table to table; it is either placed at an
//! address ([`TableSet::place`]) or handed to firmware with instructions
//! ([`super::loader`]).

/// Bytes of a table's header.
const HEADER: usize = 36;
/// Offset of the checksum in it.
const CHECKSUM: usize = 9;
/// Bytes of the root pointer.
pub const RSDP_LEN: usize = 36;
/// The part of the root pointer that its first checksum covers.
const RSDP_V1_LEN: usize = 20;
/// What all tables begin at a multiple of. The FACS needs it (§5.2.10).
pub const ALIGN: usize = 64;

const OEM_ID: &[u8; 6] = b"MIMUS ";
const CREATOR: &[u8; 4] = b"MIMU";

/// One table while it is filled in.
#[derive(Clone, Debug)]
pub struct Table {
    bytes: Vec<u8>,
}

impl Table {
    /// An empty table. `signature` is also the OEM's name for it.
    pub fn new(signature: &[u8; 4], revision: u8) -> Self {
        let mut bytes = vec![0; HEADER];
        bytes[..4].copy_from_slice(signature);
        bytes[8] = revision;
        bytes[10..16].copy_from_slice(OEM_ID);
        bytes[16..20].copy_from_slice(CREATOR);
        bytes[20..24].copy_from_slice(signature);
        bytes[24] = 1;
        bytes[28..32].copy_from_slice(CREATOR);
        bytes[32] = 1;
        Self { bytes }
    }

    /// Appends bytes.
    pub fn bytes(&mut self, data: &[u8]) -> &mut Self {
        self.bytes.extend(data);
        self
    }

    /// Appends 8 bits.
    pub fn u8(&mut self, value: u8) -> &mut Self {
        self.bytes(&[value])
    }

    /// Appends 16 bits.
    pub fn u16(&mut self, value: u16) -> &mut Self {
        self.bytes(&value.to_le_bytes())
    }

    /// Appends 32 bits.
    pub fn u32(&mut self, value: u32) -> &mut Self {
        self.bytes(&value.to_le_bytes())
    }

    /// Appends 64 bits.
    pub fn u64(&mut self, value: u64) -> &mut Self {
        self.bytes(&value.to_le_bytes())
    }

    /// Appends a generic address (§5.2.3.2).
    pub fn gas(&mut self, gas: Gas) -> &mut Self {
        self.bytes(&[gas.space, gas.bits, 0, gas.access]).u64(gas.address)
    }

    /// Bytes so far, with the header.
    pub fn size(&self) -> usize {
        self.bytes.len()
    }

    /// The finished table but for its checksum.
    fn finish(mut self) -> Vec<u8> {
        let len = self.bytes.len() as u32;
        self.bytes[4..8].copy_from_slice(&len.to_le_bytes());
        self.bytes
    }
}

/// A register by address space, width and address.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Gas {
    space: u8,
    bits: u8,
    /// 1 to 4 for bytes to 8 bytes.
    access: u8,
    address: u64,
}

impl Gas {
    /// No register.
    pub const NONE: Self = Self { space: 0, bits: 0, access: 0, address: 0 };

    /// Ports, `bits` of them wide, accessed with the widest access that fits.
    pub const fn io(port: u16, bits: u8) -> Self {
        let access = match bits {
            8 => 1,
            16 => 2,
            _ => 3,
        };
        Self { space: 1, bits, access, address: port as u64 }
    }

    /// A byte in memory.
    pub const fn memory_byte(address: u64) -> Self {
        Self { space: 0, bits: 8, access: 1, address }
    }

    /// Memory `bits` wide with no access size.
    pub const fn memory(address: u64, bits: u8) -> Self {
        Self { space: 0, bits, access: 0, address }
    }
}

/// A field that holds the address of another table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Link {
    /// Where the field is in the blob.
    pub at: usize,
    /// Its width in bytes: 4 or 8.
    pub width: usize,
    /// The offset in the blob that it points to.
    pub target: usize,
}

/// A table in the blob whose checksum is to be made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sum {
    /// Its offset.
    pub start: usize,
    /// Its length.
    pub len: usize,
}

impl Sum {
    /// Where the checksum is in the blob.
    pub fn at(&self) -> usize {
        self.start + CHECKSUM
    }
}

/// All tables of a machine but the root pointer, as one blob.
#[derive(Clone, Debug, Default)]
pub struct TableSet {
    blob: Vec<u8>,
    links: Vec<Link>,
    sums: Vec<Sum>,
    /// Offsets of the tables the root tables list.
    listed: Vec<usize>,
    roots: Option<(usize, usize)>,
    facs: Option<usize>,
}

impl TableSet {
    fn align(&mut self) -> usize {
        self.blob.resize(self.blob.len().next_multiple_of(ALIGN), 0);
        self.blob.len()
    }

    /// Appends a structure that has no common header (the FACS); returns its offset.
    pub fn add_raw(&mut self, bytes: &[u8]) -> usize {
        let at = self.align();
        self.blob.extend(bytes);
        at
    }

    /// Appends a table that others point to; returns its offset.
    pub fn add_linked(&mut self, table: Table) -> usize {
        let at = self.align();
        let bytes = table.finish();
        self.sums.push(Sum { start: at, len: bytes.len() });
        self.blob.extend(bytes);
        at
    }

    /// Appends a table that the root tables list; returns its offset.
    pub fn add(&mut self, table: Table) -> usize {
        let at = self.add_linked(table);
        self.listed.push(at);
        at
    }

    /// Has the `width` bytes at `at` hold the address of what is at `target`.
    pub fn link(&mut self, at: usize, width: usize, target: usize) {
        self.links.push(Link { at, width, target });
    }

    /// Appends RSDT and XSDT. Nothing is to be added after.
    pub fn finish(mut self) -> Self {
        let rsdt = self.root(b"RSDT", 4);
        let xsdt = self.root(b"XSDT", 8);
        self.roots = Some((rsdt, xsdt));
        self.align();
        self
    }

    fn root(&mut self, signature: &[u8; 4], width: usize) -> usize {
        let mut table = Table::new(signature, 1);
        table.bytes(&vec![0; self.listed.len() * width]);
        let at = self.add_linked(table);
        let listed = self.listed.clone();
        for (i, target) in listed.into_iter().enumerate() {
            self.link(at + HEADER + i * width, width, target);
        }
        at
    }

    /// Bytes of the blob.
    pub fn len(&self) -> usize {
        self.blob.len()
    }

    /// True if there are no tables.
    pub fn is_empty(&self) -> bool {
        self.blob.is_empty()
    }

    /// The blob with offsets where addresses are to be.
    pub fn unplaced(&self) -> Vec<u8> {
        self.linked(0)
    }

    /// Its links.
    pub fn links(&self) -> &[Link] {
        &self.links
    }

    /// Its checksums.
    pub fn sums(&self) -> &[Sum] {
        &self.sums
    }

    /// Says where the FACS is.
    pub fn set_facs(&mut self, offset: usize) {
        self.facs = Some(offset);
    }

    /// Offset of the FACS, if there is one.
    pub fn facs(&self) -> Option<usize> {
        self.facs
    }

    /// Offsets of RSDT and XSDT.
    pub fn roots(&self) -> (usize, usize) {
        self.roots.unwrap_or_default()
    }

    fn linked(&self, base: u64) -> Vec<u8> {
        let mut blob = self.blob.clone();
        for l in &self.links {
            let value = (base + l.target as u64).to_le_bytes();
            blob[l.at..l.at + l.width].copy_from_slice(&value[..l.width]);
        }
        blob
    }

    /// The blob for address `base`, complete.
    pub fn place(&self, base: u64) -> Vec<u8> {
        let mut blob = self.linked(base);
        for sum in &self.sums {
            blob[sum.at()] = checksum(&blob[sum.start..sum.start + sum.len]);
        }
        blob
    }

    /// The root pointer for a blob at `base`, complete.
    pub fn rsdp(&self, base: u64) -> [u8; RSDP_LEN] {
        let (rsdt, xsdt) = self.roots();
        let mut r = rsdp(base + rsdt as u64, base + xsdt as u64);
        r[8] = checksum(&r[..RSDP_V1_LEN]);
        r[32] = checksum(&r);
        r
    }
}

/// A root pointer without checksums.
pub fn rsdp(rsdt: u64, xsdt: u64) -> [u8; RSDP_LEN] {
    let mut r = [0; RSDP_LEN];
    r[..8].copy_from_slice(b"RSD PTR ");
    r[9..15].copy_from_slice(OEM_ID);
    r[15] = 2;
    r[16..20].copy_from_slice(&(rsdt as u32).to_le_bytes());
    r[20..24].copy_from_slice(&(RSDP_LEN as u32).to_le_bytes());
    r[24..32].copy_from_slice(&xsdt.to_le_bytes());
    r
}

/// The byte that makes the sum of all zero.
pub fn checksum(bytes: &[u8]) -> u8 {
    bytes.iter().fold(0u8, |sum, b| sum.wrapping_add(*b)).wrapping_neg()
}
