//! The file: header and sections.

use std::io::{self, Read, Write};

use mimus_core::accel::{TraceKinds, TracedCode};
use serde::{Deserialize, Serialize};

const MAGIC: &[u8; 8] = b"MIMUSTRC";
const VERSION: u32 = 2;
/// No section is longer.
const MAX_SECTION: u32 = 64 << 20;

/// Why a trace cannot be written or read.
#[derive(Debug, thiserror::Error)]
pub enum TraceError {
    /// The file system's word.
    #[error("{0}")]
    Io(#[from] io::Error),
    /// It is no trace, or another version's.
    #[error("{0}")]
    Format(String),
    /// Its end is missing.
    #[error("the trace breaks off")]
    BreaksOff,
    /// It contradicts itself.
    #[error("the trace is damaged: {0}")]
    Damaged(&'static str),
}

/// What a trace begins with.
#[derive(Clone, Debug, Serialize, Deserialize, PartialEq, Eq)]
pub struct Header {
    /// The format's version.
    pub version: u32,
    /// The guest, as `-system` names it.
    pub guest: String,
    /// What is in it beside code.
    pub memory: bool,
    pub exceptions: bool,
    pub devices: bool,
    /// The filters it was made with, in words.
    pub filter: String,
}

impl Header {
    /// A header of this version.
    pub fn new(guest: &str, kinds: TraceKinds, filter: String) -> Header {
        let TraceKinds { memory, exceptions, devices } = kinds;
        Header { version: VERSION, guest: guest.to_owned(), memory, exceptions, devices, filter }
    }
}

/// A number's code.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Code {
    pub id: u32,
    /// Offset in its page.
    pub offset: u16,
    /// x86: size in bits that it is decoded for; 0 elsewhere.
    pub bits: u8,
    pub bytes: Vec<u8>,
    /// Lengths of its instructions.
    pub lengths: Vec<u8>,
}

impl From<TracedCode<'_>> for Code {
    fn from(code: TracedCode<'_>) -> Code {
        let TracedCode { id, offset, bytes, lengths, bits } = code;
        Code { id, offset, bits, bytes: bytes.to_vec(), lengths: lengths.to_vec() }
    }
}

/// A piece of the file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Section {
    Code(Code),
    /// A stretch of a vCPU's trace, handed over at time `now` (ns).
    Chunk {
        vcpu: u32,
        now: u64,
        count: u64,
        words: Vec<u8>,
        args: Vec<u8>,
    },
    /// The end: words of all stretches.
    End {
        count: u64,
    },
}

/// Writes the header.
pub fn write_header(out: &mut impl Write, header: &Header) -> Result<(), TraceError> {
    let json = serde_json::to_vec(header).map_err(|e| TraceError::Format(e.to_string()))?;
    out.write_all(MAGIC)?;
    out.write_all(&(json.len() as u32).to_le_bytes())?;
    Ok(out.write_all(&json)?)
}

/// Reads the header.
pub fn read_header(input: &mut impl Read) -> Result<Header, TraceError> {
    let not = || TraceError::Format("this is no trace of mimus".to_owned());
    let mut magic = [0; 8];
    input.read_exact(&mut magic).map_err(|_| not())?;
    if magic != *MAGIC {
        return Err(not());
    }
    let json = read_bytes(input, 1 << 16)?;
    let header: Header = serde_json::from_slice(&json).map_err(|_| TraceError::Damaged("its header"))?;
    if header.version != VERSION {
        let text = format!("the trace has format {}, this mimus reads {VERSION}: make it again", header.version);
        return Err(TraceError::Format(text));
    }
    Ok(header)
}

fn read_bytes(input: &mut impl Read, most: u32) -> Result<Vec<u8>, TraceError> {
    let mut len = [0; 4];
    input.read_exact(&mut len).map_err(|_| TraceError::BreaksOff)?;
    let len = u32::from_le_bytes(len);
    if len > most {
        return Err(TraceError::Damaged("a length is out of range"));
    }
    let mut bytes = Vec::new();
    if input.take(len.into()).read_to_end(&mut bytes)? != len as usize {
        return Err(TraceError::BreaksOff);
    }
    Ok(bytes)
}

