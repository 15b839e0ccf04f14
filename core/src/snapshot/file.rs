//! The snapshot file: header, text entries, device states, RAM.
//!
//! All numbers are little-endian. After the 16-byte header (magic, container version,
//! flags) follow sections: tag (4 bytes), reserved (4), length of the body (8), body.
//!
//! | Tag    | Body |
//! |--------|------|
//! | `META` | producer version, machine, configuration: pairs of strings, MessagePack |
//! | `TREE` | device states: path → (schema, version, body), MessagePack |
//! | `RAM ` | block name, block length, then runs: page number, page count, the pages; a run of 0 pages ends |
//! | `END ` | empty |
//!
//! Pages of zeros are left out. A reader takes nothing on trust: lengths are bounded
//! before anything is allocated, names and sizes are compared with the machine, a
//! section that is cut short or too long is an error.

use super::payload::{Payload, StateTree};
use super::schema::SnapshotError;
use crate::memory::{GuestRam, PAGE_SIZE, RamBlock};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::io::{Read, Seek, SeekFrom, Write};
use std::sync::Arc;

/// First bytes of a snapshot.
const MAGIC: [u8; 8] = *b"MIMUSNAP";
/// Version of the container, not of any state in it.
const CONTAINER_VERSION: u32 = 1;
/// Longest META or TREE section: far above any machine, far below what would hurt.
const MAX_SECTION: u64 = 256 << 20;
/// Most objects, longest name.
const MAX_OBJECTS: usize = 1 << 16;
const MAX_NAME: usize = 4096;

type Meta = BTreeMap<String, String>;

/// What is in a snapshot besides RAM.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SnapshotContents {
    /// Producer, machine name and version, configuration: what must match before the
    /// states are looked at.
    pub meta: Meta,
    /// The states of all objects.
    pub tree: StateTree,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct SavedObject {
    path: String,
    schema: String,
    version: u32,
    #[serde(with = "bytes")]
    body: Vec<u8>,
}

/// MessagePack `bin`, not an array of numbers.
mod bytes {
    use serde::de::{Error, Visitor};
    use serde::{Deserializer, Serializer};

    pub fn serialize<S: Serializer>(v: &[u8], s: S) -> Result<S::Ok, S::Error> {
        s.serialize_bytes(v)
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(d: D) -> Result<Vec<u8>, D::Error> {
        struct Bytes;
        impl Visitor<'_> for Bytes {
            type Value = Vec<u8>;
            fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str("bytes")
            }
            fn visit_bytes<E: Error>(self, v: &[u8]) -> Result<Vec<u8>, E> {
                Ok(v.to_vec())
            }
            fn visit_byte_buf<E: Error>(self, v: Vec<u8>) -> Result<Vec<u8>, E> {
                Ok(v)
            }
        }
        d.deserialize_byte_buf(Bytes)
    }
}

fn damaged(what: impl Into<String>) -> SnapshotError {
    SnapshotError::Damaged(what.into())
}

fn encoded<T: Serialize>(what: &str, value: &T) -> Result<Vec<u8>, SnapshotError> {
    rmp_serde::to_vec_named(value).map_err(|e| SnapshotError::Encode { schema: what.to_owned(), reason: e.to_string() })
}

/// Writes a snapshot: contents, all RAM blocks, end.
pub fn write_snapshot<W: Write + Seek>(
    out: &mut W,
    contents: &SnapshotContents,
    ram: &GuestRam,
) -> Result<(), SnapshotError> {
    out.write_all(&MAGIC)?;
    out.write_all(&CONTAINER_VERSION.to_le_bytes())?;
    out.write_all(&0u32.to_le_bytes())?;
    write_section(out, b"META", &encoded("meta", &contents.meta)?)?;
    let objects: Vec<_> = contents.tree.iter().map(saved).collect();
    write_section(out, b"TREE", &encoded("tree", &objects)?)?;
    for block in ram.blocks() {
        write_ram(out, &block)?;
    }
    write_section(out, b"END ", &[])?;
    out.flush()?;
    Ok(())
}

fn saved((path, p): (&str, &Payload)) -> SavedObject {
    let (path, schema) = (path.to_owned(), p.schema.clone());
    SavedObject { path, schema, version: p.version, body: p.body.clone() }
}

fn write_header<W: Write>(out: &mut W, tag: &[u8; 4], len: u64) -> Result<(), SnapshotError> {
    out.write_all(tag)?;
    out.write_all(&0u32.to_le_bytes())?;
    out.write_all(&len.to_le_bytes())?;
    Ok(())
}

