//! Instructions by which firmware installs tables: fw_cfg's `etc/table-loader`.
//!
//! Spec: QEMU `docs/specs/fw_cfg` names the file; the command layout is that of
//! SeaBIOS's `romfile_loader` and EDK2's `QemuLoader.h`: 128-byte entries, a 32-bit
//! command and its fields, little-endian.

use super::table::{RSDP_LEN, TableSet, rsdp};

/// File of the tables.
pub const TABLES: &str = "etc/acpi/tables";
/// File of the root pointer.
pub const RSDP: &str = "etc/acpi/rsdp";
/// File of the instructions.
pub const LOADER: &str = "etc/table-loader";

const ENTRY: usize = 128;
const NAME: usize = 56;
const ALLOCATE: u32 = 1;
const ADD_POINTER: u32 = 2;
const ADD_CHECKSUM: u32 = 3;
/// Anywhere below 4 GiB.
const ZONE_HIGH: u8 = 1;
/// The BIOS area, where the root pointer is looked for.
const ZONE_FSEG: u8 = 2;

/// The three files for `set`: name and contents.
pub fn files(set: &TableSet) -> [(&'static str, Vec<u8>); 3] {
    let (rsdt, xsdt) = set.roots();
    let root = rsdp(rsdt as u64, xsdt as u64).to_vec();
    let mut c = Commands::default();
    c.allocate(TABLES, super::table::ALIGN as u32, ZONE_HIGH);
    c.allocate(RSDP, 16, ZONE_FSEG);
    for l in set.links() {
        c.add_pointer(TABLES, TABLES, l.at, l.width);
    }
    for s in set.sums() {
        c.add_checksum(TABLES, s.at(), s.start, s.len);
    }
    c.add_pointer(RSDP, TABLES, 16, 4);
    c.add_pointer(RSDP, TABLES, 24, 8);
    c.add_checksum(RSDP, 8, 0, 20);
    c.add_checksum(RSDP, 32, 0, RSDP_LEN);
    [(TABLES, set.unplaced()), (RSDP, root), (LOADER, c.0)]
}

#[derive(Default)]
struct Commands(Vec<u8>);

impl Commands {
    fn push(&mut self, command: u32, fields: &[&[u8]]) {
        let start = self.0.len();
        self.0.extend(command.to_le_bytes());
        fields.iter().for_each(|f| self.0.extend(*f));
        self.0.resize(start + ENTRY, 0);
    }

    fn allocate(&mut self, file: &str, align: u32, zone: u8) {
        self.push(ALLOCATE, &[&name(file), &align.to_le_bytes(), &[zone]]);
    }

    /// The field at `at` of `file` holds an offset into `target`: adds where that is.
    fn add_pointer(&mut self, file: &str, target: &str, at: usize, width: usize) {
        self.push(ADD_POINTER, &[&name(file), &name(target), &(at as u32).to_le_bytes(), &[width as u8]]);
    }

    fn add_checksum(&mut self, file: &str, at: usize, start: usize, len: usize) {
        let numbers = [at, start, len].map(|n| (n as u32).to_le_bytes());
        self.push(ADD_CHECKSUM, &[&name(file), &numbers[0], &numbers[1], &numbers[2]]);
    }
}

fn name(file: &str) -> [u8; NAME] {
    let mut out = [0; NAME];
    out[..file.len()].copy_from_slice(file.as_bytes());
    out
}
