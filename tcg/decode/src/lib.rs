//! Decode tables to decoder, disassembler and encoding sweeps, at build time.
//!
//! A frontend for an instruction set with fixed-width encodings describes them in `*.decode` files, one line
//! per instruction, and calls [`generate`] from its `build.rs`. The notation follows the idea of QEMU's
//! documented decodetree, extended with what a disassembler and a feature gate need. Semantics are not part
//! of it: the generated trait has one method per operation and no default, so that the compiler asks for
//! what is missing.
//!
//! # Notation
//!
//! `#` starts a comment. A line is one of:
//!
//! * `extension NAME …`: the patterns that follow need every named extension.
//! * `%field PART… [<<N] [+N]`: a value gathered from the encoding. A part is `LSB:LEN` (`LSB:sLEN` where the
//!   value is signed, first part only); the first part is the most significant. `<<N` appends zero bits,
//!   `+N` adds a constant.
//! * `&set arg[:kind] …`: an argument set; it becomes a struct of `i32`s. `kind` names the function that
//!   displays the argument (default `dec`).
//! * `@format BITS… &set ASSIGN…`: what several patterns share.
//! * `method BITS… [@format] [&set] ASSIGN… : DISPLAY`: an instruction. `method` is the trait's method;
//!   several patterns may use one method if they use one argument set. The method name `illegal` is reserved
//!   for encodings that must not decode. `DISPLAY` is the mnemonic, then the operands with `{arg}` or
//!   `{arg:kind}` in them.
//! * `{` and `}` around patterns that overlap on purpose: the first whose bits match and whose extensions
//!   are present is taken.
//!
//! `BITS` are characters `0`, `1`, `.` (in a field) and `-` (ignored), most significant first, 16 or 32 in
//! all. `ASSIGN` is `%field` (to the argument of that name), `arg=%field` or `arg=NUMBER`.
//!
//! # Checks
//!
//! Overlaps outside groups, patterns that can never match, `.` bits that no field reads, arguments without a
//! value, one method with two argument sets, and fields, sets or formats that nothing uses are errors.
#![forbid(unsafe_code)]

mod check;
mod emit;
mod model;
mod parse;
mod tree;

use std::fmt;

/// What the generated source refers to.
#[derive(Clone, Copy, Debug)]
pub struct Options<'a> {
    /// Path of the enum of extensions; its variants are named as in the tables.
    pub extension: &'a str,
    /// Path of the module with the display functions: `fn kind(out: &mut String, value: i64, pc: u64)`.
    pub display: &'a str,
}

/// A table file: the name to report errors with, and its text.
#[derive(Clone, Copy, Debug)]
pub struct Source<'a> {
    pub name: &'a str,
    pub text: &'a str,
}

/// What is wrong with a table, and where.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Error {
    /// File name as given in [`Source`].
    pub file: String,
    /// Line, from 1.
    pub line: usize,
    /// What is wrong and what to do instead.
    pub message: String,
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}: {}", self.file, self.line, self.message)
    }
}

impl std::error::Error for Error {}

/// Reads the tables and writes the Rust source of the decoder. Names are shared by all files; a name is
/// defined before it is used.
///
/// The source defines, for a module to `include!`:
/// * a struct `Args…` per argument set;
/// * `trait Translate`, with `fn has(&self, Extension) -> bool` and a method per operation, which returns
///   whether the instruction is legal;
/// * `fn decode32(t, u32) -> bool` and `fn decode16(t, u16) -> bool`: call the method for an encoding; false
///   if there is none or it said so;
/// * `struct Pattern`, `PATTERNS`, and `fn find32`/`find16(insn, has) -> Option<&'static Pattern>`;
/// * `fn format(pattern, out, insn, pc)`: the disassembly.
///
/// # Errors
/// The first thing that is wrong with the tables.
pub fn generate(sources: &[Source<'_>], options: &Options<'_>) -> Result<String, Error> {
    let tables = parse::parse(sources)?;
    check::check(&tables)?;
    Ok(emit::emit(&tables, options))
}