fn write_section<W: Write>(out: &mut W, tag: &[u8; 4], body: &[u8]) -> Result<(), SnapshotError> {
    write_header(out, tag, body.len() as u64)?;
    out.write_all(body)?;
    Ok(())
}

fn write_ram<W: Write + Seek>(out: &mut W, block: &Arc<RamBlock>) -> Result<(), SnapshotError> {
    let start = out.stream_position()?;
    write_header(out, b"RAM ", 0)?;
    out.write_all(&(block.name().len() as u64).to_le_bytes())?;
    out.write_all(block.name().as_bytes())?;
    out.write_all(&block.len().to_le_bytes())?;
    let mut page = 0;
    while page < block.page_count() {
        let first = page;
        while page < block.page_count() && page - first < 256 && !block.page_is_zero(page) {
            page += 1;
        }
        if page > first {
            write_run(out, block, first, page - first)?;
        } else {
            page += 1;
        }
    }
    out.write_all(&[0; 16])?;
    let end = out.stream_position()?;
    out.seek(SeekFrom::Start(start))?;
    write_header(out, b"RAM ", end - start - 16)?;
    out.seek(SeekFrom::Start(end))?;
    Ok(())
}

fn write_run<W: Write>(out: &mut W, block: &RamBlock, first: u64, count: u64) -> Result<(), SnapshotError> {
    let mut data = vec![0; (count * PAGE_SIZE) as usize];
    if !block.read(first * PAGE_SIZE, &mut data) {
        return Err(damaged(format!("RAM block {} changed size", block.name())));
    }
    out.write_all(&first.to_le_bytes())?;
    out.write_all(&count.to_le_bytes())?;
    out.write_all(&data)?;
    Ok(())
}

/// A section's body: never reads past its end.
struct Body<'a, R> {
    inner: &'a mut R,
    left: u64,
    what: &'static str,
}

impl<R: Read> Body<'_, R> {
    fn bytes(&mut self, buf: &mut [u8]) -> Result<(), SnapshotError> {
        let len = buf.len() as u64;
        if len > self.left {
            return Err(damaged(format!("the {} section is too short", self.what)));
        }
        self.inner.read_exact(buf).map_err(cut_short)?;
        self.left -= len;
        Ok(())
    }

    fn number(&mut self) -> Result<u64, SnapshotError> {
        let mut b = [0; 8];
        self.bytes(&mut b)?;
        Ok(u64::from_le_bytes(b))
    }

    /// All that is left; its length was bounded by the caller. Grows with what is there,
    /// not with what the header claims.
    fn rest(&mut self) -> Result<Vec<u8>, SnapshotError> {
        let mut out = Vec::new();
        let n = self.inner.by_ref().take(self.left).read_to_end(&mut out)?;
        if n as u64 != self.left {
            return Err(damaged("the file is cut short"));
        }
        self.left = 0;
        Ok(out)
    }

    fn end(&self) -> Result<(), SnapshotError> {
        if self.left == 0 { Ok(()) } else { Err(damaged(format!("the {} section is too long", self.what))) }
    }
}

fn cut_short(e: std::io::Error) -> SnapshotError {
    match e.kind() {
        std::io::ErrorKind::UnexpectedEof => damaged("the file is cut short"),
        _ => SnapshotError::Io(e),
    }
}

/// Reads a snapshot. `check` sees the META entries before anything is changed and may
/// refuse; then RAM is loaded into the blocks of `ram`, all of which must be there.
/// Blocks start from zero. The states are returned for the machine to hand out.
pub fn read_snapshot<R: Read>(
    input: &mut R,
    ram: &GuestRam,
    check: impl FnOnce(&Meta) -> Result<(), SnapshotError>,
) -> Result<SnapshotContents, SnapshotError> {
    read_file_header(input)?;
    let meta: Meta = decode("META", &read_small(input, b"META", "META")?)?;
    if !meta.iter().all(|(key, value)| is_name(key) && is_name(value)) {
        return Err(damaged("a text in the META section is too long, or not printable"));
    }
    check(&meta)?;
    let tree = read_tree(&read_small(input, b"TREE", "TREE")?)?;
    let mut missing = ram.blocks();
    loop {
        let (tag, left) = read_section_header(input)?;
        let mut body = Body { inner: &mut *input, left, what: "RAM" };
        match &tag {
            b"END " => break body.end()?,
            b"RAM " => read_ram(&mut body, &mut missing)?,
            _ => {
                return Err(damaged(format!("unknown section {:?}", String::from_utf8_lossy(&tag))));
            }
        }
    }
    match missing.first() {
        Some(block) => Err(damaged(format!("RAM block {} is missing", block.name()))),
        None => Ok(SnapshotContents { meta, tree }),
    }
}

