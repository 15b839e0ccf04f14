//! Writing `cpio` archives in the "newc" format, which Linux unpacks as an initramfs.
//!
//! Spec: Linux `Documentation/driver-api/early-userspace/buffer-format.rst`.

/// An archive being written.
#[derive(Debug, Default)]
pub struct Archive {
    bytes: Vec<u8>,
    entries: u32,
}

const DIRECTORY: u32 = 0o040_000;
const REGULAR: u32 = 0o100_000;
const SYMLINK: u32 = 0o120_000;
const CHARACTER: u32 = 0o020_000;

impl Archive {
    /// Adds a directory.
    pub fn directory(&mut self, name: &str) -> &mut Self {
        self.entry(name, DIRECTORY | 0o755, &[], (0, 0))
    }

    /// Adds a regular file; `mode` is its permission bits.
    pub fn file(&mut self, name: &str, mode: u32, data: &[u8]) -> &mut Self {
        self.entry(name, REGULAR | mode, data, (0, 0))
    }

    /// Adds a symbolic link.
    pub fn symlink(&mut self, name: &str, target: &str) -> &mut Self {
        self.entry(name, SYMLINK | 0o777, target.as_bytes(), (0, 0))
    }

    /// Adds a character device.
    pub fn character_device(&mut self, name: &str, mode: u32, major: u32, minor: u32) -> &mut Self {
        self.entry(name, CHARACTER | mode, &[], (major, minor))
    }

    /// The finished archive.
    pub fn finish(mut self) -> Vec<u8> {
        self.entry("TRAILER!!!", 0, &[], (0, 0));
        self.bytes
    }

    /// The finished archive, gzip'ed. Linux takes it as it is, or behind another archive.
    pub fn finish_gzip(self) -> std::io::Result<Vec<u8>> {
        use std::io::Write;
        let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::default());
        encoder.write_all(&self.finish())?;
        encoder.finish()
    }

    fn entry(&mut self, name: &str, mode: u32, data: &[u8], device: (u32, u32)) -> &mut Self {
        self.entries += 1;
        let links = if mode & DIRECTORY != 0 && mode & REGULAR == 0 { 2 } else { 1 };
        let fields =
            [self.entries, mode, 0, 0, links, 0, data.len() as u32, 0, 0, device.0, device.1, name.len() as u32 + 1, 0];
        self.bytes.extend(b"070701");
        for field in fields {
            self.bytes.extend(format!("{field:08X}").bytes());
        }
        self.bytes.extend(name.bytes());
        self.bytes.push(0);
        self.pad();
        self.bytes.extend(data);
        self.pad();
        self
    }

    fn pad(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_and_padding() {
        let mut a = Archive::default();
        a.directory("d").file("d/f", 0o644, b"hello").symlink("l", "d/f").character_device("c", 0o600, 5, 1);
        let bytes = a.finish();
        assert_eq!(bytes.len() % 4, 0);
        assert_eq!(&bytes[..14], b"07070100000001");
        assert_eq!(bytes.windows(6).filter(|w| w == b"070701").count(), 5);
        assert!(bytes.windows(10).any(|w| w == b"TRAILER!!!"));
        // Second entry: header at 112 (110 + "d\0" = 112), its size field is the seventh.
        assert_eq!(&bytes[112 + 6 + 6 * 8..112 + 6 + 7 * 8], b"00000005");
    }
}
