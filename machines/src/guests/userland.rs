//! A distribution's own programs for a guest: packages with all that they depend on, unpacked into a directory and
//! packed as an initial RAM disk.
//!
//! apt resolves the dependencies as for an empty system; nothing of a package but its files is used.

use std::fs::{self, File};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use super::cpio::Archive;
use super::{GuestError, Progress, apt, write_atomically};

/// Programs to fetch.
#[derive(Debug, Clone, Copy)]
pub struct Userland {
    /// Name of its directory in the cache.
    pub name: &'static str,
    /// Debian architecture.
    pub architecture: &'static str,
    /// Suites to look in, first choice first.
    pub suites: &'static [&'static str],
}

/// A shell, an archiver, an interpreter and a compiler with what they need.
const PACKAGES: &[&str] = &["dash", "coreutils", "tar", "gzip", "make", "gcc", "libc6-dev", "python3-minimal"];

/// Of x86-64 guests.
pub const X86_64: Userland =
    Userland { name: "x86_64-userland", architecture: "amd64", suites: &["bookworm", "trixie"] };
/// Of i386 guests.
pub const I386: Userland = Userland { name: "i386-userland", architecture: "i386", suites: &["bookworm", "trixie"] };
/// Of riscv64 guests.
pub const RISCV64: Userland = Userland { name: "riscv64-userland", architecture: "riscv64", suites: &["trixie"] };

/// Where an initial RAM disk of [`ensure`] has the programs.
pub const ROOT: &str = "root";
/// Directories that one package may expect to be names of those in `usr` (Debian's merged `/usr`).
const MERGED: [&str; 4] = ["bin", "sbin", "lib", "lib64"];
/// What is left out, by the beginning of its path: a third of the size, and of no use here.
const NOT_UNDER: [&str; 8] = [
    "usr/share/doc",
    "usr/share/man",
    "usr/share/info",
    "usr/share/locale",
    "usr/share/lintian",
    "usr/share/gdb",
    "usr/lib/python3/dist-packages",
    "var",
];
/// The same by a part of a file's name: link-time optimisation, sanitizers, profilers, network libraries, static libraries.
const NOT_NAMED: [&str; 11] =
    ["lto1", "lto-dump", "libasan", "libtsan", "liblsan", "libubsan", "gprofng", "libgp-", "libkrb5", "libitm", "dwp"];
/// Static libraries that ordinary programs are linked with.
const STATIC: [&str; 3] = ["libgcc.a", "libgcc_eh.a", "libc_nonshared.a"];

/// The directory of the unpacked programs and the archive that has them under [`ROOT`], from the cache or fetched.
///
/// # Errors
/// apt's, or the host's file system's.
pub fn ensure(userland: &Userland, cache: &Path, progress: &dyn Progress) -> Result<(PathBuf, PathBuf), GuestError> {
    let dir = cache.join(userland.name);
    let (root, archive) = (dir.join(ROOT), dir.join("userland.cpio"));
    fs::create_dir_all(cache).map_err(|e| GuestError::io("create", cache, &e))?;
    let lock_path = cache.join(format!(".{}.lock", userland.name));
    let lock = File::create(&lock_path).map_err(|e| GuestError::io("create", &lock_path, &e))?;
    lock.lock().map_err(|e| GuestError::io("lock", &lock_path, &e))?;
    // The archive is written last.
    if archive.is_file() {
        return Ok((root, archive));
    }
    let work = cache.join(format!(".{}.new", userland.name));
    let _ = fs::remove_dir_all(&work);
    let result = install(userland, &work, &dir, progress);
    let _ = fs::remove_dir_all(&work);
    result.map(|()| (root, archive))
}

fn install(userland: &Userland, work: &Path, dir: &Path, progress: &dyn Progress) -> Result<(), GuestError> {
    let unpacked = work.join(ROOT);
    fs::create_dir_all(&unpacked).map_err(|e| GuestError::io("create", &unpacked, &e))?;
    super::enough_space(work)?;
    apt::fetch_all(PACKAGES, userland.architecture, userland.suites, work, &unpacked, progress)?;
    for name in MERGED {
        let (link, target) = (unpacked.join(name), Path::new("usr").join(name));
        if link.symlink_metadata().is_err() && unpacked.join(&target).is_dir() {
            std::os::unix::fs::symlink(&target, &link).map_err(|e| GuestError::io("create", &link, &e))?;
        }
    }
    prune(&unpacked, Path::new(""))?;
    for name in ["dev", "proc", "tmp"] {
        let path = unpacked.join(name);
        fs::create_dir_all(&path).map_err(|e| GuestError::io("create", &path, &e))?;
    }
    progress.step("packing");
    let mut archive = Archive::default();
    archive.directory(ROOT);
    pack(&unpacked, ROOT, &mut archive)?;
    let _ = fs::remove_dir_all(dir);
    fs::create_dir_all(dir).map_err(|e| GuestError::io("create", dir, &e))?;
    let root = dir.join(ROOT);
    fs::rename(&unpacked, &root).map_err(|e| GuestError::io("create", &root, &e))?;
    write_atomically(&dir.join("userland.cpio"), &archive.finish())
}