fn read_file_header<R: Read>(input: &mut R) -> Result<(), SnapshotError> {
    let mut h = [0; 16];
    input.read_exact(&mut h).map_err(cut_short)?;
    let version = u32::from_le_bytes([h[8], h[9], h[10], h[11]]);
    if h[..8] != MAGIC {
        return Err(SnapshotError::NotASnapshot("the file is not a mimus snapshot".to_owned()));
    }
    if version != CONTAINER_VERSION {
        let text = format!("the snapshot has container version {version}; this program reads {CONTAINER_VERSION}");
        return Err(SnapshotError::NotASnapshot(text));
    }
    if h[12..] != [0; 4] {
        return Err(damaged("unknown flags in the header"));
    }
    Ok(())
}

fn read_section_header<R: Read>(input: &mut R) -> Result<([u8; 4], u64), SnapshotError> {
    let mut h = [0; 16];
    input.read_exact(&mut h).map_err(cut_short)?;
    let (tag, rest) = h.split_at(4);
    let mut len = [0; 8];
    len.copy_from_slice(&rest[4..]);
    if rest[..4] != [0; 4] {
        return Err(damaged("a section's reserved field is not zero"));
    }
    Ok(([tag[0], tag[1], tag[2], tag[3]], u64::from_le_bytes(len)))
}

fn read_small<R: Read>(input: &mut R, want: &[u8; 4], what: &'static str) -> Result<Vec<u8>, SnapshotError> {
    let (tag, left) = read_section_header(input)?;
    if tag != *want {
        return Err(damaged(format!("the {what} section is missing")));
    }
    if left > MAX_SECTION {
        return Err(damaged(format!("the {what} section claims {left} bytes")));
    }
    Body { inner: input, left, what }.rest()
}

fn decode<T: serde::de::DeserializeOwned>(what: &str, bytes: &[u8]) -> Result<T, SnapshotError> {
    Payload { schema: what.to_owned(), version: 0, body: bytes.to_vec() }.decode().map_err(|e| damaged(e.to_string()))
}

/// Names are shown in errors.
fn is_name(text: &str) -> bool {
    text.len() <= MAX_NAME && !text.chars().any(char::is_control)
}

fn read_tree(bytes: &[u8]) -> Result<StateTree, SnapshotError> {
    let objects: Vec<SavedObject> = decode("TREE", bytes)?;
    if objects.len() > MAX_OBJECTS {
        return Err(damaged(format!("{} objects", objects.len())));
    }
    let mut tree = StateTree::new();
    for o in objects {
        if !is_name(&o.path) || !is_name(&o.schema) {
            return Err(damaged("a name is too long, or not printable"));
        }
        tree.insert(&o.path, Payload { schema: o.schema, version: o.version, body: o.body })?;
    }
    Ok(tree)
}

