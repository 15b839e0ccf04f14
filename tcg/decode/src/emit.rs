//! Writes the Rust source.

use crate::Options;
use crate::model::*;
use crate::tree::{self, Node};
use std::collections::{BTreeMap, HashMap};
use std::fmt::Write;

/// The source of the decoder for checked tables.
pub fn emit(tables: &Tables, options: &Options<'_>) -> String {
    let mut emitter = Emitter { tables, options, out: String::new(), extractors: HashMap::new() };
    emitter.args();
    emitter.extractors();
    emitter.translate_trait();
    emitter.pattern_table();
    for width in [32, 16] {
        emitter.entry(width, Leaf::Decode);
        emitter.entry(width, Leaf::Find);
    }
    emitter.formatters();
    emitter.out
}

/// What the leaves of a tree do.
#[derive(Clone, Copy, PartialEq)]
enum Leaf {
    /// Call the trait's method.
    Decode,
    /// Return the pattern.
    Find,
}

struct Emitter<'a> {
    tables: &'a Tables,
    options: &'a Options<'a>,
    out: String,
    /// Argument set and values to the number of the function that gathers them.
    extractors: HashMap<(usize, Vec<Value>), usize>,
}

/// Writing to a `String` cannot fail.
macro_rules! put {
    ($out:expr, $($arg:tt)*) => {{ let _ = writeln!($out, $($arg)*); }};
}

