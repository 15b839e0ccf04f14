//! SMBIOS tables: what a machine says of itself to people and inventory tools.
//!
//! Spec: DMTF DSP0134 3.7; sections are its. Entry point 3.0 (§5.2.2), structures of
//! types 0, 1, 3, 4, 16, 17, 19, 32 and 127, and 2 and 11 at the user's wish (`-smbios`). Left out: slots, caches, connectors.

use crate::boot::x86::Memory;
use crate::config::SmbiosField;
use crate::config::firmware::{parse_release, parse_uuid};

/// File of the entry point in fw_cfg.
pub const ANCHOR_FILE: &str = "etc/smbios/smbios-anchor";
/// File of the structures in fw_cfg.
pub const TABLES_FILE: &str = "etc/smbios/smbios-tables";
/// Bytes of the entry point.
pub const ANCHOR_LEN: usize = 24;

/// What the tables say.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Config {
    /// The board's name.
    pub product: String,
    /// Version of the program.
    pub version: String,
    /// The machine's UUID as it is written, most significant byte first.
    pub uuid: [u8; 16],
    /// Sockets, each with cores and threads.
    pub sockets: u16,
    /// Cores of each socket.
    pub cores: u16,
    /// Threads of each socket.
    pub threads: u16,
    /// CPUID leaf 1: EAX and EDX.
    pub cpuid: (u32, u32),
    /// RAM.
    pub memory: Memory,
    /// Fields that say something else than they do by default.
    pub fields: Vec<SmbiosField>,
}

impl Config {
    /// The value the user gave a field.
    fn field(&self, kind: u8, key: &str) -> Option<&str> {
        self.fields.iter().rev().find(|f| f.kind == kind && f.key == key).map(|f| f.value.as_str())
    }

    fn field_or<'a>(&'a self, kind: u8, key: &str, default: &'a str) -> &'a str {
        self.field(kind, key).unwrap_or(default)
    }
}

/// The strings of a structure, each with its number.
#[derive(Default)]
struct Strings<'a>(Vec<&'a str>);

impl<'a> Strings<'a> {
    /// The number of `text`; 0 for none.
    fn add(&mut self, text: impl Into<Option<&'a str>>) -> u8 {
        let Some(text) = text.into() else { return 0 };
        self.0.push(text);
        self.0.len() as u8
    }
}

/// Offset of the address in the entry point, which is 0 for firmware to fill in.
const ADDRESS: usize = 16;

/// The structures.
pub fn tables(c: &Config) -> Vec<u8> {
    let mut t = Tables::default();
    bios(&mut t, c);
    system(&mut t, c);
    base_board(&mut t, c);
    chassis(&mut t, c);
    (0..c.sockets).for_each(|i| processor(&mut t, c, i));
    oem_strings(&mut t, c);
    memory(&mut t, c);
    // Boot information (§7.33): no errors detected.
    t.add(32, &[0; 7], &[]);
    t.add(127, &[], &[]);
    t.bytes
}

/// The entry point for `len` bytes of structures at `address`.
pub fn anchor(len: usize, address: u64) -> [u8; ANCHOR_LEN] {
    let mut a = [0; ANCHOR_LEN];
    a[..5].copy_from_slice(b"_SM3_");
    // Length, version 3.7, document revision 0, entry point revision 1.
    a[6..11].copy_from_slice(&[ANCHOR_LEN as u8, 3, 7, 0, 1]);
    a[12..16].copy_from_slice(&(len as u32).to_le_bytes());
    a[ADDRESS..].copy_from_slice(&address.to_le_bytes());
    a[5] = super::acpi::table::checksum(&a);
    a
}

#[derive(Default)]
struct Tables {
    bytes: Vec<u8>,
    handle: u16,
}

impl Tables {
    /// Appends a structure (§6.1.2) and returns its handle. `body` follows the header and
    /// counts its strings from 1.
    fn add(&mut self, kind: u8, body: &[u8], strings: &[&str]) -> u16 {
        let handle = self.handle;
        self.handle += 1;
        self.bytes.extend([kind, 4 + body.len() as u8]);
        self.bytes.extend(handle.to_le_bytes());
        self.bytes.extend(body);
        for s in strings {
            // An empty string would end the list.
            let text = if s.is_empty() { "-" } else { s };
            self.bytes.extend(text.bytes().filter(|b| *b != 0));
            self.bytes.push(0);
        }
        if strings.is_empty() {
            self.bytes.push(0);
        }
        self.bytes.push(0);
        handle
    }
}

const MAKER: &str = "Mimus";

