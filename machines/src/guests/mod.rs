//! Ready-made guests, fetched through the host's own package sources into a cache.
//!
//! A guest is a [`GuestSpec`]: packages and which of their files to keep. [`ensure`] gives
//! the files, from the cache if they are there. An installation is made aside and renamed
//! into place, so that the cache never holds half of one.

pub mod apt;
pub mod cpio;
pub mod firmware;
pub mod init;
pub mod sources;
pub mod userland;
pub mod x86;

use std::fs::{self, File};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use thiserror::Error;

pub use apt::Package;

/// Told how an installation goes on.
pub trait Progress {
    /// A new step begins.
    fn step(&self, text: &str);
    /// Bytes fetched so far of how many.
    fn download(&self, done: u64, total: u64);
}

/// Why a guest is not to be had. Each prints as one line.
#[derive(Debug, Error)]
pub enum GuestError {
    /// A program is missing or does not start.
    #[error("{program}: {reason}")]
    Tool {
        /// The program.
        program: &'static str,
        /// What the host said, and what to do.
        reason: String,
    },
    /// No package sources.
    #[error(
        "apt has no package sources on this machine: add Debian 13's (trixie) to /etc/apt/sources.list.d, or give a kernel of your own with mimus system"
    )]
    NoSources,
    /// The package is in none of the sources.
    #[error(
        "package {package} is not in this machine's package sources: add a source of Debian 13 (trixie) or newer, or give a kernel of your own with mimus system"
    )]
    NotFound {
        /// The package.
        package: String,
    },
    /// apt or dpkg failed.
    #[error("{what} failed: {says}; check the network and the package sources, then try again")]
    Apt {
        /// The command.
        what: String,
        /// Its first complaint.
        says: String,
    },
    /// What came is not what was asked for.
    #[error("{file} has SHA-256 {found}, the package list says {expected}: it was damaged on the way; try again")]
    Checksum {
        /// The file.
        file: String,
        /// From the package list.
        expected: String,
        /// Of the file.
        found: String,
    },
    /// A package no longer has a file.
    #[error("package {package} {version} has no file {file}: this version of mimus does not know its layout")]
    Layout {
        /// The package.
        package: String,
        /// Its version.
        version: String,
        /// End of the path that was looked for.
        file: String,
    },
    /// The host's file system.
    #[error("cannot {verb} {path}: {reason}")]
    Io {
        /// read, write, create …
        verb: &'static str,
        /// The path.
        path: String,
        /// What the host said.
        reason: String,
    },
    /// No place for the cache.
    #[error("there is no place for the cache: set HOME or XDG_CACHE_HOME")]
    NoHome,
}

impl GuestError {
    fn io(verb: &'static str, path: &Path, e: &std::io::Error) -> Self {
        let hint = if e.kind() == std::io::ErrorKind::StorageFull {
            " (free some space, or set XDG_CACHE_HOME to a larger disk)"
        } else {
            ""
        };
        GuestError::Io { verb, path: path.display().to_string(), reason: format!("{e}{hint}") }
    }

    fn tool(program: &'static str, e: &std::io::Error) -> Self {
        let reason = if e.kind() == std::io::ErrorKind::NotFound {
            "not on this machine; ready-made guests come as Debian packages and need apt and dpkg (elsewhere, give a kernel of your own with mimus system)".into()
        } else {
            e.to_string()
        };
        GuestError::Tool { program, reason }
    }
}

/// Which file of a package to keep, and as what.
#[derive(Debug, Clone, Copy)]
pub struct Keep {
    /// End of its path in the package; a `*` at its end stands for the rest of the name.
    pub path_ends: &'static str,
    /// Its name in the cache.
    pub name: &'static str,
}

/// A guest: packages, and files of them.
#[derive(Debug, Clone, Copy)]
pub struct GuestSpec {
    /// Name of its directory in the cache.
    pub name: &'static str,
    /// What it is made of.
    pub parts: &'static [(Package, &'static [Keep])],
}

