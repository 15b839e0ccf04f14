//! gzip with a bound on the output, so that a small file cannot exhaust memory.

use std::io::Read;

use flate2::read::MultiGzDecoder;

use super::{BootError, human};

/// The first two bytes of every gzip member (RFC 1952, 2.3.1).
pub const MAGIC: [u8; 2] = [0x1f, 0x8b];

/// Whether `bytes` begin as a gzip member does.
pub fn is_gzip(bytes: &[u8]) -> bool {
    bytes.starts_with(&MAGIC)
}

/// Decompresses `bytes`; `what` names them in errors; `limit` bounds the output in bytes.
pub fn decompress(what: &str, bytes: &[u8], limit: u64) -> Result<Vec<u8>, BootError> {
    let mut out = Vec::new();
    match MultiGzDecoder::new(bytes).take(limit.saturating_add(1)).read_to_end(&mut out) {
        Ok(_) if out.len() as u64 > limit => Err(BootError::Damaged {
            what: what.into(),
            detail: format!("it unpacks to more than {}, which is no kernel", human(limit)),
        }),
        Ok(_) if out.is_empty() => Err(BootError::Empty { what: what.into() }),
        Ok(_) => Ok(out),
        // Padding after the last member (some build systems pad to a block) is not an error.
        Err(_) if !out.is_empty() && padded_tail(bytes) => Ok(out),
        Err(e) if e.kind() == std::io::ErrorKind::UnexpectedEof => Err(BootError::Truncated {
            what: what.into(),
            detail: format!("its gzip data ends early, after {} unpacked", human(out.len() as u64)),
        }),
        Err(e) => Err(BootError::Damaged { what: what.into(), detail: format!("gzip: {e}") }),
    }
}

fn padded_tail(bytes: &[u8]) -> bool {
    bytes.len() > 512 && bytes[bytes.len() - 16..].iter().all(|b| *b == 0)
}

#[cfg(test)]
pub(crate) mod tests {
    use std::io::Write;

    use super::*;

    pub(crate) fn compress(bytes: &[u8]) -> Vec<u8> {
        let mut enc = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::default());
        enc.write_all(bytes).unwrap();
        enc.finish().unwrap()
    }

    #[test]
    fn round_trip() {
        let data: Vec<u8> = (0..100_000u32).map(|i| (i.wrapping_mul(i) >> 3) as u8).collect();
        assert_eq!(decompress("-kernel k", &compress(&data), 1 << 20).unwrap(), data);
    }

    #[test]
    fn a_bomb_is_bounded() {
        let text = decompress("-kernel k", &compress(&vec![0; 4 << 20]), 1 << 20).unwrap_err().to_string();
        assert!(text.contains("more than 1 MiB"), "{text}");
    }

    #[test]
    fn truncation_is_said() {
        let data: Vec<u8> = (0..50_000u32).map(|i| (i.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
        let gz = compress(&data);
        let text = decompress("-kernel k", &gz[..gz.len() / 2], 1 << 20).unwrap_err().to_string();
        assert!(text.contains("truncated"), "{text}");
    }
}
