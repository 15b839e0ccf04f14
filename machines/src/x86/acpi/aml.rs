//! Pieces of AML that definition blocks are made of.
//!
//! Spec: ACPI 6.5 §6.4 (resource descriptors), §19, §20 (AML). The encoding is the
//! `acpi_tables` crate's; here are the shapes the boards share.

use acpi_tables::aml::{
    And, BufferData, CreateDWordField, Device, EISAName, Equal, Field, FieldAccessType, FieldEntry, FieldLockRule,
    FieldUpdateRule, IO, If, Method, Name, OpRegion, OpRegionSpace, Or, Package, Path, ResourceTemplate, Return, Scope,
    Store,
};
pub use acpi_tables::aml::{Arg, Local};
pub use acpi_tables::{Aml, AmlSink};

/// Finished AML.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Code(pub Vec<u8>);

impl Aml for Code {
    fn to_aml_bytes(&self, sink: &mut dyn AmlSink) {
        sink.vec(&self.0);
    }
}

impl Code {
    /// The AML of anything.
    pub fn of(aml: &dyn Aml) -> Self {
        let mut bytes = Vec::new();
        aml.to_aml_bytes(&mut bytes);
        Self(bytes)
    }

    /// One after the other.
    pub fn join(parts: &[Code]) -> Self {
        Self(parts.iter().flat_map(|p| p.0.iter().copied()).collect())
    }
}

fn refs(parts: &[Code]) -> Vec<&dyn Aml> {
    parts.iter().map(|p| p as &dyn Aml).collect()
}

/// The name of an object, for use as a term.
pub fn name(path: &str) -> Code {
    Code::of(&Path::new(path))
}

/// A number in the shortest encoding.
pub fn number(value: u64) -> Code {
    match value {
        0..=0xff => Code::of(&(value as u8)),
        0x100..=0xffff => Code::of(&(value as u16)),
        0x1_0000..=0xffff_ffff => Code::of(&(value as u32)),
        _ => Code::of(&value),
    }
}

/// `Name (path, value)`
pub fn named(path: &str, value: &dyn Aml) -> Code {
    Code::of(&Name::new(path.into(), value))
}

/// A hardware id: an EISA id or, if it has eight characters, a string.
pub fn hid(id: &'static str) -> Code {
    if id.len() == 7 { named("_HID", &EISAName::new(id)) } else { named("_HID", &id) }
}

/// `Device (path) { … }`
pub fn device(path: &str, parts: &[Code]) -> Code {
    Code::of(&Device::new(path.into(), refs(parts)))
}

/// `Scope (path) { … }`
pub fn scope(path: &str, parts: &[Code]) -> Code {
    Code::of(&Scope::new(path.into(), refs(parts)))
}

/// `Method (path, arguments, Serialized) { … }`
pub fn method(path: &str, arguments: u8, parts: &[Code]) -> Code {
    Code::of(&Method::new(path.into(), arguments, true, refs(parts)))
}

/// `If (condition) { … }`
pub fn if_(condition: &dyn Aml, parts: &[Code]) -> Code {
    Code::of(&If::new(condition, refs(parts)))
}

/// `Return (value)`
pub fn return_(value: &dyn Aml) -> Code {
    Code::of(&Return::new(value))
}

/// `target = value`
pub fn store(target: &dyn Aml, value: &dyn Aml) -> Code {
    Code::of(&Store::new(target, value))
}

/// `a == b`
pub fn equal(a: &dyn Aml, b: &dyn Aml) -> Code {
    Code::of(&Equal::new(a, b))
}

/// `a & b`
pub fn and(a: &dyn Aml, b: &dyn Aml) -> Code {
    Code::of(&And::new(&number(0), a, b))
}

/// `target |= value`
pub fn set_bits(target: &dyn Aml, value: u64) -> Code {
    Code::of(&Or::new(target, target, &number(value)))
}

/// `CreateDWordField (buffer, offset, name)`
pub fn dword_field(buffer: &dyn Aml, offset: u64, field: &str) -> Code {
    Code::of(&CreateDWordField::new(&Path::new(field), buffer, &number(offset)))
}

/// `Package () { … }`
pub fn package(parts: &[Code]) -> Code {
    Code::of(&Package::new(refs(parts)))
}

/// A buffer of bytes.
pub fn buffer(bytes: &[u8]) -> Code {
    Code::of(&BufferData::new(bytes.to_vec()))
}

/// `ResourceTemplate () { … }`
pub fn resources(parts: &[Code]) -> Code {
    Code::of(&ResourceTemplate::new(refs(parts)))
}

/// `len` fixed ports from `base`.
pub fn ports(base: u16, len: u8) -> Code {
    Code::of(&IO::new(base, base, 1, len))
}

/// An edge-triggered ISA interrupt (§6.4.2.1).
pub fn irq(number: u8) -> Code {
    let mask = 1u16 << number;
    Code(vec![0x22, mask as u8, (mask >> 8) as u8])
}

/// Interrupts to be had, one of several if there are several (§6.4.3.6): level-triggered
/// and active high, as all emulated ones are.
pub fn interrupts(shared: bool, numbers: &[u32]) -> Code {
    extended_interrupts(1 | u8::from(shared) << 3, numbers)
}

/// An edge-triggered interrupt that is not shared.
pub fn edge_interrupt(number: u32) -> Code {
    extended_interrupts(1 | 1 << 1, &[number])
}

fn extended_interrupts(flags: u8, numbers: &[u32]) -> Code {
    let len = 2 + 4 * numbers.len() as u16;
    let mut out = vec![0x89];
    out.extend(len.to_le_bytes());
    out.extend([flags, numbers.len() as u8]);
    out.extend(numbers.iter().flat_map(|n| n.to_le_bytes()));
    Code(out)
}

/// Where the number is in a template of one interrupt.
pub const INTERRUPT_NUMBER: u64 = 5;

/// An operation region and its fields: name (`None` is padding) and width in bits.
pub fn region(
    path: &str,
    space: OpRegionSpace,
    (base, len): (u64, u64),
    access: FieldAccessType,
    fields: &[(Option<&str>, usize)],
) -> Code {
    let entry = |(name, bits): &(Option<&str>, usize)| match name {
        Some(name) => {
            let mut text = [b'_'; 4];
            text[..name.len()].copy_from_slice(name.as_bytes());
            FieldEntry::Named(text, *bits)
        }
        None => FieldEntry::Reserved(*bits),
    };
    let entries = fields.iter().map(entry).collect();
    let region = Code::of(&OpRegion::new(path.into(), space, &number(base), &number(len)));
    let (lock, update) = (FieldLockRule::NoLock, FieldUpdateRule::Preserve);
    Code::join(&[region, Code::of(&Field::new(path.into(), access, lock, update, entries))])
}