/// Debian 13's installer for riscv64: a distribution kernel and an initrd with busybox.
pub const RISCV64: GuestSpec = GuestSpec {
    name: "riscv64",
    parts: &[(
        Package {
            name: "debian-installer-13-netboot-riscv64",
            architecture: None,
            suites: &["trixie"],
            dependency: None,
        },
        &[
            Keep { path_ends: "riscv64/linux", name: "linux" },
            Keep { path_ends: "riscv64/initrd.gz", name: "initrd.gz" },
        ],
    )],
};

/// A static busybox with every applet, for the benchmark's initrd.
pub const RISCV64_BUSYBOX: GuestSpec = GuestSpec {
    name: "riscv64-busybox",
    parts: &[(
        Package { name: "busybox-static", architecture: Some("riscv64"), suites: &["trixie", "sid"], dependency: None },
        &[Keep { path_ends: "bin/busybox", name: "busybox" }],
    )],
};

/// Debian 13's kernel for riscv64 with the modules of a disk, for tests: the installer's
/// initrd has none.
pub const RISCV64_KERNEL: GuestSpec = GuestSpec {
    name: "riscv64-kernel",
    parts: &[(
        Package {
            name: "linux-image-riscv64",
            architecture: Some("riscv64"),
            suites: &["trixie"],
            dependency: Some("linux-image-"),
        },
        &[
            Keep { path_ends: "boot/vmlinux-*", name: "linux" },
            Keep { path_ends: "block/virtio_blk.ko.xz", name: "virtio_blk.ko.xz" },
            Keep { path_ends: "virtio/virtio_mmio.ko.xz", name: "virtio_mmio.ko.xz" },
            Keep { path_ends: "hw_random/virtio-rng.ko.xz", name: "virtio-rng.ko.xz" },
            Keep { path_ends: "virtio/virtio_balloon.ko.xz", name: "virtio_balloon.ko.xz" },
            Keep { path_ends: "net/virtio_net.ko.xz", name: "virtio_net.ko.xz" },
            Keep { path_ends: "net/net_failover.ko.xz", name: "net_failover.ko.xz" },
            Keep { path_ends: "net/core/failover.ko.xz", name: "failover.ko.xz" },
        ],
    )],
};

/// OpenSBI, U-Boot and EDK II for the `virt` board, for tests with real firmware.
pub const RISCV64_FIRMWARE: GuestSpec = GuestSpec {
    name: "riscv64-firmware",
    parts: &[
        (
            Package { name: "opensbi", architecture: None, suites: &["trixie"], dependency: None },
            &[
                Keep { path_ends: "generic/fw_dynamic.bin", name: "fw_dynamic.bin" },
                Keep { path_ends: "generic/fw_jump.bin", name: "fw_jump.bin" },
            ],
        ),
        (
            Package { name: "u-boot-qemu", architecture: None, suites: &["trixie"], dependency: None },
            &[
                Keep { path_ends: "qemu-riscv64_smode/u-boot.bin", name: "u-boot-smode.bin" },
                Keep { path_ends: "qemu-riscv64/u-boot.bin", name: "u-boot.bin" },
            ],
        ),
        (
            Package { name: "qemu-efi-riscv64", architecture: None, suites: &["trixie"], dependency: None },
            &[
                Keep { path_ends: "RISCV_VIRT_CODE.fd", name: "edk2-code.fd" },
                Keep { path_ends: "RISCV_VIRT_VARS.fd", name: "edk2-vars.fd" },
            ],
        ),
    ],
};

/// What a cache directory holds.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Manifest {
    packages: Vec<(String, String, String)>,
    files: Vec<(String, u64, String)>,
}

const MANIFEST: &str = "manifest.json";

/// `$XDG_CACHE_HOME/mimus/guests`, or `~/.cache/mimus/guests`.
pub fn cache_dir() -> Result<PathBuf, GuestError> {
    let from = |name: &str| std::env::var_os(name).filter(|v| !v.is_empty()).map(PathBuf::from);
    let base = from("XDG_CACHE_HOME").filter(|p| p.is_absolute()).or_else(|| from("HOME").map(|h| h.join(".cache")));
    Ok(base.ok_or(GuestError::NoHome)?.join("mimus/guests"))
}

