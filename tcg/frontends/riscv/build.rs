//! Generates the decoder, the disassembler and the pattern list from `decode/*.decode`.

use mimus_tcg_decode::{Options, Source, generate};
use std::path::Path;

/// In this order: the first defines what the others use.
const TABLES: &[&str] = &[
    "formats.decode",
    "rv64i.decode",
    "rv64m.decode",
    "rv64a.decode",
    "rv64f.decode",
    "rv64d.decode",
    "zb.decode",
    "system.decode",
    "rvc.decode",
];

fn main() {
    if let Err(message) = run() {
        println!("cargo::error={message}");
        std::process::exit(1);
    }
}

fn run() -> Result<(), String> {
    let mut texts = Vec::new();
    for name in TABLES {
        println!("cargo::rerun-if-changed=decode/{name}");
        let path = Path::new("decode").join(name);
        texts.push(std::fs::read_to_string(&path).map_err(|error| format!("{}: {error}", path.display()))?);
    }
    let sources: Vec<Source<'_>> = TABLES.iter().zip(&texts).map(|(name, text)| Source { name, text }).collect();
    let options = Options { extension: "mimus_arch::riscv::Ext", display: "crate::disasm::display" };
    let source = generate(&sources, &options).map_err(|error| format!("decode/{error}"))?;
    let out = std::env::var_os("OUT_DIR").ok_or("OUT_DIR is not set: run me from cargo")?;
    std::fs::write(Path::new(&out).join("decode.rs"), source).map_err(|error| format!("decode.rs: {error}"))
}
