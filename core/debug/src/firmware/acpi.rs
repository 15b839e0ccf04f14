//! ACPI tables, from the root pointer on (ACPI 6.5, chapter 5).

use std::fmt::Write as _;

use super::{number, physical};
use crate::linux::memory::printable;
use crate::target::Target;

/// Most tables.
const MOST: usize = 256;
/// Bytes of a table's header.
const HEADER: usize = 36;

/// A table.
struct Table {
    at: u64,
    bytes: Vec<u8>,
}

impl Table {
    /// That at a physical address; `None` if it cannot be one.
    fn read(target: &dyn Target, at: u64) -> Option<Table> {
        let header = physical(target, at, HEADER as u64)?;
        let len = number(&header, 4, 4);
        if len < HEADER as u64 && &header[..4] != b"FACS" || !header[..4].iter().all(u8::is_ascii_graphic) {
            return None;
        }
        Some(Table { at, bytes: physical(target, at, len)? })
    }

    fn name(&self) -> String {
        printable(self.bytes.get(..4).unwrap_or_default())
    }

    fn n(&self, at: usize, bytes: usize) -> u64 {
        number(&self.bytes, at, bytes)
    }

    fn sums_up(&self) -> bool {
        // The FACS has no checksum.
        self.bytes.starts_with(b"FACS") || self.bytes.iter().fold(0u8, |s, b| s.wrapping_add(*b)) == 0
    }

    fn head(&self) -> String {
        let text = |at: usize, len: usize| printable(self.bytes.get(at..at + len).unwrap_or_default());
        let sum = if self.sums_up() { "" } else { " BAD CHECKSUM" };
        let len = self.bytes.len();
        if self.bytes.starts_with(b"FACS") {
            return format!("FACS at {:#x}, {len} bytes\n", self.at);
        }
        format!(
            "{} at {:#x}, {len} bytes, revision {}, OEM {:?} {:?}{sum}\n",
            self.name(),
            self.at,
            self.n(8, 1),
            text(10, 6).trim_end(),
            text(16, 8).trim_end()
        )
    }
}

/// The root pointer (5.2.5.1): in the first KiB of the extended BIOS data area, or in the BIOS's read-only memory.
fn root(target: &dyn Target) -> Option<(u64, Vec<u8>)> {
    let ebda = physical(target, 0x40e, 2).map_or(0, |b| number(&b, 0, 2) << 4);
    let areas = [(ebda, 1024), (0xe_0000, 0x2_0000)];
    areas.into_iter().filter(|(at, _)| *at != 0).find_map(|(base, len)| {
        (base..base + len).step_by(16).find_map(|at| {
            let first = physical(target, at, 20).filter(|b| b.starts_with(b"RSD PTR "))?;
            let sum = first.iter().fold(0u8, |s, b| s.wrapping_add(*b));
            (sum == 0).then(|| Some((at, physical(target, at, 36)?)))?
        })
    })
}

/// All tables that are linked.
fn tables(target: &dyn Target) -> Result<(u64, Vec<Table>), String> {
    let (at, rsdp) = root(target).ok_or(
        "no ACPI root pointer is in memory: firmware has not run yet, this machine has a device tree (info fdt), or a \
         UEFI keeps it where only its system table says",
    )?;
    let xsdt = if rsdp[15] >= 2 { number(&rsdp, 24, 8) } else { 0 };
    let (root, width) = if xsdt != 0 { (xsdt, 8) } else { (number(&rsdp, 16, 4), 4) };
    let root = Table::read(target, root).ok_or_else(|| format!("the ACPI root table at {root:#x} cannot be read"))?;
    let links = (HEADER..root.bytes.len()).step_by(width).map(|i| root.n(i, width));
    let mut all: Vec<Table> = links.take(MOST).filter_map(|at| Table::read(target, at)).collect();
    let fadt = all.iter().find(|t| t.name() == "FACP").map(|t| {
        let wide = |x: usize, narrow: usize| if t.n(x, 8) != 0 { t.n(x, 8) } else { t.n(narrow, 4) };
        [wide(140, 40), wide(132, 36)]
    });
    all.extend(fadt.into_iter().flatten().filter(|at| *at != 0).filter_map(|at| Table::read(target, at)));
    all.insert(0, root);
    Ok((at, all))
}

/// The list of tables, or what is in those of a name.
///
/// # Errors
/// There are none.
pub fn acpi(name: &str, target: &dyn Target) -> Result<String, String> {
    let (at, all) = tables(target)?;
    if name.is_empty() {
        let list: String = all.iter().map(Table::head).collect();
        return Ok(format!("RSDP at {at:#x}\n{list}"));
    }
    let wanted = all.iter().filter(|t| t.name().eq_ignore_ascii_case(name) || name == "MADT" && t.name() == "APIC");
    let text: String = wanted.map(|t| t.head() + &contents(t)).collect();
    if text.is_empty() {
        let names: Vec<String> = all.iter().map(Table::name).collect();
        return Err(format!("there is no ACPI table {name}; there are {}", names.join(", ")));
    }
    Ok(text)
}