/// The directory of `spec` in `cache` if all its files are there with the lengths noted
/// when they were installed.
pub fn installed(spec: &GuestSpec, cache: &Path) -> Option<PathBuf> {
    let dir = cache.join(spec.name);
    let manifest: Manifest = serde_json::from_slice(&fs::read(dir.join(MANIFEST)).ok()?).ok()?;
    let wanted = spec.parts.iter().flat_map(|(_, keep)| keep.iter());
    for keep in wanted {
        let (_, length, _) = manifest.files.iter().find(|(name, _, _)| name == keep.name)?;
        (fs::metadata(dir.join(keep.name)).ok()?.len() == *length).then_some(())?;
    }
    Some(dir)
}

/// The directory of `spec` in `cache`, fetched first if need be.
pub fn ensure(spec: &GuestSpec, cache: &Path, progress: &dyn Progress) -> Result<PathBuf, GuestError> {
    if let Some(dir) = installed(spec, cache) {
        return Ok(dir);
    }
    fs::create_dir_all(cache).map_err(|e| GuestError::io("create", cache, &e))?;
    let lock_path = cache.join(format!(".{}.lock", spec.name));
    let lock = File::create(&lock_path).map_err(|e| GuestError::io("create", &lock_path, &e))?;
    lock.lock().map_err(|e| GuestError::io("lock", &lock_path, &e))?;
    // Someone else may have fetched it while this process waited.
    if let Some(dir) = installed(spec, cache) {
        return Ok(dir);
    }
    let work = cache.join(format!(".{}.new", spec.name));
    let _ = fs::remove_dir_all(&work);
    let result = install(spec, cache, &work, progress);
    let _ = fs::remove_dir_all(&work);
    result
}

fn install(spec: &GuestSpec, cache: &Path, work: &Path, progress: &dyn Progress) -> Result<PathBuf, GuestError> {
    let staged = work.join("install");
    fs::create_dir_all(&staged).map_err(|e| GuestError::io("create", &staged, &e))?;
    enough_space(cache)?;
    let mut manifest = Manifest { packages: Vec::new(), files: Vec::new() };
    for (package, keep) in spec.parts {
        let record = apt::fetch(*package, work, progress)?;
        for keep in *keep {
            let found = find(&work.join("root"), keep.path_ends).ok_or_else(|| GuestError::Layout {
                package: package.name.into(),
                version: record.version.clone(),
                file: keep.path_ends.into(),
            })?;
            let to = staged.join(keep.name);
            fs::copy(&found, &to).map_err(|e| GuestError::io("write", &to, &e))?;
            let length = fs::metadata(&to).map_err(|e| GuestError::io("read", &to, &e))?.len();
            manifest.files.push((keep.name.into(), length, apt::sha256_file(&to)?));
        }
        manifest.packages.push((record.package, record.version, record.sha256));
    }
    let text = serde_json::to_vec_pretty(&manifest).unwrap_or_default();
    write_synced(&staged.join(MANIFEST), &text)?;
    let dir = cache.join(spec.name);
    let _ = fs::remove_dir_all(&dir);
    fs::rename(&staged, &dir).map_err(|e| GuestError::io("create", &dir, &e))?;
    Ok(dir)
}

/// apt tries a full disk again for minutes before it says so: better to look first.
fn enough_space(cache: &Path) -> Result<(), GuestError> {
    /// Package lists, one package and what is in it, in bytes.
    const NEEDED: u64 = 512 << 20;
    // A file system that does not tell is left to apt.
    let Ok(space) = rustix::fs::statvfs(cache) else { return Ok(()) };
    let free = space.f_bavail.saturating_mul(space.f_frsize);
    if free >= NEEDED {
        return Ok(());
    }
    let reason = format!(
        "{} MiB are free there, {} are needed (free some space, or set XDG_CACHE_HOME to a larger disk)",
        free >> 20,
        NEEDED >> 20
    );
    Err(GuestError::Io { verb: "install a guest in", path: cache.display().to_string(), reason })
}

/// Writes a file that is there whole or not at all.
pub fn write_atomically(path: &Path, bytes: &[u8]) -> Result<(), GuestError> {
    let mut name = path.file_name().unwrap_or_default().to_owned();
    name.push(format!(".{}.new", std::process::id()));
    let aside = path.with_file_name(name);
    write_synced(&aside, bytes)?;
    fs::rename(&aside, path).map_err(|e| GuestError::io("create", path, &e))
}

