//! The standard extensions, sets of them, and the ISA string.
//!
//! Spec: vol. I, "ISA Extension Naming Conventions" for the order and the syntax of
//! ISA strings; RVA23 profile 1.0 for the names of the small ones.

use serde::{Deserialize, Deserializer, Serialize, Serializer};
use std::fmt;

macro_rules! extensions {
    ($($(#[$doc:meta])* $id:ident = $name:literal => [$($imp:ident),*];)*) => {
        /// A standard extension. Declared in canonical ISA-string order.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
        #[repr(u8)]
        #[allow(missing_docs)]
        pub enum Ext { $($(#[$doc])* $id,)* }

        impl Ext {
            /// Every extension, in canonical ISA-string order.
            pub const ALL: &'static [Ext] = &[$(Ext::$id,)*];

            /// Lower-case name, as in an ISA string and in `-cpu rv64,NAME=on`.
            pub const fn name(self) -> &'static str {
                match self { $(Ext::$id => $name,)* }
            }

            /// The extensions this one directly contains.
            pub const fn implies(self) -> &'static [Ext] {
                match self { $(Ext::$id => &[$(Ext::$imp),*],)* }
            }
        }
    };
}

extensions! {
    I = "i" => [];
    M = "m" => [Zmmul];
    A = "a" => [Zaamo, Zalrsc];
    F = "f" => [Zicsr];
    D = "d" => [F];
    C = "c" => [Zca];
    B = "b" => [Zba, Zbb, Zbs];
    V = "v" => [Zve64d, Zvl128b];
    H = "h" => [];
    Zic64b = "zic64b" => [];
    Zicbom = "zicbom" => [];
    Zicbop = "zicbop" => [];
    Zicboz = "zicboz" => [];
    Ziccamoa = "ziccamoa" => [];
    Ziccif = "ziccif" => [];
    Zicclsm = "zicclsm" => [];
    Ziccrse = "ziccrse" => [];
    Zicfilp = "zicfilp" => [Zicsr];
    Zicfiss = "zicfiss" => [Zicsr, Zimop];
    Zicntr = "zicntr" => [Zicsr];
    Zicond = "zicond" => [];
    Zicsr = "zicsr" => [];
    Zifencei = "zifencei" => [];
    Zihintntl = "zihintntl" => [];
    Zihintpause = "zihintpause" => [];
    Zihpm = "zihpm" => [Zicsr];
    Zimop = "zimop" => [];
    Zmmul = "zmmul" => [];
    Za64rs = "za64rs" => [];
    Zaamo = "zaamo" => [];
    Zabha = "zabha" => [Zaamo];
    Zacas = "zacas" => [Zaamo];
    Zalrsc = "zalrsc" => [];
    Zama16b = "zama16b" => [];
    Zawrs = "zawrs" => [Zalrsc];
    Zfa = "zfa" => [F];
    Zfbfmin = "zfbfmin" => [F];
    Zfh = "zfh" => [Zfhmin];
    Zfhmin = "zfhmin" => [F];
    Zca = "zca" => [];
    Zcb = "zcb" => [Zca];
    Zcd = "zcd" => [Zca, D];
    Zcmop = "zcmop" => [Zca];
    Zba = "zba" => [];
    Zbb = "zbb" => [];
    Zbc = "zbc" => [];
    Zbkb = "zbkb" => [];
    Zbkc = "zbkc" => [];
    Zbkx = "zbkx" => [];
    Zbs = "zbs" => [];
    Zk = "zk" => [Zkn, Zkr, Zkt];
    Zkn = "zkn" => [Zbkb, Zbkc, Zbkx, Zkne, Zknd, Zknh];
    Zknd = "zknd" => [];
    Zkne = "zkne" => [];
    Zknh = "zknh" => [];
    Zkr = "zkr" => [];
    Zks = "zks" => [Zbkb, Zbkc, Zbkx, Zksed, Zksh];
    Zksed = "zksed" => [];
    Zksh = "zksh" => [];
    Zkt = "zkt" => [];
    Ztso = "ztso" => [];
    Zvbb = "zvbb" => [Zvkb];
    Zvbc = "zvbc" => [];
    Zve32f = "zve32f" => [Zve32x, F];
    Zve32x = "zve32x" => [Zicsr, Zvl32b];
    Zve64d = "zve64d" => [Zve64f, D];
    Zve64f = "zve64f" => [Zve64x, Zve32f];
    Zve64x = "zve64x" => [Zve32x, Zvl64b];
    Zvfh = "zvfh" => [Zvfhmin, Zfhmin];
    Zvfhmin = "zvfhmin" => [Zve32f];
    Zvkb = "zvkb" => [];
    Zvkned = "zvkned" => [];
    Zvknha = "zvknha" => [];
    Zvknhb = "zvknhb" => [];
    Zvkg = "zvkg" => [];
    Zvksed = "zvksed" => [];
    Zvksh = "zvksh" => [];
    Zvkt = "zvkt" => [];
    Zvl32b = "zvl32b" => [];
    Zvl64b = "zvl64b" => [Zvl32b];
    Zvl128b = "zvl128b" => [Zvl64b];
    Zvl256b = "zvl256b" => [Zvl128b];
    Smaia = "smaia" => [Ssaia];
    Smcntrpmf = "smcntrpmf" => [];
    Smepmp = "smepmp" => [];
    Smrnmi = "smrnmi" => [];
    Smstateen = "smstateen" => [Ssstateen];
    Ssaia = "ssaia" => [];
    Ssccptr = "ssccptr" => [];
    Sscofpmf = "sscofpmf" => [];
    Sscounterenw = "sscounterenw" => [];
    Ssnpm = "ssnpm" => [];
    Ssstateen = "ssstateen" => [];
    Sstc = "sstc" => [];
    Sstvala = "sstvala" => [];
    Sstvecd = "sstvecd" => [];
    Ssu64xl = "ssu64xl" => [];
    Svade = "svade" => [];
    Svadu = "svadu" => [];
    Svbare = "svbare" => [];
    Svinval = "svinval" => [];
    Svnapot = "svnapot" => [];
    Svpbmt = "svpbmt" => [];
    Svvptc = "svvptc" => [];
}

const _: () = assert!(Ext::ALL.len() <= 128, "Features is a u128");

impl Ext {
    /// The extension called `name` (lower case).
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.iter().copied().find(|e| e.name() == name)
    }

    /// True for the extensions written as one letter.
    pub const fn is_single_letter(self) -> bool {
        self.name().len() == 1
    }
}

/// A set of extensions.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct Features(u128);

impl Features {
    /// No extension.
    pub const EMPTY: Self = Self(0);

    /// The set of exactly these extensions (no implied ones).
    pub const fn of(list: &[Ext]) -> Self {
        let mut bits = 0;
        let mut i = 0;
        while i < list.len() {
            bits |= 1u128 << list[i] as u8;
            i += 1;
        }
        Self(bits)
    }

    /// True if `ext` is in the set.
    pub const fn has(self, ext: Ext) -> bool {
        self.0 >> ext as u8 & 1 != 0
    }

    /// Adds `ext` and everything it contains.
    pub fn enable(&mut self, ext: Ext) {
        if !self.has(ext) {
            self.0 |= 1 << ext as u8;
        }
        for &e in ext.implies() {
            if !self.has(e) {
                self.enable(e);
            }
        }
    }

    /// Removes `ext` and everything that contains it.
    pub fn disable(&mut self, ext: Ext) {
        self.0 &= !(1 << ext as u8);
        for &e in Ext::ALL {
            if self.has(e) && e.implies().contains(&ext) {
                self.disable(e);
            }
        }
    }

    /// The set with everything its members contain, and `B`, `C`+`D` joined up
    /// (`zca`+`d` with `c` gives `zcd`; `zba zbb zbs` give `b`).
    pub fn closed(mut self) -> Self {
        for ext in self.iter() {
            self.enable(ext);
        }
        if self.has(Ext::C) && self.has(Ext::D) {
            self.enable(Ext::Zcd);
        }
        if [Ext::Zba, Ext::Zbb, Ext::Zbs].iter().all(|&e| self.has(e)) {
            self.enable(Ext::B);
        }
        self
    }

    /// Members in canonical order.
    pub fn iter(self) -> impl Iterator<Item = Ext> {
        Ext::ALL.iter().copied().filter(move |&e| self.has(e))
    }

    /// Both sets together.
    pub const fn union(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }

    /// Members of both.
    pub const fn intersection(self, other: Self) -> Self {
        Self(self.0 & other.0)
    }

    /// Members of `self` that are not in `other`.
    pub const fn difference(self, other: Self) -> Self {
        Self(self.0 & !other.0)
    }

    /// True if nothing is in the set.
    pub const fn is_empty(self) -> bool {
        self.0 == 0
    }

    /// `misa`: MXL = 2 and the letters (vol. II, 3.1.1), with S and U.
    pub fn misa(self) -> u64 {
        let letter = |c: u8| 1u64 << (c - b'a');
        let mut misa = 2 << 62 | letter(b's') | letter(b'u');
        for ext in self.iter().filter(|e| e.is_single_letter()) {
            misa |= letter(ext.name().as_bytes()[0]);
        }
        misa
    }

    /// The ISA string, as in the `riscv,isa` property: `rv64imafdc_zicsr_…`.
    pub fn isa_string(self) -> String {
        let mut out = String::from("rv64");
        for ext in self.iter() {
            if !ext.is_single_letter() {
                out.push('_');
            }
            out.push_str(ext.name());
        }
        out
    }

    /// Reads an ISA string (`rv64gc_zba`, case-insensitive, versions such as `2p1`
    /// ignored); `G` is `IMAFD` with Zicsr and Zifencei. Contained extensions are added.
    pub fn parse_isa_string(text: &str) -> Result<Self, IsaStringError> {
        let lower = text.to_ascii_lowercase();
        let rest = lower.strip_prefix("rv64").ok_or(IsaStringError::NotRv64)?;
        let mut set = Self::EMPTY;
        for (index, part) in rest.split('_').enumerate() {
            if part.is_empty() {
                if index == 0 {
                    continue;
                }
                return Err(IsaStringError::Unknown(String::new()));
            }
            parse_part(part, &mut set)?;
        }
        if !set.has(Ext::I) {
            return Err(IsaStringError::NoBase);
        }
        Ok(set.closed())
    }
}

/// One underscore-separated part: letters, then perhaps one long name (`imafdcsstc`
/// is not legal without an underscore, `imafdczba` is not either, but old device
/// trees write `imafdcsu`: `s` and `u` alone mean the modes and are accepted).
fn parse_part(part: &str, set: &mut Features) -> Result<(), IsaStringError> {
    let unknown = || IsaStringError::Unknown(part.to_owned());
    if part.len() > 1 && part.starts_with(['z', 's', 'x']) && part != "su" {
        let name = strip_version(part);
        set.enable(Ext::from_name(name).ok_or_else(unknown)?);
        return Ok(());
    }
    let bytes = part.as_bytes();
    let mut i = 0;
    while i < bytes.len() {
        match bytes[i] {
            b'g' => {
                for e in [Ext::I, Ext::M, Ext::A, Ext::F, Ext::D, Ext::Zicsr, Ext::Zifencei] {
                    set.enable(e);
                }
            }
            b's' | b'u' => {}
            letter => {
                let name = [letter];
                let name = std::str::from_utf8(&name).map_err(|_| unknown())?;
                set.enable(Ext::from_name(name).ok_or_else(unknown)?);
            }
        }
        i += 1;
        while i < bytes.len() && (bytes[i].is_ascii_digit() || is_version_p(bytes, i)) {
            i += 1;
        }
    }
    Ok(())
}

fn is_version_p(bytes: &[u8], i: usize) -> bool {
    bytes[i] == b'p' && i > 0 && bytes[i - 1].is_ascii_digit() && bytes.get(i + 1).is_some_and(u8::is_ascii_digit)
}

/// `zicsr2p0` -> `zicsr`, but `zic64b` stays.
fn strip_version(name: &str) -> &str {
    let end = name.trim_end_matches(|c: char| c.is_ascii_digit());
    match end.strip_suffix('p') {
        Some(head) if end.len() < name.len() && head.ends_with(|c: char| c.is_ascii_digit()) => {
            head.trim_end_matches(|c: char| c.is_ascii_digit())
        }
        _ => name,
    }
}

/// An ISA string that cannot be used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum IsaStringError {
    /// It does not start with `rv64`.
    #[error("ISA string does not start with rv64")]
    NotRv64,
    /// It names no base ISA.
    #[error("ISA string has neither i nor g")]
    NoBase,
    /// It names an extension that is not known.
    #[error("ISA string has unknown extension {0:?}")]
    Unknown(String),
}

impl fmt::Display for Features {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.isa_string())
    }
}