fn bios(t: &mut Tables, c: &Config) {
    let mut s = Strings::default();
    let (vendor, version) = (s.add(c.field_or(0, "vendor", MAKER)), s.add(c.field_or(0, "version", &c.version)));
    let date = s.add(c.field_or(0, "date", "01/01/2026"));
    let release = c.field(0, "release").and_then(parse_release).unwrap_or([0xff; 2]);
    let uefi = if c.field(0, "uefi") == Some("on") { 1 << 3 } else { 0 };
    // Start segment, size; characteristics "not supported" (bit 3); extension bytes: ACPI (0), virtual machine (1: bit
    // 4) and UEFI (bit 3); no embedded controller.
    let mut body = vec![vendor, version, 0, 0xe8, date, 0];
    body.extend((1u64 << 3).to_le_bytes());
    body.extend([1, 1 << 4 | uefi, release[0], release[1], 0xff, 0xff, 0, 0]);
    t.add(0, &body, &s.0);
}

fn system(t: &mut Tables, c: &Config) {
    let mut s = Strings::default();
    let (maker, product) = (s.add(c.field_or(1, "manufacturer", MAKER)), s.add(c.field_or(1, "product", &c.product)));
    let (version, serial) = (s.add(c.field_or(1, "version", &c.version)), s.add(c.field(1, "serial")));
    let (sku, family) = (s.add(c.field(1, "sku")), s.add(c.field_or(1, "family", "Virtual Machine")));
    let mut body = vec![maker, product, version, serial];
    // The first three fields of a UUID are little-endian here (§7.2.1).
    let u = c.field(1, "uuid").and_then(parse_uuid).unwrap_or(c.uuid);
    body.extend([u[3], u[2], u[1], u[0], u[5], u[4], u[7], u[6]]);
    body.extend(&u[8..]);
    // Wake-up by the power switch.
    body.extend([6, sku, family]);
    t.add(1, &body, &s.0);
}

/// Base board (§7.3), if the user says anything of it.
fn base_board(t: &mut Tables, c: &Config) {
    if !c.fields.iter().any(|f| f.kind == 2) {
        return;
    }
    let mut s = Strings::default();
    let (maker, product) = (s.add(c.field_or(2, "manufacturer", MAKER)), s.add(c.field_or(2, "product", &c.product)));
    let (version, serial) = (s.add(c.field_or(2, "version", &c.version)), s.add(c.field(2, "serial")));
    let (asset, location) = (s.add(c.field(2, "asset")), s.add(c.field(2, "location")));
    // A hosting board in the chassis, which comes next; a motherboard that contains nothing else.
    let mut body = vec![maker, product, version, serial, asset, 1, location];
    body.extend((t.handle + 1).to_le_bytes());
    body.extend([0x0a, 0]);
    t.add(2, &body, &s.0);
}

fn chassis(t: &mut Tables, c: &Config) {
    let mut s = Strings::default();
    let maker = s.add(c.field_or(3, "manufacturer", MAKER));
    let (version, serial) = (s.add(c.field(3, "version")), s.add(c.field(3, "serial")));
    let (asset, sku) = (s.add(c.field(3, "asset")), s.add(c.field(3, "sku")));
    // Type "other"; states safe; security none; no OEM data, height, cords, elements.
    let body = [maker, 1, version, serial, asset, 3, 3, 3, 3, 0, 0, 0, 0, 0, 0, 0, 0, sku];
    t.add(3, &body, &s.0);
}

fn processor(t: &mut Tables, c: &Config, index: u16) {
    let socket = format!("{}{index}", c.field_or(4, "sock_pfx", "CPU "));
    let mut s = Strings::default();
    let (socket, maker) = (s.add(socket.as_str()), s.add(c.field_or(4, "manufacturer", MAKER)));
    let (version, serial) = (s.add(c.field_or(4, "version", &c.version)), s.add(c.field(4, "serial")));
    let (asset, part) = (s.add(c.field(4, "asset")), s.add(c.field(4, "part")));
    // Socket, central processor, family "other" (1: unknown is 2), maker, id.
    let mut body = vec![socket, 3, 1, maker];
    body.extend(c.cpuid.0.to_le_bytes());
    body.extend(c.cpuid.1.to_le_bytes());
    // Version; voltage and clocks unknown; enabled; other upgrade; no caches.
    body.extend([version, 0, 0, 0, 0, 0, 0, 0, 0x41, 1]);
    body.extend([0xff; 6]);
    body.extend([serial, asset, part]);
    let short = |n: u16| u8::try_from(n).unwrap_or(0xff);
    body.extend([short(c.cores), short(c.cores), short(c.threads)]);
    // Characteristics: 64-bit capable, multi-core; family 2; counts again, in 16 bits.
    body.extend((1u16 << 2 | 1 << 3).to_le_bytes());
    body.extend(1u16.to_le_bytes());
    for n in [c.cores, c.cores, c.threads] {
        body.extend(n.to_le_bytes());
    }
    t.add(4, &body, &s.0);
}