impl Section {
    /// Writes it; gives the number of bytes.
    pub fn write(&self, out: &mut impl Write) -> Result<u64, TraceError> {
        let mut body = Vec::new();
        let tag = match self {
            Section::Code(code) => {
                body.extend(code.id.to_le_bytes());
                body.extend(code.offset.to_le_bytes());
                body.push(code.bits);
                body.extend((code.lengths.len() as u16).to_le_bytes());
                body.extend(&code.lengths);
                body.extend(&code.bytes);
                b'D'
            }
            Section::Chunk { vcpu, now, count, words, args } => {
                body.extend(vcpu.to_le_bytes());
                body.extend(now.to_le_bytes());
                body.extend(count.to_le_bytes());
                body.extend((words.len() as u32).to_le_bytes());
                body.extend(words);
                body.extend(args);
                b'C'
            }
            Section::End { count } => {
                body.extend(count.to_le_bytes());
                b'E'
            }
        };
        out.write_all(&[tag])?;
        out.write_all(&(body.len() as u32).to_le_bytes())?;
        out.write_all(&body)?;
        Ok(body.len() as u64 + 5)
    }

    /// Reads one; `None` at the file's end.
    pub fn read(input: &mut impl Read) -> Result<Option<Section>, TraceError> {
        let mut tag = [0];
        if input.read(&mut tag)? == 0 {
            return Ok(None);
        }
        let body = read_bytes(input, MAX_SECTION)?;
        let mut parts = Parts(&body);
        let section = match tag[0] {
            b'D' => {
                let (id, offset, bits) = (parts.number(4)? as u32, parts.number(2)? as u16, parts.number(1)? as u8);
                let n = parts.number(2)? as usize;
                let lengths = parts.take(n)?.to_vec();
                Section::Code(Code { id, offset, bits, lengths, bytes: parts.0.to_vec() })
            }
            b'C' => {
                let (vcpu, now, count) = (parts.number(4)? as u32, parts.number(8)?, parts.number(8)?);
                let n = parts.number(4)? as usize;
                let words = parts.take(n)?.to_vec();
                Section::Chunk { vcpu, now, count, words, args: parts.0.to_vec() }
            }
            b'E' => Section::End { count: parts.number(8)? },
            _ => return Err(TraceError::Damaged("a section of no known kind")),
        };
        Ok(Some(section))
    }
}

struct Parts<'a>(&'a [u8]);

impl<'a> Parts<'a> {
    fn take(&mut self, n: usize) -> Result<&'a [u8], TraceError> {
        let (part, rest) = self.0.split_at_checked(n).ok_or(TraceError::Damaged("a section is too short"))?;
        self.0 = rest;
        Ok(part)
    }

    fn number(&mut self, bytes: usize) -> Result<u64, TraceError> {
        Ok(self.take(bytes)?.iter().rev().fold(0, |n, byte| n << 8 | u64::from(*byte)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sections_round_trip_and_damage_is_an_error() {
        let code = Code { id: 7, offset: 0xffe, bits: 64, bytes: vec![1, 2, 3], lengths: vec![1, 2] };
        let chunk = Section::Chunk { vcpu: 1, now: 99, count: 4, words: vec![5; 3], args: vec![6; 2] };
        let sections = [Section::Code(code), chunk, Section::End { count: 4 }];
        let mut file = Vec::new();
        let header = Header::new("riscv64", TraceKinds::default(), String::new());
        write_header(&mut file, &header).unwrap();
        sections.iter().for_each(|s| _ = s.write(&mut file).unwrap());
        let mut input = &file[..];
        assert_eq!(read_header(&mut input).unwrap(), header);
        for section in &sections {
            assert_eq!(Section::read(&mut input).unwrap().as_ref(), Some(section));
        }
        assert_eq!(Section::read(&mut input).unwrap(), None);
        for cut in 0..file.len() {
            let mut input = &file[..cut];
            let Ok(_) = read_header(&mut input) else { continue };
            while let Ok(Some(_)) = Section::read(&mut input) {}
        }
        assert!(read_header(&mut &b"MIMUSTR?"[..]).is_err());
    }
}