impl fmt::Debug for Features {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.isa_string())
    }
}

/// Saved as the list of names, so that the numbering may change.
impl Serialize for Features {
    fn serialize<S: Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        s.collect_seq(self.iter().map(Ext::name))
    }
}

impl<'de> Deserialize<'de> for Features {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        let names = Vec::<String>::deserialize(d)?;
        let mut set = Self::EMPTY;
        for name in names {
            let ext = Ext::from_name(&name)
                .ok_or_else(|| serde::de::Error::custom(format!("unknown RISC-V extension {name:?}")))?;
            set.0 |= 1 << ext as u8;
        }
        Ok(set)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn isa_string_round_trip() {
        let set = Features::parse_isa_string("rv64gc_zba_sstc").unwrap();
        let text = set.isa_string();
        assert!(text.starts_with("rv64imafdc_zicsr_zifencei_"), "{text}");
        assert_eq!(Features::parse_isa_string(&text).unwrap(), set);
        let versions = Features::parse_isa_string("RV64I2p1MAFDC_zicsr2p0").unwrap();
        assert!(versions.has(Ext::D) && versions.has(Ext::Zicsr));
    }

    #[test]
    fn implied_both_ways() {
        let mut set = Features::parse_isa_string("rv64gc").unwrap();
        set.enable(Ext::B);
        assert!(set.has(Ext::Zbb) && set.has(Ext::Zcd));
        set.disable(Ext::F);
        assert!(!set.has(Ext::D) && !set.has(Ext::Zcd) && set.has(Ext::C));
        set.disable(Ext::Zbb);
        assert!(!set.has(Ext::B) && set.has(Ext::Zba));
    }

    #[test]
    fn misa_letters() {
        let set = Features::parse_isa_string("rv64gc").unwrap();
        assert_eq!(set.misa(), 0x8000_0000_0014_112d);
    }

    #[test]
    fn bad_strings() {
        for bad in ["rv32i", "rv64", "rv64i_zfoo", "rv64i__zba", "rv64iy", "rv64i\u{e9}"] {
            assert!(Features::parse_isa_string(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn saved_by_name() {
        let set = Features::parse_isa_string("rv64gc_zba").unwrap();
        let bytes = rmp_serde::to_vec_named(&set).unwrap();
        assert_eq!(rmp_serde::from_slice::<Features>(&bytes).unwrap(), set);
    }
}
