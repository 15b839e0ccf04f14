//! An error of the host side that names what was being done.

use std::io;
use std::path::Path;

/// The host refused something.
#[derive(Debug, thiserror::Error)]
#[error("cannot {what}: {source}")]
pub struct HostError {
    /// What was being done: "open disk.img", "start thread io-0".
    pub what: String,
    /// What the host said.
    pub source: io::Error,
}

impl HostError {
    /// For `map_err`.
    pub fn new(what: impl Into<String>, source: impl Into<io::Error>) -> Self {
        Self { what: what.into(), source: source.into() }
    }
}

/// Why the file at `path` cannot be made, and what to do about it.
pub fn why_not_made(path: &Path, error: &io::Error) -> String {
    let directory = match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    let name = directory.display();
    match error.kind() {
        io::ErrorKind::NotFound if !directory.exists() => {
            format!("there is no directory {name}; make it (mkdir -p {name}) or name another")
        }
        io::ErrorKind::NotADirectory => format!("{name} is no directory; name a file in one"),
        io::ErrorKind::IsADirectory => format!("{} is a directory; name a file in it", path.display()),
        io::ErrorKind::PermissionDenied | io::ErrorKind::ReadOnlyFilesystem => {
            format!("it cannot be written ({error}); name a file in a directory that you may write to")
        }
        io::ErrorKind::StorageFull => format!("{error}; free some space, or name a file on a larger disk"),
        _ => error.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_that_cannot_be_made() {
        let dir = tempfile::tempdir().unwrap();
        let (missing, file) = (dir.path().join("none"), dir.path().join("file"));
        std::fs::write(&file, "").unwrap();
        for (path, says) in [
            (
                missing.join("out"),
                format!("there is no directory {0}; make it (mkdir -p {0}) or name another", missing.display()),
            ),
            (file.join("out"), format!("{} is no directory; name a file in one", file.display())),
            (dir.path().to_owned(), format!("{} is a directory; name a file in it", dir.path().display())),
        ] {
            let error = std::fs::File::create(&path).unwrap_err();
            assert_eq!(why_not_made(&path, &error), says);
        }
    }
}