fn write_synced(path: &Path, bytes: &[u8]) -> Result<(), GuestError> {
    use std::io::Write;
    let fail = |e: std::io::Error| GuestError::io("write", path, &e);
    let mut file = File::create(path).map_err(fail)?;
    file.write_all(bytes).and_then(|()| file.sync_all()).map_err(|e| {
        let _ = fs::remove_file(path);
        fail(e)
    })
}

/// True if `path` ends with `ends`, at a path separator; a `*` at its end stands for the
/// rest of the name.
fn path_ends(path: &Path, ends: &str) -> bool {
    let Some(start) = ends.strip_suffix('*') else {
        return path.ends_with(ends);
    };
    let (dir, name) = start.rsplit_once('/').unwrap_or(("", start));
    let own = path.file_name().unwrap_or_default().to_string_lossy();
    own.starts_with(name) && path.parent().is_some_and(|p| p.ends_with(dir))
}

/// The regular file below `root` whose path ends with `ends` (see [`Keep::path_ends`]).
fn find(root: &Path, ends: &str) -> Option<PathBuf> {
    let mut todo = vec![root.to_owned()];
    while let Some(dir) = todo.pop() {
        let mut entries: Vec<_> = fs::read_dir(&dir).ok()?.flatten().collect();
        entries.sort_by_key(fs::DirEntry::file_name);
        for entry in entries {
            let Ok(kind) = entry.file_type() else {
                continue;
            };
            if kind.is_dir() {
                todo.push(entry.path());
            } else if kind.is_file() && path_ends(&entry.path(), ends) {
                return Some(entry.path());
            }
        }
    }
    None
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Dir(PathBuf);

    impl Drop for Dir {
        fn drop(&mut self) {
            let _ = fs::remove_dir_all(&self.0);
        }
    }

    fn temp(name: &str) -> Dir {
        let dir = std::env::temp_dir().join(format!("mimus-guests-{name}-{}", std::process::id()));
        fs::create_dir_all(&dir).unwrap();
        Dir(dir)
    }

    #[test]
    fn what_is_installed_is_checked() {
        let dir = temp("installed");
        let guest = dir.0.join(RISCV64.name);
        fs::create_dir_all(&guest).unwrap();
        assert_eq!(installed(&RISCV64, &dir.0), None);
        fs::write(guest.join("linux"), b"kernel").unwrap();
        fs::write(guest.join("initrd.gz"), b"rd").unwrap();
        let manifest = Manifest {
            packages: vec![],
            files: vec![("linux".into(), 6, String::new()), ("initrd.gz".into(), 2, String::new())],
        };
        fs::write(guest.join(MANIFEST), serde_json::to_vec(&manifest).unwrap()).unwrap();
        assert_eq!(installed(&RISCV64, &dir.0), Some(guest.clone()));
        fs::write(guest.join("linux"), b"ker").unwrap();
        assert_eq!(installed(&RISCV64, &dir.0), None);
    }

    #[test]
    fn files_are_found_by_the_end_of_their_path() {
        let dir = temp("find");
        fs::create_dir_all(dir.0.join("a/riscv64")).unwrap();
        fs::write(dir.0.join("a/riscv64/linux"), b"x").unwrap();
        fs::write(dir.0.join("a/notriscv64linux"), b"x").unwrap();
        assert_eq!(find(&dir.0, "riscv64/linux"), Some(dir.0.join("a/riscv64/linux")));
        assert_eq!(find(&dir.0, "riscv64/initrd.gz"), None);
        assert_eq!(find(&dir.0, "riscv64/lin*"), find(&dir.0, "riscv64/linux"));
        assert_eq!(find(&dir.0, "64/lin*"), None);
    }

    #[test]
    fn atomic_writes_leave_nothing_behind() {
        let dir = temp("atomic");
        write_atomically(&dir.0.join("f"), b"one").unwrap();
        write_atomically(&dir.0.join("f"), b"two").unwrap();
        assert_eq!(fs::read(dir.0.join("f")).unwrap(), b"two");
        assert_eq!(fs::read_dir(&dir.0).unwrap().count(), 1);
    }
}