/// The user's strings (§7.12).
fn oem_strings(t: &mut Tables, c: &Config) {
    let strings: Vec<&str> = c.fields.iter().filter(|f| f.kind == 11).map(|f| f.value.as_str()).collect();
    for part in strings.chunks(usize::from(u8::MAX)) {
        t.add(11, &[part.len() as u8], part);
    }
}

/// Largest memory device: sizes in MiB have 15 bits in the first field (§7.18.4).
const DEVICE_MAX: u64 = 16 << 30;

fn memory(t: &mut Tables, c: &Config) {
    let m = c.memory;
    let total = m.low + m.high;
    let devices = total.div_ceil(DEVICE_MAX).max(1);
    // System board, system memory, multi-bit ECC; capacity in KiB, or in the long field.
    let mut body = vec![3, 3, 6];
    let kib = u32::try_from(total >> 10).ok().filter(|k| *k < 1 << 31);
    body.extend(kib.unwrap_or(1 << 31).to_le_bytes());
    body.extend(0xfffeu16.to_le_bytes());
    body.extend((devices as u16).to_le_bytes());
    body.extend(if kib.is_some() { 0 } else { total }.to_le_bytes());
    let array = t.add(16, &body, &[]);
    for i in 0..devices {
        let size = (total - i * DEVICE_MAX).min(DEVICE_MAX);
        memory_device(t, c, array, i, size);
    }
    mapped(t, array, 0, m.low);
    mapped(t, array, 1 << 32, m.high);
}

fn memory_device(t: &mut Tables, c: &Config, array: u16, index: u64, size: u64) {
    let slot = format!("{}{index}", c.field_or(17, "loc_pfx", "DIMM "));
    let mut s = Strings::default();
    let (slot, maker) = (s.add(slot.as_str()), s.add(c.field_or(17, "manufacturer", MAKER)));
    let (serial, asset) = (s.add(c.field(17, "serial")), s.add(c.field(17, "asset")));
    let part = s.add(c.field(17, "part"));
    let mut body = array.to_le_bytes().to_vec();
    body.extend(0xfffeu16.to_le_bytes());
    // Widths unknown.
    body.extend([0xff; 4]);
    body.extend(((size >> 20) as u16).to_le_bytes());
    // DIMM, no set, slot, no bank, RAM, other detail, no speed.
    body.extend([9, 0, slot, 0, 7, 2, 0, 0, 0, maker, serial, asset, part, 0]);
    body.extend([0; 12]);
    t.add(17, &body, &s.0);
}

