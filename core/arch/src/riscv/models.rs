//! RISC-V CPU models: `rv64` (the default), `max`, and changes to them.

use super::features::{Ext, Features};
use crate::guest_arch::GuestArch;
use crate::model::{ModelError, hint};
use serde::{Deserialize, Serialize};
use std::fmt;

/// The widest virtual address translation a hart offers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum MmuMode {
    /// 39-bit virtual addresses.
    Sv39,
    /// 48-bit virtual addresses.
    Sv48,
    /// 57-bit virtual addresses.
    Sv57,
}

impl MmuMode {
    /// The name in `mmu-type` device-tree properties, after `riscv,`.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Sv39 => "sv39",
            Self::Sv48 => "sv48",
            Self::Sv57 => "sv57",
        }
    }
}

/// A RISC-V CPU model.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RiscvModel {
    /// Name the user gave.
    pub name: String,
    /// The extensions the hart has.
    pub features: Features,
    /// The extensions the user asked for by name: an accelerator that lacks one
    /// refuses, where it silently drops others of the model.
    pub explicit: Features,
    /// Widest address translation.
    pub mmu: MmuMode,
    /// PMP entries, 0 to 16.
    pub pmp_entries: u8,
    /// Width of a vector register in bits, when V is present.
    pub vlen: u16,
}

use Ext::*;

/// What `rv64` has: RV64GC with the small extensions that current kernels and
/// toolchains look for.
const RV64: &[Ext] = &[
    I,
    M,
    A,
    F,
    D,
    C,
    B,
    Zic64b,
    Zicbom,
    Zicbop,
    Zicboz,
    Ziccamoa,
    Ziccif,
    Zicclsm,
    Ziccrse,
    Zicntr,
    Zicond,
    Zicsr,
    Zifencei,
    Zihintntl,
    Zihintpause,
    Zihpm,
    Zmmul,
    Za64rs,
    Zaamo,
    Zalrsc,
    Zawrs,
    Zfa,
    Zca,
    Zcd,
    Zba,
    Zbb,
    Zbc,
    Zbs,
    Ssccptr,
    Sscounterenw,
    Sstc,
    Sstvala,
    Sstvecd,
    Ssu64xl,
    Svadu,
    Svbare,
    Svinval,
    Svvptc,
];

/// What `max` adds to `rv64`; an accelerator drops what it lacks.
const MAX_EXTRA: &[Ext] = &[
    V, Zacas, Zabha, Zama16b, Zcb, Zcmop, Zimop, Zfh, Zfhmin, Zbkb, Zbkc, Zbkx, Zkn, Zknd, Zkne, Zknh, Zkr, Zks, Zksed,
    Zksh, Zkt, Zk, Zvbb, Zvbc, Zvfh, Zvfhmin, Zvkb, Zvkned, Zvknha, Zvknhb, Zvkg, Zvksed, Zvksh, Zvkt, Smstateen,
    Sscofpmf, Svnapot, Svpbmt,
];

/// The plain models: RV64IMAC and RV64GC with nothing else.
const RV64I: &[Ext] = &[I, Zicsr];
const RV64GC: &[Ext] = &[I, M, A, F, D, C, Zicsr, Zifencei, Zicntr];

/// Names and one-line descriptions, for `-cpu help`.
pub const MODELS: &[(&str, &str)] = &[
    ("rv64", "RV64GC with B, Sstc and the small extensions kernels look for (default)"),
    ("max", "everything the accelerator has"),
    ("rv64gc", "RV64GC with counters, nothing else"),
    ("rv64i", "RV64I with Zicsr, nothing else"),
];

/// Properties other than extensions.
const PROPERTIES: [&str; 3] = ["mmu", "pmp", "vlen"];

impl Default for RiscvModel {
    fn default() -> Self {
        Self::named("rv64", RV64)
    }
}

impl RiscvModel {
    fn named(name: &str, list: &[Ext]) -> Self {
        Self {
            name: name.to_owned(),
            features: Features::of(list).closed(),
            explicit: Features::EMPTY,
            mmu: MmuMode::Sv57,
            pmp_entries: 16,
            vlen: 128,
        }
    }

    fn by_name(name: &str) -> Result<Self, ModelError> {
        match name {
            "rv64" => Ok(Self::default()),
            "max" => {
                let all = Features::of(RV64).union(Features::of(MAX_EXTRA)).closed();
                Ok(Self { features: all, ..Self::named("max", &[]) })
            }
            "rv64gc" => Ok(Self::named(name, RV64GC)),
            "rv64i" => Ok(Self::named(name, RV64I)),
            _ => Err(ModelError::UnknownModel {
                name: name.to_owned(),
                arch: GuestArch::Riscv64,
                hint: hint(name, MODELS.iter().map(|m| m.0)),
                known: MODELS.iter().map(|m| m.0).collect::<Vec<_>>().join(", "),
            }),
        }
    }

