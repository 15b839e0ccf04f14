//! The tables in memory.

use crate::Error;

/// Where something is defined, for messages.
#[derive(Clone, Debug)]
pub struct Place {
    pub file: String,
    pub line: usize,
}

impl Place {
    /// An error here.
    pub fn error(&self, message: impl Into<String>) -> Error {
        Error { file: self.file.clone(), line: self.line, message: message.into() }
    }
}

/// Contiguous bits of an encoding.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Part {
    pub lsb: u32,
    pub len: u32,
    pub signed: bool,
}

/// A value gathered from an encoding.
#[derive(Clone, Debug)]
pub struct Field {
    pub name: String,
    pub place: Place,
    /// Most significant first.
    pub parts: Vec<Part>,
    pub shift: u32,
    pub add: i32,
}

impl Field {
    /// The bits of the encoding it reads.
    pub fn mask(&self) -> u32 {
        self.parts.iter().fold(0, |mask, part| mask | ones(part.len) << part.lsb)
    }
}

/// The lowest `len` bits set (`len` ≤ 32).
pub fn ones(len: u32) -> u32 {
    if len >= 32 { u32::MAX } else { (1 << len) - 1 }
}

/// An argument and the function that displays it.
#[derive(Clone, Debug)]
pub struct Arg {
    pub name: String,
    pub kind: String,
}

/// An argument set.
#[derive(Clone, Debug)]
pub struct ArgSet {
    pub name: String,
    pub place: Place,
    pub args: Vec<Arg>,
}

/// Fixed bits, field bits and ignored bits of an encoding.
#[derive(Clone, Copy, Debug, Default)]
pub struct Bits {
    /// 16 or 32.
    pub width: u32,
    pub mask: u32,
    pub value: u32,
    /// Bits written `.`: some field has to read them.
    pub field: u32,
}

/// Where an argument's value comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Value {
    /// Index in [`Tables::fields`].
    Field(usize),
    Const(i32),
}

/// A format: bits, argument set, and values of some arguments.
#[derive(Clone, Debug)]
pub struct Format {
    pub name: String,
    pub place: Place,
    pub bits: Bits,
    /// Index in [`Tables::sets`].
    pub set: Option<usize>,
    pub assigns: Vec<(String, Value)>,
}

/// A piece of a display text.
#[derive(Clone, Debug)]
pub enum Piece {
    Text(String),
    /// Argument name and the function that displays it.
    Arg {
        name: String,
        kind: String,
    },
}

/// An instruction encoding.
#[derive(Clone, Debug)]
pub struct Pattern {
    pub place: Place,
    pub method: String,
    pub mnemonic: String,
    pub bits: Bits,
    pub set: Option<usize>,
    /// In the set's order.
    pub values: Vec<Value>,
    pub extensions: Vec<String>,
    pub display: Vec<Piece>,
    /// Patterns with the same number are one group.
    pub unit: usize,
}

impl Pattern {
    /// Whether it is an encoding that must not decode.
    pub fn reserved(&self) -> bool {
        self.method == "illegal"
    }

    /// Whether some encoding matches both.
    pub fn overlaps(&self, other: &Pattern) -> bool {
        self.bits.width == other.bits.width
            && self.bits.mask & other.bits.mask & (self.bits.value ^ other.bits.value) == 0
    }

    /// Whether every encoding that matches `other` matches `self`.
    pub fn covers(&self, other: &Pattern) -> bool {
        self.overlaps(other) && self.bits.mask & !other.bits.mask == 0
    }
}

/// Everything read.
#[derive(Clone, Debug, Default)]
pub struct Tables {
    pub fields: Vec<Field>,
    pub sets: Vec<ArgSet>,
    pub formats: Vec<Format>,
    pub patterns: Vec<Pattern>,
    /// Names used, for the check of what is not.
    pub used_formats: Vec<bool>,
}