fn read_ram<R: Read>(body: &mut Body<'_, R>, missing: &mut Vec<Arc<RamBlock>>) -> Result<(), SnapshotError> {
    let name_len = body.number()?;
    let mut name =
        vec![
            0;
            usize::try_from(name_len).ok().filter(|&n| n <= MAX_NAME).ok_or_else(|| damaged("a name is too long"))?
        ];
    body.bytes(&mut name)?;
    let name = String::from_utf8(name).map_err(|_| damaged("a RAM block's name is not UTF-8"))?;
    let at = missing.iter().position(|b| b.name() == name);
    let block = at.map(|i| missing.remove(i));
    let block = block.ok_or_else(|| damaged(format!("RAM block {name:?} is not in this machine, or comes twice")))?;
    let len = body.number()?;
    if len != block.len() {
        let text = format!("RAM block {name} has {len:#x} bytes in the snapshot, {:#x} in this machine", block.len());
        return Err(damaged(text));
    }
    if !block.discard(0, block.len()) {
        let _ = block.fill(0, block.len(), 0);
    }
    let mut page = [0; PAGE_SIZE as usize];
    let mut next = 0;
    loop {
        let (first, count) = (body.number()?, body.number()?);
        if count == 0 {
            return body.end();
        }
        let end = first.checked_add(count).filter(|&e| first >= next && e <= block.page_count());
        next = end.ok_or_else(|| damaged(format!("RAM block {name}: pages out of order or out of range")))?;
        for p in first..next {
            body.bytes(&mut page)?;
            if !block.write(p * PAGE_SIZE, &page) {
                return Err(damaged(format!("RAM block {name}: pages out of range")));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::RamBacking;
    use crate::snapshot::Schema;
    use std::io::Cursor;

    fn ram() -> Arc<GuestRam> {
        let ram = GuestRam::new();
        ram.add_block("ram", 0x20_0000, RamBacking::Private).unwrap();
        ram.add_block("rom", 0x1000, RamBacking::Private).unwrap();
        ram
    }

    fn sample() -> (SnapshotContents, Vec<u8>) {
        let ram = ram();
        let block = ram.block("ram").unwrap();
        assert!(block.write(0x1ff0, b"across two pages and some more text"));
        assert!(block.store(0x1f_fff8, 7u64));
        let mut c = SnapshotContents::default();
        c.meta.insert("machine".into(), "virt".into());
        let payload = Payload::encode(Schema::new("uart", 1), &(1u8, "x")).unwrap();
        c.tree.insert("/machine/uart", payload).unwrap();
        let mut out = Cursor::new(Vec::new());
        write_snapshot(&mut out, &c, &ram).unwrap();
        (c, out.into_inner())
    }

    fn read(bytes: &[u8], ram: &GuestRam) -> Result<SnapshotContents, SnapshotError> {
        read_snapshot(&mut &bytes[..], ram, |_| Ok(()))
    }

    #[test]
    fn round_trip() {
        let (contents, bytes) = sample();
        assert!(bytes.len() < 0x6000, "zero pages are left out: {:#x}", bytes.len());
        let ram = ram();
        let block = ram.block("ram").unwrap();
        assert!(block.fill(0x10_0000, 0x3000, 0xaa));
        assert_eq!(read(&bytes, &ram).unwrap(), contents);
        let mut text = [0; 6];
        assert!(block.read(0x1ff0, &mut text));
        assert_eq!(&text, b"across");
        assert_eq!(block.load::<u64>(0x1f_fff8), Some(7));
        assert!(block.page_is_zero(0x100), "old contents are gone");
        let refuse = |_: &Meta| Err(damaged("other machine"));
        assert!(read_snapshot(&mut &bytes[..], &ram, refuse).is_err());
    }

    #[test]
    fn other_machines_are_refused() {
        let (_, bytes) = sample();
        let small = GuestRam::new();
        small.add_block("ram", 0x1000, RamBacking::Private).unwrap();
        assert!(read(&bytes, &small).unwrap_err().to_string().contains("in this machine"));
        let more = ram();
        more.add_block("video", 0x1000, RamBacking::Private).unwrap();
        assert!(read(&bytes, &more).unwrap_err().to_string().contains("video is missing"));
        assert!(read(b"not a snapshot at all", &more).unwrap_err().to_string().contains("not a mimus"));
    }

    #[test]
    fn names_fit_a_terminal() {
        let ram = ram();
        let refused = |c: &SnapshotContents| {
            let mut out = Cursor::new(Vec::new());
            write_snapshot(&mut out, c, &ram).unwrap();
            let error = read(&out.into_inner(), &ram).unwrap_err().to_string();
            assert!(error.contains("not printable") && !error.chars().any(char::is_control), "{error:?}");
        };
        let mut c = SnapshotContents::default();
        c.meta.insert("machine".into(), "vi\nrt".into());
        refused(&c);
        let payload = |name: &str| Payload { schema: name.into(), version: 1, body: vec![0xc0] };
        for (path, schema) in [("/a\x1b[2J", "uart"), ("/a", "u\nart")] {
            let mut c = SnapshotContents::default();
            c.tree.insert(path, payload(schema)).unwrap();
            refused(&c);
        }
    }

    #[test]
    fn damage_never_panics_or_allocates() {
        let (_, bytes) = sample();
        let ram = ram();
        for cut in (0..bytes.len()).step_by(97).chain(0..200) {
            assert!(read(&bytes[..cut], &ram).is_err(), "cut at {cut}");
        }
        // Every byte of the headers and states, and a sample of the rest.
        let mut rng = 0x9e37_79b9_7f4a_7c15u64;
        for i in (0..400).chain((400..bytes.len()).step_by(211)) {
            rng = rng.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            let mut bad = bytes.clone();
            bad[i] ^= (rng >> 56) as u8 | 1;
            let _ = read(&bad, &ram);
        }
        let mut claim = bytes[..16].to_vec();
        claim.extend(b"META\0\0\0\0");
        claim.extend((MAX_SECTION).to_le_bytes());
        assert!(read(&claim, &ram).unwrap_err().to_string().contains("cut short"));
    }
}
