//! `-accel tcg,perfmap=on`: what generated code is, for `perf report` (Linux `tools/perf/Documentation/jit-interface.txt`).
//!
//! A line for each block: where its code is, how long it is, the guest's address and, if known, its name there, and whether it is
//! compact or hot. Code that has been withdrawn stays in the list; after the code cache was emptied, addresses are there twice.

use std::fs::{File, OpenOptions};
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::sync::{Mutex, OnceLock, PoisonError};

use mimus_core::accel::Names;
use mimus_tcg_ir::backend::Hints;

/// The file that `perf` looks for.
pub(crate) struct PerfMap {
    file: Mutex<File>,
    names: OnceLock<Names>,
}

impl PerfMap {
    /// Makes the file, with the stubs in it.
    ///
    /// # Errors
    /// One line: why it cannot be written.
    pub fn new(code_base: usize, stubs: usize) -> Result<PerfMap, String> {
        let path = format!("/tmp/perf-{}.map", std::process::id());
        // Left by another process that had this number; never followed if it is a link.
        let _ = std::fs::remove_file(&path);
        let file = OpenOptions::new().write(true).create_new(true).mode(0o644).open(&path);
        let file =
            file.map_err(|e| format!("perfmap: cannot create {path}: {e}; remove it, or leave perfmap=on out"))?;
        let map = PerfMap { file: Mutex::new(file), names: OnceLock::new() };
        map.line(code_base, stubs, "mimus stubs");
        Ok(map)
    }

    /// Blocks from now on have names. The first call counts.
    pub fn set_names(&self, names: Names) {
        let _ = self.names.set(names);
    }

    /// A block of the guest's code at `va` runs at `host`, made as `hints` say.
    pub fn block(&self, va: u64, host: usize, len: usize, hints: &Hints) {
        let kind = match hints {
            Hints { compact: true, .. } => " compact",
            Hints { hot: true, .. } => " hot",
            _ => "",
        };
        let name = match self.names.get().and_then(|names| names(va)) {
            Some(name) => format!("guest {name} {va:#x}{kind}"),
            None => format!("guest {va:#x}{kind}"),
        };
        self.line(host, len, &name);
    }

    fn line(&self, host: usize, len: usize, name: &str) {
        let text = format!("{host:x} {len:x} {name}\n");
        let mut file = self.file.lock().unwrap_or_else(PoisonError::into_inner);
        if let Err(e) = file.write_all(text.as_bytes()) {
            log::debug!("perfmap: {e}");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;

    #[test]
    fn blocks_have_lines() {
        let map = PerfMap::new(0x1000, 64).unwrap();
        map.block(0x8000_0000, 0x1100, 32, &Hints { compact: true, ..Hints::default() });
        map.set_names(Arc::new(|at| (at == 0x8000_0010).then(|| "start+0x10".to_owned())));
        map.block(0x8000_0010, 0x1200, 16, &Hints::default());
        let path = format!("/tmp/perf-{}.map", std::process::id());
        let text = std::fs::read_to_string(&path).unwrap();
        std::fs::remove_file(&path).unwrap();
        assert_eq!(
            text,
            "1000 40 mimus stubs\n1100 20 guest 0x80000000 compact\n1200 10 guest start+0x10 0x80000010\n"
        );
    }
}
