//! CPU models of x86: `-cpu NAME,+feature,-feature,feature=on|off`.

use super::features::{CpuidFeature, X86Features};
use super::model_table::{BASE, LONG, MODELS, Named};
use crate::guest_arch::GuestArch;
use crate::model::{ModelError, hint};
use serde::{Deserialize, Serialize};
use std::fmt;

/// Who made the processor, as CPUID leaf 0 says.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Vendor {
    /// `GenuineIntel`.
    Intel,
    /// `AuthenticAMD`.
    Amd,
}

impl Vendor {
    /// The 12 characters CPUID gives in EBX, EDX, ECX.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Intel => "GenuineIntel",
            Self::Amd => "AuthenticAMD",
        }
    }
}

/// An x86 CPU model with its features settled, as the user asked for it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct X86Model {
    /// Name the user gave.
    pub name: String,
    /// [`GuestArch::X86_64`] or [`GuestArch::I386`].
    pub arch: GuestArch,
    /// Identity and features are the host's: `host`. The accelerator fills them in.
    pub host: bool,
    /// All that the accelerator has: `max` (and `host`).
    pub all: bool,
    /// CPUID vendor.
    pub vendor: Vendor,
    /// Family, as displayed (base plus extended).
    pub family: u16,
    /// Model, as displayed.
    pub model: u8,
    /// Stepping.
    pub stepping: u8,
    /// Brand string, at most 47 characters.
    pub brand: String,
    /// The features it has.
    pub features: X86Features,
    /// The features the user turned on by name: an accelerator that lacks one refuses,
    /// where it drops others of the model with a warning.
    pub explicit: X86Features,
    /// The features the user turned off by name; they stay off in `host` and `max`.
    pub disabled: X86Features,
    /// Width of physical addresses; 0: as the accelerator has.
    pub phys_bits: u8,
    /// The hypervisor's signature leaves (0x4000_0000) are shown.
    pub kvm: bool,
    /// A missing feature is an error, even if the model brought it (`enforce`).
    pub enforce: bool,
}

/// Models that are what the accelerator has.
const SPECIAL: [(&str, &str); 2] = [
    ("max", "everything the accelerator has (default with the translator, without la57 and smap)"),
    ("host", "the host's own processor (KVM only)"),
];

/// Options of a model other than features.
const PROPERTIES: [&str; 3] = ["phys-bits", "kvm", "enforce"];

impl X86Model {
    /// Names and one-line descriptions, for `-cpu help`.
    pub fn list() -> impl Iterator<Item = (&'static str, &'static str)> {
        MODELS.iter().map(|m| (m.name, m.summary)).chain(SPECIAL)
    }

    /// The features that every 64-bit processor has.
    pub fn base64() -> X86Features {
        X86Features::of(BASE).union(X86Features::of(LONG))
    }

    /// The model when no `-cpu` is given and the accelerator has no wish.
    pub fn default_for(arch: GuestArch) -> Self {
        let name = if arch == GuestArch::I386 { "qemu32" } else { "qemu64" };
        let named = MODELS.iter().find(|m| m.name == name);
        Self::from_named(arch, named.unwrap_or(&MODELS[0]))
    }

    fn from_named(arch: GuestArch, m: &Named) -> Self {
        Self {
            name: m.name.to_owned(),
            arch,
            host: false,
            all: false,
            vendor: m.vendor,
            family: m.family,
            model: m.model,
            stepping: m.stepping,
            brand: m.brand.to_owned(),
            features: m.features(),
            explicit: X86Features::EMPTY,
            disabled: X86Features::EMPTY,
            phys_bits: 0,
            kvm: true,
            enforce: false,
        }
    }

    fn by_name(arch: GuestArch, name: &str) -> Result<Self, ModelError> {
        // Names are told apart without regard to case, as users write them.
        if let Some(m) = MODELS.iter().find(|m| m.name.eq_ignore_ascii_case(name)) {
            return Ok(Self::from_named(arch, m));
        }
        if SPECIAL.iter().any(|(n, _)| *n == name) {
            let base = Self::default_for(arch);
            let (host, all) = (name == "host", true);
            return Ok(Self { name: name.to_owned(), host, all, ..base });
        }
        Err(ModelError::UnknownModel {
            name: name.to_owned(),
            arch,
            hint: hint(name, Self::list().map(|m| m.0)),
            known: Self::list().map(|m| m.0).collect::<Vec<_>>().join(", "),
        })
    }

