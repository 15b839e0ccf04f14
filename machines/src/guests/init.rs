//! The initial RAM disks of ready-made guests: the distribution's, with our own first
//! process behind it (Linux unpacks concatenated archives in order), or one of our own.

use std::fs;
use std::path::{Path, PathBuf};

use sha2::{Digest, Sha256};

use super::cpio::Archive;
use super::{GuestError, hex, write_atomically};

/// Kernel arguments that start [`shell_initrd`]'s first process.
pub const SHELL_APPEND: &str = "console=ttyS0 quiet rdinit=/mimus/init";
/// The benchmark's rows that a shell times.
pub const BENCH_PHASES: &[u8] = include_bytes!("scripts/bench-phases.sh");

/// The installer's initrd with a first process that brings up the network and a shell.
/// `dir` holds the installed guest; the result is kept there.
pub fn shell_initrd(dir: &Path) -> Result<PathBuf, GuestError> {
    let mut archive = Archive::default();
    archive
        .directory("mimus")
        .directory("mimus/bin")
        .file("mimus/init", 0o755, include_bytes!("scripts/shell-init.sh"))
        .file("mimus/shell", 0o755, include_bytes!("scripts/shell.sh"))
        .file("mimus/udhcpc", 0o755, include_bytes!("scripts/udhcpc.sh"))
        .file("mimus/bin/poweroff", 0o755, include_bytes!("scripts/poweroff.sh"));
    let base = dir.join("initrd.gz");
    combined(dir, "initrd-shell", Some(&base), archive)
}

/// An initrd of busybox and the kernel's modules, with a first process that brings up the network and a shell.
/// `kernel` holds the installed kernel, in which the result is kept; `modules` are loaded in this order.
pub fn busybox_shell_initrd(kernel: &Path, busybox: &Path, modules: &[&str]) -> Result<PathBuf, GuestError> {
    let read = |path: &Path| fs::read(path).map_err(|e| GuestError::io("read", path, &e));
    let mut archive = Archive::default();
    for dir in ["bin", "dev", "etc", "proc", "sys", "modules", "mimus", "mimus/bin"] {
        archive.directory(dir);
    }
    archive
        .character_device("dev/console", 0o600, 5, 1)
        .file("bin/busybox", 0o755, &read(busybox)?)
        .symlink("bin/sh", "busybox")
        .file("mimus/init", 0o755, include_bytes!("scripts/shell-init.sh"))
        .file("mimus/shell", 0o755, include_bytes!("scripts/shell.sh"))
        .file("mimus/udhcpc", 0o755, include_bytes!("scripts/udhcpc.sh"))
        .file("mimus/bin/poweroff", 0o755, include_bytes!("scripts/poweroff.sh"))
        .file("modules/order", 0o644, modules.join("\n").as_bytes());
    for module in modules {
        archive.file(&format!("modules/{module}"), 0o644, &read(&kernel.join(module))?);
    }
    combined(kernel, "initrd-shell", None, archive)
}

/// An initrd of busybox and the benchmark's first process. `busybox` is the program's file,
/// `programs` that of the benchmark's own programs.
pub fn bench_initrd(dir: &Path, busybox: &Path, programs: Option<&Path>) -> Result<PathBuf, GuestError> {
    let read = |path: &Path| fs::read(path).map_err(|e| GuestError::io("read", path, &e));
    let mut archive = Archive::default();
    archive
        .directory("bin")
        .directory("dev")
        .character_device("dev/console", 0o600, 5, 1)
        .file("bin/busybox", 0o755, &read(busybox)?)
        .file("phases.sh", 0o755, BENCH_PHASES)
        .file("init", 0o755, include_bytes!("scripts/bench-init.sh"));
    if let Some(programs) = programs {
        archive.file("bin/programs", 0o755, &read(programs)?);
    }
    combined(dir, "initrd-bench", None, archive)
}

/// Writes `base` followed by the archive, named by its contents, unless it is there.
fn combined(dir: &Path, name: &str, base: Option<&Path>, archive: Archive) -> Result<PathBuf, GuestError> {
    let own = archive.finish_gzip().map_err(|e| GuestError::io("compress", dir, &e))?;
    let path = dir.join(format!("{name}-{}.gz", &hex(&Sha256::digest(&own))[..12]));
    if path.exists() {
        return Ok(path);
    }
    let mut bytes = match base {
        Some(base) => fs::read(base).map_err(|e| GuestError::io("read", base, &e))?,
        None => Vec::new(),
    };
    bytes.extend(own);
    remove_older(dir, name);
    write_atomically(&path, &bytes)?;
    Ok(path)
}

/// What an older version of this program made.
fn remove_older(dir: &Path, name: &str) {
    for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
        if entry.file_name().to_string_lossy().starts_with(&format!("{name}-")) {
            let _ = fs::remove_file(entry.path());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_appendix_follows_the_base_and_is_made_once() {
        let dir = std::env::temp_dir().join(format!("mimus-init-{}", std::process::id()));
        fs::create_dir_all(&dir).unwrap();
        fs::write(dir.join("initrd.gz"), b"BASE").unwrap();
        fs::write(dir.join("initrd-shell-000000000000.gz"), b"old").unwrap();
        let path = shell_initrd(&dir).unwrap();
        let bytes = fs::read(&path).unwrap();
        assert!(bytes.starts_with(b"BASE\x1f\x8b"));
        assert_eq!(shell_initrd(&dir).unwrap(), path);
        assert_eq!(fs::read_dir(&dir).unwrap().count(), 2);
        let unpacked = crate::boot::gzip::decompress("x", &bytes[4..], 1 << 20).unwrap();
        assert!(unpacked.starts_with(b"070701") && unpacked.windows(11).any(|w| w == b"mimus/init\0"));
        fs::remove_dir_all(&dir).unwrap();
    }
}