/// Memory array mapped address (§7.20).
fn mapped(t: &mut Tables, array: u16, base: u64, len: u64) {
    if len == 0 {
        return;
    }
    let last = base + len - 1;
    let short = last >> 10 < u64::from(u32::MAX);
    let mut body = Vec::new();
    let kib = |v: u64| if short { (v >> 10) as u32 } else { u32::MAX };
    body.extend(kib(base).to_le_bytes());
    body.extend(kib(last).to_le_bytes());
    body.extend(array.to_le_bytes());
    body.push(1);
    let long = if short { [0, 0] } else { [base, last] };
    body.extend(long.iter().flat_map(|v| v.to_le_bytes()));
    t.add(19, &body, &[]);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config() -> Config {
        Config {
            product: "q35".into(),
            version: "0.1.0".into(),
            uuid: *b"\x01\x23\x45\x67\x89\xab\xcd\xef\x01\x23\x45\x67\x89\xab\xcd\xef",
            sockets: 2,
            cores: 2,
            threads: 4,
            cpuid: (0x663, 0x78b_fbff),
            memory: Memory { low: 2 << 30, high: 38 << 30 },
            fields: Vec::new(),
        }
    }

    /// Structures as a system parses them: type, formatted part, strings.
    fn parse(mut bytes: &[u8]) -> Vec<(u8, Vec<u8>, Vec<String>)> {
        let mut out = Vec::new();
        while !bytes.is_empty() {
            let len = bytes[1] as usize;
            let (head, rest) = bytes.split_at(len);
            let end = rest.windows(2).position(|w| w == [0, 0]).unwrap();
            let strings = rest[..end].split(|b| *b == 0).filter(|s| !s.is_empty());
            out.push((head[0], head.to_vec(), strings.map(|s| String::from_utf8(s.to_vec()).unwrap()).collect()));
            bytes = &rest[end + 2..];
        }
        out
    }

    #[test]
    fn structures() {
        let all = parse(&tables(&config()));
        let kinds: Vec<u8> = all.iter().map(|s| s.0).collect();
        assert_eq!(kinds, [0, 1, 3, 4, 4, 16, 17, 17, 17, 19, 19, 32, 127]);
        for (i, s) in all.iter().enumerate() {
            assert_eq!(u16::from_le_bytes([s.1[2], s.1[3]]), i as u16);
        }
        // Lengths the specification gives (§7.1, 7.2, 7.4, 7.5, 7.17, 7.18, 7.20).
        let lens: Vec<usize> = all.iter().map(|s| s.1.len()).collect();
        assert_eq!(lens, [0x1a, 0x1b, 0x16, 0x30, 0x30, 0x17, 0x28, 0x28, 0x28, 0x1f, 0x1f, 0x0b, 4]);
        assert_eq!(all[1].2, ["Mimus", "q35", "0.1.0", "Virtual Machine"]);
        assert_eq!(all[1].1[8..16], [0x67, 0x45, 0x23, 0x01, 0xab, 0x89, 0xef, 0xcd]);
        let sizes: Vec<u16> = all[6..9].iter().map(|s| u16::from_le_bytes([s.1[12], s.1[13]])).collect();
        assert_eq!(sizes, [16384, 16384, 8192]);
        assert_eq!(all[4].2[0], "CPU 1");
    }

    #[test]
    fn fields_the_user_sets() {
        let parse_fields = |t: &str| crate::config::firmware::parse_smbios(t).unwrap();
        let texts = [
            "type=0,vendor=V,release=4.2,uefi=on",
            "type=1,serial=S1,sku=K,uuid=00112233-4455-6677-8899-aabbccddeeff",
            "type=2,asset=A2",
            "type=3,serial=S3",
            "type=4,sock_pfx=Socket ,part=P",
            "type=11,value=io.systemd.credential:x=y,value=second",
            "type=17,serial=S17",
        ];
        let fields = texts.into_iter().flat_map(parse_fields).collect();
        let all = parse(&tables(&Config { fields, ..config() }));
        let of = |kind: u8| all.iter().find(|s| s.0 == kind).unwrap();
        assert_eq!((of(0).2[0].as_str(), &of(0).1[0x13..0x16]), ("V", &[0x18, 4, 2][..]));
        let system = of(1);
        assert_eq!(system.2, ["Mimus", "q35", "0.1.0", "S1", "K", "Virtual Machine"]);
        assert_eq!((system.1[7], system.1[0x19], system.1[0x1a]), (4, 5, 6));
        assert_eq!(system.1[8..16], [0x33, 0x22, 0x11, 0, 0x55, 0x44, 0x77, 0x66]);
        let (board, case) = (of(2), of(3));
        assert_eq!((board.1.len(), board.1[8], &board.1[11..13]), (15, 4, &case.1[2..4]));
        assert_eq!((case.1[7], case.2[1].as_str()), (2, "S3"));
        assert_eq!((of(4).2[0].as_str(), of(4).1[0x22]), ("Socket 0", 4));
        assert_eq!(
            (of(11).1[4], &of(11).2[..]),
            (2, &["io.systemd.credential:x=y".to_owned(), "second".to_owned()][..])
        );
        assert_eq!((of(17).1[0x18], of(17).2[2].as_str()), (3, "S17"));
    }

    #[test]
    fn terabytes_use_the_long_fields() {
        let memory = Memory { low: 2 << 30, high: 5 << 40 };
        let all = parse(&tables(&Config { memory, ..config() }));
        let mapped = all.iter().filter(|s| s.0 == 19).nth(1).unwrap();
        assert_eq!(mapped.1[4..8], [0xff; 4]);
        assert_eq!(u64::from_le_bytes(mapped.1[15..23].try_into().unwrap()), 1 << 32);
    }

    #[test]
    fn entry_point() {
        let a = anchor(700, 0xf_1234);
        assert_eq!(super::super::acpi::table::checksum(&a), 0);
        assert_eq!((&a[..5], a[6], u64::from_le_bytes(a[16..].try_into().unwrap())), (&b"_SM3_"[..], 24, 0xf_1234));
    }
}