    /// Parses `name[,+feature][,-feature][,feature=on|off][,phys-bits=N][,kvm=on|off][,enforce]`.
    pub fn parse(arch: GuestArch, text: &str) -> Result<Self, ModelError> {
        let mut parts = text.split(',');
        let mut model = Self::by_name(arch, parts.next().unwrap_or_default())?;
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
        Ok(model)
    }

    fn set(&mut self, key: &str, value: &str) -> Result<(), ModelError> {
        let bad = |expected| ModelError::BadValue {
            model: self.name.clone(),
            feature: key.to_owned(),
            value: value.to_owned(),
            expected,
        };
        if key == "phys-bits" {
            let bits = value.parse().ok().filter(|n| (32..=52).contains(n));
            self.phys_bits = bits.ok_or_else(|| bad("32 to 52"))?;
            return Ok(());
        }
        let feature = CpuidFeature::from_name(key);
        if feature.is_none() && !PROPERTIES.contains(&key) {
            return Err(ModelError::UnknownFeature {
                model: self.name.clone(),
                feature: key.to_owned(),
                hint: hint(key, CpuidFeature::names().chain(PROPERTIES)),
            });
        }
        let on = match value {
            "on" | "true" | "yes" => true,
            "off" | "false" | "no" => false,
            _ => return Err(bad("on or off")),
        };
        match feature {
            Some(feature) => self.set_feature(feature, on),
            None if key == "kvm" => self.kvm = on,
            None => self.enforce = on,
        }
        Ok(())
    }

    fn set_feature(&mut self, feature: CpuidFeature, on: bool) {
        if on {
            self.features.insert(feature);
            self.explicit.insert(feature);
            self.disabled.remove(feature);
        } else {
            self.features.remove(feature);
            self.explicit.remove(feature);
            self.disabled.insert(feature);
        }
    }

    /// Keeps what `supported` has; `all` models take all of it. Fails with the list of what is
    /// missing and was asked for by name (or brought by the model, with `enforce`).
    pub fn restricted_to(&self, supported: X86Features) -> Result<Self, ModelError> {
        let mut out = self.clone();
        if self.all {
            out.features = self.features.union(supported).difference(self.disabled);
        }
        let missing = out.features.difference(supported);
        let fatal = if self.enforce && !self.all { missing } else { missing.intersection(self.explicit) };
        if !fatal.is_empty() {
            return Err(ModelError::Conflict {
                model: self.name.clone(),
                reason: format!("the accelerator has no {fatal}: leave it out"),
            });
        }
        out.features = out.features.intersection(supported);
        Ok(out)
    }
}

impl fmt::Display for X86Model {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ({})", self.name, self.features)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<X86Model, ModelError> {
        X86Model::parse(GuestArch::X86_64, text)
    }

    #[test]
    fn models_and_changes() {
        for (name, _) in X86Model::list() {
            let m = parse(name).unwrap();
            assert!(m.brand.len() < 48 && m.features.has_name("fpu"), "{name}");
        }
        let m = parse("x86-64-v3,-avx2,sse4a=on,phys-bits=40,kvm=off").unwrap();
        assert!(!m.features.has_name("avx2") && m.features.has_name("avx"));
        assert!(m.explicit.has_name("sse4a") && m.disabled.has_name("avx2"));
        assert_eq!((m.phys_bits, m.kvm), (40, false));
        let m = X86Model::default_for(GuestArch::I386);
        assert!(!m.features.has_name("lm"), "{m}");
    }

    #[test]
    fn mistakes_are_explained() {
        let text = |s: &str| parse(s).unwrap_err().to_string();
        assert!(text("x86-64-v5").contains("did you mean"), "{}", text("x86-64-v5"));
        assert!(text("qemu64,+avx3").contains("did you mean"), "{}", text("qemu64,+avx3"));
        assert!(text("qemu64,avx=maybe").contains("on or off"));
        assert!(text("qemu64,avx3=1").contains("did you mean"), "{}", text("qemu64,avx3=1"));
        assert!(text("qemu64,phys-bits=60").contains("32 to 52"));
    }

    #[test]
    fn restriction_drops_or_refuses() {
        let supported = X86Model::base64();
        let m = parse("x86-64-v4").unwrap().restricted_to(supported).unwrap();
        assert_eq!(m.features, supported);
        let err = parse("qemu64,+avx2,+bmi2").unwrap().restricted_to(supported).unwrap_err();
        assert!(err.to_string().contains("no avx2 bmi2"), "{err}");
        assert!(parse("x86-64-v2,enforce").unwrap().restricted_to(supported).is_err());
        let m = parse("max,-sse2").unwrap().restricted_to(supported).unwrap();
        assert!(m.features.has_name("sse") && !m.features.has_name("sse2"));
    }
}
