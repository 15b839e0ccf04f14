//! Kernel and firmware images: what they are, and where they go in guest RAM.
//!
//! Everything here is a pure function from bytes to a description, so that each
//! rule and each error has a test without a machine. Reading files is the one
//! exception ([`read_file`]), kept here so that its errors read alike.
//!
//! * [`image`] tells the formats apart and loads Linux `Image` files.
//! * [`elf`] loads ELF64 executables.
//! * [`gzip`] decompresses with a bound.
//! * [`files`] reads what a machine configuration names.
//! * [`riscv`] holds the placement rules of the RISC-V `virt` board.
//! * [`x86`] is direct boot of PCs.

pub mod elf;
pub mod files;
pub mod gzip;
pub mod image;
pub mod riscv;
pub mod x86;

use std::fs::File;
use std::io::Read;
use std::path::Path;

use thiserror::Error;

pub use files::{BootFiles, Named};
pub use image::{Kernel, KernelFormat, Segment, load_firmware, load_kernel};

/// Largest kernel, initrd or firmware file that is read (4 GiB).
pub const MAX_FILE: u64 = 4 << 30;

/// Guests this build can run; used to tell a user where a wrong kernel belongs.
pub const SUPPORTED_GUESTS: &[&str] = &["riscv64", "x86_64", "i386"];

/// Why a kernel, initrd or firmware cannot be booted. Each prints as one line.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum BootError {
    /// The file cannot be opened or read.
    #[error("{option} {path}: {reason}")]
    Read {
        /// The option that named the file, for example `-kernel`.
        option: &'static str,
        /// The file.
        path: String,
        /// What the host said, or what is wrong with the file.
        reason: String,
    },
    /// The file has no bytes.
    #[error("{what} is empty: give the file that was meant")]
    Empty {
        /// Option and file.
        what: String,
    },
    /// The image is for another architecture.
    #[error("{what} is {found}; this is mimus system {guest}: {advice}")]
    WrongArchitecture {
        /// Option and file.
        what: String,
        /// What the file is, with its article: "an x86-64 ELF".
        found: String,
        /// The guest that was asked for.
        guest: String,
        /// What to do instead.
        advice: String,
    },
    /// Nothing known.
    #[error("{what} is not a kernel that can be booted ({found}): give {accepted}")]
    UnknownFormat {
        /// Option and file.
        what: String,
        /// What the file looks like.
        found: String,
        /// What would do.
        accepted: &'static str,
    },
    /// A compressed file whose compression is not read here.
    #[error("{what} is compressed with {tool}, which mimus does not read: unpack it first ({tool} -d)")]
    Compressed {
        /// Option and file.
        what: String,
        /// Name of the program that unpacks it.
        tool: &'static str,
    },
    /// The file ends before its own headers say it does.
    #[error("{what} is truncated: {detail}; fetch or build it again")]
    Truncated {
        /// Option and file.
        what: String,
        /// Which part is missing.
        detail: String,
    },
    /// The file contradicts itself.
    #[error("{what} is damaged: {detail}")]
    Damaged {
        /// Option and file.
        what: String,
        /// What is wrong.
        detail: String,
    },
    /// The kernel's command line is too long for it.
    #[error("-append has {len} bytes; this kernel takes at most {max}: shorten it")]
    CommandLine {
        /// Its length in bytes.
        len: u64,
        /// What the kernel takes.
        max: u64,
    },
    /// Something does not fit in guest RAM.
    #[error("{what} does not fit: {detail}; use -m {suggest_mib}M or more")]
    TooBig {
        /// Option and file, or the part that does not fit.
        what: String,
        /// The numbers.
        detail: String,
        /// RAM size that would do, in MiB.
        suggest_mib: u64,
    },
}

impl BootError {
    /// A file that is no kernel for `guest`.
    pub(crate) fn unknown_format(what: &str, found: &str, guest: &str) -> Self {
        let accepted = match guest {
            "x86_64" | "i386" => "a Linux bzImage, or an ELF kernel (vmlinux) with a PVH or 64-bit entry point",
            _ => "a Linux Image, a gzip'ed Image or a 64-bit ELF",
        };
        BootError::UnknownFormat { what: what.into(), found: found.into(), accepted }
    }
}

/// Reads a file named by a command-line option, with errors that name both.
///
/// Directories, missing and empty files and files above [`MAX_FILE`] are errors.
pub fn read_file(option: &'static str, path: &Path) -> Result<Vec<u8>, BootError> {
    let fail = |reason: String| BootError::Read { option, path: path.display().to_string(), reason };
    let file = File::open(path).map_err(|e| fail(describe_io(&e)))?;
    let meta = file.metadata().map_err(|e| fail(describe_io(&e)))?;
    if meta.is_dir() {
        return Err(fail("is a directory: give a file".into()));
    }
    if meta.len() > MAX_FILE {
        return Err(fail(format!("is {} long; at most {} can be loaded", human(meta.len()), human(MAX_FILE))));
    }
    let mut bytes = Vec::new();
    // One byte beyond the limit tells a pipe or a growing file from one that fits.
    file.take(MAX_FILE + 1).read_to_end(&mut bytes).map_err(|e| fail(describe_io(&e)))?;
    if bytes.len() as u64 > MAX_FILE {
        return Err(fail(format!("is longer than {}", human(MAX_FILE))));
    }
    if bytes.is_empty() {
        return Err(BootError::Empty { what: format!("{option} {}", path.display()) });
    }
    Ok(bytes)
}

/// What the host's error means, with the advice that fits.
fn describe_io(e: &std::io::Error) -> String {
    match e.kind() {
        std::io::ErrorKind::NotFound => "no such file: check the path".into(),
        std::io::ErrorKind::PermissionDenied => {
            "permission denied: the file must be readable by the user who runs mimus".into()
        }
        _ => e.to_string(),
    }
}

/// A byte count for people: the largest binary unit, one decimal where it is not exact.
pub fn human(bytes: u64) -> String {
    const UNITS: [(&str, u32); 4] = [("TiB", 40), ("GiB", 30), ("MiB", 20), ("KiB", 10)];
    for (unit, shift) in UNITS {
        if bytes >= 1 << shift {
            let whole = bytes >> shift;
            if bytes & ((1 << shift) - 1) == 0 {
                return format!("{whole} {unit}");
            }
            return format!("{:.1} {unit}", bytes as f64 / (1u64 << shift) as f64);
        }
    }
    format!("{bytes} bytes")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_read_well() {
        assert_eq!(human(12), "12 bytes");
        assert_eq!(human(2 << 20), "2 MiB");
        assert_eq!(human((3 << 20) + (1 << 19)), "3.5 MiB");
        assert_eq!(human(1 << 40), "1 TiB");
    }

    #[test]
    fn missing_empty_and_directory_are_one_line() {
        let dir = std::env::temp_dir().join(format!("mimus-boot-{}", std::process::id()));
        std::fs::create_dir_all(&dir).unwrap();
        let empty = dir.join("empty");
        std::fs::write(&empty, b"").unwrap();
        for (path, says) in [(dir.join("nope"), "no such file"), (empty, "is empty"), (dir.clone(), "is a directory")] {
            let text = read_file("-kernel", &path).unwrap_err().to_string();
            assert!(text.starts_with("-kernel ") && text.contains(says), "{text}");
            assert_eq!(text.lines().count(), 1);
        }
        std::fs::remove_dir_all(&dir).unwrap();
    }
}