/// Whether a file is left out.
fn left_out(path: &Path) -> bool {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    NOT_UNDER.iter().any(|under| path.starts_with(under))
        || NOT_NAMED.iter().any(|part| name.contains(part))
        || name.ends_with(".a") && !STATIC.contains(&&*name)
}

/// Entries of a directory in order of their names.
fn entries(dir: &Path) -> Result<Vec<fs::DirEntry>, GuestError> {
    let read = fs::read_dir(dir).map_err(|e| GuestError::io("read", dir, &e))?;
    let mut entries: Vec<_> = read.flatten().collect();
    entries.sort_by_key(fs::DirEntry::file_name);
    Ok(entries)
}

/// Removes what is left out below `root`/`path`.
fn prune(root: &Path, path: &Path) -> Result<(), GuestError> {
    for entry in entries(&root.join(path))? {
        let (full, path) = (entry.path(), path.join(entry.file_name()));
        let is_dir = entry.file_type().is_ok_and(|t| t.is_dir());
        let removed = match (left_out(&path), is_dir) {
            (true, true) => fs::remove_dir_all(&full),
            (true, false) => fs::remove_file(&full),
            (false, true) => {
                prune(root, &path)?;
                Ok(())
            }
            (false, false) => Ok(()),
        };
        removed.map_err(|e| GuestError::io("remove", &full, &e))?;
    }
    Ok(())
}

/// Adds what is in a directory, under `name`. Devices and such, of which packages have none, are passed over.
fn pack(dir: &Path, name: &str, archive: &mut Archive) -> Result<(), GuestError> {
    for entry in entries(dir)? {
        let path = entry.path();
        let name = format!("{name}/{}", entry.file_name().to_string_lossy());
        let fail = |e: std::io::Error| GuestError::io("read", &path, &e);
        let metadata = path.symlink_metadata().map_err(fail)?;
        if metadata.is_dir() {
            archive.directory(&name);
            pack(&path, &name, archive)?;
        } else if metadata.is_symlink() {
            archive.symlink(&name, &fs::read_link(&path).map_err(fail)?.to_string_lossy());
        } else if metadata.is_file() {
            archive.file(&name, metadata.permissions().mode() & 0o777, &fs::read(&path).map_err(fail)?);
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_left_out() {
        for path in
            ["usr/share/doc/gcc/x", "usr/lib/gcc/x/12/lto1", "usr/lib/libasan.so.8", "usr/lib/libm.a", "var/lib"]
        {
            assert!(left_out(Path::new(path)), "{path}");
        }
        for path in ["usr/bin/python3", "usr/lib/gcc/x/12/libgcc.a", "usr/share/docs", "usr/include/stdio.h"] {
            assert!(!left_out(Path::new(path)), "{path}");
        }
    }

    #[test]
    fn directories_are_packed_in_order() {
        let dir = std::env::temp_dir().join(format!("mimus-userland-{}", std::process::id()));
        fs::create_dir_all(dir.join("usr/bin")).unwrap();
        fs::create_dir_all(dir.join("usr/share/doc")).unwrap();
        fs::write(dir.join("usr/bin/b"), b"B").unwrap();
        fs::write(dir.join("usr/share/doc/x"), b"X").unwrap();
        std::os::unix::fs::symlink("b", dir.join("usr/bin/a")).unwrap();
        prune(&dir, Path::new("")).unwrap();
        let mut archive = Archive::default();
        pack(&dir, "root", &mut archive).unwrap();
        let bytes = archive.finish();
        let at = |name: &str| bytes.windows(name.len()).position(|w| w == name.as_bytes());
        assert!(at("root/usr/bin/a\0") < at("root/usr/bin/b\0") && at("root/usr/share\0").is_some());
        assert_eq!(at("share/doc"), None);
        fs::remove_dir_all(&dir).unwrap();
    }
}