/// Name, offset, bytes.
type Row = (&'static str, usize, usize);

/// The fixed hardware's description (5.2.9).
const FADT: &[Row] = &[
    ("FIRMWARE_CTRL", 36, 4),
    ("DSDT", 40, 4),
    ("Preferred_PM_Profile", 45, 1),
    ("SCI_INT", 46, 2),
    ("SMI_CMD", 48, 4),
    ("ACPI_ENABLE", 52, 1),
    ("ACPI_DISABLE", 53, 1),
    ("PM1a_EVT_BLK", 56, 4),
    ("PM1a_CNT_BLK", 64, 4),
    ("PM_TMR_BLK", 76, 4),
    ("GPE0_BLK", 80, 4),
    ("PM1_EVT_LEN", 88, 1),
    ("PM1_CNT_LEN", 89, 1),
    ("PM_TMR_LEN", 91, 1),
    ("GPE0_BLK_LEN", 92, 1),
    ("CENTURY", 108, 1),
    ("IAPC_BOOT_ARCH", 109, 2),
    ("Flags", 112, 4),
    ("RESET_REG", 120, 8),
    ("RESET_VALUE", 128, 1),
    ("X_FIRMWARE_CTRL", 132, 8),
    ("X_DSDT", 140, 8),
];
/// IA-PC HPET specification 1.0a, 3.2.4.
const HPET: &[Row] = &[
    ("Event Timer Block ID", 36, 4),
    ("BASE_ADDRESS", 44, 8),
    ("HPET Number", 52, 1),
    ("Main Counter Minimum Clock_tick", 53, 2),
];

fn rows(table: &Table, rows: &[Row]) -> String {
    let inside = rows.iter().filter(|(_, at, len)| at + len <= table.bytes.len());
    inside.map(|(name, at, len)| format!("  {name:<32} {:#x}\n", table.n(*at, *len))).collect()
}

fn contents(table: &Table) -> String {
    match table.name().as_str() {
        "FACP" => rows(table, FADT),
        "HPET" => rows(table, HPET),
        "APIC" => madt(table),
        "MCFG" => mcfg(table),
        "XSDT" | "RSDT" => {
            let width = if table.name() == "XSDT" { 8 } else { 4 };
            let links = (HEADER..table.bytes.len()).step_by(width).take(MOST);
            links.map(|at| format!("  {:#x}\n", table.n(at, width))).collect()
        }
        _ => dump(table),
    }
}

fn mcfg(table: &Table) -> String {
    let entries = (44..table.bytes.len()).step_by(16).take(MOST);
    let line = |at: usize| {
        let (base, segment) = (table.n(at, 8), table.n(at + 8, 2));
        format!("  segment {segment}: buses {}-{} at {base:#x}\n", table.n(at + 10, 1), table.n(at + 11, 1))
    };
    entries.map(line).collect()
}

/// Interrupt controllers (5.2.12).
fn madt(table: &Table) -> String {
    let mut out = format!("  Local Interrupt Controller Address {:#x}, Flags {:#x}\n", table.n(36, 4), table.n(40, 4));
    let mut at = 44;
    while at + 2 <= table.bytes.len() {
        let (kind, len) = (table.n(at, 1), table.n(at + 1, 1) as usize);
        if len < 2 {
            out.push_str("  an entry without a length: the table is damaged\n");
            break;
        }
        let n = |offset: usize, bytes: usize| if offset + bytes <= len { table.n(at + offset, bytes) } else { 0 };
        let _ = match kind {
            0 => writeln!(out, "  Processor Local APIC: UID {}, APIC ID {}, Flags {:#x}", n(2, 1), n(3, 1), n(4, 4)),
            1 => writeln!(out, "  I/O APIC: ID {}, at {:#x}, GSI base {}", n(2, 1), n(4, 4), n(8, 4)),
            2 => writeln!(out, "  Interrupt Source Override: IRQ {} is GSI {}, Flags {:#x}", n(3, 1), n(4, 4), n(8, 2)),
            4 => writeln!(out, "  Local APIC NMI: UID {}, Flags {:#x}, LINT{}", n(2, 1), n(3, 2), n(5, 1)),
            9 => {
                writeln!(out, "  Processor Local x2APIC: UID {}, X2APIC ID {}, Flags {:#x}", n(12, 4), n(4, 4), n(8, 4))
            }
            10 => writeln!(out, "  Local x2APIC NMI: UID {:#x}, Flags {:#x}, LINT{}", n(4, 4), n(2, 2), n(8, 1)),
            0x18 => writeln!(out, "  RINTC: UID {}, Hart ID {}, Flags {:#x}", n(16, 4), n(8, 8), n(4, 4)),
            0x1b => writeln!(out, "  PLIC: ID {}, at {:#x}, GSI base {}", n(3, 1), n(24, 8), n(20, 4)),
            _ => writeln!(out, "  entry of type {kind:#x}, {len} bytes"),
        };
        at += len;
    }
    out
}

/// The begin of a table in hexadecimal.
fn dump(table: &Table) -> String {
    const SHOWN: usize = 512;
    let mut out = String::new();
    for (i, row) in table.bytes.chunks(16).enumerate().take(SHOWN / 16) {
        let hex: String = row.iter().map(|b| format!("{b:02x} ")).collect();
        let text: String = row.iter().map(|b| if b.is_ascii_graphic() { char::from(*b) } else { '.' }).collect();
        let _ = writeln!(out, "  {:04x}: {hex:<48} {text}", 16 * i);
    }
    if table.bytes.len() > SHOWN {
        let _ = writeln!(out, "  (and more; with 'dump' and 'iasl -d' it is disassembled)");
    }
    out
}