impl Emitter<'_> {
    fn args(&mut self) {
        for set in &self.tables.sets {
            put!(self.out, "/// Arguments of the operations that use `&{}`.", set.name);
            put!(self.out, "#[derive(Clone, Copy, PartialEq, Eq, Debug)]");
            put!(self.out, "pub struct {} {{", struct_name(&set.name));
            for arg in &set.args {
                put!(self.out, "    pub {}: i32,", arg.name);
            }
            put!(self.out, "}}");
        }
    }

    fn extractors(&mut self) {
        for pattern in &self.tables.patterns {
            let Some(set) = pattern.set else { continue };
            let next = self.extractors.len();
            let key = (set, pattern.values.clone());
            if self.extractors.contains_key(&key) {
                continue;
            }
            self.extractors.insert(key, next);
            let (set, name) = (&self.tables.sets[set], struct_name(&self.tables.sets[set].name));
            put!(self.out, "#[inline(always)]");
            put!(self.out, "fn extract{next}(insn: u32) -> {name} {{");
            put!(self.out, "    {name} {{");
            for (arg, value) in set.args.iter().zip(&pattern.values) {
                put!(self.out, "        {}: {},", arg.name, self.value(*value));
            }
            put!(self.out, "    }}\n}}");
        }
    }

    fn value(&self, value: Value) -> String {
        let field = match value {
            Value::Const(value) => return value.to_string(),
            Value::Field(index) => &self.tables.fields[index],
        };
        let mut text = String::new();
        for (index, Part { lsb, len, signed }) in field.parts.iter().copied().enumerate() {
            let bits = if signed {
                format!("((insn << {}) as i32 >> {})", 32 - lsb - len, 32 - len)
            } else {
                format!("((insn >> {lsb} & {:#x}) as i32)", ones(len))
            };
            text = if index == 0 { bits } else { format!("({text} << {len} | {bits})") };
        }
        if field.shift != 0 {
            text = format!("({text} << {})", field.shift);
        }
        if field.add != 0 {
            text = format!("{text} + {}", field.add);
        }
        text
    }

    fn translate_trait(&mut self) {
        let mut methods: BTreeMap<&str, &Pattern> = BTreeMap::new();
        for pattern in self.tables.patterns.iter().filter(|p| !p.reserved()) {
            methods.entry(&pattern.method).or_insert(pattern);
        }
        put!(self.out, "/// One method per operation; each returns whether the instruction is legal.");
        put!(self.out, "pub trait Translate {{");
        put!(self.out, "    /// Whether the guest has the extension.");
        put!(self.out, "    fn has(&self, extension: {}) -> bool;", self.options.extension);
        for (name, pattern) in methods {
            put!(self.out, "    /// `{}`", pattern.mnemonic);
            match pattern.set {
                None => put!(self.out, "    fn {name}(&mut self) -> bool;"),
                Some(set) => {
                    let set = struct_name(&self.tables.sets[set].name);
                    put!(self.out, "    fn {name}(&mut self, args: {set}) -> bool;");
                }
            }
        }
        put!(self.out, "}}");
    }

    fn pattern_table(&mut self) {
        let extension = self.options.extension;
        put!(self.out, "/// An instruction encoding.");
        put!(self.out, "#[derive(Clone, Copy, PartialEq, Eq, Debug)]");
        put!(self.out, "pub struct Pattern {{");
        for (field, doc) in [
            ("name: &'static str", "Mnemonic; empty for an encoding that must not decode."),
            ("method: &'static str", "Method of [`Translate`] that it calls, or `illegal`."),
            ("width: u8", "16 or 32 bits."),
            ("mask: u32", "Fixed bits."),
            ("value: u32", "Their values."),
            ("group: u16", "Patterns of one number may overlap: the first that matches counts."),
            ("reserved: bool", "Whether the encoding must not decode."),
        ] {
            put!(self.out, "    /// {doc}\n    pub {field},");
        }
        put!(self.out, "    /// Extensions it needs, all of them.\n    pub extensions: &'static [{extension}],");
        put!(self.out, "    /// Index in [`PATTERNS`].\n    pub index: u16,\n}}");
        put!(self.out, "/// Every pattern of the tables, in order.");
        put!(self.out, "pub static PATTERNS: &[Pattern] = &[");
        for (index, p) in self.tables.patterns.iter().enumerate() {
            let Bits { width, mask, value, .. } = p.bits;
            let list: Vec<String> = p.extensions.iter().map(|name| format!("{extension}::{name}")).collect();
            put!(
                self.out,
                "    Pattern {{ name: {:?}, method: {:?}, width: {width}, mask: {mask:#x}, value: {value:#x}, \
                 group: {}, reserved: {}, extensions: &[{}], index: {index} }},",
                p.mnemonic,
                p.method,
                p.unit,
                p.reserved(),
                list.join(", ")
            );
        }
        put!(self.out, "];");
    }

    /// `decodeN` or `findN`.
    fn entry(&mut self, width: u32, leaf: Leaf) {
        match leaf {
            Leaf::Decode => {
                put!(self.out, "/// Calls the method of `t` for the instruction; false if it is not legal.");
                put!(self.out, "pub fn decode{width}<T: Translate>(t: &mut T, insn: u{width}) -> bool {{");
            }
            Leaf::Find => {
                let extension = self.options.extension;
                put!(self.out, "/// The pattern that `insn` matches on a guest that `has` given extensions.");
                put!(
                    self.out,
                    "pub fn find{width}(insn: u{width}, has: impl Fn({extension}) -> bool) -> \
                     Option<&'static Pattern> {{"
                );
            }
        }
        if width == 16 {
            put!(self.out, "    let insn = u32::from(insn);");
        }
        let units = tree::units(&self.tables.patterns, width);
        if !units.is_empty() {
            self.node(&tree::build(units, 0), 1, leaf);
        }
        put!(self.out, "    {}\n}}", if leaf == Leaf::Decode { "false" } else { "None" });
    }

    fn node(&mut self, node: &Node, depth: usize, leaf: Leaf) {
        let pad = "    ".repeat(depth);
        match node {
            Node::Leaf { mask, value, patterns } => {
                if *mask == 0 {
                    self.leaf(patterns, &pad, leaf);
                } else {
                    put!(self.out, "{pad}if insn & {mask:#x} == {value:#x} {{");
                    self.leaf(patterns, &format!("{pad}    "), leaf);
                    put!(self.out, "{pad}}}");
                }
            }
            Node::Any(nodes) => nodes.iter().for_each(|node| self.node(node, depth, leaf)),
            Node::Switch { mask, cases } => {
                // A contiguous mask is shifted down, so that the compiler can make a jump table.
                let low = mask.trailing_zeros();
                let contiguous = (mask >> low).wrapping_add(1).is_power_of_two() || mask >> low == u32::MAX;
                let shift = if contiguous { low } else { 0 };
                put!(self.out, "{pad}match insn >> {shift} & {:#x} {{", mask >> shift);
                for (value, node) in cases {
                    put!(self.out, "{pad}    {:#x} => {{", value >> shift);
                    self.node(node, depth + 2, leaf);
                    put!(self.out, "{pad}    }}");
                }
                put!(self.out, "{pad}    _ => {{}}\n{pad}}}");
            }
        }
    }

    /// The patterns of a unit, tried in order; the tree has not tested what only some of them fix.
    fn leaf(&mut self, patterns: &[usize], pad: &str, leaf: Leaf) {
        let receiver = if leaf == Leaf::Decode { "t." } else { "" };
        for &index in patterns {
            let pattern = &self.tables.patterns[index];
            let mut tests: Vec<String> = Vec::new();
            if patterns.len() > 1 {
                let Bits { mask, value, .. } = pattern.bits;
                tests.push(format!("insn & {mask:#x} == {value:#x}"));
            }
            for name in &pattern.extensions {
                tests.push(format!("{receiver}has({}::{name})", self.options.extension));
            }
            let result = self.result(index, leaf);
            if tests.is_empty() {
                put!(self.out, "{pad}return {result};");
            } else {
                put!(self.out, "{pad}if {} {{\n{pad}    return {result};\n{pad}}}", tests.join(" && "));
            }
        }
    }

    fn result(&self, index: usize, leaf: Leaf) -> String {
        let pattern = &self.tables.patterns[index];
        match (leaf, pattern.set) {
            (Leaf::Decode, _) if pattern.reserved() => "false".to_owned(),
            (Leaf::Find, _) if pattern.reserved() => "None".to_owned(),
            (Leaf::Find, _) => format!("Some(&PATTERNS[{index}])"),
            (Leaf::Decode, None) => format!("t.{}()", pattern.method),
            (Leaf::Decode, Some(set)) => {
                let extractor = self.extractors[&(set, pattern.values.clone())];
                format!("t.{}(extract{extractor}(insn))", pattern.method)
            }
        }
    }

    fn formatters(&mut self) {
        let display = self.options.display;
        put!(self.out, "/// Appends the disassembly of `insn`, which matches `pattern`, at address `pc`.");
        put!(self.out, "pub fn format(pattern: &Pattern, out: &mut String, insn: u32, pc: u64) {{");
        put!(self.out, "    match pattern.index {{");
        for (index, pattern) in self.tables.patterns.iter().enumerate().filter(|(_, p)| !p.reserved()) {
            put!(self.out, "        {index} => {{");
            if pattern.display.iter().any(|piece| matches!(piece, Piece::Arg { .. }))
                && let Some(set) = pattern.set
            {
                let extractor = self.extractors[&(set, pattern.values.clone())];
                put!(self.out, "            let args = extract{extractor}(insn);");
            }
            for piece in &pattern.display {
                match piece {
                    Piece::Text(text) => {
                        put!(self.out, "            out.push_str({text:?});");
                    }
                    Piece::Arg { name, kind } => {
                        put!(self.out, "            {display}::{kind}(out, i64::from(args.{name}), pc);");
                    }
                }
            }
            put!(self.out, "        }}");
        }
        put!(self.out, "        _ => {{}}\n    }}\n}}");
    }
}

/// `r_rm` to `ArgsRRm`.
fn struct_name(set: &str) -> String {
    let mut name = String::from("Args");
    for word in set.split('_') {
        let mut chars = word.chars();
        name.extend(chars.next().map(|c| c.to_ascii_uppercase()));
        name.push_str(chars.as_str());
    }
    name
}