    /// Parses `name[,feature=on|off][,mmu=sv39|sv48|sv57][,pmp=0..16][,vlen=BITS]`.
    /// `feature` alone, `+feature` and `-feature` are accepted too.
    pub fn parse(text: &str) -> Result<Self, ModelError> {
        let mut parts = text.split(',');
        let mut model = Self::by_name(parts.next().unwrap_or_default())?;
        for part in parts {
            let (key, value) = match part.split_once('=') {
                Some(pair) => pair,
                None => match part.strip_prefix('-') {
                    Some(key) => (key, "off"),
                    None => (part.strip_prefix('+').unwrap_or(part), "on"),
                },
            };
            model.set(key, value)?;
        }
        model.check()?;
        Ok(model)
    }

    fn set(&mut self, key: &str, value: &str) -> Result<(), ModelError> {
        let bad = |expected| ModelError::BadValue {
            model: self.name.clone(),
            feature: key.to_owned(),
            value: value.to_owned(),
            expected,
        };
        match key {
            "mmu" => {
                self.mmu = [MmuMode::Sv39, MmuMode::Sv48, MmuMode::Sv57]
                    .into_iter()
                    .find(|m| m.name() == value)
                    .ok_or_else(|| bad("sv39, sv48 or sv57"))?;
            }
            "pmp" => {
                self.pmp_entries = value.parse().ok().filter(|&n| n <= 16).ok_or_else(|| bad("0 to 16"))?;
            }
            "vlen" => {
                self.vlen = value
                    .parse()
                    .ok()
                    .filter(|n: &u16| n.is_power_of_two() && (128..=1024).contains(n))
                    .ok_or_else(|| bad("a power of two from 128 to 1024"))?;
            }
            _ => {
                let ext = Ext::from_name(key).ok_or_else(|| ModelError::UnknownFeature {
                    model: self.name.clone(),
                    feature: key.to_owned(),
                    hint: hint(key, Ext::ALL.iter().map(|e| e.name()).chain(PROPERTIES)),
                })?;
                match value {
                    "on" | "true" | "yes" => {
                        self.features.enable(ext);
                        self.explicit = self.explicit.union(Features::of(&[ext]));
                    }
                    "off" | "false" | "no" => {
                        self.features.disable(ext);
                        self.explicit = self.explicit.difference(Features::of(&[ext]));
                    }
                    _ => return Err(bad("on or off")),
                }
            }
        }
        Ok(())
    }

    fn check(&mut self) -> Result<(), ModelError> {
        if !self.features.has(I) {
            return Err(ModelError::Conflict {
                model: self.name.clone(),
                reason: "the base ISA i cannot be off".to_owned(),
            });
        }
        let lost = self.explicit.difference(self.features);
        if let Some(ext) = lost.iter().next() {
            return Err(ModelError::Conflict {
                model: self.name.clone(),
                reason: format!("{0} was asked for, but something {0} needs is off", ext.name()),
            });
        }
        self.features = self.features.closed();
        Ok(())
    }

    /// Keeps what `supported` has. Fails with the first extension that was asked for
    /// by name and is not supported.
    pub fn restricted_to(&self, supported: Features) -> Result<Self, ModelError> {
        let missing = self.explicit.difference(supported);
        if let Some(ext) = missing.iter().next() {
            return Err(ModelError::Conflict {
                model: self.name.clone(),
                reason: format!("the accelerator has no {}: leave it out", ext.name()),
            });
        }
        let mut out = self.clone();
        for ext in self.features.difference(supported).iter() {
            out.features.disable(ext);
        }
        Ok(out)
    }
}

impl fmt::Display for RiscvModel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ({}, {})", self.name, self.features, self.mmu.name())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn models_and_changes() {
        let m = RiscvModel::parse("rv64").unwrap();
        assert!(m.features.has(Zbb) && m.features.has(B) && !m.features.has(V));
        let m = RiscvModel::parse("rv64,zba=false,mmu=sv39,pmp=0").unwrap();
        assert!(!m.features.has(Zba) && !m.features.has(B) && m.features.has(Zbb));
        assert_eq!((m.mmu, m.pmp_entries), (MmuMode::Sv39, 0));
        let m = RiscvModel::parse("max,-v").unwrap();
        assert!(!m.features.has(V));
        for (name, _) in MODELS {
            RiscvModel::parse(name).unwrap();
        }
    }

    #[test]
    fn mistakes_are_explained() {
        let text = |s: &str| RiscvModel::parse(s).unwrap_err().to_string();
        assert!(text("rv46").contains("did you mean \"rv64\""), "{}", text("rv46"));
        assert!(text("rv64,zbx=on").contains("did you mean"), "{}", text("rv64,zbx=on"));
        assert!(text("rv64,zba=maybe").contains("on or off"));
        assert!(text("rv64,pmp=17").contains("0 to 16"));
        assert!(text("rv64,i=off").contains("base ISA"));
        assert!(text("rv64,d=on,f=off").contains("d was asked for"));
        assert!(text("").contains("unknown CPU model"));
    }

    #[test]
    fn restriction_drops_or_refuses() {
        let supported = Features::parse_isa_string("rv64gc").unwrap();
        let m = RiscvModel::parse("max").unwrap().restricted_to(supported).unwrap();
        assert!(m.features.has(D) && !m.features.has(V) && !m.features.has(Zbb));
        let err = RiscvModel::parse("rv64,zbb=on").unwrap().restricted_to(supported).unwrap_err();
        assert!(err.to_string().contains("no zbb"));
    }
}
